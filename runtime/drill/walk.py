"""Walking a course: runs are put into the database, a process executes them, and is killed when it is time.

Whoever is killed is followed by the next one at once. The drill plays the operator, too: runs that only a person can
move on (a key that was refused, an account without credit) are resumed when what is at fault is over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import anyio
import anyio.abc
from sqlalchemy import Connection

from ridethrough.runtime import views
from ridethrough.runtime.drill.evidence import Course, Killed
from ridethrough.runtime.drill.ground import Ground
from ridethrough.runtime.drill.life import Life
from ridethrough.runtime.drill.plan import Plan
from ridethrough.runtime.follow import Start
from ridethrough.runtime.runtime import Runtime
from ridethrough.runtime.tables import FINAL

LOOK_SECONDS = 0.02
"""How often the runs are looked at, if anything was committed."""

CLOCK_SECONDS = 0.005
"""How often it is looked whether the first request has come."""

MENDED_SECONDS = 0.5
"""How long after the last fault whatever needs a person is resumed."""

AGAIN_SECONDS = 10.0
"""How long after that it is resumed once more."""

STOP_SECONDS = 5.0
"""How long a process may take to stop when all is over."""

BEGUN_SECONDS = 0.25
"""How often it is looked whether an attempt was made that no server has seen."""


class Watcher(Protocol):
    """Whoever is told what happens on the course."""

    def process(self, pid: int) -> None:
        """A process begins."""
        ...

    def clock(self) -> None:
        """The schedule begins."""
        ...

    def killed(self, pid: int) -> None:
        """A process was killed."""
        ...

    def operator(self, runs: int) -> None:
        """So many runs that wait for a person are resumed, as a user would do it."""
        ...

    def run(self, run_id: str, status: str, reason: str) -> None:
        """A run has come to another status, for a reason (of a pause)."""
        ...


@dataclass(frozen=True)
class Work:
    """What is executed: ``given`` is the input, if there is one (``has_input``); ids of runs begin with ``prefix``."""

    target: str
    prefix: str
    plan: Plan
    given: Any = None
    has_input: bool = False

    def start(self, number: int) -> Start:
        """A run, ready to be put into a database.

        Raises:
            NotFound, UsageError: The target cannot be imported, or is no workflow.
        """
        digits = len(str(self.plan.runs))
        run_id = f"{self.prefix}-{number:0{digits}}"
        start = Start(self.target, tenant=None, priority=None, labels=None, run_id=run_id)
        start.load()
        if self.has_input:
            start.give(self.given)
        return start


async def walk(
    ground: Ground, work: Work, *, kills: Sequence[float], mended: float | None, limit: float, watcher: Watcher
) -> Course:
    """Execute the runs to their end, as far as they come.

    Args:
        ground: Where.
        work: What.
        kills: When the process is killed, in seconds of the schedule.
        mended: When the schedule's last fault is over; ``None`` if never.
        limit: Seconds after which it is over in any case.
        watcher: Is told what happens.

    Raises:
        UsageError: The input does not fit the workflow.
    """
    config = ground.loaded()
    async with Runtime.open(config.database, config=config, serve=False) as runtime:
        walking = _Walk(ground, work, runtime, sorted(kills), mended, watcher)
        with anyio.move_on_after(limit) as scope:
            await walking.to_the_end()
    course = walking.course
    course.limited = scope.cancelled_caught
    course.ended = time.time()
    course.began = ground.clock.began
    course.missed = [] if course.limited else walking.kills[len(course.kills) :]
    return course


class _Walk:
    def __init__(
        self,
        ground: Ground,
        work: Work,
        runtime: Runtime,
        kills: Sequence[float],
        mended: float | None,
        watcher: Watcher,
    ) -> None:
        self.ground = ground
        self.work = work
        self.runtime = runtime
        self.kills = list(kills)
        self.mended = mended
        self.watcher = watcher
        self.course = Course()
        self._life: Life | None = None
        self._killing = False
        self._open: dict[str, views.Outlook | None] = {}
        self._told: dict[str, str] = {}
        self._resumed_at = -math.inf
        self._operator: anyio.Event | None = None
        self._begun = anyio.Event()
        self._next_life = anyio.Event()

    async def to_the_end(self) -> None:
        async with anyio.create_task_group() as tasks:
            await self._begin_runs()
            tasks.start_soon(self._lives, tasks)
            tasks.start_soon(self._start_clock)
            tasks.start_soon(self._kill)
            await self._until_nothing_moves(tasks)
            await self._stop()
            tasks.cancel_scope.cancel()

    # --- runs -------------------------------------------------------------------------------------------------------

    async def _begin_runs(self) -> None:
        """Begin as many as may."""
        plan, course = self.work.plan, self.course
        while plan.may_begin(len(course.ids), len(self._open), self.ground.clock()):
            start = self.work.start(len(course.ids) + 1)
            await start.put(self.runtime)
            course.ids.append(start.id)
            self._open[start.id] = None

    async def _until_nothing_moves(self, tasks: anyio.abc.TaskGroup) -> None:
        """Begin one run after the other, until all have ended or nobody can move them."""
        watch = self.runtime.store.database.watch()
        try:
            while True:
                if watch.changed() or self._is_waiting_for_time():
                    await self._look()
                await self._begin_runs()
                self._play_the_operator(tasks)
                over = self.work.plan.is_over(len(self.course.ids), self.ground.clock())
                if (over and not self._open) or self._is_stuck(over):
                    return
                await anyio.sleep(LOOK_SECONDS)
        finally:
            watch.close()

    def _is_waiting_for_time(self) -> bool:
        return any(outlook is not None and outlook.state == "timed" for outlook in self._open.values())

    async def _look(self) -> None:
        """See how the runs stand that have not ended."""
        ids = list(self._open)
        found = await self.runtime.store.read(lambda connection: self._outlooks(connection, ids))
        for run_id, (status, outlook) in found.items():
            self._open[run_id] = outlook
            if status in FINAL:
                del self._open[run_id]
            if self._told.get(run_id) != status:
                self._told[run_id] = status
                self.watcher.run(run_id, status, outlook.reason)

    def _outlooks(self, connection: Connection, ids: Sequence[str]) -> Mapping[str, tuple[str, views.Outlook]]:
        store, now = self.runtime.store, self.runtime.clock.now()
        known = store.statuses(connection, ids)
        return {run_id: (status, views.outlook(store, connection, run_id, now)) for run_id, status in known.items()}

    # --- people -----------------------------------------------------------------------------------------------------

    def _play_the_operator(self, tasks: anyio.abc.TaskGroup) -> None:
        """Resume what waits for a person because of models, from when they are well on."""
        age = self.ground.clock()
        if self.mended is None or age < max(self.mended + MENDED_SECONDS, self._resumed_at + AGAIN_SECONDS):
            return
        waiting = [run_id for run_id, outlook in self._open.items() if _waits_for_mending(outlook)]
        if waiting and self._operator is None:
            self._resumed_at = age
            self._operator = anyio.Event()
            self.watcher.operator(len(waiting))
            tasks.start_soon(self._resume, waiting, self._operator)

    async def _resume(self, ids: Sequence[str], done: anyio.Event) -> None:
        """Type ``ridethrough resume``: its process executes them, and asks anew what had been refused."""
        async with self.ground.operator(ids) as life, anyio.create_task_group() as reading:
            reading.start_soon(life.drain)
            await life.end()
        self._operator = None
        done.set()

    def _is_stuck(self, over: bool) -> bool:
        """Whether all that is left waits for a person whom the drill does not play."""
        full = over or len(self._open) >= self.work.plan.concurrency
        return full and bool(self._open) and all(self._is_stuck_for_good(each) for each in self._open.values())

    def _is_stuck_for_good(self, outlook: views.Outlook | None) -> bool:
        if outlook is None or outlook.state != "stuck":
            return False
        return self.mended is None or not _waits_for_mending(outlook)

    # --- processes --------------------------------------------------------------------------------------------------

    async def _lives(self, tasks: anyio.abc.TaskGroup) -> None:
        """One process after the other; one that ends by itself ends the course."""
        while True:
            async with self.ground.life(self.work.target) as life:
                tasks.start_soon(life.drain)
                self._life = life
                self._next_life.set()
                self.watcher.process(life.pid)
                status = await life.end()
            if not self._killing:
                self.course.trouble = f"the process ended with status {status}. {life.last_words()}".strip()
                tasks.cancel_scope.cancel()
                return
            self._killing = False

    async def _stop(self) -> None:
        """Let the processes end in order, so that they write what they know."""
        if self._operator is not None:
            with anyio.move_on_after(STOP_SECONDS):
                await self._operator.wait()
        life, self._life = self._life, None
        if life is not None and not life.ended:
            self._killing = True
            await life.stop(STOP_SECONDS)

    async def _start_clock(self) -> None:
        looked = time.monotonic()
        while not self.ground.asked:
            if time.monotonic() - looked > BEGUN_SECONDS:
                looked = time.monotonic()
                if await self._was_refused():
                    break
            await anyio.sleep(CLOCK_SECONDS)
        self.ground.start_clock()
        self.watcher.clock()
        self._begun.set()

    async def _was_refused(self) -> bool:
        """Whether there was an attempt that no server has seen: where nobody listens from the start."""
        store = self.runtime.store
        found = await store.read(lambda connection: [store.attempts(connection, each) for each in self.course.ids[:1]])
        return any(found)

    async def _kill(self) -> None:
        await self._begun.wait()
        for due in self.kills:
            await anyio.sleep(max(0.0, due - self.ground.clock()))
            life = await self._living()
            self._killing = True
            life.kill()
            self.course.kills.append(Killed(life.pid, time.time(), due))
            self.watcher.killed(life.pid)
            await life.end()

    async def _living(self) -> Life:
        """The process of now; between two of them, the next one."""
        while self._life is None or self._life.ended:
            self._next_life = anyio.Event()
            await self._next_life.wait()
        return self._life


def _waits_for_mending(outlook: views.Outlook | None) -> bool:
    """Whether a run waits for a person because of its models: a key, an account, a setting."""
    if outlook is None or outlook.state != "stuck" or outlook.reason == "budget":
        return False
    return bool(outlook.blockers) and all(blocker.wait.kind == "model" for blocker in outlook.blockers)
