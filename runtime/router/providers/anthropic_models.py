"""What each Claude model takes where they differ, read off its name, and the JSON Schema they can be held to.

A model refuses a request for a setting that its predecessor insisted on (thinking budgets, temperature, a forced tool),
so this is data, newest first. A Claude without a version in its name, or newer than this table, counts as the newest;
what is no Claude at all is one of the servers that imitate the wire, and gets its older forms.
"""

from __future__ import annotations

import graphlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Traits:
    """What one model takes."""

    thinking: Literal["none", "budget", "adaptive"] = "adaptive"
    """Whether it thinks, and whether it is told how many tokens or only how hard."""
    unasked: bool = True
    """Whether it thinks when nothing is said about it."""
    off: Literal["unset", "disabled", "between_tools", "never"] = "never"
    """What keeps it from thinking."""
    efforts: frozenset[str] = frozenset({"low", "medium", "high", "xhigh"})
    display: bool = True
    """Whether it hides its thoughts unless ``thinking.display`` asks for them."""
    bound: bool = True
    """Whether its thoughts are refused, unless told to drop them, once anything before them has changed."""
    sampling: bool = False
    forced_choice: bool = False
    schema: bool = True
    max_tokens: int = 8192
    """Output tokens to ask for when the request does not say, thinking apart."""


_NEWEST = Traits()
_FIVE = replace(_NEWEST, off="disabled", bound=False, forced_choice=True)
_FOUR_6 = replace(
    _FIVE, unasked=False, off="unset", efforts=frozenset({"low", "medium", "high"}), display=False, sampling=True
)
_BUDGET = replace(_FOUR_6, thinking="budget")
_SILENT = replace(_BUDGET, thinking="none", schema=False)
_IMITATOR = replace(_BUDGET, off="disabled", schema=False)

_TABLE: tuple[tuple[tuple[str, ...], tuple[int, int], Traits], ...] = (
    (("sonnet",), (5, 5), replace(_NEWEST, off="between_tools")),
    (("haiku",), (5, 5), replace(_NEWEST, off="disabled")),
    (("mythos",), (5, 0), replace(_NEWEST, bound=False)),
    ((), (5, 5), _NEWEST),
    (("fable",), (5, 1), _NEWEST),
    (("fable",), (5, 0), replace(_NEWEST, bound=False)),
    ((), (5, 0), _FIVE),
    ((), (4, 7), replace(_FIVE, unasked=False, off="unset")),
    ((), (4, 6), _FOUR_6),
    ((), (4, 5), _BUDGET),
    (("opus",), (4, 1), _BUDGET),
    ((), (3, 7), replace(_BUDGET, schema=False)),
    ((), (3, 5), _SILENT),
    ((), (0, 0), replace(_SILENT, max_tokens=4096)),
)
"""Families (none: all), the version it begins with, and the traits: the first row that fits."""

_VERSION = re.compile(r"(?<!\d)(\d{1,2})(?:[-.](\d{1,2}))?(?!\d)")  # a date has more digits


def traits_of(model: str) -> Traits:
    """Return what is known of ``model``, by any vendor's spelling of its name."""
    _, claude, rest = model.lower().partition("claude")
    if not claude:
        return _IMITATOR
    found = _VERSION.search(rest)
    version = (int(found[1]), int(found[2] or 0)) if found else (99, 0)
    return next(
        traits
        for families, since, traits in _TABLE
        if version >= since and (not families or any(family in rest for family in families))
    )


# --- structured output ----------------------------------------------------------------------------------------------

_KEPT = frozenset({"type", "title", "description", "enum", "const", "default", "required", "$ref"})
_MANY = frozenset({"anyOf", "allOf"})
_NAMED = frozenset({"properties", "$defs"})
_FORMATS = frozenset(["date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid"])


class _TooFree(Exception):
    """The schema allows what constrained decoding cannot write."""


def closed_schema(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return ``schema`` as constrained decoding takes it, or ``None`` when it would then mean something else.

    Objects are closed. Keywords outside the subset (lengths, ranges, patterns) move into the description, where the
    model still sees them. Free-form objects and recursion cannot be expressed.
    """
    try:
        _check_references(schema)
        return _closed(schema)
    except _TooFree:
        return None


def _check_references(schema: Mapping[str, Any]) -> None:
    graph = {f"#/$defs/{name}": set(_references(part)) for name, part in schema.get("$defs", {}).items()}
    if not graph.keys() >= set(_references(schema)):
        raise _TooFree
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError:
        raise _TooFree from None


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for item in node:
            yield from _references(item)
    elif isinstance(node, Mapping):
        if isinstance(reference := node.get("$ref"), str):
            yield reference
        for value in node.values():
            yield from _references(value)


def _closed(node: Any) -> dict[str, Any]:
    if not isinstance(node, Mapping) or not node.keys() & {"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"}:
        raise _TooFree
    closed: dict[str, Any] = {}
    hints: dict[str, Any] = {}
    for key, value in node.items():
        _translate(key, value, closed, hints)
    if "$ref" in closed:
        return {key: closed[key] for key in ("$defs", "$ref") if key in closed}  # nothing else may stand beside it
    if _is_object(node):
        if not closed.get("properties") and node.get("additionalProperties") is not False:
            raise _TooFree
        closed["additionalProperties"] = False
    if hints:
        told = ", ".join(f"{key}: {value}" for key, value in hints.items())
        closed["description"] = f"{closed.get('description', '')} ({told})".strip()
    return closed


def _translate(key: str, value: Any, closed: dict[str, Any], hints: dict[str, Any]) -> None:
    if key in _KEPT or (key == "format" and value in _FORMATS) or (key == "minItems" and value in (0, 1)):
        closed[key] = value
    elif key in _MANY or key == "oneOf":
        closed["anyOf" if key == "oneOf" else key] = [_closed(part) for part in value]
    elif key in _NAMED:
        closed[key] = {name: _closed(part) for name, part in value.items()}
    elif key == "items":
        closed[key] = _closed(value)
    elif key != "additionalProperties":
        hints[key] = value


def _is_object(node: Mapping[str, Any]) -> bool:
    kinds = node.get("type")
    return kinds == "object" or "properties" in node or (isinstance(kinds, list) and "object" in kinds)
