"""How many runs there are, and when each begins: so that there is work for as long as the schedule lasts.

A schedule that finds no work tries nothing. So where nobody says how many runs there are to be, the next one begins
when one has ended, up to some seconds after the last fault; of a given number each begins at its part of the schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAST_RUNS, MOST_RUNS = 8, 400
"""How many runs there are when nobody says."""

AT_A_TIME = 8
"""How many of them at a time."""

AFTER = 5.0
"""Seconds of work after the last fault, so that it is seen how deployments come back."""

BASELINE_RUNS = 16
"""A baseline has no more."""


@dataclass(frozen=True)
class Plan:
    """How many runs, ``concurrency`` at a time, ``interval`` seconds of the schedule between two beginnings at least.

    ``runs`` is how many there are at most; after ``until`` seconds none begins any more, if ``least`` have.
    """

    runs: int
    concurrency: int
    interval: float = 0.0
    least: int = 0
    until: float = 0.0

    def is_over(self, begun: int, age: float) -> bool:
        """Whether no other run is to begin; ``age`` is the time of the schedule."""
        return begun >= self.runs or (begun >= self.least and age >= self.until)

    def may_begin(self, begun: int, unfinished: int, age: float) -> bool:
        """Whether another run may begin now."""
        return not self.is_over(begun, age) and unfinished < self.concurrency and begun * self.interval <= age


def baseline_plan(runs: int | None, concurrency: int | None) -> Plan:
    """Plan the baseline: its runs all begin at once."""
    wanted = min(runs or LEAST_RUNS, BASELINE_RUNS)
    return Plan(wanted, concurrency or min(wanted, AT_A_TIME), least=wanted)


def drill_plan(runs: int | None, concurrency: int | None, span: float) -> Plan:
    """Plan the drill.

    Args:
        runs: What was asked for, if anything.
        concurrency: The same.
        span: Seconds that the schedule lasts.
    """
    if runs is not None:
        interval = 0.0 if concurrency is not None or runs == 1 else (span + AFTER) / (runs - 1)
        return Plan(runs, concurrency or runs, interval, least=runs)
    until = span + AFTER
    return Plan(MOST_RUNS, concurrency or AT_A_TIME, until / MOST_RUNS, LEAST_RUNS, until)
