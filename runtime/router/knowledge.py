"""What workers know of deployments, shared: one worker's discovery serves all.

It goes through the ledger at a bounded rate. What others say is believed where it is bad news (a deployment is out, an
account is shut), and where somebody was answered by an account that had no credit or had refused the key; that a
deployment is well again each finds out by its own calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import anyio

from ridethrough.runtime.clock import Epoch
from ridethrough.runtime.router.admission import SHUT_REASONS
from ridethrough.runtime.router.deployment import Deployment
from ridethrough.runtime.router.ledger import DeploymentState, Ledger
from ridethrough.runtime.router.roster import Roster

PUBLISH_SECONDS = 1.0
READ_SECONDS = 2.0
"""How often what is known is written for others, and read from them, while there is anything to do."""

KEY_SECONDS = 10.0
"""So long a refused key is not tried again although another worker is answered: theirs may be another one."""


class Knowledge:
    """What one router tells others of its deployments, and hears from them."""

    def __init__(
        self, roster: Roster, ledger: Ledger, state: Callable[[Deployment, float], DeploymentState], epoch: Epoch
    ) -> None:
        """``state`` writes down what is known of a deployment."""
        self._roster = roster
        self._ledger = ledger
        self._state = state
        self._epoch = epoch
        self._unpublished: set[str] = set()
        self._published_at = -math.inf
        self.read_at = -math.inf

    def touched(self, name: str) -> None:
        """Something new is known of a deployment."""
        self._unpublished.add(name)

    def changed(self, name: str) -> None:
        """Its state is another one. Others hear of it at once: a process that is killed now must not take it along."""
        self._unpublished.add(name)
        self._published_at = -math.inf

    def publish(self, now: float, *, last: bool = False) -> None:
        """Let others see what is new, once a second at most (``last``: now)."""
        due = last or now - self._published_at >= PUBLISH_SECONDS
        if not self._unpublished or not due:
            return
        self._published_at = now
        names, self._unpublished = self._unpublished, set()
        known = [self._roster.deployments[name] for name in names if name in self._roster.deployments]
        self._ledger.publish([self._state(each, now) for each in known])

    async def read(self) -> None:
        """Believe other workers that a deployment is not well, or that an account is shut."""
        self.read_at = anyio.current_time()
        try:
            published = await self._ledger.published()
        except Exception:  # what others know is a help, never a condition
            return
        now = anyio.current_time()
        for state in published:
            if state.deployment in self._roster.config.models:
                self._adopt(self._roster.deployment(state.deployment), state, now)

    def _adopt(self, deployment: Deployment, state: DeploymentState, now: float) -> None:
        health = deployment.health
        if health.usual_rate is None:
            health.usual_rate = state.usual_rate
        if state.state == "open" and state.until is not None:
            health.adopt(state.until - self._epoch.offset, now, "another worker found it ill")
        if state.state in ("open", "half_open", "ramping"):  # perhaps it is well by now: one call tells
            health.expect_crowd(now, "another worker found it ill a while ago")
        account = deployment.credential
        if self._answered_at(state) > max(account.refused_at, account.heard_at):
            young = account.reason == "auth" and now - account.refused_at < KEY_SECONDS
            if account.reason in ("quota", "auth") and not young:
                account.reopen(now)  # somebody has been answered since: there is credit, the key is good again
        reason = next((each for each in SHUT_REASONS if each == state.quota_reason), None)
        if state.quota_until is not None and reason in ("rate", "quota"):  # of keys each process has its own
            until = state.quota_until - self._epoch.offset
            scope = deployment.rates if reason == "rate" else deployment.credential
            if until > max(now, scope.shut_until + 1.0, scope.forgiven + 1.0):
                scope.shut(now, reason, until - now, state.detail)
                scope.heard_at = now
                health.ease(now, gently=True)

    def _answered_at(self, state: DeploymentState) -> float:
        """Return when another worker was last answered, on anyio's clock, if that is the last that it knows."""
        return state.at - self._epoch.offset if state.at is not None and state.verdict == "ok" else -math.inf
