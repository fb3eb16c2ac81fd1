"""A planted key, through every way in which a call can go: afterwards it is nowhere but in the provider's ears."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import pytest

from ridethrough.cli import run as ridethrough_command
from ridethrough.runtime.router.providers.simulated import (
    Answer,
    Call,
    Fault,
    Rule,
    Script,
    SimRequest,
    SimulatedProvider,
)

pytestmark = [pytest.mark.anyio, pytest.mark.processes]

KEY = 'sk-planted/"0123456789+abcdefghij=klmnopqrstuvwxyz'
"""With what JSON and URLs write otherwise."""

PROGRAM = """\
import json, logging, sys, traceback
import anyio
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ridethrough import Agent, Runtime, tool, workflow
from ridethrough.runtime.config import load_config
from ridethrough.runtime.router.messages import ModelRequest
from ridethrough.runtime.router.router import Router

logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)


@tool(effect="read")
async def look() -> str:
    return "seen"


def agent_of(route: str) -> Agent[str]:
    return Agent(route, model=route, instructions="You help.", tools=[look])


@workflow
async def ask(route: str) -> str:
    return (await agent_of(route).run("help")).output


@workflow
async def succeed() -> str:
    return (await agent_of("good").run("help")).output


def tell(error: BaseException | None) -> None:
    while error is not None:
        print(repr(error), str(error), error.__dict__, error.args)
        traceback.print_exception(error)
        error = error.__cause__ or error.__context__


async def listen(runtime: Runtime, run_id: str) -> None:
    async for event in runtime.events(run_id):
        print(event.model_dump_json())
        if event.type == "run_paused":
            break


async def main(routes: list[str]) -> None:
    config = load_config("ridethrough.toml")
    async with Runtime.open(config=config, grace=0.0) as runtime:
        for route in routes:
            run = await runtime.start(ask, route, id=route)
            await listen(runtime, route)
            if run.status in ("done", "failed"):
                try:
                    print("result", await run.result())
                except Exception as error:
                    tell(error)
            print((await runtime.describe(route)).as_json())
            print(runtime._router.states(), runtime._router.explain(route))
    async with Router.open(config) as router:
        for route in routes:
            try:
                print(await router.complete(ModelRequest([{"role": "user", "content": "x"}]), route=route))
                async for event in router.stream(ModelRequest([{"role": "user", "content": "x"}]), route=route):
                    print(event)
            except Exception as error:
                tell(error)
            print(await router.ping(route))
        print(router.ledger.attempts, config, repr(config), router.health())


if __name__ == "__main__":
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracing = TracerProvider()
    tracing.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(tracing)
    metrics.set_meter_provider(MeterProvider(metric_readers=[reader]))
    anyio.run(main, sys.argv[1:])
    for span in exporter.get_finished_spans():
        print(span.to_json())
    print(len(exporter.get_finished_spans()), "spans")
    print(reader.get_metrics_data().to_json())
"""


def said(request: SimRequest) -> str:
    """What the provider heard as the key, whatever the wire."""
    headers = request.headers
    return (
        headers.get("authorization", "").removeprefix("Bearer ")
        or headers.get("x-api-key", "")
        or headers.get("x-goog-api-key", "")
    )


def body(text: str) -> dict[str, Any]:
    """An error that repeats the key in every field that a client may keep."""
    return {"error": {"message": text, "type": "invalid_request_error", "code": KEY, "param": KEY}}


ECHO = {"x-request-id": KEY, "request-id": KEY}
FAULTS: dict[str, Fault] = {
    "refused": Fault(kind="auth", body=body(f"Incorrect API key provided: {KEY}."), headers=ECHO),
    "long": Fault(kind="auth", body=body("x" * 480 + KEY), headers=ECHO),
    "quoted": Fault(
        kind="status", status=400, body=body(f"GET /v1?key={quote(KEY, safe='')} {json.dumps(KEY)}"), headers=ECHO
    ),
    "html": Fault(kind="status", status=400, body=f"<html>{'y' * 470}{KEY} {KEY}</html>", headers=ECHO),
    "server": Fault(kind="status", status=500, body=body(f"while handling {KEY}"), headers=ECHO),
    "limited": Fault(
        kind="rate_limit", status=429, body=body(f"limit of {KEY}"), headers={**ECHO, "retry-after": "60"}
    ),
    "quota": Fault(
        kind="quota", status=429, body={"error": {"message": KEY, "code": "insufficient_quota"}}, headers=ECHO
    ),
    "event": Fault(kind="error_event", body=body("z" * 480 + KEY), after=2),
    "malformed": Fault(kind="malformed", body=f"data: {{{KEY}", after=2),
    "cut": Fault(kind="cut", after=1),
    "garbage": Fault(kind="broken_json", body=KEY),
}
WIRES = ("openai", "openai-responses", "anthropic", "gemini")


def configuration(folder: Path, urls: dict[str, str]) -> tuple[str, list[str]]:
    """A route for each fault and wire, and those whose server is not there; keys from the environment and a file."""
    (folder / "key").write_text(KEY + "\n")
    lines, routes = ['database = "sqlite:///runs.db"\n'], []

    def add(name: str, wire: str, url: str, key: str) -> None:
        routes.append(name)
        lines.append(f'[providers.{name}]\nkind = "{wire}"\nbase_url = "{url}"\napi_key = "{key}"\n')
        lines.append(f'headers = {{ x-more = "{key}" }}\n[models.{name}]\nprovider = "{name}"\nmodel = "{name}"\n')
        lines.append("timeouts = { connect = 1, first_token = 2, idle = 2, total = 5 }\n")
        lines.append(f'price = {{ input = 1, output = 1 }}\n[routes.{name}]\nmodels = ["{name}"]\n')
        lines.append("" if len(routes) % 2 else 'otherwise = ["fail"]\n')

    for number, (name, url) in enumerate(urls.items()):
        add(name, name.partition("-on-")[2] or "openai", url, ("env:PLANTED", "file:key")[number % 2])
    add("nobody", "openai", "http://127.0.0.1:9/v1", "env:PLANTED")
    add("nohost", "gemini", "http://no-such-host.invalid", "file:key")
    return "".join(lines), routes


async def test_a_planted_key_is_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(rules=[Rule(Answer(calls=(Call("look"),)), turn=0, tool="look"), Rule("fine")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLANTED", KEY)
    async with SimulatedProvider(script) as provider:
        root = provider.base_url.removesuffix("/v1")
        urls = {"good": provider.base_url}
        for name, fault in FAULTS.items():
            for wire in WIRES:
                urls[f"{name}-on-{wire}"] = root + ("/v1" if wire.startswith("openai") else "")
                provider.faults.add(replace(fault, model=f"{name}-on-{wire}"))
        text, routes = configuration(tmp_path, urls)
        (tmp_path / "ridethrough.toml").write_text(text)
        (tmp_path / "asking.py").write_text(PROGRAM)
        told = await what_programs_print(routes) | await what_is_looked_at(capsys)
        heard = {said(handled.request) for handled in provider.requests}
    told |= {path.name: path.read_bytes() for path in (tmp_path / "runs.db", tmp_path / "runs.db-wal") if path.exists()}
    assert heard == {KEY}, "the key was not sent, so nothing was tested"
    for line in (b"DEBUG:httpcore2", b"result fine", b'"gen_ai.request.model": "quota-on-gemini"', b"InvalidRequest("):
        assert line in told["the program"], line
    assert b"long-on-anthropic" in told["runs.db"]
    assert b"answered 401 ***" in told["show refused-on-openai --steps --messages"]
    assert_nowhere(told)


async def what_programs_print(routes: list[str]) -> dict[str, bytes]:
    """Standard output and error of processes that execute runs."""
    ridethrough = str(Path(sys.executable).with_name("ridethrough"))
    run = (ridethrough, "run", "--no-wait")
    programs = {
        "the program": (sys.executable, "asking.py", *routes),
        "run": (*run, "asking:succeed"),
        "run --json": (*run, "--json", "asking:ask", "--input", '"refused-on-openai"'),
        "run, a server that fails": (*run, "asking:ask", "--input", '"server-on-gemini"'),
    }
    told: dict[str, bytes] = {}
    for name, program in programs.items():
        with anyio.fail_after(100):
            told[name] = (await anyio.run_process(program, stderr=subprocess.STDOUT, check=False)).stdout
    return told


async def what_is_looked_at(capsys: pytest.CaptureFixture[str]) -> dict[str, bytes]:
    """What the commands print that only look."""
    commands = [
        ("runs", "--limit", "1000"),
        ("runs", "--limit", "1000", "--json"),
        ("models",),
        ("models", "--json"),
        ("models", "explain", "refused-on-openai"),
        ("models", "explain", "good", "--json"),
        ("models", "ping", "long-on-anthropic", "--json"),
        ("doctor",),
    ]
    for route in ("good", "refused-on-openai", "long-on-gemini", "event-on-anthropic", "html-on-openai"):
        commands += [("show", route, "--steps", "--messages"), ("show", route, "--json"), ("events", route, "--json")]
    told: dict[str, bytes] = {}
    for command in commands:
        await anyio.to_thread.run_sync(ridethrough_command, list(command))
        out, err = capsys.readouterr()
        assert out, command
        told[" ".join(command)] = (out + err).encode()
    return told


def assert_nowhere(told: dict[str, bytes]) -> None:
    """Neither as it is nor as JSON, a URL or a Python literal writes it, nor the half of it."""
    half = KEY[: len(KEY) // 2]
    forms = {
        KEY,
        json.dumps(KEY)[1:-1],
        quote(KEY),
        quote(KEY, safe=""),
        half,
        json.dumps(half)[1:-1],
        quote(half, safe=""),
    }
    forms |= {KEY[:14], quote(KEY[:14], safe=""), KEY.encode().hex()}
    for where, text in told.items():
        for form in forms:
            at = text.find(form.encode())
            assert at < 0, f"in {where}: {text[max(0, at - 300) : at + 100]!r}"
