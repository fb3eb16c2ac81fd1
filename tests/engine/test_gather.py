"""Concurrent branches: their limit, their failures, and what a resumed run makes of them."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from ridethrough import RunFailed, fan_out, gather, sleep, step, wait_for, workflow

pytestmark = pytest.mark.anyio


class Bad(Exception):
    """A planned failure."""


calls: list[Any] = []


@pytest.fixture(autouse=True)
def no_calls() -> None:
    """Count from nothing."""
    calls.clear()


@step
async def work(item: int) -> int:
    """Say that it was called."""
    calls.append(item)
    return item * 10


@step
async def fail(item: int) -> int:
    """Say that it was called, and fail."""
    calls.append(item)
    raise Bad(item)


async def test_paths_do_not_depend_on_timing(open_runtime: Any) -> None:
    """The branch that ends last keeps its place."""
    gates = [anyio.Event() for _ in range(3)]

    @step
    async def gated(item: int) -> int:
        await gates[item].wait()
        if item:
            gates[item - 1].set()
        return item

    @workflow
    async def branching() -> list[int]:
        return await gather(*(gated(item) for item in range(3)))

    async with open_runtime() as runtime:
        run = await runtime.start(branching)
        gates[2].set()
        assert await run.result() == [0, 1, 2]
        steps = (await runtime.describe(run.id)).steps
        assert [(item.path, item.output) for item in steps] == [
            ("g1[2]/gated#1", 2), ("g1[1]/gated#1", 1), ("g1[0]/gated#1", 0),
        ]  # fmt: skip


async def test_limit(open_runtime: Any) -> None:
    """Never more at a time, and all of them in the end."""
    running, most = 0, 0

    @step
    async def measured(item: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.lowlevel.checkpoint()
        running -= 1
        return item

    @workflow
    async def limited() -> list[int]:
        return await fan_out(measured, range(10), limit=3)

    async with open_runtime() as runtime:
        assert await (await runtime.start(limited)).result() == list(range(10))
    assert most == 3


async def test_nothing_to_gather(open_runtime: Any) -> None:
    """An empty group is an empty list."""

    @workflow
    async def empty() -> list[Any]:
        return await gather()

    async with open_runtime() as runtime:
        assert await (await runtime.start(empty)).result() == []


async def test_collect(open_runtime: Any, reaches: Any) -> None:
    """Every branch ends; failures stand in their places, on every life."""
    seen: list[Any] = []

    @workflow
    async def collecting() -> None:
        found = await gather(work(1), fail(2), work(3), on_error="collect")
        seen.append([repr(item) for item in found])
        await wait_for("go")

    async with open_runtime() as runtime:
        await reaches(await runtime.start(collecting, id="r"), "waiting")
    async with open_runtime() as runtime:
        await runtime.signal("r", "go", None)
        await (await runtime.get("r")).result()
    assert sorted(calls) == [1, 2, 3]
    assert all(item == ["10", "Bad(2)", "30"] for item in seen)


async def test_the_first_failure_is_raised_again_and_siblings_stay_ended(open_runtime: Any, reaches: Any) -> None:
    """On resume, both failures are on record; the one that was first in time is raised, not the first in order."""
    slow = anyio.Event()
    seen: list[str] = []

    @step
    async def late(item: int) -> int:
        calls.append(item)
        await slow.wait()
        raise Bad(item)

    @step
    async def never(item: int) -> int:
        calls.append(item)
        try:
            await anyio.sleep_forever()
        finally:
            calls.append("cancelled")
        return item

    @workflow
    async def failing() -> str:
        try:
            await gather(late(0), never(1), fail(2), work(3), limit=3)
        except Bad as error:
            seen.append(str(error))
        await work(4)
        await wait_for("go")
        return "done"

    async with open_runtime() as runtime:
        await reaches(await runtime.start(failing, id="r"), "waiting")
    slow.set()
    async with open_runtime() as runtime:
        await runtime.signal("r", "go", None)
        assert await (await runtime.get("r")).result() == "done"
        paths = [item.path for item in (await runtime.describe("r")).steps]
    assert set(seen) == {"2"}
    assert calls == [0, 1, 2, "cancelled", 4]
    assert paths == ["g1[2]/fail#1", "g1", "work#1", "go#1"]


async def test_nested_groups(open_runtime: Any, reaches: Any) -> None:
    """Paths nest; a failure inside ends the inner group only, if it is caught there."""

    async def inner(base: int) -> Any:
        try:
            return await gather(work(base), gather(work(base + 1), fail(base + 2), limit=1))
        except Bad as error:
            return ["caught", *error.args, await work(base + 3)]

    @workflow
    async def nesting() -> Any:
        found = await gather(inner(10), inner(20))
        await wait_for("go")
        return found

    async with open_runtime() as runtime:
        await reaches(await runtime.start(nesting, id="r"), "waiting")
    before = sorted(calls)
    async with open_runtime() as runtime:
        await runtime.signal("r", "go", None)
        assert await (await runtime.get("r")).result() == [["caught", 12, 130], ["caught", 22, 230]]
        paths = {item.path for item in (await runtime.describe("r")).steps}
    assert sorted(calls) == before == [10, 11, 12, 13, 20, 21, 22, 23]
    assert {"g1[0]/g1[1]/g1[1]/fail#1", "g1[0]/g1[1]/g1", "g1[0]/g1", "g1[1]/work#1"} <= paths


async def test_a_failure_that_is_no_step(open_runtime: Any, reaches: Any) -> None:
    """The branch's own code may raise; it is played again, its siblings are not."""

    async def refusing() -> None:
        await work(1)
        raise Bad("refused")

    async def slow() -> None:
        await work(2)
        await sleep(3600)
        await work(3)

    @workflow
    async def failing() -> str:
        with pytest.raises(Bad, match="refused"):
            await gather(slow(), refusing())
        await wait_for("go")
        return "done"

    async with open_runtime() as runtime:
        await reaches(await runtime.start(failing, id="r"), "waiting")
        waits = (await runtime.describe("r")).waits
        assert [item.name for item in waits] == ["go"], "the timer of the branch that was given up is no wait any more"
    async with open_runtime() as runtime:
        await runtime.signal("r", "go", None)
        assert await (await runtime.get("r")).result() == "done"
    assert sorted(calls) == [1, 2]


async def test_a_failure_that_nobody_catches(open_runtime: Any) -> None:
    """It is the run's, as it is: no group of exceptions."""

    @workflow
    async def failing() -> None:
        await gather(work(1), fail(2))

    async with open_runtime() as runtime:
        with pytest.raises(RunFailed) as caught:
            await (await runtime.start(failing)).result()
        assert caught.value.error_type == "Bad"


async def test_one_blocked_branch_does_not_stop_its_siblings(open_runtime: Any, reaches: Any) -> None:
    """The run is parked only when all of them are blocked."""
    gate, entered = anyio.Event(), anyio.Event()

    @step
    async def gated() -> str:
        entered.set()
        await gate.wait()
        return "through"

    async def busy() -> Any:
        return [await gated(), await wait_for("later", str)]

    @workflow
    async def mixed() -> Any:
        return await gather(wait_for("now", str), busy())

    async with open_runtime() as runtime:
        run = await runtime.start(mixed, id="r")
        await entered.wait()
        assert run.status == "running"
        assert "r" in runtime.worker.resident
        gate.set()
        await reaches(run, "waiting")
        await runtime.signal("r", "later", "b")
        await runtime.signal("r", "now", "a")
        assert await run.result() == ["a", ["through", "b"]]
