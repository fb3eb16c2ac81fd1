"""Pydantic AI: `agent.run` with a `FunctionModel`. Stored: its own DBOS integration, on DBOS's SQLite store."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from _measure import PARALLEL_TOOLS, agent_case, arguments
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

case, directory, _ = arguments()
CALLS = PARALLEL_TOOLS if case == "agent_tools" else 1


async def instant(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """Asks for the tools after a user's message, answers after a tool's."""
    if isinstance(messages[-1].parts[-1], UserPromptPart):
        return ModelResponse(parts=[ToolCallPart("noop", {"x": 1}) for _ in range(CALLS)])
    return ModelResponse(parts=[TextPart("done")])


agent: Any = Agent(FunctionModel(instant), name="bench", instructions="Be brief.")


async def noop(x: int) -> str:
    """Does nothing."""
    return "ok"


def begin(name: str) -> list[ModelMessage]:
    return []


async def turn(state: list[ModelMessage], text: str) -> list[ModelMessage]:
    return (await agent.run(text, message_history=state)).all_messages()


async def main() -> None:
    if case != "agent_sqlite":
        agent.tool_plain(noop)
        await agent_case("pydantic-ai", case, begin, turn)
        return
    from dbos import DBOS
    from pydantic_ai.durable_exec.dbos import DBOSDurability

    database = directory / "pydantic-ai.sqlite"
    DBOS(config={"name": "bench", "system_database_url": f"sqlite:///{database}", "log_level": "ERROR"})
    durable = Agent(FunctionModel(instant), name="bench", instructions="Be brief.", capabilities=[DBOSDurability()])
    durable.tool_plain(DBOS.step()(noop))  # the integration makes model calls steps, and leaves tools to the user

    @DBOS.workflow()
    async def one_turn(history: list[ModelMessage], text: str) -> list[ModelMessage]:
        return (await durable.run(text, message_history=history)).new_messages()

    async def stored_turn(state: list[ModelMessage], text: str) -> list[ModelMessage]:
        return [*state, *await one_turn(state, text)]

    DBOS.launch()
    await agent_case("pydantic-ai", case, begin, stored_turn)


asyncio.run(main())
os._exit(0)  # DBOS's poller threads need up to a second each to stop; they are not measured
