"""What a wire is given to write: an answer without any wire's form, or the failure in its place."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ridethrough.runtime.config import WireName
from ridethrough.runtime.router.providers.simulated.conversation import Conversation

CREATED = 1767225600
"""When every answer was made, in seconds since the epoch: the same conversation gets the same bytes."""


@dataclass(frozen=True)
class Tokens:
    """``input`` includes ``cached`` and ``written`` (to the prompt cache); ``output`` includes ``reasoning``."""

    input: int
    output: int
    cached: int = 0
    written: int = 0
    reasoning: int = 0


@dataclass(frozen=True)
class DraftCall:
    """A tool call; ``arguments`` is the text that the model wrote, JSON or not."""

    id: str
    name: str
    arguments: str

    def parsed(self) -> Any:
        """Return the arguments as an object where they are one, else their text."""
        try:
            return json.loads(self.arguments)
        except ValueError:
            return self.arguments


@dataclass(frozen=True)
class Draft:
    """An answer. ``finish`` is a reason as Chat Completions names it; one that a wire does not know is sent as it is.

    ``key`` goes into all ids. ``framing`` is the request's.
    """

    key: str
    model: str
    text: str
    calls: tuple[DraftCall, ...]
    finish: str
    tokens: Tokens
    reasoning: str = ""
    refusal: str = ""
    framing: Literal["sse", "array"] = "sse"

    @property
    def signature(self) -> str:
        """What a provider wants back with its thoughts, unchanged."""
        return base64.b64encode(f"simulated signature of {self.key}".encode()).decode()

    @property
    def words(self) -> list[str]:
        """The text in the pieces that a stream has."""
        return words(self.text)


def words(text: str) -> list[str]:
    """Cut ``text`` in front of each word."""
    return re.findall(r"\s*\S+\s*\Z|\s*\S+|\s+", text)


def pieces(text: str, size: int = 24) -> list[str]:
    """Cut ``text`` into pieces of ``size`` characters."""
    return [text[start : start + size] for start in range(0, len(text), size)]


@dataclass(frozen=True)
class Stream:
    """A streamed answer: its events, of which the last ``ending`` say that it is whole."""

    events: list[bytes]
    ending: int


What = Literal[
    "bad_request",
    "auth",
    "permission",
    "not_found",
    "too_large",
    "context_length",
    "content_filter",
    "rate_limit",
    "quota",
    "server_error",
    "timeout",
    "overloaded",
]


@dataclass(frozen=True)
class Failure:
    """A failure without any wire's form; ``status`` None means the one that the provider uses, ``wait`` is in seconds.

    ``message`` replaces the provider's own words.
    """

    what: What
    status: int | None = None
    wait: float | None = None
    message: str | None = None


@dataclass(frozen=True)
class Refused:
    """A failure as a provider answers it. Status 200 is an answer whose body says that there is none."""

    status: int
    body: Any
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


_BY_STATUS: dict[int, What] = {
    400: "bad_request",
    401: "auth",
    402: "quota",
    403: "permission",
    404: "not_found",
    413: "too_large",
    422: "bad_request",
    429: "rate_limit",
    503: "overloaded",
    504: "timeout",
    529: "overloaded",
}


def failure_of(status: int) -> Failure:
    """Return what a provider means by ``status``."""
    return Failure(_BY_STATUS.get(status, "bad_request" if status < 500 else "server_error"), status)


class Wire(Protocol):
    """How one provider's requests are read and its answers written."""

    @property
    def name(self) -> WireName:
        """As the configuration names it."""
        ...

    @property
    def prefix(self) -> str:
        """What a ``base_url`` has after the port."""
        ...

    def read(self, body: Mapping[str, Any], target: str) -> Conversation:
        """Read a request; ``target`` is its path with the query.

        Raises:
            Malformed: The provider would answer 400.
        """
        ...

    def whole(self, draft: Draft) -> bytes:
        """Write an answer without streaming."""
        ...

    def stream(self, draft: Draft) -> Stream:
        """Write a streamed answer."""
        ...

    def refused(self, failure: Failure, *, model: str = "") -> Refused:
        """Write a failure as the answer to a request."""
        ...

    def error_event(self, body: Any, draft: Draft, number: int) -> bytes:
        """Write the body of a failure as event ``number`` of a stream."""
        ...

    def models(self, names: Sequence[str]) -> Any:
        """Write the list of models."""
        ...


def dump(value: Any) -> bytes:
    """Write JSON as providers do; what is no UTF-8 is replaced."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
