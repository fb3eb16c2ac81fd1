"""The only writer: one thread, one connection, group commit.

Callers put units of work into a queue and wait. The thread takes whatever has queued, writes it in one transaction,
wakes all callers with one call into the event loop, and goes round again. It never waits to fill a batch, so a single
run pays one commit a step, and a hundred runs share one.

Fencing happens in the same transaction: rows of a run are written only where its fence is still the writer's.
A transaction that fails is repeated unit by unit, so that one bad unit fails alone; when the database itself is the
trouble (full disk, lock, read-only), every unit of the batch fails with a ``StoreError`` and nothing of it is written.

The thread also renews the worker's lease, so that a workflow that blocks the event loop for a while keeps its runs.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import anyio
from sqlalchemy import Connection

from ridethrough.runtime.errors import Error, RunConflict, StoreError
from ridethrough.runtime.store import Record, Store
from ridethrough.runtime.testpoints import killpoint

T = TypeVar("T")
_CLOSE = object()


class Fenced(Exception):
    """Another worker has claimed the run: this one may not write to it any more. Never reaches user code."""


class Unit:
    """Work that is committed as a whole, and somebody who waits for it."""

    __slots__ = ("ending", "error", "fence", "operation", "result", "run_id", "run_row", "settled", "step", "then")

    def __init__(
        self,
        run_id: str,
        fence: int,
        *,
        step: tuple[Any, ...] | None = None,
        run_row: tuple[Any, ...] | None = None,
        ending: Record | None = None,
        operation: Callable[[Connection], Any] | None = None,
    ) -> None:
        """One of a journal row, a new run, a final status, or any operation on the transaction's connection.

        ``fence`` below 0 means that the unit is not bound to a claim.
        """
        self.run_id = run_id
        self.fence = fence
        self.step = step
        self.run_row = run_row
        self.ending = ending
        self.operation = operation
        self.settled = anyio.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self.then: Callable[[], None] | None = None
        """Called in the event loop once the unit is on disk, in the order in which units were put."""


class Heartbeat:
    """What the writer thread does besides writing: renew a lease every ``period`` seconds."""

    def __init__(self, period: float, beat: Callable[[Connection], None]) -> None:
        """``beat`` runs in a transaction of its own."""
        self.period = period
        self.beat = beat


class Journal:
    """The queue and the thread."""

    def __init__(self, store: Store, call_soon: Callable[..., Any]) -> None:
        """``call_soon(function, *args)`` runs a function in the event loop's thread; it must be thread-safe."""
        self._store = store
        self._call_soon = call_soon
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ridethrough-journal", daemon=True)
        self._heartbeat: Heartbeat | None = None
        self._last_beat = 0.0
        self._connection: Connection | None = None
        self._closed = False

    def start(self, heartbeat: Heartbeat | None = None) -> None:
        """Start the thread."""
        self._heartbeat = heartbeat
        self._last_beat = time.monotonic()
        self._thread.start()

    def close(self) -> None:
        """Write what has queued and end the thread. Blocks until then."""
        self._closed = True
        self._queue.put(_CLOSE)
        self._thread.join()

    def stop_beating(self) -> None:
        """Let the lease be: the worker is about to sign off. For the journal's own thread."""
        self._heartbeat = None

    def put(self, unit: Unit) -> Unit:
        """Queue a unit without waiting for it."""
        if self._closed:
            raise StoreError("The runtime is closed: nothing can be written any more.")
        self._queue.put(unit)
        return unit

    async def write(self, unit: Unit) -> Any:
        """Queue a unit and wait until it is on disk; its operation's result.

        Raises:
            Fenced: the run belongs to another worker now.
            StoreError: the database could not be written; nothing of the unit was.
        """
        self.put(unit)
        await unit.settled.wait()
        if unit.error is not None:
            raise unit.error
        return unit.result

    async def do(self, operation: Callable[[Connection], T], run_id: str = "", fence: int = -1) -> T:
        """Run an operation in a transaction of the writer and wait for its result."""
        result: T = await self.write(Unit(run_id, fence, operation=operation))
        return result

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        closing = False
        while not closing:
            batch = self._collect()
            closing = _CLOSE in batch
            units = [unit for unit in batch if unit is not _CLOSE]
            if units:
                self._write(units)
                self._wake(units)
        self._drop_connection()

    def _collect(self) -> list[Any]:
        """Wait for work, keeping the lease alive, and take all there is."""
        while True:
            try:
                batch = [self._queue.get(timeout=self._heartbeat.period if self._heartbeat else None)]
                break
            except queue.Empty:
                self._beat()
        with contextlib.suppress(queue.Empty):
            while True:
                batch.append(self._queue.get_nowait())
        self._beat_if_due()
        return batch

    def _wake(self, units: Sequence[Unit]) -> None:
        # The loop may be gone when the process is being torn down; the rows are on disk all the same.
        with contextlib.suppress(RuntimeError):
            self._call_soon(_settle, units)

    def _write(self, units: Sequence[Unit]) -> None:
        try:
            self._transaction(units)
        except Exception as error:  # SQLAlchemy's errors, and the driver's own from the compiled statements
            self._after_failure(units, error)

    def _after_failure(self, units: Sequence[Unit], error: Exception) -> None:
        if self._store.database.is_fatal(error):
            self._drop_connection()
            _fail(units, self._store.database.translate(error))
        elif len(units) == 1:
            _fail(units, error if isinstance(error, Error | Fenced) else self._store.database.translate(error))
        else:
            for unit in units:
                unit.error = unit.result = None
                self._write([unit])

    def _transaction(self, units: Sequence[Unit]) -> None:
        if any(unit.operation is not None for unit in units):
            self._transaction_with_operations(units)
        else:
            self._transaction_of_rows(units)
        killpoint("journal.after_commit")

    def _transaction_of_rows(self, units: Sequence[Unit]) -> None:
        """Steps, starts and ends only: the driver alone, as SQLAlchemy's begin and commit cost as much as the rows."""
        cursor, database = _cursor(self._connect()), self._store.database
        database.begin(cursor)
        try:
            self._write_rows(cursor, units)
            killpoint("journal.before_commit")
            database.commit(cursor)
        except BaseException:
            with contextlib.suppress(Exception):
                database.rollback(cursor)
            raise

    def _transaction_with_operations(self, units: Sequence[Unit]) -> None:
        connection = self._connect()
        with connection.begin():
            cursor, start = _cursor(connection), 0
            for index, unit in enumerate(units):
                if unit.operation is not None:
                    self._write_rows(cursor, units[start:index])
                    self._operate(connection, unit)
                    start = index + 1
            self._write_rows(cursor, units[start:])
            killpoint("journal.before_commit")

    def _operate(self, connection: Connection, unit: Unit) -> None:
        """Run an operation. It may be run again, if something else in its transaction fails.

        An error of its own (not found, conflict) rolls the transaction back, and each unit is then tried alone. That is
        rarer than every operation's savepoint would be dear (two statements, 0.1 ms).
        """
        assert unit.operation is not None
        if unit.fence < 0 or self._may_write(connection, unit):
            unit.result = unit.operation(connection)

    def _may_write(self, connection: Connection, unit: Unit) -> bool:
        cursor = _cursor(connection)
        if self._store.fences(cursor, (unit.run_id,)).get(unit.run_id) == unit.fence:
            return True
        unit.error = Fenced(unit.run_id)
        return False

    def _write_rows(self, cursor: Any, units: Sequence[Unit]) -> None:
        if not units:
            return
        self._start_runs(cursor, [unit for unit in units if unit.run_row is not None])
        bound = [unit for unit in units if unit.run_row is None]
        if not bound:
            return
        fences = self._store.fences(cursor, {unit.run_id for unit in bound})
        for unit in bound:
            if fences.get(unit.run_id) != unit.fence:
                unit.error = Fenced(unit.run_id)
        steps = [unit.step for unit in bound if unit.step is not None and unit.error is None]
        if steps:
            self._store.insert_steps(cursor, steps)
        endings = [unit.ending for unit in bound if unit.ending is not None and unit.error is None]
        if endings:
            self._store.finish_runs(cursor, endings)

    def _start_runs(self, cursor: Any, units: Sequence[Unit]) -> None:
        if not units:
            return
        taken = self._store.existing(cursor, [unit.run_id for unit in units])
        fresh: list[tuple[Any, ...]] = []
        for unit in units:
            if unit.run_id in taken:
                unit.error = RunConflict(f"Run {unit.run_id} exists already.")
            elif unit.run_row is not None:
                taken.add(unit.run_id)
                fresh.append(unit.run_row)
        if fresh:
            self._store.insert_runs(cursor, fresh)

    # --- connection and lease ---------------------------------------------------------------------------------------

    def _connect(self) -> Connection:
        if self._connection is None:
            self._connection = self._store.writer.connect()
        return self._connection

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()

    def _beat_if_due(self) -> None:
        if self._heartbeat is not None and time.monotonic() - self._last_beat >= self._heartbeat.period:
            self._beat()

    def _beat(self) -> None:
        """Renew the lease. A failure is no error here: if it lasts, the lease runs out and fencing does the rest."""
        self._last_beat = time.monotonic()
        if self._heartbeat is None:
            return
        try:
            connection = self._connect()
            with connection.begin():
                self._heartbeat.beat(connection)
        except Exception:
            self._drop_connection()


def _settle(units: Sequence[Unit]) -> None:
    for unit in units:
        if unit.then is not None and unit.error is None:
            unit.then()
        unit.settled.set()


def _fail(units: Sequence[Unit], error: BaseException) -> None:
    for unit in units:
        unit.error = error


def _cursor(connection: Connection) -> Any:
    return connection.connection.cursor()
