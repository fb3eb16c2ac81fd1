"""Streams over Unix sockets, on the two calls that asyncio and trio share.

``anyio.connect_unix`` does the same, but on asyncio its reader is a future: one that is cancelled in the very turn in
which data come is set all the same, and the loop reports an ``InvalidStateError`` that nobody can catch.
"""

from __future__ import annotations

import socket
from contextlib import suppress

import anyio
from anyio.abc import ByteStream
from anyio.lowlevel import checkpoint


class UnixStream(ByteStream):
    """One connection; one task may receive and another one send at the same time."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over a socket that is connected and does not block."""
        self._socket = connection
        self._closed = False

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """As ``ByteReceiveStream.receive``."""
        await checkpoint()
        while True:
            try:
                data = self._socket.recv(max_bytes)
            except BlockingIOError:
                await anyio.wait_readable(self._socket)
            except OSError as error:
                raise self._failure() from error
            else:
                break
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        """As ``ByteSendStream.send``."""
        await checkpoint()
        rest = memoryview(item)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                await anyio.wait_writable(self._socket)
            except OSError as error:
                raise self._failure() from error

    async def send_eof(self) -> None:
        """Say that nothing more is sent."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        await checkpoint()

    async def aclose(self) -> None:
        """Close it; whoever waits for it is told."""
        if not self._closed:
            self._closed = True
            anyio.notify_closing(self._socket)
            self._socket.close()
        await checkpoint()

    def _failure(self) -> Exception:
        return anyio.ClosedResourceError() if self._closed else anyio.BrokenResourceError()


async def connect_unix(path: str) -> UnixStream:
    """Connect to a Unix socket.

    Raises:
        OSError: nobody listens there.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        while True:
            try:
                connection.connect(path)
                return UnixStream(connection)
            except BlockingIOError:  # its queue of connections is full
                await anyio.sleep(0.005)
    except BaseException:
        connection.close()
        raise
