"""Waking what waits for models: runs that are parked, and branches of runs in memory that are blocked.

Nobody polls them one by one. They are grouped by what they wait for (a route and a floor, or a budget); ten times a
second each group's condition is put to the router, which answers how many may come: none, while nobody answers; one,
when a deployment has to show whether it is back; then as many as its ramp lets in. So the cost of waiting is a question
a group, whatever the size of the group, and a crowd comes back in good order: by priority, those that were tried least
first, then by age. Groups that wait for money may be as many as there are runs, so a few of them are asked for at a
time.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import anyio
from sqlalchemy import Connection

from ridethrough.runtime.clock import Clock
from ridethrough.runtime.errors import ConfigError
from ridethrough.runtime.execution import Blocked, Execution, parts_of
from ridethrough.runtime.journal import Journal
from ridethrough.runtime.store import Store

log = logging.getLogger("ridethrough")

ASK_SECONDS = 0.1
"""How often a condition is asked for."""

MONEY_AT_ONCE = 20
"""How many conditions on money are asked for at a time: a run may have a budget of its own, and each costs a read."""

LIST_SECONDS = 1.0
"""How often the database is asked which conditions there are."""

AT_LATEST = 3600.0
"""Seconds after which a parked run is looked at whatever the condition says: the net under everything else."""


def latest(now: float) -> float:
    """Return when a run is looked at even if nobody wakes it: in about an hour, not all of them at once."""
    return now + AT_LATEST * (0.8 + 0.4 * random.random())


class Gate(Protocol):
    """What the waker asks: the model router."""

    async def room(self, awaits: str) -> int:
        """Return how many of those who wait under a condition may come now."""
        ...

    def expect(self, awaits: str, count: int) -> None:
        """Say that so many are on their way."""
        ...


class Waker:
    """Wakes runs for one worker. ``watch`` runs for as long as the worker serves."""

    def __init__(
        self,
        store: Store,
        journal: Journal,
        clock: Clock,
        open_router: Callable[[], Awaitable[Gate]],
        resident: Mapping[str, Execution],
        executable: Callable[[], tuple[Mapping[str, str], Sequence[str] | None, Sequence[str]]],
        places: Callable[[], int],
        poke: Callable[[], None],
    ) -> None:
        """``resident`` are the runs in memory, ``places`` gives how many more this worker has room for.

        ``executable`` gives what this worker may execute: workflows by name and version, roots (``None``: any), and
        roots that it accepts whatever their version.
        """
        self._store = store
        self._journal = journal
        self._clock = clock
        self._open_router = open_router
        self._resident = resident
        self._executable = executable
        self._places = places
        self._poke = poke
        self._stir = anyio.Event()
        self._parked: list[str] = []
        self._listed_at = float("-inf")
        self._turn = 0
        self._complained: set[str] = set()

    def stir(self) -> None:
        """Somebody waits now: look."""
        self._listed_at = float("-inf")
        self._stir.set()

    async def watch(self) -> None:
        """Ask and wake until cancelled; while nobody waits, only the list is read, once a second."""
        while True:
            waiting: list[str] = []
            try:
                waiting = await self._conditions()
                for awaits in self._in_turn(waiting):
                    await self._wake(awaits)
            except Exception as error:  # the database fails, or the router cannot be opened; this task ends the worker
                waiting = []
                self._complain("", error)
            await self._pause(ASK_SECONDS if waiting else LIST_SECONDS)

    async def _pause(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            await self._stir.wait()
            self._stir = anyio.Event()
            await anyio.sleep(ASK_SECONDS)

    async def _conditions(self) -> list[str]:
        now = anyio.current_time()
        if now - self._listed_at >= LIST_SECONDS:
            self._listed_at = now
            self._parked = await self._store.read(self._store.awaited)
        here = (wait.awaits for run in self._resident.values() for wait in run.blocked.values() if wait.awaits)
        return list(dict.fromkeys((*here, *self._parked)))

    def _in_turn(self, waiting: list[str]) -> list[str]:
        """Return what to ask for this time: all conditions on models, and of those on money the next few."""
        money = [awaits for awaits in waiting if not awaits.startswith('["route"')]
        if len(money) <= MONEY_AT_ONCE:
            return waiting
        start = self._turn if self._turn < len(money) else 0
        self._turn = start + MONEY_AT_ONCE
        later = {*money[:start], *money[start + MONEY_AT_ONCE :]}
        return [awaits for awaits in waiting if awaits not in later]

    async def _wake(self, awaits: str) -> None:
        router = await self._open_router()
        room, part = await self._room(router, awaits)
        if room <= 0:
            return
        freed = self._free_blocked(awaits, room)
        woken: list[str] = []
        rest = min(room - freed, self._places())  # a worker that is full leaves them to others
        if rest > 0 and awaits in self._parked:
            woken = await self._journal.do(lambda connection: self._wake_parked(connection, awaits, rest))
            if not woken:
                self._parked.remove(awaits)
        router.expect(part, freed + len(woken))
        if woken:
            self._poke()

    async def _room(self, router: Gate, awaits: str) -> tuple[int, str]:
        """How many may come, and by which of the conditions of which one has to hold."""
        rooms: list[tuple[int, str]] = []
        for part in parts_of(awaits):
            try:
                rooms.append((await router.room(part), part))
            except (ConfigError, ValueError, TypeError) as error:  # written by another version, perhaps
                self._complain(part, error)
        return max(rooms, default=(0, awaits))

    def _wake_parked(self, connection: Connection, awaits: str, limit: int) -> list[str]:
        workflows, roots, accepted = self._executable()
        return self._store.wake_awaiting(connection, awaits, self._clock.now(), workflows, limit, roots, accepted)

    def _free_blocked(self, awaits: str, limit: int) -> int:
        """Let blocked branches go on, the most urgent first."""
        waits: list[tuple[int, int, Blocked]] = [
            (-run.info.priority, run.tried, wait)
            for run in self._resident.values()
            for wait in run.blocked.values()
            if wait.awaits == awaits and not wait.event.is_set()
        ]
        waits.sort(key=lambda each: each[:2])
        for _, _, wait in waits[:limit]:
            wait.event.set()
        return len(waits[:limit])

    def _complain(self, awaits: str, error: Exception) -> None:
        """Say it once, not ten times a second."""
        about = f"{awaits} {error}"
        if about not in self._complained:
            self._complained.add(about)
            log.warning("runs that wait for %s cannot be woken: %s", awaits or "models", error)
