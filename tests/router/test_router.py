"""Calls through the router to real servers that go wrong in every way that is known."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from ridethrough.runtime import errors
from ridethrough.runtime.config import Config, ErrorRule, parse_config
from ridethrough.runtime.errors import ConfigError, ModelError, Unavailable, UsageError
from ridethrough.runtime.events import ModelDelta, ModelReset
from ridethrough.runtime.router.context import CallContext
from ridethrough.runtime.router.errors import Rule
from ridethrough.runtime.router.messages import ModelRequest, ModelResponse
from ridethrough.runtime.router.providers.simulated import Answer, Call, Fault, Script, SimulatedProvider
from ridethrough.runtime.router.router import Router
from ridethrough.runtime.router.stream import ModelFinished
from ridethrough.runtime.router.transport import Connections

pytestmark = pytest.mark.anyio

ASK = ModelRequest([{"role": "user", "content": "hi"}])
ANSWER = "a whole answer of several words"


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def config_for(
    *urls: str, stream: bool = True, extra: str = "", route: str = "", total: float = 5, slow: float = 0.3
) -> Config:
    """A route ``r`` over one model at each server, named a, b, ..."""
    text = ""
    names = "abcdef"[: len(urls)]
    for name, url in zip(names, urls, strict=True):
        limits = f"{{ connect = 2, first_token = {slow}, idle = {slow}, total = {total} }}"
        text += f'[providers.{name}]\nkind = "openai"\nbase_url = "{url}"\n{extra}\n'
        text += f'[models.{name}]\nprovider = "{name}"\nmodel = "m-{name}"\nstream = {str(stream).lower()}\n'
        text += f"timeouts = {limits}\nprice = {{ input = 1, output = 2 }}\n"
    return parse_config(text + f"[routes.r]\nmodels = {list(names)}\n{route}\n")


@asynccontextmanager
async def two(*faults: Fault, **options: Any) -> AsyncGenerator[tuple[SimulatedProvider, SimulatedProvider, Router]]:
    """Two providers with the same answer, the first with faults, and a router over both."""
    first, second = Script(faults=list(faults)).rule(ANSWER), Script().rule(ANSWER)
    async with SimulatedProvider(first) as a, SimulatedProvider(second) as b:
        async with Router.open(config_for(a.base_url, b.base_url, **options)) as router:
            yield a, b, router


async def test_a_call() -> None:
    async with two() as (a, b, router):
        response = await router.complete(ASK, route="r")
    assert (response.text, response.finish, response.deployment, response.attempts) == (ANSWER, "stop", "a", 1)
    assert response.cost_usd == pytest.approx((response.usage.input_tokens + 2 * response.usage.output_tokens) / 1e6)
    assert response.degraded is None
    assert (len(a.requests), len(b.requests)) == (1, 0)


MENDED = [
    Fault("status", status=500),
    Fault("status", status=503),
    Fault("status", status=529),
    Fault("status", status=429, headers={"retry-after": "30"}),
    Fault("status", status=429, body={"error": {"code": "insufficient_quota"}}),
    Fault("status", status=429, body="not json"),
    Fault("status", status=502, body="<html>"),
    Fault("hang"),
    Fault("slow_first_token"),
    Fault("stall", after=3),
    Fault("cut", after=0),
    Fault("cut", after=3),
    Fault("malformed", after=3),
    Fault("no_finish", after=3),
    Fault("error_event", after=3),
    Fault("error_event", after=0, status=429),
    Fault("html"),
    Fault("broken_json"),
    Fault("reset"),
]


@pytest.mark.parametrize("fault", MENDED, ids=lambda fault: f"{fault.kind}-{fault.status}-{fault.after}")
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_the_next_deployment_answers_whole(fault: Fault, stream: bool) -> None:
    async with two(fault, stream=stream, total=5 if stream else 0.5) as (a, b, router):
        response = await router.complete(ASK, route="r")
    assert (response.text, response.deployment, response.attempts) == (ANSWER, "b", 2)
    assert (len(a.requests), len(b.requests)) == (1, 1)
    assert router.health()["a"].verdict != "ok"


RAISED = [
    (401, None, errors.Auth),
    (400, {"error": {"code": "context_length_exceeded", "message": "too long"}}, errors.ContextLength),
    (400, {"error": {"code": "content_filter", "message": "no"}}, errors.ContentFilter),
    (400, None, errors.InvalidRequest),
    (404, None, errors.InvalidRequest),
]


@pytest.mark.parametrize(("status", "body", "kind"), RAISED)
async def test_what_another_could_not_mend_is_raised(status: int, body: Any, kind: type[ModelError]) -> None:
    async with two(Fault("status", status=status, body=body, headers={"x-request-id": "req-1"})) as (_, b, router):
        with pytest.raises(kind) as caught:
            await router.complete(ASK, route="r")
    assert (caught.value.deployment, caught.value.status, caught.value.request_id) == ("a", status, "req-1")
    assert not b.requests


async def test_refused_connections_fail_over() -> None:
    async with SimulatedProvider() as gone:
        pass
    async with SimulatedProvider() as well, Router.open(config_for(gone.base_url, well.base_url)) as router:
        assert (await router.complete(ASK, route="r")).deployment == "b"
        assert router.health()["a"].verdict == "Transport"


async def test_nobody_answers() -> None:
    faults = Fault("status", status=429, headers={"retry-after": "30"})
    async with two(faults) as (_, b, router):
        b.faults.add(Fault("status", status=503, headers={"retry-after": "12"}))
        with pytest.raises(Unavailable, match="no deployment of 'r' answers now") as caught:
            await router.complete(ASK, route="r")
    assert [type(error) for error in caught.value.errors] == [errors.RateLimited, errors.Overloaded]
    assert caught.value.retry_after == pytest.approx(12, abs=1)
    assert caught.value.reason == "brownout"


@pytest.mark.parametrize(
    ("fault", "phase", "kind"),
    [
        (Fault("hang"), "first_token", errors.Slow),
        (Fault("slow_first_token"), "first_token", errors.Slow),
        (Fault("stall", after=3), "idle", errors.Slow),
        (Fault("reset"), "read", errors.Transport),
    ],
)
async def test_phases(fault: Fault, phase: str, kind: type[ModelError]) -> None:
    async with two(fault) as (_, b, router):
        b.faults.add(Fault("status"))
        with pytest.raises(Unavailable) as caught:
            await router.complete(ASK, route="r")
    first = caught.value.errors[0]
    assert isinstance(first, kind)
    assert getattr(first, "phase", None) == phase


async def test_a_stream_that_falls_silent_is_slow_and_broken() -> None:
    async with two(Fault("stall", after=3)) as (_, _b, router):
        with pytest.raises(Unavailable) as caught:
            await router.complete(ASK, route="a")
    assert isinstance(caught.value.errors[0], errors.StreamBroken)
    assert isinstance(caught.value.errors[0], errors.Slow)


async def test_a_call_has_a_deadline() -> None:
    async with two(Fault("hang")) as (_, b, router):
        b.faults.add(Fault("hang"))
        with anyio.fail_after(2), pytest.raises(Unavailable) as caught:
            await router.complete(ASK, route="r", context=CallContext(deadline=0.1))
    assert [type(error) for error in caught.value.errors] == [errors.Slow]


async def test_patience_waits_in_place() -> None:
    fault = Fault("status", status=503, headers={"retry-after-ms": "20"}, times=2)
    async with two(fault, route='patience = "5s"') as (a, b, router):
        b.faults.add(Fault("status", status=503, headers={"retry-after-ms": "50"}))
        response = await router.complete(ASK, route="r")
    assert (response.deployment, response.attempts) == ("a", len(a.requests) + len(b.requests))
    assert len(a.requests) == 3


async def test_a_dead_attempt_is_reset_and_never_merged() -> None:
    seen: list[Any] = []
    async with two(Fault("cut", after=3)) as (_, _b, router):
        async with aclosing(router.stream(ASK, route="r")) as events:
            async for event in events:
                seen.append(event)
    reset = next(index for index, event in enumerate(seen) if isinstance(event, ModelReset))
    shown = [event for event in seen[:reset] if isinstance(event, ModelDelta)]
    assert shown
    assert {event.attempt for event in shown} == {seen[reset].attempt}
    after = [event for event in seen[reset + 1 :] if isinstance(event, ModelDelta)]
    assert "".join(event.text for event in after) == ANSWER
    assert after[0].attempt != seen[reset].attempt
    assert isinstance(seen[-1], ModelFinished)
    assert seen[-1].response.text == ANSWER


async def test_leaving_a_stream_early_closes_the_connection() -> None:
    script = Script(per_token=0.01).rule("many words " * 500)
    async with SimulatedProvider(script) as sim, Router.open(config_for(sim.base_url)) as router:
        async with aclosing(router.stream(ASK, route="r")) as events:
            await anext(events)
        assert router.health()["a"].verdict == "unknown"


async def test_tool_calls_and_structured_output() -> None:
    script = Script().rule(Answer(calls=(Call("f", {"x": 1}), Call("f", "{bad"))), turn=0, schema=False)
    schema = {"type": "object", "properties": {"claim": {"type": "string"}}, "required": ["claim"]}
    async with SimulatedProvider(script) as sim, Router.open(config_for(sim.base_url)) as router:
        response = await router.complete(ASK, route="r")
        found = await router.complete(ModelRequest(ASK.messages, output_schema=schema), route="r")
    assert [call.arguments for call in response.tool_calls] == [{"x": 1}, None]
    assert response.tool_calls[1].raw == "{bad"
    assert response.finish == "tool_calls"
    assert "claim" in found.text


async def test_a_simulated_provider_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text('[[rules]]\ntext = "scripted"\n')
    file = tmp_path / "ridethrough.toml"
    file.write_text('[providers.sim]\nkind = "simulated"\nscript = "s.toml"\nledger = "calls.jsonl"\n')
    async with Router.open(file) as router:
        response = await router.complete(ASK, route="sim/any", context=CallContext(run_id="run-1", agent="é"))
    assert response.text == "scripted"
    assert response.deployment == "sim/any"
    assert response.cost_usd
    assert "run-1" in (tmp_path / "calls.jsonl").read_text()


async def test_prices_are_known_or_said_to_be_unknown() -> None:
    async with SimulatedProvider() as sim:
        config = parse_config(f'[providers.a]\nkind = "openai"\nbase_url = "{sim.base_url}"')
        async with Router.open(config) as router:
            response = await router.complete(ASK, route="a/some-model")
    assert response.cost_usd is None
    assert "no price is known for some-model" in response.notes[0]


async def test_list_prices() -> None:
    from ridethrough.runtime.router.messages import Usage
    from ridethrough.runtime.router.prices import PriceList

    listing = await PriceList().find("gpt-4o", "https://api.openai.com/v1")
    cost_of = listing.cost_of
    assert cost_of is not None
    assert listing.context_window == 128_000
    assert cost_of(Usage(input_tokens=1_000_000)) > cost_of(Usage(input_tokens=1_000_000, cached_tokens=1_000_000)) > 0
    assert (await PriceList().find("no-such-model", "https://api.openai.com/v1")).cost_of is None


async def test_keys_never_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "sk-planted-key")
    body = {"error": {"code": "invalid_api_key", "message": "Incorrect API key provided: sk-planted-key"}}
    async with two(Fault("status", status=401, body=body), extra='api_key = "env:PLANTED"') as (a, _, router):
        with pytest.raises(errors.Auth) as caught:
            await router.complete(ASK, route="r")
        told = f"{caught.value!r} {router.health()} {router.explain('r')} {router.config!r}"
        assert a.requests[0].request.headers["authorization"] == "Bearer sk-planted-key"
    assert "sk-planted-key" not in told
    assert "***" in str(caught.value)


async def test_rules_of_ones_own() -> None:
    async with SimulatedProvider(Script(faults=[Fault("status", status=400, body={"error": {"code": "full"}})])) as a:
        mine = Rule(errors.Overloaded, names=frozenset({"full"}))
        async with Router.open(config_for(a.base_url), rules=[mine]) as router:
            with pytest.raises(Unavailable) as caught:
                await router.complete(ASK, route="r")
    assert isinstance(caught.value.errors[0], errors.Overloaded)


async def test_rules_of_the_configuration() -> None:
    fault = Fault("status", status=400, body={"error": {"code": "x", "message": "The QUEUE is full, go away"}}, times=1)
    async with (
        SimulatedProvider(Script(faults=[fault]).rule(ANSWER)) as a,
        SimulatedProvider(Script().rule(ANSWER)) as b,
    ):
        known = config_for(a.base_url, b.base_url)
        rule = ErrorRule(error="Overloaded", status=(400,), words="queue is full")
        async with Router.open(known.model_copy(update={"errors": (rule,)})) as router:
            response = await router.complete(ASK, route="r")
            assert router.health()["a"].verdict == "Overloaded"
    assert response.deployment == "b"


@pytest.mark.parametrize(
    ("route", "said"),
    [("q", "did you mean 'r'"), ("c/x", "there is no provider 'c'"), ("rr", "no route or model 'rr'")],
)
async def test_unknown_routes(route: str, said: str) -> None:
    async with two() as (_, _b, router):
        with pytest.raises(ConfigError) as caught:
            await router.complete(ASK, route=route)
    assert said in str(caught.value) or "there are" in str(caught.value)


async def test_wrong_use_says_so() -> None:
    router = Router.open(config_for("http://127.0.0.1:9/v1"))
    with pytest.raises(UsageError, match="async with"):
        await router.complete(ASK, route="r")
    async with router:
        with pytest.raises(ConfigError, match="floor"):
            await router.complete(ASK, route="r", context=CallContext(floor="frontier"))


async def test_explain() -> None:
    async with two() as (_, _b, router):
        told = router.explain("r")
        assert [deployment["name"] for deployment in told["deployments"]] == ["a", "b"]
        assert told["errors"]["Auth"] == "ask the same vendor with another credential, else raise it"
        assert told["errors"]["Slow"].startswith("ask the next deployment")
        assert told["chain"] == ["ask a, b (in this order)", "pause the run until one of them answers again"]
        assert list(router.deployments()) == ["a", "b"]


async def test_many_calls_at_once_are_all_answered() -> None:
    answers: list[ModelResponse] = []
    async with SimulatedProvider(Script(latency=0.05).rule(ANSWER)) as sim:
        async with Router.open(config_for(sim.base_url, total=30, slow=30)) as router:

            async def one() -> None:
                answers.append(await router.complete(ASK, route="r"))

            async with anyio.create_task_group() as group:
                for _ in range(60):
                    group.start_soon(one)
    assert [answer.text for answer in answers] == [ANSWER] * 60


async def test_connections_are_reused() -> None:
    async with SimulatedProvider(Script().rule(ANSWER)) as sim, Connections(sim.base_url) as connections:
        assert connections.in_flight == 0
    async with two() as (_, _b, router):
        for _ in range(5):
            assert (await router.complete(ASK, route="r")).deployment == "a"


def test_importing_the_router_is_cheap() -> None:
    code = (
        "import sys, ridethrough.runtime.router.router\n"
        "print([name for name in ('httpx2', 'genai_prices', 'h11', 'jsonschema') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
