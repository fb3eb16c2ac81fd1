"""Replace an exact piece of a file by another, whole or not at all; or say where it nearly stands."""

from __future__ import annotations

import json
import os
import stat
import sys

TYPE_CHECKING = False  # as in typing, which takes longer to import than all the rest
if TYPE_CHECKING:
    from typing import Any

LARGEST = 16 * 1024 * 1024
"""Bytes of a file that is edited."""

SEARCHED = 20_000
"""Lines of a file in which the nearest ones are looked for."""

TELLING = 8
"""Characters of a replacement from which on it is told that it is there already."""

AROUND = 3
"""Lines that are shown before and after a change."""


class Refused(Exception):
    """The edit was not made; the message says why, for the model."""


def edited(data: bytes, old: str, new: str, replace_all: bool) -> tuple[bytes, str]:
    """The new content, and what to tell of it.

    Raises:
        Refused: ``old`` is not there exactly once (or at all, with ``replace_all``).
    """
    was, becomes = _as_in(data, old, new)
    count = data.count(was)
    if count == 0:
        raise Refused(_not_found(data.decode("utf-8", "replace"), old, new))
    if count > 1 and not replace_all:
        raise Refused(
            f"old stands there {count} times, at lines {_lines_of(data, was)}. Give more of the lines around the one "
            f"you mean, or set replace_all."
        )
    first = data.index(was)
    after = data.replace(was, becomes)
    places = "1 place" if count == 1 else f"{count} places"
    return after, f"Changed in {places}.\n{_shown(after, first, len(becomes))}"


def _as_in(data: bytes, old: str, new: str) -> tuple[bytes, bytes]:
    """The pieces with the line ends of the file: models do not see that a file has Windows' ones."""
    was, becomes = old.encode("utf-8", "surrogatepass"), new.encode("utf-8", "surrogatepass")
    if was not in data and b"\r\n" in data and b"\r\n" not in was:
        return was.replace(b"\n", b"\r\n"), becomes.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    return was, becomes


def _lines_of(data: bytes, piece: bytes) -> str:
    """The lines at which a piece begins, the first twenty."""
    found: list[str] = []
    at, line, counted = data.find(piece), 1, 0
    while at >= 0 and len(found) < 20:
        line += data.count(b"\n", counted, at)
        counted = at
        found.append(str(line))
        at = data.find(piece, at + len(piece))
    return ", ".join(found)


def _numbered(lines: list[str], first: int) -> str:
    return "\n".join(f"{first + index:>6}\t{line[:500]}" for index, line in enumerate(lines))


def _shown(after: bytes, at: int, length: int) -> str:
    """The lines of the first change, and some around it."""
    line = after.count(b"\n", 0, at)
    changed = min(after.count(b"\n", at, at + length) + 1, 40)
    first = max(0, line - AROUND)
    lines = after.decode("utf-8", "replace").splitlines()[first : line + changed + AROUND]
    return "It reads now:\n" + _numbered(lines, first + 1) if lines else "The file is empty now."


def _not_found(text: str, old: str, new: str) -> str:
    if len(new.strip()) >= TELLING and new in text and old not in new:
        line = text.count("\n", 0, text.index(new)) + 1
        return f"old is not in the file, but new is, at line {line}: perhaps this edit was made before."
    lines, wanted = text.splitlines()[:SEARCHED], old.splitlines()
    at, same = _nearest(lines, wanted)
    if at is None:
        return "old is not in the file, and nothing like it. Read the file and copy the lines exactly."
    first = max(0, at - AROUND)
    near = _numbered(lines[first : at + len(wanted) + AROUND], first + 1)
    how = "These lines differ from it in white space only:" if same else "The nearest lines are these:"
    return f"old is not in the file exactly. Copy lines as they are, without the numbers. {how}\n{near}"


def _nearest(lines: list[str], wanted: list[str]) -> tuple[int | None, bool]:
    """The line at which most lines of ``wanted`` stand, apart from white space; else that of the most similar line."""
    bare, goal = [" ".join(line.split()) for line in lines], [" ".join(line.split()) for line in wanted]
    places: dict[str, list[int]] = {}
    for number, line in enumerate(bare):
        places.setdefault(line, []).append(number)
    votes: dict[int, int] = {}
    for offset, line in enumerate(goal):
        for number in places.get(line, [])[:100] if line else []:
            votes[max(0, number - offset)] = votes.get(max(0, number - offset), 0) + 1
    if votes:
        best = min(votes, key=lambda start: (-votes[start], start))
        return best, bare[best : best + len(goal)] == goal
    longest = max(goal, key=len, default="")[:200]
    starts = {line[:200]: numbers[0] for line, numbers in reversed(list(places.items())[:2000]) if line}
    import difflib  # slow to import, and seldom needed

    close = difflib.get_close_matches(longest, list(starts), 1, 0.6)
    return (starts[close[0]], False) if close else (None, False)


def target(path: str) -> str:
    """The file that is meant, where a file call would find it too.

    Raises:
        Refused: it is outside of the workspace and of ``/tmp``, is not there, or is no file.
    """
    home = os.path.realpath(os.getcwd())
    full = os.path.realpath(os.path.join(home, path))
    if not any(os.path.commonpath([full, root]) == root for root in (home, os.path.realpath("/tmp"))):
        raise Refused(f"{path} is outside of the workspace.")
    try:
        mode = os.stat(full)
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}. write_file makes a new file.") from error
    if not stat.S_ISREG(mode.st_mode):
        raise Refused(f"{path} is no file.")
    if mode.st_size > LARGEST:
        raise Refused(f"{path} has {mode.st_size} bytes; files of up to {LARGEST} are edited. Use shell.")
    return full


def replace(path: str, data: bytes) -> None:
    """Put ``data`` in the place of a file's content, at once, with the same permissions."""
    beside = f"{os.path.dirname(path)}/.edit-{os.urandom(6).hex()}"
    try:
        with open(beside, "xb") as file:
            file.write(data)
        os.chmod(beside, stat.S_IMODE(os.stat(path).st_mode))
        os.replace(beside, path)
    except BaseException:
        if os.path.lexists(beside):
            os.unlink(beside)
        raise


def answer(given: dict[str, Any]) -> dict[str, Any]:
    """Make the edit that ``given`` asks for."""
    try:
        path = target(given["path"])
        with open(path, "rb") as file:
            data = file.read()
        after, text = edited(data, given["old"], given["new"], given["replace_all"])
        replace(path, after)
    except Refused as refused:
        return {"done": False, "text": str(refused)}
    except OSError as error:
        return {"done": False, "text": f"{given['path']}: {error.strerror or error}"}
    return {"done": True, "text": text}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(json.load(sys.stdin))) + "\n")
