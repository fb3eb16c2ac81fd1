"""Where a server is, and the way there: base URLs, and the proxies of the environment."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from ridethrough.runtime.errors import ConfigError


def parsed(base_url: str) -> SplitResult:
    """Take a base URL apart.

    Raises:
        ConfigError: It is not the URL of an HTTP server; the text does not repeat it, since it may hold a password.
    """
    try:
        parts = urlsplit(base_url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:  # an open bracket, or a port that is none
        pass
    raise ConfigError("base_url is not of the form http://HOST/PATH or https://HOST/PATH")


def joined(base_url: str, path: str) -> str:
    """Join ``path`` to a base URL; both may have a query, as Azure's base URLs do (``?api-version=``)."""
    parts = parsed(base_url)
    own, _, query = path.partition("?")
    prefix = parts.path.rstrip("/")
    both = "&".join(part for part in (parts.query, query) if part)
    return parts._replace(path=f"{prefix}/{own.lstrip('/')}" if own else prefix, query=both, fragment="").geturl()


def is_loopback(base_url: str) -> bool:
    """Whether a server is on this machine."""
    host = parsed(base_url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def proxy_for(base_url: str) -> str | None:
    """Return the proxy's URL that the environment (``HTTPS_PROXY``, ``ALL_PROXY``, ``NO_PROXY``) or the system names.

    Servers on this machine are reached without one.

    Raises:
        ConfigError: It is of a kind that is not supported, such as SOCKS, or cannot be read.
    """
    from urllib.request import getproxies, proxy_bypass

    parts = parsed(base_url)
    proxies = getproxies()
    url = proxies.get(parts.scheme) or proxies.get("all")
    if not url or is_loopback(base_url) or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    url = url if "://" in url else f"http://{url}"
    try:
        parsed(url)
    except ConfigError:
        kind = url.partition("://")[0]
        text = f"the environment names a proxy of kind '{kind}': only those like http://HOST:PORT and https://... work"
        raise ConfigError(text) from None
    return url
