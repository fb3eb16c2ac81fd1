"""What the sandbox scripts share: the calls that each system makes, and how they are timed.

Every system runs the same commands in a container of the same image. A system gives `call(argv)`, which returns the
command's standard output; what it cannot do it leaves out, and the table has an empty cell.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from _measure import Meter, report, scaled

IMAGE = "ridethrough/python:latest"
CALLS, PYTHON_CALLS, AT_ONCE = scaled(200), scaled(60), 50
TEN_MB = 10 * 2**20
STARTS = scaled(10)

Call = Callable[[Sequence[str]], Awaitable[str]]
Many = Callable[[int, Sequence[str]], Awaitable[None]]

# What the interpreter itself takes to start there, without any system in between: a shell that starts it many times.
ITSELF = ["sh", "-c", f"i=0; while [ $i -lt {PYTHON_CALLS} ]; do python3 -c 1; i=$((i+1)); done"]


async def timed(call: Call, argv: Sequence[str], times: int) -> list[float]:
    """Milliseconds of each call, one after the other."""
    took = []
    for _ in range(times):
        begun = time.perf_counter()
        await call(argv)
        took.append((time.perf_counter() - begun) * 1000)
    return took


async def calls_case(system: str, call: Call, many: Many, **more: Any) -> None:
    """Warm calls of `true` and of `python3 -c`, one at a time, and fifty of the latter at once."""
    assert "41" in await call(["sh", "-c", "echo $((40 + 1))"])
    await timed(call, ["true"], 5)
    with Meter() as meter:
        true = await timed(call, ["true"], CALLS)
    begun = time.perf_counter()
    await call(ITSELF)
    itself = (time.perf_counter() - begun) * 1000 / PYTHON_CALLS
    python = await timed(call, ["python3", "-c", "1"], PYTHON_CALLS)
    begun = time.perf_counter()
    await many(AT_ONCE, ["python3", "-c", "1"])
    parallel = time.perf_counter() - begun
    report(
        system,
        "sandbox_calls",
        meter,
        CALLS,
        true_ms=statistics.median(true),
        true_p99_ms=sorted(true)[int(len(true) * 0.99) - 1],
        python_ms=statistics.median(python),
        itself_ms=itself,
        over_itself=statistics.median(python) / itself,
        parallel_s=parallel,
        parallel_rate=AT_ONCE / parallel,
        **more,
    )
