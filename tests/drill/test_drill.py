"""Drills as users meet them: real processes, real kills, and a report that is held against what lies beside it."""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.drill.desk import DEADLINE, Desk

from ridethrough.runtime.config import load_config
from ridethrough.runtime.router.providers.simulated import MEASURES, shipped_scenarios

pytestmark = pytest.mark.processes

OUTAGE = """
description = "The first deployment disappears, and the process dies meanwhile"
latency = "100ms"

[[faults]]
deployment = "#1"
kind = "refuse"
start = "500ms"
end = "2500ms"

[[kills]]
at = "1500ms"

[expect]
lost = 0
repeated = 0
wasted = "< 60"
delay = "<= 20s"
cost = "< $1"
return = "<= 5s"
"""

CONFIG = """
[providers.east]
kind = "openai"
base_url = "https://api.openai.com/v1"
api_key = "env:NOBODY_SETS_THIS"

[providers.west]
kind = "anthropic"
api_key = "env:NOBODY_SETS_THIS"

[models."east one"]
provider = "east"
model = "gpt-5.2"
tier = "frontier"
price = { input = 1.25, output = 10.0 }

[models.two]
provider = "west"
model = "claude-sonnet-4-5"
tier = "standard"

[routes.desk]
models = ["east one", "two"]
patience = "10s"
"""


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A project."""
    return Desk(tmp_path)


@pytest.fixture(scope="module")
def outage(tmp_path_factory: pytest.TempPathFactory) -> tuple[Desk, dict[str, Any]]:
    """A drill with an outage and a kill, and the report of it."""
    desk = Desk(tmp_path_factory.mktemp("outage"))
    (desk.folder / "ridethrough.toml").write_text(CONFIG, encoding="utf-8")
    return desk, desk.report("app.py:letter", "--scenario", desk.scenario(OUTAGE), status=0)


def ledger(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """A file with a JSON object a line."""
    yield from map(json.loads, (folder / "drill" / name).read_text(encoding="utf-8").splitlines())


# --- a drill that passes its gate -----------------------------------------------------------------------------------


def test_an_outage_and_a_kill_are_ridden_through(outage: tuple[Desk, dict[str, Any]]) -> None:
    _, report = outage
    runs = report["runs"]
    assert report["ok"]
    assert runs["started"] == runs["done"] >= 8
    assert report["kills"] == 1
    assert report["faults_met"]["refuse"] > 0
    assert [each["holds"] for each in report["expectations"]] == [True] * 6
    assert report["results"]["as_expected"] == runs["done"]
    assert report["measures"]["wasted"]["value"] > 0


def test_what_was_not_repeated_was_sent_once(outage: tuple[Desk, dict[str, Any]]) -> None:
    desk, report = outage
    assert max(Counter(desk.outbox).values()) == 1
    begun = Counter(
        line["call"] for line in ledger(desk.folder / report["folder"], "tools.jsonl") if line["event"] == "begun"
    )
    assert max(begun.values()) == 1 + (report["measures"]["repeated"]["tool_calls"] > 0)


def test_the_report_agrees_with_the_database(outage: tuple[Desk, dict[str, Any]]) -> None:
    desk, report = outage
    with closing(sqlite3.connect(desk.folder / report["database"])) as connection:
        statuses = Counter(status for (status,) in connection.execute("SELECT status FROM runs"))
        (steps,) = connection.execute("SELECT sum(cost_usd) FROM steps").fetchone()
        (waste, count) = connection.execute("SELECT sum(cost_usd), count(*) FROM attempts WHERE wasted").fetchone()
    measures = report["measures"]
    assert statuses == {"done": report["runs"]["done"]}
    assert measures["cost"]["value"] == pytest.approx(steps + waste)
    assert measures["cost"]["wasted"] == pytest.approx(waste)
    assert measures["wasted"]["value"] == count + measures["wasted"]["cut_off"]


def test_no_real_provider_is_in_the_drills_configuration(outage: tuple[Desk, dict[str, Any]]) -> None:
    desk, report = outage
    config = load_config(desk.folder / report["folder"] / "drill" / "ridethrough.toml")
    assert {each.kind for each in config.providers.values()} == {"simulated"}
    assert all((each.base_url or "").startswith("http://127.0.0.1:") for each in config.providers.values())
    assert [config.providers[name].wire for name in config.routes["desk"].models] == ["openai", "anthropic"]
    assert config.models["east one"].price is not None
    assert config.routes["desk"].patience == 10.0
    wires = {
        line["wire"]
        for name in ("server-1.jsonl", "server-2.jsonl")
        for line in ledger(desk.folder / report["folder"], name)
    }
    assert wires == {"openai", "anthropic"}


def test_each_deployment_has_its_timeline_and_its_way_back(outage: tuple[Desk, dict[str, Any]]) -> None:
    _, report = outage
    first, second = report["deployments"][:2]
    assert (first["name"], second["name"]) == ("east one", "two")
    assert len(first["timeline"]) >= len(first["illness"]) > 0
    assert "!" in first["illness"]
    assert "!" not in second["illness"]
    assert set(first["timeline"]) <= set("ox%.")
    assert first["share_before"] == 1.0
    assert first["failed"] > 0
    assert 0.0 <= first["first_answer_after"] <= first["back_after"]
    assert second["answered"] > 0


def test_the_document_has_all_that_is_measured(outage: tuple[Desk, dict[str, Any]]) -> None:
    _, report = outage
    assert set(report["measures"]) == set(MEASURES)
    assert all({"value", "unit"} <= set(each) for each in report["measures"].values())
    assert report["measures"]["delay"]["baseline"]["slowest_run"] > 0
    assert report["baseline"]["runs"] == 8
    assert report["degraded"].keys() <= {"standard"}
    assert report["degraded"]["standard"] > 0
    assert {"reason", "runs", "times", "seconds"} == set().union(*map(set, report["pauses"])) or report["pauses"] == []
    for line in report["next"]:
        words = [sys.executable, "-m", "ridethrough.cli", *shlex.split(line)[1:]]
        assert subprocess.run(words, cwd=outage[0].folder, capture_output=True, check=False).returncode == 0


def test_runs_that_wait_for_a_person_are_resumed_when_all_is_mended(desk: Desk) -> None:
    name = desk.scenario(
        'latency = "200ms"\n[[faults]]\nkind = "quota"\nstart = "100ms"\nend = "1s"\n[expect]\nlost = 0\nrepeated = 0\n'
    )
    arguments = ("--runs", "2", "--concurrency", "2", "--no-baseline")
    report = desk.report("app.py:letter", "--scenario", name, *arguments, status=0)
    assert report["runs"]["done"] == 2
    assert [(each["reason"], each["runs"]) for each in report["pauses"]] == [("quota", 2)]
    assert len(desk.outbox) == len(set(desk.outbox)) == 2


# --- what fails -----------------------------------------------------------------------------------------------------


def test_an_expectation_that_does_not_hold_is_status_1(desk: Desk) -> None:
    name = desk.scenario('[[faults]]\ndeployment = "#1"\nkind = "status"\ntimes = 2\n[expect]\nlost = 0\nwasted = 0\n')
    done = desk.drill("app.py:letter", "--scenario", name, "--runs", "2", "--concurrency", "2", "--no-baseline")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^  ok +lost +0 +0$", done.stdout, re.M)
    assert re.search(r"^  NOT SO +wasted +0 +2$", done.stdout, re.M)
    assert "2 status" in done.stdout


def test_a_write_that_is_declared_a_read_is_found_out(desk: Desk) -> None:
    name = desk.scenario('[[kills]]\nat = "1s"\n')
    report = desk.report(
        "app.py:twice", "--scenario", name, "--runs", "2", "--concurrency", "2", "--no-baseline", status=1
    )
    sent = Counter(desk.outbox)
    assert list(sent.values()) == [2, 2]
    repeated = report["measures"]["repeated"]
    assert (repeated["model_calls"], repeated["tool_calls"]) == (0, 2)
    assert repeated["tools"] == [{"tool": "sneak", "effect": "read", "calls": 2}]
    assert report["expectations"] == []


def test_tools_that_fail_hang_and_are_slow(desk: Desk) -> None:
    name = desk.scenario(
        '[[tools]]\ntool = "look"\nkind = "error"\ntimes = 1\n'
        '[[tools]]\ntool = "look"\nkind = "slow"\nseconds = "100ms"\n'
        '[[tools]]\ntool = "send"\nkind = "hang"\nseconds = "30s"\ntimes = 1\n[expect]\nlost = 0\nrepeated = 0\n'
    )
    report = desk.report("app.py:letter", "--scenario", name, "--runs", "3", "--concurrency", "3", status=0)
    assert report["faults_met"] == {"tool error": 1, "tool slow": 2, "tool hang": 1}
    assert report["runs"]["done"] == 3
    assert 0 < report["results"]["as_expected"] < 3
    assert report["measures"]["delay"]["value"] > 0.5
    lines = list(ledger(desk.folder / report["folder"], "tools.jsonl"))
    failed = next(line for line in lines if line.get("fault") == "error")
    assert not any(line["event"] == "begun" and line["call"] == failed["call"] for line in lines)
    assert len(desk.outbox) == len(set(desk.outbox)) == 6


def test_a_schedule_that_meets_nothing_is_no_success(desk: Desk) -> None:
    name = desk.scenario('[[faults]]\nkind = "status"\nstart = "60s"\nend = "70s"\n[expect]\nlost = 0\n')
    report = desk.report("app.py:letter", "--scenario", name, "--runs", "1", "--no-baseline", status=1)
    assert not report["ok"]
    assert report["expectations"][0]["holds"]
    assert "none was tried" in report["trouble"][0]


def test_a_workflow_that_fails_without_faults_is_not_drilled(desk: Desk) -> None:
    report = desk.report("app.py:broken", "--scenario", "outage", "--runs", "1", status=1)
    assert not report["ok"]
    assert "the desk is broken" in report["trouble"][0]


def test_wrong_use_is_status_2_and_names_what_is_near(desk: Desk) -> None:
    misspelt = desk.drill("app.py:letter", "--scenario", "brownuot")
    assert misspelt.returncode == 2
    assert "did you mean 'brownout'?" in misspelt.stderr
    assert not (desk.folder / ".ridethrough-drill").exists()
    unnamed = desk.drill("app.py:letter")
    assert unnamed.returncode == 2
    assert "--list" in unnamed.stderr
    nowhere = desk.drill("app.py:lettre", "--scenario", "outage")
    assert nowhere.returncode == 2
    assert "letter" in nowhere.stderr


def test_what_is_shipped_is_listed(desk: Desk) -> None:
    done = desk.drill("--list")
    assert done.returncode == 0
    assert all(re.search(rf"^{name} +\w", done.stdout, re.M) for name in shipped_scenarios())


# --- nothing is left ------------------------------------------------------------------------------------------------


def begun(desk: Desk) -> tuple[subprocess.Popen[str], int]:
    """A drill that has begun, and the process that executes its runs."""
    name = desk.scenario('[[faults]]\nkind = "hang"\nstart = "0s"\nend = "90s"\n')
    drill = subprocess.Popen(
        desk.words("app.py:letter", "--scenario", name, "--no-baseline"),
        cwd=desk.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert drill.stdout is not None
    for line in drill.stdout:
        if found := re.search(r"process (\d+) takes up", line):
            return drill, int(found[1])
    raise AssertionError(drill.communicate())


def wait_until_gone(pid: int) -> None:
    """Return when a process that is not ours has ended; a pidfd is readable then."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([handle], [], [], DEADLINE)[0], f"process {pid} goes on"
    finally:
        os.close(handle)


def test_ctrl_c_leaves_no_process(desk: Desk) -> None:
    drill, worker = begun(desk)
    drill.send_signal(signal.SIGINT)
    _, errors = drill.communicate(timeout=DEADLINE)
    assert drill.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_killed_drill_leaves_no_process(desk: Desk) -> None:
    drill, worker = begun(desk)
    drill.kill()
    drill.communicate(timeout=DEADLINE)
    wait_until_gone(worker)
