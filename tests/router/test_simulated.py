"""The simulated provider: rules, schemas, faults, scenarios, and its ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import pytest

from ridethrough.runtime.errors import ConfigError
from ridethrough.runtime.router.providers.simulated import (
    Answer,
    Call,
    Fault,
    Script,
    SimRequest,
    SimulatedProvider,
    example_of,
    load_script,
    parse_scenario,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def request_of(*messages: dict[str, Any], **more: Any) -> SimRequest:
    return SimRequest(1, {"model": "m", "messages": list(messages), **more})


def says(script: Script, *messages: dict[str, Any], **more: Any) -> Answer:
    return script.answer(request_of(*messages, **more))[0]


USER = {"role": "user", "content": "research tides please"}
TOOLS = [{"type": "function", "function": {"name": "search"}}]


def test_rules_drive_a_conversation() -> None:
    script = Script()
    script.rule(
        Answer(calls=(Call("search", {"q": "{{topic}}"}),)), user=r"research (?P<topic>\w+)", turn=0, tool="search"
    )
    script.rule("found: {{result}}", role="tool", called="search", result="high")
    script.rule("other", system="editor")
    first = says(script, USER, tools=TOOLS)
    assert first.calls[0].arguments == {"q": "tides"}
    asked = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "search", "arguments": "{}"}}]}
    then = says(script, USER, asked, {"role": "tool", "tool_call_id": "1", "content": "High water"}, tools=TOOLS)
    assert then.text == "found: High water"
    assert says(script, {"role": "system", "content": "You are the Editor"}, USER).text == "other"
    assert says(script, USER).text.startswith("Simulated answer")


def test_a_function_may_answer_and_rules_may_end() -> None:
    script = Script().rule("once", times=1)

    @script.on(model="m")
    def counted(request: SimRequest) -> str:
        return f"turn {request.turns}"

    assert [says(script, USER).text, says(script, USER).text] == ["once", "turn 0"]
    assert counted(request_of(USER)) == "turn 0"


def test_the_same_conversation_gets_the_same_answer() -> None:
    assert says(Script(), USER) == says(Script(), USER)
    assert says(Script(), USER) != says(Script(), {**USER, "content": "other"})


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "string"}, "n": {"type": "integer", "minimum": 3}}},
    {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 3, "maxItems": 3},
    {"$ref": "#/$defs/Node", "$defs": {"Node": {"type": "object", "properties": {
        "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
        "v": {"type": "number", "exclusiveMaximum": 0}},
        "required": ["next", "v"]}}},
    {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}}, "required": ["kids"]},
    {"type": "string", "minLength": 40, "maxLength": 41},
    {"type": "integer", "multipleOf": 7, "minimum": 10},
    {"type": ["null", "boolean"]},
    {"allOf": [{"type": "object", "properties": {"a": {"const": 5}}, "required": ["a"]}]},
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 2},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS)
def test_instances_are_valid(schema: dict[str, Any]) -> None:
    jsonschema.validate(example_of(schema, "seed"), schema)


async def test_the_server_answers_over_http(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    async with SimulatedProvider(Script().rule("hello"), ledger=ledger) as sim, httpx2.AsyncClient() as client:
        body = {"model": "m", "messages": [USER]}
        whole = await client.post(f"{sim.base_url}/chat/completions", json=body, headers={"x-ridethrough-run-id": "r1"})
        streamed = await client.post(f"{sim.base_url}/chat/completions", json={**body, "stream": True})
        models = await client.get(f"{sim.base_url}/models")
        wrong = await client.post(f"{sim.base_url}/chat/completions", content=b"{")
    assert whole.json()["choices"][0]["message"]["content"] == "hello"
    assert whole.json()["usage"]["prompt_tokens"] > 0
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert models.json()["data"][0]["id"] == "simulated"
    assert wrong.status_code == 400
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["started", "finished"] * 2
    assert lines[0]["headers"] == {"x-ridethrough-run-id": "r1"}
    assert lines[0]["digest"] == lines[2]["digest"] == sim.requests[0].digest
    assert [handled.status for handled in sim.requests] == [200, 200]


async def test_faults_are_injected_while_it_runs() -> None:
    async with SimulatedProvider() as sim, httpx2.AsyncClient() as client:
        root = sim.base_url.removesuffix("/v1")
        body = {"model": "m", "messages": [USER]}
        fault = {"kind": "status", "status": 429, "headers": {"retry-after": "3"}}
        assert (await client.post(f"{root}/__faults", json=fault)).status_code == 200
        limited = await client.post(f"{sim.base_url}/chat/completions", json=body)
        await client.delete(f"{root}/__faults")
        well = await client.post(f"{sim.base_url}/chat/completions", json=body)
        refused = await client.post(f"{root}/__faults", json={"kind": "statos"})
    assert (limited.status_code, limited.headers["retry-after"], well.status_code) == (429, "3", 200)
    assert "did you mean 'status'" in refused.text


def test_faults_are_scheduled() -> None:
    by_number = Fault("status", requests=(2, 3))
    assert [by_number.applies("m", n, n, 0, 0) for n in (1, 2, 3, 4)] == [False, True, True, False]
    by_time = Fault("hang", start=1, end=2)
    assert [by_time.applies("m", 1, 1, age, 0) for age in (0.5, 1.5, 2)] == [False, True, False]
    by_model = Fault("cut", model="b", requests=(1,))
    assert [by_model.applies(name, 9, 1, 0, 0) for name in "ab"] == [False, True]
    assert not Fault("cut", times=1).applies("m", 1, 1, 0, used=1)


SCENARIO = """
latency = "50ms"

[[rules]]
system = "You plan"
text = "1. {{user}}"

[[rules]]
tool = "search"
calls = [{ name = "search", arguments = { q = "x" } }]

[[faults]]
kind = "status"
status = 503
requests = [1]
"""


def test_scenarios_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SCENARIO)
    script = load_script("s.toml", lambda name: tmp_path / name)
    assert script.latency == 0.05
    assert says(script, {"role": "system", "content": "You plan"}, USER).text == "1. research tides please"
    assert says(script, USER, tools=TOOLS).calls == (Call("search", {"q": "x"}),)
    assert script.faults == [Fault("status", status=503, requests=(1,))]
    (tmp_path / "s.py").write_text(
        "from ridethrough.runtime.router.providers.simulated import Script\nscript = Script().rule('py')\n"
    )
    assert says(load_script(str(tmp_path / "s.py")), USER).text == "py"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"rule": []}, "did you mean 'rules'"),
        ({"rules": [{"txt": "x"}]}, "rules[0]: unknown key 'txt'; did you mean 'text'"),
        ({"faults": [{"kind": "kut"}]}, "faults[0]: there is no kind 'kut'; did you mean 'cut'"),
        ({"latency": "long"}, "not a duration"),
    ],
)
def test_a_wrong_scenario_is_refused(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_scenario(raw)
    assert said in str(caught.value)


def test_missing_scripts_are_refused(tmp_path: Path) -> None:
    for name in ("nowhere.toml", "nowhere.py", "no_such_module:script", "json:dumps_"):
        with pytest.raises(ConfigError):
            load_script(name, lambda given: tmp_path / given)


async def test_a_taken_port_is_an_error_that_says_so() -> None:
    async with SimulatedProvider() as sim:
        with pytest.raises(ConfigError, match="choose another port"):
            async with SimulatedProvider(port=sim.port):
                pass
