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

from ridethrough.runtime.errors import ModelError, ServerError, StreamBroken
from ridethrough.runtime.router.errors import TABLE, Rule, classify
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
from ridethrough.runtime.router.providers.anthropic_models import Traits, closed_schema, traits_of
from ridethrough.runtime.router.providers.sse import Event, EventParser
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
        body = _dump(head.body)[:-1]
        if tools:
            body += b',"tools":[' + b",".join([*tools[:-1], _marked(tools[-1])]) + b"]"
        if system := [*talk.system, *head.system]:
            body += b',"system":[' + b",".join([*system[:-1], _marked(system[-1])]) + b"]"
        body += b',"messages":[' + b",".join(talk.turns(marked=bool(tools) or talk.answered)) + b"]}"
        headers = {
            "content-type": "application/json",
            "accept": "text/event-stream" if stream else "application/json",
            "anthropic-version": VERSION,
            **head.headers,
        }
        return Rendered("v1/messages", body, headers, (*head.notes, *talk.notes))

    def parse(self, body: bytes, deployment: str) -> Answer:
        """Read a body that came with status 200."""
        payload = _json(body, deployment)
        if _is_error(payload):
            raise classify(200, payload, deployment=deployment, table=self._table)
        try:
            return _Ending(payload).answer(payload["content"], self.provider)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            text = f"{deployment} sent no answer in its answer ({type(error).__name__}): {_excerpt(body)}"
            raise ServerError(text, deployment=deployment, status=200) from None

    def stream(self, deployment: str) -> MessagesStream:
        """Return a reader for one streamed answer."""
        return MessagesStream(self.provider, deployment, self._table)


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
        told = json.dumps(schema, ensure_ascii=False)
        text = f"Answer with JSON that matches this JSON Schema, and with nothing else:\n{told}"
        self.system.append(_dump({"type": "text", "text": text}))
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


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _marked(piece: bytes) -> bytes:
    """Set a breakpoint of the prompt cache at the last object of ``piece``."""
    return piece[:-1] + b',"cache_control":{"type":"ephemeral"}}'


def _tool(tool: ToolSpec) -> bytes:
    return _dump({"name": tool.name, "description": tool.description, "input_schema": tool.parameters})


# --- requests: the conversation -------------------------------------------------------------------------------------

_UNFIT = re.compile(r"[^a-zA-Z0-9_-]")

_LATE_SYSTEM = "system messages after the beginning were sent as text of the user's turn"
_NO_BEGINNING = "a user's turn was put before the first answer: this wire wants one there"
_NO_QUESTION = "'Continue.' was put after answers that nobody replied to: this wire wants a user's turn there"
_NO_MESSAGE = "'Begin.' was put into the empty conversation: this wire wants a user's turn there"
_ORPHAN = "results of tool calls that are not in the conversation were sent as text"
_UNANSWERED = "tool calls without a result were answered with an error"


@dataclass
class _Turn:
    role: str
    pieces: list[bytes]

    def body(self, *, marked: bool) -> bytes:
        content = b",".join(self.pieces)
        return b'{"role":"%b","content":[%b]}' % (self.role.encode(), _marked(content) if marked else content)


class _Talk:
    """A conversation as turns. Walks all messages, but renders only those that were not rendered before."""

    def __init__(self, provider: str, messages: Iterable[Message]) -> None:
        self.system: list[bytes] = []
        self.notes: list[str] = []
        self.calls: list[ToolCall] = []
        self.thought = False
        self._provider = provider
        self._key = f"anthropic/{provider}"
        self._turns: list[_Turn] = []
        self._results: list[bytes] = []
        self._others: list[bytes] = []
        self._open: list[tuple[ToolCall, str]] = []
        self._used: dict[str, int] = {}
        self._begun_thinking = False
        self._looping = False
        self._paused = False
        for message in messages:
            self._add(message)
        self._finish()

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
        return [_dump({"name": name, "description": "", "input_schema": {"type": "object"}}) for name in names]

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _add(self, message: Message) -> None:
        marks = b"" if isinstance(message.content, str) else self._marks(message)
        if isinstance(message, AssistantMessage):
            self._assistant(message, marks)
        elif isinstance(message, ToolMessage):
            self._result(message)
        elif isinstance(message, UserMessage):
            self._others += _filled(message.rendered("anthropic", _user))
        elif self._turns or self._results or self._others:
            self._note(_LATE_SYSTEM)
            self._others += _filled(message.rendered("anthropic/late", _late_system))
        else:
            self.system += _filled(message.rendered("anthropic", _system))

    def _marks(self, message: Message) -> bytes:
        """Return the marks of ``message`` and take over its notes."""
        facts = message.rendered("facts/" + self._key, partial(_facts, provider=self._provider))
        marks, *notes = facts.split(b"\n")
        for note in notes:
            self._note(note.decode())
        return marks

    def _assistant(self, message: AssistantMessage, marks: bytes) -> None:
        ids = [self._unique(call.id) for call in message.tool_calls]
        key = "/".join((self._key, *ids))
        if not (piece := message.rendered(key, partial(_assistant, ids=ids, provider=self._provider))):
            return
        self._end_user_turn()
        if not self._turns:
            self._say(_NO_BEGINNING, "(The conversation begins with an answer.)")
        if self._paused and self._turns[-1].role == "assistant":
            self._turns[-1].pieces.append(piece)
        else:
            self._end_assistant_turn()
            self._turns.append(_Turn("assistant", [piece]))
            self._begun_thinking = _BEGINS in marks
        self.thought = self.thought or _THINKS in marks
        self._paused = _PAUSES in marks and not ids
        self._open = list(zip(message.tool_calls, ids, strict=True))
        self.calls += message.tool_calls

    def _say(self, note: str, text: str) -> None:
        """Say something for the user, where the wire wants something said."""
        self._turns.append(_Turn("user", [_text(text)]))
        self._note(note)

    def _unique(self, id: str) -> str:
        """Return an id that fits and is used only once: some providers count anew in each turn."""
        base = fit = _UNFIT.sub("_", id) or "call"
        while fit in self._used:
            self._used[base] += 1
            fit = f"{base}_{self._used[base]}"
        self._used[fit] = 1
        return fit

    def _result(self, message: ToolMessage) -> None:
        for number, (call, id) in enumerate(self._open):
            if call.id == message.tool_call_id:
                del self._open[number]
                self._results.append(message.rendered(f"anthropic/result/{id}", partial(_result, id=id)))
                self._others += _filled(message.rendered("anthropic/images", _images_of_error))
                return
        self._note(_ORPHAN)
        self._others.append(message.rendered("anthropic/orphan", _orphan))

    def _end_user_turn(self) -> None:
        for _, id in self._open:
            self._note(_UNANSWERED)
            self._results.append(_unanswered(id))
        self._looping = bool(self._results)
        if pieces := [*self._results, *self._others]:
            self._turns.append(_Turn("user", pieces))
        self._open, self._results, self._others = [], [], []

    def _end_assistant_turn(self) -> None:
        if self._turns[-1].role == "assistant":
            self._say(_NO_QUESTION, "Continue.")

    def _finish(self) -> None:
        self._end_user_turn()
        if not self._turns:
            self._say(_NO_MESSAGE, "Begin.")
        elif not self._paused:
            self._end_assistant_turn()


def _filled(piece: bytes) -> list[bytes]:
    return [piece] if piece else []


# --- requests: messages ---------------------------------------------------------------------------------------------

_THINKS, _BEGINS, _PAUSES = b"t", b"b", b"p"
"""Marks of an answer: has a thought of the provider's, begins with one, ends with an item of it."""

_IMAGES = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})
_DATA_URL = re.compile(r"data:([^;,]+);base64,(.*)", re.DOTALL)
_CITATIONS = "citations"


def _parts(content: Content) -> tuple[Part, ...]:
    return (TextPart(text=content),) if isinstance(content, str) else content


def _join(blocks: Iterable[Mapping[str, Any]]) -> bytes:
    return b",".join([_dump(block) for block in blocks])


def _text(text: str) -> bytes:
    return _dump({"type": "text", "text": text})


def _user(message: UserMessage) -> bytes:
    return _join(_blocks(message.content))


def _system(message: SystemMessage) -> bytes:
    return _join(block for block in _blocks(message.content) if block["type"] == "text")


def _late_system(message: SystemMessage) -> bytes:
    return _text(f"<system>\n{message.text}\n</system>") if message.text.strip() else b""


def _blocks(content: Content) -> Iterator[dict[str, Any]]:
    """Yield text and images; blank text, which is refused, is left out."""
    for part in _parts(content):
        if isinstance(part, ImagePart):
            yield _image(part)
        elif isinstance(part, TextPart) and part.text.strip():
            yield {"type": "text", "text": part.text}


def _image(part: ImagePart) -> dict[str, Any]:
    kind, data = _source(part)
    if data is None:
        return {"type": "image", "source": {"type": "url", "url": part.url}}
    if kind not in _IMAGES:
        return {"type": "text", "text": f"[an image of type {kind} was left out]"}
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}


def _source(part: ImagePart) -> tuple[str, str | None]:
    """Return an image's type and its data, if it is not a URL of elsewhere."""
    inline = _DATA_URL.fullmatch(part.url or "")
    kind, data = (inline[1], inline[2]) if inline else (part.media_type, part.data)
    return kind.lower().replace("image/jpg", "image/jpeg"), data


def _result(message: ToolMessage, id: str) -> bytes:
    blocks = list(_blocks(message.content))
    if message.is_error:  # which is to be text, and not empty
        blocks = [block for block in blocks if block["type"] == "text"] or [{"type": "text", "text": "It failed."}]
    result: dict[str, Any] = {"type": "tool_result", "tool_use_id": id}
    if blocks:
        result["content"] = blocks
    if message.is_error:
        result["is_error"] = True
    return _dump(result)


def _images_of_error(message: ToolMessage) -> bytes:
    """Return what an error shows, to stand after the results."""
    return _join(block for block in _blocks(message.content) if message.is_error and block["type"] == "image")


def _orphan(message: ToolMessage) -> bytes:
    told = f"Result of an earlier call of {message.name or 'a tool'}:"
    return _join([{"type": "text", "text": told}, *_blocks(message.content)])


def _unanswered(id: str) -> bytes:
    text = "There is no result of this call: it was not made, or was interrupted."
    content = [{"type": "text", "text": text}]
    return _dump({"type": "tool_result", "tool_use_id": id, "content": content, "is_error": True})


def _assistant(message: AssistantMessage, ids: Sequence[str], provider: str) -> bytes:
    calls = [_call(call, id, provider) for call, id in zip(message.tool_calls, ids, strict=True)]
    blocks: list[dict[str, Any]] = []
    made = 0
    for part in _parts(message.content):
        if isinstance(part, ReasoningPart | ProviderPart) and part.after_calls > made:
            blocks += calls[made : part.after_calls]
            made = part.after_calls
        _say(part, blocks, provider)
    blocks += calls[made:]
    if not blocks and message.refusal and message.refusal.strip():
        blocks.append({"type": "text", "text": message.refusal})
    return _join(blocks)


def _say(part: Part, blocks: list[dict[str, Any]], provider: str) -> None:
    if isinstance(part, ImagePart):
        blocks.append({"type": "text", "text": "[an image was left out]"})
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
    block: dict[str, Any] = {"type": "tool_use", "id": id, "name": _name(call), "input": _input(call)}
    if call.provider == provider and "caller" in call.data:
        block["caller"] = call.data["caller"]
    return block


def _name(call: ToolCall) -> str:
    """Return the name that was called, made valid: models call tools that never were."""
    return _UNFIT.sub("_", call.name)[:128] or "tool"


def _input(call: ToolCall) -> dict[str, Any]:
    """Return arguments that are JSON; others are wrapped, or no later request would be accepted."""
    if call.arguments is None:
        return {"_invalid_json": call.raw or ""}
    try:
        json.dumps(call.arguments, allow_nan=False)
    except ValueError:
        return {"_invalid_json": json.dumps(call.arguments)}
    return call.arguments


def _facts(message: Message, provider: str) -> bytes:
    """Return what the layout of turns depends on: a line of marks, then one for each thing that cannot be carried."""
    parts = [part for part in _parts(message.content) if not (isinstance(part, TextPart) and not part.text.strip())]
    own = [part for part in parts if isinstance(part, ReasoningPart | ProviderPart) and _is_own(part, provider)]
    marks = b""
    if any(isinstance(part, ReasoningPart) for part in own):
        marks += _THINKS
    if own and own[0] is parts[0] and isinstance(own[0], ReasoningPart):
        marks += _BEGINS
    if own and own[-1] is parts[-1] and isinstance(own[-1], ProviderPart) and own[-1].kind != _CITATIONS:
        marks += _PAUSES
    notes = dict.fromkeys(note for part in parts if (note := _dropped(part, message, provider)))
    return b"\n".join([marks, *(note.encode("utf-8", "replace").replace(b"\n", b" ") for note in notes)])


def _dropped(part: Part, message: Message, provider: str) -> str | None:
    """Say what of ``part`` this wire cannot carry."""
    if isinstance(part, ImagePart):
        return _dropped_image(part, message)
    if isinstance(part, TextPart) or _is_own(part, provider):
        return None
    name = part.provider or "an unknown provider"
    if isinstance(part, ReasoningPart):
        return f"reasoning of {name} was left out: only that provider can read it"
    return f"items of {name} were left out: only that provider can read them"


def _dropped_image(part: ImagePart, message: Message) -> str | None:
    if isinstance(message, AssistantMessage | SystemMessage):
        return "images in answers and system messages were left out: this wire takes text there"
    kind, data = _source(part)
    if data is not None and kind not in _IMAGES:
        return f"images of type {kind} were left out: this wire does not take them"
    if isinstance(message, ToolMessage) and message.is_error:
        return "images of failed tool calls were sent after their results: this wire takes text there"
    return None


# --- answers --------------------------------------------------------------------------------------------------------

_FINISH: dict[str, Finish] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "refusal",
}


def _json(body: bytes, deployment: str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        what = "an HTML page" if body.lstrip()[:1] == b"<" else "broken JSON"
        text = f"{deployment} answered 200 with {what}: {_excerpt(body)}; check base_url if this goes on"
        raise ServerError(text, deployment=deployment, status=200) from None


def _excerpt(body: bytes) -> str:
    return re.sub(r"\s+", " ", body[:200].decode("utf-8", "replace"))


def _is_error(payload: Any) -> bool:
    return isinstance(payload, Mapping) and (payload.get("type") == "error" or bool(payload.get("error")))


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
    if len(parts) < 2 and all(isinstance(part, TextPart) for part in parts):
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
        yield TextPart(text=str(text))
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
    cached = int(raw.get("cache_read_input_tokens") or 0)
    written = int(raw.get("cache_creation_input_tokens") or 0)
    return Usage(
        input_tokens=int(raw.get("input_tokens") or 0) + cached + written,
        output_tokens=int(raw.get("output_tokens") or 0),
        cached_tokens=cached,
        cache_write_tokens=written,
        reasoning_tokens=int((raw.get("output_tokens_details") or {}).get("thinking_tokens") or 0),
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


class MessagesStream:
    """Reads one streamed answer; see ``wire.Stream``."""

    def __init__(self, provider: str, deployment: str, table: tuple[Rule, ...] = TABLE) -> None:
        self.done = False
        self.progress = 0
        self._provider = provider
        self._deployment = deployment
        self._table = table
        self._events = EventParser()
        self._blocks: dict[int, _DraftBlock] = {}
        self._ending = _Ending()

    @property
    def finished(self) -> bool:
        """Whether a ``stop_reason`` came."""
        return self._ending.reason is not None

    def feed(self, piece: bytes) -> str:
        """Take a piece of the stream and return the text that it adds."""
        return "".join([self._event(event) for event in self._events.feed(piece)])

    def close(self) -> Answer:
        """Return the answer at the end of the stream."""
        if not self.done:
            for event in self._events.close():
                self._event(event)
        if not self.done or not self.finished:
            missing = "a stop_reason" if self.done else "message_stop"
            raise self._broken(f"ended without {missing}, so its answer is not whole")
        blocks = [self._blocks[index].build() for index in sorted(self._blocks)]
        try:
            return self._ending.answer(blocks, self._provider)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise self._broken(f"carried a block that is no block ({type(error).__name__})") from None

    def _event(self, event: Event) -> str:
        if self.done or event.data.strip() == "[DONE]":
            return ""
        data = self._data(event)
        try:
            return self._read(str(data.get("type") or event.name), data)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise self._broken(f"carried an event that is no event ({type(error).__name__})") from None

    def _data(self, event: Event) -> Mapping[str, Any]:
        try:
            data = json.loads(event.data)
        except (ValueError, RecursionError):
            data = None
        if event.name == "error" or _is_error(data):
            raise self._error(data or event.data)
        if not isinstance(data, Mapping):
            raise self._broken(f"carried a malformed event: {event.data[:80]!r}")
        return data

    def _read(self, kind: str, data: Mapping[str, Any]) -> str:
        if kind == "content_block_delta":
            return self._grow(self._blocks[data["index"]], data["delta"])
        if kind == "content_block_start":
            return self._begin(data["index"], data["content_block"])
        if kind == "message_start":
            self._ending.add(data["message"], data["message"].get("usage"))
        elif kind == "message_delta":
            self._ending.add(data["delta"], data.get("usage"))
        elif kind == "message_stop":
            self.done = True
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

    def _error(self, body: Any) -> ModelError:
        return classify(200, body, deployment=self._deployment, table=self._table)

    def _broken(self, what: str) -> StreamBroken:
        return StreamBroken(f"the stream of {self._deployment} {what}", deployment=self._deployment, status=200)
