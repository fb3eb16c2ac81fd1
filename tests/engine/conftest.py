"""What the tests of the engine share: both event loops, databases in files, and waiting without sleeping blindly."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from ridethrough import FakeClock, Runtime
from ridethrough.runtime.config import Config
from ridethrough.runtime.workflow import REGISTRY, Workflow

DEADLINE = 20.0
"""Seconds after which something that should happen counts as not happening; no test depends on how fast it does."""


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The engine must work on both."""
    return str(request.param)


@pytest.fixture(autouse=True)
def own_registry(request: pytest.FixtureRequest) -> Iterator[None]:
    """Workflows are found by name: a test must meet those of its own module, and leave none of its own behind."""
    before = dict(REGISTRY)
    REGISTRY.update({item.name: item for item in vars(request.module).values() if isinstance(item, Workflow)})
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A database that is not there yet."""
    return f"sqlite:///{tmp_path / 'runs.db'}"


@pytest.fixture
def clock() -> FakeClock:
    """Time that stands still."""
    return FakeClock()


@pytest.fixture
def open_runtime(url: str) -> Callable[..., Runtime]:
    """Opens the test's database; running steps get no grace when it closes, as if the process had died."""

    def open_it(**options: Any) -> Runtime:
        chosen: dict[str, Any] = {"config": Config(), "grace": 0.0, **options}
        return Runtime.open(url, **chosen)

    return open_it


@pytest.fixture
def eventually() -> Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]:
    """Waits until a question is answered by something true, which it returns."""

    async def wait(question: Callable[[], Awaitable[Any]]) -> Any:
        with anyio.fail_after(DEADLINE):
            while not (answer := await question()):  # noqa: ASYNC110 - a database sets no event
                await anyio.sleep(0.005)
            return answer

    return wait


@pytest.fixture
def reaches(eventually: Any) -> Callable[[Any, str], Awaitable[None]]:
    """Waits until a run has a status."""

    async def wait(run: Any, status: str) -> None:
        async def is_there() -> bool:
            return bool(run.status == status)

        await eventually(is_there)

    return wait
