"""Where calls come in: a place at a deployment at once, in the order of a queue, or not at all.

Whether waiting is worth it is decided here too: calls whose deployments are well but busy wait for a place; calls whose
deployments are all out wait for the route's patience, and then go with the condition under which to come back.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection

import anyio

from ridethrough.runtime.errors import Auth, Unavailable
from ridethrough.runtime.router import crowd
from ridethrough.runtime.router.admission import Queue, Scope, Waiter, serve
from ridethrough.runtime.router.call import QUEUE_SECONDS, Call, Place
from ridethrough.runtime.router.deployment import Deployment
from ridethrough.runtime.router.errors import pause_reason
from ridethrough.runtime.router.messages import ModelResponse
from ridethrough.runtime.router.roster import Roster

SLICE = 1.0
"""How long a call waits at most before it looks again whether waiting is worth it."""


class Entrance:
    """Gives places to calls."""

    def __init__(
        self,
        roster: Roster,
        below: Callable[[Call], Awaitable[ModelResponse | None]],
        used_up: Callable[[Call], Unavailable],
        stir: Callable[[], None],
    ) -> None:
        """``below`` tries the rungs that answer at once, ``used_up`` builds the error of a call that is too dear.

        ``stir`` is told that somebody waits.
        """
        self._roster = roster
        self._below = below
        self._used_up = used_up
        self._stir = stir
        self._queues: dict[tuple[object, ...], Queue] = {}
        self._waiting: dict[Waiter, Call] = {}
        self._sent: dict[Scope, int] = {}
        """Which key was sent last, by what it opens."""

    @property
    def is_waited_at(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waiting)

    def queued(self, route: str) -> int:
        """Return how many calls wait for a route."""
        return sum(len(queue) for group, queue in self._queues.items() if group[0] == route)

    def sent(self, deployment: Deployment, secrets: Collection[str]) -> None:
        """Remember which key was sent, without keeping it."""
        self._sent[deployment.credential] = hash(tuple(secrets))

    async def place(self, call: Call) -> Place | ModelResponse:
        """Wait for a place at a deployment, or go down the ladder.

        Raises:
            Unavailable: Waiting is not worth it.
        """
        if not self._waiting and (place := self.take(call)) is not None:
            return place
        waiter: Waiter | None = None
        call.queued_since = anyio.current_time()
        try:
            while True:
                now = anyio.current_time()
                if waiter is None and any(call.earliest(each) <= now for each in call.candidates):
                    waiter = self._queue_up(call, now)
                    self.pump()
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
        self._stir()
        return waiter

    def _leave(self, call: Call, waiter: Waiter) -> None:
        """Go away from the queue; a place that was granted meanwhile is given back."""
        self._waiting.pop(waiter, None)
        queue = self._queues.get(call.group)
        if queue is not None:
            queue.leave(waiter)
        if isinstance(waiter.granted, Place):
            self.give_back(waiter.granted)

    def give_back(self, place: Place) -> None:
        """Give a place back that was not used."""
        place.deployment.health.withdraw(place.ticket, anyio.current_time())
        place.deployment.rates.give_back(anyio.current_time(), place.tokens)
        self.pump()

    async def _wait(self, call: Call, waiter: Waiter | None, now: float) -> None:
        """Wait for a place, or for the first deployment that this call may try again."""
        ready = min(call.earliest(each) for each in call.candidates)
        limit = min(SLICE, call.until - now)
        if waiter is None:
            await anyio.sleep(max(0.0, min(limit, ready - now)))
            return
        with anyio.move_on_after(max(0.0, limit)):
            await waiter.event.wait()

    def take(self, call: Call, *, but: Collection[str] = (), beside: bool = False) -> Place | None:
        """Take a place at the first candidate that has one now.

        One ``beside`` another attempt may be given up at any time, so it is none for a deployment that has to show
        whether it is back.
        """
        now = anyio.current_time()
        allowed: list[Deployment] | None = None
        for deployment in call.candidates:
            if allowed is not None and deployment not in allowed:
                continue
            if deployment.name in but or deployment.name in call.too_dear or call.earliest(deployment) > now:
                continue
            if beside and deployment.health.has_to_show:
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

    def pump(self) -> None:
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
        return self.take(self._waiting[waiter], but=claimed)

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

    async def _look_around(self, call: Call, now: float) -> ModelResponse | None:
        """Decide whether to go on waiting; the rungs above the last one are tried as soon as nobody answers.

        Raises:
            Unavailable: Nobody will answer within the route's patience or the call's deadline.
        """
        busy, ready = self._outlook(call, now)
        if all(each.name in call.too_dear for each in call.candidates):
            answer = await self._below(call)
            if answer is None:
                raise self._used_up(call)
            return answer
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
            raise self.unavailable(call, now, max(0.0, ready - now))
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

    def unavailable(self, call: Call, now: float, wait: float) -> Unavailable:
        """Build the error of a call that nobody answers; another try is worth it in ``wait`` seconds."""
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
            return self.unavailable(call, now, wait)
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

    def waiting_for(self, deployment: Deployment) -> int:
        """Return how many calls wait that this deployment could answer."""
        queued = (queue for queue in self._queues.values() if queue)
        return sum(len(queue) for queue in queued if deployment in self._first_call(queue).candidates)


def _wanted(call: Call, now: float) -> set[str]:
    """Return the deployments that may serve a call now, as far as the call itself is concerned."""
    usable = (each.name for each in call.candidates if call.earliest(each) <= now)
    return {name for name in usable if name not in call.too_dear}


def _expected_tokens(call: Call, deployment: Deployment) -> float:
    usage = deployment.expected_usage(call.needs.tokens, call.request.max_tokens)
    return float(usage.input_tokens + usage.output_tokens)


def _why_shut(deployment: Deployment, now: float) -> str:
    scope = deployment.shut_by(now)
    if scope is not None:
        return f"{deployment.name}: {scope.detail or scope.name + ' is shut'}"
    return f"{deployment.name}: {deployment.health.state} after {deployment.health.verdict}"
