"""Retention and integrity: what is deleted, and what must never be found."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import DBAPIError

from ridethrough.runtime.store import Store

BATCH = 200
"""Runs deleted in one transaction, so that workers of the same database are not kept waiting."""


@dataclass(frozen=True)
class Freed:
    """What a collection deleted; sizes in bytes, the write-ahead log included."""

    runs: int
    payloads: int
    before: int
    after: int

    def __str__(self) -> str:
        """For people."""
        sizes = f"{self.before / 1e6:.1f} MB -> {self.after / 1e6:.1f} MB"
        return f"deleted {self.runs} runs and {self.payloads} large values; {sizes}."

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"runs": self.runs, "payloads": self.payloads, "bytes_before": self.before, "bytes_after": self.after}


def collect(store: Store, older_than: float) -> Freed:
    """Delete runs that ended more than ``older_than`` seconds ago, and give the space back to the file system.

    What the router kept goes likewise: answers, budgets whose window had ended by then, attempts outside of runs.

    Raises:
        StoreError: the database cannot be written; what was deleted by then stays deleted.
    """
    when, before, runs = time.time() - older_than, store.database.size(), 0
    try:
        while ids := _delete_batch(store, when):
            runs += len(ids)
        with store.writer.begin() as connection:
            store.expire_holds(connection, time.time())
            store.delete_router_rows(connection, when)
            payloads = store.delete_orphan_payloads(connection, when)
        store.close()
        store.database.reclaim()
    except (DBAPIError, sqlite3.Error) as error:
        raise store.database.translate(error) from error
    return Freed(runs, payloads, before, store.database.size())


def _delete_batch(store: Store, when: float) -> list[str]:
    with store.writer.begin() as connection:
        ids = store.finished_before(connection, when, BATCH)
        if ids:
            store.delete_runs(connection, ids)
        return ids


def inspect_store(store: Store) -> list[str]:
    """What is wrong with the file, and with what its tables say of each other; empty when all is well."""
    try:
        problems = store.database.check()
    except sqlite3.Error as error:
        return [store.database.translate(error).message]
    return problems or store.read_now(store.dangling)
