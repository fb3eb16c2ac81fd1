"""Tools of all three effects and agents for the programs of ``ridethrough.runtime.testing``: ``--ops tests.kill.ops``.

Every effect is known to the ledger under a name that its program gives it, not under anything of the engine's. So a
call that the engine takes for another one at its second attempt is found out: two ids or keys under one name.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import anyio
from pydantic import BaseModel

from ridethrough import Agent, ToolContext, tool
from ridethrough.runtime import testpoints
from ridethrough.runtime.errors import NotStarted, ToolInterrupted
from ridethrough.runtime.router.messages import (
    MESSAGE,
    AssistantMessage,
    ModelRequest,
    ModelResponse,
    ToolCall,
    ToolMessage,
)
from ridethrough.runtime.testing import OPS, Failure, Maker, Node, Planned, current_ledger
from ridethrough.tools.tool import ToolCall as CallToSettle

EFFECTS = ("read", "idempotent", "write")


# --- tools ----------------------------------------------------------------------------------------------------------


async def touch(effect: str, call: str, nap: float, ctx: ToolContext) -> str:
    """Do something to the world that takes a while; a life may end in the middle of it."""
    with current_ledger().effect(effect, ctx.run_id, call, ctx.idempotency_key, ctx.call_id):
        testpoints.killpoint("step.before_call")
        await anyio.sleep(nap)
        testpoints.killpoint("step.after_call")
    return f"{effect} {call}"


async def settle(asked: CallToSettle) -> str:
    """What a write of unknown outcome has done, according to the ledger.

    One that has started and not finished gave, by definition, what it would have given.
    """
    call = asked.arguments["call"]
    starts = [(line["run"], line["call"]) for line in current_ledger().read() if line["kind"] == "start"]
    current_ledger().write("settled", effect="write", run=asked.run_id, call=call, id=asked.call_id)
    if (asked.run_id, call) not in starts:
        raise NotStarted(call)
    return f"write {call}"


@tool(effect="read")
async def look(call: str, nap: float, failing: bool, ctx: ToolContext) -> str:
    """Look something up.

    Args:
        call: What the ledger calls it.
        nap: How long it takes.
        failing: Whether it fails.
    """
    found = await touch("read", call, nap, ctx)
    if failing:
        raise Planned(call)
    return found


@tool(effect="idempotent")
async def put(call: str, nap: float, failing: bool, ctx: ToolContext) -> str:
    """Store something under its key.

    Args:
        call: What the ledger calls it.
        nap: How long it takes.
        failing: Whether it fails.
    """
    found = await touch("idempotent", call, nap, ctx)
    if failing:
        raise Planned(call)
    return found


@tool(effect="write", on_interrupt=settle)
async def send(call: str, nap: float, ctx: ToolContext) -> str:
    """Send something; whether it went out can be found out.

    Args:
        call: What the ledger calls it.
        nap: How long it takes.
    """
    return await touch("write", call, nap, ctx)


@tool(effect="write")
async def shout(call: str, nap: float, ctx: ToolContext) -> str:
    """Send something of which nobody can find out whether it went out.

    Args:
        call: What the ledger calls it.
        nap: How long it takes.
    """
    return await touch("write", call, nap, ctx)


direct: dict[str, Any] = {"look": look, "put": put, "send": send, "shout": shout}
"""As a workflow calls them: without the context, which the signature asks for and the engine passes."""


class ToolOp:
    """A call of a tool from the workflow's own code."""

    nests = False

    def __init__(self, effect: str, weight: float) -> None:
        """``effect`` is the tool's."""
        self.effect = effect
        self.weight = weight

    def make(self, maker: Maker, depth: int) -> Node:
        """Choose how long it takes, and whether it fails or (a write) can be asked about afterwards."""
        chance = maker.random.random
        failing, blind = chance() < 0.08, chance() < 0.4
        return {
            "key": maker.key(),
            "nap": round(chance() * 0.02, 4) if chance() < 0.7 else 0.0,
            "failing": failing and self.effect != "write",
            "blind": blind and self.effect == "write",
        }

    async def perform(self, node: Node, run_id: str) -> Any:
        """Call it. That nobody knows what became of a write is an outcome like the write's own."""
        call, nap, failing = node["key"], node["nap"], node["failing"]
        if self.effect == "read":
            return await direct["look"](call, nap, failing)
        if self.effect == "idempotent":
            return await direct["put"](call, nap, failing)
        if not node["blind"]:
            return await direct["send"](call, nap)
        try:
            return await direct["shout"](call, nap)
        except ToolInterrupted:
            current_ledger().write("unknown", effect="write", run=run_id, call=call)
            return f"write {call}"

    def expect(self, node: Node) -> Any:
        """The effect and the name."""
        if node["failing"]:
            raise Failure("Planned")
        return f"{self.effect} {node['key']}"


# --- agents ---------------------------------------------------------------------------------------------------------


class Task(BaseModel):
    """What an agent is asked for: everything that its model will do."""

    run: str
    key: str
    naps: list[float]
    """Of the model's answers."""
    calls: list[dict[str, Any]]
    """Of the first turn."""
    handoff: str
    """``no``, ``with`` the calls of the first turn, or ``after`` them."""
    last_call: dict[str, Any] | None
    """Of the agent that has taken over."""


class Summary(BaseModel):
    """The structured answer of the agent that has taken over."""

    key: str
    seen: list[str]


async def model(request: ModelRequest, agent: str) -> ModelResponse:
    """Answer from the conversation alone; the ledger has the turn, and what was asked in it."""
    task = Task.model_validate_json(next(message.text for message in request.messages if message.role == "user"))
    turn = sum(message.role == "assistant" for message in request.messages)
    call = f"{task.key}/{turn}"
    said = json.dumps([agent, *(MESSAGE.dump_python(message, mode="json") for message in request.messages)])
    digest = hashlib.sha256(said.encode()).hexdigest()
    with current_ledger().effect("model", task.run, call, digest):
        testpoints.killpoint("step.before_call")
        await anyio.sleep(task.naps[min(turn, len(task.naps) - 1)])
        testpoints.killpoint("step.after_call")
    seen = [message.text for message in request.messages if isinstance(message, ToolMessage)]
    text, calls = _second(task, seen) if agent == "second" else _first(task, seen, turn)
    message = AssistantMessage(content=text, tool_calls=tuple(calls))
    return ModelResponse(message=message, finish="tool_calls" if calls else "stop", model=call)


def _first(task: Task, seen: list[str], turn: int) -> tuple[str, list[ToolCall]]:
    transfer = ToolCall(id="c", name="transfer_to_second", arguments={"reason": "that is how it is"})
    if turn == 0:
        # The same id in every turn, as some providers do it.
        calls = [_call(f"c{index}", item) for index, item in enumerate(task.calls)]
        return "", [*calls, transfer] if task.handoff == "with" else calls
    if task.handoff == "after":
        return "", [transfer]
    return json.dumps(seen), []


def _second(task: Task, seen: list[str]) -> tuple[str, list[ToolCall]]:
    if task.last_call is not None and _told(task.last_call) not in seen:
        return "", [_call("c0", task.last_call)]
    return Summary(key=task.key, seen=seen).model_dump_json(), []


def _call(id: str, item: dict[str, Any]) -> ToolCall:
    arguments = {"call": item["call"], "nap": item["nap"]}
    if item["effect"] != "write":
        arguments["failing"] = item["failing"]
    names = {"read": "look", "idempotent": "put", "write": "send"}
    return ToolCall(id=id, name=names[item["effect"]], arguments=arguments)


def _told(item: dict[str, Any]) -> str:
    """What the model is told of a call."""
    return f"The tool failed: Planned: {item['call']}" if item["failing"] else f"{item['effect']} {item['call']}"


async def _first_model(request: ModelRequest) -> ModelResponse:
    return await model(request, "first")


async def _second_model(request: ModelRequest) -> ModelResponse:
    return await model(request, "second")


second = Agent(
    "second", model=_second_model, instructions="Sum up what is known.", tools=[look, put, send], output=Summary
)
first = Agent("first", model=_first_model, instructions="Find out.", tools=[look, put, send], handoffs=[second])


class AgentOp:
    """An agent that calls tools, several at a time, and answers or hands over to one that gives structured output."""

    weight = 3.0
    nests = False

    def make(self, maker: Maker, depth: int) -> Node:
        """Choose what its model does."""
        key = maker.key()
        handoff = maker.random.choice(("no", "with", "after"))
        last = self._tool(maker, f"{key}-last") if handoff != "no" and maker.random.random() < 0.5 else None
        return {
            "key": key,
            "naps": [round(maker.random.random() * 0.01, 4) for _ in range(4)],
            "calls": [self._tool(maker, f"{key}-{index}") for index in range(maker.random.randint(1, 3))],
            "handoff": handoff,
            "last_call": last,
        }

    def _tool(self, maker: Maker, call: str) -> dict[str, Any]:
        effect = maker.random.choice(EFFECTS)
        failing = maker.random.random() < 0.1 and effect != "write"
        return {"call": call, "effect": effect, "nap": round(maker.random.random() * 0.02, 4), "failing": failing}

    async def perform(self, node: Node, run_id: str) -> Any:
        """Run it; tell who answered what, and after how many messages."""
        task = Task(run=run_id, **{name: node[name] for name in Task.model_fields if name != "run"})
        result = await first.run(task.model_dump_json())
        answer: Any = result.output
        return [result.agent, answer.model_dump() if isinstance(answer, Summary) else answer, len(result.messages)]

    def expect(self, node: Node) -> Any:
        """The same, from the plan."""
        seen = [_told(item) for item in node["calls"]]
        count = 2 + len(seen)  # the task, the calls and their answers
        if node["handoff"] == "no":
            return ["first", json.dumps(seen), count + 1]
        seen.append("The conversation is with second now.")
        count += 1 if node["handoff"] == "with" else 2
        if node["last_call"] is not None:
            seen.append(_told(node["last_call"]))
            count += 2
        return ["second", {"key": node["key"], "seen": seen}, count + 1]


OPS.update(
    {
        "read": ToolOp("read", 1.5),
        "idempotent": ToolOp("idempotent", 1.5),
        "write": ToolOp("write", 3.0),
        "agent": AgentOp(),
    }
)
