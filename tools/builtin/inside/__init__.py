"""Programs of the built-in tools that run inside the sandbox, sent there as text.

They use the standard library only and run on Python 3.8 and newer. Except for ``notebook`` they run isolated, so that
a ``json.py`` in the workspace is not taken for the real one.
"""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any, Final

from ridethrough.runtime.errors import SandboxError, SandboxGone, SandboxTimeout, SandboxUnavailable, ToolFailed
from ridethrough.sandboxes.sandbox import ExecResult, Sandbox

PYTHON: Final = "python3"
LONGEST_ANSWER: Final = 16 * 1024 * 1024
"""Bytes of an answer."""

NOT_THERE: Final = (126, 127)
"""What shells and Docker answer for a program that is not there."""


class NoPython(Exception):
    """The image has no Python that could run the program."""


@functools.cache
def source(name: str) -> str:
    """The text of one of the programs."""
    return files(__name__).joinpath(f"{name}.py").read_text(encoding="utf-8")


async def run_inside(sandbox: Sandbox, name: str, given: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Run a program that reads JSON and answers JSON.

    Raises:
        NoPython: there is none.
        ToolFailed: the answer is none; it comes from inside, so anything may stand there.
        SandboxTimeout, SandboxGone, SandboxUnavailable: as ever.
    """
    try:
        argv, asked = [PYTHON, "-I", "-c", source(name)], json.dumps(given)
        result = await sandbox.exec(argv, stdin=asked, timeout=timeout, keep_output=LONGEST_ANSWER)
    except (SandboxTimeout, SandboxGone, SandboxUnavailable):
        raise
    except SandboxError as error:
        raise NoPython(str(error)) from error
    if result.exit_code in NOT_THERE and not result.stdout_bytes:
        raise NoPython(result.stderr)
    return _answer(name, result)


def _answer(name: str, result: ExecResult) -> dict[str, Any]:
    try:
        found = json.loads(result.stdout_bytes)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and not result.truncated:
        return found
    why = f"the sandbox's {result.limit} limit was reached" if result.limit else result.stderr.strip()[-500:]
    raise ToolFailed(
        f"The {name} program ended in the sandbox with status {result.exit_code} and no answer. {why}".strip()
    )
