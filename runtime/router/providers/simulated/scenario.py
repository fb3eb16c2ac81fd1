"""Scripts from files: TOML or JSON scenarios, Python files, and ``module:attribute``.

A scenario has ``latency``, ``per_token`` and ``models`` at its top, and lists ``rules`` and ``faults``::

    latency = 0.05

    [[rules]]
    system = "You plan"                     # the conditions of ``Rule``
    text = "1. tides  2. moon"              # or data = {...}, or calls = [{name = "search", arguments = {...}}]

    [[faults]]                              # the fields of ``Fault``
    kind = "status"
    status = 503
    requests = [3, 4]
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from ridethrough.runtime.config import nearest, parse_duration
from ridethrough.runtime.errors import ConfigError
from ridethrough.runtime.router.providers.simulated.faults import Fault, Kind
from ridethrough.runtime.router.providers.simulated.script import Answer, Call, Rule, Script

_TIMES = ("latency", "per_token", "seconds", "start", "end")
_ANSWER = {each.name for each in fields(Answer)}
_RULE = {each.name for each in fields(Rule)} - {"says"}


def load_script(name: str, locate: Callable[[str], Path] = Path) -> Script:
    """Load a script by the name that a configuration or ``--scenario`` gives it.

    Args:
        name: A ``.toml`` or ``.json`` scenario, a ``.py`` file with an attribute ``script``, or ``module:attribute``.
        locate: What makes a path of a name; relative ones start at the working directory.

    Raises:
        ConfigError: It cannot be found or read, or says something that a script cannot.
    """
    suffix = Path(name).suffix.lower()
    if suffix in (".toml", ".json"):
        return parse_scenario(_read(locate(name)), str(name))
    if suffix == ".py":
        return _script_of(_module_from(locate(name)), "script", name)
    module, colon, attribute = name.partition(":")
    try:
        return _script_of(importlib.import_module(module), attribute if colon else "script", name)
    except ImportError as error:
        raise ConfigError(f"the script {name} cannot be imported: {error}") from error


def parse_scenario(raw: Mapping[str, Any], where: str = "the scenario") -> Script:
    """Build a script from a scenario's data.

    Raises:
        ConfigError: A key does not exist, or a value is not what it should be.
    """
    _refuse_unknown(raw, {"latency", "per_token", "models", "rules", "faults"}, where)
    return Script(
        rules=[_rule(rule, f"{where}: rules[{n}]") for n, rule in enumerate(raw.get("rules", ()))],
        faults=[parse_fault(fault, f"{where}: faults[{n}]") for n, fault in enumerate(raw.get("faults", ()))],
        latency=float(_seconds(raw.get("latency", 0.0), where)),
        per_token=float(_seconds(raw.get("per_token", 0.0), where)),
        models=tuple(raw.get("models", ("simulated",))),
    )


def parse_fault(raw: Mapping[str, Any], where: str = "the fault") -> Fault:
    """Build a fault from data.

    Raises:
        ConfigError: As for ``parse_scenario``.
    """
    _refuse_unknown(raw, {each.name for each in fields(Fault)}, where)
    values = {key: _seconds(value, where) if key in _TIMES else value for key, value in raw.items()}
    if "requests" in values:
        values["requests"] = tuple(values["requests"])
    fault = Fault(**values)
    if fault.kind not in get_args(Kind):
        raise ConfigError(f"{where}: there is no kind '{fault.kind}'{nearest(fault.kind, get_args(Kind))}")
    return fault


def _rule(raw: Mapping[str, Any], where: str) -> Rule:
    _refuse_unknown(raw, _RULE | _ANSWER, where)
    values = {key: _seconds(value, where) if key in _TIMES else value for key, value in raw.items()}
    calls = tuple(_call(call, where) for call in values.pop("calls", ()))
    answer = Answer(calls=calls, **{key: values.pop(key) for key in list(values) if key in _ANSWER})
    if "fault" in values:
        values["fault"] = parse_fault(values["fault"], f"{where}.fault")
    return Rule(answer, **values)


def _call(raw: Mapping[str, Any], where: str) -> Call:
    _refuse_unknown(raw, {each.name for each in fields(Call)}, where)
    return Call(**raw)


def _refuse_unknown(raw: Mapping[str, Any], valid: set[str], where: str) -> None:
    for key in raw:
        if key not in valid:
            raise ConfigError(f"{where}: unknown key '{key}'{nearest(key, valid)}")


def _seconds(value: Any, where: str) -> Any:
    try:
        return parse_duration(value)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the scenario {path} cannot be read: {error}") from None


def _module_from(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(f"ridethrough_script_{path.stem}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise ConfigError(f"the script {path} does not exist: mend the path")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"the script {path} fails when it is loaded: {type(error).__name__}: {error}") from error
    return module


def _script_of(module: object, attribute: str, name: str) -> Script:
    script = getattr(module, attribute, None)
    if not isinstance(script, Script) and callable(script):
        script = script()
    if not isinstance(script, Script):
        raise ConfigError(f"the script {name} has no Script named '{attribute}': assign one to it")
    return script
