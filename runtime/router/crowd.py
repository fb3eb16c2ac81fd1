"""How many of those who were parked may come back at once.

A thousand agents that waited for the same provider must not all come when it is back. While a deployment recovers its
ramp says how many calls may begin; the crowd gets that and no more. Where everything is well (a few were unlucky and
parked by themselves) a handful at a time is let in.
"""

from __future__ import annotations

from ridethrough.runtime.router.choice import Needs
from ridethrough.runtime.router.deployment import Deployment

STEP = 8
"""How many come at a time where nothing else bounds them."""

NO_NEEDS = Needs(frozenset(), 0)


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
