"""Search in files: ripgrep where the image has it, else grep."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from ridethrough.runtime.errors import SandboxError, SandboxTimeout, ToolFailed
from ridethrough.sandboxes.sandbox import Sandbox
from ridethrough.tools.context import ToolContext
from ridethrough.tools.tool import tool

DEADLINE: Final = 60.0
MOST: Final = 1000
"""Lines that can be asked for."""

WIDEST: Final = 400
"""Characters of a line that are shown."""

# $1 pattern, $2 path, $3 glob or "", $4 most lines, $5 "i" to ignore case, $6 characters of a line. One line more than
# asked for tells that there are more. The status of the search goes to standard error, as a pipe has that of its end.
_SEARCH: Final = r"""
if command -v rg >/dev/null; then
    set -- "$@" rg --line-number --no-heading --with-filename --color never --no-messages --sort path --hidden \
        --glob '!.git'
    if [ -n "$5" ]; then set -- "$@" --ignore-case; fi
    if [ -n "$3" ]; then set -- "$@" --glob "$3"; fi
else
    if echo 1 | grep -qP '\d' 2>/dev/null; then kind=-P; else kind=-E; fi
    set -- "$@" grep -rnHIs "$kind" --exclude-dir=.git
    if [ -n "$5" ]; then set -- "$@" -i; fi
    if [ -n "$3" ]; then set -- "$@" --include="${3##*/}"; fi
fi
pattern=$1 path=$2 most=$4 width=$6
shift 6
{ "$@" -e "$pattern" -- "$path"; echo "status $?" >&2; } | cut -c "1-$width" | head -n "$((most + 1))"
"""


@tool(effect="read", confined=True, timeout=DEADLINE + 120.0, max_output=40_000)
async def search_files(
    pattern: str,
    ctx: ToolContext,
    path: str = ".",
    glob: str = "",
    ignore_case: bool = False,
    limit: Annotated[int, Field(ge=1, le=MOST)] = 200,
) -> str:
    """Search the text of files for a regular expression; get lines as path:line number:text.

    Args:
        pattern: The regular expression.
        path: The file or folder to search, in the workspace.
        glob: Search only in files whose name fits, for example *.py.
        ignore_case: Whether upper and lower case are the same.
        limit: Lines to show, at most 1000.
    """
    sandbox: Sandbox = ctx.sandbox
    if "\0" in pattern + path + glob:
        raise ToolFailed("A pattern, path or glob has no NUL character.")
    await _check(sandbox, path)
    argv = ["sh", "-c", _SEARCH, "sh", pattern, path, glob, str(limit), "i" if ignore_case else "", str(WIDEST)]
    try:
        result = await sandbox.exec(argv, timeout=DEADLINE)
    except SandboxTimeout as error:
        raise ToolFailed(
            f"The search took more than {DEADLINE:g} s. Search in a smaller folder, or with a glob."
        ) from error
    return _found(result.stdout, result.stderr, pattern, limit)


async def _check(sandbox: Sandbox, path: str) -> None:
    """What is not there, or outside of the workspace, is told by those who know; a pipe would be waited for."""
    found = await sandbox.stat(path)
    if found.kind == "link":  # it is followed only where a file call may go
        try:
            await sandbox.list(path, limit=1)
        except SandboxError:
            await sandbox.read(path, limit=1)
    elif found.kind == "other":
        raise ToolFailed(f"{path} is neither a file nor a folder.")


def _found(output: str, errors: str, pattern: str, limit: int) -> str:
    """What was found; the search's own complaint if that is the reason for nothing.

    Raises:
        ToolFailed: the pattern is no regular expression.
    """
    lines = [line.removeprefix("./") for line in output.split("\n")[:-1]]
    if lines:
        more = f"\n[there are more; the first {limit} are shown: narrow the pattern, the path or the glob]"
        return "\n".join(lines[:limit]) + (more if len(lines) > limit else "")
    complaint, _, status = errors.rpartition("status ")
    if status.strip() in ("0", "1"):
        return f"Nothing fits {pattern!r}."
    raise ToolFailed(f"The search could not be made. {complaint.strip()[-1000:]}".strip())
