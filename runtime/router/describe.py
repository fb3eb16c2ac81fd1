"""What people and other processes are told: the state of a deployment, and what a route would do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ridethrough.runtime.config import Config, Model, Route, at_least
from ridethrough.runtime.errors import ModelError
from ridethrough.runtime.router.attempt import Attempt
from ridethrough.runtime.router.deployment import Deployment
from ridethrough.runtime.router.errors import FAILS_OVER
from ridethrough.runtime.router.ledger import AttemptRecord, DeploymentState
from ridethrough.runtime.router.messages import Usage


def state_of(deployment: Deployment, now: float, offset: float, waiting: int) -> DeploymentState:
    """Write down what is known of a deployment; ``offset`` turns monotonic times into seconds since the epoch."""
    health = deployment.health
    shut = deployment.shut_by(now)
    return DeploymentState(
        deployment=deployment.name,
        state=health.state,
        since=None if health.since is None else health.since + offset,
        until=health.open_until + offset if health.state == "open" else None,
        verdict=health.verdict,
        detail=health.detail[:500],
        at=None if health.last_at is None else health.last_at + offset,
        quota=deployment.model.quota or "",
        quota_until=None if shut is None else shut.shut_until + offset,
        quota_reason="" if shut is None else shut.reason,
        in_flight=len(health.flight),
        waiting=waiting,
        limit=deployment.places.limit,
        answered=health.answered,
        failed=health.failed,
        error_rate=health.error_rate(now),
        first_token_p50=health.normal.any_first.at(0.5),
        first_token_p95=health.normal.any_first.at(0.95),
        tokens_per_second=health.normal.rate.at(0.5),
        usual_rate=health.usual_rate,
        limits=_limits(deployment),
    )


def _limits(deployment: Deployment) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind, window in deployment.rates.windows.items():
        for field in ("limit", "remaining", "resets_at"):
            value = getattr(window, field)
            if value is not None:
                found[f"{kind}_{field}"] = float(value)
    return found


# --- a route --------------------------------------------------------------------------------------------------------


def explain(
    name: str,
    route: Route,
    models: Mapping[str, Model],
    health: Mapping[str, DeploymentState],
    known: Mapping[str, Deployment],
    config: Config,
) -> dict[str, Any]:
    """Say what a route does: whom it asks, in which order, what follows from each error, and what stands at the end."""
    return {
        "route": name,
        "strategy": route.strategy,
        "floor": route.floor,
        "patience": route.patience,
        "otherwise": list(route.otherwise),
        "hedge": route.hedge,
        "cache": route.cache,
        "failover": list(route.failover),
        "deployments": [
            {**_deployment(each, models[each], health.get(each), route, config), **_looked_up(known.get(each))}
            for each in route.models
        ],
        "errors": consequences(route),
        "chain": _chain(route, models),
    }


def _deployment(name: str, model: Model, state: DeploymentState | None, route: Route, config: Config) -> dict[str, Any]:
    shown = model.model_dump(
        mode="json",
        include={"provider", "model", "tier", "context_window", "supports", "quota", "limits", "timeouts", "price"},
    )
    known = state or DeploymentState(name)
    return {
        "name": name,
        **shown,
        "kind": config.providers[model.provider].kind,
        "eligible": at_least(model.tier, route.floor),
        "state": known.state,
        "last": known.verdict,
        "quota_until": known.quota_until,
    }


def _looked_up(deployment: Deployment | None) -> dict[str, Any]:
    """What was found of a deployment besides its configuration: its window, and its price in USD a million tokens."""
    if deployment is None:
        return {}
    found: dict[str, Any] = {"context_window": deployment.context_window}
    if deployment.own_price is None and (cost_of := deployment.cost_of) is not None:
        million = 1_000_000
        found["price"] = {
            "input": cost_of(Usage(input_tokens=million)),
            "output": cost_of(Usage(output_tokens=million)),
            "source": "default_price" if deployment.unlisted else "price list",
        }
    return found


def consequences(route: Route) -> dict[str, str]:
    """Say what follows from each class of error."""
    several = len(route.models) > 1
    onward = "ask the next deployment" if several else "try again within `patience`, then go down the ladder"
    scope = "shut its rate limit until the time it names; " + (
        "ask a deployment with another `quota`" if several else onward
    )
    told = {kind.__name__: f"{onward}; it counts against its health" for kind in FAILS_OVER}
    told["RateLimited"] = f"{scope}; no failure of the deployment"
    told["QuotaExhausted"] = (
        "shut the credential for minutes and "
        + ("ask another provider" if several else "go down the ladder")
        + "; a person has to act"
    )
    told["ContextLength"] = "ask a deployment with a larger context window, else raise it"
    told["Auth"] = _evaded(route, "auth", "ask the same vendor with another credential, else raise it")
    told["ContentFilter"] = _evaded(route, "content_filter", "raise it: another provider would evade the filter")
    told["InvalidRequest"] = _evaded(route, "invalid_request", "raise it: it would fail everywhere")
    return told


def _evaded(route: Route, what: str, by_default: str) -> str:
    return f"ask the next deployment, as `failover` says: {what}" if what in route.failover else by_default


def _chain(route: Route, models: Mapping[str, Model]) -> list[str]:
    """The steps from the first deployment down to the last rung, in words."""
    first = {"ordered": "in this order", "weighted": "by weight", "fastest": "the fastest first"}
    how = first.get(route.strategy, "the cheapest first")
    asked = [name for name in route.models if at_least(models[name].tier, route.floor)]
    steps = [f"ask {', '.join(asked)} ({how})"]
    if route.floor is not None:
        steps.append(f"nothing below the tier {route.floor}")
    for rung in route.otherwise:
        if rung in ("pause", "fail") and route.patience:
            steps.append(f"wait in place for {route.patience:g} s, trying again")
        steps.append(_RUNGS[rung])
    if route.otherwise[-1] in ("cache", "static"):
        steps.append(_RUNGS["fail"])
    return steps


_RUNGS: dict[Literal["cache", "static", "pause", "fail"], str] = {
    "cache": "a kept answer to the same question, labelled",
    "static": "the static answer, labelled",
    "pause": "pause the run until one of them answers again",
    "fail": "fail with Unavailable",
}


# --- a ping ---------------------------------------------------------------------------------------------------------


def ping_record(attempt: Attempt, failure: ModelError | None, offset: float) -> AttemptRecord:
    """Write down what a ping found."""
    deployment, ended = attempt.deployment, attempt.ended_at or attempt.started
    usage = (attempt.answer.usage if attempt.answer is not None else None) or Usage()
    first = attempt.first_output_at
    return AttemptRecord(
        id=attempt.id,
        route="ping",
        deployment=deployment.name,
        provider=deployment.provider,
        model=deployment.model.model,
        started_at=attempt.started + offset,
        seconds=ended - attempt.started,
        verdict="ok" if failure is None else type(failure).__name__,
        phase=getattr(failure, "phase", ""),
        status=failure.status if failure is not None else None,
        code=failure.code if failure is not None else None,
        request_id=attempt.request_id,
        first_token_seconds=None if first is None else first - attempt.started,
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cost_usd=deployment.cost_of(usage) if deployment.cost_of is not None and attempt.answer else None,
        detail=failure.message[:500] if failure is not None else "",
    )
