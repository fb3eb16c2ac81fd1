"""Server-sent events from bytes that are split anywhere."""

from __future__ import annotations

from typing import NamedTuple


class Event(NamedTuple):
    """One event: its ``event:`` name (often empty) and its data."""

    name: str
    data: str


class EventParser:
    """Feed it pieces of a stream, take whole events.

    Comments and unknown fields are skipped, all three line ends are understood, and a line that is bare JSON counts as
    data, because servers break off a stream with such a line when they fail.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._name = ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[Event]:
        """Return the events that ``piece`` completes."""
        buffer = self._rest + piece
        keep = len(buffer) - 1 if buffer.endswith(b"\r") else len(buffer)  # its line feed may be in the next piece
        lines = buffer[:keep].replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop() + buffer[keep:]
        return [event for line in lines if (event := self._line(line))]

    def close(self) -> list[Event]:
        """Return what the end of the stream completes: some servers leave out the last blank line."""
        events = [event for line in (self._rest.strip(b"\r\n"), b"") if (event := self._line(line))]
        self._rest = b""
        return events

    def _line(self, raw: bytes) -> Event | None:
        if not raw:
            return self._dispatch()
        line = raw.decode("utf-8", "replace").removeprefix("\ufeff")
        if line.startswith("{"):
            self._data.append(line)
            return None
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._name = value
        return None

    def _dispatch(self) -> Event | None:
        name, data = self._name, self._data
        self._name, self._data = "", []
        return Event(name, "\n".join(data)) if data else None
