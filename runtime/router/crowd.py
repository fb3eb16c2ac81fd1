"""How many of those who were parked may come back at once.

A thousand agents that waited for the same provider must not all come when it is back. While a deployment recovers its
ramp says how many calls may begin; the crowd gets that and no more. Where everything is well (a few were unlucky and
parked by themselves) a handful at a time is let in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from ridethrough.runtime.config import at_least
from ridethrough.runtime.router.deployment import Deployment
from ridethrough.runtime.router.ledger import Cap, Spending

STEP = 8
"""How many come at a time where nothing else bounds them."""

ON_THE_WAY = 2.0
"""Seconds that those who were woken have to arrive, until they do not count any more."""


class Expected:
    """Those who were woken and have not arrived yet: they are not counted as room again."""

    def __init__(self) -> None:
        self._until: dict[str, list[float]] = {}

    def __bool__(self) -> bool:
        """Whether there may be any."""
        return bool(self._until)

    def add(self, awaits: str, count: int, now: float) -> None:
        """So many are on their way."""
        if count:
            still = [until for until in self._until.get(awaits, ()) if until > now]
            self._until[awaits] = still + [now + ON_THE_WAY] * count

    def count(self, awaits: str, now: float) -> int:
        """Return how many still are."""
        return sum(until > now for until in self._until.get(awaits, ()))

    def arrived(self, awaits: str, caps: Sequence[Cap], now: float) -> None:
        """One that may have waited for this is here, or for one of these budgets in any window."""
        self._forget(now)
        subjects = {_subject(cap.key) for cap in caps}
        for known, left in self._until.items():
            if known == awaits or (subjects and _budget_of(known) in subjects):
                left.pop()

    def _forget(self, now: float) -> None:
        """Forget who has not come; conditions are many in the long run, and nobody may ask for one again."""
        self._until = {known: left for known, left in self._until.items() if left and left[-1] > now}


def _budget_of(awaits: str) -> str:
    what = json.loads(awaits)
    return _subject(what[1]) if what[0] == "budget" else ""


def _subject(key: str) -> str:
    """Whose money it is, without the window."""
    return key.partition("/")[0]


# --- room -----------------------------------------------------------------------------------------------------------


def may_come(deployments: Iterable[Deployment], floor: str | None, others: Sequence[str]) -> list[Deployment]:
    """Return who may answer those who wait: at or above the floor, and none of the ``others``, who cannot."""
    return [each for each in deployments if each.name not in others and at_least(each.model.tier, floor)]


def room_of(deployments: Sequence[Deployment], now: float) -> int:
    """Return how many of a crowd may come for any of these now; asking says that a crowd waits for them."""
    together(deployments)
    return max((room_at(each, now) for each in deployments), default=0)


def room_at(deployment: Deployment, now: float) -> int:
    """Return how many of a crowd may come for this deployment now; asking says that a crowd waits for it."""
    health = deployment.health
    if deployment.wait(now, 0.0) > 0:
        return 0
    health.expect_crowd(now)
    health.awaited(now)
    free = deployment.places.limit - len(health.flight)
    room = health.room(now)
    return max(0, min(free, room if health.state in ("open", "half_open", "ramping") else STEP))


def room_for_money(cap: float | None, spending: Spending, least: float) -> int:
    """Return how many calls of at least ``least`` USD a budget has money for; without a cap it is no bound."""
    if cap is None:
        return STEP
    left, least = cap - spending.spent - spending.reserved, min(least, cap)
    if least <= 0:
        return STEP if left >= 0 else 0
    return max(0, min(STEP, int(left / least + 1e-6)))


# --- the rate of all together ---------------------------------------------------------------------------------------


def together(deployments: Sequence[Deployment]) -> None:
    """Tell each the usual rate of the others, which may come to it.

    Two that failed together must not each let in one and a half times what both had, nor a standby, of which no usual
    rate is known, whatever comes.
    """
    if len(deployments) > 1 and any(each.health.state == "ramping" for each in deployments):
        usual = [each.health.usual_rate or 0.0 for each in deployments]
        for each, own in zip(deployments, usual, strict=True):
            each.health.others_rate = sum(usual) - own


def begun(deployment: Deployment, candidates: Iterable[Deployment]) -> None:
    """A call has begun at one of the candidates: the ramps of the others have let it in, too."""
    for other in candidates:
        if other is not deployment:
            other.health.begun_beside()
