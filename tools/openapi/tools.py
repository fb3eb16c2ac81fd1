"""An OpenAPI document's operations, as tools."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from ridethrough.runtime.errors import ConfigError
from ridethrough.runtime.router.address import parsed
from ridethrough.tools.foreign import Choices, approval_of, chosen, distinct, foreign_tool, timeout_of, tool_name
from ridethrough.tools.headers import checked_headers, checked_secrets
from ridethrough.tools.openapi.document import Document, Found, Node, Place, operations
from ridethrough.tools.openapi.operation import EFFECTS, Operation, name_of
from ridethrough.tools.openapi.sending import Api, Sending
from ridethrough.tools.tool import DEFAULT_MAX_OUTPUT, Tool


def openapi_tools(
    document: Mapping[str, Any] | str | Path,
    *,
    base_url: str | None = None,
    variables: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    query: Mapping[str, str] | None = None,
    idempotency_header: str | None = "Idempotency-Key",
    **choices: Unpack[Choices],
) -> list[Tool[..., Any]]:
    """Make tools of the operations of an OpenAPI document, 3.0 or 3.1. Nothing is sent, and no secret is read, before
    a tool is called.

    Operations are named by their ``operationId``, or as ``GET /path`` where there is none. GET and HEAD are ``read``,
    PUT and DELETE ``idempotent``, the others ``write``.

    Args:
        document: The document itself, its JSON text, or the path of a file (JSON; YAML where PyYAML is installed).
        base_url: Where the operations are; the document's first server when left out.
        variables: Of the server's URL, in place of their defaults.
        headers: Sent with every request, such as ``{"Authorization": "Bearer env:TOKEN"}``. Secrets are references
            (``env:NAME``, ``file:PATH``) and are read for each request; a model sees none of them.
        query: Likewise for the query, where an API wants its key there.
        idempotency_header: The header that carries the call's key where the method does not promise that a repeat is
            harmless (POST, PATCH); ``None`` for none.
        choices: Which operations, and how they are called: see ``Choices``.

    Raises:
        ConfigError: the document cannot be used (names the place), or one of the choices (names it).
    """
    read = Document.read(document)
    source = _Source(
        read,
        base_url,
        variables or {},
        checked_headers(headers, read.place.source),
        checked_secrets(query, read.place.source),
        idempotency_header,
    )
    try:
        return source.tools(choices)
    except RecursionError:
        raise ConfigError(f"{read.place.source} is nested too deeply") from None


@dataclass(frozen=True)
class _Source:
    """A document with what is configured for it."""

    document: Document
    base_url: str | None
    variables: Mapping[str, str]
    headers: Mapping[str, str]
    query: Mapping[str, str]
    idempotency_header: str | None

    def tools(self, choices: Choices) -> list[Tool[..., Any]]:
        """Its tools.

        Raises:
            ConfigError: see ``openapi_tools``.
        """
        whose = self.document.place.source
        known = self._named()
        names = chosen(known, choices.get("include"), choices.get("exclude", ()), whose)
        chosen(known, choices.get("effects", {}), (), whose)
        prefix = choices.get("prefix", "")
        called = distinct({name: tool_name(prefix, name) for name in names}, whose)
        return [self._tool(called[name], name, known[name], choices) for name in names]

    def _named(self) -> dict[str, Found]:
        named: dict[str, Found] = {}
        for found in operations(self.document):
            name = name_of(found)
            if name in named:
                raise found.place.refuse(f"the operationId {name!r} is used twice")
            named[name] = found
        return named

    def _tool(self, called: str, name: str, found: Found, choices: Choices) -> Tool[..., Any]:
        operation = Operation.read(self.document, found, self._configured)
        api = Api(self._url(found), self.headers, self.query, self.idempotency_header)
        effect = choices.get("effects", {}).get(name) or EFFECTS.get(found.method, "write")
        timeout = timeout_of(choices, name)
        return foreign_tool(
            called,
            operation.description,
            operation.schema,
            Sending(api, operation, effect, timeout).perform,
            effect=effect,
            timeout=timeout,
            retries=choices.get("retries", 0),
            approval=approval_of(choices, name),
            max_output=choices.get("max_output", DEFAULT_MAX_OUTPUT),
            concurrency=choices.get("concurrency"),
        )

    @property
    def _configured(self) -> set[str]:
        """What a model is not asked for."""
        headers = [*self.headers, *([self.idempotency_header] if self.idempotency_header else [])]
        return {f"header:{name.lower()}" for name in headers} | {f"query:{name.lower()}" for name in self.query}

    def _url(self, found: Found) -> str:
        url = self.base_url or _server_url(self.document, found, self.variables)
        try:
            parts = parsed(url)
        except ConfigError:
            where = "base_url" if self.base_url else "servers"
            text = f"{where}: {url!r} is not of the form http://HOST/PATH or https://HOST/PATH; give base_url"
            raise found.place.refuse(text) from None
        if "@" in parts.netloc:
            raise ConfigError(f"{self.document.place.source}: a password belongs in a header, as env:NAME")
        return url


def _server_url(document: Document, found: Found, variables: Mapping[str, str]) -> str:
    """The first server of the operation, of its path, or of the document.

    Raises:
        ConfigError: there is none, or a variable of it has no value.
    """
    levels: list[tuple[Node, Place]] = [
        (found.operation, found.place),
        (found.item, found.place),
        (document.root, document.place),
    ]
    for table, place in levels:
        servers = table.get("servers")
        if servers:
            if not isinstance(servers, list):
                raise (place / "servers").refuse("a list is expected here")
            server, where = document.table(servers[0], place / "servers" / 0)
            return _filled(server, where, variables)
    raise document.place.refuse("it names no server; give base_url")


def _filled(server: Node, place: Place, variables: Mapping[str, str]) -> str:
    known = server.get("variables", {})

    def value(match: re.Match[str]) -> str:
        about = known.get(match[1], {}) if isinstance(known, dict) else {}
        chosen_value = variables.get(match[1], about.get("default"))
        if not isinstance(chosen_value, str):
            raise place.refuse(f"the variable {match[1]!r} of the server's URL needs a value in variables")
        allowed = about.get("enum")
        if allowed and chosen_value not in allowed:
            raise place.refuse(f"{match[1]!r} is one of {', '.join(map(str, allowed))}; got {chosen_value!r}")
        return chosen_value

    return re.sub(r"\{([^{}]*)\}", value, str(server.get("url", "")))
