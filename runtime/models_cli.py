"""``models``: how the deployments are, what a route would do, and whether they answer.

How a deployment is, is what some process found out by calling it and wrote into the database: looking asks nobody.
Only click is imported at the top, as in ``cli.py``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from ridethrough.runtime.options import FAILED, OK, Group, Options, put, say

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ridethrough.runtime.config import Config, Model
    from ridethrough.runtime.router.router import Router
    from ridethrough.runtime.store import Store
    from ridethrough.runtime.views import DeploymentView

REFRESH = 1.0
"""Seconds between two looks of ``--watch``."""

PINGS_AT_ONCE = 16

HEAD = (
    "NAME",
    "MODEL",
    "TIER",
    "STATE",
    "QUOTA",
    "BUSY",
    "FAILING",
    "FIRST TOKEN",
    "TOKENS/S",
    "OK/FAILED",
    "SEEN",
    "",
)


@click.group("models", cls=Group, invoke_without_command=True)
@click.option("--watch", is_flag=True, help="Go on showing them until interrupted.")
@click.pass_context
def models_group(context: click.Context, watch: bool) -> int:
    """Show every deployment's health: what the processes that called it found out."""
    if context.invoked_subcommand is not None:
        if watch:
            raise click.UsageError(f"--watch is not for `models {context.invoked_subcommand}`.")
        return OK
    options = context.find_object(Options) or Options()
    with _Look(options) as look:
        return _watch(look, options) if watch else _show(look, options)


def _show(look: _Look, options: Options) -> int:
    deployments = look.now()
    if options.json:
        put([each.model_dump(mode="json") for each in deployments])
    elif not deployments:
        say("No models are configured. `ridethrough init` writes an example.")
    else:
        from ridethrough.runtime.printing import table

        click.echo(table(HEAD, (_row(each, time.time()) for each in deployments)))
    return OK


class _Look:
    """The deployments of a configuration, with what the database says of them now (there may be none yet)."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._config: Config = options.load()
        self._store: Store | None = None

    def now(self) -> list[DeploymentView]:
        from ridethrough.runtime.errors import NotFound
        from ridethrough.runtime.views import list_deployments

        if self._store is None:
            try:
                self._store = self._options.store()
            except NotFound:
                return list_deployments(self._config, ())
        return list_deployments(self._config, self._store.read_now(self._store.deployments))

    def __enter__(self) -> _Look:
        return self

    def __exit__(self, *_: object) -> None:
        if self._store is not None:
            self._store.close()


# --- watching -------------------------------------------------------------------------------------------------------


def _watch(look: _Look, options: Options) -> int:
    """Show them until interrupted, which is the way to end it and no failure."""
    terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    try:
        if terminal and not options.json:
            _live(look)
        else:
            _lines(look, options)
    except KeyboardInterrupt:
        pass
    return OK


def _live(look: _Look) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    with Live(_board(look.now()), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.refresh()
            time.sleep(REFRESH)
            live.update(_board(look.now()))


def _board(deployments: Sequence[DeploymentView]) -> RenderableType:
    """The same table, cut at the terminal's edge: what matters most stands on the left."""
    from rich.console import Group
    from rich.text import Text

    from ridethrough.runtime.printing import table

    colours = {"open": "red", "half_open": "yellow", "ramping": "yellow", "unknown": "dim"}
    styles = ["dim", *(colours.get(each.state, "") for each in deployments)]
    lines = table(HEAD, (_row(each, time.time()) for each in deployments)).split("\n")
    return Group(
        *(Text(line, style, no_wrap=True, overflow="ellipsis") for line, style in zip(lines, styles, strict=True))
    )


def _lines(look: _Look, options: Options) -> None:
    """A line for each deployment at first, and then whenever something about it changes."""
    shown: dict[str, object] = {}
    while True:
        for each in look.now():
            told = each.model_dump(mode="json") if options.json else _line(each)
            if shown.get(each.name) == told:
                continue
            shown[each.name] = told
            put(told) if options.json else click.echo(f"{datetime.now().astimezone():%H:%M:%S} {told}")
        sys.stdout.flush()
        time.sleep(REFRESH)


def _line(each: DeploymentView) -> str:
    """What is worth a line when it changes; numbers that move all the time are not."""
    from ridethrough.runtime.printing import plain, shortened

    trouble = f": {each.verdict}: {shortened(each.detail, 120)}" if each.state != "closed" and each.detail else ""
    quota = f", quota {_quota(each, time.time())}" if _is_later(each.quota_until, time.time()) else ""
    return plain(f"{each.name}: {_state(each, time.time())}{quota}{trouble}")


# --- one deployment -------------------------------------------------------------------------------------------------


def _row(each: DeploymentView, now: float) -> tuple[str, ...]:
    from ridethrough.runtime.printing import plain, seconds, shortened

    return (
        plain(each.name),
        plain(f"{each.provider}/{each.model}"),
        each.tier or "-",
        _state(each, now),
        plain(_quota(each, now)),
        _busy(each),
        f"{each.error_rate:.0%}" if each.state in ("closed", "ramping") and (each.answered or each.failed) else "-",
        _first_token(each),
        "-" if each.tokens_per_second is None else f"{each.tokens_per_second:.0f}",
        f"{each.answered}/{each.failed}" if each.answered or each.failed else "-",
        "never" if each.at is None else f"{seconds(max(0.0, now - each.at.timestamp()))} ago",
        "" if each.verdict in ("ok", "unknown") else shortened(f"{each.verdict}: {each.detail}", 70),
    )


SHUT = {"quota": "no credit", "auth": "key refused"}
"""What a shut account is called: that says more than how its breaker stands."""


def _state(each: DeploymentView, now: float) -> str:
    from ridethrough.runtime.printing import when

    if each.quota_reason in SHUT and _is_later(each.quota_until, now):
        return f"{SHUT[each.quota_reason]}, until {when(each.quota_until)}"
    words = {"closed": "healthy", "half_open": "being tried", "ramping": "ramping", "unknown": "not called yet"}
    if each.state != "open":
        return words.get(each.state, each.state)
    until = f", until {when(each.until)}" if _is_later(each.until, now) else ", to be tried"
    return f"out since {when(each.since)}{until}"


def _quota(each: DeploymentView, now: float) -> str:
    from ridethrough.runtime.printing import when

    if not _is_later(each.quota_until, now):
        return each.quota or "-"
    why = f" ({each.quota_reason})" if each.quota_reason else ""
    return f"{each.quota or each.provider} used up until {when(each.quota_until)}{why}"


def _busy(each: DeploymentView) -> str:
    room = "" if each.limit is None else f" of {each.limit}"
    queue = f" +{each.waiting}" if each.waiting else ""
    return f"{each.in_flight}{room}{queue}"


def _first_token(each: DeploymentView) -> str:
    from ridethrough.runtime.printing import seconds

    known = [seconds(value) for value in (each.first_token_p50, each.first_token_p95) if value is not None]
    return " / ".join(known) or "-"


def _is_later(moment: datetime | None, now: float) -> bool:
    return moment is not None and moment.timestamp() > now


# --- explain --------------------------------------------------------------------------------------------------------


@models_group.command("explain")
@click.argument("route", metavar="ROUTE")
@click.pass_obj
def explain_command(options: Options, route: str) -> int:
    """Say whom a route asks, in which order, and what follows from each error. Nobody is called."""
    import anyio

    from ridethrough.runtime.router.router import Router

    async def explain(config: Config) -> dict[str, Any]:
        async with Router.open(config) as router:
            await router.look_up(route)
            return router.explain(route)

    with _Look(options) as look:
        known = {each.name: each for each in look.now()}
    explained = anyio.run(explain, options.load())
    for entry in explained["deployments"]:
        if (found := known.get(entry["name"])) is not None:
            entry.update(_as_found(found))
    if options.json:
        put(explained)
    else:
        click.echo("\n".join(_page(explained, known)))
    return OK


def _as_found(each: DeploymentView) -> dict[str, Any]:
    """What other processes know of a deployment, which the router of this one has never called."""
    keys = {"state", "since", "until", "quota", "quota_until", "quota_reason", "verdict"}
    return {**each.model_dump(mode="json", include=keys), "last": each.verdict}


def _page(explained: Mapping[str, Any], known: Mapping[str, DeploymentView]) -> Iterator[str]:
    from ridethrough.runtime.printing import plain, table

    yield plain(_settings(explained))
    head = ("", "DEPLOYMENT", "MODEL", "TIER", "WINDOW", "PRICE", "STATE", "")
    rows = [_candidate(number, entry, known) for number, entry in enumerate(explained["deployments"], 1)]
    yield "\n" + table(head, rows)
    if chain := explained.get("chain"):
        yield "\nin this order"
        yield from (f"  {number}. {plain(str(rung))}" for number, rung in enumerate(chain, 1))
    yield "\nafter an error"
    width = max(map(len, explained["errors"]), default=0)
    yield from (f"  {name.ljust(width)}  {plain(str(what))}" for name, what in explained["errors"].items())


def _settings(explained: Mapping[str, Any]) -> str:
    from ridethrough.runtime.printing import seconds

    parts = [f"{explained['route']}: {explained['strategy']}"]
    if floor := explained.get("floor"):
        parts.append(f"nothing below {floor}")
    if patience := explained.get("patience"):
        parts.append(f"waits in place up to {seconds(patience)}")
    if explained.get("hedge"):
        parts.append("a second attempt for unusually slow calls")
    if explained.get("cache", "off") != "off":
        parts.append(f"cache {explained['cache']}")
    return ", ".join([*parts, f"otherwise {', then '.join(explained['otherwise'])}"])


def _candidate(number: int, entry: Mapping[str, Any], known: Mapping[str, DeploymentView]) -> tuple[str, ...]:
    from ridethrough.runtime.printing import plain, tokens

    name, window = str(entry["name"]), entry.get("context_window")
    found = known.get(name)
    supports = entry.get("supports")
    remarks = [] if entry.get("eligible", True) else ["not asked: below the floor"]
    remarks += [] if supports is None else [f"only {', '.join(supports) or 'text'}"]
    return (
        f"{number}.",
        plain(name),
        plain(f"{entry['provider']}/{entry['model']}"),
        entry.get("tier") or "-",
        "-" if window is None else tokens(window),
        _price(entry.get("price")),
        "-" if found is None else _state(found, time.time()),
        "; ".join(remarks),
    )


def _price(price: Any) -> str:
    """Dollars per million tokens, in and out."""
    if not isinstance(price, Mapping):
        return "-" if price is None else str(price)
    return " / ".join(f"${price[kind]:g}" for kind in ("input", "output") if price.get(kind) is not None)


# --- ping -----------------------------------------------------------------------------------------------------------


@models_group.command("ping")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.pass_obj
def ping_command(options: Options, names: Sequence[str]) -> int:
    """Ask deployments one tiny question each, whatever their health; it costs a little. Status 1 if any fails."""
    import anyio

    config = options.load()
    wanted = _deployments(config, names)
    if not options.json:
        say(f"Asking {len(wanted)} of the models one tiny question each; it costs a little.")
    results = anyio.run(_ping_all, config, wanted)
    if options.json:
        put(results)
    else:
        click.echo(_ping_table(results))
    return OK if all(result["ok"] for result in results) else FAILED


def _deployments(config: Config, names: Sequence[str]) -> list[str]:
    from ridethrough.runtime.config import is_direct, nearest

    for name in names:
        if name not in config.models and not is_direct(config, name):
            raise click.UsageError(f"There is no model '{name}'{nearest(name, config.models)}")
    if not names and not config.models:
        raise click.UsageError("No models are configured. `ridethrough init` writes an example.")
    return list(dict.fromkeys(names)) or list(config.models)


async def _ping_all(config: Config, names: Sequence[str]) -> list[dict[str, Any]]:
    import anyio

    from ridethrough.runtime.router.router import Router

    results: dict[str, dict[str, Any]] = {}
    room = anyio.CapacityLimiter(PINGS_AT_ONCE)

    async def ping(router: Router, name: str) -> None:
        async with room:
            results[name] = await _ping(router, name)

    async with Router.open(config) as router:
        async with anyio.create_task_group() as tasks:
            for name in names:
                tasks.start_soon(ping, router, name)
    return [{**_named(config, name), **results[name]} for name in names]


async def _ping(router: Router, name: str) -> dict[str, Any]:
    """What came of it; a key that is not set is a verdict like any other."""
    from ridethrough.runtime.errors import Error

    try:
        record = await router.ping(name)
    except Error as error:
        return {**dict.fromkeys(_PING_FIELDS), "ok": False, "verdict": type(error).__name__, "detail": error.message}
    shown = {field: getattr(record, field) for field in _PING_FIELDS}
    at = datetime.fromtimestamp(record.started_at, UTC).isoformat().replace("+00:00", "Z")
    return {"ok": record.verdict == "ok", **shown, "started_at": at}


_PING_FIELDS = (
    "verdict", "phase", "status", "code", "seconds", "first_token_seconds", "tokens_per_second", "input_tokens",
    "output_tokens", "cost_usd", "request_id", "detail", "started_at",
)  # fmt: skip


def _named(config: Config, name: str) -> dict[str, Any]:
    provider, _, model = name.partition("/")
    found: Model | None = config.models.get(name)
    return {
        "name": name,
        "provider": found.provider if found else provider,
        "model": found.model if found else model,
    }


def _ping_table(results: Sequence[Mapping[str, Any]]) -> str:
    from ridethrough.runtime.printing import dollars, plain, seconds, shortened, table

    def row(result: Mapping[str, Any]) -> tuple[str, ...]:
        took, first, cost = (result[field] for field in ("seconds", "first_token_seconds", "cost_usd"))
        return (
            plain(str(result["name"])),
            plain(f"{result['provider']}/{result['model']}"),
            result["verdict"] + (f" ({result['phase']})" if result["phase"] else ""),
            "-" if took is None else seconds(took),
            "-" if first is None else seconds(first),
            "-" if took is None else "?" if cost is None else dollars(cost),
            shortened(result["detail"] or "", 160),
        )

    return table(("NAME", "MODEL", "VERDICT", "TIME", "FIRST TOKEN", "COST", ""), map(row, results))


COMMANDS: tuple[click.Command, ...] = (models_group,)
"""Joined into those of ``cli.py``."""
