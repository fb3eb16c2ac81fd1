"""ridethrough's agent with an instant model; every model call and tool call is a step of a run, as always.

The model is replaced where the other frameworks have theirs replaced: above the wire, so that nobody's HTTP and JSON
are in the figures. There is no way to run without a journal: the case without a store keeps it on a RAM file system
(where there is one) with durability="process", which leaves the work of the engine and takes away the disk's.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from _measure import PARALLEL_TOOLS, agent_case, arguments

from ridethrough import Agent, ModelRequest, ModelResponse, Router, Runtime, tool
from ridethrough.runtime.router.messages import AssistantMessage, ToolCall, UserMessage
from ridethrough.runtime.router.router import ModelFinished, StreamEvent

case, directory, _ = arguments()
CALLS = PARALLEL_TOOLS if case == "agent_tools" else 1
CONFIG = """
durability = "{durability}"

[providers.instant]
kind = "openai"
base_url = "http://127.0.0.1:9/v1"

[models.instant]
provider = "instant"
model = "instant"
price = {{ input = 1.0, output = 1.0 }}

[routes.instant]
models = ["instant"]
"""


class Instant:
    """Asks for the tools after a user's message, answers after a tool's."""

    made = 0

    async def complete(self, request: ModelRequest, **_: Any) -> ModelResponse:
        self.made += 1
        if not isinstance(request.messages[-1], UserMessage):
            return ModelResponse(message=AssistantMessage(content="done"), deployment="instant")
        calls = tuple(ToolCall(id=f"c{self.made}-{i}", name="noop", arguments={"x": 1}) for i in range(CALLS))
        return ModelResponse(message=AssistantMessage(tool_calls=calls), finish="tool_calls", deployment="instant")

    async def stream(self, request: ModelRequest, **_: Any) -> AsyncGenerator[StreamEvent]:
        yield ModelFinished(await self.complete(request))


@tool(effect="read")
async def noop(x: int) -> str:
    """Does nothing."""
    return "ok"


agent = Agent("bench", model="instant", instructions="Be brief.", tools=[noop], tool_concurrency=PARALLEL_TOOLS)


def begin(name: str) -> str:
    return name  # the session's


async def turn(session: str, text: str) -> str:
    await agent.run(text, session=session)
    return session


async def main(place: Path, durability: str) -> None:
    instant = Instant()
    Router.complete = lambda self, request, **kw: instant.complete(request, **kw)  # type: ignore[method-assign]
    Router.stream = lambda self, request, **kw: instant.stream(request, **kw)  # type: ignore[method-assign]
    config = place / "ridethrough.toml"
    config.write_text(CONFIG.format(durability=durability))
    async with Runtime.open(f"sqlite:///{place / 'ridethrough.sqlite'}", config=config):
        await agent_case("ridethrough", case, begin, turn)


if case == "agent_sqlite":
    asyncio.run(main(directory, "power"))
else:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else directory) as scratch:
        asyncio.run(main(Path(scratch), "process"))
