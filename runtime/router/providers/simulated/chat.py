"""Chat Completions: https://platform.openai.com/docs/api-reference/chat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ridethrough.runtime.config import WireName
from ridethrough.runtime.router.providers.simulated import openai
from ridethrough.runtime.router.providers.simulated.conversation import (
    Conversation,
    Malformed,
    illustrated,
    mappings,
)
from ridethrough.runtime.router.providers.simulated.draft import (
    CREATED,
    Draft,
    DraftCall,
    Failure,
    Refused,
    Stream,
    dump,
    pieces,
)


class Chat:
    """The wire ``openai``."""

    name: WireName = "openai"
    prefix = "/v1"

    def read(self, body: Mapping[str, Any], target: str) -> Conversation:
        """Read a body of ``/chat/completions``."""
        messages = mappings(body.get("messages"), "messages")
        wanted = body.get("response_format") or {}
        return Conversation(
            model=str(body.get("model", "")),
            messages=illustrated(dict(message) for message in messages),
            tools=[dict(tool) for tool in mappings(body.get("tools") or [], "tools") if "function" in tool],
            schema=(wanted.get("json_schema") or {}).get("schema"),
            choice=_choice(body.get("tool_choice")),
            stream=bool(body.get("stream")),
        )

    def whole(self, draft: Draft) -> bytes:
        """Write a ``chat.completion``."""
        message: dict[str, Any] = {
            "role": "assistant",
            "content": draft.text or None,
            "refusal": draft.refusal or None,
        }
        if draft.reasoning:
            message["reasoning_content"] = draft.reasoning
        if draft.calls:
            message["tool_calls"] = [_call(call) for call in draft.calls]
        choice = {"index": 0, "message": message, "finish_reason": draft.finish}
        return dump({**_base(draft), "object": "chat.completion", "choices": [choice], "usage": _usage(draft)})

    def stream(self, draft: Draft) -> Stream:
        """Write the chunks: content, then the reason, the usage and the sentinel."""
        head = {**_base(draft), "object": "chat.completion.chunk"}
        start = b"data: " + dump(head)[:-1] + b',"choices":['
        events = [start + b'{"index":0,"delta":' + delta + b',"finish_reason":null}]}\n\n' for delta in _deltas(draft)]
        finish = {"index": 0, "delta": {}, "finish_reason": draft.finish}
        usage = b'],"usage":' + dump(_usage(draft)) + b"}\n\n"
        return Stream([*events, start + dump(finish) + b"]}\n\n", start + usage, b"data: [DONE]\n\n"], ending=3)

    def refused(self, failure: Failure, *, model: str = "") -> Refused:
        """Write OpenAI's error."""
        return openai.refused(failure, model=model)

    def error_event(self, body: Any, draft: Draft, number: int) -> bytes:
        """Write an error in the place of a chunk."""
        return b"data: " + dump(body) + b"\n\n"

    def models(self, names: Sequence[str]) -> Any:
        """Write OpenAI's list."""
        return openai.models(names)


def _choice(raw: Any) -> str:
    if isinstance(raw, Mapping):
        return str((raw.get("function") or {}).get("name") or "auto")
    if raw is not None and raw not in ("auto", "none", "required"):
        raise Malformed(f"tool_choice: {raw!r} is none of auto, none, required and a function")
    return str(raw or "auto")


def _base(draft: Draft) -> dict[str, Any]:
    return {"id": f"chatcmpl-{draft.key}", "created": CREATED, "model": draft.model}


def _call(call: DraftCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _usage(draft: Draft) -> dict[str, Any]:
    tokens = draft.tokens
    usage: dict[str, Any] = {"prompt_tokens": tokens.input, "completion_tokens": tokens.output}
    usage["total_tokens"] = tokens.input + tokens.output
    if tokens.cached:
        usage["prompt_tokens_details"] = {"cached_tokens": tokens.cached}
    if tokens.reasoning:
        usage["completion_tokens_details"] = {"reasoning_tokens": tokens.reasoning}
    return usage


def _deltas(draft: Draft) -> Iterator[bytes]:
    yield b'{"role":"assistant","content":""}'
    if draft.reasoning:
        yield dump({"reasoning_content": draft.reasoning})
    for word in draft.words:
        yield b'{"content":' + dump(word) + b"}"
    if draft.refusal:
        yield dump({"refusal": draft.refusal})
    for index, call in enumerate(draft.calls):
        begun = {"index": index, **_call(call), "function": {"name": call.name, "arguments": ""}}
        yield dump({"tool_calls": [begun]})
        for piece in pieces(call.arguments):
            yield dump({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
