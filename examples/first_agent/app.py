"""An agent with one tool. Kill it wherever you like, then resume it."""

import anyio

from ridethrough import Agent, Runtime, tool

HIGH_WATER = {"Brest": "06:12 and 18:37", "Dover": "01:05 and 13:28", "Saint John": "04:50 and 17:14"}


@tool(effect="read", timeout=10)
async def high_water(port: str) -> str:
    """Look up today's times of high water.

    Args:
        port: The port's name.
    """
    return HIGH_WATER.get(port, f"unknown port; there are: {', '.join(HIGH_WATER)}")


pilot = Agent(
    "pilot",
    model="smart",  # a route of ridethrough.toml
    instructions="You are a harbour pilot. Look up the tide, then answer in one sentence.",
    tools=[high_water],
)


async def main() -> None:
    """Do what `ridethrough run app.py:pilot` does."""
    async with Runtime.open(config="ridethrough.toml") as runtime:
        run = await runtime.start(pilot, "When can we enter Brest?", id="first")
        result = await run.result()
        print(result.output)


if __name__ == "__main__":
    anyio.run(main)
