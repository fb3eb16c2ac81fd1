"""The way out of real containers: through the proxy or not at all."""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from tests.sandboxes.conftest import SESSION
from tests.sandboxes.origins import Origins, origins

from ridethrough.sandboxes.docker import DockerHost
from ridethrough.sandboxes.egress.audit import REASONS, Decision
from ridethrough.sandboxes.egress.egress import Egress
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import Sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.processes]

GATEWAY = "172.17.0.1"
INSIDE = """
import json, socket, ssl, sys, urllib.error, urllib.request

def direct(family, *address):
    with socket.socket(family) as tried:
        tried.settimeout(5)
        tried.connect(address)

def raw():
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)

def udp(host):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as tried:
        tried.sendto(b"?", (host, 53))

def fetch(url):
    context = ssl.create_default_context(cafile="ca.pem")
    with urllib.request.urlopen(url, timeout=20, context=context) as answer:
        return answer.read().decode()

def ask(url):
    proxy = socket.create_connection(("127.0.0.1", 3128), 20)
    proxy.sendall(f"GET {url} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n".encode())
    return b"".join(iter(lambda: proxy.recv(65536), b"")).decode()

def greet(authority, name):
    proxy = socket.create_connection(("127.0.0.1", 3128), 20)
    proxy.sendall(f"CONNECT {authority} HTTP/1.1\\r\\n\\r\\n".encode())
    assert b" 200 " in proxy.recv(65536)
    context = ssl.create_default_context(cafile="ca.pem")
    return context.wrap_socket(proxy, server_hostname=name).version()

def said(call):
    try:
        return str(eval(call))
    except urllib.error.HTTPError as error:
        return f"{error.code}: {error.read().decode()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"

print(json.dumps([said(call) for call in json.load(sys.stdin)]))
"""


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Generator[Origins]:
    with origins(tmp_path_factory.mktemp("origins")) as found:
        yield found


@dataclass
class Box:
    """A container, and what was put down of it."""

    sandbox: Sandbox
    egress: Egress
    told: list[Decision]

    async def said(self, *calls: str) -> list[str]:
        """What each expression gives inside, or how it fails."""
        result = await self.sandbox.exec(["python3", "-c", INSIDE], stdin=json.dumps(calls), timeout=60)
        assert result.exit_code == 0, result.stderr
        found: list[str] = json.loads(result.stdout)
        return found

    async def decisions(self) -> list[Decision]:
        await self.egress.flush()
        found, self.told[:] = list(self.told), []
        return found


@asynccontextmanager
async def container(web: Origins, profile: SandboxProfile, **options: Any) -> AsyncGenerator[Box]:
    told: list[Decision] = []
    options = {"hosts_file": web.hosts_file, "nameservers": ("127.0.0.1",), **options}
    async with Egress.open(on_decision=told.append, cafile=web.cafile, **options) as egress:
        async with DockerHost.open(egress.relay_for, labels=SESSION) as host:
            sandbox = await host.create(profile, id=f"egress-{secrets.token_hex(4)}")
            try:
                await sandbox.write("ca.pem", web.cafile.read_bytes())
                yield Box(sandbox, egress, told)
            finally:
                await sandbox.aclose()


def profile(web: Origins, image: str) -> SandboxProfile:
    hosts = ("good.test", "api.test", "other.test", "private.test", "metadata.test")
    network = tuple(f"{host}:{port}" for host in hosts for port in (web.http, web.https))
    return SandboxProfile(
        image=image,
        network=network,
        private_hosts=("good.test", "api.test", "other.test"),
        inject={"api.test": {"Authorization": "Bearer env:EGRESS_SECRET"}},
    )


@contextmanager
def everywhere() -> Generator[int]:
    """A port that is listened on at every address of this machine."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        yield int(server.getsockname()[1])


@pytest.mark.usefixtures("engine")
async def test_a_sandbox_reaches_what_is_on_its_list_and_nothing_else(
    web: Origins, python_image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EGRESS_SECRET", "open sesame")
    async with container(web, profile(web, python_image)) as box:
        await _allowed(box, web)
        await _refused(box, web)
        await _no_way_around(box, web)
        searched = await box.sandbox.exec(["sh", "-c", "env; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline; mount"])
        assert "sesame" not in searched.stdout


async def _allowed(box: Box, web: Origins) -> None:
    plain, tls, injected, greeted = await box.said(
        f"fetch('http://good.test:{web.http}/a')",
        f"fetch('https://good.test:{web.https}/b')",
        f"fetch('http://api.test:{web.https}/c')",
        f"greet('good.test:{web.https}', 'good.test')",
    )
    assert plain.startswith("GET /a HTTP/1.1")
    assert tls.startswith("GET /b HTTP/1.1")
    assert "authorization: bearer open sesame" in injected.lower()
    assert greeted.startswith("TLSv1")
    decisions = await box.decisions()
    assert [(each.method, each.host, each.allowed) for each in decisions] == [
        ("GET", "good.test", True),
        ("CONNECT", "good.test", True),
        ("GET", "api.test", True),
        ("CONNECT", "good.test", True),
    ]
    assert {each.sandbox_id for each in decisions} == {box.sandbox.id}


async def _refused(box: Box, web: Origins) -> None:
    targets = {
        f"127.0.0.1:{web.http}": "name",
        f"{GATEWAY}:{web.http}": "name",
        "169.254.169.254": "name",
        f"[::1]:{web.http}": "name",
        "bad.test": "name",
        "good.test:22": "port",
        f"private.test:{web.http}": "private",
        f"metadata.test:{web.http}": "never",
    }
    for target, said in zip(targets, await box.said(*(f"ask('http://{each}/')" for each in targets)), strict=True):
        assert said.startswith("HTTP/1.1 403 "), (target, said)
    assert [each.reason for each in await box.decisions()] == [REASONS[rule] for rule in targets.values()]
    (tunnel, other) = await box.said(
        f"fetch('https://private.test:{web.https}/')", f"greet('good.test:{web.https}', 'other.test')"
    )
    assert "Tunnel connection failed: 403 Forbidden" in tunnel
    assert "EOF" in other or "reset" in other
    private, sni = await box.decisions()
    assert (private.reason, private.allowed) == (REASONS["private"], False)
    assert (sni.reason, sni.allowed) == (f"{REASONS['sni']}: other.test", False)


async def _no_way_around(box: Box, web: Origins) -> None:
    with everywhere() as port:
        calls = [
            f"direct(socket.AF_INET, '127.0.0.1', {web.http})",
            f"direct(socket.AF_INET, '127.0.0.1', {port})",
            f"direct(socket.AF_INET, '{GATEWAY}', {port})",
            f"direct(socket.AF_INET, '172.17.0.2', {port})",
            "direct(socket.AF_INET, '169.254.169.254', 80)",
            f"direct(socket.AF_INET6, '::1', {port})",
            f"direct(socket.AF_INET6, '::ffff:{GATEWAY}', {port})",
            "direct(socket.AF_INET6, 'fe80::1', 80)",
            "direct(socket.AF_UNIX, '/var/run/docker.sock')".replace("'/var", "*['/var").replace("sock')", "sock'])"),
            f"socket.getaddrinfo('good.test', {web.http})",
            f"udp('{GATEWAY}')",
            "raw()",
        ]
        for call, said in zip(calls, await box.said(*calls), strict=True):
            assert "Error" in said or "gaierror" in said, (call, said)
    assert await box.decisions() == []


NAMESERVER = """
import socket, struct
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.13.53", 53))
print("serving", flush=True)
while True:
    data, client = server.recvfrom(4096)
    labels, at = [], 12
    while data[at]:
        labels.append(data[at + 1 : at + 1 + data[at]].decode())
        at += 1 + data[at]
    kind = struct.unpack(">H", data[at + 1 : at + 3])[0]
    print(".".join(labels).lower(), flush=True)
    known = {"one": ["127.0.0.1"], "both": ["127.0.0.1", "169.254.169.254"]}
    addresses = known.get(labels[0], []) if kind == 1 else []
    answers = b"".join(b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\0\\0\\4" + socket.inet_aton(each) for each in addresses)
    head = data[:2] + struct.pack(">HHHHH", 0x8583 if labels[0] == "gone" else 0x8580, 1, len(addresses), 0, 0)
    server.sendto(head + data[12 : at + 5] + answers, client)
"""


@contextmanager
def nameserver(engine: Any, image: str) -> Generator[Callable[[], list[str]]]:
    """A name server on this machine's loopback (in a container, which may use port 53); gives what it was asked for."""
    on_host = engine.create_host_config(network_mode="host")
    command = ["python3", "-uc", NAMESERVER]
    made = engine.create_container(image, command, labels=SESSION, user="0", host_config=on_host)["Id"]
    try:
        engine.start(made)
        with closing(engine.logs(made, stream=True, follow=True)) as said:
            next(said)
        yield lambda: engine.logs(made).decode().split()[1:]
    finally:
        engine.remove_container(made, force=True)


async def test_one_forbidden_address_forbids_a_name_and_names_off_the_list_are_not_looked_up(
    web: Origins, engine: Any, python_image: str
) -> None:
    """Or they could carry data to whoever serves them."""
    names = [f"{name}.names.test" for name in ("one", "both", "gone", "data")]
    network = tuple(f"{name}:{web.http}" for name in names[:3])
    listed = SandboxProfile(image=python_image, network=network, private_hosts=(".names.test",))
    with nameserver(engine, python_image) as asked:
        async with container(web, listed, hosts_file=None, nameservers=("127.0.13.53",)) as box:
            said = await box.said(*(f"fetch('http://{name}:{web.http}/')" for name in names))
            decisions = await box.decisions()
        assert set(asked()) == set(names[:3])
    assert [each.partition(" ")[0] for each in said] == ["GET", "403:", "502:", "403:"]
    assert [each.reason for each in decisions] == [
        "",
        REASONS["never"],
        "its address could not be found",
        REASONS["name"],
    ]


async def test_without_a_network_there_is_no_proxy(web: Origins, python_image: str, engine: Any) -> None:
    async with container(web, replace(SandboxProfile(), image=python_image)) as box:
        (said,) = await box.said("direct(socket.AF_INET, '127.0.0.1', 3128)")
    assert "ConnectionRefusedError" in said
