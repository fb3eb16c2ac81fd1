"""The Chat Completions wire, as its inventor and some twenty imitators speak it.

Where they differ, the difference is data (``Quirks``) or is read tolerantly: tool calls without an index, whole in one
chunk, or with their id repeated; usage in odd places; a missing ``[DONE]``. What is not tolerated is an answer that is
not whole: a stream without a ``finish_reason`` is broken, however plausible its text. (One exception, seen in the wild:
usage and ``[DONE]`` without a reason. A server that counted the answer has finished it; one that was cut cannot count.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

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
    ReasoningPart,
    TextPart,
    ToolCall,
    ToolMessage,
    ToolSpec,
    Usage,
    parse_call,
    text_of,
)
from ridethrough.runtime.router.providers.sse import Event, EventParser
from ridethrough.runtime.router.providers.wire import Answer, Rendered


@dataclass(frozen=True)
class Quirks:
    """Where a server differs: the key that caps output, and whether it takes ``stream_options``."""

    max_tokens_key: str = "max_tokens"
    stream_options: bool = True


QUIRKS: dict[str, Quirks] = {
    "api.openai.com": Quirks(max_tokens_key="max_completion_tokens"),
    "openai.azure.com": Quirks(max_tokens_key="max_completion_tokens"),
    "api.mistral.ai": Quirks(stream_options=False),
}
"""By host name, or the end of one."""


def quirks_of(base_url: str) -> Quirks:
    """Return what is known of the server at ``base_url``."""
    host = urlsplit(base_url).hostname or ""
    return next((quirks for name, quirks in QUIRKS.items() if host == name or host.endswith("." + name)), Quirks())


class OpenAIChat:
    """The wire for one configured provider; ``provider`` is its name, which reasoning is bound to."""

    def __init__(self, provider: str, *, quirks: Quirks | None = None, table: Iterable[Rule] = TABLE) -> None:
        self.provider = provider
        self._quirks = quirks or Quirks()
        self._table = tuple(table)

    @property
    def default_base_url(self) -> str:
        """The inventor's server."""
        return "https://api.openai.com/v1"

    @property
    def models_path(self) -> str:
        """The list of models."""
        return "models"

    def authorize(self, key: str) -> dict[str, str]:
        """A bearer token, except where the quirks say otherwise."""
        return {"authorization": f"Bearer {key}"}

    def render(self, request: ModelRequest, model: str, *, stream: bool) -> Rendered:
        """Write ``request`` as a body of ``/chat/completions``."""
        key, write = f"openai-chat/{self.provider}", self._message
        messages = b",".join([message.rendered(key, write) for message in request.messages])
        body = _head(model, stream, self._quirks, request) + b',"messages":[' + messages + b"]"
        if request.tools:
            body += b',"tools":[' + b",".join(tool.rendered("openai-chat", _tool) for tool in request.tools) + b"]"
        headers = {"content-type": "application/json", "accept": "text/event-stream" if stream else "application/json"}
        return Rendered("chat/completions", body + b"}", headers, tuple(_dropped(request.messages, self.provider)))

    def parse(self, body: bytes, deployment: str) -> Answer:
        """Read a body that came with status 200."""
        payload = _json(body, deployment)
        if error := _error_in(payload):
            raise classify(200, error, deployment=deployment, table=self._table)
        try:
            return _whole(payload, self.provider)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            text = f"{deployment} sent no answer in its answer ({type(error).__name__}): {_excerpt(body)}"
            raise ServerError(text, deployment=deployment, status=200) from None

    def stream(self, deployment: str) -> ChatStream:
        """Return a reader for one streamed answer."""
        return ChatStream(self.provider, deployment, self._table)

    def _message(self, message: Message) -> bytes:
        return _dump(_message(message, self.provider))


# --- requests -------------------------------------------------------------------------------------------------------


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _head(model: str, stream: bool, quirks: Quirks, request: ModelRequest) -> bytes:
    """Return the body's beginning without its closing brace: everything but messages and tools."""
    head: dict[str, Any] = {"model": model}
    if stream:
        head["stream"] = True
        if quirks.stream_options:
            head["stream_options"] = {"include_usage": True}
    if request.tools and request.tool_choice != "auto":
        head["tool_choice"] = _tool_choice(request.tool_choice)
    if request.output_schema is not None:
        head["response_format"] = _response_format(request.output_schema)
    if request.max_tokens is not None:
        head[quirks.max_tokens_key] = request.max_tokens
    if request.temperature is not None:
        head["temperature"] = request.temperature
    if request.reasoning is not None:
        head["reasoning_effort"] = request.reasoning
    return _dump(head)[:-1]


def _tool_choice(choice: str) -> object:
    return choice if choice in ("none", "required") else {"type": "function", "function": {"name": choice}}


def _response_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    name = re.sub(r"[^A-Za-z0-9_-]", "_", str(schema.get("title") or "output"))[:64]
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": _is_strict(schema)}}


def _is_strict(schema: Any) -> bool:
    """Whether every object in ``schema`` is closed and requires all it has, which strict decoding insists on."""
    if isinstance(schema, list):
        return all(_is_strict(item) for item in schema)
    if not isinstance(schema, Mapping):
        return True
    if schema.get("type") == "object" or "properties" in schema:
        closed = schema.get("additionalProperties") is False
        if not closed or set(schema.get("properties", {})) != set(schema.get("required", [])):
            return False
    return all(_is_strict(value) for value in schema.values())


def _tool(tool: ToolSpec) -> bytes:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return _dump({"type": "function", "function": function})


def _message(message: Message, provider: str) -> dict[str, Any]:
    if isinstance(message, AssistantMessage):
        return _assistant(message, provider)
    if isinstance(message, ToolMessage):
        return {"role": "tool", "tool_call_id": message.tool_call_id, "content": _tool_text(message.content)}
    return {"role": message.role, "content": _content(message.content)}


def _content(content: Content) -> Any:
    if isinstance(content, str):
        return content
    return [_part(part) for part in content if isinstance(part, TextPart | ImagePart)]


def _part(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image_url", "image_url": {"url": part.url or f"data:{part.media_type};base64,{part.data}"}}


def _tool_text(content: Content) -> str:
    """Return a tool's result as text: this wire takes no images there."""
    if isinstance(content, str):
        return content
    images = any(isinstance(part, ImagePart) for part in content)
    return text_of(content) + ("\n[an image was left out]" if images else "")


def _assistant(message: AssistantMessage, provider: str) -> dict[str, Any]:
    wire: dict[str, Any] = {"role": "assistant", "content": message.text or None}
    for part in _reasoning(message.content, provider):
        wire.update(part.data)
    if (thinking := wire.pop("thinking", None)) is not None:
        wire["content"] = [{"type": "thinking", "thinking": thinking}, {"type": "text", "text": message.text}]
    if message.refusal is not None:
        wire["refusal"] = message.refusal
    if message.tool_calls:
        wire["tool_calls"] = [_call(call) for call in message.tool_calls]
    elif wire["content"] is None:
        wire["content"] = message.refusal or ""
    return wire


def _reasoning(content: Content, provider: str) -> Iterator[ReasoningPart]:
    if not isinstance(content, str):
        yield from (part for part in content if isinstance(part, ReasoningPart) and part.provider == provider)


def _call(call: ToolCall) -> dict[str, Any]:
    """Write a call; broken arguments are wrapped, since servers refuse a history that is not JSON."""
    arguments: Any = call.arguments if call.arguments is not None else {"_invalid_json": call.raw or ""}
    text = json.dumps(arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": text}}


def _dropped(messages: Iterable[Message], provider: str) -> Iterator[str]:
    """Say what of the conversation this wire cannot carry."""
    rich = [(message, message.content) for message in messages if not isinstance(message.content, str)]
    parts = [(message, part) for message, content in rich for part in content]
    foreign = {part.provider for _, part in parts if isinstance(part, ReasoningPart) and part.provider != provider}
    for name in sorted(foreign):
        yield f"reasoning of {name or 'an unknown provider'} was left out: only that provider can read it"
    if any(isinstance(part, ImagePart) and isinstance(message, ToolMessage) for message, part in parts):
        yield "images in tool results were left out: this wire takes text there"


# --- answers --------------------------------------------------------------------------------------------------------

_FINISH: dict[str, Finish] = {
    "stop": "stop",
    "eos": "stop",
    "end_turn": "stop",
    "tool_calls": "tool_calls",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "content_filter": "content_filter",
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


def _error_in(payload: Any) -> Any:
    """Return what says that a body or chunk with status 200 is an error, ``None`` when it is not one."""
    if isinstance(payload, list) and payload:
        payload = payload[0]
    if not isinstance(payload, Mapping):
        return None
    if payload.get("error"):
        return payload
    if payload.get("object") == "error":
        return payload
    choices = payload.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, Mapping) and first.get("error") else None


def _whole(payload: Any, provider: str) -> Answer:
    choice = payload["choices"][0]
    draft = _Draft(provider)
    if choice.get("finish_reason") != "content_filter":
        draft.add(choice["message"])
    elif message := choice.get("message"):  # a filtered answer may have none
        draft.add(message)
    return draft.answer(choice.get("finish_reason"), _usage(payload), str(payload.get("model") or ""))


def _usage(payload: Mapping[str, Any]) -> Usage | None:
    raw = payload.get("usage") or (payload.get("x_groq") or {}).get("usage")
    if not isinstance(raw, Mapping) or raw.get("prompt_tokens") is None:
        return None
    cached = (raw.get("prompt_tokens_details") or {}).get("cached_tokens") or raw.get("prompt_cache_hit_tokens")
    return Usage(
        input_tokens=int(raw["prompt_tokens"]),
        output_tokens=int(raw.get("completion_tokens") or 0),
        cached_tokens=int(cached or raw.get("num_cached_tokens") or 0),
        reasoning_tokens=int((raw.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0),
    )


@dataclass
class _DraftCall:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list[str])

    def build(self, number: int, used: set[str]) -> ToolCall:
        """Build the call; ids that are missing or used twice get one of their own."""
        unique = self.id or f"call_{number}"
        while unique in used:
            unique = f"{self.id or 'call'}_{number}"
            number += 1
        used.add(unique)
        return parse_call(unique, self.name, "".join(self.arguments))


class _Draft:
    """An answer that is being put together, from one message or from many deltas: both have the same fields."""

    def __init__(self, provider: str) -> None:
        self.pieces = 0
        self._provider = provider
        self._text: list[str] = []
        self._refusal: list[str] = []
        self._reasoning: dict[str, list[Any]] = {}
        self._calls: list[_DraftCall] = []
        self._by_index: dict[int, _DraftCall] = {}

    def add(self, delta: Mapping[str, Any]) -> str:
        """Take a message or a delta and return the text that it adds."""
        before = self.pieces
        text = self._add_content(delta.get("content"))
        for key in ("reasoning_content", "reasoning", "reasoning_details"):
            if value := delta.get(key):
                self._note_reasoning(key, value)
        if refusal := delta.get("refusal"):
            self._refusal.append(str(refusal))
            self.pieces += 1
        for piece in delta.get("tool_calls") or ():
            self._add_call(piece)
        if function := delta.get("function_call"):
            self._add_call({"index": 0, "function": function})
        if text and self.pieces == before:
            self.pieces += 1
        return text

    def answer(self, finish: Any, usage: Usage | None, model: str) -> Answer:
        """Build the answer; ``finish`` is the provider's own reason."""
        used: set[str] = set()
        calls = tuple(call.build(number, used) for number, call in enumerate(self._calls))
        refusal = "".join(self._refusal) or None
        message = AssistantMessage(content=self._content(), tool_calls=calls, refusal=refusal)
        kind = _FINISH.get(str(finish), "other")
        notes = (f"unknown finish reason {str(finish)[:60]!r}",) if kind == "other" else ()
        if calls and (kind == "stop" or finish is None):
            kind = "tool_calls"
        elif refusal and kind == "stop":
            kind = "refusal"
        return Answer(message, kind, usage, model, notes)

    def _add_content(self, content: Any) -> str:
        if isinstance(content, list):
            return "".join(self._add_part(part) for part in content)
        if content:
            self._text.append(str(content))
        return str(content or "")

    def _add_part(self, part: Mapping[str, Any]) -> str:
        if part.get("type") == "thinking":
            self._note_reasoning("thinking", list(part.get("thinking") or ()))
            return ""
        return self._add_content(part.get("text") if part.get("type") == "text" else None)

    def _note_reasoning(self, key: str, value: Any) -> None:
        self._reasoning.setdefault(key, []).extend(value if isinstance(value, list) else [value])
        self.pieces += 1

    def _content(self) -> Content:
        text = "".join(self._text)
        if not self._reasoning:
            return text
        data = {key: _joined(values) for key, values in self._reasoning.items()}
        thought = ReasoningPart(text=_thought(data), provider=self._provider, data=data)
        parts: list[Part] = [thought]
        return (*parts, TextPart(text=text)) if text else (thought,)

    def _add_call(self, piece: Mapping[str, Any]) -> None:
        function = piece.get("function") or {}
        call = self._call_for(piece.get("index"), str(piece.get("id") or ""), str(function.get("name") or ""))
        call.id = call.id or str(piece.get("id") or "")
        call.name = call.name or str(function.get("name") or "")
        arguments = function.get("arguments")
        if arguments:
            call.arguments.append(arguments if isinstance(arguments, str) else json.dumps(arguments))
        self.pieces += 1

    def _call_for(self, index: Any, id: str, name: str) -> _DraftCall:
        """Find the call that a piece belongs to: by index, else by id, else the last one, else it is a new one."""
        if isinstance(index, int):
            known = self._by_index.get(index)
            if known is not None and not (id and known.id and id != known.id and name):
                return known
            self._by_index[index] = call = self._new_call()
            return call
        same = next((call for call in self._calls if id and call.id == id), None)
        if same is not None:
            return same
        return self._new_call() if id or name or not self._calls else self._calls[-1]

    def _new_call(self) -> _DraftCall:
        self._calls.append(_DraftCall())
        return self._calls[-1]


def _joined(values: list[Any]) -> Any:
    """Join streamed pieces of reasoning: texts to one text, detail objects of the same block to one object."""
    if all(isinstance(value, str) for value in values):
        return "".join(values)
    blocks: list[Any] = []
    for value in values:
        if blocks and _same_block(blocks[-1], value):
            blocks[-1] = _merged(blocks[-1], value)
        else:
            blocks.append(value)
    return blocks


def _same_block(left: Any, right: Any) -> bool:
    if not (isinstance(left, Mapping) and isinstance(right, Mapping)) or left.get("type") != right.get("type"):
        return False
    return left.get("index") == right.get("index") and "data" not in left


def _merged(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(left)
    for key, value in right.items():
        old = merged.get(key)
        if key in ("text", "summary") and isinstance(old, str) and isinstance(value, str):
            merged[key] = old + value
        elif value is not None:
            merged[key] = value
    return merged


def _thought(data: Mapping[str, Any]) -> str:
    """Return reasoning as text for people."""
    for key in ("reasoning_content", "reasoning"):
        if isinstance(text := data.get(key), str):
            return text
    blocks = data.get("thinking") or data.get("reasoning_details") or ()
    return "".join(str(block.get("text") or "") for block in blocks if isinstance(block, Mapping))


# --- streams --------------------------------------------------------------------------------------------------------


class ChatStream:
    """Reads one streamed answer; see ``wire.Stream``."""

    def __init__(self, provider: str, deployment: str, table: tuple[Rule, ...] = TABLE) -> None:
        self.done = False
        self._deployment = deployment
        self._table = table
        self._events = EventParser()
        self._draft = _Draft(provider)
        self._finish: Any = None
        self._usage: Usage | None = None
        self._model = ""

    @property
    def progress(self) -> int:
        """How many pieces of output came."""
        return self._draft.pieces

    @property
    def finished(self) -> bool:
        """Whether a ``finish_reason`` came."""
        return self._finish is not None

    def feed(self, piece: bytes) -> str:
        """Take a piece of the stream and return the text that it adds."""
        return "".join([self._event(event) for event in self._events.feed(piece)])

    def close(self) -> Answer:
        """Return the answer at the end of the stream."""
        if not self.done:
            for event in self._events.close():
                self._event(event)
        if self._finish is None and not (self.done and self._usage):
            raise self._broken("ended without a finish_reason, so its answer is not whole")
        return self._draft.answer(self._finish, self._usage, self._model)

    def _event(self, event: Event) -> str:
        if self.done:
            return ""
        if event.data.strip() == "[DONE]":
            self.done = True
            return ""
        chunk = self._chunk(event)
        try:
            return self._read(chunk)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise self._broken(f"carried a chunk that is no chunk ({type(error).__name__})") from None

    def _chunk(self, event: Event) -> Mapping[str, Any]:
        try:
            chunk = json.loads(event.data)
        except (ValueError, RecursionError):
            chunk = None
        if event.name == "error" or _error_in(chunk):
            raise self._error(_error_in(chunk) or chunk or event.data)
        if not isinstance(chunk, Mapping):
            raise self._broken(f"carried a malformed chunk: {event.data[:80]!r}")
        return chunk

    def _read(self, chunk: Mapping[str, Any]) -> str:
        self._model = self._model or str(chunk.get("model") or "")
        self._usage = _usage(chunk) or self._usage
        text = ""
        for choice in chunk.get("choices") or ():
            if choice.get("index", 0) not in (0, None):
                continue
            text += self._draft.add(choice.get("delta") or choice.get("message") or {})
            if (finish := choice.get("finish_reason")) == "error":
                raise self._broken("was ended by the provider with finish_reason 'error'")
            self._finish = finish or self._finish
        return text

    def _error(self, body: Any) -> ModelError:
        return classify(200, body, deployment=self._deployment, table=self._table)

    def _broken(self, what: str) -> StreamBroken:
        return StreamBroken(f"the stream of {self._deployment} {what}", deployment=self._deployment, status=200)
