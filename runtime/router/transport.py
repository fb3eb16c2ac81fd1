"""The one seam around the HTTP client: connections, phases and deadlines, and nothing about any provider.

Connections are httpcore2's, the library under httpx2 (the maintained fork of httpx): HTTP, TLS and proxies are its
work. Which of the kept ones is taken is ours, a stack with the warmest on top, because the library's pools look at
every connection for every request. In ms of CPU a call, the server in another process, by calls at once (asyncio; the
rows with a star were measured before):

    =============================================  =====  =====  =====  =====  =====
    client                                             1     25     50    100    200
    =============================================  =====  =====  =====  =====  =====
    httpcore2 2.16, its connections, a stack: this  0.28   0.34   0.30   0.31   0.32
    httpx2 2.16, its transport, pools of 20         0.34   0.48   0.42   0.38   0.40
    httpx2 2.16, its transport, one pool            0.33   0.47   0.47   0.53   0.65
    httpx2 2.16, its client *                       0.40   0.56   0.56   0.71   0.90
    httpx 0.28, its transport, one pool *           0.31   0.63   4.87  11.91  17.27
    a client of our own over h11                    0.14   0.19   0.18   0.17   0.16
    =============================================  =====  =====  =====  =====  =====

Our own was given up although it is the fastest: a library that others keep is worth an eighth of a millisecond.

A deadline is a time of ``anyio.current_time()``. It is watched around each single wait, never across a yield, so that
an abandoned stream leaves no cancel scope behind.

How far a request came is told by the library's ``trace`` extension: whether there was a connection, and whether all
was sent. That decides what a failure may have cost, so nothing is guessed from the kind of the error.

A kept connection may be closed by the server at the very moment it is used (one that was closed before is noticed and
replaced). Such a request is not sent once more here: the library does not tell whether the answer had begun, and what
may be billed is the caller's to send again, as after every other failure.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import anyio

from ridethrough.runtime.errors import ConfigError, Slow, Transport, UsageError
from ridethrough.runtime.router.address import is_loopback, joined, parsed, proxy_for

if TYPE_CHECKING:
    import ssl

    import httpcore2
    import httpx2

__all__ = ["CONNECTIONS", "Connections", "Deadline", "Reply", "is_loopback", "too_slow"]

CONNECTIONS = 4096
"""Connections to one server at once; what is beyond waits for one, for as long as it may for connecting."""

KEPT_SECONDS = 30.0
"""How long an unused connection is kept."""

SWEEP_SECONDS = 1.0
"""How often the connections that were not used for longest are looked at."""

Phase = Literal["pool", "connect", "write", "read"]

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

    def __init__(self, response: httpcore2.Response, deployment: str) -> None:
        self.status: int = response.status
        self.headers: Mapping[str, str] = _fields(response.headers)
        self._deployment = deployment
        self._response = response
        self._raw = _raw(response)
        self._decoded = _decoded(response, self._raw) if "content-encoding" in self.headers else None

    @property
    def content_type(self) -> str:
        """The media type without its parameters, in lower case."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def chunk(self, deadline: Deadline) -> bytes | None:
        """Return the next piece of the body, ``None`` at its end.

        Raises:
            Slow: The deadline passed first.
            Transport: The connection was cut, or the body is damaged (phase ``read``).
        """
        with anyio.CancelScope(deadline=deadline.at):
            try:
                return await anext(self._decoded or self._raw, None)
            except _failures() as error:
                raise _failed(_told(error), "read", self._deployment) from error
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

    async def aclose(self) -> None:
        """Give the connection back, or close it when the body was not read to its end.

        The library's generators do not close each other, and what is left behind is finished by the garbage collector
        in a task of its choosing; so they are run to their end, on the connection that is closed by then.
        """
        with anyio.CancelScope(shield=True):
            await self._response.aclose()
            with suppress(Exception):
                while await anext(self._raw, None) is not None:
                    pass
            if self._decoded is not None:
                await self._decoded.aclose()


class _Unclosed:
    """Another's pieces, in what is no generator: the library closes those, halfway, when a body is damaged."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        return await anext(self._pieces)


def _fields(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return headers by their names in lower case; those that come twice are joined, as HTTP has it."""
    found: dict[str, str] = {}
    for raw, value in headers:
        name, text = raw.decode("latin-1").lower(), value.decode("latin-1")
        found[name] = f"{found[name]}, {text}" if name in found else text
    return found


def _raw(response: httpcore2.Response) -> AsyncIterator[bytes]:
    assert isinstance(response.stream, AsyncIterable)
    return aiter(response.stream)


def _decoded(response: httpcore2.Response, raw: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Undo the content encodings as httpx2 does, in an answer of its own that has ``raw`` for its body."""
    from httpx2 import Response

    return Response(response.status, headers=response.headers, content=_Unclosed(raw)).aiter_bytes()


@dataclass(frozen=True, slots=True)
class _Call:
    """What bounds a request; ``connect`` is in seconds."""

    connect: float
    deadline: Deadline
    deployment: str

    def scope(self) -> anyio.CancelScope:
        """Return what bounds a wait for a connection."""
        return anyio.CancelScope(deadline=min(anyio.current_time() + self.connect, self.deadline.at))

    def late(self, scope: anyio.CancelScope, phase: Phase, text: str) -> Slow | Transport:
        """Build the error of a scope that was cancelled by its own deadline: the call's, or that for connecting."""
        if scope.deadline >= self.deadline.at:
            return too_slow(self.deployment, self.deadline.phase)
        return _failed(text, phase, self.deployment)


class _Progress:
    """How far a request has come, as the library's ``trace`` extension tells; and the wait that it bounds.

    Until the request begins to be sent the wait is one for a connection, with its own time, whatever it takes: looking
    up the host, the proxy's tunnel, TLS.
    """

    def __init__(self, call: _Call) -> None:
        self.phase: Phase = "connect"
        self.scope = call.scope()
        self._until = call.deadline.at
        self._opened: Any = None

    async def __call__(self, event: str, info: Mapping[str, Any]) -> None:
        """Take note of an event: documented in https://www.python-httpx.org/advanced/extensions/#trace."""
        if event == "connection.connect_tcp.complete":
            self._opened = info["return_value"]
        elif event == "http11.send_request_headers.started" and info["request"].method != b"CONNECT":
            self.phase, self.scope.deadline = "write", self._until
        elif event == "http11.send_request_body.complete" and self.phase == "write":
            self.phase = "read"

    async def aclose(self) -> None:
        """Close a connection that was not ready yet: the library leaves it open when it is cancelled in TLS."""
        if self.phase == "connect" and self._opened is not None:
            with anyio.CancelScope(shield=True):
                await self._opened.aclose()


@dataclass
class Connections:
    """All connections to one server. Open it as an async context manager.

    ``base_url`` may have a path and a query, which go before those of each call. Servers elsewhere than on this
    machine are reached through the proxy that the environment names.
    """

    base_url: str
    limit: int = CONNECTIONS
    _slots: anyio.Semaphore | None = field(default=None, repr=False)
    _idle: list[_Connection] = field(default_factory=list["_Connection"], repr=False)
    """Kept connections, the one that was used last at the end: it is taken first, so that the others run out."""
    _in_flight: int = 0
    _swept_at: float = 0.0
    _urls: dict[str, _Address] = field(default_factory=dict[str, "_Address"], repr=False)
    _way: _Way | None = field(default=None, repr=False)

    async def __aenter__(self) -> Connections:
        """Nothing is opened before the first call."""
        self._slots = anyio.Semaphore(self.limit, fast_acquire=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close every kept connection; those of calls under way are closed as the calls end."""
        self._slots = None
        while self._idle:
            await _close(self._idle.pop())

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
            ConfigError: A header cannot be sent.
        """
        return self._exchange("POST", path, body, headers, _Call(connect, deadline, deployment))

    def get(
        self, path: str, headers: Mapping[str, str], *, connect: float, deadline: Deadline, deployment: str
    ) -> AbstractAsyncContextManager[Reply]:
        """Ask for something, such as the list of models, as ``post`` does."""
        return self._exchange("GET", path, None, headers, _Call(connect, deadline, deployment))

    @asynccontextmanager
    async def _exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], call: _Call
    ) -> AsyncGenerator[Reply]:
        slots = self._slots
        if slots is None:
            raise UsageError("the connections are not open: use them inside `async with`")
        request = self._request(method, path, body, headers, call)
        await self._take(slots, call)
        self._in_flight += 1
        try:
            connection = await self._connection(call)
            try:
                reply = Reply(await self._answered(connection, request, call), call.deployment)
                try:
                    yield reply
                finally:
                    await reply.aclose()
            finally:
                await self._give_back(connection)
        finally:
            self._in_flight -= 1
            slots.release()

    async def _answered(self, connection: _Connection, request: httpcore2.Request, call: _Call) -> httpcore2.Response:
        progress = _Progress(call)
        request.extensions["trace"] = progress
        try:
            with progress.scope as scope:
                try:
                    return await connection.handle_async_request(request)
                except _failures() as error:
                    way = "by way of the proxy: " if self._is_proxied() and progress.phase == "connect" else ""
                    raise _failed(way + _told(error), progress.phase, call.deployment) from error
        finally:
            await progress.aclose()
        raise call.late(scope, progress.phase, f"no connection within {call.connect:g} s (timeouts.connect)")

    def _is_proxied(self) -> bool:
        return self._way is not None and self._way.proxy is not None

    # --- the pool ---------------------------------------------------------------------------------------------------

    async def _take(self, slots: anyio.Semaphore, call: _Call) -> None:
        try:
            slots.acquire_nowait()
        except anyio.WouldBlock:
            with call.scope() as scope:
                await slots.acquire()
                return
            raise call.late(scope, "pool", f"all {self.limit} connections were taken for {call.connect:g} s") from None

    async def _connection(self, call: _Call) -> _Connection:
        """Return the warmest kept connection that is still good, or a new one."""
        while self._idle:
            kept = self._idle.pop()
            if not kept.has_expired():
                return kept
            await _close(kept)
        try:
            if self._way is None:
                self._way = _way_to(self.base_url)
            return self._way.open()
        except _unusable() as error:
            raise _failed(str(error), "connect", call.deployment) from error

    async def _give_back(self, connection: _Connection) -> None:
        if self._slots is None or not connection.is_idle() or connection.has_expired():
            await _close(connection)
            return
        self._idle.append(connection)
        now = anyio.current_time()
        if now - self._swept_at >= SWEEP_SECONDS:
            self._swept_at = now
            while self._idle and self._idle[0].has_expired():
                await _close(self._idle.pop(0))

    # --- what is sent -----------------------------------------------------------------------------------------------

    def _request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], call: _Call
    ) -> httpcore2.Request:
        import httpcore2

        try:
            address = self._address(path)
        except _unusable() as error:
            raise _failed(str(error), "connect", call.deployment) from error
        named = {**_HEADERS, **address.headers, **{name.lower(): value for name, value in headers.items()}}
        if body is not None:
            named["content-length"] = str(len(body))
        return httpcore2.Request(method, address.url, headers=_encoded(named), content=body)

    def _address(self, path: str) -> _Address:
        """Return where ``path`` is; there are but a few, and each takes as long to read as a request to send."""
        if path not in self._urls:
            self._urls[path] = _address_of(joined(self.base_url, path))
        return self._urls[path]


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


# --- the way to a server --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Address:
    """A URL in the library's form, and the headers that follow from it."""

    url: httpcore2.URL
    headers: Mapping[str, str]


def _address_of(url: str) -> _Address:
    """Read a URL; httpx2 knows how hosts and paths are encoded."""
    import httpcore2
    import httpx2

    read = httpx2.URL(url)
    target = httpcore2.URL(scheme=read.raw_scheme, host=read.raw_host, port=read.port, target=read.raw_path)
    return _Address(target, {"host": read.netloc.decode("ascii"), **_credentials(read)})


@dataclass(frozen=True)
class _Way:
    """Where connections go, whom TLS trusts on the way, and the proxy on it."""

    origin: httpcore2.Origin
    tls: ssl.SSLContext
    proxy: httpcore2.Proxy | None

    def open(self) -> _Connection:
        """Return a connection that connects at its first use; by way of a proxy it is one of the library's pools."""
        import httpcore2

        if self.proxy is not None:
            return _Proxied(
                httpcore2.AsyncHTTPProxy(
                    proxy_url=self.proxy.url,
                    proxy_auth=self.proxy.auth,
                    proxy_ssl_context=self.proxy.ssl_context,
                    ssl_context=self.tls,
                    max_connections=1,
                    keepalive_expiry=KEPT_SECONDS,
                )
            )
        return httpcore2.AsyncHTTPConnection(self.origin, ssl_context=self.tls, keepalive_expiry=KEPT_SECONDS)


def _way_to(base_url: str) -> _Way:
    """Return the way to a server.

    Trust is what the system trusts, or what ``SSL_CERT_FILE`` or ``SSL_CERT_DIR`` name. To load it takes about 20 ms,
    so where there is no TLS it is left out: such a context trusts nobody.
    """
    import ssl

    import httpcore2
    import httpx2

    proxy = proxy_for(base_url)
    secure = [url for url in (base_url, proxy) if url and parsed(url).scheme == "https"]
    tls = httpx2.create_ssl_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    through: httpcore2.Proxy | None = None
    if proxy:
        read = httpx2.Proxy(proxy)
        auth = None if read.raw_auth is None else read.raw_auth
        through = httpcore2.Proxy(str(read.url), auth=auth, ssl_context=tls if proxy in secure else None)
    return _Way(_address_of(joined(base_url, "")).url.origin, tls, through)


class _Proxied:
    """A pool of one connection by way of a proxy, as a connection."""

    def __init__(self, pool: httpcore2.AsyncHTTPProxy) -> None:
        self._pool = pool

    async def handle_async_request(self, request: httpcore2.Request) -> httpcore2.Response:
        """Send a request."""
        return await self._pool.handle_async_request(request)

    def has_expired(self) -> bool:
        """Whether it cannot be used again; the pool replaces one that was closed by itself."""
        return False

    def is_idle(self) -> bool:
        """Whether it may be kept."""
        return True

    async def aclose(self) -> None:
        """Close it."""
        await self._pool.aclose()


class _Connection(Protocol):
    """What is asked of a connection."""

    async def handle_async_request(self, request: httpcore2.Request) -> httpcore2.Response:
        """Send a request, and return the answer once its head is there."""
        ...

    def has_expired(self) -> bool:
        """Whether the server has closed it, or it was kept too long."""
        ...

    def is_idle(self) -> bool:
        """Whether the last answer was read to its end, so that it may be used again."""
        ...

    async def aclose(self) -> None:
        """Close it."""
        ...


async def _close(connection: _Connection) -> None:
    with anyio.CancelScope(shield=True):
        await connection.aclose()


def _credentials(url: httpx2.URL) -> Mapping[str, str]:
    """Return what the user and password of a URL become."""
    if not url.userinfo:
        return {}
    told = base64.b64encode(f"{url.username}:{url.password}".encode()).decode()
    return {"authorization": f"Basic {told}"}


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Return headers as bytes. What HTTP cannot carry is named by its header only: the value may be a key."""
    for name, value in headers.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{name!r} cannot be the name of a header")
        if _FORBIDDEN.search(value) or value != value.strip():
            text = f"the header '{name}' cannot be sent: its value has line breaks, control characters or outer spaces"
            raise ConfigError(text)
    return [(name.encode(), value.encode()) for name, value in headers.items()]


# --- failures -------------------------------------------------------------------------------------------------------


def _failures() -> tuple[type[Exception], ...]:
    """Return what the library raises when a connection fails; TLS and host names have errors of their own."""
    import httpcore2
    import httpx2

    core = (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError, httpcore2.ProxyError)
    return (
        *core,
        httpcore2.UnsupportedProtocol,
        httpcore2.ConnectionNotAvailable,
        httpx2.HTTPError,
        OSError,
        UnicodeError,
    )


def _unusable() -> tuple[type[Exception], ...]:
    """Return what is raised for addresses, proxies, certificate files and headers that cannot be used."""
    import httpx2

    return ConfigError, httpx2.InvalidURL, OSError


def _failed(text: str, phase: Phase, deployment: str) -> Transport:
    sent = "" if phase in ("pool", "connect") else "; the call may have been billed"
    whole = f"the connection to {deployment} failed ({phase}): {text}{sent}"
    return Transport(whole, phase=phase, deployment=deployment)


def _told(error: BaseException) -> str:
    """Say what happened in the words of the system, where it said something: those of the layers above are vague."""
    for cause in _causes(error):
        if isinstance(cause, ConnectionError) and cause.errno:
            return os.strerror(cause.errno)  # asyncio puts a text of its own in its place
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return str(error) or type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Give an error and what it came from: its cause, or what it was made of."""
    following: BaseException | None = error
    while following is not None:
        yield following
        parts = following.exceptions if isinstance(following, BaseExceptionGroup) else following.args
        following = following.__cause__ or next((part for part in parts if isinstance(part, BaseException)), None)
