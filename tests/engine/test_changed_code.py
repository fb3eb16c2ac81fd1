"""A run resumed with changed code goes on correctly, or stops with Diverged before anything is executed twice."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from ridethrough import Diverged, gather, sleep, step, wait_for, workflow

pytestmark = pytest.mark.anyio

calls: list[str] = []
Body = Callable[[], Awaitable[Any]]


@pytest.fixture(autouse=True)
def no_calls() -> None:
    """Count from nothing."""
    calls.clear()


@step
async def fetch(item: int) -> int:
    """A step."""
    calls.append(f"fetch {item}")
    return item


@step
async def store(item: int) -> int:
    """Another step."""
    calls.append(f"store {item}")
    return item


@step
async def check(item: int) -> int:
    """A third."""
    calls.append(f"check {item}")
    return item


@pytest.fixture
def lives(open_runtime: Any, reaches: Any) -> Any:
    """Execute one body until it waits, then resume the run with another; its result."""

    async def live(first: Body, second: Body) -> Any:
        async with open_runtime() as runtime:
            await reaches(await runtime.start(workflow(name="changing")(first), id="r"), "waiting")
        calls.clear()
        workflow(name="changing")(second)
        async with open_runtime() as runtime:
            await runtime.signal("r", "go", None)
            return await (await runtime.get("r")).result()

    return live


async def original() -> list[int]:
    """What was recorded."""
    found = [await fetch(1), await store(2)]
    await wait_for("go")
    return found


async def test_unchanged(lives: Any) -> None:
    """The base of all the others."""
    assert await lives(original, original) == [1, 2]
    assert calls == []


async def test_a_step_added_in_front(lives: Any) -> None:
    """Of another name: it is executed, what is recorded is kept."""

    async def changed() -> list[int]:
        found = [await check(0), await fetch(1), await store(2)]
        await wait_for("go")
        return found

    assert await lives(original, changed) == [0, 1, 2]
    assert calls == ["check 0"]


async def test_a_step_added_in_front_with_the_same_input(lives: Any) -> None:
    """It is no rename as long as the code still has the recorded name."""

    async def changed() -> list[int]:
        found = [await check(1), await fetch(1), await store(2)]
        await wait_for("go")
        return found

    assert await lives(original, changed) == [1, 1, 2]
    assert calls == ["check 1"]


async def test_a_renamed_step(lives: Any) -> None:
    """Under its new name it would be executed again."""

    async def changed() -> list[int]:
        found = [await check(1), await store(2)]
        await wait_for("go")
        return found

    with pytest.raises(Diverged, match="fetch#1") as caught:
        await lives(original, changed)
    assert caught.value.path == "fetch#1"
    assert calls == []


async def test_a_changed_input(lives: Any) -> None:
    """The message has the step, what was recorded and what is asked, and the choices."""

    async def changed() -> list[int]:
        found = [await fetch(1), await store(3)]
        await wait_for("go")
        return found

    with pytest.raises(Diverged) as caught:
        await lives(original, changed)
    assert (caught.value.path, "[2]" in caught.value.recorded, "[3]" in caught.value.asked) == ("store#1", True, True)
    assert "fork r --at 'store#1'" in str(caught.value)
    assert calls == []


async def test_a_removed_step(lives: Any) -> None:
    """Its result was part of what the run did."""

    async def changed() -> list[int]:
        found = [await fetch(1)]
        await wait_for("go")
        return found

    with pytest.raises(Diverged, match="store#1"):
        await lives(original, changed)


async def test_another_kind_of_step(lives: Any) -> None:
    """A timer where a function was."""

    async def before() -> None:
        await step(anyio.lowlevel.checkpoint, name="sleep")
        await wait_for("go")

    async def changed() -> None:
        await sleep(1)
        await wait_for("go")

    with pytest.raises(Diverged, match="sleep#1"):
        await lives(before, changed)


async def test_another_type_of_result(lives: Any) -> None:
    """The recorded value does not fit any more."""

    @step(name="give")
    async def give_text() -> str:
        return "text"

    @step(name="give")
    async def give_list() -> list[int]:
        return [1]

    async def before() -> Any:
        await give_text()
        await wait_for("go")

    async def changed() -> Any:
        await give_list()
        await wait_for("go")

    with pytest.raises(Diverged, match="give#1"):
        await lives(before, changed)


async def test_a_group_with_fewer_branches(lives: Any) -> None:
    """The branch whose failure was recorded is gone."""

    @step
    async def fail(item: int) -> int:
        raise ValueError(item)

    async def before() -> None:
        with pytest.raises(ValueError):
            await gather(fetch(1), fetch(2), fail(3), limit=1)
        await wait_for("go")

    async def changed() -> None:
        with pytest.raises(ValueError):
            await gather(fetch(1), fetch(2), limit=1)
        await wait_for("go")

    with pytest.raises(Diverged, match="g1"):
        await lives(before, changed)


@pytest.mark.parametrize("change", ["removed", "added", "retyped"])
async def test_changed_parameters(open_runtime: Any, reaches: Any, change: str) -> None:
    """The stored input does not fit the function any more: that is the code's fault, not the run's."""

    async def before(topic: str, count: int) -> None:
        await wait_for("go")

    async def removed(topic: str) -> None:
        await wait_for("go")

    async def added(topic: str, count: int, depth: int) -> None:
        await wait_for("go")

    async def retyped(topic: str, count: list[int]) -> None:
        await wait_for("go")

    definition = workflow(name="changing")(before)
    async with open_runtime() as runtime:
        await reaches(await runtime.start(definition, "tides", 3, id="r"), "waiting")
    changed: dict[str, Any] = {"removed": removed, "added": added, "retyped": retyped}
    workflow(name="changing")(changed[change])
    async with open_runtime() as runtime:
        await runtime.signal("r", "go", None)
        with pytest.raises(Diverged):
            await (await runtime.get("r")).result()
    workflow(name="changing")(before)
    async with open_runtime() as runtime:
        run = await runtime.resume("r")
        await run.result()


async def test_code_that_is_put_back(lives: Any, open_runtime: Any) -> None:
    """Nothing was lost: an explicit resume takes the run up again."""

    async def changed() -> list[int]:
        found = [await fetch(7), await store(2)]
        await wait_for("go")
        return found

    with pytest.raises(Diverged):
        await lives(original, changed)
    workflow(name="changing")(original)
    async with open_runtime() as runtime:
        run = await runtime.resume("r")
        assert await run.result() == [1, 2]
        assert run.status == "done"
    assert calls == []


async def test_user_code_cannot_swallow_divergence(lives: Any) -> None:
    """Not by except Exception, not by except BaseException and going on, not by a finally that returns."""

    async def changed() -> str:
        for _ in range(3):
            try:
                await fetch(7)
            except BaseException:
                calls.append("swallowed")
        try:
            await check(0)
        except Exception:
            calls.append("swallowed as an error")
        return "went on"

    with pytest.raises(Diverged):
        await lives(original, changed)
    assert "swallowed as an error" not in calls
    assert "check 0" not in calls


async def test_a_new_version_leaves_stored_runs_alone(open_runtime: Any, reaches: Any, eventually: Any) -> None:
    """They do not go on by themselves; an explicit resume says that they may."""
    async with open_runtime() as runtime:
        await reaches(await runtime.start(workflow(name="changing", version="1")(original), id="r"), "waiting")
    calls.clear()
    workflow(name="changing", version="2")(original)
    async with open_runtime() as runtime:
        await runtime.signal("r", "go", None)
        other = await runtime.start(workflow(name="other")(original), id="other")
        await runtime.signal("other", "go", None)
        await other.result()  # the worker has looked at the database meanwhile
        assert (await runtime.get("r")).status == "waiting"
        run = await runtime.resume("r")
        assert await run.result() == [1, 2]
