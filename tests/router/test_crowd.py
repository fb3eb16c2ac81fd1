"""Those who were woken and are on their way: counted until they arrive or two seconds are over, and then forgotten."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

from ridethrough.runtime.router.call import awaits_of, awaits_of_budget
from ridethrough.runtime.router.crowd import ON_THE_WAY, Expected
from ridethrough.runtime.router.ledger import Cap

ROUTE = awaits_of("r", None)


def cap(run: str, window: str = "day:2026-11-27") -> Cap:
    return Cap(f"run:{run}/{window}", run, 1.0)


def test_who_is_on_the_way_is_counted_until_he_arrives() -> None:
    expected = Expected()
    expected.add(ROUTE, 3, 10.0)
    expected.arrived(ROUTE, (), 10.5)
    expected.arrived(awaits_of("another", None), (), 10.5)
    assert expected.count(ROUTE, 11.0) == 2
    assert expected.count(ROUTE, 10.0 + ON_THE_WAY) == 0


def test_one_who_waited_for_money_arrives_in_any_window() -> None:
    expected = Expected()
    money = awaits_of_budget(cap("a"), 0.5)
    expected.add(money, 2, 0.0)
    expected.arrived(ROUTE, (cap("b"),), 0.0)
    assert expected.count(money, 0.0) == 2
    expected.arrived(ROUTE, (cap("a", "day:2026-11-28"),), 0.0)
    assert expected.count(money, 0.0) == 1


def test_conditions_that_nobody_asks_for_again_are_forgotten() -> None:
    """Each run may wait for money of its own, once: what is remembered of it must not stay for ever."""
    expected = Expected()
    for number in range(1000):
        expected.add(awaits_of_budget(cap(f"run{number}"), 0.5), 1, 0.01 * number)
    expected.arrived(ROUTE, (), 9.99)
    assert len(expected._until) <= 200
    expected.arrived(ROUTE, (), 20.0)
    assert not expected


def test_who_never_arrives_here_is_not_remembered_for_ever() -> None:
    """Another worker may have taken those that were woken; the next ones are woken all the same."""
    expected = Expected()
    for number in range(1000):
        expected.add(ROUTE, 8, 0.1 * number)
    assert len(expected._until[ROUTE]) <= 8 * 21
