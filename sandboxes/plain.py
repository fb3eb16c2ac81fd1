"""A sandbox of an image that cannot run the supervisor: each call is an exec of its own, through the engine.

It takes some 50 ms where the supervisor takes one, and does less. What it has of the port holds as elsewhere: a
deadline ends what the call had started, what a call leaves running is ended with it, output is capped. What it has not
says so: processes in the background, sessions, watching, and results that are fetched by a later worker.

The engine has no way of ending a process that it started (moby#9098). What belongs to a call carries a mark in its
environment, and another exec ends all that carries it; what has taken the mark off, or leaves no room for that exec, is
ended with the whole container.
"""

from __future__ import annotations

import hashlib
import math
import posixpath
import secrets
import stat
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NoReturn, Protocol

import anyio
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectSendStream

from ridethrough.runtime.errors import SandboxError, SandboxFileNotFound, SandboxGone, SandboxTimeout
from ridethrough.sandboxes.engine import Engine
from ridethrough.sandboxes.hijack import STDERR, STDOUT, EngineStream
from ridethrough.sandboxes.profile import WORKSPACE, SandboxProfile
from ridethrough.sandboxes.sandbox import (
    DEFAULT_TIMEOUT,
    KEEP_OUTPUT,
    OUTPUT_LIMIT,
    Change,
    ExecResult,
    FileInfo,
    Limit,
    Listing,
    Output,
    Process,
    Sandbox,
    Session,
    Snapshot,
)
from ridethrough.sandboxes.sinks import Ends

MARK: Final = "RIDETHROUGH_CALL"
GRACE: Final = 1.0
"""Seconds between SIGTERM and SIGKILL."""

FILE_SECONDS: Final = 60.0
SWEEP_SECONDS: Final = 20.0
END_SECONDS: Final = 3.0
"""How long the engine may take to notice that a command was killed."""

LOOK_SECONDS: Final = 0.5
"""How often it is looked whether a command has ended that left its output open to others."""

LISTING_BYTES: Final = 8 * 2**20
_PIECE: Final = 64 * 1024
_NAMES: Final = {STDOUT: "stdout", STDERR: "stderr"}

_SWEEP: Final = """\
for round in 1 2 3 4 5; do
  found=
  for each in /proc/[0-9]*; do
    grep -qs "$0" "$each/environ" && kill -s "$1" "${each#/proc/}" && found=1
  done
  [ -n "$found" ] && [ "$1" = KILL ] || exit 0
done
exit 1
"""
_INSIDE: Final = 'case "$p" in /workspace|/workspace/*|/tmp|/tmp/*) ;; *) exit 41;; esac\n'
_FOLDER: Final = f'f=$(dirname "$0"); mkdir -p "$f" && p=$(readlink -f "$f") || exit 1\n{_INSIDE}'
_THERE: Final = f'p=$(readlink -f "$0") && [ -e "$p" ] || exit 44\n{_INSIDE}'
_ENTRY: Final = f'[ -e "$0" ] || [ -L "$0" ] || exit 44\np=$(readlink -f "$(dirname "$0")")\n{_INSIDE}'
_READ: Final = f'{_THERE}[ -f "$p" ] || exit 42\ntail -c +"$1" "$p" | head -c "$2"'
_WRITE: Final = f"""{_FOLDER}[ -d "$0" ] && exit 42
part="$p/.ridethrough-part-$$"
cat >"$part" && chmod "$1" "$part" && mv -f "$part" "$0" || {{ rm -f "$part"; exit 1; }}
wc -c <"$0"
"""
_APPEND: Final = f"""{_FOLDER}[ -e "$0" ] && {{ p=$(readlink -f "$0"); [ -f "$p" ] || exit 42; }}
{_INSIDE}cat >>"$0" && wc -c <"$0"
"""
_STAT: Final = f"{_ENTRY}exec stat -c '%f %s %Y %n' \"$0\""
_LIST: Final = f"""{_THERE}[ -d "$p" ] || exit 42
if [ "$1" = all ]; then find "$0"/ -mindepth 1 -exec stat -c '%f %s %Y %n' {{}} +
else find "$0"/ -mindepth 1 -maxdepth 1 -exec stat -c '%f %s %Y %n' {{}} +; fi
"""
_REMOVE: Final = f'{_ENTRY}exec rm -rf "$0"'
_EMPTY: Final = 'find "$0" -mindepth 1 -maxdepth 1 -exec rm -rf {} +'
_PACK: Final = 'cd "$0" && find . -mindepth 1 | wc -l >&2 && exec tar -czf - .'
_UNPACK: Final = f'{_EMPTY} && cd "$0" && exec tar -xzf -'
_REFUSALS: Final = {41: "it is outside of the workspace", 42: "it is no regular file, or no folder"}


class Hold(Protocol):
    """What the host of a plain sandbox does for it from outside."""

    async def pause(self) -> None:
        """Freeze it."""
        ...

    async def resume(self) -> None:
        """Let it go on."""
        ...

    async def remove(self) -> object:
        """End it, with all that is in it."""
        ...

    async def another(self) -> Sandbox:
        """A new sandbox of the same profile."""
        ...

    async def fate(self) -> str | None:
        """Why it is not there any more; ``None`` while it is."""
        ...


@dataclass(slots=True)
class Command:
    """A command of its own exec, and what has come of it so far."""

    argv: Sequence[str]
    timeout: float
    stdin: bytes = b""
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    cwd: str = WORKSPACE
    user: str = ""
    keep: int = KEEP_OUTPUT
    limit: int = OUTPUT_LIMIT
    mark: str = field(default_factory=lambda: secrets.token_hex(16))
    ends: dict[int, Ends] = field(default_factory=dict[int, Ends])
    totals: dict[int, int] = field(default_factory=lambda: {STDOUT: 0, STDERR: 0})
    ended_by: Limit | None = None
    since: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        """Keep the ends of both streams."""
        self.ends = {STDOUT: Ends(self.keep), STDERR: Ends(self.keep)}

    def add(self, stream: int, data: bytes) -> bool:
        """Take a piece of output; false when that was more than the call may write."""
        self.ends[stream].add(data)
        self.totals[stream] += len(data)
        if sum(self.totals.values()) > self.limit:
            self.ended_by = "output"
        return self.ended_by is None

    def result(self, exit_code: int) -> ExecResult:
        """What it did."""
        out, err = self.ends[STDOUT].data(), self.ends[STDERR].data()
        return ExecResult(
            exit_code=exit_code,
            stdout_bytes=out,
            stderr_bytes=err,
            truncated=len(out) + len(err) < sum(self.totals.values()),
            limit=self.ended_by,
            seconds=time.time() - self.since,
            stdout_total=self.totals[STDOUT],
            stderr_total=self.totals[STDERR],
        )


class Execs:
    """Runs commands in one container, each in an exec of its own, and leaves nothing of them."""

    def __init__(self, engine: Engine, container: str, hold: Hold) -> None:
        """``hold`` removes the container where nothing else helps."""
        self._engine = engine
        self._container = container
        self._hold = hold

    async def run(self, command: Command, take: Callable[[int, bytes], Awaitable[None]] | None = None) -> ExecResult:
        """Run a command to its end; ``take`` is given each piece of its output.

        Raises:
            SandboxTimeout: its deadline has passed.
            SandboxGone: the sandbox went away.
            SandboxError: it cannot be started.
        """
        env = {**command.env, MARK: command.mark}
        stream = await self._asked(
            self._engine.exec_attach(
                self._container, command.argv, env=env, cwd=command.cwd, user=command.user, stdin=bool(command.stdin)
            )
        )
        ended = False
        try:
            with anyio.move_on_after(command.timeout) as scope:
                await self._through(command, stream, take)
            await self._end(command, stream, at_once=not scope.cancelled_caught)
            ended = True
            return await self._concluded(command, stream, late=scope.cancelled_caught)
        finally:
            with anyio.CancelScope(shield=True):
                if not ended:
                    await self._end(command, stream)
                await anyio.aclose_forcefully(stream)

    async def _asked(self, what: Awaitable[Any]) -> Any:
        """Ask the engine; where the container is gone, say why."""
        try:
            return await what
        except SandboxGone as error:
            fate = await self._hold.fate()
            raise SandboxGone(f"Sandbox {self._container} is gone: {fate}.") if fate else error from error

    async def _through(
        self, command: Command, stream: EngineStream, take: Callable[[int, bytes], Awaitable[None]] | None
    ) -> None:
        """Give the command its input, and take its output until nobody can write any more."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._feed, command, stream)
            group.start_soon(self._look, command, stream.exec_id)
            with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                while True:
                    name, data = await stream.frame()
                    if not command.add(name, data):
                        break
                    if take is not None:
                        await take(name, data)
            group.cancel_scope.cancel()

    async def _feed(self, command: Command, stream: EngineStream) -> None:
        if not command.stdin:
            return
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            for at in range(0, len(command.stdin), _PIECE):
                await stream.send(command.stdin[at : at + _PIECE])
            await stream.send_eof()

    async def _look(self, command: Command, exec_id: str) -> None:
        """Its output ends when all that hold it have; when only those are left that it left behind, they go."""
        while (await self._asked(self._engine.exec_state(exec_id))).running:  # noqa: ASYNC110
            await anyio.sleep(LOOK_SECONDS)
        await self._sweep(command.mark, "KILL")

    async def _concluded(self, command: Command, stream: EngineStream, *, late: bool) -> ExecResult:
        """What it did, now that nothing of it is left."""
        state = await self._asked(self._engine.exec_state(stream.exec_id))
        if late:
            result = command.result(128 + 9)
            raise SandboxTimeout(
                f"{command.argv[0]} did not end within {command.timeout:g} s; it was ended, with all that it had "
                f"started. Give it more time, or less to do",
                result,
            )
        if state.pid == 0 and state.exit_code in (126, 127):
            said = command.ends[STDOUT].data().decode("utf-8", "replace").strip()
            raise SandboxError(f"{command.argv[0]!r} cannot be started: {said[:500]}")
        code = 137 if state.exit_code is None else state.exit_code
        if code == 137 and command.ended_by is None:
            await self._why_killed(command)
        return command.result(code)

    async def _why_killed(self, command: Command) -> None:
        """It was killed, and not by us: with its container, for want of memory, or by itself.

        Raises:
            SandboxGone: with its container.
        """
        if (fate := await self._hold.fate()) is not None:
            raise SandboxGone(f"Sandbox {self._container} is gone: {fate}.")
        events = await self._asked(self._engine.events(self._container, command.since))
        if any(event.get("Action") == "oom" for event in events):
            command.ended_by = "memory"

    async def _end(self, command: Command, stream: EngineStream, *, at_once: bool = False) -> None:
        """End all that carries the command's mark; the whole container where the command itself withstands.

        For the engine a command has not ended before its output was taken, so that goes on meanwhile.
        """
        async with anyio.create_task_group() as group:
            group.start_soon(_drain, stream)
            if not at_once:
                await self._sweep(command.mark, "TERM")
                await self._has_ended(stream.exec_id, GRACE)
            swept = await self._sweep(command.mark, "KILL")
            if not swept or not await self._has_ended(stream.exec_id, END_SECONDS):
                await self._hold.remove()
            group.cancel_scope.cancel()

    async def kill(self, mark: str) -> None:
        """End all that carries the mark, or the whole container."""
        with anyio.CancelScope(shield=True):
            if not await self._sweep(mark, "KILL"):
                await self._hold.remove()

    async def _sweep(self, mark: str, signal: str) -> bool:
        """Send a signal to all that carries the mark; whether that could be done."""
        argv = ["sh", "-c", _SWEEP, f"{MARK}={mark}", signal]
        with anyio.move_on_after(SWEEP_SECONDS):
            try:
                async with await self._engine.exec_attach(self._container, argv, stdin=False) as stream:
                    await _drain(stream)
                    return (await self._engine.exec_state(stream.exec_id)).exit_code == 0
            except SandboxGone:
                return True
            except SandboxError:
                return False
        return False

    async def _has_ended(self, exec_id: str, seconds: float) -> bool:
        for _ in range(max(1, math.ceil(seconds / 0.1))):
            try:
                if not (await self._engine.exec_state(exec_id)).running:
                    return True
            except SandboxGone:
                return True
            await anyio.sleep(0.1)
        return False


async def _drain(stream: EngineStream) -> None:
    """Take what still comes until the end, and drop it."""
    with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
        while True:
            await stream.frame()


class PlainSandbox(Sandbox):
    """A container without a supervisor. ``DockerHost`` makes one where nothing better can be.

    Attributes:
        environment: Of every call.
        proof: Why its runtime was chosen.
    """

    def __init__(
        self,
        id: str,
        profile: SandboxProfile,
        execs: Execs,
        hold: Hold,
        held: EngineStream,
        group: TaskGroup,
        *,
        runtime: str,
        environment: Mapping[str, str],
        proof: Mapping[str, Any] | None = None,
    ) -> None:
        """Take over ``held``: while it is open the container does not end by itself."""
        self.id = id
        self.profile = profile
        self.boundary = True
        self.runtime = runtime
        self.environment: Mapping[str, str] = {**environment, **profile.env}
        self.proof = proof
        self._execs = execs
        self._hold = hold
        self._held = held
        self._group = group
        self._calls: dict[str, _Once] = {}
        self._reason: str | None = None
        group.start_soon(self._watch_over)

    async def _watch_over(self) -> None:
        """Wait for the container's end."""
        try:
            await _drain(self._held)
            self._reason = self._reason or await self._hold.fate() or "its connection was cut"
        finally:
            await anyio.aclose_forcefully(self._held)

    @property
    def ended(self) -> bool:
        """As ``Sandbox.ended``."""
        return self._reason is not None

    def _check(self) -> None:
        if self._reason is not None:
            raise SandboxGone(f"Sandbox {self.id} is gone: {self._reason}.")

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
        """As ``Sandbox.exec``; a ``call_id`` gives the result of the first only to the one who made it."""
        self._check()
        command = self._command(argv, timeout, stdin, env, cwd, user, keep_output)
        if call_id is None:
            return await self._execs.run(command)
        once = self._calls.get(call_id)
        if once is None:
            once = self._calls[call_id] = _Once()
            await once.perform(lambda: self._first(call_id, command))
        return await once.result()

    async def _first(self, call_id: str, command: Command) -> ExecResult:
        """Run a call that has a name, unless an earlier worker has started it."""
        command.mark = _mark_of(call_id)
        place = f"/tmp/.ridethrough-call-{command.mark}"
        if (await self._execs.run(Command(["mkdir", place], FILE_SECONDS))).exit_code != 0:
            raise SandboxError(
                f"the call {call_id} was started before, and image {self.profile.image} keeps no results: install "
                f"python3 (3.8 or newer) in it so that they outlive the worker"
            )
        return await self._execs.run(command)

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
        """As ``Sandbox.exec_stream``; it takes no ``call_id``."""
        self._check()
        if call_id is not None:
            self._cannot("give the output of a call to a later worker")
        command = self._command(argv, timeout, stdin, env, cwd, None, KEEP_OUTPUT)
        send, receive = anyio.create_memory_object_stream[Output | ExecResult | SandboxError]()
        scope, done = anyio.CancelScope(), anyio.Event()
        self._group.start_soon(self._streamed, command, send, scope, done)
        try:
            async for item in receive:
                if isinstance(item, SandboxError):
                    raise item
                yield item
        finally:
            scope.cancel()
            receive.close()
            with anyio.CancelScope(shield=True):
                await done.wait()

    async def _streamed(
        self,
        command: Command,
        send: MemoryObjectSendStream[Output | ExecResult | SandboxError],
        scope: anyio.CancelScope,
        done: anyio.Event,
    ) -> None:
        async def take(stream: int, data: bytes) -> None:
            name: Literal["stdout", "stderr"] = "stdout" if stream == STDOUT else "stderr"
            await send.send(Output(name, data, command.totals[stream] - len(data)))

        try:
            with scope, send, suppress(anyio.BrokenResourceError):
                try:
                    await send.send(await self._execs.run(command, take))
                except SandboxError as error:
                    await send.send(error)
        finally:
            done.set()

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
        """Not without a supervisor."""
        self._cannot("keep a process in the background")

    def python(self, *, env: Mapping[str, str] | None = None) -> AbstractAsyncContextManager[Session]:
        """Not without Python."""
        self._cannot("keep a Python session")

    def shell(self, *, env: Mapping[str, str] | None = None) -> AbstractAsyncContextManager[Session]:
        """Not without a supervisor."""
        self._cannot("keep a shell session")

    async def forget(self, call_ids: Sequence[str]) -> None:
        """As ``Sandbox.forget``."""
        for call_id in call_ids:
            self._calls.pop(call_id, None)

    async def kill(self, call_id: str) -> None:
        """As ``Sandbox.kill``."""
        self._check()
        await self._execs.kill(_mark_of(call_id))

    def _cannot(self, what: str) -> NoReturn:
        raise SandboxError(
            f"a sandbox of image {self.profile.image} cannot {what}: there is no python3 (3.8 or newer) in the image. "
            f"Install it there, or use ridethrough/python"
        )

    def _command(
        self,
        argv: Sequence[str],
        timeout: float,
        stdin: bytes | str | None,
        env: Mapping[str, str] | None,
        cwd: str | None,
        user: str | None,
        keep: int,
    ) -> Command:
        if not argv or not all(isinstance(word, str) and "\0" not in word for word in argv):
            raise SandboxError(f"{argv!r} is no command: give a list of texts, the program first")
        if not 0 < timeout < math.inf:
            raise SandboxError(f"{timeout!r} is no deadline: give a number of seconds above 0")
        return Command(
            list(argv),
            timeout,
            stdin.encode() if isinstance(stdin, str) else stdin or b"",
            {**self.environment, **(env or {})},
            posixpath.join(WORKSPACE, cwd or "."),
            checked_user(user, self.profile),
            keep,
        )

    # --- files ------------------------------------------------------------------------------------------------------

    async def read(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        """As ``Sandbox.read``."""
        most = self.profile.disk if limit is None else limit
        return (await self._sh(_READ, path, str(offset + 1), str(most), keep=2 * most + 1)).stdout_bytes

    async def write(self, path: str, data: bytes | str, *, append: bool = False, mode: int | None = None) -> int:
        """As ``Sandbox.write``."""
        content = data.encode() if isinstance(data, str) else data
        script = _APPEND if append else _WRITE
        if not content:  # an exec without input has none to end
            script = script.replace("cat >", ": >")
        result = await self._sh(script, path, f"{0o644 if mode is None else mode:o}", stdin=content)
        return _number(result.stdout)

    async def list(self, path: str = ".", *, recursive: bool = False, after: str = "", limit: int = 1000) -> Listing:
        """As ``Sandbox.list``."""
        result = await self._sh(_LIST, path, "all" if recursive else "one", keep=LISTING_BYTES)
        if result.truncated:
            raise SandboxError(f"there is too much below {path} to list it at once: list its folders one by one")
        entries = sorted(_entries(result.stdout), key=lambda entry: entry.path.split("/"))
        rest = [entry for entry in entries if entry.path.split("/") > after.split("/")] if after else entries
        return Listing(tuple(rest[:limit]), len(rest) > limit)

    async def stat(self, path: str) -> FileInfo:
        """As ``Sandbox.stat``."""
        result = await self._sh(_STAT, path)
        for entry in _entries(result.stdout):
            return entry
        raise SandboxError(f"{path} cannot be looked at: {result.stdout[:200]!r}")

    async def remove(self, path: str) -> None:
        """As ``Sandbox.remove``."""
        if posixpath.normpath(posixpath.join(WORKSPACE, path)) in (WORKSPACE, "/tmp"):
            raise SandboxError(f"{path} itself cannot be removed: remove what is in it")
        await self._sh(_REMOVE, path)

    def watch(self, path: str = ".") -> AsyncIterator[Change]:
        """Not without a supervisor."""
        self._cannot("watch files")

    async def _sh(
        self,
        script: str,
        path: str,
        *args: str,
        stdin: bytes = b"",
        keep: int = KEEP_OUTPUT,
    ) -> ExecResult:
        """Run a script about a path; its refusals are errors."""
        self._check()
        place = posixpath.normpath(posixpath.join(WORKSPACE, path))
        if "\0" in path or not _is_inside(place):
            raise SandboxError(f"{path!r} is outside of the workspace")
        command = Command(
            ["sh", "-c", script, place, *args],
            FILE_SECONDS,
            stdin,
            self.environment,
            user=str(self.profile.user),
            keep=keep,
            limit=max(OUTPUT_LIMIT, 2 * keep),
        )
        result = await self._execs.run(command)
        if result.exit_code == 44:
            raise SandboxFileNotFound(f"there is no {path} in sandbox {self.id}")
        if result.exit_code != 0:
            why = _REFUSALS.get(result.exit_code) or result.stderr.strip()[-500:] or f"status {result.exit_code}"
            raise SandboxError(f"{path} in sandbox {self.id}: {why}")
        return result

    # --- the whole --------------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """As ``Sandbox.pause``."""
        self._check()
        await self._hold.pause()

    async def resume(self) -> None:
        """As ``Sandbox.resume``."""
        self._check()
        await self._hold.resume()

    async def snapshot(self) -> Snapshot:
        """As ``Sandbox.snapshot``."""
        most = self.profile.snapshot_limit
        result = await self._sh(_PACK, ".", keep=2 * most + 2)
        if result.stdout_total > most:
            raise SandboxError(
                f"the workspace of sandbox {self.id} is too large for a snapshot: {result.stdout_total} bytes, "
                f"profile {self.profile.name} allows {most} (snapshot_limit)"
            )
        data = result.stdout_bytes
        return Snapshot(data, hashlib.sha256(data).hexdigest(), _number(result.stderr), self.profile.name)

    async def restore(self, snapshot: Snapshot) -> None:
        """As ``Sandbox.restore``."""
        await self._sh(_UNPACK, ".", stdin=snapshot.data)

    async def fork(self) -> Sandbox:
        """As ``Sandbox.fork``."""
        snapshot = await self.snapshot()
        other = await self._hold.another()
        try:
            await other.restore(snapshot)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await other.aclose()
            raise
        return other

    async def aclose(self) -> None:
        """As ``Sandbox.aclose``."""
        self._reason = self._reason or "it was closed"
        await anyio.aclose_forcefully(self._held)
        await self._hold.remove()

    async def outlive(self, seconds: float) -> None:
        """Nothing: its main process has a time of its own, which cannot be changed."""

    async def detach(self) -> None:
        """As ``Sandbox.detach``."""
        self._reason = self._reason or "it was let go of"
        await anyio.aclose_forcefully(self._held)


class _Once:
    """A call that is made once, whoever asks for its result."""

    def __init__(self) -> None:
        self._done = anyio.Event()
        self._result: ExecResult | None = None
        self._error: SandboxError = SandboxError("the call was given up before it ended, and what it did is not known")

    async def perform(self, make: Callable[[], Awaitable[ExecResult]]) -> None:
        """Make it."""
        try:
            self._result = await make()
        except SandboxError as error:
            self._error = error
        finally:
            self._done.set()

    async def result(self) -> ExecResult:
        """Its result, when it is there."""
        await self._done.wait()
        if self._result is None:
            raise self._error
        return self._result


def _mark_of(call_id: str) -> str:
    return hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:32]


def checked_user(user: str | None, profile: SandboxProfile) -> str:
    """Who runs a command, by number.

    Raises:
        SandboxError: a name (only the image knows whose it is), or root where the profile is not.
    """
    if user is None or user == str(profile.user):
        return f"{profile.user}:{profile.user}"
    if not user.isascii() or not user.isdigit() or len(user) > 9:
        raise SandboxError(f"the user {user!r} must be given by number: what a name means is up to the image")
    if int(user) == 0 and profile.user != 0:
        raise SandboxError(f"nothing runs as root in a sandbox of profile {profile.name}")
    return f"{int(user)}:{int(user)}"


def _is_inside(place: str) -> bool:
    return any(place == root or place.startswith(f"{root}/") for root in (WORKSPACE, "/tmp"))


def _number(text: str) -> int:
    word = text.strip()[:20]
    if not word.isascii() or not word.isdigit():
        raise SandboxError(f"the sandbox answers {word!r} where a number was to come")
    return int(word)


def _entries(text: str) -> Iterator[FileInfo]:
    """What ``stat`` says, line by line; a name with a line break in it is left out."""
    for line in text.splitlines():
        words = line.split(" ", 3)
        try:
            mode, size, modified = int(words[0], 16), int(words[1]), int(words[2])
            path = posixpath.normpath(words[3])
        except (ValueError, IndexError):
            continue
        if _is_inside(path):
            yield FileInfo(path.removeprefix(f"{WORKSPACE}/"), _kind(mode), size, float(modified), stat.S_IMODE(mode))


def _kind(mode: int) -> Literal["file", "directory", "link", "other"]:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "link" if stat.S_ISLNK(mode) else "other"
