"""Tools that go wrong on schedule, in the processes of a drill only.

A drill names a file in the environment: the faults, when the schedule's clock began, and a ledger. The ledger gets a
line for every call: what befell it, that the function has begun, how that ended. It lies outside of the database, so it
knows what was done twice, and the counts in it go on when a process has been killed and another one took over.

Where no such file is named (everywhere but in a drill) ``FAULTS`` is ``None``, and a call costs one look at that.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from ridethrough.runtime.drill import TOOL_SCHEDULE
from ridethrough.runtime.errors import ToolFailed

if TYPE_CHECKING:
    from ridethrough.runtime.router.providers.simulated import ToolFault


@dataclass(frozen=True)
class Called:
    """A call, as the ledger names it: ``call`` is the same at every attempt of one call."""

    run: str
    call: str
    tool: str
    effect: str


class ToolFaults:
    """The schedule of one drill, in one of its processes."""

    def __init__(self, path: Path) -> None:
        """Read the schedule at ``path``, and from the ledger what earlier processes had of it."""
        from ridethrough.runtime.router.providers.simulated import ToolFault

        plan = json.loads(path.read_text(encoding="utf-8"))
        self._faults: list[ToolFault] = [ToolFault(**row) for row in plan["faults"]]
        self._seed = int(plan["seed"])
        self._clock = Path(plan["clock"])
        self._ledger = Path(plan["ledger"])
        self._began: float | None = None
        self._calls: Counter[str] = Counter()
        self._used: Counter[int] = Counter()
        self._recall()

    async def around(
        self,
        called: Called,
        function: Callable[[], Awaitable[Any]],
        lose_sandbox: Callable[[], Awaitable[None]] | None = None,
    ) -> Any:
        """Run the tool's function, and let happen to it what is due; ``lose_sandbox`` removes the one it runs in.

        Raises:
            ToolFailed, TimeoutError: a fault of that kind is due.
        """
        fault = self._due(called)
        if fault is not None and fault.kind in ("error", "timeout", "slow"):
            await self._before(called, fault)
        if fault is not None and fault.kind == "sandbox" and lose_sandbox is not None:
            await lose_sandbox()
        self._note(called, "begun")
        try:
            value = await function()
        except BaseException as error:
            self._note(called, "raised", error=type(error).__name__)
            raise
        self._note(called, "returned")
        if fault is not None and fault.kind == "hang":  # done, but nobody is told: what is worst to try again
            await anyio.sleep(fault.seconds)
        return value

    async def _before(self, called: Called, fault: ToolFault) -> None:
        if fault.kind == "error":
            raise ToolFailed(f"{called.tool} failed (a fault of the drill).")
        await anyio.sleep(fault.seconds)
        if fault.kind == "timeout":
            raise TimeoutError(f"{called.tool} timed out after {fault.seconds:g} s (a fault of the drill).")

    def _due(self, called: Called) -> ToolFault | None:
        """The first fault that this call meets; it is counted, and on the ledger."""
        self._calls[called.tool] += 1
        number, age = self._calls[called.tool], self._age()
        for index, fault in enumerate(self._faults):
            if fault.applies(called.tool, number, age, self._used[index], seed=self._seed):
                self._used[index] += 1
                self._note(called, "called", fault=fault.kind, index=index)
                return fault
        self._note(called, "called", fault=None, index=None)
        return None

    def _age(self) -> float:
        """Seconds since the schedule's clock began; 0 before."""
        if self._began is None:
            try:
                self._began = float(self._clock.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return 0.0
        return max(0.0, time.time() - self._began)

    def _recall(self) -> None:
        if not self._ledger.exists():
            return
        for line in self._ledger.read_text(encoding="utf-8").splitlines():
            said = json.loads(line)
            if said["event"] == "called":
                self._calls[said["tool"]] += 1
                if said["index"] is not None:
                    self._used[said["index"]] += 1

    def _note(self, called: Called, event: str, **more: Any) -> None:
        said = {"event": event, **vars(called), "at": time.time(), "process": os.getpid(), **more}
        handle = os.open(self._ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, json.dumps(said).encode() + b"\n")
        finally:
            os.close(handle)


def _load() -> ToolFaults | None:
    named = os.environ.get(TOOL_SCHEDULE)
    return None if not named else ToolFaults(Path(named))


FAULTS: ToolFaults | None = _load()
"""The schedule of the drill that this process belongs to."""
