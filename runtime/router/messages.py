"""The canonical conversation: what agents speak, whatever wire a provider speaks.

Messages are immutable, and each keeps the bytes that a wire rendered of it. A turn therefore renders only its own new
messages, so that turn 100 costs what turn 1 did; a request that is made of canonical messages does not validate them
again either. The alternative, one plain dictionary per message, is rendered and checked anew at every turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, TypeAdapter, model_validator

T = TypeVar("T")

Finish = Literal["stop", "tool_calls", "length", "content_filter", "refusal", "other"]
Degraded = Literal["cache", "static", "frontier", "standard", "small", "local"]


class _Canonical(BaseModel):
    """Frozen, without unknown fields, and with room for the rendered form (which is no part of the value)."""

    __slots__ = ("_rendered",)
    model_config = ConfigDict(frozen=True, extra="forbid")

    def rendered(self, key: str, render: Callable[[Any], T]) -> T:
        """Return ``render(self)``, computed once for each ``key`` (the name of a wire, say)."""
        try:
            cache: dict[str, T] = object.__getattribute__(self, "_rendered")
        except AttributeError:
            cache = {}
            object.__setattr__(self, "_rendered", cache)
        if (found := cache.get(key)) is None:
            found = cache[key] = render(self)
        return found


# --- parts ----------------------------------------------------------------------------------------------------------


class TextPart(_Canonical):
    """A piece of text. ``after_calls`` is how many tool calls of the same message came before it."""

    type: Literal["text"] = "text"
    text: str
    after_calls: int = 0


class ImagePart(_Canonical):
    """An image: a ``url``, or ``data`` in base64 with its ``media_type``."""

    type: Literal["image"] = "image"
    url: str | None = None
    data: str | None = Field(default=None, repr=False)
    media_type: str = "image/png"

    @model_validator(mode="after")
    def _one_source(self) -> ImagePart:
        if (self.url is None) == (self.data is None):
            raise ValueError("an image has either a url or data")
        return self


class ReasoningPart(_Canonical):
    """What a model thought. ``data`` belongs to ``provider`` and goes back to nobody else; it is never changed.

    ``after_calls`` is how many tool calls of the same message came before it: models that think between two calls want
    their thoughts back in that place.
    """

    type: Literal["reasoning"] = "reasoning"
    text: str = ""
    provider: str = ""
    data: dict[str, Any] = Field(default_factory=dict[str, Any], repr=False)
    after_calls: int = 0


class ProviderPart(_Canonical):
    """An item that only ``provider`` understands: its own web search, code execution, tool search and their results.

    Like reasoning it goes back to that provider as it came, in its place, and is left out (with a note) elsewhere.
    ``kind`` is the provider's name for it, ``text`` what a person may read of it.
    """

    type: Literal["provider"] = "provider"
    kind: str
    text: str = ""
    provider: str = ""
    data: dict[str, Any] = Field(default_factory=dict[str, Any], repr=False)
    after_calls: int = 0


Part = Annotated[TextPart | ImagePart | ReasoningPart | ProviderPart, Field(discriminator="type")]
Content = str | tuple[Part, ...]


def text_of(content: Content) -> str:
    """Return the text of ``content``, without its images and reasoning."""
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content if isinstance(part, TextPart))


# --- messages -------------------------------------------------------------------------------------------------------


class ToolCall(_Canonical):
    """A model's wish to call a tool.

    ``arguments`` is ``None`` when what the model wrote is no JSON object; then ``raw`` is its text and ``error`` says
    what is wrong with it. ``data`` is what ``provider`` wants back with the call (a signature, an item's id) and goes
    to nobody else.
    """

    id: str
    name: str
    arguments: dict[str, Any] | None = Field(default_factory=dict[str, Any])
    raw: str | None = None
    error: str | None = None
    provider: str = ""
    data: dict[str, Any] = Field(default_factory=dict[str, Any], repr=False)


IMAGE_TOKENS = 1000
"""What an image is estimated to take: between the small and the large ones of the providers' own formulas."""


class _Message(_Canonical):
    content: Content = ""

    @property
    def tokens(self) -> int:
        """An estimate of the tokens it takes as input, made once."""
        return self.rendered("tokens", _tokens_of)

    @property
    def has_images(self) -> bool:
        """Whether there is an image in it."""
        return not isinstance(self.content, str) and any(isinstance(part, ImagePart) for part in self.content)

    @property
    def text(self) -> str:
        """The text, without images and reasoning."""
        return text_of(self.content)


class SystemMessage(_Message):
    """Instructions."""

    role: Literal["system"] = "system"


class UserMessage(_Message):
    """What a person, or the workflow, says."""

    role: Literal["user"] = "user"


class AssistantMessage(_Message):
    """What the model said. ``refusal`` is its own text when it declined."""

    role: Literal["assistant"] = "assistant"
    tool_calls: tuple[ToolCall, ...] = ()
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_wire(cls, value: Any) -> Any:
        """Accept ``content: None`` and calls in Chat Completions' form, since people paste such conversations."""
        if not isinstance(value, Mapping):
            return value
        calls = [_plain_call(call) for call in value.get("tool_calls") or ()]
        return {**value, "content": value.get("content") or "", "tool_calls": calls}


class ToolMessage(_Message):
    """The result of a tool call."""

    role: Literal["tool"] = "tool"
    tool_call_id: str
    name: str = ""
    is_error: bool = False


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
MESSAGE: TypeAdapter[Message] = TypeAdapter(Message)
"""Parses any message from JSON or a mapping by its ``role``."""


def _tokens_of(message: _Message) -> int:
    """Estimate: four bytes a token, an image as a whole, and a few tokens for what is around them."""
    size, images = 0, 0
    if isinstance(message.content, str):
        size = _bytes_of(message.content)
    else:
        for part in message.content:
            images += isinstance(part, ImagePart)
            size += 0 if isinstance(part, ImagePart) else _bytes_of(part.text)
    if isinstance(message, AssistantMessage):
        size += sum(_bytes_of(call.name) + _bytes_of(call.raw or str(call.arguments)) for call in message.tool_calls)
    return 4 + size // 4 + images * IMAGE_TOKENS


def _bytes_of(text: str) -> int:
    """Return the size of ``text`` in UTF-8: writing without letters takes about a token for each sign."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def _checked(item: object) -> Message:
    return MESSAGE.validate_python(item)


def _plain_call(call: Any) -> Any:
    if isinstance(call, Mapping) and isinstance(function := call.get("function"), Mapping):
        return parse_call(str(call.get("id") or ""), str(function.get("name") or ""), function.get("arguments"))
    return call


def parse_call(id: str, name: str, arguments: object) -> ToolCall:
    """Build a call from what came over a wire: text that should be a JSON object, or the object itself."""
    if isinstance(arguments, Mapping):
        return ToolCall(id=id, name=name, arguments=dict(arguments))
    raw = arguments if isinstance(arguments, str) else ""
    try:
        parsed = json.loads(raw) if raw.strip() else {}
    except (ValueError, RecursionError) as error:
        return ToolCall(id=id, name=name, arguments=None, raw=raw, error=f"the arguments are not JSON: {error}")
    if not isinstance(parsed, dict):
        return ToolCall(id=id, name=name, arguments=None, raw=raw, error="the arguments are not a JSON object")
    return ToolCall(id=id, name=name, arguments=parsed)


# --- request and response -------------------------------------------------------------------------------------------


class ToolSpec(_Canonical):
    """A tool as a model sees it. ``parameters`` is a JSON Schema of type object."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})

    @property
    def tokens(self) -> int:
        """An estimate of the tokens it takes as input, made once."""
        return self.rendered("tokens", _tool_tokens)


def _tool_tokens(tool: ToolSpec) -> int:
    return 8 + (len(tool.name) + len(tool.description) + len(json.dumps(tool.parameters))) // 4


class Usage(BaseModel):
    """Tokens of a call.

    ``input_tokens`` include ``cached_tokens`` (read from the provider's prompt cache) and ``cache_write_tokens``
    (written to it, which some bill dearer); ``output_tokens`` include ``reasoning_tokens``.
    """

    model_config = ConfigDict(frozen=True)

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    cache_write_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Add up two usages."""
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            cache_write_tokens=self.cache_write_tokens + other.cache_write_tokens,
        )


class ModelRequest(BaseModel):
    """One question to a model.

    ``messages`` are canonical ones or plain ``{"role", "content"}`` mappings. ``tool_choice`` is ``auto``, ``none``,
    ``required`` or the name of a tool. ``output_schema`` is a JSON Schema that the answer's text must match.
    ``max_tokens`` counts output tokens. ``reasoning`` is the effort.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: tuple[SkipValidation[Message], ...]
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: str = "auto"
    output_schema: dict[str, Any] | None = None
    temperature: float | None = None
    max_tokens: int | None = Field(None, gt=0)
    reasoning: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None

    def __init__(
        self,
        messages: Iterable[Message | Mapping[str, Any]],
        *,
        tools: Sequence[ToolSpec | Mapping[str, Any]] = (),
        tool_choice: str = "auto",
        output_schema: Mapping[str, Any] | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        reasoning: str | None = None,
    ) -> None:
        """Check and keep the parts; canonical ones are kept as they are.

        Raises:
            pydantic.ValidationError: A message or a tool is not what it should be (a ``ValueError``).
        """
        values: dict[str, Any] = {
            "messages": tuple([item if isinstance(item, _Message) else _checked(item) for item in messages]),
            "tools": tools,
            "tool_choice": tool_choice,
            "output_schema": output_schema,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "reasoning": reasoning,
        }
        super().__init__(**values)


class ModelResponse(BaseModel):
    """One answer.

    ``cost_usd`` is ``None`` when no price is known (``notes`` says so). ``attempts`` counts all that were made,
    ``deployment`` names the one that answered, and ``degraded`` is ``None`` unless it answered with less than asked.
    ``cached`` says that the answer is an earlier one to the same question.
    """

    model_config = ConfigDict(frozen=True)

    message: AssistantMessage
    finish: Finish = "stop"
    usage: Usage = Usage()
    cost_usd: float | None = None
    deployment: str = ""
    attempts: int = 1
    degraded: Degraded | None = None
    notes: tuple[str, ...] = ()
    model: str = ""
    request_id: str | None = None
    cached: bool = False

    @property
    def text(self) -> str:
        """The answer's text."""
        return self.message.text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tool calls, in the model's order."""
        return self.message.tool_calls


def estimate_tokens(text: str) -> int:
    """Estimate the tokens of ``text``: about four bytes each, at least one for any text. No tokenizer is needed."""
    return (len(text.encode("utf-8", "replace")) + 3) // 4
