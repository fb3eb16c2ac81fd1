"""The life of a tool call, with tools that do their worst."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from datetime import date
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel
from tests.agents.support import (
    PATIENCE,
    Gate,
    Scripted,
    all_events,
    asked,
    call,
    finished,
    open_runtime,
    results_of,
    task_count,
)

from ridethrough import (
    Agent,
    NotFound,
    RunCancelled,
    StepFinished,
    ToolCallFinished,
    ToolCallStarted,
    ToolContext,
    gather,
    tool,
    workflow,
)
from ridethrough import ToolCall as AskedCall
from ridethrough.runtime.router.messages import ModelRequest, ToolCall

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def told(tmp_path: Path, tools: list[Any], *calls: ToolCall, deps: Any = None) -> list[str]:
    """What the model is told of these calls."""
    model = Scripted(list(calls), "done")
    async with open_runtime(tmp_path):
        with anyio.fail_after(PATIENCE):
            result = await Agent("user", model=model, tools=tools).run("go", deps=deps)
    assert result.output == "done"
    return model.results


# --- tools that go wrong --------------------------------------------------------------------------------------------


class Unreadable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


class Leave(BaseException):
    pass


@tool(effect="read")
async def raises(what: str) -> str:
    """Raise what is asked for."""
    match what:
        case "group":
            raise ExceptionGroup("several", [ValueError("one"), OSError("two")])
        case "unreadable":
            raise Unreadable
        case "surrogate":
            raise OSError("no file a\udcff.txt")
        case "huge":
            raise ValueError("x" * 5_000_000)
        case "exit":
            sys.exit(3)
        case "own":
            raise Leave("bye")
        case "exit in a group":
            raise BaseExceptionGroup("several", [SystemExit(1), ValueError("x")])
        case _:
            raise StopAsyncIteration


@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("group", "several"),
        ("unreadable", "Unreadable"),
        ("surrogate", "no file a"),
        ("huge", "xxx"),
        ("exit", "SystemExit(3)"),
        ("own", "bye"),
        ("exit in a group", "SystemExit(1)"),
        ("other", "StopAsyncIteration"),
    ],
)
async def test_raising(tmp_path: Path, what: str, part: str) -> None:
    first, second = await told(tmp_path, [raises], call("raises", what=what), call("raises", what="other"))
    assert part in first
    assert len(first) < 25_000
    assert "StopAsyncIteration" in second
    async with open_runtime(tmp_path) as runtime:
        (view,) = await runtime.list()
        errors = [step.error for step in (await runtime.describe(view.id)).steps or [] if step.kind == "tool"]
    assert all(error is not None and len(error.message) < 25_000 for error in errors)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_tool_that_awaits_something_cancelled(tmp_path: Path) -> None:
    @tool(effect="read")
    async def impatient() -> str:
        """Await a task that somebody has cancelled."""
        task = asyncio.create_task(asyncio.sleep(3600))
        task.cancel()
        await task
        return "never"

    @tool(effect="read")
    async def cancels() -> str:
        """Pretend to be cancelled."""
        raise asyncio.CancelledError

    first, second = await told(tmp_path, [impatient, cancels], call("impatient"), call("cancels"))
    assert "CancelledError" in first
    assert "CancelledError" in second


@tool(effect="read", timeout=0.1)
def sync_raises(what: str) -> str:
    """Raise in a thread."""
    match what:
        case "exit":
            sys.exit(4)
        case "own":
            raise Leave("bye")
        case "interrupt":
            raise KeyboardInterrupt
        case "generator":
            raise GeneratorExit
        case _:
            threading.Event().wait()
    return "never"


@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("exit", "SystemExit(4)"),
        ("own", "bye"),
        ("interrupt", "KeyboardInterrupt"),
        ("generator", "GeneratorExit"),
        ("hang", "0.1 s"),
    ],
)
async def test_raising_in_a_thread(tmp_path: Path, what: str, part: str) -> None:
    (text,) = await told(tmp_path, [sync_raises], call("sync_raises", what=what))
    assert part in text


async def test_hanging(tmp_path: Path) -> None:
    @tool(timeout=0.05)
    async def hangs() -> str:
        """Never end."""
        await anyio.sleep_forever()
        return "never"

    @tool(effect="read", timeout=0.05)
    async def stubborn() -> str:
        """Never end, and take the first cancellation for a joke."""
        try:
            await anyio.sleep_forever()
        except BaseException:
            await anyio.sleep_forever()
        return "never"

    first, second = await told(tmp_path, [hangs, stubborn], call("hangs"), call("stubborn"))
    assert "0.05 s" in first
    assert "It may have taken effect" in first, "it is a write"
    assert "0.05 s" in second
    assert "effect" not in second


THREADS = """
import ctypes, sys, anyio, threading
from ridethrough import Agent, Runtime, tool
from ridethrough.runtime.router.messages import AssistantMessage, ModelResponse, ToolCall

@tool(effect="read", timeout=0.2)
def dies() -> str:
    "End the thread below Python."
    ctypes.CDLL(None).pthread_exit(None)
    return "never"

@tool(effect="read", timeout=0.2)
def hangs() -> str:
    "Hang for ever."
    threading.Event().wait()
    return "never"

async def model(request):
    if len(request.messages) > 1:
        return " | ".join(message.text for message in request.messages[2:])
    calls = tuple(ToolCall(id=name, name=name) for name in ("hangs", "hangs") + tuple(sys.argv[2:]))
    return ModelResponse(message=AssistantMessage(tool_calls=calls))

async def main():
    async with Runtime.open(sys.argv[1]):
        print((await Agent("user", model=model, tools=[dies, hangs]).run("go")).output)

anyio.run(main)
"""


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("deaths", [(), ("dies",)])
async def test_a_process_ends_whatever_its_tools_threads_do(tmp_path: Path, deaths: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", THREADS, f"sqlite:///{tmp_path}/runs.db", *deaths]
    with anyio.fail_after(PATIENCE):
        ended = await anyio.run_process(command, stderr=subprocess.STDOUT, cwd=tmp_path)
    texts = ended.stdout.decode().strip().split(" | ")
    assert len(texts) == 2 + len(deaths)
    assert all("did not end within 0.2 s" in text for text in texts)


@pytest.mark.parametrize(
    "value",
    [object(), lambda: None, {"a": {1, 2, object()}}, threading.Lock(), object],
)
async def test_unserialisable_output(tmp_path: Path, value: Any) -> None:
    @tool(effect="read")
    async def gives() -> Any:
        """Give something odd."""
        return value

    (text,) = await told(tmp_path, [gives], call("gives"))
    assert "'gives'" in text
    assert "no form in JSON" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        ([1, {"a": float("nan")}], '[1,{"a":"NaN"}]'),
        (b"\xff", "\ufffd"),
        ("\ud800", "?"),
        ({"a": "\ud800"}, '{"a":"?"}'),
        (date(2026, 1, 2), '"2026-01-02"'),
        ("", ""),
    ],
)
async def test_odd_output(tmp_path: Path, value: Any, text: str) -> None:
    @tool(effect="read")
    async def gives() -> Any:
        """Give something odd."""
        return value

    assert await told(tmp_path, [gives], call("gives")) == [text]


# --- large output ---------------------------------------------------------------------------------------------------


async def test_fifty_megabytes_are_kept_and_read_on(tmp_path: Path) -> None:
    whole = "".join(f"{index:09d}\n" for index in range(5_000_000))

    @tool(effect="read", max_output=300)
    async def dump() -> str:
        """Give 50 MB."""
        return whole

    def read_on(request: ModelRequest) -> ToolCall:
        assert "read_artifact" in [spec.name for spec in request.tools]
        text = request.messages[-1].text
        assert "49999700 of 50000000" in text
        return call("read_artifact", handle=text.split('handle="')[1].split('"')[0], offset=25_000_000, limit=20)

    wrong = [call("read_artifact", handle="0" * 32), call("read_artifact", handle="../x", offset=-5, limit=10**9)]
    model = Scripted(call("dump"), read_on, wrong, "done")
    async with open_runtime(tmp_path) as runtime:
        result = await Agent("reader", model=model, tools=[dump]).run("go")
        (view,) = await runtime.list()
        fork = await runtime.fork(view.id, at="reader#1/model#4")
        assert (await finished(fork)).output == "done", "a resumed run offers the tool again"
    assert len(result.messages[2].text) < 1_000
    assert result.messages[4].text == "002500000\n002500001\n"
    assert all("There is no artifact" in text for text in model.results)


async def test_without_large_output_there_is_no_such_tool(tmp_path: Path) -> None:
    (text,) = await told(tmp_path, [raises], call("read_artifact", handle="x"))
    assert "There is no tool 'read_artifact'" in text


# --- concurrency ----------------------------------------------------------------------------------------------------


async def test_the_concurrency_of_a_tool_holds_for_all_runs(tmp_path: Path) -> None:
    gate, other = Gate(2), Gate(3)

    @tool("meet", effect="read", concurrency=2)
    async def meet() -> str:
        """Wait for another."""
        await gate.pass_through()
        return "met"

    @tool("meet", effect="read", concurrency=3)
    async def meet_too() -> str:
        """Another tool of that name, with a limit of its own."""
        await other.pass_through()
        return "met"

    agents = [
        Agent(name, model=Scripted([call("meet", id="m") for _ in range(3)], "done"), tools=[one])
        for name, one in (("a", meet), ("b", meet), ("c", meet_too))
    ]

    @workflow(name="meeting")
    async def meeting() -> list[str]:
        return [result.output for result in await gather(*(agent.run("go") for agent in agents))]

    async with open_runtime(tmp_path):
        with anyio.fail_after(PATIENCE):
            assert await meeting() == ["done"] * 3
    assert (gate.most, other.most) == (2, 3)


async def test_sequential_calls_keep_their_order(tmp_path: Path) -> None:
    seen: list[str] = []

    @tool(sequential=True)
    async def append(text: str) -> str:
        """Append to a file, say."""
        seen.append(f"<{text}")
        await anyio.lowlevel.checkpoint()
        seen.append(f"{text}>")
        return text

    calls = [call("append", id="x", text=text) for text in "abcdef"]
    assert await told(tmp_path, [append], *calls) == list("abcdef")
    assert "".join(seen) == "".join(f"<{text}{text}>" for text in "abcdef")


# --- retries --------------------------------------------------------------------------------------------------------


async def test_retries_keep_the_key(tmp_path: Path) -> None:
    keys: list[tuple[str, str]] = []

    @tool(effect="idempotent", retries=2)
    async def flaky(ctx: ToolContext) -> str:
        """Fail twice."""
        keys.append((ctx.call_id, ctx.idempotency_key))
        if len(keys) < 3:
            raise ConnectionError("try again")
        return "there"

    assert await told(tmp_path, [flaky], call("flaky")) == ["there"]
    assert len(keys) == 3
    assert len(set(keys)) == 1
    async with open_runtime(tmp_path) as runtime:
        (view,) = await runtime.list()
        steps = (await runtime.describe(view.id)).steps or []
    assert [step.attempts for step in steps if step.kind == "tool"] == [3]


async def test_two_calls_have_two_keys_whatever_the_provider_repeats(tmp_path: Path) -> None:
    keys: list[str] = []

    @tool(effect="idempotent")
    async def pay(ctx: ToolContext) -> str:
        """Pay."""
        keys.extend((ctx.call_id, ctx.idempotency_key))
        return "paid"

    await told(tmp_path, [pay], call("pay", id="same"), call("pay", id="same"))
    assert len(set(keys)) == 4


# --- context and approval functions ---------------------------------------------------------------------------------


class Order(BaseModel):
    item: str
    when: date


async def test_what_functions_of_a_call_see(tmp_path: Path) -> None:
    seen: list[AskedCall] = []

    async def wants_person(asked_for: AskedCall) -> bool:
        seen.append(asked_for)
        return False

    @tool(approval=wants_person)
    async def buy(order: Order, ctx: ToolContext[dict[str, int]]) -> str:
        """Buy it."""
        assert isinstance(order, Order)
        return f"{order.item} {order.when.year} {ctx.deps['limit']}"

    arguments = {"item": "tea", "when": "2026-01-02"}
    assert await told(tmp_path, [buy], call("buy", order=arguments), deps={"limit": 7}) == ["tea 2026 7"]
    assert seen[0].arguments == {"order": arguments}, "JSON data, not our objects"
    assert (seen[0].name, seen[0].agent) == ("buy", "user")


async def test_an_approval_function_that_raises_is_no_approval(tmp_path: Path) -> None:
    def broken(_call: AskedCall) -> bool:
        raise LookupError("who knows")

    ran: list[int] = []

    @tool(approval=broken)
    async def buy() -> str:
        """Buy."""
        ran.append(1)
        return "bought"

    (text,) = await told(tmp_path, [buy], call("buy"))
    assert "who knows" in text
    assert not ran


async def test_a_missing_resource_is_told(tmp_path: Path) -> None:
    @tool(effect="read")
    async def look(ctx: ToolContext) -> str:
        """Look."""
        return str(ctx.resource("database"))

    (text,) = await told(tmp_path, [look], call("look"))
    assert "'database'" in text


async def test_tools_cannot_do_durable_things(tmp_path: Path) -> None:
    inner = Agent("inner", model=Scripted("x"))

    @tool(effect="read")
    async def nested() -> str:
        """Run an agent inside a tool."""
        return (await inner.run("go")).output

    (text,) = await told(tmp_path, [nested], call("nested"))
    assert "inside step user#1/nested#1" in text


# --- progress and events --------------------------------------------------------------------------------------------


async def test_progress_from_the_loop_and_from_threads(tmp_path: Path) -> None:
    watching = anyio.Event()

    @tool(effect="read")
    async def quick(ctx: ToolContext) -> str:
        """Tell."""
        await watching.wait()
        ctx.progress("half")
        return "a"

    @tool(effect="read")
    def slow(ctx: ToolContext) -> str:
        """Tell from a thread."""
        for index in range(20):
            ctx.progress(f"{index}")
        return "b"

    agent = Agent("teller", model=Scripted(call("quick"), call("slow"), "done"), tools=[quick, slow])
    async with open_runtime(tmp_path) as runtime:
        run = await runtime.start(agent, "go")
        events = []
        with anyio.fail_after(PATIENCE):
            async for event in run.events():
                events.append(event)
                if isinstance(event, StepFinished) and event.kind == "model":
                    watching.set()
    progress = [event.progress for event in events if isinstance(event, ToolCallStarted) and event.progress]
    assert progress == ["half", *(str(index) for index in range(20))]
    ended = [(event.name, event.output) for event in events if isinstance(event, ToolCallFinished)]
    assert ended == [("quick", "a"), ("slow", "b")]


# --- cancelling -----------------------------------------------------------------------------------------------------


async def test_cancelling_in_the_middle_of_calls_leaves_nothing_behind(tmp_path: Path, anyio_backend_name: str) -> None:
    inside, left = Gate(3), []

    @tool(effect="read")
    async def stay() -> str:
        """Stay until cancelled."""
        try:
            inside.inside += 1
            if inside.inside == 3:
                inside.opened.set()
            await anyio.sleep_forever()
        finally:
            left.append(1)
        return "never"

    agent = Agent("stayer", model=Scripted([call("stay", id="x") for _ in range(3)]), tools=[stay])
    async with open_runtime(tmp_path) as runtime:
        before = task_count(anyio_backend_name)
        run = await runtime.start(agent, "go")
        with anyio.fail_after(PATIENCE):
            await inside.opened.wait()
            await run.cancel()
            with pytest.raises(RunCancelled):
                await run.result()
        assert len(left) == 3
        with anyio.fail_after(PATIENCE):
            while runtime.worker.resident:
                await anyio.lowlevel.checkpoint()
        assert task_count(anyio_backend_name) <= before
        assert run.status == "cancelled"


# --- approvals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_parallel_approvals_have_an_id_each(tmp_path: Path) -> None:
    sent: list[str] = []

    @tool(approval=True)
    async def send(to: str) -> str:
        """Send it."""
        sent.append(to)
        return f"sent to {to}"

    @tool(effect="read")
    async def look() -> str:
        """Look."""
        return "seen"

    model = Scripted([call("send", id="same", to=name) for name in "abc"] + [call("look")], "done")
    async with open_runtime(tmp_path) as runtime:
        run = await runtime.start(Agent("sender", model=model, tools=[send, look]), "go")
        requests = {event.arguments["to"]: event for event in await asked(run, 3)}
        assert len({event.call_id for event in requests.values()}) == 3
        assert all(event.name == "send" for event in requests.values())
        await runtime.approve(run.id, requests["c"].call_id)
        await runtime.deny(run.id, requests["a"].call_id, note="not her")
        with pytest.raises(NotFound, match=requests["b"].call_id):
            await runtime.approve(run.id, "send-0000000000")
        await runtime.approve(run.id, requests["b"].call_id, note="fine")
        result = await finished(run)
        events = await all_events(run)
    assert result.output == "done"
    assert sorted(sent) == ["b", "c"]
    refused, *others = model.results
    assert "A person refused" in refused
    assert "not her" in refused
    assert others == ["sent to b", "sent to c", "seen"]
    assert [event.type for event in events].count("approval_requested") == 3
    assert results_of(model.requests[-1])[0].is_error


async def test_wrong_arguments_are_never_shown_to_a_person(tmp_path: Path) -> None:
    @tool(approval=True)
    async def send(to: str) -> str:
        """Send it."""
        return "sent"

    (text,) = await told(tmp_path, [send], call("send", to=3))
    assert "to" in text
