"""A run's events for anybody who wants to watch: early or late, in the process that executes the run or in another.

What is on disk is read from the journal and the kept events; what passes (deltas, starts) comes live from the run, in
the process that executes it. Both meet by position: a reader subscribes first, then reads the past, then goes on live
and leaves out what it has had.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from functools import partial
from typing import Any

import anyio
from sqlalchemy import Connection

from ridethrough.runtime import control, payload
from ridethrough.runtime.events import (
    EVENT,
    Event,
    EventBase,
    RunFinished,
    RunStarted,
    StepFinished,
    StepStarted,
)
from ridethrough.runtime.execution import tool_finished
from ridethrough.runtime.store import Store
from ridethrough.runtime.tables import FINAL
from ridethrough.runtime.worker import Worker

_PASSING = ("step_started", "model_delta", "model_reset", "tool_call_started")
_FOLLOW_SECONDS = 0.1


async def follow_events(worker: Worker, run_id: str, after: int, follow: bool) -> AsyncIterator[Any]:
    """The events of a run after a position, in order, until it has ended; without ``follow`` those on disk."""
    send, receive = anyio.create_memory_object_stream[EventBase](math.inf)
    watchers = worker.watchers.setdefault(run_id, [])
    watchers.append(send.send_nowait)
    execution = worker.resident.get(run_id)
    if execution is not None:
        execution.watchers = watchers
    try:
        async with aclosing(_merge(worker, run_id, after, follow, receive)) as events:
            async for event in events:
                yield event
    finally:
        watchers.remove(send.send_nowait)
        if not watchers:
            worker.watchers.pop(run_id, None)
        send.close()
        receive.close()


async def _merge(worker: Worker, run_id: str, seen: int, follow: bool, live: Any) -> AsyncGenerator[Any]:
    watch = worker.store.database.watch()
    started = seen > 0
    try:
        while True:
            watch.changed()
            events, ended = await worker.store.read(partial(past, worker.store, run_id, seen, started))
            started = True
            for event in events:
                seen = max(seen, event.seq)
                yield event
            floor = seen  # what lies at or below it has been read; the live stream has each later event once
            if ended or not follow:
                return
            while True:
                event = await _next_live(live)
                if event is None:
                    if run_id not in worker.resident and watch.changed():
                        break
                    continue
                if event.type not in _PASSING and event.seq > seen + 1:
                    break  # what came before it was not told live (a wake-up): the disk has both
                if event.seq > floor or (event.type in _PASSING and event.seq == floor):
                    seen = max(seen, event.seq)
                    yield event
                if event.type == "run_finished":
                    return
                if event.type == "run_paused":
                    break
    finally:
        watch.close()


async def _next_live(live: Any) -> Any:
    with anyio.move_on_after(_FOLLOW_SECONDS):
        return await live.receive()
    return None


def past(store: Store, run_id: str, after: int, started: bool, connection: Connection) -> tuple[list[Event], bool]:
    """The events on disk after a position, and whether the run has ended."""
    row = control.require(store, connection, run_id)
    found: list[Any] = []
    for step in store.steps(connection, run_id, after):
        found += _step_events(step)
    for kept in store.events(connection, run_id, after):
        head = {"run_id": run_id, "seq": kept.seq, "at": kept.at, "path": kept.path, "type": kept.type}
        found.append(EVENT.validate_python({**json.loads(kept.data), **head}))
    found.sort(key=lambda event: event.seq)
    if not started and row.started_at is not None:
        found.insert(0, RunStarted(run_id=run_id, at=row.started_at, workflow=row.workflow))
    ended = row.status in FINAL
    if ended:
        found.append(_end_event(row, store.last_seq(connection, run_id) + 1))
    return found, ended


def _end_event(row: Any, seq: int) -> RunFinished:
    error = None if row.error is None else payload.error_line(row.error)
    return RunFinished(run_id=row.id, seq=seq, at=row.finished_at, status=row.status, error=error)


def _step_events(row: Any) -> Iterator[Any]:
    if row.name == "gather" and not row.digest:
        return
    head: dict[str, Any] = {"run_id": row.run_id, "seq": row.seq, "path": row.path, "name": row.name}
    error = None if row.error is None else payload.error_line(row.error)
    yield StepStarted(**{**head, "seq": max(row.seq - 1, 0)}, at=row.started_at, kind=row.kind, agent=row.agent)
    if row.kind == "tool":
        yield tool_finished(tuple(row), row.output)
    yield StepFinished(
        **head,
        at=row.ended_at,
        kind=row.kind,
        status=row.status,
        agent=row.agent,
        model=row.model,
        error=error,
        input_tokens=row.input_tokens or 0,
        output_tokens=row.output_tokens or 0,
        cost_usd=row.cost_usd,
        attempts=row.attempts,
        seconds=row.ended_at - row.started_at,
    )
