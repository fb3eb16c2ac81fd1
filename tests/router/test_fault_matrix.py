"""Each fault at A with B healthy, in every wire, streamed and whole: B answers whole, or the error surfaces.

A speaks the wire under test and B another one, so that each failover is also a translation. TLS and connections that
are refused or reset before a request was read have servers of their own: they fail below HTTP.
"""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.streams.tls
import pytest

from ridethrough.runtime import errors
from ridethrough.runtime.config import Config, WireName, parse_config
from ridethrough.runtime.errors import ModelError
from ridethrough.runtime.events import ModelDelta, ModelReset
from ridethrough.runtime.router.messages import ModelRequest
from ridethrough.runtime.router.providers.simulated import Answer, Call, Fault, Script, SimulatedProvider
from ridethrough.runtime.router.router import Router

pytestmark = pytest.mark.anyio

WIRES: tuple[WireName, ...] = ("openai", "openai-responses", "anthropic", "gemini")
OTHER: dict[WireName, WireName] = {
    "openai": "anthropic",
    "openai-responses": "gemini",
    "anthropic": "openai",
    "gemini": "openai-responses",
}
ANSWER = "a whole answer of several words"
ASK = ModelRequest([{"role": "user", "content": "hi"}])


@pytest.fixture
def anyio_backend() -> str:
    """The router's tests run on both; the wires do no input or output."""
    return "asyncio"


def config_of(a: tuple[WireName, str], b: tuple[WireName, str], *, stream: bool, silence: float) -> Config:
    """A route ``r`` over ``a`` and ``b``."""
    text = ""
    for name, (wire, url) in (("a", a), ("b", b)):
        limits = (
            f"{{ connect = 2, first_token = {silence}, idle = {silence}, total = {10 if stream else 2 * silence} }}"
        )
        text += f'[providers.{name}]\nkind = "{wire}"\nbase_url = "{url}"\n'
        text += f'[models.{name}]\nprovider = "{name}"\nmodel = "m-{name}"\nstream = {str(stream).lower()}\n'
        text += f"timeouts = {limits}\nprice = {{ input = 1, output = 2 }}\n"
    return parse_config(text + '[routes.r]\nmodels = ["a", "b"]\n')


@asynccontextmanager
async def pair(
    wire: WireName, fault: Fault, *, stream: bool, says: Any = ANSWER, silence: float = 0.6
) -> AsyncGenerator[tuple[SimulatedProvider, SimulatedProvider, Router]]:
    """A provider with the fault, a healthy one in another wire, and a router over both."""
    first, second = Script(faults=[fault]).rule(says), Script().rule(says)
    async with SimulatedProvider(first, wire=wire) as a, SimulatedProvider(second, wire=OTHER[wire]) as b:
        config = config_of((wire, a.base_url), (OTHER[wire], b.base_url), stream=stream, silence=silence)
        async with Router.open(config) as router:
            yield a, b, router


MENDED: dict[str, tuple[Fault, tuple[type[ModelError], ...]]] = {
    "500": (Fault("status", status=500), (errors.ServerError,)),
    "502": (Fault("status", status=502), (errors.ServerError,)),
    "503": (Fault("status", status=503), (errors.Overloaded,)),
    "529": (Fault("status", status=529), (errors.Overloaded,)),
    "429-with-a-wait": (Fault("rate_limit", seconds=30), (errors.RateLimited,)),
    "429-without-a-word": (Fault("status", status=429), (errors.RateLimited,)),
    "quota": (Fault("quota"), (errors.QuotaExhausted,)),
    "reset": (Fault("reset"), (errors.Transport,)),
    "hang": (Fault("hang"), (errors.Slow,)),
    "slow-first-token": (Fault("slow_first_token", seconds=30), (errors.Slow,)),
    "idle": (Fault("stall", after=3), (errors.Slow, errors.StreamBroken)),
    "cut": (Fault("cut", after=3), (errors.StreamBroken, errors.Transport)),
    "bad-chunk": (Fault("malformed", after=3), (errors.StreamBroken, errors.ServerError)),
    "error-event": (Fault("error_event", after=3), (errors.Overloaded,)),
    "no-terminal-event": (Fault("no_terminal"), (errors.StreamBroken, errors.ServerError, errors.Transport)),
    "ends-in-the-middle": (Fault("no_finish", after=3), (errors.StreamBroken, errors.ServerError, errors.Transport)),
    "html": (Fault("html"), (errors.ServerError,)),
    "malformed-json": (Fault("broken_json"), (errors.ServerError,)),
}


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("name", MENDED)
async def test_the_other_provider_answers_whole(name: str, wire: WireName, stream: bool) -> None:
    fault, kinds = MENDED[name]
    seen: list[ModelDelta | ModelReset] = []
    async with pair(wire, fault, stream=stream) as (a, b, router):
        response = await router.complete(ASK, route="r", listener=seen.append if stream else None)
        verdict = router.health()["a"].verdict
    assert (response.text, response.deployment, response.attempts, response.finish) == (ANSWER, "b", 2, "stop")
    assert (len(a.requests), len(b.requests)) == (1, 1)
    assert verdict in {kind.__name__ for kind in kinds} | {"Stalled"}
    if stream:
        _is_told_in_order(seen)


def _is_told_in_order(seen: list[ModelDelta | ModelReset]) -> None:
    """What was shown of A is taken back before anything of B is shown, and B is shown whole."""
    of_b = [event for event in seen if event.deployment == "b"]
    assert "".join(event.text for event in of_b if isinstance(event, ModelDelta)) == ANSWER
    of_a = [event for event in seen if event.deployment == "a"]
    assert seen == of_a + of_b
    if of_a:
        assert isinstance(of_a[-1], ModelReset)
        assert {event.attempt for event in of_a} == {of_a[-1].attempt}


RAISED: dict[str, tuple[Fault, type[ModelError]]] = {
    "401": (Fault("auth"), errors.Auth),
    "400-context-length": (Fault("context_length"), errors.ContextLength),
    "400-content-filter": (Fault("content_filter"), errors.ContentFilter),
    "400": (Fault("status", status=400), errors.InvalidRequest),
    "404": (Fault("status", status=404), errors.InvalidRequest),
}


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("name", RAISED)
async def test_what_must_not_fail_over_surfaces(name: str, wire: WireName, stream: bool) -> None:
    fault, kind = RAISED[name]
    async with pair(wire, fault, stream=stream) as (_, b, router):
        with pytest.raises(kind) as caught:
            await router.complete(ASK, route="r")
        state = router.health()["a"]
    assert caught.value.deployment == "a"
    assert not b.requests
    assert state.error_rate == 0, "none of these speaks against the deployment's health"


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("wire", WIRES)
async def test_arguments_that_are_no_json_are_no_error_of_the_model(wire: WireName, stream: bool) -> None:
    if wire == "gemini":  # its arguments are objects on the wire: there is no text to be broken
        says: Any = Answer(calls=(Call("f", {"x": 1}),))
    else:
        says = Answer(calls=(Call("f", {"x": 1}), Call("g", '{"x": ')))
    request = ModelRequest(ASK.messages, tools=[{"name": "f"}, {"name": "g"}])
    async with pair(wire, Fault("status", times=1, requests=(99,)), stream=stream, says=says) as (_, b, router):
        response = await router.complete(request, route="r")
    assert (response.deployment, response.finish, response.attempts) == ("a", "tool_calls", 1)
    assert response.tool_calls[0].arguments == {"x": 1}
    if wire != "gemini":
        assert (response.tool_calls[1].arguments, response.tool_calls[1].raw) == (None, '{"x": ')
        assert "not JSON" in (response.tool_calls[1].error or "")
    assert not b.requests


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("wire", WIRES)
async def test_a_finish_reason_that_nobody_knows_is_another(wire: WireName, stream: bool) -> None:
    async with pair(wire, Fault("unknown_finish"), stream=stream) as (_, b, router):
        response = await router.complete(ASK, route="r")
    assert (response.text, response.finish, response.deployment) == (ANSWER, "other", "a")
    assert any("finish" in note or "stop" in note or "reason" in note for note in response.notes)
    assert not b.requests


@pytest.mark.parametrize("wire", WIRES)
async def test_a_filtered_answer_says_so(wire: WireName) -> None:
    async with pair(wire, Fault("content_filter", status=200), stream=True) as (_, b, router):
        response = await router.complete(ASK, route="r")
    assert response.finish in ("content_filter", "refusal")
    assert not b.requests


# --- below HTTP -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate that nobody has signed but itself, with its key."""
    folder = tmp_path_factory.mktemp("tls")
    made = folder / "self.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command = [*words, "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)
    made.write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return made


async def _answered_by_b(wire: WireName, url: str, phase: str, *, stream: bool = True) -> None:
    async with SimulatedProvider(Script().rule(ANSWER), wire=OTHER[wire]) as b:
        config = config_of((wire, url), (OTHER[wire], b.base_url), stream=stream, silence=2)
        async with Router.open(config) as router:
            response = await router.complete(ASK, route="r")
            state = router.health()["a"]
    assert (response.text, response.deployment, response.attempts) == (ANSWER, "b", 2)
    assert state.verdict == "Transport"
    assert f"({phase})" in state.detail


@pytest.mark.parametrize("wire", WIRES)
async def test_nobody_listens(wire: WireName) -> None:
    async with SimulatedProvider(wire=wire) as gone:
        url = gone.base_url
    await _answered_by_b(wire, url, "connect")


@pytest.mark.parametrize("wire", WIRES)
async def test_a_certificate_that_nobody_trusts(wire: WireName, certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)

    async def shake_hands(stream: anyio.abc.SocketStream) -> None:
        try:
            await anyio.streams.tls.TLSStream.wrap(stream, server_side=True, ssl_context=context)
        except (ssl.SSLError, anyio.BrokenResourceError, anyio.EndOfStream):
            await stream.aclose()

    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, shake_hands)
        path = "/v1" if wire.startswith("openai") else ""
        await _answered_by_b(wire, f"https://127.0.0.1:{port}{path}", "connect")
        group.cancel_scope.cancel()


@pytest.mark.parametrize("after_reading", [False, True], ids=["before it was read", "after it was read"])
@pytest.mark.parametrize("wire", WIRES)
async def test_the_connection_is_closed_without_a_byte(wire: WireName, after_reading: bool) -> None:
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)

    async def hang_up(stream: anyio.abc.SocketStream) -> None:
        if after_reading:
            await stream.receive()
        await stream.aclose()

    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, hang_up)
        path = "/v1" if wire.startswith("openai") else ""
        async with SimulatedProvider(Script().rule(ANSWER), wire=OTHER[wire]) as b:
            url = f"http://127.0.0.1:{port}{path}"
            config = config_of((wire, url), (OTHER[wire], b.base_url), stream=True, silence=2)
            async with Router.open(config) as router:
                response = await router.complete(ASK, route="r")
                assert router.health()["a"].verdict == "Transport"
        assert (response.text, response.deployment) == (ANSWER, "b")
        group.cancel_scope.cancel()
