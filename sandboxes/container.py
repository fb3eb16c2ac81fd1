"""What a sandbox's container is made from: the hardened description that the engine gets, and what runs first in it.

Every line of ``container_spec`` closes something, and together they cost nothing measurable.

The supervisor is the main process. To be attached to it takes another process in the container (``bridge``), and an
exec for it costs the engine some 40 ms. The first bridge is spared that: it is a child of the main process, made before
that becomes the supervisor, and has the main process's own input and output, to which the engine joins us before it
starts the container. When we go away the engine closes its input, and it ends; the supervisor lives on. Who comes later
execs a bridge.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from ridethrough.sandboxes import frames
from ridethrough.sandboxes.engine import Image
from ridethrough.sandboxes.images import RECIPE_LABEL
from ridethrough.sandboxes.profile import WORKSPACE, SandboxProfile
from ridethrough.sandboxes.seccomp import filter_json

ID_LABEL: Final = "ridethrough.sandbox"
PROFILE_LABEL: Final = "ridethrough.profile"
RUNTIME_LABEL: Final = "ridethrough.runtime"
LINGER_LABEL: Final = "ridethrough.linger"
MANNER_LABEL: Final = "ridethrough.manner"
GIVEN_LABEL: Final = "ridethrough.labels"
"""Names of the labels that the caller gave, as a list in JSON: an image's own labels are among a container's too."""

SUPERVISOR_LABEL: Final = "ridethrough.supervisor"
"""On an image: the digest of the supervisor that is in it."""

RUN: Final = "/run/ridethrough"
SOCKET: Final = f"{RUN}/s"
BAKED: Final = "/opt/ridethrough/supervisor.pyc"

SHM: Final = 16 * 2**20
SHM_DESKTOP: Final = 256 * 2**20
"""Shared memory: locks of Python's multiprocessing; pictures of a browser."""

FILES: Final = 4096
"""Descriptors of a process."""

OOM_SCORE: Final = 300
"""When the machine itself is out of memory, a sandbox goes before the host's own processes."""

BRIDGE_END: Final = b"ridethrough: the bridge has ended."
"""Said on standard error when the first bridge has ended: its output is also the init's, and does not end with it."""

_BOOT: Final = """\
import os, sys
program, rest = sys.argv[1], sys.argv[2:]
names = {"__name__": "supervisor"}
if program.endswith(".pyc"):
    from importlib.machinery import SourcelessFileLoader
    names["__file__"] = program[:-1]
    exec(SourcelessFileLoader("supervisor", program).get_code("supervisor"), names)
else:
    import base64, zlib
    source = zlib.decompress(base64.b64decode(program))
    exec(compile(source, "supervisor.py", "exec"), names)
    names["own_source"] = lambda: source
if rest[0] == "serve":
    import fcntl, signal
    alive, held = os.pipe()
    if not os.fork():
        if os.fork():
            os._exit(0)
        try:
            names["main"](["bridge", *rest[1:3], "--wait", "30"])
        finally:
            os._exit(0)
    os.wait()
    os.close(held)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    signal.signal(signal.SIGIO, lambda *_: os.write(2, b"@END@"))
    fcntl.fcntl(alive, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(alive, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
sys.exit(names["main"](rest))
""".replace("@END@", BRIDGE_END.decode())
"""Runs the supervisor, compiled or as a text that was sent along. The bridge beside it is forked twice, so that it is
no child of the supervisor, which ends what is below it; a pipe tells when it has ended, however that came about."""

PLAIN_MAIN: Final = """\
echo held
cat >/dev/null
while :; do
  sleep "$0"
  read holder </run/ridethrough/holder && [ -d "/proc/$holder" ] || exit 0
done
"""
"""Where no supervisor can run: waits until the first host has gone, then ends when no other one holds it for as long as
it may linger."""

PLAIN_HOLD: Final = "echo $$ >/run/ridethrough/holder; echo held; exec cat >/dev/null"


@dataclass(frozen=True, slots=True)
class Manner:
    """How the supervisor comes to be in a container: it lies in the image, is sent along, or there is none."""

    name: str
    program: str = ""

    @classmethod
    def of(cls, image: Image) -> Manner:
        """The best one for an image whose Python nobody has tried yet."""
        if image.labels.get(SUPERVISOR_LABEL) == frames.SUPERVISOR_DIGEST:
            return cls("baked", BAKED)
        return cls("sent", _sent())

    @classmethod
    def named(cls, name: str) -> Manner:
        """The one that a container has on its label."""
        return {"baked": cls("baked", BAKED), "plain": PLAIN}.get(name) or cls("sent", _sent())

    def main(self, profile: SandboxProfile, linger: float) -> Sequence[str]:
        """The main process of a container."""
        if not self.program:
            return ["sh", "-c", PLAIN_MAIN, str(max(1, round(linger)))]
        proxy = ["--proxy"] if profile.network else []
        return self._run("serve", "--workspace", WORKSPACE, "--tmp", "/tmp", "--linger", f"{linger:g}", *proxy)

    def bridge(self) -> Sequence[str]:
        """What joins a further host to it."""
        if not self.program:
            return ["sh", "-c", PLAIN_HOLD]
        return self._run("bridge")

    def _run(self, what: str, *options: str) -> Sequence[str]:
        return ["python3", "-I", "-S", "-c", _BOOT, self.program, what, "--socket", SOCKET, *options]


PLAIN: Final = Manner("plain")


@lru_cache(maxsize=1)
def _sent() -> str:
    """The supervisor's text as an argument: the kernel takes 128 KiB for each, so it is packed."""
    return base64.b64encode(zlib.compress(frames.supervisor_source().encode(), 9)).decode()


def container_name(id: str) -> str:
    """A sandbox's container is found by its id alone, even one that was only half made; ids may have any characters."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", id):
        return f"ridethrough-{id}"
    return f"ridethrough-{hashlib.sha256(id.encode('utf-8', 'replace')).hexdigest()[:32]}"


def labels_of(
    id: str, profile: SandboxProfile, runtime: str, manner: Manner, linger: float, given: Mapping[str, str]
) -> dict[str, str]:
    """All labels of a container."""
    return {
        **given,
        ID_LABEL: id,
        PROFILE_LABEL: profile.name,
        RUNTIME_LABEL: runtime,
        LINGER_LABEL: f"{linger:g}",
        MANNER_LABEL: manner.name,
        GIVEN_LABEL: json.dumps(sorted(given)),
    }


def container_spec(
    profile: SandboxProfile, image: Image, runtime: str, manner: Manner, linger: float, labels: Mapping[str, str]
) -> dict[str, Any]:
    """The engine's description of a sandbox's container: ``POST /containers/create``."""
    argv = manner.main(profile, linger)
    return {
        "Image": image.id,
        "Entrypoint": argv[:1],
        "Cmd": argv[1:],
        "User": f"{profile.user}:{profile.user}",
        "WorkingDir": WORKSPACE,
        "Hostname": "sandbox",
        # Without the engine's network code a start is 80 ms quicker, and nobody writes /etc/hosts: only for images of
        # ours, which know localhost by themselves.
        "NetworkDisabled": RECIPE_LABEL in image.labels,
        "OpenStdin": True,
        "StdinOnce": True,
        "AttachStdin": True,
        "AttachStdout": True,
        "AttachStderr": True,
        "StopTimeout": 1,
        "Healthcheck": {"Test": ["NONE"]},
        "Labels": dict(labels),
        "HostConfig": {**_host_config(profile, runtime), "Mounts": [_closed(path) for path in image.volumes]},
    }


def _host_config(profile: SandboxProfile, runtime: str) -> dict[str, Any]:
    return {
        "AutoRemove": True,
        "Runtime": runtime,
        "Init": True,
        "NetworkMode": "none",
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges", f"seccomp={filter_json()}"],
        "ReadonlyRootfs": True,
        "IpcMode": "private",
        "ShmSize": SHM_DESKTOP if profile.desktop else SHM,
        "CgroupnsMode": "private",
        "Memory": profile.memory,
        "MemorySwap": profile.memory,
        "NanoCpus": round(profile.cpus * 1e9),
        "PidsLimit": profile.pids,
        "OomScoreAdj": OOM_SCORE,
        "LogConfig": {"Type": "none"},
        "Ulimits": [
            {"Name": "core", "Soft": 0, "Hard": 0},
            {"Name": "nofile", "Soft": FILES, "Hard": FILES},
        ],
        "Tmpfs": {
            WORKSPACE: _tmpfs(profile, profile.disk, "0755", "exec"),
            "/tmp": _tmpfs(profile, profile.disk, "0700", "exec"),
            RUN: _tmpfs(profile, 64 * 1024, "0700", "noexec"),
        },
    }


def _closed(path: str) -> dict[str, Any]:
    """Nothing, in place of a volume that an image asks for: it would be on the host's disk, and without a limit."""
    return {"Type": "tmpfs", "Target": path, "ReadOnly": True, "TmpfsOptions": {"SizeBytes": 4096}}


def _tmpfs(profile: SandboxProfile, size: int, mode: str, exec: str) -> str:
    return f"rw,{exec},nosuid,nodev,size={size},mode={mode},uid={profile.user},gid={profile.user}"
