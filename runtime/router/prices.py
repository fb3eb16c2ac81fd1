"""What a call costs: the configuration's price, else the public price list, else unknown, which is never zero.

The list (genai-prices) is imported only when it is needed, in a thread, since its import takes half a second of CPU;
a model is looked up once. Its refresh over the network stays off: a price must not change in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import anyio.to_thread

from ridethrough.runtime.config import Price
from ridethrough.runtime.router.messages import Usage
from ridethrough.runtime.router.transport import is_loopback

SIMULATED = Price(input=0.5, output=2.0)  # pyright: ignore[reportCallIssue]
"""USD per million tokens of simulated models, so that demonstrations show a cost."""

CostOf = Callable[[Usage], float]


class PriceList:
    """Finds the price of a model; the answer is kept."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], CostOf | None] = {}

    async def find(self, model: str, base_url: str) -> CostOf | None:
        """Return a function from usage to USD, or ``None`` when the list does not have the model at that server."""
        if is_loopback(base_url):
            return None  # a server of one's own has no list price
        key = (model, base_url)
        if key not in self._known:
            self._known[key] = await anyio.to_thread.run_sync(_look_up, model, base_url)
        return self._known[key]


def of(price: Price) -> CostOf:
    """Return the function of a fixed price."""
    return lambda usage: price.cost(usage.input_tokens, usage.output_tokens, usage.cached_tokens)


def _look_up(model: str, base_url: str) -> CostOf | None:
    import genai_prices

    try:
        found = genai_prices.calc_price(genai_prices.Usage(), model, provider_api_url=base_url)
    except LookupError:
        return None
    fixed = _fixed(found.model_price)
    return of(fixed) if fixed else lambda usage: _priced(found.model_price, usage)


def _fixed(listed: Any) -> Price | None:
    """Return a price that does not depend on the size of the call, ``None`` when it does."""
    names = ("input_mtok", "output_mtok", "cache_read_mtok")
    values = [getattr(listed, name, None) for name in names]
    if not all(value is None or isinstance(value, Decimal) for value in values) or None in values[:2]:
        return None
    input_, output, cached = values
    return Price(
        input=float(input_ or 0), output=float(output or 0), cached_input=None if cached is None else float(cached)
    )


def _priced(listed: Any, usage: Usage) -> float:
    import genai_prices

    tokens = genai_prices.Usage(
        input_tokens=usage.input_tokens, output_tokens=usage.output_tokens, cache_read_tokens=usage.cached_tokens
    )
    return float(listed.calc_price(tokens)["total_price"])
