"""A simulated answer as Chat Completions bytes: whole, and as the chunks of a stream."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ridethrough.runtime.router.messages import estimate_tokens
from ridethrough.runtime.router.providers.simulated.script import Answer, Call, SimRequest


@dataclass(frozen=True)
class Reply:
    """An answer ready to send; ``whole`` is the body without streaming, ``chunks`` are the events with it."""

    streamed: bool
    whole: bytes
    chunks: list[bytes]
    output_tokens: int
    latency: float
    per_token: float


def reply_to(request: SimRequest, answer: Answer, *, latency: float = 0.0, per_token: float = 0.0) -> Reply:
    """Write ``answer`` for ``request``; ``latency`` and ``per_token`` (seconds) hold where the answer has none."""
    text = answer.text if answer.data is None else json.dumps(answer.data, ensure_ascii=False)
    calls = [_call(call, f"call_{request.digest[:10]}_{n}") for n, call in enumerate(answer.calls)]
    usage = _usage(request, answer, text, calls)
    finish = answer.finish or ("tool_calls" if calls else "stop")
    base = {"id": f"chatcmpl-{request.digest}", "created": 1767225600, "model": request.model}
    streamed = request.stream
    return Reply(
        streamed=streamed,
        whole=b"" if streamed else _whole(base, answer, text, calls, finish, usage),
        chunks=list(_chunks(base, answer, text, calls, finish, usage)) if streamed else [],
        output_tokens=usage["completion_tokens"],
        latency=latency if answer.latency is None else answer.latency,
        per_token=per_token if answer.per_token is None else answer.per_token,
    )


def _call(call: Call, made_up: str) -> dict[str, Any]:
    arguments = call.arguments if isinstance(call.arguments, str) else json.dumps(dict(call.arguments))
    return {"id": call.id or made_up, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _usage(request: SimRequest, answer: Answer, text: str, calls: list[dict[str, Any]]) -> dict[str, int]:
    said = text + (answer.reasoning or "") + (answer.refusal or "") + (json.dumps(calls) if calls else "")
    asked = answer.input_tokens
    if asked is None:
        asked = estimate_tokens(json.dumps([request.messages, request.body.get("tools")], ensure_ascii=False))
    given = max(1, estimate_tokens(said)) if answer.output_tokens is None else answer.output_tokens
    return {"prompt_tokens": asked, "completion_tokens": given, "total_tokens": asked + given}


def _whole(
    base: dict[str, Any], answer: Answer, text: str, calls: list[dict[str, Any]], finish: str, usage: dict[str, int]
) -> bytes:
    message: dict[str, Any] = {"role": "assistant", "content": text or None, "refusal": answer.refusal}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if calls:
        message["tool_calls"] = calls
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return _dump({**base, "object": "chat.completion", "choices": [choice], "usage": usage})


def _chunks(
    base: dict[str, Any], answer: Answer, text: str, calls: list[dict[str, Any]], finish: str, usage: dict[str, int]
) -> Iterator[bytes]:
    head = {**base, "object": "chat.completion.chunk"}
    for delta in _deltas(answer, text, calls):
        yield _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    yield _event({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    yield _event({**head, "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def _deltas(answer: Answer, text: str, calls: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield {"role": "assistant", "content": ""}
    if answer.reasoning:
        yield {"reasoning_content": answer.reasoning}
    for word in re.findall(r"\s*\S+\s*\Z|\s*\S+|\s+", text):
        yield {"content": word}
    if answer.refusal:
        yield {"refusal": answer.refusal}
    for index, call in enumerate(calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        yield {"tool_calls": [{"index": index, **call, "function": {"name": name, "arguments": ""}}]}
        for start in range(0, len(arguments), 24):
            yield {"tool_calls": [{"index": index, "function": {"arguments": arguments[start : start + 24]}}]}


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + _dump(chunk) + b"\n\n"


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
