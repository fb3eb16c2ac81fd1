"""ridethrough's sandboxes: calls, starts, files, and a desktop's screenshots."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence

import anyio
from _measure import Meter, arguments, report, scaled
from _sandbox import STARTS, TEN_MB, calls_case

from ridethrough.sandboxes.desktop import DESKTOP, desktop
from ridethrough.sandboxes.docker import DockerHost
from ridethrough.sandboxes.pool import Pool
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import Sandbox
from ridethrough.sandboxes.standalone import docker_sandbox

PROFILE = SandboxProfile(cpus=2.0, runtime="runc", warm=2)


async def calls() -> None:
    async with docker_sandbox(PROFILE) as sandbox:

        async def call(argv: Sequence[str]) -> str:
            return (await sandbox.exec(argv)).stdout

        async def many(count: int, argv: Sequence[str]) -> None:
            async with anyio.create_task_group() as tasks:
                for _ in range(count):
                    tasks.start_soon(call, argv)

        await calls_case("ridethrough", call, many)


async def starts() -> None:
    """Cold, and from the pool."""
    cold, warm = [], []
    async with DockerHost.open() as host:
        with Meter() as meter:
            for number in range(STARTS):
                begun = time.perf_counter()
                sandbox = await host.create(PROFILE, id=f"bench{os.getpid()}n{number}")
                cold.append((time.perf_counter() - begun) * 1000)
                await sandbox.aclose()
        async with Pool.open(host) as pool:
            first = await pool.acquire(PROFILE)
            for _ in range(STARTS):
                with anyio.fail_after(30):
                    while sum(pool.statistics().warm.values()) < PROFILE.warm:  # noqa: ASYNC110
                        await anyio.sleep(0.01)
                begun = time.perf_counter()
                sandbox = await pool.acquire(PROFILE)
                warm.append((time.perf_counter() - begun) * 1000)
                await sandbox.exec(["true"])
                await pool.release(sandbox, used=True)
            await pool.release(first, used=True)
    report(
        "ridethrough",
        "sandbox_starts",
        meter,
        STARTS,
        cold_ms=statistics.median(cold),
        warm_ms=statistics.median(warm),
    )


async def files() -> None:
    """10 MB in and out, in megabytes a second."""
    data = os.urandom(TEN_MB)
    written, read = [], []
    async with docker_sandbox(PROFILE) as sandbox:
        with Meter() as meter:
            for _ in range(scaled(10)):
                begun = time.perf_counter()
                await sandbox.write("data", data)
                between = time.perf_counter()
                assert await sandbox.read("data") == data
                written.append(10 / (between - begun))
                read.append(10 / (time.perf_counter() - between))
    report(
        "ridethrough",
        "sandbox_files",
        meter,
        len(read),
        write_mb_s=statistics.median(written),
        read_mb_s=statistics.median(read),
    )


async def screen() -> None:
    """JPEG screenshots of a browser, 1280 by 800."""
    async with docker_sandbox(DESKTOP) as sandbox:
        await _screenshots(sandbox)


async def _screenshots(sandbox: Sandbox) -> None:
    async with desktop(sandbox) as screen:
        await sandbox.write("page.html", "<h1>Hello</h1>" + "<p>words and words</p>" * 100)
        await screen.open("file:///workspace/page.html")
        took, sizes = [], []
        with Meter() as meter:
            for _ in range(scaled(50)):
                begun = time.perf_counter()
                sizes.append(len(await screen.screenshot()))
                took.append((time.perf_counter() - begun) * 1000)
    report(
        "ridethrough",
        "sandbox_screen",
        meter,
        len(took),
        shot_ms=statistics.median(took),
        shot_p99_ms=sorted(took)[int(len(took) * 0.99) - 1],
        kilobytes=statistics.median(sizes) / 1000,
    )


if __name__ == "__main__":
    case = {"sandbox_calls": calls, "sandbox_starts": starts, "sandbox_files": files, "sandbox_screen": screen}
    anyio.run(case[arguments()[0]])
