"""Definitions: what ``@tool`` keeps, what it refuses, and what a running tool may reach."""

from __future__ import annotations

import dataclasses
import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any, cast

import pytest

from ridethrough.runtime.errors import ConfigError, NotFound, UsageError
from ridethrough.tools.context import ToolContext
from ridethrough.tools.tool import Tool, ToolCall, tool


@tool
def plain(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


@tool(effect="read", timeout=20, retries=3, concurrency=2, sequential=True, max_output=100)
async def search(query: str, ctx: ToolContext) -> list[str]:
    """Search the archive."""
    return [query, ctx.run_id]


def made(**options: Any) -> Tool[..., Any]:
    """Define a tool with options that the type checker would refuse."""
    decorate = cast("Callable[..., Callable[..., Tool[..., Any]]]", tool)(**options)

    def sample(a: int) -> int:
        return a

    return decorate(sample)


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        made(**options)
    return caught.value.message


async def find_out(call: ToolCall) -> str:
    return call.call_id


def needs_person(call: ToolCall) -> bool:
    return bool(call.arguments["a"] > 1)


def test_it_is_still_the_function() -> None:
    assert plain(1) == 3
    assert plain(1, b=1) == 2
    assert str(inspect.signature(plain)) == "(a: 'int', b: 'int' = 2) -> 'int'"
    assert (cast(Any, plain).__name__, plain.__doc__) == ("plain", "Add two numbers.")
    assert inspect.unwrap(plain) is plain.function


def test_an_async_function_stays_async() -> None:
    waiting = search("tides", ToolContext(run_id="r", call_id="c", idempotency_key="k", deps=None))
    assert inspect.iscoroutine(waiting)
    with pytest.raises(StopIteration) as ended:
        waiting.send(None)
    assert ended.value.value == ["tides", "r"]
    assert (search.is_async, plain.is_async) == (True, False)


def test_the_defaults_are_the_careful_ones() -> None:
    assert (plain.name, plain.description, plain.effect) == ("plain", "Add two numbers.", "write")
    assert (plain.timeout, plain.retries, plain.approval) == (60, 0, False)
    assert (plain.on_interrupt, plain.max_output) == ("tell", 20_000)
    assert (plain.concurrency, plain.sequential) == (None, False)
    assert repr(plain) == "Tool('plain', effect='write')"


def test_every_option_is_kept() -> None:
    assert (search.effect, search.timeout, search.retries) == ("read", 20, 3)
    assert (search.concurrency, search.sequential, search.max_output) == (2, True, 100)
    assert search.parameters.context == "ctx"
    made_up = made(name="other-name", description="Other.", approval=needs_person, on_interrupt=find_out)
    assert (made_up.name, made_up.description) == ("other-name", "Other.")
    assert (made_up.approval, made_up.on_interrupt) == (needs_person, find_out)


def test_name_and_description_by_position() -> None:
    def sample(a: int) -> int:
        return a

    assert (tool("n", "d")(sample).name, tool("n", "d")(sample).description) == ("n", "d")


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain.effect = "read"  # type: ignore[misc] # pyright: ignore
    assert dataclasses.replace(plain, name="plus").name == "plus"


def test_bound_methods_are_tools() -> None:
    class Shop:
        def buy(self, item: str) -> str:
            """Buy one."""
            return item

    bought = tool(effect="idempotent")(Shop().buy)
    assert (bought.name, bought("tea")) == ("buy", "tea")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"effect": "wirte"}, "'read', 'idempotent', 'write'"),
        ({"retries": 1}, "at most once"),
        ({"retries": -1, "effect": "read"}, "whole number from 0"),
        ({"retries": True, "effect": "read"}, "whole number from 0"),
        ({"timeout": None}, "every wait has a deadline"),
        ({"timeout": 0}, "greater than 0"),
        ({"timeout": math.inf}, "greater than 0"),
        ({"timeout": math.nan}, "greater than 0"),
        ({"timeout": "60"}, "number of seconds"),
        ({"timeout": True}, "number of seconds"),
        ({"max_output": 0}, "whole number of characters"),
        ({"concurrency": 0}, "whole number from 1"),
        ({"approval": "yes"}, "function of the ToolCall"),
        ({"on_interrupt": "retry"}, "'tell', 'ask'"),
        ({"on_interrupt": needs_person}, "async def"),
        ({"on_interrupt": find_out, "effect": "read"}, "for writes"),
        ({"on_interrupt": "ask", "effect": "idempotent"}, "for writes"),
        ({"sandbox": 3}, "a profile's name or a SandboxProfile"),
        ({"sandbox_scope": "call"}, "has no effect without"),
        ({"sandbox_scope": "turn", "sandbox": "python"}, "'run' or 'call'"),
        ({"confined": True}, "needs a parameter ctx"),
        ({"name": "no spaces"}, "1 to 64 letters"),
        ({"name": ""}, "1 to 64 letters"),
        ({"name": "x" * 65}, "1 to 64 letters"),
        ({"name": "line\n"}, "1 to 64 letters"),
    ],
)
def test_what_is_refused(options: dict[str, Any], part: str) -> None:
    message = refusal(**options)
    assert part in message
    assert message.startswith("tool ")


def test_things_that_are_no_functions() -> None:
    def numbers(n: int) -> Any:
        yield n

    with pytest.raises(ConfigError, match="yields"):
        tool(numbers)
    with pytest.raises(ConfigError, match="not a function"):
        tool(plain)
    with pytest.raises(ConfigError, match="not a function"):
        tool(dict)
    with pytest.raises(ConfigError, match="1 to 64 letters"):
        tool(lambda: None)


def test_the_digest_is_what_the_model_sees() -> None:
    assert plain.digest == dataclasses.replace(plain, timeout=5.0).digest
    assert plain.digest != dataclasses.replace(plain, description="Other.").digest
    assert plain.digest != search.digest


def test_the_digest_is_the_same_in_every_process() -> None:
    code = """if True:
        from ridethrough.tools.tool import tool
        @tool
        def plain(a: int, b: int = 2) -> int:
            "Add two numbers."
            return a + b
        print(plain.digest)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == plain.digest


def test_the_context() -> None:
    said: list[str] = []
    ctx = ToolContext(
        run_id="r",
        call_id="c",
        idempotency_key="k",
        deps={"a": 1},
        resources={"db": 1, "mail": 2},
        on_progress=said.append,
    )
    ctx.progress("half")
    assert (ctx.run_id, ctx.call_id, ctx.idempotency_key, ctx.deps["a"]) == ("r", "c", "k", 1)
    assert (ctx.resource("db"), said) == (1, ["half"])
    with pytest.raises(NotFound, match="db, mail"):
        ctx.resource("mailer")
    with pytest.raises(UsageError, match="not part of a run"):
        _ = ctx.sandbox
