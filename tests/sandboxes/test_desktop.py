"""Desktops in real containers: seeing, acting, looking on, and what happens when a part of it dies."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, cast

import anyio
import pytest

from ridethrough.runtime.errors import SandboxError
from ridethrough.sandboxes import images
from ridethrough.sandboxes.desktop import DESKTOP, Desktop, desktop
from ridethrough.sandboxes.docker import DockerHost
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import Output, Sandbox

# The image may have to be made first.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]

PATIENCE = 20.0
PAGE = """<!doctype html><meta charset=utf-8><title>start</title>
<body style="margin:0; background:#fff">
<div id=red style="position:absolute; left:0; top:0; width:100%; height:60px; background:#f00"></div>
<button style="position:absolute; left:20px; top:80px; width:200px; height:60px"
  onclick="say('clicked ' + event.detail)" oncontextmenu="say('right'); return false">press</button>
<input style="position:absolute; left:20px; top:180px; width:600px; height:30px; font-size:20px"
  oninput="say(value)" onkeydown="if (event.key == 'F2') say('F2 ' + event.shiftKey)">
<div style="position:absolute; left:20px; top:260px; width:400px; height:200px; background:#ddd; user-select:none"
  onmousedown="from = event.offsetX" onmouseup="say('dragged ' + Math.round((event.offsetX - from) / 10) * 10)"></div>
<div style="height:4000px"></div>
<script>say = text => document.title = text; onscroll = () => say('scrolled ' + scrollY)</script>
"""
TOP = 86
"""Pixels of the browser above the page."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def sandbox(anyio_backend: str, engine: Any) -> AsyncGenerator[Sandbox]:
    """One for the module: what a test leaves on the screen, the next one covers with a page of its own."""
    await images.build("desktop")
    async with DockerHost.open() as host:
        sandbox = await host.create(DESKTOP, id="test-desktop", labels={"ridethrough.test": "desktop"})
        try:
            await sandbox.write("page.html", PAGE)
            yield sandbox
        finally:
            await sandbox.aclose()


@pytest.fixture
async def screen(sandbox: Sandbox) -> Desktop:
    """A desktop that shows the page, and nothing typed or clicked in it."""
    screen = await Desktop.start(sandbox)
    await screen.open("file:///workspace/page.html")
    return screen


async def title(screen: Desktop, wanted: str) -> None:
    """Wait until the page says something: programs take a moment to take up what was done."""
    found = ""
    with anyio.move_on_after(PATIENCE):
        while found != wanted:
            windows = [window for window in await screen.windows() if window.active]
            found = windows[0].title.removesuffix(" - Chromium") if windows else ""
    assert found == wanted


async def pixel(sandbox: Sandbox, picture: bytes, x: int, y: int) -> tuple[int, ...]:
    """The colour of a point, looked up by the sandbox's own Pillow."""
    program = f"import sys, io; from PIL import Image; print(*Image.open(sys.stdin.buffer).getpixel(({x}, {y})))"
    result = await sandbox.exec(["python3", "-c", program], stdin=picture)
    return tuple(int(each) for each in result.stdout.split())


# --- seeing ---------------------------------------------------------------------------------------------------------


async def test_a_page_is_seen(screen: Desktop, sandbox: Sandbox) -> None:
    picture = await screen.screenshot()
    assert picture.startswith(b"\xff\xd8\xff")
    red, green, blue = await pixel(sandbox, picture, 640, TOP + 30)
    assert red > 240
    assert max(green, blue) < 15
    part = await screen.screenshot(region=(0, TOP, 200, TOP + 50), quality=90)
    assert len(part) < len(picture)
    assert (await pixel(sandbox, part, 100, 25))[0] > 240


async def test_windows_have_titles_and_places(screen: Desktop) -> None:
    window = next(window for window in await screen.windows() if window.active)
    assert window.program.lower().startswith("chromium")
    assert window.box == (0, 0, 1280, 800)


# --- acting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda screen: screen.click(120, TOP + 110), "clicked 1"),
        (lambda screen: screen.click(60, TOP + 110, double=True), "clicked 2"),
        (lambda screen: screen.click(120, TOP + 110, button="right"), "right"),
        (lambda screen: screen.drag((50, TOP + 300), (150, TOP + 320), (250, TOP + 340)), "dragged 200"),
        (lambda screen: screen.scroll(dy=2, x=900, y=600), "scrolled 240"),
    ],
)
async def test_the_pointer(screen: Desktop, act: Callable[[Desktop], Awaitable[None]], said: str) -> None:
    await act(screen)
    await title(screen, said)


async def test_the_pointer_is_where_it_was_put(screen: Desktop) -> None:
    await screen.move(333, 444)
    assert await screen.pointer() == (333, 444)


async def test_buttons_are_held(screen: Desktop) -> None:
    await screen.move(50, TOP + 300)
    await screen.press()
    await screen.move(150, TOP + 300)
    await screen.release()
    await title(screen, "dragged 100")


@pytest.mark.parametrize(
    "text",
    [
        "The tides: 06:12 & 18:37 ~{}|@\\^`\"'",
        "Ähre, œuvre, €5, Ω, привет",
        "潮の満ち引き 😀🌊",
        "".join(chr(0x4E00 + each) for each in range(40)),
    ],
)
async def test_any_writing_is_typed(screen: Desktop, text: str) -> None:
    await screen.click(300, TOP + 195)
    await screen.type(text)
    await title(screen, text)


async def test_keys(screen: Desktop) -> None:
    await screen.click(300, TOP + 195)
    await screen.type("wrong")
    await screen.key("ctrl+a BackSpace")
    await screen.type("right")
    await title(screen, "right")
    await screen.key("shift+F2")
    await title(screen, "F2 true")


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda screen: screen.click(1280, 10), "not on the screen"),
        (lambda screen: screen.move(-1, 10), "not on the screen"),
        (lambda screen: screen.drag((1, 1)), "2 to 100 points"),
        (lambda screen: screen.key("no-such-key"), "no key 'no-such-key'"),
        (lambda screen: screen.key(" "), "no key was named"),
        (lambda screen: screen.type("\x07"), "is no text"),
        (lambda screen: screen.open("javascript:alert(1)"), "no address"),
        (lambda screen: screen.open("--headless"), "no address"),
        (lambda screen: screen.screenshot(region=(0, 0, 0, 5)), "no part of the screen"),
        (lambda screen: screen.stop_recording(), "no recording"),
    ],
)
async def test_what_cannot_be_done_is_said(
    sandbox: Sandbox, act: Callable[[Desktop], Awaitable[Any]], told: str
) -> None:
    screen = await Desktop.start(sandbox)
    with pytest.raises(SandboxError, match=told):
        await act(screen)


# --- looking on -----------------------------------------------------------------------------------------------------


async def test_people_look_on_without_a_port(screen: Desktop, sandbox: Sandbox) -> None:
    stream = await screen.vnc_stream()
    try:
        assert await stream.receive() == b"RFB 003.008\n"
        await stream.send(b"RFB 003.008\n")
        assert (await stream.receive()).startswith(b"\x01\x01")  # one kind of security: none; the way in is guarded
    finally:
        await stream.aclose()
    listening = await sandbox.exec(["sh", "-c", "cat /proc/net/tcp /proc/net/tcp6 | grep -c ' 0A '"])
    assert listening.stdout.strip() == "0"


async def test_a_film_of_it(screen: Desktop, sandbox: Sandbox) -> None:
    await screen.start_recording(rate=10)
    with pytest.raises(SandboxError, match="going on already"):
        await screen.start_recording()
    await screen.click(120, TOP + 110)
    await screen.settle(quiet=10, most=1)
    film = await screen.stop_recording()
    assert film[4:8] == b"ftyp"
    await sandbox.write("/tmp/film.mp4", film)
    count = [
        "ffprobe",
        "-v",
        "error",
        "-count_frames",
        "-show_entries",
        "stream=width,nb_read_frames",
        "-of",
        "csv=p=0",
    ]
    width, frames = (await sandbox.exec([*count, "/tmp/film.mp4"])).stdout.split(",")
    assert int(width) == 1280
    assert int(frames) >= 3


# --- dying ----------------------------------------------------------------------------------------------------------


async def test_it_is_found_again(screen: Desktop, sandbox: Sandbox) -> None:
    await screen.click(120, TOP + 110)
    other = await Desktop.start(sandbox, width=640, height=480)
    assert (other.width, other.height) == (1280, 800)
    await title(other, "clicked 1")


async def test_a_browser_that_dies_is_told_of_and_comes_again(screen: Desktop, sandbox: Sandbox) -> None:
    await sandbox.exec(["pkill", "-KILL", "-x", "chromium"])
    with pytest.raises(SandboxError, match=r"the browser has ended \(signal 9\)"):
        await until_refused(screen)
    assert await screen.screenshot()
    await screen.open("file:///workspace/page.html")
    await title(screen, "start")


async def test_an_x_server_that_dies_is_told_of_and_comes_again(sandbox: Sandbox) -> None:
    screen = await Desktop.start(sandbox)
    await sandbox.exec(["pkill", "-KILL", "-x", "Xvfb"])
    with pytest.raises(SandboxError, match="has ended"):
        await until_refused(screen)
    again = await Desktop.start(sandbox, width=800, height=600)
    assert (again.width, again.height) == (800, 600)
    assert await again.screenshot()


async def test_a_keeper_that_is_killed_leaves_nothing_in_the_way(sandbox: Sandbox) -> None:
    screen = await Desktop.start(sandbox)
    await screen.open("file:///workspace/page.html")
    await sandbox.exec(["pkill", "-KILL", "-f", "RIDETHROUGH_DESKTOP"])
    with pytest.raises(SandboxError, match="has ended"):
        await until_refused(screen)
    await (await Desktop.start(sandbox)).screenshot()
    servers = await sandbox.exec(["pgrep", "-c", "-x", "Xvfb"])
    assert servers.stdout.strip() == "1"


async def until_refused(screen: Desktop) -> None:
    """Ask until the death of a part has come round."""
    with anyio.fail_after(PATIENCE):
        while True:
            await screen.pointer()


async def test_closed_it_leaves_nothing_running(sandbox: Sandbox) -> None:
    async with desktop(sandbox) as screen:
        await screen.open("about:blank")
    left = await sandbox.exec(["ps", "-eo", "stat,ppid,comm"])
    living = [line for line in left.stdout.splitlines() if not line.startswith("Z")]
    assert not [line for line in living if re.search("Xvfb|openbox|chrom|x11vnc|ffmpeg", line)]


# --- answers that are not trusted -----------------------------------------------------------------------------------

LIAR = """
import os, socket, sys
path = "/tmp/.ridethrough-desktop/screen.sock"
os.unlink(path)
listener = socket.socket(socket.AF_UNIX); listener.bind(path); listener.listen()
answer = sys.stdin.buffer.read()
print("lying")
while True:
    client, _ = listener.accept()
    client.recv(65536)
    client.sendall(answer)
    client.close()
"""


@pytest.mark.parametrize(
    ("answer", "act", "told"),
    [
        (b"", lambda screen: screen.pointer(), "an answer that is none"),
        (b"[" * 100_000 + b"\n", lambda screen: screen.pointer(), "an answer that is none"),
        (b'{"ok": true, "at": ["a", 2]}\n', lambda screen: screen.pointer(), "an answer that is none"),
        (b'{"ok": true}\nno picture', lambda screen: screen.screenshot(), "no JPEG"),
        (b'{"windows": [{"id": {}}]}\n', lambda screen: screen.windows(), "an answer that is none"),
        (b'{"path": "/etc/passwd", "size": 100}\n', lambda screen: screen.stop_recording(), "/etc/passwd"),
        (b'{"path": "/tmp/x", "size": 1e99}\n', lambda screen: screen.stop_recording(), "gave no size"),
        (b'{"path": "/tmp/x", "size": 1000000000}\n', lambda screen: screen.stop_recording(), "an answer that is none"),
    ],
)
async def test_lies_are_no_answers(
    sandbox: Sandbox, answer: bytes, act: Callable[[Desktop], Awaitable[Any]], told: str
) -> None:
    screen = await Desktop.start(sandbox)
    liar = await sandbox.start(["python3", "-c", LIAR], timeout=60, stdin=True)
    try:
        await liar.write(answer)
        await liar.close_stdin()
        async with aclosing(cast(AsyncGenerator[Output], liar.output())) as said:
            assert (await anext(said)).data.startswith(b"lying")
        with pytest.raises(SandboxError, match=told):
            await act(screen)
    finally:
        await liar.kill()
        await screen.aclose()


# --- elsewhere ------------------------------------------------------------------------------------------------------


async def test_an_image_without_a_display_says_what_it_needs(engine: Any) -> None:
    await images.build("python")
    async with DockerHost.open() as host:
        sandbox = await host.create(SandboxProfile(), id="test-desktop-none", labels={"ridethrough.test": "desktop"})
        try:
            with pytest.raises(SandboxError, match="ridethrough sandbox build desktop"):
                await Desktop.start(sandbox)
        finally:
            await sandbox.aclose()


def test_on_trio(engine: Any) -> None:
    async def main() -> bytes:
        await images.build("desktop")
        async with DockerHost.open() as host:
            sandbox = await host.create(DESKTOP, id="test-desktop-trio", labels={"ridethrough.test": "desktop"})
            try:
                async with desktop(sandbox, 400, 300) as screen:
                    stream = await screen.vnc_stream()
                    try:
                        assert await stream.receive() == b"RFB 003.008\n"
                    finally:
                        await stream.aclose()
                    return await screen.screenshot()
            finally:
                await sandbox.aclose()

    with ThreadPoolExecutor(1) as thread:  # the module's own loop has this one
        assert thread.submit(lambda: anyio.run(main, backend="trio")).result().startswith(b"\xff\xd8\xff")
