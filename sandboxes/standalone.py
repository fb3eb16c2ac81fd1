"""A sandbox on its own, for programs that have no runtime:

    async with docker_sandbox("python") as sandbox:
        print((await sandbox.exec(["python3", "-c", "print(6 * 7)"], timeout=10)).stdout)

It has a host of its own and is removed with the block. When the program dies first, nobody is attached any more, and it
ends by itself ``LINGER`` seconds later.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import anyio

from ridethrough.runtime.config import Config, load_config, nearest
from ridethrough.runtime.errors import ConfigError
from ridethrough.sandboxes.profile import BUILT_IN, SandboxProfile
from ridethrough.sandboxes.sandbox import Host, RelayFor, Sandbox, Snapshot

LINGER: Final = 15.0
"""Seconds that it outlives a program that died."""

OWNER_LABEL: Final = "ridethrough.owner"
"""Whose it is: a process and the boot of its machine, ``PID@BOOT``."""


@asynccontextmanager
async def docker_sandbox(
    profile: str | SandboxProfile = "python",
    *,
    config: Config | Path | str | None = None,
    snapshot: Snapshot | None = None,
    env: Mapping[str, str] | None = None,
) -> AsyncGenerator[Sandbox]:
    """A sandbox in a container, removed at the end of the block.

    Args:
        profile: A profile, or the name of one: ``[sandboxes.NAME]`` of the configuration, ``python`` or ``desktop``.
        config: A configuration or its file; found as everywhere when left out.
        snapshot: What its workspace has to begin with.
        env: Added to the profile's environment.

    Raises:
        SandboxUnavailable: there can be none, with what to do.
        ConfigError: there is no such profile, or the configuration cannot be used.
    """
    from ridethrough.sandboxes.docker import DockerHost

    loaded = _loaded(config)
    wanted = _wanted(profile, loaded, env)
    async with AsyncExitStack() as stack:
        relay_for = await _way_out(wanted, loaded, stack)
        host = await stack.enter_async_context(DockerHost.open(relay_for=relay_for))
        async with _lent(host, wanted, snapshot) as sandbox:
            yield sandbox


@asynccontextmanager
async def local_sandbox(
    profile: str | SandboxProfile = "python",
    *,
    config: Config | Path | str | None = None,
    snapshot: Snapshot | None = None,
    env: Mapping[str, str] | None = None,
) -> AsyncGenerator[Sandbox]:
    """The same in a child process, for machines without Docker: no boundary. What runs in it runs as you.

    Raises:
        SandboxUnavailable, ConfigError: as for ``docker_sandbox``.
    """
    from ridethrough.sandboxes.local import LocalHost

    loaded = _loaded(config)
    wanted = replace(_wanted(profile, loaded, env), kind="local")
    async with AsyncExitStack() as stack:
        relay_for = await _way_out(wanted, loaded, stack)
        host = await stack.enter_async_context(LocalHost.open(relay_for=relay_for))
        async with _lent(host, wanted, snapshot) as sandbox:
            yield sandbox


@asynccontextmanager
async def _lent(host: Host, profile: SandboxProfile, snapshot: Snapshot | None) -> AsyncGenerator[Sandbox]:
    labels = {OWNER_LABEL: f"{os.getpid()}@{_boot()}"}
    sandbox = await host.create(profile, id=secrets.token_hex(6), labels=labels, linger=LINGER)
    try:
        if snapshot is not None:
            await sandbox.restore(snapshot)
        yield sandbox
    finally:
        with anyio.CancelScope(shield=True):
            await sandbox.aclose()


async def _way_out(profile: SandboxProfile, config: Config, stack: AsyncExitStack) -> RelayFor | None:
    """The proxy, for a profile with a network; it is closed with ``stack``."""
    if not profile.network:
        return None
    from ridethrough.sandboxes.egress.egress import Egress

    base = config.path.parent if config.path else None
    egress = await stack.enter_async_context(Egress.open(base=base))
    return egress.relay_for


def _loaded(config: Config | Path | str | None) -> Config:
    return config if isinstance(config, Config) else load_config(config)


def _wanted(profile: str | SandboxProfile, config: Config, env: Mapping[str, str] | None) -> SandboxProfile:
    found = profile if isinstance(profile, SandboxProfile) else _named(profile, config)
    return replace(found, env={**found.env, **env}) if env else found


def _named(name: str, config: Config) -> SandboxProfile:
    """The profile of that name; the configuration's go before those that are built in.

    Raises:
        ConfigError: there is none.
    """
    if name in config.sandboxes:
        return SandboxProfile.of(name, config.sandboxes[name])
    if name in BUILT_IN:
        return BUILT_IN[name]
    hint = nearest(name, {*config.sandboxes, *BUILT_IN})
    raise ConfigError(f"there is no sandbox profile '{name}'{hint}. Describe it in [sandboxes.{name}]")


def _boot() -> str:
    """Names this boot of this machine, so that a process of the same number after the next one is another."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"
