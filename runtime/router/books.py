"""What follows from an attempt that is over: for health, places, rate limits, money, and the record of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import anyio

from ridethrough.runtime.clock import Epoch
from ridethrough.runtime.errors import Auth, ModelError, Overloaded, QuotaExhausted, RateLimited, Slow, Transport
from ridethrough.runtime.router.admission import ShutReason
from ridethrough.runtime.router.attempt import Attempt
from ridethrough.runtime.router.call import Call
from ridethrough.runtime.router.deployment import Deployment
from ridethrough.runtime.router.ledger import AttemptRecord, Ledger
from ridethrough.runtime.router.limits import read_limits
from ridethrough.runtime.router.messages import Usage
from ridethrough.runtime.router.providers.wire import Answer
from ridethrough.runtime.router.purse import Purse
from ridethrough.runtime.router.race import HedgingBudget, Race
from ridethrough.runtime.router.roster import Roster
from ridethrough.runtime.router.telemetry import Telemetry

CROWDED: tuple[type[ModelError], ...] = (Overloaded, RateLimited, Slow)
"""Errors that fewer calls at once may help against."""


class Books:
    """Books attempts."""

    def __init__(
        self,
        roster: Roster,
        purse: Purse,
        ledger: Ledger,
        telemetry: Telemetry,
        hedging: HedgingBudget,
        touched: Callable[[str], None],
        epoch: Epoch,
    ) -> None:
        """``touched`` is told of each deployment of which something new is known."""
        self._roster = roster
        self._purse = purse
        self._ledger = ledger
        self._telemetry = telemetry
        self._hedging = hedging
        self._touched = touched
        self._epoch = epoch

    async def finish(self, call: Call, race: Race, attempt: Attempt) -> None:
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
        usage = _usage_of(call, attempt, failure)
        deployment.rates.correct(now, place.tokens, float(usage.input_tokens + usage.output_tokens))
        if attempt.answer is not None and attempt.answer.usage is not None:
            deployment.learn_usage(call.needs.tokens, attempt.answer.usage)
        usd = deployment.cost_of(usage) if deployment.cost_of is not None else None
        await self._purse.settle(place, usd or 0.0)
        self._record(call, attempt, verdict, failure, usage, usd, wasted=lost or attempt.answer is None)

    def _book_health(
        self, attempt: Attempt, failure: ModelError | None, now: float, *, given_up: bool, beaten: bool
    ) -> str:
        deployment, ticket = attempt.deployment, attempt.ticket
        self._touched(deployment.name)
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
                self._touched(other.name)

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
            started_at=attempt.started + self._epoch.offset,
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
        self._ledger.note_attempt(record)
        self._telemetry.attempt(record, call.span)


def _usage_of(call: Call, attempt: Attempt, failure: ModelError | None) -> Usage:
    """What an attempt is booked with: what it reported, else an estimate if it may be billed, else nothing."""
    if attempt.answer is not None:
        return attempt.answer.usage or estimated(attempt, attempt.answer)
    refused = failure is not None and failure.status is not None and failure.status >= 300
    unsent = isinstance(failure, Transport) and failure.phase in ("pool", "connect")
    if refused or unsent:
        return Usage()
    return Usage(input_tokens=call.needs.tokens, output_tokens=int(attempt.output))


def _was_impatient(call: Call, attempt: Attempt, failure: ModelError, now: float) -> bool:
    """Whether an attempt ended by its caller's own deadline, before that could speak against the deployment."""
    own = isinstance(failure, Slow) and failure.phase == "total" and now >= call.until
    return own and not attempt.deployment.health.is_proven_slow(attempt.ticket, now)


def estimated(attempt: Attempt, answer: Answer) -> Usage:
    """Estimate what an answer used whose provider does not say."""
    said = len(answer.message.model_dump_json())
    return Usage(input_tokens=len(attempt.rendered.body) // 4, output_tokens=max(1, said // 4))
