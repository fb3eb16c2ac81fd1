"""The life of a tool call: check, approve, intend, run, record.

    arguments checked against the schema      a model's mistake goes back to it, with path and rule
    approval                                  a wait of its own: only this branch is parked
    intent (writes)                           on disk before the tool starts, so that it starts at most once
    run                                       within the deadline and the concurrency limits
    output capped, the whole kept             as an artifact that the model can read on
    recorded                                  value or error, in one step of the run

The answer of a call is always a result, never an exception: one failing call does not harm its siblings.

After a crash a ``read`` or ``idempotent`` call without a result is simply run again (with the same key). A ``write``
with an intent and without a result may or may not have taken effect: nobody guesses, ``on_interrupt`` says what to do.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any
from weakref import WeakKeyDictionary

import anyio
from anyio.lowlevel import RunVar
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from ridethrough.runtime.backend import current_backend, is_our_cancellation
from ridethrough.runtime.errors import (
    Error,
    NotStarted,
    OutcomeUnknown,
    ToolFailed,
    ToolInterrupted,
)
from ridethrough.runtime.events import EventBase, ToolCallStarted
from ridethrough.runtime.execution import Branch, Execution, Inside, Outcome, call_digest, call_id, stand
from ridethrough.runtime.payload import (
    Codec,
    canonical,
    content_hash,
    describe_error,
    digest_of,
    dump_error,
    load_error,
    preview,
    result_codec,
    storable,
)
from ridethrough.runtime.router.messages import Content, ImagePart, TextPart, Usage
from ridethrough.runtime.threads import run_in_thread
from ridethrough.runtime.waiting import Question, receive
from ridethrough.runtime.workflow import backoff
from ridethrough.tools.berth import CallBerth
from ridethrough.tools.context import ToolContext
from ridethrough.tools.faults import FAULTS, Called
from ridethrough.tools.output import cap_output, render_output, split_images
from ridethrough.tools.schema import ArgumentsInvalid
from ridethrough.tools.tool import Tool, ToolCall

ARTIFACT_LIMIT = 64 * 1024 * 1024
"""Bytes of a tool's output that are kept for reading on."""

SANDBOX_GRACE = 15.0
"""Seconds beyond its deadline in which a call in a sandbox must have ended, or what became of it is not known."""

LONGEST_MESSAGE = 20_000
"""Characters of an error's message that are kept."""


class ToolResult(BaseModel):
    """What the model is told of a call, and what stands in the journal."""

    content: str
    is_error: bool = False
    artifact: str | None = None
    """The handle of the whole output, where ``content`` is shortened."""
    value: str | None = None
    """The value itself as JSON text, for the workflow that made the call."""
    usage: Usage | None = None
    """What an agent in the place of a tool has consumed."""
    cost_usd: float | None = None
    images: tuple[ImagePart, ...] = ()
    """Pictures that come with ``content``."""

    @property
    def shown(self) -> Content:
        """What the model is given: the text, and the pictures behind it."""
        if not self.images:
            return self.content
        return (*((TextPart(text=self.content),) if self.content else ()), *self.images)


class Verdict(BaseModel):
    """A person's answer about a call; ``output`` is what an interrupted call is known to have returned."""

    approved: bool
    note: str | None = None
    output: str | None = None


_RESULT = Codec(ToolResult, "the result of a tool")
_VERDICT = Codec(Verdict, "the decision about a call")


class Limiters:
    """Semaphores of one process, for tools with ``concurrency``, and of one turn, for ``sequential`` ones.

    They belong to the tool itself: two agents may have different tools of one name.
    """

    def __init__(self) -> None:
        """None yet."""
        self._semaphores: WeakKeyDictionary[Tool[..., Any], anyio.Semaphore] = WeakKeyDictionary()

    def of(self, tool: Tool[..., Any], size: int) -> anyio.Semaphore:
        """The semaphore of a tool."""
        found = self._semaphores.get(tool)
        if found is None:
            found = self._semaphores[tool] = anyio.Semaphore(size)
        return found


_process_limiters: RunVar[Limiters] = RunVar("ridethrough_limiters")
"""One set for each event loop: a semaphore belongs to the loop that it was made in."""


def process_limiters() -> Limiters:
    """The limiters of tools with ``concurrency``."""
    found = _process_limiters.get(None)
    if found is None:
        found = Limiters()
        _process_limiters.set(found)
    return found


class Request:
    """A call that a model asked for, with its place in the run."""

    __slots__ = ("agent", "arguments", "asked", "call_id", "key", "path", "raw_error", "run_id", "tool")

    def __init__(
        self,
        tool: Tool[..., Any],
        arguments: dict[str, Any] | str,
        path: str,
        branch: Branch,
        raw_error: str | None = None,
    ) -> None:
        """``arguments`` as the model gave them; ``raw_error`` says what is wrong if they are no JSON object."""
        self.tool = tool
        self.path = path
        self.arguments = arguments
        self.raw_error = raw_error
        self.agent = branch.agent
        self.run_id = branch.execution.run_id
        self.call_id = call_id(self.run_id, path, tool.name)
        self.key = f"rt-{call_digest(self.run_id, path)}"
        self.asked = json.dumps(arguments, sort_keys=True, ensure_ascii=False, default=str)

    def as_call(self, arguments: dict[str, Any]) -> ToolCall:
        """What the user's functions (approval, on_interrupt) are given."""
        return ToolCall(self.tool.name, plain_arguments(arguments), self.call_id, self.run_id, self.agent)


def plain_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as JSON data, whatever types the function takes."""
    return to_jsonable_python(arguments, fallback=str, inf_nan_mode="strings")  # type: ignore[no-any-return]


async def call_tool(branch: Branch, request: Request, deps: Any, turn: Limiters, process: Limiters) -> ToolResult:
    """Perform a call, or take its result from the journal."""
    execution, path = branch.execution, request.path
    digest = digest_of(request.asked)
    row = execution.recorded(path, "tool", digest, request.asked)
    if row is not None:
        execution.abandoned.append(f"{path}/")  # its approval stays unread
        return await recorded_result(execution, row)
    await execution.before_live(branch, path, "tool", digest)
    return await _Call(branch, request, digest, deps, turn, process).perform()


async def recorded_result(execution: Execution, row: Any) -> ToolResult:
    """The result that stands in the journal (of another call, if the code has changed: then the run stops here)."""
    if execution.ending is not None:
        await execution.halt()
    text = row.output if row.output_ref is None else await execution.read_payload(row.output_ref)
    return _RESULT.load(text)  # type: ignore[no-any-return]


async def refuse_call(
    branch: Branch,
    path: str,
    name: str,
    arguments: Any,
    error: Exception | None,
    content: str = "",
    event: EventBase | None = None,
) -> ToolResult:
    """Record a call that runs nothing: one that cannot be made (``error``), or a handoff (``content``, ``event``)."""
    execution = branch.execution
    asked = json.dumps(arguments, sort_keys=True, ensure_ascii=False, default=str)
    digest = digest_of(asked)
    row = execution.recorded(path, "tool", digest, asked)
    if row is not None:
        return await recorded_result(execution, row)
    await execution.before_live(branch, path, "tool", digest)
    outcome, started = Outcome(agent=branch.agent), execution.services.clock.now()
    result = ToolResult(content=str(error) if error else content, is_error=error is not None)
    kept = None if event is None else execution.numbered(event)
    if kept is not None:
        outcome.also = lambda connection: execution.keep_event(connection, kept)
    await execution.record(path, name, "tool", digest, asked, started, outcome, _RESULT.dump(result), error)
    if kept is not None:
        execution.publish(kept)
    return result


class _Call:
    """One call on its way through its life."""

    def __init__(
        self, branch: Branch, request: Request, digest: str, deps: Any, turn: Limiters, process: Limiters
    ) -> None:
        self.branch = branch
        self.execution: Execution = branch.execution
        self.request = request
        self.tool = request.tool
        self.digest = digest
        self.deps = deps
        self.turn = turn
        self.process = process
        self.outcome = Outcome(agent=branch.agent)
        self.started = self.execution.services.clock.now()
        self.failure: str | None = None
        self.attempt = 1
        self.confined = self.tool.sandbox is not None or self.tool.confined
        reaches = self.confined or self.tool.parameters.context is not None
        self.berth = CallBerth(branch, self.tool, request.path, request.call_id, self.outcome) if reaches else None

    async def perform(self) -> ToolResult:
        result, failure = await self._result()
        if failure is not None:
            failure = _bounded(failure, result.content)
            self.failure = dump_error(failure)
        await self.execution.record(
            self.request.path,
            self.tool.name,
            "tool",
            self.digest,
            self.request.asked,
            self.started,
            self.outcome,
            _RESULT.dump(result),
            failure,
        )
        if self.berth is not None:
            self.berth.close()
        return result

    async def _result(self) -> tuple[ToolResult, Exception | None]:
        """The result, and the error behind it if it is one."""
        try:
            arguments = self._parse()
            refusal = await self._approval(arguments)
            if refusal is not None:
                return refusal, None
            return await self._shown(await self._run(arguments)), None
        except Exception as error:
            return ToolResult(content=storable(preview(_told(error), self.tool.max_output)), is_error=True), error

    def _parse(self) -> dict[str, Any]:
        if self.request.raw_error is not None:
            raise ArgumentsInvalid([self.request.raw_error])
        return self.tool.parameters.parse(self.request.arguments)

    # --- people -----------------------------------------------------------------------------------------------------

    async def _approval(self, arguments: dict[str, Any]) -> ToolResult | None:
        """Wait for a person if the tool wants one; the answer to the model if it is no."""
        wanted, path = self.tool.approval, f"{self.request.path}/approval#1"
        if path in self.execution.replay or path in self.execution.waits:
            wanted = True  # it was asked for in an earlier life: a predicate must not change its mind
        if callable(wanted):
            answer = wanted(self.request.as_call(arguments))
            wanted = bool(await answer if inspect.isawaitable(answer) else answer)
        if not wanted:
            return None
        verdict = await self._ask("approval", "approval#1", self.request.call_id, f"May {self.tool.name} run?")
        if verdict.approved:
            return None
        return ToolResult(
            content=_with_note("A person refused this call; it was not made.", verdict.note), is_error=True
        )

    async def _ask(self, kind: str, step: str, call_id: str, text: str) -> Verdict:
        arguments = self.request.arguments
        shown = arguments if isinstance(arguments, dict) else {"raw": arguments}
        question = Question(kind, call_id, text, shown, self.tool.name)
        found: Verdict = await receive(self.branch, f"{self.request.path}/{step}", question, _VERDICT, None)
        self.started = self.execution.services.clock.now()  # a person's time is no working time
        return found

    # --- running ----------------------------------------------------------------------------------------------------

    async def _run(self, arguments: dict[str, Any]) -> Any:
        intent = self.execution.intents.get(self.request.path) if self.tool.effect == "write" else None
        goes_on = intent is not None and await self._goes_on(intent.sandbox)
        if intent is not None and not goes_on:
            settled = await self._interrupted(arguments, intent.attempt)
            if settled is not None:
                return settled
        async with AsyncExitStack() as limits:
            for semaphore in self._semaphores():
                await limits.enter_async_context(semaphore)
            if self.confined and self.berth is not None:
                await self.berth.open()
            self.attempt = 1 if intent is None else intent.attempt + (0 if goes_on else 1)
            if self.tool.effect == "write" and not goes_on:
                await self._intend(self.attempt)  # not before its turn has come: a crash until then interrupts nothing
            self._announce_start(arguments)
            return await self._attempts(arguments)

    async def _goes_on(self, sandbox_id: str | None) -> bool:
        """Whether what had started goes on in its sandbox, or has ended there: running the call again then finds it."""
        return self.confined and self.berth is not None and await self.berth.survives(sandbox_id)

    def _semaphores(self) -> list[anyio.Semaphore]:
        found = []
        if self.tool.sequential:
            found.append(self.turn.of(self.tool, 1))
        if self.tool.concurrency is not None:
            found.append(self.process.of(self.tool, self.tool.concurrency))
        return found

    async def _intend(self, attempt: int) -> None:
        """Promise 3: this is on disk before the tool starts."""
        row = {
            "run_id": self.request.run_id,
            "path": self.request.path,
            "attempt": attempt,
            "name": self.tool.name,
            "digest": self.digest,
            "started_at": self.execution.services.clock.now(),
            "sandbox": None if self.berth is None else self.berth.sandbox_id,
        }
        store = self.execution.services.store
        await self.execution.do(lambda connection: store.insert_intent(connection, row))
        self.outcome.attempts = attempt

    async def _attempts(self, arguments: dict[str, Any]) -> Any:
        attempt = 1
        while True:
            kwargs = dict(arguments)
            if self.tool.parameters.context is not None:
                kwargs[self.tool.parameters.context] = self._context(attempt)
            try:
                return await self._once(kwargs, attempt)
            except Exception:
                if attempt > self.tool.retries:
                    raise
            clock = self.execution.services.clock
            await clock.wait(anyio.Event(), clock.now() + backoff(attempt))
            attempt += 1
            self.outcome.attempts += 1

    async def _once(self, kwargs: dict[str, Any], attempt: int) -> Any:
        # In a sandbox the deadline is its own; here is only the time that it may take to say so.
        deadline = self.tool.timeout + (0 if self.tool.body is None else SANDBOX_GRACE)
        with anyio.move_on_after(deadline), stand(Inside(self.request.path)):
            if FAULTS is None:
                return await self._function(kwargs, attempt)
            called = Called(self.request.run_id, self.request.call_id, self.tool.name, self.tool.effect)
            lose = self.berth.lose if self.confined and self.berth is not None else None
            return await FAULTS.around(called, lambda: self._function(kwargs, attempt), lose)
        doubt = " It may have taken effect all the same." if self.tool.effect == "write" else ""
        raise TimeoutError(f"{self.tool.name} did not end within {self.tool.timeout:g} s.{doubt}")

    async def _function(self, kwargs: dict[str, Any], attempt: int) -> Any:
        if self.tool.body is not None and self.berth is not None:
            sandbox = self.berth.sandbox(self.attempt, attempt)
            return await self.tool.body.run(self.tool.name, sandbox, plain_arguments(kwargs), self.tool.timeout)
        if not self.tool.is_async:
            return await run_in_thread(lambda: self.tool.function(**kwargs))
        try:
            return await self.tool.function(**kwargs)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:  # one tool must not end the process of all runs
            if is_our_cancellation(error):
                raise
            raise ToolFailed(f"{self.tool.name} tried to end its task or the process ({error!r}).") from error

    def _context(self, attempt: int) -> ToolContext[Any]:
        return ToolContext(
            sandbox=None if self.berth is None else self.berth.sandbox(self.attempt, attempt),
            run_id=self.request.run_id,
            call_id=self.request.call_id,
            idempotency_key=self.request.key,
            deps=self.deps,
            resources=self.execution.services.resources,
            on_progress=self._progress_from(),
        )

    # --- after a crash ----------------------------------------------------------------------------------------------

    async def _interrupted(self, arguments: dict[str, Any], attempt: int) -> Any:
        """What is known of a write that had started: its output, or ``None`` if it is safe to start it again.

        Raises:
            ToolInterrupted: it is not known, and the model is to be told.
        """
        how = self.tool.on_interrupt
        if how == "tell":
            raise _unknown(self.tool.name)
        if how != "ask":
            try:
                return await self._find_out(how, arguments)
            except NotStarted:
                return None
            except OutcomeUnknown:
                pass
        # Each interruption is a question of its own, under an id of its own: an answer that was given before (to the
        # approval, or after an earlier crash) must not start the call again.
        self.execution.abandoned += [f"{self.request.path}/interrupted#{past}" for past in range(1, attempt)]
        verdict = await self._ask(
            "interrupted",
            f"interrupted#{attempt}",
            f"{self.request.call_id}-again{attempt}",
            f"{self.tool.name} was interrupted; nobody knows whether it took effect. Approve: start it again. "
            f"Deny: do not; the model is told that the outcome is unknown.",
        )
        if verdict.output is not None:
            return verdict.output
        if verdict.approved:
            return None
        raise _unknown(self.tool.name, verdict.note)

    async def _find_out(self, check: Callable[[ToolCall], Awaitable[Any]], arguments: dict[str, Any]) -> Any:
        """Ask the tool's own check; a check that itself fails has found nothing out."""
        try:
            with anyio.fail_after(self.tool.timeout), stand(Inside(self.request.path)):
                return _Known(await check(self.request.as_call(arguments)))
        except (NotStarted, OutcomeUnknown):
            raise
        except (Exception, SystemExit) as error:
            raise OutcomeUnknown(f"The check of {self.tool.name} failed: {describe_error(error)}") from error

    # --- output and events ------------------------------------------------------------------------------------------

    async def _shown(self, value: Any) -> ToolResult:
        """The output as the model sees it; the whole is kept where it is longer."""
        value, images = split_images(value.value if isinstance(value, _Known) else value)
        text = await _render(value, self.tool.name)
        if len(text) <= self.tool.max_output:
            return ToolResult(content=text, images=images)
        data = text.encode("utf-8", "surrogatepass")[:ARTIFACT_LIMIT]
        self.outcome.artifact = data
        handle = content_hash(data)
        return ToolResult(content=cap_output(text, self.tool.max_output, handle)[0], artifact=handle, images=images)

    def _announce_start(self, arguments: dict[str, Any], progress: str | None = None) -> None:
        if self.execution.watchers:
            shown = plain_arguments(arguments)
            self.execution.publish(
                ToolCallStarted(
                    path=self.request.path,
                    name=self.tool.name,
                    call_id=self.request.call_id,
                    arguments=shown,
                    agent=self.request.agent,
                    progress=progress,
                )
            )

    def _progress_from(self) -> Callable[[str], None]:
        """What takes a tool's progress, in the loop or (sync tools) from a thread."""
        home, call_soon = threading.get_ident(), current_backend().call_soon

        def take(text: str) -> None:
            if threading.get_ident() == home:
                self._announce_start({}, text)
            else:
                call_soon(self._announce_start, {}, text)

        return take


class _DirectCall(_Call):
    """A call that the workflow's own code makes: typed arguments in, the typed value or the error out."""

    def __init__(self, branch: Branch, request: Request, digest: str, arguments: dict[str, Any], codec: Codec) -> None:
        super().__init__(branch, request, digest, None, Limiters(), process_limiters())
        self.arguments = arguments
        self.codec = codec

    async def _result(self) -> tuple[ToolResult, Exception | None]:
        try:
            refusal = await self._approval(self.arguments)
            if refusal is not None:
                raise ToolFailed(refusal.content)
            found = await self._run(self.arguments)
            text, value = self.codec.settle(found.value if isinstance(found, _Known) else found)
            return ToolResult(content=preview(render_output(value, self.tool.name), 2000), value=text), None
        except Exception as error:
            return ToolResult(content=storable(preview(_told(error), self.tool.max_output)), is_error=True), error


async def call_from_workflow(branch: Branch, tool: Tool[..., Any], args: Any, kwargs: Any) -> Any:
    """Perform ``await tool(...)`` in a workflow: recorded, and for a write started at most once, as for a model's call.

    Raises:
        ToolFailed: a person refused it.
        ToolInterrupted: it was interrupted by a crash, and nobody knows whether it took effect.
    """
    bound = inspect.signature(tool.function).bind_partial(*args, **kwargs)
    arguments = {name: value for name, value in bound.arguments.items() if name != tool.parameters.context}
    execution, path = branch.execution, branch.next(tool.name)
    request = Request(tool, plain_arguments(canonical(arguments)), path, branch)
    codec, digest = result_codec(tool.function, f"tool {tool.name}"), digest_of(request.asked)
    row = execution.recorded(path, "tool", digest, request.asked)
    if row is not None:
        execution.abandoned.append(f"{path}/")
        result, error = await recorded_result(execution, row), row.error
    else:
        await execution.before_live(branch, path, "tool", digest)
        call = _DirectCall(branch, request, digest, arguments, codec)
        result, error = await call.perform(), call.failure
    if error is not None:
        raise load_error(error)
    return codec.load(result.value or "null")


class _Known:
    """What a check found out; wrapped, because the output itself may be ``None``."""

    def __init__(self, value: Any) -> None:
        self.value = value


async def _render(value: Any, tool: str) -> str:
    """Large values are rendered in a thread: a 50 MB text would hold up every other run for a tenth of a second."""
    if isinstance(value, str | bytes) and len(value) > 1_000_000:
        return await run_in_thread(lambda: render_output(value, tool))
    return render_output(value, tool)


def _message(error: Exception) -> str:
    try:
        return str(error)
    except Exception:
        return f"{type(error).__name__}, whose message cannot be read"


def _told(error: Exception) -> str:
    """What the model is told of a failure: enough to act on, nothing of our inside."""
    text = _message(error)
    if isinstance(error, Error | TimeoutError):
        return text or type(error).__name__
    return f"The tool failed: {type(error).__name__}: {text}" if text else f"The tool failed: {type(error).__name__}"


def _bounded(error: Exception, told: str) -> Exception:
    """The error for the journal: as it is, unless its message is too long for a row or cannot be stored or read."""
    try:
        text = str(error)
        fits = len(text) <= LONGEST_MESSAGE and text == storable(text) and len(repr(error.args)) <= 2 * LONGEST_MESSAGE
    except Exception:
        fits = False
    return error if fits else ToolFailed(preview(told, LONGEST_MESSAGE))


def _unknown(name: str, note: str | None = None) -> ToolInterrupted:
    text = (
        f"This call of {name} was interrupted by a crash. It may or may not have taken effect, so it was not made "
        f"again. Find out before you repeat it."
    )
    return ToolInterrupted(_with_note(text, note))


def _with_note(text: str, note: str | None) -> str:
    return f"{text} Note: {note}" if note else text
