"""A step is executed once; what it gave is what every later life of the run sees."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

import ridethrough
from ridethrough import RunFailed, SerializationError, StepFailed, UsageError, gather, step, wait_for, workflow

pytestmark = pytest.mark.anyio


class Odd(ValueError):
    """An error with a field."""

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message, number)
        self.number = number


class Point(BaseModel):
    """A typed value."""

    x: int
    y: int


@dataclass
class Pair:
    """Another one."""

    left: str
    right: list[int]


calls: list[str] = []


@pytest.fixture(autouse=True)
def no_calls() -> None:
    """Count from nothing."""
    calls.clear()


@step
async def note(name: str) -> str:
    """Say that it was called."""
    calls.append(name)
    return name.upper()


@step
def note_in_thread(name: str) -> str:
    """The same in a thread."""
    calls.append(name)
    return name.upper()


async def test_finished_steps_are_answered_from_the_journal(open_runtime: Any, reaches: Any) -> None:
    """Two lives of a run execute its steps once."""

    @workflow
    async def twice() -> list[str]:
        first = [await note("a"), await note("a"), await note_in_thread("b")]
        return [*first, await wait_for("go", str), await note("c")]

    async with open_runtime() as runtime:
        run = await runtime.start(twice, id="r")
        await reaches(run, "waiting")
    assert calls == ["a", "a", "b"]
    async with open_runtime() as runtime:
        await runtime.signal("r", "go", "on")
        assert await (await runtime.get("r")).result() == ["A", "A", "B", "on", "C"]
        paths = [item.path for item in (await runtime.describe("r")).steps]
    assert calls == ["a", "a", "b", "c"]
    assert paths == ["note#1", "note#2", "note_in_thread#1", "go#1", "note#3"]


async def test_typed_values_come_back_as_they_were(open_runtime: Any, reaches: Any) -> None:
    """On the first life and on the second."""
    seen: list[Any] = []

    @step
    async def point() -> Point:
        return Point(x=1, y=2)

    @step
    async def pair() -> Pair:
        return Pair("a", [1])

    @workflow
    async def typed() -> None:
        seen.append((await point(), await pair()))
        await wait_for("go")

    async with open_runtime() as runtime:
        await reaches(await runtime.start(typed, id="r"), "waiting")
    async with open_runtime() as runtime:
        await runtime.signal("r", "go", None)
        await (await runtime.get("r")).result()
    assert len(seen) >= 2
    assert all(item == (Point(x=1, y=2), Pair("a", [1])) for item in seen)


async def test_errors_are_raised_again_with_their_class(open_runtime: Any, reaches: Any) -> None:
    """A recorded failure is as good as a recorded value."""
    seen: list[Any] = []

    @step
    async def fail() -> None:
        calls.append("fail")
        raise Odd("no", 3)

    @workflow
    async def catching() -> str:
        try:
            await fail()
        except Odd as error:
            seen.append((error.args, error.number))
        await wait_for("go")
        return "done"

    async with open_runtime() as runtime:
        await reaches(await runtime.start(catching, id="r"), "waiting")
    async with open_runtime() as runtime:
        await runtime.signal("r", "go", None)
        assert await (await runtime.get("r")).result() == "done"
    assert calls == ["fail"]
    assert set(seen) == {(("no", 3), 3)}


async def test_an_error_without_a_name_is_the_same_on_every_life(open_runtime: Any, reaches: Any) -> None:
    """A class that no import finds becomes StepFailed at once, not only on resume."""
    seen: list[Any] = []

    class Local(Exception):
        pass

    @step
    async def fail() -> None:
        raise Local("no")

    @workflow
    async def catching() -> None:
        try:
            await fail()
        except StepFailed as error:
            seen.append(str(error))
        await wait_for("go")

    async with open_runtime() as runtime:
        await reaches(await runtime.start(catching, id="r"), "waiting")
    async with open_runtime() as runtime:
        await runtime.signal("r", "go", None)
        await (await runtime.get("r")).result()
    assert set(seen) == {"Local: no"}


async def test_an_uncaught_error_fails_the_run(open_runtime: Any) -> None:
    """And says what it was."""

    @workflow
    async def failing() -> None:
        raise Odd("broken", 1)

    async with open_runtime() as runtime:
        run = await runtime.start(failing)
        with pytest.raises(RunFailed, match="Odd") as caught:
            await run.result()
        assert caught.value.error_type == "Odd"
        assert isinstance(caught.value.__cause__, Odd)
        assert run.status == "failed"


async def test_retries_and_timeout(open_runtime: Any) -> None:
    """Attempts are counted, and a timeout is one failed attempt."""

    @step(retries=2)
    async def flaky() -> int:
        calls.append("flaky")
        if len(calls) < 2:
            raise Odd("again")
        return len(calls)

    @step(timeout=0.01)
    async def slow() -> None:
        await anyio.sleep_forever()

    @workflow
    async def both() -> int:
        with pytest.raises(TimeoutError):
            await slow()
        return await flaky()

    async with open_runtime() as runtime:
        run = await runtime.start(both)
        assert await run.result() == 2
        steps = (await runtime.describe(run.id)).steps
        assert [(item.name, item.status, item.attempts) for item in steps] == [
            ("slow", "failed", 1),
            ("flaky", "done", 2),
        ]


async def test_an_int_stands_for_a_float(open_runtime: Any) -> None:
    """As it does for every type checker: in arguments and in results."""

    @step
    async def half(number: float) -> float:
        return 2

    @workflow
    async def halving(number: float) -> float:
        return await half(number)

    async with open_runtime() as runtime:
        assert await (await runtime.start(halving, 4)).result() == 2.0


async def test_time_and_chance_are_recorded(open_runtime: Any, reaches: Any) -> None:
    """The same on every life."""
    seen: list[Any] = []

    @workflow
    async def drawing() -> None:
        seen.append((await ridethrough.now(), await ridethrough.random(), await ridethrough.uuid()))
        await wait_for("go")

    async with open_runtime() as runtime:
        await reaches(await runtime.start(drawing, id="r"), "waiting")
    async with open_runtime() as runtime:
        await runtime.signal("r", "go", None)
        await (await runtime.get("r")).result()
    assert len(set(seen)) == 1
    assert len(seen) >= 2


async def test_a_value_that_cannot_be_stored_is_the_steps_failure(open_runtime: Any) -> None:
    """The message names the step and says what to do."""

    @step
    async def client() -> Any:
        return object()

    @workflow
    async def storing() -> str:
        try:
            await client()
        except SerializationError as error:
            return str(error)
        return "stored"

    async with open_runtime() as runtime:
        text = await (await runtime.start(storing)).result()
        assert "client" in text
        assert "resources" in text


async def test_a_result_that_cannot_be_stored_fails_the_run(open_runtime: Any) -> None:
    """Not the worker."""

    @workflow
    async def storing() -> Any:
        return object()

    async with open_runtime() as runtime:
        with pytest.raises(RunFailed, match="SerializationError"):
            await (await runtime.start(storing)).result()


@pytest.mark.parametrize("text", ["half a pair: \ud83d", "zero: \0", "x" * 70_000 + "\udfff", "ä" * 70_000])
async def test_awkward_text_survives(open_runtime: Any, reaches: Any, text: str) -> None:
    """Models produce half surrogate pairs; no database holds them as they are."""
    seen: list[str] = []

    @step
    async def give(shown: str) -> str:
        calls.append("give")
        return text

    @workflow
    async def storing(given: str) -> str:
        seen.append(await give(given))
        await wait_for("go", str)
        return seen[-1]

    async with open_runtime() as runtime:
        await reaches(await runtime.start(storing, text, id="r"), "waiting")
    async with open_runtime() as runtime:
        await runtime.signal("r", "go", text)
        assert await (await runtime.get("r")).result() == text
        await runtime.describe("r")
    assert calls == ["give"]
    assert set(seen) == {text}


async def test_large_values_lie_apart_once(open_runtime: Any, reaches: Any) -> None:
    """By their content, whatever the number of steps that gave them."""

    @step
    async def give() -> str:
        calls.append("give")
        return "x" * 200_000

    @workflow
    async def large(text: str) -> str:
        found = [await give(), await give(), text]
        await wait_for("go")
        return "".join(found)

    async with open_runtime() as runtime:
        await reaches(await runtime.start(large, "y" * 100_000, id="r"), "waiting")
        rows = await runtime.store.read(
            lambda connection: connection.exec_driver_sql("SELECT length(data) FROM payloads ORDER BY 1").fetchall()
        )
        assert [row[0] for row in rows] == [len('{"text":""}') + 100_000, 200_002]
    async with open_runtime() as runtime:
        await runtime.signal("r", "go", None)
        expected = "x" * 400_000 + "y" * 100_000
        assert await (await runtime.get("r")).result() == expected
        assert await runtime.store.read(runtime.store.dangling) == []
    assert calls == ["give", "give"]
    async with open_runtime() as runtime:
        assert await (await runtime.get("r")).result() == expected


class TestWrongUse:
    """Each wrong use says what is wrong and what to do."""

    async def test_outside(self) -> None:
        """A step is a plain function there; what needs a run says so."""
        assert await note("plain") == "PLAIN"
        with pytest.raises(UsageError, match="outside a workflow"):
            await ridethrough.sleep(1)
        with pytest.raises(UsageError, match="outside a workflow"):
            await gather(note("a"))

    async def test_inside_a_step(self, open_runtime: Any) -> None:
        """A step in a step is a plain call; what is durable is refused."""

        @step
        async def outer() -> str:
            with pytest.raises(UsageError, match="inside step outer#1"):
                await ridethrough.sleep(1)
            with pytest.raises(UsageError, match="inside step outer#1"):
                await wait_for("go")
            return await note("inner")

        @workflow
        async def nesting() -> str:
            return await outer()

        async with open_runtime() as runtime:
            run = await runtime.start(nesting)
            assert await run.result() == "INNER"
            assert [item.path for item in (await runtime.describe(run.id)).steps] == ["outer#1"]

    async def test_from_a_bare_task(self, open_runtime: Any, anyio_backend: str) -> None:
        """Its place in the journal would depend on timing."""

        @workflow
        async def starting() -> str:
            caught: list[str] = []

            async def branch() -> None:
                try:
                    await note("bare")
                except UsageError as error:
                    caught.append(str(error))

            if anyio_backend == "asyncio":
                await asyncio.create_task(branch())
            else:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(branch)
            return caught[0]

        async with open_runtime() as runtime:
            text = await (await runtime.start(starting)).result()
            assert "ridethrough.gather" in text
        assert calls == []

    async def test_gather_of_what_runs_already(self, open_runtime: Any) -> None:
        """Not an awaitable, a limit of nothing."""

        @workflow
        async def wrong() -> None:
            with pytest.raises(UsageError, match="not awaitable"):
                await gather(3)  # type: ignore[call-overload]
            with pytest.raises(UsageError, match="limit=0"):
                await gather(note("a"), limit=0)

        async with open_runtime() as runtime:
            await (await runtime.start(wrong)).result()
        assert calls == []

    async def test_starting_inside_a_workflow(self, open_runtime: Any) -> None:
        """It would start again on resume."""

        @workflow
        async def inner() -> None: ...

        @workflow
        async def outer() -> str:
            with pytest.raises(UsageError, match="inside a workflow"):
                await runtime.start(inner)
            return "refused"

        async with open_runtime() as runtime:
            assert await (await runtime.start(outer)).result() == "refused"

    async def test_ending_the_process_in_a_step(self, open_runtime: Any) -> None:
        """A function in a thread that calls exit is a failed step, not the end of all runs."""

        @step
        def leave() -> None:
            raise SystemExit(3)

        @workflow
        async def leaving() -> str:
            try:
                await leave()
            except RuntimeError as error:
                return str(error)
            return "still there"

        async with open_runtime() as runtime:
            assert "SystemExit(3)" in await (await runtime.start(leaving)).result()
