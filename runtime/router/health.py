"""Whether a deployment is well: one breaker each, fed by outcomes, by slowness, and by the age of calls in flight.

    closed --trips--> open --delay over--> half_open --one real call answered--> ramping --1, 2, 4, 8 ...--> closed
                       ^                       |                                    |
                       +------- it fails ------+------------- two calls fail -------+

What makes it trip is the share of bad outcomes among the newest ones, not their number in a minute: a busy deployment
is found out in a fraction of a second, and old successes do not hide a new outage. A call in flight that has given no
output for much longer than its kind normally takes is a bad outcome already, and is let go when the breaker trips: in
a brownout callers would otherwise sit on the sick deployment until their deadlines. What was begun before the trip
proves nothing afterwards, neither way.

The way back is slow on purpose. A clock that lets everybody in again (the cooldown of most routers) floods a provider
that has just come back, and a crowd that has waited is larger than the usual one; so the ramp goes on, at no more than
one and a half times the usual rate, for as long as somebody waits.

When every deployment that a call may use is open, one that has answered somebody lately is asked all the same, one
call at a time (the last-healthy rule): a half of the answers is better than none. Three failures end that.

Sources: the circuit breaker of Nygard's *Release It!* and Envoy's outlier detection; "The tail at scale" (Dean and
Barroso, 2013) for latency-induced probation; the *Site Reliability Engineering* book, chapters 21 and 22, for what a
retry storm does. Times are seconds on any monotonic clock; every method is told what time it is.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from ridethrough.runtime.config import Timeouts
from ridethrough.runtime.errors import (
    Auth,
    ModelError,
    Overloaded,
    QuotaExhausted,
    RateLimited,
    ServerError,
    Slow,
    StreamBroken,
    Transport,
)

State = Literal["unknown", "closed", "open", "half_open", "ramping"]

COUNTED: tuple[type[ModelError], ...] = (Overloaded, ServerError, Transport, Slow, StreamBroken)
"""Errors that speak against a deployment. The others are the caller's, or the account's."""

PROVES_NOTHING: tuple[type[ModelError], ...] = (RateLimited, QuotaExhausted, Auth)
"""Answers of a gatekeeper: whether there is a model behind it, they do not tell."""

WINDOW, WINDOW_SECONDS = 20, 30.0
MIN_BAD, BAD_SHARE = 5, 0.5
LONELY_BAD, LONELY_SECONDS = 3, 2.0
"""With little traffic: so many bad outcomes, and no good one for so long."""

FIRST_DELAY, USUAL_LONGEST, LONGEST = 1.0, 3.0, 30.0
"""An open breaker waits 1, 2, 3, 3 ... seconds; after a long outage a tenth of its age, up to 30."""

RESORTS = 3
"""Failures in a row after which the last-healthy rule lets a deployment be."""

FIRST_STEPS = 8
"""The ramp goes at least to so many calls at once."""

NO_LIMIT = 1_000_000
HURRY = 1.5
"""How much faster than usual a backlog is let in."""

HURRIED_AT_LEAST, DOUBLED_EVERY = 30.0, 10.0
"""A backlog of usual size is gone after twice the time that it grew for, at least so many seconds. If somebody waits
still, then more is asked than used to be, and the rate is doubled every so many seconds: it must not become a law."""

RAMP_ENDS, RAMP_SLOWS = 0.3, 0.15
"""Shares of the newest outcomes on a ramp: two failures end it if they are so many, and each halves it that makes them
so many. (Not every failure: who fails one call in twenty on his best day would never be back.)"""

NEEDED_SECONDS, LOCKED_OUT_SECONDS = 60.0, 600.0
"""A deployment may have become slower for good. Measured by its own past it would never be back; so while it is asked
for by those who have no other, or after so long, each call that was to tell and was too slow doubles the patience."""


# --- what is normal -------------------------------------------------------------------------------------------------

SIZES = (2_000, 16_000, 64_000)
"""Bounds of the classes of prompt sizes, in tokens: a long prompt is slow, and that is normal for it."""

AT_LEAST = 1.0
"""Seconds without output that are never slow, unless the configuration says so: a busy machine stalls as long."""

ENOUGH, KEPT = 8, 128
STRETCHES = 16
"""How many stretches of half as many values are remembered besides."""


class Quantiles:
    """The newest values of something, and their quantiles; sorted only now and then."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=KEPT)
        self._sorted: list[float] = []
        self._fresh = 0
        self._stretch: list[float] = []
        self._stretches: deque[list[float]] = deque(maxlen=STRETCHES)
        self._best: dict[float, float] = {}

    def add(self, value: float) -> None:
        """Take a value."""
        self._values.append(value)
        self._fresh += 1
        self._stretch.append(value)
        if len(self._stretch) >= KEPT // 2:
            self._stretches.append(sorted(self._stretch))
            self._stretch.clear()
            self._best.clear()

    def __len__(self) -> int:
        """How many values there are."""
        return len(self._values)

    def at(self, share: float) -> float | None:
        """Return the quantile, ``None`` while there are too few values to speak of one."""
        if len(self._values) < ENOUGH:
            return None
        if not self._sorted or self._fresh >= ENOUGH:
            self._sorted, self._fresh = sorted(self._values), 0
        return _quantile(self._sorted, share)

    def at_best(self, share: float) -> float | None:
        """Return the quantile in the best of the last stretches: slowness that creeps in must not become normal."""
        now = self.at(share)
        if now is None or not self._stretches:
            return now
        if share not in self._best:
            self._best[share] = min(_quantile(stretch, share) for stretch in self._stretches)
        return min(now, self._best[share])


def _quantile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


class Normal:
    """What a deployment normally does: seconds to the first output by prompt size, and tokens a second."""

    def __init__(self) -> None:
        self.first = [Quantiles() for _ in range(len(SIZES) + 1)]
        self.any_first = Quantiles()
        self.rate = Quantiles()

    def add(self, size: int, first: float, rate: float | None) -> None:
        """Take what a good call did; ``size`` is its prompt in tokens."""
        self.first[bisect_right(SIZES, size)].add(first)
        self.any_first.add(first)
        if rate is not None:
            self.rate.add(rate)

    def first_at(self, size: int, share: float) -> float | None:
        """Return a quantile of the seconds to the first output, for prompts of that size where enough are known."""
        own = self.first[bisect_right(SIZES, size)].at(share)
        return own if own is not None else self.any_first.at(share)

    def slowest_first(self, size: int) -> float | None:
        """Return the seconds to the first output that 19 of 20 calls stay below when all is well."""
        own = self.first[bisect_right(SIZES, size)].at_best(0.95)
        return own if own is not None else self.any_first.at_best(0.95)


# --- the breaker ----------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Ticket:
    """A call in flight. ``free`` lets the caller go who waits for it in vain; it is ``held`` until it may be sent."""

    started: float
    generation: int
    size: int
    first_token: float | None = None
    overdue: bool = False
    free: Callable[[], None] | None = None
    held: bool = False


@dataclass(slots=True)
class _Ramp:
    """How many calls at once are let in after a recovery."""

    limit: int = 1
    good: int = 0
    tokens: float = 1.0
    filled: float = 0.0
    shut_since: float = 0.0
    begun: float | None = None

    def rate(self, usual: float, now: float) -> float:
        """Return how many calls a second are let in."""
        begun = now if self.begun is None else self.begun
        late = now - begun - max(HURRIED_AT_LEAST, 2.0 * (begun - self.shut_since))
        return HURRY * usual * math.pow(2.0, min(20.0, max(0.0, late / DOUBLED_EVERY)))


class Health:
    """The breaker of one deployment, and what is known of its speed."""

    def __init__(
        self,
        name: str,
        timeouts: Timeouts,
        *,
        random: Random | None = None,
        changed: Callable[[Health, State, str], None] | None = None,
    ) -> None:
        """``changed(health, old_state, why)`` is told of every change of state."""
        self.name = name
        self.timeouts = timeouts
        self.normal = Normal()
        self.state: State = "unknown"
        self.since: float | None = None
        self.open_until = 0.0
        self.flight: set[Ticket] = set()
        self.answered = self.failed = 0
        self.verdict, self.detail = "unknown", ""
        self.last_at: float | None = None
        self.usual_rate: float | None = None
        self.others_rate = 0.0
        """The usual rate of those who answer the same calls: what comes back comes back to all of them."""
        self.usual_flight = 0
        self.last_good = -math.inf
        self._random = random or Random()
        self._changed = changed
        self._generation = 0
        self._window: deque[tuple[float, bool]] = deque(maxlen=WINDOW)
        self._delays = 0
        self._tripped_at = 0.0
        self._probe: Ticket | None = None
        self._ramp = _Ramp()
        self._waited_for_until = -math.inf
        self._pulse = _Pulse()
        self._resort: Ticket | None = None
        self._resort_failures = 0
        self._needed_at = -math.inf
        self._patience = 1.0
        self._never_slow = min(AT_LEAST, timeouts.first_token)

    # --- before a call ----------------------------------------------------------------------------------------------

    def room(self, now: float) -> int:
        """Return how many more calls may begin now."""
        if self.state in ("closed", "unknown"):
            return NO_LIMIT
        if self.state == "open":
            return 1 if now >= self.open_until else 0
        if self.state == "half_open":
            return 0
        begun_since = sum(ticket.generation == self._generation for ticket in self.flight)
        return max(0, min(self._ramp.limit - begun_since, int(self._refilled(now))))

    @property
    def has_to_show(self) -> bool:
        """Whether the next call finds out if it is back."""
        return self.state in ("open", "half_open") or (self.state == "ramping" and self._ramp.limit == 1)

    def next_time(self, now: float) -> float:
        """Return when there may be room again, as far as the clock decides it: in the past when that is now."""
        if self.state == "open":
            return self.open_until
        return now if self.room(now) else now + 0.05

    def begin(self, now: float, size: int = 0) -> Ticket:
        """Begin a call with a prompt of ``size`` tokens; there must be room."""
        if self.state == "open":
            self._move("half_open", now, "one real call tells whether it is back")
        ticket = Ticket(now, self._generation, size)
        if self.state == "half_open" and self._probe is None:
            self._probe = ticket
        elif self.state == "ramping":
            self._ramp.tokens -= 1
            self._ramp.begun = now if self._ramp.begun is None else self._ramp.begun
        self.flight.add(ticket)
        self._pulse.count(now, len(self.flight))
        return ticket

    def begin_last_resort(self, now: float, size: int = 0) -> Ticket | None:
        """Begin a call although the breaker is open, if this one may be the last that still answers; else ``None``."""
        if self.state not in ("open", "half_open"):
            return None
        self._needed_at = now
        if self._resort is not None or self._resort_failures >= RESORTS or not self.still_answers(now):
            return None
        self._resort = Ticket(now, -1, size)
        self.flight.add(self._resort)
        return self._resort

    def begin_ping(self, now: float) -> Ticket:
        """Begin a call that is made whatever is known, and proves nothing."""
        return Ticket(now, -1, 0)

    def begun_beside(self) -> None:
        """Another one that answers the same calls has begun one: it was let in by the rate of this ramp too."""
        if self.state == "ramping":
            self._ramp.tokens = max(-1.0, self._ramp.tokens - 1)

    def awaited(self, now: float) -> None:
        """Somebody waits for this deployment: the ramp goes on for another second."""
        self._waited_for_until = now + 1.0
        self._needed_at = now

    # --- during and after a call ------------------------------------------------------------------------------------

    def progressed(self, ticket: Ticket, now: float) -> None:
        """The call gave its first output."""
        if ticket.first_token is None:
            ticket.first_token = now

    def end(self, ticket: Ticket, now: float, failure: ModelError | None, rate: float | None = None) -> None:
        """Take the outcome of a call; ``rate`` is in output tokens a second."""
        self.flight.discard(ticket)
        self.verdict = "ok" if failure is None else type(failure).__name__
        self.detail = "" if failure is None else failure.message
        self.last_at = now
        self.answered += failure is None
        self.failed += failure is not None
        self._end_resort(ticket, failure)
        if failure is None:
            self.last_good = now
            self.normal.add(ticket.size, (ticket.first_token or now) - ticket.started, rate)
        if ticket.generation == self._generation:
            self._judge(ticket, now, failure)

    def abandon(self, ticket: Ticket, now: float) -> None:
        """The caller has gone away (cancelled, or another attempt was quicker): that proves nothing by itself."""
        self.flight.discard(ticket)
        if ticket is self._resort:
            self._resort = None
        if ticket is self._probe:
            self._probe = None
            self._open_again(now, "the call that was to tell was given up")

    def withdraw(self, ticket: Ticket, now: float) -> None:
        """The call was not made after all: as if it had never begun."""
        self.flight.discard(ticket)
        if ticket is self._resort:
            self._resort = None
        if self.state == "ramping" and ticket.generation == self._generation:
            self._ramp.tokens += 1
        if ticket is self._probe:
            self._probe = None
            self.open_until = now
            self._move("open", now, "the call that was to tell was not made")

    def _end_resort(self, ticket: Ticket, failure: ModelError | None) -> None:
        if ticket is self._resort:
            self._resort = None
            self._resort_failures = 0 if failure is None else self._resort_failures + 1

    def _judge(self, ticket: Ticket, now: float, failure: ModelError | None) -> None:
        if isinstance(failure, PROVES_NOTHING):
            if ticket is self._probe:
                self._probe = None
                self._start_ramp(now, "it answers, but the account is limited")
            return
        bad = isinstance(failure, COUNTED)
        if self.state == "half_open" and ticket is self._probe:
            self._probe = None
            if bad:
                self._wait_longer(now, failure)
                self._open_again(now, f"still {self.verdict}")
            else:
                self._start_ramp(now, "it answers again")
                self._grow(now)
        elif ticket.overdue and bad:
            return  # it has been counted already
        elif self.state == "ramping":
            self._ramp_on(now, bad)
        else:
            self._count(now, bad)

    def _count(self, now: float, bad: bool) -> None:
        if self.state == "unknown":
            self._move("closed", now, "first outcome")
        self._window.append((now, bad))
        if bad and self._is_bad(now):
            self.trip(now, self._why(now))

    def _is_bad(self, now: float) -> bool:
        recent = self._recent(now)
        count = sum(recent)
        if count >= MIN_BAD and count >= BAD_SHARE * len(recent):
            return True
        return count >= LONELY_BAD and all(recent[-LONELY_BAD:]) and now - self.last_good >= LONELY_SECONDS

    def _recent(self, now: float) -> list[bool]:
        return [bad for at, bad in self._window if now - at <= WINDOW_SECONDS]

    def _why(self, now: float) -> str:
        recent = self._recent(now)
        return f"{sum(recent)} of the last {len(recent)} calls failed or were too slow, the last with {self.verdict}"

    def check(self, now: float) -> None:
        """Look at the age of calls in flight; to be called a few times a second while there are any."""
        late = [ticket for ticket in self.flight if self._is_late(ticket, now)]
        for ticket in late:
            ticket.overdue = True
            if ticket.generation == self._generation:
                self.verdict = "Slow"
                self._count_late(ticket, now)
        if late and self.state in ("open", "half_open"):
            self._free_stuck()
        if self.state == "ramping":
            self._finish_ramp(now)

    def stood_still(self, seconds: float, now: float) -> None:
        """This process did nothing for so long: a call without output is no older for it."""
        for ticket in self.flight:
            if ticket.first_token is None:
                ticket.started = min(now, ticket.started + seconds)

    def _count_late(self, ticket: Ticket, now: float) -> None:
        if ticket is self._probe:
            self._probe = None
            self._wait_longer(now, None)
            self._open_again(now, "the call that was to tell is too slow")
        elif self.state == "ramping":
            self._ramp_on(now, bad=True)
        else:
            self._count(now, bad=True)

    def _wait_longer(self, now: float, failure: ModelError | None) -> None:
        """The call that was to tell was slow (no failure: it is so still): perhaps that is what it does now."""
        slow = failure is None or isinstance(failure, Slow)
        if slow and (now - self._needed_at <= NEEDED_SECONDS or now - self._tripped_at >= LOCKED_OUT_SECONDS):
            self._patience = min(1000.0, 2.0 * self._patience)

    def _is_late(self, ticket: Ticket, now: float) -> bool:
        if ticket.first_token is not None or ticket.overdue or ticket.held:
            return False
        age = now - ticket.started
        return age > self._never_slow and age > self.slow_after(ticket.size)

    def slow_after(self, size: int = 0) -> float:
        """Return the seconds after which a call without output counts as slow: three times what is normal at most."""
        p95 = self.normal.slowest_first(size)
        ceiling = self.timeouts.first_token
        return ceiling if p95 is None else min(ceiling, self._patience * max(AT_LEAST, 3.0 * p95))

    def first_token_deadline(self, size: int = 0) -> float:
        """Return the seconds after which a call without output is ended even if it is the only slow one."""
        p95 = self.normal.slowest_first(size)
        ceiling = self.timeouts.first_token
        return ceiling if p95 is None else min(ceiling, max(5.0, 10.0 * p95, self.slow_after(size)))

    def hedge_after(self, size: int = 0) -> float | None:
        """Return the seconds after which a second attempt is worth it; ``None`` while nothing is known."""
        p95 = self.normal.slowest_first(size)
        return None if p95 is None else max(0.25, 2.5 * p95)

    def is_proven_slow(self, ticket: Ticket, now: float) -> bool:
        """Whether a call that its caller gives up now was slow: he may just have been in a hurry."""
        if ticket.first_token is not None:
            return False
        known = self.normal.first_at(ticket.size, 0.95) is not None
        return ticket.overdue or now - ticket.started > (self.slow_after(ticket.size) if known else 1.0)

    def least_rate(self) -> float | None:
        """Return the tokens a second below which a stream counts as slow: a tenth of what is normal."""
        median = self.normal.rate.at(0.5)
        floor = self.timeouts.tokens_per_second
        learned = None if median is None else median / (10.0 * self._patience)
        return max((rate for rate in (floor, learned) if rate is not None), default=None)

    def error_rate(self, now: float) -> float:
        """Return the share of bad outcomes among the newest ones, 0 when there are none."""
        recent = self._recent(now)
        return sum(recent) / len(recent) if recent else 0.0

    def still_answers(self, now: float) -> bool:
        """Whether it has answered somebody lately, bad as it is: of several sick ones the one to ask."""
        return now - self.last_good <= WINDOW_SECONDS / 3

    # --- changes of state -------------------------------------------------------------------------------------------

    def trip(self, now: float, why: str) -> None:
        """Open the breaker; calls in flight without output that are overdue are let go."""
        if self.state in ("closed", "unknown"):
            self._delays, self._tripped_at, self._resort_failures = 0, now, 0
            self.usual_rate = self._pulse.rate(now) or self.usual_rate
            self.usual_flight = self._pulse.peak or self.usual_flight
        self._open_again(now, why)
        self._free_stuck()

    def adopt(self, until: float, now: float, why: str) -> None:
        """Believe another worker that this deployment is not well until ``until``."""
        if self.state in ("closed", "unknown") and until > now:
            self.trip(now, why)
            self.open_until = max(self.open_until, min(until, now + LONGEST))  # another's clock may be wrong

    def expect_crowd(self, now: float, why: str = "nothing is known of it, and many wait") -> None:
        """Nothing is known yet and many wait: begin as after a recovery, with one."""
        if self.state == "unknown":
            self._start_ramp(now, why)

    def ease(self, now: float, *, gently: bool) -> None:
        """Its account was shut for a while: let callers in little by little (``gently``: one at first) afterwards."""
        if self.state in ("closed", "unknown"):
            self.usual_rate = self._pulse.rate(now) or self.usual_rate
            self.usual_flight = self._pulse.peak or self.usual_flight
            self._start_ramp(now, "its rate limit was reached", 1 if gently else max(1, self.usual_flight // 2))

    def _open_again(self, now: float, why: str) -> None:
        self._generation += 1
        self._probe = None
        self._window.clear()
        delay = min(USUAL_LONGEST, FIRST_DELAY * 2**self._delays)
        delay = max(delay, min(LONGEST, 0.1 * (now - self._tripped_at)))
        self._delays = min(self._delays + 1, 10)
        self.open_until = now + delay * (0.8 + 0.4 * self._random.random())
        self._move("open", now, why)

    def _free_stuck(self) -> None:
        for ticket in list(self.flight):
            if ticket.overdue and ticket.first_token is None and ticket.free is not None:
                ticket.free()

    def _start_ramp(self, now: float, why: str, limit: int = 1) -> None:
        shut_since = self._tripped_at if self.state == "half_open" else now
        if self.state in ("closed", "unknown"):  # it was not ill: should it fail on the way, its outage begins here
            self._delays, self._tripped_at, self._resort_failures = 0, now, 0
        self._generation += 1
        self._ramp = _Ramp(limit=limit, filled=now, shut_since=shut_since)
        self._window.clear()
        self._move("ramping", now, why)

    def _ramp_on(self, now: float, bad: bool) -> None:
        self._window.append((now, bad))
        if not bad:
            self._grow(now)
            return
        recent = self._recent(now)
        if sum(recent) >= max(2, RAMP_ENDS * len(recent)):
            self._open_again(now, f"it failed again on the way back, with {self.verdict}")
        elif sum(recent) >= RAMP_SLOWS * len(recent):
            self._ramp.limit = max(1, self._ramp.limit // 2)

    def _grow(self, now: float) -> None:
        self._ramp.good += 1
        if self._ramp.good >= self._ramp.limit:
            self._ramp.limit, self._ramp.good = min(self._ramp.limit * 2, NO_LIMIT), 0
        self._finish_ramp(now)

    def _finish_ramp(self, now: float) -> None:
        enough = self._ramp.limit > max(FIRST_STEPS, self.usual_flight)
        if enough and now >= self._waited_for_until:
            if self._patience > 1.0:
                self.normal = Normal()  # it came back slower than it was: what it does now is learned anew
            self._delays, self._patience = 0, 1.0
            self._move("closed", now, "it is well again")

    def _refilled(self, now: float) -> float:
        """Return how many calls the rate of the ramp lets in now; without a known usual rate it sets no bound."""
        ramp, usual = self._ramp, (self.usual_rate or 0.0) + self.others_rate
        if usual < 1:
            return float(NO_LIMIT)
        rate = ramp.rate(usual, now)
        ramp.tokens = min(max(1.0, rate * 0.2), ramp.tokens + rate * (now - ramp.filled))
        ramp.filled = now
        return ramp.tokens

    def _move(self, state: State, now: float, why: str) -> None:
        old, self.state = self.state, state
        if old != state:
            self.since = now
            if self._changed is not None:
                self._changed(self, old, why)


@dataclass(slots=True)
class _Pulse:
    """How many calls a second were begun lately, and how many were under way at once."""

    seconds: deque[tuple[int, int]] = field(default_factory=lambda: deque[tuple[int, int]](maxlen=30))
    peak: int = 0
    _peaks: tuple[int, int, int] = (0, 0, 0)
    """The slot of 15 seconds that is now, its peak, and the peak of the one before."""

    def count(self, now: float, flight: int) -> None:
        """A call was begun, the ``flight``-th at once."""
        second = int(now)
        if self.seconds and self.seconds[-1][0] == second:
            self.seconds[-1] = (second, self.seconds[-1][1] + 1)
        else:
            self.seconds.append((second, 1))
        slot, newest, before = self._peaks
        if int(now) // 15 != slot:
            slot, newest, before = int(now) // 15, 0, newest
        self._peaks = (slot, max(newest, flight), before)
        self.peak = max(newest, before, flight)

    def rate(self, now: float) -> float | None:
        """Return the calls a second of the last ten whole seconds in which there were any; ``None`` with too few."""
        whole = [count for second, count in self.seconds if now - 11 <= second < int(now)]
        return sum(whole) / len(whole) if len(whole) >= 3 else None
