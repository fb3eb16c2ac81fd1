"""What providers really sent, read by the four wires and held against what the raw JSON says.

The recordings are not part of the project: where the folder ``shared/corpus`` stands beside the repository, every file
of it is a case; elsewhere the samples below, written from the documentation, go through the same checks. What is
expected is computed here from the raw answer, by other code than the wires': all text, all calls, the usage, the
finish, and what the provider needs back.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ridethrough.runtime.errors import ModelError
from ridethrough.runtime.router.errors import classify
from ridethrough.runtime.router.messages import (
    AssistantMessage,
    ModelRequest,
    ProviderPart,
    ReasoningPart,
    TextPart,
    UserMessage,
)
from ridethrough.runtime.router.providers.anthropic import AnthropicMessages
from ridethrough.runtime.router.providers.gemini import GeminiGenerate
from ridethrough.runtime.router.providers.openai_chat import OpenAIChat
from ridethrough.runtime.router.providers.openai_responses import OpenAIResponses
from ridethrough.runtime.router.providers.wire import Answer, Wire

CORPUS = Path(__file__).parents[3] / "shared" / "corpus"
FILES = sorted(CORPUS.glob("*/*.json"))

Raw = dict[str, Any]


@dataclass
class Expected:
    """What an answer must hold. ``calls`` are names and arguments, with the id where the provider gave one.

    ``kept`` are texts that the message keeps for its provider, ``returned`` those that the next request must carry.
    """

    text: str = ""
    calls: list[tuple[str | None, str, Any]] = field(default_factory=list)
    usage: dict[str, int] | None = None
    finish: str = "stop"
    refusal: str | None = None
    kept: list[str] = field(default_factory=list)
    returned: list[str] = field(default_factory=list)


def events(sse: str) -> Iterator[Raw]:
    """Yield the data of a stream, in the simple form in which the recordings have it."""
    for line in sse.splitlines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield json.loads(data)


def loaded(arguments: str) -> Any:
    return json.loads(arguments) if arguments.strip() else {}


# --- Chat Completions -----------------------------------------------------------------------------------------------

CHAT_FINISH = {"tool_calls": "tool_calls", "length": "length", "content_filter": "content_filter"}


def chat_text(content: Any, kind: str = "text") -> str:
    if isinstance(content, str):
        return content if kind == "text" else ""
    pieces = [part for part in content or () if part["type"] == kind]
    return "".join(chat_text(part[kind]) if kind == "thinking" else part[kind] for part in pieces)


def chat_whole(sse: str) -> Raw:
    """Put a streamed answer together by the documented rules: calls by index, pieces in order."""
    message: Raw = {"content": "", "thinking": "", "reasoning_content": "", "reasoning": "", "refusal": ""}
    calls: dict[Any, Raw] = {}
    finish, usage = None, None
    signatures: list[str] = []
    for chunk in events(sse):
        usage = chunk.get("usage") or (chunk.get("x_groq") or {}).get("usage") or usage
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            message["content"] += chat_text(delta.get("content"))
            message["thinking"] += chat_text(delta.get("content"), "thinking")
            for key in ("reasoning_content", "reasoning", "refusal"):
                message[key] += delta.get(key) or ""
            signatures += [
                detail["signature"] for detail in delta.get("reasoning_details") or () if detail.get("signature")
            ]
            for piece in delta.get("tool_calls") or ():
                call = calls.setdefault(piece["index"], {"id": None, "function": {"name": "", "arguments": ""}})
                call["id"] = call["id"] or piece.get("id")
                call["function"]["name"] = call["function"]["name"] or piece["function"].get("name")
                call["function"]["arguments"] += piece["function"].get("arguments") or ""
            finish = choice.get("finish_reason") or finish
    message |= {"tool_calls": list(calls.values()), "reasoning_details": [{"signature": each} for each in signatures]}
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}


def chat_expected(whole: Raw) -> Expected:
    choice = whole["choices"][0]
    message = choice.get("message") or {}
    usage = whole.get("usage")
    refusal = message.get("refusal") or None
    thoughts = [message.get(key) or "" for key in ("reasoning_content", "reasoning", "thinking")]
    thoughts.append(chat_text(message.get("content"), "thinking"))
    details = message.get("reasoning_details") or ()
    kept = [each for each in thoughts if each]
    signatures = [detail["signature"] for detail in details if detail.get("signature")]
    calls = [
        (c["id"], c["function"]["name"], loaded(c["function"].get("arguments") or ""))
        for c in message.get("tool_calls") or ()
    ]
    stop = "tool_calls" if calls else "refusal" if refusal else "stop"
    return Expected(
        text=chat_text(message.get("content")),
        calls=calls,
        usage=None if usage is None else chat_usage(usage),
        finish=CHAT_FINISH.get(choice["finish_reason"], stop),
        refusal=refusal,
        kept=kept + signatures,
        returned=kept + signatures,
    )


def chat_usage(raw: Raw) -> dict[str, int]:
    prompt, details = raw.get("prompt_tokens_details") or {}, raw.get("completion_tokens_details") or {}
    reasoning = details.get("reasoning_tokens") or 0
    apart = reasoning and raw["total_tokens"] == raw["prompt_tokens"] + raw["completion_tokens"] + reasoning
    return {
        "input_tokens": raw["prompt_tokens"],
        "output_tokens": raw["completion_tokens"] + (reasoning if apart else 0),
        "cached_tokens": prompt.get("cached_tokens") or raw.get("prompt_cache_hit_tokens") or 0,
        "cache_write_tokens": prompt.get("cache_write_tokens") or 0,
        "reasoning_tokens": reasoning,
    }


# --- Responses ------------------------------------------------------------------------------------------------------


RESPONSES_FINISH = {"max_output_tokens": "length", "content_filter": "content_filter"}


def responses_whole(sse: str) -> Raw:
    last = [event for event in events(sse) if event["type"] in ("response.completed", "response.incomplete")]
    whole: Raw = last[-1]["response"]
    done = [event["item"] for event in events(sse) if event["type"] == "response.output_item.done"]
    return {**whole, "output": whole["output"] or done}


def responses_expected(whole: Raw) -> Expected:
    output = whole["output"]
    parts = [part for item in output if item["type"] == "message" for part in item["content"]]
    calls = [(i["call_id"], i["name"], loaded(i["arguments"])) for i in output if i["type"] == "function_call"]
    refusal = "".join(part["refusal"] for part in parts if part["type"] == "refusal") or None
    raw = whole["usage"]
    before, after = raw.get("input_tokens_details") or {}, raw.get("output_tokens_details") or {}
    thoughts = [item for item in output if item["type"] == "reasoning"]
    secrets = [item["encrypted_content"] for item in thoughts if item.get("encrypted_content")]
    items = [item["id"] for item in output if item["type"] not in ("message", "function_call") and item.get("id")]
    stop = "tool_calls" if calls else "refusal" if refusal else "stop"
    why = (whole.get("incomplete_details") or {}).get("reason")
    return Expected(
        text="".join(part["text"] for part in parts if part["type"] == "output_text"),
        calls=calls,
        usage={
            "input_tokens": raw["input_tokens"],
            "output_tokens": raw["output_tokens"],
            "cached_tokens": before.get("cached_tokens") or 0,
            "cache_write_tokens": before.get("cache_write_tokens") or 0,
            "reasoning_tokens": after.get("reasoning_tokens") or 0,
        },
        finish=RESPONSES_FINISH.get(str(why), stop),
        refusal=refusal,
        kept=secrets + items + [text["text"] for item in thoughts for text in item.get("summary") or ()],
        returned=secrets,
    )


# --- Messages -------------------------------------------------------------------------------------------------------

MESSAGES_FINISH = {"end_turn": "stop", "stop_sequence": "stop", "tool_use": "tool_calls", "max_tokens": "length"}


def messages_whole(sse: str) -> Raw:
    whole: Raw = {"content": [], "usage": {}}
    texts: list[dict[str, str]] = []
    for event in events(sse):
        if event["type"] == "message_start":
            whole["usage"] |= event["message"]["usage"]
        elif event["type"] == "content_block_start":
            whole["content"].append(dict(event["content_block"]))
            texts.append({})
        elif event["type"] == "content_block_delta":
            for key, piece in event["delta"].items():
                if key != "type" and isinstance(piece, str):
                    texts[event["index"]][key] = texts[event["index"]].get(key, "") + piece
        elif event["type"] == "message_delta":
            whole["stop_reason"] = event["delta"]["stop_reason"]
            whole["usage"] |= {key: value for key, value in event["usage"].items() if value is not None}
    for block, pieces in zip(whole["content"], texts, strict=True):
        if "partial_json" in pieces:
            block["input"] = loaded(pieces.pop("partial_json"))
        for key, text in pieces.items():
            block[key] = block.get(key, "") + text
    return whole


def messages_expected(whole: Raw) -> Expected:
    content, raw = whole["content"], whole["usage"]
    cached, written = raw.get("cache_read_input_tokens") or 0, raw.get("cache_creation_input_tokens") or 0
    own = [block for block in content if block["type"] not in ("text", "tool_use")]
    proofs = [block[key] for block in own for key in ("signature", "data", "id", "tool_use_id") if block.get(key)]
    return Expected(
        text="".join(block["text"] for block in content if block["type"] == "text"),
        calls=[(block["id"], block["name"], block["input"]) for block in content if block["type"] == "tool_use"],
        usage={
            "input_tokens": raw["input_tokens"] + cached + written,
            "output_tokens": raw["output_tokens"],
            "cached_tokens": cached,
            "cache_write_tokens": written,
        },
        finish=MESSAGES_FINISH.get(whole["stop_reason"], str(whole["stop_reason"])),
        kept=proofs + [block["thinking"] for block in own if block.get("thinking")],
        returned=proofs,
    )


# --- generateContent ------------------------------------------------------------------------------------------------


def generate_whole(sse: str) -> Raw:
    parts: list[Raw] = []
    usage: Raw = {}
    finish = None
    for chunk in events(sse):
        usage |= chunk.get("usageMetadata") or {}
        for candidate in chunk.get("candidates") or ():
            parts += (candidate.get("content") or {}).get("parts") or []
            finish = candidate.get("finishReason") or finish
    return {"candidates": [{"content": {"parts": parts}, "finishReason": finish}], "usageMetadata": usage}


def generate_expected(whole: Raw) -> Expected:
    candidate, raw = whole["candidates"][0], whole["usageMetadata"]
    parts = (candidate.get("content") or {}).get("parts") or []
    thoughts = raw.get("thoughtsTokenCount") or 0
    said = [part for part in parts if not part.get("thought")]
    calls = [part["functionCall"] for part in parts if "functionCall" in part]
    signatures = [part["thoughtSignature"] for part in parts if part.get("thoughtSignature")]
    finish = {"STOP": "stop", "MAX_TOKENS": "length", "SAFETY": "content_filter"}.get(
        candidate["finishReason"], "other"
    )
    return Expected(
        text="".join(part.get("text") or "" for part in said),
        calls=[(call.get("id"), call["name"], call.get("args") or {}) for call in calls],
        usage={
            "input_tokens": raw["promptTokenCount"] + (raw.get("toolUsePromptTokenCount") or 0),
            "output_tokens": (raw.get("candidatesTokenCount") or 0) + thoughts,
            "cached_tokens": raw.get("cachedContentTokenCount") or 0,
            "reasoning_tokens": thoughts,
        },
        finish="tool_calls" if calls else finish,
        kept=signatures,
        returned=signatures,
    )


# --- the wires and their checks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A wire beside the code that says what it must read."""

    wire: Wire
    whole: Callable[[str], Raw]
    expected: Callable[[Raw], Expected]


READERS = {
    "openai": Reader(OpenAIChat("p"), chat_whole, chat_expected),
    "openai-responses": Reader(OpenAIResponses("p"), responses_whole, responses_expected),
    "anthropic": Reader(AnthropicMessages("p"), messages_whole, messages_expected),
    "gemini": Reader(GeminiGenerate("p"), generate_whole, generate_expected),
}

PATHS = {
    "chat/completions": "openai",
    "responses": "openai-responses",
    "v1/messages": "anthropic",
    "generateContent": "gemini",
    "streamGenerateContent": "gemini",
}
"""How the URL of a recorded request ends, and the wire that it is."""


def reader_of(url: str) -> Reader | None:
    path = url.partition("?")[0]
    return next((READERS[name] for end, name in PATHS.items() if path.endswith(("/" + end, ":" + end))), None)


def read(wire: Wire, response: Raw, seed: int | None = None) -> Answer:
    """Read an answer, a stream in pieces that ``seed`` cuts, or in one."""
    if "sse" not in response:
        return wire.parse(json.dumps(response["body"]).encode(), "d")
    raw, stream = response["sse"].encode(), wire.stream("d")
    cuts = [] if seed is None else sorted(random.Random(seed).sample(range(1, len(raw)), min(60, len(raw) - 1)))
    said = "".join([stream.feed(raw[a:b]) for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)])
    answer = stream.close()
    assert said == answer.message.text
    assert stream.finished or stream.done
    return answer


def strings(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)


def kept_in(message: AssistantMessage) -> str:
    """Return all that a message keeps for its provider, as one text."""
    parts = () if isinstance(message.content, str) else message.content
    own = [part.data for part in parts if isinstance(part, ReasoningPart | ProviderPart)]
    return "\n".join(strings([*own, *(call.data for call in message.tool_calls)]))


def check_answer(reader: Reader, response: Raw) -> None:
    """Hold an answer against the raw JSON; streams also against themselves, cut in other places."""
    expected = reader.expected(reader.whole(response["sse"]) if "sse" in response else response["body"])
    answer = read(reader.wire, response)
    message = answer.message
    assert message.text == expected.text
    assert [(call.name, call.arguments) for call in message.tool_calls] == [call[1:] for call in expected.calls]
    assert all(call.id == want[0] for call, want in zip(message.tool_calls, expected.calls, strict=True) if want[0])
    assert len({call.id for call in message.tool_calls}) == len(expected.calls)
    assert (answer.finish, message.refusal) == (expected.finish, expected.refusal)
    if expected.usage is not None:
        assert answer.usage is not None
        usage = answer.usage.model_dump()
        assert {key: usage[key] for key in expected.usage} == expected.usage
    kept = kept_in(message)
    assert [text for text in expected.kept if text not in kept] == []
    if "sse" in response:
        assert all(read(reader.wire, response, seed) == answer for seed in range(5))


def check_return(reader: Reader, response: Raw) -> None:
    """Hold the next request against what the provider needs back."""
    expected = reader.expected(reader.whole(response["sse"]) if "sse" in response else response["body"])
    answer = read(reader.wire, response)
    request = ModelRequest([UserMessage(content="hi"), answer.message, UserMessage(content="go on")])
    body = json.loads(reader.wire.render(request, answer.model, stream=False).body)
    sent = "\n".join(strings(body))
    assert [text for text in expected.returned if text not in sent] == []
    parts = answer.message.content
    texts = [parts] if isinstance(parts, str) else [part.text for part in parts if isinstance(part, TextPart)]
    assert [text for text in texts if text.strip() not in sent] == []


def error_of(reader: Reader | None, response: Raw) -> str:
    """Return the class of an error, wherever it is told."""
    if response["status"] >= 400 or reader is None:
        body = response.get("body", response.get("sse"))
        return type(classify(response["status"], body, response["headers"])).__name__
    with pytest.raises(ModelError) as caught:
        read(reader.wire, response)
    return type(caught.value).__name__


# --- samples, written from the documentation ------------------------------------------------------------------------


def sse(*chunks: Raw, named: bool = False) -> str:
    names = [f"event: {chunk['type']}\n" if named else "" for chunk in chunks]
    return "".join(f"{name}data: {json.dumps(chunk)}\n\n" for name, chunk in zip(names, chunks, strict=True))


CHAT_BODY: Raw = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "I will look.",
                "reasoning_content": "Two places, two calls.",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "here"}'}},
                    {"id": "c2", "type": "function", "function": {"name": "look", "arguments": ""}},
                ],
            },
            "finish_reason": "tool_calls",
        }
    ],
    "usage": {
        "prompt_tokens": 20,
        "completion_tokens": 9,
        "total_tokens": 29,
        "prompt_tokens_details": {"cached_tokens": 16},
        "completion_tokens_details": {"reasoning_tokens": 5},
    },
}
CHAT_STREAM = sse(
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"index": 0, "delta": {"reasoning_content": "Hm, "}}]},
    {"choices": [{"index": 0, "delta": {"reasoning_content": "Grüße."}}]},
    {"choices": [{"index": 0, "delta": {"content": "Hel"}}]},
    {"choices": [{"index": 0, "delta": {"content": "lo ☕"}}]},
    {
        "choices": [
            {
                "index": 0,
                "delta": {
                    "tool_calls": [
                        {"index": 0, "id": "c1", "type": "function", "function": {"name": "look", "arguments": ""}}
                    ]
                },
            }
        ]
    },
    {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"at":'}}]}}]},
    {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": '"here"}'}}]}}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}},
)
RESPONSES_BODY: Raw = {
    "id": "resp_1",
    "object": "response",
    "status": "completed",
    "model": "gpt-5.2",
    "output": [
        {
            "id": "rs_1",
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": "One call is enough."}],
            "encrypted_content": "gAAAA-one",
        },
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Looking.", "annotations": []}],
        },
        {
            "id": "fc_1",
            "type": "function_call",
            "status": "completed",
            "call_id": "call_1",
            "name": "look",
            "arguments": '{"at":"here"}',
        },
    ],
    "usage": {
        "input_tokens": 30,
        "input_tokens_details": {"cached_tokens": 8},
        "output_tokens": 12,
        "output_tokens_details": {"reasoning_tokens": 6},
        "total_tokens": 42,
    },
}
MESSAGES_BODY: Raw = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-sonnet-4-5",
    "content": [
        {"type": "thinking", "thinking": "Let me see.", "signature": "EqQB-signed"},
        {"type": "redacted_thinking", "data": "EmwK-hidden"},
        {"type": "text", "text": "Looking."},
        {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "here"}},
    ],
    "stop_reason": "tool_use",
    "usage": {
        "input_tokens": 5,
        "cache_read_input_tokens": 100,
        "cache_creation_input_tokens": 20,
        "output_tokens": 9,
    },
}
MESSAGES_STREAM = sse(
    {
        "type": "message_start",
        "message": {"model": "claude-sonnet-4-5", "usage": {"input_tokens": 25, "output_tokens": 1}},
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "ping"},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Grü"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "ße"}},
    {"type": "content_block_stop", "index": 0},
    {
        "type": "content_block_start",
        "index": 1,
        "content_block": {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}},
    },
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"at": "he'}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": 're"}'}},
    {"type": "content_block_stop", "index": 1},
    {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 15}},
    {"type": "message_stop"},
    named=True,
)
GENERATE_BODY: Raw = {
    "candidates": [
        {
            "content": {
                "role": "model",
                "parts": [
                    {"text": "I think.", "thought": True},
                    {"text": "Looking."},
                    {"functionCall": {"name": "look", "args": {"at": "here"}}, "thoughtSignature": "c2lnbmVk"},
                    {"functionCall": {"name": "look", "args": {"at": "there"}}},
                ],
            },
            "finishReason": "STOP",
            "index": 0,
        }
    ],
    "usageMetadata": {
        "promptTokenCount": 11,
        "candidatesTokenCount": 7,
        "thoughtsTokenCount": 3,
        "cachedContentTokenCount": 4,
        "totalTokenCount": 21,
    },
    "modelVersion": "gemini-2.5-flash",
}
GENERATE_STREAM = sse(
    {"candidates": [{"content": {"role": "model", "parts": [{"text": "Hel"}]}, "index": 0}]},
    {
        "candidates": [
            {"content": {"role": "model", "parts": [{"text": "lo ☕"}]}, "finishReason": "STOP", "index": 0}
        ],
        "usageMetadata": {"promptTokenCount": 4, "candidatesTokenCount": 2, "totalTokenCount": 6},
        "modelVersion": "gemini-2.5-flash",
    },
)
RESPONSES_EVENTS: list[Raw] = [
    {"type": "response.created", "response": {"id": "resp_1", "status": "in_progress", "output": []}},
    {"type": "response.output_item.added", "output_index": 0, "item": {**RESPONSES_BODY["output"][1], "content": []}},
    {"type": "response.output_text.delta", "output_index": 0, "item_id": "msg_1", "content_index": 0, "delta": "Look"},
    {"type": "response.output_text.delta", "output_index": 0, "item_id": "msg_1", "content_index": 0, "delta": "ing."},
    {"type": "response.output_item.done", "output_index": 0, "item": RESPONSES_BODY["output"][1]},
    {"type": "response.completed", "response": {**RESPONSES_BODY, "output": [RESPONSES_BODY["output"][1]]}},
]
RESPONSES_STREAM = sse(*({**e, "sequence_number": n} for n, e in enumerate(RESPONSES_EVENTS)), named=True)

SAMPLES: dict[str, tuple[str, Raw]] = {
    "chat": ("openai", {"body": CHAT_BODY}),
    "chat-stream": ("openai", {"sse": CHAT_STREAM + "data: [DONE]\n\n"}),
    "responses": ("openai-responses", {"body": RESPONSES_BODY}),
    "responses-stream": ("openai-responses", {"sse": RESPONSES_STREAM}),
    "messages": ("anthropic", {"body": MESSAGES_BODY}),
    "messages-stream": ("anthropic", {"sse": MESSAGES_STREAM}),
    "generate": ("gemini", {"body": GENERATE_BODY}),
    "generate-stream": ("gemini", {"sse": GENERATE_STREAM}),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_read_whole(name: str) -> None:
    wire, response = SAMPLES[name]
    check_answer(READERS[wire], response)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_goes_back_with_what_its_provider_needs(name: str) -> None:
    wire, response = SAMPLES[name]
    check_return(READERS[wire], response)


OVERLOADED: dict[str, str] = {
    "openai": sse({"error": {"code": "server_is_overloaded", "message": "x"}}),
    "openai-responses": sse({"type": "error", "code": "server_is_overloaded", "message": "x"}, named=True),
    "anthropic": sse({"type": "error", "error": {"type": "overloaded_error", "message": "x"}}, named=True),
    "gemini": sse({"error": {"code": 503, "status": "UNAVAILABLE", "message": "x"}}),
}


@pytest.mark.parametrize("wire", READERS)
def test_an_error_in_a_stream_has_its_class_on_every_wire(wire: str) -> None:
    assert error_of(READERS[wire], {"status": 200, "headers": {}, "sse": OVERLOADED[wire]}) == "Overloaded"


@pytest.mark.parametrize("name", [name for name, (_, response) in SAMPLES.items() if "sse" in response])
def test_a_stream_that_is_cut_is_broken_on_every_wire(name: str) -> None:
    wire, response = SAMPLES[name]
    half = response["sse"][: len(response["sse"]) // 2]
    assert error_of(READERS[wire], {"status": 200, "headers": {}, "sse": half}) == "StreamBroken"


# --- the recordings -------------------------------------------------------------------------------------------------

ERRORS = {
    "anthropic/error--count-tokens-error": "InvalidRequest",
    "anthropic/error--explicit-effort-xhigh-unsupported-model-errors": "InvalidRequest",
    "anthropic/error--model-name-suggestion-anthropic": "InvalidRequest",
    "azure-openai/error--chat-reasoning-1": "InvalidRequest",
    "azure-openai/ratelimit-headers--prompt-content-filtering-with-events-with-content": "ContentFilter",
    "bedrock/error--bedrock-count-tokens-rejects-server-tools": "InvalidRequest",
    "bedrock/error--multimodal-tool-return-matrix-direct-uploaded-file-i-1": "InvalidRequest",
    "bedrock/error--multimodal-tool-return-matrix-direct-uploaded-file-v-1": "InvalidRequest",
    "bedrock/error--multimodal-tool-return-matrix-direct-uploaded-file-v-1-v2": "InvalidRequest",
    "bedrock/error--multimodal-tool-return-matrix-tool-return-content-up-1": "InvalidRequest",
    "bedrock/error--streaming-error": "InvalidRequest",
    "cohere/error--agent-with-multiple-tools-5": "InvalidRequest",
    "cohere/error--agent-with-multiple-tools-6": "InvalidRequest",
    "cohere/error--testcohere-test-embed-error": "InvalidRequest",
    "deepseek/error--deepseek-responses-rejects-interleaved-function-call": "InvalidRequest",
    "gemini/error--model-name-suggestion-google": "InvalidRequest",
    "gemini/error--testgoogle-test-count-tokens-error": "InvalidRequest",
    "groq/error--tool-regular-error": "InvalidRequest",
    "groq/error--tool-use-failed-error": "InvalidRequest",
    "groq/error--tool-use-failed-error-with-text": "InvalidRequest",
    "groq/inband-error--tool-use-failed-error-streaming": "InvalidRequest",
    "groq/inband-error--tool-use-failed-error-streaming-with-text": "InvalidRequest",
    "openai-chat/error--agents-and-tools-2": "InvalidRequest",
    "openai-chat/error--async-chat-completion-404": "InvalidRequest",
    "openai-chat/error--model-name-suggestion-openai-chat": "InvalidRequest",
    "openai-chat/error--multimodal-tool-return-matrix-tool-return-content-ur-2": "InvalidRequest",
    "openai-chat/error--o1-mini-system-role-system": "InvalidRequest",
    "openai-chat/error--vision-base64-3": "InvalidRequest",
    "openai-chat/error--vision-with-events-with-content-2": "InvalidRequest",
    "openai-responses/error--http-error": "InvalidRequest",
    "openai-responses/error--model-name-suggestion-openai-responses": "InvalidRequest",
    "openai-responses/error--multimodal-tool-return-matrix-direct-url-force-downl-2": "InvalidRequest",
    "openai-responses/error--multimodal-tool-return-matrix-tool-return-content-ur-2": "InvalidRequest",
    "openai-responses/error--responses-create-api-error-content-mode0": "InvalidRequest",
    "openai-responses/error--thinking-with-modified-history-1": "InvalidRequest",
    "openrouter/error--errors-raised": "RateLimited",
    "quoted-errors/anthropic-400-input-plus-max-tokens": "ContextLength",
    "quoted-errors/anthropic-429-rate-limit-via-openai-compat": "RateLimited",
    "quoted-errors/anthropic-529-overloaded": "Overloaded",
    "quoted-errors/azure-400-content-filter": "ContentFilter",
    "quoted-errors/gemini-429-quota-no-retryinfo": "RateLimited",
    "quoted-errors/gemini-429-retryinfo": "RateLimited",
    "quoted-errors/gemini-503-high-demand": "Overloaded",
    "quoted-errors/groq-413-too-large": "ContextLength",
    "quoted-errors/ollama-ndjson-error": "ServerError",
    "quoted-errors/openai-429-insufficient-quota": "QuotaExhausted",
    "quoted-errors/openai-429-tpm-174ms": "RateLimited",
    "quoted-errors/openai-429-tpm-o4-mini": "RateLimited",
    "quoted-errors/openai-compat-stream-error-empty-choices": "ServerError",
    "quoted-errors/openai-responses-stream-error": "Overloaded",
    "quoted-errors/openai-responses-stream-failed": "ServerError",
    "quoted-errors/openrouter-stream-error-chunk": "ServerError",
    "quoted-errors/stream-cut-mid-tool-call": "StreamBroken",
    "quoted-errors/xai-429-team-limit": "RateLimited",
    "vertex/error--generate-content-invalid-temperature": "InvalidRequest",
    "vertex/error--multimodal-tool-return-matrix-direct-url-image-googl-2": "InvalidRequest",
}
"""The class of every recorded and quoted error, as the taxonomy has it."""

WAITS = {
    "quoted-errors/openai-429-tpm-174ms": 0.174,
    "quoted-errors/openai-429-tpm-o4-mini": 1.574,
    "quoted-errors/gemini-429-retryinfo": 58.0,
    "quoted-errors/gemini-429-quota-no-retryinfo": None,
    "quoted-errors/anthropic-529-overloaded": None,
}

QUOTED_STREAMS = {
    "quoted-errors/openai-responses-stream-error": "openai-responses",
    "quoted-errors/openai-responses-stream-failed": "openai-responses",
    "quoted-errors/openai-compat-stream-error-empty-choices": "openai",
    "quoted-errors/openrouter-stream-error-chunk": "openai",
    "quoted-errors/stream-cut-mid-tool-call": "openai",
}
"""The wires of streams that are quoted without their request."""


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def case(path: Path) -> tuple[Reader | None, Raw]:
    recorded = json.loads(path.read_text())
    name, url = name_of(path), (recorded["request"] or {}).get("url") or ""
    reader = READERS[QUOTED_STREAMS[name]] if name in QUOTED_STREAMS else reader_of(url)
    return reader, recorded["response"]


def is_answer(path: Path) -> bool:
    reader, response = case(path)
    return reader is not None and response["status"] == 200 and name_of(path) not in ERRORS


ANSWERS = [path for path in FILES if is_answer(path)]
FAILURES = [path for path in FILES if name_of(path) in ERRORS or case(path)[1]["status"] >= 400]


def test_the_recordings_are_all_there_or_none_is() -> None:
    if FILES:
        assert {name_of(path) for path in FAILURES} == set(ERRORS)
        assert len(ANSWERS) > 100
        streams = [path for path in ANSWERS if "sse" in case(path)[1]]
        assert {case(path)[0] for path in streams}.issuperset(READERS.values())
    else:
        assert ANSWERS == FAILURES == []


if FILES:

    @pytest.mark.parametrize("path", ANSWERS, ids=name_of)
    def test_a_recorded_answer_is_read_whole(path: Path) -> None:
        reader, response = case(path)
        assert reader is not None
        check_answer(reader, response)

    @pytest.mark.parametrize("path", ANSWERS, ids=name_of)
    def test_a_recorded_answer_goes_back_with_what_its_provider_needs(path: Path) -> None:
        reader, response = case(path)
        assert reader is not None
        check_return(reader, response)

    @pytest.mark.parametrize("path", FAILURES, ids=name_of)
    def test_a_recorded_error_has_its_class(path: Path) -> None:
        name = name_of(path)
        reader, response = case(path)
        if name == "quoted-errors/ollama-ndjson-error":  # of a wire that is not spoken here: its last line is the error
            response = {**response, "sse": response["sse"].splitlines()[-1]}
        assert error_of(reader, response) == ERRORS[name]
        if name in WAITS:
            error = classify(response["status"], response["body"], response["headers"])
            assert error.retry_after == (pytest.approx(WAITS[name]) if WAITS[name] else None)
