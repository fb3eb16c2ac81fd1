"""A person's shell in a container: what ``docker exec -it`` does, without the program ``docker``.

On a terminal the local one is made raw, so that every key goes to the other side, and is put back whatever happens. The
engine does not end a process whose client goes away (moby#9098), so a shell that is left in any other way than by its
end is ended by a mark in its environment.
"""

from __future__ import annotations

import os
import secrets
import signal
import stat
import sys
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager, suppress
from typing import Final

import anyio
import anyio.to_thread

from ridethrough.runtime.errors import SandboxError
from ridethrough.sandboxes.engine import Engine
from ridethrough.sandboxes.hijack import STDERR, EngineStream, hijack

SHELL: Final = 'for shell in bash sh; do command -v "$shell" >/dev/null && exec "$shell"; done'
MARK: Final = "RIDETHROUGH_SHELL"
END: Final = 'for each in /proc/[0-9]*; do grep -qsz "^$0$" "$each/environ" && kill -9 "${each#/proc/}"; done; :'
"""Ends what carries the mark; the loop's own shell is not marked."""

PIECE: Final = 65536
END_SECONDS: Final = 10.0


async def shell(engine: Engine, container: str, *, terminal: bool) -> int:
    """Join standard input and output with a shell in ``container`` until it ends; its status.

    Raises:
        SandboxGone: the container does not run.
        SandboxUnavailable: the engine cannot be asked.
    """
    mark = f"{MARK}={secrets.token_hex(8)}"
    exec_id = await _prepared(engine, container, mark, terminal)
    path = f"/v{engine.api}/exec/{exec_id}/start"
    stream = await hijack(engine.address, path, {"Detach": False, "Tty": terminal}, exec_id)
    try:
        async with stream:
            with _raw(terminal):
                await _join(engine, stream, exec_id, terminal)
        return await _status(engine, exec_id)
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(END_SECONDS, shield=True):
            await _end(engine, container, exec_id, mark)


async def _prepared(engine: Engine, container: str, mark: str, terminal: bool) -> str:
    environment = [mark, f"TERM={os.environ.get('TERM', 'dumb')}"]
    made: dict[str, str] = await engine.call(
        lambda client: client.exec_create(
            container, ["sh", "-c", SHELL], stdin=True, tty=terminal, environment=environment
        ),
        f"asked for a shell in {container}",
    )
    return made["Id"]


async def _status(engine: Engine, exec_id: str) -> int:
    """The shell's; the engine may know of its end a moment later than we do."""
    for pause in (0.01, 0.05, 0.2, 1.0):
        state = await engine.exec_state(exec_id)
        if not state.running:
            return state.exit_code or 0
        await anyio.sleep(pause)
    return 1


async def _end(engine: Engine, container: str, exec_id: str, mark: str) -> None:
    with suppress(SandboxError):
        if (await engine.exec_state(exec_id)).running:
            stream = await engine.exec_attach(container, ["sh", "-c", END, mark], stdin=False)
            async with stream:
                with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                    while True:
                        await stream.frame()


# --- joining --------------------------------------------------------------------------------------------------------


async def _join(engine: Engine, stream: EngineStream, exec_id: str, terminal: bool) -> None:
    """Both directions at once, until the other side has nothing more to say."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_send, stream)
        if terminal:
            tasks.start_soon(_resize, engine, exec_id)
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while True:
                await _show(stream, terminal)
        tasks.cancel_scope.cancel()


async def _show(stream: EngineStream, terminal: bool) -> None:
    if terminal:
        target, data = 1, await stream.terminal()
    else:
        number, data = await stream.frame()
        target = 2 if number == STDERR else 1
    await anyio.to_thread.run_sync(_write_all, target, data)


def _write_all(target: int, data: bytes) -> None:
    while data:
        data = data[os.write(target, data) :]


async def _send(stream: EngineStream) -> None:
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        async for data in _typed():
            await stream.send(data)
        await stream.send_eof()


async def _typed() -> AsyncIterator[bytes]:
    """Standard input as it comes; files are always ready and cannot be waited for."""
    source = sys.stdin.fileno()
    waits = not stat.S_ISREG(os.fstat(source).st_mode)
    while True:
        if waits:
            await anyio.wait_readable(source)
        data = os.read(source, PIECE)
        if not data:
            return
        yield data


async def _resize(engine: Engine, exec_id: str) -> None:
    """The size of the window, now and whenever it changes."""
    with anyio.open_signal_receiver(signal.SIGWINCH) as changes:
        await _tell_size(engine, exec_id)
        async for _ in changes:
            await _tell_size(engine, exec_id)


async def _tell_size(engine: Engine, exec_id: str) -> None:
    size = os.get_terminal_size(sys.stdin.fileno())
    with suppress(SandboxError):  # it has ended
        await engine.call(
            lambda client: client.exec_resize(exec_id, height=size.lines, width=size.columns), "told the window's size"
        )


@contextmanager
def _raw(terminal: bool) -> Generator[None]:
    if not terminal:
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin.fileno())
    tty.setraw(sys.stdin.fileno(), termios.TCSADRAIN)  # what was typed ahead is kept
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)
