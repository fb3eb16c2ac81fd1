"""One account of what a ledger does, told to each of them: in memory, and in the runs' database.

What only a database can do (survive, be shared between processes, be full) is at the end.
"""

from __future__ import annotations

import json
import logging
import random
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from sqlalchemy import Connection

from ridethrough.runtime import housekeeping
from ridethrough.runtime.backend import current_backend
from ridethrough.runtime.errors import StoreError
from ridethrough.runtime.journal import Journal, Unit
from ridethrough.runtime.ledger import DatabaseLedger
from ridethrough.runtime.router.ledger import (
    AttemptRecord,
    Cap,
    DeploymentState,
    Hold,
    KeptAnswer,
    Ledger,
    MemoryLedger,
    Refusal,
    Spending,
)
from ridethrough.runtime.store import ATTEMPT_COLUMNS, HOLDS, Store

pytestmark = pytest.mark.anyio

NOW = 1_800_000_000.0
LATER = NOW + 600.0
ATTEMPT = AttemptRecord(
    id="a1",
    route="smart",
    deployment="gpt",
    provider="openai",
    model="gpt-5.2",
    started_at=NOW,
    seconds=1.5,
    verdict="Overloaded",
    phase="read",
    status=529,
    code="overloaded",
    request_id="req_1",
    number=2,
    queue_seconds=0.25,
    first_token_seconds=0.5,
    tokens_per_second=80.5,
    input_tokens=1000,
    output_tokens=200,
    cost_usd=0.0123,
    hedged=True,
    wasted=True,
    detail="it said 'no'",
    run_id="r1",
    path="writer#1/model#2",
    tenant="acme",
    workflow="mails",
    agent="writer",
)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The ledger must work on both."""
    return str(request.param)


@asynccontextmanager
async def opened(path: Path, worker_id: str = "") -> AsyncGenerator[Any]:
    """A ledger with a journal of its own on the file, as a process has it."""
    store = Store(f"sqlite:///{path}", "process")
    store.prepare()
    journal = Journal(store, current_backend().call_soon)
    journal.start()
    ledger = DatabaseLedger(journal, store, worker_id=worker_id)
    try:
        yield ledger
    finally:
        ledger.close()
        await anyio.to_thread.run_sync(journal.close)
        store.close()


@pytest.fixture(params=["memory", "database"])
async def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[Ledger]:
    if request.param == "memory":
        yield MemoryLedger()
    else:
        async with opened(tmp_path / "runs.db") as found:
            yield found


@pytest.fixture
async def database(tmp_path: Path) -> AsyncGenerator[Any]:
    async with opened(tmp_path / "runs.db", "w1") as found:
        yield found


def cap(key: str = "total/day:1", usd: float = 1.0, **others: Any) -> Cap:
    return Cap(key, key, usd, **others)


async def reserve(ledger: Ledger, usd: float, *caps: Cap, now: float = NOW, expires_at: float = LATER) -> Hold:
    hold = await ledger.reserve(caps or (cap(),), usd, now=now, expires_at=expires_at)
    assert isinstance(hold, Hold)
    return hold


async def refused(ledger: Ledger, usd: float, *caps: Cap, now: float = NOW) -> Refusal:
    refusal = await ledger.reserve(caps or (cap(),), usd, now=now, expires_at=LATER)
    assert isinstance(refusal, Refusal)
    return refusal


async def spending(ledger: Ledger, key: str = "total/day:1", now: float = NOW) -> Spending:
    return (await ledger.spending([key], now=now))[key]


async def written(ledger: Ledger) -> None:
    """Wait until what nobody waits for is there."""
    if isinstance(ledger, DatabaseLedger):
        await ledger.flush()


# --- money ----------------------------------------------------------------------------------------------------------


async def test_two_hundred_at_once_never_pass_the_cap(ledger: Ledger) -> None:
    found: list[Hold | Refusal] = []

    async def one() -> None:
        found.append(await ledger.reserve([cap()], 0.02, now=NOW, expires_at=LATER))

    async with anyio.create_task_group() as tasks:
        for _ in range(200):
            tasks.start_soon(one)
    holds = [each for each in found if isinstance(each, Hold)]
    assert len(holds) == 50, "0.02 fits into 1 fifty times, exactly"
    assert len({hold.id for hold in holds}) == 50
    assert {(each.spent, each.reserved) for each in found if isinstance(each, Refusal)} == {(0.0, 1.0)}
    assert await spending(ledger) == Spending(0.0, 1.0)


async def test_a_hold_is_settled_with_more_with_less_and_with_nothing(ledger: Ledger) -> None:
    more, less, nothing = [await reserve(ledger, 0.3) for _ in range(3)]
    await ledger.settle(more, 0.45, now=NOW)
    assert await spending(ledger) == Spending(0.45, 0.6)
    await ledger.settle(less, 0.1, now=NOW)
    await ledger.settle(nothing, 0.0, now=NOW)
    assert await spending(ledger) == Spending(0.55, 0.0)
    assert (await refused(ledger, 0.450000001)).spent == 0.55
    await reserve(ledger, 0.45)


async def test_what_is_spent_may_pass_the_cap_and_then_nothing_fits(ledger: Ledger) -> None:
    hold = await reserve(ledger, 0.9)
    await ledger.settle(hold, 1.5, now=NOW)
    assert await refused(ledger, 0.0) == Refusal(cap(), 1.5, 0.0)


async def test_a_hold_is_settled_once(ledger: Ledger) -> None:
    hold = await reserve(ledger, 0.3)
    await ledger.settle(hold, 0.2, now=NOW)
    await ledger.settle(hold, 0.2, now=NOW)
    await ledger.settle(Hold("unknown", hold.keys, 0.3), 0.2, now=NOW)
    assert await spending(ledger) == Spending(0.2, 0.0)


async def test_an_expired_hold_counts_as_spent(ledger: Ledger) -> None:
    hold = await reserve(ledger, 0.3, expires_at=NOW + 10)
    assert await spending(ledger, now=NOW + 9.999) == Spending(0.0, 0.3)
    assert await spending(ledger, now=NOW + 10) == Spending(0.3, 0.0)
    assert (await refused(ledger, 0.8, now=NOW + 10)).spent == 0.3
    await ledger.settle(hold, 0.1, now=NOW + 11)
    assert await spending(ledger, now=NOW + 11) == Spending(0.3, 0.0), "too late: it is booked"


async def test_a_hold_that_nobody_has_missed_can_be_settled_late(ledger: Ledger) -> None:
    hold = await reserve(ledger, 0.3, expires_at=NOW + 10)
    await ledger.settle(hold, 0.1, now=NOW + 11)
    assert await spending(ledger, now=NOW + 12) == Spending(0.1, 0.0)


async def test_all_caps_or_none(ledger: Ledger) -> None:
    wide, narrow, last = cap("wide", 10.0), cap("narrow", 1.0), cap("last", 10.0)
    assert (await refused(ledger, 2.0, wide, narrow, last)).cap == narrow
    assert set((await ledger.spending(["wide", "narrow", "last"], now=NOW)).values()) == {Spending()}
    hold = await reserve(ledger, 0.75, wide, narrow, last)
    assert set((await ledger.spending(["wide", "narrow", "last"], now=NOW)).values()) == {Spending(0.0, 0.75)}
    assert await refused(ledger, 0.5, last, narrow, wide) == Refusal(narrow, 0.0, 0.75)
    await ledger.settle(hold, 0.5, now=NOW)
    assert set((await ledger.spending(["wide", "narrow", "last"], now=NOW)).values()) == {Spending(0.5, 0.0)}


async def test_the_first_cap_that_refuses_is_named(ledger: Ledger) -> None:
    caps = [cap("z", 1.0), cap("a", 1.0)]
    assert (await refused(ledger, 2.0, *caps)).cap == caps[0]


async def test_caps_on_the_same_money(ledger: Ledger) -> None:
    """Degrade at 5 USD, fail at 10: what one call costs is counted once."""
    degrade, fail = cap(usd=5.0, on_exceeded="degrade"), cap(usd=10.0, on_exceeded="fail")
    hold = await reserve(ledger, 4.0, fail, degrade)
    assert await spending(ledger) == Spending(0.0, 4.0)
    assert (await refused(ledger, 2.0, fail, degrade)).cap == degrade
    assert (await refused(ledger, 7.0, fail, degrade)).cap == fail, "the first of the two"
    cheaper = await reserve(ledger, 2.0, fail)
    for each in (hold, cheaper):
        await ledger.settle(each, each.usd, now=NOW)
    assert await spending(ledger) == Spending(6.0, 0.0)


async def test_without_caps_nothing_is_asked(ledger: Ledger) -> None:
    hold = await ledger.reserve([], 5.0, now=NOW, expires_at=LATER)
    assert isinstance(hold, Hold)
    assert hold.keys == ()
    await ledger.settle(hold, 5.0, now=NOW)
    assert await ledger.spending([], now=NOW) == {}
    assert await spending(ledger, "never seen") == Spending()


@pytest.mark.parametrize(
    "key", ['tenant:O\'Brien "x"; DROP TABLE budgets;--/day:1', "tenant:日本 🏔/day:1", "tenant:%s?:a\\\n/day:1", ""]
)
async def test_any_name_can_have_a_budget(ledger: Ledger, key: str) -> None:
    hold = await reserve(ledger, 0.5, cap(key), cap("total"))
    assert await spending(ledger, key) == Spending(0.0, 0.5)
    assert await spending(ledger, key, now=LATER) == Spending(0.5, 0.0)
    await ledger.settle(hold, 0.25, now=NOW)
    assert await spending(ledger, key) == Spending(0.25, 0.0)
    assert await spending(ledger, key + "'") == Spending()


@pytest.mark.parametrize("usd", [float("nan"), -0.01, float("-inf")])
async def test_an_estimate_that_is_none_is_refused_loudly(ledger: Ledger, usd: float) -> None:
    for caps in ([cap()], []):
        with pytest.raises(ValueError, match="USD cannot be put aside"):
            await ledger.reserve(caps, usd, now=NOW, expires_at=LATER)
    assert await spending(ledger) == Spending()


@pytest.mark.parametrize("usd", [float("inf"), 1e300, 1.000000001])
@pytest.mark.parametrize("limit", [1.0, 0.5])
async def test_more_than_there_is_does_not_fit(ledger: Ledger, usd: float, limit: float) -> None:
    assert (await refused(ledger, usd, cap(usd=limit))).cap.usd == limit
    assert await spending(ledger) == Spending()


async def test_a_cap_without_an_end_holds_all_but_nonsense(ledger: Ledger) -> None:
    endless = cap(usd=float("inf"))
    hold = await reserve(ledger, 1e6, endless)
    await refused(ledger, float("inf"), endless)
    await ledger.settle(hold, 2.5, now=NOW)
    assert await spending(ledger) == Spending(2.5, 0.0)


@pytest.mark.parametrize(
    ("usd", "counts"), [(float("nan"), 0.3), (-5.0, 0.3), (float("-inf"), 0.3), (float("inf"), 1e6), (1e300, 1e6)]
)
async def test_a_cost_that_makes_no_sense_neither_fails_the_call_nor_gives_money_back(
    ledger: Ledger, usd: float, counts: float
) -> None:
    hold = await reserve(ledger, 0.3)
    await ledger.settle(hold, usd, now=NOW)
    assert await spending(ledger) == Spending(counts, 0.0)


async def test_sums_stay_exact(ledger: Ledger) -> None:
    for _ in range(30):
        hold = await reserve(ledger, 0.1, cap(usd=100.0))
        await ledger.settle(hold, 0.1, now=NOW)
    assert await spending(ledger) == Spending(3.0, 0.0)


async def test_both_keep_the_same_books(tmp_path: Path) -> None:
    """Whatever is asked of them in whatever order, the answers are the same."""
    seed = random.SystemRandom().randrange(1_000_000)
    print(f"seed {seed}")
    dice = random.Random(seed)
    caps = [cap(f"{name}/day:1", usd) for name, usd in (("a", 1.0), ("b", 2.0), ("c", 0.7), ("a", 1.5))]
    async with opened(tmp_path / "runs.db") as other:
        memory, now, pairs = MemoryLedger(), NOW, list[tuple[Hold, Hold]]()
        for _ in range(250):
            now += dice.random()
            if dice.random() < 0.6:
                chosen, usd = dice.sample(caps, dice.randint(1, 4)), dice.choice([0.0, 0.01, 0.1, 0.35, 1.2])
                left = await memory.reserve(chosen, usd, now=now, expires_at=now + 5)
                right = await other.reserve(chosen, usd, now=now, expires_at=now + 5)
                if isinstance(left, Hold):
                    assert isinstance(right, Hold)
                    pairs.append((left, right))
                else:
                    assert left == right
            elif pairs:
                usd = dice.choice([0.0, 0.02, 0.15])
                left, right = dice.choice(pairs[-15:])
                await memory.settle(left, usd, now=now)
                await other.settle(right, usd, now=now)
            keys = [each.key for each in caps]
            assert await memory.spending(keys, now=now) == await other.spending(keys, now=now)


# --- answers --------------------------------------------------------------------------------------------------------


async def test_an_answer_is_kept_until_a_newer_one_comes(ledger: Ledger) -> None:
    assert await ledger.answer("k") is None
    await ledger.keep_answer("k", KeptAnswer('{"text": "日本 \'\\u0000"}', NOW))
    assert await ledger.answer("k") == KeptAnswer('{"text": "日本 \'\\u0000"}', NOW)
    assert await ledger.answer("K") is None
    await ledger.keep_answer("k", KeptAnswer("newer", NOW + 1))
    await ledger.keep_answer("k", KeptAnswer("older", NOW))
    assert await ledger.answer("k") == KeptAnswer("newer", NOW + 1)
    await ledger.keep_answer("k", KeptAnswer("as old", NOW + 1))
    assert await ledger.answer("k") == KeptAnswer("as old", NOW + 1)


# --- deployments ----------------------------------------------------------------------------------------------------


async def test_the_newest_knowledge_of_a_deployment_stands(ledger: Ledger) -> None:
    assert await ledger.published() == []
    ledger.publish([])
    known = DeploymentState(
        "gpt", "open", since=NOW, until=NOW + 5, verdict="Overloaded", at=NOW, limits={"requests": 3.0}, worker="w"
    )
    ledger.publish([known, DeploymentState("claude", worker="w")])
    await written(ledger)
    assert await ledger.published() == [DeploymentState("claude", worker="w"), known]
    ledger.publish([replace(known, state="closed", at=NOW - 60), DeploymentState("gpt", worker="w")])
    await written(ledger)
    assert known in await ledger.published(), "who knows less does not hide it"
    ledger.publish([replace(known, state="half_open")])
    ledger.publish([replace(known, state="closed", at=NOW + 6)])
    await written(ledger)
    assert [state.state for state in await ledger.published()] == ["unknown", "closed"]


# --- attempts -------------------------------------------------------------------------------------------------------


async def test_what_a_provider_says_cannot_hurt(ledger: Ledger) -> None:
    """Half a surrogate pair in an error, and a count beyond all reason: noted all the same."""
    odd = replace(ATTEMPT, detail="\ud83d", request_id="\udcff", input_tokens=10**30, output_tokens=-1, cost_usd=1e300)
    ledger.note_attempt(odd)
    await written(ledger)
    if isinstance(ledger, DatabaseLedger):
        (row,) = await attempts(ledger)
        assert (row.detail, row.request_id, row.input_tokens, row.cost_usd) == ("?", "?", 2**31 - 1, 1e300)


async def test_a_ledger_of_this_process_has_an_end() -> None:
    ledger: Any = MemoryLedger()
    for number in range(3 * ledger.KEPT):
        ledger.note_attempt(ATTEMPT)
        await ledger.keep_answer(str(number), KeptAnswer("", NOW))
        await reserve(ledger, 0.5, cap(str(number), resets_at=NOW + number), now=NOW + number)
    assert ledger.KEPT <= len(ledger.attempts) <= 2 * ledger.KEPT
    assert await ledger.answer("0") is None
    assert await ledger.answer(str(3 * ledger.KEPT - 1)) is not None
    assert len(ledger._sums) <= 2 * ledger.KEPT


# --- what only a database does --------------------------------------------------------------------------------------


async def attempts(ledger: Any, run_id: str = "r1") -> list[Any]:
    return list(await ledger._store.read(lambda connection: ledger._store.attempts(connection, run_id)))


def count_transactions(ledger: Any) -> list[int]:
    """A list that gets the number of units of each transaction from now on."""
    counts, transaction = list[int](), ledger._journal._transaction

    def counted(units: Any) -> None:
        counts.append(len(units))
        transaction(units)

    ledger._journal._transaction = counted
    return counts


def test_the_table_has_a_column_for_each_field() -> None:
    assert tuple(field.name for field in fields(AttemptRecord)) == ATTEMPT_COLUMNS


async def test_attempts_survive_and_share_transactions(tmp_path: Path) -> None:
    async with opened(tmp_path / "runs.db") as ledger:
        counts = count_transactions(ledger)
        for number in range(1000):
            ledger.note_attempt(replace(ATTEMPT, number=number))
        ledger.note_attempt(replace(ATTEMPT, run_id=None))
    assert counts == [1]
    async with opened(tmp_path / "runs.db") as ledger:
        rows = await attempts(ledger)
        assert [row.number for row in rows] == list(range(1000))
        assert AttemptRecord(**{name: getattr(rows[2], name) for name in ATTEMPT_COLUMNS}) == ATTEMPT


async def test_attempts_are_written_without_anybody_asking(database: Any) -> None:
    database.note_attempt(ATTEMPT)
    with anyio.fail_after(20):
        while not await attempts(database):  # noqa: ASYNC110 - a database sets no event
            await anyio.sleep(0.01)


async def test_they_are_gathered_while_the_database_is_busy(database: Any) -> None:
    release = threading.Event()
    database._journal.put(Unit("", -1, operation=lambda _connection: release.wait(20)))
    database.note_attempt(ATTEMPT)
    database._flush()
    counts = count_transactions(database)
    for _ in range(5):
        database.note_attempt(ATTEMPT)
        database._on_timer()
    assert database._journal._queue.qsize() <= 1, "nothing piles up behind it"
    release.set()
    with anyio.fail_after(20):
        while len(await attempts(database)) < 6:  # noqa: ASYNC110
            await anyio.sleep(0.01)
    assert len(counts) <= 2


async def test_two_workers_share_what_they_know(tmp_path: Path) -> None:
    async with opened(tmp_path / "runs.db", "w1") as one, opened(tmp_path / "runs.db", "w2") as two:
        one.publish([DeploymentState("gpt", "open", at=NOW), DeploymentState("claude", "closed", at=NOW)])
        await one.flush()
        two.publish([DeploymentState("gpt", "closed", at=NOW + 1), DeploymentState("claude", "open", at=NOW - 1)])
        await two.flush()
        for ledger in (one, two):
            known = {state.deployment: (state.state, state.worker) for state in await ledger.published()}
            assert known == {"gpt": ("closed", "w2"), "claude": ("closed", "w1")}


async def test_a_state_of_a_newer_version_can_be_read(database: Any) -> None:
    row = {"deployment": "gpt", "state": json.dumps({"deployment": "gpt", "mood": 3}), "at": NOW, "worker": "w"}
    await database._journal.do(lambda connection: database._store.keep_deployments(connection, [row]))
    assert await database.published() == [DeploymentState("gpt")]


async def test_who_is_cancelled_holds_nothing(database: Any) -> None:
    release = threading.Event()
    kept = await reserve(database, 0.1)
    database._journal.put(Unit("", -1, operation=lambda _connection: release.wait(20)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reserve, database, 0.5)
        tasks.start_soon(lambda: database.settle(kept, 0.05, now=NOW))
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    release.set()
    await database._journal.do(lambda _connection: None)
    assert await spending(database) == Spending(0.05, 0.0), "what was to be settled is settled, the rest is let go"
    assert await database._store.read(lambda connection: connection.execute(HOLDS.select()).all()) == []


async def test_what_others_do_in_the_same_transaction_stays(database: Any) -> None:
    """One that is refused is undone by hand; one that fails takes the others' work along, which is then repeated."""
    release = threading.Event()
    database._journal.put(Unit("", -1, operation=lambda _connection: release.wait(20)))
    found: list[Hold | Refusal] = []

    async def one(usd: float) -> None:
        caps = [cap("a", 10.0), cap("b", 1.0)]
        found.append(await database.reserve(caps, usd, now=NOW, expires_at=LATER))

    def bad(_connection: Connection) -> None:
        raise TypeError("no")

    async with anyio.create_task_group() as tasks:
        for usd in (0.5, 5.0, 0.25):
            tasks.start_soon(one, usd)
        await anyio.wait_all_tasks_blocked()
        database._journal.put(Unit("", -1, operation=bad))
        release.set()
    assert sorted(each.usd for each in found if isinstance(each, Hold)) == [0.25, 0.5]
    assert set((await database.spending(["a", "b"], now=NOW)).values()) == {Spending(0.0, 0.75)}


async def test_statistics_never_fail_a_call(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not when the disk is full, and not after the end; one warning each time, and what comes later is written."""
    caplog.set_level(logging.WARNING, "ridethrough")
    async with opened(tmp_path / "runs.db") as ledger:
        await fill_disk(ledger, 1)
        for _ in range(3):
            for _ in range(1000):
                ledger.note_attempt(ATTEMPT)
            ledger.publish([DeploymentState("gpt", at=NOW)])
            await ledger.flush()
        assert len(caplog.records) == 1
        assert "disk is full" in caplog.text
        with pytest.raises(StoreError, match="disk is full"):
            await ledger.keep_answer("k", KeptAnswer("x" * 100_000, NOW))
        await fill_disk(ledger, 100_000)
        ledger.note_attempt(ATTEMPT)
        await ledger.flush()
        assert len(await attempts(ledger)) == 1
    for _ in range(3):
        ledger.note_attempt(ATTEMPT)
        ledger.publish([DeploymentState("gpt", at=NOW)])
    assert len(caplog.records) == 2
    with pytest.raises(StoreError, match="closed"):
        await reserve(ledger, 0.5)


async def fill_disk(ledger: Any, pages: int) -> None:
    """Let the file have at most so many pages, or as many as it has: SQLite's own way to a full disk."""
    await ledger._journal.do(lambda connection: connection.exec_driver_sql(f"PRAGMA max_page_count={pages}").scalar())


async def test_collecting_takes_what_nobody_can_ask_for(tmp_path: Path) -> None:
    now = NOW - 1_000_000_000  # in the past, whatever the time of the test
    async with opened(tmp_path / "runs.db") as ledger:
        await reserve(ledger, 0.5, cap("over", resets_at=now), cap("open", resets_at=4e9), expires_at=now)
        await reserve(ledger, 0.5, cap("of run", run_id="gone"), cap("for ever"), now=now - 2, expires_at=4e9)
        await ledger.keep_answer("old", KeptAnswer("", now))
        await ledger.keep_answer("new", KeptAnswer("", 4e9))
        for run_id, started_at in ((None, now), (None, 4e9), ("gone", 4e9)):
            ledger.note_attempt(replace(ATTEMPT, run_id=run_id, started_at=started_at))
        ledger.publish([DeploymentState("old", at=now), DeploymentState("new", at=4e9)])
    store = Store(f"sqlite:///{tmp_path / 'runs.db'}")
    housekeeping.collect(store, 3600.0)
    assert housekeeping.inspect_store(store) == []
    store.close()
    async with opened(tmp_path / "runs.db") as ledger:
        found = await ledger.spending(["over", "open", "of run", "for ever"], now=now)
        assert found["over"] == Spending()
        assert found["open"] == Spending(0.5, 0.0), "what its hold had put aside is spent"
        assert found["of run"] == found["for ever"] == Spending(0.0, 0.5)
        assert [await ledger.answer(key) is None for key in ("old", "new")] == [True, False]
        assert [state.deployment for state in await ledger.published()] == ["new"]
        counted = "SELECT count(*) FROM attempts"
        assert await ledger._store.read(lambda connection: connection.exec_driver_sql(counted).scalar()) == 1
        store = ledger._store
        await ledger._journal.do(lambda connection: store.delete_runs(connection, ["gone"]))
        assert await spending(ledger, "of run") == Spending(), "a run's money goes with it"


# --- several processes ----------------------------------------------------------------------------------------------

PROGRAM = """
import sys
import anyio
from ridethrough.runtime.backend import current_backend
from ridethrough.runtime.journal import Journal
from ridethrough.runtime.ledger import DatabaseLedger
from ridethrough.runtime.router.ledger import Cap, Hold
from ridethrough.runtime.store import Store

CAPS = [Cap("wide", "wide", 100.0), Cap("narrow", "narrow", 1.0)]


async def main() -> None:
    store, count = Store(sys.argv[1], "process"), int(sys.argv[2])
    store.prepare()
    journal = Journal(store, current_backend().call_soon)
    journal.start()
    ledger, granted = DatabaseLedger(journal, store), 0

    async def one() -> None:
        nonlocal granted
        found = await ledger.reserve(CAPS, 0.02, now=1_800_000_000.0, expires_at=1_800_000_600.0)
        granted += isinstance(found, Hold)

    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(count // 10):
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(one)
    print(granted, flush=True)
    sys.stdin.readline()
    journal.close()


anyio.run(main)
"""


class Process:
    """One that reserves ``count`` times when it is told to, says how often it was granted, and ends when told again."""

    def __init__(self, folder: Path, count: int) -> None:
        file = folder / "program.py"
        file.write_text(PROGRAM)
        command = [sys.executable, str(file), f"sqlite:///{folder / 'runs.db'}", str(count)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.hears() == "ready"

    def tell(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def hears(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def end(self, number: signal.Signals | None = None) -> None:
        if number is not None:
            self._process.send_signal(number)
        self._process.communicate(None if number is None else "")
        self._process.wait(20)


@pytest.mark.processes
async def test_two_processes_at_once_never_pass_the_cap(tmp_path: Path) -> None:
    processes = [Process(tmp_path, 100), Process(tmp_path, 100)]
    for process in processes:
        process.tell()
    granted = [int(process.hears()) for process in processes]
    for process in processes:
        process.end()
    assert sum(granted) == 50
    async with opened(tmp_path / "runs.db") as ledger:
        for key in ("wide", "narrow"):
            assert await spending(ledger, key) == Spending(0.0, 1.0)


@pytest.mark.processes
async def test_what_a_killed_process_held_counts_as_spent_in_the_end(tmp_path: Path) -> None:
    process = Process(tmp_path, 30)
    process.tell()
    assert process.hears() == "30"
    process.end(signal.SIGKILL)
    async with opened(tmp_path / "runs.db") as ledger:
        assert await spending(ledger, "narrow") == Spending(0.0, 0.6)
        await refused(ledger, 0.5, cap("narrow"))
        assert await spending(ledger, "narrow", now=LATER) == Spending(0.6, 0.0)
        await reserve(ledger, 0.4, cap("narrow"), now=LATER, expires_at=LATER + 1)
        assert await spending(ledger, "narrow", now=LATER) == Spending(0.6, 0.4)
        assert await spending(ledger, "wide", now=LATER) == Spending(0.6, 0.0)
    assert housekeeping.inspect_store(Store(f"sqlite:///{tmp_path / 'runs.db'}")) == []
