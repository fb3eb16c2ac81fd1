"""The deployments of a configuration: built when they are first asked, with what they share.

Two deployments with the same ``quota`` share one rate limit, and all of one provider share its credential; so both
kinds of scope are made here, once a name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from random import Random

from ridethrough.runtime.config import Config, Model, Provider, Route, WireName, is_direct, nearest, resolve_secret
from ridethrough.runtime.errors import ConfigError, UsageError
from ridethrough.runtime.router import prices
from ridethrough.runtime.router.admission import Places, Scope
from ridethrough.runtime.router.deployment import Deployment
from ridethrough.runtime.router.errors import TABLE, Rule
from ridethrough.runtime.router.health import Health, State
from ridethrough.runtime.router.providers.wire import Wire
from ridethrough.runtime.router.transport import Connections

Changed = Callable[[Health, State, str], None]
Know = Callable[[str, WireName, str], None]


class Roster:
    """All deployments that were asked so far, by name."""

    def __init__(self, config: Config, table: tuple[Rule, ...], changed: Changed, know: Know, random: Random) -> None:
        """``changed`` is told of every change of a deployment's health, ``know`` of each provider's address."""
        self.config = config
        self.deployments: dict[str, Deployment] = {}
        self._table = table
        self._changed = changed
        self._know = know
        self._random = random
        self._prices = prices.PriceList()
        self._scopes: dict[str, Scope] = {}
        self._connections: dict[str, Connections] = {}
        self._opened: set[str] = set()
        self._simulated: dict[str, str] = {}
        self._stack: AsyncExitStack | None = None

    async def open(self, stack: AsyncExitStack) -> None:
        """Start the configuration's simulated providers; connections are opened when they are needed."""
        self._stack = stack
        for name, provider in self.config.providers.items():
            if provider.kind == "simulated":
                self._simulated[name] = provider.base_url or await self._start_simulated(stack, provider)

    def close(self) -> None:
        """Forget everything; the stack closes what was open."""
        self._stack = None
        self._connections.clear()
        self._opened.clear()
        self.deployments.clear()

    # --- names ------------------------------------------------------------------------------------------------------

    def route(self, name: str) -> Route:
        """Return the settings of a route; a single model has the defaults.

        Raises:
            ConfigError: There is no such route or model.
        """
        if name in self.config.routes:
            return self.config.routes[name]
        if name in self.config.models or is_direct(self.config, name):
            return Route(models=(name,))  # pyright: ignore[reportCallIssue]
        raise self._unknown(name)

    def _unknown(self, name: str) -> ConfigError:
        provider, slash, _ = name.partition("/")
        if slash:
            hint = f": there is no provider '{provider}'{nearest(provider, self.config.providers)}"
        else:
            hint = nearest(name, {*self.config.routes, *self.config.models})
        where = self.config.path or "the configuration (no ridethrough.toml was found)"
        return ConfigError(f"{where} has no route or model '{name}'{hint}")

    def model(self, name: str) -> Model:
        """Return the settings of a deployment; ``provider/model`` has the defaults."""
        if name in self.config.models:
            return self.config.models[name]
        provider, _, model = name.partition("/")
        return Model.model_validate({"provider": provider, "model": model})

    # --- deployments ------------------------------------------------------------------------------------------------

    async def of(self, route: Route) -> list[Deployment]:
        """Return the deployments of a route, each with its price and its context window.

        Raises:
            UsageError: The router is not open.
        """
        found = [self.deployment(name) for name in route.models]
        for deployment in found:
            if deployment.provider not in self._opened:
                await self._open_connections(deployment)
            if not deployment.looked_up:
                model, url = deployment.model.model, deployment.connections.base_url
                deployment.complete(await self._prices.find(model, url))
        return found

    def deployment(self, name: str) -> Deployment:
        """Return one deployment, as it is known so far."""
        if name not in self.deployments:
            self.deployments[name] = self._build(name, self.model(name))
        return self.deployments[name]

    def is_simulated(self, provider: str) -> bool:
        """Whether the provider is one of our own, which may be told who calls."""
        return provider in self._simulated

    def credentials(self, deployment: Deployment) -> tuple[dict[str, str], list[str]]:
        """Resolve the headers that hold secrets, at the time of the call: a rotated key is taken up at once.

        Raises:
            ConfigError: A variable is not set, or a file cannot be read.
        """
        provider = self.config.providers[deployment.provider]
        base = self.config.path.parent if self.config.path else None
        headers: dict[str, str] = {}
        secrets: list[str] = []
        if provider.api_key:
            secrets.append(resolve_secret(provider.api_key, base))
            headers.update(deployment.wire.authorize(secrets[0]))
        for name, value in provider.headers.items():
            if value.startswith(("env:", "file:")):
                value = resolve_secret(value, base)
                secrets.append(value)
            headers[name] = value
        return headers, secrets

    def _build(self, name: str, model: Model) -> Deployment:
        provider = self.config.providers[model.provider]
        wire = wire_for(model.provider, provider, self._table, self._simulated.get(model.provider))
        url = self._simulated.get(model.provider) or provider.base_url or wire.default_base_url
        self._know(model.provider, provider.speaks, url)
        simulated = model.provider in self._simulated
        rates = self._scope(f"quota {model.quota}" if model.quota else f"rate limit of {name}")
        limits = model.limits
        if limits is not None:
            rates.limit(limits)
        return Deployment(
            name,
            model.provider,
            model,
            wire,
            self._connect(model.provider, url),
            Health(name, model.timeouts, random=self._random, changed=self._changed),
            Places(limits.concurrency if limits is not None else None),
            rates,
            self._scope(f"credential of {model.provider}"),
            own_price=model.price or (prices.SIMULATED if simulated else None),
            default_price=self.config.default_price,
        )

    def _scope(self, name: str) -> Scope:
        return self._scopes.setdefault(name, Scope(name, self._random))

    def _connect(self, provider: str, url: str) -> Connections:
        if self._stack is None:
            raise UsageError("the router is not open: use it inside `async with Router.open(...) as router:`")
        if provider not in self._connections:
            self._connections[provider] = Connections(url)
        return self._connections[provider]

    async def _open_connections(self, deployment: Deployment) -> None:
        if self._stack is not None:
            self._opened.add(deployment.provider)  # first, so that two calls at once do not both do it
            await self._stack.enter_async_context(deployment.connections)

    async def _start_simulated(self, stack: AsyncExitStack, provider: Provider) -> str:
        from ridethrough.runtime.router.providers.simulated import Script, SimulatedProvider, load_script

        script = load_script(provider.script, self.config.locate) if provider.script else Script()
        ledger = self.config.locate(provider.ledger) if provider.ledger else None
        server = await stack.enter_async_context(SimulatedProvider(script, ledger=ledger, wire=provider.speaks))
        return server.base_url

    def siblings(self, deployment: Deployment, others: Iterable[Deployment]) -> list[Deployment]:
        """Return those of the others that are the same vendor's, with another credential."""
        own = self.config.providers[deployment.provider]
        return [
            other
            for other in others
            if other.provider != deployment.provider
            and self.config.providers[other.provider].kind == own.kind
            and other.connections.base_url == deployment.connections.base_url
        ]


def wire_for(name: str, provider: Provider, table: tuple[Rule, ...] = TABLE, url: str | None = None) -> Wire:
    """Make the wire that a provider speaks; each is imported when it is first needed."""
    match provider.speaks:
        case "anthropic":
            from ridethrough.runtime.router.providers.anthropic import AnthropicMessages

            return AnthropicMessages(name, table=table)
        case "gemini":
            from ridethrough.runtime.router.providers.gemini import GeminiGenerate

            return GeminiGenerate(name, table=table)
        case "openai-responses":
            from ridethrough.runtime.router.providers import openai_responses

            known = openai_responses.quirks_of(url or provider.base_url or "")
            return openai_responses.OpenAIResponses(name, quirks=known, table=table)
        case _:
            from ridethrough.runtime.router.providers.openai_chat import OpenAIChat, quirks_of

            quirks = quirks_of(url or provider.base_url or "https://api.openai.com/v1", provider.dialect)
            return OpenAIChat(name, quirks=quirks, table=table)
