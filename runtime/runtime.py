"""The front door: open a database, start runs, look at them, change them."""

from __future__ import annotations

import base64
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from contextvars import Token
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, overload

import anyio
from sqlalchemy import Connection

from ridethrough.runtime import companions, control, payload, views
from ridethrough.runtime.backend import current_backend
from ridethrough.runtime.clock import Clock, SystemClock
from ridethrough.runtime.config import Config, load_config
from ridethrough.runtime.control import Decision
from ridethrough.runtime.errors import (
    ConfigError,
    Error,
    NotFound,
    RunBusy,
    RunCancelled,
    RunConflict,
    RunFailed,
    UsageError,
)
from ridethrough.runtime.events import Event
from ridethrough.runtime.execution import Branch, Launcher, position
from ridethrough.runtime.journal import Unit
from ridethrough.runtime.lease import LEASE_SECONDS
from ridethrough.runtime.payload import INLINE_LIMIT, digest_of
from ridethrough.runtime.store import Store, StoredRow
from ridethrough.runtime.worker import Ended, Worker
from ridethrough.runtime.workflow import Workflow, open_runtime

if TYPE_CHECKING:
    from ridethrough.runtime.router.router import Router

T = TypeVar("T")
DEFAULT_DATABASE = "sqlite:///ridethrough.db"
log = logging.getLogger("ridethrough")
GRACE_SECONDS = 5.0
"""How long running steps may go on when a runtime closes, before they are cut off (and repeated on resume)."""


@dataclass(frozen=True)
class Lodgings:
    """What ``Runtime.open`` was told of sandboxes: profiles by name, and whether one without a boundary will do."""

    config: Config
    profiles: Mapping[str, Any] = field(default_factory=dict[str, Any])
    allow_local: bool = False


class Owned:
    """Something that is entered and left in a task of its own, whoever asks for it first."""

    def __init__(self) -> None:
        self.opened, self.closing, self.closed = anyio.Event(), anyio.Event(), anyio.Event()
        self.error: Exception | None = None


class Run(Generic[T]):
    """A handle on a run; making one costs nothing and holds nothing."""

    def __init__(self, runtime: Runtime, run_id: str, workflow: Workflow[..., T] | None = None) -> None:
        """Use ``Runtime.start`` or ``Runtime.get``."""
        self._runtime = runtime
        self._workflow = workflow
        self.id = run_id

    async def view(self) -> views.RunView:
        """The run as ``show`` prints it, without steps.

        Raises:
            NotFound: it is gone.
        """
        return await self._runtime.describe(self.id, steps=False)

    @property
    def status(self) -> str:
        """``queued, running, paused, waiting, done, failed`` or ``cancelled``, as the database has it now.

        Raises:
            NotFound: it is gone.
        """
        store = self._runtime.store
        return str(store.read_now(lambda connection: control.require(store, connection, self.id)).status)

    async def result(self) -> T:
        """Wait for the end, in this process or any other, and return the result.

        Raises:
            RunFailed: the workflow raised; ``error_type`` and the message tell what.
            Diverged: its code has changed under it.
            RunCancelled: it was cancelled.
            StoreError: it was being executed here and the database failed; it can be resumed.
        """
        ended = await self._runtime.worker.wait_end(self.id)
        return await self._runtime.load_result(self.id, self._workflow, ended)  # type: ignore[no-any-return]

    def events(self, after: int | None = None) -> AsyncIterator[Event]:
        """The run's events, all or those after a position, until it ends. Attach at any time, any number of readers."""
        return self._runtime.events(self.id, after=after)

    async def cancel(self) -> None:
        """Cancel the run and its children."""
        await self._runtime.cancel(self.id)


class Runtime(Launcher):
    """A process's connection to a database of runs. Open it with ``async with Runtime.open(...) as runtime``."""

    def __init__(
        self,
        config: Config,
        database: str,
        *,
        resources: Mapping[str, Any],
        lodgings: Lodgings,
        concurrency: int,
        clock: Clock,
        serve: bool,
        roots: set[str] | None,
        grace: float,
    ) -> None:
        """Use ``Runtime.open``."""
        self.config = config
        self.store = Store(database, config.durability)
        self.clock = clock
        self._resources = resources
        self._lodgings = lodgings
        self._concurrency = concurrency
        self._serve = serve
        self._roots = roots
        self._grace = grace
        self._stack = AsyncExitStack()
        self._opened = False
        self._router: Router | None = None
        self._router_error: Exception | None = None
        self._router_opening: anyio.Event | None = None
        self._router_closing, self._router_closed = anyio.Event(), anyio.Event()
        self._companions: dict[str, Owned] = {}
        self._resumed = False
        self._token: Token[Launcher | None] | None = None
        self.worker: Worker

    @classmethod
    def open(
        cls,
        database: str | None = None,
        *,
        config: str | Path | Config | None = None,
        sandboxes: Mapping[str, Any] | None = None,
        allow_local: bool | None = None,
        resources: Mapping[str, Any] | None = None,
        concurrency: int = 100,
        clock: Clock | None = None,
        serve: bool = True,
        roots: Sequence[str] | None = None,
        grace: float = GRACE_SECONDS,
    ) -> Self:
        """Open a database, and take up the runs in it whose process died and whose workflows are defined here.

        Args:
            database: ``sqlite:///PATH``; the configuration's when left out.
            config: A ``ridethrough.toml`` (found in the working directory when left out) or a loaded one.
            sandboxes: Profiles by name (``SandboxProfile``), in place of the configuration's of the same names.
            allow_local: Whether code that a model wrote may run on this machine without a boundary: in profiles of
                kind ``local``, and where no Docker engine answers; as the configuration says when left out.
            resources: Live clients by name, for ``ToolContext.resource``; never stored.
            concurrency: How many runs may be in memory at once; the others are queued.
            clock: Another time than the machine's, for tests.
            serve: ``False``: only look and change, execute nothing.
            roots: Execute only these runs and their children.
            grace: Seconds that running steps may take to finish when the runtime closes.

        Raises:
            ConfigError: the configuration or the URL is wrong.
            StoreError: (on entering) the database cannot be used.
        """
        loaded = config if isinstance(config, Config) else load_config(Path(config) if config is not None else None)
        return cls(
            loaded,
            database or loaded.database or DEFAULT_DATABASE,
            resources=resources or {},
            lodgings=Lodgings(
                loaded, dict(sandboxes or {}), loaded.allow_local if allow_local is None else allow_local
            ),
            concurrency=concurrency,
            clock=clock or SystemClock(),
            serve=serve,
            roots=None if roots is None else set(roots),
            grace=grace,
        )

    async def __aenter__(self) -> Self:
        """Open the database and start the worker."""
        try:
            await self._open()
        except BaseException:  # there is no __aexit__ for what was not entered: leave no task, thread or connection
            await self._close(0.0)
            raise
        self._token = open_runtime.set(self)
        return self

    async def _open(self) -> None:
        backend = current_backend()
        await anyio.to_thread.run_sync(self.store.prepare)
        self.worker = Worker(
            self.store,
            backend,
            self.clock,
            launcher=self,
            resources=self._resources,
            open_router=self._open_router,
            open_companion=self._open_companion,
            concurrency=self._concurrency,
            lease_seconds=getattr(self.config, "lease_seconds", LEASE_SECONDS),
            roots=self._roots,
            mended=self._ask_again,
        )
        self._tasks = await self._stack.enter_async_context(anyio.create_task_group())
        self._opened = True
        # Their modules are imported before the worker takes up runs: between that and the caller's first line there is
        # no time to lose, or a run that the caller wants to take up has ended by then.
        prepared = {name: opener(self.worker, self._lodgings) for name, opener in companions.OPENERS.items()}
        await self.worker.start(self._tasks, serve=self._serve)
        if self._serve:
            for name, companion in prepared.items():
                await self._open_companion(name, companion)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give all runs back, close the database. Running steps get ``grace`` seconds, none if we were cancelled."""
        if self._token is not None:
            with_token, self._token = self._token, None
            try:
                open_runtime.reset(with_token)
            except ValueError:  # left in another context than entered, as pytest's fixtures do
                open_runtime.set(None)
        await self._close(0.0 if kind is not None and not issubclass(kind, Exception) else self._grace)

    async def _close(self, grace: float) -> None:
        try:
            if self._opened:
                with anyio.CancelScope(shield=True):
                    await self.worker.stop(grace)
                    await self._close_companions()
                    await self._close_router()
                self._tasks.cancel_scope.cancel()
            await self._stack.__aexit__(None, None, None)
        finally:
            with anyio.CancelScope(shield=True):
                if self._opened:
                    await anyio.to_thread.run_sync(self.worker.journal.close)
                await anyio.to_thread.run_sync(self.store.close)

    # --- the router -------------------------------------------------------------------------------------------------

    async def _open_router(self) -> Router:
        """The router lives in a task of its own: it is entered and left there, whoever asks for it first."""
        if self._router is None:
            if self._router_opening is None:
                self._router_opening = anyio.Event()
                self._tasks.start_soon(self._own_router, self._router_opening)
            await self._router_opening.wait()
        if self._router is None:
            raise self._router_error or ConfigError("the router could not be opened")
        return self._router

    async def _own_router(self, opened: anyio.Event) -> None:
        from ridethrough.runtime.ledger import DatabaseLedger
        from ridethrough.runtime.router.router import Router

        ledger = DatabaseLedger(self.worker.journal, self.store, worker_id=self.worker.worker_id)
        try:
            async with Router.open(self.config, ledger=ledger) as router:
                if self._resumed:  # others may have told it that an account is used up
                    router.ask_again()
                self._router = router
                opened.set()
                await self._router_closing.wait()
        except Exception as error:
            self._router_error, self._router_opening = error, None
        finally:
            ledger.close()
            self._router = None
            opened.set()
            self._router_closed.set()

    def _ask_again(self) -> None:
        """Somebody resumes a run: what an account or a key was refused for may be mended."""
        self._resumed = True
        if self._router is not None:
            self._router.ask_again()

    async def _close_router(self) -> None:
        if self._router is not None:
            self._router_closing.set()
            await self._router_closed.wait()

    # --- companions -------------------------------------------------------------------------------------------------

    async def _open_companion(
        self, name: str, prepared: AbstractAsyncContextManager[companions.Companion] | None = None
    ) -> Any:
        """As the router, each lives in a task of its own.

        Raises:
            Error: it cannot be opened; the next one who asks tries again.
        """
        owned = self._companions.get(name)
        if owned is None:
            owned = self._companions[name] = Owned()
            companion = prepared or companions.OPENERS[name](self.worker, self._lodgings)
            self._tasks.start_soon(self._own_companion, name, companion, owned)
        await owned.opened.wait()
        if owned.error is not None:
            raise owned.error
        return self.worker.companions[name]

    async def _own_companion(
        self, name: str, opening: AbstractAsyncContextManager[companions.Companion], owned: Owned
    ) -> None:
        try:
            async with opening as companion:
                self.worker.companions[name] = companion
                owned.opened.set()
                await owned.closing.wait()
        except Error as error:
            log.warning("%s: %s", name, error)
            owned.error = error
            self._companions.pop(name, None)
        finally:
            self.worker.companions.pop(name, None)
            owned.opened.set()
            owned.closed.set()

    async def _close_companions(self) -> None:
        for owned in list(self._companions.values()):
            owned.closing.set()
            await owned.closed.wait()

    # --- starting ---------------------------------------------------------------------------------------------------

    async def start(
        self,
        workflow: Any,
        *args: Any,
        id: str | None = None,
        tenant: str | None = None,
        priority: int | None = None,
        labels: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Run[Any]:
        """Start a run; it is on disk when this returns. The same id with the same input is the same run.

        Args:
            workflow: A function decorated with ``@workflow``, or an agent.
            args: Its arguments; ``kwargs`` are passed on too.
            id: The run's id; made up when left out.
            tenant: Whose run it is.
            priority: Runs of a higher one are taken first; 0 when left out.
            labels: Names and values to find the run by.

        Raises:
            RunConflict: there is a run of that id with another workflow or input.
            UsageError: called inside a workflow, or the arguments do not fit.
        """
        if isinstance(position(), Branch):
            raise UsageError(
                "runtime.start was called inside a workflow; on resume it would start again. Call the "
                "workflow itself: `await report('tides')` runs it as a child."
            )
        definition = _definition(workflow)
        text = definition.bind(args, kwargs)
        run_id = id if id is not None else new_id(definition.name)
        _check_id(run_id)
        self.worker.local[definition.name] = definition
        now = self.clock.now()
        here = (
            self._serve
            and len(self.worker.mine) + self.worker.reserved < self.worker.concurrency
            and (self._roots is None or run_id in self._roots)
        )
        values: dict[str, Any] = {
            "id": run_id,
            "root_id": run_id,
            "workflow": definition.name,
            "version": definition.version,
            "status": "running" if here else "queued",
            "input": text,
            "input_digest": digest_of(text),
            "source": definition.source,
            "cwd": _cwd(),
            "tenant": tenant,
            "priority": priority or 0,
            "labels": json.dumps(dict(labels)) if labels else None,
            "created_at": now,
        }
        values |= {"worker_id": self.worker.worker_id, "fence": 1, "started_at": now} if here else {"wake_at": now}
        if not await (self._start_here(run_id, values, text) if here else self._insert(run_id, values, text)):
            await self._same_run(run_id, values)
        elif not here:
            self.worker.poke()
        return Run(self, run_id, definition)

    async def _start_here(self, run_id: str, values: dict[str, Any], text: str) -> bool:
        """Insert a run that this process holds from the start, and begin; false if the id is taken.

        It is ``mine`` before the row says so, or the claimer would take it for one that was lost; and if the caller is
        cancelled in between, it is no longer, so that the claimer does take it.
        """
        mine = self.worker.mine
        if run_id in mine:  # another task is just starting it: the journal decides who was first
            return await self._insert(run_id, values, text)
        mine.add(run_id)
        launched = False
        try:
            if await self._insert(run_id, values, text):
                self.worker.launch(views.Fields(values), 1, 0, 0, text=text)
                launched = True
        finally:
            if not launched:
                mine.discard(run_id)
        return launched

    async def _insert(self, run_id: str, values: dict[str, Any], text: str) -> bool:
        """Insert a run; false if the id is taken."""
        try:
            if len(text) > INLINE_LIMIT:
                await self.worker.journal.do(lambda connection: self._insert_large(connection, values, text))
            else:
                await self.worker.journal.write(Unit(run_id, -1, run_row=control.new_run_row(values)))
        except RunConflict:
            return False
        return True

    def _insert_large(self, connection: Connection, values: dict[str, Any], text: str) -> None:
        if self.store.run(connection, values["id"]) is not None:
            raise RunConflict(f"Run {values['id']} exists already.")
        data = text.encode("utf-8", "surrogatepass")
        ref = payload.content_hash(data)
        row = {**values, "input": None, "input_ref": ref}
        self.store.insert_payload(connection, ref, data, values["created_at"])
        self.store.insert_runs(connection.connection.cursor(), [control.new_run_row(row)])

    async def _same_run(self, run_id: str, values: Mapping[str, Any]) -> None:
        row = await self.store.read(lambda connection: control.require(self.store, connection, run_id))
        if (row.workflow, row.input_digest) != (values["workflow"], values["input_digest"]):
            raise RunConflict(
                f"Run {run_id} exists already: {row.workflow} with input {payload.preview(row.input or '')}. "
                f"Give the new run another id, or start it with the same input to get the old one."
            )
        self.worker.accept(row.root_id)  # whoever starts it here wants it to go on here, whatever its version

    async def run_to_end(self, workflow: Any, arguments: Mapping[str, Any]) -> Any:
        """Start a run of its own and wait for its result."""
        run = await self.start(
            workflow, **{key: workflow.codecs[key].load(json.dumps(value)) for key, value in arguments.items()}
        )
        return await run.result()

    def child_starter(
        self, workflow: Workflow[..., Any], text: str, branch: Branch
    ) -> Callable[[Connection, str], None]:
        """The insertion of a child run, for the journal's thread."""
        info, now = branch.execution.info, self.clock.now()
        self.worker.local[workflow.name] = workflow

        def insert(connection: Connection, child_id: str) -> None:
            if self.store.run(connection, child_id) is not None:
                return
            values = {
                "id": child_id,
                "root_id": info.root_id,
                "workflow": workflow.name,
                "version": workflow.version,
                "status": "queued",
                "input": text,
                "input_digest": digest_of(text),
                "source": workflow.source,
                "cwd": info.cwd,
                "tenant": info.tenant,
                "priority": info.priority,
                "created_at": now,
                "wake_at": now,
                "labels": json.dumps(dict(info.labels)) if info.labels else None,
                "parent_id": info.id,
            }
            if len(text) > INLINE_LIMIT:
                self._insert_large(connection, values, text)
            else:
                self.store.insert_runs(connection.connection.cursor(), [control.new_run_row(values)])

        return insert

    # --- looking ----------------------------------------------------------------------------------------------------

    async def get(self, run_id: str) -> Run[Any]:
        """A handle on a run.

        Raises:
            NotFound: there is none of that id.
        """
        row = await self.store.read(lambda connection: control.require(self.store, connection, run_id))
        return Run(self, run_id, self._find_workflow(row))

    def _find_workflow(self, row: StoredRow) -> Workflow[..., Any] | None:
        try:
            return self.worker.workflow(row)
        except NotFound:
            return None  # its result is then plain data

    async def list(
        self, *, status: str | None = None, workflow: str | None = None, limit: int | None = 100
    ) -> Sequence[views.RunView]:
        """Runs, newest first."""
        return await self.store.read(
            lambda connection: views.list_runs(self.store, connection, status=status, workflow=workflow, limit=limit)
        )

    async def describe(self, run_id: str, *, steps: bool = True) -> views.RunView:
        """A run with its steps, as ``show --json`` prints it.

        Raises:
            NotFound: there is none of that id.
        """
        return await self.store.read(lambda connection: views.show_run(self.store, connection, run_id, steps=steps))

    async def load_result(self, run_id: str, workflow: Workflow[..., Any] | None, ended: Ended) -> Any:
        """The result of an ended run, or its error raised."""
        if ended.status == "done":
            text = ended.result
            if ended.result_ref is not None:
                data = await self.store.read(lambda connection: self.store.payload(connection, ended.result_ref or ""))
                text = (data or b"null").decode("utf-8", "surrogatepass")
            return workflow.result_codec.load(text or "null") if workflow else json.loads(text or "null")
        if ended.status == "cancelled":
            raise RunCancelled(f"Run {run_id} was cancelled.")
        raise _run_error(run_id, ended.error or "{}")

    def events(self, run_id: str, *, after: int | None = None, follow: bool = True) -> AsyncIterator[Event]:
        """A run's events; see ``Run.events``. ``follow=False`` ends at the newest one on disk."""
        from ridethrough.runtime.feed import follow_events

        return follow_events(self.worker, run_id, after or 0, follow)

    # --- changing ---------------------------------------------------------------------------------------------------

    @overload
    async def resume(self, run_id: str) -> Run[Any]: ...
    @overload
    async def resume(self, run_id: None = None) -> Sequence[Run[Any]]: ...
    async def resume(self, run_id: str | None = None) -> Run[Any] | Sequence[Run[Any]]:
        """Take up a run that crashed or is parked; without an id, every unfinished one that nobody holds.

        Raises:
            NotFound: there is no such run, or its workflow cannot be imported.
            RunBusy: another live process holds it.
            RunConflict: it has ended for good.
        """
        if run_id is None:
            ids = await self.store.read(lambda connection: views.unfinished(self.store, connection))
            return [run for item in ids if (run := await self._resume_if_possible(item)) is not None]
        me, now = self.worker.worker_id, self.clock.now()
        row = await self.store.read(lambda connection: self._free_run(connection, run_id, me))
        workflow = self.worker.workflow(row)  # imports it, if need be; not before it is known to be ours to execute
        await self.worker.journal.do(lambda connection: control.resume(self.store, connection, run_id, now, me))
        self._ask_again()
        self.worker.local.setdefault(row.workflow, workflow)
        self.worker.accept(row.root_id)
        if self._serve and run_id not in self.worker.resident:
            await self.worker.take(run_id)
        return Run(self, run_id, workflow)

    async def _resume_if_possible(self, run_id: str) -> Run[Any] | None:
        """One of many: a run that cannot be taken up must not keep the others."""
        try:
            return await self.resume(run_id)
        except (NotFound, RunBusy, RunConflict) as error:
            log.warning("run %s was not taken up: %s", run_id, error)
            return None

    def _free_run(self, connection: Connection, run_id: str, me: str) -> StoredRow:
        row = control.require(self.store, connection, run_id)
        control.require_free(self.store, connection, row, me)
        return row

    async def cancel(self, run_id: str) -> str:
        """Cancel a run and its children; its status now (``running`` until its worker has obeyed).

        Raises:
            NotFound: there is no such run.
        """
        return await self._change(lambda connection, now: control.cancel(self.store, connection, run_id, now))

    async def pause(self, run_id: str) -> str:
        """Pause a run until ``resume``; its status now (``running`` until its running steps have finished)."""
        return await self._change(lambda connection, now: control.pause(self.store, connection, run_id, now))

    async def signal(self, run_id: str, name: str, value: Any) -> None:
        """Send a run input from outside; it is kept until a ``wait_for`` of that name takes it.

        Raises:
            NotFound, RunConflict: there is no such run, or it has ended.
            SerializationError: the run waits for another type.
        """
        await self._change(lambda connection, now: control.signal(self.store, connection, run_id, name, value, now))

    async def approve(self, run_id: str, call_id: str, note: str | None = None) -> None:
        """Let a tool call that waits for approval run.

        Raises:
            NotFound: no such call waits.
        """
        await self._decide(run_id, call_id, Decision(True, note))

    async def deny(self, run_id: str, call_id: str, note: str | None = None) -> None:
        """Refuse a tool call that waits for approval; the model is told, with the note."""
        await self._decide(run_id, call_id, Decision(False, note))

    async def _decide(self, run_id: str, call_id: str, decision: Decision) -> None:
        await self._change(
            lambda connection, now: control.decide(self.store, connection, run_id, call_id, decision, now)
        )

    async def fork(self, run_id: str, at: str, *, id: str | None = None) -> Run[Any]:
        """A new run that keeps the steps of ``run_id`` before step ``at`` and goes on from there, with the code of now.

        Raises:
            NotFound: there is no such run or step.
        """
        fork_id = id or f"{run_id}-fork-{secrets.token_hex(3)}"
        _check_id(fork_id)
        await self._change(lambda connection, now: control.fork(self.store, connection, run_id, at, fork_id, now))
        return await self.get(fork_id)

    async def _change(self, operation: Callable[[Connection, float], T]) -> T:
        now = self.clock.now()
        result = await self.worker.journal.do(lambda connection: operation(connection, now))
        self.worker.poke()
        return result


def _definition(workflow: Any) -> Workflow[..., Any]:
    definition = getattr(workflow, "__workflow__", None)
    if not isinstance(definition, Workflow):
        raise UsageError(
            f"{getattr(workflow, '__name__', workflow)!r} is no workflow. Decorate it with @workflow, or give an agent."
        )
    return definition


def new_id(name: str) -> str:
    """A fresh run id that sorts by time: the workflow's name and 13 letters."""
    stamp = int(time.time() * 1000).to_bytes(6, "big")[1:] + secrets.token_bytes(3)
    return f"{name.replace(':', '-')}-{base64.b32hexencode(stamp).decode().rstrip('=').lower()}"


def _check_id(run_id: str) -> None:
    if not run_id or len(run_id) > 200 or any(letter.isspace() for letter in run_id):
        raise UsageError(f"Run id {run_id!r}: use 1 to 200 characters without spaces.")


def _cwd() -> str | None:
    try:
        return str(Path.cwd())
    except OSError:
        return None


def _run_error(run_id: str, text: str) -> Exception:
    error = payload.load_error(text)
    if type(error).__name__ in control.REVIVABLE and not isinstance(error, NotFound):
        return error
    summary = payload.error_summary(text)
    failed = RunFailed(f"Run {run_id} failed: {payload.error_line(text)}", run_id=run_id, error_type=summary["type"])
    failed.__cause__ = error
    return failed
