"""Many requests at once over one stream of bytes to a supervisor that may be hostile.

    callers --begin--> outbox --writer--> stream --reader--> exchanges, sinks, tunnels

One task reads and one writes; callers only put frames into the outbox, without waiting in the middle of one, so that
a cancelled caller never leaves half a frame behind and "end this call" can be said from anywhere, even from a
generator that is being thrown away.

What comes from inside is believed only as far as it is checked. A frame that breaks a rule (an unknown number, a wrong
type, more than was asked for, more than a window) ends the channel, and with it every request that waits, with
``SandboxGone`` and the reason. ``on_stuck`` then removes its sandbox, as it does where a supervisor is stuck: one that
does not answer in time. No wait is without a deadline; what is kept in memory for one request is bounded by its sink.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, Final, Protocol

import anyio
from anyio.abc import ByteStream, TaskGroup

from ridethrough.runtime.errors import SandboxError, SandboxFileNotFound, SandboxGone
from ridethrough.sandboxes.frames import MAX_BODY, PROTOCOL, WINDOW, Breach, Decoder, encode
from ridethrough.sandboxes.sandbox import Relay

ANSWER_SECONDS: Final = 30.0
"""How long a supervisor may take for what needs no command to run."""

REMOVE_SECONDS: Final = 30.0
"""How long the removal of a sandbox may take that is stuck, or broke the protocol."""

TOLD_SECONDS: Final = 5.0
"""How long that is waited for by those who are told of it: where the host hangs, they are told all the same."""

OUTBOX: Final = 4 * MAX_BODY
"""Bytes that wait for the writer; whoever brings more waits for room."""

TUNNELS: Final = 256
"""Connections to the proxy that one sandbox may have open. Many more than the relay serves, which refuses what is
beyond its own number and has that on record; what is refused here is on no record."""

STRAY_BYTES: Final = 4 * 2**20
"""What may still come for a request whose caller has left, before it is a breach."""

LEFT: Final = 4096
"""How many requests whose callers have left may be without an answer."""

_TAIL: Final = 64 * 1024
"""What may come for a connection after its end: what was taken until then."""

_LONGEST_TEXT: Final = 4096
_PIECE: Final = 256 * 1024

_log = logging.getLogger(__name__)


class Stuck(SandboxGone):
    """The supervisor did not answer in time, and its sandbox was removed."""


class NoCall(SandboxError):
    """The supervisor knows no such call."""


class Frame:
    """A frame from inside. Its fields are read with the type that they must have; another one is a breach."""

    __slots__ = ("_channel", "body", "header")

    def __init__(self, header: Mapping[str, Any], body: bytes, channel: Channel) -> None:
        self.header = header
        self.body = body
        self._channel = channel

    def number(self, key: str, default: int | None = None) -> int:
        """Return a whole number from 0 to 2**63."""
        value = self.header.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            raise self.breach(f"{key} must be a whole number")
        return value

    def integer(self, key: str) -> int:
        """Return a whole number of at most 32 bits that may be negative."""
        value = self.header.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not -(2**31) <= value < 2**31:
            raise self.breach(f"{key} must be a number")
        return value

    def seconds(self, key: str) -> float:
        """Return a time or a duration."""
        value = self.header.get(key, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e12 < value < 1e12:
            raise self.breach(f"{key} must be a number of seconds")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return whether something is so; false when it is not said."""
        value = self.header.get(key, False)
        if not isinstance(value, bool):
            raise self.breach(f"{key} must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text of at most 4096 characters."""
        value = self.header.get(key, default)
        if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
            raise self.breach(f"{key} must be a text of at most {_LONGEST_TEXT} characters")
        return value

    def parts(self) -> list[Frame]:
        """Return a list of objects in the body, each to be read like a frame."""
        value = self.json()
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self.breach("its body must be a list of objects")
        return [self.part(each) for each in value]

    def json(self) -> Any:
        """Return the JSON in the body."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise self.breach("its body must be JSON") from None

    def part(self, header: Mapping[str, Any]) -> Frame:
        """Return an object inside of the header, to be read like a frame."""
        return Frame(header, b"", self._channel)

    def breach(self, text: str) -> SandboxGone:
        """End the channel; the error is to be raised."""
        return self._channel.breach(text)


class Sink(Protocol):
    """Takes the events of one request, in the reader's task: it never waits, and keeps no more than it should."""

    def take(self, frame: Frame) -> None:
        """Take an event.

        Raises:
            SandboxGone: it is a breach (``frame.breach``).
        """

    def close(self) -> None:
        """Nothing more comes: the reply is there, or the channel has ended."""


class Exchange:
    """A request on its way, and its reply."""

    __slots__ = ("_answer", "_channel", "_done", "n", "op", "sink")

    def __init__(self, channel: Channel, n: int, op: str, sink: Sink | None) -> None:
        self.n = n
        self.op = op
        self.sink = sink
        self._channel = channel
        self._answer: Frame | SandboxError | None = None
        self._done = anyio.Event()

    @property
    def finished(self) -> bool:
        """Whether the reply is there, or never comes."""
        return self._answer is not None

    async def reply(self, seconds: float = ANSWER_SECONDS) -> Frame:
        """Wait for the reply, for at most ``seconds``; time in which the sandbox is paused does not count.

        Raises:
            SandboxError: the supervisor refuses the request.
            SandboxGone: the channel has ended, or the supervisor is stuck.
        """
        if self._answer is None and not await self._channel.patience(seconds).wait(self._done):
            raise await self._channel.stuck(self.op, seconds)
        return self.result()

    def result(self) -> Frame:
        """Return the reply that is there; raise as ``reply`` does."""
        assert self._answer is not None
        if isinstance(self._answer, SandboxError):
            raise self._answer.with_traceback(None)
        return self._answer

    def leave(self) -> None:
        """Let what still comes be dropped; after the reply this does nothing."""
        self._channel.leave(self)

    def settle(self, answer: Frame | SandboxError) -> None:
        """Take the reply, or the reason for which there is none."""
        self._answer = answer
        self._done.set()
        if self.sink is not None:
            self.sink.close()


class Channel:
    """The host's end of a connection to a supervisor.

    Use it so: ``await channel.open(group)``, then ``ask`` and ``begin`` from any task, then ``aclose``. The tasks live
    in ``group``; what goes wrong in them never leaves them.
    """

    def __init__(
        self,
        stream: ByteStream,
        name: str,
        *,
        on_stuck: Callable[[], Awaitable[object]],
        relay: Relay | None = None,
    ) -> None:
        """Take over ``stream``.

        Args:
            stream: The connection.
            name: The sandbox's name for messages.
            on_stuck: Removes the sandbox.
            relay: Serves connections to the proxy that are opened inside; they are refused without it.
        """
        self.name = name
        self.hello: Frame = Frame({}, b"", self)
        self._stream = stream
        self._on_stuck = on_stuck
        self._relay = relay
        self._outbox = _Outbox()
        self._exchanges: dict[int, Exchange] = {}
        self._tunnels: dict[int, Tunnel] = {}
        self._left: dict[int, int] = {}
        self._last = 0
        self._stray = 0
        self._reason: str | None = None
        self._broken = self._removing = False
        self._greeted = anyio.Event()
        self._closed = anyio.Event()
        self._removed = anyio.Event()
        self._group: TaskGroup | None = None
        self._pauses = _Pauses()

    # --- its life ---------------------------------------------------------------------------------------------------

    async def open(self, group: TaskGroup, *, seconds: float = ANSWER_SECONDS) -> Frame:
        """Start its tasks in ``group``, wait for the supervisor's greeting and return it.

        Raises:
            SandboxGone: nobody answers, or somebody else than a supervisor of this protocol.
        """
        try:
            group.start_soon(self._serve)
            with anyio.move_on_after(seconds):
                await self._greeted.wait()
            if self._reason is None and not self._greeted.is_set():
                self.end(f"its supervisor did not speak within {seconds:g} s")
            self.check()
        except BaseException:
            await self.aclose()
            raise
        return self.hello

    @property
    def ended(self) -> bool:
        """Whether nothing can be asked any more."""
        return self._reason is not None

    @property
    def reason(self) -> str:
        """Why it has ended, as the rest of a sentence; empty while it has not."""
        return self._reason or ""

    def check(self) -> None:
        """Raise the reason once it has ended.

        Raises:
            SandboxGone: it has.
        """
        if self._reason is not None:
            raise self._gone()

    def end(self, reason: str) -> None:
        """End it and everything that waits for it; the first reason stands."""
        if self._reason is not None:
            return
        self._reason = reason
        waiting, self._exchanges = self._exchanges, {}
        for exchange in waiting.values():
            exchange.settle(self._gone())
        for tunnel in self._tunnels.values():
            tunnel.cut()
        self._greeted.set()
        self._outbox.close()
        if self._group is not None:
            self._group.cancel_scope.cancel()

    def breach(self, text: str) -> SandboxGone:
        """End it because a rule was broken, and have the sandbox removed; the error is to be raised."""
        self._broken = self._broken or self._reason is None
        self.end(f"what runs in it broke the protocol: {text}. Nothing that it says can be trusted; make another one")
        return self._gone()

    async def stuck(self, op: str, seconds: float) -> SandboxGone:
        """End it because there was no answer to ``op``, and have the sandbox removed; the error is to be raised."""
        self._broken = self._broken or self._reason is None
        self.end(f"its supervisor did not answer {op!r} within {seconds:g} s, so it was removed")
        with anyio.move_on_after(TOLD_SECONDS if self._broken else 0):
            await self._removed.wait()
        return Stuck(self._gone().message)

    async def _remove(self) -> None:
        if self._removing:
            return
        self._removing = True
        try:
            with anyio.move_on_after(REMOVE_SECONDS, shield=True):
                await self._on_stuck()
        except Exception as error:
            _log.error("sandbox %s cannot be trusted any more, and cannot be removed: %s", self.name, error)
        finally:
            self._removed.set()

    async def aclose(self) -> None:
        """End it and wait until its tasks have."""
        self.end("it was let go of")
        with anyio.CancelScope(shield=True):
            if self._group is not None:
                await self._closed.wait()
            else:
                await anyio.aclose_forcefully(self._stream)

    def _gone(self) -> SandboxGone:
        return SandboxGone(f"Sandbox {self.name} is gone: {self._reason}.")

    # --- requests ---------------------------------------------------------------------------------------------------

    async def ask(
        self,
        op: str,
        fields: Mapping[str, Any] | None = None,
        body: bytes = b"",
        *,
        seconds: float = ANSWER_SECONDS,
        sink: Sink | None = None,
    ) -> Frame:
        """Ask and wait for the reply.

        Raises:
            SandboxError: the supervisor refuses.
            SandboxGone: there is no supervisor any more, or it did not answer within ``seconds``.
        """
        exchange = await self.begin(op, fields, body, sink=sink)
        try:
            return await exchange.reply(seconds)
        finally:
            exchange.leave()

    async def begin(
        self, op: str, fields: Mapping[str, Any] | None = None, body: bytes = b"", *, sink: Sink | None = None
    ) -> Exchange:
        """Send a request, after those that wait already; whoever begins an exchange leaves it.

        Raises:
            SandboxError: it is too long for a frame.
            SandboxGone: there is no supervisor any more.
        """
        while self._reason is None and (emptied := self._outbox.emptied()) is not None:
            if not await self.patience(ANSWER_SECONDS).wait(emptied):
                raise await self.stuck(op, ANSWER_SECONDS)
        return self.post(op, fields, body, sink=sink)

    def post(
        self, op: str, fields: Mapping[str, Any] | None = None, body: bytes = b"", *, sink: Sink | None = None
    ) -> Exchange:
        """Send a request at once, however many wait already: for what ends something. Raises as ``begin``."""
        self.check()
        self._last += 1
        exchange = Exchange(self, self._last, op, sink)
        self._outbox.put(self._encoded({"op": op, "n": exchange.n, **(fields or {})}, body))
        self._exchanges[exchange.n] = exchange
        return exchange

    def tell(self, header: Mapping[str, Any], body: bytes = b"") -> None:
        """Send a frame that has no reply; after the end it is dropped."""
        if self._reason is None:
            self._outbox.put(encode(dict(header), body))

    def leave(self, exchange: Exchange) -> None:
        """Drop what still comes for an exchange."""
        if self._exchanges.pop(exchange.n, None) is not None:
            self._left[exchange.n] = STRAY_BYTES
            if len(self._left) > LEFT:
                self.end(f"its supervisor has left {LEFT} requests without an answer")

    def _encoded(self, header: dict[str, Any], body: bytes) -> bytes:
        try:
            return encode(header, body)
        except ValueError as error:
            raise SandboxError(
                f"The request {header['op']!r} is too long for one message ({error}). Write what is long (code, "
                "arguments, data) to a file or to standard input instead"
            ) from None

    # --- pauses -----------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop the clock of all that waits."""
        self._pauses.begin()

    def resume(self) -> None:
        """Let it go on."""
        self._pauses.end()

    def patience(self, seconds: float) -> Patience:
        """Return how long somebody waits: ``seconds`` in which the sandbox is not paused."""
        return Patience(self._pauses, seconds)

    # --- its tasks --------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        try:
            async with anyio.create_task_group() as self._group:
                if self._reason is not None:
                    self._group.cancel_scope.cancel()
                self._group.start_soon(self._write)
                await self._read()
                self._group.cancel_scope.cancel()
        finally:
            self.end("its host has closed")
            with anyio.CancelScope(shield=True), suppress(Exception):
                await anyio.aclose_forcefully(self._stream)
            self._closed.set()
            if self._broken:
                await self._remove()

    async def _write(self) -> None:
        try:
            while True:
                await self._stream.send(await self._outbox.take())
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
            self.end("its connection was cut")

    async def _read(self) -> None:
        decoder = Decoder()
        try:
            while True:
                for header, body in decoder.feed(await self._stream.receive(_PIECE)):
                    self._dispatch(Frame(header, body, self))
        except anyio.EndOfStream:
            self.end("its supervisor has ended, or another worker has attached to it")
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
            self.end("its connection was cut")
        except Breach as error:
            self.breach(str(error))
        except SandboxGone:
            pass  # a breach, found while a frame was read: it has ended the channel already

    def _dispatch(self, frame: Frame) -> None:
        if not self._greeted.is_set():
            self._greet(frame)
        elif "n" in frame.header:
            self._answered(frame)
        elif "s" in frame.header:
            self._tunnelled(frame)
        else:
            raise frame.breach("a frame belongs to nothing")

    def _greet(self, frame: Frame) -> None:
        if frame.number("hello", 0) != 1:
            raise frame.breach("it did not begin with a greeting")
        if (spoken := frame.number("protocol", 0)) != PROTOCOL:
            self.end(f"its supervisor speaks protocol {spoken}, this version {PROTOCOL}; make another one")
            raise self._gone()
        self.hello = frame
        self._greeted.set()

    def _answered(self, frame: Frame) -> None:
        n = frame.number("n")
        exchange = self._exchanges.get(n)
        if exchange is None:
            self._strayed(frame, n)
        elif "event" not in frame.header:
            answer = _answer(frame)
            del self._exchanges[n]
            exchange.settle(answer)
        elif exchange.sink is None:
            raise frame.breach(f"{exchange.op!r} has no events")
        else:
            exchange.sink.take(frame)

    def _strayed(self, frame: Frame, n: int) -> None:
        """Something for a request whose caller has left: it may come, but not without end."""
        rest = self._left.pop(n, -1) - len(frame.body) - 256
        if rest < 0:
            raise frame.breach("it answers what nobody asks")
        if "event" in frame.header:
            self._left[n] = rest

    def start_soon(self, function: Callable[..., Coroutine[Any, Any, object]], *args: object) -> None:
        """Run a task of the sandbox's own, which ends with the channel; it raises nothing.

        Raises:
            SandboxGone: it has ended.
        """
        self.check()
        assert self._group is not None
        self._group.start_soon(function, *args)

    # --- tunnels ----------------------------------------------------------------------------------------------------

    def _tunnelled(self, frame: Frame) -> None:
        s = frame.number("s")
        tunnel = self._tunnels.get(s)
        if frame.flag("open"):
            if tunnel is not None:
                raise frame.breach("a connection is opened twice")
            self._open_tunnel(s)
        elif tunnel is not None:
            tunnel.take(frame)
        else:
            self._strayed_tunnel(frame)

    def _open_tunnel(self, s: int) -> None:
        if self._relay is None or self._group is None or len(self._tunnels) >= TUNNELS:
            self._stray += WINDOW + _TAIL
            self.tell({"s": s, "end": True})
            return
        tunnel = self._tunnels[s] = Tunnel(self, s)
        self._group.start_soon(self._relayed, self._relay, tunnel)
        self.tell({"s": s, "ready": True})

    def _strayed_tunnel(self, frame: Frame) -> None:
        self._stray -= len(frame.body) + 256
        if self._stray < 0:
            raise frame.breach("it sends to connections that are closed")

    async def _relayed(self, relay: Relay, tunnel: Tunnel) -> None:
        try:
            await relay(tunnel)
        except Exception as error:
            _log.warning("sandbox %s: a connection to its proxy has failed: %s", self.name, error)
        finally:
            tunnel.close()

    def forget_tunnel(self, s: int) -> None:
        """Take out a connection that both sides have ended."""
        if self._tunnels.pop(s, None) is not None:
            self._stray += _TAIL


class Tunnel(ByteStream):
    """A connection that a program in the sandbox has opened to its proxy; either side ends its own direction.

    At most ``WINDOW`` bytes are on their way in each direction, so a slow one holds up no other. When this side is
    closed, what still comes is acknowledged and dropped until the other side ends too.
    """

    def __init__(self, channel: Channel, s: int) -> None:
        self._channel = channel
        self._s = s
        self._received = bytearray()
        self._on_the_way = 0
        self._their_end = self._our_end = self._is_closed = self._is_cut = False
        self._changed = anyio.Event()

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Return what has come, waiting for it."""
        await anyio.lowlevel.checkpoint()
        while not self._received:
            self._check()
            if self._their_end:
                raise anyio.EndOfStream
            await self._change()
        data = bytes(self._received[:max_bytes])
        del self._received[:max_bytes]
        self._channel.tell({"s": self._s, "took": len(data)})
        return data

    async def send(self, item: bytes) -> None:
        """Send bytes, as far as the window is open."""
        await anyio.lowlevel.checkpoint()
        view = memoryview(item)
        while view:
            self._check()
            if self._our_end:
                raise anyio.ClosedResourceError
            room = min(WINDOW - self._on_the_way, MAX_BODY)
            if room <= 0:
                await self._change()
                continue
            piece, view = view[:room], view[room:]
            self._on_the_way += len(piece)
            self._channel.tell({"s": self._s}, bytes(piece))

    async def send_eof(self) -> None:
        """Say that nothing more is sent."""
        await anyio.lowlevel.checkpoint()
        self._end()

    async def aclose(self) -> None:
        """End both directions."""
        self.close()
        await anyio.lowlevel.checkpoint()

    def close(self) -> None:
        """End both directions; the other side's may last a little."""
        self._end()
        self._is_closed = True
        self._drop()
        self._forget_when_over()
        self._wake()

    def cut(self) -> None:
        """The channel has ended under it."""
        self._is_cut = True
        self._wake()

    def take(self, frame: Frame) -> None:
        """Take a frame from inside."""
        if frame.body:
            self._take_data(frame)
        if "took" in frame.header:
            self._on_the_way -= frame.number("took")
            if self._on_the_way < 0:
                raise frame.breach("more bytes were taken than were sent")
        if frame.flag("end"):
            self._their_end = True
            self._forget_when_over()
        self._wake()

    def _take_data(self, frame: Frame) -> None:
        if self._their_end:
            raise frame.breach("a connection goes on after its end")
        self._received += frame.body
        if len(self._received) > WINDOW:
            raise frame.breach("a connection sends more than its window")
        if self._is_closed:
            self._drop()

    def _drop(self) -> None:
        if self._received:
            self._channel.tell({"s": self._s, "took": len(self._received)})
            self._received.clear()

    def _end(self) -> None:
        if not self._our_end:
            self._our_end = True
            self._channel.tell({"s": self._s, "end": True})

    def _forget_when_over(self) -> None:
        if self._their_end and self._is_closed:
            self._channel.forget_tunnel(self._s)

    def _check(self) -> None:
        if self._is_cut:
            raise anyio.BrokenResourceError
        if self._is_closed:
            raise anyio.ClosedResourceError

    def _wake(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    async def _change(self) -> None:
        await self._changed.wait()


class _Outbox:
    """Frames that wait for the writer."""

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._size = 0
        self._filled = anyio.Event()
        self._emptied = anyio.Event()

    def put(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._size += len(frame)
        self._filled.set()

    def emptied(self) -> anyio.Event | None:
        """Set when some were sent; ``None`` if there is room now."""
        return self._emptied if self._size > OUTBOX else None

    def close(self) -> None:
        """Let nobody wait for room any more."""
        self._emptied.set()

    async def take(self) -> bytes:
        """All that waits, up to about 256 KiB, in one piece: small frames cost one system call together."""
        while not self._frames:
            self._filled = anyio.Event()
            await self._filled.wait()
        taken = [self._frames.popleft()]
        size = len(taken[0])
        while self._frames and size + len(self._frames[0]) <= _PIECE:
            taken.append(self._frames.popleft())
            size += len(taken[-1])
        self._size -= size
        emptied, self._emptied = self._emptied, anyio.Event()
        emptied.set()
        return taken[0] if len(taken) == 1 else b"".join(taken)


class Patience:
    """How long somebody still waits, over one or more waits, without the time in which the sandbox is paused."""

    def __init__(self, pauses: _Pauses, seconds: float) -> None:
        self._pauses = pauses
        self._left = seconds

    async def wait(self, event: anyio.Event) -> bool:
        """Wait for ``event``; false when there is no patience left."""
        while not event.is_set() and self._left > 0:
            begun, before = anyio.current_time(), self._pauses.total()
            with anyio.move_on_after(max(self._left, 1.0) if self._pauses.paused else self._left):
                await event.wait()
            self._left -= anyio.current_time() - begun - (self._pauses.total() - before)
        return event.is_set()


class _Pauses:
    """How long the sandbox has been paused."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._before = 0.0

    @property
    def paused(self) -> bool:
        return self._since is not None

    def begin(self) -> None:
        if self._since is None:
            self._since = anyio.current_time()

    def end(self) -> None:
        self._before, self._since = self.total(), None

    def total(self) -> float:
        return self._before + (anyio.current_time() - self._since if self._since is not None else 0.0)


_ERRORS: Final[Mapping[str, type[SandboxError]]] = {"not_found": SandboxFileNotFound, "no_call": NoCall}


def _answer(frame: Frame) -> Frame | SandboxError:
    """The reply, or the error that it stands for."""
    error = frame.header.get("error")
    if error is None:
        return frame
    if not isinstance(error, dict):
        raise frame.breach("an error must be an object")
    inner = frame.part(error)
    kind, message = inner.text("kind"), clean(inner.text("message"))
    return _ERRORS.get(kind, SandboxError)(message)


def clean(text: str) -> str:
    """Text from inside as it may stand in a message: no halves of characters."""
    return text.encode("utf-8", "replace").decode()


def path_of(text: str) -> str:
    """A path from inside: where it is no UTF-8 it has halves of characters for its bytes, as ``os.fsdecode`` makes
    them, so that it can be named again; others are replaced."""
    try:
        text.encode("utf-8", "surrogateescape")
        return text
    except UnicodeEncodeError:
        return clean(text)
