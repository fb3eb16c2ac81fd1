"""stdio: a server that is a process, of this machine or inside a sandbox.

The SDK has a transport for this machine. It is not used because it bounds nothing (a line of any length is gathered,
and each that is no JSON is logged with its traceback), keeps no standard error, and knows no sandbox. What is spoken
over the pipe is the SDK's.
"""

from __future__ import annotations

import os
import signal
import subprocess
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel
from anyio.streams.memory import MemoryObjectSendStream

from ridethrough.runtime.errors import SandboxError, ToolFailed

if TYPE_CHECKING:
    from mcp.shared.message import SessionMessage

    from ridethrough.sandboxes.sandbox import Process, Sandbox

MAX_MESSAGE: Final = 8 * 1024 * 1024
"""Bytes of one message; a server that sends a longer one is ended."""

MAX_RUBBISH: Final = 100
"""Lines on standard output that are no messages, after which a server is ended: some greet before they serve."""

STDERR_KEPT: Final = 4096
"""Bytes of standard error that are kept, the last ones, to be told when the server ends."""

BURST: Final = 10_000
"""Messages that a server may send at once; after that, ``BURST`` a second: reading no faster slows it down."""

GRACE_SECONDS: Final = 2.0
"""What a server gets to end by itself once its input has ended, and again after SIGTERM."""

PROCESS_SECONDS: Final = 24 * 3600.0
"""The longest that a server in a sandbox lives; the next call starts another."""

_NAP: Final = 0.005
_PIECE: Final = 64 * 1024
_INHERITED: Final = ("HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "TZ", "USER")


class _Breach(Exception):
    """The server does not keep to the protocol, or to the bounds."""


class Pipe(ABC):
    """A process that is spoken to over its standard input and output."""

    def __init__(self) -> None:
        self._said: deque[bytes] = deque()
        self._kept = 0

    def keep(self, data: bytes) -> None:
        """Keep the end of what it says on standard error."""
        self._said.append(data[-STDERR_KEPT:])
        self._kept += len(self._said[-1])
        while self._kept - len(self._said[0]) >= STDERR_KEPT:
            self._kept -= len(self._said.popleft())

    @property
    def tail(self) -> str:
        """The last that it said on standard error."""
        return b"".join(self._said)[-STDERR_KEPT:].decode("utf-8", "replace").strip()

    @abstractmethod
    def output(self) -> AsyncGenerator[bytes]:
        """What it writes on standard output, until it ends."""

    @abstractmethod
    async def watch(self) -> None:
        """Keep what it says on standard error, if that is not done by ``output``."""

    @abstractmethod
    async def write(self, data: bytes) -> None:
        """Write to its standard input.

        Raises:
            OSError, SandboxError, anyio.BrokenResourceError, anyio.ClosedResourceError: it does not read any more.
        """

    @abstractmethod
    async def aclose(self) -> str:
        """End it, politely first; how it ended, in words."""


# --- a process of this machine --------------------------------------------------------------------------------------


class LocalPipe(Pipe):
    """A child process, in a group of its own that is ended with it.

    The group is signalled by its number, which is the process's. So the process is waited for last, when its group has
    been killed: until then nobody else can be given the number, however long ago the process has ended.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__()
        self._process = process

    @classmethod
    async def open(cls, command: Sequence[str], env: Mapping[str, str], cwd: str | None) -> LocalPipe:
        """Start it, with its own environment and the few variables that every program needs.

        Raises:
            ToolFailed: it cannot be started.
        """
        await anyio.lowlevel.checkpoint()
        inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        try:
            return cls(_started(command, {**inherited, **env}, cwd))
        except (OSError, ValueError) as error:
            raise ToolFailed(f"{command[0]!r} cannot be started: {error}") from None

    async def output(self) -> AsyncGenerator[bytes]:
        async with aclosing(_pieces(self._process.stdout)) as pieces:
            async for piece in pieces:
                yield piece

    async def watch(self) -> None:
        async with aclosing(_pieces(self._process.stderr)) as pieces:
            async for piece in pieces:
                self.keep(piece)

    async def write(self, data: bytes) -> None:
        stdin, left = self._process.stdin, memoryview(data)
        assert stdin is not None
        while left:
            if stdin.closed:
                raise anyio.ClosedResourceError
            await anyio.wait_writable(stdin)
            with suppress(BlockingIOError):
                left = left[os.write(stdin.fileno(), left) :]

    async def aclose(self) -> str:
        process = self._process
        _close(process.stdin)
        by_itself = await self._ends()
        if not by_itself:
            self._signal(signal.SIGTERM)
            await self._ends()
        self._signal(signal.SIGKILL)  # those of its group that stayed behind, too
        await self._ends()
        status = process.poll()
        self._keep_the_rest()
        _close(process.stdout)
        _close(process.stderr)
        return _ending(status) if by_itself else "it was ended"

    async def _ends(self) -> bool:
        """Whether the process ends in time."""
        deadline = anyio.current_time() + GRACE_SECONDS
        while anyio.current_time() < deadline:
            if self._has_ended():
                return True
            await anyio.sleep(_NAP)
        return self._has_ended()

    def _has_ended(self) -> bool:
        """Whether it has ended. It is not waited for, where the system can tell without that."""
        process = self._process
        with suppress(ChildProcessError):  # the program has children waited for by the kernel
            if process.returncode is None and hasattr(os, "waitid"):
                return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        return process.poll() is not None

    def _signal(self, number: signal.Signals) -> None:
        """Signal the group, unless its number may be somebody else's by now."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def _keep_the_rest(self) -> None:
        """Its last words may still be on their way when its end is known."""
        stderr = self._process.stderr
        assert stderr is not None
        with suppress(BlockingIOError):
            self.keep(os.read(stderr.fileno(), _PIECE))


def _started(command: Sequence[str], env: Mapping[str, str], cwd: str | None) -> subprocess.Popen[bytes]:
    """A process whose pipes are read and written without waiting."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        list(command), bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe, cwd=cwd, env=env, start_new_session=True
    )
    for each in (process.stdin, process.stdout, process.stderr):
        assert each is not None
        os.set_blocking(each.fileno(), False)
    return process


async def _pieces(pipe: IO[bytes] | None) -> AsyncGenerator[bytes]:
    """What comes out of a pipe, until it ends or is closed here."""
    assert pipe is not None
    while not pipe.closed:
        try:
            await anyio.wait_readable(pipe)
            piece = os.read(pipe.fileno(), _PIECE)
        except BlockingIOError:
            continue
        except (anyio.ClosedResourceError, OSError):
            return
        if not piece:
            return
        yield piece


def _close(pipe: IO[bytes] | None) -> None:
    """Close a pipe that others may be waiting for."""
    assert pipe is not None
    if not pipe.closed:
        anyio.notify_closing(pipe)
        pipe.close()


def _ending(status: int | None) -> str:
    if status is not None and status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}"


# --- a process in a sandbox -----------------------------------------------------------------------------------------


class SandboxPipe(Pipe):
    """A process inside a sandbox, over the sandbox's own channel."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process
        self._ended = ""

    @classmethod
    async def open(cls, sandbox: Sandbox, command: Sequence[str], env: Mapping[str, str], cwd: str | None) -> Pipe:
        """Start it there.

        Raises:
            ToolFailed: it cannot be started.
        """
        try:
            process = await sandbox.start(command, timeout=PROCESS_SECONDS, stdin=True, flow=True, env=env, cwd=cwd)
        except SandboxError as error:
            raise ToolFailed(f"{command[0]!r} cannot be started in the sandbox: {error}") from error
        return cls(process)

    async def output(self) -> AsyncGenerator[bytes]:
        """What it writes. A sandbox keeps a bounded part of that for a slow reader, and a message with a hole in it may
        look like another one."""
        read, pieces = 0, self._process.output()
        try:
            async for piece in pieces:
                if piece.stream == "stdout":
                    if piece.offset != read:
                        raise _Breach("it wrote more at once than its sandbox keeps for a reader: some of it was lost")
                    read += len(piece.data)
                    yield piece.data
                elif piece.stream == "stderr":
                    self.keep(piece.data)
        except SandboxError as error:
            self._ended = str(error)
        finally:
            if isinstance(pieces, AsyncGenerator):
                await pieces.aclose()

    async def watch(self) -> None:
        """Both streams come by one way."""

    async def write(self, data: bytes) -> None:
        await self._process.write(data)

    async def aclose(self) -> str:
        with anyio.move_on_after(GRACE_SECONDS), suppress(SandboxError):
            with suppress(SandboxError):  # it may have ended already
                await self._process.close_stdin()
            return _result(await self._process.wait())
        with anyio.move_on_after(2 * GRACE_SECONDS), suppress(SandboxError):
            await self._process.kill()
        return self._ended or "it was ended"


def _result(result: Any) -> str:
    limit = f" (the limit of {result.limit} was reached)" if result.limit else ""
    return f"its process ended with status {result.exit_code}{limit}"


# --- messages -------------------------------------------------------------------------------------------------------


@dataclass
class Life:
    """What is known of a server's process: filled in while it lives, told when it has ended."""

    ended: anyio.Event = field(default_factory=anyio.Event)
    complaint: str = ""
    ending: str = ""
    tail: str = ""
    hang_up: Callable[[], None] = lambda: None
    """Lets whoever still writes to it fail: a server that does not read must not hold up its own end."""

    def told(self, reason: str = "") -> str:
        """What became of it, for an error's message; ``reason`` is what others know."""
        ended = self.ending if self.ended.is_set() else ""
        said = f"; the last that it said on standard error:\n{self.tail}" if self.tail else ""
        return f"{self.complaint or ended or reason or 'its connection was closed'}{said}"


@asynccontextmanager
async def spoken(pipe: Pipe, life: Life) -> AsyncGenerator[Any]:
    """The pipe as a transport of the SDK; at the end the process is ended, in bounded time."""
    from mcp.shared.message import SessionMessage

    told, incoming = anyio.create_memory_object_stream["SessionMessage | Exception"](0)
    outgoing, asked = anyio.create_memory_object_stream[SessionMessage](0)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(pipe.watch)
            group.start_soon(_read, pipe, life, told)
            group.start_soon(_write, pipe, asked)
            life.hang_up = asked.close
            try:
                yield incoming, outgoing
            finally:
                incoming.close()
                outgoing.close()
                with anyio.CancelScope(shield=True):
                    life.ending = await pipe.aclose()
                group.cancel_scope.cancel()
    finally:
        for stream in (told, incoming, outgoing, asked):
            stream.close()
        life.tail = pipe.tail


async def _read(pipe: Pipe, life: Life, told: MemoryObjectSendStream[SessionMessage | Exception]) -> None:
    """Hand messages on until the process ends, or breaks the rules; whatever it writes then is thrown away."""
    async with aclosing(pipe.output()) as output:
        try:
            async with told, aclosing(_lines(output)) as lines:
                async for line in lines:
                    await told.send(line)
        except _Breach as breach:
            life.complaint = str(breach)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass  # the session has ended
        life.ended.set()
        with suppress(_Breach):
            async for _ in output:
                pass


async def _lines(output: AsyncIterator[bytes]) -> AsyncGenerator[SessionMessage]:
    """The messages among the lines.

    Raises:
        _Breach: a line is too long, or too many are no messages.
    """
    pace, rubbish, parts, size = _Pace(), 0, list[bytes](), 0
    async for chunk in output:
        *complete, rest = chunk.split(b"\n")
        for end in complete:
            message = _message(b"".join((*parts, end)))
            parts, size = [], 0
            rubbish += message is None
            if rubbish > MAX_RUBBISH:
                raise _Breach("it writes what is no JSON-RPC message on standard output, where only messages belong")
            if message is not None:
                await pace.next()
                yield message
        parts.append(rest)
        size += len(rest)
        if size > MAX_MESSAGE:
            raise _Breach(f"it sent a message of more than {MAX_MESSAGE >> 20} MiB, which is the limit")


def _message(line: bytes) -> SessionMessage | None:
    from mcp.shared.message import SessionMessage
    from mcp_types import jsonrpc_message_adapter

    if len(line) > MAX_MESSAGE:
        raise _Breach(f"it sent a message of more than {MAX_MESSAGE >> 20} MiB, which is the limit")
    try:
        return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValueError:
        return None


class _Pace:
    """Lets ``BURST`` messages pass at once and as many a second, so that a flood costs a bounded part of the loop."""

    def __init__(self) -> None:
        self._left, self._since = BURST, anyio.current_time()

    async def next(self) -> None:
        """Wait until the next message may pass."""
        if self._left == 0:
            await anyio.sleep_until(self._since + 1.0)
            self._left, self._since = BURST, anyio.current_time()
        self._left -= 1


async def _write(pipe: Pipe, asked: Any) -> None:
    with suppress(OSError, SandboxError, anyio.BrokenResourceError, anyio.ClosedResourceError):
        async for message in asked:
            text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
            await pipe.write(text.encode() + b"\n")
