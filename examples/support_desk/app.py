"""A support desk: triage hands over to a specialist, and a person decides about large refunds."""

import json
from pathlib import Path

from pydantic import BaseModel

from ridethrough import Agent, ToolCall, ToolContext, tool, workflow

ORDERS = {"A-100": {"item": "tide clock", "usd": 129.0}, "A-101": {"item": "tide table", "usd": 9.5}}
REFUNDS = Path("refunds.jsonl")


class Reply(BaseModel):
    """What the customer gets."""

    agent: str
    text: str


def is_large(call: ToolCall) -> bool:
    """Whether a person decides first."""
    return float(call.arguments["usd"]) > 50


@tool(effect="read", timeout=10)
async def look_up(order: str) -> str:
    """Look up an order.

    Args:
        order: Its number, for example A-100.
    """
    return json.dumps(ORDERS.get(order, "there is no such order"))


@tool(effect="write", approval=is_large, on_interrupt="ask")
def refund(order: str, usd: float, ctx: ToolContext) -> str:
    """Pay an order back. Large refunds are decided by a person.

    Args:
        order: Its number.
        usd: The amount.
    """
    with REFUNDS.open("a") as file:  # a payment service would be given the key
        file.write(json.dumps({"order": order, "usd": usd, "key": ctx.idempotency_key}) + "\n")
    return f"{usd:.2f} USD were paid back for {order}"


billing = Agent(
    "billing",
    model="smart",
    instructions="You are the billing desk. Look the order up; pay back what is wrong; answer the customer.",
    tools=[look_up, refund],
)
technical = Agent(
    "technical",
    model="smart",
    instructions="You are the technical desk. Explain in two sentences what to try.",
)
triage = Agent(
    "triage",
    model="smart",
    instructions="You are the front desk. Hand questions of money to billing, all others to technical.",
    handoffs=[billing, technical],
)


@workflow(version="1")
async def ticket(question: str) -> Reply:
    """Answer one customer."""
    result = await triage.run(question)
    return Reply(agent=result.agent, text=result.output)
