"""A lead splits a topic, researchers look into the angles in parallel, an editor writes the brief."""

from pydantic import BaseModel

from ridethrough import Agent, Limits, gather, tool, workflow

LIBRARY = {
    "Tides, chapter 1": "The moon raises the tides; the sun adds a little less than half as much.",
    "Tides, chapter 4": "Spring tides come at new and full moon, when sun and moon pull in one line.",
    "Coasts, chapter 2": "A funnel-shaped bay makes the tide higher: in the Bay of Fundy about 16 metres.",
    "Power, chapter 7": "A tidal power station works with two basins or with the ebb alone.",
}


class Angles(BaseModel):
    """What is to be looked into."""

    angles: list[str]


class Finding(BaseModel):
    """One claim and where it stands."""

    claim: str
    source: str


class Brief(BaseModel):
    """What the team delivers."""

    title: str
    text: str
    sources: list[str]


@tool(effect="read", timeout=20)
async def search(query: str, limit: int = 3) -> list[str]:
    """Search the library.

    Args:
        query: Words to look for.
        limit: How many passages, 1 to 10.
    """
    words = {word.strip(".,:?").lower() for word in query.split() if len(word) > 3}
    passages = [f"{source}: {text}" for source, text in LIBRARY.items()]
    return [passage for passage in passages if any(word in passage.lower() for word in words)][:limit]


lead = Agent(
    "lead",
    model="smart",
    instructions="You lead a research team. Split the topic into three angles.",
    output=Angles,
)
researcher = Agent(
    "researcher",
    model="smart",
    instructions="You are a researcher. Search the library, then state one well-sourced claim.",
    tools=[search],
    output=Finding,
    limits=Limits(turns=5, tool_calls=10),
)
editor = Agent(
    "editor",
    model="smart",
    instructions="You are an editor. Write the findings up as a brief.",
    output=Brief,
)


@workflow(version="1")
async def brief(topic: str) -> Brief:
    """Split, look into the angles (two at a time), write up."""
    plan = (await lead.run(topic)).output
    findings = await gather(*(researcher.run(f"{topic}: {angle}") for angle in plan.angles), limit=2)
    notes = "\n".join(f"{finding.output.claim} ({finding.output.source})" for finding in findings)
    return (await editor.run(f"Topic: {topic}\n{notes}")).output
