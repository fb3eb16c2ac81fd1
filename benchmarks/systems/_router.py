"""What the routers' scripts share: the mock provider's process, the load, and what is read off the two logs.

A script gives one coroutine function that makes one call and returns its text; everything else is here, so that it is
the same for all. Only the standard library is imported.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from _measure import SCALE, Meter, report, scaled

Call = Callable[[], Awaitable[str]]
PROMPT = "Say forty words about the tides of the North Sea, and nothing else. " * 4
EXPECTED = "word " * 40

# Calls at once, seconds that the provider takes, calls.
LOADS = ((1, 0.0, scaled(300)), (25, 0.2, scaled(500)), (100, 0.2, scaled(1000)), (200, 0.2, scaled(1000)))

AGENTS, ANSWER, THINK = 50, 0.3, 0.7
SHARE_FROM = 0.5  # the first half second is not taken for A's normal share: not every agent has begun
RETURNED = 0.8


class Mock:
    """The provider's process: `with Mock() as mock`, then `mock.url("a")`, `mock.tell(...)`."""

    def __enter__(self) -> Mock:
        command = [sys.executable, str(Path(__file__).with_name("mock_provider.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._ports = json.loads(self._process.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def url(self, server: str) -> str:
        return f"http://127.0.0.1:{self._ports[server]}/v1"

    def tell(self, **order: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


async def measure(system: str, case: str, mock: Mock, call: Call) -> None:
    """Run a case and print its line."""
    allow_many_files()
    if case == "router_overhead":
        await overhead(system, case, mock, call)
    else:
        await disturbed(system, case, mock, call)


def allow_many_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# --- overhead ----------------------------------------------------------------------------------------------------


async def overhead(system: str, case: str, mock: Mock, call: Call) -> None:
    """The same number of calls at each load, each after a warm-up that opens the connections."""
    row: dict[str, float] = {}
    with Meter() as whole:
        for at_once, latency, calls in LOADS:
            mock.tell(latency=latency)
            await closed_loop(call, at_once, max(at_once, scaled(50)))
            with Meter() as meter:
                walls = await closed_loop(call, at_once, calls)
            row |= {
                f"cpu_ms_{at_once}": meter.cpu / calls * 1000,
                f"p50_ms_{at_once}": statistics.median(walls) * 1000,
                f"p99_ms_{at_once}": percentile(walls, 99) * 1000,
                f"rate_{at_once}": calls / meter.wall,
            }
    report(system, case, whole, sum(calls for _, _, calls in LOADS), **row)


async def closed_loop(call: Call, at_once: int, calls: int) -> list[float]:
    walls: list[float] = []
    left = calls

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            started = time.perf_counter()
            text = await call()
            walls.append(time.perf_counter() - started)
            if text != EXPECTED:
                raise AssertionError(f"a wrong answer: {text[:100]!r}")

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(caller())
    return walls


def percentile(values: list[float], which: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * which // 100)]


# --- brownout and outage -----------------------------------------------------------------------------------------

# What goes wrong with which servers, from when to when, and when the agents stop to start calls (seconds).
SCRIPTS = {"router_brownout": ("brownout", "a", 5, 25, 40), "router_outage": ("outage", "ab", 5, 20, 30)}
PACE = max(0.3, SCALE)


async def disturbed(system: str, case: str, mock: Mock, call: Call) -> None:
    """50 agents, each a call of 300 ms and then 700 ms of thought, through a time of trouble.

    An agent that is given an error thinks and goes on, so that the loss can be counted; a real one would have died.
    """
    kind, servers, *times = SCRIPTS[case]
    begins, ends, until = (PACE * time for time in times)
    faults = {server: [(begins, ends, kind)] for server in servers}
    mock.tell(latency=ANSWER)
    await closed_loop(call, AGENTS, AGENTS)  # imports and connections
    calls: list[tuple[float, float, bool]] = []
    mock.tell(start=faults)
    with Meter() as meter:
        await agents(call, calls, until)
    seen = mock.tell(stats=True)
    inside = [end - start for start, end, done in calls if done and start < ends and end > begins]
    trouble = [verdict for second, verdict in seen["a"] if begins <= second < ends and verdict != "ok"]
    report(
        system,
        case,
        meter,
        len(calls),
        done=sum(done and begins <= end < ends for _, end, done in calls),
        lost=sum(not done for _, _, done in calls),
        p50_s=statistics.median(inside) if inside else None,
        p99_s=percentile(inside, 99) if inside else None,
        longest_s=max(inside, default=None),
        wasted=len(trouble),
        wasted_slow=trouble.count("slow"),
        attempts_in_trouble=sum(begins <= second < ends for name in ("a", "b") for second, _ in seen[name]),
        peak=peak(seen, ends, until) / peak(seen, SHARE_FROM, begins),
        returned_s=returned(seen, begins, ends, until),
    )


async def agents(call: Call, calls: list[tuple[float, float, bool]], until: float) -> None:
    began = time.monotonic()
    chance = random.Random(7)

    async def agent(first: float) -> None:
        await asyncio.sleep(first)
        while (start := time.monotonic() - began) < until:
            try:
                done = await call() == EXPECTED
            except Exception:
                done = False
            calls.append((start, time.monotonic() - began, done))
            await asyncio.sleep(THINK)

    async with asyncio.TaskGroup() as group:
        for _ in range(AGENTS):
            group.create_task(agent(chance.random() * (ANSWER + THINK)))


Seen = dict[str, list[tuple[float, str]]]


def share(seen: Seen, start: float, end: float) -> float | None:
    """A's share of the calls that arrived in a span of time; `None` when there were too few to say."""
    counts = [sum(start <= second < end for second, _ in seen[name]) for name in ("a", "b")]
    return counts[0] / sum(counts) if sum(counts) >= 10 else None


def returned(seen: Seen, begins: float, ends: float, until: float) -> float:
    """Seconds after the trouble until A has had 80 % of its former share for a second; infinite when not by the end."""
    before = share(seen, SHARE_FROM, begins) or 0.0
    at = ends
    while at + 1 <= until:
        now = share(seen, at, at + 1)
        if now is not None and now >= RETURNED * before:
            return at + 1 - ends
        at += 0.1
    return float("inf")


def peak(seen: Seen, start: float, end: float) -> float:
    """The most calls that arrived at A and B in any half second of a span, a second's worth."""
    times = sorted(second for name in ("a", "b") for second, _ in seen[name] if start <= second < end)
    return 2.0 * max((sum(at <= other < at + 0.5 for other in times[i:]) for i, at in enumerate(times)), default=0)
