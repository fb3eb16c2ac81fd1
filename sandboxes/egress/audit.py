"""What was asked of the proxy and what became of it: the proxy's log, read as it is written.

Every field of a line is chosen by what runs in the sandbox, except for the ends: the time, the address that the relay
gave the connection, and what the proxy decided.
"""

from __future__ import annotations

import ipaddress
import logging
import re
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

import anyio

from ridethrough.sandboxes.groups import task_group

LOG_FORMAT: Final = (
    "%ts.%03tu %>a %>p %#rm %#>rd %>rP %Ss %>Hs %>st %<st %#ssl::>sni %ssl::bump_mode %err_code %{reason}note %<a"
)
"""Squid's ``logformat`` of one request; none of its fields can have a space in it."""

REASONS: Final = {
    "name": "not on the list of hosts",
    "port": "not a port of that host",
    "request": "not a request for another machine",
    "never": "leads to a metadata, link-local or reserved address",
    "private": "leads to a private address",
    "sni": "TLS for another name than the one that was connected to",
}
"""What the proxy's rules are called in the log, and in a decision."""

QUEUE: Final = 10_000
"""Decisions that may wait to be told."""

FLUSH_SECONDS: Final = 5.0
"""What the end of a book waits for its reader."""

_LONGEST_TEXT: Final = 255

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decision:
    """One request or connection, and whether it was let through.

    Attributes:
        sandbox_id: Who asked.
        at: When it was over, in seconds since 1970.
        method: ``CONNECT`` for a tunnel, ``GET`` and so on in plain; empty for what was no request.
        host: The name that was asked for, in lower case; empty if none was.
        port: 0 if none was.
        allowed: Whether it was let through; whether the other side answered is ``status``.
        reason: Why it was refused or why it failed; empty when all went well.
        bytes_in: What came to the sandbox.
        bytes_out: What the sandbox sent.
        status: Of the answer that the sandbox saw, 0 if it saw none.
    """

    sandbox_id: str
    at: float
    method: str
    host: str
    port: int
    allowed: bool
    reason: str = ""
    bytes_in: int = 0
    bytes_out: int = 0
    status: int = 0


OnDecision = Callable[[Decision], Awaitable[None] | None]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the proxy's log."""

    at: float
    client: int
    client_port: int
    method: str
    host: str
    port: int
    tag: str
    status: int
    received: int
    sent: int
    sni: str
    mode: str
    error: str
    rule: str
    server: str

    @classmethod
    def parse(cls, text: str) -> Line | None:
        """Read a line; ``None`` if it is none of ours."""
        fields = ["" if field == "-" else unquote(field) for field in text.split(" ")]
        if len(fields) != 15:
            return None
        try:
            return cls(
                float(fields[0]),
                int(ipaddress.ip_address(fields[1])),
                int(fields[2]),
                _shown(fields[3]),
                _shown(fields[4]).lower(),
                int(fields[5] or 0),
                fields[6],
                int(fields[7] or 0),
                int(fields[8] or 0),
                int(fields[9] or 0),
                *map(_shown, fields[10:]),
            )
        except ValueError:
            return None

    @property
    def is_prelude(self) -> bool:
        """Whether it only says that a tunnel's first bytes were looked at: another line follows at its end."""
        return self.mode == "splice" and self.tag == "NONE_NONE" and self.status == 200

    def decision(self, sandbox_id: str) -> Decision:
        """What it says."""
        reason = self._refused()
        return Decision(
            sandbox_id,
            self.at,
            self.method,
            self.host,
            self.port,
            not reason,
            reason or self._failed(),
            bytes_in=self.sent,
            bytes_out=self.received,
            status=self._status(),
        )

    def _refused(self) -> str:
        if self.rule:
            return REASONS.get(self.rule, self.rule)
        if self.mode == "terminate":
            return f"{REASONS['sni']}: {self.sni}"
        if self.tag.startswith("TCP_DENIED"):
            return "refused by the proxy"
        return self._unread()

    def _unread(self) -> str:
        if self.mode == "peek":
            return "no TLS in the tunnel" if self.error != "ERR_CLIENT_GONE" else "left before the tunnel was used"
        if self.tag.startswith("NONE_NONE") and self.mode != "splice":
            return (
                _NOTHING.get(self.error, "no request that can be understood") if self.received else "nothing was asked"
            )
        return ""

    def _failed(self) -> str:
        error = self.error.rpartition(":")[2].removeprefix("ERR_").replace("_", " ").lower()
        if error == "read error" and not self.server:
            return "its address could not be found"
        return error or (f"the other side could not be reached, status {self.status}" if self._is_cut() else "")

    def _is_cut(self) -> bool:
        return self.method == "CONNECT" and self.tag == "NONE_NONE" and self.status >= 500

    def _status(self) -> int:
        if self.method != "CONNECT":
            return self.status
        return 403 if self.status == 407 else self.status if self._is_cut() else 200


_NOTHING: Final = {
    "ERR_REQUEST_PARSE_TIMEOUT": "the request was not finished in time",
    "ERR_REQUEST_START_TIMEOUT": "the request was not begun in time",
}


def _shown(text: str) -> str:
    return re.sub(r"[^\x20-\x7e]", "?", text)[:_LONGEST_TEXT]


class Book:
    """Hands decisions on, one after the other; those who make them never wait.

    Attributes:
        dropped: Decisions that nobody was told of: too many were waiting, or the function raised.
    """

    def __init__(self, on_decision: OnDecision | None) -> None:
        """``on_decision`` is told by ``deliver``."""
        self.dropped = 0
        self._on_decision = on_decision
        self._waiting: deque[Decision] = deque()
        self._came = anyio.Event()
        self._told = anyio.Event()

    def add(self, decision: Decision) -> None:
        """Put a decision in the queue, or count it when that is full."""
        if len(self._waiting) >= QUEUE:
            self.dropped += 1
            return
        self._waiting.append(decision)
        self._came.set()

    async def deliver(self) -> None:
        """Tell of each, until cancelled."""
        while True:
            await self._came.wait()
            self._came = anyio.Event()
            while self._waiting:
                await self._tell(self._waiting[0])
                self._waiting.popleft()
            self._told.set()
            self._told = anyio.Event()

    async def _tell(self, decision: Decision) -> None:
        if self._on_decision is None:
            return
        try:
            pending = self._on_decision(decision)
            if pending is not None:
                await pending
        except Exception:
            self.dropped += 1
            _log.exception("a decision of the proxy could not be recorded; it is counted as dropped")

    @asynccontextmanager
    async def kept(self) -> AsyncGenerator[None]:
        """Deliver until the end of the block, and then what is still waiting, if that does not take long."""
        async with task_group() as tasks:
            tasks.start_soon(self.deliver)
            try:
                yield
            finally:
                with anyio.move_on_after(FLUSH_SECONDS, shield=True):
                    await self.flush()
                self.dropped += len(self._waiting)
                tasks.cancel_scope.cancel()

    async def flush(self) -> None:
        """Wait until all that were added have been told."""
        while self._waiting:
            await self._told.wait()
