"""What a tool returned, as text that a model can read.

Text is what every provider accepts as a tool's answer, so each value becomes text once, here, and the same text is
stored and sent. A long answer keeps its head and its tail, because logs and listings carry their point at either end;
the note between them says how to read what is missing.
"""

from __future__ import annotations

import json
from typing import Any, Final

from pydantic_core import PydanticSerializationError, to_json, to_jsonable_python

from ridethrough.runtime.errors import SerializationError

READ_TOOL: Final = "read_artifact"
"""The name of the tool that the note tells a model to use."""

HEAD_SHARE: Final = 2 / 3


def render_output(value: Any, tool: str = "") -> str:
    """Return ``value`` as text: text as it is, everything else as compact JSON.

    Bytes are read as UTF-8 with replacement; bytes inside a structure that are no UTF-8 turn the structure's bytes
    into base64. Halves of surrogate pairs, which no database stores, are replaced by ``?``.

    Raises:
        SerializationError: The value has no form in JSON; names ``tool`` and the type.
    """
    match value:
        case str():
            return _storable(value)
        case bytes() | bytearray() | memoryview():
            return bytes(value).decode(errors="replace")
        case _:
            return _as_json(value, tool)


def cap_output(text: str, limit: int, handle: str | None = None) -> tuple[str, bool]:
    """Return ``text`` with at most ``limit`` of its characters, and whether anything was left out.

    The note that stands for the missing middle comes on top of ``limit``. It names the artifact ``handle`` under
    which the whole text can be read, and the offset (in characters) of the first missing one.
    """
    if len(text) <= limit:
        return text, False
    head = round(limit * HEAD_SHARE)
    tail = limit - head
    return text[:head] + _note(len(text), head, tail, handle) + text[len(text) - tail :], True


def _note(length: int, head: int, tail: int, handle: str | None) -> str:
    missing = f"{length - head - tail} of {length} characters are left out here"
    if handle is None:
        return f"\n[... {missing}; they were not kept ...]\n"
    return f'\n[... {missing}; read them with {READ_TOOL}(handle="{handle}", offset={head}) ...]\n'


def _storable(text: str) -> str:
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def _as_json(value: Any, tool: str) -> str:
    try:
        return to_json(value, inf_nan_mode="strings").decode()
    except PydanticSerializationError:
        return _as_json_mended(value, tool)
    except Exception as error:
        raise _unserialisable(value, tool, error) from error


def _as_json_mended(value: Any, tool: str) -> str:
    """Try once more for the two failures that have a remedy: bytes that are no text, and halves of surrogate pairs."""
    try:
        plain = to_jsonable_python(value, inf_nan_mode="strings", bytes_mode="base64")
        return _storable(json.dumps(plain, ensure_ascii=False, separators=(",", ":")))
    except Exception as error:
        raise _unserialisable(value, tool, error) from error


def _unserialisable(value: Any, tool: str, error: Exception) -> SerializationError:
    whose = f"tool {tool!r}" if tool else "the tool"
    return SerializationError(
        f"{whose} returned a {type(value).__qualname__} that has no form in JSON ({error}); return text, numbers, "
        "lists, dicts, dataclasses or pydantic models"
    )
