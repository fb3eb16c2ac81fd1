"""Durable waits: timers, signals, questions, and answers of child runs.

Each goes on record when it begins, with its deadline, so that a resumed run waits for the rest of the time and not for
all of it again; each ends in a step, so that it is over for good.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from ridethrough.runtime import payload
from ridethrough.runtime.errors import RunCancelled, RunFailed, SerializationError
from ridethrough.runtime.events import ApprovalRequested
from ridethrough.runtime.execution import FINAL_STATUSES, Blocked, Branch, Execution, Outcome
from ridethrough.runtime.payload import Codec, digest_of
from ridethrough.runtime.store import StoredRow

_NOTHING = Codec(None, "a timer")


async def sleep_until(branch: Branch, seconds: float) -> None:
    """A durable timer of ``seconds`` from its first start."""
    execution = branch.execution
    path = branch.next("sleep")
    asked = f"[{seconds!r}]"
    digest = digest_of(asked)
    if (row := execution.recorded(path, "sleep", digest, asked)) is not None:
        await execution.recall(row, _NOTHING)
        return
    await execution.before_live(branch, path, "sleep", digest)
    started = _since(execution, path)
    outcome = Outcome()
    if seconds > 0:
        due = await execution.open_wait(path, "timer", "sleep", started + seconds)
        await execution.block(Blocked(path, "timer", "sleep", due))
        outcome.also = execution.closing(path)
    await execution.record(path, "sleep", "sleep", digest, asked, started, outcome, "null", None)


def _since(execution: Execution, path: str) -> float:
    """When a wait began: now, or in an earlier life of the run."""
    known = execution.waits.get(path)
    return execution.services.clock.now() if known is None else float(known.since)


@dataclass(frozen=True, slots=True)
class Question:
    """What a wait shows to the person who is to answer."""

    kind: str
    """``signal``, ``question``, ``approval`` or ``interrupted``."""
    name: str
    text: str | None = None
    arguments: dict[str, Any] | None = None
    tool: str | None = None
    """The tool whose call is decided on."""


async def receive(branch: Branch, path: str, question: Question, codec: Codec, timeout: float | None) -> Any:
    """Wait for a signal and record it as a step.

    Raises:
        TimeoutError: ``timeout`` seconds after the wait began nothing had come; recorded like a value.
    """
    execution = branch.execution
    asked = payload.encode([question.name, question.text, question.arguments], spaced=True)
    digest = digest_of(asked)
    if (row := execution.recorded(path, "signal", digest, asked)) is not None:
        return await execution.recall(row, codec)
    await execution.before_live(branch, path, "signal", digest)
    started = _since(execution, path)
    due = await _announce(execution, path, question, codec, None if timeout is None else started + timeout)
    outcome = Outcome(agent=branch.agent)
    while True:
        # From looking at a signal until it is taken no other branch may look: it would take the same one.
        async with execution.turn(question.name):
            found = await _next_fitting(execution, path, question.name, codec)
            if found is not None:
                text, outcome.also = found
                await execution.record(path, question.name, "signal", digest, asked, started, outcome, text, None)
                return codec.load(text)
        if due is not None and execution.services.clock.now() >= due:
            failure = TimeoutError(f"No signal {question.name!r} came within {timeout:g} s.")
            outcome.also = execution.closing(path)
            await execution.record(path, question.name, "signal", digest, asked, started, outcome, None, failure)
            raise failure
        # Whatever ends the wait, look again first: what was sent in time counts.
        await execution.block(Blocked(path, question.kind, question.name, due))


async def _announce(
    execution: Execution, path: str, question: Question, codec: Codec, due: float | None
) -> float | None:
    """Put the wait on record, and tell people if it is they who are awaited."""
    event = ApprovalRequested(
        path=path,
        name=question.tool or path.rpartition("/")[2].partition("#")[0],
        call_id=question.name,
        question=question.text or "",
        arguments=question.arguments or {},
    )
    return await execution.open_wait(
        path,
        question.kind,
        question.name,
        due,
        None if question.kind == "signal" else event,
        question=None if question.text is None else payload.storable(question.text),
        arguments=None if question.arguments is None else json.dumps(question.arguments),
        value_schema=json.dumps(codec.json_schema()),
    )


async def _next_fitting(
    execution: Execution, path: str, name: str, codec: Codec
) -> tuple[str, Callable[[Connection], None]] | None:
    """The value of the oldest signal that fits, and what takes it; ``None`` if there is none."""
    while (signal := await _peek(execution, name)) is not None:
        text = await _accept(execution, path, signal, codec)
        if text is not None:
            return text, _taking(execution, path, signal)
    return None


async def _peek(execution: Execution, name: str) -> StoredRow | None:
    store = execution.services.store
    signal: StoredRow | None = await execution.do(
        lambda connection: store.first_signal(connection, execution.run_id, name)
    )
    return signal


async def _accept(execution: Execution, path: str, signal: StoredRow, codec: Codec) -> str | None:
    """The signal's value as it is recorded; ``None`` if it does not fit (then it is set aside and the wait goes on)."""
    try:
        return codec.dump(codec.accept(json.loads(signal.value)))
    except SerializationError:
        store = execution.services.store
        await execution.do(lambda connection: store.take_signal(connection, signal.id, f"{path} (refused)"))
        return None


def _taking(execution: Execution, path: str, signal: StoredRow) -> Callable[[Connection], None]:
    close, store = execution.closing(path), execution.services.store

    def operation(connection: Connection) -> None:
        store.take_signal(connection, signal.id, path)
        close(connection)

    return operation


async def await_child(
    branch: Branch, path: str, name: str, start: Callable[[Connection, str], None], asked: str, codec: Codec
) -> Any:
    """Start a child run (once) and wait for its end; its result is a step of this run.

    ``start(connection, run_id)`` inserts the child if it is not there.
    """
    execution = branch.execution
    digest = digest_of(asked)
    if (row := execution.recorded(path, "child", digest, asked)) is not None:
        return await execution.recall(row, codec)
    await execution.before_live(branch, path, "child", digest)
    started = execution.services.clock.now()
    child_id = f"{execution.run_id}.{path}"
    if path not in execution.waits:
        await execution.do(lambda connection: start(connection, child_id))
        await execution.open_wait(path, "child", child_id, None)
    execution.services.poke()
    child = await _child_end(execution, path, child_id)
    text, failure = await _child_outcome(execution, child)
    outcome = Outcome(agent=branch.agent, also=execution.closing(path))
    await execution.record(path, name, "child", digest, asked, started, outcome, text, failure)
    if failure is not None:
        raise failure
    return codec.load(text or "null")


async def _child_end(execution: Execution, path: str, child_id: str) -> StoredRow:
    store = execution.services.store
    while True:
        row: StoredRow = await execution.do(lambda connection: store.run(connection, child_id))
        if row.status in FINAL_STATUSES:
            return row
        await execution.block(Blocked(path, "child", child_id))


async def _child_outcome(execution: Execution, child: StoredRow) -> tuple[str | None, Exception | None]:
    if child.status == "done":
        return (await execution.read_payload(child.result_ref) if child.result_ref else child.result), None
    if child.status == "cancelled":
        return None, RunCancelled(f"Child run {child.id} was cancelled.")
    summary = payload.error_line(child.error)
    return None, RunFailed(
        f"Child run {child.id} failed: {summary}",
        run_id=child.id,
        error_type=payload.error_summary(child.error)["type"],
    )
