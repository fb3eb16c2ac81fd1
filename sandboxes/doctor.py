"""What the doctor finds out about sandboxes: the engine, the images, and whether the walls hold, by running at them.

Without a profile in the configuration it says in a moment whether there is an engine; with some, it makes a sandbox of
each and proves it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import anyio
from anyio.abc import ByteStream

from ridethrough.runtime.config import Config
from ridethrough.runtime.errors import ConfigError, SandboxError, SandboxUnavailable
from ridethrough.sandboxes.engine import Engine, Image
from ridethrough.sandboxes.images import RECIPE_LABEL, RECIPES, recipe_digest
from ridethrough.sandboxes.probe import Proof, prove, runtime_for
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import Host

Check = tuple[str, Literal["ok", "doubtful", "wrong"], str, str]
"""What was looked at, how it is, in words, and how to mend it."""

LITTLE_SPACE: Final = 2 * 2**30
"""Bytes: an image with a browser needs most of it."""

LEAKS_NAMES: Final = "internal networks of other containers forward DNS queries to the outside (CVE-2024-29018)"
MENDED: Final = ((23, 0, 11), (25, 0, 5))
"""The releases of their lines in which that is mended; from 26.0 on it always is."""


def examine(config: Config) -> Iterator[Check]:
    """Check all that the profiles of ``config`` need."""
    profiles: list[SandboxProfile] = []
    for name, table in config.sandboxes.items():
        try:
            profiles.append(SandboxProfile.of(name, table))
        except ConfigError as error:
            yield f"sandbox {name}", "wrong", error.message, "mend the line and ask again"
    yield from (_local(profile) for profile in profiles if profile.kind == "local")
    docker = [profile for profile in profiles if profile.kind == "docker"]
    if docker or not config.sandboxes:
        yield from anyio.run(_examined, docker, config.path.parent if config.path else None)


def _local(profile: SandboxProfile) -> Check:
    mend = 'use kind = "docker" for what a model wrote; runs need --allow-local for this one'
    return f"sandbox {profile.name}", "doubtful", "of kind local, which is no boundary", mend


async def _network(profile: SandboxProfile, base: Path | None) -> Check:
    """Start the proxy as it will be started: its list, its secrets and its program."""
    from ridethrough.sandboxes.egress.policy import Policy
    from ridethrough.sandboxes.egress.squid import Options, running

    what = f"sandbox {profile.name}: network"
    try:
        async with running(Policy.of(profile, base), Options()):
            return what, "ok", f"the proxy starts; it lets {len(profile.network)} names through", ""
    except (ConfigError, SandboxError) as error:
        return what, "wrong", error.message, ""


# --- the engine -----------------------------------------------------------------------------------------------------


async def _examined(profiles: list[SandboxProfile], base: Path | None) -> list[Check]:
    checks = [await _network(profile, base) for profile in profiles if profile.network]
    return [*await _on_engine(profiles), *checks]


async def _on_engine(profiles: list[SandboxProfile]) -> list[Check]:
    try:
        async with Engine.open() as engine:
            info: dict[str, Any] = await engine.call(lambda client: client.info(), "asked how it is")
            if not profiles:
                return [("sandboxes", "ok", f"Docker {info.get('ServerVersion')} is there for them", "")]
            return [*_engine(info), *[check async for check in _profiles(engine, profiles)]]
    except SandboxError as error:
        if profiles:
            return [("Docker", "wrong", error.message, "")]
        mend = "tools that run in sandboxes need it; nothing else does"
        return [("sandboxes", "doubtful", error.message, mend)]


def _engine(info: Mapping[str, Any]) -> Iterator[Check]:
    yield version_check(str(info.get("ServerVersion", "")))
    yield isolation_check(info)
    yield from _space(str(info.get("DockerRootDir", "")))


def version_check(version: str) -> Check:
    """Whether the engine has a weakness that is known."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    mended = numbers >= (26,) or any(numbers[:2] == line[:2] and numbers >= line for line in MENDED)
    if mended:
        return "Docker", "ok", version, ""
    mend = "update it to 23.0.11, 25.0.5, 26.0 or newer; sandboxes have no network of Docker's and are not touched"
    return "Docker", "doubtful", f"{version}: {LEAKS_NAMES}", mend


NEEDED: Final = {
    "MemoryLimit": "memory",
    "SwapLimit": "swap",
    "PidsLimit": "pids",
    "CpuCfsQuota": "cpus",
}
"""What the engine's kernel must be able to limit, by the engine's names."""


def isolation_check(info: Mapping[str, Any]) -> Check:
    """Whether the engine says that it can limit and filter; the profiles' proofs show whether it does."""
    missing = [name for key, name in NEEDED.items() if not info.get(key)]
    security = " ".join(map(str, info.get("SecurityOptions") or ()))
    detail = (
        f"control groups {info.get('CgroupVersion', '1')}, {info.get('Driver')} on "
        f"{_backing(info)}, seccomp {'on' if 'seccomp' in security else 'off'}"
    )
    if missing:
        mend = "boot with cgroup_enable=memory swapaccount=1, or use control groups 2"
        return "isolation", "wrong", f"{detail}; it cannot limit {', '.join(missing)}", mend
    if "seccomp" not in security or "seccomp,profile=unconfined" in security:
        return "isolation", "wrong", detail, "take the seccomp profile unconfined out of the engine's daemon.json"
    return "isolation", "ok", detail, ""


def _backing(info: Mapping[str, Any]) -> str:
    status = {str(pair[0]): str(pair[1]) for pair in info.get("DriverStatus") or () if len(pair) == 2}
    return status.get("Backing Filesystem", "an unknown filesystem")


def _space(folder: str) -> Iterator[Check]:
    """An engine on another machine keeps its images there."""
    if not folder or not Path(folder).is_dir():
        return
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return
    detail = f"{free / 1e9:.1f} GB free for images"
    if free < LITTLE_SPACE:
        yield "Docker's disk", "doubtful", detail, "make room: `docker image prune`, `docker builder prune`"
    else:
        yield "Docker's disk", "ok", detail, ""


# --- profiles -------------------------------------------------------------------------------------------------------


async def _profiles(engine: Engine, profiles: Iterable[SandboxProfile]) -> AsyncIterator[Check]:
    from ridethrough.sandboxes.docker import DockerHost

    async with DockerHost.open(relay_for=lambda profile, id: _nowhere) as host:
        for profile in profiles:
            image = await _image(engine, profile)
            yield image
            if image[1] != "wrong":
                yield await _proof(engine, host, profile)


async def _nowhere(stream: ByteStream) -> None:
    """The way out of a sandbox that is only proved: none."""
    await stream.aclose()


async def _image(engine: Engine, profile: SandboxProfile) -> Check:
    what = f"sandbox {profile.name}: image"
    try:
        return image_check(what, profile.image, await engine.image(profile.image))
    except SandboxUnavailable:
        return what, "wrong", f"{profile.image} is not there", _make(profile.image) or f"docker pull {profile.image}"


def image_check(what: str, name: str, image: Image) -> Check:
    """Whether an image of the project's is what its recipe would make now; any other is its owner's business."""
    make, recipe = _make(name), image.labels.get(RECIPE_LABEL)
    if not make:
        return what, "ok", name, ""
    if recipe is None:
        return what, "doubtful", f"{name} was not made by this project's recipe", make
    if recipe != recipe_digest(_recipe_of(name)):
        return what, "doubtful", f"{name} is of another version of ridethrough; calls may be slower", make
    return what, "ok", f"{name}, as its recipe wants it", ""


def _recipe_of(name: str) -> str:
    repository, _, tag = name.partition(":")
    owner, _, recipe = repository.partition("/")
    return recipe if owner == "ridethrough" and recipe in RECIPES and tag in ("", "latest") else ""


def _make(name: str) -> str:
    recipe = _recipe_of(name)
    return f"ridethrough sandbox build {recipe}" if recipe else ""


async def _proof(engine: Engine, host: Host, profile: SandboxProfile) -> Check:
    """Try it, with the runtime that it would get."""
    what = f"sandbox {profile.name}"
    try:
        runtime, record = await runtime_for(engine, profile, host)
        proof = await prove(host, profile)
    except SandboxError as error:
        return what, "wrong", error.message, ""
    return proof_check(what, f"{runtime} ({record['why']})", proof)


def proof_check(what: str, runtime: str, proof: Proof) -> Check:
    """A proof in a line; where something does not hold, with the command that shows it."""
    if proof.holds:
        walls = len(proof.evidence)
        return what, "ok", f"{walls} of {walls} limits and walls hold, tried in {proof.seconds:.1f} s; {runtime}", ""
    failures = "; ".join(f"{evidence.name}: {evidence.detail}" for evidence in proof.failures)
    see = ", ".join(f"`{evidence.see}`" for evidence in proof.failures if evidence.see)
    untried = all("could not be tried" in evidence.detail for evidence in proof.failures)
    mend = f"see for yourself in a sandbox: {see}" if see else ""
    return what, "doubtful" if untried else "wrong", f"{failures}; {runtime}", mend
