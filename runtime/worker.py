"""The part of a process that executes runs: claims them, drives them, notices what came for them, gives them back.

One loop looks at the database when it is poked (a run ended, something was started), when another process has
committed (SQLite's data version, asked ten times a second at 5 us), when the next timer is due, and once a second for
dead workers. Everything it asks is one indexed query for all runs together; parked runs are never asked one by one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.abc
from sqlalchemy import Connection

from ridethrough.runtime import control, lease, payload
from ridethrough.runtime.backend import Backend, is_our_cancellation
from ridethrough.runtime.clock import Clock
from ridethrough.runtime.companions import Companion, How
from ridethrough.runtime.control import Claim, Claimer
from ridethrough.runtime.errors import Diverged, Error, NotFound, RunCancelled, SerializationError, StoreError
from ridethrough.runtime.events import EventBase, RunFinished, RunPaused, RunStarted
from ridethrough.runtime.execution import SIGNALLED, Branch, Execution, Launcher, RunInfo, stand
from ridethrough.runtime.journal import Fenced, Heartbeat, Journal, Unit
from ridethrough.runtime.payload import INLINE_LIMIT
from ridethrough.runtime.source import find_workflow
from ridethrough.runtime.store import Store, StoredRow
from ridethrough.runtime.tables import FINAL
from ridethrough.runtime.testpoints import killpoint
from ridethrough.runtime.waking import Waker
from ridethrough.runtime.workflow import REGISTRY, Workflow

log = logging.getLogger("ridethrough")

POLL_SECONDS = 0.1
MENDED = ("quota", "configuration")
"""Why runs are paused that come back when something was mended."""

ORPHAN_SECONDS = 1.0
"""How often to look for dead workers."""


@dataclass(slots=True)
class Ended:
    """How a run ended, for those who wait for it."""

    status: str
    result: str | None = None
    result_ref: str | None = None
    error: str | None = None


@dataclass(slots=True)
class Awaited:
    """Somebody waits for the end of a run."""

    event: anyio.Event = field(default_factory=anyio.Event)
    ended: Ended | None = None
    broken: Exception | None = None
    waiters: int = 0


class Worker:
    """Executes runs of one database in one process; gives an ``Execution`` what it needs of the process."""

    def __init__(
        self,
        store: Store,
        backend: Backend,
        clock: Clock,
        *,
        launcher: Launcher,
        resources: Mapping[str, Any],
        open_router: Callable[[], Awaitable[Any]],
        open_companion: Callable[[str], Awaitable[Any]],
        concurrency: int = 100,
        lease_seconds: float = lease.LEASE_SECONDS,
        roots: set[str] | None = None,
        mended: Callable[[], None] = lambda: None,
    ) -> None:
        """``roots``: execute only these runs and their children; ``None``: whatever is due.

        ``mended`` is called when runs are taken up that had waited for a person to see to an account or a key.
        """
        self.store = store
        self.clock = clock
        self.launcher = launcher
        self.resources = resources
        self.concurrency = concurrency
        self.roots = roots
        self.row = lease.new_worker(lease.lease_clock(), lease_seconds)
        self.worker_id: str = self.row["id"]
        self.current_task = backend.current_task
        self.journal = Journal(store, backend.call_soon)
        self.resident: dict[str, Execution] = {}
        self.reserved = 0
        """Places that a claim under way may fill; ``start`` leaves them free."""
        self.mine: set[str] = set()
        """What this worker executes, is about to execute, or has not let go of yet."""
        self.awaited: dict[str, Awaited] = {}
        self.watchers: dict[str, list[Callable[[EventBase], None]]] = {}
        self.local: dict[str, Workflow[..., Any]] = {}
        self.companions: dict[str, Companion] = {}
        self._open_companion = open_companion
        self._open_router = open_router
        self._mended = mended
        self._lease_seconds = lease_seconds
        self._claimer = Claimer(store, self.worker_id, self._known, self.mine)
        self._poke = anyio.Event()
        self._claiming = anyio.Lock()
        self._registered = False
        self._next_wake: float | None = None
        self._last_orphans = -math.inf
        self._backlog = False
        self._serving = True
        self._claims = self._looking = False
        self._gone: anyio.Event | None = None
        self._tasks: anyio.abc.TaskGroup | None = None
        self._waker = Waker(
            store, self.journal, clock, open_router, self.resident, self._executable, self._places, self.poke
        )

    # --- services of executions -------------------------------------------------------------------------------------

    async def router(self) -> Any:
        """The model router."""
        return await self._open_router()

    async def companion(self, name: str) -> Any:
        """What another part of the house has beside this worker: see ``companions.py``."""
        return self.companions.get(name) or await self._open_companion(name)

    def spawn(self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None:
        """Run something in the background, as long as the worker lives."""
        assert self._tasks is not None
        self._tasks.start_soon(function, *args)

    def poke(self) -> None:
        """Look at the database now."""
        self._poke.set()

    def stir(self) -> None:
        """Something waits for models now."""
        self._waker.stir()

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self, tasks: anyio.abc.TaskGroup, *, serve: bool) -> None:
        """Register, and begin to take up runs (``serve``) or only to execute what is given."""
        self._tasks = tasks
        self.journal.start(Heartbeat(self._lease_seconds / 3, self._beat) if serve else None)
        self._claims = serve
        if serve:
            await self.journal.do(lambda connection: self.store.insert_worker(connection, self.row))
            self._registered = True
            self._start_looking()
            self.spawn(self._waker.watch)

    def _start_looking(self) -> None:
        """Begin to look at the database; a runtime that executes nothing does so only once somebody waits for a run."""
        if not self._looking:
            self._looking = True
            self.spawn(self._serve)

    def _beat(self, connection: Connection) -> None:
        """Renew the lease; a worker that was taken for dead registers again and finds its runs fenced."""
        expires = lease.lease_clock() + self._lease_seconds
        if not self.store.renew_worker(connection, self.worker_id, expires):
            log.warning("worker %s: its lease had run out; its runs may have been taken over", self.worker_id)
            self.store.insert_worker(connection, {**self.row, "expires_at": expires})

    async def stop(self, grace: float) -> None:
        """Let running steps finish for ``grace`` seconds, give all runs back, and sign off."""
        self._serving = False
        for execution in list(self.resident.values()):
            execution.hold_steps("release")
        await self._emptied(grace)
        for execution in list(self.resident.values()):
            execution.end("release")
        await self._emptied(grace + 1)
        await self._sign_off()

    async def _emptied(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            while self.resident:
                self._gone = anyio.Event()
                await self._gone.wait()

    async def _sign_off(self) -> None:
        try:
            await self.journal.do(self._leave_list)
        except Error as error:
            log.warning("worker %s could not sign off: %s", self.worker_id, error)

    def _leave_list(self, connection: Connection) -> None:
        self.journal.stop_beating()
        self.store.give_back(connection, self.worker_id, self.clock.now())
        self.store.delete_worker(connection, self.worker_id)

    # --- the loop ---------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        watch = self.store.database.watch()
        try:
            while self._serving:
                try:
                    await self._look()
                except StoreError as error:
                    log.warning("worker %s: %s", self.worker_id, error)
                    await anyio.sleep(ORPHAN_SECONDS)
                await self._wait(watch)
        finally:
            watch.close()

    async def _wait(self, watch: Any) -> None:
        while True:
            with anyio.move_on_after(POLL_SECONDS):
                await self.clock.wait(self._poke, self._next_wake)
                break
            if watch.changed() or time.monotonic() - self._last_orphans >= ORPHAN_SECONDS:
                break
        self._poke = anyio.Event()

    async def _look(self) -> None:
        """One look at everything that may concern this worker."""
        now, free = self.clock.now(), self.concurrency - len(self.mine)
        resident = list(self.resident)
        orphans = time.monotonic() - self._last_orphans >= ORPHAN_SECONDS
        found = await self.store.read(lambda connection: self._survey(connection, now, resident, orphans))
        if orphans:
            self._last_orphans = time.monotonic()
        for run_id, wanted in found.wanted.items():
            self._obey(run_id, wanted)
        for run_id, name in found.signals:
            self._deliver(run_id, name)
        for run_id in found.ended:
            self._announce_end(run_id)
        self._backlog = found.due and free <= 0
        self._next_wake = None if self._backlog else found.next_wake
        if found.due and free > 0:
            await self._claim(now, free)

    def _survey(self, connection: Connection, now: float, resident: list[str], orphans: bool) -> Survey:
        found = Survey(next_wake=self.store.next_wake(connection, now))
        if resident:
            found.wanted = self.store.wanted(connection, self.worker_id)
        blocked = [run_id for run_id in resident if self._waits_for(run_id, SIGNALLED)]
        if blocked:
            found.signals = self.store.open_signals(connection, blocked)
        asked = [*self._children(), *(run_id for run_id in list(self.awaited) if run_id not in self.resident)]
        if asked:
            statuses = self.store.statuses(connection, asked)
            found.ended = [run_id for run_id, status in statuses.items() if status in FINAL]
        found.due = (
            self._serving and self._claims and self._claimer.something_due(connection, now, self._roots(), orphans)
        )
        return found

    def _roots(self) -> list[str] | None:
        return None if self.roots is None else list(self.roots)

    def _waits_for(self, run_id: str, kinds: tuple[str, ...]) -> bool:
        execution = self.resident.get(run_id)
        return execution is not None and any(wait.kind in kinds for wait in list(execution.blocked.values()))

    def _children(self) -> list[str]:
        executions = list(self.resident.values())
        return [wait.name for run in executions for wait in list(run.blocked.values()) if wait.kind == "child"]

    def _obey(self, run_id: str, wanted: str) -> None:
        execution = self.resident.get(run_id)
        if execution is None:
            return
        if wanted == "cancel":
            execution.end("cancel")
        else:
            execution.hold_steps("pause")

    def _deliver(self, run_id: str, name: str) -> None:
        execution = self.resident.get(run_id)
        for wait in list(execution.blocked.values()) if execution else []:
            if wait.kind in SIGNALLED and wait.name == name:
                wait.event.set()

    def _announce_end(self, run_id: str) -> None:
        """A run has ended somewhere: wake its parents and those who wait here."""
        for execution in self.resident.values():
            for wait in list(execution.blocked.values()):
                if wait.kind == "child" and wait.name == run_id:
                    wait.event.set()
        awaited = self.awaited.get(run_id)
        if awaited is not None:
            awaited.event.set()

    # --- claiming ---------------------------------------------------------------------------------------------------

    def _places(self) -> int:
        """How many more runs there is room for."""
        return self.concurrency - len(self.mine) - self.reserved

    def _executable(self) -> tuple[dict[str, str], list[str] | None, list[str]]:
        """What this worker may execute, as ``Store.wake_awaiting`` takes it."""
        return self._known(), self._roots(), list(self._claimer.accepted)

    def _known(self) -> dict[str, str]:
        known = {**REGISTRY, **self.local}
        return {name: workflow.version for name, workflow in known.items()}

    async def _claim(self, now: float, limit: int, always: str | None = None) -> None:
        async with self._claiming:  # two claims at once would each take the other's for runs that this worker has lost
            roots, limit = self._roots(), min(limit, self.concurrency - len(self.mine))
            self.reserved = max(limit, 1)
            killpoint("claim.before")
            try:
                claims: list[Claim] = await self.journal.do(
                    lambda connection: self._claimer.claim(connection, now, limit, roots, always)
                )
                killpoint("claim.after")
                self.mine.update(claim.row.id for claim in claims)
            finally:
                self.reserved = 0
            try:
                loaded = await self.store.read(lambda connection: [self._load(connection, claim) for claim in claims])
            except BaseException:
                self.mine.difference_update(claim.row.id for claim in claims)  # held and not executed: claimed again
                raise
            if any(claim.row.status == "paused" and claim.row.pause_reason in MENDED for claim in claims):
                self._mended()  # somebody has resumed them, here or in another process
            for claim, rows in zip(claims, loaded, strict=True):
                execution = self.launch(claim.row, claim.fence, claim.seq, claim.recoveries, *rows)
                if claim.event is not None:
                    execution.publish(claim.event)
        self.poke()

    def _load(self, connection: Connection, claim: Claim) -> tuple[Any, ...]:
        if claim.seq == 0 and claim.row.started_at is None:  # a new one; a started one may have intents and waits
            return (), (), (), self._input(connection, claim.row)
        run_id, store = claim.row.id, self.store
        rows = store.journal(connection, run_id), store.waits(connection, [run_id]), store.intents(connection, run_id)
        # What a dead worker had tried in vain is in no row of the run.
        tried = store.count_failed(connection, run_id) if claim.recoveries > claim.row.recoveries else claim.row.tried
        return *rows, self._input(connection, claim.row), tried

    def _input(self, connection: Connection, row: StoredRow) -> str:
        if row.input_ref is None:
            return row.input or "{}"
        return (self.store.payload(connection, row.input_ref) or b"{}").decode("utf-8", "surrogatepass")

    def accept(self, root_id: str) -> None:
        """Execute the runs of this root, whatever the version of their workflows: somebody has resumed it by name."""
        self._claimer.accepted.add(root_id)
        if self.roots is not None:
            self.roots.add(root_id)

    async def take(self, run_id: str) -> None:
        """Claim one run now, whatever else is due. A process that only looks leaves it to those that execute."""
        if not self._registered:
            return
        if len(self.mine) < self.concurrency:  # else it is due, and taken when a place is free
            await self._claim(self.clock.now(), 0, run_id)

    def workflow(self, row: StoredRow) -> Workflow[..., Any]:
        """The definition of a run's workflow: of this process, or imported from where it was recorded.

        Raises:
            NotFound: it cannot be imported.
        """
        found = self.local.get(row.workflow) or REGISTRY.get(row.workflow)
        if found is not None:
            return found
        if row.source is None:
            raise NotFound(
                f"Run {row.id}: its workflow {row.workflow!r} was defined in an interactive session and cannot be "
                f"imported. Define it in this process before resuming."
            )
        return find_workflow(row.source, row.workflow, row.cwd)  # type: ignore[no-any-return]

    # --- driving ----------------------------------------------------------------------------------------------------

    def launch(
        self,
        row: Any,
        fence: int,
        seq: int,
        recoveries: int,
        steps: Any = (),
        waits: Any = (),
        intents: Any = (),
        text: str = "{}",
        tried: int = 0,
    ) -> Execution:
        """Begin to execute a run that this worker holds."""
        info = RunInfo(
            id=row.id,
            workflow=row.workflow,
            fence=fence,
            tenant=row.tenant,
            priority=row.priority,
            labels=payload.load_labels(row.labels),
            parent_id=row.parent_id,
            root_id=row.root_id,
            recoveries=recoveries,
            cwd=row.cwd,
            tried=tried,
            called=row.pause_reason is not None and row.pause_until is None,
        )
        execution = Execution(self, info, seq=seq, steps=steps, waits=waits, intents=intents)
        execution.watchers = self.watchers.setdefault(row.id, []) if row.id in self.watchers else []
        self.resident[row.id] = execution
        self.spawn(self._drive, execution, row, text)
        return execution

    async def _drive(self, execution: Execution, row: Any, text: str) -> None:
        ended: Ended | None = None
        failure: Exception | None = None
        try:
            with execution.scope:
                try:
                    ended = await self._execute(execution, row, text)
                except Exception as error:
                    failure = error
                except BaseException as error:  # one run must not end the process of all
                    if isinstance(error, KeyboardInterrupt) or is_our_cancellation(error):
                        raise
                    if execution.ending is None:
                        failure = RuntimeError(f"The workflow tried to end its task or the process: {error!r}.")
            if execution.ending is None:
                ended = ended or Ended("failed", error=payload.dump_error(failure or NotFound("no result")))
                await self._finish(execution, ended)
            else:
                await self._unwound(execution)
        except StoreError as error:
            self._give_up(execution, error)
        except Fenced:
            log.warning("run %s: another worker has taken it over; this one has written nothing", execution.run_id)
        finally:
            self.resident.pop(execution.run_id, None)
            if execution.ending is None:
                self._claimer.accepted.discard(execution.run_id)
            self.mine.discard(execution.run_id)
            for companion in self.companions.values():
                companion.left(execution.run_id, _how(execution))
            if self._gone is not None:
                self._gone.set()
            if self._backlog or execution.ending is not None:
                self.poke()  # a run that was woken while it unwound could not be claimed until now

    async def _execute(self, execution: Execution, row: Any, text: str) -> Ended:
        workflow = self.workflow(row)
        execution.code_names = workflow.code_names
        if execution.watchers and not execution.seq:
            execution.publish(RunStarted(run_id=row.id, at=self.clock.now(), workflow=row.workflow))
        arguments = self._arguments(execution, workflow, text)
        with stand(Branch(execution, "", self.current_task())):
            value = await workflow.function(**arguments)
        left = execution.unvisited()
        if left is not None and execution.ending is None:
            execution.diverge(
                left.path,
                f"{left.kind} {left.name} with {left.asked}",
                "nothing of that name: it was renamed or removed",
            )
        return Ended("done", result=workflow.result_codec.settle(value)[0])

    def _arguments(self, execution: Execution, workflow: Workflow[..., Any], text: str) -> dict[str, Any]:
        """The stored input as arguments.

        Raises:
            Diverged: the function takes others now; unlike a failure of the work this can be mended and resumed.
        """
        try:
            arguments = workflow.load_input(text)
            workflow.signature.bind(**arguments)
        except (SerializationError, TypeError) as error:
            asked = f"{workflow.name}{workflow.signature}"
            raise Diverged(
                f"Run {execution.run_id} cannot go on: its input {payload.preview(text)} does not fit {asked} any more "
                f"({error}). Nothing is lost. Put the parameters back (new ones need defaults) and resume.",
                recorded=payload.preview(text),
                asked=asked,
            ) from error
        return arguments

    async def _finish(self, execution: Execution, ended: Ended) -> None:
        """Put the end of a run on disk and tell those who wait."""
        now = self.clock.now()
        ending = {
            "b_id": execution.run_id,
            "b_status": ended.status,
            "b_result": ended.result,
            "b_ref": None,
            "b_error": ended.error,
            "b_at": now,
            "revivable": execution.ending == "diverged",
        }
        fence, info = execution.info.fence, execution.info
        large = ended.result is not None and len(ended.result) > INLINE_LIMIT
        killpoint("finish.before")
        if large or execution.had_waits or info.parent_id is not None:
            await self.journal.do(lambda connection: self._end(connection, info, ending, large, now), info.id, fence)
        else:
            await self.journal.write(Unit(info.id, fence, ending=ending))
        killpoint("finish.after")
        self._tell_end(execution, ended, now)

    def _end(self, connection: Connection, info: RunInfo, ending: dict[str, Any], large: bool, now: float) -> None:
        stored = dict(ending)  # this may run twice: a batch that failed is repeated unit by unit
        if large:
            data = ending["b_result"].encode("utf-8", "surrogatepass")
            stored["b_result"], stored["b_ref"] = None, payload.content_hash(data)
            self.store.insert_payload(connection, stored["b_ref"], data, now)
        self.store.finish_runs(connection.connection.cursor(), [stored])
        self.store.delete_waits(connection, info.id)
        if not ending.get("revivable"):
            self._cancel_children(connection, info.id, now)  # nobody waits for them any more
        if info.parent_id is not None:
            self.store.wake(connection, [info.parent_id], now)

    def _tell_end(self, execution: Execution, ended: Ended, now: float) -> None:
        execution.seq += 1
        line = None if ended.error is None else payload.error_line(ended.error)
        execution.publish(
            RunFinished(run_id=execution.run_id, seq=execution.seq, at=now, status=ended.status, error=line)
        )
        awaited = self.awaited.get(execution.run_id)
        if awaited is not None:
            awaited.ended = ended
            awaited.event.set()
        if execution.info.parent_id is not None:
            self._announce_end(execution.run_id)
            self.poke()

    async def _unwound(self, execution: Execution) -> None:
        """What follows when a run left memory without an end of its own."""
        run_id, now = execution.run_id, self.clock.now()
        if execution.ending == "cancel":
            error = RunCancelled(f"Run {run_id} was cancelled.")
            await self._finish(execution, Ended("cancelled", error=payload.dump_error(error)))
            await self.journal.do(lambda connection: self._cancel_children(connection, run_id, now))
        elif execution.ending == "diverged":
            assert execution.failure is not None
            await self._finish(execution, Ended("failed", error=payload.dump_error(execution.failure)))
        elif execution.ending == "release":
            await self.journal.do(lambda connection: self._release(connection, execution, now), "", -1)
        elif execution.ending == "broken":
            self._give_up(execution, execution.failure or StoreError("The database failed."))
        elif execution.ending == "park":
            reason, until = execution.parked_for
            execution.publish(RunPaused(run_id=run_id, seq=execution.seq, at=now, reason=reason, until=until))
            self.poke()

    def _cancel_children(self, connection: Connection, run_id: str, now: float) -> None:
        for child in self.store.children(connection, run_id):
            control.cancel(self.store, connection, child.id, now)

    def _release(self, connection: Connection, execution: Execution, now: float) -> None:
        row = self.store.run(connection, execution.run_id)
        if row is not None and row.fence == execution.info.fence and row.worker_id == self.worker_id:
            self.store.update_run(connection, row.id, status="queued", worker_id=None, wake_at=now)

    def _give_up(self, execution: Execution, error: Exception) -> None:
        """The database cannot be written: the run stays as it is on disk, and those who wait are told."""
        log.error("run %s stopped: %s", execution.run_id, error)
        self._claimer.postpone(execution.run_id)
        awaited = self.awaited.get(execution.run_id)
        if awaited is not None:
            awaited.broken = error
            awaited.event.set()

    # --- waiting for ends -------------------------------------------------------------------------------------------

    async def wait_end(self, run_id: str) -> Ended:
        """Wait until a run has ended, here or in any other process.

        Raises:
            NotFound: there is no such run.
            StoreError: it was being executed here and the database failed.
        """
        awaited = self.awaited.setdefault(run_id, Awaited())
        awaited.waiters += 1
        self._start_looking()
        try:
            while awaited.ended is None:
                if awaited.broken is not None:
                    raise awaited.broken
                if run_id not in self.resident:
                    row = await self.store.read(lambda connection: control.require(self.store, connection, run_id))
                    if row.status in FINAL:
                        return Ended(row.status, row.result, row.result_ref, row.error)
                with anyio.move_on_after(math.inf if self._registered else POLL_SECONDS):
                    await awaited.event.wait()
                if awaited.event.is_set() and awaited.ended is None and awaited.broken is None:
                    awaited.event = anyio.Event()  # not if another waiter has put a new one in its place already
            return awaited.ended
        finally:
            awaited.waiters -= 1
            if not awaited.waiters:
                self.awaited.pop(run_id, None)


def _how(execution: Execution) -> How:
    """How a run has left, in the words of ``companions.py``."""
    match execution.ending:
        case "park" | "diverged":
            return "parked"
        case "lost":
            return "lost"
        case "release" | "broken":
            return "released"
        case _:
            return "ended"


@dataclass(slots=True)
class Survey:
    """What one look at the database found."""

    wanted: dict[str, str] = field(default_factory=dict)
    signals: set[tuple[str, str]] = field(default_factory=set)
    ended: list[str] = field(default_factory=list)
    due: bool = False
    next_wake: float | None = None
