"""Streamable HTTP: what the SDK's transport does not bound, and what would end its owner.

The SDK lets a connection that is refused or cut tear down the whole transport, with every other request on it. Here
each failure becomes the JSON-RPC error of its own request, under a code that says how far the request came; and no
body may be longer than the limits.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import anyio
import httpx2

from ridethrough.runtime.router.address import proxy_for
from ridethrough.runtime.router.redaction import redact
from ridethrough.tools.mcp.pipe import MAX_MESSAGE

NOT_SENT: Final = -32_951
"""No connection could be made: the server has not seen the request."""

CUT: Final = -32_952
"""The connection broke after the request was sent: nobody knows what the server did."""

REFUSED: Final = -32_953
"""The server answered with an HTTP error."""

SESSION_GONE: Final = -32_954
"""The server does not know the session any more, and has not looked at the request."""

MAX_STREAM: Final = 8 * MAX_MESSAGE
"""Bytes of one stream of events; one of notifications only is opened again."""

ERROR_KEPT: Final = 2_000


@asynccontextmanager
async def posted(url: str, headers: Mapping[str, str], secrets: Sequence[str], timeout: float) -> AsyncGenerator[Any]:
    """A server's URL as a transport of the SDK; ``secrets`` are kept out of what its errors say."""
    from mcp.client.streamable_http import streamable_http_client

    limits = httpx2.Timeout(timeout, read=None)  # each request has its own deadline
    careful = _Careful(httpx2.AsyncHTTPTransport(proxy=proxy_for(url)), secrets)
    sent = {**headers, "accept-encoding": "identity"}
    async with httpx2.AsyncClient(headers=sent, timeout=limits, transport=careful, trust_env=False) as client:
        async with streamable_http_client(url, http_client=client, max_sse_event_size=MAX_MESSAGE) as streams:
            yield streams


class _Careful(httpx2.AsyncBaseTransport):
    """Turns failures into answers, and cuts bodies that are too long."""

    def __init__(self, inner: httpx2.AsyncBaseTransport, secrets: Sequence[str]) -> None:
        self._inner = inner
        self._secrets = secrets

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        try:
            response = await self._inner.handle_async_request(request)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError) as error:
            return _answer(request, NOT_SENT, f"no connection: {error or type(error).__name__}")
        except httpx2.TransportError as error:
            return _answer(request, CUT, f"the connection broke: {error or type(error).__name__}")
        response.stream = _Bounded(response)
        if response.status_code >= 400:
            return await _explained(request, response, self._secrets)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Bounded(httpx2.AsyncByteStream):
    """A body that raises what the SDK expects of a broken one."""

    def __init__(self, response: httpx2.Response) -> None:
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        self._stream = response.stream
        events = response.headers.get("content-type", "").lower().startswith("text/event-stream")
        self._limit = MAX_STREAM if events else MAX_MESSAGE
        self._packed = response.headers.get("content-encoding", "identity").lower() not in ("", "identity")
        self._arriving = aiter(self._stream)
        self._size = 0

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Itself: what is no generator need not be closed when the SDK stops in the middle."""
        return self

    async def __anext__(self) -> bytes:
        if self._packed:
            raise httpx2.StreamError("the answer is compressed, and was not asked to be")
        try:
            chunk = await anext(self._arriving)
        except httpx2.TransportError as error:
            raise httpx2.StreamError(f"the connection broke: {error or type(error).__name__}") from error
        self._size += len(chunk)
        if self._size > self._limit:
            raise httpx2.StreamError(f"the answer has more than {self._limit >> 20} MiB, which is the limit")
        return chunk

    async def aclose(self) -> None:
        """Close the connection's part, and run what the library has of it to its end: it closes itself only then."""
        with anyio.CancelScope(shield=True):
            await self._stream.aclose()
            with suppress(Exception):
                while await anext(self._arriving, None) is not None:
                    pass


async def _explained(request: httpx2.Request, response: httpx2.Response, secrets: Sequence[str]) -> httpx2.Response:
    """An HTTP error that is no JSON-RPC error as one, with the status and the beginning of the body."""
    try:
        body = await response.aread()
    except httpx2.StreamError as error:
        body = str(error).encode()
    finally:
        await response.aclose()
    gone = response.status_code == 404 and "mcp-session-id" in request.headers
    if _is_jsonrpc(body) and not gone:
        return httpx2.Response(response.status_code, headers=_JSON, content=body, request=request)
    said = redact(body.decode("utf-8", "replace"), secrets)[:ERROR_KEPT].strip()
    text = f"HTTP {response.status_code}{f': {said}' if said else ''}"
    return _answer(request, SESSION_GONE if gone else REFUSED, text, response.status_code)


def _is_jsonrpc(body: bytes) -> bool:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "jsonrpc" in found and "error" in found


_JSON: Final = {"content-type": "application/json"}


def _answer(request: httpx2.Request, code: int, text: str, status: int = 502) -> httpx2.Response:
    body = {"jsonrpc": "2.0", "id": None, "error": {"code": code, "message": text}}
    return httpx2.Response(status, headers=_JSON, content=json.dumps(body).encode(), request=request)
