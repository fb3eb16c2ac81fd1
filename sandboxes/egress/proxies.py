"""One squid for each policy that is in use: started when it is needed, started again when it has died."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

import anyio
from anyio.abc import ByteStream, TaskGroup, TaskStatus

from ridethrough.runtime.errors import SandboxUnavailable
from ridethrough.sandboxes.egress.policy import Policy
from ridethrough.sandboxes.egress.relay import close
from ridethrough.sandboxes.egress.squid import STOP_SECONDS, OnLine, Options, Squid, running

PROXIES: Final = 8
"""Policies that may be in use at once, a squid of about 30 MB each; one that nobody uses makes room for another."""

RESTARTS: Final = 5
"""How often a squid is started within ``RESTART_SECONDS``, at most."""

RESTART_SECONDS: Final = 60.0

OnCut = Callable[[int, str], None]


@dataclass(slots=True, eq=False)
class _Proxy:
    """The squid of a policy, whether it runs or not."""

    squid: Squid | None = None
    scope: anyio.CancelScope | None = None
    users: int = 0
    lock: anyio.Lock = field(default_factory=anyio.Lock)
    starts: deque[float] = field(default_factory=lambda: deque[float](maxlen=RESTARTS))
    last_words: str = ""

    def tire(self) -> None:
        """Take note of a start.

        Raises:
            SandboxUnavailable: there were too many of late.
        """
        now = time.monotonic()
        if len(self.starts) == RESTARTS and now - self.starts[0] < RESTART_SECONDS:
            raise SandboxUnavailable(f"the proxy of sandboxes ends again and again: {self.last_words}")
        self.starts.append(now)


class Proxies:
    """All squids of a process. Each has its task in ``tasks``."""

    def __init__(self, tasks: TaskGroup, options: Options, on_line: OnLine, on_cut: OnCut) -> None:
        """``on_line`` is told of every line of every log; ``on_cut`` of each connection that none was written of
        when its squid ended."""
        self._tasks = tasks
        self._options = options
        self._on_line = on_line
        self._on_cut = on_cut
        self._proxies: OrderedDict[Policy, _Proxy] = OrderedDict()

    @asynccontextmanager
    async def connection(self, policy: Policy, number: int) -> AsyncGenerator[ByteStream]:
        """A connection to the squid of a policy, in the name of ``number``.

        Raises:
            SandboxUnavailable: it does not start, or too many others are in use.
        """
        proxy = self._proxies.setdefault(policy, _Proxy())
        self._proxies.move_to_end(policy)
        proxy.users += 1
        try:
            stream = await self._connect(policy, proxy, number)
            try:
                yield stream
            finally:
                await close(stream)
        finally:
            proxy.users -= 1

    async def _connect(self, policy: Policy, proxy: _Proxy, number: int) -> ByteStream:
        """Try twice: a squid that is just dying looks alive."""
        for _ in range(2):
            squid = await self._running(policy, proxy)
            with suppress(OSError):
                return await squid.connect(number)
            with anyio.move_on_after(STOP_SECONDS):
                await squid.process.wait()
        raise SandboxUnavailable("the proxy of sandboxes takes no connections")

    async def _running(self, policy: Policy, proxy: _Proxy) -> Squid:
        async with proxy.lock:
            return proxy.squid if proxy.squid and proxy.squid.alive else await self._start(policy, proxy)

    def running(self) -> Iterator[Squid]:
        """Those that run now."""
        yield from [proxy.squid for proxy in self._proxies.values() if proxy.squid is not None]

    async def _start(self, policy: Policy, proxy: _Proxy) -> Squid:
        self._make_room(proxy)
        proxy.tire()
        squid: Squid = await self._tasks.start(self._tend, policy, proxy)
        return squid

    def _make_room(self, newcomer: _Proxy) -> None:
        """Forget the policy that nobody has used for longest, when there are too many."""
        others = [(policy, each) for policy, each in self._proxies.items() if each is not newcomer]
        if len(others) < PROXIES:
            return
        unused = next(((policy, each) for policy, each in others if not each.users), None)
        if unused is None:
            raise SandboxUnavailable(
                f"{PROXIES} different lists of hosts are in use by sandboxes, and each needs a proxy of its own: "
                "let profiles share a list, or let sandboxes end"
            )
        del self._proxies[unused[0]]
        if unused[1].scope is not None:
            unused[1].scope.cancel()

    async def _tend(self, policy: Policy, proxy: _Proxy, *, task_status: TaskStatus[Squid]) -> None:
        with anyio.CancelScope() as scope:
            async with running(policy, self._options) as squid:
                proxy.squid, proxy.scope = squid, scope
                task_status.started(squid)
                try:
                    await squid.watch(self._on_line)
                finally:
                    proxy.last_words = squid.last_words()
                    self._ended(proxy, squid)

    def _ended(self, proxy: _Proxy, squid: Squid) -> None:
        if proxy.squid is squid:
            proxy.squid = proxy.scope = None
        for number, _ in squid.unlogged:
            self._on_cut(number, "cut off: the proxy has ended")
