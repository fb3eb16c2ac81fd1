"""Ways out of a sandbox, tried from inside by code that knows them: each is refused, and by whom it should be.

One container for all: an attempt that succeeds leaves its mark on the others, and that is as it should be.
"""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import AsyncGenerator, Iterator

import pytest
from tests.sandboxes.conftest import SESSION

from ridethrough.runtime.errors import SandboxError
from ridethrough.sandboxes.docker import DockerHost
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import Sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.processes]

PRELUDE = """
import ctypes, errno, fcntl, os, resource, signal, socket, stat, struct, sys

libc = ctypes.CDLL(None, use_errno=True)
ARM = os.uname().machine == "aarch64"
NUMBERS = {
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "bpf": (321, 280), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "init_module": (175, 105), "finit_module": (313, 273), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "clone3": (435, 435), "fsopen": (430, 430), "open_tree": (428, 428),
    "move_mount": (429, 429), "pidfd_getfd": (438, 438), "process_vm_readv": (310, 270), "reboot": (169, 142),
    "swapon": (167, 224), "syslog": (103, 116), "fanotify_init": (300, 262), "pivot_root": (155, 41),
    "clock_settime": (227, 112), "kcmp": (312, 272), "mount_setattr": (442, 442),
}

def call(name, *args):
    if getattr(libc, name)(*args) < 0:
        raise OSError(ctypes.get_errno(), name)

def syscall(name, *args):
    if libc.syscall(NUMBERS[name][ARM], *args) < 0:
        raise OSError(ctypes.get_errno(), name)

def connect(family, address, kind=socket.SOCK_STREAM):
    with socket.socket(family, kind) as s:
        s.settimeout(2)
        s.connect(address)
        if kind == socket.SOCK_DGRAM:
            s.send(b"x")

def write(path, data="1"):
    with open(path, "w") as file:
        file.write(data)

SPACE = ctypes.create_string_buffer(256)
SUPERVISOR = os.getppid()
"""

EPILOGUE = """
except OSError as error:
    print("refused", errno.errorcode.get(error.errno, error.errno))
else:
    print("done")
"""

NO_RIGHT = {"EPERM", "EACCES"}
NO_WRITE = {"EROFS", "EACCES", "EPERM"}
NO_WAY = {"ENETUNREACH", "EHOSTUNREACH", "EADDRNOTAVAIL"}

ATTEMPTS: dict[str, tuple[str, set[str]]] = {
    # mounts and namespaces
    "mount tmpfs": ('call("mount", b"none", b"/tmp", b"tmpfs", 0, None)', {"EPERM"}),
    "mount proc": ('call("mount", b"proc", b"/tmp", b"proc", 0, None)', {"EPERM"}),
    "mount cgroup": ('call("mount", b"none", b"/tmp", b"cgroup", 0, b"rdma")', {"EPERM"}),
    "bind mount": ('call("mount", b"/", b"/tmp", None, 4096, None)', {"EPERM"}),
    "remount the root writable": ('call("mount", None, b"/", None, 32, None)', {"EPERM"}),
    "uncover /proc": ('call("umount2", b"/proc/acpi", 2)', {"EPERM"}),
    "new mount calls": ('syscall("fsopen", b"tmpfs", 0)', {"EPERM", "ENOSYS"}),
    "clone a mount": ('syscall("open_tree", -100, b"/", 1)', {"EPERM", "ENOSYS"}),
    "move a mount": ('syscall("move_mount", -1, b"", -1, b"", 0)', {"EPERM", "ENOSYS"}),
    "change a mount": ('syscall("mount_setattr", -100, b"/", 0, SPACE, 32)', {"EPERM", "ENOSYS"}),
    "pivot the root": ('syscall("pivot_root", b"/tmp", b"/tmp")', {"EPERM"}),
    "chroot": ('os.chroot("/tmp")', {"EPERM"}),
    "unshare the user namespace": ('call("unshare", 0x10000000)', {"EPERM"}),
    "unshare mounts": ('call("unshare", 0x00020000)', {"EPERM"}),
    "unshare the network": ('call("unshare", 0x40000000)', {"EPERM"}),
    "unshare control groups": ('call("unshare", 0x02000000)', {"EPERM"}),
    "clone into a user namespace": ('syscall("clone3", SPACE, 88)', {"ENOSYS"}),
    "join a namespace": ('call("setns", os.open("/proc/self/ns/net", 0), 0)', {"EPERM"}),
    # other processes
    "ptrace the supervisor": ('call("ptrace", 16, SUPERVISOR, 0, 0)', {"EPERM"}),
    "ptrace the first process": ('call("ptrace", 16, 1, 0, 0)', {"EPERM"}),
    "seize a process": ('call("ptrace", 0x4206, SUPERVISOR, 0, 0)', {"EPERM"}),
    "read the supervisor's memory": ('open(f"/proc/{SUPERVISOR}/mem", "rb").close()', NO_RIGHT),
    "read its environment": ('open(f"/proc/{SUPERVISOR}/environ", "rb").read()', NO_RIGHT),
    "take its descriptors": ('os.listdir(f"/proc/{SUPERVISOR}/fd")', NO_RIGHT),
    "go through its root": ('os.listdir(f"/proc/{SUPERVISOR}/root/")', NO_RIGHT),
    "copy from a process": ('syscall("process_vm_readv", 1, None, 0, None, 0, 0)', {"EPERM"}),
    "copy a descriptor": ('syscall("pidfd_getfd", os.pidfd_open(SUPERVISOR), 0, 0)', {"EPERM"}),
    "compare kernel objects": ('syscall("kcmp", SUPERVISOR, os.getpid(), 0, 0, 0)', {"EPERM"}),
    # the kernel
    "bpf": ('syscall("bpf", 0, SPACE, 128)', {"EPERM"}),
    "keyctl": ('syscall("keyctl", 0, -3, 1)', {"EPERM"}),
    "add a key": ('syscall("add_key", b"user", b"x", b"y", 1, -3)', {"EPERM"}),
    "ask for a key": ('syscall("request_key", b"user", b"x", None, -3)', {"EPERM"}),
    "kexec": ('syscall("kexec_load", 0, 0, None, 0)', {"EPERM"}),
    "kexec of a file": ('syscall("kexec_file_load", -1, -1, 0, b"", 0)', {"EPERM"}),
    "load a module": ('syscall("init_module", None, 0, b"")', {"EPERM"}),
    "load a module from a file": ('syscall("finit_module", -1, b"", 0)', {"EPERM"}),
    "perf events": ('syscall("perf_event_open", SPACE, 0, -1, -1, 0)', {"EPERM"}),
    "userfaultfd": ('syscall("userfaultfd", 1)', {"EPERM"}),
    "io_uring": ('syscall("io_uring_setup", 1, SPACE)', {"EPERM", "ENOSYS"}),
    "files by handle": ('syscall("open_by_handle_at", -100, SPACE, 0)', {"EPERM"}),
    "handles of files": ('syscall("name_to_handle_at", -100, b"/", SPACE, SPACE, 0)', {"EPERM"}),
    "watch the filesystem": ('syscall("fanotify_init", 0, 0)', {"EPERM"}),
    "the kernel's log": ('syscall("syslog", 3, SPACE, 64)', {"EPERM"}),
    "swap": ('syscall("swapon", b"/tmp/x", 0)', {"EPERM"}),
    "set the clock": ('syscall("clock_settime", 0, SPACE)', {"EPERM"}),
    "reboot": ('syscall("reboot", 0xFEE1DEAD, 672274793, 0x89ABCDEF, None)', {"EPERM"}),
    "set the host's name": ('call("sethostname", b"x", 1)', {"EPERM"}),
    # more rights
    "become root": ("os.setuid(0)", {"EPERM"}),
    "become root's group": ("os.setgroups([0])", {"EPERM"}),
    "a real-time schedule": ("os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))", {"EPERM"}),
    "more priority": ("os.nice(-5)", NO_RIGHT),
    "be spared when memory is short": ('write("/proc/self/oom_score_adj", "-1000")', NO_WRITE),
    "more descriptors": (
        "\n    try: resource.setrlimit(resource.RLIMIT_NOFILE, (10**5, 10**5))"
        "\n    except ValueError as error: raise OSError(errno.EPERM, str(error))",
        {"EPERM"},
    ),
    "trust a file with capabilities": (
        'write("/tmp/x"); os.setxattr("/tmp/x", "security.capability", struct.pack("<5I", 0x2000001, 1, 0, 1, 0))',
        {"EPERM", "ENOTSUP"},
    ),
    # devices
    "make a block device": ('os.mknod("/tmp/disk", stat.S_IFBLK | 0o600, os.makedev(254, 0))', {"EPERM"}),
    "make a memory device": ('os.mknod("/tmp/mem", stat.S_IFCHR | 0o600, os.makedev(1, 1))', {"EPERM"}),
    "a network device": ('open("/dev/net/tun").close()', {"ENOENT", *NO_RIGHT}),
    "the machine's memory": ('open("/dev/mem").close()', {"ENOENT", *NO_RIGHT}),
    "the virtual machine monitor": ('open("/dev/kvm").close()', {"ENOENT", *NO_RIGHT}),
    # /proc and /sys
    "core_pattern": ('write("/proc/sys/kernel/core_pattern", "|/tmp/x")', NO_WRITE),
    "modprobe": ('write("/proc/sys/kernel/modprobe", "/tmp/x")', NO_WRITE | {"ENOENT"}),
    "binfmt_misc": ('write("/proc/sys/fs/binfmt_misc/register")', NO_WRITE | {"ENOENT"}),
    "sysctl": ('write("/proc/sys/net/ipv4/ip_forward")', NO_WRITE),
    "sysrq": ('write("/proc/sysrq-trigger", "h")', NO_WRITE | {"ENOENT"}),
    "uevent helper": ('write("/sys/kernel/uevent_helper", "/tmp/x")', NO_WRITE | {"ENOENT"}),
    "power": ('write("/sys/power/state", "mem")', NO_WRITE | {"ENOENT"}),
    "release_agent": ('write("/sys/fs/cgroup/memory/release_agent", "/tmp/x")', NO_WRITE | {"ENOENT"}),
    "a control group": (
        'os.mkdir("/sys/fs/cgroup/memory/x" if os.path.exists("/sys/fs/cgroup/memory") else "/sys/fs/cgroup/x")',
        NO_WRITE,
    ),
    "more memory": (
        'write("/sys/fs/cgroup/memory/memory.limit_in_bytes" if '
        'os.path.exists("/sys/fs/cgroup/memory") else "/sys/fs/cgroup/memory.max", "9999999999")',
        NO_WRITE,
    ),
    "the kernel's memory": (
        'assert not open("/proc/kcore", "rb").read(1); raise OSError(errno.EACCES, "")',
        {*NO_RIGHT, "ENOENT"},
    ),
    # sockets
    "raw socket": ("socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)", {"EPERM"}),
    "raw socket of IPv6": ("socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)", {"EPERM"}),
    "packet socket": ("socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)", {"EPERM"}),
    "the hypervisor": ("socket.socket(40, socket.SOCK_STREAM)", {"EPERM"}),
    "the kernel's cryptography": ("socket.socket(38, socket.SOCK_SEQPACKET)", {"EPERM", "EAFNOSUPPORT"}),
    "an address for an interface": (
        'fcntl.ioctl(socket.socket(), 0x8916, struct.pack("16sH2x4s8x", b"lo", 2, bytes([198, 51, 100, 9])))',
        {"EPERM"},
    ),
    # the network
    "a public address": ('connect(socket.AF_INET, ("198.51.100.1", 443))', NO_WAY),
    "a public address over UDP": ('connect(socket.AF_INET, ("198.51.100.1", 53), socket.SOCK_DGRAM)', NO_WAY),
    "the metadata address": ('connect(socket.AF_INET, ("169.254.169.254", 80))', NO_WAY),
    "the bridge's gateway": ('connect(socket.AF_INET, ("172.17.0.1", 2375))', NO_WAY),
    "a private address": ('connect(socket.AF_INET, ("10.0.0.1", 80))', NO_WAY),
    "IPv6": ('connect(socket.AF_INET6, ("2001:db8::1", 443))', NO_WAY),
    "IPv6 metadata": ('connect(socket.AF_INET6, ("fd00:ec2::254", 80))', NO_WAY),
    "multicast": ('connect(socket.AF_INET, ("224.0.0.1", 5353), socket.SOCK_DGRAM)', NO_WAY),
    # the engine
    "Docker's socket": ('connect(socket.AF_UNIX, "/var/run/docker.sock")', {"ENOENT", "EACCES"}),
    "containerd's socket": ('connect(socket.AF_UNIX, "/run/containerd/containerd.sock")', {"ENOENT", "EACCES"}),
    "containerd's shim": ('connect(socket.AF_UNIX, b"\\0/containerd-shim/x.sock")', {"ECONNREFUSED"}),
    # files
    "the image's programs": ('write("/usr/bin/python3", "x")', NO_WRITE),
    "the users": ('write("/etc/passwd", "x")', NO_WRITE),
    "where names are looked up": ('write("/etc/resolv.conf", "nameserver 198.51.100.1")', NO_WRITE),
    "the first process's program": ('write("/proc/1/exe", "x")', NO_WRITE | {"ETXTBSY", "ENOENT"}),
    "the supervisor's program": ('write("/opt/ridethrough/supervisor.pyc", "x")', NO_WRITE | {"ENOENT"}),
    "the root": ('write("/x")', NO_WRITE),
    "libraries for everybody": ('write("/etc/ld.so.preload", "/tmp/x.so")', NO_WRITE),
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One event loop for the module, since it shares a sandbox."""
    return "asyncio"


@pytest.fixture(scope="module")
async def host(engine: object, python_image: str) -> AsyncGenerator[DockerHost]:
    async with DockerHost.open(labels=SESSION) as host:
        yield host


@pytest.fixture(scope="module")
async def box(host: DockerHost) -> AsyncGenerator[Sandbox]:
    sandbox = await host.create(SandboxProfile(), id=f"escape-{secrets.token_hex(4)}")
    yield sandbox
    await sandbox.aclose()


async def python(box: Sandbox, code: str) -> str:
    """What a program in the sandbox prints."""
    result = await box.exec(["python3", "-c", code], timeout=20)
    assert result.exit_code == 0, result.stderr
    return result.stdout.strip()


async def attempt(box: Sandbox, line: str) -> str:
    """``done``, or by what it was refused."""
    return await python(box, f"{PRELUDE}\ntry:\n    {line.lstrip()}{EPILOGUE}")


@pytest.mark.parametrize("name", ATTEMPTS)
async def test_it_is_refused(box: Sandbox, name: str) -> None:
    line, by = ATTEMPTS[name]
    told = await attempt(box, line)
    assert told.startswith("refused ")
    assert told.removeprefix("refused ") in by


async def test_an_attempt_that_succeeds_would_be_seen(box: Sandbox) -> None:
    assert await attempt(box, 'write("/workspace/mine")') == "done"
    assert await attempt(box, 'connect(socket.AF_INET, ("127.0.0.1", 9))') == "refused ECONNREFUSED"


async def test_no_name_is_resolved(box: Sandbox) -> None:
    code = "import socket\ntry: socket.getaddrinfo('example.com', 80)\nexcept socket.gaierror as error: print('none')"
    assert await python(box, code) == "none"


# --- the host and the neighbour -------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A service of the host on all its addresses, which never has a visitor."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        server.setblocking(False)
        yield server


@pytest.mark.parametrize("address", ["127.0.0.1", "172.17.0.1"])
async def test_services_of_the_host_are_out_of_reach(box: Sandbox, listener: socket.socket, address: str) -> None:
    told = await attempt(box, f'connect(socket.AF_INET, ("{address}", {listener.getsockname()[1]}))')
    assert told.removeprefix("refused ") in {"ECONNREFUSED", *NO_WAY}
    with pytest.raises(BlockingIOError):
        listener.accept()


async def test_abstract_sockets_of_the_host_are_out_of_reach(box: Sandbox) -> None:
    name = f"ridethrough-{secrets.token_hex(4)}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{name}")
        server.listen()
        assert await attempt(box, f'connect(socket.AF_UNIX, b"\\0{name}")') == "refused ECONNREFUSED"


NEIGHBOUR = """
import os, socket, sys, time
servers = [socket.socket(socket.AF_INET), socket.socket(socket.AF_UNIX)]
for server, address in zip(servers, (("127.0.0.1", 7777), b"\\0neighbour")):
    server.bind(address)
    server.listen()
for folder in ("/workspace", "/tmp", "/dev/shm"):
    open(f"{folder}/neighbour", "w").close()
print("ready", flush=True)
sys.stdin.read()
"""


async def test_a_neighbour_is_out_of_reach(host: DockerHost, box: Sandbox) -> None:
    other = await host.create(SandboxProfile(), id=f"escape-{secrets.token_hex(4)}")
    try:
        process = await other.start(["python3", "-c", NEIGHBOUR], timeout=60, stdin=True)
        async for output in process.output():
            assert output.data.startswith(b"ready")
            break
        assert await attempt(box, 'connect(socket.AF_INET, ("127.0.0.1", 7777))') == "refused ECONNREFUSED"
        assert await attempt(box, 'connect(socket.AF_UNIX, b"\\0neighbour")') == "refused ECONNREFUSED"
        seen = "import glob; print(glob.glob('/*/neighbour') + glob.glob('/dev/shm/neighbour'))"
        assert await python(box, seen) == "[]"
        assert await attempt(other, 'connect(socket.AF_INET, ("127.0.0.1", 7777))') == "done"
    finally:
        await other.aclose()


async def test_only_its_own_processes_are_seen(box: Sandbox) -> None:
    code = "import os; print(max(int(each) for each in os.listdir('/proc') if each.isdigit()) < 10000)"
    assert await python(box, code) == "True"
    assert "docker" in await python(box, "print(open('/proc/1/comm').read())")


# --- what it is -----------------------------------------------------------------------------------------------------


async def test_it_has_no_capability_and_can_gain_none(box: Sandbox) -> None:
    status = dict(
        line.split(":\t", 1) for line in (await python(box, "print(open('/proc/self/status').read())")).splitlines()
    )
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert "0" not in status["Uid"].split() + status["Gid"].split() + status["Groups"].split()


async def test_no_program_gains_rights(box: Sandbox) -> None:
    found = await box.exec(["find", "/", "-xdev", "-perm", "/6000", "-type", "f"], timeout=30)
    assert found.stdout == ""
    code = """
import json
lines = [line.split() for line in open("/proc/self/mounts")]
print(json.dumps({line[1]: line[3].split(",") for line in lines}))
"""
    options: dict[str, list[str]] = json.loads(await python(box, code))
    assert "ro" in options["/"]
    for folder in ("/workspace", "/tmp"):
        assert {"nosuid", "nodev"} <= set(options[folder])


async def test_a_copy_with_the_setuid_bit_gains_nothing(box: Sandbox) -> None:
    line = "cp /usr/bin/id /workspace/id && chmod 6755 /workspace/id && /workspace/id -u && rm /workspace/id"
    assert (await box.exec(["sh", "-c", line], timeout=20)).stdout == "65534\n"


async def test_programs_of_32_bits_do_not_run(box: Sandbox) -> None:
    """A filter cannot look into their socket calls. The program is one instruction pair: exit(42) by int 0x80."""
    code = """
import os, struct, subprocess
if os.uname().machine != "x86_64":
    print("other")
else:
    text = b"\\xb8\\x01\\x00\\x00\\x00\\xbb\\x2a\\x00\\x00\\x00\\xcd\\x80"
    head = b"\\x7fELF\\x01\\x01\\x01" + bytes(9)
    head += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, 0x8048054, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    head += struct.pack("<IIIIIIII", 1, 0, 0x8048000, 0x8048000, 84 + len(text), 84 + len(text), 5, 4096)
    with open("/workspace/old", "wb") as file:
        file.write(head + text)
    os.chmod("/workspace/old", 0o755)
    try:
        print(subprocess.run(["/workspace/old"]).returncode)
    except OSError:
        print("other")
    os.unlink("/workspace/old")
"""
    assert await python(box, code) in ("other", "-31")


@pytest.mark.parametrize("path", ["/etc/x", "../etc/x", "/workspace/../etc/x", "/proc/self/mem", "/var/x"])
async def test_file_calls_stay_in_the_workspace(box: Sandbox, path: str) -> None:
    with pytest.raises(SandboxError):
        await box.write(path, b"x")


async def test_file_calls_do_not_follow_links_out(box: Sandbox) -> None:
    await box.exec(["ln", "-sfn", "/etc", "/workspace/out"], timeout=20)
    with pytest.raises(SandboxError):
        await box.read("out/passwd")
    with pytest.raises(SandboxError):
        await box.write("out/x", b"x")
