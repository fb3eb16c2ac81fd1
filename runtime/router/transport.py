"""The one seam around the HTTP client: connections, phases and deadlines, and nothing about any provider.

The client is httpx2's transport, without what its client adds (redirects, cookies, hooks, a second set of timeouts).
Its pool looks at every connection for every request, so the calls are spread over pools of ``SHARD`` each: then a call
costs the same among 200 as among 50. In ms of CPU a call, the server in another process, by calls at once (asyncio,
the best of three runs; on trio it is the same within 0.04):

    =============================================  =====  =====  =====  =====  =====
    client                                             1     25     50    100    200
    =============================================  =====  =====  =====  =====  =====
    httpx2 2.16, its transport, pools of 20: this   0.34   0.48   0.42   0.38   0.40
    httpx2 2.16, its transport, one pool            0.33   0.47   0.47   0.53   0.65
    a client of our own over h11                    0.14   0.19   0.18   0.17   0.16
    =============================================  =====  =====  =====  =====  =====

    Measured before, when the last of those took 0.20 to 0.21:

    =============================================  =====  =====  =====  =====  =====
    httpx2 2.16, its client                         0.40   0.56   0.56   0.71   0.90
    httpx 0.28, its transport, one pool             0.31   0.63   4.87  11.91  17.27
    httpx 0.28, clients of 20 connections           0.53   0.79   0.74   0.74   0.85
    =============================================  =====  =====  =====  =====  =====

Our own was given up although it is the fastest: a library that others keep is worth a quarter of a millisecond. One
pool costs more the more connections it has, httpx's collapses, and a client does what no call here needs.

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
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import anyio

from ridethrough.runtime.errors import ConfigError, Slow, Transport, UsageError
from ridethrough.runtime.router.address import is_loopback, joined, parsed, proxy_for

if TYPE_CHECKING:
    import ssl

    import httpx2

__all__ = ["CONNECTIONS", "Connections", "Deadline", "Reply", "is_loopback", "too_slow"]

CONNECTIONS = 4096
"""Connections to one server at once; what is beyond waits for one, for as long as it may for connecting."""

SHARD = 20
"""Calls at once in one of the library's pools, whose cost grows with the connections it has."""

KEPT_SECONDS = 30.0
"""How long an unused connection is kept."""

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

    def __init__(self, response: httpx2.Response, deployment: str) -> None:
        self.status = response.status_code
        self.headers: Mapping[str, str] = dict(response.headers.items())
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


def _raw(response: httpx2.Response) -> AsyncIterator[bytes]:
    from httpx2 import AsyncByteStream

    assert isinstance(response.stream, AsyncByteStream)
    return aiter(response.stream)


def _decoded(response: httpx2.Response, raw: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Undo the content encodings as the library does, in a second answer that has ``raw`` for its body."""
    from httpx2 import Response

    return Response(response.status_code, headers=response.headers, content=_Unclosed(raw)).aiter_bytes()


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


@dataclass(eq=False)
class _Shard:
    """Some of the connections to a server, and how many calls they carry."""

    http: httpx2.AsyncHTTPTransport
    calls: int = 0
    used_at: float = 0.0


@dataclass
class Connections:
    """All connections to one server. Open it as an async context manager.

    ``base_url`` may have a path and a query, which go before those of each call. Servers elsewhere than on this
    machine are reached through the proxy that the environment names.
    """

    base_url: str
    limit: int = CONNECTIONS
    _slots: anyio.Semaphore | None = field(default=None, repr=False)
    _shards: list[_Shard] = field(default_factory=list[_Shard], repr=False)
    _urls: dict[str, httpx2.URL] = field(default_factory=dict[str, "httpx2.URL"], repr=False)
    _tls: ssl.SSLContext | None = field(default=None, repr=False)
    _proxy: httpx2.Proxy | None = field(default=None, repr=False)

    async def __aenter__(self) -> Connections:
        """Nothing is opened before the first call."""
        self._slots = anyio.Semaphore(self.limit, fast_acquire=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close every kept connection; those of calls under way are closed as the calls end."""
        self._slots = None
        for shard in [shard for shard in self._shards if not shard.calls]:
            await self._close(shard)

    @property
    def in_flight(self) -> int:
        """Calls that are being made now."""
        return sum(shard.calls for shard in self._shards)

    def post(
        self, path: str, body: bytes, headers: Mapping[str, str], *, connect: float, deadline: Deadline, deployment: str
    ) -> AbstractAsyncContextManager[Reply]:
        """Send a request and give its answer once the head is there; ``connect`` is in seconds.

        Raises:
            Transport: With the phase that failed; from ``write`` on the call may be billed.
            Slow: The deadline passed first.
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
        try:
            shard = self._shard(call)
            shard.calls += 1
            try:
                reply = Reply(await self._answered(shard, request, call), call.deployment)
                try:
                    yield reply
                finally:
                    await reply.aclose()
            finally:
                await self._give_back(shard)
        finally:
            slots.release()

    async def _answered(self, shard: _Shard, request: httpx2.Request, call: _Call) -> httpx2.Response:
        progress = _Progress(call)
        request.extensions["trace"] = progress
        try:
            with progress.scope as scope:
                try:
                    return await shard.http.handle_async_request(request)
                except _failures() as error:
                    way = "by way of the proxy: " if self._proxy and progress.phase == "connect" else ""
                    raise _failed(way + _told(error), progress.phase, call.deployment) from error
        finally:
            await progress.aclose()
        raise call.late(scope, progress.phase, f"no connection within {call.connect:g} s (timeouts.connect)")

    # --- the pools --------------------------------------------------------------------------------------------------

    async def _take(self, slots: anyio.Semaphore, call: _Call) -> None:
        try:
            slots.acquire_nowait()
        except anyio.WouldBlock:
            with call.scope() as scope:
                await slots.acquire()
                return
            raise call.late(scope, "pool", f"all {self.limit} connections were taken for {call.connect:g} s") from None

    def _shard(self, call: _Call) -> _Shard:
        """Return the pool with the fewest calls; the first of those, so that the last ones fall idle and are closed."""
        shard = min(self._shards, key=lambda shard: shard.calls, default=None)
        if shard is None or shard.calls >= SHARD:
            try:
                shard = self._new_shard()
            except _unusable() as error:
                raise _failed(str(error), "connect", call.deployment) from error
            self._shards.append(shard)
        return shard

    def _new_shard(self) -> _Shard:
        import httpx2

        if self._tls is None:
            self._tls, self._proxy = _way_to(self.base_url)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=SHARD, keepalive_expiry=KEPT_SECONDS)
        return _Shard(httpx2.AsyncHTTPTransport(verify=self._tls, proxy=self._proxy, limits=limits))

    async def _give_back(self, shard: _Shard) -> None:
        shard.calls -= 1
        shard.used_at = now = anyio.current_time()
        last = shard if self._slots is None else self._shards[-1]
        if not last.calls and (self._slots is None or now - last.used_at > KEPT_SECONDS):
            await self._close(last)

    async def _close(self, shard: _Shard) -> None:
        self._shards.remove(shard)
        with anyio.CancelScope(shield=True):
            await shard.http.aclose()

    # --- what is sent -----------------------------------------------------------------------------------------------

    def _request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], call: _Call
    ) -> httpx2.Request:
        import httpx2

        try:
            url = self._url(path)
            named = {**_HEADERS, **_credentials(url), **{name.lower(): value for name, value in headers.items()}}
            return httpx2.Request(method, url, headers=_encoded(named), content=body)
        except _unusable() as error:
            raise _failed(str(error), "connect", call.deployment) from error

    def _url(self, path: str) -> httpx2.URL:
        """Return where ``path`` is; there are but a few, and each takes as long to read as a request to send."""
        import httpx2

        if path not in self._urls:
            self._urls[path] = httpx2.URL(joined(self.base_url, path))
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


def _way_to(base_url: str) -> tuple[ssl.SSLContext, httpx2.Proxy | None]:
    """Return whom TLS trusts on the way to a server, and the proxy on it.

    Trust is what the system trusts, or what ``SSL_CERT_FILE`` or ``SSL_CERT_DIR`` name. To load it takes about 20 ms,
    so where there is no TLS it is left out: such a context trusts nobody.
    """
    import ssl

    import httpx2

    proxy = proxy_for(base_url)
    secure = [url for url in (base_url, proxy) if url and parsed(url).scheme == "https"]
    tls = httpx2.create_ssl_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return tls, httpx2.Proxy(proxy, ssl_context=tls if proxy in secure else None) if proxy else None


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
    import httpx2

    return httpx2.HTTPError, OSError, UnicodeError


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
