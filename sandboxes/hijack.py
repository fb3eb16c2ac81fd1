"""Raw streams of a Docker engine: its HTTP connection, taken over for the input and output of a process.

docker-py offers the same, but reads the head through a buffer and then the socket beneath it, so that whatever came
together with the head is lost (docker-py#3332). Here the head is read from the very stream that is handed out, and what
follows it is kept.

The engine multiplexes standard output and standard error: eight bytes (stream, three zeros, length), then the payload.
The lengths are the engine's, not the sandbox's, and still nothing is reserved by them: a payload is passed on in the
pieces in which it comes.
"""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import anyio
from anyio.abc import ByteStream

from ridethrough.runtime.errors import ConfigError, SandboxGone, SandboxUnavailable
from ridethrough.sandboxes.sockets import connect_unix

STDOUT: Final = 1
STDERR: Final = 2
_SYSTEM: Final = 3
"""What the engine itself has to say about the stream."""

HEAD_LIMIT: Final = 64 * 1024
KEPT_STDERR: Final = 4096
ANSWER_SECONDS: Final = 30.0
"""How long the engine may take to answer."""
_PIECE: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class Address:
    """Where an engine listens: a socket's path, or host and port."""

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def of(cls, url: str | None = None) -> Address:
        """The address that ``url``, else ``DOCKER_HOST``, else the engine's own default names.

        Raises:
            ConfigError: a scheme that cannot be spoken.
        """
        url = url or os.environ.get("DOCKER_HOST") or _default()
        parts = urlsplit(url)
        if parts.scheme in ("unix", "http+unix"):
            return cls(path=url.partition("://")[2])
        if parts.scheme in ("tcp", "http") and not os.environ.get("DOCKER_TLS_VERIFY"):
            return cls(host=parts.hostname or "127.0.0.1", port=parts.port or 2375)
        raise ConfigError(
            f"the engine's address {url} cannot be spoken to: use a unix socket or plain tcp on a trusted network. An "
            f"engine behind ssh or TLS is reached by forwarding its socket: ssh -nNT -L /run/user/me/docker.sock:"
            f"/var/run/docker.sock HOST, then DOCKER_HOST=unix:///run/user/me/docker.sock"
        )

    def __str__(self) -> str:
        return f"unix://{self.path}" if self.path else f"tcp://{self.host}:{self.port}"

    def knock(self) -> None:
        """See whether anybody listens at a socket, in a worker thread: docker-py leaves it open when nobody does.

        Raises:
            OSError: nobody does.
        """
        if self.path:
            with socket.socket(socket.AF_UNIX) as door:
                door.settimeout(ANSWER_SECONDS)
                door.connect(self.path)

    async def connect(self) -> ByteStream:
        """A connection to the engine.

        Raises:
            SandboxUnavailable: nobody listens there, or we may not speak to it.
        """
        try:
            if self.path:
                return await connect_unix(self.path)
            return await anyio.connect_tcp(self.host, self.port)
        except OSError as error:
            raise unreachable(self, error) from error


def _default() -> str:
    """The engine's own socket, or that of a rootless engine where there is only one."""
    rootless = Path(os.environ.get("XDG_RUNTIME_DIR", "/nonexistent")) / "docker.sock"
    if not Path("/var/run/docker.sock").exists() and rootless.exists():
        return f"unix://{rootless}"
    return "unix:///var/run/docker.sock"


def unreachable(address: Address, error: BaseException) -> SandboxUnavailable:
    """The error of an engine that cannot be asked, with what to do about it."""
    causes = " ".join(_texts(error)).lower()
    if "permission denied" in causes:
        what = "this user may not use its socket: add the user to the group docker (and log in anew), or run as root"
    elif "timed out" in causes or "timeout" in causes:
        what = "it does not answer in time: look at its log, or restart it"
    else:
        what = "it is not running: start Docker (in the repository: make engine), or set DOCKER_HOST"
    return SandboxUnavailable(f"the Docker engine at {address} cannot be used: {what}")


def _texts(error: BaseException | None) -> Iterator[str]:
    seen = 0
    while error is not None and seen < 10:
        yield f"{type(error).__name__} {error}"
        error, seen = error.__cause__ or error.__context__, seen + 1


class Frames:
    """Takes the engine's multiplexed bytes apart, in whatever pieces they come."""

    def __init__(self) -> None:
        self._head = b""
        self._stream = 0
        self._left = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The payloads in ``data``, each with its stream.

        Raises:
            anyio.BrokenResourceError: it is no multiplexed stream.
        """
        at = 0
        while at < len(data):
            if self._left:
                piece = data[at : at + self._left]
                at, self._left = at + len(piece), self._left - len(piece)
                yield self._stream, piece
            else:
                taken = data[at : at + 8 - len(self._head)]
                at, self._head = at + len(taken), self._head + taken
                if len(self._head) == 8:
                    self._begin()

    def _begin(self) -> None:
        head, self._head = self._head, b""
        if head[0] > _SYSTEM or head[1:4] != b"\0\0\0":
            raise anyio.BrokenResourceError(f"the engine's stream is no multiplexed one: {head!r}")
        self._stream, self._left = head[0], int.from_bytes(head[4:], "big")


class EngineStream(ByteStream):
    """The input and output of a process in a container. As a byte stream it gives standard output; the end of standard
    error is kept for messages in ``stderr``.

    Attributes:
        exec_id: The engine's name of the process; empty for a container's main process.
        stderr: The last 4 KiB of standard error.
        heard: Whether anything has come on standard output.
        end_mark: What ends standard output when it is read on standard error; nothing does where it is empty.
    """

    def __init__(self, connection: ByteStream, first: bytes, exec_id: str = "") -> None:
        """``first`` came together with the head."""
        self.exec_id = exec_id
        self.stderr = b""
        self.end_mark = b""
        self.heard = False
        self._connection = connection
        self._first = first
        self._frames = Frames()
        self._ready: deque[tuple[int, bytes]] = deque()
        self._rest = b""

    async def frame(self) -> tuple[int, bytes]:
        """The next piece of output: its stream (``STDOUT``, ``STDERR``) and its bytes.

        Raises:
            anyio.EndOfStream: the process has ended, or the engine has.
            anyio.BrokenResourceError: the connection is broken.
        """
        while not self._ready:
            self._ready.extend(self._frames.feed(await self._more()))
        stream, data = self._ready.popleft()
        if stream != STDOUT:
            self.stderr = (self.stderr + data[-KEPT_STDERR:])[-KEPT_STDERR:]
            stream = STDERR
        return stream, data

    async def _more(self) -> bytes:
        if self._first:
            first, self._first = self._first, b""
            return first
        return await self._connection.receive(_PIECE)

    async def terminal(self) -> bytes:
        """The next output of a process on a terminal, whose stream is not multiplexed.

        Raises:
            anyio.EndOfStream, anyio.BrokenResourceError: as for ``frame``.
        """
        return await self._more()

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Standard output, as it comes."""
        while not self._rest:
            stream, data = await self.frame()
            if stream == STDOUT:
                self.heard = True
                self._rest = data
            elif self.end_mark and self.end_mark in self.stderr:
                raise anyio.EndOfStream
        data, self._rest = self._rest[:max_bytes], self._rest[max_bytes:]
        return data

    async def send(self, item: bytes) -> None:
        """Write to standard input."""
        await self._connection.send(item)

    async def send_eof(self) -> None:
        """End standard input."""
        await self._connection.send_eof()

    async def aclose(self) -> None:
        """Let go of the process; that does not end it."""
        await self._connection.aclose()


async def hijack(address: Address, path: str, body: dict[str, object], exec_id: str = "") -> EngineStream:
    """Ask the engine for the stream behind ``path``.

    Raises:
        SandboxUnavailable: the engine cannot be asked.
        SandboxGone: there is no such container, it does not run, or the engine refuses.
    """
    with anyio.move_on_after(ANSWER_SECONDS):
        connection = await address.connect()
        try:
            return EngineStream(connection, await _upgraded(connection, path, body), exec_id)
        except BaseException as error:
            await anyio.aclose_forcefully(connection)
            if isinstance(error, anyio.EndOfStream | anyio.BrokenResourceError):
                raise unreachable(address, error) from error
            raise
    raise unreachable(address, TimeoutError("timed out"))


async def _upgraded(connection: ByteStream, path: str, body: dict[str, object]) -> bytes:
    """Send the request and read the head of the answer; what came after it."""
    data = json.dumps(body).encode()
    await connection.send(
        f"POST {path} HTTP/1.1\r\nHost: docker\r\nUser-Agent: ridethrough\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    got = b""
    while b"\r\n\r\n" not in got:
        if len(got) > HEAD_LIMIT:
            raise anyio.BrokenResourceError("the head of the engine's answer has no end")
        got += await connection.receive()
    head, _, rest = got.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if status not in ([b"101"], [b"200"]):
        raise SandboxGone(f"the engine gives no stream: {await _refusal(connection, rest)}")
    return rest


async def _refusal(connection: ByteStream, rest: bytes) -> str:
    """What the engine says in the body of a refusal, as far as it comes within a moment."""
    with anyio.move_on_after(1.0):
        while b"}" not in rest and len(rest) < HEAD_LIMIT:
            try:
                rest += await connection.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                break
    text = rest.decode("utf-8", "replace").strip()
    try:
        return str(json.loads(text[text.index("{") : text.rindex("}") + 1])["message"])
    except (ValueError, KeyError, TypeError):
        return text[:500] or "without a reason"
