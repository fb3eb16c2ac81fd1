"""DBOS Transact on its SQLite store: one `@DBOS.step` a step, in its synchronous API.

DBOS also has an async API; it was slower here in the cases with many steps (it hops to a thread for each access to the
store), so the faster one is measured. As shipped, DBOS leaves SQLite in rollback-journal mode; with BENCH_VARIANT=wal
("dbos-wal") the file is put into WAL mode beforehand, the best a user can do without touching its code.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from _measure import (
    BYTES_STEPS,
    CRASH,
    FLEET_RUNS,
    FLEET_STEPS,
    HISTORY_KB,
    HISTORY_STEPS,
    IN_FLIGHT,
    SEQUENTIAL_STEPS,
    ByteCounter,
    Ledger,
    Meter,
    StepClock,
    Survivors,
    arguments,
    crash_and_resume,
    kilobyte,
    report,
)
from dbos import DBOS, SetWorkflowID

WAL = os.environ.get("BENCH_VARIANT") == "wal"
SYSTEM = "dbos-wal" if WAL else "dbos"

clock = StepClock()
ran = count()  # bodies of `bump` that really ran
ledger: Ledger
entered = threading.Semaphore(0)  # one for each run of the victim that is inside its open step
survivors: Survivors | None = None
counter: ByteCounter


@DBOS.step()
def bump(i: int) -> int:
    next(ran)
    return i + 1


@DBOS.workflow()
def sequence(n: int) -> int:
    i = 0
    while i < n:
        i = bump(i)
    return i


@DBOS.workflow()
def long_history(n: int) -> int:
    i = 0
    while i < n:
        i = bump(i)
        clock.tick()
    return i


@DBOS.step()
def load() -> list[str]:
    return [kilobyte(i) for i in range(HISTORY_KB)]


@DBOS.step()
def answer(history: list[str], i: int) -> str:
    return kilobyte(-i)


@DBOS.workflow()
def conversation(n: int) -> int:
    global counter
    history = load()
    counter = ByteCounter(DATABASE)
    for i in range(1, n + 1):
        history.append(answer(history, i))  # DBOS records outputs only: this is its best way of doing it
    return len(history)


@DBOS.step()
def crash_step(run: str, i: int, finished: int) -> int:
    ledger.add(run, i)
    if i == finished:
        if survivors is not None:
            survivors.reach()
        else:
            entered.release()
            threading.Event().wait()  # the open step of the victim never ends
    return i


@DBOS.workflow()
def crashing(run: str, finished: int) -> str:
    for i in range(finished + 2):  # the finished ones, the interrupted one, and one more
        crash_step(run, i, finished)
    if survivors is not None:
        survivors.end()
    return run


def launch() -> None:
    if WAL:
        with sqlite3.connect(DATABASE) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        connection.close()
    DBOS(
        config={
            "name": "bench",
            "system_database_url": f"sqlite:///{DATABASE}",
            "log_level": "ERROR",
            "max_executor_threads": 256,  # all runs of the crash case are inside a step at once
        }
    )
    DBOS.launch()


def victim(runs: int, finished: int) -> None:
    launch()
    for i in range(runs):
        with SetWorkflowID(f"run-{i}"):
            DBOS.start_workflow(crashing, f"run-{i}", finished)
    for _ in range(runs):
        entered.acquire()
    print("ready", flush=True)
    threading.Event().wait()


def survivor(runs: int, finished: int) -> None:
    global survivors
    with Meter() as meter:
        survivors = Survivors(runs, time.perf_counter())
        launch()  # recovers the runs of its own executor id by itself
        survivors.all_ended.wait()
    report(SYSTEM, case, meter, runs, **survivors.summary(), **ledger.repeats(finished))


def main() -> None:
    launch()
    sequence(20)  # warm-up
    if case == "sequential":
        with Meter() as meter:
            sequence(SEQUENTIAL_STEPS)
        report(SYSTEM, case, meter, SEQUENTIAL_STEPS)
    elif case == "fleet":
        before = next(ran)
        with ThreadPoolExecutor(IN_FLIGHT) as pool, Meter() as meter:
            list(pool.map(sequence, [FLEET_STEPS] * FLEET_RUNS))
        report(
            SYSTEM,
            case,
            meter,
            FLEET_RUNS * FLEET_STEPS,
            finished_steps_repeated=next(ran) - before - 1 - FLEET_RUNS * FLEET_STEPS,
        )
    elif case == "history":
        with Meter() as meter:
            long_history(HISTORY_STEPS)
        report(SYSTEM, case, meter, HISTORY_STEPS, **clock.summary())
    elif case == "bytes":
        with Meter() as meter:
            conversation(BYTES_STEPS)
        report(SYSTEM, case, meter, BYTES_STEPS, **counter.per_step(BYTES_STEPS))


if __name__ == "__main__":
    case, directory, phase = arguments()
    DATABASE = directory / "dbos.sqlite"
    if case in CRASH and not phase:
        crash_and_resume(__file__, case, directory)
    elif case in CRASH:
        ledger = Ledger(directory)
        {"victim": victim, "survivor": survivor}[phase](*CRASH[case])
    else:
        main()
    os._exit(0)  # its poller threads need up to a second each to stop; they are not measured
