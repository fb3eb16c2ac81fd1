"""What a crash may cost: nothing that was finished, and no write that starts twice."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.agents.support import (
    PATIENCE,
    Scripted,
    all_events,
    asked,
    call,
    finished,
    open_runtime,
    parked,
    provider_config,
    task_count,
)

from ridethrough import (
    Agent,
    Diverged,
    FakeClock,
    HandedOff,
    InvalidRequest,
    ModelDelta,
    ModelReset,
    NotStarted,
    OutcomeUnknown,
    RunCancelled,
    RunFailed,
    RunPaused,
    Runtime,
    Tool,
    ToolContext,
    Unavailable,
    tool,
    wait_for,
    workflow,
)
from ridethrough import ToolCall as AskedCall
from ridethrough.runtime.router.providers.simulated import Answer, Call, Fault, Script, SimulatedProvider

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])
"""Tests that stop reading a run's events before it has ended."""


class Body:
    """The inside of a tool: it hangs in its first ``hangs`` starts, as if the process were about to die there."""

    def __init__(self, hangs: int = 1) -> None:
        self.hangs = hangs
        self.starts: list[tuple[str, str]] = []
        self.entered = anyio.Event()

    async def run(self, ctx: ToolContext) -> str:
        self.starts.append((ctx.call_id, ctx.idempotency_key))
        if len(self.starts) <= self.hangs:
            self.entered.set()
            await anyio.sleep_forever()
        return f"done at start {len(self.starts)}"

    async def started(self) -> None:
        """Wait until it hangs, for the next time."""
        with anyio.fail_after(PATIENCE):
            await self.entered.wait()
        self.entered = anyio.Event()


def acting(body: Body, **options: Any) -> Tool[..., Any]:
    async def act(ctx: ToolContext) -> str:
        """Act."""
        return await body.run(ctx)

    made: Tool[..., Any] = tool("act", **options)(act)
    return made


def agent_of(body: Body, model: Scripted, **options: Any) -> Agent[str]:
    return Agent("actor", model=model, tools=[acting(body, **options)])


async def crash_while_acting(folder: Path, body: Body, agent: Agent[str]) -> None:
    """Start the run ``a``, or take it up, and leave the runtime while the tool is at work."""
    async with open_runtime(folder) as runtime:
        await runtime.start(agent, "go", id="a")
        await body.started()


async def go_on(folder: Path) -> Any:
    async with open_runtime(folder) as runtime:
        return await finished(await runtime.get("a"))


# --- what happens to a call that was running ------------------------------------------------------------------------


@pytest.mark.parametrize("effect", ["read", "idempotent"])
async def test_reads_and_idempotent_calls_run_again_with_the_same_key(tmp_path: Path, effect: str) -> None:
    body, model = Body(hangs=2), Scripted(call("act"), "done")
    agent = agent_of(body, model, effect=effect)
    await crash_while_acting(tmp_path, body, agent)
    await crash_while_acting(tmp_path, body, agent)
    assert (await go_on(tmp_path)).output == "done"
    assert model.results == ["done at start 3"]
    assert len(body.starts) == 3
    assert len(set(body.starts)) == 1
    assert len(model.requests) == 2, "no model call was made again"


async def test_a_write_is_told(tmp_path: Path) -> None:
    body, model = Body(), Scripted([call("act"), call("act")], "done")
    agent = agent_of(body, model, sequential=True)
    await crash_while_acting(tmp_path, body, agent)
    assert (await go_on(tmp_path)).output == "done"
    first, second = model.results
    assert "interrupted by a crash" in first
    assert second == "done at start 2", "the sibling that had not started is not interrupted"


def check(outcome: Any, seen: list[AskedCall]) -> Callable[[AskedCall], Awaitable[Any]]:
    async def find_out(asked_for: AskedCall) -> Any:
        seen.append(asked_for)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return find_out


@pytest.mark.parametrize(
    ("outcome", "result", "starts"),
    [
        ("it was sent", "it was sent", 1),
        (None, "null", 1),
        ({"id": 1}, '{"id":1}', 1),
        (NotStarted(), "done at start 2", 2),
    ],
)
async def test_a_check_finds_out(tmp_path: Path, outcome: Any, result: str, starts: int) -> None:
    seen: list[AskedCall] = []
    body, model = Body(), Scripted(call("act"), "done")
    agent = agent_of(body, model, on_interrupt=check(outcome, seen))
    await crash_while_acting(tmp_path, body, agent)
    assert (await go_on(tmp_path)).output == "done"
    assert model.results == [result]
    assert len(body.starts) == starts
    assert [asked_for.call_id for asked_for in seen] == [body.starts[0][0]]


@on_asyncio
@pytest.mark.parametrize("outcome", [OutcomeUnknown(), ValueError("away"), SystemExit(1), "ask"])
@pytest.mark.parametrize("approved", [True, False])
async def test_a_person_decides_what_nobody_knows(tmp_path: Path, outcome: Any, approved: bool) -> None:
    body, model = Body(), Scripted(call("act"), "done")
    agent = agent_of(body, model, on_interrupt=outcome if outcome == "ask" else check(outcome, []))
    await crash_while_acting(tmp_path, body, agent)
    async with open_runtime(tmp_path) as runtime:
        run = await runtime.get("a")
        await parked(run)
        (request,) = await asked(run)
        assert "nobody knows" in request.question
        decide = runtime.approve if approved else runtime.deny
        await decide("a", request.call_id, note="I looked")
        await finished(run)
    assert len(body.starts) == (2 if approved else 1)
    assert ("I looked" in model.results[0]) is not approved


@on_asyncio
async def test_each_interruption_is_a_question_of_its_own(tmp_path: Path) -> None:
    """The yes after the first crash is no yes after the second one."""
    body, model = Body(hangs=2), Scripted(call("act"), "done")
    agent = agent_of(body, model, on_interrupt="ask")
    await crash_while_acting(tmp_path, body, agent)
    async with open_runtime(tmp_path) as runtime:
        (first,) = await asked(await runtime.get("a"))
        await runtime.approve("a", first.call_id)
        await body.started()
    async with open_runtime(tmp_path) as runtime:
        run = await runtime.get("a")
        _, second = await asked(run, 2)
        assert second.call_id != first.call_id
        assert len(body.starts) == 2
        await runtime.deny("a", second.call_id)
        assert (await finished(run)).output == "done"
    assert len(body.starts) == 2
    assert "interrupted by a crash" in model.results[0]


@on_asyncio
async def test_a_second_yes_to_the_approval_does_not_answer_the_interruption(tmp_path: Path) -> None:
    """People click twice. The spare answer lies about when the crash comes, and must not start the write again."""
    body, model = Body(), Scripted(call("act"), "done")
    agent = agent_of(body, model, approval=True, on_interrupt="ask")
    async with open_runtime(tmp_path, serve=False) as people:
        async with open_runtime(tmp_path) as runtime:
            run = await runtime.start(agent, "go", id="a")
            await parked(run)
            (request,) = await asked(run)
        await people.approve("a", request.call_id)
        await people.approve("a", request.call_id)
    async with open_runtime(tmp_path):
        await body.started()
    async with open_runtime(tmp_path) as runtime:
        run = await runtime.get("a")
        _, second = await asked(run, 2)
        assert len(body.starts) == 1
        await runtime.deny("a", second.call_id)
        await finished(run)
    assert len(body.starts) == 1


# --- approvals ------------------------------------------------------------------------------------------------------


@on_asyncio
@pytest.mark.parametrize("answered", ["before the restart", "between", "after it"])
async def test_approvals_survive_restarts(tmp_path: Path, answered: str) -> None:
    body = Body(hangs=0)
    model = Scripted([call("act"), call("act"), call("act")], "done")
    agent = agent_of(body, model, approval=True)

    async def answer(runtime: Runtime, ids: list[str]) -> None:
        await runtime.approve("a", ids[1])
        await runtime.deny("a", ids[0], note="no")
        await runtime.approve("a", ids[2], note="yes")

    async with open_runtime(tmp_path) as runtime:
        run = await runtime.start(agent, "go", id="a")
        view = await parked(run)
        assert view.status == "waiting"
        ids = [event.call_id for event in await asked(run, 3)]
        if answered == "before the restart":
            await answer(runtime, ids)
    if answered == "between":
        async with open_runtime(tmp_path, serve=False) as people:
            await answer(people, ids)
    async with open_runtime(tmp_path) as runtime:
        if answered == "after it":
            await answer(runtime, ids)
        assert (await finished(await runtime.get("a"))).output == "done"
        requests = [event for event in await all_events(await runtime.get("a")) if event.type == "approval_requested"]
    assert len(requests) == 3, "nobody is asked twice"
    assert len(body.starts) == 2
    told = [text.split(" at")[0] for text in model.results]
    assert sorted(told) == ["A person refused this call; it was not made. Note: no", "done", "done"]


@on_asyncio
async def test_an_approval_predicate_asks_for_some_calls_only(tmp_path: Path) -> None:
    def large(asked_for: AskedCall) -> bool:
        return bool(asked_for.arguments["cents"] > 100)

    paid: list[int] = []

    @tool(approval=large)
    async def pay(cents: int) -> str:
        """Pay."""
        paid.append(cents)
        return f"paid {cents}"

    model = Scripted([call("pay", cents=5), call("pay", cents=500)], "done")
    async with open_runtime(tmp_path) as runtime:
        run = await runtime.start(Agent("payer", model=model, tools=[pay]), "go")
        await parked(run)
        (request,) = await asked(run)
        assert request.arguments == {"cents": 500}
        assert paid == [5], "the other one did not wait for it"
        await runtime.approve(run.id, request.call_id)
        await finished(run)
    assert model.results == ["paid 5", "paid 500"]


# --- changed code ---------------------------------------------------------------------------------------------------


def other_tool() -> Tool[..., Any]:
    @tool("other", effect="read")
    async def other() -> str:
        """Another tool."""
        return "x"

    return other


@pytest.mark.parametrize(
    ("change", "step"),
    [
        ({"instructions": "Be rude."}, "actor#1/model#1"),
        ({"max_tokens": 7}, "actor#1/model#1"),
        ({"output": int}, "actor#1/model#1"),
        ({"tools": True}, "actor#1/model#1"),
    ],
    ids=["instructions", "max_tokens", "output", "tools"],
)
async def test_a_changed_agent_under_a_stored_run(tmp_path: Path, change: dict[str, Any], step: str) -> None:
    body, model = Body(), Scripted(call("act"), "done")
    options: dict[str, Any] = {"model": model, "instructions": "Be kind.", "tools": [acting(body, effect="read")]}
    await crash_while_acting(tmp_path, body, Agent("actor", **options))
    changed = {**options, **change}
    if change.get("tools"):
        changed["tools"] = [*options["tools"], other_tool()]
    Agent("actor", **changed)
    async with open_runtime(tmp_path) as runtime:
        with pytest.raises(Diverged, match="Nothing is lost") as caught:
            await finished(await runtime.get("a"))
    assert caught.value.path == step
    assert len(body.starts) == 1
    Agent("actor", **options)
    async with open_runtime(tmp_path) as runtime:
        run = await runtime.resume("a")
        assert (await finished(run)).output == "done", "with the old code back it goes on"
    assert len(model.requests) == 2


async def test_changed_dynamic_instructions_do_not_disturb_a_stored_run(tmp_path: Path) -> None:
    """What a function said when the run began stands: it may have looked at the clock."""
    body, model, said = Body(), Scripted(call("act"), "done"), ["first", "second"]
    agent = Agent("actor", model=model, instructions=lambda _: said.pop(0), tools=[acting(body, effect="read")])
    await crash_while_acting(tmp_path, body, agent)
    assert (await go_on(tmp_path)).output == "done"
    assert [request.messages[0].text for request in model.requests] == ["first", "first"]


# --- events ---------------------------------------------------------------------------------------------------------


async def test_a_handoff_is_told_once_even_after_a_resume(tmp_path: Path) -> None:
    body = Body()
    second = Agent("second", model=Scripted("", call("act"), "done"), tools=[acting(body, effect="read")])
    first = Agent("actor", model=Scripted(call("transfer_to_second")), handoffs=[second])
    await crash_while_acting(tmp_path, body, first)
    async with open_runtime(tmp_path) as runtime:
        run = await runtime.get("a")
        result = await finished(run)
        handed = [event for event in await all_events(run) if isinstance(event, HandedOff)]
    assert (result.output, result.agent) == ("done", "second")
    assert [(event.source, event.target) for event in handed] == [("actor", "second")]


async def test_deltas_and_a_reset_when_a_stream_is_cut(tmp_path: Path) -> None:
    script = Script(faults=[Fault("cut", after=3, requests=(1,))]).rule("one two three four five six")
    async with SimulatedProvider(script) as provider:
        config = provider_config(provider.base_url, route='patience = "10s"')
        async with open_runtime(tmp_path, config) as runtime:
            run = await runtime.start(Agent("speaker", model="r"), "go")
            events = await all_events(run)
            result = await finished(run)
    shown: dict[str, str] = {}
    order: list[str] = []
    for event in events:
        if isinstance(event, ModelDelta):
            shown[event.attempt] = shown.get(event.attempt, "") + event.text
            assert event.agent == "speaker"
            assert event.path == "speaker#1/model#1"
        if isinstance(event, ModelDelta | ModelReset) and (not order or order[-1] != event.attempt + event.type):
            order.append(event.attempt + event.type)
    resets = [event.attempt for event in events if isinstance(event, ModelReset)]
    first, second = shown
    assert resets == [first]
    assert order == [f"{first}model_delta", f"{first}model_reset", f"{second}model_delta"]
    assert shown[second] == result.output == "one two three four five six"


# --- providers that go away -----------------------------------------------------------------------------------------


@on_asyncio
async def test_an_outage_pauses_the_run_until_the_provider_is_back(tmp_path: Path) -> None:
    clock = FakeClock()
    script = Script(faults=[Fault("status", status=503, requests=(2, 3))])
    script.rule(Answer(calls=(Call("act"),)), turn=0).rule("done", turn=1)
    body = Body(hangs=0)
    agent = Agent("actor", model="r", tools=[acting(body)])
    async with SimulatedProvider(script) as provider:
        config = provider_config(provider.base_url)
        async with open_runtime(tmp_path, config, clock=clock) as runtime:
            run = await runtime.start(agent, "go", id="a")
            view = await parked(run)
            assert view.status == "paused"
            assert view.pause is not None
            assert view.pause.reason
            assert view.pause.until is not None
            assert len(provider.requests) == 2
        async with open_runtime(tmp_path, config, clock=clock) as runtime:
            run = await runtime.get("a")
            pauses = 0
            with anyio.fail_after(PATIENCE):
                async for event in run.events():
                    if isinstance(event, RunPaused):
                        pauses += 1
                        assert len(body.starts) == 1
                        clock.advance(3600)
            assert (await finished(run)).output == "done"
            assert not (await runtime.describe("a")).waits
        assert len(provider.requests) == 4, "one answer, two refusals, one answer"
    assert pauses == 2
    assert len(body.starts) == 1


async def test_a_route_that_fails_says_so(tmp_path: Path) -> None:
    script = Script(faults=[Fault("status", status=503)])

    @workflow(name="hurried")
    async def hurried() -> str:
        try:
            await Agent("actor", model="r").run("go")
        except Unavailable as error:
            return f"{len(error.errors)} {type(error.errors[0]).__name__}"
        return "an answer"

    async with SimulatedProvider(script) as provider:
        config = provider_config(provider.base_url, route='otherwise = ["fail"]')
        async with open_runtime(tmp_path, config):
            assert (await hurried()).startswith("1 ")
            with pytest.raises(RunFailed) as caught:
                await Agent("actor", model="r").run("go")
    assert caught.value.error_type == "Unavailable"


# --- cancelling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("watched", [True, False])
async def test_cancelling_a_model_call_leaves_nothing_behind(
    tmp_path: Path, anyio_backend_name: str, watched: bool
) -> None:
    asked_for = anyio.Event()

    def said(_request: Any) -> str:
        asked_for.set()
        return "never"

    script = Script(faults=[Fault("hang", requests=(2,))]).rule(said, user="go").rule("hello", user="warm up")
    async with SimulatedProvider(script) as provider:
        async with open_runtime(tmp_path, provider_config(provider.base_url)) as runtime:
            agent = Agent("actor", model="r")
            await agent.run("warm up")
            before = task_count(anyio_backend_name)
            run = await runtime.start(agent, "go")
            with anyio.fail_after(PATIENCE):
                async with anyio.create_task_group() as tasks:
                    if watched:
                        tasks.start_soon(all_events, run)
                    await asked_for.wait()
                    await run.cancel()
                    with pytest.raises(RunCancelled):
                        await run.result()
                while runtime.worker.resident or task_count(anyio_backend_name) > before:
                    await anyio.lowlevel.checkpoint()
            assert (await run.view()).status == "cancelled"
            assert (await Agent("next", model="r").run("warm up")).output == "hello", "the connection pool is sound"


@on_asyncio
async def test_an_outage_that_ends_in_an_error_is_waited_for_no_more(tmp_path: Path) -> None:
    clock = FakeClock()
    script = Script(faults=[Fault("status", status=503, requests=(1,)), Fault("status", status=400, requests=(2,))])

    @workflow(name="stubborn")
    async def stubborn() -> str:
        try:
            await Agent("actor", model="r").run("go")
        except InvalidRequest:
            return await wait_for("consolation", str)
        return "an answer"

    async with SimulatedProvider(script) as provider:
        async with open_runtime(tmp_path, provider_config(provider.base_url), clock=clock) as runtime:
            run = await runtime.start(stubborn, id="a")
            assert (await parked(run)).status == "paused"
            clock.advance(3600)
            with anyio.fail_after(PATIENCE):
                async for event in run.events():
                    if isinstance(event, RunPaused) and (view := await runtime.describe("a")).status == "waiting":
                        assert [wait.name for wait in view.waits or []] == ["consolation"]
                        await runtime.signal("a", "consolation", "well")
            assert await finished(run) == "well"
