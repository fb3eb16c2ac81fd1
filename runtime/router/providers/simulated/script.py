"""What a simulated model says: rules on the conversation, the first that matches answers.

A whole multi-agent workflow can be driven by a handful of rules, because each sees what a model would see: the
instructions, the last message, the tools on offer, the results so far. Everything is a function of the conversation, so
the same conversation gets the same answer in any process; that is what makes crash tests comparable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ridethrough.runtime.config import WireName
from ridethrough.runtime.router.providers.simulated.conversation import Conversation, text_of
from ridethrough.runtime.router.providers.simulated.faults import Fault
from ridethrough.runtime.router.providers.simulated.instance import example_of
from ridethrough.runtime.router.providers.simulated.wires import WIRES
from ridethrough.runtime.router.providers.structured import schema_in

_UNREAD = Conversation("", [])


@dataclass(frozen=True)
class SimRequest:
    """A request as the rules see it: the same whatever ``wire`` it came over.

    ``number`` counts the server's requests from 1, ``body`` is as it was sent, ``seconds`` is the server's age.
    ``conversation`` is what ``body`` says (read from Chat Completions, when it is left out).
    """

    number: int
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    seconds: float = 0.0
    wire: WireName = "openai"
    conversation: Conversation = field(default=_UNREAD, repr=False)

    def __post_init__(self) -> None:
        """Read the body where nobody has."""
        if self.conversation is _UNREAD:
            object.__setattr__(self, "conversation", WIRES["openai"].read(self.body, ""))

    @property
    def model(self) -> str:
        """The model that was asked for."""
        return self.conversation.model

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation in the form of Chat Completions."""
        return list(self.conversation.messages)

    @property
    def stream(self) -> bool:
        """Whether the answer is streamed."""
        return self.conversation.stream

    @property
    def tools(self) -> list[str]:
        """The names of the tools on offer."""
        return list(self.conversation.tool_names)

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """The JSON Schema that the answer must match, if one was given; by some wires in words, to older models."""
        return self.conversation.schema or schema_in(self.conversation.system)

    @property
    def system(self) -> str:
        """The instructions: all system messages."""
        return self.conversation.system

    @property
    def user(self) -> str:
        """The last user message's text."""
        return self.conversation.user

    @property
    def last_role(self) -> str:
        """The role of the last message."""
        messages = self.conversation.messages
        return str(messages[-1].get("role", "")) if messages else ""

    @property
    def turns(self) -> int:
        """How many messages of the assistant there are."""
        return self.conversation.turns

    @property
    def results(self) -> list[str]:
        """The tool results since the last message of the assistant, in order."""
        return list(self.conversation.results)

    @property
    def result(self) -> str:
        """The last tool result anywhere in the conversation; empty when there is none."""
        return next((text_of(m) for m in reversed(self.conversation.messages) if m.get("role") == "tool"), "")

    @property
    def called(self) -> list[str]:
        """The names of the tools that were called so far, in order."""
        return list(self.conversation.called)

    @property
    def digest(self) -> str:
        """A hash of what was said: equal conversations have equal digests, whatever the wire and the model."""
        return self.conversation.digest


@dataclass(frozen=True)
class Call:
    """A tool call of an answer. ``arguments`` as text is sent as it is, JSON or not. ``id`` may be left out."""

    name: str
    arguments: Mapping[str, Any] | str = field(default_factory=dict[str, Any])
    id: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a simulated model says.

    ``data`` is an answer's text as JSON. ``finish`` is a reason as Chat Completions names it (``length``,
    ``content_filter``); every wire has its own word, and one that it does not know is sent as it is. In texts, data and
    arguments ``{{user}}``, ``{{system}}``, ``{{result}}``, ``{{turn}}``, ``{{model}}`` and ``{{NAME}}`` of a group in
    the rule's patterns are filled in. ``latency`` (seconds before the first token) and ``per_token`` (seconds between
    tokens) go before the script's. Tokens are estimated when they are not given; ``input_tokens`` include those read
    from the provider's prompt cache (``cached_tokens``) and written to it (``cache_write_tokens``), ``output_tokens``
    the ``reasoning_tokens``.
    """

    text: str = ""
    calls: tuple[Call, ...] = ()
    data: Any = None
    finish: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int | None = None
    latency: float | None = None
    per_token: float | None = None


Says = Answer | str | Callable[[SimRequest], "Answer | str | Mapping[str, Any]"] | Mapping[str, Any]
"""What a rule answers: an ``Answer``, its text, data (a mapping), or a function of the request that gives one."""


@dataclass(frozen=True)
class Rule:
    """An answer and its conditions; all that are given must hold. Patterns are searched for, ignoring case.

    ``role`` is the last message's; ``turn`` is the number of assistant messages so far; ``tool`` is on offer;
    ``result`` is a pattern for the tool results since the assistant last spoke; ``called`` names a tool that was
    called in this conversation, ``not_called`` one that was not; ``schema`` says whether structured output is wanted.
    ``times`` ends the rule after so many answers (of this process).
    """

    says: Says
    model: str | None = None
    system: str | None = None
    user: str | None = None
    role: str | None = None
    result: str | None = None
    turn: int | None = None
    tool: str | None = None
    called: str | None = None
    not_called: str | None = None
    schema: bool | None = None
    times: int | None = None
    fault: Fault | None = None

    def match(self, request: SimRequest) -> dict[str, str] | None:
        """Return the named groups of the patterns when every condition holds, else ``None``."""
        facts = (
            (self.role, request.last_role),
            (self.turn, request.turns),
            (self.schema, request.schema is not None),
        )
        if any(wanted is not None and wanted != found for wanted, found in facts) or not self._tools_match(request):
            return None
        groups: dict[str, str] = {}
        for pattern, text in self._patterns(request):
            found = re.search(pattern, text, re.I | re.S)
            if found is None:
                return None
            groups.update({name: value or "" for name, value in found.groupdict().items()})
        return groups

    def _tools_match(self, request: SimRequest) -> bool:
        if self.result is not None and not request.results:
            return False
        if self.tool is not None and self.tool not in request.tools:
            return False
        if self.called is not None and self.called not in request.called:
            return False
        return self.not_called is None or self.not_called not in request.called

    def _patterns(self, request: SimRequest) -> Iterable[tuple[str, str]]:
        pairs = (
            (self.model, request.model),
            (self.system, request.system),
            (self.user, request.user),
            (self.result, "\n".join(request.results)),
        )
        return [(pattern, text) for pattern, text in pairs if pattern is not None]


@dataclass
class Script:
    """Rules, faults, and the timing of a simulated provider.

    ``latency`` and ``per_token`` are in seconds. ``seed`` chooses which requests are in a fault's share.
    """

    rules: list[Rule] = field(default_factory=list[Rule])
    faults: list[Fault] = field(default_factory=list[Fault])
    latency: float = 0.0
    per_token: float = 0.0
    models: tuple[str, ...] = ("simulated",)
    seed: int = 0
    _used: dict[int, int] = field(default_factory=dict[int, int], init=False, repr=False, compare=False)

    def rule(self, says: Says, **conditions: Any) -> Script:
        """Add a rule, see ``Rule`` for the conditions, and return the script."""
        self.rules.append(Rule(says, **conditions))
        return self

    def on(self, **conditions: Any) -> Callable[[Callable[[SimRequest], Any]], Callable[[SimRequest], Any]]:
        """Decorate a function of the request as a rule."""

        def add(function: Callable[[SimRequest], Any]) -> Callable[[SimRequest], Any]:
            self.rules.append(Rule(function, **conditions))
            return function

        return add

    def answer(self, request: SimRequest) -> tuple[Answer, Fault | None]:
        """Return the answer to ``request``, and the fault that its rule asks for."""
        for index, rule in enumerate(self.rules):
            used = self._used.get(index, 0)
            if rule.times is not None and used >= rule.times:
                continue
            if (groups := rule.match(request)) is not None:
                self._used[index] = used + 1
                return _filled(_said(rule.says, request), _values(request, groups)), rule.fault
        return default_answer(request), None


def default_answer(request: SimRequest) -> Answer:
    """Answer what no rule is about.

    It is an instance of the schema if one is wanted, a call if one is required, else a text by the conversation.
    """
    if request.schema is not None:
        return Answer(data=example_of(request.schema, seed=request.digest))
    if (tool := _required(request.conversation)) is not None:
        return Answer(calls=(Call(tool["name"], example_of(tool.get("parameters") or {}, seed=request.digest)),))
    return Answer(text=f"Simulated answer {request.digest[:8]} to: {request.user[:200]}")


def _required(conversation: Conversation) -> Mapping[str, Any] | None:
    """Return the tool that must be called."""
    if conversation.choice in ("auto", "none"):
        return None
    tools = [tool["function"] for tool in conversation.tools]
    return next((tool for tool in tools if conversation.choice in ("required", tool.get("name"))), None)


def _said(says: Says, request: SimRequest) -> Answer:
    value: Any = says(request) if callable(says) else says
    if isinstance(value, Answer):
        return value
    return Answer(text=value) if isinstance(value, str) else Answer(data=value)


def _values(request: SimRequest, groups: Mapping[str, str]) -> dict[str, str]:
    own = {
        "user": request.user,
        "system": request.system,
        "result": request.result,
        "turn": str(request.turns),
        "model": request.model,
    }
    return {**own, **groups}


def _filled(answer: Answer, values: Mapping[str, str]) -> Answer:
    calls = tuple(replace(call, arguments=_fill(call.arguments, values)) for call in answer.calls)
    return replace(answer, text=_fill(answer.text, values), data=_fill(answer.data, values), calls=calls)


def _fill(value: Any, values: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        if "{{" not in value:
            return value
        return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: values.get(match[1], match[0]), value)
    if isinstance(value, Mapping):
        return {key: _fill(item, values) for key, item in value.items()}
    return [_fill(item, values) for item in value] if isinstance(value, list) else value
