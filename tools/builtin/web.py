"""Pages of the network that the sandbox may reach."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import urlsplit

from ridethrough.runtime.errors import SandboxTimeout, ToolFailed
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import Sandbox
from ridethrough.tools.builtin.inside import NoPython, run_inside
from ridethrough.tools.context import ToolContext
from ridethrough.tools.tool import tool

DEADLINE: Final = 60.0
ANSWER: Final = 30.0
"""Seconds of silence after which a server is given up."""

MOST: Final = 2 * 1024 * 1024
"""Bytes of a body that are read: as JSON they are six times as many at most, which still is an answer."""

OWN: Final = ("localhost", "127.0.0.1")
"""Where the sandbox reaches itself, with or without a network."""


@tool(effect="read", confined=True, timeout=DEADLINE + 120.0, max_output=40_000)
async def fetch_url(url: str, ctx: ToolContext) -> str:
    """Get a page of the web as text, from the hosts that this sandbox may reach.

    Args:
        url: Its address, beginning with http:// or https://.
    """
    sandbox: Sandbox = ctx.sandbox
    await sandbox.stat(".")  # now it is there, and its profile is known
    _check(url, sandbox.profile)
    try:
        given = {"url": url, "limit": MOST, "timeout": ANSWER}
        found = await run_inside(sandbox, "fetch", given, DEADLINE)
    except NoPython as error:
        raise ToolFailed(f"Pages are fetched with Python, which this sandbox does not have: {error}") from error
    except SandboxTimeout as error:
        raise ToolFailed(f"{url} did not answer completely within {DEADLINE:g} s.") from error
    return _page(url, found, sandbox.profile)


def _check(url: str, profile: SandboxProfile) -> None:
    """Refuse what is no address, and say so at once where there is no network at all. What the list says of a host is
    for the proxy to decide: it keeps a record of every such question.

    Raises:
        ToolFailed: the sandbox may not go there.
    """
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
    except ValueError as error:
        raise ToolFailed(f"{url!r} is no address: {error}.") from error
    if parts.scheme not in ("http", "https") or not host or any(letter <= " " for letter in url):
        raise ToolFailed(f"{url!r} is no address of a page. Give one that begins with http:// or https://.")
    if host in OWN:
        return
    if not profile.network:
        raise ToolFailed(
            f"This sandbox has no network. If {host} is to be reached, a person has to allow it in the configuration: "
            f'network = ["{host}"] in [sandboxes.{profile.name}].'
        )


def _allowed(profile: SandboxProfile) -> str:
    return f"It may reach: {', '.join(profile.network)}." if profile.network else "It has no network."


def _page(url: str, found: dict[str, Any], profile: SandboxProfile) -> str:
    """What came back, for the model; every field of it comes from inside.

    Raises:
        ToolFailed: nothing came back, or nothing that is text.
    """
    if "error" in found:
        allowed = "" if urlsplit(url).hostname in OWN else f" {_allowed(profile)}"
        raise ToolFailed(f"{url} could not be fetched: {found['error']}.{allowed}")
    if found.get("refused"):
        raise ToolFailed(
            f"The proxy refused {url} ({found['refused']}). {_allowed(profile)} A person can add a host to network in "
            f"[sandboxes.{profile.name}]."
        )
    kind = found.get("type") or "of unknown type"
    if "text" not in found:
        size = f"{found['size']} bytes" if found.get("size") else f"more than {MOST} bytes"
        raise ToolFailed(f"{url} is no text: {kind}, {size}. With a network, shell can download it to a file.")
    moved = f" (moved to {found['url']})" if found.get("url") != url else ""
    more = f"\n[the first {MOST} bytes]" if found.get("more") else ""
    return f"{found.get('status')} {kind}{moved}\n\n{found['text']}{more}"
