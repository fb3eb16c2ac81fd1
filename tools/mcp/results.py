"""What a server answered, as a tool's output."""

from __future__ import annotations

import json
from base64 import b64decode
from typing import TYPE_CHECKING, Any

from ridethrough.runtime.errors import ToolFailed
from ridethrough.tools.foreign import SHOWN
from ridethrough.tools.output import Image

if TYPE_CHECKING:
    from mcp_types import CallToolResult, ContentBlock


def output_of(tool: str, result: CallToolResult) -> Any:
    """The output for the model: text, or the structured value where no text says the same; images beside it.

    Raises:
        ToolFailed: the tool says that it failed, with its text.
    """
    parts = [text for block in result.content if (text := _text_of(block))]
    text = "\n".join(parts)
    if result.is_error:
        raise ToolFailed(text or f"{tool} failed, and the server does not say why")
    images = [image for block in result.content if (image := _image_of(block))]
    value = result.structured_content
    if value is not None and not _says(text, value):
        if not text and not images:
            return value
        text = f"{text}\n{json.dumps(value, ensure_ascii=False)}".strip()
    return [*([text] if text else []), *images] if images else text


def _says(text: str, value: Any) -> bool:
    """Whether the text has the value already: as JSON, or as the one string in ``{"result": ...}``."""
    if isinstance(value, dict) and list(value.values()) == [text]:
        return True
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return found == value or (isinstance(value, dict) and list(value.values()) == [found])


def _image_of(block: ContentBlock) -> Image | None:
    """An image that a model can be shown."""
    if block.type != "image" or block.mime_type not in SHOWN:
        return None
    try:
        return Image(data=b64decode(block.data, validate=True), media_type=block.mime_type)
    except ValueError:  # no base64, or too large
        return None


def _text_of(block: ContentBlock) -> str:
    if _image_of(block):
        return ""
    match block.type:
        case "text":
            return block.text
        case "image" | "audio":
            return f"[{block.type} {block.mime_type}, {len(block.data) * 3 // 4} bytes, not shown]"
        case "resource_link":
            about = ", ".join(filter(None, (block.mime_type, block.description)))
            return f"[resource {block.name}: {block.uri}{f' ({about})' if about else ''}]"
        case "resource":
            found = block.resource
            kept = getattr(found, "text", None)
            size = len(getattr(found, "blob", "")) * 3 // 4
            return kept if kept is not None else f"[resource {found.uri}, {found.mime_type}, {size} bytes, not shown]"
