"""Removes the sandboxes that nobody owns, whoever made them; archives the workspaces of those that may be needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Final

from ridethrough.runtime import control
from ridethrough.runtime.errors import Error, SandboxError, SandboxGone, SandboxUnavailable
from ridethrough.runtime.store import StoredRow
from ridethrough.runtime.testpoints import killpoint
from ridethrough.sandboxes.ownership import STORE_LABEL
from ridethrough.tools.claims import ARCHIVE_SECONDS, BUSY, Claims, profile_of
from ridethrough.tools.quarters import Quarters

if TYPE_CHECKING:
    from ridethrough.sandboxes.sandbox import Host

log = logging.getLogger("ridethrough")

REMOVE_SECONDS: Final = 60.0
TOO_LARGE_SECONDS: Final = 6 * 3600.0
"""How long a workspace that cannot be archived stays frozen before that is tried again; it costs memory only."""


class Reaper:
    """One worker's share of looking after what all workers have made."""

    def __init__(self, claims: Claims, quarters: Quarters, attached: Callable[[], Set[str]]) -> None:
        """``attached`` gives the ids of sandboxes that this worker is using."""
        self.claims = claims
        self.store = claims.store
        self.quarters = quarters
        self._attached = attached
        self._warned: set[str] = set()
        self.anything = False
        """Whether there was anything on record when this worker last looked."""

    async def round(self) -> int:
        """Look once at everything on record; how many were removed."""
        rows = await self.store.read(self.store.sandboxes)
        self.anything = bool(rows)
        count = 0
        for kind in {row.host.partition(":")[0] for row in rows}:
            try:
                host = (await self.quarters.at(kind)).host
                count += await self._of(host) + await self._strays(host)
            except SandboxUnavailable as error:
                self._warn_once(f"sandboxes on record cannot be looked after: {error}")
        return count

    def _warn_once(self, text: str) -> None:
        """An engine that is down is down in every round."""
        if text not in self._warned:
            self._warned.add(text)
            log.warning("%s", text)

    async def end(self, run_id: str) -> None:
        """A run has ended here: remove what it has left frozen, or archived, without waiting for the next round."""
        rows = await self.store.read(lambda connection: self.store.sandboxes_of(connection, run_id))
        for row in rows:
            if row.live and row.id not in self._attached():
                host = (await self.quarters.at(row.host.partition(":")[0])).host
                if host.name == row.host:
                    await self._remove(host, row, ended=True)

    async def _of(self, host: Host) -> int:
        now, name = self.claims.now(), host.name
        rows = await self.store.read(lambda connection: self.store.ownerless_sandboxes(connection, name, now))
        count = 0
        for row in rows:
            if row.id not in self._attached():
                try:
                    count += await self._one(host, row, now)
                except SandboxUnavailable:
                    raise
                except Error as error:
                    log.warning("sandbox %s: %s", row.id, error)
        return count

    async def _one(self, host: Host, row: StoredRow, now: float) -> int:
        ended = row.run_id is not None and control.is_over(row.run_status, row.run_error)
        if not ended and row.expires_at >= now:
            return 0  # its run failed in a way that can be mended: it waits like a parked one
        if ended or row.run_id is None or row.status not in ("running", "paused", *BUSY):
            return await self._remove(host, row, ended)
        return await self._archive(host, row)

    async def _remove(self, host: Host, row: StoredRow, ended: bool) -> int:
        """What has an archive, or is to be told as lost, stays on record as that."""
        generation = await self.claims.take(row, row.status, REMOVE_SECONDS)
        if generation is None:
            return 0
        await host.remove(row.id)
        if row.status in ("archived", "lost") and not ended:
            await self.claims.change(row.id, generation, live=False)
        else:
            await self.claims.forget(row.id, "its run has ended" if ended else "nobody owned it")
        return 1

    async def _archive(self, host: Host, row: StoredRow) -> int:
        """Keep the workspace in the database and remove the rest; a run that wakes meanwhile waits for that."""
        generation = await self.claims.take(row, "archiving", ARCHIVE_SECONDS)
        if generation is None:
            return 0
        try:
            sandbox = await host.attach(profile_of(row), row.id)
            snapshot = await sandbox.snapshot()
        except SandboxGone as error:
            await self.claims.lose(row.id, generation, error.message)
            return 1
        except SandboxUnavailable:
            await self.claims.change(row.id, generation, status=row.status, expires_at=row.expires_at)
            raise
        except SandboxError as error:
            await self._leave_frozen(host, row, generation, error)
            return 0
        if not await self.claims.keep_archive(row.id, generation, snapshot.data):
            await sandbox.detach()
            return 0
        killpoint("sandbox.archived")
        await sandbox.aclose()
        await self.claims.change(row.id, generation, live=False)
        return 1

    async def _leave_frozen(self, host: Host, row: StoredRow, generation: int, error: Error) -> None:
        log.warning("sandbox %s of run %s stays frozen: it cannot be archived: %s", row.id, row.run_id, error)
        await host.pause(row.id)
        later = self.claims.now() + TOO_LARGE_SECONDS
        await self.claims.change(row.id, generation, status="paused", expires_at=later, detail=error.message)

    async def _strays(self, host: Host) -> int:
        """Remove what carries this database's mark and is not in it: its row went with a database that was put back."""
        mark = self.quarters.mark()
        found = [each for each in await host.found() if each.labels.get(STORE_LABEL) == mark]
        rows = await self.store.read(self.store.sandboxes)  # after the look: a row is there before its sandbox
        known = {row.id for row in rows}
        strays = [each.id for each in found if each.id not in known]
        for sandbox_id in strays:
            await host.remove(sandbox_id)
        return len(strays)
