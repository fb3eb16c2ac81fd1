"""What all commands share: their options, exit statuses, and how they read and write.

Apart from ``cli.py`` so that what the commands call can name it too. Only click is imported at the top.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ridethrough.runtime.config import Config
    from ridethrough.runtime.store import Store

OK, FAILED, USAGE, PARKED, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit status: success; the run failed; bad usage or configuration; the run is parked; interrupted and saved."""

DEFAULT_DATABASE = "sqlite:///ridethrough.db"


@dataclass(frozen=True)
class Options:
    """The options that every command takes, before or after its name."""

    config: str | None = None
    db: str | None = None
    json: bool = False

    def load(self) -> Config:
        """The configuration, with the database in it.

        Raises:
            ConfigError: it cannot be used.
        """
        from ridethrough.runtime.config import load_config

        config = load_config(self.config)
        return config.model_copy(update={"database": self.database(config)})

    def database(self, config: Config) -> str:
        """The database's URL; ``--db`` may also be a path."""
        if self.db is not None:
            return self.db if "://" in self.db else f"sqlite:///{self.db}"
        return config.database or DEFAULT_DATABASE

    def store(self) -> Store:
        """The database as it is.

        Raises:
            NotFound: there is none; looking at runs must not make an empty one where the path was misspelt.
            StoreError: it cannot be used.
        """
        from ridethrough.runtime.errors import NotFound
        from ridethrough.runtime.store import Store

        config = self.load()
        store = Store(config.database or DEFAULT_DATABASE, config.durability)
        if not store.database.path.exists():
            raise NotFound(
                f"There is no database {store.database.display}. Name another with --db, or start a first run: "
                f"{self.command('run', 'MODULE:WORKFLOW')}"
            )
        store.prepare()
        return store

    def command(self, *words: str) -> str:
        """A command for people to type, with the options of this one that lead to the same database."""
        options = [part for name in ("config", "db") if (value := getattr(self, name)) for part in (f"--{name}", value)]
        return shlex.join(["ridethrough", *words, *options])


def _common_options() -> list[click.Parameter]:
    return [
        click.Option(["--config"], metavar="FILE", help="The configuration; ./ridethrough.toml when left out."),
        click.Option(["--db"], metavar="URL|PATH", help="The database; the configuration's when left out."),
        click.Option(["--json"], is_flag=True, default=None, help="JSON on standard output and nothing else there."),
    ]


def _take_options(ctx: click.Context) -> None:
    """Move the common options from the command's parameters to the context; the innermost that is given counts."""
    given = {name: value for name in ("config", "db", "json") if (value := ctx.params.pop(name, None)) is not None}
    ctx.obj = replace(ctx.find_object(Options) or Options(), **given)


class Command(click.Command):
    """A command with the common options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As ``click.Command``."""
        super().__init__(*args, **kwargs)
        self.params += _common_options()

    def invoke(self, ctx: click.Context) -> Any:
        """Call the function; it gets ``Options`` through ``click.pass_obj``."""
        _take_options(ctx)
        return super().invoke(ctx)


class Group(click.Group):
    """A group with the common options, whose commands have them too."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As ``click.Group``."""
        super().__init__(*args, **kwargs)
        self.params += _common_options()

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they were added: what is needed first comes first."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Keep the common options for the commands, and help on a bare call."""
        _take_options(ctx)
        return super().invoke(ctx)


def say(text: str) -> None:
    """Tell people something, apart from the result on standard output."""
    click.echo(text, err=True)


def put(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False))


def parse_json(text: str, option: str) -> Any:
    """JSON from the command line, ``@FILE`` or ``@-`` (standard input).

    Raises:
        click.BadParameter: it is none; the message shows how a text is quoted.
    """
    source = text
    if text.startswith("@"):
        try:
            source = sys.stdin.read() if text == "@-" else Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise click.BadParameter(f"{text[1:]} cannot be read: {error}", param_hint=option) from None
    try:
        return json.loads(source)
    except ValueError as error:
        if source is not text:
            raise click.BadParameter(f"{text[1:]} is not JSON: {error}", param_hint=option) from None
        quoted = shlex.quote(json.dumps(text, ensure_ascii=False))
        raise click.BadParameter(
            f"{text!r} is not JSON ({error}). A text is written {quoted}", param_hint=option
        ) from None
