"""One model call, from the question to the answer: the only place in the system that tries again.

    cache -> a place (priority, health, rates) -> money -> attempt -> verdict -> another attempt | answer | Unavailable

An attempt that fails is void with all it produced (``ModelReset``); the next one starts afresh. What another
deployment could not mend, or must not evade (bad request, credential, content filter), is raised as it is. When
nobody at or above the floor answers, the route's ladder is gone down; at its end stands ``Unavailable`` with a wake-up
condition, and the caller decides: parking is the engine's business, which the router knows nothing of.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any

import anyio
import anyio.abc

from ridethrough.runtime.clock import Epoch
from ridethrough.runtime.config import TIERS, Config, Model, Route, Tier, load_config
from ridethrough.runtime.errors import (
    Auth,
    BudgetExceeded,
    ConfigError,
    ContentFilter,
    ContextLength,
    InvalidRequest,
    ModelError,
    Slow,
    StoreError,
    Unavailable,
    UsageError,
)
from ridethrough.runtime.events import ModelDelta, ModelReset
from ridethrough.runtime.router import budget, cache, crowd, describe
from ridethrough.runtime.router.attempt import Attempt
from ridethrough.runtime.router.books import Books, estimated
from ridethrough.runtime.router.call import (
    Call,
    Listener,
    Place,
    awaits_of,
    higher,
)
from ridethrough.runtime.router.choice import in_order, needs_of, refusal
from ridethrough.runtime.router.context import CallContext
from ridethrough.runtime.router.deployment import Deployment
from ridethrough.runtime.router.entrance import Entrance
from ridethrough.runtime.router.errors import FAILS_OVER, TABLE, Rule, rules_of, seconds_before_retry
from ridethrough.runtime.router.health import Health, State
from ridethrough.runtime.router.knowledge import READ_SECONDS, Knowledge
from ridethrough.runtime.router.ledger import AttemptRecord, DeploymentState, KeptAnswer, Ledger, MemoryLedger
from ridethrough.runtime.router.messages import AssistantMessage, ModelRequest, ModelResponse
from ridethrough.runtime.router.providers.wire import Answer
from ridethrough.runtime.router.purse import Purse
from ridethrough.runtime.router.race import HedgingBudget, Race, run_attempt
from ridethrough.runtime.router.redaction import keep_headers_out_of_logs
from ridethrough.runtime.router.roster import Roster
from ridethrough.runtime.router.stream import ModelFinished, Pipe, StreamEvent
from ridethrough.runtime.router.telemetry import CallSpan, Telemetry

log = logging.getLogger("ridethrough")

TICK = 0.05
"""Seconds between two looks at calls in flight and at those that wait, while there are any."""

RETRY_REST = 10.0
"""Seconds that a call stays away from a deployment that has failed it, when the deployment's retries are used up."""

FRESH_SECONDS = 10.0
"""How long a refusal by an account is news, which nobody's word outweighs."""


class Router:
    """Answers model requests by the routes of a configuration. Open it with ``Router.open``."""

    def __init__(
        self,
        config: Config,
        *,
        table: Iterable[Rule] = TABLE,
        ledger: Ledger | None = None,
        random: Random | None = None,
    ) -> None:
        """Prefer ``Router.open``, which also reads files."""
        self.config = config
        self.ledger: Ledger = ledger if ledger is not None else MemoryLedger()
        self._table = tuple(table)
        self._random = random or Random()
        self._telemetry = Telemetry()
        self._roster = Roster(config, self._table, self._health_changed, self._telemetry.know, self._random)
        self._stir = anyio.Event()
        self._purse = Purse(config.budgets, self.ledger)
        self._entrance = Entrance(self._roster, self._below, self._purse.used_up, lambda: self._stir.set())
        self._flights = cache.SingleFlight()
        self._hedging = HedgingBudget()
        self._epoch = Epoch()
        self._knowledge = Knowledge(self._roster, self.ledger, self._state, self._epoch)
        touched = self._knowledge.touched
        self._books = Books(
            self._roster, self._purse, self.ledger, self._telemetry, self._hedging, touched, self._epoch
        )
        self._expected = crowd.Expected()
        self._stack: AsyncExitStack | None = None
        self._tasks: anyio.abc.TaskGroup | None = None

    @classmethod
    def open(
        cls,
        config: Config | Path | str | None = None,
        *,
        rules: Iterable[Rule] = (),
        ledger: Ledger | None = None,
        random: Random | None = None,
    ) -> Router:
        """Return a router to be entered with ``async with``.

        Args:
            config: A configuration, a file's path, or nothing for the default file.
            rules: Rows to put in front of the table that classifies errors, and of the configuration's own.
            ledger: Where money, answers and attempts are kept; in this process when left out.
            random: A source of chance, for tests.

        Raises:
            ConfigError: The configuration cannot be used.
        """
        loaded = config if isinstance(config, Config) else load_config(config)
        return cls(loaded, table=(*rules, *rules_of(loaded.errors), *TABLE), ledger=ledger, random=random)

    async def __aenter__(self) -> Router:
        """Start the configuration's simulated providers and the watch over calls in flight."""
        keep_headers_out_of_logs()
        self._stack = await AsyncExitStack().__aenter__()
        try:
            await self._roster.open(self._stack)
            self._tasks = await self._stack.enter_async_context(anyio.create_task_group())
            await self._knowledge.read()  # before the first call: runs of a dead worker come all at once
            self._tasks.start_soon(self._watch)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close all connections and stop the simulated providers."""
        await self._close()

    async def _close(self) -> None:
        stack, self._stack = self._stack, None
        self._knowledge.publish(anyio.current_time(), last=True)
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()
        if stack is not None:
            # The body's error is not handed on: the task group would wrap it into a group.
            await stack.__aexit__(None, None, None)
        self._tasks = None
        self._roster.close()

    # --- calls ------------------------------------------------------------------------------------------------------

    async def complete(
        self,
        request: ModelRequest,
        *,
        route: str,
        context: CallContext | None = None,
        listener: Listener | None = None,
    ) -> ModelResponse:
        """Return the answer to ``request``.

        Args:
            request: What to ask.
            route: A route of the configuration, one of its models, or ``provider/model``.
            context: Who asks, and the deadline.
            listener: Is told of text as it comes (``ModelDelta``) and of what turns void (``ModelReset``).

        Raises:
            Unavailable: No deployment answers now; it carries the attempts' errors and when to come back.
            BudgetExceeded: A budget that says ``fail`` is used up.
            ModelError: An error that another deployment would not mend.
            ConfigError: There is no such route, a secret is missing, or nobody of the route may answer.
        """
        context = context or CallContext()
        if self._stack is None:
            raise UsageError("the router is not open: use it inside `async with Router.open(...) as router:`")
        settings = self._roster.route(route)
        asked_first = self._roster.model(settings.models[0]).model
        with self._telemetry.call(route=route, model=asked_first, context=context, stream=listener is not None) as span:
            call = await self._call(request, route, settings, context, listener, span)
            try:
                response = await self._answer(call)
            except Auth as error:  # whoever can wait need not be told by a person that the key is good again
                self._say_when(call, error)
                raise
            span.answered(response)
            return response

    def _say_when(self, call: Call, error: Auth) -> None:
        """Put the condition into the error of a refused key: when it is tried again, whatever others could answer."""
        failed = error.deployment
        others = [name for name in call.route.models if name != failed]
        error.awaits = awaits_of(call.name, call.floor, others)
        if error.retry_after is None and failed in self._roster.deployments:
            shut_until = self._roster.deployments[failed].credential.shut_until
            error.retry_after = max(0.0, shut_until - anyio.current_time())

    async def stream(
        self, request: ModelRequest, *, route: str, context: CallContext | None = None
    ) -> AsyncGenerator[StreamEvent]:
        """Yield ``ModelDelta`` as text comes, ``ModelReset`` when it turns void, and at last ``ModelFinished``.

        The call runs in a task of its own: leaving the loop early gives it up (wrap the generator in
        ``contextlib.aclosing``, so that this happens at once).

        Raises:
            ModelError, ConfigError: As ``complete``.
        """
        if self._tasks is None:
            raise UsageError("the router is not open: use it inside `async with Router.open(...) as router:`")
        pipe = Pipe()

        async def ask() -> ModelFinished:
            return ModelFinished(await self.complete(request, route=route, context=context, listener=pipe.put))

        self._tasks.start_soon(pipe.run, ask)
        try:
            while (event := await pipe.next()) is not None:
                yield event
        finally:
            pipe.give_up()

    async def _call(
        self,
        request: ModelRequest,
        name: str,
        settings: Route,
        context: CallContext,
        listener: Listener | None,
        span: CallSpan,
    ) -> Call:
        now, needs = anyio.current_time(), needs_of(request)
        deployments = await self._roster.of(settings)
        floor = higher(settings.floor, _tier(context.floor))
        refusals = {each.name: refusal(each, needs, floor, request.max_tokens) for each in deployments}
        refused = {name: why for name, why in refusals.items() if why is not None}
        candidates = [each for each in deployments if each.name not in refused]
        if not candidates:
            raise _nobody_may(name, refused)
        return Call(
            request,
            name,
            settings,
            context,
            floor,
            needs,
            in_order(settings, candidates, needs, request.max_tokens, self._random),
            now,
            now + context.deadline if context.deadline is not None else math.inf,
            settings.patience,
            listener,
            span,
            caps=budget.caps_for(self.config.budgets, context, time.time()) if self.config.budgets else (),
        )

    async def _answer(self, call: Call) -> ModelResponse:
        self._arrived(call)
        if call.route.cache == "off" and "cache" not in call.route.otherwise:
            return await self._ask(call)
        key = self._cache_key(call)
        if call.route.cache == "exact":
            if (fresh := await self._kept(call, key, call.route.cache_ttl)) is not None:
                return fresh
            try:
                response, shared = await self._flights.do(key, lambda: self._ask_and_keep(call, key), call.until)
            except cache.TooLate:
                raise _too_late(call) from None
            return (
                cache.from_cache(response.model_dump_json(), "asked at the same time by another")
                if shared
                else response
            )
        return await self._ask_and_keep(call, key)

    async def _ask_and_keep(self, call: Call, key: str) -> ModelResponse:
        response = await self._ask(call)
        if cache.may_be_kept(response) and not response.cached:
            try:
                await self.ledger.keep_answer(key, KeptAnswer(response.model_dump_json(), time.time()))
            except StoreError as error:
                log.warning("an answer of '%s' could not be kept: %s", call.name, error)
        return response

    def _cache_key(self, call: Call) -> str:
        models = [self._roster.model(name) for name in call.route.models]
        return cache.key_of(call.request, [f"{each.provider}/{each.model}" for each in models], call.context)

    async def _kept(self, call: Call, key: str, ttl: float | None) -> ModelResponse | None:
        try:
            kept = await self.ledger.answer(key)
        except StoreError as error:  # the models are asked, as if nothing had been kept
            log.warning("kept answers of '%s' could not be read: %s", call.name, error)
            return None
        if kept is None or (ttl is not None and time.time() - kept.kept_at > ttl):
            return None
        return cache.from_cache(kept.response, f"from the cache: answered {time.time() - kept.kept_at:.0f} s ago")

    async def _ask(self, call: Call) -> ModelResponse:
        """The retry loop."""
        while True:
            if call.errors and anyio.current_time() >= call.until:
                raise self._entrance.unavailable(call, anyio.current_time(), 0.0)
            found = await self._entrance.place(call)
            if isinstance(found, ModelResponse):
                return found
            if not await self._pay(call, found):
                continue
            response = await self._attempt(call, found)
            if response is not None:
                return response

    # --- the rungs that answer at once --------------------------------------------------------------------------------

    async def _below(self, call: Call) -> ModelResponse | None:
        """Try the rungs that answer at once: a kept answer, a static one. Once a call."""
        if call.looked_below:
            return None
        call.looked_below = True
        for rung in call.route.otherwise:
            if rung == "cache" and (kept := await self._kept(call, self._cache_key(call), None)) is not None:
                return kept.model_copy(update={"degraded": "cache", "attempts": call.attempts})
            if rung == "static":
                return self._static(call)
        return None

    def _static(self, call: Call) -> ModelResponse:
        return ModelResponse(
            message=AssistantMessage(content=call.route.static or ""),
            cost_usd=0.0,
            attempts=call.attempts,
            degraded="static",
            notes=("nobody answered: this is the route's static answer",),
        )

    async def _pay(self, call: Call, place: Place) -> bool:
        """Put money aside for an attempt; its place is given back when that cannot be done.

        Raises:
            ConfigError, BudgetExceeded, Unavailable: As ``Purse.pay``.
        """
        paid, place.ticket.held = False, True
        try:
            paid = await self._purse.pay(call, place)
        finally:
            if not paid:
                self._entrance.give_back(place)
        place.ticket.held, place.ticket.started = False, anyio.current_time()
        return paid

    # --- attempts ---------------------------------------------------------------------------------------------------

    async def _attempt(self, call: Call, place: Place) -> ModelResponse | None:
        """Make one attempt (two, when it is hedged); ``None`` when it failed and another deployment may mend that.

        Raises:
            ModelError: One that nobody else would mend.
        """
        try:
            first = self._begin(call, place)
        except BaseException:
            self._entrance.give_back(place)
            await self._purse.settle(place, 0.0)
            raise
        race = Race(first, place)
        try:
            await self._run(call, race)
        finally:
            with anyio.CancelScope(shield=True):
                for attempt in race.attempts:
                    await self._books.finish(call, race, attempt)
                self._entrance.pump()
        winner = race.winner
        if winner is not None and winner.answer is not None:
            return self._judge_answer(call, winner, race)
        for failed in race.attempts:
            if (failure := race.failures.get(failed)) is not None:
                self._note_failure(call, failed, failure)
        return None

    def _begin(self, call: Call, place: Place, *, hedged: bool = False) -> Attempt:
        deployment = place.deployment
        headers, secrets = self._roster.credentials(deployment)
        self._entrance.sent(deployment, secrets)
        if self._roster.is_simulated(deployment.provider):
            headers = {**headers, **_labels(call.context)}
        attempt = Attempt(
            deployment,
            call.request,
            place.ticket,
            stream=call.listener is not None or deployment.model.stream,
            headers=headers,
            secrets=secrets,
            until=call.until,
            table=self._table,
            hedged=hedged,
        )
        call.attempts += 1
        attempt.number = call.attempts
        return attempt

    async def _run(self, call: Call, race: Race) -> None:
        race.listen(self._tell(call))
        self._stir.set()
        first = race.attempts[0]
        after = first.deployment.health.hedge_after(call.needs.tokens) if call.route.hedge else None
        if after is None:
            race.failures[first] = await run_attempt(first)
            if race.failures[first] is None:
                race.won(first)
            return
        await race.run(after, lambda: self._second(call, race))

    async def _second(self, call: Call, race: Race) -> tuple[Attempt, Place] | None:
        """Begin a second attempt beside a slow one, if the hedging budget, a place and the money are there."""
        if self._entrance.is_waited_at or not self._hedging.take():  # those who wait for a first attempt go before
            return None
        hedge = None
        try:
            place = self._entrance.take(call, but=(race.attempts[0].deployment.name,), beside=True)
            if place is not None and await self._pay(call, place):
                hedge = await self._beside(call, race, place)
        except (BudgetExceeded, ConfigError, ModelError, StoreError) as error:  # the first is under way: go on with it
            log.debug("no second attempt beside %s: %s", race.attempts[0].deployment.name, error)
        if hedge is None:
            self._hedging.give_back()
        return hedge

    async def _beside(self, call: Call, race: Race, place: Place) -> tuple[Attempt, Place] | None:
        """Begin the second attempt, unless the first has given output while money was put aside."""
        try:
            if race.winner is None:
                return self._begin(call, place, hedged=True), place
        except BaseException:
            self._entrance.give_back(place)
            await self._purse.settle(place, 0.0)
            raise
        self._entrance.give_back(place)
        await self._purse.settle(place, 0.0)
        return None

    def _tell(self, call: Call) -> Any:
        listener = call.listener
        if listener is None:
            return None

        def said(attempt: Attempt, text: str) -> None:
            attempt.shown = True
            listener(ModelDelta(text=text, attempt=attempt.id, deployment=attempt.deployment.name))

        return said

    def _note_failure(self, call: Call, attempt: Attempt, failure: ModelError) -> None:
        """Take back what was shown, and see who may mend the failure.

        Raises:
            ModelError: Nobody.
        """
        name, now = attempt.deployment.name, anyio.current_time()
        if attempt.shown and call.listener is not None:
            call.listener(ModelReset(attempt=attempt.id, deployment=name, error=failure.message))
        if not isinstance(failure, FAILS_OVER):
            call.candidates = self._others_for(call, attempt.deployment, failure)
            if not call.candidates:
                raise failure
        call.errors.append(failure)
        tries = sum(error.deployment == name for error in call.errors)
        wait = seconds_before_retry(failure, tries, self._random)
        if not attempt.deployment.retries.take(2.0 if isinstance(failure, Slow) else 1.0):
            wait = max(wait, RETRY_REST)
        call.not_before[name] = now + wait

    def _others_for(self, call: Call, failed: Deployment, failure: ModelError) -> list[Deployment]:
        """Return who else may be asked after an error that does not fail over by default."""
        others = [each for each in call.candidates if each is not failed]
        if isinstance(failure, ContextLength):
            window = failed.context_window
            return [each for each in others if window and (each.context_window or 0) > window]
        if isinstance(failure, Auth):
            siblings = self._roster.siblings(failed, others)
            return sorted(others, key=lambda each: each not in siblings) if "auth" in call.route.failover else siblings
        if isinstance(failure, ContentFilter):
            return others if "content_filter" in call.route.failover else []
        if isinstance(failure, InvalidRequest):
            return others if "invalid_request" in call.route.failover else []
        return []

    # --- answers ----------------------------------------------------------------------------------------------------

    def _judge_answer(self, call: Call, attempt: Attempt, race: Race) -> ModelResponse | None:
        answer = attempt.answer
        assert answer is not None
        if answer.finish == "content_filter" and "content_filter" in call.route.failover:
            others = [each for each in call.candidates if each is not attempt.deployment]
            if others:
                text = f"{attempt.deployment.name} withheld its answer (content filter)"
                self._note_failure(call, attempt, ContentFilter(text, deployment=attempt.deployment.name))
                return None
        return self._response(call, attempt, answer)

    def _response(self, call: Call, attempt: Attempt, answer: Answer) -> ModelResponse:
        deployment = attempt.deployment
        usage, notes = answer.usage, [*attempt.rendered.notes, *answer.notes]
        if usage is None:
            usage = estimated(attempt, answer)
            notes.append("the provider did not report usage: it is estimated")
        cost = deployment.cost_of(usage) if deployment.cost_of is not None else None
        if cost is None:
            notes.append(f"no price is known for {deployment.model.model}: set models.*.price")
        return ModelResponse(
            message=answer.message,
            finish=answer.finish,
            usage=usage,
            cost_usd=cost,
            deployment=deployment.name,
            attempts=call.attempts,
            degraded=self._degraded(call, deployment),
            notes=tuple(notes),
            model=answer.model or deployment.model.model,
            request_id=attempt.request_id,
        )

    def _degraded(self, call: Call, deployment: Deployment) -> Tier | None:
        """The tier that answered, when the route has a higher one."""
        tier = deployment.model.tier
        best: Tier | None = None
        for name in call.route.models:
            best = higher(best, self._roster.model(name).tier)
        return tier if tier is not None and higher(tier, best) != tier else None

    # --- the watch --------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Look at calls in flight and at those that wait, a few times a second while there are any."""
        while True:
            await self._stir.wait()
            if not self._is_busy():
                self._knowledge.publish(anyio.current_time(), last=True)
                self._stir = anyio.Event()
                continue
            slept_at = anyio.current_time()
            await anyio.sleep(TICK)
            now = anyio.current_time()
            try:
                self._excuse(now - slept_at - TICK, now)
                await self._tick(now)
            except Exception:  # nobody awaits this task: its end would end every call
                log.exception("the router's watch stumbled; it goes on")

    def _excuse(self, seconds: float, now: float) -> None:
        """Do not blame deployments for the time in which this process could not listen to them."""
        if seconds > TICK:
            for deployment in self._roster.deployments.values():
                deployment.health.stood_still(seconds, now)

    async def _tick(self, now: float) -> None:
        for deployment in self._roster.deployments.values():
            if deployment.health.flight or deployment.health.state == "ramping":
                deployment.health.check(now)
        self._entrance.pump()
        self._knowledge.publish(now)
        if now - self._knowledge.read_at >= READ_SECONDS:
            await self._knowledge.read()

    def _is_busy(self) -> bool:
        return self._entrance.is_waited_at or any(each.health.flight for each in self._roster.deployments.values())

    def _health_changed(self, health: Health, old: State, why: str) -> None:
        self._knowledge.changed(health.name)
        self._telemetry.transition(health.name, old, health.state, why)

    def _state(self, deployment: Deployment, now: float) -> DeploymentState:
        return describe.state_of(deployment, now, self._epoch.offset, self._entrance.waiting_for(deployment))

    def _arrived(self, call: Call) -> None:
        """A call for which room was promised has come."""
        if self._expected:
            self._expected.arrived(call.awaits, call.caps, call.started)

    # --- waking -----------------------------------------------------------------------------------------------------

    async def room(self, awaits: str) -> int:
        """Return how many of those who wait under a condition (``Unavailable.awaits``) may come now.

        It is the ramp's room while a deployment recovers, a handful at a time otherwise. The caller says with
        ``expect`` how many it has sent, so that they are not counted as room again until they are here.

        Raises:
            ConfigError: The condition names a route that is gone.
        """
        kind, *what = json.loads(awaits)
        room = await (self._purse.left(*what) if kind == "budget" else self._room_of_route(*what))
        return max(0, room - self._expected.count(awaits, anyio.current_time()))

    async def _room_of_route(self, name: str, floor: str | None, others: Sequence[str] = ()) -> int:
        deployments = await self._roster.of(self._roster.route(name))
        may = crowd.may_come(deployments, floor, others)
        return crowd.room_of(may, anyio.current_time()) - self._entrance.queued(name)

    def expect(self, awaits: str, count: int) -> None:
        """Say that so many of those who waited are on their way; they are given two seconds."""
        self._expected.add(awaits, count, anyio.current_time())

    # --- what people ask and say ------------------------------------------------------------------------------------

    def ask_again(self) -> None:
        """Somebody says that what accounts and keys were refused for is mended: the next call tells.

        What was refused a moment ago stays refused: whoever says so of a thousand runs makes one call in ten seconds.
        """
        now = anyio.current_time()
        for deployment in self._roster.deployments.values():
            credential = deployment.credential
            if credential.reason in ("quota", "auth") and now - credential.refused_at >= FRESH_SECONDS:
                credential.reopen(now)

    def route(self, name: str) -> Route:
        """Return the settings of a route; a single model has the defaults.

        Raises:
            ConfigError: There is no such route or model.
        """
        return self._roster.route(name)

    def deployments(self) -> dict[str, Model]:
        """Return the deployments by name: the configured ones in the file's order, then those of direct calls."""
        names = dict.fromkeys((*self.config.models, *self._roster.deployments))
        return {name: self._roster.model(name) for name in names}

    def states(self) -> list[DeploymentState]:
        """Return what this process knows of every deployment."""
        now = anyio.current_time()
        known = self._roster.deployments
        names = dict.fromkeys((*self.config.models, *known))
        return [self._state(known[name], now) if name in known else DeploymentState(name) for name in names]

    def health(self) -> dict[str, DeploymentState]:
        """Return what this process knows of every deployment, by name."""
        return {state.deployment: state for state in self.states()}

    def explain(self, route: str) -> dict[str, Any]:
        """Say which deployments a route asks, in order, and what follows from each class of error.

        Raises:
            ConfigError: There is no such route or model.
        """
        settings = self._roster.route(route)
        models = {name: self._roster.model(name) for name in settings.models}
        return describe.explain(route, settings, models, self.health(), self._roster.deployments, self.config)

    async def look_up(self, route: str) -> None:
        """Find the prices and context windows of a route's models, as its first call would.

        Raises:
            ConfigError: There is no such route or model.
        """
        await self._roster.of(self._roster.route(route))

    async def ping(self, name: str, *, seconds: float = 30.0) -> AttemptRecord:
        """Make one tiny real call to one deployment, whatever is known of its health; it costs a little.

        Raises:
            ConfigError: There is no such deployment, or its secret is missing.
        """
        now = anyio.current_time()
        deployment = (await self._roster.of(self._roster.route(name)))[0]
        headers, secrets = self._roster.credentials(deployment)
        attempt = Attempt(
            deployment,
            ModelRequest([{"role": "user", "content": "Say: ok"}], max_tokens=16),
            deployment.health.begin_ping(now),
            stream=deployment.model.stream,
            headers=headers,
            secrets=secrets,
            until=now + seconds,
            table=self._table,
        )
        failure = await run_attempt(attempt)
        record = describe.ping_record(attempt, failure, self._epoch.offset)
        self.ledger.note_attempt(record)
        self._telemetry.attempt(record)
        return record


def _tier(name: str | None) -> Tier | None:
    """Check a floor that came with a call.

    Raises:
        ConfigError: There is no such tier.
    """
    if name is None:
        return None
    for tier in TIERS:
        if tier == name:
            return tier
    raise ConfigError(f"floor={name!r} is none of {', '.join(TIERS)}")


def _nobody_may(route: str, refused: Mapping[str, str]) -> ModelError | ConfigError:
    """Build the error of a request that no deployment of a route may answer."""
    told = "; ".join(f"{name}: {why}" for name, why in refused.items())
    if all("context window" in why for why in refused.values()):
        return ContextLength(f"the request is too long for every deployment of '{route}' ({told}): shorten it")
    return ConfigError(
        f"no deployment of '{route}' may answer this request ({told}): add one that can, or ask for less"
    )


def _too_late(call: Call) -> Unavailable:
    text = f"the same question to '{call.name}' is being asked by another call, and this one's deadline is over"
    return Unavailable(text, retry_after=0.0, reason="brownout")


def _labels(context: CallContext) -> dict[str, str]:
    """Return headers that tell a simulated provider who calls; nobody else gets them."""
    values = {"run-id": context.run_id, "agent": context.agent, "workflow": context.workflow, "tenant": context.tenant}
    encoded = {key: value.encode("ascii", "backslashreplace").decode() for key, value in values.items() if value}
    return {f"x-ridethrough-{key}": value for key, value in encoded.items()}
