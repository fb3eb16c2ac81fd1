"""Rate limits as each provider's headers tell them."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from ridethrough.runtime.router.limits import Kind, Window, parse_go_duration, read_limits, wait_of

NOW = 1767225600.0  # 2026-01-01T00:00:00Z
MINUTE, DAY = 60.0, 86400.0


def window(
    kind: Kind,
    limit: float | None,
    remaining: float | None,
    reset: float | None = None,
    per: float | None = MINUTE,
) -> Window:
    """Return a window that resets in ``reset`` seconds from now."""
    return Window(kind, limit, remaining, None if reset is None else NOW + reset, per)


def told_by(windows: Iterable[Window]) -> list[tuple[object, ...]]:
    """Return windows in a form to compare: resets in seconds from now, to the millisecond."""
    return [
        (each.kind, each.limit, each.remaining, each.resets_at and round(each.resets_at - NOW, 3), each.per_seconds)
        for each in windows
    ]


def headers(prefix: str = "", **values: str) -> dict[str, str]:
    return {prefix + name.replace("_", "-"): value for name, value in values.items()}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (  # OpenAI's documentation
            {
                "x-ratelimit-limit-requests": "60",
                "x-ratelimit-limit-tokens": "150000",
                "x-ratelimit-remaining-requests": "59",
                "x-ratelimit-remaining-tokens": "149984",
                "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-reset-tokens": "6m0s",
            },
            [window("requests", 60, 59, 1), window("tokens", 150000, 149984, 360, None)],
        ),
        (
            {
                "x-ratelimit-limit-tokens_usage_based": "160000",
                "x-ratelimit-remaining-tokens_usage_based": "159976",
                "x-ratelimit-reset-tokens_usage_based": "9ms",
                "x-ratelimit-limit-input-images": "50000",
            },
            [window("tokens", 160000, 159976, 0.009)],
        ),
        (  # Groq's documentation: requests per day, tokens per minute
            {
                "retry-after": "2",
                "x-ratelimit-limit-requests": "14400",
                "x-ratelimit-limit-tokens": "18000",
                "x-ratelimit-remaining-requests": "14370",
                "x-ratelimit-remaining-tokens": "17997",
                "x-ratelimit-reset-requests": "2m59.56s",
                "x-ratelimit-reset-tokens": "7.66ms",
            },
            [window("requests", 14400, 14370, 179.56, DAY), window("tokens", 18000, 17997, 0.00766)],
        ),
        (
            {"x-groq-region": "x", "x-ratelimit-limit-requests": "1000", "x-ratelimit-remaining-requests": "1000"},
            [window("requests", 1000, 1000, None, DAY)],
        ),
        (
            {
                "anthropic-ratelimit-requests-limit": "50",
                "anthropic-ratelimit-requests-remaining": "49",
                "anthropic-ratelimit-requests-reset": "2026-01-01T00:00:02Z",
                "anthropic-ratelimit-input-tokens-limit": "400000",
                "anthropic-ratelimit-input-tokens-remaining": "398000",
                "anthropic-ratelimit-input-tokens-reset": "2026-01-01T01:00:01+01:00",
                "anthropic-ratelimit-output-tokens-limit": "80000",
                "anthropic-ratelimit-output-tokens-remaining": "0",
                "anthropic-ratelimit-output-tokens-reset": "2026-01-01T00:01:30Z",
            },
            [
                window("requests", 50, 49, 2),
                window("input_tokens", 400000, 398000, 1),
                window("output_tokens", 80000, 0, 90),
            ],
        ),
        (
            {
                "anthropic-ratelimit-unified-status": "rejected",
                "anthropic-ratelimit-unified-reset": "1767229200",
                "anthropic-ratelimit-unified-5h-status": "allowed",
                "anthropic-ratelimit-unified-5h-reset": "1767229200",
            },
            [window("requests", None, 0, 3600, None), window("requests", None, None, 3600, 5 * 3600)],
        ),
        (
            headers("x-ratelimit-", remaining_requests="119", remaining_tokens="119984", limit_tokens="120000"),
            [window("requests", None, 119), window("tokens", 120000, 119984)],
        ),
        (  # Azure: whole seconds tell nothing of the period
            {
                "x-ratelimit-limit-requests": "60",
                "x-ratelimit-remaining-requests": "59",
                "x-ratelimit-reset-requests": "60",
            },
            [window("requests", 60, 59, 60)],
        ),
        (headers("x-ratelimit-", limit_tokens="-1", remaining_tokens="-1", reset_tokens="0"), []),
        (
            {
                "x-ratelimit-limit-req-10-second": "60",
                "x-ratelimit-remaining-req-10-second": "58",
                "x-ratelimit-limit-tokens-minute": "2000000",
                "x-ratelimit-remaining-tokens-minute": "1999829",
                "x-ratelimit-limit-tokens-month": "10000000000",
                "x-ratelimit-remaining-tokens-month": "9999999829",
                "x-ratelimit-tokens-query-cost": "64",
            },
            [
                window("requests", 60, 58, None, 10),
                window("tokens", 2000000, 1999829),
                window("tokens", 10000000000, 9999999829, None, 30 * DAY),
            ],
        ),
        (
            headers("x-ratelimitbysize-", limit_minute="500000", remaining_minute="499000"),
            [window("tokens", 500000, 499000)],
        ),
        (
            headers("x-ratelimit-", limit="2", remaining="1", reset="2")
            | headers("x-tokenlimit-", limit="3000", remaining="2900"),
            [window("requests", 2, 1, 2, None), window("tokens", 3000, 2900, None, 1)],
        ),
        (
            {
                "x-ratelimit-limit-requests-day": "14400",
                "x-ratelimit-remaining-requests-day": "14399",
                "x-ratelimit-reset-requests-day": "33011.382867",
                "x-ratelimit-limit-tokens-minute": "60000",
                "x-ratelimit-remaining-tokens-minute": "59000",
                "x-ratelimit-reset-tokens-minute": "11.38",
            },
            [window("requests", 14400, 14399, 33011.382867, DAY), window("tokens", 60000, 59000, 11.38)],
        ),
        (  # OpenRouter: milliseconds of the epoch
            headers("x-ratelimit-", limit="20", remaining="0", reset="1767225660000"),
            [window("requests", 20, 0, 60, None)],
        ),
        (
            {"x-ratelimit-limit-tokens-prompt": "100", "x-ratelimit-remaining-tokens-prompt": "9"},
            [window("input_tokens", 100, 9)],
        ),
        (
            headers("ratelimit-", limit="100, 100;w=60", remaining="7", reset="30"),
            [window("requests", 100, 7, 30, None)],
        ),
        ({}, []),
        ({"content-type": "application/json", "x-request-id": "r"}, []),
        ({"x-ratelimit-over-limit": "no", "x-ratelimit-": "1", "x-ratelimit-limit-requests": "many"}, []),
    ],
    ids=[
        "openai",
        "openai usage based",
        "groq",
        "groq by region",
        "anthropic",
        "anthropic plan",
        "azure",
        "azure with seconds",
        "azure unknown",
        "mistral",
        "mistral by size",
        "together",
        "cerebras",
        "openrouter",
        "fireworks",
        "ietf",
        "none",
        "others",
        "nonsense",
    ],
)
def test_limits_in_every_format(told: dict[str, str], expected: list[Window]) -> None:
    assert told_by(read_limits(told, now=NOW)) == told_by(expected)


@pytest.mark.parametrize(
    "reset", ["-1", "nan", "inf", "soon", "", "1e300", "2026-01-01T00:00:00", "99999h", "9999999999"]
)
def test_an_absurd_reset_is_unknown(reset: str) -> None:
    told = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": reset}
    assert read_limits(told, now=NOW) == (window("requests", None, 0),)


@pytest.mark.parametrize("count", ["-1", "nan", "inf", "-inf", "", "unlimited"])
def test_an_absurd_count_is_unknown_and_never_zero(count: str) -> None:
    told = {"x-ratelimit-limit-requests": "5", "x-ratelimit-remaining-requests": count}
    assert read_limits(told, now=NOW) == (window("requests", 5, None),)


def test_no_header_whatever_raises() -> None:
    rng = random.Random(1)
    words = [
        "x",
        "anthropic",
        "ratelimit",
        "limit",
        "remaining",
        "reset",
        "requests",
        "tokens",
        "10",
        "second",
        "month",
        "",
    ]
    values = ["1", "-1", "1m", "2026-01-01", "NaN", "", "1e9", "1e400", "é", "0x10", "1_000", "½"]
    for _ in range(3000):
        name = "-".join(rng.choices(words, k=rng.randrange(1, 7))) + "ratelimit"[: rng.randrange(10)]
        told = {"x-ratelimit-" + name: rng.choice(values), name: rng.choice(values)}
        for each in read_limits(told, now=NOW):
            assert each.limit is None or each.limit >= 0
            assert each.resets_at is None or each.resets_at <= NOW + 40 * DAY


@pytest.mark.parametrize(
    ("windows", "wait"),
    [
        ([], None),
        ([window("requests", 60, 59, 1)], None),
        ([window("requests", 60, 0, 7), window("tokens", 100, 90, 50)], 7),
        ([window("requests", 60, 0, 7), window("tokens", 100, 0, 50)], 50),
        ([window("requests", 60, 0, -5)], 0),
        ([window("requests", 60, 0, None, 10)], 10),
        ([window("tokens", 60, 0, None, 30 * DAY)], None),
        ([window("requests", None, None, 3600, None)], 3600),
        ([window("requests", None, None, 3600, None), window("tokens", 100, 0, 5)], 5),
    ],
)
def test_the_wait_is_that_of_the_window_that_is_used_up(windows: list[Window], wait: float | None) -> None:
    assert wait_of(tuple(windows), NOW) == wait


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("6ms", 0.006),
        ("1s", 1),
        ("6m0s", 360),
        ("1h2m3s", 3723),
        ("2m59.56s", 179.56),
        ("12.5µs", 12.5e-6),
        ("800ns", 8e-7),
        ("", None),
        ("5", None),
        ("-1s", None),
        ("1d", None),
        ("1s later", None),
    ],
)
def test_go_durations(text: str, seconds: float | None) -> None:
    assert parse_go_duration(text) == (None if seconds is None else pytest.approx(seconds))
