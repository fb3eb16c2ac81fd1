"""Guardrails: checks on what goes into an agent and what comes out of it.

A guardrail is a function of the context and the value. It returns nothing when all is well, or the reason why not.
It runs as a step, so a check that asks another service is asked once.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

from ridethrough.runtime.errors import ConfigError

Check = Callable[[Any, Any], "str | Awaitable[str | None] | None"]


@dataclass(frozen=True, slots=True)
class Guardrail:
    """A check with its place."""

    check: Check
    on: Literal["input", "output"]
    name: str
    repair: bool = False
    """For outputs: tell the model the reason and let it try again, before the run fails."""

    async def reason(self, context: Any, value: Any) -> str | None:
        """Why the value is refused, or ``None``."""
        found = self.check(context, value)
        return await found if inspect.isawaitable(found) else found


@overload
def guardrail(check: Check, /) -> Guardrail: ...
@overload
def guardrail(
    *, on: Literal["input", "output"] = "input", name: str | None = None, repair: bool = False
) -> Callable[[Check], Guardrail]: ...
def guardrail(
    check: Check | None = None,
    /,
    *,
    on: Literal["input", "output"] = "input",
    name: str | None = None,
    repair: bool = False,
) -> Any:
    """Turn ``check(context, value)`` into a guardrail: it returns ``None``, or the reason for refusing the value.

    Args:
        check: The function, sync or async, when used without parentheses (then on the input).
        on: ``input`` (the text the agent was given) or ``output`` (its final output, converted to its type).
        name: Shown in errors; the function's when left out.
        repair: For outputs: give the reason back to the model and let it try again, a bounded number of times.

    Raises:
        ConfigError: ``repair`` on an input.
    """
    if repair and on == "input":
        raise ConfigError("guardrail: repair=True is for outputs; an input cannot be repaired by the model.")

    def decorate(function: Check) -> Guardrail:
        return Guardrail(function, on, name or str(getattr(function, "__name__", "guardrail")), repair)

    return decorate if check is None else decorate(check)
