"""The Responses wire: items there and back, and streams that are whole or are not."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from tests.router.kits import whole_before

from ridethrough.runtime.errors import ModelError, ServerError, StreamBroken
from ridethrough.runtime.router.messages import (
    MESSAGE,
    AssistantMessage,
    ImagePart,
    Message,
    ModelRequest,
    ProviderPart,
    ReasoningPart,
    TextPart,
    ToolCall,
    ToolMessage,
    ToolSpec,
    Usage,
    UserMessage,
)
from ridethrough.runtime.router.providers.openai_responses import OpenAIResponses, Quirks, family_of, quirks_of
from ridethrough.runtime.router.providers.wire import Answer, Stream, Wire

WIRE = OpenAIResponses("p")
USER = UserMessage(content="hi")


def rendered(*messages: Any, model: str = "gpt-5.2", wire: Wire = WIRE, **more: Any) -> tuple[Any, str]:
    """Return the body for ``messages``, and its notes as one text."""
    result = wire.render(ModelRequest(messages, **more), model, stream=False)
    return json.loads(result.body), "; ".join(result.notes)


def items(*messages: Any, model: str = "gpt-5.2") -> list[dict[str, Any]]:
    body, _ = rendered(*messages, model=model)
    found: list[dict[str, Any]] = body["input"]
    return found


def thought(number: int, **more: Any) -> dict[str, Any]:
    return {"id": f"rs_{number}", "type": "reasoning", "summary": [], "encrypted_content": f"gAAA{number}", **more}


def said(text: str, number: int = 1, **more: Any) -> dict[str, Any]:
    piece = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    message = {"id": f"msg_{number}", "type": "message", "role": "assistant", "status": "completed"}
    return {**message, "content": [piece], **more}


def called(number: int, arguments: str = '{"x":1}', **more: Any) -> dict[str, Any]:
    call = {"id": f"fc_{number}", "type": "function_call", "call_id": f"call_{number}", "name": "f"}
    return {**call, "arguments": arguments, "status": "completed", **more}


USAGE = {
    "input_tokens": 90,
    "input_tokens_details": {"cached_tokens": 30, "cache_write_tokens": 20},
    "output_tokens": 12,
    "output_tokens_details": {"reasoning_tokens": 7},
}


def response(*output: dict[str, Any], status: str = "completed", **more: Any) -> dict[str, Any]:
    return {
        "id": "resp_1",
        "object": "response",
        "status": status,
        "error": None,
        "incomplete_details": None,
        "model": "gpt-5.2-2026-01-01",
        "output": list(output),
        "usage": USAGE,
        **more,
    }


def parsed(*output: dict[str, Any], **more: Any) -> Answer:
    return WIRE.parse(json.dumps(response(*output, **more)).encode(), "d")


# --- the head of a request ------------------------------------------------------------------------------------------

CLOSED = {
    "title": "A finding!",
    "type": "object",
    "properties": {"a": {"type": "string"}},
    "required": ["a"],
    "additionalProperties": False,
}


def test_a_request_is_written() -> None:
    result = WIRE.render(
        ModelRequest(
            [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
            tools=[ToolSpec(name="f", description="does f")],
            tool_choice="f",
            output_schema=CLOSED,
            max_tokens=700,
            temperature=0.5,
            reasoning="none",
        ),
        "gpt-5.2",
        stream=True,
    )
    assert (result.path, result.notes) == ("responses", ())
    assert json.loads(result.body) == {
        "model": "gpt-5.2",
        "stream": True,
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "none"},
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "json_schema", "name": "A_finding_", "schema": CLOSED, "strict": True}},
        "max_output_tokens": 700,
        "temperature": 0.5,
        "input": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "tools": [
            {
                "type": "function",
                "name": "f",
                "description": "does f",
                "parameters": {"type": "object", "properties": {}},
                "strict": False,
            }
        ],
    }


def test_an_open_schema_is_not_strict() -> None:
    body, _ = rendered(USER, output_schema={"type": "object", "properties": {"a": {"type": "string"}}})
    assert body["text"]["format"]["strict"] is False


@pytest.mark.parametrize(
    ("model", "asked", "sent", "noted"),
    [
        ("gpt-5.2", "xhigh", "xhigh", False),
        ("openai/gpt-5", "xhigh", "high", True),
        ("openai.gpt-5.6-luna", "minimal", "none", True),
        ("gpt-5", "none", "minimal", True),
        ("gpt-5-pro", "low", "high", True),
        ("gpt-5.1-codex-max", "xhigh", "xhigh", False),
        ("gpt-5.1-codex", "xhigh", "high", True),
        ("o4-mini", "none", "low", True),
        ("gpt-4o", "high", None, True),
        ("gpt-4o", "none", None, False),
        ("gpt-5-chat-latest", "low", None, True),
        ("somebody/other", "xhigh", "xhigh", False),
    ],
)
def test_reasoning_effort_is_what_the_model_takes(model: str, asked: str, sent: str | None, noted: bool) -> None:
    body, notes = rendered(USER, model=model, reasoning=asked)
    assert body.get("reasoning", {}).get("effort") == sent
    assert ("reasoning effort" in notes) == noted


@pytest.mark.parametrize(
    ("model", "reasoning", "asked"),
    [
        ("gpt-5", None, True),
        ("o3", None, True),
        ("x-ai/grok-4", None, True),
        ("gpt-4.1", None, False),
        ("gpt-35-turbo", None, False),
        ("gpt-oss-120b", "low", False),
        ("my-deployment", None, False),
        ("my-deployment", "low", True),
    ],
)
def test_encrypted_reasoning_is_asked_of_models_that_reason(model: str, reasoning: str | None, asked: bool) -> None:
    body, _ = rendered(USER, model=model, reasoning=reasoning)
    assert ("include" in body) == asked


def test_what_the_model_would_refuse_is_left_out_with_a_note() -> None:
    body, notes = rendered(USER, model="o3", temperature=0.1, max_tokens=5)
    assert "temperature" not in body
    assert body["max_output_tokens"] == 16
    assert "temperature was left out" in notes
    assert "max_tokens 5 became 16" in notes
    assert rendered(USER, model="gpt-4o", temperature=0.1)[0]["temperature"] == 0.1


def test_quirks_are_data() -> None:
    azure = OpenAIResponses("p", quirks=quirks_of("https://mine.openai.azure.com/openai/v1"))
    assert azure.authorize("k") == {"api-key": "k"}
    assert WIRE.authorize("k") == {"authorization": "Bearer k"}
    assert quirks_of("http://127.0.0.1:8000/v1") == Quirks()
    groq = OpenAIResponses("p", quirks=quirks_of("https://api.groq.com/openai/v1"))
    assert "include" not in rendered(USER, model="other", wire=groq, reasoning="low")[0]
    assert (WIRE.default_base_url, WIRE.models_path) == ("https://api.openai.com/v1", "models")
    assert family_of("nobody/knows").efforts is None


# --- there and back -------------------------------------------------------------------------------------------------


def test_items_go_back_in_the_order_they_came() -> None:
    search = {
        "id": "ws_1",
        "type": "web_search_call",
        "status": "completed",
        "action": {"type": "search", "query": "q"},
    }
    cited = said("see")
    cited["content"][0]["annotations"] = [{"type": "url_citation", "url": "https://a.example", "start_index": 0}]
    output = [
        thought(1),
        called(1),
        thought(2, summary=[{"type": "summary_text", "text": "hm"}], content=[]),
        called(2, '{"y":2}', namespace="n"),
        thought(3),
        search,
        cited,
        said("so", 2, phase="commentary"),
        called(3, "{}"),
    ]
    answer = parsed(*output)
    assert answer.message.text == "seeso"
    assert [(call.id, call.arguments) for call in answer.message.tool_calls] == [
        ("call_1", {"x": 1}),
        ("call_2", {"y": 2}),
        ("call_3", {}),
    ]
    assert [part.text for part in answer.message.content if isinstance(part, ReasoningPart)] == ["", "hm", ""]
    restored = MESSAGE.validate_json(MESSAGE.dump_json(answer.message))
    back = items(USER, restored, *(ToolMessage(tool_call_id=f"call_{n}", content="ok") for n in (1, 2, 3)))
    expected = [comparable(item) for item in output]
    assert [comparable(item) for item in back[1:10]] == expected
    assert [item["call_id"] for item in back[10:]] == ["call_1", "call_2", "call_3"]


def comparable(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item without what need not go back: the status of calls, what is empty."""
    if item["type"] == "function_call":
        return {key: value for key, value in item.items() if key not in ("status", "arguments")}
    if item["type"] == "message":
        pieces = [
            {key: piece[key] for key in ("type", "text", "annotations") if piece.get(key)} for piece in item["content"]
        ]
        return {**item, "content": pieces}
    return item


def test_texts_among_calls_keep_their_places_without_an_envelope() -> None:
    message = parsed(said("one"), called(1), said("two", 2), called(2), said("three", 3)).message
    assert message.content == tuple(
        TextPart(text=text, after_calls=n) for n, text in enumerate(["one", "two", "three"])
    )
    sent = items(message, *(ToolMessage(tool_call_id=f"call_{n}", content="ok") for n in (1, 2)))
    assert [item.get("content") or item["call_id"] for item in sent[:5]] == ["one", "call_1", "two", "call_2", "three"]
    apart = parsed(said("one"), said("two", 2)).message
    assert [item["content"][0]["text"] if "type" in item else item["content"] for item in items(apart)] == [
        "one",
        "two",
    ]


def test_a_server_that_takes_nothing_among_calls_gets_them_together() -> None:
    message = parsed(thought(1, content=[{"type": "reasoning_text", "text": "hm"}]), called(1), said("two"), called(2))
    talk = (message.message, *(ToolMessage(tool_call_id=f"call_{n}", content="ok") for n in (1, 2)))
    deepseek = OpenAIResponses("p", quirks=quirks_of("https://api.deepseek.com"))
    sent = rendered(*talk, model="other", wire=deepseek)[0]["input"]
    assert [item["type"] for item in sent] == ["reasoning", "message", CALL, CALL, RESULT, RESULT]
    kinds = [item["type"] for item in items(*talk)]
    assert kinds == ["reasoning", CALL, "message", CALL, RESULT, RESULT], (
        "what one server got must not be kept for another"
    )


def test_text_alone_is_text_alone() -> None:
    answer = parsed(said("hello"))
    assert answer == Answer(
        AssistantMessage(content="hello"),
        "stop",
        Usage(input_tokens=90, output_tokens=12, cached_tokens=30, reasoning_tokens=7, cache_write_tokens=20),
        "gpt-5.2-2026-01-01",
    )
    assert items(answer.message) == [{"role": "assistant", "content": "hello"}]


def test_ids_go_back_only_with_a_thought() -> None:
    message = parsed(said("one", phase="commentary"), called(1)).message
    first, second, _ = items(message, ToolMessage(tool_call_id="call_1", content="ok"))
    assert (first.get("id"), first["phase"], second.get("id")) == (None, "commentary", None)
    message = parsed(thought(1), said("one")).message
    assert [item["id"] for item in items(message)] == ["rs_1", "msg_1"]


@pytest.mark.parametrize("lost", [{"encrypted_content": None}, {"encrypted_content": ""}], ids=["none", "empty"])
def test_a_thought_without_content_stays_behind_with_its_items(lost: dict[str, Any]) -> None:
    search = {"id": "ws_1", "type": "web_search_call", "status": "completed"}
    message = parsed(thought(1, **lost), search, said("one"), called(1)).message
    body, notes = rendered(message, ToolMessage(tool_call_id="call_1", content="ok"))
    assert [item["type"] for item in body["input"]] == ["message", "function_call", "function_call_output"]
    assert not any("id" in item for item in body["input"])
    assert "without its encrypted content" in notes


def test_a_model_that_does_not_reason_gets_no_thoughts() -> None:
    message = parsed(thought(1), said("one")).message
    body, notes = rendered(USER, message, model="gpt-4o")
    assert [item.get("role") for item in body["input"]] == ["user", "assistant"]
    assert "the model does not reason" in notes
    assert items(USER, message)[1]["id"] == "rs_1", "what one model got must not be kept for another"


def test_open_reasoning_goes_back_as_it_came() -> None:
    open_thought = {
        "id": "1",
        "type": "reasoning",
        "content": [{"type": "reasoning_text", "text": "hm"}],
        "summary": [],
    }
    answer = parsed(open_thought, said("one"))
    assert items(answer.message)[0] == open_thought
    assert isinstance(part := answer.message.content[0], ReasoningPart)
    assert part.text == "hm"


def test_a_thought_goes_back_only_with_what_followed_it() -> None:
    broken_off = parsed(thought(1), status="incomplete", incomplete_details={"reason": "max_output_tokens"})
    assert broken_off.finish == "length"
    body, notes = rendered(USER, broken_off.message, USER)
    assert len(body["input"]) == 2
    assert "broke off" in notes
    kept = ReasoningPart(provider="p", data=thought(1))
    edited = AssistantMessage(content=(kept, TextPart(text="changed")))
    assert items(USER, edited)[1:] == [{"role": "assistant", "content": "changed"}]


def test_a_refusal_there_and_back() -> None:
    answer = parsed(said("", content=[{"type": "refusal", "refusal": "I won't"}]))
    assert (answer.finish, answer.message.refusal, answer.message.text) == ("refusal", "I won't", "")
    (item,) = items(answer.message)
    assert item["content"] == [{"type": "refusal", "refusal": "I won't"}]


def test_arguments_that_are_not_json_are_kept_and_wrapped() -> None:
    answer = parsed(called(1, '{"x": oops'))
    bad = answer.message.tool_calls[0]
    assert (bad.arguments, bad.raw, answer.finish) == (None, '{"x": oops', "tool_calls")
    sent = items(answer.message, ToolMessage(tool_call_id="call_1", content="no"))[0]
    assert json.loads(sent["arguments"]) == {"_invalid_json": '{"x": oops'}


def test_calls_without_ids_and_with_the_same_get_their_own() -> None:
    answer = parsed(called(1), called(1), called(2, call_id=None, id=None))
    ids = [call.id for call in answer.message.tool_calls]
    assert len(set(ids)) == 3
    assert all(ids)


def test_other_items_are_kept_whole() -> None:
    answer = parsed({"id": "cmp_1", "type": "compaction", "encrypted_content": "gAAA"}, said("x", role="user"))
    parts = [part for part in answer.message.content if isinstance(part, ProviderPart)]
    assert [part.kind for part in parts] == ["compaction", "message"]
    assert items(answer.message)[0] == {"id": "cmp_1", "type": "compaction", "encrypted_content": "gAAA"}
    odd = {"type": "message", "role": "user", "content": ["text", {"text": 3}]}
    assert items(parsed(odd).message) == [odd]


def test_citations_stay_with_the_text_they_are_about() -> None:
    cited = said("see", phase="final_answer")
    cited["content"][0]["annotations"] = [{"type": "url_citation", "url": "https://a.example", "start_index": 0}]
    message = parsed(cited).message
    assert items(message)[0]["content"][0]["annotations"] == cited["content"][0]["annotations"]
    envelope = next(part for part in message.content if isinstance(part, ProviderPart))
    changed = AssistantMessage(content=(envelope, TextPart(text="a"), TextPart(text="b")))
    assert [piece.get("annotations") for piece in items(changed)[0]["content"]] == [None, None]


# --- conversations from elsewhere -----------------------------------------------------------------------------------


def foreign(*ids: str) -> AssistantMessage:
    """An answer as another wire leaves it."""
    return AssistantMessage(
        content=(
            ReasoningPart(text="hm", provider="q", data={"type": "thinking", "signature": "s"}),
            TextPart(text="let me see"),
            ProviderPart(kind="server_tool_use", provider="q", data={"type": "server_tool_use"}),
        ),
        tool_calls=tuple(ToolCall(id=id, name="f", provider="q", data={"id": "theirs"}) for id in ids),
    )


def result(id: str, content: Any = "ok", **more: Any) -> ToolMessage:
    return ToolMessage(tool_call_id=id, name="f", content=content, **more)


def test_what_only_others_can_read_is_left_out() -> None:
    body, notes = rendered(USER, foreign("toolu_1"), result("toolu_1"))
    assert body["input"][1:] == [
        {"role": "assistant", "content": "let me see"},
        {"type": "function_call", "call_id": "toolu_1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "toolu_1", "output": "ok"},
    ]
    assert "reasoning of q was left out" in notes
    assert "server_tool_use items of q were left out: only that provider can read them" in notes


def test_another_wire_under_the_same_name() -> None:
    message = AssistantMessage(
        content=(ReasoningPart(provider="p", data={"reasoning_content": "hm"}), TextPart(text="one"))
    )
    assert items(message) == [{"role": "assistant", "content": "one"}]


def pairs(*messages: Message) -> list[tuple[str, str]]:
    """Return who says what, calls and results with their ids."""
    return [(item.get("type") or item["role"], item.get("call_id") or item["content"]) for item in items(*messages)]


CALL, RESULT = "function_call", "function_call_output"


def test_every_call_has_its_result_right_behind_it() -> None:
    bare = AssistantMessage(tool_calls=(ToolCall(id="a", name="f"), ToolCall(id="b", name="f")))
    told = [(CALL, "a"), (CALL, "b"), (RESULT, "a"), (RESULT, "b"), ("user", "hi")]
    assert pairs(bare, result("a"), result("b"), USER) == told
    assert pairs(bare, USER, result("a"), result("b")) == told
    assert pairs(bare, result("a"), USER) == told
    assert pairs(bare)[:4] == told[:4]
    assert "without a result" in rendered(bare, result("a"))[1]
    assert pairs(bare, result("b"), result("a")) == told[:4]


def test_results_without_a_call_become_text() -> None:
    title = "The result of f (call gone), whose call is not shown:\n"
    assert pairs(result("gone", "12 degrees"), USER) == [("user", f"{title}12 degrees"), ("user", "hi")]
    bare = AssistantMessage(tool_calls=(ToolCall(id="a", name="f"),))
    twice = pairs(bare, result("a"), result("a", "again"))
    assert twice == [(CALL, "a"), (RESULT, "a"), ("user", f"{title}again".replace("gone", "a"))]
    assert "not in the conversation" in rendered(result("gone"))[1]


def test_ids_that_are_counted_anew_each_turn_are_told_apart() -> None:
    turn = (foreign("call_0"), result("call_0"))
    ids = [id for kind, id in pairs(USER, *turn, *(m.model_copy() for m in turn), USER) if kind in (CALL, RESULT)]
    assert len(ids) == 4
    assert ids[0] == ids[1] != ids[2] == ids[3]


def test_ids_that_are_too_long_are_shortened_alike() -> None:
    long, other = "x" * 65, "x" * 66
    found = [id for kind, id in pairs(foreign(long, other), result(long), result(other)) if kind in (CALL, RESULT)]
    assert max(len(id) for id in found) <= 64
    assert found[:2] == found[2:]
    assert len(set(found)) == 2


def test_images_and_errors() -> None:
    data, url = ImagePart(data="AAAA", media_type="image/jpeg"), ImagePart(url="https://a.example/i.png")
    user = UserMessage(content=(TextPart(text="what is it?"), data, url))
    bare = AssistantMessage(tool_calls=(ToolCall(id="a", name="f"), ToolCall(id="b", name="f")))
    asked, _, _, shown, failed = items(
        user, bare, result("a", (TextPart(text="here"), data)), result("b", "no such file", is_error=True)
    )
    picture = {"type": "input_image", "image_url": "data:image/jpeg;base64,AAAA", "detail": "auto"}
    assert asked["content"] == [
        {"type": "input_text", "text": "what is it?"},
        picture,
        {**picture, "image_url": "https://a.example/i.png"},
    ]
    assert shown["output"] == [{"type": "input_text", "text": "here"}, picture]
    assert failed["output"] == "Error: no such file"
    assert "images in system and assistant messages" in rendered(AssistantMessage(content=(data,)))[1]


def test_messages_are_written_once() -> None:
    conversation: list[Message] = [USER, parsed(thought(1), called(1)).message, result("call_1")]
    first = WIRE.render(ModelRequest(conversation), "gpt-5.2", stream=False).body

    def again(message: object) -> bytes:
        raise AssertionError(f"{message} is written a second time")

    key = "openai-responses/p"
    keys = [key, f"{key}\0call_1", f"{key}\0call_1"]
    kept = [message.rendered(key, again) for message, key in zip(conversation, keys, strict=True)]
    assert b",".join(kept) in first


def test_text_that_is_no_unicode_does_not_stop_a_request() -> None:
    assert items(UserMessage(content="a\ud800b"))[0]["content"] == "a?b"


# --- streams --------------------------------------------------------------------------------------------------------


def event(kind: str, number: int | None = None, **data: Any) -> bytes:
    payload = {"type": kind, **data} if number is None else {"type": kind, **data, "sequence_number": number}
    return f"event: {kind}\ndata: {json.dumps(payload, ensure_ascii=False)}\n\n".encode()


def numbered(*events: tuple[str, dict[str, Any]]) -> list[bytes]:
    return [event(kind, number, **data) for number, (kind, data) in enumerate(events)]


def begun(output: int, item: dict[str, Any], **empty: Any) -> tuple[str, dict[str, Any]]:
    return "response.output_item.added", {"output_index": output, "item": {**item, **empty}}


def done(output: int, item: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return "response.output_item.done", {"output_index": output, "item": item}


def delta(output: int, kind: str, text: str) -> tuple[str, dict[str, Any]]:
    return f"response.{kind}.delta", {"output_index": output, "content_index": 0, "delta": text}


CREATED = ("response.created", {"response": response(status="in_progress", usage=None)})
WHOLE = [thought(1), said("Héllo"), called(1, '{"x": 1}'), called(2, '{"y":2}')]
EVENTS: list[tuple[str, dict[str, Any]]] = [
    CREATED,
    ("response.in_progress", CREATED[1]),
    begun(0, WHOLE[0], encrypted_content=""),
    done(0, WHOLE[0]),
    begun(1, WHOLE[1], content=[]),
    ("response.content_part.added", {"output_index": 1, "part": {"type": "output_text", "text": ""}}),
    delta(1, "output_text", "Hé"),
    delta(1, "output_text", "llo"),
    ("response.output_text.done", {"output_index": 1, "text": "Héllo"}),
    done(1, WHOLE[1]),
    begun(2, WHOLE[2], arguments=""),
    begun(3, WHOLE[3], arguments=""),
    delta(2, "function_call_arguments", '{"x"'),
    delta(3, "function_call_arguments", '{"y":2}'),
    delta(2, "function_call_arguments", ": 1}"),
    done(2, WHOLE[2]),
    done(3, WHOLE[3]),
    ("response.something.new", {"of": "tomorrow"}),
    ("response.completed", {"response": response(*WHOLE)}),
]


def read(pieces: Sequence[bytes]) -> tuple[Answer, str, Stream]:
    stream = WIRE.stream("d")
    text = "".join([stream.feed(piece) for piece in pieces])
    return stream.close(), text, stream


def test_a_stream_is_the_same_however_it_is_split() -> None:
    whole = b": keep-alive\n\n" + b"".join(numbered(*EVENTS)).replace(b"\n", b"\r\n")
    expected, text, stream = read([whole])
    assert expected == parsed(*WHOLE)
    assert (text, stream.done, stream.finished) == ("Héllo", True, True)
    for seed in range(30):
        cuts = sorted(random.Random(seed).sample(range(1, len(whole)), 40))
        split = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
        answer, text, other = read(split)
        assert (answer, text, other.progress) == (expected, "Héllo", stream.progress)
    assert read([bytes([byte]) for byte in whole])[0] == expected


def test_a_stream_that_is_cut_anywhere_is_no_answer() -> None:
    raw = b"".join(numbered(*EVENTS))
    assert whole_before(WIRE, raw, raw.rindex(b"}"), step=7) == []


def test_progress_is_output_and_nothing_else() -> None:
    stream = WIRE.stream("d")
    counts: list[int] = []
    for piece in numbered(*EVENTS):
        stream.feed(piece)
        counts.append(stream.progress)
        assert stream.finished == (len(counts) == len(EVENTS))
    assert counts == [0, 0, 0, 1, 1, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11, 11]


def test_a_providers_own_tool_at_work_is_progress() -> None:
    stream = WIRE.stream("d")
    stream.feed(event("response.web_search_call.searching", 0, output_index=0, item_id="ws_1"))
    assert stream.progress == 1


@pytest.mark.parametrize("output", [[], WHOLE[:1]], ids=["no items", "fewer items"])
def test_the_end_may_leave_out_what_was_sent(output: list[dict[str, Any]]) -> None:
    end = ("response.completed", {"response": response(*output)})
    assert read(numbered(*EVENTS[:-1], end))[0] == parsed(*WHOLE)


def test_items_that_were_never_sent_whole_are_put_together() -> None:
    pieces = [piece for piece in EVENTS[:-1] if not piece[0].endswith(".done")]
    end = ("response.completed", {"response": response()})
    answer, _, _ = read(numbered(*pieces, end))
    assert answer.message.text == "Héllo"
    assert [call.arguments for call in answer.message.tool_calls] == [{"x": 1}, {"y": 2}]


def test_text_that_no_delta_brought_comes_with_the_end() -> None:
    start, end = EVENTS[:7], EVENTS[-1]
    assert read(numbered(*start, end))[1] == "Héllo"
    assert read(numbered(CREATED, end))[1] == "Héllo"


def test_events_without_numbers_or_with_the_same_are_read() -> None:
    expected = parsed(*WHOLE)
    assert read([event(kind, None, **data) for kind, data in EVENTS])[0] == expected
    assert read([event(kind, -1, **data) for kind, data in EVENTS])[0] == expected
    assert read([event(kind, number + 1, **data) for number, (kind, data) in enumerate(EVENTS)])[0] == expected
    assert read([*numbered(*EVENTS), b"data: [DONE]\n\n"])[0] == expected
    assert read([b"".join(numbered(*EVENTS)).rstrip()])[0] == expected, "the last blank line is missing"


PIECES = numbered(*EVENTS)


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        PIECES[:-1],
        [*PIECES[:-1], b"data: [DONE]\n\n"],
        [*PIECES[:7], *PIECES[8:]],
        PIECES[3:],
        [*PIECES[:7], b'data: {"type": "resp\n\n'],
        [*PIECES[:7], b"data: 5\n\n"],
        [event("response.completed", 0)],
        [event("response.completed", 0, response={"output": "text"})],
        [event("response.output_item.done", 0, item=called(1))],
        [event("response.output_item.added", 0, output_index=0, item=7)],
    ],
    ids=[
        "empty",
        "cut",
        "done without an end",
        "an event lost",
        "the beginning lost",
        "malformed",
        "no object",
        "no response",
        "bad output",
        "no index",
        "bad item",
    ],
)
def test_broken_streams(pieces: list[bytes]) -> None:
    with pytest.raises(StreamBroken):
        read(pieces)


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        (event("error", 1, code="server_is_overloaded", message="busy", param=None), "Overloaded"),
        (event("error", 1, error={"code": "context_length_exceeded", "message": "too long"}), "ContextLength"),
        (event("error", 1, error={"type": "invalid_request_error", "message": "no"}), "InvalidRequest"),
        (b"event: error\ndata: gone\n\n", "ServerError"),
        (b'data: {"error": {"code": 429, "message": "slow"}}\n\n', "RateLimited"),
        (
            event("response.failed", 1, response=response(status="failed", error={"code": "server_error"})),
            "ServerError",
        ),
        (
            event("response.failed", 1, response=response(status="failed", error={"code": "rate_limit_exceeded"})),
            "RateLimited",
        ),
        (
            event("response.failed", 1, response=response(error={"type": "invalid_request_error", "code": "x"})),
            "InvalidRequest",
        ),
        (
            event("response.failed", 1, response=response(status="failed", error={"code": "image_too_large"})),
            "InvalidRequest",
        ),
        (event("response.failed", 1, response=response(status="failed")), "ServerError"),
        (event("response.completed", 1, response=response()), "ServerError"),
    ],
)
def test_an_error_in_a_stream_has_the_class_of_its_code(piece: bytes, kind: str) -> None:
    with pytest.raises(ModelError) as caught:
        read([PIECES[0], piece])
    assert type(caught.value).__name__ == kind


# --- whole answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "finish"),
    [("max_output_tokens", "length"), ("content_filter", "content_filter"), ("because", "other"), (None, "other")],
)
def test_incomplete_answers(reason: str | None, finish: str) -> None:
    more: dict[str, Any] = {"status": "incomplete", "incomplete_details": {"reason": reason} if reason else None}
    answer = parsed(said("x"), **more)
    assert answer.finish == finish
    assert bool(answer.notes) == (finish == "other")
    streamed = event("response.incomplete", 0, response=response(said("x"), **more))
    assert read([streamed])[0] == answer
    assert parsed(**{**more, "usage": None}).usage is None


@pytest.mark.parametrize(
    "body",
    [
        b"<html>bad gateway</html>",
        b'{"output": [{"ty',
        b"{}",
        b"[]",
        b'{"object": "response.input_tokens", "input_tokens": 3}',
        json.dumps(response()).encode(),
        json.dumps(response(said("x"), status="in_progress")).encode(),
        json.dumps(response(status="failed")).encode(),
        json.dumps(response({"type": "message"})).encode(),
        b'{"output": ["text"]}',
    ],
)
def test_what_is_no_answer_is_the_servers_error(body: bytes) -> None:
    with pytest.raises(ServerError):
        WIRE.parse(body, "d")


def test_an_error_with_status_200_has_the_class_of_its_code() -> None:
    with pytest.raises(ModelError) as caught:
        WIRE.parse(json.dumps(response(status="failed", error={"code": "insufficient_quota"})).encode(), "d")
    assert type(caught.value).__name__ == "QuotaExhausted"
