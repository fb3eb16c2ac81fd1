"""Gemini's generateContent wire, byte by byte."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from tests.router.kits import whole_before

from ridethrough.runtime.errors import ContentFilter, ModelError, Overloaded, ServerError, StreamBroken
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
from ridethrough.runtime.router.providers.gemini import GeminiGenerate, traits_of
from ridethrough.runtime.router.providers.wire import Answer, Wire

WIRE = GeminiGenerate("g")
NEW, OLD = "gemini-3-flash-preview", "gemini-2.5-flash"
USAGE = {
    "promptTokenCount": 20,
    "cachedContentTokenCount": 12,
    "toolUsePromptTokenCount": 3,
    "candidatesTokenCount": 4,
    "thoughtsTokenCount": 5,
    "totalTokenCount": 32,
}
SIGNED: dict[str, Any] = {"text": "Hé", "thoughtSignature": "c2ln"}
CALL: dict[str, Any] = {"functionCall": {"id": "a", "name": "f", "args": {"x": '}"]\\'}}, "thoughtSignature": "c2ln"}


def chunk(*parts: dict[str, Any], finish: str | int | None = None, **more: Any) -> dict[str, Any]:
    """One chunk, or a whole answer: they have the same form."""
    reason = {} if finish is None else {"finishReason": finish}
    candidate = {"content": {"role": "model", "parts": list(parts)}, "index": 0, **reason, **more}
    return {"candidates": [candidate], "modelVersion": "m-1", "responseId": "r1"}


def events(chunks: Iterable[Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(each).encode() + b"\r\n\r\n" for each in chunks)


def read(*pieces: bytes) -> Answer:
    stream = WIRE.stream("d")
    for piece in pieces:
        stream.feed(piece)
    return stream.close()


def parse(payload: Any) -> Answer:
    return WIRE.parse(json.dumps(payload).encode(), "d")


def body(*messages: Message | dict[str, Any], model: str = NEW, wire: Wire = WIRE, **more: Any) -> dict[str, Any]:
    return dict(json.loads(wire.render(ModelRequest(messages, **more), model, stream=False).body))


def notes(*messages: Message | dict[str, Any], model: str = NEW, **more: Any) -> str:
    return "\n".join(WIRE.render(ModelRequest(messages, **more), model, stream=False).notes)


def model_parts(payload: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for content in payload["contents"] if content["role"] == "model" for part in content["parts"]]


# --- requests -------------------------------------------------------------------------------------------------------


def test_a_request_is_written() -> None:
    schema = {"type": "object", "properties": {"kind": {"const": "x"}, "const": {"type": "string"}}}
    request = ModelRequest(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "tool_calls": [{"id": "1", "name": "f", "arguments": None, "raw": "{oops"}]},
            {"role": "tool", "tool_call_id": "1", "content": "no", "is_error": True},
        ],
        tools=[ToolSpec(name="f", description="does f")],
        tool_choice="f",
        output_schema=schema,
        max_tokens=7,
        temperature=0.5,
        reasoning="low",
    )
    rendered = WIRE.render(request, NEW, stream=True)
    assert rendered.path == "v1beta/models/gemini-3-flash-preview:streamGenerateContent?alt=sse"
    payload = json.loads(rendered.body)
    assert payload["systemInstruction"] == {"parts": [{"text": "be brief"}]}
    user, model, result = payload["contents"]
    assert user == {"role": "user", "parts": [{"text": "hi"}]}
    assert model["parts"][0]["functionCall"] == {"id": "1", "name": "f", "args": {"_invalid_json": "{oops"}}
    assert result["role"] == "user"
    assert result["parts"] == [{"functionResponse": {"id": "1", "name": "f", "response": {"error": "no"}}}]
    declared = payload["tools"][0]["functionDeclarations"][0]
    assert declared["parametersJsonSchema"] == {"type": "object", "properties": {}}
    assert payload["toolConfig"]["functionCallingConfig"] == {"mode": "ANY", "allowedFunctionNames": ["f"]}
    assert payload["generationConfig"] == {
        "responseMimeType": "application/json",
        "responseJsonSchema": {
            "type": "object",
            "properties": {"kind": {"enum": ["x"]}, "const": {"type": "string"}},
        },
        "maxOutputTokens": 7,
        "temperature": 0.5,
        "thinkingConfig": {"thinkingLevel": "low", "includeThoughts": True},
    }
    assert rendered.notes == ()


def test_where_requests_go() -> None:
    wire: Wire = WIRE
    request = ModelRequest([{"role": "user", "content": "hi"}])
    assert wire.render(request, OLD, stream=False).path == "v1beta/models/gemini-2.5-flash:generateContent"
    assert wire.render(request, "tunedModels/a b", stream=False).path == "v1beta/tunedModels/a%20b:generateContent"
    vertex = "projects/p/locations/global/publishers/google/models/m"
    assert wire.render(request, vertex, stream=False).path == f"v1beta1/{vertex}:generateContent"
    assert wire.authorize("k") == {"x-goog-api-key": "k"}
    assert (wire.default_base_url, wire.models_path) == ("https://generativelanguage.googleapis.com", "v1beta/models")


@pytest.mark.parametrize(("choice", "mode"), [("auto", "AUTO"), ("none", "NONE"), ("required", "ANY")])
def test_tool_choice(choice: str, mode: str) -> None:
    payload = body(UserMessage(content="hi"), tools=[ToolSpec(name="f")], tool_choice=choice)
    assert payload["toolConfig"] == {"functionCallingConfig": {"mode": mode}}


@pytest.mark.parametrize(
    ("model", "effort", "config", "note"),
    [
        (NEW, "minimal", {"thinkingLevel": "minimal"}, ""),
        (NEW, "none", {"thinkingLevel": "minimal"}, "became 'minimal'"),
        (NEW, "xhigh", {"thinkingLevel": "high", "includeThoughts": True}, "became 'high'"),
        ("gemini-3-pro-preview", "medium", {"thinkingLevel": "low", "includeThoughts": True}, "became 'low'"),
        ("gemini-3.1-pro-preview", "medium", {"thinkingLevel": "medium", "includeThoughts": True}, ""),
        ("gemini-3.8-flash", "minimal", {"thinkingLevel": "low"}, "became 'low'"),
        (OLD, "none", {"thinkingBudget": 0}, ""),
        (OLD, "xhigh", {"thinkingBudget": 24576, "includeThoughts": True}, "became 24576 tokens"),
        ("gemini-2.5-pro", "none", {"thinkingBudget": 128}, "became 128 tokens"),
        ("gemini-2.5-pro", "xhigh", {"thinkingBudget": 32768, "includeThoughts": True}, ""),
        ("gemini-2.0-flash", "high", None, "was left out"),
        ("gemini-2.0-flash", "none", None, ""),
    ],
)
def test_reasoning_effort(model: str, effort: str, config: dict[str, Any] | None, note: str) -> None:
    message = UserMessage(content="hi")
    assert body(message, model=model, reasoning=effort)["generationConfig"].get("thinkingConfig") == config
    told = notes(message, model=model, reasoning=effort)
    assert note in told
    assert bool(told) == bool(note)


def test_families_are_data() -> None:
    assert not traits_of(OLD).modern
    assert not traits_of("models/gemini-1.5-flash").modern
    assert traits_of("gemini-flash-latest").modern
    assert traits_of("gemini-12-pro").modern


def test_older_models_take_an_output_schema_beside_tools_in_words() -> None:
    more: dict[str, Any] = {"tools": [ToolSpec(name="f")], "output_schema": {"type": "object", "title": "Finding"}}
    payload = body(SystemMessage(content="s"), UserMessage(content="hi"), model=OLD, **more)
    assert "responseJsonSchema" not in payload["generationConfig"]
    assert '"Finding"' in payload["systemInstruction"]["parts"][1]["text"]
    assert "in words" in notes(UserMessage(content="hi"), model=OLD, **more)
    assert "responseJsonSchema" in body(UserMessage(content="hi"), **more)["generationConfig"]


def test_images_are_sent() -> None:
    content = (
        TextPart(text="see"),
        ImagePart(data="QUJD", media_type="image/webp"),
        ImagePart(url="https://example.org/a.jpg?size=2"),
        ImagePart(url="data:image/gif;base64,R0lG"),
    )
    assert body(UserMessage(content=content))["contents"][0]["parts"] == [
        {"text": "see"},
        {"inlineData": {"mimeType": "image/webp", "data": "QUJD"}},
        {"fileData": {"mimeType": "image/jpeg", "fileUri": "https://example.org/a.jpg?size=2"}},
        {"inlineData": {"mimeType": "image/gif", "data": "R0lG"}},
    ]


def test_images_in_tool_results() -> None:
    call = AssistantMessage(tool_calls=(ToolCall(id="a", name="f"),))
    images = (ImagePart(data="QUJD"), ImagePart(url="https://example.org/a.png"))
    result = ToolMessage(tool_call_id="a", content=(TextPart(text="two"), *images))
    inline = {"inlineData": {"mimeType": "image/png", "data": "QUJD"}}
    linked = {"fileData": {"mimeType": "image/png", "fileUri": "https://example.org/a.png"}}
    *_, response, moved = body(UserMessage(content="hi"), call, result)["contents"]
    assert response["parts"][0]["functionResponse"]["parts"] == [inline]
    assert moved["parts"][1:] == [linked]
    *_, response, moved = body(UserMessage(content="hi"), call, result, model=OLD)["contents"]
    assert "parts" not in response["parts"][0]["functionResponse"]
    assert "follow" in response["parts"][0]["functionResponse"]["response"]["output"]
    assert moved["parts"][1:] == [inline, linked]
    assert "behind the results" in notes(UserMessage(content="hi"), call, result)


def test_results_are_one_turn_in_the_order_of_their_calls() -> None:
    calls = tuple(ToolCall(id=id, name=name) for id, name in [("a", "f"), ("b", "g"), ("c", "f")])
    conversation: list[Message] = [
        UserMessage(content="hi"),
        AssistantMessage(tool_calls=calls),
        ToolMessage(tool_call_id="c", content="3"),
        UserMessage(content="hurry"),
        ToolMessage(tool_call_id="a", content="1"),
        ToolMessage(tool_call_id="z", name="h", content="9"),
    ]
    payload = body(*conversation)
    assert [part["functionResponse"]["response"] for part in payload["contents"][2]["parts"]] == [
        {"output": "1"},
        {"error": "There is no result of this call: it was not made, or was interrupted."},
        {"output": "3"},
    ]
    assert [part["functionResponse"]["name"] for part in payload["contents"][2]["parts"]] == ["f", "g", "f"]
    assert payload["contents"][3]["parts"] == [{"text": "hurry"}]
    assert payload["contents"][4]["parts"][0]["text"].startswith("The result of h (call z)")
    told = notes(*conversation)
    assert "without a result" in told
    assert "not in the conversation" in told


@pytest.mark.parametrize(
    ("messages", "roles"),
    [
        ([SystemMessage(content="s")], ["user"]),
        ([AssistantMessage(content="a"), UserMessage(content="u")], ["user", "model", "user"]),
        ([UserMessage(content="u"), AssistantMessage(content="a")], ["user", "model", "user"]),
        ([UserMessage(content="u"), AssistantMessage(content=""), UserMessage(content="")], ["user"]),
        (
            [UserMessage(content="u"), AssistantMessage(tool_calls=(ToolCall(id="1", name="f"),))],
            ["user", "model", "user"],
        ),
    ],
)
def test_conversations_begin_and_end_with_the_user(messages: Sequence[Message], roles: list[str]) -> None:
    contents = body(*messages)["contents"]
    assert [content["role"] for content in contents] == roles
    assert all(content["parts"] for content in contents)


def test_a_conversation_of_other_wires_is_taken() -> None:
    thought = ReasoningPart(text="hm", provider="other", data={"signature": "abc"}, after_calls=1)
    item = ProviderPart(kind="server_tool_use", provider="other", data={"type": "server_tool_use"})
    foreign = ToolCall(id="call|1", name="f", provider="other", data={"item": "x"})
    answer = AssistantMessage(content=(thought, item, TextPart(text="so")), tool_calls=(foreign, foreign))
    late = SystemMessage(content=(TextPart(text="now this"), ImagePart(data="QUJD")))
    conversation = (UserMessage(content="hi"), answer, ToolMessage(tool_call_id="call|1", content="ok"), late)
    first, call, second = model_parts(body(*conversation))
    assert first == {"text": "so"}
    assert call["functionCall"] == {"id": "call|1", "name": "f", "args": {}}
    assert call["thoughtSignature"] == "skip_thought_signature_validator"
    assert "thoughtSignature" not in second
    assert "thoughtSignature" not in model_parts(body(*conversation, model=OLD))[1]
    assert notes(*conversation).splitlines() == [
        "reasoning of other was left out: only that provider can read it",
        "server_tool_use items of other were left out: only that provider can read them",
        "images in instructions were left out: this wire takes text there",
        "instructions in mid-conversation were sent before it: this wire has them only there",
        "tool calls without a result were answered with an error",
    ]


def test_what_another_wire_wrote_under_the_same_name_stays_here() -> None:
    thought = ReasoningPart(text="hm", provider="g", data={"reasoning_content": "hm"})
    call = ToolCall(id="a", name="f", provider="g", data={"item": "x"})
    answer = AssistantMessage(content=(thought,), tool_calls=(call,))
    assert [sorted(part) for part in model_parts(body(answer, model=OLD))] == [["functionCall"]]


def test_only_new_messages_are_written() -> None:
    answer = AssistantMessage(content="so", tool_calls=(ToolCall(id="a", name="f"),))
    conversation: list[Message] = [UserMessage(content="hi"), answer, ToolMessage(tool_call_id="a", content="ok")]
    body(*conversation)
    keys = ("gemini/g/modern", "gemini/g/modern\0a", "gemini/g/modern\0a\0f")
    assert all(is_written(message, key) for message, key in zip(conversation, keys, strict=True))
    assert not is_written(UserMessage(content="hi"), keys[0])


def is_written(message: Message, key: str) -> bool:
    """Whether ``message`` keeps what was rendered under ``key``."""
    return message.rendered(key, lambda _: b"new") != b"new"


# --- what goes back -------------------------------------------------------------------------------------------------


def test_an_answer_goes_back_part_for_part() -> None:
    parts: list[dict[str, Any]] = [
        {"text": "first I ", "thought": True},
        {"executableCode": {"language": "PYTHON", "code": "print(1)"}, "thoughtSignature": "czE="},
        {"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "1\n"}},
        {"text": "plain"},
        {"text": "signed", "thoughtSignature": "czI="},
        {"text": "plain again"},
        {"inlineData": {"mimeType": "image/png", "data": "QUJD"}, "thoughtSignature": "czM="},
        {"functionCall": {"id": "a", "name": "f", "args": {"x": 1}}, "thoughtSignature": "czQ="},
        {"text": "between", "thought": True},
        {"text": "and said", "thoughtSignature": "czU="},
        {"text": "unsigned"},
        {"functionCall": {"id": "b", "name": "g", "args": {}}},
        {"text": "", "thoughtSignature": "czY="},
    ]
    answer = parse(chunk(*parts, finish="STOP"))
    assert answer.message.text == "plainsignedplain againand saidunsigned"
    assert answer.finish == "tool_calls"
    stored = AssistantMessage.model_validate_json(answer.message.model_dump_json())
    assert model_parts(body(UserMessage(content="hi"), stored)) == parts
    elsewhere = body(UserMessage(content="hi"), stored, wire=GeminiGenerate("other"), model=OLD)
    kept = ["text", "text", "text", "inlineData", "functionCall", "text", "text", "functionCall"]
    assert [next(iter(part)) for part in model_parts(elsewhere)] == kept
    assert "Signature" not in json.dumps(elsewhere)


def test_text_behind_a_call_stays_behind_it() -> None:
    call = {"functionCall": {"id": "a", "name": "f", "args": {}}, "thoughtSignature": "c2ln"}
    answer = parse(chunk(call, {"text": "done?"}, finish="STOP"))
    assert answer.message.content == (TextPart(text="done?", after_calls=1),)
    assert model_parts(body(UserMessage(content="hi"), answer.message)) == [call, {"text": "done?"}]


def test_what_the_provider_says_about_an_answer_is_kept_and_stays_here() -> None:
    grounding = {"webSearchQueries": ["q"], "groundingChunks": []}
    answer = parse(chunk({"text": "so"}, finish="STOP", groundingMetadata=grounding))
    assert isinstance(answer.message.content, tuple)
    item = answer.message.content[-1]
    assert isinstance(item, ProviderPart)
    assert (item.kind, item.data) == ("groundingMetadata", {"groundingMetadata": grounding})
    assert model_parts(body(answer.message)) == [{"text": "so"}]


def test_missing_ids_are_made_and_stay_the_same() -> None:
    bare = {"functionCall": {"name": "f"}}
    payload = chunk(bare, {"functionCall": {"id": "a", "name": "f", "args": {"x": 1}}}, bare, bare, finish="STOP")
    ids = [call.id for call in parse(payload).message.tool_calls]
    assert len(set(ids)) == 4
    assert ids[1] == "a"
    assert [call.id for call in read(events([payload])).message.tool_calls] == ids
    assert parse({**payload, "responseId": "r2"}).message.tool_calls[0].id != ids[0]
    nameless = {key: value for key, value in payload.items() if key != "responseId"}
    turns = [parse({**nameless, "usageMetadata": {"promptTokenCount": count}}) for count in (1, 2)]
    assert turns[0].message.tool_calls[0].id != turns[1].message.tool_calls[0].id


# --- streams --------------------------------------------------------------------------------------------------------

CHUNKS: list[dict[str, Any]] = [
    chunk({"text": "I th", "thought": True}) | {"usageMetadata": {"promptTokenCount": 20}},
    chunk({"text": "ink", "thought": True}),
    chunk(SIGNED),
    chunk({"text": "ll"}),
    chunk({"text": "ö"}),
    chunk(CALL),
    chunk({"functionCall": {"name": "g", "args": {}}}),
    chunk({"text": ""}, finish="STOP"),
    {"usageMetadata": USAGE},
]


def test_a_stream_is_the_same_however_it_is_split_and_framed() -> None:
    sse = events(CHUNKS)
    expected = read(sse)
    assert expected == parse(CHUNKS)
    assert expected.message.text == "Héllö"
    assert expected.usage == Usage(input_tokens=23, output_tokens=9, cached_tokens=12, reasoning_tokens=5)
    assert (expected.model, expected.finish, expected.notes) == ("m-1", "tool_calls", ())
    assert [call.arguments for call in expected.message.tool_calls] == [{"x": '}"]\\'}, {}]
    sent = model_parts(body(expected.message))
    assert sent[:4] == [{"text": "I think", "thought": True}, SIGNED, {"text": "llö"}, CALL]
    array = b"\xef\xbb\xbf\n" + json.dumps(CHUNKS, indent=2, ensure_ascii=False).encode() + b"\n"
    for whole in (sse, array, b"".join(json.dumps(each).encode() + b"\n" for each in CHUNKS)):
        for seed in range(30):
            rng = random.Random(seed)
            cuts = sorted(rng.sample(range(1, len(whole)), 25))
            assert read(*(whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True))) == expected
        assert read(*(bytes([byte]) for byte in whole)) == expected


def test_a_stream_that_is_cut_anywhere_before_its_reason_is_no_answer() -> None:
    array = json.dumps(CHUNKS).encode()
    for raw in (events(CHUNKS), array, array.replace(b"}, {", b"}\n{")[1:-1]):
        assert whole_before(WIRE, raw, raw.index(b"STOP"), step=3) == []


def test_what_a_stream_tells_on_its_way() -> None:
    stream = WIRE.stream("d")
    told: list[tuple[str, int, bool, bool]] = []
    for each in CHUNKS:
        text = stream.feed(events([each]))
        told.append((text, stream.progress, stream.finished, stream.done))
    assert [text for text, *_ in told] == ["", "", "Hé", "ll", "ö", "", "", "", ""]
    assert [progress for _, progress, *_ in told] == [1, 2, 3, 4, 5, 6, 7, 7, 7]
    assert [finished for *_, finished, _ in told] == [False] * 7 + [True, True]
    assert not stream.done
    array = WIRE.stream("d")
    array.feed(json.dumps(CHUNKS).encode()[:-1])
    assert (array.finished, array.done) == (True, False)
    array.feed(b"]")
    assert array.done


def test_a_reason_before_the_last_output_is_no_end() -> None:
    early = [chunk(finish="STOP"), chunk({"text": "He"})]
    with pytest.raises(StreamBroken):
        read(events(early))
    assert read(events([*early, chunk({"text": "llo"}, finish="STOP")])).message.text == "Hello"


def test_other_candidates_are_passed_over() -> None:
    both = chunk({"text": "a"}, finish="STOP")
    both["candidates"].append({"index": 1, "content": {"parts": [{"text": "b"}]}})
    assert parse(both).message.text == "a"


@pytest.mark.parametrize(
    "pieces",
    [
        [events([chunk({"text": "x"})])],
        [events([chunk({"text": "x"})]), b"data: [DONE]\n\n"],
        [],
        [b"<html>\n<p>data</p>\n</html>"],
        [events([chunk({"text": "x"})]), b'data: {"candidates": [{"con\n\n'],
        [events([5])],
        [events([{"candidates": [{"content": "text"}]}])],
        [events([{"candidates": 7}])],
        [events([chunk({"functionCall": {"args": {}}})])],
        [json.dumps([chunk({"text": "x"})]).encode()],
        [json.dumps([chunk({"text": "x"}, finish="STOP")]).encode()[:-30]],
        [b"[1, 2]"],
        [events([chunk(finish="MALFORMED_FUNCTION_CALL", finishMessage="Function call is empty")])],
    ],
    ids=[
        "cut",
        "done without finish",
        "empty",
        "html",
        "malformed",
        "no object",
        "bad content",
        "bad candidates",
        "nameless call",
        "array without finish",
        "cut array",
        "array of numbers",
        "nothing but a bad end",
    ],
)
def test_broken_streams(pieces: list[bytes]) -> None:
    with pytest.raises(StreamBroken):
        read(*pieces)


EXHAUSTED = {"error": {"code": 429, "message": "slow", "status": "RESOURCE_EXHAUSTED"}}
PER_DAY = [{"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": "RequestsPerDay"}]}]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"error": {"code": 503, "message": "overloaded", "status": "UNAVAILABLE"}}, "Overloaded"),
        (EXHAUSTED, "RateLimited"),
        ({"error": {**EXHAUSTED["error"], "details": PER_DAY}}, "QuotaExhausted"),
        ([EXHAUSTED], "RateLimited"),
        (json.dumps(EXHAUSTED), "RateLimited"),
        ({"error": {"message": json.dumps([EXHAUSTED]), "code": 429}}, "RateLimited"),
        ({"error": {"code": 500, "message": "", "status": "INTERNAL"}}, "ServerError"),
        ({"promptFeedback": {"blockReason": "SAFETY"}}, "ContentFilter"),
        ({"promptFeedback": {"blockReason": "OTHER", "blockReasonMessage": "no"}, "candidates": []}, "ContentFilter"),
    ],
)
def test_an_error_with_status_200_has_the_class_of_its_code(error: Any, kind: str) -> None:
    streams = [events([error]), events([chunk({"text": "x"}), error])]
    if not isinstance(error, str):
        streams.append(json.dumps([chunk({"text": "x"}), error]).encode())
    for framed in streams:
        with pytest.raises(ModelError) as caught:
            read(framed)
        assert type(caught.value).__name__ == kind
    with pytest.raises(ModelError) as caught:
        parse(error)
    assert type(caught.value).__name__ == kind


def test_the_table_can_be_extended() -> None:
    wire = GeminiGenerate("g", table=(Rule(Overloaded, names=frozenset({"queue_full"})), *TABLE))
    error = json.dumps({"error": {"code": 400, "status": "QUEUE_FULL"}}).encode()
    with pytest.raises(Overloaded):
        wire.parse(error, "d")
    with pytest.raises(Overloaded):
        wire.stream("d").feed(b"event: error\ndata: " + error + b"\n\n")


# --- whole answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b"<html>bad gateway</html>",
        b'{"candidates": [{"con',
        b'"{"',
        b"{}",
        b"[]",
        b"7",
        b'{"candidates": []}',
        b'{"candidates": [{}]}',
        b'{"candidates": [{"finishReason": "MALFORMED_FUNCTION_CALL"}]}',
        b'{"candidates": [{"finishReason": "OTHER", "content": {}}]}',
    ],
)
def test_what_is_no_answer_is_the_servers_error(raw: bytes) -> None:
    with pytest.raises(ServerError):
        WIRE.parse(raw, "d")


@pytest.mark.parametrize(
    ("finish", "expected"),
    [
        ("STOP", "stop"),
        (1, "stop"),
        ("MAX_TOKENS", "length"),
        (2, "length"),
        ("SAFETY", "content_filter"),
        ("RECITATION", "content_filter"),
        ("PROHIBITED_CONTENT", "content_filter"),
        ("LANGUAGE", "other"),
        ("BECAUSE", "other"),
        (17, "other"),
        ("FINISH_REASON_UNSPECIFIED", "other"),
        (None, "other"),
    ],
)
def test_finish_reasons(finish: str | int | None, expected: str) -> None:
    answer = parse(chunk({"text": "x"}, finish=finish))
    assert answer.finish == expected
    assert bool(answer.notes) == (expected in ("content_filter", "other"))


def test_a_filtered_answer_may_be_empty() -> None:
    answer = parse({"candidates": [{"finishReason": "SAFETY"}], "usageMetadata": {"totalTokenCount": 14}})
    assert (answer.message.content, answer.finish, answer.usage) == ("", "content_filter", Usage())
    assert parse(chunk({"text": "x"}, finish="STOP")).usage is None


def test_a_blocked_prompt_says_why() -> None:
    with pytest.raises(ContentFilter, match=r"no \(BLOCKLIST\)"):
        parse({"promptFeedback": {"blockReason": "BLOCKLIST", "blockReasonMessage": "no"}})
    assert parse({**chunk({"text": "x"}, finish="STOP"), "promptFeedback": {"blockReason": "SAFETY"}}).finish == "stop"


def test_a_call_that_nobody_declared_is_given_to_the_caller() -> None:
    answer = parse(chunk(CALL, finish="UNEXPECTED_TOOL_CALL", finishMessage="undeclared function: f"))
    assert (answer.finish, answer.message.tool_calls[0].name) == ("tool_calls", "f")
    assert answer.notes == ("the provider stopped with 'UNEXPECTED_TOOL_CALL': undeclared function: f",)


@pytest.mark.parametrize("written", ["print(default_api.find(q='x'))", "call:find{q:1}", "call:default_api:find{q:1}"])
def test_a_malformed_call_becomes_one_with_broken_arguments(written: str) -> None:
    message = f"Malformed function call: {written}"
    answer = parse(chunk(finish="MALFORMED_FUNCTION_CALL", finishMessage=message))
    (call,) = answer.message.tool_calls
    assert (answer.finish, call.name, call.arguments, call.raw) == ("tool_calls", "find", None, message)
    assert model_parts(body(answer.message))[0]["functionCall"]["args"] == {"_invalid_json": message}


@pytest.mark.parametrize(
    ("arguments", "parsed", "broken"),
    [(None, {}, False), ('{"x": 1}', {"x": 1}, False), ("{oops", None, True), ([1], None, True)],
)
def test_arguments_as_servers_send_them(arguments: Any, parsed: dict[str, Any] | None, broken: bool) -> None:
    call = parse(chunk({"functionCall": {"name": "f", "args": arguments}}, finish="STOP")).message.tool_calls[0]
    assert call.arguments == parsed
    assert bool(call.error) == broken


def test_an_image_among_the_thoughts_is_a_thought() -> None:
    part = {"inlineData": {"mimeType": "image/png", "data": "QUJD"}, "thought": True}
    audio = {"inlineData": {"mimeType": "audio/wav", "data": "QUJD"}}
    answer = parse(chunk(part, audio, {"text": "x"}, finish="STOP"))
    assert [type(each) for each in answer.message.content] == [ReasoningPart, ProviderPart, TextPart]
    assert model_parts(body(answer.message)) == [part, audio, {"text": "x"}]
