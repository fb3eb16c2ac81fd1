"""The commands on sandboxes, and what the doctor says of them: a real engine, a real database, real terminals."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import secrets
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.sandboxes.conftest import IMAGE, SESSION

from ridethrough import cli
from ridethrough.runtime.config import Config, SandboxConfig, parse_config
from ridethrough.runtime.doctor import examine as examine_all
from ridethrough.runtime.options import Options
from ridethrough.runtime.store import Store
from ridethrough.sandboxes.docker import DockerHost
from ridethrough.sandboxes.doctor import (
    examine,
    image_check,
    isolation_check,
    proof_check,
    version_check,
)
from ridethrough.sandboxes.engine import Image
from ridethrough.sandboxes.images import RECIPE_LABEL, recipe_digest
from ridethrough.sandboxes.ownership import STORE_LABEL, Lodger, lodgers, store_id
from ridethrough.sandboxes.probe import SEE, Evidence, Proof
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import Found
from ridethrough.sandboxes.standalone import OWNER_LABEL

pytestmark = [pytest.mark.anyio, pytest.mark.processes]

DEADLINE = 60.0
APP = """
from ridethrough import workflow

@workflow
async def voyage() -> str:
    return "there"
"""


@dataclass
class Harbour:
    """A folder with a database, in which runs have sandboxes."""

    folder: Path
    host: DockerHost

    @property
    def database(self) -> Path:
        return self.folder / "runs.db"

    def __call__(self, *words: str, stdin: str = "", status: int = 0, env: Mapping[str, str] | None = None) -> str:
        """Run a command; what it printed, on both streams."""
        done = subprocess.run(
            [sys.executable, "-m", "ridethrough.cli", *words, "--db", str(self.database)],
            cwd=self.folder,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE,
            env={**os.environ, **(env or {})},
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    async def sandbox(self, *, run_id: str | None, status: str = "running", expires: float = 600.0) -> str:
        """A real one, on record for a run."""
        name = secrets.token_hex(6)
        labels = {STORE_LABEL: store_id(self.database)}
        made = await self.host.create(SandboxProfile(), id=name, labels=labels, linger=600)
        await made.detach()
        row = {
            **{"id": name, "run_id": run_id, "key": "python" if run_id else "", "profile": "python"},
            **{"host": self.host.name, "worker_id": "w1", "status": status, "live": True, "runtime": "runc"},
            **{"created_at": time.time(), "expires_at": time.time() + expires},
        }
        store = Store(f"sqlite:///{self.database}")
        store.prepare()
        with store.writer.begin() as connection:
            store.insert_sandbox(connection, row)
        store.close()
        return name

    def row(self, name: str) -> Any:
        store = Store(f"sqlite:///{self.database}")
        found = store.read_now(lambda connection: store.sandbox(connection, name))
        store.close()
        return found

    async def state(self, name: str) -> str:
        """As the engine has it; empty when it is gone."""
        return next((found.state for found in await self.host.found() if found.id == name), "")


@pytest.fixture
async def harbour(tmp_path: Path, host: DockerHost) -> AsyncGenerator[Harbour]:
    (tmp_path / "app.py").write_text(APP)
    harbour = Harbour(tmp_path, host)
    harbour("run", "app.py:voyage", "--id", "r1", "--detach")
    yield harbour
    for found in await host.found():
        if found.labels.items() >= SESSION.items():
            await host.remove(found.id)


# --- list and prune -------------------------------------------------------------------------------------------------


async def test_sandboxes_are_listed_with_their_owners_and_pruned_without(harbour: Harbour) -> None:
    owned = await harbour.sandbox(run_id="r1")
    warm = await harbour.sandbox(run_id=None)
    recoverable = await harbour.sandbox(run_id="r1", expires=-1.0)
    ended = await harbour.sandbox(run_id="no-such-run")
    forgotten = await harbour.sandbox(run_id=None, expires=-1.0)
    foreign = secrets.token_hex(6)
    await (await harbour.host.create(SandboxProfile(), id=foreign, labels={STORE_LABEL: "another"})).detach()

    listed: list[dict[str, Any]] = json.loads(harbour("sandbox", "list", "--json"))
    claims = {each["id"]: each["claim"] for each in listed}
    mine = (owned, warm, recoverable, ended, forgotten, foreign)
    assert [claims[name] for name in mine] == [
        *("owned", "owned", "recoverable", "ownerless", "ownerless", "foreign"),
    ]
    [line] = [line for line in harbour("sandbox", "list").splitlines() if line.startswith(owned)]
    assert re.fullmatch(rf"{owned} +python +r1 +running +\S.*? +runc +w1 +its run has it", line)

    pruned = json.loads(harbour("sandbox", "prune", "--json"))
    assert {ended, forgotten} <= set(pruned["removed"])
    assert not {owned, warm, recoverable, foreign} & set(pruned["removed"])
    assert pruned["failed"] == {}
    left = {found.id for found in await harbour.host.found()}
    assert {owned, warm, recoverable, foreign} <= left
    assert not {ended, forgotten} & left
    assert harbour.row(ended).status == "removed"
    assert harbour.row(forgotten) is None


async def test_one_that_is_not_on_record_is_nobodys(harbour: Harbour) -> None:
    name = secrets.token_hex(6)
    labels = {STORE_LABEL: store_id(harbour.database)}
    await (await harbour.host.create(SandboxProfile(), id=name, labels=labels)).detach()
    assert f"removed {name}: it is not on record" in harbour("sandbox", "prune")
    assert await harbour.state(name) == ""


async def test_all_is_asked_for(harbour: Harbour) -> None:
    name = await harbour.sandbox(run_id="r1")
    told = harbour("sandbox", "prune", "--all", stdin="n\n", status=130)
    assert re.search(r"Remove \d+ sandboxes, \d+ of which are in use\? What is in them is lost", told)
    assert await harbour.state(name) == "running"


async def test_all_are_removed(harbour: Harbour, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, so that it can be kept to this test's sandboxes."""
    name = await harbour.sandbox(run_id="r1")
    everything = DockerHost.found

    async def found(self: DockerHost) -> list[Found]:
        return [each for each in await everything(self) if each.id == name]

    monkeypatch.setattr(DockerHost, "found", found)
    words = ["sandbox", "prune", "--all", "--yes", "--db", str(harbour.database)]
    assert await anyio.to_thread.run_sync(cli.run, words) == 0
    assert await harbour.state(name) == ""
    assert harbour.row(name).status == "removed"


async def test_without_a_database_the_host_is_looked_at(harbour: Harbour) -> None:
    name = await harbour.sandbox(run_id="r1")
    harbour.database.unlink()
    listed = json.loads(harbour("sandbox", "list", "--json"))
    assert {each["id"]: each["claim"] for each in listed}[name] == "foreign"
    assert not harbour.database.exists()


async def test_an_engine_that_is_not_there_is_told(tmp_path: Path, harbour: Harbour) -> None:
    told = harbour("sandbox", "list", status=1, env={"DOCKER_HOST": f"unix://{tmp_path}/nobody"})
    assert told.startswith("error: the Docker engine at unix://")
    assert "make engine" in told


def found_one(state: str, labels: Mapping[str, str], age: float = 0.0) -> Found:
    return Found("s1", "python", state, 1000.0 - age, labels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "claim"),
    [
        (found_one("created", {}), "foreign"),
        (found_one("created", {}, age=1000.0), "ownerless"),
        (found_one("exited", {STORE_LABEL: "another"}), "ownerless"),
        (found_one("paused", {STORE_LABEL: "another"}), "foreign"),
        (found_one("paused", {OWNER_LABEL: "4194305@BOOT"}), "ownerless"),
        (found_one("running", {OWNER_LABEL: "4194305@BOOT"}), "foreign"),
        (found_one("paused", {OWNER_LABEL: "1@BOOT"}), "foreign"),
        (found_one("paused", {OWNER_LABEL: "4194305@another"}), "foreign"),
        (found_one("paused", {OWNER_LABEL: "nonsense"}), "foreign"),
        (found_one("running", {STORE_LABEL: ""}), "foreign"),
    ],
)
def test_whose_a_stranger_is(found: Found, claim: str) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    labels = {name: value.replace("BOOT", boot) for name, value in found.labels.items()}
    stranger = Found(found.id, found.profile, found.state, found.created_at, labels)
    [seen] = lodgers([stranger], [], host="docker:x", store_id="mine", ended=[], now=1000.0)
    assert seen.claim == claim


async def test_one_that_is_only_on_record_is_forgotten(harbour: Harbour) -> None:
    name = await harbour.sandbox(run_id="r1")
    await harbour.host.remove(name)
    listed = {each["id"]: each for each in json.loads(harbour("sandbox", "list", "--json"))}
    assert (listed[name]["state"], listed[name]["claim"]) == ("missing", "ownerless")
    harbour("sandbox", "prune")
    assert harbour.row(name).live is False


# --- shell ----------------------------------------------------------------------------------------------------------


async def test_a_shell_reads_commands_and_gives_its_status(harbour: Harbour) -> None:
    name = await harbour.sandbox(run_id="r1")
    told = harbour("sandbox", "shell", "r1", stdin="id -u; pwd; echo apart >&2; exit 7\n", status=7)
    assert told.splitlines()[0].startswith(f"{name} of run r1 (profile python, runc)")
    assert sorted(told.splitlines()[1:]) == ["/workspace", "65534", "apart"]


async def test_a_frozen_one_goes_on_for_the_time_being(harbour: Harbour) -> None:
    name = await harbour.sandbox(run_id="r1", status="paused")
    await harbour.host.pause(name)
    assert "65534" in harbour("sandbox", "shell", "r1", stdin="id -u\n")
    assert await harbour.state(name) == "paused"


def begun(harbour: Harbour, stdin: int, stdout: int) -> subprocess.Popen[bytes]:
    """A shell that goes on."""
    words = [sys.executable, "-m", "ridethrough.cli", "sandbox", "shell", "r1", "--db", str(harbour.database)]
    return subprocess.Popen(words, cwd=harbour.folder, stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL)


async def test_a_shell_on_a_terminal(harbour: Harbour) -> None:
    """Keys go to the other side, the window's size too, and the terminal is as it was afterwards."""
    name = await harbour.sandbox(run_id="r1")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 111, 0, 0))
    before = termios.tcgetattr(theirs)
    process = begun(harbour, theirs, theirs)
    try:
        until(ours, lambda shown: "$ " in shown)
        os.write(ours, b"test -t 0 && echo a-$((40 + 2))\r")
        until(ours, lambda shown: "a-42" in shown)
        os.write(ours, b"while ! stty size | grep '33 111'; do :; done; sleep 1000\r")
        until(ours, lambda shown: "33 111\r\n" in shown)
        os.write(ours, b"\x03")  # is the shell's, not ours
        os.write(ours, b"echo b-$((50 + 1)); exit 5\r")
        until(ours, lambda shown: "b-51" in shown)
        assert process.wait(DEADLINE) == 5
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
    assert await processes(harbour.host, name, "bash") == 0


async def test_a_shell_that_is_left_is_ended(harbour: Harbour) -> None:
    """The engine goes on with a process whose client is gone."""
    name = await harbour.sandbox(run_id="r1")
    process = begun(harbour, subprocess.PIPE, subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        process.stdin.write(b"echo here; sleep 1000\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 130
    assert await processes(harbour.host, name, "sleep") == 0


def until(terminal: int, done: Callable[[str], bool]) -> None:
    """Read what is shown until it is what is waited for."""
    shown, deadline = "", time.monotonic() + DEADLINE
    while not done(shown):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, shown
        shown += os.read(terminal, 65536).decode("utf-8", "replace")


async def processes(host: DockerHost, name: str, program: str) -> int:
    """How many of a program run in a sandbox."""
    sandbox = await host.attach(SandboxProfile(), name)
    counted = await sandbox.exec(["pgrep", "-x", "-c", program], timeout=20)
    await sandbox.detach()
    return int(counted.stdout)


async def test_a_run_without_a_sandbox_has_no_shell(harbour: Harbour) -> None:
    told = harbour("sandbox", "shell", "r1", status=2)
    assert "Run r1 has no sandbox on this machine now" in told
    name = await harbour.sandbox(run_id="r1")
    await harbour.host.remove(name)
    assert "has ended" in harbour("sandbox", "shell", "r1", status=2)
    await harbour.sandbox(run_id="r1")
    assert "has no sandbox" in harbour("sandbox", "shell", "r1", "--profile", "other", status=2)


# --- build ----------------------------------------------------------------------------------------------------------


async def test_an_image_without_a_recipe_is_refused(harbour: Harbour) -> None:
    assert "no recipe for an image 'nosuch'" in harbour("sandbox", "build", "nosuch", status=2)


# --- the doctor -----------------------------------------------------------------------------------------------------


def doctor(text: str) -> dict[str, tuple[str, str, str]]:
    """What it says, by name."""
    return {name: (status, detail, mend) for name, status, detail, mend in examine(parse_config(text))}


def test_the_doctor_proves_a_profile(engine: object, python_image: str) -> None:
    said = doctor("[sandboxes.python]")
    assert said["sandbox python"][0] == "ok"
    assert re.match(
        rf"{len(SEE)} of {len(SEE)} limits and walls hold, tried in .* s; runc \(", said["sandbox python"][1]
    )
    assert said["isolation"][0] == "ok"
    assert said["sandbox python: image"][0] in ("ok", "doubtful")


def test_the_doctor_finds_what_is_missing(engine: object) -> None:
    said = doctor(
        """
        [sandboxes.gone]
        image = "ridethrough-test/nosuch:1"
        [sandboxes.near]
        kind = "local"
        [sandboxes.out]
        image = "ridethrough-test/nosuch:1"
        network = ["example.com"]
        [sandboxes.out.inject."example.com"]
        Authorization = "Bearer env:RIDETHROUGH_NO_SUCH_KEY"
        """
    )
    assert said["sandbox gone: image"] == (
        *("wrong", "ridethrough-test/nosuch:1 is not there", "docker pull ridethrough-test/nosuch:1"),
    )
    assert "sandbox gone" not in said
    assert said["sandbox near"][0] == "doubtful"
    assert said["sandbox out: network"][0] == "wrong"
    assert "RIDETHROUGH_NO_SUCH_KEY" in said["sandbox out: network"][1]


def test_the_doctor_starts_the_proxy(engine: object) -> None:
    said = doctor('[sandboxes.out]\nimage = "ridethrough-test/nosuch:1"\nnetwork = ["example.com", ".example.org"]')
    assert said["sandbox out: network"] == ("ok", "the proxy starts; it lets 2 names through", "")


def test_without_a_profile_the_doctor_is_brief(engine: object) -> None:
    [(name, status, detail, _)] = list(examine(Config()))
    assert (name, status) == ("sandboxes", "ok")
    assert re.fullmatch(r"Docker \S+ is there for them", detail)


def test_an_engine_is_only_missed_by_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody")
    [(name, status, _, _)] = list(examine(Config()))
    assert (name, status) == ("sandboxes", "doubtful")
    [(name, status, detail, _)] = list(examine(Config(sandboxes={"python": SandboxConfig()})))
    assert (name, status) == ("Docker", "wrong")
    assert "make engine" in detail


def test_the_doctor_takes_others_into_account(tmp_path: Path) -> None:
    path = tmp_path / "ridethrough.toml"
    path.write_text("")
    found = examine_all(
        Options(config=str(path)), offline=True, others=[lambda config: [("harbour", "wrong", "is dry", "wait")]]
    )
    [finding] = [finding for finding in found if finding.name == "harbour"]
    assert finding.line() == "WRONG  harbour: is dry\n         -> wait"


@pytest.mark.parametrize(
    ("version", "status"),
    [
        *(("20.10.24+dfsg1", "doubtful"), ("23.0.10", "doubtful"), ("23.0.11", "ok"), ("24.0.9", "doubtful")),
        *(("25.0.4", "doubtful"), ("25.0.5", "ok"), ("26.0.0-rc1", "ok"), ("28.2.2", "ok"), ("", "doubtful")),
    ],
)
def test_engines_with_a_known_weakness_are_named(version: str, status: str) -> None:
    found = version_check(version)
    assert found[1] == status
    assert ("CVE-2024-29018" in found[2]) == (status == "doubtful")


GOOD: dict[str, Any] = {
    **dict.fromkeys(("MemoryLimit", "SwapLimit", "PidsLimit", "CpuCfsQuota"), True),
    **{"CgroupVersion": "2", "Driver": "overlay2", "SecurityOptions": ["name=seccomp,profile=default"]},
    "DriverStatus": [["Backing Filesystem", "extfs"]],
}


def test_an_engine_that_cannot_isolate_is_wrong() -> None:
    assert isolation_check(GOOD) == ("isolation", "ok", "control groups 2, overlay2 on extfs, seccomp on", "")
    assert "cannot limit swap" in isolation_check({**GOOD, "SwapLimit": False})[2]
    assert isolation_check({**GOOD, "SecurityOptions": []})[1] == "wrong"
    assert isolation_check({})[1] == "wrong"


def test_an_image_of_another_version_is_doubtful() -> None:
    new = Image("id", {RECIPE_LABEL: recipe_digest("python")})
    assert image_check("x", IMAGE, new)[1] == "ok"
    assert image_check("x", IMAGE, Image("id", {RECIPE_LABEL: "old"}))[1:] == (
        *("doubtful", f"{IMAGE} is of another version of ridethrough; calls may be slower"),
        "ridethrough sandbox build python",
    )
    assert image_check("x", IMAGE, Image("id", {}))[1] == "doubtful"
    assert image_check("x", "debian:12", Image("id", {}))[1] == "ok"


def test_a_proof_that_fails_says_how_to_see_it() -> None:
    good = tuple(Evidence(name, True, "fine", see) for name, see in SEE.items())
    assert proof_check("x", "runc", Proof("runc", good, 1.0))[1] == "ok"
    bad = Evidence("user", False, "uid 0", "id")
    found = proof_check("x", "runc", Proof("runc", (bad, *good[1:])))
    assert found[1:] == ("wrong", "user: uid 0; runc", "see for yourself in a sandbox: `id`")
    lost = Evidence("user", False, "could not be tried: gone")
    assert proof_check("x", "runc", Proof("runc", (lost,)))[1] == "doubtful"


def test_a_lodger_is_json() -> None:
    lodger = Lodger("s", "python", "running", None, "", "runc", 1.0, "w", "owned", "kept ready")
    assert json.loads(json.dumps(lodger.as_json()))["claim"] == "owned"
