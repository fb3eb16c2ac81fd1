"""What OpenTelemetry gets to see of model calls, with the real SDK, and what it costs where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from ridethrough.runtime.errors import RateLimited, Unavailable
from ridethrough.runtime.router.context import CallContext
from ridethrough.runtime.router.ledger import AttemptRecord
from ridethrough.runtime.router.messages import AssistantMessage, ModelResponse, Usage
from ridethrough.runtime.router.telemetry import Telemetry

SECRET = "sk-planted-0123456789"
CONTEXT = CallContext(run_id="r1", agent="writer", workflow="report", tenant="acme", path="writer/turn#1")
FAILED = AttemptRecord(
    id="a1",
    route="smart",
    deployment="gpt",
    provider="openai",
    model="gpt-5.2",
    started_at=1_800_000_000.25,
    seconds=1.5,
    verdict="Overloaded",
    phase="read",
    status=529,
    code="overloaded_error",
    queue_seconds=0.125,
    detail=f"the provider said: {SECRET} and what the user asked",
    run_id="r1",
    agent="writer",
)
WON = AttemptRecord(
    id="a2",
    route="smart",
    deployment="claude",
    provider="anthropic",
    model="claude-sonnet-5",
    started_at=1_800_000_002.0,
    seconds=2.0,
    verdict="ok",
    status=200,
    number=2,
    first_token_seconds=0.5,
    tokens_per_second=40.0,
    input_tokens=100,
    output_tokens=20,
    cost_usd=0.002,
    hedged=True,
    run_id="r1",
)
ANSWER = ModelResponse(
    message=AssistantMessage(content="an answer that nobody else may read"),
    finish="tool_calls",
    usage=Usage(input_tokens=100, output_tokens=20, cached_tokens=60, reasoning_tokens=5, cache_write_tokens=7),
    cost_usd=0.002,
    deployment="claude",
    attempts=2,
    degraded="standard",
    model="claude-sonnet-5-20261001",
)


class Seen:
    """A telemetry with the SDK behind it, and what came out at its end."""

    def __init__(self) -> None:
        self._spans = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self._meters = MeterProvider([self._reader])
        self.telemetry = Telemetry(tracer_provider=self.tracers, meter_provider=self._meters)
        self.telemetry.know("openai", "openai", "https://api.openai.com/v1")
        self.telemetry.know("anthropic", "anthropic", "https://api.anthropic.com")

    def spans(self) -> list[ReadableSpan]:
        return list(self._spans.get_finished_spans())

    def span(self, name: str) -> ReadableSpan:
        [found] = [span for span in self.spans() if span.name == name]
        return found

    def points(self, metric: str) -> list[Any]:
        data = self._reader.get_metrics_data()
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics] if data else []
        return [
            point
            for scope in scopes
            for each in scope.metrics
            if each.name == metric
            for point in each.data.data_points
        ]

    def close(self) -> None:
        self.tracers.shutdown()
        self._meters.shutdown()


@pytest.fixture
def seen() -> Iterator[Seen]:
    made = Seen()
    yield made
    made.close()


def _answered_call(telemetry: Telemetry) -> None:
    with telemetry.call(route="smart", model="gpt-5.2", context=CONTEXT, stream=True) as span:
        telemetry.attempt(FAILED, span)
        telemetry.attempt(WON, span)
        span.answered(ANSWER)


# --- spans ----------------------------------------------------------------------------------------------------------


def test_a_call_is_one_span_named_after_the_model_that_answered(seen: Seen) -> None:
    _answered_call(seen.telemetry)
    span = seen.span("chat claude-sonnet-5")
    assert span.kind is SpanKind.CLIENT
    assert span.status.status_code is StatusCode.UNSET
    shown: dict[str, Any] = dict(span.attributes or {})
    assert shown.pop("gen_ai.response.time_to_first_chunk") >= 0.5
    assert shown == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "anthropic",
        "gen_ai.request.model": "claude-sonnet-5",
        "gen_ai.request.stream": True,
        "gen_ai.response.model": "claude-sonnet-5-20261001",
        "gen_ai.response.finish_reasons": ("tool_calls",),
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 20,
        "gen_ai.usage.cache_read.input_tokens": 60,
        "gen_ai.usage.cache_creation.input_tokens": 7,
        "gen_ai.usage.reasoning.output_tokens": 5,
        "server.address": "api.anthropic.com",
        "server.port": 443,
        "ridethrough.route": "smart",
        "ridethrough.deployment": "claude",
        "ridethrough.attempts": 2,
        "ridethrough.degraded": "standard",
        "ridethrough.cost_usd": 0.002,
        "ridethrough.hedged": True,
        "ridethrough.queue_seconds": 0.0,
        "ridethrough.run_id": "r1",
        "ridethrough.path": "writer/turn#1",
        "ridethrough.workflow": "report",
        "ridethrough.agent": "writer",
        "ridethrough.tenant": "acme",
    }


def test_each_attempt_is_a_span_below_it_at_the_times_of_its_record(seen: Seen) -> None:
    _answered_call(seen.telemetry)
    call, failed, won = seen.span("chat claude-sonnet-5"), seen.span("attempt gpt"), seen.span("attempt claude")
    for span in (failed, won):
        assert span.parent is not None
        assert call.context is not None
        assert span.parent.span_id == call.context.span_id
    assert failed.start_time == 1_800_000_000_250_000_000
    assert failed.end_time == 1_800_000_001_750_000_000
    assert failed.status.status_code is StatusCode.ERROR
    shown = failed.attributes or {}
    assert shown["error.type"] == "Overloaded"
    assert shown["http.response.status_code"] == 529
    assert shown["gen_ai.provider.name"] == "openai"
    assert shown["ridethrough.verdict"] == "Overloaded"
    assert shown["ridethrough.queue_seconds"] == 0.125
    assert shown["ridethrough.attempt"] == 1
    assert won.status.status_code is StatusCode.UNSET
    assert (won.attributes or {})["ridethrough.hedged"] is True


def test_only_the_call_says_what_back_ends_add_up(seen: Seen) -> None:
    _answered_call(seen.telemetry)
    for name in ("attempt gpt", "attempt claude"):
        counted = [key for key in seen.span(name).attributes or {} if key.startswith("gen_ai.usage.")]
        assert counted == []
        assert "gen_ai.operation.name" not in (seen.span(name).attributes or {})


def test_a_call_that_fails_says_how_in_no_words_of_the_provider(seen: Seen) -> None:
    error = Unavailable(f"no deployment answers: {SECRET}", errors=(RateLimited("busy", status=429),))
    with suppress(Unavailable), seen.telemetry.call(route="smart", model="gpt-5.2", context=CONTEXT) as call:
        seen.telemetry.attempt(FAILED, call)
        raise error
    span = seen.span("chat gpt-5.2")
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description is None
    assert (span.attributes or {})["error.type"] == "Unavailable"
    assert (span.attributes or {})["gen_ai.provider.name"] == "openai"
    assert not span.events


def test_a_caller_that_leaves_has_abandoned_the_call_but_nothing_failed(seen: Seen) -> None:
    def stream() -> Iterator[int]:
        with seen.telemetry.call(route="smart", model="gpt-5.2", context=CONTEXT):
            yield 1

    generator = stream()
    next(iter(generator))
    del generator
    span = seen.span("chat gpt-5.2")
    assert (span.attributes or {})["error.type"] == "abandoned"
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("verdict", ["hedged", "abandoned"])
def test_an_attempt_that_lost_is_no_error(seen: Seen, verdict: str) -> None:
    seen.telemetry.attempt(replace(FAILED, verdict=verdict, wasted=True))
    span = seen.span("attempt gpt")
    assert span.status.status_code is StatusCode.UNSET
    assert "error.type" not in (span.attributes or {})
    assert (span.attributes or {})["ridethrough.wasted"] is True


def test_a_kept_answer_takes_no_tokens(seen: Seen) -> None:
    kept = ANSWER.model_copy(update={"degraded": "cache", "attempts": 0})
    with seen.telemetry.call(route="smart", model="gpt-5.2", context=CONTEXT) as span:
        span.answered(kept)
    shown = seen.span("chat gpt-5.2").attributes or {}
    assert shown["gen_ai.provider.name"] == "ridethrough"
    assert shown["ridethrough.degraded"] == "cache"
    assert not [name for name in shown if name.startswith("gen_ai.usage.")]
    assert seen.points("gen_ai.client.token.usage") == []


def test_a_call_lies_below_the_callers_span_and_is_not_current_itself(seen: Seen) -> None:
    tracer = seen.tracers.get_tracer("the user's own")
    with tracer.start_as_current_span("outer") as outer:
        with seen.telemetry.call(route="smart", model="gpt-5.2", context=CONTEXT):
            with tracer.start_as_current_span("inner"):
                pass
    for name in ("chat gpt-5.2", "inner"):
        parent = seen.span(name).parent
        assert parent is not None
        assert parent.span_id == outer.get_span_context().span_id


def test_a_breaker_that_changes_is_an_event_of_the_call_and_counted(seen: Seen) -> None:
    with seen.telemetry.call(route="smart", model="gpt-5.2", context=CONTEXT) as span:
        seen.telemetry.transition("gpt", "closed", "open", "Slow", span)
    [event] = seen.span("chat gpt-5.2").events
    assert event.name == "ridethrough.breaker"
    assert dict(event.attributes or {}) == {
        "ridethrough.deployment": "gpt",
        "ridethrough.from": "closed",
        "ridethrough.to": "open",
        "ridethrough.reason": "Slow",
    }
    [point] = seen.points("ridethrough.breaker.transitions")
    assert (point.value, point.attributes["ridethrough.to"]) == (1, "open")


def test_a_breaker_that_changes_outside_of_calls_is_an_event_of_the_current_span(seen: Seen) -> None:
    tracer = seen.tracers.get_tracer("the user's own")
    with tracer.start_as_current_span("outer"):
        seen.telemetry.transition("gpt", "open", "half_open", "time")
    assert [event.name for event in seen.span("outer").events] == ["ridethrough.breaker"]
    seen.telemetry.transition("gpt", "half_open", "closed", "ok")
    assert len(seen.points("ridethrough.breaker.transitions")) == 2


# --- metrics --------------------------------------------------------------------------------------------------------


def test_durations_and_tokens_are_counted_once_a_call(seen: Seen) -> None:
    _answered_call(seen.telemetry)
    [duration] = seen.points("gen_ai.client.operation.duration")
    assert isinstance(duration, HistogramDataPoint)
    assert duration.count == 1
    assert duration.explicit_bounds[:3] == (0.01, 0.02, 0.04)
    assert dict(duration.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "anthropic",
        "gen_ai.request.model": "claude-sonnet-5",
        "gen_ai.response.model": "claude-sonnet-5-20261001",
        "server.address": "api.anthropic.com",
        "server.port": 443,
    }
    tokens = {point.attributes["gen_ai.token.type"]: point for point in seen.points("gen_ai.client.token.usage")}
    assert {kind: point.sum for kind, point in tokens.items()} == {"input": 100, "output": 20}
    assert tokens["input"].explicit_bounds[-1] == 67108864


def test_attempts_are_counted_by_what_came_of_them(seen: Seen) -> None:
    _answered_call(seen.telemetry)
    seen.telemetry.attempt(FAILED)
    counts = {
        (point.attributes["ridethrough.deployment"], point.attributes["ridethrough.verdict"]): point.value
        for point in seen.points("ridethrough.attempts")
    }
    assert counts == {("gpt", "Overloaded"): 2, ("claude", "ok"): 1}
    [first] = seen.points("gen_ai.client.operation.time_to_first_chunk")
    assert (first.sum, first.attributes["gen_ai.request.model"]) == (0.5, "claude-sonnet-5")
    [cost] = seen.points("ridethrough.cost")
    assert isinstance(cost, NumberDataPoint)
    assert cost.value == pytest.approx(0.002)
    assert {point.sum for point in seen.points("ridethrough.queue.duration")} == {0.25, 0.0}


def test_nothing_that_was_said_and_no_key_is_recorded(seen: Seen) -> None:
    _answered_call(seen.telemetry)
    with suppress(RateLimited), seen.telemetry.call(route="smart", model="gpt-5.2", context=CONTEXT):
        raise RateLimited(f"slow down, {SECRET}", code="rate_limit_exceeded")
    everything = "".join(span.to_json() for span in seen.spans())
    for word in (SECRET, "nobody else may read", "what the user asked"):
        assert word not in everything


@pytest.mark.parametrize(
    ("wire", "url", "vendor", "address", "port"),
    [
        ("openai", "https://api.openai.com/v1", "openai", "api.openai.com", 443),
        ("openai-responses", "https://res.openai.azure.com/openai/v1", "azure.ai.openai", "res.openai.azure.com", 443),
        ("openai", "https://api.groq.com/openai/v1", "groq", "api.groq.com", 443),
        ("openai", "http://127.0.0.1:8000/v1", "openai", "127.0.0.1", 8000),
        ("openai", "https://notmistral.ai/v1", "openai", "notmistral.ai", 443),
        ("gemini", "https://generativelanguage.googleapis.com", "gcp.gemini", "generativelanguage.googleapis.com", 443),
        ("anthropic", "https://api.anthropic.com", "anthropic", "api.anthropic.com", 443),
        ("openai", "http://me:secret@server/v1", "openai", "server", 80),
        ("openai", "http://server:nonsense/v1", "openai", None, None),
        ("anthropic", "http://[::1", "anthropic", None, None),
    ],
)
def test_vendors_are_named_as_the_conventions_name_them(
    seen: Seen, wire: Any, url: str, vendor: str, address: str | None, port: int | None
) -> None:
    seen.telemetry.know("p", wire, url)
    seen.telemetry.attempt(replace(WON, provider="p"))
    shown = seen.span("attempt claude").attributes or {}
    assert shown["gen_ai.provider.name"] == vendor
    assert (shown.get("server.address"), shown.get("server.port")) == (address, port)


# --- without an SDK -------------------------------------------------------------------------------------------------


def test_without_an_sdk_calls_share_one_silent_span() -> None:
    """In a process of its own: another test of this one may have set an SDK up, which is for good."""
    _python("""
        from ridethrough.runtime.router.context import CallContext
        from ridethrough.runtime.router.telemetry import SILENT, Telemetry

        telemetry = Telemetry()
        with telemetry.call(route="smart", model="gpt-5.2", context=CallContext()) as span:
            assert span is SILENT
            telemetry.transition("gpt", "closed", "open", "Slow", span)
    """)


def test_without_an_sdk_opentelemetry_is_not_even_imported() -> None:
    _python("""
        import sys
        from ridethrough.runtime.router.context import CallContext
        from ridethrough.runtime.router.telemetry import SILENT, Telemetry
        assert Telemetry().call(route="r", model="m", context=CallContext()) is SILENT
        assert not [name for name in sys.modules if name.startswith("opentelemetry")]
    """)


def test_an_sdk_that_is_set_up_later_counts_from_then_on() -> None:
    _python("""
        from ridethrough.runtime.router.context import CallContext
        from ridethrough.runtime.router.telemetry import SILENT, Telemetry
        telemetry = Telemetry()
        assert telemetry.call(route="r", model="m", context=CallContext()) is SILENT
        from opentelemetry import trace
        assert telemetry.call(route="r", model="m", context=CallContext()) is SILENT
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        spans, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(spans))
        trace.set_tracer_provider(provider)
        with telemetry.call(route="r", model="m", context=CallContext()) as span:
            assert span is not SILENT
        assert [span.name for span in spans.get_finished_spans()] == ["chat m"]
    """)


def test_an_sdk_that_the_environment_names_is_used() -> None:
    _python(
        """
        from opentelemetry import trace
        from ridethrough.runtime.router.context import CallContext
        from ridethrough.runtime.router.telemetry import SILENT, Telemetry
        assert Telemetry().call(route="r", model="m", context=CallContext()) is not SILENT
        assert type(trace.get_tracer_provider()).__module__ == "opentelemetry.sdk.trace"
        """,
        OTEL_PYTHON_TRACER_PROVIDER="sdk_tracer_provider",
    )


def _python(code: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
