"""Tools whose parameters somebody else has described: an MCP server, an OpenAPI document.

There is no signature to read, so the schema is the only thing that is known of them. Their arguments are checked
wherever they are called from: by a model, by a workflow's own code, or outside of any run.
"""

from __future__ import annotations

import hashlib
import inspect
import keyword
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, TypeVar, cast

from ridethrough.runtime.errors import ConfigError
from ridethrough.tools.context import ToolContext
from ridethrough.tools.schema import ParameterSchema
from ridethrough.tools.tool import DEFAULT_MAX_OUTPUT, Approval, Effect, OnInterrupt, Tool

LONGEST_NAME: Final = 64
LONGEST_DESCRIPTION: Final = 8_000
"""Characters of a description that a model is shown: it is sent with every turn."""

Perform = Callable[[dict[str, Any], ToolContext[Any] | None], Awaitable[Any]]
"""What does the work: the arguments, checked, and the context of the call, ``None`` outside of a run."""

T = TypeVar("T")


def foreign_tool(
    name: str,
    description: str,
    schema: Mapping[str, Any],
    perform: Perform,
    *,
    effect: Effect,
    timeout: float,
    retries: int = 0,
    approval: Approval = False,
    on_interrupt: OnInterrupt = "tell",
    max_output: int = DEFAULT_MAX_OUTPUT,
    concurrency: int | None = None,
) -> Tool[..., Any]:
    """Make a tool of a JSON Schema and of what does the work.

    Raises:
        ConfigError: The schema, or one of the settings, cannot be used.
    """
    properties = schema.get("properties") or {}
    context = _unused("ctx", properties)
    parameters = ParameterSchema.foreign(schema, name=name, description=_cut(description), context=context)
    return Tool(
        function=_function(name, parameters, perform, context),
        name=name,
        description=parameters.description,
        parameters=parameters,
        effect=effect,
        timeout=timeout,
        retries=retries if effect != "write" else 0,
        approval=approval,
        on_interrupt=on_interrupt if effect == "write" else "tell",
        max_output=max_output,
        concurrency=concurrency,
        is_async=True,
    )


def _function(name: str, parameters: ParameterSchema, perform: Perform, context: str) -> Callable[..., Any]:
    """An async function that takes the schema's properties by name."""
    others = _unused("others", (*parameters.json["properties"], context))

    async def call(**given: Any) -> Any:
        ctx = given.pop(context, None)
        given |= given.pop(others, {})
        return await perform(parameters.parse(given), ctx)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = parameters.description
    call.__signature__ = _signature(parameters.json, context, others)  # type: ignore[attr-defined]
    return call


def _signature(schema: Mapping[str, Any], context: str, others: str) -> inspect.Signature:
    """What ``inspect`` and a call in a workflow's own code go by; ``others`` takes what is no name in Python."""
    named = [name for name in (*schema["properties"], context) if name.isidentifier() and not keyword.iskeyword(name)]
    kind = inspect.Parameter.KEYWORD_ONLY
    required = schema.get("required", ())
    parameters = [
        inspect.Parameter(name, kind, default=inspect.Parameter.empty if name in required else None) for name in named
    ]
    return inspect.Signature([*parameters, inspect.Parameter(others, inspect.Parameter.VAR_KEYWORD)])


def _unused(name: str, names: Iterable[str]) -> str:
    taken = set(names)
    while name in taken:
        name += "_"
    return name


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST_DESCRIPTION else f"{text[:LONGEST_DESCRIPTION]} [...]"


# --- names ----------------------------------------------------------------------------------------------------------


def tool_name(*parts: str) -> str:
    """A name that every provider takes: letters, digits, ``_`` and ``-``, at most 64 of them."""
    name = "_".join(filter(None, (re.sub(r"[^a-zA-Z0-9_-]+", "_", part).strip("_") for part in parts)))
    if len(name) <= LONGEST_NAME:
        return name or "tool"
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9]}_{digest}"


def distinct(named: Iterable[tuple[str, str]], whose: str, remedy: str) -> dict[str, str]:
    """Tool names by what they were made of: pairs of an original and a name.

    Raises:
        ConfigError: Two of them have become one name; the message names both.
    """
    origins: dict[str, str] = {}
    for origin, name in named:
        other = origins.setdefault(name, origin)
        if other != origin:
            raise ConfigError(f"{whose}: {other!r} and {origin!r} would both be the tool {name!r}; {remedy}")
    return {origin: name for name, origin in origins.items()}


def chosen(names: Iterable[str], include: Iterable[str] | None, exclude: Iterable[str], whose: str) -> list[str]:
    """Those of ``names`` that are wanted, in their order.

    Raises:
        ConfigError: One that is asked for, or left out, does not exist.
    """
    from ridethrough.runtime.config import nearest

    known = list(names)
    wanted = known if include is None else list(include)
    for name in (*wanted, *(refused := set(exclude))):
        if name not in known:
            raise ConfigError(f"{whose}: there is no {name!r}{nearest(name, known)}")
    return [name for name in known if name in wanted and name not in refused]


def setting(value: T | Mapping[str, T], name: str, default: T) -> T:
    """A setting of one tool: the same for all, or by name."""
    return cast(Mapping[str, T], value).get(name, default) if isinstance(value, Mapping) else value
