"""Proofs: what holds is seen to hold, and what does not is seen too. The engine is made to break its word for that."""

from __future__ import annotations

import json
import platform
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from tests.sandboxes.conftest import SESSION

from ridethrough.runtime.errors import SandboxGone, SandboxTimeout, SandboxUnavailable
from ridethrough.sandboxes import docker
from ridethrough.sandboxes.container import container_spec
from ridethrough.sandboxes.docker import DockerHost
from ridethrough.sandboxes.engine import Engine
from ridethrough.sandboxes.probe import GVISOR, LIMITS, SEE, WALLS, Proof, prove, quick, read_walls, runtime_for
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import ExecResult, Host, Sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.processes]


Weaken = Callable[[Callable[[dict[str, Any]], None]], None]


@pytest.fixture
def weaken(monkeypatch: pytest.MonkeyPatch) -> Weaken:
    """Has containers made otherwise than they should be: they are real, and they are weak."""

    def weaken(change: Callable[[dict[str, Any]], None]) -> None:
        def changed(*args: Any) -> dict[str, Any]:
            spec = container_spec(*args)
            change(spec)
            return spec

        monkeypatch.setattr(docker, "container_spec", changed)

    return weaken


def failed(proof: Proof) -> set[str]:
    return {evidence.name for evidence in proof.failures}


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_sandbox_holds(host: DockerHost) -> None:
    proof = await prove(host, SandboxProfile())
    assert proof.failures == ()
    assert {evidence.name for evidence in proof.evidence} == set(SEE) == {*LIMITS, *WALLS}
    assert proof.enforces
    assert proof.holds
    assert proof.runtime == "runc"
    assert json.loads(json.dumps(proof.as_json()))["holds"] is True
    assert [found.id for found in await host.found() if found.labels.items() >= SESSION.items()] == []


async def test_what_a_person_is_told_to_type_shows_something(host: DockerHost) -> None:
    sandbox = await host.create(quick(SandboxProfile()), id=f"see-{secrets.token_hex(4)}")
    try:
        shown = {name: await sandbox.exec(["sh", "-c", SEE[name]], timeout=30) for name in (*WALLS, *LIMITS)}
    finally:
        await sandbox.aclose()
    limits = {name: result.limit for name, result in shown.items() if result.limit is not None}
    assert limits == {"memory": "memory", "pids": "pids", "disk /workspace": "disk", "disk /tmp": "disk"}
    for name, result in shown.items():
        assert result.stdout or result.stderr, name
        assert "not found" not in result.stderr, name


async def test_limits_that_are_not_enforced_are_seen(host: DockerHost, weaken: Weaken) -> None:
    def unlimited(spec: dict[str, Any]) -> None:
        tmpfs = {path: options.replace("size=16777216", "size=64m") for path, options in config(spec)["Tmpfs"].items()}
        config(spec).update(Memory=2**30, MemorySwap=2**30, PidsLimit=1000, NanoCpus=0, Tmpfs=tmpfs)

    weaken(unlimited)
    proof = await prove(host, SandboxProfile())
    assert failed(proof) | {"cpu"} == set(LIMITS)  # how much others leave of the machine's cores is not known
    assert all("not enforced" in evidence.detail for evidence in proof.failures)
    assert not proof.enforces
    assert not proof.holds


async def test_walls_that_are_open_are_seen(host: DockerHost, weaken: Weaken, tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))

    def open_to_all(spec: dict[str, Any]) -> None:
        spec["NetworkDisabled"] = False
        config(spec).update(
            NetworkMode="bridge",
            ReadonlyRootfs=False,
            CapDrop=[],
            SecurityOpt=["seccomp=unconfined"],
            GroupAdd=["0"],
            Binds=[f"{tmp_path}:/mnt:ro", f"{tmp_path}/s:/run/docker.sock"],
            Devices=[{"PathOnHost": "/dev/full", "PathInContainer": "/dev/full", "CgroupPermissions": "r"}],
        )

    weaken(open_to_all)
    with listener:
        proof = await prove(host, SandboxProfile())
    assert failed(proof) == set(WALLS) - {"init", "kernel", "devices"}
    assert proof.enforces
    assert not proof.holds
    details = {evidence.name: evidence.detail for evidence in proof.failures}
    assert "eth0" in details["network"]
    assert "/mnt" in details["host paths"]
    assert "/run/docker.sock" in details["engine socket"]


def config(spec: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = spec["HostConfig"]
    return found


@dataclass
class Fleeting:
    """A host whose sandboxes are killed as soon as they are there."""

    host: DockerHost

    async def create(self, profile: SandboxProfile, *, id: str, linger: float) -> Sandbox:
        sandbox = await self.host.create(profile, id=id, linger=linger)
        await self.host.engine.kill(f"ridethrough-{id}")
        return sandbox


async def test_a_sandbox_that_goes_away_has_proved_nothing(host: DockerHost) -> None:
    proof = await prove(cast(Host, Fleeting(host)), SandboxProfile())
    assert failed(proof) == set(SEE)
    assert all("could not be tried" in evidence.detail for evidence in proof.failures)


async def test_an_image_without_python_proves_nothing(host: DockerHost, busybox: str) -> None:
    proof = await prove(host, SandboxProfile(image=busybox))
    assert failed(proof) == set(SEE)


# --- what comes from inside is not believed -------------------------------------------------------------------------


def walls(*lines: object, runtime: str = "runc") -> dict[str, tuple[bool, str]]:
    out = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    result = ExecResult(0, out.encode())
    return {evidence.name: (evidence.ok, evidence.detail) for evidence in read_walls(result, runtime)}


@pytest.mark.parametrize(
    "line",
    ["", "no JSON", "[]", "17", '{"name": "user"}', '{"name": "user", "ok": "yes"}', '{"name": ["user"], "ok": true}'],
)
def test_what_has_not_the_expected_shape_is_no_proof(line: str) -> None:
    assert not any(ok for ok, _ in walls(line).values())


def test_a_detail_is_cut() -> None:
    ok, detail = walls({"name": "user", "ok": True, "detail": "x" * 10**6})["user"]
    assert ok
    assert len(detail) == 500


def test_gvisor_answers_with_a_kernel_of_its_own() -> None:
    open_inside = {"name": "seccomp", "ok": False, "detail": "allowed: unshare of mounts"}
    own, same = (
        {"name": "kernel", "ok": True, "detail": "4.4.0"},
        {"name": "kernel", "ok": True, "detail": platform.release()},
    )
    assert walls(open_inside, own, runtime=GVISOR)["seccomp"][0]
    assert not walls(open_inside, same, runtime=GVISOR)["seccomp"][0]
    assert not walls(open_inside, same, runtime=GVISOR)["kernel"][0]
    assert not walls(open_inside, own)["seccomp"][0]


# --- which runtime --------------------------------------------------------------------------------------------------


@dataclass
class Answers:
    """Stands in for a sandbox in gVisor, which this engine has not: the attempts end as a script has them."""

    answer: Callable[[Sequence[str]], ExecResult]
    runtime: str = GVISOR

    async def exec(self, argv: Sequence[str], **options: Any) -> ExecResult:
        return self.answer(argv[2:])

    async def aclose(self) -> None:
        """Nothing to do."""


def said(*lines: Mapping[str, Any], status: int = 0) -> ExecResult:
    return ExecResult(status, "\n".join(map(json.dumps, lines)).encode())


def enforcing(words: Sequence[str]) -> ExecResult:
    """A gVisor that enforces everything."""
    answers = {
        "walls": said(*({"name": name, "ok": True, "detail": "4.4.0"} for name in WALLS)),
        "cpu": said({"reached": 0.5}),
        "disk": said({"reached": 2**20, "reason": "ENOSPC"}),
        "pids": said({"reached": 60, "reason": "EAGAIN"}),
        "memory": said({"reached": 2**20}, status=137),
    }
    return answers[words[0]]


def lenient(words: Sequence[str]) -> ExecResult:
    """One without control groups: it takes the limits, and enforces none."""
    if words[0] == "memory":
        return said({"reached": 2**28, "all": True})
    return enforcing(words)


@dataclass
class Gvisors:
    """An engine with gVisor, and its host, as far as the choice sees them."""

    answer: Callable[[Sequence[str]], ExecResult]
    made: int = 0

    async def create(self, profile: SandboxProfile, **options: Any) -> Sandbox:
        assert profile.runtime == GVISOR
        self.made += 1
        return cast(Sandbox, Answers(self.answer))


@dataclass
class Seen:
    """An engine that says that it has a ``runsc`` which nobody has met before."""

    id: str = field(default_factory=lambda: secrets.token_hex(4))
    runtimes: frozenset[str] = frozenset({"runc", GVISOR})

    async def call(self, function: Callable[[Any], Any], what: str, **options: Any) -> Any:
        return {GVISOR: {"path": "/nowhere/runsc", "runtimeArgs": ["--platform=ptrace"]}}


async def choose(gvisors: Gvisors, times: int = 1) -> tuple[str, dict[str, Any]]:
    """What is chosen when several ask at once."""
    engine, chosen = cast(Engine, Seen()), list[tuple[str, dict[str, Any]]]()

    async def one() -> None:
        chosen.append(await runtime_for(engine, SandboxProfile(), cast(Host, gvisors)))

    async with anyio.create_task_group() as tasks:
        for _ in range(times):
            tasks.start_soon(one)
    assert len({runtime for runtime, _ in chosen}) == 1
    return chosen[0]


async def test_gvisor_is_taken_when_it_enforces() -> None:
    gvisors = Gvisors(enforcing)
    runtime, record = await choose(gvisors, times=5)
    assert runtime == GVISOR
    assert record["proof"]["enforces"]
    assert gvisors.made == 1


async def test_gvisor_that_enforces_nothing_is_not_taken() -> None:
    runtime, record = await choose(Gvisors(lenient))
    assert runtime == "runc"
    assert "256 MiB" in record["why"]
    assert record["proof"]["enforces"] is False


@pytest.mark.parametrize("error", [SandboxTimeout("too late"), SandboxGone("gone")])
async def test_gvisor_that_breaks_is_not_taken(error: Exception) -> None:
    def broken(words: Sequence[str]) -> ExecResult:
        raise error

    runtime, record = await choose(Gvisors(broken))
    assert runtime == "runc"
    assert "could not be tried" in record["why"]


async def test_without_gvisor_it_is_runc(host: DockerHost) -> None:
    engine = replace(host.engine, runtimes=frozenset({"runc"}))
    runtime, record = await runtime_for(engine, SandboxProfile(), host)
    assert (runtime, record["why"]) == ("runc", "the engine has no gVisor")


async def test_a_runtime_that_is_named_is_taken(host: DockerHost) -> None:
    assert (await runtime_for(host.engine, SandboxProfile(runtime="runc"), host))[0] == "runc"
    engine = replace(host.engine, runtimes=frozenset({"runc"}))
    with pytest.raises(SandboxUnavailable, match=r"daemon\.json"):
        await runtime_for(engine, SandboxProfile(runtime="runsc"), host)
