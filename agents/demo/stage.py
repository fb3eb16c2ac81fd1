"""Where the demonstration takes place: a folder, two providers that outlive every process, and lives of a run.

A life is one process that executes the run with the command that a user would type. Whatever is claimed later is read
from what lies outside of it: the database, the providers' ledgers, and the outbox.
"""

from __future__ import annotations

import json
import secrets
import shlex
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from sqlalchemy.exc import SQLAlchemyError

from ridethrough.agents.demo import script, team
from ridethrough.runtime import views
from ridethrough.runtime.drill.life import Life, live
from ridethrough.runtime.errors import Error, UsageError
from ridethrough.runtime.options import Options
from ridethrough.runtime.router.providers.simulated import SimulatedProvider
from ridethrough.runtime.store import Store
from ridethrough.runtime.tables import SCHEMA_VERSION

TARGET = f"{team.__name__}:report"

CONFIG = """# Written by `ridethrough demo`: two providers (simulated, over real HTTP) behind one route.
database = {database}

[providers.north]
kind = "openai"
base_url = "{north}"

[providers.south]
kind = "openai"
base_url = "{south}"

[models.north]
provider = "north"
model = "{model}"
price = {{ input = 1.25, output = 10.0 }}

[models.south]
provider = "south"
model = "{model}"
price = {{ input = 1.25, output = 10.0 }}

[routes.smart]
models = ["north", "south"]
patience = "1s"
"""


class DemoFailed(Error):
    """The demonstration could not be carried out."""


@dataclass(frozen=True)
class Asked:
    """One request on a provider's ledger, and how it ended: ``finished``, ``failed``, ``broken`` or ``open``."""

    provider: str
    number: int
    digest: str
    fault: str | None
    end: str


@dataclass
class Stage:
    """What the acts share."""

    folder: Path
    run_id: str
    database: str
    commands: Options
    """The options with which a user gets to the same database."""
    providers: dict[str, SimulatedProvider] = field(default_factory=dict[str, SimulatedProvider])
    began: float = field(default_factory=time.monotonic)

    @property
    def config(self) -> Path:
        """The configuration that the processes are given."""
        return self.folder / "ridethrough.toml"

    @property
    def outbox(self) -> Path:
        """Where mails go: a file that no journal can take back."""
        return self.folder / "outbox.jsonl"

    def ledger(self, provider: str) -> Path:
        """What ``provider`` was asked."""
        return self.folder / f"{provider}.jsonl"

    # --- what lies outside of the processes -------------------------------------------------------------------------

    def mails(self) -> list[dict[str, Any]]:
        """The outbox."""
        return list(_lines(self.outbox))

    def asked(self) -> list[Asked]:
        """The ledgers of both providers."""
        return [asked for provider in self.providers for asked in _requests(provider, self.ledger(provider))]

    def run(self) -> views.RunView:
        """The run as the database has it.

        Raises:
            NotFound: it is not there yet.
        """
        store = Options(config=str(self.config)).store()
        try:
            return store.read_now(lambda connection: views.show_run(store, connection, self.run_id, steps=True))
        finally:
            store.close()

    # --- processes --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def life(self, command: str, *arguments: str) -> AsyncGenerator[Life]:
        """A process that executes ``ridethrough COMMAND``; it does not outlive the block."""
        words = [command, *arguments, "--config", str(self.config), "--json"]
        async with live(words, self.folder / f"{command}.log") as life:
            yield life


def input_of(stage: Stage) -> str:
    """What the workflow is given, as JSON."""
    return json.dumps({"topic": team.TOPIC, "outbox": str(stage.outbox)})


def shown(path: Path) -> str:
    """A path as a user would type it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


# --- setting up -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def set_stage(folder: Path, database: str | None) -> AsyncGenerator[Stage]:
    """Make a folder for one performance below ``folder``, and start the providers.

    Raises:
        UsageError: The folder cannot be written to.
    """
    own = _new_folder(folder)
    if database is None:
        path = folder / "runs.db"
        database, shown = f"sqlite:///{path.resolve()}", str(path)
    else:
        shown = database
    stage = Stage(own, own.name, database, Options(db=shown))
    await anyio.to_thread.run_sync(_forget_the_providers, database)
    async with _provider(stage, "north") as north, _provider(stage, "south") as south:
        stage.providers = {"north": north, "south": south}
        text = CONFIG.format(
            database=json.dumps(database), north=north.base_url, south=south.base_url, model=script.MODEL
        )
        stage.config.write_text(text, encoding="utf-8")
        yield stage


def _forget_the_providers(database: str) -> None:
    """Those of an earlier performance had failed, and were on their way back: the ones of this one are others."""
    store = Store(database)
    try:
        if store.database.path.exists() and store.version() == SCHEMA_VERSION:
            with store.writer.begin() as connection:
                store.forget_deployments(connection, ("north", "south"))
    except (SQLAlchemyError, OSError):
        return  # what is wrong with the database is said when it is used
    finally:
        store.close()


def _provider(stage: Stage, name: str) -> SimulatedProvider:
    return SimulatedProvider(getattr(script, name)(), ledger=stage.ledger(name))


def _new_folder(folder: Path) -> Path:
    """A folder of its own; its name is that of the run, too."""
    own = folder / f"demo-{secrets.token_hex(3)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.mkdir()
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written to ({error.strerror}). Give another folder: "
            f"{shlex.join(['ridethrough', 'demo', '--dir', 'FOLDER'])}"
        ) from error
    return own.resolve()


# --- ledgers --------------------------------------------------------------------------------------------------------


def _requests(provider: str, path: Path) -> Iterator[Asked]:
    found: dict[int, Asked] = {}
    for line in _lines(path):
        end = {"started": "open", "broken": "broken"}.get(line["event"]) or _end(line)
        found[line["number"]] = Asked(provider, line["number"], line["digest"], line["fault"], end)
    yield from found.values()


def _end(line: dict[str, Any]) -> str:
    return "finished" if line["status"] == 200 and line["fault"] is None else "failed"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
