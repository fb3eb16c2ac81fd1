from __future__ import annotations
from pathlib import Path
import pytest
from tests.agents.support import *
from ridethrough import Agent
pytestmark = pytest.mark.anyio
@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)
@pytest.mark.parametrize("n", range(5))
async def test_x(tmp_path: Path, n: int) -> None:
    m = Scripted("hi")
    async with open_runtime(tmp_path):
        r = await Agent("a", model=m).run("hello")
    assert r.output == "hi"
    assert type(r.output) is str
