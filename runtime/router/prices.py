"""What a call costs: the configuration's price, else the public list's, else the default's, else unknown: never zero.

The list (genai-prices) is imported only when it is needed, in a thread, since its import takes half a second of CPU;
a model is looked up once. Its refresh over the network stays off: a price must not change in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import anyio.to_thread

from ridethrough.runtime.config import Price
from ridethrough.runtime.router.messages import Usage
from ridethrough.runtime.router.transport import is_loopback

SIMULATED = Price(input=0.5, output=2.0)  # pyright: ignore[reportCallIssue]
"""USD per million tokens of simulated models, so that demonstrations show a cost."""

CostOf = Callable[[Usage], float]


@dataclass(frozen=True)
class Listing:
    """What the public list says of a model: its price, and its context window in tokens; ``None`` where it does not."""

    cost_of: CostOf | None = None
    context_window: int | None = None


NOTHING = Listing()


class PriceList:
    """Finds models in the public list; the answer is kept."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Listing] = {}

    async def find(self, model: str, base_url: str) -> Listing:
        """Return what the list has of the model at that server."""
        if is_loopback(base_url):
            return NOTHING  # a server of one's own has no list price
        key = (model, base_url)
        if key not in self._known:
            self._known[key] = await anyio.to_thread.run_sync(_look_up, model, base_url)
        return self._known[key]


def of(price: Price) -> CostOf:
    """Return the function of a fixed price."""
    return lambda usage: price.cost(
        usage.input_tokens, usage.output_tokens, usage.cached_tokens, usage.cache_write_tokens
    )


def _look_up(model: str, base_url: str) -> Listing:
    import genai_prices

    try:
        found = genai_prices.calc_price(genai_prices.Usage(), model, provider_api_url=base_url)
    except LookupError:
        return NOTHING
    fixed = _fixed(found.model_price)
    cost_of: CostOf = of(fixed) if fixed else lambda usage: _priced(found.model_price, usage)
    return Listing(cost_of, getattr(found.model, "context_window", None))


def _fixed(listed: Any) -> Price | None:
    """Return a price that does not depend on the size of the call, ``None`` when it does."""
    names = ("input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok")
    values = [getattr(listed, name, None) for name in names]
    if not all(value is None or isinstance(value, Decimal) for value in values) or None in values[:2]:
        return None
    input_, output, cached, written = (None if value is None else float(value) for value in values)
    return Price(input=input_ or 0.0, output=output or 0.0, cached_input=cached, cache_write=written)


def _priced(listed: Any, usage: Usage) -> float:
    import genai_prices

    tokens = genai_prices.Usage(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cached_tokens,
        cache_write_tokens=usage.cache_write_tokens,
    )
    return float(listed.calc_price(tokens)["total_price"])
