"""A display in a sandbox: what it shows as a picture, pointer and keys, pages in a browser, people who look on.

    async with docker_sandbox(DESKTOP) as sandbox, desktop(sandbox) as screen:
        await screen.open("https://example.com")
        await screen.click(640, 400)
        await screen.type("tides")
        picture = await screen.screenshot()         # JPEG

Everything goes through the port (``exec``, ``start``, ``read``), so it works wherever a sandbox does, with no port
open and no network. One program in the sandbox (``screen.py``) keeps the display; each request is a short call of its
own that hands it one line. Such a call costs the start of a bare interpreter, about 10 ms, and has what calls have: a
deadline, an id under which a resumed worker finds its result instead of clicking twice. A stream that is kept open
would be quicker by that much, and would have none of it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urlsplit

import anyio
from anyio.abc import ByteStream

from ridethrough.runtime.errors import SandboxError, SandboxTimeout
from ridethrough.sandboxes.profile import BUILT_IN

if TYPE_CHECKING:
    from ridethrough.sandboxes.sandbox import ExecResult, Output, Process, Sandbox

Button = Literal["left", "middle", "right", "back", "forward"]
Point = tuple[int, int]

DESKTOP: Final = BUILT_IN["desktop"]
"""The profile with a display and room for a browser."""

CALL_ID: Final = "ridethrough-desktop"
"""The call that is the display, by its id in a sandbox; whoever starts it a second time gets the first."""

LIFETIME: Final = 24 * 3600.0
START_SECONDS: Final = 60.0
ASK_SECONDS: Final = 30.0
LARGEST_PICTURE: Final = 16 * 2**20
LARGEST_HEADER: Final = 256 * 2**10
LONGEST_TEXT: Final = 20_000
RECORDING: Final = 64 * 2**20
"""Bytes of a recording; about an hour of a quiet screen."""

_SOCKET: Final = "/tmp/.ridethrough-desktop/screen.sock"
_UNREACHABLE: Final = 69
"""The status of a client that finds nobody: EX_UNAVAILABLE of sysexits.h."""

# Bare: without site and without the modules around sockets it starts in a few milliseconds.
_CLIENT: Final = f"""\
import _socket, os
s = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
try:
    s.connect({_SOCKET!r})
except OSError:
    os._exit({_UNREACHABLE})
while data := os.read(0, 65536):
    s.sendall(data)
while data := s.recv(262144):
    while data:
        data = data[os.write(1, data):]
"""
# Joins its input and output to a socket, until either side ends.
_BRIDGE: Final = """\
import os, select, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
sides = {0: s.sendall, s.fileno(): lambda data: [data := data[os.write(1, data):] for _ in iter(lambda: len(data), 0)]}
while True:
    for ready in select.select(list(sides), [], [])[0]:
        data = os.read(ready, 65536)
        if not data:
            os._exit(0)
        sides[ready](data)
"""


@dataclass(frozen=True, slots=True)
class Window:
    """A window. ``box`` is its place: left, top, width, height."""

    id: int
    title: str
    program: str
    box: tuple[int, int, int, int]
    active: bool


@asynccontextmanager
async def desktop(sandbox: Sandbox, width: int = 1280, height: int = 800) -> AsyncGenerator[Desktop]:
    """A display in ``sandbox`` for the length of the block; see ``Desktop.start``."""
    screen = await Desktop.start(sandbox, width=width, height=height)
    try:
        yield screen
    finally:
        with anyio.move_on_after(ASK_SECONDS, shield=True), suppress(SandboxError):
            await screen.aclose()


@dataclass(frozen=True)
class Desktop:
    """A display that runs. Get one with ``desktop(sandbox)``, or ``Desktop.start`` for one that stays.

    Every method raises ``SandboxError`` when it cannot be done (the X server or the browser has died, a place is not
    on the screen, there is no such key), ``SandboxTimeout`` when it is not done in time, and ``SandboxGone``.

    Attributes:
        sandbox: Where it is.
        width: Pixels.
        height: Pixels.
    """

    sandbox: Sandbox
    width: int
    height: int
    _process: Process = field(repr=False)

    @classmethod
    async def start(
        cls, sandbox: Sandbox, *, width: int = 1280, height: int = 800, lifetime: float = LIFETIME
    ) -> Desktop:
        """Start a display, or take up the one that the sandbox has (whoever started it, and of whatever size).

        Args:
            sandbox: Its image must have what a display needs: ``ridethrough/desktop``, or one made from it.
            width: Pixels.
            height: Pixels.
            lifetime: Seconds after which it is ended.

        Raises:
            SandboxError: it does not start, with what it said.
            SandboxTimeout: it is not ready in time.
        """
        if not (200 <= width <= 4096 and 200 <= height <= 4096):
            raise SandboxError(f"a screen of {width}x{height} cannot be: 200 to 4096 pixels each way")
        words = ""
        argv = ("python3", "-c", screen_source(), str(width), str(height))
        for _ in range(2):
            process = await sandbox.start(argv, timeout=lifetime, call_id=CALL_ID)
            if await _is_ready(sandbox, process) and (found := await cls._reach(sandbox, process)) is not None:
                return found
            words = await _why(process)
            await _forget(sandbox)  # it has ended, perhaps long ago, and is in the way of the next of its name
        raise SandboxError(
            f"no desktop starts in sandbox {sandbox.id}: {words}. It needs the image ridethrough/desktop "
            f"(`ridethrough sandbox build desktop`), or one made from it"
        )

    @classmethod
    async def _reach(cls, sandbox: Sandbox, process: Process) -> Desktop | None:
        """The display that said once that it is ready, if it still answers."""
        try:
            header, _ = await cls(sandbox, 0, 0, process)._ask("size")
        except _Ended:
            return None
        return cls(sandbox, _number(header, "width"), _number(header, "height"), process)

    async def aclose(self) -> None:
        """End it, with all that it shows. ``start`` starts another."""
        await _forget(self.sandbox)

    # --- seeing -----------------------------------------------------------------------------------------------------

    async def screenshot(self, *, quality: int = 75, region: tuple[int, int, int, int] | None = None) -> bytes:
        """What the screen shows, pointer included, as JPEG.

        Args:
            quality: 1 to 95; text is still sharp at 75.
            region: Left, top, right and bottom of the part that is wanted.
        """
        if not 1 <= quality <= 95:
            raise SandboxError(f"quality goes from 1 to 95; got {quality}")
        if region is not None:
            self._check_region(region)
        _, picture = await self._ask("screenshot", quality=quality, region=region)
        if not picture.startswith(b"\xff\xd8\xff") or not picture.endswith(b"\xff\xd9"):
            raise SandboxError(f"sandbox {self.sandbox.id} gave a picture that is no JPEG; something in it is broken")
        return picture

    async def settle(self, *, quiet: float = 0.15, most: float = 3.0) -> bool:
        """Wait until the screen has not changed for ``quiet`` seconds; whether it did so within ``most``."""
        header, _ = await self._ask("settle", most + ASK_SECONDS, quiet=quiet, most=most)
        return header.get("quiet") is True

    async def windows(self) -> Sequence[Window]:
        """The windows, the oldest first."""
        header, _ = await self._ask("windows")
        try:
            return tuple(_window(each) for each in header["windows"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._nonsense() from error

    async def activate(self, window: Window) -> None:
        """Bring a window to the front."""
        await self._ask("activate", id=window.id)

    async def pointer(self) -> Point:
        """Where the pointer is."""
        header, _ = await self._ask("pointer")
        match header.get("at"):
            case [int() as x, int() as y]:
                return x, y
            case _:
                raise self._nonsense()

    # --- acting -----------------------------------------------------------------------------------------------------

    async def open(self, url: str, *, timeout: float = 60.0) -> None:
        """Show a page in the browser, in place of the one that was shown so before, and wait until it is drawn.

        Args:
            url: ``https:``, ``http:``, ``file:`` (in the sandbox), ``data:`` or ``about:``.
            timeout: Seconds that the page, and before it the browser, may take.
        """
        if urlsplit(url).scheme not in ("https", "http", "file", "data", "about"):
            raise SandboxError(f"{url[:200]!r} is no address to open; write it in full, as https://example.com")
        await self._ask("open", timeout + ASK_SECONDS, url=url, seconds=timeout)
        await self.settle(quiet=0.1)

    async def move(self, x: int, y: int) -> None:
        """Move the pointer."""
        await self._ask("move", at=self._at((x, y)))

    async def click(
        self,
        x: int | None = None,
        y: int | None = None,
        *,
        button: Button = "left",
        double: bool = False,
        count: int = 1,
        holding: str = "",
    ) -> None:
        """Click, there or where the pointer is; ``count`` times, with keys held down (``"ctrl"``, ``"ctrl+shift"``)."""
        at = None if x is None or y is None else self._at((x, y))
        times = 2 if double else count
        if not 1 <= times <= 10:
            raise SandboxError(f"count goes from 1 to 10; got {count}")
        await self._ask("click", at=at, button=button, count=times, holding=holding)

    async def press(self, button: Button = "left") -> None:
        """Press a button of the pointer and keep it down."""
        await self._ask("button", button=button, down=True)

    async def release(self, button: Button = "left") -> None:
        """Let a button go."""
        await self._ask("button", button=button, down=False)

    async def drag(self, *path: Point, button: Button = "left", holding: str = "") -> None:
        """Press at the first point, move over the others, let go at the last."""
        if not 2 <= len(path) <= 100:
            raise SandboxError(f"a drag goes over 2 to 100 points; got {len(path)}")
        await self._ask("drag", path=[self._at(each) for each in path], button=button, holding=holding)

    async def scroll(
        self, dx: int = 0, dy: int = 0, *, x: int | None = None, y: int | None = None, holding: str = ""
    ) -> None:
        """Turn the wheel by so many notches, to the right and down; there, or where the pointer is."""
        if max(abs(dx), abs(dy)) > 100:
            raise SandboxError(f"at most 100 notches at once; got {dx}, {dy}")
        at = None if x is None or y is None else self._at((x, y))
        await self._ask("scroll", at=at, dx=dx, dy=dy, holding=holding)

    async def type(self, text: str) -> None:
        """Type text of any writing; a line end is Return, a tab is Tab."""
        if len(text) > LONGEST_TEXT:
            raise SandboxError(
                f"{len(text)} letters are too many to type, at most {LONGEST_TEXT}; write a file instead"
            )
        # 15 ms a letter is far more than it takes, unless each is of another writing.
        await self._ask("type", ASK_SECONDS + 0.05 * len(text), text=text)

    async def key(self, combination: str, *, hold: float = 0.0) -> None:
        """Press keys together (``"ctrl+shift+t"``), one such after the other where there are several words.

        ``hold`` is how many seconds they stay down, at most 30.
        """
        if not 0 <= hold <= 30:
            raise SandboxError(f"keys are held for 0 to 30 s; got {hold}")
        if not combination.strip():
            raise SandboxError("no key was named; write as in ctrl+l, Return, F5")
        await self._ask("key", ASK_SECONDS + hold * len(combination.split()), combination=combination, hold=hold)

    # --- looking on -------------------------------------------------------------------------------------------------

    async def vnc_stream(self, *, lifetime: float = 3600.0) -> ByteStream:
        """A connection of the VNC protocol (RFB 3.8) for somebody who looks on; they can change nothing.

        No port is opened for it: it goes through a process of the sandbox. The caller closes it.
        """
        header, _ = await self._ask("vnc")
        path = header.get("path")
        if not isinstance(path, str):
            raise self._nonsense()
        process = await self.sandbox.start(
            ["python3", "-I", "-c", _BRIDGE, path], timeout=lifetime, stdin=True, flow=True
        )
        return ProcessStream(process)

    async def start_recording(self, *, rate: float = 5.0, most: int = RECORDING) -> None:
        """Begin to film the screen: ``rate`` frames a second, at most ``most`` bytes (in the sandbox's memory)."""
        if not 0.1 <= rate <= 30:
            raise SandboxError(f"a film has 0.1 to 30 frames a second; got {rate}")
        await self._ask("record", rate=rate, most=most)

    async def stop_recording(self) -> bytes:
        """End the film and take it out of the sandbox (MP4, H.264)."""
        header, _ = await self._ask("cut")
        path, size = header.get("path"), _number(header, "size")
        if not isinstance(path, str) or size > 2 * RECORDING:
            raise self._nonsense()
        film = await self.sandbox.read(path, limit=size)
        await self.sandbox.remove(path)
        return film

    # --- asking -----------------------------------------------------------------------------------------------------

    async def _ask(self, do: str, timeout: float = ASK_SECONDS, **what: Any) -> tuple[dict[str, Any], bytes]:
        """Hand the program in the sandbox one line, and take its answer apart. It is not trusted."""
        line = json.dumps({"do": do, **what}) + "\n"
        result = await self.sandbox.exec(
            ["python3", "-I", "-S", "-c", _CLIENT], stdin=line, timeout=timeout, keep_output=LARGEST_PICTURE
        )
        if result.exit_code == _UNREACHABLE:
            raise await self._ended()
        head, end, body = result.stdout_bytes.partition(b"\n")
        header = _json(head) if end and not result.truncated and result.exit_code == 0 else None
        if header is None:
            raise self._nonsense(result)
        if header.get("ended") is True:
            raise await self._ended()
        if "error" in header:
            raise SandboxError(f"the desktop of sandbox {self.sandbox.id}: {str(header['error'])[:1000]}")
        return header, body

    async def _ended(self) -> SandboxError:
        """What to say of a display that is not there any more."""
        words = await _why(self._process)
        return _Ended(
            f"the desktop of sandbox {self.sandbox.id} has ended: {words}; Desktop.start(sandbox) starts another"
        )

    def _nonsense(self, result: ExecResult | None = None) -> SandboxError:
        said = f" ({_last_words(result)})" if result is not None else ""
        return SandboxError(
            f"the desktop of sandbox {self.sandbox.id} gave an answer that is none{said}; something in it is broken. "
            f"Make a new sandbox"
        )

    def _at(self, point: Point) -> Point:
        x, y = point
        if not (0 <= x < self.width and 0 <= y < self.height):
            raise SandboxError(f"({x}, {y}) is not on the screen, which has {self.width}x{self.height} pixels")
        return point

    def _check_region(self, region: tuple[int, int, int, int]) -> None:
        left, top, right, bottom = region
        if not (0 <= left < right <= self.width and 0 <= top < bottom <= self.height):
            raise SandboxError(f"{region} is no part of the screen, which has {self.width}x{self.height} pixels")


class _Ended(SandboxError):
    """The display is not there any more."""


class ProcessStream(ByteStream):
    """The input and output of a process in a sandbox as one stream."""

    def __init__(self, process: Process) -> None:
        """``process`` was started with an open input; it ends with the stream."""
        self._process = process
        self._output = aiter(process.output())
        self._offset = 0
        self._rest = b""

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """What it writes.

        Raises:
            anyio.EndOfStream: it has ended.
            SandboxError: the reader was so slow that something was left out, and the stream is torn.
        """
        while not self._rest:
            output = await self._next()
            if output.stream != "stdout":
                continue
            if output.offset != self._offset:
                raise SandboxError("a stream out of a sandbox is torn: its reader was too slow; open another")
            self._offset += len(output.data)
            self._rest = output.data
        data, self._rest = self._rest[:max_bytes], self._rest[max_bytes:]
        return data

    async def _next(self) -> Output:
        try:
            return await anext(self._output)
        except StopAsyncIteration:
            raise anyio.EndOfStream from None

    async def send(self, item: bytes) -> None:
        """Write to its input.

        Raises:
            anyio.BrokenResourceError: it takes none any more.
        """
        try:
            await self._process.write(item)
        except SandboxError as error:
            raise anyio.BrokenResourceError from error

    async def send_eof(self) -> None:
        """End its input."""
        await self._process.close_stdin()

    async def aclose(self) -> None:
        """End the process."""
        with anyio.move_on_after(ASK_SECONDS, shield=True), suppress(SandboxError):
            await self._process.kill()
        if isinstance(self._output, AsyncGenerator):
            await self._output.aclose()


# --- starting -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def screen_source() -> str:
    """The program that keeps the display: ``python3 -c SOURCE WIDTH HEIGHT``."""
    return Path(__file__).with_name("screen.py").read_text(encoding="utf-8")


async def _is_ready(sandbox: Sandbox, process: Process) -> bool:
    """Wait for the word of the display's program; false if it has ended without it."""
    try:
        with anyio.fail_after(START_SECONDS):
            return await _says(process, b"ready\n")
    except TimeoutError as error:
        await _forget(sandbox)
        raise SandboxTimeout(f"the desktop of sandbox {sandbox.id} is not ready after {START_SECONDS:.0f} s") from error


async def _says(process: Process, word: bytes) -> bool:
    said, output = b"", process.output()
    try:
        async for each in output:
            said += each.data if each.stream == "stdout" else b""
            if said.startswith(word) or len(said) > len(word):
                return said.startswith(word)
    finally:
        if isinstance(output, AsyncGenerator):
            await output.aclose()
    return False


async def _forget(sandbox: Sandbox) -> None:
    await sandbox.kill(CALL_ID)
    await sandbox.forget([CALL_ID])


async def _why(process: Process) -> str:
    """What a display said at its end."""
    with anyio.move_on_after(2.0), suppress(SandboxTimeout):
        return _last_words(await process.wait())
    return "it does not say why"


def _last_words(result: ExecResult) -> str:
    return result.stderr.strip()[-500:] or f"exit code {result.exit_code}"


# --- answers that are not trusted -----------------------------------------------------------------------------------


def _json(text: bytes) -> dict[str, Any] | None:
    if len(text) > LARGEST_HEADER:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _number(header: dict[str, Any], name: str) -> int:
    found = header.get(name)
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < 2**40:
        raise SandboxError(f"the desktop gave no {name}; something in the sandbox is broken. Make a new one")
    return found


def _window(found: dict[str, Any]) -> Window:
    left, top, width, height = (int(each) for each in found["box"])
    return Window(
        int(found["id"]),
        str(found["title"])[:500],
        str(found["program"])[:100],
        (left, top, width, height),
        bool(found["active"]),
    )
