"""What the drills of the tests drill: a project of its own in a folder, and the command as users type it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

DEADLINE = 100.0
"""Seconds after which a drill of the tests is broken."""

APP = '''
import os

import anyio
from ridethrough import Agent, Limits, ToolContext, tool, workflow


def leave(line: str) -> None:
    """What no journal can take back."""
    handle = os.open("outbox.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(handle, f"{line}\\n".encode())
    os.close(handle)


@tool(effect="read", timeout=5)
async def look(query: str) -> str:
    """Look something up.

    Args:
        query: What.
    """
    return f"found {query}"


@tool(effect="write", timeout=1)
async def send(to: str, ctx: ToolContext) -> str:
    """Send a letter.

    Args:
        to: To whom.
    """
    leave(ctx.idempotency_key)
    return "sent"


@tool(effect="read", timeout=10)
async def sneak(to: str, ctx: ToolContext) -> str:
    """Send a letter, and say that nothing is sent.

    Args:
        to: To whom.
    """
    leave(ctx.idempotency_key)
    await anyio.sleep(3)
    return "sent"


clerk = Agent("clerk", model="desk", instructions="You are a clerk.", tools=[look, send], limits=Limits(turns=8))
sneaker = Agent("sneaker", model="desk", instructions="You sneak.", tools=[sneak], limits=Limits(turns=8))


@workflow(version="1")
async def letter(to: str = "you") -> str:
    """Look up, send, tell."""
    return (await clerk.run(to)).output


@workflow(version="1")
async def twice(to: str = "you") -> str:
    """Send something that is sent again when the process dies."""
    return (await sneaker.run(to)).output


@workflow(version="1")
async def broken() -> str:
    """Fail, whatever the models do."""
    raise ValueError("the desk is broken")
'''

RULES = """
[[rules]]
system = "clerk"
not_called = "look"
calls = [{ name = "look", arguments = { query = "{{user}}" } }]

[[rules]]
system = "clerk"
not_called = "send"
calls = [{ name = "send", arguments = { to = "{{user}}" } }]

[[rules]]
system = "sneak"
not_called = "sneak"
calls = [{ name = "sneak", arguments = { to = "{{user}}" } }]
"""


class Desk:
    """A folder with the project in it."""

    def __init__(self, folder: Path) -> None:
        """Write the project."""
        self.folder = folder
        (folder / "app.py").write_text(APP, encoding="utf-8")

    def scenario(self, text: str, name: str = "ours.toml") -> str:
        """Write a scenario; the models say what the project's agents need."""
        (self.folder / name).write_text(text + RULES, encoding="utf-8")
        return name

    def words(self, *arguments: str) -> list[str]:
        """The command, as another process is started with it."""
        return [sys.executable, "-m", "ridethrough.cli", "drill", *arguments]

    def drill(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Type ``ridethrough drill``."""
        return subprocess.run(
            self.words(*arguments), cwd=self.folder, capture_output=True, text=True, timeout=DEADLINE, check=False
        )

    def report(self, *arguments: str, status: int) -> dict[str, Any]:
        """Type it with ``--json``; the report."""
        done = self.drill(*arguments, "--json")
        assert done.returncode == status, done.stdout + done.stderr
        found = json.loads(done.stdout)
        assert isinstance(found, dict)
        return found

    @property
    def outbox(self) -> list[str]:
        """What was sent."""
        path = self.folder / "outbox.txt"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
