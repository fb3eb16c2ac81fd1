"""A drill from its beginning to its report."""

from __future__ import annotations

import re
import secrets
import signal
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio

from ridethrough.runtime.config import Config
from ridethrough.runtime.drill.evidence import Course, Evidence, gather
from ridethrough.runtime.drill.ground import Ground, new_folder, set_ground
from ridethrough.runtime.drill.lineup import StandIn, completed, line_up, models_asked, scripts_of
from ridethrough.runtime.drill.measure import durations
from ridethrough.runtime.drill.plan import Plan, baseline_plan, drill_plan
from ridethrough.runtime.drill.report import Facts, Report, report_of
from ridethrough.runtime.drill.tell import Scene, Teller
from ridethrough.runtime.drill.walk import Work, walk
from ridethrough.runtime.drill.windows import Illness, illnesses, mended, span
from ridethrough.runtime.errors import Error
from ridethrough.runtime.printing import describe_wait
from ridethrough.runtime.router.providers.simulated import Scenario, Script
from ridethrough.runtime.views import RunView

TICK = 0.1
"""Seconds between two looks at what is to be told."""


class DrillFailed(Error):
    """The drill could not be carried out."""


class Interrupted(Error):
    """The drill was interrupted."""


@dataclass(frozen=True)
class Order:
    """What is asked for: ``runs`` and ``concurrency`` are found out when they are ``None``."""

    target: str
    scenario: Scenario
    config: Config
    folder: Path
    runs: int | None = None
    concurrency: int | None = None
    given: Any = None
    has_input: bool = False
    baseline: bool = True
    limit: float = 120.0
    script: Script | None = None

    def work(self, prefix: str, plan: Plan) -> Work:
        """Runs of it, whose ids begin with ``prefix``."""
        return Work(self.target, prefix, plan, self.given, self.has_input)


def perform(order: Order, teller: Teller) -> Report:
    """Carry it out.

    Raises:
        NotFound, UsageError, ConfigError: The workflow, its input, the folder or a script cannot be used.
        DrillFailed: The workflow does not even come to its end without faults.
        Interrupted: Ctrl-C or SIGTERM came; no process is left.
    """
    asked = models_asked(order.work("drill", Plan(1, 1)).start(1).workflow)
    config = completed(order.config, asked)
    says = scripts_of(config, order.script, order.scenario)
    try:
        return anyio.run(_until_interrupted, _Performance(order, config, asked, says, teller))
    except ExceptionGroup as group:
        raise _only(group) from None


def _only(group: Exception) -> Exception:
    """What went wrong in the task groups, when it was one thing."""
    while isinstance(group, ExceptionGroup) and len(group.exceptions) == 1:
        group = group.exceptions[0]
    return group


async def _until_interrupted(performance: _Performance) -> Report:
    found: list[Report] = []
    async with anyio.create_task_group() as tasks:

        async def listen() -> None:
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    tasks.cancel_scope.cancel()
                    return

        tasks.start_soon(listen)
        found.append(await performance.give())
        tasks.cancel_scope.cancel()
    if not found:
        raise Interrupted(f"The drill was interrupted. What it has so far is in {performance.folder}.")
    return found[0]


class _Performance:
    def __init__(
        self, order: Order, config: Config, asked: Sequence[str], says: Mapping[str, Script], teller: Teller
    ) -> None:
        self.order = order
        self.config = config
        self.asked = asked
        self.says = dict(says)
        self.teller = teller
        self.folder = new_folder(order.folder)
        self.name = _id_of(order.target) + "-" + secrets.token_hex(2)

    async def give(self) -> Report:
        self.teller.opening(self.order.scenario, self.folder)
        baseline = await self._baseline() if self.order.baseline else None
        asked = list(dict.fromkeys(a.route for _, a in baseline.attempts)) if baseline is not None else self.asked
        line = line_up(self.config, asked or self.asked)
        ill = illnesses(line, self.order.scenario)
        plan = drill_plan(self.order.runs, self.order.concurrency, span(ill, self.order.scenario))
        report = await self._drill(line, ill, plan, baseline)
        self.teller.report(report)
        return report

    async def _baseline(self) -> Evidence:
        """Execute a few runs without faults.

        Raises:
            DrillFailed: One does not come to its end.
        """
        scenario = replace(self.order.scenario, faults=(), tools=(), kills=())
        plan = baseline_plan(self.order.runs, self.order.concurrency)
        work = self.order.work(f"{self.name}-baseline", plan)
        line = line_up(self.config, self.asked)
        async with set_ground(self.folder / "baseline", self.config, line, self.says, scenario) as ground:
            self.teller.baseline(plan.runs)
            course = await self._walk(ground, work, scenario, {})
        found = gather(ground, course)
        if problem := _problem(found, ground):
            raise DrillFailed(f"without any fault {problem} Mend that first, or look at {ground.folder}.")
        self.teller.baseline_done(durations(found))
        return found

    async def _drill(
        self, line: Sequence[StandIn], ill: Mapping[str, Illness], plan: Plan, baseline: Evidence | None
    ) -> Report:
        scenario = self.order.scenario
        work = self.order.work(self.name, plan)
        async with set_ground(self.folder / "drill", self.config, line, self.says, scenario) as ground:
            self.teller.drill(plan)
            course = await self._walk(ground, work, scenario, ill)
        found = gather(ground, course)
        return report_of(Facts(ground, scenario, self.order.target, plan.concurrency, found, baseline, ill))

    async def _walk(self, ground: Ground, work: Work, scenario: Scenario, ill: Mapping[str, Illness]) -> Course:
        async with self._telling(ground, ill):
            return await walk(
                ground,
                work,
                kills=[kill.at for kill in scenario.kills],
                mended=mended(ill) if ill else None,
                limit=self.order.limit,
                watcher=self.teller,
            )

    @asynccontextmanager
    async def _telling(self, ground: Ground, ill: Mapping[str, Illness]) -> AsyncGenerator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._tell, ground, ill)
            yield
            tasks.cancel_scope.cancel()

    async def _tell(self, ground: Ground, ill: Mapping[str, Illness]) -> None:
        """Tell who falls ill and gets well, and to a terminal how it stands."""
        while True:
            age = ground.clock()
            sick = {name: each.kinds_at(age) for name, each in ill.items()} if ground.clock.began else {}
            asked = {name: len(server.requests) for name, server in ground.servers.items()}
            self.teller.scene(Scene(age, asked, sick))
            await anyio.sleep(TICK)


def _id_of(target: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", target.rpartition(":")[2]) or "drill"


def _problem(found: Evidence, ground: Ground) -> str | None:
    """Why a baseline is none."""
    if found.course.trouble:
        return f"{found.course.trouble}."
    for run in found.runs:
        if run.status == "done":
            continue
        if run.error is not None:
            return f"a run fails ({run.error.type}: {run.error.message})."
        waits = "; ".join(describe_wait(wait) for wait in _waits(run, found))
        why = f"it waits for {waits}" if waits else f"it is {run.status}"
        late = " within --limit" if found.course.limited else ""
        return f"a run does not come to its end{late}: {why}."
    return None


def _waits(run: RunView, found: Evidence) -> list[Any]:
    own = [wait for wait in run.waits if wait.kind != "child"]
    return own or [wait for child in found.children if child.id in run.children for wait in child.waits]
