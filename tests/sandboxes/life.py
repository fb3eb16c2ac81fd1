"""A run with parallel calls in its sandbox, for a process that is killed in the middle; started by ``test_runs.py``.

    python life.py DATABASE RUN_ID CALLS SECONDS [--local]

Prints ``result: ...`` at the end.
"""

from __future__ import annotations

import sys

import anyio

from ridethrough import Agent, Runtime, tool, workflow
from ridethrough.runtime.config import parse_config
from ridethrough.runtime.router.messages import AssistantMessage, ModelRequest, ModelResponse, ToolCall, ToolMessage

CALLS, SECONDS = int(sys.argv[3]), float(sys.argv[4])


@tool(sandbox="python", timeout=60)
def work(number: int, seconds: float) -> str:
    """Write down that it has begun, take a while, write down that it has ended."""
    import time

    with open("ledger", "a") as ledger:
        ledger.write(f"begin {number}\n")
    time.sleep(seconds)
    with open("ledger", "a") as ledger:
        ledger.write(f"end {number}\n")
    return f"done {number}"


@tool(sandbox="python", effect="read")
def ledger() -> list[str]:
    """What is written down."""
    with open("ledger") as written:
        return written.read().splitlines()


async def model(request: ModelRequest) -> ModelResponse | str:
    """Ask for all at once, then look at the ledger, then say what came."""
    told = [message.text for message in request.messages if isinstance(message, ToolMessage)]
    if not told:
        calls = [
            ToolCall(id=f"w{number}", name="work", arguments={"number": number, "seconds": SECONDS})
            for number in range(CALLS)
        ]
        return ModelResponse(message=AssistantMessage(content="", tool_calls=tuple(calls)), finish="tool_calls")
    if len(told) == CALLS:
        look = ToolCall(id="l", name="ledger", arguments={})
        return ModelResponse(message=AssistantMessage(content="", tool_calls=(look,)), finish="tool_calls")
    return "\n".join(told)


worker = Agent("worker", model=model, tools=[work, ledger], tool_concurrency=64)


@workflow(name="sandbox_life")
async def parallel(start: str) -> str:
    """One agent, one turn with many calls."""
    return (await worker.run(start)).output


async def main() -> None:
    """Start the run, or take it up, and see it through."""
    kind = 'kind = "local"\n' if "--local" in sys.argv else ""
    config = parse_config(f"reaper_seconds = 1\nallow_local = true\n[sandboxes.python]\n{kind}pids = 256\n")
    async with Runtime.open(sys.argv[1], config=config) as runtime:
        run = await runtime.start(parallel, "go", id=sys.argv[2])
        print("result:", await run.result(), flush=True)


if __name__ == "__main__":
    anyio.run(main)
