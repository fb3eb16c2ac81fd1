"""Model calls as OpenTelemetry spans and metrics, for whoever has set up an SDK; for everybody else next to nothing.

The names are those of the GenAI semantic conventions, version 1.41, the last one that the common conventions
published and the one that back ends read. A call is one span ``chat {model}``, from its start to its end whatever was
tried between; each attempt is a span below it. Only the call has ``gen_ai.operation.name`` and ``gen_ai.usage.*``:
back ends add those up over all spans, so attempts that had them too would count everything twice.

What was asked and what was answered is never recorded, nor the text of an error, which may quote either: errors are
given by class, status and code.

The call's span is not made the current one. A streamed answer is a generator, and a span that is current inside it is
current in its consumer as well, whose own spans would end up below it. So attempts are given their parent.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

from ridethrough.runtime.errors import ModelError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.metrics import Meter, MeterProvider
    from opentelemetry.trace import Span, Tracer, TracerProvider

    from ridethrough.runtime.config import WireName
    from ridethrough.runtime.router.context import CallContext
    from ridethrough.runtime.router.ledger import AttemptRecord
    from ridethrough.runtime.router.messages import ModelResponse

Attributes: TypeAlias = dict[str, Any]

SCOPE = "ridethrough.router"
"""The instrumentation scope of all spans and metrics."""

SCHEMA = "https://opentelemetry.io/schemas/1.41.0"

SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOKENS = tuple(4**power for power in range(14))
"""The boundaries of histograms that the conventions give."""

HARMLESS = ("ok", "hedged", "abandoned")
"""Verdicts that are no error of the deployment."""

_VENDORS = {
    "aiplatform.googleapis.com": "gcp.vertex_ai",
    "amazonaws.com": "aws.bedrock",
    "cohere.com": "cohere",
    "deepseek.com": "deepseek",
    "groq.com": "groq",
    "mistral.ai": "mistral_ai",
    "moonshot.ai": "moonshot_ai",
    "openai.azure.com": "azure.ai.openai",
    "perplexity.ai": "perplexity",
    "x.ai": "x_ai",
}
_FORMATS = {"openai": "openai", "openai-responses": "openai", "anthropic": "anthropic", "gemini": "gcp.gemini"}
_ENVIRONMENT = ("OTEL_PYTHON_TRACER_PROVIDER", "OTEL_PYTHON_METER_PROVIDER")


class CallSpan:
    """One call while it is made. This one records nothing, which is what calls get when no SDK is set up."""

    __slots__ = ()

    def answered(self, response: ModelResponse) -> None:
        """Tell the answer, after the attempts; without this the call counts as given up (or as what is raised)."""

    def __enter__(self) -> CallSpan:
        """The call has begun."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """The call has ended."""


SILENT = CallSpan()
"""The span of all calls that nobody records."""


class Telemetry:
    """Reports model calls, their attempts and what becomes of deployments. Every method is cheap and never raises."""

    def __init__(
        self, *, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        """Without providers the process's own count, whenever they are set up."""
        self._given = (tracer_provider, meter_provider)
        if any(name in os.environ for name in _ENVIRONMENT):  # an SDK sets itself up as soon as somebody asks for it
            import_module("opentelemetry.trace")
            import_module("opentelemetry.metrics")
        self._reporter: _Reporter | None = None
        self._servers: dict[str, _Server] = {}

    def know(self, provider: str, wire: WireName, base_url: str) -> None:
        """Say what is behind the name of a provider, so that its vendor and address can be reported."""
        self._servers[provider] = _server(wire, base_url)

    def call(self, *, route: str, model: str, context: CallContext, stream: bool = False) -> CallSpan:
        """Return the span of a call, to be entered with ``with``; it ends where the block does.

        Args:
            route: What the caller asked for.
            model: The model that is asked first, as its provider calls it.
            context: Who asks.
            stream: Whether the answer is streamed.
        """
        reporter = self._report()
        return SILENT if reporter is None else _Recorded(reporter, route, model, context, stream)

    def attempt(self, record: AttemptRecord, parent: CallSpan | None = None) -> None:
        """Report an attempt that has ended, to its call first, which must hear of it before the answer.

        Without a ``parent`` it belongs to no call (a ping).
        """
        if isinstance(parent, _Recorded):
            parent.tried(record)
        elif parent is None and (reporter := self._report()) is not None:
            reporter.attempt(record, None)

    def transition(self, deployment: str, old: str, new: str, reason: str, span: CallSpan = SILENT) -> None:
        """Report that a deployment's breaker went from ``old`` to ``new``.

        It is counted, and an event of the call's ``span``, else of the span that is current. ``reason`` is a verdict
        or words of our own, never a provider's message.
        """
        if (reporter := self._report()) is not None:
            reporter.transition(deployment, old, new, reason, span.span if isinstance(span, _Recorded) else None)

    def _report(self) -> _Reporter | None:
        """Return where to report to, if somebody wants to know."""
        tracers, meters = self._given
        if tracers is None and meters is None:
            tracers, meters = self._set_up()
            if _is_idle(tracers) and _is_idle(meters):
                return None
        if self._reporter is None or not self._reporter.serves(tracers, meters):
            self._reporter = _Reporter(tracers, meters, self._servers)
        return self._reporter

    def _set_up(self) -> tuple[TracerProvider | None, MeterProvider | None]:
        """Return the process's providers. Nothing of OpenTelemetry is imported before somebody else has done so."""
        loaded: Mapping[str, Any] = sys.modules
        trace, metrics = loaded.get("opentelemetry.trace"), loaded.get("opentelemetry.metrics")
        return trace and trace.get_tracer_provider(), metrics and metrics.get_meter_provider()


def _is_idle(provider: object) -> bool:
    """Whether there is none, or one of the API's own, which do nothing."""
    return provider is None or type(provider).__module__.startswith(("opentelemetry.trace", "opentelemetry.metrics"))


# --- who is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Server:
    vendor: str
    address: str
    port: int | None

    def attributes(self) -> Attributes:
        place = {"server.address": self.address or None, "server.port": self.port if self.address else None}
        return _known({"gen_ai.provider.name": self.vendor, **place})


def _server(wire: WireName, base_url: str) -> _Server:
    try:
        parts = urlsplit(base_url)
        host, port = parts.hostname or "", parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    except ValueError:
        return _Server(_FORMATS[wire], "", None)
    vendor = next((name for domain, name in _VENDORS.items() if f".{host}".endswith(f".{domain}")), _FORMATS[wire])
    return _Server(vendor, host, port)


# --- what is recorded -----------------------------------------------------------------------------------------------


class _Reporter:
    """Writes to one pair of providers."""

    def __init__(
        self, tracers: TracerProvider | None, meters: MeterProvider | None, servers: Mapping[str, _Server]
    ) -> None:
        from opentelemetry import metrics, trace

        from ridethrough import __version__

        self._providers = (tracers, meters)
        self._servers = servers
        self.tracer: Tracer = trace.get_tracer(SCOPE, __version__, tracers, SCHEMA)
        self.meters = _Instruments(metrics.get_meter(SCOPE, __version__, meters, SCHEMA))

    def serves(self, tracers: TracerProvider | None, meters: MeterProvider | None) -> bool:
        return self._providers[0] is tracers and self._providers[1] is meters

    def who(self, record: AttemptRecord) -> Attributes:
        """Whom an attempt asked, as the conventions name it."""
        server = self._servers.get(record.provider)
        known = server.attributes() if server else {"gen_ai.provider.name": record.provider}
        return {"gen_ai.request.model": record.model, **known}

    def attempt(self, record: AttemptRecord, call: _Recorded | None) -> None:
        who = self.who(record)
        self._span(record, who, call)
        labels = {**_chosen(record), "gen_ai.provider.name": who["gen_ai.provider.name"]}
        flags = {"ridethrough.hedged": record.hedged, "ridethrough.wasted": record.wasted}
        self.meters.attempts.add(1, {**labels, **flags, "ridethrough.verdict": record.verdict})
        self.meters.queue.record(record.queue_seconds, labels)
        if record.cost_usd:
            self.meters.cost.add(record.cost_usd, {**labels, "ridethrough.wasted": record.wasted})
        if record.first_token_seconds is not None:
            self.meters.first_chunk.record(record.first_token_seconds, {"gen_ai.operation.name": "chat", **who})

    def _span(self, record: AttemptRecord, who: Attributes, call: _Recorded | None) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        begun = record.started_at
        span = self.tracer.start_span(
            f"attempt {record.deployment}",
            context=call.context if call else None,
            kind=SpanKind.CLIENT,
            attributes=_known({**who, **_details(record)}),
            start_time=_nanoseconds(begun),
        )
        if record.verdict not in HARMLESS:
            span.set_attribute("error.type", record.verdict)
            span.set_status(Status(StatusCode.ERROR))
        span.end(_nanoseconds(begun + record.seconds))

    def transition(self, deployment: str, old: str, new: str, reason: str, span: Span | None) -> None:
        from opentelemetry.trace import get_current_span

        change = {"ridethrough.deployment": deployment, "ridethrough.from": old, "ridethrough.to": new}
        self.meters.transitions.add(1, change)
        (span or get_current_span()).add_event("ridethrough.breaker", {**change, "ridethrough.reason": reason})


class _Instruments:
    """The metrics: the conventions' own, and what they have no name for."""

    def __init__(self, meter: Meter) -> None:
        self.duration = meter.create_histogram(
            "gen_ai.client.operation.duration", "s", "Duration of a model call with all its attempts.", **_at(SECONDS)
        )
        self.tokens = meter.create_histogram(
            "gen_ai.client.token.usage", "{token}", "Tokens that an answer took.", **_at(TOKENS)
        )
        self.first_chunk = meter.create_histogram(
            "gen_ai.client.operation.time_to_first_chunk", "s", "Time to an attempt's first token.", **_at(SECONDS)
        )
        self.queue = meter.create_histogram(
            "ridethrough.queue.duration", "s", "How long an attempt waited for its place.", **_at(SECONDS)
        )
        self.attempts = meter.create_counter("ridethrough.attempts", "{attempt}", "Attempts, by what came of them.")
        self.cost = meter.create_counter("ridethrough.cost", "{USD}", "What attempts cost.")
        self.transitions = meter.create_counter(
            "ridethrough.breaker.transitions", "{transition}", "Changes of deployments' health."
        )


def _at(boundaries: tuple[float, ...]) -> dict[str, Any]:
    return {"explicit_bucket_boundaries_advisory": boundaries}


class _Recorded(CallSpan):
    """One call that somebody records."""

    __slots__ = ("_begun", "_common", "_last", "_reporter", "_response", "_ticks", "_winner", "context", "span")

    def __init__(self, reporter: _Reporter, route: str, model: str, context: CallContext, stream: bool) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context

        self._reporter = reporter
        self._begun, self._ticks = time.time(), time.perf_counter()
        self._response: ModelResponse | None = None
        self._last: AttemptRecord | None = None
        self._winner: AttemptRecord | None = None
        self._common: Attributes = {"gen_ai.operation.name": "chat", "gen_ai.request.model": model}
        self.span: Span = reporter.tracer.start_span(
            f"chat {model}",
            kind=SpanKind.CLIENT,
            attributes=_known({**self._common, **_asked(route, context), "gen_ai.request.stream": stream or None}),
        )
        self.context: Context = set_span_in_context(self.span)

    def tried(self, record: AttemptRecord) -> None:
        """An attempt of this call has ended."""
        self._last = record
        if record.verdict == "ok" and not record.wasted:
            self._winner = record
        self._reporter.attempt(record, self)

    def answered(self, response: ModelResponse) -> None:
        self._response = response

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._ticks
        self._common.update(self._who())
        failure = _failure(error, self._response)
        if self._response is not None:
            self.span.set_attributes(_known(self._answer(self._response)))
        self.span.set_attributes(_known({**self._common, **failure}))
        if isinstance(error, Exception):
            self._fail(error)
        self._measure(seconds, failure)
        self.span.end()

    def _who(self) -> Attributes:
        """Return who answered, or who was asked last; nobody was when the answer was there already."""
        asked = self._winner or self._last
        if asked is None:
            return {"gen_ai.provider.name": "ridethrough"}
        self.span.update_name(f"chat {asked.model}")
        return self._reporter.who(asked)

    def _fail(self, error: Exception) -> None:
        from opentelemetry.trace import Status, StatusCode

        self.span.set_status(Status(StatusCode.ERROR))
        if isinstance(error, ModelError):
            self.span.set_attributes(
                _known({"http.response.status_code": error.status, "ridethrough.code": error.code})
            )

    def _answer(self, response: ModelResponse) -> Attributes:
        shown: Attributes = {
            "gen_ai.response.model": response.model or None,
            "gen_ai.response.finish_reasons": [response.finish],
            "ridethrough.deployment": response.deployment or None,
            "ridethrough.attempts": response.attempts,
            "ridethrough.degraded": response.degraded,
            "ridethrough.request_id": response.request_id,
        }
        return {**shown, **self._spent(response, self._winner)} if self._winner else shown

    def _spent(self, response: ModelResponse, winner: AttemptRecord) -> Attributes:
        """Return what the answer took: only for one that was made now, kept ones are paid already."""
        usage, first = response.usage, winner.first_token_seconds
        return {
            "gen_ai.usage.input_tokens": usage.input_tokens,
            "gen_ai.usage.output_tokens": usage.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens or None,
            "gen_ai.usage.cache_creation.input_tokens": usage.cache_write_tokens or None,
            "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens or None,
            "gen_ai.response.time_to_first_chunk": None
            if first is None
            else max(0.0, winner.started_at - self._begun) + first,
            "ridethrough.cost_usd": response.cost_usd,
            "ridethrough.hedged": winner.hedged,
            "ridethrough.queue_seconds": winner.queue_seconds,
        }

    def _measure(self, seconds: float, failure: Attributes) -> None:
        labels = dict(self._common)
        if self._response is not None and self._response.model:
            labels["gen_ai.response.model"] = self._response.model
        self._reporter.meters.duration.record(seconds, {**labels, **failure})
        if self._response is not None and self._winner is not None:
            usage = self._response.usage
            for kind, count in (("input", usage.input_tokens), ("output", usage.output_tokens)):
                self._reporter.meters.tokens.record(count, {**labels, "gen_ai.token.type": kind})


def _failure(error: BaseException | None, response: ModelResponse | None) -> Attributes:
    """Return how a call failed, if it did: a caller that left before the answer has abandoned it."""
    if isinstance(error, Exception):
        return {"error.type": type(error).__name__}
    return {"error.type": "abandoned"} if response is None else {}


def _asked(route: str, context: CallContext) -> Attributes:
    return {
        "ridethrough.route": route,
        "ridethrough.run_id": context.run_id,
        "ridethrough.path": context.path or None,
        "ridethrough.workflow": context.workflow,
        "ridethrough.agent": context.agent,
        "ridethrough.tenant": context.tenant,
    }


def _chosen(record: AttemptRecord) -> Attributes:
    return {"ridethrough.route": record.route, "ridethrough.deployment": record.deployment}


def _details(record: AttemptRecord) -> Attributes:
    return {
        **_chosen(record),
        "ridethrough.attempt": record.number,
        "ridethrough.attempt_id": record.id,
        "ridethrough.verdict": record.verdict,
        "ridethrough.phase": record.phase or None,
        "ridethrough.hedged": record.hedged,
        "ridethrough.wasted": record.wasted,
        "ridethrough.queue_seconds": record.queue_seconds,
        "ridethrough.tokens_per_second": record.tokens_per_second,
        "ridethrough.input_tokens": record.input_tokens,
        "ridethrough.output_tokens": record.output_tokens,
        "ridethrough.cost_usd": record.cost_usd,
        "ridethrough.run_id": record.run_id,
        "ridethrough.agent": record.agent,
        "ridethrough.request_id": record.request_id,
        "ridethrough.code": record.code,
        "gen_ai.response.time_to_first_chunk": record.first_token_seconds,
        "http.response.status_code": record.status,
    }


def _known(attributes: Mapping[str, Any]) -> Attributes:
    return {name: value for name, value in attributes.items() if value is not None}


def _nanoseconds(seconds: float) -> int:
    """Return nanoseconds; a float of today is good to the microsecond and no further."""
    return round(seconds * 1e6) * 1000
