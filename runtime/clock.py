"""Time is an input: everything durable asks a clock, so that tests run days of timers in milliseconds.

Durations inside one process (deadlines of a step, of a socket) stay on anyio's monotonic clock; a ``Clock`` is for
points in time that outlive the process.
"""

from __future__ import annotations

import time
from typing import Protocol

import anyio

# A suspended laptop stops the monotonic clock but not the wall clock: look again at least this often.
_LONGEST_NAP = 15.0


class Epoch:
    """Makes a time of anyio's clock one of seconds since the epoch, by adding ``offset``.

    That stays the same to the last digit, so that one moment is always written as one number, until the clocks have
    parted: the one stands still while a machine is suspended, the other one may be set.
    """

    TOLERANCE = 1.0
    """Seconds."""

    def __init__(self) -> None:
        self._offset = float("inf")

    @property
    def offset(self) -> float:
        """The seconds to add."""
        now = time.time() - anyio.current_time()
        if abs(now - self._offset) > self.TOLERANCE:
            self._offset = now
        return self._offset


class Clock(Protocol):
    """The time of day, in seconds since the epoch (UTC), and a way to wait for it."""

    def now(self) -> float:
        """The present, in seconds since the epoch."""
        ...

    async def wait(self, event: anyio.Event, until: float | None) -> bool:
        """Wait for ``event`` or the time ``until``; true if the event came first."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        """The present, in seconds since the epoch."""
        return time.time()

    async def wait(self, event: anyio.Event, until: float | None) -> bool:
        """Wait for ``event`` or the time ``until``; true if the event came first."""
        while not event.is_set():
            rest = _LONGEST_NAP if until is None else until - self.now()
            if rest <= 0:
                return False
            with anyio.move_on_after(min(rest, _LONGEST_NAP)):
                await event.wait()
        return True


class FakeClock:
    """Virtual time: stands still until ``advance`` is called. Part of the testing kit."""

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        """``start`` is in seconds since the epoch."""
        self._now = start
        self._moved = anyio.Event()

    def now(self) -> float:
        """The virtual present, in seconds since the epoch."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass and wake everyone whose time has come."""
        self._now += seconds
        moved, self._moved = self._moved, anyio.Event()
        moved.set()

    async def wait(self, event: anyio.Event, until: float | None) -> bool:
        """Wait for ``event`` or the virtual time ``until``; true if the event came first."""
        while not event.is_set():
            if until is not None and self._now >= until:
                return False
            await _first_of(event, self._moved)
        return True


async def _first_of(*events: anyio.Event) -> None:
    """Return when any of ``events`` is set."""
    async with anyio.create_task_group() as group:

        async def watch(event: anyio.Event) -> None:
            await event.wait()
            group.cancel_scope.cancel()

        for event in events:
            group.start_soon(watch, event)
