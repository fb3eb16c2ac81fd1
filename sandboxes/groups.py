"""Task groups behind a context manager of ours: who writes ``async with`` has not asked for exception groups.

anyio wraps whatever leaves a task group. A caller who catches ``SandboxUnavailable``, or whose own block raises
``KeyError``, is to get just that.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup


@asynccontextmanager
async def task_group() -> AsyncGenerator[TaskGroup]:
    """A task group that raises a lone error as it is."""
    try:
        async with anyio.create_task_group() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise single(errors) from None


def single(error: BaseException) -> BaseException:
    """The error inside, where it is the only one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
