"""Run Python code from standard input as a notebook's cell would: the value of a last expression is shown.

Both streams go to standard output, in the order of what happens. A traceback has the lines of the code, and none of
this program's.
"""

import sys

_folder = sys.path.pop(0) if sys.path[:1] == [""] else None  # a file ast.py in the workspace is not the one we mean

import ast  # noqa: E402
import linecache  # noqa: E402
import os  # noqa: E402
import traceback  # noqa: E402
import types  # noqa: E402
from typing import Any, Dict  # noqa: E402, UP035

NAME = "<code>"


def run(code: str, names: Dict[str, Any]) -> None:  # noqa: UP006
    """Execute all statements, and print the value of the last one if it has one."""
    tree = ast.parse(code, NAME)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NAME, "exec", dont_inherit=True), names)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), NAME, "eval", dont_inherit=True), names)
        if value is not None:
            print(repr(value))  # noqa: T201


def main() -> int:
    """The status: 1 after an exception; that of ``sys.exit`` comes by itself."""
    os.dup2(1, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    code = sys.stdin.buffer.read().decode("utf-8", "replace")
    linecache.cache[NAME] = (len(code), None, code.splitlines(keepends=True), NAME)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    if _folder is not None:
        sys.path.insert(0, _folder)
    try:
        run(code, module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        _tell(error)
        return 1
    return 0


def _tell(error: BaseException) -> None:
    inner = error.__traceback__
    while inner is not None and inner.tb_frame.f_code.co_filename != NAME:
        inner = inner.tb_next
    sys.stdout.flush()
    traceback.print_exception(type(error), error, inner)


if __name__ == "__main__":
    sys.exit(main())
