"""A call as it is asked for, checked before anything is sent."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ridethrough.runtime.errors import SandboxError
from ridethrough.sandboxes.frames import MAX_BODY
from ridethrough.sandboxes.sandbox import KEEP_OUTPUT, OUTPUT_LIMIT

GRACE: Final = 1.0
"""Seconds between SIGTERM and SIGKILL."""

MARGIN: Final = 10.0
"""Seconds beyond a call's deadline and grace after which its supervisor is stuck."""

UNLIMITED: Final = 2**62
"""Bytes of output, for what may run long and is read as it comes."""


@dataclass(frozen=True, slots=True)
class Command:
    """A call.

    Attributes:
        id: Names it.
        own: Nobody outside knows its id, so that its result can go once it is here.
        timeout: Seconds until it is ended.
        fields: Of the request that starts it.
        first: The beginning of its input, sent with that request.
        rest: Its input after that.
    """

    id: str
    own: bool
    timeout: float
    fields: Mapping[str, Any]
    first: bytes
    rest: bytes

    @property
    def name(self) -> str:
        """What people know it by."""
        return str(self.fields["argv"][0])

    @property
    def patience(self) -> float:
        """Seconds after which its supervisor is stuck."""
        return self.timeout + GRACE + MARGIN


def command_of(
    argv: Sequence[str],
    timeout: float,
    env: Mapping[str, str],
    *,
    stdin: bytes | str | None = None,
    stdin_open: bool = False,
    cwd: str | None = None,
    keep: int = KEEP_OUTPUT,
    limit: int = OUTPUT_LIMIT,
    call_id: str | None = None,
    background: bool = False,
    control: bool = False,
    flow: bool = False,
) -> Command:
    """Make a call of what its caller says.

    Raises:
        SandboxError: an argument is none, or the deadline is no time.
    """
    data = as_bytes(stdin)
    first, rest = data[:MAX_BODY], data[MAX_BODY:]
    id = call_id or uuid.uuid4().hex
    fields = {
        "id": id,
        "argv": check_argv(argv),
        "env": check_env(env),
        "cwd": cwd or ".",
        "deadline": check_deadline(timeout),
        "grace": GRACE,
        "stdin": stdin_open or bool(rest),
        "keep": keep,
        "limit": limit,
        "background": background,
        "control": control,
        "flow": flow,
    }
    return Command(id, call_id is None, timeout, fields, first, rest)


def as_bytes(stdin: bytes | str | None) -> bytes:
    """Return input as it is sent."""
    return stdin.encode("utf-8", "surrogateescape") if isinstance(stdin, str) else bytes(stdin or b"")


def check_argv(argv: Sequence[str]) -> list[str]:
    """Return a command and its arguments.

    Raises:
        SandboxError: they are none.
    """
    if isinstance(argv, str) or not argv or not all(isinstance(each, str) and "\0" not in each for each in argv):
        raise SandboxError(
            f"argv must be a list of texts, the command first; got {argv!r}. For a line of shell write "
            '["sh", "-c", LINE]'
        )
    return list(argv)


def check_env(env: Mapping[str, str]) -> dict[str, str]:
    """Return an environment.

    Raises:
        SandboxError: a name or a value is none.
    """
    for name, value in env.items():
        if not isinstance(value, str) or not name or "=" in name or "\0" in name + value:
            raise SandboxError(f"env must be of names and texts; got {name!r}, whose value is {type(value).__name__}")
    return dict(env)


def check_deadline(timeout: float) -> float:
    """Return a deadline as a number.

    Raises:
        SandboxError: it is none.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
        raise SandboxError(f"timeout must be a number of seconds greater than 0; got {timeout!r}: each call has an end")
    return float(timeout)
