# ruff: noqa: SIM105
"""What runs inside a sandbox: starts commands, keeps what they write, and ends all that they leave behind.

    supervisor.py serve --socket PATH --workspace DIR --tmp DIR [--linger S] [--proxy [PORT]] [--local]
    supervisor.py bridge --socket PATH

``serve`` is the main process of a container (below its init), or a child process where there are no containers
(``--local``: nothing is touched there that it has not started). It listens on a unix socket and outlives the hosts
that attach to it, so that results wait for whoever comes next; with nobody attached for ``linger`` seconds it ends,
and the container with it. ``bridge`` joins standard input and output to the socket, and runs in one long exec.

This file is alone there: it goes to images that have nothing but Python 3.8 and its standard library, as the text of
``python3 -c``. So it carries its own copy of the codec of ``frames.py``, where the wire is described, and imports
little: from a start to its first frame it takes some 20 ms where it lies compiled, 50 as a text.

One thread and one loop (epoll, SIGCHLD by a wakeup descriptor). What takes long is a generator that says for how many
seconds it wants to rest; so a folder with 100,000 files holds up no other call. Nothing in here waits for a process,
a pipe or the host.

What runs beside it is hostile and has the same user. It can kill the supervisor (the container ends, and the host sees
that); it cannot attach to it as a host (its connections are told by their process), nor trace it (it is not dumpable).
To find what a call has left, every process below this one is looked at: the supervisor is a subreaper, so that whatever
forks and detaches itself stays below it. Whose it is tells its line of parents, else its session, else the tag in its
environment; what is nobody's is ended with the next call that ends.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import stat
import struct
import sys
import time
from bisect import bisect_left
from collections import OrderedDict, deque
from functools import partial
from heapq import heappop, heappush

TYPE_CHECKING = False  # the module typing is not needed, and slow
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from typing import Any

    Header = dict[str, Any]
    Task = Generator[float, None, Any]
    Reply = tuple[Header, bytes] | None
    Answer = Reply | Generator[float, None, Reply]

PROTOCOL = 1
MAX_HEADER = 64 * 1024
MAX_BODY = 256 * 1024
WINDOW = 256 * 1024

TAG = "RIDETHROUGH_CALL"
PART = ".ridethrough-part-"
PIECE = 64 * 1024
SPARE = 256 * 1024
SPARE_FLOW = 4 * 1024 * 1024
ROOM = 1024 * 1024  # bytes that may wait for the host before live output is left out
FULL = 8 * 1024 * 1024  # bytes that may wait for it before its requests are not read any more
KEEP_MOST = 16 * 1024 * 1024  # bytes a stream
KEEP_CONTROL = 128 * 1024
RESULTS = 1024
RESULT_BYTES = 32 * 1024 * 1024
STDIN_BYTES = 4 * 1024 * 1024
DRAIN_SECONDS = 0.2
SWEEP_SECONDS = 2.0
TICK = 1.0
FROZEN = 2.0  # a pause of the loop beyond this is no time that went by here: the container was frozen
STREAMS = 64
CANDIDATES = 8
SLICE = 2000  # entries of a folder that are read in one go
NAMES = 200000
WATCHED = 20000
WATCH_SECONDS = 0.5
DEEPEST = 256

LENGTHS = struct.Struct(">II")
ENCODER = json.JSONEncoder(separators=(",", ":"))
NOFOLLOW = os.O_NOFOLLOW | os.O_CLOEXEC
FOLDER = os.O_RDONLY | os.O_DIRECTORY | NOFOLLOW
RESET_SIGNALS = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD]


class Refused(Exception):
    """A request that cannot be met; ``kind`` is one of the wire's."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Breach(Exception):
    """The host does not keep to the wire."""


# --- the wire ------------------------------------------------------------------------------------------------------


def head(header: Header, size: int) -> bytes:
    """A frame's lengths and header, for a body of ``size`` bytes."""
    text = ENCODER.encode(header).encode()
    return LENGTHS.pack(len(text), size) + text


def encode(header: Header, body: bytes = b"") -> bytes:
    """A frame."""
    return head(header, len(body)) + body


class Decoder:
    """Makes frames of bytes as they come."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[Header, bytes]]:
        """The frames that ``data`` completes."""
        self.buffer += data
        while len(self.buffer) >= LENGTHS.size:
            header, body = LENGTHS.unpack_from(self.buffer)
            if header > MAX_HEADER or body > MAX_BODY:
                raise Breach("lengths")
            middle = LENGTHS.size + header
            if len(self.buffer) < middle + body:
                return
            frame = parsed(bytes(self.buffer[LENGTHS.size : middle])), bytes(self.buffer[middle : middle + body])
            del self.buffer[: middle + body]
            yield frame


def parsed(text: bytes) -> Header:
    """A frame's header."""
    try:
        header = json.loads(text.decode())
    except (ValueError, RecursionError):
        raise Breach("no JSON") from None
    if not isinstance(header, dict):
        raise Breach("no object")
    return header


def field(header: Header, name: str, kind: Any, default: Any = None) -> Any:
    """A field of a request, of a kind that it must have."""
    value = header.get(name)
    if value is None:
        value = default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Refused(
            "request", "the field {!r} is missing, or no {}".format(name, getattr(kind, "__name__", "number"))
        )
    return value


def number(header: Header, name: str, default: Any = None, most: float = 2.0**62) -> Any:
    """A field that is a number and not negative."""
    value = field(header, name, (int, float), default)
    if not 0 <= value <= most:
        raise Refused("request", f"the field {name!r} is out of range")
    return value


# --- the loop ------------------------------------------------------------------------------------------------------


class Loop:
    """Descriptors, timers and tasks, on a clock that stands still while the container is frozen."""

    def __init__(self) -> None:
        self.poll = select.epoll()
        self.handlers: dict[int, Callable[[int], object]] = {}
        self.timers: list[list[Any]] = []
        self.soon: deque[Callable[[], object]] = deque()
        self.frozen = 0.0
        self.count = 0
        self.running = True

    def now(self) -> float:
        """Seconds that went by here."""
        return time.monotonic() - self.frozen

    def watch(self, fd: int, events: int, handler: Callable[[int], object]) -> None:
        """Call ``handler`` whenever ``fd`` is ready."""
        if fd in self.handlers:
            self.poll.modify(fd, events)
        else:
            self.poll.register(fd, events)
        self.handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        """Stop that."""
        if self.handlers.pop(fd, None) is not None:
            self.poll.unregister(fd)

    def later(self, delay: float, action: Callable[[], object]) -> list[Any]:
        """Call ``action`` after ``delay`` seconds; ``cancel`` takes what this gives."""
        self.count += 1
        timer = [self.now() + delay, self.count, action]
        heappush(self.timers, timer)
        return timer

    def cancel(self, timer: list[Any]) -> None:
        """Forget a timer."""
        timer[2] = None
        while self.timers and self.timers[0][2] is None:
            heappop(self.timers)

    def go(self, task: Task) -> None:
        """Run a task until it rests, and on from there after that."""
        try:
            delay = next(task)
        except StopIteration:
            return
        if delay <= 0:
            self.soon.append(lambda: self.go(task))
        else:
            self.later(delay, lambda: self.go(task))

    def run(self) -> None:
        """Go on until ``running`` is false."""
        while self.running:
            for fd, events in self.ready():
                handler = self.handlers.get(fd)
                if handler is not None:
                    guarded(partial(handler, events))
            for _ in range(len(self.soon)):
                guarded(self.soon.popleft())
            while self.timers and (self.timers[0][2] is None or self.timers[0][0] <= self.now()):
                action = heappop(self.timers)[2]
                if action is not None:
                    guarded(action)

    def ready(self) -> list[tuple[int, int]]:
        """Wait for descriptors, at most until the next timer."""
        timeout = -1.0
        if self.soon:
            timeout = 0.0
        elif self.timers:
            timeout = min(max(self.timers[0][0] - self.now(), 0.0), TICK)
        before = time.monotonic()
        found = self.poll.poll(timeout)
        if timeout >= 0:
            excess = time.monotonic() - before - timeout
            if excess > FROZEN:
                self.frozen += excess
        return found


def guarded(action: Callable[[], object]) -> None:
    """Do something whose failure must not end the supervisor."""
    try:
        action()
    except Exception as error:
        note(error)


def note(error: BaseException) -> None:
    """Say on standard error what went wrong in here."""
    try:
        trace, places = error.__traceback__, []
        while trace is not None:
            places.append(f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}")
            trace = trace.tb_next
        sys.stderr.write(f"supervisor: {error!r} at {' < '.join(reversed(places))}\n")
        sys.stderr.flush()
    except Exception:
        return


# --- what a command writes -----------------------------------------------------------------------------------------


class Kept:
    """One stream's output: the first and the last half of ``keep`` bytes, and how much it was. While it comes somewhat
    more of its end is there (``spare``), for those who follow it."""

    def __init__(self, keep: int, spare: int) -> None:
        self.first = keep - keep // 2
        self.last = keep // 2
        self.spare = spare
        self.head = bytearray()
        self.tail = bytearray()
        self.total = 0

    def add(self, data: bytes) -> None:
        """Take what came next."""
        self.total += len(data)
        room = self.first - len(self.head)
        if room > 0:
            self.head += data[:room]
            data = data[room:]
        self.tail += data
        if len(self.tail) > 2 * (self.last + self.spare):  # cut now and then, not with every piece
            del self.tail[: len(self.tail) - self.last - self.spare]

    def piece(self, offset: int, most: int) -> tuple[int, bytes]:
        """What is there from ``offset`` on, or from the next byte that is: where it begins, and its bytes."""
        if offset < len(self.head):
            return offset, bytes(self.head[offset : offset + most])
        start = self.total - len(self.tail)
        offset = max(offset, start)
        return offset, bytes(self.tail[offset - start : offset - start + most])

    def ends(self) -> tuple[bytes, bytes]:
        """The first and the last of it; where nothing is left out, one follows the other."""
        return bytes(self.head), bytes(self.tail[max(len(self.tail) - self.last, 0) :])

    @property
    def truncated(self) -> bool:
        """Whether ``ends`` is not all."""
        return self.total > len(self.head) + min(len(self.tail), self.last)

    def seal(self) -> int:
        """Nothing more comes and nobody follows: keep the ends only, and say how many bytes that is."""
        del self.tail[: max(len(self.tail) - self.last, 0)]
        return len(self.head) + len(self.tail)

    def drop(self) -> None:
        """Keep nothing any more."""
        self.head = bytearray()
        self.tail = bytearray()


class Pipe:
    """One stream of a command: our end of its pipe, while it is open, and what came through."""

    def __init__(self, name: str, fd: int, kept: Kept) -> None:
        self.name = name
        self.fd = fd
        self.kept = kept


class Follower:
    """Somebody on the host who reads a call's output as it comes, and says what has been read."""

    def __init__(self, conn: Connection, n: int, call: Call) -> None:
        self.conn = conn
        self.n = n
        self.call = call
        self.at = dict.fromkeys(call.pipes, 0)
        self.under_way = 0

    @property
    def room(self) -> int:
        """Bytes that may be sent to it now."""
        return WINDOW - self.under_way if self.conn.waiting < ROOM else 0

    @property
    def has_all(self) -> bool:
        """Whether it was sent all that has come so far."""
        return all(self.at[name] >= pipe.kept.total for name, pipe in self.call.pipes.items())


class Call:
    """A command: running, ending (its main process has ended, or it is being ended), then done."""

    def __init__(self, header: Header) -> None:
        self.id: str = field(header, "id", str)
        self.limit_bytes = number(header, "limit", 64 * 1024 * 1024)
        self.grace: float = number(header, "grace", 1.0)
        self.background: bool = field(header, "background", bool, False)
        self.flow: bool = field(header, "flow", bool, False)
        self.pid = 0
        self.status: int | None = None
        self.state = "running"
        self.lingering = False
        self.pipes: dict[str, Pipe] = {}
        self.stdin = -1
        self.stdin_ends = False
        self.stdin_left = 0
        self.stdin_queue: deque[list[Any]] = deque()
        self.paused = False
        self.limit: str | None = None
        self.timeout = False
        self.killed = False
        self.survivors = 0
        self.began = 0.0
        self.timer: list[Any] | None = None
        self.meters: tuple[int, int] = (0, 0)
        self.starter: Connection | None = None
        self.collectors: list[tuple[Connection, int, Header]] = []
        self.followers: list[Follower] = []
        self.killers: list[tuple[Connection, int]] = []
        self.fields: Header = {}

    @property
    def alive(self) -> bool:
        """Whether its main process is there."""
        return self.pid > 0 and self.status is None

    def total(self) -> int:
        """Bytes that it has written to standard output and error."""
        return self.pipes["stdout"].kept.total + self.pipes["stderr"].kept.total

    def forget_output(self) -> None:
        """Keep its exit fields only."""
        for pipe in self.pipes.values():
            pipe.kept.drop()
        self.fields["truncated"] = self.total() > 0


# --- processes -----------------------------------------------------------------------------------------------------


class Process:
    """A line of the process table; ``born`` tells processes apart that have had the same number."""

    __slots__ = ("born", "dead", "group", "parent", "pid", "session")

    def __init__(self, pid: int, fields: list[bytes]) -> None:
        self.pid = pid
        self.dead = fields[0] in (b"Z", b"X", b"x")
        self.parent = int(fields[1])
        self.group = int(fields[2])
        self.session = int(fields[3])
        self.born = int(fields[19])


def read_file(path: str, most: int = 4096) -> bytes:
    """The first bytes of a file of /proc; nothing if it is not there or not ours to read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, most)
    except OSError:
        return b""
    finally:
        os.close(fd)


def process(pid: int) -> Process | None:
    """A process, if it is there."""
    text = read_file(f"/proc/{pid}/stat")
    fields = text[text.rfind(b")") + 2 :].split(None, 20)
    return Process(pid, fields) if len(fields) > 20 else None


def processes() -> dict[int, Process]:
    """All processes."""
    found = (process(int(name)) for name in os.listdir("/proc") if name[0] in "123456789")
    return {each.pid: each for each in found if each is not None}


def tag_of(pid: int) -> str | None:
    """The call that a process's environment names, if that can be read."""
    text = b"\0" + read_file(f"/proc/{pid}/environ", 256 * 1024)
    start = text.find(b"\0" + TAG.encode() + b"=")
    if start < 0:
        return None
    start += len(TAG) + 2
    return os.fsdecode(text[start:].split(b"\0", 1)[0])


class Tree:
    """The processes that this supervisor's calls have started, and whose each is."""

    def __init__(self, local: bool) -> None:
        self.me = os.getpid()
        self.reaper = subreaper()
        self.children = f"/proc/self/task/{self.me}/children"
        self.exact = self.reaper and os.path.exists(self.children)
        # Without a subreaper what detaches itself becomes a child of init. In a container of ours that is the parent.
        self.roots = {self.me} if local or self.reaper or os.getppid() != 1 else {self.me, 1}
        self.sessions: dict[int, str] = {}
        self.older: dict[int, int] = {}
        if len(self.roots) > 1:
            self.older.update((pid, each.born) for pid, each in processes().items())

    def scan(self) -> dict[int, Process]:
        """All processes that can be ours."""
        table = processes()
        return {pid: each for pid, each in table.items() if not self.is_older(each) and self.below(each, table)}

    def is_older(self, each: Process) -> bool:
        """Whether a process was there before this one began to look, so that it is none of ours."""
        return each.pid in (1, self.me) or self.older.get(each.pid) == each.born

    def below(self, each: Process, table: dict[int, Process]) -> bool:
        """Whether a process comes from this one."""
        up: Process | None = each
        for _ in range(len(table)):
            if up is None:
                break
            if up.parent in self.roots:
                return True
            up = table.get(up.parent)
        return not self.reaper and self.me == self.supervisor_of(each.pid)

    def supervisor_of(self, pid: int) -> int:
        """The supervisor whose call a process says it belongs to."""
        text = b"\0" + read_file(f"/proc/{pid}/environ", 256 * 1024)
        start = text.find(b"\0RIDETHROUGH_SUPERVISOR=")
        digits = text[start + 24 : start + 40].split(b"\0", 1)[0]
        return int(digits) if start >= 0 and digits.isdigit() else 0

    def owners(self, calls: list[Call]) -> dict[int, tuple[Process, str | None]]:
        """Every process that is not dead, with the id of its call; ``None``: it is nobody's."""
        table = self.scan()
        mains = {call.pid: call.id for call in calls if call.alive}
        ids = {call.id for call in calls}
        self.sessions = {session: id for session, id in self.sessions.items() if id in ids}
        self.sessions.update((call.pid, call.id) for call in calls)
        lines = {pid: self.line(pid, table, mains) for pid in table}
        self.sessions.update((table[pid].session, id) for pid, id in lines.items() if id is not None)
        living = [each for each in table.values() if not each.dead]
        return {each.pid: (each, lines[each.pid] or self.owner(each, ids)) for each in living}

    def owner(self, each: Process, ids: set[str]) -> str | None:
        """Whose a process is that has lost its line of parents."""
        if each.session in self.sessions:
            return self.sessions[each.session]
        tag = tag_of(each.pid)
        return tag if tag in ids else None

    def line(self, pid: int, table: dict[int, Process], mains: dict[int, str]) -> str | None:
        """The call whose main process a process comes from."""
        for _ in range(len(table) + 1):
            if pid in mains:
                return mains[pid]
            each = table.get(pid)
            if each is None:
                return None
            pid = each.parent
        return None

    def orphans(self) -> list[int]:
        """The children of this process: the main processes of calls, and what has lost its parent."""
        return [int(word) for word in read_file(self.children, 256 * 1024).split()]

    def nothing_beside(self, mains: set[int]) -> bool:
        """Whether provably nothing is left but what comes from these processes. What a dead parent leaves becomes a
        child of this process before that parent can be taken note of, so one look at its children is enough."""
        return self.exact and mains.issuperset(self.orphans())

    def missed(self, seen: set[int], calls: list[Call]) -> dict[int, tuple[Process | None, str | None]]:
        """What a scan has not seen: reading the table takes time, and a process that forks and exits all the while is
        never where one looks. ``None`` for one that has ended just now, and may have left another."""
        if not self.exact:
            return {}
        ids = {call.id for call in calls}
        known = seen.union(call.pid for call in calls if call.alive)
        found: dict[int, tuple[Process | None, str | None]] = {}
        for pid in self.orphans():
            if pid not in known:
                each = process(pid)
                gone = each is None or each.dead
                found[pid] = (None, None) if gone or each is None else (each, self.owner(each, ids))
        return found

    def descends(self, pid: int) -> bool:
        """Whether a process was started in here, so that it is no host's; one that cannot be found is none either."""
        for _ in range(1000):
            if pid in self.roots:
                return True
            if pid <= 1:
                return False
            found = process(pid)
            if found is None:
                return True
            if len(self.roots) > 1 and self.is_older(found):
                return False
            pid = found.parent
        return True


def send_signal(pid: int, number: int) -> None:
    """Signal a process that may be gone."""
    try:
        os.kill(pid, number)
    except OSError:
        return


def signal_all(found: list[Process], number: int, spared: set[int]) -> None:
    """Signal processes, and their groups where nobody else is in them: no fork gets past a signal to its group."""
    for each in found:
        send_signal(each.pid, number)
    for group in {each.group for each in found} - spared:
        send_signal(-group, number)


def subreaper() -> bool:
    """Have what loses its parent below here become a child of this process, and let nobody trace it."""
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
        return bool(libc.prctl(36, 1, 0, 0, 0) == 0)  # PR_SET_CHILD_SUBREAPER
    except Exception:
        return False


class Meters:
    """What the container's limits have done so far: kills for memory, forks refused."""

    def __init__(self, local: bool) -> None:
        base = "/sys/fs/cgroup/"
        self.memory = self.opened((base + "memory.events", base + "memory/memory.oom_control"), local)
        self.pids = self.opened((base + "pids.events", base + "pids/pids.events"), local)

    def opened(self, paths: tuple[str, ...], local: bool) -> int:
        """A counter's file; outside of a container the counters are other people's."""
        for path in () if local else paths:
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
        return -1

    def read(self) -> tuple[int, int]:
        """Both counters."""
        return counter(self.memory, b"oom_kill"), counter(self.pids, b"max")


def counter(fd: int, name: bytes) -> int:
    """A line ``name N`` of a file; 0 if there is none."""
    if fd < 0:
        return 0
    try:
        words = os.pread(fd, 4096, 0).split()
        return int(words[words.index(name) + 1])
    except (OSError, ValueError, IndexError):
        return 0


class Shield:
    """The kernel ends commands before it ends the supervisor when memory is short: they are started while this process
    ranks as they should, for what is inherited cannot come too late."""

    def __init__(self) -> None:
        try:
            self.fd = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
            self.own = os.pread(self.fd, 16, 0).strip()
        except OSError:
            self.fd = -1

    def lower(self) -> None:
        """Rank as commands do."""
        self.write(b"1000")

    def restore(self) -> None:
        """Rank as before."""
        self.write(self.own)

    def write(self, value: bytes) -> None:
        """Set the rank, where that is allowed."""
        if self.fd >= 0:
            try:
                os.pwrite(self.fd, value, 0)
            except OSError:
                os.close(self.fd)
                self.fd = -1


# --- files ---------------------------------------------------------------------------------------------------------


class Root:
    """A folder that files may be in; ``name`` is what it is called on the wire, ``path`` where it is."""

    def __init__(self, name: str, shown: str, path: str) -> None:
        self.name = name
        self.shown = shown
        self.path = os.path.realpath(path)

    def opened(self) -> int:
        """Its descriptor."""
        return os.open(self.path, FOLDER)

    def show(self, parts: Iterable[str]) -> str:
        """How a path in it is called."""
        return "/".join(([self.shown] if self.shown else []) + list(parts)) or "."


def below(path: str, folder: str) -> str | None:
    """A path relative to a folder that it is in (empty: it is that folder)."""
    if path == folder:
        return ""
    return path[len(folder) + 1 :] if path.startswith(folder.rstrip("/") + "/") else None


class Place:
    """A path that was found to be in a root; it has no links when it was looked at, and is opened only if it still has
    none, part by part."""

    def __init__(self, root: Root, parts: list[str]) -> None:
        self.root = root
        self.parts = parts

    @property
    def name(self) -> str:
        """Its last part."""
        if not self.parts:
            raise Refused("path", f"{self.shown} is the whole folder")
        return self.parts[-1]

    @property
    def shown(self) -> str:
        """How it is called on the wire."""
        return self.root.show(self.parts)

    def folder(self, make: bool = False) -> int:
        """A descriptor of the folder that it is in."""
        return self.walk(self.parts[:-1], make)

    def itself(self) -> int:
        """A descriptor of the folder that it is."""
        return self.walk(self.parts)

    def walk(self, parts: Iterable[str], make: bool = False) -> int:
        """Open a folder below the root, making those that are missing if so asked."""
        fd = self.root.opened()
        for part in parts:
            try:
                deeper = folder_at(fd, part, make)
            finally:
                os.close(fd)
            fd = deeper
        return fd

    def below(self, parts: Iterable[str]) -> Place:
        """A place in this one."""
        return Place(self.root, self.parts + list(parts))


def folder_at(fd: int, name: str, make: bool = False) -> int:
    """Open a folder in a folder."""
    try:
        return os.open(name, FOLDER, dir_fd=fd)
    except FileNotFoundError:
        if not make:
            raise
    try:
        os.mkdir(name, 0o755, dir_fd=fd)
    except FileExistsError:
        pass
    return os.open(name, FOLDER, dir_fd=fd)


def entry_of(path: str, found: os.stat_result) -> Header:
    """An entry as the wire has it."""
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}
    return {
        "path": path,
        "kind": kinds.get(stat.S_IFMT(found.st_mode), "other"),
        "size": found.st_size,
        "modified": found.st_mtime,
        "mode": stat.S_IMODE(found.st_mode),
    }


def write_all(fd: int, data: bytes) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Files:
    """Requests about files. They keep nothing between them but the parts of uploads, which go with their host, and the
    names of the last large folder that was listed."""

    def __init__(self, loop: Loop, workspace: str, tmp: str) -> None:
        self.loop = loop
        self.workspace = Root("/workspace", "", workspace)
        self.tmp = Root("/tmp", "/tmp", tmp)
        self.roots = (self.workspace, self.tmp)
        self.cache: tuple[Any, str, list[str], bool] | None = None

    def place(self, path: str, follow: bool = True) -> Place:
        """Find a path in a root, with its links followed (but the last, if not ``follow``)."""
        if "\0" in path or len(path) > 8192:
            raise Refused("path", f"{path[:100]!r} is no path")
        full = self.absolute(path)
        if follow or os.path.basename(full) in ("", ".", ".."):
            full = os.path.realpath(full)
        else:
            full = os.path.join(os.path.realpath(os.path.dirname(full)), os.path.basename(full))
        for root in self.roots:
            inside = below(full, root.path)
            if inside is not None:
                return Place(root, [part for part in inside.split("/") if part])
        raise Refused("path", f"{path} is outside of the workspace and of /tmp")

    def absolute(self, path: str) -> str:
        """Where a path of the wire is; names of the wire count where nothing of ours is really called so."""
        if not path.startswith("/"):
            return os.path.join(self.workspace.path, path)
        if not any(below(path, root.path) is not None for root in self.roots):
            for root in self.roots:
                inside = below(path, root.name)
                if inside is not None:
                    return os.path.join(root.path, inside)
        return path

    def read(self, path: str, offset: int, limit: int) -> Reply:
        """A piece of a file."""
        place = self.place(path)
        folder = place.folder()
        try:
            fd = os.open(place.name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | NOFOLLOW, dir_fd=folder)
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise Refused("path", f"{path} is no regular file") from None
            raise
        finally:
            os.close(folder)
        try:
            size = regular(fd, path).st_size
            return {"size": size}, os.pread(fd, min(limit, MAX_BODY), offset)
        finally:
            os.close(fd)

    def append(self, path: str, body: bytes, mode: int | None) -> Reply:
        """Add to a file."""
        place = self.place(path)
        folder = place.folder(make=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | NOFOLLOW
        try:
            fd = os.open(place.name, flags, 0o644 if mode is None else mode, dir_fd=folder)
        finally:
            os.close(folder)
        try:
            regular(fd, path)
            write_all(fd, body)
            return {"size": os.fstat(fd).st_size}, b""
        finally:
            os.close(fd)

    def write(self, conn: Connection, header: Header, path: str, offset: int, body: bytes) -> Reply:
        """Write a piece of a file beside it, and with the last piece move it into its place."""
        place = self.place(path)
        name, last = place.name, field(header, "last", bool, False)
        part = PART + "%x" % (hash((path, field(header, "part", str, ""))) & 0xFFFFFFFFFFFFFFFF)
        folder = place.folder(make=True)
        try:
            mode = mode_of(name, folder, path)
            flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | NOFOLLOW | (0 if offset else os.O_CREAT | os.O_TRUNC)
            fd = os.open(part, flags, 0o600, dir_fd=folder)
            conn.parts[(place.root, tuple(place.parts[:-1]), part)] = True
            try:
                if regular(fd, path).st_size != offset:
                    raise Refused("request", f"the pieces of {path} did not come in order")
                write_all(fd, body)
                if last:
                    os.fchmod(fd, number(header, "mode", mode, 0o7777))
                    os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                os.unlink(part, dir_fd=folder)
                raise
            finally:
                os.close(fd)
            if last:
                conn.parts.pop((place.root, tuple(place.parts[:-1]), part), None)
            return {"size": offset + len(body)}, b""
        finally:
            os.close(folder)

    def remove_part(self, root: Root, parts: Iterable[str], name: str) -> None:
        """Remove what is there of an upload whose host has gone."""
        try:
            folder = Place(root, []).walk(parts)
        except OSError:
            return
        try:
            os.unlink(name, dir_fd=folder)
        except OSError:
            pass
        finally:
            os.close(folder)

    def stat(self, path: str) -> Reply:
        """One entry, its link not followed."""
        place = self.place(path, follow=False)
        if not place.parts:
            return {"entry": entry_of(place.shown, os.stat(place.root.path))}, b""
        folder = place.folder()
        try:
            return {"entry": entry_of(place.shown, os.stat(place.name, dir_fd=folder, follow_symlinks=False))}, b""
        finally:
            os.close(folder)

    def mkdir(self, path: str) -> Reply:
        """Make a folder, and those above it; one that is there is fine."""
        place = self.place(path)
        os.close(place.walk(place.parts, make=True))
        return {}, b""

    # --- lists

    def page(self, path: str, recursive: bool, after: str, limit: int) -> Generator[float, None, Reply]:
        """A page of entries."""
        place = self.place(path)
        os.close(place.itself())
        pieces: list[str] = []
        size, more = 2, False
        for entry in self.entries(place, recursive, self.start_of(place, after)):
            if entry is None:
                yield 0.0
                continue
            text = ENCODER.encode(entry)
            size += len(text) + 1
            if len(pieces) >= limit or size > MAX_BODY:
                more = True
                break
            pieces.append(text)
        return {"more": more}, ("[" + ",".join(pieces) + "]").encode()

    def start_of(self, place: Place, after: str) -> list[str]:
        """The parts of ``after`` below the folder that is listed."""
        shown = "" if place.shown == "." else place.shown + "/"
        return after[len(shown) :].split("/") if after and after.startswith(shown) else []

    def entries(self, place: Place, recursive: bool, after: list[str]) -> Iterator[Header | None]:
        """The entries below a folder, in order; ``None`` now and then, for a rest."""
        low, complete = (after[0] if after else ""), False
        while not complete:
            names: list[str] = []
            for found in self.names(place, low):
                if found is None:
                    yield None
                else:
                    names, complete = found
            for start in range(0, len(names), 500):
                for name, info in infos(place, names[start : start + 500]):
                    passed = bool(after) and name == after[0]
                    if not passed:
                        yield entry_of(place.root.show([*place.parts, name]), info)
                    if recursive and stat.S_ISDIR(info.st_mode) and len(place.parts) < DEEPEST:
                        yield from self.deeper(place.below([name]), after[1:] if passed else [])
                yield None
            if names:
                low = names[-1] + "\0"

    def deeper(self, place: Place, after: list[str]) -> Iterator[Header | None]:
        """The entries below a folder that may have gone meanwhile."""
        try:
            yield from self.entries(place, True, after)
        except OSError:
            return

    def names(self, place: Place, low: str) -> Iterator[tuple[list[str], bool] | None]:
        """The names in a folder from ``low`` on, in order, and whether those are all; ``None`` before it, for rests.
        Very large folders come in parts, so that what is kept in memory is bounded."""
        fd = place.itself()
        try:
            info = os.fstat(fd)
            key = (place.root.path, tuple(place.parts), info.st_ino, info.st_mtime_ns)
            cached = self.cached(key, low)
            if cached is not None:
                yield cached
                return
            names: list[str] = []
            high, count = None, 0
            with os.scandir(fd) as listing:
                for item in listing:
                    name = item.name
                    if name >= low and not name.startswith(PART) and (high is None or name < high):
                        names.append(name)
                    count += 1
                    if count % SLICE == 0:
                        names[-SLICE:] = sorted(names[-SLICE:])  # sorted runs make the last sort quick
                        if len(names) > NAMES:
                            names.sort()
                            high = names[NAMES // 2]
                            del names[NAMES // 2 :]
                        yield None
            names.sort()
            if len(names) > SLICE and time.time() - info.st_mtime > 0.5:
                self.keep(key, low, names, high is None)
            yield names, high is None
        finally:
            os.close(fd)

    def cached(self, key: Any, low: str) -> tuple[list[str], bool] | None:
        """The names of a folder that has not changed since it was read."""
        if self.cache is None or self.cache[0] != key or low < self.cache[1]:
            return None
        names = self.cache[2][bisect_left(self.cache[2], low) :]
        return (names, self.cache[3]) if names or self.cache[3] else None

    def keep(self, key: Any, low: str, names: list[str], complete: bool) -> None:
        """Keep names for the pages that are asked for next, for a few seconds."""
        mine = self.cache = (key, low, names, complete)
        self.loop.later(5.0, lambda: self.drop(mine))

    def drop(self, mine: Any) -> None:
        """Let them go."""
        if self.cache is mine:
            self.cache = None

    # --- watching

    def snapshot(self, place: Place) -> Generator[float, None, dict[str, tuple[int, ...]]]:
        """What is below a folder, as far as changes are told by it."""
        found: dict[str, tuple[int, ...]] = {}
        waiting = [place]
        count = 0
        while waiting and len(found) < WATCHED:
            here = waiting.pop()
            for name, info in listed(here, WATCHED - len(found)):
                folder = stat.S_ISDIR(info.st_mode)
                if folder and len(here.parts) < DEEPEST:
                    waiting.append(here.below([name]))
                kind = stat.S_IFMT(info.st_mode)
                change = (0, 0) if folder else (info.st_size, info.st_mtime_ns)
                found[here.root.show([*here.parts, name])] = (kind, info.st_ino, *change)
                count += 1
                if count % 500 == 0:
                    yield 0.0
        return found

    def watch(self, conn: Connection, n: int, place: Place) -> Task:
        """Tell what changes, until the watch has ended."""
        before = yield from self.snapshot(place)
        while True:
            began = self.loop.now()
            yield WATCH_SECONDS
            while conn.waiting > ROOM:
                yield WATCH_SECONDS
            if conn.closed or n not in conn.watches:
                return
            after = yield from self.snapshot(place)
            for kind, path in changes(before, after):
                conn.send({"n": n, "event": "change", "kind": kind, "path": path})
            before = after
            yield min(10 * max(self.loop.now() - began - WATCH_SECONDS, 0.0), 10.0)  # a tenth of the time at most

    # --- removing

    def remove(self, path: str) -> Generator[float, None, Reply]:
        """Remove a file, or a folder with all that is in it."""
        place = self.place(path, follow=False)
        name = place.name
        folder = place.folder()
        try:
            if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                inner = opened_folder(folder, name)
                try:
                    yield from self.emptied(inner)
                finally:
                    os.close(inner)
                os.rmdir(name, dir_fd=folder)
            else:
                os.unlink(name, dir_fd=folder)
        finally:
            os.close(folder)
        return {}, b""

    def emptied(self, fd: int) -> Task:
        """Remove all that is in a folder. Folders that are not empty are moved up to it first, so that no depth and no
        length of a path matters; whoever makes new ones all the while is not waited for."""
        until = self.loop.now() + 30.0
        count = 0
        while True:
            names = some_names(fd)
            if not names:
                return
            removed = 0
            for name in names:
                count += 1
                removed += removed_at(fd, name) or (yield from self.flattened(fd, name, count))
            if not removed or self.loop.now() > until:
                raise OSError(errno.EBUSY, "cannot be emptied")
            yield 0.0

    def flattened(self, fd: int, name: str, count: int) -> Generator[float, None, bool]:
        """Remove a folder whose folders are moved out of it; whether that worked."""
        try:
            inner = opened_folder(fd, name)
        except OSError:
            return False
        try:
            while True:
                names = some_names(inner)
                moved = sum(removed_at(inner, each) or moved_up(inner, each, fd) for each in names)
                if not moved:
                    break
                yield 0.0
        finally:
            os.close(inner)
        return removed_at(fd, name)


def regular(fd: int, path: str) -> os.stat_result:
    """What is open, if it is a regular file."""
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise Refused("path", f"{path} is no regular file")
    return info


def mode_of(name: str, folder: int, path: str) -> int:
    """The mode of the file that is replaced."""
    try:
        info = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return 0o644
    if not stat.S_ISREG(info.st_mode):
        raise Refused("path", f"{path} is no regular file")
    return stat.S_IMODE(info.st_mode)


def infos(place: Place, names: Iterable[str]) -> list[tuple[str, os.stat_result]]:
    """What is known of entries of a folder, without those that have gone."""
    found = []
    fd = place.itself()
    try:
        for name in names:
            try:
                found.append((name, os.stat(name, dir_fd=fd, follow_symlinks=False)))
            except OSError:
                continue
    finally:
        os.close(fd)
    return found


def listed(place: Place, most: int) -> list[tuple[str, os.stat_result]]:
    """Up to ``most`` entries of a folder; none if it has gone."""
    try:
        fd = place.itself()
        try:
            names = [name for name in some_names(fd, most) if not name.startswith(PART)]
        finally:
            os.close(fd)
        return infos(place, names)
    except OSError:
        return []


def some_names(fd: int, most: int = SLICE) -> list[str]:
    """Up to ``most`` names in a folder, read from its beginning: what is open may show a tmpfs as it was before."""
    names = []
    fresh = os.open(".", FOLDER, dir_fd=fd)
    try:
        with os.scandir(fresh) as listing:
            for item in listing:
                names.append(item.name)
                if len(names) >= most:
                    break
    finally:
        os.close(fresh)
    return names


def opened_folder(fd: int, name: str) -> int:
    """Open a folder to change what is in it, whatever its mode says."""
    try:
        os.chmod(name, 0o700, dir_fd=fd)
    except OSError:
        pass
    return os.open(name, FOLDER, dir_fd=fd)


def removed_at(fd: int, name: str) -> bool:
    """Whether an entry could be removed: anything but a folder that is not empty."""
    try:
        os.unlink(name, dir_fd=fd)
        return True
    except OSError:
        pass
    try:
        os.rmdir(name, dir_fd=fd)
        return True
    except OSError:
        return False


def moved_up(fd: int, name: str, to: int) -> bool:
    """Whether a folder could be moved to another one."""
    try:
        os.close(opened_folder(fd, name))
        os.rename(name, PART + os.urandom(8).hex(), src_dir_fd=fd, dst_dir_fd=to)
        return True
    except OSError:
        return False


def changes(before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, str]]:
    """What happened between two snapshots."""
    for path in before:
        if path not in after:
            yield "removed", path
    for path, info in after.items():
        if path not in before:
            yield "created", path
        elif before[path] != info:
            yield "modified", path


def is_empty(path: str) -> bool:
    """Whether nothing is in a folder."""
    try:
        with os.scandir(path) as listing:
            return next(listing, None) is None
    except OSError:
        return False


# --- connections ---------------------------------------------------------------------------------------------------


class Connection:
    """A host, or somebody who has connected and not yet asked for anything."""

    def __init__(self, supervisor: Supervisor, sock: socket.socket) -> None:
        self.supervisor = supervisor
        self.loop = supervisor.loop
        self.sock = sock
        self.fd = sock.fileno()
        self.decoder = Decoder()
        self.out: deque[memoryview] = deque()
        self.waiting = 0
        self.closed = False
        self.events = 0
        self.parts: dict[tuple[Root, tuple[str, ...], str], bool] = {}
        self.watches: set[int] = set()
        self.follows: dict[int, Follower] = {}
        self.streams: dict[int, Stream] = {}
        self.listen()

    def listen(self) -> None:
        """Wait for what can be done now: a host that does not read is not read from."""
        events = (select.EPOLLIN if self.waiting < FULL else 0) | (select.EPOLLOUT if self.out else 0)
        if not self.closed and events != self.events:
            self.events = events
            self.loop.watch(self.fd, events, self.ready)

    def ready(self, events: int) -> None:
        """Read or write."""
        if events & select.EPOLLOUT:
            self.flush()
        if events & ~select.EPOLLOUT and not self.closed:
            self.receive()

    def receive(self) -> None:
        """Read requests and have them met."""
        buffer = self.supervisor.buffer
        try:
            size = self.sock.recv_into(buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            size = 0
        if not size:
            self.supervisor.lost(self)
            return
        try:
            for header, body in self.decoder.feed(buffer[:size]):
                self.supervisor.request(self, header, body)
                if self.closed:
                    return
        except Breach:
            self.supervisor.lost(self)

    def send(self, header: Header, body: bytes = b"") -> None:
        """Send a frame, now or as soon as the host reads."""
        if self.closed:
            return
        idle = not self.out
        first = head(header, len(body))
        self.out.append(memoryview(first))
        if body:
            self.out.append(memoryview(body))
        self.waiting += len(first) + len(body)
        if idle:
            self.flush()

    def flush(self) -> None:
        """Send what waits, as far as it goes."""
        full = self.waiting >= ROOM
        while self.out:
            try:
                size = self.sock.sendmsg([self.out[i] for i in range(min(len(self.out), 16))])
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self.loop.soon.append(lambda: self.supervisor.lost(self))
                return
            self.sent(size)
        self.listen()
        if full and self.waiting < ROOM:
            self.loop.soon.append(lambda: self.supervisor.drained(self))

    def sent(self, size: int) -> None:
        """Take out what was sent."""
        self.waiting -= size
        while size:
            first = self.out[0]
            if len(first) > size:
                self.out[0] = first[size:]
                return
            size -= len(first)
            self.out.popleft()

    def reply(self, n: int, header: Header, body: bytes = b"") -> None:
        """Answer a request."""
        self.send(dict(header, n=n, ok=True), body)

    def error(self, n: int, error: BaseException) -> None:
        """Refuse a request."""
        kind, message = refusal(error)
        self.send({"n": n, "error": {"kind": kind, "message": message[:1000]}})

    def close(self) -> None:
        """End it, and what only its host cared for."""
        self.closed = True
        self.loop.unwatch(self.fd)
        self.sock.close()
        self.out.clear()
        for stream in list(self.streams.values()):
            stream.close()
        for root, parts, name in self.parts:
            self.supervisor.files.remove_part(root, parts, name)


KINDS = {
    errno.ENOENT: "not_found",
    errno.ENOSPC: "disk",
    errno.EDQUOT: "disk",
    errno.ENOTDIR: "path",
    errno.EISDIR: "path",
    errno.ELOOP: "path",
    errno.EACCES: "path",
    errno.EPERM: "path",
    errno.EROFS: "path",
    errno.EEXIST: "path",
    errno.EBUSY: "path",
    errno.ENXIO: "path",
    errno.ENAMETOOLONG: "path",
}


def refusal(error: BaseException) -> tuple[str, str]:
    """The kind and the message of an error on the wire."""
    if isinstance(error, Refused):
        return error.kind, str(error)
    if isinstance(error, OSError) and error.errno is not None:
        where = "" if error.filename is None or isinstance(error.filename, int) else f"{os.fsdecode(error.filename)}: "
        return KINDS.get(error.errno, "request"), where + os.strerror(error.errno)
    return "request", f"{type(error).__name__}: {error}"


class Stream:
    """A connection that a program in here has opened to its proxy: its bytes go to the host and back."""

    def __init__(self, conn: Connection, s: int, sock: socket.socket) -> None:
        self.conn = conn
        self.s = s
        self.sock = sock
        self.queue = bytearray()
        self.under_way = 0
        self.their_end = self.our_end = self.shut = self.broken = False
        conn.streams[s] = self
        conn.send({"s": s, "open": True})
        self.listen()

    def listen(self) -> None:
        """Wait for what can be done now."""
        reads = not self.our_end and self.under_way < WINDOW and self.conn.waiting < ROOM
        events = (select.EPOLLIN if reads else 0) | (select.EPOLLOUT if self.queue else 0)
        if events:
            self.conn.loop.watch(self.sock.fileno(), events, self.ready)
        else:
            self.conn.loop.unwatch(self.sock.fileno())
        if self.our_end and self.their_end and not self.queue:
            self.close()

    def ready(self, events: int) -> None:
        """Read or write."""
        if self.queue and events & ~select.EPOLLIN:
            self.write()
        if not self.our_end and events & ~select.EPOLLOUT and self.under_way < WINDOW:
            self.read()
        self.listen()

    def read(self) -> None:
        """Send on what the program has written."""
        try:
            data = self.sock.recv(min(WINDOW - self.under_way, 4 * PIECE))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.fail()
            return
        if data:
            self.under_way += len(data)
            self.conn.send({"s": self.s}, data)
        else:
            self.end()

    def write(self) -> None:
        """Give the program what the host has sent."""
        try:
            size = self.sock.send(self.queue)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.fail()
            return
        del self.queue[:size]
        self.conn.send({"s": self.s, "took": size})
        self.shut_down()

    def take(self, header: Header, body: bytes) -> None:
        """Take a frame of the host."""
        self.under_way -= min(number(header, "took", 0), self.under_way)
        if self.broken and body:
            self.conn.send({"s": self.s, "took": len(body)})
        elif body:
            self.queue += body
            if len(self.queue) > WINDOW:
                raise Breach("more than a window")
            self.write()
        if header.get("end"):
            self.their_end = True
            self.shut_down()
        self.listen()

    def shut_down(self) -> None:
        """Tell the program that the host sends no more."""
        if self.their_end and not self.queue and not self.shut:
            self.shut = True
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                return

    def end(self) -> None:
        """Tell the host that the program sends no more."""
        if not self.our_end:
            self.our_end = True
            self.conn.send({"s": self.s, "end": True})

    def fail(self) -> None:
        """The program has gone: what the host still sends is taken and dropped."""
        self.broken = True
        if self.queue:
            self.conn.send({"s": self.s, "took": len(self.queue)})
            self.queue.clear()
        self.end()

    def close(self) -> None:
        """Forget it."""
        if self.conn.streams.pop(self.s, None) is not None:
            self.conn.loop.unwatch(self.sock.fileno())
            self.sock.close()


# --- the whole -----------------------------------------------------------------------------------------------------


class Options:
    """What ``serve`` was told."""

    def __init__(self, arguments: list[str]) -> None:
        self.values: dict[str, str] = {}
        name = ""
        for word in arguments:
            if word.startswith("--"):
                name = word[2:]
                self.values[name] = ""
            elif name:
                self.values[name], name = word, ""
        self.socket = os.path.abspath(self.values["socket"])
        self.workspace = self.values.get("workspace", "/workspace")
        self.tmp = self.values.get("tmp", "/tmp")
        self.linger = float(self.values.get("linger") or 30.0)
        self.local = "local" in self.values
        self.proxy = int(self.values["proxy"] or 3128) if "proxy" in self.values else None


class Supervisor:
    """The calls, and the host that is attached."""

    def __init__(self, options: Options) -> None:
        self.loop = Loop()
        self.local = options.local
        self.linger = options.linger
        self.files = Files(self.loop, options.workspace, options.tmp)
        self.shield = Shield()
        self.tree = Tree(options.local)
        self.meters = Meters(options.local)
        self.environment = dict(os.environ, RIDETHROUGH_SUPERVISOR=str(os.getpid()))
        self.hello = {"hello": 1, "protocol": PROTOCOL, "supervisor": own_digest(), "boot": os.urandom(8).hex()}
        self.buffer = memoryview(bytearray(MAX_BODY))
        self.host: Connection | None = None
        self.candidates: list[Connection] = []
        self.idle = 0.0
        self.ticking = False
        self.calls: OrderedDict[str, Call] = OrderedDict()
        self.active: dict[str, Call] = {}
        self.mains: dict[int, Call] = {}
        self.done: OrderedDict[str, int] = OrderedDict()
        self.done_bytes = 0
        self.streams = 0
        self.spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self.ops: dict[str, Callable[[Connection, int, Header, bytes], Answer]] = {
            name[3:]: getattr(self, name) for name in dir(self) if name.startswith("op_")
        }

    # --- its life

    def serve(self, options: Options) -> None:
        """Run until nobody has been attached for ``linger`` seconds."""
        self.catch_signals()
        listener = listening(options.socket)
        self.loop.watch(listener.fileno(), select.EPOLLIN, lambda events: self.accept(listener))
        proxy = proxy_listener(options.proxy)
        if proxy is not None:
            self.loop.watch(proxy.fileno(), select.EPOLLIN, lambda events: self.open_stream(proxy))
        self.tick()
        try:
            self.loop.run()
        finally:
            unlink(options.socket)
            self.end_all()

    def catch_signals(self) -> None:
        """Have children's ends and SIGTERM wake the loop."""
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGTERM, lambda number, frame: self.stop())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.loop.watch(reading, select.EPOLLIN, lambda events: self.woken(reading))

    def stop(self) -> None:
        """End the loop."""
        self.loop.running = False

    def tick(self) -> None:
        """Count the time in which nobody is attached, by the turns of the loop: a container that was frozen meanwhile
        must not end at the moment when it thaws."""
        self.ticking = self.host is None
        step = min(TICK, max(self.linger / 4, 0.02))
        if self.host is None:
            self.idle += step
            if self.idle > self.linger + step:
                self.stop()
            else:
                self.loop.later(step, self.tick)

    def end_all(self) -> None:
        """End everything that was started, for a second at most."""
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            table = self.tree.owners(self.living())
            if not table and self.all_seen(table, lambda owner: True):
                return
            for number in (signal.SIGSTOP, signal.SIGKILL):
                signal_all([each for each, _ in table.values()], number, {0})
            time.sleep(0.002)
            self.reap()

    def woken(self, fd: int) -> None:
        """A signal came."""
        try:
            os.read(fd, 4096)
        except BlockingIOError:
            pass
        self.reap()

    def reap(self) -> None:
        """Take note of children that have ended, ours and those that were left to us."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            call = self.mains.pop(pid, None)
            if call is not None:
                call.status = status
                if call.state == "running" and self.loop.running:  # else we have ended it ourselves, with all
                    self.conclude(call)
        for call in self.living():
            if call.lingering and self.tree.nothing_beside(set(self.mains)):
                self.let_go(call)

    # --- hosts

    def accept(self, listener: socket.socket) -> None:
        """Greet whoever connects, unless it comes from in here."""
        sock = self.accepted(listener)
        if sock is None:
            return
        pid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        if pid and self.tree.descends(pid):
            sock.close()
            return
        conn = Connection(self, sock)
        self.candidates.append(conn)
        if len(self.candidates) > CANDIDATES:
            self.lost(self.candidates[0])
        conn.send(self.hello)

    def accepted(self, listener: socket.socket) -> socket.socket | None:
        """A new connection. With no descriptor left it is refused, by means of the one that is spared for that."""
        try:
            sock = listener.accept()[0]
            sock.setblocking(False)
            return sock
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                os.close(self.spare)
                guarded(lambda: listener.accept()[0].close())
                self.spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            return None

    def request(self, conn: Connection, header: Header, body: bytes) -> None:
        """Meet a request, now or later."""
        if conn is not self.host:
            self.attached(conn)
        try:
            if "s" in header:
                self.stream_frame(conn, header, body)
                return
            n = field(header, "n", int)
        except Refused:
            raise Breach("no number") from None
        if "op" not in header:
            self.taken(conn, n, header)
            return
        try:
            handler = self.ops.get(field(header, "op", str))
            if handler is None:
                raise Refused("request", f"there is no operation {header['op'][:50]!r}")
            answer = handler(conn, n, header, body)
        except Breach:
            raise
        except Exception as error:
            conn.error(n, error)
            return
        if isinstance(answer, tuple):
            conn.reply(n, *answer)
        elif answer is not None:
            self.loop.go(self.answering(conn, n, answer))

    def answering(self, conn: Connection, n: int, task: Generator[float, None, Reply]) -> Task:
        """Reply when a task has ended."""
        try:
            answer = yield from task
        except Exception as error:
            conn.error(n, error)
            return
        if answer is not None:
            conn.reply(n, *answer)

    def attached(self, conn: Connection) -> None:
        """Let a connection take the place of the host."""
        old, self.host = self.host, conn
        self.idle = 0.0
        self.candidates.remove(conn)
        if old is not None:
            self.drop(old)
        for call in self.running():
            self.hold(call)

    def lost(self, conn: Connection) -> None:
        """A connection has ended."""
        if conn in self.candidates:
            self.candidates.remove(conn)
        self.drop(conn)
        if conn is self.host:
            self.host = None
            self.idle = 0.0
            if not self.ticking:
                self.tick()
            for call in self.running():
                self.hold(call)

    def drop(self, conn: Connection) -> None:
        """Close a connection; those who waited on it wait no more."""
        if conn.closed:
            return
        conn.close()
        for call in list(self.calls.values()):
            call.collectors = [each for each in call.collectors if each[0] is not conn]
            call.killers = [each for each in call.killers if each[0] is not conn]
            call.followers = [each for each in call.followers if each.conn is not conn]
            self.settle(call)

    def drained(self, conn: Connection) -> None:
        """The host has read: what was held back may go on."""
        for follower in list(conn.follows.values()):
            self.feed(follower)
        for stream in list(conn.streams.values()):
            stream.listen()

    def op_attach(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """Say what is here."""
        self.linger = float(number(header, "linger", self.linger))
        states = {id: "done" if call.state == "done" else "running" for id, call in self.calls.items()}
        text = ENCODER.encode(states).encode()
        while len(text) > MAX_BODY:
            for id in list(states)[: len(states) // 2]:
                del states[id]
            text = ENCODER.encode(states).encode()
        return {"clean": self.is_clean()}, text

    def op_ping(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """Give a sign of life."""
        return {}, b""

    # --- calls

    def running(self) -> list[Call]:
        """The calls that have not ended."""
        return [call for call in self.active.values() if call.state == "running"]

    def living(self) -> list[Call]:
        """The calls that processes may belong to."""
        return list(self.active.values())

    def call(self, header: Header) -> Call:
        """The call that a request is about."""
        id = field(header, "id", str)
        call = self.calls.get(id)
        if call is None:
            raise Refused("no_call", f"there is no call {id[:128]!r}")
        return call

    def begin(self, conn: Connection, header: Header, body: bytes) -> tuple[Call, bool]:
        """Start a call, or find the one that has its id."""
        id = field(header, "id", str)
        if not 0 < len(id) <= 128 or "\0" in id:
            raise Refused("request", "an id has 1 to 128 characters")
        known = self.calls.get(id)
        if known is not None:
            return known, True
        call = Call(header)
        call.starter = conn
        deadline = number(header, "deadline", 60.0, 10.0**9)
        call.began, call.meters = self.loop.now(), self.meters.read()
        try:
            self.spawn(call, header, body)
        except OSError as error:
            self.not_spawned(call, header, error)
        self.calls[id] = self.active[id] = call
        if call.pid:
            call.timer = self.loop.later(deadline, lambda: self.too_late(call))
        else:
            self.finished(call)
        self.hold(call)
        return call, False

    def not_spawned(self, call: Call, header: Header, error: OSError) -> None:
        """A fork that a limit has refused is a result, as it would be in a shell; all else is a mistake of the host."""
        call.limit = {errno.EAGAIN: "pids", errno.ENOMEM: "memory"}.get(error.errno or 0)
        if call.limit is None:
            raise Refused("spawn", "{:.200} cannot be started: {}".format(header["argv"][0], error.strerror)) from None
        call.status = 126 << 8

    def spawn(self, call: Call, header: Header, body: bytes) -> None:
        """Start a command with its pipes."""
        argv, environment = self.command(header)
        folder = os.path.join(self.files.workspace.path, self.files.absolute(field(header, "cwd", str, ".")))
        keep = int(min(number(header, "keep", 1024 * 1024), KEEP_MOST))
        spare = SPARE_FLOW if call.flow else SPARE
        theirs: list[int] = []
        actions: list[Any] = []
        try:
            if body or header.get("stdin"):
                call.stdin = piped(theirs, actions, 0)
            else:
                actions.append((os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0))
            for fd, name in ((1, "stdout"), (2, "stderr")):
                call.pipes[name] = Pipe(name, piped(theirs, actions, fd), Kept(keep, spare))
            if field(header, "control", bool, False):
                call.pipes["control"] = Pipe("control", piped(theirs, actions, 3), Kept(KEEP_CONTROL, SPARE))
            call.pid = self.forked(folder, argv, environment, actions)
        except BaseException:
            self.close_pipes(call)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        self.mains[call.pid] = call
        self.listen(call)
        call.stdin_ends = not field(header, "stdin", bool, False)
        if call.stdin >= 0:
            call.stdin_queue.append([memoryview(body), len(body), None, 0])
            self.feed_stdin(call)

    def command(self, header: Header) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment of a request."""
        argv, env = field(header, "argv", list), field(header, "env", dict, {})
        if not argv or not all(isinstance(word, str) for word in argv + list(env.values())):
            raise Refused("request", "argv and env consist of text, and argv is not empty")
        environment = dict(self.environment)
        environment.update(env)
        environment[TAG] = field(header, "id", str)
        return argv, environment

    def forked(self, folder: str, argv: list[str], environment: dict[str, str], actions: list[Any]) -> int:
        """Start a process in a session of its own; its number. Other than after a fork no memory is copied."""
        try:
            os.chdir(folder)
        except OSError as error:
            raise Refused("spawn", f"the folder {folder} cannot be entered: {error.strerror}") from None
        self.shield.lower()
        try:
            return os.posix_spawn(
                found_program(argv[0], environment.get("PATH", os.defpath)),
                argv,
                environment,
                file_actions=actions,
                setsid=True,
                setsigmask=[],
                setsigdef=RESET_SIGNALS,
            )
        finally:
            self.shield.restore()
            os.chdir("/")

    def op_start(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """Start a call."""
        call, known = self.begin(conn, header, body)
        return {"known": known, "pid": call.pid}, b""

    def op_run(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """Start a call, and reply at its end."""
        call, known = self.begin(conn, header, body)
        return self.collected(conn, n, call, {"known": known})

    def op_collect(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """Reply at the end of a call."""
        return self.collected(conn, n, self.call(header), {})

    def collected(self, conn: Connection, n: int, call: Call, extra: Header) -> Answer:
        """Reply with a result, now or later."""
        if call.state == "done":
            self.deliver(conn, n, call, extra)
        else:
            call.collectors.append((conn, n, extra))
            self.hold(call)
        return None

    def deliver(self, conn: Connection, n: int, call: Call, extra: Header) -> None:
        """Send a result with its output."""
        ends = {name: pipe.kept.ends() for name, pipe in call.pipes.items() if name != "control"}
        out, err = (b"".join(ends.get(name, ())) for name in ("stdout", "stderr"))
        fields = dict(call.fields, **extra)
        if len(out) + len(err) <= MAX_BODY:
            conn.reply(n, dict(fields, out=len(out), err=len(err)), out + err)
            return
        for name, (first, last) in ends.items():
            self.send_output(conn, n, name, 0, first)
            self.send_output(conn, n, name, call.pipes[name].kept.total - len(last), last)
        conn.reply(n, dict(fields, out=0, err=0))

    def send_output(self, conn: Connection, n: int, name: str, offset: int, data: bytes) -> None:
        """Send output in events."""
        for start in range(0, len(data), MAX_BODY):
            header = {"n": n, "event": "output", "stream": name, "offset": offset + start}
            conn.send(header, data[start : start + MAX_BODY])

    def op_follow(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """Send a call's output as it comes."""
        call = self.call(header)
        call.starter = None
        follower = conn.follows[n] = Follower(conn, n, call)
        call.followers.append(follower)
        self.feed(follower)
        return None

    def taken(self, conn: Connection, n: int, header: Header) -> None:
        """A follower has read."""
        follower = conn.follows.get(n)
        if follower is not None:
            try:
                follower.under_way = max(0, follower.under_way - number(header, "took"))
            except Refused:
                raise Breach("took") from None
            self.feed(follower)

    def feed(self, follower: Follower) -> None:
        """Send a follower what it has not had, as far as it has room: standard output, then standard error, then the
        control stream, so that what was written before a control message comes before it."""
        call = follower.call
        self.send_rest(follower)
        if call.state == "done" and follower.has_all and follower in call.followers:
            call.followers.remove(follower)
            del follower.conn.follows[follower.n]
            follower.conn.reply(follower.n, call.fields)
            self.settle(call)
        self.hold(call)

    def send_rest(self, follower: Follower) -> None:
        """Send it what it has room for."""
        for name, pipe in follower.call.pipes.items():
            while follower.at[name] < pipe.kept.total:
                if follower.room <= 0:
                    return
                offset, data = pipe.kept.piece(follower.at[name], min(follower.room, MAX_BODY))
                follower.at[name] = offset + len(data) if data else pipe.kept.total
                follower.under_way += len(data)
                if data:
                    self.send_output(follower.conn, follower.n, name, offset, data)

    def hold(self, call: Call) -> None:
        """Read a call's output, or let its pipes fill up: its reader is slow and it is one that waits for it. One that
        was just started by this host waits until it is followed."""
        wait = call.flow and call.state == "running" and not call.collectors
        if call.followers:
            wait = wait and not all(follower.has_all for follower in call.followers)
        else:
            wait = wait and call.starter is self.host
        if wait != call.paused:
            call.paused = wait
            self.listen(call)

    def listen(self, call: Call) -> None:
        """Watch a call's pipes, or stop that."""
        for pipe in call.pipes.values():
            if pipe.fd >= 0 and call.paused:
                self.loop.unwatch(pipe.fd)
            elif pipe.fd >= 0:
                self.loop.watch(pipe.fd, select.EPOLLIN, partial(self.readable, call, pipe))

    def readable(self, call: Call, pipe: Pipe, events: int) -> None:
        """Something came. What was written before a control message is read before it."""
        if pipe.name == "control":
            self.drain(call, ("stdout", "stderr"))
        self.read(call, pipe, 4)
        for follower in list(call.followers):
            self.feed(follower)

    def read(self, call: Call, pipe: Pipe, most: int) -> None:
        """Read a pipe, at most so many pieces."""
        for _ in range(most):
            if pipe.fd < 0:
                return
            try:
                data = os.read(pipe.fd, PIECE)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data = b""
            if not data:
                self.close_pipe(pipe)
                return
            pipe.kept.add(data)
            if call.state == "running" and call.total() > call.limit_bytes:
                call.limit = "output"
                self.conclude(call)

    def drain(self, call: Call, names: Iterable[str]) -> None:
        """Read what is ready; a pipe holds no more than this."""
        for name in names:
            self.read(call, call.pipes[name], 16)

    def close_pipe(self, pipe: Pipe) -> None:
        """A stream has ended."""
        if pipe.fd >= 0:
            self.loop.unwatch(pipe.fd)
            os.close(pipe.fd)
            pipe.fd = -1

    def close_pipes(self, call: Call) -> None:
        """Close our ends."""
        for pipe in call.pipes.values():
            self.close_pipe(pipe)
        self.close_stdin(call)

    # --- standard input

    def op_stdin(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """Write to a call's standard input, and reply when its pipe has it."""
        call = self.call(header)
        if call.stdin < 0 or call.stdin_ends:
            raise Refused("request", f"the call {call.id} takes no input (any more)")
        if sum(len(each[0]) for each in call.stdin_queue) > STDIN_BYTES:
            raise Refused("request", f"the call {call.id} does not read its input")
        call.stdin_ends = field(header, "end", bool, False)
        call.stdin_queue.append([memoryview(body), len(body), conn, n])
        self.feed_stdin(call)
        return None

    def feed_stdin(self, call: Call) -> None:
        """Write what the pipe takes."""
        while call.stdin_queue:
            data, size, conn, n = call.stdin_queue[0]
            try:
                while data:
                    data = call.stdin_queue[0][0] = data[os.write(call.stdin, data) :]
            except (BlockingIOError, InterruptedError):
                self.loop.watch(call.stdin, select.EPOLLOUT, lambda events: self.feed_stdin(call))
                return
            except OSError:
                self.close_stdin(call)
                return
            call.stdin_queue.popleft()
            if conn is not None:
                conn.reply(n, {"written": size})
        self.loop.unwatch(call.stdin)
        if call.stdin_ends:
            self.close_stdin(call)

    def close_stdin(self, call: Call) -> None:
        """End a call's input; what could not be written is refused."""
        if call.stdin >= 0:
            self.loop.unwatch(call.stdin)
            os.close(call.stdin)
            call.stdin = -1
        while call.stdin_queue:
            _, _, conn, n = call.stdin_queue.popleft()
            if conn is not None:
                conn.error(n, Refused("request", f"the call {call.id} takes no input any more"))

    # --- ends of calls

    def op_signal(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """Signal a call's process group."""
        call = self.call(header)
        what = number(header, "signal", most=64)
        if call.alive:
            os.killpg(call.pid, what)
        return {}, b""

    def op_kill(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """End a call and everything that belongs to it."""
        call = self.call(header)
        if call.state != "done":
            call.killers.append((conn, n))
            self.kill(call)
            return None
        return self.swept(call)

    def kill(self, call: Call) -> None:
        """End a call because somebody wants it."""
        call.killed = True
        if call.state == "running":
            self.conclude(call)

    def swept(self, call: Call) -> Generator[float, None, Reply]:
        """End what a background call has left."""
        if call.lingering:
            yield from self.sweep(lambda owner: owner in (None, call.id))
            self.let_go(call)
        return {}, b""

    def too_late(self, call: Call) -> None:
        """A deadline has passed: SIGTERM to the group, and after the grace the end of all that belongs to it."""
        if call.state == "running":
            call.timeout = True
            if call.alive:
                for what in (signal.SIGTERM, signal.SIGCONT):
                    send_signal(-call.pid, what)
            call.timer = self.loop.later(call.grace, lambda: self.conclude(call))
        elif call.lingering:
            self.loop.go(self.swept(call))

    def conclude(self, call: Call) -> None:
        """Begin to end a call: its main process has ended, or has to."""
        if call.state == "running":
            call.state = "ending"
            self.hold(call)
            self.loop.go(self.ending(call))

    def ending(self, call: Call) -> Task:
        """See to it that nothing is left of a call, and that its output is all there."""
        forced = call.alive
        if forced:
            send_signal(-call.pid, signal.SIGKILL)
        self.drain(call, call.pipes)
        if forced or not self.nothing_left(call):
            if not forced and not call.timeout:
                yield from self.until_closed(call)
            if call.background and not (forced or call.timeout or call.killed or call.limit):
                call.lingering = not self.nothing_left(call, pipes=False)
            else:
                call.survivors = yield from self.sweep(lambda owner: owner in (None, call.id))
            self.drain(call, call.pipes)
            self.reap()
        self.finished(call)

    def nothing_left(self, call: Call, pipes: bool = True) -> bool:
        """Whether a call whose main process has ended has provably left nothing."""
        if pipes and any(pipe.fd >= 0 for pipe in call.pipes.values()):
            return False
        return self.tree.nothing_beside(set(self.mains))

    def until_closed(self, call: Call) -> Task:
        """Wait a moment for those who still have its pipes."""
        for _ in range(20):
            if all(pipe.fd < 0 for pipe in call.pipes.values()):
                return
            yield DRAIN_SECONDS / 20

    def sweep(self, chosen: Callable[[str | None], bool]) -> Generator[float, None, int]:
        """End processes by their owner, and say how many withstand. They are stopped first, until none is new: so none
        can start others while they are ended one by one."""
        until = self.loop.now() + SWEEP_SECONDS
        stopped: set[int] = set()
        quiet, pause = 0, 0.001
        while True:
            table = self.tree.owners(self.living())
            victims = [each for each, owner in table.values() if chosen(owner)]
            late = self.loop.now() > until
            if not victims:
                quiet += 1
                if late or (self.all_seen(table, chosen) and (self.tree.exact or quiet == 3)):
                    return 0
                if quiet % 50 == 0:
                    yield pause
                continue
            if late:
                return len(victims)
            fresh = {each.pid for each in victims} - stopped
            stopped |= fresh
            others = {each.group for each, owner in table.values() if not chosen(owner)}
            signal_all(victims, signal.SIGSTOP if fresh else signal.SIGKILL, others)
            if not fresh:
                yield pause
                pause = min(2 * pause, 0.02)

    def all_seen(self, table: dict[int, tuple[Process, str | None]], chosen: Callable[[str | None], bool]) -> bool:
        """Whether a scan has missed nothing; what it has missed is ended where it is found."""
        self.reap()
        calls = self.living()
        missed = list(self.tree.missed(set(table), calls).values())
        others = {call.pid for call in calls}.union(each.group for each, _ in table.values())
        signal_all([each for each, owner in missed if each is not None and chosen(owner)], signal.SIGKILL, others)
        return not any(each is None or chosen(owner) for each, owner in missed)

    def finished(self, call: Call) -> None:
        """A call is done: answer all who wait for it, and keep its result."""
        call.state = "done"
        if not call.lingering:
            self.let_go(call)
        self.close_pipes(call)
        call.fields = self.exit_fields(call)
        for conn, n, extra in call.collectors:
            self.deliver(conn, n, call, extra)
        for follower in list(call.followers):
            self.feed(follower)
        for conn, n in call.killers:
            conn.reply(n, {})
        call.collectors, call.killers = [], []
        self.settle(call)

    def exit_fields(self, call: Call) -> Header:
        """How it went."""
        code = 128 + signal.SIGKILL if call.status is None else exit_code(call.status)
        kept = {name: pipe.kept for name, pipe in call.pipes.items()}
        totals = [kept[name].total if name in kept else 0 for name in ("stdout", "stderr")]
        fields = {
            "code": code,
            "limit": call.limit,
            "timeout": call.timeout,
            "seconds": round(self.loop.now() - call.began, 6),
            "stdout_total": totals[0],
            "stderr_total": totals[1],
            "truncated": any(kept[name].truncated for name in ("stdout", "stderr") if name in kept),
        }
        if call.limit is None and code and not call.killed:
            fields["limit"] = self.limit_of(call)
        if call.survivors:
            fields["survivors"] = call.survivors
        return fields

    def limit_of(self, call: Call) -> str | None:
        """The limit that a call has failed for."""
        memory, pids = self.meters.read()
        if memory > call.meters[0]:
            return "memory"
        if pids > call.meters[1]:
            return "pids"
        return "disk" if any(is_full(root.path) for root in self.files.roots) else None

    def settle(self, call: Call) -> None:
        """Count a result that nobody follows any more, and let the oldest go when there are too many."""
        if call.state != "done" or call.followers or call.id in self.done or self.calls.get(call.id) is not call:
            return
        self.done[call.id] = sum(pipe.kept.seal() for pipe in call.pipes.values())
        self.done_bytes += self.done[call.id]
        while len(self.done) > RESULTS:
            self.forget(next(iter(self.done)))
        for id, size in list(self.done.items()) if self.done_bytes > RESULT_BYTES else ():
            if size and self.done_bytes > RESULT_BYTES:
                self.done_bytes -= size
                self.done[id] = 0
                self.calls[id].forget_output()

    def forget(self, id: str) -> None:
        """Let a result go."""
        self.done_bytes -= self.done.pop(id, 0)
        call = self.calls.pop(id, None)
        if call is not None and call.lingering:
            self.loop.go(self.swept(call))

    def let_go(self, call: Call) -> None:
        """Nothing is left of a call."""
        call.lingering = False
        self.active.pop(call.id, None)
        if call.timer is not None:
            self.loop.cancel(call.timer)

    def op_forget(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """Let results go."""
        for id in field(header, "ids", list):
            call = self.calls.get(id) if isinstance(id, str) else None
            if call is not None and call.id in self.done and not call.lingering:
                self.forget(call.id)
        return {}, b""

    def op_sweep(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """End everything that belongs to no call of those that are named."""
        keep = [id for id in field(header, "keep", list, []) if isinstance(id, str)]
        return self.swept_all(keep)

    def swept_all(self, keep: list[str]) -> Generator[float, None, Reply]:
        """End calls, and what is left."""
        owners = [owner for _, owner in self.tree.owners(self.living()).values()]
        others = [call for call in self.living() if call.id not in keep]
        for call in others:
            self.kill(call)
        while any(call.state != "done" for call in others):
            yield 0.002
        yield from self.sweep(lambda owner: owner not in keep)
        for call in others:
            self.let_go(call)
        return {"killed": sum(owner not in keep for owner in owners)}, b""

    def op_reset(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """Make it as if it were new."""
        return self.renewed()

    def renewed(self) -> Generator[float, None, Reply]:
        """End all, forget all, remove all."""
        yield from self.swept_all([])
        for id in list(self.done):
            self.forget(id)
        for root in self.files.roots:
            fd = root.opened()
            try:
                yield from self.files.emptied(fd)
            except OSError:
                pass
            finally:
                os.close(fd)
        return {"clean": self.is_clean() and not self.calls and not self.tree.owners([])}, b""

    def is_clean(self) -> bool:
        """Whether nothing runs, and nothing is where commands can write."""
        places = [root.path for root in self.files.roots]
        if not self.local and os.path.isdir("/dev/shm"):
            places.append("/dev/shm")
        return not self.living() and all(is_empty(place) for place in places)

    # --- files

    def op_read(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """Read a piece of a file."""
        path, offset = field(header, "path", str), int(number(header, "offset", 0))
        return self.files.read(path, offset, int(number(header, "limit", MAX_BODY)))

    def op_write(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """Write a piece of a file."""
        path, mode = field(header, "path", str), header.get("mode")
        if header.get("append"):
            return self.files.append(path, body, None if mode is None else number(header, "mode", most=0o7777))
        return self.files.write(conn, header, path, number(header, "offset", 0), body)

    def op_stat(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """Describe an entry."""
        return self.files.stat(field(header, "path", str))

    def op_list(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """List a folder."""
        path, after = field(header, "path", str, "."), field(header, "after", str, "")
        limit = int(number(header, "limit", 1000))
        return self.files.page(path, field(header, "recursive", bool, False), after, limit)

    def op_remove(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """Remove a file or a folder."""
        return self.files.remove(field(header, "path", str))

    def op_mkdir(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """Make a folder."""
        return self.files.mkdir(field(header, "path", str))

    def op_watch(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """Watch a folder."""
        place = self.files.place(field(header, "path", str, "."))
        os.close(place.itself())
        if len(conn.watches) >= 16:
            raise Refused("request", "there are 16 watches already")
        conn.watches.add(n)
        self.loop.go(self.files.watch(conn, n, place))
        return None

    def op_unwatch(self, conn: Connection, n: int, header: Header, body: bytes) -> Answer:
        """End a watch, or the following of a call."""
        of = field(header, "of", int)
        if of in conn.watches:
            conn.watches.remove(of)
            conn.reply(of, {})
        follower = conn.follows.pop(of, None)
        if follower is not None:
            follower.call.followers.remove(follower)
            conn.reply(of, {})
            self.settle(follower.call)
            self.hold(follower.call)
        return {}, b""

    # --- the network

    def open_stream(self, listener: socket.socket) -> None:
        """A program in here wants to get out: its connection goes to the host, if there is one."""
        sock = self.accepted(listener)
        if sock is None:
            return
        if self.host is None or len(self.host.streams) >= STREAMS:
            sock.close()
            return
        self.streams += 1
        Stream(self.host, self.streams, sock)

    def stream_frame(self, conn: Connection, header: Header, body: bytes) -> None:
        """Something for one of the streams; one that is closed takes nothing."""
        stream = conn.streams.get(field(header, "s", int))
        if stream is not None:
            stream.take(header, body)


def exit_code(status: int) -> int:
    """What a shell would call it."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def is_full(path: str) -> bool:
    """Whether nothing more can be written there."""
    try:
        info = os.statvfs(path)
    except OSError:
        return False
    return info.f_bavail * info.f_frsize < PIECE or (info.f_files > 0 and info.f_favail < 4)


def piped(theirs: list[int], actions: list[Any], fd: int) -> int:
    """A pipe that a command has as ``fd``; our end of it."""
    reading, writing = os.pipe()
    mine, other = (writing, reading) if fd == 0 else (reading, writing)
    theirs.append(other)
    actions.append((os.POSIX_SPAWN_DUP2, other, fd))
    os.set_blocking(mine, False)
    return mine


def found_program(name: str, path: str) -> str:
    """Where a program is."""
    if "/" in name:
        return name
    found = errno.ENOENT
    for folder in path.split(":"):
        full = os.path.join(folder, name)
        if os.access(full, os.X_OK) and not os.path.isdir(full):
            return full
        if os.path.isfile(full):
            found = errno.EACCES
    raise OSError(found, os.strerror(found))


def listening(path: str) -> socket.socket:
    """Listen on a socket that nobody else may connect to."""
    unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(before)
    listener.listen(16)
    listener.setblocking(False)
    return listener


def proxy_listener(port: int | None) -> socket.socket | None:
    """Listen where programs in here look for their proxy."""
    if port is None:
        return None
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(64)
    listener.setblocking(False)
    return listener


def unlink(path: str) -> None:
    """Remove a file that may not be there."""
    try:
        os.unlink(path)
    except OSError:
        pass


def own_digest() -> str:
    """What this program is, as ``frames.digest_of`` counts it."""
    try:
        from _blake2 import blake2b

        return str(blake2b(own_source(), digest_size=16).hexdigest())
    except Exception:
        return ""


def own_source() -> bytes:
    """The text of this program: a file, or what followed ``-c``."""
    if "__file__" in globals():
        with open(__file__, "rb") as file:
            return file.read()
    words = read_file("/proc/self/cmdline", 2 * 1024 * 1024).split(b"\0")
    return words[words.index(b"-c") + 1]


# --- the bridge ----------------------------------------------------------------------------------------------------


def connected(path: str, seconds: float) -> socket.socket:
    """Connect to a supervisor that may just be starting."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    until = time.monotonic() + seconds
    while True:
        try:
            sock.connect(path)
            return sock
        except OSError:
            if time.monotonic() > until:
                raise
        time.sleep(0.003)


def bridge(path: str, seconds: float) -> None:
    """Join standard input and output to a supervisor, until either ends."""
    sock = connected(path, seconds)
    sock.setblocking(False)
    os.set_blocking(1, False)
    inward, outward = memoryview(b""), memoryview(b"")
    while True:
        reading = ([] if inward else [0]) + ([] if outward else [sock.fileno()])
        writing = ([sock.fileno()] if inward else []) + ([1] if outward else [])
        readable, writable, _ = select.select(reading, writing, [])
        if 0 in readable:
            inward = memoryview(os.read(0, MAX_BODY))
            if not inward:
                return
        if sock.fileno() in readable:
            outward = memoryview(sock.recv(MAX_BODY))
            if not outward:
                return
        if inward and (0 in readable or sock.fileno() in writable):
            inward = inward[written(sock.fileno(), inward) :]
        if outward and (sock.fileno() in readable or 1 in writable):
            outward = outward[written(1, outward) :]


def written(fd: int, data: memoryview) -> int:
    """Write what goes at once."""
    try:
        return os.write(fd, data)
    except BlockingIOError:
        return 0


def occupy() -> None:
    """Have the descriptors 0 to 3 be in use, so that no pipe of ours is one of those that commands are given."""
    while True:
        fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        if fd > 3:
            os.close(fd)
            return


def main(arguments: list[str]) -> int:
    """Do what the command line says."""
    options = Options(arguments[1:])
    if arguments[0] == "bridge":
        try:
            bridge(options.socket, float(options.values.get("wait") or 10.0))
        except OSError as error:
            sys.stderr.write(f"bridge: {options.socket}: {error}\n")
            return 1
        return 0
    occupy()
    Supervisor(options).serve(options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
