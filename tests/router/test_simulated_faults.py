"""What goes wrong at the simulated provider: each fault in every wire's own form, and when it happens."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from anyio.lowlevel import checkpoint
from tests.router.asking import WIRES, Asker, Said, events_of, read_stream

from ridethrough.runtime.config import WireName
from ridethrough.runtime.router.providers.simulated import Answer, Call, Fault, Script, SimulatedProvider
from ridethrough.runtime.router.providers.simulated.faults import Schedule

pytestmark = pytest.mark.anyio

USER = Said("user", "research tides")


on_both = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
"""For what comes near the sockets: there the two event loops differ."""


@pytest.fixture(params=WIRES)
def wire(request: pytest.FixtureRequest) -> WireName:
    name: WireName = request.param
    return name


class Clock:
    """A time that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def faulty(*faults: Fault, **given: Any) -> AsyncGenerator[tuple[SimulatedProvider, Asker]]:
    script = Script(faults=list(faults)).rule(Answer(text="a b c d", calls=(Call("search", {"q": "tides"}),)))
    async with SimulatedProvider(script, **given) as sim, httpx2.AsyncClient(timeout=20) as client:
        yield sim, Asker(sim, client)


# --- errors in the place of an answer -------------------------------------------------------------------------------

ERRORS: list[tuple[dict[str, Any], dict[WireName, tuple[int, str]]]] = [
    (
        {"kind": "status", "status": 500},
        {
            "openai": (500, "server_error"),
            "openai-responses": (500, "server_error"),
            "anthropic": (500, "api_error"),
            "gemini": (500, "INTERNAL"),
        },
    ),
    (
        {"kind": "status"},
        {
            "openai": (503, "server_is_overloaded"),
            "openai-responses": (503, "server_is_overloaded"),
            "anthropic": (503, "overloaded_error"),
            "gemini": (503, "UNAVAILABLE"),
        },
    ),
    (
        {"kind": "rate_limit", "seconds": 2.5},
        {
            "openai": (429, "rate_limit_exceeded"),
            "openai-responses": (429, "rate_limit_exceeded"),
            "anthropic": (429, "rate_limit_error"),
            "gemini": (429, "RESOURCE_EXHAUSTED"),
        },
    ),
    (
        {"kind": "quota"},
        {
            "openai": (429, "insufficient_quota"),
            "openai-responses": (429, "insufficient_quota"),
            "anthropic": (402, "billing_error"),
            "gemini": (429, "RESOURCE_EXHAUSTED"),
        },
    ),
    (
        {"kind": "auth"},
        {
            "openai": (401, "invalid_api_key"),
            "openai-responses": (401, "invalid_api_key"),
            "anthropic": (401, "authentication_error"),
            "gemini": (401, "UNAUTHENTICATED"),
        },
    ),
    (
        {"kind": "context_length"},
        {
            "openai": (400, "context_length_exceeded"),
            "openai-responses": (400, "context_length_exceeded"),
            "anthropic": (400, "invalid_request_error"),
            "gemini": (400, "INVALID_ARGUMENT"),
        },
    ),
    (
        {"kind": "content_filter", "status": 400},
        {
            "openai": (400, "content_filter"),
            "openai-responses": (400, "content_filter"),
            "anthropic": (400, "invalid_request_error"),
            "gemini": (400, "INVALID_ARGUMENT"),
        },
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fault", "expected"), ERRORS, ids=[str(fault) for fault, _ in ERRORS])
async def test_errors_have_the_providers_form(
    wire: WireName, stream: bool, fault: dict[str, Any], expected: dict[WireName, tuple[int, str]]
) -> None:
    async with faulty(Fault(**fault)) as (sim, asker):
        response = await asker.post(wire, USER, stream=stream)
    error = response.json()["error"]
    key = {"anthropic": "type", "gemini": "status"}.get(wire, "code")
    assert (response.status_code, error[key]) == expected[wire]
    assert error["message"]
    assert sim.requests[0].status == expected[wire][0]
    assert sim.requests[0].fault == fault["kind"]


async def test_each_provider_says_in_its_own_way_how_long_to_wait() -> None:
    async with faulty(Fault("rate_limit", seconds=2.5)) as (_, asker):
        openai, _, anthropic, gemini = [await asker.post(name, USER) for name in WIRES]
    assert (openai.headers["retry-after-ms"], openai.headers["retry-after"]) == ("2500", "2.5")
    assert openai.headers["x-ratelimit-reset-requests"] == "2.5s"
    assert anthropic.headers["retry-after"] == "2.5"
    assert anthropic.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
    assert "retry-after" not in gemini.headers
    quota, wait = gemini.json()["error"]["details"]
    assert (quota["@type"], wait["retryDelay"]) == ("type.googleapis.com/google.rpc.QuotaFailure", "2.5s")
    assert "PerMinute" in quota["violations"][0]["quotaId"]


async def test_a_day_quota_of_gemini_and_an_account_of_anthropic_that_ran_dry() -> None:
    async with faulty(Fault("quota", status=400, requests=(1,)), Fault("quota")) as (_, asker):
        anthropic = await asker.post("anthropic", USER)
        gemini = await asker.post("gemini", USER)
    assert anthropic.json()["error"]["type"] == "invalid_request_error"
    assert "credit balance is too low" in anthropic.json()["error"]["message"]
    assert "PerDay" in gemini.json()["error"]["details"][0]["violations"][0]["quotaId"]


async def test_body_and_headers_of_a_fault_go_before_the_providers() -> None:
    fault = Fault("rate_limit", seconds=1, headers={"Retry-After": "9"}, body={"detail": "busy"})
    async with faulty(fault, Fault("status", body="<plain>", model="text")) as (_, asker):
        limited = await asker.post("anthropic", USER)
    assert limited.json() == {"detail": "busy"}
    assert limited.headers.get_list("retry-after")[-1] == "9"
    async with faulty(Fault("status", body="no JSON")) as (_, asker):
        assert (await asker.post("openai", USER)).text == "no JSON"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_filtered_prompt_of_gemini_is_an_answer_without_candidates(stream: bool) -> None:
    async with faulty(Fault("content_filter")) as (sim, asker):
        response = await asker.post("gemini", USER, stream=stream)
    body = events_of(response.text)[0][1] if stream else response.json()
    assert body["promptFeedback"]["blockReason"] == "SAFETY"
    assert "candidates" not in body
    assert (sim.requests[0].status, sim.requests[0].error) == (200, "content_filter")


@pytest.mark.parametrize("stream", [False, True])
async def test_the_filter_as_a_reason(wire: WireName, stream: bool) -> None:
    async with faulty(Fault("content_filter", status=200)) as (_, asker):
        got = await asker.answer(wire, USER, stream=stream)
    assert (got.text, got.calls) == ("", ())
    assert got.finish in ("content_filter", "refusal", "SAFETY")


@pytest.mark.parametrize("kind", ["html", "broken_json"])
async def test_bodies_that_are_no_answers(wire: WireName, kind: Any) -> None:
    async with faulty(Fault(kind)) as (_, asker):
        response = await asker.post(wire, USER)
    assert response.status_code == 200
    assert ("html" in response.headers["content-type"]) == (kind == "html")
    with pytest.raises(ValueError):
        response.json()


@on_both
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [Fault("reset"), Fault("refuse", requests=(1,)), Fault("hang", seconds=0)])
async def test_no_answer_at_all(wire: WireName, stream: bool, fault: Fault) -> None:
    async with faulty(fault) as (sim, asker):
        with pytest.raises(httpx2.TransportError):
            await asker.post(wire, USER, stream=stream)
    assert (sim.requests[0].status, sim.requests[0].error) == (0, fault.kind)


# --- broken answers -------------------------------------------------------------------------------------------------


@on_both
@pytest.mark.parametrize("stream", [False, True])
async def test_a_cut_answer(wire: WireName, stream: bool) -> None:
    async with faulty(Fault("cut", after=3)) as (sim, asker):
        with pytest.raises(httpx2.RemoteProtocolError):
            await asker.post(wire, USER, stream=stream)
    assert (sim.requests[0].status, sim.requests[0].error) == (0, "cut")


@pytest.mark.parametrize("kind", ["no_finish", "no_terminal"])
async def test_a_stream_that_ends_as_if_it_were_whole(wire: WireName, kind: Any) -> None:
    async with faulty() as (_, asker):
        whole = events_of((await asker.post(wire, USER, stream=True)).text)
    async with faulty(Fault(kind, after=3)) as (sim, asker):
        response = await asker.post(wire, USER, stream=True)
    endings = {"openai": 3, "openai-responses": 1, "anthropic": 2, "gemini": 1}
    cut = 3 if kind == "no_finish" else len(whole) - endings[wire]
    assert events_of(response.text) == whole[:cut]
    assert (sim.requests[0].status, sim.requests[0].error) == (200, kind)


async def test_an_event_that_is_no_json(wire: WireName) -> None:
    async with faulty(Fault("malformed", after=2)) as (_, asker):
        text = (await asker.post(wire, USER, stream=True)).text
    with pytest.raises(ValueError):
        events_of(text)


async def test_an_error_inside_the_stream(wire: WireName) -> None:
    async with faulty(Fault("error_event", after=2, status=429)) as (_, asker):
        events = events_of((await asker.post(wire, USER, stream=True)).text)
    name, data = events[2]
    assert len(events) == 3
    match wire:
        case "openai":
            assert data["error"]["code"] == "rate_limit_exceeded"
        case "openai-responses":
            assert (name, data["type"], data["code"], data["sequence_number"]) == (
                "error", "error", "rate_limit_exceeded", 2,
            )  # fmt: skip
        case "anthropic":
            assert (name, data["error"]["type"]) == ("error", "rate_limit_error")
        case "gemini":
            assert data["error"]["status"] == "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize("kind", ["malformed", "no_terminal", "error_event", "no_finish", "stall"])
async def test_whole_answers_break_too(wire: WireName, kind: Any) -> None:
    async with faulty(Fault(kind, seconds=0)) as (_, asker):
        if kind in ("no_finish", "stall"):
            with pytest.raises(httpx2.RemoteProtocolError):
                await asker.post(wire, USER)
            return
        response = await asker.post(wire, USER)
    assert response.status_code == 200
    if kind == "error_event":
        assert "error" in response.json()
        return
    with pytest.raises(ValueError):
        response.json()


@pytest.mark.parametrize("stream", [False, True])
async def test_arguments_that_are_no_json(wire: WireName, stream: bool) -> None:
    async with faulty(Fault("bad_arguments")) as (_, asker):
        got = await asker.answer(wire, USER, stream=stream)
    if wire == "gemini":
        assert (got.calls, got.finish) == ((), "MALFORMED_FUNCTION_CALL")
        return
    [(name, arguments)] = got.calls
    assert name == "search"
    with pytest.raises(ValueError):
        json.loads(arguments)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reason_that_nobody_knows(wire: WireName, stream: bool) -> None:
    async with faulty(Fault("unknown_finish")) as (_, asker):
        got = await asker.answer(wire, USER, stream=stream)
    assert got.finish.lower() == "simulated_reason"
    assert got.text == "a b c d"


# --- late answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fault",
    [
        Fault("slow", seconds=0.05),
        Fault("slow_first_token", seconds=0.05),
        Fault("slow_tokens", seconds=0.05),
        Fault("stall", seconds=0.05),
    ],
)
async def test_late_answers_are_whole(wire: WireName, stream: bool, fault: Fault) -> None:
    if fault.kind == "stall" and not stream:
        return  # a whole answer has no place for it, see test_whole_answers_break_too
    async with faulty(fault) as (sim, asker):
        begun = anyio.current_time()
        got = await asker.answer(wire, USER, stream=stream)
        assert anyio.current_time() - begun >= 0.05
    assert got.text == "a b c d"
    assert sim.requests[0].fault == fault.kind


async def test_delays_add_up_and_go_with_what_else_goes_wrong() -> None:
    faults = [Fault("slow", seconds=0.02), Fault("slow", seconds=0.03), Fault("status")]
    async with faulty(*faults) as (sim, asker):
        begun = anyio.current_time()
        assert (await asker.post("openai", USER)).status_code == 503
        assert anyio.current_time() - begun >= 0.05
    assert sim.requests[0].fault == "status"


@on_both
async def test_a_client_that_gives_up_is_noticed() -> None:
    async with faulty(Fault("hang")) as (sim, _):
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]})
        stream = await anyio.connect_tcp("127.0.0.1", sim.port)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        await stream.send((head + body).encode())
        await until(lambda: len(sim.requests) == 1)
        await stream.aclose()
        await until(lambda: sim.requests[0].error == "client")
    assert sim.requests[0].status == 0


async def until(condition: Any) -> None:
    """Let the server work until ``condition`` holds."""
    with anyio.fail_after(20):
        while not condition():
            await checkpoint()


@on_both
async def test_above_its_capacity_it_gets_slower_or_refuses() -> None:
    schedule = Schedule([Fault("capacity", limit=4)])
    assert [schedule.pick("m", n, 0.0, load).slowdown for n, load in enumerate((1, 4, 8, 12), 1)] == [1, 1, 2, 3]
    schedule = Schedule([Fault("capacity", limit=4, status=529)])
    assert [schedule.pick("m", n, 0.0, load).kind for n, load in enumerate((4, 5), 1)] == [None, "capacity"]
    async with faulty(Fault("capacity", limit=1, status=503), Fault("hang", requests=(1,))) as (sim, asker):
        answers: list[httpx2.Response] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(asker.post, "openai", USER)
            await until(lambda: len(sim.requests) == 1)
            answers.append(await asker.post("anthropic", USER))
            tasks.cancel_scope.cancel()
        await until(lambda: sim.requests[0].error == "client")
        answers.append(await asker.post("gemini", USER))
    assert [answer.status_code for answer in answers] == [503, 200]


# --- nobody listens -------------------------------------------------------------------------------------------------
@on_both
async def test_a_refused_connection_is_a_real_one() -> None:
    clock = Clock()
    async with faulty(Fault("refuse", start=2, end=12), clock=clock) as (sim, asker):
        assert (await asker.post("openai", USER)).status_code == 200
        idle = await anyio.connect_tcp("127.0.0.1", sim.port)
        clock.now += 5
        await knock(sim)
        with pytest.raises((anyio.BrokenResourceError, anyio.EndOfStream)), anyio.fail_after(20):
            await idle.receive()
        await idle.aclose()
        assert not listens(sim.port)
        with socket.socket() as other, pytest.raises(OSError):  # nobody else gets the port in the meantime
            other.bind(("127.0.0.1", sim.port))
        clock.now += 10
        await knock(sim)
        async with httpx2.AsyncClient() as client:
            assert (await Asker(sim, client).post("openai", USER)).status_code == 200
    assert len(sim.requests) == 2


@on_both
async def test_it_can_be_stopped_while_nobody_listens() -> None:
    async with faulty(Fault("refuse")) as (sim, _):
        await until(lambda: not listens(sim.port))
    with socket.socket() as other:
        other.bind(("127.0.0.1", sim.port))


async def knock(sim: SimulatedProvider) -> None:
    """Let the server see what time it is, and wait until it has done what it means."""
    sim.look_again()
    shut = sim.faults.closed(sim.age)[0]
    await until(lambda: listens(sim.port) != shut)


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@on_both
async def test_what_is_under_way_is_lost_when_it_goes_down() -> None:
    async with faulty(Fault("hang")) as (sim, asker):
        async with anyio.create_task_group() as tasks:

            async def ask() -> None:
                with pytest.raises((httpx2.ReadError, httpx2.RemoteProtocolError)):
                    await asker.post("anthropic", USER)

            tasks.start_soon(ask)
            await until(lambda: len(sim.requests) == 1)
            sim.faults.add(Fault("refuse"))
        assert sim.requests[0].status == 0
        sim.faults.clear()
        await until(lambda: listens(sim.port))
        async with httpx2.AsyncClient() as client:
            assert (await Asker(sim, client).post("gemini", USER)).status_code == 200


# --- when -----------------------------------------------------------------------------------------------------------


def due(fault: Fault, *ages: float) -> list[bool]:
    return [fault.applies("m", 1, 1, age, 0) for age in ages]


def test_faults_come_and_go() -> None:
    assert due(Fault(start=2, end=6), 1, 2, 5.9, 6) == [False, True, True, False]
    flapping = Fault(start=1, end=10, every=4, lasts=1)
    assert due(flapping, 0, 1, 1.9, 2, 4.9, 5, 6, 9, 10) == [False, True, True, False, False, True, False, True, False]
    assert due(Fault(every=4), 0, 1.9, 2, 4) == [True, True, False, True]


def test_the_next_change_is_known() -> None:
    assert [Fault("refuse", start=2, end=6).changes_after(age) for age in (0, 2, 6)] == [2, 6, math.inf]
    flapping = Fault("refuse", start=1, end=8, every=4, lasts=1)
    assert [flapping.changes_after(age) for age in (0, 1, 2.5, 5, 6)] == [1, 2, 5, 6, 8]
    assert Fault("refuse").changes_after(3) == math.inf


def test_a_slowdown_grows() -> None:
    ramp = Fault("slow", seconds=4, start=2, end=10, ramp=True)
    assert [ramp.delay(age) for age in (2, 4, 6, 10)] == [0, 1, 2, 4]
    assert Fault("slow", seconds=4).delay(7) == 4


def test_a_share_is_the_same_every_time() -> None:
    def bad(seed: int) -> list[int]:
        schedule = Schedule([Fault(share=0.25)], seed=seed)
        return [n for n in range(1, 1001) if schedule.pick("m", n, 0.0).fault is not None]

    assert bad(1) == bad(1) != bad(2)
    assert 200 < len(bad(1)) < 300
    two = Schedule([Fault("status", share=0.5), Fault("cut", share=0.5)])
    kinds = [two.pick("m", n, 0.0).kind for n in range(1, 1001)]
    assert 450 < kinds.count("status") < 550
    assert 200 < kinds.count("cut") < 300


def test_faults_are_for_deployments() -> None:
    faults = [Fault(deployment=name) for name in ("a", "b", "#1", "#2", "*", None)]

    def names(**server: Any) -> list[str | None]:
        return [fault.deployment for fault in Schedule(faults, **server).all]

    assert names(name="a", position=2) == ["a", "#2", "*", None]
    assert names(name="b") == ["b", "*", None]
    assert names(position=1) == ["#1", "*", None]
    assert names() == [fault.deployment for fault in faults]
    schedule = Schedule([], name="a")
    schedule.add(Fault(deployment="b"))
    assert schedule.all == []


async def test_the_clock_can_be_set_back(tmp_path: Path) -> None:
    clock = Clock()
    ledger = tmp_path / "ledger.jsonl"
    async with faulty(Fault("auth", end=5), clock=clock, name="north", ledger=ledger) as (_, asker):
        statuses = [(await asker.post("anthropic", USER)).status_code]
        clock.now += 7
        statuses.append((await asker.post("anthropic", USER)).status_code)
        async with httpx2.AsyncClient() as client:
            assert (await client.get(f"{asker.root}/__clock")).json() == {"seconds": 7}
            assert (await client.post(f"{asker.root}/__clock")).json() == {"seconds": 0}
            assert (await client.put(f"{asker.root}/__clock")).status_code == 404
        statuses.append((await asker.post("anthropic", USER)).status_code)
    assert statuses == [401, 200, 401]
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    kept = [(line["wire"], line["deployment"], line["error"], line["status"]) for line in lines]
    assert kept[:4] == [
        ("anthropic", "north", None, 0),
        ("anthropic", "north", "auth", 401),
        ("anthropic", "north", None, 0),
        ("anthropic", "north", None, 200),
    ]


# --- HTTP -----------------------------------------------------------------------------------------------------------


async def exchange(sim: SimulatedProvider, *pieces: bytes) -> bytes:
    """What the server answers to bytes, until it closes the connection."""
    stream = await anyio.connect_tcp("127.0.0.1", sim.port)
    answer = b""
    async with stream:
        for piece in pieces:
            await stream.send(piece)
        try:
            with anyio.fail_after(20):
                while True:
                    answer += await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return answer


BODY = b'{"model":"m","messages":[{"role":"user","content":"hello"}]}'
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


@on_both
async def test_it_understands_clients_other_than_httpx() -> None:
    async with faulty() as (sim, _):
        sized = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
        assert b"a b c d" in await exchange(sim, *[sized[n : n + 7] for n in range(0, len(sized), 7)])
        chunks = b"5\r\n%b\r\n%x;x=1\r\n%b\r\n0\r\nTrailer: 1\r\n\r\n" % (BODY[:5], len(BODY) - 5, BODY[5:])
        assert b"a b c d" in await exchange(sim, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        expecting = HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY)
        assert (await exchange(sim, expecting, BODY)).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
        assert len(sim.requests) == 3
        for nonsense in (b"hello\r\n\r\n", HEAD + b"Content-Length: -1\r\n\r\n", b"x" * 70_000 + b"\r\n\r\n"):
            assert await exchange(sim, nonsense) == b""
        assert (await exchange(sim, b"GET /__requests HTTP/1.0\r\n\r\n")).endswith(b"]")


@on_both
async def test_a_streamed_answer_comes_in_few_packets() -> None:
    async with faulty() as (sim, asker):
        response = await asker.post("openai", USER, stream=True)
        async with httpx2.AsyncClient() as client:
            request = client.stream(
                "POST", f"{sim.base_url}/chat/completions", json={**json.loads(BODY), "stream": True}
            )
            async with request as streamed:
                pieces = [piece async for piece in streamed.aiter_raw()]
    assert read_stream("openai", response.text).text == "a b c d"
    assert len(pieces) <= len(events_of(response.text))
