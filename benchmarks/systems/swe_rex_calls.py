"""SWE-ReX: `execute` on its server in a container.

Its server and what that needs are not in the image: they are mounted from this environment, whose Python is of the
same version as the image's. The container has the host's network, because the server listens on a port.
"""

from __future__ import annotations

import asyncio
import socket
import sysconfig
import uuid
from collections.abc import Sequence

import docker
from _sandbox import IMAGE, calls_case
from swerex.runtime.abstract import Command
from swerex.runtime.remote import RemoteRuntime


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def calls() -> None:
    port, token = free_port(), str(uuid.uuid4())
    box = docker.from_env().containers.run(
        IMAGE,
        ["python3", "-m", "swerex.server", "--host", "127.0.0.1", "--port", str(port), "--auth-token", token],
        detach=True,
        init=True,
        network_mode="host",
        environment={"PYTHONPATH": "/peers", "HOME": "/tmp"},
        volumes={sysconfig.get_paths()["purelib"]: {"bind": "/peers", "mode": "ro"}},
    )
    runtime = RemoteRuntime(auth_token=token, host="http://127.0.0.1", port=port, timeout=30)
    try:
        await runtime.wait_until_alive(timeout=30)

        async def call(argv: Sequence[str]) -> str:
            return (await runtime.execute(Command(command=list(argv)))).stdout

        async def many(count: int, argv: Sequence[str]) -> None:
            await asyncio.gather(*(call(argv) for _ in range(count)))

        await calls_case("swe-rex", call, many)
    finally:
        await runtime.close()
        box.remove(force=True)


asyncio.run(calls())
