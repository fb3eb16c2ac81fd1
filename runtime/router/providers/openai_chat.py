"""The Chat Completions wire, as its inventor and some twenty imitators speak it.

Where they differ, the difference is data (``Quirks``) or is read tolerantly: tool calls without an index, whole in one
chunk, or with their id repeated; usage in odd places; a missing ``[DONE]``. What is not tolerated is an answer that is
not whole: a stream without a ``finish_reason`` is broken, however plausible its text. (One exception, seen in the wild:
usage and ``[DONE]`` without a reason. A server that counted the answer has finished it; one that was cut cannot count.)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

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
from ridethrough.runtime.router.providers.dialects import DIALECTS as DIALECTS
from ridethrough.runtime.router.providers.dialects import Quirks as Quirks
from ridethrough.runtime.router.providers.dialects import quirks_of as quirks_of
from ridethrough.runtime.router.providers.sse import Event, EventParser
from ridethrough.runtime.router.providers.wire import Answer, Rendered


class OpenAIChat:
    """The wire for one configured provider; ``provider`` is its name, which reasoning is bound to."""

    def __init__(self, provider: str, *, quirks: Quirks | None = None, table: Iterable[Rule] = TABLE) -> None:
        self.provider = provider
        self._quirks = quirks or Quirks()
        self._table = tuple(table)
        self._writers: dict[str, _Writer] = {}

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
        return {"api-key": key} if self._quirks.credential == "api-key" else {"authorization": f"Bearer {key}"}

    def render(self, request: ModelRequest, model: str, *, stream: bool) -> Rendered:
        """Write ``request`` as a body of ``/chat/completions``."""
        if (writer := self._writers.get(model)) is None:
            writer = self._writers[model] = _Writer(self.provider, self._quirks.of(model))
        headers = {"content-type": "application/json", "accept": "text/event-stream" if stream else "application/json"}
        body, notes = writer.body(request, model, stream)
        return Rendered("chat/completions", body, headers, tuple(notes))

    def parse(self, body: bytes, deployment: str) -> Answer:
        """Read a body that came with status 200."""
        payload = _json(body, deployment)
        if error := _error_in(payload):
            raise classify(200, error, deployment=deployment, table=self._table)
        try:
            answer = _whole(payload, self.provider)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            text = f"{deployment} sent no answer in its answer ({type(error).__name__}): {_excerpt(body)}"
            raise ServerError(text, deployment=deployment, status=200) from None
        if isinstance(answer, str):
            raise classify(200, _given_up(answer), deployment=deployment, table=self._table)
        return answer

    def stream(self, deployment: str) -> ChatStream:
        """Return a reader for one streamed answer."""
        return ChatStream(self.provider, deployment, self._table)


# --- requests -------------------------------------------------------------------------------------------------------


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class _Asked(NamedTuple):
    """How structured output is asked for: a field of the body, or words to the model, or both."""

    format: Mapping[str, Any] | None = None
    words: str = ""
    note: str = ""


class _Writer:
    """Writes requests for one model. Each message is written once in its life for one set of quirks."""

    def __init__(self, provider: str, quirks: Quirks) -> None:
        self._provider = provider
        self._quirks = quirks
        plain = quirks.of_messages == Quirks().of_messages
        self._key = f"openai-chat/{provider}" + ("" if plain else f"/{quirks.of_messages}")
        self._images_key = f"{self._key}/images"

    def body(self, request: ModelRequest, model: str, stream: bool) -> tuple[bytes, Iterator[str]]:
        """Return the body, and what it leaves out of the request."""
        asked = self._asked(request, stream)
        head, notes = self._head(request, model, stream, asked)
        messages = self._with_words(request.messages, asked.words)
        turns = _Turns(self._quirks)
        for message in messages:
            self._lay(message, turns)
        turns.close()
        body = _dump(head)[:-1] + b',"messages":[' + b",".join(turns.pieces) + b"]"
        if tools := self._tools(request):
            body += b',"tools":[' + b",".join(tool.rendered("openai-chat", _tool) for tool in tools) + b"]"
        return body + b"}", self._notes(messages, (*notes, *turns.notes))

    # The head: everything but messages and tools.

    def _head(self, request: ModelRequest, model: str, stream: bool, asked: _Asked) -> tuple[dict[str, Any], list[str]]:
        quirks = self._quirks
        head: dict[str, Any] = {"model": model, **quirks.body}
        notes = [asked.note] if asked.note else []
        if stream:
            head["stream"] = True
            if quirks.stream_options:
                head["stream_options"] = {"include_usage": True}
        if request.tools and request.tool_choice != "auto":
            head["tool_choice"] = self._tool_choice(request.tool_choice)
        if asked.format is not None:
            head["response_format"] = asked.format
        if request.max_tokens is not None:
            head[quirks.max_tokens_key] = request.max_tokens
        if request.temperature is not None:
            if self._takes_temperature(request):
                head["temperature"] = request.temperature
            else:
                notes.append("the temperature was left out: this model takes none")
        if request.reasoning is not None:
            self._add_effort(request.reasoning, head, notes)
        return head, notes

    def _takes_temperature(self, request: ModelRequest) -> bool:
        if self._quirks.temperature == "unreasoning":
            return request.reasoning in (None, "none")
        return self._quirks.temperature == "always"

    def _add_effort(self, asked: str, head: dict[str, Any], notes: list[str]) -> None:
        effort = self._quirks.efforts.get(asked)
        if effort is None:
            notes.append(f"the reasoning effort {asked!r} was left out: this model has no such setting")
            return
        head.update(effort.fields)
        if effort.sent != asked:
            notes.append(f"the reasoning effort {asked!r} was sent as {effort.sent!r}, the nearest that this model has")

    def _tool_choice(self, choice: str) -> object:
        if choice in ("none", "required"):
            return choice
        return {"type": "function", "function": {"name": choice}} if self._quirks.named_choice else "required"

    def _tools(self, request: ModelRequest) -> Sequence[ToolSpec]:
        """Return the tools; where none can be demanded by name, the demanded one is the only one there is."""
        choice = request.tool_choice
        if self._quirks.named_choice or choice in ("auto", "none", "required"):
            return request.tools
        return [tool for tool in request.tools if tool.name == choice] or request.tools

    def _asked(self, request: ModelRequest, stream: bool) -> _Asked:
        schema = request.output_schema
        if schema is None:
            return _Asked()
        way = self._quirks.schema
        if self._quirks.schema_alone and (request.tools or stream):
            way = "instructions"
        if way == "json_schema":
            return _Asked(_response_format(schema, strict=self._quirks.strict and _is_strict(schema)))
        note = "the output schema went into the instructions: this server cannot enforce it here"
        words = "Answer with one JSON object that matches this JSON Schema, and with nothing else:\n"
        words += json.dumps(schema, ensure_ascii=False)
        return _Asked({"type": "json_object"} if way == "json_object" else None, words, note)

    def _with_words(self, messages: Sequence[Message], words: str) -> Sequence[Message]:
        """Add ``words`` to the instructions, which are the first message: many templates take them only there."""
        if not words:
            return messages
        if messages and isinstance(first := messages[0], SystemMessage):
            return [SystemMessage(content=f"{first.text}\n\n{words}"), *messages[1:]]
        return [SystemMessage(content=words), *messages]

    # The messages.

    def _lay(self, message: Message, turns: _Turns) -> None:
        """Put a message in its place in the conversation."""
        if not isinstance(message, ToolMessage):
            calls = [self._id(call.id) for call in message.tool_calls] if isinstance(message, AssistantMessage) else []
            turns.add(message.role, message.rendered(self._key, self._message), calls)
            return
        if not turns.answer(self._id(message.tool_call_id)):
            turns.later(_dump({"role": "user", "content": self._orphan(message)}))
            turns.note("a tool's result without its call was sent as a user's message")
            return
        turns.add("tool", message.rendered(self._key, self._message))
        if self._quirks.images != "none" and _images_in(message.content):
            turns.later(message.rendered(self._images_key, self._tool_images))

    def _message(self, message: Message) -> bytes:
        if isinstance(message, AssistantMessage):
            return _dump(self._assistant(message))
        if isinstance(message, ToolMessage):
            id = self._id(message.tool_call_id)
            return _dump({"role": "tool", "tool_call_id": id, "content": self._tool_text(message)})
        if isinstance(message, SystemMessage):
            return _dump({"role": self._quirks.system_role, "content": message.text})
        return _dump({"role": "user", "content": self._content(message.content)})

    def _content(self, content: Content) -> Any:
        if isinstance(content, str):
            return content
        parts = [self._part(part) for part in content if isinstance(part, TextPart | ImagePart)]
        if self._quirks.images == "none":  # such servers take one text only
            return "\n".join(part["text"] for part in parts)
        return parts

    def _part(self, part: TextPart | ImagePart) -> dict[str, Any]:
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        if not self._takes(part):
            return {"type": "text", "text": _NO_IMAGE}
        return {"type": "image_url", "image_url": {"url": part.url or f"data:{part.media_type};base64,{part.data}"}}

    def _takes(self, image: ImagePart) -> bool:
        return self._quirks.images == "any" or (self._quirks.images == "inline" and _is_inline(image))

    def _tool_text(self, message: ToolMessage) -> str:
        """Return a tool's result as text, which is all that this wire takes there; its images follow the results."""
        text = text_of(message.content)
        if message.is_error and not text.lower().startswith("error"):
            text = f"Error: {text}"
        if not _images_in(message.content):
            return text
        place = _NO_IMAGE if self._quirks.images == "none" else "[an image follows the tool results]"
        return f"{text}\n{place}" if text else place

    def _tool_images(self, message: ToolMessage) -> bytes:
        """Return the images of a tool's result as a user's message, as OpenAI documents it."""
        of = f"tool {message.name}" if message.name else "a tool"
        title = {"type": "text", "text": f"From the result of {of} (call {self._id(message.tool_call_id)}):"}
        images = [self._part(part) for part in _images_in(message.content)]
        return _dump({"role": "user", "content": [title, *images]})

    def _orphan(self, message: ToolMessage) -> Any:
        of = f"tool {message.name}" if message.name else "a tool"
        title = TextPart(text=f"The result of {of}, whose call is not in this conversation:\n")
        content = message.content
        return self._content((title, *((TextPart(text=content),) if isinstance(content, str) else content)))

    def _assistant(self, message: AssistantMessage) -> dict[str, Any]:
        quirks = self._quirks
        wire: dict[str, Any] = {"role": "assistant", "content": message.text or None, **self._own_fields(message)}
        if (thinking := wire.pop("thinking", None)) is not None:
            text = [{"type": "text", "text": message.text}] if message.text else []
            wire["content"] = [{"type": "thinking", "thinking": thinking}, *text]
        if message.refusal is not None and quirks.refusal:
            wire["refusal"] = message.refusal
        if message.tool_calls:
            wire["tool_calls"] = [self._call(call) for call in message.tool_calls]
            if quirks.reasoning_demanded:
                wire.setdefault(quirks.reasoning_demanded, "")
        elif wire["content"] is None:
            wire["content"] = message.refusal or quirks.bridge or ""
        return wire

    def _own_fields(self, message: AssistantMessage) -> dict[str, Any]:
        """Return what of an answer only its provider reads and wants back."""
        if isinstance(message.content, str):
            return {}
        fields: dict[str, Any] = {}
        own = [part for part in message.content if isinstance(part, ReasoningPart) and part.provider == self._provider]
        back = self._quirks.reasoning_back
        if own and (back == "always" or (back == "calls" and message.tool_calls)):
            fields = self._reasoning(own)
        for part in message.content:
            if isinstance(part, ProviderPart) and part.provider == self._provider and part.kind in self._quirks.items:
                fields.update(part.data)
        return fields

    def _reasoning(self, parts: Sequence[ReasoningPart]) -> dict[str, Any]:
        values: dict[str, list[Any]] = {}
        for part in parts:
            for key in _REASONING:
                if (value := part.data.get(key)) is not None:
                    values.setdefault(key, []).extend(value if isinstance(value, list) else [value])
        wanted = self._quirks.reasoning_keys
        keys = [key for key in wanted if key in values][:1] if wanted else list(values)
        return {key: _joined(values[key]) for key in keys}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        """Write a call; broken arguments are wrapped, since servers refuse a history that is not JSON."""
        arguments: Any = call.arguments if call.arguments is not None else {"_invalid_json": call.raw or ""}
        text = json.dumps(arguments, ensure_ascii=False)
        own = call.data if call.provider == self._provider else {}
        kept = {key: own[key] for key in _CALL_FIELDS if key in own}
        return {"id": self._id(call.id), "type": "function", "function": {"name": call.name, "arguments": text}, **kept}

    def _id(self, id: str) -> str:
        """Return an id that the server takes: the same for a call and its result, in every turn and process."""
        bounds = self._quirks.call_id
        return id if bounds is None or bounds.fullmatch(id) else _short_id(id)

    # What was left out.

    def _notes(self, messages: Sequence[Message], others: Iterable[str]) -> Iterator[str]:
        yield from others
        rich = [(message, message.content) for message in messages if not isinstance(message.content, str)]
        parts = [(message, part) for message, content in rich for part in content]
        foreign = {
            part.provider for _, part in parts if isinstance(part, ReasoningPart) and part.provider != self._provider
        }
        for name in sorted(foreign):
            yield f"reasoning of {name or 'an unknown provider'} was left out: only that provider can read it"
        items = {part.kind for _, part in parts if isinstance(part, ProviderPart) and not self._returns(part)}
        for kind in sorted(items):
            yield f"provider items of kind {kind!r} were left out: this wire cannot send them"
        yield from self._image_notes([(message, part) for message, part in parts if isinstance(part, ImagePart)])

    def _returns(self, part: ProviderPart) -> bool:
        return part.provider == self._provider and part.kind in (*self._quirks.items, *_REPORTS)

    def _image_notes(self, images: Sequence[tuple[Message, ImagePart]]) -> Iterator[str]:
        moved = [self._takes(image) for message, image in images if isinstance(message, ToolMessage)]
        if any(moved):
            yield "images in tool results follow them in a user's message: this wire takes text there"
        places = UserMessage | ToolMessage
        if any(not (self._takes(image) and isinstance(message, places)) for message, image in images):
            yield "images were left out: this server does not take them there, or not by URL"


class _Turns:
    """Puts messages in an order that servers take: every call has its result, right behind it, and nothing between."""

    def __init__(self, quirks: Quirks) -> None:
        self.pieces: list[bytes] = []
        self.notes: list[str] = []
        self._bridge = quirks.bridge
        self._open: list[str] = []
        self._later: list[bytes] = []
        self._last = ""

    def add(self, role: str, piece: bytes, calls: Sequence[str] = ()) -> None:
        """Add a message; ``calls`` are the ids that wait for results after it."""
        if role != "tool":
            self.close()
            self._open = list(calls)
        self._put(role, piece)

    def answer(self, id: str) -> bool:
        """Whether a call waits for this result."""
        if id not in self._open:
            return False
        self._open.remove(id)
        return True

    def later(self, piece: bytes) -> None:
        """Keep a user's message until the results of the turn are complete."""
        self._later.append(piece)

    def note(self, text: str) -> None:
        """Say once what was changed."""
        if text not in self.notes:
            self.notes.append(text)

    def close(self) -> None:
        """End a turn: calls without a result get one that says so."""
        for id in self._open:
            self._put("tool", _dump({"role": "tool", "tool_call_id": id, "content": "[no result is known]"}))
        for piece in self._later:
            self._put("user", piece)
        self._open, self._later = [], []

    def _put(self, role: str, piece: bytes) -> None:
        if self._bridge and role == "user" and self._last == "tool":
            self.pieces.append(_dump({"role": "assistant", "content": self._bridge}))
        self.pieces.append(piece)
        self._last = role


_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_NO_IMAGE = "[an image was left out]"
_REASONING = ("thinking", "reasoning_details", "reasoning_content", "reasoning")
"""The fields in which servers show reasoning."""
_REPORTS = ("annotations", "executed_tools", "citations", "search_results")
"""The fields in which servers tell what they did themselves. They are for people; few take them back."""
_CALL_FIELDS = ("extra_content",)
"""What comes with a call and must return with it: thought signatures, where Gemini speaks this wire."""


@lru_cache(maxsize=4096)
def _short_id(id: str) -> str:
    number = int.from_bytes(hashlib.sha256(id.encode("utf-8", "replace")).digest()[:8])
    return "".join(_ALPHABET[number // 62**place % 62] for place in range(9))


def _images_in(content: Content) -> list[ImagePart]:
    return [] if isinstance(content, str) else [part for part in content if isinstance(part, ImagePart)]


def _is_inline(image: ImagePart) -> bool:
    return image.data is not None or (image.url or "").startswith("data:")


def _response_format(schema: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
    name = re.sub(r"[^A-Za-z0-9_-]", "_", str(schema.get("title") or "output"))[:64]
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": strict}}


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


# --- answers --------------------------------------------------------------------------------------------------------

_FINISH: dict[str, Finish] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "end_turn": "stop",
    "tool_calls": "tool_calls",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "model_context_window_exceeded": "length",
    "content_filter": "content_filter",
    "sensitive": "content_filter",
    "refusal": "refusal",
}

_GAVE_UP = {
    "error": "server_error",
    "abort": "server_error",
    "network_error": "server_error",
    "insufficient_system_resource": "overloaded",
}
"""Reasons to stop that are failures of the server, by the code they amount to: what was said before is no answer."""


def _given_up(reason: str) -> dict[str, Any]:
    return {"error": {"code": _GAVE_UP[reason], "message": f"the answer ended with finish_reason {reason!r}"}}


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


def _whole(payload: Any, provider: str) -> Answer | str:
    """Read an answer, or return the reason for which the server gave it up."""
    choice = payload["choices"][0]
    finish = choice.get("finish_reason")
    if finish in _GAVE_UP:
        return str(finish)
    draft = _Draft(provider)
    if finish != "content_filter":
        draft.add(choice["message"])
    elif message := choice.get("message"):  # a filtered answer may have none
        draft.add(message)
    return draft.answer(finish, _usage(payload), str(payload.get("model") or ""))


def _usage(payload: Mapping[str, Any]) -> Usage | None:
    raw = payload.get("usage") or (payload.get("x_groq") or {}).get("usage")
    if not isinstance(raw, Mapping) or raw.get("prompt_tokens") is None:
        return None
    read = raw.get("prompt_tokens_details") or {}
    written = read.get("cache_write_tokens") or raw.get("cache_creation_input_tokens")
    cached = read.get("cached_tokens") or next((raw[key] for key in _CACHED if raw.get(key)), 0)
    reasoning = int((raw.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0)
    prompt, completion = int(raw["prompt_tokens"]), int(raw.get("completion_tokens") or 0)
    if reasoning and int(raw.get("total_tokens") or 0) == prompt + completion + reasoning:
        completion += reasoning  # xAI counts them apart
    return Usage(
        input_tokens=prompt,
        output_tokens=completion,
        cached_tokens=int(cached or 0),
        cache_write_tokens=int(written or 0),
        reasoning_tokens=reasoning,
    )


_CACHED = ("prompt_cache_hit_tokens", "num_cached_tokens", "cached_tokens", "cache_read_input_tokens")
"""Where DeepSeek, Mistral, Moonshot and gateways tell of cached tokens; most do so in ``prompt_tokens_details``."""


@dataclass
class _DraftCall:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list[str])
    data: dict[str, Any] = field(default_factory=dict[str, Any])

    def build(self, number: int, used: set[str], provider: str) -> ToolCall:
        """Build the call; ids that are missing or used twice get one of their own."""
        unique = self.id or f"call_{number}"
        while unique in used:
            unique = f"{self.id or 'call'}_{number}"
            number += 1
        used.add(unique)
        call = parse_call(unique, self.name, "".join(self.arguments))
        return call.model_copy(update={"provider": provider, "data": self.data}) if self.data else call


class _Draft:
    """An answer that is being put together, from one message or from many deltas: both have the same fields."""

    def __init__(self, provider: str) -> None:
        self.pieces = 0
        self._provider = provider
        self._text: list[str] = []
        self._refusal: list[str] = []
        self._reasoning: dict[str, list[Any]] = {}
        self._reports: dict[str, list[Any]] = {}
        self._images: list[ImagePart] = []
        self._calls: list[_DraftCall] = []
        self._by_index: dict[int, _DraftCall] = {}

    def add(self, delta: Mapping[str, Any]) -> str:
        """Take a message or a delta and return the text that it adds."""
        before = self.pieces
        text = self._add_content(delta.get("content"))
        for key in _REASONING:
            if value := delta.get(key):
                self._note_reasoning(key, value)
        for key in _REPORTS:
            if value := delta.get(key):
                self._reports.setdefault(key, []).extend(value if isinstance(value, list) else [value])
        for image in delta.get("images") or ():
            self._add_image(image)
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
        calls = tuple(call.build(number, used, self._provider) for number, call in enumerate(self._calls))
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

    def _add_image(self, part: Mapping[str, Any]) -> None:
        """Take an image that the model drew: a URL, or data in one."""
        url = str((part.get("image_url") or {}).get("url") or "")
        if not url:
            return
        inline = _DATA_URL.fullmatch(url)
        image = ImagePart(data=inline[2], media_type=inline[1]) if inline else ImagePart(url=url)
        self._images.append(image)
        self.pieces += 1

    def _content(self) -> Content:
        text = "".join(self._text)
        parts: list[Part] = []
        if self._reasoning:
            data = {key: _joined(values) for key, values in self._reasoning.items()}
            parts.append(ReasoningPart(text=_thought(data), provider=self._provider, data=data))
        for key, values in self._reports.items():
            parts.append(ProviderPart(kind=key, provider=self._provider, data={key: values}))
        parts.extend(self._images)
        if not parts:
            return text
        return (*parts, TextPart(text=text)) if text else tuple(parts)

    def _add_call(self, piece: Mapping[str, Any]) -> None:
        function = piece.get("function") or {}
        call = self._call_for(piece.get("index"), str(piece.get("id") or ""), str(function.get("name") or ""))
        call.id = call.id or str(piece.get("id") or "")
        call.name = call.name or str(function.get("name") or "")
        call.data.update({key: piece[key] for key in _CALL_FIELDS if piece.get(key)})
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


_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+);base64,(.+)", re.S)


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
        self._notes: tuple[str, ...] = ()

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
        answer = self._draft.answer(self._finish, self._usage, self._model)
        return replace(answer, notes=(*answer.notes, *self._notes))

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
            error = self._error(_error_in(chunk) or chunk or event.data)
            if not (self._finish == "length" and isinstance(chunk, Mapping)):
                raise error
            self._notes = (f"after the end of its answer {error.message}",)  # the limit that it has reached, once more
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
            if finish in _GAVE_UP:
                raise self._error(_given_up(finish))
            self._finish = finish or self._finish
        return text

    def _error(self, body: Any) -> ModelError:
        return classify(200, body, deployment=self._deployment, table=self._table)

    def _broken(self, what: str) -> StreamBroken:
        return StreamBroken(f"the stream of {self._deployment} {what}", deployment=self._deployment, status=200)
