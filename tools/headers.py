"""Headers that somebody configured, with their secrets left where they are until a request is made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from ridethrough.runtime.config import resolve_secret
from ridethrough.runtime.errors import ConfigError

_NAME: Final = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_SECRET: Final = re.compile(r"authorization|key|token|secret|cookie|password|credential", re.I)
_REFERENCE: Final = re.compile(r"(?:(?P<scheme>[A-Za-z]+) )?(?P<reference>(?:env|file):.+)")
_FORBIDDEN: Final = re.compile(r"[^\t\x20-\x7e]")


def checked_headers(headers: Mapping[str, str] | None, whose: str) -> dict[str, str]:
    """The headers as they were given; what they refer to is not read yet.

    Raises:
        ConfigError: One has no name that HTTP knows, or a credential is written out.
    """
    given = dict(headers or {})
    for name, value in given.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(value, str):
            raise ConfigError(f"{whose}: {name!r} is no header with a text")
        if _SECRET.search(name) and not _REFERENCE.fullmatch(value):
            raise _written_out(name, whose)
    return given


def checked_secrets(query: Mapping[str, str] | None, whose: str) -> dict[str, str]:
    """Parameters of a query as they were given; what they refer to is not read yet.

    Raises:
        ConfigError: A credential is written out.
    """
    given = dict(query or {})
    for name, value in given.items():
        if not isinstance(value, str):
            raise ConfigError(f"{whose}: {name!r} is no parameter with a text")
        if _SECRET.search(name) and not _REFERENCE.fullmatch(value):
            raise _written_out(name, whose)
    return given


def _written_out(name: str, whose: str) -> ConfigError:
    return ConfigError(
        f'{whose}: {name} holds a secret: write "env:NAME" or "file:PATH" ("Bearer env:NAME", too), never itself'
    )


def resolved_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers with what ``env:NAME`` and ``file:PATH`` refer to.

    Raises:
        ConfigError: A variable is not set, a file cannot be read, or a value is no text for a header.
    """
    return {name: _resolved(name, value) for name, value in headers.items()}


def _resolved(name: str, value: str) -> str:
    text = resolved_text(value)
    if _FORBIDDEN.search(text):
        raise ConfigError(f"the header {name} cannot be sent: its value has a character that is not allowed")
    return text


def resolved_text(value: str) -> str:
    """``value``, or what it refers to.

    Raises:
        ConfigError: The variable is not set, or the file cannot be read.
    """
    found = _REFERENCE.fullmatch(value)
    if found is None:
        return value
    secret = resolve_secret(found["reference"])
    return f"{found['scheme']} {secret}" if found["scheme"] else secret


def secrets_of(headers: Mapping[str, str]) -> list[str]:
    """The secrets that headers refer to, for keeping them out of texts.

    Raises:
        ConfigError: The variable is not set, or the file cannot be read.
    """
    found = (_REFERENCE.fullmatch(value) for value in headers.values())
    return [resolve_secret(match["reference"]) for match in found if match]
