"""The meaning of what providers send when they fail: one table, and the waits they ask for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ridethrough.runtime import errors
from ridethrough.runtime.errors import ModelError
from ridethrough.runtime.router.errors import TABLE, Rule, classify

# --- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (429, {"error": {"type": "tokens", "code": "rate_limit_exceeded"}}, errors.RateLimited),
        (429, {"error": {"type": "insufficient_quota", "code": "insufficient_quota"}}, errors.QuotaExhausted),
        (429, {"error": {"code": "project_spend_limit_exceeded"}}, errors.QuotaExhausted),
        (429, {"error": {"code": "slow_down"}}, errors.RateLimited),
        (503, {"error": {"code": "slow_down"}}, errors.Overloaded),
        (503, {"error": {"code": "server_is_overloaded"}}, errors.Overloaded),
        (529, {"type": "error", "error": {"type": "overloaded_error"}}, errors.Overloaded),
        (498, {"error": {"code": "capacity_exceeded"}}, errors.RateLimited),
        (402, {"error": {"code": 402, "message": "credits"}}, errors.QuotaExhausted),
        (
            402,
            {"error": {"code": 402, "metadata": {"limit_source": "openrouter_in_flight_budget"}}},
            errors.RateLimited,
        ),
        (413, {"error": {"code": "rate_limit_exceeded", "type": "tokens"}}, errors.ContextLength),
        (400, {"error": {"code": "context_length_exceeded"}}, errors.ContextLength),
        (
            400,
            {"object": "error", "message": "This model's maximum context length is 8", "code": 400},
            errors.ContextLength,
        ),
        (400, {"error": {"code": "content_filter", "innererror": {"code": "x"}}}, errors.ContentFilter),
        (400, {"error": {"message": "Your credit balance is too low"}}, errors.QuotaExhausted),
        (401, {"error": {"code": "invalid_api_key"}}, errors.Auth),
        (403, "Forbidden", errors.Auth),
        (404, {"error": {"code": "model_not_found"}}, errors.InvalidRequest),
        (422, {"detail": "nope"}, errors.InvalidRequest),
        (500, "", errors.ServerError),
        (502, "<html>", errors.ServerError),
        (503, {"error": "server busy, please try again."}, errors.Overloaded),
        (504, None, errors.ServerError),
        (429, "Too many tokens for team", errors.RateLimited),
        (429, [{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED"}}], errors.RateLimited),
        (
            429,
            {"error": {"status": "RESOURCE_EXHAUSTED", "details": [{"violations": [{"quotaId": "RequestsPerDay"}]}]}},
            errors.QuotaExhausted,
        ),
        (200, {"error": {"message": json.dumps({"error": {"code": 503, "message": "x"}})}}, errors.Overloaded),
        # In the words of other providers.
        (
            400,
            {
                "type": "error",
                "error": {
                    "type": "invalid_request_error",
                    "message": "prompt is too long: 210000 tokens > 200000 maximum",
                },
            },
            errors.ContextLength,
        ),
        (
            400,
            {
                "error": {
                    "status": "INVALID_ARGUMENT",
                    "message": "The input token count (1200000) exceeds the maximum number of tokens allowed.",
                }
            },
            errors.ContextLength,
        ),
        (400, {"error": {"code": 400, "type": "exceed_context_size_error", "message": "x"}}, errors.ContextLength),
        (400, {"message": "Input is too long for requested model."}, errors.ContextLength),
        (
            400,
            "This model's maximum prompt length is 131072 but the request contains 150000 tokens.",
            errors.ContextLength,
        ),
        (
            403,
            {"error": {"message": "Input token count + max_tokens must be less than the context length"}},
            errors.ContextLength,
        ),
        (
            None,
            {"type": "invalid_request_error", "message": "prompt is too long: 9 tokens > 8 maximum"},
            errors.ContextLength,
        ),
        (
            429,
            {
                "error": {
                    "code": "rate_limit_exceeded",
                    "type": "tokens",
                    "message": "Request too large for m on tokens per min (TPM): Limit 30000, Requested 37534.",
                }
            },
            errors.ContextLength,
        ),
        (
            429,
            {
                "error": {
                    "code": "rate_limit_exceeded",
                    "message": "tokens per min (TPM): Limit 30,000, Used 28,000, Requested 3,000.",
                }
            },
            errors.RateLimited,
        ),
        (
            400,
            {
                "error": {
                    "type": "invalid_request_error",
                    "message": "You have reached your specified API usage limits.",
                }
            },
            errors.QuotaExhausted,
        ),
        (402, {"type": "error", "error": {"type": "billing_error"}}, errors.QuotaExhausted),
        (429, {"error": {"type": "enforced_spend_limit_reached"}}, errors.QuotaExhausted),
        (400, {"error": {"status": "FAILED_PRECONDITION", "message": "enable billing"}}, errors.QuotaExhausted),
        (429, {"error": {"type": "exceeded_current_quota_error", "message": "x"}}, errors.QuotaExhausted),
        (403, "Your team has used all available credits or reached its monthly spending limit.", errors.QuotaExhausted),
        (402, {"error": {"message": "Insufficient Balance", "type": "unknown_error"}}, errors.QuotaExhausted),
        (
            429,
            {"error": {"code": "1113", "message": "Insufficient balance or no resource package."}},
            errors.QuotaExhausted,
        ),
        (400, {"error": {"message": "Content Exists Risk", "type": "invalid_request_error"}}, errors.ContentFilter),
        (
            400,
            {"error": {"type": "invalid_request_error", "message": "Output blocked by content filtering policy"}},
            errors.ContentFilter,
        ),
        (
            403,
            {"error": {"code": 403, "message": "x", "metadata": {"reasons": ["violence"], "flagged_input": "y"}}},
            errors.ContentFilter,
        ),
        (
            429,
            {
                "error": {
                    "code": "rate_limit_error",
                    "type": "invalid_request_error",
                    "message": "This request would exceed the rate limit; reduce the prompt length",
                }
            },
            errors.RateLimited,
        ),
        (429, {"type": "error", "error": {"type": "rate_limit_error", "message": "x"}}, errors.RateLimited),
        (
            429,
            {"object": "error", "message": "Requests rate limit exceeded", "type": "rate_limited", "code": "1300"},
            errors.RateLimited,
        ),
        (429, {"error": {"code": "429", "message": "Please retry after 37 seconds."}}, errors.RateLimited),
        (503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}, errors.Overloaded),
        (500, {"error": {"message": "The model is currently overloaded.", "type": "server_error"}}, errors.Overloaded),
        (503, {"error": {"status": "UNAVAILABLE", "message": "x"}}, errors.Overloaded),
        (504, {"error": {"status": "DEADLINE_EXCEEDED", "message": "x"}}, errors.ServerError),
        (408, {"message": "ModelTimeoutException"}, errors.ServerError),
        (413, {"type": "error", "error": {"type": "request_too_large", "message": "x"}}, errors.InvalidRequest),
        (401, {"detail": "Unauthorized"}, errors.Auth),
        (400, {"error": {"status": "INVALID_ARGUMENT", "details": [{"reason": "API_KEY_INVALID"}]}}, errors.Auth),
        (403, {"success": False, "errors": [{"code": 10000, "message": "Authentication error"}]}, errors.Auth),
        (
            400,
            {
                "error": {
                    "code": 400,
                    "message": "Provider returned error",
                    "metadata": {"raw": json.dumps({"error": {"code": "context_length_exceeded", "message": "x"}})},
                }
            },
            errors.ContextLength,
        ),
        (None, {"error": {"code": "throttlingException", "message": "x"}}, errors.RateLimited),
        (None, {"__type": "com.amazon.coral#ThrottlingException", "message": "x"}, errors.RateLimited),
        # Inside an answer of the Responses API, where nothing but the code tells.
        (200, {"error": {"code": "image_content_policy_violation", "message": "x"}}, errors.ContentFilter),
        (200, {"error": {"code": "vector_store_timeout", "message": "x"}}, errors.ServerError),
        # What only looks like a status, a limit or a list.
        (200, {"error": {"code": "²²²", "message": "x"}}, errors.ServerError),
        (429, {"error": {"message": "Limit 5, requested " + "9" * 5000}}, errors.RateLimited),
        (429, {"error": {"details": [{"violations": 7}, 7], "metadata": {"raw": 7}}}, errors.RateLimited),
    ],
)
def test_classification(status: int | None, body: Any, kind: type[ModelError]) -> None:
    assert type(classify(status, body)) is kind


@pytest.mark.parametrize(
    "code",
    [
        *("invalid_image", "invalid_image_format", "invalid_base64_image", "invalid_image_url", "invalid_image_mode"),
        *("image_too_large", "image_too_small", "image_file_too_large", "image_file_not_found", "image_parse_error"),
        *("unsupported_image_media_type", "empty_image_file", "failed_to_download_image"),
    ],
)
def test_an_image_that_cannot_be_used_is_the_requests_fault(code: str) -> None:
    assert type(classify(200, {"error": {"code": code, "message": "x"}})) is errors.InvalidRequest


def test_an_error_that_is_nested_without_end_is_one_of_the_servers() -> None:
    body: dict[str, Any] = {}
    for _ in range(900):
        body = {"error": {"metadata": {"raw": body}}}
    assert type(classify(200, body)) is errors.ServerError
    assert type(classify(429, body)) is errors.RateLimited


def test_a_code_that_is_none_is_not_told() -> None:
    assert classify(400, {"error": {"code": {"a": 1}, "type": "x" * 500}}).code == "x" * 100


@pytest.mark.parametrize(
    ("headers", "message", "wait"),
    [
        ({"Retry-After-Ms": "1500", "Retry-After": "9"}, "", 1.5),
        ({"retry-after": "0.5"}, "", 0.5),
        ({"retry-after": "0"}, "try again in 9s", 0),
        ({"retry-after": "Thu, 01 Jan 2026 00:01:00 GMT"}, "", 60),
        ({"retry-after": "-1"}, "", None),
        ({"retry-after": "soon"}, "", None),
        ({"retry-after": "99999999"}, "", None),
        ({}, "Please try again in 5.289s.", 5.289),
        ({}, "Please try again in 174ms. Visit", 0.174),
        ({}, "Please try again in 1m2.5s.", 62.5),
        ({}, "Please retry after 37 seconds.", 37),
        ({}, "Please retry in 58.934310785s.", 58.934310785),
        ({}, "", None),
    ],
)
def test_how_long_to_wait(headers: dict[str, str], message: str, wait: float | None) -> None:
    error = classify(429, {"error": {"message": message}}, headers, now=1767225600)
    assert error.retry_after == pytest.approx(wait) if wait is not None else error.retry_after is None


def test_a_retry_delay_in_the_details() -> None:
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34s"}]
    assert classify(429, {"error": {"status": "RESOURCE_EXHAUSTED", "details": details}}).retry_after == 34


def test_the_table_can_be_extended() -> None:
    mine = Rule(errors.Overloaded, names=frozenset({"queue_full"}))
    body = {"error": {"code": "queue_full"}}
    assert type(classify(400, body)) is errors.InvalidRequest
    assert type(classify(400, body, table=(mine, *TABLE))) is errors.Overloaded


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("ThrottlingException:http://internal.amazon.com/coral/com.amazon.bedrock/", errors.RateLimited),
        ("ServiceUnavailableException", errors.Overloaded),
        ("ModelNotReadyException", errors.Overloaded),
        ("ServiceQuotaExceededException", errors.QuotaExhausted),
        ("AccessDeniedException", errors.Auth),
        ("ValidationException", errors.InvalidRequest),
    ],
)
def test_amazons_type_stands_in_a_header(kind: str, expected: type[ModelError]) -> None:
    error = classify(400, {"message": "x"}, {"X-Amzn-ErrorType": kind})
    assert type(error) is expected
    assert error.code == kind.partition(":")[0]


def test_a_provider_can_forbid_another_try() -> None:
    assert classify(500, "", {}).retryable
    assert classify(500, "", {"x-should-retry": "true"}).retryable
    assert not classify(500, "", {"X-Should-Retry": "False"}).retryable


@pytest.mark.parametrize(
    ("status", "headers", "message", "wait"),
    [
        (429, {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}, "", 360),
        (429, {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6s"}, "try again in 2s", 2),
        (429, {"retry-after": "3", "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6s"}, "", 3),
        (429, {"x-ms-retry-after-ms": "250"}, "", 0.25),
        (429, {"anthropic-ratelimit-unified-reset": "1767225700"}, "", 100),
        (
            429,
            {
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-requests-reset": "2026-01-01T00:00:30Z",
            },
            "",
            30,
        ),
        (500, {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}, "", None),
        (429, {"x-ratelimit-remaining-tokens": "500", "x-ratelimit-reset-tokens": "6s"}, "", None),
        (429, {"x-ratelimit-remaining-requests": "-1", "x-ratelimit-reset-requests": "0"}, "", None),
    ],
)
def test_without_a_word_the_used_up_window_tells_the_wait(
    status: int, headers: dict[str, str], message: str, wait: float | None
) -> None:
    error = classify(status, {"error": {"message": message}}, headers, now=1767225600)
    assert error.retry_after == (None if wait is None else pytest.approx(wait))
