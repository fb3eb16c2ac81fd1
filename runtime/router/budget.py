"""Which budgets cover a call, and in which window: pure arithmetic, asked for every model call.

Windows are those of the calendar in UTC: an hour, a day, a month; or a run's whole life. A budget covers the calls that
have what it counts by: one per tenant does not cover a call without a tenant, and one ``per = "run"`` does not cover a
call outside of runs (a ping, a router on its own), since there is no run whose money it could be. A child run is a run
of its own.

The key says scope and window, ``tenant:acme/day:2026-11-27``, and is what money is booked under: two budgets of one
scope and window lie on the same money, and changing a budget's ``usd`` does not set it back.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Literal

from ridethrough.runtime.config import Budget
from ridethrough.runtime.router.context import CallContext
from ridethrough.runtime.router.ledger import Cap

_CACHED = 4096
_HOUR = 3600

_Period = Literal["run", "hour", "day", "month"]
_Exceeded = Literal["pause", "fail", "degrade"]


def caps_for(budgets: Iterable[Budget], context: CallContext, now: float) -> tuple[Cap, ...]:
    """Return the caps that cover a call, in the order of the configuration.

    Args:
        budgets: ``[[budgets]]`` of the configuration.
        context: Who calls.
        now: Seconds since the epoch; it chooses the windows.
    """
    hour, run_id, caps = int(now // _HOUR), context.run_id, []
    for budget in budgets:
        scope = budget.scope
        value = "" if scope == "total" else _value(scope, context)
        if value is None or (budget.per == "run" and run_id is None):
            continue
        if budget.per == "run":
            caps.append(_cap(scope, value, budget.usd, "run", budget.on_exceeded, run_id, 0))
        else:
            caps.append(_cap(scope, value, budget.usd, budget.per, budget.on_exceeded, None, hour))
    return tuple(caps)


def describe(cap: Cap) -> str:
    """Return a cap in words, for messages: whose budget, how much, and when it starts anew."""
    anew = "" if cap.resets_at is None else f" (anew at {_utc(cap.resets_at):%Y-%m-%d %H:%M} UTC)"
    return f"the budget of {cap.usd:.15g} USD for {cap.name}{anew}"


def usd_now(budgets: Iterable[Budget], key: str) -> float | None:
    """Return what the configuration now allows under a cap's key; ``None`` when no budget is about it any more."""
    subject, _, window = key.partition("/")
    per = window.partition(":")[0]
    kind, _, rest = subject.partition(":")
    scope = f"label:{rest.partition('=')[0]}" if kind == "label" else kind
    found = [budget.usd for budget in budgets if _escaped_scope(budget.scope) == scope and budget.per == per]
    return min(found, default=None)


def _escaped_scope(scope: str) -> str:
    kind, colon, label = scope.partition(":")
    return f"{kind}:{_escaped(label)}" if colon else kind


def _value(scope: str, context: CallContext) -> str | None:
    """What the call has that the scope counts by; ``None`` if it has nothing."""
    if scope == "tenant":
        return context.tenant
    if scope == "run":
        return context.run_id
    if scope == "workflow":
        return context.workflow
    if scope == "agent":
        return context.agent
    return context.labels.get(scope.removeprefix("label:"))


@lru_cache(_CACHED)
def _cap(
    scope: str, value: str, usd: float, per: _Period, on_exceeded: _Exceeded, run_id: str | None, hour: int
) -> Cap:
    """Build a cap. ``hour`` (since the epoch) chooses the window, so what is cached holds for an hour."""
    subject, whose = _subject(scope, value)
    window, resets_at = _window(per, hour, run_id or "")
    owner = run_id if per == "run" else value if scope == "run" else None
    name = whose if scope == per == "run" else f"{whose}, per {per}"
    return Cap(f"{subject}/{window}", name, usd, on_exceeded, resets_at, owner)


def _subject(scope: str, value: str) -> tuple[str, str]:
    """The scope for the key, and for people."""
    if scope == "total":
        return "total", "everything"
    kind, _, label = scope.partition(":")
    if kind == "label":
        return f"label:{_escaped(label)}={_escaped(value)}", f"label {label}={value!r}"
    return f"{kind}:{_escaped(value)}", f"{kind} {value!r}"


def _window(per: _Period, hour: int, run_id: str) -> tuple[str, float | None]:
    """The window for the key, and when the next one begins."""
    start = _utc(hour * _HOUR)
    if per == "run":
        return f"run:{_escaped(run_id)}", None
    if per == "hour":
        return f"hour:{start:%Y-%m-%dT%H}", (start + timedelta(hours=1)).timestamp()
    if per == "day":
        return f"day:{start:%Y-%m-%d}", (start.replace(hour=0) + timedelta(days=1)).timestamp()
    following = (start.replace(day=1, hour=0) + timedelta(days=32)).replace(day=1)
    return f"month:{start:%Y-%m}", following.timestamp()


def _utc(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def _escaped(name: str) -> str:
    """A name in which nothing separates, so that no two subjects share a key; any database can hold it."""
    for mark, code in (("%", "%25"), ("/", "%2F"), ("=", "%3D")):
        name = name.replace(mark, code)
    return name.encode("utf-8", "backslashreplace").decode()
