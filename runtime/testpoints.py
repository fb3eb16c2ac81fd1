"""Named points at which a test kills the process: around every commit and everything else that must survive one.

Unset, a point costs one call and one comparison (about 50 ns), so the points stand in the code that is shipped and a
test kills exactly what users run. They are armed by ``RIDETHROUGH_KILL_AT=point:n`` (the n-th time that the point is
reached, from 1; more of them separated by commas), or by ``arm`` in the process. ``point:n:STOP`` stops the process
instead of killing it, which is how a test makes a worker outlive its lease. There is nothing here to clean up: SIGKILL
and SIGSTOP cannot be caught.

Points: ``journal.before_commit``, ``journal.after_commit``, ``step.before_call``, ``step.after_call``,
``claim.before``, ``claim.after``, ``park.before``, ``park.after``, ``finish.before``, ``finish.after``,
``sandbox.before_bind``, ``sandbox.after_bind``, ``sandbox.archived``.
"""

from __future__ import annotations

import os
import signal

POINTS = (
    "journal.before_commit",
    "journal.after_commit",
    "step.before_call",
    "step.after_call",
    "claim.before",
    "claim.after",
    "park.before",
    "park.after",
    "finish.before",
    "finish.after",
)

SANDBOX_POINTS = ("sandbox.before_bind", "sandbox.after_bind", "sandbox.archived")
"""Those that only a run with a sandbox reaches."""

_left: dict[str, tuple[int, signal.Signals]] | None = None


def killpoint(name: str) -> None:
    """Die here if a test wants it."""
    if _left is not None:
        _count(name)


def arm(spec: str) -> None:
    """Take ``point:n`` or ``point:n:SIGNAL`` (separated by commas) as the points to die at; an empty text disarms.

    Raises:
        ValueError: the text has another form.
    """
    global _left
    parts = [part.split(":") for part in spec.split(",") if part]
    _left = {name: (int(count), signal.Signals[f"SIG{(rest or ['KILL'])[0]}"]) for name, count, *rest in parts} or None


def _count(name: str) -> None:
    assert _left is not None
    if name not in _left:
        return
    count, number = _left[name]
    _left[name] = (count - 1, number)
    if count == 1:
        os.kill(os.getpid(), number)


arm(os.environ.get("RIDETHROUGH_KILL_AT", ""))
