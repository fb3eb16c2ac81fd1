"""Sandboxes in containers of a Docker engine.

    create    container made -> joined to its input and output -> started -> greeted: then it is a sandbox
    attach    a bridge is executed in the container -> greeted; the supervisor lets go of whoever was attached before
    the end   the stream ends -> the engine is asked why -> everything that waits gets ``SandboxGone`` with the reason

A container removes itself when its main process ends, whoever is still alive to see it. What can remain without an
owner is one that was made and never started, and one that is paused: those are found by their labels.
"""

from __future__ import annotations

import json
import posixpath
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import anyio
from anyio.abc import ByteStream, TaskGroup

from ridethrough.runtime.errors import SandboxError, SandboxGone, SandboxUnavailable
from ridethrough.sandboxes.attached import ENVIRONMENT, attach_to
from ridethrough.sandboxes.container import (
    BRIDGE_END,
    GIVEN_LABEL,
    ID_LABEL,
    LINGER_LABEL,
    MANNER_LABEL,
    PLAIN,
    PROFILE_LABEL,
    RUNTIME_LABEL,
    Manner,
    container_name,
    container_spec,
    labels_of,
)
from ridethrough.sandboxes.engine import Engine, Image, environment_of
from ridethrough.sandboxes.groups import task_group
from ridethrough.sandboxes.hijack import EngineStream
from ridethrough.sandboxes.plain import Command, Execs, PlainSandbox, checked_user
from ridethrough.sandboxes.profile import WORKSPACE
from ridethrough.sandboxes.sandbox import ExecResult, Found, Host, Relay, RelayFor, Sandbox

if TYPE_CHECKING:
    from ridethrough.sandboxes.profile import SandboxProfile

GREETING_SECONDS: Final = 60.0
"""How long a container may take from its start to its supervisor's greeting."""

FATE_SECONDS: Final = 3.0
"""How long it is looked for why a container ended, while those who wait for it are kept waiting."""

REMOVE_SECONDS: Final = 45.0
"""How long a removal may take before it is left to whoever looks after what has no owner."""

State = Literal["created", "running", "paused", "exited"]


@dataclass
class DockerHost(Host):
    """A Docker engine as a host of sandboxes. Open it with ``async with DockerHost.open() as host``.

    Attributes:
        engine: The engine.
        name: ``docker:`` and the engine's own id.
    """

    engine: Engine
    _group: TaskGroup
    _relay_for: RelayFor | None = None
    _labels: Mapping[str, str] = field(default_factory=dict[str, str])
    name: str = ""
    boundary: bool = True
    _plain: set[str] = field(default_factory=set[str], repr=False)
    """Ids of images that cannot run the supervisor."""

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        relay_for: RelayFor | None = None,
        *,
        url: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[DockerHost]:
        """A host on the engine at ``url``, or where ``DOCKER_HOST`` says.

        Args:
            relay_for: Gives the way out of a sandbox whose profile has a network.
            url: The engine's address.
            labels: Put on each container.

        Raises:
            SandboxUnavailable: it does not answer, with what to do.
            ConfigError: its address cannot be spoken to.
        """
        async with Engine.open(url) as engine:
            async with task_group() as group:
                host = cls(engine, group, relay_for, dict(labels or {}), f"docker:{engine.id}")
                try:
                    yield host
                finally:
                    await host.aclose()

    # --- create -----------------------------------------------------------------------------------------------------

    async def create(
        self,
        profile: SandboxProfile,
        *,
        id: str,
        labels: Mapping[str, str] | None = None,
        linger: float = 30.0,
    ) -> Sandbox:
        """As ``Host.create``."""
        from ridethrough.sandboxes.probe import runtime_for

        if profile.network and self._relay_for is None:
            raise SandboxUnavailable(
                f"profile {profile.name} has a network, and this host was opened without a way out: open it with "
                f"DockerHost.open(relay_for=egress.relay_for)"
            )
        runtime, proof = await runtime_for(self.engine, profile, self)
        image = await self.engine.image(profile.image)
        manner = PLAIN if image.id in self._plain else Manner.of(image)
        order = _Order(id, profile, image, runtime, linger, {**self._labels, **(labels or {})}, proof)
        try:
            return await self._made(order, manner)
        except _NoPython as error:
            if manner.name != "sent":
                raise SandboxUnavailable(error.message) from error
            self._plain.add(image.id)
        return await self._made(order, PLAIN)

    async def _made(self, order: _Order, manner: Manner) -> Sandbox:
        """One attempt; nothing of it remains when it fails or is cancelled."""
        name = container_name(order.id)
        stream: EngineStream | None = None
        try:
            await self.engine.create(name, order.spec(manner))
            stream = await self.engine.attach(name)
            stream.end_mark = BRIDGE_END
            return await self._started(order, manner, stream)
        except BaseException as error:
            if isinstance(error, SandboxError) and "already in use" in error.message:
                raise SandboxError(
                    f"there is a sandbox {order.id} already: attach to it, or take another id"
                ) from error
            await self._clean_up(name, stream)
            if isinstance(error, SandboxError) and not isinstance(error, SandboxUnavailable | _NoPython):
                raise SandboxUnavailable(f"no sandbox of profile {order.profile.name}: {error.message}") from error
            raise

    async def _started(self, order: _Order, manner: Manner, stream: EngineStream) -> Sandbox:
        """Start the container and greet its supervisor, which may be there before the engine says so."""
        name = container_name(order.id)
        failure: SandboxError | None = None
        sandbox: Sandbox | None = None
        async with anyio.create_task_group() as group:

            async def greet() -> None:
                nonlocal sandbox, failure
                try:
                    sandbox = await self._greeted(order, manner, stream)
                except SandboxError as error:
                    failure = failure or error

            group.start_soon(greet)
            try:
                await self.engine.start(name)
            except SandboxError as error:
                failure = error
                group.cancel_scope.cancel()
        if failure is None and sandbox is not None:
            return sandbox
        await anyio.lowlevel.checkpoint()  # a caller who is cancelled is told so, not that it failed
        raise self._why_not(order, manner, stream, failure)

    async def _greeted(self, order: _Order, manner: Manner, stream: EngineStream) -> Sandbox:
        if manner == PLAIN:
            return await self._plain_sandbox(order, stream)
        return await self._attached_to(order, stream)

    def _why_not(
        self, order: _Order, manner: Manner, stream: EngineStream, failure: SandboxError | None
    ) -> SandboxError:
        """Why there is no supervisor: what it said itself, else what the engine says."""
        said = stream.stderr.decode("utf-8", "replace").strip()
        told = failure.message if failure is not None else "it did not start"
        if manner != PLAIN and (_is_no_python(said) or _is_no_python(told)):
            return _NoPython(f"image {order.profile.image} cannot run the supervisor: {said or told}")
        if manner == PLAIN and ("exec sh" in said or _is_no_python(told)):
            return SandboxUnavailable(
                f"image {order.profile.image} has neither python3 nor a shell: a sandbox needs one of them"
            )
        if isinstance(failure, SandboxUnavailable) or not said:
            return failure or SandboxUnavailable(told)
        return SandboxUnavailable(f"no sandbox of profile {order.profile.name}: {told} It had said: {said[-500:]}")

    async def _attached_to(self, order: _Order, stream: EngineStream) -> Sandbox:
        """Greet the supervisor behind ``stream``."""
        hold = _Hold(self, order)
        watched = _Watched(stream, hold)
        sandbox = await attach_to(
            watched,
            self._group,
            id=order.id,
            profile=order.profile,
            boundary=True,
            runtime=order.runtime,
            hold=hold,
            linger=order.linger,
            relay=self._relay(order.profile, order.id),
            environment={**ENVIRONMENT, **order.image.environment},
        )
        watched.end = sandbox.channel.end
        sandbox.proof = order.proof
        return sandbox

    def _relay(self, profile: SandboxProfile, id: str) -> Relay | None:
        return self._relay_for(profile, id) if profile.network and self._relay_for is not None else None

    async def _plain_sandbox(self, order: _Order, stream: EngineStream) -> Sandbox:
        """A sandbox without a supervisor, as soon as its shell says that it is there."""
        try:
            await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            raise SandboxGone(f"Sandbox {order.id} is gone: its shell has ended.") from None
        hold = _Hold(self, order)
        return PlainSandbox(
            order.id,
            order.profile,
            Execs(self.engine, container_name(order.id), hold),
            hold,
            stream,
            self._group,
            runtime=order.runtime,
            environment={**ENVIRONMENT, **order.image.environment},
            proof=order.proof,
        )

    async def _clean_up(self, name: str, stream: EngineStream | None = None) -> None:
        """Remove what was made, or half made, whoever is cancelled."""
        with anyio.move_on_after(REMOVE_SECONDS, shield=True):
            if stream is not None:
                await anyio.aclose_forcefully(stream)
            try:
                await self.engine.remove(name)
            except SandboxError:
                return  # it is labelled, and found by the next one who looks

    # --- attach -----------------------------------------------------------------------------------------------------

    async def attach(self, profile: SandboxProfile, id: str) -> Sandbox:
        """As ``Host.attach``."""
        name = container_name(id)
        found = await self.engine.inspect(name)
        state = _state(str(found["State"]["Status"]))
        if state not in ("running", "paused"):
            await self._clean_up(name)
            raise SandboxGone(f"Sandbox {id} is gone: its container is {state}, not running.")
        order = _Order.of(id, profile, found)
        if state == "paused":
            await self.engine.unpause(name)
        manner = Manner.named(str(found["Config"]["Labels"].get(MANNER_LABEL)))
        stream = await self.engine.exec_attach(name, manner.bridge())
        try:
            with anyio.fail_after(GREETING_SECONDS):
                return await self._greeted(order, manner, stream)
        except TimeoutError:
            await self._clean_up(name, stream)
            raise SandboxGone(f"Sandbox {id} is gone: its supervisor does not answer.") from None
        except SandboxGone as error:
            if not stream.heard:  # no supervisor is there any more, so none would end what else is
                await self._clean_up(name)
            said = stream.stderr.decode("utf-8", "replace").strip()[-500:]
            raise SandboxGone(f"{error.message} {said}".strip()) from error

    # --- by id ------------------------------------------------------------------------------------------------------

    async def remove(self, id: str) -> bool:
        """As ``Host.remove``."""
        return await self.engine.remove(container_name(id))

    async def pause(self, id: str) -> None:
        """As ``Host.pause``."""
        await self.engine.pause(container_name(id))

    async def found(self) -> Sequence[Found]:
        """As ``Host.found``."""
        return [_found(each) for each in await self.engine.containers(ID_LABEL)]

    async def aclose(self) -> None:
        """As ``Host.aclose``."""
        self._group.cancel_scope.cancel()


class _NoPython(SandboxError):
    """The image has no Python that can run the supervisor."""


_NO_PYTHON: Final = (
    "exec python3 failed",
    "executable file not found",
    "ModuleNotFoundError",
    "ImportError",
    "SyntaxError",
    "Failed to import encodings",
)


def _is_no_python(text: str) -> bool:
    return any(sign in text for sign in _NO_PYTHON)


@dataclass(frozen=True, slots=True)
class _Order:
    """What is to be made, or was."""

    id: str
    profile: SandboxProfile
    image: Image
    runtime: str
    linger: float
    labels: Mapping[str, str]
    proof: Mapping[str, Any] | None = None
    since: float = field(default_factory=time.time)

    @classmethod
    def of(cls, id: str, profile: SandboxProfile, found: Mapping[str, Any]) -> _Order:
        """What a container was made from, as the engine knows it."""
        labels: Mapping[str, str] = found["Config"]["Labels"]
        image = Image(str(found["Image"]), labels, environment_of(found["Config"]))
        linger = float(labels.get(LINGER_LABEL) or 30.0)
        return cls(id, profile, image, labels.get(RUNTIME_LABEL, ""), linger, _given(labels))

    def spec(self, manner: Manner) -> dict[str, Any]:
        """The engine's description of it."""
        labels = labels_of(self.id, self.profile, self.runtime, manner, self.linger, self.labels)
        return container_spec(self.profile, self.image, self.runtime, manner, self.linger, labels)


class _Hold:
    """What the host does for an attached sandbox from outside."""

    def __init__(self, host: DockerHost, order: _Order) -> None:
        self.host = host
        self.order = order
        self.name = container_name(order.id)

    async def pause(self) -> None:
        """Freeze it."""
        await self.host.engine.pause(self.name)

    async def resume(self) -> None:
        """Let it go on."""
        await self.host.engine.unpause(self.name)

    async def remove(self) -> bool:
        """Remove it, in whatever state."""
        return await self.host.engine.remove(self.name)

    async def another(self) -> Sandbox:
        """A new one, made and labelled like this one."""
        order = self.order
        return await self.host.create(order.profile, id=secrets.token_hex(6), labels=order.labels, linger=order.linger)

    async def exec_as(
        self,
        user: str,
        argv: Sequence[str],
        *,
        timeout: float,
        stdin: bytes | None,
        env: Mapping[str, str],
        cwd: str | None,
        keep_output: int,
    ) -> ExecResult:
        """Run a command as another user."""
        command = Command(
            argv,
            timeout,
            stdin or b"",
            env,
            posixpath.join(WORKSPACE, cwd or "."),
            checked_user(user, self.order.profile),
            keep_output,
        )
        return await Execs(self.host.engine, self.name, self).run(command)

    async def fate(self) -> str | None:
        """Why the container is not there any more; ``None`` while it is."""
        engine = self.host.engine
        with anyio.move_on_after(FATE_SECONDS):
            try:
                if await engine.ended(self.name):
                    return _told(await engine.events(self.name, self.order.since), self.order.profile)
            except SandboxUnavailable as error:
                return error.message
        return None


def _told(events: Sequence[Mapping[str, Any]], profile: SandboxProfile) -> str:
    """The end of a container's life, in words."""
    ends = [event for event in events if event.get("Action") in ("oom", "die", "kill")]
    actions = [str(event["Action"]) for event in ends]
    if "oom" in actions[-3:] and actions[-1:] == ["die"]:
        return f"it ran out of memory ({profile.memory // 2**20} MiB) and its supervisor was killed for it"
    if "kill" in actions[-2:]:
        return "its container was removed"
    if actions[-1:] == ["die"]:
        status = ends[-1].get("Actor", {}).get("Attributes", {}).get("exitCode", "unknown")
        return f"its supervisor has ended with status {status}: it was killed from inside, or nobody was attached to it"
    return "its container was removed"


class _Watched(ByteStream):
    """The stream of an attached sandbox; when it ends, the reason is found out before anybody hears of it."""

    def __init__(self, stream: EngineStream, hold: _Hold) -> None:
        self._stream = stream
        self._hold = hold
        self.end: Callable[[str], None] | None = None

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """As ``ByteStream.receive``."""
        try:
            return await self._stream.receive(max_bytes)
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            if self.end is not None and (fate := await self._hold.fate()) is not None:
                self.end(fate)
            raise

    async def send(self, item: bytes) -> None:
        """As ``ByteStream.send``."""
        await self._stream.send(item)

    async def send_eof(self) -> None:
        """As ``ByteStream.send_eof``."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """As ``ByteStream.aclose``."""
        await self._stream.aclose()


# --- what the engine says of containers -----------------------------------------------------------------------------


def _state(status: str) -> State:
    if status in ("created", "running", "paused"):
        return status  # type: ignore[return-value]
    return "exited"


def _given(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels that the caller gave."""
    try:
        names = json.loads(labels.get(GIVEN_LABEL) or "[]")
    except ValueError:
        names = []
    return {name: labels[name] for name in names if name in labels}


def _found(container: Mapping[str, Any]) -> Found:
    labels: Mapping[str, str] = container.get("Labels") or {}
    return Found(
        id=labels.get(ID_LABEL, ""),
        profile=labels.get(PROFILE_LABEL, ""),
        state=_state(str(container.get("State"))),
        created_at=float(container.get("Created") or 0),
        labels=_given(labels),
        runtime=labels.get(RUNTIME_LABEL, ""),
    )
