"""One try of one deployment, an object of its own: what it produced lives and dies with it.

Its deadlines are watched here. The first *output* token counts, not the first byte: a server that sends its headers,
a role chunk and comments at once and then nothing is as silent as one that does not answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import anyio

from ridethrough.runtime.errors import ModelError, Slow, StreamBroken, Transport
from ridethrough.runtime.router.deployment import Deployment
from ridethrough.runtime.router.errors import TABLE, Rule, Stalled, classify, request_id
from ridethrough.runtime.router.health import Ticket
from ridethrough.runtime.router.messages import ModelRequest
from ridethrough.runtime.router.providers.wire import Answer, Rendered, Stream
from ridethrough.runtime.router.redaction import redact
from ridethrough.runtime.router.transport import Deadline, Reply

USAGE_GRACE = 2.0
"""Seconds that a finished stream may take for its usage and its end."""

RATE_SECONDS = 10.0
"""How long a stream goes on before its rate is judged."""

_DRAIN = 0.05  # seconds to wait for the end of the body after the end of the stream, so that the connection is kept

Said = Callable[["Attempt", str], None]
"""Is told of an attempt's output as it comes; the text is empty where it is reasoning or a tool call."""


class Attempt:
    """Runs once; afterwards either ``answer`` is there or an error was raised."""

    def __init__(
        self,
        deployment: Deployment,
        request: ModelRequest,
        ticket: Ticket,
        *,
        stream: bool,
        headers: Mapping[str, str],
        secrets: Iterable[str] = (),
        until: float = float("inf"),
        table: Iterable[Rule] = TABLE,
        hedged: bool = False,
    ) -> None:
        """``until`` is the call's own deadline on anyio's clock; ``secrets`` never appear in errors."""
        self.id = os.urandom(8).hex()
        self.deployment = deployment
        self.ticket = ticket
        self.answer: Answer | None = None
        self.request_id: str | None = None
        self.reply_headers: Mapping[str, str] = {}
        self.hedged = hedged
        self.number = 1
        """Which attempt of its call it is."""
        self.shown = False
        self.scope = anyio.CancelScope()
        self.rendered: Rendered = deployment.wire.render(request, deployment.model.model, stream=stream)
        self.first_output_at: float | None = None
        self.ended_at: float | None = None
        self.output = 0.0
        """What it has said so far, roughly in tokens."""
        self._stream = stream
        self._headers = {**self.rendered.headers, **headers}
        self._secrets = tuple(secrets)
        self._until = until
        self._table = tuple(table)
        self.heard: Said | None = None
        self._timeouts = deployment.model.timeouts
        self._first_token_seconds = deployment.health.first_token_deadline(ticket.size)
        self._last = self.started = anyio.current_time()

    async def run(self) -> Answer:
        """Make the call; its text is told as it comes (all at once without streaming).

        Raises:
            ModelError: By class, as the taxonomy says; its text is free of secrets.
        """
        try:
            async with self._post() as reply:
                self.request_id = self._redacted(request_id(reply.headers))
                self.reply_headers = reply.headers
                if reply.status >= 300:
                    raise await self._refused(reply)
                if _is_stream(reply, self._stream):
                    self.answer = await self._read_stream(reply)
                else:
                    self.answer = await self._read_whole(reply)
                return self.answer
        except ModelError as error:
            raise self._clean(error) from self._clean_cause(error.__cause__)
        finally:
            self.ended_at = anyio.current_time()

    @property
    def rate(self) -> float | None:
        """The output a second between its first piece and its end; ``None`` for what came in one piece."""
        if self.first_output_at is None or self.ended_at is None or self.ended_at - self.first_output_at < 0.05:
            return None
        return self.output / (self.ended_at - self.first_output_at)

    def _post(self) -> Any:
        return self.deployment.connections.post(
            self.rendered.path,
            self.rendered.body,
            self._headers,
            connect=self._timeouts.connect,
            deadline=self._first_token() if self._stream else self._total(),
            deployment=self.deployment.name,
        )

    async def _refused(self, reply: Reply) -> ModelError:
        body = b""
        with suppress(ModelError):
            body = await reply.body(self._total(), limit=1 << 20)
        told = redact(body.decode("utf-8", "replace"), self._secrets)
        return classify(reply.status, _parsed(told), reply.headers, deployment=self.deployment.name, table=self._table)

    async def _read_whole(self, reply: Reply) -> Answer:
        body = await reply.body(self._total())
        answer = self.deployment.wire.parse(body, self.deployment.name)
        self._progress(answer.message.text)
        return answer

    async def _read_stream(self, reply: Reply) -> Answer:
        reader = self.deployment.wire.stream(self.deployment.name)
        while not reader.done and (piece := await self._next(reply, reader)) is not None:
            before = reader.progress
            text = reader.feed(piece)
            if reader.progress != before:
                self.output += max(reader.progress - before, len(text) / 4)
                self._progress(text)
                self._check_rate()
        answer = reader.close()
        if reader.done:
            await self._drain(reply)
        return answer

    def _progress(self, text: str) -> None:
        self._last = now = anyio.current_time()
        if self.first_output_at is None:
            self.first_output_at = now
            self.deployment.health.progressed(self.ticket, now)
        if self.heard is not None:
            self.heard(self, text)

    def _check_rate(self) -> None:
        """Give up a stream that trickles.

        Raises:
            Slow: It is much slower than this model normally is, or than the configuration puts up with.
        """
        assert self.first_output_at is not None
        seconds = self._last - self.first_output_at
        if seconds < RATE_SECONDS:
            return
        least = self.deployment.health.least_rate()
        if least is not None and self.output / seconds < least:
            text = (
                f"{self.deployment.name} sends about {self.output / seconds:.1f} tokens a second, of which at least "
                f"{least:.1f} are expected: lower timeouts.tokens_per_second if that is normal for it"
            )
            raise Slow(text, phase="rate", deployment=self.deployment.name)

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
        return _earlier(Deadline(self._last + self._timeouts.idle, "idle"), self._total())

    def _first_token(self) -> Deadline:
        return _earlier(Deadline(self.started + self._first_token_seconds, "first_token"), self._total())

    def _total(self) -> Deadline:
        return Deadline(min(self.started + self._timeouts.total, self._until), "total")

    def _clean(self, error: ModelError) -> ModelError:
        """Take secrets out of the message, and out of the provider's code and id, in which it may repeat them."""
        error.args = (redact(error.message, self._secrets), *error.args[1:])
        error.code = self._redacted(error.code)
        error.deployment = error.deployment or self.deployment.name
        error.request_id = self._redacted(error.request_id) or self.request_id
        return error

    def _clean_cause(self, cause: BaseException | None) -> BaseException | None:
        """Return the cause, unless it holds what a server said with a secret in it."""
        told = f"{cause!r} {vars(cause)}" if cause is not None else ""
        return cause if redact(told, self._secrets) == told else None

    def _redacted(self, text: str | None) -> str | None:
        return redact(text, self._secrets) if text else text


def _earlier(left: Deadline, right: Deadline) -> Deadline:
    return left if left.at <= right.at else right


def _is_stream(reply: Reply, asked: bool) -> bool:
    """Whether the body is a stream: some servers ignore what was asked for."""
    kind = reply.content_type
    return kind == "text/event-stream" or (asked and not kind.endswith("json") and kind != "text/html")


def _parsed(body: str) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body[:2000]
