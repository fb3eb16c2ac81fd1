"""A conversation as the rules see it: the same whatever wire it came over.

Every wire's module reads its requests into this form, which is that of Chat Completions because people know it. The
wires differ in what they join and leave out (system texts at the top, results inside of user messages, calls without an
id), so two conversations are compared by ``digest``, which has none of that in it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from ridethrough.runtime.router.messages import IMAGE_TOKENS, estimate_tokens

SYSTEM = ("system", "developer")


class Malformed(ValueError):
    """A request that the wire does not have; the message says what is wrong with it."""


@dataclass(frozen=True)
class Conversation:
    """What a request asks. ``messages`` and ``tools`` have the form of Chat Completions.

    ``choice`` is ``auto``, ``none``, ``required`` or the name of the tool that must be called. ``framing`` says how a
    streamed answer is written: as events, or as one JSON array (which only Gemini has).
    """

    model: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    schema: Mapping[str, Any] | None = None
    choice: str = "auto"
    stream: bool = False
    framing: Literal["sse", "array"] = "sse"

    @cached_property
    def tool_names(self) -> list[str]:
        """The names of the tools on offer."""
        return [str(tool["function"]["name"]) for tool in self.tools]

    @cached_property
    def system(self) -> str:
        """The instructions: all system messages, a line each."""
        return "\n".join(text_of(message) for message in self.messages if message.get("role") in SYSTEM)

    @cached_property
    def user(self) -> str:
        """The last user message's text."""
        return next((text_of(m) for m in reversed(self.messages) if m.get("role") == "user"), "")

    @cached_property
    def results(self) -> list[str]:
        """The tool results since the last message of the assistant, in order."""
        found: list[str] = []
        for message in reversed(self.messages):
            if message.get("role") != "tool":
                break
            found.insert(0, text_of(message))
        return found

    @cached_property
    def called(self) -> list[str]:
        """The names of the tools that were called so far, in order."""
        calls = [call for message in self.messages for call in message.get("tool_calls") or ()]
        return [str(call.get("function", {}).get("name", "")) for call in calls]

    @cached_property
    def turns(self) -> int:
        """How many messages of the assistant there are."""
        return sum(message.get("role") == "assistant" for message in self.messages)

    @cached_property
    def tokens(self) -> int:
        """An estimate of the input tokens, made as the router makes its own: an image counts as a whole."""
        images = sum(1 for _ in _images(self.messages))
        bare = [_without_images(message) for message in self.messages] if images else self.messages
        text = json.dumps([bare, self.tools or None], ensure_ascii=False)
        return estimate_tokens(text) + images * IMAGE_TOKENS

    @cached_property
    def digest(self) -> str:
        """A hash of what was said: equal conversations have equal digests, whatever the wire and the model."""
        text = json.dumps(list(_essence(self.messages)), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:24]


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message or of its list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))


# --- what the readers of the wires share ----------------------------------------------------------------------------


def called(name: object, arguments: object, id: object = None) -> dict[str, Any]:
    """Return a tool call in the form of Chat Completions; ``arguments`` may be text or an object."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    return {"id": str(id or ""), "type": "function", "function": {"name": str(name or ""), "arguments": text}}


def offered(name: object, description: object, parameters: object) -> dict[str, Any]:
    """Return a tool in the form of Chat Completions."""
    function = {"name": str(name or ""), "description": description or "", "parameters": parameters or {}}
    return {"type": "function", "function": function}


def shown(url: str) -> dict[str, Any]:
    """Return an image in the form of Chat Completions."""
    return {"type": "image_url", "image_url": {"url": url}}


def illustrated(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put a tool's images into its result, from the user's message where wires have them whose results are text."""
    found: list[dict[str, Any]] = []
    for message in messages:
        images = _sent_apart(message) if found and found[-1].get("role") == "tool" else []
        for call, image in images:
            place = _place_of(call, found)
            found[place] = _with_image(found[place], image)
        if not images:
            found.append(message)
    return found


def joined(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join neighbouring messages of the assistant: some wires have an item for each thing that it said."""
    found: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "assistant" and found and found[-1]["role"] == "assistant":
            last = found[-1]
            calls = [*(last.get("tool_calls") or ()), *(message.get("tool_calls") or ())]
            found[-1] = spoken(text_of(last) + text_of(message), calls)
        else:
            found.append(message)
    return found


def spoken(text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a message of the assistant in the form of Chat Completions."""
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    if calls:
        message["tool_calls"] = calls
    return message


def instructed(text: str) -> dict[str, Any]:
    """Return a message with instructions in the form of Chat Completions."""
    return {"role": "system", "content": text}


def failed(text: str) -> str:
    """Return the result of a tool that failed as wires without a mark for it have it."""
    return text if text.lower().startswith("error") else f"Error: {text}"


def mappings(value: Any, where: str) -> list[Mapping[str, Any]]:
    """Return ``value`` as a list of objects.

    Raises:
        Malformed: It is something else.
    """
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise Malformed(f"{where}: expected a list of objects")
    return value


# --- images ---------------------------------------------------------------------------------------------------------

_TITLE = re.compile(r"(?:From|Images of) the result of .*\((?:call )?(?P<call>[^()]+)\):", re.DOTALL)
"""What stands before a tool's images in a user's message."""

_ANNOUNCED = re.compile(r"\n?\[(?:an image follows the tool results|its images follow)\]\Z")
"""What stands in their place in the result."""


def _images(messages: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for message in messages:
        if isinstance(content := message.get("content"), list):
            yield from (str(part["image_url"].get("url")) for part in content if _is_image(part))


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("image_url"), Mapping)


def _without_images(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [part for part in content if not _is_image(part)]}


def _sent_apart(message: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return a tool's images, each with its call's id where that is told; none where somebody speaks."""
    content = message.get("content")
    if message.get("role") != "user" or not isinstance(content, list):
        return []
    call, found = "", list[tuple[str, Any]]()
    for part in content:
        if _is_image(part):
            found.append((call, part))
        elif title := _TITLE.fullmatch(text_of({"content": [part]})):
            call = title["call"]
        else:
            return []
    return found


def _place_of(call: str, messages: Sequence[Mapping[str, Any]]) -> int:
    """Return where the result of a call is; the last one where it is not told."""
    places = (at for at in reversed(range(len(messages))) if messages[at].get("tool_call_id") == call)
    return next(places, len(messages) - 1)


def _with_image(result: dict[str, Any], image: Any) -> dict[str, Any]:
    content = result.get("content") or ""
    if isinstance(content, str):
        text = _ANNOUNCED.sub("", content)
        content = [{"type": "text", "text": text}] if text else []
    return {**result, "content": [*content, image]}


# --- what makes conversations equal ---------------------------------------------------------------------------------


def _essence(messages: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """Yield what was said, without ids, white space, and the places where the wires cut."""
    messages = list(messages)
    yield _squeezed(message for message in messages if message.get("role") in SYSTEM)
    spoken = [message for message in messages if message.get("role") not in SYSTEM]
    for role, run in groupby(spoken, key=lambda message: message.get("role")):
        group = list(run)
        if role == "tool":
            yield [said for message in group for said in (_squeezed([message]), *_images([message]))]
        else:
            yield [role, _squeezed(group), [*_images(group)], [*_calls(group)]]


def _squeezed(messages: Iterable[Mapping[str, Any]]) -> str:
    return "".join("".join((text_of(each) + str(each.get("refusal") or "")).split()) for each in messages)


def _calls(messages: Iterable[Mapping[str, Any]]) -> Iterator[list[Any]]:
    for message in messages:
        for call in message.get("tool_calls") or ():
            function = call.get("function") or {}
            yield [function.get("name"), _parsed(function.get("arguments"))]


def _parsed(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
