"""What every benchmark script shares: the sizes, the clock, the ledger, and the one line of JSON.

A script is called as `python SCRIPT CASE DIRECTORY [PHASE]` and prints one JSON object as its last line. Only the
standard library is imported here, so that no system pays for another's imports.
"""

from __future__ import annotations

import base64
import json
import os
import random
import resource
import signal
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

SCALE = float(os.environ.get("BENCH_SCALE", "1"))  # `run.py --quick` sets 0.1: a smoke test, not a measurement


def scaled(size: int) -> int:
    return max(2, int(size * SCALE))


SEQUENTIAL_STEPS = scaled(1000)
FLEET_RUNS, FLEET_STEPS, IN_FLIGHT = scaled(1000), 5, 100
HISTORY_STEPS = scaled(5000)
BYTES_STEPS, HISTORY_KB = scaled(100), 1024
# Crash cases: how many runs, and how many finished steps each has when the process is killed.
CRASH = {"recovery": (scaled(200), 3), "replay": (1, scaled(5000))}
PARALLEL_TOOLS = 20
TURNS = 100


def arguments() -> tuple[str, Path, str]:
    """CASE, DIRECTORY and PHASE (empty unless the script was started by `crash_and_resume`)."""
    case, directory, *phase = sys.argv[1:]
    return case, Path(directory), phase[0] if phase else ""


def cpu_seconds() -> float:
    """User and system time of this process, all its threads included."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Meter:
    """`with Meter() as meter:` around the measured section; then `.wall` and `.cpu` in seconds."""

    def __enter__(self) -> Meter:
        self._cpu, self._wall = cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._wall, cpu_seconds() - self._cpu


def report(system: str, case: str, meter: Meter, n: int, **extra: Any) -> None:
    row = {"system": system, "case": case, "wall_s": meter.wall, "cpu_s": meter.cpu, "n": n, **extra}
    print(json.dumps(row), flush=True)


# --- history -----------------------------------------------------------------------------------------------------


class StepClock:
    """`tick()` in the workflow's body after every step; compares steps early in one run with steps late in it.

    Medians of single steps: one stall of a shared disk must not decide.
    """

    def __init__(self) -> None:
        self.at: list[tuple[float, float]] = []

    def tick(self) -> None:
        self.at.append((time.perf_counter(), time.process_time()))

    def summary(self) -> dict[str, float]:
        width = max(2, HISTORY_STEPS // 25)  # 200 of 5000
        centre = HISTORY_STEPS // 50  # 100 of 5000
        early = self._window(max(1, centre - width // 2), width)
        late = self._window(len(self.at) - width, width)
        return {
            "early_ms": early[0],
            "late_ms": late[0],
            "late_over_early": late[0] / early[0],
            "early_cpu_ms": early[1],
            "late_cpu_ms": late[1],
            "late_over_early_cpu": late[1] / early[1],
        }

    def _window(self, start: int, width: int) -> tuple[float, float]:
        part = self.at[start : start + width]
        wall = statistics.median(b[0] - a[0] for a, b in pairwise(part))
        return wall * 1000, (part[-1][1] - part[0][1]) / (len(part) - 1) * 1000


# --- bytes -------------------------------------------------------------------------------------------------------


def kilobyte(i: int) -> str:
    """1 KB of text that no store can compress (constant text would flatter those that do)."""
    return base64.b64encode(random.Random(i).randbytes(768)).decode()


class ByteCounter:
    """Bytes that reach one SQLite database: growth of its files, and everything the process wrote meanwhile.

    `file` is the growth after a checkpoint: what the history costs for ever. `written` is what the process handed to
    the kernel (log, checkpoint and journal files; Linux only).
    """

    def __init__(self, database: Path) -> None:
        self.database = database
        self.start_file, self.start_written = self._file(), self._written()

    def per_step(self, steps: int) -> dict[str, float]:
        written = self._written()  # before our own checkpoint: that one is no work of the system
        return {
            "file_kb_per_step": (self._file() - self.start_file) / 1024 / steps,
            "written_kb_per_step": (written - self.start_written) / 1024 / steps,
        }

    def _file(self) -> int:
        with sqlite3.connect(self.database, timeout=30) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        connection.close()
        return sum(path.stat().st_size for path in self.database.parent.glob(self.database.name + "*"))

    @staticmethod
    def _written() -> int:
        try:
            lines = Path("/proc/self/io").read_text().splitlines()
        except OSError:
            return 0
        return int(next(line for line in lines if line.startswith("wchar")).split()[1])


# --- crash and resume --------------------------------------------------------------------------------------------


class Ledger:
    """An append-only file outside every store: which step bodies really ran, over all processes."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "ledger"
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def add(self, run: str, step: int) -> None:
        os.write(self._file, f"{run} {step}\n".encode())

    def repeats(self, finished: int) -> dict[str, int]:
        """How many bodies of finished steps, and of the interrupted one, ran more than once."""
        times = Counter(self.path.read_text().splitlines())
        again = [line for line, count in times.items() if count > 1]
        done = sum(1 for line in again if int(line.split()[1]) < finished)
        return {"finished_steps_repeated": done, "open_steps_repeated": len(again) - done}


class Survivors:
    """Counts, in the new process, the runs that reached the interrupted step and those whose body ended."""

    def __init__(self, runs: int, started: float) -> None:
        self.runs, self.started = runs, started
        self.all_ended = threading.Event()
        self._lock = threading.Lock()
        self._reached: list[float] = []
        self._ended: list[float] = []

    def reach(self) -> None:
        with self._lock:
            self._reached.append(time.perf_counter() - self.started)

    def end(self) -> None:
        with self._lock:
            self._ended.append(time.perf_counter() - self.started)
            if len(self._ended) == self.runs:
                self.all_ended.set()

    def summary(self) -> dict[str, float]:
        return {"first_s": self._reached[0], "all_continued_s": self._reached[-1], "all_ended_s": self._ended[-1]}


def crash_and_resume(script: str, case: str, directory: Path) -> None:
    """Starts the victim, kills it once every run is inside its open step, then starts the survivor.

    The survivor prints the JSON; its clock starts after its imports, just before it opens the store.
    """
    victim = subprocess.Popen(
        [sys.executable, script, case, str(directory), "victim"], stdout=subprocess.PIPE, text=True
    )
    assert victim.stdout is not None
    for line in victim.stdout:
        if line.strip() == "ready":
            break
    else:
        sys.exit(f"the victim ended before it was ready, with status {victim.wait()}")
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    subprocess.run([sys.executable, script, case, str(directory), "survivor"], check=True, timeout=300)


# --- agents ------------------------------------------------------------------------------------------------------


class Turns:
    """One sample a turn of an agent: wall and CPU milliseconds."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def start(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.wall.append((time.perf_counter() - self._wall) * 1000)
        self.cpu.append((time.process_time() - self._cpu) * 1000)

    def medians(self, name: str, last: int = 0) -> dict[str, float]:
        wall, cpu = self.wall[-last:], self.cpu[-last:]
        return {f"{name}_ms": statistics.median(wall), f"{name}_cpu_ms": statistics.median(cpu)}


Converse = Callable[[Any, str], Awaitable[Any]]
Begin = Callable[[str], Any]


async def agent_case(system: str, case: str, begin: Begin, turn: Converse) -> None:
    """The agent cases, the same for every framework.

    `begin(name)` gives the state of a new conversation, `await turn(state, text)` takes one turn and gives the next
    state. One turn is: user message, model asks for one tool (or 20), the tool answers at once, model answers.
    """
    for i in range(5):
        await turn(begin(f"warm-up-{i}"), "hello")
    with Meter() as meter:
        first, later = Turns(), Turns()
        for i in range(20):  # 20 new conversations: the cost of a first turn
            state = begin(f"new-{i}")
            first.start()
            await turn(state, "hello")
            first.stop()
        if case == "agent_tools":
            report_later = {}
        else:
            state = begin("long")
            for _ in range(TURNS):  # one long conversation: its last ten turns
                later.start()
                state = await turn(state, "hello")
                later.stop()
            report_later = later.medians(f"turn_{TURNS}", last=10)
            report_later["growth"] = report_later[f"turn_{TURNS}_ms"] / statistics.median(first.wall)
    report(system, case, meter, 20 + len(later.wall), **first.medians("turn_1"), **report_later)
