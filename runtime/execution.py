"""One run in memory: branches with stable paths, replay from the journal, and parking.

A workflow is plain async Python, executed from the top each time the run is taken up. Whatever touches the world goes
through ``Execution.perform``: it gives the step a path (branch, name, occurrence), answers from the journal where the
step is on record, and otherwise executes it and waits until the journal has the result. So the code runs ahead of the
journal nowhere, and no finished step is executed twice.

Control flow that must not be caught by user code (parking, cancelling, losing the lease, divergence) is a cancelled
scope around the whole run, never an exception: ``except Exception`` cannot stop it, and a branch that swallows the
cancellation is cancelled again at its next wait.

Parking: every branch holds a token of ``active``. A branch that blocks on something durable (a timer, a signal, an
approval, a child, an answer from the models) gives its token back; when none is left the run is taken out of memory
with its wake-up condition on record. The check for a signal that came in between, and the change of the run's status,
are one transaction, so no wake-up can fall between them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol

import anyio
import anyio.lowlevel
from sqlalchemy import Connection

from ridethrough.runtime import control, payload
from ridethrough.runtime.backend import is_our_cancellation
from ridethrough.runtime.errors import Diverged, SerializationError, StepFailed, StoreError, UsageError
from ridethrough.runtime.events import EventBase, RunPaused, StepFinished, StepStarted, ToolCallFinished
from ridethrough.runtime.journal import Fenced, Journal, Unit
from ridethrough.runtime.payload import INLINE_LIMIT, Codec, digest_of, preview
from ridethrough.runtime.testpoints import killpoint

if TYPE_CHECKING:
    from ridethrough.runtime.clock import Clock
    from ridethrough.runtime.store import Store, StoredRow

log = logging.getLogger("ridethrough")

LINGER = 1.0
"""Seconds: a run whose next timer is nearer than this stays in memory."""

Ending = Literal["park", "cancel", "release", "lost", "broken", "diverged"]
OnError = Literal["raise", "collect"]


class Launcher(Protocol):
    """The open runtime, as far as definitions need it."""

    async def run_to_end(self, workflow: Any, arguments: Mapping[str, Any]) -> Any:
        """Start a run and wait for its result."""
        ...

    def child_starter(self, workflow: Any, text: str, branch: Branch) -> Callable[[Connection, str], None]:
        """The insertion of a child run, for the journal's thread."""
        ...


class Services(Protocol):
    """What a run needs of the process that executes it."""

    store: Store
    journal: Journal
    clock: Clock
    worker_id: str
    resources: Mapping[str, Any]
    launcher: Launcher

    def current_task(self) -> object:
        """The running task."""
        ...

    def spawn(self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None:
        """Run something in the background."""
        ...

    def poke(self) -> None:
        """Let the worker look at the database now."""
        ...

    def stir(self) -> None:
        """Let the worker look at what waits for models now."""
        ...

    async def router(self) -> Any:
        """The model router, opened at its first use."""
        ...

    async def companion(self, name: str) -> Any:
        """What another part of the house has beside the worker."""
        ...


class Unwinding(BaseException):
    """The run has left memory and its code is still being unwound: a step in a shielded ``finally`` ends here."""


class Branch:
    """A line of execution inside a run: one task, and a name that every step on it begins with."""

    __slots__ = ("agent", "checked", "counts", "execution", "prefix", "sandbox", "task")

    def __init__(
        self, execution: Execution, prefix: str, task: object, agent: str | None = None, sandbox: object = None
    ) -> None:
        """``task`` is the only task that may perform steps on this branch.

        ``agent`` speaks on it, and means by its sandbox the one of the profile ``sandbox``.
        """
        self.sandbox = sandbox
        self.execution = execution
        self.prefix = prefix
        self.task = task
        self.agent = agent
        self.counts: dict[str, int] = {}
        self.checked = False

    def next(self, name: str) -> str:
        """The path of the next step of that name."""
        count = self.counts.get(name, 0) + 1
        self.counts[name] = count
        return f"{self.prefix}{name}#{count}"

    def next_group(self) -> str:
        """The path of the next ``gather``."""
        count = self.counts.get("", 0) + 1
        self.counts[""] = count
        return f"{self.prefix}g{count}"


class Inside:
    """Marks the inside of a step, where nothing durable can be awaited."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        """``path`` is the step's."""
        self.path = path


_position: ContextVar[Branch | Inside | None] = ContextVar("ridethrough_position", default=None)


def position() -> Branch | Inside | None:
    """Where the caller stands: on a branch of a run, inside a step, or outside any run."""
    return _position.get()


def current_branch(what: str) -> Branch:
    """The caller's branch.

    Raises:
        UsageError: the caller is not inside a workflow, or stands where ``what`` cannot be made durable.
    """
    branch = _position.get()
    if type(branch) is Branch:
        if branch.task is branch.execution.services.current_task():
            return branch
        raise UsageError(
            f"{what} was called from a task that the workflow started by itself (branch {branch.prefix or 'main'!r} of "
            f"run {branch.execution.run_id}). Its place in the journal would depend on timing. Use "
            f"ridethrough.gather or fan_out to run steps concurrently, and the step's own timeout= instead of "
            f"asyncio.wait_for."
        )
    if isinstance(branch, Inside):
        raise UsageError(
            f"{what} was called inside step {branch.path}, which is recorded as a whole. Call it from the workflow."
        )
    raise UsageError(f"{what} was called outside a workflow. Call it in a function decorated with @workflow.")


@contextmanager
def stand(place: Branch | Inside | None) -> Generator[None]:
    """Make ``place`` the caller's position."""
    token = _position.set(place)
    try:
        yield
    finally:
        _position.reset(token)


@dataclass(slots=True)
class Blocked:
    """A branch that waits for something durable."""

    path: str
    kind: str
    name: str
    due: float | None = None
    event: anyio.Event = field(default_factory=anyio.Event)
    awaits: str = ""
    """The condition that wakes it, where no time does: see ``waking.py``."""
    expected_at: float | None = None
    """When that may be, for people."""


@dataclass(slots=True)
class Outcome:
    """What a step recorded besides its value."""

    attempts: int = 1
    agent: str | None = None
    model: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    artifact: bytes | None = None
    """A value too large to show whole, kept for reading on."""
    also: Callable[[Connection], None] | None = None
    """What else belongs into the transaction that records the step."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a run was started with."""

    id: str
    workflow: str
    fence: int
    tenant: str | None
    priority: int
    labels: Mapping[str, str]
    parent_id: str | None
    root_id: str
    recoveries: int
    cwd: str | None
    tried: int = 0
    """Model calls that had failed since the last answer when the run was parked."""
    called: bool = False
    """It was its turn, or a person said so: not the clock took it up, nor the death of its worker."""


class Execution:
    """A run that is being executed by this process."""

    def __init__(
        self,
        services: Services,
        info: RunInfo,
        *,
        seq: int = 0,
        steps: Sequence[StoredRow] = (),
        waits: Sequence[StoredRow] = (),
        intents: Sequence[StoredRow] = (),
        code_names: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        """``seq`` is the last position in the journal; the rows are what is on record.

        ``code_names`` gives the names that the workflow's code mentions, to tell a renamed step from an added one.
        """
        self.services = services
        self.info = info
        self.run_id = info.id
        self.seq = seq
        self.replay = {row.path: row for row in steps}
        self.waits = {row.path: row for row in waits}
        self.intents = {row.path: row for row in intents}
        self.code_names = code_names
        self.scope = anyio.CancelScope()
        self.ending: Ending | None = None
        self.failure: Exception | None = None
        self.holding: Literal["pause", "release"] | None = None
        self.active = 1
        self.blocked: dict[str, Blocked] = {}
        self.watchers: list[Callable[[EventBase], None]] = []
        self.abandoned: list[str] = []
        self.had_waits = bool(waits)
        self.timings: dict[str, tuple[float, float]] | None = None
        """Start and end of each step by path, where somebody counts working time."""
        self.parked_for: tuple[str, datetime | None] = ("", None)
        self.tried = info.tried
        self._parking: anyio.Event | None = None
        self._ended = anyio.Event()
        self._turns: dict[str, anyio.Lock] = {}
        self._kept = seq

    # --- steps ------------------------------------------------------------------------------------------------------

    async def perform(
        self,
        branch: Branch,
        name: str,
        kind: str,
        asked: str,
        codec: Codec,
        call: Callable[[str, Outcome], Awaitable[Any]],
        path: str | None = None,
    ) -> Any:
        """Answer a step from the journal, or execute it and put its result there.

        ``call(path, outcome)`` does the work; it may fill in ``outcome``. An exception is recorded like a result and
        raised again on resume.
        """
        path = path or branch.next(name)
        digest = digest_of(asked)
        row = self.recorded(path, kind, digest, asked)
        if row is not None:
            return await self.recall(row, codec)
        await self.before_live(branch, path, kind, digest)
        started = self.services.clock.now()
        outcome = Outcome(agent=branch.agent)
        if self.watchers:
            self.publish(StepStarted(path=path, name=name, kind=kind, agent=branch.agent, at=started))
        token = _position.set(Inside(path))
        failure: Exception | None = None
        value: Any = None
        text: str | None = None
        killpoint("step.before_call")
        try:
            value = await call(path, outcome)
        except Exception as error:
            failure = error
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | Unwinding) or is_our_cancellation(error):
                raise
            failure = StepFailed(f"Step {path} tried to end its task or the process: {error!r}.", type(error).__name__)
        finally:
            _position.reset(token)
        killpoint("step.after_call")
        if failure is None:
            try:
                text, value = codec.settle(value)
            except SerializationError as error:
                failure = error
        if failure is not None and self.ending is not None:
            await self.halt()  # it failed because it was cut off, which is no result
        await self.record(path, name, kind, digest, asked, started, outcome, text, failure)
        if failure is not None:
            raise payload.settle_error(failure)[1]
        return value

    def recorded(self, path: str, kind: str, digest: str, asked: str) -> StoredRow | None:
        """The journal's row of a step; stops the run if it is the row of something else."""
        row = self.replay.pop(path, None)
        if row is not None and (row.digest != digest or row.kind != kind):
            self.diverge(path, f"{row.kind} {row.name} with {row.asked}", f"{kind} with {preview(asked)}")
        if row is not None and self.timings is not None:
            self.timings[path] = (row.started_at, row.ended_at)
        return row

    async def recall(self, row: StoredRow, codec: Codec) -> Any:
        """The recorded value of a step, or its recorded error raised."""
        if self.ending is not None:
            await self.halt()
        if row.status == "failed":
            raise payload.load_error(row.error)
        text = row.output
        if row.output_ref is not None:
            text = await self.read_payload(row.output_ref)
        try:
            return codec.load(text)
        except (SerializationError, ValueError) as error:
            self.diverge(row.path, f"the value {preview(text)}", f"another type ({error})")
            return await self.halt()

    async def read_payload(self, ref: str) -> str:
        """A large value by its reference."""
        data = await self.services.store.read(lambda connection: self.services.store.payload(connection, ref))
        if data is None:
            await self.stop(
                "broken", StoreError(f"run {self.run_id}: stored value {ref} is missing. Run `ridethrough db check`.")
            )
        return data.decode("utf-8", "surrogatepass") if data is not None else ""

    async def before_live(self, branch: Branch, path: str, kind: str, digest: str) -> None:
        """What has to be so before a step may be executed: nobody stops the run, and the code is the recorded one."""
        if self.ending is not None:
            await self.halt()
        if self.replay and not branch.checked:
            branch.checked = True
            self._look_for_renamed(branch, path, kind, digest)
            if self.ending is not None:
                await self.halt()
        if self.holding is not None:
            await self.hold()

    def _look_for_renamed(self, branch: Branch, path: str, kind: str, digest: str) -> None:
        """A new step while the branch has recorded steps ahead means that the code has changed.

        One in front of the recorded ones is fine. But if a recorded step with the same input has vanished from the
        code, this is that step under a new name, and to execute it would repeat what was done.
        """
        for row in self._ahead(branch):
            if row.kind == kind and row.digest == digest and row.name not in self.code_names():
                self.diverge(row.path, f"{row.kind} {row.name} with {row.asked}", f"{path} with the same input")
                return

    def _ahead(self, branch: Branch) -> list[StoredRow]:
        size = len(branch.prefix)
        return [row for path, row in self.replay.items() if path.startswith(branch.prefix) and "/" not in path[size:]]

    def diverge(self, path: str, recorded: str, asked: str) -> None:
        """Stop the run: its code asks for something else than the journal holds."""
        message = (
            f"Run {self.run_id} has diverged at step {path}: the journal has {recorded}; the code asks for {asked}. "
            f"Nothing is lost. Put the code back and resume, or start from this step with the new code: "
            f"ridethrough fork {self.run_id} --at '{path}'"
        )
        self.end("diverged", Diverged(message, path=path, recorded=recorded, asked=asked))

    async def record(
        self,
        path: str,
        name: str,
        kind: str,
        digest: str,
        asked: str,
        started: float,
        outcome: Outcome,
        text: str | None,
        failure: Exception | None,
    ) -> None:
        """Put a finished step into the journal and wait until it is on disk."""
        ended = self.services.clock.now()
        if self.timings is not None:
            self.timings[path] = (started, ended)
        self.seq = seq = self.seq + 1
        error = None if failure is None else payload.dump_error(failure)
        large = text is not None and len(text) > INLINE_LIMIT
        row = [
            self.run_id,
            seq,
            path,
            name,
            kind,
            "done" if failure is None else "failed",
            digest,
            preview(asked),
            text,
            None,
            None,
            error,
            outcome.attempts,
            started,
            ended,
            outcome.agent,
            outcome.model,
            outcome.input_tokens,
            outcome.output_tokens,
            outcome.cost_usd,
        ]
        if large or outcome.artifact is not None or outcome.also is not None:
            unit = Unit(self.run_id, self.info.fence, operation=self._with_payloads(row, large, outcome))
        else:
            unit = Unit(self.run_id, self.info.fence, step=tuple(row))
        unit.then = lambda: self._recorded(row, seq)
        await self.write(unit)

    def _recorded(self, row: list[Any], seq: int) -> None:
        """A step is on disk. Called in the order of the journal, which the waking of tasks need not keep."""
        self._kept = seq
        if self.watchers and row[6]:  # the end of a ``gather`` has no digest and is nobody's step
            if row[4] == "tool":
                self.publish(tool_finished(row, row[8]))
            self.publish(_finished(row, seq))

    def _with_payloads(self, row: list[Any], large: bool, outcome: Outcome) -> Callable[[Connection], None]:
        store, now = self.services.store, row[14]

        def operation(connection: Connection) -> None:  # may run twice: a batch that failed is repeated unit by unit
            stored = list(row)
            for column, data in (
                (9, row[8].encode("utf-8", "surrogatepass") if large else None),
                (10, outcome.artifact),
            ):
                if data is not None:
                    stored[column] = payload.content_hash(data)
                    store.insert_payload(connection, stored[column], data, now)
            if large:
                stored[8] = None
            if outcome.also is not None:
                outcome.also(connection)
            store.insert_steps(connection.connection.cursor(), [tuple(stored)])

        return operation

    async def write(self, unit: Unit) -> Any:
        """Commit a unit; if that cannot be done, stop the run here instead of going on without the journal."""
        try:
            return await self.services.journal.write(unit)
        except Fenced:
            log.warning("run %s: another worker has taken it over; this one has written nothing", self.run_id)
            return await self.stop("lost")
        except StoreError as error:
            return await self.stop("broken", error)

    async def do(self, operation: Callable[[Connection], Any]) -> Any:
        """Run an operation in a fenced transaction."""
        return await self.write(Unit(self.run_id, self.info.fence, operation=operation))

    # --- ending and holding -----------------------------------------------------------------------------------------

    def end(self, ending: Ending, failure: Exception | None = None) -> None:
        """Unwind the run; the first reason stands."""
        if self.ending is None:
            self.ending = ending
            self.failure = failure
            self._ended.set()
        self.scope.cancel()

    async def stop(self, ending: Ending, failure: Exception | None = None) -> Any:
        """Unwind the run from inside."""
        self.end(ending, failure)
        return await self.halt()

    async def halt(self) -> Any:
        """Wait for the cancellation that is on its way; user code that is shielded from it is unwound all the same."""
        await anyio.lowlevel.checkpoint()
        raise Unwinding(self.run_id)

    async def hold(self) -> None:
        """Stop this branch in front of a step, for good; the run is parked when all of them have stopped."""
        self._let_go()
        try:
            await self._ended.wait()
        finally:
            self.active += 1
        await self.halt()

    def hold_steps(self, why: Literal["pause", "release"]) -> None:
        """Let running steps finish and start no new ones; then pause the run, or give it back."""
        self.holding = why
        if self.active == 0:
            self._consider_parking()

    # --- blocking and parking ---------------------------------------------------------------------------------------

    async def block(self, wait: Blocked) -> bool:
        """Wait for the event (true) or the due time (false). The run may be parked meanwhile."""
        self.blocked[wait.path] = wait
        self._let_go()
        try:
            came = await self.services.clock.wait(wait.event, wait.due)
            while self._parking is not None:
                await self._parking.wait()
            return came
        finally:
            self.active += 1
            self.blocked.pop(wait.path, None)

    def _let_go(self) -> None:
        self.active -= 1
        if self.active == 0:
            self._consider_parking()

    def _consider_parking(self) -> None:
        if self._parking is None and self.ending is None:
            self.services.spawn(self._park)

    async def _park(self) -> None:
        """Take the run out of memory if all of its branches are still blocked."""
        if self._parking is not None:
            return
        await anyio.lowlevel.checkpoint()
        if self.active > 0 or self.ending is not None or self._parking is not None or not self._worth_parking():
            return
        self._parking = anyio.Event()
        killpoint("park.before")
        try:
            ending = await self._leave()
        finally:
            parking, self._parking = self._parking, None
            parking.set()
        killpoint("park.after")
        if ending is not None:
            self.end(ending)
        else:
            self.services.poke()

    def _worth_parking(self) -> bool:
        due = self._next_due()
        if self.holding is not None or due is None or due - self.services.clock.now() > LINGER:
            return True
        # A child may need this one's place in memory to run at all.
        return any(wait.kind == "child" for wait in self.blocked.values())

    def _next_due(self) -> float | None:
        return min((wait.due for wait in self.blocked.values() if wait.due is not None), default=None)

    async def _leave(self) -> Ending | None:
        try:
            return await self.services.journal.do(self._leave_in_transaction, self.run_id, self.info.fence)
        except Fenced:
            return "lost"
        except StoreError as error:
            self.failure = error
            return "broken"

    def _leave_in_transaction(self, connection: Connection) -> Ending | None:
        store, now = self.services.store, self.services.clock.now()
        row = store.run(connection, self.run_id)
        assert row is not None
        if row.wanted == "cancel":
            return "cancel"
        withdrawn = self.holding == "pause" and row.wanted is None  # resumed before it had stopped
        if withdrawn or (self.holding == "release" and row.wanted != "pause"):
            store.update_run(connection, self.run_id, status="queued", worker_id=None, wake_at=now)
            return "release"
        if self.holding is None and row.wanted is None and self._something_came(connection):
            return None
        status, reason, due = self._reason(paused=self.holding == "pause" or row.wanted == "pause")
        awaits, expected = self._awaits(reason, due)
        store.update_run(
            connection,
            self.run_id,
            status=status,
            worker_id=None,
            wanted=None,
            wake_at=due,
            awaits=awaits,
            tried=self.tried,
            pause_reason=reason,
            pause_until=expected,
            parked_at=now,
        )
        self.seq += 1
        until = None if expected is None else _utc(expected)
        self.parked_for = (reason, until)
        self.keep_event(connection, RunPaused(run_id=self.run_id, seq=self.seq, at=now, reason=reason, until=until))
        return "park"

    def _something_came(self, connection: Connection) -> bool:
        if any(wait.event.is_set() for wait in self.blocked.values()):  # woken while the run was about to be parked
            return True
        store = self.services.store
        names = {wait.name for wait in self.blocked.values() if wait.kind in SIGNALLED}
        if any(name in names for _, name in store.open_signals(connection, [self.run_id])):
            return True
        children = [wait.name for wait in self.blocked.values() if wait.kind == "child"]
        return any(status in FINAL_STATUSES for status in store.statuses(connection, children).values())

    def _reason(self, paused: bool) -> tuple[str, str, float | None]:
        """Status, reason and wake-up time of a run that is being parked."""
        if paused:
            return "paused", "operator", None
        models = sorted((wait for wait in self.blocked.values() if wait.kind in PAUSING), key=_by_itself)
        if models:
            return "paused", models[0].name, self._next_due()
        first = min(self.blocked.values(), key=lambda wait: (_URGENCY.get(wait.kind, 9), wait.path))
        return "waiting", first.kind, self._next_due()

    def _awaits(self, reason: str, due: float | None) -> tuple[str | None, float | None]:
        """The condition that wakes the run, and when that may be; without one it is the time at which it is due."""
        waits = [wait for wait in self.blocked.values() if wait.awaits]
        if reason == "operator" or not waits:
            return None, due
        times = [wait.expected_at for wait in waits if wait.name == reason and wait.expected_at is not None]
        times += [wait.due for wait in self.blocked.values() if not wait.awaits and wait.due is not None]
        return any_of(wait.awaits for wait in waits), min(times, default=None)

    def keep_event(self, connection: Connection, event: EventBase) -> None:
        """Put an event of this run on record, at the position that it has."""
        control.keep_event(self.services.store, connection, self.run_id, event.seq, event)

    def numbered(self, event: EventBase) -> EventBase:
        """The event as one of this run's, at the next position of its journal."""
        self.seq += 1
        return event.model_copy(update={"run_id": self.run_id, "seq": self.seq, "at": self.services.clock.now()})

    def publish(self, event: EventBase) -> None:
        """Tell those who watch; a passing event gets the position of the last one on disk."""
        if not self.watchers:
            return
        if not event.seq:
            event = event.model_copy(update={"run_id": self.run_id, "seq": self._kept})
        for watcher in self.watchers:
            watcher(event)

    # --- waits ------------------------------------------------------------------------------------------------------

    async def open_wait(
        self, path: str, kind: str, name: str, due: float | None, event: EventBase | None = None, **fields: str | None
    ) -> float | None:
        """Put a wait on record unless it is; its due time, which is that of the first record."""
        known = self.waits.get(path)
        if known is not None:
            return known.due_at  # type: ignore[no-any-return]
        now = self.services.clock.now()
        row = {"run_id": self.run_id, "path": path, "kind": kind, "name": name, "since": now, "due_at": due, **fields}
        self.had_waits = True
        kept = None if event is None else self.numbered(event)

        def operation(connection: Connection) -> None:
            self.services.store.insert_wait(connection, row)
            if kept is not None:
                self.keep_event(connection, kept)

        unit = Unit(self.run_id, self.info.fence, operation=operation)
        if kept is not None:
            unit.then = lambda: self._emitted(kept)
        await self.write(unit)
        return due

    def _emitted(self, event: EventBase) -> None:
        self._kept = event.seq
        self.publish(event)

    def turn(self, name: str) -> anyio.Lock:
        """Held by the branch that is about to take a signal of that name."""
        return self._turns.setdefault(name, anyio.Lock())

    def closing(self, path: str) -> Callable[[Connection], None]:
        """For ``Outcome.also``: the wait of that path is over."""
        self.waits.pop(path, None)
        return lambda connection: self.services.store.delete_waits(connection, self.run_id, path)

    def abandoning(self, prefixes: tuple[str, ...], now: float) -> Callable[[Connection], None] | None:
        """For ``Outcome.also``: these branches are given up; what they waited for is over, and their children end."""
        if not self.had_waits:
            return None
        store, run_id = self.services.store, self.run_id

        def operation(connection: Connection) -> None:
            for wait in store.waits(connection, [run_id]):
                if wait.path.startswith(prefixes):
                    store.delete_waits(connection, run_id, wait.path)
                    if wait.kind == "child":
                        control.cancel(store, connection, wait.name, now)

        return operation

    # --- branches ---------------------------------------------------------------------------------------------------

    async def concurrently(
        self,
        branch: Branch,
        group: str,
        jobs: Sequence[tuple[str, Callable[[], Awaitable[Any]]]],
        *,
        limit: int | None,
        on_error: OnError,
    ) -> list[Any]:
        """Run jobs (prefix of the branch, function) as branches of their own, at most ``limit`` at a time.

        With ``on_error="raise"`` the first failure cancels the others and is raised. Which one was first is put on
        record, because a resumed run answers from the journal in another order than the one in which things happened.
        """
        if not jobs:
            return []
        return await _Group(self, branch, group, jobs, min(limit or len(jobs), len(jobs)), on_error).run()

    def unvisited(self) -> StoredRow | None:
        """A recorded step that the finished workflow never asked for, if there is one."""
        for path, row in self.replay.items():
            if not path.startswith(tuple(self.abandoned)):
                return row
        return None


class _Group:
    """Concurrent branches, and the record of which one ended them."""

    def __init__(
        self,
        execution: Execution,
        branch: Branch,
        path: str,
        jobs: Sequence[tuple[str, Callable[[], Awaitable[Any]]]],
        workers: int,
        on_error: OnError,
    ) -> None:
        self.execution = execution
        self.branch = branch
        self.path = path
        self.jobs = jobs
        self.workers = workers
        self.on_error = on_error
        self.results: list[Any] = [None] * len(jobs)
        self.failed: tuple[int, Exception] | None = None
        self.next = 0
        self.running = workers

    async def run(self) -> list[Any]:
        row = self.execution.replay.pop(self.path, None)
        if row is not None:
            return await self._fail_as_recorded(int(row.output))
        self.execution.active += self.workers - 1  # the parent's token goes to one of them
        async with anyio.create_task_group() as tasks:
            for _ in range(self.workers):
                tasks.start_soon(self._work, tasks.cancel_scope)
        if self.failed is not None:
            await self._settle_failure(*self.failed)
        return self.results

    async def _work(self, scope: anyio.CancelScope) -> None:
        try:
            while self.next < len(self.jobs) and self.failed is None:
                index = self.next
                self.next += 1
                await self._run_job(index, scope)
        finally:
            self.running -= 1
            if self.running > 0:  # the last one gives the token back to the parent
                self.execution.active -= 1
                if self.execution.active == 0 and self.failed is None:
                    self.execution._consider_parking()  # pyright: ignore[reportPrivateUsage]

    async def _run_job(self, index: int, scope: anyio.CancelScope) -> None:
        prefix, job = self.jobs[index]
        task = self.execution.services.current_task()
        _position.set(Branch(self.execution, prefix, task, self.branch.agent, self.branch.sandbox))
        try:
            self.results[index] = await job()
        except Exception as error:
            self._note(index, error, scope)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | Unwinding) or is_our_cancellation(error):
                raise
            # asyncio lets any code raise CancelledError; a task group would drop it, and the branch with it.
            text = f"Branch {prefix} tried to end its task or the process: {error!r}."
            self._note(index, StepFailed(text, type(error).__name__), scope)

    def _note(self, index: int, error: Exception, scope: anyio.CancelScope) -> None:
        if self.on_error == "collect":
            self.results[index] = error
        elif self.failed is None:
            self.failed = (index, error)
            scope.cancel()

    async def _settle_failure(self, index: int, error: Exception) -> None:
        """Record that this branch was the first to fail, then raise its error as it is."""
        now = self.execution.services.clock.now()
        prefixes = tuple(prefix for prefix, _ in self.jobs)
        self.execution.abandoned += prefixes
        outcome = Outcome(also=self.execution.abandoning(prefixes, now))
        asked = f"branch {index} failed"
        await self.execution.record(self.path, "gather", "function", "", asked, now, outcome, str(index), None)
        raise error

    async def _fail_as_recorded(self, index: int) -> list[Any]:
        """Only the branch that failed first is played again: the others were cancelled and must not start anew."""
        self.execution.abandoned += [prefix for prefix, _ in self.jobs]
        if index < len(self.jobs):
            prefix, job = self.jobs[index]
            with stand(Branch(self.execution, prefix, self.branch.task, self.branch.agent, self.branch.sandbox)):
                await job()
        asked = f"{len(self.jobs)} branches, of which that one does not fail now"
        self.execution.diverge(self.path, f"a failure of branch {index}", asked)
        return await self.execution.halt()  # type: ignore[no-any-return]


def any_of(conditions: Iterable[str]) -> str:
    """The condition that holds when one of the conditions does."""
    different = sorted(set(conditions))
    return different[0] if len(different) == 1 else json.dumps(["any", different])


def parts_of(awaits: str) -> list[str]:
    """The conditions of which one has to hold: those that ``any_of`` was given."""
    if not awaits.startswith('["any"'):
        return [awaits]
    parts: list[str] = json.loads(awaits)[1]
    return parts


def _by_itself(wait: Blocked) -> int:
    """Of several reasons for a pause the one is told that may pass without anybody's doing."""
    return {"quota": 1, "budget": 2, "configuration": 3}.get(wait.name, 0)


PAUSING = ("model", "sandbox")
"""What the system waits for, and not the workflow: a run that is parked for it is paused."""

SIGNALLED = ("signal", "question", "approval", "interrupted")
FINAL_STATUSES = ("done", "failed", "cancelled")
_URGENCY = {"approval": 0, "interrupted": 1, "question": 2, "signal": 3, "child": 4, "timer": 5}


def call_digest(run_id: str, path: str) -> str:
    """What makes a tool call unique, whatever ids the provider repeats: 32 hexadecimal digits."""
    return hashlib.blake2b(f"{run_id}\n{path}".encode(), digest_size=16).hexdigest()


def call_id(run_id: str, path: str, name: str) -> str:
    """The id under which people and tools know a call."""
    return f"{name}-{call_digest(run_id, path)[:10]}"


def tool_finished(row: Sequence[Any], text: str | None) -> ToolCallFinished:
    """The event of a tool's journal row (values in the order of ``STEP_COLUMNS``); ``text`` is its output."""
    output = json.loads(text or "{}").get("content", "")
    return ToolCallFinished(
        run_id=row[0],
        seq=row[1],
        path=row[2],
        name=row[3],
        status=row[5],
        at=row[14],
        agent=row[15],
        call_id=call_id(row[0], row[2], row[3]),
        seconds=row[14] - row[13],
        output=preview(output, 400),
    )


def _finished(row: list[Any], seq: int) -> StepFinished:
    """The event of a journal row (values in the order of ``STEP_COLUMNS``)."""
    return StepFinished(
        run_id=row[0],
        seq=seq,
        path=row[2],
        name=row[3],
        kind=row[4],
        status=row[5],
        at=row[14],
        error=None if row[11] is None else payload.error_line(row[11]),
        attempts=row[12],
        seconds=row[14] - row[13],
        agent=row[15],
        model=row[16],
        input_tokens=row[17] or 0,
        output_tokens=row[18] or 0,
        cost_usd=row[19],
    )


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
