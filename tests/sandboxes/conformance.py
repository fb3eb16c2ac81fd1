"""What every sandbox must do, wherever it runs: one suite for all hosts.

A module that runs it has a module-wide ``anyio_backend``, a module-wide fixture ``host`` that opens its host, and

    from tests.sandboxes.conformance import Conformance, box
    class TestHere(Conformance): ...

``box`` is one sandbox for all tests that leave it as they found it; those that remove theirs make their own, of the
module-wide fixture ``profile``, which has ``FROM_PROFILE=yes`` in its environment. A host that was opened anew, as
another worker would, comes from the fixture ``another_host`` (a function without arguments that gives an asynchronous
context manager).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import signal
import tarfile
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, cast

import anyio
import pytest

from ridethrough.runtime.errors import SandboxError, SandboxFileNotFound, SandboxGone, SandboxTimeout
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import Change, ExecResult, Host, Output, Process, Sandbox, Snapshot

PATIENCE = 60.0
"""Seconds after which a test gives up; nothing takes a tenth of that."""

OpenHost = Callable[[], AbstractAsyncContextManager[Host]]

_RUNNING = """
import os, sys
mark, found = sys.stdin.buffer.read(), 0
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            found += mark in file.read()
    except OSError:
        pass
print(found)
"""

_STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(2):
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            os.execve(sys.executable, [sys.executable, "-c", "import time; time.sleep(1000)", sys.argv[1]], {})
        os._exit(0)
print("started", flush=True)
time.sleep(1000)
"""


@pytest.fixture(scope="module")
async def box(host: Host, profile: SandboxProfile) -> AsyncGenerator[Sandbox]:
    """A sandbox that tests share."""
    async with made(host, profile) as sandbox:
        yield sandbox


@asynccontextmanager
async def made(host: Host, profile: SandboxProfile, **options: Any) -> AsyncGenerator[Sandbox]:
    """A sandbox of a test's own."""
    sandbox = await host.create(profile, id=new_id(), labels={"test": "conformance"}, **options)
    try:
        with anyio.fail_after(PATIENCE):
            yield sandbox
    finally:
        with anyio.CancelScope(shield=True):
            await sandbox.aclose()


def new_id() -> str:
    """The id of a sandbox, or of a call."""
    return f"conf-{uuid.uuid4().hex[:12]}"


def closing(items: AsyncIterator[Any]) -> AbstractAsyncContextManager[AsyncGenerator[Any]]:
    """A stream that is closed when its reader leaves, whatever the event loop."""
    return aclosing(cast("AsyncGenerator[Any]", items))


async def running(box: Sandbox, mark: str) -> int:
    """How many processes have ``mark`` in their command line."""
    result = await box.exec(["python3", "-c", _RUNNING], stdin=mark)
    assert result.exit_code == 0, result.stderr
    return int(result.stdout)


async def sh(box: Sandbox, line: str, **options: Any) -> str:
    """What a line of shell prints."""
    result = await box.exec(["sh", "-c", line], **options)
    assert result.exit_code == 0, result.stderr
    return result.stdout


async def until_there(box: Sandbox, path: str) -> None:
    """Wait until a file is there."""
    await box.exec(["sh", "-c", 'while [ ! -e "$0" ]; do sleep 0.01; done', path], timeout=PATIENCE)


async def collect(items: AsyncIterator[Output | ExecResult]) -> tuple[dict[str, bytes], ExecResult | None]:
    """A stream's output and its end."""
    streams = {"stdout": b"", "stderr": b""}
    end: ExecResult | None = None
    async with closing(items) as stream:
        async for item in stream:
            assert end is None
            if isinstance(item, Output):
                assert item.offset == len(streams[item.stream])
                streams[item.stream] += item.data
            else:
                end = item
    return streams, end


async def line_of(items: AsyncGenerator[Output]) -> bytes:
    """The next line, in however many pieces it comes."""
    line = b""
    while not line.endswith(b"\n"):
        line += (await anext(items)).data
    return line


def archive(*entries: tuple[str, Any]) -> Snapshot:
    """A snapshot with these entries: name and content, or a ``TarInfo``."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, what in entries:
            if isinstance(what, bytes):
                entry = tarfile.TarInfo(name)
                entry.size = len(what)
                tar.addfile(entry, io.BytesIO(what))
            else:
                what.name = name
                tar.addfile(what)
    data = raw.getvalue()
    return Snapshot(data, hashlib.sha256(data).hexdigest(), len(entries), "python")


def entry(kind: bytes, target: str = "") -> tarfile.TarInfo:
    """An entry that is no file."""
    made = tarfile.TarInfo("x")
    made.type, made.linkname = kind, target
    return made


@pytest.mark.anyio
class Conformance:
    """The suite."""

    # --- commands: what they do is a result -------------------------------------------------------------------------

    async def test_a_command_gives_its_status_and_output(self, box: Sandbox) -> None:
        result = await box.exec(["sh", "-c", "echo out; echo err >&2; exit 3"])
        assert (result.exit_code, result.stdout, result.stderr) == (3, "out\n", "err\n")
        assert (result.truncated, result.limit) == (False, None)
        assert (result.stdout_total, result.stderr_total) == (4, 4)
        assert 0 <= result.seconds < PATIENCE

    async def test_no_shell_reads_the_arguments(self, box: Sandbox) -> None:
        words = ["a b", "$HOME", "*", "'\"\\", "", "ünï", "-n"]
        result = await box.exec(["python3", "-c", "import sys; print(ascii(sys.argv[1:]))", *words])
        assert result.stdout.strip() == ascii(words)

    async def test_a_signal_is_a_status_as_shells_have_it(self, box: Sandbox) -> None:
        assert (await box.exec(["sh", "-c", "kill -9 $$"])).exit_code == 137
        assert (await box.exec(["sh", "-c", "kill -SEGV $$"])).exit_code == 128 + signal.SIGSEGV

    async def test_output_may_be_any_bytes(self, box: Sandbox) -> None:
        program = "import os; os.write(1, bytes(range(256)) * 4); os.write(2, 'grüße 🎈'.encode()[:-1])"
        result = await box.exec(["python3", "-c", program])
        assert result.stdout_bytes == bytes(range(256)) * 4
        assert result.stderr == "grüße \ufffd"

    @pytest.mark.parametrize("size", [0, 1, 5000, 256 * 1024, 256 * 1024 + 1, 3_000_000])
    async def test_input_arrives_whole(self, box: Sandbox, size: int) -> None:
        data = hashlib.shake_128(b"input").digest(size)
        program = "import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"
        result = await box.exec(["python3", "-c", program], stdin=data)
        assert result.stdout.strip() == hashlib.sha256(data).hexdigest()

    async def test_input_may_be_text_left_out_or_not_read(self, box: Sandbox) -> None:
        assert (await box.exec(["cat"], stdin="süß")).stdout == "süß"
        assert (await box.exec(["cat"])).stdout == ""
        assert (await box.exec(["true"], stdin=bytes(2_000_000))).exit_code == 0
        assert (await box.exec(["sh", "-c", "exec <&-; exit 4"], stdin=bytes(2_000_000))).exit_code == 4

    async def test_the_environment_is_the_profiles_and_the_calls(self, box: Sandbox, monkeypatch: Any) -> None:
        monkeypatch.setenv("RIDETHROUGH_TEST_SECRET", "leaked")
        text = await sh(box, "env", env={"MINE": "a=b c", "LANG": "C"})
        lines = text.splitlines()
        assert "MINE=a=b c" in lines
        assert "LANG=C" in lines
        assert "FROM_PROFILE=yes" in lines
        assert "leaked" not in text
        assert "MINE" not in await sh(box, "env")

    async def test_the_working_directory_is_the_workspace(self, box: Sandbox) -> None:
        await box.write("inner/deep/file", "x")
        here = (await sh(box, "pwd")).strip()
        assert (await sh(box, 'echo "$HOME"')).strip() == here
        assert (await sh(box, "pwd", cwd="inner/deep")).strip() == f"{here}/inner/deep"
        assert (await sh(box, "pwd", cwd=f"{here}/inner")).strip() == f"{here}/inner"
        await box.remove("inner")

    async def test_what_cannot_be_started_is_an_error(self, box: Sandbox) -> None:
        await box.write("plain", "no program")
        for argv in (["no-such-program"], ["./plain"], ["/"], []):
            with pytest.raises(SandboxError):
                await box.exec(argv)
        with pytest.raises(SandboxError):
            await box.exec(["true"], cwd="no/such/folder")
        with pytest.raises(SandboxError):
            await box.exec(["printf", "a\0b"])
        await box.remove("plain")
        assert (await box.exec(["true"])).exit_code == 0

    @pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
    async def test_every_call_has_a_deadline(self, box: Sandbox, timeout: float) -> None:
        with pytest.raises(SandboxError, match="timeout"):
            await box.exec(["true"], timeout=timeout)

    async def test_the_first_and_the_last_half_of_much_output_is_kept(self, box: Sandbox) -> None:
        result = await box.exec(["python3", "-c", "print('a' * 100 + 'b' * 100_000 + 'c' * 99)"], keep_output=200)
        assert result.stdout_bytes == b"a" * 100 + b"c" * 99 + b"\n"
        assert result.truncated
        assert (result.stdout_total, result.stderr_total) == (100_200, 0)
        result = await box.exec(["python3", "-c", "print('a' * 700_000)"])
        assert (result.truncated, len(result.stdout_bytes)) == (False, 700_001)

    @pytest.mark.parametrize("line", ["yes", "yes >&2"])
    async def test_endless_output_ends_its_call(self, box: Sandbox, line: str) -> None:
        mark = new_id()
        result = await box.exec(["sh", "-c", f"{line}; : {mark}"], timeout=PATIENCE)
        assert result.limit == "output"
        assert result.exit_code != 0
        assert len(result.stdout_bytes) + len(result.stderr_bytes) <= 2**20
        assert await running(box, mark) == 0

    async def test_what_a_command_leaves_is_ended_with_it(self, box: Sandbox) -> None:
        mark = new_id()
        left = f"import time; time.sleep(1000) # {mark}"
        result = await box.exec(["sh", "-c", 'python3 -c "$0" & setsid python3 -c "$0" & echo done', left])
        assert result.stdout == "done\n"
        assert await running(box, mark) == 0

    # --- deadlines --------------------------------------------------------------------------------------------------

    async def test_a_deadline_ends_all_that_the_call_has_started(self, box: Sandbox) -> None:
        mark = new_id()
        with pytest.raises(SandboxTimeout) as caught:
            await box.exec(["python3", "-c", _STUBBORN, mark], timeout=0.5)
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.result.stdout == "started\n"
        assert await running(box, mark) == 0

    async def test_a_command_may_clear_up_at_its_deadline(self, box: Sandbox) -> None:
        with pytest.raises(SandboxTimeout) as caught:
            await box.exec(
                ["sh", "-c", "trap 'echo bye; exit' TERM; echo hi; while :; do sleep 0.01; done"], timeout=0.3
            )
        assert caught.value.result.stdout == "hi\nbye\n"

    async def test_a_cancelled_call_is_ended(self, box: Sandbox) -> None:
        mark, name = new_id(), new_id()
        async with anyio.create_task_group() as group:
            line = 'touch "$0"; sleep 1000; : $1'
            group.start_soon(box.exec, ["sh", "-c", line, name, mark])
            await until_there(box, name)
            assert await running(box, mark) > 0
            group.cancel_scope.cancel()
        assert await running(box, mark) == 0
        await box.remove(name)

    # --- streams ----------------------------------------------------------------------------------------------------

    async def test_output_comes_while_the_command_runs(self, box: Sandbox) -> None:
        name = new_id()
        line = 'echo first; while [ ! -e "$0" ]; do sleep 0.01; done; echo second >&2; exit 5'
        async with closing(box.exec_stream(["sh", "-c", line, name], timeout=PATIENCE)) as items:
            assert await anext(items) == Output("stdout", b"first\n", 0)
            await box.write(name, "")
            streams, end = await collect(items)
        assert streams["stderr"] == b"second\n"
        assert end is not None
        assert (end.exit_code, end.stdout, end.stderr) == (5, "first\n", "second\n")
        await box.remove(name)

    async def test_a_slow_reader_misses_nothing(self, box: Sandbox) -> None:
        program = "import os\nfor i in range(200): os.write(1, b'%04d' % i * 10_000)"
        streams, end = await collect(box.exec_stream(["python3", "-c", program]))
        assert streams["stdout"] == b"".join(b"%04d" % i * 10_000 for i in range(200))
        assert end is not None
        assert (end.truncated, end.stdout_total) == (True, 8_000_000)

    async def test_a_reader_that_stops_reading_stops_the_command_and_nobody_else(self, box: Sandbox) -> None:
        name = new_id()
        program = f"import os\nwhile 1: os.write(1, bytes(100_000)); open('{name}', 'a').write('x')"
        async with closing(box.exec_stream(["python3", "-c", program], timeout=PATIENCE)) as items:
            await anext(items)
            before = -1
            while before != (before := (await box.stat(name)).size if before >= 0 else 0):
                await sh(box, "sleep 0.3")
            assert before < 40
            assert await sh(box, "echo on") == "on\n"
        await box.remove(name)

    async def test_a_reader_that_leaves_ends_the_command(self, box: Sandbox) -> None:
        mark = new_id()
        async with closing(box.exec_stream(["sh", "-c", f"yes; : {mark}"])) as items:
            await anext(items)
        assert await running(box, mark) == 0

    async def test_a_stream_has_its_deadline_too(self, box: Sandbox) -> None:
        with pytest.raises(SandboxTimeout) as caught:
            await collect(box.exec_stream(["sh", "-c", "echo hi; sleep 1000"], timeout=0.3))
        assert caught.value.result.stdout == "hi\n"
        with pytest.raises(SandboxError):
            await collect(box.exec_stream(["no-such-program"]))

    async def test_a_stream_takes_input(self, box: Sandbox) -> None:
        data = hashlib.shake_128(b"stream").digest(1_500_000)
        streams, _ = await collect(box.exec_stream(["cat"], stdin=data))
        assert streams["stdout"] == data

    # --- background -------------------------------------------------------------------------------------------------

    async def test_a_process_in_the_background_is_written_to_and_waited_for(self, box: Sandbox) -> None:
        process = await box.start(
            ["sh", "-c", "while read x; do echo got $x; done; exit 6"], timeout=PATIENCE, stdin=True
        )
        await process.write(b"one\n")
        async with closing(process.output()) as items:
            assert await line_of(items) == b"got one\n"
        await process.write(b"two\n")
        await process.close_stdin()
        assert (await process.wait()).stdout == "got one\ngot two\n"
        assert (await process.wait()).exit_code == 6
        async with closing(process.output()) as items:
            assert b"".join([item.data async for item in items]) == b"got one\ngot two\n"
        with pytest.raises(SandboxError):
            await process.write(b"three\n")

    async def test_a_process_in_the_background_is_signalled_and_killed(self, box: Sandbox) -> None:
        mark = new_id()
        program = (
            "import signal\nsignal.signal(signal.SIGUSR1, lambda *_: print('usr1', flush=True))\n"
            f"print('ready', flush=True)\nwhile True: signal.pause() # {mark}"
        )
        process = await box.start(["python3", "-c", program], timeout=PATIENCE)
        async with closing(process.output()) as items:
            assert await line_of(items) == b"ready\n"
            await process.signal(signal.SIGUSR1)
            assert await line_of(items) == b"usr1\n"
        await process.kill()
        assert await running(box, mark) == 0
        assert (await process.wait()).exit_code in (128 + signal.SIGTERM, 128 + signal.SIGKILL)
        await process.kill()

    async def test_a_process_in_the_background_has_a_deadline(self, box: Sandbox) -> None:
        mark = new_id()
        process = await box.start(["sh", "-c", f"sleep 1000; : {mark}"], timeout=0.2)
        with pytest.raises(SandboxTimeout):
            await process.wait()
        assert await running(box, mark) == 0

    async def test_a_process_in_the_background_outlives_its_starter(self, box: Sandbox) -> None:
        started: list[Process] = []

        async def start() -> None:
            started.append(await box.start(["sh", "-c", "sleep 0.2; echo alive"], timeout=PATIENCE))
            await anyio.sleep_forever()

        async with anyio.create_task_group() as group:
            group.start_soon(start)
            while not started:
                await box.exec(["true"])
            group.cancel_scope.cancel()
        assert (await started[0].wait()).stdout == "alive\n"

    # --- call ids ---------------------------------------------------------------------------------------------------

    async def test_a_call_of_one_id_runs_once(self, box: Sandbox) -> None:
        id, name = new_id(), new_id()
        results: list[ExecResult] = []

        async def call() -> None:
            argv = ["sh", "-c", 'echo x >> "$0"; sleep 0.1; cat "$0"; exit 3', name]
            results.append(await box.exec(argv, call_id=id))

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(call)
        await call()
        assert [(each.exit_code, each.stdout) for each in results] == [(3, "x\n")] * 4
        await box.forget([id, new_id()])
        await call()
        assert results[-1].stdout == "x\nx\n"
        await box.remove(name)

    async def test_a_call_can_be_killed_by_its_id(self, box: Sandbox) -> None:
        id = new_id()
        process = await box.start(["sleep", "1000"], timeout=PATIENCE, call_id=id)
        assert process.call_id == id
        await box.kill(id)
        assert (await process.wait()).exit_code > 128
        await box.kill(id)
        await box.kill(new_id())

    async def test_another_worker_gets_what_finished_and_what_still_runs(
        self, host: Host, profile: SandboxProfile, another_host: OpenHost
    ) -> None:
        async with made(host, profile) as sandbox:
            done, goes_on = new_id(), new_id()
            long = ["sh", "-c", "echo begun > begun; while [ ! -e go ]; do sleep 0.01; done; echo end; echo x >> count"]
            await sandbox.exec(["sh", "-c", "echo result; echo x >> count"], call_id=done)
            async with anyio.create_task_group() as group:
                group.start_soon(_until_gone, sandbox, long, goes_on)
                await until_there(sandbox, "begun")
                await sandbox.detach()
            with pytest.raises(SandboxGone):
                await sandbox.exec(["true"])
            async with another_host() as other:
                again = await other.attach(profile, sandbox.id)
                assert (again.id, again.runtime, again.boundary) == (sandbox.id, sandbox.runtime, sandbox.boundary)
                assert (await again.exec(["sh", "-c", "echo other"], call_id=done)).stdout == "result\n"
                await again.write("go", "")
                assert (await again.exec(long, call_id=goes_on)).stdout == "end\n"
                assert await again.read("count") == b"x\nx\n"

    async def test_who_attaches_takes_the_place_of_the_one_before(
        self, host: Host, profile: SandboxProfile, another_host: OpenHost
    ) -> None:
        async with made(host, profile) as sandbox:
            async with another_host() as other:
                again = await other.attach(profile, sandbox.id)
                assert await sh(again, "echo here") == "here\n"
                with pytest.raises(SandboxGone):
                    await sandbox.exec(["true"])

    # --- files ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", [0, 1, 256 * 1024, 256 * 1024 + 1, 10_000_000])
    async def test_a_file_comes_back_as_it_was(self, box: Sandbox, size: int) -> None:
        data = hashlib.shake_128(b"file").digest(size)
        assert await box.write("deep/er/file", data) == size
        assert await box.read("deep/er/file") == data
        assert (await box.stat("deep/er/file")).size == size
        result = await box.exec(
            ["python3", "-c", "import hashlib; print(hashlib.sha256(open('deep/er/file', 'rb').read()).hexdigest())"]
        )
        assert result.stdout.strip() == hashlib.sha256(data).hexdigest()
        await box.remove("deep")

    async def test_parts_of_a_file_are_read(self, box: Sandbox) -> None:
        data = bytes(range(256)) * 4000
        await box.write("parts", data)
        assert await box.read("parts", offset=10, limit=20) == data[10:30]
        assert await box.read("parts", offset=1000, limit=600_000) == data[1000:601_000]
        assert await box.read("parts", offset=len(data) - 5) == data[-5:]
        assert await box.read("parts", offset=len(data) + 5) == b""
        assert await box.read("parts", limit=0) == b""
        await box.remove("parts")

    async def test_a_file_is_replaced_added_to_and_made_to_run(self, box: Sandbox) -> None:
        await box.write("script", "#!/bin/sh\necho one\n", mode=0o755)
        assert await sh(box, "./script") == "one\n"
        await box.write("script", "#!/bin/sh\necho two\n")
        assert await sh(box, "./script") == "two\n"
        size = await box.write("script", "echo three\n", append=True)
        assert size == (await box.stat("script")).size
        assert await sh(box, "./script") == "two\nthree\n"
        assert (await box.stat("script")).mode & 0o777 == 0o755
        await box.remove("script")

    async def test_one_file_written_twice_at_once_is_one_of_both(self, box: Sandbox) -> None:
        contents = [bytes([i]) * 700_000 for i in range(6)]
        async with anyio.create_task_group() as group:
            for content in contents:
                group.start_soon(box.write, "raced", content)
        assert await box.read("raced") in contents
        assert [each.path for each in (await box.list()).entries] == ["raced"]
        await box.remove("raced")

    async def test_paths_are_relative_or_absolute_below_the_workspace_or_tmp(self, box: Sandbox) -> None:
        await box.write("/workspace/a/b", "1")
        assert await box.read("a/../a/./b") == b"1"
        here = (await sh(box, "pwd")).strip()
        assert await box.read(f"{here}/a/b") == b"1"
        await box.write("/tmp/c", "2")
        assert (await box.stat("/tmp/c")).path == "/tmp/c"
        await box.remove("a")
        await box.remove("/tmp/c")

    async def test_what_is_not_there_is_not_found(self, box: Sandbox) -> None:
        for call in (box.read("none"), box.stat("no/ne"), box.list("none"), box.remove("none"), box.read("")):
            with pytest.raises(SandboxError) as caught:
                await call
        await box.write("file", "")
        for missing in (box.read("none"), box.stat("no/ne"), box.remove("none")):
            with pytest.raises(SandboxFileNotFound) as caught:
                await missing
            assert isinstance(caught.value, FileNotFoundError)
        await box.remove("file")

    @pytest.mark.parametrize(
        "path",
        [
            "..",
            "../x",
            "a/../../x",
            "/",
            "/etc/passwd",
            "/proc/self/environ",
            "/workspacex",
            "/workspace/../etc/passwd",
            "/tmp/../etc/passwd",
            "out",
            "out/passwd",
            "loop",
            "pipe",
            "deep/up/etc/passwd",
            "a\0b",
            "x" * 5000,
            "/dev/zero",
        ],
    )
    async def test_paths_that_lead_elsewhere_are_refused(self, box: Sandbox, path: str) -> None:
        await sh(
            box,
            "mkdir -p deep; ln -sfn /etc out; ln -sfn loop loop; ln -sfn ../../../../../../.. deep/up; "
            "[ -p pipe ] || mkfifo pipe",
        )
        with anyio.fail_after(PATIENCE):
            with pytest.raises(SandboxError):
                await box.read(path, limit=100)
            with pytest.raises(SandboxError):
                await box.write(path, "x")

    async def test_links_within_the_workspace_are_followed_and_removed_alone(self, box: Sandbox) -> None:
        await box.write("real/file", "inside")
        await sh(box, "ln -sfn real link; ln -sfn /etc away")
        assert await box.read("link/file") == b"inside"
        assert (await box.stat("link")).kind == "link"
        await box.remove("link")
        await box.remove("away")
        assert await box.read("real/file") == b"inside"
        await sh(box, "ln -sfn /etc real/away")
        await box.remove("real")
        assert (await sh(box, "ls -d /etc")) == "/etc\n"

    async def test_a_folder_is_listed_in_order_and_in_parts(self, box: Sandbox) -> None:
        await sh(
            box,
            "mkdir -p l/sub l/empty; for i in 3 1 2; do echo $i > l/f$i; done; echo x > l/sub/g; ln -s f1 l/z; "
            "mkfifo l/p",
        )
        listing = await box.list("l")
        assert [(each.path, each.kind) for each in listing.entries] == [
            ("l/empty", "directory"),
            ("l/f1", "file"),
            ("l/f2", "file"),
            ("l/f3", "file"),
            ("l/p", "other"),
            ("l/sub", "directory"),
            ("l/z", "link"),
        ]
        assert not listing.more
        assert listing.entries[1].size == 2
        first = await box.list("l", limit=3)
        assert first.more
        rest = await box.list("l", after=first.entries[-1].path)
        assert first.entries + rest.entries == listing.entries
        everything = await box.list("l", recursive=True)
        assert "l/sub/g" in [each.path for each in everything.entries]
        assert len(everything.entries) == 8
        await box.remove("l")

    async def test_many_files_are_listed_in_pages(self, box: Sandbox) -> None:
        await box.exec(
            [
                "python3",
                "-c",
                "import os\nos.mkdir('many')\nfor i in range(5000): open(f'many/{i:05d}' + 'n' * 100, 'w')",
            ]
        )
        paths: list[str] = []
        while True:
            listing = await box.list("many", after=paths[-1] if paths else "", limit=2200)
            paths += [each.path for each in listing.entries]
            if not listing.more:
                break
            assert len(listing.entries) == 2200
        assert paths == [f"many/{i:05d}" + "n" * 100 for i in range(5000)]
        await box.remove("many")

    async def test_names_that_are_no_text_can_be_named_again(self, box: Sandbox) -> None:
        await box.exec(["python3", "-c", "import os; os.mkdir('odd'); open(b'odd/\\xff\\n\\x01', 'w').write('odd')"])
        found = (await box.list("odd")).entries
        assert [each.path for each in found] == ["odd/\udcff\n\x01"]
        assert await box.read(found[0].path) == b"odd"
        await box.remove("odd")

    async def test_what_changes_is_seen(self, box: Sandbox) -> None:
        await box.write("seen/old", "x")
        wanted = {Change("created", "seen/new"), Change("modified", "seen/old"), Change("removed", "seen/gone")}
        await box.write("seen/gone", "x")
        found: set[Change] = set()

        async def stir() -> None:
            while not found:  # the first change may come before the watch has begun
                await box.write("seen/first", new_id())
                await sh(box, "sleep 0.1")

        async with anyio.create_task_group() as group:
            group.start_soon(stir)
            async with closing(box.watch("seen")) as changes:
                found.add(await anext(changes))
                await box.write("seen/new", "x")
                await box.write("seen/old", "longer than before")
                await box.remove("seen/gone")
                while not wanted <= found:
                    found.add(await anext(changes))
        await box.remove("seen")
        with pytest.raises(SandboxError):
            async with closing(box.watch("nowhere")) as changes:
                await anext(changes)

    # --- sessions ---------------------------------------------------------------------------------------------------

    async def test_a_python_session_keeps_its_state(self, box: Sandbox) -> None:
        async with box.python(env={"MINE": "1"}) as session:
            assert (await session.run("x = 20\ndef f(y):\n    return x + y")).exit_code == 0
            assert (await session.run("f(22)")).stdout == "42\n"
            failed = await session.run("print('before')\n1 / 0")
            assert (failed.exit_code, failed.stdout) == (1, "before\n")
            assert "ZeroDivisionError" in failed.stderr
            assert (await session.run("def broken(:")).exit_code == 1
            assert (await session.run("import os; os.environ['MINE']")).stdout == "'1'\n"
            assert (await session.run("import sys; sys.stderr.write('err'); x")).stdout == "20\n"
            assert (await session.run("print('ü' * 300_000)")).stdout == "ü" * 300_000 + "\n"

    async def test_a_python_session_that_hangs_or_ends_begins_anew_and_says_so(self, box: Sandbox) -> None:
        mark = new_id()
        async with box.python() as session:
            await session.run("x = 1")
            with pytest.raises(SandboxTimeout, match="lost") as caught:
                await session.run(
                    f"argv = ['sh', '-c', 'sleep 1000; : {mark}']\n"
                    "import subprocess; subprocess.Popen(argv, start_new_session=True)\n"
                    "print('hanging', flush=True)\nwhile True: pass",
                    timeout=0.7,
                )
            assert caught.value.result.stdout == "hanging\n"
            assert await running(box, mark) == 0
            again = await session.run("x")
            assert again.exit_code == 1
            assert "new Python session" in again.stderr
            assert "NameError" in again.stderr
            ended = await session.run("print('bye', flush=True)\nimport os; os._exit(9)")
            assert (ended.exit_code, ended.stdout) == (9, "bye\n")
            after = await session.run("1 + 1")
            assert after.stdout == "2\n"
            assert "new Python session" in after.stderr
            assert (await session.run("0")).stderr == ""

    async def test_a_shell_session_keeps_its_state(self, box: Sandbox) -> None:
        async with box.shell() as session:
            await session.run("mkdir -p kept; cd kept; a='1 2'; f() { echo \"f $1\"; }; export B=3")
            result = await session.run('pwd; echo "$a"; f x; sh -c "echo $B"')
            assert result.stdout.splitlines()[0].endswith("/kept")
            assert result.stdout.splitlines()[1:] == ["1 2", "f x", "3"]
            assert (await session.run("false")).exit_code == 1
            assert (await session.run("(exit 7)")).exit_code == 7
            assert (await session.run("no-such-program")).exit_code == 127
            broken = await session.run("if then (")
            assert broken.exit_code != 0
            assert "yntax" in broken.stderr
            assert (await session.run("cat; echo 'it''s' # a comment")).stdout == "its\n"
            assert (await session.run("cat <<END\nhere $a\nEND")).stdout == "here 1 2\n"
            assert (await session.run("echo one\necho two >&2; false\n")).exit_code == 1
        await box.remove("kept")

    async def test_a_shell_session_that_hangs_or_ends_begins_anew_and_says_so(self, box: Sandbox) -> None:
        mark = new_id()
        async with box.shell() as session:
            await session.run("a=1")
            with pytest.raises(SandboxTimeout, match="lost"):
                await session.run(f"setsid sh -c 'sleep 1000; : {mark}' & echo on; sleep 1000", timeout=0.5)
            assert await running(box, mark) == 0
            again = await session.run('echo "a=$a"')
            assert again.stdout == "a=\n"
            assert "new shell session" in again.stderr
            ended = await session.run("echo bye; exit 4")
            assert (ended.exit_code, ended.stdout) == (4, "bye\n")
            assert "new shell session" in (await session.run("true")).stderr
            assert (await session.run("true")).stderr == ""

    async def test_runs_of_a_session_come_one_after_the_other(self, box: Sandbox) -> None:
        outputs: list[str] = []
        async with box.python() as session:
            await session.run("import time; n = 0")

            async def run() -> None:
                code = "m = n; time.sleep(0.01); n = m + 1; print(n)"
                outputs.append((await session.run(code)).stdout)

            async with anyio.create_task_group() as group:
                for _ in range(8):
                    group.start_soon(run)
        assert sorted(outputs) == [f"{n}\n" for n in range(1, 9)]

    async def test_a_session_ends_with_its_block_and_when_cancelled(self, box: Sandbox) -> None:
        mark = new_id()
        async with box.shell() as session:
            await session.run(f"sh -c 'sleep 1000; : {mark}' &")
            assert await running(box, mark) == 1
        assert await running(box, mark) == 0
        with pytest.raises(SandboxError, match="closed"):
            await session.run("true")
        async with box.python() as session:
            with anyio.move_on_after(0.5) as scope:
                await session.run(f"import subprocess; subprocess.run(['sh', '-c', 'sleep 1000; : {mark}'])")
            assert scope.cancelled_caught
            assert await running(box, mark) == 0
            assert "new Python session" in (await session.run("1")).stderr

    async def test_endless_output_ends_a_session_run(self, box: Sandbox) -> None:
        async with box.shell() as session:
            result = await session.run("yes", timeout=PATIENCE)
            assert result.limit == "output"
            assert (await session.run("echo on")).stdout == "on\n"

    # --- the whole --------------------------------------------------------------------------------------------------

    async def test_a_workspace_is_taken_and_put_back(self, host: Host, profile: SandboxProfile) -> None:
        async with made(host, profile) as sandbox:
            await sandbox.write("a/b/c", bytes(range(256)) * 1000, mode=0o750)
            await sandbox.write("empty", "")
            await sh(sandbox, "mkdir hollow; ln -s a/b link; ln -s /etc out; mkfifo pipe; ln a/b/c twin")
            snapshot = await sandbox.snapshot()
            assert snapshot.profile == profile.name
            assert snapshot.digest == hashlib.sha256(snapshot.data).hexdigest()
            with tarfile.open(fileobj=io.BytesIO(snapshot.data)) as tar:
                names = sorted(tar.getnames())
            assert names == ["a", "a/b", "a/b/c", "empty", "hollow", "link", "out", "twin"]
            assert snapshot.files == len(names)
            await sandbox.write("a/b/c", "other")
            await sandbox.write("later", "x")
            process = await sandbox.start(["sleep", "1000"], timeout=PATIENCE)
            await sandbox.restore(snapshot)
            assert await sandbox.read("a/b/c") == bytes(range(256)) * 1000
            assert (await sandbox.stat("a/b/c")).mode & 0o777 == 0o750
            assert await sandbox.read("link/c") == await sandbox.read("twin")
            paths = [each.path for each in (await sandbox.list()).entries]
            assert paths == ["a", "empty", "hollow", "link", "out", "twin"]
            with pytest.raises(SandboxError):
                await process.write(b"x")

    async def test_a_fork_is_another_sandbox_with_a_copy(self, host: Host, profile: SandboxProfile) -> None:
        async with made(host, profile) as sandbox:
            await sandbox.write("a", "1")
            other = await sandbox.fork()
            try:
                assert other.id != sandbox.id
                assert await other.read("a") == b"1"
                await other.write("a", "2")
                assert await sandbox.read("a") == b"1"
            finally:
                await other.aclose()
            assert await sandbox.read("a") == b"1"

    @pytest.mark.parametrize(
        "bad",
        [
            archive(("/etc/evil", b"x")),
            archive(("../evil", b"x")),
            archive(("a/../../evil", b"x")),
            archive(("dev", entry(tarfile.CHRTYPE))),
            archive(("pipe", entry(tarfile.FIFOTYPE))),
            archive(("hard", entry(tarfile.LNKTYPE, "/etc/passwd"))),
            archive(("d", entry(tarfile.SYMTYPE, "/etc")), ("d/evil", b"x")),
            Snapshot(b"no archive", "", 0, "python"),
            Snapshot(gzip.compress(bytes(1000))[:-200], "", 0, "python"),
        ],
        ids=["absolute", "up", "up within", "device", "pipe", "hard link", "through a link", "none", "cut"],
    )
    async def test_archives_that_lead_elsewhere_write_nothing_there(
        self, host: Host, box: Sandbox, bad: Snapshot
    ) -> None:
        with pytest.raises(SandboxError, match="cannot be restored"):
            await box.restore(bad)
        assert await sh(box, "ls -d /etc/evil ../evil 2>/dev/null || echo none") == "none\n"
        await box.restore(archive())

    async def test_links_of_an_archive_stay_as_they_were_and_lead_no_file_call_out(self, box: Sandbox) -> None:
        links = {"abs": "/etc", "up": "../..", "in": "real", "self": ".", "turn": "self/../x"}
        await box.restore(archive(("real", b"1"), *((name, entry(tarfile.SYMTYPE, to)) for name, to in links.items())))
        assert {each.path for each in (await box.list()).entries} == {"real", *links}
        assert await box.read("in") == b"1"
        for out in ("abs/passwd", "up/etc/passwd"):
            with pytest.raises(SandboxError):
                await box.read(out)
        await box.restore(archive())

    async def test_a_workspace_that_is_too_large_is_not_taken(self, host: Host, profile: SandboxProfile) -> None:
        from dataclasses import replace

        async with made(host, replace(profile, snapshot_limit=100_000)) as sandbox:
            await sh(sandbox, "head -c 3000000 /dev/urandom > noise")
            with pytest.raises(SandboxError, match="snapshot_limit"):
                await sandbox.snapshot()
            await sh(sandbox, "head -c 3000000 /dev/zero > noise")
            assert len((await sandbox.snapshot()).data) < 100_000

    async def test_a_paused_sandbox_does_nothing_until_it_goes_on(self, host: Host, profile: SandboxProfile) -> None:
        async with made(host, profile) as sandbox:
            ticks = "while :; do echo x >> ticks; sleep 0.01; done"
            process = await sandbox.start(["sh", "-c", ticks], timeout=PATIENCE)
            await until_there(sandbox, "ticks")
            await sandbox.pause()
            await sandbox.pause()
            assert [each.state for each in await host.found() if each.id == sandbox.id] == ["paused"]
            results: list[ExecResult] = []

            async def call() -> None:
                results.append(await sandbox.exec(["echo", "late"], timeout=5))

            async with anyio.create_task_group() as group:
                group.start_soon(call)
                await anyio.wait_all_tasks_blocked()
                assert results == []
                await sandbox.resume()
            assert results[0].stdout == "late\n"
            await sandbox.resume()
            await process.kill()
            assert [each.state for each in await host.found() if each.id == sandbox.id] == ["running"]

    async def test_who_attaches_to_a_paused_sandbox_lets_it_go_on(
        self, host: Host, profile: SandboxProfile, another_host: OpenHost
    ) -> None:
        async with made(host, profile) as sandbox:
            await sandbox.write("a", "1")
            await sandbox.detach()
            await host.pause(sandbox.id)
            async with another_host() as other:
                again = await other.attach(profile, sandbox.id)
                assert await again.read("a") == b"1"

    async def test_a_sandbox_is_removed_once(self, host: Host, profile: SandboxProfile) -> None:
        mark = new_id()
        async with made(host, profile) as sandbox:
            await sandbox.start(["sh", "-c", f"sleep 1000; : {mark}"], timeout=PATIENCE)
            assert [
                (each.state, each.profile, each.labels["test"]) for each in await host.found() if each.id == sandbox.id
            ] == [("running", profile.name, "conformance")]
            waiting = sandbox.exec(["sleep", "1000"], timeout=PATIENCE)
            async with anyio.create_task_group() as group:
                group.start_soon(_gone, waiting)
                await anyio.wait_all_tasks_blocked()
                await sandbox.aclose()
            await sandbox.aclose()
            for call in (sandbox.exec(["true"]), sandbox.read("a"), sandbox.snapshot(), sandbox.forget(["a"])):
                await _gone(call)
            assert sandbox.id not in [each.id for each in await host.found()]
            assert not await host.remove(sandbox.id)
            with pytest.raises(SandboxGone):
                await host.attach(profile, sandbox.id)

    async def test_a_sandbox_that_is_removed_from_outside_is_gone(self, host: Host, profile: SandboxProfile) -> None:
        async with made(host, profile) as sandbox:
            async with anyio.create_task_group() as group:
                group.start_soon(_gone, sandbox.exec(["sleep", "1000"], timeout=PATIENCE))
                await anyio.wait_all_tasks_blocked()
                assert await host.remove(sandbox.id)
            await _gone(sandbox.exec(["true"]))

    async def test_a_sandbox_that_was_never_there_is_gone(self, host: Host, profile: SandboxProfile) -> None:
        with pytest.raises(SandboxGone):
            await host.attach(profile, new_id())
        assert not await host.remove(new_id())

    async def test_fifty_calls_at_once(self, box: Sandbox) -> None:
        outputs: list[str] = []

        async def call(n: int) -> None:
            outputs.append((await box.exec(["sh", "-c", f"echo {n}"])).stdout.strip())

        async with anyio.create_task_group() as group:
            for n in range(50):
                group.start_soon(call, n)
        assert sorted(map(int, outputs)) == list(range(50))

    async def test_calls_that_are_cancelled_at_any_time_leave_nothing(self, box: Sandbox) -> None:
        mark = new_id()
        async with anyio.create_task_group() as group:
            for n in range(20):
                group.start_soon(_cancelled_after, n / 1000, box, mark)
        assert await running(box, mark) == 0
        assert await sh(box, "echo well") == "well\n"


async def _cancelled_after(seconds: float, box: Sandbox, mark: str) -> None:
    with anyio.move_on_after(seconds):
        await box.exec(["sh", "-c", f"sleep 1000; : {mark}"], timeout=PATIENCE)


async def _until_gone(sandbox: Sandbox, argv: list[str], call_id: str) -> None:
    with pytest.raises(SandboxGone):
        await sandbox.exec(argv, timeout=PATIENCE, call_id=call_id)


async def _gone(call: Any) -> None:
    with pytest.raises(SandboxGone):
        await call
