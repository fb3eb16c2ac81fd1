"""The testing kit: virtual time, a ledger of effects, random workflow programs, and a killer with a checker.

Use it on workflows of your own, or on the engine itself:

- ``FakeClock`` for ``Runtime.open(clock=...)``: days of timers in milliseconds.
- ``Ledger``: one line of JSON for each start and end of an effect, appended with ``O_APPEND`` to a file beside the
  database. A process that is killed cannot take back what it wrote there, so the ledger says what really happened.
- ``make_program(seed)``: a random workflow program (branches with nesting and limits, steps, timers, signals, child
  runs, failures that are caught), and ``expected(program)``: its outcome, computed without the engine.
- ``campaign``: executes programs in real processes, ends these with SIGKILL at named points (``testpoints``) and at
  random moments, goes on in new processes until all runs have ended, and ``check``s what must hold:

  * the outcome of every run is the one of the undisturbed program;
  * an effect whose step was committed is never started again, and within one process no effect starts twice;
  * a ``write`` starts at most once, whatever happens;
  * all attempts of a call see the same key and the same id (of a model call: the same conversation);
  * what is on record has happened;
  * the database is sound and nothing in it contradicts itself.

From the command line (everything follows from the seed except the scheduling of the machine)::

    python -m ridethrough.runtime.testing --seed 7 --rounds 4 --kills 10 DIRECTORY

A campaign forks a new process for each life of the worker out of one that has imported everything and holds no thread
and no connection: a life then costs a few milliseconds to begin instead of half a second, so hundreds fit in a test.

Other kinds of effects plug in: an ``Op`` in ``OPS`` brings its own nodes, their execution and their expected value.
``--ops MODULE`` imports a module that adds some; this package knows nothing of tools and agents.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import random
import signal
import sqlite3
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import anyio
import anyio.to_thread
from sqlalchemy import Connection

from ridethrough.runtime import control, execution, testpoints
from ridethrough.runtime.clock import FakeClock as FakeClock
from ridethrough.runtime.errors import NotFound, RunCancelled, RunConflict, RunFailed
from ridethrough.runtime.execution import current_branch
from ridethrough.runtime.runtime import Runtime
from ridethrough.runtime.store import RUNS, SIGNALS, STEPS, Store
from ridethrough.runtime.tables import FINAL
from ridethrough.runtime.workflow import fan_out, gather, now, sleep, step, uuid, wait_for, workflow
from ridethrough.runtime.workflow import random as recorded_random

Node = dict[str, Any]
"""A part of a program: plain data with an ``op``."""

Entry = dict[str, Any]
"""A line of the ledger."""


class Planned(Exception):
    """A failure that the program contains on purpose."""


# --- the ledger -----------------------------------------------------------------------------------------------------


class Ledger:
    """What happened, outside the database: append-only, one line an entry."""

    def __init__(self, path: Path) -> None:
        """The file is made when the first line is written."""
        self.path = path

    def write(self, kind: str, **fields: Any) -> None:
        """Append one entry, in one system call: another process never sees half of it, and a kill cannot tear it."""
        line = json.dumps({"kind": kind, "pid": os.getpid(), **fields}) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    @contextmanager
    def effect(
        self, effect: str, run_id: str, call: str, key: str | None = None, call_id: str | None = None
    ) -> Generator[None]:
        """Write down that an effect starts, and afterwards that it has finished.

        Args:
            effect: ``step``, ``read``, ``idempotent``, ``write`` or ``model``.
            run_id: The run that it belongs to.
            call: What tells it from the run's other effects, the same at every attempt. ``call_of`` must find it in
                the recorded step.
            key: The idempotency key that it was given; of a model call, a digest of what was asked.
            call_id: The engine's own name for it.
        """
        fields = {"effect": effect, "run": run_id, "call": call, "key": key, "id": call_id}
        self.write("start", **fields)
        yield
        self.write("finish", **fields)

    def read(self) -> list[Entry]:
        """All entries, oldest first."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]


_ledger: Ledger | None = None


def current_ledger() -> Ledger:
    """The ledger of this process's programs, for ops that are plugged in."""
    assert _ledger is not None, "no program is being executed: use execute()"
    return _ledger


# --- programs -------------------------------------------------------------------------------------------------------


class Failure(Exception):
    """In ``Op.expect``: the node fails; ``error`` is the name of the class that the workflow sees."""

    def __init__(self, error: str) -> None:
        """``error`` is a class name."""
        super().__init__(error)
        self.error = error


class Maker:
    """Makes nodes at random; every key it gives out is used once in the program."""

    def __init__(self, seed: int, ops: Sequence[str] | None = None) -> None:
        """``ops``: which ops to use; all of ``OPS`` when left out."""
        self.random = random.Random(seed)
        self.ops = [name for name in OPS if ops is None or name in ops]
        self._count = 0

    def key(self) -> str:
        """A key that no other node has."""
        self._count += 1
        return f"k{self._count}"

    def node(self, depth: int) -> Node:
        """A node with at most ``depth`` levels below it."""
        names = [name for name in self.ops if depth > 0 or not OPS[name].nests]
        name = self.random.choices(names, [OPS[name].weight for name in names])[0]
        return {"op": name, **OPS[name].make(self, depth)}

    def nodes(self, low: int, high: int, depth: int) -> list[Node]:
        """Between ``low`` and ``high`` nodes."""
        return [self.node(depth) for _ in range(self.random.randint(low, high))]


class Op(Protocol):
    """A kind of node."""

    weight: float
    """How often it is chosen, relative to the others."""
    nests: bool
    """Whether its nodes have nodes below them."""

    def make(self, maker: Maker, depth: int) -> Node:
        """The fields of a new node (plain data)."""
        ...

    async def perform(self, node: Node, run_id: str) -> Any:
        """Execute a node inside a workflow."""
        ...

    def expect(self, node: Node) -> Any:
        """What ``perform`` returns when nothing disturbs it.

        Raises:
            Failure: it fails.
        """
        ...


def make_program(seed: int, ops: Sequence[str] | None = None, depth: int = 3) -> Node:
    """A random program; the same seed (and ops) give the same one."""
    maker = Maker(seed, ops)
    return {"op": "sequence", "nodes": maker.nodes(4, 8, depth)}


async def play(node: Node, run_id: str) -> Any:
    """Execute a node inside a workflow."""
    return await OPS[node["op"]].perform(node, run_id)


def expect(node: Node) -> Any:
    """The value of a node; raises ``Failure`` if it fails."""
    return OPS[node["op"]].expect(node)


def fails(node: Node) -> bool:
    """Whether a node fails."""
    try:
        expect(node)
    except Failure:
        return True
    return False


def expected(program: Node) -> Any:
    """The outcome of a program: ``["done", value]`` or ``["failed", class]``."""
    try:
        return ["done", expect(program)]
    except Failure as failure:
        return ["failed", failure.error]


@workflow(name="ridethrough-test-program")
async def test_program(program: dict[str, Any]) -> Any:
    """Execute a program."""
    return await play(program, current_branch("program").execution.run_id)


test_program.__test__ = False  # type: ignore[attr-defined]  # it is no test of pytest's


def _work(run_id: str, call: str, nap: float, size: int, failing: bool) -> str:
    with current_ledger().effect("step", run_id, call):
        time.sleep(nap)
    if failing:
        raise Planned(call)
    return call + "." * size


@step(name="work")
def _work_in_thread(run_id: str, call: str, nap: float, size: int, failing: bool) -> str:
    return _work(run_id, call, nap, size, failing)


@step(name="work")
async def _work_in_loop(run_id: str, call: str, nap: float, size: int, failing: bool) -> str:
    with current_ledger().effect("step", run_id, call):
        await anyio.sleep(nap)
    if failing:
        raise Planned(call)
    return call + "." * size


class StepOp:
    """A step: quick or slow, in the loop or in a thread, small or with a value that is stored apart, failing or not."""

    weight = 6.0
    nests = False

    def make(self, maker: Maker, depth: int) -> Node:
        """Choose."""
        chance = maker.random.random
        return {
            "key": maker.key(),
            "nap": round(chance() * 0.01, 4) if chance() < 0.5 else 0.0,
            "size": 70_000 if chance() < 0.1 else 0,
            "failing": chance() < 0.08,
            "thread": chance() < 0.3,
        }

    async def perform(self, node: Node, run_id: str) -> Any:
        """Call it; of a large value, tell the size only."""
        function = _work_in_thread if node["thread"] else _work_in_loop
        value = await function(run_id, node["key"], node["nap"], node["size"], node["failing"])
        return [value[: len(node["key"])], len(value)]

    def expect(self, node: Node) -> Any:
        """Its key and size."""
        if node["failing"]:
            raise Failure("Planned")
        return [node["key"], len(node["key"]) + node["size"]]


@step(name="echo")
async def _echo(values: list[str]) -> list[str]:
    return values


class ChanceOp:
    """Recorded time and chance, used as a step's input: were they not the same on resume, the run would diverge."""

    weight = 1.0
    nests = False

    def make(self, maker: Maker, depth: int) -> Node:
        """Nothing to choose."""
        return {"key": maker.key()}

    async def perform(self, node: Node, run_id: str) -> Any:
        """Draw, and pass on what was drawn."""
        drawn = [str(await now()), str(await recorded_random()), str(await uuid())]
        return node["key"] if await _echo(drawn) == drawn else "changed"

    def expect(self, node: Node) -> Any:
        """Its key."""
        return node["key"]


class SleepOp:
    """A durable timer, short enough for tests and long enough to park for."""

    weight = 1.5
    nests = False

    def make(self, maker: Maker, depth: int) -> Node:
        """Choose a time."""
        return {"seconds": round(maker.random.choice((0.0, 0.01, 0.05, 0.12)), 3)}

    async def perform(self, node: Node, run_id: str) -> Any:
        """Wait."""
        await sleep(node["seconds"])

    def expect(self, node: Node) -> Any:
        """Nothing."""
        return None


class SignalOp:
    """A signal that is sent once somebody waits for it, or (in the outermost run) at the very beginning."""

    weight = 1.5
    nests = False

    def make(self, maker: Maker, depth: int) -> Node:
        """Choose a name."""
        return {"key": maker.key(), "early": maker.random.random() < 0.3}

    async def perform(self, node: Node, run_id: str) -> Any:
        """Wait for it."""
        return await wait_for(f"one-{node['key']}", int)

    def expect(self, node: Node) -> Any:
        """The only value that is ever sent."""
        return 0


class RivalsOp:
    """Branches that wait for signals of one name: each signal must go to one of them."""

    weight = 0.6
    nests = True

    def make(self, maker: Maker, depth: int) -> Node:
        """Choose how many."""
        return {"key": maker.key(), "count": maker.random.randint(2, 4)}

    async def perform(self, node: Node, run_id: str) -> Any:
        """Wait in all of them."""
        name = f"many{node['count']}-{node['key']}"
        return sorted(await gather(*(wait_for(name, int) for _ in range(node["count"]))))

    def expect(self, node: Node) -> Any:
        """Every value once."""
        return list(range(node["count"]))


class TimeoutOp:
    """A wait for a signal that never comes."""

    weight = 0.6
    nests = False

    def make(self, maker: Maker, depth: int) -> Node:
        """Choose how long."""
        return {"key": maker.key(), "seconds": maker.random.choice((0.01, 0.06))}

    async def perform(self, node: Node, run_id: str) -> Any:
        """Wait in vain."""
        try:
            await wait_for(f"never-{node['key']}", int, timeout=node["seconds"])
        except TimeoutError:
            return "timeout"
        return "signal"

    def expect(self, node: Node) -> Any:
        """The timeout."""
        return "timeout"


class SequenceOp:
    """One after the other."""

    weight = 1.0
    nests = True

    def make(self, maker: Maker, depth: int) -> Node:
        """Choose the parts."""
        return {"nodes": maker.nodes(1, 4, depth - 1)}

    async def perform(self, node: Node, run_id: str) -> Any:
        """Execute the parts."""
        return [await play(part, run_id) for part in node["nodes"]]

    def expect(self, node: Node) -> Any:
        """The values of the parts; the first failure ends it."""
        return [expect(part) for part in node["nodes"]]


class GatherOp:
    """Concurrent branches, all to be waited for or ended by the first failure.

    Of branches that end each other one fails at most: which of two is first depends on the machine, and the outcome
    of the program must not.
    """

    weight = 2.5
    nests = True

    def make(self, maker: Maker, depth: int) -> Node:
        """Choose the branches."""
        nodes = maker.nodes(2, 5, depth - 1)
        collect = maker.random.random() < 0.5
        failing = [index for index, part in enumerate(nodes) if fails(part)]
        for index in failing[1:] if not collect else ():
            nodes[index] = {"op": "attempt", "node": nodes[index]}
        return {"nodes": nodes, "limit": maker.random.choice((None, None, 1, 2, 3)), "collect": collect}

    async def perform(self, node: Node, run_id: str) -> Any:
        """Execute the branches."""
        if not node["collect"]:
            return await gather(*(play(part, run_id) for part in node["nodes"]), limit=node["limit"])
        found = await fan_out(lambda part: play(part, run_id), node["nodes"], limit=node["limit"], on_error="collect")
        return [["error", type(item).__name__] if isinstance(item, Exception) else item for item in found]

    def expect(self, node: Node) -> Any:
        """The values of the branches, or the failure of one."""
        return [self._branch(part) if node["collect"] else expect(part) for part in node["nodes"]]

    def _branch(self, part: Node) -> Any:
        try:
            return expect(part)
        except Failure as failure:
            return ["error", failure.error]


class AttemptOp:
    """A failure that the workflow catches, after which it goes on."""

    weight = 1.0
    nests = True

    def make(self, maker: Maker, depth: int) -> Node:
        """Choose what is attempted."""
        return {"node": maker.node(depth - 1)}

    async def perform(self, node: Node, run_id: str) -> Any:
        """Try it."""
        try:
            return await play(node["node"], run_id)
        except Exception as error:
            return ["caught", type(error).__name__]

    def expect(self, node: Node) -> Any:
        """The value, or what was caught."""
        try:
            return expect(node["node"])
        except Failure as failure:
            return ["caught", failure.error]


class ChildOp:
    """A child run."""

    weight = 1.0
    nests = True

    def make(self, maker: Maker, depth: int) -> Node:
        """Choose what it executes."""
        return {"node": maker.node(depth - 1)}

    async def perform(self, node: Node, run_id: str) -> Any:
        """Start it and wait for its end."""
        return await test_program(node["node"])

    def expect(self, node: Node) -> Any:
        """Its value; its failure is seen as that of a run."""
        try:
            return expect(node["node"])
        except Failure:
            raise Failure("RunFailed") from None


OPS: dict[str, Op] = {
    "step": StepOp(),
    "chance": ChanceOp(),
    "sleep": SleepOp(),
    "signal": SignalOp(),
    "rivals": RivalsOp(),
    "timeout": TimeoutOp(),
    "sequence": SequenceOp(),
    "gather": GatherOp(),
    "attempt": AttemptOp(),
    "child": ChildOp(),
}
"""The kinds of nodes; add your own under a name of theirs."""


# --- one life of a worker -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """What every life of a worker executes: programs by the ids of their runs, on one database, with one ledger."""

    directory: Path
    programs: dict[str, Node]

    @property
    def database(self) -> str:
        """The URL."""
        return f"sqlite:///{self.directory / 'runs.db'}"

    @property
    def ledger(self) -> Ledger:
        """The ledger."""
        return Ledger(self.directory / "ledger.jsonl")


def plan_of(directory: Path, seed: int, count: int, ops: Sequence[str] | None = None) -> Plan:
    """``count`` programs of a seed."""
    return Plan(directory, {f"run-{seed}-{index}": make_program(seed * 1000 + index, ops) for index in range(count)})


async def execute(plan: Plan) -> None:
    """Execute the programs of a plan to their ends, whatever earlier lives have left; outcomes go to the ledger."""
    global _ledger
    _ledger = plan.ledger
    await anyio.to_thread.run_sync(_write_committed, plan)
    async with Runtime.open(plan.database, grace=0.5) as runtime:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_send_signals, runtime)
            async with anyio.create_task_group() as runs:
                for run_id, program in plan.programs.items():
                    runs.start_soon(_run, runtime, plan, run_id, program)
            await _all_ended(runtime)
            tasks.cancel_scope.cancel()


def _write_committed(plan: Plan) -> None:
    """What is on disk before this life begins: none of it may be executed again."""
    if not (plan.directory / "runs.db").exists():
        return
    try:
        calls = _recorded(plan)
    except sqlite3.OperationalError:
        return  # killed before there were tables
    current_ledger().write("committed", calls=calls)


def _recorded(plan: Plan, where: str = "true") -> list[tuple[str, str]]:
    """The effects that are on record, by their runs and their names in the ledger."""
    with closing(sqlite3.connect(plan.directory / "runs.db")) as connection:
        rows = connection.execute(f"SELECT run_id, kind, name, asked, model FROM steps WHERE {where}").fetchall()
    found = ((run_id, call_of(kind, name, asked, model)) for run_id, kind, name, asked, model in rows)
    return [(run_id, call) for run_id, call in found if call is not None]


def call_of(kind: str, name: str, asked: str | None, model: str | None) -> str | None:
    """The name in the ledger of the effect behind a recorded step, if it is one.

    A model call has it as the model's name, a tool call as its argument ``call``.
    """
    if kind == "model":
        return model
    if kind == "tool":
        found = json.loads(asked or "{}").get("call")
        return None if found is None else str(found)
    return str(json.loads(asked or "")[1]) if name == "work" else None


async def _run(runtime: Runtime, plan: Plan, run_id: str, program: Node) -> None:
    run = await runtime.start(test_program, program, id=run_id)
    for node in program["nodes"]:
        if node["op"] == "signal" and node["early"]:
            await _send_missing(runtime, run_id, f"one-{node['key']}")
    try:
        outcome = ["done", await run.result()]
    except RunFailed as failure:
        outcome = ["failed", failure.error_type]
    except RunCancelled:
        outcome = ["cancelled"]
    plan.ledger.write("outcome", run=run_id, outcome=outcome)


async def _send_signals(runtime: Runtime) -> NoReturn:
    """Send what is waited for, each value once, however often this process dies between two of them."""
    while True:
        for run_id, name in await runtime.store.read(_awaited):
            await _send_missing(runtime, run_id, name)
        await anyio.sleep(0.01)


def _awaited(connection: Connection) -> list[tuple[str, str]]:
    rows = connection.exec_driver_sql(
        "SELECT DISTINCT run_id, name FROM waits WHERE kind = 'signal' AND name NOT LIKE 'never-%'"
    )
    return [(row[0], row[1]) for row in rows]


async def _send_missing(runtime: Runtime, run_id: str, name: str) -> None:
    sent = await runtime.store.read(
        lambda connection: {
            int(row.value)
            for row in connection.execute(SIGNALS.select().where(SIGNALS.c.run_id == run_id, SIGNALS.c.name == name))
        }
    )
    kind = name.partition("-")[0]
    for value in range(int(kind[4:]) if kind.startswith("many") else 1):
        if value not in sent:
            try:
                await runtime.signal(run_id, name, value)
            except (RunConflict, NotFound):
                return  # it has ended meanwhile


async def _all_ended(runtime: Runtime) -> None:
    """Children of branches that were given up may outlive their parents' interest in them for a moment."""
    while any(view.status not in FINAL for view in await runtime.list(limit=None)):  # noqa: ASYNC110
        await anyio.sleep(0.02)


# --- the killer -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Report:
    """What a campaign did, and what it found wrong."""

    seed: int
    lives: int = 0
    kills: int = 0
    points: dict[str, int] = field(default_factory=dict)
    effects: int = 0
    started: dict[str, int] = field(default_factory=dict)
    """Effects that were started, by kind."""
    interrupted: dict[str, int] = field(default_factory=dict)
    """Those of them that a kill (or the failure of a sibling) ended in the middle."""
    settled: int = 0
    """Interrupted writes of which somebody found out what had become of them."""
    unknown: int = 0
    """Interrupted writes of which the workflow was told that nobody knows."""
    runs: int = 0
    violations: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name) for name in self.__slots__}


def campaign(
    directory: Path,
    seed: int,
    *,
    rounds: int = 4,
    kills: int = 10,
    programs: int = 6,
    ops: Sequence[str] | None = None,
    deadline: float = 60.0,
    log: Callable[[str], None] = print,
) -> Report:
    """Execute random programs in processes that are killed, and check what is left.

    The caller must have no threads: processes are forked from it.

    Args:
        directory: Where databases and ledgers go, one folder a round; those of rounds without a violation are emptied.
        seed: What programs and kills follow from.
        rounds: How many databases, one after the other.
        kills: How many lives to end in each round; then the last one may go on undisturbed.
        programs: How many runs in each round.
        ops: Which ops to use, all when left out.
        deadline: Seconds that an undisturbed life may take; after that the round counts as hanging.
        log: Told of each round and each violation.
    """
    report = Report(seed)
    for index in range(rounds):
        chance = random.Random(f"{seed}/{index}")
        folder = directory / f"round-{index}"
        folder.mkdir(parents=True)
        plan = plan_of(folder, seed * 100 + index, programs, ops)
        before = len(report.violations)
        _one_round(plan, chance, kills, deadline, report)
        found = report.violations[before:]
        log(f"seed {seed} round {index}: {len(found)} violations; {report.lives} lives, {report.kills} kills so far")
        for violation in found:
            log(f"  {violation}")
        if not found:
            for file in folder.iterdir():
                file.unlink()
    return report


def _one_round(plan: Plan, chance: random.Random, kills: int, deadline: float, report: Report) -> None:
    ended = False
    for _ in range(kills):
        spec, moment = _choose_kill(chance)
        killed = _live(plan, chance, spec, moment, report)
        if killed:
            report.kills += 1
            name = spec.partition(":")[0] or "random moment"
            report.points[name] = report.points.get(name, 0) + 1
        else:
            ended = True
            break
    if not ended and _live(plan, chance, "", deadline, report):
        report.violations.append(
            f"{plan.directory.name}: not ended after {deadline:g} s without a kill: {_stuck(plan)}"
        )
    report.runs += len(plan.programs)
    report.violations += [f"{plan.directory.name}: {line}" for line in check(plan)]
    _count(plan.ledger.read(), report)


def _count(entries: Iterable[Entry], report: Report) -> None:
    for entry in entries:
        if entry["kind"] == "start":
            report.effects += 1
            report.started[entry["effect"]] = report.started.get(entry["effect"], 0) + 1
            report.interrupted[entry["effect"]] = report.interrupted.get(entry["effect"], 0) + 1
        elif entry["kind"] == "finish":
            report.interrupted[entry["effect"]] -= 1
        report.settled += entry["kind"] == "settled"
        report.unknown += entry["kind"] == "unknown"


def _choose_kill(chance: random.Random) -> tuple[str, float]:
    """A point and the how-manieth time it is reached, or a moment in seconds."""
    if chance.random() < 0.35:
        return "", chance.uniform(0.0, 0.25)
    point = chance.choice(testpoints.POINTS)
    most = {"journal": 20, "step": 12, "claim": 3, "park": 4, "finish": 3}[point.partition(".")[0]]
    return f"{point}:{chance.randint(1, most)}", 30.0


def _live(plan: Plan, chance: random.Random, spec: str, moment: float, report: Report) -> bool:
    """One life of a worker; whether it was killed (by itself at a point, or by us after ``moment`` seconds)."""
    report.lives += 1
    backend = chance.choice(_backends())
    child = os.fork()
    if child == 0:
        _be_worker(plan, spec, backend)
    deadline = time.monotonic() + moment
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return _was_killed(status, report)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return _was_killed(os.waitpid(child, 0)[1], report)


def _was_killed(status: int, report: Report) -> bool:
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        report.violations.append(f"a worker ended with {code}; its traceback is on stderr")
    return code == -signal.SIGKILL


def _backends() -> list[str]:
    return ["asyncio", "trio"] if importlib.util.find_spec("trio") else ["asyncio"]


def _be_worker(plan: Plan, spec: str, backend: str) -> NoReturn:
    """The forked process: no test of ours may outlive this function, so it leaves by ``_exit``."""
    code = 1
    try:
        execution.LINGER = 0.02  # park for timers that a test can wait for
        control.POISON_LIMIT = 1_000_000  # the killer is no poison
        testpoints.arm(spec)
        anyio.run(execute, plan, backend=backend)
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _stuck(plan: Plan) -> str:
    with closing(sqlite3.connect(plan.directory / "runs.db")) as connection:
        waits = "(SELECT group_concat(path || '=' || kind) FROM waits WHERE run_id = id)"
        columns = f"id, status, worker_id, wake_at, wanted, {waits}"
        rows = connection.execute(f"SELECT {columns} FROM runs WHERE status NOT IN ('done', 'failed', 'cancelled')")
        return "; ".join(str(row) for row in rows)


# --- the checker ----------------------------------------------------------------------------------------------------


def check(plan: Plan) -> list[str]:
    """What is wrong with the ledger and the database of a plan that has been executed; empty if nothing is."""
    entries = plan.ledger.read()
    return [
        *_wrong_outcomes(plan, entries),
        *_repeated(entries),
        *_wrong_writes(entries),
        *_wrong_keys(entries),
        *_invented(plan, entries),
        *_unsound(plan),
    ]


def _wrong_outcomes(plan: Plan, entries: Iterable[Entry]) -> Iterator[str]:
    seen: dict[str, list[Any]] = {run_id: [] for run_id in plan.programs}
    for entry in entries:
        if entry["kind"] == "outcome":
            seen[entry["run"]].append(entry["outcome"])
    for run_id, program in plan.programs.items():
        wanted = json.loads(json.dumps(expected(program)))
        if not seen[run_id]:
            yield f"{run_id}: no outcome"
        for outcome in seen[run_id]:
            if outcome != wanted:
                yield f"{run_id}: {json.dumps(outcome)} instead of {json.dumps(wanted)}"


def _repeated(entries: Iterable[Entry]) -> Iterator[str]:
    """Effects that were started again although their step was on disk, or twice in one process."""
    committed: set[tuple[str, str]] = set()
    started: set[tuple[int, str, str]] = set()
    for entry in entries:
        if entry["kind"] == "committed":
            committed |= {(run_id, call) for run_id, call in entry["calls"]}
        elif entry["kind"] == "start":
            call = (entry["run"], entry["call"])
            if call in committed:
                yield f"{entry['effect']} {call} was started again after its step was committed"
            if (entry["pid"], *call) in started:
                yield f"{entry['effect']} {call} was started twice in process {entry['pid']}"
            started.add((entry["pid"], *call))


def _wrong_writes(entries: Iterable[Entry]) -> Iterator[str]:
    starts: dict[tuple[str, str], int] = defaultdict(int)
    for entry in entries:
        if entry["kind"] == "start" and entry["effect"] == "write":
            starts[entry["run"], entry["call"]] += 1
    for call, count in starts.items():
        if count > 1:
            yield f"write {call} was started {count} times"


def _wrong_keys(entries: Iterable[Entry]) -> Iterator[str]:
    """Calls that were not the same at every attempt."""
    keys: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    ids: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for entry in entries:
        if entry["kind"] == "start":
            call = (entry["effect"], entry["run"], entry["call"])
            keys[call].add(str(entry["key"]))
            ids[call].add(str(entry.get("id")))
    for (effect, run, name), found in keys.items():
        if len(found) > 1 or (effect == "idempotent" and "None" in found):
            yield f"{effect} {(run, name)} saw the keys {sorted(found)}"
    for (effect, run, name), found in ids.items():
        if len(found) > 1:
            yield f"{effect} {(run, name)} had the ids {sorted(found)}"


def _invented(plan: Plan, entries: Iterable[Entry]) -> Iterator[str]:
    """Effects on record that never happened."""
    started = {(entry["run"], entry["call"]) for entry in entries if entry["kind"] == "start"}
    # Of an interrupted write nobody need know whether it has started.
    for call in _recorded(plan, "error IS NULL OR error NOT LIKE '%ToolInterrupted%'"):
        if call not in started:
            yield f"{call} is on record and was never started"


def _unsound(plan: Plan) -> Iterator[str]:
    store = Store(plan.database)
    try:
        yield from store.database.check()
        yield from store.read_now(store.dangling)
        yield from store.read_now(_unfinished)
    finally:
        store.close()


def _unfinished(connection: Connection) -> list[str]:
    rows = connection.execute(RUNS.select().where(RUNS.c.status.not_in(FINAL))).all()
    steps = {row.run_id for row in connection.execute(STEPS.select())}
    return [f"{row.id}: {row.status}, {'with' if row.id in steps else 'without'} steps" for row in rows]


# --- the command ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign; 1 if anything was violated."""
    parser = argparse.ArgumentParser(prog="python -m ridethrough.runtime.testing", description=campaign.__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--programs", type=int, default=6)
    parser.add_argument("--ops", action="append", default=[], metavar="MODULE", help="a module that adds to OPS")
    chosen = parser.parse_args(arguments)
    for name in chosen.ops:
        importlib.import_module(name)
    report = campaign(
        chosen.directory,
        chosen.seed,
        rounds=chosen.rounds,
        kills=chosen.kills,
        programs=chosen.programs,
        log=_to_stderr,
    )
    sys.stdout.write(json.dumps(report.as_json()) + "\n")
    return 1 if report.violations else 0


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    # Under its own name, so that ops which are plugged in meet the same OPS.
    from ridethrough.runtime.testing import main as real_main

    sys.exit(real_main())
