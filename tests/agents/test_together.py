"""Several agents and several runs: handoffs, agents as tools, limits, sessions, dependencies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel
from tests.agents.support import Scripted, all_events, asked, call, finished, open_runtime, parked, priced

from ridethrough import (
    Agent,
    HandedOff,
    LimitExceeded,
    Limits,
    RunContext,
    RunFailed,
    SerializationError,
    ToolContext,
    tool,
    workflow,
)
from ridethrough.agents.guardrail import guardrail
from ridethrough.runtime.clock import FakeClock
from ridethrough.runtime.router.messages import AssistantMessage, ModelRequest

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@tool(effect="read")
async def echo(text: str) -> str:
    """Say it again."""
    return text


class Refund(BaseModel):
    cents: int


class Credit(BaseModel):
    """The same fields as a refund."""

    cents: int


# --- handoffs -------------------------------------------------------------------------------------------------------


async def test_a_chain_and_the_output_type_of_the_one_who_answers(tmp_path: Path) -> None:
    last = Agent("third", model=Scripted(then='{"cents": 5}'), instructions="You are third.", output=Credit)
    middle = Agent("second", model=Scripted(then=call("transfer_to_third")), handoffs=[last], output=Refund)
    first = Agent("first", model=Scripted(call("transfer_to_second", reason="x")), handoffs=[middle], output=Refund)
    async with open_runtime(tmp_path) as runtime:
        run = await runtime.start(first, "go", id="chain")
        result = await finished(run)
        events = [event for event in await all_events(run) if isinstance(event, HandedOff)]
        again = await finished(await runtime.get("chain"))
    assert type(result.output) is type(again.output) is Credit
    assert (result.output.cents, result.agent) == (5, "third")
    assert [(event.source, event.target) for event in events] == [("first", "second"), ("second", "third")]
    answered = [message.text for message in result.messages if message.role == "tool"]
    assert answered == ["The conversation is with second now.", "The conversation is with third now."]


async def test_a_loop_of_handoffs_is_ended_by_the_limit_of_the_first(tmp_path: Path) -> None:
    model = Scripted(then=lambda request: call(request.tools[0].name))
    there = Agent("there", model=model, limits=Limits(turns=1))
    back = Agent("back", model=model, handoffs=[there], limits=Limits(turns=7))
    there.handoffs = (back,)
    async with open_runtime(tmp_path):
        with pytest.raises(RunFailed, match="7 turns"):
            await back.run("go")
    assert len(model.requests) == 7


async def test_back_and_forth(tmp_path: Path) -> None:
    model = Scripted(call("transfer_to_there"), call("transfer_to_back"), "back again")
    there, back = Agent("there", model=model, instructions="There."), Agent("back", model=model, instructions="Back.")
    there.handoffs, back.handoffs = (back,), (there,)
    async with open_runtime(tmp_path):
        result = await back.run("go")
    assert (result.output, result.agent) == ("back again", "back")
    assert [request.messages[0].text for request in model.requests] == ["Back.", "There.", "Back."]


async def test_two_handoffs_and_a_tool_in_one_turn(tmp_path: Path) -> None:
    other, second = Agent("other", model=Scripted(then="no")), Agent("second", model=Scripted(then="yes"))
    calls = [call("transfer_to_second"), call("echo", text="kept"), call("transfer_to_other"), call("transfer_to_x")]
    first = Agent("first", model=Scripted(calls), handoffs=[other, second], tools=[echo])
    async with open_runtime(tmp_path) as runtime:
        run = await runtime.start(first, "go")
        result = await finished(run)
        events = [event.target for event in await all_events(run) if isinstance(event, HandedOff)]
    assert (result.output, events) == ("yes", ["second"])
    done, kept, refused, unknown = (message.text for message in result.messages if message.role == "tool")
    assert "with second now" in done
    assert kept == "kept"
    assert "Only one handoff" in refused
    assert "no tool 'transfer_to_x'" in unknown


async def test_the_answering_agents_guardrails_and_tools_hold(tmp_path: Path) -> None:
    @guardrail(on="output")
    def never(_context: RunContext, _value: Any) -> str:
        return "not this"

    second = Agent("second", model=Scripted(then=call("echo", text="x")), guardrails=[never], limits=Limits(turns=1))
    first = Agent("first", model=Scripted(call("transfer_to_second")), handoffs=[second], tools=[echo])
    model = Scripted("unused", call("echo", text="x"), "an answer")
    third = Agent("third", model=model, guardrails=[never])
    fourth = Agent("fourth", model=Scripted(call("transfer_to_third")), handoffs=[third], tools=[echo])
    async with open_runtime(tmp_path):
        with pytest.raises(RunFailed, match="50 turns"):
            await first.run("go")
        with pytest.raises(RunFailed, match="never refused the output of agent third"):
            await fourth.run("go")
    assert "There is no tool 'echo'" in model.results[0], "the tools of the agent before are not its own"


# --- agents as tools ------------------------------------------------------------------------------------------------


async def test_an_agent_as_a_tool(tmp_path: Path) -> None:
    inner_model = Scripted(call("echo", text="inside"), '{"cents": 3}')
    inner = Agent("counter", model=inner_model, instructions="Count.", tools=[echo], output=Refund)
    model = Scripted([call("count", input="these"), call("count", input="those")], "done")
    outer = Agent("chief", model=model, tools=[inner.as_tool("count", "Counts.")])
    async with open_runtime(tmp_path) as runtime:
        run = await runtime.start(outer, "go", id="nested")
        await finished(run)
        paths = {step.path for step in (await runtime.describe("nested")).steps or []}
        before = len(inner_model.requests)
        assert (await finished(await runtime.fork("nested", at="chief#1/model#2"))).output == "done"
    assert model.results == ['{"cents":3}'] * 2
    assert len(inner_model.requests) == before == 4, "what an agent did as a tool is not done again"
    nested = {"model#1", "echo#1", "model#2"}
    assert paths == {
        "chief#1/model#1",
        "chief#1/count#1",
        "chief#1/count#2",
        "chief#1/model#2",
        *(f"chief#1/count#{number}/{name}" for number in (1, 2) for name in nested),
    }
    assert [message.text for message in inner_model.requests[0].messages[:2]] in (
        ["Count.", "these"],
        ["Count.", "those"],
    )


async def test_errors_of_an_agent_as_a_tool_are_told(tmp_path: Path) -> None:
    def bad(_context: RunContext) -> str:
        raise KeyError("no such customer")

    inner = [
        Agent("wordless", model=Scripted(then="no JSON"), output=Refund).as_tool(),
        Agent("endless", model=Scripted(then=call("echo", text="x")), tools=[echo], limits=Limits(turns=2)).as_tool(),
        Agent("broken", model=Scripted(ValueError("the weights are gone"))).as_tool(),
        Agent("lost", model=Scripted("x"), instructions=bad).as_tool(description="Lost."),
        Agent("fine", model=Scripted("fine")).as_tool(),
    ]
    names = ["wordless", "endless", "broken", "lost", "fine"]
    model = Scripted([*(call(name, input="go") for name in names), call("fine", raw="{"), call("fine", x=1)], "done")
    async with open_runtime(tmp_path):
        result = await Agent("chief", model=model, tools=inner).run("go")
    assert result.output == "done"
    parts = ["no valid output", "2 turns", "the weights are gone", "no such customer", "fine", "JSON", "input"]
    assert all(part in text for part, text in zip(parts, model.results, strict=True))


# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "replies", "name", "turns"),
    [
        (Limits(turns=3), [], "turns", 3),
        (Limits(tool_calls=2), [], "tool_calls", 3),
        (Limits(tokens=50), [], "tokens", 3),
        (Limits(usd=0.25), [], "usd", 3),
        (Limits(usd=10.0), [priced("", None, 10, call("echo", text="x"))], "usd", 1),
        (Limits(usd=0.0), [], "usd", 0),
        (Limits(tool_calls=0), [], "tool_calls", 1),
    ],
)
async def test_limits(tmp_path: Path, limits: Limits, replies: list[Any], name: str, turns: int) -> None:
    model = Scripted(*replies, then=priced("", 0.1, 10, call("echo", text="x")))

    @workflow(name="limited")
    async def limited() -> str:
        try:
            await Agent("spender", model=model, tools=[echo], limits=limits).run("go")
        except LimitExceeded as error:
            return error.limit
        return "an output"

    async with open_runtime(tmp_path):
        assert await limited() == name
    assert len(model.requests) == turns


async def test_a_turn_over_the_limit_of_tool_calls_starts_none_of_them(tmp_path: Path) -> None:
    ran: list[int] = []

    @tool
    async def act() -> str:
        """Act."""
        ran.append(1)
        return "acted"

    model = Scripted([call("act")], [call("act"), call("act")])
    async with open_runtime(tmp_path):
        with pytest.raises(RunFailed, match="2 tool calls"):
            await Agent("busy", model=model, tools=[act], limits=Limits(tool_calls=2)).run("go")
    assert len(ran) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_seconds_without_parked_time(tmp_path: Path) -> None:
    clock = FakeClock()

    @tool(effect="read")
    async def work(seconds: float) -> str:
        """Take so long."""
        clock.advance(seconds)
        return "worked"

    @tool(approval=True)
    async def risky() -> str:
        """Ask first."""
        clock.advance(2)
        return "risked"

    work_then = [call("work", seconds=3.0), call("risky"), call("work", seconds=4.0)]
    model = Scripted(*work_then, call("work", seconds=2.0), "never asked")
    agent = Agent("slow", model=model, tools=[work, risky], limits=Limits(seconds=10))
    async with open_runtime(tmp_path, clock=clock) as runtime:
        run = await runtime.start(agent, "go")
        events = await run_until_parked(runtime, run)
        clock.advance(7 * 86_400)
        await runtime.approve(run.id, events)
        with pytest.raises(RunFailed, match="10 seconds"):
            await finished(run)
    assert len(model.requests) == 4, "3 + 2 + 4 s were used, a week of waiting was not; 2 s more were too many"


async def run_until_parked(_runtime: Any, run: Any) -> str:
    """The id of the call that the parked run waits for."""
    await parked(run)
    return (await asked(run))[0].call_id


# --- sessions -------------------------------------------------------------------------------------------------------


async def test_a_session_goes_on_from_run_to_run(tmp_path: Path) -> None:
    model = Scripted(call("echo", id="same", text="1"), "one", call("echo", id="same", text="2"), "two", "three")
    agent = Agent("friend", model=model, instructions="Be kind.", tools=[echo])
    async with open_runtime(tmp_path):
        await agent.run("first", session="ada")
        second = await agent.run("second", session="ada")
        alone = await Agent("other-friend", model=Scripted("hello"), instructions="Be kind.").run("x", session="bob")
    async with open_runtime(tmp_path):
        third = await agent.run("third", session="ada")
    assert [message.text for message in second.messages] == ["second", "", "2", "two"]
    assert [message.text for message in third.messages] == ["third", "three"]
    assert [message.text for message in alone.messages] == ["x", "hello"]
    sent = model.requests[-1].messages
    texts = ["Be kind.", "first", "", "1", "one", "second", "", "2", "two", "third"]
    assert [message.text for message in sent] == texts
    ids = [one.id for message in sent if isinstance(message, AssistantMessage) for one in message.tool_calls]
    assert len(set(ids)) == 2


async def test_a_failed_run_leaves_the_session_as_it_was(tmp_path: Path) -> None:
    async with open_runtime(tmp_path):
        await Agent("a", model=Scripted("one")).run("first", session="s")
        with pytest.raises(RunFailed):
            await Agent("b", model=Scripted("x", ValueError("gone"))).run("second", session="s")
        model = Scripted("x", "three")
        await Agent("c", model=model).run("third", session="s")
    assert [message.text for message in model.requests[0].messages] == ["first", "one", "third"]


async def test_a_crash_between_two_runs_of_a_session_in_one_workflow(tmp_path: Path) -> None:
    asked_models: list[str] = []

    async def model(request: ModelRequest) -> str:
        asked_models.append(request.messages[-1].text)
        return f"answer {len(request.messages)}"

    agent = Agent("friend", model=model)
    entered = anyio.Event()

    @tool(effect="read")
    async def hold() -> str:
        """Hold until the process is gone."""
        entered.set()
        await anyio.sleep_forever()
        return "never"

    between = Agent("between", model=Scripted(call("hold"), "done"), tools=[hold])

    @workflow(name="talk")
    async def talk() -> list[str]:
        await agent.run("first", session="s")
        await between.run("go")
        return [(await agent.run("second", session="s")).output]

    async with open_runtime(tmp_path) as runtime:
        await runtime.start(talk, id="t")
        await entered.wait()

    async def pass_on() -> str:
        return "held"

    object.__setattr__(hold, "function", pass_on)
    async with open_runtime(tmp_path) as runtime:
        messages = await finished(await runtime.resume("t"))
        after = Scripted(then="x")
        await Agent("other-friend", model=after).run("third", session="s")
    assert messages == ["answer 3"]
    texts = ["first", "answer 1", "second", "answer 3", "third"]
    assert [message.text for message in after.requests[0].messages] == texts
    assert asked_models == ["first", "second"]


# --- dependencies ---------------------------------------------------------------------------------------------------


class Shop(BaseModel):
    name: str
    limits: dict[str, int] = {}


@dataclass
class Desk:
    number: int
    shop: Shop


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(
    "deps",
    [
        Shop(name="tea", limits={"a": 1}),
        Desk(3, Shop(name="tea")),
        {"value": 1},
        {"class": "os:system", "value": "true"},
        {},
        [1, {"value": 2}],
        "text",
        0,
        None,
        True,
    ],
    ids=lambda deps: type(deps).__name__,
)
async def test_deps_on_the_way_through_a_run_and_a_new_process(tmp_path: Path, deps: Any) -> None:
    seen: list[Any] = []

    @tool(effect="read")
    async def look(ctx: ToolContext[Any]) -> str:
        """Look at the dependencies."""
        seen.append(ctx.deps)
        return "seen"

    @tool(effect="read", approval=True)
    async def look_later(ctx: ToolContext[Any]) -> str:
        """Look again after the restart."""
        seen.append(ctx.deps)
        return "seen"

    def look_first(context: RunContext) -> str:
        seen.append(context.deps)
        return "Look."

    agent = Agent(
        "deps",
        model=Scripted(call("look"), call("look_later"), "done"),
        tools=[look, look_later],
        instructions=look_first,
    )
    async with open_runtime(tmp_path) as runtime:
        run = await runtime.start(agent, "go", deps=deps, id="d")
        await parked(run)
        (request,) = await asked(run)
    async with open_runtime(tmp_path) as runtime:
        await runtime.approve("d", request.call_id)
        assert (await finished(await runtime.get("d"))).output == "done"
    assert seen == [deps] * 3
    assert {type(each) for each in seen} == {type(deps)}


async def test_deps_that_cannot_be_stored(tmp_path: Path) -> None:
    class Local(BaseModel):
        x: int

    async with open_runtime(tmp_path):
        with pytest.raises(SerializationError, match="Local"):
            await Agent("d", model=Scripted("x")).run("go", deps=Local(x=1))
        with pytest.raises(SerializationError, match="deps"):
            await Agent("d", model=Scripted("x")).run("go", deps=object())
