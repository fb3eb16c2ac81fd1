"""Whether a sandbox holds: trust no flag, try it.

A runtime may accept every limit and enforce none (gVisor without control groups does). So the attempts of
``attempts.py`` are made in earnest, in a sandbox of their own: more memory than there is, more processes, more disk,
ways out. What comes of them is a ``Proof``: for the doctor, for the choice of a runtime, and for the record.

A proof is about the engine, its runtime and the profile's flags. It is not about the image: one that lies (a
``python3`` that is none) makes its own proof worthless, and no sandbox of another image weaker.
"""

from __future__ import annotations

import json
import platform
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from subprocess import STDOUT
from typing import TYPE_CHECKING, Any, Final

import anyio

from ridethrough.runtime.errors import SandboxError, SandboxUnavailable
from ridethrough.sandboxes.profile import WORKSPACE, SandboxProfile
from ridethrough.sandboxes.sandbox import ExecResult, Host, Sandbox

if TYPE_CHECKING:
    from ridethrough.sandboxes.engine import Engine

ATTEMPT_SECONDS: Final = 20.0
"""Of one attempt; the longest takes about one on an idle machine."""

PROOF_SECONDS: Final = 90.0

LIMITS: Final = ("memory", "pids", "cpu", "disk /workspace", "disk /tmp")
"""The names that must be among a proof's evidence, and hold, for ``Proof.enforces``."""

GATEWAY: Final = "172.17.0.1"
"""Where Docker's default bridge has the host, unless it was told otherwise."""

GVISOR: Final = "runsc"
RUNC: Final = "runc"

SEE: Final[Mapping[str, str]] = {
    "memory": "python3 -c 'x = [b\"x\" * 2**20 for _ in range(10**4)]'",
    "pids": "for n in $(seq 500); do sleep 1 & done",
    "cpu": "cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu/cpu.cfs_quota_us",
    "disk /workspace": "head -c 10G /dev/zero > /workspace/full",
    "disk /tmp": "head -c 10G /dev/zero > /tmp/full",
    "network": "cat /proc/net/dev; cat /proc/net/route",
    "root": "touch /etc/x /usr/x /root/x /var/x",
    "capabilities": "grep Cap /proc/self/status",
    "privileges": "grep NoNewPrivs /proc/self/status",
    "seccomp": "grep Seccomp: /proc/self/status; unshare -U true",
    "user": "id",
    "engine socket": "ls /run/docker.sock /var/run/docker.sock",
    "host paths": "cat /proc/self/mountinfo",
    "init": "tr '\\0' ' ' < /proc/1/cmdline",
    "devices": "ls -l /dev",
    "kernel": "uname -r",
}
"""What a person types in a sandbox's shell to see the same; its keys are the names of all evidence."""

WALLS: Final = tuple(name for name in SEE if name not in LIMITS)


@dataclass(frozen=True, slots=True)
class Evidence:
    """One attempt and what came of it. ``see`` is a command for a sandbox's shell that shows the same."""

    name: str
    ok: bool
    detail: str
    see: str = ""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was tried in a sandbox, and what came of it.

    Attributes:
        runtime: What ran it.
        evidence: One for each attempt.
        seconds: What it took, the sandbox's start included.
    """

    runtime: str
    evidence: tuple[Evidence, ...]
    seconds: float = 0.0

    @property
    def enforces(self) -> bool:
        """Whether every limit was tried and held."""
        held = {evidence.name for evidence in self.evidence if evidence.ok}
        return held.issuperset(LIMITS)

    @property
    def holds(self) -> bool:
        """Whether every limit and every wall was tried and held."""
        held = {evidence.name for evidence in self.evidence if evidence.ok}
        return held.issuperset(SEE)

    @property
    def failures(self) -> tuple[Evidence, ...]:
        """What did not hold."""
        return tuple(evidence for evidence in self.evidence if not evidence.ok)

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        return {**asdict(self), "enforces": self.enforces, "holds": self.holds}


# --- proving --------------------------------------------------------------------------------------------------------


async def prove(host: Host, profile: SandboxProfile, *, gateway: str = GATEWAY) -> Proof:
    """Try to get out of a sandbox of ``profile``, and past its limits; they are lowered so that it is quick.

    Args:
        host: Where it is made, and removed afterwards.
        profile: Its image needs ``python3``.
        gateway: The host's address in the engine's bridge, which must not be reached.

    Raises:
        SandboxUnavailable: there can be no such sandbox.
    """
    begun = time.monotonic()
    small = quick(profile)
    sandbox = await host.create(small, id=f"proof-{secrets.token_hex(8)}", linger=PROOF_SECONDS)
    try:
        with anyio.move_on_after(PROOF_SECONDS):
            evidence = tuple([found async for found in _attempts(sandbox, small, gateway)])
            return Proof(sandbox.runtime, evidence, time.monotonic() - begun)
        return Proof(sandbox.runtime, (_untried("time", "the attempts did not end"),), time.monotonic() - begun)
    finally:
        with anyio.CancelScope(shield=True):
            await sandbox.aclose()


def quick(profile: SandboxProfile) -> SandboxProfile:
    """The profile with limits that are soon reached."""
    return replace(
        profile,
        memory=min(profile.memory, 128 * 2**20),
        pids=min(profile.pids, 64),
        cpus=min(profile.cpus, 0.5),
        disk=min(profile.disk, 16 * 2**20),
        warm=0,
    )


async def _attempts(sandbox: Sandbox, limits: SandboxProfile, gateway: str) -> AsyncIterator[Evidence]:
    """One after the other; the one that may end the sandbox comes last."""
    for evidence in await _walls(sandbox, gateway):
        yield evidence
    yield await _limit(sandbox, "cpu", _judge_cpu, limits.cpus)
    for folder in (WORKSPACE, "/tmp"):
        yield await _limit(sandbox, f"disk {folder}", _judge_disk, limits.disk, folder)
    yield await _limit(sandbox, "pids", _judge_pids, limits.pids)
    yield await _limit(sandbox, "memory", _judge_memory, limits.memory)


async def _walls(sandbox: Sandbox, gateway: str) -> Sequence[Evidence]:
    try:
        result = await _attempt(sandbox, "walls", gateway)
    except SandboxError as error:
        return [_untried(name, error.message) for name in WALLS]
    return list(read_walls(result, sandbox.runtime))


async def _limit(sandbox: Sandbox, name: str, judge: Judge, limit: float, *folder: str) -> Evidence:
    words = [name.split()[0], *([] if name == "cpu" else [str(limit)]), *folder]
    try:
        result = await _attempt(sandbox, *words)
    except SandboxError as error:
        return _untried(name, error.message)
    ok, detail = judge(_Reached.of(result), limit)
    return Evidence(name, ok, detail, SEE[name])


async def _attempt(sandbox: Sandbox, *words: str) -> ExecResult:
    script = (Path(__file__).parent / "attempts.py").read_bytes()
    return await sandbox.exec(["python3", "-", *words], stdin=script, timeout=ATTEMPT_SECONDS)


def _untried(name: str, why: str) -> Evidence:
    return Evidence(name, False, f"could not be tried: {why}", SEE.get(name, ""))


# --- judging: what an attempt says comes from inside, and is believed only in the shape that is expected -------------


@dataclass(frozen=True, slots=True)
class _Reached:
    """How far an attempt got; ``most`` is ``None`` where it does not say."""

    most: float | None
    everything: bool = False
    reason: str = ""
    exit_code: int = 0
    stderr: str = ""

    @classmethod
    def of(cls, result: ExecResult) -> _Reached:
        told = [line for line in _lines(result) if isinstance(line.get("reached"), int | float)]
        most = max((float(line["reached"]) for line in told), default=None)
        last = told[-1] if told else {}
        return cls(most, bool(last.get("all")), str(last.get("reason", "")), result.exit_code, result.stderr[-200:])

    def untold(self) -> str:
        """Why nothing is known."""
        return f"the attempt said nothing (status {self.exit_code}) {self.stderr}".strip()


Judge = Callable[[_Reached, float], tuple[bool, str]]


def _lines(result: ExecResult) -> Iterator[Mapping[str, Any]]:
    for line in result.stdout.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _judge_memory(got: _Reached, limit: float) -> tuple[bool, str]:
    """Ended on the way, and not by itself."""
    if got.most is None:
        return False, got.untold()
    ended = got.exit_code in (128 + 9, 128 + 15) or got.exit_code < 0
    detail = f"{_mib(got.most)} of a limit of {_mib(limit)} were filled"
    if got.everything or got.most > limit:
        return False, f"{detail}: not enforced"
    return ended, f"{detail}, then the process was ended" if ended else f"{detail}, then status {got.exit_code}"


def _judge_pids(got: _Reached, limit: float) -> tuple[bool, str]:
    if got.most is None:
        return False, got.untold()
    detail = f"{got.most:.0f} processes of a limit of {limit:.0f}"
    held = got.reason == "EAGAIN" and got.most <= limit
    return held, f"{detail}, then {got.reason}" if held else f"{detail}: not enforced"


def _judge_cpu(got: _Reached, limit: float) -> tuple[bool, str]:
    if got.most is None:
        return False, got.untold()
    detail = f"{got.most:.2f} cores used of a limit of {limit:.2f}"
    held = 0 < got.most <= limit * 1.2 + 0.1
    return held, detail if held else f"{detail}: not enforced"


def _judge_disk(got: _Reached, limit: float) -> tuple[bool, str]:
    if got.most is None:
        return False, got.untold()
    detail = f"{_mib(got.most)} of a limit of {_mib(limit)} were written"
    held = got.reason in ("ENOSPC", "EDQUOT") and got.most <= limit
    return held, f"{detail}, then {got.reason}" if held else f"{detail}: not enforced"


def _mib(size: float) -> str:
    return f"{size / 2**20:.0f} MiB"


def read_walls(result: ExecResult, runtime: str) -> Iterator[Evidence]:
    """The evidence in an attempt's output; a wall that it does not speak of was not tried."""
    told = {str(line.get("name")): line for line in _lines(result)}
    inside = str(told.get("kernel", {}).get("detail", ""))[:100]
    for name in WALLS:
        line = told.get(name)
        if line is None:
            yield _untried(name, _Reached.of(result).untold())
        else:
            ok, detail = line.get("ok") is True, str(line.get("detail"))[:500]
            yield Evidence(name, *_in_view_of_kernel(name, ok, detail, runtime, inside), SEE[name])


def _in_view_of_kernel(name: str, ok: bool, detail: str, runtime: str, inside: str) -> tuple[bool, str]:
    """gVisor answers system calls itself: what it allows is allowed in its own kernel and not in the host's."""
    own = runtime == GVISOR and inside not in ("", platform.release())
    if name == "kernel":
        if runtime == GVISOR:
            return own, f"gVisor's own ({inside})" if own else f"gVisor was asked for, but {inside} answers"
        return bool(inside), f"shared with the host ({inside})"
    if own and name in ("seccomp", "devices") and not ok:
        return True, f"in gVisor's kernel, not in the host's: {detail}"
    return ok, detail


# --- which runtime --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Known:
    """Proofs of this process, by engine and runtime as it is installed, and those under way."""

    proofs: dict[tuple[str, ...], Proof | str] = field(default_factory=dict[tuple[str, ...], Proof | str])
    under_way: dict[tuple[int, tuple[str, ...]], anyio.Event] = field(
        default_factory=dict[tuple[int, tuple[str, ...]], anyio.Event]
    )


_known = _Known()


async def runtime_for(engine: Engine, profile: SandboxProfile, host: Host) -> tuple[str, dict[str, Any]]:
    """The runtime that a sandbox of ``profile`` gets, with the reason and the proof, for the record.

    ``auto`` takes gVisor where the engine has it and it proves, once in a process, that it enforces the limits; else
    runc. A runtime that is named is taken as it is.

    Raises:
        SandboxUnavailable: the engine has no runtime of that name.
    """
    if profile.runtime != "auto":
        if profile.runtime not in engine.runtimes:
            raise SandboxUnavailable(
                f"profile {profile.name} asks for the runtime {profile.runtime}, which this engine does not have (it "
                f"has {', '.join(sorted(engine.runtimes))}): install it and name it in the engine's daemon.json, or "
                f'say runtime = "auto"'
            )
        return profile.runtime, _record(profile.runtime, "the profile names it")
    if GVISOR not in engine.runtimes:
        return RUNC, _record(RUNC, "the engine has no gVisor")
    proof = await _gvisor_proof(engine, host)
    if isinstance(proof, str):
        return RUNC, _record(RUNC, f"gVisor could not be proved: {proof}")
    if not proof.holds:
        failed = "; ".join(f"{evidence.name}: {evidence.detail}" for evidence in proof.failures)
        return RUNC, _record(RUNC, f"gVisor does not hold: {failed}", proof)
    return GVISOR, _record(GVISOR, "gVisor holds", proof)


def _record(runtime: str, why: str, proof: Proof | None = None) -> dict[str, Any]:
    return {"runtime": runtime, "why": why, "proof": None if proof is None else proof.as_json()}


async def _gvisor_proof(engine: Engine, host: Host) -> Proof | str:
    """The proof, or why there can be none; made once, however many ask at the same time."""
    key = await _as_installed(engine)
    while key not in _known.proofs:
        mine = (id(host), key)
        if (waiting := _known.under_way.get(mine)) is not None:
            await waiting.wait()
            continue
        _known.under_way[mine] = anyio.Event()
        try:
            _known.proofs[key] = await _prove_gvisor(host)
        finally:
            _known.under_way.pop(mine).set()
    return _known.proofs[key]


async def _prove_gvisor(host: Host) -> Proof | str:
    """In the project's own image: what a runtime enforces does not depend on it, but the attempts need Python."""
    try:
        return await prove(host, SandboxProfile(name="proof", runtime=GVISOR))
    except SandboxError as error:
        return error.message


async def _as_installed(engine: Engine) -> tuple[str, ...]:
    """Engine, program, arguments and version: whatever is another now has to prove itself anew."""
    runtimes: Mapping[str, Any] = await engine.call(lambda client: client.info()["Runtimes"], "asked for its runtimes")
    found = runtimes.get(GVISOR) or {}
    path = str(found.get("path", ""))
    return engine.id, path, *map(str, found.get("runtimeArgs") or ()), await _version(path)


async def _version(path: str) -> str:
    """What the program says of itself; the engine may be on another machine, where it cannot be asked."""
    program = shutil.which(path) if path else None
    if program is None:
        return "unknown"
    with anyio.move_on_after(ATTEMPT_SECONDS):
        told = await anyio.run_process([program, "--version"], stderr=STDOUT, check=False)
        return told.stdout.decode("utf-8", "replace")[:200]
    return "unknown"
