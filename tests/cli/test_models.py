"""`models`, `models explain` and `models ping`, and the attempts of `show`: what people and programs get to see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ridethrough.cli import run as command
from ridethrough.runtime.router.ledger import AttemptRecord, DeploymentState
from ridethrough.runtime.store import ATTEMPT_COLUMNS, Store

KEY = "sk-planted-0123456789"
CONFIG = """
[providers.here]
kind = "simulated"
[providers.vendor]
kind = "openai"
base_url = "http://127.0.0.1:9/v1"
api_key = "env:MODELS_TEST_KEY"
[models.gpt]
provider = "vendor"
model = "gpt-5.2"
tier = "frontier"
quota = "vendor-main"
price = { input = 1.25, output = 10.0 }
timeouts = { connect = 0.5 }
[models.sim]
provider = "here"
model = "simulated"
tier = "standard"
[routes.smart]
models = ["gpt", "sim"]
floor = "standard"
patience = "20s"
otherwise = ["cache", "pause"]
[routes.fast]
models = ["sim"]
"""

Ask = Callable[..., tuple[str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "ridethrough.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RIDETHROUGH_CONFIG", raising=False)
    monkeypatch.setenv("MODELS_TEST_KEY", KEY)
    yield tmp_path
    sys.modules.pop("app", None)  # the commands ran in this process, and other tests have an app.py of their own


@pytest.fixture
def ask(folder: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run a command: standard output and standard error. The planted key is in neither."""

    def asked(*arguments: str, status: int = 0) -> tuple[str, str]:
        found = command(arguments)
        out, err = capsys.readouterr()
        assert found == status, f"{arguments}: status {found}\n{out}\n{err}"
        assert KEY not in out + err
        return out, err

    return asked


def open_store(folder: Path) -> Store:
    store = Store(f"sqlite:///{folder / 'ridethrough.db'}")
    store.prepare()
    return store


def publish(folder: Path, *states: DeploymentState) -> None:
    """Write down what some worker found out."""
    store = open_store(folder)
    rows = [
        {
            "deployment": state.deployment,
            "state": json.dumps(asdict(state)),
            "at": state.at or 0.0,
            "worker": "w1",
        }
        for state in states
    ]
    with store.writer.begin() as connection:
        store.keep_deployments(connection, rows)
    store.close()


def broken(now: float) -> DeploymentState:
    return DeploymentState(
        "gpt",
        state="open",
        since=now - 5,
        until=now + 300,
        verdict="Overloaded",
        detail="gpt answered 529\x1b[2J overloaded_error",
        at=now,
        quota="vendor-main",
        quota_until=now + 600,
        quota_reason="RateLimited",
        in_flight=3,
        waiting=2,
        limit=8,
        answered=90,
        failed=10,
        error_rate=0.25,
        first_token_p50=0.4,
        first_token_p95=1.5,
        tokens_per_second=61.7,
        limits={"requests_remaining": 12.0},
    )


# --- models ---------------------------------------------------------------------------------------------------------


def test_every_configured_deployment_is_shown_before_anybody_called_it(ask: Ask, folder: Path) -> None:
    found = json.loads(ask("models", "--json")[0])
    assert [(each["name"], each["state"], each["routes"]) for each in found] == [
        ("gpt", "unknown", ["smart"]),
        ("sim", "unknown", ["smart", "fast"]),
    ]
    assert "not called yet" in ask("models")[0]
    assert not (folder / "ridethrough.db").exists()


def test_what_other_processes_found_out_is_shown(ask: Ask, folder: Path) -> None:
    now = time.time()
    publish(folder, broken(now), DeploymentState("sim", state="closed", verdict="ok", answered=4))
    gpt, sim = json.loads(ask("models", "--json")[0])
    assert gpt["provider"] == "vendor"
    assert gpt["tier"] == "frontier"
    assert gpt["state"] == "open"
    assert gpt["since"].endswith("Z")
    assert gpt["limits"] == {"requests_remaining": 12.0}
    assert gpt["worker"] == "w1"
    assert sim["answered"] == 4
    out, _ = ask("models")
    head, first, second = out.splitlines()
    assert head.startswith("NAME")
    for part in ("vendor/gpt-5.2", "out since", "3 of 8 +2", "0.4 s / 1.5 s", "62", "90/10", "Overloaded"):
        assert part in first
    assert "vendor-main used up until" in first
    assert "\x1b" not in first
    assert "healthy" in second


def test_times_that_have_passed_hold_nobody_back(ask: Ask, folder: Path) -> None:
    publish(folder, broken(time.time() - 9_000))
    out, _ = ask("models")
    assert "to be tried" in out
    assert "used up" not in out
    assert "2 h 30 min ago" in out


def test_a_direct_call_is_shown_too_and_what_is_not_configured_any_more_is_not(ask: Ask, folder: Path) -> None:
    publish(folder, DeploymentState("vendor/gpt-5-mini", state="closed"), DeploymentState("removed", state="open"))
    found = json.loads(ask("models", "--json")[0])
    assert [each["name"] for each in found] == ["gpt", "sim", "vendor/gpt-5-mini"]
    assert found[2]["model"] == "gpt-5-mini"


def test_what_a_newer_version_published_does_not_confuse_this_one(ask: Ask, folder: Path) -> None:
    store = open_store(folder)
    row = {"deployment": "gpt", "state": '{"state": "ramping", "novelty": 1}', "at": time.time(), "worker": ""}
    with store.writer.begin() as connection:
        store.keep_deployments(connection, [row])
    store.close()
    assert json.loads(ask("models", "--json")[0])[0]["state"] == "ramping"


def test_without_models_it_says_how_to_get_some(ask: Ask, folder: Path) -> None:
    (folder / "ridethrough.toml").write_text("")
    out, err = ask("models")
    assert out == ""
    assert "ridethrough init" in err
    assert json.loads(ask("models", "--json")[0]) == []
    assert "ridethrough init" in ask("models", "ping", status=2)[1]


def test_a_damaged_database_is_said_and_not_hidden(ask: Ask, folder: Path) -> None:
    (folder / "ridethrough.db").write_text("this is no database " * 100)
    assert "not an SQLite database" in ask("models", status=1)[1]


# --- models --watch -------------------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize("form", ["lines", "json"])
def test_watching_prints_a_line_when_something_changes_until_it_is_interrupted(folder: Path, form: str) -> None:
    words = ["models", "--watch", *(["--json"] if form == "json" else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", "ridethrough.cli", *words], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    first = [process.stdout.readline() for _ in range(2)]
    publish(folder, broken(time.time()))
    changed = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=40)
    assert process.returncode == 0
    assert rest == ""
    if form == "json":
        assert [json.loads(line)["state"] for line in first] == ["unknown", "unknown"]
        assert json.loads(changed)["state"] == "open"
    else:
        assert [line.partition(" ")[2] for line in first] == ["gpt: not called yet\n", "sim: not called yet\n"]
        assert "gpt: out since" in changed
        assert "Overloaded: gpt answered 529" in changed


@pytest.mark.processes
def test_watching_on_a_terminal_redraws_a_table(folder: Path) -> None:
    publish(folder, broken(time.time()))
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ridethrough.cli", "models", "--watch"],
        cwd=folder, stdout=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "40"},
    )  # fmt: skip
    os.close(theirs)
    seen = ""
    while "sim" not in seen:
        seen += os.read(ours, 65536).decode("utf-8", "replace")
    process.send_signal(signal.SIGINT)
    assert process.wait(40) == 0
    os.close(ours)
    assert "FIRST TOKEN" in seen
    assert "out since" in seen


def test_watch_is_not_for_the_commands_below(ask: Ask) -> None:
    assert "--watch is not for" in ask("models", "--watch", "explain", "smart", status=2)[1]


# --- models explain -------------------------------------------------------------------------------------------------


def test_explain_says_whom_a_route_asks_and_what_follows_from_each_error(ask: Ask, folder: Path) -> None:
    publish(folder, broken(time.time()))
    out, _ = ask("models", "explain", "smart")
    assert out.startswith("smart: ordered, ")
    assert "waits in place up to 20" in out
    assert "otherwise cache, then pause" in out
    rows = [line for line in out.splitlines() if line.startswith(("1.", "2."))]
    assert "vendor/gpt-5.2" in rows[0]
    assert "out since" in rows[0]
    assert "here/simulated" in rows[1]
    for name in ("RateLimited", "QuotaExhausted", "Overloaded", "Slow", "StreamBroken", "ContextLength", "Auth"):
        assert any(line.startswith(f"  {name} ") for line in out.splitlines())


def test_explain_as_json_has_what_other_processes_know(ask: Ask, folder: Path) -> None:
    publish(folder, broken(time.time()))
    found: dict[str, Any] = json.loads(ask("models", "explain", "smart", "--json")[0])
    assert found["route"] == "smart"
    assert [(each["name"], each["state"]) for each in found["deployments"]] == [("gpt", "open"), ("sim", "unknown")]
    assert found["deployments"][0]["quota"] == "vendor-main"
    assert set(found["errors"]) >= {"RateLimited", "InvalidRequest"}


def test_explain_takes_a_single_model_too(ask: Ask) -> None:
    assert "here/simulated" in ask("models", "explain", "sim")[0]


def test_an_unknown_route_ends_with_2_and_the_nearest_name(ask: Ask) -> None:
    _, err = ask("models", "explain", "smrt", status=2)
    assert "did you mean 'smart'?" in err


# --- models ping ----------------------------------------------------------------------------------------------------


def test_ping_asks_and_says_how_long_it_took(ask: Ask) -> None:
    out, err = ask("models", "ping", "sim")
    assert "costs a little" in err
    row = out.splitlines()[1]
    assert row.split()[:3] == ["sim", "here/simulated", "ok"]
    [found] = json.loads(ask("models", "ping", "sim", "--json")[0])
    assert found["ok"] is True
    assert found["verdict"] == "ok"
    assert found["seconds"] > 0
    assert found["output_tokens"] > 0


def test_a_ping_that_fails_ends_with_1_and_the_others_are_asked_all_the_same(ask: Ask) -> None:
    found = json.loads(ask("models", "ping", "--json", status=1)[0])
    assert [(each["name"], each["verdict"]) for each in found] == [("gpt", "Transport"), ("sim", "ok")]
    assert found[0]["phase"] == "connect"
    assert "Transport (connect)" in ask("models", "ping", status=1)[0]


def test_a_ping_without_its_key_says_which_is_missing(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELS_TEST_KEY")
    [found] = json.loads(ask("models", "ping", "gpt", "--json", status=1)[0])
    assert found["verdict"] == "ConfigError"
    assert "MODELS_TEST_KEY" in found["detail"]


def test_ping_of_an_unknown_model_ends_with_2_and_the_nearest_name(ask: Ask) -> None:
    assert "did you mean 'gpt'?" in ask("models", "ping", "gtp", status=2)[1]


# --- show -----------------------------------------------------------------------------------------------------------

ATTEMPT = AttemptRecord(
    id="a1",
    route="smart",
    deployment="gpt",
    provider="vendor",
    model="gpt-5.2",
    started_at=1_800_000_000.0,
    seconds=2.5,
    verdict="Slow",
    phase="first_token",
    queue_seconds=0.3,
    wasted=True,
    cost_usd=0.0125,
    detail="gpt gave no first token by its deadline",
    run_id="r1",
    path="writer#1/model#1",
)
ANSWERED = replace(
    ATTEMPT,
    id="a2",
    number=2,
    deployment="sim",
    provider="here",
    model="simulated",
    verdict="ok",
    phase="",
    queue_seconds=0.0,
    first_token_seconds=0.4,
    tokens_per_second=61.7,
    input_tokens=100,
    output_tokens=20,
    cost_usd=None,
    hedged=True,
    wasted=False,
    detail="",
)

APP = """
from ridethrough import workflow

@workflow
async def nothing() -> str:
    return "done"
"""


@pytest.fixture
def attempted(folder: Path, ask: Ask) -> Path:
    """A folder whose run r1 has two attempts on record."""
    (folder / "app.py").write_text(APP)
    ask("run", "app.py:nothing", "--id", "r1")
    store = open_store(folder)
    rows = [tuple(asdict(record)[name] for name in ATTEMPT_COLUMNS) for record in (ATTEMPT, ANSWERED)]
    with store.writer.begin() as connection:
        store.insert_attempts(connection.connection.cursor(), rows)
    store.close()
    return folder


def test_show_lists_the_attempts_of_a_run(attempted: Path, ask: Ask) -> None:
    out, _ = ask("show", "r1")
    lines = out.partition("attempts\n")[2].splitlines()
    assert lines[0].split()[:4] == ["STARTED", "STEP", "DEPLOYMENT", "VERDICT"]
    for part in ("writer#1/model#1", "gpt", "Slow (first_token)", "2.5 s", "0.3 s", "$0.0125", "wasted; gpt gave no"):
        assert part in lines[1]
    for part in ("sim", "ok", "0.4 s", "62", "?", "hedge"):
        assert part in lines[2]


def test_show_as_json_has_the_attempts(attempted: Path, ask: Ask) -> None:
    first, second = json.loads(ask("show", "r1", "--json")[0])["attempts"]
    assert first["path"] == "writer#1/model#1"
    assert (first["deployment"], first["verdict"], first["phase"]) == ("gpt", "Slow", "first_token")
    assert (first["queue_seconds"], first["wasted"], first["hedged"]) == (0.3, True, False)
    assert first["started_at"] == "2027-01-15T08:00:00Z"
    assert (second["first_token_seconds"], second["tokens_per_second"]) == (0.4, 61.7)
    assert (second["cost_usd"], second["hedged"]) == (None, True)
    assert "attempts" not in json.loads(ask("runs", "--json")[0])[0]


def test_a_run_without_model_calls_has_no_attempts(ask: Ask, folder: Path) -> None:
    (folder / "app.py").write_text(APP)
    ask("run", "app.py:nothing", "--id", "r1")
    assert "attempts" not in ask("show", "r1")[0]
    assert json.loads(ask("show", "r1", "--json")[0])["attempts"] == []
