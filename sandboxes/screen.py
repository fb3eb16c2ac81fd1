"""The program that keeps a display in a sandbox: X server, window manager, browser; and acts on it when asked.

``desktop.py`` starts it there (``python3 -c SOURCE WIDTH HEIGHT``), and asks through short-lived clients on a unix
socket: one line of JSON each, answered by one line of JSON and what belongs to it. It needs what the desktop image has
(Xvfb, openbox, Chromium, python3-xlib, python3-pil) and nothing of the rest of ridethrough, which is not there.

One process for all of it, because everything else is dear: ``xdotool`` and ``scrot`` cost 40 to 120 ms each for their
start and their connection. Xvfb keeps its picture in a mapped file, so that a look at the screen asks nobody: 4 MB are
read in 0.2 ms and made a JPEG in 2 ms; X's own GetImage takes 7 ms, and leaves out the pointer.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image  # type: ignore  # pyright: ignore[reportMissingImports]
from Xlib import XK, X, display, error  # type: ignore  # pyright: ignore[reportMissingImports]
from Xlib.ext import xtest  # type: ignore  # pyright: ignore[reportMissingImports]
from Xlib.protocol import event  # type: ignore  # pyright: ignore[reportMissingImports]

FOLDER = "/tmp/.ridethrough-desktop"
SOCKET = FOLDER + "/screen.sock"
VNC = FOLDER + "/vnc.sock"
RECORDING = FOLDER + "/recording.mp4"

MARK = "RIDETHROUGH_DESKTOP"
"""In the environment of all that is started here."""

POLL = 0.02
"""Seconds between two looks at something that tells nobody when it changes."""

TYPING = 0.004
"""Seconds between two keys: programs that are given hundreds at once drop some."""

RELOAD = 0.15
"""Seconds that programs are given to take a changed layout up; they do so when they come to it."""

KEYS = {
    "enter": "Return",
    "return": "Return",
    "esc": "Escape",
    "escape": "Escape",
    "del": "Delete",
    "ins": "Insert",
    "pageup": "Prior",
    "page_up": "Prior",
    "pagedown": "Next",
    "page_down": "Next",
    "arrowleft": "Left",
    "arrowright": "Right",
    "arrowup": "Up",
    "arrowdown": "Down",
    "space": "space",
    "backspace": "BackSpace",
    "tab": "Tab",
    "capslock": "Caps_Lock",
    "ctrl": "Control_L",
    "control": "Control_L",
    "alt": "Alt_L",
    "option": "Alt_L",
    "shift": "Shift_L",
    "super": "Super_L",
    "win": "Super_L",
    "cmd": "Super_L",
    "command": "Super_L",
    "meta": "Super_L",
    "plus": "plus",
    "minus": "minus",
}
"""Names of keys that people and models use, by their names in X; the others are X's own, in any case."""

BUTTONS = {"left": 1, "middle": 2, "right": 3, "back": 8, "forward": 9}
UP, DOWN, LEFT, RIGHT = 4, 5, 6, 7


MANAGER = """<openbox_config xmlns="http://openbox.org/3.4/rc">
<focus><focusNew>yes</focusNew><followMouse>yes</followMouse><underMouse>yes</underMouse>
<raiseOnFocus>yes</raiseOnFocus></focus>
<placement><policy>Smart</policy><center>yes</center></placement>
<theme><name>Clearlooks</name><titleLayout>NLMC</titleLayout></theme>
<desktops><number>1</number></desktops>
<keyboard></keyboard>
<mouse>
<context name="Titlebar"><mousebind button="Left" action="Drag"><action name="Move"/></mousebind>
<mousebind button="Left" action="DoubleClick"><action name="ToggleMaximize"/></mousebind></context>
<context name="Close"><mousebind button="Left" action="Click"><action name="Close"/></mousebind></context>
<context name="Maximize"><mousebind button="Left" action="Click"><action name="ToggleMaximize"/></mousebind></context>
</mouse>
</openbox_config>
"""
"""No keys and no buttons for itself: to have them, a window manager stands between the pointer and every program, and
while it is busy with something else (a changed layout, say) clicks get lost. The window under the pointer is in front.
"""


class Refused(Exception):
    """What was asked cannot be done; the message says why."""


class Ended(Refused):
    """Nothing can be done any more."""


# --- what runs ------------------------------------------------------------------------------------------------------


def status_of(status: int) -> str:
    return f"status {status}" if status >= 0 else f"signal {-status}"


def end_all() -> None:
    """End what a display of this sandbox has started, now or in an earlier life: all of it carries a mark."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/environ", "rb") as environment:
                marked = MARK.encode() in environment.read()
            if marked and int(name) != os.getpid():
                os.kill(int(name), signal.SIGKILL)


class Server:
    """The X server and the window manager: they live as long as this program."""

    def __init__(self, width: int, height: int) -> None:
        reader, writer = os.pipe()
        self.log = open(FOLDER + "/xvfb.log", "w+")  # noqa: SIM115
        words = ["Xvfb", "-displayfd", str(writer), "-screen", "0", f"{width}x{height}x24", "-fbdir", FOLDER]
        words += ["-nolisten", "tcp", "-noreset", "-dpi", "96"]
        try:
            self.process = subprocess.Popen(words, pass_fds=[writer], stdout=self.log, stderr=self.log)
        except FileNotFoundError:
            raise Refused("there is no Xvfb in this image: use ridethrough/desktop, or one made from it") from None
        os.close(writer)
        with open(reader) as numbers:
            number = numbers.readline().strip()
        if not number:
            raise Refused("the X server did not start: " + self.last_words())
        self.name = ":" + number
        os.environ["DISPLAY"] = self.name

    def last_words(self) -> str:
        self.log.seek(0)
        return "; ".join(self.log.read().split("\n")[-6:]).strip("; ")

    def check(self) -> None:
        if self.process.poll() is not None:
            raise Ended(f"the X server has ended ({status_of(self.process.returncode)})")


class Wire:
    """Chromium's own protocol, over two pipes: the one way to know that a page is there. No port is opened for it."""

    def __init__(self, reader: int, writer: int) -> None:
        self.reader, self.writer = reader, writer
        self.news = threading.Condition()
        self.count = 0
        self.answers: dict[int, dict[str, Any]] = {}
        self.loaded: deque[tuple[str, str]] = deque(maxlen=1000)
        """Pages that have been loaded: the tab's session, the load."""
        self.ended = False
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        with open(self.reader, "rb") as stream:
            rest = b""
            while chunk := os.read(stream.fileno(), 65536):
                *whole, rest = (rest + chunk).split(b"\0")
                for each in whole:
                    self.take(json.loads(each))
        with self.news:
            self.ended = True
            self.news.notify_all()

    def take(self, message: dict[str, Any]) -> None:
        with self.news:
            about = message.get("params") or {}
            if "id" in message:
                self.answers[message["id"]] = message
            elif message.get("method") == "Page.lifecycleEvent" and about["name"] == "load":
                self.loaded.append((message["sessionId"], about["loaderId"]))
            self.news.notify_all()

    def ask(self, method: str, limit: float, session: str = "", **params: Any) -> dict[str, Any]:
        with self.news:
            self.count = number = self.count + 1
        asked = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        with contextlib.suppress(OSError):
            os.write(self.writer, json.dumps(asked).encode() + b"\0")
        self.wait(lambda: number in self.answers, limit, method)
        answer = self.answers.pop(number)
        if "error" in answer:
            raise Refused(f"the browser refuses {method}: {answer['error'].get('message')}")
        found: dict[str, Any] = answer["result"]
        return found

    def wait(self, done: Callable[[], bool], limit: float, what: str) -> None:
        with self.news:
            if not self.news.wait_for(lambda: done() or self.ended, max(0.0, limit - time.monotonic())):
                raise Refused(f"the browser did not answer in time: {what}")
            if not done():
                raise Refused("the browser has ended; opening a page starts another")

    def close(self) -> None:
        os.close(self.writer)


class Browser:
    """Chromium, started when it is first needed and again when it has died."""

    # Its own sandbox wants user namespaces, which the container's seccomp filter denies with good reason; the container
    # is the boundary. /dev/shm is small in a container: shared memory goes to /tmp. There is no GPU.
    WORDS = (
        "/usr/lib/chromium/chromium",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--user-data-dir=/tmp/.ridethrough-browser",
        "--no-first-run",
        "--no-default-browser-check",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-crash-reporter",
        "--password-store=basic",
        "--start-maximized",
        "--remote-debugging-pipe",
        "about:blank",
    )
    PIPES = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
    """It wants its pipes at these two places."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()
        self.tab = ""

    def start(self) -> None:
        self.forget_lock()
        theirs, writer = os.pipe()
        reader, answers = os.pipe()
        words = ["bash", "-c", self.PIPES, "bash", str(theirs), str(answers), *self.WORDS]
        with open(FOLDER + "/browser.log", "w") as log:
            self.process = subprocess.Popen(words, pass_fds=[theirs, answers], stdout=log, stderr=log)
        os.close(theirs)
        os.close(answers)
        self.wire, self.tab = Wire(reader, writer), ""

    def open(self, url: str, seconds: float) -> None:
        """Show a page, in the tab of the last one if it is still there, and wait until it has been drawn."""
        limit = time.monotonic() + seconds
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.start()
            session = self.session(limit)
            answer = self.wire.ask("Page.navigate", limit, session, url=url)
            failed = answer.get("errorText", "")
            if failed and failed != "net::ERR_ABORTED":  # that is a download
                raise Refused(f"the page cannot be shown: {failed}")
            loader = answer.get("loaderId")
            if loader and not failed:
                self.wire.wait(lambda: (session, loader) in self.wire.loaded, limit, "the page has not been loaded")
                self.drawn(session, limit)

    def session(self, limit: float) -> str:
        """Be attached to the tab that pages are shown in."""
        pages = [each for each in self.wire.ask("Target.getTargets", limit)["targetInfos"] if each["type"] == "page"]
        known = [each["targetId"] for each in pages]
        if self.tab not in known:
            if not known:
                known = [self.wire.ask("Target.createTarget", limit, url="about:blank")["targetId"]]
            self.tab = known[0]
            self.attached: str = self.wire.ask("Target.attachToTarget", limit, targetId=self.tab, flatten=True)[
                "sessionId"
            ]
            self.wire.ask("Page.enable", limit, self.attached)
            self.wire.ask("Page.setLifecycleEventsEnabled", limit, self.attached, enabled=True)
        self.wire.ask("Target.activateTarget", limit, targetId=self.tab)
        return self.attached

    def drawn(self, session: str, limit: float) -> None:
        """Wait for two frames: until the first one a page takes no clicks. One that is kept busy is not waited for."""
        frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        soon = min(limit, time.monotonic() + 3)
        with contextlib.suppress(Refused):
            self.wire.ask("Runtime.evaluate", soon, session, expression=frames, awaitPromise=True)

    def forget_lock(self) -> None:
        """A browser that was killed leaves its lock; the next one would wait for nobody."""
        for name in ("SingletonLock", "SingletonSocket", "SingletonCookie"):
            with contextlib.suppress(OSError):
                os.unlink("/tmp/.ridethrough-browser/" + name)

    def check(self) -> None:
        """Tell, once, of a browser that has died; one that was closed has done as it was told."""
        if self.process is not None and self.process.poll() is not None:
            status, self.process = self.process.returncode, None
            self.wire.close()
            if status != 0:
                raise Refused(f"the browser has ended ({status_of(status)}); opening a page starts another")


# --- the screen -----------------------------------------------------------------------------------------------------


class Picture:
    """What the X server shows, in the file that it keeps it in (the format of xwd)."""

    def __init__(self) -> None:
        with open(FOLDER + "/Xvfb_screen0", "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        head = struct.unpack(">25I", self.map[:100])
        self.begin = head[0] + head[19] * 12
        self.width, self.height, self.stride = head[4], head[5], head[12]

    def raw(self) -> bytes:
        return self.map[self.begin : self.begin + self.stride * self.height]

    def jpeg(self, quality: int, region: list[int] | None) -> bytes:
        size = (self.width, self.height)
        image = Image.frombuffer("RGB", size, self.raw(), "raw", "BGRX", self.stride, 1)
        if region is not None:
            image = image.crop((region[0], region[1], region[2], region[3]))
        packed = io.BytesIO()
        image.save(packed, "JPEG", quality=quality)
        return packed.getvalue()

    def settle(self, quiet: float, most: float) -> bool:
        """Wait until nothing has changed for ``quiet`` seconds; whether that came within ``most``."""
        begin = since = time.monotonic()
        before = self.raw()
        while time.monotonic() - begin < most:
            if time.monotonic() - since >= quiet:
                return True
            time.sleep(POLL)
            now = self.raw()
            if now != before:
                before, since = now, time.monotonic()
        return False


class Keyboard:
    """Keys by their names, and text of any writing: letters that the layout has not are put on keys that are free.

    A key that was given a letter keeps it as long as there are others: programs look at the layout when they come to
    read a key, and by then it must still mean the same.
    """

    def __init__(self, dpy: Any) -> None:
        self.dpy = dpy
        self.low, high = dpy.display.info.min_keycode, dpy.display.info.max_keycode
        self.rows = [list(row) for row in dpy.get_keyboard_mapping(self.low, high - self.low + 1)]
        self.spare = [self.low + place for place, row in enumerate(self.rows) if not any(row)]
        self.lent: dict[int, int] = {}
        self.known: dict[int, tuple[int, bool]] = {}
        for place, row in enumerate(self.rows):
            for column, sym in enumerate(row[:2]):
                if sym:
                    self.known.setdefault(sym, (self.low + place, column == 1))

    def sym(self, name: str) -> int:
        """A key's number by its name, or by the letter on it."""
        if len(name) == 1:
            return self.letter(name)
        for each in (KEYS.get(name.lower()), name, name.capitalize(), name.lower(), name.upper()):
            found = XK.string_to_keysym(each) if each else 0
            if found:
                return int(found)
        raise Refused(f"there is no key {name!r}; write names as in ctrl+l, Return, F5, Page_Down, or a letter")

    @staticmethod
    def letter(letter: str) -> int:
        code = ord(letter)
        if letter in "\r\n":
            return int(XK.XK_Return)
        if letter == "\t":
            return int(XK.XK_Tab)
        if 0x20 <= code <= 0x7E or 0xA0 <= code <= 0xFF:
            return code
        if code < 0x20 or 0x7F <= code < 0xA0:
            raise Refused(f"the letter U+{code:04X} is no text; use key for keys")
        return 0x01000000 + code

    def find(self, sym: int) -> tuple[int, bool]:
        """The key of a letter, and whether it takes shift."""
        if sym not in self.known and sym not in self.lent:
            self.lend([sym])
        return self.known.get(sym) or (self.lent[sym], False)

    def lend(self, syms: list[int]) -> None:
        """Put letters on free keys, all at once, and give programs the time to look at the layout anew."""
        if len(syms) > len(self.spare):
            raise Refused("the layout has no free key for another letter")
        for sym in syms:
            code = self.spare.pop(0)  # the one whose letter was lent the longest ago
            self.spare.append(code)
            self.lent = {old: key for old, key in self.lent.items() if key != code}
            self.lent[sym] = code
            self.rows[code - self.low] = [sym, sym, *[0] * (len(self.rows[0]) - 2)]
        # All in one: every program on the display reads the layout anew at each change.
        self.dpy.change_keyboard_mapping(self.low, self.rows)
        self.dpy.sync()
        time.sleep(RELOAD)

    def press(self, code: int, down: bool) -> None:
        xtest.fake_input(self.dpy, X.KeyPress if down else X.KeyRelease, code)

    def tap(self, code: int, shift: bool) -> None:
        shift_code = self.known[int(XK.XK_Shift_L)][0]
        if shift:
            self.press(shift_code, True)
        self.press(code, True)
        self.press(code, False)
        if shift:
            self.press(shift_code, False)
        self.dpy.sync()

    def type(self, text: str) -> None:
        syms = [self.letter(each) for each in text.replace("\r\n", "\n")]
        while syms:
            syms = self.type_some(syms)

    def type_some(self, syms: list[int]) -> list[int]:
        """Type as many as there are keys for; those that are left."""
        new: list[int] = []
        count = 0
        for sym in syms:
            if sym not in self.known and sym not in self.lent and sym not in new:
                if len(new) == len(self.spare) // 2:
                    break
                new.append(sym)
            count += 1
        if new:
            self.lend(new)
        for sym in syms[:count]:
            self.tap(*self.find(sym))
            time.sleep(TYPING)
        return syms[count:]

    def codes(self, combination: str) -> list[int]:
        """The keys of ``ctrl+shift+t``, in their order; ``CTRL+T`` is ``ctrl+t``, as it is written on keys."""
        names = combination.split("+") if combination != "+" else ["+"]
        if names[-2:] == ["", ""]:  # ctrl++
            names[-2:] = ["+"]
        codes: list[int] = []
        for name in names:
            name = name.lower() if len(names) > 1 and len(name) == 1 else name
            code, shift = self.find(self.sym(name.strip() or " "))
            if shift:
                codes.append(self.known[int(XK.XK_Shift_L)][0])
            codes.append(code)
        return codes

    def chord(self, codes: list[int], hold: float = 0.0) -> None:
        for code in codes:
            self.press(code, True)
        self.dpy.sync()
        time.sleep(hold)
        for code in reversed(codes):
            self.press(code, False)
        self.dpy.sync()


class Screen:
    """The display, and what may be done on it."""

    def __init__(self, width: int, height: int) -> None:
        self.server = Server(width, height)
        self.dpy = display.Display(self.server.name)
        self.root = self.dpy.screen().root
        self.keyboard = Keyboard(self.dpy)
        self.picture = Picture()
        self.browser = Browser()
        self.helpers: dict[str, subprocess.Popen[bytes]] = {}
        self.lock = threading.RLock()
        self.manage()

    def manage(self) -> None:
        """Start the window manager, and wait until it is there."""
        with open(FOLDER + "/openbox.xml", "w") as file:
            file.write(MANAGER)
        words = ["openbox", "--config-file", FOLDER + "/openbox.xml"]
        self.manager = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not self.property(self.root, "_NET_SUPPORTING_WM_CHECK"):
            self.server.check()
            if self.manager.poll() is not None:
                raise Refused(f"the window manager has ended ({status_of(self.manager.returncode)})")
            time.sleep(POLL)

    def check(self) -> None:
        self.server.check()
        if self.manager.poll() is not None:
            self.manage()
        self.browser.check()

    def end_with_the_server(self) -> None:
        """Without its display this program is of no use; a new one begins with a clean table."""
        self.server.process.wait()
        time.sleep(0.2)  # who asks just now is told why
        sys.stderr.write(f"the X server has ended ({status_of(self.server.process.returncode)})\n")
        sys.stderr.flush()
        end_all()
        os._exit(1)

    # --- windows ----------------------------------------------------------------------------------------------------

    def property(self, window: Any, name: str) -> Any:
        found = window.get_full_property(self.dpy.intern_atom(name), X.AnyPropertyType)
        return found.value if found is not None else None

    def windows(self) -> Iterator[dict[str, Any]]:
        active = next(iter(self.property(self.root, "_NET_ACTIVE_WINDOW") or [0]))
        for id in self.property(self.root, "_NET_CLIENT_LIST") or ():
            try:
                yield self.describe(int(id), id == active)
            except error.XError:  # it was closed meanwhile
                continue

    def describe(self, id: int, active: bool) -> dict[str, Any]:
        window = self.dpy.create_resource_object("window", id)
        place = window.get_geometry()
        at = window.translate_coords(self.root, 0, 0)
        title = self.property(window, "_NET_WM_NAME") or window.get_wm_name() or ""
        kind = window.get_wm_class() or ("", "")
        text = title.decode("utf-8", "replace") if isinstance(title, bytes) else str(title)
        box = [-at.x, -at.y, place.width, place.height]
        return {"id": id, "title": text[:500], "program": str(kind[1])[:100], "box": box, "active": active}

    def activate(self, id: int) -> None:
        """Bring a window to the front, as a pager would."""
        window = self.dpy.create_resource_object("window", id)
        atom = self.dpy.intern_atom("_NET_ACTIVE_WINDOW")
        message = event.ClientMessage(window=window, client_type=atom, data=(32, [2, X.CurrentTime, 0, 0, 0]))
        self.root.send_event(message, event_mask=X.SubstructureRedirectMask | X.SubstructureNotifyMask)
        self.dpy.sync()

    # --- pointer ----------------------------------------------------------------------------------------------------

    def pointer(self) -> list[int]:
        found = self.root.query_pointer()
        return [found.root_x, found.root_y]

    def move(self, x: int, y: int) -> None:
        xtest.fake_input(self.dpy, X.MotionNotify, x=x, y=y)
        self.dpy.sync()

    def button(self, number: int, down: bool) -> None:
        xtest.fake_input(self.dpy, X.ButtonPress if down else X.ButtonRelease, number)
        self.dpy.sync()

    def click(self, number: int, count: int) -> None:
        for _ in range(count):
            self.button(number, True)
            time.sleep(0.01)
            self.button(number, False)
            time.sleep(0.01)

    def drag(self, path: list[list[int]], number: int) -> None:
        """Programs take a drag for one only if they see it move."""
        self.move(*path[0])
        self.button(number, True)
        for (x0, y0), (x1, y1) in itertools.pairwise(path):
            steps = max(1, min(20, max(abs(x1 - x0), abs(y1 - y0)) // 10))
            for step in range(1, steps + 1):
                self.move(x0 + (x1 - x0) * step // steps, y0 + (y1 - y0) * step // steps)
                time.sleep(0.005)
        self.button(number, False)

    def scroll(self, dx: int, dy: int) -> None:
        for number, count in ((DOWN, dy), (UP, -dy), (RIGHT, dx), (LEFT, -dx)):
            for _ in range(max(count, 0)):
                self.click(number, 1)

    # --- watching ---------------------------------------------------------------------------------------------------

    def vnc(self) -> None:
        """Let people look on, over a unix socket and never a port; they cannot touch anything."""
        if self.helper("vnc") is None:
            if os.path.exists(VNC):
                os.unlink(VNC)
            words = ["x11vnc", "-display", self.server.name, "-unixsock", VNC, "-rfbport", "0", "-rfbportv6", "0"]
            words += ["-viewonly", "-shared", "-forever", "-nopw", "-quiet", "-noxdamage", "-nobell", "-nosel"]
            self.assist("vnc", words)
        self.until("vnc", lambda: self.answers(VNC), 15.0)

    @staticmethod
    def answers(path: str) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except OSError:
                return False
            return True

    def record(self, rate: float, most: int) -> None:
        """Film the screen; the file is whole at every moment, should this end before its time."""
        if self.helper("recording") is not None:
            raise Refused("a recording is going on already; stop it first")
        if os.path.exists(RECORDING):
            os.unlink(RECORDING)
        words = ["ffmpeg", "-loglevel", "error", "-nostdin", "-f", "x11grab", "-framerate", str(rate)]
        words += ["-video_size", f"{self.picture.width}x{self.picture.height}", "-i", self.server.name]
        words += ["-c:v", "libx264", "-preset", "ultrafast", "-crf", "28", "-pix_fmt", "yuv420p", "-threads", "1"]
        words += ["-g", str(max(1, int(rate * 2))), "-movflags", "+frag_keyframe+empty_moov", "-fs", str(most)]
        self.assist("recording", [*words, RECORDING])
        self.until("recording", lambda: os.path.exists(RECORDING), 15.0)

    def cut(self) -> dict[str, Any]:
        """End the film; where it is."""
        found = self.helpers.pop("recording", None)
        if found is None:
            raise Refused("no recording is going on")
        found.send_signal(signal.SIGINT)
        try:
            found.wait(15)
        except subprocess.TimeoutExpired:
            found.kill()
            found.wait()
        return {"path": RECORDING, "size": os.path.getsize(RECORDING)}

    def helper(self, name: str) -> subprocess.Popen[bytes] | None:
        found = self.helpers.get(name)
        return found if found is not None and found.poll() is None else None

    def assist(self, name: str, words: list[str]) -> None:
        with open(f"{FOLDER}/{name}.log", "w") as log:
            self.helpers[name] = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def until(self, name: str, done: Callable[[], bool], seconds: float) -> None:
        limit = time.monotonic() + seconds
        while not done():
            if self.helper(name) is None or time.monotonic() > limit:
                with open(f"{FOLDER}/{name}.log", errors="replace") as log:
                    raise Refused(f"{name} did not start: {log.read()[-500:]}")
            time.sleep(POLL)


# --- requests -------------------------------------------------------------------------------------------------------


class Requests:
    """What may be asked for, each by the name of its method; the answer is a header and a body."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen

    def answer(self, asked: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        try:
            self.screen.check()
            done = getattr(self, "do_" + str(asked.pop("do")))(**asked)
            return {"ok": True, **(done if isinstance(done, dict) else {})}, done if isinstance(done, bytes) else b""
        except Refused as refused:
            return {"error": str(refused), "ended": isinstance(refused, Ended)}, b""
        except error.ConnectionClosedError:
            return {"error": "the X server has ended", "ended": True}, b""
        except (error.XError, OSError) as failed:
            return {"error": f"the display failed: {failed}"}, b""

    def do_size(self) -> dict[str, Any]:
        return {"width": self.screen.picture.width, "height": self.screen.picture.height}

    def do_screenshot(self, quality: int, region: list[int] | None) -> bytes:
        return self.screen.picture.jpeg(quality, region)

    def do_settle(self, quiet: float, most: float) -> dict[str, Any]:
        return {"quiet": self.screen.picture.settle(quiet, most)}

    def do_pointer(self) -> dict[str, Any]:
        with self.screen.lock:
            return {"at": self.screen.pointer()}

    def do_move(self, at: list[int]) -> None:
        with self.screen.lock:
            self.screen.move(*at)

    def do_click(self, at: list[int] | None, button: str, count: int, holding: str) -> None:
        with self.screen.lock, self.holding(holding):
            if at is not None:
                self.screen.move(*at)
            self.screen.click(BUTTONS[button], count)

    def do_button(self, button: str, down: bool) -> None:
        with self.screen.lock:
            self.screen.button(BUTTONS[button], down)

    def do_drag(self, path: list[list[int]], button: str, holding: str) -> None:
        with self.screen.lock, self.holding(holding):
            self.screen.drag(path, BUTTONS[button])

    def do_scroll(self, at: list[int] | None, dx: int, dy: int, holding: str) -> None:
        with self.screen.lock, self.holding(holding):
            if at is not None:
                self.screen.move(*at)
            self.screen.scroll(dx, dy)

    def do_type(self, text: str) -> None:
        with self.screen.lock:
            self.screen.keyboard.type(text)

    def do_key(self, combination: str, hold: float) -> None:
        with self.screen.lock:
            for each in combination.split():
                self.screen.keyboard.chord(self.screen.keyboard.codes(each), hold)

    def do_windows(self) -> dict[str, Any]:
        with self.screen.lock:
            return {"windows": list(self.screen.windows())}

    def do_activate(self, id: int) -> None:
        with self.screen.lock:
            self.screen.activate(id)

    def do_open(self, url: str, seconds: float) -> None:
        self.screen.browser.open(url, seconds)

    def do_vnc(self) -> dict[str, Any]:
        with self.screen.lock:
            self.screen.vnc()
        return {"path": VNC}

    def do_record(self, rate: float, most: int) -> None:
        with self.screen.lock:
            self.screen.record(rate, most)

    def do_cut(self) -> dict[str, Any]:
        with self.screen.lock:
            return self.screen.cut()

    def holding(self, combination: str) -> Any:
        """Keys that are down while something else happens."""
        return Held(self.screen.keyboard, self.screen.keyboard.codes(combination) if combination else [])


class Held:
    def __init__(self, keyboard: Keyboard, codes: list[int]) -> None:
        self.keyboard = keyboard
        self.codes = codes

    def __enter__(self) -> None:
        for code in self.codes:
            self.keyboard.press(code, True)

    def __exit__(self, *_: object) -> None:
        for code in reversed(self.codes):
            self.keyboard.press(code, False)
        self.keyboard.dpy.sync()


def serve(requests: Requests) -> None:
    """Answer who connects, each in a thread of its own: one who waits for the screen to settle holds up nobody."""
    if os.path.exists(SOCKET):
        os.unlink(SOCKET)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(SOCKET)
    listener.listen(16)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        client, _ = listener.accept()
        threading.Thread(target=attend, args=(requests, client), daemon=True).start()


def attend(requests: Requests, client: socket.socket) -> None:
    client.settimeout(300)
    with client, client.makefile("rwb") as stream:
        try:
            asked = json.loads(stream.readline(1 << 20))
            header, body = requests.answer(asked)
        except (ValueError, TypeError, AttributeError, KeyError) as wrong:
            header, body = {"error": f"the request is wrong: {wrong!r}"}, b""
        try:
            stream.write(json.dumps(header).encode() + b"\n" + body)
            stream.flush()
        except OSError:  # nobody waits any more
            pass


def main() -> None:
    end_all()
    os.environ[MARK] = "1"
    os.makedirs(FOLDER, mode=0o700, exist_ok=True)
    try:
        screen = Screen(int(sys.argv[1]), int(sys.argv[2]))
        threading.Thread(target=screen.end_with_the_server, daemon=True).start()
        serve(Requests(screen))
    except Refused as refused:
        sys.exit(str(refused))


if __name__ == "__main__":
    main()
