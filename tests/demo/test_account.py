"""A claim that does not hold is found out: each is given evidence that was tampered with."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ridethrough.agents.cli import demo
from ridethrough.agents.demo import performance
from ridethrough.agents.demo.account import CLAIMS, Account, Claim, Facts
from ridethrough.agents.demo.acts import Crash, Outage, Revival
from ridethrough.agents.demo.stage import Asked
from ridethrough.agents.demo.tell import Lines
from ridethrough.runtime.events import RunPaused, RunResumed
from ridethrough.runtime.views import Pause, RunView, StepView, UsageView

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def step(path: str, kind: str = "model", **changes: Any) -> StepView:
    """A step on record."""
    name, agent = path.rpartition("/")[2].partition("#")[0], path.partition("#")[0]
    told: dict[str, Any] = {"status": "done", "attempts": 1, "started_at": NOON, "ended_at": NOON, "cost_usd": 0.5}
    return StepView(path=path, name=name, kind=kind, agent=agent, **{**told, **changes})


def run(status: str, *steps: StepView, **changes: Any) -> RunView:
    """A run."""
    told: dict[str, Any] = {"version": "1", "pause": None, "tenant": None, "created_at": NOON, "finished_at": None}
    told |= {"id": "demo-1", "workflow": "report", "error": None, "recoveries": 0, "cost_usd": 1.0}
    return RunView(status=status, usage=UsageView(), steps=list(steps), **{**told, **changes})


PLAN, MAIL = step("planner#1/model#1"), step("planner#1/send_mail#1", "tool")
FOUND, EDITED = step("researcher#1/model#1"), step("editor#1/model#1")
ASKED = [Asked("north", 1, "plan", None, "finished"), Asked("south", 1, "found", None, "open")]
LATER = [
    Asked("north", 2, "found", "status", "failed"),
    Asked("north", 3, "edited", "cut", "broken"),
    Asked("south", 2, "found", None, "finished"),
    Asked("south", 3, "edited", None, "finished"),
]
FACTS = Facts(
    crash=Crash(1, -9, run("running", PLAN, MAIL), ASKED, mails=1),
    revival=Revival(2, 0),
    run=run(
        "done", PLAN, MAIL, FOUND, EDITED, recoveries=1, result={"title": "Tides", "findings": [{"claim": "they come"}]}
    ),
    asked=[ASKED[0], replace(ASKED[1], end="broken"), *LATER],
    mails=[{"key": "k", "process": 1}],
    events=[RunPaused(reason="outage"), RunResumed()],
    outage=Outage(run("paused", PLAN, MAIL, pause=Pause(reason="outage")), 2.0, [LATER[0]]),
)


def failing(facts: Facts) -> set[str]:
    """The claims that do not hold."""
    return {claim.name for claim in (claim(facts) for claim in CLAIMS) if not claim.holds}


def test_sound_evidence_holds() -> None:
    assert failing(FACTS) == set()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"crash": replace(FACTS.crash, status=0)}, "really killed"),
        ({"crash": replace(FACTS.crash, status=-15)}, "really killed"),
        ({"revival": Revival(1, 0)}, "taken up and finished"),
        ({"revival": Revival(2, 3)}, "taken up and finished"),
        ({"mails": [{"key": "k", "process": 1}, {"key": "k", "process": 2}]}, "mail sent once"),
        ({"mails": []}, "mail sent once"),
        ({"asked": [*FACTS.asked, Asked("south", 4, "plan", None, "finished")]}, "calls not repeated"),
        ({"asked": [*FACTS.asked, Asked("south", 4, "plan", None, "broken")]}, "calls not repeated"),
        ({"asked": [*FACTS.asked, Asked("south", 4, "found", None, "finished")]}, "calls not repeated"),
        ({"asked": [*FACTS.asked, Asked("south", 4, "more", None, "finished")]}, "calls not repeated"),
        ({"asked": [*FACTS.asked, Asked("north", 4, "lost", "status", "failed")]}, "provider failed over"),
        ({"run": FACTS.run.model_copy(update={"status": "failed"})}, "taken up and finished"),
        ({"run": FACTS.run.model_copy(update={"result": None})}, "result complete"),
        ({"outage": None}, "outage ridden through"),
        ({"outage": Outage(run("paused", pause=Pause(reason="operator")), 2.0, [])}, "outage ridden through"),
        ({"events": [RunPaused(reason="outage")]}, "outage ridden through"),
    ],
)
def test_a_claim_that_does_not_hold_is_found_out(changes: dict[str, Any], name: str) -> None:
    assert name in failing(replace(FACTS, **changes))


def test_a_step_that_was_done_anew_is_not_kept() -> None:
    again = step("planner#1/model#1", ended_at=NOON.replace(hour=13))
    anew = FACTS.run.model_copy(update={"steps": [again, MAIL, FOUND, EDITED]})
    assert failing(replace(FACTS, run=anew)) == {"steps kept"}


def test_an_answer_that_nobody_heard_is_no_repetition() -> None:
    """The provider may get to the end of an answer after the process that asked is dead."""
    unheard = [ASKED[0], replace(ASKED[1], end="finished"), *LATER]
    assert failing(replace(FACTS, asked=unheard)) == set()


def account(*claims: Claim, trouble: str | None = None) -> Account:
    """An account of these claims."""
    return Account("demo-1", "sqlite:///runs.db", "demo-1", 6.0, ["ridethrough runs"], list(claims), trouble)


HOLDS, FAILS = Claim("mail sent once", True, "1 mail", {}), Claim("steps kept", False, "1 of 2", {})


def test_an_account_is_good_only_if_all_of_it_is() -> None:
    assert account(HOLDS).ok
    assert not account(HOLDS, FAILS).ok
    assert not account(HOLDS, trouble="the machine stopped").ok
    assert not account().ok


@pytest.mark.parametrize(("claims", "status"), [([HOLDS], 0), ([HOLDS, FAILS], 1), ([], 1)])
@pytest.mark.parametrize("json", [False, True])
def test_the_status_tells(
    claims: list[Claim], status: int, json: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def give(folder: Path, database: str | None, *, json: bool) -> Account:
        assert folder == tmp_path
        return account(*claims)

    monkeypatch.setattr(performance, "give", give)
    done = CliRunner().invoke(demo, ["--dir", str(tmp_path), *(["--json"] if json else [])], standalone_mode=False)
    assert done.return_value == status
    assert ('"ok"' in done.stdout) == json


def test_what_does_not_hold_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Lines().account(account(HOLDS, FAILS, trouble="the machine stopped"))
    told = capsys.readouterr().out
    assert "NOT SO  steps kept" in told
    assert "the machine stopped" in told
