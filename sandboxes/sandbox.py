"""The port: what every sandbox can do, wherever it runs.

Two implementations stand behind it: containers of a Docker engine (``docker.py``) and, for machines without one, a
child process (``local.py``), which is no boundary and says so. One conformance suite runs against both.

The line between results and errors is the same everywhere. What a command did is a result, however ugly: a status, a
signal, a limit that ended it. What happened to the sandbox or to the deadline is an error.

    SandboxTimeout      the deadline has passed; everything that the call had started was ended
    SandboxGone         the sandbox does not exist any more (removed, killed from inside, its host is down)
    SandboxUnavailable  no sandbox can be started, with the reason and what to do
    SandboxError        the request itself cannot be met (a path outside of the workspace, no such file)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from anyio.abc import ByteStream

if TYPE_CHECKING:
    from ridethrough.sandboxes.profile import SandboxProfile

Limit = Literal["memory", "pids", "disk", "output"]
Stream = Literal["stdout", "stderr", "control"]

DEFAULT_TIMEOUT: Final = 60.0
"""Seconds of a call that names no deadline: there is none without one."""

KEEP_OUTPUT: Final = 1024 * 1024
"""Bytes of each stream that are kept: the first and the last half of what was written."""

OUTPUT_LIMIT: Final = 64 * 1024 * 1024
"""Bytes of both streams together after which a call is ended with ``limit = "output"``."""


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What a command did.

    Attributes:
        exit_code: Its status; 128 + n when signal n ended it, as shells have it.
        stdout_bytes: What it wrote, from the start; the middle is left out where ``truncated``.
        stderr_bytes: Likewise.
        truncated: Whether anything of either stream was left out.
        limit: The limit that ended it, ``None`` if none did.
        seconds: From start to end, by the sandbox's clock.
        stdout_total: Bytes written to standard output, kept or not.
        stderr_total: Likewise for standard error.
    """

    exit_code: int
    stdout_bytes: bytes = b""
    stderr_bytes: bytes = b""
    truncated: bool = False
    limit: Limit | None = None
    seconds: float = 0.0
    stdout_total: int = 0
    stderr_total: int = 0

    @property
    def stdout(self) -> str:
        """Standard output as text; what is no UTF-8 is replaced."""
        return self.stdout_bytes.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        """Standard error as text; what is no UTF-8 is replaced."""
        return self.stderr_bytes.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Output:
    """A piece of output while a command runs; ``offset`` counts the bytes of its stream before it."""

    stream: Stream
    data: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One entry of a folder. ``path`` is relative to the workspace (absolute below ``/tmp``); ``size`` in bytes,
    ``modified`` in seconds since 1970."""

    path: str
    kind: Literal["file", "directory", "link", "other"]
    size: int
    modified: float
    mode: int = 0o644


@dataclass(frozen=True, slots=True)
class Listing:
    """Entries in order of their paths; ``more`` says that there are further ones after the last."""

    entries: tuple[FileInfo, ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """Something that ``watch`` saw."""

    kind: Literal["created", "modified", "removed"]
    path: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The workspace at one moment: a gzipped tar, so that a person can look into it.

    Attributes:
        data: The archive.
        digest: SHA-256 of ``data``, hexadecimal.
        files: How many entries it has.
        profile: Name of the profile that it was taken from.
    """

    data: bytes = field(repr=False)
    digest: str
    files: int
    profile: str


class Process(ABC):
    """A process that goes on while its caller does something else: ``Sandbox.start``.

    It is ended when its deadline passes, when it is killed, and with its sandbox; never by its caller's going away.
    """

    call_id: str

    @abstractmethod
    def output(self) -> AsyncIterator[Output]:
        """Its output from the start (what is still kept of it), then as it comes, until it ends."""

    @abstractmethod
    async def write(self, data: bytes) -> None:
        """Write to its standard input.

        Raises:
            SandboxError: it takes no input, has closed it, or has ended.
        """

    @abstractmethod
    async def close_stdin(self) -> None:
        """End its standard input."""

    @abstractmethod
    async def signal(self, number: int) -> None:
        """Send a signal to its process group."""

    @abstractmethod
    async def kill(self) -> None:
        """End it and everything that it has started."""

    @abstractmethod
    async def wait(self) -> ExecResult:
        """Wait for its end.

        Raises:
            SandboxTimeout: its deadline has passed.
            SandboxGone: the sandbox went away under it.
        """


class Session(ABC):
    """An interpreter that keeps its state between calls: ``Sandbox.python`` and ``Sandbox.shell``."""

    @abstractmethod
    async def run(self, code: str, *, timeout: float = DEFAULT_TIMEOUT) -> ExecResult:
        """Run code in it. In Python the value of a last expression is printed as at the prompt, and an exception gives
        exit code 1 with its traceback on standard error; the session goes on after either.

        Raises:
            SandboxTimeout: the deadline has passed; the session's state is lost, the next call begins a new one.
            SandboxGone: the sandbox went away.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """End it."""


class Sandbox(ABC):
    """A place where code that a model wrote can do no harm. The working directory of every call is the workspace.

    Attributes:
        id: Names it for as long as it lives; any worker of its host can attach to it.
        profile: What it was made from.
        boundary: Whether it protects anything: false for ``local``.
        runtime: What runs it: ``runc``, ``runsc`` or ``local``.
    """

    id: str
    profile: SandboxProfile
    boundary: bool
    runtime: str

    @property
    def ended(self) -> bool:
        """Whether nothing can be asked through this object any more; attaching anew may still find the sandbox."""
        return False

    # --- commands ---------------------------------------------------------------------------------------------------

    @abstractmethod
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
        """Run a command to its end; whatever it leaves running is ended with it.

        Args:
            argv: The command and its arguments; no shell reads it.
            timeout: Seconds until it is ended: SIGTERM to its group, after a moment SIGKILL to all that belongs to it,
                and if that does not help the whole sandbox.
            stdin: Its standard input; empty when left out.
            env: Added to the profile's environment.
            cwd: Where to run it, relative to the workspace.
            user: Another user than the profile's; never root unless the profile is.
            keep_output: Bytes of each stream that are kept.
            call_id: Names the call: the same id again gives the result of the first, finished or still running, and
                starts nothing. This is how a resumed worker gets what finished while it was away. A call without one
                is ended when its caller is cancelled; one with an id goes on, and ``kill`` ends it.

        Raises:
            SandboxTimeout: the deadline has passed (``.result`` has what it had written).
            SandboxGone: the sandbox went away.
            SandboxError: it cannot be started: no such program, no such folder.
        """

    @abstractmethod
    def exec_stream(
        self,
        argv: Sequence[str],
        *,
        timeout: float = DEFAULT_TIMEOUT,
        stdin: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        call_id: str | None = None,
    ) -> AsyncIterator[Output | ExecResult]:
        """Run a command and give its output as it comes; the last item is the ``ExecResult``. A slow reader slows the
        command down; a reader that leaves ends it.

        Raises:
            SandboxTimeout, SandboxGone, SandboxError: as for ``exec``.
        """

    @abstractmethod
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
        """Start a process in the background, for at most ``timeout`` seconds.

        With ``flow`` it waits for whoever reads its output while somebody is attached, as a protocol needs it; without
        it never waits, and a slow reader misses the middle.

        Raises:
            SandboxGone, SandboxError: as for ``exec``.
        """

    @abstractmethod
    def python(self, *, env: Mapping[str, str] | None = None) -> AbstractAsyncContextManager[Session]:
        """A Python interpreter that keeps its variables."""

    @abstractmethod
    def shell(self, *, env: Mapping[str, str] | None = None) -> AbstractAsyncContextManager[Session]:
        """A shell (bash where there is one) that keeps its folder and variables."""

    @abstractmethod
    async def forget(self, call_ids: Sequence[str]) -> None:
        """The results of these calls have been taken and kept: they need not be kept here."""

    @abstractmethod
    async def kill(self, call_id: str) -> None:
        """End a call and everything that it has started; nothing if it has ended, or never began."""

    # --- files ------------------------------------------------------------------------------------------------------
    # Paths are relative to the workspace, or absolute below it or below /tmp. Links that lead elsewhere, and what is no
    # regular file, are refused with SandboxError; a missing file raises SandboxFileNotFound.

    @abstractmethod
    async def read(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        """A file's bytes, at most ``limit`` of them from ``offset``.

        Raises:
            SandboxFileNotFound: there is none.
            SandboxError: it cannot be read, or is larger than the profile's disk without a ``limit``.
        """

    @abstractmethod
    async def write(self, path: str, data: bytes | str, *, append: bool = False, mode: int | None = None) -> int:
        """Write a file, whole or not at all (unless ``append``), with the folders above it; give its size.

        Raises:
            SandboxError: it cannot be written; a full disk says so.
        """

    @abstractmethod
    async def list(self, path: str = ".", *, recursive: bool = False, after: str = "", limit: int = 1000) -> Listing:
        """The entries below a folder, in order of their paths, from the one after ``after``."""

    @abstractmethod
    async def stat(self, path: str) -> FileInfo:
        """One entry, without following a link."""

    @abstractmethod
    async def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it."""

    @abstractmethod
    def watch(self, path: str = ".") -> AsyncIterator[Change]:
        """What changes below a folder, from now on; seen within about a second."""

    # --- the whole --------------------------------------------------------------------------------------------------

    @abstractmethod
    async def pause(self) -> None:
        """Freeze everything in it; it keeps its memory and uses no CPU. Calls wait until ``resume``."""

    @abstractmethod
    async def resume(self) -> None:
        """Let it go on."""

    @abstractmethod
    async def snapshot(self) -> Snapshot:
        """The workspace as an archive.

        Raises:
            SandboxError: it is larger than ``profile.snapshot_limit``.
        """

    @abstractmethod
    async def restore(self, snapshot: Snapshot) -> None:
        """Make the workspace what it was; what it has now is removed."""

    @abstractmethod
    async def fork(self) -> Sandbox:
        """Another sandbox of the same profile with a copy of the workspace; the caller closes it."""

    @abstractmethod
    async def aclose(self) -> None:
        """Remove it with all that is in it. Closing twice is fine."""

    @abstractmethod
    async def outlive(self, seconds: float) -> None:
        """How long it lives on from now on while nobody is attached, where it has a timer of its own."""

    @abstractmethod
    async def detach(self) -> None:
        """Let go of it without removing it: another worker may attach, until its self-destruct timer runs out."""


@dataclass(frozen=True, slots=True)
class Found:
    """A sandbox that a host has, whoever made it. ``labels`` are those that it was made with."""

    id: str
    profile: str
    state: Literal["created", "running", "paused", "exited"]
    created_at: float
    labels: Mapping[str, str]
    runtime: str = ""


class Host(ABC):
    """Where sandboxes live: a Docker engine, or this machine's processes.

    Attributes:
        name: The same for every process that can attach to its sandboxes (``docker:`` and the engine's id).
        boundary: Whether its sandboxes protect anything.
    """

    name: str
    boundary: bool

    @abstractmethod
    async def create(
        self,
        profile: SandboxProfile,
        *,
        id: str,
        labels: Mapping[str, str] | None = None,
        linger: float = 30.0,
    ) -> Sandbox:
        """Start a sandbox and attach to it. ``linger``: seconds it lives on while nobody is attached.

        Raises:
            SandboxUnavailable: it cannot be started (no engine, no image, ...); nothing is left behind.
        """

    @abstractmethod
    async def attach(self, profile: SandboxProfile, id: str) -> Sandbox:
        """Attach to a sandbox that runs (resuming it if it is paused), in place of whoever was attached before.

        Raises:
            SandboxGone: there is none of that id, or it has ended.
            SandboxUnavailable: the host cannot be asked now.
        """

    @abstractmethod
    async def remove(self, id: str) -> bool:
        """Remove a sandbox in whatever state; whether there was one. For a container that was never started too."""

    @abstractmethod
    async def pause(self, id: str) -> None:
        """Freeze a sandbox by its id, attached or not."""

    @abstractmethod
    async def found(self) -> Sequence[Found]:
        """All sandboxes of the project on this host, whoever made them."""

    @abstractmethod
    async def aclose(self) -> None:
        """Detach from all; remove nothing."""


Relay = Callable[[ByteStream], Awaitable[None]]
"""Serves one connection that a program in the sandbox has opened to its proxy, until either side ends it."""

RelayFor = Callable[["SandboxProfile", str], Relay]
"""The relay of a sandbox, by its profile and its id: what it may reach, and in whose name it is recorded."""
