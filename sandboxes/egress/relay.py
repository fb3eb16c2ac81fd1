"""Two byte streams made one, and the answer to those who get no second one."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import anyio
from anyio.abc import ByteStream

ANSWER_SECONDS: Final = 5.0
"""How long the telling of a refusal may take, and the end of a connection."""

_REFUSED: Final = b"HTTP/1.1 407 Proxy Authentication Required\r\n"
_FORBIDDEN: Final = b"HTTP/1.1 403 Forbidden\r\n"
_GONE: Final = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, OSError)
"""A stream that has ended or broke; ``send_eof`` raises what the system says of it."""


async def join(inside: ByteStream, proxy: ByteStream) -> None:
    """Carry bytes in both directions until the proxy has ended its own, or one is broken.

    What the sandbox ends is told to the proxy, which ends the rest: no program in a sandbox can hold a connection that
    the proxy has given up. The proxy's first answer may be a refusal with the status that ``rules.py`` explains; it is
    put right.
    """
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_carry, inside, proxy, tasks.cancel_scope)
        tasks.start_soon(_answer, proxy, inside, tasks.cancel_scope)


async def _answer(proxy: ByteStream, inside: ByteStream, scope: anyio.CancelScope) -> None:
    with suppress(*_GONE):
        first = await proxy.receive()
        while len(first) < len(_REFUSED) and _REFUSED.startswith(first):
            first += await proxy.receive()
        if first.startswith(_REFUSED):
            first = _FORBIDDEN + first.removeprefix(_REFUSED)
        await inside.send(first)
    await _carry(proxy, inside, scope)
    scope.cancel()


async def _carry(source: ByteStream, target: ByteStream, scope: anyio.CancelScope) -> None:
    try:
        while True:
            await target.send(await source.receive())
    except anyio.EndOfStream:
        with suppress(*_GONE):
            await target.send_eof()
            return
    except _GONE:
        pass
    scope.cancel()


async def refuse(inside: ByteStream, status: str, text: str) -> None:
    """Answer whatever is asked with ``status`` (number and phrase) and ``text``.

    The request is read as far as it is there, so that the answer is not lost to a connection that is reset.
    """
    body = f"{text}\n".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with anyio.move_on_after(ANSWER_SECONDS), suppress(*_GONE):
        await inside.receive()
        await inside.send(head.encode() + body)
        await inside.send_eof()


async def close(stream: ByteStream) -> None:
    """Close a stream, without patience."""
    with anyio.CancelScope(shield=True), anyio.move_on_after(ANSWER_SECONDS, shield=True), suppress(*_GONE):
        await stream.aclose()
