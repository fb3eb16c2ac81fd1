"""A batch job that waits for the night, then works through a pile of letters, some of which are failed."""

from datetime import timedelta
from typing import Literal

from pydantic import BaseModel

from ridethrough import Agent, Limits, fan_out, now, sleep, step, workflow

KINDS = ("a complaint about the noise", "an order for two clocks", "a question about the tide table")


class Label(BaseModel):
    """What a letter is about."""

    kind: Literal["complaint", "order", "question"]
    urgent: bool


class Summary(BaseModel):
    """What the night came to."""

    started_at: str
    kinds: dict[str, int]
    failed: list[str]


@step(retries=1)
async def read(letter: int) -> str:
    """Read a letter; every fifth is torn."""
    if letter % 5 == 0:
        raise ValueError(f"letter {letter} is torn")
    return f"Letter {letter} is {KINDS[letter % len(KINDS)]}."


clerk = Agent(
    "clerk",
    model="smart",
    instructions="You are a clerk. Say what the letter is about.",
    output=Label,
    limits=Limits(turns=3),
)


async def sort(letter: int) -> Label:
    """Read one letter and label it."""
    return (await clerk.run(await read(letter))).output


@workflow(version="1")
async def night(letters: int = 12, wait: float = 2.0) -> Summary:
    """Wait (seconds), then sort all letters, four at a time; what fails is reported, not fatal."""
    await sleep(timedelta(seconds=wait))
    started = await now()
    labels = await fan_out(sort, range(1, letters + 1), limit=4, on_error="collect")
    kinds: dict[str, int] = {}
    for label in labels:
        if isinstance(label, Label):
            kinds[label.kind] = kinds.get(label.kind, 0) + 1
    failed = [str(error) for error in labels if isinstance(error, Exception)]
    return Summary(started_at=started.isoformat(timespec="seconds"), kinds=kinds, failed=failed)
