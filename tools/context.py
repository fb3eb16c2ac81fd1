"""What a running tool may reach: its run, its key against doing things twice, and the live clients of this process.

A context is passed only to functions that ask for it, so a tool stays a plain function that tests can call directly.
``deps`` travels with the run and is stored; ``resource()`` gives what cannot be stored (connections, clients), which
each process opens for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic

from typing_extensions import TypeVar

from ridethrough.runtime.errors import NotFound, UsageError

if TYPE_CHECKING:
    from ridethrough.sandboxes.sandbox import Sandbox

Deps = TypeVar("Deps", default=Any)


def _ignore(text: str) -> None:
    """Take progress that nobody watches."""


class ToolContext(Generic[Deps]):
    """What a tool gets as its parameter ``ctx``.

    Attributes:
        run_id: The run that the call belongs to.
        call_id: The call: unique in the run and the same at every attempt, whatever ids the provider repeats.
        idempotency_key: What to hand to the outside world so that a repeated attempt is recognised there.
        deps: The plain data that was stored with the run.
    """

    __slots__ = ("_on_progress", "_resources", "_sandbox", "call_id", "deps", "idempotency_key", "run_id")

    def __init__(
        self,
        *,
        run_id: str,
        call_id: str,
        idempotency_key: str,
        deps: Deps,
        resources: Mapping[str, Any] | None = None,
        on_progress: Callable[[str], None] = _ignore,
        sandbox: Sandbox | None = None,
    ) -> None:
        """``resources`` are those of the open runtime; ``on_progress`` takes each text of ``progress()``."""
        self.run_id = run_id
        self.call_id = call_id
        self.idempotency_key = idempotency_key
        self.deps = deps
        self._resources: Mapping[str, Any] = {} if resources is None else resources
        self._on_progress = on_progress
        self._sandbox = sandbox

    def __repr__(self) -> str:
        return f"ToolContext(run_id={self.run_id!r}, call_id={self.call_id!r})"

    def resource(self, name: str) -> Any:
        """Return the live client that ``Runtime.open(resources=...)`` has under ``name``.

        Raises:
            NotFound: There is none of that name; the message lists those that exist.
        """
        try:
            return self._resources[name]
        except KeyError:
            known = ", ".join(sorted(self._resources)) or "none at all"
            raise NotFound(
                f"there is no resource {name!r}; this runtime has: {known}. "
                f"Pass it to Runtime.open(resources={{{name!r}: ...}})"
            ) from None

    def progress(self, text: str) -> None:
        """Tell whoever watches the run how far this call is; nothing is stored."""
        self._on_progress(text)

    @property
    def sandbox(self) -> Sandbox:
        """The run's sandbox, made at its first use: of the agent's profile, or the tool's own.

        What is started in it is named after this call: a call that is run again after a crash finds the results of its
        first life there, and starts nothing twice.

        Raises:
            UsageError: There is none, because the call is not part of a run.
        """
        if self._sandbox is None:
            raise UsageError(
                f"tool call {self.call_id!r} asked for ctx.sandbox, and is not part of a run; in a test, pass "
                "ToolContext(sandbox=...), for example one of `async with local_sandbox() as sandbox`"
            )
        return self._sandbox
