"""Telling a drill while it happens, and its report: with a live line on a terminal, as plain lines, or not at all."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import click

from ridethrough.runtime.drill.ground import shown
from ridethrough.runtime.printing import counted, dollars, plain, seconds, table

if TYPE_CHECKING:
    from rich.live import Live

    from ridethrough.runtime.drill.measure import Measured
    from ridethrough.runtime.drill.plan import Plan
    from ridethrough.runtime.drill.report import DeploymentRow, Report, Verdict
    from ridethrough.runtime.router.providers.simulated import Scenario


@dataclass(frozen=True)
class Scene:
    """How it stands: seconds on the schedule's clock, requests, and who is ill."""

    age: float
    asked: Mapping[str, int]
    ill: Mapping[str, Sequence[str]]


class Teller(Protocol):
    """Whoever tells what happens."""

    def opening(self, scenario: Scenario, folder: Path) -> None:
        """It begins."""
        ...

    def baseline(self, runs: int) -> None:
        """So many runs are executed without faults."""
        ...

    def baseline_done(self, durations: Sequence[float]) -> None:
        """They took so long."""
        ...

    def drill(self, plan: Plan) -> None:
        """Runs are executed with faults."""
        ...

    def process(self, pid: int) -> None:
        """A process begins."""
        ...

    def clock(self) -> None:
        """The schedule begins."""
        ...

    def killed(self, pid: int) -> None:
        """A process was killed."""
        ...

    def operator(self, runs: int) -> None:
        """So many runs that wait for a person are resumed."""
        ...

    def run(self, run_id: str, status: str, reason: str) -> None:
        """A run has come to another status, for a reason (of a pause)."""
        ...

    def scene(self, scene: Scene) -> None:
        """How it stands."""
        ...

    def report(self, report: Report) -> None:
        """What it came to."""
        ...

    def close(self) -> None:
        """Whatever came of it, it is over."""
        ...


class Silent:
    """Tells nothing: programs get the report."""

    def opening(self, scenario: Scenario, folder: Path) -> None:
        """Nothing."""

    def baseline(self, runs: int) -> None:
        """Nothing."""

    def baseline_done(self, durations: Sequence[float]) -> None:
        """Nothing."""

    def drill(self, plan: Plan) -> None:
        """Nothing."""

    def process(self, pid: int) -> None:
        """Nothing."""

    def clock(self) -> None:
        """Nothing."""

    def killed(self, pid: int) -> None:
        """Nothing."""

    def operator(self, runs: int) -> None:
        """Nothing."""

    def run(self, run_id: str, status: str, reason: str) -> None:
        """Nothing."""

    def scene(self, scene: Scene) -> None:
        """Nothing."""

    def report(self, report: Report) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """One line for each thing that happens."""

    def __init__(self) -> None:
        """Nothing has happened."""
        self._age: Callable[[], float] = lambda: 0.0
        self._ill: Mapping[str, Sequence[str]] = {}
        self._paused: set[str] = set()
        self._again = ""
        self._statuses: dict[str, str] = {}

    def opening(self, scenario: Scenario, folder: Path) -> None:
        """What is about to be tried."""
        self._print(f"{plain(scenario.name)}: {plain(scenario.description)}", "bold")
        self._print(f"Simulated servers stand in for every provider; no real one is called. Files: {shown(folder)}")

    def baseline(self, runs: int) -> None:
        """What is normal is found out first."""
        self._print(f"\nWithout faults: {counted(runs, 'run')}")
        self._again = ""

    def baseline_done(self, durations: Sequence[float]) -> None:
        """What is normal."""
        self._line(f"a run takes {seconds(median(durations))}, the slowest {seconds(max(durations))}")

    def drill(self, plan: Plan) -> None:
        """It gets serious."""
        many = counted(plan.runs, "run") if plan.least == plan.runs else f"runs for {seconds(plan.until)}"
        self._print(f"\nWith faults: {many}, up to {plan.concurrency} at a time")
        self._age, self._again, self._statuses = (lambda: 0.0), "", {}

    def process(self, pid: int) -> None:
        """Who executes the runs."""
        self._line(f"process {pid} takes up {'what is left' if self._again else 'the runs'}")
        self._again = "again"

    def clock(self) -> None:
        """The schedule begins."""
        began = time.monotonic()
        self._age = lambda: time.monotonic() - began

    def killed(self, pid: int) -> None:
        """A process was killed."""
        self._line(f"process {pid}: SIGKILL", "bold red")

    def operator(self, runs: int) -> None:
        """The drill is the operator."""
        self._line(f"an operator resumes {counted(runs, 'run')}: what was at fault is over")

    def run(self, run_id: str, status: str, reason: str) -> None:
        """The first pause of a reason, and runs that failed."""
        self._statuses[run_id] = status
        if status == "paused" and reason not in self._paused:
            self._paused.add(reason)
            self._line(f"{run_id} is paused: {reason} (told once)", "yellow")
        if status in ("failed", "cancelled"):
            self._line(f"{run_id} {status}", "red")

    def scene(self, scene: Scene) -> None:
        """Who falls ill, and who gets well."""
        for name, kinds in scene.ill.items():
            before = self._ill.get(name, ())
            if kinds and set(kinds) != set(before):
                self._line(f"{name} is ill: {', '.join(kinds)}", "yellow")
            elif before and not kinds:
                self._line(f"{name} is well again", "green")
        self._ill = scene.ill

    def report(self, report: Report) -> None:
        """What it came to."""
        self._print("")
        for text, style in pages(report):
            self._print(text, style)

    def close(self) -> None:
        """Nothing is held."""

    def _line(self, what: str, style: str = "") -> None:
        self._print(f"{self._age():6.1f}s  {plain(what)}", style)

    def _print(self, text: str, style: str = "") -> None:
        click.echo(text)


class Terminal(Lines):
    """The same in colours, with a line below that shows how it stands."""

    def __init__(self) -> None:
        """Take the terminal."""
        super().__init__()
        from rich.console import Console

        self._console: Console = Console(highlight=False)
        self._live: Live | None = None

    def scene(self, scene: Scene) -> None:
        """How it stands."""
        super().scene(scene)
        from rich.live import Live
        from rich.text import Text

        text = Text(standing(scene, self._statuses), "cyan", no_wrap=True, overflow="ellipsis")
        if self._live is None:
            self._live = Live(text, console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(text, refresh=True)

    def report(self, report: Report) -> None:
        """What it came to."""
        self.close()
        super().report(report)

    def close(self) -> None:
        """Give the line back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style or None, markup=False, soft_wrap=True)


def teller(*, json: bool) -> Teller:
    """Whoever fits the output."""
    if json:
        return Silent()
    return Terminal() if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" else Lines()


def standing(scene: Scene, statuses: Mapping[str, str]) -> str:
    """How it stands, in one line."""
    order = ("done", "failed", "cancelled", "running", "paused", "waiting", "queued")
    counts = Counter(statuses.values())
    runs = ", ".join(f"{counts[status]} {status}" for status in order if counts[status])
    asked = "  ".join(
        f"{plain(name)}{'!' if scene.ill.get(name) else ''} {number}" for name, number in scene.asked.items() if number
    )
    return f"{scene.age:6.1f}s  runs: {runs or 'starting'}   requests: {asked or 'none'}"


# --- the report -----------------------------------------------------------------------------------------------------


def pages(report: Report) -> Iterator[tuple[str, str]]:
    """The report in lines, each with its style."""
    yield f"{_head(report)}\n", "bold"
    for name, text in _facts(report):
        yield f"  {name:<10}{plain(text)}", ""
    yield "\n" + _deployments(report.deployments), ""
    if report.verdicts:
        yield "\nexpected", "bold"
    for verdict in report.verdicts:
        yield from _verdict(verdict)
    for note in report.notes:
        yield f"\nnote: {plain(note)}", "yellow"
    for trouble in report.trouble:
        yield f"\nNOT SO: {plain(trouble)}", "bold red"
    if not report.ok and not report.verdicts and not report.trouble:
        yield "\nNOT SO: something was lost or repeated", "bold red"
    yield "\nlook further", "bold"
    for command in report.next:
        yield f"  {command}", ""


def _head(report: Report) -> str:
    runs = report.runs
    ends = ", ".join(f"{runs[end]} {end}" for end in ("done", "failed", "unfinished") if runs[end])
    return (
        f"{counted(runs['started'], 'run')} of {plain(report.target)}, {report.concurrency} at a time, in "
        f"{seconds(report.seconds)}: {ends}"
    )


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    for name, found in report.measures.items():
        yield name, _told(name, found)
    if report.kills:
        yield "kills", f"{counted(report.kills, 'process', 'processes')} killed, and taken over from"
    for pause in report.pauses:
        yield "paused", f"{pause['reason']}: {counted(pause['runs'], 'run')}, {seconds(pause['seconds'])} together"
    if report.degraded:
        yield "degraded", ", ".join(f"{count} answered with {what}" for what, count in report.degraded.items())
    if report.results is not None:
        yield "results", _results(report.results)
    met = ", ".join(f"{count} {kind}" for kind, count in sorted(report.met.items()))
    yield "faults", met or "none met a call"


def _results(results: Mapping[str, int]) -> str:
    if results["different_in_baseline"] > 1:
        return "cannot be compared: those without faults differ among themselves"
    return f"{results['as_expected']} of {results['done']} are what they are without faults"


def _told(name: str, found: Measured) -> str:
    if found.value is None and name != "delay":
        return f"not known: {found.why}"
    return _TELL[name](found)


def _lost(found: Measured) -> str:
    calls, runs = counted(found.parts["model_calls"], "model call"), counted(found.parts["runs"], "run")
    return (
        f"{found.value:g}" if not found.value else f"{found.value:g}  {calls} whose error reached a run; {runs} failed"
    )


def _repeated(found: Measured) -> str:
    parts = [f"{counted(calls, 'model call')} answered again"] if (calls := found.parts["model_calls"]) else []
    parts += [
        f"{counted(each['calls'], 'call')} of {each['tool']} begun again (declared {each['effect']}: is it?)"
        for each in found.parts["tools"]
    ]
    return _with_parts(found, "; ".join(parts))


def _wasted(found: Measured) -> str:
    parts = [f"{count} {kind}" for kind, count in found.parts["failed"].items()]
    words = {"abandoned": "given up", "hedged": "beaten by another attempt", "cut_off": "cut off by a kill"}
    parts += [f"{found.parts[key]} {word}" for key, word in words.items() if found.parts[key]]
    return _with_parts(found, ", ".join(parts))


def _with_parts(found: Measured, parts: str) -> str:
    return f"{found.value:g}  {parts}".rstrip()


def _delay(found: Measured) -> str:
    if found.value is None:
        return f"not known: {found.why}" + (
            f"; the slowest run took {seconds(found.parts['slowest_run'])}" if found.parts else ""
        )
    return (
        f"{seconds(found.value)} on the slowest run ({seconds(found.parts['slowest_run'])} instead of "
        f"{seconds(found.parts['baseline']['slowest_run'])}), {seconds(found.parts['median'])} on the median"
    )


def _cost(found: Measured) -> str:
    unknown = found.parts["unpriced_calls"]
    more = f"; {counted(unknown, 'call')} of unknown price" if unknown else ""
    return f"{dollars(found.value or 0.0)}, {dollars(found.parts['wasted'])} of it wasted{more}"


def _back(found: Measured) -> str:
    each = ", ".join(
        f"{name} answers after {_maybe(told.answers)}, has its share after {_maybe(told.share)}"
        for name, told in found.parts["deployments"].items()
        if told.counts
    )
    return f"{seconds(found.value or 0.0)}  {each}"


_TELL: Mapping[str, Callable[[Any], str]] = {
    "lost": _lost,
    "repeated": _repeated,
    "wasted": _wasted,
    "delay": _delay,
    "cost": _cost,
    "return": _back,
}


def _maybe(value: float | None) -> str:
    return "-" if value is None else seconds(value)


def _verdict(verdict: Verdict) -> Iterator[tuple[str, str]]:
    mark, style = {True: ("ok", "green"), False: ("NOT SO", "bold red"), None: ("-", "dim")}[verdict.holds]
    measured = f"not measured: {verdict.why}" if verdict.measured is None else f"{verdict.measured:.4g}"
    yield f"  {mark:6}  {verdict.expectation.measure:<10}{verdict.expectation.text:<10}{measured}", style


def _deployments(rows: Sequence[DeploymentRow]) -> str:
    head = ("DEPLOYMENT", "REQUESTS", "ANSWERED", "FAILED", "WASTED", "COST", "SHARE", "ANSWERS AFTER", "BACK AFTER")
    lines = [_deployment(row) for row in rows]
    step = rows[0].step if rows else 1.0
    times = [line for row in rows for line in (f"  {plain(row.name):<20} {row.timeline}", f"  {'':<20} {row.illness}")]
    scale = f"\n  a character is {step:.3g} s: o answered, x failed, % both, . not asked; ! ill by the schedule"
    return "\n".join([table(head, lines), scale, *(line.rstrip() for line in times if line.strip())])


def _deployment(row: DeploymentRow) -> tuple[str, ...]:
    return (
        plain(row.name),
        str(row.requests),
        str(row.answered),
        str(row.failed),
        str(row.wasted),
        dollars(row.cost_usd),
        "-" if row.share_before is None else f"{row.share_before:.0%}",
        _maybe(row.first_answer_after),
        _maybe(row.back_after),
    )
