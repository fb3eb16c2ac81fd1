"""Warm sandboxes: who gets one, how many there are, and that none is left. Local ones, because they start quickly."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from tests.sandboxes.conftest import left_behind

from ridethrough.runtime.clock import FakeClock
from ridethrough.runtime.errors import SandboxError, SandboxUnavailable, UsageError
from ridethrough.sandboxes.docker import DockerHost
from ridethrough.sandboxes.local import LocalHost
from ridethrough.sandboxes.pool import CHECK_SECONDS, DEMAND_SECONDS, IDLE_SECONDS, MOST, Pool
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import Sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.processes]

PATIENCE = 60.0
LOCAL = SandboxProfile(kind="local")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.fixture
async def local(runtime: Path) -> AsyncGenerator[LocalHost]:
    async with LocalHost.open(runtime=runtime) as opened:
        yield opened
        assert not await opened.found()


async def settled(pool: Pool, condition: Callable[[], bool]) -> None:
    """Wait for what the pool does in the background."""
    with anyio.fail_after(PATIENCE):
        while not condition():
            await anyio.wait_all_tasks_blocked()
            await anyio.lowlevel.checkpoint()


def warm(pool: Pool) -> int:
    return sum(pool.statistics().warm.values())


async def closed(*sandboxes: Sandbox) -> None:
    for sandbox in sandboxes:
        await sandbox.aclose()


async def test_the_second_one_is_warm(local: LocalHost, clock: FakeClock) -> None:
    """The first has to be started; then one is kept ready, and is what it would have been."""
    async with Pool.open(local, clock=clock, labels={"whose": "test"}) as pool:
        assert not pool.ids()
        first = await pool.acquire(LOCAL)
        await settled(pool, lambda: warm(pool) == 1)
        assert pool.ids() != [first.id]
        second = await pool.acquire(replace(LOCAL, warm=3))
        assert (pool.statistics().hits, pool.statistics().misses) == (1, 1)
        assert (await second.exec(["echo", "ready"])).stdout == "ready\n"
        assert {found.labels["whose"] for found in await local.found()} == {"test"}
        await closed(first, second)


async def test_who_gets_a_warm_one(local: LocalHost, clock: FakeClock) -> None:
    """Whoever asks for the same make; an environment is put on when it is handed out, and not taken off again."""
    async with Pool.open(local, clock=clock) as pool:
        first = await pool.acquire(LOCAL)
        await settled(pool, lambda: warm(pool) == 1)
        dressed = await pool.acquire(replace(LOCAL, env={"A": "1"}))
        assert pool.statistics().hits == 1
        assert (await dressed.exec(["sh", "-c", "echo $A"])).stdout == "1\n"
        await pool.release(dressed, used=False)
        assert dressed.id not in pool.ids()
        other = await pool.acquire(replace(LOCAL, pids=64))
        assert pool.statistics().misses == 2
        await closed(first, other)


async def test_none_is_kept_of_a_profile_that_wants_none(local: LocalHost, clock: FakeClock) -> None:
    async with Pool.open(local, clock=clock) as pool:
        sandbox = await pool.acquire(replace(LOCAL, warm=0))
        assert pool.statistics().target == {"python": 0}
        assert not pool.ids()
        await sandbox.aclose()


async def test_demand_makes_more_and_time_makes_fewer(local: LocalHost, clock: FakeClock) -> None:
    """As many as one burst needed; after a minute as many as the profile says, later none."""
    async with Pool.open(local, clock=clock) as pool:
        lent = [await pool.acquire(LOCAL) for _ in range(3)]
        await settled(pool, lambda: warm(pool) == 3)
        clock.advance(DEMAND_SECONDS + 2)
        await settled(pool, lambda: warm(pool) == 1)
        clock.advance(IDLE_SECONDS)
        await settled(pool, lambda: warm(pool) == 0)
        await closed(*lent)


async def test_there_is_a_most(local: LocalHost, clock: FakeClock) -> None:
    async with Pool.open(local, clock=clock) as pool:
        lent = [await pool.acquire(LOCAL) for _ in range(MOST + 4)]
        assert pool.statistics().target == {"python": MOST}
        await closed(*lent)


async def test_only_what_was_never_used_comes_back(local: LocalHost, clock: FakeClock) -> None:
    """The used one is removed; the other is handed out again."""
    gone: list[str] = []

    async def after(id: str) -> None:
        gone.append(id)

    async with Pool.open(local, clock=clock, after=after) as pool:
        used = await pool.acquire(LOCAL)
        await settled(pool, lambda: warm(pool) == 1)
        await pool.release(used, used=True)
        await settled(pool, lambda: gone == [used.id])
        unused = await pool.acquire(replace(LOCAL, warm=2))
        await pool.release(unused, used=False)
        assert unused.id in pool.ids()
    assert used.id in gone
    assert unused.id in gone


async def test_a_dead_one_is_replaced(local: LocalHost, clock: FakeClock) -> None:
    """When it is looked at, or at the latest when somebody asks for one."""
    async with Pool.open(local, clock=clock) as pool:
        first = await pool.acquire(LOCAL)
        for kill_and in ("look", "ask"):
            await settled(pool, lambda: warm(pool) == 1)
            [id] = pool.ids()
            await local.remove(id)
            if kill_and == "look":
                clock.advance(CHECK_SECONDS)
                await settled(pool, lambda: pool.statistics().replaced == 1)
            else:
                other = await pool.acquire(LOCAL)
                assert other.id != id
                assert (await other.exec(["true"])).exit_code == 0
                await other.aclose()
        assert pool.statistics().replaced == 2
        await first.aclose()


async def test_all_are_on_record_before_they_are_there(local: LocalHost, clock: FakeClock) -> None:
    """And off it when they are gone, those included that were never made."""
    record: dict[str, str] = {}

    async def before(id: str, profile: SandboxProfile) -> None:
        assert id not in [found.id for found in await local.found()]
        record[id] = profile.name

    async def after(id: str) -> None:
        del record[id]

    async with Pool.open(local, clock=clock, before=before, after=after) as pool:
        sandbox = await pool.acquire(LOCAL)
        await settled(pool, lambda: warm(pool) == 1)
        assert set(record) == {sandbox.id, *pool.ids()}
        await pool.release(sandbox, used=True)
    assert not record


async def test_failures_are_not_repeated_at_once(host: DockerHost, clock: FakeClock) -> None:
    """The one who asks is told; what is tried in the background waits longer each time."""
    profile = SandboxProfile(image="ridethrough/none:1")
    record: set[str] = set()

    async def before(id: str, profile: SandboxProfile) -> None:
        record.add(id)

    async def after(id: str) -> None:
        record.remove(id)

    async with Pool.open(host, clock=clock, before=before, after=after) as pool:
        with pytest.raises(SandboxUnavailable, match="sandbox build"):
            await pool.acquire(profile)
        await settled(pool, lambda: pool.statistics().failures == 1)
        clock.advance(1.0)
        await settled(pool, lambda: pool.statistics().failures == 2)
        clock.advance(1.0)
        await settled(pool, lambda: pool.statistics().starting == 0)
        await anyio.wait_all_tasks_blocked()
        assert pool.statistics().failures == 2
    assert not record


async def test_a_record_that_cannot_be_written_is_a_failure_like_others(local: LocalHost, clock: FakeClock) -> None:
    """Nothing is made that nobody knows of."""

    async def before(id: str, profile: SandboxProfile) -> None:
        raise SandboxError("no record")

    async with Pool.open(local, clock=clock, before=before) as pool:
        with pytest.raises(SandboxError, match="no record"):
            await pool.acquire(LOCAL)
        assert not await local.found()


async def test_who_is_cancelled_leaves_nothing(local: LocalHost, clock: FakeClock) -> None:
    """While one is started, and while a warm one is looked at."""
    async with Pool.open(local, clock=clock) as pool:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await pool.acquire(LOCAL)
        await settled(pool, lambda: warm(pool) == 1)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await pool.acquire(LOCAL)
        assert scope.cancelled_caught
        await settled(pool, lambda: warm(pool) == pool.statistics().target["python"])
        assert {found.id for found in await local.found()} == set(pool.ids())


async def test_in_the_middle_of_starting_it_is_closed(local: LocalHost, clock: FakeClock) -> None:
    async with Pool.open(local, clock=clock) as pool:
        sandbox = await pool.acquire(LOCAL)
        await settled(pool, lambda: pool.statistics().starting == 1 or warm(pool) == 1)
    assert [found.id for found in await local.found()] == [sandbox.id]
    with pytest.raises(UsageError):
        await pool.acquire(LOCAL)
    await sandbox.aclose()


async def test_containers_are_kept_warm(host: DockerHost, python_image: str) -> None:
    """The same with what it is for, by the machine's own clock."""
    async with Pool.open(host) as pool:
        profile = SandboxProfile(image=python_image)
        first = await pool.acquire(profile)
        await settled(pool, lambda: warm(pool) == 1)
        second = await pool.acquire(profile)
        assert pool.statistics().hits == 1
        assert (await second.exec(["id", "-u"])).stdout == "65534\n"
        for sandbox in (first, second):
            await pool.release(sandbox, used=True)
    assert not left_behind()
