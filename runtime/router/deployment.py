"""One model at one provider: everything that calls to it have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ridethrough.runtime.config import Model, Price
from ridethrough.runtime.router import prices
from ridethrough.runtime.router.admission import Places, Retries, Scope
from ridethrough.runtime.router.health import Health, Quantiles
from ridethrough.runtime.router.messages import Usage
from ridethrough.runtime.router.prices import CostOf, Listing
from ridethrough.runtime.router.providers.wire import Wire
from ridethrough.runtime.router.transport import Connections

UNKNOWN_UNDERCOUNT = 2.0
"""How many times its estimate a call's input is taken to be where that decides about money, while nothing is known."""

UNKNOWN_OUTPUT = 1024
"""Output tokens that a call is expected to take while nothing is known and it has no ``max_tokens``."""


@dataclass(eq=False)
class Deployment:
    """A deployment as the router has it: its wire, its connections, its health, its limits, its price."""

    name: str
    provider: str
    model: Model
    wire: Wire
    connections: Connections
    health: Health
    places: Places
    rates: Scope
    """What shares its rate limit."""
    credential: Scope
    """What shares its key: shut when the key is refused or the account is out of credit."""
    own_price: Price | None = None
    default_price: Price | None = None
    cost_of: CostOf | None = None
    context_window: int | None = None
    looked_up: bool = False
    unlisted: bool = False
    """Whether no price of its own is known anywhere."""
    output: Quantiles = field(default_factory=Quantiles)
    undercount: Quantiles = field(default_factory=Quantiles)
    """Input tokens as they were billed, over those that were estimated."""
    retries: Retries = field(default_factory=Retries)

    def __post_init__(self) -> None:
        """Take what is configured; the rest is looked up at the first call."""
        self.context_window = self.model.context_window
        self.looked_up = self.own_price is not None and self.context_window is not None
        if self.own_price is not None:
            self.cost_of = prices.of(self.own_price)

    def complete(self, listing: Listing) -> None:
        """Take from the public list what was not configured."""
        self.looked_up = True
        self.context_window = self.context_window or listing.context_window
        if self.cost_of is None:
            self.cost_of = listing.cost_of
        self.unlisted = self.cost_of is None
        if self.cost_of is None and self.default_price is not None:
            self.cost_of = prices.of(self.default_price)

    def expected_usage(self, input_tokens: int, max_tokens: int | None) -> Usage:
        """Estimate what a call will use: its output is what nine of ten calls stay below, or its own bound."""
        learned = self.output.at(0.9)
        output = UNKNOWN_OUTPUT if learned is None else int(learned) + 1
        return Usage(input_tokens=input_tokens, output_tokens=min(output, max_tokens or output))

    def dearest_usage(self, input_tokens: int, max_tokens: int | None) -> Usage:
        """Estimate what a call will be billed for at most, for money that is put aside before it.

        Our estimate of the input counts bytes, the provider counts tokens in its own way; what nine of ten calls had
        more than we thought is added. While too little is known, twice the estimate is taken.
        """
        learned = self.undercount.at(0.9)
        factor = UNKNOWN_UNDERCOUNT if learned is None else max(1.0, learned)
        return self.expected_usage(math.ceil(factor * input_tokens), max_tokens)

    def learn_usage(self, estimated: int, usage: Usage) -> None:
        """Take what a call was billed for whose input was ``estimated``."""
        self.output.add(usage.output_tokens)
        self.undercount.add(usage.input_tokens / max(1, estimated))

    def wait(self, now: float, tokens: float) -> float:
        """Return the seconds until its account lets a call of so many tokens begin: 0 when it may now."""
        if now < self.credential.shut_until:
            return self.credential.shut_until - now
        return self.rates.wait(now, tokens)

    def is_full(self) -> bool:
        """Whether it has as many calls as it takes at once."""
        return len(self.health.flight) >= self.places.limit

    def shut_by(self, now: float) -> Scope | None:
        """Return the scope that is shut, if one is."""
        for scope in (self.credential, self.rates):
            if not scope.is_open(now):
                return scope
        return None
