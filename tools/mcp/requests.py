"""One connection to a server, and the requests that are under way on it.

A request runs in a task of the connection's owner, and its caller waits for it from another. So a caller that goes
away leaves at once while the server is told (``notifications/cancelled``), and a connection that breaks answers all
who wait, with one story, once it is known.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

import anyio
from anyio.abc import TaskGroup

from ridethrough.runtime.errors import Error, ToolFailed
from ridethrough.tools.mcp.web import NOT_SENT, SESSION_GONE

if TYPE_CHECKING:
    from mcp import Client
    from mcp.client.session import ClientSession
    from mcp_types import ListToolsResult
    from mcp_types import Tool as Listed

T = TypeVar("T")

MAX_PAGES: Final = 1_000
MAX_TOOLS: Final = 10_000
"""Tools of one server; a list that goes on is an error."""

_BROKEN: Final = frozenset({"Connection closed"})


class Lost(Error):
    """The connection broke while the request was under way."""


class NotSent(Error):
    """The server has not seen the request."""


@dataclass(eq=False)
class _Request(Generic[T]):
    work: Callable[[ClientSession], Awaitable[T]]
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    done: anyio.Event = field(default_factory=anyio.Event)
    value: T | None = None
    error: Exception | None = None

    def settle(self, error: Exception | None = None) -> None:
        self.error = self.error or error
        self.done.set()


class Connection:
    """A session with a server.

    Attributes:
        over: Whether it takes no more requests.
        proven: Whether the server has answered any.
        stale: Whether the list of tools that is known may be old.
    """

    def __init__(self, client: Client, tasks: TaskGroup, list_timeout: float, ended: Callable[[], None]) -> None:
        """``tasks`` is the owner's; ``ended`` tells it that the connection is over."""
        self.client = client
        self.over = False
        self.proven = False
        self.stale = True
        self._tasks = tasks
        self._under_way: set[_Request[Any]] = set()
        self._list_timeout = list_timeout
        self._ended = ended
        self._listed: dict[str, Listed] = {}
        self._listing = anyio.Lock()

    @property
    def busy(self) -> bool:
        """Whether anybody waits for it."""
        return bool(self._under_way)

    async def perform(self, work: Callable[[ClientSession], Awaitable[T]]) -> T:
        """Make a request. A caller that is cancelled leaves at once; the server is told behind its back.

        Raises:
            NotSent: the connection had ended before.
            Lost: it broke while the request was under way.
            Exception: what the SDK raises for an error that the server answers.
        """
        if self.over:
            raise NotSent("the connection has ended")
        request = _Request(work)
        self._under_way.add(request)
        self._tasks.start_soon(self._run, request)
        try:
            await request.done.wait()
        finally:
            if not request.done.is_set():
                request.scope.cancel()
            self._under_way.discard(request)
        if request.error is not None:
            raise request.error
        return cast(T, request.value)

    async def _run(self, request: _Request[Any]) -> None:
        with request.scope:
            try:
                request.value = await request.work(self.client.session)
                self.proven = True
                request.settle()
            except Exception as error:
                self._failed(request, error)

    def _failed(self, request: _Request[Any], error: Exception) -> None:
        """A broken connection tells its story at its end; everything else is this request's own answer."""
        code, text = getattr(error, "code", None), str(error)
        if code in (NOT_SENT, SESSION_GONE):
            error = NotSent(text)
            if code == SESSION_GONE:
                self.end()
        elif text in _BROKEN:
            self.end()
            return
        request.settle(error)

    def end(self) -> None:
        """Take no more requests."""
        self.over = True
        self._ended()

    def settle(self, story: str) -> None:
        """Answer all who still wait."""
        self.end()
        for request in tuple(self._under_way):
            request.settle(Lost(story))

    # --- tools ------------------------------------------------------------------------------------------------------

    async def listed(self) -> dict[str, Listed]:
        """The server's tools by name, asked for again when it has said that they changed.

        Raises:
            ToolFailed: the list does not end, or did not come in time.
        """
        async with self._listing:
            if self.stale:
                self.stale = False
                try:
                    self._listed = await self._all_pages()
                except BaseException:
                    self.stale = True
                    raise
            return self._listed

    async def _all_pages(self) -> dict[str, Listed]:
        with anyio.move_on_after(self._list_timeout):
            return await self._pages()
        raise ToolFailed(f"its list of tools did not come within {self._list_timeout:g} s")

    async def _pages(self) -> dict[str, Listed]:
        found: dict[str, Listed] = {}
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            page = await self.perform(partial(_page, cursor))
            found |= {tool.name: tool for tool in page.tools}
            cursor = page.next_cursor
            if cursor is None:
                return found
            if len(found) > MAX_TOOLS:
                break
        raise ToolFailed(f"its list of tools does not end: {len(found)} after as many pages as are read")

    async def follow_changes(self) -> None:
        """Notice that the list has changed, on the revision where that has to be asked for."""
        from mcp_types.version import MODERN_PROTOCOL_VERSIONS

        tools = self.client.server_capabilities.tools
        if self.client.protocol_version not in MODERN_PROTOCOL_VERSIONS or not (tools and tools.list_changed):
            return
        try:
            async with self.client.listen(tools_list_changed=True) as changes:
                async for _ in changes:
                    self.stale = True
        except Exception:  # a server that ends its stream has said nothing wrong; from now on each list may be old
            self.stale = True


async def _page(cursor: str | None, session: ClientSession) -> ListToolsResult:
    from mcp_types import PaginatedRequestParams

    return await session.list_tools(params=PaginatedRequestParams(cursor=cursor))
