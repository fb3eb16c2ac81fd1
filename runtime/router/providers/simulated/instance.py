"""A valid instance of any ordinary JSON Schema, so that structured output works without a rule."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

_FORMATS = {
    "date": "2026-01-02",
    "date-time": "2026-01-02T03:04:05Z",
    "time": "03:04:05Z",
    "duration": "PT1H",
    "email": "someone@example.org",
    "uri": "https://example.org/",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "ipv4": "192.0.2.1",
    "hostname": "example.org",
}


def example_of(schema: Mapping[str, Any], seed: str = "", *, depth: int = 6) -> Any:
    """Return an instance of ``schema``; ``seed`` varies its texts and choices, ``depth`` bounds recursion."""
    return _Maker(schema, seed, depth).make(schema, "value", 0)


class _Maker:
    def __init__(self, root: Mapping[str, Any], seed: str, depth: int) -> None:
        self._root = root
        self._seed = seed
        self._depth = depth

    def make(self, schema: Any, name: str, level: int) -> Any:
        """Return an instance of a part of the schema; ``name`` goes into its texts."""
        if not isinstance(schema, Mapping):
            return f"simulated {name}"
        schema = self._resolved(schema)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return schema["enum"][self._number(name) % len(schema["enum"])]
        for key in ("anyOf", "oneOf"):
            if schema.get(key):
                return self.make(self._choice(schema[key], level), name, level + 1)
        return self._by_type(schema, name, level)

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        for _ in range(20):
            if not (ref := schema.get("$ref")):
                break
            schema = {**self._lookup(str(ref)), **{key: value for key, value in schema.items() if key != "$ref"}}
        for part in schema.get("allOf") or ():
            schema = {**schema, **self._resolved(part)}
        return schema

    def _lookup(self, ref: str) -> Mapping[str, Any]:
        found: Any = self._root
        for part in ref.removeprefix("#").strip("/").split("/"):
            found = found.get(part.replace("~1", "/").replace("~0", "~"), {}) if part else found
        return found if isinstance(found, Mapping) else {}

    def _choice(self, options: list[Any], level: int) -> Any:
        """Take the first option, or one that ends the recursion when it is deep."""
        ends = [option for option in options if isinstance(option, Mapping) and option.get("type") == "null"]
        return ends[0] if ends and level >= self._depth else options[0]

    def _by_type(self, schema: Mapping[str, Any], name: str, level: int) -> Any:
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = next((each for each in kind if each != "null"), "null")
        if kind == "object" or (kind is None and "properties" in schema):
            return self._object(schema, level)
        if kind == "array" or (kind is None and ("items" in schema or "prefixItems" in schema)):
            return self._array(schema, name, level)
        if kind in ("integer", "number"):
            return _number_in(schema, whole=kind == "integer")
        if kind == "boolean":
            return True
        return None if kind == "null" else self._text(schema, name)

    def _object(self, schema: Mapping[str, Any], level: int) -> dict[str, Any]:
        properties: Mapping[str, Any] = schema.get("properties") or {}
        required = schema.get("required") or ()
        wanted = properties if level < self._depth else required
        made = {key: self.make(properties.get(key), key, level + 1) for key in dict.fromkeys((*wanted, *required))}
        extra = schema.get("additionalProperties")
        for index in range(len(made), int(schema.get("minProperties", 0))):
            made[f"key{index}"] = self.make(extra, f"key{index}", level + 1)
        return made

    def _array(self, schema: Mapping[str, Any], name: str, level: int) -> list[Any]:
        prefix = [self.make(item, name, level + 1) for item in schema.get("prefixItems") or ()]
        least = int(schema.get("minItems", 0))
        wanted = max(least, 2 if level < self._depth and not prefix else 0)
        wanted = min(wanted, int(schema.get("maxItems", wanted)))
        items = schema.get("items")
        if items is False:
            return prefix
        return prefix + [self.make(items, f"{name} {n + 1}", level + 1) for n in range(len(prefix), wanted)]

    def _text(self, schema: Mapping[str, Any], name: str) -> str:
        text = _FORMATS.get(str(schema.get("format")), f"simulated {name} {self._number(name) % 1000}")
        text = text.ljust(int(schema.get("minLength", 0)), ".")
        return text[: int(schema["maxLength"])] if "maxLength" in schema else text

    def _number(self, name: str) -> int:
        return int(hashlib.sha256(f"{self._seed}/{name}".encode()).hexdigest()[:8], 16)


def _number_in(schema: Mapping[str, Any], *, whole: bool) -> float:
    """Return the smallest number that the bounds allow, or 1."""
    step = schema.get("multipleOf", 1 if whole else 0.5)
    low = schema.get("minimum", schema["exclusiveMinimum"] + step if "exclusiveMinimum" in schema else None)
    high = schema.get("maximum", schema["exclusiveMaximum"] - step if "exclusiveMaximum" in schema else None)
    value = 1 if low is None else low
    if high is not None and value > high:
        value = high
    if "multipleOf" in schema:
        value = -(-value // step) * step
    return int(value) if whole else float(value)
