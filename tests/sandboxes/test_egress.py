"""The way out: what is allowed, what is refused, and that all of it is on record. A real squid, real servers.

One squid serves most tests, as it serves many sandboxes: each test is a sandbox of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream
from tests.sandboxes.origins import NAMES, Origins, ask, connected, during, get, origins, read_all, tunnel

from ridethrough.runtime.errors import ConfigError, SandboxUnavailable
from ridethrough.runtime.threads import run_in_thread
from ridethrough.sandboxes.egress.audit import QUEUE, REASONS, Book, Decision, Line
from ridethrough.sandboxes.egress.egress import CONNECTIONS, Egress
from ridethrough.sandboxes.egress.policy import NEVER, PRIVATE, Entry, Policy
from ridethrough.sandboxes.egress.proxies import PROXIES, RESTARTS
from ridethrough.sandboxes.egress.squid import GUARD, Programs
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import Relay

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).resolve().parents[2]
SECRET = "a\"b\\c%d{e} #f'g"
BAD_ADDRESSES = (
    "metadata.test", "nowhere.test", "link.test", "nat64.test", "sixtofour.test", "metadata6.test", "many.test",
    "wire.test", "compatible.test",
)  # fmt: skip
PRIVATE_ADDRESSES = ("private.test", "inner.test", "six.test", "mapped.test")
_numbers = itertools.count()


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


on_one_loop = pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
"""For tables that squid works off: the loops make no difference to it."""


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Generator[Origins]:
    folder = tmp_path_factory.mktemp("origins")
    with origins(folder) as found:
        yield found


@asynccontextmanager
async def opened(web: Origins, told: list[Decision]) -> AsyncGenerator[Egress]:
    """Names come from the hosts file alone: nobody serves them on loopback."""
    nobody = ("127.0.0.1",)
    async with Egress.open(
        on_decision=told.append, hosts_file=web.hosts_file, cafile=web.cafile, nameservers=nobody
    ) as egress:
        yield egress


def profile(web: Origins) -> SandboxProfile:
    """Some may lead to private addresses, some lead to where nobody may go."""
    ports = (web.http, web.https)
    names = [*NAMES, *BAD_ADDRESSES, *PRIVATE_ADDRESSES]
    return SandboxProfile(network=tuple(f"{name}:{port}" for name in names for port in ports), private_hosts=NAMES)


class Box:
    """A sandbox with a list, and what was put down of it."""

    def __init__(self, web: Origins, egress: Egress, told: list[Decision], relay: Relay) -> None:
        self.web, self.egress, self.relay = web, egress, relay
        self._told = told

    async def decisions(self) -> list[Decision]:
        await self.egress.flush()
        found, self._told[:] = list(self._told), []
        return found

    async def decision(self) -> Decision:
        (found,) = await self.decisions()
        return found

    async def plain(self, host: str, *headers: str) -> str:
        return (await ask(self.relay, get(f"http://{host}/", *headers))).decode()

    async def tls(self, host: str, sni: str | None = "") -> str:
        return await tunnel(self.relay, f"{host}:{self.web.https}", host if sni == "" else sni, self.web.cafile)


@pytest.fixture
async def box(web: Origins) -> AsyncGenerator[Box]:
    told: list[Decision] = []
    async with opened(web, told) as egress:
        yield Box(web, egress, told, egress.relay_for(profile(web), f"box-{next(_numbers)}"))


# --- allowed --------------------------------------------------------------------------------------------------------


async def test_a_host_of_the_list_is_reached_in_plain(box: Box) -> None:
    answer = await box.plain(f"good.test:{box.web.http}", "X-Mine: yes")
    assert answer.startswith("HTTP/1.1 200 OK")
    assert "X-Mine: yes" in answer
    assert not {"via", "x-forwarded-for"} & {line.partition(":")[0].lower() for line in answer.splitlines()}
    decision = await box.decision()
    assert (decision.method, decision.host, decision.port) == ("GET", "good.test", box.web.http)
    assert (decision.allowed, decision.status, decision.reason) == (True, 200, "")
    assert decision.bytes_in > 100
    assert decision.bytes_out > 50
    assert abs(decision.at - time.time()) < 60


async def test_a_host_of_the_list_is_reached_over_tls_and_nothing_is_decrypted(box: Box) -> None:
    assert "200 OK" in await box.tls("good.test")
    decision = await box.decision()
    assert (decision.method, decision.host, decision.allowed, decision.status) == ("CONNECT", "good.test", True, 200)
    assert decision.bytes_in > 300


@on_one_loop
@pytest.mark.parametrize("name", ["GOOD.test", "good.test.", "GoOd.TeSt"])
async def test_how_a_name_is_written_makes_no_difference(box: Box, name: str) -> None:
    assert "200 OK" in await box.plain(f"{name}:{box.web.http}")
    assert (await box.decision()).host == "good.test"


@on_one_loop
async def test_names_below_are_meant_by_a_leading_dot_only(web: Origins) -> None:
    told: list[Decision] = []
    below = SandboxProfile(network=(f".good.test:{web.http}",), private_hosts=(".good.test",))
    alone = SandboxProfile(network=(f"good.test:{web.http}",), private_hosts=("good.test",))
    async with opened(web, told) as egress:
        for host in ("good.test", "deep.good.test"):
            assert b"200 OK" in await ask(egress.relay_for(below, "a"), get(f"http://{host}:{web.http}/"))
        for host in ("deep.good.test", "notgood.test"):
            assert b"403" in await ask(egress.relay_for(alone, "b"), get(f"http://{host}:{web.http}/"))
        assert b"403" in await ask(egress.relay_for(below, "c"), get(f"http://notgood.test:{web.http}/"))
        await egress.flush()
    assert [(each.sandbox_id, each.allowed) for each in sorted(told, key=lambda each: each.sandbox_id)] == [
        ("a", True), ("a", True), ("b", False), ("b", False), ("c", False),
    ]  # fmt: skip


async def test_a_large_answer_comes_whole_and_connections_are_kept(box: Box) -> None:
    def work(connection: socket.socket) -> bytes:
        body = b"x" * 2_000_000
        head = f"POST http://good.test:{box.web.http}/ HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body + get(f"http://other.test:{box.web.http}/").encode())
        return read_all(connection)

    answer = await during(box.relay, work)
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    first, second = await box.decisions()
    assert first.bytes_out > 2_000_000
    assert second.host == "other.test"


# --- refused --------------------------------------------------------------------------------------------------------


REFUSED = {
    "bad.test": "name",
    "127.0.0.1": "name",
    "2130706433": "name",
    "0x7f000001": "name",
    "0177.0.0.1": "name",
    "127.1": "name",
    "0.0.0.0": "name",
    "169.254.169.254": "name",
    "[::1]": "name",
    "[::]": "name",
    "[::ffff:127.0.0.1]": "name",
    "[fd00:ec2::254]": "name",
    "good.test.bad.test": "name",
    "xgood.test": "name",
    "localhost": "name",
    "ridethrough": "name",
    **dict.fromkeys(BAD_ADDRESSES, "never"),
    **dict.fromkeys(PRIVATE_ADDRESSES, "private"),
}


async def test_other_machines_are_refused_in_plain_and_in_a_tunnel(box: Box) -> None:
    for target, reason in REFUSED.items():
        answer = await box.plain(f"{target}:{box.web.http}")
        assert answer.startswith("HTTP/1.1 403 Forbidden"), target
        assert len(answer.partition("\r\n\r\n")[2].splitlines()) == 1, "the reason, for a model to read, and no page"
        assert await box.tls(target) == "HTTP/1.1 403 Forbidden", target
        plain, tunnelled = await box.decisions()
        assert (plain.method, plain.allowed, plain.status) == ("GET", False, 403)
        assert (tunnelled.method, tunnelled.allowed, tunnelled.status) == ("CONNECT", False, 403)
        assert (plain.reason, tunnelled.reason) == (REASONS[reason], REASONS[reason]), target
    assert not box.web.plain.asked
    assert not box.web.tls.asked


@pytest.fixture(autouse=True)
def _forget(web: Origins) -> None:
    web.plain.asked.clear()
    web.tls.asked.clear()


@on_one_loop
async def test_only_the_ports_of_an_entry_are_open(web: Origins) -> None:
    told: list[Decision] = []
    async with opened(web, told) as egress:
        relay = egress.relay_for(SandboxProfile(network=("good.test",), private_hosts=("good.test",)), "a")
        for port in (22, 443, 3128, 8080, web.http):
            assert b"403 Forbidden" in await ask(relay, get(f"http://good.test:{port}/"))
        for port in (22, 25, 80, 8443, web.https):
            assert b"403 Forbidden" in await ask(
                relay, f"CONNECT good.test:{port} HTTP/1.1\r\nConnection: close\r\n\r\n"
            )
        await egress.flush()
    assert len(told) == 10
    assert {each.reason for each in told} == {REASONS["port"]}


@on_one_loop
@pytest.mark.parametrize("sni", ["other.test", "bad.test", "127.0.0.1", "xgood.test"])
async def test_tls_for_another_name_than_the_tunnels_is_cut_off(box: Box, sni: str) -> None:
    """``other.test`` is on the list, but it is not where the tunnel leads."""
    if sni == "127.0.0.1":
        return await _an_address_is_no_name(box)
    assert (await box.tls("good.test", sni)).startswith("no TLS")
    decision = await box.decision()
    assert not decision.allowed
    assert decision.reason == f"{REASONS['sni']}: {sni}"
    assert not box.web.tls.asked


async def _an_address_is_no_name(box: Box) -> None:
    """Python sends no SNI for an address; the tunnel leads to the host of the list all the same."""
    await box.tls("good.test", "127.0.0.1")
    assert (await box.decision()).host == "good.test"


@on_one_loop
async def test_tls_without_a_name_leads_to_the_host_that_was_asked_for(box: Box) -> None:
    assert "200 OK" in await box.tls("good.test", None)
    assert (await box.decision()).host == "good.test"


NO_REQUESTS = (
    "GET / HTTP/1.1\r\nHost: good.test\r\n\r\n",
    "GET good.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n",
    "GET https://good.test:{https}/ HTTP/1.1\r\nHost: good.test\r\n\r\n",
    "GET ftp://good.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n",
    "GET cache_object://127.0.0.1/info HTTP/1.1\r\n\r\n",
    "GET http://good.test:{http}/squid-internal-mgr/menu HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET http://ridethrough/squid-internal-mgr/config HTTP/1.1\r\nHost: x\r\n\r\n",
    "TRACE http://good.test:{http}/ HTTP/1.1\r\nHost: good.test\r\n\r\n",
    "GET http://good.test@127.0.0.1:{http}/ HTTP/1.1\r\nHost: good.test\r\n\r\n",
    "GET http://good.test\\@127.0.0.1:{http}/ HTTP/1.1\r\nHost: good.test\r\n\r\n",
    "CONNECT good.test@127.0.0.1:{https} HTTP/1.1\r\n\r\n",
    "CONNECT good.test HTTP/1.1\r\n\r\n",
    "CONNECT good.test:99999 HTTP/1.1\r\n\r\n",
    "CONNECT http://good.test:{https} HTTP/1.1\r\n\r\n",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "\x00\x01\x02\xff\xfe\r\n\r\n",
    "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "\x04\x01\x00\x50\x7f\x00\x00\x01\x00\r\n\r\n",
    "PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\nGET http://bad.test/ HTTP/1.1\r\n\r\n",
    "GET http://good.test:{http}/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n",
    "GET http://good.test:{http}/ HTTP/1.1\r\nX: " + "a" * 100_000 + "\r\n\r\n",
    "GET http://good.test:{http}/" + "a" * 100_000 + " HTTP/1.1\r\n\r\n",
)


async def test_what_is_no_request_of_its_kind_is_refused_and_on_record(box: Box) -> None:
    for template in NO_REQUESTS:
        text = template.replace("{http}", str(box.web.http)).replace("{https}", str(box.web.https))
        assert b" 200 OK" not in await during(box.relay, partial(_all_at_once, text.encode("latin-1"))), text
        decisions = await box.decisions()
        assert decisions, text
        assert not any(each.allowed for each in decisions), text
        assert all(each.reason for each in decisions), text
    assert not box.web.plain.asked


def _all_at_once(data: bytes, connection: socket.socket) -> bytes:
    with contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
    return read_all(connection)


async def test_the_host_header_is_not_believed(box: Box) -> None:
    answer = await ask(
        box.relay, f"GET http://good.test:{box.web.http}/ HTTP/1.1\r\nHost: bad.test\r\nConnection: close\r\n\r\n"
    )
    assert f"Host: good.test:{box.web.http}".encode() in answer
    assert b"bad.test" not in answer


@on_one_loop
async def test_a_smuggled_request_is_one_that_is_judged_itself(box: Box) -> None:
    smuggled = get("http://bad.test/")
    for body in (
        f"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}",
        f"Content-Length: 0\r\nContent-Length: {len(smuggled)}\r\n\r\n{smuggled}",
        f"Transfer-Encoding: chunked\r\nContent-Length: {len(smuggled) + 5}\r\n\r\n0\r\n\r\n{smuggled}",
        f"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n{smuggled}",
    ):
        await ask(box.relay, f"POST http://good.test:{box.web.http}/ HTTP/1.1\r\nHost: good.test\r\n{body}")
    assert not any("bad.test" in each for each in box.web.plain.asked)
    assert not any(each.allowed for each in await box.decisions() if each.host == "bad.test")


@on_one_loop
@pytest.mark.parametrize("inside", [b"GET / HTTP/1.0\r\n\r\n", b"SSH-2.0-x\r\n" + b"x" * 5000, b"", b"\x16\x03\x01"])
async def test_a_tunnel_is_for_tls(box: Box, inside: bytes) -> None:
    def work(connection: socket.socket) -> bytes:
        connection.sendall(f"CONNECT good.test:{box.web.https} HTTP/1.1\r\n\r\n".encode() + inside)
        head = connection.recv(65536)
        connection.shutdown(socket.SHUT_WR)
        return head + read_all(connection)

    assert (await during(box.relay, work)).endswith(b"\r\n\r\n"), "nothing comes after the tunnel's opening"
    assert not (await box.decision()).allowed


@on_one_loop
async def test_every_range_of_addresses_is_refused_from_end_to_end(web: Origins, tmp_path: Path) -> None:
    ranges = [(REASONS[rule], each) for rule, of in (("never", NEVER), ("private", PRIVATE)) for each in of]
    expected = [(reason, address) for reason, each in ranges for address in _some_of(each)]
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{address} n{number}.many.test\n" for number, (_, address) in enumerate(expected)))
    told: list[Decision] = []
    async with Egress.open(on_decision=told.append, hosts_file=hosts, nameservers=("127.0.0.1",)) as egress:
        relay = egress.relay_for(SandboxProfile(network=(".many.test",)), "a")
        for number, _ in enumerate(expected):
            await ask(relay, get(f"http://n{number}.many.test/"))
    assert [(each.reason, address) for each, (_, address) in zip(told, expected, strict=True)] == expected


def _some_of(text: str) -> list[IPv4Address | IPv6Address]:
    """The first, the last, and one in the middle."""
    ends = [ip_address(each) for each in text.split("-")] if "-" in text else ip_network(text)
    first, last = ends[0], ends[-1]
    return [first, first + (int(last) - int(first)) // 3, last]


@on_one_loop
@pytest.mark.parametrize("host", ["inner.test", "private.test", "six.test", "metadata.test", "link.test"])
async def test_a_name_that_leads_elsewhere_by_the_time_of_connecting_is_not_followed(
    web: Origins, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """DNS rebinding: the rules that look before are taken away, as if the name had led to an allowed address then."""
    monkeypatch.setattr("ridethrough.sandboxes.egress.rules._addresses_refused", lambda: iter(()))
    told: list[Decision] = []
    async with opened(web, told) as egress:
        relay = egress.relay_for(profile(web), "a")
        assert (await ask(relay, get(f"http://{host}:{web.http}/"))).startswith(b"HTTP/1.1 503")
        assert (await tunnel(relay, f"{host}:{web.https}", host, web.cafile)).startswith("no TLS")
        assert b"200 OK" in await ask(relay, get(f"http://good.test:{web.http}/"))
        await egress.flush()
    assert [bool(each.reason) for each in told if each.host == host] == [True, True]
    assert len(web.plain.asked) == 1
    assert not web.tls.asked


# --- too much of it -------------------------------------------------------------------------------------------------


async def test_a_sandbox_has_so_many_connections_and_others_are_not_harmed(box: Box) -> None:
    async with contextlib.AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(connected(box.relay)) for _ in range(CONNECTIONS)]
        for each in slow:
            each.sendall(b"GET http://good.test")
        await run_in_thread(lambda: _wait_until_served(slow[-1]))
        refused = [await ask(box.relay, get("http://good.test/")) for _ in range(200)]
        assert all(each.startswith(b"HTTP/1.1 503 ") for each in refused)
        other = box.egress.relay_for(profile(box.web), "other")
        assert b"200 OK" in await ask(other, get(f"http://good.test:{box.web.http}/"))
    decisions = await box.decisions()
    assert len([each for each in decisions if f"{CONNECTIONS} connections" in each.reason]) == 200
    assert len(decisions) == CONNECTIONS + 201


def _wait_until_served(connection: socket.socket) -> None:
    connection.sendall(b":1/ HTTP/1.1\r\n\r\n")
    assert connection.recv(12) == b"HTTP/1.1 403"


async def test_every_connection_is_on_record_once_it_is_over(box: Box) -> None:
    """Nothing waits for a line that never comes: empty ones, half ones, those that leave in the middle."""
    for data in (
        b"",
        b"G",
        b"GET http://good.test",
        b"\r\n\r\n",
        f"CONNECT good.test:{box.web.https} HTTP/1.1\r\n\r\n".encode(),
    ):
        async with connected(box.relay) as connection:
            connection.sendall(data)
            connection.close()
    decisions = await box.decisions()
    assert len(decisions) == 5
    assert not any(each.allowed for each in decisions)


async def test_slow_ones_are_ended(web: Origins) -> None:
    """One that says nothing, half a request, a drop now and then, a tunnel without a greeting, half a greeting."""
    told: list[Decision] = []
    tunnelled = f"CONNECT good.test:{web.https} HTTP/1.1\r\n\r\n"
    async with Egress.open(on_decision=told.append, hosts_file=web.hosts_file, patience=1) as egress:
        relay = egress.relay_for(profile(web), "a")
        async with anyio.create_task_group() as tasks:
            for data in ("", "GET http://good.test", "G", tunnelled, tunnelled + "\x16\x03\x01\x02\x00"):
                tasks.start_soon(ask, relay, data)
            tasks.start_soon(during, relay, _drip)
        await egress.flush()
    assert len(told) == 6
    assert not any(each.allowed for each in told)


def _drip(connection: socket.socket) -> None:
    """A byte now and then, as long as somebody listens."""
    connection.settimeout(0.1)
    while True:
        with contextlib.suppress(TimeoutError):
            try:
                connection.send(b"x")
                if not connection.recv(1):
                    return
            except OSError as error:
                if isinstance(error, TimeoutError):
                    raise
                return


async def test_a_cancelled_connection_leaves_nothing(box: Box) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, box.relay, b"GET http://good.test")
            await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
    await box.decisions()
    assert len(os.listdir("/proc/self/fd")) <= before + 6  # the squid's pipes


# --- headers that are added -----------------------------------------------------------------------------------------


def injecting(web: Origins, **inject: dict[str, str]) -> SandboxProfile:
    return SandboxProfile(
        network=(f"api.test:{web.https}", f"good.test:{web.http}", f"good.test:{web.https}"),
        private_hosts=("api.test", "good.test"),
        inject={"api.test": {"Authorization": "env:EGRESS_SECRET"}, **inject},
    )


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EGRESS_SECRET", SECRET)
    return SECRET


async def test_a_header_is_added_over_tls_and_the_sandboxs_own_is_removed(web: Origins, secret: str) -> None:
    told: list[Decision] = []
    async with opened(web, told) as egress:
        relay = egress.relay_for(injecting(web), "a")
        url = f"http://api.test:{web.https}/v1"
        answer = (await ask(relay, get(url, "Authorization: mine", "authorization: too", "X-Mine: stays"))).decode()
        assert await ask(relay, get(f"http://u:p@api.test:{web.https}/v2"))
        assert b"authorization" not in (await ask(relay, get(f"http://good.test:{web.http}/"))).lower()
        await egress.flush()
    assert answer.startswith("HTTP/1.1 200 OK")
    assert re.findall(r"(?im)^authorization: (.*?)\r?$", "".join(web.tls.asked)) == [secret, secret]
    assert "X-Mine: stays" in answer
    assert len(web.tls.asked) == 2, "both went over TLS"
    assert secret not in repr(told)
    assert [each.allowed for each in told] == [True, True, True]


@on_one_loop
async def test_a_scheme_may_stand_before_the_reference(web: Origins, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("abc\n")
    told: list[Decision] = []
    async with Egress.open(
        on_decision=told.append, hosts_file=web.hosts_file, cafile=web.cafile, base=tmp_path, nameservers=("127.0.0.1",)
    ) as egress:
        given = {"Authorization": "Bearer file:key", "X-Api-Key": "file:key"}
        await ask(egress.relay_for(injecting(web, **{"api.test": given}), "a"), get(f"http://api.test:{web.https}/"))
    (asked,) = web.tls.asked
    assert "authorization: bearer abc" in asked.lower()
    assert "x-api-key: abc" in asked.lower()


@on_one_loop
async def test_a_tunnel_to_such_a_host_is_allowed_without_the_header(web: Origins, secret: str) -> None:
    told: list[Decision] = []
    async with opened(web, told) as egress:
        relay = egress.relay_for(injecting(web), "a")
        assert "200 OK" in await tunnel(relay, f"api.test:{web.https}", "api.test", web.cafile)
    assert "authorization" not in "".join(web.tls.asked).lower()


@on_one_loop
async def test_an_origin_with_a_wrong_certificate_gets_no_header(web: Origins, secret: str, tmp_path: Path) -> None:
    """The system's authorities know nothing of the test's; and the name must be the one that was asked for."""
    told: list[Decision] = []
    async with Egress.open(on_decision=told.append, hosts_file=web.hosts_file, nameservers=("127.0.0.1",)) as egress:
        answer = await ask(egress.relay_for(injecting(web), "a"), get(f"http://api.test:{web.https}/"))
    assert answer.startswith((b"HTTP/1.1 502", b"HTTP/1.1 503"))
    assert not web.tls.asked
    assert told[0].reason
    named = SandboxProfile(
        network=(f"private.test:{web.https}",), private_hosts=("private.test",),
        inject={"private.test": {"X-Key": "env:EGRESS_SECRET"}},
    )  # fmt: skip
    async with opened(web, told) as egress:
        answer = await ask(egress.relay_for(named, "a"), get(f"http://private.test:{web.https}/"))
    assert answer.startswith((b"HTTP/1.1 502", b"HTTP/1.1 503"))
    assert not web.tls.asked


async def test_an_injected_host_must_not_lead_to_a_private_address_either(web: Origins, secret: str) -> None:
    told: list[Decision] = []
    guarded = SandboxProfile(network=(f"api.test:{web.https}",), inject={"api.test": {"X-Key": "env:EGRESS_SECRET"}})
    async with opened(web, told) as egress:
        assert b"403" in await ask(egress.relay_for(guarded, "a"), get(f"http://api.test:{web.https}/"))
    assert told[0].reason == REASONS["private"]
    assert not web.tls.asked


@on_one_loop
async def test_a_secret_is_nowhere_but_in_the_proxy(
    web: Origins, secret: str, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Decision] = []
    policy = Policy.of(injecting(web))
    async with opened(web, told) as egress:
        await ask(egress.relay_for(injecting(web), "a"), get(f"http://api.test:{web.https}/"))
        (squid,) = _children()
        assert not [each for each in ("cmdline", "environ") if secret in _proc(squid, each)]
        assert not _folders(), "once it runs, nothing of it is on disk"
    assert secret not in f"{policy!r}{policy.injections}{told}{caplog.text}"


async def test_what_squid_says_of_its_configuration_is_told_without_secrets(shared: Path) -> None:
    """It quotes the line that it stumbles over."""
    (shared / "squid").write_text('#!/bin/sh\ngrep request_header_add "$4" >&2; exit 1\n')
    (shared / "squid").chmod(0o755)
    (shared / "key").write_text("open sesame")
    told: list[Decision] = []
    async with Egress.open(on_decision=told.append, binary=str(shared / "squid"), base=shared) as egress:
        given = {"api.test": {"X-Key": "file:key"}}
        relay = egress.relay_for(SandboxProfile(network=("api.test",), inject=given), "a")
        answer = await ask(relay, get("http://api.test/"))
    assert answer.startswith(b"HTTP/1.1 503")
    assert "request_header_add" in told[0].reason
    assert "squid-openssl" in told[0].reason
    assert "open sesame" not in f"{answer!r}{told}"


@pytest.fixture
def shared() -> Generator[Path]:
    """A folder that every user can read."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


async def test_a_host_that_does_not_answer_is_a_failure_and_no_refusal(web: Origins) -> None:
    """And what the sandbox is told has nothing in it of how its connections are called."""
    told: list[Decision] = []
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        async with opened(web, told) as egress:
            relay = egress.relay_for(SandboxProfile(network=(f"good.test:{port}",), private_hosts=("good.test",)), "a")
            silent = (await ask(relay, get(f"http://good.test:{port}/"))).decode()
            assert (await tunnel(relay, f"good.test:{port}", "good.test", web.cafile)).startswith("no TLS")
    assert silent.startswith("HTTP/1.1 503")
    assert silent.endswith("\r\n\r\ngood.test could not be reached.\n")
    assert not re.search("fd[0-9a-f]{2}:", silent)
    assert (told[0].allowed, told[0].reason, told[0].status) == (True, "connect fail", 503)
    assert told[1].reason == "the other side could not be reached, status 503"


# --- the life of a proxy --------------------------------------------------------------------------------------------


def _children(of: int | None = None) -> list[int]:
    """The squids that a process has started, which are children of its children."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid=,comm="], capture_output=True, text=True, check=True).stdout
    table = [line.split() for line in found.splitlines()]
    guards = {pid for pid, parent, _ in table if parent == str(of or os.getpid())}
    return [int(pid) for pid, parent, name in table if parent in guards and name == "squid"]


def _folders() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("ridethrough-egress-*"))


def _proc(process: int, name: str) -> str:
    return Path(f"/proc/{process}/{name}").read_text()


async def test_equal_policies_share_a_squid_which_starts_with_the_first_connection(web: Origins) -> None:
    told: list[Decision] = []
    async with opened(web, told) as egress:
        mine = profile(web)
        again = SandboxProfile(network=tuple(reversed(mine.network)), private_hosts=mine.private_hosts)
        one, two = egress.relay_for(mine, "one"), egress.relay_for(again, "two")
        assert _children() == []
        async with anyio.create_task_group() as tasks:
            for relay in (one, two) * 5:
                tasks.start_soon(ask, relay, get(f"http://good.test:{web.http}/"))
        assert len(_children()) == 1
    assert _children() == []
    assert sorted(each.sandbox_id for each in told) == ["one"] * 5 + ["two"] * 5


async def test_a_squid_that_dies_is_started_again_and_what_it_did_is_not_forgotten(box: Box) -> None:
    assert "200 OK" in await box.plain(f"good.test:{box.web.http}")
    (squid,) = _children()
    async with connected(box.relay) as connection:
        connection.sendall(f"CONNECT good.test:{box.web.https} HTTP/1.1\r\n\r\n".encode())
        await run_in_thread(lambda: connection.recv(65536))
        await _kill(squid)
        assert await run_in_thread(lambda: read_all(connection)) == b""
    assert "200 OK" in await box.plain(f"good.test:{box.web.http}")
    first, cut, last = await box.decisions()
    assert (first.allowed, last.allowed) == (True, True)
    assert "the proxy has ended" in cut.reason
    assert not cut.allowed


async def _kill(process: int) -> None:
    """Kill a process, and wait until it is gone."""
    ended = os.pidfd_open(process)
    os.kill(process, signal.SIGKILL)
    await anyio.wait_readable(ended)
    os.close(ended)


async def test_a_squid_that_dies_again_and_again_is_left_alone(box: Box) -> None:
    for _ in range(RESTARTS):
        assert "200 OK" in await box.plain(f"good.test:{box.web.http}")
        await _kill(*_children())
    answer = await box.plain(f"good.test:{box.web.http}")
    assert answer.startswith("HTTP/1.1 503")
    assert "ends again and again" in answer
    assert "ends again and again" in (await box.decisions())[-1].reason


@on_one_loop
async def test_more_policies_than_there_is_room_for_take_turns(web: Origins) -> None:
    told: list[Decision] = []
    port = f":{web.http}"
    async with opened(web, told) as egress:
        relays = [
            egress.relay_for(
                SandboxProfile(network=(f"good.test{port}", f"n{n}.test"), private_hosts=("good.test",)), "a"
            )
            for n in range(PROXIES + 2)
        ]
        for relay in relays:
            assert b"200 OK" in await ask(relay, get(f"http://good.test{port}/"))
        assert len(_children()) <= PROXIES
        async with contextlib.AsyncExitStack() as stack:
            for relay in relays[:PROXIES]:
                connection = await stack.enter_async_context(connected(relay))
                connection.sendall(get(f"http://good.test{port}/").replace("close", "keep-alive").encode())
                assert await run_in_thread(partial(connection.recv, 9))
            refused = await ask(relays[-1], get(f"http://good.test{port}/"))
        assert refused.startswith(b"HTTP/1.1 503")
        assert b"share a list" in refused
    assert len(told) == 2 * PROXIES + 3


@on_one_loop
async def test_other_users_of_the_machine_cannot_use_the_proxy(box: Box) -> None:
    """They can connect to its port, and do not know the addresses that it serves."""
    await box.plain(f"good.test:{box.web.http}")
    await box.decisions()
    (squid,) = _children()
    (port,) = _listening(squid)
    request = get(f"http://good.test:{box.web.http}/").encode()
    box.web.plain.asked.clear()
    for greeting in (
        b"",
        b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n",
        b"PROXY TCP6 fd00::1 ::1 1 2\r\n",
        b"PROXY UNKNOWN\r\n",
    ):
        answer = await run_in_thread(partial(_spoken, port, greeting + request))
        assert b"200 OK" not in answer
    assert not box.web.plain.asked
    assert await box.decisions() == []


def _listening(process: int) -> list[int]:
    inodes = {os.readlink(each) for each in Path(f"/proc/{process}/fd").iterdir()}
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [int(each[1].partition(":")[2], 16) for each in lines if each[3] == "0A" and f"socket:[{each[9]}]" in inodes]


def _spoken(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(data)
        return read_all(connection)


@on_one_loop
async def test_squid_is_not_root(box: Box) -> None:
    await box.plain(f"good.test:{box.web.http}")
    (squid,) = _children()
    status = _proc(squid, "status")
    assert "Uid:\t0" not in status
    assert re.search(r"CapEff:\t0+\n", status)


_KILLED = """
import anyio, sys
from pathlib import Path
from ridethrough.sandboxes.egress.egress import Egress
from ridethrough.sandboxes.profile import SandboxProfile
from tests.sandboxes.origins import ask, get

async def main():
    async with Egress.open(nameservers=("127.0.0.1",)) as egress:
        await ask(egress.relay_for(SandboxProfile(network=("good.test",)), "a"), get("http://bad.test/"))
        print("ready", flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


async def test_no_squid_survives_a_worker_that_is_killed() -> None:
    async with await anyio.open_process([sys.executable, "-c", _KILLED], cwd=ROOT, stderr=None) as worker:
        assert worker.stdout is not None
        assert await BufferedByteReceiveStream(worker.stdout).receive_until(b"\n", 100) == b"ready"
        (squid,) = _children(worker.pid)
        ended = os.pidfd_open(squid)
        worker.kill()
        await anyio.wait_readable(ended)
        os.close(ended)


def _guarded(folder: Path, program: str) -> subprocess.Popen[bytes]:
    """A program in the place of squid; what holds its output is the program, and the shell that waits for it."""
    folder.mkdir()
    for number in range(1000):  # so that it takes a while to remove
        (folder / f"page-{number}").touch()
    command = ["/bin/sh", "-c", GUARD, "guard", str(folder), "/bin/sh", "-c", program]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    return process


@pytest.mark.parametrize("shell_is_killed", [False, True])
def test_squid_ends_with_who_started_it_and_its_folder_is_gone_by_then(tmp_path: Path, shell_is_killed: bool) -> None:
    folder = tmp_path / "folder"
    with _guarded(folder, "echo begun; exec sleep 1000") as process:
        if shell_is_killed:
            process.kill()
            process.wait()
        process.communicate(timeout=20)
        assert not folder.exists()


def test_nothing_is_left_of_a_squid_that_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with _guarded(folder, "echo begun") as process:
        assert process.stdin is not None
        process.wait(20)
        assert not folder.exists()
        poll = select.poll()
        poll.register(process.stdin, 0)
        assert [events for _, events in poll.poll(20_000)] == [select.POLLERR]  # nobody waits for its end any more


def _shells(squid: int) -> list[int]:
    """Those that watch over a squid: they are in its group."""
    command = ["ps", "-o", "pid=,comm=", "-g", str(os.getpgid(squid))]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid, name in (line.split() for line in table.splitlines()) if name == "sh"]


async def test_a_squid_whose_shells_were_killed_is_ended(web: Origins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ridethrough.sandboxes.egress.squid.STOP_SECONDS", 0.2)
    monkeypatch.setattr("ridethrough.sandboxes.egress.egress.FLUSH_SECONDS", 0.2)
    async with opened(web, []) as egress:
        await ask(egress.relay_for(profile(web), "a"), get(f"http://good.test:{web.http}/"))
        (squid,) = _children()
        ended = os.pidfd_open(squid)
        shells = _shells(squid)
        assert len(shells) == 2
        for shell in shells:
            os.kill(shell, signal.SIGKILL)
    await anyio.wait_readable(ended)
    os.close(ended)


# --- what cannot be used --------------------------------------------------------------------------------------------


async def test_a_sandbox_without_a_network_needs_no_squid_and_is_refused(web: Origins) -> None:
    told: list[Decision] = []
    async with Egress.open(on_decision=told.append, binary="/nowhere/squid") as egress:
        answer = await ask(egress.relay_for(SandboxProfile(), "a"), get("http://good.test/"))
        assert answer.startswith(b"HTTP/1.1 403")
        assert b"no network" in answer
        with pytest.raises(SandboxUnavailable, match=r"/nowhere/squid.*squid-openssl"):
            egress.relay_for(profile(web), "a")
    assert (told[0].sandbox_id, told[0].allowed, told[0].status) == ("a", False, 403)


def test_squid_is_found_where_administrators_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    assert Programs.find().squid.endswith("/squid")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("*", "one by one"),
        ("*.example.com", "'.example.com'"),
        ("http://example.com/path", "'example.com'"),
        ("https://user@example.com", "'example.com'"),
        ("example.com/path", "'example.com'"),
        ("127.0.0.1", "addresses are never allowed"),
        ("127.0.0.1:8080", "addresses are never allowed"),
        ("0x7f000001", "addresses are never allowed"),
        ("127.1", "addresses are never allowed"),
        ("[::1]:443", "addresses are never allowed"),
        ("fd00::1", "addresses are never allowed"),
        ("10.0.0.0/8", "addresses are never allowed"),
        ("b\u00fccher.example", "'xn--bcher-kva.example'"),
        ("", "write `example.com`"),
        (".", "write `example.com`"),
        ("a b", "write `example.com`"),
        ("example.com:0", "write `example.com`"),
        ("example.com:65536", "write `example.com`"),
        ("example.com:", "write `example.com`"),
        ("-example.com", "write `example.com`"),
        ("exa\nmple.com", "write `example.com`"),
        ('example.com"', "write `example.com`"),
        ("a" * 64 + ".com", "write `example.com`"),
    ],
)
def test_what_is_no_host_is_refused_with_the_nearest_right_form(text: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="network: ") as refused:
        Policy.of(SandboxProfile(network=(text,)))
    assert repr(text) in str(refused.value)
    assert hint in str(refused.value)


def test_entries_are_read_as_they_are_meant() -> None:
    assert Entry.parse(" .Example.COM.:8443 ") == Entry("example.com", True, 8443)
    assert Entry.parse("xn--bcher-kva.example") == Entry("xn--bcher-kva.example")
    assert Entry.parse("_service.internal").domain == "_service.internal"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"private_hosts": ("goood.test",)}, "did you mean 'good.test'"),
        ({"private_hosts": ("good.test:80",)}, "ports stand in `network`"),
        ({"inject": {"bad.example": {"X-Key": "env:EGRESS_SECRET"}}}, "not in `network`"),
        ({"inject": {".good.test": {"X-Key": "env:EGRESS_SECRET"}}}, "write 'good.test'"),
        ({"inject": {"good.test": {"X-Key": "sesame"}}}, "must not be written here"),
        ({"inject": {"good.test": {"X-Key": "env:NO_SUCH_SECRET"}}}, "NO_SUCH_SECRET"),
        ({"inject": {"good.test": {"X-Key": "env:EGRESS_LINES"}}}, "one line"),
        ({"inject": {"good.test": {"Host": "env:EGRESS_SECRET"}}}, "no header that can be added"),
        ({"inject": {"good.test": {"Proxy-Authorization": "env:EGRESS_SECRET"}}}, "no header that can be added"),
        ({"inject": {"good.test": {"X-Key: y": "env:EGRESS_SECRET"}}}, "no header that can be added"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    monkeypatch: pytest.MonkeyPatch, secret: str, given: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("EGRESS_LINES", "sesame\r\nX-Evil: open")
    with pytest.raises(ConfigError, match=message) as refused:
        Policy.of(SandboxProfile(network=("good.test",), **given))
    assert "sesame" not in str(refused.value)
    assert secret not in str(refused.value)


# --- the record -----------------------------------------------------------------------------------------------------


def test_a_line_that_is_none_is_no_decision() -> None:
    good = "1.5 fd00::1 7 GET a.test 80 TCP_MISS 200 10 20 - - - - 127.0.0.1"
    parsed = Line.parse(good)
    assert parsed is not None
    assert parsed.decision("a") == Decision("a", 1.5, "GET", "a.test", 80, True, "", 20, 10, 200)
    for bad in ("", good + " more", good.replace("200", "x"), good.replace("fd00::1", "here"), "\x00" * 100):
        assert Line.parse(bad) is None


def test_names_are_shown_without_what_would_hurt_a_reader() -> None:
    line = Line.parse(f"1.5 fd00::1 7 GET %1b%5b31m{'a' * 999} 80 TCP_MISS 200 10 20 - - - - -")
    assert line is not None
    assert line.host.startswith("?[31ma")
    assert len(line.host) == 255


async def test_decisions_that_cannot_be_told_are_counted() -> None:
    told: list[str] = []

    async def slow(decision: Decision) -> None:
        await anyio.lowlevel.checkpoint()
        if decision.host == "3":
            raise OSError("the disk is full")
        told.append(decision.host)

    book = Book(slow)
    async with book.kept():
        for number in range(QUEUE + 7):
            book.add(Decision("a", 0.0, "GET", str(number), 80, True))
    assert book.dropped == 8
    assert len(told) == QUEUE - 1
    assert told[:5] == ["0", "1", "2", "4", "5"]


@on_one_loop
async def test_a_thousand_connections_of_many_sandboxes_are_all_on_record(box: Box) -> None:
    relays = [box.egress.relay_for(profile(box.web), f"of-{number}") for number in range(50)]
    limiter = anyio.CapacityLimiter(100)

    async def one(relay: Relay) -> None:
        async with limiter:
            assert b"200 OK" in await ask(relay, get(f"http://good.test:{box.web.http}/"))

    async with anyio.create_task_group() as tasks:
        for number in range(1000):
            tasks.start_soon(one, relays[number % 50])
    decisions = await box.decisions()
    assert Counter(each.sandbox_id for each in decisions) == {f"of-{number}": 20 for number in range(50)}
    assert all(each.allowed for each in decisions)
