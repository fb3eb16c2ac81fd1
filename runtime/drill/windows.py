"""When a deployment is ill by the schedule, and when that is over."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ridethrough.runtime.drill.lineup import StandIn, faults_of
from ridethrough.runtime.router.providers.simulated import Fault, Scenario


@dataclass(frozen=True)
class Illness:
    """The times of all faults of one deployment together; ``end`` is ``None`` when it does not get well."""

    faults: Sequence[Fault]

    @property
    def start(self) -> float:
        """When the first one begins, in seconds of the schedule."""
        return min(fault.start for fault in self.faults)

    @property
    def end(self) -> float | None:
        """When the last one is over."""
        ends = [last_moment(fault) for fault in self.faults]
        return None if math.inf in ends else max(ends)

    def lasts_at(self, age: float) -> bool:
        """Whether any lasts at ``age``."""
        return any(fault.lasts_at(age) for fault in self.faults)

    def kinds_at(self, age: float) -> list[str]:
        """What it has at ``age``."""
        return list(dict.fromkeys(fault.kind for fault in self.faults if fault.lasts_at(age)))


def illnesses(line: Sequence[StandIn], scenario: Scenario) -> dict[str, Illness]:
    """Return what each deployment has; those that are well are left out, and so is what is not listed."""
    listed = [each for each in line if each.position is not None]
    found = {each.deployment: faults_of(each, scenario.faults, line) for each in listed}
    return {name: Illness(faults) for name, faults in found.items() if faults}


def last_moment(fault: Fault) -> float:
    """Return when it is over for good; infinity when it is not."""
    if fault.end is None:
        return math.inf
    if fault.every is None:
        return fault.end
    rounds = math.ceil((fault.end - fault.start) / fault.every) - 1
    return min(fault.end, fault.start + rounds * fault.every + (fault.lasts or fault.every / 2))


def mended(ill: Mapping[str, Illness]) -> float | None:
    """Return when all are well; ``None`` if they never are."""
    return _latest(each.end for each in ill.values())


def span(ill: Mapping[str, Illness], scenario: Scenario) -> float:
    """Return for how many seconds the schedule has something to do; of what has no end its beginning counts."""
    faults = [fault for each in ill.values() for fault in each.faults]
    ends = [last_moment(fault) for fault in faults]
    moments = [fault.start if math.isinf(end) else end for fault, end in zip(faults, ends, strict=True)]
    moments += [kill.at for kill in scenario.kills]
    moments += [fault.start if fault.end is None else fault.end for fault in scenario.tools]
    return max(moments, default=0.0)


def _latest(ends: Iterable[float | None]) -> float | None:
    latest = 0.0
    for end in ends:
        if end is None:
            return None
        latest = max(latest, end)
    return latest
