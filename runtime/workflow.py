"""What user code calls inside a run: ``workflow``, ``step``, ``gather``, ``sleep``, ``wait_for`` and the rest."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import random as _random
import re
import uuid as _uuid
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from functools import update_wrapper
from types import CodeType
from typing import Any, Generic, Literal, ParamSpec, TypeVar, cast, overload

import anyio

from ridethrough.runtime.errors import ConfigError, SerializationError, UsageError
from ridethrough.runtime.execution import Branch, Execution, Inside, Launcher, Outcome, current_branch, position
from ridethrough.runtime.payload import Codec, describe_input, resolved_hints, result_codec
from ridethrough.runtime.source import source_of
from ridethrough.runtime.threads import run_in_thread
from ridethrough.runtime.waiting import Question, await_child, receive, sleep_until

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


def checked_name(name: str, what: str) -> str:
    """A name that can stand in a path.

    Raises:
        ConfigError: it has characters that paths use for themselves.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{what} {name!r}: names have letters, digits, '_', '.', ':' and '-' only. Give another name=."
        )
    return name


# --- workflows ------------------------------------------------------------------------------------------------------


open_runtime: ContextVar[Launcher | None] = ContextVar("ridethrough_runtime", default=None)


def the_open_runtime(what: str) -> Launcher:
    """The runtime that is open here.

    Raises:
        UsageError: none is.
    """
    runtime = open_runtime.get()
    if runtime is None:
        raise UsageError(f"{what} needs an open runtime: async with Runtime.open('sqlite:///runs.db') as runtime: ...")
    return runtime


REGISTRY: dict[str, Workflow[..., Any]] = {}
"""The workflows of this process by name; a worker takes up runs of these without being told where they come from."""


class Workflow(Generic[P, R]):
    """A durable workflow. Call it inside a workflow to run it as a child, outside to run it to its end."""

    def __init__(
        self,
        function: Callable[P, Awaitable[R]],
        *,
        version: str = "1",
        name: str | None = None,
        source: str | None = None,
        parameters: Mapping[str, inspect.Parameter] | None = None,
        result: Callable[[], Codec] | None = None,
    ) -> None:
        """Wrap ``function``; it is registered under ``name`` (default: the function's).

        Raises:
            ConfigError: it is not async, or takes ``*args`` or ``**kwargs``.
        """
        self.function = function
        self.name = checked_name(name or str(getattr(function, "__name__", "workflow")), "workflow")
        self.version = version
        self.source = source or source_of(function, getattr(function, "__name__", self.name))
        if not inspect.iscoroutinefunction(function):
            raise ConfigError(f"workflow {self.name}: the function must be async. Write `async def {self.name}(...)`.")
        self.signature = inspect.signature(function)
        self._parameters = dict(parameters or self.signature.parameters)
        self._codecs: dict[str, Codec] | None = None
        self._result = result
        self._made_result_codec: Codec | None = None
        self._check_parameters()
        update_wrapper(self, function)
        REGISTRY[self.name] = self

    @property
    def __workflow__(self) -> Workflow[P, R]:
        """What ``Runtime.start`` and the command line look for."""
        return self

    def _check_parameters(self) -> None:
        for parameter in self._parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise ConfigError(
                    f"workflow {self.name}: *{parameter.name} has no stable form in the database. Name the parameters."
                )

    @property
    def codecs(self) -> dict[str, Codec]:
        """One codec a parameter; made at the first use, when all names in annotations are defined."""
        if self._codecs is None:
            hints = resolved_hints(self.function)
            self._codecs = {
                name: Codec(hints.get(name, Any), f"workflow {self.name}: argument {name!r}")
                for name in self._parameters
            }
        return self._codecs

    @property
    def result_codec(self) -> Codec:
        """The codec of the result; made at the first use."""
        if self._made_result_codec is None:
            make = self._result or (lambda: result_codec(self.function, f"workflow {self.name}"))
            self._made_result_codec = make()
        return self._made_result_codec

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """The input of a run as JSON text, an object by parameter name.

        Raises:
            UsageError: the arguments do not fit the signature.
            SerializationError: an argument cannot be stored.
        """
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(f"workflow {self.name}{self.signature}: {error}.") from error
        codecs = self.codecs
        parts = (f"{json.dumps(name)}:{codecs[name].settle(value)[0]}" for name, value in bound.arguments.items())
        return "{" + ",".join(parts) + "}"

    def accept(self, data: Any) -> dict[str, Any]:
        """Keyword arguments from plain data: an object by name, or anything else for the single parameter.

        Raises:
            SerializationError: it does not fit; the message names the parameter.
        """
        if not isinstance(data, dict):
            needed = [name for name, item in self._parameters.items() if item.default is item.empty]
            if len(needed) > 1 or not self.codecs:
                names = ", ".join(self.codecs) or "none"
                raise SerializationError(f"workflow {self.name}: give its input as an object. Its parameters: {names}.")
            data = {next(iter(needed or self.codecs)): data}
        for name in data:
            if name not in self.codecs:
                names = ", ".join(self.codecs) or "none"
                raise SerializationError(f"workflow {self.name} has no parameter {name!r}. Its parameters: {names}.")
        arguments = {name: self.codecs[name].accept(value) for name, value in data.items()}
        try:
            self.signature.bind(**arguments)
        except TypeError as error:
            raise SerializationError(f"workflow {self.name}{self.signature}: {error}.") from error
        return arguments

    def load_input(self, text: str) -> dict[str, Any]:
        """The keyword arguments that ``bind`` stored."""
        codecs = self.codecs
        found: dict[str, Any] = {}
        for name, value in json.loads(text).items():
            if name not in codecs:
                raise SerializationError(f"workflow {self.name} has no parameter {name!r} any more; the run has one.")
            kind = type(value)
            found[name] = value if codecs[name].is_exactly(kind) else codecs[name].load(json.dumps(value))
        return found

    def code_names(self) -> frozenset[str]:
        """Every name that the function's code mentions."""
        return frozenset(_names(self.function.__code__)) if hasattr(self.function, "__code__") else frozenset()

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it: as a child of the workflow that calls, or as a run of its own on the open runtime."""
        place = position()
        text = self.bind(args, kwargs)
        if place is None:
            return cast(R, await the_open_runtime(f"workflow {self.name}").run_to_end(self, json.loads(text)))
        branch = current_branch(f"workflow {self.name}")
        path = branch.next(self.name)
        starter = branch.execution.services.launcher.child_starter(self, text, branch)
        return cast(R, await await_child(branch, path, self.name, starter, text, self.result_codec))


def _names(code: CodeType) -> Iterable[str]:
    yield from code.co_names
    yield from code.co_varnames
    yield from code.co_freevars
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str):
            yield constant


@overload
def workflow(function: Callable[P, Awaitable[R]], /) -> Workflow[P, R]: ...
@overload
def workflow(
    *, version: str = "1", name: str | None = None
) -> Callable[[Callable[P, Awaitable[R]]], Workflow[P, R]]: ...
def workflow(function: Any = None, /, *, version: str = "1", name: str | None = None) -> Any:
    """Turn an async function into a durable workflow.

    Args:
        function: The function, when used without parentheses.
        version: Say a new one when stored runs must not go on with this code by themselves.
        name: The name under which runs are stored; the function's when left out.

    Raises:
        ConfigError: the function is not async or its parameters cannot be stored.
    """
    if function is not None:
        return Workflow(function, version=version, name=name)
    return lambda inner: Workflow(inner, version=version, name=name)


# --- steps ----------------------------------------------------------------------------------------------------------


class Step(Generic[P, R]):
    """A function whose calls are recorded. Inside a step, or outside a workflow, a call is a plain call."""

    def __init__(self, function: Callable[P, Any], *, name: str | None, retries: int, timeout: float | None) -> None:
        """Wrap ``function``; ``timeout`` is in seconds and for each attempt."""
        plain = getattr(function, "__name__", type(function).__name__).strip("<>")
        self.function = function
        self.name = checked_name(name or plain, "step")
        self.retries = retries
        self.timeout = timeout
        self._async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - looks for an async __call__
        )
        self._codec: Codec | None = None
        if retries < 0:
            raise ConfigError(f"step {self.name}: retries={retries} must not be negative.")
        update_wrapper(self, function, updated=())

    def __await__(self) -> Generator[Any, Any, R]:
        """``await step(function)``: a call without arguments."""
        call: Any = self  # P is empty here, which the types cannot say
        return cast("Generator[Any, Any, R]", call().__await__())

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Perform the step."""
        place = position()
        if place is None or type(place) is Inside:
            return cast(R, await self._once(args, kwargs))
        branch = current_branch(f"step {self.name}")
        if self._codec is None:
            self._codec = result_codec(self.function, f"step {self.name}")
        asked = describe_input(args, kwargs)

        async def call(_path: str, outcome: Outcome) -> Any:
            return await self._attempts(branch.execution, outcome, args, kwargs)

        return cast(R, await branch.execution.perform(branch, self.name, "function", asked, self._codec, call))

    async def _attempts(self, execution: Execution, outcome: Outcome, args: Any, kwargs: Any) -> Any:
        while True:
            try:
                return await self._once(args, kwargs)
            except Exception:
                if outcome.attempts > self.retries:
                    raise
            clock = execution.services.clock
            await clock.wait(anyio.Event(), clock.now() + backoff(outcome.attempts))
            outcome.attempts += 1

    async def _once(self, args: Any, kwargs: Any) -> Any:
        if self.timeout is None:
            return await self._call(args, kwargs)
        with anyio.move_on_after(self.timeout):
            return await self._call(args, kwargs)
        raise TimeoutError(f"Step {self.name} took longer than its timeout of {self.timeout:g} s.")

    async def _call(self, args: Any, kwargs: Any) -> Any:
        function: Callable[..., Any] = self.function
        if self._async:
            return await function(*args, **kwargs)
        return await run_in_thread(lambda: function(*args, **kwargs))


def backoff(attempt: int, base: float = 0.2, longest: float = 30.0) -> float:
    """Seconds before the next attempt: doubling, with jitter so that parallel branches do not retry in step."""
    return min(longest, base * 2.0 ** (attempt - 1)) * _random.uniform(0.5, 1.0)


@overload
def step(function: Callable[P, Awaitable[R]], /) -> Step[P, R]: ...
@overload
def step(function: Callable[P, R], /) -> Step[P, R]: ...
@overload
def step(
    function: Callable[..., Awaitable[R]],
    /,
    *args: Any,
    name: str | None = None,
    retries: int = 0,
    timeout: float | None = None,
    **kwargs: Any,
) -> Awaitable[R]: ...
@overload
def step(
    function: Callable[..., R],
    /,
    *args: Any,
    name: str | None = None,
    retries: int = 0,
    timeout: float | None = None,
    **kwargs: Any,
) -> Awaitable[R]: ...
@overload
def step(*, name: str | None = None, retries: int = 0, timeout: float | None = None) -> StepDecorator: ...
def step(
    function: Any = None,
    /,
    *args: Any,
    name: str | None = None,
    retries: int = 0,
    timeout: float | None = None,
    **kwargs: Any,
) -> Any:
    """Run a function once and record its result: ``@step()``, ``@step(retries=2)`` or ``await step(function, *args)``.

    On resume the recorded result is returned and the function is not called. A step that was running when the process
    died is run again; for side effects that must not happen twice use a tool with ``effect="write"``.

    Args:
        function: The function to call at once, async or sync (then in a worker thread).
        args: Its arguments.
        name: The step's name in the journal.
        retries: How many more attempts after a failure, with growing pauses.
        timeout: Seconds for each attempt.
        kwargs: Keyword arguments of the function.
    """
    if function is None:
        return StepDecorator(name, retries, timeout)
    made: Step[..., Any] = Step(function, name=name, retries=retries, timeout=timeout)
    return made(*args, **kwargs) if args or kwargs else made


class StepDecorator:
    """What ``@step(...)`` puts on a function."""

    def __init__(self, name: str | None, retries: int, timeout: float | None) -> None:
        """Keep the options."""
        self._options: dict[str, Any] = {"name": name, "retries": retries, "timeout": timeout}

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]]) -> Step[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R]) -> Step[P, R]: ...
    def __call__(self, function: Any) -> Any:
        """Wrap the function."""
        return Step(function, **self._options)


# --- concurrency ----------------------------------------------------------------------------------------------------


@overload
async def gather(
    *awaitables: Awaitable[T], limit: int | None = None, on_error: Literal["raise"] = "raise"
) -> list[T]: ...
@overload
async def gather(
    *awaitables: Awaitable[T], limit: int | None = None, on_error: Literal["collect"]
) -> list[T | Exception]: ...
async def gather(
    *awaitables: Awaitable[Any], limit: int | None = None, on_error: Literal["raise", "collect"] = "raise"
) -> list[Any]:
    """Run branches concurrently, each with a stable identity in the journal.

    Args:
        awaitables: Coroutines of steps, agents, workflows; not started yet.
        limit: How many may run at a time.
        on_error: ``raise``: the first failure cancels the siblings and is raised as it is. ``collect``: every branch
            ends, failures are returned in their places.

    Raises:
        UsageError: called outside a workflow, or with something that runs already (a task).
    """
    try:
        branch = current_branch("gather")
        _check_group(awaitables, limit)
        group = branch.next_group()
        jobs = [(f"{group}[{index}]/", _awaiting(item)) for index, item in enumerate(awaitables)]
        return await branch.execution.concurrently(branch, group, jobs, limit=limit, on_error=on_error)
    finally:
        for item in awaitables:
            if inspect.iscoroutine(item):
                item.close()  # those that were never started; closing an ended one does nothing


def _check_group(awaitables: Iterable[Any], limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UsageError(f"gather: limit={limit} lets nothing run. Leave it out, or give at least 1.")
    for item in awaitables:
        if isinstance(item, asyncio.Future):
            raise UsageError("gather: a task that already runs has no stable place in the journal. Pass the coroutine.")
        if not inspect.isawaitable(item):
            raise UsageError(
                f"gather: {type(item).__name__} is not awaitable. Call the step: gather(fetch(1), fetch(2))."
            )


def _awaiting(item: Awaitable[Any]) -> Callable[[], Awaitable[Any]]:
    async def job() -> Any:
        return await item

    return job


@overload
async def fan_out(
    function: Callable[[T], Awaitable[R]],
    items: Iterable[T],
    limit: int | None = None,
    on_error: Literal["raise"] = "raise",
) -> list[R]: ...
@overload
async def fan_out(
    function: Callable[[T], Awaitable[R]], items: Iterable[T], limit: int | None = None, *, on_error: Literal["collect"]
) -> list[R | Exception]: ...
async def fan_out(
    function: Callable[[T], Awaitable[Any]],
    items: Iterable[T],
    limit: int | None = None,
    on_error: Literal["raise", "collect"] = "raise",
) -> list[Any]:
    """Call ``function`` on every item, each call a branch of its own; see ``gather`` for the arguments."""
    jobs = [function(item) for item in items]
    if on_error == "collect":
        return await gather(*jobs, limit=limit, on_error="collect")
    return await gather(*jobs, limit=limit)


# --- time and chance ------------------------------------------------------------------------------------------------

_FLOAT, _TIME, _UUID = Codec(float, "random()"), Codec(datetime, "now()"), Codec(_uuid.UUID, "uuid()")


async def sleep(delta: timedelta | float) -> None:
    """A durable timer (a ``timedelta`` or seconds): survives the process, costs only a row while it runs."""
    seconds = _seconds(delta)
    if seconds is None:
        raise UsageError("sleep: a timer without an end is none. Use wait_for to wait for something.")
    await sleep_until(_without_deadline("sleep", "a shorter sleep"), float(seconds))


async def now() -> datetime:
    """The time (UTC), recorded: the same on resume."""
    branch = current_branch("now")
    clock = branch.execution.services.clock
    return cast(datetime, await _recorded(branch, "now", _TIME, lambda: datetime.fromtimestamp(clock.now(), UTC)))


async def random() -> float:
    """A random number from 0 up to 1, recorded."""
    return cast(float, await _recorded(current_branch("random"), "random", _FLOAT, _random.SystemRandom().random))


async def uuid() -> _uuid.UUID:
    """A random UUID (version 4), recorded."""
    return cast(_uuid.UUID, await _recorded(current_branch("uuid"), "uuid", _UUID, _uuid.uuid4))


async def _recorded(branch: Branch, name: str, codec: Codec, source: Callable[[], Any]) -> Any:
    async def call(_path: str, _outcome: Outcome) -> Any:
        return source()

    return await branch.execution.perform(branch, name, "function", "[]", codec, call)


# --- input from outside ---------------------------------------------------------------------------------------------


@overload
async def wait_for(signal: str, type: type[T], timeout: timedelta | float | None = None) -> T: ...
@overload
async def wait_for(signal: str, type: Any = Any, timeout: timedelta | float | None = None) -> Any: ...
async def wait_for(signal: str, type: Any = Any, timeout: timedelta | float | None = None) -> Any:
    """Wait for a signal and return its value; the run may be parked meanwhile.

    Args:
        signal: Its name, as in ``runtime.signal(run_id, name, value)``. Signals of one name are taken in order.
        type: What the value must fit; a value that does not is set aside and the wait goes on.
        timeout: Seconds or a ``timedelta``, from the first start of the wait.

    Raises:
        TimeoutError: nothing came in time.
    """
    branch = _without_deadline("wait_for", "wait_for(..., timeout=...)")
    path = branch.next(checked_name(signal, "signal"))
    codec = Codec(type, f"signal {signal}")
    return await receive(branch, path, Question("signal", signal), codec, _seconds(timeout))


@overload
async def ask(question: str, type: type[T], timeout: timedelta | float | None = None) -> T: ...
@overload
async def ask(question: str, type: Any = str, timeout: timedelta | float | None = None) -> Any: ...
async def ask(question: str, type: Any = str, timeout: timedelta | float | None = None) -> Any:
    """Ask a person and wait for the answer: a ``wait_for`` with a question that the command line shows.

    The answer is given with ``ridethrough signal RUN_ID NAME JSON``, where NAME is the step's path (``ask#1``).
    """
    branch = _without_deadline("ask", "ask(..., timeout=...)")
    path = branch.next("ask")
    codec = Codec(type, f"the answer to {path}")
    return await receive(branch, path, Question("question", path, question), codec, _seconds(timeout))


def _without_deadline(what: str, instead: str) -> Branch:
    """The caller's branch, if nothing around it ends with this process.

    Raises:
        UsageError: the wait stands in a ``move_on_after`` or ``fail_after``: a run that is parked for days would be
            without that deadline when it comes back.
    """
    branch = current_branch(what)
    if anyio.current_effective_deadline() != math.inf:
        raise UsageError(
            f"{what} stands inside a deadline of this process (move_on_after or fail_after), which does not survive "
            f"parking. Use {instead}, which does."
        )
    return branch


LONGEST = 3650 * 86400.0
"""Seconds: a wait of more than ten years is a mistake."""


def _seconds(delta: timedelta | float | None) -> float | None:
    """A time limit in seconds; infinity is none.

    Raises:
        UsageError: it is no number, or longer than ten years.
    """
    seconds = delta.total_seconds() if isinstance(delta, timedelta) else delta
    if seconds is None or seconds == math.inf:
        return None
    if not seconds <= LONGEST:
        raise UsageError(f"A wait of {seconds} seconds cannot be kept: give at most ten years, or no time limit.")
    return seconds
