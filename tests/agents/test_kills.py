"""Kill -9 at every commit of a run with agents, tools of all effects, a handoff and parallel branches."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import anyio
import pytest

from ridethrough.runtime.router.providers.simulated import Answer, Call, Script, SimRequest, SimulatedProvider
from ridethrough.runtime.testing import Ledger

pytestmark = [pytest.mark.anyio, pytest.mark.processes]

PROGRAM = Path(__file__).with_name("lives.py")
MODEL_CALLS = 5
UNKNOWN = "This call of send was interrupted by a crash."


def office() -> Script:
    calls = tuple(Call(name, arguments, id="same") for name, arguments in TOOLS.items())
    return (
        Script()
        .rule(Answer(calls=calls), system="the clerk", turn=0)
        .rule(Answer(calls=(Call("transfer_to_editor"),)), system="the clerk", turn=1)
        .rule({"cents": 5}, system="the editor")
        .rule(Answer(calls=(Call("look"),)), system="the helper", turn=0)
        .rule("helped", system="the helper", turn=1)
    )


TOOLS: dict[str, dict[str, Any]] = {
    "look": {},
    "charge": {"cents": 7},
    "send": {"to": "Ada"},
    "forge": {},
}


async def test_killed_at_every_point(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    async with SimulatedProvider(office()) as provider:
        command = [sys.executable, str(PROGRAM), f"sqlite:///{tmp_path / 'runs.db'}", provider.base_url, str(path)]
        with anyio.fail_after(240):
            ended = await anyio.run_process(command, stderr=subprocess.STDOUT, check=False, cwd=tmp_path)
        assert ended.returncode == 0, ended.stdout.decode()[-2000:]
        requests = [handled.request for handled in provider.requests]
    entries = Ledger(path).read()
    points = {entry["point"]: entry["count"] for entry in entries if entry["kind"] == "points"}
    assert points["journal.after_commit"] >= 8, "fewer commits than steps that wait for one another"
    check_results(entries)
    check_effects(entries)
    check_model_calls(entries, requests)


def check_results(entries: list[dict[str, Any]]) -> None:
    """Each run comes to the result of an undisturbed one, apart from a letter whose fate nobody knows."""
    results = [entry for entry in entries if entry["kind"] == "result"]
    assert len(results) >= 30
    for entry in results:
        looked, charged, sent, forged, handed, *outputs = entry["result"]
        assert (looked, charged) == ("seen", "charged 7"), entry
        assert sent == "sent to Ada" or sent.startswith(UNKNOWN), entry
        assert forged.startswith("There is no tool 'forge'"), entry
        assert handed == "The conversation is with editor now.", entry
        assert outputs == ["cents=5", "helped"], entry
        assert entry["handed"] == 1, entry


def check_effects(entries: list[dict[str, Any]]) -> None:
    starts: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for entry in entries:
        if entry["kind"] == "start":
            starts[entry["run"], entry["effect"]].append(entry["key"])
    told = {entry["run"]: entry["result"][2] for entry in entries if entry["kind"] == "result"}
    for run, text in told.items():
        assert len(starts[run, "write"]) <= 1, f"{run}: a write started twice"
        assert text != "sent to Ada" or len(starts[run, "write"]) == 1, f"{run}: a write that never was"
        assert len(set(starts[run, "idempotent"])) == 1, f"{run}: an idempotent call saw several keys"
    assert any(text.startswith(UNKNOWN) for text in told.values()), "no kill fell into a write"
    assert any(len(starts[run, "idempotent"]) > 1 for run in told), "no kill fell into an idempotent call"


def check_model_calls(entries: list[dict[str, Any]], requests: list[SimRequest]) -> None:
    """One kill can cost the calls that were in flight, one in each of the two branches; never one that was on disk."""
    by_run: dict[str, Counter[str]] = defaultdict(Counter)
    for request in requests:
        by_run[request.user.split(" ")[-1]][path_of(request)] += 1
    for run, calls in by_run.items():
        assert len(calls) == MODEL_CALLS, run
        assert sum(calls.values()) <= MODEL_CALLS + 2, run
    for entry in entries:
        for path in entry["paths"] if entry["kind"] == "kept" else ():
            assert by_run[entry["run"]][path] == 1, f"{entry['run']}: {path} was on disk and was made again"


def path_of(request: SimRequest) -> str:
    """The step that a request belongs to."""
    agent = "g1[1]/helper#1" if "helper" in request.system else "g1[0]/clerk#1"
    return f"{agent}/model#{request.turns + 1}"
