"""The exact-match cache: the same question, asked in the same way, by the same tenant, has the same answer.

What makes two questions the same is all that the model sees and all that shapes its answer: messages, tools, schema,
sampling, and the models of the route; and the epoch, since an eval that asks a thing five times wants five answers.
Equal questions that are asked at once are asked once (single-flight).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import anyio

from ridethrough.runtime.router.context import CallContext
from ridethrough.runtime.router.messages import MESSAGE, Message, ModelRequest, ModelResponse, Usage


def key_of(request: ModelRequest, models: Iterable[str], context: CallContext) -> str:
    """Return the digest under which the answer to a request is kept."""
    shape = {
        "models": list(models),
        "tools": [[tool.name, tool.description, tool.parameters] for tool in request.tools],
        "tool_choice": request.tool_choice,
        "schema": request.output_schema,
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
        "reasoning": request.reasoning,
        "epoch": context.epoch,
        "tenant": context.tenant,
        "floor": context.floor,
    }
    digest = hashlib.blake2b(json.dumps(shape, sort_keys=True).encode(), digest_size=20)
    for message in request.messages:
        digest.update(message.rendered("cache", _digest))
    return digest.hexdigest()


def _digest(message: Message) -> bytes:
    return hashlib.blake2b(MESSAGE.dump_json(message), digest_size=20).digest()


def may_be_kept(response: ModelResponse) -> bool:
    """Whether an answer is whole: one that was cut, withheld or degraded is no answer to give again."""
    return response.finish in ("stop", "tool_calls") and response.degraded is None


def from_cache(text: str, note: str) -> ModelResponse:
    """Rebuild a kept answer; it costs nothing this time."""
    kept = ModelResponse.model_validate_json(text)
    return kept.model_copy(
        update={"usage": Usage(), "cost_usd": 0.0, "attempts": 0, "notes": (*kept.notes, note), "cached": True}
    )


@dataclass
class _Flight:
    """A question that is being asked, and its answer when there is one."""

    landed: anyio.Event = field(default_factory=anyio.Event)
    answer: ModelResponse | None = None


class TooLate(Exception):
    """Another call's answer did not come in time."""


class SingleFlight:
    """Lets one of several equal calls do the work. If it fails, the next one tries: an error is nobody else's."""

    def __init__(self) -> None:
        self._under_way: dict[str, _Flight] = {}

    async def do(
        self, key: str, work: Callable[[], Awaitable[ModelResponse]], until: float = math.inf
    ) -> tuple[ModelResponse, bool]:
        """Return the answer, and whether another call made it.

        Raises:
            TooLate: It is ``until`` (on anyio's clock), and the other call is still under way.
        """
        while (other := self._under_way.get(key)) is not None:
            with anyio.CancelScope(deadline=until):
                await other.landed.wait()
            if not other.landed.is_set():
                raise TooLate
            if other.answer is not None:
                return other.answer, True
        self._under_way[key] = flight = _Flight()
        try:
            flight.answer = await work()
            return flight.answer, False
        finally:
            del self._under_way[key]
            flight.landed.set()
