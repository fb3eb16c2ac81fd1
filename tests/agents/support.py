"""What the tests of agents share: models that follow a script, and runtimes on a real database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest

from ridethrough.runtime.clock import Clock
from ridethrough.runtime.config import Config, parse_config
from ridethrough.runtime.events import ApprovalRequested, Event
from ridethrough.runtime.router.messages import (
    AssistantMessage,
    ModelRequest,
    ModelResponse,
    ToolCall,
    ToolMessage,
    Usage,
)
from ridethrough.runtime.runtime import Run, Runtime
from ridethrough.runtime.views import RunView

Reply = str | ToolCall | list[ToolCall] | ModelResponse | Exception | Callable[[ModelRequest], Any]

PATIENCE = 30.0
"""Seconds after which a test that waits is broken; no test comes near it."""


def call(name: str, /, id: str = "", raw: str | None = None, **arguments: Any) -> ToolCall:
    """A model's wish to call a tool; ``raw`` is what it wrote when that is no JSON object."""
    if raw is not None:
        return ToolCall(id=id or f"{name}-1", name=name, arguments=None, raw=raw, error="the arguments are not JSON")
    return ToolCall(id=id or f"{name}-{abs(hash(str(arguments))) % 10_000}", name=name, arguments=arguments)


def said(text: str = "", *calls: ToolCall, **fields: Any) -> ModelResponse:
    """An answer with its tool calls; the finish reason fits unless given."""
    finish = fields.pop("finish", "tool_calls" if calls else "stop")
    return ModelResponse(message=AssistantMessage(content=text, tool_calls=calls), finish=finish, **fields)


def priced(text: str, cost: float | None, tokens: int = 10, *calls: ToolCall) -> ModelResponse:
    """An answer that costs something."""
    usage = Usage(input_tokens=tokens, output_tokens=tokens)
    return said(text, *calls, usage=usage, cost_usd=cost)


class Scripted:
    """A model as a function: its answer depends on how often the assistant has spoken in the conversation."""

    def __init__(self, *replies: Reply, then: Reply | None = None) -> None:
        """``then`` answers all turns after the last one."""
        self.replies = replies
        self.then = then
        self.requests: list[ModelRequest] = []

    async def __call__(self, request: ModelRequest) -> ModelResponse | str:
        """Answer."""
        self.requests.append(request)
        turn = sum(isinstance(message, AssistantMessage) for message in request.messages)
        reply = self.replies[turn] if turn < len(self.replies) else self.then
        assert reply is not None, f"nothing in the script for turn {turn + 1}"
        if callable(reply) and not isinstance(reply, ModelResponse | ToolCall):
            reply = reply(request)
            if isinstance(reply, Awaitable):
                reply = await reply
        return _answer(reply)

    @property
    def results(self) -> list[str]:
        """The tool results that the last request ended with, in order."""
        return [message.text for message in results_of(self.requests[-1])]


def _answer(reply: Any) -> ModelResponse | str:
    if isinstance(reply, Exception):
        raise reply
    if isinstance(reply, ToolCall):
        return said("", reply)
    if isinstance(reply, list):
        return said("", *reply)
    assert isinstance(reply, str | ModelResponse)
    return reply


def results_of(request: ModelRequest) -> list[ToolMessage]:
    """The tool results since the assistant last spoke."""
    found: list[ToolMessage] = []
    for message in reversed(request.messages):
        if not isinstance(message, ToolMessage):
            break
        found.insert(0, message)
    return found


def open_runtime(
    folder: Path,
    config: Config | None = None,
    *,
    clock: Clock | None = None,
    resources: Mapping[str, Any] | None = None,
    serve: bool = True,
) -> Runtime:
    """A runtime on the database of ``folder``; closing it waits for nobody, as a crash would not either."""
    return Runtime.open(
        f"sqlite:///{folder / 'runs.db'}",
        config=config or parse_config('durability = "process"'),
        clock=clock,
        resources=resources,
        serve=serve,
        grace=0.0,
    )


def provider_config(url: str, *, route: str = "", model: str = "", durability: str = "process") -> Config:
    """A configuration with one deployment ``m`` of one server and the route ``r``."""
    return parse_config(
        f'durability = "{durability}"\n'
        f'[providers.p]\nkind = "openai"\nbase_url = "{url}"\n'
        f'[models.m]\nprovider = "p"\nmodel = "sim"\nprice = {{ input = 1, output = 2 }}\n'
        f"timeouts = {{ connect = 2, first_token = 10, idle = 10, total = 20 }}\n{model}\n"
        f'[routes.r]\nmodels = ["m"]\n{route}\n'
    )


async def events_of(run: Run[Any]) -> AsyncGenerator[Event]:
    """The run's events, as something that can be closed before its end."""
    events = run.events()
    try:
        async for event in events:
            yield event
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()


async def parked(run: Run[Any]) -> RunView:
    """The run once it is parked."""
    with anyio.fail_after(PATIENCE):
        async with aclosing(events_of(run)) as events:
            async for event in events:
                if event.type == "run_paused" and (view := await run.view()).status in ("paused", "waiting"):
                    return view
                assert event.type != "run_finished", f"the run has ended instead of being parked: {event}"
    raise AssertionError("the events ended before the run was parked")


async def asked(run: Run[Any], count: int = 1) -> list[ApprovalRequested]:
    """The first requests of a run for a person's decision."""
    found: list[ApprovalRequested] = []
    with anyio.fail_after(PATIENCE):
        async with aclosing(events_of(run)) as events:
            async for event in events:
                if isinstance(event, ApprovalRequested):
                    found.append(event)
                if len(found) == count:
                    return found
    raise AssertionError(f"the run asked for {len(found)} decisions instead of {count}")


async def all_events(run: Run[Any], after: int | None = None) -> list[Event]:
    """All events of a run until its end."""
    with anyio.fail_after(PATIENCE):
        return [event async for event in run.events(after=after)]


async def finished(run: Run[Any]) -> Any:
    """The result of a run, within the patience of tests."""
    with anyio.fail_after(PATIENCE):
        return await run.result()


class Gate:
    """A place where tools can be held, to see who is there at the same time."""

    def __init__(self, size: int) -> None:
        """The gate opens when ``size`` are inside."""
        self.size = size
        self.inside = 0
        self.most = 0
        self.opened = anyio.Event()

    async def pass_through(self) -> None:
        """Enter, wait until enough have, leave."""
        self.inside += 1
        self.most = max(self.most, self.inside)
        if self.inside >= self.size:
            self.opened.set()
        await self.opened.wait()
        self.inside -= 1


def task_count(backend: str) -> int:
    """How many tasks there are in the event loop, the caller's included."""
    if backend == "asyncio":
        return len(asyncio.all_tasks())
    trio = pytest.importorskip("trio")
    return int(trio.lowlevel.current_statistics().tasks_living)
