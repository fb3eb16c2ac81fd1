"""ridethrough on its SQLite store, as shipped: WAL with synchronous=FULL, one `@step` a step."""

from __future__ import annotations

import asyncio
import time
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

from ridethrough import Runtime, step, workflow

SYSTEM = "ridethrough"

clock = StepClock()
ran = count()  # bodies of `bump` that really ran
ledger: Ledger
inside = 0
entered = asyncio.Event()  # set when every run of the victim is inside its open step
survivors: Survivors | None = None
counter: ByteCounter


@step()
async def bump(i: int) -> int:
    next(ran)
    return i + 1


@workflow(version="1")
async def sequence(n: int) -> int:
    i = 0
    while i < n:
        i = await bump(i)
    return i


@workflow(version="1")
async def long_history(n: int) -> int:
    i = 0
    while i < n:
        i = await bump(i)
        clock.tick()
    return i


@step()
async def load() -> list[str]:
    return [kilobyte(i) for i in range(HISTORY_KB)]


@step()
async def answer(history: list[str], i: int) -> str:
    return kilobyte(-i)


@workflow(version="1")
async def conversation(n: int) -> int:
    global counter
    history = await load()
    counter = ByteCounter(DATABASE)
    for i in range(1, n + 1):
        history.append(await answer(history, i))
    return len(history)


@step()
async def crash_step(run: str, i: int, finished: int) -> int:
    global inside
    ledger.add(run, i)
    if i == finished:
        if survivors is not None:
            survivors.reach()
        else:
            inside += 1
            if inside == CRASH[case][0]:
                entered.set()
            await asyncio.Event().wait()  # the open step of the victim never ends
    return i


@workflow(version="1")
async def crashing(run: str, finished: int) -> str:
    for i in range(finished + 2):  # the finished ones, the interrupted one, and one more
        await crash_step(run, i, finished)
    if survivors is not None:
        survivors.end()
    return run


async def victim(runs: int, finished: int) -> None:
    async with Runtime.open(f"sqlite:///{DATABASE}", concurrency=runs) as runtime:
        for i in range(runs):
            await runtime.start(crashing, f"run-{i}", finished, id=f"run-{i}")
        await entered.wait()
        print("ready", flush=True)
        await asyncio.Event().wait()


async def survivor(runs: int, finished: int) -> None:
    global survivors
    with Meter() as meter:
        survivors = Survivors(runs, time.perf_counter())
        async with Runtime.open(f"sqlite:///{DATABASE}", concurrency=runs):  # continues them by itself
            await asyncio.to_thread(survivors.all_ended.wait)
    report(SYSTEM, case, meter, runs, **survivors.summary(), **ledger.repeats(finished))


async def main() -> None:
    async with Runtime.open(f"sqlite:///{DATABASE}", concurrency=IN_FLIGHT) as runtime:
        await (await runtime.start(sequence, 20, id="warm-up")).result()
        if case == "sequential":
            with Meter() as meter:
                await (await runtime.start(sequence, SEQUENTIAL_STEPS, id="x")).result()
            report(SYSTEM, case, meter, SEQUENTIAL_STEPS)
        elif case == "fleet":
            before = next(ran)
            slots = asyncio.Semaphore(IN_FLIGHT)

            async def one(i: int) -> None:
                async with slots:
                    await (await runtime.start(sequence, FLEET_STEPS, id=f"run-{i}")).result()

            with Meter() as meter:
                await asyncio.gather(*(one(i) for i in range(FLEET_RUNS)))
            report(
                SYSTEM,
                case,
                meter,
                FLEET_RUNS * FLEET_STEPS,
                finished_steps_repeated=next(ran) - before - 1 - FLEET_RUNS * FLEET_STEPS,
            )
        elif case == "history":
            with Meter() as meter:
                await (await runtime.start(long_history, HISTORY_STEPS, id="x")).result()
            report(SYSTEM, case, meter, HISTORY_STEPS, **clock.summary())
        elif case == "bytes":
            with Meter() as meter:
                await (await runtime.start(conversation, BYTES_STEPS, id="x")).result()
            report(SYSTEM, case, meter, BYTES_STEPS, **counter.per_step(BYTES_STEPS))


if __name__ == "__main__":
    case, directory, phase = arguments()
    DATABASE = directory / "ridethrough.sqlite"
    if case in CRASH and not phase:
        crash_and_resume(__file__, case, directory)
    elif case in CRASH:
        ledger = Ledger(directory)
        asyncio.run({"victim": victim, "survivor": survivor}[phase](*CRASH[case]))
    else:
        asyncio.run(main())
