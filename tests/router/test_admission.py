"""Scopes, buckets, places and queues in virtual time: who has to wait, for how long, and that nobody waits for ever."""

from __future__ import annotations

import math
from collections.abc import Collection
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridethrough.runtime.config import RateLimits
from ridethrough.runtime.errors import Auth
from ridethrough.runtime.router.admission import (
    CLASS_SECONDS,
    Bucket,
    Places,
    Queue,
    Retries,
    Scope,
    ShutReason,
    Waiter,
    serve,
)
from ridethrough.runtime.router.context import PriorityClass
from ridethrough.runtime.router.limits import Window, read_limits

WALL = 1_800_000_000.0


def scope(seed: int = 0) -> Scope:
    return Scope("quota x", Random(seed))


def limits(**values: int) -> RateLimits:
    return RateLimits.model_validate(values)


# --- scopes: how long they are shut ---------------------------------------------------------------------------------


def test_the_later_of_the_old_and_the_new_time_holds() -> None:
    one = scope()
    assert one.shut(100, "rate", 60, "long") == 60
    assert one.shut(101, "rate", 1, "short") == 59
    assert one.shut(102, "rate", 90, "longer") == 90
    assert (one.shut_until, one.detail) == (192, "longer")
    assert not one.is_open(191.9)
    assert one.is_open(192)


def test_without_a_hint_it_waits_with_jitter() -> None:
    first = {scope(seed).shut(0, "rate", None, "") for seed in range(20)}
    assert first == {1.0}
    second: set[float] = set()
    for seed in range(20):
        one = scope(seed)
        one.shut(0, "rate", None, "")
        second.add(round(one.shut(2, "rate", None, ""), 6))
    assert len(second) > 10
    assert all(1 <= wait <= 3 for wait in second)


@pytest.mark.parametrize(("reason", "first", "longest"), [("rate", 1, 60), ("quota", 300, 3600), ("auth", 60, 900)])
def test_refusals_in_a_row_wait_longer_up_to_a_bound(reason: ShutReason, first: float, longest: float) -> None:
    one, now = scope(), 0.0
    waits: list[float] = []
    for _ in range(100):
        waits.append(one.shut(now, reason, None, ""))
        now = one.shut_until
    assert min(waits) >= first
    assert max(waits) <= longest + 1e-6
    assert max(waits) > longest / 3
    one.answered()
    assert one.shut(now, reason, None, "") == pytest.approx(first)


@pytest.mark.parametrize("reason", ["rate", "quota", "auth"])
def test_fifty_calls_that_were_refused_together_are_one_refusal(reason: ShutReason) -> None:
    one = scope()
    first = one.shut(0, reason, None, "")
    for number in range(50):
        one.shut(0.001 * number, reason, None, "")
    assert one.shut_until == pytest.approx(first, abs=0.1)


def test_another_reason_is_another_refusal() -> None:
    one = scope()
    one.shut(0, "auth", None, "bad key")
    one.shut(0, "quota", None, "no credit")
    assert (one.reason, one.shut_until) == ("quota", 300)
    one.shut(1, "auth", None, "bad key")
    assert (one.reason, one.shut_until) == ("quota", 300), "the longer one stands"


@pytest.mark.parametrize("hint", [-1.0, -math.inf, math.inf, math.nan])
def test_an_absurd_hint_is_no_hint(hint: float) -> None:
    one = scope()
    assert one.shut(0, "rate", hint, "") == 1.0
    assert one.shut_until == 1.0


@pytest.mark.parametrize("hint", [0.0, 0.02])
def test_a_server_that_asks_for_nothing_and_refuses_all_the_same_is_not_hammered(hint: float) -> None:
    one, now, refusals = scope(), 0.0, 0
    while now < 300:
        refusals += 1
        one.shut(now, "rate", hint, "")
        now = max(now + 0.001, one.shut_until)
    assert refusals < 20
    one.answered()
    assert one.shut(now, "rate", hint, "") == pytest.approx(hint)


def test_a_hint_is_a_floor() -> None:
    one, now = scope(), 0.0
    for _ in range(20):
        assert one.shut(now, "rate", 7, "") >= 7
        now = one.shut_until


# --- scopes: what the provider says of its limits -------------------------------------------------------------------


def window(remaining: float | None, rest: float | None) -> Window:
    return Window("requests", 100, remaining, None if rest is None else WALL + rest, 60.0)


def test_a_used_up_window_shuts_it_until_there_is_room_for_a_call() -> None:
    one = scope()
    one.learn([window(3, 30)], 50, WALL)
    assert one.is_open(50)
    one.learn([window(0, 30)], 50, WALL)
    assert one.wait(50, 1) == pytest.approx(0.6)
    assert one.reason == "rate"


@pytest.mark.parametrize(
    ("remaining", "rest"), [(0, None), (0, -5), (0, 0), (0, 1e9), (0, math.nan), (0, math.inf), (None, 30), (1, 30)]
)
def test_a_window_that_says_nothing_useful_shuts_nothing(remaining: float | None, rest: float | None) -> None:
    one = scope()
    one.learn([window(remaining, rest)], 50, WALL)
    assert one.is_open(50)


@pytest.mark.parametrize(
    "headers",
    [
        {"x-ratelimit-remaining-requests": "-1", "x-ratelimit-reset-requests": "-1", "x-ratelimit-limit-requests": "0"},
        {"x-ratelimit-remaining-requests": "nan", "x-ratelimit-reset-requests": "soon"},
        {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "99999999999999999999"},
        {"x-ratelimit-remaining-tokens": "1e999", "x-ratelimit-reset-tokens": "1e999"},
    ],
)
def test_absurd_headers_shut_nothing(headers: dict[str, str]) -> None:
    one = scope()
    one.learn(read_limits(headers, now=WALL), 50, WALL)
    assert one.is_open(50)


# --- buckets --------------------------------------------------------------------------------------------------------


def test_a_bucket_lets_through_its_rate() -> None:
    bucket, now, taken = Bucket(2.0), 0.0, 0
    while now < 100:
        if bucket.wait(now, 1) == 0:
            bucket.take(now, 1)
            taken += 1
        else:
            now += bucket.wait(now, 1)
    assert taken == pytest.approx(2 * 100 + 20, abs=2)


def test_a_call_larger_than_the_bucket_waits_until_it_is_full() -> None:
    bucket = Bucket(10.0)
    assert bucket.wait(0, 5000) == 0
    bucket.take(0, 5000)
    wait = bucket.wait(0, 5000)
    assert wait == pytest.approx(500)
    assert bucket.wait(wait, 5000) == 0


def test_an_absurd_use_does_not_shut_it_for_ever() -> None:
    bucket = Bucket(1000 / 60)
    bucket.take(0, 1e15)
    assert bucket.wait(0, 1) <= Bucket.DEEPEST + 1
    bucket.take(0, math.inf)
    bucket.take(0, math.nan)
    assert bucket.wait(Bucket.DEEPEST + 1, 1) == 0


def test_time_that_goes_back_gives_nothing() -> None:
    bucket = Bucket(1.0)
    for _ in range(10):
        bucket.take(10, 1)
    for _ in range(100):
        assert bucket.wait(5, 1) > 0.9
        assert bucket.wait(10, 1) > 0.9


@given(
    st.floats(0.01, 1e5),
    st.lists(st.tuples(st.floats(0, 30), st.floats(0, 1e6), st.floats(-1e6, 1e6)), max_size=40),
    st.floats(0, 1e6),
)
def test_after_the_wait_it_may_begin(rate: float, uses: list[tuple[float, float, float]], need: float) -> None:
    bucket, now = Bucket(rate), 0.0
    for seconds, estimate, correction in uses:
        now += seconds
        bucket.take(now, estimate)
        bucket.take(now, correction)
    wait = bucket.wait(now, need)
    assert 0 <= wait <= Bucket.DEEPEST + bucket.size / rate + 1e-6
    assert bucket.wait(now + wait, need) <= 1e-6


def test_scopes_take_the_lowest_rate_of_those_that_share_them() -> None:
    one = scope()
    one.limit(limits(rpm=600, tpm=60_000))
    one.limit(limits(rpm=60))
    one.limit(limits(rpm=6000, tpm=6_000_000))
    assert {kind: bucket.rate for kind, bucket in one.buckets.items()} == {"requests": 1.0, "tokens": 1000.0}


def test_an_estimate_is_corrected_by_what_was_used() -> None:
    one = scope()
    one.limit(limits(tpm=6000))
    one.take(0, 1000)
    assert one.wait(0, 1000) == pytest.approx(10)
    one.correct(0, 1000, 100)
    assert one.wait(0, 900) == 0
    one.correct(0, 0, 900)
    assert one.wait(0, 1000) == pytest.approx(10)


def test_a_call_that_was_not_made_gives_back_its_request_and_its_tokens() -> None:
    one = scope()
    one.limit(limits(rpm=1, tpm=6000))
    for _ in range(20):
        assert one.wait(0, 1000) == 0
        one.take(0, 1000)
        assert one.wait(0, 1000) > 0
        one.give_back(0, 1000)


# --- places ---------------------------------------------------------------------------------------------------------


def test_a_configured_bound_is_not_changed() -> None:
    places = Places(7)
    for number in range(100):
        places.overloaded(float(number), 0.1)
        places.good(7, 0.1, 0.1, float(number))
    assert places.limit == 7


def test_places_grow_while_they_are_used_and_good() -> None:
    places = Places(None)
    for number in range(1000):
        places.good(places.limit, 0.3, 0.3, number * 0.01)
    assert places.limit == Places.FIRST + 1000
    before = places.limit
    for number in range(1000):
        places.good(3, 0.3, 0.3, 100 + number * 0.01)
    assert places.limit == before, "what is not used is not known to be bearable"
    for number in range(20_000):
        places.good(places.limit, 0.3, 0.3, 1000 + number * 0.01)
    assert places.limit == Places.MOST


def test_places_shrink_once_a_round_trip() -> None:
    places = Places(None)
    for number in range(50):
        places.overloaded(number * 0.001, 1.0)
    assert places.limit == 70
    places.overloaded(1.1, 1.0)
    assert places.limit == 49


def test_slowness_shrinks_them_although_every_answer_is_good() -> None:
    places = Places(None)
    for number in range(10):
        places.good(places.limit, 3.0, 1.0, number * 2.0)
    assert places.limit < 0.5 * Places.FIRST


def test_places_are_never_gone_and_come_back() -> None:
    places = Places(None)
    for number in range(1000):
        places.overloaded(number * 10.0, 0.1)
    assert places.limit == Places.LEAST
    now, trips = 20_000.0, 0
    while places.limit < 100:
        now, trips = now + 0.3, trips + 1
        for _ in range(places.limit):
            places.good(places.limit, 0.3, 0.3, now)
    assert trips <= 6, "doubled in every round trip"


# --- queues ---------------------------------------------------------------------------------------------------------


def waiter(since: float = 0, priority: PriorityClass = "normal", names: str = "a") -> Waiter:
    return Waiter(priority, since, frozenset(names))


def queue_of(*waiters: Waiter, bound: int = 1000) -> Queue:
    queue = Queue(bound)
    for each in waiters:
        queue.join(each)
    return queue


class Rooms:
    """So many places at each deployment, and the order in which they were given."""

    def __init__(self, **rooms: int) -> None:
        self.rooms = rooms
        self.served: list[Waiter] = []
        self.asked = 0

    def grant(self, waiter: Waiter, claimed: Collection[str]) -> str | None:
        self.asked += 1
        for name in sorted(waiter.names):
            if name not in claimed and self.rooms.get(name, 0):
                self.rooms[name] -= 1
                self.served.append(waiter)
                return name
        return None

    def serve(self, *queues: Queue, now: float = 0.0) -> list[Waiter]:
        self.served = []
        serve(queues, self.grant, lambda waiter: set(waiter.names), now)
        return self.served


def test_the_most_urgent_class_is_first() -> None:
    low, normal, high, critical = (waiter(0, each) for each in ("low", "normal", "high", "critical"))
    assert Rooms(a=9).serve(queue_of(low, normal, high, critical)) == [critical, high, normal, low]


def test_equals_are_served_in_the_order_of_arrival() -> None:
    waiters = [waiter(0) for _ in range(50)]
    assert Rooms(a=50).serve(queue_of(*waiters)) == waiters


def test_age_promotes() -> None:
    old, young = waiter(0, "low"), waiter(2 * CLASS_SECONDS + 1, "high")
    younger = waiter(CLASS_SECONDS, "high")
    assert Rooms(a=3).serve(queue_of(old, young, younger)) == [younger, old, young]


def test_who_has_tried_already_lets_others_go_first() -> None:
    tried = Waiter("normal", 0, frozenset("a"), tries=1)
    fresh, late = waiter(5), waiter(15)
    assert Rooms(a=3).serve(queue_of(tried, fresh, late)) == [fresh, tried, late]


def test_nobody_starves() -> None:
    """One place a second, and an urgent call comes every second: the low one is served all the same."""
    low = waiter(0, "low")
    queue, rooms = queue_of(low), Rooms(a=0)
    for second in range(200):
        queue.join(waiter(second, "critical"))
        rooms.rooms["a"] = 1
        if low in rooms.serve(queue, now=second):
            assert second <= 3 * CLASS_SECONDS + 1
            return
    pytest.fail("the low one starved")


def test_a_full_queue_sheds_the_lowest_class_newest_first() -> None:
    low = [waiter(second, "low") for second in range(3)]
    normal = [waiter(second, "normal") for second in range(2)]
    queue = queue_of(*low, *normal, bound=5)
    queue.join(waiter(10, "critical"))
    assert [each.shed for each in low] == [False, False, True]
    assert low[2].event.is_set()
    queue.join(waiter(11, "high"))
    queue.join(waiter(12, "high"))
    assert all(each.shed for each in low)
    assert not any(each.shed for each in normal)
    assert len(queue) == 5
    own = waiter(13, "low")
    queue.join(own)
    assert own.shed, "the newcomer itself, when there is nobody below it"
    assert len(queue) == 5


def test_of_those_that_came_in_the_same_moment_the_last_is_shed() -> None:
    waiters = [waiter(0, "low") for _ in range(5)]
    queue_of(*waiters, bound=4)
    assert [each.shed for each in waiters] == [False, False, False, False, True]


def test_who_has_left_is_neither_served_nor_shed_nor_counted() -> None:
    first, second, third = waiter(0), waiter(1), waiter(2)
    queue = queue_of(first, second, third, bound=3)
    queue.leave(first)
    queue.leave(first)
    assert len(queue) == 2
    queue.join(waiter(3))
    assert not first.shed
    assert Rooms(a=1).serve(queue) == [second]
    assert first.granted is None


def test_the_heap_does_not_grow_behind_one_who_waits_for_long() -> None:
    stuck = waiter(0, "critical", "z")
    queue = queue_of(stuck)
    for second in range(20_000):
        each = waiter(second)
        queue.join(each)
        queue.leave(each)
    assert len(queue) == 1
    assert len(queue._heap) < 200  # pyright: ignore[reportPrivateUsage]
    assert Rooms(z=1).serve(queue) == [stuck]


def test_who_waits_for_something_else_does_not_block_those_behind() -> None:
    """The first one's call has failed at a, so it waits for b; a has room for the others."""
    first, second, third = waiter(0, names="b"), waiter(1, names="ab"), waiter(2, names="ab")
    queue = queue_of(first, second, third)
    assert Rooms(a=5, b=0).serve(queue) == [second, third]
    assert queue.first() is first
    assert Rooms(b=1).serve(queue) == [first]


def test_nobody_behind_gets_what_somebody_in_front_waits_for() -> None:
    """The first one is too large for what a has left; small ones behind it must not eat that up for ever."""
    large, small = waiter(0), waiter(1)
    queue = queue_of(large, small)
    served: list[Waiter] = []

    def grant(each: Waiter, claimed: Collection[str]) -> str | None:
        if each is large or "a" in claimed:
            return None
        served.append(each)
        return "a"

    serve([queue], grant, lambda each: set(each.names), 0)
    assert served == []
    assert len(queue) == 2


def test_all_queues_are_one_order() -> None:
    """Two routes over one deployment: the one whose queue is never empty must not starve the other."""
    busy = queue_of(*[waiter(10 + number) for number in range(20)])
    other = queue_of(early := waiter(0), urgent := waiter(15, "critical"))
    assert Rooms(a=2).serve(busy, other) == [urgent, early]


def test_a_look_at_a_long_queue_without_room_is_short() -> None:
    queues = [queue_of(*[waiter(number, names="abc") for number in range(1000)]) for _ in range(3)]
    rooms = Rooms(a=0, b=0, c=0)
    assert rooms.serve(*queues) == []
    assert rooms.asked == 1
    assert [len(each) for each in queues] == [1000] * 3


def test_many_who_cannot_be_served_hide_nobody_in_another_queue() -> None:
    many = queue_of(waiter(0, names="ab"), *[waiter(0, names="a") for _ in range(1000)])
    other = queue_of(late := waiter(50, names="c"))
    served: list[Waiter] = []

    def grant(each: Waiter, claimed: Collection[str]) -> str | None:
        served.append(each)
        return "c" if "c" in each.names else None

    serve([many, other], grant, lambda each: set(each.names) - {"b"}, 60)
    assert late.granted == "c"
    assert len(served) == 2


def test_an_error_is_the_waiters_own() -> None:
    first, second = waiter(0), waiter(1)
    queue = queue_of(first, second)
    rooms = Rooms(a=1)

    def grant(each: Waiter, claimed: Collection[str]) -> str | None:
        if each is first:
            raise Auth("bad key")
        return rooms.grant(each, claimed)

    serve([queue], grant, lambda each: set(each.names), 0)
    assert isinstance(first.refused, Auth)
    assert first.event.is_set()
    assert second.granted == "a"
    assert len(queue) == 0


def test_a_fault_in_between_loses_nobody() -> None:
    waiters = [waiter(0, names="a"), waiter(1, names="b"), waiter(2, names="c")]
    queue = queue_of(*waiters)

    def grant(each: Waiter, claimed: Collection[str]) -> str | None:
        if each is waiters[2]:
            raise RuntimeError("a fault of our own")
        return None

    with pytest.raises(RuntimeError):
        serve([queue], grant, lambda each: set(each.names), 0)
    assert Rooms(a=1, b=1, c=1).serve(queue) == waiters


def test_the_wait_that_is_told_follows_the_rate() -> None:
    queue, rooms = queue_of(*[waiter(0) for _ in range(400)]), Rooms()
    assert queue.wait_of(0) == pytest.approx(41)
    for tick in range(50):  # 20 a second
        rooms.rooms["a"] = 2
        rooms.serve(queue, now=tick * 0.1)
    assert queue.wait_of(5) == pytest.approx(len(queue) / 20, rel=0.2)
    assert 1 <= Queue(10).wait_of(0) <= 2


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.integers(0, 3), st.sampled_from(["a", "b", "ab", "c", "abc"])),
        st.tuples(st.just("leave"), st.integers(0, 99), st.just("")),
        st.tuples(st.just("serve"), st.integers(0, 3), st.sampled_from(["a", "b", "c"])),
    ),
    max_size=150,
)


@settings(deadline=None)
@given(ACTIONS, st.integers(1, 20))
def test_places_are_given_by_urgency_and_none_is_held_back(actions: list[tuple[str, int, str]], bound: int) -> None:
    classes: tuple[PriorityClass, ...] = ("critical", "high", "normal", "low")
    queues, everybody = [Queue(bound), Queue(bound)], list[tuple[Queue, Waiter]]()
    for now, (what, number, names) in enumerate(actions):
        if what == "join":
            queue, joined = queues[number % 2], waiter(now, classes[number], names)
            everybody.append((queue, joined))
            queue.join(joined)
        elif what == "leave" and everybody:
            queue, gone = everybody[number % len(everybody)]
            queue.leave(gone)
        elif what == "serve":
            before = [each for _, each in everybody if not each.gone]
            rooms = Rooms(**{names: number})
            served = rooms.serve(*queues, now=now)
            wants = sorted((each for each in before if names in each.names), key=lambda each: each.key)
            assert served == wants[:number]
    for queue in queues:
        assert len(queue) == sum(not each.gone for own, each in everybody if own is queue) <= bound
        assert all(each.shed or each.granted or each.gone for own, each in everybody if own is queue and each.gone)


# --- retries and windows --------------------------------------------------------------------------------------------


def test_retries_are_used_up_by_failures_and_earned_by_answers() -> None:
    retries = Retries()
    assert all(retries.take(1.0) for _ in range(10))
    assert not retries.take(1.0)
    for _ in range(19):
        retries.earn()
    assert not retries.take(2.0)
    retries.earn()
    assert retries.take(2.0)


@pytest.mark.parametrize(
    ("window", "wait"),
    [
        (Window("requests", 60, 0, WALL + 60, 60), 1.0),
        (Window("requests", 6000, 0, WALL + 60, 60), 0.5),
        (Window("tokens", 60_000, 0, WALL + 60, 60), 2.0),
        (Window("requests", None, 0, WALL + 7, None), 7.0),
        (Window("requests", 10, 0, WALL + 7, 86_400), 7.0),
        (Window("requests", 60, 1, WALL + 60, 60), 0.0),
    ],
)
def test_a_window_that_fills_steadily_is_not_waited_for_until_it_is_full(window: Window, wait: float) -> None:
    scope = Scope("account")
    scope.learn([window], now=100.0, wall=WALL)
    assert max(0.0, scope.shut_until - 100.0) == pytest.approx(wait)
