"""``await tool(...)`` in a workflow's own code: recorded, and a write starts at most once."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import anyio
import pytest

from ridethrough import RunFailed, Runtime, ToolContext, ToolInterrupted, UsageError, gather, tool, wait_for, workflow

pytestmark = pytest.mark.anyio

made: list[str] = []
hanging_now: list[anyio.Event] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    made.clear()


@tool(effect="write")
async def pay(on: date, ctx: ToolContext) -> date:
    made.append(ctx.idempotency_key)
    if on.year < 2000:
        raise ValueError("too old")
    return on


@tool(effect="write")
async def hang(on: date) -> date:
    made.append("hang")
    hanging_now[0].set()
    await anyio.sleep_forever()
    return on


@tool(effect="read")
def plain() -> int:
    return 1


@workflow(name="direct_payments")
async def payments() -> list[date]:
    days = await gather(pay(date(2026, 1, 1)), pay(date(2026, 1, 2)))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="too old"):
        await pay(date(1999, 1, 1))  # type: ignore[call-arg]
    await wait_for("go", str)
    return days


async def test_it_is_made_once_and_keeps_its_type(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'runs.db'}"
    async with Runtime.open(database) as runtime:
        run = await runtime.start(payments, id="r")
        with anyio.fail_after(20):
            async for event in run.events():
                if event.type == "run_paused":
                    break
    async with Runtime.open(database) as runtime:
        await runtime.signal("r", "go", "")
        run = await runtime.get("r")
        assert await run.result() == [date(2026, 1, 1), date(2026, 1, 2)]
        steps = (await runtime.describe("r")).steps or []
    assert [step.kind for step in steps][:3] == ["tool"] * 3
    assert len(made) == len(set(made)) == 3


@workflow(name="direct_hang")
async def hanging() -> str:
    try:
        await hang(date(2026, 1, 1))
    except ToolInterrupted:
        return "told"
    return "made"


async def test_an_interrupted_write_is_not_made_again(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'runs.db'}"
    hanging_now[:] = [anyio.Event()]
    async with Runtime.open(database, grace=0.0) as runtime:
        await runtime.start(hanging, id="r")
        with anyio.fail_after(20):
            await hanging_now[0].wait()
    async with Runtime.open(database) as runtime:
        assert await (await runtime.get("r")).result() == "told"
    assert made == ["hang"]


@workflow(name="direct_sync")
async def sync() -> int:
    return plain()


async def test_one_that_could_not_be_recorded_is_refused(tmp_path: Path) -> None:
    async with Runtime.open(f"sqlite:///{tmp_path / 'runs.db'}") as runtime:
        run = await runtime.start(sync)
        with pytest.raises(RunFailed, match="no async function") as caught:
            await run.result()
    assert isinstance(caught.value.__cause__, UsageError)
    assert plain() == 1
