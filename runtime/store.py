"""All statements on the tables, in one readable place, and the database they run on.

Writes take the connection of the journal's transaction and are called from its thread only; reads take a snapshot of
their own. Statements are SQLAlchemy Core on the tables of ``tables.py``; those that run for every step and every model
call are compiled once and handed to the driver as text, because building and binding a Core statement costs more than
executing it (measured: 254 us a row by ORM session, 44 us by Core, 10 us compiled and batched).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import anyio.to_thread
from sqlalchemy import (
    Connection,
    Dialect,
    Row,
    Select,
    Table,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    inspect,
    literal,
    not_,
    or_,
    select,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.expression import UpdateBase
from sqlmodel import SQLModel

from ridethrough.runtime.errors import ConfigError, StoreError, StoreVersionError
from ridethrough.runtime.sqlite import Durability, SQLite
from ridethrough.runtime.tables import (
    FINAL,
    SCHEMA_VERSION,
    AnswerRow,
    AttemptRow,
    BudgetRow,
    DeploymentRow,
    EgressRow,
    EventRow,
    HoldRow,
    IntentRow,
    PayloadRow,
    RunRow,
    SandboxRow,
    SessionRow,
    SignalRow,
    StepRow,
    WaitRow,
    WorkerRow,
)

T = TypeVar("T")
StoredRow = Row[*tuple[Any, ...]]
"""A row as it comes from the database; columns are attributes."""
Record = Mapping[str, Any]


def _table(model: type[SQLModel]) -> Table:
    return model.__table__  # type: ignore[attr-defined, no-any-return]


RUNS, STEPS, INTENTS, WAITS = _table(RunRow), _table(StepRow), _table(IntentRow), _table(WaitRow)
SIGNALS, EVENTS, PAYLOADS = _table(SignalRow), _table(EventRow), _table(PayloadRow)
SESSIONS, WORKERS = _table(SessionRow), _table(WorkerRow)
ATTEMPTS, BUDGETS, HOLDS = _table(AttemptRow), _table(BudgetRow), _table(HoldRow)
ANSWERS, DEPLOYMENTS = _table(AnswerRow), _table(DeploymentRow)
SANDBOXES, EGRESS = _table(SandboxRow), _table(EgressRow)

STEP_COLUMNS = tuple(column.name for column in STEPS.columns)
# A new run has nothing to say of the columns that the database fills.
RUN_COLUMNS = tuple(column.name for column in RUNS.columns if column.server_default is None)
ATTEMPT_COLUMNS = tuple(column.name for column in ATTEMPTS.columns if column.name != "seq")
# Everything but the large texts: lists of runs must not read results.
RUN_BRIEF = tuple(column for column in RUNS.columns if column.name not in ("input", "result"))


class Prepared:
    """A statement that is compiled once and handed to the driver as text, with its parameters by name."""

    def __init__(
        self, statement: UpdateBase | Select[*tuple[Any, ...]], dialect: Dialect, columns: Sequence[str] | None = None
    ) -> None:
        """``columns`` are those that an insert fills."""
        compiled = statement.compile(dialect=dialect, column_keys=columns)
        self.text = str(compiled)
        self._order: Sequence[str] = getattr(compiled, "positiontup", None) or ()
        self._defaults = compiled.params

    def run(self, cursor: DBAPICursor, **values: Any) -> int:
        """Execute it once; the number of rows that it changed."""
        cursor.execute(self.text, self._row(values))
        return cursor.rowcount

    def fetch(self, cursor: DBAPICursor, **values: Any) -> Sequence[Any]:
        """Execute a query; the rows as the driver has them."""
        cursor.execute(self.text, self._row(values))
        return cursor.fetchall()

    def run_many(self, cursor: DBAPICursor, records: Iterable[Record]) -> None:
        """Execute it for each record."""
        cursor.executemany(self.text, [self._row(record) for record in records])

    def _row(self, values: Record) -> tuple[Any, ...]:
        return tuple(values.get(name, self._defaults.get(name)) for name in self._order)


class Store:
    """A database with ridethrough's tables in it."""

    def __init__(self, url: str, durability: Durability = "power") -> None:
        """Choose the database by ``url``; nothing is opened yet.

        Raises:
            ConfigError: the URL cannot be read, or names a database that this version does not support.
        """
        try:
            parsed = make_url(url)
        except ArgumentError as error:
            raise ConfigError(f"database: {url!r} is not a database URL. Use for example sqlite:///runs.db") from error
        if parsed.get_backend_name() != "sqlite":
            raise ConfigError(
                f"database: {parsed.get_backend_name()} is not supported by this version; it keeps runs in SQLite. "
                f"Use sqlite:///PATH."
            )
        self.database = SQLite(parsed, durability)
        self.writer = self.database.engine(write=True)
        self.reader = self.database.engine(write=False)
        self._limiter: anyio.CapacityLimiter | None = None
        dialect = self.database.dialect
        self._insert_step = Prepared(insert(STEPS), dialect).text
        self._insert_run = Prepared(insert(RUNS), dialect, RUN_COLUMNS).text
        self._insert_attempt = Prepared(insert(ATTEMPTS), dialect, ATTEMPT_COLUMNS).text
        self._finish_run = Prepared(_finish_statement(), dialect)
        self._wake_awaiting = Prepared(_wake_statement(), dialect)
        self._open_budget = Prepared(self.database.insert(BUDGETS).on_conflict_do_nothing(), dialect)
        self._set_aside = Prepared(_set_aside_statement(), dialect)
        self._book = Prepared(_book_statement(), dialect)
        self._insert_hold = Prepared(insert(HOLDS), dialect)
        expired = select(HOLDS.c.id, HOLDS.c["keys"], HOLDS.c.amount).where(HOLDS.c.expires_at <= bindparam("b_now"))
        self._expired = Prepared(expired, dialect)
        self._delete_hold = Prepared(delete(HOLDS).where(HOLDS.c.id == bindparam("b_id")), dialect)

    # --- opening ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the tables where there are none, and see that they are of this version.

        Raises:
            StoreError: the database cannot be used.
            StoreVersionError: its schema is older or newer than this code.
        """
        try:
            Path(self.database.path).parent.mkdir(parents=True, exist_ok=True)
            version = self.version()
            if version is None:
                self._create()
                version = self.version()
            self._compare(version)
            self._require_tables()
        except StoreError:
            raise
        except (SQLAlchemyError, OSError) as error:
            raise self.database.translate(error) from error

    def _require_tables(self) -> None:
        with self.reader.connect() as connection:
            missing = {table.name for table in _OWN_TABLES} - set(inspect(connection).get_table_names())
        if missing:
            raise StoreError(
                f"database {self.database.display}: its tables {', '.join(sorted(missing))} are missing. "
                f"Restore a backup, or name another file with --db or `database`."
            )

    def version(self) -> str | None:
        """The schema version that the database says it has; ``None`` for a new one."""
        with self.reader.connect() as connection:
            names = inspect(connection).get_table_names()
            if "alembic_version" not in names:
                if "runs" in names:
                    raise StoreVersionError(f"database {self.database.display}: it has tables of another program.")
                return None
            return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()

    def _create(self) -> None:
        with self.writer.begin() as connection:
            if inspect(connection).has_table("alembic_version"):
                return  # another process was quicker
            SQLModel.metadata.create_all(connection, tables=_OWN_TABLES)
            connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)")
            connection.exec_driver_sql(f"INSERT INTO alembic_version VALUES ('{SCHEMA_VERSION}')")

    def _compare(self, version: str | None) -> None:
        if version == SCHEMA_VERSION:
            return
        where = f"database {self.database.display}: its schema is {version}, this version of ridethrough works with"
        if version is not None and version > SCHEMA_VERSION:
            raise StoreVersionError(f"{where} {SCHEMA_VERSION}. Install the newer ridethrough that wrote it.")
        raise StoreVersionError(f"{where} {SCHEMA_VERSION}. Stop all workers and run `ridethrough db upgrade`.")

    def close(self) -> None:
        """Close all connections."""
        self.reader.dispose()
        self.writer.dispose()

    # --- reading ----------------------------------------------------------------------------------------------------

    def read_now(self, query: Callable[[Connection], T]) -> T:
        """Run ``query`` on a snapshot, in this thread.

        Raises:
            StoreError: the database cannot be read.
        """
        try:
            with self.reader.begin() as connection:
                return query(connection)
        except DBAPIError as error:
            raise self.database.translate(error) from error

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Run ``query`` on a snapshot, in a worker thread."""
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(4)
        return await anyio.to_thread.run_sync(self.read_now, query, limiter=self._limiter)

    # --- the hot path: compiled once, executed with the driver -----------------------------------------------------

    def fences(self, cursor: DBAPICursor, run_ids: Iterable[str]) -> dict[str, int]:
        """The current fence of each run, inside the writing transaction."""
        return self.database.fences(cursor, run_ids)

    def insert_steps(self, cursor: DBAPICursor, rows: Sequence[tuple[Any, ...]]) -> None:
        """Append journal rows (values in the order of ``STEP_COLUMNS``)."""
        cursor.executemany(self._insert_step, rows)

    def insert_runs(self, cursor: DBAPICursor, rows: Sequence[tuple[Any, ...]]) -> None:
        """Insert new runs (values in the order of ``RUN_COLUMNS``)."""
        cursor.executemany(self._insert_run, rows)

    def finish_runs(self, cursor: DBAPICursor, endings: Sequence[Record]) -> None:
        """Give runs their final status."""
        self._finish_run.run_many(cursor, endings)

    # --- runs -------------------------------------------------------------------------------------------------------

    def run(self, connection: Connection, run_id: str) -> StoredRow | None:
        """One run, whole."""
        return connection.execute(select(RUNS).where(RUNS.c.id == run_id)).first()

    def runs(
        self,
        connection: Connection,
        *,
        status: str | None = None,
        workflow: str | None = None,
        parent: str | None = None,
        limit: int | None = 100,
    ) -> Sequence[StoredRow]:
        """Runs, newest first, without their inputs and results."""
        query = select(*RUN_BRIEF).order_by(RUNS.c.created_at.desc(), RUNS.c.id)
        for column, value in ((RUNS.c.status, status), (RUNS.c.workflow, workflow), (RUNS.c.parent_id, parent)):
            if value is not None:
                query = query.where(column == value)
        return connection.execute(query.limit(limit)).all()

    def unfinished(self, connection: Connection) -> Sequence[StoredRow]:
        """Runs that have not ended and are nobody's child, oldest first."""
        open_statuses = ("queued", "running", "paused", "waiting")
        query = select(*RUN_BRIEF).where(RUNS.c.status.in_(open_statuses), RUNS.c.parent_id.is_(None))
        return connection.execute(query.order_by(RUNS.c.created_at, RUNS.c.id)).all()

    def usage(self, connection: Connection, run_ids: Sequence[str]) -> dict[str, StoredRow]:
        """Sums over the model calls of each run: tokens, calls, cost, and calls of unknown price.

        A call that was refused cost nothing, whatever its price.
        """
        unpriced = and_(STEPS.c.status == "done", STEPS.c.cost_usd.is_(None))
        query = (
            select(
                STEPS.c.run_id,
                func.coalesce(func.sum(STEPS.c.input_tokens), 0).label("input_tokens"),
                func.coalesce(func.sum(STEPS.c.output_tokens), 0).label("output_tokens"),
                func.count().label("model_calls"),
                func.coalesce(func.sum(STEPS.c.cost_usd), 0.0).label("cost_usd"),
                func.sum(case((unpriced, 1), else_=0)).label("unpriced_calls"),
            )
            .where(STEPS.c.run_id.in_(run_ids), STEPS.c.kind == "model", STEPS.c.attempts > 0)
            .group_by(STEPS.c.run_id)
        )
        return {row.run_id: row for row in connection.execute(query)}

    def statuses(self, connection: Connection, run_ids: Sequence[str]) -> dict[str, str]:
        """The status of each of the runs."""
        query = select(RUNS.c.id, RUNS.c.status).where(RUNS.c.id.in_(run_ids))
        return {row.id: row.status for row in connection.execute(query)}

    def existing(self, cursor: DBAPICursor, run_ids: Sequence[str]) -> set[str]:
        """Which of the ids are taken."""
        return set(self.database.fences(cursor, run_ids))

    def update_run(self, connection: Connection, run_id: str, **values: Any) -> None:
        """Change columns of one run."""
        connection.execute(update(RUNS).where(RUNS.c.id == run_id).values(**values))

    def wake(self, connection: Connection, run_ids: Sequence[str], now: float) -> None:
        """Let a worker look at these runs if they are parked (not if a person paused them)."""
        parked = or_(RUNS.c.status == "waiting", and_(RUNS.c.status == "paused", RUNS.c.pause_reason != "operator"))
        connection.execute(update(RUNS).where(RUNS.c.id.in_(run_ids), parked).values(wake_at=now))

    def children(self, connection: Connection, run_id: str) -> Sequence[StoredRow]:
        """The unfinished child runs of a run."""
        query = select(*RUN_BRIEF).where(RUNS.c.parent_id == run_id, RUNS.c.status.not_in(FINAL))
        return connection.execute(query).all()

    # --- claiming ---------------------------------------------------------------------------------------------------

    def due(
        self,
        connection: Connection,
        now: float,
        workflows: Mapping[str, str],
        limit: int,
        roots: Sequence[str] | None,
        accepted: Sequence[str],
    ) -> Sequence[StoredRow]:
        """Parked and queued runs whose time has come, the most urgent first; of these ``roots`` only, if given.

        Runs of ``workflows`` (name, version), and those of the ``accepted`` roots whatever their version.
        """
        query = (
            select(RUNS)
            .where(RUNS.c.wake_at <= now, _executable(workflows, roots, accepted))
            .order_by(RUNS.c.priority.desc(), RUNS.c.wake_at, RUNS.c.id)
            .limit(limit)
        )
        return connection.execute(query).all()

    def held_by_none_of(self, connection: Connection, live: Sequence[str]) -> Sequence[StoredRow]:
        """Runs that are held, but by none of these workers; the most urgent and oldest first."""
        query = select(RUNS).where(RUNS.c.worker_id.is_not(None), RUNS.c.worker_id.not_in(live))
        return connection.execute(query.order_by(RUNS.c.priority.desc(), RUNS.c.created_at, RUNS.c.id)).all()

    def last_seq(self, connection: Connection, run_id: str) -> int:
        """The highest position in the run's journal, events included."""
        steps = connection.execute(select(func.max(STEPS.c.seq)).where(STEPS.c.run_id == run_id)).scalar() or 0
        events = connection.execute(select(func.max(EVENTS.c.seq)).where(EVENTS.c.run_id == run_id)).scalar() or 0
        return int(max(steps, events))

    def last_step(self, connection: Connection, run_id: str) -> int:
        """The position of the run's newest step."""
        return int(connection.execute(select(func.max(STEPS.c.seq)).where(STEPS.c.run_id == run_id)).scalar() or 0)

    def next_wake(self, connection: Connection, now: float) -> float | None:
        """The earliest time after ``now`` at which a parked run wants to be looked at.

        What is due and was not claimed is of workflows that this process does not know: to wake for it would be a hot
        loop.
        """
        return connection.execute(select(func.min(RUNS.c.wake_at)).where(RUNS.c.wake_at > now)).scalar()

    def wanted(self, connection: Connection, worker_id: str) -> dict[str, str]:
        """What operators asked of the runs that this worker holds."""
        query = select(RUNS.c.id, RUNS.c.wanted).where(RUNS.c.wanted.is_not(None), RUNS.c.worker_id == worker_id)
        return {row.id: row.wanted for row in connection.execute(query)}

    # --- waiting for models -----------------------------------------------------------------------------------------

    def awaited(self, connection: Connection) -> list[str]:
        """The conditions that parked runs wait for, each once.

        A loose index scan: it costs a look-up a condition, however many runs wait for it.
        """
        first = select(func.min(RUNS.c.awaits).label("awaits")).where(RUNS.c.awaits.is_not(None))
        found = first.cte("found", recursive=True)
        following = select(func.min(RUNS.c.awaits)).where(RUNS.c.awaits > found.c.awaits).scalar_subquery()
        found = found.union_all(select(following).where(found.c.awaits.is_not(None)))
        return list(connection.execute(select(found.c.awaits).where(found.c.awaits.is_not(None))).scalars())

    def count_awaiting(self, connection: Connection, awaits: str) -> int:
        """How many parked runs wait for a condition."""
        query = select(func.count()).select_from(RUNS).where(RUNS.c.awaits == awaits)
        return int(connection.execute(query).scalar_one())

    def wake_awaiting(
        self,
        connection: Connection,
        awaits: str,
        now: float,
        workflows: Mapping[str, str],
        limit: int,
        roots: Sequence[str] | None,
        accepted: Sequence[str],
    ) -> list[str]:
        """Wake the first ``limit`` runs that wait for a condition, and return their ids in that order.

        The most urgent first, then who was tried least, then who has waited longest. Which runs these may be is said
        as to ``due``.
        """
        found: dict[str, tuple[Any, ...]] = {}
        for which in _waiting(awaits, workflows, roots, accepted):
            query = select(RUNS.c.id, RUNS.c.priority, RUNS.c.tried, RUNS.c.parked_at).where(which)
            first = query.order_by(RUNS.c.priority.desc(), RUNS.c.tried, RUNS.c.parked_at).limit(limit)
            found.update((row.id, (-row.priority, row.tried, row.parked_at)) for row in connection.execute(first))
        ids = sorted(found, key=found.__getitem__)[:limit]
        woken = [{"b_id": run_id, "b_awaits": awaits, "wake_at": now} for run_id in ids]
        self._wake_awaiting.run_many(connection.connection.cursor(), woken)
        return ids

    # --- what the router keeps --------------------------------------------------------------------------------------

    def attempts(self, connection: Connection, run_id: str) -> Sequence[StoredRow]:
        """The attempts of a run's model calls, in the order in which they ended."""
        return connection.execute(select(ATTEMPTS).where(ATTEMPTS.c.run_id == run_id).order_by(ATTEMPTS.c.seq)).all()

    def count_failed(self, connection: Connection, run_id: str) -> int:
        """How many attempts of a run have failed since a model answered it last."""
        answered = select(func.max(STEPS.c.ended_at)).where(STEPS.c.run_id == run_id, STEPS.c.kind == "model")
        failed = and_(ATTEMPTS.c.run_id == run_id, ATTEMPTS.c.verdict.not_in(("ok", "hedged", "abandoned")))
        since = ATTEMPTS.c.started_at > func.coalesce(answered.scalar_subquery(), 0.0)
        return int(connection.execute(select(func.count()).select_from(ATTEMPTS).where(failed, since)).scalar_one())

    def insert_attempts(self, cursor: DBAPICursor, rows: Sequence[tuple[Any, ...]]) -> None:
        """Append attempts (values in the order of ``ATTEMPT_COLUMNS``)."""
        cursor.executemany(self._insert_attempt, rows)

    def reserve(self, cursor: DBAPICursor, hold: Record, limits: Sequence[Record]) -> bool:
        """Put ``hold["amount"]`` aside under every key of ``limits`` and write the hold down, or do nothing at all.

        Each of ``limits`` is a budget's row with its ``limit``, the keys all different. What was done when one refuses
        is undone by hand: the transaction holds the work of others too.
        """
        amount: int = hold["amount"]
        for index, budget in enumerate(limits):
            if not self._fits(cursor, budget, amount):
                undo = [{"b_key": done["key"], "b_spent": 0, "b_amount": amount} for done in limits[:index]]
                self._book.run_many(cursor, undo)
                return False
        self._insert_hold.run(cursor, **hold)
        return True

    def _fits(self, cursor: DBAPICursor, budget: Record, amount: int) -> bool:
        values = {"b_key": budget["key"], "b_amount": amount, "b_limit": budget["limit"]}
        if self._set_aside.run(cursor, **values):
            return True
        fresh = self._open_budget.run(cursor, **budget, spent=0, reserved=0)
        return bool(fresh and self._set_aside.run(cursor, **values))

    def settle(self, cursor: DBAPICursor, hold_id: str, keys: Sequence[str], amount: int, spent: int) -> bool:
        """Turn what a hold put aside into what was spent; false if there is no such hold (any more)."""
        if not self._delete_hold.run(cursor, b_id=hold_id):
            return False
        self._book.run_many(cursor, [{"b_key": key, "b_spent": spent, "b_amount": amount} for key in keys])
        return True

    def expire_holds(self, connection: Connection, now: float) -> None:
        """Count what dead processes had put aside as spent: the call may have been billed."""
        cursor = connection.connection.cursor()
        for hold_id, keys, amount in self.expired(connection, now):
            self.settle(cursor, hold_id, json.loads(keys), amount, amount)

    def expired(self, connection: Connection, now: float) -> Sequence[tuple[str, str, int]]:
        """The holds whose time is over: id, keys, amount."""
        return self._expired.fetch(connection.connection.cursor(), b_now=now)

    def budgets(self, connection: Connection, keys: Sequence[str]) -> Sequence[StoredRow]:
        """What is spent and put aside under those of the keys that were ever used."""
        return connection.execute(select(BUDGETS).where(BUDGETS.c.key.in_(keys))).all()

    def answer(self, connection: Connection, key: str) -> StoredRow | None:
        """A kept answer."""
        return connection.execute(select(ANSWERS).where(ANSWERS.c.key == key)).first()

    def keep_answer(self, connection: Connection, row: Record) -> None:
        """Keep an answer, unless a newer one is there."""
        self._upsert(connection, ANSWERS, "key", "kept_at", [row])

    def deployments(self, connection: Connection) -> Sequence[StoredRow]:
        """What is known of each deployment."""
        return connection.execute(select(DEPLOYMENTS).order_by(DEPLOYMENTS.c.deployment)).all()

    def forget_deployments(self, connection: Connection, names: Sequence[str]) -> None:
        """Forget what is known of these: somebody else has their names now."""
        connection.execute(delete(DEPLOYMENTS).where(DEPLOYMENTS.c.deployment.in_(names)))

    def keep_deployments(self, connection: Connection, rows: Sequence[Record]) -> None:
        """Let others see what is known of deployments, unless somebody knows something newer."""
        self._upsert(connection, DEPLOYMENTS, "deployment", "at", rows)

    def _upsert(self, connection: Connection, table: Table, key: str, age: str, rows: Sequence[Record]) -> None:
        statement = self.database.insert(table)
        new = statement.excluded
        others = {column.name: new[column.name] for column in table.columns if column.name != key}
        newer = new[age] >= table.c[age]
        connection.execute(statement.on_conflict_do_update(index_elements=[key], set_=others, where=newer), rows)

    # --- the journal ------------------------------------------------------------------------------------------------

    def journal(self, connection: Connection, run_id: str) -> Sequence[StoredRow]:
        """All that a run needs in memory to go on, in one query (5000 steps: about 20 ms)."""
        columns = (
            STEPS.c.path,
            STEPS.c.kind,
            STEPS.c.name,
            STEPS.c.status,
            STEPS.c.digest,
            STEPS.c.asked,
            STEPS.c.output,
            STEPS.c.output_ref,
            STEPS.c.error,
            STEPS.c.artifact_ref,
            STEPS.c.seq,
            STEPS.c.started_at,
            STEPS.c.ended_at,
        )
        return connection.execute(select(*columns).where(STEPS.c.run_id == run_id).order_by(STEPS.c.seq)).all()

    def steps(self, connection: Connection, run_id: str, after: int = 0) -> Sequence[StoredRow]:
        """The steps of a run with a position above ``after``, in order."""
        query = select(STEPS).where(STEPS.c.run_id == run_id, STEPS.c.seq > after).order_by(STEPS.c.seq)
        return connection.execute(query).all()

    def step(self, connection: Connection, run_id: str, path: str) -> StoredRow | None:
        """One step by its path."""
        return connection.execute(select(STEPS).where(STEPS.c.run_id == run_id, STEPS.c.path == path)).first()

    def intents(self, connection: Connection, run_id: str) -> Sequence[StoredRow]:
        """The intents of a run, oldest attempt first."""
        return connection.execute(select(INTENTS).where(INTENTS.c.run_id == run_id).order_by(INTENTS.c.attempt)).all()

    def insert_intent(self, connection: Connection, row: Record) -> None:
        """Write down that a call is about to start. Unique: nobody can write the same attempt twice."""
        connection.execute(insert(INTENTS), row)

    def events(self, connection: Connection, run_id: str, after: int = 0) -> Sequence[StoredRow]:
        """The kept events of a run that are not steps."""
        query = select(EVENTS).where(EVENTS.c.run_id == run_id, EVENTS.c.seq > after).order_by(EVENTS.c.seq)
        return connection.execute(query).all()

    def insert_event(self, connection: Connection, row: Record) -> None:
        """Keep an event."""
        connection.execute(insert(EVENTS), row)

    # --- waits and signals ------------------------------------------------------------------------------------------

    def waits(self, connection: Connection, run_ids: Sequence[str]) -> Sequence[StoredRow]:
        """What the runs are blocked on."""
        return connection.execute(select(WAITS).where(WAITS.c.run_id.in_(run_ids)).order_by(WAITS.c.since)).all()

    def insert_wait(self, connection: Connection, row: Record) -> None:
        """Put a wait on record; the first record of a wait stands (its time began then)."""
        connection.execute(self.database.insert(WAITS).values(dict(row)).on_conflict_do_nothing())

    def update_wait(self, connection: Connection, run_id: str, path: str, **values: Any) -> None:
        """Move the deadline of a wait."""
        connection.execute(update(WAITS).where(WAITS.c.run_id == run_id, WAITS.c.path == path).values(**values))

    def delete_waits(self, connection: Connection, run_id: str, path: str | None = None) -> None:
        """Forget one wait, or all waits of a run."""
        where = WAITS.c.run_id == run_id
        connection.execute(delete(WAITS).where(where if path is None else and_(where, WAITS.c.path == path)))

    def insert_signal(self, connection: Connection, run_id: str, name: str, value: str, at: float) -> None:
        """Keep input from outside until a step takes it."""
        connection.execute(insert(SIGNALS), {"run_id": run_id, "name": name, "value": value, "at": at})

    def first_signal(self, connection: Connection, run_id: str, name: str) -> StoredRow | None:
        """The oldest signal of that name that no step has taken."""
        query = select(SIGNALS).where(SIGNALS.c.run_id == run_id, SIGNALS.c.name == name, SIGNALS.c.taken_by.is_(None))
        return connection.execute(query.order_by(SIGNALS.c.id).limit(1)).first()

    def take_signal(self, connection: Connection, signal_id: int, path: str) -> None:
        """Give a signal to a step."""
        connection.execute(update(SIGNALS).where(SIGNALS.c.id == signal_id).values(taken_by=path))

    def open_signals(self, connection: Connection, run_ids: Sequence[str]) -> set[tuple[str, str]]:
        """Names of signals that are there and not taken, for each run."""
        query = select(SIGNALS.c.run_id, SIGNALS.c.name).where(
            SIGNALS.c.run_id.in_(run_ids), SIGNALS.c.taken_by.is_(None)
        )
        return {(row.run_id, row.name) for row in connection.execute(query)}

    # --- payloads and sessions --------------------------------------------------------------------------------------

    def insert_payload(self, connection: Connection, digest: str, data: bytes, now: float) -> None:
        """Store a large value once."""
        row = {"hash": digest, "data": data, "created_at": now}
        connection.execute(self.database.insert(PAYLOADS).values(row).on_conflict_do_nothing())

    def payload(self, connection: Connection, digest: str) -> bytes | None:
        """A large value by its digest."""
        return connection.execute(select(PAYLOADS.c.data).where(PAYLOADS.c.hash == digest)).scalar()

    def session(self, connection: Connection, name: str, after: int, upto: int) -> Sequence[StoredRow]:
        """The messages of a session between two positions, in order."""
        query = select(SESSIONS).where(SESSIONS.c.session == name, SESSIONS.c.position.between(after + 1, upto))
        return connection.execute(query.order_by(SESSIONS.c.position)).all()

    def session_length(self, connection: Connection, name: str) -> int:
        """The position of a session's last message; 0 for a new one."""
        return int(
            connection.execute(select(func.max(SESSIONS.c.position)).where(SESSIONS.c.session == name)).scalar() or 0
        )

    def append_session(self, connection: Connection, name: str, run_id: str, path: str, messages: Sequence[str]) -> int:
        """Add the messages of one agent run to a session, once; the position of the last one."""
        last = self.session_length(connection, name)
        rows = [
            {"session": name, "position": last + index, "message": message, "run_id": run_id, "path": path}
            for index, message in enumerate(messages, 1)
        ]
        if rows:
            connection.execute(insert(SESSIONS), rows)
        return last + len(rows)

    # --- workers ----------------------------------------------------------------------------------------------------

    def workers(self, connection: Connection) -> Sequence[StoredRow]:
        """All worker rows."""
        return connection.execute(select(WORKERS)).all()

    def insert_worker(self, connection: Connection, row: Record) -> None:
        """Register a worker."""
        connection.execute(insert(WORKERS), row)

    def renew_worker(self, connection: Connection, worker_id: str, expires_at: float) -> bool:
        """Renew a lease; false if somebody has declared the worker dead."""
        statement = update(WORKERS).where(WORKERS.c.id == worker_id).values(expires_at=expires_at)
        return bool(connection.execute(statement).rowcount)

    def delete_worker(self, connection: Connection, worker_id: str) -> None:
        """Take a worker off the list."""
        connection.execute(delete(WORKERS).where(WORKERS.c.id == worker_id))

    def give_back(self, connection: Connection, worker_id: str, now: float) -> None:
        """Let others take what this worker still holds."""
        held = update(RUNS).where(RUNS.c.worker_id == worker_id)
        connection.execute(held.values(status="queued", worker_id=None, wake_at=now))

    # --- sandboxes --------------------------------------------------------------------------------------------------

    def insert_sandbox(self, connection: Connection, row: Record) -> None:
        """Put a sandbox on record, before it is created."""
        connection.execute(insert(SANDBOXES), dict(row))

    def update_sandbox(self, connection: Connection, sandbox_id: str, generation: int, **values: Any) -> bool:
        """Change a sandbox's row while it is of that generation; whether it was."""
        held = and_(SANDBOXES.c.id == sandbox_id, SANDBOXES.c.generation == generation)
        return bool(connection.execute(update(SANDBOXES).where(held).values(**values)).rowcount)

    def claim_sandbox(self, connection: Connection, sandbox_id: str, generation: int, **values: Any) -> bool:
        """Let a sandbox change hands, unless somebody was quicker: its generation is another one then."""
        held = and_(SANDBOXES.c.id == sandbox_id, SANDBOXES.c.generation == generation)
        statement = update(SANDBOXES).where(held).values(**values, generation=generation + 1)
        return bool(connection.execute(statement).rowcount)

    def sandbox(self, connection: Connection, sandbox_id: str) -> StoredRow | None:
        """One sandbox."""
        return connection.execute(select(SANDBOXES).where(SANDBOXES.c.id == sandbox_id)).first()

    def sandboxes(self, connection: Connection, *, live: bool = True) -> Sequence[StoredRow]:
        """All sandboxes, oldest first; those that are gone too unless ``live``."""
        query = select(SANDBOXES).order_by(SANDBOXES.c.created_at)
        return connection.execute(query.where(SANDBOXES.c.live) if live else query).all()

    def sandbox_of(self, connection: Connection, run_id: str, key: str) -> StoredRow | None:
        """The newest sandbox of a run under ``key``, whatever has become of it."""
        mine = and_(SANDBOXES.c.run_id == run_id, SANDBOXES.c.key == key)
        return connection.execute(select(SANDBOXES).where(mine).order_by(SANDBOXES.c.created_at.desc())).first()

    def sandboxes_of(self, connection: Connection, run_id: str) -> Sequence[StoredRow]:
        """The sandboxes that a run has had, in order."""
        query = select(SANDBOXES).where(SANDBOXES.c.run_id == run_id)
        return connection.execute(query.order_by(SANDBOXES.c.created_at)).all()

    def renew_sandboxes(self, connection: Connection, ids: Sequence[str], worker_id: str, expires_at: float) -> None:
        """Say that a worker still has these."""
        held = and_(SANDBOXES.c.id.in_(ids), SANDBOXES.c.worker_id == worker_id)
        connection.execute(update(SANDBOXES).where(held).values(expires_at=expires_at))

    def ownerless_sandboxes(self, connection: Connection, host: str, now: float) -> Sequence[StoredRow]:
        """What lives on ``host`` and perhaps nobody wants: its run has ended or is gone, or nobody renewed it in time.

        ``run_status`` and ``run_error`` are those of its run.
        """
        ended = and_(SANDBOXES.c.run_id.is_not(None), or_(RUNS.c.id.is_(None), RUNS.c.status.in_(FINAL)))
        query = (
            select(SANDBOXES, RUNS.c.status.label("run_status"), RUNS.c.error.label("run_error"))
            .outerjoin(RUNS, RUNS.c.id == SANDBOXES.c.run_id)
            .where(SANDBOXES.c.live, SANDBOXES.c.host == host)
            .where(or_(ended, SANDBOXES.c.expires_at < now))
        )
        return connection.execute(query).all()

    def forget_sandbox(self, connection: Connection, sandbox_id: str, detail: str) -> None:
        """It is gone: one of a run stays on record, one that was only kept ready does not."""
        mine = SANDBOXES.c.id == sandbox_id
        connection.execute(delete(SANDBOXES).where(mine, SANDBOXES.c.run_id.is_(None)))
        connection.execute(update(SANDBOXES).where(mine).values(status="removed", live=False, detail=detail))

    def insert_egress(self, connection: Connection, rows: Sequence[Record]) -> None:
        """Record what sandboxes asked of their proxy."""
        connection.execute(insert(EGRESS), [dict(row) for row in rows])

    def egress(self, connection: Connection, run_id: str) -> Sequence[StoredRow]:
        """What the sandboxes of a run asked of their proxy, in order."""
        return connection.execute(select(EGRESS).where(EGRESS.c.run_id == run_id).order_by(EGRESS.c.seq)).all()

    # --- fork and retention -----------------------------------------------------------------------------------------

    def copy_journal(self, connection: Connection, source: str, target: str, before: int) -> None:
        """Give ``target`` the steps of ``source`` with a position below ``before``.

        They were paid for there: in the copy they have no cost, no tokens and no attempts.
        """
        columns = [column.name for column in STEPS.columns]
        fresh = {"run_id": target, "attempts": 0, "cost_usd": 0.0, "input_tokens": 0, "output_tokens": 0}
        values = [literal(fresh[name]).label(name) if name in fresh else STEPS.c[name] for name in columns]
        query = select(*values).where(STEPS.c.run_id == source, STEPS.c.seq < before)
        connection.execute(insert(STEPS).from_select(columns, query))

    def finished_before(self, connection: Connection, when: float, limit: int) -> list[str]:
        """Ended runs that nothing has touched since ``when``; children only once their parent has ended."""
        parent = RUNS.alias("parent")
        query = (
            select(RUNS.c.id)
            .outerjoin(parent, RUNS.c.parent_id == parent.c.id)
            .where(RUNS.c.status.in_(FINAL), RUNS.c.finished_at < when)
            .where(or_(parent.c.id.is_(None), parent.c.status.in_(FINAL)))
            .limit(limit)
        )
        return [row.id for row in connection.execute(query)]

    def delete_runs(self, connection: Connection, run_ids: Sequence[str]) -> None:
        """Delete runs with all that belongs to them."""
        for table in (STEPS, INTENTS, WAITS, SIGNALS, EVENTS, ATTEMPTS, BUDGETS, EGRESS):
            connection.execute(delete(table).where(table.c.run_id.in_(run_ids)))
        # A sandbox that the host may still have stays on record: the reaper goes by it.
        connection.execute(delete(SANDBOXES).where(SANDBOXES.c.run_id.in_(run_ids), not_(SANDBOXES.c.live)))
        connection.execute(delete(RUNS).where(RUNS.c.id.in_(run_ids)))

    def delete_router_rows(self, connection: Connection, before: float) -> None:
        """Delete what the router kept and nobody can ask for any more.

        That is budgets of windows that ended, answers, what is known of deployments that nothing was heard of since,
        attempts outside of runs, and those that were written when their run was deleted already.
        """
        gone = ATTEMPTS.c.run_id.is_not(None) & ATTEMPTS.c.run_id.not_in(select(RUNS.c.id))
        for table, outdated in (
            (BUDGETS, BUDGETS.c.resets_at < before),
            (ANSWERS, ANSWERS.c.kept_at < before),
            (DEPLOYMENTS, DEPLOYMENTS.c.at < before),
            (EGRESS, and_(EGRESS.c.run_id.is_(None), EGRESS.c.at < before)),
            (ATTEMPTS, or_(and_(ATTEMPTS.c.run_id.is_(None), ATTEMPTS.c.started_at < before), gone)),
        ):
            connection.execute(delete(table).where(outdated))

    def delete_orphan_payloads(self, connection: Connection, before: float) -> int:
        """Delete large values that no run or step refers to any more."""
        used = (
            select(STEPS.c.output_ref)
            .where(STEPS.c.output_ref.is_not(None))
            .union(
                select(STEPS.c.artifact_ref).where(STEPS.c.artifact_ref.is_not(None)),
                select(RUNS.c.input_ref).where(RUNS.c.input_ref.is_not(None)),
                select(RUNS.c.result_ref).where(RUNS.c.result_ref.is_not(None)),
                select(SANDBOXES.c.archive_ref).where(SANDBOXES.c.archive_ref.is_not(None)),
            )
        )
        statement = delete(PAYLOADS).where(PAYLOADS.c.hash.not_in(used), PAYLOADS.c.created_at < before)
        return int(connection.execute(statement).rowcount)

    def dangling(self, connection: Connection) -> list[str]:
        """Contradictions between the tables that no crash may leave behind."""
        return [
            *self._missing_payloads(connection),
            *self._rows_without_run(connection),
            *self._final_runs_with_waits(connection),
        ]

    def _missing_payloads(self, connection: Connection) -> list[str]:
        known = select(PAYLOADS.c.hash)
        query = select(STEPS.c.run_id, STEPS.c.path).where(
            or_(
                and_(STEPS.c.output_ref.is_not(None), STEPS.c.output_ref.not_in(known)),
                and_(STEPS.c.artifact_ref.is_not(None), STEPS.c.artifact_ref.not_in(known)),
            )
        )
        return [
            f"run {row.run_id}: the stored value of step {row.path} is missing" for row in connection.execute(query)
        ]

    def _rows_without_run(self, connection: Connection) -> list[str]:
        found = []
        for table in (STEPS, INTENTS, WAITS, EVENTS):
            query = select(table.c.run_id).where(table.c.run_id.not_in(select(RUNS.c.id))).distinct()
            found += [
                f"{table.name}: rows of run {row.run_id}, which does not exist" for row in connection.execute(query)
            ]
        return found

    def _final_runs_with_waits(self, connection: Connection) -> list[str]:
        query = select(RUNS.c.id).where(RUNS.c.status.in_(FINAL), RUNS.c.worker_id.is_not(None))
        return [f"run {row.id}: it has ended but is still held by a worker" for row in connection.execute(query)]


_OWN_TABLES = [
    *(RUNS, STEPS, INTENTS, WAITS, SIGNALS, EVENTS, PAYLOADS, SESSIONS, WORKERS),
    *(ATTEMPTS, BUDGETS, HOLDS, ANSWERS, DEPLOYMENTS),
    *(SANDBOXES, EGRESS),
]


def _executable(
    workflows: Mapping[str, str], roots: Sequence[str] | None, accepted: Sequence[str]
) -> ColumnElement[bool]:
    """Runs of ``workflows`` (name, version), and those of ``accepted`` roots; of ``roots`` only, if given."""
    known = [and_(RUNS.c.workflow == name, RUNS.c.version == version) for name, version in workflows.items()]
    executable = or_(*known, RUNS.c.root_id.in_(accepted))
    return executable if roots is None else and_(executable, RUNS.c.root_id.in_(roots))


def _waiting(
    awaits: str, workflows: Mapping[str, str], roots: Sequence[str] | None, accepted: Sequence[str]
) -> Iterator[ColumnElement[bool]]:
    """What is executable of the runs that wait for a condition, in parts of which each has an index that answers it.

    In one query the database would walk through all that wait, a million runs of others perhaps, to find a few.
    """
    chosen = accepted if roots is None else roots
    if chosen:
        few = RUNS.c.awaits.concat("") == awaits  # not a column any more: the index on the roots is to be used
        yield and_(RUNS.c.root_id.in_(chosen), few, _executable(workflows, roots, accepted))
    if roots is None:
        for name, version in workflows.items():
            yield and_(RUNS.c.awaits == awaits, RUNS.c.workflow == name, RUNS.c.version == version)


# --- statements that are prepared -----------------------------------------------------------------------------------


def _finish_statement() -> UpdateBase:
    return (
        update(RUNS)
        .where(RUNS.c.id == bindparam("b_id"))
        .values(
            status=bindparam("b_status"),
            result=bindparam("b_result"),
            result_ref=bindparam("b_ref"),
            error=bindparam("b_error"),
            finished_at=bindparam("b_at"),
            worker_id=None,
            wake_at=None,
            wanted=None,
            pause_reason=None,
            pause_until=None,
            parked_at=None,
            awaits=None,
        )
    )


def _wake_statement() -> UpdateBase:
    waits = and_(RUNS.c.id == bindparam("b_id"), RUNS.c.awaits == bindparam("b_awaits"))
    return update(RUNS).where(waits).values(wake_at=bindparam("wake_at"), awaits=None, pause_until=None)


def _set_aside_statement() -> UpdateBase:
    """What is there and what is asked for must fit together; looked at and changed in one statement."""
    amount: ColumnElement[int] = bindparam("b_amount", type_=BUDGETS.c.spent.type)
    fits = BUDGETS.c.spent + BUDGETS.c.reserved + amount <= bindparam("b_limit")
    return update(BUDGETS).where(BUDGETS.c.key == bindparam("b_key"), fits).values(reserved=BUDGETS.c.reserved + amount)


def _book_statement() -> UpdateBase:
    spent: ColumnElement[int] = bindparam("b_spent", type_=BUDGETS.c.spent.type)
    amount: ColumnElement[int] = bindparam("b_amount", type_=BUDGETS.c.spent.type)
    changes = {"spent": BUDGETS.c.spent + spent, "reserved": BUDGETS.c.reserved - amount}
    return update(BUDGETS).where(BUDGETS.c.key == bindparam("b_key")).values(changes)
