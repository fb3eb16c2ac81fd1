"""A process of a drill: ``python -m ridethrough.runtime.drill.serve TARGET CONFIG``.

It executes whatever runs of the workflow are in the database of ``CONFIG``, those of dead processes too, until it is
told to stop (SIGTERM), or killed. It ends by itself when the drill has gone, whatever became of that.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import anyio

from ridethrough.runtime.config import load_config
from ridethrough.runtime.runtime import Runtime
from ridethrough.runtime.source import load_target

AT_A_TIME = 10_000
"""Runs in memory: how many there are is the drill's business."""


async def serve(config: Path) -> None:
    """Execute runs until told to stop."""
    loaded = load_config(config)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_until_told, tasks.cancel_scope)
        tasks.start_soon(_until_alone, tasks.cancel_scope)
        async with Runtime.open(loaded.database, config=loaded, concurrency=AT_A_TIME, grace=0.0):
            await anyio.sleep_forever()


async def _until_told(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()
            return


async def _until_alone(scope: anyio.CancelScope) -> None:
    """The drill holds the other end of standard input; when it has gone, nobody wants this process."""
    await anyio.wait_readable(sys.stdin.fileno())
    scope.cancel()


def main() -> None:
    """Import the workflow, whose runs are then known, and execute them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the drill, which stops its processes
    target, config = sys.argv[1:]
    load_target(target)
    anyio.run(serve, Path(config))


if __name__ == "__main__":
    main()
