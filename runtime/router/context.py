"""What the router knows of the work behind a call. It knows nothing of runs: these are labels to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

PriorityClass = Literal["critical", "high", "normal", "low"]
"""Who is served first when not everybody can be; ``low`` is shed first (the SRE book's SHEDDABLE)."""

PRIORITIES: tuple[PriorityClass, ...] = ("critical", "high", "normal", "low")
"""From the most to the least urgent."""


def priority_class(priority: int) -> PriorityClass:
    """Return the class of a run's numeric priority: 100 and more, above 0, 0, below 0."""
    if priority >= 100:
        return "critical"
    return "high" if priority > 0 else "normal" if priority == 0 else "low"


@dataclass(frozen=True)
class CallContext:
    """Who calls, and how long the caller waits.

    ``deadline`` is in seconds from the start of the call and covers all its attempts. ``floor`` is the least capable
    tier that may answer; the route's own floor holds besides. ``path`` names the step that asks, inside its run.
    Calls of different ``epoch`` are never answered by each other's cached answers. ``behind`` those who have failed
    less: whether a deployment that was ill is back, they find out first.
    """

    tenant: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    workflow: str | None = None
    agent: str | None = None
    run_id: str | None = None
    path: str = ""
    priority: PriorityClass = "normal"
    floor: str | None = None
    deadline: float | None = None
    epoch: str = ""
    behind: bool = False
