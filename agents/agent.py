"""What an agent is: an immutable definition, and the result of running it."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar, cast, overload

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationError

from ridethrough.agents.guardrail import Guardrail
from ridethrough.runtime.config import TIERS, Tier
from ridethrough.runtime.errors import ConfigError, NotFound, SerializationError, UsageError
from ridethrough.runtime.execution import Branch, current_branch, position
from ridethrough.runtime.payload import Codec
from ridethrough.runtime.router.context import PRIORITIES, PriorityClass
from ridethrough.runtime.router.messages import (
    ImagePart,
    Message,
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolSpec,
    Usage,
    UserMessage,
)
from ridethrough.runtime.workflow import NAME, Workflow, the_open_runtime
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.tools.catalogue import SEARCH_TOOL, Catalogue, ToolSearch
from ridethrough.tools.schema import json_schema_of
from ridethrough.tools.tool import Tool

if TYPE_CHECKING:
    from ridethrough.agents.as_tool import AgentTool

TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

OutT = TypeVar("OutT")
T = TypeVar("T")

FunctionModel = Callable[[ModelRequest], "Awaitable[ModelResponse | str]"]
"""A model as a function: for tests and for models that no provider serves."""

AgentInput = str | Sequence[Message | TextPart | ImagePart | Mapping[str, Any]]
"""Text, parts of one user message, or messages."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run of an agent may use; reaching one raises ``LimitExceeded``.

    Attributes:
        turns: Model calls.
        tool_calls: Tool calls, all agents of a conversation together.
        tokens: Input and output tokens.
        usd: Money for model calls.
        seconds: Working time (model and tool calls). Time in which the run was parked does not count.
    """

    turns: int | None = 50
    tool_calls: int | None = None
    tokens: int | None = None
    usd: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Refuse limits that let nothing happen."""
        for name in ("turns", "tool_calls", "tokens", "usd", "seconds"):
            value = getattr(self, name)
            if value is not None and (value < 0 or (name == "turns" and value < 1)):
                raise ConfigError(f"Limits({name}={value}) lets nothing happen. Give a larger number, or None.")


class AgentResult(BaseModel, Generic[OutT]):
    """What an agent came to."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    output: OutT
    messages: list[Message]
    """What was said in this run: without the instructions, and without what a session had before."""
    usage: Usage = Usage()
    cost_usd: float | None = None
    """USD of all model calls; ``None`` if no price is known for one of them."""
    agent: str
    """The agent that answered (another one after a handoff)."""


@dataclass(frozen=True, slots=True)
class RunContext:
    """What instructions and guardrails may look at."""

    run_id: str
    agent: str
    deps: Any
    resources: Mapping[str, Any]

    def resource(self, name: str) -> Any:
        """A live client of ``Runtime.open(resources=...)``.

        Raises:
            NotFound: there is none of that name.
        """
        if name not in self.resources:
            known = ", ".join(sorted(self.resources)) or "none at all"
            raise NotFound(
                f"There is no resource {name!r}; this runtime has: {known}. Pass it to "
                f"Runtime.open(resources={{{name!r}: ...}})."
            )
        return self.resources[name]


Instructions = str | Callable[[RunContext], "str | Awaitable[str]"]


def _pack(value: Any) -> Any:
    """Dependencies on their way to the database: plain data, with the class it belongs to."""
    if value is None or isinstance(value, str | int | float | bool | list | dict):
        return {"value": value}
    cls = type(value)
    where = f"{cls.__module__}:{cls.__qualname__}"
    return {"class": where, "value": json.loads(Codec(cls, f"deps of type {cls.__name__}").dump(value))}


def _unpack(data: Any) -> Any:
    if not isinstance(data, dict) or "value" not in data:
        return data
    if "class" not in data:
        return data["value"]
    module, _, name = data["class"].partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise SerializationError(f"deps: the class {data['class']} cannot be found any more.") from error
    return Codec(found, f"deps of type {name}").accept(data["value"])


Deps = Annotated[Any, PlainSerializer(_pack), PlainValidator(_unpack)]


class Agent(Generic[OutT]):
    """An immutable definition of an agent; ``run`` it inside a workflow, or on the open runtime."""

    @overload
    def __init__(
        self: Agent[str],
        name: str,
        *,
        model: str | FunctionModel,
        instructions: Instructions = ...,
        tools: Sequence[Tool[..., Any] | AgentTool] = ...,
        handoffs: Sequence[Agent[Any]] = ...,
        guardrails: Sequence[Guardrail] = ...,
        limits: Limits = ...,
        sandbox: str | SandboxProfile | None = ...,
        floor: Tier | None = ...,
        priority: PriorityClass | None = ...,
        tool_concurrency: int = ...,
        tool_search: ToolSearch | bool | int = ...,
        output_retries: int = ...,
        temperature: float | None = ...,
        max_tokens: int | None = ...,
        reasoning: str | None = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: Agent[T],
        name: str,
        *,
        model: str | FunctionModel,
        output: type[T],
        instructions: Instructions = ...,
        tools: Sequence[Tool[..., Any] | AgentTool] = ...,
        handoffs: Sequence[Agent[Any]] = ...,
        guardrails: Sequence[Guardrail] = ...,
        limits: Limits = ...,
        sandbox: str | SandboxProfile | None = ...,
        floor: Tier | None = ...,
        priority: PriorityClass | None = ...,
        tool_concurrency: int = ...,
        tool_search: ToolSearch | bool | int = ...,
        output_retries: int = ...,
        temperature: float | None = ...,
        max_tokens: int | None = ...,
        reasoning: str | None = ...,
    ) -> None: ...
    def __init__(
        self,
        name: str,
        *,
        model: str | FunctionModel,
        instructions: Instructions = "",
        tools: Sequence[Tool[..., Any] | AgentTool] = (),
        handoffs: Sequence[Agent[Any]] = (),
        output: Any = str,
        guardrails: Sequence[Guardrail] = (),
        limits: Limits = Limits(),
        sandbox: str | SandboxProfile | None = None,
        floor: Tier | None = None,
        priority: PriorityClass | None = None,
        tool_concurrency: int = 16,
        tool_search: ToolSearch | bool | int = True,
        output_retries: int = 2,
        temperature: float | None = None,
        max_tokens: int | None = None,
        reasoning: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | str | None = None,
    ) -> None:
        """Define an agent.

        Args:
            name: Stable: it is part of the steps' paths.
            model: A route of the configuration, ``provider/model``, or a function of the request.
            instructions: The system message: text, or a function (sync or async) of the ``RunContext``.
            tools: What it may call.
            handoffs: Agents to which it may hand the conversation.
            output: Any pydantic-able type; the text when left out.
            guardrails: Checks of input and output.
            limits: What one run may use.
            sandbox: What ``ctx.sandbox`` is for its tools: a profile's name (``[sandboxes.NAME]``), or a profile.
            floor: The least capable tier that may answer (``frontier``, ``standard``, ``small``, ``local``); its calls
                wait for one instead of being answered by less.
            priority: The class of its model calls under load: ``critical``, ``high``, ``normal`` or ``low``; that of
                the run when left out.
            tool_concurrency: How many calls of one turn run at a time.
            tool_search: With more than 40 tools (or than the number given here, or as a ``ToolSearch`` says) the model
                is shown the few that fit its task and ``search_tools``, which finds others; ``False``: all, always.
            output_retries: How often an invalid output goes back to the model.
            temperature: Sampling temperature.
            max_tokens: Output tokens of one answer.
            reasoning: The effort, where the model knows one.

        Raises:
            ConfigError: the definition cannot work; the message says what to change.
        """
        self.name = name
        self.model = model
        self.instructions = instructions
        self.tools = tuple(tools)
        self.handoffs = tuple(handoffs)
        self.output = output
        self.guardrails = tuple(guardrails)
        self.limits = limits
        self.sandbox = sandbox
        self.floor: Tier | None = floor
        self.priority: PriorityClass | None = priority
        self.tool_concurrency = tool_concurrency
        self.tool_search = _search_of(name, tool_search, len(self.tools))
        self.output_retries = output_retries
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.reasoning = reasoning
        self._source = _defined_in()
        self._check()
        # Registered at once, so that a new process that only defines its agents takes their runs up.
        _ = self.__workflow__

    def _check(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"agent {self.name!r}: a name has letters, digits, '_', '.', ':' and '-' only.")
        for what, value, known in (("floor", self.floor, TIERS), ("priority", self.priority, PRIORITIES)):
            if value is not None and value not in known:
                raise ConfigError(f"agent {self.name}: {what}={value!r} is none of {', '.join(known)}.")
        if self.tool_concurrency < 1:
            raise ConfigError(f"agent {self.name}: tool_concurrency={self.tool_concurrency} lets no tool run.")
        self._check_names()
        self._check_sandbox()
        self._check_search()
        _ = self.output_schema  # a type without a schema shows here and not in the first run

    def _check_names(self) -> None:
        names = Counter([tool.name for tool in self.tools] + [transfer_name(agent) for agent in self.handoffs])
        for name, count in names.items():
            if not TOOL_NAME.fullmatch(name):
                raise ConfigError(
                    f"agent {self.name}: no model can call a tool {name!r}. Names have 1 to 64 letters, digits, '_' "
                    f"and '-' (for a handoff, 'transfer_to_' is put in front of the agent's name)."
                )
            if count > 1:
                raise ConfigError(f"agent {self.name}: two tools are called {name!r}. Rename one with @tool(name=...).")

    def _check_sandbox(self) -> None:
        wanted: object = self.sandbox
        if wanted is not None and wanted != "" and isinstance(wanted, str | SandboxProfile):
            return
        if wanted is not None:
            raise ConfigError(
                f"agent {self.name}: sandbox={wanted!r} is no sandbox. Give the name of a profile, [sandboxes.NAME] in "
                f"the configuration, or a SandboxProfile."
            )

    def _check_search(self) -> None:
        if self.tool_search is None:
            return
        if SEARCH_TOOL in self.tools_by_name:
            raise ConfigError(
                f"agent {self.name}: {SEARCH_TOOL!r} is the name of the tool that searches its {len(self.tools)} "
                f"tools. Rename yours with @tool(name=...), or send all tools with tool_search=False."
            )
        for name in self.tool_search.always_names:
            if name not in self.tools_by_name:
                raise ConfigError(
                    f"agent {self.name}: ToolSearch(always=...) names {name!r}, which is none of its tools."
                )

    def __repr__(self) -> str:
        """The name and the model."""
        return f"Agent({self.name!r}, model={self.model!r})"

    @cached_property
    def output_schema(self) -> dict[str, Any] | None:
        """The JSON Schema of the output; ``None`` for text."""
        return json_schema_of(self.output)

    @cached_property
    def tool_specs(self) -> tuple[ToolSpec, ...]:
        """The tools and handoffs as the model sees them; the same objects every turn."""
        return (*(spec_of(tool) for tool in self.tools), *self.transfer_specs)

    @cached_property
    def transfer_specs(self) -> tuple[ToolSpec, ...]:
        """The handoffs as the model sees them."""
        return tuple(_transfer_spec(agent) for agent in self.handoffs)

    @cached_property
    def tools_by_name(self) -> Mapping[str, Tool[..., Any] | AgentTool]:
        """The tools; there may be thousands."""
        return {tool.name: tool for tool in self.tools}

    @cached_property
    def catalogue(self) -> Catalogue:
        """The index of the tools, made at its first use."""
        return Catalogue(self.tools)

    @cached_property
    def __workflow__(self) -> Workflow[..., AgentResult[OutT]]:
        """The workflow that runs this agent alone."""

        async def run_agent(input: Any, deps: Deps = None, session: str | None = None) -> Any:
            return await self.run(input, deps=deps, session=session)

        # Annotations of this function are strings here; what matters is the codec of deps.
        run_agent.__annotations__ = {"input": Any, "deps": Deps, "session": str | None}
        return Workflow(run_agent, name=f"agent:{self.name}", source=self._source, result=self._result_codec)

    def _result_codec(self) -> Codec:
        """The output may be that of any agent that the conversation can come to."""
        me: Agent[Any] = cast(Any, self)
        reached, todo = {id(me): me}, [me]
        while todo:
            for agent in todo.pop().handoffs:
                if id(agent) not in reached:
                    reached[id(agent)] = agent
                    todo.append(agent)
        where, result = f"the result of agent {self.name}", cast(Any, AgentResult)
        codecs = {agent.name: Codec(result[agent.output], where) for agent in reached.values()}
        if len(codecs) == 1:
            return codecs[self.name]

        # The agent that answered tells the type: two types may have the same fields.
        def pack(value: AgentResult[Any]) -> Any:
            return json.loads(codecs[value.agent].dump(value))

        def unpack(data: Any) -> Any:
            return codecs[data["agent"]].accept(data)

        return Codec(Annotated[Any, PlainSerializer(pack), PlainValidator(unpack)], where)

    async def run(self, input: AgentInput, deps: Any = None, session: str | None = None) -> AgentResult[OutT]:
        """Run the agent: as part of the run of the workflow that calls, else as a run of its own on the open runtime.

        Args:
            input: Text, or a list of messages or of parts of one user message.
            deps: Plain data (a pydantic model, a dataclass, JSON) for tools and instructions; it is stored.
            session: The name of a conversation that goes on from run to run.

        Raises:
            LimitExceeded, GuardrailTripped, InvalidOutput: see there.
            ModelError: a model call failed in a way that no other deployment can mend.
            UsageError: no runtime is open.
        """
        if position() is None:
            definition = self.__workflow__
            text = definition.bind((plain_input(input), deps, session), {})
            runtime = the_open_runtime(f"agent {self.name}")
            return cast("AgentResult[OutT]", await runtime.run_to_end(definition, json.loads(text)))
        from ridethrough.agents.loop import Conversation

        branch = current_branch(f"agent {self.name}")
        inner = Branch(branch.execution, branch.next(self.name) + "/", branch.task, self.name)
        return cast("AgentResult[OutT]", await Conversation(cast(Any, self), inner, deps, session).run(input))

    def as_tool(self, name: str | None = None, description: str | None = None) -> AgentTool:
        """Make the agent a tool of another one: it gets a text and gives its output back.

        Args:
            name: What the other model calls it; the agent's name when left out.
            description: What it is told about it; the beginning of its instructions when left out.
        """
        from ridethrough.agents.as_tool import AgentTool

        return AgentTool(cast(Any, self), name or self.name.replace(".", "_").replace(":", "_"), description)


def plain_input(input: Any) -> Any:
    """An agent's input as JSON data."""
    if isinstance(input, str):
        return input
    return [item.model_dump(mode="json") if isinstance(item, BaseModel) else dict(item) for item in input]


def input_messages(input: Any) -> list[Message]:
    """An agent's input as messages.

    Raises:
        UsageError: it is neither text nor messages nor parts.
    """
    if isinstance(input, str):
        return [UserMessage(content=input)]
    try:
        items = list(input)
        if all(_is_part(item) for item in items):
            return [UserMessage(content=tuple(items))]
        return list(ModelRequest(items).messages)
    except (ValidationError, TypeError) as error:
        raise UsageError(
            f"An agent's input is text, a list of messages (role and content) or a list of parts; this is none: {error}"
        ) from error


def _is_part(item: Any) -> bool:
    return isinstance(item, TextPart | ImagePart) or (isinstance(item, Mapping) and "role" not in item)


def spec_of(tool: Tool[..., Any] | AgentTool) -> ToolSpec:
    """A tool as the model sees it."""
    return ToolSpec(name=tool.name, description=tool.description, parameters=tool.parameters.json)


def _search_of(agent: str, wanted: ToolSearch | bool | int, tools: int) -> ToolSearch | None:
    """How the tools of an agent are searched; ``None`` if there are few enough to send them all."""
    given: object = wanted
    if not isinstance(given, ToolSearch | int):
        raise ConfigError(f"agent {agent}: tool_search={given!r} is no ToolSearch, no number and no bool.")
    search = ToolSearch.of(wanted)
    return search if search is not None and tools > search.threshold else None


def transfer_name(agent: Agent[Any]) -> str:
    """The name of the tool that hands the conversation to ``agent``."""
    return "transfer_to_" + "".join(letter if letter.isalnum() or letter in "_-" else "_" for letter in agent.name)


def _transfer_spec(agent: Agent[Any]) -> ToolSpec:
    about = agent.instructions.split("\n")[0][:200] if isinstance(agent.instructions, str) else ""
    return ToolSpec(
        name=transfer_name(agent),
        description=f"Hand the conversation over to {agent.name}, who then answers instead of you. {about}".strip(),
        parameters={
            "type": "object",
            "properties": {"reason": {"type": "string", "description": "Why, in one sentence."}},
            "additionalProperties": False,
        },
    )


def _defined_in() -> str | None:
    """The module in which ``Agent(...)`` is called, where another process will look for an agent of that name.

    The variable that will hold it is not known yet, hence the star.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    file = frame.f_globals.get("__file__") if frame is not None else None
    return f"{file}:*" if file else None
