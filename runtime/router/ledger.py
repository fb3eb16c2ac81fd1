"""What the router keeps outside of itself: money, answers, attempts, and what is known of deployments.

The router knows nothing of databases. It asks this port; the engine gives it one that lies in the run's own database
(shared by all workers), and a router that is used on its own gets ``MemoryLedger``.

Money is given in USD and counted in whole nano-dollars, so that sums are exact: a cap of 1 USD holds 0.02 USD fifty
times, and what was put aside and taken back leaves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Verdict = str
"""``ok``, the class name of a ``ModelError``, ``hedged`` (another attempt was quicker), or ``abandoned``."""


@dataclass(frozen=True)
class Cap:
    """A budget that covers a call: whose money, in which window, and how much of it there is.

    ``key`` names scope and window, ``tenant:acme/day:2026-11-27``; equal keys share the money, whatever their ``usd``.
    ``name`` is for people. ``resets_at`` is in seconds since the epoch, ``None`` for a window that never starts anew
    (a run's, whose id is ``run_id``).
    """

    key: str
    name: str
    usd: float
    on_exceeded: Literal["pause", "fail", "degrade"] = "pause"
    resets_at: float | None = None
    run_id: str | None = None


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
    opens again. ``first_token_p50/p95`` and ``tokens_per_second`` are what it normally does, ``usual_rate`` is its
    calls a second before it fell ill; ``limits`` is what its provider said of its rate limits (``requests_remaining``
    and such).
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
    usual_rate: float | None = None
    limits: Mapping[str, float] = field(default_factory=dict[str, float])
    worker: str = ""


class Ledger(Protocol):
    """Where the router keeps what others must see. Every method may be called from many tasks at once."""

    async def reserve(self, caps: Sequence[Cap], usd: float, *, now: float, expires_at: float) -> Hold | Refusal:
        """Put ``usd`` aside under all of ``caps`` in one atomic step, or under none.

        A cap refuses when what is spent and what is put aside, together with ``usd``, is above it. A hold that is
        never settled (the process died) counts as spent from ``expires_at`` on: the call may have been billed. Who is
        cancelled while he waits holds nothing.

        Raises:
            ValueError: ``usd`` is negative or not a number.
            StoreError: The database cannot be written; nothing was put aside.
        """
        ...

    async def settle(self, hold: Hold, usd: float, *, now: float) -> None:
        """Turn what was put aside into what was spent (0.0: nothing was); a hold is settled once, then it is gone.

        ``usd`` comes from what a provider says: if it is negative or not a number, what was put aside counts.

        Raises:
            StoreError: The database cannot be written. The hold stays, and counts as spent when it expires.
        """
        ...

    async def spending(self, keys: Sequence[str], *, now: float) -> dict[str, Spending]:
        """Return what is spent under each key, expired holds included; unknown keys are zero."""
        ...

    async def answer(self, key: str) -> KeptAnswer | None:
        """Return the answer that is kept under ``key``.

        Raises:
            StoreError: The database cannot be read.
        """
        ...

    async def keep_answer(self, key: str, answer: KeptAnswer) -> None:
        """Keep an answer; a newer one replaces an older one, never the other way round.

        Raises:
            StoreError: The database cannot be written.
        """
        ...

    def note_attempt(self, record: AttemptRecord) -> None:
        """Keep a record of an attempt. Never waits and never raises: a call does not fail for its statistics."""
        ...

    def publish(self, states: Sequence[DeploymentState]) -> None:
        """Let others see what is known. The caller bounds the rate; it never waits and never raises.

        The newest knowledge stands: a state whose last verdict (``at``) is older than that of the published one is
        not published, so a worker that has not called a deployment for an hour cannot hide what another just learned.
        """
        ...

    async def published(self) -> list[DeploymentState]:
        """Return what is known of each deployment, by anybody, in the order of their names.

        Raises:
            StoreError: The database cannot be read.
        """
        ...


# --- counting -------------------------------------------------------------------------------------------------------

NANO = 1_000_000_000
"""Nano-dollars in a USD."""

LARGEST_CAP = 1e9
"""USD. A larger cap is no cap; the sums stay within 64 bits."""

_LARGEST_COST = 1e6  # USD; a provider that reports more tokens than that for one call is wrong


def cap_nano(cap: Cap) -> int:
    """Return the nano-dollars of a cap."""
    return round(min(cap.usd, LARGEST_CAP) * NANO)


def asked_nano(usd: float) -> int:
    """Return the nano-dollars of what is to be put aside; what no cap can hold stays above every cap.

    Raises:
        ValueError: ``usd`` is negative or not a number.
    """
    if not usd >= 0:
        raise ValueError(f"{usd} USD cannot be put aside: an estimate is a number from 0 up")
    return round(min(usd, 2 * LARGEST_CAP) * NANO)


def spent_nano(usd: float, hold: Hold) -> int:
    """Return the nano-dollars that a hold is settled with; an amount that makes no sense counts as what it held."""
    if math.isnan(usd) or usd < 0:
        return asked_nano(hold.usd)
    return round(min(usd, _LARGEST_COST) * NANO)


def first_exceeded(caps: Iterable[Cap], sums: Mapping[str, tuple[int, int]], amount: int) -> Refusal | None:
    """Return the first cap that ``amount`` does not fit under; ``sums`` has what is spent and put aside, by key."""
    for cap in caps:
        spent, reserved = sums.get(cap.key, (0, 0))
        if spent + reserved + amount > cap_nano(cap):
            return Refusal(cap, spent / NANO, reserved / NANO)
    return None


def keys_of(caps: Iterable[Cap]) -> tuple[str, ...]:
    """Return the keys of ``caps``, each once: several caps may lie on the same money (degrade at 5 USD, fail at 10)."""
    return tuple(dict.fromkeys(cap.key for cap in caps))


def spending_of(
    keys: Iterable[str], sums: Mapping[str, tuple[int, int]], expired: Iterable[tuple[Iterable[str], int]]
) -> dict[str, Spending]:
    """Return what is spent and put aside under each of ``keys``; ``expired`` holds (keys, amount) count as spent."""
    found = {key: sums.get(key, (0, 0)) for key in keys}
    for held, amount in expired:
        for key in found.keys() & set(held):
            spent, reserved = found[key]
            found[key] = (spent + amount, reserved - amount)
    return {key: Spending(spent / NANO, reserved / NANO) for key, (spent, reserved) in found.items()}


# --- in memory ------------------------------------------------------------------------------------------------------


class MemoryLedger:
    """A ledger of this process, for a router on its own and for tests.

    It keeps the last 10,000 attempts and answers; sums of windows that are over are dropped.
    """

    KEPT = 10_000

    def __init__(self) -> None:
        self.attempts: list[AttemptRecord] = []
        self._sums: dict[str, tuple[int, int]] = {}
        self._ends: dict[str, float] = {}
        self._holds: dict[str, tuple[Hold, float]] = {}
        self._answers: dict[str, KeptAnswer] = {}
        self._states: dict[str, DeploymentState] = {}
        self._count = 0

    async def reserve(self, caps: Sequence[Cap], usd: float, *, now: float, expires_at: float) -> Hold | Refusal:
        """See ``Ledger.reserve``; there is no await inside, so it is atomic."""
        amount = asked_nano(usd)
        self._expire(now)
        refusal = first_exceeded(caps, self._sums, amount)
        if refusal is not None:
            return refusal
        self._count += 1
        hold = Hold(f"hold-{self._count}", keys_of(caps), usd)
        self._holds[hold.id] = (hold, expires_at)
        self._add(hold.keys, 0, amount)
        self._ends.update({cap.key: cap.resets_at for cap in caps if cap.resets_at is not None})
        return hold

    async def settle(self, hold: Hold, usd: float, *, now: float) -> None:
        """See ``Ledger.settle``."""
        if self._holds.pop(hold.id, None) is not None:
            self._add(hold.keys, spent_nano(usd, hold), -asked_nano(hold.usd))

    async def spending(self, keys: Sequence[str], *, now: float) -> dict[str, Spending]:
        """See ``Ledger.spending``; to look at it books nothing."""
        expired = [(hold.keys, asked_nano(hold.usd)) for hold in self._expired(now)]
        return spending_of(keys, self._sums, expired)

    async def answer(self, key: str) -> KeptAnswer | None:
        """See ``Ledger.answer``."""
        return self._answers.get(key)

    async def keep_answer(self, key: str, answer: KeptAnswer) -> None:
        """See ``Ledger.keep_answer``."""
        there = self._answers.pop(key, answer)
        self._answers[key] = answer if answer.kept_at >= there.kept_at else there
        if len(self._answers) > self.KEPT:
            del self._answers[next(iter(self._answers))]

    def note_attempt(self, record: AttemptRecord) -> None:
        """See ``Ledger.note_attempt``."""
        self.attempts.append(record)
        if len(self.attempts) > 2 * self.KEPT:
            del self.attempts[: -self.KEPT]

    def publish(self, states: Sequence[DeploymentState]) -> None:
        """See ``Ledger.publish``."""
        for state in states:
            there = self._states.get(state.deployment, state)
            if (state.at or 0.0) >= (there.at or 0.0):
                self._states[state.deployment] = state

    async def published(self) -> list[DeploymentState]:
        """See ``Ledger.published``."""
        return [self._states[name] for name in sorted(self._states)]

    def _add(self, keys: Iterable[str], spent: int, reserved: int) -> None:
        for key in keys:
            before = self._sums.get(key, (0, 0))
            self._sums[key] = (before[0] + spent, before[1] + reserved)

    def _expire(self, now: float) -> None:
        for hold in self._expired(now):
            del self._holds[hold.id]
            self._add(hold.keys, asked_nano(hold.usd), -asked_nano(hold.usd))
        if len(self._ends) > self.KEPT:
            self._forget([key for key, end in self._ends.items() if end <= now])

    def _expired(self, now: float) -> list[Hold]:
        return [hold for hold, expires_at in self._holds.values() if expires_at <= now]

    def _forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            del self._ends[key]
            self._sums.pop(key, None)
