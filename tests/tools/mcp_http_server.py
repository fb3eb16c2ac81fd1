"""MCP servers on streamable HTTP, made with the official SDK.

Each line ``{"port": ..., "log": ...}`` on standard input starts one, as a fork, since importing the SDK takes longer
than any test; its process number is printed. ``{"end": ...}`` ends the one of that number; all end with standard input.

They answer both protocol revisions at ``/mcp`` and note in the log what they are called for. Requests to ``/refused``
are refused with what they carried as their credential.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from mcp_types import ToolAnnotations

logging.disable(logging.CRITICAL)
log = ""
READS = ToolAnnotations(read_only_hint=True)
server = MCPServer("harbour")


def note(what: str) -> None:
    with open(log, "a") as file:
        file.write(f"{what}\n")


@server.tool(annotations=READS)
def echo(text: str) -> str:
    """Say it again."""
    return text


@server.tool(annotations=READS)
async def wait() -> str:
    """Wait for ever."""
    note("wait began")
    try:
        await anyio.sleep_forever()
    except anyio.get_cancelled_exc_class():
        note("wait was cancelled")
        raise
    return ""


@server.tool(annotations=READS)
def huge() -> str:
    """Say too much."""
    return "x" * 20_000_000


@server.tool()
def leave() -> str:
    """End the server in the middle."""
    note("left")
    os._exit(1)


@server.tool(annotations=ToolAnnotations(idempotent_hint=True))
async def grow(ctx: Context[Any, Any]) -> str:
    """Have one more tool."""

    def grown() -> str:
        """Be new."""
        return "new"

    server.add_tool(grown)
    return "grown"


App = Callable[[Any, Any, Any], Awaitable[None]]


def with_refusals(app: App) -> App:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/refused":
            await app(scope, receive, send)
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        body = json.dumps({"detail": f"{headers.get('authorization')} is no good"}).encode()
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})

    return answer


def serve(port: int, to: str) -> None:
    global log
    log = to
    sys.stdin.close()
    uvicorn.run(with_refusals(server.streamable_http_app()), host="127.0.0.1", port=port, log_level="critical")


def end(pid: int) -> None:
    """Kill it, unless that was done before. A dead one is waited for only here: until then nobody gets its number."""
    if pid in started:
        started.remove(pid)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


started: set[int] = set()
while line := sys.stdin.readline():
    asked = json.loads(line)
    if "end" in asked:
        end(asked["end"])
        print("ended", flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        serve(asked["port"], asked["log"])
        os._exit(0)
    started.add(pid)
    print(pid, flush=True)
for pid in sorted(started):
    end(pid)
