"""Who holds runs, and whether that process is still there.

A worker renews one row; when it has run out, anybody may take its runs. On the same machine one need not wait: a
process id together with its start time says at once whether the worker is gone. Process ids mean nothing on another
host, after a reboot, or in another process namespace, so all three are part of ``host``.
"""

from __future__ import annotations

import os
import platform
import secrets
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

LEASE_SECONDS = 5.0
"""A worker that has not renewed its row for this long has lost its runs."""


@cache
def host_identity() -> str:
    """This machine, boot and process namespace."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8])
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "|".join(parts)


def process_start(pid: int) -> str | None:
    """When a process of this machine started, as opaque text; ``None`` if it is gone, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _start_without_proc(pid)
    except OSError:
        return None
    state, started = fields[0], fields[19]
    return None if state in "ZX" else started


def _start_without_proc(pid: int) -> str | None:
    """Systems without /proc: only whether the process id is in use."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return "?"
    return "?"


def new_worker(now: float, lease: float) -> dict[str, Any]:
    """The row of this process as a worker."""
    pid = os.getpid()
    return {
        "id": f"{platform.node()[:24]}-{pid}-{secrets.token_hex(4)}",
        "host": host_identity(),
        "pid": pid,
        "pid_started": process_start(pid) or "?",
        "started_at": now,
        "expires_at": now + lease,
    }


def is_gone(worker: Any, now: float) -> bool:
    """Whether a worker's lease has run out or its process is seen to be gone."""
    if worker.expires_at <= now:
        return True
    return bool(worker.host == host_identity() and process_start(worker.pid) != worker.pid_started)


def describe(worker: Any) -> str:
    """A worker for people: where to find the process."""
    return f"process {worker.pid} on {worker.host.partition('|')[0]} (worker {worker.id})"


def lease_clock() -> float:
    """The clock of leases. SQLite has none of its own; all its processes share the machine's."""
    return time.time()
