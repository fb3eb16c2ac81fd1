"""The two things that anyio does not offer cheaply: who am I, and wake the loop from another thread.

``anyio.get_current_task`` builds an object a call (about 5 us); a step asks for its task every time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Backend:
    """The event loop that a runtime runs on."""

    current_task: Callable[[], object]
    """The running task; compared by identity only."""
    call_soon: Callable[..., Any]
    """``call_soon(function, *args)`` from any thread runs the function in the loop."""


def current_backend() -> Backend:
    """The loop of the caller (asyncio or trio)."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        import trio

        return Backend(trio.lowlevel.current_task, trio.lowlevel.current_trio_token().run_sync_soon)
    return Backend(asyncio.current_task, loop.call_soon_threadsafe)
