"""The two things that anyio does not offer cheaply: who am I, and wake the loop from another thread.

``anyio.get_current_task`` builds an object a call (about 5 us); a step asks for its task every time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio


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


def is_our_cancellation(error: BaseException) -> bool:
    """Whether ``error`` ends the caller because a deadline has passed or its run is unwound.

    asyncio lets any code raise ``CancelledError``: a function that awaits something cancelled does so without anybody
    having cancelled the function. anyio would end the whole runtime for it.
    """
    if isinstance(error, BaseExceptionGroup):
        return all(is_our_cancellation(each) for each in error.exceptions)
    if not isinstance(error, anyio.get_cancelled_exc_class()):
        return False
    if not isinstance(error, asyncio.CancelledError):
        return True
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
