"""Reading tables of a scenario: what is not known is refused with the nearest name, what is wrong with its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from ridethrough.runtime.config import nearest, parse_duration
from ridethrough.runtime.errors import ConfigError


class _Record(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T")
R = TypeVar("R", bound=_Record)

_TIMES = ("latency", "per_token", "seconds", "start", "end", "every", "lasts", "at")
"""Keys that take a number of seconds or text such as ``500ms``."""


def refuse_unknown(raw: Any, valid: Iterable[str], where: str) -> Mapping[str, Any]:
    """Return ``raw`` as a table whose keys all exist.

    Raises:
        ConfigError: It is none, or a key does not exist.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: expected a table, not {type(raw).__name__}")
    names = set(valid)
    for key in raw:
        if key not in names:
            raise ConfigError(f"{where}: unknown key '{key}'{nearest(key, names)}")
    return raw


def rows(raw: Mapping[str, Any], key: str, where: str, read: Callable[[Any, str], T]) -> list[T]:
    """Return ``read`` of every table in the list ``raw[key]``."""
    found = raw.get(key, [])
    if not isinstance(found, list | tuple):
        raise ConfigError(f"{where}: '{key}' is a list of tables: write [[{key}]]")
    return [read(row, f"{where}: {key}[{number}]") for number, row in enumerate(found)]


def record(kind: type[R], raw: Any, where: str) -> R:
    """Return a dataclass of ``raw``'s values.

    Raises:
        ConfigError: A key does not exist, or a value is not what it should be.
    """
    known = [each.name for each in fields(kind)]
    values = timed(refuse_unknown(raw, known, where), where)
    try:
        made: R = _adapter(kind).validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"{where}{_said(error)}") from None
    return made


def choose(value: Any, valid: Iterable[str], where: str, what: str) -> None:
    """Refuse a ``value`` that is none of ``valid``.

    Raises:
        ConfigError: With the nearest of them.
    """
    names = list(valid)
    if value not in names:
        raise ConfigError(f"{where}: there is no {what} '{value}'{nearest(str(value), names)}")


def timed(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return ``raw`` with its durations in seconds."""
    return {key: seconds(value, where) if key in _TIMES else value for key, value in raw.items()}


def seconds(value: Any, where: str) -> Any:
    """Return a duration in seconds.

    Raises:
        ConfigError: It is none.
    """
    try:
        return parse_duration(value)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _said(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    text = first["msg"].removeprefix("Value error, ")
    return f".{place}: {text}" if place else f": {text}"
