"""ridethrough's router over two deployments; `BENCH_VARIANT=transport` is its HTTP transport alone, to one server.

Its answers are not streamed where overhead is measured, like everybody's; elsewhere it is as it comes, with hedging
and patience. No price list is loaded: prices are in the configuration.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

from _measure import arguments
from _router import PROMPT, Mock, measure

case, directory, _ = arguments()
os.environ["BENCH_KEY"] = "sk-bench"
CONFIG = """
[providers.a]
kind = "openai"
base_url = "{a}"
api_key = "env:BENCH_KEY"

[providers.b]
kind = "openai"
base_url = "{b}"
api_key = "env:BENCH_KEY"

[models.a]
provider = "a"
model = "m"
stream = {stream}
price = {{ input = 1.0, output = 1.0 }}

[models.b]
provider = "b"
model = "m"
stream = {stream}
price = {{ input = 1.0, output = 1.0 }}

[routes.m]
models = ["a", "b"]
hedge = true
patience = "60s"
"""


async def transport(mock: Mock) -> None:
    import anyio

    from ridethrough.runtime.router.transport import Connections, Deadline

    message = {"role": "user", "content": PROMPT}
    headers = {"authorization": "Bearer sk-bench", "content-type": "application/json"}
    async with Connections(mock.url("a")) as connections:

        async def call() -> str:
            body = json.dumps({"model": "m", "messages": [message]}).encode()
            deadline = Deadline(anyio.current_time() + 60, "total")
            async with connections.post(
                "chat/completions", body, headers, connect=5, deadline=deadline, deployment="a"
            ) as reply:
                answer = json.loads(await reply.body(deadline))
            return str(answer["choices"][0]["message"]["content"])

        await measure("ridethrough, transport alone", case, mock, call)


async def router(mock: Mock, config: Path) -> None:
    from ridethrough import ModelRequest, Router
    from ridethrough.runtime.router.messages import UserMessage

    async with Router.open(config) as opened:

        async def call() -> str:
            request = ModelRequest(messages=(UserMessage(content=PROMPT),))
            return (await opened.complete(request, route="m")).text

        await measure("ridethrough", case, mock, call)


with Mock() as mock:
    if os.environ.get("BENCH_VARIANT") == "transport":
        asyncio.run(transport(mock))
    else:
        config = directory / "ridethrough.toml"
        stream = "false" if case == "router_overhead" else "true"
        config.write_text(CONFIG.format(a=mock.url("a"), b=mock.url("b"), stream=stream))
        asyncio.run(router(mock, config))
