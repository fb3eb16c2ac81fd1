"""What a course leaves behind, read from what lies outside of its processes: database, servers' ledgers, tools' ledger.

Nothing that a report says is known from anywhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from ridethrough.runtime import views
from ridethrough.runtime.drill.ground import Ground
from ridethrough.runtime.store import Store
from ridethrough.runtime.tables import FINAL

RUN_LABEL = "x-ridethrough-run-id"


@dataclass(frozen=True)
class Killed:
    """A process that was killed, in seconds since the epoch, and when it should have been by the schedule."""

    pid: int
    at: float
    due: float


@dataclass
class Course:
    """How a course went: ``began`` is when the schedule's clock was started, in seconds since the epoch.

    ``ids`` are those of the runs that were begun.
    """

    began: float | None = None
    ended: float = 0.0
    ids: list[str] = field(default_factory=list[str])
    kills: list[Killed] = field(default_factory=list[Killed])
    missed: list[float] = field(default_factory=list[float])
    """Kills (by the schedule) that came when no process was left."""
    limited: bool = False
    """Whether it was ended by the limit."""
    trouble: str | None = None

    def seconds_at(self, moment: float) -> float:
        """A moment on the schedule's clock."""
        return moment - (self.began if self.began is not None else self.ended)


@dataclass(frozen=True)
class Request:
    """A request as a server saw it. ``ended`` is ``None`` when the server was closed first."""

    deployment: str
    number: int
    run: str | None
    digest: str
    fault: str | None
    started: float
    ended: float | None
    status: int
    error: str | None

    @property
    def whole(self) -> bool:
        """Whether it was answered whole."""
        return self.status == 200 and self.error is None


@dataclass(frozen=True)
class ToolCall:
    """What befell a tool call: how often its function began, and what the schedule did to it."""

    run: str
    call: str
    tool: str
    effect: str
    begun: int
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Paused:
    """A run that was parked for ``seconds`` (until the course's end, if nothing woke it)."""

    run: str
    reason: str
    seconds: float


@dataclass(frozen=True)
class Evidence:
    """All that is counted. ``runs`` are those that were started, ``children`` those that they started."""

    course: Course
    runs: Sequence[views.RunView]
    children: Sequence[views.RunView]
    requests: Sequence[Request]
    tools: Sequence[ToolCall]
    pauses: Sequence[Paused]

    @property
    def all_runs(self) -> list[views.RunView]:
        """The runs and their children."""
        return [*self.runs, *self.children]

    @property
    def attempts(self) -> list[tuple[str, views.AttemptView]]:
        """Every attempt with its run's id, in order."""
        found = [(run.id, attempt) for run in self.all_runs for attempt in run.attempts or ()]
        return sorted(found, key=lambda each: each[1].started_at)

    @property
    def unfinished(self) -> list[views.RunView]:
        """The runs that had not ended."""
        return [run for run in self.runs if run.status not in FINAL]


def gather(ground: Ground, course: Course) -> Evidence:
    """Read the evidence; the processes have ended."""
    ids = course.ids
    store = ground.options.store()
    try:
        views_, pauses = store.read_now(lambda connection: _of_runs(store, connection, course))
    finally:
        store.close()
    return Evidence(
        course,
        [views_[run_id] for run_id in ids if run_id in views_],
        [run for run_id, run in views_.items() if run_id not in set(ids)],
        [
            request
            for number, each in enumerate(ground.line)
            for request in _requests(each.deployment, ground.ledger(number))
        ],
        list(_tool_calls(ground.tool_ledger)),
        pauses,
    )


# --- the database ---------------------------------------------------------------------------------------------------

_NO_TROUBLE = ("timer", "signal", "question", "approval", "child", "operator")
"""Pauses for which no model is to blame."""


def _of_runs(store: Store, connection: Connection, course: Course) -> tuple[dict[str, views.RunView], list[Paused]]:
    ids = [row.id for row in store.runs(connection, limit=None)]
    pauses = [pause for run_id in ids for pause in _pauses(store, connection, run_id, course)]
    return {run_id: views.show_run(store, connection, run_id, steps=True) for run_id in ids}, pauses


def _pauses(store: Store, connection: Connection, run_id: str, course: Course) -> Iterator[Paused]:
    reason, since = None, 0.0
    for row in store.events(connection, run_id):
        if reason is not None:
            yield Paused(run_id, reason, row.at - since)
            reason = None
        if row.type == "run_paused" and (told := json.loads(row.data)["reason"]) not in _NO_TROUBLE:
            reason, since = told, row.at
    if reason is not None:
        yield Paused(run_id, reason, max(0.0, course.ended - since))


# --- ledgers --------------------------------------------------------------------------------------------------------


def _requests(deployment: str, path: Path) -> list[Request]:
    started: dict[int, dict[str, Any]] = {}
    found: dict[int, Request] = {}
    for line in _lines(path):
        number = line["number"]
        begun = line["event"] == "started"
        if begun:
            started[number] = line
        first = started.get(number, line)
        found[number] = Request(
            deployment,
            number,
            line["headers"].get(RUN_LABEL),
            line["digest"],
            line["fault"],
            first["at"],
            None if begun else line["at"],
            line["status"],
            line["error"],
        )
    return list(found.values())


def _tool_calls(path: Path) -> Iterator[ToolCall]:
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in _lines(path):
        lines.setdefault((line["run"], line["call"]), []).append(line)
    for (run, call), said in lines.items():
        begun = sum(line["event"] == "begun" for line in said)
        faults = tuple(line["fault"] for line in said if line["event"] == "called" and line["fault"])
        yield ToolCall(run, call, said[0]["tool"], said[0]["effect"], begun, faults)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
