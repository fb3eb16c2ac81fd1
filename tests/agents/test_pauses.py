"""Why a run waits for models, as rows, events and commands say it; and what makes it go on, by itself or not."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest

from ridethrough import Agent, Runtime, workflow
from ridethrough.cli import run as command
from ridethrough.runtime.config import Config, load_config
from ridethrough.runtime.errors import RunFailed
from ridethrough.runtime.events import RunPaused
from ridethrough.runtime.router.providers.simulated import Fault, Script, SimulatedProvider
from ridethrough.runtime.router.router import Router
from ridethrough.runtime.views import RunView

pytestmark = pytest.mark.anyio

clerk = Agent("clerk", model="smart", instructions="You help.")


@workflow
async def pause_ask(text: str) -> str:
    return str((await clerk.run(text)).output)


@workflow
async def pause_parent(text: str) -> str:
    return "parent of " + await pause_ask(text)


CONFIG = """
database = "sqlite:///runs.db"
durability = "process"
[providers.vendor]
kind = "openai"
base_url = "{url}"
api_key = "file:key"
[models.m]
provider = "vendor"
model = "sim"
price = {{ input = 1000, output = 1000 }}
timeouts = {{ connect = 1, first_token = 5, idle = 5, total = 10 }}
[routes.smart]
models = ["m"]
"""
BUDGET = """
[[budgets]]
scope = "tenant"
usd = {usd}
per = "day"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a key."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").write_text("a-key-that-is-fine")
    return tmp_path


def configured(folder: Path, provider: SimulatedProvider, extra: str = "") -> Config:
    """Write the configuration, and load it as the commands will."""
    (folder / "ridethrough.toml").write_text(CONFIG.format(url=provider.base_url) + extra)
    return load_config(folder / "ridethrough.toml")


def serving(config: Config) -> Runtime:
    """A runtime that lets go at once, as a killed process would."""
    return Runtime.open(config=config, grace=0.0)


async def until_paused(runtime: Runtime, run_id: str, reason: str) -> RunView:
    """The run once it is paused for the reason."""
    with anyio.fail_after(20):
        async for event in runtime.events(run_id):
            if isinstance(event, RunPaused) and event.reason == reason:
                break
            assert event.type != "run_finished", event
    return await runtime.describe(run_id)


async def finished(runtime: Runtime, run_id: str) -> Any:
    """The result of a run that nobody moves."""
    with anyio.fail_after(20):
        return await (await runtime.get(run_id)).result()


async def count(runtime: Runtime, run_id: str, kind: str) -> int:
    """How many kept events of that type a run has."""
    return sum([event.type == kind async for event in runtime.events(run_id, follow=False)])


async def asked_again(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Wait until the router was asked so often for room: ten times are a second in which a run could be woken."""
    enough, room = anyio.Event(), Router.room
    left = times

    async def counted(self: Router, awaits: str) -> int:
        nonlocal left
        left -= 1
        if left <= 0:
            enough.set()
        return await room(self, awaits)

    with monkeypatch.context() as patched, anyio.fail_after(20):
        patched.setattr(Router, "room", counted)
        await enough.wait()


# --- what is said ---------------------------------------------------------------------------------------------------

SEEN: dict[str, tuple[Fault, str]] = {
    "brownout": (Fault(kind="status", status=503), "the models (brownout)"),
    "outage": (Fault(kind="refuse"), "the models (outage)"),
    "quota": (Fault(kind="quota", headers={"retry-after": "1"}), "credit"),
}


@pytest.mark.parametrize("reason", SEEN)
async def test_what_is_awaited_and_since_when(here: Path, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Said everywhere while it lasts; and when the condition holds the run goes on by itself."""
    fault, told = SEEN[reason]
    async with SimulatedProvider(Script().rule("{{user}}")) as provider:
        provider.faults.add(fault)
        before = time.time()
        async with serving(configured(here, provider)) as runtime:
            await runtime.start(pause_ask, "x", id="x")
            view = await until_paused(runtime, "x", reason)
            event = next(e for e in [e async for e in runtime.events("x", follow=False)] if isinstance(e, RunPaused))
            assert_said(view, event, reason, before)
            await assert_commands_say(capsys, reason, told)
            provider.faults.clear()
            assert await finished(runtime, "x") == "x"
            view = await runtime.describe("x")
            assert (view.pause, view.waits) == (None, [])
            assert await count(runtime, "x", "run_resumed") == await count(runtime, "x", "run_paused")


def assert_said(view: RunView, event: RunPaused, reason: str, before: float) -> None:
    assert view.status == "paused"
    assert view.pause is not None
    assert view.pause.since is not None
    assert before <= view.pause.since.timestamp() <= time.time()
    assert (view.pause.reason, event.reason) == (reason, reason)
    assert event.until is not None
    assert event.until == view.pause.until
    assert event.until > datetime.fromtimestamp(before, UTC)
    (wait,) = view.waits
    assert (wait.kind, wait.name) == ("model", reason)
    assert before <= wait.since.timestamp() <= view.pause.since.timestamp()


async def assert_commands_say(capsys: pytest.CaptureFixture[str], reason: str, told: str) -> None:
    async def said(*arguments: str) -> str:
        assert await anyio.to_thread.run_sync(command, list(arguments)) == 0
        return capsys.readouterr().out

    listed = await said("runs", "--status", "paused")
    page = await said("show", "x")
    assert f"paused ({reason})" in page
    for text in (listed, page):
        assert told in text
        assert ", since " in text
    (run,) = json.loads(await said("runs", "--status", "paused", "--json"))
    shown = json.loads(await said("show", "x", "--json"))
    for each in (run, shown):
        assert each["pause"]["reason"] == reason
        assert each["pause"]["since"] >= each["waits"][0]["since"]
        assert each["pause"]["until"] is not None
        assert each["waits"][0]["question"]


# --- money ----------------------------------------------------------------------------------------------------------


async def spend_all(here: Path, provider: SimulatedProvider, usd: float) -> Config:
    """One answer uses the budget up, the next run is paused; and that costs nothing while it lasts."""
    config = configured(here, provider, BUDGET.format(usd=usd))
    async with serving(config) as runtime:
        await runtime.start(pause_ask, "first", id="first", tenant="acme")
        assert await finished(runtime, "first") == "first"
        await runtime.start(pause_ask, "x", id="x", tenant="acme")
        await until_paused(runtime, "x", "budget")
    return config


async def test_a_budget_that_is_not_quite_used_up_wakes_nobody_in_vain(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rest that is too little for a call is not room; it was a loop of waking, refusing and parking."""
    async with SimulatedProvider(Script().rule("{{user}}")) as provider:
        config = await spend_all(here, provider, 0.05)
        async with serving(config) as runtime:
            view = await runtime.describe("x")
            assert view.pause is not None
            assert view.pause.until is not None
            assert view.pause.until.strftime("%H:%M:%S") == "00:00:00", "the day ends at midnight, UTC"
            await asked_again(monkeypatch, 15)
            assert await count(runtime, "x", "run_paused") == 1
        with closing(sqlite3.connect(here / "runs.db")) as connection:
            spent = connection.execute("SELECT spent FROM budgets").fetchone()[0]
            assert 0 < spent < 50_000_000, "there is something left"
        assert len(provider.requests) == 1


async def test_a_raised_budget_is_enough(here: Path) -> None:
    async with SimulatedProvider(Script().rule("{{user}}")) as provider:
        await spend_all(here, provider, 0.05)
        async with serving(configured(here, provider, BUDGET.format(usd=5.0))) as runtime:
            assert await finished(runtime, "x") == "x"


async def test_a_budget_that_is_gone_is_enough(here: Path) -> None:
    async with SimulatedProvider(Script().rule("{{user}}")) as provider:
        await spend_all(here, provider, 0.05)
        async with serving(configured(here, provider)) as runtime:
            assert await finished(runtime, "x") == "x"


async def test_a_new_window_is_enough(here: Path) -> None:
    """The window that the run waits for is over, and nothing is spent in the one of now."""
    async with SimulatedProvider(Script().rule("{{user}}")) as provider:
        config = await spend_all(here, provider, 0.05)
        with closing(sqlite3.connect(here / "runs.db")) as connection, connection:
            (awaits,) = connection.execute("SELECT awaits FROM runs WHERE id = 'x'").fetchone()
            kind, key, usd, resets_at, least = json.loads(awaits)
            over = json.dumps([kind, key.replace(":20", ":19"), usd, resets_at - 365 * 86400, least])
            connection.execute("UPDATE runs SET awaits = ? WHERE id = 'x'", (over,))
            connection.execute("UPDATE budgets SET key = ?", (key.replace(":20", ":19"),))
        async with serving(config) as runtime:
            assert await finished(runtime, "x") == "x"


# --- accounts and keys ----------------------------------------------------------------------------------------------


async def test_an_account_that_was_topped_up_is_asked_when_somebody_says_so(here: Path) -> None:
    """Without a hint an account is left alone for minutes, and every worker knows; a person's word outweighs that."""
    async with SimulatedProvider(Script().rule("{{user}}")) as provider:
        provider.faults.add(Fault(kind="quota"))
        config = configured(here, provider)
        async with serving(config) as runtime:
            await runtime.start(pause_ask, "x", id="x")
            await until_paused(runtime, "x", "quota")
        provider.faults.clear()
        async with serving(config) as runtime:
            await runtime.resume("x")
            assert await finished(runtime, "x") == "x"


@pytest.mark.parametrize("same_process", [True, False])
async def test_a_mended_key_is_tried_at_once(here: Path, same_process: bool) -> None:
    """The refused key is known for a minute; another one is another key."""
    bad = Fault(kind="auth", body={"error": {"message": "Incorrect API key", "code": "invalid_api_key"}})
    async with SimulatedProvider(Script().rule("{{user}}")) as provider:
        provider.faults.add(bad)
        config = configured(here, provider)
        async with serving(config) as runtime:
            await runtime.start(pause_parent, "x", id="x")
            view = await runtime.describe("x")
            with anyio.fail_after(20):
                while not view.children:
                    await anyio.sleep(0.01)
                    view = await runtime.describe("x")
            child = await until_paused(runtime, view.children[0], "configuration")
            assert "Incorrect API key" in (child.waits[0].question or "")
            assert child.pause is not None
            assert child.pause.until is not None  # it is tried again now and then
            (here / "key").write_text("another-key-that-is-fine")
            provider.faults.clear()
            if same_process:
                await runtime.resume("x")
                assert await finished(runtime, "x") == "parent of x"
        if not same_process:
            async with serving(config) as runtime:
                await runtime.resume("x")
                assert await finished(runtime, "x") == "parent of x"
        sent = [handled.request.headers["authorization"] for handled in provider.requests]
        assert sent == ["Bearer a-key-that-is-fine", "Bearer another-key-that-is-fine"]


# --- the foreground -------------------------------------------------------------------------------------------------

PROGRAM = """\
from ridethrough import Agent, workflow

clerk = Agent("clerk", model="smart", instructions="You help.")


@workflow
async def ask(text: str) -> str:
    return str((await clerk.run(text)).output)


@workflow
async def parent(text: str) -> str:
    return "parent of " + await ask(text)
"""


MANY = """
from ridethrough import fan_out

@workflow
async def many(count: int) -> int:
    return len(await fan_out(ask_one, range(count)))


async def ask_one(number: int) -> str:
    return str((await clerk.run(f"question {number}")).output)
"""


async def run_command(*arguments: str, meanwhile: Callable[[], None] | None = None) -> tuple[int, str]:
    """Exit status and all that was printed; ``meanwhile`` is called once something is awaited."""
    program = (str(Path(sys.executable).with_name("ridethrough")), *arguments)
    printed = ""
    with anyio.fail_after(60):
        async with await anyio.open_process(program, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            async for chunk in process.stdout:
                printed += chunk.decode()
                if meanwhile is not None and "waits for" in printed:
                    meanwhile()
                    meanwhile = None
    assert process.returncode is not None
    return process.returncode, printed


@pytest.mark.processes
@pytest.mark.parametrize(
    ("reason", "flow"), [("brownout", "ask"), ("outage", "parent"), ("quota", "ask"), ("quota", "parent")]
)
async def test_the_foreground_stays_while_it_will_pass_and_leaves_what_a_person_must_do(
    here: Path, reason: str, flow: str
) -> None:
    (here / "app.py").write_text(PROGRAM)
    fault = {"quota": Fault(kind="quota")}.get(reason) or SEEN[reason][0]
    async with SimulatedProvider(Script().rule("{{user}}")) as provider:
        configured(here, provider)
        provider.faults.add(fault)
        clear = provider.faults.clear if reason != "quota" else None
        arguments = ("run", f"app:{flow}", "--id", "x", "--input", '{"text": "hello"}')
        status, printed = await run_command(*arguments, meanwhile=clear)
        assert status == (3 if reason == "quota" else 0), printed
        if reason == "quota":
            assert "nothing is lost" in printed
            assert "ridethrough resume x" in printed
            provider.faults.clear()
            status, printed = await run_command("resume", "x")
            assert status == 0, printed
        assert printed.rstrip().endswith("hello"), printed


@pytest.mark.processes
async def test_the_foreground_leaves_when_the_money_is_gone(here: Path) -> None:
    (here / "app.py").write_text(PROGRAM)
    async with SimulatedProvider(Script().rule("{{user}}")) as provider:
        configured(here, provider, BUDGET.format(usd=0.05))
        first = ("run", "app:ask", "--tenant", "acme", "--input", '{"text": "first"}')
        assert (await run_command(*first))[0] == 0
        run = ("run", "app:parent", "--id", "x", "--tenant", "acme", "--input", '{"text": "hello"}')
        status, printed = await run_command(*run)
        assert status == 3, printed
        assert "budget" in printed
        configured(here, provider, BUDGET.format(usd=5))
        status, printed = await run_command("resume", "x")
        assert (status, printed.rstrip().rpartition("\n")[2]) == (0, "parent of hello"), printed


@pytest.mark.processes
async def test_branches_that_wait_for_the_same_say_it_once_and_how_to_go_on(here: Path) -> None:
    (here / "app.py").write_text(PROGRAM + MANY)
    async with SimulatedProvider(Script().rule("{{user}}")) as provider:
        configured(here, provider)
        provider.faults.add(Fault(kind="quota"))
        status, printed = await run_command("run", "app:many", "--id", "x", "--input", "4")
        assert status == 3, printed
        _, listed = await run_command("runs")
        assert listed.count("credit") == 1, listed
        _, shown = await run_command("show", "x")
        assert shown.count("Add credit") == shown.count("ridethrough resume x") == 1, shown
        assert shown.index("Add credit") < shown.index("ridethrough resume x")


async def test_a_call_that_was_refused_has_cost_nothing(here: Path) -> None:
    async with SimulatedProvider(Script().rule("{{user}}")) as provider:
        provider.faults.add(Fault(status=400))
        async with serving(configured(here, provider)) as runtime:
            run = await runtime.start(pause_parent, "x", id="x")
            with pytest.raises(RunFailed):
                await run.result()
            view = await runtime.describe((await runtime.describe("x")).children[0])
    assert (view.usage.model_calls, view.usage.unpriced_calls, view.cost_usd) == (1, 0, 0.0)
