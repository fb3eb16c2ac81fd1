"""What a conversation's parts are on a wire, where more than one has the same need of them."""

from __future__ import annotations

import json
import re
from typing import Any

from ridethrough.runtime.router.messages import Content, ImagePart, Part, TextPart, ToolCall, ToolMessage

NO_IMAGE = "[an image was left out]"
"""What stands in the place of an image that cannot be sent."""

_DATA_URL = re.compile(r"data:([^;,]+)(?:;[^;,]*)*?;base64,(.*)", re.DOTALL)


def parts_of(content: Content) -> tuple[Part, ...]:
    """Return ``content`` as parts."""
    if isinstance(content, str):
        return (TextPart(text=content),) if content else ()
    return content


def images_in(content: Content) -> list[ImagePart]:
    """Return the images of ``content``."""
    return [] if isinstance(content, str) else [part for part in content if isinstance(part, ImagePart)]


def image_at(url: str) -> ImagePart:
    """Return the image at ``url``, or in it."""
    found = _DATA_URL.fullmatch(url)
    return ImagePart(data=found[2], media_type=found[1]) if found else ImagePart(url=url)


def inline(image: ImagePart) -> tuple[str, str] | None:
    """Return an image's media type and its data in base64, ``None`` when only its address is known."""
    if image.data is not None:
        return image.media_type, image.data
    found = _DATA_URL.fullmatch(image.url or "")
    return (found[1], found[2]) if found else None


def url_of(image: ImagePart) -> str:
    """Return an image's address, which holds its data where it has no other."""
    return image.url or f"data:{image.media_type};base64,{image.data}"


def result_text(message: ToolMessage) -> str:
    """Return the text of a tool's result for wires that have no field for failure: then the text says so."""
    text = message.text
    return f"Error: {text}" if message.is_error and not text.lstrip().lower().startswith("error") else text


def arguments_of(call: ToolCall) -> dict[str, Any]:
    """Return a call's arguments as they can be sent: broken ones are wrapped, or no later request would be accepted."""
    if call.arguments is None:
        return {"_invalid_json": call.raw or ""}
    try:
        json.dumps(call.arguments, allow_nan=False)
    except ValueError:
        return {"_invalid_json": json.dumps(call.arguments)}
    return call.arguments
