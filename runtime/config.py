"""``ridethrough.toml``: read once, checked in full, and refused with the line where it is wrong.

A misspelt key that is silently ignored costs a night: the limit that was never there. So every key is checked, and a
key of the contract whose feature this version does not have is refused too, unless it holds its default. Secrets are
never in the file: ``env:NAME`` and ``file:PATH`` refer to them and are resolved when a call needs them.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ridethrough.runtime.errors import ConfigError

Tier = Literal["frontier", "standard", "small", "local"]
ProviderKind = Literal["openai", "openai-responses", "anthropic", "gemini", "simulated"]
Capability = Literal["tools", "images", "structured"]
WireName = Literal["openai", "openai-responses", "anthropic", "gemini"]
Scope = Annotated[str, Field(pattern=r"^(total|tenant|workflow|agent|run|label:.+)$")]

DEFAULT_FILE = "ridethrough.toml"
ENVIRONMENT = "RIDETHROUGH_CONFIG"

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(value: object) -> object:
    """Turn ``"500ms"``, ``"20s"``, ``"5m"``, ``"1h"`` or ``"2d"`` into seconds; numbers pass as they are."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)\s*", value)
    if match is None:
        raise ValueError('not a duration: write a number of seconds, or text such as "500ms", "20s", "5m", "1h"')
    return float(match[1]) * _UNITS[match[2]]


def _check_reference(value: str) -> str:
    if not re.match(r"(env|file):.", value):
        raise ValueError('a secret must not be written here: use "env:NAME" or "file:PATH"')
    return value


def _check_pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return value


Duration = Annotated[float, BeforeValidator(parse_duration), Field(ge=0)]
SecretRef = Annotated[str, AfterValidator(_check_reference)]
Size = Annotated[str, Field(pattern=r"^\s*\d+(\.\d+)?\s*[kKmMgG]?([iI]?[bB])?\s*$")]


class _Table(BaseModel):
    """What all tables share: frozen, no unknown keys, and no input values in error texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, protected_namespaces=())


class Timeouts(_Table):
    """Deadlines of one attempt, in seconds. ``first_token`` and ``idle`` need the streaming wire.

    They are ceilings: a model that normally is much faster is noticed sooner. ``tokens_per_second`` is the least rate
    that is put up with; without it only what the model normally does counts.
    """

    connect: float = Field(default=5.0, gt=0)
    first_token: float = Field(default=20.0, gt=0)
    idle: float = Field(default=20.0, gt=0)
    total: float = Field(default=300.0, gt=0)
    tokens_per_second: float | None = Field(None, gt=0)


class Price(_Table):
    """USD per million tokens.

    ``cached_input`` is that of input tokens read from the provider's prompt cache, ``cache_write`` that of tokens
    written to it; each is ``input`` when left out.
    """

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    cached_input: float | None = Field(None, ge=0)
    cache_write: float | None = Field(None, ge=0)

    def cost(self, input_tokens: int, output_tokens: int, cached_tokens: int = 0, cache_write_tokens: int = 0) -> float:
        """Return the USD of a call; ``input_tokens`` include the cached and the cache-written ones."""
        cached = min(cached_tokens, input_tokens)
        written = min(cache_write_tokens, input_tokens - cached)
        plain = (input_tokens - cached - written) * self.input
        read = cached * (self.input if self.cached_input is None else self.cached_input)
        write = written * (self.input if self.cache_write is None else self.cache_write)
        return (plain + read + write + output_tokens * self.output) / 1e6


class RateLimits(_Table):
    """What a deployment is allowed: requests and tokens a minute, and calls at once."""

    rpm: int | None = Field(None, gt=0)
    tpm: int | None = Field(None, gt=0)
    concurrency: int | None = Field(None, gt=0)


class Provider(_Table):
    """``[providers.NAME]``: a server and a credential.

    ``headers`` are sent with every call; a value may be ``env:NAME`` or ``file:PATH``. ``dialect`` names the quirks of
    an OpenAI-compatible server where its host name does not tell (``vllm``, ``ollama``, ...). The keys ``script`` (a
    Python file, ``module:attribute``, or a scenario in TOML or JSON), ``ledger`` (a file that gets a line for every
    call) and ``wire`` (what it speaks, ``openai`` when left out) are for ``kind = "simulated"``, which starts the
    project's own provider on loopback, or with ``base_url`` asks one that another process serves. Relative paths start
    at the configuration's folder.
    """

    kind: ProviderKind
    base_url: str | None = None
    api_key: SecretRef | None = Field(None, repr=False)
    headers: dict[str, str] = Field(default_factory=dict, repr=False)
    dialect: str | None = None
    script: str | None = None
    ledger: str | None = None
    wire: WireName | None = None

    @property
    def speaks(self) -> WireName:
        """The wire that the provider's server speaks."""
        return (self.wire or "openai") if self.kind == "simulated" else self.kind


class Model(_Table):
    """``[models.NAME]``: a deployment, that is one model at one provider.

    ``context_window`` is in tokens. ``supports`` is what the model can do besides text (everything, when left out):
    requests that need more are not sent to it. ``weight`` is its share in routes of strategy ``weighted``.
    """

    provider: str
    model: str
    tier: Tier | None = None
    context_window: int | None = Field(None, gt=0)
    stream: bool = True
    quota: str | None = None
    limits: RateLimits | None = None
    timeouts: Timeouts = Timeouts()  # pyright: ignore[reportCallIssue]
    price: Price | None = None
    supports: tuple[Capability, ...] | None = None
    weight: float | None = Field(None, gt=0)


class Route(_Table):
    """``[routes.NAME]``: deployments in order of preference, and what to do when none answers.

    ``patience`` (seconds, or text such as ``"20s"``) is how long a call waits in place before the last rung of
    ``otherwise``. ``static`` is the text of the rung of that name. ``failover`` names errors after which another
    provider is asked although by default none is: a wrong credential, a content filter, a request that was refused.
    ``queue`` is how many calls may wait for a place; beyond it the lowest priority is turned away. ``cache_ttl`` is how
    long an exact answer may be used again (a stale one still serves the rung ``cache``).
    """

    models: tuple[str, ...] = Field(min_length=1)
    strategy: Literal["ordered", "fastest", "cheapest", "weighted"] = "ordered"
    floor: Tier | None = None
    otherwise: tuple[Literal["cache", "static", "pause", "fail"], ...] = Field(("pause",), min_length=1)
    patience: Duration = 0.0
    hedge: bool = False
    cache: Literal["off", "exact"] = "off"
    cache_ttl: Duration | None = None
    static: str | None = None
    failover: tuple[Literal["auth", "content_filter", "invalid_request"], ...] = ()
    queue: int = Field(default=1000, gt=0)


class Budget(_Table):
    """``[[budgets]]``: a cap on money."""

    scope: Scope
    usd: float = Field(gt=0)
    per: Literal["run", "hour", "day", "month"]
    on_exceeded: Literal["pause", "fail", "degrade"] = "pause"


class ErrorRule(_Table):
    """``[[errors]]``: what an error of a server means that the built-in table does not know, or reads otherwise.

    ``error`` is a class of the taxonomy. All conditions that are given must hold: one of ``names`` (codes, types and
    statuses in the body) is there, the HTTP status is one of ``status``, ``words`` (a regular expression, case does not
    matter) is found in the message.
    """

    error: Literal[
        "RateLimited",
        "QuotaExhausted",
        "Overloaded",
        "ServerError",
        "ContextLength",
        "ContentFilter",
        "InvalidRequest",
        "Auth",
    ]
    names: tuple[str, ...] = ()
    status: tuple[Annotated[int, Field(ge=100, le=599)], ...] = ()
    words: Annotated[str, AfterValidator(_check_pattern)] | None = None

    @model_validator(mode="after")
    def _says_when(self) -> ErrorRule:
        if not (self.names or self.status or self.words):
            raise ValueError("a rule without a condition would be about every error: give names, status or words")
        return self


class SandboxConfig(_Table):
    """``[sandboxes.NAME]``: a profile; ``ridethrough.sandboxes.profile.SandboxProfile`` explains the keys.

    Sizes are texts such as ``"512m"``. ``inject`` holds references to secrets, resolved by the host when its proxy
    starts. ``warm`` is how many sandboxes are kept ready while the profile is in use.
    """

    kind: Literal["docker", "local"] = "docker"
    image: str = "ridethrough/python:latest"
    memory: Size = "512m"
    cpus: float = Field(default=1.0, gt=0)
    pids: int = Field(default=128, gt=0)
    disk: Size = "256m"
    network: Literal["none"] | tuple[str, ...] = "none"
    private_hosts: tuple[str, ...] = ()
    inject: dict[str, dict[str, str]] = Field(default_factory=dict[str, dict[str, str]])
    runtime: Literal["auto", "runc", "runsc"] = "auto"
    env: dict[str, str] = Field(default_factory=dict[str, str])
    desktop: bool = False
    warm: int = Field(default=1, ge=0)
    snapshot_limit: Size = "64m"


class Config(_Table):
    """The whole configuration. ``path`` is the file it came from, ``None`` when there was none."""

    path: Path | None = None
    database: str | None = None
    durability: Literal["power", "process"] = "power"
    lease_seconds: float = Field(default=5.0, gt=0)
    reaper_seconds: float = Field(default=15.0, gt=0)
    sandbox_lease_seconds: float = Field(default=600.0, gt=0)
    """How long the sandbox of an unfinished run is kept for the worker that takes the run up."""
    sandbox_pause_seconds: float = Field(default=60.0, gt=0)
    """How long the sandbox of a parked run is kept frozen before its workspace is archived and it is removed."""
    allow_local: bool = False
    """Whether what a model wrote may run on this machine without a boundary."""
    default_price: Price | None = None
    """What a model costs whose price is not known; without it a call that a budget covers is refused."""
    embeddings: str | None = None
    providers: dict[str, Provider] = Field(default_factory=dict[str, Provider])
    models: dict[str, Model] = Field(default_factory=dict[str, Model])
    routes: dict[str, Route] = Field(default_factory=dict[str, Route])
    budgets: tuple[Budget, ...] = ()
    errors: tuple[ErrorRule, ...] = ()
    sandboxes: dict[str, SandboxConfig] = Field(default_factory=dict[str, SandboxConfig])

    def locate(self, name: str) -> Path:
        """Return the path that the file means by ``name``: relative ones start at its folder."""
        return (self.path.parent if self.path else Path.cwd()) / Path(name).expanduser()


# --- loading --------------------------------------------------------------------------------------------------------


def load_config(path: Path | str | None = None) -> Config:
    """Read ``path``, else the file of ``RIDETHROUGH_CONFIG``, else ``./ridethrough.toml``, else give the defaults.

    Raises:
        ConfigError: The file is missing (when named), is not TOML, or says something that cannot be used.
    """
    found = _find(path)
    if found is None:
        return Config()  # pyright: ignore[reportCallIssue]
    try:
        text = found.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {found} cannot be read ({error}): mend it or name another") from None
    return parse_config(text, found)


def parse_config(text: str, path: Path | None = None) -> Config:
    """Parse the text of a configuration; ``path`` is for messages and relative paths.

    Raises:
        ConfigError: As for ``load_config``.
    """
    source = _Source(text, path)
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source.name} is not valid TOML: {error}") from None
    if "path" in raw:
        raise source.unknown(("path",), _keys_of(Config) - {"path"})
    try:
        config = Config.model_validate({**raw, "path": path})
    except ValidationError as error:
        raise _explain(source, error) from None
    _check_references(config, source)
    _check_supported(config, source)
    return config


def resolve_secret(ref: str, base: Path | None = None) -> str:
    """Return the secret that ``env:NAME`` or ``file:PATH`` refers to; ``base`` is where relative paths start.

    Raises:
        ConfigError: The variable is not set, or the file cannot be read.
    """
    kind, _, name = ref.partition(":")
    if kind == "env":
        return _from_environment(name)
    if kind == "file":
        return _from_file((base or Path.cwd()) / Path(name).expanduser())
    raise ConfigError('a secret must be given as "env:NAME" or "file:PATH", never as the value itself')


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint at the end of a message: the nearest valid name, or all of them when none is near."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; there are: {', '.join(names)}" if names else "; there are none"


def _find(path: Path | str | None) -> Path | None:
    named = path or os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    default = Path(DEFAULT_FILE)
    return default if default.exists() else None


def _from_environment(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise ConfigError(f"the environment variable {name} is not set: set it, or change the reference env:{name}")
    return value


def _from_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the secret's file {path} cannot be read: {type(error).__name__}") from None


# --- where it is wrong ----------------------------------------------------------------------------------------------

_Location = tuple[str | int, ...]
_KEY = re.compile(r"""\s*((?:"[^"]*"|'[^']*'|[\w-]+)(?:\s*\.\s*(?:"[^"]*"|'[^']*'|[\w-]+))*)\s*=""")
_HEADER = re.compile(r"\s*(\[\[?)([^\[\]]+)\]\]?")
_PART = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([\w-]+))\s*\.?""")


class _Source:
    """The text of a file, and where in it a key stands."""

    def __init__(self, text: str, path: Path | None) -> None:
        self.name = str(path) if path else "the configuration"
        self._lines = list(_key_lines(text))

    def at(self, location: _Location) -> str:
        """Return ``file:line`` of the key, of the first one below it, or of the nearest one around it."""
        best, line = 0, 0
        for key, number in self._lines:
            shared = min(len(key), len(location))
            if shared > best and key[:shared] == location[:shared]:
                best, line = shared, number
        return f"{self.name}:{line}" if line else self.name

    def error(self, location: _Location, what: str) -> ConfigError:
        """Build an error about the value at ``location``."""
        return ConfigError(f"{self.at(location)}: {_dotted(location)}: {what}")

    def unknown(self, location: _Location, valid: Iterable[str]) -> ConfigError:
        """Build an error about a key that does not exist."""
        return ConfigError(f"{self.at(location)}: unknown key '{_dotted(location)}'{nearest(str(location[-1]), valid)}")


def _key_lines(text: str) -> Iterator[tuple[_Location, int]]:
    table: _Location = ()
    counts: dict[_Location, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = _split(header[2])
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, counts[table])
            yield table, number
        elif key := _KEY.match(line):
            yield (*table, *_split(key[1])), number


def _split(dotted: str) -> _Location:
    return tuple(double or single or bare for double, single, bare in _PART.findall(dotted))


def _dotted(location: _Location) -> str:
    return ".".join(str(part) for part in location)


def _explain(source: _Source, error: ValidationError) -> ConfigError:
    """Build one error of the first thing that is wrong, and say how many there are."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")  # a misspelt key makes others seem missing
    first = _problem(source, problems[0])
    if len(problems) > 1:
        return ConfigError(f"{first.message} (and {len(problems) - 1} more)")
    return first


def _problem(source: _Source, problem: ErrorDetails) -> ConfigError:
    location = _without_union_tags(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return source.unknown(location, _valid_at(location[:-1]))
    if problem["type"] == "missing":
        return source.error(location[:-1], f"the key '{location[-1]}' is missing")
    return source.error(location, problem["msg"].removeprefix("Value error, "))


def _without_union_tags(location: _Location) -> _Location:
    return tuple(part for part in location if not (isinstance(part, str) and re.match(r"(literal|tuple)\[", part)))


def _keys_of(model: type[BaseModel]) -> set[str]:
    return set(model.model_fields)


def _valid_at(location: _Location) -> set[str]:
    """Return the keys that the table at ``location`` may have."""
    model: type[BaseModel] = Config
    for part in location:
        field = model.model_fields.get(str(part))
        inner = _table_in(field.annotation) if field else None
        model = inner or model
    return _keys_of(model) - {"path"}


def _table_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _table_in(part))), None)


# --- what refers to what, and what is not there yet -----------------------------------------------------------------

_T = TypeVar("_T")


def _check_references(config: Config, source: _Source) -> None:
    for name, model in config.models.items():
        _known(source, ("models", name, "provider"), "provider", model.provider, config.providers)
    for name, route in config.routes.items():
        for model_name in route.models:
            if not is_direct(config, model_name):
                _known(source, ("routes", name, "models"), "model", model_name, config.models)
        _check_route(source, config, name, route)
    _check_weights(source, config)
    for name, provider in config.providers.items():
        _check_provider(source, name, provider)
        _check_base_url(source, name, provider)
        _check_headers(source, name, provider)


def is_direct(config: Config, name: str) -> bool:
    """Whether ``name`` is a ``provider/model`` of a provider that the configuration has."""
    provider, slash, model = name.partition("/")
    return bool(slash and model) and name not in config.models and provider in config.providers


def _known(source: _Source, location: _Location, what: str, name: str, valid: Mapping[str, _T]) -> None:
    if name not in valid:
        raise source.error(location, f"there is no {what} '{name}'{nearest(name, valid)}")


def _check_provider(source: _Source, name: str, provider: Provider) -> None:
    here: _Location = ("providers", name)
    wrong = ["api_key"] if provider.kind == "simulated" else ["script", "ledger", "wire"]
    if provider.kind == "simulated" and provider.base_url is not None:
        wrong += ["script", "ledger"]
    if provider.kind != "openai":
        wrong.append("dialect")
    for key in wrong:
        if getattr(provider, key) is not None:
            raise source.error((*here, key), f"the key has no effect with kind '{provider.kind}': remove it")
    if provider.dialect is not None:
        from ridethrough.runtime.router.providers.dialects import DIALECTS

        _known(source, (*here, "dialect"), "dialect", provider.dialect, DIALECTS)


def _check_base_url(source: _Source, name: str, provider: Provider) -> None:
    if provider.base_url is not None:
        from ridethrough.runtime.router.address import parsed

        try:
            parsed(provider.base_url)
        except ConfigError as error:
            raise source.error(("providers", name, "base_url"), error.message) from None


def _check_headers(source: _Source, name: str, provider: Provider) -> None:
    """Refuse credentials that are written out: a header is where the next one would hide."""
    for header, value in provider.headers.items():
        if re.search(r"authorization|key|token|secret|cookie", header, re.I) and not re.match(r"(env|file):.", value):
            what = 'a secret must not be written here: use "env:NAME" or "file:PATH"'
            raise source.error(("providers", name, "headers", header), what)


def _check_route(source: _Source, config: Config, name: str, route: Route) -> None:
    """Refuse what would have no effect, and rungs and floors that nobody could stand on."""
    here: _Location = ("routes", name)
    if ("static" in route.otherwise) != (route.static is not None):
        if route.static is None:
            raise source.error((*here, "otherwise"), "'static' needs the answer's text: set the key 'static' too")
        raise source.error((*here, "static"), "the key has no effect: put \"static\" into 'otherwise', or remove it")
    if route.cache_ttl is not None and route.cache == "off":
        raise source.error((*here, "cache_ttl"), 'the key has no effect with cache = "off": remove it')
    if route.hedge and len(route.models) < 2:
        raise source.error((*here, "hedge"), "the key has no effect with one model: name a second one, or remove it")
    for rung in ("pause", "fail"):
        if rung in route.otherwise[:-1]:
            raise source.error((*here, "otherwise"), f"'{rung}' has to be the last: nothing comes after it")
    if route.floor is not None:
        _check_floor(source, config, (*here, "floor"), route)


def _check_floor(source: _Source, config: Config, here: _Location, route: Route) -> None:
    tiers = {model: config.models[model].tier if model in config.models else None for model in route.models}
    for model, tier in tiers.items():
        if tier is None:
            what = f"a floor needs to know how capable '{model}' is: set 'tier' in [models.{model}]"
            raise source.error(here, what)
    if not any(at_least(tier, route.floor) for tier in tiers.values()):
        raise source.error(here, "no model of the route is that capable: lower the floor, or add one")


TIERS: tuple[Tier, ...] = get_args(Tier)
"""From the most to the least capable."""


def at_least(tier: str | None, floor: str | None) -> bool:
    """Whether ``tier`` reaches ``floor``; an unknown tier reaches none."""
    if floor is None:
        return True
    order: tuple[str, ...] = TIERS
    return tier in order and floor in order and order.index(tier) <= order.index(floor)


def _check_weights(source: _Source, config: Config) -> None:
    weighted = {model for route in config.routes.values() if route.strategy == "weighted" for model in route.models}
    for name, model in config.models.items():
        if model.weight is not None and name not in weighted:
            raise source.error(("models", name, "weight"), "the key has no effect: no weighted route has this model")


def _not_yet(what: str, instead: str = "remove the key, or leave it at its default") -> str:
    return f"this version does not support {what} yet: {instead}"


def _check_supported(config: Config, source: _Source) -> None:
    _refuse(source, config, (), {"embeddings": None})


def _refuse(source: _Source, table: BaseModel, here: _Location, defaults: Mapping[str, object]) -> None:
    for key, default in defaults.items():
        if getattr(table, key) != default:
            raise source.error((*here, key), _not_yet(f"'{key}'"))
