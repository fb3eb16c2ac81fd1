"""Sandboxes in containers: the whole suite, and what only a real engine can do to one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from tests.sandboxes.conformance import Conformance, OpenHost, box
from tests.sandboxes.conftest import SESSION

from ridethrough.sandboxes.docker import DockerHost
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import Host

__all__ = ["box"]


@pytest.fixture(scope="module", params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def profile(python_image: str) -> SandboxProfile:
    return SandboxProfile(image=python_image, cpus=2.0, env={"FROM_PROFILE": "yes"})


@pytest.fixture(scope="module")
async def host(anyio_backend: str, engine: Any) -> AsyncGenerator[DockerHost]:
    async with DockerHost.open(labels=SESSION) as opened:
        yield opened


@pytest.fixture
def another_host() -> OpenHost:
    def open_another() -> AbstractAsyncContextManager[Host]:
        return DockerHost.open(labels=SESSION)

    return open_another


class TestDocker(Conformance):
    """The suite in containers."""
