"""Images: what is in them, when they are made anew, and what a build that breaks off leaves behind. A real engine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import anyio
import anyio.to_thread
import pytest

from ridethrough.runtime.errors import ConfigError, SandboxError, SandboxUnavailable
from ridethrough.sandboxes import frames, images
from ridethrough.sandboxes.docker import DockerHost
from ridethrough.sandboxes.images import Recipe, build, recipe_digest
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import Sandbox

# The image may have to be made first.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]

BASE = "ridethrough/python:latest"
PATIENCE = 60.0


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def probe(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recipe]:
    """A recipe that takes a second: no packages, on top of the project's own image."""
    recipe = Recipe(f"test-probe-{os.getpid()}", (), "for tests", {"/etc/probe": "one"})
    monkeypatch.setitem(images.RECIPES, "probe", recipe)
    yield recipe
    for tag in tags(engine, recipe):
        engine.remove_image(tag)


def tags(engine: Any, recipe: Recipe) -> dict[str, str]:
    """The names of a recipe's images, and which images they name."""
    return {tag: each["Id"] for each in engine.images(recipe.repository) for tag in each["RepoTags"]}


# --- recipes --------------------------------------------------------------------------------------------------------


def test_a_recipe_is_known_by_all_that_goes_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, desktop = recipe_digest("python"), recipe_digest("desktop")
    assert plain == recipe_digest("python")
    assert len({plain, desktop, recipe_digest("python", "debian:testing")}) == 3
    python = images.RECIPES["python"]
    monkeypatch.setitem(images.RECIPES, "python", replace(python, layers=(*python.layers, ("vim",))))
    assert recipe_digest("python") != plain
    monkeypatch.undo()
    monkeypatch.setattr(images, "supervisor_source", lambda: "print('another')")
    assert recipe_digest("python") != plain


async def test_there_are_these_recipes_and_no_others() -> None:
    with pytest.raises(ConfigError, match="'pyhton'; there are: python, desktop"):
        await build("pyhton")


# --- what is in them ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def sandbox(anyio_backend: str, engine: Any) -> AsyncGenerator[Sandbox]:
    await build("python")
    async with DockerHost.open() as host:
        sandbox = await host.create(SandboxProfile(), id="test-images")
        try:
            yield sandbox
        finally:
            await sandbox.aclose()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("id -un", "nobody"),
        ("echo ~nobody $HOME", "/workspace /workspace"),
        ("python -c 'import json, venv, sqlite3, ssl; print(1)'", "1"),
        ("for each in bash git rg curl tar gzip ps; do command -v $each >/dev/null || echo no $each; done", ""),
        ("find / -xdev -perm /6000 -type f 2>/dev/null", ""),
        ("ls /usr/lib/python3.*/json/__pycache__ | grep -c decoder", "1"),
        ("stat -c '%U %a' /opt/ridethrough/supervisor.py", "root 644"),
        ("test -w /usr/bin -o -w /opt/ridethrough || echo no", "no"),
        ("ls /var/lib/apt/lists /var/cache/apt", "/var/cache/apt:\n\n/var/lib/apt/lists:"),
    ],
)
async def test_the_python_image(sandbox: Sandbox, line: str, said: str) -> None:
    result = await sandbox.exec(["sh", "-c", line])
    assert (result.stdout.strip(), result.stderr) == (said, "")


async def test_labels_say_what_is_in_it(sandbox: Sandbox, engine: Any) -> None:
    labels = engine.inspect_image(BASE)["Config"]["Labels"]
    listed = (await sandbox.exec(["cat", "/opt/ridethrough/packages"])).stdout_bytes
    assert hashlib.sha256(listed).hexdigest() == labels["ridethrough.packages"]
    installed = await sandbox.exec(["dpkg-query", "-W", "-f", "${Package}=${Version}\\n"])
    assert installed.stdout_bytes == listed
    inside = (await sandbox.exec(["cat", "/opt/ridethrough/supervisor.py"])).stdout
    assert frames.digest_of(inside) == labels["ridethrough.supervisor"] == frames.SUPERVISOR_DIGEST
    assert labels["ridethrough.recipe"] == recipe_digest("python")


async def test_what_is_there_is_not_made_again(sandbox: Sandbox) -> None:
    said: list[str] = []
    built = await build("python", say=said.append)
    assert (built.fresh, said) == (False, [])
    assert built.size > 50_000_000


# --- making them ----------------------------------------------------------------------------------------------------


async def test_a_changed_recipe_takes_the_place_of_the_old_image(
    engine: Any, probe: Recipe, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await build("probe", base=BASE)
    assert first.fresh
    assert set(tags(engine, probe)) == {f"{probe.repository}:latest", f"{probe.repository}:{first.recipe[:12]}"}
    monkeypatch.setitem(images.RECIPES, "probe", replace(probe, files={"/etc/probe": "two"}))
    second = await build("probe", base=BASE)
    assert second.id != first.id
    assert set(tags(engine, probe).values()) == {second.id}
    assert first.id not in {each["Id"] for each in engine.images(all=True)}


async def test_a_name_that_was_lost_comes_back(engine: Any, probe: Recipe, sandbox: Sandbox) -> None:
    built = await build("probe", base=BASE)
    engine.remove_image(f"{probe.repository}:latest")
    again = await build("probe", base=BASE)
    assert (again.id, again.fresh) == (built.id, False)
    assert tags(engine, probe)[f"{probe.repository}:latest"] == built.id


async def test_two_at_once_make_one(engine: Any, probe: Recipe, sandbox: Sandbox) -> None:
    built = []

    async def make() -> None:
        built.append(await build("probe", base=BASE))

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(make)
    assert sorted(each.fresh for each in built) == [False, False, True]
    assert len({each.id for each in built}) == 1


async def test_a_build_that_fails_leaves_the_old_image(
    engine: Any, probe: Recipe, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = await build("probe", base=BASE)
    broken = replace(probe, files={"/etc/passwd/is/no/folder": "x"})
    monkeypatch.setitem(images.RECIPES, "probe", broken)
    with pytest.raises(SandboxError, match="asked to build ridethrough/test-probe"):
        await build("probe", base=BASE)
    assert set(tags(engine, probe).values()) == {built.id}
    assert containers(engine) == []


async def test_a_build_that_is_broken_off_leaves_the_old_image(
    engine: Any, probe: Recipe, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = await build("probe", base=BASE)
    with anyio.CancelScope() as scope:
        await build("probe", base=BASE, force=True, say=lambda line: scope.cancel())
    assert scope.cancelled_caught
    assert set(tags(engine, probe).values()) == {built.id}
    with anyio.fail_after(PATIENCE):  # the engine breaks it off when it comes to say its next word
        while await anyio.to_thread.run_sync(containers, engine):
            pass
    assert (await build("probe", base=BASE)).id == built.id


def containers(engine: Any) -> list[str]:
    """Containers that a build has left: those of its steps."""
    found = engine.containers(all=True, filters={"label": "ridethrough.image"})
    return [each["Id"] for each in found if each["Command"].startswith("/bin/sh -c")]


@pytest.fixture
def no_root(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no root in the engine, and no registry."""
    monkeypatch.setattr(images, "ROOT", "127.0.0.1:1/none:root")
    monkeypatch.setattr(images, "PULLED", "127.0.0.1:1/none:slim")
    monkeypatch.setitem(images.RECIPES, "probe", Recipe("test-none", (), "for tests"))


@pytest.mark.usefixtures("no_root")
async def test_without_rights_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SandboxUnavailable, match=r"cannot be pulled .* needs root"):
        await build("probe")


@pytest.mark.usefixtures("no_root")
async def test_without_debootstrap_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxUnavailable, match="apt-get install debootstrap"):
        await build("probe")


def test_on_trio(probe: Recipe, sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(1) as thread:  # the module's own loop has this one
        built = thread.submit(lambda: anyio.run(lambda: build("probe", base=BASE), backend="trio")).result()
    assert built.fresh
