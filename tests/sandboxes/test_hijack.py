"""The engine's streams: taken apart however they are cut, over a real socket with a stand-in for the engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from anyio.abc import ByteStream
from hypothesis import given
from hypothesis import strategies as st

from ridethrough.runtime.errors import ConfigError, SandboxGone, SandboxUnavailable
from ridethrough.sandboxes.hijack import HEAD_LIMIT, STDERR, STDOUT, Address, Frames, hijack

PIECES = st.lists(st.tuples(st.sampled_from([STDOUT, STDERR]), st.binary(max_size=50)))
UPGRADED = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\n\r\n"


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def framed(stream: int, data: bytes) -> bytes:
    return bytes([stream, 0, 0, 0]) + len(data).to_bytes(4, "big") + data


@given(PIECES, st.integers(min_value=1, max_value=20))
def test_frames_are_whole_however_they_are_cut(pieces: list[tuple[int, bytes]], size: int) -> None:
    frames, wire = Frames(), b"".join(framed(*piece) for piece in pieces)
    got = {STDOUT: b"", STDERR: b""}
    for at in range(0, len(wire), size):
        for stream, data in frames.feed(wire[at : at + size]):
            got[stream] += data
    assert got == {name: b"".join(data for stream, data in pieces if stream == name) for name in got}


def test_what_is_no_frame_is_refused() -> None:
    """And a length of 4 GiB reserves nothing: what comes is passed on as it comes."""
    for head in (b"\x07\0\0\0\0\0\0\x01", b"\x01abc\0\0\0\x01"):
        with pytest.raises(anyio.BrokenResourceError):
            list(Frames().feed(head))
    assert list(Frames().feed(b"\x01\0\0\0\xff\xff\xff\xffabc")) == [(STDOUT, b"abc")]


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets and plain tcp; what else there is says how it can be reached."""
    assert Address.of("unix:///run/x.sock").path == "/run/x.sock"
    assert str(Address.of("tcp://engine:2375")) == "tcp://engine:2375"
    monkeypatch.setenv("DOCKER_HOST", "unix:///elsewhere.sock")
    assert Address.of().path == "/elsewhere.sock"
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    for url in ("ssh://host", "tcp://host:2376", "npipe:////./pipe/x"):
        with pytest.raises(ConfigError, match="forwarding"):
            Address.of(url)


@asynccontextmanager
async def answering(folder: Path, answer: Callable[[ByteStream], Awaitable[None]]) -> AsyncGenerator[Address]:
    """Somebody who answers in the engine's place, after the request's head."""

    async def serve(client: ByteStream) -> None:
        async with client:
            await client.receive()
            await answer(client)

    async with await anyio.create_unix_listener(folder / "s") as listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        yield Address(path=str(folder / "s"))
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_what_comes_with_the_head_is_kept(tmp_path: Path) -> None:
    """docker-py loses it. Standard error is kept apart, and only its end."""

    async def answer(client: ByteStream) -> None:
        for byte in UPGRADED + framed(STDOUT, b"first"):
            await client.send(bytes([byte]))
        await client.send(framed(STDERR, b"e" * 10_000 + b"end") + framed(STDOUT, b"second"))

    async with answering(tmp_path, answer) as address, await hijack(address, "/x", {}) as stream:
        first = await stream.receive(3)
        assert len(first) <= 3
        assert first + b"".join([data async for data in stream]) == b"firstsecond"
        assert len(stream.stderr) == 4096
        assert stream.stderr.endswith(b"end")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("said", "error", "match"),
    [
        (b'HTTP/1.1 404 Not Found\r\n\r\n{"message":"no such exec"}', SandboxGone, "no such exec"),
        (b"HTTP/1.1 500 Oops\r\n\r\nno JSON", SandboxGone, "no JSON"),
        (b"HTTP/1.1 409 Conflict\r\n\r\n", SandboxGone, "without a reason"),
        (b"", SandboxUnavailable, "engine"),
        (b"x" * (HEAD_LIMIT + 100_000), SandboxUnavailable, "engine"),
    ],
    ids=["missing", "broken", "refused", "closed", "endless"],
)
async def test_refusals(tmp_path: Path, said: bytes, error: type[Exception], match: str) -> None:
    async def answer(client: ByteStream) -> None:
        try:
            await client.send(said)
        except anyio.BrokenResourceError:
            return

    async with answering(tmp_path, answer) as address:
        with pytest.raises(error, match=match):
            await hijack(address, "/x", {})
