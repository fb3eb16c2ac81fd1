"""An OpenAPI document: read, checked as far as it is used, with its references followed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from ridethrough.runtime.errors import ConfigError

Node = dict[str, Any]

LONGEST_CHAIN: Final = 32
"""References that lead to references."""

_MAPS: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_LISTS: Final = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_SCHEMAS: Final = frozenset(
    {"items", "additionalProperties", "not", "contains", "if", "then", "else", "propertyNames", "unevaluatedItems"}
    | {"unevaluatedProperties"}
)
_DROPPED: Final = frozenset({"nullable", "discriminator", "xml", "externalDocs", "example", "readOnly", "writeOnly"})


@dataclass(frozen=True)
class Place:
    """Where in the document something stands, for messages."""

    source: str
    path: tuple[str, ...] = ()

    def __truediv__(self, part: str | int) -> Place:
        return Place(self.source, (*self.path, str(part)))

    def refuse(self, text: str) -> ConfigError:
        """An error about what stands here."""
        return ConfigError(f"{self.source}: {' > '.join(self.path) or 'the document'}: {text}")


class Document:
    """A document with its references followed; they lead nowhere else."""

    def __init__(self, root: Node, source: str) -> None:
        """``source`` names it in messages.

        Raises:
            ConfigError: it is no OpenAPI document of a version that is known.
        """
        self.root = root
        self.place = Place(source)
        version = str(root.get("openapi", ""))
        if not version.startswith(("3.0", "3.1")):
            found = f"OpenAPI {version}" if version else f"Swagger {root.get('swagger', '')}".strip()
            raise self.place.refuse(f"it is {found}; OpenAPI 3.0 and 3.1 can be read: convert it")
        self.old = version.startswith("3.0")

    @classmethod
    def read(cls, given: Mapping[str, Any] | str | Path) -> Document:
        """A document that is given as data, as JSON text, or as the path of a file.

        Raises:
            ConfigError: it cannot be read.
        """
        if isinstance(given, Mapping):
            return cls(dict(given), "the OpenAPI document")
        if isinstance(given, str) and given.lstrip().startswith("{"):
            return cls(_parsed(given, "the OpenAPI document"), "the OpenAPI document")
        if str(given).startswith(("http://", "https://")):
            raise ConfigError(f"{given}: a document is not fetched; save it, look at it, and give its path")
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"the OpenAPI document {given} cannot be read: {error}") from None
        return cls(_parsed(text, str(given)), str(given))

    # --- references -------------------------------------------------------------------------------------------------

    def table(self, node: Any, place: Place) -> tuple[Node, Place]:
        """``node`` itself, or what it refers to, and where that is.

        Raises:
            ConfigError: it is no table, or refers to what is not in the document, or to itself.
        """
        for _ in range(LONGEST_CHAIN):
            if not isinstance(node, dict):
                raise place.refuse("a table (an object) is expected here")
            if not isinstance(node.get("$ref"), str):
                return cast(Node, node), place
            node, place = self.target(node["$ref"], place)
        raise place.refuse("a reference leads back to itself")

    def target(self, reference: str, place: Place) -> tuple[Any, Place]:
        """What a reference names.

        Raises:
            ConfigError: it is in another document, or nowhere.
        """
        if reference != "#" and not reference.startswith("#/"):
            raise place.refuse(f"$ref {reference!r} leads out of the document, and nothing is fetched: bundle it")
        found: Any = self.root
        where = Place(self.place.source)
        for part in reference[2:].split("/") if reference != "#" else ():
            key = _decoded(part)
            where = where / key
            try:
                found = found[int(key)] if isinstance(found, list) else found[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise place.refuse(f"$ref {reference!r}: there is no such place in the document") from None
        return found, where

    # --- schemas ----------------------------------------------------------------------------------------------------

    def schema(self, node: Any, place: Place, definitions: Node, *, sent: bool = True) -> Any:
        """A schema as JSON Schema 2020-12. What it refers to is put into ``definitions``, once, so cycles end.

        Raises:
            ConfigError: it is no schema, or refers to what is not there.
        """
        return _Conversion(self, definitions, sent).schema(node, place)


class _Conversion:
    """The schemas of one tool."""

    def __init__(self, document: Document, definitions: Node, sent: bool) -> None:
        self.document = document
        self.definitions = definitions
        self.sent = sent

    def schema(self, node: Any, place: Place) -> Any:
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise place.refuse("a schema is expected here")
        if isinstance(node.get("$ref"), str):
            return self._reference(cast(Node, node), place)
        converted = {key: self._part(key, value, place / key) for key, value in node.items() if _kept(key)}
        converted = self._without_read_only(node, converted) if self.sent else converted
        return _modern(node, converted) if self.document.old else converted

    def _part(self, key: str, value: Any, place: Place) -> Any:
        if key in _MAPS and isinstance(value, dict):
            return {name: self.schema(each, place / name) for name, each in value.items()}
        if key in _LISTS and isinstance(value, list):
            return [self.schema(each, place / index) for index, each in enumerate(value)]
        return self.schema(value, place) if key in _SCHEMAS else value

    def _reference(self, node: Node, place: Place) -> Node:
        found, where = self.document.target(node["$ref"], place)
        name = "_".join(where.path[2:] if where.path[:2] == ("components", "schemas") else where.path) or "document"
        if name not in self.definitions:
            self.definitions[name] = True  # a cycle finds this
            self.definitions[name] = self.schema(found, where)
        described = {"description": node["description"]} if "description" in node and not self.document.old else {}
        return {"$ref": f"#/$defs/{name.replace('~', '~0').replace('/', '~1').replace('%', '%25')}", **described}

    def _without_read_only(self, node: Node, converted: Node) -> Node:
        """What only the server sets is not asked of a model."""
        properties = node.get("properties")
        if not isinstance(properties, dict):
            return converted
        hidden = {name for name, each in properties.items() if isinstance(each, dict) and each.get("readOnly")}
        if not hidden:
            return converted
        kept = {name: each for name, each in converted["properties"].items() if name not in hidden}
        required = [name for name in converted.get("required", ()) if name not in hidden]
        rest = {key: value for key, value in converted.items() if key not in ("properties", "required")}
        return {**rest, "properties": kept, **({"required": required} if required else {})}


def _kept(key: str) -> bool:
    return key not in _DROPPED and not key.startswith("x-")


def _modern(node: Node, converted: Node) -> Node:
    """A schema of OpenAPI 3.0 in the words of JSON Schema 2020-12."""
    for bound, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        exclusive = converted.pop(bound, None) if isinstance(converted.get(bound), bool) else None
        if exclusive and limit in converted:
            converted[bound] = converted.pop(limit)
    if not node.get("nullable"):
        return converted
    if isinstance(converted.get("type"), str) and "enum" not in converted:
        return {**converted, "type": [converted["type"], "null"]}
    about = {"description": converted.pop("description")} if "description" in converted else {}
    return {**about, "anyOf": [converted, {"type": "null"}]}


def _decoded(part: str) -> str:
    from urllib.parse import unquote

    return unquote(part).replace("~1", "/").replace("~0", "~")


def _parsed(text: str, source: str) -> Node:
    try:
        found = json.loads(text) if text.lstrip().startswith("{") else _yaml(text, source)
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{source} is no valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{source} is no OpenAPI document: it has to be an object")
    return cast(Node, found)


def _yaml(text: str, source: str) -> Any:
    """Read YAML if anything here can."""
    import importlib

    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError:
        raise ConfigError(
            f"{source} is not JSON, and YAML is read only where PyYAML is installed: install it, or convert the file"
        ) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is neither JSON nor YAML: {error}") from None


METHODS: Final = ("get", "head", "put", "delete", "post", "patch")


@dataclass(frozen=True)
class Found:
    """An operation as it stands in the document, with the table of its path."""

    method: str
    path: str
    item: Node
    operation: Node
    place: Place


def operations(document: Document) -> Iterator[Found]:
    """All operations of a document.

    Raises:
        ConfigError: something of it is not what it has to be.
    """
    paths, place = document.table(document.root.get("paths", {}), document.place / "paths")
    for path, given in paths.items():
        if path.startswith("x-"):
            continue
        if not path.startswith("/"):
            raise (place / path).refuse("a path begins with /")
        item, where = document.table(given, place / path)
        for method in METHODS:
            if method in item:
                operation, here = document.table(item[method], where / method)
                yield Found(method.upper(), path, item, operation, here)
