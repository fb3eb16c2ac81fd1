"""One tool of a server: what it is known by, and how it is called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio

from ridethrough.runtime.errors import ConfigError, Error, ToolFailed, ToolInterrupted
from ridethrough.tools.context import ToolContext
from ridethrough.tools.mcp.owner import Owner
from ridethrough.tools.mcp.requests import Connection, Lost, NotSent
from ridethrough.tools.mcp.results import output_of
from ridethrough.tools.mcp.web import CUT
from ridethrough.tools.tool import Effect

if TYPE_CHECKING:
    from mcp.client.session import ClientSession
    from mcp_types import CallToolResult, InputRequiredResult
    from mcp_types import Tool as Listed

TRIES: Final = 4
"""How often a request is offered that the server has not seen."""

PAUSE: Final = 0.1
"""Seconds between the first two of them; four times as long before each further one."""


class Call:
    """How one tool is called."""

    def __init__(self, server: str, name: str, effect: Effect, definition: dict[str, Any], timeout: float) -> None:
        self.server = server
        self.name = name
        self.effect = effect
        self.timeout = timeout
        self._digest = digest_of(definition)

    async def perform(self, owner: Callable[[], Owner], arguments: dict[str, Any], ctx: ToolContext[Any] | None) -> Any:
        """Call it.

        Raises:
            ToolFailed: it failed, the server cannot be reached, or the tool is not what it was.
            ToolInterrupted: it is a write, and the server was lost while it worked on it.
            TimeoutError: there was no answer in time.
        """
        with anyio.move_on_after(self.timeout):
            try:
                return await self._patiently(owner, arguments, ctx)
            except Lost as lost:
                raise self._lost(lost) from lost
        raise TimeoutError(f"{self._named} did not answer within {self.timeout:g} s")

    @property
    def _named(self) -> str:
        return f"{self.name} of the MCP server {self.server!r}"

    def _lost(self, lost: Lost) -> Error:
        text = f"The MCP server {self.server!r} was lost during this call of {self.name}: {lost}"
        if self.effect != "write":
            return ToolFailed(text)
        unknown = "The call may or may not have taken effect, so it was not made again. Find out before you repeat it."
        return ToolInterrupted(f"{text}\n{unknown}")

    async def _patiently(
        self, owner: Callable[[], Owner], arguments: dict[str, Any], ctx: ToolContext[Any] | None
    ) -> Any:
        """Call it, again if the server has not seen the call."""
        for attempt in range(1, TRIES + 1):
            connection = await owner().connection()
            try:
                await self._check(connection)
                return await self._once(connection, arguments, ctx)
            except NotSent as error:
                if attempt == TRIES:
                    raise ToolFailed(f"the MCP server {self.server!r} cannot be reached: {error}") from error
            await anyio.sleep(PAUSE * 4 ** (attempt - 1))
        raise AssertionError("the last attempt has an end")

    async def _check(self, connection: Connection) -> None:
        """Refuse to call what is not any more what the model was told."""
        try:
            found = (await connection.listed()).get(self.name)
        except Lost as lost:
            raise NotSent(str(lost)) from lost  # the call itself has not been made
        if found is None:
            raise ToolFailed(f"the MCP server {self.server!r} has no tool {self.name!r} any more")
        if digest_of(definition_of(found)) != self._digest:
            raise ToolFailed(
                f"{self._named} has changed since this agent was defined (its parameters, or what it says of its "
                "effects), so it was not called; define the agent anew (a pinned list: remove its file)"
            )

    async def _once(self, connection: Connection, arguments: dict[str, Any], ctx: ToolContext[Any] | None) -> Any:
        from mcp import MCPError
        from mcp_types import InputRequiredResult
        from pydantic import ValidationError

        try:
            result = await connection.perform(lambda session: _ask(session, self.name, arguments, ctx))
        except MCPError as error:
            if error.code == CUT or error.message.startswith(_ENDED_EARLY):
                raise Lost(error.message) from error
            raise ToolFailed(f"{self._named} failed: {error.message}") from error
        except ValidationError as error:
            raise ToolFailed(
                f"{self._named} answered with what is no result of a tool: {_first_line(error)}"
            ) from error
        if isinstance(result, InputRequiredResult):
            raise ToolFailed(f"{self._named} asks for further input in the middle of the call; that is not supported")
        return output_of(self.name, result)


async def _ask(
    session: ClientSession, name: str, arguments: dict[str, Any], ctx: ToolContext[Any] | None
) -> CallToolResult | InputRequiredResult:
    """The request itself. ``session.call_tool`` would match the server's answer with patterns of its own making."""
    from mcp_types import CallToolRequest, CallToolRequestParams, CallToolResult, InputRequiredResult
    from pydantic import TypeAdapter

    async def told(progress: float, total: float | None, message: str | None) -> None:
        if ctx is not None:
            ctx.progress(message or (f"{progress:g}" if total is None else f"{progress:g} of {total:g}"))

    wanted: TypeAdapter[CallToolResult | InputRequiredResult] = TypeAdapter(CallToolResult | InputRequiredResult)
    request = CallToolRequest(params=CallToolRequestParams(name=name, arguments=arguments))
    return await session.send_request(request, wanted, progress_callback=told)


_ENDED_EARLY: Final = ("SSE stream ended", "SSE stream failed", "Failed to parse JSON response: the connection broke")
"""How the SDK begins what it says when an answer over HTTP breaks off."""


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


# --- definitions ----------------------------------------------------------------------------------------------------


def definition_of(tool: Listed) -> dict[str, Any]:
    """What is kept of a tool: what a model is shown, and what it says of itself."""
    hints = tool.annotations
    kept: dict[str, Any] = {"name": tool.name, "inputSchema": tool.input_schema}
    about = {"description": tool.description, "title": tool.title or (hints.title if hints else None)}
    said = {"readOnlyHint": hints.read_only_hint, "idempotentHint": hints.idempotent_hint} if hints else {}
    return kept | {key: value for key, value in (about | said).items() if value is not None}


def digest_of(definition: dict[str, Any]) -> str:
    """Of what a change of would make a call another one: its parameters, and what it says of its effects."""
    seen = [definition["inputSchema"], effect_of(definition)]
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def effect_of(definition: dict[str, Any]) -> Effect:
    if definition.get("readOnlyHint"):
        return "read"
    return "idempotent" if definition.get("idempotentHint") else "write"


def definitions_in(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["tools"]
        if all(isinstance(each["name"], str) and isinstance(each["inputSchema"], dict) for each in found):
            return list(found)
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{path} has no list of tools that was pinned; remove it, and the server is asked again")
