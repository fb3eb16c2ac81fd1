"""One HTTP/1.1 connection over anyio and h11: how it is opened, one exchange at a time, and what failed where.

Nothing here knows of deadlines or of providers. Every failure is a ``Broken`` with the phase in which it happened,
since that decides what the caller may do: before ``write`` nothing was sent, and a request to which no byte came back
on a kept connection was very likely never read.
"""

from __future__ import annotations

import os
import select
import ssl
import sys
from contextlib import suppress
from typing import Any

import anyio
import h11
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.tls import TLSAttribute, TLSStream

from ridethrough.runtime.router.address import Broken, Endpoint, Proxy

_READ = 64 * 1024
_LONGEST_HEAD = 128 * 1024  # bytes of status line and headers; some gateways repeat a whole policy in them
_LOST = (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError)

# --- opening --------------------------------------------------------------------------------------------------------


async def dial(server: Endpoint, proxy: Proxy | None, tls: ssl.SSLContext | None) -> Connection:
    """Open a connection to ``server``, through ``proxy`` when there is one.

    Raises:
        Broken: Phase ``connect``: nothing of a request was sent.
    """
    first = proxy.endpoint if proxy else server
    try:
        stream: ByteStream = await anyio.connect_tcp(first.host, first.port)
    except OSError as error:
        raise Broken(_told(error), "connect") from error
    try:
        if first.secure:
            stream = await _secured(stream, first, tls)
        if proxy and server.secure:
            await _tunnel(stream, server, proxy)
            stream = await _secured(stream, server, tls)
        return Connection(stream)
    except BaseException as error:
        with anyio.CancelScope(shield=True):
            await anyio.aclose_forcefully(stream)
        if isinstance(error, (*_LOST, anyio.EndOfStream)):
            raise Broken(_told(error), "connect") from error
        raise


async def _secured(stream: ByteStream, endpoint: Endpoint, tls: ssl.SSLContext | None) -> ByteStream:
    return await TLSStream.wrap(stream, hostname=endpoint.host, ssl_context=tls, standard_compatible=False)


async def _tunnel(stream: ByteStream, server: Endpoint, proxy: Proxy) -> None:
    """Ask the proxy for a tunnel to ``server``; its credentials go to the proxy only."""
    headers = [("host", server.authority), *proxy.headers]
    connection = Connection(stream)
    try:
        answer = await connection.ask(h11.Request(method="CONNECT", target=server.authority, headers=headers))
    except Broken as error:
        raise Broken(f"the proxy failed: {error}", "connect") from error
    if not 200 <= answer.status_code < 300:
        raise Broken(f"the proxy refused the connection with status {answer.status_code}", "connect")


# --- one connection -------------------------------------------------------------------------------------------------


class Connection:
    """Carries one exchange at a time: ``ask``, then ``piece`` until ``None``, then ``rest`` for the next one."""

    def __init__(self, stream: ByteStream) -> None:
        self.asked_at = 0.0
        self.idle_since = 0.0
        self._stream = stream
        self._socket: Any = stream.extra(SocketAttribute.raw_socket)
        self._tls: Any = stream.extra(TLSAttribute.ssl_object, None)
        self._state = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LONGEST_HEAD)
        self._heard = self._ended = False

    async def ask(self, request: h11.Request, body: bytes = b"") -> h11.Response:
        """Send a request in one piece and return the head of its answer.

        A server may answer before it has read everything, and close (a body that is too large): its answer counts for
        more than the failed write.

        Raises:
            Broken: Phase ``write`` when not all could be sent, else ``read``.
        """
        self.asked_at = anyio.current_time()
        self._heard = self._ended = False
        try:
            await self._stream.send(self._written(request, body))
        except _LOST as error:
            try:
                return await self._head()
            except Broken as also:
                raise Broken(_told(error), "write", untouched=also.untouched) from error
        return await self._head()

    async def piece(self) -> bytes | None:
        """Return the next bytes of the body, all that are there, ``None`` at its end.

        Raises:
            Broken: Phase ``read``.
        """
        while not self._ended:
            if data := self._arrived():
                return data
            if not self._ended:
                await self._receive()
        return None

    def rest(self) -> bool:
        """Make ready for the next exchange; ``False`` when this connection must not be used again.

        Bytes after the end of an answer would be taken for the answer to somebody else's request.
        """
        state = self._state
        if state.our_state is not h11.DONE or state.their_state is not h11.DONE or state.trailing_data[0]:
            return False
        state.start_next_cycle()
        return True

    def is_stale(self) -> bool:
        """Whether the server has closed a resting connection, or said something that nobody asked for."""
        return _is_readable(self._socket) or bool(self._tls and self._tls.pending())

    async def aclose(self) -> None:
        """Close it, whatever its state."""
        with anyio.CancelScope(shield=True), suppress(Exception):
            await anyio.aclose_forcefully(self._stream)

    def _written(self, request: h11.Request, body: bytes) -> bytes:
        send = self._state.send
        parts = (send(request), send(h11.Data(data=body)) if body else None, send(h11.EndOfMessage()))
        return b"".join(part for part in parts if part)

    async def _head(self) -> h11.Response:
        while True:
            event = self._next()
            if event is h11.NEED_DATA:
                await self._receive()
            elif isinstance(event, h11.Response):
                return event

    def _arrived(self) -> bytes:
        parts: list[bytes] = []
        while not self._ended:
            try:
                event = self._next()
            except Broken:
                if not parts:
                    raise
                break  # what came before is handed on first; the next call fails again
            if isinstance(event, h11.Data):
                parts.append(bytes(event.data))
            elif event is h11.NEED_DATA:
                break
            else:
                self._ended = True
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _next(self) -> Any:
        try:
            return self._state.next_event()
        except h11.RemoteProtocolError as error:
            raise Broken(str(error), "read", untouched=not self._heard) from error

    async def _receive(self) -> None:
        try:
            data = await self._stream.receive(_READ)
        except anyio.EndOfStream:
            data = b""
        except _LOST as error:
            raise Broken(_told(error), "read", untouched=not self._heard) from error
        self._heard = self._heard or bool(data)
        if not self._heard:
            raise Broken("the server closed the connection without an answer", "read")
        self._state.receive_data(data)


def _is_readable(socket: Any) -> bool:
    """Whether a socket has something to read; ``select`` would fail from the 1024th file of a process."""
    number = socket.fileno()
    if number < 0:
        return True
    if sys.platform == "win32":
        return bool(select.select([socket], [], [], 0)[0])
    poll = select.poll()
    poll.register(number, select.POLLIN)
    return bool(poll.poll(0))


def _told(error: BaseException) -> str:
    """Say what happened in the words of the system; anyio's own errors carry none."""
    if isinstance(error, anyio.EndOfStream):
        return "the other side closed the connection"
    cause = error.__cause__ or error
    if isinstance(cause, BaseExceptionGroup):  # one for each address of a host
        cause = cause.exceptions[0]
    if isinstance(cause, ConnectionError) and cause.errno:
        return os.strerror(cause.errno)
    return str(cause) or type(cause).__name__
