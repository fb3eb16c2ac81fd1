"""However a program is cut off, nothing of ours is left: no task, no thread, no open file, no held run."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from ridethrough import RunConflict, Runtime, fan_out, gather, sleep, step, wait_for, workflow
from ridethrough.runtime.config import Config
from ridethrough.runtime.store import RUNS, Store


@step
async def work(item: int) -> int:
    """A step in the loop."""
    await anyio.lowlevel.checkpoint()
    return item


@step
def work_in_thread(item: int) -> int:
    """A step in a thread."""
    return item


@workflow
async def child(item: int) -> int:
    """A child."""
    return await work(item)


@workflow
async def everything() -> list[int]:
    """One of each thing that can be awaited."""
    found = await gather(work(1), work_in_thread(2), child(3), limit=2)
    await sleep(0.001)
    found += await fan_out(work, [4, 5])
    found.append(await wait_for("go", int))
    return found


class Cut(BaseException):
    """What the end of a program looks like from inside."""


async def program(url: str, turns: int | None, opened: anyio.Event | None = None) -> bool:
    """Execute ``everything``, cut off when the event loop has gone round ``turns`` times; whether it ended before.

    With ``opened`` the counting begins once the runtime is open.
    """
    ended = False
    with anyio.CancelScope() as scope:

        async def cut(turns: int) -> None:
            if opened is not None:
                await opened.wait()
            for _ in range(turns):
                await anyio.lowlevel.checkpoint()
            scope.cancel()

        async with anyio.create_task_group() as tasks:
            if turns is not None:
                tasks.start_soon(cut, turns)
            async with Runtime.open(url, config=Config(), grace=0.0) as runtime:
                if opened is not None:
                    opened.set()
                run = await runtime.start(everything, id="r")
                with suppress(RunConflict):  # an earlier life may have had the signal and ended by now
                    await runtime.signal("r", "go", 6)
                assert await run.result() == [1, 2, 3, 4, 5, 6]
                ended = True
            tasks.cancel_scope.cancel()
    return ended


def open_files(folder: Path) -> list[str]:
    """Files of a folder that this process has open."""
    found = []
    for item in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(item)
        except OSError:
            continue
        if target.startswith(str(folder)):
            found.append(target)
    return found


def lives(folder: Path, backend: str, turns: Iterable[int], *, opening: bool) -> None:
    """Cut a program off after each number of turns; see that nothing is left, and that the next one finishes it."""
    before = set(threading.enumerate())
    for count in turns:
        here = folder / str(count)
        here.mkdir()
        url = f"sqlite:///{here / 'runs.db'}"
        ended = anyio.run(program, url, count, None if opening else anyio.Event(), backend=backend)
        ours = [item.name for item in threading.enumerate() if item not in before and "ridethrough" in item.name]
        assert ours == [], f"after {count} turns"
        assert open_files(here) == [], f"after {count} turns"
        store = Store(url)
        store.prepare()
        rows = store.read_now(lambda connection: connection.execute(RUNS.select()).all())
        assert [row.id for row in rows if row.worker_id is not None] == [], f"after {count} turns"
        store.close()
        if ended:
            return
        assert anyio.run(program, url, None, backend=backend)
    pytest.fail("it never ended by itself")


def growing(most: int) -> Iterator[int]:
    """Every small number, then fewer and fewer."""
    count = 1
    while count < most:
        yield count
        count += 1 + count // 4


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_cut_off_at_every_turn(tmp_path: Path, backend: str) -> None:
    """And the next program finishes what it began."""
    lives(tmp_path, backend, growing(1_000_000), opening=False)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_cut_off_while_opening(tmp_path: Path, backend: str) -> None:
    """A runtime that was not entered is not left either: it has to clean up after itself."""
    lives(tmp_path, backend, growing(1_000_000), opening=True)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_error_in_the_program(tmp_path: Path, backend: str) -> None:
    """It comes out as it is, and nothing is left."""
    before = set(threading.enumerate())

    async def failing(kind: type[BaseException]) -> None:
        async with Runtime.open(f"sqlite:///{tmp_path / 'runs.db'}", config=Config(), grace=0.0) as runtime:
            await runtime.start(everything)
            await anyio.lowlevel.checkpoint()
            raise kind("mine")

    for kind in (ValueError, Cut):
        with pytest.raises(kind, match="mine"):
            anyio.run(failing, kind, backend=backend)
        assert [item for item in threading.enumerate() if item not in before and "ridethrough" in item.name] == []
        assert open_files(tmp_path) == []


@pytest.mark.anyio
async def test_cancelling_those_who_wait(open_runtime: Any) -> None:
    """A result, events, a start that are waited for can be given up; the run goes on."""
    async with open_runtime() as runtime:
        run = await runtime.start(everything, id="r")
        for _ in range(20):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(run.result)
                    tasks.start_soon(runtime.start, everything)
                    await anyio.lowlevel.checkpoint()
                    scope.cancel()
        assert runtime.worker.awaited == {}
        await runtime.signal("r", "go", 6)
        assert await run.result() == [1, 2, 3, 4, 5, 6]
        for view in await runtime.list(limit=None):
            if view.parent is None and view.id != "r":
                await runtime.signal(view.id, "go", 6)
                with anyio.fail_after(20):
                    await (await runtime.get(view.id)).result()
