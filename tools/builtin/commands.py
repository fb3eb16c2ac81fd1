"""Commands and Python code."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from ridethrough.runtime.errors import SandboxError, SandboxGone, SandboxTimeout, SandboxUnavailable, ToolFailed
from ridethrough.sandboxes.sandbox import Sandbox
from ridethrough.tools.builtin.inside import NOT_THERE, PYTHON, source
from ridethrough.tools.builtin.results import told, told_late
from ridethrough.tools.context import ToolContext
from ridethrough.tools.tool import tool

LONGEST: Final = 1800.0
"""Seconds that a command may take."""

MARGIN: Final = 120.0
"""Seconds on top of the longest command for finding or starting the sandbox: its deadline ends first."""

LONGEST_COMMAND: Final = 100_000
"""Bytes of a command: Linux passes no argument of more than 128 KiB."""

Seconds = Annotated[float, Field(gt=0, le=LONGEST)]

# Both streams are one, as in a terminal, so that an error stands where it happened. Images without bash have sh.
_SHELL: Final = 'exec 2>&1; if command -v bash >/dev/null; then exec bash -c "$1"; else exec sh -c "$1"; fi'


@tool(confined=True, timeout=LONGEST + MARGIN)
async def shell(command: str, ctx: ToolContext, timeout: Seconds = 60.0) -> str:
    """Run a command with bash in the workspace, and get its output and its exit status if that is not 0.

    Each call begins in the workspace with a new shell: folders and variables of earlier calls are gone, files stay.
    There is no terminal and no input. What is still running when the command ends is ended with it.

    Args:
        command: The command, of one or more lines.
        timeout: Seconds until it is ended, at most 1800.
    """
    if len(command.encode("utf-8", "replace")) > LONGEST_COMMAND:
        raise ToolFailed(
            f"The command has {len(command)} characters, which is too long. Write a script with write_file and run it."
        )
    sandbox: Sandbox = ctx.sandbox
    return await _run(sandbox, ["sh", "-c", _SHELL, "sh", command], None, timeout)


@tool(confined=True, timeout=LONGEST + MARGIN)
async def python(code: str, ctx: ToolContext, timeout: Seconds = 60.0) -> str:
    """Run Python code in the workspace, and get what it prints, the value of its last expression, and any traceback.

    Each call is a new interpreter: variables and imports of earlier calls are gone, files stay. There is no input.

    Args:
        code: The code.
        timeout: Seconds until it is ended, at most 1800.
    """
    sandbox: Sandbox = ctx.sandbox
    argv = [PYTHON, "-c", source("notebook")]
    try:
        text = await _run(sandbox, argv, code, timeout)
    except (SandboxGone, SandboxUnavailable):
        raise
    except SandboxError as error:
        raise ToolFailed(f"Python cannot be started in this sandbox: {error} Use shell, or another image.") from error
    return text


async def _run(sandbox: Sandbox, argv: list[str], stdin: str | None, timeout: float) -> str:
    data = None if stdin is None else stdin.encode("utf-8", "replace")
    try:
        result = await sandbox.exec(argv, stdin=data, timeout=timeout)
    except SandboxTimeout as error:
        return told_late(error, timeout)
    if argv[0] == PYTHON and result.exit_code in NOT_THERE and not result.stdout_bytes:
        raise SandboxError(result.stderr.strip())
    return told(result, sandbox.profile)
