"""Which budgets cover a call, under which key, and when the money comes back."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from ridethrough.runtime.config import Budget, parse_config
from ridethrough.runtime.router.budget import caps_for, describe
from ridethrough.runtime.router.context import CallContext
from ridethrough.runtime.router.ledger import Cap

CALL = CallContext(
    tenant="acme",
    labels={"team": "blue", "stage": "test"},
    workflow="mails",
    agent="writer",
    run_id="r1",
)


def at(text: str) -> float:
    """Seconds since the epoch of a time in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


NOW = at("2026-11-27 14:35:07.5")


def budget(scope: str = "total", per: Any = "day", usd: float = 5.0, on_exceeded: Any = "pause") -> Budget:
    return Budget(scope=scope, usd=usd, per=per, on_exceeded=on_exceeded)


def key(scope: str, per: str = "day", context: CallContext = CALL, now: float = NOW) -> str | None:
    caps = caps_for([budget(scope, per)], context, now)
    return caps[0].key if caps else None


def test_the_configuration_becomes_caps_in_its_order() -> None:
    config = parse_config(
        """
        [[budgets]]
        scope = "tenant"
        usd = 50.0
        per = "day"

        [[budgets]]
        scope = "label:team"
        usd = 0.5
        per = "run"
        on_exceeded = "degrade"
        """
    )
    assert caps_for(config.budgets, CALL, NOW) == (
        Cap("tenant:acme/day:2026-11-27", "tenant 'acme', per day", 50.0, "pause", at("2026-11-28")),
        Cap("label:team=blue/run:r1", "label team='blue', per run", 0.5, "degrade", None, "r1"),
    )


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("total", "total/day:2026-11-27"),
        ("tenant", "tenant:acme/day:2026-11-27"),
        ("workflow", "workflow:mails/day:2026-11-27"),
        ("agent", "agent:writer/day:2026-11-27"),
        ("run", "run:r1/day:2026-11-27"),
        ("label:stage", "label:stage=test/day:2026-11-27"),
        ("label:colour", None),
    ],
)
def test_a_scope_counts_by_what_the_call_has(scope: str, expected: str | None) -> None:
    assert key(scope) == expected


@pytest.mark.parametrize("scope", ["tenant", "workflow", "agent", "run", "label:team"])
@pytest.mark.parametrize("per", ["run", "hour", "day", "month"])
def test_a_call_without_it_is_not_covered(scope: str, per: str) -> None:
    assert key(scope, per, CallContext(path="a")) is None


def test_a_call_outside_of_runs_has_no_run_to_spend_for() -> None:
    context = CallContext(tenant="acme")
    assert key("tenant", "run", context) is None
    assert key("total", "run", context) is None
    assert key("tenant", "day", context) is not None


def test_a_run_has_its_own_money_whatever_the_time() -> None:
    (cap,) = caps_for([budget("run", "run")], CALL, NOW)
    assert cap == Cap("run:r1/run:r1", "run 'r1'", 5.0, "pause", None, "r1")
    assert caps_for([budget("run", "run")], CALL, NOW + 40 * 86400) == (cap,)
    (daily,) = caps_for([budget("run", "day")], CALL, NOW)
    assert (daily.key, daily.run_id) == ("run:r1/day:2026-11-27", "r1"), "it goes with its run too"


@pytest.mark.parametrize(
    ("per", "now", "window", "resets_at"),
    [
        ("hour", "2026-11-27 14:00:00", "hour:2026-11-27T14", "2026-11-27 15:00"),
        ("hour", "2026-11-27 23:59:59.999", "hour:2026-11-27T23", "2026-11-28 00:00"),
        ("day", "2026-11-27 00:00:00", "day:2026-11-27", "2026-11-28"),
        ("day", "2028-02-28 23:59:59", "day:2028-02-28", "2028-02-29"),
        ("month", "2026-11-30 23:59:59", "month:2026-11", "2026-12-01"),
        ("month", "2026-12-31 12:00:00", "month:2026-12", "2027-01-01"),
        ("month", "2027-01-01 00:00:00", "month:2027-01", "2027-02-01"),
        ("month", "2028-02-29 07:00:00", "month:2028-02", "2028-03-01"),
        ("day", "1970-01-01 00:00:00", "day:1970-01-01", "1970-01-02"),
    ],
)
def test_windows_are_the_calendars_in_utc(per: str, now: str, window: str, resets_at: str) -> None:
    (cap,) = caps_for([budget("total", per)], CALL, at(now))
    assert (cap.key, cap.resets_at) == (f"total/{window}", at(resets_at))
    (next_one,) = caps_for([budget("total", per)], CALL, at(resets_at))
    assert next_one.key != cap.key, "the money is back the moment it says so"


def test_budgets_of_one_scope_and_window_lie_on_the_same_money() -> None:
    first, second = caps_for([budget(usd=5.0, on_exceeded="degrade"), budget(usd=10.0, on_exceeded="fail")], CALL, NOW)
    assert first.key == second.key
    assert (first.usd, first.on_exceeded, second.usd, second.on_exceeded) == (5.0, "degrade", 10.0, "fail")


def test_no_two_subjects_share_a_key() -> None:
    """Names come from users: nothing in them may look like the end of a name."""
    names = [
        "a",
        "a/day:2026-11-27",
        "a%2Fday:2026-11-27",
        "a=b",
        "a%3Db",
        "",
        " ",
        "Ärzte",
        "日本",
        "a'b\"c",
        "a\nb",
        "\ud83d",
    ]
    keys = [key("tenant", context=CallContext(tenant=name)) for name in names]
    assert len(set(keys)) == len(names)
    assert key("tenant", context=CallContext(tenant="日本")) == "tenant:日本/day:2026-11-27"
    left = key("label:a=b", context=CallContext(labels={"a=b": "c"}))
    right = key("label:a", context=CallContext(labels={"a": "b=c"}))
    assert left != right
    for each in keys:
        assert each is not None
        assert each.encode(), "any database can hold it"


def test_a_label_may_be_called_like_a_scope() -> None:
    assert key("label:tenant", context=CallContext(labels={"tenant": "x"})) == "label:tenant=x/day:2026-11-27"
    assert key("label:total", context=CallContext(labels={"total": "x"})) == "label:total=x/day:2026-11-27"


def test_a_description_says_whose_how_much_and_when_it_starts_anew() -> None:
    (cap,) = caps_for([budget("tenant", usd=12.5)], CALL, NOW)
    assert describe(cap) == "the budget of 12.5 USD for tenant 'acme', per day (anew at 2026-11-28 00:00 UTC)"
    (cap,) = caps_for([budget("run", "run", usd=1_000_000)], CALL, NOW)
    assert describe(cap) == "the budget of 1000000 USD for run 'r1'"
    (cap,) = caps_for([budget("tenant")], CallContext(tenant="\x1b[31mred"), NOW)
    assert "\x1b" not in describe(cap), "a name cannot take over the terminal"
