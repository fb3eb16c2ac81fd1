"""Files of the workspace: read, write, edit, list."""

from __future__ import annotations

import fnmatch
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Final

from pydantic import Field

from ridethrough.runtime.errors import ToolFailed
from ridethrough.runtime.threads import run_in_thread
from ridethrough.sandboxes.sandbox import FileInfo, Sandbox
from ridethrough.tools.builtin.inside import NoPython, run_inside
from ridethrough.tools.builtin.inside.edit import LARGEST, Refused, edited
from ridethrough.tools.context import ToolContext
from ridethrough.tools.tool import tool

CHUNK: Final = 256 * 1024
"""Bytes that are read at a time."""

MOST_READ: Final = 64 * 1024 * 1024
"""Bytes of a file through which lines are counted."""

WIDEST: Final = 2000
"""Characters of a line that are shown."""

SHOWN: Final = 50_000
"""Characters of a file that are shown in one call."""

MOST_LISTED: Final = 1000
"""Entries that are shown."""

MOST_WALKED: Final = 200_000
"""Entries that are looked at for a pattern."""

DEADLINE: Final = 60.0


# --- read -----------------------------------------------------------------------------------------------------------


@tool(effect="read", confined=True, timeout=DEADLINE + 120.0, max_output=SHOWN + 20_000)
async def read_file(
    path: str,
    ctx: ToolContext,
    offset: Annotated[int, Field(ge=1)] = 1,
    limit: Annotated[int, Field(ge=1)] = 1000,
) -> str:
    """Read a text file of the workspace. Each line is shown with its number and a tab before it.

    Args:
        path: The file, relative to the workspace.
        offset: The first line to read, from 1.
        limit: How many lines to read.
    """
    sandbox: Sandbox = ctx.sandbox
    shown: list[str] = []
    number = size = 0
    async with aclosing(_lines(sandbox, path)) as lines:
        async for number, line in lines:
            if number < offset:
                continue
            if len(shown) == limit or size > SHOWN:
                return "\n".join(shown) + f"\n[there is more: read on with offset={number}]"
            shown.append(f"{number:>6}\t{_narrow(line)}")
            size += len(shown[-1])
    return "\n".join(shown) if shown else _nothing_shown(path, number, offset)


def _nothing_shown(path: str, lines: int, offset: int) -> str:
    if lines == 0:
        return f"({path} is empty)"
    return f"({path} has {lines} lines; there is no line {offset})"


def _narrow(line: bytes) -> str:
    text = line.decode("utf-8", "replace")
    return text if len(text) <= WIDEST else f"{text[:WIDEST]} [... {len(text) - WIDEST} characters more]"


async def _lines(sandbox: Sandbox, path: str) -> AsyncGenerator[tuple[int, bytes]]:
    """The lines of a file with their numbers, without their ends.

    Raises:
        ToolFailed: it is no text, or so large that lines cannot be counted.
    """
    number, at, rest = 1, 0, b""
    while data := await sandbox.read(path, offset=at, limit=CHUNK):
        if b"\0" in data:
            info = await sandbox.stat(path)
            raise ToolFailed(f"{path} is no text: it has {info.size} bytes of binary data. Look at it with shell.")
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield number, line.removesuffix(b"\r")
            number += 1
        at += len(data)
        if at > MOST_READ or len(rest) > MOST_READ // 8:
            raise ToolFailed(f"{path} is too large to be read by lines. Use shell: tail, sed, cut.")
    if rest:
        yield number, rest.removesuffix(b"\r")


# --- write ----------------------------------------------------------------------------------------------------------


@tool(confined=True, timeout=DEADLINE + 120.0, sequential=True)
async def write_file(path: str, content: str, ctx: ToolContext) -> str:
    """Write a file of the workspace, whole; folders are made where they are missing. What it had before is gone.

    Args:
        path: The file, relative to the workspace.
        content: All of its text.
    """
    sandbox: Sandbox = ctx.sandbox
    data = content.encode("utf-8", "replace")
    await sandbox.write(path, data)
    lines = content.count("\n") + (not content.endswith("\n") and content != "")
    return f"Wrote {path}: {lines} {'line' if lines == 1 else 'lines'}, {len(data)} bytes."


@tool(confined=True, timeout=DEADLINE + 120.0, sequential=True)
async def edit_file(path: str, old: str, new: str, ctx: ToolContext, replace_all: bool = False) -> str:
    """Replace a piece of a text file by another one. Get the changed lines.

    Args:
        path: The file, relative to the workspace.
        old: The piece as it stands in the file, white space included, without line numbers. It must be there exactly
            once: give enough lines around it.
        new: What comes in its place.
        replace_all: Replace it wherever it stands.
    """
    if old == "":
        raise ToolFailed("old is empty. To make a file or to replace all of it, use write_file.")
    if old == new:
        raise ToolFailed("old and new are the same; nothing would change.")
    sandbox: Sandbox = ctx.sandbox
    given = {"path": path, "old": old, "new": new, "replace_all": replace_all}
    try:
        answer = await run_inside(sandbox, "edit", given, DEADLINE)
    except NoPython:
        return f"{path}: {await _edit_from_here(sandbox, path, old, new, replace_all)}"
    text = str(answer.get("text", ""))
    if answer.get("done") is not True:
        raise ToolFailed(f"{path} was not changed. {text}")
    return f"{path}: {text}"


async def _edit_from_here(sandbox: Sandbox, path: str, old: str, new: str, replace_all: bool) -> str:
    """The edit for images without Python. A crash between its two halves is no harm; after both, it finds ``new``."""
    data = await sandbox.read(path, limit=LARGEST + 1)
    if len(data) > LARGEST:
        raise ToolFailed(f"{path} has more than {LARGEST} bytes. Use shell.")
    try:
        after, text = await run_in_thread(lambda: edited(data, old, new, replace_all))
    except Refused as refused:
        raise ToolFailed(f"{path} was not changed. {refused}") from refused
    await sandbox.write(path, after)
    return text


# --- list -----------------------------------------------------------------------------------------------------------


@tool(effect="read", confined=True, timeout=DEADLINE + 120.0, max_output=60_000)
async def list_files(ctx: ToolContext, path: str = ".", pattern: str = "") -> str:
    """List a folder of the workspace; folders end with a slash, files have their size in bytes.

    Args:
        path: The folder, relative to the workspace.
        pattern: Look through all folders below for files that fit, for example *.py or src/**/test_*.py; what is in
            .git is left out.
    """
    sandbox: Sandbox = ctx.sandbox
    wanted = _parts(pattern)
    found: list[str] = []
    async with aclosing(_entries(sandbox, path, recursive=bool(wanted))) as entries:
        async for entry in entries:
            if wanted and (entry.kind == "directory" or not fits(_below(path, entry.path), wanted)):
                continue
            if len(found) == MOST_LISTED:
                more = f"[there are more; the first {MOST_LISTED} are shown: give a path or a pattern]"
                return "\n".join((*found, more))
            found.append(_entry(entry))
    return "\n".join(found) or (f"No file fits {pattern!r}." if wanted else f"({path} is empty)")


async def _entries(sandbox: Sandbox, path: str, recursive: bool) -> AsyncGenerator[FileInfo]:
    after, seen = "", 0
    while True:
        listing = await sandbox.list(path, recursive=recursive, after=after)
        for entry in listing.entries:
            if not recursive or ".git" not in entry.path.split("/"):
                yield entry
        seen += len(listing.entries)
        if not listing.more or not listing.entries:
            return
        if seen >= MOST_WALKED:
            raise ToolFailed(f"There are more than {MOST_WALKED} entries below {path}. Give a smaller folder.")
        after = listing.entries[-1].path


def _entry(entry: FileInfo) -> str:
    if entry.kind == "directory":
        return f"{entry.path}/"
    return f"{entry.path}  {entry.size}" if entry.kind == "file" else f"{entry.path}  ({entry.kind})"


def _below(folder: str, path: str) -> list[str]:
    """The parts of ``path`` after those of ``folder``."""
    skipped = [part for part in folder.split("/") if part not in ("", ".")]
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return parts[len(skipped) :] if parts[: len(skipped)] == skipped else parts


def _parts(pattern: str) -> list[str]:
    """The parts of a pattern; one without a slash fits in every folder.

    Raises:
        ToolFailed: it is too long.
    """
    if len(pattern) > 500:
        raise ToolFailed("The pattern is longer than 500 characters.")
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    return ["**", *parts] if len(parts) == 1 else parts


def fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path fits, part by part; ``**`` stands for any number of folders. The time is bounded by the product of
    the lengths, whatever names a sandbox makes up."""
    reached = {0}
    for part in path:
        reached = _beyond_stars(reached, pattern)
        reached = {
            place if pattern[place] == "**" else place + 1
            for place in reached
            if place < len(pattern) and (pattern[place] == "**" or fnmatch.fnmatchcase(part, pattern[place]))
        }
    return len(pattern) in _beyond_stars(reached, pattern)


def _beyond_stars(places: set[int], pattern: Sequence[str]) -> set[int]:
    found = set(places)
    for place in range(len(pattern)):
        if place in found and pattern[place] == "**":
            found.add(place + 1)
    return found
