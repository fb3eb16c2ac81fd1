"""What the two simulated providers of the demonstration say, and how the first of them fails.

Both know the same answers. They differ in health: ``north`` answers its first calls, then breaks the stream of
one and refuses everything that comes after. ``south`` is well, but takes very long over two answers
the first time that it is asked for them, so that a process can die while it waits for them.
"""

from __future__ import annotations

import json

from ridethrough.agents.demo.team import ARCHIVE
from ridethrough.runtime.router.providers.simulated import Answer, Call, Fault, Rule, Script, SimRequest

MODEL = "simulated-1"

HEALTHY_CALLS = 5
"""How many calls ``north`` answers before it fails."""

SLOW_ANGLES = ("Where tides are highest", "What tides do to the day")
"""Their answers are half written when the process dies."""

FAST, SLOW = 0.008, 0.4
"""Seconds for a token."""


def north() -> Script:
    """The provider that fails on the way."""
    first = HEALTHY_CALLS + 1
    faults = [
        Fault(kind="cut", after=4, requests=(first,)),
        Fault(kind="status", status=503, requests=tuple(range(first + 1, 1000))),
    ]
    return _script([], faults)


def south() -> Script:
    """The provider that takes over."""
    slow = [Rule(_finding(SLOW), user=angle, result=_FOUND, times=1) for angle in SLOW_ANGLES]
    return _script(slow, [])


def _script(before: list[Rule], faults: list[Fault]) -> Script:
    return Script([*before, *_rules()], faults, latency=0.12, per_token=FAST, models=(MODEL,))


def _rules() -> list[Rule]:
    mail = {"to": "readers@example.org", "subject": "{{user}} is under way"}
    plan = {"title": "{{user}}", "angles": list(ARCHIVE)}
    return [
        Rule(Answer(calls=(Call("send_mail", mail),)), system="You plan", not_called="send_mail"),
        Rule(plan, system="You plan"),
        Rule(Answer(calls=(Call("search", {"query": "{{user}}"}),)), system="You look into", not_called="search"),
        Rule(_finding(None), system="You look into", result=_FOUND),
        Rule(_report, system="You are the editor"),
    ]


_FOUND = "(?P<source>[^:]*): (?P<claim>.*)"


def _finding(per_token: float | None) -> Answer:
    return Answer(data={"claim": "{{claim}}", "source": "{{source}}"}, per_token=per_token)


def _report(request: SimRequest) -> dict[str, object]:
    title, *lines = request.user.splitlines()
    findings = [json.loads(line) for line in lines]
    summary = f"{len(findings)} findings on the tides, each from the archive."
    return {"title": title, "summary": summary, "findings": findings}
