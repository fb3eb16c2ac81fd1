"""What all tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run asynchronous tests on asyncio; a module that must work on trio too parametrises this fixture itself."""
    return str(request.param)
