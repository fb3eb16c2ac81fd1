"""Run Python code from standard input as a notebook's cell would: the value of a last expression is shown.

Both streams go to standard output, in the order of what happens. A traceback has the lines of the code, and none of
this program's. Hardly anything is imported: that would double the time that the interpreter needs to start.
"""

import sys

_folder = sys.path.pop(0) if sys.path[:1] == [""] else None  # a file os.py in the workspace is not the one we mean

import _ast  # noqa: E402
import os  # noqa: E402

NAME = "<code>"
TREE = 0x400
"""``ast.PyCF_ONLY_AST``."""


def run(code: str, names: "dict[str, object]") -> None:
    """Execute all statements, and print the value of the last one if it has one."""
    tree = compile(code, NAME, "exec", TREE, dont_inherit=True)
    assert isinstance(tree, _ast.Module)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], _ast.Expr) else None
    exec(compile(tree, NAME, "exec", dont_inherit=True), names)
    if isinstance(last, _ast.Expr):
        value = eval(compile(_ast.Expression(last.value), NAME, "eval", dont_inherit=True), names)
        if value is not None:
            print(repr(value))  # noqa: T201


def main() -> int:
    """The status: 1 after an exception; that of ``sys.exit`` comes by itself."""
    os.dup2(1, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    code = sys.stdin.buffer.read().decode("utf-8", "replace")
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    if _folder is not None:
        sys.path.insert(0, _folder)
    try:
        run(code, module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        _tell(error, code)
        return 1
    return 0


def _tell(error: BaseException, code: str) -> None:
    if sys.path[:1] == [""]:
        del sys.path[0]
    import linecache
    import traceback

    linecache.cache[NAME] = (len(code), None, code.splitlines(keepends=True), NAME)
    inner = error.__traceback__
    while inner is not None and inner.tb_frame.f_code.co_filename != NAME:
        inner = inner.tb_next
    sys.stdout.flush()
    traceback.print_exception(type(error), error, inner)


if __name__ == "__main__":
    sys.exit(main())
