"""What all tests share."""

from __future__ import annotations

import pytest

DOCKER = ("tests/sandboxes/", "tests/examples/", "tests/docs/", "tests/tools/test_computer", "tests/tools/test_builtin")
"""Tests that look at what the machine's Docker engine has: one after the other."""


ALONE = ("tests/agents/", "tests/cli/", "tests/demo/", "tests/drill/", "tests/kill/")
"""Tests in which many processes or agents run against the clock: with nothing beside them."""


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests of a file to one process, and all that share the engine to the same one."""
    for item in items:
        file = item.nodeid.partition("::")[0]
        group = "docker" if file.startswith(DOCKER) else file
        item.add_marker(pytest.mark.xdist_group(group))
        if file.startswith(ALONE):
            item.add_marker(pytest.mark.alone)


@pytest.fixture(params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run asynchronous tests on asyncio; a module that must work on trio too parametrises this fixture itself."""
    return str(request.param)
