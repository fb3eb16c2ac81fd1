"""An MCP server as its user sees it: a name, an address, and tools."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar, Unpack
from weakref import WeakKeyDictionary

import anyio
from anyio.lowlevel import RunVar

from ridethrough.runtime.errors import ConfigError, ToolFailed
from ridethrough.runtime.router.address import parsed
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import Sandbox
from ridethrough.tools.foreign import Choices, approval_of, chosen, distinct, foreign_tool, timeout_of, tool_name
from ridethrough.tools.headers import checked_headers, resolved_headers, resolved_text, secrets_of
from ridethrough.tools.mcp.calls import Call, definition_of, definitions_in, effect_of
from ridethrough.tools.mcp.owner import Owner, Terms
from ridethrough.tools.mcp.pipe import Life, LocalPipe, SandboxPipe, spoken
from ridethrough.tools.mcp.web import posted
from ridethrough.tools.tool import DEFAULT_MAX_OUTPUT, Effect, Tool

T = TypeVar("T")

Where: TypeAlias = str | SandboxProfile | Sandbox | Callable[[], AbstractAsyncContextManager[Sandbox]]
"""The sandbox of a server: a profile (by name or itself), an open sandbox, or what opens one."""


class McpServer:
    """A server of the Model Context Protocol. It is connected to when one of its tools is called for the first time.

    It may be made where modules are imported; nothing is started and no secret is read then. Each process, and each
    event loop, has a connection of its own. ``async with server:`` connects at once, and ends the connection (and the
    server's process) at the end; without it that happens with the event loop, or when nobody has called for a while.

    Attributes:
        name: Names it in tools (``name_tool``) and in errors.
    """

    def __init__(self, name: str, terms: Terms, address: str) -> None:
        """Use ``McpServer.stdio`` or ``McpServer.http``."""
        if not name or tool_name(name) != name:
            raise ConfigError(
                f'MCP server {name!r}: a name has letters, digits, "_" and "-"; it begins its tools\' names'
            )
        for each in ("connect_timeout", "list_timeout", "idle_seconds"):
            if not 0 < getattr(terms, each) < math.inf:
                raise ConfigError(f"MCP server {name!r}: {each} must be a number of seconds; every wait has a deadline")
        self.name = name
        self._terms = terms
        self._address = address

    def __repr__(self) -> str:
        return f"McpServer({self.name!r}, {self._address!r})"

    @classmethod
    def stdio(
        cls,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        sandbox: Where | None = None,
        protocol: Literal["auto", "legacy"] = "auto",
        connect_timeout: float = 30.0,
        list_timeout: float = 30.0,
        idle_seconds: float = 300.0,
    ) -> McpServer:
        """A server that is a program, spoken to over its standard input and output.

        Args:
            name: Names it in tools and errors.
            command: The program and its arguments; no shell reads them.
            env: Added to the few variables that it inherits (``PATH``, ``HOME``, ...); ``env:NAME`` and ``file:PATH``
                are read when it is started.
            cwd: Its working directory.
            sandbox: Where it runs, if not on this machine.
            protocol: ``legacy`` spares a server of a revision before 2026-07-28 the question which one it has.
            connect_timeout: Seconds until it has to have answered once.
            list_timeout: Seconds for its whole list of tools.
            idle_seconds: After which it is ended when nobody calls it.

        Raises:
            ConfigError: something of it cannot be used, or the SDK is not installed.
        """
        _require_sdk()
        argv, variables = list(command), dict(env or {})
        if isinstance(command, str) or not argv or not all(isinstance(part, str) for part in argv):
            raise ConfigError(f"MCP server {name!r}: command is a list, [program, argument, ...]; got {command!r}")

        @asynccontextmanager
        async def transport(life: Life) -> AsyncGenerator[Any]:
            resolved = {key: resolved_text(value) for key, value in variables.items()}
            if sandbox is None:
                yield spoken(await LocalPipe.open(argv, resolved, cwd), life)
                return
            async with _opened(sandbox) as place:
                yield spoken(await SandboxPipe.open(place, argv, resolved, cwd), life)

        terms = Terms(name, transport, _mode(name, protocol), connect_timeout, list_timeout, idle_seconds)
        return cls(name, terms, argv[0])

    @classmethod
    def http(
        cls,
        name: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        protocol: Literal["auto", "legacy"] = "auto",
        connect_timeout: float = 30.0,
        list_timeout: float = 30.0,
        idle_seconds: float = 300.0,
    ) -> McpServer:
        """A server on streamable HTTP.

        Args:
            name: Names it in tools and errors.
            url: Its endpoint.
            headers: Sent with every request; ``env:NAME`` and ``file:PATH`` (also after ``Bearer ``) are read when it
                is connected to, and credentials have to be given in that way.
            protocol: As for ``stdio``.
            connect_timeout: Seconds until it has to have answered once.
            list_timeout: Seconds for its whole list of tools.
            idle_seconds: After which the connection is ended when nobody calls.

        Raises:
            ConfigError: something of it cannot be used, or the SDK is not installed.
        """
        _require_sdk()
        address = _address(name, url)
        given = checked_headers(headers, f"MCP server {name!r}")

        @asynccontextmanager
        async def transport(life: Life) -> AsyncGenerator[Any]:
            yield posted(url, resolved_headers(given), secrets_of(given), connect_timeout)

        terms = Terms(name, transport, _mode(name, protocol), connect_timeout, list_timeout, idle_seconds)
        return cls(name, terms, address)

    # --- living -----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> McpServer:
        """Connect now.

        Raises:
            ToolFailed: the server cannot be reached, or does not speak the protocol.
        """
        owner = self._owner()
        owner.held = True
        try:
            await owner.connection()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await owner.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the connection."""
        await self.aclose()

    async def aclose(self) -> None:
        """End this event loop's connection, and the server's process; the next call of a tool connects again."""
        owner = _owners().pop(self, None)
        if owner is not None:
            with anyio.CancelScope(shield=True):
                await owner.aclose()

    def _owner(self) -> Owner:
        owners = _owners()
        found = owners.get(self)
        if found is None or found.over:
            found = owners[self] = Owner.start(self._terms)
        return found

    # --- tools ------------------------------------------------------------------------------------------------------

    async def tools(self, **choices: Unpack[Choices]) -> list[Tool[..., Any]]:
        """The server's tools, as it lists them now; ``Choices`` says what may be chosen.

        Raises:
            ToolFailed: the server cannot be reached, or its list cannot be read.
            ConfigError: a name is not known, two tools would have one name, or a schema cannot be used.
        """
        return self._made(await self._definitions(), choices)

    def pinned(self, path: str | Path, **choices: Unpack[Choices]) -> list[Tool[..., Any]]:
        """The server's tools as the file at ``path`` has them, for agents that are defined where modules are imported.

        A file that does not exist yet is written: the server is asked, once. From then on the definition is the file's,
        so every process that imports the module has the same agent, whether or not the server is there. Remove the
        file to ask again.

        Raises:
            ToolFailed: there is no file, and the server cannot be reached.
            ConfigError: as for ``tools``, or the file cannot be read or written.
        """
        return self._made(self._pinned(Path(path)), choices)

    def _pinned(self, path: Path) -> list[dict[str, Any]]:
        try:
            if path.exists():
                return definitions_in(path)
            found = _apart(self._definitions_once)
            text = json.dumps({"server": self.name, "tools": found}, indent=2, sort_keys=True, ensure_ascii=False)
            written = path.with_name(f".{path.name}.{os.getpid()}")
            written.write_text(f"{text}\n", encoding="utf-8")
            written.replace(path)
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"MCP server {self.name!r}: {path} cannot be used for its tools: {error}") from None
        return found

    async def _definitions_once(self) -> list[dict[str, Any]]:
        try:
            return await self._definitions()
        finally:
            await self.aclose()

    async def _definitions(self) -> list[dict[str, Any]]:
        connection = await self._owner().connection()
        connection.stale = True  # not every server tells when its list changes
        try:
            return [definition_of(tool) for tool in (await connection.listed()).values()]
        except Exception as error:
            raise ToolFailed(f"the tools of the MCP server {self.name!r} cannot be listed: {error}") from error

    def _made(self, definitions: list[dict[str, Any]], choices: Choices) -> list[Tool[..., Any]]:
        whose = f"MCP server {self.name!r}"
        known = {definition["name"]: definition for definition in definitions}
        names = chosen(known, choices.get("include"), choices.get("exclude", ()), whose)
        effects = choices.get("effects", {})
        chosen(known, effects, (), whose)
        prefix = choices.get("prefix", self.name)
        called = distinct({name: tool_name(prefix, name) for name in names}, whose)
        return [self._tool(called[name], known[name], effects.get(name), choices) for name in names]

    def _tool(self, called: str, definition: dict[str, Any], effect: Effect | None, choices: Choices) -> Tool[..., Any]:
        name = definition["name"]
        chosen_effect = effect or effect_of(definition)
        call = Call(
            self.name,
            name,
            chosen_effect,
            definition,
            timeout_of(choices, name),
        )
        return foreign_tool(
            called,
            definition.get("description") or definition.get("title") or "",
            definition["inputSchema"],
            lambda arguments, ctx: call.perform(self._owner, arguments, ctx),
            effect=chosen_effect,
            timeout=call.timeout,
            retries=choices.get("retries", 0),
            approval=approval_of(choices, name),
            max_output=choices.get("max_output", DEFAULT_MAX_OUTPUT),
            concurrency=choices.get("concurrency"),
        )


# --- the rest -------------------------------------------------------------------------------------------------------

_all_owners: RunVar[WeakKeyDictionary[McpServer, Owner]] = RunVar("ridethrough_mcp_owners")
"""Those of each event loop: a connection belongs to the loop that it was made in."""


def _owners() -> WeakKeyDictionary[McpServer, Owner]:
    found = _all_owners.get(None)
    if found is None:
        found = WeakKeyDictionary()
        _all_owners.set(found)
    return found


def _apart(work: Callable[[], Awaitable[T]]) -> T:
    """Do asynchronous work where no event loop may be used: in a thread with a loop of its own.

    Raises:
        Exception: what the work raises.
    """
    box: list[T | BaseException] = []

    def run() -> None:
        try:
            box.append(anyio.run(work))
        except BaseException as error:
            box.append(error)

    thread = threading.Thread(target=run, name="ridethrough-mcp")
    thread.start()
    thread.join()
    if isinstance(box[0], BaseException):
        raise box[0]
    return box[0]


def _require_sdk() -> None:
    if importlib.util.find_spec("mcp") is None:
        raise ConfigError(
            "MCP servers need the SDK: install ridethrough with its extra, pip install 'ridethrough[mcp]'"
        )


def _mode(name: str, protocol: str) -> str:
    if protocol not in ("auto", "legacy"):
        raise ConfigError(f"MCP server {name!r}: protocol is 'auto' or 'legacy'; got {protocol!r}")
    return protocol


def _address(name: str, url: str) -> str:
    """The URL without what may be a secret in it.

    Raises:
        ConfigError: it is none, or has a password in it.
    """
    try:
        parts = parsed(url)
    except ConfigError:
        raise ConfigError(
            f"MCP server {name!r}: url is not of the form http://HOST/PATH or https://HOST/PATH"
        ) from None
    if "@" in parts.netloc:
        raise ConfigError(f"MCP server {name!r}: a password belongs in a header with env:NAME, not in the URL")
    return parts._replace(query="", fragment="").geturl()


@asynccontextmanager
async def _opened(where: Where) -> AsyncGenerator[Sandbox]:
    """A sandbox for a server: one that is open, or one of its own."""
    if isinstance(where, Sandbox):
        yield where
        return
    from ridethrough.sandboxes.standalone import docker_sandbox

    opening = docker_sandbox(where) if isinstance(where, str | SandboxProfile) else where()
    async with opening as sandbox:
        yield sandbox
