"""A wrong configuration is no answer of a model: the run waits for it to be mended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from ridethrough import Agent, Runtime, tool, workflow
from ridethrough.runtime.config import parse_config
from ridethrough.runtime.router.providers.simulated import Answer, Call, Script, SimulatedProvider

pytestmark = pytest.mark.anyio


async def reaches(runtime: Runtime, run_id: str, status: str) -> Any:
    """Wait until the run has the status."""
    with anyio.fail_after(20):
        async for event in runtime.events(run_id):
            if event.type == "run_paused" and (await runtime.describe(run_id)).status == status:
                break
    return await runtime.describe(run_id)


async def test_a_key_that_is_not_set_pauses_the_run_until_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with SimulatedProvider(Script().rule("hello")) as provider:
        config = parse_config(
            f'[providers.p]\nkind = "openai"\nbase_url = "{provider.base_url}"\napi_key = "env:RIDETHROUGH_TEST_KEY"\n'
        )
        monkeypatch.delenv("RIDETHROUGH_TEST_KEY", raising=False)
        agent = Agent("careful", model="p/m")

        @workflow(name="greet_after_mending")
        async def greet() -> str:
            return (await agent.run("say hello")).output

        database = f"sqlite:///{tmp_path / 'runs.db'}"
        async with Runtime.open(database, config=config) as runtime:
            await runtime.start(greet, id="r")
            view = await reaches(runtime, "r", "paused")
            assert view.pause.reason == "configuration"
            assert view.pause.until is None
            assert "RIDETHROUGH_TEST_KEY" in view.waits[0].question
            assert view.steps == []
            assert provider.requests == []
        monkeypatch.setenv("RIDETHROUGH_TEST_KEY", "planted")
        async with Runtime.open(database, config=config) as runtime:
            run = await runtime.resume("r")
            assert await run.result() == "hello"
        assert len(provider.requests) == 1


async def test_a_call_may_be_approved_by_the_path_of_its_step(tmp_path: Path) -> None:
    @tool(approval=True)
    async def fire() -> str:
        return "fired"

    script = Script().rule(Answer(calls=(Call("fire", {}),)), turn=0).rule("done")
    async with SimulatedProvider(script) as provider:
        config = parse_config(f'[providers.p]\nkind = "openai"\nbase_url = "{provider.base_url}"\n')
        agent = Agent("shooter", model="p/m", tools=[fire])

        @workflow(name="approve_by_path")
        async def shoot() -> str:
            return (await agent.run("fire")).output

        async with Runtime.open(f"sqlite:///{tmp_path / 'runs.db'}", config=config) as runtime:
            run = await runtime.start(shoot, id="r")
            await reaches(runtime, "r", "waiting")
            await runtime.approve("r", "shooter#1/fire#1")
            assert await run.result() == "done"
