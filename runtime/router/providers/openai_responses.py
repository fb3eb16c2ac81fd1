"""The Responses wire, used without state: nothing is stored at the server, the whole conversation goes each time.

An answer is a list of items: thoughts, messages, calls, and what the provider's own tools did. Reasoning models want
their items back in their places, and are strict about it: a thought may only go back with the item that followed it,
that item may only carry its id while its thought is there, and a thought without encrypted content is a reference to
something that was never stored. Models that do not reason refuse thoughts altogether. So an assistant message keeps
what it takes to write its items again as they came (``ReasoningPart``, ``ProviderPart``, ``ToolCall.data``), and what
is not complete is left out with a note instead of being refused.

Unlike Chat Completions a stream has a number on each event and one terminal event that says how it ended, so a loss
in the middle shows, and ``[DONE]`` means nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
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
    ProviderPart,
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

_WIRE = "openai-responses"
_ENVELOPE = "message"  # the kind of the part that keeps a message item without its texts
_LEAST_TOKENS = 16  # the API refuses a lower max_output_tokens
_LONGEST_ID = 64  # characters of a call_id; longer ones are refused

# --- what is known of servers and models ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Quirks:
    """Where a server differs: the header that carries the key, and whether it can encrypt reasoning on request."""

    key_header: str = "authorization"
    encrypts: bool = True


QUIRKS: dict[str, Quirks] = {
    "openai.azure.com": Quirks(key_header="api-key"),
    "cognitiveservices.azure.com": Quirks(key_header="api-key"),
    "services.ai.azure.com": Quirks(key_header="api-key"),
    "api.groq.com": Quirks(encrypts=False),
    "api.deepseek.com": Quirks(encrypts=False),
}
"""By host name, or the end of one."""


def quirks_of(base_url: str) -> Quirks:
    """Return what is known of the server at ``base_url``."""
    host = urlsplit(base_url).hostname or ""
    return next((quirks for name, quirks in QUIRKS.items() if host == name or host.endswith("." + name)), Quirks())


@dataclass(frozen=True)
class Family:
    """What is known of models by their name.

    ``efforts`` are the reasoning efforts they take, from the least; none means that they do not reason, ``None`` that
    it is not known. ``encrypts`` says that thoughts come encrypted when asked, ``temperature`` that they can be
    sampled while they reason.
    """

    names: re.Pattern[str]
    efforts: tuple[str, ...] | None
    encrypts: bool = True
    temperature: bool = False

    @property
    def reasons(self) -> bool:
        """Whether such a model may reason, and so takes thoughts back."""
        return self.efforts != ()


EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
"""All efforts, from the least."""


def _family(names: str, efforts: str | None, **more: bool) -> Family:
    return Family(re.compile(names), None if efforts is None else tuple(efforts.split()), **more)


FAMILIES: tuple[Family, ...] = (
    _family(r"gpt-3|gpt-4|chatgpt|gpt-5-chat", "", encrypts=False, temperature=True),
    _family(r"gpt-5\.\d+-chat", "medium"),
    _family(r"gpt-5-pro", "high"),
    _family(r"gpt-5\.\d+-pro", "medium high xhigh"),
    _family(r"gpt-5(\.1)?-codex(?!-max)", "low medium high"),
    _family(r"gpt-5\.\d+-codex", "low medium high xhigh"),
    _family(r"gpt-5\.1", "none low medium high"),
    _family(r"gpt-5\.\d|gpt-[6-9]", "none low medium high xhigh"),
    _family(r"gpt-5", "minimal low medium high"),
    _family(r"gpt-oss", "low medium high", encrypts=False, temperature=True),
    _family(r"o\d|codex|computer-use", "low medium high"),
    _family(r"grok-(?!.*non-reasoning)", None, temperature=True),
)
"""Read from the top; names are matched from their beginning. Models that are in no family get what is asked."""

_UNKNOWN = Family(re.compile(""), None, encrypts=False, temperature=True)


@lru_cache(maxsize=256)
def family_of(model: str) -> Family:
    """Return what is known of ``model``, whatever a reseller puts before its name (``openai/``, ``openai.``)."""
    name = model.lower().rpartition("/")[2].removeprefix("openai.")
    return next((family for family in FAMILIES if family.names.match(name)), _UNKNOWN)


# --- the wire -------------------------------------------------------------------------------------------------------


class OpenAIResponses:
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
        header = self._quirks.key_header
        return {header: f"Bearer {key}" if header == "authorization" else key}

    def render(self, request: ModelRequest, model: str, *, stream: bool) -> Rendered:
        """Write ``request`` as a body of ``/responses``."""
        family = family_of(model)
        head, notes = _head(request, model, family, self._quirks)
        if stream:
            head["stream"] = True
        conversation = _Conversation(self.provider, reasons=family.reasons)
        body = _dump(head)[:-1] + b',"input":[' + conversation.write(request.messages) + b"]"
        if request.tools:
            body += b',"tools":[' + b",".join(tool.rendered(_WIRE, _tool) for tool in request.tools) + b"]"
        notes += [*conversation.notes, *_dropped(request.messages, self.provider, model, reasons=family.reasons)]
        headers = {"content-type": "application/json", "accept": "text/event-stream" if stream else "application/json"}
        return Rendered("responses", body + b"}", headers, tuple(notes))

    def parse(self, body: bytes, deployment: str) -> Answer:
        """Read a body that came with status 200."""
        payload = _json(body, deployment)
        if error := _error_in(payload):
            raise classify(200, error, deployment=deployment, table=self._table)
        try:
            return _answer(payload, payload["output"], str(payload.get("status") or "completed"), self.provider)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            text = f"{deployment} sent no answer in its answer ({type(error).__name__}): {_excerpt(body)}"
            raise ServerError(text, deployment=deployment, status=200) from None

    def stream(self, deployment: str) -> ResponsesStream:
        """Return a reader for one streamed answer."""
        return ResponsesStream(self.provider, deployment, self._table)


# --- requests -------------------------------------------------------------------------------------------------------


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _head(request: ModelRequest, model: str, family: Family, quirks: Quirks) -> tuple[dict[str, Any], list[str]]:
    """Return everything but input and tools, and what had to be changed."""
    head: dict[str, Any] = {"model": model, "store": False}
    notes: list[str] = []
    effort = _effort(request.reasoning, model, family, notes)
    if effort is not None:
        head["reasoning"] = {"effort": effort}
    if quirks.encrypts and (family.encrypts or (family is _UNKNOWN and effort not in (None, "none"))):
        head["include"] = ["reasoning.encrypted_content"]
    if request.tools and request.tool_choice != "auto":
        head["tool_choice"] = _tool_choice(request.tool_choice)
    if request.output_schema is not None:
        head["text"] = {"format": _format(request.output_schema)}
    if request.max_tokens is not None:
        head["max_output_tokens"] = _max_tokens(request.max_tokens, notes)
    if request.temperature is not None:
        if family.temperature or effort == "none":
            head["temperature"] = request.temperature
        else:
            notes.append(f"temperature was left out: {model} does not take one while it reasons")
    return head, notes


def _effort(asked: str | None, model: str, family: Family, notes: list[str]) -> str | None:
    """Return the effort to send: the asked one, or the nearest that the model takes, rather lower than higher."""
    if asked is None or family.efforts is None or asked in family.efforts:
        return asked
    if not family.efforts:
        if asked != "none":
            notes.append(f"reasoning effort {asked} was left out: {model} does not reason")
        return None
    limit = EFFORTS.index(asked)
    below = [effort for effort in family.efforts if EFFORTS.index(effort) < limit]
    effort = below[-1] if below else family.efforts[0]
    notes.append(f"reasoning effort {asked} became {effort}: {model} takes {', '.join(family.efforts)}")
    return effort


def _max_tokens(asked: int, notes: list[str]) -> int:
    if asked < _LEAST_TOKENS:
        notes.append(f"max_tokens {asked} became {_LEAST_TOKENS}, the least that this wire takes")
    return max(asked, _LEAST_TOKENS)


def _tool_choice(choice: str) -> object:
    return choice if choice in ("none", "required") else {"type": "function", "name": choice}


def _format(schema: Mapping[str, Any]) -> dict[str, Any]:
    name = re.sub(r"[^A-Za-z0-9_-]", "_", str(schema.get("title") or "output"))[:64]
    return {"type": "json_schema", "name": name, "schema": schema, "strict": _is_strict(schema)}


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
    """Write a tool; ``strict`` is said, because its default here is yes, which most schemas do not meet."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return _dump({"type": "function", **function, "strict": False})


# --- the conversation as input items --------------------------------------------------------------------------------


class _Conversation:
    """Writes messages as input items, each call followed by its result.

    Servers refuse a history in which a call has no result or a result no call, and some in which they do not stand
    together; conversations that were cut, merged or begun elsewhere have all of that.
    """

    def __init__(self, provider: str, *, reasons: bool) -> None:
        self.notes: list[str] = []
        self._provider = provider
        self._reasons = reasons
        self._key = f"{_WIRE}/{provider}" if reasons else f"{_WIRE}/{provider}/unreasoned"
        self._writer = _Writer(provider, reasons, "")
        self._pieces: list[bytes] = []
        self._used: set[str] = set()

    def write(self, messages: Sequence[Message]) -> bytes:
        """Return all items, joined; messages keep their own, so that only new ones are written."""
        for number, turn in enumerate(_turns(messages)):
            first = turn[0]
            if isinstance(first, AssistantMessage):
                self._turn(first, turn[1:], number)
            else:
                self._plain(turn)
        return b",".join(piece for piece in self._pieces if piece)

    def _turn(self, message: AssistantMessage, rest: list[Message], number: int) -> None:
        """Write an answer with what follows it, its results first."""
        missing = {call.id for call in message.tool_calls}
        suffix = "" if missing.isdisjoint(self._used) else f"_{number}"  # some servers count their calls anew each turn
        self._used |= missing
        self._write(message, suffix)
        others: list[Message] = []
        for other in rest:
            if isinstance(other, ToolMessage) and other.tool_call_id in missing:
                missing.remove(other.tool_call_id)
                self._write(other, suffix)
            else:
                others.append(other)
        if missing:
            self._note("tool calls without a result were given one that says so")
            ids = [_wire_id(call.id + suffix) for call in message.tool_calls if call.id in missing]
            self._pieces += [_dump(_output(id, "[no result was recorded]")) for id in ids]
        self._plain(others)

    def _plain(self, messages: Iterable[Message]) -> None:
        for message in messages:
            if isinstance(message, ToolMessage):
                self._note("tool results without a call were sent as text")
                self._pieces.append(message.rendered(f"{self._key}#stray", _stray))
            else:
                self._write(message, "")

    def _write(self, message: Message, suffix: str) -> None:
        if suffix:
            write = _Writer(self._provider, self._reasons, suffix)
            self._pieces.append(message.rendered(f"{self._key}#{suffix}", write))
        else:
            self._pieces.append(message.rendered(self._key, self._writer))

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _turns(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Split a conversation before every answer of the model."""
    turn: list[Message] = []
    for message in messages:
        if isinstance(message, AssistantMessage) and turn:
            yield turn
            turn = []
        turn.append(message)
    if turn:
        yield turn


def _stray(message: ToolMessage) -> bytes:
    return _dump({"role": "user", "content": f"[result of {message.name or 'a tool'}] {text_of(message.content)}"})


def _output(call_id: str, output: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def _wire_id(id: str) -> str:
    """Return an id that is not too long; the same for a call and its result."""
    if 0 < len(id) <= _LONGEST_ID:
        return id
    return "call_" + hashlib.sha256(id.encode("utf-8", "replace")).hexdigest()[:32]


@dataclass(frozen=True)
class _Writer:
    """Writes one message as items, joined by commas; nothing when nothing of it can go."""

    provider: str
    reasons: bool
    suffix: str

    def __call__(self, message: Message) -> bytes:
        return b",".join(_dump(item) for item in self._items(message))

    def _items(self, message: Message) -> list[dict[str, Any]]:
        if isinstance(message, AssistantMessage):
            return _Items(self.provider, self.reasons, self.suffix).build(message)
        if isinstance(message, ToolMessage):
            return [_output(_wire_id(message.tool_call_id + self.suffix), _result(message))]
        if message.role == "system":
            return [{"role": "system", "content": message.text}]
        return [{"role": "user", "content": _input(message.content)}]


def _input(content: Content) -> Any:
    if isinstance(content, str):
        return content
    return [_input_part(part) for part in content if isinstance(part, TextPart | ImagePart)] or ""


def _input_part(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "input_text", "text": part.text}
    url = part.url or f"data:{part.media_type};base64,{part.data}"
    return {"type": "input_image", "image_url": url, "detail": "auto"}


def _result(message: ToolMessage) -> Any:
    """Return a tool's result; that it is an error has no field here, so its text says so."""
    told = message.is_error and not message.text.lstrip().lower().startswith("error")
    if isinstance(message.content, str) or not any(isinstance(part, ImagePart) for part in message.content):
        return f"Error: {message.text}" if told else message.text
    parts = _input(message.content)
    return [{"type": "input_text", "text": "Error:"}, *parts] if told else parts


class _Items:
    """The items of one assistant message, in the order in which the model wrote them."""

    def __init__(self, provider: str, reasons: bool, suffix: str) -> None:
        self._provider = provider
        self._reasons = reasons
        self._suffix = suffix
        self._items: list[dict[str, Any] | _Saying] = []
        self._calls: list[dict[str, Any]] = []
        self._written = 0
        self._open: _Saying | None = None

    def build(self, message: AssistantMessage) -> list[dict[str, Any]]:
        """Return the items that can go back."""
        self._calls = [self._call(call) for call in message.tool_calls]
        whole = not any(_is_lost(part, self._provider, self._reasons) for part in _parts(message.content))
        for part in _parts(message.content):
            if isinstance(part, TextPart):
                self._say({"type": "output_text", "text": part.text})
            elif isinstance(part, ReasoningPart | ProviderPart) and _is_own(part, self._provider):
                self._calls_until(part.after_calls)
                self._place(part, whole)
        if message.refusal is not None:
            self._say({"type": "refusal", "refusal": message.refusal})
        self._calls_until(len(self._calls))
        items = [item.item() if isinstance(item, _Saying) else item for item in self._items]
        return _paired([item for item in items if item is not None])

    def _call(self, call: ToolCall) -> dict[str, Any]:
        """Write a call; broken arguments are wrapped, since servers refuse a history that is not JSON."""
        own = call.data if call.provider == self._provider else {}
        arguments: Any = call.arguments if call.arguments is not None else {"_invalid_json": call.raw or ""}
        text = json.dumps(arguments, ensure_ascii=False)
        id = _wire_id(call.id + self._suffix)
        return {**own, "type": "function_call", "call_id": id, "name": call.name, "arguments": text}

    def _calls_until(self, count: int) -> None:
        """Write the calls that came before the next item."""
        if count > self._written:
            self._items += self._calls[self._written : count]
            self._written = count
            self._open = None

    def _place(self, part: ReasoningPart | ProviderPart, whole: bool) -> None:
        """Open the message whose envelope this is, or write an item as it came, if its answer is ``whole``."""
        self._open = None
        if _is_envelope(part):
            self._open = _Saying(part.data)
            self._items.append(self._open)
        elif whole:
            self._items.append({**part.data})

    def _say(self, piece: dict[str, Any]) -> None:
        if self._open is None:
            self._open = _Saying({})
            self._items.append(self._open)
        self._open.pieces.append(piece)


def _parts(content: Content) -> Iterable[Part]:
    if isinstance(content, str):
        return (TextPart(text=content),) if content else ()
    return content


def _is_own(part: Part, provider: str) -> bool:
    """Whether an item is this provider's, of this wire."""
    return isinstance(part, ReasoningPart | ProviderPart) and part.provider == provider and "type" in part.data


def _is_envelope(part: Part) -> bool:
    return isinstance(part, ProviderPart) and part.kind == _ENVELOPE and "content" not in part.data


def _is_lost(part: Part, provider: str, reasons: bool) -> bool:
    """Whether this is a thought of this provider that cannot go back.

    Without its content it would be looked for in the server's store, and what came after it is refused without it: then
    no item of that answer goes back, only what it said and called.
    """
    if not isinstance(part, ReasoningPart) or part.provider != provider:
        return False
    there = part.data.get("encrypted_content") or part.data.get("content")
    return not (reasons and there and part.data.get("type") == "reasoning")


@dataclass
class _Saying:
    """A message that is being written: its envelope, empty when it came without one, and what is said in it."""

    envelope: Mapping[str, Any]
    pieces: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def item(self) -> dict[str, Any] | None:
        """Return the item, in the plain form where text is all it has; ``None`` when nothing is said."""
        if not self.pieces:
            return None
        if self.envelope:
            envelope = {key: value for key, value in self.envelope.items() if key != "annotations"}
            return {**envelope, "content": list(self._annotated())}
        if any(piece["type"] == "refusal" for piece in self.pieces):
            return {"type": "message", "role": "assistant", "content": self.pieces}
        return {"role": "assistant", "content": "".join(piece["text"] for piece in self.pieces)}

    def _annotated(self) -> Iterator[dict[str, Any]]:
        """Yield the pieces; texts that are still those that came get their annotations back."""
        texts = [piece for piece in self.pieces if piece["type"] == "output_text"]
        annotations = self.envelope.get("annotations")
        if isinstance(annotations, list) and len(noted := list[Any](annotations)) == len(texts):
            texts = [{**piece, "annotations": of} for piece, of in zip(texts, noted, strict=True)]
        yield from texts
        yield from (piece for piece in self.pieces if piece["type"] != "output_text")


def _paired(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out thoughts without the item that followed them, and ids of items where no thought is left."""
    kept: list[dict[str, Any]] = []
    for item in reversed(items):
        if item.get("type") != "reasoning" or (kept and _continues(kept[-1])):
            kept.append(item)
    if not any(item.get("type") == "reasoning" for item in kept):
        for item in kept:
            if item.get("type") in ("message", "function_call"):
                item.pop("id", None)
    return kept[::-1]


def _continues(item: dict[str, Any]) -> bool:
    """Whether ``item`` may follow a thought: a message only does with the id it had."""
    return item.get("type") not in (None, "message") or "id" in item


def _dropped(messages: Iterable[Message], provider: str, model: str, *, reasons: bool) -> Iterator[str]:
    """Say what of the conversation this wire cannot carry."""
    rich = [(message, message.content) for message in messages if not isinstance(message.content, str)]
    parts = [(message, part) for message, content in rich for part in content]
    foreign = [part for _, part in parts if not isinstance(part, TextPart | ImagePart) and part.provider != provider]
    for name in sorted({part.provider for part in foreign if isinstance(part, ReasoningPart)}):
        yield f"reasoning of {name or 'an unknown provider'} was left out: only that provider can read it"
    items = [part for part in foreign if isinstance(part, ProviderPart)]
    for name in sorted({part.provider for part in items}):
        kinds = ", ".join(sorted({part.kind for part in items if part.provider == name}))
        yield f"items of {name or 'an unknown provider'} were left out, only that provider can read them: {kinds}"
    if any(_is_lost(part, provider, reasons) for _, part in parts):
        why = "it came without its encrypted content" if reasons else f"{model} does not reason"
        yield f"reasoning was left out, and the items that came with it: {why}"
    if any(_breaks_off(message, content, provider) for message, content in rich):
        yield "reasoning was left out after which the answer broke off"
    if any(isinstance(part, ImagePart) and message.role in ("system", "assistant") for message, part in parts):
        yield "images in system and assistant messages were left out: this wire takes text there"


def _breaks_off(message: Message, content: tuple[Part, ...], provider: str) -> bool:
    last = content[-1] if content else None
    if not isinstance(message, AssistantMessage) or not isinstance(last, ReasoningPart) or message.refusal is not None:
        return False
    return last.provider == provider and last.after_calls >= len(message.tool_calls)


# --- answers --------------------------------------------------------------------------------------------------------

_INCOMPLETE: dict[str, Finish] = {
    "max_output_tokens": "length",
    "max_tokens": "length",
    "length": "length",
    "content_filter": "content_filter",
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
    """Return what says that a body or event with status 200 is an error, ``None`` when it is not one."""
    if isinstance(payload, list) and payload:
        payload = payload[0]
    if not isinstance(payload, Mapping):
        return None
    if payload.get("error") or "error" in (payload.get("type"), payload.get("object")):
        return payload
    if payload.get("status") == "failed":
        return {"message": "the response failed, without a reason"}
    return None


def _answer(response: Mapping[str, Any], output: Any, status: str, provider: str) -> Answer:
    """Read a response object; ``output`` are its items.

    Raises:
        ValueError: It is no answer. ``KeyError``, ``TypeError`` and ``AttributeError`` mean the same.
    """
    if not isinstance(output, list):
        raise TypeError("the output is no list")
    if status not in ("completed", "incomplete"):
        raise ValueError(f"the response is {status}")
    if not output and status == "completed":
        raise ValueError("the output is empty")
    message = _read_items(output, provider)
    finish, notes = _finish(response, status, message)
    return Answer(message, finish, _usage(response), str(response.get("model") or ""), notes)


def _finish(response: Mapping[str, Any], status: str, message: AssistantMessage) -> tuple[Finish, tuple[str, ...]]:
    if status == "incomplete":
        reason = str((response.get("incomplete_details") or {}).get("reason"))
        kind = _INCOMPLETE.get(reason, "other")
        return kind, (f"unknown reason for an incomplete answer {reason[:60]!r}",) if kind == "other" else ()
    if message.tool_calls:
        return "tool_calls", ()
    return ("refusal" if message.refusal else "stop"), ()


def _usage(response: Mapping[str, Any]) -> Usage | None:
    raw = response.get("usage")
    if not isinstance(raw, Mapping) or raw.get("input_tokens") is None:
        return None
    before, after = raw.get("input_tokens_details") or {}, raw.get("output_tokens_details") or {}
    return Usage(
        input_tokens=int(raw["input_tokens"]),
        output_tokens=int(raw.get("output_tokens") or 0),
        cached_tokens=int(before.get("cached_tokens") or 0),
        reasoning_tokens=int(after.get("reasoning_tokens") or 0),
        cache_write_tokens=int(before.get("cache_write_tokens") or 0),
    )


def _read_items(output: list[Any], provider: str) -> AssistantMessage:
    reader = _Reader(provider, bare=all(item.get("type") in ("message", "function_call") for item in output))
    for item in output:
        reader.add(item)
    return reader.message()


class _Reader:
    """Puts an assistant message together from items. ``bare``: there are only messages and calls among them."""

    def __init__(self, provider: str, *, bare: bool) -> None:
        self._provider = provider
        self._bare = bare
        self._content: list[Part] = []
        self._calls: list[ToolCall] = []
        self._refusal: list[str] = []

    def add(self, item: Mapping[str, Any]) -> None:
        """Take one item."""
        kind = str(item["type"])
        if kind == "function_call":
            self._calls.append(self._call(item))
        elif kind == "reasoning":
            self._content.append(ReasoningPart(text=_thought(item), **self._own(item)))
        elif kind == "message" and item.get("role", "assistant") == "assistant":
            self._add_message(item)
        else:
            self._content.append(ProviderPart(kind=kind, text=_told(item), **self._own(item)))

    def message(self) -> AssistantMessage:
        """Return what the items say."""
        plain = len(self._content) == 1 and isinstance(self._content[0], TextPart)
        content = text_of(tuple(self._content)) if plain else tuple(self._content)
        refusal = "".join(self._refusal) or None
        return AssistantMessage(content=content or "", tool_calls=tuple(self._calls), refusal=refusal)

    def _own(self, data: Mapping[str, Any]) -> dict[str, Any]:
        return {"provider": self._provider, "data": dict(data), "after_calls": len(self._calls)}

    def _call(self, item: Mapping[str, Any]) -> ToolCall:
        """Read a call; ids that are missing or used twice get one of their own."""
        id = str(item.get("call_id") or item.get("id") or f"call_{len(self._calls)}")
        if any(call.id == id for call in self._calls):
            id = f"{id}_{len(self._calls)}"
        call = parse_call(id, str(item.get("name") or ""), item.get("arguments"))
        known = ("type", "call_id", "name", "arguments", "status")
        data = {key: value for key, value in item.items() if key not in known and value is not None}
        return call.model_copy(update={"provider": self._provider, "data": data}) if data else call

    def _add_message(self, item: Mapping[str, Any]) -> None:
        """Take a message; what it has beside its texts is kept in an envelope before them, where that matters."""
        pieces = item["content"]
        if isinstance(pieces, str):
            pieces = [{"type": "output_text", "text": pieces}]
        texts = [piece for piece in pieces if piece["type"] != "refusal" and piece.get("text")]
        noted = [piece.get("annotations") or [] for piece in texts]
        if not self._bare or self._calls or self._content or item.get("phase") or any(noted):
            self._content.append(self._envelope(item, noted))
        self._content += [TextPart(text=str(piece["text"])) for piece in texts]
        self._refusal += [str(piece.get("refusal") or "") for piece in pieces if piece["type"] == "refusal"]

    def _envelope(self, item: Mapping[str, Any], noted: list[Any]) -> ProviderPart:
        data = {key: value for key, value in item.items() if key != "content" and value is not None}
        data = {**data, "role": "assistant", **({"annotations": noted} if any(noted) else {})}
        return ProviderPart(kind=_ENVELOPE, **self._own(data))


def _thought(item: Mapping[str, Any]) -> str:
    """Return a thought as text for people: its own words where they are shown, else their summary."""
    pieces = item.get("content") or item.get("summary") or ()
    return "\n\n".join(str(piece.get("text") or "") for piece in pieces)


def _told(item: Mapping[str, Any]) -> str:
    """Return what a person may read of an item of the provider's own tools."""
    for key in ("code", "name", "revised_prompt"):
        if isinstance(text := item.get(key), str):
            return text
    action = item.get("action")
    if isinstance(action, Mapping):
        return str(action.get("query") or action.get("url") or action.get("type") or "")
    return ", ".join(str(query) for query in item.get("queries") or ())


# --- streams --------------------------------------------------------------------------------------------------------

_TERMINAL = ("response.completed", "response.incomplete", "response.failed")


@dataclass
class _DraftItem:
    """An item that is being written, for servers that never send it whole."""

    item: Mapping[str, Any]
    whole: bool = False
    pieces: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def built(self) -> Mapping[str, Any]:
        """Return the item with what its pieces add."""
        if self.whole:
            return self.item
        joined = {kind: "".join(pieces) for kind, pieces in self.pieces.items()}
        if self.item.get("type") == "function_call":
            return {**self.item, "arguments": joined.get("function_call_arguments") or self.item.get("arguments")}
        if self.item.get("type") == "reasoning":
            thought = joined.get("reasoning_text")
            return {**self.item, "content": [{"type": "reasoning_text", "text": thought}]} if thought else self.item
        if self.item.get("type") != "message":
            return self.item
        said = [{"type": "output_text", "text": joined.get("output_text", "")}]
        refused = [{"type": "refusal", "refusal": joined["refusal"]}] if "refusal" in joined else []
        return {**self.item, "content": said + refused}


class ResponsesStream:
    """Reads one streamed answer; see ``wire.Stream``."""

    def __init__(self, provider: str, deployment: str, table: tuple[Rule, ...] = TABLE) -> None:
        self.done = False
        self.progress = 0
        self._provider = provider
        self._deployment = deployment
        self._table = table
        self._events = EventParser()
        self._last = -1
        self._items: dict[int, _DraftItem] = {}
        self._texts: list[str] = []
        self._answer: Answer | None = None

    @property
    def finished(self) -> bool:
        """Whether the terminal event came: nothing else says why the model stopped."""
        return self._answer is not None

    def feed(self, piece: bytes) -> str:
        """Take a piece of the stream and return the text that it adds."""
        return "".join([self._event(event) for event in self._events.feed(piece)])

    def close(self) -> Answer:
        """Return the answer at the end of the stream."""
        if not self.done:
            for event in self._events.close():
                self._event(event)
        if self._answer is None:
            raise self._broken("ended without its terminal event, so its answer is not whole")
        return self._answer

    def _event(self, event: Event) -> str:
        if self.done:
            return ""
        if event.data.strip() == "[DONE]":
            self.done = True
            return ""
        chunk = self._chunk(event)
        try:
            return self._read(str(chunk.get("type") or event.name), chunk)
        except ModelError:
            raise  # some of them are a ValueError too
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise self._broken(f"carried an event that is none ({type(error).__name__}: {error})") from None

    def _chunk(self, event: Event) -> Mapping[str, Any]:
        try:
            chunk = json.loads(event.data)
        except (ValueError, RecursionError):
            chunk = None
        if event.name == "error" or _error_in(chunk):
            raise self._error(_error_in(chunk) or chunk or event.data)
        if not isinstance(chunk, Mapping):
            raise self._broken(f"carried a malformed event: {event.data[:80]!r}")
        return chunk

    def _read(self, kind: str, chunk: Mapping[str, Any]) -> str:
        self._check_order(chunk.get("sequence_number"))
        if kind in _TERMINAL:
            return self._end(kind, chunk["response"])
        if kind == "response.output_item.added":
            self._begin(chunk)
        elif kind == "response.output_item.done":
            self._items[int(chunk["output_index"])] = _DraftItem(chunk["item"], whole=True)
            self.progress += 1
        elif kind.endswith(".delta"):
            return self._delta(kind.split(".")[-2], chunk)
        elif re.fullmatch(r"response\.\w+_call\.\w+", kind):
            self.progress += 1  # the provider's own tools at work
        return ""

    def _check_order(self, number: Any) -> None:
        """Notice a loss. Numbers that stand still or go back are a server's that does not count."""
        if not isinstance(number, int):
            return
        if number > max(self._last + 1, 1):
            raise self._broken(f"lost events: number {number} came after {self._last}")
        self._last = number

    def _begin(self, chunk: Mapping[str, Any]) -> None:
        item = chunk["item"]
        self._items[int(chunk["output_index"])] = _DraftItem(item)
        if item["type"] == "function_call":
            self.progress += 1  # it has the tool's name; other items begin empty

    def _delta(self, field: str, chunk: Mapping[str, Any]) -> str:
        delta = chunk.get("delta")
        if not delta:
            return ""
        self.progress += 1
        if not isinstance(delta, str):
            return ""
        index = int(chunk.get("output_index") or 0)
        draft = self._items.setdefault(index, _DraftItem({"type": "message", "role": "assistant"}))
        draft.pieces.setdefault(field, []).append(delta)
        if field != "output_text":
            return ""
        self._texts.append(delta)
        return delta

    def _end(self, kind: str, response: Mapping[str, Any]) -> str:
        """Take the terminal event; return the text that no delta brought."""
        self.done = True
        status = kind.rpartition(".")[2]
        if status == "failed" or _error_in(response):
            raise self._error(_error_in(response) or {"message": "the response failed, without a reason"})
        output = response.get("output") or []
        if len(output) < len(self._items):  # some servers leave out here what they sent before
            output = [self._items[index].built() for index in sorted(self._items)]
        if not output and status == "completed":
            text = f"{self._deployment} completed a stream without an answer in it"
            raise ServerError(text, deployment=self._deployment, status=200)
        self._answer = _answer(response, output, status, self._provider)
        said = "".join(self._texts)
        text = self._answer.message.text
        return text[len(said) :] if text.startswith(said) else ""

    def _error(self, body: Any) -> ModelError:
        return classify(200, body, deployment=self._deployment, table=self._table)

    def _broken(self, what: str) -> StreamBroken:
        return StreamBroken(f"the stream of {self._deployment} {what}", deployment=self._deployment, status=200)
