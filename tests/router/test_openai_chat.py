"""The Chat Completions wire, byte by byte, and its dialects."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from tests.router.kits import whole_before

from ridethrough.runtime.errors import ConfigError, ModelError, ServerError, StreamBroken
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
    UserMessage,
)
from ridethrough.runtime.router.providers.openai_chat import DIALECTS, OpenAIChat, Quirks, quirks_of
from ridethrough.runtime.router.providers.sse import EventParser
from ridethrough.runtime.router.providers.wire import Answer

WIRE = OpenAIChat("p")


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: " + json.dumps({"id": "c", "choices": choices, **more}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 3}}


def read(*pieces: bytes) -> Answer:
    stream = WIRE.stream("d")
    for piece in pieces:
        stream.feed(piece)
    return stream.close()


def call(index: int | None, arguments: str, **more: Any) -> dict[str, Any]:
    function = {"arguments": arguments, **({"name": more.pop("name")} if "name" in more else {})}
    return {"tool_calls": [{**({} if index is None else {"index": index}), **more, "function": function}]}


# --- requests -------------------------------------------------------------------------------------------------------


def test_a_request_is_written() -> None:
    schema = {
        "title": "Finding",
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    request = ModelRequest(
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "tool_calls": [{"id": "1", "name": "f", "arguments": None, "raw": "{oops"}]},
            {"role": "tool", "tool_call_id": "1", "content": "no"},
        ],
        tools=[ToolSpec(name="f", description="does f")],
        tool_choice="f",
        output_schema=schema,
        max_tokens=7,
        temperature=0.5,
        reasoning="low",
    )
    body = json.loads(WIRE.render(request, "m", stream=True).body)
    assert body["messages"][0] == {"role": "user", "content": "hi"}
    assert json.loads(body["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"_invalid_json": "{oops"}
    assert body["tools"][0]["function"]["name"] == "f"
    assert body["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert body["response_format"]["json_schema"] == {"name": "Finding", "schema": schema, "strict": True}
    assert (body["max_tokens"], body["temperature"], body["reasoning_effort"]) == (7, 0.5, "low")
    assert body["stream_options"] == {"include_usage": True}


def test_quirks_are_data() -> None:
    assert quirks_of("https://api.openai.com/v1").max_tokens_key == "max_completion_tokens"
    assert quirks_of("http://127.0.0.1:8000/v1") == Quirks()
    request = ModelRequest([{"role": "user", "content": "hi"}], max_tokens=7)
    wire = OpenAIChat("p", quirks=Quirks(max_tokens_key="max_completion_tokens", stream_options=False))
    body = json.loads(wire.render(request, "m", stream=True).body)
    assert body["max_completion_tokens"] == 7
    assert "stream_options" not in body


def test_a_tools_error_says_so_and_a_refusal_is_text_where_it_has_no_field() -> None:
    talk: list[Message] = [
        AssistantMessage(content="", tool_calls=(ToolCall(id="1", name="f"), ToolCall(id="2", name="f"))),
        ToolMessage(content="no such file", tool_call_id="1", is_error=True),
        ToolMessage(content="Error: gone", tool_call_id="2", is_error=True),
        AssistantMessage(refusal="I won't"),
    ]
    body = json.loads(WIRE.render(ModelRequest(talk), "m", stream=False).body)
    assert [message["content"] for message in body["messages"][1:]] == ["Error: no such file", "Error: gone", "I won't"]
    assert "refusal" not in body["messages"][3]
    openai = json.loads(dialect("openai").render(ModelRequest(talk), "m", stream=False).body)
    assert openai["messages"][3]["refusal"] == "I won't"


def test_images_of_tools_follow_all_results_of_the_turn() -> None:
    seen = (TextPart(text="seen"), ImagePart(data="aW1n", media_type="image/jpeg"))
    talk: list[Message] = [
        AssistantMessage(tool_calls=(ToolCall(id="1", name="look"), ToolCall(id="2", name="look"))),
        ToolMessage(content=seen, tool_call_id="1", name="look"),
        ToolMessage(content="nothing", tool_call_id="2", name="look"),
        UserMessage(content="well?"),
    ]
    rendered = WIRE.render(ModelRequest(talk), "m", stream=False)
    messages = json.loads(rendered.body)["messages"]
    assert [message["role"] for message in messages] == ["assistant", "tool", "tool", "user", "user"]
    assert messages[1]["content"] == "seen\n[an image follows the tool results]"
    assert messages[3]["content"] == [
        {"type": "text", "text": "From the result of tool look (call 1):"},
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,aW1n"}},
    ]
    assert rendered.notes == ("images in tool results follow them in a user's message: this wire takes text there",)


# --- dialects -------------------------------------------------------------------------------------------------------


def dialect(name: str) -> OpenAIChat:
    return OpenAIChat("p", quirks=DIALECTS[name])


def written(name: str, model: str = "m", **settings: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the body that a dialect writes of a request, and its notes."""
    talk = settings.pop("talk", [UserMessage(content="hi")])
    stream = settings.pop("stream", False)
    rendered = dialect(name).render(ModelRequest(talk, **settings), model, stream=stream)
    return json.loads(rendered.body), rendered.notes


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://api.openai.com/v1", "openai"),
        ("https://mine.openai.azure.com/openai/v1", "azure"),
        ("https://api.groq.com/openai/v1", "groq"),
        ("https://api.mistral.ai/v1", "mistral"),
        ("https://openrouter.ai/api/v1", "openrouter"),
        ("https://api.deepseek.com", "deepseek"),
        ("https://api.x.ai/v1", "xai"),
        ("https://api.together.xyz/v1", "together"),
        ("https://api.cerebras.ai/v1", "cerebras"),
        ("http://localhost:11434/v1", "ollama"),
        ("https://example.com/api.openai.com", ""),
        ("https://notopenrouter.ai/v1", ""),
    ],
)
def test_a_dialect_is_known_by_its_host(url: str, name: str) -> None:
    assert quirks_of(url).name == name


def test_a_dialect_can_be_named() -> None:
    assert quirks_of("http://10.0.0.7:8000/v1", "vllm") == DIALECTS["vllm"]
    assert quirks_of("https://api.openai.com/v1", "llama.cpp").name == "llama.cpp"
    with pytest.raises(ConfigError, match=r"no dialect 'vlm'; did you mean 'vllm'\?"):
        quirks_of("http://10.0.0.7:8000/v1", "vlm")
    assert all(quirks.name == name for name, quirks in DIALECTS.items())


def test_azure_takes_the_key_in_a_header_of_its_own() -> None:
    assert dialect("azure").authorize("k") == {"api-key": "k"}
    assert dialect("openai").authorize("k") == {"authorization": "Bearer k"}


AZURE = "https://mine.openai.azure.com/openai"


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        (f"{AZURE}/v1", {"max_completion_tokens", "stream_options", "reasoning_effort"}),
        (f"{AZURE}/v1?api-version=preview", {"max_completion_tokens", "stream_options", "reasoning_effort"}),
        (f"{AZURE}/deployments/mine?api-version=2024-02-01", {"max_tokens"}),
        (f"{AZURE}/deployments/mine?api-version=2024-10-21", {"max_completion_tokens", "stream_options"}),
        (
            f"{AZURE}/deployments/mine?api-version=2025-04-01-preview",
            {"max_completion_tokens", "stream_options", "reasoning_effort"},
        ),
    ],
)
@pytest.mark.parametrize("name", [None, "azure"])
def test_azure_is_asked_only_what_its_version_knows(url: str, asked: set[str], name: str | None) -> None:
    wire = OpenAIChat("p", quirks=quirks_of(url, name))
    request = ModelRequest([UserMessage(content="hi")], max_tokens=7, reasoning="low")
    rendered = wire.render(request, "gpt-5.2", stream=True)
    assert rendered.path == "chat/completions"
    assert json.loads(rendered.body).keys() == {"model", "stream", "messages", *asked}
    assert bool(rendered.notes) is ("reasoning_effort" not in asked)
    assert wire.authorize("k") == {"api-key": "k"}


@pytest.mark.parametrize(
    ("name", "model", "asked", "fields"),
    [
        ("openai", "gpt-5.2", "xhigh", {"reasoning_effort": "xhigh"}),
        ("openai", "gpt-5.2", "minimal", {"reasoning_effort": "low"}),
        ("openai", "gpt-5-mini", "none", {"reasoning_effort": "minimal"}),
        ("openai", "o4-mini", "xhigh", {"reasoning_effort": "high"}),
        ("openai", "gpt-4o", "high", {}),
        ("openrouter", "m", "medium", {"reasoning": {"effort": "medium"}}),
        ("deepseek", "m", "none", {"thinking": {"type": "disabled"}}),
        ("deepseek", "m", "medium", {"thinking": {"type": "enabled"}, "reasoning_effort": "high"}),
        ("groq", "openai/gpt-oss-120b", "minimal", {"reasoning_effort": "low"}),
        ("groq", "qwen/qwen3-32b", "none", {"reasoning_effort": "none"}),
        ("groq", "llama-3.3-70b-versatile", "high", {}),
        ("mistral", "mistral-small-latest", "low", {"reasoning_effort": "high"}),
        ("mistral", "mistral-large-latest", "low", {}),
        ("vllm", "m", "none", {"chat_template_kwargs": {"enable_thinking": False}}),
        ("vllm", "m", "xhigh", {"reasoning_effort": "high"}),
        ("llama.cpp", "m", "low", {"chat_template_kwargs": {"reasoning_effort": "low"}}),
        ("ollama", "m", "none", {"reasoning_effort": "none"}),
        ("xai", "grok-4", "high", {}),
        ("xai", "grok-3-mini", "medium", {"reasoning_effort": "high"}),
        ("together", "m", "none", {"reasoning": {"enabled": False}}),
        ("cerebras", "m", "medium", {"reasoning_effort": "medium"}),
        ("zai", "glm-4.7", "low", {"thinking": {"type": "enabled"}}),
    ],
)
def test_efforts_in_every_dialect(name: str, model: str, asked: str, fields: dict[str, Any]) -> None:
    body, notes = written(name, model, reasoning=asked)
    keys = ("reasoning_effort", "reasoning", "thinking", "chat_template_kwargs")
    assert {key: body[key] for key in keys if key in body} == fields
    exact = f'"{asked}"' in json.dumps(fields) or (asked == "none" and fields and "minimal" not in str(fields))
    assert bool(notes) != bool(exact)


@pytest.mark.parametrize(
    ("model", "effort", "kept"),
    [
        ("gpt-5", None, False),
        ("gpt-5.2", None, True),
        ("gpt-5.2", "high", False),
        ("o3", None, False),
        ("gpt-4o", None, True),
    ],
)
def test_a_temperature_only_where_the_model_takes_one(model: str, effort: str | None, kept: bool) -> None:
    body, notes = written("openai", model, temperature=0.5, reasoning=effort)
    assert ("temperature" in body) is kept
    assert any("temperature" in note for note in notes) is not kept


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("name", "model", "more", "kind"),
    [
        ("openai", "gpt-5.2", {}, "json_schema"),
        ("vllm", "m", {"tools": [ToolSpec(name="f")]}, "json_schema"),
        ("deepseek", "m", {}, "json_object"),
        ("groq", "openai/gpt-oss-20b", {}, "json_schema"),
        ("groq", "openai/gpt-oss-20b", {"stream": True}, None),
        ("groq", "openai/gpt-oss-20b", {"tools": [ToolSpec(name="f")]}, None),
        ("groq", "llama-3.3-70b-versatile", {}, "json_object"),
    ],
)
def test_structured_output_in_the_way_that_the_server_has(
    name: str, model: str, more: dict[str, Any], kind: str | None
) -> None:
    talk = [SystemMessage(content="be brief"), UserMessage(content="hi")]
    body, notes = written(name, model, talk=talk, output_schema=SCHEMA, **more)
    assert (body.get("response_format") or {}).get("type") == kind
    in_words = json.dumps(SCHEMA) in body["messages"][0]["content"]
    assert in_words is (kind != "json_schema")
    assert bool(notes) is in_words
    assert body["messages"][0]["content"].startswith("be brief")
    assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_the_schema_in_words_comes_first_where_there_are_no_instructions() -> None:
    body, _ = written("deepseek", output_schema=SCHEMA)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_strict_decoding_only_of_schemas_that_allow_it() -> None:
    loose = {**SCHEMA, "required": []}
    for schema, model, strict in ((SCHEMA, "gpt-5.2", True), (loose, "gpt-5.2", False)):
        body, _ = written("openai", model, output_schema=schema)
        assert body["response_format"]["json_schema"]["strict"] is strict
    body, _ = written("groq", "meta-llama/llama-4-scout", output_schema=SCHEMA)
    assert body["response_format"]["json_schema"]["strict"] is False


def test_a_tool_that_cannot_be_demanded_by_name_is_the_only_one() -> None:
    tools = [ToolSpec(name="f"), ToolSpec(name="g")]
    body, _ = written("llama.cpp", tools=tools, tool_choice="g")
    assert body["tool_choice"] == "required"
    assert [tool["function"]["name"] for tool in body["tools"]] == ["g"]
    body, _ = written("llama.cpp", tools=tools, tool_choice="required")
    assert len(body["tools"]) == 2


CALLED: list[Message] = [
    UserMessage(content="hi"),
    AssistantMessage(
        content=(ReasoningPart(text="hm", provider="p", data={"reasoning_content": "hm"}), TextPart(text="I look")),
        tool_calls=(ToolCall(id="toolu_0123456789", name="f"), ToolCall(id="AbCdEf123", name="f")),
    ),
    ToolMessage(content="1", tool_call_id="toolu_0123456789"),
    ToolMessage(content="2", tool_call_id="AbCdEf123"),
    UserMessage(content="go on"),
]


def test_mistral_gets_ids_of_nine_characters_and_no_user_behind_a_tool() -> None:
    body, _ = written("mistral", talk=CALLED)
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "user"]
    ids = [call["id"] for call in body["messages"][1]["tool_calls"]]
    assert all(re.fullmatch("[A-Za-z0-9]{9}", id) for id in ids)
    assert ids[1] == "AbCdEf123"
    assert [message["tool_call_id"] for message in body["messages"][2:4]] == ids
    assert set(body["messages"][1]) == {"role", "content", "tool_calls"}


def test_mistrals_thoughts_go_back_in_front_of_its_text() -> None:
    thinking = [{"type": "text", "text": "hm"}]
    content = [{"type": "thinking", "thinking": thinking}, {"type": "text", "text": "yes"}]
    whole = {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}
    answer = dialect("mistral").parse(json.dumps(whole).encode(), "d")
    body, _ = written("mistral", talk=[UserMessage(content="hi"), answer.message])
    assert body["messages"][1]["content"] == content


@pytest.mark.parametrize(
    ("name", "data", "calls", "back"),
    [
        ("deepseek", {"reasoning_content": "hm"}, True, {"reasoning_content": "hm"}),
        ("deepseek", {"reasoning_content": "hm"}, False, {}),
        ("deepseek", {}, True, {"reasoning_content": ""}),
        ("groq", {"reasoning": "hm"}, True, {"reasoning": "hm"}),
        ("groq", {"reasoning": "hm"}, False, {}),
        (
            "openrouter",
            {"reasoning": "hm", "reasoning_details": [{"type": "x"}]},
            False,
            {"reasoning_details": [{"type": "x"}]},
        ),
        ("openrouter", {"reasoning": "hm"}, False, {"reasoning": "hm"}),
        ("xai", {"reasoning_content": "hm"}, True, {}),
        ("vllm", {"reasoning": "hm"}, False, {"reasoning": "hm"}),
        ("vllm", {"encrypted_content": "of another wire"}, False, {}),
    ],
)
def test_reasoning_goes_back_as_the_server_wants_it(
    name: str, data: dict[str, Any], calls: bool, back: dict[str, Any]
) -> None:
    thought = (ReasoningPart(text="hm", provider="p", data=data), TextPart(text="yes"))
    asked = (ToolCall(id="1", name="f"),) if calls else ()
    body, _ = written(name, talk=[UserMessage(content="hi"), AssistantMessage(content=thought, tool_calls=asked)])
    message = body["messages"][1]
    assert {key: message[key] for key in message if key not in ("role", "content", "tool_calls")} == back


def test_two_models_of_one_provider_do_not_share_what_was_rendered() -> None:
    wire = dialect("openai")
    request = ModelRequest([SystemMessage(content="be brief"), UserMessage(content="hi")])
    roles = []
    for model in ("gpt-5.2", "o1-mini", "gpt-5.2"):
        roles.append(json.loads(wire.render(request, model, stream=False).body)["messages"][0]["role"])
    assert roles == ["system", "user", "system"]


def test_images_where_a_server_takes_none_or_only_inline() -> None:
    picture = (TextPart(text="see"), ImagePart(url="https://example.com/a.png"))
    body, notes = written("deepseek", talk=[UserMessage(content=picture)])
    assert body["messages"][0]["content"] == "see\n[an image was left out]"
    assert any("images were left out" in note for note in notes)
    body, notes = written("ollama", talk=[UserMessage(content=picture)])
    assert body["messages"][0]["content"][1] == {"type": "text", "text": "[an image was left out]"}
    body, notes = written("ollama", talk=[UserMessage(content=(ImagePart(data="aW1n"),))])
    assert body["messages"][0]["content"][0]["type"] == "image_url"
    assert notes == ()


def test_what_comes_with_a_call_goes_back_with_it() -> None:
    signed = {"google": {"thought_signature": "c2ln"}}
    answer = read(chunk(call(0, "{}", id="a", name="f", extra_content=signed)), chunk({}, "tool_calls"), DONE)
    assert answer.message.tool_calls[0].data == {"extra_content": signed}
    talk: list[Message] = [UserMessage(content="hi"), answer.message]
    own = json.loads(WIRE.render(ModelRequest(talk), "m", stream=False).body)
    assert own["messages"][1]["tool_calls"][0]["extra_content"] == signed
    other = OpenAIChat("q").render(ModelRequest(talk), "m", stream=False)
    assert b"extra_content" not in other.body


def test_what_a_server_did_itself_is_kept_and_goes_back_where_it_is_wanted() -> None:
    cited = [{"type": "url_citation", "url_citation": {"url": "https://example.com"}}]
    answer = read(chunk({"content": "see", "annotations": cited}), chunk({}, "stop"), DONE)
    kept = answer.message.content[0]
    assert kept == ProviderPart(kind="annotations", provider="p", data={"annotations": cited})
    talk: list[Message] = [UserMessage(content="hi"), answer.message]
    assert written("openrouter", talk=talk)[0]["messages"][1]["annotations"] == cited
    assert "annotations" not in written("openai", talk=talk)[0]["messages"][1]
    other = OpenAIChat("q").render(ModelRequest(talk), "m", stream=False)
    assert b"annotations" not in other.body
    assert other.notes == ()


def test_images_that_a_model_draws_are_kept() -> None:
    drawn = [{"type": "image_url", "image_url": {"url": "data:image/webp;base64,aW1n"}}]
    answer = read(chunk({"content": "here", "images": drawn}), chunk({}, "stop"), DONE)
    assert answer.message.content == (ImagePart(data="aW1n", media_type="image/webp"), TextPart(text="here"))


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 4, "prompt_cache_hit_tokens": 3}, (9, 4, 3, 0, 0)),
        ({"prompt_tokens": 9, "completion_tokens": 4, "num_cached_tokens": 3}, (9, 4, 3, 0, 0)),
        ({"prompt_tokens": 9, "completion_tokens": 4, "cached_tokens": 3}, (9, 4, 3, 0, 0)),
        (
            {
                "prompt_tokens": 9,
                "completion_tokens": 4,
                "prompt_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 5},
                "completion_tokens_details": {"reasoning_tokens": 1},
                "total_tokens": 13,
            },
            (9, 4, 2, 5, 1),
        ),
        (
            {
                "prompt_tokens": 9,
                "completion_tokens": 4,
                "completion_tokens_details": {"reasoning_tokens": 30},
                "total_tokens": 43,
            },
            (9, 34, 0, 0, 30),
        ),
    ],
    ids=["deepseek", "mistral", "moonshot", "openrouter", "xai counts reasoning apart"],
)
def test_usage_as_servers_count_it(usage: dict[str, Any], expected: tuple[int, ...]) -> None:
    got = read(chunk({"content": "x"}), chunk({}, "stop"), chunk(usage=usage), DONE).usage
    assert got is not None
    names = ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens")
    assert tuple(getattr(got, name) for name in names) == expected


# --- streams --------------------------------------------------------------------------------------------------------


def test_a_stream_is_the_same_however_it_is_split() -> None:
    whole = b"".join(
        [
            b": OPENROUTER PROCESSING\r\n\r\n",
            chunk({"role": "assistant", "content": ""}),
            chunk({"content": "Hé"}).replace(b"\n", b"\r\n"),
            chunk({"content": "llo"}),
            chunk(call(0, "", id="a", name="f")),
            chunk(call(0, '{"x": ')),
            chunk(call(1, '{"y"', id="b", name="g")),
            chunk(call(0, "1}")),
            chunk(call(1, ":2}")),
            chunk({}, "tool_calls"),
            chunk(usage=USAGE),
            DONE,
        ]
    )
    expected = read(whole)
    assert expected.message.text == "Héllo"
    assert [c.arguments for c in expected.message.tool_calls] == [{"x": 1}, {"y": 2}]
    assert expected.usage is not None
    assert expected.usage.cached_tokens == 3
    for seed in range(30):
        rng = random.Random(seed)
        cuts = sorted(rng.sample(range(1, len(whole)), 25))
        assert read(*(whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True))) == expected
    assert read(*(bytes([byte]) for byte in whole)) == expected


def test_a_stream_that_is_cut_anywhere_before_its_reason_is_no_answer() -> None:
    calls = [chunk(call(0, '{"x": ', id="a", name="f")), chunk(call(0, "1}")), chunk(call(1, "{}", id="b", name="g"))]
    raw = b"".join([chunk({"content": "Hé"}), *calls, chunk({}, "tool_calls"), chunk(usage=USAGE), DONE])
    assert whole_before(WIRE, raw, raw.index(b'"tool_calls"}]')) == []


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_events_with_every_line_end(end: bytes) -> None:
    raw = b"event: x\ndata: 1\ndata: 2\n\n: note\ndata: 3\n\n".replace(b"\n", end)
    parser = EventParser()
    events = [event for byte in raw for event in parser.feed(bytes([byte]))] + parser.close()
    assert [(event.name, event.data) for event in events] == [("x", "1\n2"), ("", "3")]


@pytest.mark.parametrize(
    "deltas",
    [
        [call(None, '{"x":1}', id="a", name="f"), call(None, '{"x":2}', id="b", name="f")],
        [call(None, '{"x"', id="a", name="f"), call(None, ":1}", id="a"), call(None, '{"x":2}', id="b", name="f")],
        [call(None, '{"x"', id="a", name="f"), call(None, ":1}"), call(None, '{"x":2}', id="b", name="f")],
        [call(0, '{"x"', id="a", name="f"), call(0, ":1}", id="a", name="f"), call(1, '{"x":2}', id="b", name="f")],
        [call(0, '{"x":1}', id="a", name="f"), call(0, '{"x":2}', id="b", name="f")],
    ],
    ids=["whole without index", "repeated id without index", "no id", "repeated id and name", "all at index 0"],
)
def test_tool_calls_as_servers_send_them(deltas: list[dict[str, Any]]) -> None:
    answer = read(*map(chunk, deltas), chunk({}, "tool_calls"), DONE)
    assert [(c.id, c.name, c.arguments) for c in answer.message.tool_calls] == [
        ("a", "f", {"x": 1}),
        ("b", "f", {"x": 2}),
    ]


def test_arguments_that_are_not_json_are_kept() -> None:
    answer = read(chunk(call(0, '{"x": oops', id="a", name="f")), chunk({}, "stop"), DONE)
    bad = answer.message.tool_calls[0]
    assert (bad.arguments, bad.raw, answer.finish) == (None, '{"x": oops', "tool_calls")
    assert "not JSON" in str(bad.error)


@pytest.mark.parametrize(
    ("finish", "expected"),
    [("stop", "stop"), ("length", "length"), ("content_filter", "content_filter"), ("because", "other")],
)
def test_finish_reasons(finish: str, expected: str) -> None:
    answer = read(chunk({"content": "x"}), chunk({}, finish))
    assert answer.finish == expected
    assert bool(answer.notes) == (expected == "other")


def test_a_refusal() -> None:
    answer = read(chunk({"refusal": "I "}), chunk({"refusal": "won't"}), chunk({}, "stop"), DONE)
    assert (answer.finish, answer.message.refusal) == ("refusal", "I won't")


def test_reasoning_is_kept_and_goes_back() -> None:
    answer = read(
        chunk({"reasoning_content": "a"}), chunk({"reasoning_content": "b"}), chunk({"content": "c"}, "stop"), DONE
    )
    assert answer.message.text == "c"
    body = WIRE.render(ModelRequest([answer.message]), "m", stream=False).body
    assert json.loads(body)["messages"][0] == {"role": "assistant", "content": "c", "reasoning_content": "ab"}


@pytest.mark.parametrize(
    "pieces",
    [
        [chunk({"content": "x"})],
        [chunk({"content": "x"}), DONE],
        [],
        [chunk({"content": "x"}), b'data: {"choices": [{"del\n\n'],
        [chunk({"content": "x"}), b"data: 5\n\n"],
        [b'data: {"choices": [{"index": 0, "delta": "text"}]}\n\n'],
        [b'data: {"choices": 7}\n\n'],
        [chunk({"content": "x"}, "error")],
    ],
    ids=["cut", "done without finish", "empty", "malformed", "no object", "bad delta", "bad choices", "finish error"],
)
def test_broken_streams(pieces: list[bytes]) -> None:
    with pytest.raises(StreamBroken):
        read(*pieces)


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (
            b'data: {"error":{"code":"server_error","message":"gone"},"choices":[{"finish_reason":"error"}]}\n\n',
            "ServerError",
        ),
        (b'data: {"error":{"message":"the server had an error"},"choices":[]}\n\n', "ServerError"),
        (b'data: {"error":{"code":429,"message":"slow"}}\n\n', "RateLimited"),
        (
            b'event: error\ndata: {"error":{"code":"tool_use_failed","type":"invalid_request_error"}}\n\n',
            "InvalidRequest",
        ),
        (b'event: error\ndata: {"message":"x","code":"server_is_overloaded"}\n\n', "Overloaded"),
        (b'{"error":{"code":"insufficient_quota"}}\n\n', "QuotaExhausted"),
    ],
)
def test_an_error_in_a_stream_has_the_class_of_its_code(raw: bytes, kind: str) -> None:
    with pytest.raises(ModelError) as caught:
        read(chunk({"content": "x"}), raw)
    assert type(caught.value).__name__ == kind


def test_usage_and_done_are_an_end_too() -> None:
    answer = read(chunk(call(0, "{}", id="a", name="f")), chunk({"content": ""}, usage=USAGE), DONE)
    assert answer.finish == "tool_calls"


# --- whole answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [b"<html>bad gateway</html>", b'{"choices": [{"mess', b"{}", b"[]", b'{"choices": []}']
)
def test_what_is_no_answer_is_the_servers_error(body: bytes) -> None:
    with pytest.raises(ServerError):
        WIRE.parse(body, "d")


@pytest.mark.parametrize(
    ("reason", "kind"),
    [("insufficient_system_resource", "Overloaded"), ("network_error", "ServerError"), ("abort", "ServerError")],
)
def test_an_answer_that_the_server_gave_up_is_none(reason: str, kind: str) -> None:
    whole = {"choices": [{"message": {"content": "half an ans"}, "finish_reason": reason}]}
    with pytest.raises(ModelError) as caught:
        WIRE.parse(json.dumps(whole).encode(), "d")
    assert type(caught.value).__name__ == kind
    with pytest.raises(ModelError) as caught:
        read(chunk({"content": "half an ans"}), chunk({}, reason))
    assert type(caught.value).__name__ == kind


def test_an_error_behind_an_answer_that_reached_its_limit_is_a_note() -> None:
    late = chunk({}, error={"code": 400, "message": "Token limit reached"})
    answer = read(chunk({"content": "so far"}, "length"), late, DONE)
    assert (answer.message.text, answer.finish) == ("so far", "length")
    assert "Token limit reached" in answer.notes[0]
    with pytest.raises(ModelError):
        read(chunk({"content": "so far"}, "stop"), late, DONE)
