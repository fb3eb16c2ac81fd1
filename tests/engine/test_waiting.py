"""Timers, signals and questions: what is waited for survives, and comes to exactly one waiter."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import anyio
import pytest

from ridethrough import (
    FakeClock,
    NotFound,
    RunConflict,
    RunFailed,
    SerializationError,
    ask,
    gather,
    sleep,
    step,
    wait_for,
    workflow,
)

pytestmark = pytest.mark.anyio


@workflow
async def sleeper(seconds: float) -> str:
    """One long timer."""
    await sleep(timedelta(seconds=seconds))
    return "awake"


async def test_a_timer_keeps_its_deadline_over_restarts(open_runtime: Any, reaches: Any, clock: FakeClock) -> None:
    """Not all of the time again: the rest of it."""
    async with open_runtime(clock=clock) as runtime:
        await reaches(await runtime.start(sleeper, 3600, id="r"), "waiting")
    clock.advance(3000)
    async with open_runtime(clock=clock) as runtime:
        run = await runtime.get("r")
        assert run.status == "waiting"
        [wait] = (await runtime.describe("r")).waits
        assert wait.until is not None
        assert wait.until.timestamp() - clock.now() == 600
        clock.advance(601)
        assert await run.result() == "awake"


async def test_a_timer_that_was_due_while_nobody_was_there(open_runtime: Any, reaches: Any, clock: FakeClock) -> None:
    """It is over at once."""
    async with open_runtime(clock=clock) as runtime:
        await reaches(await runtime.start(sleeper, 60, id="r"), "waiting")
    clock.advance(1_000_000)
    async with open_runtime(clock=clock) as runtime:
        assert await (await runtime.get("r")).result() == "awake"


async def test_resuming_a_sleeper_early_does_not_wake_it(open_runtime: Any, reaches: Any, clock: FakeClock) -> None:
    """An explicit resume looks at the run; its timer stands."""
    async with open_runtime(clock=clock) as runtime:
        run = await runtime.start(sleeper, 3600, id="r")
        await reaches(run, "waiting")
        await runtime.resume("r")
        await reaches(run, "waiting")
        clock.advance(3601)
        assert await run.result() == "awake"


async def test_a_short_timer_stays_in_memory(open_runtime: Any, eventually: Any, clock: FakeClock) -> None:
    """Parking and claiming would cost more than waiting."""
    async with open_runtime(clock=clock) as runtime:
        run = await runtime.start(sleeper, 0.5)

        async def recorded() -> bool:
            return bool((await run.view()).waits)

        await eventually(recorded)
        assert run.status == "running"
        clock.advance(0.5)
        assert await run.result() == "awake"


async def test_signals_are_taken_in_order(open_runtime: Any) -> None:
    """Also those that came before anybody waited."""

    @workflow
    async def taking() -> list[int]:
        return [await wait_for("n", int), await wait_for("n", int), await wait_for("n", int)]

    async with open_runtime(concurrency=0) as runtime:
        await runtime.start(taking, id="r")
        await runtime.signal("r", "n", 1)
        await runtime.signal("r", "n", 2)
    async with open_runtime() as runtime:
        await runtime.signal("r", "n", 3)
        assert await (await runtime.get("r")).result() == [1, 2, 3]


@pytest.mark.parametrize("parked", [True, False])
async def test_two_branches_wait_for_one_name(open_runtime: Any, reaches: Any, parked: bool) -> None:
    """Each signal goes to one of them."""

    @workflow
    async def rivals() -> list[int]:
        return await gather(*(wait_for("n", int) for _ in range(5)))

    async with open_runtime() as runtime:
        run = await runtime.start(rivals)
        if parked:
            await reaches(run, "waiting")
        for number in range(5):
            await runtime.signal(run.id, "n", number)
        assert sorted(await run.result()) == [0, 1, 2, 3, 4]


async def test_a_timeout_is_recorded(open_runtime: Any, reaches: Any, eventually: Any, clock: FakeClock) -> None:
    """A signal that comes later does not change what was seen."""

    @workflow
    async def impatient() -> str:
        try:
            first = await wait_for("n", str, timeout=60)
        except TimeoutError as error:
            first = str(error)
        return f"{first} {await wait_for('go', str)}"

    async with open_runtime(clock=clock) as runtime:
        run = await runtime.start(impatient, id="r")
        await reaches(run, "waiting")
        clock.advance(61)

        async def moved() -> bool:
            return [wait.name for wait in (await run.view()).waits] == ["go"]

        await eventually(moved)
    async with open_runtime(clock=clock) as runtime:
        await runtime.signal("r", "n", "late")
        await runtime.signal("r", "go", "on")
        assert await (await runtime.get("r")).result() == "No signal 'n' came within 60 s. on"


async def test_a_wrong_type_is_refused_at_the_door(open_runtime: Any, reaches: Any) -> None:
    """The sender is told; the run goes on waiting."""

    @workflow
    async def counting() -> int:
        return await wait_for("n", int)

    async with open_runtime() as runtime:
        run = await runtime.start(counting, id="r")
        await reaches(run, "waiting")
        with pytest.raises(SerializationError, match="integer"):
            await runtime.signal("r", "n", "seven")
        assert run.status == "waiting"
        await runtime.signal("r", "n", 7)
        assert await run.result() == 7


async def test_a_wrong_type_that_came_early_is_set_aside(open_runtime: Any) -> None:
    """Nobody waited yet, so nobody could refuse it."""

    @workflow
    async def counting() -> int:
        return await wait_for("n", int)

    async with open_runtime(concurrency=0) as runtime:
        await runtime.start(counting, id="r")
        await runtime.signal("r", "n", "seven")
        await runtime.signal("r", "n", 7)
    async with open_runtime() as runtime:
        assert await (await runtime.get("r")).result() == 7


async def test_a_signal_for_nobody(open_runtime: Any) -> None:
    """No such run, or one that has ended."""

    @workflow
    async def ending() -> None: ...

    async with open_runtime() as runtime:
        with pytest.raises(NotFound, match="ridethrough runs"):
            await runtime.signal("nobody", "n", 1)
        await (await runtime.start(ending, id="r")).result()
        with pytest.raises(RunConflict, match="has ended"):
            await runtime.signal("r", "n", 1)


async def test_asking_a_person(open_runtime: Any, reaches: Any) -> None:
    """The question is shown; the answer has the type that was asked for."""

    @workflow
    async def asking() -> bool:
        return await ask("Really?", bool)

    async with open_runtime() as runtime:
        run = await runtime.start(asking, id="r")
        await reaches(run, "waiting")
    async with open_runtime() as runtime:
        view = await runtime.describe("r")
        assert [(wait.kind, wait.name, wait.question) for wait in view.waits] == [("question", "ask#1", "Really?")]
        assert view.pause is not None
        assert view.pause.reason == "question"
        with pytest.raises(SerializationError):
            await runtime.signal("r", "ask#1", "perhaps")
        await runtime.signal("r", "ask#1", True)
        run = await runtime.get("r")
        assert await run.result() is True
        kinds = [event.type async for event in run.events()]
        assert kinds.count("approval_requested") == 1


async def test_a_signal_that_comes_while_the_run_parks(open_runtime: Any) -> None:
    """However close: it is either seen before parking or it wakes the parked run."""

    @workflow
    async def waiting(count: int) -> int:
        total = 0
        for _ in range(count):
            total += await wait_for("n", int)
        return total

    @step
    async def nothing() -> None: ...

    async with open_runtime() as runtime:
        run = await runtime.start(waiting, 40, id="r")
        for _ in range(40):
            await runtime.signal("r", "n", 1)
        assert await run.result() == 40


@workflow(name="cut_from_outside")
async def cut_from_outside() -> str:
    with anyio.move_on_after(1.5):
        return await wait_for("x", str)
    return "gone"


async def test_a_deadline_that_does_not_survive_is_refused(open_runtime: Any) -> None:
    """It would be lost when the run is parked, and the run would wait for ever."""
    async with open_runtime() as runtime:
        run = await runtime.start(cut_from_outside, id="r")
        with pytest.raises(RunFailed, match=r"wait_for\(\.\.\., timeout="):
            await run.result()
