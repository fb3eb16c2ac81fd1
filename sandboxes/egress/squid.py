"""One squid process: started, watched, and gone with whoever started it.

It listens on a port of loopback, which every program of the machine can connect to. So the relay gives each connection
a source address by the PROXY protocol, out of a range of 2^32 that nobody else knows; squid serves no other. The last
32 bits say whose connection it is, and stand in the log beside what was decided.

Its configuration has secrets. They are on disk for the tenth of a second that squid needs to start, in a folder that
only its user can read.
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import Process, SocketStream

from ridethrough.runtime.errors import SandboxUnavailable
from ridethrough.sandboxes.egress.audit import Line
from ridethrough.sandboxes.egress.policy import Policy
from ridethrough.sandboxes.egress.rules import PAGES, Place, configuration

START_SECONDS: Final = 30.0
"""What it may take to start; a tenth of a second on a machine with nothing else to do."""

STOP_SECONDS: Final = 5.0

INSTALL: Final = "install Debian's `squid-openssl` (apt-get install squid-openssl openssl ca-certificates)"

_USERS: Final = ("proxy", "squid", "nobody")
GUARD: Final = """
folder=$1; shift
end() { rm -rf "$folder"; kill -KILL 0; }
exec 3<&0
"$@" 3<&- </dev/null &
squid=$!
(trap '' TERM; read -r nothing <&3; end) >/dev/null 2>&1 &
exec 3<&-
wait "$squid"
end
"""
"""Its standard input is a pipe that ends with this process, however that ends: then squid is killed.

Squid, the shell that waits for it and the one that waits for this process are a group. Whichever shell sees an end
first takes the folder away and kills the group, itself with it. No number of a process is kept for that: squid's may be
somebody else's when it is needed, but the group of a shell that lives is its own.
"""

_LONGEST_LINE: Final = 16 * 1024
_LONGEST_SAID: Final = 500
_WITH_SECRET: Final = re.compile(r"(request_header_add \S+).*")
"""A line of the configuration that squid quotes: escaped or cut, the secret in it would not be found."""

_NAP: Final = 0.005

OURS: Final = 0
"""The number of our own connections."""

OnLine = Callable[[int, Line], None]
"""Told of the number of a connection and what was logged of it."""


@dataclass(frozen=True, slots=True)
class Programs:
    """The programs that are needed."""

    squid: str
    openssl: str

    @classmethod
    def find(cls, squid: str | None = None) -> Programs:
        """Look for them; ``squid`` is a path, or a name on the path.

        Raises:
            SandboxUnavailable: one is missing.
        """
        return cls(_program(squid or "squid"), _program("openssl"))


def _program(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))
    if found is None:
        raise SandboxUnavailable(f"a sandbox with a network needs the program {name}, which is not here: {INSTALL}")
    return found


@dataclass(frozen=True, slots=True)
class Options:
    """What all proxies of an ``Egress`` share."""

    binary: str | None = None
    hosts_file: Path | None = None
    cafile: Path | None = None
    nameservers: tuple[str, ...] = ()
    patience: int = 15


@dataclass(slots=True)
class Squid:
    """A running squid. ``running`` makes one.

    Attributes:
        unlogged: The connections, by number and port, of which nothing stands in its log yet.
        said: Its last messages.
    """

    place: Place
    process: Process
    log: int
    secrets: tuple[str, ...] = field(repr=False)
    said: deque[str] = field(default_factory=lambda: deque[str](maxlen=20))
    unlogged: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])
    _part: bytes = b""
    _last_port: int = 0

    async def connect(self, number: int) -> SocketStream:
        """Open a connection in the name of ``number``.

        Raises:
            OSError: it does not listen any more.
        """
        self._last_port = port = self._last_port % 65535 + 1
        stream = await anyio.connect_tcp("127.0.0.1", self.place.port)
        try:
            await stream.send(f"PROXY TCP6 {self.place.client(number)} ::1 {port} 3128\r\n".encode())
        except BaseException:
            await anyio.aclose_forcefully(stream)
            raise
        self.unlogged.add((number, port))
        return stream

    def _number(self, line: Line) -> int | None:
        """Whose line it is; ``None`` for one of a stranger's connection."""
        number = line.client - int(self.place.client(0))
        return number if 0 <= number < 2**32 else None

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.process.returncode is None

    async def watch(self, on_line: OnLine) -> None:
        """Give every line of its log, until it ends."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._listen)
            tasks.start_soon(self._read, on_line)
            await self.process.wait()
            tasks.cancel_scope.cancel()
        self._rest(on_line)

    def last_words(self) -> str:
        """What it said at the end, without secrets."""
        text = " / ".join(_WITH_SECRET.sub(r"\1 ...", line) for line in self.said) or "it said nothing"
        for secret in self.secrets:
            text = text.replace(secret, "...")
        return text

    async def _listen(self) -> None:
        assert self.process.stderr is not None
        async for piece in self.process.stderr:
            self.said.extend(_lines(piece))

    async def _read(self, on_line: OnLine) -> None:
        while True:
            await anyio.wait_readable(self.log)
            self.take(on_line)

    def _rest(self, on_line: OnLine) -> None:
        while self.take(on_line):
            pass

    def take(self, on_line: OnLine) -> bool:
        """Read what there is now; whether there was anything."""
        try:
            piece = os.read(self.log, 65536)
        except BlockingIOError:
            return False
        *lines, self._part = (self._part + piece).split(b"\n")
        self._part = self._part[-_LONGEST_LINE:]
        for line in lines:
            parsed = Line.parse(line.decode("utf-8", "replace"))
            if parsed is not None and (number := self._number(parsed)) is not None and not parsed.is_prelude:
                self.unlogged.discard((number, parsed.client_port))
                on_line(number, parsed)
        return True


def _lines(piece: bytes) -> list[str]:
    """What is worth keeping of its messages: that most error pages are not ours but its own is not."""
    lines = (line.strip() for line in piece.decode("utf-8", "replace").splitlines())
    return [line[:_LONGEST_SAID] for line in lines if line and "ERROR: loading file" not in line]


# --- starting and stopping ------------------------------------------------------------------------------------------


@asynccontextmanager
async def running(policy: Policy, options: Options) -> AsyncGenerator[Squid]:
    """Start a squid for a policy; at the end it is gone, with its files.

    Raises:
        SandboxUnavailable: it does not start, with what it says itself.
    """
    programs, user = Programs.find(options.binary), _user()
    with _folder(user) as folder:
        place = Place(
            _free_port(),
            _clients(),
            folder,
            _copy(options.hosts_file, folder, user),
            _copy(options.cafile, folder, user),
            options.nameservers,
            options.patience,
        )
        await _furnish(policy, place, programs, user)
        log = os.open(place.log, os.O_RDWR | os.O_NONBLOCK)  # for writing too: so it has no end while nobody writes
        try:
            async with _process(programs, folder, user) as process:
                squid = Squid(place, process, log, policy.secrets)
                await _ready(squid)
                with suppress(FileNotFoundError):  # squid has ended, and its guard takes the folder away
                    shutil.rmtree(folder)
                yield squid
        finally:
            os.close(log)


def _user() -> pwd.struct_passwd | None:
    """Who it runs as: ``None`` for the user of this process, unless that is root."""
    if os.geteuid() != 0:
        return None
    known = {each.pw_name: each for each in pwd.getpwall()}
    found = next((known[name] for name in _USERS if name in known), None)
    if found is None:
        raise SandboxUnavailable(f"the proxy must not run as root, and there is no user {', '.join(_USERS)}: add one")
    return found


@contextmanager
def _folder(user: pwd.struct_passwd | None) -> Generator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ridethrough-egress-"))
    try:
        _give(folder, user)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _give(path: Path, user: pwd.struct_passwd | None) -> None:
    if user is not None:
        os.chown(path, user.pw_uid, user.pw_gid)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _clients() -> str:
    """A range of private addresses (RFC 4193) that cannot be guessed: 88 bits of it are random."""
    first = b"\xfd" + secrets.token_bytes(11) + bytes(4)
    return f"{ipaddress.IPv6Address(first)}/96"


def _copy(file: Path | None, folder: Path, user: pwd.struct_passwd | None) -> Path | None:
    """A file that squid's user may not be able to read."""
    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SandboxUnavailable(f"the proxy of sandboxes needs {file}, which cannot be read: {error}") from None
    copy = folder / f"copy-{file.name}"
    _write(copy, text, user)
    return copy


async def _furnish(policy: Policy, place: Place, programs: Programs, user: pwd.struct_passwd | None) -> None:
    os.mkfifo(place.log, 0o600)
    _give(place.log, user)
    for name, text in PAGES.items():
        _write(place.folder / name, f"{text}\n", user)
    _write(place.folder / "unused.pem", await _certificate(programs.openssl), user)
    _write(place.folder / "squid.conf", configuration(policy, place), user)


def _write(path: Path, text: str, user: pwd.struct_passwd | None) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    _give(path, user)


async def _certificate(openssl: str) -> str:
    """A key and a certificate that squid asks for and never uses, because it decrypts nothing."""
    command = [openssl, "req", "-x509", "-nodes", "-days", "3650", "-subj", "/CN=unused", "-newkey", "ec"]
    command += ["-pkeyopt", "ec_paramgen_curve:prime256v1", "-keyout", "-", "-out", "-"]
    with anyio.fail_after(START_SECONDS):
        return (await anyio.run_process(command, stderr=subprocess.DEVNULL)).stdout.decode()


@asynccontextmanager
async def _process(programs: Programs, folder: Path, user: pwd.struct_passwd | None) -> AsyncGenerator[Process]:
    squid = [programs.squid, "-N", "-d1", "-f", str(folder / "squid.conf")]
    process = await anyio.open_process(
        ["/bin/sh", "-c", GUARD, "ridethrough-egress", str(folder), *squid],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd="/",
        env={"PATH": os.defpath, "LC_ALL": "C"},
        start_new_session=True,
        user=None if user is None else user.pw_uid,
        group=None if user is None else user.pw_gid,
        extra_groups=None if user is None else [],
    )
    try:
        yield process
    finally:
        with anyio.CancelScope(shield=True):
            await _end(process)


async def _end(process: Process) -> None:
    """Close its standard input, at which the guard kills squid; if that does not help, or there is no guard any more,
    kill all of them."""
    assert process.stdin is not None
    await process.stdin.aclose()
    with anyio.move_on_after(STOP_SECONDS):
        await process.wait()
    _kill_group(process)
    await process.aclose()


def _kill_group(process: Process) -> None:
    """Kill what is left of a process's group, unless the process has been waited for and its number is somebody else's
    by now. While there is anything left of the group nobody is given its number.
    """
    if process.returncode is None or not Path(f"/proc/{process.pid}").exists():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


async def _ready(squid: Squid) -> None:
    """Wait until it has logged a request of ours: a stranger who listens on its port in its place cannot do that."""
    with anyio.move_on_after(START_SECONDS):
        if await _listens(squid):
            stream = await squid.connect(OURS)
            async with stream:
                await stream.send(request("ready"))
                while squid.unlogged:
                    await anyio.wait_readable(squid.log)
                    squid.take(lambda number, line: None)
            return
    raise SandboxUnavailable(
        f"the proxy of sandboxes did not start: {squid.last_words()}. If it knows no ssl-bump, {INSTALL}"
    )


async def _listens(squid: Squid) -> bool:
    """Wait until it listens, which is some time after it says so; false if it has ended."""
    assert squid.process.stderr is not None
    async for piece in squid.process.stderr:
        lines = _lines(piece)
        squid.said.extend(lines)
        if any("Accepting" in line and "HTTP Socket" in line for line in lines):
            break
    while squid.alive:
        with suppress(OSError):
            await anyio.aclose_forcefully(await anyio.connect_tcp("127.0.0.1", squid.place.port))
            return True
        await anyio.sleep(_NAP)
    return False


def request(name: str) -> bytes:
    """A request that is refused, and so stands in the log with ``name`` in it."""
    return f"GET http://{name}.invalid/ HTTP/1.1\r\nConnection: close\r\n\r\n".encode()
