"""The hosts that a worker's sandboxes live on, each opened when somebody first needs it."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc

from ridethrough.runtime.config import Config
from ridethrough.runtime.errors import ConfigError, Error, SandboxUnavailable
from ridethrough.sandboxes.groups import single
from ridethrough.sandboxes.ownership import STORE_LABEL, store_id
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.tools.audit import Audit
from ridethrough.tools.claims import Claims

if TYPE_CHECKING:
    from ridethrough.sandboxes.pool import Pool
    from ridethrough.sandboxes.sandbox import Host

log = logging.getLogger("ridethrough")


class Quarter:
    """A host that is open, with its warm sandboxes; entered and left in a task of its own."""

    def __init__(self) -> None:
        self._host: Host | None = None
        self._pool: Pool | None = None
        self.error: Exception | None = None
        self.opened, self.closing, self.closed = anyio.Event(), anyio.Event(), anyio.Event()

    def serve(self, host: Host, pool: Pool) -> None:
        """It is open."""
        self._host, self._pool = host, pool
        self.opened.set()

    @property
    def host(self) -> Host:
        """Where sandboxes are."""
        assert self._host is not None
        return self._host

    @property
    def pool(self) -> Pool:
        """Those that are ready."""
        assert self._pool is not None
        return self._pool


class Quarters:
    """The hosts of one worker, by kind."""

    def __init__(
        self, claims: Claims, config: Config, audit: Audit, allow_local: bool, tasks: anyio.abc.TaskGroup
    ) -> None:
        """Nothing is opened yet."""
        self.claims = claims
        self.config = config
        self.audit = audit
        self.allow_local = allow_local
        self._tasks = tasks
        self._open: dict[str, Quarter] = {}

    def mark(self) -> str:
        """Names this database on each of its sandboxes."""
        return store_id(self.claims.store.database.path)

    def ready(self) -> list[str]:
        """The ids of all that are kept ready."""
        return [id for quarter in self._open.values() if quarter.opened.is_set() for id in quarter.pool.ids()]

    async def of(self, profile: SandboxProfile, host: str = "") -> Quarter:
        """Where a profile's sandbox lives: on the kind of host that it has (``host``), or that the profile wants.

        Raises:
            SandboxUnavailable: no Docker engine answers.
            ConfigError: the profile is no boundary, and that was not allowed.
        """
        kind = host.partition(":")[0] or profile.kind
        if kind == "local":
            self._require_allowed(profile)
            return await self.at("local")
        try:
            return await self.at("docker")
        except SandboxUnavailable as error:
            if host or not self.allow_local:  # one that is in Docker is waited for: it is not lost because of a restart
                raise
            log.warning("profile %s runs without a boundary, as --allow-local says: %s", profile.name, error)
            return await self.at("local")

    def _require_allowed(self, profile: SandboxProfile) -> None:
        if not self.allow_local:
            raise ConfigError(
                f"profile {profile.name} is of kind local, which is no boundary: what a model writes would run on this "
                f"machine as you. Say --allow-local (Runtime.open(allow_local=True)) if that is what you want"
            )

    async def at(self, kind: str) -> Quarter:
        """The host of a kind, ``docker`` or ``local``.

        Raises:
            SandboxUnavailable: it cannot be opened now; the next one who asks tries again.
        """
        quarter = self._open.get(kind)
        if quarter is None:
            quarter = self._open[kind] = Quarter()
            self._tasks.start_soon(self._own, kind, quarter)
        await quarter.opened.wait()
        if quarter.error is not None:
            raise quarter.error
        return quarter

    async def _own(self, kind: str, quarter: Quarter) -> None:
        from ridethrough.sandboxes.egress.egress import Egress
        from ridethrough.sandboxes.pool import Pool

        base = self.config.path.parent if self.config.path else None
        try:
            async with AsyncExitStack() as stack:
                egress = await stack.enter_async_context(Egress.open(on_decision=self.audit.note, base=base))
                host: Host = await stack.enter_async_context(_host(kind, egress.relay_for))
                pool = await stack.enter_async_context(
                    Pool.open(
                        host,
                        before=lambda id, profile: self.claims.register(host, id, profile),
                        after=lambda id: self.claims.forget(id, "thrown away"),
                        labels={STORE_LABEL: self.mark()},
                        linger=self.claims.unbound_seconds,
                    )
                )
                quarter.serve(host, pool)
                await quarter.closing.wait()
        except Exception as error:
            quarter.error = _told(error)
        finally:
            if self._open.get(kind) is quarter:
                del self._open[kind]
            quarter.opened.set()
            quarter.closed.set()

    async def close(self) -> None:
        """Close all; what was kept ready is removed."""
        for quarter in list(self._open.values()):
            quarter.closing.set()
            await quarter.closed.wait()


def _host(kind: str, relay_for: Any) -> Any:
    if kind == "local":
        from ridethrough.sandboxes.local import LocalHost

        return LocalHost.open(relay_for=relay_for)
    from ridethrough.sandboxes.docker import DockerHost

    return DockerHost.open(relay_for=relay_for)


def _told(error: Exception) -> Exception:
    """What those who want a sandbox are told."""
    inner = single(error)
    if isinstance(inner, Error):
        return inner
    log.error("sandboxes: unexpected", exc_info=inner)
    return SandboxUnavailable(f"the host of sandboxes failed: {inner!r}; it is opened anew by the next call")
