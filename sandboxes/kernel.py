# ruff: noqa: SIM105, T201
"""A Python that keeps its variables: reads code, runs it, says how it went, reads on.

    standard input    requests: the length of the code in bytes, a newline, the code in UTF-8
    descriptor 3      answers: a line of JSON, {"code": 0} or {"code": 1}; {"code": N, "end": true} when it ends itself

Like the prompt it prints the value of a last expression. What the code prints is there before the answer is. An
exception is printed to standard error with the frames of the code alone; ``SystemExit`` ends the session.

The code may do as it likes with its standard streams, close them, put others in their place: what the session needs
are copies of its own, out of the way, and with every request the streams are what they were. Its standard input is
empty.

Started as ``python3 -c``, from Python 3.8 on, with the standard library alone.
"""

from __future__ import annotations

import ast
import builtins
import fcntl
import io
import json
import os
import signal
import sys
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO

AWAY = 200
"""Descriptors of the session's own are at least this."""


def moved_away(fd: int) -> int:
    """A copy of a descriptor that no child inherits, and that is not in the way."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, AWAY)


class Streams:
    """Standard input, output and error as every request finds them."""

    def __init__(self) -> None:
        self.first = sys.stdin, sys.stdout, sys.stderr  # they close their descriptors when nobody has them any more
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self.copies = [moved_away(null), moved_away(1), moved_away(2)]
        os.close(null)
        self.input, self.out, self.err = opened_input(), opened(1), opened(2)
        self.restore()

    def restore(self) -> None:
        """Make them what they were: the descriptors, and the objects."""
        for fd, copy in enumerate(self.copies):
            os.dup2(copy, fd)
        self.input = opened_input() if self.input.closed else self.input
        self.out = opened(1) if self.out.closed else self.out
        self.err = opened(2) if self.err.closed else self.err
        sys.stdin, sys.stdout, sys.stderr = self.input, self.out, self.err
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = self.input, self.out, self.err  # type: ignore[misc]

    def flush(self) -> None:
        """Have everything written that was printed."""
        for stream in (getattr(sys, "stdout", None), getattr(sys, "stderr", None), self.out, self.err):
            try:
                stream.flush()  # type: ignore[union-attr]
            except BaseException:
                continue


def opened_input() -> Any:
    """The standard input of the code."""
    return open(0, encoding="utf-8", errors="surrogateescape", closefd=False)


def opened(fd: int) -> Any:
    """A text stream on a descriptor; whatever text there is can be printed to it."""
    return io.TextIOWrapper(
        open(fd, "wb", closefd=False),
        encoding="utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )


class Session:
    """The variables, and how code is run with them."""

    def __init__(self) -> None:
        self.module = types.ModuleType("__main__")
        self.module.__dict__["__builtins__"] = builtins
        self.streams = Streams()
        self.pid = os.getpid()
        self.count = 0
        self.interrupt: Any = signal.default_int_handler
        sys.modules["__main__"] = self.module
        sys.argv = [""]
        if not getattr(sys.flags, "safe_path", False) and sys.path[:1] != [""]:
            sys.path.insert(0, "")

    def run(self, code: str) -> tuple[int, bool]:
        """Run a piece of code: its status, and whether it wants the session to end."""
        self.count += 1
        self.streams.restore()
        error = self.error_of(code, f"<code {self.count}>")
        self.streams.flush()
        self.streams.restore()  # what could not be written to streams that the code has closed is written now
        status = 0 if error is None else exit_status(error) if isinstance(error, SystemExit) else self.failed(error)
        self.streams.flush()
        return status, isinstance(error, SystemExit)

    def error_of(self, code: str, name: str) -> BaseException | None:
        """Run a piece of code: what it has raised, with the code's own frames."""
        try:
            pieces = self.compiled(code, name)
        except BaseException as error:
            return error.with_traceback(None)
        try:
            self.execute(pieces)
        except BaseException as error:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            trace = error.__traceback__  # of this frame and of the next: they are not the code's
            return error.with_traceback(trace and trace.tb_next and trace.tb_next.tb_next)
        return None

    def execute(self, pieces: list[types.CodeType]) -> None:
        """Run code, which can be interrupted; what is around it cannot."""
        signal.signal(signal.SIGINT, self.interrupt)
        try:
            for piece in pieces:
                exec(piece, self.module.__dict__)
        finally:
            self.interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN) or signal.default_int_handler

    def compiled(self, code: str, name: str) -> list[types.CodeType]:
        """The code, with its last expression by itself, so that its value is printed."""
        tree = ast.parse(code, name)
        self.remember(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        pieces = [compile(tree, name, "exec", dont_inherit=True)]
        if last is not None:
            pieces.append(compile(ast.Interactive([last]), name, "single", dont_inherit=True))
        return pieces

    def remember(self, code: str, name: str) -> None:
        """Let tracebacks show the lines, for as long as functions of this code may be called."""
        import linecache

        linecache.cache[name] = (len(code), None, code.splitlines(True), name)

    def failed(self, error: BaseException) -> int:
        """Print an exception; its status."""
        try:
            import traceback

            traceback.print_exception(type(error), error, error.__traceback__)
        except BaseException as other:
            note = f"{type(error).__name__} ({type(other).__name__} when it was printed)\n"
            os.write(2, note.encode("utf-8", "replace"))
        return 1


def exit_status(error: SystemExit) -> int:
    """What the process's status would be; other values than numbers are printed, as Python does."""
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    try:
        print(error.code, file=sys.stderr)
    except Exception:
        pass
    return 1


def request(stream: BinaryIO) -> str | None:
    """The next piece of code; ``None`` at the end."""
    size = stream.readline()
    return stream.read(int(size)).decode("utf-8", "replace") if size else None


def answer(fd: int, fields: dict[str, Any]) -> None:
    """Say how it went."""
    data = json.dumps(fields).encode() + b"\n"
    while data:
        data = data[os.write(fd, data) :]


def serve() -> None:
    """Run what is asked for until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = os.fdopen(moved_away(0), "rb")
    answers = moved_away(3)
    os.close(3)
    session = Session()
    while True:
        code = request(requests)
        if code is None:
            break
        status, over = session.run(code)
        if os.getpid() != session.pid:  # a fork in the code came as far as this: only its parent is the session
            os._exit(status)
        answer(answers, {"code": status, "end": True} if over else {"code": 1 if status else 0})
        if over:
            sys.exit(status)
    session.streams.flush()


if __name__ == "__main__":
    serve()
