"""The transport, against real sockets that do what servers and networks do."""

from __future__ import annotations

import gc
import gzip
import shutil
import socket
import ssl
import struct
import subprocess
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.tls import TLSListener

from ridethrough.runtime.errors import ConfigError, Slow, Transport, UsageError
from ridethrough.runtime.router import transport
from ridethrough.runtime.router.address import joined, parsed, proxy_for
from ridethrough.runtime.router.transport import Connections, Deadline, is_loopback

pytestmark = pytest.mark.anyio
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


# --- a server that does as it is told -------------------------------------------------------------------------------


@dataclass
class Visit:
    """One connection to the server; ``number`` counts them from 1."""

    stream: ByteStream
    number: int
    heads: list[str] = field(default_factory=list[str])
    bodies: list[bytes] = field(default_factory=list[bytes])
    _rest: bytes = b""

    async def request(self) -> bool:
        """Read one request; ``False`` when the client has closed the connection."""
        try:
            while b"\r\n\r\n" not in self._rest:
                self._rest += await self.stream.receive()
            head, _, rest = self._rest.partition(b"\r\n\r\n")
            length = next(
                (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
            )
            while len(rest) < length:
                rest += await self.stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return False
        self.heads.append(head.decode())
        self.bodies.append(rest[:length])
        self._rest = rest[length:]
        return True

    async def answer(self, body: bytes = b"hello", headers: str = "", status: str = "200 OK") -> None:
        head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
        await self.stream.send(head.encode() + body)

    async def reset(self) -> None:
        """Close with RST instead of FIN, as a crashed host or a load balancer does."""
        raw = self.stream.extra(SocketAttribute.raw_socket)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await anyio.aclose_forcefully(self.stream)


@dataclass
class Server:
    port: int
    visits: list[Visit]
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/v1"

    @property
    def heads(self) -> list[str]:
        return [head for visit in self.visits for head in visit.heads]


Handler = Callable[[Visit], Awaitable[None]]


@asynccontextmanager
async def serving(
    handle: Callable[[Visit], Awaitable[None]], tls: ssl.SSLContext | None = None
) -> AsyncGenerator[Server]:
    """Run ``handle`` for each connection; it is closed when ``handle`` returns."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    server = Server(listener.extra(SocketAttribute.local_port), [], "https" if tls else "http")

    async def accept(stream: ByteStream) -> None:
        visit = Visit(stream, len(server.visits) + 1)
        server.visits.append(visit)
        async with stream:
            await handle(visit)

    accepting = TLSListener(listener, tls, standard_compatible=False) if tls else listener
    async with accepting, anyio.create_task_group() as group:
        group.start_soon(accepting.serve, accept)
        yield server
        group.cancel_scope.cancel()


async def polite(visit: Visit) -> None:
    while await visit.request():
        await visit.answer()


def within(seconds: float, phase: str = "total") -> Deadline:
    return Deadline(anyio.current_time() + seconds, phase)


async def ask(
    connections: Connections,
    body: bytes = b"{}",
    *,
    path: str = "chat",
    seconds: float = 20,
    connect: float = 20,
    headers: dict[str, str] | None = None,
) -> bytes:
    deadline = within(seconds)
    async with connections.post(path, body, headers or {}, connect=connect, deadline=deadline, deployment="a") as reply:
        assert reply.status == 200
        return await reply.body(deadline)


async def failure(connections: Connections, **how: float) -> Transport:
    with pytest.raises(Transport) as caught:
        await ask(connections, **how)  # type: ignore[arg-type]
    assert caught.value.deployment == "a"
    return caught.value


# --- what is sent and what comes back -------------------------------------------------------------------------------


async def test_a_request_and_its_answer() -> None:
    async def handle(visit: Visit) -> None:
        await visit.request()
        await visit.answer(b"[1]", "Content-Type: application/JSON; charset=utf-8\r\nX-A: 1\r\nx-a: 2\r\n", "201 Made")

    async with serving(handle) as server, Connections(server.url) as connections:
        deadline = within(20)
        async with connections.post(
            "chat/completions", b'{"a":1}', {"X-Key": "k"}, connect=5, deadline=deadline, deployment="a"
        ) as reply:
            assert connections.in_flight == 1
            assert (reply.status, reply.content_type) == (201, "application/json")
            assert reply.headers["x-a"] == "1, 2"
            assert await reply.chunk(deadline) == b"[1]"
            assert await reply.chunk(deadline) is None
            assert await reply.chunk(deadline) is None
        assert connections.in_flight == 0
    (head,) = server.heads
    first, *fields = head.split("\r\n")
    assert first == "POST /v1/chat/completions HTTP/1.1"
    sent = {field.lower() for field in fields}
    assert {f"host: 127.0.0.1:{server.port}", "content-length: 7", "x-key: k", "user-agent: ridethrough"} <= sent
    assert server.visits[0].bodies == [b'{"a":1}']


async def test_get_has_no_body() -> None:
    async with serving(polite) as server, Connections(server.url) as connections:
        deadline = within(20)
        async with connections.get("models", {}, connect=5, deadline=deadline, deployment="a") as reply:
            assert await reply.body(deadline) == b"hello"
    assert server.heads[0].startswith("GET /v1/models HTTP/1.1\r\n")
    assert "content-length" not in server.heads[0]


@pytest.mark.parametrize(
    ("base", "path", "whole"),
    [
        ("http://h/v1", "chat", "http://h/v1/chat"),
        ("http://h/v1/", "/chat", "http://h/v1/chat"),
        ("http://h", "chat?alt=sse", "http://h/chat?alt=sse"),
        ("http://h/v1/#part", "", "http://h/v1"),
        ("https://h/openai/gpt?api-version=1", "chat", "https://h/openai/gpt/chat?api-version=1"),
        ("https://h/v1?api-version=1", "m:stream?alt=sse", "https://h/v1/m:stream?api-version=1&alt=sse"),
    ],
)
def test_paths_are_joined(base: str, path: str, whole: str) -> None:
    assert joined(base, path) == whole


async def test_what_urls_cannot_hold_is_quoted() -> None:
    async with serving(polite) as server, Connections(f"http://u%40:p@127.0.0.1:{server.port}") as connections:
        assert await ask(connections, path="models/ü b%20c?q=ü") == b"hello"
        assert await ask(connections, path="", headers={"Authorization": "Bearer k"}) == b"hello"
    first, second = server.heads
    assert first.startswith("POST /models/%C3%BC%20b%20c?q=%C3%BC HTTP/1.1\r\n")
    assert f"host: 127.0.0.1:{server.port}\r\n" in first.lower()
    assert "authorization: Basic dUA6cA==" in first
    assert second.startswith("POST / HTTP/1.1\r\n")
    assert "authorization: Bearer k" in second


BROKEN = ("ftp://u:secret@h", "h/v1", "http://", "http://u:secret@h:99999", "http://[::1", "http://u:secret@[::1")


@pytest.mark.parametrize("url", BROKEN)
async def test_a_base_url_that_is_none_is_told_without_its_password(url: str) -> None:
    for look in (parsed, is_loopback, proxy_for):
        with pytest.raises(ConfigError, match="base_url") as caught:
            look(url)
        assert "secret" not in str(caught.value)
    async with Connections(url) as connections:
        error = await failure(connections)
        assert error.phase == "connect"
        assert "base_url" in error.message
        assert "secret" not in error.message


async def test_an_address_that_cannot_be_one() -> None:
    async with Connections("http://" + "h" * 70 + ".example") as connections:
        assert (await failure(connections)).phase == "connect"
    async with Connections("http://127.0.0.1") as connections:
        with pytest.raises(Transport) as caught:
            await ask(connections, path="a\nb")
        assert caught.value.phase == "connect"


def test_this_machine() -> None:
    assert is_loopback("http://localhost:1/v1")
    assert is_loopback("https://[::1]")
    assert not is_loopback("http://10.0.0.1")


async def test_a_header_that_cannot_be_sent_is_named_without_its_value() -> None:
    async with serving(polite) as server, Connections(server.url) as connections:
        for bad in ({"authorization": "Bearer sk-secret\n"}, {"x-key": " sk-secret"}, {"x\r\ny": "sk-secret"}):
            with pytest.raises(ConfigError) as caught:
                await ask(connections, headers=bad)
            assert "secret" not in repr(caught.value) + repr(caught.value.__cause__)
        assert await ask(connections) == b"hello"


async def test_connections_have_to_be_open() -> None:
    with pytest.raises(UsageError):
        await ask(Connections("http://127.0.0.1:9"))


async def test_interim_answers_are_passed_over() -> None:
    async def handle(visit: Visit) -> None:
        await visit.request()
        await visit.stream.send(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")
        await visit.answer()

    async with serving(handle) as server, Connections(server.url) as connections:
        assert await ask(connections) == b"hello"


async def test_an_answer_that_ends_with_its_connection() -> None:
    async def handle(visit: Visit) -> None:
        await visit.request()
        await visit.stream.send(b"HTTP/1.1 200 OK\r\n\r\nuntil the end")

    async with serving(handle) as server, Connections(server.url) as connections:
        assert await ask(connections) == b"until the end"
        assert await ask(connections) == b"until the end"
        assert len(server.visits) == 2


async def test_pieces_come_as_they_are_sent() -> None:
    sent, taken = anyio.Event(), anyio.Event()

    async def handle(visit: Visit) -> None:
        await visit.request()
        await visit.stream.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n")
        sent.set()
        await taken.wait()
        await visit.stream.send(b"5\r\nthree\r\n0\r\n\r\n")
        await visit.request()

    async with serving(handle) as server, Connections(server.url) as connections:
        async with connections.post("c", b"", {}, connect=5, deadline=within(20), deployment="a") as reply:
            await sent.wait()
            assert await reply.chunk(within(20)) == b"one"
            assert await reply.chunk(within(20)) == b"two"
            taken.set()
            assert await reply.chunk(within(20)) == b"three"
            assert await reply.chunk(within(0)) is None  # the end came with the last piece: there is no wait for it


ENCODED = {
    "gzip": gzip.compress(b"hello " * 1000),
    "deflate": zlib.compress(b"hello " * 1000),
    "Deflate": zlib.compress(b"hello " * 1000)[2:-4],
    "gzip, deflate": zlib.compress(gzip.compress(b"hello " * 1000)),
    "identity": b"hello " * 1000,
}


@pytest.mark.parametrize("encoding", ENCODED)
async def test_encodings_are_undone(encoding: str) -> None:
    data = ENCODED[encoding]

    async def handle(visit: Visit) -> None:
        await visit.request()
        await visit.stream.send(f"HTTP/1.1 200 OK\r\ncontent-encoding: {encoding}\r\n\r\n".encode())
        for start in range(0, len(data), 7):
            await visit.stream.send(data[start : start + 7])

    async with serving(handle) as server, Connections(server.url) as connections:
        assert await ask(connections) == b"hello " * 1000
    assert "accept-encoding: gzip, deflate" in server.heads[0]


@pytest.mark.parametrize(("encoding", "data"), [("gzip", b"not gzip"), ("deflate", b"\x07not deflate")])
async def test_a_damaged_body_is_an_error(encoding: str, data: bytes) -> None:
    async def handle(visit: Visit) -> None:
        while await visit.request():
            await visit.answer(data, f"content-encoding: {encoding}\r\n")

    async with serving(handle) as server, Connections(server.url) as connections:
        error = await failure(connections)
        assert error.phase == "read"
        assert connections.in_flight == 0


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
async def test_a_body_that_is_left_alone_is_left_to_nobody(encoding: str) -> None:
    """What the library has open is closed here: warnings are errors, and generators left behind give some."""
    data = ENCODED[encoding]

    async def handle(visit: Visit) -> None:
        await visit.request()
        await visit.stream.send(f"HTTP/1.1 200 OK\r\ncontent-encoding: {encoding}\r\n\r\n".encode() + data[:20])
        await visit.stream.send(data[20:40])
        await visit.request()

    async with serving(handle) as server, Connections(server.url) as connections:
        async with connections.post("c", b"", {}, connect=5, deadline=within(20), deployment="a") as reply:
            await reply.chunk(within(20))
        async with connections.post("c", b"", {}, connect=5, deadline=within(20), deployment="a") as reply:
            with pytest.raises(Slow):
                await reply.body(within(0.05))
        assert len(server.visits) == 2
    gc.collect()


async def test_a_body_beyond_the_limit_is_refused() -> None:
    async with serving(polite) as server, Connections(server.url) as connections:
        async with connections.post("c", b"", {}, connect=5, deadline=within(20), deployment="a") as reply:
            with pytest.raises(Transport, match="more than 4 bytes"):
                await reply.body(within(20), limit=4)


# --- the pool -------------------------------------------------------------------------------------------------------


async def test_connections_are_kept_for_the_next_call() -> None:
    async with serving(polite) as server, Connections(server.url) as connections:
        for _ in range(5):
            assert await ask(connections) == b"hello"
        assert len(server.visits) == 1


async def test_calls_at_once_have_connections_of_their_own() -> None:
    everyone = anyio.Event()

    async def handle(visit: Visit) -> None:
        while await visit.request():
            if sum(len(each.heads) for each in server.visits) == 50:
                everyone.set()
            await everyone.wait()
            await visit.answer()

    async with serving(handle) as server, Connections(server.url) as connections:
        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(ask, connections)
        assert len(server.visits) == 50
        assert await ask(connections) == b"hello"
        assert len(server.visits) == 50


async def test_no_more_connections_than_the_limit() -> None:
    async with serving(polite) as server, Connections(server.url, limit=2) as connections:
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(ask, connections)
        assert len(server.visits) == 2


async def test_waiting_for_a_connection_has_an_end() -> None:
    async with serving(polite) as server, Connections(server.url, limit=1) as connections:
        async with connections.post("c", b"", {}, connect=5, deadline=within(20), deployment="a"):
            assert (await failure(connections, connect=0.01)).phase == "pool"
            with pytest.raises(Slow):
                await ask(connections, seconds=0.01)
        assert await ask(connections) == b"hello"


async def test_a_body_that_was_not_read_to_its_end_costs_its_connection() -> None:
    async def handle(visit: Visit) -> None:
        await visit.request()
        await visit.stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n")
        await visit.request()

    async with serving(handle) as server, Connections(server.url) as connections:
        async with connections.post("c", b"", {}, connect=5, deadline=within(20), deployment="a"):
            pass
        async with connections.post("c", b"", {}, connect=5, deadline=within(20), deployment="a"):
            pass
        assert len(server.visits) == 2


async def test_kept_connections_grow_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "KEPT_SECONDS", -1.0)
    async with serving(polite) as server, Connections(server.url) as connections:
        for _ in range(3):
            assert await ask(connections) == b"hello"
        assert len(server.visits) == 3


async def test_a_crowd_has_connections_of_its_own_and_the_warmest_is_used_on() -> None:
    everyone = anyio.Event()
    asked: list[int] = []

    async def handle(visit: Visit) -> None:
        while await visit.request():
            asked.append(visit.number)
            if len(server.heads) >= 5:
                everyone.set()
            await everyone.wait()
            await visit.answer()

    async with serving(handle) as server, Connections(server.url) as connections:
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(ask, connections)
        assert len(server.visits) == 5
        for _ in range(3):
            assert await ask(connections) == b"hello"
        assert len(server.visits) == 5
        assert len(set(asked[5:])) == 1


async def test_a_call_under_way_outlives_the_connections() -> None:
    taken, gone = anyio.Event(), anyio.Event()

    async def handle(visit: Visit) -> None:
        await visit.request()
        await visit.stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\none")
        await taken.wait()
        await visit.stream.send(b"two")
        await visit.request()
        gone.set()

    async with serving(handle) as server:
        connections = Connections(server.url)
        async with AsyncExitStack() as stack:
            async with connections:
                call = connections.post("c", b"", {}, connect=5, deadline=within(20), deployment="a")
                reply = await stack.enter_async_context(call)
            taken.set()
            assert await reply.body(within(20)) == b"onetwo"
        await gone.wait()


async def test_cancelling_a_call_closes_its_connection() -> None:
    gone = anyio.Event()

    async def handle(visit: Visit) -> None:
        await visit.request()
        scope.cancel()
        await visit.request()
        gone.set()

    async with serving(handle) as server, Connections(server.url) as connections:
        with anyio.CancelScope() as scope:
            await ask(connections)
        await gone.wait()
        assert connections.in_flight == 0


# --- connections that the server closed meanwhile -------------------------------------------------------------------


async def test_a_connection_closed_while_it_rested_is_not_used() -> None:
    closed = anyio.Event()

    async def handle(visit: Visit) -> None:
        await visit.request()
        await visit.answer()
        await visit.stream.aclose()
        closed.set()

    async with serving(handle) as server, Connections(server.url) as connections:
        assert await ask(connections) == b"hello"
        await closed.wait()
        closed = anyio.Event()
        assert await ask(connections) == b"hello"
        assert [len(visit.heads) for visit in server.visits] == [1, 1]


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_kept_connection_that_closes_as_it_is_used_is_told_and_replaced(how: str) -> None:
    async def handle(visit: Visit) -> None:
        await visit.request()
        await visit.answer()
        await visit.request()
        if how == "reset":
            await visit.reset()

    async with serving(handle) as server, Connections(server.url) as connections:
        assert await ask(connections) == b"hello"
        error = await failure(connections)
        assert error.phase == "read"
        assert "may have been billed" in error.message
        assert len(server.visits) == 1
        assert await ask(connections) == b"hello"
        assert len(server.visits) == 2


# --- failures and their phases --------------------------------------------------------------------------------------


async def test_refused_connections_were_not_sent() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and not listening
        async with Connections(f"http://127.0.0.1:{taken.getsockname()[1]}") as connections:
            error = await failure(connections)
    assert error.phase == "connect"
    assert "refused" in error.message
    assert "billed" not in error.message


async def test_a_host_without_an_address_was_not_sent_to() -> None:
    async with Connections("http://nowhere.invalid") as connections:
        assert (await failure(connections)).phase == "connect"


async def test_connecting_has_its_own_deadline() -> None:
    """A listener whose backlog is full drops what comes, as a firewall does."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(address)
            async with Connections(f"http://127.0.0.1:{address[1]}") as connections:
                assert "timeouts.connect" in (await failure(connections, connect=0.05)).message
                with pytest.raises(Slow):
                    await ask(connections, seconds=0.05)
        finally:
            for filler in fillers:
                filler.close()


async def test_reset_before_the_request_was_read() -> None:
    async def handle(visit: Visit) -> None:
        await visit.stream.receive(1)
        await visit.reset()

    async with serving(handle) as server, Connections(server.url) as connections:
        with pytest.raises(Transport) as caught:
            await ask(connections, b"x" * 20_000_000)  # more than any buffer between the two holds
    assert caught.value.phase == "write"
    assert "may have been billed" in caught.value.message


async def test_reset_after_the_request_was_read() -> None:
    async def handle(visit: Visit) -> None:
        await visit.request()
        await visit.reset()

    async with serving(handle) as server, Connections(server.url) as connections:
        error = await failure(connections)
        assert error.phase == "read"
        assert "may have been billed" in error.message
        assert len(server.visits) == 1


@pytest.mark.parametrize("ending", ["close", "reset"])
async def test_a_body_that_is_cut(ending: str) -> None:
    taken = anyio.Event()

    async def handle(visit: Visit) -> None:
        await visit.request()
        await visit.stream.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        await taken.wait()
        if ending == "reset":
            await visit.reset()

    async with serving(handle) as server, Connections(server.url) as connections:
        async with connections.post("c", b"", {}, connect=5, deadline=within(20), deployment="a") as reply:
            assert await reply.chunk(within(20)) == b"one"
            taken.set()
            with pytest.raises(Transport) as caught:
                await reply.chunk(within(20))
    assert caught.value.phase == "read"
    assert {"close": "incomplete", "reset": "reset by peer"}[ending] in caught.value.message


GARBAGE = {
    "another protocol": b"SSH-2.0-OpenSSH\r\n\r\n",
    "a bad length": b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
    "an endless header": b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000,
}


@pytest.mark.parametrize("kind", GARBAGE)
async def test_what_is_no_http(kind: str) -> None:
    async def handle(visit: Visit) -> None:
        await visit.request()
        await visit.stream.send(GARBAGE[kind])
        await visit.request()

    async with serving(handle) as server, Connections(server.url) as connections:
        assert (await failure(connections)).phase == "read"


async def test_a_server_may_refuse_before_it_has_read_everything() -> None:
    async def handle(visit: Visit) -> None:
        await visit.stream.receive(1)
        await visit.answer(b"too large", "connection: close\r\n", "413 Too Large")
        await visit.request()

    async with serving(handle) as server, Connections(server.url) as connections:
        deadline = within(20)
        async with connections.post("c", b"x" * 5_000_000, {}, connect=5, deadline=deadline, deployment="a") as reply:
            assert (reply.status, await reply.body(deadline)) == (413, b"too large")


async def test_silence_ends_at_the_deadline() -> None:
    async def handle(visit: Visit) -> None:
        await visit.request()
        if visit.number == 2:
            await visit.stream.send(b"HTTP/1.1 200 OK\r\ncontent-le")  # slow headers are no answer either
        if visit.number == 3:
            await visit.stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
        await visit.request()

    async with serving(handle) as server, Connections(server.url) as connections:
        for phase in ("first_token", "total"):
            with pytest.raises(Slow) as caught:
                async with connections.post("c", b"", {}, connect=5, deadline=within(0.05, phase), deployment="a"):
                    pass
            assert caught.value.phase == phase
        async with connections.post("c", b"", {}, connect=5, deadline=within(20), deployment="a") as reply:
            assert await reply.chunk(within(20)) == b"half"
            with pytest.raises(Slow) as caught:
                await reply.chunk(within(0.05, "idle"))
            assert caught.value.phase == "idle"
        assert connections.in_flight == 0
        assert len(server.visits) == 3


# --- TLS and proxies ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that signs itself, and its key, in one file."""
    openssl = shutil.which("openssl")
    assert openssl, "these tests make a certificate with the openssl command"
    place = tmp_path_factory.mktemp("tls")
    made = place / "both.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1,DNS:model.example"]
    command += ["-keyout", str(place / "key.pem"), "-out", str(place / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)
    made.write_text((place / "key.pem").read_text() + (place / "cert.pem").read_text())
    return made


def server_context(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


async def test_a_certificate_that_nobody_vouches_for_is_refused(certificate: Path) -> None:
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    url = f"https://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"

    async def ignored(stream: ByteStream) -> None:
        raise AssertionError("the handshake must fail")

    accepting = TLSListener(listener, server_context(certificate), standard_compatible=False)
    async with accepting, anyio.create_task_group() as group, Connections(url) as connections:
        group.start_soon(accepting.serve, ignored)
        error = await failure(connections)
        assert error.phase == "connect"
        assert "certificate" in error.message
        group.cancel_scope.cancel()


async def test_a_trusted_certificate_and_a_kept_connection(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with serving(polite, server_context(certificate)) as server, Connections(server.url) as connections:
        for _ in range(3):
            assert await ask(connections, b"x" * 100_000) == b"hello"
        assert len(server.visits) == 1


async def test_a_handshake_that_is_not_answered_ends_and_is_closed() -> None:
    gone, heard = anyio.Event(), anyio.Event()

    async def handle(visit: Visit) -> None:
        await visit.stream.receive()
        heard.set()
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await visit.stream.receive()
        gone.set()

    async with serving(handle) as server, Connections(server.url.replace("http:", "https:")) as connections:
        error = await failure(connections, connect=0.3)
        assert error.phase == "connect"
        assert "timeouts.connect" in error.message
        await gone.wait()
        gone, heard = anyio.Event(), anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(ask, connections)
            await heard.wait()
            group.cancel_scope.cancel()
        await gone.wait()
    gc.collect()


async def test_a_server_that_speaks_no_tls() -> None:
    async def handle(visit: Visit) -> None:
        await visit.stream.receive()
        await visit.stream.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with serving(handle) as server:
        async with Connections(server.url.replace("http:", "https:")) as connections:
            assert (await failure(connections)).phase == "connect"


async def test_proxies_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "user:pass@proxy:3128")
    monkeypatch.setenv("ALL_PROXY", "socks5://u:secret@proxy:1080")
    monkeypatch.setenv("NO_PROXY", "internal.example,10.0.0.1")
    assert proxy_for("https://k@model.example/v1") == "http://user:pass@proxy:3128"
    assert proxy_for("https://a.internal.example:8443") is None
    assert proxy_for("https://localhost") is None
    with pytest.raises(ConfigError, match="'socks5'"):
        proxy_for("http://model.example")
    async with Connections("http://model.example") as connections:
        error = await failure(connections)
        assert error.phase == "connect"
        assert "secret" not in error.message


async def test_plain_calls_go_to_the_proxy_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(polite) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://u:p@127.0.0.1:{proxy.port}")
        async with Connections("http://model.example/v1?a=1") as connections:
            assert await ask(connections) == b"hello"
            assert await ask(connections) == b"hello"
    assert [len(visit.heads) for visit in proxy.visits] == [2]
    assert proxy.heads[0].startswith("POST http://model.example/v1/chat?a=1 HTTP/1.1\r\n")
    assert "\r\nhost: model.example\r\n" in proxy.heads[0].lower()
    assert "Proxy-Authorization: Basic dTpw" in proxy.heads[0]


async def test_secure_calls_go_through_a_tunnel(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))

    async def tunnel(visit: Visit) -> None:
        await visit.request()
        await visit.stream.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        async with await anyio.connect_tcp("127.0.0.1", server.port) as onward, anyio.create_task_group() as group:
            group.start_soon(pump, visit.stream, onward)
            await pump(onward, visit.stream)
            group.cancel_scope.cancel()

    async with serving(polite, server_context(certificate)) as server, serving(tunnel) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://u:p@127.0.0.1:{proxy.port}")
        async with Connections("https://model.example/v1") as connections:
            assert await ask(connections, headers={"authorization": "Bearer k"}) == b"hello"
            assert await ask(connections) == b"hello"
    assert len(proxy.heads) == 1
    assert proxy.heads[0].startswith("CONNECT model.example:443 HTTP/1.1\r\n")
    assert "Bearer" not in proxy.heads[0]
    assert server.heads[0].startswith("POST /v1/chat HTTP/1.1\r\n")
    assert "\r\nhost: model.example\r\n" in server.heads[0].lower()
    assert "proxy-authorization" not in server.heads[0].lower()


async def pump(source: ByteStream, sink: ByteStream) -> None:
    try:
        async for data in source:
            await sink.send(data)
    except (anyio.BrokenResourceError, anyio.ClosedResourceError):
        pass


async def test_a_proxy_that_is_silent_takes_no_longer_than_connecting_may(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(visit: Visit) -> None:
        await visit.request()
        await visit.request()

    async with serving(silent) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        async with Connections("https://model.example/v1") as connections:
            error = await failure(connections, connect=0.3)
            assert error.phase == "connect"
            assert "timeouts.connect" in error.message


async def test_a_proxy_that_is_reached_by_tls(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with serving(polite, server_context(certificate)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"https://127.0.0.1:{proxy.port}")
        async with Connections("http://model.example/v1") as connections:
            assert await ask(connections) == b"hello"
    assert proxy.heads[0].startswith("POST http://model.example/v1/chat HTTP/1.1\r\n")


async def test_a_certificate_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    async with Connections("https://127.0.0.1:9") as connections:
        error = await failure(connections)
        assert error.phase == "connect"
        assert "No such file" in error.message


async def test_a_proxy_that_refuses_was_not_sent_to(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(visit: Visit) -> None:
        await visit.request()
        if visit.number == 1:
            await visit.answer(b"", status="407 Proxy Authentication Required")

    async with serving(refuse) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://u:secret@127.0.0.1:{proxy.port}")
        async with Connections("https://model.example/v1") as connections:
            for text in ("by way of the proxy: 407", "by way of the proxy: Server disconnected"):
                error = await failure(connections)
                assert error.phase == "connect"
                assert text in error.message
                assert "secret" not in error.message
