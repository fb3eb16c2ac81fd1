"""A program whose process is killed at every commit, one run for each; started by ``test_kills.py``.

    python lives.py DATABASE PROVIDER_URL LEDGER

Each run has two lives: one that is killed at a point, and one that takes it up and ends it. A life is a fork of this
process, which has imported everything and holds no thread and no connection.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import anyio
from pydantic import BaseModel

from ridethrough import Agent, Runtime, ToolContext, gather, tool, workflow
from ridethrough.runtime import testpoints
from ridethrough.runtime.config import parse_config
from ridethrough.runtime.testing import Ledger


class Letter(BaseModel):
    cents: int


ledger = Ledger(Path("unset"))


@tool(effect="read")
async def look(ctx: ToolContext) -> str:
    """Look something up."""
    with ledger.effect("read", ctx.run_id, ctx.call_id):
        return "seen"


@tool(effect="idempotent")
def charge(cents: int, ctx: ToolContext) -> str:
    """Charge the account."""
    with ledger.effect("idempotent", ctx.run_id, ctx.call_id, ctx.idempotency_key):
        return f"charged {cents}"


@tool
async def send(to: str, ctx: ToolContext) -> str:
    """Send a letter."""
    with ledger.effect("write", ctx.run_id, ctx.call_id):
        return f"sent to {to}"


editor = Agent("editor", model="r", instructions="You are the editor.", output=Letter)
clerk = Agent("clerk", model="r", instructions="You are the clerk.", tools=[look, charge, send], handoffs=[editor])
helper = Agent("helper", model="r", instructions="You are the helper.", tools=[look])


@workflow(name="office")
async def office(name: str) -> list[str]:
    """A clerk who hands over to an editor, and a helper beside them."""
    letter, helped = await gather(clerk.run(f"go {name}"), helper.run(f"help {name}"))
    answers = [message.text for message in letter.messages if message.role == "tool"]
    return [*answers, str(letter.output), helped.output]


async def live(database: str, url: str, run_id: str) -> None:
    """Start or take up the run and see it through."""
    config = parse_config(
        f'durability = "process"\n[providers.p]\nkind = "openai"\nbase_url = "{url}"\n'
        '[models.m]\nprovider = "p"\nmodel = "sim"\nprice = { input = 1, output = 1 }\n[routes.r]\nmodels = ["m"]\n'
    )
    async with Runtime.open(database, config=config) as runtime:
        run = await runtime.start(office, run_id, id=run_id)
        result = await run.result()
        handed = [event async for event in runtime.events(run_id, follow=False) if event.type == "handed_off"]
    ledger.write("result", run=run_id, result=result, handed=len(handed))


def fork(database: str, url: str, run_id: str, kill_at: str) -> bool:
    """One life; whether it ended by itself."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            testpoints.arm(kill_at)
            anyio.run(live, database, url, run_id)
            status = 0
        finally:
            os._exit(status)
    _, waited = os.waitpid(child, 0)
    if os.WIFEXITED(waited) and os.WEXITSTATUS(waited):
        sys.exit(f"run {run_id}: a life that nobody killed has failed")
    return os.WIFEXITED(waited)


def kept(database: str, run_id: str) -> list[str]:
    """The model calls of a run that are on disk."""
    with closing(sqlite3.connect(database.removeprefix("sqlite:///"))) as connection:
        query = "SELECT path FROM steps WHERE run_id = ? AND kind = 'model'"
        try:
            return [path for (path,) in connection.execute(query, (run_id,))]
        except sqlite3.OperationalError:  # killed before the tables were there
            return []


def main() -> None:
    """Kill at every point of every kind, until a life reaches its end before it comes to the point."""
    global ledger
    database, url, path = sys.argv[1:]
    ledger = Ledger(Path(path))
    for point in ("journal.before_commit", "journal.after_commit", "step.before_call", "step.after_call"):
        count = 1
        while not fork(database, url, f"{point}-{count}", f"{point}:{count}"):
            ledger.write("kept", run=f"{point}-{count}", paths=kept(database, f"{point}-{count}"))
            if not fork(database, url, f"{point}-{count}", ""):
                sys.exit(f"run {point}-{count} was killed without being told to")
            count += 1
        ledger.write("points", point=point, count=count - 1)


if __name__ == "__main__":
    main()
