"""One try of one deployment, an object of its own: what it produced lives and dies with it.

Its deadlines are watched here. The first *output* token counts, not the first byte: a server that sends its headers,
a role chunk and comments at once and then nothing is as silent as one that does not answer.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import anyio

from ridethrough.runtime.config import Model, Price, Timeouts
from ridethrough.runtime.errors import ModelError, Slow, StreamBroken, Transport
from ridethrough.runtime.router.errors import TABLE, Rule, Stalled, classify, request_id
from ridethrough.runtime.router.messages import ModelRequest
from ridethrough.runtime.router.providers.wire import Answer, Rendered, Stream, Wire
from ridethrough.runtime.router.transport import Connections, Deadline, Reply

USAGE_GRACE = 2.0
"""Seconds that a finished stream may take for its usage and its end."""

_DRAIN = 0.05  # seconds to wait for the end of the body after the end of the stream, so that the connection is kept


@dataclass(frozen=True)
class Deployment:
    """One model at one provider, ready to be called."""

    name: str
    provider: str
    model: Model
    wire: Wire
    connections: Connections
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    price: Price | None = None

    @property
    def timeouts(self) -> Timeouts:
        """The deadlines of one attempt."""
        return self.model.timeouts


class Attempt:
    """Runs once; afterwards either ``answer`` is there or an error was raised."""

    def __init__(
        self,
        deployment: Deployment,
        request: ModelRequest,
        *,
        stream: bool,
        headers: Mapping[str, str],
        secrets: Iterable[str] = (),
        until: float = float("inf"),
        table: Iterable[Rule] = TABLE,
    ) -> None:
        """``until`` is the call's own deadline on anyio's clock; ``secrets`` never appear in errors."""
        self.id = uuid.uuid4().hex[:16]
        self.deployment = deployment
        self.answer: Answer | None = None
        self.request_id: str | None = None
        self.rendered: Rendered = deployment.wire.render(request, deployment.model.model, stream=stream)
        self._stream = stream
        self._headers = {**self.rendered.headers, **deployment.headers, **headers}
        self._secrets = tuple(secrets)
        self._until = until
        self._table = tuple(table)
        self._last = self._started = anyio.current_time()

    async def run(self) -> AsyncGenerator[str]:
        """Make the call and yield the answer's text as it comes (all at once without streaming).

        Raises:
            ModelError: By class, as the taxonomy says; its text is free of secrets.
        """
        try:
            async with self._post() as reply:
                self.request_id = request_id(reply.headers)
                if reply.status >= 300:
                    raise await self._refused(reply)
                if _is_stream(reply, self._stream):
                    async with aclosing(self._read_stream(reply)) as texts:
                        async for text in texts:
                            yield text
                else:
                    yield await self._read_whole(reply)
        except ModelError as error:
            raise self._clean(error) from error.__cause__

    def _post(self) -> Any:
        return self.deployment.connections.post(
            self.rendered.path,
            self.rendered.body,
            self._headers,
            connect=self.deployment.timeouts.connect,
            deadline=self._first_token() if self._stream else self._total(),
            deployment=self.deployment.name,
        )

    async def _refused(self, reply: Reply) -> ModelError:
        body = b""
        with suppress(ModelError):
            body = await reply.body(self._total(), limit=1 << 20)
        return classify(reply.status, _parsed(body), reply.headers, deployment=self.deployment.name, table=self._table)

    async def _read_whole(self, reply: Reply) -> str:
        body = await reply.body(self._total())
        self.answer = self.deployment.wire.parse(body, self.deployment.name)
        return self.answer.message.text

    async def _read_stream(self, reply: Reply) -> AsyncGenerator[str]:
        reader = self.deployment.wire.stream(self.deployment.name)
        while not reader.done and (piece := await self._next(reply, reader)) is not None:
            before = reader.progress
            text = reader.feed(piece)
            if reader.progress != before:
                self._last = anyio.current_time()
            if text:
                yield text
        self.answer = reader.close()
        if reader.done:
            await self._drain(reply)

    async def _next(self, reply: Reply, reader: Stream) -> bytes | None:
        """Return the next piece; silence and cuts before the end are errors, after it they are the end."""
        try:
            return await reply.chunk(self._deadline(reader))
        except (Slow, Transport) as error:
            if reader.finished:
                return None
            if isinstance(error, Transport):
                text = f"the stream of {self.deployment.name} was cut: {error.__cause__ or error}"
                raise StreamBroken(text, deployment=self.deployment.name, status=reply.status) from error
            if error.phase == "idle":
                raise Stalled(error.message, phase="idle", deployment=self.deployment.name) from None
            raise

    async def _drain(self, reply: Reply) -> None:
        with suppress(ModelError):
            while await reply.chunk(Deadline(anyio.current_time() + _DRAIN, "idle")) is not None:
                pass

    def _deadline(self, reader: Stream) -> Deadline:
        if reader.finished:
            return Deadline(anyio.current_time() + USAGE_GRACE, "idle")
        if not reader.progress:
            return self._first_token()
        return _earlier(Deadline(self._last + self.deployment.timeouts.idle, "idle"), self._total())

    def _first_token(self) -> Deadline:
        first = Deadline(self._started + self.deployment.timeouts.first_token, "first_token")
        return _earlier(first, self._total())

    def _total(self) -> Deadline:
        return Deadline(min(self._started + self.deployment.timeouts.total, self._until), "total")

    def _clean(self, error: ModelError) -> ModelError:
        text = error.message
        for secret in self._secrets:
            text = text.replace(secret, "***")
        error.args = (text, *error.args[1:])
        error.deployment = error.deployment or self.deployment.name
        error.request_id = error.request_id or self.request_id
        return error


def _earlier(left: Deadline, right: Deadline) -> Deadline:
    return left if left.at <= right.at else right


def _is_stream(reply: Reply, asked: bool) -> bool:
    """Whether the body is a stream: some servers ignore what was asked for."""
    kind = reply.content_type
    return kind == "text/event-stream" or (asked and not kind.endswith("json") and kind != "text/html")


def _parsed(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body[:2000].decode("utf-8", "replace")
