"""A policy as squid's configuration: https://www.squid-cache.org/Doc/config/ has every directive.

The order of the rules is the point:

1. Only the relay's connections count; it proves itself by the address that it gives them (``Squid``).
2. Names and ports come first, without a look-up: a name that is not on the list is not resolved, or it could carry data
   out to whoever serves it. ``dstdomain -n`` looks no address up in reverse either: that answer is the attacker's.
3. Then the addresses that the name leads to: one that is forbidden among them forbids all.
4. The name in the TLS greeting must be one of the entry by which the connection was let through. Nothing is decrypted.
5. Addresses are checked again at the very moment of connecting, because a name may lead elsewhere by then (DNS
   rebinding): whatever is not allowed is given a source address that no socket can have, so that it is not connected.

A refused ``CONNECT`` is answered with 407 here, and with 403 by the relay: after any other status squid would first
pretend to be the other side, and the program in the sandbox would see a broken certificate in place of the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path
from typing import Final

from ridethrough.sandboxes.egress.audit import LOG_FORMAT
from ridethrough.sandboxes.egress.policy import NEVER, PRIVATE, Policy

PAGES: Final = {
    "ridethrough-name": "%H is not on the list of hosts that this sandbox may reach.",
    "ridethrough-port": "This sandbox may not reach port %p of %H.",
    "ridethrough-request": "The proxy of this sandbox takes CONNECT, and requests for http:// addresses.",
    "ridethrough-never": "%H leads to an address that no sandbox may reach.",
    "ridethrough-private": "%H leads to a private address, which this sandbox may not reach.",
    "ERR_ACCESS_DENIED": "The proxy of this sandbox refuses this.",
    "ERR_DNS_FAIL": "The address of %H could not be found.",
    "ERR_CONNECT_FAIL": "%H could not be reached.",
    "ERR_CANNOT_FORWARD": "%H could not be reached.",
    "ERR_SECURE_CONNECT_FAIL": "No TLS connection to %H could be made.",
    "ERR_READ_ERROR": "%H gave no answer, or its address could not be found.",
    "ERR_READ_TIMEOUT": "%H did not answer in time.",
    "ERR_WRITE_ERROR": "%H ended the connection before it had answered.",
    "ERR_ZERO_SIZE_OBJECT": "%H ended the connection without an answer.",
    "ERR_INVALID_RESP": "%H gave an answer that is no HTTP.",
    "ERR_INVALID_REQ": "This is no HTTP request.",
    "ERR_INVALID_URL": "This is no address that a proxy could ask for.",
    "ERR_TOO_BIG": "The request is too large.",
}
"""What the sandbox is told: a line, for a model to read, in place of squid's pages. Those of rules have their names."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a proxy is told besides the policy: its port, the addresses of its connections, its files."""

    port: int
    clients: str = field(repr=False)
    folder: Path
    hosts_file: Path | None = None
    cafile: Path | None = None
    nameservers: tuple[str, ...] = ()
    patience: int = 15

    def client(self, number: int) -> IPv6Address:
        """The address of the connections of ``number``."""
        return IPv6Network(self.clients)[number]

    @property
    def log(self) -> Path:
        """The pipe that it writes its log to."""
        return self.folder / "log"


def configuration(policy: Policy, place: Place) -> str:
    """The whole of ``squid.conf``; secrets stand in it."""
    return "\n".join([*_listening(place), *_names(policy), *_access(policy), *_tls(policy), *_injections(policy, place),
                      *_connecting(), *_quiet(place)]) + "\n"  # fmt: skip


def _listening(place: Place) -> Iterator[str]:
    yield (
        f"http_port 127.0.0.1:{place.port} require-proxy-header ssl-bump generate-host-certificates=off "
        f"cert={place.folder}/unused.pem"
    )
    yield "acl here src 127.0.0.1"
    yield "proxy_protocol_access allow here"
    yield f"acl ours src {place.clients}"


def _names(policy: Policy) -> Iterator[str]:
    for number, entry in enumerate(policy.entries):
        yield f"acl name{number} dstdomain -n {entry.domain}"
        yield f"acl sni{number} ssl::server_name --client-requested {entry.domain}"
        yield f"acl tunnelport{number} port {entry.port or 443}"
        yield f"acl plainport{number} port {entry.port or 80}"
        yield f"acl tunnel{number} all-of CONNECT name{number} tunnelport{number}"
        yield f"acl plain{number} all-of !CONNECT name{number} plainport{number}"
    numbers = range(len(policy.entries))
    yield _any("named", (f"name{number}" for number in numbers))
    yield _any("listed", (f"{kind}{number}" for number in numbers for kind in ("tunnel", "plain")))
    yield from _private(policy)


def _private(policy: Policy) -> Iterator[str]:
    """A peer is named too: squid asks for it without a request, where there is no name of one to go by."""
    yield from (f"acl privatename{number} dstdomain -n {each.domain}" for number, each in enumerate(policy.private))
    peers = [number for number, (host, _) in enumerate(_peers(policy)) if any(p.covers(host) for p in policy.private)]
    yield from (f"acl privatepeer{number} peername peer{number}" for number in peers)
    names = [f"privatepeer{number}" for number in peers] + [f"privatename{n}" for n, _ in enumerate(policy.private)]
    yield _any("mayprivate", names)


def _any(name: str, of: Iterable[str]) -> str:
    members = " ".join(of)
    return f"acl {name} any-of {members}" if members else f"acl {name} dstdomain -n nothing.invalid"


def _access(policy: Policy) -> Iterator[str]:
    yield "acl plainhttp proto HTTP"
    yield "acl reflecting method TRACE"
    yield from _addresses("never", NEVER)
    yield from _addresses("private", PRIVATE)
    yield "http_access deny !ours"
    yield from _refuse("request", "manager")
    yield from _refuse("request", "!CONNECT !plainhttp")
    yield from _refuse("request", "reflecting")
    yield from _refuse("name", "!named")
    yield from _refuse("port", "!listed")
    yield from _addresses_refused()
    yield "http_access allow listed"
    yield "http_access deny all"


def _addresses_refused() -> Iterator[str]:
    yield from _refuse("never", "never")
    yield from _refuse("private", "private !mayprivate")


def _addresses(name: str, ranges: Sequence[str]) -> Iterator[str]:
    """A list for each range: squid searches a list in an order that ranges of both families, or of different sizes, do
    not keep to, and misses some of the addresses in them."""
    yield from (f"acl {name}{number} dst {each}" for number, each in enumerate(ranges))
    yield _any(name, (f"{name}{number}" for number, _ in enumerate(ranges)))


_told: Final = {"tunnel": (407, "CONNECT "), "plain": (403, "")}


def _refuse(rule: str, condition: str) -> Iterator[str]:
    for kind, (status, method) in _told.items():
        note = f"{kind}-{rule}"
        yield f"acl {note} annotate_transaction reason={rule}"
        yield f"deny_info {status}:ridethrough-{rule} {note}"
        yield f"http_access deny {method}{condition} {note}"


def _tls(policy: Policy) -> Iterator[str]:
    yield "acl greeting at_step SslBump1"
    yield "ssl_bump peek greeting"
    for number, _ in enumerate(policy.entries):
        yield f"ssl_bump splice tunnel{number} sni{number}"
    yield "ssl_bump terminate all"


def _connecting() -> Iterator[str]:
    yield "acl reachableprivate all-of !never mayprivate"
    yield "acl reachablepublic all-of !never !private"
    yield "acl reachable any-of reachableprivate reachablepublic"
    yield "tcp_outgoing_address 0.0.0.0 reachable"
    yield "tcp_outgoing_address :: reachable"
    yield "tcp_outgoing_address 240.0.0.1"
    yield "tcp_outgoing_address 100::1"


# --- headers that are added -----------------------------------------------------------------------------------------


def _peers(policy: Policy) -> list[tuple[str, int | None]]:
    hosts = sorted({injection.host for injection in policy.injections})
    return [(host, port) for host in hosts for port in policy.ports(host)]


def _injections(policy: Policy, place: Place) -> Iterator[str]:
    authority = f" sslcafile={place.cafile}" if place.cafile else ""
    for number, (host, port) in enumerate(_peers(policy)):
        yield (
            f"cache_peer {host} parent {port or 443} 0 name=peer{number} originserver tls{authority} "
            "no-query no-digest no-netdb-exchange"
        )
        yield f"acl injectname{number} dstdomain -n {host}"
        yield f"acl injectport{number} port {port or 80}"
        yield f"acl inject{number} all-of !CONNECT injectname{number} injectport{number}"
        yield f"cache_peer_access peer{number} allow inject{number}"
        yield f"cache_peer_access peer{number} deny all"
        yield f"never_direct allow inject{number}"
        for injection in policy.injections:
            if injection.host == host:
                yield f"request_header_access {injection.header} deny inject{number}"
                yield f"request_header_add {injection.header} {_quoted(injection.value)} inject{number}"


def _quoted(value: str) -> str:
    for special, written in (("%", "%%"), ("\\", "\\\\"), ('"', '\\"')):
        value = value.replace(special, written)
    return f'"{value}"'


# --- everything that it need not do ---------------------------------------------------------------------------------


def _quiet(place: Place) -> Iterator[str]:
    yield f"logformat decision {LOG_FORMAT}"
    yield f"access_log stdio:{place.log} logformat=decision"
    yield f"error_directory {place.folder}"
    if place.hosts_file is not None:
        yield f"hosts_file {place.hosts_file}"
    if place.nameservers:
        yield f"dns_nameservers {' '.join(place.nameservers)}"
    yield f"request_start_timeout {place.patience} seconds"
    yield f"request_timeout {place.patience} seconds"
    yield from _NO_REVERSE_LOOKUPS
    yield from _FIXED.strip().splitlines()


_NO_REVERSE_LOOKUPS: Final = ('url_rewrite_extras "none"', 'store_id_extras "none"')
"""By default helpers (there are none) are told the client's name, and so the name of each client's address is looked
up: ours are secret, and made up."""

_FIXED: Final = """
buffered_logs off
cache_log /dev/null
cache_store_log none
pid_filename none
coredump_dir none
cache deny all
cache_mem 0
memory_pools off
client_db off
pinger_enable off
netdb_filename none
icp_port 0
global_internal_static off
max_filedescriptors 4096
request_header_max_size 32 KB
reply_header_max_size 64 KB
client_idle_pconn_timeout 30 seconds
connect_timeout 15 seconds
forward_timeout 30 seconds
dns_timeout 15 seconds
read_timeout 5 minutes
client_lifetime 2 hours
negative_dns_ttl 1 second
shutdown_lifetime 0 seconds
visible_hostname ridethrough
httpd_suppress_version_string on
email_err_data off
via off
forwarded_for delete
request_header_access X-Forwarded-For deny all
reply_header_access X-Cache deny all
reply_header_access X-Cache-Lookup deny all
reply_header_access X-Squid-Error deny all
"""
