"""What comes when servers, proxies and lines break: a model's error by its class, and never half an answer.

Answers and streams are cut at every byte and mutated at random (with fixed seeds) on every wire.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from tests.router.kits import WIRES, Kit, sse, whole_before

from ridethrough.runtime.errors import InvalidRequest, ModelError, StreamBroken
from ridethrough.runtime.router.errors import classify
from ridethrough.runtime.router.providers.wire import Answer

MARK = "Grüße☕"


def read(kit: Kit, raw: bytes) -> Answer:
    stream = kit.open("p").stream("d")
    stream.feed(raw)
    return stream.close()


# --- cut at every byte ----------------------------------------------------------------------------------------------


def as_events(kit: Kit) -> bytes:
    return kit.stream(MARK).encode()


def as_events_of_another_line_end(kit: Kit) -> bytes:
    return as_events(kit).replace(b"\n", b"\r\n")


def as_events_between_comments(kit: Kit) -> bytes:
    return as_events(kit).replace(b"data: ", b": still here\n\ndata:")


def as_an_array(kit: Kit) -> bytes:
    chunks = [json.loads(event.removeprefix("data: ")) for event in kit.stream(MARK).split("\n\n") if event]
    return json.dumps(chunks, indent=1, ensure_ascii=False).encode()


FRAMES: list[tuple[str, Callable[[Kit], bytes]]] = [
    (name, frame) for name in WIRES for frame in (as_events, as_events_of_another_line_end, as_events_between_comments)
]
FRAMES.append(("gemini", as_an_array))


@pytest.mark.parametrize(("name", "frame"), FRAMES)
def test_a_stream_that_is_cut_anywhere_before_its_end_is_no_answer(name: str, frame: Callable[[Kit], bytes]) -> None:
    kit = WIRES[name]
    raw, whole = frame(kit), kit.reply("p", MARK).message
    first = raw.index(kit.end.encode())
    assert len(whole.tool_calls) == 2
    assert whole_before(kit.open("p"), raw, first) == []
    for size in range(first, len(raw)):  # the chunk that says so may be whole here, or not yet
        assert outcome(kit, raw[:size]) in (whole, None)
    assert read(kit, raw).message == whole


def outcome(kit: Kit, raw: bytes) -> Any:
    try:
        return read(kit, raw).message
    except StreamBroken:
        return None


# --- mutated --------------------------------------------------------------------------------------------------------

ODD: list[Any] = [
    *(None, True, False, 0, -1, 3, 1e308, float("inf"), float("nan"), 10**40),
    *("", "x", "\ud800", "error", "[DONE]", '{"error": 1}', "[1", "²", "503", "9" * 5000),
    *([], [[]], [None], ["x"], {}, {"a": {}}, {"type": "error"}, [{"type": 7}], [{"index": 1}]),
    *({"error": {"message": '{"error": {"code": 5}}'}}, {"error": {"details": [{"violations": 7}]}}),
]
"""What servers send in the place of something else, and some things that none has sent so far."""


def mutated(value: Any, rng: random.Random) -> Any:
    """Return ``value`` with up to three of its parts replaced, left out, repeated or added."""
    hurt = copied(value)
    for _ in range(rng.randrange(1, 4)):
        holders = [each for each in containers(hurt) if each]
        if holders:
            hurt_in(rng.choice(holders), rng)
    return hurt if rng.random() < 0.97 else copied(rng.choice(ODD))


def hurt_in(holder: Any, rng: random.Random) -> None:
    key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    match rng.randrange(4):
        case 0:
            holder[key] = copied(rng.choice(ODD))
        case 1:
            del holder[key]
        case 2 if isinstance(holder, list):
            holder.insert(key, copied(rng.choice([holder[key], *ODD])))
        case 2:
            holder[rng.choice(["error", "type", "status", "index", "id"])] = copied(rng.choice(ODD))
        case _:
            holder[key] = copied(rng.choice(list(containers(holder))))


def containers(value: Any) -> Iterator[Any]:
    """Yield every object and list in a JSON value."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


def copied(value: Any) -> Any:
    return json.loads(json.dumps(value))


def verdict(read_it: Callable[[bytes], Answer], raw: bytes) -> str:
    """Return the class of the model's error that reading raises, or that it raises none."""
    try:
        read_it(raw)
    except ModelError as error:
        return type(error).__name__ if len(str(error)) < 2000 else "an error without end"
    return "read"


@pytest.mark.parametrize("name", WIRES)
def test_a_mutated_answer_is_read_or_a_models_error(name: str) -> None:
    kit, rng = WIRES[name], random.Random(1)
    wire, whole = kit.open("p"), kit.answer("one")
    seen = Counter[str]()
    for _ in range(1200):
        body = json.dumps(mutated(whole, rng)).encode()
        seen[verdict(partial(wire.parse, deployment="d"), body)] += 1
    assert seen.keys() >= {"read", "ServerError"}
    assert seen.keys().isdisjoint({"StreamBroken", "an error without end"})


@pytest.mark.parametrize("name", WIRES)
def test_a_mutated_stream_is_read_or_a_models_error(name: str) -> None:
    kit, rng = WIRES[name], random.Random(2)
    events = [event.partition("data: ")[::2] for event in kit.stream("one").split("\n\n") if event]
    seen = Counter[str]()
    for _ in range(1200):
        hurt = rng.randrange(len(events))
        written = [
            (head, mutated_text(data, rng) if number == hurt else data) for number, (head, data) in enumerate(events)
        ]
        if rng.random() < 0.2:
            rng.shuffle(written)
        raw = "".join(f"{head}data: {data}\n\n" for head, data in written).encode()
        seen[verdict(partial(read, kit), raw)] += 1
    assert seen.keys() >= {"read", "StreamBroken"}
    assert "an error without end" not in seen


def mutated_text(data: str, rng: random.Random) -> str:
    return data if data == "[DONE]" else json.dumps(mutated(json.loads(data), rng))


@pytest.mark.parametrize("name", WIRES)
def test_hurt_bytes_are_read_or_a_models_error(name: str) -> None:
    kit, rng = WIRES[name], random.Random(3)
    whole = json.dumps(kit.answer(MARK)).encode()
    readers: list[tuple[bytes, Callable[[bytes], Answer]]] = [
        (whole, partial(kit.open("p").parse, deployment="d")),
        (as_events(kit), partial(read, kit)),
    ]
    for raw, read_it in readers:
        for _ in range(500):
            hurt = bytearray(raw)
            for _ in range(rng.randrange(1, 6)):
                at = rng.randrange(len(hurt))
                hurt[at : at + rng.randrange(3)] = rng.choices(b'{}[]",:0n \n\x00\xff\r', k=rng.randrange(3))
            assert verdict(read_it, bytes(hurt)) != "an error without end"


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("depth", [200, 330, 5000])
def test_what_is_nested_deeply_is_a_models_error(name: str, depth: int) -> None:
    kit = WIRES[name]
    for piece in ('{"error":', "[", '{"error":{"metadata":{"raw":'):
        body = piece * depth + "1" + "".join({"{": "}", "[": "]"}.get(each, "") for each in reversed(piece * depth))
        with pytest.raises(ModelError):
            kit.open("p").parse(body.encode(), "d")
        with pytest.raises(ModelError):
            read(kit, f"data: {body}\n\n".encode())


def test_a_mutated_error_has_a_class() -> None:
    rng = random.Random(4)
    bodies = [kit.overloaded for kit in WIRES.values()]
    metadata = {"raw": "{}", "reasons": [1], "limit_source": "x"}
    bodies.append({"error": {"code": 429, "message": "Limit 5, requested " + "9" * 5000, "metadata": metadata}})
    violation = {"violations": [{"quotaId": "RequestsPerDay"}], "reason": "x"}
    bodies.append({"error": {"status": "RESOURCE_EXHAUSTED", "details": [violation, {"retryDelay": "34s"}]}})
    for _ in range(2000):
        error = classify(rng.choice([200, 400, 429, 500, None]), mutated(rng.choice(bodies), rng))
        assert error.retry_after is None or 0 <= error.retry_after <= 7 * 86400


# --- errors that are also built-in ones -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", WIRES)
def test_a_refusal_with_status_200_is_not_taken_for_a_broken_answer(name: str) -> None:
    """``InvalidRequest`` is a ``ValueError`` too, as is what reading a broken answer raises."""
    kit = WIRES[name]
    with pytest.raises(InvalidRequest):
        kit.open("p").parse(json.dumps(kit.refused.get("response", kit.refused)).encode(), "d")
    for before in ("", kit.silent):
        with pytest.raises(InvalidRequest):
            read(kit, before.encode() + sse(kit.refused, named="type" in kit.refused).encode())


def test_a_refusal_behind_the_first_chunk_of_an_array() -> None:
    kit = WIRES["gemini"]
    begun = {"candidates": [{"content": {"role": "model", "parts": [{"text": "so"}]}, "index": 0}]}
    body = json.dumps([begun, kit.refused]).encode()
    with pytest.raises(InvalidRequest):
        kit.open("p").parse(body, "d")
    with pytest.raises(InvalidRequest):
        read(kit, body)
