"""What the suites of all wires share: a reader of each format, and answers in it, whole and streamed.

The readers are written from the vendors' documentation: they refuse what the vendor would, and reduce the rest to a
``Sketch``, in which all formats are the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ridethrough.runtime.errors import StreamBroken
from ridethrough.runtime.router import messages as canonical
from ridethrough.runtime.router.messages import (
    ImagePart,
    Message,
    ModelRequest,
    SystemMessage,
    TextPart,
    ToolMessage,
    ToolSpec,
    UserMessage,
)
from ridethrough.runtime.router.providers.anthropic import AnthropicMessages
from ridethrough.runtime.router.providers.gemini import GeminiGenerate
from ridethrough.runtime.router.providers.openai_chat import OpenAIChat
from ridethrough.runtime.router.providers.openai_responses import OpenAIResponses
from ridethrough.runtime.router.providers.wire import Answer, Wire

Raw = dict[str, Any]


@dataclass
class Sketch:
    """A request without its format. ``calls`` are ids, names and arguments, ``results`` ids and texts."""

    system: str = ""
    said: list[tuple[str, str]] = field(default_factory=list)
    calls: list[tuple[str, str, Any]] = field(default_factory=list)
    results: list[tuple[str, str]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All that users and the model said."""
        return "\n".join(text for _, text in self.said)


# --- Chat Completions -----------------------------------------------------------------------------------------------


def read_chat(body: Raw) -> Sketch:
    """Every call has its result behind it, in tool messages of text, and nothing comes between."""
    sketch, waiting = Sketch(), list[str]()
    for message in body["messages"]:
        role, content = message["role"], message["content"]
        if role == "tool":
            assert isinstance(content, str)
            waiting.remove(message["tool_call_id"])
            sketch.results.append((message["tool_call_id"], content))
            continue
        assert not waiting, f"{waiting} have no results"
        calls = message.get("tool_calls") or []
        assert content is not None or calls
        waiting = [call["id"] for call in calls]
        sketch.calls += [(c["id"], c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]
        parts: list[Raw] = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        if role == "system":
            sketch.system += "".join(part["text"] for part in parts)
            continue
        sketch.said += [(role, part["text"]) for part in parts if part["type"] == "text"]
        sketch.images += [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert not waiting
    return sketch


def chat_answer(mark: str) -> Raw:
    calls = [call(f"call_{mark}_{n}", at) for n, at in enumerate(("here", "there"))]
    message = {
        "role": "assistant",
        "content": f"said-{mark}",
        "reasoning_content": f"secret-{mark}",
        "tool_calls": calls,
    }
    usage = {"prompt_tokens": 20, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}}
    return {"model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}], "usage": usage}


def call(id: str, at: str) -> Raw:
    return {"id": id, "type": "function", "function": {"name": "look", "arguments": json.dumps({"at": at})}}


def chat_stream(mark: str) -> str:
    whole = chat_answer(mark)
    message = whole["choices"][0]["message"]
    deltas: list[Raw] = [{"role": "assistant", "content": ""}, {"reasoning_content": message["reasoning_content"]}]
    deltas += [{"content": message["content"][:3]}, {"content": message["content"][3:]}]
    deltas += [{"tool_calls": [{"index": n, **each}]} for n, each in enumerate(message["tool_calls"])]
    chunks: list[Raw] = [{"choices": [{"index": 0, "delta": delta}], "model": "m"} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    return sse(*chunks, {"choices": [], "usage": whole["usage"]}) + "data: [DONE]\n\n"


def sse(*chunks: Raw, named: bool = False) -> str:
    names = [f"event: {chunk['type']}\n" if named else "" for chunk in chunks]
    data = [json.dumps(chunk, ensure_ascii=False) for chunk in chunks]
    return "".join(f"{name}data: {each}\n\n" for name, each in zip(names, data, strict=True))


# --- Responses ------------------------------------------------------------------------------------------------------


def read_responses(body: Raw) -> Sketch:
    """Every call has its output after it, and every output a call before it."""
    sketch, waiting = Sketch(system=body.get("instructions") or ""), list[str]()
    for item in body["input"]:
        kind = item.get("type", "message")
        if kind == "function_call":
            assert re.fullmatch(r".{1,64}", item["call_id"])
            waiting.append(item["call_id"])
            sketch.calls.append((item["call_id"], item["name"], json.loads(item["arguments"])))
        elif kind == "function_call_output":
            waiting.remove(item["call_id"])
            output = item["output"]
            parts = [{"type": "input_text", "text": output}] if isinstance(output, str) else output
            sketch.results.append((item["call_id"], "".join(part.get("text", "") for part in parts)))
            sketch.images += [part["image_url"] for part in parts if part["type"] == "input_image"]
        elif kind == "message":
            _read_responses_message(item, sketch)
        else:
            assert kind == "reasoning"
    assert not waiting
    return sketch


def _read_responses_message(item: Raw, sketch: Sketch) -> None:
    content = item["content"]
    parts = [{"type": "input_text", "text": content}] if isinstance(content, str) else content
    if item["role"] in ("system", "developer"):
        sketch.system += "".join(part["text"] for part in parts)
        return
    sketch.said += [(item["role"], part["text"]) for part in parts if part["type"] in ("input_text", "output_text")]
    sketch.images += [part["image_url"] for part in parts if part["type"] == "input_image"]


def responses_answer(mark: str) -> Raw:
    calls = [
        {"id": f"fc_{mark}_{n}", "type": "function_call", "status": "completed", "call_id": f"call_{mark}_{n}"}
        | {"name": "look", "arguments": json.dumps({"at": at})}
        for n, at in enumerate(("here", "there"))
    ]
    text = {"type": "output_text", "text": f"said-{mark}", "annotations": []}
    thought = {"id": f"rs_{mark}", "type": "reasoning", "summary": [], "encrypted_content": f"secret-{mark}"}
    said = {"id": f"msg_{mark}", "type": "message", "role": "assistant", "status": "completed", "content": [text]}
    usage = {"input_tokens": 20, "input_tokens_details": {"cached_tokens": 8}, "output_tokens": 9}
    return {
        "id": f"resp_{mark}",
        "status": "completed",
        "model": "m",
        "output": [thought, said, *calls],
        "usage": usage,
    }


def responses_stream(mark: str) -> str:
    whole = responses_answer(mark)
    chunks: list[Raw] = [{"type": "response.created", "response": {**whole, "status": "in_progress", "output": []}}]
    for index, item in enumerate(whole["output"]):
        at = {"output_index": index, "item_id": item["id"]}
        empty: Raw = {
            key: [] if key == "content" else "" if key == "arguments" else value for key, value in item.items()
        }
        chunks.append({"type": "response.output_item.added", "output_index": index, "item": empty})
        if item["type"] == "message":
            text = item["content"][0]["text"]
            chunks += [
                {"type": "response.output_text.delta", **at, "content_index": 0, "delta": piece}
                for piece in (text[:3], text[3:])
            ]
        if item["type"] == "function_call":
            chunks.append({"type": "response.function_call_arguments.delta", **at, "delta": item["arguments"]})
        chunks.append({"type": "response.output_item.done", "output_index": index, "item": item})
    chunks.append({"type": "response.completed", "response": whole})
    return sse(*({**chunk, "sequence_number": number} for number, chunk in enumerate(chunks)), named=True)


# --- Messages -------------------------------------------------------------------------------------------------------


def read_messages(body: Raw) -> Sketch:
    """Turns alternate and begin with the user's; all results of a turn's calls begin the next turn; ids are plain."""
    system = body.get("system") or ""
    sketch = Sketch(system=system if isinstance(system, str) else "".join(block["text"] for block in system))
    waiting: list[str] = []
    for number, turn in enumerate(body["messages"]):
        assert turn["role"] == ("assistant" if number % 2 else "user")
        blocks = turn["content"]
        blocks = [{"type": "text", "text": blocks}] if isinstance(blocks, str) else blocks
        results = [block for block in blocks if block["type"] == "tool_result"]
        assert sorted(block["tool_use_id"] for block in results) == sorted(waiting)
        assert all(block["type"] == "tool_result" for block in blocks[: len(results)])
        uses = [block for block in blocks if block["type"] == "tool_use"]
        assert all(re.fullmatch(r"[a-zA-Z0-9_-]+", block["id"]) for block in uses)
        waiting = [block["id"] for block in uses]
        assert len(set(waiting)) == len(waiting)
        sketch.calls += [(block["id"], block["name"], block["input"]) for block in uses]
        for block in results:
            inner = block.get("content") or []
            inner = [{"type": "text", "text": inner}] if isinstance(inner, str) else inner
            sketch.results.append((block["tool_use_id"], "".join(each.get("text", "") for each in inner)))
            sketch.images += [image_of(each) for each in inner if each["type"] == "image"]
        said = [block["text"] for block in blocks if block["type"] == "text"]
        assert all(text.strip() for text in said)
        sketch.said += [(turn["role"], text) for text in said]
        sketch.images += [image_of(block) for block in blocks if block["type"] == "image"]
    assert not waiting
    return sketch


def image_of(block: Raw) -> str:
    source = block["source"]
    return str(source.get("url") or source["data"])


def messages_answer(mark: str) -> Raw:
    content: list[Raw] = [
        {"type": "thinking", "thinking": "hm", "signature": f"secret-{mark}"},
        {"type": "text", "text": f"said-{mark}"},
    ]
    for n, at in enumerate(("here", "there")):
        content.append({"type": "tool_use", "id": f"toolu_{mark}_{n}", "name": "look", "input": {"at": at}})
    usage = {"input_tokens": 12, "cache_read_input_tokens": 8, "output_tokens": 9}
    return {"type": "message", "role": "assistant", "model": "m", "content": content} | {
        "stop_reason": "tool_use",
        "usage": usage,
    }


def messages_stream(mark: str) -> str:
    whole = messages_answer(mark)
    start = {**whole, "content": [], "stop_reason": None, "usage": {**whole["usage"], "output_tokens": 1}}
    chunks: list[Raw] = [{"type": "message_start", "message": start}, {"type": "ping"}]
    for index, block in enumerate(whole["content"]):
        empty = {key: "" if key in ("thinking", "signature", "text") else value for key, value in block.items()}
        deltas: list[Raw] = []
        if block["type"] == "thinking":
            deltas = [
                {"type": "thinking_delta", "thinking": "hm"},
                {"type": "signature_delta", "signature": block["signature"]},
            ]
        elif block["type"] == "text":
            deltas = [{"type": "text_delta", "text": piece} for piece in (block["text"][:3], block["text"][3:])]
        else:
            empty["input"] = {}
            deltas = [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
        chunks.append({"type": "content_block_start", "index": index, "content_block": empty})
        chunks += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        chunks.append({"type": "content_block_stop", "index": index})
    chunks.append({"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}})
    return sse(*chunks, {"type": "message_stop"}, named=True)


# --- generateContent ------------------------------------------------------------------------------------------------


def read_generate(body: Raw) -> Sketch:
    """It begins with the user's turn; a turn of calls is followed by one of as many responses, of the same names."""
    system = (body.get("systemInstruction") or {}).get("parts") or []
    sketch = Sketch(system="".join(part["text"] for part in system))
    waiting: list[Raw] = []
    for number, turn in enumerate(body["contents"]):
        parts = turn["parts"]
        assert parts
        assert turn["role"] == "user" if number == 0 else turn["role"] in ("user", "model")
        answers = [part["functionResponse"] for part in parts if "functionResponse" in part]
        assert [answer["name"] for answer in answers] == [each["name"] for each in waiting]
        names = zip(waiting, answers, strict=True)
        sketch.results += [
            (each["args"]["~id"], json.dumps(answer["response"], ensure_ascii=False)) for each, answer in names
        ]
        waiting = [dict(part["functionCall"]) for part in parts if "functionCall" in part]
        for each in waiting:
            arguments = dict(each.get("args") or {})
            id = str(each.get("id") or f"{number}.{len(sketch.calls)}")
            each["args"] = {"~id": id}
            sketch.calls.append((id, each["name"], arguments))
        role = "assistant" if turn["role"] == "model" else "user"
        sketch.said += [(role, part["text"]) for part in parts if part.get("text") and not part.get("thought")]
        for part in [*parts, *(inner for answer in answers for inner in answer.get("parts") or ())]:
            if media := part.get("inlineData") or part.get("fileData"):
                sketch.images.append(str(media.get("data") or media["fileUri"]))
    assert not waiting
    return sketch


def generate_answer(mark: str) -> Raw:
    parts: list[Raw] = [{"text": f"said-{mark}"}]
    parts.append({"functionCall": {"name": "look", "args": {"at": "here"}}, "thoughtSignature": f"secret-{mark}"})
    parts.append({"functionCall": {"name": "look", "args": {"at": "there"}}})
    usage = {"promptTokenCount": 20, "candidatesTokenCount": 9, "cachedContentTokenCount": 8}
    candidate = {"content": {"role": "model", "parts": parts}, "finishReason": "STOP", "index": 0}
    return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "m", "responseId": f"r-{mark}"}


def generate_stream(mark: str) -> str:
    whole = generate_answer(mark)
    text, *calls = whole["candidates"][0]["content"]["parts"]
    pieces = [{"text": text["text"][:3]}, {"text": text["text"][3:]}, *calls]
    about = {"modelVersion": "m", "responseId": whole["responseId"]}
    chunks: list[Raw] = [
        {"candidates": [{"content": {"role": "model", "parts": [piece]}, "index": 0}], **about} for piece in pieces
    ]
    chunks[-1]["candidates"][0]["finishReason"] = "STOP"
    chunks[-1]["usageMetadata"] = whole["usageMetadata"]
    return sse(*chunks)


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kit:
    """A wire, a model that reasons there, its format's reader, and an answer of it (whole and streamed).

    ``end`` is in the chunk of a stream after which the answer is whole, and in none before it. ``overloaded`` and
    ``refused`` are errors as they come with status 200, ``silent`` is a stream that only shows that it is alive.
    """

    open: Callable[[str], Wire]
    model: str
    read: Callable[[Raw], Sketch]
    answer: Callable[[str], Raw]
    stream: Callable[[str], str]
    end: str
    overloaded: Raw
    refused: Raw
    silent: str

    def sketch(self, provider: str, request: ModelRequest) -> tuple[Sketch, str, tuple[str, ...]]:
        """Render a request and read it: what it says, its raw text, and the notes."""
        rendered = self.open(provider).render(request, self.model, stream=False)
        return self.read(json.loads(rendered.body)), rendered.body.decode(), rendered.notes

    def reply(self, provider: str, mark: str) -> Answer:
        """Return an answer that ``provider`` gave on this wire; ``mark`` is in all that it says."""
        return self.open(provider).parse(json.dumps(self.answer(mark)).encode(), provider)


WIRES: dict[str, Kit] = {
    "openai": Kit(
        OpenAIChat,
        "some-model",
        read_chat,
        chat_answer,
        chat_stream,
        '"finish_reason"',
        {"error": {"code": "server_is_overloaded", "message": "x"}},
        {"error": {"type": "invalid_request_error", "message": "x"}},
        sse({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}),
    ),
    "openai-responses": Kit(
        OpenAIResponses,
        "gpt-5.2",
        read_responses,
        responses_answer,
        responses_stream,
        '"response.completed"',
        {"type": "error", "code": "server_is_overloaded", "message": "x", "sequence_number": 0},
        {"type": "response.failed", "response": {"status": "failed", "error": {"code": "invalid_image"}}},
        sse({"type": "response.created", "response": {"status": "in_progress"}, "sequence_number": 0}, named=True),
    ),
    "anthropic": Kit(
        AnthropicMessages,
        "claude-sonnet-4-5",
        read_messages,
        messages_answer,
        messages_stream,
        '"message_stop"',
        {"type": "error", "error": {"type": "overloaded_error", "message": "x"}},
        {"type": "error", "error": {"type": "invalid_request_error", "message": "x"}},
        sse({"type": "message_start", "message": {"usage": {"input_tokens": 1}}}, {"type": "ping"}, named=True),
    ),
    "gemini": Kit(
        GeminiGenerate,
        "gemini-3-pro-preview",
        read_generate,
        generate_answer,
        generate_stream,
        '"finishReason"',
        {"error": {"code": 503, "status": "UNAVAILABLE", "message": "x"}},
        {"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "x"}},
        sse({"candidates": [{"content": {"role": "model", "parts": []}, "index": 0}]}),
    ),
}

PAIRS = [(here, there) for here in WIRES for there in WIRES]
PIXEL = "iVBORw0KGgo="
LOOK = ToolSpec(
    name="look",
    description="Look at a place.",
    parameters={"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
)


def results(answer: Answer, *, image: bool = False) -> Iterator[Message]:
    """Yield the results of an answer's calls, the last of them an error, the first with an image when asked."""
    for number, each in enumerate(answer.message.tool_calls):
        text = f"result of {json.dumps(each.arguments)}"
        content: canonical.Content = text
        if image and not number:
            content = (TextPart(text=text), ImagePart(data=PIXEL))
        yield ToolMessage(content=content, tool_call_id=each.id, name=each.name, is_error=bool(number))


def began(here: str, provider: str, mark: str, *, image: bool = False) -> list[Message]:
    """Return a conversation whose first answer ``provider`` gave on the wire ``here``."""
    answer = WIRES[here].reply(provider, mark)
    start: list[Message] = [SystemMessage(content="be brief"), UserMessage(content="look here and there")]
    return [*start, answer.message, *results(answer, image=image)]


def whole_before(wire: Wire, raw: bytes, end: int, step: int = 1) -> list[int]:
    """Return the places before ``end`` where a stream can be cut and still gives an answer: there should be none."""
    whole: list[int] = []
    for size in range(0, end, step):
        stream = wire.stream("d")
        stream.feed(raw[:size])
        try:
            stream.close()
        except StreamBroken:
            continue
        whole.append(size)
    return whole
