"""The one task that a server's connection lives in.

The SDK's client has to be left in the task that it was entered in, and a transport that breaks takes that task along.
So nobody who calls a tool owns a connection. The owner is a task of the event loop itself, not of whoever came first:
it connects when somebody asks, connects again (with pauses that grow) when the server was lost, and ends with the
loop, when it is closed, or when nobody has asked for a while.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from contextvars import Context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import anyio

from ridethrough.runtime.errors import ToolFailed
from ridethrough.tools.mcp.pipe import Life
from ridethrough.tools.mcp.requests import Connection

if TYPE_CHECKING:
    from mcp import Client
    from mcp.client.session import IncomingMessage

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 10.0
"""Seconds between attempts to connect: doubled after each that failed, with a random part taken off."""

Transport = Callable[[Life], AbstractAsyncContextManager[AbstractAsyncContextManager[Any]]]
"""Opens what a connection needs, and gives the SDK's transport, not yet entered."""


@dataclass(frozen=True)
class Terms:
    """How a server is reached, and how long it is waited for (in seconds)."""

    name: str
    transport: Transport
    mode: str
    connect_timeout: float
    list_timeout: float
    idle_seconds: float


@dataclass(eq=False)
class _Attempt:
    """The next connection, for those who wait for it."""

    wanted: anyio.Event = field(default_factory=anyio.Event)
    settled: anyio.Event = field(default_factory=anyio.Event)
    connection: Connection | None = None
    error: str = ""

    @property
    def spent(self) -> bool:
        """Whether whoever comes now needs another one."""
        return self.settled.is_set() and (self.connection is None or self.connection.over)

    def settle(self, connection: Connection | None, error: str = "") -> None:
        """Tell those who wait; the first word counts."""
        if not self.settled.is_set():
            self.connection, self.error = connection, error
            self.settled.set()


class Owner:
    """Keeps one server connected on one event loop.

    Attributes:
        over: Whether its task has ended; another one has to be started then.
        held: Whether somebody wants it kept even when nobody asks.
    """

    def __init__(self, terms: Terms) -> None:
        """Use ``start``."""
        self.over = False
        self.held = False
        self._terms = terms
        self._failures = 0
        self._attempt = _Attempt()
        self._stirred = anyio.Event()
        self._closing = False
        self._closed = anyio.Event()

    @classmethod
    def start(cls, terms: Terms) -> Owner:
        """Start one on the caller's event loop."""
        owner = cls(terms)
        _spawn(owner.run, f"MCP server {terms.name}")
        return owner

    async def connection(self) -> Connection:
        """A connection; waits for the next one if there is none.

        Raises:
            ToolFailed: the server cannot be reached, or does not speak the protocol.
        """
        attempt = self._current()
        attempt.wanted.set()
        self._stir()
        await attempt.settled.wait()
        if attempt.connection is None:
            raise ToolFailed(f"the MCP server {self._terms.name!r} cannot be used: {attempt.error}")
        return attempt.connection

    async def aclose(self) -> None:
        """End the connection, and the server's process if it has one; returns when both have ended."""
        self._closing = True
        self._stir()
        await self._closed.wait()

    def _current(self) -> _Attempt:
        if self._attempt.spent:
            self._attempt = _Attempt()
        return self._attempt

    def _stir(self) -> None:
        self._stirred.set()

    async def _stirring(self, seconds: float) -> bool:
        """Wait until something happens; whether it did in time."""
        with anyio.move_on_after(seconds):
            await self._stirred.wait()
        stirred, self._stirred = self._stirred.is_set(), anyio.Event()
        return stirred

    # --- its task ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Connect, again and again, until it is closed or nobody has asked for a while."""
        try:
            while await self._wanted():
                await self._pause()
                await self._live(self._current())
        finally:
            self.over = True
            self._current().settle(None, "it was closed")
            self._closed.set()

    async def _wanted(self) -> bool:
        """Wait until somebody wants a connection; false when nobody does."""
        while not self._closing and not self._current().wanted.is_set():
            if not await self._stirring(self._idle_seconds) and not self._current().wanted.is_set():
                return False
        return not self._closing

    @property
    def _idle_seconds(self) -> float:
        return math.inf if self.held else self._terms.idle_seconds

    async def _pause(self) -> None:
        """Leave a server that fails alone for a while."""
        if self._failures:
            longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._failures - 1, 30))
            until = anyio.current_time() + longest * random.uniform(0.5, 1.0)
            while not self._closing and (left := until - anyio.current_time()) > 0:
                await self._stirring(left)

    async def _live(self, attempt: _Attempt) -> None:
        """One connection from its beginning to its end; whatever becomes of it is told to those who wait."""
        life, limit = Life(), anyio.CancelScope(deadline=anyio.current_time() + self._terms.connect_timeout)
        reason = ""
        try:
            with limit:
                await self._connected(attempt, life, limit)
        except Exception as error:
            reason = _first(error)
        finally:
            if limit.cancelled_caught:
                reason = f"it did not answer within {self._terms.connect_timeout:g} s of being started"
            self._settle(attempt, life.told(reason))

    def _settle(self, attempt: _Attempt, story: str) -> None:
        attempt.settle(None, story)
        if attempt.connection is not None:
            attempt.connection.settle(story)
        proven = attempt.connection is not None and attempt.connection.proven
        self._failures = 0 if proven else self._failures + 1

    async def _connected(self, attempt: _Attempt, life: Life, limit: anyio.CancelScope) -> None:
        async with AsyncExitStack() as stack:
            transport = await stack.enter_async_context(self._terms.transport(life))
            client = await stack.enter_async_context(self._client(transport, attempt))
            async with anyio.create_task_group() as tasks:
                connection = Connection(client, tasks, self._terms.list_timeout, self._stir)
                tasks.start_soon(connection.follow_changes)
                tasks.start_soon(_end_with, life, connection)
                limit.deadline = math.inf
                attempt.settle(connection)
                await self._serve(connection)
                connection.end()
                life.hang_up()
                tasks.cancel_scope.cancel()

    async def _serve(self, connection: Connection) -> None:
        """Wait until the connection is over, closed, or of no use to anybody."""
        while not self._closing and not connection.over:
            if not await self._stirring(self._idle_seconds) and not connection.busy:
                return

    def _client(self, transport: Any, attempt: _Attempt) -> Client:
        from mcp import Client
        from mcp_types import Implementation, ToolListChangedNotification

        import ridethrough

        async def notice(message: IncomingMessage) -> None:
            if isinstance(message, ToolListChangedNotification) and attempt.connection is not None:
                attempt.connection.stale = True

        for name in ("mcp", "client"):  # the SDK tells of each bad line with a traceback; who wants that can listen
            logging.getLogger(name).addHandler(_NOWHERE)
        about = Implementation(name="ridethrough", version=ridethrough.__version__)
        return Client(transport, mode=self._terms.mode, cache=None, message_handler=notice, client_info=about)


_NOWHERE: Final = logging.NullHandler()
_RUNNING: Final[set[asyncio.Task[None]]] = set()
"""The loop itself keeps only weak references to its tasks."""


def _spawn(run: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
    """Start a task that belongs to the event loop: it is cancelled, and waited for, when the loop ends."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        import trio

        trio.lowlevel.spawn_system_task(run, name=name)
        return
    task = loop.create_task(run(), name=name, context=Context())  # it outlives the run that asked first
    _RUNNING.add(task)
    task.add_done_callback(_RUNNING.discard)


async def _end_with(life: Life, connection: Connection) -> None:
    await life.ended.wait()
    connection.end()


def _first(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__
