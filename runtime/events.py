"""What a run tells those who watch it: one tagged union, the same live, late, and from another process.

``seq`` is a position in the run's journal. Events that are on disk have a position of their own; the passing ones
(``StepStarted``, ``ModelDelta``, ``ModelReset``, ``ToolCallStarted``) carry the position of the last one on disk, so
that a reader who reconnects with ``after=event.seq`` misses nothing that was kept.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class EventBase(BaseModel):
    """What every event has: ``at`` in seconds since the epoch (UTC), the step's ``path`` (empty for the run's own)."""

    model_config = ConfigDict(frozen=True)

    run_id: str = ""
    seq: int = 0
    at: float = Field(default_factory=time.time)
    path: str = ""


class RunStarted(EventBase):
    """The run began, or was taken up by a worker after a crash (``recovery`` > 0)."""

    type: Literal["run_started"] = "run_started"
    workflow: str = ""
    recovery: int = 0


class StepStarted(EventBase):
    """A step that is not in the journal yet is being executed."""

    type: Literal["step_started"] = "step_started"
    name: str = ""
    kind: str = ""
    agent: str | None = None


class StepFinished(EventBase):
    """A step is on disk."""

    type: Literal["step_finished"] = "step_finished"
    name: str = ""
    kind: str = ""
    status: str = "done"
    agent: str | None = None
    model: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float | None = None
    attempts: int = 1
    seconds: float = 0.0
    error: str | None = None


class ModelDelta(EventBase):
    """A piece of text of a model call in flight; ``attempt`` tells which attempt it belongs to."""

    type: Literal["model_delta"] = "model_delta"
    text: str = ""
    attempt: str = ""
    deployment: str = ""
    agent: str | None = None


class ModelReset(EventBase):
    """Everything shown of ``attempt`` is void: the attempt failed and was discarded."""

    type: Literal["model_reset"] = "model_reset"
    attempt: str = ""
    deployment: str = ""
    error: str = ""


class ToolCallStarted(EventBase):
    """A tool call begins; for a write its intent is on disk."""

    type: Literal["tool_call_started"] = "tool_call_started"
    name: str = ""
    call_id: str = ""
    arguments: dict[str, Any] = {}
    agent: str | None = None
    progress: str | None = None


class ToolCallFinished(EventBase):
    """A tool call's result is on disk. ``output`` is shortened."""

    type: Literal["tool_call_finished"] = "tool_call_finished"
    name: str = ""
    call_id: str = ""
    status: str = "done"
    output: str = ""
    agent: str | None = None
    seconds: float = 0.0


class HandedOff(EventBase):
    """One agent handed the conversation to another."""

    type: Literal["handed_off"] = "handed_off"
    source: str = ""
    target: str = ""


class ApprovalRequested(EventBase):
    """A call or a question waits for a person."""

    type: Literal["approval_requested"] = "approval_requested"
    name: str = ""
    call_id: str = ""
    question: str = ""
    arguments: dict[str, Any] = {}


class RunPaused(EventBase):
    """The run was parked; ``until`` is the time of the next look at it, if there is one."""

    type: Literal["run_paused"] = "run_paused"
    reason: str = ""
    until: datetime | None = None


class RunResumed(EventBase):
    """A parked run goes on."""

    type: Literal["run_resumed"] = "run_resumed"


class RunFinished(EventBase):
    """The run ended: ``done``, ``failed`` or ``cancelled``."""

    type: Literal["run_finished"] = "run_finished"
    status: str = "done"
    error: str | None = None


Event = Annotated[
    RunStarted
    | StepStarted
    | StepFinished
    | ModelDelta
    | ModelReset
    | ToolCallStarted
    | ToolCallFinished
    | HandedOff
    | ApprovalRequested
    | RunPaused
    | RunResumed
    | RunFinished,
    Field(discriminator="type"),
]

EVENT: TypeAdapter[Event] = TypeAdapter(Event)
"""Parses any event from JSON or a mapping by its ``type``."""
