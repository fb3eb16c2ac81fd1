"""Anthropic's Messages: https://docs.anthropic.com/en/api/messages and .../messages-streaming."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ridethrough.runtime.config import WireName
from ridethrough.runtime.router.providers.simulated.conversation import (
    Conversation,
    Malformed,
    called,
    failed,
    illustrated,
    instructed,
    mappings,
    offered,
    shown,
    spoken,
    text_of,
)
from ridethrough.runtime.router.providers.simulated.draft import (
    Draft,
    DraftCall,
    Failure,
    Refused,
    Stream,
    What,
    dump,
    pieces,
    words,
)

_Block = dict[str, Any]

_FINISH = {
    "stop": "end_turn",
    "tool_calls": "tool_use",
    "length": "max_tokens",
    "content_filter": "refusal",
}


class Messages:
    """The wire ``anthropic``."""

    name: WireName = "anthropic"
    prefix = ""

    def read(self, body: Mapping[str, Any], target: str) -> Conversation:
        """Read a body of ``/v1/messages``."""
        if not isinstance(body.get("max_tokens"), int):
            raise Malformed("max_tokens: Field required")
        system = [instructed(str(block.get("text") or "")) for block in _as_blocks(body.get("system") or [], "system")]
        turns = [message for turn in mappings(body.get("messages"), "messages") for message in _messages(turn)]
        wanted = (body.get("output_config") or {}).get("format") or body.get("output_format") or {}
        return Conversation(
            model=str(body.get("model", "")),
            messages=[*system, *illustrated(turns)],
            tools=[
                offered(tool.get("name"), tool.get("description"), tool.get("input_schema"))
                for tool in mappings(body.get("tools") or [], "tools")
                if "input_schema" in tool
            ],
            schema=wanted.get("schema"),
            choice=_choice(body.get("tool_choice") or {}),
            stream=bool(body.get("stream")),
        )

    def whole(self, draft: Draft) -> bytes:
        """Write a ``message``."""
        return dump({**_base(draft), "content": list(_blocks(draft)), **_stop(draft), "usage": _usage(draft)})

    def stream(self, draft: Draft) -> Stream:
        """Write the events: the start, each block, the reason with the usage, and the stop."""
        return Stream([_event(data) for data in _events(draft)], ending=2)

    def refused(self, failure: Failure, *, model: str = "") -> Refused:
        """Write Anthropic's error."""
        status, kind, message = _error(failure)
        error = {"type": kind, "message": failure.message or message}
        body = {"type": "error", "error": error, "request_id": "req_simulated"}
        return Refused(status, body, _headers(failure))

    def error_event(self, body: Any, draft: Draft, number: int) -> bytes:
        """Write the event ``error``."""
        return b"event: error\ndata: " + dump(body) + b"\n\n"

    def models(self, names: Sequence[str]) -> Any:
        """Write Anthropic's list."""
        made = "2026-01-01T00:00:00Z"
        data = [{"type": "model", "id": name, "display_name": name, "created_at": made} for name in names]
        return {"data": data, "has_more": False, "first_id": names[0], "last_id": names[-1]}


# --- requests -------------------------------------------------------------------------------------------------------


def _messages(turn: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what one message holds: results are messages of their own elsewhere."""
    role, content = turn.get("role"), turn.get("content")
    if role not in ("user", "assistant", "system"):
        raise Malformed(f"messages: there is no role {role!r}")
    blocks = _as_blocks(content, "messages.content")
    if role == "assistant":
        calls = [called(each.get("name"), each.get("input"), each.get("id")) for each in _of(blocks, "tool_use")]
        yield spoken(text_of({"content": _of(blocks, "text")}), calls)
        return
    for block in _of(blocks, "tool_result"):
        yield {"role": "tool", "tool_call_id": str(block.get("tool_use_id", "")), "content": _result(block)}
    yield from (instructed(found[1]) for block in blocks if (found := _late(block)))
    if rest := _content([block for block in blocks if not _late(block)]):
        yield {"role": role, "content": rest}


def _as_blocks(content: Any, where: str) -> list[Mapping[str, Any]]:
    return mappings([{"type": "text", "text": content}] if isinstance(content, str) else content, where)


def _late(block: Mapping[str, Any]) -> re.Match[str] | None:
    """Match instructions in the middle of a conversation, which only a message of the user can hold here."""
    return re.fullmatch(r"<system>\n(.*)\n</system>", str(block.get("text") or ""), re.S)


def _result(block: Mapping[str, Any]) -> Any:
    content = _content(_as_blocks(block.get("content") or "", "tool_result.content"))
    return failed(text_of({"content": content})) if block.get("is_error") else content


def _of(blocks: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [block for block in blocks if block.get("type") == kind]


def _content(blocks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for block in blocks:
        if block.get("type") == "text":
            found.append({"type": "text", "text": str(block.get("text") or "")})
        elif block.get("type") == "image":
            found.append(shown(_image(block.get("source") or {})))
    return found


def _image(source: Mapping[str, Any]) -> str:
    return str(source.get("url") or f"data:{source.get('media_type')};base64,{source.get('data')}")


def _choice(raw: Mapping[str, Any]) -> str:
    kind = str(raw.get("type") or "auto")
    return str(raw.get("name")) if kind == "tool" else {"any": "required"}.get(kind, kind)


# --- answers --------------------------------------------------------------------------------------------------------


def _base(draft: Draft) -> dict[str, Any]:
    return {"id": f"msg_{draft.key}", "type": "message", "role": "assistant", "model": draft.model}


def _stop(draft: Draft) -> dict[str, Any]:
    reason = "refusal" if draft.refusal else _FINISH.get(draft.finish, draft.finish)
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(draft: Draft) -> dict[str, int]:
    tokens = draft.tokens
    return {
        "input_tokens": tokens.input - tokens.cached - tokens.written,
        "cache_creation_input_tokens": tokens.written,
        "cache_read_input_tokens": tokens.cached,
        "output_tokens": tokens.output,
    }


def _blocks(draft: Draft) -> Iterator[_Block]:
    if draft.reasoning:
        yield {"type": "thinking", "thinking": draft.reasoning, "signature": draft.signature}
    if text := draft.text + draft.refusal:
        yield {"type": "text", "text": text}
    for call in draft.calls:
        yield {**_tool_use(call), "input": call.parsed()}


def _tool_use(call: DraftCall) -> _Block:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}


# --- streamed -------------------------------------------------------------------------------------------------------


def _event(data: Mapping[str, Any]) -> bytes:
    return b"event: " + str(data["type"]).encode() + b"\ndata: " + dump(data) + b"\n\n"


def _events(draft: Draft) -> Iterator[dict[str, Any]]:
    begun = {**_base(draft), "content": [], "stop_reason": None, "stop_sequence": None}
    yield {"type": "message_start", "message": {**begun, "usage": {**_usage(draft), "output_tokens": 1}}}
    for index, (start, deltas) in enumerate(_streamed(draft)):
        yield {"type": "content_block_start", "index": index, "content_block": start}
        if index == 0:
            yield {"type": "ping"}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": _stop(draft), "usage": _usage(draft)}
    yield {"type": "message_stop"}


def _streamed(draft: Draft) -> Iterator[tuple[_Block, list[_Block]]]:
    """Yield each block as it begins, and the deltas that fill it."""
    if draft.reasoning:
        deltas = [{"type": "thinking_delta", "thinking": word} for word in words(draft.reasoning)]
        signature = {"type": "signature_delta", "signature": draft.signature}
        yield {"type": "thinking", "thinking": "", "signature": ""}, [*deltas, signature]
    if text := draft.text + draft.refusal:
        yield {"type": "text", "text": ""}, [{"type": "text_delta", "text": word} for word in words(text)]
    for call in draft.calls:
        parts = ["", *pieces(call.arguments)]
        yield _tool_use(call), [{"type": "input_json_delta", "partial_json": part} for part in parts]


# --- errors ---------------------------------------------------------------------------------------------------------
# https://docs.anthropic.com/en/api/errors and .../rate-limits

_ERRORS: dict[What, tuple[int, str, str]] = {
    "bad_request": (400, "invalid_request_error", "The request is wrong. (simulated)"),
    "auth": (401, "authentication_error", "invalid x-api-key"),
    "permission": (403, "permission_error", "Your API key does not have permission to use this."),
    "not_found": (404, "not_found_error", "The model does not exist. (simulated)"),
    "too_large": (413, "request_too_large", "Request exceeds the maximum size"),
    "context_length": (400, "invalid_request_error", "prompt is too long: 215000 tokens > 200000 maximum"),
    "content_filter": (400, "invalid_request_error", "Output blocked by content filtering policy"),
    "rate_limit": (429, "rate_limit_error", "This request would exceed your rate limit of 60 requests per minute."),
    "quota": (
        402,
        "billing_error",
        "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing to purchase credits.",
    ),
    "server_error": (500, "api_error", "Internal server error"),
    "timeout": (504, "timeout_error", "Request timed out"),
    "overloaded": (529, "overloaded_error", "Overloaded"),
}


def _error(failure: Failure) -> tuple[int, str, str]:
    status, kind, message = _ERRORS[failure.what]
    if failure.what == "quota" and failure.status == 400:
        kind = "invalid_request_error"  # so the account of a key that was in use before it ran dry is refused
    return failure.status or status, kind, message


def _headers(failure: Failure) -> dict[str, str]:
    """Say how long to wait, as Anthropic does: in seconds, and as the time when the limit is lifted."""
    headers = {"request-id": "req_simulated"}
    if failure.what == "rate_limit" and failure.wait is not None:
        until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + failure.wait))
        headers |= {"retry-after": f"{failure.wait:g}", "anthropic-ratelimit-requests-limit": "60"}
        headers |= {"anthropic-ratelimit-requests-remaining": "0", "anthropic-ratelimit-requests-reset": until}
    return headers
