"""Who may call now: places at a deployment, rate limits, and the queue of those who have to wait.

A call that finds a place takes it at once. The others wait in one queue a route, in the order of arrival plus half a
minute for each class below ``critical``: so a ``low`` call overtakes a ``high`` one that came a minute later, and
nobody starves. The queue is bounded. When it is full the lowest class goes, newest first, with an error that carries
the wait; refusing early what could only time out is what keeps an overloaded system useful (*Site Reliability
Engineering*, chapter 21).

A quota scope is what shares one rate limit: an account, a key, a region. Whether it is shut is another thing than
whether a deployment is well, so a 429 shuts the scope for all of its deployments and speaks against none of them.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Literal

import anyio

from ridethrough.runtime.config import RateLimits
from ridethrough.runtime.router.context import PRIORITIES, PriorityClass
from ridethrough.runtime.router.limits import Window

CLASS_SECONDS = 30.0
"""What a priority class is worth in waiting time."""

TRY_SECONDS = 10.0
"""What a failed attempt costs in the order: who has tried already lets others find out whether it goes again."""

ShutReason = Literal["", "rate", "quota", "auth"]
SHUT_REASONS: tuple[ShutReason, ...] = ("rate", "quota", "auth")

_FIRST_WAIT: dict[ShutReason, float] = {"rate": 1.0, "quota": 300.0, "auth": 60.0}
_LONGEST_WAIT: dict[ShutReason, float] = {"rate": 60.0, "quota": 3600.0, "auth": 900.0}


# --- quota scopes ---------------------------------------------------------------------------------------------------


class Scope:
    """What shares one rate limit or one credential. Times are monotonic seconds."""

    def __init__(self, name: str, random: Random | None = None) -> None:
        """``name`` is for people."""
        self.name = name
        self.shut_until = -math.inf
        self.reason: ShutReason = ""
        self.detail = ""
        self.buckets: dict[str, Bucket] = {}
        self.windows: dict[str, Window] = {}
        self._random = random or Random()
        self._last_wait = 0.0

    def is_open(self, now: float) -> bool:
        """Whether calls may be made."""
        return now >= self.shut_until

    def shut(self, now: float, reason: ShutReason, seconds: float | None, detail: str) -> float:
        """Shut it until the later of the old and the new time; returns the seconds that are to be waited.

        Without a hint the wait is decorrelated jitter (Brooker, "Exponential backoff and jitter", 2015).
        """
        first = _FIRST_WAIT[reason]
        if seconds is None:
            longest = max(first, 3.0 * self._last_wait)
            seconds = min(_LONGEST_WAIT[reason], first + (longest - first) * self._random.random())
            self._last_wait = seconds
        if now + seconds >= self.shut_until:
            self.shut_until, self.reason, self.detail = now + seconds, reason, detail
        return self.shut_until - now

    def answered(self) -> None:
        """A call went through: the next wait without a hint is a short one."""
        self._last_wait = 0.0

    def limit(self, limits: RateLimits) -> None:
        """Bind it to configured rates; several deployments of one scope share the lowest."""
        for kind, per_minute in (("requests", limits.rpm), ("tokens", limits.tpm)):
            if per_minute is not None:
                known = self.buckets.get(kind)
                if known is None or per_minute / 60.0 < known.rate:
                    self.buckets[kind] = Bucket(per_minute / 60.0)

    def learn(self, windows: Iterable[Window], now: float, wall: float) -> None:
        """Take what the provider says of its limits: a window that is used up shuts the scope until its reset."""
        for window in windows:
            self.windows[window.kind] = window
            if window.remaining is not None and window.remaining < 1 and window.resets_at is not None:
                rest = window.resets_at - wall
                if 0 < rest <= 3600:
                    self.shut(now, "rate", rest, f"its {window.kind} are used up, by its provider's own count")

    def wait(self, now: float, tokens: float) -> float:
        """Return the seconds until a call of so many tokens may begin: 0 when it may now."""
        if now < self.shut_until:
            return self.shut_until - now
        waits = [self.buckets[kind].wait(now, need) for kind, need in _needs(tokens) if kind in self.buckets]
        return max(waits, default=0.0)

    def take(self, now: float, tokens: float) -> None:
        """Book a call."""
        for kind, need in _needs(tokens):
            if kind in self.buckets:
                self.buckets[kind].take(now, need)

    def correct(self, now: float, estimated: float, used: float) -> None:
        """Book what a call really used in the place of its estimate."""
        if "tokens" in self.buckets:
            self.buckets["tokens"].take(now, used - estimated)


def _needs(tokens: float) -> tuple[tuple[str, float], ...]:
    return (("requests", 1.0), ("tokens", tokens))


class Bucket:
    """A token bucket: fills steadily, and holds ten seconds' worth (at least one request)."""

    def __init__(self, rate: float) -> None:
        """``rate`` is a second."""
        self.rate = rate
        self.size = max(1.0, 10.0 * rate)
        self._level = self.size
        self._at: float | None = None

    def wait(self, now: float, need: float) -> float:
        """Return the seconds until ``need`` is there. A call larger than the bucket waits until it is full."""
        missing = min(need, self.size) - self._fill(now)
        return max(0.0, missing / self.rate)

    def take(self, now: float, need: float) -> None:
        """Take it; the level may go below zero, and a negative need gives back."""
        self._level = min(self.size, self._fill(now) - need)

    def _fill(self, now: float) -> float:
        if self._at is not None and now > self._at:
            self._level = min(self.size, self._level + self.rate * (now - self._at))
        self._at = now
        return self._level


# --- places ---------------------------------------------------------------------------------------------------------


class Places:
    """How many calls a deployment takes at once: what was configured, else what it shows to bear.

    Servers such as vLLM never say no, they only get slow. So the bound grows by one with each good answer while it is
    needed (which doubles it in every round trip), and shrinks by a third, at most once a round trip, when calls fail
    for overload or take more than twice their usual time. (Additive increase is what TCP does; Netflix's
    concurrency-limits has the gradient that inspired it.)
    """

    FIRST, LEAST, MOST = 100, 4, 10_000

    def __init__(self, fixed: int | None) -> None:
        """``fixed`` is a configured bound, which nothing changes."""
        self.fixed = fixed
        self.limit = fixed if fixed is not None else self.FIRST
        self._shrunk_at = -math.inf

    def good(self, flight: int, seconds: float, usual: float | None, now: float) -> None:
        """An answer came after ``seconds``, with ``flight`` calls under way."""
        if self.fixed is not None or 2 * flight < self.limit:
            return
        if usual is not None and seconds > max(2.0 * usual, usual + 0.25):
            self._shrink(now, usual, 0.9)
        elif self.limit < self.MOST:
            self.limit += 1

    def overloaded(self, now: float, usual: float | None) -> None:
        """The server refused a call, or let it starve."""
        if self.fixed is None:
            self._shrink(now, usual or 1.0, 0.7)

    def _shrink(self, now: float, usual: float, factor: float) -> None:
        if now - self._shrunk_at >= usual:
            self.limit, self._shrunk_at = max(self.LEAST, int(self.limit * factor)), now


# --- the queue ------------------------------------------------------------------------------------------------------

_numbers = itertools.count()


@dataclass(eq=False)
class Waiter:
    """A call that waits. ``granted`` is what it was given, ``shed`` says that it has to go."""

    priority: PriorityClass
    since: float
    tries: int = 0
    event: anyio.Event = field(default_factory=anyio.Event)
    granted: object | None = None
    shed: bool = False
    gone: bool = False

    def __post_init__(self) -> None:
        """Its place in the order never changes."""
        rank = PRIORITIES.index(self.priority)
        self.rank = rank
        self.key = (self.since + CLASS_SECONDS * rank + TRY_SECONDS * self.tries, next(_numbers))


class Queue:
    """Those who wait for one and the same choice of deployments, the most urgent first."""

    def __init__(self, bound: int) -> None:
        """``bound`` is how many may wait."""
        self.bound = bound
        self._heap: list[tuple[tuple[float, int], Waiter]] = []
        self._count = 0
        self._granted = 0
        self._rate = 0.0
        self._rate_at: float | None = None

    def __len__(self) -> int:
        """How many wait."""
        return self._count

    def join(self, waiter: Waiter) -> None:
        """Queue up; in a full queue the lowest class, newest first, is shed: perhaps this one."""
        heapq.heappush(self._heap, (waiter.key, waiter))
        self._count += 1
        if self._count > self.bound:
            victim = max((each for _, each in self._heap if not each.gone), key=lambda each: (each.rank, each.since))
            victim.shed = True
            self.leave(victim)
            victim.event.set()

    def leave(self, waiter: Waiter) -> None:
        """Go away, with or without a place."""
        if not waiter.gone:
            waiter.gone = True
            self._count -= 1

    def serve(self, grant: Callable[[Waiter], object | None], now: float) -> None:
        """Give places to the first ones for as long as ``grant`` has any."""
        while (first := self.first()) is not None:
            place = grant(first)
            if place is None:
                return
            heapq.heappop(self._heap)
            self.leave(first)
            first.granted = place
            first.event.set()
            self._note_grant(now)

    def wait_of(self, now: float) -> float:
        """Estimate the seconds that a newcomer would wait: the queue by the rate at which it was served lately."""
        rate = self._rate if self._rate_at is not None and now - self._rate_at < 30 else 0.0
        return min(300.0, max(1.0, self._count / rate if rate > 0 else 1.0 + 0.1 * self._count))

    def first(self) -> Waiter | None:
        """Return the most urgent one."""
        while self._heap and self._heap[0][1].gone:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def _note_grant(self, now: float) -> None:
        self._granted += 1
        if self._rate_at is None:
            self._rate_at = now
        elif now - self._rate_at >= 1.0:
            rate = self._granted / (now - self._rate_at)
            self._rate = rate if not self._rate else 0.5 * (self._rate + rate)
            self._rate_at, self._granted = now, 0
