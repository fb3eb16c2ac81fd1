"""Faults on schedule: which request goes wrong, when, and how.

The kinds are those that real providers show (and that frameworks get wrong): errors with their bodies and headers,
silence at every place where silence can be, and streams that end in every way but the right one. A schedule has no
random state: what goes wrong is a function of the request's number and of the time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from ridethrough.runtime.router.providers.simulated.draft import Failure, failure_of

Kind = Literal[
    "status",
    "rate_limit",
    "quota",
    "auth",
    "context_length",
    "content_filter",
    "capacity",
    "refuse",
    "reset",
    "hang",
    "html",
    "broken_json",
    "slow",
    "slow_tokens",
    "slow_first_token",
    "stall",
    "cut",
    "malformed",
    "no_finish",
    "no_terminal",
    "error_event",
    "bad_arguments",
    "unknown_finish",
]

_FOREVER = 3600.0
_Seconds = Annotated[float, Field(ge=0)]
_Count = Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class Fault:
    """One fault and its schedule.

    Instead of an answer: ``status`` (an error, 503 when ``status`` is left out), ``rate_limit`` (429; ``seconds`` is
    how long to wait, said in the provider's own way), ``quota`` (out of credit), ``auth`` (401), ``context_length``,
    ``content_filter`` (with ``status = 200`` as the reason of an empty answer), ``refuse`` (nobody listens, and
    connections are reset), ``reset`` (the connection is reset), ``hang`` (no answer for ``seconds``), ``html`` and
    ``broken_json`` (bodies with status 200). ``body`` and ``headers`` go before the provider's own.

    An answer that is late: ``slow`` (by ``seconds``, which with ``ramp`` grow from 0 at ``start`` to all at ``end``),
    ``slow_first_token`` (after the head), ``slow_tokens`` (by ``seconds`` a token), ``capacity`` (above ``limit``
    requests at once all are slower in proportion; with ``status`` those above are refused). Delays add up.

    An answer that is broken: ``stall`` (silence for ``seconds`` after ``after`` events), ``cut`` (the connection breaks
    there), ``malformed`` (an event that is no JSON), ``no_finish`` (the stream ends there), ``no_terminal`` (it ends
    in front of what says that it is whole), ``error_event`` (an error inside the stream), ``bad_arguments`` (those of
    tool calls are no JSON), ``unknown_finish`` (a reason that nobody knows).

    The schedule: ``requests`` are numbers counted from 1 (of ``model``, when that is given), ``start`` and ``end`` are
    seconds since the server started, ``every`` repeats it: the first ``lasts`` (half, when left out) of every so many
    seconds after ``start`` are bad. ``share`` is the fraction of requests that it happens to, ``times`` how often it
    happens at most. ``deployment`` is the name of the server's deployment, ``*``, or ``#1`` for the first of a list.
    All that are given must hold.

    Raises:
        ValueError: Something is missing that the kind needs.
    """

    kind: Kind = "status"
    status: Annotated[int, Field(ge=200, le=599)] | None = None
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    after: Annotated[int, Field(ge=0)] = 1
    seconds: _Seconds | None = None
    model: str | None = None
    requests: tuple[int, ...] | None = None
    start: _Seconds = 0.0
    end: _Seconds | None = None
    times: _Count | None = None
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    every: Annotated[float, Field(gt=0)] | None = None
    lasts: Annotated[float, Field(gt=0)] | None = None
    ramp: bool = False
    limit: _Count | None = None
    deployment: str | None = None

    def __post_init__(self) -> None:
        """Refuse what would have no effect."""
        if self.kind in ("slow", "slow_tokens") and self.seconds is None:
            raise ValueError(f"'{self.kind}' needs 'seconds'")
        if self.ramp and (self.kind != "slow" or self.end is None):
            raise ValueError("'ramp' is for the kind 'slow' and needs 'end'")
        if (self.kind == "capacity") != (self.limit is not None):
            raise ValueError("the kind 'capacity' needs 'limit', and no other has it")
        if self.lasts is not None and self.every is None:
            raise ValueError("'lasts' needs 'every'")

    @property
    def lasting(self) -> float:
        """How many seconds a silence lasts."""
        return _FOREVER if self.seconds is None else self.seconds

    @property
    def failure(self) -> Failure:
        """What the provider says went wrong."""
        match self.kind:
            case "rate_limit" | "quota" | "auth" | "context_length" | "content_filter":
                return Failure(self.kind, self.status, self.seconds)
            case _:
                return failure_of(self.status or 503)

    @property
    def closes(self) -> bool:
        """Whether nobody listens while it lasts, because it is about all requests."""
        single = self.model is not None or self.requests is not None or self.times is not None
        return self.kind == "refuse" and self.share == 1 and not single

    def applies(self, model: str, number: int, model_number: int, age: float, used: int, *, salt: object = "") -> bool:
        """Whether it is due for request ``number`` (``model_number`` among those of ``model``) at ``age`` seconds."""
        counted = number if self.model is None else model_number
        if self.model is not None and self.model != model:
            return False
        if self.requests is not None and counted not in self.requests:
            return False
        if self.times is not None and used >= self.times:
            return False
        return self.lasts_at(age) and chosen(self.share, counted, salt)

    def lasts_at(self, age: float) -> bool:
        """Whether ``age`` is within its time."""
        return lasts_at(age, self.start, self.end, self.every, self.lasts)

    def changes_after(self, age: float) -> float:
        """Return the next age at which it may begin or end; infinity when there is none."""
        if age < self.start:
            return self.start
        end = math.inf if self.end is None else self.end
        if self.every is None or age >= end:
            return end if age < end else math.inf
        phase, bad = (age - self.start) % self.every, self.lasts or self.every / 2
        return min(end, age + (bad - phase if phase < bad else self.every - phase))

    def delay(self, age: float) -> float:
        """Return how many seconds later the answer begins at ``age``."""
        if self.kind != "slow":
            return 0.0
        if not self.ramp or self.end is None:
            return self.seconds or 0.0
        return (self.seconds or 0.0) * (age - self.start) / max(self.end - self.start, 1e-9)

    def is_for(self, name: str | None, position: int | None) -> bool:
        """Whether it is about the deployment ``name``, the one at ``position`` (from 1) of a list.

        A server that was told neither has all faults.
        """
        if self.deployment in (None, "*") or (name is None and position is None):
            return True
        return self.deployment == name or self.deployment == f"#{position}"


def lasts_at(
    age: float, start: float, end: float | None, every: float | None = None, lasts: float | None = None
) -> bool:
    """Whether ``age`` is between ``start`` and ``end``, and in the first ``lasts`` of every ``every`` seconds."""
    if age < start or (end is not None and age >= end):
        return False
    return every is None or (age - start) % every < (lasts or every / 2)


def chosen(share: float, number: int, salt: object) -> bool:
    """Whether ``number`` is in the given share of all numbers: always the same ones, without a pattern."""
    if share >= 1:
        return True
    drawn = hashlib.blake2b(f"{salt}/{number}".encode(), digest_size=4).digest()
    return int.from_bytes(drawn, "big") < share * 2**32


@dataclass(frozen=True)
class Due:
    """What happens to one request.

    ``fault`` happens in the place of its answer or inside of it. The answer comes ``delay`` seconds later, its first
    token another ``first_token``, and each token ``per_token``; ``slowdown`` multiplies the model's own times.
    ``kinds`` are those of all that happens.
    """

    fault: Fault | None = None
    delay: float = 0.0
    first_token: float = 0.0
    per_token: float = 0.0
    slowdown: float = 1.0
    kinds: tuple[Kind, ...] = ()

    @property
    def kind(self) -> Kind | None:
        """The kind by which it is known: a delay only when nothing worse happens."""
        if self.fault is not None:
            return self.fault.kind
        return self.kinds[0] if self.kinds else None


@dataclass
class _Entry:
    fault: Fault
    salt: str
    used: int = 0


class Schedule:
    """The faults of one server, and how often each happened. ``changed`` is called when there are others.

    Args:
        faults: All of a scenario; those for other deployments than ``name`` and ``position`` are left out.
        name: The server's deployment.
        position: Its place in a list, from 1.
        seed: Chooses which requests are in a fault's share.
        changed: Is told of every change.
    """

    def __init__(
        self,
        faults: list[Fault],
        *,
        name: str | None = None,
        position: int | None = None,
        seed: int = 0,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._name, self._position, self._seed = name, position, seed
        self._changed = changed
        self._made = 0
        self._entries = [self._entry(fault) for fault in faults if fault.is_for(name, position)]
        self._seen: dict[str, int] = {}

    @property
    def all(self) -> list[Fault]:
        """The faults, in the order in which they are asked."""
        return [entry.fault for entry in self._entries]

    def add(self, fault: Fault) -> None:
        """Put a fault in front of the others, unless it is for another deployment."""
        if fault.is_for(self._name, self._position):
            self._entries.insert(0, self._entry(fault))
            self._changed()

    def clear(self) -> None:
        """Remove all faults: the provider is well again."""
        self._entries.clear()
        self._changed()

    def pick(self, model: str, number: int, age: float, load: int = 1) -> Due:
        """Return what happens to a request, and count it; ``load`` is how many of ``model`` are under way with it.

        Delays add up; of the other faults the first that is due happens.
        """
        seen = self._seen[model] = self._seen.get(model, 0) + 1
        if not self._entries:
            return Due()
        due = Due()
        for entry in self._entries:
            fault = entry.fault
            if fault.closes or not fault.applies(model, number, seen, age, entry.used, salt=entry.salt):
                continue
            if (after := _with(due, fault, age, load)) is not None:
                entry.used += 1
                due = after
        return due

    def closed(self, age: float) -> tuple[bool, float]:
        """Whether nobody listens at ``age``, and the age until which that is so."""
        closing = [entry.fault for entry in self._entries if entry.fault.closes]
        shut = any(fault.lasts_at(age) for fault in closing)
        return shut, min((fault.changes_after(age) for fault in closing), default=math.inf)

    def _entry(self, fault: Fault) -> _Entry:
        self._made += 1
        return _Entry(fault, f"{self._seed}/{self._made}")


def _with(due: Due, fault: Fault, age: float, load: int) -> Due | None:
    """Return what happens when ``fault`` happens too, ``None`` when it cannot."""
    kinds = (*due.kinds, fault.kind)
    match fault.kind:
        case "slow":
            return replace(due, delay=due.delay + fault.delay(age), kinds=kinds)
        case "slow_first_token":
            return replace(due, first_token=due.first_token + fault.lasting, kinds=kinds)
        case "slow_tokens":
            return replace(due, per_token=due.per_token + fault.lasting, kinds=kinds)
        case "capacity" if load <= (fault.limit or 0):
            return None
        case "capacity" if fault.status is None:
            return replace(due, slowdown=due.slowdown * load / (fault.limit or 1), kinds=kinds)
        case _:
            return replace(due, fault=fault, kinds=kinds) if due.fault is None else None
