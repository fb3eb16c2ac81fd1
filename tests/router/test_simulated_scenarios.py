"""Scenarios: what they may say, what is refused and how, and those that are shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from ridethrough.runtime.errors import ConfigError
from ridethrough.runtime.router.providers.simulated import (
    MEASURES,
    Expectation,
    Fault,
    Kill,
    SimulatedProvider,
    ToolFault,
    load_scenario,
    load_script,
    read_scenario,
    run_simulator,
    shipped_scenarios,
)

pytestmark = pytest.mark.anyio

SCENARIO = """
description = "a little of everything"
seed = 7
latency = "20ms"
models = ["small", "large"]

[[rules]]
user = "tides"
text = "two a day"

[[faults]]
deployment = "#1"
kind = "slow"
seconds = "2s"
ramp = true
start = "500ms"
end = "4s"

[[faults]]
deployment = "*"
kind = "rate_limit"
seconds = 1
share = 0.25
every = "4s"
lasts = "1s"

[[kills]]
at = "5s"

[[tools]]
tool = "search"
kind = "timeout"
seconds = "2s"
share = 0.5
times = 3

[expect]
lost = 0
repeated = "0"
wasted = "<= 10"
delay = "<= 20s"
cost = "< $0.5"
return = "<= 6000ms"
"""


def test_a_scenario_has_all_that_a_drill_needs(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SCENARIO)
    scenario = load_scenario("s.toml", lambda name: tmp_path / name)
    assert (scenario.name, scenario.description, scenario.seed) == ("s.toml", "a little of everything", 7)
    assert scenario.faults == (
        Fault("slow", deployment="#1", seconds=2, ramp=True, start=0.5, end=4),
        Fault("rate_limit", deployment="*", seconds=1, share=0.25, every=4, lasts=1),
    )
    assert scenario.script.faults == list(scenario.faults)
    assert (scenario.script.seed, scenario.script.latency, scenario.script.models) == (7, 0.02, ("small", "large"))
    assert scenario.kills == (Kill(5),)
    assert scenario.tools == (ToolFault("search", "timeout", seconds=2, share=0.5, times=3),)
    assert scenario.expect == (
        Expectation("lost", "=", 0, "0"),
        Expectation("repeated", "=", 0, "0"),
        Expectation("wasted", "<=", 10, "<= 10"),
        Expectation("delay", "<=", 20, "<= 20s"),
        Expectation("cost", "<", 0.5, "< $0.5"),
        Expectation("return", "<=", 6, "<= 6000ms"),
    )
    assert load_script("s.toml", lambda name: tmp_path / name) == scenario.script


def test_json_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"faults": [{"kind": "hang", "end": "2s"}], "expect": {"lost": 0}}))
    scenario = load_scenario("s.json", lambda name: tmp_path / name)
    assert scenario.faults == (Fault("hang", end=2),)
    assert [each.measure for each in scenario.expect] == ["lost"]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"fault": []}, "did you mean 'faults'"),
        ({"description": 5}, "description: expected text"),
        ({"seed": "x"}, "seed: expected a number"),
        ({"faults": {"kind": "hang"}}, "write [[faults]]"),
        ({"faults": ["hang"]}, "faults[0]: expected a table"),
        ({"faults": [{"kind": "hang", "begin": 1}]}, "faults[0]: unknown key 'begin'"),
        ({"faults": [{"kind": "hang", "share": 1.5}]}, "faults[0].share: "),
        ({"faults": [{"kind": "hang", "times": "often"}]}, "faults[0].times: "),
        ({"faults": [{"kind": "hang", "start": "soon"}]}, "faults[0]: not a duration"),
        ({"faults": [{"kind": "slow"}]}, "faults[0]: 'slow' needs 'seconds'"),
        ({"faults": [{"kind": "slow", "seconds": 1, "ramp": True}]}, "faults[0]: 'ramp'"),
        ({"faults": [{"kind": "capacity"}]}, "faults[0]: the kind 'capacity' needs 'limit'"),
        ({"faults": [{"kind": "hang", "lasts": 1}]}, "faults[0]: 'lasts' needs 'every'"),
        ({"rules": [{"calls": [{"nam": "x"}]}]}, "rules[0]: calls[0]: unknown key 'nam'; did you mean 'name'"),
        ({"kills": [{"after": 3}]}, "kills[0]: unknown key 'after'"),
        ({"kills": [{}]}, "kills[0].at: Field required"),
        ({"tools": [{"kind": "errer"}]}, "tools[0]: there is no kind 'errer'; did you mean 'error'"),
        ({"tools": [{"tol": "x"}]}, "did you mean 'tool'"),
        ({"expect": {"lots": 0}}, "expect: unknown key 'lots'; did you mean 'lost'"),
        ({"expect": {"lost": "few"}}, "expect.lost: 'few' is no number of calls"),
        ({"expect": {"delay": "<= soon"}}, "expect.delay: not a duration"),
        ({"expect": {"lost": True}}, "expect.lost: True is no comparison"),
        ({"expect": {"lost": "<= 1 or 2"}}, "expect.lost: '<= 1 or 2' is no comparison"),
    ],
)
def test_a_wrong_scenario_is_refused(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_scenario(raw)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "holding", "failing"),
    [
        ("<= 10", (9, 10), (10.5,)),
        ("< 10", (9,), (10,)),
        (">= 10", (10, 11), (9,)),
        ("> 10", (11,), (10,)),
        ("== 10", (10,), (9,)),
        ("10", (10,), (11,)),
    ],
)
def test_expectations_compare(text: str, holding: tuple[float, ...], failing: tuple[float, ...]) -> None:
    [expectation] = read_scenario({"expect": {"wasted": text}}).expect
    assert all(expectation.holds(value) for value in holding)
    assert not any(expectation.holds(value) for value in failing)


def test_faults_of_tools_have_a_schedule() -> None:
    fault = ToolFault("search", start=1, end=5, times=2)
    assert fault.applies("search", 1, 1, 0)
    assert not fault.applies("count", 1, 1, 0)
    assert not fault.applies("search", 1, 5, 0)
    assert not fault.applies("search", 3, 1, 2)
    shared = ToolFault(share=0.5)
    hit = [n for n in range(1, 201) if shared.applies("any", n, 0, 0, seed=3)]
    assert 70 < len(hit) < 130


# --- shipped --------------------------------------------------------------------------------------------------------


def test_the_shipped_ones_are_all_there() -> None:
    assert list(shipped_scenarios()) == [
        "bad-key",
        "broken-streams",
        "brownout",
        "double-outage",
        "flapping",
        "gradual-slowdown",
        "outage",
        "quota-exhausted",
        "slow-first-token",
    ]


@pytest.mark.parametrize("name", list(shipped_scenarios()))
def test_a_shipped_one_is_a_gate_that_ends_soon(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.description
    assert {"lost"} <= {each.measure for each in scenario.expect} <= set(MEASURES)
    assert all(fault.deployment in ("#1", "#2", "*") for fault in scenario.faults)
    assert max(fault.end or 0 for fault in scenario.faults) <= 30
    assert load_script(name) == scenario.script


def test_an_unknown_one_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'brownout'"):
        load_scenario("brownuot")


async def test_simulate_is_the_deployment_that_it_is_told(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    started: list[SimulatedProvider] = []
    body = {"contents": [{"role": "user", "parts": [{"text": "hello"}]}]}

    async def ask(position: int) -> None:
        async with anyio.create_task_group() as tasks:
            ready = anyio.Event()

            def told(provider: SimulatedProvider) -> None:
                started.append(provider)
                ready.set()

            async def serve() -> None:
                await run_simulator(
                    scenario="quota-exhausted",
                    wire="gemini",
                    name=f"d{position}",
                    position=position,
                    ledger=ledger,
                    on_ready=told,
                )

            tasks.start_soon(serve)
            await ready.wait()
            provider = started[-1]
            provider.faults.add(Fault("auth", deployment=f"#{position}", times=1))
            async with httpx2.AsyncClient() as client:
                response = await client.post(f"{provider.base_url}/v1beta/models/m:generateContent", json=body)
            assert response.status_code == 401
            tasks.cancel_scope.cancel()

    await ask(1)
    await ask(2)
    assert [len(provider.faults.all) for provider in started] == [2, 1]
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [(line["event"], line["deployment"], line["error"]) for line in lines] == [
        ("started", "d1", None),
        ("finished", "d1", "auth"),
        ("started", "d2", None),
        ("finished", "d2", "auth"),
    ]
