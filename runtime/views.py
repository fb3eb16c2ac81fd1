"""What users and programs see of runs: the JSON of ``runs``, ``show`` and the HTTP API."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection

from ridethrough.runtime import control, lease, payload
from ridethrough.runtime.config import Config, Model, is_direct
from ridethrough.runtime.ledger import state_of
from ridethrough.runtime.router.ledger import DeploymentState
from ridethrough.runtime.store import Store, StoredRow
from ridethrough.runtime.tables import FINAL

PARKED = ("paused", "waiting")
"""The statuses of a run that is in nobody's memory and waits for something."""

BY_HAND = ("operator", "quota", "budget", "configuration")
"""Why runs are paused that a person has to do something about: money comes back by itself at times, but who waits
should not count on it."""


class Fields:
    """Attribute access to a mapping, where a row of the database is expected; what is missing is ``None``."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Wrap ``values``."""
        self._values = values

    def __getattr__(self, name: str) -> Any:
        """The value, or ``None``."""
        return self._values.get(name)


class Pause(BaseModel):
    """Why a run is parked, and until when at the latest."""

    reason: str
    until: datetime | None = None
    since: datetime | None = None


class ErrorView(BaseModel):
    """How a run or step failed."""

    type: str
    message: str


class UsageView(BaseModel):
    """What a run's model calls consumed."""

    input_tokens: int = 0
    output_tokens: int = 0
    model_calls: int = 0
    unpriced_calls: int = 0
    """Those whose price is not known: ``cost_usd`` is without them."""


class StepView(BaseModel):
    """A step of a run; ``running`` if only its intent is on disk."""

    path: str
    name: str
    kind: str
    status: str
    attempts: int
    started_at: datetime
    ended_at: datetime | None
    model: str | None = None
    cost_usd: float | None = None
    agent: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input: str | None = None
    """The beginning of the step's input."""
    output: Any = None
    error: ErrorView | None = None


class AttemptView(BaseModel):
    """One try of one deployment. Durations are in seconds, ``cost_usd`` is ``None`` when no price is known.

    ``path`` is the step that asked. ``verdict`` is ``ok``, an error's class, ``hedged`` (another one was quicker) or
    ``abandoned``; ``phase`` says how far a failed one came; ``wasted`` that nobody used what it answered.
    """

    path: str
    number: int
    route: str
    deployment: str
    provider: str
    model: str
    agent: str | None
    started_at: datetime
    seconds: float
    verdict: str
    phase: str
    status: int | None
    code: str | None
    request_id: str | None
    queue_seconds: float
    first_token_seconds: float | None
    tokens_per_second: float | None
    input_tokens: int | None
    output_tokens: int | None
    cost_usd: float | None
    hedged: bool
    wasted: bool
    detail: str


class SandboxView(BaseModel):
    """A sandbox of a run. ``key`` is its profile's name, for one of a single call with the call's id after it.

    ``status`` is ``running``, ``paused``, ``archived`` or ``removed``, ``detail`` why it is. ``proof`` is what was
    tried to see that ``runtime`` enforces the limits.
    """

    id: str
    key: str
    profile: str
    host: str
    runtime: str
    status: str
    detail: str
    created_at: datetime
    proof: Any = None


class EgressView(BaseModel):
    """A connection that a sandbox of a run asked its proxy for; sizes in bytes."""

    sandbox_id: str
    at: datetime
    method: str
    host: str
    port: int
    allowed: bool
    reason: str
    bytes_in: int
    bytes_out: int
    status: int | None


class WaitView(BaseModel):
    """Something that a run is blocked on."""

    path: str
    kind: str
    name: str
    since: datetime
    until: datetime | None = None
    question: str | None = None
    arguments: dict[str, Any] | None = None
    value_schema: dict[str, Any] | None = None


class RunView(BaseModel):
    """A run, as the contract describes it."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    id: str
    workflow: str
    version: str
    status: str
    pause: Pause | None
    tenant: str | None
    priority: int = 0
    labels: dict[str, str] = {}
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None
    input: Any = None
    result: Any = None
    error: ErrorView | None
    recoveries: int
    parent: str | None = None
    forked_from: str | None = None
    source: str | None = None
    worker: str | None = None
    cost_usd: float
    usage: UsageView
    waits: list[WaitView] = []
    children: list[str] = []
    steps: list[StepView] | None = None
    attempts: list[AttemptView] | None = None
    sandboxes: list[SandboxView] | None = None
    egress: list[EgressView] | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data; what stands beside the steps is left out with them, where they were not asked for."""
        beside = {"steps", "attempts", "sandboxes", "egress"}
        return self.model_dump(mode="json", exclude=beside if self.steps is None else set())


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _when(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _error(text: str | None) -> ErrorView | None:
    return None if text is None else ErrorView(**payload.error_summary(text))


def _pause(row: Any) -> Pause | None:
    if row.pause_reason is None:
        return None
    return Pause(reason=row.pause_reason, until=_time(row.pause_until), since=_time(row.parked_at))


def _run_view(row: Any, usage: Any, *, input: Any = None, result: Any = None, worker: str | None = None) -> RunView:
    return RunView(
        id=row.id,
        workflow=row.workflow,
        version=row.version,
        status=row.status,
        pause=_pause(row),
        tenant=row.tenant,
        priority=row.priority,
        labels=dict(payload.load_labels(row.labels)),
        created_at=_when(row.created_at),
        started_at=_time(row.started_at),
        finished_at=_time(row.finished_at),
        input=input,
        result=result,
        error=_error(row.error),
        recoveries=row.recoveries,
        parent=row.parent_id,
        forked_from=row.forked_from,
        source=row.source,
        worker=worker,
        cost_usd=usage.cost_usd or 0.0,
        usage=UsageView(
            input_tokens=usage.input_tokens or 0,
            output_tokens=usage.output_tokens or 0,
            model_calls=usage.model_calls or 0,
            unpriced_calls=usage.unpriced_calls or 0,
        ),
    )


def list_runs(
    store: Store, connection: Connection, *, status: str | None, workflow: str | None, limit: int | None
) -> list[RunView]:
    """Runs, newest first, with what they are blocked on."""
    rows = store.runs(connection, status=status, workflow=workflow, limit=limit)
    ids = [row.id for row in rows]
    usage = store.usage(connection, ids)
    waits = _waits_by_run(store.waits(connection, [row.id for row in rows if row.status not in FINAL]))
    views = [_run_view(row, usage.get(row.id) or Fields({})) for row in rows]
    for view in views:
        view.waits = waits.get(view.id, [])
    return views


def show_run(store: Store, connection: Connection, run_id: str, *, steps: bool) -> RunView:
    """One run, with its steps if they are asked for."""
    row = control.require(store, connection, run_id)
    usage = store.usage(connection, [run_id]).get(run_id) or Fields({})
    holder = control.owner(store, connection, row)
    result = _load(store, connection, row.result, row.result_ref)
    view = _run_view(
        row,
        usage,
        input=_load(store, connection, row.input, row.input_ref),
        result=result,
        worker=None if holder is None else lease.describe(holder),
    )
    view.waits = _waits_by_run(store.waits(connection, [run_id])).get(run_id, [])
    view.children = [child.id for child in reversed(store.runs(connection, parent=run_id, limit=None))]
    if steps:
        view.steps = _steps(store, connection, run_id)
        view.attempts = [_attempt_view(row) for row in store.attempts(connection, run_id)]
        view.sandboxes = [_sandbox_view(row) for row in store.sandboxes_of(connection, run_id)]
        view.egress = [_egress_view(row) for row in store.egress(connection, run_id)]
    return view


def _load(store: Store, connection: Connection, text: str | None, ref: str | None) -> Any:
    if ref is not None:
        text = (store.payload(connection, ref) or b"null").decode("utf-8", "replace")
    return None if text is None else json.loads(text)


def _waits_by_run(rows: Iterable[Any]) -> dict[str, list[WaitView]]:
    found: dict[str, list[WaitView]] = {}
    for row in rows:
        found.setdefault(row.run_id, []).append(
            WaitView(
                path=row.path,
                kind=row.kind,
                name=row.name,
                since=_when(row.since),
                until=_time(row.due_at),
                question=row.question,
                arguments=None if row.arguments is None else json.loads(row.arguments),
                value_schema=None if row.value_schema is None else json.loads(row.value_schema),
            )
        )
    return found


def _steps(store: Store, connection: Connection, run_id: str) -> list[StepView]:
    done = [_step_view(row) for row in store.steps(connection, run_id)]
    finished = {step.path for step in done}
    return done + [_intent_view(row) for row in store.intents(connection, run_id) if row.path not in finished]


def _step_view(row: StoredRow) -> StepView:
    return StepView(
        path=row.path,
        name=row.name,
        kind=row.kind,
        status=row.status,
        attempts=row.attempts,
        started_at=_when(row.started_at),
        ended_at=_when(row.ended_at),
        model=row.model,
        cost_usd=row.cost_usd,
        agent=row.agent,
        input_tokens=row.input_tokens,
        output_tokens=row.output_tokens,
        input=row.asked,
        output=f"(stored apart: {row.output_ref})" if row.output_ref else json.loads(row.output or "null"),
        error=_error(row.error),
    )


def _attempt_view(row: StoredRow) -> AttemptView:
    values = {name: getattr(row, name) for name in AttemptView.model_fields}
    return AttemptView.model_validate({**values, "started_at": _when(row.started_at)})


def _sandbox_view(row: StoredRow) -> SandboxView:
    values = {name: getattr(row, name) for name in SandboxView.model_fields}
    proof = None if row.proof is None else json.loads(row.proof)
    return SandboxView.model_validate({**values, "created_at": _when(row.created_at), "proof": proof})


def _egress_view(row: StoredRow) -> EgressView:
    values = {name: getattr(row, name) for name in EgressView.model_fields}
    return EgressView.model_validate({**values, "at": _when(row.at)})


def _intent_view(row: StoredRow) -> StepView:
    return StepView(
        path=row.path,
        name=row.name,
        kind="tool",
        status="running",
        attempts=row.attempt,
        started_at=_when(row.started_at),
        ended_at=None,
    )


class Blocker(BaseModel):
    """A wait, and the run of the tree that it belongs to."""

    run_id: str
    wait: WaitView


class Outlook(BaseModel):
    """How a run will go on, its child runs included.

    ``works``: somebody executes it, or may at once. ``timed``: it goes on by itself at ``until``. ``stuck``: only a
    person can move it. ``ended``: it does not go on.
    """

    state: Literal["works", "timed", "stuck", "ended"]
    reason: str = ""
    until: datetime | None = None
    blockers: list[Blocker] = []


def outlook(store: Store, connection: Connection, run_id: str, now: float) -> Outlook:
    """Who or what can move a run.

    Raises:
        NotFound: there is none of that id.
    """
    row = control.require(store, connection, run_id)
    if row.status in FINAL:
        return Outlook(state="ended")
    if row.status not in PARKED or (row.wake_at is not None and row.wake_at <= now):
        return Outlook(state="works")
    own = _waits_by_run(store.waits(connection, [run_id])).get(run_id, [])
    if row.pause_reason == "operator":
        blockers = [Blocker(run_id=run_id, wait=wait) for wait in own if wait.kind != "child"]
        return Outlook(state="stuck", reason="operator", blockers=blockers)
    parts = [
        outlook(store, connection, wait.name, now) if wait.kind == "child" else _outlook_of(run_id, wait)
        for wait in own
    ]
    return _all_together(row, parts or [_outlook_of(run_id, None, row)])


def _outlook_of(run_id: str, wait: WaitView | None, row: Any = None) -> Outlook:
    """The outlook of one branch by what it waits for; of a run without a recorded wait by its row."""
    if wait is None:
        reason, until, goes_on = row.pause_reason or "", _time(row.wake_at), row.awaits is not None
    else:
        pausing = wait.kind in ("model", "sandbox")
        reason, until, goes_on = wait.name if pausing else wait.kind, wait.until, pausing
    moves = (goes_on or until is not None) and reason not in BY_HAND
    blockers = [] if wait is None else [Blocker(run_id=run_id, wait=wait)]
    return Outlook(state="timed" if moves else "stuck", reason=reason, until=until, blockers=blockers)


def _all_together(row: Any, parts: Sequence[Outlook]) -> Outlook:
    """The outlook of a run whose branches have these: what moves by itself counts, what does not waits its turn."""
    if any(part.state in ("works", "ended") for part in parts):
        return Outlook(state="works")
    state: Literal["timed", "stuck"] = "timed" if any(part.state == "timed" for part in parts) else "stuck"
    telling = [part for part in parts if part.state == state]
    own = row.pause_reason or ""
    reason = telling[0].reason if own == "child" or (own in BY_HAND and state == "timed") else own
    until = min((part.until for part in telling if part.until is not None), default=None)
    return Outlook(
        state=state, reason=reason, until=until, blockers=[blocker for part in parts for blocker in part.blockers]
    )


def unfinished(store: Store, connection: Connection) -> Sequence[str]:
    """The ids of runs that have not ended, are nobody's child, and that no live worker holds, oldest first."""
    live = {worker.id for worker in store.workers(connection) if not lease.is_gone(worker, lease.lease_clock())}
    return [row.id for row in store.unfinished(connection) if row.worker_id not in live]


# --- models ---------------------------------------------------------------------------------------------------------


class DeploymentView(BaseModel):
    """A deployment as it is configured, and what any process found out about it last.

    ``state`` is ``unknown`` until somebody has called it, ``closed`` when it is healthy, ``open`` when calls are kept
    away until ``until``, ``half_open`` while one call tries it, ``ramping`` while it gets its share back. ``quota``
    names the rate limit it shares, which is used up until ``quota_until``. ``verdict`` is what came of its last call,
    which was at ``at``. Durations are in seconds.
    """

    name: str
    provider: str
    model: str
    tier: str | None
    routes: list[str]
    state: str
    since: datetime | None
    until: datetime | None
    quota: str
    quota_until: datetime | None
    quota_reason: str
    in_flight: int
    waiting: int
    limit: int | None
    answered: int
    failed: int
    error_rate: float
    first_token_p50: float | None
    first_token_p95: float | None
    tokens_per_second: float | None
    limits: dict[str, float]
    verdict: str
    detail: str
    at: datetime | None
    worker: str


def list_deployments(config: Config, rows: Iterable[StoredRow]) -> list[DeploymentView]:
    """The configured deployments in the file's order, then those that calls named directly, each with its state.

    ``rows`` are those of ``Store.deployments``; what is known of deployments that are not configured any more is left
    out.
    """
    known = {row.deployment: row for row in rows}
    direct = [name for name in known if name not in config.models and is_direct(config, name)]
    return [_deployment_view(config, name, known.get(name)) for name in (*config.models, *sorted(direct))]


def _deployment_view(config: Config, name: str, row: StoredRow | None) -> DeploymentView:
    provider, _, model_name = name.partition("/")
    model = config.models.get(name) or Model.model_validate({"provider": provider, "model": model_name})
    state = DeploymentState(name) if row is None else state_of({**json.loads(row.state), "deployment": name})
    return DeploymentView(
        name=name,
        provider=model.provider,
        model=model.model,
        tier=model.tier,
        routes=[route for route, settings in config.routes.items() if name in settings.models],
        state=state.state,
        since=_time(state.since),
        until=_time(state.until),
        quota=state.quota or model.quota or "",
        quota_until=_time(state.quota_until),
        quota_reason=state.quota_reason,
        in_flight=state.in_flight,
        waiting=state.waiting,
        limit=state.limit,
        answered=state.answered,
        failed=state.failed,
        error_rate=state.error_rate,
        first_token_p50=state.first_token_p50,
        first_token_p95=state.first_token_p95,
        tokens_per_second=state.tokens_per_second,
        limits=dict(state.limits),
        verdict=state.verdict,
        detail=state.detail,
        at=_time(state.at),
        worker=state.worker if row is None else row.worker,
    )
