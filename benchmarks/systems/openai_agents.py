"""OpenAI Agents SDK: `Runner.run` with an instant model; tracing off. Stored: its `SQLiteSession` in a file."""

from __future__ import annotations

import asyncio
from typing import Any

from _measure import PARALLEL_TOOLS, agent_case, arguments
from agents import (  # noqa: TID251 (here `agents` is the OpenAI SDK, not our folder)
    Agent,
    Model,
    ModelResponse,
    Runner,
    SQLiteSession,
    Usage,
    function_tool,
    set_tracing_disabled,
)
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

set_tracing_disabled(True)
case, directory, _ = arguments()
CALLS = PARALLEL_TOOLS if case == "agent_tools" else 1


class Instant(Model):
    """Asks for the tools after a user's message, answers after a tool's."""

    made = 0

    async def get_response(self, system_instructions: Any, input: Any, *args: Any, **kwargs: Any) -> ModelResponse:
        self.made += 1
        if isinstance(input, str) or input[-1].get("role") == "user":
            output: list[Any] = [
                ResponseFunctionToolCall(
                    arguments='{"x": 1}', call_id=f"c{self.made}-{i}", name="noop", type="function_call"
                )
                for i in range(CALLS)
            ]
        else:
            text = ResponseOutputText(annotations=[], text="done", type="output_text")
            output = [
                ResponseOutputMessage(
                    id=f"m{self.made}", content=[text], role="assistant", status="completed", type="message"
                )
            ]
        return ModelResponse(output=output, usage=Usage(), response_id=None)

    def stream_response(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


@function_tool
async def noop(x: int) -> str:
    """Does nothing."""
    return "ok"


agent = Agent(name="bench", instructions="Be brief.", model=Instant(), tools=[noop])


def begin(name: str) -> Any:
    return SQLiteSession(name, str(directory / "openai-agents.sqlite")) if case == "agent_sqlite" else []


async def turn(state: Any, text: str) -> Any:
    if isinstance(state, list):
        result = await Runner.run(agent, [*state, {"role": "user", "content": text}])
        return result.to_input_list()
    await Runner.run(agent, text, session=state)
    return state


asyncio.run(agent_case("openai-agents", case, begin, turn))
