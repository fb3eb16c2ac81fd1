"""The Messages wire of Anthropic, and of the servers that imitate it.

A conversation is strict here: user and assistant take turns, every tool call is answered in the turn after it and in
no other, ids are unique and of few characters, and no text is blank. Canonical conversations promise none of that,
least of all when other providers wrote half of them. So ``_Talk`` lays out turns, while what costs, the JSON of each
message, is kept with the message as bytes that are only joined. What it puts in, it puts in at every later turn too:
the beginning of a conversation never changes, which the cache, and thoughts that are bound to it, depend on.

Breakpoints of the prompt cache are spliced into those bytes, at the ends of the tools, of the system prompt, of the
last user turn and of the one before it: the request before this one ended there, so its cache is found again however
many blocks a turn has (the provider looks back twenty). The top-level ``cache_control``, which moves by itself, has
only the last of these places and is unknown to imitators.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ridethrough.runtime.router.errors import TABLE, Rule
from ridethrough.runtime.router.messages import (
    AssistantMessage,
    Content,
    Finish,
    ImagePart,
    Message,
    ModelRequest,
    Part,
    ProviderPart,
    ReasoningPart,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    ToolSpec,
    Usage,
    UserMessage,
    parse_call,
    text_of,
)
from ridethrough.runtime.router.providers import bodies
from ridethrough.runtime.router.providers.anthropic_models import Traits, closed_schema, traits_of
from ridethrough.runtime.router.providers.bodies import count, dump, dump_all
from ridethrough.runtime.router.providers.history import (
    ANSWER_FIRST,
    EMPTY,
    UNREPLIED,
    Filler,
    History,
    Turn,
    left_out,
    noted,
)
from ridethrough.runtime.router.providers.parts import NO_IMAGE, arguments_of, images_in, inline, parts_of
from ridethrough.runtime.router.providers.streams import AnswerStream
from ridethrough.runtime.router.providers.structured import in_words
from ridethrough.runtime.router.providers.wire import Answer, Rendered

VERSION = "2023-06-01"
"""The only version there is; each request names it."""


class AnthropicMessages:
    """The wire for one configured provider; ``provider`` is its name, which reasoning is bound to."""

    def __init__(self, provider: str, *, table: Iterable[Rule] = TABLE) -> None:
        self.provider = provider
        self._table = tuple(table)

    @property
    def default_base_url(self) -> str:
        """The vendor's own server."""
        return "https://api.anthropic.com"

    @property
    def models_path(self) -> str:
        """The list of models."""
        return "v1/models"

    def authorize(self, key: str) -> dict[str, str]:
        """The key, and the version, without which the list of models is refused."""
        return {"x-api-key": key, "anthropic-version": VERSION}

    def render(self, request: ModelRequest, model: str, *, stream: bool) -> Rendered:
        """Write ``request`` as a body of ``/v1/messages``."""
        talk = _Talk(self.provider, request.messages)
        head = _Head(request, model, talk, stream)
        tools = [tool.rendered("anthropic", _tool) for tool in request.tools] or talk.stand_ins()
        body = dump(head.body)[:-1]
        if tools:
            body += b',"tools":[' + b",".join([*tools[:-1], _marked(tools[-1])]) + b"]"
        if system := [*talk.system, *head.system]:
            body += b',"system":[' + b",".join([*system[:-1], _marked(system[-1])]) + b"]"
        body += b',"messages":[' + b",".join(talk.turns(marked=bool(tools) or talk.answered)) + b"]}"
        headers = {**bodies.headers(stream=stream), "anthropic-version": VERSION, **head.headers}
        return Rendered("v1/messages", body, headers, (*head.notes, *talk.notes))

    def parse(self, body: bytes, deployment: str) -> Answer:
        """Read a body that came with status 200."""
        return bodies.read_answer(body, deployment, self._table, bodies.error_in, self._whole)

    def stream(self, deployment: str) -> MessagesStream:
        """Return a reader for one streamed answer."""
        return MessagesStream(self.provider, deployment, self._table)

    def _whole(self, payload: Any) -> Answer:
        return _Ending(payload).answer(payload["content"], self.provider)


# --- requests: all but the conversation -----------------------------------------------------------------------------

_BUDGETS = {"minimal": 1024, "low": 2048, "medium": 8192, "high": 16384, "xhigh": 23552}
"""Tokens to think with. The dearest and the answer stay below 32,000, the least that a thinking model can write."""

_LEAST_BUDGET = 1024  # tokens; the provider refuses less

_BINDING_BETA = "thinking-binding-controls-2026-08-01"


class _Head:
    """The body but for its tools, system prompt and turns; and what of the request did not get into it."""

    def __init__(self, request: ModelRequest, model: str, talk: _Talk, stream: bool) -> None:
        self.body: dict[str, Any] = {"model": model, "max_tokens": 0}
        self.system: list[bytes] = []
        self.headers: dict[str, str] = {}
        self.notes: list[str] = []
        self._request = request
        self._model = model
        self._traits: Traits = traits_of(model)
        self._talk = talk
        self._room = 0
        if stream:
            self.body["stream"] = True
        self._choose_tools()
        self._think()
        self._shape()
        self._sample()
        self.body["max_tokens"] = request.max_tokens or self._traits.max_tokens + self._room

    def _choose_tools(self) -> None:
        choice = self._request.tool_choice
        if not self._request.tools:
            if self._talk.calls:  # the stand-ins are there to be understood, not to be called
                self.body["tool_choice"] = {"type": "none"}
        elif choice == "none":
            self.body["tool_choice"] = {"type": "none"}
        elif choice != "auto" and not self._traits.forced_choice:
            self.notes.append(f"{self._model} cannot be forced to call a tool: it was left to choose")
        elif choice != "auto":
            self.body["tool_choice"] = {"type": "any"} if choice == "required" else {"type": "tool", "name": choice}

    def _think(self) -> None:
        effort, traits = self._request.reasoning, self._traits
        if effort == "none":
            self._do_not_think()
        elif traits.thinking == "adaptive" and (effort or traits.unasked):
            self._adapt(effort)
        elif effort and traits.thinking == "budget":
            self._budget(effort)
        elif effort and traits.thinking == "none":
            self.notes.append(f"reasoning was left out: {self._model} does not think")

    def _do_not_think(self) -> None:
        if self._traits.off == "never":
            self.notes.append(f"{self._model} cannot stop thinking: it was asked for low effort")
            self._adapt("low")
        elif self._traits.off != "unset":
            self.body["thinking"] = {"type": self._traits.off}

    def _adapt(self, effort: str | None) -> None:
        """Let it decide how long to think; shown thoughts keep the stream alive and readable."""
        thinking: dict[str, Any] = {"type": "adaptive"}
        if self._traits.display:
            thinking["display"] = "summarized"
        if self._traits.bound and self._talk.thought:
            thinking["block_binding"] = {"prefix_mismatch_behavior": "drop_block"}
            self.headers["anthropic-beta"] = _BINDING_BETA
        self.body["thinking"] = thinking
        self._room = _BUDGETS[effort or "high"]
        if effort:
            self.body["output_config"] = {"effort": self._effort(effort)}

    def _effort(self, effort: str) -> str:
        if effort in self._traits.efforts:
            return effort
        nearest = "low" if effort == "minimal" else "high"
        self.notes.append(f"{self._model} does not know the reasoning effort {effort!r}: it was asked for {nearest!r}")
        return nearest

    def _budget(self, effort: str) -> None:
        if obstacle := self._obstacle():
            self.notes.append(f"reasoning was left out: {obstacle}")
            return
        wanted = _BUDGETS[effort]
        budget = min(wanted, self._request.max_tokens // 2) if self._request.max_tokens else wanted
        if budget < _LEAST_BUDGET:
            self.notes.append("reasoning was left out: max_tokens leaves no room for it")
            return
        if budget < wanted:
            self.notes.append(f"reasoning was lowered to {budget} tokens: max_tokens leaves no room for {wanted}")
        self.body["thinking"] = {"type": "enabled", "budget_tokens": budget}
        self._room = budget

    def _obstacle(self) -> str | None:
        """Return what a budget for thinking cannot be combined with."""
        if self.body.get("tool_choice", {}).get("type") in ("any", "tool"):
            return f"{self._model} cannot think when it is forced to call a tool"
        if self._talk.unthought:
            return f"{self._model} cannot begin to think amid tool calls that another model began"
        return None

    def _shape(self) -> None:
        if (schema := self._request.output_schema) is None:
            return
        closed = closed_schema(schema) if self._traits.schema else None
        if closed is not None:
            self.body.setdefault("output_config", {})["format"] = {"type": "json_schema", "schema": closed}
            return
        self.system.append(_text(in_words(schema, tools=bool(self._request.tools))))
        self.notes.append(f"{self._model} cannot be held to this output schema: it was asked to follow it")

    def _sample(self) -> None:
        temperature = self._request.temperature
        if temperature is None or temperature == 1:  # which is the default
            return
        if not self._traits.sampling:
            self.notes.append(f"temperature was left out: {self._model} takes none")
        elif self.body.get("thinking", {}).get("type") in ("enabled", "adaptive"):
            self.notes.append(f"temperature was left out: {self._model} takes none while it thinks")
        else:
            self.body["temperature"] = min(temperature, 1.0)
            if temperature > 1:
                self.notes.append("temperature was lowered to 1, the highest here")


def _marked(piece: bytes) -> bytes:
    """Set a breakpoint of the prompt cache at the last object of ``piece``."""
    return piece[:-1] + b',"cache_control":{"type":"ephemeral"}}'


def _tool(tool: ToolSpec) -> bytes:
    return dump({"name": tool.name, "description": tool.description, "input_schema": tool.parameters})


# --- requests: the conversation -------------------------------------------------------------------------------------

_UNFIT = re.compile(r"[^a-zA-Z0-9_-]")

_LATE_SYSTEM = "system messages after the beginning were sent as text of the user's turn"


@dataclass
class _Turn:
    role: str
    pieces: list[bytes]

    def body(self, *, marked: bool) -> bytes:
        content = b",".join(self.pieces)
        return b'{"role":"%b","content":[%b]}' % (self.role.encode(), _marked(content) if marked else content)


class _Talk:
    """A conversation as turns. Walks all messages, but renders only those that were not rendered before."""

    def __init__(self, provider: str, messages: Sequence[Message]) -> None:
        self.system: list[bytes] = []
        self.calls: list[ToolCall] = []
        self.thought = False
        self._provider = provider
        self._key = f"anthropic/{provider}"
        self._turns: list[_Turn] = []
        self._user: list[bytes] = []
        self._begun_thinking = False
        self._looping = False
        self._paused = False
        self._history = History(messages, _fit)
        self._notes = noted(messages, f"notes\0{self._key}", partial(_notes, provider=provider))
        for turn in self._history.turns:
            if turn.answer is not None:
                self._assistant(turn.answer, turn)
            self._followers(turn)
        self._finish()

    @property
    def notes(self) -> list[str]:
        """What could not be carried, and what was put in."""
        return [*self._notes, *self._history.notes]

    @property
    def answered(self) -> bool:
        """Whether the model spoke before, so that it will be asked again."""
        return any(turn.role == "assistant" for turn in self._turns)

    @property
    def unthought(self) -> bool:
        """Whether it ends amid tool calls whose turn did not begin with a thought of this provider."""
        return self._looping and not self._begun_thinking

    def turns(self, *, marked: bool) -> list[bytes]:
        """Return the turns, if ``marked`` with breakpoints at the last two of the user."""
        users = [number for number, turn in enumerate(self._turns) if turn.role == "user"]
        marks = users[-2:] if marked else []
        return [turn.body(marked=number in marks) for number, turn in enumerate(self._turns)]

    def stand_ins(self) -> list[bytes]:
        """Return tools by the names of the calls: a conversation with calls is refused without any tools."""
        names = dict.fromkeys(map(_name, self.calls))
        return [dump({"name": name, "description": "", "input_schema": {"type": "object"}}) for name in names]

    def _assistant(self, message: AssistantMessage, turn: Turn) -> None:
        piece = message.rendered(turn.key(self._key), partial(_assistant, ids=turn.ids, provider=self._provider))
        if not piece:
            return
        marks = b""
        if not isinstance(message.content, str):
            marks = message.rendered(f"marks\0{self._key}", partial(_marks, provider=self._provider))
        self._end_user_turn()
        if not self._turns:
            self._say(ANSWER_FIRST)
        if self._paused and self._turns[-1].role == "assistant":
            self._turns[-1].pieces.append(piece)
        else:
            self._end_assistant_turn()
            self._turns.append(_Turn("assistant", [piece]))
            self._begun_thinking = _BEGINS in marks
        self.thought = self.thought or _THINKS in marks
        self._looping = bool(turn.ids)
        self._paused = _PAUSES in marks and not self._looping
        self.calls += message.tool_calls

    def _followers(self, turn: Turn) -> None:
        """Add what follows an answer to the user's turn: first the results of its calls, as the wire wants it."""
        pairs = list(zip(turn.results, turn.ids, strict=True))
        self._user += [result.rendered(f"{self._key}\0{id}", partial(_result, id=id)) for result, id in pairs]
        for result in turn.results:
            if result.is_error and images_in(result.content):
                self._user.append(result.rendered(f"images\0{self._key}", _images))
        for message in turn.others:
            if isinstance(message, UserMessage):
                self._user += _filled(message.rendered("anthropic", _user))
            elif self._turns or self._user:
                self._history.notes[_LATE_SYSTEM] = None
                self._user += _filled(message.rendered("late\0anthropic", _late_system))
            else:
                self.system += _filled(message.rendered("anthropic", _system))

    def _say(self, filler: Filler) -> None:
        """Say something for the user, where the wire wants something said."""
        self._turns.append(_Turn("user", [_text(self._history.fill(filler))]))

    def _end_user_turn(self) -> None:
        if self._user:
            self._turns.append(_Turn("user", self._user))
        self._user = []

    def _end_assistant_turn(self) -> None:
        if self._turns[-1].role == "assistant":
            self._say(UNREPLIED)

    def _finish(self) -> None:
        self._end_user_turn()
        if not self._turns:
            self._say(EMPTY)
        elif not self._paused:
            self._end_assistant_turn()


def _fit(id: str) -> str:
    return _UNFIT.sub("_", id)


def _filled(piece: bytes) -> list[bytes]:
    return [piece] if piece else []


# --- requests: messages ---------------------------------------------------------------------------------------------

_THINKS, _BEGINS, _PAUSES = b"t", b"b", b"p"
"""Marks of an answer: has a thought of the provider's, begins with one, ends with an item of it."""

_IMAGES = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})
_CITATIONS = "citations"


def _text(text: str) -> bytes:
    return dump({"type": "text", "text": text})


def _user(message: UserMessage) -> bytes:
    return dump_all(_blocks(message.content))


def _system(message: SystemMessage) -> bytes:
    return dump_all(block for block in _blocks(message.content) if block["type"] == "text")


def _late_system(message: SystemMessage) -> bytes:
    return _text(f"<system>\n{message.text}\n</system>") if message.text.strip() else b""


def _blocks(content: Content) -> Iterator[dict[str, Any]]:
    """Yield text and images; blank text, which is refused, is left out."""
    for part in parts_of(content):
        if isinstance(part, ImagePart):
            yield _image(part)
        elif isinstance(part, TextPart) and part.text.strip():
            yield {"type": "text", "text": part.text}


def _image(part: ImagePart) -> dict[str, Any]:
    if (found := inline(part)) is None:
        return {"type": "image", "source": {"type": "url", "url": part.url}}
    kind, data = _kind(found[0]), found[1]
    if kind not in _IMAGES:
        return {"type": "text", "text": NO_IMAGE}
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}


def _kind(media_type: str) -> str:
    return media_type.lower().replace("image/jpg", "image/jpeg")


def _result(message: ToolMessage, id: str) -> bytes:
    blocks = list(_blocks(message.content))
    if message.is_error:  # which is to be text, and not empty
        blocks = [block for block in blocks if block["type"] == "text"] or [{"type": "text", "text": "It failed."}]
    result: dict[str, Any] = {"type": "tool_result", "tool_use_id": id}
    if blocks:
        result["content"] = blocks
    if message.is_error:
        result["is_error"] = True
    return dump(result)


def _images(message: ToolMessage) -> bytes:
    """Return what an error shows, to stand after the results."""
    return dump_all(map(_image, images_in(message.content)))


def _assistant(message: AssistantMessage, ids: Sequence[str], provider: str) -> bytes:
    calls = [_call(call, id, provider) for call, id in zip(message.tool_calls, ids, strict=True)]
    blocks: list[dict[str, Any]] = []
    made = 0
    for part in parts_of(message.content):
        if not isinstance(part, ImagePart) and part.after_calls > made:
            blocks += calls[made : part.after_calls]
            made = part.after_calls
        _say(part, blocks, provider)
    blocks += calls[made:]
    if not blocks and message.refusal and message.refusal.strip():
        blocks.append({"type": "text", "text": message.refusal})
    return dump_all(blocks)


def _say(part: Part, blocks: list[dict[str, Any]], provider: str) -> None:
    if isinstance(part, ImagePart):
        blocks.append({"type": "text", "text": NO_IMAGE})
    elif isinstance(part, TextPart):
        blocks.extend(_blocks((part,)))
    elif isinstance(part, ProviderPart) and part.kind == _CITATIONS and part.provider == provider:
        if blocks and blocks[-1]["type"] == "text":
            blocks[-1][_CITATIONS] = part.data.get(_CITATIONS)
    elif _is_own(part, provider):
        blocks.append(part.data)


def _is_own(part: Part, provider: str) -> bool:
    """Whether ``part`` goes back as it came. Its type is asked for too: a name may have belonged to another wire."""
    if isinstance(part, ReasoningPart):
        return part.provider == provider and part.data.get("type") in ("thinking", "redacted_thinking")
    return isinstance(part, ProviderPart) and part.provider == provider and part.data.get("type") == part.kind


def _call(call: ToolCall, id: str, provider: str) -> dict[str, Any]:
    block: dict[str, Any] = {"type": "tool_use", "id": id, "name": _name(call), "input": arguments_of(call)}
    if call.provider == provider and "caller" in call.data:
        block["caller"] = call.data["caller"]
    return block


def _name(call: ToolCall) -> str:
    """Return the name that was called, made valid: models call tools that never were."""
    return _UNFIT.sub("_", call.name)[:128] or "tool"


def _marks(message: Message, provider: str) -> bytes:
    """Return what the layout of turns depends on."""
    parts = [part for part in parts_of(message.content) if not (isinstance(part, TextPart) and not part.text.strip())]
    own = [part for part in parts if isinstance(part, ReasoningPart | ProviderPart) and _is_own(part, provider)]
    marks = b""
    if any(isinstance(part, ReasoningPart) for part in own):
        marks += _THINKS
    if own and own[0] is parts[0] and isinstance(own[0], ReasoningPart):
        marks += _BEGINS
    if own and own[-1] is parts[-1] and isinstance(own[-1], ProviderPart) and own[-1].kind != _CITATIONS:
        marks += _PAUSES
    return marks


def _notes(message: Message, provider: str) -> Iterator[str]:
    """Yield what of a message does not get through."""
    yield from left_out(message, provider, partial(_is_own, provider=provider))
    images = images_in(message.content)
    if images and isinstance(message, AssistantMessage | SystemMessage):
        yield "images in answers and system messages were left out: this wire takes text there"
        return
    if images and isinstance(message, ToolMessage) and message.is_error:
        yield "images of failed tool calls were sent after their results: this wire takes text there"
    for image in images:
        if (found := inline(image)) and (kind := _kind(found[0])) not in _IMAGES:
            yield f"images of type {kind} were left out: this wire does not take them"


# --- answers --------------------------------------------------------------------------------------------------------

_FINISH: dict[str, Finish] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "refusal",
}


class _Ending:
    """What is known of an answer beside its content; a stream tells it in two parts."""

    def __init__(self, message: Mapping[str, Any] | None = None) -> None:
        self.reason: Any = None
        self._model = ""
        self._details: Mapping[str, Any] = {}
        self._usage: dict[str, Any] = {}
        self._notes: list[str] = []
        if message is not None:
            self.add(message, message.get("usage"))

    def add(self, message: Mapping[str, Any], usage: Mapping[str, Any] | None) -> None:
        """Take a message or the delta of one. Usage is cumulative, so later numbers replace earlier ones."""
        self.reason = message.get("stop_reason") or self.reason
        self._model = str(message.get("model") or self._model)
        self._details = message.get("stop_details") or self._details
        self._usage.update({key: value for key, value in (usage or {}).items() if value is not None})
        for change in message.get("input_transformations") or ():
            note = (
                f"the provider did not use all thoughts of earlier turns: {change.get('reason') or change.get('type')}"
            )
            self._notes += [] if note in self._notes else [note]

    def answer(self, blocks: Iterable[Mapping[str, Any]], provider: str) -> Answer:
        """Build the answer out of its blocks."""
        message = _message(blocks, provider)
        kind = _FINISH.get(str(self.reason), "other")
        if kind == "other":
            self._notes.append(self._unusual())
        elif kind == "refusal":
            message = message.model_copy(update={"refusal": self._refusal(message)})
        elif kind == "stop" and message.tool_calls:
            kind = "tool_calls"
        return Answer(message, kind, _usage(self._usage), self._model, tuple(self._notes))

    def _unusual(self) -> str:
        if self.reason == "pause_turn":
            return "the provider paused its own tools: send the conversation again and it goes on"
        return f"unknown finish reason {str(self.reason)[:60]!r}"

    def _refusal(self, message: AssistantMessage) -> str:
        told = self._details.get("explanation") or message.text.strip()
        category = self._details.get("category")
        return str(told or f"The model declined to answer{f' ({category})' if category else ''}.")


def _message(blocks: Iterable[Mapping[str, Any]], provider: str) -> AssistantMessage:
    parts: list[Part] = []
    calls: list[ToolCall] = []
    for block in blocks:
        if block["type"] == "tool_use":
            calls.append(_read_call(block, provider))
        else:
            parts += _read_part(block, provider, len(calls))
    content: Content = tuple(parts)
    if len(content) < 2 and all(isinstance(part, TextPart) and not part.after_calls for part in content):
        content = text_of(content)
    return AssistantMessage(content=content, tool_calls=tuple(calls))


def _read_call(block: Mapping[str, Any], provider: str) -> ToolCall:
    arguments = block.get("input")
    if arguments is not None and not isinstance(arguments, str | Mapping):
        arguments = json.dumps(arguments)
    call = parse_call(str(block["id"]), str(block["name"]), arguments)
    extra = {key: value for key, value in block.items() if key not in ("type", "id", "name", "input")}
    return call.model_copy(update={"provider": provider, "data": extra}) if extra else call


def _read_part(block: Mapping[str, Any], provider: str, calls: int) -> Iterator[Part]:
    kind, data = str(block["type"]), dict(block)
    if kind in ("thinking", "redacted_thinking"):
        yield ReasoningPart(text=str(block.get("thinking") or ""), provider=provider, data=data, after_calls=calls)
    elif kind != "text":
        yield ProviderPart(kind=kind, text=_readable(block), provider=provider, data=data, after_calls=calls)
    elif text := block.get("text"):
        yield TextPart(text=str(text), after_calls=calls)
        if citations := block.get(_CITATIONS):
            data = {"type": _CITATIONS, _CITATIONS: citations}
            yield ProviderPart(kind=_CITATIONS, provider=provider, data=data, after_calls=calls)


def _readable(block: Any) -> str:
    """Return what a person may read of a provider's own tool: the call, or texts and output of its result."""
    if isinstance(block, list):
        return "\n".join(text for item in block if (text := _readable(item)))
    if not isinstance(block, Mapping):
        return ""
    if "input" in block:
        return f"{block.get('name', '')}({json.dumps(block['input'], ensure_ascii=False)})"
    told = [block.get(key) for key in ("text", "title", "url", "stdout", "stderr", "error_code")]
    return "\n".join([str(text) for text in told if text] or _filled_text(_readable(block.get("content"))))


def _filled_text(text: str) -> list[str]:
    return [text] if text else []


def _usage(raw: Mapping[str, Any]) -> Usage | None:
    """Return the usage; this wire counts what came out of its cache, or went in, apart from the input."""
    if raw.get("input_tokens") is None and raw.get("output_tokens") is None:
        return None
    cached = count(raw.get("cache_read_input_tokens"))
    written = count(raw.get("cache_creation_input_tokens"))
    return Usage(
        input_tokens=count(raw.get("input_tokens")) + cached + written,
        output_tokens=count(raw.get("output_tokens")),
        cached_tokens=cached,
        cache_write_tokens=written,
        reasoning_tokens=count((raw.get("output_tokens_details") or {}).get("thinking_tokens")),
    )


# --- streams --------------------------------------------------------------------------------------------------------

_GROWS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}


@dataclass
class _DraftBlock:
    """A block that is being put together."""

    start: Mapping[str, Any]
    grown: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    signature: str = ""
    citations: list[Any] = field(default_factory=list[Any])

    def add(self, delta: Mapping[str, Any]) -> int:
        """Take a delta and return how many pieces of output it holds."""
        kind = delta["type"]
        if kind in _GROWS:
            piece = str(delta.get(_GROWS[kind]) or "")
            self.grown.setdefault(_GROWS[kind], []).append(piece)
            return bool(piece)
        if kind == "signature_delta":
            self.signature = str(delta["signature"])
        elif kind == "citations_delta":
            self.citations.append(delta["citation"])
        elif kind == "compaction_delta":
            self.start = {**self.start, "content": delta.get("content")}
        else:
            return 0
        return 1

    def build(self) -> dict[str, Any]:
        block = dict(self.start)
        for key, pieces in self.grown.items():
            if key == "partial_json":
                block["input"] = self._input("".join(pieces))
            else:
                block[key] = str(block.get(key) or "") + "".join(pieces)
        if self.signature:
            block["signature"] = self.signature
        if self.citations:
            block[_CITATIONS] = [*(block.get(_CITATIONS) or ()), *self.citations]
        return block

    def _input(self, raw: str) -> Any:
        """Return the input: of a call its text, which may be no JSON, of the provider's own tools an object."""
        if not raw.strip():
            return self.start.get("input") or {}
        if self.start["type"] == "tool_use":
            return raw
        call = parse_call("", "", raw)
        return call.arguments if call.arguments is not None else {"_invalid_json": raw}


class MessagesStream(AnswerStream):
    """Reads one streamed answer; see ``wire.Stream``."""

    def __init__(self, provider: str, deployment: str, table: tuple[Rule, ...] = TABLE) -> None:
        super().__init__(deployment, table)
        self.progress = 0
        self._provider = provider
        self._blocks: dict[int, _DraftBlock] = {}
        self._ending = _Ending()
        self._stopped = False

    @property
    def finished(self) -> bool:
        """Whether a ``stop_reason`` came."""
        return self._ending.reason is not None

    def _missing(self) -> str:
        if not self._stopped:
            return "message_stop"
        return "" if self.finished else "a stop_reason"

    def _answer(self) -> Answer:
        blocks = [self._blocks[index].build() for index in sorted(self._blocks)]
        return self._ending.answer(blocks, self._provider)

    def _read(self, kind: str, chunk: Mapping[str, Any]) -> str:
        if kind == "content_block_delta":
            return self._grow(self._blocks[chunk["index"]], chunk["delta"])
        if kind == "content_block_start":
            return self._begin(chunk["index"], chunk["content_block"])
        if kind == "message_start":
            self._ending.add(chunk["message"], chunk["message"].get("usage"))
        elif kind == "message_delta":
            self._ending.add(chunk["delta"], chunk.get("usage"))
        elif kind == "message_stop":
            self.done = self._stopped = True
        return ""

    def _begin(self, index: int, block: Mapping[str, Any]) -> str:
        """Open a block. Empty text and thought are no output yet; a call's name, or a whole item, is."""
        self._blocks[index] = _DraftBlock(block)
        text = str(block.get("text") or "") if block["type"] == "text" else ""
        if text or block.get("thinking") or block["type"] not in ("text", "thinking"):
            self.progress += 1
        return text

    def _grow(self, block: _DraftBlock, delta: Mapping[str, Any]) -> str:
        self.progress += block.add(delta)
        return str(delta.get("text") or "") if delta["type"] == "text_delta" else ""
