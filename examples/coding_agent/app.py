"""An agent that writes a program in its sandbox, runs it, sees it fail, mends it and runs it again."""

import anyio
from pydantic import BaseModel

from ridethrough import Agent, Runtime, workflow
from ridethrough.tools.builtin import CODING_TOOLS

TASK = """Write tides.py: it reads heights of the water, one a line as "HH:MM METRES", from the file that it is given,
and prints the times of high water, one a line. High water is higher than what comes before and after it.
Write a small file to try it with, and do not stop before it works."""


class Program(BaseModel):
    """What is handed over."""

    file: str
    does: str


coder = Agent(
    "coder",
    model="smart",  # a route of ridethrough.toml
    instructions="You are a programmer. Work in your sandbox: write, run, mend, run again. Then say what you made.",
    tools=CODING_TOOLS,
    output=Program,
    sandbox="python",  # [sandboxes.python]: what the tools do, they do in there
)


@workflow(version="1")
async def build(task: str = TASK) -> Program:
    """Have a program written."""
    result = await coder.run(task)
    return result.output


async def main() -> None:
    """Do what `ridethrough run app.py:build` does."""
    async with Runtime.open(config="ridethrough.toml") as runtime:
        run = await runtime.start(build, id="tides")
        print(await run.result())


if __name__ == "__main__":
    anyio.run(main)
