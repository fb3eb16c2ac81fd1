"""The acts of the demonstration, one after the other. Each does something to the run and keeps the evidence of it.

Another act (a brownout of both providers with a pause, say) is a function in ``ACTS``, a field of ``Evidence``, and
its claims in ``account.py``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio

from ridethrough.agents.demo.stage import TARGET, Asked, DemoFailed, Life, Stage, input_of
from ridethrough.agents.demo.tell import Teller
from ridethrough.runtime.events import Event
from ridethrough.runtime.views import RunView

LOOK_SECONDS = 0.02
"""How often the ledgers are looked at."""

PATIENCE = 60.0
"""Seconds for one act; it takes two or three."""

ANSWERED, ON_THE_WAY = 6, 2
"""Model calls that are to be answered, and at least to be on the way, when the process dies."""


@dataclass(frozen=True)
class Crash:
    """What was there when the first process had been killed, before anything else happened."""

    pid: int
    status: int
    run: RunView
    asked: list[Asked]
    mails: int


@dataclass(frozen=True)
class Revival:
    """How the process that took the run up ended."""

    pid: int
    status: int


@dataclass
class Evidence:
    """What the acts leave behind for the account."""

    crash: Crash | None = None
    revival: Revival | None = None
    events: list[Event] = field(default_factory=list[Event])
    trouble: str | None = None
    """Why the acts did not all come to their end."""


Act = Callable[[Stage, Teller, Evidence], Awaitable[None]]


async def perform(stage: Stage, teller: Teller) -> Evidence:
    """Play the acts, up to one that does not come to its end."""
    evidence = Evidence()
    for act in ACTS:
        try:
            with anyio.fail_after(PATIENCE):
                await act(stage, teller, evidence)
        except DemoFailed as error:
            evidence.trouble = error.message
        except TimeoutError:
            evidence.trouble = f"{act.__name__}: it took longer than {PATIENCE:g} s. Is the machine very busy?"
        if evidence.trouble:
            break
    return evidence


# --- acts -----------------------------------------------------------------------------------------------------------


async def crash(stage: Stage, teller: Teller, evidence: Evidence) -> None:
    """Run the workflow in a process, and kill that when the mail is out and answers are on the way."""
    async with stage.life("run", TARGET, "--input", input_of(stage), "--id", stage.run_id) as life:
        teller.process(life.pid, f"ridethrough run {TARGET} --id {stage.run_id} …")
        async with _telling(stage, teller, life, evidence):
            if came := await _until_the_moment(stage, life):
                life.kill()
            asked, mails = stage.asked(), len(stage.mails())
            status = await life.end()
    if not came:
        raise DemoFailed(f"crash: the process ended by itself, with status {status}. {life.last_words()}".strip())
    evidence.crash = Crash(life.pid, status, stage.run(), asked, mails)
    teller.killed(life.pid, evidence.crash.run, sum(each.end == "open" for each in asked))


async def revive(stage: Stage, teller: Teller, evidence: Evidence) -> None:
    """Let a new process take the run up, and bring it to its end."""
    async with stage.life("resume", stage.run_id) as life:
        teller.process(life.pid, f"ridethrough resume {stage.run_id} …")
        async with _telling(stage, teller, life, evidence):
            status = await life.end()
    evidence.revival = Revival(life.pid, status)
    if status:
        raise DemoFailed(f"revive: the process ended with status {status}. {life.last_words()}".strip())


ACTS: tuple[Act, ...] = (crash, revive)


# --- watching -------------------------------------------------------------------------------------------------------


async def _until_the_moment(stage: Stage, life: Life) -> bool:
    """Wait until all that was answered is on record, the mail is out, and answers are on the way; false if never.

    The last look and the kill have no pause between them, and the providers live in this process: nothing can be
    answered in between. So each call is either on record, or was never answered.
    """
    while not life.ended:
        if _on_the_way(stage) and _all_on_record(stage):
            return True
        await anyio.sleep(LOOK_SECONDS)
    return False


def _on_the_way(stage: Stage) -> bool:
    ends = [asked.end for asked in stage.asked()]
    return ends.count("open") >= ON_THE_WAY and ends.count("finished") >= ANSWERED and len(stage.mails()) > 0


def _all_on_record(stage: Stage) -> bool:
    steps = [step for step in stage.run().steps or () if step.status == "done"]
    answered = sum(asked.end == "finished" for asked in stage.asked())
    told = any(step.name == "send_mail" for step in steps)
    return told and sum(step.kind == "model" for step in steps) == answered


@asynccontextmanager
async def _telling(stage: Stage, teller: Teller, life: Life, evidence: Evidence) -> AsyncGenerator[None]:
    """Tell what happens meanwhile, and all that the process said before it ended."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_tell_faults, stage, teller)
        async with anyio.create_task_group() as reading:
            reading.start_soon(_tell_events, life, teller, evidence)
            yield
        tasks.cancel_scope.cancel()


async def _tell_events(life: Life, teller: Teller, evidence: Evidence) -> None:
    async for event in life.events():
        evidence.events.append(event)
        teller.event(event)


async def _tell_faults(stage: Stage, teller: Teller) -> None:
    """Tell each failure of a provider when it happens."""
    known = {(each.provider, each.number) for each in stage.asked() if each.fault}
    while True:
        for each in stage.asked():
            if each.fault and (each.provider, each.number) not in known:
                known.add((each.provider, each.number))
                teller.fault(each)
        await anyio.sleep(LOOK_SECONDS)
