"""Servers on loopback that stand for the machines that a sandbox may or may not reach, and a client to speak to relays.

Their names are given by a hosts file; as loopback is private, they have to be in ``private_hosts``.
"""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar

import anyio
from anyio.abc import UNIXSocketStream

from ridethrough.runtime.threads import run_in_thread
from ridethrough.sandboxes.sandbox import Relay

T = TypeVar("T")
SECONDS = 30.0
NAMES = ("good.test", "api.test", "other.test", "deep.good.test")


class _Echo(BaseHTTPRequestHandler):
    """Answers with the request as it came."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = f"{self.requestline}\n{self.headers}".encode()
        self.server.asked.append(body.decode())  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Echo)
        self.asked: list[str] = []

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # who hangs up is tested, not this server


@dataclass
class Origins:
    """A plain server, a TLS server whose certificate has all of ``NAMES``, and the files that lead to them."""

    plain: _Quiet
    tls: _Quiet
    hosts_file: Path
    cafile: Path
    extra: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def http(self) -> int:
        """Port of the plain server."""
        return int(self.plain.server_address[1])

    @property
    def https(self) -> int:
        """Port of the TLS server."""
        return int(self.tls.server_address[1])


@contextmanager
def origins(folder: Path) -> Generator[Origins]:
    """Serve until the end of the block."""
    certificate, key, cafile = _certificates(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    plain, tls = _Quiet(), _Quiet()
    tls.socket = context.wrap_socket(tls.socket, server_side=True, do_handshake_on_connect=False)
    hosts = folder / "hosts"
    hosts.write_text(
        f"127.0.0.1 {' '.join(NAMES)} private.test\n169.254.169.254 metadata.test\n0.0.0.0 nowhere.test\n"
        "10.1.2.3 inner.test\n::1 six.test\nfe80::1 link.test\n64:ff9b::7f00:1 nat64.test\n"
        "::ffff:127.0.0.1 mapped.test\n2002:7f00:1::1 sixtofour.test\nfd00:ec2::254 metadata6.test\n"
        "224.0.0.1 many.test\n168.63.129.16 wire.test\n::7f00:1 compatible.test\n"
    )
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in (plain, tls)]
    for thread in threads:
        thread.start()
    try:
        yield Origins(plain, tls, hosts, cafile)
    finally:
        for server, thread in zip((plain, tls), threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def _certificates(folder: Path) -> tuple[Path, Path, Path]:
    names = ",".join(f"DNS:{name}" for name in NAMES)
    (folder / "names").write_text(f"subjectAltName={names}")
    _openssl(folder, "req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 2 -subj /CN=authority "
                     "-keyout ca.key -out ca.pem")  # fmt: skip
    _openssl(folder, "req -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -subj /CN=good.test "
                     "-keyout server.key -out server.csr")  # fmt: skip
    _openssl(folder, "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names "
                     "-out server.pem")  # fmt: skip
    return folder / "server.pem", folder / "server.key", folder / "ca.pem"


def _openssl(folder: Path, command: str) -> None:
    subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)


# --- what a program in a sandbox would do ---------------------------------------------------------------------------


@asynccontextmanager
async def connected(relay: Relay) -> AsyncGenerator[socket.socket]:
    """A blocking socket whose other end the relay serves."""
    ours, theirs = socket.socketpair()
    ours.settimeout(SECONDS)
    stream = await UNIXSocketStream.from_socket(theirs)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_served, relay, stream)
        with ours:
            yield ours


async def _served(relay: Relay, stream: UNIXSocketStream) -> None:
    await relay(stream)


async def during(relay: Relay, work: Callable[[socket.socket], T]) -> T:
    """Do ``work`` with a connection, in a thread."""
    async with connected(relay) as connection:
        return await run_in_thread(lambda: work(connection))


async def ask(relay: Relay, request: bytes | str) -> bytes:
    """Send bytes; all that comes back until the end of the connection."""
    data = request.encode() if isinstance(request, str) else request
    return await during(relay, lambda connection: _exchange(connection, data))


def _exchange(connection: socket.socket, data: bytes) -> bytes:
    with suppress(OSError):  # the other side has heard enough
        connection.sendall(data)
    return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    """All that comes until the end; a reset is one."""
    pieces: list[bytes] = []
    try:
        while piece := connection.recv(65536):
            pieces.append(piece)
    except (ConnectionResetError, ssl.SSLError):
        pass
    return b"".join(pieces)


def get(url: str, *headers: str) -> str:
    """A request in plain, after which the connection ends."""
    return "\r\n".join([f"GET {url} HTTP/1.1", "Host: x", *headers, "Connection: close", "", ""])


async def tunnel(relay: Relay, authority: str, sni: str | None, cafile: Path) -> str:
    """Ask for ``/`` over TLS through CONNECT: what came back, or how it failed."""
    return await during(relay, lambda connection: _tunnel(connection, authority, sni, cafile))


def _tunnel(connection: socket.socket, authority: str, sni: str | None, cafile: Path) -> str:
    connection.sendall(f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode())
    head = b""
    while b"\r\n\r\n" not in head:
        head += (piece := connection.recv(1))
        if not piece:
            return "ended"
    if b" 200 " not in head.partition(b"\r\n")[0]:
        return head.partition(b"\r\n")[0].decode()
    context = ssl.create_default_context(cafile=str(cafile))
    context.check_hostname = sni is not None
    try:
        with context.wrap_socket(connection, server_hostname=sni) as secure:
            secure.sendall(get("/").encode())
            return read_all(secure).decode()
    except (ssl.SSLError, OSError) as error:
        return f"no TLS: {type(error).__name__}"
