"""The Chat Completions wire, byte by byte, and the meaning of errors."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ridethrough.runtime import errors
from ridethrough.runtime.errors import ModelError, ServerError, StreamBroken
from ridethrough.runtime.router.errors import TABLE, Rule, classify
from ridethrough.runtime.router.messages import ModelRequest, ToolSpec
from ridethrough.runtime.router.providers.openai_chat import OpenAIChat, Quirks, quirks_of
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


# --- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (429, {"error": {"type": "tokens", "code": "rate_limit_exceeded"}}, errors.RateLimited),
        (429, {"error": {"type": "insufficient_quota", "code": "insufficient_quota"}}, errors.QuotaExhausted),
        (429, {"error": {"code": "project_spend_limit_exceeded"}}, errors.QuotaExhausted),
        (429, {"error": {"code": "slow_down"}}, errors.RateLimited),
        (503, {"error": {"code": "slow_down"}}, errors.Overloaded),
        (503, {"error": {"code": "server_is_overloaded"}}, errors.Overloaded),
        (529, {"type": "error", "error": {"type": "overloaded_error"}}, errors.Overloaded),
        (498, {"error": {"code": "capacity_exceeded"}}, errors.RateLimited),
        (402, {"error": {"code": 402, "message": "credits"}}, errors.QuotaExhausted),
        (
            402,
            {"error": {"code": 402, "metadata": {"limit_source": "openrouter_in_flight_budget"}}},
            errors.RateLimited,
        ),
        (413, {"error": {"code": "rate_limit_exceeded", "type": "tokens"}}, errors.ContextLength),
        (400, {"error": {"code": "context_length_exceeded"}}, errors.ContextLength),
        (
            400,
            {"object": "error", "message": "This model's maximum context length is 8", "code": 400},
            errors.ContextLength,
        ),
        (400, {"error": {"code": "content_filter", "innererror": {"code": "x"}}}, errors.ContentFilter),
        (400, {"error": {"message": "Your credit balance is too low"}}, errors.QuotaExhausted),
        (401, {"error": {"code": "invalid_api_key"}}, errors.Auth),
        (403, "Forbidden", errors.Auth),
        (404, {"error": {"code": "model_not_found"}}, errors.InvalidRequest),
        (422, {"detail": "nope"}, errors.InvalidRequest),
        (500, "", errors.ServerError),
        (502, "<html>", errors.ServerError),
        (503, {"error": "server busy, please try again."}, errors.Overloaded),
        (504, None, errors.ServerError),
        (429, "Too many tokens for team", errors.RateLimited),
        (429, [{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED"}}], errors.RateLimited),
        (
            429,
            {"error": {"status": "RESOURCE_EXHAUSTED", "details": [{"violations": [{"quotaId": "RequestsPerDay"}]}]}},
            errors.QuotaExhausted,
        ),
        (200, {"error": {"message": json.dumps({"error": {"code": 503, "message": "x"}})}}, errors.Overloaded),
    ],
)
def test_classification(status: int, body: Any, kind: type[ModelError]) -> None:
    assert type(classify(status, body)) is kind


@pytest.mark.parametrize(
    ("headers", "message", "wait"),
    [
        ({"Retry-After-Ms": "1500", "Retry-After": "9"}, "", 1.5),
        ({"retry-after": "0.5"}, "", 0.5),
        ({"retry-after": "0"}, "try again in 9s", 0),
        ({"retry-after": "Thu, 01 Jan 2026 00:01:00 GMT"}, "", 60),
        ({"retry-after": "-1"}, "", None),
        ({"retry-after": "soon"}, "", None),
        ({"retry-after": "99999999"}, "", None),
        ({}, "Please try again in 5.289s.", 5.289),
        ({}, "Please try again in 174ms. Visit", 0.174),
        ({}, "Please try again in 1m2.5s.", 62.5),
        ({}, "Please retry after 37 seconds.", 37),
        ({}, "Please retry in 58.934310785s.", 58.934310785),
        ({}, "", None),
    ],
)
def test_how_long_to_wait(headers: dict[str, str], message: str, wait: float | None) -> None:
    error = classify(429, {"error": {"message": message}}, headers, now=1767225600)
    assert error.retry_after == pytest.approx(wait) if wait is not None else error.retry_after is None


def test_a_retry_delay_in_the_details() -> None:
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34s"}]
    assert classify(429, {"error": {"status": "RESOURCE_EXHAUSTED", "details": details}}).retry_after == 34


def test_the_table_can_be_extended() -> None:
    mine = Rule(errors.Overloaded, names=frozenset({"queue_full"}))
    body = {"error": {"code": "queue_full"}}
    assert type(classify(400, body)) is errors.InvalidRequest
    assert type(classify(400, body, table=(mine, *TABLE))) is errors.Overloaded


# --- what providers really sent -------------------------------------------------------------------------------------

CORPUS = Path(__file__).parents[3] / "shared" / "corpus"

QUOTED = {
    "anthropic-400-input-plus-max-tokens": "ContextLength",
    "anthropic-429-rate-limit-via-openai-compat": "RateLimited",
    "anthropic-529-overloaded": "Overloaded",
    "azure-400-content-filter": "ContentFilter",
    "gemini-429-quota-no-retryinfo": "RateLimited",
    "gemini-429-retryinfo": "RateLimited",
    "gemini-503-high-demand": "Overloaded",
    "groq-413-too-large": "ContextLength",
    "openai-429-insufficient-quota": "QuotaExhausted",
    "openai-429-tpm-174ms": "RateLimited",
    "openai-429-tpm-o4-mini": "RateLimited",
    "openai-compat-stream-error-empty-choices": "ServerError",
    "openrouter-stream-error-chunk": "ServerError",
    "stream-cut-mid-tool-call": "StreamBroken",
    "xai-429-team-limit": "RateLimited",
}


def recorded() -> Iterable[tuple[str, dict[str, Any]]]:
    for path in sorted(CORPUS.glob("*/*.json")):
        case = json.loads(path.read_text())
        url = (case.get("request") or {}).get("url") or ""
        if "chat/completions" in url or path.stem in QUOTED:
            yield f"{path.parent.name}/{path.stem}", case


def outcome(response: dict[str, Any]) -> Answer | ModelError:
    if response["status"] >= 400:
        return classify(response["status"], response.get("body"), response["headers"])
    raw = response.get("sse", "").encode()
    try:
        if not raw:
            return WIRE.parse(json.dumps(response["body"]).encode(), "d")
        return read(*(raw[start : start + 97] for start in range(0, len(raw), 97)))
    except ModelError as error:
        return error


def check(name: str, response: dict[str, Any]) -> None:
    raw = response.get("sse") or json.dumps(response.get("body"))
    answer = outcome(response)
    expected = QUOTED.get(name.partition("/")[2])
    if isinstance(answer, ModelError):
        assert expected in (None, type(answer).__name__), name
        assert response["status"] >= 400 or '"error"' in raw or expected, f"{name}: {answer}"
        return
    assert expected is None, name
    said = answer.message.text or answer.message.tool_calls or answer.message.content or answer.message.refusal
    assert said or answer.finish == "content_filter", name
    assert answer.finish != "other", name
    assert all(c.name and c.arguments is not None for c in answer.message.tool_calls), name
    assert answer.usage is not None or '"prompt_tokens"' not in raw, name


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the folder of recorded provider traffic is not here")
def test_recorded_traffic() -> None:
    cases = list(recorded())
    for name, case in cases:
        check(name, case["response"])
    assert len(cases) > 60
