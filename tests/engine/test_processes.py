"""Two processes and one run: the one that lost it writes nothing, and the other needs nobody to tell it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from ridethrough import NotFound, RunBusy
from ridethrough.runtime.lease import process_start
from ridethrough.runtime.testing import Ledger

pytestmark = [pytest.mark.anyio, pytest.mark.processes]

PROGRAM = """
import logging, os, sys
from pathlib import Path
import anyio
from ridethrough import Runtime, step, workflow
from ridethrough.runtime.config import Config
from ridethrough.runtime.testing import Ledger

logging.basicConfig(level=logging.WARNING)
config = Config(lease_seconds=float(os.environ.get("LEASE", "5")))
ledger = Ledger(Path(sys.argv[2]))


@step
async def work(number: int) -> int:
    with ledger.effect("step", "r", str(number)):
        await anyio.sleep(float(os.environ.get("NAP", "0")))
    return os.getpid()


@workflow
async def steps(count: int) -> list[int]:
    return [await work(number) for number in range(count)]


async def main() -> None:
    async with Runtime.open(sys.argv[1], config=config, grace=0.0) as runtime:
        run = await runtime.start(steps, int(sys.argv[3]), id="r")
        with anyio.fail_after(30):
            print("result", len(set(await run.result())), flush=True)


if __name__ == "__main__":
    anyio.run(main)
"""


@pytest.fixture
def anyio_backend() -> str:
    """The processes under test are others; this one only looks."""
    return "asyncio"


@pytest.fixture
def program(tmp_path: Path, url: str) -> Callable[..., Any]:
    """Starts the program in a process of its own."""
    file = tmp_path / "program.py"
    file.write_text(textwrap.dedent(PROGRAM))

    @contextmanager
    def start(count: int = 5, **environment: str) -> Generator[subprocess.Popen[str]]:
        command = [sys.executable, str(file), url, str(tmp_path / "ledger"), str(count)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    return start


def state(process: subprocess.Popen[str]) -> str:
    """R, S, T (stopped), Z, or nothing when it is gone."""
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


async def until(question: Callable[[], bool]) -> None:
    """Wait for something outside of this process."""
    with anyio.fail_after(30):
        while not question():  # noqa: ASYNC110 - other processes set no event
            await anyio.sleep(0.01)


@pytest.mark.parametrize("point", ["step.after_call:3", "journal.before_commit:5", "step.before_call:3"])
async def test_stopped_past_its_lease(program: Any, open_runtime: Any, tmp_path: Path, point: str) -> None:
    """A process is stopped, loses its run, and goes on: what it then tries to write is refused.

    Stopped inside a transaction it holds the database's lock, which nobody can take from it; the other process then
    waits until it goes on.
    """
    with program(5, LEASE="0.5", RIDETHROUGH_KILL_AT=f"{point}:STOP") as first:
        await until(lambda: state(first) == "T")
        holds_the_lock = point.startswith("journal")
        with program(5, LEASE="0.5") as second:
            if holds_the_lock:
                first.send_signal(signal.SIGCONT)
            await until(lambda: second.poll() is not None)
            out, err = second.communicate()
            assert out.startswith("result"), err
        if not holds_the_lock:
            first.send_signal(signal.SIGCONT)
        await until(lambda: first.poll() is not None)
        out, err = first.communicate()
        assert out.startswith("result"), err
        if not holds_the_lock:
            assert "has written nothing" in err
    async with open_runtime(serve=False) as runtime:
        view = await runtime.describe("r")
        by = [step.output for step in view.steps]
        assert len(view.steps) == 5
        assert by == sorted(by, key=lambda pid: pid != first.pid), "nothing of the first after the second began"
        assert view.status == "done"
        assert await runtime.store.read(runtime.store.dangling) == []
    starts = [entry for entry in Ledger(tmp_path / "ledger").read() if entry["kind"] == "start"]
    committed = [str(index) for index, pid in enumerate(by) if pid == first.pid]
    assert [entry["call"] for entry in starts if entry["pid"] != first.pid and entry["call"] in committed] == []


async def test_killed_and_taken_over_at_once(program: Any, open_runtime: Any, tmp_path: Path) -> None:
    """On one machine nobody waits for a lease: the process is seen to be gone."""
    with program(5, RIDETHROUGH_KILL_AT="step.after_call:3") as first:
        await until(lambda: first.poll() is not None)
        assert first.returncode == -signal.SIGKILL
    with program(5) as second:
        await until(lambda: second.poll() is not None)
        out, err = second.communicate()
        assert out.startswith("result 2"), err
    calls = [entry["call"] for entry in Ledger(tmp_path / "ledger").read() if entry["kind"] == "start"]
    assert calls == ["0", "1", "2", "2", "3", "4"]


async def test_two_at_once(program: Any, open_runtime: Any, tmp_path: Path) -> None:
    """One does it, the other waits for the same result and can say who has it."""
    with program(4, NAP="0.3") as first:
        ledger = Ledger(tmp_path / "ledger")
        await until(lambda: bool(ledger.read()))
        with program(4) as second:
            async with open_runtime() as runtime:
                with pytest.raises(RunBusy, match=f"process {first.pid} "):
                    await runtime.resume("r")
            await until(lambda: second.poll() is not None and first.poll() is not None)
            assert first.communicate()[0] == second.communicate()[0] == "result 1\n"
    assert {entry["pid"] for entry in ledger.read()} == {first.pid}


async def test_resumed_in_a_process_that_must_import_it(program: Any, open_runtime: Any, tmp_path: Path) -> None:
    """The run knows where its workflow comes from; if that is gone, the error says so and nothing is lost."""
    with program(5, RIDETHROUGH_KILL_AT="step.after_call:3") as first:
        await until(lambda: first.poll() is not None)
    file = tmp_path / "program.py"
    moved = file.rename(tmp_path / "moved.py")
    async with open_runtime() as runtime:
        with pytest.raises(NotFound, match=r"program\.py"):
            await runtime.resume("r")
    file.write_text("raise ImportError('broken on purpose')")
    async with open_runtime() as runtime:
        with pytest.raises(NotFound, match="broken on purpose"):
            await runtime.resume("r")
        assert (await runtime.get("r")).status == "running"
    moved.rename(file)
    with program(5) as second:
        await until(lambda: second.poll() is not None)
        assert second.communicate()[0].startswith("result 2")


def test_a_zombie_is_gone() -> None:
    """A killed process whose parent has not looked yet holds nothing."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert process_start(child) is None
        assert process_start(os.getpid()) is not None
    finally:
        os.waitpid(child, 0)
