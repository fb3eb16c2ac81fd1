"""Canonical messages: plain mappings in, JSON out and back, nothing validated or rendered twice."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from ridethrough.runtime.router.messages import (
    AssistantMessage,
    ImagePart,
    Message,
    ModelRequest,
    ModelResponse,
    ReasoningPart,
    TextPart,
    ToolCall,
    ToolMessage,
    ToolSpec,
    Usage,
    UserMessage,
    estimate_tokens,
)
from ridethrough.runtime.router.providers.openai_chat import OpenAIChat


def conversation() -> list[Message]:
    return [
        UserMessage(content=(TextPart(text="look"), ImagePart(data="aGk=", media_type="image/jpeg"))),
        AssistantMessage(
            content=(ReasoningPart(text="hm", provider="p", data={"reasoning_content": "hm"}), TextPart(text="so")),
            tool_calls=(
                ToolCall(id="1", name="f", arguments={"a": 1}),
                ToolCall(id="2", name="f", arguments=None, raw="{"),
            ),
        ),
        ToolMessage(tool_call_id="1", name="f", content="r"),
    ]


def test_plain_mappings_are_taken() -> None:
    request = ModelRequest(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "x"},
        ],
        tools=[{"name": "f"}],
    )
    assert [message.role for message in request.messages] == ["system", "user", "assistant", "tool"]
    assert request.messages[1].text == "hi"


def test_a_wrong_message_is_refused() -> None:
    with pytest.raises(ValidationError):
        ModelRequest([{"role": "wizard", "content": "x"}])
    with pytest.raises(ValidationError):
        ImagePart(url="https://example.org/x.png", data="aGk=")


def test_json_round_trip() -> None:
    request = ModelRequest(conversation(), tools=[ToolSpec(name="f")], output_schema={"type": "object"}, max_tokens=5)
    assert ModelRequest.model_validate_json(request.model_dump_json()) == request
    message = AssistantMessage(content="hi", tool_calls=(ToolCall(id="1", name="f"),))
    response = ModelResponse(message=message, finish="tool_calls", usage=Usage(input_tokens=3), cost_usd=0.1)
    again = ModelResponse.model_validate_json(response.model_dump_json())
    assert again == response
    assert (again.text, again.tool_calls[0].arguments) == ("hi", {})


def test_a_place_among_calls_is_only_told_where_there_is_one() -> None:
    parts = (TextPart(text="a"), TextPart(text="b", after_calls=1))
    message = AssistantMessage(content=parts, tool_calls=(ToolCall(id="1", name="f"),))
    told = message.model_dump(exclude_defaults=True)["content"]
    assert told == ({"text": "a"}, {"text": "b", "after_calls": 1})
    assert AssistantMessage.model_validate_json(message.model_dump_json()) == message


def test_canonical_messages_are_kept_as_they_are() -> None:
    messages = conversation()
    request = ModelRequest(messages)
    assert all(kept is given for kept, given in zip(request.messages, messages, strict=True))


def test_a_message_is_rendered_once_and_stays_equal() -> None:
    message = UserMessage(content="hi")
    calls: list[int] = []

    def render(_: object) -> bytes:
        calls.append(1)
        return b"x"

    assert message.rendered("w", render) == message.rendered("w", render) == b"x"
    assert len(calls) == 1
    assert message == UserMessage(content="hi")
    copy = message.model_copy(update={"content": "other"})
    assert copy.rendered("w", lambda _: b"y") == b"y"


def test_another_providers_reasoning_is_left_out_with_a_note() -> None:
    request = ModelRequest([*conversation(), ToolMessage(tool_call_id="2", name="f", content="no JSON", is_error=True)])
    own = OpenAIChat("p").render(request, "m", stream=False)
    other = OpenAIChat("q").render(request, "m", stream=False)
    assert b'"reasoning_content":"hm"' in own.body
    assert own.notes == ()
    assert b"reasoning_content" not in other.body
    assert "reasoning of p was left out" in other.notes[0]


def test_usage_adds_up() -> None:
    total = Usage(input_tokens=1, output_tokens=2) + Usage(input_tokens=3, cached_tokens=2, reasoning_tokens=1)
    assert total == Usage(input_tokens=4, output_tokens=2, cached_tokens=2, reasoning_tokens=1)


def test_tokens_are_estimated() -> None:
    assert estimate_tokens("") == 0
    assert estimate_tokens("a") == 1
    assert estimate_tokens("a" * 400) == 100
    tides = "潮の満ち引き" * 50
    assert UserMessage(content=tides).tokens == UserMessage(content=(TextPart(text=tides),)).tokens
    assert UserMessage(content=tides).tokens >= estimate_tokens(tides) == 225
