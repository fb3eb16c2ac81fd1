"""The breaker in virtual time: what trips it, what proves nothing, and the slow way back. No clock runs here."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridethrough.runtime.config import Timeouts
from ridethrough.runtime.errors import (
    Auth,
    ContextLength,
    InvalidRequest,
    ModelError,
    Overloaded,
    QuotaExhausted,
    RateLimited,
    ServerError,
    Slow,
    StreamBroken,
    Transport,
)
from ridethrough.runtime.router.health import (
    HURRY,
    LONELY_SECONDS,
    LONGEST,
    NO_LIMIT,
    RESORTS,
    Health,
    Quantiles,
    State,
    Ticket,
)

TIMEOUTS = Timeouts.model_validate({"first_token": 20.0})
LONGEST_OPEN = 1.2 * LONGEST


@dataclass
class Bench:
    """A breaker, the time, and what it did."""

    now: float = 1000.0
    seed: int = 0
    moves: list[tuple[State, State]] = field(default_factory=list[tuple[State, State]])
    freed: list[Ticket] = field(default_factory=list[Ticket])

    def __post_init__(self) -> None:
        self.health = Health("a", TIMEOUTS, random=Random(self.seed), changed=self._changed)

    def _changed(self, health: Health, old: State, why: str) -> None:
        assert why
        self.moves.append((old, health.state))

    def state(self) -> State:
        return self.health.state

    def room(self) -> int:
        return self.health.room(self.now)

    def begin(self, size: int = 100) -> Ticket:
        """Begin a call, on the ramp as soon as its rate lets it."""
        until = self.now + 10
        while self.state() == "ramping" and not self.room() and self.now < until:
            self.wait(0.1)
        assert self.room() > 0
        ticket = self.health.begin(self.now, size)
        ticket.free = lambda: self.freed.append(ticket)
        return ticket

    def end(self, ticket: Ticket, failure: ModelError | None = None, *, rate: float | None = None) -> None:
        if failure is None:
            self.health.progressed(ticket, self.now)
        self.health.end(ticket, self.now, failure, rate)

    def call(self, failure: ModelError | None = None, seconds: float = 0.3, size: int = 100) -> None:
        ticket = self.begin(size)
        self.now += seconds
        self.end(ticket, failure)

    def calls(self, count: int, failure: ModelError | None = None, seconds: float = 0.3) -> None:
        for _ in range(count):
            self.call(failure, seconds)

    def wait(self, seconds: float, *, step: float = 0.05) -> None:
        """Let time pass, with the look that the router has at calls in flight."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + step)
            self.health.check(self.now)

    def trip(self) -> None:
        """Call it until it is open."""
        while self.state() != "open":
            self.call(ServerError("no"), 0.1)

    def until_half_open(self) -> Ticket:
        self.now = self.health.open_until
        return self.begin()

    def recover(self) -> None:
        """Answer well until it is closed again."""
        self.end(self.until_half_open())
        while self.state() == "ramping":
            self.call()


def bad() -> ServerError:
    return ServerError("no")


# --- what trips it --------------------------------------------------------------------------------------------------


def test_a_busy_deployment_is_found_out_at_once() -> None:
    bench = Bench()
    bench.calls(1000, seconds=0.01)
    bench.calls(9, bad(), seconds=0.01)
    assert bench.state() == "closed"
    bench.call(bad(), seconds=0.01)
    assert bench.state() == "open", "ten of the newest twenty are bad, however many were good before"


def test_a_share_below_half_does_not_trip() -> None:
    bench = Bench()
    for _ in range(100):
        bench.calls(2)
        bench.call(bad())
    assert bench.state() == "closed"


def test_every_counted_class_counts_and_no_other() -> None:
    for failure in (Overloaded("x"), bad(), Transport("x"), Slow("x"), StreamBroken("x")):
        bench = Bench()
        bench.calls(2)
        bench.now += LONELY_SECONDS
        bench.calls(3, failure)
        assert bench.state() == "open", failure
    for other in (RateLimited("x"), QuotaExhausted("x"), Auth("x"), ContextLength("x"), InvalidRequest("x")):
        bench = Bench()
        bench.calls(50, other)
        assert bench.state() in ("unknown", "closed"), other
        assert bench.room() == NO_LIMIT


def test_few_calls_are_enough_where_there_are_few() -> None:
    bench = Bench()
    bench.call()
    bench.now += 9.0
    bench.calls(2, bad())
    assert bench.state() == "closed"
    bench.call(bad())
    assert bench.state() == "open"


def test_three_quick_failures_beside_a_fresh_success_are_not_enough() -> None:
    bench = Bench()
    bench.call()
    bench.calls(3, bad(), seconds=0.1)
    assert bench.state() == "closed"


def test_old_failures_are_forgotten() -> None:
    bench = Bench()
    bench.call(seconds=0.1)
    bench.calls(2, bad())
    bench.now += 40.0
    bench.calls(2, bad())
    assert bench.state() == "closed"


def test_the_first_calls_of_all_trip_it_too() -> None:
    bench = Bench()
    bench.calls(3, Transport("refused", phase="connect"), seconds=0.01)
    assert bench.state() == "open"


# --- the age of calls in flight -------------------------------------------------------------------------------------


def test_calls_in_flight_trip_it_before_any_of_them_ends() -> None:
    bench = Bench()
    bench.calls(50)
    hung = [bench.begin() for _ in range(30)]
    bench.wait(0.9)
    assert bench.state() == "closed"
    bench.wait(0.3)
    assert bench.state() == "open"
    assert set(bench.freed) == set(hung), "who waits there in vain is let go"


def test_a_call_that_has_given_output_is_not_overdue_and_not_freed() -> None:
    bench = Bench()
    bench.calls(50)
    speaking = bench.begin()
    bench.health.progressed(speaking, bench.now)
    for _ in range(30):
        bench.begin()
    bench.wait(2)
    assert bench.state() == "open"
    assert speaking not in bench.freed


def test_a_late_call_counts_once() -> None:
    bench = Bench()
    bench.calls(50)
    for _ in range(4):
        late = bench.begin()
        bench.wait(1.2)
        assert late.overdue
        bench.end(late, Slow("too late"))
        bench.calls(4)
    assert bench.state() == "closed"
    assert bench.health.error_rate(bench.now) == pytest.approx(4 / 20)


def test_long_prompts_are_slow_and_that_is_normal() -> None:
    bench = Bench()
    for _ in range(20):
        bench.call(seconds=0.2, size=500)
        bench.call(seconds=9.0, size=50_000)
    for _ in range(20):
        bench.begin(50_000)
    bench.wait(15)
    assert bench.state() == "closed"
    assert bench.health.slow_after(500) == 1.0
    assert bench.health.slow_after(50_000) == TIMEOUTS.first_token, "never above what the configuration says"


def test_nothing_is_overdue_before_the_ceiling_while_nothing_is_known() -> None:
    bench = Bench()
    for _ in range(10):
        bench.begin()
    bench.wait(19.9)
    assert bench.state() == "unknown"
    bench.wait(0.3)
    assert bench.state() == "open"


# --- what proves nothing --------------------------------------------------------------------------------------------


def test_stragglers_prove_nothing_neither_way() -> None:
    bench = Bench()
    bench.calls(20)
    stragglers = [bench.begin() for _ in range(40)]
    bench.trip()
    for straggler in stragglers[:10]:
        bench.end(straggler)
    assert bench.state() == "open"
    bench.end(bench.until_half_open())
    assert bench.state() == "ramping"
    for straggler in stragglers[10:20]:
        bench.end(straggler, bad())
    assert bench.state() == "ramping"
    while bench.state() == "ramping":
        bench.call()
    for straggler in stragglers[20:]:
        bench.end(straggler, bad())
    assert bench.state() == "closed"


def test_stragglers_that_grow_old_after_the_recovery_prove_nothing() -> None:
    bench = Bench()
    bench.calls(20, seconds=0.4)
    for _ in range(30):
        bench.begin()
    bench.calls(10, bad(), seconds=0.001)
    assert bench.state() == "open"
    bench.health.open_until = bench.now
    bench.end(bench.begin())
    while bench.state() == "ramping":  # within a second, before they are overdue
        bench.now += 0.01
        for ticket in [bench.health.begin(bench.now) for _ in range(bench.room())]:
            bench.end(ticket)
    assert bench.state() == "closed"
    assert len(bench.health.flight) == 30
    bench.wait(5)
    assert bench.state() == "closed"


def test_stragglers_do_not_use_the_room_of_the_ramp() -> None:
    bench = Bench()
    bench.calls(20, seconds=0.01)
    for _ in range(40):
        bench.begin()
    bench.trip()
    bench.end(bench.until_half_open())
    assert bench.room() == 2


def test_a_call_that_was_abandoned_proves_nothing() -> None:
    bench = Bench()
    bench.calls(20)
    for _ in range(200):
        ticket = bench.begin()
        bench.now += 0.2
        bench.health.abandon(ticket, bench.now)
    assert bench.state() == "closed"
    assert not bench.health.flight


# --- half-open ------------------------------------------------------------------------------------------------------


def test_half_open_is_exactly_one_real_call() -> None:
    bench = Bench()
    bench.trip()
    assert bench.room() == 0
    bench.now = bench.health.open_until - 0.001
    assert bench.room() == 0
    bench.now = bench.health.open_until
    assert bench.room() == 1
    bench.begin()
    assert (bench.state(), bench.room()) == ("half_open", 0)
    bench.now += 0.5
    assert bench.room() == 0


def test_a_probe_that_fails_opens_it_again() -> None:
    bench = Bench()
    bench.trip()
    bench.end(bench.until_half_open(), Overloaded("still"))
    assert (bench.state(), bench.room()) == ("open", 0)
    assert bench.health.open_until > bench.now


def test_a_probe_that_hangs_opens_it_again_and_is_let_go() -> None:
    bench = Bench()
    bench.calls(20)
    bench.trip()
    probe = bench.until_half_open()
    bench.wait(1.2)
    assert bench.state() == "open"
    assert bench.freed == [probe]
    until = bench.health.open_until
    bench.end(probe, Slow("let go"))
    assert (bench.state(), bench.health.open_until) == ("open", until), "its end is no second failure"


@pytest.mark.parametrize("failure", [RateLimited("x"), QuotaExhausted("x"), Auth("x")])
def test_a_gatekeepers_answer_lets_in_little_by_little(failure: ModelError) -> None:
    bench = Bench()
    bench.trip()
    bench.end(bench.until_half_open(), failure)
    assert (bench.state(), bench.room()) == ("ramping", 1)


def test_a_request_that_was_refused_as_wrong_was_answered() -> None:
    bench = Bench()
    bench.trip()
    bench.end(bench.until_half_open(), InvalidRequest("x"))
    assert bench.state() == "ramping"


def test_an_abandoned_probe_is_no_proof_and_does_not_block() -> None:
    bench = Bench()
    bench.trip()
    for _ in range(20):
        probe = bench.until_half_open()
        bench.health.abandon(probe, bench.now)
        assert bench.state() == "open"
        assert bench.now < bench.health.open_until <= bench.now + LONGEST_OPEN
    assert not bench.health.flight


def test_a_withdrawn_probe_leaves_the_place_to_the_next_one_at_once() -> None:
    bench = Bench()
    bench.trip()
    for _ in range(20):
        probe = bench.until_half_open()
        bench.health.withdraw(probe, bench.now)
        assert (bench.state(), bench.room()) == ("open", 1)
    bench.end(bench.begin())
    assert bench.state() == "ramping"


# --- the ramp -------------------------------------------------------------------------------------------------------


def test_the_ramp_doubles() -> None:
    bench = Bench()
    bench.trip()
    bench.end(bench.until_half_open())
    steps: list[int] = []
    while bench.state() == "ramping":
        steps.append(bench.room())
        tickets = [bench.begin() for _ in range(bench.room())]
        assert bench.room() == 0
        bench.now += 0.3
        for ticket in tickets:
            bench.end(ticket)
    assert steps == [2, 4, 8]
    assert bench.state() == "closed"


def test_the_ramp_goes_up_to_what_was_usual() -> None:
    bench = Bench()
    for _ in range(12):
        tickets = [bench.begin() for _ in range(40)]
        bench.now += 1.0
        for ticket in tickets:
            bench.end(ticket)
    bench.calls(10, bad(), seconds=0.01)
    assert bench.state() == "open"
    assert bench.health.usual_flight == 40
    bench.recover()
    assert bench.health.usual_flight == 40
    assert [new for _, new in bench.moves] == ["closed", "open", "half_open", "ramping", "closed"]


def test_two_failures_on_the_ramp_open_it_again() -> None:
    bench = Bench()
    bench.trip()
    bench.end(bench.until_half_open())
    bench.call(bad())
    assert bench.state() == "ramping"
    bench.call(bad())
    assert bench.state() == "open"


def test_one_hung_call_on_the_ramp_is_one_failure() -> None:
    bench = Bench()
    bench.calls(20)
    bench.trip()
    bench.end(bench.until_half_open())
    late = bench.begin()
    bench.wait(1.2)
    assert bench.state() == "ramping"
    bench.end(late, Slow("at last"))
    assert bench.state() == "ramping"


def test_two_hung_calls_on_the_ramp_are_two_failures() -> None:
    bench = Bench()
    bench.calls(20)
    bench.trip()
    bench.end(bench.until_half_open())
    late = [bench.begin(), bench.begin()]
    bench.wait(1.2)
    assert bench.state() == "open"
    assert set(bench.freed) >= set(late)


def test_a_deployment_that_always_fails_a_little_comes_back_all_the_same() -> None:
    """One in twenty fails on a good day: a ramp that no such deployment could pass would keep it out for ever."""
    chance = Random(7)
    bench = Bench(seed=7)
    for _ in range(12):
        tickets = [bench.begin() for _ in range(100)]
        bench.now += 1.0
        for ticket in tickets:
            bench.end(ticket)
    bench.trip()
    bench.now = bench.health.open_until
    deadline = bench.now + 120
    while bench.state() != "closed":
        assert bench.now < deadline, bench.moves
        tickets = [bench.begin() for _ in range(min(bench.room(), 100))]
        bench.wait(0.3)
        for ticket in tickets:
            bench.end(ticket, bad() if chance.random() < 0.05 else None)


def test_a_backlog_keeps_the_ramp_at_one_and_a_half_times_the_usual_rate() -> None:
    bench = Bench()
    for _ in range(200):  # 20 calls a second for 10 seconds
        bench.call(seconds=0.05)
    bench.calls(10, bad(), seconds=0.05)
    assert bench.state() == "open"
    assert bench.health.usual_rate == pytest.approx(20, rel=0.1)
    bench.now = bench.health.open_until
    begun: list[float] = []
    flight: list[tuple[float, Ticket]] = []
    for _ in range(500):  # 25 seconds
        bench.now += 0.05
        for at, ticket in [each for each in flight if each[0] <= bench.now]:
            flight.remove((at, ticket))
            bench.end(ticket)
        bench.health.awaited(bench.now)
        while bench.room():
            flight.append((bench.now + 0.3, bench.begin()))
            begun.append(bench.now)
    assert bench.state() == "ramping", "it goes on for as long as somebody waits"
    for start in begun:
        assert sum(start <= at < start + 1 for at in begun) <= 1.2 * HURRY * 20 + 1
    late = [at for at in begun if at > begun[0] + 5]
    assert len(late) / 20 == pytest.approx(HURRY * 20, rel=0.1)
    for _, ticket in flight:
        bench.end(ticket)
    bench.wait(1.1)
    while bench.state() == "ramping":
        bench.call()
    assert bench.state() == "closed"


def test_demand_that_has_grown_is_not_held_at_the_old_rate_for_ever() -> None:
    """Three lonely calls were usual; now many always wait. The rate of the ramp must not become a law."""
    bench = Bench()
    for _ in range(12):
        bench.call(seconds=1.0)
    bench.trip()
    assert bench.health.usual_rate is not None
    assert bench.health.usual_rate < 10
    bench.now = bench.health.open_until
    started, flight, last = bench.now, list[tuple[float, Ticket]](), 0
    while bench.now < started + 180:
        bench.now += 0.05
        for at, ticket in [each for each in flight if each[0] <= bench.now]:
            flight.remove((at, ticket))
            bench.end(ticket)
        bench.health.awaited(bench.now)
        while bench.room() and len(flight) < 100:
            flight.append((bench.now + 0.3, bench.begin()))
            last += bench.now > started + 170
    assert last / 10 > 50


def test_a_call_that_was_not_made_costs_the_ramp_nothing() -> None:
    bench = Bench()
    for _ in range(100):
        bench.call(seconds=0.1)
    bench.trip()
    bench.end(bench.until_half_open())
    bench.now += 1.0
    before = bench.room()
    assert before
    for _ in range(10):
        bench.health.withdraw(bench.begin(), bench.now)
    assert bench.room() == before


# --- how long it stays open -----------------------------------------------------------------------------------------


def test_the_delay_grows_to_a_bound() -> None:
    bench = Bench()
    bench.trip()
    delays: list[float] = []
    for _ in range(200):
        delays.append(bench.health.open_until - bench.now)
        bench.end(bench.until_half_open(), bad())
    for delay, nominal in zip(delays, (1, 2, 3, 3, 3), strict=False):
        assert 0.8 * nominal <= delay <= 1.2 * nominal
    assert max(delays) <= LONGEST_OPEN
    assert delays[-1] >= 0.8 * LONGEST


def test_the_delay_has_jitter() -> None:
    delays: set[float] = set()
    for seed in range(20):
        bench = Bench(seed=seed)
        bench.trip()
        delays.add(round(bench.health.open_until - bench.now, 6))
    assert len(delays) > 10


def test_the_delay_is_short_again_after_a_recovery() -> None:
    bench = Bench()
    bench.trip()
    for _ in range(50):
        bench.end(bench.until_half_open(), bad())
    bench.recover()
    bench.now += 10
    bench.trip()
    assert bench.health.open_until - bench.now <= 1.2


# --- the last-healthy rule ------------------------------------------------------------------------------------------


def test_the_last_healthy_one_is_asked_one_call_at_a_time() -> None:
    bench = Bench()
    bench.calls(5)
    bench.calls(5, bad(), seconds=0.1)
    assert bench.state() == "open"
    ticket = bench.health.begin_last_resort(bench.now)
    assert ticket is not None
    assert bench.health.begin_last_resort(bench.now) is None
    bench.end(ticket)
    assert bench.state() == "open", "it proves nothing: the breaker has its own way back"
    assert bench.health.begin_last_resort(bench.now) is not None


def test_three_failures_end_the_last_healthy_rule() -> None:
    bench = Bench()
    bench.calls(5)
    bench.calls(5, bad(), seconds=0.1)
    for _ in range(RESORTS):
        ticket = bench.health.begin_last_resort(bench.now)
        assert ticket is not None
        bench.end(ticket, bad())
    assert bench.health.begin_last_resort(bench.now) is None


def test_the_last_healthy_rule_is_for_those_that_answered_lately() -> None:
    bench = Bench()
    bench.calls(5)
    bench.calls(5, bad(), seconds=0.1)
    bench.now += 10
    assert bench.health.begin_last_resort(bench.now) is None
    fresh = Bench()
    fresh.calls(3, bad())
    assert fresh.state() == "open"
    assert fresh.health.begin_last_resort(fresh.now) is None, "it never answered anybody"
    well = Bench()
    well.calls(5)
    assert well.health.begin_last_resort(well.now) is None


@pytest.mark.parametrize("how", ["abandon", "withdraw"])
def test_a_last_resort_that_was_given_up_leaves_its_place(how: str) -> None:
    bench = Bench()
    bench.calls(5)
    bench.calls(5, bad(), seconds=0.1)
    for _ in range(10):
        ticket = bench.health.begin_last_resort(bench.now)
        assert ticket is not None
        getattr(bench.health, how)(ticket, bench.now)
    assert not bench.health.flight


# --- what others say, and the account -------------------------------------------------------------------------------


def test_another_worker_is_believed_for_a_bounded_time() -> None:
    bench = Bench()
    bench.calls(5)
    bench.health.adopt(bench.now + 86400, bench.now, "another clock goes wrong")
    assert bench.state() == "open"
    assert bench.health.open_until <= bench.now + LONGEST_OPEN
    bench.now = bench.health.open_until
    assert bench.room() == 1


def test_what_another_worker_said_is_over_when_it_is_over() -> None:
    bench = Bench()
    bench.calls(5)
    bench.health.adopt(bench.now - 1, bench.now, "long ago")
    assert bench.state() == "closed"
    bench.health.adopt(bench.now + 3, bench.now, "now")
    assert bench.health.open_until >= bench.now + 3
    bench.recover()
    assert bench.state() == "closed"


def test_a_shut_account_comes_back_gently_and_does_not_interrupt_a_recovery() -> None:
    bench = Bench()
    for _ in range(5):
        tickets = [bench.begin() for _ in range(10)]
        bench.now += 1
        for ticket in tickets:
            bench.end(ticket)
    bench.health.ease(bench.now, gently=False)
    assert bench.state() == "ramping"
    bench.now += 2
    assert bench.room() == 3, "a fifth of a second's worth at once"
    bench.health.ease(bench.now, gently=True)
    assert bench.room() == 3
    bench.trip()
    until = bench.health.open_until
    bench.health.ease(bench.now, gently=True)
    assert (bench.state(), bench.health.open_until) == ("open", until)


def test_a_crowd_that_waits_for_the_unknown_sends_one_first() -> None:
    bench = Bench()
    bench.health.expect_crowd(bench.now)
    assert (bench.state(), bench.room()) == ("ramping", 1)
    bench.calls(1)
    assert bench.room() == 2


# --- what is normal -------------------------------------------------------------------------------------------------


def test_quantiles_need_enough_and_forget_the_old() -> None:
    quantiles = Quantiles()
    for value in range(7):
        quantiles.add(float(value))
    assert quantiles.at(0.5) is None
    for _ in range(200):
        quantiles.add(100.0)
    assert quantiles.at(0.0) == quantiles.at(0.5) == quantiles.at(1.0) == 100.0


def test_a_deployment_that_has_become_slower_for_good_is_used_again_by_those_who_have_no_other() -> None:
    """Answers in 0.3 s were normal; now it takes 4 s, and stays so. Its own past must not lock it out for ever."""
    bench = Bench()
    bench.calls(200)
    started = bench.now
    flight: list[tuple[float, Ticket]] = []
    answered = 0
    while bench.now < started + 240:
        bench.wait(0.1)
        for end, ticket in list(flight):
            if ticket in bench.freed or end <= bench.now:
                flight.remove((end, ticket))
                bench.end(ticket, Slow("let go") if ticket in bench.freed else None)
                answered += ticket not in bench.freed and bench.now > started + 120
        while bench.room() and len(flight) < 20:
            flight.append((bench.now + 4.0, bench.begin()))
        if not bench.room() and (resort := bench.health.begin_last_resort(bench.now)) is not None:
            resort.free = lambda resort=resort: bench.freed.append(resort)
            flight.append((bench.now + 4.0, resort))
    assert answered > 120 / 4 * 20 * 0.8
    assert bench.state() == "closed"
    assert bench.health.slow_after(100) > 4.0


def test_a_slow_deployment_that_nobody_needs_stays_out() -> None:
    """The same with another one that is well: for minutes nobody is sent back to the slow one."""
    bench = Bench()
    bench.calls(200)
    for _ in range(20):
        bench.begin()
    bench.wait(2)
    assert bench.state() == "open"
    started = bench.now
    while bench.now < started + 120:
        if bench.room():
            probe = bench.begin()
            bench.wait(2.0)
            assert probe in bench.freed
            bench.end(probe, Slow("let go"))
        bench.wait(0.1)
        assert bench.state() in ("open", "half_open")


# --- never stuck ----------------------------------------------------------------------------------------------------

FAILURES: list[ModelError | None] = [
    None,
    bad(),
    Slow("x"),
    Transport("x"),
    StreamBroken("x"),
    RateLimited("x"),
    QuotaExhausted("x"),
    Auth("x"),
    InvalidRequest("x"),
]

EVENTS = st.one_of(
    st.tuples(st.just("begin"), st.integers(1, 30)),
    st.tuples(st.just("end"), st.integers(0, len(FAILURES) - 1)),
    st.tuples(st.just("abandon"), st.integers(0, 9)),
    st.tuples(st.just("withdraw"), st.integers(0, 9)),
    st.tuples(st.just("progress"), st.integers(0, 9)),
    st.tuples(st.just("resort"), st.just(0)),
    st.tuples(st.just("adopt"), st.integers(-10, 10_000)),
    st.tuples(st.just("ease"), st.integers(0, 1)),
    st.tuples(st.just("crowd"), st.just(0)),
    st.tuples(st.just("awaited"), st.just(0)),
    st.tuples(st.just("wait"), st.integers(0, 600)),
)


class Chaos(Bench):
    """Does whatever it is told, as the router would: who is let go ends as too slow."""

    def happen(self, what: str, number: int) -> None:
        flight = sorted(self.health.flight, key=lambda ticket: (ticket.started, id(ticket)))
        ticket = flight[number % len(flight)] if flight else None
        match what:
            case "begin":
                for _ in range(min(number, self.room())):
                    self.begin()
            case "end" if ticket is not None:
                self.end(ticket, FAILURES[number])
            case "abandon" if ticket is not None:
                self.health.abandon(ticket, self.now)
            case "withdraw" if ticket is not None:
                self.health.withdraw(ticket, self.now)
            case "progress" if ticket is not None:
                self.health.progressed(ticket, self.now)
            case "resort":
                self.health.begin_last_resort(self.now)
            case "adopt":
                self.health.adopt(self.now + number, self.now, "they say so")
            case "ease":
                self.health.ease(self.now, gently=bool(number))
            case "crowd":
                self.health.expect_crowd(self.now)
            case "awaited":
                self.health.awaited(self.now)
            case "wait":
                self.wait(number / 10, step=0.5)
                self.let_go()
            case _:
                pass
        self.must_hold()

    def let_go(self) -> None:
        for ticket in self.freed:
            if ticket in self.health.flight:
                self.health.end(ticket, self.now, Slow("let go"))
        self.freed.clear()
        for ticket in list(self.health.flight):  # the attempt's own deadline
            if self.now - ticket.started > TIMEOUTS.first_token and ticket.first_token is None:
                self.health.end(ticket, self.now, Slow("first token"))

    def must_hold(self) -> None:
        assert self.room() >= 0
        assert self.health.open_until <= self.now + LONGEST_OPEN or self.state() != "open"
        if self.state() == "half_open":
            assert self.room() == 0
            assert len(self.health.flight) >= 1, "somebody must be under way who can end it"
        if self.state() == "open":
            assert self.health.next_time(self.now) == self.health.open_until


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=120), st.integers(0, 2**16))
def test_never_stuck(events: list[tuple[str, int]], seed: int) -> None:
    bench = Chaos(seed=seed)
    for what, number in events:
        bench.happen(what, number)
    # From here on it answers well, and what is still under way ends.
    for ticket in list(bench.health.flight):
        bench.end(ticket)
    deadline = bench.now + 180.0
    while bench.state() not in ("closed", "unknown"):
        assert bench.now < deadline, (bench.state(), bench.moves[-8:])
        tickets = [bench.begin() for _ in range(min(bench.room(), 50))]
        bench.wait(0.3, step=0.1)
        for ticket in tickets:
            if ticket in bench.health.flight:
                bench.end(ticket)
        bench.let_go()
    for ticket in list(bench.health.flight):
        bench.end(ticket)
    assert not bench.health.flight
    assert bench.room() == NO_LIMIT


def test_slowness_that_creeps_in_does_not_become_normal() -> None:
    """Each call is a tenth of a second slower than the one before: no single step is remarkable."""
    bench = Bench()
    bench.calls(200, seconds=0.3)
    seconds = 0.3
    while bench.state() == "closed" and seconds < 19:
        ticket = bench.begin()
        bench.wait(seconds)
        if bench.state() == "closed":
            bench.end(ticket)
        seconds += 0.1
    assert bench.state() == "open"
    assert seconds < 4, "three times what was normal, and a few calls to be sure"
