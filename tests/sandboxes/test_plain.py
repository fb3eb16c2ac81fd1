"""Sandboxes of images without Python: an exec for each call, and what cannot be done says so."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable

import anyio
import pytest

from ridethrough.runtime.errors import (
    SandboxError,
    SandboxFileNotFound,
    SandboxGone,
    SandboxTimeout,
    SandboxUnavailable,
)
from ridethrough.sandboxes.docker import DockerHost
from ridethrough.sandboxes.plain import PlainSandbox
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import ExecResult, Output, Sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.processes]


@pytest.fixture(scope="module", params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def profile(image: str) -> SandboxProfile:
    return SandboxProfile(
        name="plain", image=image, memory=64 * 2**20, disk=8 * 2**20, pids=32, env={"FROM": "profile"}
    )


@pytest.fixture
async def sandbox(host: DockerHost, busybox: str) -> AsyncGenerator[Sandbox]:
    sandbox = await host.create(profile(busybox), id=secrets.token_hex(6), linger=10)
    yield sandbox
    await sandbox.aclose()


async def alive(sandbox: Sandbox, word: str) -> bool:
    return word in (await sandbox.exec(["ps"])).stdout


async def test_commands_are_results(sandbox: Sandbox) -> None:
    """Status, both streams, input, environment, folder; what cannot be started is an error."""
    assert isinstance(sandbox, PlainSandbox)
    script = 'cat; echo "$FROM $GIVEN $(pwd)" >&2; exit 3'
    result = await sandbox.exec(["sh", "-c", script], stdin="told", env={"GIVEN": "call"}, cwd="/tmp")
    assert (result.exit_code, result.stdout, result.stderr) == (3, "told", "profile call /tmp\n")
    assert (await sandbox.exec(["id", "-u"], user="1234")).stdout == "1234\n"
    assert (await sandbox.exec(["sh", "-c", "kill -9 $$"])).exit_code == 137
    with pytest.raises(SandboxError, match="cannot be started"):
        await sandbox.exec(["no-such-program"])
    for user in ("0", "root", "-1"):
        with pytest.raises(SandboxError, match=r"root|number"):
            await sandbox.exec(["id"], user=user)


async def test_a_deadline_ends_all_that_a_call_has_started(sandbox: Sandbox) -> None:
    """What ignores SIGTERM, and what is in a session of its own."""
    script = "trap '' TERM; echo begun; setsid sleep 4321 & while :; do sleep 4321; done"
    with pytest.raises(SandboxTimeout) as caught:
        await sandbox.exec(["sh", "-c", script], timeout=0.5)
    assert isinstance(caught.value.result, ExecResult)
    assert caught.value.result.stdout == "begun\n"
    assert not await alive(sandbox, "4321")


async def test_what_a_call_leaves_running_is_ended_with_it(sandbox: Sandbox) -> None:
    """Whether it holds the output open or not."""
    for output in ("", ">/dev/null 2>&1"):
        result = await sandbox.exec(["sh", "-c", f"sleep 4321 {output} & echo ended"], timeout=30)
        assert result.stdout == "ended\n"
        assert not await alive(sandbox, "4321")


async def test_a_cancelled_call_leaves_nothing(sandbox: Sandbox) -> None:
    """The one who waits goes away in the middle."""
    with anyio.move_on_after(0.3):
        await sandbox.exec(["sleep", "4321"])
    assert not await alive(sandbox, "4321")


async def test_limits_are_named(sandbox: Sandbox) -> None:
    """Endless output, too much memory; a full disk is the command's own failure."""
    flood = await sandbox.exec(["yes"], timeout=60)
    assert (flood.limit, flood.truncated) == ("output", True)
    assert len(flood.stdout_bytes) <= 1024 * 1024
    hog = await sandbox.exec(["sh", "-c", "x=a; while :; do x=$x$x; done"], timeout=60)
    assert (hog.exit_code, hog.limit) == (137, "memory")
    full = await sandbox.exec(["dd", "if=/dev/zero", "of=/workspace/full", "bs=1M", "count=100"])
    assert full.exit_code != 0
    assert "No space left" in full.stderr


async def test_streams(sandbox: Sandbox) -> None:
    """Output comes as it is written; a reader that leaves ends the command."""
    items = [item async for item in sandbox.exec_stream(["sh", "-c", "echo one; echo two >&2"])]
    outputs = {(item.stream, item.data) for item in items if isinstance(item, Output)}
    assert outputs == {("stdout", b"one\n"), ("stderr", b"two\n")}
    assert isinstance(items[-1], ExecResult)
    stream = sandbox.exec_stream(["sh", "-c", "yes; sleep 4321"])
    async for _ in stream:
        break
    await stream.aclose()  # type: ignore[attr-defined]
    assert not await alive(sandbox, "yes")


async def test_files(sandbox: Sandbox) -> None:
    """Any bytes, pieces of them, folders; what is missing, elsewhere or no file is refused."""
    data = bytes(range(256)) * 1000
    assert await sandbox.write("a/b c/data", data) == len(data)
    assert await sandbox.read("a/b c/data") == data
    assert await sandbox.read("a/b c/data", offset=255, limit=3) == b"\xff\x00\x01"
    assert await sandbox.write("a/b c/data", "!", append=True) == len(data) + 1
    assert await sandbox.write("empty", "", mode=0o600) == 0
    assert [entry.path for entry in (await sandbox.list(recursive=True)).entries] == [
        "a",
        "a/b c",
        "a/b c/data",
        "empty",
    ]
    assert (await sandbox.list(recursive=True, after="a", limit=1)).more
    entry = await sandbox.stat("empty")
    assert (entry.kind, entry.size, entry.mode) == ("file", 0, 0o600)
    await sandbox.exec(["ln", "-s", "/bin/busybox", "link"])
    assert (await sandbox.stat("link")).kind == "link"
    for path in ("link", "/etc/passwd", "../bin/sh", "a"):
        with pytest.raises(SandboxError, match=r"outside|no regular file"):
            await sandbox.read(path)
    with pytest.raises(SandboxFileNotFound):
        await sandbox.read("nothing")
    await sandbox.remove("a")
    assert [entry.path for entry in (await sandbox.list()).entries] == ["empty", "link"]


async def test_snapshot_restore_fork(sandbox: Sandbox) -> None:
    """The workspace as it was, here and elsewhere."""
    await sandbox.write("kept/file", "as it was")
    snapshot = await sandbox.snapshot()
    await sandbox.write("kept/file", "changed")
    await sandbox.write("new", "")
    await sandbox.restore(snapshot)
    assert await sandbox.read("kept/file") == b"as it was"
    assert [entry.path for entry in (await sandbox.list()).entries] == ["kept"]
    other = await sandbox.fork()
    try:
        assert await other.read("kept/file") == b"as it was"
    finally:
        await other.aclose()


async def test_a_named_call_is_made_once(host: DockerHost, sandbox: Sandbox) -> None:
    """The same worker gets its result again; a later one is told that it was started, and nothing is repeated."""
    script = ["sh", "-c", "echo x >>ledger; cat ledger"]
    first = await sandbox.exec(script, call_id="call-1")
    assert (await sandbox.exec(script, call_id="call-1")) == first
    await sandbox.detach()
    with pytest.raises(SandboxGone, match="let go"):
        await sandbox.exec(["true"])
    later = await host.attach(sandbox.profile, sandbox.id)
    with pytest.raises(SandboxError, match="started before"):
        await later.exec(script, call_id="call-1")
    assert await later.read("ledger") == b"x\n"


async def test_a_call_of_another_worker_is_killed_by_its_name(host: DockerHost, sandbox: Sandbox) -> None:
    """A worker died in the middle of a call; the next one ends it."""
    async with anyio.create_task_group() as group:
        group.start_soon(_swallow, lambda: sandbox.exec(["sh", "-c", "touch begun; sleep 4321"], call_id="long"))
        other = await host.attach(sandbox.profile, sandbox.id)
        while "begun" not in [entry.path for entry in (await other.list()).entries]:
            await anyio.lowlevel.checkpoint()
        await other.kill("long")
        assert not await alive(other, "4321")
        await other.detach()


async def _swallow(what: Callable[[], Awaitable[object]]) -> None:
    await what()


async def test_what_it_cannot_do_says_so(sandbox: Sandbox) -> None:
    """And what to do about it."""
    with pytest.raises(SandboxError, match="python3"):
        await sandbox.start(["true"], timeout=1)
    for make in (sandbox.python, sandbox.shell, sandbox.watch):
        with pytest.raises(SandboxError, match="python3"):
            make()


async def test_pause(sandbox: Sandbox) -> None:
    """A frozen one goes on where it was."""
    await sandbox.pause()
    await sandbox.resume()
    assert (await sandbox.exec(["echo", "on"])).stdout == "on\n"


async def test_removed_from_outside(host: DockerHost, sandbox: Sandbox) -> None:
    """A call in it, and those after it, are told why."""
    async with anyio.create_task_group() as group:

        async def gone() -> None:
            with pytest.raises(SandboxGone, match="removed"):
                await sandbox.exec(["sh", "-c", "touch begun; sleep 4321"])

        group.start_soon(gone)
        while not [entry for entry in (await sandbox.list()).entries if entry.path == "begun"]:
            await anyio.lowlevel.checkpoint()
        await host.remove(sandbox.id)
    with pytest.raises(SandboxGone):
        await sandbox.exec(["true"])


async def test_an_image_without_a_shell(host: DockerHost, bare: str) -> None:
    """There is nothing to run anything with, and nothing is left of the attempt."""
    with pytest.raises(SandboxUnavailable, match="neither python3 nor a shell"):
        await host.create(profile(bare), id=secrets.token_hex(6))
