"""A sandbox with a supervisor in it: all of the port, over one channel.

    exec         one request, ``run``: started and collected in one round trip
    exec_stream  ``start`` with flow, then ``follow``: the command waits for its reader
    start        ``start`` in the background; its ``Process`` follows and collects as often as it likes

What a caller leaves (it is cancelled, its reader goes away) is ended inside, and that is waited for. Each wait is
bounded by the call's own deadline and a margin: past it the supervisor is stuck, and the sandbox is removed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import uuid
from collections import Counter, deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import anyio
from anyio.abc import ByteStream, TaskGroup

from ridethrough.runtime.errors import SandboxError, SandboxGone, SandboxTimeout, SandboxUnavailable
from ridethrough.sandboxes import archive
from ridethrough.sandboxes.channel import (
    ANSWER_SECONDS,
    REMOVE_SECONDS,
    Channel,
    Exchange,
    Frame,
    NoCall,
    Stuck,
    path_of,
)
from ridethrough.sandboxes.command import (
    UNLIMITED,
    Command,
    as_bytes,
    check_argv,
    check_deadline,
    check_env,
    command_of,
)
from ridethrough.sandboxes.frames import MAX_BODY, WINDOW
from ridethrough.sandboxes.profile import WORKSPACE, SandboxProfile
from ridethrough.sandboxes.sandbox import (
    DEFAULT_TIMEOUT,
    KEEP_OUTPUT,
    Change,
    ExecResult,
    FileInfo,
    Listing,
    Output,
    Process,
    Relay,
    Sandbox,
    Session,
    Snapshot,
)
from ridethrough.sandboxes.session import PythonSession, ShellSession
from ridethrough.sandboxes.sinks import Changes, Ends, Feed, Kept, result_of

KILL_SECONDS: Final = 10.0
"""How long a supervisor may take to end a call."""

PROXY: Final = "http://127.0.0.1:3128"
"""Where the way out is, inside a sandbox that has one."""

AHEAD: Final = 4
"""Pieces of a file that are on their way at once."""

ENVIRONMENT: Final[Mapping[str, str]] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": WORKSPACE,
    "LANG": "C.UTF-8",
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
"""What every call has in its environment, before the profile's and its own."""

SNAPSHOT_SECONDS: Final = 120.0
"""How long packing or unpacking a workspace may take."""

_KINDS: Final[Mapping[str, Literal["file", "directory", "link", "other"]]] = {
    "file": "file",
    "directory": "directory",
    "link": "link",
    "other": "other",
}

_log = logging.getLogger(__name__)


class Hold(Protocol):
    """What the host of a sandbox does for it from outside."""

    async def pause(self) -> None:
        """Freeze it."""
        ...

    async def resume(self) -> None:
        """Let it go on."""
        ...

    async def remove(self) -> object:
        """End it, with all that is in it and whatever state it is in; fine twice."""
        ...

    async def another(self) -> Sandbox:
        """A new sandbox of the same profile."""
        ...

    async def exec_as(
        self,
        user: str,
        argv: Sequence[str],
        *,
        timeout: float,
        stdin: bytes,
        env: Mapping[str, str],
        cwd: str | None,
        keep_output: int,
    ) -> ExecResult:
        """Run a command as another user than the profile's, past the supervisor, which cannot change users.

        Raises:
            SandboxError: this host cannot, or the user is root and the profile's is not.
        """
        ...


async def attach_to(
    stream: ByteStream,
    group: TaskGroup,
    *,
    id: str,
    profile: SandboxProfile,
    boundary: bool,
    runtime: str,
    hold: Hold,
    linger: float,
    relay: Relay | None = None,
    workspace: str = WORKSPACE,
    environment: Mapping[str, str] = ENVIRONMENT,
    proxy: str = PROXY,
) -> AttachedSandbox:
    """Greet the supervisor at the other end of ``stream``, and make a sandbox of it whose tasks live in ``group``.

    Args:
        stream: The connection.
        group: Where its tasks live.
        id: Of the sandbox.
        profile: What it was made from.
        boundary: Whether it protects anything.
        runtime: What runs it.
        hold: Its host.
        linger: Seconds that it lives on while nobody is attached.
        relay: Serves what goes out through the proxy.
        workspace: Its folder of work, as it is called inside.
        environment: Of every call, before the profile's.
        proxy: Where the way out is inside, for a profile with a network.

    Raises:
        SandboxGone: no supervisor answers; ``stream`` is closed.
    """
    channel = Channel(stream, id, on_stuck=hold.remove, relay=relay)
    await channel.open(group)
    try:
        reply = await channel.ask("attach", {"linger": linger})
        calls = _calls(reply)
    except BaseException:
        await channel.aclose()
        raise
    sandbox = AttachedSandbox(id, profile, channel, boundary=boundary, runtime=runtime, hold=hold, workspace=workspace)
    sandbox.environment = {**environment, "HOME": workspace, **_way_out(profile, proxy), **profile.env}
    sandbox.known_calls, sandbox.clean = calls, reply.flag("clean")
    return sandbox


class AttachedSandbox(Sandbox):
    """A sandbox that this process is attached to; ``attach_to`` makes one.

    Attributes:
        workspace: Its folder of work, as it is called inside.
        environment: Of every call.
        known_calls: The calls that its supervisor knew when it was attached to, running or done.
        clean: Whether nothing had been run or written in it then.
        python_argv: How Python is called in it.
        proof: Why its runtime was chosen, where there is a choice.
    """

    def __init__(
        self,
        id: str,
        profile: SandboxProfile,
        channel: Channel,
        *,
        boundary: bool,
        runtime: str,
        hold: Hold,
        workspace: str = WORKSPACE,
    ) -> None:
        """Take over an open channel."""
        self.id = id
        self.profile = profile
        self.boundary = boundary
        self.runtime = runtime
        self.channel = channel
        self.workspace = workspace
        self.environment: Mapping[str, str] = {**ENVIRONMENT, "HOME": workspace, **profile.env}
        self.known_calls: Mapping[str, Literal["running", "done"]] = {}
        self.clean = False
        self.python_argv: tuple[str, ...] = ("python3",)
        self.proof: Mapping[str, Any] | None = None
        self._hold = hold
        self._waiting: Counter[str] = Counter()
        self._paused: anyio.Event | None = None
        self._closing = anyio.Lock()
        self._removed = self._let_go = False

    @property
    def ended(self) -> bool:
        """As ``Sandbox.ended``."""
        return self.channel.ended

    # --- commands ---------------------------------------------------------------------------------------------------

    async def exec(
        self,
        argv: Sequence[str],
        *,
        timeout: float = DEFAULT_TIMEOUT,
        stdin: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        keep_output: int = KEEP_OUTPUT,
        call_id: str | None = None,
    ) -> ExecResult:
        """As ``Sandbox.exec``."""
        if user is not None and user != str(self.profile.user):
            return await self._exec_as(user, argv, timeout, stdin, env, cwd, keep_output)
        command = self.command(argv, timeout, env, stdin=stdin, cwd=cwd, keep=keep_output, call_id=call_id)
        await self.ready()
        async with self._owned(command):
            if command.rest:
                await self._start(command)
                return await self._collected("collect", command, keep_output)
            return await self._collected("run", command, keep_output)

    async def exec_stream(
        self,
        argv: Sequence[str],
        *,
        timeout: float = DEFAULT_TIMEOUT,
        stdin: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        call_id: str | None = None,
    ) -> AsyncGenerator[Output | ExecResult]:
        """As ``Sandbox.exec_stream``."""
        command = self.command(argv, timeout, env, stdin=stdin, cwd=cwd, call_id=call_id, flow=True)
        async with aclosing(self._streamed(command)) as items:
            async for item in items:
                yield item

    async def start(
        self,
        argv: Sequence[str],
        *,
        timeout: float,
        stdin: bool = False,
        flow: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        call_id: str | None = None,
    ) -> Process:
        """As ``Sandbox.start``."""
        command = self.command(
            argv, timeout, env, cwd=cwd, call_id=call_id, stdin_open=stdin, background=True, limit=UNLIMITED, flow=flow
        )
        await self.begin(command)
        return RunningProcess(self, replace(command, own=False))

    def python(self, *, env: Mapping[str, str] | None = None) -> AbstractAsyncContextManager[Session]:
        """As ``Sandbox.python``."""
        return PythonSession(self, env)

    def shell(self, *, env: Mapping[str, str] | None = None) -> AbstractAsyncContextManager[Session]:
        """As ``Sandbox.shell``."""
        return ShellSession(self, env)

    async def outlive(self, seconds: float) -> None:
        """As ``Sandbox.outlive``."""
        await self.ready()
        await self.channel.ask("attach", {"linger": seconds})

    async def forget(self, call_ids: Sequence[str]) -> None:
        """As ``Sandbox.forget``."""
        await self.ready()
        for begin in range(0, len(call_ids), 256):
            await self.channel.ask("forget", {"ids": list(call_ids[begin : begin + 256])})

    async def kill(self, call_id: str) -> None:
        """As ``Sandbox.kill``."""
        await self.ready()
        with suppress(NoCall):
            await self.channel.ask("kill", {"id": call_id}, seconds=KILL_SECONDS)

    async def sweep(self, keep: Sequence[str] = ()) -> int:
        """End all that belongs to no call of ``keep``; how many processes that were.

        Raises:
            SandboxGone: the sandbox went away.
        """
        await self.ready()
        return (await self.channel.ask("sweep", {"keep": list(keep)})).number("killed")

    async def reset(self) -> bool:
        """End all that runs, empty the workspace and ``/tmp``; whether that worked, so that it may be used again.

        Raises:
            SandboxGone: the sandbox went away.
        """
        await self.ready()
        return (await self.channel.ask("reset", seconds=2 * ANSWER_SECONDS)).flag("clean")

    async def ping(self, *, seconds: float = ANSWER_SECONDS) -> None:
        """Ask for a sign of life.

        Raises:
            SandboxGone: there was none within ``seconds``; the sandbox was removed.
        """
        await self.ready()
        await self.channel.ask("ping", seconds=seconds)

    # --- commands: what they are made of ----------------------------------------------------------------------------

    def command(
        self, argv: Sequence[str], timeout: float, env: Mapping[str, str] | None = None, **options: Any
    ) -> Command:
        """A call in the sandbox's environment, with ``options`` as ``command_of`` has them.

        Raises:
            SandboxError: an argument is none, or the deadline is no time.
        """
        return command_of(argv, timeout, {**self.environment, **(env or {})}, **options)

    async def begin(self, command: Command) -> None:
        """Start a call; a caller that is cancelled meanwhile has started nothing.

        Raises:
            SandboxGone, SandboxError: as for ``start``.
        """
        await self.ready()
        async with self._owned(command):
            await self._start(command)

    async def follow(self, command: Command, most: int = UNLIMITED) -> AsyncGenerator[Output | Frame]:
        """The output of a call from the start, as far as it is kept; then the reply with its end.

        Raises:
            SandboxGone: the sandbox went away, or gives more than ``most`` bytes.
        """
        exchange: Exchange
        feed = Feed(lambda size: self.channel.tell({"n": exchange.n, "took": size}), most)
        patience = self.channel.patience(command.patience)
        exchange = await self.channel.begin("follow", {"id": command.id}, sink=feed)
        try:
            while (output := feed.taken()) is not None or not feed.over:
                if output is not None:
                    yield output
                elif not await patience.wait(feed.news()):
                    raise self._too_late(command, await self.channel.stuck("follow", command.patience))
            yield exchange.result()
        finally:
            self._stop(exchange)

    async def collect(self, command: Command) -> ExecResult:
        """Wait for the end of a call.

        Raises:
            SandboxTimeout: its deadline has passed.
            SandboxGone: the sandbox went away.
        """
        await self.ready()
        return await self._collected("collect", command, KEEP_OUTPUT)

    async def ready(self) -> None:
        """Wait while it is paused.

        Raises:
            SandboxGone: it went away, or was closed.
        """
        while self._paused is not None:
            await self._paused.wait()
        self.channel.check()

    @asynccontextmanager
    async def _owned(self, command: Command) -> AsyncGenerator[None]:
        """End the call when its caller leaves without its end: is cancelled, or closes the stream of its output."""
        self._waiting[command.id] += 1
        try:
            yield
        except SandboxError:
            raise
        except BaseException:
            await self.abandon(command)
            raise
        finally:
            self._waiting[command.id] -= 1
            if not self._waiting[command.id]:
                del self._waiting[command.id]

    async def abandon(self, command: Command) -> None:
        """End a call that nobody waits for, unless it has a name by which it may be asked for later."""
        if self._let_go or not command.own or self._waiting[command.id] > 1:
            return
        with suppress(SandboxError):
            kill = self.channel.post("kill", {"id": command.id})
            with anyio.CancelScope(shield=True):
                if self._paused is None:
                    await kill.reply(KILL_SECONDS)
            kill.leave()
            self._forget_own(command)

    async def _start(self, command: Command) -> None:
        """Start a call, unless its id is known, and let the rest of its input follow."""
        reply = await self.channel.ask("start", command.fields, command.first)
        if command.rest and not reply.flag("known"):
            self.channel.start_soon(self._feed_rest, command)

    async def _feed_rest(self, command: Command) -> None:
        """Give a call the rest of its input, for as long as it reads; that it stops doing so is its own business."""
        with suppress(SandboxError):
            rest = memoryview(command.rest)
            for begin in range(0, len(rest), MAX_BODY):
                fields = {"id": command.id, "end": begin + MAX_BODY >= len(rest)}
                piece = bytes(rest[begin : begin + MAX_BODY])
                await self.channel.ask("stdin", fields, piece, seconds=command.patience)

    async def _collected(self, op: Literal["run", "collect"], command: Command, keep: int) -> ExecResult:
        kept = Kept(keep)
        fields, body = (command.fields, command.first) if op == "run" else ({"id": command.id}, b"")
        exchange = await self.channel.begin(op, fields, body, sink=kept)
        try:
            reply = await exchange.reply(command.patience)
        except Stuck as stuck:
            raise self._too_late(command, stuck) from stuck
        finally:
            exchange.leave()
        return await self._concluded(command, reply, kept.result(reply))

    async def _streamed(self, command: Command) -> AsyncGenerator[Output | ExecResult]:
        """Start a call and give its output; the last item is its result."""
        ends = {name: Ends(KEEP_OUTPUT) for name in ("stdout", "stderr", "control")}
        await self.ready()
        async with self._owned(command):
            await self._start(command)
            async with aclosing(self.follow(command, command.fields["limit"] + WINDOW)) as items:
                async for item in items:
                    if isinstance(item, Output):
                        ends[item.stream].add(item.data)
                        yield item
                    else:
                        result = result_of(item, ends["stdout"].data(), ends["stderr"].data())
                        left_out = ends["stdout"].left_out or ends["stderr"].left_out
                        result = replace(result, truncated=result.truncated or left_out)
                        yield await self._concluded(command, item, result)

    async def _concluded(self, command: Command, reply: Frame, result: ExecResult) -> ExecResult:
        """What follows from the end of a call, for whoever learns of it.

        Raises:
            SandboxTimeout: its deadline has passed.
        """
        self._forget_own(command)
        if reply.number("survivors", 0):
            await self._distrust(command)
        if reply.flag("timeout"):
            raise SandboxTimeout(
                f"{command.name} ran past its deadline of {command.timeout:g} s in sandbox {self.id}, and was "
                "ended with all that it had started. Give it more time with timeout=, or start it in the background",
                result,
            )
        return result

    async def _distrust(self, command: Command) -> None:
        """Remove the sandbox: something in it could not be ended."""
        _log.warning("sandbox %s: a call of %s left processes that cannot be ended", self.id, command.name)
        self.channel.end("a call left processes in it that could not be ended, so it was removed")
        with suppress(SandboxError):
            await self.aclose()

    def _forget_own(self, command: Command) -> None:
        """Let the result of a call go whose id nobody else knows."""
        if command.own and not self.channel.ended:
            self.channel.post("forget", {"ids": [command.id]}).leave()

    def _too_late(self, command: Command, error: SandboxGone) -> SandboxTimeout:
        late = f"{command.name} ran past its deadline of {command.timeout:g} s, and could not be ended"
        return SandboxTimeout(f"{late}. {error.message}")

    async def _exec_as(
        self,
        user: str,
        argv: Sequence[str],
        timeout: float,
        stdin: bytes | str | None,
        env: Mapping[str, str] | None,
        cwd: str | None,
        keep_output: int,
    ) -> ExecResult:
        await self.ready()
        return await self._hold.exec_as(
            user,
            check_argv(argv),
            timeout=check_deadline(timeout),
            stdin=as_bytes(stdin),
            env=check_env({**self.environment, **(env or {})}),
            cwd=cwd,
            keep_output=keep_output,
        )

    # --- files ------------------------------------------------------------------------------------------------------

    async def read(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        """As ``Sandbox.read``."""
        await self.ready()
        most = self.profile.disk if limit is None else limit
        first = await self._read(path, offset, min(most, MAX_BODY))
        size = first.number("size")
        if limit is None and size - offset > most:
            raise SandboxError(
                f"{path} has {size} bytes, more than the {most} of the profile's disk; read it in parts, with limit="
            )
        wanted = min(most, max(size - offset, 0))
        if len(first.body) < min(wanted, MAX_BODY) or wanted <= MAX_BODY:
            return first.body
        pieces = [first.body]
        async for piece in self._read_on(path, offset + MAX_BODY, offset + wanted):
            pieces.append(piece)
        return b"".join(pieces)

    async def _read_on(self, path: str, begin: int, end: int) -> AsyncGenerator[bytes]:
        """The pieces from ``begin`` to ``end``, some asked for ahead; fewer when the file was cut meanwhile."""
        exchanges: deque[tuple[Exchange, int]] = deque()
        try:
            while begin < end or exchanges:
                if begin < end and len(exchanges) < AHEAD:
                    size = min(MAX_BODY, end - begin)
                    fields = {"path": path, "offset": begin, "limit": size}
                    exchanges.append((await self.channel.begin("read", fields), size))
                    begin += size
                    continue
                exchange, size = exchanges.popleft()
                frame = await exchange.reply()
                yield _at_most(frame, size)
                if len(frame.body) < size:
                    return
        finally:
            for exchange, _ in exchanges:
                exchange.leave()

    async def _read(self, path: str, offset: int, limit: int) -> Frame:
        frame = await self.channel.ask("read", {"path": path, "offset": offset, "limit": limit})
        _at_most(frame, limit)
        return frame

    async def write(self, path: str, data: bytes | str, *, append: bool = False, mode: int | None = None) -> int:
        """As ``Sandbox.write``."""
        content = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else bytes(data)
        await self.ready()
        if len(content) <= MAX_BODY:
            return (await self._write(path, content, append, mode)).number("size")
        return await self._write_large(path, memoryview(content), append, mode)

    async def _write_large(self, path: str, content: memoryview, append: bool, mode: int | None) -> int:
        part, size = uuid.uuid4().hex, 0
        for begin in range(0, len(content), MAX_BODY):
            piece = bytes(content[begin : begin + MAX_BODY])
            last = begin + MAX_BODY >= len(content)
            reply = await self._write(path, piece, append, mode, offset=begin, last=last, part=part)
            size = reply.number("size", 0)
        return size

    async def _write(
        self,
        path: str,
        piece: bytes,
        append: bool,
        mode: int | None,
        *,
        offset: int = 0,
        last: bool = True,
        part: str | None = None,
    ) -> Frame:
        fields = {"path": path, "offset": offset, "last": last, "append": append, "mode": mode, "part": part}
        return await self.channel.ask("write", fields, piece)

    async def list(self, path: str = ".", *, recursive: bool = False, after: str = "", limit: int = 1000) -> Listing:
        """As ``Sandbox.list``."""
        await self.ready()
        entries: list[FileInfo] = []
        more = True
        while more and len(entries) < limit:
            fields = {"path": path, "recursive": recursive, "after": after, "limit": limit - len(entries)}
            reply = await self.channel.ask("list", fields)
            found, more = [_entry(each) for each in reply.parts()], reply.flag("more")
            if len(found) > limit - len(entries) or (more and not found):
                raise reply.breach("a listing must have some entries, and no more than were asked for")
            entries += found
            after = entries[-1].path if entries else after
        return Listing(tuple(entries), more)

    async def stat(self, path: str) -> FileInfo:
        """As ``Sandbox.stat``."""
        await self.ready()
        reply = await self.channel.ask("stat", {"path": path})
        entry = reply.header.get("entry")
        if not isinstance(entry, dict):
            raise reply.breach("an entry must be an object")
        return _entry(reply.part(entry))

    async def remove(self, path: str) -> None:
        """As ``Sandbox.remove``."""
        await self.ready()
        await self.channel.ask("remove", {"path": path})

    async def mkdir(self, path: str) -> None:
        """Make a folder, and those above it; one that is there is fine.

        Raises:
            SandboxError: it cannot be made.
        """
        await self.ready()
        await self.channel.ask("mkdir", {"path": path})

    async def watch(self, path: str = ".") -> AsyncGenerator[Change]:
        """As ``Sandbox.watch``."""
        await self.ready()
        changes = Changes()
        exchange = await self.channel.begin("watch", {"path": path}, sink=changes)
        try:
            while (change := await changes.next()) is not None:
                yield change
            exchange.result()
        finally:
            self._stop(exchange)

    def _stop(self, exchange: Exchange) -> None:
        """Leave an exchange that has events for as long as anybody listens."""
        if not exchange.finished and not self.channel.ended:
            self.channel.post("unwatch", {"of": exchange.n}).leave()
        exchange.leave()

    # --- the whole --------------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """As ``Sandbox.pause``."""
        self.channel.check()
        if self._paused is not None:
            return
        self._paused = anyio.Event()
        self.channel.pause()
        try:
            await self._hold.pause()
        except BaseException:
            self._go_on()
            raise

    async def resume(self) -> None:
        """As ``Sandbox.resume``."""
        self.channel.check()
        if self._paused is not None:
            await self._hold.resume()
            self._go_on()

    def _go_on(self) -> None:
        self.channel.resume()
        paused, self._paused = self._paused, None
        if paused is not None:
            paused.set()

    async def snapshot(self) -> Snapshot:
        """As ``Sandbox.snapshot``."""
        most = self.profile.snapshot_limit
        command = self.command(
            [*self.python_argv, "-I", "-c", archive_source(), "pack", self.workspace],
            SNAPSHOT_SECONDS,
            limit=most + 2**20,
            flow=True,
        )
        pieces: list[bytes] = []
        async with aclosing(self._streamed(command)) as items:
            async for item in items:
                if isinstance(item, ExecResult):
                    return self._snapshot(b"".join(pieces), item)
                if item.stream == "stdout":
                    pieces.append(item.data)
                    most -= len(item.data)
                if most < 0:
                    raise self._too_large()
        raise SandboxError(f"Sandbox {self.id}: its workspace could not be packed")

    def _snapshot(self, data: bytes, result: ExecResult) -> Snapshot:
        if result.limit == "output":
            raise self._too_large()
        files = _files(result)
        if files is None:
            raise SandboxError(f"Sandbox {self.id}: its workspace could not be packed: {_last_words(result)}")
        return Snapshot(data, hashlib.sha256(data).hexdigest(), files, self.profile.name)

    def _too_large(self) -> SandboxError:
        return SandboxError(
            f"The workspace of sandbox {self.id} makes an archive of more than {self.profile.snapshot_limit} bytes "
            f"(snapshot_limit of profile {self.profile.name}). Remove what need not be kept, or raise the limit"
        )

    async def restore(self, snapshot: Snapshot) -> None:
        """As ``Sandbox.restore``."""
        if not await self.reset():
            raise SandboxError(f"Sandbox {self.id} could not be emptied for a snapshot; make another one")
        unpack = [*self.python_argv, "-I", "-c", archive_source(), "unpack", self.workspace, str(self.profile.disk)]
        result = await self.exec(unpack, timeout=SNAPSHOT_SECONDS, stdin=snapshot.data)
        if _files(result) is None:
            raise SandboxError(f"The snapshot cannot be restored in sandbox {self.id}: {_last_words(result)}")

    async def fork(self) -> Sandbox:
        """As ``Sandbox.fork``."""
        snapshot = await self.snapshot()
        other = await self._hold.another()
        try:
            await other.restore(snapshot)
        except BaseException:
            with anyio.move_on_after(REMOVE_SECONDS, shield=True):
                await other.aclose()
            raise
        return other

    async def aclose(self) -> None:
        """As ``Sandbox.aclose``."""
        with anyio.CancelScope(shield=True):
            async with self._closing:
                await self._let_end("it was closed")
                if not self._removed:
                    await self._remove()
                    self._removed = True

    async def _remove(self) -> None:
        with anyio.move_on_after(REMOVE_SECONDS) as scope:
            await self._hold.remove()
        if scope.cancelled_caught:
            raise SandboxUnavailable(
                f"Sandbox {self.id} could not be removed within {REMOVE_SECONDS:g} s: its host does not answer. "
                "`ridethrough sandbox prune` removes it later"
            )

    async def detach(self) -> None:
        """As ``Sandbox.detach``."""
        self._let_go = True
        await self._let_end("this process has let go of it")

    async def _let_end(self, reason: str) -> None:
        self.channel.end(reason)
        await self.channel.aclose()
        if self._paused is not None:
            self._go_on()


class RunningProcess(Process):
    """A process in the background of an attached sandbox."""

    def __init__(self, sandbox: AttachedSandbox, command: Command) -> None:
        """``command`` was started."""
        self.call_id = command.id
        self.command = command
        self._sandbox = sandbox

    async def output(self) -> AsyncGenerator[Output]:
        """As ``Process.output``."""
        await self._sandbox.ready()
        async with aclosing(self._sandbox.follow(self.command)) as items:
            async for item in items:
                if isinstance(item, Output):
                    yield item

    async def write(self, data: bytes) -> None:
        """As ``Process.write``."""
        for begin in range(0, len(data), MAX_BODY):
            await self._stdin(data[begin : begin + MAX_BODY], False)

    async def close_stdin(self) -> None:
        """As ``Process.close_stdin``."""
        await self._stdin(b"", True)

    async def _stdin(self, data: bytes, end: bool) -> None:
        await self._sandbox.ready()
        fields = {"id": self.call_id, "end": end}
        await self._sandbox.channel.ask("stdin", fields, data, seconds=self.command.patience)

    async def signal(self, number: int) -> None:
        """As ``Process.signal``."""
        await self._sandbox.ready()
        await self._sandbox.channel.ask("signal", {"id": self.call_id, "signal": number})

    async def kill(self) -> None:
        """As ``Process.kill``."""
        await self._sandbox.kill(self.call_id)

    async def wait(self) -> ExecResult:
        """As ``Process.wait``."""
        return await self._sandbox.collect(self.command)


def _way_out(profile: SandboxProfile, proxy: str) -> dict[str, str]:
    """What tells programs of the proxy, where there is one."""
    if not profile.network:
        return {}
    names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    return {**dict.fromkeys(names, proxy), **dict.fromkeys(("no_proxy", "NO_PROXY"), "localhost,127.0.0.1")}


def _calls(reply: Frame) -> dict[str, Literal["running", "done"]]:
    """The calls that a supervisor knows."""
    calls = reply.json() if reply.body else {}
    if not isinstance(calls, dict) or not all(state in ("running", "done") for state in calls.values()):
        raise reply.breach("calls must be running or done")
    return calls


def _at_most(frame: Frame, size: int) -> bytes:
    if len(frame.body) > size:
        raise frame.breach("more was read than was asked for")
    return frame.body


def _entry(frame: Frame) -> FileInfo:
    kind = _KINDS.get(frame.text("kind"))
    if kind is None:
        raise frame.breach("an entry is of an unknown kind")
    return FileInfo(
        path=path_of(frame.text("path")),
        kind=kind,
        size=frame.number("size", 0),
        modified=frame.seconds("modified"),
        mode=frame.number("mode", 0),
    )


def _files(result: ExecResult) -> int | None:
    """How many entries were packed or unpacked; ``None`` if that went wrong."""
    if result.exit_code != 0:
        return None
    try:
        files = json.loads(result.stderr)["files"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return files if isinstance(files, int) and 0 <= files < 2**63 else None


def _last_words(result: ExecResult) -> str:
    if result.limit is not None:
        return f"it reached the limit {result.limit}"
    return result.stderr.strip()[-1000:] or f"exit code {result.exit_code}"


@functools.cache
def archive_source() -> str:
    """The program that packs and unpacks a workspace."""
    return Path(archive.__file__).read_text()
