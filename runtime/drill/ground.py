"""Where a drill takes place: a folder, a database, a configuration of its own, and servers that outlive every process.

There is one ground for the baseline and another for the drill itself: what the one spent or learned must not count in
the other.
"""

from __future__ import annotations

import json
import secrets
import shlex
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ridethrough.runtime.config import Config, load_config
from ridethrough.runtime.drill import TOOL_SCHEDULE
from ridethrough.runtime.drill.life import Life, live
from ridethrough.runtime.drill.lineup import StandIn, script_for, text_of
from ridethrough.runtime.errors import UsageError
from ridethrough.runtime.options import Options
from ridethrough.runtime.router.providers.simulated import Scenario, Script, SimulatedProvider


class ScheduleClock:
    """Seconds since the schedule began: 0 until it is started. ``file`` tells other processes when that was."""

    def __init__(self, file: Path) -> None:
        """It stands still."""
        self.began: float | None = None
        """When it was started, in seconds since the epoch."""
        self._started: float | None = None
        self._file = file

    def __call__(self) -> float:
        """The time on it."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    def start(self) -> None:
        """Let it run."""
        self._started, self.began = time.monotonic(), time.time()
        part = self._file.with_suffix(".part")
        part.write_text(repr(self.began), encoding="utf-8")
        part.replace(self._file)


@dataclass
class Ground:
    """One ground, with its servers by the deployment that each stands in for."""

    folder: Path
    line: Sequence[StandIn]
    clock: ScheduleClock
    servers: dict[str, SimulatedProvider] = field(default_factory=dict[str, SimulatedProvider])
    lives: int = 0

    @property
    def config(self) -> Path:
        """The configuration that the processes are given."""
        return self.folder / "ridethrough.toml"

    @property
    def database(self) -> Path:
        """Where the runs are kept."""
        return self.folder / "runs.db"

    @property
    def tool_ledger(self) -> Path:
        """What the tools were called, by whom and with what end."""
        return self.folder / "tools.jsonl"

    @property
    def options(self) -> Options:
        """The options with which the processes get to the database."""
        return Options(config=str(self.config))

    @property
    def commands(self) -> Options:
        """Those with which a user does."""
        return Options(db=shown(self.database))

    def loaded(self) -> Config:
        """The configuration that the processes are given."""
        return load_config(self.config)

    def ledger(self, number: int) -> Path:
        """What the server for the deployment at ``number`` of the line was asked."""
        return self.folder / f"server-{number + 1}.jsonl"

    @property
    def asked(self) -> int:
        """How many requests have come."""
        return sum(len(server.requests) for server in self.servers.values())

    def start_clock(self) -> None:
        """Let the schedule begin."""
        self.clock.start()
        for server in self.servers.values():
            server.reset_clock()

    def life(self, target: str) -> AbstractAsyncContextManager[Life]:
        """A process that executes whatever runs there are."""
        return live(
            [target, str(self.config)],
            self._log(),
            module="ridethrough.runtime.drill.serve",
            environment=self._environment,
            tied=True,
        )

    def operator(self, ids: Sequence[str]) -> AbstractAsyncContextManager[Life]:
        """What an operator types: a process that resumes these runs."""
        words = ["resume", *ids, "--config", str(self.config), "--json"]
        return live(words, self._log(), environment=self._environment)

    @property
    def _environment(self) -> dict[str, str]:
        return {TOOL_SCHEDULE: str(self.folder / "tools.json")}

    def _log(self) -> Path:
        self.lives += 1
        return self.folder / f"process-{self.lives}.log"


@asynccontextmanager
async def set_ground(
    folder: Path, config: Config, line: Sequence[StandIn], says: dict[str, Script], scenario: Scenario
) -> AsyncGenerator[Ground]:
    """Make a ground in ``folder``, with the faults of ``scenario``; its clock stands still.

    Args:
        folder: It is made.
        config: What is drilled, with a route for everything that is asked for.
        line: Who stands in for whom.
        says: What each provider says, by its name.
        scenario: The faults of servers and tools, and the pace.
    """
    ground = _prepared(folder, line, scenario)
    async with AsyncExitStack() as stack:
        for number, each in enumerate(line):
            script = script_for(each, says[each.provider], scenario, line)
            server = SimulatedProvider(
                script, ledger=ground.ledger(number), wire=each.wire, name=each.deployment, clock=ground.clock
            )
            ground.servers[each.deployment] = await stack.enter_async_context(server)
        urls = {name: server.base_url for name, server in ground.servers.items()}
        ground.config.write_text(text_of(config, line, urls, f"sqlite:///{ground.database}"), encoding="utf-8")
        yield ground


def _prepared(folder: Path, line: Sequence[StandIn], scenario: Scenario) -> Ground:
    folder.mkdir()
    ground = Ground(folder, line, ScheduleClock(folder / "clock"))
    (folder / "tools.json").write_text(tool_schedule(ground, scenario), encoding="utf-8")
    return ground


def tool_schedule(ground: Ground, scenario: Scenario) -> str:
    """Write what the processes of a drill are told of tool faults (see ``ridethrough.tools.faults``)."""
    said: dict[str, Any] = {
        "seed": scenario.seed,
        "clock": str(ground.folder / "clock"),
        "ledger": str(ground.tool_ledger),
        "faults": [asdict(fault) for fault in scenario.tools],
    }
    return json.dumps(said)


def new_folder(folder: Path) -> Path:
    """Make a folder for one drill below ``folder``.

    Raises:
        UsageError: It cannot be written to.
    """
    own = folder / f"drill-{secrets.token_hex(3)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.mkdir()
    except OSError as error:
        words = ["ridethrough", "drill", "…", "--dir", "FOLDER"]
        raise UsageError(
            f"{folder} cannot be written to ({error.strerror}). Give another folder: {shlex.join(words)}"
        ) from error
    return own.resolve()


def shown(path: Path) -> str:
    """A path as a user would type it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
