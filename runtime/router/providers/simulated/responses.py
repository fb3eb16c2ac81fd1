"""Responses: https://platform.openai.com/docs/api-reference/responses and .../responses-streaming."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ridethrough.runtime.config import WireName
from ridethrough.runtime.router.providers.simulated import openai
from ridethrough.runtime.router.providers.simulated.conversation import (
    Conversation,
    Malformed,
    called,
    joined,
    mappings,
    offered,
    shown,
    spoken,
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
    words,
)

_Item = dict[str, Any]
_Events = Iterator[tuple[str, dict[str, Any]]]


class Responses:
    """The wire ``openai-responses``."""

    name: WireName = "openai-responses"
    prefix = "/v1"

    def read(self, body: Mapping[str, Any], target: str) -> Conversation:
        """Read a body of ``/responses``."""
        wanted = (body.get("text") or {}).get("format") or {}
        return Conversation(
            model=str(body.get("model", "")),
            messages=[*_instructions(body), *joined(_messages(body.get("input")))],
            tools=[
                offered(tool.get("name"), tool.get("description"), tool.get("parameters"))
                for tool in mappings(body.get("tools") or [], "tools")
                if tool.get("type") == "function"
            ],
            schema=wanted.get("schema") if wanted.get("type") == "json_schema" else None,
            choice=_choice(body.get("tool_choice")),
            stream=bool(body.get("stream")),
        )

    def whole(self, draft: Draft) -> bytes:
        """Write a ``response``."""
        return dump(_response(draft, done=True))

    def stream(self, draft: Draft) -> Stream:
        """Write the events, numbered; there is no sentinel."""
        events = [_event(kind, data, number) for number, (kind, data) in enumerate(_events(draft))]
        return Stream(events, ending=1)

    def refused(self, failure: Failure, *, model: str = "") -> Refused:
        """Write OpenAI's error."""
        return openai.refused(failure, model=model)

    def error_event(self, body: Any, draft: Draft, number: int) -> bytes:
        """Write the event ``error``, which has the error's fields at its top."""
        error = body.get("error") if isinstance(body, Mapping) else None
        if not isinstance(error, Mapping):
            return b"event: error\ndata: " + dump(body) + b"\n\n"
        fields = {"code": error.get("code"), "message": error.get("message"), "param": error.get("param")}
        return _event("error", fields, number)

    def models(self, names: Sequence[str]) -> Any:
        """Write OpenAI's list."""
        return openai.models(names)


# --- requests -------------------------------------------------------------------------------------------------------


def _instructions(body: Mapping[str, Any]) -> list[_Item]:
    text = body.get("instructions")
    return [{"role": "system", "content": str(text)}] if text else []


def _messages(raw: Any) -> Iterator[_Item]:
    if isinstance(raw, str):
        yield {"role": "user", "content": raw}
        return
    for item in mappings(raw, "input"):
        match item.get("type", "message"):
            case "message":
                yield _message(item)
            case "function_call":
                yield spoken("", [called(item.get("name"), item.get("arguments"), item.get("call_id"))])
            case "function_call_output":
                content = _content(item.get("output"))
                yield {"role": "tool", "tool_call_id": str(item.get("call_id", "")), "content": content}
            case _:
                pass  # thoughts and the provider's own tools are for the model alone


def _message(item: Mapping[str, Any]) -> _Item:
    role = item.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        raise Malformed(f"input: there is no role {role!r}")
    return {"role": role, "content": _content(item.get("content"))}


def _content(raw: Any) -> Any:
    if not isinstance(raw, list):
        return raw or ""
    return [_part(part) for part in mappings(raw, "content")]


def _part(part: Mapping[str, Any]) -> _Item:
    if part.get("type") == "input_image":
        return shown(str(part.get("image_url")))
    return {"type": "text", "text": str(part.get("text") or part.get("refusal") or "")}


def _choice(raw: Any) -> str:
    if isinstance(raw, Mapping):
        return str(raw.get("name") or "auto")
    return str(raw or "auto")


# --- answers --------------------------------------------------------------------------------------------------------


def _response(draft: Draft, *, done: bool) -> _Item:
    status, reason = _status(draft) if done else ("in_progress", None)
    return {
        "id": f"resp_{draft.key}",
        "object": "response",
        "created_at": CREATED,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": reason} if reason else None,
        "model": draft.model,
        "output": list(_output(draft)) if done else [],
        "usage": _usage(draft) if done else None,
    }


def _status(draft: Draft) -> tuple[str, str | None]:
    if draft.finish in ("stop", "tool_calls", "refusal"):
        return "completed", None
    return "incomplete", {"length": "max_output_tokens"}.get(draft.finish, draft.finish)


def _usage(draft: Draft) -> _Item:
    tokens = draft.tokens
    return {
        "input_tokens": tokens.input,
        "input_tokens_details": {"cached_tokens": tokens.cached},
        "output_tokens": tokens.output,
        "output_tokens_details": {"reasoning_tokens": tokens.reasoning},
        "total_tokens": tokens.input + tokens.output,
    }


def _output(draft: Draft) -> Iterator[_Item]:
    if draft.reasoning:
        yield _thought(draft)
    if draft.text or draft.refusal:
        yield _said(draft)
    for call in draft.calls:
        yield _called(call, call.arguments, "completed")


def _thought(draft: Draft) -> _Item:
    summary = [{"type": "summary_text", "text": draft.reasoning}]
    return {"id": f"rs_{draft.key}", "type": "reasoning", "summary": summary, "encrypted_content": draft.signature}


def _said(draft: Draft) -> _Item:
    parts = [_refused(draft.refusal) if draft.refusal else _text(draft.text)]
    return {"id": f"msg_{draft.key}", "type": "message", "status": "completed", "role": "assistant", "content": parts}


def _called(call: DraftCall, arguments: str, status: str) -> _Item:
    return {
        "id": f"fc_{call.id}",
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": arguments,
    }


def _text(text: str) -> _Item:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _refused(text: str) -> _Item:
    return {"type": "refusal", "refusal": text}


# --- streamed -------------------------------------------------------------------------------------------------------


def _event(kind: str, data: Mapping[str, Any], number: int) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + dump({"type": kind, **data, "sequence_number": number}) + b"\n\n"


def _events(draft: Draft) -> _Events:
    for kind in ("response.created", "response.in_progress"):
        yield kind, {"response": _response(draft, done=False)}
    for index, item in enumerate(_output(draft)):
        yield "response.output_item.added", {"output_index": index, "item": {**item, **_EMPTY[item["type"]]}}
        for kind, data in _inside(item):
            yield kind, {"item_id": item["id"], "output_index": index, **data}
        yield "response.output_item.done", {"output_index": index, "item": item}
    response = _response(draft, done=True)
    yield f"response.{response['status']}", {"response": response}


_EMPTY: dict[str, dict[str, Any]] = {
    "reasoning": {"summary": []},
    "message": {"content": [], "status": "in_progress"},
    "function_call": {"arguments": "", "status": "in_progress"},
}
"""What an item is when it begins: without what it will hold."""


def _inside(item: _Item) -> _Events:
    match item["type"]:
        case "reasoning":
            return _thinking(item["summary"][0])
        case "message":
            return _saying(item["content"][0])
        case _:
            return _calling(item["arguments"])


def _thinking(part: _Item) -> _Events:
    at = {"summary_index": 0}
    yield "response.reasoning_summary_part.added", {**at, "part": {**part, "text": ""}}
    for word in words(part["text"]):
        yield "response.reasoning_summary_text.delta", {**at, "delta": word}
    yield "response.reasoning_summary_text.done", {**at, "text": part["text"]}
    yield "response.reasoning_summary_part.done", {**at, "part": part}


def _saying(part: _Item) -> _Events:
    at = {"content_index": 0}
    key, kind = ("refusal", "response.refusal") if part["type"] == "refusal" else ("text", "response.output_text")
    yield "response.content_part.added", {**at, "part": {**part, key: ""}}
    for word in words(part[key]):
        yield f"{kind}.delta", {**at, "delta": word}
    yield f"{kind}.done", {**at, key: part[key]}
    yield "response.content_part.done", {**at, "part": part}


def _calling(arguments: str) -> _Events:
    for piece in pieces(arguments):
        yield "response.function_call_arguments.delta", {"delta": piece}
    yield "response.function_call_arguments.done", {"arguments": arguments}
