"""Where a server is, and the way there: base URLs, proxies, and whom TLS trusts."""

from __future__ import annotations

import base64
import os
import ssl
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import SplitResult, quote, unquote, urlsplit

Phase = Literal["pool", "connect", "write", "read"]
_PORTS = {"http": 80, "https": 443}


class Broken(Exception):
    """A connection failed, or could not be.

    ``untouched`` says that not one byte of an answer had come.
    """

    def __init__(self, text: str, phase: Phase, *, untouched: bool = True) -> None:
        super().__init__(text)
        self.phase: Phase = phase
        self.untouched = untouched


@dataclass(frozen=True)
class Endpoint:
    """What to connect to."""

    host: str
    port: int
    secure: bool

    @property
    def authority(self) -> str:
        """Host and port as in a URL, the port also where it is the usual one."""
        return f"{_bracketed(self.host)}:{self.port}"


@dataclass(frozen=True)
class Target:
    """A server's base URL, taken apart once: where to connect, what ``host`` says, how paths are joined."""

    endpoint: Endpoint
    host: str
    prefix: str
    query: str
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """What the URL's user and password become."""

    def path(self, path: str) -> str:
        """Join ``path`` to the base URL's own; both may have a query, as Azure's base URLs do (``?api-version=``)."""
        own, _, query = path.partition("?")
        joined = f"{self.prefix}/{own.lstrip('/')}" if own else self.prefix or "/"
        both = "&".join(part for part in (self.query, query) if part)
        return quote(f"{joined}?{both}" if both else joined, safe="/?:@!$&'()*+,;=-._~%")


@dataclass(frozen=True)
class Proxy:
    """A proxy on the way, and what it wants to be told."""

    endpoint: Endpoint
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)


def target_of(url: str) -> Target:
    """Take a base URL apart.

    Raises:
        Broken: It is not the URL of an HTTP server; the text does not repeat it, since it may hold a password.
    """
    parts = urlsplit(url)
    try:
        endpoint = _endpoint(parts)
    except (ValueError, KeyError):
        raise Broken("base_url is not of the form http://HOST/PATH or https://HOST/PATH", "connect") from None
    usual = endpoint.port == _PORTS[parts.scheme]
    named = _bracketed(endpoint.host) if usual else endpoint.authority
    return Target(endpoint, named, parts.path.rstrip("/"), parts.query, _credentials(parts, "authorization"))


def proxy_for(endpoint: Endpoint) -> Proxy | None:
    """Return the proxy that the environment (``HTTPS_PROXY``, ``ALL_PROXY``, ``NO_PROXY``) or the system names.

    Raises:
        Broken: It is of a kind that is not supported, such as SOCKS.
    """
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    url = proxies.get("https" if endpoint.secure else "http") or proxies.get("all")
    if not url or proxy_bypass(endpoint.authority):
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        return Proxy(_endpoint(parts), _credentials(parts, "proxy-authorization"))
    except (ValueError, KeyError):
        text = f"the environment names a proxy of kind '{parts.scheme}': only http and https proxies work"
        raise Broken(text, "connect") from None


def trusted() -> ssl.SSLContext:
    """Return a context that trusts what the system trusts, and Mozilla's roots, which bare containers lack.

    ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` replace both. Loading takes about 20 ms.
    """
    context = ssl.create_default_context()
    if not (os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")):
        import certifi

        context.load_verify_locations(certifi.where())
    context.set_alpn_protocols(["http/1.1"])
    return context


def is_loopback(url: str) -> bool:
    """Whether ``url`` is on this machine."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _endpoint(parts: SplitResult) -> Endpoint:
    usual, host = _PORTS[parts.scheme], parts.hostname
    if not host:
        raise ValueError("there is no host")
    return Endpoint(host if host.isascii() else host.encode("idna").decode(), parts.port or usual, usual == 443)


def _credentials(parts: SplitResult, header: str) -> tuple[tuple[str, str], ...]:
    if parts.username is None:
        return ()
    told = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return ((header, f"Basic {base64.b64encode(told).decode()}"),)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
