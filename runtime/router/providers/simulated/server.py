"""A provider that is a real HTTP server on loopback, so that everything down to the sockets is exercised.

It speaks Chat Completions over anyio and h11, keeps count of every request (in memory, and in a file that other
processes can read), and goes wrong on schedule. It is no mock: what works against it works over a network.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import h11
from anyio.abc import SocketAttribute, SocketStream

from ridethrough.runtime.errors import ConfigError
from ridethrough.runtime.router.providers.simulated.answers import Reply, reply_to
from ridethrough.runtime.router.providers.simulated.faults import Fault, Schedule, error_body
from ridethrough.runtime.router.providers.simulated.scenario import load_script, parse_fault
from ridethrough.runtime.router.providers.simulated.script import Script, SimRequest

_JSON = "application/json"


@dataclass(frozen=True)
class Handled:
    """A request that the server saw. ``status`` is what it answered, 0 while it has not or when it never will."""

    number: int
    model: str
    digest: str
    request: SimRequest
    fault: str | None = None
    status: int = 0


class _Broken(Exception):
    """The connection is to be reset."""


class SimulatedProvider:
    """The server as an async context manager: ``async with SimulatedProvider(script) as sim: sim.base_url``."""

    def __init__(
        self, script: Script | None = None, *, host: str = "127.0.0.1", port: int = 0, ledger: Path | str | None = None
    ) -> None:
        """``port`` 0 takes a free one. ``ledger`` gets one JSON line when a request starts and one when it ends."""
        self.script = script or Script()
        self.host = host
        self.port = port
        self.requests: list[Handled] = []
        self.faults = Schedule(self.script.faults)
        self._ledger = _Ledger(ledger)
        self._started = time.monotonic()
        self._running: AbstractAsyncContextManager[None] | None = None

    @property
    def base_url(self) -> str:
        """What a provider's ``base_url`` is set to."""
        return f"http://{self.host}:{self.port}/v1"

    async def __aenter__(self) -> SimulatedProvider:
        """Listen, and serve in the background."""
        self._running = self._serving()
        await self._running.__aenter__()
        return self

    async def __aexit__(self, *exception: Any) -> None:
        """Stop, cutting off what is being answered."""
        running, self._running = self._running, None
        if running is not None:
            await running.__aexit__(*exception)

    @asynccontextmanager
    async def _serving(self) -> AsyncGenerator[None]:
        try:
            listener = await anyio.create_tcp_listener(local_host=self.host, local_port=self.port, backlog=1024)
        except OSError as error:
            where = f"{self.host}:{self.port}"
            raise ConfigError(
                f"the simulated provider cannot listen on {where} ({error}): choose another port"
            ) from None
        self.port = listener.extra(SocketAttribute.local_port)
        self._started = time.monotonic()
        async with listener, anyio.create_task_group() as group:
            group.start_soon(listener.serve, self._connection)
            try:
                yield
            finally:
                group.cancel_scope.cancel()

    # --- connections ------------------------------------------------------------------------------------------------

    async def _connection(self, stream: SocketStream) -> None:
        http = _Http(stream)
        try:
            while await self._request(http):
                pass
        except (_Broken, anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, h11.ProtocolError):
            pass
        finally:
            with anyio.CancelScope(shield=True, deadline=anyio.current_time() + 1):
                await http.close()

    async def _request(self, http: _Http) -> bool:
        """Answer one request; return whether the connection goes on."""
        got = await http.request()
        if got is None:
            return False
        method, path, headers, body = got
        if (method, path) == ("POST", "/v1/chat/completions"):
            await self._chat(http, headers, body)
        elif (method, path) == ("GET", "/v1/models"):
            models = [{"id": name, "object": "model", "owned_by": "simulated"} for name in self.script.models]
            await http.respond(200, _JSON, _dump({"object": "list", "data": models}))
        elif path == "/__faults":
            await self._control(http, method, body)
        elif (method, path) == ("GET", "/__requests"):
            await http.respond(200, _JSON, _dump([_public(handled) for handled in self.requests]))
        else:
            await http.respond(404, _JSON, _dump(error_body(404)))
        return http.next_cycle()

    async def _control(self, http: _Http, method: str, body: bytes) -> None:
        """``POST`` adds a fault or a list of them, ``DELETE`` removes all."""
        if method == "DELETE":
            self.faults.clear()
        else:
            try:
                raw = json.loads(body)
                for fault in raw if isinstance(raw, list) else [raw]:
                    self.faults.add(parse_fault(fault))
            except (ValueError, TypeError) as error:
                await http.respond(400, _JSON, _dump({"error": {"message": str(error)}}))
                return
        await http.respond(200, _JSON, b"{}")

    # --- answers ----------------------------------------------------------------------------------------------------

    async def _chat(self, http: _Http, headers: Mapping[str, str], body: bytes) -> None:
        request = self._parsed(headers, body)
        if request is None:
            await http.respond(400, _JSON, _dump(error_body(400)))
            return
        scheduled = self.faults.pick(request.model, request.number, request.seconds)
        answer, asked = self.script.answer(request)
        fault = scheduled or asked
        self._book(request, fault, 0, "started")
        reply = reply_to(request, answer, latency=self.script.latency, per_token=self.script.per_token)
        status = 0
        try:
            status = await _answer(http, reply, fault)
        finally:
            self._book(request, fault, status, "finished" if status else "broken")

    def _parsed(self, headers: Mapping[str, str], body: bytes) -> SimRequest | None:
        try:
            parsed = json.loads(body)
        except ValueError:
            return None
        if not isinstance(parsed, dict) or not isinstance(parsed.get("messages"), list):
            return None
        return SimRequest(len(self.requests) + 1, parsed, headers, time.monotonic() - self._started)

    def _book(self, request: SimRequest, fault: Fault | None, status: int, what: str) -> None:
        kind = fault.kind if fault else None
        handled = Handled(request.number, request.model, request.digest, request, kind, status)
        if what == "started":
            self.requests.append(handled)
        else:
            self.requests[request.number - 1] = handled
        self._ledger.write({"event": what, **_public(handled), "at": time.time()})


def _public(handled: Handled) -> dict[str, Any]:
    """Return what the ledger keeps of a request: no credential is among it."""
    labels = {key: value for key, value in handled.request.headers.items() if key.startswith("x-ridethrough-")}
    values = {"number": handled.number, "model": handled.model, "digest": handled.digest}
    return {**values, "fault": handled.fault, "status": handled.status, "headers": labels}


async def _answer(http: _Http, reply: Reply, fault: Fault | None) -> int:
    """Send ``reply`` with its fault; return the status that was sent."""
    if fault is not None and (status := await _instead(http, fault)):
        return status
    late = fault.seconds if fault and fault.kind == "slow_first_token" else 0.0
    if not reply.streamed:
        await anyio.sleep(reply.latency + late + reply.per_token * reply.output_tokens)
        if fault and fault.kind in ("cut", "no_finish", "malformed", "error_event", "stall"):
            await _spoil_whole(http, reply, fault)
            return 200
        await http.respond(200, _JSON, reply.whole)
        return 200
    await http.start(200, "text/event-stream")
    await anyio.sleep(reply.latency + late)
    for piece in _batched(reply, _spoiled(reply.chunks, fault)):
        await _send_piece(http, piece, reply.per_token)
    await http.end()
    return 200


async def _instead(http: _Http, fault: Fault) -> int:
    """Do what some faults do in the place of an answer; return the status, 0 when there is to be an answer."""
    match fault.kind:
        case "hang":
            await anyio.sleep(fault.seconds)
            raise _Broken
        case "reset":
            http.reset()
            raise _Broken
        case "status":
            body = error_body(fault.status) if fault.body is None else fault.body
            raw = body.encode() if isinstance(body, str) else _dump(body)
            await http.respond(fault.status, _JSON, raw, fault.headers)
            return fault.status
        case "html":
            await http.respond(200, "text/html", b"<html><body>Bad gateway</body></html>", fault.headers)
            return 200
        case "broken_json":
            await http.respond(200, _JSON, b'{"id": "chatcmpl-1", "choices": [{"mess', fault.headers)
            return 200
        case _:
            return 0


@dataclass(frozen=True)
class _Stop:
    """A place in a stream where something other than bytes happens."""

    seconds: float = 0.0
    broken: bool = False


_Piece = bytes | _Stop


def _spoiled(chunks: list[bytes], fault: Fault | None) -> Iterable[_Piece]:
    """Return a stream's chunks with the fault in its place."""
    if fault is None or fault.kind == "slow_first_token":
        return chunks
    before: list[_Piece] = list(chunks[: fault.after])
    match fault.kind:
        case "cut":
            return [*before, _Stop(broken=True)]
        case "stall":
            return [*before, _Stop(seconds=fault.seconds), *chunks[fault.after :]]
        case "malformed":
            return [*before, b'data: {"id": "chatcmpl-1", "choices": [{"del\n\n', *chunks[fault.after :]]
        case "error_event":
            body = error_body(fault.status) if fault.body is None else fault.body
            return [*before, b"data: " + _dump(body) + b"\n\n"]
        case _:
            return before


def _batched(reply: Reply, pieces: Iterable[_Piece]) -> Iterable[_Piece]:
    """Join chunks that nothing is waited for between: one write instead of a hundred."""
    joined: list[bytes] = []
    for piece in pieces:
        if isinstance(piece, bytes) and not reply.per_token:
            joined.append(piece)
            continue
        if joined:
            yield b"".join(joined)
            joined.clear()
        yield piece
    if joined:
        yield b"".join(joined)


async def _send_piece(http: _Http, piece: _Piece, per_token: float) -> None:
    if isinstance(piece, bytes):
        await http.data(piece)
        if per_token:
            await anyio.sleep(per_token)
    elif piece.broken:
        raise _Broken
    else:
        await anyio.sleep(piece.seconds)


async def _spoil_whole(http: _Http, reply: Reply, fault: Fault) -> None:
    """Do to a whole answer what comes nearest to a stream's fault."""
    if fault.kind == "error_event":
        await http.respond(200, _JSON, _dump(error_body(fault.status) if fault.body is None else fault.body))
        return
    half = reply.whole[: len(reply.whole) // 2]
    if fault.kind == "malformed":
        await http.respond(200, _JSON, half)
        return
    await http.start(200, _JSON)
    await http.data(half)
    if fault.kind == "stall":
        await anyio.sleep(fault.seconds)
    raise _Broken


# --- HTTP -----------------------------------------------------------------------------------------------------------


class _Http:
    """One connection's HTTP/1.1."""

    def __init__(self, stream: SocketStream) -> None:
        self._stream = stream
        self._state = h11.Connection(h11.SERVER)

    async def request(self) -> tuple[str, str, dict[str, str], bytes] | None:
        """Return the next request, ``None`` when the client is gone."""
        body: list[bytes] = []
        head: h11.Request | None = None
        while True:
            event = await self._event()
            if isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in head.headers}
                path = head.target.decode("latin-1").partition("?")[0]
                return head.method.decode("latin-1"), path, headers, b"".join(body)
            else:
                return None

    async def respond(self, status: int, kind: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Send a whole response."""
        extra = [(name.lower(), str(value)) for name, value in (headers or {}).items()]
        pairs = [("content-type", kind), ("content-length", str(len(body))), *extra]
        pieces = [
            self._head(status, pairs),
            self._state.send(h11.Data(data=body)),
            self._state.send(h11.EndOfMessage()),
        ]
        await self._stream.send(b"".join(piece or b"" for piece in pieces))

    async def start(self, status: int, kind: str) -> None:
        """Send the head of a response of unknown length."""
        await self._stream.send(self._head(status, [("content-type", kind), ("transfer-encoding", "chunked")]))

    async def data(self, body: bytes) -> None:
        """Send a piece of the body."""
        await self._stream.send(self._state.send(h11.Data(data=body)) or b"")

    async def end(self) -> None:
        """End the body."""
        await self._stream.send(self._state.send(h11.EndOfMessage()) or b"")

    def next_cycle(self) -> bool:
        """Get ready for the next request; return whether there may be one."""
        if self._state.our_state is not h11.DONE or self._state.their_state is not h11.DONE:
            return False
        self._state.start_next_cycle()
        return True

    def reset(self) -> None:
        """Make closing send a reset instead of an orderly end."""
        raw = self._stream.extra(SocketAttribute.raw_socket)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def close(self) -> None:
        """Close the connection."""
        await self._stream.aclose()

    def _head(self, status: int, headers: list[tuple[str, str]]) -> bytes:
        return self._state.send(h11.Response(status_code=status, headers=headers)) or b""

    async def _event(self) -> Any:
        while (event := self._state.next_event()) is h11.NEED_DATA:
            try:
                self._state.receive_data(await self._stream.receive())
            except anyio.EndOfStream:
                self._state.receive_data(b"")
        return event


class _Ledger:
    """An append-only file: one line is one write, so several processes may share it."""

    def __init__(self, path: Path | str | None) -> None:
        self._path = Path(path) if path is not None else None

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        if self._path is None:
            return
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, _dump(line) + b"\n")
        finally:
            os.close(file)


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


# --- standing alone -------------------------------------------------------------------------------------------------


async def serve(
    script: Script,
    host: str = "127.0.0.1",
    port: int = 0,
    ready_callback: Callable[[SimulatedProvider], None] | None = None,
    *,
    ledger: Path | str | None = None,
) -> None:
    """Serve until cancelled; ``ready_callback`` is told when the server listens.

    Raises:
        ConfigError: The port is taken.
    """
    async with SimulatedProvider(script, host=host, port=port, ledger=ledger) as provider:
        if ready_callback is not None:
            ready_callback(provider)
        await anyio.sleep_forever()


async def run_simulator(
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    scenario: str | None = None,
    ledger: Path | str | None = None,
    on_ready: Callable[[SimulatedProvider], None] | None = None,
) -> None:
    """Serve a scenario (TOML, JSON, Python file or ``module:attribute``) until cancelled: ``ridethrough simulate``.

    Raises:
        ConfigError: The scenario cannot be used, or the port is taken.
    """
    script = load_script(scenario) if scenario else Script()
    await serve(script, host, port, on_ready, ledger=ledger)
