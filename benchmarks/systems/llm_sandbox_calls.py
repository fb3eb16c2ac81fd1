"""llm-sandbox: `execute_command` in a session's container."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from _sandbox import IMAGE, calls_case
from llm_sandbox import SandboxSession


async def calls() -> None:
    # `skip_environment_setup`: without it the session wants to install packages, and there is no network.
    session = SandboxSession(
        lang="python", image=IMAGE, skip_environment_setup=True, runtime_configs={"network_mode": "none", "init": True}
    )
    session.open()
    loop, threads = asyncio.get_running_loop(), ThreadPoolExecutor(32)

    def run(argv: Sequence[str]) -> str:
        return str(session.execute_command(shlex.join(argv)).stdout)

    async def call(argv: Sequence[str]) -> str:
        return run(argv)

    async def many(count: int, argv: Sequence[str]) -> None:
        await asyncio.gather(*(loop.run_in_executor(threads, run, argv) for _ in range(count)))

    try:
        await calls_case("llm-sandbox", call, many)
    finally:
        session.close()


asyncio.run(calls())
