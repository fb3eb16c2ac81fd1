"""Faults on schedule: which request goes wrong, when, and how.

The kinds are those that real providers show (and that frameworks get wrong): errors with their bodies and headers,
silence at every place where silence can be, and streams that end in every way but the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal[
    "status",
    "hang",
    "slow_first_token",
    "stall",
    "cut",
    "malformed",
    "no_finish",
    "error_event",
    "html",
    "broken_json",
    "reset",
]


@dataclass(frozen=True)
class Fault:
    """One fault and its schedule.

    Kinds: ``status`` (an error answer), ``hang`` (no answer at all), ``slow_first_token`` (``seconds`` late), ``stall``
    (silence for ``seconds`` after ``after`` chunks), ``cut`` (the connection breaks after ``after`` chunks),
    ``malformed`` (a chunk that is no JSON), ``no_finish`` (the stream ends without its end), ``error_event`` (an error
    inside the stream), ``html`` and ``broken_json`` (bodies with status 200), ``reset`` (the connection is reset).

    The schedule: ``requests`` are numbers counted from 1 (of ``model``, when that is given), ``start`` and ``end`` are
    seconds since the server started, ``times`` is how often it happens at most. All that are given must hold.
    """

    kind: Kind = "status"
    status: int = 503
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    after: int = 1
    seconds: float = 3600.0
    model: str | None = None
    requests: tuple[int, ...] | None = None
    start: float = 0.0
    end: float | None = None
    times: int | None = None

    def applies(self, model: str, number: int, model_number: int, age: float, used: int) -> bool:
        """Whether it is due for request ``number`` (``model_number`` among those of ``model``) at ``age`` seconds."""
        if self.model is not None and self.model != model:
            return False
        if self.requests is not None and (number if self.model is None else model_number) not in self.requests:
            return False
        if self.times is not None and used >= self.times:
            return False
        return self.start <= age and (self.end is None or age < self.end)


class Schedule:
    """The faults of one server, and how often each happened."""

    def __init__(self, faults: list[Fault]) -> None:
        self._faults = list(faults)
        self._used: dict[int, int] = {}
        self._seen: dict[str, int] = {}

    def add(self, fault: Fault) -> None:
        """Put a fault in front of the others."""
        self._faults.insert(0, fault)
        self._used = {index + 1: count for index, count in self._used.items()}

    def clear(self) -> None:
        """Remove all faults: the provider is well again."""
        self._faults.clear()
        self._used.clear()

    def pick(self, model: str, number: int, age: float) -> Fault | None:
        """Return the first fault that is due, and count it."""
        seen = self._seen[model] = self._seen.get(model, 0) + 1
        for index, fault in enumerate(self._faults):
            used = self._used.get(index, 0)
            if fault.applies(model, number, seen, age, used):
                self._used[index] = used + 1
                return fault
        return None


def error_body(status: int) -> dict[str, Any]:
    """Return the body that OpenAI sends with ``status``."""
    kinds = {
        400: ("invalid_request_error", "invalid_value", "The request is wrong."),
        401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
        404: ("invalid_request_error", "model_not_found", "The model does not exist."),
        429: ("requests", "rate_limit_exceeded", "Rate limit reached."),
        503: ("server_error", "server_is_overloaded", "The server is overloaded."),
        529: ("overloaded_error", "overloaded_error", "Overloaded"),
    }
    kind, code, message = kinds.get(status, ("server_error", "server_error", "The server had an error."))
    return {"error": {"message": f"{message} (simulated)", "type": kind, "param": None, "code": code}}
