"""Blocking functions of users, in threads that cannot hold the process up.

anyio's worker threads are not daemons: one tool that hangs for ever would keep the interpreter from ending, and
abandoned calls would use up a limiter that others share. A thread of its own costs about 60 us and has neither fault.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import anyio

from ridethrough.runtime.backend import current_backend

T = TypeVar("T")


async def run_in_thread(function: Callable[[], T]) -> T:
    """Run ``function`` in a daemon thread and return its result; on cancellation the thread is left to itself.

    Raises:
        RuntimeError: the function raised something that would end the process (``SystemExit``).
    """
    done, box, call_soon = anyio.Event(), _Box(), current_backend().call_soon
    context = contextvars.copy_context()

    def work() -> None:
        try:
            box.value = context.run(function)
        except BaseException as error:
            box.error = error
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            call_soon(done.set)

    threading.Thread(target=work, name="ridethrough-call", daemon=True).start()
    await done.wait()
    if box.error is None:
        return box.value  # type: ignore[no-any-return]
    if isinstance(box.error, Exception):
        raise box.error
    raise RuntimeError(f"The function tried to end its thread or the process ({box.error!r}).") from box.error


class _Box:
    value: Any = None
    error: BaseException | None = None
