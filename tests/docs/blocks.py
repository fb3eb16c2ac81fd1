"""Runs the fenced code blocks of a page; ``test_docs.py`` has the convention."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ridethrough.runtime.config import load_config
from ridethrough.runtime.router.providers.simulated import load_script

ROOT = Path(__file__).resolve().parents[2]
COMMAND_SECONDS = 60.0
"""What a command of a page may take on a busy machine."""

PORTS = ("8701", "8702")
"""The ports that pages name; free ones are put in their places."""

KILLED = re.compile(r"(?P<command>.+?) & sleep \d+; kill -(?P<signal>9|INT) \$!")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S)
COMMENT = re.compile(r"<!-- *(?P<key>[a-z ]+?)(?:: *(?P<value>.*?))? *-->\n+\Z")
DIAGRAMS = ("stateDiagram-v2", "flowchart", "sequenceDiagram")


class Wrong(AssertionError):
    """A block does not do what the page says."""


@dataclass(frozen=True)
class Block:
    """A fenced block with the comment above it."""

    line: int
    language: str
    text: str
    key: str = ""
    value: str = ""


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for match in FENCE.finditer(text):
        comment = COMMENT.search(text[: match.start()])
        body = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.M) if match["indent"] else match["text"]
        key, value = (comment["key"], comment["value"] or "") if comment else ("", "")
        found.append(Block(text.count("\n", 0, match.start()) + 1, match["language"].strip(), body, key, value))
    return found


VOLATILE = (
    (re.compile(r"\b\d{4}-\d\d-\d\d[ T]"), ""),
    (re.compile(r"\b\d\d:\d\d:\d\d(\.\d+Z)?"), "TIME"),
    (re.compile(r"\b\d+(\.\d+)? (ms|s|MB|GB)\b"), "SOME"),
    (re.compile(r"\b[0-9a-f]{16}\b|\b[0-9a-f]{32}\b"), "DIGEST"),
    (re.compile(r"-[0-9a-v]{13}\b"), "-ID"),
    (re.compile(r"-fork-[0-9a-f]{6}\b"), "-fork-ID"),
    (re.compile(r"\bprocess \d+ on \S+ \(worker [^ )]+\)"), "PROCESS"),
    (re.compile(r"(?<=g\d\[)\d+(?=\])"), "BRANCH"),
    (re.compile(r"(?<=\S)[ \t]+"), " "),
    (re.compile(r"[ \t]+$", re.M), ""),
)
"""What is another each time: times, durations, sizes, digests, ids that were made up, processes, the order of branches,
widths of columns."""


def steady(text: str) -> str:
    """``text`` without what is another each time."""
    for pattern, name in VOLATILE:
        text = pattern.sub(name, text)
    return text


COUNTS = (
    (re.compile(r"(?<= )(?!\.\.\.$)[ox%.!]{2,}$", re.M), "TIMELINE"),
    (re.compile(r"(?<![\w.-])\$?\d+(\.\d+)?[%s]?(?!\w)"), "N"),
)
"""What else is another each time where a page says that its numbers vary: measurements."""


def matches(expected: str, shown: str, *, numbers: bool = True) -> bool:
    """Whether ``shown`` is what the page expects: a line ``...`` is any lines, ``...`` in a line any text.

    Without ``numbers`` those need not be the same.
    """
    shown = shown.rstrip("\n") + "\n" if shown.strip() else ""
    expected, shown = steady(expected), steady(shown)
    for pattern, name in () if numbers else COUNTS:
        expected, shown = pattern.sub(name, expected), pattern.sub(name, shown)
    return re.fullmatch(_pattern(expected), shown) is not None


def _pattern(expected: str) -> str:
    parts: list[str] = []
    for line in expected.splitlines():
        if line.strip() == "...":
            parts.append(r"(?:[^\n]*\n)*")
        else:
            parts.append(r"[^\n]*?".join(re.escape(piece) for piece in line.rstrip().split("...")) + r"[ \t]*\n")
    return "".join(parts)


@dataclass
class Page:
    """The execution of one page, in a folder of its own."""

    folder: Path
    module: types.ModuleType = field(init=False)
    printed: str = ""
    shell: Shell = field(init=False)
    ports: dict[str, str] = field(default_factory=lambda: {port: free_port() for port in PORTS})

    def __post_init__(self) -> None:
        self.module = types.ModuleType("page")
        self.shell = Shell(self.folder)

    def run(self, block: Block) -> None:
        """Execute a block.

        Raises:
            Wrong: it does not do what the page says, or nobody knows what to do with it.
        """
        text = re.sub("|".join(PORTS), lambda named: self.ports[named[0]], block.text)
        block = Block(block.line, block.language, text, block.key, block.value)
        self._known_comment(block)
        if block.key == "file":
            self._write(block)
        elif block.key == "same file":
            self._same(block)
        else:
            run: Callable[[Block], None] | None = getattr(self, f"_run_{block.language}", None)
            if run is None:
                raise Wrong(f"a block of {block.language or 'no language'} is not known")
            run(block)

    def close(self) -> None:
        """End what the page's commands left running."""
        self.shell.close()

    def _known_comment(self, block: Block) -> None:
        allowed = {
            "python": ("", "file", "same file", "fails"),
            "toml": ("", "file", "same file"),
            "text": ("output", "picture"),
            "json": ("", "file"),
            "sh": ("", "file"),
            "console": ("", "numbers vary"),
        }
        if block.key not in allowed.get(block.language, ("",)):
            raise Wrong(f"a comment {block.key!r} means nothing above a block of {block.language or 'no language'}")

    # --- files ------------------------------------------------------------------------------------------------------

    def _write(self, block: Block) -> None:
        path = self.shell.cwd / block.value
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
        self._check_file(path, block)

    def _same(self, block: Block) -> None:
        path = self.shell.cwd / block.value
        if path.read_text(encoding="utf-8") != block.text:
            raise Wrong(f"{block.value} is not what the page shows")
        self._check_file(path, block)

    def _check_file(self, path: Path, block: Block) -> None:
        if block.language == "python":
            compile(block.text, block.value, "exec")
        elif block.language == "sh":
            subprocess.run(["sh", "-n", str(path)], check=True)
        elif block.language == "json":
            json.loads(block.text)
        elif path.name.startswith("ridethrough.") and path.suffix == ".toml":
            load_config(path)
        else:
            load_script(str(path))

    def _run_toml(self, block: Block) -> None:
        """A configuration, whole or a part that stands by itself."""
        path = self.folder / f"block-{block.line}.toml"
        path.write_text(block.text, encoding="utf-8")
        load_config(path)

    def _run_json(self, block: Block) -> None:
        json.loads(block.text)

    def _run_mermaid(self, block: Block) -> None:
        if block.text.split()[0] not in DIAGRAMS:
            raise Wrong(f"a diagram begins with one of {DIAGRAMS}")

    # --- python -----------------------------------------------------------------------------------------------------

    def _run_python(self, block: Block) -> None:
        code = compile("\n" * block.line + block.text, "<page>", "exec")
        out = io.StringIO()
        raised: BaseException | None = None
        with _standing_in(self.shell.cwd, self.module), contextlib.redirect_stdout(out):
            try:
                exec(code, self.module.__dict__)
            except Exception as error:
                raised = error
                while isinstance(raised, ExceptionGroup) and len(raised.exceptions) == 1:
                    raised = raised.exceptions[0]
        self.printed = out.getvalue()
        if raised is not None:
            self.printed += f"{type(raised).__name__}: {raised}\n"
        wanted = block.value if block.key == "fails" else ""
        if wanted != ("" if raised is None else type(raised).__name__):
            raise Wrong(f"raised {raised!r} instead of {wanted or 'nothing'}") from raised

    def _run_text(self, block: Block) -> None:
        if block.key == "output" and not matches(block.text, self.printed):
            raise Wrong(f"the block before printed:\n{self.printed}")

    # --- console ----------------------------------------------------------------------------------------------------

    def _run_sh(self, block: Block) -> None:
        """Set-up on the reader's machine: not executed, but every line has to be one that is known to work."""
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
        for line in filter(None, (line.partition("#")[0].strip() for line in block.text.splitlines())):
            target = re.fullmatch(r"make ([a-z]+)", line)
            known = target[1] in targets if target else line in SETUP
            if not known:
                raise Wrong(f"{line!r} is neither a target of the Makefile nor in SETUP")

    def _run_console(self, block: Block) -> None:
        commands = list(_commands(block.text))
        for index, (command, expected) in enumerate(commands):
            status, shown = self._command(command, expected)
            following = commands[index + 1][0] if index + 1 < len(commands) else ""
            if not matches(expected, shown, numbers=block.key != "numbers vary"):
                raise Wrong(f"$ {command}\nprinted:\n{shown}")
            if status and following != "echo $?":
                raise Wrong(f"$ {command}\nended with {status}, and no `$ echo $?` follows:\n{shown}")

    def _command(self, command: str, expected: str) -> tuple[int, str]:
        if killed := KILLED.fullmatch(command):
            return 0, self.shell.kill(killed["command"], expected, killed["signal"])
        if command.endswith(" &"):
            return 0, self.shell.start(command[:-2], expected).shown
        return self.shell.run(command)


SETUP = (
    "python3 -m venv .venv",
    ". .venv/bin/activate",
    "pip install .",
    "pip install -e .",
)


def _commands(text: str) -> Iterator[tuple[str, str]]:
    """Each command with the output that is expected of it."""
    if not text.startswith("$ "):
        raise Wrong("a console block begins with `$ command`")
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        lines = part.split("\n")
        taken = 1
        while lines[taken - 1].endswith("\\"):
            taken += 1
        yield "\n".join(lines[:taken]), "\n".join(lines[taken:])


@contextlib.contextmanager
def _standing_in(folder: Path, module: types.ModuleType) -> Generator[None]:
    """The page's folder as the working directory and first on the path, with what it imports forgotten afterwards."""
    before, known = Path.cwd(), set(sys.modules)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))
        for name in set(sys.modules) - known:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith(str(folder)):
                del sys.modules[name]
        sys.modules.pop(module.__name__, None)


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# --- commands -------------------------------------------------------------------------------------------------------


class Started:
    """A command in the background, and what it has printed."""

    def __init__(self, command: str, cwd: Path, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            shlex.split(command),
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.shown = ""

    def until(self, expected: str) -> None:
        """Read until everything that is expected has come, or the end."""
        deadline = time.monotonic() + COMMAND_SECONDS
        while not matches(expected, self.shown) and self._read(deadline):
            pass

    def rest(self) -> None:
        """Read to the end."""
        deadline = time.monotonic() + COMMAND_SECONDS
        while self._read(deadline):
            pass
        self.process.wait()

    def _read(self, deadline: float) -> bool:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        piece = os.read(self.process.stdout.fileno(), 65536) if ready else b""
        self.shown += piece.decode("utf-8", "replace")
        return bool(piece)

    def close(self) -> None:
        """End it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Shell:
    """One bash for a page, so that ``cd``, ``export`` and ``$?`` work as they do for the reader."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bash: subprocess.Popen[bytes] | None = None
        self._background: list[Started] = []
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RIDETHROUGH_")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder),
            "LC_ALL": "C.UTF-8",
        }

    @property
    def cwd(self) -> Path:
        """The working directory now."""
        return self._folder if self._bash is None else Path(self.run("pwd")[1].strip())

    def run(self, command: str) -> tuple[int, str]:
        """Execute a command; its status, and all that it printed."""
        bash = self._open()
        assert bash.stdin is not None
        assert bash.stdout is not None
        mark = f"--end-{os.urandom(6).hex()}"
        bash.stdin.write(f"{{ {command}\n}} </dev/null; __s=$?; echo; echo {mark} $__s; (exit $__s)\n".encode())
        bash.stdin.flush()
        return self._until_mark(bash, mark)

    def _open(self) -> subprocess.Popen[bytes]:
        if self._bash is None:
            self._bash = subprocess.Popen(
                ["bash", "--noprofile", "--norc"],
                cwd=self._folder,
                env=self.env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        return self._bash

    def _until_mark(self, bash: subprocess.Popen[bytes], mark: str) -> tuple[int, str]:
        assert bash.stdout is not None
        deadline, shown = time.monotonic() + COMMAND_SECONDS, ""
        while (end := re.search(rf"\n{mark} (\d+)\n", shown)) is None:
            ready, _, _ = select.select([bash.stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(bash.stdout.fileno(), 65536) if ready else b""
            if not piece:
                raise Wrong(f"the command did not end within {COMMAND_SECONDS:g} s:\n{shown}")
            shown += piece.decode("utf-8", "replace")
        return int(end[1]), shown[: end.start()]

    def start(self, command: str, expected: str) -> Started:
        """Execute a command in the background until the page ends; returns when what is expected has come."""
        started = Started(command, self.cwd, self.env)
        self._background.append(started)
        started.until(expected)
        return started

    def kill(self, command: str, expected: str, kind: str) -> str:
        """Execute a command and end it by a signal: SIGKILL when all that is expected has come, SIGINT when that is
        which stands before the first line ``...`` (the rest is what it says then)."""
        first = expected if kind == "9" else expected.partition("\n...\n")[0] + "\n...\n"
        started = self.start(command, first)
        started.process.send_signal(signal.SIGKILL if kind == "9" else signal.SIGINT)
        if kind == "9":
            return started.shown  # what came in the same breath is not read
        started.rest()
        return started.shown

    def close(self) -> None:
        """End the shell and what was started."""
        for started in self._background:
            started.close()
        if self._bash is not None:
            assert self._bash.stdin is not None
            assert self._bash.stdout is not None
            self._bash.stdin.close()
            self._bash.stdout.close()
            self._bash.wait()
