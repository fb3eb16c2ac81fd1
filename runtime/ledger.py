"""The router's ledger in the runs' database: what one worker spends, caches and learns is there for all.

Money and answers are written through the journal and waited for; they share its commits. Attempts and what is known of
deployments are statistics: they are gathered for a moment and written together, nobody waits for them, and what cannot
be written is lost with one warning. A process that is killed loses at most that moment of them, and no money.
"""

from __future__ import annotations

import json
import logging
import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any

import anyio
from sqlalchemy import Connection

from ridethrough.runtime import payload
from ridethrough.runtime.errors import StoreError
from ridethrough.runtime.journal import Journal, Unit
from ridethrough.runtime.router.ledger import (
    AttemptRecord,
    Cap,
    DeploymentState,
    Hold,
    KeptAnswer,
    Refusal,
    Spending,
    asked_nano,
    cap_nano,
    first_exceeded,
    keys_of,
    spending_of,
    spent_nano,
)
from ridethrough.runtime.store import ATTEMPT_COLUMNS, Record, Store

log = logging.getLogger("ridethrough")

FLUSH_SECONDS = 0.2
"""How long statistics are gathered before they are written."""

KEPT = 20_000
"""Attempts that are held in memory while the database is busy; beyond it the oldest are dropped."""

_LARGEST_INTEGER = 2**31 - 1  # what a column holds in every database; a count beyond it is a provider's nonsense
_STATE_FIELDS = frozenset(field.name for field in fields(DeploymentState))
_columns = attrgetter(*ATTEMPT_COLUMNS)


@dataclass(frozen=True, slots=True)
class _Statistics:
    """What is written together."""

    attempts: Sequence[AttemptRecord]
    states: Sequence[DeploymentState]


class DatabaseLedger:
    """The router's port (``ridethrough.runtime.router.ledger.Ledger``) on a database. Close it before the journal."""

    def __init__(self, journal: Journal, store: Store, *, worker_id: str = "") -> None:
        """``worker_id`` says who published what is known of a deployment."""
        self._journal = journal
        self._store = store
        self._worker_id = worker_id
        self._lock = threading.Lock()  # the timer's thread gathers too
        self._attempts: list[AttemptRecord] = []
        self._states: dict[str, DeploymentState] = {}
        self._timer: threading.Timer | None = None
        self._last: Unit | None = None
        self._closed = self._warned = False

    # --- money ------------------------------------------------------------------------------------------------------

    async def reserve(self, caps: Sequence[Cap], usd: float, *, now: float, expires_at: float) -> Hold | Refusal:
        """See ``Ledger.reserve``. Without caps it asks nobody."""
        amount, hold = asked_nano(usd), Hold(uuid.uuid4().hex, keys_of(caps), usd)
        if not caps:
            return hold
        row = {"id": hold.id, "keys": json.dumps(hold.keys), "amount": amount, "expires_at": expires_at}
        limits = _limits(caps)

        def reserve(connection: Connection) -> Hold | Refusal:
            self._store.expire_holds(connection, now)
            if self._store.reserve(connection.connection.cursor(), row, limits):
                return hold
            return self._refusal(connection, caps, amount, limits)

        try:
            return await self._journal.do(reserve)
        except anyio.get_cancelled_exc_class():
            self._let_go(hold)
            raise

    def _refusal(self, connection: Connection, caps: Sequence[Cap], amount: int, limits: Sequence[Record]) -> Refusal:
        sums = self._sums(connection, [limit["key"] for limit in limits])
        refusal = first_exceeded(caps, sums, amount)
        assert refusal is not None, "nothing can have changed inside the transaction"
        return refusal

    def _let_go(self, hold: Hold) -> None:
        """Take back what a caller asked for who does not wait for it any more; it is queued behind his request."""
        try:
            self._journal.put(Unit("", -1, operation=lambda connection: self._settle(connection, hold, 0)))
        except StoreError as error:
            self._warn(error)

    async def settle(self, hold: Hold, usd: float, *, now: float) -> None:
        """See ``Ledger.settle``. It is queued at once: who is cancelled while he waits has settled all the same."""
        if hold.keys:
            spent = spent_nano(usd, hold)
            await self._journal.do(lambda connection: self._settle(connection, hold, spent))

    def _settle(self, connection: Connection, hold: Hold, spent: int) -> None:
        self._store.settle(connection.connection.cursor(), hold.id, hold.keys, asked_nano(hold.usd), spent)

    async def spending(self, keys: Sequence[str], *, now: float) -> dict[str, Spending]:
        """See ``Ledger.spending``."""

        def read(connection: Connection) -> dict[str, Spending]:
            expired = [(json.loads(held), amount) for _, held, amount in self._store.expired(connection, now)]
            return spending_of(keys, self._sums(connection, keys), expired)

        return await self._store.read(read)

    def _sums(self, connection: Connection, keys: Sequence[str]) -> dict[str, tuple[int, int]]:
        return {row.key: (row.spent, row.reserved) for row in self._store.budgets(connection, keys)}

    # --- answers ----------------------------------------------------------------------------------------------------

    async def answer(self, key: str) -> KeptAnswer | None:
        """See ``Ledger.answer``."""
        row = await self._store.read(lambda connection: self._store.answer(connection, key))
        return None if row is None else KeptAnswer(row.response, row.kept_at)

    async def keep_answer(self, key: str, answer: KeptAnswer) -> None:
        """See ``Ledger.keep_answer``."""
        row = {"key": key, "response": answer.response, "kept_at": answer.kept_at}
        await self._journal.do(lambda connection: self._store.keep_answer(connection, row))

    # --- statistics -------------------------------------------------------------------------------------------------

    def note_attempt(self, record: AttemptRecord) -> None:
        """See ``Ledger.note_attempt``."""
        with self._lock:
            self._attempts.append(record)
            self._write_soon()

    def publish(self, states: Sequence[DeploymentState]) -> None:
        """See ``Ledger.publish``."""
        with self._lock:
            for state in states:
                self._states[state.deployment] = state if state.worker else replace(state, worker=self._worker_id)
            self._write_soon()

    async def published(self) -> list[DeploymentState]:
        """See ``Ledger.published``."""
        rows = await self._store.read(self._store.deployments)
        return [state_of(json.loads(row.state)) for row in rows]

    async def flush(self) -> None:
        """Write what was gathered, and wait until it is on disk (or until it is known that it cannot be)."""
        self._flush()
        if self._last is not None:
            await self._last.settled.wait()
            self._look_back()

    def close(self) -> None:
        """Queue what was gathered. To be called before the journal is closed, which then writes it."""
        self._look_back()
        self._flush()
        self._closed = True

    def _write_soon(self) -> None:
        """Start the timer, with the lock held. A thread is simpler than a task that somebody must start and stop."""
        if self._timer is not None:
            return
        if self._closed:
            self._attempts, self._states = [], {}
            self._warn(StoreError("The ledger is closed."))
            return
        timer = threading.Timer(FLUSH_SECONDS, self._on_timer)
        timer.daemon = True
        with suppress(RuntimeError):  # no thread to be had now: the next record tries again, and closing writes all
            timer.start()
            self._timer = timer

    def _on_timer(self) -> None:
        if self._last is not None and not self._last.settled.is_set():  # the database is busy: gather on
            with self._lock:
                del self._attempts[:-KEPT]
                self._timer = None
                self._write_soon()
        else:
            self._look_back()
            self._flush()

    def _flush(self) -> None:
        statistics = self._gather()
        if statistics is None:
            return
        unit = Unit("", -1, operation=lambda connection: self._write(connection, statistics))
        try:
            self._last = self._journal.put(unit)
        except StoreError as error:
            self._warn(error)

    def _gather(self) -> _Statistics | None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if not self._attempts and not self._states:
                return None
            statistics = _Statistics(self._attempts, list(self._states.values()))
            self._attempts, self._states = [], {}
            return statistics

    def _write(self, connection: Connection, statistics: _Statistics) -> None:
        if statistics.attempts:
            rows = [_attempt_row(record) for record in statistics.attempts]
            self._store.insert_attempts(connection.connection.cursor(), rows)
        if statistics.states:
            self._store.keep_deployments(connection, [_state_row(state) for state in statistics.states])

    def _look_back(self) -> None:
        """See what became of the last write; nobody waited for it."""
        if self._last is None or not self._last.settled.is_set():
            return
        if self._last.error is None:
            self._warned = False
        else:
            self._warn(self._last.error)

    def _warn(self, error: BaseException) -> None:
        if not self._warned:
            self._warned = True
            log.warning("statistics of model calls are lost: %s", error)


def _limits(caps: Sequence[Cap]) -> list[Record]:
    """The rows of the caps' budgets, each with the lowest limit on its money; in one order, so that none can block."""
    found: dict[str, dict[str, Any]] = {}
    for cap in caps:
        limit = cap_nano(cap)
        row = found.setdefault(
            cap.key, {"key": cap.key, "limit": limit, "resets_at": cap.resets_at, "run_id": cap.run_id}
        )
        row["limit"] = min(row["limit"], limit)
    return [found[key] for key in sorted(found)]


def _attempt_row(record: AttemptRecord) -> tuple[Any, ...]:
    return tuple(map(_storable, _columns(record)))


def _storable(value: Any) -> Any:
    """Errors and counts come from providers: half a surrogate pair, or a number beyond all reason, must not fail."""
    if isinstance(value, str):
        return payload.storable(value)
    return min(value, _LARGEST_INTEGER) if isinstance(value, int) else value


def _state_row(state: DeploymentState) -> Record:
    text = payload.encode({**vars(state), "limits": dict(state.limits)})
    return {"deployment": state.deployment, "state": text, "at": state.at or 0.0, "worker": state.worker}


def state_of(values: Mapping[str, Any]) -> DeploymentState:
    """A state as it was written, perhaps by a version that knows more."""
    return DeploymentState(**{name: value for name, value in values.items() if name in _STATE_FIELDS})
