"""What the router knows of the work behind a call. It knows nothing of runs: these are labels to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CallContext:
    """Who calls, and how long the caller waits.

    ``deadline`` is in seconds from the start of the call and covers all its attempts. ``floor`` is not supported yet
    and refused; ``priority`` is for admission, which this version does not have.
    """

    tenant: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    workflow: str | None = None
    agent: str | None = None
    run_id: str | None = None
    priority: str | None = None
    floor: str | None = None
    deadline: float | None = None
