"""Sending an answer, with what goes wrong at the place where it goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ridethrough.runtime.router.providers.simulated.answers import Reply
from ridethrough.runtime.router.providers.simulated.draft import Refused, Wire, dump
from ridethrough.runtime.router.providers.simulated.faults import Due, Fault
from ridethrough.runtime.router.providers.simulated.http import EVENTS, JSON, Broken, Http

_HTML = b"<html><head><title>502 Bad Gateway</title></head><body>Bad gateway</body></html>"
_HALF = b'{"id": "simulated", "choices": [{"mess'


@dataclass(frozen=True)
class Sent:
    """What was sent: the status, and in a word what is wrong with it."""

    status: int
    error: str | None = None


@dataclass(frozen=True)
class _Silence:
    """A place in a stream where nothing comes."""

    seconds: float


@dataclass(frozen=True)
class Sending:
    """One answer on its way; ``latency`` and ``per_token`` are seconds, where the answer itself has none."""

    http: Http
    wire: Wire
    reply: Reply
    due: Due
    latency: float
    per_token: float

    async def send(self) -> Sent:
        """Send the answer, or what there is in its place.

        Raises:
            Broken: The connection is to be closed.
            Gone: The client has closed it.
        """
        if self.due.delay:
            await self.http.pause(self.due.delay)
        if self.due.fault is not None and (sent := await self._instead(self.due.fault)) is not None:
            return sent
        if self.reply.stream is None:
            return await self._send_whole()
        return await self._send_stream()

    # --- times ------------------------------------------------------------------------------------------------------

    @property
    def _first(self) -> float:
        own = self.latency if self.reply.latency is None else self.reply.latency
        return own * self.due.slowdown + self.due.first_token

    @property
    def _between(self) -> float:
        own = self.per_token if self.reply.per_token is None else self.reply.per_token
        return own * self.due.slowdown + self.due.per_token

    # --- in the place of an answer ----------------------------------------------------------------------------------

    async def _instead(self, fault: Fault) -> Sent | None:
        """Do what some faults do in the place of an answer, return ``None`` when there is to be one."""
        match fault.kind:
            case "hang":
                await self.http.pause(fault.lasting)
                raise Broken
            case "reset" | "refuse":
                self.http.reset()
                raise Broken
            case "html":
                await self.http.respond(200, "text/html", _HTML, fault.headers)
            case "broken_json":
                await self.http.respond(200, JSON, _HALF, fault.headers)
            case "content_filter" if fault.status == 200:
                return None
            case "status" | "rate_limit" | "quota" | "auth" | "context_length" | "content_filter" | "capacity":
                return await self._refuse(fault)
            case _:
                return None
        return Sent(200, fault.kind)

    async def _refuse(self, fault: Fault) -> Sent:
        refused = self.wire.refused(fault.failure, model=self.reply.draft.model)
        body = refused.body if fault.body is None else fault.body
        headers = {**refused.headers, **fault.headers}
        if refused.status == 200 and self.reply.stream is not None:
            await self._send_events([self.wire.error_event(body, self.reply.draft, 0)])
        else:
            raw = body.encode() if isinstance(body, str) else dump(body)
            await self.http.respond(refused.status, JSON, raw, headers)
        return Sent(refused.status, fault.failure.what)

    # --- whole ------------------------------------------------------------------------------------------------------

    async def _send_whole(self) -> Sent:
        fault, tokens = self.due.fault, self.reply.draft.tokens.output
        await self.http.pause(self._first + self._between * tokens)
        if fault is not None and fault.kind in ("cut", "stall", "no_finish", "no_terminal", "malformed", "error_event"):
            return await self._send_half(fault)
        await self.http.respond(200, JSON, self.reply.whole)
        return Sent(200, fault.kind if fault is not None else None)

    async def _send_half(self, fault: Fault) -> Sent:
        """Do to a whole answer what comes nearest to a stream's fault."""
        half = self.reply.whole[: len(self.reply.whole) // 2]
        match fault.kind:
            case "error_event":
                await self.http.respond(200, JSON, dump(self._error(fault).body))
            case "malformed" | "no_terminal":
                await self.http.respond(200, JSON, half)
            case _:
                self.http.start(JSON)
                self.http.write(half)
                await self.http.pause(fault.lasting if fault.kind == "stall" else 0.0)
                raise Broken
        return Sent(200, fault.kind)

    # --- streamed ---------------------------------------------------------------------------------------------------

    async def _send_stream(self) -> Sent:
        self.http.start(self._kind)
        if self._first:
            await self.http.pause(self._first)
        for piece in self._pieces():
            await self._send_piece(piece)
        if self.due.fault is not None and self.due.fault.kind == "cut":
            await self.http.flush()
            raise Broken
        await self.http.end()
        return Sent(200, self.due.fault.kind if self.due.fault is not None else None)

    @property
    def _kind(self) -> str:
        return EVENTS if self.reply.draft.framing == "sse" else JSON

    def _pieces(self) -> Iterator[bytes | _Silence]:
        """Yield the stream's events with the fault in its place."""
        stream, fault = self.reply.stream, self.due.fault
        assert stream is not None
        if fault is None:
            yield from stream.events
            return
        events, after = stream.events, fault.after
        match fault.kind:
            case "cut" | "no_finish":
                yield from events[:after]
            case "no_terminal":
                yield from events[: -stream.ending]
            case "error_event":
                yield from events[:after]
                yield self.wire.error_event(self._error(fault).body, self.reply.draft, after)
            case "malformed":
                yield from events[:after]
                yield b'data: {"id": "simulated", "choices": [{"del\n\n'
                yield from events[after:]
            case "stall":
                yield from events[:after]
                yield _Silence(fault.lasting)
                yield from events[after:]
            case _:
                yield from events

    async def _send_piece(self, piece: bytes | _Silence) -> None:
        """Send a piece; those between which nothing is waited for go together."""
        if isinstance(piece, _Silence):
            await self.http.pause(piece.seconds)
            return
        self.http.write(piece)
        if self._between:
            await self.http.pause(self._between)

    async def _send_events(self, events: list[bytes]) -> None:
        self.http.start(self._kind)
        for event in events:
            self.http.write(event)
        await self.http.end()

    def _error(self, fault: Fault) -> Refused:
        refused = self.wire.refused(fault.failure, model=self.reply.draft.model)
        return refused if fault.body is None else Refused(refused.status, fault.body)
