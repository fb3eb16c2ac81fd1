"""An MCP server of a few lines, on the standard library alone, that can do everything wrong.

    python mcp_server.py [MODE] [LOG]

It speaks newline-delimited JSON-RPC, revision 2025-11-25 (``modern``: 2026-07-28). Every message that it gets is
noted in LOG, one line each. Modes: ``hang`` answers nothing, ``exit`` ends at once, ``deaf`` does not read after its
first call, ``stubborn`` ignores SIGTERM and the end of its input, ``endless`` has a list of tools without an end,
``clash`` has two tools that become one name, ``greets`` says hello on standard output first.
"""

import json
import os
import signal
import sys
import threading
import time
from typing import Any

MODE = sys.argv[1] if len(sys.argv) > 1 else "plain"
LOG = sys.argv[2] if len(sys.argv) > 2 else os.devnull
PAGE = 5
TEXT: dict[str, Any] = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}}
tools: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "echo": (TEXT, {"readOnlyHint": True}),
    "add": (
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        {"idempotentHint": True},
    ),
    "wait": (NOTHING, {"readOnlyHint": True}),
    "die": (NOTHING, {}),
    "die_reading": (NOTHING, {"readOnlyHint": True}),
    "fail": (NOTHING, {}),
    "error": (NOTHING, {}),
    "huge": (NOTHING, {"readOnlyHint": True}),
    "picture": (NOTHING, {"readOnlyHint": True}),
    "wrong_id": (NOTHING, {"readOnlyHint": True}),
    "rubbish": (NOTHING, {"readOnlyHint": True}),
    "flood": (NOTHING, {"readOnlyHint": True}),
    "no_result": (NOTHING, {"readOnlyHint": True}),
    "change": (NOTHING, {}),
    "progress": (NOTHING, {"readOnlyHint": True}),
    "environment": (NOTHING, {"readOnlyHint": True}),
    "odd name/ä": (NOTHING, {"readOnlyHint": True}),
}
if MODE == "clash":
    tools |= {"a.b": (NOTHING, {}), "a/b": (NOTHING, {})}
lock = threading.Lock()


def send(message: dict[str, Any]) -> None:
    data = (json.dumps({"jsonrpc": "2.0", **message}) + "\n").encode()
    with lock:
        while data:
            data = data[os.write(1, data) :]


def note(message: dict[str, Any]) -> None:
    with open(LOG, "a") as file:
        file.write(json.dumps(message) + "\n")


def initialize(params: dict[str, Any]) -> dict[str, Any]:
    capabilities = {"tools": {"listChanged": True}}
    return {"protocolVersion": "2025-11-25", "capabilities": capabilities, "serverInfo": {"name": "t", "version": "1"}}


def discover(params: dict[str, Any]) -> dict[str, Any]:
    return {
        "resultType": "complete",
        "supportedVersions": ["2026-07-28"],
        "capabilities": {"tools": {"listChanged": True}},
        "ttlMs": 0,
        "cacheScope": "private",
    }


def list_tools(params: dict[str, Any]) -> dict[str, Any]:
    start = int(params.get("cursor", 0))
    names = list(tools)[start : start + PAGE]
    listed = [
        {"name": name, "description": f"Does {name}.", "inputSchema": tools[name][0], "annotations": tools[name][1]}
        for name in names
    ]
    more = {"nextCursor": str(start + PAGE)} if start + PAGE < len(tools) else {}
    if MODE == "endless":
        more = {"nextCursor": "0"}
    cache = {"resultType": "complete", "ttlMs": 0, "cacheScope": "private"} if MODE == "modern" else {}
    return {"tools": listed, **more, **cache}


def text(value: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": value}], **({"resultType": "complete"} if MODE == "modern" else {})}


def call_tool(id: Any, params: dict[str, Any]) -> dict[str, Any] | None:
    name, arguments = params["name"], params.get("arguments") or {}
    if name == "echo":
        return text(arguments["text"])
    if name == "add":
        total = arguments["a"] + arguments["b"]
        return {**text("a sum"), "structuredContent": {"sum": total}}
    if name == "wait":
        return None
    if name in ("die", "die_reading"):
        print("dying words", file=sys.stderr, flush=True)
        os._exit(3)
    if name == "fail":
        return {**text("it went wrong"), "isError": True}
    if name == "huge":
        return text("x" * 50_000_000)
    if name == "picture":
        block = {"type": "image", "mimeType": "image/png", "data": "AAAA"}
        link = {"type": "resource_link", "name": "r", "uri": "file:///r.txt"}
        return {
            **text("see"),
            "content": [{"type": "text", "text": "see"}, block, {**block, "mimeType": "image/tiff"}, link],
        }
    if name == "wrong_id":
        send({"id": 987654, "result": text("for somebody else")})
        return None
    if name == "rubbish":
        for _ in range(1000):
            os.write(1, b"this is no message\n")
        return text("after the rubbish")
    if name == "flood":
        while True:
            send({"method": "notifications/message", "params": {"level": "info", "data": "flood"}})
    if name == "no_result":
        return {"nonsense": 1}
    if name == "change":
        tools["echo"] = ({**TEXT, "required": []}, {"readOnlyHint": True})
        if MODE == "modern":
            about = {"_meta": {"io.modelcontextprotocol/subscriptionId": subscription[0]}}
            send({"method": "notifications/tools/list_changed", "params": about})
        else:
            send({"method": "notifications/tools/list_changed"})
        return text("changed")
    if name == "progress":
        token = params["_meta"]["progressToken"]
        told = {"progressToken": token, "progress": 1, "total": 2, "message": "half"}
        send({"method": "notifications/progress", "params": told})
        held.append(id)
        return None
    if name == "environment":
        return text(json.dumps(dict(os.environ)))
    return text(f"{name} was called")


subscription: list[Any] = []
held: list[Any] = []


def answer(message: dict[str, Any]) -> None:
    method, id = message["method"], message.get("id")
    result: dict[str, Any] | None
    params = message.get("params") or {}
    if method == "initialize" and MODE != "modern":
        result = initialize(params)
    elif method == "server/discover" and MODE == "modern":
        result = discover(params)
    elif method == "tools/list":
        result = list_tools(params)
    elif method == "subscriptions/listen" and MODE == "modern":
        subscription[:] = [id]
        about = {"notifications": {"toolsListChanged": True}, "_meta": {"io.modelcontextprotocol/subscriptionId": id}}
        send({"method": "notifications/subscriptions/acknowledged", "params": about})
        return
    elif method == "tools/call" and params["name"] != "error":
        result = call_tool(id, params)
    else:
        send({"id": id, "error": {"code": -32601, "message": f"{method} is not to be had"}})
        return
    if result is not None:
        send({"id": id, "result": result})
        while held:
            send({"id": held.pop(), "result": text("done")})


def main() -> None:
    note({"pid": os.getpid()})
    if MODE == "exit":
        print("cannot find the configuration", file=sys.stderr)
        sys.exit(7)
    if MODE == "greets":
        print("Welcome!", flush=True)
    if MODE == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for line in sys.stdin:
        message = json.loads(line)
        note(message)
        if MODE == "hang" or "method" not in message:
            continue
        if "id" in message:
            if message["method"] == "tools/call" and message["params"]["name"] == "flood":
                threading.Thread(target=answer, args=(message,), daemon=True).start()
            else:
                answer(message)
        if MODE == "deaf" and message["method"] == "tools/call":
            time.sleep(3600)
    while MODE == "stubborn":
        time.sleep(3600)


main()
