"""Lives: processes that execute runs with the command that a user would type, and that can be killed in earnest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import anyio.abc
from anyio.streams.buffered import BufferedByteReceiveStream

from ridethrough.runtime.events import EVENT, Event

LONGEST_LINE = 16 * 1024 * 1024


class Life:
    """A process that executes runs, and what it says."""

    def __init__(self, process: anyio.abc.Process, log: Path) -> None:
        """``log`` has what it writes to standard error."""
        assert process.stdout is not None
        self._process = process
        self._output = BufferedByteReceiveStream(process.stdout)
        self._log = log
        self.pid = process.pid

    async def events(self) -> AsyncGenerator[Event]:
        """The runs' events, as ``--json`` prints them; ends with the process's output."""
        while True:
            try:
                line = await self._output.receive_until(b"\n", LONGEST_LINE)
            except (anyio.IncompleteRead, anyio.EndOfStream, anyio.ClosedResourceError):
                return
            said = json.loads(line)
            if "type" in said:
                yield EVENT.validate_python(said)

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.returncode is not None

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed, nothing is said goodbye to."""
        self._process.kill()

    async def stop(self, seconds: float) -> None:
        """SIGTERM, and ``seconds`` for an orderly end."""
        self._process.terminate()
        with anyio.move_on_after(seconds):
            await self._process.wait()

    async def drain(self) -> None:
        """Read what it says and forget it, to its end: a full pipe would stop it."""
        with suppress(anyio.EndOfStream, anyio.ClosedResourceError):
            while True:
                await self._output.receive()

    async def end(self) -> int:
        """Wait for the process to end; its status, negative if a signal ended it."""
        return await self._process.wait()

    def last_words(self) -> str:
        """The end of what it wrote to standard error."""
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])


@asynccontextmanager
async def live(
    words: Sequence[str],
    log: Path,
    *,
    module: str = "ridethrough.cli",
    environment: Mapping[str, str] | None = None,
    tied: bool = False,
) -> AsyncGenerator[Life]:
    """Execute ``python -m MODULE WORDS`` in a process that does not outlive the block.

    Args:
        words: The arguments: a command and its options.
        log: Gets what the process writes to standard error.
        module: What is executed; the command line, when left out.
        environment: Variables besides those of this process.
        tied: Its standard input stays open for as long as this process lives, so that it can tell when it is alone.
    """
    with log.open("wb") as errors:
        process = await anyio.open_process(
            [sys.executable, "-P", "-m", module, *words],
            stdin=subprocess.PIPE if tied else subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, **(environment or {})},
        )
    try:
        yield Life(process, log)
    finally:
        if process.returncode is None:
            process.kill()
        with anyio.CancelScope(shield=True):
            await process.aclose()
