"""The request itself: secrets put in last, redirects only where it was sent to, bounds on what comes back."""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import anyio

from ridethrough.runtime.errors import Error, ToolFailed, ToolInterrupted
from ridethrough.runtime.router.address import joined, parsed, proxy_for
from ridethrough.runtime.router.redaction import redact
from ridethrough.tools.context import ToolContext
from ridethrough.tools.foreign import SHOWN
from ridethrough.tools.headers import resolved_headers, resolved_text, secrets_of
from ridethrough.tools.openapi.operation import EFFECTS, Operation, Request
from ridethrough.tools.openapi.wording import encoded
from ridethrough.tools.output import LARGEST_IMAGE, Image
from ridethrough.tools.tool import Effect

if TYPE_CHECKING:
    import ssl

    import httpx2

MAX_ANSWER: Final = 8 * 1024 * 1024
"""Bytes of an answer; a longer one is an error."""

ERROR_KEPT: Final = 2_000
"""Characters of an error's body that a model is told."""

REDIRECTS: Final = 5
SHORTEST_SECRET: Final = 6


@dataclass(frozen=True)
class Api:
    """Where requests go, and what is configured for them; secrets are references until a request is made."""

    base_url: str
    headers: Mapping[str, str]
    query: Mapping[str, str]
    idempotency_header: str | None


@dataclass(frozen=True)
class Sending:
    """How one operation is called."""

    api: Api
    operation: Operation
    effect: Effect
    timeout: float

    async def perform(self, arguments: dict[str, Any], ctx: ToolContext[Any] | None) -> Any:
        """Send the request; the answer as data where it is JSON, else as text.

        Raises:
            ToolFailed: it could not be sent, or the server refused it, with the beginning of what it said.
            ToolInterrupted: it is a write, and nobody knows what the server did.
            TimeoutError: there was no answer in time.
            ConfigError: a secret cannot be read.
        """
        request = self.operation.request(arguments)
        headers = {**request.headers, **self._key(ctx), **resolved_headers(self.api.headers)}
        secrets = [*secrets_of(self.api.headers), *secrets_of(self.api.query)]
        with anyio.move_on_after(self.timeout):
            return await self._sent(request, headers, secrets)
        raise TimeoutError(f"{self.operation.name} did not answer within {self.timeout:g} s")

    def _key(self, ctx: ToolContext[Any] | None) -> dict[str, str]:
        """What lets the server recognise a repeat, where HTTP itself does not promise that it is harmless."""
        if self.api.idempotency_header is None or self.operation.method in EFFECTS:
            return {}
        return {self.api.idempotency_header: str(uuid.uuid4()) if ctx is None else ctx.idempotency_key}

    async def _sent(self, request: Request, headers: dict[str, str], secrets: list[str]) -> Any:
        import httpx2

        try:
            async with _client(self.api.base_url, self.timeout) as client:
                return await self._answer(client, self._built(client, request, headers), secrets)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            raise ToolFailed(self._told("no connection to the server", error, secrets)) from None
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise self._unknown(self._told("the connection broke", error, secrets)) from None

    def _told(self, what: str, error: Exception, secrets: list[str]) -> str:
        return f"{self.operation.name}: {what}: {redact(str(error), secrets) or type(error).__name__}"

    def _unknown(self, text: str) -> Error:
        if self.effect != "write":
            return ToolFailed(text)
        return ToolInterrupted(f"{text}. It may or may not have taken effect; find out before you repeat it.")

    def _built(self, client: httpx2.AsyncClient, request: Request, headers: dict[str, str]) -> httpx2.Request:
        configured = (f"{encoded(name)}={encoded(resolved_text(value))}" for name, value in self.api.query.items())
        query = "&".join(filter(None, (request.query, *configured)))
        url = joined(self.api.base_url, f"{request.path}?{query}" if query else request.path)
        return client.build_request(request.method, url, headers=headers, content=request.content)

    # --- answers ----------------------------------------------------------------------------------------------------

    async def _answer(self, client: httpx2.AsyncClient, request: httpx2.Request, secrets: list[str]) -> Any:
        for _ in range(REDIRECTS + 1):
            response = await client.send(request, stream=True)
            try:
                if response.next_request is None:
                    return self._read(response, _without(await self._body(response), secrets))
                request = self._followed(request, response.next_request)
            finally:
                await response.aclose()
        raise ToolFailed(f"{self.operation.name}: the server redirected more than {REDIRECTS} times")

    def _followed(self, sent: httpx2.Request, following: httpx2.Request) -> httpx2.Request:
        """The request of a redirect that stays where it was sent: what is configured is for that server alone."""
        if not _same_place(sent.url, following.url):
            raise ToolFailed(
                f"{self.operation.name}: the server redirects to {following.url.host}, another place than it was "
                "configured for; that was not followed"
            )
        if following.method != sent.method:
            raise ToolFailed(f"{self.operation.name}: the server redirects a {sent.method}, which would become a GET")
        return following

    async def _body(self, response: httpx2.Response) -> bytes:
        if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise ToolFailed(f"{self._status(response)}: the answer is compressed, and was not asked to be")
        pieces: list[bytes] = []
        size = 0
        arriving = response.aiter_raw()
        async for piece in arriving:
            pieces.append(piece)
            size += len(piece)
            if size > MAX_ANSWER:
                break
        else:
            return b"".join(pieces)
        await _give_up(response, arriving)
        raise ToolFailed(f"{self._status(response)}: the answer has more than {MAX_ANSWER >> 20} MiB")

    def _status(self, response: httpx2.Response) -> str:
        return f"{self.operation.name}: HTTP {response.status_code}"

    def _read(self, response: httpx2.Response, body: bytes) -> Any:
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if response.status_code >= 400:
            said = body[: 4 * ERROR_KEPT].decode("utf-8", "replace")[:ERROR_KEPT].strip()
            raise ToolFailed(f"{self._status(response)}{f': {said}' if said else ''}")
        if not body:
            return f"HTTP {response.status_code}, without a body"
        if kind == "application/json" or kind.endswith("+json"):
            return _json(body)
        if kind.startswith("text/") or kind in ("application/xml", "application/javascript", ""):
            return body.decode(response.charset_encoding or "utf-8", "replace")
        if kind in SHOWN and len(body) <= LARGEST_IMAGE:
            return Image(data=body, media_type=kind)
        return f"[{kind}, {len(body)} bytes, not shown]"


def _without(body: bytes, secrets: list[str]) -> bytes:
    """A body in which a server has not repeated a secret; what is too short to be one may be anything else."""
    found = [secret for secret in secrets if len(secret) >= SHORTEST_SECRET and secret.encode() in body]
    return redact(body.decode("utf-8", "surrogateescape"), found).encode("utf-8", "surrogateescape") if found else body


async def _give_up(response: httpx2.Response, arriving: AsyncIterator[bytes]) -> None:
    """Close what is still arriving. The library's generators do not close each other, and what is left of them would be
    ended by the garbage collector; so they are run to their end, on the connection that is closed by then."""
    with anyio.CancelScope(shield=True), suppress(Exception):
        await response.aclose()
        async for _ in arriving:
            pass


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")


def _same_place(sent: httpx2.URL, following: httpx2.URL) -> bool:
    if following.userinfo:
        return False
    if (sent.scheme, sent.host, sent.port) == (following.scheme, following.host, following.port):
        return True
    upgraded = (sent.scheme, following.scheme) == ("http", "https") and sent.port is None and following.port is None
    return upgraded and sent.host == following.host


@functools.cache
def _trust() -> ssl.SSLContext:
    """Made once: reading the certificates takes longer than most requests."""
    import httpx2

    return httpx2.create_ssl_context()


def _client(base_url: str, timeout: float) -> httpx2.AsyncClient:
    """A client for one request: it keeps nothing, and belongs to no event loop."""
    import httpx2

    secure: Any = _trust() if parsed(base_url).scheme == "https" else False
    transport = httpx2.AsyncHTTPTransport(verify=secure, proxy=proxy_for(base_url))
    defaults = {"accept": "application/json, text/*;q=0.9, */*;q=0.5", "accept-encoding": "identity"}
    sent = {**defaults, "user-agent": "ridethrough"}
    return httpx2.AsyncClient(transport=transport, headers=sent, timeout=timeout, trust_env=False)
