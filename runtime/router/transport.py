"""The one seam around HTTP: connections, phases and deadlines, and nothing about any provider.

The client is the project's own, over h11 and anyio: a router talks to a handful of servers, so its pool is a stack of
kept connections for each, the warmest on top, and a call costs the same among 4 connections as among 400. What was
measured, in ms of CPU a call, with a server in another process, by calls at once (asyncio; on trio this client takes
0.17 to 0.19):

    =============================================  =====  =====  =====  =====  =====
    client                                             1     25     50    100    200
    =============================================  =====  =====  =====  =====  =====
    httpx 0.28, clients of 20 connections           0.53   0.79   0.74   0.74   0.85
    httpx 0.28, its transport with one pool         0.31   0.63   4.87  11.91  17.27
    httpx2 2.16                                     0.40   0.56   0.56   0.71   0.90
    httpx2 2.16, its transport                      0.35   0.46   0.51   0.60   0.78
    httpcore2 2.16, its pool                        0.33   0.42   0.43   0.49   0.72
    httpcore2 2.16, its connections, a stack        0.24   0.30   0.36   0.29   0.25
    this one                                        0.21   0.21   0.20   0.20   0.20
    =============================================  =====  =====  =====  =====  =====

What decided besides CPU: the phase of a failure is known and not guessed (whether all was written, whether a byte came
back), and the import takes 0.02 s where httpx takes 0.08.

A deadline is a time of ``anyio.current_time()``. It is watched around each single wait, never across a yield, so that
an abandoned stream leaves no cancel scope behind.

A kept connection may be closed by the server at the very moment it is used. Such a request is sent once more, on a new
connection, when (a) its connection had been used before, (b) not one byte of an answer had come, and (c) it broke
within ``STALE_WINDOW`` of the request: a close that was under way is noticed within a round trip, whereas one that
comes later may be a server that died at work on the request, which may then be billed. That one is the caller's to
decide, as is every failure of a new connection.
"""

from __future__ import annotations

import re
import ssl
import zlib
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from ridethrough.runtime.errors import Slow, Transport, UsageError
from ridethrough.runtime.router.address import (
    Broken,
    Phase,
    Proxy,
    Target,
    is_loopback,
    proxy_for,
    target_of,
    trusted,
)

if TYPE_CHECKING:
    import h11

    from ridethrough.runtime.router.connection import Connection

__all__ = ["CONNECTIONS", "Connections", "Deadline", "Reply", "is_loopback", "too_slow"]

CONNECTIONS = 4096
"""Connections to one server at once; what is beyond waits for one, for as long as it may for connecting."""

KEPT_SECONDS = 30.0
"""How long an unused connection is kept."""

STALE_WINDOW = 1.0
"""Seconds within which a kept connection that breaks counts as closed before the request came."""

_HEADERS = {"accept": "*/*", "accept-encoding": "gzip, deflate", "user-agent": "ridethrough"}
_NAME = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_FORBIDDEN = re.compile(r"[^\t\x20-\x7e\x80-\U0010ffff]")


@dataclass(frozen=True)
class Deadline:
    """A time on anyio's clock, and the phase that is too slow when it passes."""

    at: float
    phase: str


class Reply:
    """An answer whose head is there; ``headers`` have names in lower case."""

    def __init__(self, connection: Connection, status: int, headers: Mapping[str, str], deployment: str) -> None:
        self.status = status
        self.headers = headers
        self._connection = connection
        self._deployment = deployment
        self._decoder = _decoder(headers.get("content-encoding", ""), deployment)

    @property
    def content_type(self) -> str:
        """The media type without its parameters, in lower case."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def chunk(self, deadline: Deadline) -> bytes | None:
        """Return the next piece of the body, ``None`` at its end.

        Raises:
            Slow: The deadline passed first.
            Transport: The connection was cut (phase ``read``).
        """
        with anyio.CancelScope(deadline=deadline.at):
            return await self._piece()
        raise too_slow(self._deployment, deadline.phase)

    async def body(self, deadline: Deadline, limit: int = 64 * 1024 * 1024) -> bytes:
        """Return the rest of the body, up to ``limit`` bytes.

        Raises:
            Slow, Transport: As for ``chunk``; ``Transport`` too when the body is longer than ``limit``.
        """
        pieces: list[bytes] = []
        size = 0
        while (piece := await self.chunk(deadline)) is not None:
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise Transport(f"{self._deployment} sent more than {limit} bytes", deployment=self._deployment)
        return b"".join(pieces)

    async def _piece(self) -> bytes | None:
        while True:
            try:
                data = await self._connection.piece()
            except Broken as error:
                raise _transport(error, self._deployment) from error
            if self._decoder is None:
                return data
            if decoded := self._decoder.feed(data):
                return decoded
            if data is None:
                return None


@dataclass(frozen=True, slots=True)
class _Call:
    """One request and what bounds it; ``connect`` is in seconds."""

    request: h11.Request
    body: bytes
    connect: float
    deadline: Deadline
    deployment: str


@dataclass
class Connections:
    """All connections to one server. Open it as an async context manager.

    ``base_url`` may have a path and a query, which go before those of each call. Servers elsewhere than on this
    machine are reached through the proxy that the environment names.
    """

    base_url: str
    limit: int = CONNECTIONS
    _idle: deque[Connection] = field(default_factory=deque["Connection"], repr=False)
    _in_flight: int = 0
    _slots: anyio.Semaphore | None = field(default=None, repr=False)
    _target: Target | None = None
    _proxy: Proxy | None = field(default=None, repr=False)
    _tls: ssl.SSLContext | None = field(default=None, repr=False)

    async def __aenter__(self) -> Connections:
        """Nothing is opened before the first call."""
        self._slots = anyio.Semaphore(self.limit, fast_acquire=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close every kept connection; those of calls under way are closed as the calls end."""
        self._slots = None
        while self._idle:
            await self._idle.pop().aclose()

    @property
    def in_flight(self) -> int:
        """Calls that are being made now."""
        return self._in_flight

    def post(
        self, path: str, body: bytes, headers: Mapping[str, str], *, connect: float, deadline: Deadline, deployment: str
    ) -> AbstractAsyncContextManager[Reply]:
        """Send a request and give its answer once the head is there; ``connect`` is in seconds.

        Raises:
            Transport: With the phase that failed; from ``write`` on the call may be billed.
            Slow: The deadline passed first.
        """
        return self._exchange("POST", path, body, headers, connect, deadline, deployment)

    def get(
        self, path: str, headers: Mapping[str, str], *, connect: float, deadline: Deadline, deployment: str
    ) -> AbstractAsyncContextManager[Reply]:
        """Ask for something, such as the list of models, as ``post`` does."""
        return self._exchange("GET", path, b"", headers, connect, deadline, deployment)

    @asynccontextmanager
    async def _exchange(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        connect: float,
        deadline: Deadline,
        deployment: str,
    ) -> AsyncGenerator[Reply]:
        slots = self._slots
        if slots is None:
            raise UsageError("the connections are not open: use them inside `async with`")
        try:
            call = _Call(self._request(method, path, body, headers), body, connect, deadline, deployment)
            await self._take(slots, call)
        except Broken as error:
            raise _transport(error, deployment) from error
        self._in_flight += 1
        try:
            connection, head = await self._answered(call)
            try:
                yield Reply(connection, head.status_code, _fields(head.headers), deployment)
            finally:
                await self._give_back(connection)
        finally:
            self._in_flight -= 1
            slots.release()

    async def _answered(self, call: _Call) -> tuple[Connection, h11.Response]:
        try:
            if kept := await self._kept():
                try:
                    return kept, await self._ask(kept, call)
                except Broken as error:
                    if not _closed_before(error, kept):
                        raise
            fresh = await self._open(call)
            return fresh, await self._ask(fresh, call)
        except Broken as error:
            raise _transport(error, call.deployment) from error

    async def _ask(self, connection: Connection, call: _Call) -> h11.Response:
        try:
            with anyio.CancelScope(deadline=call.deadline.at):
                return await connection.ask(call.request, call.body)
            raise too_slow(call.deployment, call.deadline.phase)
        except BaseException:
            await connection.aclose()
            raise

    # --- the pool ---------------------------------------------------------------------------------------------------

    async def _take(self, slots: anyio.Semaphore, call: _Call) -> None:
        try:
            slots.acquire_nowait()
        except anyio.WouldBlock:
            with anyio.CancelScope(deadline=_until(call)):
                await slots.acquire()
                return
            raise self._late(call, "pool", f"all {self.limit} connections were taken for {call.connect:g} s") from None

    async def _kept(self) -> Connection | None:
        """Return the connection that rested last: it is the least likely to have been closed meanwhile."""
        while self._idle:
            connection = self._idle.pop()
            if anyio.current_time() - connection.idle_since < KEPT_SECONDS and not connection.is_stale():
                return connection
            await connection.aclose()
        return None

    async def _give_back(self, connection: Connection) -> None:
        if self._slots is None or not connection.rest():
            await connection.aclose()
            return
        connection.idle_since = now = anyio.current_time()
        self._idle.append(connection)
        while self._idle and now - self._idle[0].idle_since > KEPT_SECONDS:
            await self._idle.popleft().aclose()

    async def _open(self, call: _Call) -> Connection:
        from ridethrough.runtime.router.connection import dial

        endpoint = self._server().endpoint
        secure = endpoint.secure or (self._proxy is not None and self._proxy.endpoint.secure)
        with anyio.CancelScope(deadline=_until(call)):
            return await dial(endpoint, self._proxy, self._context() if secure else None)
        raise self._late(call, "connect", f"no connection within {call.connect:g} s (timeouts.connect)")

    def _late(self, call: _Call, phase: Phase, text: str) -> Exception:
        if anyio.current_time() >= call.deadline.at:
            return too_slow(call.deployment, call.deadline.phase)
        return Broken(text, phase)

    # --- what is sent -----------------------------------------------------------------------------------------------

    def _request(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> h11.Request:
        import h11

        server = self._server()
        named = {
            "host": server.host,
            **_HEADERS,
            **dict(server.headers),
            **{name.lower(): value for name, value in headers.items()},
        }
        target = server.path(path)
        if self._proxy is not None and not server.endpoint.secure:
            target = f"http://{server.host}{target}"
            named.update(self._proxy.headers)
        if body:
            named["content-length"] = str(len(body))
        return h11.Request(method=method, target=target, headers=_encoded(named))

    def _server(self) -> Target:
        if self._target is None:
            target = target_of(self.base_url)
            self._proxy = None if is_loopback(self.base_url) else proxy_for(target.endpoint)
            self._target = target
        return self._target

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = trusted()
        return self._tls


def too_slow(deployment: str, phase: str) -> Slow:
    """Build the error of a deadline that passed."""
    what = {
        "first_token": "gave no first token by its deadline",
        "idle": "fell silent in the middle of its answer",
        "total": "did not finish its answer by the deadline",
    }[phase]
    return Slow(
        f"{deployment} {what}: raise timeouts.{phase} if that is normal for it", phase=phase, deployment=deployment
    )


def _until(call: _Call) -> float:
    return min(anyio.current_time() + call.connect, call.deadline.at)


def _closed_before(error: Broken, connection: Connection) -> bool:
    """Whether a kept connection had been closed before the request came to it (the module says how that is told)."""
    return error.untouched and anyio.current_time() - connection.asked_at < STALE_WINDOW


def _transport(error: Broken, deployment: str) -> Transport:
    sent = "" if error.phase in ("pool", "connect") else "; the call may have been billed"
    text = f"the connection to {deployment} failed ({error.phase}): {error}{sent}"
    return Transport(text, phase=error.phase, deployment=deployment)


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Return headers as bytes. What HTTP cannot carry is named by its header only: the value may be a key."""
    for name, value in headers.items():
        if not _NAME.fullmatch(name):
            raise Broken(f"{name!r} cannot be the name of a header", "connect")
        if _FORBIDDEN.search(value) or value != value.strip():
            text = f"the header '{name}' cannot be sent: its value has line breaks, control characters or outer spaces"
            raise Broken(text, "connect")
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def _fields(headers: Iterable[tuple[bytes, bytes]]) -> Mapping[str, str]:
    """Return an answer's headers, names in lower case; repeated ones are joined with commas, as HTTP has it."""
    found: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


# --- content encodings ----------------------------------------------------------------------------------------------


class _Inflated:
    """Undoes gzip and deflate; servers send the latter with and without zlib's frame."""

    def __init__(self, bits: int, deployment: str) -> None:
        self._deployment = deployment
        self._bits = bits
        self._inflater = zlib.decompressobj(bits)
        self._fed = False

    def feed(self, data: bytes | None) -> bytes:
        """Return what ``data`` adds; ``None`` is the end of the body.

        Raises:
            Transport: The data are damaged, or end too early.
        """
        try:
            return self._end() if data is None else self._inflated(data)
        except zlib.error as error:
            text = f"{self._deployment} sent a damaged body: {error}"
            raise Transport(text, phase="read", deployment=self._deployment) from error

    def _inflated(self, data: bytes) -> bytes:
        try:
            decoded = self._inflater.decompress(data)
        except zlib.error:
            if self._fed or self._bits != zlib.MAX_WBITS:
                raise
            self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            decoded = self._inflater.decompress(data)
        self._fed = True
        return decoded

    def _end(self) -> bytes:
        rest = self._inflater.flush()
        if self._fed and not self._inflater.eof:
            raise zlib.error("it ends too early")
        return rest


def _decoder(encoding: str, deployment: str) -> _Inflated | None:
    kind = encoding.strip().lower()
    if kind in ("", "identity"):
        return None
    if kind in ("gzip", "x-gzip", "deflate"):
        return _Inflated(zlib.MAX_WBITS if kind == "deflate" else zlib.MAX_WBITS | 16, deployment)
    text = f"{deployment} answered in the encoding '{kind}', which was not asked for"
    raise Transport(text, phase="read", deployment=deployment)
