"""The line-up: which simulated server stands in for which deployment, and the configuration that leads to them.

No real provider is ever called: every provider of the configuration is replaced. All else stays as it is, because it is
what the drill tries: routes, strategies, budgets, tiers, floors, patience, time limits, rate limits.

Each deployment gets a server of its own, so that each can fail alone. What deployments share in earnest they share here
too: a refused key or an empty account is that of a provider, a rate limit that of a ``quota``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from ridethrough.runtime.config import Config, Model, Provider, Route, WireName, is_direct
from ridethrough.runtime.router.providers.simulated import Fault, Scenario, Script, load_script

DEFAULT_ROUTE = "smart"
DEFAULT_MODELS = ("north", "south")
DEFAULT_PATIENCE = 1.0

_OF_THE_ACCOUNT = ("auth", "quota")


@dataclass(frozen=True)
class StandIn:
    """A server that stands in for ``deployment``; ``provider`` and ``quota`` are what that shares with others.

    ``position`` is its place in the list that a scenario counts (``#1``); a server for whatever else is asked of a
    provider has none, and its ``deployment`` is the provider's name.
    """

    deployment: str
    provider: str
    wire: WireName
    model: Model | None = None
    position: int | None = None
    quota: str | None = None


def line_up(config: Config, asked: Sequence[str]) -> list[StandIn]:
    """Return who stands in: first for those that ``asked`` routes have, in their order, then for all others."""
    found = [_stand_in(config, name, number) for number, name in enumerate(_deployments(config, asked), 1)]
    taken = {each.deployment for each in found}
    rest = [StandIn(name, name, each.speaks) for name, each in config.providers.items() if name not in taken]
    return [*found, *rest]


def _deployments(config: Config, asked: Sequence[str]) -> list[str]:
    named: list[str] = []
    for name in asked:
        if name in config.routes:
            named += config.routes[name].models
        elif name in config.models or is_direct(config, name):
            named.append(name)
    return list(
        dict.fromkeys((*named, *(name for each in config.routes.values() for name in each.models), *config.models))
    )


def _stand_in(config: Config, name: str, position: int) -> StandIn:
    model = config.models.get(name)
    if model is None:
        provider, _, rest = name.partition("/")
        model = Model.model_validate({"provider": provider, "model": rest})
    speaks = config.providers[model.provider].speaks
    return StandIn(name, model.provider, speaks, model, position, model.quota)


# --- a configuration where there is none ----------------------------------------------------------------------------


def completed(config: Config, asked: Sequence[str]) -> Config:
    """Return the configuration with a route of two deployments under each name that is asked for and not there.

    Only where it has no routes at all: in one that has, a missing route is a mistake to be shown.
    """
    if config.routes:
        return config
    missing = [name for name in asked if name not in config.models and not is_direct(config, name)]
    if not missing and (asked or config.models):
        return config
    names = [name if name not in config.models else f"{name}-of-the-drill" for name in DEFAULT_MODELS]
    providers = {**config.providers, **{name: Provider.model_validate({"kind": "simulated"}) for name in names}}
    models = {name: Model.model_validate({"provider": name, "model": "simulated"}) for name in names}
    route = Route.model_validate({"models": names, "patience": DEFAULT_PATIENCE})
    routes = dict.fromkeys(missing or [DEFAULT_ROUTE], route)
    return config.model_copy(update={"providers": providers, "models": {**config.models, **models}, "routes": routes})


def models_asked(workflow: Any) -> list[str]:
    """Return the routes and models that agents ask for, as far as the workflow's modules name them."""
    found = [asked for module in _modules_of(workflow) for asked in _asked_in(module)]
    return list(dict.fromkeys(found))


def _modules_of(workflow: Any) -> Iterator[ModuleType]:
    """The module that defines it, and those beside it in its folder that have been imported."""
    function = getattr(workflow, "function", workflow)
    home = sys.modules.get(getattr(function, "__module__", ""))
    source, _, _ = str(getattr(workflow, "source", "") or "").rpartition(":")
    files = {source, str(getattr(home, "__file__", "") or "")} - {""}
    folders = {name.rpartition("/")[0] for name in files}
    for module in list(sys.modules.values()):
        file = str(getattr(module, "__file__", None) or "")
        if file in files or (file and file.rpartition("/")[0] in folders):
            yield module


def _asked_in(module: ModuleType) -> Iterator[str]:
    for item in list(vars(module).values()):
        if isinstance(item, type) or not hasattr(type(item), "__workflow__"):
            continue
        model = getattr(item, "model", None)
        if isinstance(model, str):
            yield model


# --- what the servers say, and how they fail ------------------------------------------------------------------------


def scripts_of(config: Config, own: Script | None, scenario: Scenario) -> dict[str, Script]:
    """Return what each provider says, by its name: the given script, else the scenario's rules, else its own script.

    A provider without a script says what the first one says that has one.
    """
    if own is None and scenario.script.rules:
        own = scenario.script
    if own is not None:
        return dict.fromkeys(config.providers, own)
    written = {
        name: load_script(provider.script, config.locate)
        for name, provider in config.providers.items()
        if provider.script is not None
    }
    default = next(iter(written.values()), Script())
    return {name: written.get(name, default) for name in config.providers}


def script_for(stand_in: StandIn, says: Script, scenario: Scenario, line: Sequence[StandIn]) -> Script:
    """Return a script of its own for a server: what it says, at the scenario's pace, with the faults that it has."""
    return Script(
        rules=list(says.rules),
        faults=faults_of(stand_in, scenario.faults, line),
        latency=scenario.script.latency or says.latency,
        per_token=scenario.script.per_token or says.per_token,
        models=says.models,
        seed=scenario.seed,
    )


def faults_of(stand_in: StandIn, faults: Iterable[Fault], line: Sequence[StandIn]) -> list[Fault]:
    """Return the faults that a server has: its own, and those of whoever shares its account or its rate limit."""
    return [
        replace(fault, deployment=None)
        for fault in faults
        if any(_hits(fault, each) for each in _sharing(stand_in, fault, line))
    ]


def _sharing(stand_in: StandIn, fault: Fault, line: Sequence[StandIn]) -> list[StandIn]:
    if fault.kind in _OF_THE_ACCOUNT:
        return [each for each in line if each.provider == stand_in.provider]
    if fault.kind == "rate_limit" and stand_in.quota is not None:
        return [each for each in line if each.quota == stand_in.quota]
    return [stand_in]


def _hits(fault: Fault, stand_in: StandIn) -> bool:
    return fault.is_for(stand_in.deployment, stand_in.position)


# --- the configuration's text ---------------------------------------------------------------------------------------

_HEAD = """# Written by `ridethrough drill`: the configuration with simulated servers in the place of every provider.
"""


def text_of(config: Config, line: Sequence[StandIn], urls: Mapping[str, str], database: str) -> str:
    """Return the drill's configuration as TOML; ``urls`` are those of the servers, by deployment."""
    said = config.model_dump(
        mode="json", exclude_defaults=True, exclude_none=True, exclude={"path", "providers", "models"}
    )
    said["database"] = database
    said["providers"] = {
        each.deployment: {"kind": "simulated", "wire": each.wire, "base_url": urls[each.deployment]} for each in line
    }
    said["models"] = {each.deployment: _model(each) for each in line if each.model is not None}
    said["routes"] = {name: _route(config, route) for name, route in config.routes.items()}
    return _HEAD + toml(said)


def _model(stand_in: StandIn) -> dict[str, Any]:
    assert stand_in.model is not None
    said = stand_in.model.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    return {**said, "provider": stand_in.deployment}


def _route(config: Config, route: Route) -> dict[str, Any]:
    """A route; where all its deployments are one vendor's with several keys, those still stand in for each other."""
    said: dict[str, Any] = route.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    names = {config.models[name].provider if name in config.models else name.partition("/")[0] for name in route.models}
    vendors = {(config.providers[name].kind, config.providers[name].base_url) for name in names}
    if len(names) > 1 and len(vendors) == 1 and "simulated" not in {kind for kind, _ in vendors}:
        said["failover"] = sorted({"auth", *route.failover})
    return said


def toml(table: Mapping[str, Any]) -> str:
    """Write a table: plain values first, then one section for each table in it, whose own tables are inline."""
    plain = [f"{_key(key)} = {_value(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    sections = [
        "\n".join([f"\n[{_key(key)}]", *(f"{_key(name)} = {_value(item)}" for name, item in value.items())])
        for key, value in table.items()
        if isinstance(value, Mapping) and value
    ]
    return "\n".join([*plain, *sections]) + "\n"


def _key(name: str) -> str:
    return (
        name
        if name.replace("_", "").replace("-", "").isalnum() and name.isascii()
        else json.dumps(name, ensure_ascii=False)
    )


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)
