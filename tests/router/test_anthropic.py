"""The Messages wire, byte by byte, and the rules that its conversations obey."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from typing import Any

import pytest
from tests.router.kits import whole_before

from ridethrough.runtime import errors
from ridethrough.runtime.errors import ModelError, ServerError, StreamBroken
from ridethrough.runtime.router.errors import TABLE, Rule
from ridethrough.runtime.router.messages import (
    AssistantMessage,
    ImagePart,
    Message,
    ModelRequest,
    ProviderPart,
    ReasoningPart,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    ToolSpec,
    Usage,
    UserMessage,
)
from ridethrough.runtime.router.providers.anthropic import AnthropicMessages
from ridethrough.runtime.router.providers.anthropic_models import closed_schema, traits_of
from ridethrough.runtime.router.providers.openai_chat import OpenAIChat
from ridethrough.runtime.router.providers.wire import Answer, Rendered

WIRE = AnthropicMessages("p")
NEWEST, OLD = "claude-opus-5-5", "claude-sonnet-4-5"
MARK = {"type": "ephemeral"}
TOOL = ToolSpec(name="f", description="does f")
IMAGE = ImagePart(data="aGk=", media_type="image/png")
USAGE = {
    "input_tokens": 10,
    "cache_creation_input_tokens": 20,
    "cache_read_input_tokens": 300,
    "output_tokens": 4,
    "output_tokens_details": {"thinking_tokens": 3},
}


def rendered(messages: Iterable[Any], model: str = OLD, **more: Any) -> Rendered:
    return WIRE.render(ModelRequest(messages, **more), model, stream=False)


def body(messages: Iterable[Any], model: str = OLD, **more: Any) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(rendered(messages, model, **more).body)
    return loaded


def unmarked(value: Any) -> Any:
    """Return a body without its cache breakpoints."""
    if isinstance(value, list):
        return [unmarked(item) for item in value]
    if isinstance(value, dict):
        return {key: unmarked(item) for key, item in value.items() if key != "cache_control"}
    return value


def turns(messages: Iterable[Any], **more: Any) -> list[Any]:
    return [(turn["role"], turn["content"]) for turn in unmarked(body(messages, **more)["messages"])]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(words: str) -> UserMessage:
    return UserMessage(content=words)


def calling(*ids: str) -> AssistantMessage:
    return AssistantMessage(tool_calls=tuple(ToolCall(id=id, name="f", arguments={}) for id in ids))


def result(id: str, words: Any = "r", **more: Any) -> ToolMessage:
    return ToolMessage(tool_call_id=id, name="f", content=words, **more)


# --- requests -------------------------------------------------------------------------------------------------------


def test_a_request_is_written() -> None:
    got = WIRE.render(
        ModelRequest(
            [SystemMessage(content="be kind"), user("hi")], tools=[TOOL], tool_choice="f", max_tokens=7, temperature=0.5
        ),
        OLD,
        stream=True,
    )
    assert (got.path, got.headers["anthropic-version"], got.notes) == ("v1/messages", "2023-06-01", ())
    assert json.loads(got.body) == {
        "model": OLD,
        "max_tokens": 7,
        "stream": True,
        "temperature": 0.5,
        "tool_choice": {"type": "tool", "name": "f"},
        "tools": [
            {
                "name": "f",
                "description": "does f",
                "input_schema": {"type": "object", "properties": {}},
                "cache_control": MARK,
            }
        ],
        "system": [{**text("be kind"), "cache_control": MARK}],
        "messages": [{"role": "user", "content": [{**text("hi"), "cache_control": MARK}]}],
    }


def test_the_key_goes_into_one_header_only() -> None:
    assert WIRE.authorize("k") == {"x-api-key": "k", "anthropic-version": "2023-06-01"}
    assert "k" not in rendered([user("hi")]).headers.values()
    assert (WIRE.default_base_url, WIRE.models_path) == ("https://api.anthropic.com", "v1/models")


@pytest.mark.parametrize(
    ("choice", "expected"), [("auto", None), ("none", {"type": "none"}), ("required", {"type": "any"})]
)
def test_tool_choices(choice: str, expected: Any) -> None:
    assert body([user("hi")], tools=[TOOL], tool_choice=choice).get("tool_choice") == expected


def test_a_model_that_cannot_be_forced_is_left_to_choose() -> None:
    got = rendered([user("hi")], NEWEST, tools=[TOOL], tool_choice="f")
    assert "tool_choice" not in json.loads(got.body)
    assert "left to choose" in got.notes[0]


def test_results_are_one_turn_and_stand_before_other_content() -> None:
    got = turns([user("q"), calling("a", "b"), user("wait"), result("b", "x", is_error=True), result("a")])
    assert got[1:] == [
        (
            "assistant",
            [
                {"type": "tool_use", "id": "a", "name": "f", "input": {}},
                {"type": "tool_use", "id": "b", "name": "f", "input": {}},
            ],
        ),
        (
            "user",
            [
                {"type": "tool_result", "tool_use_id": "a", "content": [text("r")]},
                {"type": "tool_result", "tool_use_id": "b", "content": [text("x")], "is_error": True},
                text("wait"),
            ],
        ),
    ]


def test_images_go_where_the_wire_takes_them() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "aGk="}
    image = {"type": "image", "source": source}
    linked = {"type": "image", "source": {"type": "url", "url": "https://e.org/i.png"}}
    messages = [
        UserMessage(content=(TextPart(text="see"), IMAGE, ImagePart(url="https://e.org/i.png"))),
        calling("a", "b"),
        result("a", (ImagePart(url="data:image/jpg;base64,aGk="),)),
        result("b", (TextPart(text="no"), IMAGE), is_error=True),
        UserMessage(content=(ImagePart(data="aGk=", media_type="image/bmp"),)),
    ]
    (_, first), _, (_, last) = turns(messages)
    assert first == [text("see"), image, linked]
    assert last[0]["content"] == [{"type": "image", "source": {**source, "media_type": "image/jpeg"}}]
    assert last[1]["content"] == [text("no")]
    assert last[2:] == [image, text("[an image was left out]")]
    assert [note.split(":")[0] for note in rendered(messages).notes] == [
        "images of failed tool calls were sent after their results",
        "images of type image/bmp were left out",
    ]


def test_broken_arguments_go_back_wrapped() -> None:
    broken = ToolCall(id="1", name="f", arguments=None, raw="{oops", error="no")
    no_number = ToolCall(id="2", name="f", arguments={"x": float("nan")})
    got = turns([user("q"), AssistantMessage(tool_calls=(broken, no_number)), result("1"), result("2")])
    assert [block["input"] for block in got[1][1]] == [{"_invalid_json": "{oops"}, {"_invalid_json": '{"x": NaN}'}]


def test_a_long_conversation_renders_only_its_new_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[Message] = [user("q")]
    for number in range(50):
        messages += [calling(f"c{number}"), result(f"c{number}")]
    before = rendered(messages, tools=[TOOL]).body
    dumped: list[Any] = []
    dumps = json.dumps

    def spy(value: Any, **more: Any) -> str:
        dumped.append(value)
        return dumps(value, **more)

    monkeypatch.setattr(json, "dumps", spy)
    after = rendered([*messages, calling("new"), result("new")], tools=[TOOL]).body
    kinds = [value.get("type") or value["model"] for value in dumped if value]
    assert sorted(kinds) == [OLD, "tool_result", "tool_use"]
    mark = b',"cache_control":{"type":"ephemeral"}'
    assert after.replace(mark, b"").startswith(before.replace(mark, b"").removesuffix(b"]}"))


# --- the rules of a conversation ------------------------------------------------------------------------------------


def test_a_conversation_of_another_wire_is_made_valid() -> None:
    got = rendered(
        [
            AssistantMessage(content="hello", tool_calls=(ToolCall(id="call|1:x", name="a.b", arguments={}),)),
            result("call|1:x"),
            result("gone", "late"),
            calling("call|1:x"),
            SystemMessage(content="hurry"),
            AssistantMessage(content="done"),
            AssistantMessage(content="  "),
        ]
    )
    loaded = unmarked(json.loads(got.body))
    assert [turn["role"] for turn in loaded["messages"]] == ["user", "assistant"] * 3 + ["user"]
    begin, first, answers, again, missing, done, end = [turn["content"] for turn in loaded["messages"]]
    assert begin == [text("(The conversation begins with an answer.)")]
    assert first[1] == {"type": "tool_use", "id": "call_1_x", "name": "a_b", "input": {}}
    assert answers[0]["tool_use_id"] == "call_1_x"
    assert answers[1:] == [text("The result of f (call gone), whose call is not shown:\nlate")]
    assert again[0]["id"] == "call_1_x_2"
    assert (missing[0]["tool_use_id"], missing[0]["is_error"]) == ("call_1_x_2", True)
    assert missing[1] == text("<system>\nhurry\n</system>")
    assert (done, end) == ([text("done")], [text("Continue.")])
    assert [tool["name"] for tool in loaded["tools"]] == ["a_b", "f"]
    assert loaded["tool_choice"] == {"type": "none"}
    assert len(got.notes) == 5


@pytest.mark.parametrize("id", ["marks", "images", "notes", "late", "missing"])
def test_an_id_is_never_taken_for_another_rendering(id: str) -> None:
    failed = result(id, (TextPart(text="no"), IMAGE), is_error=True)
    call = AssistantMessage(content=(TextPart(text="x"),), tool_calls=calling(id).tool_calls)
    alone = turns([user("q"), failed])
    check(body([user("q"), call, failed]))
    check(body([user("q"), call, failed]))
    assert turns([user("q"), failed]) == alone


def test_what_is_put_in_stays_in() -> None:
    talk: list[Message] = [user("q"), AssistantMessage(content="a")]
    assert turns([*talk, AssistantMessage(content="b")])[:3] == turns(talk)


def test_an_empty_conversation_is_begun() -> None:
    assert turns([SystemMessage(content="do it")]) == [("user", [text("Begin.")])]


def test_a_refusal_goes_back_as_text() -> None:
    got = turns([user("q"), AssistantMessage(refusal="I won't"), user("why")])
    assert got[1] == ("assistant", [text("I won't")])


def check(request: dict[str, Any]) -> None:
    """Refuse what the provider refuses, as its documentation and its errors say."""
    roles = [turn["role"] for turn in request["messages"]]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    used: set[str] = set()
    awaited: list[str] = []
    for turn in request["messages"]:
        assert turn["content"]
        kinds = [block["type"] for block in turn["content"]]
        results = [block["tool_use_id"] for block in turn["content"] if block["type"] == "tool_result"]
        assert sorted(results) == sorted(awaited)
        assert all(kind == "tool_result" for kind in kinds[: len(results)])
        awaited = [block["id"] for block in turn["content"] if block["type"] == "tool_use"]
        assert all(re.fullmatch("[a-zA-Z0-9_-]+", id) for id in awaited)
        assert len(used) + len(awaited) == len(used := used | set(awaited))
        assert all(block["text"].strip() for block in turn["content"] if block["type"] == "text")
        assert all(block.get("content", True) for block in turn["content"])
    assert "tools" in request or not used
    assert json.dumps(request).count('"cache_control"') <= 4


def any_message(rng: random.Random) -> Message:
    content = rng.choice(["", " ", "text", (IMAGE, TextPart(text="")), (TextPart(text="t"),)])
    ids = [rng.choice(["", "a", "a_2", "a|2", "b"]) for _ in range(rng.randrange(3))]
    thought = ReasoningPart(provider=rng.choice("pq"), data={"type": "thinking", "thinking": "t", "signature": "s"})
    foreign = ReasoningPart(provider="p", data={"reasoning_content": "of another wire with the same name"})
    item = ProviderPart(provider="q", kind="web_search", data={"type": "web_search"})
    parts = tuple(rng.sample([thought, foreign, item, IMAGE, TextPart(text="x"), TextPart(text=" ")], 3))
    calls = tuple(ToolCall(id=id, name=rng.choice(["f", "", "g h"]), arguments=None, raw="{") for id in ids)
    choices: list[Message] = [
        UserMessage(content=content),
        SystemMessage(content=content),
        AssistantMessage(content=rng.choice([content, parts]), tool_calls=calls),
        ToolMessage(content=content, tool_call_id=rng.choice(["", "a", "b"]), is_error=rng.random() < 0.5),
    ]
    return rng.choice(choices)


def test_any_conversation_is_valid_and_its_beginning_never_changes() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        messages = [any_message(rng) for _ in range(rng.randrange(12))]
        tools = [TOOL] if rng.random() < 0.5 else []
        whole = body(messages, tools=tools)
        check(whole)
        for turn in range(1, len(messages)):
            if isinstance(messages[turn], AssistantMessage) and whole["messages"]:
                early = unmarked(body(messages[:turn], tools=tools)["messages"])
                common = [a == b for a, b in zip(early, unmarked(whole["messages"]), strict=False)]
                assert all(common[:-1])


# --- the prompt cache -----------------------------------------------------------------------------------------------


def marks(loaded: dict[str, Any]) -> list[int]:
    return [n for n, turn in enumerate(loaded["messages"]) if any("cache_control" in b for b in turn["content"])]


def test_breakpoints_are_at_the_ends_and_where_the_last_request_ended() -> None:
    talk: list[Message] = [SystemMessage(content="s"), user("q"), calling("a"), result("a")]
    loaded = body(talk, tools=[TOOL, ToolSpec(name="g")])
    assert ["cache_control" in tool for tool in loaded["tools"]] == [False, True]
    assert loaded["system"][-1]["cache_control"] == MARK
    assert marks(loaded) == [0, 2]
    after = body([*talk, calling("b"), result("b")], tools=[TOOL, ToolSpec(name="g")])
    assert marks(after) == [2, 4]
    assert after["messages"][2]["content"][-1]["cache_control"] == MARK


def test_a_single_question_pays_for_no_cache() -> None:
    assert marks(body([SystemMessage(content="s"), user("q")])) == []


# --- reasoning and sampling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "effort", "expected", "note"),
    [
        (OLD, None, (None, None, 8192), ""),
        (OLD, "none", (None, None, 8192), ""),
        (OLD, "minimal", ({"type": "enabled", "budget_tokens": 1024}, None, 9216), ""),
        (OLD, "xhigh", ({"type": "enabled", "budget_tokens": 23552}, None, 31744), ""),
        ("claude-3-5-haiku-20241022", "high", (None, None, 8192), "does not think"),
        ("claude-3-haiku-20240307", None, (None, None, 4096), ""),
        ("claude-opus-4-6", None, (None, None, 8192), ""),
        ("claude-opus-4-6", "medium", ({"type": "adaptive"}, "medium", 16384), ""),
        ("claude-opus-4-6", "xhigh", ({"type": "adaptive"}, "high", 31744), "'xhigh'"),
        ("claude-opus-4-7", "xhigh", ({"type": "adaptive", "display": "summarized"}, "xhigh", 31744), ""),
        ("claude-opus-4-7", None, (None, None, 8192), ""),
        ("claude-opus-5", None, ({"type": "adaptive", "display": "summarized"}, None, 24576), ""),
        ("claude-opus-5", "none", ({"type": "disabled"}, None, 8192), ""),
        ("claude-sonnet-5-5", "none", ({"type": "between_tools"}, None, 8192), ""),
        (NEWEST, "minimal", ({"type": "adaptive", "display": "summarized"}, "low", 9216), "'minimal'"),
        (NEWEST, "none", ({"type": "adaptive", "display": "summarized"}, "low", 10240), "cannot stop thinking"),
    ],
)
def test_reasoning_is_asked_for_as_the_model_takes_it(model: str, effort: Any, expected: Any, note: str) -> None:
    got = rendered([user("q")], model, reasoning=effort)
    loaded = json.loads(got.body)
    assert (loaded.get("thinking"), loaded.get("output_config", {}).get("effort"), loaded["max_tokens"]) == expected
    assert bool(got.notes) == bool(note)
    assert note in "".join(got.notes)


@pytest.mark.parametrize(
    ("max_tokens", "budget", "note"), [(100_000, 16384, ""), (4096, 2048, "lowered to 2048"), (2000, None, "no room")]
)
def test_a_budget_stays_below_the_cap(max_tokens: int, budget: int | None, note: str) -> None:
    got = rendered([user("q")], reasoning="high", max_tokens=max_tokens)
    loaded = json.loads(got.body)
    assert loaded["max_tokens"] == max_tokens
    assert loaded.get("thinking", {}).get("budget_tokens") == budget
    assert note in "".join(got.notes)


def test_a_budget_gives_way_to_what_it_cannot_be_combined_with() -> None:
    call = calling("a")
    amid: list[Message] = [user("q"), call, result("a")]
    thought = ReasoningPart(provider="p", data={"type": "thinking", "thinking": "t", "signature": "s"})
    own = AssistantMessage(content=(TextPart(text="\n"), thought), tool_calls=call.tool_calls)
    assert "thinking" not in body(amid, reasoning="low", tools=[TOOL])
    assert "thinking" in body([*amid, AssistantMessage(content="x"), user("y")], reasoning="low", tools=[TOOL])
    assert "thinking" in body([user("q"), own, result("a")], reasoning="low", tools=[TOOL])
    assert "thinking" not in body([user("q")], reasoning="low", tools=[TOOL], tool_choice="required")


@pytest.mark.parametrize(
    ("model", "temperature", "effort", "sent", "note"),
    [
        (OLD, 0.0, None, 0.0, ""),
        (OLD, 1.5, None, 1.0, "lowered"),
        (OLD, 0.5, "low", None, "while it thinks"),
        (OLD, 1.0, "low", None, ""),
        (NEWEST, 0.5, None, None, "takes none"),
    ],
)
def test_temperatures(model: str, temperature: float, effort: Any, sent: float | None, note: str) -> None:
    got = rendered([user("q")], model, temperature=temperature, reasoning=effort)
    assert json.loads(got.body).get("temperature") == sent
    assert bool(got.notes) == bool(note)
    assert note in "".join(got.notes)


@pytest.mark.parametrize(
    ("model", "thinking", "schema"),
    [
        ("claude-3-opus-20240229", "none", False),
        ("claude-3-7-sonnet-20250219", "budget", False),
        ("claude-sonnet-4-20250514", "budget", False),
        ("claude-opus-4-1-20250805", "budget", True),
        ("anthropic.claude-haiku-4-5-20251001-v1:0", "budget", True),
        ("anthropic/claude-opus-4.6", "adaptive", True),
        ("claude-mythos-preview", "adaptive", True),
        ("claude-some-7", "adaptive", True),
        ("glm-4.7", "budget", False),
    ],
)
def test_traits_are_read_off_the_name(model: str, thinking: str, schema: bool) -> None:
    traits = traits_of(model)
    assert (traits.thinking, traits.schema) == (thinking, schema)


# --- structured output ----------------------------------------------------------------------------------------------


def test_a_schema_is_closed_and_keeps_what_it_cannot_enforce_as_a_hint() -> None:
    schema = {
        "type": "object",
        "title": "Finding",
        "properties": {
            "name": {"type": "string", "minLength": 2, "description": "whose"},
            "day": {"type": "string", "format": "date"},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/Tag", "description": "x"}, "minItems": 1},
            "kind": {"oneOf": [{"const": "a"}, {"type": "null"}]},
        },
        "required": ["name"],
        "$defs": {"Tag": {"type": "object", "properties": {"t": {"type": "integer", "maximum": 9}}}},
    }
    loaded = body([user("q")], output_schema=schema)
    assert loaded["output_config"]["format"] == {
        "type": "json_schema",
        "schema": {
            "type": "object",
            "title": "Finding",
            "properties": {
                "name": {"type": "string", "description": "whose (minLength: 2)"},
                "day": {"type": "string", "format": "date"},
                "tags": {"type": "array", "items": {"$ref": "#/$defs/Tag"}, "minItems": 1},
                "kind": {"anyOf": [{"const": "a"}, {"type": "null"}]},
            },
            "required": ["name"],
            "$defs": {
                "Tag": {
                    "type": "object",
                    "properties": {"t": {"type": "integer", "description": "(maximum: 9)"}},
                    "additionalProperties": False,
                }
            },
            "additionalProperties": False,
        },
    }


def test_effort_and_schema_share_their_place() -> None:
    loaded = body([user("q")], NEWEST, output_schema={"type": "array", "items": {"type": "string"}}, reasoning="high")
    assert sorted(loaded["output_config"]) == ["effort", "format"]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"type": "object", "properties": {"any": {}}},
        {"$ref": "#/$defs/N", "$defs": {"N": {"type": "object", "properties": {"n": {"$ref": "#/$defs/N"}}}}},
        {"type": "array", "items": {"$ref": "#"}},
    ],
    ids=["free keys", "anything", "recursive", "reference to itself"],
)
def test_a_schema_that_would_change_its_meaning_is_asked_for_in_words(schema: dict[str, Any]) -> None:
    assert closed_schema(schema) is None
    got = rendered([user("q")], output_schema=schema)
    loaded = json.loads(got.body)
    assert "output_config" not in loaded
    assert json.dumps(schema) in loaded["system"][0]["text"]
    assert "output schema" in got.notes[0]


# --- answers --------------------------------------------------------------------------------------------------------


def whole(*blocks: dict[str, Any], reason: str = "end_turn", **more: Any) -> Answer:
    message = {"type": "message", "model": "m", "content": blocks, "stop_reason": reason, "usage": USAGE, **more}
    return WIRE.parse(json.dumps(message).encode(), "d")


def event(kind: str, **data: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


def start(index: int, **block: Any) -> bytes:
    return event("content_block_start", index=index, content_block=block)


def delta(index: int, kind: str, **piece: Any) -> bytes:
    return event("content_block_delta", index=index, delta={"type": kind, **piece})


def stop(index: int) -> bytes:
    return event("content_block_stop", index=index)


def end(reason: str | None, **more: Any) -> bytes:
    return event("message_delta", delta={"stop_reason": reason, **more}, usage={"output_tokens": 4})


BEGIN = event("message_start", message={"model": "m", "content": [], "usage": {**USAGE, "output_tokens": 1}})
STOP = event("message_stop")
HELLO = start(0, type="text", text="") + delta(0, "text_delta", text="hello") + stop(0)


def read(*pieces: bytes) -> Answer:
    stream = WIRE.stream("d")
    for piece in pieces:
        stream.feed(piece)
    return stream.close()


THINKING = {"type": "thinking", "thinking": "let me", "signature": "c2ln"}
BLOCKS: list[dict[str, Any]] = [
    text("\n\n"),
    THINKING,
    {"type": "redacted_thinking", "data": "eA=="},
    text("Hé"),
    {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}, "caller": {"type": "direct"}},
    text("now"),
    {**THINKING, "signature": "bmV4dA=="},
    {"type": "tool_use", "id": "b", "name": "g", "input": {}},
]
STREAMED = [
    BEGIN,
    event("ping"),
    start(0, type="text", text=""),
    delta(0, "text_delta", text="\n\n"),
    stop(0),
    start(1, type="thinking", thinking="", signature=""),
    delta(1, "thinking_delta", thinking="let "),
    event("unheard_of", index=1),
    delta(1, "thinking_delta", thinking="me"),
    delta(1, "signature_delta", signature="c2ln"),
    stop(1),
    start(2, **BLOCKS[2]) + stop(2),
    start(3, type="text", text=""),
    delta(3, "text_delta", text="H").replace(b"\n", b"\r\n"),
    delta(3, "text_delta", text="é").replace(b"\\u00e9", "é".encode()),
    stop(3),
    start(4, type="tool_use", id="a", name="f", input={}, caller={"type": "direct"}),
    delta(4, "input_json_delta", partial_json=""),
    delta(4, "input_json_delta", partial_json='{"x"'),
    delta(4, "input_json_delta", partial_json=": 1}"),
    stop(4),
    start(5, type="text", text="now"),
    stop(5),
    start(6, type="thinking", thinking="", signature=""),
    delta(6, "thinking_delta", thinking="let me"),
    delta(6, "signature_delta", signature="bmV4dA=="),
    stop(6),
    start(7, type="tool_use", id="b", name="g", input={}),
    stop(7),
    end("tool_use"),
    STOP,
]


def test_an_answer_is_the_same_streamed_whole_and_however_it_is_split() -> None:
    expected = whole(*BLOCKS, reason="tool_use")
    raw = b"".join(STREAMED)
    assert expected.message.text == "\n\nHénow"
    assert [(call.id, call.arguments) for call in expected.message.tool_calls] == [("a", {"x": 1}), ("b", {})]
    assert (expected.finish, expected.model, expected.notes) == ("tool_calls", "m", ())
    assert read(raw) == expected
    assert read(*(bytes([byte]) for byte in raw)) == expected
    for seed in range(30):
        cuts = sorted(random.Random(seed).sample(range(1, len(raw)), 25))
        assert read(*(raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True))) == expected


def test_a_stream_that_is_cut_anywhere_is_no_answer() -> None:
    raw = b"".join(STREAMED)
    assert whole_before(WIRE, raw, raw.rindex(b"}"), step=3) == []


def test_an_answer_goes_back_as_it_came() -> None:
    answer = whole(*BLOCKS, reason="tool_use").message
    kept = AssistantMessage.model_validate_json(answer.model_dump_json())
    assert turns([user("q"), kept, result("a"), result("b")])[1][1] == BLOCKS[1:]  # without the blank text


def test_text_behind_a_call_stays_behind_it() -> None:
    use = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    answer = whole(use, text("done?"), reason="tool_use").message
    assert answer.content == (TextPart(text="done?", after_calls=1),)
    assert turns([user("q"), answer, result("a")])[1][1] == [use, text("done?")]


def test_reasoning_of_another_provider_is_left_out() -> None:
    answer = whole(*BLOCKS, reason="tool_use").message
    other = AnthropicMessages("other").render(ModelRequest([user("q"), answer]), OLD, stream=False)
    assert b"c2ln" not in other.body
    assert b"caller" not in other.body
    assert other.notes[0] == "reasoning of p was left out: only that provider can read it"


def test_bound_thoughts_may_be_dropped() -> None:
    answer = whole(THINKING, text("x")).message
    got = rendered([user("q"), answer, user("r")], NEWEST)
    assert json.loads(got.body)["thinking"]["block_binding"] == {"prefix_mismatch_behavior": "drop_block"}
    assert got.headers["anthropic-beta"] == "thinking-binding-controls-2026-08-01"
    assert "anthropic-beta" not in rendered([user("q"), answer, user("r")], "claude-opus-5").headers


def test_items_of_the_providers_own_tools_are_kept() -> None:
    use = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "x"}}
    found = {"type": "web_search_result", "title": "T", "url": "https://e.org"}
    got = {"type": "web_search_tool_result", "tool_use_id": "s", "content": [found]}
    citation = {"type": "web_search_result_location", "cited_text": "t"}
    cited = {**text("so"), "citations": [citation]}
    answer = whole(text("look"), use, got, cited).message
    streamed = read(
        BEGIN,
        start(0, **text("look")) + stop(0),
        start(1, **{**use, "input": {}}),
        delta(1, "input_json_delta", partial_json='{"query": "x"}') + stop(1),
        start(2, **got) + stop(2),
        start(3, type="text", text="", citations=[]),
        delta(3, "text_delta", text="so"),
        delta(3, "citations_delta", citation=citation) + stop(3),
        end("end_turn"),
        STOP,
    ).message
    assert streamed == answer
    assert answer.text == "lookso"
    items = [part.text for part in answer.content if isinstance(part, ProviderPart)]
    assert items == ['web_search({"query": "x"})', "T\nhttps://e.org", ""]
    assert turns([user("q"), answer, user("r")])[1][1] == [text("look"), use, got, cited]
    foreign = AnthropicMessages("other").render(ModelRequest([user("q"), answer]), OLD, stream=False)
    assert [note.split()[0] for note in foreign.notes] == ["server_tool_use", "web_search_tool_result", "'Continue.'"]


def test_a_paused_turn_is_sent_again_as_it_is() -> None:
    use = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    answer = whole(use, reason="pause_turn")
    assert (answer.finish, len(answer.notes)) == ("other", 1)
    assert [role for role, _ in turns([user("q"), answer.message])] == ["user", "assistant"]
    assert turns([user("q"), answer.message, AssistantMessage(content="x")])[1][1] == [use, text("x")]


def test_usage_counts_the_cache() -> None:
    expected = Usage(input_tokens=330, output_tokens=4, cached_tokens=300, cache_write_tokens=20, reasoning_tokens=3)
    assert whole(text("x")).usage == expected
    assert read(BEGIN, HELLO, end("end_turn"), STOP).usage == expected
    assert whole(text("x"), usage=None).usage is None


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("because", "other"),
    ],
)
def test_finish_reasons(reason: str, expected: str) -> None:
    for answer in (whole(text("hello"), reason=reason), read(BEGIN, HELLO, end(reason), STOP)):
        assert (answer.finish, answer.message.text) == (expected, "hello")
        assert bool(answer.notes) == (expected == "other")


def test_a_refusal() -> None:
    details = {"type": "refusal", "category": "cyber", "explanation": "not this"}
    for answer in (
        whole(reason="refusal", stop_details=details),
        read(BEGIN, end("refusal", stop_details=details), STOP),
    ):
        assert (answer.finish, answer.message.refusal, answer.message.text) == ("refusal", "not this", "")
    assert whole(reason="refusal").message.refusal == "The model declined to answer."
    assert whole(text("No."), reason="refusal").message.refusal == "No."


def test_arguments_that_are_not_json_are_kept() -> None:
    call = start(0, type="tool_use", id="a", name="f", input={})
    cut = read(BEGIN, call, delta(0, "input_json_delta", partial_json='{"x": oo'), end("max_tokens"), STOP)
    assert (cut.message.tool_calls[0].raw, cut.finish) == ('{"x": oo', "length")
    assert "not JSON" in str(cut.message.tool_calls[0].error)
    listed = whole({"type": "tool_use", "id": "a", "name": "f", "input": [1]}, reason="tool_use")
    assert listed.message.tool_calls[0].arguments is None


def test_what_became_of_earlier_thoughts_is_told() -> None:
    changes = [{"path": "messages.1.content.0", "reason": "prefix_binding_mismatch"}] * 2
    assert len(whole(text("x"), input_transformations=changes).notes) == 1


# --- streams --------------------------------------------------------------------------------------------------------


def test_only_output_is_progress_and_only_the_end_is_the_end() -> None:
    stream = WIRE.stream("d")
    seen: list[tuple[int, bool, bool]] = []
    for piece in (
        BEGIN,
        event("ping"),
        start(0, type="text", text=""),
        delta(0, "text_delta", text="x"),
        stop(0),
        start(1, type="tool_use", id="a", name="f", input={}),
        delta(1, "input_json_delta", partial_json=""),
        delta(1, "input_json_delta", partial_json="{}"),
        end(None),
        end("tool_use"),
        STOP,
    ):
        stream.feed(piece)
        seen.append((stream.progress, stream.finished, stream.done))
    assert [progress for progress, _, _ in seen] == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert [finished for _, finished, _ in seen].index(True) == 9
    assert [done for _, _, done in seen].index(True) == 10


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [BEGIN],
        [BEGIN, HELLO],
        [BEGIN, HELLO, end("end_turn")],
        [BEGIN, HELLO, STOP],
        [BEGIN, HELLO, b'data: {"type": "content_bl\n\n'],
        [BEGIN, HELLO, b"data: 5\n\n"],
        [BEGIN, delta(3, "text_delta", text="of no block")],
        [BEGIN, event("content_block_delta", index=0)],
        [BEGIN, start(0, type="tool_use", name="f"), end("tool_use"), STOP],
        [b"<html><body>bad gateway</body></html>"],
    ],
    ids=[
        "empty",
        "begun",
        "cut",
        "without its terminal event",
        "without a reason",
        "malformed",
        "no object",
        "delta of no block",
        "no delta",
        "call without id",
        "page",
    ],
)
def test_broken_streams(pieces: list[bytes]) -> None:
    with pytest.raises(StreamBroken):
        read(*pieces)


def test_a_stream_may_lack_its_last_blank_line() -> None:
    assert read(BEGIN, HELLO, end("end_turn"), STOP.rstrip(b"\n")).message.text == "hello"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"type": "overloaded_error", "message": "Overloaded"}, errors.Overloaded),
        ({"type": "rate_limit_error", "message": "slow"}, errors.RateLimited),
        ({"type": "api_error", "message": "oops"}, errors.ServerError),
        ({"type": "authentication_error", "message": "key"}, errors.Auth),
        ({"type": "billing_error", "message": "pay"}, errors.QuotaExhausted),
        ({"type": "invalid_request_error", "message": "no"}, errors.InvalidRequest),
    ],
)
def test_an_error_has_the_class_of_its_type(error: dict[str, str], kind: type[ModelError]) -> None:
    with pytest.raises(ModelError) as caught:
        read(BEGIN, HELLO, event("error", error=error))
    assert type(caught.value) is kind
    with pytest.raises(ModelError) as caught:
        WIRE.parse(json.dumps({"type": "error", "error": error}).encode(), "d")
    assert type(caught.value) is kind


def test_the_table_can_be_extended() -> None:
    mine = Rule(errors.Overloaded, names=frozenset({"api_error"}))
    stream = AnthropicMessages("p", table=(mine, *TABLE)).stream("d")
    with pytest.raises(errors.Overloaded):
        stream.feed(event("error", error={"type": "api_error"}))


@pytest.mark.parametrize(
    "raw",
    [
        b"<html>bad gateway</html>",
        b'{"content": [{"ty',
        b"{}",
        b"[]",
        b"5",
        b'{"type": "message", "content": null}',
        b'{"type": "message", "content": "text"}',
        b'{"type": "message", "content": [], "usage": 5}',
    ],
)
def test_what_is_no_answer_is_the_servers_error(raw: bytes) -> None:
    with pytest.raises(ServerError):
        WIRE.parse(raw, "d")


# --- between wires --------------------------------------------------------------------------------------------------


def test_a_run_moves_between_wires_and_back() -> None:
    chat = OpenAIChat("p")  # the same name: what it thought is still not readable here
    message = {
        "content": "ok",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "call.1", "function": {"name": "f", "arguments": "{"}}],
    }
    theirs = chat.parse(json.dumps({"choices": [{"message": message, "finish_reason": "tool_calls"}]}).encode(), "d")
    ours = whole(THINKING, text("yes"), {"type": "tool_use", "id": "a", "name": "f", "input": {}}, reason="tool_use")
    talk: list[Message] = [user("q"), theirs.message, result("call.1"), ours.message, result("a"), user("and?")]
    loaded = body(talk, tools=[TOOL])
    check(loaded)
    assert loaded["messages"][1]["content"] == [
        text("ok"),
        {"type": "tool_use", "id": "call_1", "name": "f", "input": {"_invalid_json": "{"}},
    ]
    assert loaded["messages"][3]["content"][0] == THINKING
    assert [item["role"] for item in json.loads(chat.render(ModelRequest(talk), "m", stream=False).body)["messages"]]
