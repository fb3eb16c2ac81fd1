"""The ``@tool`` decorator: a typed function and everything the engine must know before it dares to call it.

A definition is checked completely when it is made, because the alternative is an error hours into a run. The strict
rules follow from one promise: a write starts at most once. So a write cannot be retried by itself, and only a write
has anything to say about being interrupted.

Nothing in here runs a tool; the decorated object is still the function that was written.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import re
import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Literal, ParamSpec, TypeAlias, TypeVar, cast, get_args, overload

from ridethrough.runtime.errors import ConfigError, UsageError
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.tools.body import Body
from ridethrough.tools.schema import ParameterSchema

P = ParamSpec("P")
R = TypeVar("R")

Effect = Literal["read", "idempotent", "write"]
SandboxScope = Literal["run", "call"]

DEFAULT_TIMEOUT: Final = 60.0
DEFAULT_MAX_OUTPUT: Final = 20_000


@dataclass(frozen=True)
class ToolCall:
    """One call that a model asked for, as ``approval`` and ``on_interrupt`` functions see it.

    Attributes:
        name: The tool's name.
        arguments: The arguments as JSON data.
        call_id: Unique in the run and the same at every attempt.
        run_id: The run that the call belongs to.
        agent: The agent that asked, ``None`` for a call from a workflow's own code.
    """

    name: str
    arguments: dict[str, Any]
    call_id: str
    run_id: str
    agent: str | None = None


Approval: TypeAlias = bool | Callable[[ToolCall], bool | Awaitable[bool]]
OnInterrupt: TypeAlias = Literal["tell", "ask"] | Callable[[ToolCall], Coroutine[Any, Any, Any]]


@dataclass(frozen=True, eq=False, repr=False)
class Tool(Generic[P, R]):
    """A function that a model may call. Calling the tool itself calls the function, nothing more.

    Attributes:
        function: The function as it was written, sync or async.
        name: What the model calls it.
        description: What the model is told about it.
        parameters: The schema of its parameters, which also parses arguments.
        effect: What a repeat would do: ``read`` and ``idempotent`` no harm, ``write`` harm.
        timeout: Deadline of one attempt in seconds.
        retries: Further attempts after a failure; always 0 for a write.
        approval: Whether a person decides first, or a function of the call that tells.
        on_interrupt: For a write of unknown outcome: ``tell`` the model, ``ask`` a person, or a function to find out.
        max_output: Characters of the output that the model is shown.
        concurrency: Calls at the same time in one process, ``None`` for no limit of its own.
        sequential: Whether calls of one turn run one after the other.
        is_async: Whether the function is awaited instead of run in a worker thread.
        sandbox: Profile of the sandbox that the body runs in; ``None``: it runs in this process.
        sandbox_scope: Whether such calls share the run's sandbox of that profile or get one of their own each.
        confined: Whether everything that the function does happens in the sandbox, through ``ctx.sandbox``.
        body: The text of a function that runs in a sandbox.
    """

    function: Callable[P, R]
    name: str
    description: str
    parameters: ParameterSchema
    effect: Effect = "write"
    timeout: float = DEFAULT_TIMEOUT
    retries: int = 0
    approval: Approval = False
    on_interrupt: OnInterrupt = "tell"
    max_output: int = DEFAULT_MAX_OUTPUT
    concurrency: int | None = None
    sequential: bool = False
    is_async: bool = field(default=False)
    sandbox: str | SandboxProfile | None = None
    sandbox_scope: SandboxScope = "run"
    confined: bool = False
    body: Body | None = None

    def __post_init__(self) -> None:
        _check(self)
        self._look_like_the_function()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function; in a workflow's own code the call is recorded like a model's call.

        Raises:
            UsageError: in a workflow, if the function is not async: nothing could record the call.
        """
        branch = _branch_of_caller()
        if branch is None and self.sandbox is not None:
            raise UsageError(
                f"the body of tool {self.name} runs in a sandbox, and this call is not part of a run. To run it "
                f"here, in a test, call {self.name}.function(...)"
            )
        if branch is None:
            return self.function(*args, **kwargs)
        if not self.is_async:
            raise UsageError(
                f"tool {self.name} is no async function, so a call in a workflow could not be recorded. Write `async "
                f"def`, or give it to an agent, or run it as a step: await step({self.name}.function, ...)"
            )
        from ridethrough.tools.call import call_from_workflow

        return cast(R, call_from_workflow(branch, cast(Any, self), args, kwargs))

    def __repr__(self) -> str:
        return f"Tool({self.name!r}, effect={self.effect!r})"

    def _look_like_the_function(self) -> None:
        """Do what ``functools.update_wrapper`` does, on a frozen object."""
        for name in functools.WRAPPER_ASSIGNMENTS:
            if hasattr(self.function, name):
                object.__setattr__(self, name, getattr(self.function, name))
        object.__setattr__(self, "__wrapped__", self.function)

    @functools.cached_property
    def digest(self) -> str:
        """Hash of what the model sees (name, description, schema): the same in every process."""
        seen = [self.name, self.description, self.parameters.json]
        return hashlib.sha256(json.dumps(seen, sort_keys=True, default=str).encode()).hexdigest()[:32]


@overload
def tool(name: Callable[P, R], /) -> Tool[P, R]: ...
@overload
def tool(
    name: str | None = None,
    description: str | None = None,
    *,
    effect: Effect = "write",
    timeout: float = DEFAULT_TIMEOUT,
    retries: int = 0,
    approval: Approval = False,
    sandbox: str | SandboxProfile | None = None,
    sandbox_scope: SandboxScope = "run",
    confined: bool = False,
    on_interrupt: OnInterrupt = "tell",
    max_output: int = DEFAULT_MAX_OUTPUT,
    concurrency: int | None = None,
    sequential: bool = False,
) -> Callable[[Callable[P, R]], Tool[P, R]]: ...
def tool(
    name: Callable[P, R] | str | None = None,
    description: str | None = None,
    *,
    effect: Effect = "write",
    timeout: float = DEFAULT_TIMEOUT,
    retries: int = 0,
    approval: Approval = False,
    sandbox: str | SandboxProfile | None = None,
    sandbox_scope: SandboxScope = "run",
    confined: bool = False,
    on_interrupt: OnInterrupt = "tell",
    max_output: int = DEFAULT_MAX_OUTPUT,
    concurrency: int | None = None,
    sequential: bool = False,
) -> Tool[P, R] | Callable[[Callable[P, R]], Tool[P, R]]:
    """Turn a typed function, sync or async, into a tool; use it as ``@tool`` or ``@tool(...)``.

    Args:
        name: What the model calls it (1 to 64 letters, digits, ``_`` and ``-``); the function's name when left out.
        description: What the model is told; the docstring's text when left out.
        effect: What a repeat would do: ``read`` nothing, ``idempotent`` nothing if given the same key, ``write`` harm.
        timeout: Deadline of one attempt in seconds.
        retries: Further attempts after a failure, for ``read`` and ``idempotent`` only.
        approval: ``True``, or a function of the call that returns whether a person has to decide first.
        sandbox: A profile's name, or a ``SandboxProfile``: the body runs there, never in this process. It has to be
            complete in itself: it imports what it uses, and refers to nothing around it.
        sandbox_scope: ``run``: such calls share the run's sandbox of that profile; ``call``: each has one of its own.
        confined: Whether everything that the function does happens in the sandbox, through ``ctx.sandbox``. After a
            crash such a call is run again, and finds there what its first life had started: nothing happens twice.
        on_interrupt: What happens to a write whose outcome is unknown after a crash: ``tell`` the model, ``ask`` a
            person, or an async function of the call that returns the output, or raises ``NotStarted`` or
            ``OutcomeUnknown``.
        max_output: Characters of the output that the model is shown; the whole is kept as an artifact.
        concurrency: Calls at the same time in one process, ``None`` for no limit of its own.
        sequential: Whether calls of one turn run one after the other.

    Raises:
        ConfigError: The definition cannot be used; the message says what to change.
    """

    def decorate(function: Callable[P, R]) -> Tool[P, R]:
        chosen = name if isinstance(name, str) else cast(str, getattr(function, "__name__", type(function).__name__))
        _check_function(chosen, function)
        _check_sandbox(chosen, sandbox)
        parameters = ParameterSchema.of(function)
        return Tool(
            function=function,
            name=chosen,
            description=parameters.description if description is None else description,
            parameters=parameters,
            effect=effect,
            timeout=timeout,
            retries=retries,
            approval=approval,
            on_interrupt=on_interrupt,
            max_output=max_output,
            concurrency=concurrency,
            sequential=sequential,
            is_async=_is_async(function),
            sandbox=sandbox,
            sandbox_scope=sandbox_scope,
            confined=confined,
            body=None if sandbox is None else Body.of(chosen, function),
        )

    return decorate(name) if callable(name) else decorate


def _branch_of_caller() -> Any:
    """The branch of the workflow that calls; ``None`` outside. Without the engine loaded nobody is in a workflow."""
    execution = sys.modules.get("ridethrough.runtime.execution")
    if execution is None or type(execution.position()) is not execution.Branch:
        return None
    return execution.current_branch("a tool")


# --- checks ---------------------------------------------------------------------------------------------------------

_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def _check_function(name: str, function: object) -> None:
    """Refuse what cannot be called, and what yields instead of returning."""
    if not callable(function) or isinstance(function, (type, Tool)):
        raise ConfigError(f"tool {name!r}: {function!r} is not a function; decorate a function or a bound method")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(f"tool {name!r} yields; return the whole output, and report progress with ctx.progress(text)")


def _check_sandbox(name: str, sandbox: object) -> None:
    if sandbox is not None and (not sandbox or not isinstance(sandbox, str | SandboxProfile)):
        raise ConfigError(f"tool {name!r}: sandbox is a profile's name or a SandboxProfile; got {sandbox!r}")


def _check_confined(tool: Tool[..., Any]) -> None:
    if tool.sandbox_scope not in get_args(SandboxScope):
        raise _refusal(tool, f"sandbox_scope must be 'run' or 'call'; got {tool.sandbox_scope!r}")
    if tool.sandbox_scope == "call" and tool.sandbox is None and not tool.confined:
        raise _refusal(tool, "sandbox_scope has no effect without sandbox= or confined=True; leave it out")
    if tool.sandbox is not None and tool.confined:
        raise _refusal(tool, "a body that runs in a sandbox is confined anyway; leave out confined=True")
    if tool.confined and tool.parameters.context is None:
        raise _refusal(tool, "confined=True says that all happens through ctx.sandbox, so it needs a parameter ctx")


def _check(tool: Tool[..., Any]) -> None:
    _check_name(tool)
    _check_effect(tool)
    _check_numbers(tool)
    _check_approval(tool)
    _check_on_interrupt(tool)
    _check_confined(tool)


def _refusal(tool: Tool[..., Any], text: str) -> ConfigError:
    return ConfigError(f"tool {tool.name!r}: {text}")


def _check_name(tool: Tool[..., Any]) -> None:
    if not _NAME.fullmatch(tool.name):
        raise _refusal(tool, 'a name has 1 to 64 letters, digits, "_" and "-"; pass one, @tool(name="...")')


def _check_effect(tool: Tool[..., Any]) -> None:
    effects = get_args(Effect)
    if tool.effect not in effects:
        raise _refusal(tool, f"effect must be one of {', '.join(map(repr, effects))}; got {tool.effect!r}")


def _check_numbers(tool: Tool[..., Any]) -> None:
    _check_timeout(tool, tool.timeout)
    if not _is_whole(tool.retries, 0):
        raise _refusal(tool, f"retries must be a whole number from 0; got {tool.retries!r}")
    if tool.retries and tool.effect == "write":
        raise _refusal(
            tool, "a write starts at most once, so it has no retries; declare effect='idempotent' if a repeat is safe"
        )
    if not _is_whole(tool.max_output, 1):
        raise _refusal(tool, f"max_output must be a whole number of characters from 1; got {tool.max_output!r}")
    if tool.concurrency is not None and not _is_whole(tool.concurrency, 1):
        raise _refusal(tool, f"concurrency must be a whole number from 1, or None; got {tool.concurrency!r}")


def _check_timeout(tool: Tool[..., Any], timeout: object) -> None:
    if timeout is None:
        raise _refusal(tool, "every wait has a deadline; give timeout in seconds, as long as the work may really take")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
        raise _refusal(tool, f"timeout must be a number of seconds greater than 0; got {timeout!r}")


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_approval(tool: Tool[..., Any]) -> None:
    if not isinstance(tool.approval, bool) and not callable(tool.approval):
        raise _refusal(tool, f"approval must be True, False or a function of the ToolCall; got {tool.approval!r}")


def _check_on_interrupt(tool: Tool[..., Any]) -> None:
    chosen = tool.on_interrupt
    if chosen not in ("tell", "ask") and not _is_async(chosen):
        raise _refusal(
            tool, f"on_interrupt must be 'tell', 'ask' or an async function of the ToolCall (async def); got {chosen!r}"
        )
    if chosen != "tell" and tool.effect != "write":
        raise _refusal(
            tool, f"on_interrupt is for writes; a {tool.effect!r} tool is simply run again, so leave on_interrupt out"
        )


def _is_async(function: object) -> bool:
    """Tell whether calling ``function`` gives something to await: also for partials and callable objects."""
    found = function
    while isinstance(found, functools.partial):
        found = found.func
    return inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(getattr(found, "__call__", None))  # noqa: B004
