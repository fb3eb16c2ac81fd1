"""A tool call and the sandbox that it runs in: waiting for one, going on in it after a crash, letting it go."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from ridethrough.runtime.errors import ConfigError, Error, SandboxUnavailable
from ridethrough.runtime.execution import Blocked, Branch, Outcome
from ridethrough.runtime.payload import preview
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.tools.call_sandbox import CallSandbox

if TYPE_CHECKING:
    from ridethrough.sandboxes.sandbox import Sandbox
    from ridethrough.tools.lodging import Lodging
    from ridethrough.tools.tool import Tool

FIRST_WAIT: Final = 2.0
LONGEST_WAIT: Final = 60.0
"""Seconds between two tries to start a sandbox where none can be started."""


class CallBerth:
    """The place of one call in a sandbox of its run."""

    def __init__(self, branch: Branch, tool: Tool[..., Any], path: str, call_id: str, outcome: Outcome) -> None:
        """Nothing is started yet. ``path`` and ``call_id`` are the call's."""
        self.execution = branch.execution
        self.wanted = _wanted(tool.sandbox or branch.sandbox)
        self.call = call_id if tool.sandbox_scope == "call" else ""
        self.call_id = call_id
        self.waiting = f"{path}/sandbox#1"
        self.outcome = outcome
        self.sandbox_id: str | None = None
        """The sandbox itself, once it is known."""
        self._used: list[CallSandbox] = []

    async def _lodging(self) -> Lodging:
        found: Lodging = await self.execution.services.companion("sandboxes")
        return found

    async def open(self) -> None:
        """Have the sandbox, however long it has to be waited for: an engine that is down is no answer of the tool.

        Raises:
            SandboxGone: the run had one and it is lost.
        """
        path, waited = self.waiting, 0
        while True:
            try:
                found = await (await self._lodging()).sandbox(self.execution.run_id, self.wanted, self.call)
                self.sandbox_id = found.id
                break
            except (SandboxUnavailable, ConfigError) as error:
                await self._wait(path, error, waited)
                waited += 1
        if path in self.execution.waits or waited:
            self.outcome.also = self.execution.closing(path)

    async def _wait(self, path: str, error: Error, waited: int) -> None:
        """Block the branch; the run is parked where nothing else goes on, and taken up again when it is due."""
        execution, now = self.execution, self.execution.services.clock.now()
        known, mends_itself = execution.waits.get(path), isinstance(error, SandboxUnavailable)
        since = now if known is None else known.since
        due = now + min(LONGEST_WAIT, max(FIRST_WAIT * 2**waited, (now - since) / 2)) if mends_itself else None
        name, text = "sandbox" if mends_itself else "configuration", preview(error.message, 500)
        if known is None and not waited:
            await execution.open_wait(path, "sandbox", name, due, question=text)
        else:
            store, run_id = execution.services.store, execution.run_id
            changes = {"name": name, "due_at": due, "question": text}
            await execution.do(lambda connection: store.update_wait(connection, run_id, path, **changes))
        await execution.block(Blocked(path, "sandbox", name, due))

    async def survives(self, sandbox_id: str | None) -> bool:
        """After a crash: whether the sandbox of its intent is still there, with what it knows of this call."""
        while True:
            try:
                lodging = await self._lodging()
                return await lodging.survives(self.execution.run_id, self.wanted, self.call, sandbox_id)
            except (SandboxUnavailable, ConfigError) as error:
                await self._wait(self.waiting, error, 0)

    def sandbox(self, life: int, attempt: int) -> CallSandbox:
        """The sandbox as this attempt sees it: what a person lets start again gets new names, and so does a retry."""
        again, retry = "" if life == 1 else f"-again{life}", "" if attempt == 1 else f"-{attempt}"
        find = self._find()
        profile = self.wanted if isinstance(self.wanted, SandboxProfile) else SandboxProfile(name=self.wanted)
        prefix = f"{self.call_id}{again}{retry}"
        made = CallSandbox(profile, find, prefix, self._stays, self._on_gone)
        self._used.append(made)
        return made

    def _find(self) -> Callable[[], Awaitable[Sandbox]]:
        async def find() -> Sandbox:
            return await (await self._lodging()).sandbox(self.execution.run_id, self.wanted, self.call)

        return find

    async def _on_gone(self) -> None:
        lodging = await self._lodging()
        lodging.lost(self.execution.run_id, lodging.key(self.wanted, self.call))

    def _stays(self) -> bool:
        """Whether a call that is cut off here is to go on there: another worker will ask for it."""
        return self.execution.ending in ("release", "lost", "broken")

    async def lose(self) -> None:
        """For drills: the sandbox is removed, as somebody from outside would do it."""
        await (await self._lodging()).lose(self.execution.run_id, self.wanted, self.call)

    def close(self) -> None:
        """The result is on disk: the sandbox need not keep it any longer."""
        if self.call or any(used.started for used in self._used):
            self.execution.services.spawn(self._close)

    async def _close(self) -> None:
        names = [name for used in self._used for name in used.started]
        await (await self._lodging()).settled(self.execution.run_id, self.wanted, self.call, names)


def _wanted(named: object) -> str | SandboxProfile:
    return named if isinstance(named, str | SandboxProfile) else "python"
