"""LiteLLM's Router in the process, over two deployments of one model.

Where overhead is measured, as documented. In trouble it is tuned, since without timeouts nothing ever cools down: 5 s
a call, 3 retries, 2 failures allowed, 5 s of cooldown.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from _measure import arguments
from _router import PROMPT, Mock, measure

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no download of prices
os.environ["LITELLM_LOG"] = "ERROR"
import litellm
from litellm import Router

litellm.telemetry = False
litellm.suppress_debug_info = True
case, _, _ = arguments()
TUNED = {"timeout": 5, "num_retries": 3, "allowed_fails": 2, "cooldown_time": 5}


def deployment(url: str) -> dict[str, Any]:
    return {"model_name": "m", "litellm_params": {"model": "openai/m", "api_base": url, "api_key": "sk-bench"}}


async def main(mock: Mock) -> None:
    settings = {} if case == "router_overhead" else TUNED
    router = Router(model_list=[deployment(mock.url("a")), deployment(mock.url("b"))], **settings)

    async def call() -> str:
        answer: Any = await router.acompletion(model="m", messages=[{"role": "user", "content": PROMPT}])
        return str(answer.choices[0].message.content)

    await measure("litellm", case, mock, call)


with Mock() as mock:
    asyncio.run(main(mock))
os._exit(0)  # its logging thread and clients are not closed by anything
