"""The acts of the demonstration, one after the other. Each does something to the run and keeps the evidence of it.

Another act is a function in ``ACTS``, a field of ``Evidence``, and its claims in ``account.py``.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio

from ridethrough.agents.demo.stage import TARGET, Asked, DemoFailed, Stage, input_of
from ridethrough.agents.demo.tell import Teller
from ridethrough.runtime.drill.life import Life
from ridethrough.runtime.events import Event
from ridethrough.runtime.router.providers.simulated import Fault
from ridethrough.runtime.views import RunView

LOOK_SECONDS = 0.02
"""How often the ledgers are looked at."""

PATIENCE = 60.0
"""Seconds for one act; it takes two to ten."""

OUTAGE_SECONDS = 2.0
"""How long the run lies in the database before its providers are well again."""

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


@dataclass(frozen=True)
class Outage:
    """What was seen while no provider answered: the run as the database had it, and what was asked meanwhile."""

    paused: RunView
    seconds: float
    """How long the run lay in the database, from its pause to its providers' recovery."""
    asked: list[Asked]
    """Requests from the beginning of the outage on, those after the recovery not among them."""


@dataclass
class Evidence:
    """What the acts leave behind for the account."""

    crash: Crash | None = None
    revival: Revival | None = None
    outage: Outage | None = None
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
    """Let a new process take the run up; while it works no provider answers for a while. It has to end by itself."""
    async with stage.life("resume", stage.run_id) as life:
        teller.process(life.pid, f"ridethrough resume {stage.run_id} …")
        status = -1
        async with _telling(stage, teller, life, evidence):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_take_providers_away, stage, teller, evidence)
                status = await life.end()
                tasks.cancel_scope.cancel()
    evidence.revival = Revival(life.pid, status)
    if status:
        raise DemoFailed(f"revive: the process ended with status {status}. {life.last_words()}".strip())


async def _take_providers_away(stage: Stage, teller: Teller, evidence: Evidence) -> None:
    """Let both providers refuse everything until the run has been paused for a while, then make them well."""
    answered = _finished(stage)
    await _until(lambda: _finished(stage) > answered)
    known = {(each.provider, each.number) for each in stage.asked()}
    for provider in stage.providers.values():
        provider.faults.add(Fault("status", status=503))
    teller.outage("from here on both providers answer 503")
    await _until(lambda: stage.run().status == "paused")
    run, began = stage.run(), time.monotonic()
    teller.paused(run)
    await anyio.sleep(OUTAGE_SECONDS)
    asked = [each for each in stage.asked() if (each.provider, each.number) not in known]
    evidence.outage = Outage(run, time.monotonic() - began, asked)
    for provider in stage.providers.values():
        provider.faults.clear()
    teller.outage("both providers are well again; nobody types anything")


ACTS: tuple[Act, ...] = (crash, revive)


def _finished(stage: Stage) -> int:
    return sum(each.end == "finished" for each in stage.asked())


async def _until(holds: Callable[[], bool]) -> None:
    """Look at what lies outside of the processes until something holds."""
    while True:
        if holds():
            return
        await anyio.sleep(LOOK_SECONDS)


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
