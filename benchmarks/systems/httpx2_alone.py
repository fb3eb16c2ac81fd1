"""httpx2 alone, to one server: what most Python clients are built on today."""

from __future__ import annotations

import asyncio

import httpx2
from _measure import arguments
from _router import PROMPT, Mock, measure

case, _, _ = arguments()


async def main(mock: Mock) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": PROMPT}]}
    limits = httpx2.Limits(max_connections=1000, max_keepalive_connections=1000)
    headers = {"authorization": "Bearer sk-bench"}
    async with httpx2.AsyncClient(base_url=mock.url("a"), headers=headers, limits=limits, timeout=60) as client:

        async def call() -> str:
            answer = (await client.post("/chat/completions", json=body)).json()
            return str(answer["choices"][0]["message"]["content"])

        await measure("httpx2 alone", case, mock, call)


with Mock() as mock:
    asyncio.run(main(mock))
