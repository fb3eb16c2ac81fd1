"""MCP servers as tools: real processes on stdio, of a few lines that do everything wrong; the SDK's own on HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, cast

import anyio
import anyio.lowlevel
import pytest
from tests.agents.support import PATIENCE, Scripted, call, open_runtime

from ridethrough import Agent, ConfigError, Tool, ToolContext, ToolFailed, ToolInterrupted
from ridethrough.sandboxes.standalone import local_sandbox
from ridethrough.tools.mcp import McpServer
from ridethrough.tools.mcp.pipe import LocalPipe
from ridethrough.tools.schema import ArgumentsInvalid

pytestmark = pytest.mark.anyio

HERE = Path(__file__).parent
SERVER = HERE / "mcp_server.py"
SECRET = "s3cret-of-the-harbour"
Tools = dict[str, Tool[..., Any]]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["plain", "modern"])
def revision(request: pytest.FixtureRequest) -> str:
    """The mode of the server that speaks 2025-11-25, and of the one that speaks 2026-07-28."""
    return str(request.param)


class Log:
    """What a server has noted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    @property
    def pids(self) -> list[int]:
        return [line["pid"] for line in self.lines if "pid" in line]

    def calls(self, name: str) -> int:
        return sum(line.get("method") == "tools/call" and line["params"]["name"] == name for line in self.lines)

    def requests(self, method: str) -> list[Any]:
        return [line for line in self.lines if line.get("method") == method]


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "server.log")


def server(log: Log, mode: str = "plain", **options: Any) -> McpServer:
    return McpServer.stdio("t", [sys.executable, str(SERVER), mode, str(log.path)], **options)


async def tools_of(given: McpServer, **choices: Any) -> Tools:
    return {each.name: each for each in await given.tools(**choices)}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- tools ----------------------------------------------------------------------------------------------------------


async def test_tools_are_listed_page_by_page_with_effects_of_their_hints(log: Log, revision: str) -> None:
    async with server(log, revision) as given:
        tools = await tools_of(given)
    assert len(tools) == 17
    assert len(log.requests("tools/list")) == 4
    assert {name: tools[f"t_{name}"].effect for name in ("echo", "add", "die")} == {
        "echo": "read",
        "add": "idempotent",
        "die": "write",
    }
    assert tools["t_echo"].description == "Does echo."
    assert tools["t_echo"].parameters.json["required"] == ["text"]
    assert "t_odd_name" in tools


async def test_choices(log: Log) -> None:
    async with server(log) as given:
        tools = await tools_of(
            given,
            include=["echo", "die"],
            prefix="",
            effects={"die": "idempotent"},
            approval={"die": True},
            timeout={"die": 5},
            retries=2,
        )
        wrongs: list[dict[str, Any]] = [{"include": ["ecko"]}, {"exclude": ["ecko"]}, {"effects": {"ecko": "read"}}]
        for wrong in wrongs:
            with pytest.raises(ConfigError, match="there is no 'ecko'; did you mean 'echo'"):
                await given.tools(**wrong)
    assert [(each.name, each.effect, each.approval, each.timeout, each.retries) for each in tools.values()] == [
        ("echo", "read", False, 60, 2),
        ("die", "idempotent", True, 5, 2),
    ]


async def test_two_tools_of_one_name_are_named(log: Log) -> None:
    async with server(log, "clash") as given:
        with pytest.raises(ConfigError, match=r"'a\.b' and 'a/b' would both be the tool 't_a_b'"):
            await given.tools()
        assert "t_a_b" in await tools_of(given, exclude=["a/b"])


async def test_outputs(log: Log, revision: str) -> None:
    async with server(log, revision) as given:
        tools = await tools_of(given)
        assert await tools["t_echo"](text="hi") == "hi"
        assert await tools["t_add"](a=1, b=2) == 'a sum\n{"sum": 3}'
        told, image = cast(list[Any], await tools["t_picture"]())
        assert told == "see\n[image image/tiff, 3 bytes, not shown]\n[resource r: file:///r.txt]"
        assert (image.data, image.media_type) == (b"\0\0\0", "image/png")
        with pytest.raises(ToolFailed, match=r"^it went wrong$"):
            await tools["t_fail"]()
        with pytest.raises(ToolFailed, match="tools/call is not to be had"):
            await tools["t_error"]()
        with pytest.raises(ToolFailed, match="no result of a tool"):
            await tools["t_no_result"]()
        with pytest.raises(ArgumentsInvalid, match=r"\$\.text: must be a string; got 5"):
            await tools["t_echo"](text=5)
    assert log.calls("echo") == 1
    assert len(log.pids) == 1


async def test_an_agent_calls_them_in_parallel(log: Log, tmp_path: Path) -> None:
    model = Scripted([call("t_echo", text="a"), call("t_echo", text="b"), call("t_fail")], "done")
    async with server(log) as given:
        agent = Agent("user", model=model, tools=await given.tools())
        async with open_runtime(tmp_path):
            with anyio.fail_after(PATIENCE):
                await agent.run("go")
    assert model.results == ["a", "b", "it went wrong"]


async def test_progress_is_told_while_the_call_goes_on(log: Log) -> None:
    told: list[str] = []
    heard = anyio.Event()

    def hear(text: str) -> None:
        told.append(text)
        heard.set()

    ctx = ToolContext[Any](run_id="r", call_id="c", idempotency_key="k", deps=None, on_progress=hear)
    async with server(log) as given:
        tools = await tools_of(given)
        async with anyio.create_task_group() as group:
            group.start_soon(partial(tools["t_progress"], ctx=ctx))
            with anyio.fail_after(PATIENCE):
                await heard.wait()
            await tools["t_echo"](text="and now go on")
    assert told == ["half"]


# --- cancellation and deadlines -------------------------------------------------------------------------------------


async def cancelled(log: Log, tools: Tools) -> Any:
    """The server's note that it was told of a cancellation. It is told behind the back of whoever went away."""
    with anyio.fail_after(PATIENCE):
        while not log.requests("notifications/cancelled"):
            await tools["t_echo"](text="and on it goes")
    return log.requests("notifications/cancelled")[0]["params"]["requestId"]


async def test_a_cancelled_call_is_told_to_the_server_and_leaves_at_once(log: Log, revision: str) -> None:
    async with server(log, revision) as given:
        tools = await tools_of(given)
        async with anyio.create_task_group() as group:
            group.start_soon(tools["t_wait"])
            with anyio.fail_after(PATIENCE):
                while not log.calls("wait"):
                    await tools["t_echo"](text="not yet")
            group.cancel_scope.cancel()
        (asked,) = [line for line in log.requests("tools/call") if line["params"]["name"] == "wait"]
        assert await cancelled(log, tools) == asked["id"]
    assert len(log.pids) == 1


async def test_a_call_that_takes_too_long_is_told_to_the_server(log: Log) -> None:
    async with server(log) as given:
        tools = await tools_of(given, timeout={"wait": 0.2, "wrong_id": 0.2})
        with pytest.raises(TimeoutError, match=r"wait of the MCP server 't' did not answer within 0\.2 s"):
            await tools["t_wait"]()
        with pytest.raises(TimeoutError):  # an answer to what nobody asked is no answer
            await tools["t_wrong_id"]()
        await cancelled(log, tools)


async def test_a_server_that_does_not_read_holds_nobody_up(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ridethrough.tools.mcp.pipe.GRACE_SECONDS", 0.2)
    async with server(log, "deaf") as given:
        tools = await tools_of(given)
        assert await tools["t_echo"](text="the last that it reads") == "the last that it reads"
        for _ in range(3):
            with anyio.move_on_after(0.1) as scope:
                await tools["t_echo"](text="x" * 1_000_000)
            assert scope.cancelled_caught
    assert not any(map(alive, log.pids))


async def test_cancellations_at_any_moment_leave_nothing_behind(log: Log) -> None:
    """A hundred calls that are given up after more and more turns of the loop; the connection stays in use."""
    async with server(log) as given:
        tools = await tools_of(given)
        for turns in range(100):
            async with anyio.create_task_group() as group:
                group.start_soon(partial(tools["t_echo"], text="x"))
                for _ in range(turns % 20):
                    await anyio.lowlevel.checkpoint()
                group.cancel_scope.cancel()
        connection = await given._owner().connection()  # pyright: ignore[reportPrivateUsage]
        assert not connection.busy
        assert await tools["t_echo"](text="at the end") == "at the end"
    assert len(log.pids) == 1


# --- servers that die -----------------------------------------------------------------------------------------------


async def test_a_write_whose_server_died_is_in_doubt_and_not_repeated(log: Log, tmp_path: Path, revision: str) -> None:
    model = Scripted([call("t_die")], [call("t_echo", text="again")], "done")
    async with server(log, revision) as given:
        agent = Agent("user", model=model, tools=await given.tools(retries=3))
        async with open_runtime(tmp_path):
            with anyio.fail_after(PATIENCE):
                await agent.run("go")
    results = [message.text for message in model.requests[-1].messages if message.role == "tool"]
    assert "may or may not have taken effect" in results[0]
    assert "its process ended with status 3; the last that it said on standard error:\ndying words" in results[0]
    assert results[1] == "again"
    assert log.calls("die") == 1
    assert len(log.pids) == 2


async def test_a_read_whose_server_died_is_repeated_as_often_as_it_may_be(log: Log, tmp_path: Path) -> None:
    model = Scripted([call("t_die_reading")], "done")
    async with server(log) as given:
        agent = Agent("user", model=model, tools=await given.tools(retries=1))
        async with open_runtime(tmp_path):
            with anyio.fail_after(PATIENCE):
                await agent.run("go")
    assert "was lost during this call of die_reading" in model.results[0]
    assert log.calls("die_reading") == 2


async def test_all_who_wait_are_told_when_a_server_dies(log: Log) -> None:
    told: list[str] = []

    async def wait(tool: Tool[..., Any]) -> None:
        with pytest.raises(ToolFailed) as failed:
            await tool()
        told.append(str(failed.value))

    async with server(log) as given:
        tools = await tools_of(given)
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(wait, tools["t_wait"])
                while log.calls("wait") < 3:
                    await tools["t_echo"](text="not yet")
                with pytest.raises(ToolInterrupted):
                    await tools["t_die"]()
    assert len(told) == 3
    assert all("status 3" in each for each in told)


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("exit", "status 7; the last that it said on standard error:\ncannot find the configuration"),
        ("hang", "did not answer within 0.5 s"),
    ],
)
async def test_a_server_that_cannot_be_used_says_why(log: Log, mode: str, told: str) -> None:
    given = server(log, mode, connect_timeout=5.0 if mode == "exit" else 0.5)
    with pytest.raises(ToolFailed) as failed:
        await given.tools()
    assert told in str(failed.value)
    with pytest.raises(ToolFailed, match="cannot be used"):
        async with given:
            raise AssertionError("it cannot be entered")
    assert not any(map(alive, log.pids))
    await given.aclose()


async def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(ToolFailed, match="'no-such-program' cannot be started"):
        await McpServer.stdio("t", ["no-such-program"]).tools()


# --- servers that misbehave -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"),
    [("huge", "more than 8 MiB, which is the limit"), ("rubbish", "no JSON-RPC message on standard output")],
)
async def test_what_a_server_says_is_bounded(log: Log, name: str, told: str) -> None:
    async with server(log) as given:
        tools = await tools_of(given)
        with pytest.raises(ToolFailed, match=told):
            await tools[f"t_{name}"]()
        assert await tools["t_echo"](text="another one") == "another one"
    assert not any(map(alive, log.pids))


async def test_a_flood_leaves_time_for_others(log: Log) -> None:
    async with server(log) as given:
        tools = await tools_of(given, timeout=1.0)
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await anyio.lowlevel.checkpoint()
                turns += 1

        async with anyio.create_task_group() as group:
            group.start_soon(others)
            with pytest.raises(TimeoutError):
                await tools["t_flood"]()
            group.cancel_scope.cancel()
    assert turns > 1000
    assert not any(map(alive, log.pids))


async def test_a_greeting_is_forgiven_and_a_list_without_an_end_is_not(log: Log) -> None:
    async with server(log, "greets") as given:
        assert len(await given.tools()) == 17
    async with server(log, "endless") as given:
        with pytest.raises(ToolFailed, match="its list of tools does not end"):
            await given.tools()


async def again_and_again(tool: Tool[..., Any], **arguments: Any) -> None:
    """Call it until it fails."""
    with anyio.fail_after(PATIENCE):
        while True:
            await tool(**arguments)


async def test_a_tool_that_has_changed_is_not_called(log: Log, revision: str) -> None:
    async with server(log, revision) as given:
        tools = await tools_of(given)
        assert await tools["t_change"]() == "changed"
        with pytest.raises(ToolFailed, match="echo of the MCP server 't' has changed since this agent was defined"):
            await again_and_again(tools["t_echo"], text="as before")
        assert await (await tools_of(given))["t_echo"](text="anew") == "anew"


# --- lives ----------------------------------------------------------------------------------------------------------


async def test_nothing_is_started_before_it_is_needed_and_nothing_is_left_behind(log: Log) -> None:
    given = server(log)
    assert log.pids == []
    tools = await tools_of(given)
    (pid,) = log.pids
    assert alive(pid)
    await given.aclose()
    assert not alive(pid)
    assert await tools["t_echo"](text="a new one") == "a new one"
    await given.aclose()
    await given.aclose()
    assert not any(map(alive, log.pids))


async def test_it_may_be_left_in_another_task_and_in_another_order(log: Log, tmp_path: Path) -> None:
    first, second = server(log), server(Log(tmp_path / "second.log"))
    async with anyio.create_task_group() as group:
        group.start_soon(first.__aenter__)
        group.start_soon(second.__aenter__)
    async with anyio.create_task_group() as group:
        group.start_soon(first.__aexit__, None, None, None)
    await second.__aexit__(None, None, None)
    assert not any(map(alive, log.pids))


async def test_a_server_that_nobody_calls_is_ended(log: Log) -> None:
    given = server(log, idle_seconds=0.1)
    tools = await tools_of(given)
    with anyio.fail_after(PATIENCE):
        while any(map(alive, log.pids)):
            await anyio.lowlevel.checkpoint()
    assert await tools["t_echo"](text="back") == "back"
    await given.aclose()


async def test_a_stubborn_server_is_ended_all_the_same(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ridethrough.tools.mcp.pipe.GRACE_SECONDS", 0.2)
    async with server(log, "stubborn") as given:
        await given.tools()
    assert not any(map(alive, log.pids))


def status_of(pid: int) -> str:
    """The kernel's letter for what a process does; Z has ended, and is waited for by nobody yet."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def test_a_server_that_has_ended_keeps_its_number_until_what_it_left_is_killed() -> None:
    program = "import os, subprocess; print(os.getpid(), subprocess.Popen(['sleep', '1000']).pid, flush=True)"
    pipe = await LocalPipe.open([sys.executable, "-c", program], {}, None)
    async with aclosing(pipe.output()) as output:
        leader, left = map(int, (await anext(output)).split())
        ended = os.pidfd_open(left)
        with anyio.fail_after(PATIENCE):
            while status_of(leader) != "Z":
                await anyio.lowlevel.checkpoint()
        for _ in range(100):  # whoever watches over children would have waited for it
            await anyio.wait_all_tasks_blocked()
            assert status_of(leader) == "Z"
        assert await pipe.aclose() == "its process ended with status 0"
        with anyio.fail_after(PATIENCE):
            await anyio.wait_readable(ended)
    os.close(ended)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_server_ends_with_the_event_loop(log: Log, backend: str) -> None:
    program = f"""
import anyio
from ridethrough.tools.mcp import McpServer
server = McpServer.stdio("t", {[sys.executable, str(SERVER), "plain", str(log.path)]!r})
async def main():
    print(len(await server.tools()))
anyio.run(main, backend={backend!r})
anyio.run(main, backend={backend!r})
"""
    found = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60)
    assert (found.stdout, found.stderr) == ("17\n17\n", "")
    assert len(log.pids) == 2
    assert not any(map(alive, log.pids))


# --- lists that are pinned ------------------------------------------------------------------------------------------


def test_a_pinned_list_asks_the_server_once(log: Log, tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    first = server(log).pinned(path, exclude=["die"])
    second = server(log).pinned(path, exclude=["die"])
    assert [each.digest for each in first] == [each.digest for each in second]
    assert len(log.pids) == 1
    assert not any(map(alive, log.pids))
    path.write_text("{}")
    with pytest.raises(ConfigError, match="remove it, and the server is asked again"):
        server(log).pinned(path)
    with pytest.raises(ConfigError, match="cannot be used for its tools"):
        server(log).pinned(tmp_path / "no" / "folder.json")


async def test_a_pinned_tool_that_the_server_does_not_have_any_more_is_not_called(log: Log, tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    server(log).pinned(path)
    pinned = json.loads(path.read_text())
    pinned["tools"].append({"name": "gone", "inputSchema": {"type": "object"}})
    pinned["tools"][0]["readOnlyHint"] = False
    path.write_text(json.dumps(pinned))
    async with server(log) as given:
        tools = {each.name: each for each in given.pinned(path)}
        with pytest.raises(ToolFailed, match="has no tool 'gone' any more"):
            await tools["t_gone"]()
        with pytest.raises(ToolFailed, match="has changed"):
            await tools[f"t_{pinned['tools'][0]['name']}"](text="x")


# --- what it gets, and what it needs --------------------------------------------------------------------------------


async def test_a_server_gets_what_it_is_given_and_no_more(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARBOUR_TOKEN", SECRET)
    async with server(log, env={"TOKEN": "env:HARBOUR_TOKEN", "PLAIN": "x"}) as given:
        found = json.loads(str(await (await tools_of(given))["t_environment"]()))
    assert (found["TOKEN"], found["PLAIN"], found["PATH"]) == (SECRET, "x", os.environ["PATH"])
    assert "HARBOUR_TOKEN" not in found
    assert SECRET not in repr(given)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: McpServer.stdio("a b", ["x"]), "a name has letters"),
        (lambda: McpServer.stdio("t", "x y"), "command is a list"),
        (lambda: McpServer.stdio("t", []), "command is a list"),
        (lambda: McpServer.stdio("t", ["x"], connect_timeout=float("inf")), "connect_timeout must be a number"),
        (lambda: McpServer.stdio("t", ["x"], protocol=cast(Any, "old")), "protocol is 'auto' or 'legacy'"),
        (lambda: McpServer.http("t", "localhost:1"), "url is not of the form"),
        (lambda: McpServer.http("t", "http://me:abc@h/"), "a password belongs in a header"),
        (lambda: McpServer.http("t", "http://h/", headers={"Authorization": "abc"}), "Authorization holds a secret"),
    ],
)
def test_what_is_wrong_with_a_definition_is_named(make: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        make()
    assert "abc" not in str(refused.value)


def test_without_the_sdk_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(ConfigError, match=r"ridethrough\[mcp\]"):
        McpServer.stdio("t", ["x"])


def test_the_sdk_waits_for_its_first_use() -> None:
    code = "import sys; from ridethrough.tools.mcp import McpServer; McpServer.stdio('t', ['x'])"
    code += "; print('mcp' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


# --- in a sandbox ---------------------------------------------------------------------------------------------------


async def test_a_server_in_a_local_sandbox(tmp_path: Path) -> None:
    async with local_sandbox() as sandbox:
        await sandbox.write("server.py", SERVER.read_bytes())
        async with McpServer.stdio("t", ["python3", "server.py", "plain", "log"], sandbox=sandbox) as given:
            tools = await tools_of(given)
            assert await tools["t_echo"](text="inside") == "inside"
            with pytest.raises(ToolInterrupted, match="status 3"):
                await tools["t_die"]()
            assert await tools["t_echo"](text="again") == "again"
            with pytest.raises(ToolFailed, match=r"more than 8 MiB|some of it was lost"):
                await tools["t_huge"]()
        assert (await sandbox.read("log")).count(b'"pid"') >= 2


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_server_in_a_container(anyio_backend: str) -> None:
    command = ["python3", "-c", SERVER.read_text(), "modern"]
    async with McpServer.stdio("t", command, env={"PLAIN": "x"}, sandbox="python") as given:
        tools = await tools_of(given)
        found = json.loads(str(await tools["t_environment"]()))
        assert found["PLAIN"] == "x"
        assert "VIRTUAL_ENV" not in found
        with pytest.raises(ToolInterrupted, match="status 3"):
            await tools["t_die"]()
        assert await tools["t_echo"](text="again") == "again"


# --- streamable HTTP ------------------------------------------------------------------------------------------------


left_by_the_sdk = pytest.mark.filterwarnings("ignore:Async generator 'httpx2._(models|sse):ResourceWarning")
"""On trio: the SDK stops in the middle of a stream of events, and leaves the library's generators to the collector."""


class Web:
    """The SDK's server on one port, started and killed at will."""

    def __init__(self, mill: subprocess.Popen[str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.mill = mill
        self.log = log
        self.pid = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.pid = int(self._ask(port=self.port, log=str(self.log)))
        self._await(listening=True)

    def kill(self) -> None:
        """Kill it, dead or alive: the mill knows which processes are still its own."""
        assert self._ask(end=self.pid) == "ended\n"
        self._await(listening=False)

    def holds_its_number(self) -> bool:
        """Whether nobody else can have its number, alive or not."""
        return Path(f"/proc/{self.pid}").exists()

    def _ask(self, **what: int | str) -> str:
        assert self.mill.stdin is not None
        assert self.mill.stdout is not None
        self.mill.stdin.write(json.dumps(what) + "\n")
        self.mill.stdin.flush()
        return self.mill.stdout.readline()

    def _await(self, *, listening: bool) -> None:
        deadline = time.monotonic() + PATIENCE
        while self._listens() != listening:
            assert time.monotonic() < deadline, f"listening is not {listening}"

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 0.05).close()
        except OSError:
            return False
        return True

    def noted(self, what: str) -> bool:
        return self.log.exists() and what in self.log.read_text().splitlines()


@pytest.fixture(scope="module")
def mill() -> Iterator[subprocess.Popen[str]]:
    """What starts servers quickly."""
    program = [sys.executable, str(HERE / "mcp_http_server.py")]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        process.wait(PATIENCE)


@pytest.fixture
def web(mill: subprocess.Popen[str], tmp_path: Path) -> Iterator[Web]:
    found = Web(mill, tmp_path / "web.log")
    found.start()
    yield found
    found.kill()


@pytest.mark.parametrize("protocol", ["auto", "legacy"])
@left_by_the_sdk
async def test_a_server_on_http(web: Web, protocol: Any) -> None:
    async with McpServer.http("h", f"{web.url}/mcp", protocol=protocol) as given:
        tools = await tools_of(given)
        assert tools["h_echo"].effect == "read"
        assert await tools["h_echo"](text="hi") == "hi"
        async with anyio.create_task_group() as group:
            group.start_soon(tools["h_wait"])
            with anyio.fail_after(PATIENCE):
                while not web.noted("wait began"):
                    await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        with anyio.fail_after(PATIENCE):
            while not web.noted("wait was cancelled"):
                await tools["h_echo"](text="and on it goes")
        with pytest.raises(ToolFailed, match="limit"):
            await tools["h_huge"]()
        assert await tools["h_echo"](text="still there") == "still there"


@pytest.mark.parametrize("protocol", ["auto", "legacy"])
@left_by_the_sdk
async def test_a_server_on_http_that_dies(web: Web, protocol: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ridethrough.tools.mcp.calls.PAUSE", 0.01)
    async with McpServer.http("h", f"{web.url}/mcp", protocol=protocol) as given:
        tools = await tools_of(given)
        with pytest.raises(ToolInterrupted, match="may or may not have taken effect"):
            await tools["h_leave"]()
        assert web.holds_its_number()
        web.kill()
        web.start()
        assert await tools["h_echo"](text="back") == "back"
        web.kill()
        with pytest.raises(ToolFailed, match="cannot be reached: no connection"):
            await tools["h_echo"](text="nobody is there")
    assert web.log.read_text().count("left") == 1


async def test_a_server_on_http_has_a_new_tool(web: Web) -> None:
    async with McpServer.http("h", f"{web.url}/mcp") as given:
        tools = await tools_of(given)
        assert "h_grown" not in tools
        await tools["h_grow"]()
        assert await (await tools_of(given))["h_grown"]() == "new"


async def test_a_server_on_http_that_is_not_there(web: Web) -> None:
    web.kill()
    with pytest.raises(ToolFailed, match="the MCP server 'h' cannot be used: no connection"):
        await McpServer.http("h", f"{web.url}/mcp").tools()


async def test_a_server_on_http_that_refuses_says_so_without_the_secret(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARBOUR_TOKEN", SECRET)
    given = McpServer.http("h", f"{web.url}/refused", headers={"Authorization": "Bearer env:HARBOUR_TOKEN"})
    with pytest.raises(ToolFailed, match=r"HTTP 401.*is no good") as refused:
        await given.tools()
    assert SECRET not in str(refused.value)
    monkeypatch.delenv("HARBOUR_TOKEN")
    with pytest.raises(ToolFailed, match="HARBOUR_TOKEN is not set"):
        await given.tools()
