"""Every example does what its README says: the commands are taken from there, and typed in a copy of the folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ridethrough.runtime import views
from ridethrough.runtime.config import load_config
from ridethrough.runtime.options import Options

pytestmark = pytest.mark.processes

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("first_agent", "research_team", "support_desk", "night_batch")
DEADLINE = 60.0
"""Seconds after which a process is broken; none comes near it."""


@dataclass(frozen=True)
class Folder:
    """A copy of an example."""

    path: Path

    @property
    def commands(self) -> list[list[str]]:
        """What the README tells to type, in its order."""
        text = (self.path / "README.md").read_text(encoding="utf-8")
        return [shlex.split(line)[1:] for line in re.findall(r"^    (ridethrough .*)$", text, re.M)]

    def type(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        command = [sys.executable, "-m", "ridethrough.cli", *arguments]
        kept = {"capture_output": True, "text": True, "timeout": DEADLINE}
        return subprocess.run(command, cwd=self.path, env={**os.environ, **environment}, check=False, **kept)  # type: ignore[call-overload, no-any-return]

    def show(self, run_id: str) -> dict[str, Any]:
        """A run as `show --json` prints it."""
        store = Options(db=str(self.path / "ridethrough.db")).store()
        try:
            return store.read_now(lambda connection: views.show_run(store, connection, run_id, steps=True)).as_json()
        finally:
            store.close()

    @contextmanager
    def going(self, *arguments: str) -> Generator[subprocess.Popen[str]]:
        """A command that is on its way; it does not outlive the block, nor the deadline."""
        command = [sys.executable, "-m", "ridethrough.cli", *arguments]
        with (
            (self.path / "errors.log").open("w") as errors,
            subprocess.Popen(command, cwd=self.path, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):
            alarm = threading.Timer(DEADLINE, process.kill)
            alarm.start()
            try:
                yield process
            finally:
                alarm.cancel()
                process.kill()


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """A copy of the example that the test names."""
    source = EXAMPLES / str(request.param)
    shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.db*", "*.jsonl"))
    return Folder(tmp_path / source.name)


def example(*names: str) -> pytest.MarkDecorator:
    """The examples that a test is about."""
    return pytest.mark.parametrize("folder", names or NAMES, indirect=True)


def decide(folder: Folder, run_id: str, *words: str) -> str:
    """Approve or deny the one call that ``run_id`` waits for; its id is taken from what the command printed."""
    waits = folder.show(run_id)["waits"]
    assert [wait["kind"] for wait in waits] == ["approval"]
    printed = folder.type("resume", run_id).stderr
    found = re.search(rf"ridethrough approve {run_id} (\S+)", printed)
    assert found is not None, printed
    decided = folder.type(words[0], run_id, found[1], *words[1:])
    assert decided.returncode == 0, decided.stderr
    return found[1]


# --- as the README says ---------------------------------------------------------------------------------------------


@example("first_agent")
def test_first_agent_follows_its_readme(folder: Folder) -> None:
    for command in folder.commands:
        done = folder.type(*command)
        assert done.returncode == 0, done.stderr
    shown = folder.show("first")
    assert [step["name"] for step in shown["steps"]] == ["model", "high_water", "model"]
    assert "06:12 and 18:37" in shown["result"]["output"]


@example("first_agent")
def test_first_agent_runs_as_a_script_too(folder: Folder) -> None:
    script = subprocess.run([sys.executable, "app.py"], cwd=folder.path, capture_output=True, text=True, check=True)
    assert "06:12 and 18:37" in script.stdout
    assert folder.show("first")["status"] == "done"


@example("research_team")
def test_research_team_follows_its_readme(folder: Folder) -> None:
    for command in folder.commands:
        done = folder.type(*command)
        assert done.returncode == 0, done.stderr
    brief = folder.show("tides")["result"]
    assert brief["title"] == "The tides"
    assert brief["sources"] == ["Coasts, chapter 2", "Power, chapter 7", "Tides, chapter 1"]
    forked = folder.show("tides-2")
    assert forked["result"] == brief
    assert forked["usage"]["model_calls"] == 1


@example("support_desk")
def test_a_large_refund_waits_for_a_person(folder: Folder) -> None:
    asked, approve, resume, *others = folder.commands
    stopped = folder.type(*asked)
    assert stopped.returncode == 3, stopped.stderr
    assert not (folder.path / "refunds.jsonl").exists()
    assert approve[:2] == ["approve", "t1"]
    call = decide(folder, "t1", "approve")
    done = folder.type(*resume)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["agent"] == "billing"
    assert [json.loads(line)["usd"] for line in (folder.path / "refunds.jsonl").read_text().splitlines()] == [129.0]
    assert folder.type("approve", "t1", call).returncode != 0
    answers = [json.loads(folder.type(*command).stdout) for command in others]
    assert [answer["agent"] for answer in answers] == ["billing", "technical"]


@example("support_desk")
def test_a_denied_refund_is_not_paid(folder: Folder) -> None:
    asked = [*folder.commands[0][:-1], "t2"]
    assert folder.type(*asked).returncode == 3
    decide(folder, "t2", "deny", "--note", "ask for the parcel number first")
    done = folder.type("resume", "t2")
    assert "ask for the parcel number first" in json.loads(done.stdout)["text"]
    assert not (folder.path / "refunds.jsonl").exists()


@example("night_batch")
def test_night_batch_collects_what_failed(folder: Folder) -> None:
    tonight, long, *_ = folder.commands
    done = folder.type(*tonight)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["kinds"] == {"order": 3, "question": 3, "complaint": 4}
    assert len(summary["failed"]) == 2
    parked = folder.type(*long, "--no-wait")
    assert parked.returncode == 3, parked.stderr
    assert folder.show("long")["pause"]["reason"] == "timer"


# --- killed ---------------------------------------------------------------------------------------------------------

GIVEN = {
    "first_agent": ("app.py:pilot", '"When can we enter Brest?"'),
    "research_team": ("app.py:brief", '"The tides"'),
    "support_desk": ("app.py:ticket", '"I paid twice for order A-101."'),
    "night_batch": ("app.py:night", '{"letters": 8, "wait": 0.2}'),
}
ANSWERS = {
    "first_agent": "06:12 and 18:37",
    "research_team": "Coasts, chapter 2",
    "support_desk": "9.50 USD were paid back",
    "night_batch": "letter 5 is torn",
}


@example()
def test_killed_and_resumed_it_comes_to_its_end(folder: Folder) -> None:
    target, given = GIVEN[folder.path.name]
    with folder.going("run", target, "--input", given, "--id", "cut", "--json") as process:
        kill_after_a_model_call(process)
    left = folder.show("cut")
    assert left["status"] == "running"
    resumed = folder.type("resume", "cut")
    assert resumed.returncode == 0, resumed.stderr
    assert ANSWERS[folder.path.name] in resumed.stdout
    shown = folder.show("cut")
    assert (shown["status"], shown["recoveries"]) == ("done", 1)
    kept = [step for step in left["steps"] if step["status"] != "running"]
    assert kept == [step for step in shown["steps"] if step["path"] in {known["path"] for known in kept}]


def kill_after_a_model_call(process: subprocess.Popen[str]) -> None:
    """SIGKILL as soon as the first model call is on record."""
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event.get("type") == "step_finished" and event["kind"] == "model":
            process.kill()
            assert process.wait() == -signal.SIGKILL
            return
    raise AssertionError("it ended before it could be killed")


# --- with a key -----------------------------------------------------------------------------------------------------


@example()
def test_a_key_and_the_other_configuration_are_all_it_takes(folder: Folder) -> None:
    """The server that takes the key is the simulated one, under a vendor's kind: nothing else changes."""
    assert load_config(EXAMPLES / folder.path.name / "ridethrough.openai.toml").routes["smart"].models == ("gpt",)
    real = folder.path / "ridethrough.openai.toml"
    target, given = GIVEN[folder.path.name]
    words = ("run", target, "--input", given, "--config", real.name)
    missing = folder.type(*words, OPENAI_API_KEY="")
    assert "OPENAI_API_KEY" in missing.stdout + missing.stderr
    with folder.going("simulate", "--scenario", "sim.py", "--json") as server:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["base_url"]
        real.write_text(real.read_text().replace("https://api.openai.com/v1", url))
        done = folder.type(*words, OPENAI_API_KEY="no-real-key")
    assert done.returncode == 0, done.stderr
    assert ANSWERS[folder.path.name] in done.stdout
