"""The built-in tools, each through a real sandbox: what a model is told, and that nothing is done twice."""

from __future__ import annotations

import ast
import gzip
import http.server
import tempfile
import threading
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import anyio
import pytest

from ridethrough import SandboxError, SandboxFileNotFound, Tool, ToolContext, ToolFailed
from ridethrough.runtime.errors import SandboxTimeout
from ridethrough.sandboxes.docker import DockerHost
from ridethrough.sandboxes.local import LocalHost
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import ExecResult, Host, Sandbox
from ridethrough.tools.builtin import (
    CODING_TOOLS,
    edit_file,
    fetch_url,
    list_files,
    python,
    read_file,
    search_files,
    shell,
    write_file,
)
from ridethrough.tools.builtin.files import fits
from ridethrough.tools.builtin.inside import edit, fetch, source
from ridethrough.tools.builtin.results import output_of, told
from ridethrough.tools.call_sandbox import CallSandbox

pytestmark = pytest.mark.anyio

LOCAL = SandboxProfile("python", kind="local")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])
"""What does not depend on the event loop."""


@asynccontextmanager
async def made_by(host: Host, profile: SandboxProfile) -> AsyncGenerator[Sandbox]:
    sandbox = await host.create(profile, id=f"builtin-{uuid4().hex[:12]}")
    try:
        yield sandbox
    finally:
        await sandbox.aclose()


@pytest.fixture
async def sandbox() -> AsyncGenerator[Sandbox]:
    with tempfile.TemporaryDirectory(prefix="rt-") as folder:  # the name of a socket may have a hundred characters
        async with LocalHost.open(runtime=folder) as host, made_by(host, LOCAL) as sandbox:
            yield sandbox


def context(sandbox: Sandbox) -> ToolContext:
    return ToolContext(run_id="r", call_id="c", idempotency_key="k", deps=None, sandbox=sandbox)


class Seen(CallSandbox):
    """A sandbox as one call sees it, with names for what the call starts."""

    def __init__(self, sandbox: Sandbox, call_id: str) -> None:
        async def find() -> Sandbox:
            return sandbox

        async def gone() -> None:
            pytest.fail("the sandbox has gone")

        super().__init__(LOCAL, find, call_id, stays=lambda: True, on_gone=gone)


async def use(tool: Tool[..., Any], sandbox: Sandbox, **arguments: Any) -> str:
    """Call a tool as the loop does: arguments are checked first."""
    parsed = tool.parameters.parse(arguments)
    text = await tool.function(ctx=context(sandbox), **parsed)
    assert isinstance(text, str)
    return text


# --- definitions ----------------------------------------------------------------------------------------------------


def test_what_they_are() -> None:
    tools = (*CODING_TOOLS, fetch_url)
    assert all(tool.confined and tool.is_async and tool.parameters.context == "ctx" for tool in tools)
    effects = {tool.name: tool.effect for tool in tools}
    assert {name for name, effect in effects.items() if effect == "write"} == {
        "shell", "python", "write_file", "edit_file"
    }  # fmt: skip
    assert set(effects.values()) == {"read", "write"}
    assert all(
        parameter.get("description") for tool in tools for parameter in tool.parameters.json["properties"].values()
    ), "every parameter is explained"


# --- shell ----------------------------------------------------------------------------------------------------------


async def test_shell(sandbox: Sandbox) -> None:
    assert await use(shell, sandbox, command="echo out; echo err >&2; echo again") == "out\nerr\nagain"
    assert await use(shell, sandbox, command="true") == "(no output)"
    assert await use(shell, sandbox, command="echo no; exit 3") == "no\n[exit status 3]"
    assert await use(shell, sandbox, command="cd / && A=1") == "(no output)"
    assert await use(shell, sandbox, command="echo ${A-none}; touch here; ls") == "none\nhere"
    assert await use(shell, sandbox, command="[[ abc == a* ]] && echo bash") == "bash"
    assert await use(shell, sandbox, command="cat") == "(no output)", "there is no input"


async def test_shell_past_its_deadline(sandbox: Sandbox) -> None:
    text = await use(shell, sandbox, command="echo begun; sleep 60 & sleep 60", timeout=0.5)
    assert text == "begun\n[ended after 0.5 s, its deadline; give a longer timeout, or do less at once]"
    with pytest.raises(ToolFailed, match=r"too long.*write_file"):
        await use(shell, sandbox, command="#" * 200_000)


@on_asyncio
async def test_shell_shows_both_ends_of_much_output(sandbox: Sandbox) -> None:
    text = await use(shell, sandbox, command="seq 1 400000")
    assert text.startswith("1\n2\n")
    assert text.endswith("\n400000")
    assert " bytes of output were not kept ...]" in text
    assert await use(shell, sandbox, command=r"printf 'a\xff\xfeb'") == "a\ufffd\ufffdb"


@pytest.mark.parametrize(
    ("result", "note"),
    [
        (ExecResult(137, limit="memory"), "[ended: it needed more than the sandbox's memory of 512 MiB]"),
        (ExecResult(1, b"fork failed", limit="pids"), "fork failed\n[ended: it started more than the 128 processes"),
        (ExecResult(1, limit="disk"), "[exit status 1: the disk of 256 MiB was full"),
        (ExecResult(1, limit="output"), "[ended: it wrote more output than is allowed"),
        (ExecResult(143, b"x\n"), "x\n[exit status 143]"),
    ],
)
def test_what_ended_a_command_is_told(result: ExecResult, note: str) -> None:
    assert told(result, SandboxProfile()).startswith(note)


def test_both_streams_and_what_is_missing() -> None:
    result = ExecResult(0, b"abcdef", b"E\n", truncated=True, stdout_total=106, stderr_total=2)
    assert output_of(result) == "abc\n[... 100 bytes of output were not kept ...]\ndef\nE"


# --- python ---------------------------------------------------------------------------------------------------------


async def test_python(sandbox: Sandbox) -> None:
    assert await use(python, sandbox, code="x = 5\nprint('é')\nx * 2") == "é\n10"
    assert await use(python, sandbox, code="x = 1") == "(no output)"
    assert await use(python, sandbox, code="'x' in globals()") == "False", "each call is a new interpreter"
    assert await use(python, sandbox, code="None\n") == "(no output)"
    assert await use(python, sandbox, code="import sys\nprint(1)\nprint(2, file=sys.stderr)\nprint(3)") == "1\n2\n3"
    assert await use(python, sandbox, code="import sys; sys.exit(4)") == "[exit status 4]"
    assert await use(python, sandbox, code="input()") == (
        'Traceback (most recent call last):\n  File "<code>", line 1, in <module>\n'
        "    input()\nEOFError: EOF when reading a line\n[exit status 1]"
    )


@on_asyncio
async def test_a_traceback_shows_the_code_and_nothing_of_ours(sandbox: Sandbox) -> None:
    text = await use(python, sandbox, code="def f():\n    return 1 / 0\n\nf()")
    assert text.startswith('Traceback (most recent call last):\n  File "<code>", line 4, in <module>\n    f()\n')
    assert "    return 1 / 0\n" in text
    assert text.endswith("ZeroDivisionError: division by zero\n[exit status 1]")
    assert text.count("File ") == 2
    wrong = await use(python, sandbox, code="x = = 1")
    assert wrong.startswith('  File "<code>", line 1\n    x = = 1\n')
    assert wrong.endswith("SyntaxError: invalid syntax\n[exit status 1]")


@on_asyncio
async def test_python_is_a_main_program(sandbox: Sandbox) -> None:
    code = (
        "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A)\n__name__, 'os' in globals()"
    )
    assert await use(python, sandbox, code=code) == "True\n('__main__', False)"
    await use(write_file, sandbox, path="mine.py", content="value = 7")
    await use(write_file, sandbox, path="linecache.py", content="raise SystemExit('not this one')")
    assert await use(python, sandbox, code="import mine\nmine.value") == "7"
    assert (await use(python, sandbox, code="while True: pass", timeout=0.5)).startswith("[ended after 0.5 s")


# --- read, write ----------------------------------------------------------------------------------------------------


async def test_write_and_read(sandbox: Sandbox) -> None:
    assert (
        await use(write_file, sandbox, path="a/b.txt", content="one\ntwo\nthree") == "Wrote a/b.txt: 3 lines, 13 bytes."
    )
    assert await use(read_file, sandbox, path="a/b.txt") == "     1\tone\n     2\ttwo\n     3\tthree"
    assert await use(read_file, sandbox, path="a/b.txt", offset=2, limit=1) == (
        "     2\ttwo\n[there is more: read on with offset=3]"
    )
    assert await use(read_file, sandbox, path="a/b.txt", offset=3) == "     3\tthree"
    assert await use(read_file, sandbox, path="a/b.txt", offset=9) == "(a/b.txt has 3 lines; there is no line 9)"
    await use(write_file, sandbox, path="a/b.txt", content="")
    assert await use(read_file, sandbox, path="a/b.txt") == "(a/b.txt is empty)"


async def test_what_cannot_be_read(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxFileNotFound, match=r"nowhere\.txt"):
        await use(read_file, sandbox, path="nowhere.txt")
    with pytest.raises(SandboxError):
        await use(read_file, sandbox, path="../../../etc/passwd")
    with pytest.raises(SandboxError):
        await use(write_file, sandbox, path="/etc/passwd", content="")
    await sandbox.write("picture", b"\x89PNG\0\0")
    with pytest.raises(ToolFailed, match="no text: it has 6 bytes of binary data"):
        await use(read_file, sandbox, path="picture")


@on_asyncio
async def test_long_files_and_lines(sandbox: Sandbox) -> None:
    await sandbox.write("wide", "x" * 5000 + "\r\nnext\r\n")
    wide = await use(read_file, sandbox, path="wide")
    assert wide == "     1\t" + "x" * 2000 + " [... 3000 characters more]\n     2\tnext"
    await sandbox.write("long", "".join(f"line {number}\n" for number in range(1, 200_001)))
    first = await use(read_file, sandbox, path="long", limit=100_000)
    assert len(first) < read_file.max_output
    offset = int(first.rpartition("offset=")[2].rstrip("]"))
    assert (await use(read_file, sandbox, path="long", offset=offset, limit=1)).startswith(
        f"{offset:>6}\tline {offset}\n"
    )
    assert await use(read_file, sandbox, path="long", offset=200_000) == "200000\tline 200000"
    await sandbox.write("odd", b"caf\xe9\n")
    assert await use(read_file, sandbox, path="odd") == "     1\tcaf\ufffd"


# --- edit -----------------------------------------------------------------------------------------------------------

PROGRAM = "def f(x):\n    return x + 1\n\n\ndef g(x):\n    return x + 1\n"


async def test_edit(sandbox: Sandbox) -> None:
    await sandbox.write("a.py", PROGRAM, mode=0o755)
    text = await use(
        edit_file, sandbox, path="a.py", old="def g(x):\n    return x + 1", new="def g(x):\n    return x + 2"
    )
    assert text == (
        "a.py: Changed in 1 place.\nIt reads now:\n"
        "     2\t    return x + 1\n     3\t\n     4\t\n     5\tdef g(x):\n     6\t    return x + 2"
    )
    assert (await sandbox.read("a.py")).decode() == PROGRAM[:-2] + "2\n"
    assert (await sandbox.stat("a.py")).mode & 0o777 == 0o755
    text = await use(edit_file, sandbox, path="a.py", old="return x", new="return -x", replace_all=True)
    assert text.startswith("a.py: Changed in 2 places.")
    assert (await sandbox.read("a.py")).count(b"return -x") == 2


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("return x + 1", "y", r"stands there 2 times, at lines 2, 6\. Give more"),
        ("def g(x):\n  return x + 1", "y", r"white space only:\n +2\t.*\n.*\n.*\n     5\tdef g\(x\):\n     6\t"),
        ("def gg(x):", "y", r"nearest lines are these:\n(.*\n)+     5\tdef g\(x\):"),
        ("never seen before, by anybody", "y", "nothing like it"),
        ("def h(x):", "def g(x):", "new is, at line 5: perhaps this edit was made before"),
        ("", "y", "old is empty"),
        ("x", "x", "old and new are the same"),
    ],
)
@on_asyncio
async def test_edits_that_are_not_made(sandbox: Sandbox, old: str, new: str, told: str) -> None:
    await sandbox.write("a.py", PROGRAM)
    with pytest.raises(ToolFailed, match=told):
        await use(edit_file, sandbox, path="a.py", old=old, new=new)
    assert (await sandbox.read("a.py")).decode() == PROGRAM
    assert [entry.path for entry in (await sandbox.list()).entries] == ["a.py"], "nothing is left beside it"


@on_asyncio
async def test_files_that_cannot_be_edited(sandbox: Sandbox) -> None:
    await use(
        shell, sandbox, command="mkdir folder; mkfifo pipe; ln -s /etc/hostname out; echo inside > a; ln -s a link"
    )
    for path, why in {
        "nowhere": "No such file or directory. write_file makes a new file",
        "folder": "is no file",
        "pipe": "is no file",
        "out": "outside of the workspace",
        "../" * 12 + "etc/passwd": "outside of the workspace",
        "/etc/passwd": "outside of the workspace",
    }.items():
        with pytest.raises(ToolFailed, match=why):
            await use(edit_file, sandbox, path=path, old="inside", new="outside")
    await use(edit_file, sandbox, path="link", old="inside", new="outside")
    assert await sandbox.read("a") == b"outside\n", "a link inside of the workspace is followed"


@on_asyncio
async def test_bytes_that_are_not_edited_stay_as_they_are(sandbox: Sandbox) -> None:
    await sandbox.write("odd", b"\xff\xfe one\r\ntwo\r\n\x00three\r\n")
    await use(edit_file, sandbox, path="odd", old="one\ntwo", new="1\n2\n2b")
    assert await sandbox.read("odd") == b"\xff\xfe 1\r\n2\r\n2b\r\n\x00three\r\n"


async def test_an_edit_that_is_run_again_is_made_once(sandbox: Sandbox) -> None:
    """After a crash the call is made again, under the same names; ``old`` is still there for a second edit."""
    await sandbox.write("log", "entry\n")
    told = []
    for _life in range(2):
        seen = Seen(sandbox, "call-7")
        told.append(await use(edit_file, seen, path="log", old="entry\n", new="entry\nentry 2\n"))
        told.append(await use(shell, seen, command="echo once >> log; wc -l < log"))
    assert await sandbox.read("log") == b"entry\nentry 2\nonce\n"
    assert told[:2] == told[2:]
    other = Seen(sandbox, "call-8")
    await use(shell, other, command="echo once >> log; wc -l < log")
    assert (await sandbox.read("log")).count(b"once") == 2


class WithoutPython(Seen):
    """A sandbox whose image has no Python."""

    async def exec(self, argv: Sequence[str], **options: Any) -> ExecResult:
        """Say what Docker and the supervisor say."""
        if argv[0] == "python3":
            raise SandboxError("there is no program python3")
        return await super().exec(argv, **options)


async def test_without_python_edits_are_made_from_here(sandbox: Sandbox) -> None:
    bare = WithoutPython(sandbox, "call-9")
    await sandbox.write("a.py", PROGRAM)
    assert (await use(edit_file, bare, path="a.py", old="def g", new="def h")).startswith("a.py: Changed in 1 place.")
    assert b"def h" in await sandbox.read("a.py")
    with pytest.raises(ToolFailed, match="2 times"):
        await use(edit_file, bare, path="a.py", old="return", new="yield")
    with pytest.raises(SandboxFileNotFound):
        await use(edit_file, bare, path="nowhere", old="return", new="yield")
    with pytest.raises(ToolFailed, match=r"Python cannot be started.*Use shell"):
        await use(python, bare, code="1")
    with pytest.raises(ToolFailed, match="which this sandbox does not have"):
        await use(fetch_url, bare, url="http://127.0.0.1:1/")


def test_the_nearest_lines_of_a_large_file_are_found_in_time() -> None:
    data = "".join(f"value_{number} = {number}\n" for number in range(50_000)).encode()
    with pytest.raises(edit.Refused, match=r"white space only:\n(.*\n)+ 10001\tvalue_10000 = 10000\n"):
        edit.edited(data, "value_10000  =  10000\nvalue_10001 = 10001\n", "x", False)


# --- list, search ---------------------------------------------------------------------------------------------------


async def tree(sandbox: Sandbox) -> None:
    for path in ("main.py", "src/a.py", "src/deep/test_b.py", "src/deep/notes.md", ".git/config.py", "docs/a.md"):
        await sandbox.write(path, f"# {path}\nneedle = 42\n")


async def test_list(sandbox: Sandbox) -> None:
    assert await use(list_files, sandbox) == "(. is empty)"
    await tree(sandbox)
    assert await use(list_files, sandbox) == ".git/\ndocs/\nmain.py  22\nsrc/"
    assert await use(list_files, sandbox, path="src") == "src/a.py  23\nsrc/deep/"
    assert await use(list_files, sandbox, pattern="*.py") == "main.py  22\nsrc/a.py  23\nsrc/deep/test_b.py  33"
    assert await use(list_files, sandbox, pattern="src/**/*_b.py") == "src/deep/test_b.py  33"
    assert (
        await use(list_files, sandbox, path="src", pattern="deep/*") == "src/deep/notes.md  32\nsrc/deep/test_b.py  33"
    )
    assert await use(list_files, sandbox, pattern="*.rs") == "No file fits '*.rs'."
    with pytest.raises(SandboxFileNotFound):
        await use(list_files, sandbox, path="nowhere")


@on_asyncio
async def test_large_folders_are_listed_in_part(sandbox: Sandbox) -> None:
    await use(shell, sandbox, command="mkdir many; cd many; seq -f 'file-%05g.txt' 1 2500 | xargs touch; touch last.py")
    text = await use(list_files, sandbox, path="many")
    assert text.count("\n") == 1000
    assert text.endswith("[there are more; the first 1000 are shown: give a path or a pattern]")
    assert await use(list_files, sandbox, pattern="last.*") == "many/last.py  0"
    with pytest.raises(ToolFailed, match="500 characters"):
        await use(list_files, sandbox, pattern="*" * 501)


@pytest.mark.parametrize(
    ("path", "pattern", "same"),
    [
        ("a/b/c.py", "**/c.py", True),
        ("c.py", "**/c.py", True),
        ("a/b/c.py", "a/*/c.py", True),
        ("a/b/x/c.py", "a/*/c.py", False),
        ("a/b/x/c.py", "a/**/c.py", True),
        ("a/b", "a/**", True),
        ("a/c.pyc", "a/c.p[yz]", False),
        ("a/" * 300 + "b", "**/a/" * 60 + "c", False),
        ("a" * 255, "*a" * 60 + "b", False),
    ],
)
def test_patterns(path: str, pattern: str, same: bool) -> None:
    assert fits(path.split("/"), pattern.split("/")) == same


async def test_search(sandbox: Sandbox) -> None:
    await tree(sandbox)
    await sandbox.write("picture", b"needle = 42\0\0\n")
    assert sorted((await use(search_files, sandbox, pattern=r"needle = \d+")).splitlines()) == [
        f"{path}:2:needle = 42"
        for path in ("docs/a.md", "main.py", "src/a.py", "src/deep/notes.md", "src/deep/test_b.py")
    ]
    assert await use(search_files, sandbox, pattern="^# SRC", path="src", glob="a.*", ignore_case=True) == (
        "src/a.py:1:# src/a.py"
    )
    assert await use(search_files, sandbox, pattern="needle", path="main.py") == "main.py:2:needle = 42"
    assert await use(search_files, sandbox, pattern="-e nothing") == "Nothing fits '-e nothing'."
    cut = await use(search_files, sandbox, pattern="needle", limit=2)
    assert cut.count("needle") == 2
    assert cut.endswith("[there are more; the first 2 are shown: narrow the pattern, the path or the glob]")


@on_asyncio
async def test_searches_that_cannot_be_made(sandbox: Sandbox) -> None:
    with pytest.raises(ToolFailed, match="could not be made"):
        await use(search_files, sandbox, pattern="(")
    with pytest.raises(SandboxFileNotFound):
        await use(search_files, sandbox, pattern="x", path="nowhere")
    with pytest.raises(ToolFailed, match="NUL"):
        await use(search_files, sandbox, pattern="\0")
    await sandbox.write("wide", "needle " + "x" * 100_000)
    assert len(await use(search_files, sandbox, pattern="needle")) <= 400


# --- pages ----------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html><html><head><title>Tides &amp; times</title><style>p {}</style>
<script>if (a < b) evil()</script><body><h1>Brest</h1><p>High   water at
<b>06:12</b>. <a href="/more?a=1&amp;b=2">More</a> <a href="javascript:x()">no</a>
<ul><li>one<li>two</ul><pre>def f():
    return 1</pre><table><tr><td>a<td>b</table>"""

BODIES: dict[str, tuple[int, dict[str, str], bytes]] = {
    "/page": (
        200,
        {"Content-Type": "text/html; charset=latin-1"},
        PAGE.replace("</h1>", " été</h1>").encode("latin-1"),
    ),
    "/text": (200, {"Content-Type": "text/plain"}, "größe\n".encode()),
    "/json": (200, {"Content-Type": "application/problem+json"}, b'{"a": 1}'),
    "/gzip": (200, {"Content-Type": "text/plain", "Content-Encoding": "gzip"}, gzip.compress(b"small " * 10)),
    "/bomb": (200, {"Content-Type": "text/plain", "Content-Encoding": "gzip"}, gzip.compress(b"x" * 50_000_000)),
    "/large": (200, {"Content-Type": "text/plain"}, b"y" * 5_000_000),
    "/control": (200, {"Content-Type": "text/plain"}, bytes(range(1, 128)) * 40_000),
    "/picture": (200, {"Content-Type": "image/png", "Content-Length": "1234"}, b"\x89PNG\0" + b"x" * 1229),
    "/bare": (200, {}, b"neither type nor length"),
    "/missing": (404, {"Content-Type": "text/html"}, b"<p>gone"),
    "/moved": (302, {"Location": "/text"}, b""),
    "/away": (302, {"Location": "file:///etc/passwd"}, b""),
    "/refused": (403, {"Content-Type": "text/html", "X-Squid-Error": "ERR_ACCESS_DENIED 0"}, b"<p>denied"),
    "/empty": (204, {}, b""),
}


class Pages(http.server.BaseHTTPRequestHandler):
    """Answers with ``BODIES``."""

    def do_GET(self) -> None:
        status, headers, body = BODIES[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def server() -> Generator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


async def test_fetch_a_page(sandbox: Sandbox, server: str) -> None:
    assert await use(fetch_url, sandbox, url=f"{server}/page") == (
        "200 text/html\n\nTides & times\n\n# Brest été\n\nHigh water at 06:12. "
        f"[More]({server}/more?a=1&b=2) no\n\n- one\n- two\n\ndef f():\n    return 1\n\n\ta\tb"
    )


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/text", "200 text/plain\n\ngröße\n"),
        ("/json", '200 application/problem+json\n\n{"a": 1}'),
        ("/gzip", "200 text/plain\n\n" + "small " * 10),
        ("/bare", "200 of unknown type\n\nneither type nor length"),
        ("/missing", "404 text/html\n\ngone"),
        ("/moved", "200 text/plain (moved to SERVER/text)\n\ngröße\n"),
        ("/empty", "204 of unknown type\n\n"),
    ],
)
@on_asyncio
async def test_what_comes_back(sandbox: Sandbox, server: str, path: str, text: str) -> None:
    assert await use(fetch_url, sandbox, url=server + path) == text.replace("SERVER", server)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("SERVER/picture", r"is no text: image/png, 1234 bytes"),
        ("SERVER/away", "could not be fetched: .*Redirection"),
        ("SERVER/refused", r"The proxy refused .* \(ERR_ACCESS_DENIED 0\)"),
        ("http://127.0.0.1:1/", "Connection refused"),
        ("https://example.com/", r'has no network.*network = \["example\.com"\] in \[sandboxes\.python\]'),
        ("ftp://example.com/", "no address of a page"),
        ("file:///etc/passwd", "no address of a page"),
        ("http://[::1", "no address"),
        ("http://a b/", "no address of a page"),
        ("example.com", "no address of a page"),
    ],
)
@on_asyncio
async def test_what_cannot_be_fetched(sandbox: Sandbox, server: str, url: str, told: str) -> None:
    with pytest.raises(ToolFailed, match=told):
        await use(fetch_url, sandbox, url=url.replace("SERVER", server))


@on_asyncio
async def test_large_pages_are_cut(sandbox: Sandbox, server: str) -> None:
    text = await use(fetch_url, sandbox, url=f"{server}/large")
    assert text.endswith("y\n[the first 2097152 bytes]")
    assert len(await use(fetch_url, sandbox, url=f"{server}/bomb")) < 2_200_000
    control = await use(fetch_url, sandbox, url=f"{server}/control")
    assert control.partition("\n\n")[2].startswith("".join(map(chr, range(1, 128))) * 16_500)


def test_pages_that_are_no_pages() -> None:
    assert fetch.readable("<p>a<script>never closed", "http://a/") == "a"
    assert fetch.readable("<a href='http://[bad'>x</a></a></p></script>", "http://a/") == "x"
    assert fetch.readable("<![broken[ x", "http://a/") in ("<![broken[ x", "")
    assert fetch.decoded(b"\xff", "no-such-code") == "\ufffd"
    assert fetch.declared(b'<meta charset="latin-1">') == "latin-1"


# --- what comes from inside -----------------------------------------------------------------------------------------


class Lying(Seen):
    """A sandbox in which the programs say something else."""

    def __init__(self, sandbox: Sandbox, says: ExecResult | Exception) -> None:
        super().__init__(sandbox, "lie")
        self.says = says

    async def exec(self, argv: Sequence[str], **options: Any) -> ExecResult:
        """Say it."""
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


@pytest.mark.parametrize(
    "says",
    [
        ExecResult(0),
        ExecResult(0, b"[" * 100_000),
        ExecResult(0, b"[1]"),
        ExecResult(1, b"", b"MemoryError"),
        ExecResult(137, limit="memory"),
        ExecResult(0, b'{"done": false}'),
        ExecResult(0, b'{"error": {"a": 1}}'),
        SandboxTimeout("too late"),
    ],
)
@on_asyncio
async def test_answers_that_are_none(sandbox: Sandbox, says: ExecResult | Exception) -> None:
    lying = Lying(sandbox, says)
    await sandbox.write("a", "x")
    for tool, arguments in (
        (edit_file, {"path": "a", "old": "x", "new": "y"}),
        (fetch_url, {"url": "http://localhost:1/"}),
        (search_files, {"pattern": "x"}),
    ):
        with pytest.raises((ToolFailed, SandboxTimeout)):
            await use(tool, lying, **arguments)


async def test_calls_at_the_same_time_share_the_workspace(sandbox: Sandbox) -> None:
    async def one(number: int) -> None:
        await use(shell, sandbox, command=f"echo {number} > {number}.txt")

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(one, number)
    assert (await use(list_files, sandbox)).splitlines() == [f"{number}.txt  2" for number in range(8)]


# --- in a container -------------------------------------------------------------------------------------------------


@on_asyncio
async def test_in_a_container() -> None:
    """With ripgrep, a network of its own, and limits that hold."""
    profile = SandboxProfile(memory=64 * 2**20, disk=16 * 2**20, pids=24)
    async with DockerHost.open() as host, made_by(host, profile) as sandbox:
        await tree(sandbox)
        assert await use(search_files, sandbox, pattern=r"needle = \d+", path="src", glob="*.py") == (
            "src/a.py:2:needle = 42\nsrc/deep/test_b.py:2:needle = 42"
        )
        with pytest.raises(ToolFailed, match=r"could not be made.*"):
            await use(search_files, sandbox, pattern="(")
        assert await use(list_files, sandbox, pattern="src/**/*_b.py") == "src/deep/test_b.py  33"
        changed = await use(edit_file, sandbox, path="main.py", old="needle = 42", new="needle = 43")
        assert changed.startswith("main.py: Changed in 1 place.")
        assert await use(read_file, sandbox, path="main.py", offset=2) == "     2\tneedle = 43"
        assert await use(python, sandbox, code="from main import needle\nneedle") == "43"
        assert await use(shell, sandbox, command="[[ $(id -u) = 65534 ]] && pwd") == "/workspace"
        await check_limits(sandbox)
        await check_network(sandbox)


async def check_limits(sandbox: Sandbox) -> None:
    hog = await use(python, sandbox, code="print('begun')\nx = b'x' * 500_000_000")
    assert hog == "begun\n[ended: it needed more than the sandbox's memory of 64 MiB]"
    full = await use(shell, sandbox, command="head -c 30000000 /dev/zero > big")
    assert full.endswith("[exit status 1: the disk of 16 MiB was full; remove files, or write less]")
    assert await use(shell, sandbox, command="rm big") == "(no output)"
    code = "import subprocess\nfor _ in range(100): subprocess.Popen(['sleep', '60'])"
    crowd = await use(python, sandbox, code=code)
    assert "[ended: it started more than the 24 processes and threads that the sandbox may have]" in crowd
    assert await use(shell, sandbox, command="echo well") == "well"


async def check_network(sandbox: Sandbox) -> None:
    serving = ["python3", "-m", "http.server", "8000", "--bind", "127.0.0.1"]
    process = await sandbox.start(serving, timeout=60)
    waiting = "import time, urllib.request\nfor _ in range(200):\n    try:\n        urllib.request.urlopen('http://127.0.0.1:8000')"
    await use(python, sandbox, code=f"{waiting}\n        break\n    except OSError:\n        time.sleep(0.05)")
    assert (await use(fetch_url, sandbox, url="http://127.0.0.1:8000/docs/a.md")).endswith("# docs/a.md\nneedle = 42\n")
    await process.kill()
    with pytest.raises(ToolFailed, match="has no network"):
        await use(fetch_url, sandbox, url="https://example.com/")


def test_what_runs_inside_is_python_3_8() -> None:
    for name in ("edit", "fetch", "notebook"):
        ast.parse(source(name), feature_version=(3, 8))
