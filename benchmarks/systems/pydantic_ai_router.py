"""pydantic-ai's FallbackModel over two models, called directly, without an agent.

In trouble it is tuned: 5 s a call instead of ten minutes, and no retries of the client below it, since they hide a
failing model from the fallback.
"""

from __future__ import annotations

import asyncio

from _measure import arguments
from _router import PROMPT, Mock, measure
from openai import AsyncOpenAI
from pydantic_ai.direct import model_request
from pydantic_ai.messages import ModelRequest, TextPart
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

case, _, _ = arguments()


def model(url: str) -> OpenAIChatModel:
    if case == "router_overhead":
        client = AsyncOpenAI(base_url=url, api_key="sk-bench")
    else:
        client = AsyncOpenAI(base_url=url, api_key="sk-bench", timeout=5, max_retries=0)
    return OpenAIChatModel("m", provider=OpenAIProvider(openai_client=client))


async def main(mock: Mock) -> None:
    fallback = FallbackModel(model(mock.url("a")), model(mock.url("b")))

    async def call() -> str:
        answer = await model_request(fallback, [ModelRequest.user_text_prompt(PROMPT)])
        return "".join(part.content for part in answer.parts if isinstance(part, TextPart))

    await measure("pydantic-ai", case, mock, call)


with Mock() as mock:
    asyncio.run(main(mock))
