"""ridethrough: a runtime for agents whose work must survive.

The names below are the public interface. Each is imported from its module at its first use, so that
``import ridethrough`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ridethrough.runtime.companions import register

if TYPE_CHECKING:
    from ridethrough.agents.agent import Agent as Agent
    from ridethrough.agents.agent import AgentResult as AgentResult
    from ridethrough.agents.agent import Limits as Limits
    from ridethrough.agents.agent import RunContext as RunContext
    from ridethrough.agents.guardrail import guardrail as guardrail
    from ridethrough.runtime.clock import FakeClock as FakeClock
    from ridethrough.runtime.clock import SystemClock as SystemClock
    from ridethrough.runtime.errors import *  # noqa: F403
    from ridethrough.runtime.events import ApprovalRequested as ApprovalRequested
    from ridethrough.runtime.events import Event as Event
    from ridethrough.runtime.events import HandedOff as HandedOff
    from ridethrough.runtime.events import ModelDelta as ModelDelta
    from ridethrough.runtime.events import ModelReset as ModelReset
    from ridethrough.runtime.events import RunFinished as RunFinished
    from ridethrough.runtime.events import RunPaused as RunPaused
    from ridethrough.runtime.events import RunResumed as RunResumed
    from ridethrough.runtime.events import RunStarted as RunStarted
    from ridethrough.runtime.events import StepFinished as StepFinished
    from ridethrough.runtime.events import StepStarted as StepStarted
    from ridethrough.runtime.events import ToolCallFinished as ToolCallFinished
    from ridethrough.runtime.events import ToolCallStarted as ToolCallStarted
    from ridethrough.runtime.router.messages import ModelRequest as ModelRequest
    from ridethrough.runtime.router.messages import ModelResponse as ModelResponse
    from ridethrough.runtime.router.router import Router as Router
    from ridethrough.runtime.runtime import Run as Run
    from ridethrough.runtime.runtime import Runtime as Runtime
    from ridethrough.runtime.workflow import ask as ask
    from ridethrough.runtime.workflow import fan_out as fan_out
    from ridethrough.runtime.workflow import gather as gather
    from ridethrough.runtime.workflow import now as now
    from ridethrough.runtime.workflow import random as random
    from ridethrough.runtime.workflow import sleep as sleep
    from ridethrough.runtime.workflow import step as step
    from ridethrough.runtime.workflow import uuid as uuid
    from ridethrough.runtime.workflow import wait_for as wait_for
    from ridethrough.runtime.workflow import workflow as workflow
    from ridethrough.sandboxes.profile import SandboxProfile as SandboxProfile
    from ridethrough.sandboxes.sandbox import ExecResult as ExecResult
    from ridethrough.sandboxes.sandbox import Output as Output
    from ridethrough.sandboxes.sandbox import Process as Process
    from ridethrough.sandboxes.sandbox import Sandbox as Sandbox
    from ridethrough.sandboxes.sandbox import Session as Session
    from ridethrough.sandboxes.sandbox import Snapshot as Snapshot
    from ridethrough.sandboxes.standalone import docker_sandbox as docker_sandbox
    from ridethrough.sandboxes.standalone import local_sandbox as local_sandbox
    from ridethrough.tools.catalogue import ToolSearch as ToolSearch
    from ridethrough.tools.context import ToolContext as ToolContext
    from ridethrough.tools.output import Image as Image
    from ridethrough.tools.tool import Tool as Tool
    from ridethrough.tools.tool import ToolCall as ToolCall
    from ridethrough.tools.tool import tool as tool

__version__ = "0.1.0"


def _open_sandboxes(worker: Any, lodgings: Any) -> Any:
    """Each worker that serves runs looks after sandboxes too; the engine itself knows nothing of them."""
    return import_module("ridethrough.tools.lodging").open_lodging(worker, lodgings)


register("sandboxes", _open_sandboxes)

_MODULES = {
    "agents.agent": ("Agent", "AgentResult", "Limits", "RunContext"),
    "agents.guardrail": ("guardrail",),
    "runtime.clock": ("FakeClock", "SystemClock"),
    "runtime.errors": (
        "Auth", "BudgetExceeded", "ConfigError", "ContentFilter", "ContextLength", "Diverged", "Error",
        "GuardrailTripped", "InvalidOutput", "InvalidRequest", "LimitExceeded", "ModelError", "NotFound",
        "NotStarted", "OutcomeUnknown", "Overloaded", "QuotaExhausted", "RateLimited", "RunBusy", "RunCancelled",
        "RunConflict", "RunFailed", "RunPoisoned", "SandboxError", "SandboxFileNotFound", "SandboxGone",
        "SandboxTimeout", "SandboxUnavailable", "SerializationError", "ServerError", "Slow", "StepFailed",
        "StoreError", "StoreVersionError", "StreamBroken", "ToolFailed", "ToolInterrupted", "Transport",
        "Unavailable", "UsageError",
    ),
    "runtime.events": (
        "ApprovalRequested", "Event", "HandedOff", "ModelDelta", "ModelReset", "RunFinished", "RunPaused", "RunResumed",
        "RunStarted", "StepFinished", "StepStarted", "ToolCallFinished", "ToolCallStarted",
    ),
    "runtime.router.messages": ("ModelRequest", "ModelResponse"),
    "runtime.router.router": ("Router",),
    "runtime.runtime": ("Run", "Runtime"),
    "runtime.workflow": ("ask", "fan_out", "gather", "now", "random", "sleep", "step", "uuid", "wait_for", "workflow"),
    "sandboxes.profile": ("SandboxProfile",),
    "sandboxes.sandbox": ("ExecResult", "Output", "Process", "Sandbox", "Session", "Snapshot"),
    "sandboxes.standalone": ("docker_sandbox", "local_sandbox"),
    "tools.catalogue": ("ToolSearch",),
    "tools.context": ("ToolContext",),
    "tools.output": ("Image",),
    "tools.tool": ("Tool", "ToolCall", "tool"),
}  # fmt: skip

_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'ridethrough' has no attribute {name!r}")
    value = getattr(import_module(f"ridethrough.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return __all__
