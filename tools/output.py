"""What a tool returned, as text that a model can read, and pictures that it can see.

Text is what every provider accepts as a tool's answer, so each value becomes text once, here, and the same text is
stored and sent. A long answer keeps its head and its tail, because logs and listings carry their point at either end;
the note between them says how to read what is missing. A picture is an ``Image``, alone or in a list with text.
"""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticSerializationError, to_json, to_jsonable_python

from ridethrough.runtime.errors import SerializationError
from ridethrough.runtime.router.messages import ImagePart

READ_TOOL: Final = "read_artifact"
"""The name of the tool that the note tells a model to use."""

HEAD_SHARE: Final = 2 / 3

LARGEST_IMAGE: Final = 3_750_000
"""Bytes of a picture: 5 MB in base64, which is what providers take."""


class Image(BaseModel):
    """A picture for the model: what a tool returns, or one of the items of a list that it returns.

    Attributes:
        data: The file's bytes, at most ``LARGEST_IMAGE``.
        media_type: ``image/jpeg``, ``image/png``, ``image/gif`` or ``image/webp``.
    """

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    data: bytes = Field(max_length=LARGEST_IMAGE, repr=False)
    media_type: str = "image/jpeg"


def split_images(value: Any) -> tuple[Any, tuple[ImagePart, ...]]:
    """What of an output is to become text, and its pictures; the texts of a list with pictures become one."""
    if isinstance(value, Image):
        return "", (_part(value),)
    if not isinstance(value, list | tuple) or not any(isinstance(each, Image) for each in value):
        return value, ()
    others = [each for each in value if not isinstance(each, Image)]
    text = "\n".join(others) if all(isinstance(each, str) for each in others) else others
    return text, tuple(_part(each) for each in value if isinstance(each, Image))


def _part(image: Image) -> ImagePart:
    return ImagePart(data=b64encode(image.data).decode("ascii"), media_type=image.media_type)


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
