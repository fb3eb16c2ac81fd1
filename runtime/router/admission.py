"""Who may call now: places at a deployment, rate limits, and the queue of those who have to wait.

A call that finds a place takes it at once. The others wait in one queue a route, in the order of arrival plus half a
minute for each class below ``critical``: so a ``low`` call overtakes a ``high`` one that came a minute later, and
nobody starves. Who cannot be served keeps a claim on the deployments that he waits for, whichever queue he is in; who
is behind him gets only what nobody in front of him waits for. The queue is bounded. When it is full the lowest class
goes, newest first, with an error that carries the wait; refusing early what could only time out is what keeps an
overloaded system useful (*Site Reliability Engineering*, chapter 21).

A quota scope is what shares one rate limit: an account, a key, a region. Whether it is shut is another thing than
whether a deployment is well, so a 429 shuts the scope for all of its deployments and speaks against none of them.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Literal

import anyio

from ridethrough.runtime.config import RateLimits
from ridethrough.runtime.errors import ConfigError, ModelError
from ridethrough.runtime.router.context import PRIORITIES, PriorityClass
from ridethrough.runtime.router.limits import Window

CLASS_SECONDS = 30.0
"""What a priority class is worth in waiting time."""

TRY_SECONDS = 10.0
"""What a failed attempt costs in the order: who has tried already lets others find out whether it goes again."""

ORDINARY_TOKENS, LEAST_REST = 2000.0, 0.5
"""What a call is taken to need of a window of tokens, and the seconds that are waited at least for a used-up one."""

LONGEST_REST = 3600.0

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
        self.shut_until = self.forgiven = -math.inf
        self.refused_at = self.heard_at = -math.inf
        """When this process was refused by the provider itself, and when it heard of another's refusal."""
        self.reason: ShutReason = ""
        self.detail = ""
        self.buckets: dict[str, Bucket] = {}
        self.windows: dict[str, Window] = {}
        self._random = random or Random()
        self._last_wait = 0.0
        self._hinted = 0

    def is_open(self, now: float) -> bool:
        """Whether calls may be made."""
        return now >= self.shut_until

    def shut(self, now: float, reason: ShutReason, seconds: float | None, detail: str) -> float:
        """Shut it until the later of the old and the new time; returns the seconds that are to be waited.

        A hint is a floor: a server that refuses again and again is left alone for longer than it asks, each time.
        Without a hint the wait is decorrelated jitter (Brooker, "Exponential backoff and jitter", 2015). What was
        refused while it is shut (fifty calls that were under way together) is one refusal.
        """
        known = now < self.shut_until
        if seconds is not None and 0 <= seconds < math.inf:
            wait = max(seconds, 0.0 if known else self._beyond_hint(reason))
        elif known:
            wait = 0.0 if reason == self.reason else _FIRST_WAIT[reason]
        else:
            wait = self._backoff(reason)
        if now + wait >= self.shut_until:
            self.shut_until, self.reason, self.detail = now + wait, reason, detail
        return self.shut_until - now

    def _beyond_hint(self, reason: ShutReason) -> float:
        """Return the least wait after a hint: nothing at first, then a fifth of the usual first one, doubled."""
        self._hinted += 1
        if self._hinted == 1:
            return 0.0
        return min(_LONGEST_WAIT[reason], 0.2 * _FIRST_WAIT[reason] * 2.0 ** min(30, self._hinted - 2))

    def _backoff(self, reason: ShutReason) -> float:
        first = _FIRST_WAIT[reason]
        longest = max(first, 3.0 * self._last_wait)
        self._last_wait = min(_LONGEST_WAIT[reason], first + (longest - first) * self._random.random())
        return self._last_wait

    def reopen(self, now: float) -> None:
        """What it was shut for is mended, somebody says: the next call tells."""
        if not self.is_open(now):
            self.forgiven, self.shut_until = self.shut_until, now
            self.answered()

    def answered(self) -> None:
        """A call went through: the next wait is a short one."""
        self._last_wait, self._hinted = 0.0, 0

    def limit(self, limits: RateLimits) -> None:
        """Bind it to configured rates; several deployments of one scope share the lowest."""
        for kind, per_minute in (("requests", limits.rpm), ("tokens", limits.tpm)):
            if per_minute is not None:
                known = self.buckets.get(kind)
                if known is None or per_minute / 60.0 < known.rate:
                    self.buckets[kind] = Bucket(per_minute / 60.0)

    def learn(self, windows: Iterable[Window], now: float, wall: float) -> None:
        """Take what the provider says of its limits: a window that is used up shuts the scope for a while."""
        for window in windows:
            self.windows[window.kind] = window
            if rest := _rest_of(window, wall):
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

    def give_back(self, now: float, tokens: float) -> None:
        """The call was not made: book the contrary."""
        for kind, need in _needs(tokens):
            if kind in self.buckets:
                self.buckets[kind].take(now, -need)

    def correct(self, now: float, estimated: float, used: float) -> None:
        """Book what a call really used in the place of its estimate."""
        if "tokens" in self.buckets:
            self.buckets["tokens"].take(now, used - estimated)


def _rest_of(window: Window, wall: float) -> float:
    """Return the seconds until a used-up window has room for a call; 0 when it is not used up.

    The windows of most providers are buckets that fill steadily, and their reset is when they are full again: to wait
    for that would waste nearly all of a small limit. A fixed window answers 429 once more and says how long.
    """
    if window.remaining is None or window.remaining >= 1 or window.resets_at is None:
        return 0.0
    rest = window.resets_at - wall
    if not 0 < rest <= LONGEST_REST:
        return 0.0  # in the past, absurd, or no number: it says nothing
    if window.limit and window.per_seconds:
        need = 1.0 if window.kind == "requests" else ORDINARY_TOKENS
        rest = min(rest, max(LEAST_REST, need * window.per_seconds / window.limit))
    return rest


def _needs(tokens: float) -> tuple[tuple[str, float], ...]:
    return (("requests", 1.0), ("tokens", tokens))


class Bucket:
    """A token bucket: fills steadily, and holds ten seconds' worth (at least one request)."""

    DEEPEST = 600.0
    """How many seconds' worth it can be in debt: a call that is said to have used a billion must not shut it."""

    def __init__(self, rate: float) -> None:
        """``rate`` is a second."""
        self.rate = rate
        self.size = max(1.0, 10.0 * rate)
        self._level = self.size
        self._at: float | None = None

    def wait(self, now: float, need: float) -> float:
        """Return the seconds until ``need`` is there. A call larger than the bucket waits until it is full."""
        missing = min(need, self.size) - self._fill(now)
        return missing / self.rate if missing > 1e-6 else 0.0  # what is missing by rounding alone is not missing

    def take(self, now: float, need: float) -> None:
        """Take it; the level may go below zero, and a negative need gives back."""
        if math.isfinite(need):
            self._level = max(-self.DEEPEST * self.rate, min(self.size, self._fill(now) - need))

    def _fill(self, now: float) -> float:
        if self._at is None or now > self._at:
            self._level = min(self.size, self._level + self.rate * (now - (self._at if self._at is not None else now)))
            self._at = now
        return self._level


class Retries:
    """What one deployment may be asked again by calls that it has failed already (the AWS SDKs' retry quota).

    A retry takes one token, after a time-out two, and ten answers give one back. So a deployment that fails a little is
    tried again at once, and one that fails everybody is not asked three times as often for it.
    """

    MOST, EARNED = 10.0, 0.1

    def __init__(self) -> None:
        self.tokens = self.MOST

    def earn(self) -> None:
        """A call was answered."""
        self.tokens = min(self.MOST, self.tokens + self.EARNED)

    def take(self, cost: float) -> bool:
        """Whether one more retry may be made."""
        if self.tokens < cost:
            return False
        self.tokens -= cost
        return True


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

LOOK_AHEAD = 100
"""How many in a queue who cannot be served are passed over to find one who can, who waits for other deployments."""


@dataclass(eq=False)
class Waiter:
    """A call that waits for one of the deployments ``names``, after so many failed ``tries``.

    ``granted`` is what it was given, ``refused`` an error that it is to raise, ``shed`` says that it has to go.
    """

    priority: PriorityClass
    since: float
    names: frozenset[str] = frozenset()
    tries: int = 0
    event: anyio.Event = field(default_factory=anyio.Event)
    granted: object | None = None
    refused: ModelError | ConfigError | None = None
    shed: bool = False
    gone: bool = False

    def __post_init__(self) -> None:
        """Its place in the order never changes."""
        rank = PRIORITIES.index(self.priority)
        number = next(_numbers)
        self.key = (self.since + CLASS_SECONDS * rank + TRY_SECONDS * self.tries, number)
        self.worth = (rank, self.since, number)


Grant = Callable[[Waiter, Collection[str]], object | None]
"""Takes a place for a waiter at a deployment that is not among the named ones, if there is one."""


class Queue:
    """Those who wait for the same choice of deployments, the most urgent first."""

    def __init__(self, bound: int) -> None:
        """``bound`` is how many may wait."""
        self.bound = bound
        self.names: set[str] = set()
        """The deployments that anybody here may be waiting for."""
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
        self.names |= waiter.names
        self._count += 1
        if self._count > self.bound:
            victim = max((each for _, each in self._heap if not each.gone), key=lambda each: each.worth)
            victim.shed = True
            self.leave(victim)
            victim.event.set()

    def leave(self, waiter: Waiter) -> None:
        """Go away, with or without a place."""
        if waiter.gone:
            return
        waiter.gone = True
        self._count -= 1
        if len(self._heap) > 2 * self._count + 64:  # behind one who waits for long many may come and go
            self._heap = [(key, each) for key, each in self._heap if not each.gone]
            heapq.heapify(self._heap)

    def first(self) -> Waiter | None:
        """Return the most urgent one."""
        while self._heap and self._heap[0][1].gone:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pass_over(self, waiter: Waiter) -> None:
        """Look at who comes after ``waiter``, the first one, until he is put back."""
        assert heapq.heappop(self._heap)[1] is waiter

    def put_back(self, waiter: Waiter) -> None:
        """Put back who was passed over."""
        if not waiter.gone:
            heapq.heappush(self._heap, (waiter.key, waiter))

    def settle(self, waiter: Waiter, grant: Grant, claimed: Collection[str], now: float) -> bool:
        """Give a waiter what ``grant`` has for him, or the error that it raises; false when it has nothing."""
        try:
            waiter.granted = grant(waiter, claimed)
        except (ConfigError, ModelError) as error:
            waiter.refused = error
        if waiter.granted is None and waiter.refused is None:
            return False
        self.leave(waiter)
        waiter.event.set()
        self._note_grant(now)
        return True

    def wait_of(self, now: float) -> float:
        """Estimate the seconds that a newcomer would wait: the queue by the rate at which it was served lately."""
        rate = self._rate if self._rate_at is not None and now - self._rate_at < 30 else 0.0
        return min(300.0, max(1.0, self._count / rate if rate > 0 else 1.0 + 0.1 * self._count))

    def _note_grant(self, now: float) -> None:
        self._granted += 1
        if self._rate_at is None:
            self._rate_at = now
        elif now - self._rate_at >= 1.0:
            rate = self._granted / (now - self._rate_at)
            self._rate = rate if not self._rate else 0.5 * (self._rate + rate)
            self._rate_at, self._granted = now, 0


def serve(queues: Collection[Queue], grant: Grant, wanted: Callable[[Waiter], set[str]], now: float) -> None:
    """Give places to those who wait, the most urgent of all queues first, for as long as there are any.

    Args:
        queues: All queues.
        grant: Takes a place for a waiter.
        wanted: Names the deployments that could serve a waiter, places and rates aside.
        now: Seconds.
    """
    claimed: set[str] = set()
    passed: dict[Queue, list[Waiter]] = {queue: [] for queue in queues}
    try:
        while (found := _most_urgent(passed, claimed)) is not None:
            queue, waiter = found
            wants = wanted(waiter) - claimed
            if wants and queue.settle(waiter, grant, claimed, now):
                continue
            claimed |= wants
            queue.pass_over(waiter)
            passed[queue].append(waiter)
    finally:
        for queue, waiters in passed.items():
            for waiter in waiters:
                queue.put_back(waiter)


def _most_urgent(passed: Mapping[Queue, list[Waiter]], claimed: set[str]) -> tuple[Queue, Waiter] | None:
    """Return who is the first of those that may be waiting for something that nobody has a claim on."""
    open_ones = [queue for queue, over in passed.items() if len(over) < LOOK_AHEAD and not queue.names <= claimed]
    firsts = [(queue, queue.first()) for queue in open_ones]
    waiting = [(queue, waiter) for queue, waiter in firsts if waiter is not None]
    return min(waiting, key=lambda each: each[1].key, default=None)
