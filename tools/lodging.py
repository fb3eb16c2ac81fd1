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

Every worker reaps, whoever made them: see ``Lodging.reap``.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.abc
from pydantic_core import to_json
from sqlalchemy import Connection

from ridethrough.runtime import payload
from ridethrough.runtime.companions import Companion, How
from ridethrough.runtime.config import Config, nearest
from ridethrough.runtime.errors import ConfigError, Error, SandboxError, SandboxGone, SandboxUnavailable
from ridethrough.runtime.store import StoredRow
from ridethrough.runtime.tables import FINAL
from ridethrough.runtime.testpoints import killpoint
from ridethrough.sandboxes.ownership import STORE_LABEL, store_id
from ridethrough.sandboxes.profile import BUILT_IN, SandboxProfile

if TYPE_CHECKING:
    from ridethrough.runtime.runtime import Lodgings
    from ridethrough.runtime.worker import Worker
    from ridethrough.sandboxes.egress.audit import Decision
    from ridethrough.sandboxes.pool import Pool
    from ridethrough.sandboxes.sandbox import Host, RelayFor, Sandbox, Snapshot

log = logging.getLogger("ridethrough")

RUN_LABEL: Final = "ridethrough.run"


@asynccontextmanager
async def open_lodging(worker: Worker, lodgings: Lodgings) -> AsyncGenerator[Lodging]:
    """The sandboxes of a worker's runs, and its reaper. Nothing of Docker is touched before somebody needs it."""
    async with anyio.create_task_group() as tasks:
        lodging = Lodging(worker, lodgings, tasks)
        tasks.start_soon(lodging.reap)
        try:
            yield lodging
        finally:
            with anyio.CancelScope(shield=True):
                await lodging.close()
            tasks.cancel_scope.cancel()


@dataclass(slots=True)
class Berth:
    """The place of one sandbox of a run; ``sandbox`` while this worker is attached to it."""

    run_id: str
    key: str
    lock: anyio.Lock = field(default_factory=anyio.Lock)
    sandbox: Sandbox | None = None
    told: bool = False
    """Whether a call has been told that the sandbox is gone."""


class Quarters:
    """A host of sandboxes that is open, with its warm ones; entered and left in a task of its own."""

    def __init__(self) -> None:
        self.host: Host | None = None
        self.pool: Pool | None = None
        self.error: Exception | None = None
        self.opened, self.closing, self.closed = anyio.Event(), anyio.Event(), anyio.Event()


class Lodging(Companion):
    """The sandboxes of one worker's runs."""

    def __init__(self, worker: Worker, lodgings: Lodgings, tasks: anyio.abc.TaskGroup) -> None:
        """Use ``open_lodging``."""
        self.worker = worker
        self.config: Config = lodgings.config
        self.allow_local = lodgings.allow_local
        self.profiles = _profiles(lodgings)
        self._tasks = tasks
        self._berths: dict[tuple[str, str], Berth] = {}
        self._quarters: dict[str, Quarters] = {}
        self._stop = anyio.Event()
        self._audit: list[Decision] = []
        self._audited = anyio.Lock()
        self._warned: set[str] = set()

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
                f"there is no sandbox profile {wanted!r}{nearest(wanted, self.profiles)}. "
                f"Describe it in [sandboxes.{wanted}] of ridethrough.toml, or in Runtime.open(sandboxes=...)"
            )
        return found

    def key(self, wanted: str | SandboxProfile, call: str) -> str:
        """Which of a run's sandboxes is meant.

        Raises:
            ConfigError: there is no such profile.
        """
        return _key(self.profile(wanted), call)

    # --- getting one ------------------------------------------------------------------------------------------------

    async def sandbox(self, run_id: str, wanted: str | SandboxProfile, call: str = "") -> Sandbox:
        """The run's sandbox of a profile, or the one that belongs to ``call`` alone.

        Raises:
            SandboxGone: it was there and is no more; its workspace is lost. The next one who asks gets a new one.
            SandboxUnavailable: none can be started now.
            ConfigError: there is no such profile.
        """
        profile = self.profile(wanted)
        key = _key(profile, call)
        berth = self._berths.setdefault((run_id, key), Berth(run_id, key))
        async with berth.lock:
            if berth.sandbox is None or berth.sandbox.ended:
                berth.sandbox = None
                berth.sandbox = await self._find_or_make(berth, profile)
                berth.told = False
            return berth.sandbox

    def lost(self, run_id: str, key: str) -> None:
        """A call has been told that the sandbox is gone: the next one need not be told again."""
        berth = self._berths.get((run_id, key))
        if berth is not None:
            berth.told = True

    async def survives(self, run_id: str, wanted: str | SandboxProfile, call: str = "") -> bool:
        """Whether the sandbox of an interrupted call is still there, with what it knows of the call."""
        try:
            profile = self.profile(wanted)
            key = _key(profile, call)
            row = await self._newest(run_id, key)
            if row is None:
                return True  # the call had not come to have one
            if row.status == "archived":
                return False
            await self.sandbox(run_id, wanted, call)
        except SandboxGone:
            return False
        return True

    async def _newest(self, run_id: str, key: str) -> StoredRow | None:
        store = self.worker.store
        return await store.read(lambda connection: store.sandbox_of(connection, run_id, key))

    async def _find_or_make(self, berth: Berth, profile: SandboxProfile) -> Sandbox:
        row = await self._newest(berth.run_id, berth.key)
        quarters = await self._open(profile)
        if row is not None and row.status in ("running", "paused"):
            try:
                return await self._attach(row, profile, quarters)
            except SandboxGone:
                if not berth.told:
                    raise
        sandbox = await self._new(profile, quarters)
        try:
            archived = row if row is not None and row.status == "archived" else None
            if archived is not None:
                await sandbox.restore(await self._archive_of(archived, profile))
            killpoint("sandbox.before_bind")
            await self._bind(berth, sandbox, archived)
            killpoint("sandbox.after_bind")
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._discard(sandbox, "its run could not take it")
            raise
        return sandbox

    async def _attach(self, row: StoredRow, profile: SandboxProfile, quarters: Quarters) -> Sandbox:
        """Take up the sandbox that the run had with another worker, or before it was parked."""
        host = _there(quarters.host)
        if row.host != host.name:
            await self._change(row.id, status="abandoned")  # its own host reaps it
            raise _lost(row, f"it was on another host ({row.host})")
        try:
            sandbox = await host.attach(profile, row.id)
        except SandboxGone as error:
            await self._forget(row.id, error.message)
            raise _lost(row, error.message) from error
        expires = self._now() + self.config.sandbox_lease_seconds
        await self._change(row.id, status="running", worker_id=self.worker.worker_id, expires_at=expires)
        return sandbox

    async def _new(self, profile: SandboxProfile, quarters: Quarters) -> Sandbox:
        assert quarters.pool is not None
        return await quarters.pool.acquire(profile)

    async def _bind(self, berth: Berth, sandbox: Sandbox, archived: StoredRow | None) -> None:
        """From here on it is the run's; the archive that it was made from is not needed any more."""
        proof: Mapping[str, Any] | None = getattr(sandbox, "proof", None)
        values: dict[str, Any] = {
            "run_id": berth.run_id,
            "key": berth.key,
            "status": "running",
            "worker_id": self.worker.worker_id,
            "runtime": sandbox.runtime,
            "proof": None if not proof else to_json(proof).decode(),
            "expires_at": self._now() + self.config.sandbox_lease_seconds,
        }
        store = self.worker.store

        def bind(connection: Connection) -> bool:
            if archived is not None:
                store.update_sandbox(connection, archived.id, status="removed", archive_ref=None, detail="restored")
            return store.update_sandbox(connection, sandbox.id, **values)

        if not await self.worker.journal.do(bind):
            raise SandboxGone(f"sandbox {sandbox.id} was removed while it was being handed out; ask again")

    async def _archive_of(self, row: StoredRow, profile: SandboxProfile) -> Snapshot:
        from ridethrough.sandboxes.sandbox import Snapshot

        store = self.worker.store
        data = await store.read(lambda connection: store.payload(connection, row.archive_ref))
        if data is None:
            await self._change(row.id, status="removed", archive_ref=None, detail="the archive is missing")
            raise _lost(row, "the archive of its workspace is missing from the database")
        return Snapshot(data=data, digest=row.archive_ref, files=0, profile=profile.name)

    # --- hosts ------------------------------------------------------------------------------------------------------

    async def _open(self, profile: SandboxProfile) -> Quarters:
        """The host that a profile lives on.

        Raises:
            SandboxUnavailable: no Docker engine answers, or the profile has no boundary and none was allowed to be
                missing.
        """
        if profile.kind == "local":
            self._require_allowed(profile)
            return await self._quarter("local")
        try:
            return await self._quarter("docker")
        except SandboxUnavailable as error:
            if not self.allow_local:
                raise
            log.warning("profile %s runs without a boundary, as --allow-local says: %s", profile.name, error)
            return await self._quarter("local")

    def _require_allowed(self, profile: SandboxProfile) -> None:
        if not self.allow_local:
            raise ConfigError(
                f"profile {profile.name} is of kind local, which is no boundary: what a model writes would run on this "
                f"machine as you. Say --allow-local (Runtime.open(allow_local=True)) if that is what you want"
            )

    async def _quarter(self, kind: str) -> Quarters:
        quarters = self._quarters.get(kind)
        if quarters is None:
            quarters = self._quarters[kind] = Quarters()
            self._tasks.start_soon(self._own_host, kind, quarters)
        await quarters.opened.wait()
        if quarters.error is not None:
            raise quarters.error
        return quarters

    async def _own_host(self, kind: str, quarters: Quarters) -> None:
        from ridethrough.sandboxes.pool import Pool

        try:
            async with AsyncExitStack() as stack:
                host: Host = await stack.enter_async_context(await self._host(kind, stack))
                quarters.host = host
                quarters.pool = await stack.enter_async_context(
                    Pool.open(
                        host,
                        before=lambda id, profile: self._register(host, id, profile),
                        after=lambda id: self._forget(id, "thrown away"),
                        labels={STORE_LABEL: self._store_id()},
                        # Longer than its lease: a worker that looks when that is over still finds the workspace.
                        linger=self.config.sandbox_lease_seconds + 2 * self.config.reaper_seconds,
                    )
                )
                quarters.opened.set()
                await quarters.closing.wait()
        except Exception as error:
            quarters.error = error if isinstance(error, Error) else SandboxUnavailable(f"{kind}: {error!r}")
            self._quarters.pop(kind, None)
        finally:
            quarters.opened.set()
            quarters.closed.set()

    async def _host(self, kind: str, stack: AsyncExitStack) -> Any:
        relay_for = await self._relays(stack)
        if kind == "local":
            from ridethrough.sandboxes.local import LocalHost

            return LocalHost.open(relay_for=relay_for)
        from ridethrough.sandboxes.docker import DockerHost

        return DockerHost.open(relay_for=relay_for)

    async def _relays(self, stack: AsyncExitStack) -> RelayFor | None:
        if not any(profile.network for profile in self.profiles.values()):
            return None
        from ridethrough.sandboxes.egress.egress import Egress

        base = self.config.path.parent if self.config.path else None
        egress = await stack.enter_async_context(Egress.open(on_decision=self._decided, base=base))
        return egress.relay_for

    async def _register(self, host: Host, id: str, profile: SandboxProfile) -> None:
        """On record before it is created, so that whatever happens next somebody knows of it."""
        now = self._now()
        row = {
            "id": id,
            "profile": profile.name,
            "host": host.name,
            "worker_id": self.worker.worker_id,
            "status": "starting",
            "live": True,
            "key": "",
            "created_at": now,
            "expires_at": now + self._unbound_seconds,
        }
        store = self.worker.store
        await self.worker.journal.do(lambda connection: store.insert_sandbox(connection, row))

    def _store_id(self) -> str:
        return store_id(self.worker.store.database.path)

    # --- when a run leaves ------------------------------------------------------------------------------------------

    def left(self, run_id: str, how: How) -> None:
        """A run is not executed here any more."""
        for berth in [berth for (owner, _), berth in self._berths.items() if owner == run_id]:
            self._tasks.start_soon(self._leave, berth, how)

    async def _leave(self, berth: Berth, how: How) -> None:
        async with berth.lock:
            sandbox, berth.sandbox = berth.sandbox, None
            if sandbox is None:
                return
            try:
                if how == "parked":
                    await self._freeze(sandbox)
                elif how == "ended" and await self._has_ended(berth.run_id):
                    await self._discard(sandbox, "its run has ended")
                else:
                    await sandbox.detach()
            except Error as error:
                log.warning("sandbox %s of run %s: %s", sandbox.id, berth.run_id, error)
            finally:
                if not berth.lock.statistics().tasks_waiting:
                    self._berths.pop((berth.run_id, berth.key), None)

    async def _has_ended(self, run_id: str) -> bool:
        """As the database has it: a worker that was taken for dead must not remove what another one uses."""
        store = self.worker.store
        row = await store.read(lambda connection: store.run(connection, run_id))
        return row is None or row.status in FINAL

    async def _freeze(self, sandbox: Sandbox) -> None:
        await sandbox.pause()
        await self._change(sandbox.id, status="paused", expires_at=self._now() + self.config.sandbox_pause_seconds)
        await sandbox.detach()

    async def settled(self, run_id: str, wanted: str | SandboxProfile, call: str, names: Sequence[str]) -> None:
        """What these calls gave is on disk: the sandbox may forget it. One that served a single call is removed."""
        berth = self._berths.get((run_id, _key(self.profile(wanted), call)))
        if berth is None:
            return
        try:
            if call:
                await self._serve_no_more(berth)
            elif berth.sandbox is not None:
                await berth.sandbox.forget(names)
        except SandboxGone:
            return  # with all that it kept: the run has ended meanwhile
        except Error as error:
            log.warning("sandbox of run %s: %s", run_id, error)

    async def _serve_no_more(self, berth: Berth) -> None:
        async with berth.lock:
            sandbox, berth.sandbox = berth.sandbox, None
            if sandbox is not None:
                await self._discard(sandbox, "its call has ended")
        self._berths.pop((berth.run_id, berth.key), None)

    async def lose(self, run_id: str, wanted: str | SandboxProfile, call: str) -> None:
        """Remove a sandbox behind the back of those who use it: for drills."""
        profile = self.profile(wanted)
        sandbox = await self.sandbox(run_id, profile, call)
        await _there((await self._open(profile)).host).remove(sandbox.id)

    async def _discard(self, sandbox: Sandbox, why: str) -> None:
        await sandbox.aclose()
        await self._forget(sandbox.id, why)

    async def _forget(self, sandbox_id: str, detail: str) -> None:
        store = self.worker.store
        await self.worker.journal.do(lambda connection: store.forget_sandbox(connection, sandbox_id, detail))

    async def _change(self, sandbox_id: str, **values: Any) -> None:
        store = self.worker.store
        await self.worker.journal.do(lambda connection: store.update_sandbox(connection, sandbox_id, **values))

    async def close(self) -> None:
        """Let go of everything: what belongs to runs stays for the next worker, what was kept ready is removed."""
        self._stop.set()
        for berth in list(self._berths.values()):
            if berth.sandbox is not None:
                await _quietly(berth.sandbox.detach)
        await self._keep_audit()
        for quarters in list(self._quarters.values()):
            quarters.closing.set()
            await quarters.closed.wait()

    # --- the reaper -------------------------------------------------------------------------------------------------

    async def reap(self) -> None:
        """Renew what this worker holds, and remove what nobody wants, every ``reaper_seconds``."""
        while True:
            try:
                await self._keep_audit()
                await self.reap_once()
            except Error as error:
                log.warning("the sandboxes could not be looked after: %s", error)
            if await self.worker.clock.wait(self._stop, self._now() + self.config.reaper_seconds):
                return

    async def reap_once(self) -> int:
        """One round; how many were removed."""
        store = self.worker.store
        rows = await store.read(store.sandboxes)
        if not rows:
            return 0
        await self._renew()
        count = 0
        for kind in {row.host.partition(":")[0] for row in rows}:
            try:
                host = _there((await self._quarter(kind)).host)
            except SandboxUnavailable as error:
                self._warn_once(f"sandboxes on record cannot be looked after: {error}")
                continue
            count += await self._reap_host(host) + await self._reap_strays(host)
        return count

    def _warn_once(self, text: str) -> None:
        """An engine that is down is down in every round."""
        if text not in self._warned:
            self._warned.add(text)
            log.warning("%s", text)

    async def _renew(self) -> None:
        held = [berth.sandbox.id for berth in self._berths.values() if berth.sandbox is not None]
        ready = [id for quarters in self._quarters.values() if quarters.pool is not None for id in quarters.pool.ids()]
        store, me, now = self.worker.store, self.worker.worker_id, self._now()

        def renew(connection: Connection) -> None:
            store.renew_sandboxes(connection, held, me, now + self.config.sandbox_lease_seconds)
            store.renew_sandboxes(connection, ready, me, now + self._unbound_seconds)

        if held or ready:
            await self.worker.journal.do(renew)

    @property
    def _unbound_seconds(self) -> float:
        """The lease of what no run has yet: nothing in it is worth waiting for its worker."""
        return 3 * self.config.reaper_seconds

    async def _reap_host(self, host: Host) -> int:
        store, now = self.worker.store, self._now()
        rows = await store.read(lambda connection: store.ownerless_sandboxes(connection, host.name, now))
        mine = {berth.sandbox.id for berth in self._berths.values() if berth.sandbox is not None}
        count = 0
        for row in rows:
            if row.id not in mine:
                count += await self._reap_one(host, row)
        return count

    async def _reap_strays(self, host: Host) -> int:
        """Remove what carries this database's mark and is not in it: its row went with a database that was put back."""
        store, mark = self.worker.store, self._store_id()
        found = [each for each in await host.found() if each.labels.get(STORE_LABEL) == mark]
        rows = await store.read(store.sandboxes)  # after the look at the host: a row is there before its sandbox
        known = {row.id for row in rows}
        strays = [each.id for each in found if each.id not in known]
        for sandbox_id in strays:
            await host.remove(sandbox_id)
        return len(strays)

    async def _reap_one(self, host: Host, row: StoredRow) -> int:
        """Remove one; the workspace of a run that may go on is archived first."""
        if row.run_id is not None and not row.ended and row.status in ("running", "paused"):
            if not await self._take(row):
                return 0  # somebody was quicker, or the run goes on
            try:
                await self._archive(host, row)
                return 1
            except SandboxGone as error:
                await self._forget(row.id, error.message)
                return 1
            except SandboxError as error:
                log.warning("sandbox %s of run %s is kept: it cannot be archived: %s", row.id, row.run_id, error)
                await _quietly(lambda: host.pause(row.id))
                return 0
        await host.remove(row.id)
        await self._forget(row.id, "its run has ended" if row.ended else "nobody owned it")
        return 1

    async def _take(self, row: StoredRow) -> bool:
        """Claim an ownerless sandbox for as long as archiving takes, unless somebody else has."""
        store, now = self.worker.store, self._now()

        def take(connection: Connection) -> bool:
            found = store.sandbox(connection, row.id)
            if found is None or found.expires_at != row.expires_at or found.worker_id != row.worker_id:
                return False
            return store.update_sandbox(
                connection,
                row.id,
                worker_id=self.worker.worker_id,
                expires_at=now + self.config.sandbox_pause_seconds,
            )

        return bool(await self.worker.journal.do(take))

    async def _archive(self, host: Host, row: StoredRow) -> None:
        """Keep the workspace in the database and remove the rest."""
        profile = self.profiles.get(row.profile) or SandboxProfile(name=row.profile)
        sandbox = await host.attach(profile, row.id)
        snapshot = await sandbox.snapshot()
        store, now = self.worker.store, self._now()

        def keep(connection: Connection) -> None:
            ref = payload.content_hash(snapshot.data)
            store.insert_payload(connection, ref, snapshot.data, now)
            store.update_sandbox(connection, row.id, status="archived", archive_ref=ref, detail="paused for long")

        await self.worker.journal.do(keep)
        killpoint("sandbox.archived")
        await sandbox.aclose()
        await self._change(row.id, live=False)

    # --- the audit of the network -----------------------------------------------------------------------------------

    def _decided(self, decision: Decision) -> None:
        self._audit.append(decision)

    async def _keep_audit(self) -> None:
        """Put on record what sandboxes asked of their proxy, in batches."""
        async with self._audited:
            batch, self._audit = self._audit, []
            if not batch:
                return
            owners = {berth.sandbox.id: berth.run_id for berth in self._berths.values() if berth.sandbox is not None}
            store = self.worker.store

            def keep(connection: Connection) -> None:
                store.insert_egress(connection, [_audit_row(connection, decision) for decision in batch])

            def _audit_row(connection: Connection, decision: Decision) -> dict[str, Any]:
                run_id = owners.get(decision.sandbox_id)
                if run_id is None and (row := store.sandbox(connection, decision.sandbox_id)) is not None:
                    run_id = row.run_id
                return {
                    "sandbox_id": decision.sandbox_id,
                    "run_id": run_id,
                    "at": decision.at,
                    "method": decision.method,
                    "host": decision.host,
                    "port": decision.port,
                    "allowed": decision.allowed,
                    "reason": decision.reason,
                    "bytes_in": decision.bytes_in,
                    "bytes_out": decision.bytes_out,
                    "status": decision.status,
                }

            await self.worker.journal.do(keep)

    def _now(self) -> float:
        return self.worker.clock.now()


def _profiles(lodgings: Lodgings) -> dict[str, SandboxProfile]:
    configured = {name: SandboxProfile.of(name, table) for name, table in lodgings.config.sandboxes.items()}
    for name, profile in lodgings.profiles.items():
        if not isinstance(profile, SandboxProfile):
            raise ConfigError(f"Runtime.open(sandboxes=...): {name!r} is no SandboxProfile but {profile!r}")
        configured[name] = profile
    return {**BUILT_IN, **configured}


def _key(profile: SandboxProfile, call: str) -> str:
    """Which of a run's sandboxes it is."""
    return f"{profile.name}/{call}" if call else profile.name


def _there(host: Host | None) -> Host:
    assert host is not None
    return host


def _lost(row: StoredRow, why: str) -> SandboxGone:
    return SandboxGone(
        f"sandbox {row.id} of run {row.run_id} is gone: {why}. What was in its workspace is lost; "
        f"the next call gets a new, empty one"
    )


async def _quietly(what: Callable[[], Awaitable[object]]) -> None:
    try:
        await what()
    except Error as error:
        log.warning("sandboxes: %s", error)
