"""The money of calls: put aside before an attempt, settled after it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import anyio

from ridethrough.runtime.config import Budget
from ridethrough.runtime.errors import BudgetExceeded, ConfigError, StoreError, Unavailable
from ridethrough.runtime.router import budget, crowd
from ridethrough.runtime.router.call import Call, Place, awaits_of_budget
from ridethrough.runtime.router.deployment import Deployment
from ridethrough.runtime.router.ledger import Ledger, Refusal

log = logging.getLogger("ridethrough")

HOLD_GRACE = 60.0
"""Seconds after an attempt's last deadline until money that was put aside for it counts as spent."""


class Purse:
    """Pays for attempts, within the budgets of the configuration."""

    def __init__(self, budgets: Sequence[Budget], ledger: Ledger) -> None:
        """``ledger`` is where the money lies."""
        self._budgets = budgets
        self._ledger = ledger

    async def pay(self, call: Call, place: Place) -> bool:
        """Put money aside for an attempt; false when this deployment is too dear and a cheaper one is to be asked.

        Raises:
            ConfigError: No price is known, and a budget covers the call.
            BudgetExceeded, Unavailable: A budget is used up, and says ``fail`` or ``pause``.
        """
        if not call.caps:
            return True
        deployment = place.deployment
        expires = time.time() + deployment.model.timeouts.total + HOLD_GRACE
        usd = min(self._expected(call, deployment), *(cap.usd for cap in call.caps))
        answer = await self._ledger.reserve(call.caps, usd, now=time.time(), expires_at=expires)
        if not isinstance(answer, Refusal):
            place.hold = answer
            return True
        if answer.cap.on_exceeded == "degrade":
            call.too_dear[deployment.name] = answer.cap
            return False
        if answer.cap.on_exceeded == "fail":
            raise self._too_little(answer, usd)
        raise self._wait_for(call, answer, usd)

    def _expected(self, call: Call, deployment: Deployment) -> float:
        if deployment.cost_of is None:
            raise ConfigError(
                f"a budget covers this call, and no price is known for {deployment.model.model} ({deployment.name}): "
                f"set models.{deployment.name}.price, or default_price for all that are unknown"
            )
        return deployment.cost_of(deployment.dearest_usage(call.needs.tokens, call.request.max_tokens))

    def _too_little(self, refused: Refusal, usd: float) -> BudgetExceeded:
        cap = refused.cap
        left = max(0.0, cap.usd - refused.spent - refused.reserved)
        text = (
            f"{budget.describe(cap)} has {left:.4g} left of which this call is expected to take {usd:.4g} "
            f"({refused.spent:.4g} spent, {refused.reserved:.4g} put aside for calls under way)"
        )
        return BudgetExceeded(text, budget=cap.name, usd=cap.usd, resets_at=cap.resets_at)

    def _wait_for(self, call: Call, refused: Refusal, usd: float) -> Unavailable:
        cap = refused.cap
        wait = None if cap.resets_at is None else max(1.0, cap.resets_at - time.time())
        text = self._too_little(refused, usd).message
        awaits = awaits_of_budget(cap, usd)
        return Unavailable(text, errors=tuple(call.errors), retry_after=wait, reason="budget", awaits=awaits)

    def used_up(self, call: Call) -> Unavailable:
        """Build the error of a call for which every deployment is too dear."""
        cap = next(iter(call.too_dear.values()))
        usd = min(self._expected(call, each) for each in call.candidates)
        return self._wait_for(call, Refusal(cap, cap.usd, 0.0), usd)

    async def settle(self, place: Place, usd: float) -> None:
        """Book what an attempt has cost; what cannot be booked is logged, and its hold counts as spent."""
        if place.hold is not None:
            hold, place.hold = place.hold, None
            try:
                with anyio.CancelScope(shield=True):
                    await self._ledger.settle(hold, usd, now=time.time())
            except StoreError as error:  # an answer that is paid for is not lost over it: the hold counts as spent
                log.warning("what a call to %s cost could not be booked: %s", place.deployment.name, error)

    async def left(self, key: str, _usd: float, resets_at: float | None, least: float = 0.0) -> int:
        """How many a budget has money for: its window is over, it was raised, or money was given back."""
        now = time.time()
        if resets_at is not None and now >= resets_at:
            return crowd.STEP
        cap = budget.usd_now(self._budgets, key)
        return crowd.room_for_money(cap, (await self._ledger.spending([key], now=now))[key], least)
