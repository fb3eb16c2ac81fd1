"""What a provider's failure means: one table from what was sent to the class that a caller decides on.

Status codes alone mislead: a 429 may be a used-up account, a 400 an overloaded one, and an error inside a stream has
no status at all. So the table is read from the top, provider codes and types first, then telling words of the message,
then the status. It is data: put rules of your own in front of it, ``classify(..., table=(Rule(...), *TABLE))``.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from random import Random
from typing import Any

from ridethrough.runtime.config import ErrorRule
from ridethrough.runtime.errors import (
    Auth,
    ContentFilter,
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
    Unavailable,
)
from ridethrough.runtime.router.limits import GO_DURATION, parse_go_duration, read_limits, wait_of

FAILS_OVER: tuple[type[ModelError], ...] = (
    RateLimited,
    QuotaExhausted,
    Overloaded,
    ServerError,
    Transport,
    Slow,
    StreamBroken,
)
"""Classes after which another deployment is asked. The others would fail there too, or must not be evaded."""

_LONGEST_WAIT = 7 * 86400.0  # seconds; anything longer is a mistake of the server's


@dataclass(frozen=True)
class Rule:
    """One row: all conditions that are given must hold.

    ``names`` are codes, types, statuses and reasons in lower case, of which one must be in the error; ``status`` are
    HTTP statuses; ``words`` is a pattern that the lower-case message contains.
    """

    error: type[ModelError]
    names: frozenset[str] = frozenset()
    status: frozenset[int] = frozenset()
    words: re.Pattern[str] | None = None

    def matches(self, found: Finding) -> bool:
        """Whether this row is about ``found``."""
        if self.names and self.names.isdisjoint(found.names):
            return False
        if self.status and found.status not in self.status:
            return False
        return self.words is None or self.words.search(found.message.lower()) is not None


@dataclass(frozen=True)
class Finding:
    """An error as the table sees it: the effective status, its names in lower case, and its message."""

    status: int | None = None
    code: str | None = None
    names: frozenset[str] = frozenset()
    message: str = ""
    body: Any = field(default=None, repr=False)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TOO_LONG = re.compile(
    r"(prompt|input) is too long|maximum (context|prompt) length|input token count|too many (input )?tokens|"
    r"exceeds? (the )?(available )?context|context (length|window|limit|size)|"
    r"reduce the length of the (messages|prompt|input)"
)
"""How servers say that the conversation does not fit; none of them agrees with another on the code."""


TABLE: tuple[Rule, ...] = (
    # Names that say it all.
    Rule(
        QuotaExhausted,
        _names(
            "insufficient_quota credit_balance_exhausted organization_spend_limit_exceeded project_spend_limit_exceeded"
            " organization_usage_limit_exceeded billing_error enforced_spend_limit_reached billing_hard_limit_reached"
            " billing_not_active insufficient_balance insufficient_credits per_day_quota exceeded_current_quota_error"
            " servicequotaexceededexception failed_precondition"
        ),
    ),
    Rule(RateLimited, _names("openrouter_in_flight_budget")),
    Rule(
        ContextLength,
        _names(
            "context_length_exceeded exceed_context_size_error string_above_max_length max_tokens_exceeded"
            " context_window_exceeded model_context_window_exceeded"
        ),
    ),
    # This one request is above the limit: it fails as often as it is sent, and a smaller one or another model helps.
    Rule(ContextLength, _names("rate_limit_exceeded"), frozenset({413})),
    Rule(ContextLength, _names("request_above_limit"), frozenset({413, 429})),
    Rule(
        ContentFilter,
        _names(
            "content_filter content_policy_violation responsibleaipolicyviolation moderation_blocked safety"
            " prohibited_content invalid_prompt image_content_policy_violation"
        ),
    ),
    Rule(
        Auth,
        _names(
            "invalid_api_key authentication_error permission_error permission_denied unauthenticated unauthorized"
            " invalid_authentication incorrect_api_key api_key_invalid account_deactivated"
            " accessdeniedexception unrecognizedclientexception expiredtokenexception invalidsignatureexception"
        ),
    ),
    Rule(Overloaded, _names("slow_down"), frozenset({503})),
    Rule(
        RateLimited,
        _names(
            "rate_limit_exceeded rate_limit_error rate_limited slow_down throttlingexception too_many_requests"
            " capacity_exceeded requests_limit_exceeded tokens_limit_exceeded"
        ),
    ),
    Rule(
        Overloaded,
        _names(
            "overloaded_error server_is_overloaded overloaded engine_overloaded engine_overloaded_error unavailable"
            " unavailable_error service_unavailable serviceunavailableexception modelnotreadyexception"
            " model_overloaded"
        ),
    ),
    # Words of the message, where the name is too general.
    Rule(ContextLength, words=_TOO_LONG, status=frozenset({400, 403, 413, 422})),
    Rule(ContextLength, _names("invalid_request_error invalid_argument validationexception"), words=_TOO_LONG),
    Rule(
        QuotaExhausted,
        words=re.compile(
            r"credit balance is too low|billing (is )?disabled|insufficient (balance|credits?|funds)|"
            r"specified (workspace )?api usage limits|used all available credits|monthly spending limit"
        ),
    ),
    Rule(
        ContentFilter,
        words=re.compile(
            r"content management policy|content filtering policy|flagged by moderation|requires moderation|"
            r"flagged as potentially violating|violates? usage guidelines|content exists risk|our safety system"
        ),
    ),
    Rule(
        Overloaded,
        words=re.compile(
            r"(servers?|models?|engine|system|service) (is|are) (currently |temporarily )?overloaded|"
            r"experiencing high demand|server (is )?busy|currently over capacity"
        ),
    ),
    # Statuses.
    Rule(QuotaExhausted, status=frozenset({402})),
    Rule(Auth, status=frozenset({401, 403})),
    Rule(RateLimited, status=frozenset({429, 498})),
    Rule(RateLimited, _names("resource_exhausted")),
    Rule(Overloaded, status=frozenset({503, 529})),
    Rule(ServerError, status=frozenset({408, 409, 424, 425, 499, *range(500, 600)})),
    Rule(InvalidRequest, status=frozenset(range(400, 500))),
    # No status, as inside a stream.
    Rule(
        InvalidRequest,
        _names(
            "invalid_request_error invalid_value not_found_error not_found model_not_found tool_use_failed"
            " invalid_argument request_too_large validationexception"
            # Images that the Responses API cannot use: it tells so only after it has begun to answer.
            " invalid_image invalid_image_format invalid_base64_image invalid_image_url invalid_image_mode"
            " image_too_large image_too_small image_file_too_large image_file_not_found image_parse_error"
            " unsupported_image_media_type empty_image_file failed_to_download_image"
        ),
    ),
    Rule(ServerError),
)


def rules_of(configured: Iterable[ErrorRule]) -> tuple[Rule, ...]:
    """Return the rows that a configuration puts in front of the table."""
    classes = {
        kind.__name__: kind
        for kind in (
            RateLimited,
            QuotaExhausted,
            Overloaded,
            ServerError,
            ContextLength,
            ContentFilter,
            InvalidRequest,
            Auth,
        )
    }
    return tuple(
        Rule(
            classes[each.error],
            frozenset(name.lower() for name in each.names),
            frozenset(each.status),
            re.compile(each.words, re.IGNORECASE) if each.words else None,
        )
        for each in configured
    )


def classify(
    status: int | None,
    body: Any,
    headers: Mapping[str, str] | None = None,
    *,
    deployment: str = "",
    table: Iterable[Rule] = TABLE,
    now: float | None = None,
) -> ModelError:
    """Build the error that a provider's answer means.

    Args:
        status: The HTTP status; ``None`` or 200 for an error inside an answer.
        body: The parsed body, or its text when it is no JSON.
        headers: The answer's headers, names in any case.
        deployment: Whose answer it is, for the message.
        table: The rules, from the first.
        now: Seconds since the epoch, for dates in ``retry-after``.
    """
    low = {name.lower(): value for name, value in (headers or {}).items()}
    found = _found(status, body, low)
    kind = next((rule.error for rule in table if rule.matches(found)), ServerError)
    wait = retry_after(low, found, now=now)
    return kind(
        _describe(deployment, found, wait),
        deployment=deployment,
        status=found.status,
        code=found.code,
        retry_after=wait,
        request_id=request_id(low),
        retryable=low.get("x-should-retry", "").strip().lower() != "false",
    )


def request_id(headers: Mapping[str, str]) -> str | None:
    """Return the provider's id of the request; header names are in lower case."""
    for name in ("x-request-id", "request-id", "x-generation-id", "apim-request-id", "x-amzn-requestid"):
        if name in headers:
            return headers[name]
    return None


def _describe(deployment: str, found: Finding, wait: float | None) -> str:
    told = " ".join(str(part) for part in (found.status, found.code) if part) or "an error"
    if found.code and str(found.status) == found.code:
        told = found.code
    hint = f" (it asks to wait {wait:g} s)" if wait else ""
    text = re.sub(r"\s+", " ", found.message).strip()[:500]
    return f"{deployment or 'the provider'} answered {told}{': ' + text if text else ''}{hint}"


# --- reading bodies -------------------------------------------------------------------------------------------------


def _found(status: int | None, body: Any, headers: Mapping[str, str]) -> Finding:
    try:
        return find(status, body, headers)
    except RecursionError:
        return Finding(status, message="an error that is nested too deeply to be read")


def find(status: int | None, body: Any, headers: Mapping[str, str] | None = None) -> Finding:
    """Read an error out of any of the shapes that providers send; names of ``headers`` are in lower case."""
    told = _amazon_type((headers or {}).get("x-amzn-errortype"))
    error = _error_of(_unwrapped(body))
    if not isinstance(error, Mapping):
        return Finding(status, told or None, _lower((told,)), "" if error is None else str(error), body)
    inner = error.get("innererror")
    values = [*(error.get(key) for key in ("code", "type", "status")), told, _amazon_type(error.get("__type"))]
    values += [inner.get("code") if isinstance(inner, Mapping) else None, *_reasons(error)]
    message = str(error.get("message") or error.get("error") or error.get("detail") or "")
    upstream = _upstream(error)
    names = _lower((*values, *upstream.names, "request_above_limit" if _is_above_limit(message) else None))
    code = next((str(value)[:100] for value in values if value and isinstance(value, str | int)), None)
    text = f"{message}: {upstream.message}" if upstream.message else message
    return Finding(_effective_status(status, error), code, names, text, error)


def _lower(values: Iterable[Any]) -> frozenset[str]:
    return frozenset(value.lower() for value in values if isinstance(value, str) and value)


def _amazon_type(value: Any) -> str:
    """Return the name in ``ThrottlingException:http://...`` (a header) or ``com.amazon#ThrottlingException``."""
    return value.partition(":")[0].rpartition("#")[2].strip() if isinstance(value, str) else ""


def _upstream(error: Mapping[str, Any]) -> Finding:
    """Read the error that OpenRouter passes on ("Provider returned error"): the words that tell are in there."""
    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None
    return find(None, raw) if isinstance(raw, str | Mapping) else Finding()


_ASKED = re.compile(r"\blimit:?\s*(\d[\d,]{,20})\b.{,40}?\brequested:?\s*(\d[\d,]{,20})\b", re.I | re.S)


def _is_above_limit(message: str) -> bool:
    """Whether a rate limit is below what this one request asks for, so that no waiting helps."""
    asked = _ASKED.search(message)
    return asked is not None and int(asked[2].replace(",", "")) > int(asked[1].replace(",", ""))


def _unwrapped(body: Any, depth: int = 3) -> Any:
    """Undo what proxies do: JSON inside a string, an array around the object."""
    if depth and isinstance(body, list) and body:
        return _unwrapped(body[0], depth - 1)
    if depth and isinstance(body, str) and body.lstrip()[:1] in ("{", "["):
        try:
            return _unwrapped(json.loads(body), depth - 1)
        except (ValueError, RecursionError):
            return body
    return body


def _error_of(body: Any) -> Any:
    """Return the innermost error object: ``{"error": {...}}``, ``{"error": "..."}``, ``{"errors": [...]}`` or flat."""
    if not isinstance(body, Mapping):
        return body
    inner = _unwrapped(body.get("error") or body.get("errors"))
    if isinstance(inner, Mapping):
        nested = _unwrapped(inner.get("message"))
        return _error_of(nested) if isinstance(nested, Mapping) and "error" in nested else inner
    return body


def _reasons(error: Mapping[str, Any]) -> Iterable[str]:
    """Yield the names that hide in details: ErrorInfo's reason, a per-day quota, OpenRouter's metadata."""
    for detail in _objects(error.get("details")):
        if isinstance(reason := detail.get("reason"), str):
            yield reason
        for violation in _objects(detail.get("violations")):
            if "perday" in str(violation.get("quotaId", "")).lower():
                yield "per_day_quota"
    metadata = error.get("metadata")
    if isinstance(metadata, Mapping):
        if isinstance(source := metadata.get("limit_source"), str):
            yield source
        if metadata.get("flagged_input") or (metadata.get("reasons") and error.get("code") == 403):
            yield "moderation_blocked"


def _objects(value: Any) -> Iterable[Mapping[str, Any]]:
    """Return the objects in what should be a list of them."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _effective_status(status: int | None, error: Mapping[str, Any]) -> int | None:
    """Return the HTTP status, or inside a 200 the number that the error itself names."""
    if status is not None and status >= 400:
        return status
    for key in ("code", "status_code", "status"):
        value = error.get(key)
        if isinstance(value, str) and re.fullmatch("[0-9]{3}", value):
            value = int(value)
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return None


# --- how long to wait -----------------------------------------------------------------------------------------------

_HINT = re.compile(
    rf"(?:try again in|retry in|retry after|wait)\s+"
    rf"(?:({GO_DURATION})|(\d+(?:\.\d+)?)\s*(milliseconds?|seconds?|minutes?))",
    re.I,
)


def retry_after(headers: Mapping[str, str], found: Finding, *, now: float | None = None) -> float | None:
    """Return the seconds that the provider asks to wait, or ``None`` when it does not say, or says nonsense.

    ``retry-after-ms`` goes before ``retry-after`` (seconds or a date), and the body is read only without them. A 429
    that has neither waits until its used-up window resets. (That comes last because the windows of OpenAI and Groq
    are buckets: they reset when they are full again, while the body says when there is room for this request.)
    """
    now = time.time() if now is None else now
    for name in ("retry-after-ms", "x-ms-retry-after-ms"):
        if (wait := _scaled(headers.get(name), 0.001)) is not None:
            return wait
    if (value := headers.get("retry-after")) is not None:
        wait = _scaled(value, 1.0)
        return wait if wait is not None else _until(value, now)
    wait = _from_body(found)
    if wait is None and found.status == 429:
        wait = wait_of(read_limits(headers, now=now), now)
    return None if wait is None else _sane(wait)


def _scaled(value: str | None, unit: float) -> float | None:
    try:
        return _sane(float(value) * unit) if value is not None else None
    except ValueError:
        return None


def _sane(seconds: float) -> float | None:
    return seconds if 0 <= seconds <= _LONGEST_WAIT else None


def _until(date: str, now: float) -> float | None:
    try:
        return _sane(max(0.0, parsedate_to_datetime(date).timestamp() - now))
    except (ValueError, TypeError, OverflowError):
        return None


def _from_body(found: Finding) -> float | None:
    if isinstance(found.body, Mapping):
        for detail in _objects(found.body.get("details")):
            if isinstance(delay := detail.get("retryDelay"), str) and (wait := parse_go_duration(delay)) is not None:
                return _sane(wait)
    hint = _HINT.search(found.message)
    if hint is None:
        return None
    if hint[1]:
        return _sane(parse_go_duration(hint[1].lower()) or 0.0)
    unit = {"m": 60.0, "s": 1.0}[hint[3][0].lower()] if not hint[3].lower().startswith("mil") else 0.001
    return _sane(float(hint[2]) * unit)


# --- what follows from a failure ------------------------------------------------------------------------------------


class Stalled(Slow, StreamBroken):
    """A stream fell silent in the middle: slow to some, broken to others, so it is both."""


def pause_reason(error: Unavailable) -> str:
    """Return why nobody answers, as a pause gives it: ``quota``, ``outage`` or ``brownout``."""
    if error.errors and all(isinstance(each, QuotaExhausted) for each in error.errors):
        return "quota"
    alive = (Slow, StreamBroken, Overloaded, RateLimited)
    return "brownout" if any(isinstance(each, alive) for each in error.errors) else "outage"


def seconds_before_retry(error: ModelError, tries: int, random: Random) -> float:
    """Return the seconds after which the same deployment is worth another try by the same call.

    What the provider asks is a floor. Without a word from it, full jitter from a fifth of a second on, doubled with
    each of the ``tries``, where trying again may help at once, and some seconds where it does not: a deployment that
    was slow or broke off is not better a moment later.
    """
    if error.retry_after is not None:
        return error.retry_after
    if isinstance(error, QuotaExhausted):
        return 300.0
    if isinstance(error, Slow | StreamBroken) or not error.retryable:
        return 5.0
    return min(5.0, 0.2 * 2.0 ** (tries - 1)) * (0.5 + random.random())
