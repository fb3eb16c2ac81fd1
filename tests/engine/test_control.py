"""Starting, pausing, resuming, cancelling, forking: from this process and from another."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from ridethrough import (
    FakeClock,
    NotFound,
    RunBusy,
    RunCancelled,
    RunConflict,
    RunPoisoned,
    UsageError,
    gather,
    sleep,
    step,
    wait_for,
    workflow,
)
from ridethrough.runtime import control
from ridethrough.runtime.store import RUNS

pytestmark = pytest.mark.anyio

calls: list[Any] = []


@pytest.fixture(autouse=True)
def no_calls() -> None:
    """Count from nothing."""
    calls.clear()


class Gated:
    """A workflow of two steps; the first one runs until it is let go."""

    def __init__(self, name: str = "gated") -> None:
        self.entered, self.gate = anyio.Event(), anyio.Event()

        @step
        async def first() -> str:
            calls.append("first")
            self.entered.set()
            await self.gate.wait()
            return "a"

        @step
        async def second() -> str:
            calls.append("second")
            return "b"

        @workflow(name=name)
        async def gated() -> str:
            return await first() + await second()

        self.workflow = gated


@workflow
async def waiting(text: str = "") -> str:
    """Wait for one signal."""
    return text + await wait_for("go", str)


async def held(execution: Any) -> None:
    """Wait until the worker knows that it is to start no new step."""
    with anyio.fail_after(20):
        while execution.holding is None:  # noqa: ASYNC110 - nobody else needs an event for this
            await anyio.sleep(0.005)


class TestStart:
    """The same id with the same input is the same run."""

    async def test_twice(self, open_runtime: Any) -> None:
        """At once, and later."""
        async with open_runtime() as runtime:
            results: list[str] = []

            async def one() -> None:
                run = await runtime.start(waiting, "x", id="r")
                results.append(await run.result())

            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(one)
                await runtime.start(waiting, "x", id="r")
                await runtime.signal("r", "go", "y")
            assert results == ["xy"] * 5
            assert len(await runtime.list()) == 1
        async with open_runtime() as runtime:
            assert await (await runtime.start(waiting, "x", id="r")).result() == "xy"

    async def test_with_other_work(self, open_runtime: Any) -> None:
        """Another input, another workflow, large ones too."""

        @workflow
        async def other() -> None: ...

        async with open_runtime() as runtime:
            await runtime.start(waiting, "x", id="r")
            await runtime.start(waiting, "x" * 100_000, id="large")
            for attempt in ((waiting, "z"), (other,)):
                with pytest.raises(RunConflict, match="Give the new run another id"):
                    await runtime.start(*attempt, id="r")
            with pytest.raises(RunConflict):
                await runtime.start(waiting, "y" * 100_000, id="large")

    async def test_wrong_arguments(self, open_runtime: Any) -> None:
        """Nothing is stored."""
        async with open_runtime() as runtime:
            with pytest.raises(UsageError, match="unexpected keyword"):
                await runtime.start(waiting, topic="x")
            with pytest.raises(UsageError, match="spaces"):
                await runtime.start(waiting, id="a b")
            with pytest.raises(UsageError, match="no workflow"):
                await runtime.start(print)
            assert await runtime.list() == []

    async def test_more_than_fit_are_queued(self, open_runtime: Any) -> None:
        """And are executed when there is room; never more at a time."""
        running, most = 0, 0

        @step
        async def measured() -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await anyio.lowlevel.checkpoint()
            running -= 1

        @workflow
        async def measuring(number: int) -> int:
            await measured()
            return number

        async with open_runtime(concurrency=2) as runtime:
            runs = [await runtime.start(measuring, number) for number in range(12)]
            assert [await run.result() for run in runs] == list(range(12))
        assert most <= 2

    async def test_the_urgent_first(self, open_runtime: Any) -> None:
        """Of those that are queued."""
        gated = Gated()

        @workflow
        async def telling(number: int) -> None:
            calls.append(number)

        async with open_runtime(concurrency=1) as runtime:
            await runtime.start(gated.workflow)
            await gated.entered.wait()
            runs = [await runtime.start(telling, number, priority=number) for number in (1, 3, 2)]
            gated.gate.set()
            for run in runs:
                await run.result()
        assert calls == ["first", "second", 3, 2, 1]

    async def test_one_that_is_started_is_not_taken_for_a_lost_one(self, open_runtime: Any) -> None:
        """Hundreds of starts against the loop that looks for lost runs: each is executed once."""

        @step
        async def once(number: int) -> None:
            calls.append(number)

        @workflow
        async def quick(number: int) -> None:
            await once(number)

        async with open_runtime(concurrency=1000) as runtime:

            async def one(number: int) -> None:
                runtime.worker.poke()
                await (await runtime.start(quick, number)).result()

            async with anyio.create_task_group() as tasks:
                for number in range(200):
                    tasks.start_soon(one, number)
            assert {view.recoveries for view in await runtime.list(limit=None)} == {0}
        assert sorted(calls) == list(range(200))


class TestPause:
    """Running steps finish, no new ones start, until somebody resumes."""

    async def test_and_resume(self, open_runtime: Any, reaches: Any) -> None:
        """In one process."""
        gated = Gated()
        async with open_runtime() as runtime:
            run = await runtime.start(gated.workflow)
            await gated.entered.wait()
            assert await runtime.pause(run.id) == "running"
            await held(runtime.worker.resident[run.id])
            gated.gate.set()
            await reaches(run, "paused")
            assert calls == ["first"]
            await runtime.resume(run.id)
            assert await run.result() == "ab"
        assert calls == ["first", "second"]

    async def test_outlives_the_process(self, open_runtime: Any, reaches: Any) -> None:
        """No worker takes it up by itself, and no signal wakes it."""
        async with open_runtime() as runtime:
            run = await runtime.start(waiting, "x", id="r")
            await reaches(run, "waiting")
            assert await runtime.pause("r") == "paused"
            await runtime.signal("r", "go", "y")
        async with open_runtime() as runtime:
            other = await runtime.start(waiting, "other", id="other")
            await runtime.signal("other", "go", "!")
            await other.result()
            assert (await runtime.get("r")).status == "paused"
            run = await runtime.resume("r")
            assert await run.result() == "xy"

    async def test_resumed_before_it_had_stopped(self, open_runtime: Any) -> None:
        """The pause is withdrawn."""
        gated = Gated()
        async with open_runtime() as runtime:
            run = await runtime.start(gated.workflow)
            await gated.entered.wait()
            await runtime.pause(run.id)
            execution = runtime.worker.resident[run.id]
            await held(execution)
            await runtime.resume(run.id)
            gated.gate.set()
            with anyio.fail_after(20):
                assert await run.result() == "ab"

    async def test_an_ended_run(self, open_runtime: Any) -> None:
        """There is nothing to pause."""
        async with open_runtime() as runtime:
            run = await runtime.start(waiting)
            await runtime.signal(run.id, "go", "")
            await run.result()
            with pytest.raises(RunConflict, match="nothing to pause"):
                await runtime.pause(run.id)

    async def test_all_branches(self, open_runtime: Any, reaches: Any, clock: FakeClock) -> None:
        """Blocked ones and running ones; what was waited for is waited for again afterwards."""
        gated = Gated()

        @workflow
        async def both() -> Any:
            return await gather(sleep(3600), gated.workflow.function(), wait_for("go", str))

        async with open_runtime(clock=clock) as runtime:
            run = await runtime.start(both)
            await gated.entered.wait()
            await runtime.pause(run.id)
            await held(runtime.worker.resident[run.id])
            gated.gate.set()
            await reaches(run, "paused")
            clock.advance(4000)
            await runtime.resume(run.id)
            await runtime.signal(run.id, "go", "c")
            assert await run.result() == [None, "ab", "c"]


class TestCancel:
    """A run and its children, wherever they are."""

    async def test_inside_a_step(self, open_runtime: Any) -> None:
        """The step is cut off."""
        gated = Gated()
        async with open_runtime() as runtime:
            run = await runtime.start(gated.workflow)
            await gated.entered.wait()
            await run.cancel()
            with pytest.raises(RunCancelled):
                await run.result()
            assert run.status == "cancelled"
        assert calls == ["first"]

    async def test_parked_and_queued(self, open_runtime: Any, reaches: Any) -> None:
        """At once."""
        async with open_runtime(concurrency=0) as runtime:
            run = await runtime.start(waiting)
            assert await runtime.cancel(run.id) == "cancelled"
            assert await runtime.cancel(run.id) == "cancelled"
        async with open_runtime() as runtime:
            run = await runtime.start(waiting)
            await reaches(run, "waiting")
            assert await runtime.cancel(run.id) == "cancelled"
            with pytest.raises(RunConflict, match="has ended"):
                await runtime.resume(run.id)

    async def test_user_code_cannot_refuse(self, open_runtime: Any) -> None:
        """Neither except Exception nor a finally that waits keeps a run alive."""
        entered = anyio.Event()

        @step
        async def stubborn() -> None:
            entered.set()
            await anyio.sleep_forever()

        @workflow
        async def refusing() -> str:
            for _ in range(3):
                try:
                    await stubborn()
                except BaseException:
                    calls.append("caught")
                finally:
                    try:
                        await stubborn()
                    except BaseException:
                        calls.append("again")
            return "survived"

        async with open_runtime() as runtime:
            run = await runtime.start(refusing)
            await entered.wait()
            await run.cancel()
            with pytest.raises(RunCancelled):
                await run.result()

    async def test_is_not_undone_by_pause_or_resume(self, open_runtime: Any) -> None:
        """What was promised to the one who cancelled stands."""
        gated = Gated()
        async with open_runtime() as runtime:
            run = await runtime.start(gated.workflow)
            await gated.entered.wait()
            await runtime.worker.journal.do(lambda connection: control.cancel(runtime.store, connection, run.id, 0.0))
            await runtime.worker.journal.do(lambda connection: control.pause(runtime.store, connection, run.id, 0.0))
            me = runtime.worker.worker_id
            await runtime.worker.journal.do(
                lambda connection: control.resume(runtime.store, connection, run.id, 0.0, me)
            )
            runtime.worker.poke()
            with pytest.raises(RunCancelled):
                await run.result()


class TestFromAnotherRuntime:
    """Two connections to one file, as two processes have them."""

    async def test_cancel_pause_signal_result(self, open_runtime: Any, reaches: Any) -> None:
        """One executes, the other says what is to happen."""
        first, second = Gated(), Gated("second")
        async with open_runtime() as worker, open_runtime(serve=False) as other:
            run = await worker.start(first.workflow, id="paused")
            await first.entered.wait()
            assert await other.pause("paused") == "running"
            await held(worker.worker.resident["paused"])
            first.gate.set()
            await reaches(run, "paused")
            await other.resume("paused")
            with anyio.fail_after(20):
                assert await (await other.get("paused")).result() == "ab"

            await worker.start(waiting, "x", id="signalled")
            await other.signal("signalled", "go", "y")
            assert await (await other.get("signalled")).result() == "xy"

            await worker.start(second.workflow, id="cancelled")
            await second.entered.wait()
            assert await other.cancel("cancelled") == "running"
            with pytest.raises(RunCancelled):
                await (await other.get("cancelled")).result()

    async def test_a_run_that_is_being_executed_is_busy(self, open_runtime: Any) -> None:
        """The other says who has it."""
        gated = Gated()
        async with open_runtime() as worker, open_runtime() as other:
            await worker.start(gated.workflow, id="r")
            await gated.entered.wait()
            with pytest.raises(RunBusy, match=worker.worker.worker_id):
                await other.resume("r")
            gated.gate.set()
            assert await (await other.get("r")).result() == "ab"
        assert calls == ["first", "second"]

    async def test_work_moves_when_a_runtime_closes(self, open_runtime: Any) -> None:
        """What was interrupted goes on in the other, finished steps are kept."""
        gated = Gated()
        async with open_runtime() as other:
            async with open_runtime() as worker:
                run = await worker.start(gated.workflow, id="r")
                await gated.entered.wait()
            gated.gate.set()
            assert await (await other.get(run.id)).result() == "ab"
        assert calls == ["first", "first", "second"]

    async def test_one_that_only_looks_executes_nothing(self, open_runtime: Any) -> None:
        """Nor does it keep a run from those that execute."""
        async with open_runtime(serve=False) as looking:
            run = await looking.start(waiting, "x", id="r")
            await looking.resume("r")
            await looking.signal("r", "go", "y")
            assert run.status == "queued"
            async with open_runtime():
                with anyio.fail_after(20):
                    assert await run.result() == "xy"


async def test_closing_gives_everything_back(open_runtime: Any) -> None:
    """No run is left with a worker that is not on the list, or nobody would ever take it."""
    gated = Gated()
    async with open_runtime() as runtime:
        for _ in range(5):
            await runtime.start(gated.workflow)
        await gated.entered.wait()
    async with open_runtime(serve=False) as runtime:
        rows = await runtime.store.read(lambda connection: connection.execute(RUNS.select()).all())
        assert {(row.status, row.worker_id) for row in rows} == {("queued", None)}
        assert await runtime.store.read(runtime.store.workers) == []


async def test_a_run_of_a_worker_that_nobody_knows(open_runtime: Any) -> None:
    """It is as lost as one of a dead worker."""
    async with open_runtime(concurrency=0) as runtime:
        await runtime.start(waiting, "x", id="r")
        await runtime.signal("r", "go", "y")
        await runtime.worker.journal.do(
            lambda connection: runtime.store.update_run(
                connection, "r", status="running", worker_id="nobody", wake_at=None
            )
        )
    async with open_runtime() as runtime:
        assert await (await runtime.get("r")).result() == "xy"


async def test_the_loop_does_not_spin_for_work_of_others(open_runtime: Any) -> None:
    """A queued run of a workflow that this process does not know is due for ever."""
    async with open_runtime(concurrency=0) as runtime:
        await runtime.start(waiting, id="r")
        await runtime.worker.journal.do(
            lambda connection: runtime.store.update_run(connection, "r", workflow="unknown", wake_at=1.0)
        )
    async with open_runtime() as runtime:
        survey = await runtime.store.read(lambda connection: runtime.store.next_wake(connection, runtime.clock.now()))
        assert survey is None


async def test_poison(open_runtime: Any, reaches: Any, eventually: Any, monkeypatch: Any) -> None:
    """A run whose workers die without one new step is not tried for ever; progress starts the count anew."""
    monkeypatch.setattr(control, "POISON_LIMIT", 3)

    @workflow
    async def two() -> str:
        return await wait_for("a", str) + await wait_for("b", str)

    async def die() -> None:
        """As if the worker that had the run had been killed."""
        async with open_runtime(serve=False) as runtime:
            await runtime.worker.journal.do(
                lambda connection: runtime.store.update_run(
                    connection, "r", status="running", worker_id="dead", wake_at=None
                )
            )

    async def live() -> None:
        async with open_runtime() as runtime:
            await reaches(await runtime.get("r"), "waiting")

    async with open_runtime(serve=False) as runtime:
        await runtime.start(two, id="r")
    await live()
    for _ in range(2):
        await die()
        await live()
    async with open_runtime() as runtime:
        assert (await runtime.describe("r")).recoveries == 2
        await runtime.signal("r", "a", "1")

        async def waits_for_b() -> bool:
            return [wait.name for wait in (await runtime.describe("r")).waits] == ["b"]

        await eventually(waits_for_b)
        await reaches(await runtime.get("r"), "waiting")
    for _ in range(2):
        await die()
        await live()
    await die()
    async with open_runtime() as runtime:
        run = await runtime.get("r")
        with pytest.raises(RunPoisoned, match="died 3 times"):
            await run.result()
        await runtime.resume("r")
        await runtime.signal("r", "b", "2")
        assert await run.result() == "12"


class TestFork:
    """A new run with the steps before one, and the code of now."""

    async def test_at_a_step(self, open_runtime: Any) -> None:
        """What lies before is kept, the rest is executed."""

        @step
        async def note(name: str) -> str:
            calls.append(name)
            return f"{name}{len(calls)}"

        @workflow
        async def three() -> list[str]:
            return [await note("a"), *await gather(note("b"), note("c")), await note("d")]

        async with open_runtime() as runtime:
            run = await runtime.start(three, id="r", labels={"k": "v"}, tenant="t")
            first = await run.result()
            forked = await runtime.fork("r", "note#2", id="f")
            second = await forked.result()
            assert second[:3] == first[:3]
            assert second[3] == "d5"
            view = await runtime.describe("f")
            assert (view.forked_from, view.tenant, view.labels) == ("r", "t", {"k": "v"})
            assert await (await runtime.get("r")).result() == first
            assert len(await (await runtime.fork("r", "note#1")).result()) == 4

    async def test_at_nothing(self, open_runtime: Any) -> None:
        """The message lists the steps."""
        async with open_runtime() as runtime:
            await runtime.start(waiting, id="r")
            await runtime.signal("r", "go", "x")
            await (await runtime.get("r")).result()
            with pytest.raises(NotFound, match="go#1"):
                await runtime.fork("r", "nothing#1")
            with pytest.raises(NotFound):
                await runtime.fork("nobody", "go#1")
            with pytest.raises(RunConflict):
                await runtime.fork("r", "go#1", id="r")
