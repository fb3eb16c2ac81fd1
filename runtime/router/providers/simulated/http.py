"""HTTP/1.1 on one connection, as much of it as a provider's server needs.

It reads requests whole and writes what it is told in as few packets as possible: a load test with hundreds of clients
on this machine should measure them, and not this server.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus

import anyio
from anyio.abc import SocketAttribute, SocketStream

JSON = "application/json"
EVENTS = "text/event-stream"

_LARGEST_HEAD = 64 * 1024
_LARGEST_BODY = 256 * 1024 * 1024


class Broken(Exception):
    """The connection is to be closed, whatever was under way."""


class Gone(Exception):
    """The client has closed the connection."""


@dataclass(frozen=True)
class Received:
    """A request. ``target`` is the path with its query; ``headers`` have names in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]


class Http:
    """One connection. What is written is sent by ``flush``, or before the next pause."""

    def __init__(self, stream: SocketStream) -> None:
        self.scope = anyio.CancelScope()
        self.open = True
        """Whether another request may follow."""
        self._stream = stream
        self._buffer = bytearray()
        self._out: list[bytes] = []

    # --- reading ----------------------------------------------------------------------------------------------------

    async def request(self) -> Received | None:
        """Return the next request, ``None`` when the client is gone.

        Raises:
            Broken: What came is no HTTP.
        """
        try:
            head = await self._until(b"\r\n\r\n", _LARGEST_HEAD)
            first, *lines = head.decode("latin-1").split("\r\n")
            method, target, version = first.split(" ")
            pairs = (line.partition(":") for line in lines)
            headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
            self.open = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
            return Received(method, target, headers, await self._body(headers))
        except Gone:
            return None
        except ValueError:
            raise Broken from None

    async def _body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("expect", "").lower() == "100-continue":
            await self._stream.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return await self._exactly(int(headers.get("content-length") or 0))
        body: list[bytes] = []
        while size := int((await self._until(b"\r\n", _LARGEST_HEAD)).partition(b";")[0], 16):
            body.append(await self._exactly(size))
            await self._exactly(2)
        while await self._until(b"\r\n", _LARGEST_HEAD):
            pass  # trailers
        return b"".join(body)

    async def _until(self, mark: bytes, limit: int) -> bytes:
        while (found := self._buffer.find(mark)) < 0:
            if len(self._buffer) > limit:
                raise ValueError("the head is too long")
            await self._receive()
        data = bytes(self._buffer[:found])
        del self._buffer[: found + len(mark)]
        return data

    async def _exactly(self, size: int) -> bytes:
        if not 0 <= size <= _LARGEST_BODY:
            raise ValueError("the body is too long")
        while len(self._buffer) < size:
            await self._receive()
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    async def _receive(self) -> None:
        try:
            self._buffer += await self._stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            raise Gone from None

    # --- writing ----------------------------------------------------------------------------------------------------

    async def respond(self, status: int, kind: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Send a whole response."""
        extra = "".join([f"{name.lower()}: {value}\r\n" for name, value in (headers or {}).items()])
        head = f"{_line(status)}content-type: {kind}\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
        self._out.append(head.encode("latin-1") + body)
        await self.flush()

    def start(self, kind: str) -> None:
        """Write the head of a response of unknown length, with status 200."""
        self._out.append(f"{_line(200)}content-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n".encode("latin-1"))

    def write(self, data: bytes) -> None:
        """Write a piece of the body."""
        if data:
            self._out.append(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        """End the body."""
        self._out.append(b"0\r\n\r\n")
        await self.flush()

    async def flush(self) -> None:
        """Send what was written.

        Raises:
            Gone: Nobody reads it.
        """
        if not self._out:
            return
        data = b"".join(self._out)
        self._out.clear()
        try:
            await self._stream.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            raise Gone from None

    async def pause(self, seconds: float) -> None:
        """Send what was written and wait, but no longer than the client does.

        Raises:
            Gone: The client closed the connection, as one does that has waited long enough.
        """
        await self.flush()
        if seconds > 0:
            with anyio.move_on_after(seconds):
                while True:
                    await self._receive()

    # --- ending -----------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Make closing send a reset instead of an orderly end."""
        with suppress(OSError):  # closed already
            raw = self._stream.extra(SocketAttribute.raw_socket)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def abort(self) -> None:
        """Reset the connection now, whatever is under way."""
        self.reset()
        self.scope.cancel()

    async def close(self) -> None:
        """Close the connection."""
        with anyio.CancelScope(shield=True, deadline=anyio.current_time() + 1):
            await self._stream.aclose()


def _line(status: int) -> str:
    return _LINES.get(status) or f"HTTP/1.1 {status} \r\n"


_LINES = {each.value: f"HTTP/1.1 {each.value} {each.phrase}\r\n" for each in HTTPStatus}
