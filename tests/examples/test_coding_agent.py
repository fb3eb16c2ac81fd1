"""The coding agent does what its README says, in a real container; killed on the way it goes on in the same one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

import pytest
from tests.examples.test_examples import Folder, example
from tests.examples.test_examples import folder as folder  # the fixture

from ridethrough.runtime.config import load_config

pytestmark = pytest.mark.processes

STEPS = [
    *("coder#1/model#1", "coder#1/write_file#1", "coder#1/write_file#2"),
    *("coder#1/model#2", "coder#1/shell#1"),
    *("coder#1/model#3", "coder#1/edit_file#1"),
    *("coder#1/model#4", "coder#1/shell#2"),
    "coder#1/model#5",
]


def answers(folder: Folder, run_id: str) -> dict[str, str]:
    """What the model was told by its tools, by the path of the call."""
    steps = folder.show(run_id)["steps"]
    return {step["path"]: told(step["output"]) for step in steps if step["kind"] == "tool"}


def told(output: Any) -> str:
    found = json.loads(output) if isinstance(output, str) else output
    return str(found["content"])


@example("coding_agent")
def test_it_follows_its_readme(folder: Folder) -> None:
    build, run, show, resume = folder.commands
    assert build == ["sandbox", "build", "python"], "what `make engine` has done"
    done = folder.type(*run)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["file"] == "tides.py"
    assert sorted(step["path"] for step in folder.show("tides")["steps"]) == sorted(STEPS)
    said = answers(folder, "tides")
    assert "IndexError" in said["coder#1/shell#1"]
    assert said["coder#1/shell#1"].endswith("[exit status 1]")
    assert said["coder#1/shell#2"] == "06:00\n18:00"
    assert not (folder.path / "tides.py").exists(), "it was written in the sandbox, not here"
    assert folder.type(*show).returncode == 0
    assert folder.type(*resume).returncode == 0


@example("coding_agent")
def test_killed_it_goes_on_in_the_same_sandbox(folder: Folder) -> None:
    with folder.going("run", "app.py:build", "--id", "cut", "--json") as process:
        kill_after(process, "coder#1/shell#1")
    before = answers(folder, "cut")
    resumed = folder.type("resume", "cut")
    assert resumed.returncode == 0, resumed.stderr
    shown, after = folder.show("cut"), answers(folder, "cut")
    assert (shown["status"], shown["recoveries"]) == ("done", 1)
    assert after["coder#1/shell#2"] == "06:00\n18:00", "what had been written before was still there"
    assert before.items() <= after.items()


def kill_after(process: subprocess.Popen[str], path: str) -> None:
    """SIGKILL as soon as a step is on record."""
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event.get("type") in ("step_finished", "tool_call_finished") and event["path"] == path:
            process.kill()
            assert process.wait() == -signal.SIGKILL
            return
    raise AssertionError("it ended before it could be killed")


@example("coding_agent")
def test_it_runs_as_a_script_too(folder: Folder) -> None:
    script = subprocess.run([sys.executable, "app.py"], cwd=folder.path, capture_output=True, text=True, timeout=60)
    assert script.returncode == 0, script.stderr
    assert "file='tides.py'" in script.stdout


@example("coding_agent")
def test_a_key_and_the_other_configuration_are_all_it_takes(folder: Folder) -> None:
    real = folder.path / "ridethrough.openai.toml"
    config, simulated = load_config(real), load_config(folder.path / "ridethrough.toml")
    assert config.routes["smart"].models == ("gpt",)
    assert config.sandboxes == simulated.sandboxes
    assert "OPENAI_API_KEY" in folder.type("run", "app.py:build", "--config", real.name, OPENAI_API_KEY="").stderr
