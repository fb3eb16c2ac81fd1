"""The computer tool: an agent that looks and clicks, in a real desktop; the words of two vendors."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from tests.agents.support import Scripted, call

from ridethrough import Agent, Runtime, ToolContext
from ridethrough.runtime.config import parse_config
from ridethrough.runtime.errors import ToolFailed
from ridethrough.runtime.router.messages import ImagePart, TextPart, ToolMessage
from ridethrough.sandboxes import images
from ridethrough.sandboxes.desktop import DESKTOP, Desktop
from ridethrough.sandboxes.docker import DockerHost
from ridethrough.sandboxes.sandbox import Sandbox
from ridethrough.tools.call_sandbox import CallSandbox
from ridethrough.tools.computer import Asked, act, computer, computer_tool, from_openai
from ridethrough.tools.output import Image

# The image may have to be made first.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]

TOP = 86
"""Pixels of the browser above the page."""

PAGE = "data:text/html," + (
    "<title>start</title><body style='margin:0'>"
    "<button style='width:300px;height:200px' onclick='document.title=(self.count=(self.count||0)+1)'>press</button>"
    "<input style='display:block' oninput='document.title=value'><div style='height:3000px'></div>"
    "<script>onscroll=()=>document.title='at '+scrollY</script>"
)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def sandbox(anyio_backend: str) -> AsyncGenerator[Sandbox]:
    await images.build("desktop")
    async with DockerHost.open() as host:
        sandbox = await host.create(DESKTOP, id="test-computer")
        try:
            yield sandbox
        finally:
            await sandbox.aclose()


def picture(output: list[str | Image]) -> bytes:
    """The picture at the end of an answer."""
    assert isinstance(output[-1], Image)
    return output[-1].data


async def title(screen: Desktop) -> str:
    return next(window.title.removesuffix(" - Chromium") for window in await screen.windows() if window.active)


# --- an agent -------------------------------------------------------------------------------------------------------


async def test_an_agent_sees_what_it_does(sandbox: Sandbox, tmp_path: Path) -> None:
    model = Scripted(
        call("computer", action="open", text=PAGE),
        [
            call("computer", "c1", action="left_click", coordinate=[100, TOP + 100]),
            call("computer", "c2", action="wait", duration=0.1),
        ],
        call("computer", action="left_click", coordinate=[5000, 5]),
        "done",
    )
    agent = Agent("user", model=model, tools=[computer], sandbox="desktop")
    config = parse_config('durability = "process"\n')
    async with Runtime.open(f"sqlite:///{tmp_path / 'runs.db'}", config=config) as runtime:
        run = await runtime.start(agent, "Press the button.")
        assert (await run.result()).output == "done"
    told = [message for message in model.requests[-1].messages if isinstance(message, ToolMessage)]
    opened, clicked, _, refused = told
    for message in (opened, clicked):
        assert [type(part) for part in message.content] == [TextPart, ImagePart]
    assert clicked.text == "left_click at (100, 186)"
    assert seen(opened) != seen(clicked)
    assert refused.is_error
    assert "(5000, 5) is not on the screen" in refused.text


def seen(message: ToolMessage) -> bytes:
    """The picture of a tool's answer."""
    (image,) = (part for part in message.content if isinstance(part, ImagePart))
    data = base64.b64decode(image.data or "")
    assert image.media_type == "image/jpeg"
    assert data.startswith(b"\xff\xd8\xff")
    return data


async def test_run_again_after_a_crash_it_clicks_nothing_twice(sandbox: Sandbox) -> None:
    screen = await Desktop.start(sandbox)
    await screen.open(PAGE)

    async def life() -> list[str | Image]:
        async def find() -> Sandbox:
            return sandbox

        async def gone() -> None:
            pytest.fail("the sandbox is gone")

        inside = CallSandbox(DESKTOP, find, "one-call", lambda: True, gone)
        ctx: ToolContext[Any] = ToolContext(run_id="r", call_id="c", idempotency_key="k", deps=None, sandbox=inside)
        output: list[str | Image] = await computer.function(action="left_click", ctx=ctx, coordinate=[100, TOP + 100])
        return output

    first, second = await life(), await life()
    assert first == second
    await screen.settle()
    assert await title(screen) == "1"


# --- actions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"action": "triple_click", "coordinate": [100, TOP + 100]}, "3"),
        ({"action": "scroll", "coordinate": [600, 600], "scroll_direction": "down", "scroll_amount": 1}, "at 120"),
        ({"type": "scroll", "x": 600, "y": 600, "scroll_x": 0, "scroll_y": 100}, "at 120"),
        ({"type": "click", "x": 150, "y": TOP + 150, "button": "left"}, "1"),
        ({"type": "double_click", "x": 50, "y": TOP + 50}, "2"),
    ],
)
async def test_actions_of_two_vendors(sandbox: Sandbox, asked: dict[str, Any], said: str) -> None:
    screen = await Desktop.start(sandbox)
    await screen.open(PAGE)
    assert picture(await act(screen, asked))
    await screen.settle(quiet=0.3)
    assert await title(screen) == said


async def test_typing_and_keys(sandbox: Sandbox) -> None:
    screen = await Desktop.start(sandbox)
    await screen.open(PAGE)
    for asked in (
        {"type": "click", "x": 50, "y": TOP + 210},
        {"type": "type", "text": "wrong"},
        {"type": "keypress", "keys": ["CTRL", "A"]},
        {"action": "hold_key", "text": "BackSpace", "duration": 0.05},
        {"action": "type", "text": "right"},
    ):
        await act(screen, asked)
    await screen.settle(quiet=0.3)
    assert await title(screen) == "right"


async def test_the_pointer_and_a_closer_look(sandbox: Sandbox) -> None:
    screen = await Desktop.start(sandbox)
    await act(screen, {"type": "drag", "path": [{"x": 10, "y": 300}, {"x": 60, "y": 320}]})
    assert await act(screen, {"action": "cursor_position"}) == ["X=60,Y=320"]
    whole = picture(await act(screen, {"type": "screenshot"}))
    part = picture(await act(screen, {"action": "zoom", "region": [0, 0, 100, 100]}))
    assert len(part) < len(whole)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"action": "mouse_move"}, "mouse_move needs coordinate"),
        ({"action": "key"}, "key needs text"),
        ({"action": "scroll"}, "scroll needs scroll_direction"),
        ({"action": "zoom"}, "zoom needs region"),
        ({"action": "shout"}, "that is no action: action"),
        ({"action": "wait", "hours": 3}, "that is no action: hours"),
        ({"type": "click", "x": 1}, "misses 'y'"),
        ({"type": "click", "x": 1, "y": 2, "button": "fourth"}, "misses 'fourth'"),
        ({"type": "shout"}, "is no action"),
        ({}, "is no action"),
    ],
)
async def test_what_is_no_action(sandbox: Sandbox, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ToolFailed, match=told):
        await act(await Desktop.start(sandbox), asked)


# --- its definition -------------------------------------------------------------------------------------------------


def test_arrays_have_items_as_all_providers_want_them() -> None:
    assert "prefixItems" not in json.dumps(computer.parameters.json)
    assert "1280x800" in computer.description
    assert "800x600" in computer_tool(width=800, height=600, name="small").description


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"type": "move", "x": 1, "y": 2}, {"action": "mouse_move", "coordinate": (1, 2)}),
        (
            {"type": "click", "x": 1, "y": 2, "button": "wheel", "keys": ["SHIFT"]},
            {"action": "middle_click", "coordinate": (1, 2), "text": "SHIFT"},
        ),
        ({"type": "keypress", "keys": ["CTRL", "+"]}, {"action": "key", "text": "CTRL++"}),
        (
            {"type": "scroll", "x": 1, "y": 2, "scroll_x": -5, "scroll_y": 250},
            {"action": "scroll", "coordinate": (1, 2), "scroll": (-1, 3)},
        ),
        ({"type": "wait"}, {"action": "wait", "duration": 2.0}),
    ],
)
def test_openai_s_words(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    assert from_openai(theirs) == ours
    Asked.model_validate(ours)
