"""A turn of an agent with ten tools, with a thousand that are searched, and with a thousand that are all sent."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from _measure import Meter, Turns, arguments, report

from ridethrough import Agent, Runtime, Tool, tool
from ridethrough.runtime.config import parse_config
from ridethrough.runtime.router.messages import AssistantMessage, ModelRequest, ModelResponse, ToolCall

TURNS = 40
WORDS = ("invoice", "customer", "harbour", "tide", "ticket", "ledger", "crane", "berth", "pilot", "buoy")


def made(number: int) -> Tool[..., Any]:
    name = f"{WORDS[number % 10]}_{number}"

    @tool(name, f"Look up {WORDS[number % 10]} number {number} in the register.", effect="read")
    async def look_up(key: str, limit: int = 5) -> str:
        return key

    return look_up


async def model(request: ModelRequest) -> ModelResponse | str:
    if request.messages[-1].role == "tool":
        return "done"
    call = ToolCall(id="1", name="tide_3", arguments={"key": "x"})
    return ModelResponse(message=AssistantMessage(content="", tool_calls=(call,)), finish="tool_calls")


async def measured(agent: Agent[str]) -> Turns:
    turns = Turns()
    for number in range(TURNS + 5):
        turns.start()
        await agent.run("How high is the tide?")
        turns.stop()
        if number < 5:
            turns = Turns()
    return turns


async def main() -> None:
    case, directory, _ = arguments()
    tools = [made(number) for number in range(1000)]
    agents = {
        "few": Agent("few", model=model, tools=tools[:10]),
        "searched": Agent("searched", model=model, tools=tools),
        "sent": Agent("sent", model=model, tools=tools, tool_search=False),
    }
    store = f"sqlite:///{Path('/dev/shm') / directory.name}.db"
    figures = {}
    async with Runtime.open(store, config=parse_config('durability = "process"')):
        with Meter() as meter:
            for name, agent in agents.items():
                figures |= (await measured(agent)).medians(name)
    report("ridethrough", case, meter, 3 * TURNS, **figures)


asyncio.run(main())
