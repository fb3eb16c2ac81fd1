"""Hundreds of agents, two providers that both fail, a worker that is killed: nobody is lost, and nobody storms."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, contextmanager
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median
from typing import Any, Literal

import anyio
import pytest

from ridethrough import Runtime
from ridethrough.runtime.config import load_config
from ridethrough.runtime.router.providers.simulated import (
    Answer,
    Call,
    Fault,
    Handled,
    Script,
    SimRequest,
    SimulatedProvider,
)

pytestmark = [pytest.mark.anyio, pytest.mark.processes, pytest.mark.timeout(240)]

GAP = 0.025
"""Seconds between the beginnings of two agents: each asks twice, so the normal rate is 80 calls a second."""

NORMAL = 9.0
"""Calls are normal until there were as many as begin in so many seconds; each agent makes two."""

PROGRAM = """\
import logging, sys
import anyio
from ridethrough import Agent, Runtime, sleep, tool, workflow
from ridethrough.runtime.config import load_config

logging.basicConfig(level=logging.WARNING)


@tool(effect="read")
async def look(at: str) -> str:
    return f"seen {at}"


agent = Agent("errand", model="smart", instructions="You run errands.", tools=[look])


@workflow(name="errand")
async def errand(name: str, after: float) -> str:
    await sleep(after)
    return (await agent.run(f"errand of {name}")).output


async def main(config: str) -> None:
    async with Runtime.open(config=load_config(config), concurrency=1000, grace=0.0):
        await anyio.sleep_forever()


if __name__ == "__main__":
    anyio.run(main, sys.argv[1])
"""

CONFIG = """
database = "sqlite:///{folder}/runs.db"
durability = "process"
[providers.first]
kind = "openai"
base_url = "{first}"
[providers.second]
kind = "openai"
base_url = "{second}"
[models.a]
provider = "first"
model = "sim"
price = {{ input = 1, output = 2 }}
[models.b]
provider = "second"
model = "sim"
price = {{ input = 1, output = 2 }}
[routes.smart]
models = ["a", "b"]
"""


def errands(seconds: float = 0.4) -> Script:
    """Two turns and a tool call; the times to the first token differ, as they do."""

    def spread(request: SimRequest) -> float:
        return seconds * (0.7 + 0.6 * int(request.digest[:4], 16) / 0xFFFF)

    script = Script()

    @script.on(turn=0)
    def first(request: SimRequest) -> Answer:
        return Answer(calls=(Call("look", {"at": request.user}),), latency=spread(request))

    @script.on(turn=1)
    def second(request: SimRequest) -> Answer:
        return Answer(text=f"done: {request.user}", latency=spread(request))

    return script


class Scene:
    """Two providers in this process, agents in a database, and workers in processes that can be killed."""

    def __init__(self, folder: Path, providers: tuple[SimulatedProvider, SimulatedProvider]) -> None:
        self.folder = folder
        self.providers = providers
        self.config = folder / "ridethrough.toml"
        first, second = providers
        self.config.write_text(CONFIG.format(folder=folder, first=first.base_url, second=second.base_url))
        self.program = folder / "errands.py"
        self.program.write_text(PROGRAM)

    async def queue(self, agents: int, gap: float) -> None:
        """Put agents into the database; each begins ``gap`` seconds after the one before."""
        spec = spec_from_file_location("errands", self.program)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        async with (
            Runtime.open(config=load_config(self.config), serve=False) as runtime,
            anyio.create_task_group() as group,
        ):
            for number in range(agents):
                start = partial(
                    runtime.start, module.errand, f"agent-{number:03}", number * gap, id=f"agent-{number:03}"
                )
                group.start_soon(start)

    @contextmanager
    def worker(self) -> Generator[subprocess.Popen[bytes]]:
        """A process that works until it is killed, as late as at the end of the context."""
        command = [sys.executable, str(self.program), str(self.config)]
        with (self.folder / "worker.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT)
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What the database says."""
        with closing(sqlite3.connect(self.folder / "runs.db")) as connection:
            return list(connection.execute(query, values))

    def done(self) -> int:
        """How many agents have ended."""
        return int(self.rows("SELECT count(*) FROM runs WHERE finished_at IS NOT NULL")[0][0])

    def fail(self, seconds: float) -> tuple[float, float]:
        """Let both fail from now on; the ages at which that begins and ends."""
        now = max(provider.age for provider in self.providers)
        for provider in self.providers:
            provider.faults.add(Fault(kind="status", status=503, start=now, end=now + seconds))
        return now, now + seconds

    @property
    def age(self) -> float:
        """Seconds since the providers started."""
        return self.providers[0].age

    @property
    def handled(self) -> list[Handled]:
        """What both providers were asked."""
        return [each for provider in self.providers for each in provider.requests]

    @property
    def spoken(self) -> set[tuple[str, int]]:
        """The model calls that are on disk, as ``asked`` names them."""
        query = "SELECT run_id, path FROM steps WHERE kind = 'model'"
        return {(run_id, int(path.rpartition("#")[2]) - 1) for run_id, path in self.rows(query)}


def asked(handled: Handled) -> tuple[str, int]:
    """Who asked, and in which turn. (Only simulated providers of one's own configuration are sent the run's id.)"""
    return handled.request.user.removeprefix("errand of "), handled.request.turns


async def until(question: Callable[[], bool]) -> None:
    """Wait for something outside of this process."""
    with anyio.fail_after(90):
        while not question():  # noqa: ASYNC110 - other processes set no event
            await anyio.sleep(0.02)


def per_second(handled: Iterable[Handled], begin: float, end: float) -> list[int]:
    """The requests of each second between two ages."""
    ages = Counter(int(each.request.seconds - begin) for each in handled if begin <= each.request.seconds < end)
    return [ages[second] for second in range(int(end - begin))]


@pytest.mark.parametrize(
    ("agents", "outage", "killed"),
    [
        pytest.param(500, 4.0, "outage", id="500 agents, killed in the outage"),
        pytest.param(260, 3.0, "recovery", id="260 agents, killed on the way back"),
        pytest.param(500, 15.0, "outage", id="15 s, killed in the outage", marks=pytest.mark.soak),
        pytest.param(500, 15.0, "recovery", id="15 s, killed on the way back", marks=pytest.mark.soak),
    ],
)
async def test_both_providers_down_and_the_worker_killed(
    tmp_path: Path, agents: int, outage: float, killed: Literal["outage", "recovery"]
) -> None:
    """Nobody is lost, nobody fails often, nothing finished is asked again, and the providers are not run over."""
    async with SimulatedProvider(errands()) as first, SimulatedProvider(errands()) as second:
        scene = Scene(tmp_path, (first, second))
        await scene.queue(agents, GAP)
        with scene.worker() as worker:
            await until(lambda: len(scene.handled) >= NORMAL / GAP)
            went, came_back = scene.fail(outage)
            if killed == "outage":
                await until(lambda: scene.age >= went + outage / 2)
            else:
                await until(lambda: sum(each.request.seconds > came_back for each in scene.handled) >= 30)
            worker.kill()
            worker.wait()
            spoken = scene.spoken
            seen = {id(each.request) for each in scene.handled}
            assert scene.done() < agents, "the worker was killed when all was over"
        with scene.worker():
            await until(lambda: scene.done() == agents)
        assert_nobody_is_lost(scene, agents)
        assert_few_failed(scene)
        repeated = [asked(each) for each in scene.handled if id(each.request) not in seen and asked(each) in spoken]
        assert repeated == [], "these answers were on disk already"
        assert_no_stampede(scene, went, came_back)


def assert_nobody_is_lost(scene: Scene, agents: int) -> None:
    """Every agent has its answer, by two calls."""
    ended = scene.rows("SELECT id, status, json_extract(result, '$') FROM runs")
    assert {row for row in ended if row[1:] != ("done", f"done: errand of {row[0]}")} == set()
    assert len(ended) == agents
    assert len(scene.spoken) == 2 * agents


def assert_few_failed(scene: Scene) -> None:
    """At most two failed attempts an agent: by the providers' own count."""
    failed = Counter(asked(each)[0] for each in scene.handled if each.status != 200 and each.error != "client")
    assert failed, "the outage was never met"
    assert max(failed.values()) <= 2, failed.most_common(5)


def assert_no_stampede(scene: Scene, went: float, came_back: float) -> None:
    """After the recovery at most twice the normal rate, in any second; and no second in which nobody dares."""
    normal = median(per_second(scene.handled, went - 3, went))
    answered = [each.request.seconds for each in scene.handled if each.status == 200]
    begin, end = min(age for age in answered if age > came_back), max(answered) + 0.001
    rates = per_second(scene.handled, begin, end)
    assert max(rates) <= 2 * normal, f"{rates} requests a second after the recovery, {normal} before the outage"
