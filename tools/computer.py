"""A computer for a model: a tool in the shape that today's models were taught to use one in.

The arguments are those of Anthropic's ``computer`` tool (``left_click``, ``type``, ``key``, ``scroll``, ...); what
OpenAI's models ask for (``{"type": "click", "x": ..., "y": ...}``) is turned into them by ``from_openai``. Both are
served by a plain function tool, so that any model that sees pictures can use it, on any wire.

The desktop belongs to the run's sandbox: it is started at the first call, and found again by every later one, also in
another worker. Each thing that a call does there has an id, so a call that is run again after a crash takes the results
of its first life and clicks nothing twice.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ridethrough.runtime.errors import SandboxError, SandboxGone, ToolFailed
from ridethrough.sandboxes.desktop import Button, Desktop, Point
from ridethrough.tools.context import ToolContext
from ridethrough.tools.output import Image
from ridethrough.tools.tool import Tool, tool

Action = Literal[
    "screenshot",
    "left_click",
    "right_click",
    "middle_click",
    "double_click",
    "triple_click",
    "left_click_drag",
    "left_mouse_down",
    "left_mouse_up",
    "mouse_move",
    "cursor_position",
    "scroll",
    "type",
    "key",
    "hold_key",
    "wait",
    "zoom",
    "open",
]
Direction = Literal["up", "down", "left", "right"]
Place = Annotated[list[int], Field(min_length=2, max_length=2)]
"""Not a tuple: its schema has no ``items``, without which some providers refuse an array."""

TIMEOUT: Final = 180.0
LONGEST_WAIT: Final = 60.0
NOTCH: Final = 100
"""Pixels of OpenAI's scrolling to a notch of the wheel."""

_DIRECTIONS: Final[Mapping[Direction, Point]] = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}


class Asked(BaseModel):
    """One action with what belongs to it, as Anthropic's models name it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Action
    coordinate: Point | None = None
    text: str | None = None
    start_coordinate: Point | None = None
    scroll_direction: Direction | None = None
    scroll_amount: int = 3
    duration: float = 1.0
    region: tuple[int, int, int, int] | None = None
    path: tuple[Point, ...] = ()
    scroll: Point | None = None
    """Notches to the right and down, where both are asked for at once."""

    def at(self) -> Point:
        """The place that it needs."""
        if self.coordinate is None:
            raise ToolFailed(f"{self.action} needs coordinate: [x, y]")
        return self.coordinate

    def said(self) -> str:
        """The text that it needs."""
        if not self.text:
            raise ToolFailed(f"{self.action} needs text")
        return self.text


def computer_tool(*, width: int = 1280, height: int = 800, name: str = "computer", quality: int = 75) -> Tool[..., Any]:
    """A tool with which a model uses the desktop of its agent's sandbox: ``Agent(..., sandbox="desktop")``.

    Args:
        width: Pixels of the screen. Models place their clicks best on 1280x800 and less.
        height: Pixels.
        name: What the model calls it.
        quality: Of the JPEG that it sees.
    """

    async def computer(
        action: Action,
        ctx: ToolContext,
        coordinate: Place | None = None,
        text: str | None = None,
        start_coordinate: Place | None = None,
        scroll_direction: Direction | None = None,
        scroll_amount: Annotated[int, Field(ge=0, le=100)] = 3,
        duration: Annotated[float, Field(ge=0, le=LONGEST_WAIT)] = 1.0,
        region: Annotated[list[int], Field(min_length=4, max_length=4)] | None = None,
    ) -> list[str | Image]:
        asked = _understood(
            {
                "action": action,
                "coordinate": coordinate,
                "text": text,
                "start_coordinate": start_coordinate,
                "scroll_direction": scroll_direction,
                "scroll_amount": scroll_amount,
                "duration": duration,
                "region": region,
            }
        )
        screen = await _screen(ctx, width, height)
        return await _answered(screen, asked, quality)

    computer.__doc__ = _DESCRIPTION.format(width=width, height=height)
    return tool(name, confined=True, sequential=True, timeout=TIMEOUT)(computer)


_DESCRIPTION: Final = """Use a computer: a screen of {width}x{height} pixels with a web browser, a mouse and a keyboard.

Each action answers with a picture of the screen as it is afterwards; begin with open, or a screenshot. Click in the
middle of things. After typing into a form look whether the text is where it belongs.

Args:
    action: What to do. open shows the page whose address is text, in the browser. type types text; key presses the
        keys that text names, as in "ctrl+l", "Return", "Page_Down"; hold_key holds them for duration. zoom shows region
        in full size. wait waits for duration. cursor_position tells where the pointer is.
    coordinate: x and y of the place, from the upper left corner: for clicks, mouse_move, scroll and the end of
        left_click_drag. A click without it is where the pointer is.
    text: What to type, which keys, which address; with a click or a scroll: keys to hold meanwhile, as in "ctrl".
    start_coordinate: x and y where left_click_drag begins.
    scroll_direction: Where to scroll to.
    scroll_amount: By how many notches of the wheel.
    duration: Seconds, for wait and hold_key.
    region: Left, top, right and bottom of what zoom shows.
"""

computer: Final = computer_tool()
"""The tool with a screen of 1280x800."""


async def act(screen: Desktop, asked: Mapping[str, Any] | Asked, *, quality: int = 75) -> list[str | Image]:
    """Do one action on a desktop, in Anthropic's words or OpenAI's; what happened, and the screen afterwards.

    Raises:
        ToolFailed: The action is none, or something that it needs is missing.
        SandboxError: It cannot be done.
    """
    return await _answered(screen, asked if isinstance(asked, Asked) else _understood(asked), quality)


async def _screen(ctx: ToolContext, width: int, height: int) -> Desktop:
    try:
        return await Desktop.start(ctx.sandbox, width=width, height=height)
    except SandboxGone:
        raise
    except SandboxError as error:
        raise ToolFailed(
            f'{error.message}. The agent needs a sandbox with a display: Agent(sandbox="desktop")'
        ) from error


async def _answered(screen: Desktop, asked: Asked, quality: int) -> list[str | Image]:
    if asked.action == "cursor_position":
        x, y = await screen.pointer()
        return [f"X={x},Y={y}"]
    if asked.action == "zoom":
        if asked.region is None:
            raise ToolFailed("zoom needs region: [left, top, right, bottom]")
        return [f"zoom {asked.region}", Image(data=await screen.screenshot(region=asked.region, quality=90))]
    said = await _ACTS[asked.action](screen, asked)
    await screen.settle()
    return [said, Image(data=await screen.screenshot(quality=quality))]


# --- actions --------------------------------------------------------------------------------------------------------


def _click(button: Button = "left", count: int = 1) -> Callable[[Desktop, Asked], Awaitable[str]]:
    async def click(screen: Desktop, asked: Asked) -> str:
        x, y = asked.coordinate or (None, None)
        await screen.click(x, y, button=button, count=count, holding=asked.text or "")
        return f"{asked.action} at {asked.coordinate or 'the pointer'}"

    return click


async def _screenshot(screen: Desktop, asked: Asked) -> str:
    return "screenshot"


async def _move(screen: Desktop, asked: Asked) -> str:
    await screen.move(*asked.at())
    return f"mouse_move to {asked.at()}"


async def _drag(screen: Desktop, asked: Asked) -> str:
    path = asked.path or ((asked.start_coordinate or await screen.pointer()), asked.at())
    await screen.drag(*path, holding=asked.text or "")
    return f"left_click_drag from {path[0]} to {path[-1]}"


async def _down(screen: Desktop, asked: Asked) -> str:
    if asked.coordinate is not None:
        await screen.move(*asked.coordinate)
    await screen.press()
    return "left_mouse_down"


async def _up(screen: Desktop, asked: Asked) -> str:
    if asked.coordinate is not None:
        await screen.move(*asked.coordinate)
    await screen.release()
    return "left_mouse_up"


async def _scroll(screen: Desktop, asked: Asked) -> str:
    x, y = asked.coordinate or (None, None)
    dx, dy = asked.scroll or _notches(asked)
    await screen.scroll(dx, dy, x=x, y=y, holding=asked.text or "")
    return f"scroll by {dx} to the right and {dy} down"


def _notches(asked: Asked) -> Point:
    if asked.scroll_direction is None:
        raise ToolFailed("scroll needs scroll_direction: up, down, left or right")
    x, y = _DIRECTIONS[asked.scroll_direction]
    return x * asked.scroll_amount, y * asked.scroll_amount


async def _type(screen: Desktop, asked: Asked) -> str:
    await screen.type(asked.said())
    return f"type {len(asked.said())} characters"


async def _key(screen: Desktop, asked: Asked) -> str:
    await screen.key(asked.said())
    return f"key {asked.said()}"


async def _hold(screen: Desktop, asked: Asked) -> str:
    await screen.key(asked.said(), hold=min(asked.duration, 30.0))
    return f"hold_key {asked.said()} for {asked.duration:g} s"


async def _wait(screen: Desktop, asked: Asked) -> str:
    """In the sandbox, so that a call that is run again after a crash does not wait again."""
    await screen.settle(quiet=2 * LONGEST_WAIT, most=min(asked.duration, LONGEST_WAIT))
    return f"wait {asked.duration:g} s"


async def _open(screen: Desktop, asked: Asked) -> str:
    await screen.open(asked.said())
    return f"open {asked.said()[:200]}"


_ACTS: Final[Mapping[str, Callable[[Desktop, Asked], Awaitable[str]]]] = {
    "screenshot": _screenshot,
    "left_click": _click(),
    "right_click": _click("right"),
    "middle_click": _click("middle"),
    "double_click": _click(count=2),
    "triple_click": _click(count=3),
    "left_click_drag": _drag,
    "left_mouse_down": _down,
    "left_mouse_up": _up,
    "mouse_move": _move,
    "scroll": _scroll,
    "type": _type,
    "key": _key,
    "hold_key": _hold,
    "wait": _wait,
    "open": _open,
}


# --- the words of others --------------------------------------------------------------------------------------------

_CLICKS: Final[Mapping[str, Action]] = {"left": "left_click", "right": "right_click", "wheel": "middle_click"}


def from_openai(action: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``computer`` for an action of OpenAI's computer use (``{"type": "click", "x": 1, "y": 2}``).

    Raises:
        ToolFailed: There is no such action, or something is missing in it.
    """
    try:
        return _OPENAI[str(action.get("type"))](action)
    except KeyError as error:
        raise ToolFailed(f"{dict(action)!r} is no action, or misses {error}; known: {', '.join(_OPENAI)}") from None


def _at(action: Mapping[str, Any]) -> Point:
    return int(action["x"]), int(action["y"])


def _held(action: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": "+".join(action["keys"])} if action.get("keys") else {}


def _openai_scroll(action: Mapping[str, Any]) -> dict[str, Any]:
    notches = (_per_notch(action.get("scroll_x", 0)), _per_notch(action.get("scroll_y", 0)))
    return {"action": "scroll", "coordinate": _at(action), "scroll": notches, **_held(action)}


def _per_notch(pixels: int) -> int:
    """At least one notch for any scrolling at all."""
    size = -(-abs(pixels) // NOTCH)
    return size if pixels > 0 else -size


_OPENAI: Final[Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "screenshot": lambda action: {"action": "screenshot"},
    "click": lambda action: {
        "action": _CLICKS[action.get("button", "left")],
        "coordinate": _at(action),
        **_held(action),
    },
    "double_click": lambda action: {"action": "double_click", "coordinate": _at(action), **_held(action)},
    "move": lambda action: {"action": "mouse_move", "coordinate": _at(action)},
    "drag": lambda action: {"action": "left_click_drag", "path": tuple(map(_at, action["path"])), **_held(action)},
    "scroll": _openai_scroll,
    "type": lambda action: {"action": "type", "text": action["text"]},
    "keypress": lambda action: {"action": "key", "text": "+".join(action["keys"])},
    "wait": lambda action: {"action": "wait", "duration": 2.0},
}


def _understood(asked: Mapping[str, Any]) -> Asked:
    try:
        return Asked.model_validate(asked if "action" in asked else from_openai(asked))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ToolFailed(f"that is no action: {wrong}") from None
