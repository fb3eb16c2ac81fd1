"""What a sandbox may reach, checked before anything is started.

A policy is compared by what it allows, so that sandboxes of equal policies share a proxy.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ridethrough.runtime.config import nearest, resolve_secret
from ridethrough.runtime.errors import ConfigError

if TYPE_CHECKING:
    from ridethrough.sandboxes.profile import SandboxProfile

NEVER: Final = (
    "0.0.0.0/8",  # this machine
    "169.254.0.0/16",  # link-local, and the metadata of most clouds
    "100.100.100.200/32",  # metadata (Alibaba)
    "168.63.129.16/32",  # metadata (Azure), though the address is a public one
    "192.0.0.0/24",  # metadata (Oracle), protocol assignments
    "192.0.2.0/24",  # documentation
    "192.88.99.0/24",  # relays to IPv6
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, broadcast
    "::/128",
    "::2-::ffff:ffff",  # IPv4 addresses as they were once written, without ::1
    "64:ff9b::/96",  # NAT64: an IPv4 address in disguise, as are the next three
    "64:ff9b:1::/48",
    "2001::/32",
    "2002::/16",
    "100::/64",  # discard
    "2001:db8::/32",  # documentation
    "fd00:ec2::/32",  # metadata (AWS)
    "fd20:ce::/32",  # metadata (Google)
    "fe80::/10",  # link-local
    "fec0::/10",
    "ff00::/8",  # multicast
)
"""Addresses that no name may lead to. ``::ffff:0:0/96`` need not be here: the proxy takes those for the IPv4 addresses
that they are, and so do the lists."""

PRIVATE: Final = (
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "::1/128",
    "fc00::/7",
)
"""Addresses that only names of ``private_hosts`` may lead to."""

_LABEL: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_HEADER: Final = re.compile(r"[-!#$&'*+.^_`|~0-9A-Za-z]+")
_REFERENCE: Final = re.compile(r"(?:(?P<scheme>[A-Za-z][A-Za-z0-9_-]*) )?(?P<reference>(?:env|file):.+)")
_FRAMING: Final = {
    "connection", "content-length", "expect", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"
}  # fmt: skip
_LONGEST_VALUE: Final = 4096


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One name of the list.

    Attributes:
        host: In lower case, without dots around it.
        below: Whether all names below it are meant too.
        port: The only port; ``None`` for 443 through ``CONNECT`` and 80 in plain.
    """

    host: str
    below: bool = False
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Read ``example.com``, ``.example.com`` or either with ``:PORT``.

        Raises:
            ConfigError: it is something else, with the nearest right form.
        """
        name, colon, digits = text.strip().partition(":")
        port = _port(digits) if colon else None
        host = name.removeprefix(".").removesuffix(".").lower()
        if (colon and port is None) or not _is_name(host):
            raise ConfigError(f"network: {text!r} is no host name{_hint(text)}")
        return cls(host, name.startswith("."), port)

    @property
    def domain(self) -> str:
        """The name as the proxy's lists have it."""
        return f".{self.host}" if self.below else self.host

    def covers(self, host: str) -> bool:
        """Whether ``host`` is one of its names."""
        return host == self.host or (self.below and host.endswith(f".{self.host}"))


def _port(digits: str) -> int | None:
    return int(digits) if re.fullmatch(r"[1-9]\d{0,4}", digits) and int(digits) < 65536 else None


def _is_name(host: str) -> bool:
    labels = host.split(".")
    return len(host) <= 253 and all(map(_LABEL.fullmatch, labels)) and not _is_number(labels[-1])


def _is_number(label: str) -> bool:
    """Whether a name that ends so is an address to some programs: ``127.1``, ``0x7f000001``."""
    return re.fullmatch(r"\d+|0x[0-9a-f]*", label) is not None


def _hint(text: str) -> str:
    text = text.strip()
    bare = re.sub(r"^[a-z][a-z0-9+.-]*://|[/?#].*$", "", text.lower()).rpartition("@")[2]
    if "*" in bare:
        below = bare.replace("*.", ".").replace("..", ".")
        return f": write {below!r} for the name and all below it" if "*" not in below else ": name the hosts one by one"
    if _is_address(bare):
        return ": addresses are never allowed, give the machine a name (in /etc/hosts or DNS)"
    if not bare.isascii():
        return f": write {_punycode(bare)!r}"
    if bare != text.lower() and _is_name(bare.removeprefix(".").partition(":")[0]):
        return f": write {bare!r}"
    return ": write `example.com`, or `.example.com` for it and all below it, with `:PORT` where it is not 80 or 443"


def _is_address(text: str) -> bool:
    host = text[1:].partition("]")[0] if text.startswith("[") else text
    for candidate in (host, host.partition(":")[0]):
        try:
            ipaddress.ip_address(candidate)
        except ValueError:
            continue
        return True
    return _is_number(text.partition(":")[0].rpartition(".")[2])


def _punycode(text: str) -> str:
    try:
        return text.encode("idna").decode()
    except UnicodeError:
        return "the name in ASCII"


@dataclass(frozen=True, slots=True, order=True)
class Injection:
    """A header that the proxy adds for ``host``; ``value`` is a secret."""

    host: str
    header: str
    value: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Policy:
    """What a sandbox may reach. Equal policies allow the same."""

    entries: tuple[Entry, ...]
    private: tuple[Entry, ...] = ()
    injections: tuple[Injection, ...] = ()

    @classmethod
    def of(cls, profile: SandboxProfile, base: Path | None = None) -> Policy:
        """The policy of a profile, its secrets resolved; ``base`` is where relative paths of ``file:`` start.

        Raises:
            ConfigError: an entry or a header cannot be used, or a secret is not there.
        """
        entries = tuple(sorted(set(map(Entry.parse, profile.network))))
        private = tuple(sorted(set(_private(entries, profile.private_hosts))))
        return cls(entries, private, tuple(sorted(_injections(entries, profile.inject, base))))

    @property
    def secrets(self) -> tuple[str, ...]:
        """Every value that must not be seen."""
        return tuple(injection.value for injection in self.injections)

    def ports(self, host: str) -> Iterator[int | None]:
        """The ports on which ``host`` may be reached, ``None`` for the usual ones."""
        yield from sorted({entry.port for entry in self.entries if entry.covers(host)}, key=lambda port: port or 0)


def _private(entries: tuple[Entry, ...], hosts: Iterable[str]) -> Iterator[Entry]:
    for text in hosts:
        entry = Entry.parse(text)
        if entry.port is not None:
            raise ConfigError(f"private_hosts: {text!r} names a port; ports stand in `network`")
        if not any(each.covers(entry.host) or entry.covers(each.host) for each in entries):
            raise ConfigError(f"private_hosts: {text!r} is not in `network`{_near(entry.host, entries)}")
        yield entry


def _injections(
    entries: tuple[Entry, ...], inject: Mapping[str, Mapping[str, str]], base: Path | None
) -> Iterator[Injection]:
    for text, headers in inject.items():
        entry = Entry.parse(text)
        if entry.below or entry.port is not None:
            raise ConfigError(f"inject: {text!r} must be one host without a port: write {entry.host!r}")
        if not any(each.covers(entry.host) for each in entries):
            raise ConfigError(f"inject: {text!r} is not in `network`{_near(entry.host, entries)}")
        for header, reference in headers.items():
            yield Injection(entry.host, _header(text, header), _value(f"inject: {text}: {header}", reference, base))


def _near(host: str, entries: tuple[Entry, ...]) -> str:
    return nearest(host, (entry.domain for entry in entries))


def _header(host: str, header: str) -> str:
    if not _HEADER.fullmatch(header) or header.lower() in _FRAMING or header.lower().startswith("proxy-"):
        raise ConfigError(f"inject: {host}: {header!r} is no header that can be added; one that can is `Authorization`")
    return header.lower()


def _value(where: str, reference: str, base: Path | None) -> str:
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ConfigError(
            f'{where}: a secret must not be written here: use "env:NAME", "file:PATH" or "Bearer env:NAME"'
        )
    secret = resolve_secret(match["reference"], base)
    if not secret.isascii() or not secret.isprintable() or not 0 < len(secret) <= _LONGEST_VALUE:
        raise ConfigError(
            f"{where}: the secret of {match['reference']!r} cannot be sent in a header: it must be one line of at most "
            f"{_LONGEST_VALUE} printable ASCII characters"
        )
    return f"{match['scheme']} {secret}" if match["scheme"] else secret
