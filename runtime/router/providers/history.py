"""A conversation in the form that every server takes: each call of a tool followed by its result, and by one only.

Canonical conversations promise nothing of the kind. They were cut, merged, or begun at another provider, and so they
have results without a call, calls without a result, ids that two calls share or that are of the wrong characters.
Servers refuse all of these, each in its own words. They are mended here, in one way for all wires, and a note says so:
what a request leaves out or puts in must not depend on who happens to answer it.

What is put in stays in at every later turn, made of the messages before it alone: the beginning of a conversation never
changes, which the providers' prompt caches depend on, and thoughts that are bound to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from ridethrough.runtime.router.messages import (
    AssistantMessage,
    Message,
    ProviderPart,
    ReasoningPart,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from ridethrough.runtime.router.providers.parts import images_in, parts_of, result_text

# --- what is put in -------------------------------------------------------------------------------------------------


class Filler(NamedTuple):
    """What the user is made to say where a wire wants a turn of his, and the note about it."""

    text: str
    note: str


EMPTY = Filler("Begin.", "'Begin.' was put into the empty conversation: this wire wants a user's turn there")
ANSWER_FIRST = Filler(
    "(The conversation begins with an answer.)",
    "a user's turn was put before the first answer: this wire wants one there",
)
UNREPLIED = Filler(
    "Continue.", "'Continue.' was put after answers that nobody replied to: this wire wants a user's turn there"
)

_ORPHAN = "results of tool calls that are not in the conversation were sent as text"
_UNANSWERED = "tool calls without a result were answered with an error"
_NO_RESULT = "There is no result of this call: it was not made, or was interrupted."


def _missing(answer: AssistantMessage) -> tuple[ToolMessage, ...]:
    """Return what stands for the results of an answer's calls where there are none."""
    return tuple(
        ToolMessage(content=_NO_RESULT, tool_call_id=call.id, name=call.name, is_error=True)
        for call in answer.tool_calls
    )


def _as_text(result: ToolMessage) -> UserMessage:
    """Return a result whose call is not there as what a user says."""
    title = f"The result of {result.name or 'a tool'} (call {result.tool_call_id}), whose call is not shown:\n"
    text = title + result_text(result)
    images = images_in(result.content)
    return UserMessage(content=(TextPart(text=text), *images) if images else text)


# --- turns ----------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """An answer of the model (none before the first) and what follows it.

    ``results`` are those of its calls, in their order, and ``ids`` the calls' ids on this wire. ``others`` are what
    users and instructions say until the next answer.
    """

    answer: AssistantMessage | None
    results: Sequence[ToolMessage]
    others: Sequence[SystemMessage | UserMessage]
    ids: Sequence[str]

    def key(self, key: str) -> str:
        """Return ``key`` for what is rendered of the answer, which shows the ids."""
        return "\0".join((key, *self.ids))


class History:
    """The turns of a conversation. ``fit`` makes an id valid; it returns the same for the same id."""

    def __init__(self, messages: Iterable[Message], fit: Callable[[str], str]) -> None:
        self.notes: dict[str, None] = {}
        self._fit = fit
        self._used: dict[str, int] = {}
        self.turns = list(self._split(messages))

    def fill(self, filler: Filler) -> str:
        """Note that something is put in, and return its text."""
        self.notes[filler.note] = None
        return filler.text

    def _split(self, messages: Iterable[Message]) -> Iterator[Turn]:
        answer: AssistantMessage | None = None
        followers: list[Message] = []
        for message in messages:
            if isinstance(message, AssistantMessage):
                yield self._turn(answer, followers)
                answer, followers = message, []
            else:
                followers.append(message)
        yield self._turn(answer, followers)

    def _turn(self, answer: AssistantMessage | None, followers: list[Message]) -> Turn:
        if answer is None or not answer.tool_calls:
            return Turn(answer, (), self._without_results(followers), ())
        results, rest = self._matched(answer, followers)
        return Turn(answer, results, self._without_results(rest), [self._id(call.id) for call in answer.tool_calls])

    def _without_results(self, messages: Iterable[Message]) -> list[SystemMessage | UserMessage]:
        found: list[SystemMessage | UserMessage] = []
        for message in messages:
            if isinstance(message, ToolMessage):
                self.notes[_ORPHAN] = None
                found.append(message.rendered("as text", _as_text))
            elif not isinstance(message, AssistantMessage):
                found.append(message)
        return found

    def _matched(
        self, answer: AssistantMessage, followers: list[Message]
    ) -> tuple[Sequence[ToolMessage], list[Message]]:
        """Find the result of each call, and return them with the other messages."""
        calls = answer.tool_calls
        first = [message for message in followers[: len(calls)] if isinstance(message, ToolMessage)]
        if [message.tool_call_id for message in first] == [call.id for call in calls]:
            return first, followers[len(calls) :]  # as nearly always
        results = list(answer.rendered("missing", _missing))
        waiting = _places(calls)
        rest: list[Message] = []
        for message in followers:
            if isinstance(message, ToolMessage) and (places := waiting.get(message.tool_call_id)):
                results[places.pop(0)] = message
            else:
                rest.append(message)
        if any(waiting.values()):
            self.notes[_UNANSWERED] = None
        return results, rest

    def _id(self, id: str) -> str:
        """Return an id that the server takes and that no other call has: some providers count anew in each turn."""
        base = id or "call"
        found = self._fit(base)
        while found in self._used:
            self._used[found] += 1
            found = self._fit(f"{base}_{self._used[found]}")
        self._used[found] = 1
        return found


def _places(calls: Sequence[ToolCall]) -> dict[str, list[int]]:
    """Return the places of the calls by their ids, which may be the same."""
    places: dict[str, list[int]] = {}
    for place, call in enumerate(calls):
        places.setdefault(call.id, []).append(place)
    return places


# --- what is left out -----------------------------------------------------------------------------------------------

_TRIFLES = (
    *("message", "annotations", "citations", "search_results"),
    *("groundingMetadata", "citationMetadata", "urlContextMetadata"),
)
"""What is said about an answer whose text is all there, and the frame that it came in: nobody else misses them."""
_SIGNATURES = ("thoughtSignature", "extra_content")
"""Where thoughts ride on calls instead of standing by themselves."""


def left_out(message: Message, provider: str, is_own: Callable[[ReasoningPart | ProviderPart], bool]) -> Iterator[str]:
    """Yield what of ``message`` only other providers, or other wires of the same name, can read."""
    for part in parts_of(message.content):
        if isinstance(part, ReasoningPart):
            if not is_own(part):
                yield _left_reasoning(part.provider)
        elif isinstance(part, ProviderPart) and part.kind not in _TRIFLES and not is_own(part):
            yield f"{part.kind[:60]} items of {_named(part.provider)} were left out: only that provider can read them"
    if isinstance(message, AssistantMessage):
        for call in message.tool_calls:
            if call.provider != provider and any(key in call.data for key in _SIGNATURES):
                yield _left_reasoning(call.provider)


def _left_reasoning(provider: str) -> str:
    return f"reasoning of {_named(provider)} was left out: only that provider can read it"


def _named(provider: str) -> str:
    return provider or "an unknown provider"


def noted(messages: Iterable[Message], key: str, find: Callable[[Message], Iterable[str]]) -> dict[str, None]:
    """Return the notes that ``find`` has on ``messages``, each once; a message keeps its own under ``key``."""
    found: dict[str, None] = {}

    def all_of(message: Message) -> tuple[str, ...]:
        return tuple(find(message))

    for message in messages:
        if notes := message.rendered(key, all_of):
            found.update(dict.fromkeys(notes))
    return found
