"""LangGraph with its SQLite checkpointer, durability="sync": a graph of one node that loops; a super-step is a step.

The synchronous API is measured: its async checkpointer was slower here in every case with many steps. With
BENCH_VARIANT=delta ("langgraph-delta") the conversation is kept in its beta `DeltaChannel`, which does not store the
whole list at every step.
"""

from __future__ import annotations

import operator
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Annotated, Any, TypedDict

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
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, StateGraph

DELTA = os.environ.get("BENCH_VARIANT") == "delta"
SYSTEM = "langgraph-delta" if DELTA else "langgraph"

clock = StepClock()
ran = count()  # bodies of `bump` that really ran
ledger: Ledger
entered = threading.Semaphore(0)  # one for each run of the victim that is inside its open step
survivors: Survivors | None = None
counter: ByteCounter


class Count(TypedDict):
    i: int
    n: int


def extend(messages: list[str], writes: list[list[str]]) -> list[str]:
    return [*messages, *(message for write in writes for message in write)]


class Conversation(Count):
    messages: Annotated[list[str], DeltaChannel(extend) if DELTA else operator.add]


class Crashing(Count):
    run: str


def bump(state: Count) -> dict[str, int]:
    next(ran)
    return {"i": state["i"] + 1}


def timed_bump(state: Count) -> dict[str, int]:
    clock.tick()
    return {"i": state["i"] + 1}


def answer(state: Conversation) -> dict[str, Any]:
    global counter
    if state["i"] == 0:  # the super-step that loads the 1 MB is not counted
        return {"messages": [kilobyte(i) for i in range(HISTORY_KB)], "i": 1}
    if state["i"] == 1:
        counter = ByteCounter(DATABASE)
    return {"messages": [kilobyte(-state["i"])], "i": state["i"] + 1}


def crash_step(state: Crashing) -> dict[str, int]:
    ledger.add(state["run"], state["i"])
    if state["i"] == state["n"] - 2:
        if survivors is not None:
            survivors.reach()
        else:
            entered.release()
            threading.Event().wait()  # the open step of the victim never ends
    return {"i": state["i"] + 1}


def loop(state: type, node: Any, saver: SqliteSaver) -> Any:
    graph = StateGraph(state)
    graph.add_node("node", node)
    graph.add_edge(START, "node")
    graph.add_conditional_edges("node", lambda s: "node" if s["i"] < s["n"] else END, ["node", END])
    return graph.compile(checkpointer=saver)


def run(graph: Any, state: Any, thread: str) -> None:
    config = {"configurable": {"thread_id": thread}, "recursion_limit": 100_000}
    graph.invoke(state, config, durability="sync")


def victim(runs: int, finished: int) -> None:
    with SqliteSaver.from_conn_string(str(DATABASE)) as saver, ThreadPoolExecutor(runs) as pool:
        graph = loop(Crashing, crash_step, saver)
        for i in range(runs):
            pool.submit(run, graph, {"run": f"run-{i}", "i": 0, "n": finished + 2}, f"run-{i}")
        for _ in range(runs):
            entered.acquire()
        print("ready", flush=True)


def survivor(runs: int, finished: int) -> None:
    global survivors
    with Meter() as meter:
        survivors = Survivors(runs, time.perf_counter())
        with SqliteSaver.from_conn_string(str(DATABASE)) as saver, ThreadPoolExecutor(IN_FLIGHT) as pool:
            graph = loop(Crashing, crash_step, saver)

            def again(i: int) -> None:
                run(graph, None, f"run-{i}")
                survivors.end()

            # Nothing continues by itself: the script has to know the thread ids and call each.
            list(pool.map(again, range(runs)))
    report(SYSTEM, case, meter, runs, **survivors.summary(), **ledger.repeats(finished))


def main() -> None:
    with SqliteSaver.from_conn_string(str(DATABASE)) as saver:
        graph = loop(Count, bump, saver)
        run(graph, {"i": 0, "n": 20}, "warm-up")
        if case == "sequential":
            with Meter() as meter:
                run(graph, {"i": 0, "n": SEQUENTIAL_STEPS}, "x")
            report(SYSTEM, case, meter, SEQUENTIAL_STEPS)
        elif case == "fleet":
            before = next(ran)
            with ThreadPoolExecutor(IN_FLIGHT) as pool, Meter() as meter:
                list(pool.map(lambda i: run(graph, {"i": 0, "n": FLEET_STEPS}, f"run-{i}"), range(FLEET_RUNS)))
            report(
                SYSTEM,
                case,
                meter,
                FLEET_RUNS * FLEET_STEPS,
                finished_steps_repeated=next(ran) - before - 1 - FLEET_RUNS * FLEET_STEPS,
            )
        elif case == "history":
            with Meter() as meter:
                run(loop(Count, timed_bump, saver), {"i": 0, "n": HISTORY_STEPS}, "x")
            report(SYSTEM, case, meter, HISTORY_STEPS, **clock.summary())
        elif case == "bytes":
            with Meter() as meter:
                run(loop(Conversation, answer, saver), {"messages": [], "i": 0, "n": BYTES_STEPS + 1}, "x")
            report(SYSTEM, case, meter, BYTES_STEPS, **counter.per_step(BYTES_STEPS))


if __name__ == "__main__":
    case, directory, phase = arguments()
    DATABASE = directory / "langgraph.sqlite"
    if case in CRASH and not phase:
        crash_and_resume(__file__, case, directory)
    elif case in CRASH:
        ledger = Ledger(directory)
        {"victim": victim, "survivor": survivor}[phase](*CRASH[case])
    else:
        main()
