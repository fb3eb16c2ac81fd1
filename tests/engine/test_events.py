"""Whoever watches a run sees every event that is on disk once and in order: early, late, again, from elsewhere."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from ridethrough import Event, gather, step, wait_for, workflow

pytestmark = pytest.mark.anyio

PASSING = ("step_started", "model_delta", "model_reset", "tool_call_started")


@step
async def work(item: int) -> int:
    """A step."""
    return item


@workflow
async def parallel() -> list[int]:
    """Many steps at once, a wait, and one more."""
    found = await gather(*(work(item) for item in range(30)))
    await wait_for("go")
    return [*found, await work(30)]


def kept(events: list[Event]) -> list[tuple[int, str, str]]:
    """What is on disk of it."""
    return [(event.seq, event.type, event.path) for event in events if event.type not in PASSING]


async def read(run: Any, into: list[Event], after: int | None = None) -> None:
    """Follow a run to its end."""
    async for event in run.events(after=after):
        into.append(event)


async def test_early_late_and_several(open_runtime: Any, reaches: Any) -> None:
    """All readers see the same, whenever and wherever they attach."""
    early: list[Event] = []
    second: list[Event] = []
    elsewhere: list[Event] = []
    late: list[Event] = []
    async with open_runtime() as runtime, open_runtime(serve=False) as other:
        run = await runtime.start(parallel, id="r")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read, run, early)
            tasks.start_soon(read, run, second)
            tasks.start_soon(read, await other.get("r"), elsewhere)
            await reaches(run, "waiting")
            await runtime.signal("r", "go", None)
        await read(run, late)
    expected = kept(late)
    assert [seq for seq, _, _ in expected] == sorted(seq for seq, _, _ in expected)
    assert expected[-1][1] == "run_finished"
    assert [item for item in expected if item[1] == "step_finished"][-1][2] == "work#1"
    assert len([item for item in expected if item[1] == "step_finished"]) == 32
    for seen in (early, second, elsewhere):
        assert kept(seen) == expected


async def test_after_a_position(open_runtime: Any) -> None:
    """A reader that was cut off anywhere goes on where it was, and misses nothing."""
    async with open_runtime() as runtime:
        run = await runtime.start(parallel, id="r")
        await runtime.signal("r", "go", None)
        await run.result()
        whole: list[Event] = []
        await read(run, whole)
        for position in {event.seq for event in whole if event.seq}:
            rest: list[Event] = []
            await read(run, rest, after=position)
            assert kept(rest) == [item for item in kept(whole) if item[0] > position or item[1] == "run_finished"]


async def test_a_live_position_is_on_disk(open_runtime: Any) -> None:
    """The position of a passing event is one at which a reader may go on: nothing at or below it comes later."""
    async with open_runtime() as runtime:
        seen: list[Event] = []
        run = await runtime.start(parallel, id="r")
        await runtime.signal("r", "go", None)
        await read(run, seen)
    for index, event in enumerate(seen):
        if event.type in PASSING:
            assert not [item for item in kept(seen[index:]) if item[0] <= event.seq and item[1] != "run_finished"], (
                event
            )


async def test_waiting_and_going_on_are_events(open_runtime: Any, reaches: Any) -> None:
    """With the reason."""
    async with open_runtime() as runtime:
        run = await runtime.start(parallel, id="r")
        await reaches(run, "waiting")
        await runtime.signal("r", "go", None)
        await run.result()
        seen: list[Event] = []
        await read(run, seen)
    kinds = [event.type for event in seen if event.type.startswith("run_")]
    assert kinds == ["run_started", "run_paused", "run_resumed", "run_finished"]
    assert [event.reason for event in seen if event.type == "run_paused"] == ["signal"]


async def test_what_failed(open_runtime: Any) -> None:
    """A failed step and a failed run say how."""

    @step
    async def fail() -> None:
        raise ValueError("broken")

    @workflow
    async def failing() -> None:
        await fail()

    async with open_runtime() as runtime:
        run = await runtime.start(failing)
        seen: list[Event] = []
        await read(run, seen)
    assert [event.error for event in seen if event.type == "step_finished"] == ["ValueError: broken"]
    assert [(event.status, event.error) for event in seen if event.type == "run_finished"] == [
        ("failed", "ValueError: broken")
    ]


async def test_a_reader_that_leaves_costs_nothing(open_runtime: Any, reaches: Any) -> None:
    """It is forgotten."""
    async with open_runtime() as runtime:
        run = await runtime.start(parallel, id="r")
        events = run.events()
        await anext(events)
        await events.aclose()
        assert runtime.worker.watchers == {}
        await runtime.signal("r", "go", None)
        await run.result()
