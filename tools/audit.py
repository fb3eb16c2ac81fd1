"""What sandboxes asked of the network, on its way into the database."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import anyio
from sqlalchemy import Connection

if TYPE_CHECKING:
    from ridethrough.runtime.worker import Worker
    from ridethrough.sandboxes.egress.audit import Decision

log = logging.getLogger("ridethrough")

REFUSALS: Final = 200
"""Refusals of one sandbox that are kept in one period; what is beyond is counted. A loop inside must not fill the
database."""

WAITING: Final = 20_000
"""Decisions that wait for a database that cannot be written."""


class Audit:
    """The decisions of one worker's proxies, written in batches."""

    def __init__(self, worker: Worker, owners: Callable[[], Mapping[str, str]]) -> None:
        """``owners`` gives the runs of the sandboxes that this worker is attached to."""
        self.worker = worker
        self._owners = owners
        self._waiting: list[Decision] = []
        self._refused: Counter[str] = Counter()
        self._beyond: Counter[str] = Counter()
        self._lost = 0
        self._writing = anyio.Lock()

    def note(self, decision: Decision) -> None:
        """Take a decision; it is written with the next batch."""
        if not decision.allowed:
            self._refused[decision.sandbox_id] += 1
            if self._refused[decision.sandbox_id] > REFUSALS:
                self._beyond[decision.sandbox_id] += 1
                return
        if len(self._waiting) >= WAITING:
            self._lost += 1
            return
        self._waiting.append(decision)

    async def write(self) -> None:
        """Put on record what has come, and begin a new period.

        Raises:
            StoreError: the database cannot be written; nothing is lost by that.
        """
        async with self._writing:
            batch, beyond, lost = list(self._waiting), dict(self._beyond), self._lost
            if not batch and not beyond:
                return
            owners = dict(self._owners())
            await self.worker.journal.do(lambda connection: self._insert(connection, batch, beyond, owners))
            del self._waiting[: len(batch)]
            self._beyond.subtract(beyond)
            self._beyond += Counter()
            self._refused.clear()
            self._lost -= lost
            if lost:
                log.warning("%d decisions of the sandboxes' proxy were not kept: the database was slow", lost)

    def _insert(
        self, connection: Connection, batch: list[Decision], beyond: dict[str, int], owners: dict[str, str]
    ) -> None:
        store, now = self.worker.store, self.worker.clock.now()
        for sandbox_id in {decision.sandbox_id for decision in batch} | set(beyond):
            if sandbox_id not in owners and (row := store.sandbox(connection, sandbox_id)) is not None and row.run_id:
                owners[sandbox_id] = row.run_id
        rows = [_row(decision, owners.get(decision.sandbox_id)) for decision in batch]
        rows += [_more(id, owners.get(id), count, now) for id, count in beyond.items() if count > 0]
        store.insert_egress(connection, rows)


def _row(decision: Decision, run_id: str | None) -> dict[str, Any]:
    return {
        "sandbox_id": decision.sandbox_id,
        "run_id": run_id,
        "at": decision.at,
        "method": decision.method,
        "host": decision.host,
        "port": decision.port,
        "allowed": decision.allowed,
        "reason": decision.reason,
        "bytes_in": decision.bytes_in,
        "bytes_out": decision.bytes_out,
        "status": decision.status,
    }


def _more(sandbox_id: str, run_id: str | None, count: int, now: float) -> dict[str, Any]:
    """One row for all refusals beyond those that are kept."""
    told = {"sandbox_id": sandbox_id, "run_id": run_id, "at": now, "method": "", "host": "", "port": 0}
    return told | {
        "allowed": False,
        "reason": f"{count} more were refused",
        "bytes_in": 0,
        "bytes_out": 0,
        "status": None,
    }
