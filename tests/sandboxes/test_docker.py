"""Sandboxes in containers: the whole suite, and what only a real engine can do to one."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio.abc import ByteStream, TaskGroup, TaskStatus
from tests.sandboxes.conformance import PATIENCE, Conformance, OpenHost, box, new_id
from tests.sandboxes.conftest import BUSYBOX, SESSION, left_behind, tarred

from ridethrough.runtime.errors import ConfigError, SandboxError, SandboxGone, SandboxTimeout, SandboxUnavailable
from ridethrough.sandboxes.container import container_name
from ridethrough.sandboxes.docker import DockerHost
from ridethrough.sandboxes.engine import THREADS
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import Host, Sandbox

pytestmark = pytest.mark.anyio

__all__ = ["box"]


@pytest.fixture(scope="module", params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def profile(python_image: str) -> SandboxProfile:
    return SandboxProfile(image=python_image, cpus=2.0, env={"FROM_PROFILE": "yes"})


@pytest.fixture(scope="module")
async def host(anyio_backend: str, engine: Any) -> AsyncGenerator[DockerHost]:
    async with DockerHost.open(labels=SESSION) as opened:
        yield opened


@pytest.fixture
def another_host() -> OpenHost:
    def open_another() -> AbstractAsyncContextManager[Host]:
        return DockerHost.open(labels=SESSION)

    return open_another


class TestDocker(Conformance):
    """The suite in containers."""


# --- what is asked for ----------------------------------------------------------------------------------------------


async def test_an_id_is_used_once(host: DockerHost, profile: SandboxProfile, box: Sandbox) -> None:
    """The second one of that id is refused, and the first is unharmed."""
    with pytest.raises(SandboxError, match="already"):
        await host.create(profile, id=box.id)
    assert (await box.exec(["true"])).exit_code == 0


async def test_what_cannot_be_made_says_what_to_do(host: DockerHost, profile: SandboxProfile) -> None:
    with pytest.raises(SandboxUnavailable, match="sandbox build"):
        await host.create(replace(profile, image="ridethrough/none:1"), id=new_id())
    with pytest.raises(SandboxUnavailable, match="relay_for"):
        await host.create(replace(profile, network=("example.com",)), id=new_id())
    with pytest.raises(SandboxUnavailable, match=r"make engine|DOCKER_HOST"):
        async with DockerHost.open(url="unix:///nowhere/docker.sock"):
            pass
    with pytest.raises(ConfigError, match="ssh"):
        async with DockerHost.open(url="ssh://elsewhere"):
            pass


async def test_localhost_is_known_whatever_the_image(
    host: DockerHost, profile: SandboxProfile, box: Sandbox, busybox: str
) -> None:
    own = await box.exec(["python3", "-c", "import socket; print(socket.gethostbyname('localhost'))"])
    assert own.stdout.strip() == "127.0.0.1"
    foreign = await host.create(replace(profile, image=busybox), id=new_id())
    try:
        assert "localhost" in (await foreign.exec(["sh", "-c", "cat /etc/hosts"])).stdout
    finally:
        await foreign.aclose()


async def test_another_user_has_no_more_rights(box: Sandbox) -> None:
    result = await box.exec(["sh", "-c", "id -u; cat; echo $FROM_PROFILE >&2"], user="4321", stdin="in")
    assert (result.stdout, result.stderr) == ("4321\nin", "yes\n")
    for user in ("0", "root", "nobody"):
        with pytest.raises(SandboxError, match=r"root|number"):
            await box.exec(["id"], user=user)


async def test_volumes_of_an_image_are_closed(engine: Any, host: DockerHost, busybox: str) -> None:
    """They would be on the host's disk, and without a limit."""
    name = f"{BUSYBOX}:volume"
    if not engine.images(name):
        made = engine.create_container(busybox, ["true"])["Id"]
        engine.commit(made, repository=BUSYBOX, tag="volume", changes="VOLUME /data")
        engine.remove_container(made)
    sandbox = await host.create(SandboxProfile(image=name), id=new_id())
    try:
        result = await sandbox.exec(["sh", "-c", "echo x > /data/x"])
        assert "Read-only" in result.stderr
    finally:
        await sandbox.aclose()


# --- hostile --------------------------------------------------------------------------------------------------------


@pytest.fixture
async def small(host: DockerHost, profile: SandboxProfile) -> AsyncGenerator[Sandbox]:
    """A sandbox that may come to harm."""
    narrow = replace(profile, memory=96 * 2**20, pids=48, disk=16 * 2**20, cpus=0.5)
    sandbox = await host.create(narrow, id=new_id(), linger=5)
    yield sandbox
    with anyio.CancelScope(shield=True):
        await sandbox.aclose()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("kill -9 $PPID; sleep 1000", "killed from inside"),
        ("kill -9 -1; sleep 1000", "killed from inside"),
    ],
    ids=["supervisor", "everything"],
)
async def test_a_supervisor_that_is_killed_from_inside(
    engine: Any, small: Sandbox, box: Sandbox, line: str, reason: str
) -> None:
    """The call is told; the container has removed itself; others go on."""
    with anyio.fail_after(PATIENCE), pytest.raises(SandboxGone, match=reason):
        await small.exec(["sh", "-c", line])
    with pytest.raises(SandboxGone, match=reason):
        await small.exec(["true"])
    await gone(small.id)
    assert (await box.exec(["true"])).exit_code == 0


async def test_a_connection_that_is_killed_from_inside(host: DockerHost, small: Sandbox) -> None:
    """The call is told at once; the supervisor lives, and whoever attaches finds it and what it has kept."""
    await small.write("kept", "still")
    with anyio.fail_after(PATIENCE), pytest.raises(SandboxGone, match="attached"):
        await small.exec(["sh", "-c", "kill -9 $(pgrep -f docker-init -P 0; pgrep -P 1 | grep -vx $PPID); sleep 1000"])
    again = await host.attach(small.profile, small.id)
    assert await again.read("kept") == b"still"


async def test_a_supervisor_that_is_stopped_from_inside(small: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not answer any more, so the sandbox is removed; nobody waits longer than the deadline and its margin."""
    monkeypatch.setattr("ridethrough.sandboxes.command.MARGIN", 1.0)
    with anyio.fail_after(PATIENCE), pytest.raises(SandboxTimeout, match="is gone"):
        await small.exec(["sh", "-c", "kill -STOP $PPID"], timeout=0.1)
    await gone(small.id)


async def test_a_container_that_is_removed_in_the_middle_of_a_call(engine: Any, small: Sandbox) -> None:
    """By somebody else, with the engine's own means."""
    async with anyio.create_task_group() as group:

        async def told() -> None:
            with pytest.raises(SandboxGone, match="removed"):
                await small.exec(["sleep", "1000"], call_id="long")

        group.start_soon(told)
        while (await small.exec(["pgrep", "-x", "sleep"])).exit_code != 0:
            await anyio.lowlevel.checkpoint()
        await anyio.to_thread.run_sync(lambda: engine.remove_container(container_name(small.id), force=True))


@pytest.mark.parametrize(
    ("code", "limits"),
    [
        ("import os\nwhile True: os.fork()", ("pids", None)),
        ("x = [bytes(1000000) for _ in range(10**6)]", ("memory",)),
        ("f = open('/workspace/f', 'wb')\nwhile True: f.write(bytes(1000000))", ("disk",)),
        ("f = open('/tmp/f', 'wb')\nwhile True: f.write(bytes(1000000))", ("disk",)),
        ("while True: pass", (None,)),
    ],
    ids=["fork bomb", "memory hog", "disk filler", "filler of /tmp", "spin"],
)
async def test_one_that_takes_all_it_can_get(small: Sandbox, box: Sandbox, code: str, limits: tuple[Any, ...]) -> None:
    """Its limit is named, or its deadline ends it; neither its sandbox nor others are the worse for it."""
    try:
        result = await small.exec(["python3", "-c", code, "greedy"], timeout=2)
        assert result.limit in limits
        assert result.exit_code != 0
    except SandboxTimeout:
        assert None in limits
    assert (await box.exec(["echo", "unharmed"])).stdout == "unharmed\n"
    await small.remove("f") if "/workspace/f" in code else None
    assert (await small.exec(["echo", "still here"], timeout=30)).stdout == "still here\n"
    assert (await small.exec(["pgrep", "-fc", "greedy"])).stdout == "0\n"


LIES = {
    "noise": "cat /dev/urandom",
    "a length without end": r"printf '\377\377\377\377\377\377\377\377'; cat",
    "not JSON": r"printf '\0\0\0\4\0\0\0\0abcd'; cat",
    "another protocol": r"""printf '\0\0\0\034\0\0\0\0{"hello": 1, "protocol": 99}'; cat""",
    "a lie after the greeting": r"""printf '\0\0\0\033\0\0\0\0{"hello": 1, "protocol": 1}'; cat /dev/zero""",
    "an end": "exit 0",
}


@pytest.mark.parametrize("lie", LIES)
async def test_an_image_whose_python_is_none(engine: Any, host: DockerHost, busybox: str, lie: str) -> None:
    """What it says is believed as far as it is checked; nothing is left of the attempt."""
    name = f"{BUSYBOX}:liar-{sorted(LIES).index(lie)}"
    script = f"#!/bin/sh\n{LIES[lie]}\n"
    made = engine.create_container(busybox, ["sh"])["Id"]
    engine.put_archive(made, "/bin", tarred({"python3": script.encode()}))
    engine.commit(made, repository=name.partition(":")[0], tag=name.partition(":")[2])
    engine.remove_container(made)
    try:
        with anyio.fail_after(PATIENCE), pytest.raises(SandboxUnavailable):
            await host.create(SandboxProfile(image=name), id=new_id())
        assert not [each for each in await host.found() if "conf-" in each.id and each.profile == "liar"]
    finally:
        engine.remove_image(name, force=True)


# --- an engine that goes away ---------------------------------------------------------------------------------------


class Line:
    """The engine behind a socket that can be closed, with all its connections: as if the engine had died."""

    def __init__(self, path: Path, group: TaskGroup) -> None:
        self.path = path
        self._group = group
        self._scope = anyio.CancelScope()

    async def mend(self) -> None:
        """Let the engine be there (again)."""
        self._scope = anyio.CancelScope()
        await self._group.start(self._listen)

    def cut(self) -> None:
        """Let it be gone."""
        self._scope.cancel()
        self.path.unlink()

    async def _listen(self, *, task_status: TaskStatus[None]) -> None:
        with self._scope:
            async with await anyio.create_unix_listener(self.path) as listener:
                task_status.started()
                await listener.serve(self._serve)

    async def _serve(self, client: ByteStream) -> None:
        async with client, await anyio.connect_unix("/var/run/docker.sock") as server:
            async with anyio.create_task_group() as both:
                both.start_soon(self._pump, client, server)
                await self._pump(server, client)
                both.cancel_scope.cancel()

    async def _pump(self, source: ByteStream, sink: ByteStream) -> None:
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for data in source:
                await sink.send(data)
            await sink.send_eof()


async def test_an_engine_that_dies_in_the_middle(engine: Any, profile: SandboxProfile, tmp_path: Path) -> None:
    """Calls that wait are told, so are those after them, and who wants a new sandbox; when the engine is back there is
    one again. The container ends by itself."""
    id = new_id()
    async with anyio.create_task_group() as group:
        line = Line(tmp_path / "engine", group)
        await line.mend()
        async with DockerHost.open(url=f"unix://{line.path}", labels=SESSION) as host:
            sandbox = await host.create(profile, id=id, linger=1)
            async with anyio.create_task_group() as calls:

                async def told() -> None:
                    with anyio.fail_after(PATIENCE), pytest.raises(SandboxGone, match="engine"):
                        await sandbox.exec(["sleep", "1000"])

                calls.start_soon(told)
                while (await sandbox.exec(["pgrep", "-x", "sleep"])).exit_code != 0:
                    await anyio.lowlevel.checkpoint()
                line.cut()
            with pytest.raises(SandboxGone):
                await sandbox.exec(["true"])
            for asked in (host.create(profile, id=new_id()), host.attach(profile, id), sandbox.aclose()):
                with pytest.raises(SandboxUnavailable, match="make engine"):
                    await asked
            await line.mend()
            again = await host.create(profile, id=new_id())
            assert (await again.exec(["true"])).exit_code == 0
            await again.aclose()
        group.cancel_scope.cancel()
    await gone(id)


async def gone(id: str) -> None:
    """Wait until a container has removed itself."""
    with anyio.fail_after(PATIENCE):
        while container_name(id) in await anyio.to_thread.run_sync(left_behind):
            await anyio.lowlevel.checkpoint()


# --- many, and cancelled --------------------------------------------------------------------------------------------


async def use(host: DockerHost, profile: SandboxProfile, seed: int) -> str:
    """Make a sandbox, use it and remove it, and be cancelled anywhere in that; what became of it."""
    chance = random.Random(seed)
    with anyio.move_on_after(chance.choice([chance.uniform(0, 0.1), chance.uniform(0.1, 1.0), 60])) as scope:
        sandbox = await host.create(profile, id=new_id(), linger=5)
        try:
            result = await sandbox.exec(["sh", "-c", "sleep 0.05; cat"], stdin="used")
            assert result.stdout == "used"
        finally:
            with anyio.CancelScope(shield=True):
                await sandbox.aclose()
    return "cancelled" if scope.cancelled_caught else "used"


async def crowd(host: DockerHost, profile: SandboxProfile, *, tasks: int, each: int) -> list[str]:
    fates: list[str] = []

    async def work(number: int) -> None:
        for round in range(each):
            fates.append(await use(host, profile, number * 1000 + round))

    async with anyio.create_task_group() as group:
        for number in range(tasks):
            group.start_soon(work, number)
    return fates


def resources() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_whole_life_on_either_event_loop(engine: Any, profile: SandboxProfile) -> None:
    """Made, used, let go of, frozen, attached to by another, removed."""
    async with DockerHost.open(labels=SESSION) as host, DockerHost.open(labels=SESSION) as other:
        assert host.name == other.name
        sandbox = await host.create(profile, id=new_id(), labels={"mine": "yes"})
        assert sandbox.boundary
        assert (await sandbox.exec(["cat"], stdin=b"in")).stdout_bytes == b"in"
        items = [item async for item in sandbox.exec_stream(["seq", "3"])]
        assert items[-1].stdout == "1\n2\n3\n"  # type: ignore[union-attr]
        await sandbox.write("file", "kept")
        await sandbox.detach()
        await other.pause(sandbox.id)
        [found] = [each for each in await other.found() if each.id == sandbox.id]
        assert (found.state, found.labels["mine"], found.profile, found.runtime) == ("paused", "yes", "python", "runc")
        again = await other.attach(profile, sandbox.id)
        assert await again.read("file") == b"kept"
        with pytest.raises(SandboxTimeout):
            await again.exec(["sleep", "1000"], timeout=0.1)
        await other.pause(sandbox.id)
        assert await other.remove(sandbox.id)
        assert not await other.remove(sandbox.id)
        with pytest.raises(SandboxGone):
            await again.exec(["true"])
        with pytest.raises(SandboxGone):
            await host.attach(profile, sandbox.id)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("anyio_backend", "tasks", "each"), [("asyncio", 20, 10), ("trio", 6, 5)])
async def test_sandboxes_of_tasks_that_are_cancelled_leave_nothing(
    engine: Any, profile: SandboxProfile, tasks: int, each: int
) -> None:
    before = resources()
    async with DockerHost.open(labels={**SESSION, "ridethrough.test.crowd": "1"}) as host:
        fates = await crowd(host, replace(profile, memory=64 * 2**20), tasks=tasks, each=each)
        assert "used" in fates
        assert "cancelled" in fates
        assert not [each for each in await host.found() if each.labels.get("ridethrough.test.crowd")]
    after = resources()
    assert after[0] <= before[0] + 2, f"descriptors: {before[0]}, then {after[0]}"
    assert after[1] <= before[1] + THREADS, f"threads: {before[1]}, then {after[1]}"


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.02, 0.05, 0.1])
async def test_a_task_that_is_torn_away_leaves_nothing(host: DockerHost, profile: SandboxProfile, delay: float) -> None:
    """asyncio's own cancellation minds no shield."""
    id = new_id()
    task = asyncio.create_task(host.create(profile, id=id, linger=5))
    await asyncio.sleep(delay)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await (await task).aclose()
    await gone(id)
