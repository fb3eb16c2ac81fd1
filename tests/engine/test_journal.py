"""The writer: what is committed together, what fails alone, and what a worker that lost a run may still write."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import pytest
from sqlalchemy import Connection

from ridethrough import StoreError, gather, step, wait_for, workflow
from ridethrough.runtime.execution import RunInfo
from ridethrough.runtime.journal import Fenced, Unit
from ridethrough.runtime.store import RUNS, STEPS

pytestmark = pytest.mark.anyio

calls: list[Any] = []


@pytest.fixture(autouse=True)
def no_calls() -> None:
    """Count from nothing."""
    calls.clear()


@workflow
async def waiting() -> None:
    """Wait."""
    await wait_for("go")


async def stall(runtime: Any, release: Any) -> None:
    """Keep the writer busy until ``release`` (a threading event) is set, so that units pile up behind it."""
    runtime.worker.journal.put(Unit("", -1, operation=lambda connection: release.wait(20)))


async def test_one_bad_unit_fails_alone(open_runtime: Any) -> None:
    """The others of its batch are written, whatever kinds they are: rows, large values, endings, operations."""
    release = threading.Event()

    @step
    async def large(item: int) -> str:
        calls.append(item)
        return "x" * 100_000

    @step
    async def small(item: int) -> int:
        calls.append(item)
        return item

    @workflow
    async def both() -> str:
        found = await gather(large(1), small(2), large(3))
        return str(len(str(found))) + "y" * 100_000

    def bad(_connection: Connection) -> None:
        raise TypeError("no")

    async with open_runtime() as runtime:
        run = await runtime.start(both, id="r")
        await stall(runtime, release)
        with anyio.fail_after(20):
            while len(calls) < 3:  # noqa: ASYNC110
                await anyio.sleep(0.005)
        await anyio.lowlevel.checkpoint()
        unit = runtime.worker.journal.put(Unit("", -1, operation=bad))
        release.set()
        await unit.settled.wait()
        assert isinstance(unit.error, StoreError)
        # The same again while the run ends: its result is large too.
        assert (await run.result())[:6] == "200011"
        assert run.status == "done"
    assert sorted(calls) == [1, 2, 3]


async def test_a_large_ending_beside_a_bad_unit(open_runtime: Any) -> None:
    """An operation that is repeated because a batch failed must find its input as it was."""
    async with open_runtime() as runtime:
        await runtime.start(waiting, id="r")
        worker = runtime.worker
        info = RunInfo("r", "waiting", 1, None, 0, {}, None, "r", 0, None)
        ending = {
            "b_id": "r", "b_status": "done", "b_result": '"' + "x" * 100_000 + '"', "b_ref": None, "b_error": None,
            "b_at": 1.0,
        }  # fmt: skip

        def twice(connection: Connection) -> None:
            for _ in range(2):
                worker._end(connection, info, ending, True, 1.0)

        await worker.journal.do(twice)
        row = await runtime.store.read(lambda connection: runtime.store.run(connection, "r"))
        assert (row.status, row.result, row.result_ref is None) == ("done", None, False)
        data = await runtime.store.read(lambda connection: runtime.store.payload(connection, row.result_ref))
        assert len(data) == 100_002


async def test_an_old_fence_writes_nothing(open_runtime: Any, eventually: Any) -> None:
    """Neither rows nor operations nor endings; and the run here ends without a trace."""
    gate, entered = anyio.Event(), anyio.Event()

    @step
    async def gated() -> int:
        entered.set()
        await gate.wait()
        return 1

    @workflow
    async def working() -> int:
        return await gated()

    async with open_runtime() as runtime:
        await runtime.start(working, id="r")
        await entered.wait()
        await runtime.worker.journal.do(
            lambda connection: runtime.store.update_run(connection, "r", fence=7, worker_id="another")
        )
        for unit in (
            Unit("r", 1, operation=lambda connection: runtime.store.update_run(connection, "r", tenant="x")),
            Unit("r", 1, ending={"b_id": "r", "b_status": "done"}),
            Unit("gone", 1, ending={"b_id": "gone", "b_status": "done"}),
        ):
            with pytest.raises(Fenced):
                await runtime.worker.journal.write(unit)
        gate.set()

        async def let_go() -> bool:
            execution = runtime.worker.resident.get("r")
            return execution is None or execution.info.fence != 1

        await eventually(let_go)
        rows = await runtime.store.read(lambda connection: connection.execute(RUNS.select()).all())
        steps = await runtime.store.read(lambda connection: connection.execute(STEPS.select()).all())
        assert [(row.tenant, row.result) for row in rows] == [(None, None)]
        assert rows[0].fence >= 7
        assert all(row.seq > 0 and rows[0].fence > 7 for row in steps), "only one that claimed it anew may have written"


async def test_closed(open_runtime: Any) -> None:
    """Nothing is written after the end, and the caller is told."""
    async with open_runtime() as runtime:
        pass
    with pytest.raises(StoreError, match="closed"):
        await runtime.worker.journal.do(lambda connection: None)


async def test_a_hundred_runs_share_commits(open_runtime: Any) -> None:
    """Group commit: far fewer transactions than steps."""
    commits = 0

    @step
    async def nothing() -> None: ...

    @workflow
    async def short() -> None:
        for _ in range(5):
            await nothing()

    async with open_runtime(concurrency=200) as runtime:
        journal = runtime.worker.journal
        transaction = journal._transaction

        def counted(units: Any) -> None:
            nonlocal commits
            commits += 1
            transaction(units)

        journal._transaction = counted

        async def one() -> None:
            await (await runtime.start(short)).result()

        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(one)
    assert commits < 350, "700 units were written"
