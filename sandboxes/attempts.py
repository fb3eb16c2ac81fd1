"""What ``probe.py`` has tried inside of a sandbox; nothing but the standard library, from Python 3.8 on.

It is sent on standard input: ``python3 - WHAT [ARGUMENT]...``. Each attempt prints one JSON object a line, with
``name``, ``ok`` and ``detail``; those on limits print what they reached, and the host judges it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not known to Python 3.8
    Verdict = tuple[bool, str]

STEP = 1024 * 1024
BURNERS = 4
BURN_SECONDS = 0.6
CONNECT_SECONDS = 0.5

HARMLESS_DEVICES = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)}
"""null, zero, full, random, urandom, tty, console, ptmx: as major and minor number."""

MADE_BY_THE_ENGINE = {"/etc/resolv.conf", "/etc/hosts", "/etc/hostname", "/sbin/docker-init", "/usr/sbin/docker-init"}
"""Single files of the host that Docker shows in every container, read-only."""

VIRTUAL = {"overlay", "tmpfs", "proc", "sysfs", "cgroup", "cgroup2", "mqueue", "devpts", "devtmpfs", "ramfs", "gofer"}

NO_WAY = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPERM, errno.EACCES}
"""How the kernel says that there is nowhere to send to."""

CLONE_NEWUSER, CLONE_NEWNS, CLONE_NEWNET = 0x10000000, 0x00020000, 0x40000000
PR_GET_NO_NEW_PRIVS = 39
AF_VSOCK = 40
IO_URING_SETUP = 425

libc = ctypes.CDLL(None, use_errno=True)


def tell(**fields: object) -> None:
    """Print one result."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


# --- limits: reach for more than is allowed -------------------------------------------------------------------------


def memory(limit: str) -> None:
    """Touch half as much again as the limit allows; a limit that holds ends this process on the way."""
    kept = []
    for done in range(0, int(limit) * 3 // 2, STEP):
        kept.append(b"x" * STEP)
        if done % (16 * STEP) == 0:
            tell(reached=done)
    tell(reached=len(kept) * STEP, all=True)


def pids(limit: str) -> None:
    """Start more processes than the limit allows."""
    held, hold = os.pipe()
    started = 0
    reason = ""
    try:
        while started < int(limit) + 16:
            if os.fork() == 0:
                os.close(hold)
                os.read(held, 1)
                os._exit(0)
            started += 1
    except OSError as error:
        reason = errno.errorcode.get(error.errno or 0, str(error))
    os.close(hold)
    tell(reached=started, all=not reason, reason=reason)


def cpu() -> None:
    """Compute in several processes at once; the share is in cores."""
    begun = time.monotonic()
    children = [_burner(begun + BURN_SECONDS) for _ in range(BURNERS)]
    for child in children:
        os.waitpid(child, 0)
    used = os.times()
    tell(reached=(used.children_user + used.children_system) / (time.monotonic() - begun))


def _burner(until: float) -> int:
    child = os.fork()
    if child == 0:
        while time.monotonic() < until:
            pass
        os._exit(0)
    return child


def disk(limit: str, folder: str) -> None:
    """Write more than fits."""
    path = os.path.join(folder, ".ridethrough-fill")
    reached, reason = 0, ""
    try:
        with open(path, "wb", buffering=0) as file:
            while reached < int(limit) * 3 // 2:
                reached += file.write(b"\0" * STEP) or 0
    except OSError as error:
        reason = errno.errorcode.get(error.errno or 0, str(error))
    if os.path.exists(path):
        os.unlink(path)
    tell(reached=reached, all=not reason, reason=reason)


# --- walls: try to get through --------------------------------------------------------------------------------------


def network(gateway: str = "") -> Verdict:
    """Look for a way out. Connections are tried only where there is no interface that would carry them."""
    others = [name for _, name in socket.if_nameindex() if name != "lo"]
    if others:
        return False, "there are interfaces: " + ", ".join(others)
    targets = [(socket.AF_INET, "198.51.100.1"), (socket.AF_INET, "169.254.169.254"), (socket.AF_INET6, "2001:db8::1")]
    if gateway:
        targets.append((socket.AF_INET, gateway))
    through = [address for family, address in targets if not _unreachable(family, address)]
    if through:
        return False, "not refused at once: " + ", ".join(through)
    return True, "only lo; " + ", ".join(address for _, address in targets) + " unreachable"


def _unreachable(family: int, address: str) -> bool:
    """Nobody was asked: a refusal by the other side would be an answer."""
    try:
        connection = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        return True
    with connection:
        connection.settimeout(CONNECT_SECONDS)
        return connection.connect_ex((address, 80)) in NO_WAY


def root() -> Verdict:
    """Write where only the image may be."""
    open_to = [folder for folder in _folders() if _writable(folder)]
    return not open_to, "writable: " + ", ".join(
        open_to
    ) if open_to else "nothing but /workspace, /tmp and shared memory"


def _folders() -> Iterator[str]:
    yield from ("/", "/etc", "/usr/bin", "/var/tmp", "/var/lib", "/root", "/home", "/opt", "/run", "/dev")
    yield from ("/sys/fs/cgroup", "/proc/sys/kernel", "/sys/kernel")


def _writable(folder: str) -> bool:
    path = os.path.join(folder, ".ridethrough-probe")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    except OSError:
        return False
    os.unlink(path)
    return True


def _status(key: str) -> str:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return dict(line.split(":", 1) for line in file if ":" in line).get(key, "").strip()


CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def capabilities() -> Verdict:
    """Every set is empty, the bounding one too: nothing can be gained."""
    sets = {name: value for name in CAPABILITIES if (value := _status(name))}
    held = [f"{name} {value}" for name, value in sets.items() if int(value, 16)]
    return bool(sets) and not held, ", ".join(held) if held else "none, and none can be gained"


def privileges() -> Verdict:
    """Programs with the setuid bit gain nothing."""
    flag = libc.prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
    return flag == 1, f"no_new_privs is {flag}"


def seccomp() -> Verdict:
    """A filter is on, and what it and the missing capabilities are for is refused."""
    mode = _status("Seccomp")
    allowed = [name for name, attempt in _FORBIDDEN.items() if _allowed(attempt)]
    if mode != "2":
        return False, f"no filter (mode {mode or 'unknown'})" + (f"; allowed: {', '.join(allowed)}" if allowed else "")
    return not allowed, f"allowed: {', '.join(allowed)}" if allowed else f"refused: {', '.join(_FORBIDDEN)}"


def _allowed(attempt: Callable[[], object]) -> bool:
    """In a child, so that an attempt that succeeds changes nothing for those that follow."""
    child = os.fork()
    if child == 0:
        try:
            attempt()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def _call(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")


_FORBIDDEN = {
    "unshare of the user namespace": lambda: _call(libc.unshare(CLONE_NEWUSER)),
    "unshare of mounts": lambda: _call(libc.unshare(CLONE_NEWNS)),
    "unshare of the network": lambda: _call(libc.unshare(CLONE_NEWNET)),
    "mount": lambda: _call(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None)),
    "raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close(),
    "packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3).close(),
    "vsock": lambda: socket.socket(AF_VSOCK, socket.SOCK_STREAM).close(),
    "io_uring": lambda: _call(libc.syscall(IO_URING_SETUP, 1, ctypes.create_string_buffer(256))),
    "ptrace": lambda: _call(libc.ptrace(0, 0, 0, 0)),
    "chroot": lambda: os.chroot("/tmp"),
    "setuid": lambda: os.setuid(0),
}


def user() -> Verdict:
    """Nobody in particular."""
    ids = {os.getuid(), os.geteuid(), os.getgid(), os.getegid(), *os.getgroups()}
    return 0 not in ids, f"uid {os.getuid()}, gid {os.getgid()}"


def engine_socket() -> Verdict:
    """Whoever reaches the engine's socket is root on the host."""
    names = ("docker.sock", "docker/docker.sock", "containerd/containerd.sock", "podman/podman.sock", "crio/crio.sock")
    found = [path for base in ("/run", "/var/run") for path in (f"{base}/{name}" for name in names) if _exists(path)]
    return not found, "found " + ", ".join(found) if found else "none"


def _exists(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except PermissionError:
        return True
    except OSError:
        return False


def host_paths() -> Verdict:
    """Nothing of the host is mounted but the few read-only files that the engine itself puts there."""
    found = [point for point, kind, options in _mounts() if _of_the_host(point, kind, options)]
    return not found, "mounted: " + ", ".join(found) if found else "none"


def _mounts() -> Iterator[tuple[str, str, str]]:
    """Mount point, kind of filesystem, options."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            yield before.split()[4], after.split()[0], before.split()[5]


def _of_the_host(point: str, kind: str, options: str) -> bool:
    if kind in VIRTUAL or kind.startswith("fuse.gvisor") or kind in ("9p", "none"):
        return False
    return point not in MADE_BY_THE_ENGINE or "ro" not in options.split(",")


def init() -> Verdict:
    """An orphan that ends is taken care of, instead of filling the process table."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        orphan = os.fork()
        if orphan:
            os.write(writer, str(orphan).encode())
        os._exit(0)
    os.wait()
    orphan = int(os.read(reader, 32))
    gone = _until(lambda: not os.path.exists(f"/proc/{orphan}"))
    return gone, "orphans are reaped" if gone else "an orphan stays a zombie: nothing reaps it"


def _until(done: Callable[[], bool], seconds: float = 2.0) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        select.select([], [], [], 0.01)
    return True


def devices() -> Verdict:
    """No device that opens but the harmless ones, and none can be made that does."""
    node = "/tmp/.ridethrough-node"
    _refused(lambda: os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(254, 0)))
    found = [path for path in (*_below("/dev"), node) if _opens(path)]
    _refused(lambda: os.unlink(node))
    return not found, "opened " + ", ".join(found) if found else "null, zero, random and terminals only"


def _opens(path: str) -> bool:
    return os.path.lexists(path) and _is_device(path) and not _refused(lambda: os.close(os.open(path, os.O_RDONLY)))


def _refused(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return True
    return False


def _below(folder: str) -> Iterable[str]:
    for base, _, names in os.walk(folder):
        if base != "/dev/pts":
            yield from (os.path.join(base, name) for name in names)


def _is_device(path: str) -> bool:
    mode = os.lstat(path)
    if stat.S_ISBLK(mode.st_mode):
        return True
    return stat.S_ISCHR(mode.st_mode) and (os.major(mode.st_rdev), os.minor(mode.st_rdev)) not in HARMLESS_DEVICES


def kernel() -> Verdict:
    """Whose kernel answers; the host compares it with its own."""
    return True, os.uname().release


WALLS = {
    "root": root,
    "capabilities": capabilities,
    "privileges": privileges,
    "seccomp": seccomp,
    "user": user,
    "engine socket": engine_socket,
    "host paths": host_paths,
    "init": init,
    "devices": devices,
    "kernel": kernel,
}


def walls(gateway: str = "") -> None:
    """Try all of them; one that breaks has proved nothing."""
    for name, attempt in {"network": lambda: network(gateway), **WALLS}.items():
        try:
            ok, detail = attempt()
        except Exception as error:
            ok, detail = False, f"could not be tried: {error!r}"
        tell(name=name, ok=ok, detail=detail)


def main(what: str, *words: str) -> None:
    """Make one attempt."""
    attempts: dict[str, Callable[..., None]] = {"memory": memory, "pids": pids, "cpu": cpu, "disk": disk}
    attempts.get(what, walls)(*words)


if __name__ == "__main__":
    main(*sys.argv[1:])
