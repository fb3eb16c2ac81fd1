"""Runs the benchmarks: ridethrough beside other systems, interleaved in one run on one file system.

    python benchmarks/run.py [--rounds 3] [--only CASE ...] [--dir DIR] [--quick] [--write]

Run it with the Python that has ridethrough installed; the others are taken from benchmarks/.venv. Every round runs
every system of a case once, one after the other, each in a process and a directory of its own, so that a noisy
machine is equally noisy for all. Figures are medians over the rounds; ratios are medians of the ratios in a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PEERS = HERE / ".venv" / "bin" / "python"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
Row = dict[str, Any]


@dataclass(frozen=True)
class System:
    name: str
    script: str
    variant: str = ""

    @property
    def python(self) -> str:
        return sys.executable if self.name.startswith(("ridethrough", "python")) else str(PEERS)


@dataclass(frozen=True)
class Column:
    title: str
    value: Callable[[Row], float | None]
    form: str = ".2f"
    over: Callable[[list[float]], float] = statistics.median
    """How the rounds become one figure. What must never happen is shown by its worst round: a median would hide it."""


@dataclass(frozen=True)
class Case:
    name: str
    title: str
    systems: tuple[System, ...]
    columns: tuple[Column, ...]
    ratio: Column | None = None
    """What the last column compares: this figure of the system over ridethrough's, in the same round."""
    above: tuple[Column, System] | None = None
    """What the last but one subtracts: this figure less that of another system, in the same round."""


OURS, DBOS, DBOS_WAL = (
    System("ridethrough", "ours_engine.py"),
    System("dbos", "dbos_engine.py"),
    System("dbos-wal", "dbos_engine.py", "wal"),
)
GRAPH, DELTA = System("langgraph", "langgraph_engine.py"), System("langgraph-delta", "langgraph_engine.py", "delta")
FLOOR = System("sqlite3 alone", "sqlite_floor.py")
AGENTS = (
    System("ridethrough", "ours_agent.py"),
    System("openai-agents", "openai_agents.py"),
    System("pydantic-ai", "pydantic_ai_agent.py"),
    System("langgraph", "langgraph_agent.py"),
)
TRANSPORT = System("ridethrough, transport alone", "ours_router.py", "transport")
ROUTERS = (
    System("ridethrough", "ours_router.py"),
    System("litellm", "litellm_router.py"),
    System("pydantic-ai", "pydantic_ai_router.py"),
)
OURS_BOX, DOCKER = System("ridethrough", "ours_sandbox.py"), System("docker-py", "docker_py_sandbox.py")
IMPORTS = (
    "ridethrough",
    "ridethrough, Runtime and Agent",
    "ridethrough --help",
    "dbos",
    "langgraph",
    "openai-agents",
    "pydantic-ai",
)


def given(key: str, title: str, form: str = ".2f") -> Column:
    return Column(title, lambda row: row.get(key), form)


WALL = Column("wall s", lambda row: row["wall_s"])
RATE = Column("steps/s", lambda row: row["n"] / row["wall_s"], ",.0f")
CPU = Column("CPU ms/step", lambda row: row["cpu_s"] / row["n"] * 1000, ".3f")
CPU_MS = Column("CPU ms", lambda row: row["cpu_s"] * 1000, ".0f")
REPEATED = Column("steps run again (worst round)", lambda row: row.get("finished_steps_repeated"), ".0f", max)
TURN = (given("turn_1_ms", "turn 1, ms"), given("turn_1_cpu_ms", "CPU ms"))
TURN_100 = (given("turn_100_ms", "turn 100, ms"), given("turn_100_cpu_ms", "CPU ms"), given("growth", "growth"))
CALL_CPU = tuple(given(f"cpu_ms_{n}", f"CPU ms, {n} at once", ".3f") for n in (1, 25, 100, 200))
TROUBLE = (
    given("done", "calls done in it", ".0f"),
    Column("lost (worst round)", lambda row: row["lost"], ".0f", max),
    given("p50_s", "p50 s"),
    given("p99_s", "p99 s"),
    given("longest_s", "longest s"),
    given("wasted", "wasted on A", ".0f"),
    given("attempts_in_trouble", "attempts", ".0f"),
    given("peak", "peak after, times before", ".1f"),
    given("returned_s", "s to 80 % of A's share", ".1f"),
)

CASES = (
    Case(
        "sequential",
        "One run of 1000 steps, one after the other",
        (OURS, DBOS, DBOS_WAL, GRAPH, FLOOR),
        (WALL, RATE, CPU),
        WALL,
    ),
    Case(
        "fleet",
        "1000 runs of 5 steps, 100 in flight",
        (OURS, DBOS, DBOS_WAL, GRAPH, FLOOR),
        (WALL, RATE, CPU, REPEATED),
        WALL,
    ),
    Case(
        "history",
        "A step at history 5000 against one at history 100",
        (OURS, DBOS, GRAPH),
        (
            given("early_ms", "ms at 100"),
            given("late_ms", "ms at 5000"),
            given("late_over_early", "5000 over 100"),
            given("late_over_early_cpu", "the same in CPU"),
        ),
    ),
    Case(
        "replay",
        "SIGKILL inside step 5001: a new process until that step runs again",
        (OURS, DBOS, GRAPH),
        (given("first_s", "s to the first new step", ".3f"), CPU_MS, REPEATED),
        given("first_s", ""),
    ),
    Case(
        "bytes",
        "A 1 MB conversation growing by 1 KB a step",
        (OURS, DBOS, GRAPH, DELTA),
        (given("file_kb_per_step", "KB kept a step"), given("written_kb_per_step", "KB written a step"), CPU),
        given("file_kb_per_step", ""),
    ),
    Case(
        "recovery",
        "SIGKILL with 200 runs inside their 4th step: a new process until all have continued, and ended",
        (OURS, DBOS, DBOS_WAL, GRAPH),
        (given("all_continued_s", "s, all continued"), given("all_ended_s", "s, all ended"), CPU_MS, REPEATED),
        given("all_ended_s", ""),
    ),
    Case(
        "router_overhead",
        "One model call through a router, two deployments, the provider in another process",
        (*ROUTERS, TRANSPORT, System("httpx2 alone", "httpx2_alone.py")),
        (
            *CALL_CPU,
            given("p50_ms_1", "p50 ms, 1 at once"),
            given("p50_ms_100", "p50 ms, 100 at once", ".0f"),
            given("p99_ms_100", "p99 ms", ".0f"),
            given("rate_200", "calls/s, 200 at once", ",.0f"),
        ),
        CALL_CPU[2],
        (CALL_CPU[2], TRANSPORT),
    ),
    Case(
        "router_brownout",
        "50 agents; for 20 s A answers half its calls with 503 and the rest after 30 s; B is well",
        ROUTERS,
        TROUBLE,
    ),
    Case("router_outage", "50 agents; for 15 s A and B answer every call with 503", ROUTERS, TROUBLE),
    Case(
        "waking",
        "10,000 agents that wait for a model are parked, left alone, woken and done, at most 200 at once",
        (System("ridethrough", "ours_waking.py"),),
        (
            given("cpu_ms_to_park", "CPU ms to fail and park"),
            given("cpu_percent_parked", "CPU %, all parked", ".1f"),
            given("cpu_ms_woken_and_done", "CPU ms, woken and done"),
            given("cpu_ms_fresh", "CPU ms of a fresh run"),
            given("cpu_ms_to_wake", "CPU ms to wake"),
        ),
    ),
    Case(
        "sandbox_calls",
        "Calls in a warm container of one image: `true`, `python3 -c 1`, and 50 of the latter at once",
        (OURS_BOX, DOCKER, System("llm-sandbox", "llm_sandbox_calls.py"), System("swe-rex", "swe_rex_calls.py")),
        (
            given("true_ms", "true, p50 ms"),
            given("true_p99_ms", "p99 ms"),
            given("python_ms", "python -c, p50 ms", ".1f"),
            given("over_itself", "over the interpreter's own start"),
            given("parallel_rate", "python -c/s, 50 at once", ".0f"),
            Column("CPU ms/call", lambda row: row["cpu_s"] / row["n"] * 1000, ".2f"),
        ),
        given("true_ms", ""),
    ),
    Case(
        "sandbox_starts",
        "A container that takes calls: new, and from the warm ones (docker-py: create and start only)",
        (OURS_BOX, DOCKER),
        (given("cold_ms", "new, ms", ".0f"), given("warm_ms", "warm, ms")),
        given("cold_ms", ""),
    ),
    Case(
        "sandbox_files",
        "A file of 10 MB in and out",
        (OURS_BOX, DOCKER),
        (given("write_mb_s", "in, MB/s", ".0f"), given("read_mb_s", "out, MB/s", ".0f")),
    ),
    Case(
        "sandbox_screen",
        "A screenshot of a browser in a desktop sandbox, 1280 by 800, as JPEG",
        (OURS_BOX,),
        (
            given("shot_ms", "p50 ms", ".0f"),
            given("shot_p99_ms", "p99 ms", ".0f"),
            given("kilobytes", "KB", ".0f"),
        ),
    ),
    Case(
        "agent_catalogue",
        "One agent turn with one tool call, no store: with 10 tools, and with 1000 of which it is shown a few, or all",
        (System("ridethrough", "ours_catalogue.py"),),
        tuple(
            given(f"{name}_{unit}", f"{title}, {words}")
            for name, title in (("few", "10 tools"), ("searched", "1000, searched"), ("sent", "1000, all sent"))
            for unit, words in (("ms", "ms"), ("cpu_ms", "CPU ms"))
        ),
    ),
    Case("imports", "A fresh interpreter", tuple(System(n, "imports.py", n) for n in IMPORTS), (CPU_MS,)),
    Case("agent_memory", "One agent turn with one tool call, no store", AGENTS, (*TURN, *TURN_100), TURN[0]),
    Case("agent_sqlite", "One agent turn with one tool call, kept in SQLite", AGENTS, (*TURN, *TURN_100), TURN[0]),
    Case("agent_tools", "One agent turn with 20 parallel no-op tools, no store", AGENTS, TURN, TURN[1]),
)


def measure(system: System, case: Case, directory: Path, quick: bool) -> Row | None:
    """One system once, in its own process and its own empty directory; None (and the reason) when it fails."""
    place = Path(tempfile.mkdtemp(prefix=f"{case.name}-", dir=directory))
    environment = {**os.environ, "BENCH_VARIANT": system.variant, "BENCH_SCALE": "0.1" if quick else "1"}
    command = [system.python, str(HERE / "systems" / system.script), case.name, str(place)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(f"status {done.returncode}\n{done.stderr[-2000:]}")
        row: Row = json.loads(done.stdout.splitlines()[-1])
        return row
    except Exception as error:
        print(f"   {system.name}: FAILED: {error}", file=sys.stderr, flush=True)
        return None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def table(case: Case, rounds: list[dict[str, Row]]) -> list[str]:
    heads = ["system", *(column.title for column in case.columns)]
    heads += [f"{case.above[0].title}, above {case.above[1].name}"] if case.above else []
    heads += ["times ours"] if case.ratio else []
    lines = [f"### {case.name}", "", f"{case.title}.", "", "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for system in case.systems:
        rows = [done[system.name] for done in rounds if system.name in done]
        if not rows:
            lines.append(f"| {system.name} |" + " failed |" + " |" * (len(heads) - 2))
            continue
        missing = "" if len(rows) == len(rounds) else f" ({len(rows)} of {len(rounds)} rounds)"
        cells = [system.name + missing]
        for column in case.columns:
            values = [value for row in rows if (value := column.value(row)) is not None]
            cells.append(format(column.over(values), column.form) if values else "")
        if case.above:
            cells.append(above(*case.above, system.name, rounds))
        if case.ratio:
            cells.append(ratio(case.ratio, system.name, rounds))
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def ratio(column: Column, name: str, rounds: list[dict[str, Row]]) -> str:
    """The median over the rounds of this system's figure over ours in the same round."""
    values = [theirs / own for theirs, own in pairs(column, name, OURS.name, rounds) if own]
    return format(statistics.median(values), ".2f") if values else ""


def above(column: Column, base: System, name: str, rounds: list[dict[str, Row]]) -> str:
    """The median over the rounds of this system's figure less the base's in the same round."""
    values = [theirs - least for theirs, least in pairs(column, name, base.name, rounds)]
    return format(statistics.median(values), column.form) if values and name != base.name else ""


def pairs(column: Column, name: str, other: str, rounds: list[dict[str, Row]]) -> list[tuple[float, float]]:
    """One figure of two systems, from every round in which both have it."""
    both = [done for done in rounds if name in done and other in done]
    found = [(column.value(done[name]), column.value(done[other])) for done in both]
    return [(left, right) for left, right in found if left is not None and right is not None]


def load() -> str:
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=[case.name for case in CASES], help="repeatable")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="where the databases go: the file system measured")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work: a smoke test, not a measurement")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/README.md")
    options = parser.parse_args()
    if not PEERS.exists():
        sys.exit("benchmarks/.venv is missing. Run `make bench`, or install benchmarks/requirements-peers.txt into it.")

    lines: list[str] = []
    begun, before = time.strftime("%Y-%m-%d"), load()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.dir) as scratch:
        for case in CASES:
            if options.only and case.name not in options.only:
                continue
            rounds: list[dict[str, Row]] = []
            for number in range(options.rounds):
                print(f"{case.name}, round {number + 1}, load {load()}", file=sys.stderr, flush=True)
                results = {system.name: measure(system, case, Path(scratch), options.quick) for system in case.systems}
                rounds.append({name: row for name, row in results.items() if row is not None})
            lines += table(case, rounds)

    note = (
        f"{begun}, Python {platform.python_version()}, {platform.system()}, {os.cpu_count()} cores; median of "
        f"{options.rounds} rounds; load before {before}, after {load()}."
    )
    only = "".join(f" --only {name}" for name in options.only or ())
    command = f"python benchmarks/run.py --rounds {options.rounds}{only}{' --quick' if options.quick else ''}"
    if options.quick:
        note += " A SMOKE TEST at a tenth of the sizes named below; no measurement."
    text = "\n".join([note, "", f"Made by `{command}`.", "", *lines])
    print(text)
    if options.write:
        readme = HERE / "README.md"
        head, rest = readme.read_text().split(BEGIN)
        readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
