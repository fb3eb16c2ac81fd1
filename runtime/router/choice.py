"""Which deployments may answer a request, and in which order they are asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from ridethrough.runtime.config import Capability, Route, at_least
from ridethrough.runtime.router.deployment import Deployment
from ridethrough.runtime.router.messages import ModelRequest


@dataclass(frozen=True)
class Needs:
    """What a request takes: abilities, and an estimate of its input in tokens."""

    abilities: frozenset[Capability]
    tokens: int


def needs_of(request: ModelRequest) -> Needs:
    """Look at a request; messages and tools keep their estimates, so a long conversation costs little again."""
    abilities: set[Capability] = set()
    tokens = 0
    for message in request.messages:
        tokens += message.tokens
        if message.has_images:
            abilities.add("images")
    if request.tools:
        abilities.add("tools")
        tokens += sum(tool.tokens for tool in request.tools)
    if request.output_schema is not None:
        abilities.add("structured")
    return Needs(frozenset(abilities), tokens)


def refusal(deployment: Deployment, needs: Needs, floor: str | None, max_tokens: int | None) -> str | None:
    """Return why a deployment may not answer the request at all; ``None`` when it may."""
    if not at_least(deployment.model.tier, floor):
        return f"its tier is {deployment.model.tier or 'not known'}, below the floor {floor}"
    supports = deployment.model.supports
    if supports is not None and (missing := sorted(needs.abilities.difference(supports))):
        return f"it does not support {', '.join(missing)}"
    if not fits(deployment, needs, max_tokens):
        return f"its context window of {deployment.context_window} tokens is too small for about {needs.tokens}"
    return None


def fits(deployment: Deployment, needs: Needs, max_tokens: int | None) -> bool:
    """Whether the request fits into the context window. The estimate may be off by a quarter: in doubt it fits."""
    window = deployment.context_window
    return window is None or 0.75 * needs.tokens + (max_tokens or 0) <= window


def in_order(
    route: Route, deployments: Sequence[Deployment], needs: Needs, max_tokens: int | None, random: Random
) -> list[Deployment]:
    """Return the deployments in the order in which the route's strategy asks them."""
    if len(deployments) < 2 or route.strategy == "ordered":
        return list(deployments)
    if route.strategy == "cheapest":
        return sorted(deployments, key=lambda each: expected_cost(each, needs, max_tokens))
    if route.strategy == "fastest":
        return sorted(deployments, key=lambda each: _expected_seconds(each, needs))
    # Efraimidis and Spirakis (2006): sorting by u^(1/w) draws without replacement by weight.
    return sorted(deployments, key=lambda each: -(random.random() ** (1.0 / (each.model.weight or 1.0))))


def expected_cost(deployment: Deployment, needs: Needs, max_tokens: int | None) -> float:
    """Return the USD that the call is expected to cost there; infinity when no price is known."""
    if deployment.cost_of is None:
        return math.inf
    return deployment.cost_of(deployment.expected_usage(needs.tokens, max_tokens))


def _expected_seconds(deployment: Deployment, needs: Needs) -> float:
    """Return what a call takes there now: the usual time, more when places are scarce. The unknown are tried first."""
    usual = deployment.health.normal.first_at(needs.tokens, 0.5)
    if usual is None:
        return 0.0
    load = len(deployment.health.flight) / max(1, deployment.places.limit)
    return usual * (1.0 + load)
