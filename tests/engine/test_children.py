"""A workflow called inside a workflow is a run of its own, which its parent waits for."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from ridethrough import RunCancelled, RunFailed, gather, step, wait_for, workflow

pytestmark = pytest.mark.anyio

calls: list[Any] = []


@pytest.fixture(autouse=True)
def no_calls() -> None:
    """Count from nothing."""
    calls.clear()


class Bad(Exception):
    """A planned failure."""


@step
async def work(item: int) -> int:
    """Say that it was called."""
    calls.append(item)
    return item * 10


@workflow
async def child(item: int) -> int:
    """Work, then wait."""
    done = await work(item)
    return done + await wait_for("go", int)


@workflow
async def failing_child() -> None:
    """Fail."""
    raise Bad("child")


async def test_result_and_id(open_runtime: Any, reaches: Any) -> None:
    """The id follows from the parent's and the path, so a resumed parent finds the same child."""

    @workflow
    async def parent() -> list[int]:
        return await gather(child(1), child(2))

    async with open_runtime() as runtime:
        run = await runtime.start(parent, id="p")
        await reaches(run, "waiting")
        view = await run.view()
        assert sorted(view.children) == ["p.g1[0]/child#1", "p.g1[1]/child#1"]
        assert view.pause is not None
        assert view.pause.reason == "child"
        for item in view.children:
            await reaches(await runtime.get(item), "waiting")
    async with open_runtime() as runtime:
        await runtime.signal("p.g1[0]/child#1", "go", 1)
        await runtime.signal("p.g1[1]/child#1", "go", 2)
        assert await (await runtime.get("p")).result() == [11, 22]
        assert len(await runtime.list()) == 3
    assert sorted(calls) == [1, 2]


async def test_failure(open_runtime: Any, reaches: Any) -> None:
    """As RunFailed, with the class of what happened, on every life."""
    seen: list[Any] = []

    @workflow
    async def parent() -> str:
        try:
            await failing_child()
        except RunFailed as error:
            seen.append((error.run_id, error.error_type))
        await wait_for("go")
        return "done"

    async with open_runtime() as runtime:
        await reaches(await runtime.start(parent, id="p"), "waiting")
    async with open_runtime() as runtime:
        await runtime.signal("p", "go", None)
        assert await (await runtime.get("p")).result() == "done"
    assert set(seen) == {("p.failing_child#1", "Bad")}


async def test_cancelling_the_parent_cancels_its_children(open_runtime: Any, reaches: Any, eventually: Any) -> None:
    """And theirs."""

    @workflow
    async def middle() -> int:
        return await child(1)

    @workflow
    async def parent() -> int:
        return await middle()

    async with open_runtime() as runtime:
        run = await runtime.start(parent, id="p")
        await reaches(run, "waiting")
        grandchild = "p.middle#1.child#1"

        async def there() -> bool:
            return grandchild in [view.id for view in await runtime.list(status="waiting")]

        await eventually(there)
        await runtime.cancel("p")
        with pytest.raises(RunCancelled):
            await run.result()
        assert {view.id: view.status for view in await runtime.list()} == {
            "p": "cancelled", "p.middle#1": "cancelled", grandchild: "cancelled",
        }  # fmt: skip


async def test_cancelling_a_child_tells_its_parent(open_runtime: Any, reaches: Any) -> None:
    """Which may go on."""

    @workflow
    async def parent() -> str:
        try:
            await child(1)
        except RunCancelled as error:
            return str(error)
        return "result"

    async with open_runtime() as runtime:
        run = await runtime.start(parent, id="p")
        await reaches(run, "waiting")
        await reaches(await runtime.get("p.child#1"), "waiting")
        await runtime.cancel("p.child#1")
        assert await run.result() == "Child run p.child#1 was cancelled."


async def test_the_child_of_a_branch_that_was_given_up_is_cancelled(
    open_runtime: Any, reaches: Any, eventually: Any
) -> None:
    """Nobody waits for it any more, and it would go on for money."""
    gate = anyio.Event()

    @step
    async def fail() -> None:
        await gate.wait()
        raise Bad("sibling")

    @workflow
    async def parent() -> str:
        try:
            await gather(child(1), fail())
        except Bad:
            return "caught"
        return "both"

    async with open_runtime() as runtime:
        run = await runtime.start(parent, id="p")

        async def waits() -> bool:
            return "p.g1[0]/child#1" in [view.id for view in await runtime.list(status="waiting")]

        await eventually(waits)
        gate.set()
        assert await run.result() == "caught"
        await reaches(await runtime.get("p.g1[0]/child#1"), "cancelled")


async def test_a_parent_makes_room_for_its_child(open_runtime: Any) -> None:
    """With room for one run in memory, the parent is parked while its child runs, however deep."""

    @workflow
    async def countdown(depth: int) -> int:
        return 0 if depth == 0 else 1 + await countdown(depth - 1)

    async with open_runtime(concurrency=1) as runtime:
        with anyio.fail_after(30):
            assert await (await runtime.start(countdown, 5)).result() == 5


async def test_a_large_input_and_result(open_runtime: Any) -> None:
    """Stored apart, as a step's."""

    @workflow
    async def echo(text: str) -> str:
        return text + text

    @workflow
    async def parent() -> int:
        return len(await echo("x" * 100_000))

    async with open_runtime() as runtime:
        assert await (await runtime.start(parent)).result() == 200_000
        assert await runtime.store.read(runtime.store.dangling) == []
