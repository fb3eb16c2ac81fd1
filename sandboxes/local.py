"""Sandboxes without a boundary: the same supervisor, as a child process of this machine.

For machines without Docker, and for trying things out. Files are asked for through the same checks, calls end by the
same deadlines, results are kept for whoever attaches; but what runs in one runs as you, and sees what you see.

    RUNTIME/ID/state.json    what it is, and its processes
    RUNTIME/ID/socket        where its supervisor listens
    RUNTIME/ID/workspace     its folder of work
    RUNTIME/ID/tmp           what it has for /tmp

RUNTIME is a folder of yours alone. The supervisor is in a session of its own, so it survives the process that started
it; when it ends (its timer has run out, or it was killed) a shell that has waited for it ends what is left, and takes
its folder away. In a sandbox that is frozen the timer stands still, and so does that shell: another one, which waits
beside it for as long as it is frozen, does that for them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import anyio
import anyio.to_thread
from anyio.abc import ByteStream, TaskGroup

from ridethrough.runtime.errors import SandboxError, SandboxGone, SandboxUnavailable
from ridethrough.sandboxes import frames
from ridethrough.sandboxes.attached import ENVIRONMENT, AttachedSandbox, attach_to
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import ExecResult, Found, Host, RelayFor, Sandbox
from ridethrough.sandboxes.sockets import connect_unix

T = TypeVar("T")

START_SECONDS: Final = 20.0
"""How long a supervisor may take until it listens."""

STOP_SECONDS: Final = 5.0
"""How long a supervisor may take to end what runs in it, before that is done for it."""

FROZEN_SECONDS: Final = 25 * 3600.0
"""How long a sandbox may be frozen before it is ended: more than the day for which a run's waits for its worker."""

TAG: Final = "RIDETHROUGH_SANDBOX"
"""In the environment of all that runs in a local sandbox: how that is found when its supervisor is dead."""

FROZEN_TAG: Final = "RIDETHROUGH_FROZEN"
"""In the environment of what waits for a frozen sandbox to have been that for too long; it is not in the sandbox."""

_LONGEST_SOCKET: Final = 100
_WRAPPED: Final = """
folder=$1 tag=$2; shift 2
after() {
    for round in 1 2 3 4 5; do
        found=$(grep -ls -- "$tag" /proc/[0-9]*/environ)  # its status is that of a failure if any process has ended
        [ "$found" ] || break
        for each in $found; do each=${each#/proc/}; kill -KILL "${each%/environ}"; done
    done
    rm -rf -- "$folder"
}
{ env "$tag" "$@"; after; } </dev/null >/dev/null 2>&1 & echo $!
"""
_FROZEN: Final = """
shell=$1 born=$2 supervisor=$3 seconds=$4
{
    sleep "$seconds" && read -r line <"/proc/$shell/stat" || exit
    set -- ${line##*) }
    [ "$1 ${20}" = "T $born" ] && kill -KILL "$supervisor" && kill -CONT "$shell"
} </dev/null >/dev/null 2>&1 &
"""
"""Ends the supervisor of a sandbox whose shell is still stopped after that time, and lets the shell do the rest. While
the shell is stopped it waits for nobody, so the number is still its supervisor's."""

_log = logging.getLogger(__name__)
_State = Literal["created", "running", "paused", "exited"]


@dataclass(frozen=True, slots=True)
class Local:
    """What is on record of a local sandbox; ``born`` is when its shell was started, in the kernel's count, so that
    another process of the same number is not taken for it. ``port`` is where its proxy listens, if it has one."""

    id: str
    profile: str
    created_at: float
    tag: str
    linger: float
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    port: int = 0
    pid: int = 0
    born: int = 0


class LocalHost(Host):
    """This machine, as a host of sandboxes that protect nothing. ``LocalHost.open`` makes one."""

    def __init__(self, group: TaskGroup, runtime: Path, relay_for: RelayFor | None) -> None:
        """``runtime`` is where its sandboxes are on record."""
        self.name = f"local:{socket.gethostname()}"
        self.boundary = False
        self.runtime = runtime
        self._group = group
        self._relay_for = relay_for
        self._attached: dict[str, AttachedSandbox] = {}

    @classmethod
    @asynccontextmanager
    async def open(
        cls, *, relay_for: RelayFor | None = None, runtime: Path | str | None = None
    ) -> AsyncGenerator[LocalHost]:
        """A host whose readers live until the end of the block.

        Args:
            relay_for: Serves what goes out through the proxy, for profiles with a network.
            runtime: Where its sandboxes are on record; a folder of the user's when left out.

        Raises:
            SandboxUnavailable: this machine has no Linux, or the folder belongs to somebody else.
        """
        _log.warning("local sandboxes are no security boundary: what runs in them runs as you, on this machine")
        folder = await _in_thread(lambda: _runtime_folder(runtime))
        failure: BaseException | None = None
        async with anyio.create_task_group() as group:
            host = cls(group, folder, relay_for)
            try:
                yield host
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as error:  # out of the group as it is, not in a group of its own
                failure = error
            finally:
                await host.aclose()
        if failure is not None:
            raise failure

    # --- the port ---------------------------------------------------------------------------------------------------

    async def create(
        self,
        profile: SandboxProfile,
        *,
        id: str,
        labels: Mapping[str, str] | None = None,
        linger: float = 30.0,
    ) -> AttachedSandbox:
        """As ``Host.create``."""
        port = await _in_thread(_free_port) if profile.network else 0
        local = Local(id, profile.name, time.time(), secrets.token_hex(8), linger, dict(labels or {}), port)
        folder = self._folder(id)
        with anyio.CancelScope(shield=True):  # whether it was made is known, whoever is cancelled
            await _in_thread(lambda: _make(folder, local))
        try:
            started = await _in_thread(lambda: _start(folder, local))
            return await self._attach(profile, started)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await _in_thread(lambda: _remove(folder, _read(folder) or local))
            if isinstance(error, SandboxGone | OSError | ValueError | subprocess.SubprocessError):
                raise SandboxUnavailable(f"The local sandbox {id} did not start: {error}") from error
            raise

    async def attach(self, profile: SandboxProfile, id: str) -> AttachedSandbox:
        """As ``Host.attach``."""
        local = await self._living(id)
        await _in_thread(lambda: _thaw(local))
        return await self._attach(profile, local)

    async def remove(self, id: str) -> bool:
        """As ``Host.remove``."""
        folder = self._folder(id)
        local = await _in_thread(lambda: _read(folder))
        self._attached.pop(id, None)
        return await _in_thread(lambda: _remove(folder, local))

    async def end(self, local: Local) -> bool:
        """Remove a sandbox that is known, even where its supervisor has died and its record is gone."""
        self._attached.pop(local.id, None)
        return await _in_thread(lambda: _remove(self._folder(local.id), local))

    async def pause(self, id: str) -> None:
        """As ``Host.pause``."""
        local = await self._living(id)
        await _in_thread(lambda: _freeze(self._folder(id), local))

    async def resume(self, id: str) -> None:
        """Let a sandbox go on.

        Raises:
            SandboxGone: there is none of that id.
        """
        local = await self._living(id)
        await _in_thread(lambda: _thaw(local))

    async def found(self) -> Sequence[Found]:
        """As ``Host.found``."""
        return await _in_thread(lambda: [_found(local) for local in _all(self.runtime)])

    async def aclose(self) -> None:
        """As ``Host.aclose``."""
        attached, self._attached = list(self._attached.values()), {}
        with anyio.CancelScope(shield=True):
            for sandbox in attached:
                await sandbox.detach()

    # --- its parts --------------------------------------------------------------------------------------------------

    async def _attach(self, profile: SandboxProfile, local: Local) -> AttachedSandbox:
        folder = self._folder(local.id)
        stream = await _connected(folder, local)
        sandbox = await attach_to(
            stream,
            self._group,
            id=local.id,
            profile=profile,
            boundary=False,
            runtime="local",
            hold=_LocalHold(self, profile, local),
            linger=local.linger,
            relay=self._relay_for(profile, local.id) if self._relay_for is not None and profile.network else None,
            workspace=str(folder / "workspace"),
            environment=_environment(folder),
            proxy=f"http://127.0.0.1:{local.port}",
        )
        sandbox.python_argv = (sys.executable,)
        self._attached[local.id] = sandbox
        return sandbox

    async def _living(self, id: str) -> Local:
        local = await _in_thread(lambda: _read(self._folder(id)))
        if local is None or not _is_alive(local):
            raise SandboxGone(f"There is no local sandbox {id} any more: it was removed, or its timer has run out.")
        return local

    def _folder(self, id: str) -> Path:
        """Where a sandbox is: an id may be long, and have any characters."""
        return self.runtime / hashlib.sha256(id.encode("utf-8", "replace")).hexdigest()[:20]


@dataclass(frozen=True, slots=True)
class _LocalHold:
    """What a local host does for a sandbox from outside."""

    host: LocalHost
    profile: SandboxProfile
    local: Local

    async def pause(self) -> None:
        await self.host.pause(self.local.id)

    async def resume(self) -> None:
        await self.host.resume(self.local.id)

    async def remove(self) -> bool:
        return await self.host.end(self.local)

    async def another(self) -> Sandbox:
        id = f"{self.local.id}-{secrets.token_hex(4)}"
        return await self.host.create(self.profile, id=id, labels=self.local.labels, linger=self.local.linger)

    async def exec_as(self, user: str, argv: Sequence[str], **_: Any) -> ExecResult:
        raise SandboxError(
            f"A local sandbox runs everything as the user that runs this program; {argv[0]} cannot be run as {user}. "
            "Leave user= out, or use a profile of kind docker"
        )


def _environment(folder: Path) -> dict[str, str]:
    """Of every call: nothing of this process's own but where programs are, for the rest may be secret."""
    programs = os.pathsep.join(dict.fromkeys([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]))
    return {**ENVIRONMENT, "PATH": programs, "TMPDIR": str(folder / "tmp")}


async def _in_thread(function: Callable[[], T]) -> T:
    """Do what touches the disk and other processes beside the loop."""
    return await anyio.to_thread.run_sync(function)


async def _connected(folder: Path, local: Local) -> ByteStream:
    """A connection to a supervisor that may still be starting."""
    address, deadline = str(folder / "socket"), anyio.current_time() + START_SECONDS
    while True:
        try:
            return await connect_unix(address)
        except OSError as error:
            if not _is_alive(local) or anyio.current_time() > deadline:
                raise SandboxGone(f"The supervisor of the local sandbox {local.id} does not listen: {error}") from error
        await anyio.sleep(0.005)


# --- on disk --------------------------------------------------------------------------------------------------------


def _runtime_folder(given: Path | str | None) -> Path:
    """The folder of local sandboxes, made where it is missing, and nobody else's."""
    if not sys.platform.startswith("linux"):
        raise SandboxUnavailable("Local sandboxes need Linux (their supervisor uses epoll and /proc); use Docker")
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(given) if given is not None else Path(base) / f"ridethrough-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=given is not None, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise SandboxUnavailable(
            f"{folder} must be a folder of this user that nobody else may look into (mode 0700); remove it, or set "
            "XDG_RUNTIME_DIR to another one"
        )
    if len(str(folder)) + 30 > _LONGEST_SOCKET:
        raise SandboxUnavailable(f"{folder} is too long a name for sockets; set XDG_RUNTIME_DIR to a shorter one")
    return folder.resolve()


def _make(folder: Path, local: Local) -> None:
    """Make the folder of a sandbox, with its record."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise SandboxUnavailable(f"There is a local sandbox {local.id} already; attach to it, or remove it") from None
    for name in ("workspace", "tmp"):
        (folder / name).mkdir(mode=0o700)
    _write(folder, local)


def _start(folder: Path, local: Local) -> Local:
    """Start a supervisor in a session of its own, below a shell that clears up after it."""
    serve = ["serve", "--local", "--socket", str(folder / "socket"), "--linger", str(local.linger)]
    folders = ["--workspace", str(folder / "workspace"), "--tmp", str(folder / "tmp")]
    proxy = ["--proxy", str(local.port)] if local.port else []
    supervisor = [sys.executable, "-I", str(Path(frames.__file__).with_name("supervisor.py")), *serve, *folders, *proxy]
    done = subprocess.run(
        ["/bin/sh", "-c", _WRAPPED, "sh", str(folder), f"{TAG}={local.tag}", *supervisor],
        env={**_environment(folder), "HOME": str(folder / "workspace")},
        cwd="/",
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=START_SECONDS,
        check=True,
    )
    pid = int(done.stdout)
    started = replace(local, pid=pid, born=_born(pid))
    _write(folder, started)
    return started


def _free_port() -> int:
    """A port that nobody listens on: all local sandboxes share this machine's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write(folder: Path, local: Local) -> None:
    """Put a record into its place as a whole; one whose folder is gone already needs none."""
    with suppress(FileNotFoundError):
        part = folder / "state.part"
        part.write_text(json.dumps(asdict(local)))
        part.replace(folder / "state.json")


def _read(folder: Path) -> Local | None:
    """The record of a sandbox, if there is one."""
    try:
        return Local(**json.loads((folder / "state.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _all(runtime: Path) -> Iterator[Local]:
    for folder in sorted(runtime.iterdir()):
        local = _read(folder)
        if local is not None:
            yield local


# --- processes ------------------------------------------------------------------------------------------------------


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _stat_of(pid: int) -> list[str]:
    """The fields of a process after its name; nothing if it is not there."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _born(pid: int) -> int:
    fields = _stat_of(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def _is_alive(local: Local) -> bool:
    """Whether its shell is there, and so its supervisor: the one ends right after the other."""
    fields = _stat_of(local.pid) if local.pid else []
    return bool(fields) and int(fields[19]) == local.born and fields[0] != "Z"


def _found(local: Local) -> Found:
    return Found(local.id, local.profile, _state(local), local.created_at, local.labels, "local")


def _state(local: Local) -> _State:
    if not local.pid:
        return "created"
    if not _is_alive(local):
        return "exited"
    return "paused" if _stat_of(local.pid)[0] == "T" else "running"


def _members(local: Local) -> list[int]:
    """All processes of a sandbox: they have its tag in their environment. The shell comes last, and one that has
    cleared its environment is found by its parents, as long as it has some in here."""
    tag = f"{TAG}={local.tag}".encode()
    parents = {pid: _stat_of(pid) for pid in _processes()}
    ours = {pid for pid in parents if tag in _environ(pid)} | ({local.pid} if _is_alive(local) else set[int]())
    while new := {pid for pid, fields in parents.items() if pid not in ours and fields and int(fields[1]) in ours}:
        ours |= new
    ours -= {os.getpid(), 0}
    return sorted(ours, key=lambda pid: (pid == local.pid, pid))


def _environ(pid: int) -> Sequence[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ()


def _signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _freeze(folder: Path, local: Local) -> None:
    """Stop all that runs: the signal takes a moment, in which something may be started."""
    _end_waiter(local)
    _start_waiter(folder, local)  # first, since this process may die at any time
    deadline = time.monotonic() + STOP_SECONDS
    while (members := [pid for pid in _members(local) if _stat_of(pid)[:1] not in (["T"], ["Z"], [])]) and (
        time.monotonic() < deadline
    ):
        _signal_all(members, signal.SIGSTOP)
        time.sleep(0.001)


def _thaw(local: Local) -> None:
    """Let all go on."""
    _end_waiter(local)
    _signal_all(_members(local), signal.SIGCONT)


def _start_waiter(folder: Path, local: Local) -> None:
    """Start what ends the sandbox if it stays frozen, whatever becomes of this process."""
    known = [str(local.pid), str(local.born), str(_supervisor(local)), f"{max(local.linger, FROZEN_SECONDS):g}"]
    subprocess.run(
        ["/bin/sh", "-c", _FROZEN, "sh", *known],
        env={**_environment(folder), FROZEN_TAG: local.tag},
        cwd="/",
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        timeout=START_SECONDS,
        check=True,
    )


def _supervisor(local: Local) -> int:
    """The one child that the shell has.

    Raises:
        SandboxGone: it has just ended.
    """
    for pid in _processes():
        fields = _stat_of(pid)
        if fields and int(fields[1]) == local.pid:
            return pid
    raise SandboxGone(f"The supervisor of the local sandbox {local.id} has ended.")


def _end_waiter(local: Local) -> None:
    """End what waits for a frozen sandbox, a shell and its ``sleep``."""
    tag, deadline = f"{FROZEN_TAG}={local.tag}".encode(), time.monotonic() + STOP_SECONDS
    while (found := [pid for pid in _processes() if tag in _environ(pid)]) and time.monotonic() < deadline:
        _signal_all(found, signal.SIGKILL)
        time.sleep(0.001)


def _remove(folder: Path, local: Local | None) -> bool:
    """End a sandbox and take its folder away; whether there was one."""
    was_there = folder.is_dir()
    if local is not None:
        _end_waiter(local)
        _stop(local)
    shutil.rmtree(folder, ignore_errors=True)
    return was_there


def _stop(local: Local) -> None:
    """Freeze all, so that nothing is started meanwhile, and kill it."""
    deadline = time.monotonic() + STOP_SECONDS
    while (members := [pid for pid in _members(local) if _is_running(pid)]) and time.monotonic() < deadline:
        for number in (signal.SIGSTOP, signal.SIGKILL):
            _signal_all(members, number)
        time.sleep(0.002)


def _is_running(pid: int) -> bool:
    fields = _stat_of(pid)
    return bool(fields) and fields[0] not in "ZX"
