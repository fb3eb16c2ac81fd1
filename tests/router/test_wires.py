"""One suite for every wire: any conversation is written validly, moves between providers, and its answers come back.

What a body must look like is checked by a reader of its own for each format, written from the vendors' documentation:
it refuses what the vendor would, and reduces the rest to a ``Sketch``, in which all formats are the same.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from ridethrough.runtime.errors import ModelError, Overloaded, ServerError, StreamBroken
from ridethrough.runtime.router import messages as canonical
from ridethrough.runtime.router.messages import (
    AssistantMessage,
    ImagePart,
    Message,
    ModelRequest,
    ProviderPart,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    ToolSpec,
    UserMessage,
)
from ridethrough.runtime.router.providers.anthropic import AnthropicMessages
from ridethrough.runtime.router.providers.gemini import GeminiGenerate
from ridethrough.runtime.router.providers.openai_chat import DIALECTS, OpenAIChat
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
    return "".join(f"{name}data: {json.dumps(chunk)}\n\n" for name, chunk in zip(names, chunks, strict=True))


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
    """A wire, a model that reasons there, its format's reader, and an answer of it (whole and streamed)."""

    open: Callable[[str], Wire]
    model: str
    read: Callable[[Raw], Sketch]
    answer: Callable[[str], Raw]
    stream: Callable[[str], str]
    overloaded: Raw
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
        {"error": {"code": "server_is_overloaded", "message": "x"}},
        sse({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}),
    ),
    "openai-responses": Kit(
        OpenAIResponses,
        "gpt-5.2",
        read_responses,
        responses_answer,
        responses_stream,
        {"type": "error", "code": "server_is_overloaded", "message": "x", "sequence_number": 0},
        sse({"type": "response.created", "response": {"status": "in_progress"}, "sequence_number": 0}, named=True),
    ),
    "anthropic": Kit(
        AnthropicMessages,
        "claude-sonnet-4-5",
        read_messages,
        messages_answer,
        messages_stream,
        {"type": "error", "error": {"type": "overloaded_error", "message": "x"}},
        sse({"type": "message_start", "message": {"usage": {"input_tokens": 1}}}, {"type": "ping"}, named=True),
    ),
    "gemini": Kit(
        GeminiGenerate,
        "gemini-3-pro-preview",
        read_generate,
        generate_answer,
        generate_stream,
        {"error": {"code": 503, "status": "UNAVAILABLE", "message": "x"}},
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


# --- requests -------------------------------------------------------------------------------------------------------


def test_every_wire_is_in_the_table() -> None:
    assert {type(kit.open("p")) for kit in WIRES.values()} == {
        OpenAIChat,
        OpenAIResponses,
        AnthropicMessages,
        GeminiGenerate,
    }


@pytest.mark.parametrize("name", WIRES)
def test_a_conversation_is_written_whole(name: str) -> None:
    kit = WIRES[name]
    talk: list[Message] = [
        *began(name, "p", "one"),
        UserMessage(content=(TextPart(text="and this?"), ImagePart(data=PIXEL))),
    ]
    sketch, raw, _ = kit.sketch("p", ModelRequest(talk, tools=[LOOK]))
    assert sketch.system == "be brief"
    assert [text for text in ("look here and there", "said-one", "and this?") if text not in sketch.text] == []
    assert [(call[1], call[2]) for call in sketch.calls] == [("look", {"at": "here"}), ("look", {"at": "there"})]
    assert [result[0] for result in sketch.results] == [call[0] for call in sketch.calls]
    assert all("result of" in text for _, text in sketch.results)
    assert [image for image in sketch.images if PIXEL in image]
    assert "secret-one" in raw


@pytest.mark.parametrize("name", WIRES)
def test_an_image_in_a_tools_result_arrives_or_is_noted(name: str) -> None:
    sketch, _, notes = WIRES[name].sketch("p", ModelRequest(began(name, "p", "one", image=True), tools=[LOOK]))
    assert any(PIXEL in image for image in sketch.images) or any("image" in note for note in notes)
    assert len(sketch.results) == 2


@pytest.mark.parametrize("name", WIRES)
def test_broken_arguments_go_back_as_an_object(name: str) -> None:
    broken = ToolCall(id="c1", name="look", arguments=None, raw='{"at": oops', error="no JSON")
    talk: list[Message] = [
        UserMessage(content="hi"),
        AssistantMessage(tool_calls=(broken,)),
        ToolMessage(content="the arguments are no JSON", tool_call_id="c1", name="look", is_error=True),
    ]
    sketch, raw, _ = WIRES[name].sketch("p", ModelRequest(talk, tools=[LOOK]))
    assert [call[1] for call in sketch.calls] == ["look"]
    assert isinstance(sketch.calls[0][2], dict)
    assert "oops" in raw


@pytest.mark.parametrize("name", WIRES)
def test_calls_without_results_and_results_without_calls_are_mended(name: str) -> None:
    calls = (ToolCall(id="c1", name="look"), ToolCall(id="c2", name="look"))
    talk: list[Message] = [
        UserMessage(content="hi"),
        ToolMessage(content="nobody asked for this", tool_call_id="c9", name="look"),
        AssistantMessage(content="I look.", tool_calls=calls),
        ToolMessage(content="seen", tool_call_id="c2", name="look"),
        UserMessage(content="never mind"),
        ToolMessage(content="too late", tool_call_id="c1", name="look"),
        AssistantMessage(content="fine", tool_calls=(ToolCall(id="c3", name="look"),)),
    ]
    sketch, raw, _ = WIRES[name].sketch("p", ModelRequest(talk, tools=[LOOK]))
    assert len(sketch.calls) == len(sketch.results) == 3
    assert "seen" in dict(sketch.results)[sketch.calls[1][0]]
    assert [text for text in ("nobody asked for this", "never mind", "too late") if text not in raw] == []


@pytest.mark.parametrize("name", WIRES)
def test_odd_conversations_are_written_validly(name: str) -> None:
    kit, rng = WIRES[name], random.Random(7)
    for _ in range(60):
        talk = list(odd_talk(rng))
        kit.sketch("p", ModelRequest(talk, tools=[LOOK]))


def odd_talk(rng: random.Random) -> Iterator[Message]:
    """Yield what hand-made histories have: odd ids, empty answers, several of a role in a row, lost results."""
    yield UserMessage(content="hi")
    for number in range(rng.randrange(1, 8)):
        kind = rng.randrange(5)
        ids = [
            rng.choice(["", "functions.look:", "toolu/", "ä", "x" * 70]) + f"{number}.{n}"
            for n in range(rng.randrange(3))
        ]
        if kind == 0:
            yield UserMessage(content=(TextPart(text=f"u{number}"), ImagePart(url="https://example.com/a.png")))
        elif kind == 1:
            yield AssistantMessage(content=rng.choice(["", f"a{number}"]))
        elif kind == 2:
            yield SystemMessage(content=f"s{number}")
        else:
            calls = tuple(ToolCall(id=id, name=f"look_{n}", arguments={"n": n}) for n, id in enumerate(ids))
            yield AssistantMessage(content=rng.choice(["", "well"]), tool_calls=calls)
            for id in rng.sample(ids, rng.randrange(len(ids) + 1)):
                yield ToolMessage(content=rng.choice(["", "done"]), tool_call_id=id, name="look")
    yield UserMessage(content="go on")


@pytest.mark.parametrize("name", WIRES)
def test_settings_are_written_or_noted(name: str) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    request = ModelRequest(
        [UserMessage(content="hi")],
        tools=[LOOK],
        tool_choice="look",
        output_schema=schema,
        temperature=0.25,
        max_tokens=4321,
        reasoning="high",
    )
    kit = WIRES[name]
    rendered = kit.open("p").render(request, kit.model, stream=True)
    raw, notes = rendered.body.decode(), " ".join(rendered.notes)
    assert "4321" in raw
    assert "0.25" in raw or "temperature" in notes
    assert "high" in raw or "effort" in notes or "reasoning" in notes
    assert '"a"' in raw
    assert "Look at a place." in raw
    assert rendered.headers["content-type"] == "application/json"
    assert not rendered.path.startswith("/")


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh"])
def test_every_effort_can_be_asked_for(name: str, effort: str) -> None:
    kit = WIRES[name]
    rendered = kit.open("p").render(
        ModelRequest([UserMessage(content="hi")], reasoning=effort), kit.model, stream=False
    )
    kit.read(json.loads(rendered.body))


@pytest.mark.parametrize("name", WIRES)
def test_the_credential_is_in_its_header_only(name: str) -> None:
    kit = WIRES[name]
    wire = kit.open("p")
    assert any("planted-key" in value for value in wire.authorize("planted-key").values())
    rendered = wire.render(ModelRequest([UserMessage(content="hi")]), kit.model, stream=False)
    assert "planted-key" not in f"{rendered}"


# --- moving between wires -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("here", "there"), PAIRS)
def test_a_conversation_moves_to_another_provider_and_back(here: str, there: str) -> None:
    a, b = WIRES[here], WIRES[there]
    talk = began(here, "a", "one", image=True)
    sketch, raw, notes = b.sketch("b", ModelRequest(talk, tools=[LOOK]))
    assert "said-one" in sketch.text
    assert [(call[1], call[2]) for call in sketch.calls] == [("look", {"at": "here"}), ("look", {"at": "there"})]
    assert [result[0] for result in sketch.results] == [call[0] for call in sketch.calls]
    assert "secret-one" not in raw
    if here != "gemini":  # its signature rides on a call, and is not a part of its own
        assert any("reasoning of a " in note for note in notes)

    second = b.reply("b", "two")
    talk += [second.message, *results(second), UserMessage(content="go on")]
    sketch, raw, notes = a.sketch("a", ModelRequest(talk, tools=[LOOK]))
    assert [text for text in ("said-one", "said-two", "go on") if text not in sketch.text] == []
    assert len(sketch.calls) == len(sketch.results) == 4
    assert len({call[0] for call in sketch.calls}) == 4
    assert "secret-one" in raw
    assert "secret-two" not in raw


@pytest.mark.parametrize(("here", "there"), PAIRS)
def test_a_providers_own_items_stay_with_it(here: str, there: str) -> None:
    item = ProviderPart(kind="web_search_call", provider="a", data={"type": "web_search_call", "id": "planted-item"})
    talk: list[Message] = [
        UserMessage(content="hi"),
        AssistantMessage(content=(item, TextPart(text="found"))),
        UserMessage(content="so?"),
    ]
    sketch, raw, notes = WIRES[there].sketch("b", ModelRequest(talk))
    assert "planted-item" not in raw
    assert "found" in sketch.text
    assert notes


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("here", WIRES)
def test_a_conversation_moves_to_every_dialect(here: str, dialect: str) -> None:
    wire = OpenAIChat("b", quirks=DIALECTS[dialect])
    talk = [*began(here, "a", "one", image=True), UserMessage(content="go on")]
    body = json.loads(wire.render(ModelRequest(talk, tools=[LOOK]), "m", stream=False).body)
    sketch = read_chat(body)
    assert [result[0] for result in sketch.results] == [call[0] for call in sketch.calls]
    assert "secret-one" not in json.dumps(body)
    bounds = DIALECTS[dialect].call_id
    assert bounds is None or all(bounds.fullmatch(call[0]) for call in sketch.calls)


# --- the cost of a turn ---------------------------------------------------------------------------------------------


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the name of every message that is rendered afresh."""
    names: list[str] = []
    rendered = canonical.UserMessage.rendered

    def counted(self: Any, key: str, render: Callable[[Any], Any]) -> Any:
        def fresh(message: Any) -> Any:
            names.append(type(message).__name__)
            return render(message)

        return rendered(self, key, fresh)

    for kind in (SystemMessage, UserMessage, AssistantMessage, ToolMessage):
        monkeypatch.setattr(kind, "rendered", counted)
    return names


@pytest.mark.parametrize("name", WIRES)
def test_a_turn_renders_only_what_is_new(name: str, written: list[str]) -> None:
    kit, talk = WIRES[name], list[Message]()
    wire, fresh = kit.open("p"), list[int]()
    for turn in range(30):
        answer = kit.reply("p", f"t{turn}")
        talk += [UserMessage(content=f"turn {turn}"), answer.message, *results(answer)]
        request = ModelRequest(talk, tools=[LOOK])
        written.clear()
        first = wire.render(request, kit.model, stream=False).body
        fresh.append(len(written))
        written.clear()
        assert wire.render(request, kit.model, stream=False).body == first
        assert kit.open("p").render(request, kit.model, stream=False).body == first
        assert written == []
    assert 0 < fresh[-1] <= fresh[1]


@pytest.mark.parametrize(("here", "there"), PAIRS)
def test_what_one_wire_kept_does_not_show_in_another(here: str, there: str) -> None:
    talk = [*began(here, "a", "one", image=True), UserMessage(content="go on")]
    request = ModelRequest(talk, tools=[LOOK])
    a, b = WIRES[here].open("a"), WIRES[there].open("b")
    alone = WIRES[there].open("b").render(fresh_copy(request), WIRES[there].model, stream=False).body
    a.render(request, WIRES[here].model, stream=False)
    assert b.render(request, WIRES[there].model, stream=False).body == alone


def fresh_copy(request: ModelRequest) -> ModelRequest:
    """Return an equal request of messages that nobody has rendered yet."""
    plain = [message.model_dump() for message in request.messages]
    return ModelRequest(plain, tools=request.tools)


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WIRES)
def test_an_answer_comes_back(name: str) -> None:
    answer = WIRES[name].reply("p", "one")
    assert (answer.message.text, answer.finish, answer.model) == ("said-one", "tool_calls", "m")
    assert [(call.name, call.arguments) for call in answer.message.tool_calls] == [
        ("look", {"at": "here"}),
        ("look", {"at": "there"}),
    ]
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.cached_tokens) == (20, 9, 8)


@pytest.mark.parametrize("name", WIRES)
def test_a_stream_says_the_same_however_it_is_split(name: str) -> None:
    kit = WIRES[name]
    raw, whole = kit.stream("one").encode(), kit.reply("p", "one")
    for seed in range(25):
        cuts = sorted(random.Random(seed).sample(range(1, len(raw)), 40)) if seed else []
        answer, said = streamed(kit, [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)])
        assert said == "said-one"
        assert (answer.message, answer.finish, answer.usage) == (whole.message, whole.finish, whole.usage)


def streamed(kit: Kit, pieces: Sequence[bytes]) -> tuple[Answer, str]:
    stream = kit.open("p").stream("d")
    said = "".join([stream.feed(piece) for piece in pieces])
    assert stream.finished
    return stream.close(), said


@pytest.mark.parametrize("name", WIRES)
def test_a_stream_without_its_end_is_broken(name: str) -> None:
    kit = WIRES[name]
    chunks = kit.stream("one").split("\n\n")
    unfinished = 0
    for kept in range(1, len(chunks)):
        stream = kit.open("p").stream("d")
        stream.feed("".join(f"{chunk}\n\n" for chunk in chunks[:kept]).encode())
        if not stream.finished:
            unfinished += 1
            with pytest.raises(StreamBroken):
                stream.close()
    assert unfinished >= len(chunks) - 5


@pytest.mark.parametrize("name", WIRES)
def test_signs_of_life_are_no_progress(name: str) -> None:
    kit = WIRES[name]
    stream = kit.open("p").stream("d")
    stream.feed(b": comment\n\n" + kit.silent.encode())
    assert (stream.progress, stream.finished, stream.done) == (0, False, False)
    full = kit.open("p").stream("d")
    full.feed(kit.stream("one").encode())
    assert full.progress >= 4


@pytest.mark.parametrize("name", WIRES)
def test_an_error_with_status_200_has_its_class(name: str) -> None:
    kit = WIRES[name]
    with pytest.raises(Overloaded):
        kit.open("p").parse(json.dumps(kit.overloaded).encode(), "d")
    stream = kit.open("p").stream("d")
    with pytest.raises(Overloaded):
        stream.feed(sse(kit.overloaded, named="type" in kit.overloaded).encode())


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("body", [b"<html>502</html>", b'{"cut', b"{}", b"[]", b"null", b'"text"', b"7", b""])
def test_what_is_no_answer_is_the_servers_error(name: str, body: bytes) -> None:
    with pytest.raises(ServerError):
        WIRES[name].open("p").parse(body, "d")


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("data", ["{nonsense", "7", '"text"', "[1]"])
def test_a_chunk_that_is_none_breaks_the_stream(name: str, data: str) -> None:
    stream = WIRES[name].open("p").stream("d")
    with pytest.raises(StreamBroken):
        stream.feed(f"data: {data}\n\n".encode())


@pytest.mark.parametrize("name", WIRES)
def test_no_body_whatever_raises_anything_but_a_models_error(name: str) -> None:
    kit, rng = WIRES[name], random.Random(3)
    raw = json.dumps(kit.answer("one")).encode()
    for _ in range(400):
        hurt = bytearray(raw)
        for _ in range(rng.randrange(1, 6)):
            hurt[rng.randrange(len(hurt))] = rng.choice(b'{}[]",:0n \x00\xff')
        try:
            kit.open("p").parse(bytes(hurt), "d")
        except ModelError:
            continue
