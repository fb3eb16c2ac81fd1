"""One model call on its way: what was asked, who may answer, and what came of it so far."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ridethrough.runtime.config import TIERS, Route, Tier
from ridethrough.runtime.errors import ModelError
from ridethrough.runtime.events import ModelDelta, ModelReset
from ridethrough.runtime.router.choice import Needs
from ridethrough.runtime.router.context import CallContext
from ridethrough.runtime.router.deployment import Deployment
from ridethrough.runtime.router.health import Ticket
from ridethrough.runtime.router.ledger import Cap, Hold
from ridethrough.runtime.router.messages import ModelRequest
from ridethrough.runtime.router.telemetry import CallSpan

Listener = Callable[[ModelDelta | ModelReset], None]
"""Is told of text as it comes, and of what turns void."""

QUEUE_SECONDS = 60.0
"""How long a call waits for a place at deployments that are well but busy."""


@dataclass(eq=False)
class Place:
    """A place at a deployment, booked for one attempt of ``tokens`` (estimated input and output)."""

    deployment: Deployment
    ticket: Ticket
    tokens: float
    hold: Hold | None = None


@dataclass(eq=False)
class Call:
    """What one call carries through its attempts. Times are on anyio's clock."""

    request: ModelRequest
    name: str
    """The route's, as it was asked for."""
    route: Route
    context: CallContext
    floor: Tier | None
    needs: Needs
    candidates: list[Deployment]
    """Those that may answer, in the order in which they are asked."""
    started: float
    until: float
    patience: float
    listener: Listener | None
    span: CallSpan
    caps: tuple[Cap, ...] = ()
    attempts: int = 0
    errors: list[ModelError] = field(default_factory=list[ModelError])
    not_before: dict[str, float] = field(default_factory=dict[str, float])
    """When a deployment that has failed this call may be tried again for it."""
    too_dear: dict[str, Cap] = field(default_factory=dict[str, Cap])
    """Deployments whose price a used-up budget forbids, where it says ``degrade``."""
    blocked_since: float | None = None
    queued_since: float | None = None
    queue_seconds: float = 0.0
    looked_below: bool = False
    """Whether the rungs before the last one were tried."""

    @property
    def group(self) -> tuple[object, ...]:
        """Calls of one group can be served by the same deployments, so they wait in one queue."""
        return (self.name, self.floor, self.needs.abilities)

    @property
    def awaits(self) -> str:
        """The condition under which another try is worth it."""
        may = {each.name for each in self.candidates}
        return awaits_of(self.name, self.floor, [name for name in self.route.models if name not in may])

    def earliest(self, deployment: Deployment) -> float:
        """Return when this call may try a deployment again, health aside."""
        return self.not_before.get(deployment.name, -math.inf)


def awaits_of(route: str, floor: str | None, others: Sequence[str] = ()) -> str:
    """Write the wake-up condition "any deployment of the route answers".

    It has to be at or above the floor, and none of the ``others``: they cannot answer this call, well as they may be.
    """
    return json.dumps(["route", route, floor, *([sorted(others)] if others else [])])


def awaits_of_budget(cap: Cap, usd: float) -> str:
    """Write the wake-up condition "the budget has so much left".

    The amount is rounded up to two digits: calls of about the same price wait for the same.
    """
    return json.dumps(["budget", cap.key, cap.usd, cap.resets_at, _rounded_up(usd)])


def _rounded_up(usd: float) -> float:
    rounded = float(f"{usd:.1e}")
    return rounded if rounded >= usd else float(f"{usd * 1.05:.1e}")


def higher(left: Tier | None, right: Tier | None) -> Tier | None:
    """Return the stricter of two floors."""
    if left is None or right is None:
        return left or right
    return left if TIERS.index(left) <= TIERS.index(right) else right
