"""The run's sandbox as one tool call sees it: the whole port, with ids for what the call starts.

A call that is run again after a crash asks for the same things in the same order, so each of them gets the id that it
had in the first life, and the sandbox answers with the first one's result instead of starting another. An id holds a
digest of what is asked, so that code which has changed in between does not get the answer to another question.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from typing import Final, TypeVar

import anyio

from ridethrough.runtime.errors import Error, SandboxError, SandboxGone, SandboxUnavailable
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import (
    DEFAULT_TIMEOUT,
    KEEP_OUTPUT,
    Change,
    ExecResult,
    FileInfo,
    Listing,
    Output,
    Process,
    Sandbox,
    Session,
    Snapshot,
)

log = logging.getLogger("ridethrough")

T = TypeVar("T")

FIRST_WAIT: Final = 1.0
LONGEST_WAIT: Final = 30.0

KILL_SECONDS: Final = 10.0
"""How long the end of a call that was cut off is waited for; its deadline in the sandbox holds all the same."""


class CallSandbox(Sandbox):
    """The sandbox of a tool call; it is found or made when it is first needed.

    ``id`` and ``runtime`` are empty and ``boundary`` is false until then.
    """

    def __init__(
        self,
        profile: SandboxProfile,
        find: Callable[[], Awaitable[Sandbox]],
        prefix: str,
        stays: Callable[[], bool],
        on_gone: Callable[[], Awaitable[None]],
    ) -> None:
        """``find`` gives the sandbox itself; ``prefix`` begins the ids of what this call starts in it.

        ``stays`` tells, when the call is cut off here, whether what it had started is to go on there; ``on_gone`` is
        told that somebody has learnt of the sandbox's end.
        """
        self.id = self.runtime = ""
        self.boundary = False
        self.profile = profile
        self.started: list[str] = []
        self._find = find
        self._prefix = prefix
        self._stays = stays
        self._on_gone = on_gone
        self._counts: dict[str, int] = {}

    async def _sandbox(self) -> Sandbox:
        sandbox = await self._found()
        self.id, self.runtime, self.boundary = sandbox.id, sandbox.runtime, sandbox.boundary
        self.profile = sandbox.profile  # as it is configured; until now only its name was sure
        return sandbox

    async def _found(self) -> Sandbox:
        """The sandbox, waited for as long as the call's own deadline allows: an engine that is down for a moment is no
        answer of the tool."""
        pause = FIRST_WAIT
        while True:
            try:
                return await self._find()
            except SandboxUnavailable as error:
                log.warning("a call waits for its sandbox: %s", error)
                await anyio.sleep(pause)
                pause = min(2 * pause, LONGEST_WAIT)

    def _name(self, argv: Sequence[str], *more: object) -> str:
        """The id of the next thing of this kind that the call starts."""
        digest = hashlib.blake2b(repr((list(argv), more)).encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
        self._counts[digest] = count = self._counts.get(digest, 0) + 1
        name = f"{self._prefix}.{digest}.{count}"
        self.started.append(name)
        return name

    @asynccontextmanager
    async def _ended_when_cut_off(self, sandbox: Sandbox, call_id: str) -> AsyncGenerator[None]:
        """A call with an id goes on when the one who waits for it is cancelled; here that is so only for a run that
        another worker is to take up."""
        try:
            yield
        except SandboxGone:
            await self._on_gone()
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and not self._stays():
                with anyio.move_on_after(KILL_SECONDS, shield=True), suppress(Error):
                    await sandbox.kill(call_id)
            raise

    # --- commands ---------------------------------------------------------------------------------------------------

    async def exec(
        self,
        argv: Sequence[str],
        *,
        timeout: float = DEFAULT_TIMEOUT,
        stdin: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        keep_output: int = KEEP_OUTPUT,
        call_id: str | None = None,
    ) -> ExecResult:
        """As ``Sandbox.exec``; the call's own id unless another one is given."""
        call_id = call_id or self._name(argv, stdin, env, cwd)
        sandbox = await self._sandbox()
        async with self._ended_when_cut_off(sandbox, call_id):
            return await sandbox.exec(
                argv,
                timeout=timeout,
                stdin=stdin,
                env=env,
                cwd=cwd,
                user=user,
                keep_output=keep_output,
                call_id=call_id,
            )

    async def exec_stream(
        self,
        argv: Sequence[str],
        *,
        timeout: float = DEFAULT_TIMEOUT,
        stdin: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        call_id: str | None = None,
    ) -> AsyncGenerator[Output | ExecResult]:
        """As ``Sandbox.exec_stream``."""
        call_id = call_id or self._name(argv, stdin, env, cwd)
        sandbox = await self._sandbox()
        stream = sandbox.exec_stream(argv, timeout=timeout, stdin=stdin, env=env, cwd=cwd, call_id=call_id)
        async with self._ended_when_cut_off(sandbox, call_id), _closed_after(stream) as items:
            async for item in items:
                yield item

    async def start(
        self,
        argv: Sequence[str],
        *,
        timeout: float,
        stdin: bool = False,
        flow: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        call_id: str | None = None,
    ) -> Process:
        """As ``Sandbox.start``."""
        call_id = call_id or self._name(argv, stdin, env, cwd)
        sandbox = await self._sandbox()
        return await sandbox.start(argv, timeout=timeout, stdin=stdin, flow=flow, env=env, cwd=cwd, call_id=call_id)

    @asynccontextmanager
    async def _session(
        self, begin: Callable[[Sandbox], AbstractAsyncContextManager[Session]]
    ) -> AsyncGenerator[Session]:
        async with begin(await self._sandbox()) as session:
            yield session

    def python(self, *, env: Mapping[str, str] | None = None) -> AbstractAsyncContextManager[Session]:
        """As ``Sandbox.python``. A session does not survive a crash: the call that is run again begins a new one."""
        return self._session(lambda sandbox: sandbox.python(env=env))

    def shell(self, *, env: Mapping[str, str] | None = None) -> AbstractAsyncContextManager[Session]:
        """As ``Sandbox.shell``; see ``python``."""
        return self._session(lambda sandbox: sandbox.shell(env=env))

    async def forget(self, call_ids: Sequence[str]) -> None:
        """As ``Sandbox.forget``; the run does so by itself."""
        await (await self._sandbox()).forget(call_ids)

    async def kill(self, call_id: str) -> None:
        """As ``Sandbox.kill``."""
        await (await self._sandbox()).kill(call_id)

    # --- files ------------------------------------------------------------------------------------------------------

    async def read(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        """As ``Sandbox.read``."""
        return await (await self._sandbox()).read(path, offset=offset, limit=limit)

    async def write(self, path: str, data: bytes | str, *, append: bool = False, mode: int | None = None) -> int:
        """As ``Sandbox.write``."""
        return await (await self._sandbox()).write(path, data, append=append, mode=mode)

    async def list(self, path: str = ".", *, recursive: bool = False, after: str = "", limit: int = 1000) -> Listing:
        """As ``Sandbox.list``."""
        return await (await self._sandbox()).list(path, recursive=recursive, after=after, limit=limit)

    async def stat(self, path: str) -> FileInfo:
        """As ``Sandbox.stat``."""
        return await (await self._sandbox()).stat(path)

    async def remove(self, path: str) -> None:
        """As ``Sandbox.remove``."""
        await (await self._sandbox()).remove(path)

    async def watch(self, path: str = ".") -> AsyncGenerator[Change]:
        """As ``Sandbox.watch``."""
        async with _closed_after((await self._sandbox()).watch(path)) as changes:
            async for change in changes:
                yield change

    # --- the whole --------------------------------------------------------------------------------------------------

    async def snapshot(self) -> Snapshot:
        """As ``Sandbox.snapshot``."""
        return await (await self._sandbox()).snapshot()

    async def restore(self, snapshot: Snapshot) -> None:
        """As ``Sandbox.restore``."""
        await (await self._sandbox()).restore(snapshot)

    async def pause(self) -> None:
        """Not a call's to decide.

        Raises:
            SandboxError: always: other calls of the run are using it too.
        """
        raise self._not_its_own("pause")

    async def resume(self) -> None:
        """See ``pause``."""
        raise self._not_its_own("resume")

    async def fork(self) -> Sandbox:
        """See ``pause``: nobody would own the copy after a crash."""
        raise self._not_its_own("fork")

    async def aclose(self) -> None:
        """Nothing: the sandbox belongs to the run."""

    async def outlive(self, seconds: float) -> None:
        """Nothing: the run decides."""

    async def detach(self) -> None:
        """Nothing: the sandbox belongs to the run."""

    def _not_its_own(self, what: str) -> SandboxError:
        return SandboxError(f"ctx.sandbox.{what}(): the sandbox belongs to the run, which looks after that by itself")


@asynccontextmanager
async def _closed_after(stream: AsyncIterator[T]) -> AsyncGenerator[AsyncIterator[T]]:
    if isinstance(stream, AsyncGenerator):
        async with aclosing(stream):
            yield stream
    else:
        yield stream
