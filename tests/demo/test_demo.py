"""The demonstration as users meet it; its account is checked against the files that it was counted from."""

from __future__ import annotations

import json
import re
import shlex
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.processes

DEADLINE = 180.0
"""Seconds after which the demonstration is broken; it takes six."""


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Type a command in ``folder``."""
    words = [sys.executable, "-m", "ridethrough.cli", *arguments]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=DEADLINE, check=False)


def lines(path: Path) -> list[dict[str, Any]]:
    """A file with a JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def requests(folder: Path, provider: str) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """What a provider's ledger says of each request, by its number."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in lines(folder / f"{provider}.jsonl"):
        found.setdefault((provider, line["number"]), []).append(line)
    return found


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The account of one performance."""
    folder = tmp_path_factory.mktemp("demo")
    done = command(folder, "demo", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    account = json.loads(done.stdout)
    assert isinstance(account, dict)
    return {**account, "cwd": folder}


def fact(account: dict[str, Any], name: str) -> dict[str, Any]:
    """What was measured for a claim."""
    (found,) = (fact for fact in account["facts"] if fact["name"] == name)
    assert found["holds"], found
    return dict(found["measured"])


def test_each_finished_model_call_was_made_once(played: dict[str, Any]) -> None:
    folder = Path(played["folder"])
    all_requests = requests(folder, "north") | requests(folder, "south")
    cut_off = fact(played, "really killed")["unanswered"]
    answered = [
        events[0]["digest"]
        for events in all_requests.values()
        if events[-1]["event"] == "finished" and events[-1]["status"] == 200 and events[-1]["fault"] is None
    ]
    digests = Counter(answered)
    measured = fact(played, "calls not repeated")
    assert set(digests.values()) == {1}
    assert len(answered) == measured["model_calls"] == measured["answered"] == 13
    asked = Counter(events[0]["digest"] for events in all_requests.values())
    failed = Counter(events[0]["digest"] for events in all_requests.values() if events[-1]["fault"])
    repeated = {digest for digest in asked if asked[digest] - failed[digest] > 1}
    assert len(repeated) <= cut_off
    assert measured["repeated"] == 0


def test_the_database_has_a_step_for_each_of_them(played: dict[str, Any]) -> None:
    path = Path(played["database"].removeprefix("sqlite:///"))
    with closing(sqlite3.connect(path)) as connection:
        kinds = Counter(
            kind for (kind,) in connection.execute("SELECT kind FROM steps WHERE run_id = ?", [played["run_id"]])
        )
    steps = fact(played, "steps kept")
    assert kinds == {"model": 13, "tool": 6}
    assert steps["kept"] == steps["on_record"]
    assert steps["kept"] + steps["new"] == 19


def test_the_mail_was_sent_once_by_the_process_that_was_killed(played: dict[str, Any]) -> None:
    (mail,) = lines(Path(played["folder"]) / "outbox.jsonl")
    killed, resumed = fact(played, "really killed")["pid"], fact(played, "taken up and finished")["pid"]
    assert mail["process"] == killed != resumed
    assert fact(played, "mail sent once")["mails"] == 1


def test_the_first_provider_failed_and_the_second_took_over(played: dict[str, Any]) -> None:
    folder = Path(played["folder"])
    faults = Counter(events[-1]["fault"] for events in requests(folder, "north").values())
    measured = fact(played, "provider failed over")
    assert faults["status"] == measured["refused"] > 0
    assert faults["cut"] == measured["broken_off"] == 1


def test_the_run_lay_in_the_database_while_nobody_answered(played: dict[str, Any]) -> None:
    folder = Path(played["folder"])
    measured = fact(played, "outage ridden through")
    refused = [events[-1]["at"] for events in requests(folder, "south").values() if events[-1]["fault"]]
    assert measured["reason"] in ("outage", "brownout")
    assert 0 < len(refused) <= measured["refused"]
    told = command(played["cwd"], "events", played["run_id"], "--db", played["database"], "--json").stdout
    kinds = [json.loads(line)["type"] for line in told.splitlines()]
    assert kinds.count("run_paused") == kinds.count("run_resumed") >= 1


def test_what_was_saved_is_what_the_kept_calls_cost(played: dict[str, Any]) -> None:
    shown = json.loads(command(played["cwd"], "show", played["run_id"], "--db", played["database"], "--json").stdout)
    models = [step for step in shown["steps"] if step["kind"] == "model"]
    kept = sorted(models, key=lambda step: str(step["ended_at"]))[: played["saved"]["model_calls"]]
    assert played["saved"]["model_calls"] == fact(played, "calls not repeated")["answered_before_the_kill"]
    assert played["saved"]["usd"] == pytest.approx(sum(step["cost_usd"] for step in kept))
    assert 0 < played["saved"]["usd"] < played["cost_usd"] == pytest.approx(shown["cost_usd"])
    assert shown["result"] == played["result"]
    assert len(played["result"]["findings"]) == 5


def test_told_in_plain_lines_and_again_in_the_same_place(played: dict[str, Any]) -> None:
    cwd = played["cwd"]
    told = command(cwd, "demo")
    assert told.returncode == 0, told.stdout + told.stderr
    assert "\x1b" not in told.stdout
    assert len(re.findall(r"^  ok  ", told.stdout, re.M)) == len(played["facts"])
    assert "SIGKILL" in told.stdout
    assert "NOT SO" not in told.stdout
    shown = re.findall(r"^  (ridethrough .*)$", told.stdout, re.M)
    assert [line.split()[1] for line in shown] == ["show", "events", "runs"]
    for line in shown:
        looked = command(cwd, *shlex.split(line)[1:])
        assert looked.returncode == 0, looked.stderr
    runs = json.loads(command(cwd, "runs", "--json", "--db", played["database"]).stdout)
    assert [run["status"] for run in runs] == ["done", "done"]


def test_another_folder_and_another_database(tmp_path: Path) -> None:
    done = command(tmp_path, "demo", "--dir", "else where", "--db", "mine.db", "--json")
    account = json.loads(done.stdout)
    assert done.returncode == 0
    assert account["database"] == "sqlite:///mine.db"
    assert (tmp_path / "mine.db").exists()
    assert not (tmp_path / "else where" / "runs.db").exists()


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = command(tmp_path, "demo", "--dir", "file/below")
    assert done.returncode == 2
    assert "--dir" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_database_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "broken.db").write_bytes(b"this is no database at all" * 100)
    done = command(tmp_path, "demo", "--db", "broken.db", "--json")
    account = json.loads(done.stdout)
    assert done.returncode == 1
    assert not account["ok"]
    assert "broken.db" in account["trouble"]
