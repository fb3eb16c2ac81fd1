"""A real supervisor as a child process, and a plain host that speaks frames to it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ridethrough.sandboxes.frames import Decoder, encode, supervisor_source

PATIENCE = 30.0
"""Seconds after which a test that waits is broken; no test comes near it."""


@dataclass(frozen=True)
class Answer:
    """A reply, with the events that came before it."""

    header: dict[str, Any]
    body: bytes
    events: list[tuple[dict[str, Any], bytes]] = field(default_factory=list[tuple[dict[str, Any], bytes]])

    def __getitem__(self, name: str) -> Any:
        return self.header[name]

    @property
    def kind(self) -> str:
        """The kind of an error; empty if it is none."""
        return str(self.header.get("error", {}).get("kind", ""))

    @property
    def message(self) -> str:
        """Its message."""
        return str(self.header["error"]["message"])

    @property
    def out(self) -> bytes:
        """Standard output of a call that was collected."""
        return self.body[: self.header["out"]] + self.streamed("stdout")

    @property
    def err(self) -> bytes:
        """Standard error likewise."""
        return self.body[self.header["out"] :] + self.streamed("stderr")

    def streamed(self, name: str) -> bytes:
        """What came of a stream in events."""
        return b"".join(body for header, body in self.events if header.get("stream") == name)

    def json(self) -> Any:
        """The body, where it is JSON."""
        return json.loads(self.body)


class Plain:
    """A host: asks, and sorts what comes by the numbers of its requests."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(PATIENCE)
        self.decoder = Decoder()
        self.frames: deque[tuple[dict[str, Any], bytes]] = deque()
        self.events: dict[int, list[tuple[dict[str, Any], bytes]]] = {}
        self.replies: dict[int, Answer] = {}
        self.order: list[int] = []
        self.streams: deque[tuple[dict[str, Any], bytes]] = deque()
        self.last = 0
        self.takes = True
        self.hello = self.frame()[0]

    def frame(self) -> tuple[dict[str, Any], bytes]:
        """The next frame, whatever it is."""
        while not self.frames:
            data = self.sock.recv(1 << 18)
            if not data:
                raise EOFError
            self.frames.extend(self.decoder.feed(data))
        return self.frames.popleft()

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Send a frame."""
        self.sock.sendall(encode(header, body))

    def begin(self, op: str, body: bytes = b"", **fields: Any) -> int:
        """Send a request; its number."""
        self.last += 1
        self.send({"op": op, "n": self.last, **fields}, body)
        return self.last

    def step(self) -> None:
        """Take one frame; what is output is acknowledged."""
        header, body = self.frame()
        if "s" in header:
            self.streams.append((header, body))
        elif "event" in header:
            self.events.setdefault(header["n"], []).append((header, body))
            if header["event"] == "output" and self.takes:
                self.send({"n": header["n"], "took": len(body)})
        else:
            self.order.append(header["n"])
            self.replies[header["n"]] = Answer(header, body, self.events.pop(header["n"], []))

    def wait(self, n: int) -> Answer:
        """The reply to a request."""
        self.until(lambda: n in self.replies)
        return self.replies.pop(n)

    def until(self, there: Callable[[], object]) -> None:
        """Take frames until something is so."""
        while not there():
            self.step()

    def written(self, n: int, stream: str = "stdout") -> bytes:
        """What came of a stream until now."""
        return b"".join(body for header, body in self.events.get(n, []) if header.get("stream") == stream)

    def ask(self, op: str, body: bytes = b"", **fields: Any) -> Answer:
        """A request and its reply."""
        return self.wait(self.begin(op, body, **fields))

    def run(self, *argv: str, body: bytes = b"", **fields: Any) -> Answer:
        """Run a command."""
        return self.ask("run", body, **{"id": uuid.uuid4().hex, "argv": argv, "deadline": PATIENCE, **fields})

    def shell(self, script: str, body: bytes = b"", **fields: Any) -> Answer:
        """Run a script."""
        return self.run("sh", "-c", script, body=body, **fields)

    def start(self, script: str, **fields: Any) -> str:
        """Start a script; its id."""
        id = str(fields.pop("id", uuid.uuid4().hex))
        fields = {"argv": ["sh", "-c", script], "deadline": PATIENCE, **fields}
        reply = self.ask("start", b"", id=id, **fields)
        assert reply["known"] is False, reply
        return id

    def close(self) -> None:
        """Go away."""
        self.sock.close()


class Inside:
    """A supervisor with its folders."""

    def __init__(self, folder: Path, options: Sequence[str] = (), before: str = "", limit: int | None = None) -> None:
        self.workspace, self.tmp, self.socket = folder / "workspace", folder / "tmp", folder / "socket"
        self.workspace.mkdir()
        self.tmp.mkdir()
        folders = ["--workspace", str(self.workspace), "--tmp", str(self.tmp)]
        start = "from __future__ import annotations\n"
        source = supervisor_source().replace(start, start + before, 1)
        argv = [sys.executable, "-c", source, "serve", "--socket", str(self.socket), *folders]
        argv += ["--linger", "20", *options]
        if limit is not None:
            argv = ["prlimit", f"--nofile={limit}", *argv]
        self.process = subprocess.Popen(argv, env={"PATH": os.environ["PATH"]}, stderr=subprocess.PIPE)
        self.hosts: list[Plain] = []
        self.host = self.attach()

    def connect(self) -> Plain:
        """Another connection, which has not asked for anything."""
        sock = socket.socket(socket.AF_UNIX)
        connected(sock, self.socket, self.process)
        self.hosts.append(Plain(sock))
        return self.hosts[-1]

    def attach(self) -> Plain:
        """Another host."""
        host = self.connect()
        assert host.ask("attach", linger=20)["ok"]
        return host

    @property
    def left(self) -> list[object]:
        """What is in its folders, and what runs."""
        below = running("", self.process.pid)
        return [*self.workspace.iterdir(), *self.tmp.iterdir(), *below, self.host.ask("attach").body]

    def part(self) -> None:
        """Have all hosts go away."""
        for host in self.hosts:
            host.close()
        self.hosts.clear()

    def end(self) -> bytes:
        """Stop it; what it said on standard error."""
        self.part()
        self.process.terminate()
        try:
            return self.process.communicate(timeout=PATIENCE)[1]
        finally:
            self.process.kill()


def connected(sock: socket.socket, path: Path, process: subprocess.Popen[bytes]) -> None:
    """Connect, as soon as somebody listens."""
    while True:
        try:
            sock.connect(str(path))
            return
        except OSError:
            assert process.poll() is None, process.communicate()


@contextmanager
def inside(*options: str, before: str = "", limit: int | None = None) -> Generator[Inside]:
    """A supervisor for a while. It must not have said anything on standard error."""
    folder = Path(tempfile.mkdtemp(prefix="rt-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    found = None
    try:
        found = Inside(folder, options, before, limit)
        yield found
        assert found.end() == b""
    finally:
        if found is not None and found.process.poll() is None:
            found.end()
        shutil.rmtree(folder, ignore_errors=True)


def running(mark: str, parent: int | None = None) -> list[int]:
    """The processes that have a mark in their command line."""
    found: list[int] = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            fields = (each / "stat").read_text().rpartition(")")[2].split()
            ours = parent is None or int(fields[1]) == parent
            if ours and fields[0] != "Z" and mark.encode() in (each / "cmdline").read_bytes():
                found.append(int(each.name))
        except OSError:
            continue
    return found
