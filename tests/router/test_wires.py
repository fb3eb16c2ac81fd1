"""One suite for every wire: any conversation is written validly, moves between providers, and its answers come back.

What a body must look like is checked by the readers in ``kits``.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from tests.router.kits import LOOK, PAIRS, PIXEL, WIRES, Kit, began, read_chat, results, sse

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
    UserMessage,
)
from ridethrough.runtime.router.providers.anthropic import AnthropicMessages
from ridethrough.runtime.router.providers.gemini import GeminiGenerate
from ridethrough.runtime.router.providers.openai_chat import DIALECTS, OpenAIChat
from ridethrough.runtime.router.providers.openai_responses import OpenAIResponses
from ridethrough.runtime.router.providers.wire import Answer

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
    sketch, _, notes = WIRES[name].sketch("p", ModelRequest(talk, tools=[LOOK]))
    assert len(sketch.calls) == len(sketch.results) == 3
    got = [dict(sketch.results)[call[0]] for call in sketch.calls]
    assert [
        text for text, expected in zip(got, ("too late", "seen", "no result"), strict=True) if expected not in text
    ] == []
    assert "never mind" in sketch.text
    assert "The result of look (call c9), whose call is not shown:\nnobody asked for this" in sketch.text
    mended = ("tool calls without a result were answered", "results of tool calls that are not in the conversation")
    assert [note for note in mended if note not in " ".join(notes)] == []


@pytest.mark.parametrize("name", WIRES)
def test_images_and_failures_without_a_call_are_not_lost(name: str) -> None:
    stray = ToolMessage(content=(TextPart(text="no"), ImagePart(data=PIXEL)), tool_call_id="c9", is_error=True)
    sketch, _, _ = WIRES[name].sketch("p", ModelRequest([UserMessage(content="hi"), stray]))
    assert "The result of a tool (call c9), whose call is not shown:\nError: no" in sketch.text
    assert [image for image in sketch.images if PIXEL in image]


@pytest.mark.parametrize("name", WIRES)
def test_ids_are_made_unique_and_the_same_in_every_turn(name: str) -> None:
    """Some providers count their calls anew in each turn, and some give one id to two calls, or none."""

    def turn(number: int) -> list[Message]:
        calls = tuple(ToolCall(id=id, name="look", arguments={"n": number}) for id in ("functions.look:0", "", ""))
        return [
            AssistantMessage(tool_calls=calls),
            *(ToolMessage(content=f"{number}.{n}", tool_call_id=call.id) for n, call in enumerate(calls)),
        ]

    talk: list[Message] = [UserMessage(content="hi"), *turn(0), *turn(1)]
    sketch, _, notes = WIRES[name].sketch("p", ModelRequest(talk, tools=[LOOK]))
    ids = [call[0] for call in sketch.calls]
    assert len(set(ids)) == 6
    assert [id for id, _ in sketch.results] == ids
    assert [
        n
        for n, (_, text) in zip(("0.0", "0.1", "0.2", "1.0", "1.1", "1.2"), sketch.results, strict=True)
        if n not in text
    ] == []
    assert notes == ()
    more, _, _ = WIRES[name].sketch("p", ModelRequest([*talk, *turn(2)], tools=[LOOK]))
    assert [call[0] for call in more.calls][:6] == ids


@pytest.mark.parametrize("name", WIRES)
def test_an_image_in_an_address_is_the_image(name: str) -> None:
    address = f"data:image/png;charset=utf-8;base64,{PIXEL}"
    talk = [UserMessage(content=(ImagePart(url=address), ImagePart(data=PIXEL)))]
    sketch, _, notes = WIRES[name].sketch("p", ModelRequest(talk))
    assert [image.rpartition(",")[2] for image in sketch.images] == [PIXEL, PIXEL]
    assert notes == ()


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("arguments", [{"at": float("nan")}, {"at": [float("inf")]}])
def test_arguments_that_json_has_not_go_back_wrapped(name: str, arguments: dict[str, Any]) -> None:
    call = ToolCall(id="c1", name="look", arguments=arguments)
    talk: list[Message] = [
        UserMessage(content="hi"),
        AssistantMessage(tool_calls=(call,)),
        ToolMessage(content="no", tool_call_id="c1"),
    ]
    sketch, raw, _ = WIRES[name].sketch("p", ModelRequest(talk, tools=[LOOK]))
    assert list(sketch.calls[0][2]) == ["_invalid_json"]
    assert json.loads(raw, parse_constant=pytest.fail)


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


TRIFLES = ("message", "annotations", "citations", "search_results", "groundingMetadata", "citationMetadata")


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("kind", TRIFLES)
def test_nothing_is_said_about_what_nobody_misses(name: str, kind: str) -> None:
    item = ProviderPart(kind=kind, provider="a", data={"type": kind, kind: [{"url": "planted-item"}]})
    talk: list[Message] = [
        UserMessage(content="hi"),
        AssistantMessage(content=(item, TextPart(text="found"))),
        UserMessage(content="so?"),
    ]
    sketch, raw, notes = WIRES[name].sketch("b", ModelRequest(talk))
    assert "planted-item" not in raw
    assert "found" in sketch.text
    assert notes == ()


@pytest.mark.parametrize("name", WIRES)
def test_texts_keep_their_places_among_the_calls(name: str) -> None:
    """All but Chat Completions, whose messages have one text, before their calls."""
    calls = tuple(ToolCall(id=f"c{n}", name="look", arguments={"at": f"at-{n}"}) for n in range(2))
    said = (TextPart(text="said-0"), TextPart(text="said-1", after_calls=1), TextPart(text="said-2", after_calls=2))
    talk: list[Message] = [
        UserMessage(content="hi"),
        AssistantMessage(content=said, tool_calls=calls),
        *(ToolMessage(content="seen", tool_call_id=call.id, name="look") for call in calls),
    ]
    _, raw, notes = WIRES[name].sketch("p", ModelRequest(talk, tools=[LOOK]))
    apart = ["said-0", "at-0", "said-1", "at-1", "said-2"]
    if name == "openai":
        apart.sort(key=lambda each: each.startswith("at"))
    assert re.findall(r"(?:said|at)-\d", raw) == apart
    assert notes == ()


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
