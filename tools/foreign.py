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
from typing import Any, Final, TypedDict

from ridethrough.runtime.errors import ConfigError
from ridethrough.tools.context import ToolContext
from ridethrough.tools.schema import ParameterSchema
from ridethrough.tools.tool import DEFAULT_MAX_OUTPUT, DEFAULT_TIMEOUT, Approval, Effect, OnInterrupt, Tool

LONGEST_NAME: Final = 64
LONGEST_DESCRIPTION: Final = 8_000
"""Characters of a description that a model is shown: it is sent with every turn."""

SHOWN: Final = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})
"""Images that models take; of others they are told the size."""

Perform = Callable[[dict[str, Any], ToolContext[Any] | None], Awaitable[Any]]
"""What does the work: the arguments, checked, and the context of the call, ``None`` outside of a run."""


class Choices(TypedDict, total=False):
    """What may be chosen of somebody else's tools.

    Attributes:
        include: Their own names of those that are wanted; all when left out.
        exclude: Names of those that are not.
        prefix: What their names begin with; an MCP server's name when left out, nothing for a document.
        effects: What a repeat would do, by name. Without it an MCP server is believed (``read`` for its
            ``readOnlyHint``, ``idempotent`` for its ``idempotentHint``, else ``write``), and so are HTTP's methods (GET
            and HEAD: ``read``, PUT and DELETE: ``idempotent``, the others: ``write``).
        approval: Whether a person decides first: for all, or by name.
        timeout: Deadline of one attempt in seconds: for all, or by name.
        retries: Further attempts after a failure, for those that are no writes.
        max_output: Characters of an output that the model is shown.
        concurrency: Calls at the same time of each tool in one process.
    """

    include: Iterable[str]
    exclude: Iterable[str]
    prefix: str
    effects: Mapping[str, Effect]
    approval: Approval | Mapping[str, Approval]
    timeout: float | Mapping[str, float]
    retries: int
    max_output: int
    concurrency: int


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


def distinct(named: Mapping[str, str], whose: str) -> Mapping[str, str]:
    """Tool names by what they were made of, if no two are the same.

    Raises:
        ConfigError: two are; the message names both.
    """
    origins: dict[str, str] = {}
    for origin, name in named.items():
        other = origins.setdefault(name, origin)
        if other != origin:
            raise ConfigError(
                f"{whose}: {other!r} and {origin!r} would both be the tool {name!r}; leave one out with exclude=[...]"
            )
    return named


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


def approval_of(choices: Choices, name: str) -> Approval:
    """Whether a person decides first about one tool: the same for all, or by name."""
    given = choices.get("approval", False)
    return given.get(name, False) if isinstance(given, Mapping) else given


def timeout_of(choices: Choices, name: str) -> float:
    """The deadline of one tool in seconds: the same for all, or by name."""
    given = choices.get("timeout", DEFAULT_TIMEOUT)
    return given.get(name, DEFAULT_TIMEOUT) if isinstance(given, Mapping) else given
