"""Sandboxes that are ready before anybody asks: to acquire one of them takes milliseconds, to start one a third of a
second.

    acquire --warm one there--> hand out --release--> never used: back to its shelf; used: removed
       |                           ^
       +--none: start one----------+            in the background: each shelf is kept at its target

What a warm sandbox is made from (image, limits, network) must be what is asked for; what is applied to each call (its
environment) need not. How many are kept follows demand: as many as were acquired within one burst in the last minute,
at least ``profile.warm`` and at most ``MOST``; none for a profile that nobody has asked for in ``IDLE_SECONDS``.

A used sandbox is never handed out again. That nothing is left of a call can be proved by asking what runs in it, but
the answer would come from where the call has been.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final

import anyio
from anyio.abc import TaskGroup

from ridethrough.runtime.clock import Clock, SystemClock
from ridethrough.runtime.errors import SandboxError, UsageError
from ridethrough.sandboxes.attached import AttachedSandbox
from ridethrough.sandboxes.groups import task_group
from ridethrough.sandboxes.plain import PlainSandbox
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import Host, Sandbox

MOST: Final = 8
"""Warm sandboxes of one profile."""

BURST_SECONDS: Final = 2.0
"""Acquisitions within that time are one burst: about as long as a new sandbox takes where many start at once."""

DEMAND_SECONDS: Final = 60.0
IDLE_SECONDS: Final = 300.0

CHECK_SECONDS: Final = 15.0
"""How often those that wait are asked whether they live."""

ALIVE_SECONDS: Final = 1.0
"""How long one may take to say so."""

AT_ONCE: Final = 2
"""Sandboxes that are started in the background at the same time; those who wait for one go first."""

LONGEST_BACKOFF: Final = 60.0
CLOSE_SECONDS: Final = 60.0

Before = Callable[[str, SandboxProfile], Awaitable[None]]
After = Callable[[str], Awaitable[None]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """What a pool has and has done.

    Attributes:
        warm: Ready ones, by profile.
        target: How many there should be, by profile.
        starting: Being started in the background.
        hits: Acquisitions that found a warm one.
        misses: Those that had to wait for a new one.
        replaced: Warm ones that were found dead.
        failures: Starts in the background that failed.
    """

    warm: Mapping[str, int]
    target: Mapping[str, int]
    starting: int
    hits: int
    misses: int
    replaced: int
    failures: int


@dataclass(slots=True)
class _Shelf:
    """The warm sandboxes of one make, the freshest at the end."""

    make: SandboxProfile
    warm: int
    ready: list[Sandbox] = field(default_factory=list[Sandbox])
    asked: deque[float] = field(default_factory=lambda: deque(maxlen=8 * MOST))
    starting: int = 0
    failed: int = 0
    not_before: float = 0.0
    checked_at: float = 0.0

    def target(self, now: float) -> int:
        """How many should be ready."""
        if not self.asked or now - self.asked[-1] > IDLE_SECONDS or self.warm == 0:
            return 0
        return min(MOST, max(self.warm, self._burst(now)))

    def _burst(self, now: float) -> int:
        """The most acquisitions within ``BURST_SECONDS`` during the last minute; the last one of all is kept."""
        while len(self.asked) > 1 and self.asked[0] < now - DEMAND_SECONDS:
            self.asked.popleft()
        times, first, most = list(self.asked), 0, 0
        for last, time in enumerate(times):
            while times[first] <= time - BURST_SECONDS:
                first += 1
            most = max(most, last - first + 1)
        return most

    def changes_at(self, now: float) -> float:
        """When the target may be another one although nobody asks."""
        soonest = min((time + DEMAND_SECONDS for time in self.asked), default=now)
        return max(soonest, now + 1.0) if len(self.asked) > 1 else self.asked[-1] + IDLE_SECONDS + 0.001


def _make_of(profile: SandboxProfile) -> SandboxProfile:
    """What of a profile the container itself is made from: the rest is applied to what is done with it."""
    return replace(profile, env={}, snapshot_limit=0, warm=0)


def _dressed(sandbox: Sandbox, profile: SandboxProfile) -> Sandbox:
    """A warm sandbox, made without an environment of its own, as one of ``profile``."""
    sandbox.profile = profile
    if isinstance(sandbox, AttachedSandbox | PlainSandbox):
        sandbox.environment = {**sandbox.environment, **profile.env}
    return sandbox


class Pool:
    """Warm sandboxes of one host. Open it with ``async with Pool.open(host) as pool``."""

    def __init__(
        self,
        host: Host,
        group: TaskGroup,
        *,
        before: Before | None,
        after: After | None,
        labels: Mapping[str, str],
        linger: float,
        clock: Clock,
    ) -> None:
        """Use ``Pool.open``."""
        self._host = host
        self._group = group
        self._before = before
        self._after = after
        self._labels = dict(labels)
        self._linger = linger
        self._clock = clock
        self._shelves: list[_Shelf] = []
        self._changed = anyio.Event()
        self._making: set[str] = set()
        self._hits = self._misses = self._replaced = self._failures = 0
        self._closed = False

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        host: Host,
        *,
        before: Before | None = None,
        after: After | None = None,
        labels: Mapping[str, str] | None = None,
        linger: float = 30.0,
        clock: Clock | None = None,
    ) -> AsyncGenerator[Pool]:
        """A pool of sandboxes of ``host``; when it is left the warm ones are removed, those handed out are not.

        Args:
            host: Where they live.
            before: Awaited with a sandbox's id and profile before it is created: that it is to be is then on record.
            after: Awaited with its id when it is removed, or was never made.
            labels: Put on each.
            linger: Seconds that a sandbox lives on when its host's process has died.
            clock: The time by which demand is counted.
        """
        async with task_group() as group:
            pool = cls(
                host,
                group,
                before=before,
                after=after,
                labels=labels or {},
                linger=linger,
                clock=clock or SystemClock(),
            )
            group.start_soon(pool._keep)
            try:
                yield pool
            finally:
                group.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    await pool._close()

    # --- for callers ------------------------------------------------------------------------------------------------

    async def acquire(self, profile: SandboxProfile) -> Sandbox:
        """A sandbox that nobody has used.

        Raises:
            SandboxUnavailable: none can be started.
            UsageError: the pool is closed.
        """
        if self._closed:
            raise UsageError("the pool is closed: acquire sandboxes inside `async with Pool.open(...)`")
        shelf = self._shelf(profile)
        shelf.warm = profile.warm
        shelf.asked.append(self._clock.now())
        self._wake()
        while shelf.ready:
            sandbox = shelf.ready.pop()
            if await self._is_alive(sandbox, shelf):
                self._hits += 1
                return _dressed(sandbox, profile)
        self._misses += 1
        return await self._create(profile)

    async def release(self, sandbox: Sandbox, used: bool) -> None:
        """Give a sandbox back. One that was ``used`` (a call, a file written) is removed, in the background.

        An acquired sandbox is its owner's: to close it is enough too, but ``after`` is not called then.
        """
        shelf = self._shelf(sandbox.profile)
        plain = not sandbox.profile.env  # an environment is put on once
        if plain and not used and not self._closed and len(shelf.ready) < shelf.target(self._clock.now()):
            shelf.ready.append(sandbox)
        elif self._closed:
            await self._discard(sandbox)
        else:
            self._remove_later(sandbox)

    def ids(self) -> list[str]:
        """Those that are warm or being started: what its owner has to keep alive on record."""
        return [*self._making, *(sandbox.id for shelf in self._shelves for sandbox in shelf.ready)]

    def statistics(self) -> PoolStatistics:
        """What it has and has done."""
        now = self._clock.now()
        return PoolStatistics(
            warm=self._by_name(lambda shelf: len(shelf.ready)),
            target=self._by_name(lambda shelf: shelf.target(now)),
            starting=sum(shelf.starting for shelf in self._shelves),
            hits=self._hits,
            misses=self._misses,
            replaced=self._replaced,
            failures=self._failures,
        )

    def _by_name(self, count: Callable[[_Shelf], int]) -> dict[str, int]:
        found: dict[str, int] = {}
        for shelf in self._shelves:
            found[shelf.make.name] = found.get(shelf.make.name, 0) + count(shelf)
        return found

    # --- one sandbox ------------------------------------------------------------------------------------------------

    def _shelf(self, profile: SandboxProfile) -> _Shelf:
        make = _make_of(profile)
        for shelf in self._shelves:
            if shelf.make == make:
                return shelf
        self._shelves.append(_Shelf(make, profile.warm, checked_at=self._clock.now()))
        return self._shelves[-1]

    async def _create(self, profile: SandboxProfile) -> Sandbox:
        """A new one, on record before it is there; nothing of it remains when that fails."""
        id = secrets.token_hex(6)
        self._making.add(id)
        try:
            if self._before is not None:
                await self._before(id, profile)
            return await self._host.create(profile, id=id, labels=self._labels, linger=self._linger)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._forget(id)
            raise
        finally:
            self._making.discard(id)

    async def _is_alive(self, sandbox: Sandbox, shelf: _Shelf) -> bool:
        """Whether one that was taken from its shelf answers, which is no use of it; if not it is removed."""
        try:
            with anyio.fail_after(ALIVE_SECONDS):
                await sandbox.stat(".")
        except (SandboxError, TimeoutError):
            self._replaced += 1
            self._remove_later(sandbox)
            return False
        except BaseException:  # whoever wanted it is gone
            self._put_back(sandbox, shelf)
            raise
        return True

    def _put_back(self, sandbox: Sandbox, shelf: _Shelf) -> None:
        if self._closed:
            self._remove_later(sandbox)
        else:
            shelf.ready.append(sandbox)

    def _remove_later(self, sandbox: Sandbox) -> None:
        self._group.start_soon(self._discard, sandbox)

    async def _discard(self, sandbox: Sandbox) -> None:
        """Remove one, to the end; what cannot be removed stays on record for the reaper."""
        with anyio.CancelScope(shield=True):
            try:
                await sandbox.aclose()
            except Exception as error:
                _log.warning("sandbox %s could not be removed: %s", sandbox.id, error)
            else:
                await self._forget(sandbox.id)

    async def _forget(self, id: str) -> None:
        try:
            if self._after is not None:
                await self._after(id)
        except Exception as error:
            _log.warning("sandbox %s is removed, and still on record: %s", id, error)

    # --- keeping them ready -----------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._changed.set()

    async def _keep(self) -> None:
        """Bring each shelf to its target, whenever something has changed or time may have changed it."""
        while True:
            self._changed = anyio.Event()
            now = self._clock.now()
            for shelf in self._shelves:
                self._look_after(shelf, now)
            await self._clock.wait(self._changed, min(map(self._next_look, self._shelves), default=None))

    def _look_after(self, shelf: _Shelf, now: float) -> None:
        target = shelf.target(now)
        while len(shelf.ready) > target:
            self._remove_later(shelf.ready.pop(0))
        if shelf.ready and now >= shelf.checked_at + CHECK_SECONDS:
            shelf.checked_at = now
            self._group.start_soon(self._check, shelf)
        while now >= shelf.not_before and len(shelf.ready) + shelf.starting < target and self._may_start():
            shelf.starting += 1
            self._group.start_soon(self._refill, shelf)

    def _may_start(self) -> bool:
        return sum(shelf.starting for shelf in self._shelves) < AT_ONCE

    def _next_look(self, shelf: _Shelf) -> float:
        now = self._clock.now()
        times = [shelf.changes_at(now)] if shelf.target(now) else []
        if shelf.ready:
            times.append(shelf.checked_at + CHECK_SECONDS)
        if shelf.not_before > now:
            times.append(shelf.not_before)
        return min(times, default=now + IDLE_SECONDS)

    async def _check(self, shelf: _Shelf) -> None:
        """Look at each of those that wait, the one that has waited longest first."""
        for _ in range(len(shelf.ready)):
            if not shelf.ready:
                break
            sandbox = shelf.ready.pop(0)
            if await self._is_alive(sandbox, shelf):
                self._put_back(sandbox, shelf)
        self._wake()

    async def _refill(self, shelf: _Shelf) -> None:
        try:
            self._put_back(await self._create(shelf.make), shelf)
            shelf.failed = 0
        except Exception as error:
            self._failures += 1
            shelf.failed += 1
            shelf.not_before = self._clock.now() + min(LONGEST_BACKOFF, 2.0 ** min(shelf.failed, 10) / 2)
            _log.warning("no sandbox of profile %s could be kept ready: %s", shelf.make.name, error)
        finally:
            shelf.starting -= 1
            self._wake()

    async def _close(self) -> None:
        """Remove what was kept ready, all at once and within bounds."""
        self._closed = True
        warm = [sandbox for shelf in self._shelves for sandbox in shelf.ready]
        for shelf in self._shelves:
            shelf.ready.clear()
        with anyio.move_on_after(CLOSE_SECONDS):
            async with anyio.create_task_group() as group:
                for sandbox in warm:
                    group.start_soon(self._discard, sandbox)
