"""What lives beside a worker for other parts of the house: the engine knows that it is there, and not what it does.

The runtime imports none of the other folders, but a worker has to look after their things too: it reaps sandboxes
whether or not a run of its own uses one. So the top of the namespace registers who is to be opened with each worker,
under a name; the code of a run asks for it by that name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from ridethrough.runtime.worker import Worker

How = Literal["ended", "parked", "released", "lost"]
"""How a run has left a worker: at its end, until something comes, for any worker to take, or to another one."""


class Companion(Protocol):
    """One of them, as the worker sees it."""

    def left(self, run_id: str, how: How) -> None:
        """A run is not executed here any more. Returns at once; what follows is the companion's own work."""
        ...


Opener = Callable[["Worker", Any], AbstractAsyncContextManager[Companion]]
"""Opens one for a worker; the second argument is what ``Runtime.open`` was given for it."""

OPENERS: dict[str, Opener] = {}


def register(name: str, opener: Opener) -> None:
    """Let each worker that serves runs have this one."""
    OPENERS[name] = opener
