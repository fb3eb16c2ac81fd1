"""What the readers of all wires' streams share: events in, and an answer only if it is whole."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

from ridethrough.runtime.errors import ModelError, StreamBroken
from ridethrough.runtime.router.errors import Rule, classify
from ridethrough.runtime.router.providers.bodies import MALFORMED, error_in, unwrapped, why
from ridethrough.runtime.router.providers.sse import Event, EventParser
from ridethrough.runtime.router.providers.wire import Answer


class Framing(Protocol):
    """Takes events out of bytes that are split anywhere."""

    def feed(self, piece: bytes) -> list[Event]:
        """Return the events that ``piece`` completes."""
        ...

    def close(self) -> list[Event]:
        """Return the events that the end of the stream completes."""
        ...


class AnswerStream(ABC):
    """Reads one streamed answer; see ``wire.Stream``, of which a wire adds ``progress`` and ``finished``.

    An error in the stream has the class of its code. Everything else that is not as it should be, a chunk as well as an
    end that comes too early, breaks the stream.
    """

    def __init__(self, deployment: str, table: tuple[Rule, ...]) -> None:
        self.done = False
        self._deployment = deployment
        self._table = table
        self._events: Framing = EventParser()

    def feed(self, piece: bytes) -> str:
        """Take a piece of the stream and return the text that it adds.

        Raises:
            ModelError: The provider reports an error, by the class of its code; ``StreamBroken`` for bad chunks.
        """
        return "".join([self._event(event) for event in self._events.feed(piece)])

    def close(self) -> Answer:
        """Return the answer at the end of the stream.

        Raises:
            StreamBroken: The stream ended before the answer did.
        """
        if not self.done:
            for event in self._events.close():
                self._event(event)
        if missing := self._missing():
            raise self._broken(f"ended without {missing}, so its answer is not whole")
        try:
            return self._answer()
        except ModelError:
            raise
        except MALFORMED as error:
            raise self._broken(f"carried no answer ({why(error)})") from None

    # What a wire has to say.

    @abstractmethod
    def _read(self, kind: str, chunk: Mapping[str, Any]) -> str:
        """Take a chunk, whose type or event name is ``kind``, and return the text that it adds."""

    @abstractmethod
    def _missing(self) -> str:
        """Return what would have to come before the answer is whole; nothing when it is."""

    @abstractmethod
    def _answer(self) -> Answer:
        """Return the answer, of which nothing is missing."""

    def _error_in(self, chunk: Any) -> Any:
        """Return what says that a chunk is an error."""
        return error_in(chunk)

    def _failed(self, error: ModelError) -> None:
        """Take an error that the provider reports; if it is not raised, the chunk it came in is read."""
        raise error

    # What is the same for all.

    def _event(self, event: Event) -> str:
        if self.done:
            return ""
        if event.data.strip() == "[DONE]":  # also of wires that have no such end: proxies put it there
            self.done = True
            return ""
        chunk = self._chunk(event)
        try:
            return self._read(str(chunk.get("type") or event.name), chunk)
        except ModelError:
            raise
        except MALFORMED as error:
            raise self._broken(f"carried a chunk that is none ({why(error)})") from None

    def _chunk(self, event: Event) -> Mapping[str, Any]:
        try:
            chunk = unwrapped(json.loads(event.data))
        except (ValueError, RecursionError):
            chunk = None
        error = self._error_in(chunk)
        if error or event.name == "error":
            self._failed(self._error(error or chunk or event.data))
        if not isinstance(chunk, Mapping):
            raise self._broken(f"carried a malformed chunk: {event.data[:80]!r}")
        return chunk

    def _error(self, body: Any) -> ModelError:
        return classify(200, body, deployment=self._deployment, table=self._table)

    def _broken(self, what: str) -> StreamBroken:
        return StreamBroken(f"the stream of {self._deployment} {what}", deployment=self._deployment, status=200)
