"""What OpenAI's two wires share: errors with their headers, and the list of models.

Source: https://platform.openai.com/docs/guides/error-codes and .../rate-limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ridethrough.runtime.router.providers.simulated.draft import CREATED, Failure, Refused, What

_ERRORS: dict[What, tuple[int, str, str | None, str]] = {
    "bad_request": (400, "invalid_request_error", "invalid_value", "The request is wrong."),
    "auth": (401, "invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    "permission": (403, "invalid_request_error", "permission_denied", "You have insufficient permissions."),
    "not_found": (404, "invalid_request_error", "model_not_found", "The model does not exist."),
    "too_large": (413, "invalid_request_error", "request_too_large", "The request is too large."),
    "context_length": (
        400,
        "invalid_request_error",
        "context_length_exceeded",
        "This model's maximum context length is 8192 tokens. Please reduce the length of the messages.",
    ),
    "content_filter": (
        400,
        "invalid_request_error",
        "content_filter",
        "The response was filtered due to the prompt triggering the content management policy.",
    ),
    "rate_limit": (429, "requests", "rate_limit_exceeded", "Rate limit reached for requests per minute."),
    "quota": (
        429,
        "insufficient_quota",
        "insufficient_quota",
        "You exceeded your current quota, please check your plan and billing details.",
    ),
    "server_error": (500, "server_error", "server_error", "The server had an error."),
    "timeout": (504, "server_error", "timeout", "The request timed out."),
    "overloaded": (503, "server_error", "server_is_overloaded", "The server is overloaded."),
}


def refused(failure: Failure, *, model: str = "") -> Refused:
    """Write a failure as OpenAI does."""
    status, kind, code, message = _ERRORS[failure.what]
    if failure.status == 529:
        kind = code = "overloaded_error"
    error = {"message": failure.message or f"{message} (simulated)", "type": kind, "param": None, "code": code}
    return Refused(failure.status or status, {"error": error}, _headers(failure))


def _headers(failure: Failure) -> dict[str, str]:
    """Say how long to wait, as OpenAI does: in milliseconds, in seconds, and as a Go duration."""
    headers = {"x-request-id": "req_simulated"}
    if failure.what == "rate_limit" and failure.wait is not None:
        headers |= {"retry-after-ms": f"{failure.wait * 1000:g}", "retry-after": f"{failure.wait:g}"}
        headers |= {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "0"}
        headers |= {"x-ratelimit-reset-requests": f"{failure.wait:g}s"}
    return headers


def models(names: Sequence[str]) -> Any:
    """Write the list of models."""
    data = [{"id": name, "object": "model", "created": CREATED, "owned_by": "simulated"} for name in names]
    return {"object": "list", "data": data}
