"""Structured output: as OpenAI asks for it on both of its wires, and in words where a server cannot enforce it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_IN_WORDS = "with JSON that matches this JSON Schema, and with nothing else:\n"


def named_schema(schema: Mapping[str, Any], *, strict: bool = True) -> dict[str, Any]:
    """Return ``schema`` with a name; with strict decoding if that is wanted and the schema allows it."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", str(schema.get("title") or "output"))[:64]
    return {"name": name, "schema": schema, "strict": strict and is_strict(schema)}


def is_strict(schema: Any) -> bool:
    """Whether every object in ``schema`` is closed and requires all it has, which strict decoding insists on."""
    if isinstance(schema, list):
        return all(is_strict(item) for item in schema)
    if not isinstance(schema, Mapping):
        return True
    if schema.get("type") == "object" or "properties" in schema:
        closed = schema.get("additionalProperties") is False
        if not closed or set(schema.get("properties", {})) != set(schema.get("required", [])):
            return False
    return all(is_strict(value) for value in schema.values())


def in_words(schema: Mapping[str, Any], *, tools: bool = False) -> str:
    """Return an instruction to answer by ``schema``; with ``tools``, to do so only at the end."""
    when = "When you need no more tools, answer" if tools else "Answer"
    told = json.dumps(schema, ensure_ascii=False)
    return f"{when} {_IN_WORDS}{told}"


def schema_in(text: str) -> dict[str, Any] | None:
    """Return the schema that ``text`` asks for in the words of `in_words`; ``None`` when it asks for none."""
    _, found, told = text.partition(_IN_WORDS)
    try:
        schema, _ = json.JSONDecoder().raw_decode(told) if found else (None, 0)
    except ValueError:
        return None
    return schema if isinstance(schema, dict) else None
