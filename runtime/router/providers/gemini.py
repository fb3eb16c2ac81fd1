"""Gemini's generateContent wire, as the Gemini API and Vertex AI speak it.

It has no identity for most things: tool calls often come without an id, results are matched by name and order, a stream
has no last event, and thoughts are signatures on whatever part they led to. So ids are made here (the same bytes give
the same ids), results are put into the order of their calls, a stream is whole when its last output came with a
``finishReason``, and a signature keeps its place: on its tool call in ``ToolCall.data``, else in a ``ReasoningPart``
before the text that carries it. Parts with a signature are never merged with others, which would make it invalid.

Sources: the API reference of ``models.generateContent`` and the pages on thought signatures, thinking, structured
output and function calling at ai.google.dev.
"""

from __future__ import annotations

import hashlib
import json
import mimetypes
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit

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
from ridethrough.runtime.router.providers import bodies
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
from ridethrough.runtime.router.providers.parts import arguments_of, images_in, inline, parts_of
from ridethrough.runtime.router.providers.sse import Event, EventParser
from ridethrough.runtime.router.providers.streams import AnswerStream
from ridethrough.runtime.router.providers.structured import in_words
from ridethrough.runtime.router.providers.wire import Answer, Rendered


@dataclass(frozen=True)
class Traits:
    """What a family of models takes.

    ``modern`` families want a signature on the first tool call of a step, take images inside tool results, and match
    an output schema while they have tools. ``levels`` are the steps of ``thinkingLevel``, weakest first; ``budget`` is
    the range of ``thinkingBudget`` in tokens. A family with neither does not think.
    """

    modern: bool = True
    levels: tuple[str, ...] = ()
    budget: tuple[int, int] | None = None


FAMILIES: tuple[tuple[re.Pattern[str], Traits], ...] = (
    (re.compile(r"gemini-2\.5-pro"), Traits(modern=False, budget=(128, 32768))),
    (re.compile(r"gemini-2\.5"), Traits(modern=False, budget=(0, 24576))),
    (re.compile(r"gemini-[12](\.\d)?-|gemma|learnlm"), Traits(modern=False)),
    (re.compile(r"gemini-3-pro"), Traits(levels=("low", "high"))),
    (re.compile(r"gemini-3(\.[1-6])?-flash"), Traits(levels=("minimal", "low", "medium", "high"))),
    (re.compile(""), Traits(levels=("low", "medium", "high"))),
)
"""By a pattern that the model's name contains; the first that fits. The last is for all newer models."""


def traits_of(model: str) -> Traits:
    """Return what is known of ``model``."""
    return next(traits for pattern, traits in FAMILIES if pattern.search(model))


class GeminiGenerate:
    """The wire for one configured provider; ``provider`` is its name, which thoughts are bound to."""

    def __init__(self, provider: str, *, table: Iterable[Rule] = TABLE) -> None:
        self.provider = provider
        self._table = tuple(table)

    @property
    def default_base_url(self) -> str:
        """The Gemini API."""
        return "https://generativelanguage.googleapis.com"

    @property
    def models_path(self) -> str:
        """The list of models."""
        return "v1beta/models"

    def authorize(self, key: str) -> dict[str, str]:
        """An API key in its own header; in the address it would end up in logs."""
        return {"x-goog-api-key": key}

    def render(self, request: ModelRequest, model: str, *, stream: bool) -> Rendered:
        """Write ``request`` as a body of ``generateContent``."""
        writer = _Writer(self.provider, traits_of(model))
        contents = writer.contents(request.messages)
        fields = [b'"contents":[' + contents + b"]"]
        if system := _instructions(request, writer.traits):
            fields.append(b'"systemInstruction":{"parts":[' + system + b"]}")
        if request.tools:
            tools = b",".join([tool.rendered("gemini", _tool) for tool in request.tools])
            fields.append(b'"tools":[{"functionDeclarations":[' + tools + b"]}]")
            fields.append(b'"toolConfig":' + dump(_tool_config(request.tool_choice)))
        config, more = _config(request, writer.traits, model)
        fields.append(b'"generationConfig":' + dump(config))
        body = b"{" + b",".join(fields) + b"}"
        return Rendered(_path(model, stream), body, bodies.headers(stream=stream), (*writer.notes, *more))

    def parse(self, body: bytes, deployment: str) -> Answer:
        """Read a body that came with status 200; an array of chunks is read too."""
        return bodies.read_answer(body, deployment, self._table, _refusal_in, partial(self._whole, deployment))

    def stream(self, deployment: str) -> GenerateStream:
        """Return a reader for one streamed answer."""
        return GenerateStream(self.provider, deployment, self._table)

    def _whole(self, deployment: str, payload: Any) -> Answer:
        draft = _Draft(self.provider)
        for chunk in payload if isinstance(payload, list) else [payload]:
            if refusal := _refusal_in(chunk):
                raise classify(200, refusal, deployment=deployment, table=self._table)
            draft.read(chunk)
        return draft.answer()


# --- requests -------------------------------------------------------------------------------------------------------

_SIGNATURE = "thoughtSignature"
_NO_SIGNATURE = "skip_thought_signature_validator"
"""What the documentation tells to send with a tool call that another model made."""
_AFTERWARDS = ("groundingMetadata", "citationMetadata", "urlContextMetadata")
"""What the provider says about an answer; unlike the answer's parts it does not go back."""


def _path(model: str, stream: bool) -> str:
    """Return the path of ``model``: a bare name or a resource, as ``tunedModels/x`` or Vertex AI's ``projects/x/…``."""
    version = "v1beta1" if model.startswith(("projects/", "publishers/")) else "v1beta"
    resource = model if "/" in model else f"models/{model}"
    return f"{version}/{quote(resource, safe='/@')}:" + (
        "streamGenerateContent?alt=sse" if stream else "generateContent"
    )


def _tool(tool: ToolSpec) -> bytes:
    schema = _schema(tool.parameters)
    return dump({"name": tool.name, "description": tool.description, "parametersJsonSchema": schema})


def _tool_config(choice: str) -> dict[str, Any]:
    modes = {"auto": "AUTO", "none": "NONE", "required": "ANY"}
    if choice in modes:
        return {"functionCallingConfig": {"mode": modes[choice]}}
    return {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": [choice]}}


_SCHEMAS = ("properties", "$defs", "definitions", "patternProperties")


def _schema(schema: Any) -> Any:
    """Write ``const`` as an ``enum`` of one: full JSON Schema is taken, but what is not known is passed over."""
    if isinstance(schema, list):
        return [_schema(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    written: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _SCHEMAS and isinstance(value, Mapping):
            written[key] = {name: _schema(item) for name, item in value.items()}
        elif key == "const" and isinstance(value, str | int | float) and not isinstance(value, bool):
            written.setdefault("enum", [value])
        else:
            written[key] = value if key in ("enum", "default", "examples", "required", "const") else _schema(value)
    return written


def _schema_in_words(request: ModelRequest, traits: Traits) -> bool:
    """Whether the output schema has to be asked for in words: older models take no schema beside tools."""
    return request.output_schema is not None and bool(request.tools) and not traits.modern


def _instructions(request: ModelRequest, traits: Traits) -> bytes:
    systems = [message for message in request.messages if isinstance(message, SystemMessage)]
    parts = [part for message in systems if (part := message.rendered("gemini/system", _system))]
    if _schema_in_words(request, traits):
        assert request.output_schema is not None
        parts.append(dump({"text": in_words(request.output_schema, tools=True)}))
    return b",".join(parts)


def _system(message: SystemMessage) -> bytes:
    return dump({"text": message.text}) if message.text else b""


def _config(request: ModelRequest, traits: Traits, model: str) -> tuple[dict[str, Any], list[str]]:
    config: dict[str, Any] = {}
    notes: list[str] = []
    if _schema_in_words(request, traits):
        notes.append(f"{model} takes no output schema beside tools, so it was asked for in words")
    elif request.output_schema is not None:
        config |= {"responseMimeType": "application/json", "responseJsonSchema": _schema(request.output_schema)}
    if request.max_tokens is not None:
        config["maxOutputTokens"] = request.max_tokens
    if request.temperature is not None:
        config["temperature"] = request.temperature
    if request.reasoning is not None:
        thinking, told = _thinking(request.reasoning, traits)
        if thinking:
            config["thinkingConfig"] = thinking
        if told:
            notes.append(f"reasoning effort {request.reasoning!r} {told}: {model} takes no other")
    return config, notes


_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
_BUDGETS = {"none": 0, "minimal": 512, "low": 1024, "medium": 8192, "high": 24576, "xhigh": 32768}  # tokens


def _thinking(effort: str, traits: Traits) -> tuple[dict[str, Any], str]:
    """Return ``thinkingConfig`` and what became of the effort, if it is not what was asked for."""
    thoughts = {} if effort in ("none", "minimal") else {"includeThoughts": True}  # refused where none are thought
    if traits.budget is not None:
        asked = _BUDGETS[effort]
        budget = min(max(asked, traits.budget[0]), traits.budget[1])
        return {"thinkingBudget": budget, **thoughts}, "" if budget == asked else f"became {budget} tokens"
    if traits.levels:
        level = _level(effort, traits.levels)
        return {"thinkingLevel": level, **thoughts}, "" if level == effort else f"became {level!r}"
    return {}, "" if effort == "none" else "was left out"


def _level(effort: str, levels: Sequence[str]) -> str:
    """Return the strongest level that is not above ``effort``, else the weakest."""
    asked = _EFFORTS.index(effort)
    return next((level for level in reversed(levels) if _EFFORTS.index(level) <= asked), levels[0])


_HEADS = {"user": b'{"role":"user","parts":[', "model": b'{"role":"model","parts":['}


class _Writer:
    """Writes a conversation; every message keeps its own parts, so that only new ones are written."""

    def __init__(self, provider: str, traits: Traits) -> None:
        self.traits = traits
        self.notes: list[str] = []
        self._provider = provider
        self._key = f"gemini/{provider}/{'modern' if traits.modern else 'older'}"

    def contents(self, messages: Sequence[Message]) -> bytes:
        """Return the turns of ``messages``, such that the provider takes them."""
        history = History(messages, str)
        turns = [each for turn in history.turns for each in self._turn(turn) if each[1]]
        if not turns or turns[0][0] == "model":
            turns.insert(0, ("user", _said(history, ANSWER_FIRST if turns else EMPTY)))
        if turns[-1][0] == "model":
            turns.append(("user", _said(history, UNREPLIED)))
        notes = noted(messages, f"notes\0{self._key}", self._notes)
        self.notes = [*notes, *_late_instructions(messages), *history.notes]
        return b",".join([_HEADS[role] + parts + b"]}" for role, parts in turns])

    def _turn(self, turn: Turn) -> Iterator[tuple[str, bytes]]:
        """Yield an answer, the results of its calls as one turn in their order, and what follows."""
        if turn.answer is not None:
            yield "model", turn.answer.rendered(turn.key(self._key), partial(self._answer, ids=turn.ids))
        if turn.results:
            yield from self._results(turn)
        for message in turn.others:
            if isinstance(message, UserMessage):
                yield "user", message.rendered(self._key, _user)

    def _results(self, turn: Turn) -> Iterator[tuple[str, bytes]]:
        assert turn.answer is not None
        written: list[bytes] = []
        moved: list[bytes] = []
        for call, result, id in zip(turn.answer.tool_calls, turn.results, turn.ids, strict=True):
            key = f"{self._key}\0{id}\0{call.name}"
            written.append(result.rendered(key, partial(self._result, name=call.name, id=id)))
            if images_in(result.content):
                moved.append(result.rendered(f"images\0{key}", partial(self._moved, name=call.name, id=id)))
        yield "user", b",".join(written)
        yield "user", b",".join([parts for parts in moved if parts])

    def _answer(self, message: AssistantMessage, ids: Sequence[str]) -> bytes:
        return dump_all(_model_parts(message, ids, self._provider, self.traits.modern))

    def _result(self, message: ToolMessage, name: str, id: str) -> bytes:
        text, images = message.text, images_in(message.content)
        native = [_part(image) for image in images if self._has_place(image)]
        if len(native) < len(images):
            text += "\n[its images follow]"
        result: dict[str, Any] = {"id": id, "name": name, "response": {"error" if message.is_error else "output": text}}
        if native:
            result["parts"] = native
        return dump({"functionResponse": result})

    def _moved(self, message: ToolMessage, name: str, id: str) -> bytes:
        images = [_part(image) for image in images_in(message.content) if not self._has_place(image)]
        return dump_all([{"text": f"Images of the result of {name} ({id}):"}, *images]) if images else b""

    def _has_place(self, image: ImagePart) -> bool:
        """Whether an image can be sent inside of a tool's result."""
        return self.traits.modern and inline(image) is not None

    def _notes(self, message: Message) -> Iterator[str]:
        """Yield what of a message does not get through, or not in its place."""
        yield from left_out(message, self._provider, self._is_own)
        images = images_in(message.content)
        if images and isinstance(message, SystemMessage):
            yield "images in instructions were left out: this wire takes text there"
        if isinstance(message, ToolMessage) and not all(map(self._has_place, images)):
            yield "images in tool results were sent behind the results: they have no place inside"

    def _is_own(self, part: ReasoningPart | ProviderPart) -> bool:
        return part.provider == self._provider


def _said(history: History, filler: Filler) -> bytes:
    return dump({"text": history.fill(filler)})


def _user(message: UserMessage) -> bytes:
    return dump_all(_parts(message.content))


def _late_instructions(messages: Iterable[Message]) -> Iterator[str]:
    begun = False
    for message in messages:
        if not isinstance(message, SystemMessage):
            begun = True
        elif begun:
            yield "instructions in mid-conversation were sent before it: this wire has them only there"
            return


def _parts(content: Content) -> list[dict[str, Any]]:
    """Write text and images; empty text is left out, since Vertex AI refuses it."""
    said = [part for part in parts_of(content) if isinstance(part, TextPart | ImagePart)]
    return [_part(part) for part in said if isinstance(part, ImagePart) or part.text]


def _part(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"text": part.text}
    if found := inline(part):
        return {"inlineData": {"mimeType": found[0], "data": found[1]}}
    guessed, _ = mimetypes.guess_type(urlsplit(part.url or "").path)
    return {"fileData": {"mimeType": guessed or part.media_type, "fileUri": part.url}}


def _model_parts(message: AssistantMessage, ids: Sequence[str], provider: str, modern: bool) -> list[dict[str, Any]]:
    """Write an answer's parts in the order in which they came: thoughts may lie between two tool calls."""
    calls = [_call(call, id, provider) for call, id in zip(message.tool_calls, ids, strict=True)]
    if modern and calls:
        calls[0].setdefault(_SIGNATURE, _NO_SIGNATURE)
    before: list[list[dict[str, Any]]] = [[] for _ in range(len(calls) + 1)]
    for place, part in _placed(message, provider):
        before[min(place, len(calls))].append(part)
    parts = [part for place, call in enumerate(calls) for part in (*before[place], call)]
    return parts + before[-1]


def _placed(message: AssistantMessage, provider: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the parts that are no tool calls, each with the number of calls before it."""
    place, signature = 0, ""
    content = message.content or message.refusal or ""
    for part in parts_of(content):
        if isinstance(part, TextPart | ImagePart):
            place = max(place, part.after_calls) if isinstance(part, TextPart) else place
            if written := _parts((part,)):
                yield place, {**written[0], **({_SIGNATURE: signature} if signature else {})}
                signature = ""
        elif part.provider == provider and (data := _returned(part)):
            if signature:
                yield place, {"text": "", _SIGNATURE: signature}
            signature, place = "", max(place, part.after_calls)
            if list(data) == [_SIGNATURE]:
                signature = data[_SIGNATURE]  # belongs to the text or image that follows
            else:
                yield place, data
    if signature:
        yield place, {"text": "", _SIGNATURE: signature}


def _returned(part: ReasoningPart | ProviderPart) -> dict[str, Any]:
    """Return what of ``part`` goes back; nothing of what was written by another wire under the same name."""
    if isinstance(part, ProviderPart):
        return part.data if part.kind in part.data and part.kind not in _AFTERWARDS else {}
    return part.data if "thought" in part.data or _SIGNATURE in part.data else {}


def _call(call: ToolCall, id: str, provider: str) -> dict[str, Any]:
    part: dict[str, Any] = {"functionCall": {"id": id, "name": call.name, "args": arguments_of(call)}}
    if call.provider == provider and _SIGNATURE in call.data:
        part[_SIGNATURE] = call.data[_SIGNATURE]
    return part


# --- answers --------------------------------------------------------------------------------------------------------

_FINISH: dict[str, Finish] = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    "SAFETY": "content_filter",
    "RECITATION": "content_filter",
    "BLOCKLIST": "content_filter",
    "PROHIBITED_CONTENT": "content_filter",
    "SPII": "content_filter",
    "MODEL_ARMOR": "content_filter",
    "IMAGE_SAFETY": "content_filter",
    "IMAGE_PROHIBITED_CONTENT": "content_filter",
    "IMAGE_RECITATION": "content_filter",
}
_NUMBERS = {1: "STOP", 2: "MAX_TOKENS", 3: "SAFETY", 4: "RECITATION", 5: "OTHER"}
"""Enums come as numbers from some proxies; above these the Gemini API and Vertex AI count differently."""
_NO_REASON = (None, "", 0, "FINISH_REASON_UNSPECIFIED", "BLOCK_REASON_UNSPECIFIED", "BLOCKED_REASON_UNSPECIFIED")


def _refusal_in(chunk: Any) -> Any:
    """Return what says that a body or chunk with status 200 is an error or a blocked prompt, else ``None``."""
    if found := bodies.error_in(chunk):
        return found
    if isinstance(chunk, list) and chunk:
        chunk = chunk[0]
    if not isinstance(chunk, Mapping):
        return None
    feedback = chunk.get("promptFeedback")
    reason = feedback.get("blockReason") if isinstance(feedback, Mapping) else None
    if chunk.get("candidates") or reason in _NO_REASON:
        return None
    message = str((feedback or {}).get("blockReasonMessage") or "") or "the prompt was blocked"
    return {"error": {"code": str(reason), "type": "content_filter", "message": f"{message} ({reason})"}}


def _reason(value: Any) -> str:
    """Return a finish reason's name, empty when there is none yet."""
    return "" if value in _NO_REASON else str(_NUMBERS.get(value, value) if isinstance(value, int) else value)


def _usage(raw: Mapping[str, Any]) -> Usage | None:
    if raw.get("promptTokenCount") is None and raw.get("totalTokenCount") is None:
        return None
    thoughts = count(raw.get("thoughtsTokenCount"))
    return Usage(
        input_tokens=count(raw.get("promptTokenCount")) + count(raw.get("toolUsePromptTokenCount")),
        output_tokens=count(raw.get("candidatesTokenCount")) + thoughts,
        cached_tokens=count(raw.get("cachedContentTokenCount")),
        reasoning_tokens=thoughts,
    )


def _says(content: Content) -> bool:
    if isinstance(content, str):
        return bool(content)
    return any(isinstance(part, TextPart | ImagePart) for part in content)


@dataclass
class _Run:
    """Text that belongs together: neighbouring chunks of the same kind, without a signature or with one of its own."""

    thought: bool
    signature: str
    after_calls: int
    texts: list[str] = field(default_factory=list[str])

    def build(self, provider: str) -> Iterator[Part]:
        """Yield the parts; a signature comes before its text, and alone where there is none."""
        text = "".join(self.texts)
        data: dict[str, Any] = {_SIGNATURE: self.signature} if self.signature else {}
        if self.thought:
            data = {"text": text, "thought": True, **data}
            yield ReasoningPart(text=text, provider=provider, data=data, after_calls=self.after_calls)
            return
        if data:
            data = data if text else {"text": "", **data}
            yield ReasoningPart(provider=provider, data=data, after_calls=self.after_calls)
        if text:
            yield TextPart(text=text, after_calls=self.after_calls)


class _Draft:
    """An answer that is being put together from one chunk or from many: both have the same fields."""

    def __init__(self, provider: str) -> None:
        self.pieces = 0
        self.finish = ""
        self._provider = provider
        self._parts: list[_Run | Part] = []
        self._calls: list[tuple[Mapping[str, Any], str]] = []
        self._about: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}
        self._message = ""
        self._model = ""
        self._id = ""

    def read(self, chunk: Mapping[str, Any]) -> str:
        """Take a chunk and return the text that it adds."""
        self._model = self._model or str(chunk.get("modelVersion") or "")
        self._id = self._id or str(chunk.get("responseId") or "")
        self._usage.update(chunk.get("usageMetadata") or {})
        first = [each for each in chunk.get("candidates") or () if each.get("index", 0) in (0, None)]
        return "".join([self._candidate(candidate) for candidate in first])

    def answer(self) -> Answer:
        """Build the answer.

        Raises:
            ValueError: Nothing was said, and that was no good end: an empty answer must not pass for one.
        """
        calls, content, notes = self._tool_calls(), self._content(), tuple(self._notes())
        kind = _FINISH.get(self.finish, "other")
        if calls and kind in ("stop", "other"):
            kind = "tool_calls"
        if kind == "other" and not _says(content):
            raise ValueError(notes[0])
        return Answer(
            AssistantMessage(content=content, tool_calls=calls), kind, _usage(self._usage), self._model, notes
        )

    def _notes(self) -> Iterator[str]:
        if self.finish not in ("STOP", "MAX_TOKENS"):
            what = f"the provider stopped with {self.finish[:60]!r}" if self.finish else "no finish reason"
            yield f"{what}: {self._message[:300]}" if self._message else what

    def _candidate(self, candidate: Mapping[str, Any]) -> str:
        before = self.pieces
        parts = (candidate.get("content") or {}).get("parts") or ()
        text = "".join([self._add(part) for part in parts])
        self._about.update({key: candidate[key] for key in _AFTERWARDS if candidate.get(key)})
        self._message = str(candidate.get("finishMessage") or self._message)
        if reason := _reason(candidate.get("finishReason")):
            self.finish = reason
        elif self.pieces != before:
            self.finish = ""  # a reason that came before the last output, as some send it, says nothing about the end
        return text

    def _add(self, part: Mapping[str, Any]) -> str:
        signature = str(part.get(_SIGNATURE) or "")
        if (call := part.get("functionCall")) is not None:
            self._calls.append(({**call, "name": str(call["name"])}, signature))
            self.pieces += 1
            return ""
        kind = next((key for key in part if key not in _ATTRIBUTES), "")
        if kind in ("text", ""):
            return self._add_text(str(part.get("text") or ""), bool(part.get("thought")), signature)
        self._parts.extend(self._item(kind, part, signature))
        self.pieces += 1
        return ""

    def _add_text(self, text: str, thought: bool, signature: str) -> str:
        if not text and not signature:
            return ""
        last = self._parts[-1] if self._parts else None
        place = len(self._calls)
        if (
            signature
            or not isinstance(last, _Run)
            or last.signature
            or (last.thought, last.after_calls) != (thought, place)
        ):
            last = _Run(thought, signature, place)
            self._parts.append(last)
        last.texts.append(text)
        self.pieces += 1
        return "" if thought else text

    def _item(self, kind: str, part: Mapping[str, Any], signature: str) -> Iterator[Part]:
        """Yield what a part other than text is: an image, an image among the thoughts, or an item of the provider's."""
        place, value = len(self._calls), part[kind]
        if part.get("thought"):
            yield ReasoningPart(provider=self._provider, data=dict(part), after_calls=place)
        elif kind == "inlineData" and str(value.get("mimeType", "")).startswith("image/"):
            if signature:
                yield ReasoningPart(provider=self._provider, data={_SIGNATURE: signature}, after_calls=place)
            yield ImagePart(data=str(value["data"]), media_type=str(value["mimeType"]))
        else:
            text = str(value.get("code") or value.get("output") or "") if isinstance(value, Mapping) else ""
            yield ProviderPart(kind=kind, text=text, provider=self._provider, data=dict(part), after_calls=place)

    def _content(self) -> Content:
        parts: list[Part] = []
        for part in self._parts:
            parts.extend(part.build(self._provider) if isinstance(part, _Run) else (part,))
        for kind, value in self._about.items():
            parts.append(
                ProviderPart(kind=kind, provider=self._provider, data={kind: value}, after_calls=len(self._calls))
            )
        if all(isinstance(part, TextPart) and not part.after_calls for part in parts):
            return text_of(tuple(parts))
        return tuple(parts)

    def _tool_calls(self) -> tuple[ToolCall, ...]:
        used: set[str] = set()
        calls: list[ToolCall] = []
        for number, (call, signature) in enumerate(self._calls):
            id = str(call.get("id") or "")
            id = self._made_id(number) if not id or id in used else id
            used.add(id)
            calls.append(_tool_call(id, call, self._provider, signature))
        if not calls and self.finish == "MALFORMED_FUNCTION_CALL":
            calls.extend(_malformed(self._made_id(0), self._message))
        return tuple(calls)

    def _made_id(self, number: int) -> str:
        """Return an id that no other answer of the conversation has, and that a second reading gives again."""
        seed = self._id or json.dumps([self._calls, self._usage], sort_keys=True, default=str)
        return "call_" + hashlib.sha256(f"{seed}/{number}".encode()).hexdigest()[:20]


_ATTRIBUTES = ("thought", _SIGNATURE, "videoMetadata", "mediaResolution", "partMetadata")
"""Keys that say something about a part; the other key is the part."""


def _tool_call(id: str, call: Mapping[str, Any], provider: str, signature: str) -> ToolCall:
    arguments = call.get("args")
    if not isinstance(arguments, Mapping | str | None):
        arguments = json.dumps(arguments)
    parsed = parse_call(id, str(call["name"]), arguments)
    return parsed.model_copy(update={"provider": provider, "data": {_SIGNATURE: signature}}) if signature else parsed


_WRITTEN_CALL = re.compile(r"(?:\bdefault_api[.:]|\bcall:)(?:default_api[.:])?([A-Za-z_][\w-]*)")


def _malformed(id: str, message: str) -> Iterator[ToolCall]:
    """Yield the call that the provider could not read, so that the model is told; none if its name is not known."""
    if found := _WRITTEN_CALL.search(message):
        yield ToolCall(id=id, name=found[1], arguments=None, raw=message, error="the call is malformed")


# --- streams --------------------------------------------------------------------------------------------------------


class _Objects:
    """Takes whole objects out of a JSON array, or a row of objects, that comes in pieces split anywhere."""

    _MARKS = re.compile(rb'["\\{}\]]')

    def __init__(self) -> None:
        self.done = False
        self._buffer = bytearray()
        self._at = 0
        self._start = 0
        self._depth = 0
        self._quoted = False

    def feed(self, piece: bytes) -> list[Event]:
        """Return the objects that ``piece`` completes."""
        self._buffer += piece
        events: list[Event] = []
        while not self.done and (mark := self._MARKS.search(self._buffer, self._at)):
            self._at = mark.end()
            if self._quoted:
                self._at += mark[0] == b"\\"  # the byte after it is no mark, even if it is still to come
                self._quoted = mark[0] != b'"'
            elif self._outside(mark[0], mark.start()):
                events.append(Event("", self._buffer[self._start : self._at].decode("utf-8", "replace")))
                del self._buffer[: self._at]
                self._at = 0
        self._at = max(self._at, len(self._buffer))
        return events

    def close(self) -> list[Event]:
        """Return nothing: an object that is not whole is none."""
        return []

    def _outside(self, mark: bytes, at: int) -> bool:
        """Take a mark outside of strings and return whether it ends an object."""
        if mark == b'"':
            self._quoted = True
        elif mark == b"{":
            self._start = self._start if self._depth else at
            self._depth += 1
        elif mark == b"}" and self._depth:
            self._depth -= 1
            return not self._depth
        elif mark == b"]":
            self.done = not self._depth
        return False


class GenerateStream(AnswerStream):
    """Reads one streamed answer; see ``wire.Stream``.

    Events are asked for, but servers and proxies that ignore ``alt=sse`` send a JSON array, which is read too. Only the
    array has an end of its own: with events the answer is whole when the stream ends after a ``finishReason``.
    """

    def __init__(self, provider: str, deployment: str, table: tuple[Rule, ...] = TABLE) -> None:
        super().__init__(deployment, table)
        self._begun = False
        self._draft = _Draft(provider)

    @property
    def progress(self) -> int:
        """How many pieces of output came."""
        return self._draft.pieces

    @property
    def finished(self) -> bool:
        """Whether a ``finishReason`` came, and no output after it."""
        return bool(self._draft.finish)

    def feed(self, piece: bytes) -> str:
        """Take a piece of the stream and return the text that it adds."""
        if not self._begun:
            piece = piece.lstrip(b" \t\r\n\xef\xbb\xbf")
            if not piece:
                return ""
            self._begun = True
            self._events = _Objects() if piece[:1] in (b"[", b"{") else EventParser()
        text = super().feed(piece)
        self.done = self.done or (isinstance(self._events, _Objects) and self._events.done)
        return text

    def _read(self, kind: str, chunk: Mapping[str, Any]) -> str:
        return self._draft.read(chunk)

    def _missing(self) -> str:
        return "" if self._draft.finish else "a finishReason"

    def _answer(self) -> Answer:
        return self._draft.answer()

    def _error_in(self, chunk: Any) -> Any:
        return _refusal_in(chunk)
