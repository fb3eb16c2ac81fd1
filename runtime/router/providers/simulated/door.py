"""The listening socket, which is closed while nobody is to listen: a refused connection is a real one.

While it is closed the port is bound but not listened at, so that no other process gets it in the meantime. Connections
are accepted here and not by anyio, since only waiting may be cancelled: an accept that is loses its connection.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

import anyio
from anyio.abc import SocketAttribute, SocketStream, TaskGroup
from anyio.streams.stapled import MultiListener

from ridethrough.runtime.errors import ConfigError
from ridethrough.runtime.router.providers.simulated.http import Http

_BREATH = 0.05


class Door:
    """Listens at ``host`` and ``port`` (0 takes a free one), and hands connections to ``serve``.

    ``closed`` tells whether nobody is to listen now, and in how many seconds that changes.
    """

    def __init__(
        self,
        host: str,
        port: int,
        serve: Callable[[SocketStream], Awaitable[None]],
        closed: Callable[[], tuple[bool, float]],
    ) -> None:
        self.port = port
        self._host = host
        self._serve = serve
        self._closed = closed
        self._listener: MultiListener[SocketStream] | None = None
        self._held: set[Http] = set()
        self._changed: anyio.Event | None = None

    async def open(self) -> None:
        """Listen.

        Raises:
            ConfigError: The port is taken.
        """
        try:
            self._listener = await anyio.create_tcp_listener(local_host=self._host, local_port=self.port, backlog=1024)
        except OSError as error:
            where = f"{self._host}:{self.port}"
            text = f"the simulated provider cannot listen on {where} ({error}): choose another port"
            raise ConfigError(text) from None
        self.port = self._listener.extra(SocketAttribute.local_port)

    async def keep(self, group: TaskGroup) -> None:
        """Serve the connections in ``group`` until cancelled, closed whenever it is to be."""
        try:
            while True:
                self._changed = anyio.Event()
                shut, left = self._closed()
                if shut:
                    await self._stay_closed()
                else:
                    await self._stay_open(group, left)
        finally:
            if self._listener is not None:
                with anyio.CancelScope(shield=True):
                    await self._listener.aclose()

    def look_again(self) -> None:
        """Ask anew whether somebody is to listen."""
        if self._changed is not None:
            self._changed.set()

    @contextmanager
    def holding(self, http: Http) -> Generator[None]:
        """Reset the connection when the door is closed before it has ended."""
        self._held.add(http)
        try:
            yield
        finally:
            self._held.discard(http)

    async def _stay_open(self, group: TaskGroup, seconds: float) -> None:
        assert self._listener is not None
        assert self._changed is not None
        with anyio.move_on_after(seconds):
            async with anyio.create_task_group() as accepting:
                for listener in self._sockets():
                    accepting.start_soon(self._accept, listener, group)
                await self._changed.wait()
                accepting.cancel_scope.cancel()

    async def _stay_closed(self) -> None:
        """Close, and open again as soon as nobody minds; faults that touch each other make one closing."""
        assert self._listener is not None
        addresses = [(each.family, each.getsockname()) for each in self._sockets()]
        await self._listener.aclose()
        held = [_bound(family, address) for family, address in addresses]
        try:
            for http in list(self._held):
                http.abort()
            while (now := self._closed())[0]:
                self._changed = anyio.Event()
                with anyio.move_on_after(now[1]):
                    await self._changed.wait()
            await self.open()
        finally:
            for each in held:
                each.close()

    def _sockets(self) -> list[socket.socket]:
        assert self._listener is not None
        return [listener.extra(SocketAttribute.raw_socket) for listener in self._listener.listeners]

    async def _accept(self, listener: socket.socket, group: TaskGroup) -> None:
        while True:
            await anyio.wait_readable(listener)
            try:
                while True:
                    group.start_soon(self._connected, listener.accept()[0])
            except (BlockingIOError, ConnectionError):
                pass
            except OSError:  # too many open files: those that wait stay in the backlog
                await anyio.sleep(_BREATH)

    async def _connected(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if (stream := await _wrapped(connection)) is not None:
            await self._serve(stream)


async def _wrapped(connection: socket.socket) -> SocketStream | None:
    """Return a stream over ``connection``, ``None`` when the client is gone already."""
    with anyio.CancelScope(shield=True):
        try:
            return await SocketStream.from_socket(connection)
        except (OSError, ValueError):
            connection.close()
    return None


def _bound(family: Any, address: Any) -> socket.socket:
    """Return a socket that keeps ``address`` from others without listening there."""
    holder = socket.socket(family, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with suppress(OSError):
        holder.bind(address)
    return holder
