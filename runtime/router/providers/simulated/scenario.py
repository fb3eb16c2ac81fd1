"""Scenarios: what a provider says, what goes wrong and when, and what is expected of a program that rides it out.

A scenario is a TOML or JSON file. For a provider alone its rules and faults count; a drill uses all of it::

    description = "The first deployment is down for ten seconds"
    seed = 7                                # chooses which requests are in a fault's share
    latency = "50ms"                        # also per_token, models

    [[rules]]
    system = "You plan"                     # the conditions of ``Rule``
    text = "1. tides  2. moon"              # or data = {...}, or calls = [{name = "search", arguments = {...}}]

    [[faults]]                              # the fields of ``Fault``
    deployment = "#1"                       # a name, "#1" for the first of the drill's list, "*" for all
    kind = "refuse"
    start = "2s"
    end = "12s"

    [[kills]]                               # the process that works is killed
    at = "5s"

    [[tools]]                               # the fields of ``ToolFault``
    tool = "search"
    kind = "error"
    share = 0.2

    [expect]                                # see ``MEASURES``
    lost = 0
    delay = "<= 20s"
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import operator
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from ridethrough.runtime.config import nearest
from ridethrough.runtime.errors import ConfigError
from ridethrough.runtime.router.providers.simulated.faults import Fault, Kind, chosen, lasts_at
from ridethrough.runtime.router.providers.simulated.script import Answer, Call, Rule, Script
from ridethrough.runtime.router.providers.simulated.tables import choose, record, refuse_unknown, rows, seconds, timed

_ANSWER = {each.name for each in fields(Answer)}
_RULE = {each.name for each in fields(Rule)} - {"says"}
_KEYS = {"description", "seed", "latency", "per_token", "models", "rules", "faults", "kills", "tools", "expect"}

_SHIPPED = Path(__file__).parent / "scenarios"


# --- what a scenario has --------------------------------------------------------------------------------------------

ToolFaultKind = Literal["error", "timeout", "hang", "slow", "sandbox"]

_Seconds = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Kill:
    """The process that works is killed (with SIGKILL) ``at`` seconds after the drill began."""

    at: _Seconds


@dataclass(frozen=True)
class ToolFault:
    """A tool goes wrong.

    ``tool`` is its name, ``*`` all of them. ``kind`` is ``error`` (it raises), ``timeout`` (it raises after
    ``seconds``), ``hang`` (it does not come back for ``seconds``), ``slow`` (it answers ``seconds`` later) or
    ``sandbox`` (the sandbox that it runs in is removed under it). ``share`` is the fraction of its calls, ``times`` how
    often it happens at most, ``start`` and ``end`` are seconds since the drill began.
    """

    tool: str = "*"
    kind: ToolFaultKind = "error"
    seconds: _Seconds = 1.0
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    times: Annotated[int, Field(gt=0)] | None = None
    start: _Seconds = 0.0
    end: _Seconds | None = None

    def applies(self, tool: str, number: int, age: float, used: int, *, seed: int = 0) -> bool:
        """Whether it is due for call ``number`` (from 1) of ``tool`` at ``age`` seconds, ``used`` times before."""
        if self.tool not in ("*", tool) or (self.times is not None and used >= self.times):
            return False
        return lasts_at(age, self.start, self.end) and chosen(self.share, number, f"{seed}/{tool}")


MEASURES: dict[str, str] = {
    "lost": "calls",
    "repeated": "calls",
    "wasted": "calls",
    "delay": "seconds",
    "cost": "USD",
    "return": "seconds",
}
"""What a drill measures, and the unit of each."""

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}


@dataclass(frozen=True)
class Expectation:
    """One line of ``[expect]``: ``measure`` compared with ``value`` (in the measure's unit); ``text`` is as written."""

    measure: str
    comparison: str
    value: float
    text: str

    def holds(self, measured: float) -> bool:
        """Whether what was measured is as expected."""
        return _COMPARISONS[self.comparison](measured, self.value)


@dataclass(frozen=True)
class Scenario:
    """A scenario. ``script`` has its rules, times and seed, and ``faults`` too: it is what a provider is given."""

    name: str = ""
    description: str = ""
    seed: int = 0
    script: Script = field(default_factory=Script)
    faults: tuple[Fault, ...] = ()
    kills: tuple[Kill, ...] = ()
    tools: tuple[ToolFault, ...] = ()
    expect: tuple[Expectation, ...] = ()


# --- loading --------------------------------------------------------------------------------------------------------


def shipped_scenarios() -> dict[str, Path]:
    """Return the scenarios that come with the package, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.toml"))}


def load_scenario(name: str, locate: Callable[[str], Path] = Path) -> Scenario:
    """Load a scenario: the name of one that is shipped, or a ``.toml`` or ``.json`` file.

    Args:
        name: ``outage``, or ``drills/ours.toml``.
        locate: What makes a path of a file's name; relative ones start at the working directory.

    Raises:
        ConfigError: It cannot be found or read, or says something that a scenario cannot.
    """
    if Path(name).suffix.lower() in (".toml", ".json"):
        return read_scenario(_read(locate(name)), name)
    shipped = shipped_scenarios()
    if name not in shipped:
        raise ConfigError(
            f"there is no scenario '{name}'{nearest(name, shipped)} A file's name ends in .toml or .json."
        )
    return read_scenario(_read(shipped[name]), name)


def read_scenario(raw: Mapping[str, Any], name: str = "the scenario") -> Scenario:
    """Build a scenario from its data; ``name`` is for messages.

    Raises:
        ConfigError: A key does not exist, or a value is not what it should be.
    """
    script = parse_scenario(raw, name)
    return Scenario(
        name=name,
        description=_text(raw.get("description", ""), f"{name}: description"),
        seed=script.seed,
        script=script,
        faults=tuple(script.faults),
        kills=tuple(rows(raw, "kills", name, lambda row, where: record(Kill, row, where))),
        tools=tuple(rows(raw, "tools", name, _tool_fault)),
        expect=tuple(_expectations(raw.get("expect", {}), f"{name}: expect")),
    )


def load_script(name: str, locate: Callable[[str], Path] = Path) -> Script:
    """Load a script by the name that a configuration or ``--scenario`` gives it.

    Args:
        name: A ``.toml`` or ``.json`` scenario, the name of a shipped one, a ``.py`` file with an attribute ``script``,
            or ``module:attribute``.
        locate: What makes a path of a name; relative ones start at the working directory.

    Raises:
        ConfigError: It cannot be found or read, or says something that a script cannot.
    """
    suffix = Path(name).suffix.lower()
    if suffix in (".toml", ".json") or name in shipped_scenarios():
        return load_scenario(name, locate).script
    if suffix == ".py":
        return _script_of(_module_from(locate(name)), "script", name)
    module, colon, attribute = name.partition(":")
    try:
        return _script_of(importlib.import_module(module), attribute if colon else "script", name)
    except ImportError as error:
        raise ConfigError(f"the script {name} cannot be imported: {error}") from error


def parse_scenario(raw: Mapping[str, Any], where: str = "the scenario") -> Script:
    """Build a provider's script from a scenario's data; what is for drills is left alone.

    Raises:
        ConfigError: A key does not exist, or a value is not what it should be.
    """
    refuse_unknown(raw, _KEYS, where)
    return Script(
        rules=rows(raw, "rules", where, _rule),
        faults=rows(raw, "faults", where, parse_fault),
        latency=_number(seconds(raw.get("latency", 0.0), where), f"{where}: latency"),
        per_token=_number(seconds(raw.get("per_token", 0.0), where), f"{where}: per_token"),
        models=tuple(_text(model, f"{where}: models") for model in raw.get("models", ("simulated",))),
        seed=int(_number(raw.get("seed", 0), f"{where}: seed")),
    )


def parse_fault(raw: Any, where: str = "the fault") -> Fault:
    """Build a fault from data.

    Raises:
        ConfigError: As for ``parse_scenario``.
    """
    if isinstance(raw, Mapping) and "kind" in raw:
        choose(raw["kind"], get_args(Kind), where, "kind")
    return record(Fault, raw, where)


def _tool_fault(raw: Any, where: str) -> ToolFault:
    if isinstance(raw, Mapping) and "kind" in raw:
        choose(raw["kind"], get_args(ToolFaultKind), where, "kind")
    return record(ToolFault, raw, where)


def _rule(raw: Any, where: str) -> Rule:
    values = timed(refuse_unknown(raw, _RULE | _ANSWER, where), where)
    calls = tuple(rows(values, "calls", where, lambda row, place: record(Call, row, place)))
    values.pop("calls", None)
    answer = Answer(calls=calls, **{key: values.pop(key) for key in list(values) if key in _ANSWER})
    if "fault" in values:
        values["fault"] = parse_fault(values["fault"], f"{where}.fault")
    return Rule(answer, **values)


# --- expectations ---------------------------------------------------------------------------------------------------

_COMPARED = re.compile(r"\s*(<=|>=|<|>|==?)?\s*(\$?)\s*(\S+)\s*")


def _expectations(raw: Any, where: str) -> list[Expectation]:
    return [_expectation(key, value, where) for key, value in refuse_unknown(raw, MEASURES, where).items()]


def _expectation(key: str, raw: Any, where: str) -> Expectation:
    """Read ``0``, ``"<= 10"``, ``"<= 20s"`` or ``"< $0.50"``; without a comparison it is equality."""
    found = _COMPARED.fullmatch(str(raw))
    if isinstance(raw, bool) or found is None:
        raise ConfigError(f'{where}.{key}: {raw!r} is no comparison: write a number, or text such as "<= 10"')
    value = _amount(found[3], key, f"{where}.{key}")
    return Expectation(key, (found[1] or "=").replace("==", "="), value, str(raw).strip())


def _amount(text: str, measure: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        if MEASURES[measure] != "seconds":
            raise ConfigError(f"{where}: '{text}' is no number of {MEASURES[measure]}") from None
        return _number(seconds(text, where), where)


# --- files ----------------------------------------------------------------------------------------------------------


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}: expected a number, not {value!r}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: expected text, not {value!r}")
    return value


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the scenario {path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"the scenario {path} is no table: write an object")
    return raw


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
