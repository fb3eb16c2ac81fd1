"""A Docker engine: the life of containers through docker-py, their streams over its socket.

docker-py blocks, so its calls run in worker threads, at most ``THREADS`` at once and with a limiter of their own, so
that a slow engine does not hold up what else runs in threads. It is not thread-safe (docker-py#3229): a client is in
one thread's hands for the length of a call. A call ends by itself after a time, because nothing else ends it; one that
changes something is never abandoned before. A task that is cancelled meanwhile waits, and so knows what there is to be
cleaned up. Where a task is torn away all the same (asyncio's own ``Task.cancel`` minds no shield), a removal waits for
the creation of the same name: a container that a forgotten thread still makes would be nobody's.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import anyio
import anyio.to_thread

from ridethrough.runtime.errors import SandboxError, SandboxGone, SandboxUnavailable
from ridethrough.sandboxes.hijack import Address, EngineStream, hijack, unreachable

if TYPE_CHECKING:
    from docker import APIClient
    from docker.errors import APIError

T = TypeVar("T")

THREADS: Final = 8
"""Calls to the engine at once; beyond that its own locks decide, and it only gets slower."""

CALL_SECONDS: Final = 60.0
"""After that a call has failed. Twenty starts at once on a small machine take several seconds each."""

REMOVE_ATTEMPTS: Final = 5
ENDING_LOOKS: Final = 6


@dataclass(frozen=True, slots=True)
class Image:
    """What an image says of itself."""

    id: str
    labels: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    volumes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class ExecState:
    """A process that was started by ``exec_attach``; ``pid`` is the engine's machine's."""

    running: bool
    exit_code: int | None
    pid: int


class _Making:
    """A creation, as the task that wants it and the thread that does it see it."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._lock = threading.Lock()
        self._state: Literal["wanted", "begun", "withdrawn"] = "wanted"

    def once(self, create: Callable[[], object]) -> None:
        """Create, unless nobody wants it any more."""
        with self._lock:
            if self._state == "withdrawn":
                return
            self._state = "begun"
        try:
            create()
        finally:
            self.over.set()

    def withdraw(self) -> bool:
        """Its task is over; whether the thread is too, or will do nothing."""
        with self._lock:
            if self._state == "wanted":
                self._state = "withdrawn"
            return self._state == "withdrawn" or self.over.is_set()


@dataclass
class Engine:
    """A Docker engine. Open it with ``async with Engine.open() as engine``.

    Attributes:
        address: Where it listens.
        id: Its own id, the same for all who use it.
        runtimes: Names of the container runtimes that it knows.
    """

    address: Address
    api: str = "auto"
    id: str = ""
    runtimes: frozenset[str] = frozenset()
    _closed: bool = False
    _idle: list[APIClient] = field(default_factory=list["APIClient"], repr=False)
    _making: dict[str, _Making] = field(default_factory=dict[str, "_Making"], repr=False)
    """Containers whose creation is under way."""
    _limiter: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(THREADS), repr=False)

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str | None = None) -> AsyncGenerator[Engine]:
        """An engine that answers; at ``url``, or where ``DOCKER_HOST`` says.

        Raises:
            SandboxUnavailable: it does not answer, with what to do.
            ConfigError: its address cannot be spoken to.
        """
        engine = cls(Address.of(url))
        try:
            info = await engine.call(lambda client: (client.api_version, client.info()), "asked who it is")
            engine.api, engine.id = info[0], str(info[1]["ID"])
            engine.runtimes = frozenset(info[1].get("Runtimes") or ())
            yield engine
        finally:
            engine._close()

    def _close(self) -> None:
        self._closed = True
        while (client := self._kept()) is not None:
            client.close()

    # --- calls ------------------------------------------------------------------------------------------------------

    async def call(self, function: Callable[[Any], T], what: str, *, only_asks: bool = False) -> T:
        """Run ``function`` with a client of its own in a worker thread; ``what`` was wanted, for messages. One that
        ``only_asks`` may be left to itself by a caller that is cancelled.

        Raises:
            SandboxUnavailable: the engine cannot be asked, or has no such image.
            SandboxGone: there is no such container.
            SandboxError: the engine refuses.
        """
        return await anyio.to_thread.run_sync(
            self._work, function, what, limiter=self._limiter, abandon_on_cancel=only_asks
        )

    def _work(self, function: Callable[[Any], T], what: str) -> T:
        from docker.errors import APIError, DockerException
        from requests.exceptions import RequestException

        client = None
        try:
            self.address.knock()
            client = self._client()
            value = function(client)
        except APIError as error:  # an answer, if not the wanted one: the connection is still good
            self._give_back(client)
            raise _refused(error, what) from error
        except (DockerException, RequestException, OSError) as error:
            if client is not None:
                client.close()
            raise unreachable(self.address, error) from error
        self._give_back(client)
        return value

    def _client(self) -> APIClient:
        from docker import APIClient

        kept = self._kept()
        return kept or APIClient(str(self.address), version=self.api, timeout=math.ceil(CALL_SECONDS))

    def _kept(self) -> APIClient | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _give_back(self, client: APIClient | None) -> None:
        if client is not None:
            self._idle.append(client)
            if self._closed:  # its caller did not wait for it
                self._close()

    # --- the life of containers -------------------------------------------------------------------------------------

    async def image(self, name: str) -> Image:
        """What a local image says of itself.

        Raises:
            SandboxUnavailable: there is none of that name, with what to do.
        """
        found: dict[str, Any] = await self.call(lambda client: client.inspect_image(name), f"asked for image {name}")
        config = found.get("Config") or {}
        volumes = sorted(config.get("Volumes") or ())
        return Image(str(found["Id"]), config.get("Labels") or {}, environment_of(config), volumes)

    async def create(self, name: str, spec: Mapping[str, Any]) -> None:
        """Create a container from the engine's own description of one."""
        making = self._making[name] = _Making()
        try:
            await self.call(
                lambda client: making.once(lambda: client.create_container_from_config(dict(spec), name)),
                f"asked to create {name}",
            )
        finally:
            if making.withdraw():
                self._making.pop(name, None)

    async def start(self, name: str) -> None:
        """Start a container that was created."""
        await self.call(lambda client: client.start(name), f"asked to start {name}")

    async def pause(self, name: str) -> None:
        """Freeze a container; one that is frozen already stays so."""
        await self._unless_already(lambda client: client.pause(name), f"asked to pause {name}", "already paused")

    async def unpause(self, name: str) -> None:
        """Let a frozen container go on; one that runs does."""
        await self._unless_already(lambda client: client.unpause(name), f"asked to unpause {name}", "not paused")

    async def _unless_already(self, function: Callable[[Any], None], what: str, already: str) -> None:
        try:
            await self.call(function, what)
        except SandboxError as error:
            if already not in error.message:
                raise

    async def kill(self, name: str) -> None:
        """End a container's processes at once; one that has ended already is left as it is."""
        await self._unless_already(lambda client: client.kill(name), f"asked to kill {name}", "not running")

    async def inspect(self, name: str) -> dict[str, Any]:
        """All that the engine knows of a container.

        Raises:
            SandboxGone: there is none.
        """
        return await self.call(lambda client: client.inspect_container(name), f"asked for {name}", only_asks=True)

    async def ended(self, name: str) -> bool:
        """Whether a container ends within the next moments."""
        for _ in range(ENDING_LOOKS):
            try:
                if (await self.inspect(name))["State"]["Status"] not in ("running", "paused"):
                    return True
            except SandboxGone:
                return True
            await anyio.sleep(0.1)
        return False

    async def events(self, name: str, since: float) -> list[dict[str, Any]]:
        """What became of a container since then (seconds since 1970), as far as the engine remembers; even of one that
        is not there any more."""

        def ask(client: Any) -> list[dict[str, Any]]:
            wanted = {"type": "container", "container": name}
            return list(client.events(since=int(since) - 1, until=f"{time.time():.6f}", filters=wanted, decode=True))

        return await self.call(ask, f"asked what became of {name}", only_asks=True)

    async def containers(self, label: str) -> list[dict[str, Any]]:
        """All containers with a label (``name`` or ``name=value``), whatever their state."""
        return await self.call(
            lambda client: client.containers(all=True, filters={"label": label}), f"asked for containers of {label}"
        )

    async def remove(self, name: str) -> bool:
        """Remove a container in whatever state it is; whether there was one.

        Raises:
            SandboxError: the engine cannot do it, after several attempts.
        """
        failure: SandboxError | None = None
        for attempt in range(REMOVE_ATTEMPTS):
            try:
                await self.call(lambda client: self._remove(client, name), f"asked to remove {name}")
                return True
            except SandboxGone:
                return attempt > 0  # somebody else's removal, which had begun, is over
            except SandboxUnavailable:
                raise
            except SandboxError as error:  # under removal already, or the runtime is slow to let go of it
                failure = error
            await anyio.sleep(0.1 * 2**attempt)
        raise SandboxError(f"container {name} cannot be removed: {failure}; try: docker rm -f {name}")

    def _remove(self, client: Any, name: str) -> None:
        making = self._making.pop(name, None)
        if making is not None:
            making.over.wait(CALL_SECONDS)
        client.remove_container(name, force=True, v=True)

    # --- streams ----------------------------------------------------------------------------------------------------

    async def attach(self, name: str) -> EngineStream:
        """The input and output of a container's main process; before it is started none of it is lost.

        Raises:
            SandboxGone, SandboxUnavailable: as for ``exec_attach``.
        """
        path = f"/v{self.api}/containers/{name}/attach?stream=1&stdin=1&stdout=1&stderr=1"
        return await hijack(self.address, path, {})

    async def exec_attach(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        stdin: bool = True,
    ) -> EngineStream:
        """Run another process in a running container; the stream is its input and output.

        Closing the stream does not end the process. A command that cannot be started ends with 126 or 127.

        Raises:
            SandboxGone: there is no such container, or it does not run.
            SandboxUnavailable: the engine cannot be asked.
        """
        exec_id = await self.exec_create(name, argv, env=env, cwd=cwd, user=user, stdin=stdin)
        return await hijack(
            self.address, f"/v{self.api}/exec/{exec_id}/start", {"Detach": False, "Tty": False}, exec_id
        )

    async def exec_create(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        stdin: bool = True,
    ) -> str:
        """Prepare another process; its id for the engine."""
        settings = {f"{key}={value}" for key, value in (env or {}).items()}
        made: dict[str, Any] = await self.call(
            lambda client: client.exec_create(
                name, list(argv), stdin=stdin, environment=sorted(settings), workdir=cwd, user=user or ""
            ),
            f"asked to run a command in {name}",
        )
        return str(made["Id"])

    async def exec_state(self, exec_id: str) -> ExecState:
        """Whether such a process runs, and how it ended."""
        found: dict[str, Any] = await self.call(lambda client: client.exec_inspect(exec_id), "asked for a command")
        return ExecState(bool(found["Running"]), found["ExitCode"], int(found["Pid"] or 0))


def environment_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The environment in an image's or a container's configuration."""
    return dict(setting.partition("=")[::2] for setting in config.get("Env") or ())


def _refused(error: APIError, what: str) -> SandboxError:
    """The engine's refusal, in our terms and with what to do."""
    from docker.errors import ImageNotFound, NotFound

    told = str(error.explanation or error)
    if isinstance(error, ImageNotFound):
        return SandboxUnavailable(
            f"the engine, {what}, has no such image ({told}): make the project's own with `ridethrough sandbox build`, "
            f"or fetch another with `docker pull`"
        )
    if isinstance(error, NotFound) or "is not running" in told:
        return SandboxGone(f"the engine, {what}, says: {told}")
    return SandboxError(f"the engine, {what}, refuses: {told}")
