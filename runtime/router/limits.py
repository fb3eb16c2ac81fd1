"""What a provider says of its own rate limits, read from the headers of every response.

There is no common format. OpenAI, Groq and Azure send ``x-ratelimit-remaining-tokens`` and resets as Go durations or
whole seconds; Anthropic puts the field last and sends dates; Mistral, Cerebras and Together name the period or the
subject in ways of their own. But all of them name a *field* (limit, remaining, reset), and most a *subject* and a
*period*, so one grammar reads them all, and a header name is parsed once in the life of a process.

What is negative or absurd is unknown (Azure's Responses API answers -1, -1 and 0), and an unknown number is ``None``,
never zero: a limiter that believed a zero would stop a healthy provider.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Literal, NamedTuple

Kind = Literal["requests", "tokens", "input_tokens", "output_tokens"]

MINUTE, DAY = 60.0, 86400.0
_LONGEST_RESET = 40 * DAY  # seconds; a month's quota resets within it, anything later is a mistake of the server's


@dataclass(frozen=True)
class Window:
    """One rate limit as a response tells it; ``None`` where it does not.

    ``limit`` and ``remaining`` are requests or tokens in ``per_seconds``; ``resets_at`` is in seconds since the epoch.
    """

    kind: Kind
    limit: float | None
    remaining: float | None
    resets_at: float | None
    per_seconds: float | None


def read_limits(headers: Mapping[str, str], *, now: float) -> tuple[Window, ...]:
    """Return the windows that ``headers`` tell of, in the order in which they name them.

    Args:
        headers: Names in lower case.
        now: Seconds since the epoch, which relative resets are added to.
    """
    if "ratelimit" not in "\n".join(headers):
        return ()
    found: dict[_Subject, dict[str, str]] = {}
    for name, value in headers.items():
        if "limit" in name and (parsed := _parsed_name(name)) is not None:
            found.setdefault(parsed.subject, {})[parsed.field] = value
    family = _FAMILY if any(name.startswith("x-groq-") for name in headers) else {}
    windows = [_window(subject, fields, now, family) for subject, fields in found.items()]
    return tuple([window for window in windows if window is not None])


def wait_of(windows: tuple[Window, ...], now: float) -> float | None:
    """Return the seconds until every used-up window has reset: the wait of a 429 that names none itself.

    Where nothing is known to be used up, a window that only tells its reset is taken to be the one (Anthropic's plans
    do so). A used-up window without a reset lasts one period, when that is at most a minute: a guess of a month would
    close a provider that answers again in a second. ``None`` when nothing can be said.
    """
    used_up = [window for window in windows if window.remaining is not None and window.remaining <= 0]
    suspects = used_up or [window for window in windows if window.remaining is None]
    waits = [wait for window in suspects if (wait := _wait(window, now)) is not None]
    return max(waits, default=None)


def _wait(window: Window, now: float) -> float | None:
    if window.resets_at is not None:
        return max(0.0, window.resets_at - now)
    if window.remaining is not None and window.per_seconds is not None and window.per_seconds <= MINUTE:
        return window.per_seconds
    return None


# --- names ----------------------------------------------------------------------------------------------------------


class _Subject(NamedTuple):
    """What a header is about; headers with the same one belong to the same window."""

    family: str
    name: str
    kind: Kind
    per_seconds: float | None


class _Name(NamedTuple):
    field: str
    subject: _Subject


_NAME = re.compile(r"(?P<family>(?:x-|anthropic-)?(?:ratelimit|ratelimitbysize|tokenlimit))-(?P<rest>.+)")
_PERIOD = re.compile(r"(?:^|-)(?:(?P<count>\d+)-?)?(?P<unit>second|minute|hour|day|month|[mhd])s?$")
_UNITS = {"second": 1.0, "minute": MINUTE, "hour": 3600.0, "day": DAY, "month": 30 * DAY, "m": MINUTE, "h": 3600.0}
_UNITS["d"] = DAY
_FIELDS = frozenset(("limit", "remaining", "reset", "status"))

_KINDS: dict[str, Kind] = {
    "": "requests",
    "req": "requests",
    "requests": "requests",
    "unified": "requests",
    "tokens": "tokens",
    "tokens_usage_based": "tokens",
    "input-tokens": "input_tokens",
    "tokens-prompt": "input_tokens",
    "output-tokens": "output_tokens",
    "tokens-generated": "output_tokens",
}
"""Subjects by their names. Others (images, projects, the cost of this query) limit nothing that is counted here."""

_SIZES: dict[str, Kind] = {"": "tokens"}
"""The same for the families that count tokens without saying so: Mistral's ``bysize``, Together's ``tokenlimit``."""

_FAMILY: dict[str, float] = {"requests": DAY, "tokens": MINUTE}
"""Groq's periods, which its header names leave out and its documentation states."""


@lru_cache(maxsize=1024)
def _parsed_name(name: str) -> _Name | None:
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    words = match["rest"].split("-")
    field = next((word for word in words if word in _FIELDS), None)
    if field is None:
        return None
    words.remove(field)
    rest, per_seconds = _without_period("-".join(words))
    kind = (_SIZES if match["family"].endswith(("bysize", "tokenlimit")) else _KINDS).get(rest)
    return None if kind is None else _Name(field, _Subject(match["family"], rest, kind, per_seconds))


def _without_period(text: str) -> tuple[str, float | None]:
    match = _PERIOD.search(text)
    if match is None:
        return text, None
    return text[: match.start()], float(match["count"] or 1) * _UNITS[match["unit"]]


# --- values ---------------------------------------------------------------------------------------------------------


def _window(subject: _Subject, fields: Mapping[str, str], now: float, family: Mapping[str, float]) -> Window | None:
    limit, remaining = _number(fields.get("limit")), _number(fields.get("remaining"))
    if fields.get("status") == "rejected":
        remaining = 0.0
    if limit is None and remaining is None and subject.name != "unified":
        return None
    reset = fields.get("reset", "")
    resets_at = _reset(reset, now) if reset else None
    per_seconds = subject.per_seconds or family.get(subject.name)
    if per_seconds is None:
        wait = None if resets_at is None else resets_at - now
        per_seconds = _bucket(limit, remaining, wait) if reset.endswith("s") else None
        per_seconds = per_seconds or _usual_period(subject, wait)
    return Window(subject.kind, limit, remaining, resets_at, per_seconds)


def _number(text: str | None) -> float | None:
    """Return a count; gateways append their policy to it (``100, 100;w=60``)."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        head = re.match(r"\s*(\d+(?:\.\d+)?)\s*[,;]", text)
        return float(head[1]) if head else None
    return value if 0 <= value < float("inf") else None


def _reset(text: str, now: float) -> float | None:
    """Return when a window resets: seconds from now, a Go duration, a date, or seconds or milliseconds of the epoch."""
    try:
        value = float(text)
    except ValueError:
        wait = parse_go_duration(text)
        at = _date(text) if wait is None else now + wait
    else:
        at = now + value if value < 1e9 else value / 1000.0 if value > 1e11 else value
        at = at if value >= 0 else None
    return at if at is not None and at - now <= _LONGEST_RESET else None


def _date(text: str) -> float | None:
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        return None
    return date.timestamp() if date.tzinfo is not None else None


_PERIODS = (1.0, 10.0, MINUTE, 3600.0, DAY)


def _bucket(limit: float | None, remaining: float | None, wait: float | None) -> float | None:
    """Return the period of a bucket that fills at an even rate, as those of OpenAI and Groq do.

    Their reset is the time until the bucket is full: with 30 of 14400 requests used and 2m59.56s to go it is a day.
    Only Go durations are exact enough for this; whole seconds would make anything of anything.
    """
    if not (wait and limit) or remaining is None or remaining >= limit:
        return None
    full = wait * limit / (limit - remaining)
    return next((period for period in _PERIODS if abs(full - period) <= 0.05 * period), None)


def _usual_period(subject: _Subject, wait: float | None) -> float | None:
    """Return the minute that most documentations speak of, unless the reset is farther away than that."""
    if subject.family == "anthropic-ratelimit" and subject.name != "unified":
        return MINUTE
    if subject.name in ("", "unified"):
        return 1.0 if subject.family == "x-tokenlimit" else None
    return MINUTE if wait is None or wait <= MINUTE else None


_GO_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
GO_DURATION = r"(?:\d+(?:\.\d+)?(?:ns|[uµμ]s|ms|h|m|s))+"
_GO_WHOLE = re.compile(GO_DURATION)
_GO_PIECE = re.compile(r"(\d+(?:\.\d+)?)(ns|[uµμ]s|ms|h|m|s)")


def parse_go_duration(text: str) -> float | None:
    """Return the seconds of ``6ms``, ``1s``, ``6m0s``, ``1h2m3s``; ``None`` when it is none of these."""
    text = text.strip()
    if not _GO_WHOLE.fullmatch(text):
        return None
    return sum(float(number) * _GO_UNITS[unit] for number, unit in _GO_PIECE.findall(text))
