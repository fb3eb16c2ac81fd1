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
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any

import anyio
import anyio.abc

from ridethrough.runtime.config import TIERS, Config, Model, Route, Tier, load_config
from ridethrough.runtime.errors import (
    Auth,
    BudgetExceeded,
    ConfigError,
    ContentFilter,
    ContextLength,
    InvalidRequest,
    ModelError,
    Overloaded,
    QuotaExhausted,
    RateLimited,
    Slow,
    StoreError,
    Transport,
    Unavailable,
    UsageError,
)
from ridethrough.runtime.events import ModelDelta, ModelReset
from ridethrough.runtime.router import budget, cache, crowd, describe
from ridethrough.runtime.router.admission import SHUT_REASONS, Queue, Scope, ShutReason, Waiter, serve
from ridethrough.runtime.router.attempt import Attempt
from ridethrough.runtime.router.call import (
    QUEUE_SECONDS,
    Call,
    Listener,
    Place,
    awaits_of_budget,
    higher,
)
from ridethrough.runtime.router.choice import in_order, needs_of, refusal
from ridethrough.runtime.router.context import CallContext
from ridethrough.runtime.router.deployment import Deployment
from ridethrough.runtime.router.errors import FAILS_OVER, TABLE, Rule, pause_reason, seconds_before_retry
from ridethrough.runtime.router.health import Health, State
from ridethrough.runtime.router.ledger import AttemptRecord, DeploymentState, KeptAnswer, Ledger, MemoryLedger, Refusal
from ridethrough.runtime.router.limits import read_limits
from ridethrough.runtime.router.messages import AssistantMessage, ModelRequest, ModelResponse, Usage
from ridethrough.runtime.router.providers.wire import Answer
from ridethrough.runtime.router.race import HedgingBudget, Race, run_attempt
from ridethrough.runtime.router.roster import Roster
from ridethrough.runtime.router.stream import ModelFinished, Pipe, StreamEvent
from ridethrough.runtime.router.telemetry import CallSpan, Telemetry

log = logging.getLogger("ridethrough")

TICK = 0.05
"""Seconds between two looks at calls in flight and at those that wait, while there are any."""

PUBLISH_SECONDS = 1.0
READ_SECONDS = 2.0
"""How often what is known is written for others, and read from them, while there is anything to do."""

HOLD_GRACE = 60.0
"""Seconds after an attempt's last deadline until money that was put aside for it counts as spent."""

RETRY_REST = 10.0
"""Seconds that a call stays away from a deployment that has failed it, when the deployment's retries are used up."""

CROWDED: tuple[type[ModelError], ...] = (Overloaded, RateLimited, Slow)
"""Errors that fewer calls at once may help against."""

FRESH_SECONDS = 10.0
"""How long a refusal by an account is news, which nobody's word outweighs."""

SLICE = 1.0
"""How long a call waits at most before it looks again whether waiting is worth it."""


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
        self._queues: dict[tuple[object, ...], Queue] = {}
        self._waiting: dict[Waiter, Call] = {}
        self._flights = cache.SingleFlight()
        self._hedging = HedgingBudget()
        self._expected = crowd.Expected()
        self._sent: dict[Scope, int] = {}
        """Which key was sent last, by what it opens."""
        self._stack: AsyncExitStack | None = None
        self._tasks: anyio.abc.TaskGroup | None = None
        self._stir = anyio.Event()
        self._unpublished: set[str] = set()
        self._published_at = self._read_at = -math.inf
        self._clock_offset = 0.0

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
            rules: Rows to put in front of the table that classifies errors.
            ledger: Where money, answers and attempts are kept; in this process when left out.
            random: A source of chance, for tests.

        Raises:
            ConfigError: The configuration cannot be used.
        """
        loaded = config if isinstance(config, Config) else load_config(config)
        return cls(loaded, table=(*rules, *TABLE), ledger=ledger, random=random)

    async def __aenter__(self) -> Router:
        """Start the configuration's simulated providers and the watch over calls in flight."""
        self._stack = await AsyncExitStack().__aenter__()
        try:
            await self._roster.open(self._stack)
            self._tasks = await self._stack.enter_async_context(anyio.create_task_group())
            self._clock_offset = time.time() - anyio.current_time()
            await self._learn_from_others()  # before the first call: runs of a dead worker come all at once
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
        self._publish(anyio.current_time(), last=True)
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
            response = await self._answer(call)
            span.answered(response)
            return response

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
            refused,
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
        kept = await self.ledger.answer(key)
        if kept is None or (ttl is not None and time.time() - kept.kept_at > ttl):
            return None
        return cache.from_cache(kept.response, f"from the cache: answered {time.time() - kept.kept_at:.0f} s ago")

    async def _ask(self, call: Call) -> ModelResponse:
        """The retry loop."""
        while True:
            if call.errors and anyio.current_time() >= call.until:
                raise self._unavailable(call, anyio.current_time(), 0.0)
            found = await self._place(call)
            if isinstance(found, ModelResponse):
                return found
            if not await self._pay(call, found):
                continue
            response = await self._attempt(call, found)
            if response is not None:
                return response

    # --- a place ----------------------------------------------------------------------------------------------------

    async def _place(self, call: Call) -> Place | ModelResponse:
        """Wait for a place at a deployment, or go down the ladder.

        Raises:
            Unavailable: Waiting is not worth it.
        """
        if not self._waiting and (place := self._take(call)) is not None:
            return place
        waiter: Waiter | None = None
        call.queued_since = anyio.current_time()
        try:
            while True:
                now = anyio.current_time()
                if waiter is None and any(call.earliest(each) <= now for each in call.candidates):
                    waiter = self._queue_up(call, now)
                    self._pump()
                if waiter is not None and isinstance(waiter.granted, Place):
                    place, waiter.granted = waiter.granted, None
                    return place
                if waiter is not None and waiter.refused is not None:
                    raise waiter.refused
                if waiter is not None and waiter.shed:
                    raise self._shed(call)
                answer = await self._look_around(call, now)
                if answer is not None:
                    return answer
                await self._wait(call, waiter, now)
        finally:
            call.queue_seconds += anyio.current_time() - call.queued_since
            if waiter is not None:
                self._leave(call, waiter)

    def _queue_up(self, call: Call, now: float) -> Waiter:
        names = frozenset(each.name for each in call.candidates)
        waiter = Waiter(call.context.priority, now, names, tries=len(call.errors))
        queue = self._queues.setdefault(call.group, Queue(call.route.queue))
        self._waiting[waiter] = call
        queue.join(waiter)
        self._stir.set()
        return waiter

    def _leave(self, call: Call, waiter: Waiter) -> None:
        """Go away from the queue; a place that was granted meanwhile is given back."""
        self._waiting.pop(waiter, None)
        queue = self._queues.get(call.group)
        if queue is not None:
            queue.leave(waiter)
        if isinstance(waiter.granted, Place):
            self._give_back(waiter.granted)

    def _give_back(self, place: Place) -> None:
        place.deployment.health.withdraw(place.ticket, anyio.current_time())
        place.deployment.rates.give_back(anyio.current_time(), place.tokens)
        self._pump()

    async def _wait(self, call: Call, waiter: Waiter | None, now: float) -> None:
        """Wait for a place, or for the first deployment that this call may try again."""
        ready = min(call.earliest(each) for each in call.candidates)
        limit = min(SLICE, call.until - now)
        if waiter is None:
            await anyio.sleep(max(0.0, min(limit, ready - now)))
            return
        with anyio.move_on_after(max(0.0, limit)):
            await waiter.event.wait()

    def _take(self, call: Call, *, but: Collection[str] = ()) -> Place | None:
        """Take a place at the first candidate that has one now."""
        now = anyio.current_time()
        allowed: list[Deployment] | None = None
        for deployment in call.candidates:
            if allowed is not None and deployment not in allowed:
                continue
            if deployment.name in but or deployment.name in call.too_dear or call.earliest(deployment) > now:
                continue
            allowed = self._instead_of_bad_key(call, deployment, now) or allowed
            if (place := self._place_at(call, deployment, now)) is not None:
                return place
        return None if but or allowed is not None else self._last_resort(call, now)

    def _place_at(self, call: Call, deployment: Deployment, now: float) -> Place | None:
        tokens, health = _expected_tokens(call, deployment), deployment.health
        if call.context.behind and health.has_to_show:
            return None
        crowd.together(call.candidates)
        if deployment.wait(now, tokens) > 0 or deployment.is_full() or not health.room(now):
            return None
        deployment.rates.take(now, tokens)
        crowd.begun(deployment, call.candidates)
        return Place(deployment, health.begin(now, call.needs.tokens), tokens)

    def _last_resort(self, call: Call, now: float) -> Place | None:
        """The last-healthy rule: with every breaker open, one that has answered somebody lately is asked."""
        usable = [each for each in call.candidates if each.name not in call.too_dear and call.earliest(each) <= now]
        if not usable or any(each.health.state not in ("open", "half_open") for each in call.candidates):
            return None
        if call.context.behind:
            return None
        for deployment in usable:
            if deployment.wait(now, 0.0) > 0 or deployment.is_full():
                continue
            ticket = deployment.health.begin_last_resort(now, call.needs.tokens)
            if ticket is not None:
                tokens = _expected_tokens(call, deployment)
                deployment.rates.take(now, tokens)
                return Place(deployment, ticket, tokens)
        return None

    def _instead_of_bad_key(self, call: Call, deployment: Deployment, now: float) -> list[Deployment] | None:
        """A key that was refused a moment ago is not tried again by every call, and not evaded by any.

        Returns who may be asked after it: only the same vendor's with another key. ``None`` sets no bound.

        Raises:
            Auth: The credential is shut, and the route does not say that another provider may be asked then.
        """
        credential = deployment.credential
        if credential.reason != "auth" or credential.is_open(now):
            return None
        if self._sent.get(credential) != self._key_of(deployment):
            credential.reopen(now)  # the key has been changed meanwhile
        if credential.is_open(now) or "auth" in call.route.failover:
            return None
        siblings = self._roster.siblings(deployment, call.candidates)
        if not any(each.credential.is_open(now) for each in siblings):
            wait = credential.shut_until - now
            text = f"{credential.detail} (known since a moment ago; it is tried again in {wait:.0f} s)"
            raise Auth(text, deployment=deployment.name, retry_after=wait)
        return siblings

    def _key_of(self, deployment: Deployment) -> int:
        """Tell whether a key is another one, without keeping it."""
        return hash(tuple(self._roster.credentials(deployment)[1]))

    def _pump(self) -> None:
        """Give places to those who wait, for as long as there are any."""
        now = anyio.current_time()
        for group, queue in list(self._queues.items()):
            if not queue:
                del self._queues[group]
                continue
            for deployment in self._first_call(queue).candidates:
                deployment.health.awaited(now)
        serve(self._queues.values(), self._grant, lambda waiter: _wanted(self._waiting[waiter], now), now)

    def _grant(self, waiter: Waiter, claimed: Collection[str]) -> Place | None:
        return self._take(self._waiting[waiter], but=claimed)

    def _first_call(self, queue: Queue) -> Call:
        first = queue.first()
        assert first is not None
        return self._waiting[first]

    def _shed(self, call: Call) -> Unavailable:
        queue = self._queues.get(call.group)
        wait = queue.wait_of(anyio.current_time()) if queue is not None else 1.0
        text = (
            f"too many calls wait for '{call.name}' already ({call.route.queue}), and this one is of the lowest class, "
            f"'{call.context.priority}': try again in {wait:.0f} s, raise its priority, or the route's `queue`"
        )
        return Unavailable(text, errors=tuple(call.errors), retry_after=wait, reason="overload")

    # --- is it worth waiting? ---------------------------------------------------------------------------------------

    async def _look_around(self, call: Call, now: float) -> ModelResponse | None:
        """Decide whether to go on waiting; the rungs above the last one are tried as soon as nobody answers.

        Raises:
            Unavailable: Nobody will answer within the route's patience or the call's deadline.
        """
        busy, ready = self._outlook(call, now)
        if call.too_dear and len(call.too_dear) == len(call.candidates):
            return await self._below(call) or self._no_money(call)
        if busy:
            call.blocked_since = None
            if now < min(call.until, (call.queued_since or now) + QUEUE_SECONDS):
                return None
            raise self._too_busy(call, now, max(1.0, ready - now))
        if call.blocked_since is None:
            call.blocked_since = now
        answer = await self._below(call)
        if answer is not None:
            return answer
        limit = min(call.until, call.blocked_since + call.patience)
        if now >= limit or ready >= limit:
            raise self._unavailable(call, now, max(0.0, ready - now))
        return None

    def _outlook(self, call: Call, now: float) -> tuple[bool, float]:
        """Whether a candidate is well and only busy, and when the first one may be worth another try."""
        busy, ready = False, math.inf
        for deployment in call.candidates:
            if deployment.name in call.too_dear:
                continue
            at = max(now + deployment.wait(now, 0.0), deployment.health.next_time(now), call.earliest(deployment))
            well = not self._is_shut_to(call, deployment, now)
            busy = busy or (well and call.earliest(deployment) <= now)
            ready = min(ready, at)
        return busy, ready

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

    def _unavailable(self, call: Call, now: float, wait: float) -> Unavailable:
        told = "; ".join(f"{type(error).__name__}: {error.message}" for error in call.errors[-len(call.candidates) :])
        shut = [each for each in call.candidates if self._is_shut_to(call, each, now)]
        told = told or "; ".join(_why_shut(each, now) for each in shut)
        text = f"no deployment of '{call.name}' answers now ({told}); another try is worth it in {wait:.3g} s"
        error = Unavailable(text, errors=tuple(call.errors), retry_after=wait)
        error.reason = self._reason(call, now, error)
        if len(shut) == len(call.candidates):  # else it was this call's bad luck, and only time tells
            error.awaits = call.awaits
        return error

    def _too_busy(self, call: Call, now: float, wait: float) -> Unavailable:
        if call.errors:
            return self._unavailable(call, now, wait)
        waited = now - (call.queued_since or now)
        text = f"no place at '{call.name}' came free within {waited:.3g} s: its deployments are well, and busy"
        return Unavailable(text, retry_after=wait, reason="overload")

    def _is_shut_to(self, call: Call, deployment: Deployment, now: float) -> bool:
        health = deployment.health
        behind = call.context.behind and health.has_to_show
        return deployment.shut_by(now) is not None or health.room(now) <= 0 or behind

    def _reason(self, call: Call, now: float, error: Unavailable) -> str:
        """Why nobody answers: what the account says of each, else the attempts' errors, else what is known of them."""
        scopes = [each.shut_by(now) for each in call.candidates]
        if all(scope is not None and scope.reason == "quota" for scope in scopes):
            return "quota"
        if error.errors:
            return pause_reason(error)
        alive = {"Slow", "StreamBroken", "Overloaded", "RateLimited"}
        return (
            "brownout"
            if any(each.health.verdict in alive or scope for each, scope in zip(call.candidates, scopes, strict=True))
            else "outage"
        )

    # --- money ------------------------------------------------------------------------------------------------------

    async def _pay(self, call: Call, place: Place) -> bool:
        """Put money aside for an attempt; false when this deployment is too dear and a cheaper one is to be asked.

        Raises:
            ConfigError: No price is known, and a budget covers the call.
            BudgetExceeded, Unavailable: A budget is used up, and says ``fail`` or ``pause``.
        """
        if not call.caps:
            return True
        deployment = place.deployment
        try:
            usd = self._expected_cost(call, deployment)
            expires = time.time() + deployment.model.timeouts.total + HOLD_GRACE
            usd = min(usd, *(cap.usd for cap in call.caps))
            answer = await self.ledger.reserve(call.caps, usd, now=time.time(), expires_at=expires)
        except BaseException:
            self._give_back(place)
            raise
        if not isinstance(answer, Refusal):
            place.hold = answer
            return True
        self._give_back(place)
        if answer.cap.on_exceeded == "degrade":
            call.too_dear[deployment.name] = answer.cap
            return False
        if answer.cap.on_exceeded == "fail":
            raise self._budget_error(answer, usd)
        raise self._waits_for_money(call, answer, usd)

    def _expected_cost(self, call: Call, deployment: Deployment) -> float:
        if deployment.cost_of is None:
            raise ConfigError(
                f"a budget covers this call, and no price is known for {deployment.model.model} ({deployment.name}): "
                f"set models.{deployment.name}.price, or default_price for all that are unknown"
            )
        return deployment.cost_of(deployment.expected_usage(call.needs.tokens, call.request.max_tokens))

    def _budget_error(self, refused: Refusal, usd: float) -> BudgetExceeded:
        cap = refused.cap
        left = max(0.0, cap.usd - refused.spent - refused.reserved)
        text = (
            f"{budget.describe(cap)} has {left:.4g} left of which this call is expected to take {usd:.4g} "
            f"({refused.spent:.4g} spent, {refused.reserved:.4g} put aside for calls under way)"
        )
        return BudgetExceeded(text, budget=cap.name, usd=cap.usd, resets_at=cap.resets_at)

    def _waits_for_money(self, call: Call, refused: Refusal, usd: float) -> Unavailable:
        cap = refused.cap
        wait = None if cap.resets_at is None else max(1.0, cap.resets_at - time.time())
        text = self._budget_error(refused, usd).message
        awaits = awaits_of_budget(cap, usd)
        return Unavailable(text, errors=tuple(call.errors), retry_after=wait, reason="budget", awaits=awaits)

    def _no_money(self, call: Call) -> ModelResponse:
        cap = next(iter(call.too_dear.values()))
        usd = min(self._expected_cost(call, each) for each in call.candidates)
        raise self._waits_for_money(call, Refusal(cap, cap.usd, 0.0), usd)

    # --- attempts ---------------------------------------------------------------------------------------------------

    async def _attempt(self, call: Call, place: Place) -> ModelResponse | None:
        """Make one attempt (two, when it is hedged); ``None`` when it failed and another deployment may mend that.

        Raises:
            ModelError: One that nobody else would mend.
        """
        try:
            first = self._begin(call, place)
        except BaseException:
            self._give_back(place)
            await self._settle(place, 0.0)
            raise
        race = Race(first, place)
        try:
            await self._run(call, race)
        finally:
            with anyio.CancelScope(shield=True):
                for attempt in race.attempts:
                    await self._finish(call, race, attempt)
                self._pump()
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
        self._sent[deployment.credential] = hash(tuple(secrets))
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
        if self._waiting or not self._hedging.take():  # those who wait for a first attempt go before
            return None
        hedge = None
        try:
            place = self._take(call, but=(race.attempts[0].deployment.name,))
            if place is not None and await self._pay(call, place):
                hedge = await self._beside(call, race, place)
        except (BudgetExceeded, ConfigError, ModelError) as error:  # the first attempt is under way: go on with it
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
            self._give_back(place)
            await self._settle(place, 0.0)
            raise
        self._give_back(place)
        await self._settle(place, 0.0)
        return None

    def _tell(self, call: Call) -> Any:
        listener = call.listener
        if listener is None:
            return None

        def said(attempt: Attempt, text: str) -> None:
            attempt.shown = True
            listener(ModelDelta(text=text, attempt=attempt.id, deployment=attempt.deployment.name))

        return said

    async def _finish(self, call: Call, race: Race, attempt: Attempt) -> None:
        """Book an attempt that is over: health, places, limits, money, and the record of it."""
        deployment, now = attempt.deployment, anyio.current_time()
        place, failure = race.places[attempt], race.failures.get(attempt)
        lost = attempt is not race.winner and race.winner is not None
        given_up = attempt.answer is None and (failure is None or _was_impatient(call, attempt, failure, now))
        verdict = self._book_health(attempt, failure, now, given_up=given_up, beaten=lost and not attempt.hedged)
        if attempt.reply_headers:
            deployment.rates.learn(read_limits(attempt.reply_headers, now=time.time()), now, time.time())
        if failure is not None:
            self._shut_scopes(deployment, failure, now)
        usage = self._usage_of(call, attempt, failure)
        deployment.rates.correct(now, place.tokens, float(usage.input_tokens + usage.output_tokens))
        if attempt.answer is not None and attempt.answer.usage is not None:
            deployment.output.add(attempt.answer.usage.output_tokens)
        usd = deployment.cost_of(usage) if deployment.cost_of is not None else None
        await self._settle(place, usd or 0.0)
        self._record(call, attempt, verdict, failure, usage, usd, wasted=lost or attempt.answer is None)

    def _book_health(
        self, attempt: Attempt, failure: ModelError | None, now: float, *, given_up: bool, beaten: bool
    ) -> str:
        deployment, ticket = attempt.deployment, attempt.ticket
        self._unpublished.add(deployment.name)
        if given_up and not beaten:
            deployment.health.abandon(ticket, now)
            return "abandoned"
        if given_up:  # a later attempt elsewhere was quicker, so this one was slow
            failure = Slow("another deployment was quicker", phase="first_token", deployment=deployment.name)
        usual = deployment.health.normal.first_at(ticket.size, 0.5)
        if failure is None:
            seconds = (attempt.first_output_at or now) - attempt.started
            deployment.places.good(len(deployment.health.flight), seconds, usual, now)
            deployment.rates.answered()
            deployment.credential.answered()
            deployment.retries.earn()
            self._hedging.earn()
        elif isinstance(failure, CROWDED):
            deployment.places.overloaded(now, usual)
        deployment.health.end(ticket, now, failure, attempt.rate)
        return "hedged" if given_up else "ok" if failure is None else type(failure).__name__

    def _shut_scopes(self, deployment: Deployment, failure: ModelError, now: float) -> None:
        """Shut what a refusal is about: the rate limit, or the credential."""
        if isinstance(failure, RateLimited):
            deployment.rates.shut(now, "rate", failure.retry_after, failure.message)
            gently, scope = False, deployment.rates
        elif isinstance(failure, QuotaExhausted | Auth):
            reason: ShutReason = "quota" if isinstance(failure, QuotaExhausted) else "auth"
            deployment.credential.shut(now, reason, failure.retry_after, failure.message)
            deployment.credential.refused_at = now
            gently, scope = True, deployment.credential
        else:
            return
        for other in self._roster.deployments.values():
            if scope in (other.rates, other.credential):
                other.health.ease(now, gently=gently)
                self._unpublished.add(other.name)

    def _usage_of(self, call: Call, attempt: Attempt, failure: ModelError | None) -> Usage:
        """What an attempt is booked with: what it reported, else an estimate if it may be billed, else nothing."""
        if attempt.answer is not None:
            return attempt.answer.usage or _estimated(attempt, attempt.answer)
        refused = failure is not None and failure.status is not None and failure.status >= 300
        unsent = isinstance(failure, Transport) and failure.phase in ("pool", "connect")
        if refused or unsent:
            return Usage()
        return Usage(input_tokens=call.needs.tokens, output_tokens=int(attempt.output))

    async def _settle(self, place: Place, usd: float) -> None:
        if place.hold is not None:
            hold, place.hold = place.hold, None
            try:
                with anyio.CancelScope(shield=True):
                    await self.ledger.settle(hold, usd, now=time.time())
            except StoreError as error:  # an answer that is paid for is not lost over it: the hold counts as spent
                log.warning("what a call to %s cost could not be booked: %s", place.deployment.name, error)

    def _record(
        self,
        call: Call,
        attempt: Attempt,
        verdict: str,
        failure: ModelError | None,
        usage: Usage,
        usd: float | None,
        *,
        wasted: bool,
    ) -> None:
        ended = attempt.ended_at or anyio.current_time()
        first = attempt.first_output_at
        rate = None
        if attempt.answer is not None and first is not None and ended - first >= 0.05:
            rate = usage.output_tokens / (ended - first)
        record = AttemptRecord(
            id=attempt.id,
            route=call.name,
            deployment=attempt.deployment.name,
            provider=attempt.deployment.provider,
            model=attempt.deployment.model.model,
            started_at=attempt.started + self._clock_offset,
            seconds=ended - attempt.started,
            verdict=verdict,
            phase=getattr(failure, "phase", ""),
            status=failure.status if failure is not None else None,
            code=failure.code if failure is not None else None,
            request_id=attempt.request_id,
            number=attempt.number,
            queue_seconds=call.queue_seconds,
            first_token_seconds=None if first is None else first - attempt.started,
            tokens_per_second=rate,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cost_usd=usd,
            hedged=attempt.hedged,
            wasted=wasted,
            detail=failure.message[:500] if failure is not None else "",
            run_id=call.context.run_id,
            path=call.context.path,
            tenant=call.context.tenant,
            workflow=call.context.workflow,
            agent=call.context.agent,
        )
        self.ledger.note_attempt(record)
        self._telemetry.attempt(record, call.span)

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
            usage = _estimated(attempt, answer)
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
                self._publish(anyio.current_time(), last=True)
                self._stir = anyio.Event()
                continue
            await anyio.sleep(TICK)
            try:
                await self._tick(anyio.current_time())
            except Exception:  # nobody awaits this task: its end would end every call
                log.exception("the router's watch stumbled; it goes on")

    async def _tick(self, now: float) -> None:
        for deployment in self._roster.deployments.values():
            if deployment.health.flight or deployment.health.state == "ramping":
                deployment.health.check(now)
        self._pump()
        self._publish(now)
        if now - self._read_at >= READ_SECONDS:
            await self._learn_from_others()

    def _is_busy(self) -> bool:
        return bool(self._waiting) or any(each.health.flight for each in self._roster.deployments.values())

    def _health_changed(self, health: Health, old: State, why: str) -> None:
        self._unpublished.add(health.name)
        self._published_at = -math.inf  # at once: a process that is killed now must not take it along
        self._telemetry.transition(health.name, old, health.state, why)

    # --- what others know -------------------------------------------------------------------------------------------

    def _publish(self, now: float, *, last: bool = False) -> None:
        due = last or now - self._published_at >= PUBLISH_SECONDS
        if not self._unpublished or not due:
            return
        self._published_at = now
        names, self._unpublished = self._unpublished, set()
        known = [self._roster.deployments[name] for name in names if name in self._roster.deployments]
        self.ledger.publish([self._state(each, now) for each in known])

    async def _learn_from_others(self) -> None:
        """Believe other workers that a deployment is not well, or that an account is shut."""
        self._read_at = anyio.current_time()
        try:
            published = await self.ledger.published()
        except Exception:  # what others know is a help, never a condition
            return
        now = anyio.current_time()
        for state in published:
            if state.deployment in self.config.models:
                self._adopt(self._roster.deployment(state.deployment), state, now)

    def _adopt(self, deployment: Deployment, state: DeploymentState, now: float) -> None:
        health = deployment.health
        if health.usual_rate is None:
            health.usual_rate = state.usual_rate
        if state.state == "open" and state.until is not None:
            health.adopt(state.until - self._clock_offset, now, "another worker found it ill")
        if state.state in ("open", "half_open", "ramping"):  # perhaps it is well by now: one call tells
            health.expect_crowd(now, "another worker found it ill a while ago")
        reason = next((each for each in SHUT_REASONS if each == state.quota_reason), None)
        if state.quota_until is not None and reason in ("rate", "quota"):  # of keys each process has its own
            until = state.quota_until - self._clock_offset
            scope = deployment.rates if reason == "rate" else deployment.credential
            if until > max(now, scope.shut_until, scope.forgiven + 1.0):
                scope.shut(now, reason, until - now, state.detail)
                health.ease(now, gently=True)

    def _state(self, deployment: Deployment, now: float) -> DeploymentState:
        return describe.state_of(deployment, now, self._clock_offset, self._waiting_for(deployment))

    def _waiting_for(self, deployment: Deployment) -> int:
        queued = (queue for queue in self._queues.values() if queue)
        return sum(len(queue) for queue in queued if deployment in self._first_call(queue).candidates)

    def _arrived(self, call: Call) -> None:
        """A call for which room was promised has come."""
        if self._expected:
            self._expected.arrived(call.awaits, call.caps)

    # --- waking -----------------------------------------------------------------------------------------------------

    async def room(self, awaits: str) -> int:
        """Return how many of those who wait under a condition (``Unavailable.awaits``) may come now.

        It is the ramp's room while a deployment recovers, a handful at a time otherwise. The caller says with
        ``expect`` how many it has sent, so that they are not counted as room again until they are here.

        Raises:
            ConfigError: The condition names a route that is gone.
        """
        kind, *what = json.loads(awaits)
        room = await (self._money_left(*what) if kind == "budget" else self._room_of_route(*what))
        return max(0, room - self._expected.count(awaits, anyio.current_time()))

    async def _room_of_route(self, name: str, floor: str | None, others: Sequence[str] = ()) -> int:
        deployments = await self._roster.of(self._roster.route(name))
        may = crowd.may_come(deployments, floor, others)
        queued = sum(len(queue) for group, queue in self._queues.items() if group[0] == name)
        return crowd.room_of(may, anyio.current_time()) - queued

    def expect(self, awaits: str, count: int) -> None:
        """Say that so many of those who waited are on their way; they are given two seconds."""
        self._expected.add(awaits, count, anyio.current_time())

    async def _money_left(self, key: str, _usd: float, resets_at: float | None, least: float = 0.0) -> int:
        """How many a budget has money for: its window is over, it was raised, or money was given back."""
        now = time.time()
        if resets_at is not None and now >= resets_at:
            return crowd.STEP
        cap = budget.usd_now(self.config.budgets, key)
        return crowd.room_for_money(cap, (await self.ledger.spending([key], now=now))[key], least)

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
        record = describe.ping_record(attempt, failure, self._clock_offset)
        self.ledger.note_attempt(record)
        self._telemetry.attempt(record)
        return record


def _wanted(call: Call, now: float) -> set[str]:
    """Return the deployments that may serve a call now, as far as the call itself is concerned."""
    usable = (each.name for each in call.candidates if call.earliest(each) <= now)
    return {name for name in usable if name not in call.too_dear}


def _expected_tokens(call: Call, deployment: Deployment) -> float:
    usage = deployment.expected_usage(call.needs.tokens, call.request.max_tokens)
    return float(usage.input_tokens + usage.output_tokens)


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


def _was_impatient(call: Call, attempt: Attempt, failure: ModelError, now: float) -> bool:
    """Whether an attempt ended by its caller's own deadline, before that could speak against the deployment."""
    own = isinstance(failure, Slow) and failure.phase == "total" and now >= call.until
    return own and not attempt.deployment.health.is_proven_slow(attempt.ticket, now)


def _too_late(call: Call) -> Unavailable:
    text = f"the same question to '{call.name}' is being asked by another call, and this one's deadline is over"
    return Unavailable(text, retry_after=0.0, reason="brownout")


def _why_shut(deployment: Deployment, now: float) -> str:
    scope = deployment.shut_by(now)
    if scope is not None:
        return f"{deployment.name}: {scope.detail or scope.name + ' is shut'}"
    return f"{deployment.name}: {deployment.health.state} after {deployment.health.verdict}"


def _labels(context: CallContext) -> dict[str, str]:
    """Return headers that tell a simulated provider who calls; nobody else gets them."""
    values = {"run-id": context.run_id, "agent": context.agent, "workflow": context.workflow, "tenant": context.tenant}
    encoded = {key: value.encode("ascii", "backslashreplace").decode() for key, value in values.items() if value}
    return {f"x-ridethrough-{key}": value for key, value in encoded.items()}


def _estimated(attempt: Attempt, answer: Answer) -> Usage:
    said = len(answer.message.model_dump_json())
    return Usage(input_tokens=len(attempt.rendered.body) // 4, output_tokens=max(1, said // 4))
