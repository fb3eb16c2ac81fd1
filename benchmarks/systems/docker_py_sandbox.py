"""docker-py alone: `exec_run` for calls, archives for files, create and start for a container."""

from __future__ import annotations

import asyncio
import io
import os
import statistics
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import docker
from _measure import Meter, arguments, report, scaled
from _sandbox import IMAGE, STARTS, TEN_MB, calls_case

KEEP = ["sh", "-c", "exec sleep 600"]
LIMITS: dict[str, Any] = {"network_mode": "none", "init": True, "mem_limit": "512m", "pids_limit": 256}


def container(client: docker.DockerClient) -> Any:
    return client.containers.run(IMAGE, KEEP, detach=True, **LIMITS)


async def calls() -> None:
    client = docker.from_env(max_pool_size=64)
    box = container(client)
    loop, threads = asyncio.get_running_loop(), ThreadPoolExecutor(32)

    def run(argv: Sequence[str]) -> str:
        return str(box.exec_run(list(argv)).output.decode())

    async def call(argv: Sequence[str]) -> str:
        return run(argv)  # as it is used: no thread in between

    async def many(count: int, argv: Sequence[str]) -> None:
        await asyncio.gather(*(loop.run_in_executor(threads, run, argv) for _ in range(count)))

    try:
        await calls_case("docker-py", call, many)
    finally:
        box.remove(force=True)


async def starts() -> None:
    """Create and start, as the engine does it."""
    client, took = docker.from_env(), []
    with Meter() as meter:
        for _ in range(STARTS):
            begun = time.perf_counter()
            box = client.containers.create(IMAGE, KEEP, **LIMITS)
            box.start()
            took.append((time.perf_counter() - begun) * 1000)
            box.remove(force=True)
    report("docker-py", "sandbox_starts", meter, STARTS, cold_ms=statistics.median(took))


async def files() -> None:
    client = docker.from_env()
    box, data = container(client), os.urandom(TEN_MB)
    written, read = [], []
    try:
        with Meter() as meter:
            for _ in range(scaled(10)):
                begun = time.perf_counter()
                put(box, data)
                between = time.perf_counter()
                assert get(box) == data
                written.append(10 / (between - begun))
                read.append(10 / (time.perf_counter() - between))
    finally:
        box.remove(force=True)
    report(
        "docker-py",
        "sandbox_files",
        meter,
        len(read),
        write_mb_s=statistics.median(written),
        read_mb_s=statistics.median(read),
    )


def put(box: Any, data: bytes) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo("data")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    box.put_archive("/root", packed.getvalue())


def get(box: Any) -> bytes:
    stream, _ = box.get_archive("/root/data")
    with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as archive:
        found = archive.extractfile("data")
        assert found is not None
        return found.read()


if __name__ == "__main__":
    case = {"sandbox_calls": calls, "sandbox_starts": starts, "sandbox_files": files}
    asyncio.run(case[arguments()[0]]())
