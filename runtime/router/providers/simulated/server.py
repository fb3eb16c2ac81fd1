"""A provider that is a real HTTP server on loopback, so that everything down to the sockets is exercised.

It speaks four wires at once, keeps count of every request (in memory, and in a file that other processes can read), and
goes wrong on schedule. It is no mock: what works against it works over a network.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import SocketStream

from ridethrough.runtime.config import WireName
from ridethrough.runtime.router.providers.simulated.answers import Reply, changes_draft, reply_to
from ridethrough.runtime.router.providers.simulated.conversation import Conversation, Malformed
from ridethrough.runtime.router.providers.simulated.door import Door
from ridethrough.runtime.router.providers.simulated.draft import Failure, Wire, dump
from ridethrough.runtime.router.providers.simulated.faults import Fault, Schedule
from ridethrough.runtime.router.providers.simulated.http import JSON, Broken, Gone, Http, Received
from ridethrough.runtime.router.providers.simulated.ledger import Ledger
from ridethrough.runtime.router.providers.simulated.scenario import load_script, parse_fault
from ridethrough.runtime.router.providers.simulated.script import Answer, Script, SimRequest
from ridethrough.runtime.router.providers.simulated.sending import Sending, Sent
from ridethrough.runtime.router.providers.simulated.wires import WIRES, wire_of

_REMEMBERED = 512
_LARGEST_REMEMBERED = 32 * 1024
_SHORTEST_WAIT = 0.001


@dataclass(frozen=True)
class Handled:
    """A request that the server saw.

    ``status`` is what it answered, 0 while it has not or when it never will; ``error`` is in a word what was wrong with
    the answer (``rate_limit``, ``cut``, ``client`` when nobody waited for it), ``deployment`` the server's own name.
    """

    number: int
    model: str
    digest: str
    request: SimRequest
    fault: str | None = None
    status: int = 0
    wire: WireName = "openai"
    deployment: str | None = None
    error: str | None = None


@dataclass
class _Known:
    """A request's body that came before, and the answer that was written last."""

    body: dict[str, Any]
    conversation: Conversation
    answer: Answer | None = None
    reply: Reply | None = None


class SimulatedProvider:
    """The server as an async context manager: ``async with SimulatedProvider(script) as sim: sim.base_url``."""

    def __init__(
        self,
        script: Script | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        ledger: Path | str | None = None,
        wire: WireName = "openai",
        name: str | None = None,
        position: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing listens before the context is entered.

        Args:
            script: What it says, and how it fails.
            host: Where it listens.
            port: 0 takes a free one.
            ledger: A file that gets one JSON line when a request starts and one when it ends.
            wire: Whose ``base_url`` is given; it speaks all of them.
            name: The deployment that it is, by which a scenario's faults name it.
            position: Its place in a drill's list, from 1; without either it has all faults.
            clock: Seconds, for the schedule.
        """
        self.script = script or Script()
        self.host = host
        self.wire: WireName = wire
        self.name = name
        self.requests: list[Handled] = []
        self._door = Door(host, port, self._connection, self._closed)
        self.faults = Schedule(
            self.script.faults,
            name=name,
            position=position,
            seed=self.script.seed,
            changed=self._door.look_again,
        )
        self._ledger = Ledger(ledger)
        self._clock = clock
        self._started = clock()
        self._load: dict[str, int] = {}
        self._known: OrderedDict[tuple[str, bytes], _Known] = OrderedDict()
        self._running: AbstractAsyncContextManager[None] | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._door.port

    @property
    def base_url(self) -> str:
        """What a provider's ``base_url`` is set to: with a version for OpenAI's wires, without one for the others."""
        return f"http://{self.host}:{self.port}{WIRES[self.wire].prefix}"

    @property
    def age(self) -> float:
        """Seconds since the server started, or since its clock was set back."""
        return self._clock() - self._started

    def reset_clock(self) -> None:
        """Let the schedule begin now."""
        self._started = self._clock()
        self.look_again()

    def look_again(self) -> None:
        """Ask the schedule anew whether somebody is to listen, as after a jump of the clock."""
        self._door.look_again()

    async def __aenter__(self) -> SimulatedProvider:
        """Listen, and serve in the background.

        Raises:
            ConfigError: The port is taken.
        """
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
        await self._door.open()
        self._started = self._clock()
        async with anyio.create_task_group() as group:
            group.start_soon(self._door.keep, group)
            try:
                yield
            finally:
                group.cancel_scope.cancel()

    def _closed(self) -> tuple[bool, float]:
        """Whether nobody listens, and the seconds until that may change."""
        age = self.age
        shut, until = self.faults.closed(age)
        return shut, max(_SHORTEST_WAIT, until - age)

    # --- connections ------------------------------------------------------------------------------------------------

    async def _connection(self, stream: SocketStream) -> None:
        http = Http(stream)
        with self._door.holding(http):
            try:
                with http.scope:
                    while http.open and (got := await http.request()) is not None:
                        await self._respond(http, got)
            except (Broken, Gone):
                pass
            finally:
                await http.close()

    async def _respond(self, http: Http, got: Received) -> None:
        wire = wire_of(got.target) if got.method == "POST" else None
        if wire is not None:
            await self._answer(http, wire, got)
        elif got.path.startswith("/__"):
            await self._control(http, got)
        elif got.method == "GET" and got.path in ("/v1/models", "/v1beta/models"):
            await http.respond(200, JSON, dump(self._lister(got).models(self.script.models)))
        else:
            refused = WIRES[self.wire].refused(Failure("not_found"))
            await http.respond(refused.status, JSON, dump(refused.body))

    def _lister(self, got: Received) -> Wire:
        """Return the wire in whose form the models are listed: two of them share the path."""
        if got.path == "/v1beta/models":
            return WIRES["gemini"]
        anthropic = "anthropic-version" in got.headers or self.wire == "anthropic"
        return WIRES["anthropic" if anthropic else "openai"]

    async def _control(self, http: Http, got: Received) -> None:
        """``/__faults``: POST adds one or a list, DELETE removes all. ``/__clock``: POST sets it to 0."""
        match got.method, got.path:
            case "POST", "/__faults":
                await self._add_faults(http, got.body)
            case "DELETE", "/__faults":
                self.faults.clear()
                await http.respond(200, JSON, b"{}")
            case "POST", "/__clock":
                self.reset_clock()
                await http.respond(200, JSON, b'{"seconds":0}')
            case "GET", "/__clock":
                await http.respond(200, JSON, dump({"seconds": self.age}))
            case "GET", "/__requests":
                await http.respond(200, JSON, dump([_public(handled) for handled in self.requests]))
            case _:
                await http.respond(404, JSON, dump({"error": {"message": f"there is no {got.method} {got.path}"}}))

    async def _add_faults(self, http: Http, body: bytes) -> None:
        try:
            raw = json.loads(body)
            faults = [parse_fault(fault) for fault in (raw if isinstance(raw, list) else [raw])]
        except (ValueError, TypeError) as error:
            await http.respond(400, JSON, dump({"error": {"message": str(error)}}))
            return
        for fault in faults:
            self.faults.add(fault)
        await http.respond(200, JSON, b"{}")

    # --- answers ----------------------------------------------------------------------------------------------------

    async def _answer(self, http: Http, wire: Wire, got: Received) -> None:
        try:
            known = self._read(wire, got)
        except (Malformed, ValueError, TypeError, AttributeError, KeyError) as error:
            refused = wire.refused(Failure("bad_request", message=f"{error} (simulated)"))
            await http.respond(refused.status, JSON, dump(refused.body))
            return
        number, model = len(self.requests) + 1, known.conversation.model
        request = SimRequest(number, known.body, got.headers, self.age, wire.name, known.conversation)
        load = self._load[model] = self._load.get(model, 0) + 1
        try:
            due = self.faults.pick(model, number, request.seconds, load)
            answer, asked = self.script.answer(request)
            if due.fault is None and asked is not None:
                due = replace(due, fault=asked)
            handled = Handled(number, model, request.digest, request, due.kind, wire=wire.name, deployment=self.name)
            reply = self._reply(known, answer, wire, due.fault)
            await self._send(Sending(http, wire, reply, due, self.script.latency, self.script.per_token), handled)
        finally:
            self._load[model] -= 1

    async def _send(self, sending: Sending, handled: Handled) -> None:
        self._book(handled, "started")
        fault = sending.due.fault
        sent = Sent(0, fault.kind if fault is not None else "closed")
        try:
            sent = await sending.send()
        except Gone:
            sent = Sent(0, "client")
            raise
        finally:
            ended = replace(handled, status=sent.status, error=sent.error)
            self._book(ended, "finished" if sent.status else "broken")

    def _read(self, wire: Wire, got: Received) -> _Known:
        """Return what a request says; one that came before is not read again."""
        key = (got.target, got.body)
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known
        body = json.loads(got.body)
        known = _Known(body, wire.read(body, got.target))
        if len(got.body) <= _LARGEST_REMEMBERED:
            self._known[key] = known
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return known

    def _reply(self, known: _Known, answer: Answer, wire: Wire, fault: Fault | None) -> Reply:
        """Return the answer as bytes; one that was written before is not written again."""
        if changes_draft(fault):
            return reply_to(known.conversation, answer, wire, fault)
        if known.reply is None or known.answer != answer:
            known.answer, known.reply = answer, reply_to(known.conversation, answer, wire)
        return known.reply

    def _book(self, handled: Handled, what: str) -> None:
        if what == "started":
            self.requests.append(handled)
        else:
            self.requests[handled.number - 1] = handled
        if self._ledger.kept:
            self._ledger.write({"event": what, **_public(handled), "at": time.time()})


def _public(handled: Handled) -> dict[str, Any]:
    """Return what the ledger keeps of a request: no credential is among it."""
    headers = handled.request.headers
    labels = {key: value for key, value in headers.items() if key.startswith("x-ridethrough-")}
    return {
        "number": handled.number,
        "model": handled.model,
        "digest": handled.digest,
        "fault": handled.fault,
        "status": handled.status,
        "headers": labels,
        "wire": handled.wire,
        "deployment": handled.deployment,
        "error": handled.error,
    }


# --- standing alone -------------------------------------------------------------------------------------------------


async def serve(
    script: Script,
    host: str = "127.0.0.1",
    port: int = 0,
    ready_callback: Callable[[SimulatedProvider], None] | None = None,
    *,
    ledger: Path | str | None = None,
    wire: WireName = "openai",
    name: str | None = None,
    position: int | None = None,
) -> None:
    """Serve until cancelled; ``ready_callback`` is told when the server listens.

    Raises:
        ConfigError: The port is taken.
    """
    server = SimulatedProvider(script, host=host, port=port, ledger=ledger, wire=wire, name=name, position=position)
    async with server as provider:
        if ready_callback is not None:
            ready_callback(provider)
        await anyio.sleep_forever()


async def run_simulator(
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    scenario: str | None = None,
    ledger: Path | str | None = None,
    wire: WireName = "openai",
    name: str | None = None,
    position: int | None = None,
    on_ready: Callable[[SimulatedProvider], None] | None = None,
) -> None:
    """Serve a scenario until cancelled: ``ridethrough simulate``.

    Args:
        host: Where it listens.
        port: 0 takes a free one.
        scenario: The name of a shipped one, a TOML, JSON or Python file, or ``module:attribute``.
        ledger: A file that gets a line when a request starts and one when it ends.
        wire: Whose ``base_url`` is told.
        name: The deployment that it is: a scenario's faults for others are left out.
        position: Its place in the scenario's list, from 1.
        on_ready: Is told when it listens.

    Raises:
        ConfigError: The scenario cannot be used, or the port is taken.
    """
    script = load_script(scenario) if scenario else Script()
    await serve(script, host, port, on_ready, ledger=ledger, wire=wire, name=name, position=position)
