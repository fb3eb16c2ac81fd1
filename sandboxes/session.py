"""Interpreters that keep their state: one process in the sandbox, one piece of code after the other.

The code goes in on standard input and its status comes back on a channel of its own (fd 3), so nothing that it prints
can be mistaken for its end. What it prints is whatever comes until then. A piece that runs past its deadline takes its
interpreter with it, and so does one that ends it; the next piece gets a new one, and is told so.
"""

from __future__ import annotations

import json
import shlex
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, Protocol

import anyio

from ridethrough.runtime.errors import SandboxError, SandboxTimeout
from ridethrough.sandboxes.channel import Channel, Exchange
from ridethrough.sandboxes.command import UNLIMITED, Command, check_deadline
from ridethrough.sandboxes.frames import MAX_BODY, kernel_source
from ridethrough.sandboxes.sandbox import DEFAULT_TIMEOUT, KEEP_OUTPUT, OUTPUT_LIMIT, ExecResult, Limit, Output, Session
from ridethrough.sandboxes.sinks import Ends, Feed, result_of

_Ending = Literal["ended", "timeout", "output"]

LIFE_SECONDS: Final = 24 * 3600.0
"""Deadline of an interpreter that is kept."""

_LONGEST_STATUS: Final = 4096
_SHELL: Final = "if command -v bash >/dev/null 2>&1; then exec bash --noprofile --norc; else exec sh; fi"


class Ground(Protocol):
    """What a session needs of its sandbox."""

    id: str
    channel: Channel
    python_argv: tuple[str, ...]

    def command(self, argv: Sequence[str], timeout: float, env: Mapping[str, str] | None, **options: Any) -> Command:
        """A call in its environment."""
        ...

    async def begin(self, command: Command) -> None:
        """Start a call."""
        ...

    async def abandon(self, command: Command) -> None:
        """End a call that nobody waits for."""
        ...

    async def ready(self) -> None:
        """Wait while it is paused."""
        ...


@dataclass(slots=True)
class Interpreter:
    """A process that takes code, with what comes from it."""

    command: Command
    follow: Exchange
    feed: Feed
    control: bytearray

    def status(self, output: Output) -> int | None:
        """The status that a piece of the control channel completes; what is none counts as 1."""
        self.control += output.data
        line, end, rest = self.control.partition(b"\n")
        if not end and len(self.control) <= _LONGEST_STATUS:
            return None
        self.control[:] = rest
        try:
            code = json.loads(line)["code"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return 1
        return code if isinstance(code, int) and -(2**31) <= code < 2**31 else 1


class _Run:
    """One piece of code on its way: what came from it until now."""

    def __init__(self) -> None:
        self.begun = anyio.current_time()
        self.kept = {"stdout": Ends(KEEP_OUTPUT), "stderr": Ends(KEEP_OUTPUT)}
        self.totals = {"stdout": 0, "stderr": 0}

    def take(self, output: Output) -> None:
        if output.stream != "control":
            self.kept[output.stream].add(output.data)
            self.totals[output.stream] += len(output.data)

    @property
    def too_much(self) -> bool:
        return sum(self.totals.values()) > OUTPUT_LIMIT

    def result(self, code: int, limit: Limit | None = None, notice: str | None = None) -> ExecResult:
        out, err = self.kept["stdout"].data(), self.kept["stderr"].data()
        return ExecResult(
            exit_code=code,
            stdout_bytes=out,
            stderr_bytes=f"[{notice}]\n".encode() + err if notice else err,
            truncated=self.kept["stdout"].left_out or self.kept["stderr"].left_out,
            limit=limit,
            seconds=anyio.current_time() - self.begun,
            stdout_total=self.totals["stdout"],
            stderr_total=self.totals["stderr"],
        )


class KeptSession(Session, AbstractAsyncContextManager[Session]):
    """A session on an attached sandbox; what is particular to a language is in its subclasses."""

    name: str

    def __init__(self, sandbox: Ground, env: Mapping[str, str] | None) -> None:
        """``env`` is added to the sandbox's."""
        self._sandbox = sandbox
        self._env = env
        self._lock = anyio.Lock()
        self._interpreter: Interpreter | None = None
        self._lost: str | None = None
        self._closed = False

    async def __aenter__(self) -> Session:
        """Start the interpreter."""
        self._interpreter = await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        await self.aclose()

    @abstractmethod
    def argv(self) -> list[str]:
        """How the interpreter is called."""

    @abstractmethod
    def framed(self, code: str) -> bytes:
        """A piece of code as the interpreter reads it."""

    async def run(self, code: str, *, timeout: float = DEFAULT_TIMEOUT) -> ExecResult:
        """As ``Session.run``."""
        check_deadline(timeout)
        data = self.framed(code)
        async with self._lock:
            await self._sandbox.ready()
            if self._closed:
                raise SandboxError(f"This session of {self.name} was closed; open another one")
            if self._interpreter is None:
                self._interpreter = await self._begin()
            return await self._run(self._interpreter, data, timeout)

    async def aclose(self) -> None:
        """As ``Session.aclose``."""
        self._closed = True
        if self._interpreter is not None:
            await self._end(self._interpreter)

    async def _begin(self) -> Interpreter:
        sandbox = self._sandbox
        command = sandbox.command(
            self.argv(), LIFE_SECONDS, self._env, stdin_open=True, control=True, flow=True, limit=UNLIMITED
        )
        await sandbox.begin(command)
        exchange: Exchange
        feed = Feed(lambda size: sandbox.channel.tell({"n": exchange.n, "took": size}))
        exchange = sandbox.channel.post("follow", {"id": command.id}, sink=feed)
        return Interpreter(command, exchange, feed, bytearray())

    async def _run(self, interpreter: Interpreter, data: bytes, timeout: float) -> ExecResult:
        run = _Run()
        interpreter.feed.idle(False)
        try:
            await self._send(interpreter, data)
            ending = await self._until_over(interpreter, run, timeout)
        except BaseException:
            await self._lose(interpreter, "what it did was cancelled")
            raise
        if isinstance(ending, int):
            interpreter.feed.idle(True)
            return run.result(ending, notice=self._told())
        return await self._without_status(interpreter, run, ending, timeout)

    async def _send(self, interpreter: Interpreter, data: bytes) -> None:
        for begin in range(0, len(data), MAX_BODY):
            fields = {"id": interpreter.command.id, "end": False}
            sent = await self._sandbox.channel.begin("stdin", fields, data[begin : begin + MAX_BODY])
            sent.leave()  # it is written once the interpreter reads it; if it does not, the deadline sees that

    async def _until_over(self, interpreter: Interpreter, run: _Run, timeout: float) -> int | _Ending:
        """Take what comes until the status does, or cannot come any more."""
        feed, patience = interpreter.feed, self._sandbox.channel.patience(timeout)
        while not run.too_much:
            output = feed.taken()
            if output is None and feed.over:
                return "ended"
            if output is None:
                if not await patience.wait(feed.news()):
                    return "timeout"
            elif output.stream != "control":
                run.take(output)
            elif (code := interpreter.status(output)) is not None:
                return code
        return "output"

    async def _without_status(self, interpreter: Interpreter, run: _Run, ending: _Ending, timeout: float) -> ExecResult:
        """What became of code whose interpreter has ended, or has to be, without a status."""
        notice = self._told()
        if ending == "ended":
            await self._lose(interpreter, "the code before had ended it")
            end = result_of(interpreter.follow.result(), b"", b"")
            return run.result(end.exit_code, end.limit, notice)
        await self._lose(interpreter, "a timeout" if ending == "timeout" else "too much output")
        while (output := interpreter.feed.taken()) is not None:
            run.take(output)
        if ending == "output":
            return run.result(137, "output", notice)
        raise SandboxTimeout(
            f"The {self.name} session in sandbox {self._sandbox.id} ran past its deadline of {timeout:g} s and was "
            "ended: its variables are lost, and the next run begins a new one. Give it more time with timeout=",
            run.result(137, None, notice),
        )

    def _told(self) -> str | None:
        """What is to be said of the interpreter before, once."""
        lost, self._lost = self._lost, None
        return lost

    async def _lose(self, interpreter: Interpreter, why: str) -> None:
        self._interpreter = None
        self._lost = f"This is a new {self.name} session: {why}, and all its state is lost"
        await self._end(interpreter)

    async def _end(self, interpreter: Interpreter) -> None:
        """End a process with all that it has started, whoever is cancelled meanwhile."""
        await self._sandbox.abandon(interpreter.command)
        interpreter.follow.leave()


class PythonSession(KeptSession):
    """Python, by ``kernel.py``: lengths and code go in."""

    name = "Python"

    def argv(self) -> list[str]:
        """As ``KeptSession.argv``."""
        return [*self._sandbox.python_argv, "-c", kernel_source()]

    def framed(self, code: str) -> bytes:
        """As ``KeptSession.framed``."""
        data = code.encode("utf-8", "replace")
        return b"%d\n%s" % (len(data), data)


class ShellSession(KeptSession):
    """A shell: bash where there is one. It reads one line after the other, so each piece of code is one word of an
    ``eval``: what cannot be parsed is an error of that ``eval`` and not the end of the shell. The code sees neither the
    lines that follow (its input is empty) nor the channel of its status."""

    name = "shell"

    def argv(self) -> list[str]:
        """As ``KeptSession.argv``."""
        return ["sh", "-c", _SHELL]

    def framed(self, code: str) -> bytes:
        """As ``KeptSession.framed``."""
        if "\0" in code:
            raise SandboxError("Code for a shell cannot have a zero byte in it")
        text = f"command eval {shlex.quote(code + chr(10))} </dev/null 3>&-\nprintf '{{\"code\": %d}}\\n' $? >&3\n"
        return text.encode("utf-8", "replace")
