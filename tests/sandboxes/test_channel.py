"""The host's end of the wire against supervisors that are slow, silent, broken or hostile."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStream, SocketStream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ridethrough.runtime.errors import SandboxError, SandboxFileNotFound, SandboxGone, SandboxTimeout
from ridethrough.sandboxes import attached
from ridethrough.sandboxes.attached import AttachedSandbox, attach_to
from ridethrough.sandboxes.channel import LEFT, TUNNELS, Channel, Stuck
from ridethrough.sandboxes.egress.egress import CONNECTIONS
from ridethrough.sandboxes.frames import MAX_BODY, MAX_HEADER, PROTOCOL, WINDOW, Decoder, encode
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import ExecResult, Output, Sandbox

pytestmark = pytest.mark.anyio

PATIENCE = 20.0
HELLO = {"hello": 1, "protocol": PROTOCOL, "supervisor": "test", "boot": "1"}
END: dict[str, Any] = {
    "code": 0,
    "seconds": 0.1,
    "stdout_total": 0,
    "stderr_total": 0,
    "truncated": False,
    "timeout": False,
}

Header = dict[str, Any]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Peer:
    """A supervisor of a test's own making, at the other end of a socket."""

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self._decoder = Decoder()
        self._frames: list[tuple[Header, bytes]] = []

    async def frame(self) -> tuple[Header, bytes]:
        """The next frame from the host."""
        with anyio.fail_after(PATIENCE):
            while not self._frames:
                self._frames += self._decoder.feed(await self.stream.receive())
        return self._frames.pop(0)

    async def request(self, op: str) -> tuple[Header, bytes]:
        """The next request of a kind; others are answered with nothing."""
        while True:
            header, body = await self.frame()
            if header.get("op") == op:
                return header, body

    async def send(self, header: Mapping[str, Any], body: bytes = b"") -> None:
        await self.stream.send(encode(dict(header), body))

    async def reply(self, request: Header, body: bytes = b"", **fields: Any) -> None:
        await self.send({"n": request["n"], "ok": True, **fields}, body)

    async def wait_closed(self) -> None:
        """Until the host has closed the connection."""
        with anyio.fail_after(PATIENCE):
            try:
                while True:
                    await self.stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return


class Remover:
    """Takes the place of a host: says whether the sandbox was removed."""

    def __init__(self) -> None:
        self.removed = 0

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def remove(self) -> None:
        self.removed += 1

    async def another(self) -> Sandbox:
        raise SandboxError("no other")

    async def exec_as(self, user: str, argv: Sequence[str], **options: Any) -> ExecResult:
        raise SandboxError("no other user")


async def pair() -> tuple[SocketStream, Peer]:
    ours, theirs = socket.socketpair()
    return await SocketStream.from_socket(ours), Peer(await SocketStream.from_socket(theirs))


@asynccontextmanager
async def connected(
    relay: Callable[[ByteStream], Awaitable[None]] | None = None,
) -> AsyncGenerator[tuple[Channel, Peer, Remover]]:
    """A channel that was greeted, and the other end."""
    stream, peer = await pair()
    hold = Remover()
    async with anyio.create_task_group() as group:
        channel = Channel(stream, "box", on_stuck=hold.remove, relay=relay)
        await peer.send(HELLO)
        try:
            await channel.open(group, seconds=PATIENCE)
            with anyio.fail_after(PATIENCE):
                yield channel, peer, hold
        finally:
            await channel.aclose()
            await peer.stream.aclose()


@asynccontextmanager
async def sandboxed(**changes: Any) -> AsyncGenerator[tuple[AttachedSandbox, Peer, Remover]]:
    """A sandbox whose supervisor is the test."""
    stream, peer = await pair()
    hold = Remover()

    async def greet() -> None:
        await peer.send(HELLO)
        request, _ = await peer.request("attach")
        await peer.reply(request, json.dumps({"a": "done"}).encode(), clean=True)

    async with anyio.create_task_group() as group:
        group.start_soon(greet)
        profile = SandboxProfile(**changes)
        sandbox = await attach_to(
            stream, group, id="box", profile=profile, boundary=True, runtime="runc", hold=hold, linger=5.0
        )
        try:
            with anyio.fail_after(PATIENCE):
                yield sandbox, peer, hold
        finally:
            await sandbox.detach()
            await peer.stream.aclose()


# --- greetings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "told"),
    [
        (encode({**HELLO, "protocol": PROTOCOL + 1}), "protocol"),
        (encode({"n": 1, "ok": True}), "greeting"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "announced"),
        (struct.pack(">II", 5, 0) + b"[[[[[", "no JSON"),
        (struct.pack(">II", 2, 0) + b"[]", "no object"),
        (b"", "ended"),
    ],
)
async def test_whoever_does_not_greet_is_no_supervisor(first: bytes, told: str) -> None:
    stream, peer = await pair()
    await peer.stream.send(first) if first else await peer.stream.aclose()
    async with anyio.create_task_group() as group:
        with pytest.raises(SandboxGone, match=told):
            await Channel(stream, "box", on_stuck=Remover().remove).open(group, seconds=PATIENCE)
    await peer.stream.aclose()


async def test_whoever_says_nothing_is_not_waited_for() -> None:
    stream, peer = await pair()
    async with anyio.create_task_group() as group:
        with pytest.raises(SandboxGone, match="did not speak"):
            await Channel(stream, "box", on_stuck=Remover().remove).open(group, seconds=0.05)
    await peer.stream.aclose()


# --- requests -------------------------------------------------------------------------------------------------------


async def test_answers_find_their_callers_in_any_order() -> None:
    async with connected() as (channel, peer, _):
        told: dict[str, str] = {}

        async def ask(what: str) -> None:
            told[what] = (await channel.ask("echo", {"what": what})).text("what")

        async with anyio.create_task_group() as group:
            for what in ("a", "b", "c"):
                group.start_soon(ask, what)
            requests = [(await peer.frame())[0] for _ in range(3)]
            for request in reversed(requests):
                await peer.reply(request, what=request["what"])
        assert told == {"a": "a", "b": "b", "c": "c"}


async def test_a_refusal_is_an_error_of_its_kind() -> None:
    async with connected() as (channel, peer, _):
        for kind, error in (("not_found", SandboxFileNotFound), ("path", SandboxError)):
            async with anyio.create_task_group() as group:
                group.start_soon(_refuse, peer, kind)
                with pytest.raises(error, match="because \\?") as caught:
                    await channel.ask("read")
                assert type(caught.value) is error


async def _refuse(peer: Peer, kind: str) -> None:
    request, _ = await peer.frame()
    await peer.send({"n": request["n"], "error": {"kind": kind, "message": "because \ud800"}})


async def test_a_request_too_long_for_a_frame_harms_no_other() -> None:
    async with connected() as (channel, peer, _):
        with pytest.raises(SandboxError, match="to a file or to standard input"):
            await channel.ask("run", {"argv": ["x" * MAX_HEADER]})
        exchange = await channel.begin("ping")
        await peer.reply((await peer.frame())[0])
        assert (await exchange.reply()).header["ok"]


async def test_no_answer_removes_the_sandbox_and_tells_all_who_wait() -> None:
    async with connected() as (channel, _, hold):
        other = await channel.begin("collect", {"id": "a"})
        with pytest.raises(Stuck, match="did not answer 'ping'"):
            await channel.ask("ping", seconds=0.05)
        with pytest.raises(SandboxGone, match="did not answer 'ping'"):
            await other.reply()
        with pytest.raises(SandboxGone, match="did not answer 'ping'"):
            await channel.ask("ping")
        assert hold.removed == 1


async def test_a_supervisor_that_does_not_read_holds_nobody_up() -> None:
    async with connected() as (channel, _, hold):
        async with anyio.create_task_group() as group:
            for _ in range(40):
                group.start_soon(_write_once, channel)
            with pytest.raises(SandboxGone, match="did not answer 'write'"):
                await channel.ask("write", body=bytes(MAX_BODY), seconds=0.1)
        assert hold.removed == 1


async def _write_once(channel: Channel) -> None:
    try:
        await channel.ask("write", body=bytes(MAX_BODY))
    except SandboxGone:
        return


async def test_a_connection_that_ends_tells_all_who_wait() -> None:
    async with connected() as (channel, peer, hold):
        exchange = await channel.begin("ping")
        await peer.stream.aclose()
        with pytest.raises(SandboxGone, match=r"another worker has attached|cut"):
            await exchange.reply()
        assert hold.removed == 0


async def test_what_comes_late_for_those_who_left_is_dropped_once() -> None:
    async with connected() as (channel, peer, _):
        left = await channel.begin("ping")
        left.leave()
        request, _ = await peer.frame()
        await peer.reply(request)
        waiting = await channel.begin("ping")
        await peer.reply((await peer.frame())[0])
        await waiting.reply()
        await peer.reply(request)
        await peer.wait_closed()
        with pytest.raises(SandboxGone, match="nobody asks"):
            channel.check()


async def test_a_supervisor_that_answers_nobody_ends() -> None:
    async with connected() as (channel, _, _):
        for _ in range(LEFT + 1):
            channel.post("forget", {"ids": []}).leave()
        with pytest.raises(SandboxGone, match=f"left {LEFT} requests"):
            channel.check()


BREACHES: list[tuple[str, Header, bytes, str]] = [
    ("a number that nobody chose", {"n": 77, "ok": True}, b"", "nobody asks"),
    ("a negative number", {"n": -1, "ok": True}, b"", "whole number"),
    ("no number", {"n": "1", "ok": True}, b"", "whole number"),
    ("true is no number", {"n": True, "ok": True}, b"", "whole number"),
    ("nothing", {}, b"", "belongs to nothing"),
    ("a second greeting", dict(HELLO), b"", "belongs to nothing"),
    ("an event where there are none", {"n": 1, "event": "output", "stream": "stdout"}, b"x", "no events"),
    ("an error that is none", {"n": 1, "error": "bad"}, b"", "must be an object"),
    ("an error without a text", {"n": 1, "error": {"kind": "path", "message": 3}}, b"", "must be a text"),
    ("an error with a long text", {"n": 1, "error": {"kind": "path", "message": "x" * 5000}}, b"", "at most"),
    ("a connection that is not open", {"s": 5}, bytes(70_000), "closed"),
    ("a connection without a number", {"s": None}, b"", "whole number"),
]


@pytest.mark.parametrize(
    ("header", "body", "told"), [each[1:] for each in BREACHES], ids=[each[0] for each in BREACHES]
)
async def test_a_breach_ends_the_channel_and_says_why(header: Header, body: bytes, told: str) -> None:
    async with connected() as (channel, peer, _):
        exchange = await channel.begin("ping")
        await peer.frame()
        await peer.send(header, body)
        with pytest.raises(SandboxGone, match=told):
            await exchange.reply()


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack(">II", MAX_HEADER + 1, 0),
        struct.pack(">II", 2, MAX_BODY + 1),
        struct.pack(">II", 2**32 - 1, 2**32 - 1),
        struct.pack(">II", 4, 0) + b'{"n"',
        struct.pack(">II", 3, 0) + b"\xff\xfe\xfd",
        struct.pack(">II", 60_000, 0) + b"[" * 60_000,
        struct.pack(">II", 6006, 0) + b'{"n":' + b"9" * 6000 + b"}",
        struct.pack(">II", 9, 0) + b'{"n":NaN}',
    ],
    ids=["header", "body", "both", "cut", "no text", "deep", "a large number", "NaN"],
)
async def test_lies_about_frames_end_the_channel(raw: bytes) -> None:
    async with connected() as (channel, peer, hold):
        exchange = await channel.begin("ping")
        await peer.frame()
        await peer.stream.send(raw)
        with pytest.raises(SandboxGone, match="broke the protocol"):
            await exchange.reply()
    assert hold.removed == 1  # or the next one would attach to it


_PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
_HEADERS = st.dictionaries(
    st.sampled_from(
        ["n", "s", "ok", "error", "event", "stream", "offset", "code", "open", "took", "end", "kind", "path"]
    ),
    st.integers(0, 4) | st.sampled_from(["output", "change", "stdout", "created"]) | _PLAIN | st.lists(_PLAIN),
    max_size=6,
)


@given(frames=st.lists(st.tuples(_HEADERS, st.binary(max_size=50)), max_size=12))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_whatever_comes_is_an_answer_or_an_error(frames: list[tuple[Header, bytes]]) -> None:
    async with connected() as (channel, peer, _):
        exchanges = [await channel.begin("ping") for _ in range(3)]
        with suppress(anyio.BrokenResourceError):
            for header, body in frames:
                await peer.send(header, body)
        await anyio.aclose_forcefully(peer.stream)
        for exchange in exchanges:
            with suppress(SandboxError):
                await exchange.reply()


# --- calls ----------------------------------------------------------------------------------------------------------


async def answered(
    sandbox: AttachedSandbox, peer: Peer, events: Sequence[tuple[Header, bytes]], end: Header, body: bytes = b""
) -> ExecResult:
    """What ``exec`` gives when its supervisor answers so."""
    outcome: ExecResult | SandboxError = SandboxError("nothing came")

    async def answer() -> None:
        request, _ = await peer.request("run")
        with suppress(anyio.BrokenResourceError):
            for event, piece in events:
                await peer.send({"n": request["n"], **event}, piece)
            await peer.reply(request, body, **end)

    async with anyio.create_task_group() as group:
        group.start_soon(answer)
        try:
            outcome = await sandbox.exec(["true"], timeout=PATIENCE, keep_output=1000)
        except SandboxError as error:
            outcome = error
    if isinstance(outcome, SandboxError):
        raise outcome
    return outcome


async def test_output_comes_in_the_reply_or_before_it() -> None:
    event = {"event": "output", "stream": "stderr", "offset": 0}
    async with sandboxed() as (sandbox, peer, _):
        result = await answered(sandbox, peer, [], {**END, "code": 3, "out": 2, "err": 3}, b"hiyou")
        assert (result.exit_code, result.stdout, result.stderr) == (3, "hi", "you")
        result = await answered(sandbox, peer, [(event, b"later")], {**END, "limit": "memory", "out": 0, "err": 0})
        assert (result.stderr, result.limit) == ("later", "memory")


LIES: list[tuple[str, list[tuple[Header, bytes]], Header, bytes, str]] = [
    ("too much", [], {**END, "out": 1001, "err": 0}, bytes(1001), "more output"),
    (
        "too much in events",
        [({"event": "output", "stream": "stdout"}, bytes(600))] * 2,
        {**END, "out": 0, "err": 0},
        b"",
        "more output",
    ),
    ("a stream of its own", [({"event": "output", "stream": "x"}, b"")], END, b"", "one of its streams"),
    ("an event of its own", [({"event": "x", "stream": "stdout"}, b"")], END, b"", "one of its streams"),
    ("no status", [], {**END, "code": None}, b"", "code must be"),
    ("a large status", [], {**END, "code": 2**40}, b"", "code must be"),
    ("a limit of its own", [], {**END, "limit": "luck"}, b"", "limit"),
    ("a limit that is none", [], {**END, "limit": []}, b"", "limit"),
    ("no duration", [], {**END, "seconds": "long"}, b"", "seconds"),
    ("a negative total", [], {**END, "stdout_total": -1}, b"", "stdout_total"),
    ("a timeout that is no answer", [], {**END, "timeout": "yes"}, b"", "timeout"),
]


@pytest.mark.parametrize(("events", "end", "body", "told"), [each[1:] for each in LIES], ids=[each[0] for each in LIES])
async def test_lies_about_a_call_end_the_channel(
    events: list[tuple[Header, bytes]], end: Header, body: bytes, told: str
) -> None:
    async with sandboxed() as (sandbox, peer, _):
        with pytest.raises(SandboxGone, match=told):
            await answered(sandbox, peer, events, end, body)
        with pytest.raises(SandboxGone, match=told):
            await sandbox.exec(["true"])


async def test_a_call_whose_supervisor_is_silent_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ridethrough.sandboxes.command.MARGIN", 0.05)
    monkeypatch.setattr("ridethrough.sandboxes.command.GRACE", 0.05)
    async with sandboxed() as (sandbox, _, hold):
        with pytest.raises(SandboxTimeout, match="could not be ended"):
            await sandbox.exec(["sleep", "9"], timeout=0.05)
        with pytest.raises(SandboxGone, match="so it was removed"):
            await sandbox.exec(["true"])
        assert hold.removed == 1


async def test_survivors_cost_the_sandbox() -> None:
    async with sandboxed() as (sandbox, peer, hold):
        result = await answered(sandbox, peer, [], {**END, "code": 137, "survivors": 1, "out": 0, "err": 0})
        assert result.exit_code == 137
        assert hold.removed == 1
        with pytest.raises(SandboxGone, match="could not be ended"):
            await sandbox.exec(["true"])


async def test_a_cancelled_call_is_ended_and_that_is_waited_for() -> None:
    async with sandboxed() as (sandbox, peer, _):
        over, started = anyio.Event(), dict[str, Any]()
        async with anyio.create_task_group() as group:

            async def call() -> None:
                try:
                    await sandbox.exec(["sleep", "100"], timeout=100)
                finally:
                    over.set()

            group.start_soon(call)
            started, _ = await peer.request("run")
            group.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                killed, _ = await peer.request("kill")
                assert killed["id"] == started["id"]
                assert not over.is_set()
                await peer.reply(killed)
        forgotten, _ = await peer.request("forget")
        assert forgotten["ids"] == [started["id"]]


async def test_a_call_is_not_ended_when_its_sandbox_was_let_go_of() -> None:
    async with sandboxed() as (sandbox, peer, _):
        async with anyio.create_task_group() as group:
            group.start_soon(_until_gone, sandbox)
            await peer.request("run")
            await sandbox.detach()
        with pytest.raises(anyio.EndOfStream):
            await peer.request("kill")


async def _until_gone(sandbox: AttachedSandbox) -> None:
    with pytest.raises(SandboxGone, match="let go"):
        await sandbox.exec(["sleep", "100"], call_id="a")


async def test_a_call_is_not_ended_while_another_waits_for_it() -> None:
    async with sandboxed() as (sandbox, peer, _):
        results: list[ExecResult] = []
        second: Header = {}

        async def call() -> None:
            results.append(await sandbox.exec(["true"], call_id="a"))

        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as cancelled:
                    cancelled.start_soon(call)
                    await peer.request("run")
                    group.start_soon(call)
                    second, _ = await peer.request("run")
                    scope.cancel()
            await peer.reply(second, out=0, err=0, **END)
        assert len(results) == 1


async def test_a_stream_beyond_its_window_is_a_breach() -> None:
    async with sandboxed() as (sandbox, peer, _):
        async with anyio.create_task_group() as group:
            group.start_soon(_flood, peer)
            async with aclosing(sandbox.exec_stream(["yes"])) as items:
                await anext(items)
                await peer.wait_closed()
        with pytest.raises(SandboxGone, match="more output than its window"):
            sandbox.channel.check()


async def _flood(peer: Peer) -> None:
    request, _ = await peer.request("start")
    await peer.reply(request, known=False, pid=1)
    request, _ = await peer.request("follow")
    for offset in range(0, 4 * WINDOW, 1000):
        try:
            event = {"n": request["n"], "event": "output", "stream": "stdout", "offset": offset}
            await peer.send(event, bytes(1000))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return


async def test_pieces_of_a_stream_are_joined_and_acknowledged() -> None:
    async with sandboxed() as (sandbox, peer, _):
        got: list[Output | ExecResult] = []
        async with anyio.create_task_group() as group:

            async def read() -> None:
                async for item in sandbox.exec_stream(["x"]):
                    got.append(item)

            group.start_soon(read)
            request, _ = await peer.request("start")
            await peer.reply(request, known=False, pid=1)
            request, _ = await peer.request("follow")
            pieces = b"".join(
                encode({"n": request["n"], "event": "output", "stream": "stdout", "offset": at}, b"x")
                for at in range(500)
            )
            await peer.stream.send(pieces)
            taken = 0
            while taken < 500:
                header, _ = await peer.frame()
                assert header["n"] == request["n"]
                taken += header["took"]
            await peer.reply(request, **END)
        assert b"".join(item.data for item in got if isinstance(item, Output)) == b"x" * 500
        assert [item.stdout_bytes for item in got if isinstance(item, ExecResult)] == [b"x" * 500]


async def test_a_watch_that_floods_its_reader_ends_with_an_error() -> None:
    async with sandboxed() as (sandbox, peer, _):
        async with aclosing(sandbox.watch()) as changes, anyio.create_task_group() as group:

            async def flood() -> None:
                request, _ = await peer.request("watch")
                change = encode({"n": request["n"], "event": "change", "kind": "created", "path": "x"})
                for _ in range(110):
                    await peer.stream.send(change * 100)
                ping, _ = await peer.request("ping")
                await peer.reply(ping)

            group.start_soon(flood)
            await anext(changes)
            await sandbox.ping()
            with pytest.raises(SandboxError, match="list the folder"):
                async for _ in changes:
                    pass


async def test_lies_about_files_end_the_channel() -> None:
    entry = {"path": "a", "kind": "file", "size": 1, "modified": 1.0, "mode": 420}
    lies: list[tuple[str, Header, bytes, Callable[[AttachedSandbox], Awaitable[object]]]] = [
        ("read", {"size": 5}, b"123456", lambda box: box.read("a", limit=5)),
        ("read", {"size": "5"}, b"", lambda box: box.read("a")),
        ("list", {"more": False}, b"{}", lambda box: box.list()),
        ("list", {"more": False}, b"[1]", lambda box: box.list()),
        ("list", {"more": False}, b"[" * 100_000, lambda box: box.list()),
        ("list", {"more": True}, b"[]", lambda box: box.list()),
        ("list", {"more": False}, json.dumps([entry] * 3).encode(), lambda box: box.list(limit=2)),
        ("list", {"more": False}, json.dumps([{**entry, "kind": "pipe"}]).encode(), lambda box: box.list()),
        ("stat", {"entry": [entry]}, b"", lambda box: box.stat("a")),
        ("write", {}, b"", lambda box: box.write("a", b"")),
    ]
    for op, header, body, call in lies:
        async with sandboxed() as (sandbox, peer, _):
            async with anyio.create_task_group() as group:
                group.start_soon(_answer_once, peer, op, header, body)
                with pytest.raises(SandboxGone, match="broke the protocol"):
                    await call(sandbox)


async def _answer_once(peer: Peer, op: str, header: Header, body: bytes) -> None:
    request, _ = await peer.request(op)
    await peer.reply(request, body, **header)


# --- connections to the proxy ---------------------------------------------------------------------------------------


async def echo(stream: ByteStream) -> None:
    async with stream:
        async for piece in stream:
            await stream.send(piece)


async def test_a_connection_carries_both_ways_within_its_windows() -> None:
    async with connected(echo) as (_, peer, _):
        await peer.send({"s": 1, "open": True})
        assert await peer.frame() == ({"s": 1, "ready": True}, b"")
        sent = got = acknowledged = taken = 0
        total = 3 * WINDOW
        while got < total:
            while sent < total and sent - acknowledged < WINDOW:
                size = min(50_000, WINDOW - (sent - acknowledged), total - sent)
                await peer.send({"s": 1}, bytes(size))
                sent += size
            header, body = await peer.frame()
            acknowledged += header.get("took", 0)
            got += len(body)
            assert got - taken <= WINDOW
            if got - taken >= WINDOW // 2:
                await peer.send({"s": 1, "took": got - taken})
                taken = got
        await peer.send({"s": 1, "end": True})
        while not (await peer.frame())[0].get("end"):
            pass


def test_the_way_out_refuses_connections_first_because_it_has_that_on_record() -> None:
    assert TUNNELS > 2 * CONNECTIONS


async def test_connections_without_a_relay_or_beyond_their_number_are_refused() -> None:
    async with connected() as (_, peer, _):
        await peer.send({"s": 1, "open": True})
        assert await peer.frame() == ({"s": 1, "end": True}, b"")
    async with connected(echo) as (_, peer, _):
        for s in range(TUNNELS + 1):
            await peer.send({"s": s, "open": True})
        told = [(await peer.frame())[0] for _ in range(TUNNELS + 1)]
        assert [each for each in told if "end" in each] == [{"s": TUNNELS, "end": True}]
        await peer.send({"s": 0, "end": True})
        while not (await peer.frame())[0].get("end"):
            pass
        await peer.send({"s": TUNNELS + 1, "open": True})
        assert (await peer.frame())[0] == {"s": TUNNELS + 1, "ready": True}


async def test_a_relay_that_fails_ends_its_connection_alone() -> None:
    async def fail(stream: ByteStream) -> None:
        await stream.receive()
        raise ValueError("refused")

    async with connected(fail) as (channel, peer, _):
        await peer.send({"s": 1, "open": True})
        await peer.send({"s": 1}, b"hello")
        told = [(await peer.frame())[0] for _ in range(3)]
        assert told == [{"s": 1, "ready": True}, {"s": 1, "took": 5}, {"s": 1, "end": True}]
        await peer.send({"s": 1}, b"more")
        assert (await peer.frame())[0] == {"s": 1, "took": 4}
        await peer.send({"s": 1, "end": True})
        exchange = await channel.begin("ping")
        await peer.reply((await peer.frame())[0])
        await exchange.reply()


@pytest.mark.parametrize(
    ("frames", "told"),
    [
        ([({"s": 1}, bytes(MAX_BODY)), ({"s": 1}, b"x")], "more than its window"),
        ([({"s": 1, "open": True}, b"")], "opened twice"),
        ([({"s": 1, "took": 1}, b"")], "more bytes were taken"),
        ([({"s": 1, "end": True}, b""), ({"s": 1}, b"x")], "after its end"),
        ([({"s": 1, "end": "yes"}, b"")], "true or false"),
    ],
)
async def test_a_breach_of_a_connection_ends_the_channel(frames: list[tuple[Header, bytes]], told: str) -> None:
    cut = anyio.Event()

    async def wait(stream: ByteStream) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cut.set()

    async with connected(wait) as (channel, peer, _):
        await peer.send({"s": 1, "open": True})
        await peer.frame()
        for header, body in frames:
            await peer.send(header, body)
        await peer.wait_closed()
        await cut.wait()
        with pytest.raises(SandboxGone, match=told):
            channel.check()


async def test_what_calls_have_in_their_environment() -> None:
    async with sandboxed(network=("example.com",), env={"A": "1", "B": "1"}) as (sandbox, peer, _):
        async with anyio.create_task_group() as group:
            group.start_soon(_check_environment, peer)
            await sandbox.exec(["true"], env={"B": "2"})
    assert sandbox.known_calls == {"a": "done"}
    assert sandbox.clean


async def _check_environment(peer: Peer) -> None:
    request, _ = await peer.request("run")
    env = request["env"]
    assert (env["A"], env["B"], env["HOME"]) == ("1", "2", "/workspace")
    assert env["https_proxy"] == env["HTTP_PROXY"] == attached.PROXY
    assert env["no_proxy"] == "localhost,127.0.0.1"
    await peer.reply(request, out=0, err=0, **END)
