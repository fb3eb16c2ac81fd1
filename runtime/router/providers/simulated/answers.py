"""A simulated answer as a wire's bytes: whole, or as the events of a stream."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from ridethrough.runtime.router.messages import estimate_tokens
from ridethrough.runtime.router.providers.simulated.conversation import Conversation
from ridethrough.runtime.router.providers.simulated.draft import Draft, DraftCall, Stream, Tokens, Wire
from ridethrough.runtime.router.providers.simulated.faults import Fault
from ridethrough.runtime.router.providers.simulated.script import Answer, Call

BROKEN_ARGUMENTS = '{"query": "tid'
UNKNOWN_FINISH = "simulated_reason"


@dataclass(frozen=True)
class Reply:
    """An answer ready to send: ``stream`` when it was to be streamed, else ``whole``. Times are in seconds."""

    draft: Draft
    whole: bytes
    stream: Stream | None
    latency: float | None
    per_token: float | None


def reply_to(conversation: Conversation, answer: Answer, wire: Wire, fault: Fault | None = None) -> Reply:
    """Write ``answer``, with those faults in it that are no matter of time."""
    draft = _faulty(draft_of(conversation, answer), wire, fault)
    streamed = conversation.stream
    return Reply(
        draft=draft,
        whole=b"" if streamed else wire.whole(draft),
        stream=wire.stream(draft) if streamed else None,
        latency=answer.latency,
        per_token=answer.per_token,
    )


def changes_draft(fault: Fault | None) -> bool:
    """Whether ``fault`` makes a different answer."""
    if fault is None:
        return False
    return fault.kind in ("bad_arguments", "unknown_finish") or _filters(fault)


def draft_of(conversation: Conversation, answer: Answer) -> Draft:
    """Return ``answer`` without any wire's form, its tokens counted."""
    key = conversation.digest
    text = answer.text if answer.data is None else json.dumps(answer.data, ensure_ascii=False)
    calls = tuple(_call(call, f"call_{key[:10]}_{number}") for number, call in enumerate(answer.calls))
    return Draft(
        key=key,
        model=conversation.model,
        text=text,
        calls=calls,
        finish=answer.finish or ("tool_calls" if calls else "stop"),
        tokens=_tokens(conversation, answer, text, calls),
        reasoning=answer.reasoning or "",
        refusal=answer.refusal or "",
        framing=conversation.framing,
    )


def _call(call: Call, made_up: str) -> DraftCall:
    arguments = call.arguments if isinstance(call.arguments, str) else json.dumps(dict(call.arguments))
    return DraftCall(call.id or made_up, call.name, arguments)


def _tokens(conversation: Conversation, answer: Answer, text: str, calls: tuple[DraftCall, ...]) -> Tokens:
    thought = answer.reasoning_tokens
    if thought is None:
        thought = estimate_tokens(answer.reasoning or "")
    said = text + (answer.reasoning or "") + (answer.refusal or "") + (json.dumps(_plain(calls)) if calls else "")
    given = max(1, estimate_tokens(said)) if answer.output_tokens is None else answer.output_tokens
    asked = conversation.tokens if answer.input_tokens is None else answer.input_tokens
    return Tokens(
        input=asked,
        output=max(given, thought),
        cached=min(asked, answer.cached_tokens),
        written=min(asked - min(asked, answer.cached_tokens), answer.cache_write_tokens),
        reasoning=thought,
    )


def _plain(calls: tuple[DraftCall, ...]) -> list[dict[str, Any]]:
    functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
    return [
        {"id": call.id, "type": "function", "function": function}
        for call, function in zip(calls, functions, strict=True)
    ]


def _filters(fault: Fault) -> bool:
    return fault.kind == "content_filter" and fault.status == 200


def _faulty(draft: Draft, wire: Wire, fault: Fault | None) -> Draft:
    if fault is None:
        return draft
    if fault.kind == "bad_arguments" and draft.calls:
        if wire.name == "gemini":  # its arguments are objects; a call that is none ends the answer
            return replace(draft, text="", calls=(), finish="malformed_function_call")
        return replace(draft, calls=tuple(replace(call, arguments=BROKEN_ARGUMENTS) for call in draft.calls))
    if fault.kind == "unknown_finish":
        return replace(draft, finish=UNKNOWN_FINISH)
    return replace(draft, text="", calls=(), finish="content_filter") if _filters(fault) else draft
