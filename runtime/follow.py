"""Runs in the foreground: start or take up, follow to the end, and stop where only a person can go on.

What moves a run is read from the database and not from events: a signal, an answer or a wake-up may come from another
process at any moment, and the rows are what they all agree on. The events are for the eye.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import anyio
import anyio.abc
import click

from ridethrough.runtime import views
from ridethrough.runtime.display import Display, open_display
from ridethrough.runtime.errors import (
    Error,
    NotFound,
    RunBusy,
    RunConflict,
    SerializationError,
    StoreError,
    UsageError,
)
from ridethrough.runtime.options import FAILED, INTERRUPTED, OK, PARKED, USAGE, Options, put, say
from ridethrough.runtime.printing import answers, plain, summary, when
from ridethrough.runtime.runtime import GRACE_SECONDS, Runtime, new_id
from ridethrough.runtime.source import load_target
from ridethrough.runtime.store import Store
from ridethrough.runtime.tables import FINAL

if TYPE_CHECKING:
    from ridethrough.runtime.workflow import Workflow

LOOK_SECONDS = 0.1
"""How often the followed runs are looked at, if anything was committed."""

DRAIN_SECONDS = 1.0
"""How long the display may lag behind the end of a run."""

FOLLOWED = 40
"""The events of so many runs are shown at a time; what happens to others is told at their end."""

Verdict = Literal["ended", "parked"]


class Plan(Protocol):
    """What is to be executed in the foreground."""

    several: bool

    def roots(self) -> Sequence[str]:
        """The runs that this process may execute from the beginning."""
        ...

    async def begin(self, runtime: Runtime, follow: Follow) -> None:
        """Start or take up the runs, and tell ``follow`` about each."""
        ...


# --- what to run ----------------------------------------------------------------------------------------------------


class Start:
    """A new run, or the one that has its id already."""

    several = False

    def __init__(
        self,
        target: str,
        *,
        tenant: str | None,
        priority: int | None,
        labels: Mapping[str, str] | None,
        run_id: str | None,
    ) -> None:
        """``target`` is MODULE:WORKFLOW."""
        self.target = target
        self.workflow: Workflow[..., Any]
        self.id = run_id or ""
        self._named = run_id is not None
        self._given: Any = {}
        self._has_input = False
        self._tenant = tenant
        self._priority = priority
        self._labels = labels

    def load(self) -> None:
        """Import the workflow. Before the event loop starts, so that Ctrl-C ends an import that hangs.

        Raises:
            NotFound, UsageError: the target cannot be imported, or is no workflow.
        """
        found = load_target(self.target)
        workflow = getattr(found, "__workflow__", None)
        if workflow is None:
            raise UsageError(
                f"{self.target} is {type(found).__name__}, neither a workflow nor an agent. Decorate the function with "
                f"@workflow."
            )
        self.workflow = workflow
        if not self._named:
            self.id = new_id(self.workflow.name)

    def give(self, data: Any) -> None:
        """The input that was given."""
        self._given, self._has_input = data, True

    def roots(self) -> Sequence[str]:
        """Only the run itself."""
        return [self.id]

    async def begin(self, runtime: Runtime, follow: Follow) -> None:
        """Start the run; if there is one of that id, take it up."""
        if self._named and await self._exists(runtime):
            await follow.take_up(runtime, self.id)
        else:
            await self.put(runtime)
            await follow.new(runtime, self.id)

    async def put(self, runtime: Runtime) -> None:
        """Put the run into the database; an existing one of the same input stands.

        Raises:
            RunConflict: there is a run of that id with another input or workflow.
            UsageError: the input does not fit.
        """
        args, kwargs = self._arguments()
        if self._named and not self._has_input and await self._exists(runtime):
            return
        settings: dict[str, Any] = {"tenant": self._tenant, "priority": self._priority, "labels": self._labels}
        await runtime.start(self.workflow, *args, id=self.id, **settings, **kwargs)

    async def _exists(self, runtime: Runtime) -> bool:
        """Whether there is a run of that id; it has to be of this workflow, and of this input if one was given."""
        try:
            run = await runtime.describe(self.id, steps=False)
        except NotFound:
            return False
        if run.workflow != self.workflow.name:
            raise RunConflict(
                f"Run {self.id} exists already, of workflow {run.workflow} and not {self.workflow.name}. Give the new "
                f"run another --id."
            )
        if self._has_input:
            args, kwargs = self._arguments()
            asked = json.loads(self.workflow.bind(args, kwargs))
            if asked != run.input:
                raise RunConflict(
                    f"Run {self.id} exists already, with input {_short(run.input)}, not {_short(asked)}. Take it up "
                    f"without --input, or give the new run another --id."
                )
        return True

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, positional where that is possible: a parameter may be called ``id``."""
        try:
            bound = self.workflow.signature.bind(**self.workflow.accept(self._given))
        except SerializationError as error:
            hint = "" if self._has_input else " Give its input with --input JSON."
            raise UsageError(f"{error}{hint}") from error
        return bound.args, bound.kwargs


class TakeUp:
    """Runs that exist."""

    def __init__(self, ids: Sequence[str], *, several: bool) -> None:
        """``several``: go on with the others when one cannot be taken up, and put ids in front of results."""
        self.ids = ids
        self.several = several

    def roots(self) -> Sequence[str]:
        """None yet: ``Runtime.resume`` adds the root of each."""
        return []

    async def begin(self, runtime: Runtime, follow: Follow) -> None:
        """Take up one after the other."""
        for run_id in self.ids:
            try:
                await follow.take_up(runtime, run_id)
            except StoreError:
                raise
            except Error as error:
                if not self.several:
                    raise
                follow.refused(run_id, error)


def answer_of(run: views.RunView) -> Any:
    """What people want to see of a result: of an agent's run its output, without the conversation (`show` has that)."""
    if run.workflow.startswith("agent:") and isinstance(run.result, dict):
        return run.result.get("output")
    return run.result


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return plain(text if len(text) <= 200 else text[:199] + "…")


# --- following ------------------------------------------------------------------------------------------------------


@dataclass
class Follow:
    """The runs that are followed, and what became of them."""

    display: Display
    wait: bool
    positions: dict[str, int] = field(default_factory=dict[str, int])
    verdicts: dict[str, Verdict] = field(default_factory=dict[str, Verdict])
    failed: dict[str, Error] = field(default_factory=dict[str, Error])
    _told: dict[str, anyio.Event] = field(default_factory=dict[str, anyio.Event])
    """The runs whose events are shown; set when their end has been."""
    _seen: set[str] = field(default_factory=set[str])

    async def new(self, runtime: Runtime, run_id: str) -> None:
        """A run that has just been started."""
        self.positions[run_id] = 0
        self.display.begin(await runtime.describe(run_id, steps=False), 0)

    async def take_up(self, runtime: Runtime, run_id: str) -> None:
        """A run that exists: what it has done is counted, not shown again.

        Raises:
            NotFound, RunBusy, RunConflict: it cannot be taken up.
        """
        run = await runtime.describe(run_id)
        steps = len(run.steps or ())
        position = await runtime.store.read(lambda connection: runtime.store.last_seq(connection, run_id))
        await self._resume(runtime, run)
        self.positions[run_id] = position
        self.display.begin(run, steps)

    async def _resume(self, runtime: Runtime, run: views.RunView) -> None:
        if run.status == "done":
            self.display.note(f"{run.id} is done already; this is its result.")
            return
        try:
            await runtime.resume(run.id)
        except RunConflict as error:
            if run.status in FINAL:
                self.display.note(error.message)  # it ended for good: that is what will be reported
            elif (await runtime.describe(run.id, steps=False)).status not in FINAL:
                raise  # else this very process has taken it up by itself, and it has ended by now

    def refused(self, run_id: str, error: Error) -> None:
        """A run that cannot be taken up, among others that can."""
        self.failed[run_id] = error
        self.display.note(f"{run_id}: {error}")

    async def to_the_end(self, runtime: Runtime) -> None:
        """Return when every run has ended or is parked in a way that ends the following."""
        async with anyio.create_task_group() as tasks:
            for run_id in list(self.positions):
                tasks.start_soon(self._result, runtime, run_id)
                self._show_events(tasks, runtime, run_id, self.positions[run_id])
            await self._look_after(tasks, runtime)
            await self._drain()
            tasks.cancel_scope.cancel()

    async def _result(self, runtime: Runtime, run_id: str) -> None:
        """Learn the end at once; that of a database that failed too, which no row tells."""
        run = await runtime.get(run_id)
        try:
            await run.result()
        except StoreError:
            raise
        except Error:
            pass  # the view has it
        self.verdicts[run_id] = "ended"

    def _show_events(self, tasks: anyio.abc.TaskGroup, runtime: Runtime, run_id: str, after: int) -> None:
        if run_id not in self._seen and len(self._told) < FOLLOWED:
            self._seen.add(run_id)
            self._told[run_id] = anyio.Event()
            tasks.start_soon(self._events, runtime, run_id, after)

    async def _events(self, runtime: Runtime, run_id: str, after: int) -> None:
        async for event in runtime.events(run_id, after=after):
            self.display.event(event)
        self._told.pop(run_id).set()

    async def _drain(self) -> None:
        """Let the display come to the end of what has ended."""
        with anyio.move_on_after(DRAIN_SECONDS):
            for run_id, told in list(self._told.items()):
                if self.verdicts.get(run_id) == "ended":
                    await told.wait()

    async def _look_after(self, tasks: anyio.abc.TaskGroup, runtime: Runtime) -> None:
        """Watch the rows until no run is left that can move."""
        watch = runtime.store.database.watch()
        looked, due = 0.0, 0.0
        try:
            while open_runs := [run_id for run_id in self.positions if run_id not in self.verdicts]:
                now = time.time()
                if watch.changed() or now >= due or now - looked > 5:
                    looked, due = now, now + 5
                    for run_id, outlook in (await self._outlooks(runtime, open_runs)).items():
                        due = min(due, max(now + 1.0, outlook.until.timestamp()) if outlook.until else due)
                        self._judge(run_id, outlook)
                    await self._follow_children(tasks, runtime, open_runs)
                await anyio.sleep(LOOK_SECONDS)
        finally:
            watch.close()

    async def _outlooks(self, runtime: Runtime, ids: Sequence[str]) -> dict[str, views.Outlook]:
        now = runtime.clock.now()
        return await runtime.store.read(
            lambda connection: {run_id: views.outlook(runtime.store, connection, run_id, now) for run_id in ids}
        )

    def _judge(self, run_id: str, outlook: views.Outlook) -> None:
        self.display.awaiting(run_id, outlook)
        if outlook.state == "stuck" or (outlook.state == "timed" and not self.wait):
            self.verdicts.setdefault(run_id, "parked")

    async def _follow_children(self, tasks: anyio.abc.TaskGroup, runtime: Runtime, ids: Sequence[str]) -> None:
        """Show what child runs do, too."""
        if len(self._told) >= FOLLOWED or not self.display.shows_children:
            return
        children = await runtime.store.read(
            lambda connection: [child.id for run_id in ids for child in runtime.store.children(connection, run_id)]
        )
        for child in children:
            if child not in self.positions:
                self._show_events(tasks, runtime, child, 0)


# --- signals --------------------------------------------------------------------------------------------------------


class Interrupt:
    """Ctrl-C and SIGTERM. Once: let running steps finish. Twice: cut them off. Three times: leave as a crash would.

    ``KeyboardInterrupt`` would cancel whatever the main task is doing, the saving included.
    """

    def __init__(self, display: Display) -> None:
        """``display`` says what is going on."""
        self.came = anyio.Event()
        self.runtime: Runtime | None = None
        self._display = display
        self._count = 0

    async def listen(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Receive signals until cancelled."""
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                self._count += 1
                self._obey()

    def _obey(self) -> None:
        if self._count == 1:
            self._display.note(f"stopping: running steps may take {GRACE_SECONDS:g} s to finish (Ctrl-C: cut them off)")
            self.came.set()
        elif self._count == 2 and self.runtime is not None:
            for execution in list(self.runtime.worker.resident.values()):
                execution.end("release")
        elif self._count > 2:
            self._display.close()
            os._exit(INTERRUPTED)


# --- the whole ------------------------------------------------------------------------------------------------------


def foreground(options: Options, plan: Plan, *, wait: bool, allow_local: bool = False) -> int:
    """Execute ``plan`` and report; the exit status. ``allow_local``: also in sandboxes that are no boundary."""
    config = options.load()
    if allow_local:
        config = config.model_copy(update={"allow_local": True})
    display = open_display(options)
    try:
        follow, interrupted = anyio.run(_execute, options, config, plan, display, wait)
    finally:
        display.close()
    store = options.store()
    try:
        return Closing(options, store, follow, several=plan.several).report(interrupted)
    finally:
        store.close()


async def _execute(options: Options, config: Any, plan: Plan, display: Display, wait: bool) -> tuple[Follow, bool]:
    follow, interrupt = Follow(display, wait), Interrupt(display)
    async with anyio.create_task_group() as tasks:
        await tasks.start(interrupt.listen)
        async with Runtime.open(config.database, config=config, roots=plan.roots()) as runtime:
            interrupt.runtime = runtime
            await plan.begin(runtime, follow)
            await _until_interrupted(follow, runtime, interrupt)
        tasks.cancel_scope.cancel()
    return follow, interrupt.came.is_set()


async def _until_interrupted(follow: Follow, runtime: Runtime, interrupt: Interrupt) -> None:
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            await interrupt.came.wait()
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch)
        await follow.to_the_end(runtime)
        tasks.cancel_scope.cancel()


class Closing:
    """The last words: results on standard output, for the rest how to go on. Read after the runtime has closed,
    because a run may have ended while it did."""

    def __init__(self, options: Options, store: Store, follow: Follow, *, several: bool) -> None:
        """``several``: results have their ids in front."""
        self._options = options
        self._store = store
        self._follow = follow
        self._several = several

    def report(self, interrupted: bool) -> int:
        """Report on every run; the exit status of all together."""
        statuses = [self._one(run_id, interrupted) for run_id in self._follow.positions]
        statuses += [PARKED if isinstance(error, RunBusy) else USAGE for error in self._follow.failed.values()]
        order = (INTERRUPTED, FAILED, USAGE, PARKED)
        return next((status for status in order if status in statuses), OK)

    def _one(self, run_id: str, interrupted: bool) -> int:
        run = self._store.read_now(lambda connection: views.show_run(self._store, connection, run_id, steps=True))
        say(summary(run))
        if self._options.json:
            put(run.as_json())
        if run.status in FINAL:
            return self._ended(run)
        if interrupted and run_id not in self._follow.verdicts:
            say(f"saved; resume with: {self._options.command('resume', run_id)}")
            return INTERRUPTED
        self._parked(run_id)
        return PARKED

    def _ended(self, run: views.RunView) -> int:
        if run.status != "done":
            error = run.error
            say(f"error: run {run.id} {run.status}" + (f": {error.type}: {plain(error.message)}" if error else ""))
            return FAILED
        if not self._options.json:
            result = answer_of(run)
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
            if run.result is not None or self._several:
                click.echo(f"{run.id}: {text}" if self._several else text)
        return OK

    def _parked(self, run_id: str) -> None:
        """What is awaited, and the command that moves the run on."""
        now = time.time()
        outlook = self._store.read_now(lambda connection: views.outlook(self._store, connection, run_id, now))
        resume = self._options.command("resume", run_id)
        lines = list(dict.fromkeys(line for blocker in outlook.blockers for line in answers(blocker, self._options)))
        if outlook.state in ("works", "timed"):
            until = f" until {when(outlook.until)}" if outlook.until else ""
            say(f"{run_id} is parked ({outlook.reason}){until}; nothing is lost. Go on with: {resume}")
            for line in lines:
                say(f"  {line}")
            return
        what = {"operator": "paused by an operator"}.get(outlook.reason, f"waiting: {outlook.reason}")
        say(f"{run_id} is {what}; nothing is lost. To move it on:")
        for line in [*lines, resume]:
            say(f"  {line}")
