"""What a sandbox is made from, and the one direction in which a call may change it: towards less."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from ridethrough.runtime.errors import ConfigError

if TYPE_CHECKING:
    from ridethrough.runtime.config import SandboxConfig

Kind = Literal["docker", "local"]
RuntimeChoice = Literal["auto", "runc", "runsc"]

WORKSPACE: Final = "/workspace"
NOBODY: Final = 65534
_UNITS: Final = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


def parse_size(text: str | int) -> int:
    """Bytes of ``"512m"``, ``"2g"``, ``"64k"`` or a number.

    Raises:
        ConfigError: it is no size.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([kmg]?)(?:i?b)?\s*", str(text), re.IGNORECASE)
    if match is None:
        raise ConfigError(f'{text!r} is no size: write a number of bytes, or text such as "512m" or "2g"')
    return int(float(match[1]) * _UNITS[match[2].lower()])


@dataclass(frozen=True, slots=True)
class SandboxProfile:
    """A sandbox's image and limits. The defaults are the hardened ones; each field that opens something says so.

    Attributes:
        name: How tools and the configuration call it.
        image: A local image, or one that the engine can pull. Python 3.8 or newer in it makes calls fast; without it
            they fall back to plain ``docker exec``.
        memory: Bytes, swap included.
        cpus: Cores.
        pids: Processes and threads, the supervisor's included.
        disk: Bytes of the workspace and of ``/tmp``, each; they live in memory and count towards it.
        network: ``()`` for none; host names that may be reached through the proxy: ``example.com``, ``.example.com``
            for it and all below it, each with ``:PORT`` where it is not 80 or 443.
        private_hosts: Host names of ``network`` that may resolve to private addresses.
        inject: Headers that the proxy adds for a host of ``network``, so that their secrets never enter: host ->
            header -> value. The sandbox asks ``http://HOST/``; the proxy goes on over TLS.
        runtime: ``auto`` takes gVisor where it proves that it enforces the limits.
        env: Environment of every call.
        kind: ``local`` is no boundary.
        desktop: Whether it has a display; the image must have one (``ridethrough/desktop``).
        warm: How many are kept ready while the profile is in use.
        snapshot_limit: Bytes of an archive of the workspace.
        user: Who runs in it.
    """

    name: str = "python"
    image: str = "ridethrough/python:latest"
    memory: int = 512 * 2**20
    cpus: float = 1.0
    pids: int = 128
    disk: int = 256 * 2**20
    network: tuple[str, ...] = ()
    private_hosts: tuple[str, ...] = ()
    inject: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]], repr=False)
    runtime: RuntimeChoice = "auto"
    env: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    kind: Kind = "docker"
    desktop: bool = False
    warm: int = 1
    snapshot_limit: int = 64 * 2**20
    user: int = NOBODY

    def __post_init__(self) -> None:
        """Refuse what would be no limit, or none that was meant: engines take 0 for unlimited."""
        for key in ("memory", "cpus", "pids", "disk"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**60:
                raise ConfigError(f"sandbox profile {self.name}: {key} must be a number greater than 0; got {value!r}")
        for key in ("network", "private_hosts"):
            value = getattr(self, key)
            if isinstance(value, str) or not all(isinstance(host, str) for host in value):
                raise ConfigError(f"sandbox profile {self.name}: {key} is a tuple of host names; got {value!r}")
        if not self.image.strip():
            raise ConfigError(f"sandbox profile {self.name}: image is empty; name one, or leave it out")

    @classmethod
    def of(cls, name: str, config: SandboxConfig) -> SandboxProfile:
        """The profile that ``[sandboxes.NAME]`` describes; secrets in ``inject`` are still references.

        What the table leaves out is as in the built-in profile of that name, where there is one.

        Raises:
            ConfigError: a size cannot be read.
        """
        given = {key: getattr(config, key) for key in config.model_fields_set}
        for key in given.keys() & {"memory", "disk", "snapshot_limit"}:
            given[key] = parse_size(given[key])
        if "network" in given:
            given["network"] = () if config.network == "none" else tuple(config.network)
        return replace(BUILT_IN.get(name, cls(name=name)), **given)

    def less(self, **changes: Any) -> SandboxProfile:
        """The profile with lower limits.

        Raises:
            ConfigError: a change would allow more, or is none of ``memory, cpus, pids, disk, network``.
        """
        for key, value in changes.items():
            if key not in _NARROWED:
                raise ConfigError(f"{key} cannot be changed for a call; these can: {', '.join(_NARROWED)}")
            if not _is_less(getattr(self, key), value):
                raise ConfigError(
                    f"profile {self.name}: {key} may only be lowered for a call, from {getattr(self, key)!r}; "
                    f"got {value!r}. Make another profile for work that needs more"
                )
        return replace(self, **changes)


_NARROWED: Final = ("memory", "cpus", "pids", "disk", "network")


def _is_less(now: Any, wanted: Any) -> bool:
    if isinstance(now, tuple):
        return isinstance(wanted, tuple) and set(wanted) <= set(now)
    return isinstance(wanted, int | float) and 0 < wanted <= now


BUILT_IN: Final = {
    "python": SandboxProfile(),
    "desktop": SandboxProfile(
        name="desktop",
        image="ridethrough/desktop:latest",
        desktop=True,
        memory=2 * 2**30,
        cpus=2.0,
        pids=512,
        warm=0,
    ),
}
"""Profiles that need no configuration. A browser has some 250 threads, and half a gigabyte with a page or two."""
