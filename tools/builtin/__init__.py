"""The tools of a coding agent: commands, Python, files, search, and fetching pages, all in the sandbox of the call.

    from ridethrough.tools.builtin import CODING_TOOLS, fetch_url

    coder = Agent("coder", model="smart", tools=CODING_TOOLS, sandbox="python")

Everything that they do happens in there, so they are ``confined``: a call that a crash interrupted is made again, and
what its first life had started is found there instead of being started twice. Nothing is kept in memory between calls,
neither here nor there; what a later call needs is in files, which is what survives.
"""

from __future__ import annotations

from typing import Any, Final

from ridethrough.tools.builtin.commands import python, shell
from ridethrough.tools.builtin.files import edit_file, list_files, read_file, write_file
from ridethrough.tools.builtin.searching import search_files
from ridethrough.tools.builtin.web import fetch_url
from ridethrough.tools.tool import Tool

CODING_TOOLS: Final[tuple[Tool[..., Any], ...]] = (
    shell,
    python,
    read_file,
    write_file,
    edit_file,
    list_files,
    search_files,
)
"""What an agent needs that writes, runs and mends programs; ``fetch_url`` comes on top where there is a network."""

__all__ = [
    "CODING_TOOLS",
    "edit_file",
    "fetch_url",
    "list_files",
    "python",
    "read_file",
    "search_files",
    "shell",
    "write_file",
]
