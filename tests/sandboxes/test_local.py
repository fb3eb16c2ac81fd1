"""Local sandboxes: the whole suite in child processes, and what is particular to them."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStream
from tests.sandboxes.conformance import PATIENCE, Conformance, OpenHost, box, made, new_id, running, sh

from ridethrough.runtime.errors import SandboxError, SandboxGone, SandboxUnavailable
from ridethrough.sandboxes.attached import AttachedSandbox
from ridethrough.sandboxes.local import FROZEN_TAG, LocalHost
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import Host, Relay

__all__ = ["box"]


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rt")
    folder.chmod(0o700)
    return folder


@pytest.fixture(scope="module")
def profile() -> SandboxProfile:
    return SandboxProfile(kind="local", env={"FROM_PROFILE": "yes"})


@pytest.fixture(scope="module")
async def host(anyio_backend: str, runtime: Path) -> AsyncGenerator[LocalHost]:
    async with LocalHost.open(runtime=runtime) as opened:
        yield opened
    assert os.listdir(runtime) == []


@pytest.fixture
def another_host(runtime: Path) -> OpenHost:
    def open_another() -> AbstractAsyncContextManager[Host]:
        return LocalHost.open(runtime=runtime)

    return open_another


class TestLocal(Conformance):
    """The suite on this machine."""


# --- no boundary, and that is said ----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_local_host_says_that_it_is_no_boundary(runtime: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        async with LocalHost.open(runtime=runtime) as opened:
            assert not opened.boundary
            assert opened.name.startswith("local:")
    assert caplog.messages == [
        "local sandboxes are no security boundary: what runs in them runs as you, on this machine"
    ]


@pytest.mark.anyio
async def test_a_local_sandbox_has_one_user(host: LocalHost, profile: SandboxProfile) -> None:
    async with made(host, profile) as sandbox:
        assert (sandbox.boundary, sandbox.runtime) == (False, "local")
        with pytest.raises(SandboxError, match="cannot be run as nobody"):
            await sandbox.exec(["id"], user="nobody")
        assert (await sandbox.exec(["true"], user=str(profile.user))).exit_code == 0


@pytest.mark.anyio
async def test_an_error_of_the_block_comes_out_as_it_is(runtime: Path) -> None:
    with pytest.raises(KeyError):
        async with LocalHost.open(runtime=runtime):
            raise KeyError("mine")


# --- where they are -------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_folder_that_others_may_look_into_is_refused(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o755)
    with pytest.raises(SandboxUnavailable, match="nobody else"):
        async with LocalHost.open(runtime=tmp_path):
            pass


@pytest.mark.anyio
async def test_a_folder_too_deep_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SandboxUnavailable, match="too long"):
        async with LocalHost.open(runtime=tmp_path / ("x" * 90)):
            pass


@pytest.mark.anyio
async def test_one_id_is_one_sandbox(host: LocalHost, profile: SandboxProfile) -> None:
    async with made(host, profile) as sandbox:
        with pytest.raises(SandboxUnavailable, match="already"):
            await host.create(profile, id=sandbox.id)
        assert await sh(sandbox, "echo still") == "still\n"
    strange = "../" + "long/" * 100 + "ü"
    sandbox = await host.create(profile, id=strange)
    assert strange in [each.id for each in await host.found()]
    await sandbox.aclose()


# --- life and death -------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_sandbox_that_nobody_is_attached_to_ends_and_clears_up(
    host: LocalHost, runtime: Path, profile: SandboxProfile
) -> None:
    async with made(host, profile, linger=0.2) as sandbox:
        mark = new_id()
        await sandbox.start(["sh", "-c", f"sleep 1000; : {mark}"], timeout=PATIENCE)
        async with made(host, profile) as witness:
            await sandbox.detach()
            await sh(witness, f"while grep -l {sandbox.id} {runtime}/*/state.json; do sleep 0.02; done")
            assert sandbox.id not in [each.id for each in await host.found()]
            assert await running(witness, mark) == 0
        with pytest.raises(SandboxGone):
            await host.attach(profile, sandbox.id)


@pytest.mark.anyio
async def test_a_sandbox_that_stays_frozen_ends_and_clears_up(
    host: LocalHost, runtime: Path, profile: SandboxProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ridethrough.sandboxes.local.FROZEN_SECONDS", 0.2)
    async with made(host, profile, linger=0.1) as sandbox, made(host, profile) as witness:
        mark = new_id()
        await sandbox.start(["sh", "-c", f"sleep 1000; : {mark}"], timeout=PATIENCE)
        shell = os.pidfd_open(_record(runtime, sandbox.id)["pid"])
        await sandbox.pause()
        await anyio.wait_readable(shell)
        os.close(shell)
        await sh(witness, f"! grep -l {sandbox.id} {runtime}/*/state.json")
        assert await running(witness, mark) == 0
        with pytest.raises(SandboxGone):
            await host.attach(profile, sandbox.id)


@pytest.mark.anyio
async def test_nothing_waits_for_a_sandbox_that_goes_on_or_is_removed(
    host: LocalHost, runtime: Path, profile: SandboxProfile
) -> None:
    async with made(host, profile) as sandbox, made(host, profile) as witness:
        waiting = f"grep -ls {FROZEN_TAG}={_record(runtime, sandbox.id)['tag']} /proc/[0-9]*/environ | wc -l"
        await sandbox.pause()
        await sandbox.pause()
        assert await sh(witness, f"while [ $({waiting}) != 2 ]; do sleep 0.01; done; {waiting}") == "2\n"
        await sandbox.resume()
        assert await sh(witness, waiting) == "0\n"
        await sandbox.pause()
        await sandbox.aclose()
        assert await sh(witness, waiting) == "0\n"


def _record(runtime: Path, id: str) -> dict[str, Any]:
    """What is on record of a sandbox."""
    records = [json.loads(path.read_text()) for path in runtime.glob("*/state.json")]
    return next(record for record in records if record["id"] == id)


@pytest.mark.anyio
async def test_a_supervisor_killed_from_inside_is_gone_and_leaves_nothing_after_removal(
    host: LocalHost, profile: SandboxProfile
) -> None:
    async with made(host, profile) as sandbox, made(host, profile) as witness:
        mark = new_id()
        await sandbox.start(["setsid", "sh", "-c", f"sleep 1000; : {mark}"], timeout=PATIENCE)
        with pytest.raises(SandboxGone):
            await sandbox.exec(["sh", "-c", 'kill -9 "$RIDETHROUGH_SUPERVISOR"; sleep 1000'], timeout=PATIENCE)
        await sandbox.aclose()
        assert await running(witness, mark) == 0
        assert await sh(witness, "echo well") == "well\n"


@pytest.mark.anyio
async def test_a_stuck_supervisor_costs_its_sandbox(host: LocalHost, profile: SandboxProfile) -> None:
    async with made(host, profile) as sandbox:
        assert isinstance(sandbox, AttachedSandbox)
        await host.pause(sandbox.id)  # behind the sandbox's back: it looks like one that hangs
        with pytest.raises(SandboxGone, match="did not answer"):
            await sandbox.ping(seconds=0.1)
        assert sandbox.id not in [each.id for each in await host.found()]


@pytest.mark.anyio
async def test_sandboxes_that_are_cancelled_at_any_time_leave_nothing(host: LocalHost, profile: SandboxProfile) -> None:
    mark = new_id()

    async def use(number: int) -> None:
        with anyio.move_on_after(number * 0.012):
            async with made(host, profile) as sandbox:
                await sandbox.write("a", bytes(300_000))
                await sandbox.exec(["sh", "-c", f"sleep 1000; : {mark}"], timeout=PATIENCE)

    await use(20)
    before, there = len(os.listdir("/proc/self/fd")), [each.id for each in await host.found()]
    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(use, number)
    assert [each.id for each in await host.found() if each.id not in there] == []
    assert len(os.listdir("/proc/self/fd")) == before
    async with made(host, profile) as witness:
        assert await running(witness, mark) == 0


_OWNER = """
import sys, anyio
from ridethrough.sandboxes.local import LocalHost
from ridethrough.sandboxes.profile import SandboxProfile

async def main():
    async with LocalHost.open(runtime=sys.argv[1]) as host:
        sandbox = await host.create(SandboxProfile(kind="local"), id="orphan", labels={"run": "r1"}, linger=60)
        line = "echo begun > begun; while [ ! -e go ]; do sleep 0.01; done; echo result; echo x >> count"
        print("ready", flush=True)
        await sandbox.exec(["sh", "-c", line], timeout=60, call_id="call")

anyio.run(main)
"""


def _owner(runtime: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _OWNER, str(runtime)], stdout=subprocess.PIPE, process_group=0)


@pytest.mark.anyio
async def test_a_sandbox_outlives_the_worker_that_was_killed(
    host: LocalHost, runtime: Path, profile: SandboxProfile
) -> None:
    owner = await anyio.to_thread.run_sync(lambda: _owner(runtime))
    try:
        assert owner.stdout is not None
        assert await anyio.to_thread.run_sync(owner.stdout.readline) == b"ready\n"
        async with made(host, profile) as witness:
            await sh(witness, f"while ! ls {runtime}/*/workspace/begun; do sleep 0.01; done")
            os.killpg(owner.pid, signal.SIGKILL)
            sandbox = await host.attach(profile, "orphan")
            await sandbox.write("go", "")
            assert (await sandbox.exec(["false"], call_id="call")).stdout == "result\n"
            assert await sandbox.read("count") == b"x\n"
            assert [each.labels for each in await host.found() if each.id == "orphan"] == [{"run": "r1"}]
            await sandbox.aclose()
    finally:
        owner.kill()
        owner.communicate()
        await host.remove("orphan")


@pytest.mark.anyio
async def test_programs_find_the_relay_where_there_is_a_network(runtime: Path, profile: SandboxProfile) -> None:
    served: list[str] = []

    def relay_for(profile: SandboxProfile, id: str) -> Relay:
        async def relay(stream: ByteStream) -> None:
            async with stream:
                served.append(id)
                data = await stream.receive()
                await stream.send(b"HTTP/1.0 200 OK\r\n\r\n" + data.split(b"\r\n")[0])

        return relay

    ask = "import urllib.request; print(urllib.request.urlopen('http://example.test/x').read().decode())"
    async with LocalHost.open(runtime=runtime, relay_for=relay_for) as opened:
        profile = replace(profile, network=("example.test",))
        async with made(opened, profile) as one, made(opened, profile) as two:
            for sandbox in (one, two):
                assert "GET http://example.test/x" in (await sandbox.exec(["python3", "-c", ask])).stdout
            assert served == [one.id, two.id]
