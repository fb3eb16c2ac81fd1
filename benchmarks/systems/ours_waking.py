"""Runs of ridethrough that wait for a model: what it costs to park them, to keep them, and to wake them.

One provider (in a process of its own) refuses everything until all runs are parked, then it is well. What waking costs
is the CPU of all runs from the recovery to their results, less the CPU of as many fresh runs of the same work.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path

from _measure import Meter, arguments, report, scaled

from ridethrough import Agent, Runtime, workflow
from ridethrough.runtime.config import parse_config

RUNS, AT_ONCE = scaled(10_000), 200
IDLE_SECONDS = 3.0
PROVIDER = """
import anyio
from ridethrough.runtime.router.providers.simulated import Script, SimulatedProvider
async def main():
    async with SimulatedProvider(Script().rule("ok")) as provider:
        print(provider.port, flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""
CONFIG = """
[providers.a]
kind = "openai"
base_url = "http://127.0.0.1:{port}/v1"
[models.a]
provider = "a"
model = "m"
stream = false
price = {{ input = 1, output = 1 }}
[routes.r]
models = ["a"]
"""

agent = Agent("agent", model="r")


@workflow(version="1")
async def ask(number: int) -> str:
    return (await agent.run(f"question {number}")).output


def tell(port: int, fault: object | None) -> None:
    """Make the provider refuse everything, or well again."""
    body = None if fault is None else json.dumps(fault).encode()
    method = "DELETE" if fault is None else "POST"
    request = urllib.request.Request(f"http://127.0.0.1:{port}/__faults", data=body, method=method)
    urllib.request.urlopen(request).read()


async def at_once(work: Callable[[int], Awaitable[object]]) -> None:
    places = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with places:
            await work(number)

    async with asyncio.TaskGroup() as group:
        for number in range(RUNS):
            group.create_task(one(number))


async def until_all(runtime: Runtime, status: str) -> None:
    query = f"SELECT count(*) FROM runs WHERE status = '{status}'"
    while True:
        found = await runtime.store.read(lambda connection: connection.exec_driver_sql(query).scalar())
        if found >= RUNS:
            return
        await asyncio.sleep(0.2)


async def measure(directory: Path, port: int) -> None:
    config = parse_config(CONFIG.format(port=port))
    async with Runtime.open(f"sqlite:///{directory}/runs.db", config=config, concurrency=AT_ONCE) as runtime:
        tell(port, {"kind": "status", "status": 503})
        with Meter() as parking:
            await at_once(lambda number: runtime.start(ask, number, id=f"parked-{number}"))
            await until_all(runtime, "paused")
        with Meter() as idle:
            await asyncio.sleep(IDLE_SECONDS)
        tell(port, None)
        with Meter() as waking:
            await until_all(runtime, "done")

        async def fresh_run(number: int) -> None:
            await (await runtime.start(ask, number, id=f"fresh-{number}")).result()

        with Meter() as fresh:
            await at_once(fresh_run)
    report(
        "ridethrough",
        "waking",
        waking,
        RUNS,
        cpu_ms_to_park=parking.cpu / RUNS * 1000,
        cpu_percent_parked=idle.cpu / idle.wall * 100,
        cpu_ms_woken_and_done=waking.cpu / RUNS * 1000,
        cpu_ms_fresh=fresh.cpu / RUNS * 1000,
        cpu_ms_to_wake=(waking.cpu - fresh.cpu) / RUNS * 1000,
    )


def main() -> None:
    _, directory, _ = arguments()
    provider = subprocess.Popen([sys.executable, "-c", PROVIDER], stdout=subprocess.PIPE, text=True)
    try:
        assert provider.stdout is not None
        port = int(provider.stdout.readline())
        asyncio.run(measure(directory, port))
    finally:
        provider.kill()
        provider.wait()


if __name__ == "__main__":
    main()
