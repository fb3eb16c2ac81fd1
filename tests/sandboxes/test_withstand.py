"""What runs withstand: each attack is a tool call, beside a sibling in the same sandbox and another run in another one.

At the end (``make soak``): a Docker engine of the tests' own dies, stops or hangs in the middle of calls.

A *battle* is that arrangement. The sibling's program runs from before the attack until after it, the bystander works
all the while; both have to finish right. What the attack is told must name the limit, or be an error that says what
became of the sandbox. Then the processes of the sandbox must be those of before; and when the runs have ended there
must be no container, no process in its control groups, and (at the end of the module) no descriptor or thread too many.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio.abc import TaskGroup
from tests.agents.support import PATIENCE, Scripted, call
from tests.sandboxes.inside import running
from tests.sandboxes.test_runs import all_removed, begin_life, nothing_left, started, until

from ridethrough import Agent, Runtime, ToolContext, tool
from ridethrough.runtime.config import parse_config
from ridethrough.runtime.errors import SandboxError
from ridethrough.runtime.runtime import Run
from ridethrough.sandboxes.container import container_name
from ridethrough.sandboxes.engine import THREADS
from ridethrough.tools import builtin
from ridethrough.tools.tool import Tool

pytestmark = [pytest.mark.anyio, pytest.mark.processes]

CONFIG = """\
durability = "process"
reaper_seconds = 3600
[sandboxes.python]
memory = "96m"
pids = 48
disk = "16m"
warm = 2
[sandboxes.roomy]
warm = 0
[sandboxes.tight]
memory = "64m"
disk = "64m"
warm = 0
"""
"""``roomy`` has the defaults; the disk of ``tight`` is larger than the memory that it lives in."""

COUNT = """
import sys, threading
total = 0
def count():
    global total
    for number in range(10**6):
        total += number
thread = threading.Thread(target=count)
thread.start()
print("begun", flush=True)
sys.stdin.readline()
thread.join()
print(total)
"""
COUNTED = f"begun\n{sum(range(10**6))}\n"

CENSUS = """
import glob, json
found = []
for path in glob.glob("/proc/[0-9]*/stat"):
    try:
        with open(path) as file:
            name, _, rest = file.read().partition("(")[2].rpartition(")")
    except OSError:
        continue
    if not rest.startswith(" Z"):
        found.append(name)
print(json.dumps(sorted(found)))
"""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One event loop for the module, since it shares a runtime."""
    return "asyncio"


def resources() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.fixture(scope="module")
async def runtime(tmp_path_factory: pytest.TempPathFactory, engine: Any, python_image: str) -> AsyncGenerator[Runtime]:
    """One runtime for all battles; when it closes nothing of it may be left in this process."""
    before = resources()
    where = f"sqlite:///{tmp_path_factory.mktemp('withstand') / 'runs.db'}"
    async with Runtime.open(where, config=parse_config(CONFIG), grace=0.0) as opened:
        yield opened
        left = [row.id for row in await opened.store.read(opened.store.sandboxes) if row.run_id is not None]
    for sandbox_id in left:  # of a test that has failed
        engine.remove_container(container_name(sandbox_id), force=True)
    assert not left
    after = resources()
    assert after[0] <= before[0] + 2, f"descriptors: {before[0]}, then {after[0]}"
    assert after[1] <= before[1] + THREADS, f"threads: {before[1]}, then {after[1]}"


@pytest.fixture
def onlooker(engine: Any) -> Iterator[Any]:
    """A client that looks from beside, and keeps no connection: they are counted."""
    from docker import APIClient

    with closing(APIClient(version="auto")) as client:
        yield client


# --- who runs where -------------------------------------------------------------------------------------------------


def processes_of(container: str) -> list[int]:
    """The processes in a container's control groups, whatever they call themselves."""
    found: list[int] = []
    for each in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state = (each / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and container in (each / "cgroup").read_text():
                found.append(int(each.name))
    return found


def exists(engine: Any, container: str) -> bool:
    return any(each["Id"] == container for each in engine.containers(all=True))


@dataclass
class Told:
    """What came of a battle."""

    attack: str
    sibling: str
    bystander: str
    next: str
    after: str
    before_census: list[str]
    after_census: list[str]


@dataclass
class Battle:
    """An attack, its sibling and its bystander; ``containers`` are the ids of all that were in it."""

    runtime: Runtime
    engine: Any
    profile: str = "python"
    containers: set[str] = field(default_factory=set[str])
    ready: set[str] = field(default_factory=set[str])
    changed: anyio.Event = field(default_factory=anyio.Event)
    over: anyio.Event = field(default_factory=anyio.Event)
    outside: TaskGroup = field(init=False)
    one: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))

    # --- tools ------------------------------------------------------------------------------------------------------

    def sibling(self) -> Tool[..., Any]:
        @tool("sibling", "Count while others do what they do.", confined=True, timeout=90)
        async def sibling(ctx: ToolContext) -> str:
            process = await ctx.sandbox.start(["python3", "-uc", COUNT], timeout=60, stdin=True)
            async for output in process.output():
                assert output.data.startswith(b"begun")
                break
            await self.arrived("sibling", ctx)
            await self.over.wait()
            await process.write(b"go\n")
            result = await process.wait()
            return f"{result.exit_code} {result.limit} {result.stdout}"

        return sibling

    def bystander(self) -> Tool[..., Any]:
        @tool("bystander", "Work on and on, until the others are done.", confined=True, timeout=90)
        async def bystander(ctx: ToolContext) -> str:
            await self.arrived("bystander", ctx)
            rounds = 0
            while not self.over.is_set() or rounds < 3:
                result = await ctx.sandbox.exec(["sh", "-c", "cat; echo $$ > pid"], stdin=f"{rounds}", timeout=20)
                assert (result.stdout, result.exit_code) == (f"{rounds}", 0)
                await ctx.sandbox.write("note", f"{rounds}")
                assert await ctx.sandbox.read("note") == f"{rounds}".encode()
                rounds += 1
            return "worked"

        return bystander

    def attack(self, timeout: float, then: Callable[[str], Coroutine[Any, Any, None]] | None) -> Tool[..., Any]:
        @tool("attack", "Run a line as the tool shell does, once the others are there.", confined=True, timeout=90)
        async def attack(line: str, ctx: ToolContext) -> str:
            await self.arrived("attack", ctx)
            await self.all_there()
            if then is not None:
                self.outside.start_soon(then, ctx.sandbox.id)
            try:
                told: str = await builtin.shell.function(line, ctx, timeout)
            finally:
                self.over.set()
            return told

        return attack

    def census(self) -> Tool[..., Any]:
        @tool("census", "Who is there?", confined=True, effect="read")
        async def census(ctx: ToolContext) -> str:
            return (await ctx.sandbox.exec(["python3", "-c", CENSUS])).stdout

        return census

    async def arrived(self, who: str, ctx: ToolContext) -> None:
        await ctx.sandbox.stat(".")
        name = container_name(ctx.sandbox.id)
        found = await anyio.to_thread.run_sync(self.engine.inspect_container, name, limiter=self.one)
        self.containers.add(found["Id"])
        self.ready.add(who)
        self.changed.set()

    async def all_there(self) -> None:
        while len(self.ready) < 3:
            self.changed = anyio.Event()
            await self.changed.wait()

    # --- the runs ---------------------------------------------------------------------------------------------------

    async def fight(
        self,
        line: str,
        *,
        timeout: float = 20.0,
        after: str = "echo still here",
        then: Callable[[str], Coroutine[Any, Any, None]] | None = None,
        patience: float = PATIENCE,
    ) -> Told:
        """See both runs through, and that nothing is left of them."""
        attacks = Scripted(
            call("census"),
            [call("attack", line=line), call("sibling")],
            call("shell", command=after),
            call("shell", command=after),
            call("census"),
            "done",
        )
        tools = [self.attack(timeout, then), self.sibling(), self.census(), builtin.shell]
        attackers = Agent("attacker", model=attacks, tools=tools, sandbox=self.profile)
        works = Scripted(call("bystander"), "done")
        workers = Agent("worker", model=works, tools=[self.bystander()])
        with anyio.fail_after(patience):
            async with anyio.create_task_group() as self.outside:
                other = await self.runtime.start(workers, "go")
                run = await self.runtime.start(attackers, "go")
                try:
                    await run.result()
                finally:
                    self.over.set()
                await other.result()
                await self.nothing_left(run, other)
        told = [message.text for message in attacks.requests[-1].messages if message.role == "tool"]
        first, attack, sibling, next, after, last = told
        return Told(attack, sibling, works.results[0], next, after, _census(first), _census(last))

    async def nothing_left(self, *runs: Run[Any]) -> None:
        for run in runs:
            await until(partial(all_removed, self.runtime, run.id))
        for container in self.containers:
            assert not exists(self.engine, container)
            assert not processes_of(container)


def _census(text: str) -> list[str]:
    found: list[str] = json.loads(text)
    return found


@pytest.fixture
def battle(runtime: Runtime, onlooker: Any) -> Battle:
    return Battle(runtime, onlooker)


def unharmed(told: Told) -> None:
    """Sibling and bystander have finished right, the sandbox is there, and so are its processes of before alone."""
    assert told.sibling == f"0 None {COUNTED}"
    assert told.bystander == "worked"
    assert told.next == told.after == "still here"
    assert told.after_census == told.before_census


# --- what takes all it can get --------------------------------------------------------------------------------------

HIDE = """
import ctypes, os, signal, sys, time
for number in set(range(1, 65)) - {9, 19, 32, 33}:
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
for child in range(4):
    if not os.fork():
        os.setsid()
        if os.fork(): os._exit(0)
        ctypes.CDLL(None).prctl(15, b"kworker/0:1", 0, 0, 0)
        os.closerange(0, 64)
        os.chdir("/")
        if child == 3:
            os.execve("/bin/sleep", ["[hidden]", "1000"], {})
        while True: time.sleep(1000)
print("hidden", flush=True)
while True: time.sleep(1000)
"""


def python(code: str) -> str:
    """A line of shell for a program."""
    return f"exec python3 - <<'END'\n{code}\nEND"


LIMITED: dict[str, tuple[str, float, str]] = {
    "a fork bomb": (python("import os\nwhile True: os.fork()"), 20, "[ended: it started more than the 48 processes"),
    "a bomb of threads": (
        python(
            "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()"
        ),
        20,
        "[ended: it started more than the 48 processes",
    ),
    "a memory hog": (python("x = b'x' * 10**9"), 20, "[ended: it needed more than the sandbox's memory of 96 MiB]"),
    "a hog of memory piece by piece": (
        python("x = []\nwhile True: x.append(b'x' * 10**6)"),
        20,
        "[ended: it needed more than the sandbox's memory of 96 MiB]",
    ),
    "a disk filler": ("exec dd if=/dev/zero of=filler bs=64k", 20, "the disk of 16 MiB was full"),
    "a filler of /tmp": ("exec dd if=/dev/zero of=/tmp/filler bs=64k", 20, "the disk of 16 MiB was full"),
    "a sparse file": ("truncate -s 1T filler && exec dd if=/dev/zero of=filler bs=64k", 20, "disk of 16 MiB was full"),
    "endless output": ("exec yes", 20, "[ended: it wrote more output than is allowed"),
    "endless errors": ("exec yes >&2", 20, "[ended: it wrote more output than is allowed"),
    "endless zeros": ("exec cat /dev/zero", 20, "[ended: it wrote more output than is allowed"),
    "a spinner": ("while :; do :; done", 1, "[ended after 1 s, its deadline"),
    "ten spinners": ("for i in 1 2 3 4 5 6 7 8 9 10; do (while :; do :; done) & done; wait", 1, "[ended after 1 s"),
    "a bomb that does not give up": (
        python("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"),
        1,
        "[ended after 1 s, its deadline",
    ),
    "one that hides": (python(HIDE), 1, "hidden\n[ended after 1 s, its deadline"),
}


@pytest.mark.parametrize("name", LIMITED)
async def test_what_takes_all_it_can_get_meets_its_limit_and_harms_nobody(battle: Battle, name: str) -> None:
    line, timeout, says = LIMITED[name]
    told = await battle.fight(line, timeout=timeout, after="rm -f filler /tmp/filler; echo still here")
    assert says in told.attack
    assert len(told.attack) < 200_000
    unharmed(told)


async def test_a_disk_larger_than_the_memory_it_lives_in(runtime: Runtime) -> None:
    """Where files take all memory nothing can be started any more: that is told of each call, and a file call helps."""
    fill = "dd if=/dev/zero of=filler bs=64k; dd if=/dev/zero of=/tmp/filler bs=64k; echo survived"
    model = Scripted(
        call("shell", command=fill),
        call("shell", command="echo stuck"),
        [call("write_file", id=path, path=path, content="") for path in ("filler", "/tmp/filler")],
        call("shell", command="echo still here"),
        "done",
    )
    agent = Agent("filler", model=model, tools=[builtin.shell, builtin.write_file], sandbox="tight")
    with anyio.fail_after(PATIENCE):
        run = await runtime.start(agent, "go")
        await run.result()
        await until(lambda: all_removed(runtime, run.id))
    told = [message.text for message in model.requests[-1].messages if message.role == "tool"]
    for text in told[:2]:
        assert text.endswith("[ended: it needed more than the sandbox's memory of 64 MiB]"), told
    assert told[-1] == "still here", told


# --- what is written in the sandbox and comes here ------------------------------------------------------------------

OUTSIDE = ("/x", "/etc/passwd", "/usr/bin/x", "/root/x", "/var/lib/x", "/proc/sys/kernel/hostname", "/sys/fs/cgroup/x")


async def test_writes_outside_of_the_workspace_are_refused_one_and_all(battle: Battle) -> None:
    line = "".join(f"( : > {path} ) 2>&1 || echo refused; " for path in OUTSIDE)
    told = await battle.fight(line)
    assert told.attack.splitlines().count("refused") == len(OUTSIDE)
    unharmed(told)


async def test_output_of_any_bytes_is_told_and_kept(battle: Battle) -> None:
    """Bytes that are no text, controls, halves of characters at the place where output is cut."""
    line = r"head -c 300000 /dev/urandom; printf 'x\0\377\376\355\240\200\033[2J\r\342\202'; printf '\360\237\222' >&2"
    told = await battle.fight(line)
    assert "�" in told.attack
    told.attack.encode()  # it can be sent to any model
    unharmed(told)


LINKS = """
ln -s /etc out; ln -s /etc/passwd file; ln -s loop loop; mkfifo pipe; ln -s ../../../../../../etc up; mkdir -p deep
ln -s /proc/self proc; ln -s /proc/1/fd fds; ln -s /dev/zero zero; ln -s /run/ridethrough run
head -c 100 /dev/urandom > binary; printf 'x' > "$(printf 'odd\\377\\n')"; echo made
"""
ELSEWHERE = (
    "out/passwd",
    "file",
    "up/passwd",
    "loop",
    "pipe",
    "proc/environ",
    "fds/0",
    "zero",
    "run/s",
    "deep/../../x",
)
ABSOLUTE = (
    "/etc/passwd",
    "/proc/self/environ",
    "/dev/zero",
    "../etc/passwd",
    "/tmp/../etc/passwd",
    "~/x",
    "a\0b",
    "x" * 5000,
)


async def test_file_tools_do_not_go_where_links_and_paths_would_lead_them(runtime: Runtime) -> None:
    paths = [*ELSEWHERE, *ABSOLUTE]
    tricks = [call("read_file", id=f"r{n}", path=path) for n, path in enumerate(paths)]
    tricks += [call("write_file", id=f"w{n}", path=path, content="harm") for n, path in enumerate(ELSEWHERE)]
    tricks += [call("edit_file", id=f"e{n}", path=path, old="root", new="harm") for n, path in enumerate(ELSEWHERE)]
    tricks += [call("list_files", id=f"l{n}", path=path) for n, path in enumerate((*ELSEWHERE, "/etc", "..", "a\0b"))]
    model = Scripted(
        call("shell", command=LINKS),
        [*tricks, call("shell", id="sibling", command="echo unharmed")],
        call("shell", command="cat /etc/passwd | grep -c harm; cat binary | wc -c; echo still here"),
        "done",
    )
    tools: list[Tool[..., Any]] = [builtin.shell, builtin.read_file, builtin.write_file, builtin.edit_file]
    agent = Agent("reader", model=model, tools=[*tools, builtin.list_files])
    with anyio.fail_after(PATIENCE):
        run = await runtime.start(agent, "go")
        await run.result()
        await until(lambda: all_removed(runtime, run.id))
    told = {m.tool_call_id: m for m in model.requests[-1].messages if m.role == "tool"}
    for trick in tricks:
        text = told[trick.id].text
        assert "root:x:" not in text, (trick, text)
        assert told[trick.id].is_error, (trick, text)
    assert told["sibling"].text == "unharmed"
    assert model.results == ["0\n100\nstill here"]


async def test_a_search_does_not_go_where_links_and_paths_would_lead_it(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it wait for what has no end."""
    monkeypatch.setattr("ridethrough.tools.builtin.searching.DEADLINE", 1.0)
    paths = ("out", "up", "file", "proc/environ", "pipe", "zero", "/etc", "..")
    searches = [call("search_files", id=path, pattern="[oO]", path=path) for path in paths]
    tools: list[Tool[..., Any]] = [builtin.shell, builtin.search_files]
    model = Scripted(call("shell", command=LINKS), searches, call("shell", command="echo still here"), "done")
    with anyio.fail_after(PATIENCE):
        run = await runtime.start(Agent("searcher", model=model, tools=tools), "go")
        await run.result()
        await until(lambda: all_removed(runtime, run.id))
    told = {m.tool_call_id: m for m in model.requests[-1].messages if m.role == "tool"}
    assert {path for path in paths if not told[path].is_error} == set()  # those would show what is outside
    assert {path for path in paths if "took more than" in told[path].text} == set()
    assert model.results == ["still here"]


FLIP = """
import os, sys
os.makedirs("real/d"); open("real/d/passwd", "w").write("inside")
os.symlink("/etc", "link")
os.rename("real/d", "d")
print("flipping", flush=True)
while True:
    os.rename("d", "real/d"); os.rename("link", "d"); os.rename("d", "link"); os.rename("real/d", "d")
"""


async def test_a_folder_that_becomes_a_link_and_back_while_files_are_called(runtime: Runtime) -> None:
    """Whatever the moment, a file call finds what is inside or is refused."""

    @tool(confined=True, timeout=60)
    async def race(ctx: ToolContext) -> dict[str, int]:
        """Call files while a program changes what their names mean."""
        process = await ctx.sandbox.start(["python3", "-uc", FLIP], timeout=60)
        async for output in process.output():
            assert output.data.startswith(b"flipping")
            break
        seen: Counter[str] = Counter()
        for number in range(400):
            try:
                await ctx.sandbox.write("d/passwd", f"w{number}")
                data = await ctx.sandbox.read("d/passwd")
                seen["inside" if data.startswith(b"w") else "outside"] += 1
            except SandboxError:
                seen["refused"] += 1
        await process.kill()
        return dict(seen)

    model = Scripted([call("race"), call("shell", command="echo unharmed")], "done")
    with anyio.fail_after(2 * PATIENCE):
        run = await runtime.start(Agent("racer", model=model, tools=[race, builtin.shell]), "go")
        await run.result()
        await until(lambda: all_removed(runtime, run.id))
    seen: dict[str, int] = json.loads(model.results[0])
    assert set(seen) <= {"inside", "refused"}, seen
    assert sum(seen.values()) == 400
    assert model.results[1] == "unharmed"


MANY = """
import os
os.mkdir("many")
for number in range(100_000):
    os.close(os.open(f"many/{number:06d}", os.O_CREAT))
print("made")
"""


async def test_a_hundred_thousand_files_are_listed_searched_archived_and_removed(runtime: Runtime) -> None:
    """Within the deadlines, while a sibling works; what is too large is refused, not begun and never ended."""

    @tool(confined=True, timeout=60)
    async def keep(ctx: ToolContext) -> str:
        """Archive the workspace, if that is allowed; then remove the files."""
        try:
            snapshot = await ctx.sandbox.snapshot()
            told = f"kept {snapshot.files > 100_000}"
        except SandboxError as error:
            told = f"refused: {error}"
        await ctx.sandbox.remove("many")
        return told

    model = Scripted(
        call("python", code=MANY),
        [
            call("list_files", path="many"),
            call("list_files", id="all", path=".", pattern="*9999"),
            call("search_files", pattern="nothing", path="many"),
            call("shell", command="echo unharmed"),
        ],
        call("keep"),
        call("shell", command="ls | wc -l"),
        "done",
    )
    tools: list[Tool[..., Any]] = [builtin.python, builtin.shell, builtin.list_files, builtin.search_files, keep]
    with anyio.fail_after(2 * PATIENCE):
        run = await runtime.start(Agent("hoarder", model=model, tools=tools, sandbox="roomy"), "go")
        await run.result()
        await until(lambda: all_removed(runtime, run.id))
    told = [message.text for message in model.requests[-1].messages if message.role == "tool"]
    assert told[0].startswith("made")
    assert "many/000000" in told[1] or "000000" in told[1]
    assert all(len(each) < 200_000 for each in told)
    assert "unharmed" in told
    assert told[-2].startswith(("kept True", "refused")), told[-2]
    assert told[-1] == "0"


RAW = {
    "deep": "'[' * 200_000 + ']' * 200_000",
    "fairly deep": "'{\"value\": ' + '[' * 900 + ']' * 900 + '}'",
    "half a character": '\'{"value": "\\\\ud800x"}\'',
    "a nul": '\'{"value": "a\\\\u0000b"}\'',
    "infinite": "'{\"value\": 1e999}'",
    "a long number": "'{\"value\": ' + '9' * 10_000 + '}'",
    "no value": "'{}'",
    "no object": "'[1]'",
    "a text": "'\"value\"'",
    "errors that are none": '\'{"error": [1], "message": {"a": 1}}\'',
    "too long": "'{\"value\": \"' + 'x' * (20 << 20) + '\"}'",
    "no text": "'\\udcff\\udcfe'",
    "nothing": "''",
}


@tool(sandbox="python", timeout=20)
def lie(code: str) -> str:
    """Say something else than what the body's runner would have said."""
    import os

    data = eval(code).encode("utf-8", "surrogateescape")
    with open(3, "wb", closefd=False) as answer:
        answer.write(data)
    os._exit(0)


@tool(sandbox="python", timeout=20)
def greedy(what: str) -> str:
    """Take all there is of something."""
    import os
    import sys
    import time

    if what == "memory":
        return str(len(b"x" * 10**9))
    while what == "pids":
        if not os.fork():
            time.sleep(100)
    while what == "output":
        sys.stderr.write("x" * 10**6)
    with open("filler", "wb") as filler:
        while True:
            filler.write(bytes(10**6))


async def test_values_of_bodies_may_be_anything(runtime: Runtime) -> None:
    """What a body says in the place of its value is an answer or an error of that call, and is kept."""
    model = Scripted([call("lie", id=name, code=code) for name, code in RAW.items()], "done")
    with anyio.fail_after(PATIENCE):
        run = await runtime.start(Agent("liar", model=model, tools=[lie]), "go")
        await run.result()
        await until(lambda: all_removed(runtime, run.id))
    told = {message.tool_call_id: message for message in model.requests[-1].messages if message.role == "tool"}
    assert len(told) == len(RAW)
    for name in ("deep", "no value", "no object", "a text", "too long", "no text", "nothing", "a long number"):
        assert told[name].is_error, (name, told[name].text[:200])
    for message in told.values():
        message.text.encode()
        assert len(message.text) < 200_000
    assert (await run.view()).status == "done"


async def test_a_body_that_takes_all_it_can_get_is_told_its_limit(runtime: Runtime) -> None:
    limits = ("memory", "pids", "output", "disk")
    model = Scripted(*(call("greedy", what=what) for what in limits), "done")
    with anyio.fail_after(2 * PATIENCE):
        run = await runtime.start(Agent("greedy", model=model, tools=[greedy]), "go")
        await run.result()
        await until(lambda: all_removed(runtime, run.id))
    told = [message.text for message in model.requests[-1].messages if message.role == "tool"]
    for what, text in zip(limits, told, strict=True):
        assert text.startswith(f"greedy was ended by the sandbox's limit of {what}."), text


# --- what takes the sandbox with it ---------------------------------------------------------------------------------


async def lost(battle: Battle, line: str, says: str, *, late: bool = False, **options: Any) -> None:
    """Fight where the sandbox does not survive: its calls are told, the next one gets another sandbox.

    Where the attack is told no more than that it came ``late``, the next call is told what became of the sandbox.
    """
    told = await battle.fight(line, **options)
    assert ("its deadline" if late else "is gone") in told.attack, told
    assert "is gone" in told.sibling, told
    assert says in told.sibling, told
    assert told.bystander == "worked"
    assert "is gone" in told.next if late else told.next == "still here", told
    assert told.after == "still here"
    assert told.after_census == told.before_census


DEADLY = {
    "the supervisor is killed": ("kill -9 $PPID; sleep 100", "killed from inside"),
    "everything is killed": ("kill -9 -1; sleep 100", "killed from inside"),
    "a lie about a length": (r"printf '\377\377\377\377\377\377\377\377' > /proc/1/fd/1; sleep 100", "protocol"),
    "noise": ("head -c 100000 /dev/urandom > /proc/1/fd/1; sleep 100", "protocol"),
    "endless zeros": ("cat /dev/zero > /proc/1/fd/1; sleep 100", "protocol"),
    "a frame that answers nothing": (
        r"""printf '\0\0\0\015\0\0\0\0{"n":99999999}' > /proc/1/fd/1; sleep 100""",
        "protocol",
    ),
}


@pytest.mark.parametrize("name", DEADLY)
async def test_what_takes_the_sandbox_with_it_is_told_and_takes_nothing_else(battle: Battle, name: str) -> None:
    """The init's output is the supervisor's connection, and code inside can write to it: so it can lie in its name."""
    line, says = DEADLY[name]
    await lost(battle, line, says)


SILENT = {
    "the supervisor is stopped": "kill -STOP $PPID; sleep 100",
    "a length that never comes": r"printf '\0\0\0\100\0\3\0\0{' > /proc/1/fd/1; sleep 100",
}


@pytest.mark.parametrize("name", SILENT)
async def test_a_supervisor_that_is_not_heard_of_any_more(
    battle: Battle, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ridethrough.sandboxes.command.MARGIN", 0.5)
    await lost(battle, SILENT[name], "did not answer", timeout=0.5, late=True)


@pytest.mark.parametrize("how", ["rm", "kill", "pause"])
async def test_a_container_that_somebody_else_removes_kills_or_pauses(
    battle: Battle, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ridethrough.sandboxes.command.MARGIN", 0.5)

    async def then(sandbox_id: str) -> None:
        argv = ["docker", how, *(["-f"] if how == "rm" else []), container_name(sandbox_id)]
        await anyio.run_process(argv)

    paused = how == "pause"
    says = "did not answer" if paused else "was removed"
    await lost(battle, "sleep 100", says, timeout=1 if paused else 20, then=then, late=paused)


# --- when the worker dies -------------------------------------------------------------------------------------------


async def test_results_that_came_while_there_was_no_worker_are_used(
    tmp_path: Path, onlooker: Any, python_image: str
) -> None:
    """Twenty calls end in the sandbox after the SIGKILL and before the next worker: none is made again."""
    calls, seconds = 20, 2.0
    first = begin_life(tmp_path, calls, seconds, "docker")
    try:
        await until(lambda: started(tmp_path, calls))
        container = await anyio.to_thread.run_sync(container_with_all, onlooker, "begin", calls)
        os.kill(first.pid, signal.SIGKILL)
    finally:
        first.communicate(timeout=20)
    await anyio.to_thread.run_sync(container_with_all, onlooker, "end", calls, container)
    second = begin_life(tmp_path, calls, seconds, "docker")
    out, _ = await anyio.to_thread.run_sync(lambda: second.communicate(timeout=60))
    assert second.returncode == 0, out
    told = out.partition("result: ")[2].splitlines()
    assert told[:calls] == [f"done {number}" for number in range(calls)], out
    written = Counter(told[calls].strip("[]").replace('"', "").split(","))
    assert written == Counter({f"{what} {number}": 1 for what in ("begin", "end") for number in range(calls)})
    assert nothing_left(tmp_path, "docker")
    assert not exists(onlooker, container)
    assert not processes_of(container)


def container_with_all(engine: Any, what: str, calls: int, container: str = "") -> str:
    """Wait until the ledger of ``life.py`` has all lines of a kind; the container that it is in."""
    deadline = threading.Event()
    timer = threading.Timer(PATIENCE, deadline.set)
    timer.start()
    try:
        while not deadline.is_set():
            names = [container] if container else [each["Id"] for each in engine.containers()]
            for name in names:
                asked = ["docker", "exec", name, "grep", "-c", f"^{what} ", "/workspace/ledger"]
                if subprocess.run(asked, capture_output=True, text=True).stdout.strip() == str(calls):
                    return name
    finally:
        timer.cancel()
    raise AssertionError(f"not {calls} lines of {what} within {PATIENCE:g} s")


# --- an engine that is restarted ------------------------------------------------------------------------------------


class Daemon:
    """A Docker engine of this module's own, with its own containerd and its own network namespace: without a bridge of
    its own it would remove the one that it finds."""

    def __init__(self, image: str) -> None:
        """Start it, and give it an image of the machine's engine."""
        self.folder = Path(tempfile.mkdtemp(prefix="rt-", dir="/var/tmp"))
        self.url = f"unix://{self.folder}/sock"
        self.live_restore = False
        self.start()
        saved = subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE)
        subprocess.run(["docker", "-H", self.url, "load", "-q"], stdin=saved.stdout, check=True, timeout=120)
        assert saved.stdout is not None
        saved.stdout.close()
        assert saved.wait() == 0

    def start(self) -> None:
        (self.folder / "daemon.json").write_text(json.dumps({"live-restore": self.live_restore}))
        name = self.folder.name
        argv = ["unshare", "--net", "--", "dockerd", "-H", self.url, "--config-file", f"{self.folder}/daemon.json"]
        argv += ["--data-root", f"{self.folder}/data", "--exec-root", f"{self.folder}/exec"]
        argv += ["--pidfile", f"{self.folder}/pid", "--bridge", "none", "--iptables=false", "--ip-masq=false"]
        argv += ["--containerd-namespace", name, "--containerd-plugins-namespace", f"{name}-plugins"]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE
        while subprocess.run(["docker", "-H", self.url, "version"], capture_output=True).returncode != 0:
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def end(self, signal_number: int) -> None:
        """End it; its containerd ends with it. Where nobody reaps that, the next one would take it for alive."""
        self.process.send_signal(signal_number)
        self.process.wait(60)
        pid = self.folder / "exec/containerd/containerd.pid"
        while pid.exists() and int(pid.read_text()) in self.left():
            time.sleep(0.05)
        pid.unlink(missing_ok=True)

    def log(self) -> str:
        return (self.folder / "log").read_text()[-3000:]

    def containers(self) -> list[str]:
        argv = ["docker", "-H", self.url, "ps", "-aq", "--no-trunc"]
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout.split()

    def left(self) -> list[int]:
        """Processes that name its folder: its containerd, and a shim for each container."""
        return running(f"{self.folder}/")

    def close(self) -> None:
        """End it with all that it has, however it is, and remove its folder."""
        if self.process.poll() is None:
            for container in self.containers():
                subprocess.run(["docker", "-H", self.url, "rm", "-f", container], capture_output=True, timeout=60)
            self.end(signal.SIGTERM)
        for pid in self.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            if (where := line.split()[1]).startswith(f"{self.folder}/"):
                subprocess.run(["umount", "-l", where], check=True)
        shutil.rmtree(self.folder)


@pytest.fixture(scope="module")
def own_daemon(python_image: str) -> Iterator[Daemon]:
    daemon = Daemon(python_image)
    try:
        yield daemon
    finally:
        daemon.close()


@pytest.fixture
def daemon(own_daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """The engine that runtimes of the test use; at its end there is nothing in it."""
    monkeypatch.setenv("DOCKER_HOST", own_daemon.url)
    yield own_daemon
    if own_daemon.process.poll() is not None:
        own_daemon.start()  # for the next test
    assert own_daemon.containers() == []


def held(mark: str, begun: list[str]) -> Tool[..., Any]:
    @tool("held", "Sleep until somebody ends it.", confined=True, timeout=90)
    async def held(number: int, ctx: ToolContext) -> str:
        begun.append(ctx.sandbox.id)
        told: str = await builtin.shell.function(f"echo {number}; exec sleep {mark}{number}", ctx, 60)
        return told

    return held


RESTARTS = {
    "stopped": (signal.SIGTERM, False),
    "killed": (signal.SIGKILL, False),
    "stopped, its containers live on": (signal.SIGTERM, True),
    "killed, its containers live on": (signal.SIGKILL, True),
}


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", RESTARTS)
async def test_an_engine_that_is_restarted_in_the_middle_of_calls(tmp_path: Path, daemon: Daemon, how: str) -> None:
    """All calls are told in time; their runs wait for the engine, and go on when it is back."""
    signal_number, live_restore = RESTARTS[how]
    await restart(daemon, signal.SIGTERM, live_restore)
    mark, begun, models = f"10{os.getpid()}.", list[str](), list[Scripted]()
    where, text = f"sqlite:///{tmp_path / 'runs.db'}", 'durability = "process"\nreaper_seconds = 1\n'
    async with Runtime.open(where, config=parse_config(text), grace=0.0) as runtime:
        runs: list[Run[Any]] = []
        for first in (1, 4):
            calls = [call("held", id=f"h{number}", number=number) for number in range(first, first + 3)]
            again = call("shell", command="echo again")
            models.append(Scripted(calls, again, again, again, "done"))
            agent = Agent(f"a{first}", model=models[-1], tools=[held(mark, begun), builtin.shell])
            runs.append(await runtime.start(agent, "go"))
        await until(lambda: _all_run(mark, 6))
        daemon.end(signal_number)
        await until(lambda: _all_told(models))
        for run in runs:
            await until(partial(_waits, runtime, run.id))
        await anyio.to_thread.run_sync(daemon.start)
        with anyio.fail_after(2 * PATIENCE):
            for run in runs:
                await run.result()
        for model in models:
            told = [message for message in model.requests[-1].messages if message.role == "tool"]
            assert all("gone" in each.text or "engine" in each.text for each in told[:3]), told
            assert told[-1].text == "again"
        for run in runs:
            await until(partial(all_removed, runtime, run.id))
        assert not running(mark)


async def restart(daemon: Daemon, signal_number: int, live_restore: bool) -> None:
    if daemon.live_restore != live_restore:
        daemon.live_restore = live_restore
        await anyio.to_thread.run_sync(daemon.end, signal_number)
        await anyio.to_thread.run_sync(daemon.start)


async def _all_told(models: list[Scripted]) -> bool:
    return all(len(model.requests) > 1 for model in models)


async def _all_run(mark: str, count: int) -> bool:
    return len(running(f"sleep\0{mark}")) == count


async def _waits(runtime: Runtime, run_id: str) -> bool:
    return any(wait.kind == "sandbox" for wait in (await runtime.describe(run_id, steps=False)).waits)


@pytest.mark.soak
@pytest.mark.timeout(300)
async def test_an_engine_that_is_killed_while_sandboxes_are_made(tmp_path: Path, daemon: Daemon) -> None:
    """Runs that were about to get one get it when the engine is back; of those that were half made nothing is left."""
    await restart(daemon, signal.SIGTERM, False)
    where, text = f"sqlite:///{tmp_path / 'runs.db'}", 'durability = "process"\nreaper_seconds = 1\n'
    async with Runtime.open(where, config=parse_config(text), grace=0.0) as runtime:
        runs: list[Run[Any]] = []
        models = [Scripted(call("shell", command="echo made"), call("shell", command="echo made"), "done")] * 8
        for number, model in enumerate(models):
            runs.append(await runtime.start(Agent(f"a{number}", model=model, tools=[builtin.shell]), "go"))
        await until(lambda: anyio.to_thread.run_sync(lambda: len(daemon.containers()) >= 2))
        daemon.end(signal.SIGKILL)
        await anyio.to_thread.run_sync(daemon.start)
        with anyio.fail_after(3 * PATIENCE):
            for run in runs:
                await run.result()
        for run in runs:
            await until(partial(all_removed, runtime, run.id))


@pytest.mark.soak
@pytest.mark.timeout(300)
async def test_an_engine_that_hangs(tmp_path: Path, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call ends within its deadline and what is allowed for its removal; the run goes on when the engine does."""
    monkeypatch.setattr("ridethrough.sandboxes.command.MARGIN", 0.5)
    await restart(daemon, signal.SIGTERM, False)
    where, text = f"sqlite:///{tmp_path / 'runs.db'}", 'durability = "process"\nreaper_seconds = 1\n'

    @tool(confined=True, timeout=120)
    async def hang_it(ctx: ToolContext) -> str:
        """Run while the engine hangs."""
        await ctx.sandbox.exec(["true"])
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            told: str = await builtin.shell.function("sleep 100", ctx, 1)
        finally:
            hung.set()
        return told

    hung = anyio.Event()
    model = Scripted(call("hang_it"), call("shell", command="echo again"), call("shell", command="echo again"), "done")
    try:
        async with Runtime.open(where, config=parse_config(text), grace=0.0) as runtime:
            run = await runtime.start(Agent("a", model=model, tools=[hang_it, builtin.shell]), "go")
            with anyio.fail_after(3 * PATIENCE):
                await hung.wait()
                daemon.process.send_signal(signal.SIGCONT)
                await run.result()
            told = [message.text for message in model.requests[-1].messages if message.role == "tool"]
            assert told[-1] == "again"
            await until(lambda: all_removed(runtime, run.id))
    finally:
        daemon.process.send_signal(signal.SIGCONT)
