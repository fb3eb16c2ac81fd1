"""SIGKILL at named points around every commit and at random moments: nothing is lost, nothing done twice.

``ridethrough.runtime.testing`` says what is executed and what is checked. The seed is printed and can be given by
``RIDETHROUGH_SEED``; the ledgers and databases of a failure are left in the test's folder.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.kill import ops

from ridethrough.runtime import testing, testpoints

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]


def seed() -> int:
    """The seed of this session."""
    given = os.environ.get("RIDETHROUGH_SEED")
    return int(given) if given else random.SystemRandom().randrange(1_000_000)


def run_campaign(folder: Path, *, rounds: int, kills: int) -> dict[str, Any]:
    """A campaign in a process of its own, which must have no threads because it forks."""
    chosen = seed()
    print(f"RIDETHROUGH_SEED={chosen}")
    command = [sys.executable, "-m", "ridethrough.runtime.testing", str(folder), "--seed", str(chosen)]
    command += ["--ops", ops.__name__, "--rounds", str(rounds), "--kills", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode in (0, 1), done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert not report["violations"], f"RIDETHROUGH_SEED={chosen}\n{done.stderr}"
    return report


def test_killed_anywhere(tmp_path: Path) -> None:
    """A few dozen kills, as part of every test run."""
    report = run_campaign(tmp_path, rounds=10, kills=10)
    print(report)
    assert report["kills"] >= 20
    assert set(report["started"]) == {"step", "model", *ops.EFFECTS}


@pytest.mark.soak
def test_killed_anywhere_for_long(tmp_path: Path) -> None:
    """Hundreds of kills, at every point."""
    report = run_campaign(tmp_path, rounds=120, kills=12)
    print(report)
    assert report["kills"] >= 300
    assert set(testpoints.POINTS) <= set(report["points"])
    assert report["settled"] > 0
    assert report["unknown"] > 0


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("number", range(4))
def test_undisturbed_programs_do_what_is_expected(tmp_path: Path, number: int, backend: str) -> None:
    """The outcome that the checker computes without the engine is the engine's when nothing disturbs it."""
    import anyio

    plan = testing.plan_of(tmp_path, number, 5)
    anyio.run(testing.execute, plan, backend=backend)
    assert testing.check(plan) == []


def test_a_seed_gives_one_program() -> None:
    """What a failure's seed reproduces is the same program."""
    assert testing.make_program(7) == testing.make_program(7)
    assert testing.make_program(7) != testing.make_program(8)


class TestChecker:
    """A checker that finds nothing is only worth something if it would."""

    def plan(self, folder: Path) -> testing.Plan:
        """One executed program."""
        import anyio

        plan = testing.plan_of(folder, 1, 1)
        anyio.run(testing.execute, plan)
        assert testing.check(plan) == []
        return plan

    def test_finds_a_repeated_step(self, tmp_path: Path) -> None:
        """A start after the commit."""
        plan = self.plan(tmp_path)
        plan.ledger.write("committed", calls=[["run", "k1"]])
        plan.ledger.write("start", effect="step", run="run", call="k1", key=None)
        assert "started again after its step was committed" in testing.check(plan)[0]

    def test_finds_a_step_started_twice_in_one_process(self, tmp_path: Path) -> None:
        """Two executions of one run at once."""
        plan = self.plan(tmp_path)
        for _ in range(2):
            plan.ledger.write("start", effect="model", run="run", call="k1", key=None)
        assert "started twice in process" in testing.check(plan)[0]

    def test_finds_a_repeated_write(self, tmp_path: Path) -> None:
        """Two starts of a write, by whichever processes."""
        plan = self.plan(tmp_path)
        for pid in (1, 2):
            line = {"kind": "start", "pid": pid, "effect": "write", "run": "run", "call": "w", "key": "a"}
            with plan.ledger.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        assert testing.check(plan) == ["write ('run', 'w') was started 2 times"]

    def test_finds_a_changed_key(self, tmp_path: Path) -> None:
        """Two keys of one call."""
        plan = self.plan(tmp_path)
        for pid, key in ((1, "a"), (2, "b")):
            line = {"kind": "start", "pid": pid, "effect": "idempotent", "run": "run", "call": "i", "key": key}
            with plan.ledger.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        assert testing.check(plan) == ["idempotent ('run', 'i') saw the keys ['a', 'b']"]

    def test_finds_a_model_call_that_was_made_otherwise(self, tmp_path: Path) -> None:
        """Two conversations in the place of one."""
        plan = self.plan(tmp_path)
        for pid, key in ((1, "a"), (2, "b")):
            line = {"kind": "start", "pid": pid, "effect": "model", "run": "run", "call": "k1/0", "key": key}
            with plan.ledger.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        assert testing.check(plan) == ["model ('run', 'k1/0') saw the keys ['a', 'b']"]

    def test_finds_what_is_on_record_and_never_happened(self, tmp_path: Path) -> None:
        """A ledger without a start that the database tells of."""
        plan = self.plan(tmp_path)
        entries = [line for line in plan.ledger.read() if line["kind"] != "start"]
        plan.ledger.path.write_text("".join(json.dumps(line) + "\n" for line in entries))
        assert "is on record and was never started" in testing.check(plan)[0]

    def test_finds_a_wrong_outcome(self, tmp_path: Path) -> None:
        """Another result than the undisturbed one."""
        plan = self.plan(tmp_path)
        plan.ledger.write("outcome", run=next(iter(plan.programs)), outcome=["done", "nonsense"])
        assert "nonsense" in testing.check(plan)[0]
