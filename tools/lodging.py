"""Runs and their sandboxes: who gets which, and what becomes of it when its run leaves or its worker dies.

A run has one sandbox of a profile, which its tools share (or one for each call, where a tool says so). It is on record
before it is created, and has an owner at every moment: the run that it belongs to, the worker that renews its lease.

    the run goes on, here or elsewhere on this host    the worker attaches; calls that had started give their results
    the run is parked                                  frozen at once; after ``sandbox_pause_seconds`` its workspace is
                                                       archived and it is removed; the next call restores the workspace
    the run has ended                                  removed
    its worker died                                    its lease runs out unless another worker takes the run up; then
                                                       as for a parked run
    all workers died                                   its own timer ends it

``claims.py`` has how a sandbox changes hands, ``reaper.py`` what every worker does for all, ``quarters.py`` the hosts.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import anyio
import anyio.abc

from ridethrough.runtime import control
from ridethrough.runtime.companions import Companion, How
from ridethrough.runtime.config import Config, nearest
from ridethrough.runtime.errors import ConfigError, SandboxGone
from ridethrough.runtime.store import StoredRow
from ridethrough.runtime.testpoints import killpoint
from ridethrough.sandboxes.profile import BUILT_IN, SandboxProfile
from ridethrough.tools.audit import Audit
from ridethrough.tools.claims import FREEZE_SECONDS, Claims, spec_of
from ridethrough.tools.quarters import Quarter, Quarters
from ridethrough.tools.reaper import Reaper

if TYPE_CHECKING:
    from ridethrough.runtime.runtime import Lodgings
    from ridethrough.runtime.worker import Worker
    from ridethrough.sandboxes.sandbox import Sandbox

log = logging.getLogger("ridethrough")

CLOSE_SECONDS: Final = 30.0
"""How long what has just ended is waited for when the worker closes; the next worker's reaper does the rest."""

OUTLIVES_SECONDS: Final = 24 * 3600.0
"""How long a run's sandbox lives on when no worker is there: killed in the evening, resumed in the morning."""


@asynccontextmanager
async def open_lodging(worker: Worker, lodgings: Lodgings) -> AsyncGenerator[Lodging]:
    """The sandboxes of a worker's runs, and its reaper. Nothing of Docker is touched before somebody needs it.

    Raises:
        ConfigError: a profile cannot be used.
    """
    profiles = _profiles(lodgings)
    async with anyio.create_task_group() as tasks:
        lodging = Lodging(worker, lodgings.config, profiles, lodgings.allow_local, tasks)
        tasks.start_soon(lodging.every_period, lodging.renew)
        tasks.start_soon(lodging.every_period, lodging.reap_once)
        try:
            yield lodging
        finally:
            with anyio.CancelScope(shield=True):
                await lodging.close()
            tasks.cancel_scope.cancel()


@dataclass(slots=True)
class Berth:
    """The place of one sandbox of a run; ``sandbox`` while this worker is attached to it, with its generation."""

    run_id: str
    key: str
    lock: anyio.Lock = field(default_factory=anyio.Lock)
    sandbox: Sandbox | None = None
    generation: int = 0
    told: bool = False
    """Whether a call has been told that the sandbox is gone."""

    @property
    def id(self) -> str:
        """The sandbox's."""
        return "" if self.sandbox is None else self.sandbox.id


class Lodging(Companion):
    """The sandboxes of one worker's runs."""

    def __init__(
        self,
        worker: Worker,
        config: Config,
        profiles: dict[str, SandboxProfile],
        allow_local: bool,
        tasks: anyio.abc.TaskGroup,
    ) -> None:
        """Use ``open_lodging``."""
        self.worker = worker
        self.config = config
        self.profiles = profiles
        self.claims = Claims(worker, config)
        self.audit = Audit(worker, self._owners)
        self.quarters = Quarters(self.claims, config, self.audit, allow_local, tasks)
        self.reaper = Reaper(self.claims, self.quarters, lambda: self._owners().keys())
        self._tasks = tasks
        self._berths: dict[str, dict[str, Berth]] = {}
        self._stop = anyio.Event()
        self._leaving = 0
        self._all_left = anyio.Event()

    # --- profiles ---------------------------------------------------------------------------------------------------

    def profile(self, wanted: str | SandboxProfile) -> SandboxProfile:
        """The profile of that name.

        Raises:
            ConfigError: there is none.
        """
        if isinstance(wanted, SandboxProfile):
            return wanted
        found = self.profiles.get(wanted)
        if found is None:
            raise ConfigError(
                f"there is no sandbox profile {wanted!r}: describe it in [sandboxes.{wanted}] of ridethrough.toml, or "
                f"in Runtime.open(sandboxes=...){nearest(wanted, self.profiles)}"
            )
        return found

    def key(self, wanted: str | SandboxProfile, call: str) -> str:
        """Which of a run's sandboxes is meant: a profile that is not the one of its name has others than that.

        Raises:
            ConfigError: there is no such profile.
        """
        profile = self.profile(wanted)
        name = profile.name
        if self.profiles.get(name) != profile:
            made_of = f"{spec_of(profile)}{sorted(profile.env.items())}{sorted(profile.inject)}"
            name += f"~{hashlib.blake2b(made_of.encode(), digest_size=4).hexdigest()}"
        return f"{name}/{call}" if call else name

    # --- getting one ------------------------------------------------------------------------------------------------

    async def sandbox(self, run_id: str, wanted: str | SandboxProfile, call: str = "") -> Sandbox:
        """The run's sandbox of a profile, or the one that belongs to ``call`` alone.

        Raises:
            SandboxGone: it was there and is no more; its workspace is lost. The next one who asks gets a new one.
            SandboxUnavailable: none can be started now.
            ConfigError: there is no such profile.
        """
        profile, berth = self.profile(wanted), self._berth(run_id, self.key(wanted, call))
        async with berth.lock:
            if berth.sandbox is None or berth.sandbox.ended:
                berth.sandbox = None
                berth.sandbox, berth.generation = await self._find_or_make(berth, profile)
                berth.told = False
            return berth.sandbox

    async def survives(self, run_id: str, wanted: str | SandboxProfile, call: str, sandbox_id: str | None) -> bool:
        """Whether the very sandbox in which an interrupted call had started is there, with what it knows of the call.

        Raises:
            SandboxUnavailable: that cannot be found out now.
            ConfigError: there is no such profile.
        """
        profile, berth = self.profile(wanted), self._berth(run_id, self.key(wanted, call))
        async with berth.lock:
            if berth.sandbox is not None and not berth.sandbox.ended:
                return berth.sandbox.id == sandbox_id
            row = await self._newest(berth)
            if row is None or row.id != sandbox_id or row.status not in ("running", "paused", "freezing", "archiving"):
                return False
            found = await self._attached(row, profile)
            if found is None:
                return False
            berth.sandbox, berth.generation = found
            return True

    def lost(self, run_id: str, key: str) -> None:
        """A call has been told that the sandbox is gone: the next one need not be told again."""
        berth = self._berths.get(run_id, {}).get(key)
        if berth is not None:
            berth.told = True

    def _berth(self, run_id: str, key: str) -> Berth:
        return self._berths.setdefault(run_id, {}).setdefault(key, Berth(run_id, key))

    async def _newest(self, berth: Berth) -> StoredRow | None:
        row = await self.claims.newest(berth.run_id, berth.key)
        return None if row is None else await self.claims.settled(row)

    async def _find_or_make(self, berth: Berth, profile: SandboxProfile) -> tuple[Sandbox, int]:
        while True:
            row = await self._newest(berth)
            if row is None or row.status in ("removed", "starting"):
                made = await self._made(berth, profile, None)
            elif row.status == "archived":
                made = await self._made(berth, profile, row)
            elif row.status == "lost":
                await self.claims.take(row, "removed", 0.0)
                if not berth.told:
                    raise _lost(row)
                continue
            else:
                made = await self._attached(row, profile)
            if made is not None:
                return made

    async def _attached(self, row: StoredRow, profile: SandboxProfile) -> tuple[Sandbox, int] | None:
        """Take up the sandbox that the run had with another worker, or before it was parked; ``None``: it is lost, or
        somebody was quicker."""
        quarter = await self.quarters.of(profile, row.host)
        generation = await self.claims.take(row, "running", self.config.sandbox_lease_seconds)
        if generation is None:
            return None
        if row.host != quarter.host.name:  # its own host reaps it
            await self.claims.lose(row.id, generation, f"it was on another host ({row.host})", live=True)
            return None
        try:
            sandbox = await quarter.host.attach(profile, row.id)
            await sandbox.outlive(OUTLIVES_SECONDS)
            return sandbox, generation
        except SandboxGone as error:
            await self.claims.lose(row.id, generation, error.message)
            return None

    async def _made(
        self, berth: Berth, profile: SandboxProfile, archived: StoredRow | None
    ) -> tuple[Sandbox, int] | None:
        """A new one, with the workspace that was archived if there is one."""
        quarter: Quarter = await self.quarters.of(profile)
        sandbox = await quarter.pool.acquire(profile)
        try:
            if archived is not None:
                snapshot = await self.claims.archive_of(archived)
                if snapshot is None:
                    why = "the archive of its workspace is missing from the database"
                    await self.claims.lose(archived.id, archived.generation, why)
                else:
                    await sandbox.restore(snapshot)
            killpoint("sandbox.before_bind")
            generation = await self.claims.bind(sandbox, berth.run_id, berth.key, archived)
            killpoint("sandbox.after_bind")
            await sandbox.outlive(OUTLIVES_SECONDS)
        except BaseException:
            await self._thrown_away(sandbox)
            raise
        if generation is None:
            await self._thrown_away(sandbox)
            return None
        return sandbox, generation

    async def _thrown_away(self, sandbox: Sandbox) -> None:
        with anyio.CancelScope(shield=True):
            await self._discard(sandbox, "its run could not take it")

    # --- when a run leaves ------------------------------------------------------------------------------------------

    def left(self, run_id: str, how: How) -> None:
        """A run is not executed here any more."""
        berths = list(self._berths.get(run_id, {}).values())
        if berths or (how == "ended" and self.reaper.anything):
            self._leaving += 1
            self._tasks.start_soon(self._leave_all, run_id, berths, how)

    async def _leave_all(self, run_id: str, berths: Sequence[Berth], how: How) -> None:
        try:
            for berth in berths:
                await _quietly(lambda berth=berth: self._leave(berth, how))  # type: ignore[misc]
            if how == "ended" and await self._is_over(run_id):
                await _quietly(lambda: self.reaper.end(run_id))
        finally:
            self._leaving -= 1
            if not self._leaving:
                self._all_left.set()

    async def _leave(self, berth: Berth, how: How) -> None:
        try:
            async with berth.lock:
                sandbox, berth.sandbox = berth.sandbox, None
                if sandbox is not None:
                    await self._let_go(berth, sandbox, how)
        finally:
            self._vacate(berth)

    async def _is_over(self, run_id: str) -> bool:
        """By what the database says of it."""
        store = self.worker.store
        row = await store.read(lambda connection: store.run(connection, run_id))
        return row is None or control.is_over(row.status, row.error)

    def _vacate(self, berth: Berth) -> None:
        """Forget a place that nobody uses or waits for."""
        berths = self._berths.get(berth.run_id)
        if berths is not None and berth.sandbox is None and not berth.lock.statistics().tasks_waiting:
            if not berth.lock.locked() and berths.get(berth.key) is berth:
                del berths[berth.key]
            if not berths:
                self._berths.pop(berth.run_id, None)

    async def _let_go(self, berth: Berth, sandbox: Sandbox, how: How) -> None:
        """By what the database says of the run: one that was taken for dead must not remove what another one uses."""
        store, run_id = self.worker.store, berth.run_id
        row = await store.read(lambda connection: store.run(connection, run_id))
        if row is None or control.is_over(row.status, row.error):
            await self._discard(sandbox, "its run has ended")
        elif how == "parked" or row.status == "failed":
            await self._freeze(berth, sandbox)
        else:
            await sandbox.detach()

    async def _freeze(self, berth: Berth, sandbox: Sandbox) -> None:
        """For a run that is parked, or has failed in a way that can be mended."""
        held = _Held(sandbox.id, berth.generation)
        generation = await self.claims.take(held, "freezing", FREEZE_SECONDS)
        if generation is None:  # it is another worker's already
            await sandbox.detach()
            return
        try:
            await sandbox.pause()
        except SandboxGone as error:
            await self.claims.lose(sandbox.id, generation, error.message)
            return
        expires = self.claims.now() + self.config.sandbox_pause_seconds
        await self.claims.change(sandbox.id, generation, status="paused", expires_at=expires)
        await sandbox.detach()

    async def settled(self, run_id: str, wanted: str | SandboxProfile, call: str, names: Sequence[str]) -> None:
        """What these calls gave is on disk: the sandbox may forget it. One that served a single call is removed."""
        try:
            berth = self._berths.get(run_id, {}).get(self.key(wanted, call))
            if berth is not None and call:
                await self._serve_no_more(berth)
            elif berth is not None and berth.sandbox is not None:
                await berth.sandbox.forget(names)
        except SandboxGone:
            return  # with all that it kept: the run has ended meanwhile
        except Exception as error:
            log.warning("sandbox of run %s: %s", run_id, error)

    async def _serve_no_more(self, berth: Berth) -> None:
        async with berth.lock:
            sandbox, berth.sandbox = berth.sandbox, None
            if sandbox is not None:
                await self._discard(sandbox, "its call has ended")
        self._vacate(berth)

    async def lose(self, run_id: str, wanted: str | SandboxProfile, call: str) -> None:
        """Remove a sandbox behind the back of those who use it: for drills."""
        sandbox = await self.sandbox(run_id, wanted, call)
        await (await self.quarters.of(self.profile(wanted))).host.remove(sandbox.id)

    async def _discard(self, sandbox: Sandbox, why: str) -> None:
        await sandbox.aclose()
        await self.claims.forget(sandbox.id, why)

    async def close(self) -> None:
        """Let go of everything: what belongs to runs stays for the next worker, what was kept ready is removed."""
        self._stop.set()
        with anyio.move_on_after(CLOSE_SECONDS):
            while self._leaving:
                self._all_left = anyio.Event()
                await self._all_left.wait()
        attached = [berth.sandbox for berths in self._berths.values() for berth in berths.values()]
        for sandbox in attached:
            if sandbox is not None:
                await _quietly(sandbox.detach)
        await self.quarters.close()
        await _quietly(self.audit.write)

    # --- all the while ----------------------------------------------------------------------------------------------

    def _owners(self) -> dict[str, str]:
        """The runs of the sandboxes that this worker is attached to."""
        return {
            berth.id: berth.run_id
            for berths in self._berths.values()
            for berth in berths.values()
            if berth.sandbox is not None
        }

    async def every_period(self, what: Callable[[], Awaitable[object]]) -> None:
        """Do something every ``reaper_seconds``. Renewing does not wait for the reaper: archiving may take long."""
        while True:
            await _quietly(what)
            if await self.worker.clock.wait(self._stop, self.claims.now() + self.config.reaper_seconds):
                return

    async def renew(self) -> None:
        """Keep the audit, and renew what this worker holds."""
        await self.audit.write()
        await self.claims.renew(list(self._owners()), self.quarters.ready())

    async def reap_once(self) -> int:
        """One round of the reaper; how many sandboxes were removed."""
        return await self.reaper.round()


@dataclass(frozen=True, slots=True)
class _Held:
    """A sandbox as this worker knows it."""

    id: str
    generation: int


def _profiles(lodgings: Lodgings) -> dict[str, SandboxProfile]:
    configured = {name: SandboxProfile.of(name, table) for name, table in lodgings.config.sandboxes.items()}
    for name, profile in lodgings.profiles.items():
        if not isinstance(profile, SandboxProfile):
            raise ConfigError(f"Runtime.open(sandboxes=...): {name!r} is no SandboxProfile but {profile!r}")
        configured[name] = profile
    return {**BUILT_IN, **configured}


def _lost(row: StoredRow) -> SandboxGone:
    return SandboxGone(
        f"sandbox {row.id} of run {row.run_id} is gone: {row.detail}. What was in its workspace is lost; "
        f"the next call gets a new, empty one"
    )


async def _quietly(what: Callable[[], Awaitable[object]]) -> None:
    """What looks after sandboxes must not end the worker, whatever goes wrong."""
    try:
        await what()
    except Exception as error:
        log.warning("sandboxes: %s", error, exc_info=log.isEnabledFor(logging.DEBUG))
