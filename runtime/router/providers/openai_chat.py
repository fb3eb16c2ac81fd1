"""The Chat Completions wire, as its inventor and some twenty imitators speak it.

Where they differ, the difference is data (``Quirks``) or is read tolerantly: tool calls without an index, whole in one
chunk, or with their id repeated; usage in odd places; a missing ``[DONE]``. What is not tolerated is an answer that is
not whole: a stream without a ``finish_reason`` is broken, however plausible its text. (One exception, seen in the wild:
usage and ``[DONE]`` without a reason. A server that counted the answer has finished it; one that was cut cannot count.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

from ridethrough.runtime.errors import ModelError
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
)
from ridethrough.runtime.router.providers import bodies
from ridethrough.runtime.router.providers.bodies import count, dump
from ridethrough.runtime.router.providers.dialects import DIALECTS as DIALECTS
from ridethrough.runtime.router.providers.dialects import Quirks as Quirks
from ridethrough.runtime.router.providers.dialects import quirks_of as quirks_of
from ridethrough.runtime.router.providers.history import History, Turn, left_out, noted
from ridethrough.runtime.router.providers.parts import (
    NO_IMAGE,
    arguments_of,
    image_at,
    images_in,
    inline,
    result_text,
    url_of,
)
from ridethrough.runtime.router.providers.streams import AnswerStream
from ridethrough.runtime.router.providers.structured import in_words, named_schema
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
        body, notes = writer.body(request, model, stream)
        return Rendered("chat/completions", body, bodies.headers(stream=stream), tuple(notes))

    def parse(self, body: bytes, deployment: str) -> Answer:
        """Read a body that came with status 200."""
        return bodies.read_answer(body, deployment, self._table, _error_in, partial(self._whole, deployment))

    def stream(self, deployment: str) -> ChatStream:
        """Return a reader for one streamed answer."""
        return ChatStream(self.provider, deployment, self._table)

    def _whole(self, deployment: str, payload: Any) -> Answer:
        choice = payload["choices"][0]
        finish = choice.get("finish_reason")
        if finish in _GAVE_UP:
            raise classify(200, _given_up(finish), deployment=deployment, table=self._table)
        draft = _Draft(self.provider)
        if finish != "content_filter":
            draft.add(choice["message"])
        elif message := choice.get("message"):  # a filtered answer may have none
            draft.add(message)
        return draft.answer(finish, _usage(payload), str(payload.get("model") or ""))


# --- requests -------------------------------------------------------------------------------------------------------


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

    def body(self, request: ModelRequest, model: str, stream: bool) -> tuple[bytes, Iterable[str]]:
        """Return the body, and what it leaves out of the request."""
        asked = self._asked(request, stream)
        head, notes = self._head(request, model, stream, asked)
        messages = self._with_words(request.messages, asked.words)
        history = History(messages, self._id)
        pieces = [piece for turn in history.turns for piece in self._turn(turn)]
        body = dump(head)[:-1] + b',"messages":[' + b",".join(pieces) + b"]"
        if tools := self._tools(request):
            body += b',"tools":[' + b",".join([tool.rendered("openai-chat", _tool) for tool in tools]) + b"]"
        return body + b"}", [*notes, *history.notes, *noted(messages, f"notes\0{self._key}", self._notes)]

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
            named = named_schema(schema, strict=self._quirks.strict)
            return _Asked({"type": "json_schema", "json_schema": named})
        note = "the output schema went into the instructions: this server cannot enforce it here"
        format = {"type": "json_object"} if way == "json_object" else None
        return _Asked(format, in_words(schema, tools=bool(request.tools)), note)

    def _with_words(self, messages: Sequence[Message], words: str) -> Sequence[Message]:
        """Add ``words`` to the instructions, which are the first message: many templates take them only there."""
        if not words:
            return messages
        if messages and isinstance(first := messages[0], SystemMessage):
            return [SystemMessage(content=f"{first.text}\n\n{words}"), *messages[1:]]
        return [SystemMessage(content=words), *messages]

    # The messages.

    def _turn(self, turn: Turn) -> Iterable[bytes]:
        """Yield an answer, the results of its calls right behind it, what these show, and what follows."""
        if turn.answer is not None:
            yield turn.answer.rendered(turn.key(self._key), partial(self._assistant, ids=turn.ids))
        for result, id in zip(turn.results, turn.ids, strict=True):
            yield result.rendered(f"{self._key}\0{id}", partial(self._result, id=id))
        shown = [images for pair in zip(turn.results, turn.ids, strict=True) if (images := self._images(*pair))]
        if turn.results and self._quirks.bridge and (shown or (turn.others and turn.others[0].role == "user")):
            yield dump({"role": "assistant", "content": self._quirks.bridge})
        yield from shown
        for message in turn.others:
            yield message.rendered(self._key, self._said)

    def _said(self, message: SystemMessage | UserMessage) -> bytes:
        if isinstance(message, SystemMessage):
            return dump({"role": self._quirks.system_role, "content": message.text})
        return dump({"role": "user", "content": self._content(message.content)})

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
            return {"type": "text", "text": NO_IMAGE}
        return {"type": "image_url", "image_url": {"url": url_of(part)}}

    def _takes(self, image: ImagePart) -> bool:
        return self._quirks.images == "any" or (self._quirks.images == "inline" and inline(image) is not None)

    def _result(self, message: ToolMessage, id: str) -> bytes:
        """Write a tool's result, which is text here; its images follow the results."""
        text = result_text(message)
        if images_in(message.content):
            place = NO_IMAGE if self._quirks.images == "none" else "[an image follows the tool results]"
            text = f"{text}\n{place}" if text else place
        return dump({"role": "tool", "tool_call_id": id, "content": text})

    def _images(self, message: ToolMessage, id: str) -> bytes:
        """Return the images of a tool's result as a user's message, as OpenAI documents it; nothing without any."""
        if self._quirks.images == "none" or not images_in(message.content):
            return b""
        return message.rendered(f"images\0{self._key}\0{id}", partial(self._shown, id=id))

    def _shown(self, message: ToolMessage, id: str) -> bytes:
        of = f"tool {message.name}" if message.name else "a tool"
        title = {"type": "text", "text": f"From the result of {of} (call {id}):"}
        return dump({"role": "user", "content": [title, *map(self._part, images_in(message.content))]})

    def _assistant(self, message: AssistantMessage, ids: Sequence[str]) -> bytes:
        quirks = self._quirks
        wire: dict[str, Any] = {"role": "assistant", "content": message.text or None, **self._own_fields(message)}
        if (thinking := wire.pop("thinking", None)) is not None:
            text = [{"type": "text", "text": message.text}] if message.text else []
            wire["content"] = [{"type": "thinking", "thinking": thinking}, *text]
        if message.refusal is not None and quirks.refusal:
            wire["refusal"] = message.refusal
        if message.tool_calls:
            wire["tool_calls"] = [self._call(call, id) for call, id in zip(message.tool_calls, ids, strict=True)]
            if quirks.reasoning_demanded:
                wire.setdefault(quirks.reasoning_demanded, "")
        elif wire["content"] is None:
            wire["content"] = message.refusal or quirks.bridge or ""
        return dump(wire)

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

    def _call(self, call: ToolCall, id: str) -> dict[str, Any]:
        text = json.dumps(arguments_of(call), ensure_ascii=False)
        own = call.data if call.provider == self._provider else {}
        kept = {key: own[key] for key in _CALL_FIELDS if key in own}
        return {"id": id, "type": "function", "function": {"name": call.name, "arguments": text}, **kept}

    def _id(self, id: str) -> str:
        """Return an id that the server takes: the same for a call and its result, in every turn and process."""
        bounds = self._quirks.call_id
        return id if bounds is None or bounds.fullmatch(id) else _short_id(id)

    # What was left out.

    def _notes(self, message: Message) -> Iterable[str]:
        """Yield what of a message does not get through."""
        yield from left_out(message, self._provider, self._is_own)
        taken = [self._takes(image) for image in images_in(message.content)]
        if any(taken) and isinstance(message, ToolMessage):
            yield "images in tool results follow them in a user's message: this wire takes text there"
        if taken and not (all(taken) and isinstance(message, UserMessage | ToolMessage)):
            yield "images were left out: this server does not take them there, or not by URL"

    def _is_own(self, part: ReasoningPart | ProviderPart) -> bool:
        kinds = (*self._quirks.items, *_REPORTS)
        return part.provider == self._provider and (isinstance(part, ReasoningPart) or part.kind in kinds)


_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
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


def _tool(tool: ToolSpec) -> bytes:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return dump({"type": "function", "function": function})


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


def _error_in(payload: Any) -> Any:
    """Return what says that a body or chunk is an error, which OpenRouter puts into the choice."""
    if found := bodies.error_in(payload):
        return found
    choices = payload.get("choices") if isinstance(payload, Mapping) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, Mapping) and first.get("error") else None


def _usage(payload: Mapping[str, Any]) -> Usage | None:
    raw = payload.get("usage") or (payload.get("x_groq") or {}).get("usage")
    if not isinstance(raw, Mapping) or raw.get("prompt_tokens") is None:
        return None
    read = raw.get("prompt_tokens_details") or {}
    reasoning = count((raw.get("completion_tokens_details") or {}).get("reasoning_tokens"))
    prompt, completion = count(raw["prompt_tokens"]), count(raw.get("completion_tokens"))
    if reasoning and count(raw.get("total_tokens")) == prompt + completion + reasoning:
        completion += reasoning  # xAI counts them apart
    return Usage(
        input_tokens=prompt,
        output_tokens=completion,
        cached_tokens=count(read.get("cached_tokens") or next((raw[key] for key in _CACHED if raw.get(key)), 0)),
        cache_write_tokens=count(read.get("cache_write_tokens") or raw.get("cache_creation_input_tokens")),
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
        self._images.append(image_at(url))
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


class ChatStream(AnswerStream):
    """Reads one streamed answer; see ``wire.Stream``."""

    def __init__(self, provider: str, deployment: str, table: tuple[Rule, ...] = TABLE) -> None:
        super().__init__(deployment, table)
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

    def _missing(self) -> str:
        return "" if self._finish is not None or (self.done and self._usage) else "a finish_reason"

    def _answer(self) -> Answer:
        answer = self._draft.answer(self._finish, self._usage, self._model)
        return replace(answer, notes=(*answer.notes, *self._notes))

    def _error_in(self, chunk: Any) -> Any:
        return _error_in(chunk)

    def _failed(self, error: ModelError) -> None:
        if self._finish != "length":
            raise error
        self._notes = (f"after the end of its answer {error.message}",)  # the limit that it has reached, once more

    def _read(self, kind: str, chunk: Mapping[str, Any]) -> str:
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
