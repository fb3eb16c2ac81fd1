"""What the configuration needs, looked at in earnest: each finding says what is wrong and how to mend it."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy.exc import DBAPIError

from ridethrough.runtime.config import Config, Provider, load_config, resolve_secret
from ridethrough.runtime.errors import (
    Auth,
    ConfigError,
    Error,
    InvalidRequest,
    ModelError,
    QuotaExhausted,
    RateLimited,
)
from ridethrough.runtime.housekeeping import inspect_store
from ridethrough.runtime.printing import plain
from ridethrough.runtime.store import Store

if TYPE_CHECKING:
    from ridethrough.runtime.options import Options

OLDEST_PYTHON = (3, 11)
LITTLE_SPACE = 200 * 2**20
"""Bytes: with less, a night of runs may fill the disk."""

PROVIDER_SECONDS = 10.0

Status = Literal["ok", "doubtful", "wrong"]

Examiner = Callable[[Config], Iterable[tuple[str, Status, str, str]]]
"""What another folder looks at; each tuple has the fields of a ``Finding``."""


@dataclass(frozen=True)
class Finding:
    """One check and what came of it."""

    name: str
    status: Status
    detail: str
    mend: str = ""

    def line(self) -> str:
        """For people."""
        mark = {"ok": "ok   ", "doubtful": "?    ", "wrong": "WRONG"}[self.status]
        return plain(f"{mark}  {self.name}: {self.detail}") + (f"\n         -> {plain(self.mend)}" if self.mend else "")

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"name": self.name, "status": self.status, "detail": self.detail, "mend": self.mend or None}


def examine(options: Options, *, offline: bool, others: Sequence[Examiner] = ()) -> list[Finding]:
    """Check everything; ``offline`` leaves the providers alone, ``others`` look at what this folder does not know."""
    findings = [_python()]
    try:
        config = load_config(options.config)
    except ConfigError as error:
        findings.append(Finding("configuration", "wrong", error.message, "mend the line and ask again"))
        return findings
    findings.append(_configuration(config))
    findings += _database(options.database(config), config)
    findings += [Finding(*fields) for look in others for fields in look(config)]
    for name, provider in config.providers.items():
        findings += _provider(config, name, provider, offline)
    return findings


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Finding("Python", "wrong", version, "install Python 3.11 or newer")
    return Finding("Python", "ok", version)


def _configuration(config: Config) -> Finding:
    if config.path is None:
        mend = "write one with `ridethrough init`, or name it with --config; agents need a route"
        return Finding("configuration", "doubtful", "there is no ridethrough.toml here", mend)
    count = f"{len(config.providers)} providers, {len(config.models)} models, {len(config.routes)} routes"
    return Finding("configuration", "ok", f"{config.path}: {count}")


# --- the database ---------------------------------------------------------------------------------------------------


def _database(url: str, config: Config) -> Iterator[Finding]:
    try:
        store = Store(url, config.durability)
    except ConfigError as error:
        yield Finding("database", "wrong", error.message, "mend `database` in the configuration, or --db")
        return
    path = store.database.path
    yield _space(store)
    if not path.exists():
        yield _absent(store)
        return
    try:
        yield _usable(store)
    except DBAPIError as error:
        yield Finding("database", "wrong", store.database.translate(error).message)
    except Error as error:
        yield Finding("database", "wrong", error.message)
    finally:
        store.close()


def _absent(store: Store) -> Finding:
    folder = store.database.path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Finding(
            "database", "wrong", f"{folder} is no folder that this user may write to", "make it, or use --db"
        )
    return Finding("database", "ok", f"{store.database.display} is not there yet; the first run makes it")


def _usable(store: Store) -> Finding:
    """Whether it is of this version, can be written, and is sound."""
    store.prepare()
    with store.writer.begin():
        pass  # takes the write lock and gives it back
    problems = inspect_store(store)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Finding("database", "wrong", problems[0] + more, "stop all workers and restore a backup")
    size = store.database.size() / 1e6
    return Finding("database", "ok", f"{store.database.display}: schema {store.version()}, {size:.1f} MB, sound")


def _space(store: Store) -> Finding:
    folder = store.database.path.absolute().parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("disk", "wrong", f"{folder}: {error.strerror}", "make the folder, or name another with --db")
    detail = f"{free / 1e9:.1f} GB free for the database"
    if free < LITTLE_SPACE:
        return Finding("disk", "doubtful", detail, "make room: `ridethrough db gc --older-than 30d`")
    return Finding("disk", "ok", detail)


# --- providers ------------------------------------------------------------------------------------------------------


def _provider(config: Config, name: str, provider: Provider, offline: bool) -> Iterator[Finding]:
    what = f"provider {name}"
    if provider.kind == "simulated":
        yield _script(config, what, provider)
        return
    try:
        question = _question(config, name, provider)
    except ConfigError as error:
        yield Finding(what, "wrong", error.message)
        return
    if offline:
        yield Finding(what, "ok", "its secrets are there; not asked (--offline)")
        return
    yield _ask(what, question)


def _script(config: Config, what: str, provider: Provider) -> Finding:
    """The simulated kind is started with the runtime; only its script can be wrong."""
    from ridethrough.runtime.router.providers.simulated import load_script

    if provider.script is None:
        return Finding(what, "ok", "simulated, without a script")
    try:
        load_script(provider.script, config.locate)
    except ConfigError as error:
        return Finding(what, "wrong", error.message)
    return Finding(what, "ok", f"simulated by {provider.script}")


def _question(config: Config, name: str, provider: Provider) -> _Question:
    """A cheap question that costs no tokens: which models are there?

    Raises:
        ConfigError: a secret is missing, or there is no such dialect.
    """
    from ridethrough.runtime.router.roster import wire_for

    wire = wire_for(name, provider)
    base = config.path.parent if config.path else None
    headers = {} if provider.api_key is None else wire.authorize(resolve_secret(provider.api_key, base))
    for header, value in provider.headers.items():
        headers[header] = resolve_secret(value, base) if value.startswith(("env:", "file:")) else value
    return _Question((provider.base_url or wire.default_base_url).rstrip("/"), wire.models_path, headers)


@dataclass(frozen=True)
class _Question:
    """What is asked, and where; the headers have their secrets."""

    base_url: str = field(repr=False)
    path: str
    headers: Mapping[str, str] = field(repr=False)

    @property
    def url(self) -> str:
        """For people: without the name and password that it may hold."""
        return re.sub(r"//[^/]*@", "//", f"{self.base_url}/{self.path}")


def _ask(what: str, question: _Question) -> Finding:
    """Ask as calls are made: through the same proxy, with the same certificates."""
    import anyio

    try:
        return _verdict(what, question.url, *anyio.run(_get, what, question))
    except ModelError as error:
        mend = "check base_url, the network and its proxy; is the server running?"
        return Finding(what, "wrong", f"{question.url} cannot be reached: {error.message}", mend)


async def _get(what: str, question: _Question) -> tuple[int, str, Mapping[str, str]]:
    import anyio

    from ridethrough.runtime.router.transport import Connections, Deadline

    until = Deadline(anyio.current_time() + PROVIDER_SECONDS, "total")
    async with Connections(question.base_url) as connections:
        async with connections.get(
            question.path, question.headers, connect=PROVIDER_SECONDS, deadline=until, deployment=what
        ) as reply:
            return reply.status, (await reply.body(until)).decode("utf-8", "replace"), reply.headers


def _verdict(what: str, url: str, status: int, body: str, headers: Mapping[str, str]) -> Finding:
    """What an answer means; its text is not shown, since it may quote the credential."""
    from ridethrough.runtime.router.errors import classify

    if status < 300:
        return Finding(what, "ok", f"{url} answers {status}")
    if status < 400:
        mend = "name the address that it points to as base_url: calls are not redirected"
        return Finding(what, "doubtful", f"{url} points elsewhere ({status})", mend)
    match classify(status, body, headers):
        case Auth():
            mend = "check `api_key` and what it refers to"
            return Finding(what, "wrong", f"{url} refuses the credential ({status})", mend)
        case QuotaExhausted():
            mend = "add credit, or raise the account's limit"
            return Finding(what, "wrong", f"{url} says that the account is out of credit ({status})", mend)
        case RateLimited():
            mend = "wait, or check the account's quota"
            return Finding(what, "doubtful", f"{url} limits the rate ({status})", mend)
        case InvalidRequest():
            mend = (
                "not all servers list their models; if calls fail, check base_url: "
                "it ends in /v1 for OpenAI's kinds, and without a version for anthropic and gemini"
            )
            return Finding(what, "doubtful", f"{url} answers {status}", mend)
        case _:
            return Finding(what, "doubtful", f"{url} answers {status}: the provider is unwell", "try again later")
