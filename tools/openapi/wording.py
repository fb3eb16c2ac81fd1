"""How values are written in paths, queries, headers and forms: the styles of RFC 6570 that OpenAPI took over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

UNRESERVED = "-._~"
RESERVED = ":/?#[]@!$&'()*+,;="


def word(value: Any) -> str:
    """One value as text: as JSON has it, without the quotes of texts."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def simple(value: Any, explode: bool) -> str:
    """``1,2`` and ``k,v`` (exploded ``k=v``): paths and headers."""
    if isinstance(value, list):
        return ",".join(map(word, value))
    if isinstance(value, dict):
        return ",".join(f"{key}{'=' if explode else ','}{word(each)}" for key, each in value.items())
    return word(value)


def pairs(name: str, value: Any, style: str, explode: bool) -> Iterator[tuple[str, str]]:
    """The pairs of a query or a form that a value becomes."""
    if isinstance(value, dict):
        yield from _object_pairs(name, value, style, explode)
    elif isinstance(value, list) and explode:
        yield from ((name, word(each)) for each in value)
    elif isinstance(value, list):
        yield name, {"spaceDelimited": " ", "pipeDelimited": "|"}.get(style, ",").join(map(word, value))
    else:
        yield name, word(value)


def _object_pairs(name: str, value: dict[str, Any], style: str, explode: bool) -> Iterator[tuple[str, str]]:
    if style == "deepObject":
        for key, each in value.items():
            yield from pairs(f"{name}[{key}]", each, style, True)
    elif explode:
        yield from ((key, word(each)) for key, each in value.items())
    else:
        yield name, simple(value, False)


def encoded(text: str, *, reserved: bool = False) -> str:
    """``text`` as it may stand in a URL; ``reserved`` leaves the characters that have a meaning there."""
    return quote(text, safe=UNRESERVED + (RESERVED if reserved else ""))
