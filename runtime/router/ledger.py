"""What the router keeps outside of itself: money, answers, attempts, and what is known of deployments.

The router knows nothing of databases. It asks this port; the engine gives it one that lies in the run's own database
(shared by all workers), and a router that is used on its own gets ``MemoryLedger``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Verdict = str
"""``ok``, the class name of a ``ModelError``, ``hedged`` (another attempt was quicker), or ``abandoned``."""


@dataclass(frozen=True)
class Cap:
    """A budget that covers a call: whose money, in which window, and how much of it there is.

    ``key`` names scope and window, ``tenant:acme/day:2026-11-27``; equal keys share the money. ``resets_at`` is in
    seconds since the epoch, ``None`` for a window that never starts anew (a run's).
    """

    key: str
    name: str
    usd: float
    on_exceeded: Literal["pause", "fail", "degrade"] = "pause"
    resets_at: float | None = None


@dataclass(frozen=True)
class Hold:
    """Money that is put aside for one attempt, under each of the caps that cover it."""

    id: str
    keys: tuple[str, ...]
    usd: float


@dataclass(frozen=True)
class Refusal:
    """The first cap that has too little left; nothing was put aside under any."""

    cap: Cap
    spent: float
    reserved: float


@dataclass(frozen=True)
class Spending:
    """What is spent and what is put aside under one key, in USD."""

    spent: float = 0.0
    reserved: float = 0.0


@dataclass(frozen=True)
class KeptAnswer:
    """An answer of the exact-match cache: ``response`` is a ``ModelResponse`` as JSON."""

    response: str
    kept_at: float


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt, as ``show`` and the metrics have it. Times are seconds since the epoch, durations seconds.

    ``verdict`` is ``ok`` or what it failed with, ``phase`` how far it came (``connect``, ``write``, ``read``,
    ``first_token``, ``idle``, ``total``, or empty). ``hedged`` marks a second attempt beside a slow one, ``wasted`` one
    whose answer nobody used. ``cost_usd`` is what it was booked with, ``None`` when no price is known.
    """

    id: str
    route: str
    deployment: str
    provider: str
    model: str
    started_at: float
    seconds: float
    verdict: Verdict
    phase: str = ""
    status: int | None = None
    code: str | None = None
    request_id: str | None = None
    number: int = 1
    queue_seconds: float = 0.0
    first_token_seconds: float | None = None
    tokens_per_second: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    hedged: bool = False
    wasted: bool = False
    detail: str = ""
    run_id: str | None = None
    path: str = ""
    tenant: str | None = None
    workflow: str | None = None
    agent: str | None = None


@dataclass(frozen=True)
class DeploymentState:
    """What one router knows of a deployment, for others to see. Times are seconds since the epoch.

    ``state`` is ``closed`` (healthy), ``open``, ``half_open`` or ``ramping``; ``quota_until`` is when its quota scope
    opens again. ``first_token_p50/p95`` and ``tokens_per_second`` are what it normally does; ``limits`` what its
    provider said of its rate limits (``requests_remaining`` and such).
    """

    deployment: str
    state: Literal["unknown", "closed", "open", "half_open", "ramping"] = "unknown"
    since: float | None = None
    until: float | None = None
    verdict: Verdict = "unknown"
    detail: str = ""
    at: float | None = None
    quota: str = ""
    quota_until: float | None = None
    quota_reason: str = ""
    in_flight: int = 0
    waiting: int = 0
    limit: int | None = None
    answered: int = 0
    failed: int = 0
    error_rate: float = 0.0
    first_token_p50: float | None = None
    first_token_p95: float | None = None
    tokens_per_second: float | None = None
    limits: Mapping[str, float] = field(default_factory=dict[str, float])
    worker: str = ""


class Ledger(Protocol):
    """Where the router keeps what others must see. Every method may be called from many tasks at once."""

    async def reserve(self, caps: Sequence[Cap], usd: float, *, now: float, expires_at: float) -> Hold | Refusal:
        """Put ``usd`` aside under all of ``caps`` in one atomic step, or under none.

        A cap refuses when what is spent and what is put aside, together with ``usd``, is above it. A hold that is
        never settled (the process died) counts as spent from ``expires_at`` on: the call may have been billed.
        """
        ...

    async def settle(self, hold: Hold, usd: float, *, now: float) -> None:
        """Turn what was put aside into what was spent (0.0: nothing was); a hold is settled once, then it is gone."""
        ...

    async def spending(self, keys: Sequence[str], *, now: float) -> dict[str, Spending]:
        """Return what is spent under each key, expired holds included; unknown keys are zero."""
        ...

    async def answer(self, key: str) -> KeptAnswer | None:
        """Return the answer that is kept under ``key``."""
        ...

    async def keep_answer(self, key: str, answer: KeptAnswer) -> None:
        """Keep an answer; a newer one replaces an older one."""
        ...

    def note_attempt(self, record: AttemptRecord) -> None:
        """Keep a record of an attempt. Never waits and never raises: a call does not fail for its statistics."""
        ...

    def publish(self, states: Sequence[DeploymentState]) -> None:
        """Let others see what is known. The caller bounds the rate; it never waits and never raises."""
        ...

    async def published(self) -> list[DeploymentState]:
        """Return what was published last of each deployment, by anybody."""
        ...


class MemoryLedger:
    """A ledger of this process, for a router on its own and for tests. It keeps the last 10,000 attempts."""

    KEPT_ATTEMPTS = 10_000

    def __init__(self) -> None:
        self.attempts: list[AttemptRecord] = []
        self._spending: dict[str, Spending] = {}
        self._holds: dict[str, tuple[Hold, float]] = {}
        self._answers: dict[str, KeptAnswer] = {}
        self._states: dict[str, DeploymentState] = {}
        self._count = 0

    async def reserve(self, caps: Sequence[Cap], usd: float, *, now: float, expires_at: float) -> Hold | Refusal:
        """See ``Ledger.reserve``; there is no await inside, so it is atomic."""
        self._expire(now)
        for cap in caps:
            there = self._spending.get(cap.key, Spending())
            if there.spent + there.reserved + usd > cap.usd:
                return Refusal(cap, there.spent, there.reserved)
        self._count += 1
        hold = Hold(f"hold-{self._count}", tuple(cap.key for cap in caps), usd)
        self._holds[hold.id] = (hold, expires_at)
        self._add(hold.keys, 0.0, usd)
        return hold

    async def settle(self, hold: Hold, usd: float, *, now: float) -> None:
        """See ``Ledger.settle``."""
        if self._holds.pop(hold.id, None) is not None:
            self._add(hold.keys, usd, -hold.usd)

    async def spending(self, keys: Sequence[str], *, now: float) -> dict[str, Spending]:
        """See ``Ledger.spending``."""
        self._expire(now)
        return {key: self._spending.get(key, Spending()) for key in keys}

    async def answer(self, key: str) -> KeptAnswer | None:
        """See ``Ledger.answer``."""
        return self._answers.get(key)

    async def keep_answer(self, key: str, answer: KeptAnswer) -> None:
        """See ``Ledger.keep_answer``."""
        self._answers[key] = answer

    def note_attempt(self, record: AttemptRecord) -> None:
        """See ``Ledger.note_attempt``."""
        self.attempts.append(record)
        if len(self.attempts) > 2 * self.KEPT_ATTEMPTS:
            del self.attempts[: -self.KEPT_ATTEMPTS]

    def publish(self, states: Sequence[DeploymentState]) -> None:
        """See ``Ledger.publish``."""
        self._states.update({state.deployment: state for state in states})

    async def published(self) -> list[DeploymentState]:
        """See ``Ledger.published``."""
        return list(self._states.values())

    def _add(self, keys: Sequence[str], spent: float, reserved: float) -> None:
        for key in keys:
            there = self._spending.get(key, Spending())
            self._spending[key] = Spending(there.spent + spent, max(0.0, there.reserved + reserved))

    def _expire(self, now: float) -> None:
        for hold, expires_at in [each for each in self._holds.values() if each[1] <= now]:
            del self._holds[hold.id]
            self._add(hold.keys, hold.usd, -hold.usd)
