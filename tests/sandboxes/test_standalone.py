"""Sandboxes of programs that have no runtime."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from ridethrough.runtime.config import parse_config
from ridethrough.runtime.errors import ConfigError, SandboxGone
from ridethrough.sandboxes.container import container_name
from ridethrough.sandboxes.profile import BUILT_IN, SandboxProfile
from ridethrough.sandboxes.standalone import OWNER_LABEL, docker_sandbox, local_sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.processes]

PATIENCE = 60.0
PROGRAM = """
import anyio
from ridethrough.sandboxes import standalone

standalone.LINGER = 1.0

async def main():
    async with standalone.docker_sandbox() as sandbox:
        await sandbox.exec(["true"])
        print(sandbox.id, flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def names(engine: Any) -> list[str]:
    return [name.removeprefix("/") for each in engine.containers(all=True) for name in each["Names"]]


async def test_a_sandbox_for_a_block(engine: Any, python_image: str) -> None:
    """It is a real one, it knows whose it is, and it is gone afterwards."""
    async with docker_sandbox(env={"GIVEN": "yes"}) as sandbox:
        assert sandbox.boundary
        result = await sandbox.exec(["python3", "-c", "import os; print(os.environ['GIVEN'], 6 * 7)"], timeout=10)
        assert result.stdout == "yes 42\n"
        found = await anyio.to_thread.run_sync(engine.inspect_container, container_name(sandbox.id))
        assert "@" in found["Config"]["Labels"][OWNER_LABEL]
        await sandbox.write("kept", "as it was")
        snapshot = await sandbox.snapshot()
    with pytest.raises(SandboxGone):
        await sandbox.exec(["true"])
    assert container_name(sandbox.id) not in await anyio.to_thread.run_sync(names, engine)
    async with docker_sandbox(snapshot=snapshot) as again:
        assert await again.read("kept") == b"as it was"


async def test_a_sandbox_without_docker() -> None:
    async with local_sandbox(SandboxProfile(env={"A": "1"}), env={"B": "2"}) as sandbox:
        assert not sandbox.boundary
        assert (await sandbox.exec(["sh", "-c", "echo $A$B"])).stdout == "12\n"


async def test_profiles_are_those_of_the_configuration(tmp_path: Path) -> None:
    """A misspelt name is answered with the nearest; the file may be named, or be where it always is."""
    text = '[sandboxes.grader]\nkind = "local"\nenv = { WHO = "grader" }\n'
    file = tmp_path / "other.toml"
    file.write_text(text)
    for config in (parse_config(text), file, str(file)):
        async with local_sandbox("grader", config=config) as sandbox:
            assert (await sandbox.exec(["sh", "-c", "echo $WHO"])).stdout == "grader\n"
    with pytest.raises(ConfigError, match="did you mean 'grader'"):
        async with local_sandbox("gradr", config=file):
            pass


async def test_a_table_changes_what_it_names_of_a_built_in_profile() -> None:
    text = '[sandboxes.desktop]\nmemory = "4g"\nnetwork = ["example.com"]\n'
    text += "[sandboxes.python]\n[sandboxes.big]\ncpus = 4.0\n"
    found = {name: SandboxProfile.of(name, table) for name, table in parse_config(text).sandboxes.items()}
    assert found == {
        "desktop": replace(BUILT_IN["desktop"], memory=4 * 2**30, network=("example.com",)),
        "python": SandboxProfile(),
        "big": SandboxProfile(name="big", cpus=4.0),
    }


async def test_a_program_that_is_killed_leaves_nothing(engine: Any, python_image: str) -> None:
    """Nobody is attached any more, so the container ends by itself."""
    async with await anyio.open_process([sys.executable, "-c", PROGRAM]) as program:
        assert program.stdout is not None
        name = container_name((await program.stdout.receive()).decode().strip())
        assert name in await anyio.to_thread.run_sync(names, engine)
        program.kill()
    with anyio.fail_after(PATIENCE):
        while name in await anyio.to_thread.run_sync(names, engine):
            await anyio.lowlevel.checkpoint()
