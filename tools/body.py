"""Functions whose body runs in a sandbox: ``@tool(sandbox="python")``.

The text of the function goes there, and its arguments as JSON; the value comes back as JSON. So the function has to be
complete in itself, which is checked when it is decorated: it imports what it uses, and refers to nothing around it.
Pickled code objects were rejected: they tie the sandbox's Python to the worker's, and unpickling is running.
"""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from types import CodeType
from typing import Any, Final, get_type_hints

from ridethrough.runtime.errors import ConfigError, ToolFailed
from ridethrough.sandboxes.sandbox import ExecResult, Sandbox

KEEP_VALUE: Final = 16 * 2**20
"""Bytes of a returned value, as JSON."""

_RUNNER: Final = """\
import json, os, sys, traceback
answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
asked = json.loads(sys.stdin.buffer.read())
space, status = {"__name__": "__ridethrough__"}, 0
try:
    exec(compile(asked["source"], asked["name"], "exec", dont_inherit=True), space)
    value = space[asked["name"]](**asked["arguments"])
    if hasattr(value, "__await__"):
        import asyncio
        async def wait(): return await value
        value = asyncio.run(wait())
    text = json.dumps({"value": value}, allow_nan=False)
except BaseException as error:
    traceback.print_exc()
    text, status = json.dumps({"error": type(error).__name__, "message": str(error)}), 1
answer.write(text)
answer.close()
os._exit(status) if status else None
"""


@dataclass(frozen=True, slots=True)
class Body:
    """The text of a function that is complete in itself."""

    name: str
    source: str

    @classmethod
    def of(cls, tool: str, function: Callable[..., Any]) -> Body:
        """Take the text of a function and check that it can run somewhere else.

        Raises:
            ConfigError: it refers to something around it, or its text is not to be had.
        """
        tree = _tree(tool, function)
        _check_complete(tool, function)
        tree.decorator_list = []
        return cls(tree.name, "from __future__ import annotations\n" + ast.unparse(tree) + "\n")

    async def run(self, tool: str, sandbox: Sandbox, arguments: dict[str, Any], timeout: float) -> Any:
        """Call the function in a sandbox; its value as JSON data.

        Raises:
            ToolFailed: it raised; the message is that of its error.
            SandboxTimeout, SandboxGone: as ``Sandbox.exec``.
        """
        asked = json.dumps({"source": self.source, "name": self.name, "arguments": arguments})
        result = await sandbox.exec(["python3", "-c", _RUNNER], stdin=asked, timeout=timeout, keep_output=KEEP_VALUE)
        return _value(tool, result)


def _value(tool: str, result: ExecResult) -> Any:
    """What the function returned; everything in ``result`` was written by code that may be hostile."""
    if result.limit is not None:
        raise ToolFailed(f"{tool} was ended by the sandbox's limit of {result.limit}. {_last_lines(result)}".strip())
    if result.truncated and result.stdout_total > len(result.stdout_bytes):
        raise ToolFailed(f"{tool} returned {result.stdout_total} bytes; at most {KEEP_VALUE} can be returned")
    try:
        answer = json.loads(result.stdout_bytes)
        if "value" in answer:
            return answer["value"]
        kind, message = str(answer["error"]), str(answer["message"])
    except (ValueError, TypeError, KeyError):
        raise ToolFailed(f"{tool} ended with status {result.exit_code}. {_last_lines(result)}".strip()) from None
    raise ToolFailed(f"{tool} failed: {kind}: {message}" if message else f"{tool} failed: {kind}")


def _last_lines(result: ExecResult) -> str:
    return result.stderr[-2000:].strip()


# --- checks ---------------------------------------------------------------------------------------------------------


def _tree(tool: str, function: Callable[..., Any]) -> ast.FunctionDef | ast.AsyncFunctionDef:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError) as error:
        raise ConfigError(
            f"tool {tool!r}: its text cannot be read ({error}), so it cannot run in a sandbox. Define it with `def` "
            f"in a file; lambdas, partials and functions of an interactive session do not go there"
        ) from None
    if not isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef):
        raise ConfigError(f"tool {tool!r} runs in a sandbox, so it must be a function written with `def`")
    return tree


def _check_complete(tool: str, function: Callable[..., Any]) -> None:
    code: CodeType = function.__code__
    if "ctx" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        raise ConfigError(
            f"tool {tool!r} runs in a sandbox, where there is no ctx. Leave out sandbox= and call "
            f"ctx.sandbox.exec(...), or leave out ctx"
        )
    for name, kind in _hints(function).items():
        if name != "return" and isinstance(kind, type) and (is_dataclass(kind) or hasattr(kind, "model_fields")):
            raise ConfigError(
                f"tool {tool!r} runs in a sandbox, where {kind.__name__} is not known: {name} arrives there as "
                f"plain JSON data. Annotate it with dict, list, str, int, float or bool"
            )
    if code.co_freevars:
        raise _incomplete(tool, code.co_freevars[0], "is a variable of the function around it")
    for name in _globals(code):
        if name != function.__name__ and not hasattr(builtins, name):
            raise _incomplete(tool, name, "is defined outside of it")


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of its parameters and of what it returns, as far as they can be found out."""
    try:
        return get_type_hints(function)
    except Exception:  # a name that is known to type checkers only
        return {}


def _globals(code: CodeType) -> Iterator[str]:
    """The global names that a function's code uses, those of functions inside it too."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL"):
            yield str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals(constant)


def _incomplete(tool: str, name: str, why: str) -> ConfigError:
    return ConfigError(
        f"tool {tool!r} runs in a sandbox, but {name!r} {why}. Import it inside the function, pass it as an "
        f"argument, or define it inside"
    )
