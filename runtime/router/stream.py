"""The events of a streamed call, carried from the task that makes it to the one that reads them.

The call has a task of its own, because deadlines and hedging are cancel scopes, and a scope must not stay open across
the ``yield`` of a generator that somebody may drop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import anyio

from ridethrough.runtime.errors import UsageError
from ridethrough.runtime.events import ModelDelta, ModelReset
from ridethrough.runtime.router.messages import ModelResponse


@dataclass(frozen=True)
class ModelFinished:
    """The last event of a stream: the whole response."""

    response: ModelResponse
    type: Literal["model_finished"] = "model_finished"


StreamEvent = ModelDelta | ModelReset | ModelFinished


class Pipe:
    """One call's events, in order; an answer is bounded, so they are."""

    def __init__(self) -> None:
        self._events: deque[StreamEvent] = deque()
        self._came = anyio.Event()
        self._scope = anyio.CancelScope()
        self._error: Exception | None = None
        self._ended = self._finished = False

    def put(self, event: StreamEvent) -> None:
        """Add an event."""
        self._events.append(event)
        self._came.set()

    async def run(self, ask: Callable[[], Awaitable[StreamEvent]]) -> None:
        """Make the call; what it raises is raised by ``next``."""
        try:
            with self._scope:
                self.put(await ask())
                self._finished = True
        except Exception as error:
            self._error = error
        finally:
            self._ended = True
            self._came.set()

    async def next(self) -> StreamEvent | None:
        """Return the next event, ``None`` at the end.

        Raises:
            Exception: What the call raised.
            UsageError: The router was closed meanwhile.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._ended and not self._finished:
                raise UsageError("the router was closed in the middle of this stream: keep it open until the end")
            if self._ended:
                return None
            await self._came.wait()
            self._came = anyio.Event()
        return self._events.popleft()

    def give_up(self) -> None:
        """Nobody reads on: end the call if it is still being made."""
        self._scope.cancel()
