"""Runs and their sandboxes: bodies of tools, crashes, parking, the reaper. Real sandboxes, real SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from sqlalchemy import Connection
from tests.agents.support import PATIENCE, Scripted, call

from ridethrough import (
    Agent,
    ConfigError,
    Diverged,
    Runtime,
    SandboxProfile,
    ToolContext,
    UsageError,
    tool,
    wait_for,
    workflow,
)
from ridethrough.runtime import control
from ridethrough.runtime.config import Config, parse_config
from ridethrough.runtime.payload import dump_error
from ridethrough.runtime.store import Store, StoredRow
from ridethrough.tools.builtin import fetch_url
from ridethrough.tools.lodging import Lodging
from ridethrough.tools.tool import Tool

pytestmark = [pytest.mark.anyio]

PROGRAM = Path(__file__).with_name("life.py")
OUTSIDE = "this is outside of the function"


def config(kind: str, more: str = "") -> Config:
    """A configuration whose profile ``python`` is of that kind."""
    top = f'durability = "process"\nreaper_seconds = 3600\nallow_local = true\n{more}\n'
    return parse_config(f'{top}[sandboxes.python]\nkind = "{kind}"\n')


def open_runtime(folder: Path, kind: str, more: str = "") -> Runtime:
    return Runtime.open(f"sqlite:///{folder / 'runs.db'}", config=config(kind, more), grace=0.0)


async def rows(runtime: Runtime, run_id: str) -> list[StoredRow]:
    """What is on record of a run's sandboxes."""
    found = await runtime.store.read(lambda connection: runtime.store.sandboxes(connection, live=False))
    return [row for row in found if row.run_id == run_id]


async def lodging(runtime: Runtime) -> Lodging:
    found: Lodging = await runtime.worker.companion("sandboxes")
    return found


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for something that another task or process is about to do."""
    with anyio.fail_after(PATIENCE):
        while not await condition():  # noqa: ASYNC110 - other processes set no event
            await anyio.sleep(0.02)


@pytest.fixture(params=["local", "docker"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "docker":
        request.getfixturevalue("python_image")
    return str(request.param)


# --- bodies ---------------------------------------------------------------------------------------------------------


@tool(sandbox="python", effect="read")
def count_words(text: str, least: int = 1) -> dict[str, int]:
    """Count words."""
    from collections import Counter

    print("counting", text)  # what a body prints is not its value
    return {word: count for word, count in Counter(text.split()).items() if count >= least}


@tool(sandbox="python", effect="read")
async def later(text: str) -> str:
    """An async body."""
    import asyncio

    await asyncio.sleep(0)
    return text[::-1]


@tool(sandbox="python", effect="read")
def broken(how: str) -> Any:
    """Go wrong."""
    import os

    if how == "raise":
        raise ValueError("no such thing")
    if how == "exit":
        os._exit(7)
    if how == "set":
        return {1, 2}
    return float("nan")


@tool(sandbox="python")
def remember(text: str) -> str:
    """Write to a file."""
    with open("memory", "a") as memory:
        memory.write(text + "\n")
    with open("memory") as memory:
        return memory.read()


@tool(confined=True)
async def note(text: str, ctx: ToolContext) -> str:
    """Write to a file through ctx.sandbox."""
    await ctx.sandbox.exec(["sh", "-c", 'printf "%s\\n" "$0" >> memory', text])
    return (await ctx.sandbox.exec(["cat", "memory"])).stdout


async def test_bodies_run_in_the_runs_sandbox(tmp_path: Path, kind: str) -> None:
    model = Scripted(
        [call("count_words", id="a", text="a b a", least=2), call("later", id="b", text="abc")],
        [call("broken", id=how, how=how) for how in ("raise", "exit", "set", "nan")],
        [call("remember", id="c", text="one")],
        [call("note", id="d", text="two")],
        "done",
    )
    agent = Agent("worker", model=model, tools=[count_words, later, broken, remember, note])
    async with open_runtime(tmp_path, kind) as runtime:
        run = await runtime.start(agent, "go")
        with anyio.fail_after(PATIENCE):
            await run.result()
        told = [[message.text for message in request.messages if message.role == "tool"] for request in model.requests]
        assert told[1] == ['{"a":2}', "cba"]
        raised, exited, no_json, nan = told[2][2:]
        assert raised == "broken failed: ValueError: no such thing"
        assert exited == "broken ended with status 7."
        assert "not JSON serializable" in no_json
        assert "float" in nan
        assert told[4][-2:] == ["one\n", "one\ntwo\n"]  # both had the same workspace
        await until(lambda: all_removed(runtime, run.id))
        [row] = await rows(runtime, run.id)
        assert (row.key, row.profile, row.runtime) == ("python", "python", "local" if kind == "local" else row.runtime)


async def all_removed(runtime: Runtime, run_id: str) -> bool:
    return all(row.status == "removed" and not row.live for row in await rows(runtime, run_id))


async def test_a_sandbox_of_its_own_for_each_call(tmp_path: Path, kind: str) -> None:
    @tool(sandbox="python", sandbox_scope="call")
    def alone(text: str) -> str:
        """Write to a file and read it."""
        with open("memory", "a") as memory:
            memory.write(text)
        with open("memory") as memory:
            return memory.read()

    model = Scripted([call("alone", id="a", text="x"), call("alone", id="b", text="y")], "done")
    async with open_runtime(tmp_path, kind) as runtime:
        run = await runtime.start(Agent("worker", model=model, tools=[alone]), "go")
        with anyio.fail_after(PATIENCE):
            await run.result()
        assert model.results == ["x", "y"]
        await until(lambda: all_removed(runtime, run.id))
        assert len(await rows(runtime, run.id)) == 2


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: _with_outside(), "'OUTSIDE' is defined outside of it"),
        (lambda: _with_closure("x"), "'word' is a variable of the function around it"),
        (lambda: tool("lazy", "Do nothing.", sandbox="python")(lambda: ""), "written with `def`"),
        (lambda: _with_ctx(), "there is no ctx"),
    ],
)
def test_a_body_that_is_not_complete_is_refused_when_it_is_decorated(make: Callable[[], object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make()


def _with_outside() -> Tool[Any, Any]:
    @tool(sandbox="python")
    def uses() -> str:
        """Use a global."""
        return OUTSIDE

    return uses


def _with_closure(word: str) -> Tool[Any, Any]:
    @tool(sandbox="python")
    def uses() -> str:
        """Use a variable."""
        return word

    return uses


def _with_ctx() -> Tool[Any, Any]:
    @tool(sandbox="python")
    def uses(ctx: ToolContext) -> str:
        """Use the context."""
        return ctx.run_id

    return uses


async def test_a_body_never_runs_on_the_host(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="runs in a sandbox"):
        remember("x")
    assert remember.function is not None


async def test_a_profile_that_is_missing_pauses_the_run_and_says_what_to_do(tmp_path: Path) -> None:
    @tool(sandbox="pythn", effect="read")
    def lost() -> str:
        """Run nowhere."""
        return ""

    model = Scripted(call("lost"), "done")
    async with open_runtime(tmp_path, "local") as runtime:
        run = await runtime.start(Agent("worker", model=model, tools=[lost]), "go")
        await until(lambda: _is(runtime, run.id, "paused"))
        view = await run.view()
        assert view.pause is not None
        assert view.pause.reason == "configuration"
        assert "did you mean 'python'" in str(view.waits[0].question)


async def _is(runtime: Runtime, run_id: str, status: str) -> bool:
    return (await runtime.describe(run_id, steps=False)).status == status


async def test_without_an_engine_the_run_waits_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    model = Scripted(call("remember", text="x"), "done")
    agent = Agent("worker", model=model, tools=[remember])
    where = f"sqlite:///{tmp_path / 'runs.db'}"
    async with Runtime.open(where, config=config("docker"), allow_local=False, grace=0.0) as runtime:
        run = await runtime.start(agent, "go")
        await until(lambda: _waits_for_sandbox(runtime, run.id))
        assert "Docker" in str((await run.view()).waits[0].question)
    async with Runtime.open(where, config=config("docker"), allow_local=True) as runtime:  # it runs locally then
        with anyio.fail_after(PATIENCE):
            assert await (await runtime.resume(run.id)).result() is not None
    assert model.results == ["x\n"]


async def _waits_for_sandbox(runtime: Runtime, run_id: str) -> bool:
    return any(wait.kind == "sandbox" for wait in (await runtime.describe(run_id, steps=False)).waits)


# --- parking --------------------------------------------------------------------------------------------------------

told_by = Scripted([call("remember", id="a", text="before")], "said", then="said")


@workflow(name="visits")
async def visits(start: str) -> str:
    """Work in the sandbox, wait for somebody, work in it again."""
    first = Agent("first", model=Scripted(call("remember", text="before"), "done"), tools=[remember])
    second = Agent("second", model=Scripted(call("remember", text="after"), SAY_RESULT), tools=[remember])
    await first.run(start)
    await wait_for("bell", str)
    return (await second.run(start)).output


def SAY_RESULT(request: Any) -> str:
    return "\n".join(message.text for message in request.messages if message.role == "tool")


@asynccontextmanager
async def parked_visit(folder: Path, kind: str, more: str = "") -> AsyncGenerator[tuple[Runtime, str]]:
    """A run that has used its sandbox, and waits; what is left of it at the end is removed."""
    async with _parked(folder, kind, more) as (runtime, run_id):
        yield runtime, run_id
        for row in await rows(runtime, run_id):
            if row.live:
                await remove_behind(runtime, row.id, kind)


@asynccontextmanager
async def _parked(folder: Path, kind: str, more: str) -> AsyncGenerator[tuple[Runtime, str]]:
    async with open_runtime(folder, kind, more) as runtime:
        run = await runtime.start(visits, "go")
        await until(lambda: _is(runtime, run.id, "waiting"))
        await until(lambda: _sandbox_is(runtime, run.id, "paused"))
        yield runtime, run.id


async def _sandbox_is(runtime: Runtime, run_id: str, status: str) -> bool:
    return [row.status for row in await rows(runtime, run_id)][-1:] == [status]


async def _ring(runtime: Runtime, run_id: str) -> str:
    await runtime.signal(run_id, "bell", "ring")
    with anyio.fail_after(PATIENCE):
        return str(await (await runtime.get(run_id)).result())


async def test_a_parked_run_freezes_its_sandbox_and_finds_it_again(tmp_path: Path, kind: str) -> None:
    async with parked_visit(tmp_path, kind) as (runtime, run_id):
        assert await _ring(runtime, run_id) == "before\nafter\n"
        assert len(await rows(runtime, run_id)) == 1


async def test_another_process_takes_the_sandbox_up(tmp_path: Path, kind: str) -> None:
    async with _parked(tmp_path, kind, "") as (_, run_id):
        pass
    async with open_runtime(tmp_path, kind) as runtime:
        assert await _ring(runtime, run_id) == "before\nafter\n"
        assert len(await rows(runtime, run_id)) == 1


async def test_a_long_pause_archives_the_workspace_and_the_next_call_restores_it(tmp_path: Path, kind: str) -> None:
    async with parked_visit(tmp_path, kind, "sandbox_pause_seconds = 0.001") as (runtime, run_id):
        keeper = await lodging(runtime)
        assert await keeper.reap_once() == 1
        [row] = await rows(runtime, run_id)
        assert (row.status, row.live) == ("archived", False)
        assert await _ring(runtime, run_id) == "before\nafter\n"
        old, new = sorted(await rows(runtime, run_id), key=lambda row: row.created_at)
        assert (old.status, old.archive_ref) == ("removed", None)
        assert new.id != old.id


async def test_a_sandbox_that_was_removed_meanwhile_is_told_to_the_model_once(tmp_path: Path, kind: str) -> None:
    async with parked_visit(tmp_path, kind) as (runtime, run_id):
        [row] = await rows(runtime, run_id)
        await remove_behind(runtime, row.id, kind)
        told = await _ring(runtime, run_id)
        assert "is gone" in told
        assert "the next call gets a new, empty one" in told


async def remove_behind(runtime: Runtime, sandbox_id: str, kind: str) -> None:
    """Remove a sandbox as somebody from outside does."""
    await (await (await lodging(runtime)).quarters.at(kind)).host.remove(sandbox_id)


async def set_row(runtime: Runtime, row: StoredRow, **values: Any) -> None:
    """Write a sandbox's row as another worker would have done."""
    store = runtime.store
    assert await runtime.worker.journal.do(
        lambda connection: store.claim_sandbox(connection, row.id, row.generation, **values)
    )


async def test_a_run_that_wakes_waits_for_who_archives_its_sandbox(tmp_path: Path, kind: str) -> None:
    async with parked_visit(tmp_path, kind) as (runtime, run_id):
        [row] = await rows(runtime, run_id)
        now = runtime.clock.now()
        await set_row(runtime, row, status="archiving", worker_id="other", expires_at=now + 1.5)  # it dies over it
        assert await _ring(runtime, run_id) == "before\nafter\n"
        assert runtime.clock.now() >= now + 1.5
        assert len(await rows(runtime, run_id)) == 1


async def test_a_crash_between_archive_and_removal_loses_nothing(tmp_path: Path, kind: str) -> None:
    async with parked_visit(tmp_path, kind, "sandbox_pause_seconds = 0.001") as (runtime, run_id):
        keeper = await lodging(runtime)
        assert await keeper.reap_once() == 1
        [row] = await rows(runtime, run_id)
        await set_row(runtime, row, live=True, expires_at=1.0)  # as it is when the process dies at `sandbox.archived`
        assert await keeper.reap_once() == 1
        [row] = await rows(runtime, run_id)
        assert (row.status, row.live) == ("archived", False)
        assert await _ring(runtime, run_id) == "before\nafter\n"


async def test_what_the_reaper_finds_gone_is_told_to_the_next_call(tmp_path: Path, kind: str) -> None:
    async with parked_visit(tmp_path, kind, "sandbox_pause_seconds = 0.001") as (runtime, run_id):
        keeper, [row] = await lodging(runtime), await rows(runtime, run_id)
        await remove_behind(runtime, row.id, kind)
        assert await keeper.reap_once() == 1
        assert [row.status for row in await rows(runtime, run_id)] == ["lost"]
        assert "is gone" in await _ring(runtime, run_id)


async def test_lower_limits_have_a_sandbox_of_their_own(tmp_path: Path, kind: str) -> None:
    wide = SandboxProfile(kind="local" if kind == "local" else "docker", memory=2**29)

    @tool(sandbox=wide, effect="read")
    def first() -> str:
        """Leave a mark."""
        open("mark", "w").close()
        return "marked"

    @tool(sandbox=wide.less(memory=2**28), effect="read")
    def second() -> list[str]:
        """Look for it."""
        import os

        return os.listdir(".")

    model = Scripted(call("first"), call("second"), "done")
    async with open_runtime(tmp_path, kind) as runtime:
        run = await runtime.start(Agent("worker", model=model, tools=[first, second]), "go")
        with anyio.fail_after(PATIENCE):
            await run.result()
        assert model.results == ["[]"]
        assert len({row.key for row in await rows(runtime, run.id)}) == 2


async def test_a_run_whose_code_has_changed_keeps_its_workspace(tmp_path: Path) -> None:
    assert control.is_over("done", None)
    assert control.is_over(None, None)
    assert control.is_over("failed", dump_error(ValueError("x")))
    assert not control.is_over("failed", dump_error(Diverged("x", path="", recorded="", asked="")))
    assert not control.is_over("paused", None)


# --- the reaper -----------------------------------------------------------------------------------------------------


async def test_what_a_run_leaves_is_reaped_when_it_has_ended_elsewhere(tmp_path: Path, kind: str) -> None:
    async with parked_visit(tmp_path, kind) as (runtime, run_id):
        await runtime.cancel(run_id)  # nobody executes it, so nobody is there to remove its sandbox
        keeper = await lodging(runtime)
        assert await keeper.reap_once() == 1
        assert await all_removed(runtime, run_id)
        assert await keeper.reap_once() == 0


async def test_a_sandbox_on_record_that_was_never_made_is_forgotten(tmp_path: Path, kind: str) -> None:
    async with parked_visit(tmp_path, kind) as (runtime, run_id):
        keeper, [row] = await lodging(runtime), await rows(runtime, run_id)
        ghost = {"id": "ghost", "profile": "python", "host": row.host, "worker_id": "dead", "status": "starting"}
        ghost |= {"live": True, "key": "", "generation": 0, "created_at": 0.0, "expires_at": 1.0}
        await runtime.worker.journal.do(lambda connection: runtime.store.insert_sandbox(connection, ghost))
        assert await keeper.reap_once() == 1
        left = await runtime.store.read(lambda connection: runtime.store.sandboxes(connection, live=False))
        assert "ghost" not in {row.id for row in left}


async def test_a_sandbox_whose_row_is_gone_is_removed(tmp_path: Path, kind: str) -> None:
    async with parked_visit(tmp_path, kind) as (runtime, run_id):
        keeper, [row] = await lodging(runtime), await rows(runtime, run_id)

        def lose(connection: Connection) -> None:
            connection.exec_driver_sql("DELETE FROM sandboxes WHERE id = ?", (row.id,))

        await runtime.worker.journal.do(lose)
        assert await keeper.reap_once() == 1
        assert await keeper.reap_once() == 0
        assert "after" in await _ring(runtime, run_id)


# --- crashes --------------------------------------------------------------------------------------------------------


def begin_life(
    folder: Path, calls: int, seconds: float, kind: str, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    more = ["--local"] if kind == "local" else []
    command = [sys.executable, str(PROGRAM), f"sqlite:///{folder / 'runs.db'}", "r1", str(calls), str(seconds), *more]
    inherited = {**os.environ, **(environment or {})}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=inherited
    )


async def started(folder: Path, calls: int) -> bool:
    """Whether that many calls are on record as about to start."""
    if not (folder / "runs.db").exists():
        return False
    store = Store(f"sqlite:///{folder / 'runs.db'}")
    try:
        intents = await store.read(lambda connection: store.intents(connection, "r1"))
    except Exception:
        return False
    finally:
        store.close()
    return len(intents) == calls


@pytest.mark.processes
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
async def test_calls_go_on_while_their_worker_is_dead(tmp_path: Path, kind: str, signal_number: int) -> None:
    calls, seconds = (20, 10.0) if (kind, signal_number) == ("docker", signal.SIGKILL) else (5, 3.0)
    first = begin_life(tmp_path, calls, seconds, kind)
    try:
        await until(lambda: started(tmp_path, calls))
        await anyio.sleep(1.5)  # all have begun; none has ended
        os.kill(first.pid, signal_number)
    finally:
        first.communicate(timeout=20)
    second = begin_life(tmp_path, calls, seconds, kind)
    out, _ = await anyio.to_thread.run_sync(lambda: second.communicate(timeout=90))
    assert second.returncode == 0, out
    told = out.partition("result: ")[2].splitlines()
    assert told[:calls] == [f"done {number}" for number in range(calls)], out
    written = Counter(told[calls].strip("[]").replace('"', "").split(","))
    assert written == Counter({f"{what} {number}": 1 for what in ("begin", "end") for number in range(calls)})
    assert nothing_left(tmp_path, kind)


@pytest.mark.processes
async def test_calls_that_were_cut_off_with_their_sandbox_are_told_so_and_not_run_again(
    tmp_path: Path, kind: str
) -> None:
    first = begin_life(tmp_path, 4, 30.0, kind)
    try:
        await until(lambda: started(tmp_path, 4))
        await anyio.sleep(1.0)
        first.kill()
    finally:
        first.communicate(timeout=20)
    async with open_runtime(tmp_path, kind) as runtime:
        [row] = await rows(runtime, "r1")
        await remove_behind(runtime, row.id, kind)
    second = begin_life(tmp_path, 4, 30.0, kind)
    out, _ = await anyio.to_thread.run_sync(lambda: second.communicate(timeout=60))
    assert second.returncode == 0, out
    assert out.count("This call of work was interrupted by a crash.") == 4, out
    assert "is gone" in out  # and the next call learns of the workspace


@tool(sandbox="python", timeout=60)
def count_up(path: str) -> str:
    """Begin, wait for a file, end."""
    import os
    import time

    with open("begun", "a") as begun:
        begun.write("x")
    while not os.path.exists(path):
        time.sleep(0.02)
    with open("begun") as begun:
        return begun.read()


async def test_a_worker_that_closes_leaves_its_calls_running_for_the_next(tmp_path: Path, kind: str) -> None:
    agent = Agent("worker", model=Scripted(call("count_up", path="go"), SAY_RESULT), tools=[count_up])
    async with open_runtime(tmp_path, kind) as runtime:
        run = await runtime.start(agent, "go")
        await until(lambda: _has_begun(runtime, run.id))
    async with open_runtime(tmp_path, kind) as runtime:
        keeper = await lodging(runtime)
        again = await runtime.resume(run.id)
        sandbox = await keeper.sandbox(run.id, "python")
        await sandbox.write("go", "")
        with anyio.fail_after(PATIENCE):
            assert await again.result() is not None
        view = await again.view()
        assert view.result["output"] == "x"


async def _has_begun(runtime: Runtime, run_id: str) -> bool:
    if not [row for row in await rows(runtime, run_id) if row.status == "running"]:
        return False
    sandbox = await (await lodging(runtime)).sandbox(run_id, "python")
    return "begun" in {each.path for each in (await sandbox.list()).entries}


async def test_a_cancelled_run_ends_its_calls_and_its_sandbox(tmp_path: Path, kind: str) -> None:
    agent = Agent("worker", model=Scripted(call("count_up", path="go"), SAY_RESULT), tools=[count_up])
    async with open_runtime(tmp_path, kind) as runtime:
        run = await runtime.start(agent, "go")
        await until(lambda: _has_begun(runtime, run.id))
        await run.cancel()
        await until(lambda: all_removed(runtime, run.id))


@pytest.mark.processes
@pytest.mark.parametrize(
    "point", ["sandbox.before_bind:1", "sandbox.after_bind:1", "finish.before:1", "finish.after:1"]
)
async def test_a_kill_where_a_sandbox_changes_hands_leaves_nothing(tmp_path: Path, kind: str, point: str) -> None:
    first = begin_life(tmp_path, 2, 0.1, kind, {"RIDETHROUGH_KILL_AT": point})
    out, _ = await anyio.to_thread.run_sync(lambda: first.communicate(timeout=60))
    assert first.returncode == -signal.SIGKILL, out
    second = begin_life(tmp_path, 2, 0.1, kind)
    out, _ = await anyio.to_thread.run_sync(lambda: second.communicate(timeout=60))
    assert second.returncode == 0, out
    assert out.partition("result: ")[2].splitlines()[:2] == ["done 0", "done 1"]
    async with open_runtime(tmp_path, kind) as runtime:  # what no run had yet is on a lease: let that pass
        keeper = await lodging(runtime)
        store = runtime.store
        ids = [row.id for row in await store.read(store.sandboxes)]

        def let_pass(connection: Connection) -> None:
            for sandbox_id in ids:
                row = store.sandbox(connection, sandbox_id)
                assert row is not None
                store.update_sandbox(connection, sandbox_id, row.generation, expires_at=0.0)

        await runtime.worker.journal.do(let_pass)

        async def all_gone() -> bool:  # the worker's own first round is under way beside this one
            await keeper.reap_once()
            return not await store.read(store.sandboxes)

        await until(all_gone)
    assert nothing_left(tmp_path, kind)


def nothing_left(folder: Path, kind: str) -> bool:
    """Whether the host has none of the sandboxes that are on record, those kept ready included."""
    store = Store(f"sqlite:///{folder / 'runs.db'}")
    rows = store.read_now(lambda connection: store.sandboxes(connection, live=False))
    store.close()
    if kind == "docker":
        listed = subprocess.run(["docker", "ps", "-aq", "--no-trunc", "--format", "{{.Names}}"], capture_output=True)
        return not {f"ridethrough-{row.id}" for row in rows} & set(listed.stdout.decode().split())
    return not any(row.live for row in rows if row.run_id is not None)


# --- the network ----------------------------------------------------------------------------------------------------


@tool(sandbox="python", effect="read")
def ask_around() -> str:
    """Ask for a page that is not on the list."""
    import urllib.request

    try:
        urllib.request.urlopen("http://not-on-the-list.test/")
    except OSError as error:
        return str(error)
    return "let through"


async def test_what_a_run_asks_of_the_network_is_on_record(tmp_path: Path, python_image: str) -> None:
    asks = [call("ask_around", id="a"), call("fetch_url", id="b", url="http://169.254.169.254/latest/meta-data/")]
    model = Scripted(asks, "done")
    text = 'durability = "process"\nreaper_seconds = 0.1\n[sandboxes.python]\nnetwork = ["on-the-list.test"]\n'
    where = f"sqlite:///{tmp_path / 'runs.db'}"
    async with Runtime.open(where, config=parse_config(text), grace=0.0) as runtime:
        run = await runtime.start(Agent("worker", model=model, tools=[ask_around, fetch_url]), "go")
        with anyio.fail_after(PATIENCE):
            await run.result()
        assert "403" in model.results[0]
        assert "169.254.169.254 is not on the list of hosts" in model.results[1]
    store = Store(where)
    asked = store.read_now(lambda connection: store.egress(connection, run.id))
    store.close()
    assert {(row.host, row.port, row.allowed) for row in asked} == {
        ("not-on-the-list.test", 80, False),
        ("169.254.169.254", 80, False),
    }
    assert all(row.reason for row in asked)
