"""The tables: what survives.

``runs`` has one row a run and is the only table whose rows change often. ``steps`` is the journal: append-only, one
row a finished step. ``intents`` says that a tool with side effects was about to start. ``waits`` says what a run is
blocked on. ``events`` keeps what happened to a run that is not a step. Large values lie once in ``payloads``, by
content. The router's are ``attempts`` (append-only, for ``show`` and the metrics), ``budgets`` and ``holds`` (money),
``answers`` (the exact-match cache) and ``deployments`` (what any worker knows of them). ``sandboxes`` says who owns
which sandbox on which host, ``egress`` what was asked of their proxy. Times are seconds since the
epoch (UTC) as floats, money is whole nano-dollars (1e-9 USD: sums are exact), payload columns hold JSON text.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, Text, text
from sqlmodel import Field, SQLModel

SCHEMA_VERSION = "0003"
"""The Alembic revision that these tables correspond to."""

FINAL = ("done", "failed", "cancelled")
"""The statuses that a run never leaves by itself."""


class RunRow(SQLModel, table=True):
    """One execution of a workflow. See ``docs/concepts/runs.md`` for the state machine of ``status``."""

    __tablename__: ClassVar[Any] = "runs"
    __table_args__ = (
        # The only question a worker asks often: whose time has come? Parked runs without a time are not in the index.
        Index(
            "ix_runs_wake",
            "wake_at",
            sqlite_where=text("wake_at IS NOT NULL"),
            postgresql_where=text("wake_at IS NOT NULL"),
        ),
        Index(
            "ix_runs_worker",
            "worker_id",
            sqlite_where=text("worker_id IS NOT NULL"),
            postgresql_where=text("worker_id IS NOT NULL"),
        ),
        Index(
            "ix_runs_wanted",
            "wanted",
            sqlite_where=text("wanted IS NOT NULL"),
            postgresql_where=text("wanted IS NOT NULL"),
        ),
        Index(
            "ix_runs_parent",
            "parent_id",
            sqlite_where=text("parent_id IS NOT NULL"),
            postgresql_where=text("parent_id IS NOT NULL"),
        ),
        # Who is to be woken first when a model is back: found without looking at the others that wait for it, nor at
        # those of workflows that the asking process does not know.
        Index(
            "ix_runs_awaits",
            "awaits",
            "workflow",
            "version",
            text("priority DESC"),
            "tried",
            "parked_at",
            sqlite_where=text("awaits IS NOT NULL"),
            postgresql_where=text("awaits IS NOT NULL"),
        ),
        Index("ix_runs_root", "root_id"),
        Index("ix_runs_status", "status", "created_at"),
        Index("ix_runs_created", "created_at"),
    )

    id: str = Field(primary_key=True)
    workflow: str
    version: str
    status: str
    input: str | None = Field(default=None, sa_column=Column(Text))
    input_ref: str | None = None
    input_digest: str = ""
    source: str | None = None
    """Where the workflow comes from: ``module:NAME`` or ``/path/file.py:NAME``."""
    cwd: str | None = None
    tenant: str | None = None
    priority: int = 0
    labels: str | None = Field(default=None, sa_column=Column(Text))
    root_id: str
    """The run that nobody's workflow started: its own id, or that of the outermost parent."""
    parent_id: str | None = None
    parent_path: str | None = None
    forked_from: str | None = None
    worker_id: str | None = None
    fence: int = 0
    """Rises with each claim; a write with an old fence is refused."""
    wake_at: float | None = None
    """When a worker should take the run up; NULL while it runs, and while only an event can wake it."""
    wanted: str | None = None
    """What an operator asked of the process that holds the run: ``cancel`` or ``pause``."""
    pause_reason: str | None = None
    pause_until: float | None = None
    parked_at: float | None = None
    recoveries: int = 0
    strikes: int = 0
    """Deaths of the worker since the last new step; at the limit the run is poisoned."""
    strike_seq: int = 0
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    result: str | None = Field(default=None, sa_column=Column(Text))
    result_ref: str | None = None
    error: str | None = Field(default=None, sa_column=Column(Text))
    awaits: str | None = Field(default=None, sa_column=Column(Text))
    """The condition that wakes a run parked for models; NULL when it is not, or has been woken."""
    tried: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default=text("0")))
    """Model calls that failed since the last one that was answered: who tried least is woken first."""


class StepRow(SQLModel, table=True):
    """A finished step. Never updated."""

    __tablename__: ClassVar[Any] = "steps"
    __table_args__ = (Index("ux_steps_path", "run_id", "path", unique=True),)

    run_id: str = Field(primary_key=True)
    seq: int = Field(primary_key=True, sa_column_kwargs={"autoincrement": False})
    path: str
    name: str
    kind: str
    status: str
    digest: str
    asked: str | None = Field(default=None, sa_column=Column(Text))
    output: str | None = Field(default=None, sa_column=Column(Text))
    output_ref: str | None = None
    artifact_ref: str | None = None
    error: str | None = Field(default=None, sa_column=Column(Text))
    attempts: int = 1
    started_at: float
    ended_at: float
    agent: str | None = None
    model: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None


class IntentRow(SQLModel, table=True):
    """A call with side effects that was about to start: on disk before it does."""

    __tablename__: ClassVar[Any] = "intents"

    run_id: str = Field(primary_key=True)
    path: str = Field(primary_key=True)
    attempt: int = Field(primary_key=True, sa_column_kwargs={"autoincrement": False})
    name: str
    digest: str
    started_at: float
    sandbox: str | None = None
    """The sandbox in which it happens, if it does so entirely: that one knows what became of it."""


class WaitRow(SQLModel, table=True):
    """What one branch of a run is blocked on, since when, and until when."""

    __tablename__: ClassVar[Any] = "waits"

    run_id: str = Field(primary_key=True)
    path: str = Field(primary_key=True)
    kind: str
    """``timer``, ``signal``, ``question``, ``approval``, ``interrupted``, ``child`` or ``model``."""
    name: str
    since: float
    due_at: float | None = None
    question: str | None = Field(default=None, sa_column=Column(Text))
    arguments: str | None = Field(default=None, sa_column=Column(Text))
    value_schema: str | None = Field(default=None, sa_column=Column(Text))


class SignalRow(SQLModel, table=True):
    """Input from outside. The first one of a name goes to the first step that waits for it."""

    __tablename__: ClassVar[Any] = "signals"
    __table_args__ = (
        Index(
            "ix_signals_open",
            "run_id",
            "name",
            sqlite_where=text("taken_by IS NULL"),
            postgresql_where=text("taken_by IS NULL"),
        ),
    )

    id: int | None = Field(default=None, primary_key=True)
    run_id: str
    name: str
    value: str = Field(sa_column=Column(Text, nullable=False))
    at: float
    taken_by: str | None = None


class EventRow(SQLModel, table=True):
    """What happened to a run and is not a step: recoveries, pauses, questions, handoffs."""

    __tablename__: ClassVar[Any] = "events"

    run_id: str = Field(primary_key=True)
    seq: int = Field(primary_key=True, sa_column_kwargs={"autoincrement": False})
    type: str
    at: float
    path: str = ""
    data: str = Field(sa_column=Column(Text, nullable=False))


class PayloadRow(SQLModel, table=True):
    """A large value, stored once by the BLAKE2b digest of its UTF-8 bytes."""

    __tablename__: ClassVar[Any] = "payloads"

    hash: str = Field(primary_key=True)
    data: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    created_at: float


class SessionRow(SQLModel, table=True):
    """One message of a conversation that outlives its runs."""

    __tablename__: ClassVar[Any] = "session_messages"

    session: str = Field(primary_key=True)
    position: int = Field(primary_key=True, sa_column_kwargs={"autoincrement": False})
    message: str = Field(sa_column=Column(Text, nullable=False))
    run_id: str
    path: str


class WorkerRow(SQLModel, table=True):
    """A process that holds runs. It renews one row, whatever the number of its runs."""

    __tablename__: ClassVar[Any] = "workers"

    id: str = Field(primary_key=True)
    host: str
    """The machine, and its boot and process namespace: only there can ``pid`` be looked at."""
    pid: int
    pid_started: str
    started_at: float
    expires_at: float


class AttemptRow(SQLModel, table=True):
    """One try of one deployment: the columns are the fields of the router's ``AttemptRecord``."""

    __tablename__: ClassVar[Any] = "attempts"
    __table_args__ = (
        Index("ix_attempts_run", "run_id"),
        # What no run takes along when it is deleted: pings, and calls of a router on its own.
        Index(
            "ix_attempts_loose",
            "started_at",
            sqlite_where=text("run_id IS NULL"),
            postgresql_where=text("run_id IS NULL"),
        ),
    )

    seq: int | None = Field(default=None, primary_key=True)
    id: str
    route: str
    deployment: str
    provider: str
    model: str
    started_at: float
    seconds: float
    verdict: str
    phase: str
    status: int | None = None
    code: str | None = None
    request_id: str | None = None
    number: int
    queue_seconds: float
    first_token_seconds: float | None = None
    tokens_per_second: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    hedged: bool
    wasted: bool
    detail: str = Field(sa_column=Column(Text, nullable=False))
    run_id: str | None = None
    path: str
    tenant: str | None = None
    workflow: str | None = None
    agent: str | None = None


class BudgetRow(SQLModel, table=True):
    """The money of one scope in one window: what is spent, and what is put aside for calls under way."""

    __tablename__: ClassVar[Any] = "budgets"
    __table_args__ = (
        Index(
            "ix_budgets_run",
            "run_id",
            sqlite_where=text("run_id IS NOT NULL"),
            postgresql_where=text("run_id IS NOT NULL"),
        ),
    )

    key: str = Field(primary_key=True)
    spent: int = Field(sa_column=Column(BigInteger, nullable=False))
    reserved: int = Field(sa_column=Column(BigInteger, nullable=False))
    resets_at: float | None = None
    """When the window ends; NULL for a run's, which goes with its run."""
    run_id: str | None = None


class HoldRow(SQLModel, table=True):
    """What is put aside for one attempt, under each of ``keys`` (JSON); past ``expires_at`` it counts as spent."""

    __tablename__: ClassVar[Any] = "holds"
    __table_args__ = (Index("ix_holds_expires", "expires_at"),)

    id: str = Field(primary_key=True)
    keys: str = Field(sa_column=Column(Text, nullable=False))
    amount: int = Field(sa_column=Column(BigInteger, nullable=False))
    expires_at: float


class AnswerRow(SQLModel, table=True):
    """A model's answer, kept for equal requests."""

    __tablename__: ClassVar[Any] = "answers"
    __table_args__ = (Index("ix_answers_kept", "kept_at"),)

    key: str = Field(primary_key=True)
    response: str = Field(sa_column=Column(Text, nullable=False))
    kept_at: float


class DeploymentRow(SQLModel, table=True):
    """What is known of a deployment, by whoever knew it last: ``state`` is the router's, as JSON."""

    __tablename__: ClassVar[Any] = "deployments"

    deployment: str = Field(primary_key=True)
    state: str = Field(sa_column=Column(Text, nullable=False))
    at: float
    worker: str


class SandboxRow(SQLModel, table=True):
    """A sandbox, from before it is created until its run is deleted: who owns it, and until when without word."""

    __tablename__: ClassVar[Any] = "sandboxes"
    __table_args__ = (
        Index(
            "ix_sandboxes_run",
            "run_id",
            sqlite_where=text("run_id IS NOT NULL"),
            postgresql_where=text("run_id IS NOT NULL"),
        ),
        Index("ix_sandboxes_host", "host", sqlite_where=text("live = 1"), postgresql_where=text("live")),
    )

    id: str = Field(primary_key=True)
    run_id: str | None = None
    """The run that it belongs to; NULL while it is kept ready for whoever comes."""
    key: str = ""
    """Which of the run's sandboxes it is: the profile's name, and for one of a single call the call's id."""
    profile: str
    spec: str | None = Field(default=None, sa_column=Column(Text))
    """What it was made from, without what may be secret: JSON."""
    host: str
    """Where it lives: only a worker there can attach to it."""
    worker_id: str
    status: str
    """``starting``, ``running``, ``freezing``, ``paused``, ``archiving``, ``archived`` (only the archive is left),
    ``lost`` (and nobody has been told) or ``removed``."""
    generation: int = 0
    """Rises each time that it changes hands; who holds an old one writes nothing."""
    live: bool
    """Whether the host has, or may have, anything of it."""
    runtime: str = ""
    proof: str | None = Field(default=None, sa_column=Column(Text))
    """What was tried to see that the runtime enforces the limits, and what came of it: JSON."""
    created_at: float
    expires_at: float
    """When it is ownerless, unless its worker says otherwise before."""
    archive_ref: str | None = None
    """The payload that holds the workspace, as it was when it was archived."""
    detail: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=text("''")))
    """Why it was removed."""


class EgressRow(SQLModel, table=True):
    """A connection that a sandbox asked its proxy for, and what became of it. Sizes in bytes."""

    __tablename__: ClassVar[Any] = "egress"
    __table_args__ = (Index("ix_egress_run", "run_id"), Index("ix_egress_at", "at"))

    seq: int | None = Field(default=None, primary_key=True)
    sandbox_id: str
    run_id: str | None = None
    at: float
    method: str
    host: str
    port: int
    allowed: bool
    reason: str
    bytes_in: int = Field(sa_column=Column(BigInteger, nullable=False))
    bytes_out: int = Field(sa_column=Column(BigInteger, nullable=False))
    status: int | None = None
