"""One operation: what a model may pass, as one schema, and the request that its arguments become."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ridethrough.runtime.errors import ToolFailed
from ridethrough.tools.openapi.document import Document, Found, Node, Place
from ridethrough.tools.openapi.wording import encoded, pairs, simple, word
from ridethrough.tools.tool import Effect

EFFECTS: Final[dict[str, Effect]] = {"GET": "read", "HEAD": "read", "PUT": "idempotent", "DELETE": "idempotent"}
"""What HTTP says of a repeat; every other method is a write."""

_IGNORED: Final = frozenset({"accept", "content-type", "authorization"})
"""Headers that OpenAPI does not take as parameters."""

_OURS: Final = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "upgrade", "te", "trailer", "cookie"}
)
"""Headers that are the client's own."""

_STYLES: Final = {
    "path": ("simple",),
    "query": ("form", "spaceDelimited", "pipeDelimited", "deepObject"),
    "header": ("simple",),
}
_BODIES: Final = ("application/json", "application/x-www-form-urlencoded", "text/plain")
_FORBIDDEN: Final = re.compile(r"[^\t\x20-\x7e]")


@dataclass(frozen=True)
class Parameter:
    """A parameter; ``argument`` is what a model calls it."""

    argument: str
    name: str
    where: str
    style: str
    explode: bool
    reserved: bool
    as_json: bool
    schema: Any
    required: bool


@dataclass(frozen=True)
class Body:
    """What may be sent: its media type, its schema, and what a model calls it."""

    argument: str
    media: str
    schema: Any
    required: bool


@dataclass(frozen=True)
class Request:
    """A request without what is configured: headers, secrets."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    content: bytes | None


@dataclass(frozen=True)
class Operation:
    """An operation of a document.

    Attributes:
        name: Its ``operationId``, or method and path.
        definitions: The schemas that those of its parameters refer to.
    """

    name: str
    method: str
    path: str
    description: str
    parameters: tuple[Parameter, ...]
    body: Body | None
    definitions: Node = field(repr=False)

    @classmethod
    def read(cls, document: Document, found: Found, configured: Collection[str]) -> Operation:
        """Read one. A model is not asked for what is ``configured``: ``header:name`` and ``query:name``, in lower case.

        Raises:
            ConfigError: something of it is wrong, or cannot be sent.
        """
        reader = _Reader(document, configured)
        parameters = tuple(reader.parameters(found))
        taken = {parameter.argument for parameter in parameters}
        return cls(
            name_of(found),
            found.method,
            found.path,
            _description(found),
            parameters,
            reader.body(found.operation, found.place, taken),
            reader.definitions,
        )

    @property
    def schema(self) -> Node:
        """All that a model may pass, as an object."""
        asked: list[Parameter | Body] = [*self.parameters, *([self.body] if self.body else [])]
        made: Node = {
            "type": "object",
            "properties": {each.argument: each.schema for each in asked},
            "required": [each.argument for each in asked if each.required],
            "additionalProperties": False,
        }
        return {**made, "$defs": self.definitions} if self.definitions else made

    # --- requests ---------------------------------------------------------------------------------------------------

    def request(self, arguments: Mapping[str, Any]) -> Request:
        """The request of arguments that fit the schema.

        Raises:
            ToolFailed: a value cannot stand where it has to.
        """
        given = [(each, arguments[each.argument]) for each in self.parameters if each.argument in arguments]
        headers = {each.name: self._header(each, value) for each, value in given if each.where == "header"}
        query = "&".join(part for each, value in given if each.where == "query" for part in _query(each, value))
        path = self._path({each.name: _plain(each, value) for each, value in given if each.where == "path"})
        content = None
        if self.body is not None and self.body.argument in arguments:
            content = _content(self.body.media, arguments[self.body.argument])
            headers["content-type"] = self.body.media
        return Request(self.method, path, query, headers, content)

    def _path(self, values: Mapping[str, str]) -> str:
        """The path with its parameters; none of them may become another path."""
        segments = []
        for template in self.path.split("/"):
            segment = re.sub(r"\{([^{}]*)\}", lambda match: encoded(values.get(match[1], "")), template)
            if segment != template and segment in ("", ".", ".."):
                raise ToolFailed(f"{template} cannot be {segment!r}: that would be another path")
            segments.append(segment)
        return "/".join(segments)

    def _header(self, parameter: Parameter, value: Any) -> str:
        text = _plain(parameter, value)
        if _FORBIDDEN.search(text):
            raise ToolFailed(f"{parameter.argument} goes into a header, where only printable ASCII is allowed")
        return text


def _plain(parameter: Parameter, value: Any) -> str:
    return json.dumps(value, ensure_ascii=True) if parameter.as_json else simple(value, parameter.explode)


def _query(parameter: Parameter, value: Any) -> Iterator[str]:
    if parameter.as_json:
        yield f"{encoded(parameter.name)}={encoded(json.dumps(value, ensure_ascii=False))}"
        return
    for name, text in pairs(parameter.name, value, parameter.style, parameter.explode):
        yield f"{encoded(name)}={encoded(text, reserved=parameter.reserved)}"


def _content(media: str, value: Any) -> bytes:
    if media == "text/plain":
        return word(value).encode()
    if media == "application/x-www-form-urlencoded":
        fields = value.items() if isinstance(value, dict) else ()
        written = (pair for name, each in fields for pair in _form(name, each))
        return "&".join(f"{encoded(name)}={encoded(text)}" for name, text in written).encode()
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _form(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        yield name, word(value)
    else:
        yield from pairs(name, value, "form", True)


# --- reading --------------------------------------------------------------------------------------------------------


class _Reader:
    """Reads the parts of one operation."""

    def __init__(self, document: Document, configured: Collection[str]) -> None:
        self.document = document
        self.configured = configured
        self.definitions: Node = {}

    def parameters(self, of: Found) -> Iterator[Parameter]:
        """The path's parameters and the operation's own; of two with one name and place the operation's counts."""
        found: dict[tuple[str, str], tuple[Node, Place]] = {}
        for table in (of.item, of.operation):
            for index, given in enumerate(_list(table, "parameters", of.place)):
                node, here = self.document.table(given, of.place / "parameters" / index)
                found[(_text(node, "name", here), _text(node, "in", here))] = (node, here)
        self._check_path(of.path, found, of.place)
        taken: set[str] = set()
        for (name, where), (node, here) in found.items():
            if self._asked(name, where, node, here):
                argument = name if name not in taken else f"{name}_{where}"
                taken.add(argument)
                yield self._parameter(argument, name, where, node, here)

    def _check_path(self, path: str, found: Collection[tuple[str, str]], place: Place) -> None:
        for name in re.findall(r"\{([^{}]*)\}", path):
            if (name, "path") not in found:
                raise place.refuse(f"the path has {{{name}}}, and no parameter says what that is")

    def _asked(self, name: str, where: str, node: Node, place: Place) -> bool:
        """Whether a model is asked for it."""
        low = name.lower()
        if where == "header" and low in _OURS:
            raise place.refuse(f"the header {name} is the client's own; leave the operation out")
        if where == "cookie" and node.get("required"):
            raise place.refuse(f"the cookie {name} is required, and cookies are not sent; leave the operation out")
        if where not in ("path", "query", "header", "cookie"):
            raise place.refuse(f"a parameter is in path, query or header; got {where!r}")
        if where == "cookie" or (where == "header" and low in _IGNORED):
            return False
        return where == "path" or f"{where}:{low}" not in self.configured

    def _parameter(self, argument: str, name: str, where: str, node: Node, place: Place) -> Parameter:
        content = node.get("content")
        style = str(node.get("style", _STYLES[where][0]))
        if style not in _STYLES[where]:
            raise place.refuse(f"the style {style!r} is not supported in {where}; leave the operation out")
        given = self._json_in(content, place) if content is not None else node.get("schema", {})
        schema = self.document.schema(given, place / "schema", self.definitions)
        return Parameter(
            argument=argument,
            name=name,
            where=where,
            style=style,
            explode=bool(node.get("explode", style in ("form", "deepObject"))),
            reserved=bool(node.get("allowReserved")),
            as_json=content is not None,
            schema=_described(schema, node.get("description")),
            required=where == "path" or bool(node.get("required")),
        )

    def _json_in(self, content: Any, place: Place) -> Any:
        table, _ = self.document.table(content, place / "content")
        for media, each in table.items():
            if _is_json(media):
                return self.document.table(each, place / "content" / media)[0].get("schema", {})
        raise place.refuse(f"of its contents ({', '.join(table) or 'none'}) none is JSON; leave the operation out")

    def body(self, operation: Node, place: Place, taken: Collection[str]) -> Body | None:
        """The body: the first of its media types that can be sent."""
        if "requestBody" not in operation:
            return None
        node, here = self.document.table(operation["requestBody"], place / "requestBody")
        content, where = self.document.table(node.get("content", {}), here / "content")
        media = min(filter(_rank_known, content), key=_rank, default=None)
        if media is None:
            raise where.refuse(
                f"of its media types ({', '.join(content) or 'none'}) none can be sent (JSON, forms, plain text): "
                "leave the operation out"
            )
        table, there = self.document.table(content[media], where / media)
        schema = self.document.schema(table.get("schema", {}), there / "schema", self.definitions)
        argument = "body" if "body" not in taken else "request_body"
        sent = _BODIES[0] if "*" in media else media
        return Body(argument, sent, _described(schema, node.get("description")), bool(node.get("required")))


def _is_json(media: str) -> bool:
    kind = media.partition(";")[0].strip().lower()
    return kind in ("application/json", "*/*", "application/*") or kind.endswith("+json")


def _rank(media: str) -> int:
    """JSON first, then forms, then text; what cannot be sent last."""
    if _is_json(media):
        return 0
    kind = media.partition(";")[0].strip().lower()
    return _BODIES.index(kind) if kind in _BODIES else len(_BODIES)


def _rank_known(media: str) -> bool:
    return _rank(media) < len(_BODIES)


def _described(schema: Any, description: Any) -> Any:
    if not isinstance(schema, dict) or not isinstance(description, str) or "description" in schema:
        return schema
    return {**schema, "description": description}


def name_of(found: Found) -> str:
    """How an operation is named by those who choose: its ``operationId``, or method and path."""
    given = found.operation.get("operationId")
    return given if isinstance(given, str) and given else f"{found.method} {found.path}"


def _description(found: Found) -> str:
    said = [str(found.operation[key]).strip() for key in ("summary", "description") if found.operation.get(key)]
    if found.operation.get("deprecated"):
        said.append("(Deprecated.)")
    return "\n\n".join(dict.fromkeys(said)) or f"{found.method} {found.path}"


def _list(table: Node, key: str, place: Place) -> list[Any]:
    found = table.get(key, [])
    if not isinstance(found, list):
        raise (place / key).refuse("a list is expected here")
    return found


def _text(table: Node, key: str, place: Place) -> str:
    found = table.get(key)
    if not isinstance(found, str) or not found:
        raise place.refuse(f"{key!r} is missing")
    return found
