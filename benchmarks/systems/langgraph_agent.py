"""LangGraph's prebuilt ReAct agent with an instant chat model. Stored: `SqliteSaver`, durability="sync".

The stored case uses the synchronous API: the async checkpointer was slower here, by about a third at turn 1.
"""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

from _measure import PARALLEL_TOOLS, agent_case, arguments
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.prebuilt import create_react_agent

warnings.simplefilter("ignore", DeprecationWarning)  # its successor lives in another package, on the same graph
case, directory, _ = arguments()
CALLS = PARALLEL_TOOLS if case == "agent_tools" else 1


class Instant(BaseChatModel):
    """Asks for the tools after a user's message, answers after a tool's."""

    made: int = 0

    @property
    def _llm_type(self) -> str:
        return "instant"

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        self.made += 1
        if isinstance(messages[-1], HumanMessage):
            calls = [{"name": "noop", "args": {"x": 1}, "id": f"c{self.made}-{i}"} for i in range(CALLS)]
            message = AIMessage(content="", tool_calls=calls)
        else:
            message = AIMessage(content="done")
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _agenerate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        return self._generate(messages)


async def noop(x: int) -> str:
    """Does nothing."""
    return "ok"


@tool("noop")
def noop_sync(x: int) -> str:
    """Does nothing."""
    return "ok"


async def main() -> None:
    if case != "agent_sqlite":
        agent = create_react_agent(Instant(), [noop], prompt="Be brief.")

        async def from_list(state: list[Any], text: str) -> list[Any]:
            return (await agent.ainvoke({"messages": [*state, HumanMessage(text)]}))["messages"]

        await agent_case("langgraph", case, lambda name: [], from_list)
        return
    with SqliteSaver.from_conn_string(str(directory / "langgraph.sqlite")) as saver:
        stored = create_react_agent(Instant(), [noop_sync], prompt="Be brief.", checkpointer=saver)

        async def from_store(thread: str, text: str) -> str:
            config = {"configurable": {"thread_id": thread}}
            stored.invoke({"messages": [HumanMessage(text)]}, config, durability="sync")
            return thread

        await agent_case("langgraph", case, lambda name: name, from_store)


asyncio.run(main())
