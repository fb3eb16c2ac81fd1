"""The front door: the proxies of all sandboxes of a process, and the relays to them.

    async with Egress.open(on_decision=record) as egress:
        async with DockerHost.open(relay_for=egress.relay_for) as host: ...

A sandbox has no network. What a program in it sends to its proxy comes here as a byte stream and goes on to squid,
which decides (``rules.py``). Sandboxes of equal policies share a squid; it is started at the first connection, started
again when it dies, and ends with the ``Egress``.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
from anyio.abc import ByteStream, TaskGroup

from ridethrough.runtime.errors import SandboxUnavailable
from ridethrough.sandboxes.egress import relay
from ridethrough.sandboxes.egress.audit import Book, Decision, Line, OnDecision
from ridethrough.sandboxes.egress.policy import Policy
from ridethrough.sandboxes.egress.proxies import Proxies
from ridethrough.sandboxes.egress.squid import OURS, Options, Programs, Squid, request
from ridethrough.sandboxes.groups import task_group

if TYPE_CHECKING:
    from ridethrough.sandboxes.profile import SandboxProfile
    from ridethrough.sandboxes.sandbox import Relay

CONNECTIONS: Final = 48
"""Connections that a sandbox may have at once; what is beyond is refused. A browser wants 32."""

KNOWN: Final = 65_536
"""Sandboxes whose connections are told apart; the one that was used longest ago is forgotten."""

FLUSH_SECONDS: Final = 5.0
"""What the end of an ``Egress`` waits for what its proxies still have to say."""


@dataclass(slots=True, eq=False)
class _Tenant:
    """A sandbox. ``number``, from 1, is what its connections are called."""

    number: int
    sandbox_id: str
    connections: int = 0


class Egress:
    """The way out of all sandboxes of this process. ``Egress.open`` makes one."""

    def __init__(self, tasks: TaskGroup, options: Options, book: Book, base: Path | None) -> None:
        """Use ``Egress.open``."""
        self._options = options
        self._book = book
        self._base = base
        self._proxies = Proxies(tasks, options, self._said, self._refused)
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._by_number: dict[int, _Tenant] = {}
        self._last = OURS
        self._marks: dict[str, anyio.Event] = {}

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        *,
        on_decision: OnDecision | None = None,
        binary: str | None = None,
        base: Path | None = None,
        hosts_file: Path | None = None,
        cafile: Path | None = None,
        nameservers: Sequence[str] = (),
        patience: int = 15,
    ) -> AsyncGenerator[Egress]:
        """Nothing is started before the first connection.

        Args:
            on_decision: Told of all that was asked for, let through or not, one after the other.
            binary: The squid to use, instead of the one on the path.
            base: Where relative paths of ``file:PATH`` secrets start.
            hosts_file: Names and addresses that go before DNS; ``/etc/hosts`` when left out.
            cafile: Who vouches for the hosts of ``inject``; the system's authorities when left out.
            nameservers: Addresses of name servers; the system's when left out.
            patience: Seconds that a request, or the greeting in a tunnel, may take to arrive.
        """
        book = Book(on_decision)
        async with book.kept(), task_group() as tasks:
            options = Options(binary, hosts_file, cafile, tuple(nameservers), patience)
            egress = cls(tasks, options, book, base)
            try:
                yield egress
            finally:
                with anyio.move_on_after(FLUSH_SECONDS, shield=True):
                    await egress.flush()
                tasks.cancel_scope.cancel()

    @property
    def dropped(self) -> int:
        """Decisions that ``on_decision`` was not told of: too many were waiting, or it raised."""
        return self._book.dropped

    def relay_for(self, profile: SandboxProfile, sandbox_id: str) -> Relay:
        """What serves the connections of a sandbox: it refuses all of them where the profile has no network.

        Raises:
            ConfigError: the profile's ``network``, ``private_hosts`` or ``inject`` cannot be used.
            SandboxUnavailable: there is no squid.
        """
        policy = Policy.of(profile, self._base)
        if policy.entries:
            Programs.find(self._options.binary)

        async def serve(inside: ByteStream) -> None:
            try:
                await self._serve(policy, sandbox_id, inside)
            finally:
                await relay.close(inside)

        return serve

    async def flush(self) -> None:
        """Wait until ``on_decision`` was told of every connection that has ended by now."""
        for squid in self._proxies.running():
            await self._mark(squid)
        await self._book.flush()

    # --- one connection ---------------------------------------------------------------------------------------------

    async def _serve(self, policy: Policy, sandbox_id: str, inside: ByteStream) -> None:
        tenant = self._tenant(sandbox_id)
        if not policy.entries:
            await self._refuse(tenant, inside, "403 Forbidden", "this sandbox has no network")
        elif tenant.connections >= CONNECTIONS:
            await self._refuse(tenant, inside, "503 Too Many", f"a sandbox may have {CONNECTIONS} connections at once")
        else:
            tenant.connections += 1
            try:
                await self._forward(policy, tenant, inside)
            finally:
                tenant.connections -= 1

    async def _forward(self, policy: Policy, tenant: _Tenant, inside: ByteStream) -> None:
        try:
            async with self._proxies.connection(policy, tenant.number) as proxy:
                await relay.join(inside, proxy)
        except SandboxUnavailable as error:
            await self._refuse(tenant, inside, "503 Service Unavailable", f"the proxy is not available: {error}")

    async def _refuse(self, tenant: _Tenant, inside: ByteStream, status: str, reason: str) -> None:
        self._refused(tenant.number, reason, int(status[:3]))
        await relay.refuse(inside, status, reason)

    def _refused(self, number: int, reason: str, status: int = 0) -> None:
        """Put down what no proxy has logged."""
        if (tenant := self._by_number.get(number)) is not None:
            self._book.add(Decision(tenant.sandbox_id, time.time(), "", "", 0, False, reason, status=status))

    def _tenant(self, sandbox_id: str) -> _Tenant:
        known = self._tenants.get(sandbox_id)
        if known is None:
            self._last = self._last % (2**32 - 1) + 1
            known = self._tenants[sandbox_id] = self._by_number[self._last] = _Tenant(self._last, sandbox_id)
        self._tenants.move_to_end(sandbox_id)
        while len(self._tenants) > KNOWN:
            _, oldest = self._tenants.popitem(last=False)
            del self._by_number[oldest.number]
        return known

    # --- what the proxies say ---------------------------------------------------------------------------------------

    def _said(self, number: int, line: Line) -> None:
        if number == OURS and line.host in self._marks:
            self._marks[line.host].set()
        elif (tenant := self._by_number.get(number)) is not None:
            self._book.add(line.decision(tenant.sandbox_id))

    async def _mark(self, squid: Squid) -> None:
        """Wait until a squid has logged a request of ours, or has ended: what ended before is in its log by then."""
        name = secrets.token_hex(8)
        mark = self._marks[f"{name}.invalid"] = anyio.Event()
        try:
            async with await squid.connect(OURS) as stream:
                await stream.send(request(name))
                await stream.receive()
            with anyio.move_on_after(FLUSH_SECONDS):
                await mark.wait()
        except (OSError, anyio.EndOfStream, anyio.BrokenResourceError):
            return
        finally:
            del self._marks[f"{name}.invalid"]
