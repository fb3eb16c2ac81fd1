"""The provider that every router talks to: two Chat Completions servers, `a` and `b`, in one process, on raw asyncio.

It is cheap on purpose: the answer is made once, a request is never parsed beyond its length and its `stream`. What it
does is told on standard input, a JSON object a line, each answered by one on standard output:

    {"latency": 0.2}                               seconds to each answer from now on
    {"start": {"a": [[5, 25, "brownout"]]}}        starts the clock, with what goes wrong when on it, by server
    {"stats": true}                                the calls since then: {"a": [[second, verdict], ...], ...}

`outage` is a 503 at once. `brownout` is that for every other call and 30 s for the rest. A verdict is `ok`, `503` or
`slow`. A client that goes away is noticed by asyncio; nothing more is sent to it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

SLOW = 30.0
TEXT = "word " * 40
USAGE = {"prompt_tokens": 60, "completion_tokens": 40, "total_tokens": 100}
NAMES = ("a", "b")


def head(status: str, kind: str, length: int) -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nserver: mock\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\nx-request-id: req_1\r\n"
        f"x-ratelimit-limit-requests: 100000\r\nx-ratelimit-remaining-requests: 99999\r\n"
        f"content-type: {kind}\r\ncontent-length: {length}\r\n\r\n"
    ).encode()


def whole() -> bytes:
    message = {"role": "assistant", "content": TEXT}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    answer = {"id": "c-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": USAGE}
    body = json.dumps(answer).encode()
    return head("200 OK", "application/json", len(body)) + body


def streamed() -> bytes:
    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
        told = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices, **more}
        return f"data: {json.dumps(told)}\n\n"

    parts = [chunk({"role": "assistant", "content": ""}), *(chunk({"content": "word " * 10}) for _ in range(4))]
    parts += [chunk({}, "stop", usage=USAGE), "data: [DONE]\n\n"]
    body = "".join(parts).encode()
    return head("200 OK", "text/event-stream", len(body)) + body


def overloaded() -> bytes:
    error = {"message": "The server is overloaded.", "type": "server_error", "code": "server_is_overloaded"}
    body = json.dumps({"error": error}).encode()
    return head("503 Service Unavailable", "application/json", len(body)) + body


WHOLE, STREAMED, OVERLOADED = whole(), streamed(), overloaded()


class World:
    """What all connections share."""

    def __init__(self) -> None:
        self.latency = 0.0
        self.faults: dict[str, list[tuple[float, float, str]]] = {}
        self.began = time.monotonic()
        self.calls: dict[str, list[tuple[float, str]]] = {name: [] for name in NAMES}
        self.refuse_next = True

    def start(self, faults: dict[str, list[tuple[float, float, str]]]) -> None:
        self.faults = faults
        self.calls = {name: [] for name in NAMES}
        self.began = time.monotonic()

    def judge(self, server: str) -> str:
        """Decide on a call, and note it."""
        now = time.monotonic() - self.began
        kind = next((kind for start, end, kind in self.faults.get(server, ()) if start <= now < end), "")
        verdict = "503" if kind == "outage" else "ok"
        if kind == "brownout":
            verdict = "503" if self.refuse_next else "slow"
            self.refuse_next = not self.refuse_next
        self.calls[server].append((now, verdict))
        return verdict


class Connection(asyncio.Protocol):
    def __init__(self, world: World, server: str) -> None:
        self.world, self.server, self.buffer = world, server, b""
        self.waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self.waiting:
            self.waiting.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        lines = self.buffer[:end].lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
        body = self.buffer[end + 4 :]
        if len(body) >= length:
            self.buffer = body[length:]
            self.handle(body[:length])

    def handle(self, body: bytes) -> None:
        verdict = self.world.judge(self.server)
        if verdict == "503":
            self.transport.write(OVERLOADED)
            return
        answer = STREAMED if b'"stream":true' in body.replace(b" ", b"") else WHOLE
        delay = SLOW if verdict == "slow" else self.world.latency
        if delay:
            self.waiting = asyncio.get_running_loop().call_later(delay, self.transport.write, answer)
        else:
            self.transport.write(answer)


def obey(world: World, order: dict[str, Any]) -> Any:
    if "latency" in order:
        world.latency = order["latency"]
    if "start" in order:
        world.start(order["start"])
    return world.calls if "stats" in order else {}


async def main() -> None:
    loop, world = asyncio.get_running_loop(), World()
    ports: dict[str, int] = {}
    for name in NAMES:
        server = await loop.create_server(lambda name=name: Connection(world, name), "127.0.0.1", 0, backlog=4096)
        ports[name] = server.sockets[0].getsockname()[1]
    print(json.dumps(ports), flush=True)
    orders = asyncio.StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        print(json.dumps(obey(world, json.loads(line))), flush=True)


asyncio.run(main())
