"""Who holds a sandbox: its row, and the one way in which it changes hands.

    starting --> running --> freezing --> paused --> archiving --> archived --> removed
                    ^                       |
                    +------- taken up ------+            lost (from anywhere) --told--> removed

Whoever does something to a sandbox takes it first: one statement that fails if somebody else was quicker. Each taking
raises ``generation``, and what is written afterwards is written only while that is still the row's: a worker that lost
a sandbox writes nothing about it, and a run that wakes while its sandbox is frozen or archived waits for the end of
that, or for the end of the lease of who began it.

``lost`` is what nobody has been told yet: the workspace is gone, and the next one who asks for it must learn that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Final

import anyio
from pydantic_core import from_json, to_json
from sqlalchemy import Connection

from ridethrough.runtime import payload
from ridethrough.runtime.config import Config
from ridethrough.runtime.store import StoredRow
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import Snapshot

if TYPE_CHECKING:
    from ridethrough.runtime.worker import Worker
    from ridethrough.sandboxes.sandbox import Host, Sandbox

BUSY: Final = ("freezing", "archiving")
"""Somebody does something to it that must not be disturbed while the lease holds."""

FREEZE_SECONDS: Final = 30.0
ARCHIVE_SECONDS: Final = 300.0
LOOK_SECONDS: Final = 0.05

_SECRET: Final = ("inject", "env")


class Claims:
    """The rows of sandboxes, as one worker writes them."""

    def __init__(self, worker: Worker, config: Config) -> None:
        """``config`` has the leases."""
        self.worker = worker
        self.store = worker.store
        self.config = config

    def now(self) -> float:
        """The worker's time."""
        return self.worker.clock.now()

    @property
    def unbound_seconds(self) -> float:
        """The lease of what no run has yet: nothing in it is worth waiting for its worker."""
        return 3 * self.config.reaper_seconds

    # --- reading ----------------------------------------------------------------------------------------------------

    async def newest(self, run_id: str, key: str) -> StoredRow | None:
        """The last sandbox that a run had under ``key``."""
        return await self.store.read(lambda connection: self.store.sandbox_of(connection, run_id, key))

    async def settled(self, row: StoredRow) -> StoredRow | None:
        """The row once nobody is busy with it any more."""
        while row.status in BUSY and row.expires_at > self.now():
            await anyio.sleep(LOOK_SECONDS)
            sandbox_id = row.id
            found = await self.store.read(lambda connection, id=sandbox_id: self.store.sandbox(connection, id))  # type: ignore[misc]
            if found is None:
                return None
            row = found
        return row

    # --- taking -----------------------------------------------------------------------------------------------------

    async def take(self, row: Any, status: str, seconds: float) -> int | None:
        """Hold it from here on, for ``seconds`` unless renewed; the generation, ``None`` if somebody was quicker.

        ``row`` is what it was seen as: anything with ``id`` and ``generation``.
        """
        values = {"status": status, "worker_id": self.worker.worker_id, "expires_at": self.now() + seconds}
        sandbox_id, generation = row.id, row.generation
        taken: bool = await self.worker.journal.do(
            lambda connection: self.store.claim_sandbox(connection, sandbox_id, generation, **values)
        )
        return generation + 1 if taken else None

    async def change(self, sandbox_id: str, generation: int, **values: Any) -> bool:
        """Write about one that is held; false if it is not any more."""
        return bool(
            await self.worker.journal.do(
                lambda connection: self.store.update_sandbox(connection, sandbox_id, generation, **values)
            )
        )

    async def lose(self, sandbox_id: str, generation: int, why: str, *, live: bool = False) -> bool:
        """It is gone, with its workspace; the next one who asks for it is to be told."""
        return await self.change(sandbox_id, generation, status="lost", live=live, detail=why)

    # --- a life -----------------------------------------------------------------------------------------------------

    async def register(self, host: Host, sandbox_id: str, profile: SandboxProfile) -> None:
        """On record before it is created, so that whatever happens next somebody knows of it."""
        now = self.now()
        row = {
            "id": sandbox_id,
            "profile": profile.name,
            "spec": spec_of(profile),
            "host": host.name,
            "worker_id": self.worker.worker_id,
            "status": "starting",
            "live": True,
            "key": "",
            "generation": 0,
            "created_at": now,
            "expires_at": now + self.unbound_seconds,
        }
        await self.worker.journal.do(lambda connection: self.store.insert_sandbox(connection, row))

    async def bind(self, sandbox: Sandbox, run_id: str, key: str, archived: StoredRow | None) -> int | None:
        """From here on it is the run's; the archive that it was made from is not needed any more.

        The generation; ``None`` if it was removed meanwhile, or somebody else has restored the archive.
        """
        proof: Mapping[str, Any] | None = getattr(sandbox, "proof", None)
        values: dict[str, Any] = {
            "run_id": run_id,
            "key": key,
            "status": "running",
            "worker_id": self.worker.worker_id,
            "runtime": sandbox.runtime,
            "proof": None if not proof else to_json(proof).decode(),
            "expires_at": self.now() + self.config.sandbox_lease_seconds,
        }
        store = self.store

        def write(connection: Connection) -> bool:
            row = store.sandbox(connection, sandbox.id)
            if row is None or row.generation != 0:
                return False
            if archived is not None and not store.claim_sandbox(
                connection, archived.id, archived.generation, status="removed", archive_ref=None, detail="restored"
            ):
                return False
            return store.claim_sandbox(connection, sandbox.id, 0, **values)

        return 1 if await self.worker.journal.do(write) else None

    async def keep_archive(self, sandbox_id: str, generation: int, data: bytes) -> bool:
        """Put the workspace into the database; false if it is not ours any more."""
        store, now = self.store, self.now()
        ref = payload.content_hash(data)

        def write(connection: Connection) -> bool:
            kept = store.update_sandbox(
                connection, sandbox_id, generation, status="archived", archive_ref=ref, detail="paused for long"
            )
            if kept:
                store.insert_payload(connection, ref, data, now)
            return kept

        return bool(await self.worker.journal.do(write))

    async def archive_of(self, row: StoredRow) -> Snapshot | None:
        """The workspace that was archived; ``None`` if it is missing from the database."""
        data = await self.store.read(lambda connection: self.store.payload(connection, row.archive_ref))
        return None if data is None else Snapshot(data=data, digest=row.archive_ref, files=0, profile=row.profile)

    async def forget(self, sandbox_id: str, why: str) -> None:
        """It is over: one of a run stays on record, one that was only kept ready does not."""
        await self.worker.journal.do(lambda connection: self.store.forget_sandbox(connection, sandbox_id, why))

    async def renew(self, held: Sequence[str], ready: Sequence[str]) -> None:
        """Say that this worker still has these: of runs, and kept ready."""
        me, now = self.worker.worker_id, self.now()

        def write(connection: Connection) -> None:
            self.store.renew_sandboxes(connection, held, me, now + self.config.sandbox_lease_seconds)
            self.store.renew_sandboxes(connection, ready, me, now + self.unbound_seconds)

        if held or ready:
            await self.worker.journal.do(write)


def spec_of(profile: SandboxProfile) -> str:
    """A profile as JSON, for who must attach to its sandbox later; what may be secret is left out."""
    return to_json({name: value for name, value in asdict(profile).items() if name not in _SECRET}).decode()


def profile_of(row: StoredRow) -> SandboxProfile:
    """The profile that a sandbox was made from, without its environment."""
    known = {field.name for field in fields(SandboxProfile)}
    values = {name: value for name, value in from_json(row.spec or "{}").items() if name in known}
    values |= {name: tuple(values[name]) for name in ("network", "private_hosts") if name in values}
    return SandboxProfile(**{"name": row.profile, **values})
