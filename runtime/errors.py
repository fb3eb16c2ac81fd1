"""Every error that ridethrough raises: one class for each decision that a caller can take.

A class's docstring is the sentence that explains it. The message says what happened, to what, and what to do next;
ids are fields, so that programs need not parse it. Where Python has a fitting built-in, the class inherits it too.

Control flow (parking, cancelling, losing a lease) is not in here: it never reaches user code as an error.
"""

from __future__ import annotations

from typing import Any


class Error(Exception):
    """Something in ridethrough went wrong."""

    def __init__(self, message: str | None = None) -> None:
        """Take ``message``, or the first line of the class's docstring when there is none."""
        super().__init__(message or (type(self).__doc__ or "").strip().split("\n")[0])

    @property
    def message(self) -> str:
        """The text without the class name."""
        return str(self.args[0]) if self.args else ""


# --- definitions, configuration, wrong use -------------------------------------------------------------------------


class ConfigError(Error, ValueError):
    """The configuration cannot be used."""


class UsageError(Error, RuntimeError):
    """A part of ridethrough was used in a way that cannot be made durable."""


class NotFound(Error, LookupError):
    """There is no such run, step, call or workflow."""


class RunConflict(Error, ValueError):
    """A run with this id exists already, for other work."""


class RunBusy(Error, RuntimeError):
    """Another process holds this run."""

    def __init__(self, message: str, run_id: str = "", owner: str = "") -> None:
        """``owner`` names the process that holds the run (worker id, host and pid)."""
        super().__init__(message)
        self.run_id = run_id
        self.owner = owner


# --- the store ------------------------------------------------------------------------------------------------------


class StoreError(Error, OSError):
    """The database could not be read or written; nothing that was finished is lost."""


class StoreVersionError(StoreError):
    """The database has a schema that this version of ridethrough cannot use."""


# --- runs -----------------------------------------------------------------------------------------------------------


class RunFailed(Error, RuntimeError):
    """The run ended with an error."""

    def __init__(self, message: str, run_id: str = "", error_type: str = "") -> None:
        """``error_type`` is the class name of the error that ended the run."""
        super().__init__(message)
        self.run_id = run_id
        self.error_type = error_type


class RunCancelled(Error, RuntimeError):
    """The run was cancelled."""


class RunPoisoned(RunFailed):
    """The run's worker died too often without one new step."""


class StepFailed(Error, RuntimeError):
    """A step failed with an error whose class cannot be rebuilt from the journal."""

    def __init__(self, message: str, error_type: str = "") -> None:
        """``error_type`` is the qualified name of the original class."""
        super().__init__(message)
        self.error_type = error_type


class Diverged(Error, RuntimeError):
    """The workflow's code asks for something else than the journal recorded."""

    def __init__(self, message: str, path: str = "", recorded: str = "", asked: str = "") -> None:
        """``path`` names the step; ``recorded`` and ``asked`` are the two inputs, shortened."""
        super().__init__(message)
        self.path = path
        self.recorded = recorded
        self.asked = asked


class SerializationError(Error, TypeError):
    """A value cannot be stored as JSON and read back."""


class LimitExceeded(Error, RuntimeError):
    """An agent reached one of its limits."""

    def __init__(self, message: str, limit: str = "", value: float = 0) -> None:
        """``limit`` is the name in ``Limits``; ``value`` is what was allowed."""
        super().__init__(message)
        self.limit = limit
        self.value = value


class BudgetExceeded(Error, RuntimeError):
    """A budget is used up."""

    def __init__(self, message: str, budget: str = "", usd: float = 0.0, resets_at: float | None = None) -> None:
        """``budget`` names it, ``usd`` is its cap, ``resets_at`` (seconds since the epoch) when it starts anew."""
        super().__init__(message)
        self.budget = budget
        self.usd = usd
        self.resets_at = resets_at


class GuardrailTripped(Error, RuntimeError):
    """A guardrail refused an agent's input or output."""

    def __init__(self, message: str, guardrail: str = "", agent: str = "") -> None:
        """``guardrail`` is the function's name."""
        super().__init__(message)
        self.guardrail = guardrail
        self.agent = agent


class InvalidOutput(Error, ValueError):
    """The model did not give the structured output that was asked for, after all repairs."""


# --- tools ----------------------------------------------------------------------------------------------------------


class ToolFailed(Error, RuntimeError):
    """A tool did not do its work; the model is told and may try something else."""


class ToolInterrupted(Error, RuntimeError):
    """A tool with side effects was interrupted and nobody knows whether it took effect."""


class NotStarted(Error, RuntimeError):
    """Raised by an ``on_interrupt`` function: the call never took effect, so it is safe to run it."""


class OutcomeUnknown(Error, RuntimeError):
    """Raised by an ``on_interrupt`` function that cannot find out: a person has to decide."""


# --- model calls: one class for each row of the error taxonomy ------------------------------------------------------


class ModelError(Error, RuntimeError):
    """A model call failed."""

    def __init__(
        self,
        message: str,
        *,
        deployment: str = "",
        status: int | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
        retryable: bool = True,
    ) -> None:
        """``retry_after`` is in seconds and a floor, never a promise; ``code`` is the provider's own.

        ``retryable`` is false where the provider asks not to be sent the same request again, whatever the class.
        """
        super().__init__(message)
        self.deployment = deployment
        self.status = status
        self.code = code
        self.retry_after = retry_after
        self.request_id = request_id
        self.retryable = retryable


class RateLimited(ModelError):
    """The provider limits the rate; another quota scope may answer."""


class QuotaExhausted(ModelError):
    """The account is out of credit or over its spending limit; a person has to act."""


class Overloaded(ModelError):
    """The provider says that it is overloaded."""


class ServerError(ModelError):
    """The provider failed (5xx, or a body that is not what it should be)."""


class Transport(ModelError, ConnectionError):
    """The connection failed before an answer was there."""

    def __init__(self, message: str, *, phase: str = "read", **fields: Any) -> None:
        """``phase`` is ``pool``, ``connect``, ``write`` or ``read``; from ``write`` on the call may be billed."""
        super().__init__(message, **fields)
        self.phase = phase


class Slow(ModelError, TimeoutError):
    """The provider did not answer within the deadline."""

    def __init__(self, message: str, *, phase: str = "total", **fields: Any) -> None:
        """``phase`` is ``first_token``, ``idle`` or ``total``."""
        super().__init__(message, **fields)
        self.phase = phase


class StreamBroken(ModelError):
    """A stream was cut, stalled, carried a malformed chunk or ended without its terminal event."""


class ContextLength(ModelError):
    """The conversation is longer than the model's context window."""


class ContentFilter(ModelError):
    """The provider's content filter refused the request or the answer."""


class InvalidRequest(ModelError, ValueError):
    """The provider says that the request is wrong; it would fail everywhere."""


class Auth(ModelError, PermissionError):
    """The provider refuses the credential."""

    awaits: str = ""
    """The condition under which the key is tried again, as ``Unavailable.awaits``; empty where nobody waits."""


class Unavailable(ModelError):
    """No deployment of the route answers now."""

    errors: tuple[ModelError, ...] = ()

    def __init__(
        self,
        message: str,
        *,
        errors: tuple[ModelError, ...] = (),
        retry_after: float | None = None,
        reason: str = "outage",
        awaits: str = "",
        **fields: Any,
    ) -> None:
        """``errors`` are the attempts' errors in order; another try is worth it in ``retry_after`` seconds.

        ``reason`` is ``brownout``, ``outage``, ``quota``, ``budget`` or ``overload`` (too many calls are waiting
        already). ``awaits`` is the wake-up condition, as ``Router.room`` takes it: whoever holds the work can ask
        whether it is time, instead of trying.
        """
        super().__init__(message, retry_after=retry_after, **fields)
        self.errors = errors
        self.reason = reason
        self.awaits = awaits


# --- sandboxes ------------------------------------------------------------------------------------------------------


class SandboxError(Error, RuntimeError):
    """A sandbox cannot do what it was asked."""


class SandboxFileNotFound(SandboxError, FileNotFoundError):
    """There is no such file or folder in the sandbox."""


class SandboxTimeout(SandboxError, TimeoutError):
    """A call in a sandbox ran past its deadline; everything that it had started was ended.

    Attributes:
        result: What it had written until then (an ``ExecResult``), ``None`` where nothing is known.
    """

    def __init__(self, message: str = "", result: Any = None) -> None:
        """``result`` is the part of the output that there was."""
        super().__init__(message)
        self.result = result


class SandboxGone(SandboxError):
    """The sandbox does not exist any more."""


class SandboxUnavailable(SandboxError):
    """No sandbox can be started."""
