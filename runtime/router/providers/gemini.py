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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit

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
    parse_call,
    text_of,
)
from ridethrough.runtime.router.providers.sse import Event, EventParser
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
        contents, notes = writer.contents(request.messages), list(writer.notes)
        fields = [b'"contents":[' + contents + b"]"]
        if system := _instructions(request, writer.traits):
            fields.append(b'"systemInstruction":{"parts":[' + system + b"]}")
        if request.tools:
            tools = b",".join([tool.rendered("gemini", _tool) for tool in request.tools])
            fields.append(b'"tools":[{"functionDeclarations":[' + tools + b"]}]")
            fields.append(b'"toolConfig":' + _dump(_tool_config(request.tool_choice)))
        config, more = _config(request, writer.traits, model)
        fields.append(b'"generationConfig":' + _dump(config))
        notes += [*more, *_dropped(request.messages, self.provider)]
        headers = {"content-type": "application/json", "accept": "text/event-stream" if stream else "application/json"}
        return Rendered(_path(model, stream), b"{" + b",".join(fields) + b"}", headers, tuple(notes))

    def parse(self, body: bytes, deployment: str) -> Answer:
        """Read a body that came with status 200; an array of chunks is read too."""
        payload = _json(body, deployment)
        draft = _Draft(self.provider)
        try:
            for chunk in payload if isinstance(payload, list) else [payload]:
                if refusal := _refusal_in(chunk):
                    raise classify(200, refusal, deployment=deployment, table=self._table)
                draft.read(chunk)
            return draft.answer()
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            text = f"{deployment} sent no answer in its answer ({type(error).__name__}: {error}): {_excerpt(body)}"
            raise ServerError(text, deployment=deployment, status=200) from None

    def stream(self, deployment: str) -> GenerateStream:
        """Return a reader for one streamed answer."""
        return GenerateStream(self.provider, deployment, self._table)


# --- requests -------------------------------------------------------------------------------------------------------

_SIGNATURE = "thoughtSignature"
_NO_SIGNATURE = "skip_thought_signature_validator"
"""What the documentation tells to send with a tool call that another model made."""
_AFTERWARDS = ("groundingMetadata", "citationMetadata", "urlContextMetadata")
"""What the provider says about an answer; unlike the answer's parts it does not go back."""


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _dump_all(values: Iterable[Any]) -> bytes:
    return b",".join([_dump(value) for value in values])


def _path(model: str, stream: bool) -> str:
    """Return the path of ``model``: a bare name or a resource, as ``tunedModels/x`` or Vertex AI's ``projects/x/…``."""
    version = "v1beta1" if model.startswith(("projects/", "publishers/")) else "v1beta"
    resource = model if "/" in model else f"models/{model}"
    return f"{version}/{quote(resource, safe='/@')}:" + (
        "streamGenerateContent?alt=sse" if stream else "generateContent"
    )


def _tool(tool: ToolSpec) -> bytes:
    schema = _schema(tool.parameters)
    return _dump({"name": tool.name, "description": tool.description, "parametersJsonSchema": schema})


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


def _in_words(request: ModelRequest, traits: Traits) -> bool:
    """Whether the output schema has to be asked for in words: older models take no schema beside tools."""
    return request.output_schema is not None and bool(request.tools) and not traits.modern


def _instructions(request: ModelRequest, traits: Traits) -> bytes:
    systems = [message for message in request.messages if isinstance(message, SystemMessage)]
    parts = [part for message in systems if (part := message.rendered("gemini/system", _system))]
    if _in_words(request, traits):
        words = "When you need no more tools, answer with nothing but JSON that matches this JSON Schema:"
        parts.append(_dump({"text": f"{words}\n{json.dumps(request.output_schema, ensure_ascii=False)}"}))
    return b",".join(parts)


def _system(message: SystemMessage) -> bytes:
    return _dump({"text": message.text}) if message.text else b""


def _config(request: ModelRequest, traits: Traits, model: str) -> tuple[dict[str, Any], list[str]]:
    config: dict[str, Any] = {}
    notes: list[str] = []
    if _in_words(request, traits):
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
        self.notes: dict[str, None] = {}
        self._provider = provider
        self._key = f"gemini/{provider}/{'modern' if traits.modern else 'older'}"
        self._results_of: dict[str, tuple[str, Callable[[ToolMessage], bytes]]] = {}

    def contents(self, messages: Iterable[Message]) -> bytes:
        """Return the turns of ``messages``, such that the provider takes them."""
        turns: list[tuple[str, bytes]] = []
        for answer, followers in _answers(messages):
            if answer is not None:
                turns.append(("model", answer.rendered(self._key, self._assistant)))
                followers = self._results(answer.tool_calls, followers, turns)
            turns += [("user", self._user(message)) for message in followers]
        turns = [turn for turn in turns if turn[1]]
        if not turns or turns[0][0] == "model":
            turns.insert(0, ("user", _dump({"text": "Begin."})))
        if turns[-1][0] == "model":
            turns.append(("user", _dump({"text": "Continue."})))
            self.notes["the conversation ended with the model's own words, so it was asked to continue"] = None
        return b",".join([_HEADS[role] + parts + b"]}" for role, parts in turns])

    def _results(
        self, calls: Sequence[ToolCall], followers: Sequence[Message], turns: list[tuple[str, bytes]]
    ) -> list[Message]:
        """Write the results of ``calls`` as one turn, one for each call and in their order, and return the rest."""
        found, rest = _matched(calls, followers)
        if not calls:
            return rest
        pairs = list(zip(calls, found, strict=True))
        turns.append(("user", b",".join([self._result(call, message) for call, message in pairs])))
        moved = [parts for call, message in pairs if message and (parts := self._moved(call.name, message))]
        if moved:
            turns.append(("user", b",".join(moved)))
            self.notes["images in tool results were sent behind the results: they have no place inside"] = None
        return rest

    def _result(self, call: ToolCall, message: ToolMessage | None) -> bytes:
        if message is None:
            self.notes["tool calls without a result were sent with an error as their result"] = None
            response = {"error": "no result was recorded"}
            return _dump({"functionResponse": {"id": call.id, "name": call.name, "response": response}})
        if (known := self._results_of.get(call.name)) is None:
            known = f"{self._key}/{call.name}", partial(_result, call.name, self.traits.modern)
            self._results_of[call.name] = known
        return message.rendered(*known)

    def _moved(self, name: str, message: ToolMessage) -> bytes:
        if isinstance(message.content, str):
            return b""
        return message.rendered(f"{self._key}/{name}/images", partial(_moved, name, self.traits.modern))

    def _user(self, message: Message) -> bytes:
        if isinstance(message, ToolMessage):
            self.notes["tool results without their call were sent as text"] = None
            return message.rendered(f"{self._key}/orphan", _orphan)
        return message.rendered(self._key, lambda each: _dump_all(_parts(each.content)))

    def _assistant(self, message: AssistantMessage) -> bytes:
        return _dump_all(_model_parts(message, self._provider, self.traits.modern))


def _answers(messages: Iterable[Message]) -> Iterator[tuple[AssistantMessage | None, list[Message]]]:
    """Split a conversation: each answer of a model with the messages that follow it, instructions left out."""
    answer: AssistantMessage | None = None
    followers: list[Message] = []
    for message in messages:
        if isinstance(message, AssistantMessage):
            yield answer, followers
            answer, followers = message, []
        elif not isinstance(message, SystemMessage):
            followers.append(message)
    yield answer, followers


def _matched(calls: Sequence[ToolCall], followers: Sequence[Message]) -> tuple[list[ToolMessage | None], list[Message]]:
    """Find the result of each call; the rest are messages of other kinds and results of no call."""
    first = [message for message in followers[: len(calls)] if isinstance(message, ToolMessage)]
    if [message.tool_call_id for message in first] == [call.id for call in calls]:
        return [*first], list(followers[len(calls) :])  # as nearly always
    found: list[ToolMessage | None] = [None] * len(calls)
    waiting: dict[str, list[int]] = {}
    for place, call in enumerate(calls):
        waiting.setdefault(call.id, []).append(place)
    rest: list[Message] = []
    for message in followers:
        if isinstance(message, ToolMessage) and (places := waiting.get(message.tool_call_id)):
            found[places.pop(0)] = message
        else:
            rest.append(message)
    return found, rest


def _parts(content: Content) -> list[dict[str, Any]]:
    """Write text and images; empty text is left out, since Vertex AI refuses it."""
    if isinstance(content, str):
        return [{"text": content}] if content else []
    return [
        _part(part) for part in content if isinstance(part, ImagePart) or (isinstance(part, TextPart) and part.text)
    ]


def _part(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"text": part.text}
    if inline := _inline(part):
        return {"inlineData": inline}
    guessed, _ = mimetypes.guess_type(urlsplit(part.url or "").path)
    return {"fileData": {"mimeType": guessed or part.media_type, "fileUri": part.url}}


_DATA_URL = re.compile(r"data:([^;,]+);base64,(.*)", re.S)


def _inline(part: ImagePart) -> dict[str, str] | None:
    """Return the image's own bytes, ``None`` when only its address is known."""
    if part.data is not None:
        return {"mimeType": part.media_type, "data": part.data}
    found = _DATA_URL.fullmatch(part.url or "")
    return {"mimeType": found[1], "data": found[2]} if found else None


def _images(message: ToolMessage) -> list[ImagePart]:
    content = () if isinstance(message.content, str) else message.content
    return [part for part in content if isinstance(part, ImagePart)]


def _result(name: str, modern: bool, message: ToolMessage) -> bytes:
    text = message.text
    images = _images(message)
    native = [{"inlineData": inline} for image in images if modern and (inline := _inline(image))]
    if len(native) < len(images):
        text += "\n[its images follow]"
    result: dict[str, Any] = {"id": message.tool_call_id, "name": name}
    result["response"] = {"error" if message.is_error else "output": text}
    if native:
        result["parts"] = native
    return _dump({"functionResponse": result})


def _moved(name: str, modern: bool, message: ToolMessage) -> bytes:
    images = [_part(image) for image in _images(message) if not (modern and _inline(image))]
    label = {"text": f"Images of the result of {name} ({message.tool_call_id}):"}
    return _dump_all([label, *images]) if images else b""


def _orphan(message: ToolMessage) -> bytes:
    said = f"Result of {message.name or 'a tool'} ({message.tool_call_id}), whose call is no longer known:"
    return _dump_all([{"text": f"{said}\n{message.text}"}, *map(_part, _images(message))])


def _model_parts(message: AssistantMessage, provider: str, modern: bool) -> list[dict[str, Any]]:
    """Write an answer's parts in the order in which they came: thoughts may lie between two tool calls."""
    calls = [_call(call, provider) for call in message.tool_calls]
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
    for part in (TextPart(text=content),) if isinstance(content, str) else content:
        if isinstance(part, TextPart | ImagePart):
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


def _call(call: ToolCall, provider: str) -> dict[str, Any]:
    """Write a call; broken arguments are wrapped, since the wire has only objects."""
    arguments: Any = call.arguments if call.arguments is not None else {"_invalid_json": call.raw or ""}
    part: dict[str, Any] = {"functionCall": {"id": call.id, "name": call.name, "args": arguments}}
    if call.provider == provider and _SIGNATURE in call.data:
        part[_SIGNATURE] = call.data[_SIGNATURE]
    return part


def _dropped(messages: Iterable[Message], provider: str) -> Iterable[str]:
    """Say what of the conversation this wire cannot carry."""
    key, find = f"gemini/{provider}/dropped", partial(_dropped_of, provider)
    told: dict[str, None] = {}
    begun = False
    for message in messages:
        if message.role != "system":
            begun = True
        elif begun:
            told["instructions in mid-conversation were sent before it: this wire has them only there"] = None
        if lines := message.rendered(key, find):
            told |= dict.fromkeys(lines.decode().splitlines())
    return told


def _dropped_of(provider: str, message: Message) -> bytes:
    """Return a line for each kind of thing in ``message`` that is left out."""
    parts = () if isinstance(message.content, str) else message.content
    calls = message.tool_calls if isinstance(message, AssistantMessage) else ()
    thoughts = {part.provider for part in parts if isinstance(part, ReasoningPart)}
    thoughts |= {call.provider for call in calls if _SIGNATURE in call.data}
    items = {part.provider for part in parts if isinstance(part, ProviderPart)}
    lines = [
        f"reasoning of {name or 'an unknown provider'} was left out: only that provider can read it"
        for name in sorted(thoughts - {provider})
    ]
    lines += [
        f"items of {name or 'an unknown provider'} were left out: only that provider can read them"
        for name in sorted(items - {provider})
    ]
    if isinstance(message, SystemMessage) and any(isinstance(part, ImagePart) for part in parts):
        lines.append("images in instructions were left out: this wire takes text there")
    return "\n".join(lines).encode()


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


def _json(body: bytes, deployment: str) -> Any:
    try:
        return _unwrapped(json.loads(body))
    except (ValueError, RecursionError):
        what = "an HTML page" if body.lstrip()[:1] == b"<" else "broken JSON"
        text = f"{deployment} answered 200 with {what}: {_excerpt(body)}; check base_url if this goes on"
        raise ServerError(text, deployment=deployment, status=200) from None


def _unwrapped(payload: Any) -> Any:
    """Undo what proxies do to errors: JSON inside a string."""
    if isinstance(payload, str) and payload.lstrip()[:1] in ("{", "["):
        return json.loads(payload)
    return payload


def _excerpt(body: bytes) -> str:
    return re.sub(r"\s+", " ", body[:200].decode("utf-8", "replace"))


def _refusal_in(chunk: Any) -> Any:
    """Return what says that a body or chunk with status 200 is an error or a blocked prompt, else ``None``."""
    if isinstance(chunk, list) and chunk:
        chunk = chunk[0]
    if not isinstance(chunk, Mapping):
        return None
    if chunk.get("error"):
        return chunk
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
    thoughts = int(raw.get("thoughtsTokenCount") or 0)
    return Usage(
        input_tokens=int(raw.get("promptTokenCount") or 0) + int(raw.get("toolUsePromptTokenCount") or 0),
        output_tokens=int(raw.get("candidatesTokenCount") or 0) + thoughts,
        cached_tokens=int(raw.get("cachedContentTokenCount") or 0),
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
            yield TextPart(text=text)


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
        if all(isinstance(part, TextPart) for part in parts):
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


class GenerateStream:
    """Reads one streamed answer; see ``wire.Stream``.

    Events are asked for, but servers and proxies that ignore ``alt=sse`` send a JSON array, which is read too. Only the
    array has an end of its own: with events the answer is whole when the stream ends after a ``finishReason``.
    """

    def __init__(self, provider: str, deployment: str, table: tuple[Rule, ...] = TABLE) -> None:
        self.done = False
        self._deployment = deployment
        self._table = table
        self._chunks: EventParser | _Objects | None = None
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
        if self._chunks is None:
            piece = piece.lstrip(b" \t\r\n\xef\xbb\xbf")
            if not piece:
                return ""
            self._chunks = _Objects() if piece[:1] in (b"[", b"{") else EventParser()
        text = "".join([self._event(event) for event in self._chunks.feed(piece)])
        self.done = self.done or (isinstance(self._chunks, _Objects) and self._chunks.done)
        return text

    def close(self) -> Answer:
        """Return the answer at the end of the stream."""
        if not self.done and self._chunks is not None:
            for event in self._chunks.close():
                self._event(event)
        if not self._draft.finish:
            raise self._broken("ended without a finishReason, so its answer is not whole")
        try:
            return self._draft.answer()
        except ValueError as error:
            raise self._broken(f"carried no answer: {error}") from None

    def _event(self, event: Event) -> str:
        if self.done:
            return ""
        if event.data.strip() == "[DONE]":  # not of this wire, but of proxies in front of it
            self.done = True
            return ""
        chunk = self._chunk(event)
        try:
            return self._draft.read(chunk)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise self._broken(f"carried a chunk that is no chunk ({type(error).__name__})") from None

    def _chunk(self, event: Event) -> Mapping[str, Any]:
        try:
            chunk = _unwrapped(json.loads(event.data))
        except (ValueError, RecursionError):
            chunk = None
        if event.name == "error" or _refusal_in(chunk):
            raise self._error(_refusal_in(chunk) or chunk or event.data)
        if not isinstance(chunk, Mapping):
            raise self._broken(f"carried a malformed chunk: {event.data[:80]!r}")
        return chunk

    def _error(self, body: Any) -> ModelError:
        return classify(200, body, deployment=self._deployment, table=self._table)

    def _broken(self, what: str) -> StreamBroken:
        return StreamBroken(f"the stream of {self._deployment} {what}", deployment=self._deployment, status=200)
