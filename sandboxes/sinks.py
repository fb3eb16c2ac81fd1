"""Where the events of a request go on the host, each within its bound.

Kept      all output of a call that is collected: its supervisor was told how much to keep, more is a breach
Feed      output on its way to a reader: at most a window, then the supervisor waits for the reader
Changes   what a watch has seen and nobody has read yet
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Final, Literal

import anyio

from ridethrough.runtime.errors import SandboxError
from ridethrough.sandboxes.channel import Frame, path_of
from ridethrough.sandboxes.frames import MAX_BODY, WINDOW
from ridethrough.sandboxes.sandbox import Change, ExecResult, Limit, Output, Stream

WAITING_CHANGES: Final = 10_000
"""Changes that nobody has read; a watch that has more ends with an error."""

_PIECES: Final = 4096
_STREAMS: Final[dict[str, Stream]] = {"stdout": "stdout", "stderr": "stderr", "control": "control"}
_LIMITS: Final[dict[str, Limit]] = {"memory": "memory", "pids": "pids", "disk": "disk", "output": "output"}
_KINDS: Final[dict[str, Literal["created", "modified", "removed"]]] = {
    "created": "created",
    "modified": "modified",
    "removed": "removed",
}


def output_of(frame: Frame) -> Output:
    """The output that an event brings."""
    stream = _STREAMS.get(frame.text("stream"))
    if frame.text("event") != "output" or stream is None:
        raise frame.breach("an event of a call must be output of one of its streams")
    return Output(stream, frame.body, frame.number("offset", 0))


class Kept:
    """The kept output of a call, as it is collected."""

    def __init__(self, keep: int) -> None:
        """``keep`` is in bytes, of each stream."""
        self._keep = keep
        self._streams: dict[str, bytearray] = {name: bytearray() for name in _STREAMS}

    def take(self, frame: Frame) -> None:
        """Take a piece of one stream."""
        output = output_of(frame)
        self._add(frame, output.stream, output.data)

    def close(self) -> None:
        """Nothing waits for it."""

    def result(self, frame: Frame) -> ExecResult:
        """What the reply says, with the output: in its body, or in the events before it."""
        if frame.body:
            out = frame.number("out")
            self._add(frame, "stdout", frame.body[:out])
            self._add(frame, "stderr", frame.body[out:])
        return result_of(frame, bytes(self._streams["stdout"]), bytes(self._streams["stderr"]))

    def _add(self, frame: Frame, stream: str, data: bytes) -> None:
        kept = self._streams[stream]
        kept += data
        if len(kept) > self._keep:
            raise frame.breach("a call gives more output than was to be kept")


def result_of(frame: Frame, stdout: bytes, stderr: bytes) -> ExecResult:
    """The fields of a call's end, with its output."""
    limit = None if frame.header.get("limit") is None else _LIMITS.get(frame.text("limit"))
    if limit is None and frame.header.get("limit") is not None:
        raise frame.breach("the limit has an unknown name")
    return ExecResult(
        exit_code=frame.integer("code"),
        stdout_bytes=stdout,
        stderr_bytes=stderr,
        truncated=frame.flag("truncated"),
        limit=limit,
        seconds=frame.seconds("seconds"),
        stdout_total=frame.number("stdout_total", 0),
        stderr_total=frame.number("stderr_total", 0),
    )


class Ends:
    """The first and the last half of a stream's output, for as long as it comes."""

    def __init__(self, keep: int) -> None:
        """``keep`` is in bytes."""
        self._head, self._tail = bytearray(), bytearray()
        self._first, self._last = keep - keep // 2, keep // 2
        self.left_out = False

    def add(self, data: bytes) -> None:
        """Take what came next."""
        room = self._first - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 2 * self._last + MAX_BODY:  # cut now and then, not with every piece
            self._cut()

    def data(self) -> bytes:
        """What is kept."""
        self._cut()
        return bytes(self._head + self._tail)

    def _cut(self) -> None:
        if (beyond := len(self._tail) - self._last) > 0:
            del self._tail[:beyond]
            self.left_out = True


class Feed:
    """Output on its way to one reader, in order; pieces of a stream that follow each other are joined.

    What is read is acknowledged, and what is not yet acknowledged is at most a window: a slow reader slows down the
    command, or (where it does not wait) misses some of it, and never fills the host's memory.
    """

    def __init__(self, took: Callable[[int], None], most: int = 2**62) -> None:
        """``took`` acknowledges bytes; more than ``most`` in all are a breach."""
        self._took = took
        self._rest = most
        self._pieces: deque[tuple[Stream, int, bytearray]] = deque()
        self._size = 0
        self._closed = False
        self._idle = False
        self._came = anyio.Event()

    def take(self, frame: Frame) -> None:
        """Take a piece of one stream."""
        output = output_of(frame)
        self._rest -= len(output.data)
        if self._rest < 0:
            raise frame.breach("a call goes on after its output should have ended it")
        if self._idle:
            self._took(len(output.data))
            return
        self._size += len(output.data)
        if self._size > WINDOW:
            raise frame.breach("a call sends more output than its window")
        self._put(output)
        self._came.set()

    def close(self) -> None:
        """Nothing more comes."""
        self._closed = True
        self._came.set()

    def idle(self, idle: bool) -> None:
        """Let go of what comes while nobody reads (or stop doing so)."""
        self._idle = idle
        if idle:
            while (output := self.taken()) is not None:
                del output

    def taken(self) -> Output | None:
        """The next piece, if one is there."""
        if not self._pieces:
            return None
        stream, offset, data = self._pieces.popleft()
        self._size -= len(data)
        self._took(len(data))
        return Output(stream, bytes(data), offset)

    @property
    def over(self) -> bool:
        """Whether nothing more comes; pieces may still be there."""
        return self._closed

    def news(self) -> anyio.Event:
        """Set when the next piece is there, or nothing more comes."""
        self._came = anyio.Event()
        return self._came

    def _put(self, output: Output) -> None:
        """Join it to the piece before; with very many pieces to the last of its stream: a window of single bytes,
        turn by turn on two streams, would otherwise take a hundred times the memory."""
        for stream, offset, data in islice(reversed(self._pieces), 1 if len(self._pieces) < _PIECES else 3):
            if stream == output.stream and offset + len(data) == output.offset and len(data) < MAX_BODY:
                data += output.data
                return
        self._pieces.append((output.stream, output.offset, bytearray(output.data)))


class Changes:
    """What a watch has seen and nobody has read yet."""

    def __init__(self) -> None:
        self._changes: deque[Change] = deque()
        self._closed = False
        self._came = anyio.Event()
        self._lost = False

    def take(self, frame: Frame) -> None:
        """Take a change."""
        kind = _KINDS.get(frame.text("kind"))
        if frame.text("event") != "change" or kind is None:
            raise frame.breach("an event of a watch must be a change")
        if len(self._changes) < WAITING_CHANGES:
            self._changes.append(Change(kind, path_of(frame.text("path"))))
        else:
            self._lost = True
        self._came.set()

    def close(self) -> None:
        """Nothing more comes."""
        self._closed = True
        self._came.set()

    async def next(self) -> Change | None:
        """The next change, waiting for it; ``None`` when the watch has ended.

        Raises:
            SandboxError: more came than anybody read.
        """
        while not self._changes and not self._closed:
            self._came = anyio.Event()
            await self._came.wait()
        if self._lost:
            raise SandboxError(
                f"More than {WAITING_CHANGES} changes were not read in time; list the folder to see what is there now"
            )
        return self._changes.popleft() if self._changes else None
