"""What changes a run from outside: cancel, pause, resume, signal, answer, fork, claim.

Each is one function on the connection of a writing transaction, so that looking at a run and changing it cannot be
torn apart by another process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema
from sqlalchemy import Connection

from ridethrough.runtime import lease, payload
from ridethrough.runtime.errors import NotFound, RunBusy, RunCancelled, RunConflict, RunPoisoned, SerializationError
from ridethrough.runtime.events import EventBase, RunResumed, RunStarted
from ridethrough.runtime.store import RUN_COLUMNS, Store, StoredRow
from ridethrough.runtime.tables import FINAL

POISON_LIMIT = 10
"""A run whose worker died this often without one new step is failed."""

REVIVABLE = ("Diverged", "RunPoisoned", "NotFound")
"""Failures of the machinery, not of the work: an explicit resume takes such a run up again."""


def require(store: Store, connection: Connection, run_id: str) -> StoredRow:
    """The run.

    Raises:
        NotFound: there is none.
    """
    row = store.run(connection, run_id)
    if row is None:
        raise NotFound(f"There is no run {run_id!r} in {store.database.display}. `ridethrough runs` lists them.")
    return row


def new_run_row(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """A row for ``Store.insert_runs``; what is not given has its default."""
    defaults = {"fence": 0, "priority": 0, "recoveries": 0, "strikes": 0, "strike_seq": 0, "input_digest": ""}
    return tuple(values.get(name, defaults.get(name)) for name in RUN_COLUMNS)


def add_event(store: Store, connection: Connection, run_id: str, event: EventBase) -> int:
    """Put an event at the end of a run's journal; its position."""
    seq = store.last_seq(connection, run_id) + 1
    keep_event(store, connection, run_id, seq, event)
    return seq


def keep_event(store: Store, connection: Connection, run_id: str, seq: int, event: EventBase) -> None:
    """Put an event at a position of a run's journal."""
    data = event.model_dump_json(exclude={"run_id", "seq", "at", "path"})
    row = {"run_id": run_id, "seq": seq, "type": getattr(event, "type", ""), "at": event.at, "path": event.path}
    store.insert_event(connection, {**row, "data": data})


def owner(store: Store, connection: Connection, row: StoredRow) -> StoredRow | None:
    """The live worker that holds a run, if there is one."""
    if row.worker_id is None:
        return None
    for worker in store.workers(connection):
        if worker.id == row.worker_id:
            return None if lease.is_gone(worker, lease.lease_clock()) else worker
    return None


# --- ending, cancelling, pausing ------------------------------------------------------------------------------------


def finish(
    store: Store, connection: Connection, row: Any, status: str, error: Exception | None, now: float, **result: Any
) -> None:
    """Give a run its final status, forget its waits, and let its parent look."""
    ending = {
        "b_id": row.id,
        "b_status": status,
        "b_result": result.get("text"),
        "b_ref": result.get("ref"),
        "b_error": None if error is None else payload.dump_error(error),
        "b_at": now,
    }
    store.finish_runs(connection.connection.cursor(), [ending])
    store.delete_waits(connection, row.id)
    if row.parent_id is not None:
        store.wake(connection, [row.parent_id], now)


def cancel(store: Store, connection: Connection, run_id: str, now: float) -> str:
    """Cancel a run and its children: at once where nobody holds them, else by asking the holder. Its status then."""
    row = require(store, connection, run_id)
    if row.status in FINAL:
        return str(row.status)
    if owner(store, connection, row) is not None:
        _cancel_children(store, connection, run_id, now)
        store.update_run(connection, run_id, wanted="cancel")
        return "running"
    _cancel_unheld(store, connection, row, now)
    return "cancelled"


def _cancel_unheld(store: Store, connection: Connection, row: StoredRow, now: float) -> None:
    """Cancel a run that nobody executes."""
    _cancel_children(store, connection, row.id, now)
    store.update_run(connection, row.id, fence=row.fence + 1)
    finish(store, connection, row, "cancelled", RunCancelled(f"Run {row.id} was cancelled."), now)


def _cancel_children(store: Store, connection: Connection, run_id: str, now: float) -> None:
    for child in store.children(connection, run_id):
        cancel(store, connection, child.id, now)


def pause(store: Store, connection: Connection, run_id: str, now: float) -> str:
    """Pause a run: at once where nobody holds it, else by asking the holder, who lets running steps finish."""
    row = require(store, connection, run_id)
    if row.status in FINAL:
        raise RunConflict(f"Run {run_id} has ended ({row.status}); there is nothing to pause.")
    if owner(store, connection, row) is not None:
        if row.wanted != "cancel":
            store.update_run(connection, run_id, wanted="pause")
        return "running"
    store.update_run(
        connection,
        run_id,
        status="paused",
        fence=row.fence + 1,
        worker_id=None,
        wake_at=None,
        awaits=None,
        wanted=None,
        pause_reason="operator",
        pause_until=None,
        parked_at=now,
    )
    return "paused"


def require_free(store: Store, connection: Connection, row: StoredRow, me: str | None) -> None:
    """See that no other live process holds the run.

    Raises:
        RunBusy: one does; the message names it.
    """
    holder = owner(store, connection, row)
    if holder is not None and holder.id != me:
        who, run_id = lease.describe(holder), row.id
        raise RunBusy(
            f"Run {run_id} is being executed by {who}. Follow it: ridethrough events {run_id} --follow", run_id, who
        )


def resume(store: Store, connection: Connection, run_id: str, now: float, me: str | None) -> StoredRow:
    """Make a parked, queued or orphaned run one that may be claimed now.

    Raises:
        RunBusy: another live process holds it.
        RunConflict: it has ended for good.
    """
    row = require(store, connection, run_id)
    if row.status in FINAL:
        _revive(store, connection, row, now)
        return require(store, connection, run_id)
    require_free(store, connection, row, me)
    _resume_children(store, connection, run_id, now)
    wanted = "cancel" if row.wanted == "cancel" else None  # a pause is withdrawn by this, a promise to cancel is not
    if row.worker_id is None:
        store.update_run(connection, run_id, wake_at=now, wanted=wanted, pause_until=None)
    else:
        store.update_run(connection, run_id, wanted=wanted)
    return row


def _resume_children(store: Store, connection: Connection, run_id: str, now: float) -> None:
    """Let the children go on that wait for models, too; what a person has paused stays as it is."""
    for child in store.children(connection, run_id):
        if child.status == "paused" and child.pause_reason != "operator":
            store.update_run(connection, child.id, wake_at=now, pause_until=None)
        _resume_children(store, connection, child.id, now)


def is_over(status: str | None, error: str | None) -> bool:
    """Whether a run (``None``: one that is gone) cannot go on any more: some failures can be mended and resumed."""
    if status != "failed":
        return status is None or status in FINAL
    return (payload.error_summary(error)["type"] if error else "") not in REVIVABLE


def _revive(store: Store, connection: Connection, row: StoredRow, now: float) -> None:
    kind = payload.error_summary(row.error)["type"] if row.error else ""
    if row.status != "failed" or kind not in REVIVABLE:
        raise RunConflict(
            f"Run {row.id} has ended ({row.status}). To run it again from one of its steps: "
            f"ridethrough fork {row.id} --at STEP (ridethrough show {row.id} --steps lists them)."
        )
    store.update_run(connection, row.id, status="queued", wake_at=now, error=None, finished_at=None, strikes=0)


# --- signals --------------------------------------------------------------------------------------------------------


def signal(store: Store, connection: Connection, run_id: str, name: str, value: Any, now: float) -> None:
    """Keep a signal for a run and wake it.

    Raises:
        NotFound, RunConflict: there is no such run, or it has ended.
        SerializationError: the run waits for a value of another type.
    """
    row = require(store, connection, run_id)
    if row.status in FINAL:
        raise RunConflict(f"Run {run_id} has ended ({row.status}); nobody would receive signal {name!r}.")
    for wait in store.waits(connection, [run_id]):
        if wait.name == name and wait.value_schema:
            _check_value(name, value, json.loads(wait.value_schema))
    store.insert_signal(connection, run_id, name, payload.encode(value, spaced=True), now)
    store.wake(connection, [run_id], now)


def _check_value(name: str, value: Any, schema: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(schema)
    for error in validator.iter_errors(value):
        raise SerializationError(
            f"Signal {name!r} was not sent: {error.json_path}: {error.message}. The run waits for {json.dumps(schema)}."
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """A person's answer to a call that waits for approval."""

    approved: bool
    note: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The signal's value."""
        return {"approved": self.approved, "note": self.note}


def decide(store: Store, connection: Connection, run_id: str, call_id: str, decision: Decision, now: float) -> None:
    """Approve or deny a call.

    Raises:
        NotFound: no call of that id waits; the message lists those that do.
        RunConflict: somebody has decided otherwise, and the run has not read it yet.
    """
    require(store, connection, run_id)
    waits = [wait for wait in store.waits(connection, [run_id]) if wait.kind in ("approval", "interrupted")]
    call_id = next((wait.name for wait in waits if call_id == wait.path.rpartition("/")[0]), call_id)
    if call_id not in {wait.name for wait in waits}:
        known = ", ".join(wait.name for wait in waits) or "none"
        raise NotFound(f"Run {run_id} has no call {call_id!r} that waits for a decision. Waiting: {known}.")
    earlier = store.first_signal(connection, run_id, call_id)
    if earlier is not None:  # not read by the run yet
        if json.loads(earlier.value)["approved"] == decision.approved:
            return
        raise RunConflict(f"Call {call_id} of run {run_id} has been decided the other way already.")
    signal(store, connection, run_id, call_id, decision.as_json(), now)


# --- fork -----------------------------------------------------------------------------------------------------------


def fork(store: Store, connection: Connection, run_id: str, at: str, new_id: str, now: float) -> None:
    """Make a new run with the steps of ``run_id`` that came before step ``at``; it is queued.

    Raises:
        NotFound: there is no such run or step.
    """
    row = require(store, connection, run_id)
    step = store.step(connection, run_id, at)
    if step is None:
        known = ", ".join(item.path for item in store.steps(connection, run_id)[:20])
        raise NotFound(f"Run {run_id} has no step {at!r}. Its steps: {known or 'none yet'}.")
    if store.run(connection, new_id) is not None:
        raise RunConflict(f"Run {new_id} exists already. Give the fork another id.")
    values = {
        name: getattr(row, name)
        for name in (
            "workflow",
            "version",
            "input",
            "input_ref",
            "input_digest",
            "source",
            "cwd",
            "tenant",
            "priority",
            "labels",
        )
    }
    fresh = {
        "id": new_id,
        "root_id": new_id,
        "status": "queued",
        "created_at": now,
        "wake_at": now,
        "forked_from": run_id,
    }
    store.insert_runs(connection.connection.cursor(), [new_run_row({**values, **fresh, "strike_seq": 0})])
    store.copy_journal(connection, run_id, new_id, step.seq)


# --- claiming -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim:
    """A run that a worker has just taken."""

    row: StoredRow
    fence: int
    seq: int
    recoveries: int
    event: EventBase | None = None
    """What was put on record about it, for those who watch."""


class Claimer:
    """Takes runs whose time has come, and those of dead workers, for one worker."""

    def __init__(self, store: Store, worker_id: str, known: Callable[[], Mapping[str, str]], mine: set[str]) -> None:
        """``known`` gives the workflows (name, version) that this process can execute.

        ``mine`` has the runs that it executes, from before their row says so until after it has let go of them. It is
        read inside the claiming transaction: a copy from before could lack a run that has just been started here, which
        would then look like one that this worker had lost, and run twice.
        """
        self._mine = mine
        self._postponed: dict[str, tuple[int, float]] = {}
        self.accepted: set[str] = set()
        """Roots that somebody resumed by name: their runs are taken whatever the version of their workflow."""
        self._store = store
        self._worker_id = worker_id
        self._known = known

    def postpone(self, run_id: str) -> None:
        """A write of this run has failed here: try again in 1, 2, 4 ... 60 seconds, not at once and for ever."""
        count = self._postponed.get(run_id, (0, 0.0))[0] + 1
        self._postponed[run_id] = (count, time.monotonic() + min(60.0, 2.0 ** (count - 1)))

    def something_due(self, connection: Connection, now: float, roots: Sequence[str] | None, orphans: bool) -> bool:
        """Whether a claim would find anything; a read, so that an idle worker writes nothing."""
        return bool(self._due(connection, now, 1, roots) or (orphans and self._orphans(connection, roots)))

    def claim(
        self,
        connection: Connection,
        now: float,
        limit: int,
        roots: Sequence[str] | None,
        always: str | None = None,
    ) -> list[Claim]:
        """Take up to ``limit`` runs: orphans first, then what is due; and ``always``, whatever its version."""
        rows = self._orphans(connection, roots)[: max(limit, 0)]
        rows += self._due(connection, now, limit - len(rows), roots) if limit > len(rows) else []
        if always is not None and always not in {row.id for row in rows}:
            row = self._store.run(connection, always)
            rows += [row] if row is not None and self._is_free(connection, row) else []
        claims = [claim for row in rows if (claim := self._take(connection, row, now)) is not None]
        self._bury(connection)
        return claims

    def _is_free(self, connection: Connection, row: StoredRow) -> bool:
        """Whether nobody executes the run and it may be taken. Its worker may be one that is on no list any more."""
        if row.worker_id is not None:
            return row.id not in self._mine and owner(self._store, connection, row) is None
        return row.id not in self._mine and row.wake_at is not None

    def _due(self, connection: Connection, now: float, limit: int, roots: Sequence[str] | None) -> list[StoredRow]:
        """Runs whose time has come; not those that this worker has parked but not yet let go of."""
        known = self._known()
        accepted = list(self.accepted)
        # Some of the first may be runs that are parked but not yet let go of: look past them.
        look = limit + len(self._mine)
        rows = self._store.due(connection, now, known, look, roots, accepted) if known or accepted else []
        return [row for row in rows if row.id not in self._mine][:limit]

    def _orphans(self, connection: Connection, roots: Sequence[str] | None) -> list[StoredRow]:
        """Runs of dead workers, and of this one that it does not execute (their last write had failed)."""
        known, live = self._known(), self._live(connection)
        return [
            row
            for row in self._store.held_by_none_of(connection, live)
            if row.id not in self._mine
            and self._postponed.get(row.id, (0, 0.0))[1] <= time.monotonic()
            and (row.root_id in self.accepted or known.get(row.workflow) == row.version)
            and (roots is None or row.root_id in roots)
        ]

    def _live(self, connection: Connection) -> list[str]:
        """The other workers that are there. One that is on no list is as dead as one whose lease ran out."""
        now = lease.lease_clock()
        others = [worker for worker in self._store.workers(connection) if worker.id != self._worker_id]
        return [worker.id for worker in others if not lease.is_gone(worker, now)]

    def _bury(self, connection: Connection) -> None:
        """Take dead workers that hold nothing any more off the list."""
        live = {*self._live(connection), self._worker_id}
        dead = {worker.id for worker in self._store.workers(connection)} - live
        if dead:
            busy = {row.worker_id for row in self._store.held_by_none_of(connection, list(live))}
            for worker_id in dead - busy:
                self._store.delete_worker(connection, worker_id)

    def _take(self, connection: Connection, row: StoredRow, now: float) -> Claim | None:
        store, orphan = self._store, row.worker_id is not None  # its worker died, or a write of this one failed
        if row.wanted == "cancel":
            _cancel_unheld(store, connection, row, now)
            return None
        changes: dict[str, Any] = {}
        if orphan:
            changes = self._strike(connection, row)
            if changes["strikes"] >= POISON_LIMIT:
                self._poison(connection, row, now)
                return None
        recoveries = changes.get("recoveries", row.recoveries)
        store.update_run(
            connection,
            row.id,
            status="running",
            worker_id=self._worker_id,
            fence=row.fence + 1,
            wake_at=None,
            awaits=None,
            started_at=row.started_at or now,
            pause_reason=None,
            pause_until=None,
            parked_at=None,
            **changes,
        )
        if orphan:
            return self._told(
                connection, row, RunStarted(at=now, workflow=row.workflow, recovery=recoveries), recoveries
            )
        if row.status in ("waiting", "paused"):
            return self._told(connection, row, RunResumed(at=now), recoveries)
        return Claim(row, row.fence + 1, store.last_seq(connection, row.id), recoveries)

    def _told(self, connection: Connection, row: StoredRow, event: EventBase, recoveries: int) -> Claim:
        """Put the event of a claim on record."""
        seq = add_event(self._store, connection, row.id, event)
        told = event.model_copy(update={"run_id": row.id, "seq": seq})
        return Claim(row, row.fence + 1, seq, recoveries, told)

    def _strike(self, connection: Connection, row: StoredRow) -> dict[str, Any]:
        """Count a death; progress since the last one starts the count anew."""
        seq = self._store.last_step(connection, row.id)
        strikes = row.strikes + 1 if seq == row.strike_seq else 1
        return {"recoveries": row.recoveries + 1, "strikes": strikes, "strike_seq": seq}

    def _poison(self, connection: Connection, row: StoredRow, now: float) -> None:
        error = RunPoisoned(
            f"Run {row.id}: its worker died {POISON_LIMIT} times without one new step, so it is not tried again. Look "
            f"at the step after the last one of `ridethrough show {row.id} --steps`; then ridethrough resume {row.id}.",
            run_id=row.id,
            error_type="RunPoisoned",
        )
        self._store.update_run(connection, row.id, fence=row.fence + 1)
        finish(self._store, connection, row, "failed", error, now)
