"""What every wire offers the router: a request as bytes, and an answer from bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ridethrough.runtime.router.messages import AssistantMessage, Finish, ModelRequest, Usage


@dataclass(frozen=True)
class Rendered:
    """A request ready to send. ``notes`` say what could not be translated."""

    path: str
    body: bytes
    headers: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """An answer as the provider gave it; ``usage`` is ``None`` when it did not say."""

    message: AssistantMessage
    finish: Finish
    usage: Usage | None
    model: str = ""
    notes: tuple[str, ...] = field(default=())


class Stream(Protocol):
    """Reads one streamed answer. A dead stream's object is thrown away with all it read."""

    @property
    def progress(self) -> int:
        """How many pieces of output came: text, reasoning, tool calls. Pings and role chunks are none."""
        ...

    @property
    def finished(self) -> bool:
        """Whether the provider has said why it stopped, so that the answer is whole (usage may still follow)."""
        ...

    @property
    def done(self) -> bool:
        """Whether nothing more is to come."""
        ...

    def feed(self, piece: bytes) -> str:
        """Take a piece of the stream and return the text that it adds.

        Raises:
            ModelError: The provider reports an error, by the class of its code; ``StreamBroken`` for bad chunks.
        """
        ...

    def close(self) -> Answer:
        """Return the answer at the end of the stream.

        Raises:
            StreamBroken: The stream ended before the answer did.
        """
        ...


class Wire(Protocol):
    """One provider's way to write requests and answers."""

    @property
    def default_base_url(self) -> str:
        """Where the vendor's own server is, as the vendor's own client takes it."""
        ...

    @property
    def models_path(self) -> str:
        """What to GET, below the base URL, to see which models there are."""
        ...

    def authorize(self, key: str) -> dict[str, str]:
        """Return the headers that carry a credential (and nothing else that is secret)."""
        ...

    def render(self, request: ModelRequest, model: str, *, stream: bool) -> Rendered:
        """Write ``request``; canonical messages keep their rendered form, so only new ones cost."""
        ...

    def parse(self, body: bytes, deployment: str) -> Answer:
        """Read a whole answer.

        Raises:
            ModelError: The body is an error, by its class; ``ServerError`` when it is no answer at all.
        """
        ...

    def stream(self, deployment: str) -> Stream:
        """Return a reader for one streamed answer."""
        ...
