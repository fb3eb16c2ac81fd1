"""The one seam around the HTTP client: connections, phases and deadlines, and nothing about any provider.

httpx scans its whole pool at every request, so its cost is quadratic in connections: 1.1 ms of CPU a call at 25 and
16 ms at 100. Hence several clients of 20 connections, of which the least loaded one is taken; another client library
would be put behind this file and nowhere else.

A deadline is a time of ``anyio.current_time()``. It is watched around each single wait, never across a yield, so that
an abandoned stream leaves no cancel scope behind.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio

from ridethrough.runtime.errors import ModelError, Slow, Transport

if TYPE_CHECKING:
    import httpx

CONNECTIONS_PER_CLIENT = 20
CLIENTS_PER_SERVER = 64


@dataclass(frozen=True)
class Deadline:
    """A time on anyio's clock, and the phase that is too slow when it passes."""

    at: float
    phase: str


class Reply:
    """An answer whose head is there; ``headers`` have names in lower case."""

    def __init__(self, response: httpx.Response, deployment: str) -> None:
        self.status = response.status_code
        self.headers: dict[str, str] = {name.lower(): value for name, value in response.headers.items()}
        self._deployment = deployment
        self._response = response
        self._chunks: AsyncIterator[bytes] = response.aiter_bytes()

    async def aclose(self) -> None:
        """Give the connection back, or close it when the body was not read to its end.

        The client's generators are run to their end on the closed connection: left behind, they would be finished by
        the garbage collector, at a time and in a task of its choosing.
        """
        await self._response.aclose()
        with suppress(Exception):
            while await anext(self._chunks, None) is not None:
                pass

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
            with _phases(self._deployment):
                return await anext(self._chunks, None)
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


@dataclass
class _Client:
    http: httpx.AsyncClient
    load: int = 0


@dataclass
class Connections:
    """All connections to one server. Open it as an async context manager."""

    base_url: str
    connect_timeout: float = 5.0
    _clients: list[_Client] = field(default_factory=list["_Client"])
    _tls: ssl.SSLContext | None = None

    async def __aenter__(self) -> Connections:
        """Nothing is opened before the first call."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close every connection."""
        with anyio.CancelScope(shield=True):
            for client in self._clients:
                await client.http.aclose()
        self._clients.clear()

    @property
    def in_flight(self) -> int:
        """Calls that are being made now."""
        return sum(client.load for client in self._clients)

    @asynccontextmanager
    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str], *, connect: float, deadline: Deadline, deployment: str
    ) -> AsyncGenerator[Reply]:
        """Send a request and yield its answer once the head is there; ``connect`` is in seconds.

        Raises:
            Transport: With the phase that failed; from ``write`` on the call may be billed.
            Slow: The deadline passed first.
        """
        client = self._least_loaded()
        client.load += 1
        try:
            response = await self._send(client.http, path, body, headers, connect, deadline, deployment)
            reply = Reply(response, deployment)
            try:
                yield reply
            finally:
                with anyio.CancelScope(shield=True):
                    await reply.aclose()
        finally:
            client.load -= 1

    async def _send(
        self,
        client: httpx.AsyncClient,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        connect: float,
        deadline: Deadline,
        deployment: str,
    ) -> httpx.Response:
        import httpx

        timeout = httpx.Timeout(None, connect=connect, pool=connect)
        request = client.build_request("POST", path, content=body, headers=dict(headers), timeout=timeout)
        with anyio.CancelScope(deadline=deadline.at):
            with _phases(deployment):
                return await client.send(request, stream=True)
        raise too_slow(deployment, deadline.phase)

    def _least_loaded(self) -> _Client:
        best = min(self._clients, key=lambda client: client.load, default=None)
        if best is None or (best.load >= CONNECTIONS_PER_CLIENT and len(self._clients) < CLIENTS_PER_SERVER):
            best = _Client(self._open_client())
            self._clients.append(best)
        return best

    def _open_client(self) -> httpx.AsyncClient:
        import httpx

        if self._tls is None:
            self._tls = _tls_for(self.base_url)
        limits = httpx.Limits(
            max_connections=CONNECTIONS_PER_CLIENT,
            max_keepalive_connections=CONNECTIONS_PER_CLIENT,
            keepalive_expiry=30,
        )
        url = self.base_url.rstrip("/") + "/"
        return httpx.AsyncClient(
            base_url=url, verify=self._tls, limits=limits, timeout=None, trust_env=not is_loopback(url)
        )


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


class _phases:
    """Turns the HTTP client's errors into ``Transport`` with its phase."""

    def __init__(self, deployment: str) -> None:
        self._deployment = deployment

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, ModelError) or not isinstance(error, Exception):
            return
        import httpx

        if isinstance(error, (httpx.TransportError, httpx.StreamError, httpx.InvalidURL, httpx.DecodingError)):
            raise self._translate(error) from error

    def _translate(self, error: Exception) -> Transport:
        phase = _phase_of(error)
        sent = "" if phase in ("pool", "connect") else "; the call may have been billed"
        detail = str(error) or type(error).__name__
        text = f"the connection to {self._deployment} failed ({phase}): {detail}{sent}"
        return Transport(text, phase=phase, deployment=self._deployment)


def _phase_of(error: Exception) -> str:
    import httpx

    if isinstance(error, httpx.PoolTimeout):
        return "pool"
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.ProxyError)):
        return "connect"
    if isinstance(error, httpx.InvalidURL):
        return "connect"
    return "write" if isinstance(error, (httpx.WriteError, httpx.WriteTimeout)) else "read"


def _tls_for(url: str) -> ssl.SSLContext:
    """Return one context for all clients of a server; loading the trust store costs 20 ms, so only where it is used."""
    import httpx

    if urlsplit(url).scheme == "https":
        return httpx.create_ssl_context()
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def is_loopback(url: str) -> bool:
    """Whether ``url`` is on this machine."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
