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
from functools import lru_cache, partial
from typing import Any

from ridethrough.runtime.errors import ServerError
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
)
from ridethrough.runtime.router.providers import bodies
from ridethrough.runtime.router.providers.bodies import count, dump, dump_all
from ridethrough.runtime.router.providers.dialects import of_host
from ridethrough.runtime.router.providers.history import History, Turn, left_out, noted
from ridethrough.runtime.router.providers.parts import arguments_of, images_in, parts_of, result_text, url_of
from ridethrough.runtime.router.providers.streams import AnswerStream
from ridethrough.runtime.router.providers.structured import named_schema
from ridethrough.runtime.router.providers.wire import Answer, Rendered

_WIRE = "openai-responses"
_ENVELOPE = "message"  # the kind of the part that keeps a message item without its texts
_LEAST_TOKENS = 16  # the API refuses a lower max_output_tokens
_LONGEST_ID = 64  # characters of a call_id; longer ones are refused

# --- what is known of servers and models ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Quirks:
    """Where a server differs.

    ``key_header`` carries the key; ``encrypts`` says whether it can encrypt reasoning on request, ``interleaves``
    whether something else may stand between two calls whose results come after both.
    """

    key_header: str = "authorization"
    encrypts: bool = True
    interleaves: bool = True


QUIRKS: dict[str, Quirks] = {
    "openai.azure.com": Quirks(key_header="api-key"),
    "cognitiveservices.azure.com": Quirks(key_header="api-key"),
    "services.ai.azure.com": Quirks(key_header="api-key"),
    "api.groq.com": Quirks(encrypts=False),
    "api.deepseek.com": Quirks(encrypts=False, interleaves=False),
}
"""By host name, or the end of one."""


def quirks_of(base_url: str) -> Quirks:
    """Return what is known of the server at ``base_url``."""
    return of_host(base_url, QUIRKS) or Quirks()


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
        writer = self._writer(reasons=family.reasons)
        history = History(request.messages, _wire_id)
        items = b",".join([piece for turn in history.turns for piece in writer.write(turn) if piece])
        body = dump(head)[:-1] + b',"input":[' + items + b"]"
        if request.tools:
            body += b',"tools":[' + b",".join([tool.rendered(_WIRE, _tool) for tool in request.tools]) + b"]"
        notes += [*history.notes, *noted(request.messages, f"notes\0{writer.key}", writer.notes)]
        return Rendered("responses", body + b"}", bodies.headers(stream=stream), tuple(notes))

    def parse(self, body: bytes, deployment: str) -> Answer:
        """Read a body that came with status 200."""
        return bodies.read_answer(body, deployment, self._table, _error_in, self._whole)

    def stream(self, deployment: str) -> ResponsesStream:
        """Return a reader for one streamed answer."""
        return ResponsesStream(self.provider, deployment, self._table)

    def _writer(self, *, reasons: bool) -> _Writer:
        return _Writer(self.provider, reasons, self._quirks.interleaves)

    def _whole(self, payload: Any) -> Answer:
        return _answer(payload, payload["output"], str(payload.get("status") or "completed"), self.provider)


# --- requests -------------------------------------------------------------------------------------------------------


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
        head["text"] = {"format": {"type": "json_schema", **named_schema(request.output_schema)}}
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


def _tool(tool: ToolSpec) -> bytes:
    """Write a tool; ``strict`` is said, because its default here is yes, which most schemas do not meet."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return dump({"type": "function", **function, "strict": False})


# --- the conversation as input items --------------------------------------------------------------------------------


def _wire_id(id: str) -> str:
    """Return an id that is not too long; the same for a call and its result."""
    if 0 < len(id) <= _LONGEST_ID:
        return id
    return "call_" + hashlib.sha256(id.encode("utf-8", "replace")).hexdigest()[:32]


@dataclass(frozen=True)
class _Writer:
    """Writes turns as items. Messages keep their own as bytes, joined by commas; so only new ones are written.

    ``reasons`` says that the model takes thoughts back, ``interleaves`` that its server takes them between calls.
    """

    provider: str
    reasons: bool
    interleaves: bool

    @property
    def key(self) -> str:
        """Under which messages keep what is written of them."""
        return f"{_WIRE}/{self.provider}{'' if self.reasons else '/unreasoned'}{'' if self.interleaves else '/grouped'}"

    def write(self, turn: Turn) -> Iterator[bytes]:
        """Yield an answer, the results of its calls and what follows; nothing of what cannot go."""
        key = self.key
        if turn.answer is not None:
            yield turn.answer.rendered(turn.key(key), partial(self._assistant, ids=turn.ids))
        for result, id in zip(turn.results, turn.ids, strict=True):
            yield result.rendered(f"{key}\0{id}", partial(_result, id=id))
        for message in turn.others:
            yield message.rendered(key, _said)

    def notes(self, message: Message) -> Iterator[str]:
        """Yield what of a message does not get through."""
        yield from left_out(message, self.provider, self._is_own)
        parts = parts_of(message.content)
        if any(_is_lost(part, self.provider, self.reasons) for part in parts):
            why = "it came without its encrypted content" if self.reasons else "the model does not reason"
            yield f"reasoning was left out, and the items that came with it: {why}"
        if _breaks_off(message, parts, self.provider):
            yield "reasoning was left out after which the answer broke off"
        if isinstance(message, SystemMessage | AssistantMessage) and images_in(message.content):
            yield "images in system and assistant messages were left out: this wire takes text there"

    def _is_own(self, part: ReasoningPart | ProviderPart) -> bool:
        return part.provider == self.provider

    def _assistant(self, message: AssistantMessage, ids: Sequence[str]) -> bytes:
        return dump_all(_Items(self, ids).build(message))


def _said(message: SystemMessage | UserMessage) -> bytes:
    content = message.text if isinstance(message, SystemMessage) else _input(message.content)
    return dump({"role": message.role, "content": content})


def _input(content: Content) -> Any:
    if isinstance(content, str):
        return content
    return [_input_part(part) for part in content if isinstance(part, TextPart | ImagePart)] or ""


def _input_part(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "input_text", "text": part.text}
    return {"type": "input_image", "image_url": url_of(part), "detail": "auto"}


def _result(message: ToolMessage, id: str) -> bytes:
    """Write a tool's result; that it is an error has no field here, so its text says so."""
    output: Any = result_text(message)
    if images_in(message.content):
        told = [] if output == message.text else [{"type": "input_text", "text": "Error:"}]
        output = [*told, *_input(message.content)]
    return dump({"type": "function_call_output", "call_id": id, "output": output})


class _Items:
    """The items of one assistant message, in the order in which the model wrote them."""

    def __init__(self, writer: _Writer, ids: Sequence[str]) -> None:
        self._writer = writer
        self._ids = ids
        self._items: list[dict[str, Any] | _Saying] = []
        self._calls: list[dict[str, Any]] = []
        self._written = 0
        self._open: _Saying | None = None

    def build(self, message: AssistantMessage) -> list[dict[str, Any]]:
        """Return the items that can go back."""
        provider, parts = self._writer.provider, parts_of(message.content)
        self._calls = [self._call(call, id) for call, id in zip(message.tool_calls, self._ids, strict=True)]
        whole = not any(_is_lost(part, provider, self._writer.reasons) for part in parts)
        for part in parts:
            if isinstance(part, TextPart):
                self._calls_before(part)
                self._say({"type": "output_text", "text": part.text})
            elif isinstance(part, ReasoningPart | ProviderPart) and _is_own(part, provider):
                self._calls_before(part)
                self._place(part, whole)
        if message.refusal is not None:
            self._say({"type": "refusal", "refusal": message.refusal})
        self._calls_until(len(self._calls))
        items = [item.item() if isinstance(item, _Saying) else item for item in self._items]
        return _paired([item for item in items if item is not None])

    def _call(self, call: ToolCall, id: str) -> dict[str, Any]:
        own = call.data if call.provider == self._writer.provider else {}
        text = json.dumps(arguments_of(call), ensure_ascii=False)
        return {**own, "type": "function_call", "call_id": id, "name": call.name, "arguments": text}

    def _calls_before(self, part: TextPart | ReasoningPart | ProviderPart) -> None:
        if self._writer.interleaves:
            self._calls_until(part.after_calls)

    def _calls_until(self, count: int) -> None:
        """Write the first ``count`` calls, as far as they are not written yet."""
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


def _error_in(payload: Any) -> Any:
    """Return what says that a body, event or response is an error, ``None`` when it is not one."""
    if found := bodies.error_in(payload):
        return found
    if isinstance(payload, Mapping) and payload.get("status") == "failed":
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
        input_tokens=count(raw["input_tokens"]),
        output_tokens=count(raw.get("output_tokens")),
        cached_tokens=count(before.get("cached_tokens")),
        reasoning_tokens=count(after.get("reasoning_tokens")),
        cache_write_tokens=count(before.get("cache_write_tokens")),
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
        content: Content = tuple(self._content)
        if len(content) == 1 and isinstance(only := content[0], TextPart) and not only.after_calls:
            content = only.text
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
        if not self._bare or self._follows_another() or item.get("phase") or any(noted):
            self._content.append(self._envelope(item, noted))
        place = len(self._calls)
        self._content += [TextPart(text=str(piece["text"]), after_calls=place) for piece in texts]
        self._refusal += [str(piece.get("refusal") or "") for piece in pieces if piece["type"] == "refusal"]

    def _follows_another(self) -> bool:
        """Whether nothing but an envelope would tell the next message from the one before it."""
        last = self._content[-1] if self._content else None
        return isinstance(last, TextPart | ProviderPart) and last.after_calls == len(self._calls)

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


class ResponsesStream(AnswerStream):
    """Reads one streamed answer; see ``wire.Stream``."""

    def __init__(self, provider: str, deployment: str, table: tuple[Rule, ...] = TABLE) -> None:
        super().__init__(deployment, table)
        self.progress = 0
        self._provider = provider
        self._last = -1
        self._items: dict[int, _DraftItem] = {}
        self._texts: list[str] = []
        self._whole: Answer | None = None

    @property
    def finished(self) -> bool:
        """Whether the terminal event came: nothing else says why the model stopped."""
        return self._whole is not None

    def _missing(self) -> str:
        return "" if self.finished else "its terminal event"

    def _answer(self) -> Answer:
        assert self._whole is not None
        return self._whole

    def _error_in(self, chunk: Any) -> Any:
        return _error_in(chunk)

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
        self._whole = _answer(response, output, status, self._provider)
        said = "".join(self._texts)
        text = self._whole.message.text
        return text[len(said) :] if text.startswith(said) else ""
