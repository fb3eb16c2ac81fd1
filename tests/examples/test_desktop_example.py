"""The agent at a computer does what its README says; killed on the way it finds its browser again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.examples.test_examples import Folder, example
from tests.examples.test_examples import folder as folder  # the fixture

from ridethrough.runtime.config import load_config

# The image may have to be made first.
pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

ANSWER = "The Étoile is announced: berth 7, high water 18:37. The picture is screen.jpg."
JPEG = b"\xff\xd8\xff"


@pytest.fixture(scope="module", autouse=True)
def image(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The image is there, as the README has it."""
    built = subprocess.run(
        [sys.executable, "-m", "ridethrough.cli", "sandbox", "build", "desktop"],
        cwd=tmp_path_factory.mktemp("image"),
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert built.returncode == 0, built.stderr


@example("desktop")
def test_it_follows_its_readme(folder: Folder) -> None:
    build, run, resume = folder.commands
    assert build == ["sandbox", "build", "desktop"]
    picture = folder.path / "screen.jpg"
    assert picture.read_bytes().startswith(JPEG), "the one that the page shows"
    picture.unlink()
    done = folder.type(*run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ANSWER
    assert picture.read_bytes().startswith(JPEG)
    assert folder.type(*resume).returncode == 0


@example("desktop")
def test_killed_it_finds_its_browser_again(folder: Folder) -> None:
    run = folder.commands[1]
    with folder.going(*run, "--json") as process:
        kill_after(process, "clerk#1/computer#3")
    done = folder.type("resume", "etoile")
    assert done.returncode == 0, done.stderr
    assert ANSWER in done.stdout
    shown = folder.show("etoile")
    assert (shown["status"], shown["recoveries"]) == ("done", 1)


def kill_after(process: subprocess.Popen[str], path: str) -> None:
    """SIGKILL as soon as a step is on record."""
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event.get("type") == "step_finished" and event["path"] == path:
            process.kill()
            assert process.wait() == -signal.SIGKILL
            return
    raise AssertionError("it ended before it could be killed")


def test_a_real_model_takes_one_more_word() -> None:
    path = Path(__file__).parents[2] / "examples" / "desktop" / "ridethrough.openai.toml"
    assert load_config(path).routes["smart"].models == ("gpt",)
