"""The public interface as a user types it. Nothing here runs: mypy and pyright read it, and a lost type is an error."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, assert_type
from uuid import UUID

from pydantic import BaseModel

import ridethrough
from ridethrough import (
    Agent,
    AgentResult,
    ApprovalRequested,
    Event,
    ExecResult,
    FakeClock,
    HandedOff,
    Image,
    Limits,
    ModelDelta,
    ModelRequest,
    ModelReset,
    ModelResponse,
    NotStarted,
    OutcomeUnknown,
    Output,
    Process,
    Router,
    Run,
    RunContext,
    RunFinished,
    RunPaused,
    RunResumed,
    RunStarted,
    Runtime,
    Sandbox,
    SandboxProfile,
    Session,
    Snapshot,
    StepFinished,
    StepStarted,
    Tool,
    ToolCall,
    ToolCallFinished,
    ToolCallStarted,
    ToolContext,
    ToolSearch,
    Unavailable,
    ask,
    docker_sandbox,
    fan_out,
    gather,
    local_sandbox,
    now,
    random,
    sleep,
    step,
    tool,
    uuid,
    wait_for,
    workflow,
)
from ridethrough.agents.guardrail import Guardrail, guardrail
from ridethrough.runtime.router.messages import ImagePart, Message, TextPart, Usage

# --- tools ----------------------------------------------------------------------------------------------------------


class Shop(BaseModel):
    name: str


class Finding(BaseModel):
    claim: str
    source: str


@tool
def plain(a: int, b: int = 2) -> int:
    """Add."""
    return a + b


@tool(effect="read", timeout=20, retries=2, max_output=1000, concurrency=3, sequential=True)
async def search(query: str, limit: int = 5) -> list[str]:
    """Search the archive.

    Args:
        query: What to look for.
        limit: How many results.
    """
    return [query] * limit


async def look_whether_it_was_sent(call: ToolCall) -> str:
    assert_type(call.name, str)
    assert_type(call.arguments, dict[str, Any])
    assert_type(call.agent, str | None)
    if call.call_id == "x":
        raise NotStarted
    raise OutcomeUnknown


@tool("send", "Send a mail.", approval=lambda call: call.name == "x", on_interrupt=look_whether_it_was_sent)
async def send_mail(to: str, body: str, ctx: ToolContext[Shop]) -> str:
    """Send it."""
    assert_type(ctx.deps, Shop)
    assert_type(ctx.idempotency_key, str)
    assert_type(ctx.call_id, str)
    assert_type(ctx.run_id, str)
    ctx.progress("half")
    await ctx.resource("mailer").send(to, body, idempotency_key=ctx.idempotency_key)
    return "sent"


@tool(effect="idempotent", on_interrupt="tell")
async def without_dependencies(ctx: ToolContext) -> None:
    """Do it."""
    assert_type(ctx.deps, Any)


async def tools_are_still_functions() -> None:
    assert_type(plain(1), int)
    assert_type(await search("tides", limit=2), list[str])
    assert_type(plain.name, str)
    tools: list[Tool[..., Any]] = [plain, search, send_mail, without_dependencies]
    print(tools)
    plain("one")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await search()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    tool(effect="harmless")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


# --- agents ---------------------------------------------------------------------------------------------------------


@guardrail
def no_secrets(context: RunContext, value: str) -> str | None:
    return f"{context.agent}: a secret" if "secret" in value else None


@guardrail(on="output", repair=True)
async def with_source(context: RunContext, value: Finding) -> str | None:
    return None if value.source else "name the source"


async def instructions(context: RunContext) -> str:
    assert_type(context.deps, Any)
    return f"You are {context.agent} in run {context.run_id}: {context.resource('style')}"


async def function_model(request: ModelRequest) -> str:
    return request.messages[-1].text


researcher = Agent(
    "researcher",
    model="smart",
    instructions="Find one well-sourced claim.",
    tools=[search, plain],
    output=Finding,
    guardrails=[no_secrets, with_source],
    limits=Limits(turns=20, tool_calls=100, tokens=10_000, usd=0.50, seconds=3600),
    tool_concurrency=4,
    output_retries=1,
    temperature=0.1,
    max_tokens=1000,
    reasoning="low",
)
editor = Agent("editor", model="smart", instructions=instructions, tools=[send_mail], handoffs=[researcher])
chief = Agent(
    "chief",
    model=function_model,
    tools=[researcher.as_tool("research", "Finds claims."), editor.as_tool(description="Edits.")],
    output=list[int],
    priority="low",
    floor="standard",
)


def definitions() -> None:
    assert_type(researcher, Agent[Finding])
    assert_type(editor, Agent[str])
    assert_type(chief, Agent[list[int]])
    assert_type(no_secrets, Guardrail)
    Agent("x")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    Agent("x", model=3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


async def agents_run() -> None:
    found = await researcher.run("tides", deps=Shop(name="tea"), session="ada")
    assert_type(found, AgentResult[Finding])
    assert_type(found.output, Finding)
    assert_type(found.messages, list[Message])
    assert_type(found.usage, Usage)
    assert_type(found.cost_usd, float | None)
    assert_type(found.agent, str)
    image = ImagePart(url="https://images.example/a.png", data=None)
    assert_type((await editor.run([TextPart(text="see"), image])).output, str)
    assert_type((await chief.run([{"role": "user", "content": "count"}])).output, list[int])


# --- workflows ------------------------------------------------------------------------------------------------------


@step()
async def fetch(url: str) -> bytes:
    return url.encode()


@step(retries=2, timeout=5.0, name="parse-it")
def parse(data: bytes, *, encoding: str = "utf-8") -> Finding:
    return Finding(claim=data.decode(encoding), source="x")


@step
async def bare(number: int) -> int:
    return number


async def lookup(key: str) -> float:
    return float(key)


def compute(key: str) -> int:
    return int(key)


@workflow(version="1")
async def report(topic: str, *, count: int = 4) -> str:
    assert_type(await fetch(topic), bytes)
    assert_type(await parse(b"x", encoding="ascii"), Finding)
    assert_type(await bare(1), int)
    assert_type(await step(lookup, "1", name="look"), float)
    assert_type(await step(compute, "1"), int)
    findings = await gather(*(researcher.run(f"{topic}: angle {i}") for i in range(count)), limit=2)
    assert_type(findings, list[AgentResult[Finding]])
    collected = await gather(fetch("a"), fetch("b"), on_error="collect")
    assert_type(collected, list[bytes | Exception])
    assert_type(await fan_out(fetch, ["a", "b"], limit=2), list[bytes])
    assert_type(await fan_out(bare, [1, 2], on_error="collect"), list[int | Exception])
    await sleep(timedelta(days=1))
    await sleep(0.5)
    assert_type(await now(), datetime)
    assert_type(await random(), float)
    assert_type(await uuid(), UUID)
    assert_type(await wait_for("go", Finding, timeout=timedelta(hours=1)), Finding)
    assert_type(await ask("Merge?", bool), bool)
    assert_type(await child(3), list[int])
    result = await editor.run("Write it up:\n" + "\n".join(found.output.claim for found in findings))
    return result.output


@workflow
async def child(number: int) -> list[int]:
    return [number]


@workflow(version="2", name="another-name")
async def nothing() -> None:
    await child("three")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await fetch(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# --- the runtime ----------------------------------------------------------------------------------------------------


async def main(mailer: object) -> None:
    runtime_of = Runtime.open(
        "sqlite:///runs.db", config="ridethrough.toml", resources={"mailer": mailer}, concurrency=10, clock=FakeClock()
    )
    async with runtime_of as runtime:
        assert_type(runtime, Runtime)
        run = await runtime.start(
            report, "tides", count=2, id="tides-1", tenant="acme", priority=1, labels={"team": "sea"}
        )
        assert_type(run.id, str)
        assert_type(await report("tides"), str)
        assert_type(await nothing(), None)
        async for event in run.events(after=3):
            what_happened(event)
        events: AsyncIterator[Event] = run.events()
        print(events, await run.result())
        await run.cancel()
        await runtime.signal("tides-1", "go", {"claim": "x", "source": "y"})
        await runtime.approve("tides-1", "send-1", note="fine")
        await runtime.deny("tides-1", "send-2", note="not her")
        await runtime.cancel("tides-1")
        await runtime.pause("tides-1")
        fork: Run[Any] = await runtime.fork("tides-1", at="fetch#1")
        other: Run[Any] = await runtime.get("tides-1")
        again: Run[Any] = await runtime.resume("tides-1")
        every: Sequence[Run[Any]] = await runtime.resume()
        agent_run: Run[Any] = await runtime.start(researcher, "tides", deps=Shop(name="tea"))
        print(fork, other, again, every, agent_run, await runtime.list(status="done", workflow="report", limit=3))


def what_happened(event: Event) -> str:
    assert_type(event.run_id, str)
    assert_type(event.seq, int)
    assert_type(event.at, float)
    assert_type(event.path, str)
    match event:
        case RunStarted():
            return event.workflow
        case StepStarted() | StepFinished():
            return event.kind
        case ModelDelta():
            return event.text + event.attempt
        case ModelReset():
            return event.error
        case ToolCallStarted() | ToolCallFinished():
            return event.call_id
        case HandedOff():
            return event.source + event.target
        case ApprovalRequested():
            return event.question
        case RunPaused():
            assert_type(event.until, datetime | None)
            return event.reason
        case RunResumed():
            return event.type
        case RunFinished():
            return event.status


# --- sandboxes ------------------------------------------------------------------------------------------------------


@tool(sandbox="python", effect="read")
def count_words(text: str) -> int:
    """Count them there."""
    return len(text.split())


@tool(sandbox=SandboxProfile(memory=2**28), sandbox_scope="call")
async def alone(text: str) -> str:
    """In a sandbox of its own."""
    return text


@tool(confined=True)
async def through_context(ctx: ToolContext) -> str:
    """Through ctx.sandbox."""
    assert_type(ctx.sandbox, Sandbox)
    return (await ctx.sandbox.exec(["true"])).stdout


@tool(effect="read")
async def chart() -> list[str | Image]:
    """A picture, with words."""
    return ["the bay", Image(data=b"", media_type="image/png")]


Agent(
    "coder",
    model="smart",
    tools=[count_words, alone, through_context, chart],
    sandbox="python",
    tool_search=ToolSearch(),
)


async def sandboxes() -> None:
    async with docker_sandbox("python") as sandbox, local_sandbox(SandboxProfile(kind="local")) as other:
        assert_type(sandbox, Sandbox)
        result = await sandbox.exec(["ls"], timeout=5, stdin=b"", env={"A": "1"}, cwd=".")
        assert_type(result, ExecResult)
        assert_type(result.limit, Literal["memory", "pids", "disk", "output"] | None)
        async for item in sandbox.exec_stream(["ls"]):
            assert_type(item, Output | ExecResult)
        process = await sandbox.start(["cat"], timeout=60, stdin=True)
        assert_type(process, Process)
        async with sandbox.python() as session:
            assert_type(session, Session)
        assert_type(await sandbox.read("file"), bytes)
        snapshot = await sandbox.snapshot()
        assert_type(snapshot, Snapshot)
        await other.restore(snapshot)
        assert_type(await other.fork(), Sandbox)


# --- the router -----------------------------------------------------------------------------------------------------


async def model_calls() -> None:
    request = ModelRequest(
        [{"role": "user", "content": "hi"}],
        tools=[{"name": "search", "description": "", "parameters": {"type": "object"}}],
        tool_choice="auto",
        output_schema={"type": "object"},
        temperature=0.0,
        max_tokens=10,
        reasoning="none",
    )
    async with Router.open(config="ridethrough.toml") as router:
        response = await router.complete(request, route="smart")
        assert_type(response, ModelResponse)
        assert_type(response.text, str)
        assert_type(response.tool_calls[0].arguments, dict[str, Any] | None)
        assert_type(response.usage.cached_tokens, int)
        assert_type(response.cost_usd, float | None)
        async for event in router.stream(request, route="smart"):
            if isinstance(event, ModelDelta):
                assert_type(event.text, str)
            elif not isinstance(event, ModelReset):
                assert_type(event.response, ModelResponse)
        print(router.health(), router.explain("smart"), response.finish, response.degraded, response.notes)


def errors() -> None:
    try:
        raise Unavailable("x", errors=())
    except ridethrough.RateLimited as error:
        assert_type(error.retry_after, float | None)
    except Unavailable as error:
        assert_type(error.errors, tuple[ridethrough.ModelError, ...])
    except (TimeoutError, ridethrough.LimitExceeded, ridethrough.Diverged, ridethrough.RunFailed) as error:
        print(error)
    except ridethrough.Error as error:
        assert_type(error.message, str)
