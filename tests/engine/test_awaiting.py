"""Runs that are parked for models: who is woken, in which order, and that a million of them cost nothing to look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event

from ridethrough.runtime.control import new_run_row
from ridethrough.runtime.store import Store

KNOWN = {"mails": "1"}
NOW = 1000.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'runs.db'}")
    store.prepare()
    yield store
    store.close()


def park(store: Store, *runs: dict[str, Any]) -> None:
    """Runs as the engine parks them; ``id`` and what differs from the usual."""
    usual = {"workflow": "mails", "version": "1", "status": "paused", "pause_reason": "outage", "parked_at": 1.0}
    with store.writer.begin() as connection:
        for run in runs:
            tried = run.pop("tried", 0)
            row = {**usual, "created_at": 1.0, "root_id": run["id"], "awaits": "gpt", **run}
            store.insert_runs(connection.connection.cursor(), [new_run_row(row)])
            store.update_run(connection, run["id"], tried=tried)


def wake(store: Store, awaits: str = "gpt", limit: int = 100, **others: Any) -> list[str]:
    chosen: dict[str, Any] = {"workflows": KNOWN, "roots": None, "accepted": [], **others}
    with store.writer.begin() as connection:
        return store.wake_awaiting(connection, awaits, NOW, limit=limit, **chosen)


def left(store: Store, awaits: str = "gpt") -> int:
    return store.read_now(lambda connection: store.count_awaiting(connection, awaits))


def test_a_new_run_awaits_nothing_and_was_not_tried(store: Store) -> None:
    park(store, {"id": "a", "awaits": None})
    row = store.read_now(lambda connection: store.run(connection, "a"))
    assert row is not None
    assert (row.awaits, row.tried) == (None, 0)
    assert store.read_now(store.awaited) == []


def test_the_most_urgent_then_the_least_tried_then_the_oldest(store: Store) -> None:
    park(
        store,
        {"id": "low", "priority": -5, "parked_at": 0.5},
        {"id": "young", "parked_at": 3.0},
        {"id": "old", "parked_at": 2.0},
        {"id": "tried", "parked_at": 1.0, "tried": 2},
        {"id": "urgent", "priority": 100, "parked_at": 9.0, "tried": 7},
        {"id": "other", "awaits": "claude"},
    )
    assert wake(store, limit=2) == ["urgent", "old"]
    assert left(store) == 3
    assert wake(store, workflows={"else": "1", "mails": "1"}) == ["young", "tried", "low"]
    assert wake(store) == []
    assert store.read_now(store.awaited) == ["claude"]


def test_who_is_woken_may_be_claimed_and_awaits_nothing_more(store: Store) -> None:
    park(store, {"id": "a", "wake_at": 9e9}, {"id": "b"})
    assert wake(store, limit=1) == ["a"]
    row = store.read_now(lambda connection: store.run(connection, "a"))
    assert row is not None
    assert (row.status, row.wake_at, row.awaits, row.pause_reason) == ("paused", NOW, None, "outage")
    due = store.read_now(lambda connection: store.due(connection, NOW, KNOWN, 10, None, []))
    assert [each.id for each in due] == ["a"]


def test_workflows_and_chosen_roots_share_one_order(store: Store) -> None:
    park(
        store,
        {"id": "a1", "parked_at": 4.0},
        {"id": "b1", "parked_at": 3.0, "workflow": "else"},
        {"id": "a2", "parked_at": 2.0, "version": "0"},
        {"id": "b2", "parked_at": 1.0, "workflow": "else"},
    )
    both: dict[str, Any] = {"workflows": {"mails": "1", "else": "1"}, "accepted": ["a2", "b2"]}
    assert wake(store, limit=3, **both) == ["b2", "a2", "b1"]
    assert wake(store, limit=3, **both) == ["a1"]


def test_only_what_this_process_can_execute(store: Store) -> None:
    park(
        store,
        {"id": "mine"},
        {"id": "older", "version": "0"},
        {"id": "unknown", "workflow": "else"},
        {"id": "child", "workflow": "else", "root_id": "mine"},
    )
    assert wake(store, roots=["unknown"]) == []
    assert wake(store, workflows={}) == []
    assert wake(store, accepted=["older"], roots=["older"]) == ["older"]
    assert wake(store, accepted=["mine"]) == ["mine", "child"]
    assert left(store) == 1


def test_the_conditions_are_listed_once_each(store: Store) -> None:
    names = ["gpt", "claude", "quota:a", "it's", "", "日本"]
    park(store, *({"id": f"{name}{number}", "awaits": name} for name in names for number in range(3)))
    park(store, {"id": "none", "awaits": None})
    assert store.read_now(store.awaited) == sorted(names)
    assert [left(store, name) for name in names] == [3] * len(names)
    assert left(store, "nobody") == 0


def test_a_run_that_ends_awaits_nothing(store: Store) -> None:
    park(store, {"id": "a"})
    with store.writer.begin() as connection:
        store.finish_runs(connection.connection.cursor(), [{"b_id": "a", "b_status": "cancelled", "b_at": NOW}])
    assert left(store) == 0
    assert wake(store) == []


def test_the_index_answers_whatever_is_parked(store: Store) -> None:
    """Neither question reads runs that it does not return, nor sorts any."""
    plans: list[str] = []

    def explain(connection: Connection, _cursor: Any, statement: str, parameters: Any, *_others: Any) -> None:
        if statement.lstrip().startswith(("SELECT", "WITH")):
            raw = connection.connection.cursor()
            raw.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            plans.extend(row[3] for row in raw.fetchall())

    park(store, {"id": "a"}, {"id": "b"})
    event.listen(store.reader, "before_cursor_execute", explain)
    event.listen(store.writer, "before_cursor_execute", explain)
    store.read_now(store.awaited)
    left(store)
    wake(store, workflows={"mails": "1", "else": "2"}, limit=1)
    looked_at = [plan for plan in plans if "runs" in plan]
    assert len(looked_at) == 5
    assert all("ix_runs_awaits (awaits" in plan and plan.startswith("SEARCH") for plan in looked_at), plans
    assert sum("(awaits=? AND workflow=? AND version=?)" in plan for plan in looked_at) == 2, plans
    assert not any("TEMP B-TREE" in plan for plan in plans), plans
    choices: list[dict[str, Any]] = [{"roots": ["a"]}, {"workflows": {}, "accepted": ["a"]}]
    for chosen in choices:
        plans.clear()
        wake(store, **chosen)
        assert [plan for plan in plans if "runs" in plan] == ["SEARCH runs USING INDEX ix_runs_root (root_id=?)"]
