"""One model call: which deployment, one attempt at a time, and the verdict.

This is the only place that tries again. Deployments of a route are asked in order; an attempt that fails is void with
all it produced (``ModelReset``), and the next one starts afresh. What another deployment could not mend, or must not
evade (bad request, credential, content filter, context length), is raised as it is. When nobody answers the caller
gets ``Unavailable`` with a wake-up time, and decides: parking is the engine's business, which the router knows nothing
of.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import anyio

from ridethrough.runtime.config import Config, Model, Provider, Route, is_direct, load_config, nearest, resolve_secret
from ridethrough.runtime.errors import ConfigError, ModelError, Unavailable, UsageError
from ridethrough.runtime.events import ModelDelta, ModelReset
from ridethrough.runtime.router import prices
from ridethrough.runtime.router.attempt import Attempt, Deployment
from ridethrough.runtime.router.context import CallContext
from ridethrough.runtime.router.errors import FAILS_OVER, TABLE, Rule, worth_waiting
from ridethrough.runtime.router.messages import ModelRequest, ModelResponse, Usage
from ridethrough.runtime.router.providers.openai_chat import OpenAIChat, quirks_of
from ridethrough.runtime.router.providers.wire import Answer
from ridethrough.runtime.router.transport import Connections

OPENAI_URL = "https://api.openai.com/v1"


@dataclass(frozen=True)
class ModelFinished:
    """The last event of a stream: the whole response."""

    response: ModelResponse
    type: Literal["model_finished"] = "model_finished"


StreamEvent = ModelDelta | ModelReset | ModelFinished


@dataclass(frozen=True)
class Health:
    """What is known of a deployment: the last verdict (``ok``, an error's class, or ``unknown``) and counts."""

    deployment: str
    verdict: str = "unknown"
    at: float | None = None
    answered: int = 0
    failed: int = 0
    detail: str = ""


@dataclass
class _Call:
    """What one call carries through its attempts. Times are on anyio's clock."""

    request: ModelRequest
    route: str
    deployments: tuple[Deployment, ...]
    headers: Mapping[str, str]
    until: float
    patient_until: float
    listens: bool
    attempts: int = 0
    errors: list[ModelError] = field(default_factory=list[ModelError])


class Router:
    """Answers model requests by the routes of a configuration. Open it with ``Router.open``."""

    def __init__(self, config: Config, *, table: Iterable[Rule] = TABLE) -> None:
        """Prefer ``Router.open``, which also reads files."""
        self.config = config
        self._table = tuple(table)
        self._prices = prices.PriceList()
        self._stack: AsyncExitStack | None = None
        self._connections: dict[str, Connections] = {}
        self._deployments: dict[str, Deployment] = {}
        self._health: dict[str, Health] = {}
        self._simulated: dict[str, str] = {}

    @classmethod
    def open(cls, config: Config | Path | str | None = None, *, rules: Iterable[Rule] = ()) -> Router:
        """Return a router to be entered with ``async with``.

        Args:
            config: A configuration, a file's path, or nothing for the default file.
            rules: Rows to put in front of the table that classifies errors.

        Raises:
            ConfigError: The configuration cannot be used.
        """
        loaded = config if isinstance(config, Config) else load_config(config)
        return cls(loaded, table=(*rules, *TABLE))

    async def __aenter__(self) -> Router:
        """Start the configuration's simulated providers; connections are opened when they are needed."""
        self._stack = await AsyncExitStack().__aenter__()
        try:
            for name, provider in self.config.providers.items():
                if provider.kind == "simulated":
                    self._simulated[name] = await self._start_simulated(self._stack, provider)
        except BaseException:
            await self._stack.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close all connections and stop the simulated providers."""
        stack, self._stack = self._stack, None
        self._connections.clear()
        self._deployments.clear()
        if stack is not None:
            await stack.__aexit__(kind, error, traceback)

    # --- calls ------------------------------------------------------------------------------------------------------

    async def complete(self, request: ModelRequest, *, route: str, context: CallContext | None = None) -> ModelResponse:
        """Return the answer to ``request``.

        Args:
            request: What to ask.
            route: A route of the configuration, one of its models, or ``provider/model``.
            context: Who asks, and the deadline.

        Raises:
            Unavailable: No deployment answers now; it carries the attempts' errors and when to come back.
            ModelError: An error that another deployment would not mend.
            ConfigError: There is no such route, or a secret is missing.
        """
        async with aclosing(self._run(self._call(request, route, context, listens=False))) as events:
            async for event in events:
                if isinstance(event, ModelFinished):
                    return event.response
        raise AssertionError("a call ends with an answer or an error")

    async def stream(
        self, request: ModelRequest, *, route: str, context: CallContext | None = None
    ) -> AsyncGenerator[StreamEvent]:
        """Yield ``ModelDelta`` as text comes, ``ModelReset`` when it turns void, and at last ``ModelFinished``.

        Wrap it in ``contextlib.aclosing`` when you may leave the loop early, so that the connection is closed at once.

        Raises:
            ModelError, ConfigError: As ``complete``.
        """
        async with aclosing(self._run(self._call(request, route, context, listens=True))) as events:
            async for event in events:
                yield event

    async def _run(self, call: _Call) -> AsyncGenerator[StreamEvent]:
        while True:
            for deployment in call.deployments:
                attempt = self._attempt(call, deployment)
                async with aclosing(self._try(call, attempt)) as events:
                    async for event in events:
                        yield event
                if attempt.answer is not None:
                    yield ModelFinished(await self._response(call, attempt, attempt.answer))
                    return
                if anyio.current_time() >= call.until:
                    break
            await self._wait_in_place(call)

    async def _try(self, call: _Call, attempt: Attempt) -> AsyncGenerator[StreamEvent]:
        """Run one attempt. An error that another deployment may mend is noted; any other is raised."""
        name, shown, failure = attempt.deployment.name, False, None
        try:
            async with aclosing(attempt.run()) as texts:
                async for text in texts:
                    if call.listens and text:
                        shown = True
                        yield ModelDelta(text=text, attempt=attempt.id, deployment=name)
        except ModelError as error:
            failure = error
        self._note(name, failure)
        if failure is None:
            return
        if shown:
            yield ModelReset(attempt=attempt.id, deployment=name, error=failure.message)
        if not isinstance(failure, FAILS_OVER):
            raise failure
        call.errors.append(failure)

    async def _wait_in_place(self, call: _Call) -> None:
        """Wait for the first deployment that is worth another try, or give up.

        Raises:
            Unavailable: The wait would be longer than the route's patience or the call's deadline.
        """
        failed = call.errors[-len(call.deployments) :]
        wait = min(worth_waiting(error) for error in failed)
        patient = min(call.patient_until, call.until) - anyio.current_time()
        hinted = all(error.retry_after is not None for error in failed)
        pause = wait if hinted else min(wait, max(0.2, 0.2 * 2 ** (len(call.errors) // len(call.deployments) - 1)))
        if pause >= patient:
            raise _unavailable(call, failed, wait)
        await anyio.sleep(pause)

    # --- parts of a call --------------------------------------------------------------------------------------------

    def _call(self, request: ModelRequest, route: str, context: CallContext | None, *, listens: bool) -> _Call:
        context = context or CallContext()
        if context.floor is not None:
            raise ConfigError("this version does not support 'floor' yet: leave it out of the agent and the call")
        now = anyio.current_time()
        patience = self.config.routes[route].patience if route in self.config.routes else 0.0
        return _Call(
            request,
            route,
            self._resolve(route),
            _labels(context),
            until=now + context.deadline if context.deadline is not None else float("inf"),
            patient_until=now + patience,
            listens=listens,
        )

    def _attempt(self, call: _Call, deployment: Deployment) -> Attempt:
        call.attempts += 1
        headers, secrets = self._credentials(deployment)
        if deployment.provider in self._simulated:
            headers = {**headers, **call.headers}
        return Attempt(
            deployment,
            call.request,
            stream=call.listens or deployment.model.stream,
            headers=headers,
            secrets=secrets,
            until=call.until,
            table=self._table,
        )

    def _credentials(self, deployment: Deployment) -> tuple[dict[str, str], list[str]]:
        """Resolve the headers that hold secrets, at the time of the call: a rotated key is taken up at once."""
        provider = self.config.providers[deployment.provider]
        base = self.config.path.parent if self.config.path else None
        headers: dict[str, str] = {}
        secrets: list[str] = []
        if provider.api_key:
            secrets.append(resolve_secret(provider.api_key, base))
            headers["authorization"] = f"Bearer {secrets[0]}"
        for name, value in provider.headers.items():
            if value.startswith(("env:", "file:")):
                value = resolve_secret(value, base)
                secrets.append(value)
            headers[name] = value
        return headers, secrets

    async def _response(self, call: _Call, attempt: Attempt, answer: Answer) -> ModelResponse:
        usage, notes = answer.usage, [*attempt.rendered.notes, *answer.notes]
        if usage is None:
            usage = _estimated(attempt, answer)
            notes.append("the provider did not report usage: it is estimated")
        cost = await self._cost(attempt.deployment, usage)
        if cost is None:
            notes.append(f"no price is known for {attempt.deployment.model.model}: set models.*.price")
        return ModelResponse(
            message=answer.message,
            finish=answer.finish,
            usage=usage,
            cost_usd=cost,
            deployment=attempt.deployment.name,
            attempts=call.attempts,
            notes=tuple(notes),
            model=answer.model or attempt.deployment.model.model,
            request_id=attempt.request_id,
        )

    async def _cost(self, deployment: Deployment, usage: Usage) -> float | None:
        if deployment.price is not None:
            return prices.of(deployment.price)(usage)
        cost_of = await self._prices.find(deployment.model.model, deployment.connections.base_url)
        return cost_of(usage) if cost_of else None

    def _note(self, name: str, failure: ModelError | None) -> None:
        old = self._health.get(name) or Health(name)
        self._health[name] = replace(
            old,
            verdict=type(failure).__name__ if failure else "ok",
            at=time.time(),
            answered=old.answered + (failure is None),
            failed=old.failed + (failure is not None),
            detail=failure.message if failure else "",
        )

    # --- deployments ------------------------------------------------------------------------------------------------

    def _resolve(self, route: str) -> tuple[Deployment, ...]:
        if self._stack is None:
            raise UsageError("the router is not open: use it inside `async with Router.open(...) as router:`")
        return tuple(self._deployment(name) for name in self._names(route))

    def _names(self, route: str) -> tuple[str, ...]:
        if route in self.config.routes:
            return self.config.routes[route].models
        if route in self.config.models or is_direct(self.config, route):
            return (route,)
        provider, slash, _ = route.partition("/")
        if slash:
            hint = f": there is no provider '{provider}'{nearest(provider, self.config.providers)}"
        else:
            hint = nearest(route, {*self.config.routes, *self.config.models})
        where = self.config.path or "the configuration (no ridethrough.toml was found)"
        raise ConfigError(f"{where} has no route or model '{route}'{hint}")

    def _deployment(self, name: str) -> Deployment:
        if name not in self._deployments:
            self._deployments[name] = self._build(name, self._model(name))
        return self._deployments[name]

    def _model(self, name: str) -> Model:
        if name in self.config.models:
            return self.config.models[name]
        provider, _, model = name.partition("/")
        return Model.model_validate({"provider": provider, "model": model})

    def _build(self, name: str, model: Model) -> Deployment:
        url = self._base_url(model.provider)
        simulated = model.provider in self._simulated
        return Deployment(
            name,
            model.provider,
            model,
            OpenAIChat(model.provider, quirks=quirks_of(url), table=self._table),
            self._connect(model.provider, url),
            price=model.price or (prices.SIMULATED if simulated else None),
        )

    def _base_url(self, provider: str) -> str:
        return self._simulated.get(provider) or self.config.providers[provider].base_url or OPENAI_URL

    def _connect(self, provider: str, url: str) -> Connections:
        assert self._stack is not None
        if provider not in self._connections:
            self._connections[provider] = connections = Connections(url)
            self._stack.push_async_exit(connections)
        return self._connections[provider]

    async def _start_simulated(self, stack: AsyncExitStack, provider: Provider) -> str:
        from ridethrough.runtime.router.providers.simulated import Script, SimulatedProvider, load_script

        script = load_script(provider.script, self.config.locate) if provider.script else Script()
        ledger = self.config.locate(provider.ledger) if provider.ledger else None
        server = await stack.enter_async_context(SimulatedProvider(script, ledger=ledger))
        return server.base_url

    # --- what people ask --------------------------------------------------------------------------------------------

    def route(self, name: str) -> Route:
        """Return the settings of a route; a single model has the defaults.

        Raises:
            ConfigError: There is no such route or model.
        """
        return self.config.routes.get(name) or Route(models=self._names(name))  # pyright: ignore[reportCallIssue]

    def deployments(self) -> dict[str, Model]:
        """Return the deployments by name: the configured ones in the file's order, then those of direct calls."""
        return {name: self._model(name) for name in dict.fromkeys((*self.config.models, *self._deployments))}

    def health(self) -> dict[str, Health]:
        """Return the last verdict of every deployment, by name."""
        names = dict.fromkeys((*self.config.models, *self._health))
        return {name: self._health.get(name) or Health(name) for name in names}

    def explain(self, route: str) -> dict[str, Any]:
        """Say which deployments a route asks, in order, and what follows from each class of error.

        Raises:
            ConfigError: There is no such route or model.
        """
        settings = self.route(route)
        return {
            "route": route,
            "strategy": settings.strategy,
            "patience": settings.patience,
            "otherwise": list(settings.otherwise),
            "deployments": [{"name": name, **self._describe(name)} for name in settings.models],
            "errors": _consequences(settings),
        }

    def _describe(self, name: str) -> dict[str, Any]:
        shown = self._model(name).model_dump(mode="json", include={"provider", "model", "tier", "timeouts"})
        return {**shown, "last": (self._health.get(name) or Health(name)).verdict}


def _labels(context: CallContext) -> dict[str, str]:
    """Return headers that tell a simulated provider who calls; nobody else gets them."""
    values = {"run-id": context.run_id, "agent": context.agent, "workflow": context.workflow, "tenant": context.tenant}
    encoded = {key: value.encode("ascii", "backslashreplace").decode() for key, value in values.items() if value}
    return {f"x-ridethrough-{key}": value for key, value in encoded.items()}


def _estimated(attempt: Attempt, answer: Answer) -> Usage:
    said = len(answer.message.model_dump_json())
    return Usage(input_tokens=len(attempt.rendered.body) // 4, output_tokens=max(1, said // 4))


def _unavailable(call: _Call, failed: list[ModelError], wait: float) -> Unavailable:
    told = "; ".join(f"{type(error).__name__}: {error.message}" for error in failed)
    text = f"no deployment of '{call.route}' answers now ({told}); another try is worth it in {wait:g} s"
    return Unavailable(text, errors=tuple(call.errors), retry_after=wait)


def _consequences(route: Route) -> dict[str, str]:
    goes_on = "ask the next deployment" if len(route.models) > 1 else "give up as Unavailable"
    stays = ("ContextLength", "ContentFilter", "InvalidRequest", "Auth")
    return {**{kind.__name__: goes_on for kind in FAILS_OVER}, **dict.fromkeys(stays, "raise it as it is")}
