"""Counting: what the evidence says was lost, repeated, wasted, delayed and spent, and how long the way back took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ridethrough.runtime.drill.evidence import Evidence, Request
from ridethrough.runtime.drill.windows import Illness
from ridethrough.runtime.views import AttemptView, RunView

IN_THE_AIR = 0.25
"""Seconds before a kill: an answer so young may not have been on record yet, and is then rightly asked for again."""

SHARE = 0.8
"""The part of its usual share that a deployment has when it is back."""

LOOKED_AT, LEAST_LOOKED_AT = 10, 3
"""Attempts among which a share is counted; fewer where the drill ends, but not fewer than that."""

MATCHING = 0.25
"""Seconds between the router's and the server's idea of when a request began."""


@dataclass(frozen=True)
class Measured:
    """One measure: ``value`` is what expectations are about (``None`` when it is not known), ``parts`` the rest."""

    value: float | None
    parts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    why: str = ""
    """Why there is no value."""

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        parts = {name: _plain(part) for name, part in self.parts.items()}
        return {"value": self.value, **parts, **({"why": self.why} if self.why else {})}


def _plain(part: Any) -> Any:
    if isinstance(part, Mapping):
        return {name: _plain(each) for name, each in part.items()}
    return vars(part) if isinstance(part, Back) else part


def measure(drill: Evidence, baseline: Evidence | None, ill: Mapping[str, Illness]) -> dict[str, Measured]:
    """Return all that a scenario may have expectations of, by name."""
    calls = calls_of(drill)
    return {
        "lost": lost(drill),
        "repeated": repeated(drill, baseline, calls),
        "wasted": wasted(drill, calls),
        "delay": delay(drill, baseline),
        "cost": cost(drill),
        "return": back(drill, baseline, ill),
    }


# --- calls ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calls:
    """What became of the requests: ``finished`` were answered whole and taken, ``cut_off`` died with a process."""

    finished: Sequence[Request]
    cut_off: Sequence[Request]


def calls_of(drill: Evidence) -> Calls:
    """Sort the requests.

    An answer to an attempt that the router had given up is none. What was on its way when a process was killed was
    cut off; so was what had been answered so shortly before that it was not on record.
    """
    taken = _taken(drill)
    open_ = [
        each
        for kill in drill.course.kills
        for each in drill.requests
        if each.started < kill.at and (each.ended is None or each.ended > kill.at)
    ]
    closed = [each for each in taken if each not in open_]
    air = _in_the_air(drill, closed)
    return Calls([each for each in closed if each not in air], [*open_, *air])


def _taken(drill: Evidence) -> list[Request]:
    """The whole answers, without those to attempts that the router had given up.

    Calls of one run go on side by side, so each attempt that was answered has the request nearest to it, and only what
    is left over may be that of one that was given up. Who has read an answer's last event may close before the server
    is done: the router's word counts then.
    """
    whole = [each for each in drill.requests if each.whole]
    closed = [each for each in drill.requests if each.error == "client"]
    answered = [each for each in drill.attempts if _answered(each[1])]
    found, without = _matched(whole, answered)
    found += _matched(closed, without)[0]
    _matched(whole, [each for each in drill.attempts if each[1].wasted])
    return [*found, *whole]


def _matched(
    requests: list[Request], attempts: Iterable[tuple[str, AttemptView]]
) -> tuple[list[Request], list[tuple[str, AttemptView]]]:
    """Take each attempt's request out of ``requests``; return those, and the attempts that have none."""
    found: list[Request] = []
    without: list[tuple[str, AttemptView]] = []
    for run_id, attempt in attempts:
        own = [each for each in requests if _is_of(each, run_id, attempt)]
        if own:
            found.append(nearest := min(own, key=lambda each: _distance(each, attempt)))
            requests.remove(nearest)
        else:
            without.append((run_id, attempt))
    return found, without


def _distance(request: Request, attempt: AttemptView) -> float:
    """Seconds by which a request began and ended at another time than an attempt."""
    started = attempt.started_at.timestamp()
    left = started + attempt.seconds
    return abs(request.started - started) + abs((request.ended or left) - left)


def _is_of(request: Request, run_id: str, attempt: AttemptView) -> bool:
    """Whether a request may be that of an attempt: it did not end before it."""
    if request.run != run_id or request.deployment != attempt.deployment:
        return False
    started = attempt.started_at.timestamp()
    left = started + attempt.seconds
    return abs(request.started - started) < MATCHING and (request.ended or left) > left - 0.05


def _in_the_air(drill: Evidence, answered: Sequence[Request]) -> list[Request]:
    """The answers that a kill caught before they were on record."""
    runs = {run.id: run for run in drill.all_runs}
    found: list[Request] = []
    for kill in drill.course.kills:
        before: dict[str | None, list[Request]] = {}
        for each in answered:
            if each.ended is not None and each.ended <= kill.at and each not in found:
                before.setdefault(each.run, []).append(each)
        for run_id in {each.run for each in answered if kill.at - IN_THE_AIR < (each.ended or 0.0) <= kill.at}:
            mine = sorted(before.get(run_id, ()), key=lambda each: each.ended or 0.0)
            missing = len(mine) - (_on_record(runs[run_id], kill.at) if run_id in runs else 0)
            young = [each for each in mine if (each.ended or 0.0) > kill.at - IN_THE_AIR]
            found += young[-missing:] if missing > 0 else []
    return found


def _on_record(run: RunView, moment: float) -> int:
    ends = [step.ended_at for step in run.steps or () if step.kind == "model" and step.status == "done"]
    return sum(end is not None and end.timestamp() <= moment for end in ends)


# --- lost -----------------------------------------------------------------------------------------------------------


def lost(drill: Evidence) -> Measured:
    """Model calls whose error reached a run, and runs that failed without one."""
    calls = {run.id: _failed_calls(run) for run in drill.all_runs}
    failed = [run.id for run in drill.runs if run.status in ("failed", "cancelled")]
    alone = [run_id for run_id in failed if not calls[run_id]]
    value = sum(calls.values()) + len(alone)
    return Measured(value, {"runs": len(failed), "model_calls": sum(calls.values())})


def _failed_calls(run: RunView) -> int:
    return sum(step.kind == "model" and step.status == "failed" for step in run.steps or ())


# --- repeated -------------------------------------------------------------------------------------------------------


def repeated(drill: Evidence, baseline: Evidence | None, calls: Calls) -> Measured:
    """Finished model calls that were made again, and tool calls whose function was begun again.

    A model call is known by what was asked (and by its run); what a run of the baseline asks several times may be
    asked as often here. A tool is not believed that it may be repeated: whether a ``read`` reads is for people to see.
    """
    answers = Counter((each.run, each.digest) for each in calls.finished)
    usual = _usual(baseline)
    again = sum(max(0, times - max(1, usual[digest])) for (_, digest), times in answers.items())
    begun = [each for each in drill.tools if each.begun > 1]
    times = sum(each.begun - 1 for each in begun)
    tools = Counter((each.tool, each.effect) for each in begun)
    told = [{"tool": tool, "effect": effect, "calls": count} for (tool, effect), count in sorted(tools.items())]
    return Measured(again + times, {"model_calls": again, "tool_calls": times, "tools": told})


def _usual(baseline: Evidence | None) -> Counter[str]:
    """How often one run asks the same thing."""
    times = Counter((each.run, each.digest) for each in (baseline.requests if baseline else ()) if each.whole)
    usual: Counter[str] = Counter()
    for (_, digest), count in times.items():
        usual[digest] = max(usual[digest], count)
    return usual


# --- wasted, cost ---------------------------------------------------------------------------------------------------


def wasted(drill: Evidence, calls: Calls) -> Measured:
    """Attempts that failed, were abandoned, or lost against another one; and what a kill cut off."""
    attempts = [attempt for _, attempt in drill.attempts if attempt.wasted]
    kinds = Counter(attempt.verdict for attempt in attempts)
    failed = {kind: count for kind, count in sorted(kinds.items()) if kind not in ("hedged", "abandoned", "ok")}
    parts = {
        "failed": failed,
        "abandoned": kinds["abandoned"],
        "hedged": kinds["hedged"] + kinds["ok"],
        "cut_off": len(calls.cut_off),
    }
    return Measured(len(attempts) + len(calls.cut_off), parts)


def cost(drill: Evidence) -> Measured:
    """USD as the database has it, of steps and of attempts that were wasted; of what a kill cut off nobody knows."""
    kept = sum(run.cost_usd for run in drill.all_runs)
    waste = sum(attempt.cost_usd or 0.0 for _, attempt in drill.attempts if attempt.wasted)
    unknown = sum(run.usage.unpriced_calls for run in drill.all_runs)
    return Measured(kept + waste, {"wasted": waste, "unpriced_calls": unknown})


# --- delay ----------------------------------------------------------------------------------------------------------


def delay(drill: Evidence, baseline: Evidence | None) -> Measured:
    """Seconds that the slowest run took longer than the slowest of the baseline; the same of the median."""
    now = durations(drill)
    if not now:
        return Measured(None, why="no run was executed")
    parts: dict[str, Any] = {"slowest_run": max(now), "median_run": median(now)}
    before = durations(baseline) if baseline is not None else []
    if not before:
        return Measured(None, parts, why="there is no baseline")
    slowest, middle = max(0.0, max(now) - max(before)), max(0.0, median(now) - median(before))
    usual = {"slowest_run": max(before), "median_run": median(before)}
    return Measured(slowest, {"median": middle, **parts, "baseline": usual})


def durations(evidence: Evidence) -> list[float]:
    """How long each run took from when it was taken up first, in seconds; up to now if it has not ended."""
    ended = evidence.course.ended
    spans = [(run.started_at, run.finished_at.timestamp() if run.finished_at else ended) for run in evidence.runs]
    return [end - started.timestamp() for started, end in spans if started is not None]


# --- the way back ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Back:
    """How a deployment came back: seconds from the end of its faults, ``None`` where that was not seen.

    ``asked`` is how often it was asked since, ``seen`` how often any of its routes was, in the ``watched`` seconds.
    """

    end: float
    answers: float | None
    share: float | None
    usual_share: float | None
    asked: int
    seen: int
    watched: float

    @property
    def seconds(self) -> float | None:
        """When it had its share again, or answered, where a share cannot be told."""
        return self.answers if self.usual_share is None or self.seen < LEAST_LOOKED_AT else self.share

    @property
    def counts(self) -> bool:
        """Whether it has a share to come back to: a reserve that nobody asks in good times has none."""
        return self.usual_share is None or self.usual_share > 0


def back(drill: Evidence, baseline: Evidence | None, ill: Mapping[str, Illness]) -> Measured:
    """Seconds until the last deployment that gets well has 80 % of its share again."""
    found = {name: each for name in ill if (each := comes_back(name, ill[name], drill, baseline)) is not None}
    told = dict(found)
    counted = {name: each for name, each in found.items() if each.counts}
    if not counted:
        return Measured(None, {"deployments": told}, why="no deployment in use gets well again by the schedule")
    for name, each in counted.items():
        if each.seconds is None:
            why = f"{name} was not back when the drill ended, {each.watched:.1f} s after its last fault"
            if not each.asked:
                why = f"nobody asked {name} after its last fault was over"
            return Measured(None, {"deployments": told}, why=why)
    return Measured(max(each.seconds or 0.0 for each in counted.values()), {"deployments": told})


def comes_back(name: str, ill: Illness, drill: Evidence, baseline: Evidence | None) -> Back | None:
    """See how ``name`` comes back; ``None`` when it never gets well, or the schedule did not begin."""
    end, course = ill.end, drill.course
    if end is None or course.began is None:
        return None
    routes = {attempt.route for _, attempt in drill.attempts if attempt.deployment == name}
    rivals = [attempt for _, attempt in drill.attempts if attempt.route in routes]
    later = [each for each in rivals if _at(drill, each) >= end]
    own = [each for each in later if each.deployment == name]
    answered = [_at(drill, each) + each.seconds - end for each in own if _answered(each)]
    usual = _usual_share(name, ill, drill, baseline, routes)
    regained = _regained(name, later, usual) if usual else None
    return Back(
        end,
        min(answered, default=None),
        None if regained is None else _at(drill, regained) + regained.seconds - end,
        usual,
        len(own),
        len(later),
        max(0.0, course.seconds_at(course.ended) - end),
    )


def _at(drill: Evidence, attempt: AttemptView) -> float:
    return drill.course.seconds_at(attempt.started_at.timestamp())


def _answered(attempt: AttemptView) -> bool:
    return attempt.verdict == "ok" and not attempt.wasted


def _usual_share(
    name: str, ill: Illness, drill: Evidence, baseline: Evidence | None, routes: Iterable[str]
) -> float | None:
    """The part of the attempts of its routes that it has when all are well; ``None`` when that was not seen."""
    known = set(routes)
    if baseline is not None:
        seen = [attempt for _, attempt in baseline.attempts if attempt.route in known or not known]
    else:
        seen = [attempt for _, attempt in drill.attempts if attempt.route in known and _at(drill, attempt) < ill.start]
    return sum(attempt.deployment == name for attempt in seen) / len(seen) if seen else None


def _regained(name: str, later: Sequence[AttemptView], usual: float) -> AttemptView | None:
    """The first answer of its own from which on it has its share."""
    for index, attempt in enumerate(later):
        looked_at = later[index : index + LOOKED_AT]
        if attempt.deployment != name or not _answered(attempt) or len(looked_at) < LEAST_LOOKED_AT:
            continue
        own = sum(each.deployment == name and _answered(each) for each in looked_at)
        if own >= SHARE * usual * len(looked_at):
            return attempt
    return None
