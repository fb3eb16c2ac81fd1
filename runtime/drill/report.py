"""The report: what was counted, what was expected of it, and where to look next."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ridethrough.runtime.drill.evidence import Evidence, Request
from ridethrough.runtime.drill.ground import Ground, shown
from ridethrough.runtime.drill.measure import Back, Calls, Measured, calls_of, durations, measure
from ridethrough.runtime.drill.windows import Illness
from ridethrough.runtime.router.providers.simulated import MEASURES, Expectation, Scenario
from ridethrough.runtime.views import AttemptView, RunView

LONGEST_TIMELINE = 60
"""Characters of a deployment's timeline."""

LEAST = 1e-9


@dataclass(frozen=True)
class Verdict:
    """An expectation and what was measured. ``holds`` is ``None`` when nobody wanted it measured."""

    expectation: Expectation
    measured: float | None
    holds: bool | None
    why: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        named = {"measure": self.expectation.measure, "expected": self.expectation.text}
        return {**named, "measured": self.measured, "holds": self.holds, **({"why": self.why} if self.why else {})}


@dataclass(frozen=True)
class DeploymentRow:
    """What became of one deployment. Times are seconds of the schedule.

    ``timeline`` has a character for each ``step`` seconds: ``.`` nobody asked, ``o`` answered, ``x`` failed, ``%``
    both; ``illness`` has ``!`` where it was ill by the schedule.
    """

    name: str
    requests: int
    answered: int
    failed: int
    wasted: int
    cost_usd: float
    first_answer_after: float | None
    share_before: float | None
    back_after: float | None
    step: float
    timeline: str
    illness: str


@dataclass(frozen=True)
class Report:
    """What a drill came to."""

    scenario: Scenario
    target: str
    folder: str
    database: str
    concurrency: int
    seconds: float
    runs: Mapping[str, int]
    measures: Mapping[str, Measured]
    verdicts: Sequence[Verdict]
    deployments: Sequence[DeploymentRow]
    kills: int
    pauses: Sequence[Mapping[str, Any]]
    degraded: Mapping[str, int]
    met: Mapping[str, int]
    baseline: Mapping[str, Any] | None
    results: Mapping[str, int] | None
    next: Sequence[str]
    trouble: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def ok(self) -> bool:
        """Whether all expectations hold; without any, whether nothing was lost or repeated."""
        if self.trouble:
            return False
        if self.verdicts:
            return all(each.holds is not False for each in self.verdicts)
        return not self.measures["lost"].value and not self.measures["repeated"].value

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "ok": self.ok,
            "scenario": self.scenario.name,
            "description": self.scenario.description,
            "workflow": self.target,
            "folder": self.folder,
            "database": self.database,
            "concurrency": self.concurrency,
            "seconds": round(self.seconds, 3),
            "runs": dict(self.runs),
            "measures": {name: {**each.as_json(), "unit": MEASURES[name]} for name, each in self.measures.items()},
            "kills": self.kills,
            "pauses": [dict(each) for each in self.pauses],
            "degraded": dict(self.degraded),
            "faults_met": dict(self.met),
            "deployments": [vars(each) for each in self.deployments],
            "baseline": None if self.baseline is None else dict(self.baseline),
            "results": None if self.results is None else dict(self.results),
            "expectations": [each.as_json() for each in self.verdicts],
            "trouble": list(self.trouble),
            "notes": list(self.notes),
            "next": list(self.next),
        }


@dataclass(frozen=True)
class Facts:
    """What a report is made of."""

    ground: Ground
    scenario: Scenario
    target: str
    concurrency: int
    drill: Evidence
    baseline: Evidence | None
    ill: Mapping[str, Illness]


def report_of(facts: Facts) -> Report:
    """Count."""
    drill, baseline, course = facts.drill, facts.baseline, facts.drill.course
    measures = measure(drill, baseline, facts.ill)
    statuses = Counter(run.status for run in drill.runs)
    left = len(drill.unfinished)
    done = {"done": statuses["done"], "failed": statuses["failed"] + statuses["cancelled"], "unfinished": left}
    met = faults_met(facts)
    return Report(
        facts.scenario,
        facts.target,
        shown(facts.ground.folder.parent),
        shown(facts.ground.database),
        facts.concurrency,
        course.ended - (course.began if course.began is not None else course.ended),
        {"started": len(drill.runs), **done},
        measures,
        verdicts(facts.scenario.expect, measures, has_baseline=baseline is not None),
        _rows(facts, measures["return"]),
        len(course.kills),
        _pauses(drill),
        _degraded(drill),
        met,
        None if baseline is None else _baseline(baseline),
        None if baseline is None else _results(drill, baseline),
        list(_next(facts)),
        list(_trouble(facts, met)),
        list(_notes(facts, met)),
    )


def verdicts(expected: Sequence[Expectation], measures: Mapping[str, Measured], *, has_baseline: bool) -> list[Verdict]:
    """Compare. What could not be measured does not hold, unless it is a delay and nobody wanted a baseline."""
    return [_verdict(each, measures[each.measure], has_baseline) for each in expected]


def _verdict(expectation: Expectation, found: Measured, has_baseline: bool) -> Verdict:
    if found.value is not None:
        return Verdict(expectation, found.value, expectation.holds(found.value))
    unwanted = expectation.measure == "delay" and not has_baseline
    return Verdict(expectation, None, None if unwanted else False, found.why)


# --- parts ----------------------------------------------------------------------------------------------------------


def _pauses(drill: Evidence) -> list[dict[str, Any]]:
    reasons = sorted({each.reason for each in drill.pauses})
    return [
        {
            "reason": reason,
            "runs": len({each.run for each in drill.pauses if each.reason == reason}),
            "times": sum(each.reason == reason for each in drill.pauses),
            "seconds": round(sum(each.seconds for each in drill.pauses if each.reason == reason), 3),
        }
        for reason in reasons
    ]


def _degraded(drill: Evidence) -> dict[str, int]:
    """How many answers were less than what was asked for, by what they were: a tier, ``cache`` or ``static``."""
    steps = [step for run in drill.all_runs for step in run.steps or () if step.kind == "model"]
    said = [step.output.get("degraded") for step in steps if isinstance(step.output, dict)]
    return dict(Counter(str(each) for each in said if each))


def faults_met(facts: Facts) -> dict[str, int]:
    """How often the schedule's faults met anything, by kind; ``refuse`` is known from what the router says of it."""
    found = Counter(each.fault for each in facts.drill.requests if each.fault is not None)
    found.update(f"tool {fault}" for each in facts.drill.tools for fault in each.faults)
    refused = [attempt for _, attempt in facts.drill.attempts if _was_refused(facts, attempt)]
    if refused:
        found["refuse"] += len(refused)
    return dict(found)


def _was_refused(facts: Facts, attempt: AttemptView) -> bool:
    ill = facts.ill.get(attempt.deployment)
    at = facts.drill.course.seconds_at(attempt.started_at.timestamp())
    shut = ill is not None and any(fault.closes and fault.lasts_at(at) for fault in ill.faults)
    return shut and attempt.verdict == "Transport"


def _baseline(baseline: Evidence) -> dict[str, Any]:
    times = durations(baseline)
    cost = sum(attempt.cost_usd or 0.0 for _, attempt in baseline.attempts)
    calls = sum(step.kind == "model" for run in baseline.all_runs for step in run.steps or ())
    return {
        "runs": len(baseline.runs),
        "model_calls": calls,
        "slowest_run": max(times, default=0.0),
        "cost_usd": cost,
    }


def _results(drill: Evidence, baseline: Evidence) -> dict[str, int]:
    """How many runs came to a result that a run of the baseline has, too."""
    known = {json.dumps(run.result, sort_keys=True) for run in baseline.runs}
    done = [json.dumps(run.result, sort_keys=True) for run in drill.runs if run.status == "done"]
    return {"done": len(done), "as_expected": sum(each in known for each in done), "different_in_baseline": len(known)}


def _trouble(facts: Facts, met: Mapping[str, int]) -> Iterator[str]:
    """Why the drill is none, or did not come to its end."""
    course = facts.drill.course
    if course.trouble:
        yield course.trouble
    if left := facts.drill.unfinished:
        reasons = Counter(run.pause.reason if run.pause else run.status for run in left)
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        limit = " when the limit was reached" if course.limited else ""
        yield f"{len(left)} of {len(facts.drill.runs)} runs had not ended{limit} ({told})"
    yield from _untried(facts, met)


def _untried(facts: Facts, met: Mapping[str, int]) -> Iterator[str]:
    """What of the schedule was not tried: expectations that hold without it say nothing."""
    scenario, tools = facts.scenario, [kind for kind in met if kind.startswith("tool ")]
    more = "give more runs (--runs), or fewer at a time (--concurrency)"
    if scenario.faults and len(met) == len(tools):
        yield f"no fault of a provider met a call, so none was tried: {more}"
    elif scenario.tools and not scenario.faults and not scenario.kills and not tools:
        yield f"no fault of a tool met a call, so none was tried: {_UNCALLED}"
    elif scenario.kills and not scenario.faults and not facts.drill.course.kills:
        yield f"no process was killed, because all runs had ended: {more}"


_UNCALLED = "do the models' answers call those tools (--script)?"


def _notes(facts: Facts, met: Mapping[str, int]) -> Iterator[str]:
    for due in facts.drill.course.missed:
        yield f"the kill at {due:g} s did not happen: all runs had ended"
    if facts.scenario.tools and not any(kind.startswith("tool ") for kind in met):
        yield f"none of the schedule's tool faults met a call: {_UNCALLED}"
    for name, route in facts.ground.loaded().routes.items():
        if len(route.models) == 1 and any(attempt.route == name for _, attempt in facts.drill.attempts):
            yield f"route {name} has one deployment: when that fails, nobody else can answer"


def _next(facts: Facts) -> Iterator[str]:
    """What to type next: the runs that fared worst, then all."""
    options, drill = facts.ground.commands, facts.drill
    worst = [run for run in drill.runs if run.status in ("failed", "cancelled")] + drill.unfinished
    slowest = max(drill.runs, key=_seconds, default=None)
    for run in [*worst[:3], *([slowest] if slowest is not None else [])]:
        yield options.command("show", run.id, "--steps")
    yield options.command("runs")


def _seconds(run: RunView) -> float:
    if run.started_at is None or run.finished_at is None:
        return 0.0
    return (run.finished_at - run.started_at).total_seconds()


# --- deployments ----------------------------------------------------------------------------------------------------


def _is_used(facts: Facts, stand_in: Any) -> bool:
    """Whether a deployment is worth a row: a server for whatever else is asked of a provider mostly is not."""
    name = stand_in.deployment
    asked = any(each.deployment == name for each in facts.drill.requests)
    return asked or (stand_in.model is not None and (name in facts.ill or len(facts.ground.line) <= 12))


def _rows(facts: Facts, back: Measured) -> list[DeploymentRow]:
    calls = calls_of(facts.drill)
    return [_row(facts, calls, each.deployment, back) for each in facts.ground.line if _is_used(facts, each)]


def _row(facts: Facts, calls: Calls, name: str, back: Measured) -> DeploymentRow:
    attempts = [attempt for _, attempt in facts.drill.attempts if attempt.deployment == name]
    returned: Back | None = back.parts.get("deployments", {}).get(name)
    finished = [each for each in calls.finished if each.deployment == name]
    cut_off = [each for each in calls.cut_off if each.deployment == name]
    step = _step(facts.drill)
    return DeploymentRow(
        name,
        sum(each.deployment == name for each in facts.drill.requests),
        len(finished),
        sum(attempt.verdict not in ("ok", "hedged", "abandoned") for attempt in attempts),
        sum(attempt.wasted for attempt in attempts) + len(cut_off),
        sum(attempt.cost_usd or 0.0 for attempt in attempts),
        returned.answers if returned else None,
        returned.usual_share if returned else None,
        returned.share if returned else None,
        step,
        _timeline(facts.drill, attempts, finished, cut_off, step),
        _illness(facts, name, step),
    )


def _step(drill: Evidence) -> float:
    return max(1.0, _lasted(drill) / LONGEST_TIMELINE)


def _lasted(drill: Evidence) -> float:
    return max(LEAST, drill.course.seconds_at(drill.course.ended))


def _timeline(
    drill: Evidence,
    attempts: Sequence[AttemptView],
    finished: Sequence[Request],
    cut_off: Sequence[Request],
    step: float,
) -> str:
    places: list[set[str]] = [set() for _ in range(int(_lasted(drill) / step) + 1)]
    moments = [(attempt.started_at.timestamp(), "x") for attempt in attempts if attempt.verdict != "ok"]
    moments += [(each.started, "x") for each in cut_off] + [(each.started, "o") for each in finished]
    for moment, mark in moments:
        place = int(drill.course.seconds_at(moment) / step)
        places[min(max(0, place), len(places) - 1)].add(mark)
    return "".join("%" if len(place) > 1 else next(iter(place), ".") for place in places)


def _illness(facts: Facts, name: str, step: float) -> str:
    ill = facts.ill.get(name)
    places = range(int(_lasted(facts.drill) / step) + 1)
    return "".join("!" if ill is not None and ill.lasts_at((place + 0.5) * step) else " " for place in places).rstrip()
