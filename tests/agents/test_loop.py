"""The loop: answers, repairs, tool calls of one turn, and what a hostile model may say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel, Field
from tests.agents.support import Gate, Scripted, call, finished, open_runtime, results_of, said

from ridethrough import (
    Agent,
    AgentResult,
    ConfigError,
    ContentFilter,
    InvalidOutput,
    RunContext,
    RunFailed,
    ToolFailed,
    gather,
    tool,
    workflow,
)
from ridethrough.agents.guardrail import guardrail
from ridethrough.runtime.router.messages import (
    AssistantMessage,
    ImagePart,
    Message,
    ModelRequest,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    UserMessage,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Finding(BaseModel):
    claim: str
    weight: int = Field(ge=1, le=5)


@tool(effect="read")
async def echo(text: str) -> str:
    """Say it again."""
    return text


# --- answers --------------------------------------------------------------------------------------------------------


async def test_text(tmp_path: Path) -> None:
    model = Scripted("hello")
    async with open_runtime(tmp_path):
        result = await Agent("greeter", model=model, instructions="Be kind.").run("hi")
    assert (result.output, result.agent, result.cost_usd) == ("hello", "greeter", None)
    assert [message.role for message in result.messages] == ["user", "assistant"], "instructions are no part of it"
    assert [message.text for message in model.requests[0].messages] == ["Be kind.", "hi"]


async def test_a_run_of_its_own_is_on_record(tmp_path: Path) -> None:
    agent = Agent("greeter", model=Scripted("hello"))
    async with open_runtime(tmp_path) as runtime:
        await agent.run("hi")
        run = await runtime.start(agent, "hi", id="same")
        again = await runtime.start(agent, "hi", id="same")
        result = await finished(again)
        views = await runtime.list(workflow="agent:greeter")
    assert isinstance(result, AgentResult)
    assert (result.output, run.id) == ("hello", "same")
    assert [view.status for view in views] == ["done", "done"]


async def test_structured_output_in_a_workflow_and_alone(tmp_path: Path) -> None:
    agent = Agent("finder", model=Scripted('{"claim": "tides", "weight": 2}'), output=Finding)

    @workflow(name="find")
    async def find() -> AgentResult[Finding]:
        return await agent.run("look")

    async with open_runtime(tmp_path):
        inside, alone = await find(), await agent.run("look")
    assert inside.output == alone.output == Finding(claim="tides", weight=2)
    assert inside.messages == alone.messages


@dataclass
class Point:
    x: int


@pytest.mark.parametrize(
    ("output", "text", "value"),
    [
        (int, "41", 41),
        (list[int], "[1, 2]", [1, 2]),
        (dict[str, int], '{"a": 1}', {"a": 1}),
        (Point, '{"x": 3}', Point(3)),
        (bool, "true", True),
        (str, '{"claim": 1}', '{"claim": 1}'),
        (str, "", ""),
    ],
)
async def test_output_types(tmp_path: Path, output: Any, text: str, value: Any) -> None:
    agent: Agent[Any] = Agent("typed", model=Scripted(said(text)), output=output)
    async with open_runtime(tmp_path):
        result = await agent.run("go")
    assert result.output == value
    assert type(result.output) is type(value)


async def test_repair_tells_the_rule_that_was_broken(tmp_path: Path) -> None:
    model = Scripted("no JSON at all", '{"claim": "x", "weight": 9}', '{"claim": "x", "weight": 5}')
    async with open_runtime(tmp_path):
        result = await Agent("finder", model=model, output=Finding).run("look")
    assert result.output.weight == 5
    first, second = (request.messages[-1].text for request in model.requests[1:])
    assert "JSON" in first
    assert "weight" in second
    assert "5" in second


async def test_repair_is_bounded(tmp_path: Path) -> None:
    model = Scripted(then='{"claim": 1}')

    @workflow(name="bounded")
    async def bounded() -> str:
        try:
            await Agent("finder", model=model, output=Finding, output_retries=3).run("look")
        except InvalidOutput as error:
            return str(error)
        return "an output"

    async with open_runtime(tmp_path):
        text = await bounded()
    assert len(model.requests) == 4
    assert "claim" in text


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (said("", finish="content_filter"), ContentFilter),
        (said('{"claim": "x', finish="length"), InvalidOutput),
    ],
)
async def test_answers_that_are_none(tmp_path: Path, response: Any, error: type[Exception]) -> None:
    model = Scripted(response)

    @workflow(name="none")
    async def none() -> str:
        with pytest.raises(error):
            await Agent("finder", model=model, output=Finding).run("look")
        return "raised"

    async with open_runtime(tmp_path):
        assert await none() == "raised"
    assert len(model.requests) == 1, "what another try would not mend is not tried again"


async def test_a_refusal_is_no_structured_output(tmp_path: Path) -> None:
    refused = said(finish="refusal").model_copy(update={"message": AssistantMessage(content="", refusal="I will not.")})
    model = Scripted(refused)
    async with open_runtime(tmp_path):
        with pytest.raises(RunFailed, match="I will not") as caught:
            await Agent("finder", model=model, output=Finding).run("look")
    assert caught.value.error_type == "InvalidOutput"


def call_ids(messages: Sequence[Any]) -> list[str]:
    return [one.id for message in messages if isinstance(message, AssistantMessage) for one in message.tool_calls]


# --- tool calls of one turn -----------------------------------------------------------------------------------------


async def test_parallel_calls_are_answered_in_the_order_asked(tmp_path: Path) -> None:
    started: list[str] = []
    gates = [anyio.Event() for _ in range(4)]

    @tool(effect="read")
    async def turn_around(index: int) -> str:
        """The last one asked ends first."""
        started.append(str(index))
        if index < 3:
            await gates[index + 1].wait()
        gates[index].set()
        return f"answer {index}"

    model = Scripted([call("turn_around", id=f"c{index}", index=index) for index in range(4)], "done")
    async with open_runtime(tmp_path):
        result = await Agent("parallel", model=model, tools=[turn_around]).run("go")
    assert sorted(started) == ["0", "1", "2", "3"]
    assert model.results == ["answer 0", "answer 1", "answer 2", "answer 3"]
    assert [message.tool_call_id for message in results_of(model.requests[-1])] == ["c0", "c1", "c2", "c3"]
    assert result.output == "done"


async def test_one_failing_call_does_not_harm_its_siblings(tmp_path: Path) -> None:
    finished_late = anyio.Event()

    @tool(effect="read")
    async def fails() -> str:
        """Fail at once."""
        finished_late.set()
        raise ValueError("the disk of the tool is full")

    @tool(effect="read")
    async def slow() -> str:
        """End after the other has failed."""
        await finished_late.wait()
        return "fine"

    model = Scripted([call("fails"), call("slow"), call("missing"), call("slow", id="again")], "done")
    async with open_runtime(tmp_path):
        result = await Agent("siblings", model=model, tools=[fails, slow]).run("go")
    failed, fine, unknown, again = results_of(model.requests[-1])
    assert "the disk of the tool is full" in failed.text
    assert (failed.is_error, fine.is_error, again.is_error) == (True, False, False)
    assert (fine.text, again.text) == ("fine", "fine")
    assert "'missing'" in unknown.text
    assert "fails, slow" in unknown.text
    assert result.output == "done"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (call("echo", text=5), "text"),
        (call("echo"), "text"),
        (call("echo", text="x", extra=1), "extra"),
        (call("echo", raw='{"text": "cut o'), "JSON"),
        (call("echo", raw="[1, 2]"), "JSON"),
        (call("echo", raw="\x00\ud800"), "JSON"),
        (call("", text="x"), "no tool"),
        (call("echo ", text="x"), "no tool"),
        (call("x" * 100_000, text="x"), "no tool"),
        (call("../../etc/passwd#1/é", text="x"), "no tool"),
    ],
)
async def test_wrong_calls_are_told_to_the_model(tmp_path: Path, asked: ToolCall, told: str) -> None:
    model = Scripted(asked, "I see")

    @workflow(name="wrong")
    async def wrong() -> str:
        return (await Agent("wrong", model=model, tools=[echo]).run("go")).output

    async with open_runtime(tmp_path) as runtime:
        run = await runtime.start(wrong, id="w")
        assert await finished(run) == "I see"
        steps = (await runtime.describe("w")).steps or []
        fork = await runtime.fork("w", at=steps[-1].path)
        assert await finished(fork) == "I see", "what is on record is readable again"
    (result,) = results_of(model.requests[-1])
    assert result.is_error
    assert told in result.text
    assert len(result.text) < 5_000


async def test_repeated_and_empty_call_ids(tmp_path: Path) -> None:
    turn = [call("echo", id="call_1", text="a"), call("echo", id="call_1", text="b")]
    empty = [ToolCall(id="", name="echo", arguments={"text": text}) for text in "cd"]
    model = Scripted(turn, turn, empty, "done")
    async with open_runtime(tmp_path):
        result = await Agent("ids", model=model, tools=[echo]).run("go")
    asked = call_ids(result.messages)
    answered = [message.tool_call_id for message in result.messages if isinstance(message, ToolMessage)]
    assert asked == answered
    assert len(set(asked)) == 6
    assert all(asked)
    assert [message.text for message in result.messages if isinstance(message, ToolMessage)] == list("ababcd")


async def test_a_call_id_of_the_given_conversation_is_not_used_again(tmp_path: Path) -> None:
    given: list[Message] = [
        UserMessage(content="before"),
        AssistantMessage(tool_calls=(call("echo", id="call_1", text="x"),)),
        ToolMessage(tool_call_id="call_1", name="echo", content="x"),
        UserMessage(content="and now"),
    ]
    model = Scripted("never", call("echo", id="call_1", text="y"), "done")
    async with open_runtime(tmp_path):
        result = await Agent("ids", model=model, tools=[echo]).run(given)
    asked = call_ids(result.messages)
    assert len(set(asked)) == 2


async def test_a_hundred_calls_in_one_turn(tmp_path: Path) -> None:
    model = Scripted([call("echo", id="x", text=str(index)) for index in range(100)], "done")
    async with open_runtime(tmp_path):
        await Agent("many", model=model, tools=[echo]).run("go")
    assert model.results == [str(index) for index in range(100)]


async def test_tool_concurrency(tmp_path: Path) -> None:
    gate = Gate(3)

    @tool(effect="read")
    async def meet() -> str:
        """Wait for the others."""
        await gate.pass_through()
        return "met"

    model = Scripted([call("meet", id="m") for _ in range(9)], "done")
    async with open_runtime(tmp_path):
        await Agent("three", model=model, tools=[meet], tool_concurrency=3).run("go")
    assert gate.most == 3


# --- what a model may say -------------------------------------------------------------------------------------------


async def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    """Real models produce them (half an emoji at the end of a token): no database stores them as they are."""
    model = Scripted(said("so \ud83d", call("echo", text="x \udcff")), "end \ud800")
    async with open_runtime(tmp_path) as runtime:
        run = await runtime.start(Agent("halves", model=model, tools=[echo]), "hi \udcff", id="h")
        result = await finished(run)
        assert result.output.startswith("end ")
        assert (await runtime.describe("h")).status == "done"


async def test_control_characters_and_nul(tmp_path: Path) -> None:
    text = "a\x00b\x1b[31m\u2028\U0001f600"
    model = Scripted(call("echo", text=text), text)
    async with open_runtime(tmp_path):
        result = await Agent("nul", model=model, tools=[echo]).run(text)
    assert result.output == text
    assert model.results == [text]


async def test_a_model_that_raises_fails_the_run_with_its_error(tmp_path: Path) -> None:
    model = Scripted(ValueError("the weights are gone"))
    async with open_runtime(tmp_path):
        with pytest.raises(RunFailed, match="the weights are gone") as caught:
            await Agent("broken", model=model).run("go")
    assert caught.value.error_type == "ValueError"


# --- input and instructions -----------------------------------------------------------------------------------------


CAT = ImagePart(url="https://images.example/a.png", data=None)


@pytest.mark.parametrize(
    "given",
    [
        [TextPart(text="what is this?"), CAT],
        [{"type": "text", "text": "what is this?"}, {"type": "image", "url": "https://images.example/a.png"}],
    ],
)
async def test_images(tmp_path: Path, given: Sequence[Any]) -> None:
    model = Scripted("a cat")
    async with open_runtime(tmp_path):
        result = await Agent("eye", model=model).run(given)
    content = model.requests[0].messages[-1].content
    assert content == (TextPart(text="what is this?"), CAT)
    assert result.messages[0].content == content


async def test_a_conversation_as_input(tmp_path: Path) -> None:
    model = Scripted("unused", "second")
    given: list[Any] = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        UserMessage(content="three"),
    ]
    async with open_runtime(tmp_path):
        result = await Agent("long", model=model).run(given)
    assert [message.text for message in result.messages] == ["one", "two", "three", "second"]


async def test_wrong_input_is_refused(tmp_path: Path) -> None:
    async with open_runtime(tmp_path):
        with pytest.raises(RunFailed, match="role"):
            await Agent("strict", model=Scripted("x")).run([{"role": "wizard", "content": "x"}])


@pytest.mark.parametrize("is_async", [True, False])
async def test_dynamic_instructions(tmp_path: Path, is_async: bool) -> None:
    asked: list[RunContext] = []

    def plain(context: RunContext) -> str:
        asked.append(context)
        return f"You serve {context.deps['user']} with {context.resource('name')}."

    async def later(context: RunContext) -> str:
        await anyio.lowlevel.checkpoint()
        return plain(context)

    model = Scripted(call("echo", text="x"), "done")
    agent = Agent("dynamic", model=model, instructions=later if is_async else plain, tools=[echo])
    async with open_runtime(tmp_path, resources={"name": "care"}):
        await agent.run("go", deps={"user": "Ada"})
    assert len(asked) == 1, "once a run, not once a turn"
    systems = [request.messages[0] for request in model.requests]
    assert systems == [SystemMessage(content="You serve Ada with care.")] * 2


async def test_a_missing_resource_is_named(tmp_path: Path) -> None:
    agent = Agent("dynamic", model=Scripted("x"), instructions=lambda context: str(context.resource("mailer")))
    async with open_runtime(tmp_path, resources={"clock": 1}):
        with pytest.raises(RunFailed, match=r"mailer.*clock"):
            await agent.run("go")


# --- guardrails -----------------------------------------------------------------------------------------------------


@guardrail
def no_secrets(_context: Any, value: Any) -> str | None:
    return "it holds a secret" if "secret" in str(value) else None


@guardrail(on="output", repair=True)
async def polite(_context: Any, value: Any) -> str | None:
    await anyio.lowlevel.checkpoint()
    return None if "please" in str(value) else "say please"


@guardrail(on="output")
def short(_context: Any, value: Any) -> str | None:
    return "too long" if len(str(value)) > 20 else None


async def test_guardrails(tmp_path: Path) -> None:
    model = Scripted("give me", "give me, please")
    agent = Agent("guarded", model=model, guardrails=[no_secrets, polite, short])
    async with open_runtime(tmp_path):
        with pytest.raises(RunFailed, match="no_secrets refused the input of agent guarded: it holds a secret"):
            await agent.run("my secret")
        assert not model.requests, "nothing was sent"
        result = await agent.run("hello")
    assert result.output == "give me, please"
    assert "say please" in model.requests[-1].messages[-1].text


async def test_a_guardrail_that_is_never_satisfied_ends(tmp_path: Path) -> None:
    model = Scripted(then="no")
    async with open_runtime(tmp_path):
        with pytest.raises(RunFailed, match="say please") as caught:
            await Agent("rude", model=model, guardrails=[polite], output_retries=1).run("hello")
    assert caught.value.error_type == "GuardrailTripped"
    assert len(model.requests) == 2


async def test_a_guardrail_without_repair_ends_at_once(tmp_path: Path) -> None:
    model = Scripted(then="x" * 30)
    async with open_runtime(tmp_path):
        with pytest.raises(RunFailed, match="too long"):
            await Agent("wordy", model=model, guardrails=[short]).run("hello")
    assert len(model.requests) == 1


async def test_a_guardrail_that_raises_is_no_pass(tmp_path: Path) -> None:
    @guardrail
    def broken(_context: Any, _value: Any) -> str | None:
        raise OSError("the checking service is away")

    model = Scripted("x")
    async with open_runtime(tmp_path):
        with pytest.raises(RunFailed, match="the checking service is away"):
            await Agent("unchecked", model=model, guardrails=[broken]).run("hello")
    assert not model.requests


# --- definitions ----------------------------------------------------------------------------------------------------


def test_definitions_that_cannot_work() -> None:
    model = Scripted("x")
    with pytest.raises(ConfigError, match="letters"):
        Agent("a/b", model=model)
    with pytest.raises(ConfigError, match="'echo'"):
        Agent("twice", model=model, tools=[echo, echo])
    with pytest.raises(ConfigError, match="transfer_to_a_b"):
        Agent("meeting", model=model, handoffs=[Agent("a.b", model=model), Agent("a:b", model=model)])
    with pytest.raises(ConfigError, match="tool_concurrency"):
        Agent("none", model=model, tool_concurrency=0)
    with pytest.raises(ConfigError, match="bad name"):
        Agent("chief", model=model, tools=[Agent("x", model=model).as_tool("bad name", "x")])
    with pytest.raises(ConfigError, match="repair"):
        guardrail(repair=True)
    with pytest.raises(ConfigError, match="as_tool needs a description"):
        Agent("dynamic", model=model, instructions=lambda _context: "x").as_tool()


async def test_the_same_agent_in_many_branches(tmp_path: Path) -> None:
    async def model(request: ModelRequest) -> str:
        await anyio.lowlevel.checkpoint()
        return request.messages[-1].text.upper()

    agent = Agent("shout", model=model)

    @workflow(name="chorus")
    async def chorus() -> list[str]:
        results = await gather(*(agent.run(f"voice {index}") for index in range(20)), limit=7)
        return [result.output for result in results]

    async with open_runtime(tmp_path) as runtime:
        run = await runtime.start(chorus, id="c")
        assert await finished(run) == [f"VOICE {index}" for index in range(20)]
        paths = [step.path for step in (await runtime.describe("c")).steps or []]
    assert sorted(paths) == sorted(f"g1[{index}]/shout#1/model#1" for index in range(20))


async def test_tool_failed_is_told_as_it_is(tmp_path: Path) -> None:
    @tool(effect="read")
    async def find(name: str) -> str:
        """Find it."""
        raise ToolFailed(f"there is no {name}; ask for a fruit")

    model = Scripted(call("find", name="stone"), "ok")
    async with open_runtime(tmp_path):
        await Agent("finder", model=model, tools=[find]).run("go")
    assert model.results == ["there is no stone; ask for a fruit"]


async def test_the_result_is_plain_json(tmp_path: Path) -> None:
    """What an agent's run leaves in the database is readable without our classes."""
    agent = Agent("finder", model=Scripted('{"claim": "tides", "weight": 2}'), output=Finding)
    async with open_runtime(tmp_path) as runtime:
        run = await runtime.start(agent, "go", id="plain")
        await finished(run)
        view = await runtime.describe("plain")
    assert view.result["output"] == {"claim": "tides", "weight": 2}
    assert json.dumps(view.model_dump(mode="json"))
