"""The database cannot be written or read: the error says what to do, nothing is lost, the run goes on later."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from ridethrough import Runtime, StoreError, StoreVersionError, step, wait_for, workflow
from ridethrough.runtime import sqlite
from ridethrough.runtime.config import Config
from ridethrough.runtime.store import Store

pytestmark = pytest.mark.anyio

calls: list[Any] = []


@pytest.fixture(autouse=True)
def no_calls() -> None:
    """Count from nothing."""
    calls.clear()


@step
async def first() -> str:
    """A step before the fault."""
    calls.append("first")
    return "a"


@step
async def second(size: int) -> str:
    """A step whose result the fault hits."""
    calls.append("second")
    return os.urandom(size // 2).hex()


@workflow
async def two(size: int) -> int:
    """A step, a signal, a step."""
    await first()
    await wait_for("go")
    return len(await second(size))


async def prepare(url: str, size: int = 10) -> None:
    """A database with a run whose first step is recorded."""
    async with Runtime.open(url, config=Config(), grace=0.0) as runtime:
        run = await runtime.start(two, size, id="r")
        with anyio.fail_after(20):
            while run.status != "waiting":  # noqa: ASYNC110
                await anyio.sleep(0.005)


async def mend(url: str, result: int = 10) -> None:
    """Once the fault is gone, the run ends, and the step before it was not repeated."""
    async with Runtime.open(url, config=Config(), grace=0.0) as runtime:
        run = await runtime.get("r")
        if run.status == "waiting":
            await runtime.signal("r", "go", None)
        with anyio.fail_after(20):
            assert await run.result() == result
        assert await runtime.store.read(runtime.store.dangling) == []
        assert runtime.store.database.check() == []
    assert calls.count("first") == 1


def file_of(url: str) -> Path:
    """The database's file."""
    return Path(url.removeprefix("sqlite:///"))


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Generator[Path]:
    """A file system of its own, if we may mount one."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "ridethrough-test", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system takes privileges that this user does not have")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(filler: Path) -> None:
    """Leave no space."""
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 1024):
            pass


async def test_full_disk(tmp_path: Path) -> None:
    """The waiting caller is told; nothing of the step that did not fit is written; with space the run goes on."""
    with small_disk(tmp_path, 1500) as disk:
        url = f"sqlite:///{disk / 'runs.db'}"
        await prepare(url, 100_000)
        filler = disk / "filler"
        async with Runtime.open(url, config=Config(), grace=0.0) as runtime:
            run = await runtime.get("r")
            fill(filler)

            async def make_noise() -> None:
                while True:  # the log has some room of its own
                    await runtime.signal("r", "noise", "x" * 20_000)

            with pytest.raises(StoreError, match=r"disk is full.*Free some space"):
                await make_noise()
            assert run.status == "waiting"
            filler.unlink()
            await runtime.signal("r", "go", None)
            assert await run.result() == 100_000
        assert calls == ["first", "second"]


async def test_opening_on_a_full_disk(tmp_path: Path) -> None:
    """The error comes out as it is, and no thread is left."""
    with small_disk(tmp_path, 700) as disk:
        url = f"sqlite:///{disk / 'runs.db'}"
        await prepare(url)
        filler = disk / "filler"
        fill(filler)
        before = set(threading.enumerate())
        with pytest.raises(StoreError, match=r"disk is full|disk failed|cannot be opened"):
            async with Runtime.open(url, config=Config(), grace=0.0):
                pass
        assert [item.name for item in threading.enumerate() if item not in before and "ridethrough" in item.name] == []
        filler.unlink()
        await mend(url)


async def test_full_disk_in_a_step(tmp_path: Path) -> None:
    """The step was executed and cannot be recorded: whoever waits is told, and on resume it is executed again."""
    with small_disk(tmp_path, 1500) as disk:
        url = f"sqlite:///{disk / 'runs.db'}"
        await prepare(url, 1_800_000)
        async with Runtime.open(url, config=Config(), grace=0.0) as runtime:
            await runtime.signal("r", "go", None)
            with anyio.fail_after(20), pytest.raises(StoreError, match="disk is full"):
                await (await runtime.get("r")).result()
            steps = (await runtime.describe("r")).steps or []
            assert [item.path for item in steps] == ["first#1", "go#1"]
        await anyio.run_process(["mount", "-o", "remount,size=30000k", str(disk)])
        await mend(url, 1_800_000)


def test_file_size_limit(tmp_path: Path) -> None:
    """What a full disk looks like without any privileges: the kernel refuses to let the log grow."""
    script = textwrap.dedent(
        """
        import resource, signal, sys
        import anyio
        from ridethrough import Runtime, StoreError, step, workflow
        from ridethrough.runtime.config import Config

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        @step
        async def large(number: int) -> str:
            print("step", number, flush=True)
            return "x" * 60_000

        @workflow
        async def growing() -> int:
            for number in range(20):
                await large(number)
            return 20

        async def main(limited: bool) -> None:
            async with Runtime.open(sys.argv[1], config=Config(), grace=0.0) as runtime:
                if limited:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY))
                run = await runtime.start(growing, id="r")
                try:
                    print("result", await run.result())
                except StoreError as error:
                    print("error", error)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        anyio.run(main, sys.argv[2] == "limited")
        """
    )
    file = tmp_path / "program.py"
    file.write_text(script)
    url = f"sqlite:///{tmp_path / 'runs.db'}"

    def run(how: str) -> list[str]:
        done = subprocess.run([sys.executable, str(file), url, how], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    limited = run("limited")
    assert "error database" in limited[-1]
    free = run("free")
    assert free[-1] == "result 20"
    executed = [line for line in (*limited, *free) if line.startswith("step")]
    assert len(executed) == len(set(executed)) + 1, "only the step that could not be recorded was executed again"


@contextmanager
def read_only(path: Path) -> Generator[None]:
    """The file's folder cannot be written by us, by whatever means this user has."""
    if os.geteuid():
        path.parent.chmod(0o555)
        path.chmod(0o444)
        try:
            yield
        finally:
            path.parent.chmod(0o755)
            path.chmod(0o644)
        return
    bind = ["mount", "--bind", str(path.parent), str(path.parent)]
    if subprocess.run(bind, capture_output=True, check=False).returncode:
        pytest.skip("root can write everywhere, and this one may not mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(path.parent)], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(path.parent)], check=True)


def test_read_only(tmp_path: Path) -> None:
    """Said on opening, before anything is begun."""
    folder = tmp_path / "data"
    folder.mkdir()
    url = f"sqlite:///{folder / 'runs.db'}"
    anyio.run(prepare, url)
    with read_only(folder / "runs.db"):
        with pytest.raises(StoreError, match=r"read-only|cannot be opened"):
            Store(url).prepare()
        with pytest.raises(StoreError, match=r"read-only|cannot be opened"):
            anyio.run(mend, url)
    anyio.run(mend, url)


async def test_locked_by_another_process(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than we wait: an error that says so; afterwards everything is as it was."""
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.05)
    await prepare(url)
    async with Runtime.open(url, config=Config(), grace=0.0) as runtime:
        with closing(sqlite3.connect(file_of(url), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match=r"another process has held its lock"):
                await runtime.signal("r", "go", None)
            other.execute("ROLLBACK")
        assert (await runtime.get("r")).status == "waiting"
    await mend(url)


async def test_locked_while_a_step_ends(url: str, monkeypatch: pytest.MonkeyPatch, eventually: Any) -> None:
    """Whoever waits is told; when the lock is gone, the worker takes the run up again by itself."""
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.05)
    entered, gate = anyio.Event(), anyio.Event()

    @step
    async def gated() -> int:
        calls.append("gated")
        entered.set()
        await gate.wait()
        return 1

    @workflow
    async def working() -> int:
        await first()
        return await gated()

    async with Runtime.open(url, config=Config(), grace=0.0) as runtime:
        run = await runtime.start(working)
        await entered.wait()
        with closing(sqlite3.connect(file_of(url), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            gate.set()
            with anyio.fail_after(20), pytest.raises(StoreError, match="lock"):
                await run.result()
            other.execute("ROLLBACK")
        with anyio.fail_after(20):
            assert await run.result() == 1
    assert calls == ["first", "gated", "gated"]


async def test_truncated_log(url: str, tmp_path: Path) -> None:
    """A copy of the files as a power loss may leave them: what is torn is dropped, what is whole is kept."""
    gate, entered = anyio.Event(), anyio.Event()

    @step
    async def numbered(number: int) -> int:
        calls.append(number)
        if number == 30:
            entered.set()
            await gate.wait()
        return number

    @workflow
    async def counting() -> int:
        return sum([await numbered(number) for number in range(31)])

    async with Runtime.open(url, config=Config(), grace=0.0) as runtime:
        await runtime.start(counting, id="r")
        await entered.wait()
        log = file_of(url).with_name("runs.db-wal")
        size = log.stat().st_size
        copies: list[tuple[str, int]] = []
        for part in (0.0, 0.3, 0.6, 0.99):
            copy = tmp_path / f"copy-{part}.db"
            shutil.copy(file_of(url), copy)
            data = log.read_bytes()[: int(size * part)]
            copy.with_name(copy.name + "-wal").write_bytes(data)
            copies.append((f"sqlite:///{copy}", len(data)))
    gate.set()
    for copy_url, left in copies:
        calls.clear()
        with suppress(sqlite3.OperationalError):  # the copied worker is alive: it is this process
            change(copy_url, "UPDATE workers SET expires_at = 0")
        async with Runtime.open(copy_url, config=Config(), grace=0.0) as runtime:
            assert runtime.store.database.check() == []
            run = await runtime.start(counting, id="r")
            with anyio.fail_after(20):
                assert await run.result() == sum(range(31))
        assert calls == list(range(calls[0], 31)), left


@pytest.mark.parametrize("content", [b"this is no database" * 1000, b"SQLite format 3\0" + os.urandom(8192)])
async def test_garbage(url: str, content: bytes) -> None:
    """Refused, and left as it is."""
    file_of(url).write_bytes(content)
    with pytest.raises(StoreError, match=r"not an SQLite database|damaged"):
        Store(url).prepare()
    assert file_of(url).read_bytes() == content


def change(url: str, *statements: str) -> None:
    """Spoil a database."""
    with closing(sqlite3.connect(file_of(url), isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


async def test_newer_schema(url: str) -> None:
    """Left alone, until the version that knows it."""
    await prepare(url)
    with closing(sqlite3.connect(file_of(url))) as connection:
        [(known,)] = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    change(url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreVersionError, match=r"9999.*Install the newer"):
        Store(url).prepare()
    change(url, f"UPDATE alembic_version SET version_num = '{known}'")
    await mend(url)


async def test_older_schema(url: str) -> None:
    """The message names the command."""
    await prepare(url)
    change(url, "UPDATE alembic_version SET version_num = '0000'")
    with pytest.raises(StoreVersionError, match="ridethrough db upgrade"):
        Store(url).prepare()


@pytest.mark.parametrize("table", ["steps", "waits", "workers", "payloads"])
async def test_missing_table(url: str, table: str) -> None:
    """Found on opening, not in the middle of a run."""
    await prepare(url)
    change(url, f"DROP TABLE {table}")
    with pytest.raises(StoreError, match=f"{table} are missing"):
        Store(url).prepare()


async def test_tables_of_another_program(url: str) -> None:
    """Nothing is added to a database that is not ours."""
    change(url, "CREATE TABLE runs (distance REAL)")
    with pytest.raises(StoreVersionError, match="another program"):
        Store(url).prepare()


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
async def test_impossible_paths(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """The path is a folder, or lies below a file."""
    make(tmp_path / "here")
    inside = tmp_path / "here" / "runs.db" if make is Path.touch else tmp_path / "here"
    with pytest.raises(StoreError, match=str(tmp_path / "here")):
        Store(f"sqlite:///{inside}").prepare()


async def test_a_large_value_that_is_gone(url: str) -> None:
    """Who needs it is told; the run is not failed for it."""
    await prepare(url, 200_000)
    async with Runtime.open(url, config=Config(), grace=0.0) as runtime:
        await runtime.signal("r", "go", None)
        assert await (await runtime.get("r")).result() == 200_000
        await runtime.worker.journal.do(
            lambda connection: (
                connection.exec_driver_sql(
                    "UPDATE runs SET status = 'queued', wake_at = 1.0, result = NULL, result_ref = NULL"
                )
                and None
            )
        )
        change(url, "DELETE FROM payloads")
        runtime.worker.poke()
        with anyio.fail_after(20), pytest.raises(StoreError, match="is missing"):
            await (await runtime.get("r")).result()
        problems = await runtime.store.read(runtime.store.dangling)
        assert any("second#1" in problem for problem in problems)
