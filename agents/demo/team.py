"""The workflow of the demonstration: a planner with a mail tool, researchers in parallel, an editor.

Nothing in here knows that it will be killed. It is written as one would write it without a journal.
"""

from __future__ import annotations

import json
import os

from pydantic import BaseModel

from ridethrough.agents.agent import Agent, Limits
from ridethrough.runtime.workflow import gather, workflow
from ridethrough.tools.context import ToolContext
from ridethrough.tools.tool import tool

TOPIC = "the tides"

ARCHIVE = {
    "What moves the water": "The moon pulls the near side of the sea more than the far side, and the sun half as much.",
    "Where tides are highest": "In the Bay of Fundy the water rises by about 16 metres between low and high tide.",
    "What tides do to the day": "Friction of the tides makes the day longer, by about 2 milliseconds a century.",
    "Power from tides": "The tidal power station on the Rance has been feeding the French grid since 1966.",
    "Life between the tide marks": "What lives between the marks must stand both drying out and drowning, twice a day.",
}


class Desk(BaseModel):
    """What the mail tool has to know; stored with the run."""

    outbox: str


class Plan(BaseModel):
    """What is to be looked into."""

    title: str
    angles: list[str]


class Finding(BaseModel):
    """What a researcher found."""

    claim: str
    source: str


class Report(BaseModel):
    """What the team delivers."""

    title: str
    summary: str
    findings: list[Finding]


@tool(effect="write", timeout=10)
async def send_mail(to: str, subject: str, ctx: ToolContext[Desk]) -> str:
    """Send a mail. It cannot be taken back.

    Args:
        to: The address.
        subject: What it is about.
    """
    mail = {"to": to, "subject": subject, "key": ctx.idempotency_key, "process": os.getpid()}
    handle = os.open(ctx.deps.outbox, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, json.dumps(mail).encode() + b"\n")
    finally:
        os.close(handle)
    return f"sent to {to}"


@tool(effect="read", timeout=10)
async def search(query: str) -> str:
    """Search the archive.

    Args:
        query: What to look for.
    """
    found = [f"{title}: {text}" for title, text in ARCHIVE.items() if title.lower() in query.lower()]
    return "\n".join(found) or "nothing was found"


planner = Agent(
    "planner",
    model="smart",
    instructions="You plan a report. Tell the readers by mail that it is under way, then give the angles.",
    tools=[send_mail],
    output=Plan,
    limits=Limits(turns=5),
)
researcher = Agent(
    "researcher",
    model="smart",
    instructions="You look into one angle. Search the archive, then state one claim with its source.",
    tools=[search],
    output=Finding,
    limits=Limits(turns=5),
)
editor = Agent(
    "editor",
    model="smart",
    instructions="You are the editor. Write the findings up as a report.",
    output=Report,
    limits=Limits(turns=5),
)


@workflow(version="1")
async def report(topic: str, outbox: str) -> Report:
    """Plan, research in parallel, edit."""
    plan = await planner.run(f"A report on {topic}", deps=Desk(outbox=outbox))
    findings = await gather(*(researcher.run(angle) for angle in plan.output.angles), limit=3)
    found = "\n".join(finding.output.model_dump_json() for finding in findings)
    return (await editor.run(f"{plan.output.title}\n{found}")).output
