"""The workspace as an archive, and back: runs inside the sandbox, of the standard library of Python 3.8 alone.

The host hands over this file's text (``python3 -I -c SOURCE pack FOLDER``) and never opens an archive itself: what is
in one was written by code that a model wrote, and maybe in another sandbox. So what comes out of an archive is checked
again before it goes into a workspace: no absolute names, no ``..``, nothing but files, folders and links. Links are
made when all else is there, so that nothing is written through one; those that lead out of the workspace are left out.

    pack FOLDER          writes a gzipped tar to standard output, and {"files": n} to standard error
    unpack FOLDER MOST   reads one from standard input; at most MOST bytes of content
"""

from __future__ import annotations

import gzip
import json
import os
import stat
import sys
import tarfile
from typing import IO


def main(argv: list[str]) -> int:
    """Do what the arguments say; 0, or 1 with a reason on standard error."""
    try:
        if argv[0] == "pack":
            files = pack(argv[1], sys.stdout.buffer)
        else:
            files = unpack(argv[1], sys.stdin.buffer, int(argv[2]))
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        sys.stderr.write(str(error) or type(error).__name__)
        return 1
    sys.stderr.write(json.dumps({"files": files}))
    return 0


def pack(folder: str, out: IO[bytes]) -> int:
    """Write what is in ``folder`` to ``out``; how many entries. Sockets, pipes and devices are left out."""
    count = 0
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1, mtime=0) as packed:
        with tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for base, folders, files in os.walk(folder):
                folders.sort()
                for name in sorted(folders + files):
                    path = os.path.join(base, name)
                    count += _pack_one(tar, path, os.path.relpath(path, folder))
    return count


def _pack_one(tar: tarfile.TarFile, path: str, name: str) -> int:
    try:
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
            return 0
        tar.inodes = {}  # type: ignore[attr-defined]  # two names of one file are two files
        entry = tar.gettarinfo(path, name)
        if not entry.isreg():
            tar.addfile(entry)
            return 1
        with open(path, "rb") as file:
            entry.size = os.fstat(file.fileno()).st_size
            tar.addfile(entry, _Whole(file))  # type: ignore[arg-type]
        return 1
    except (FileNotFoundError, PermissionError):  # it went away, or cannot be read
        return 0


class _Whole:
    """A file that never ends: one that is cut while it is read is filled up with zeros, to the size in its header."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        return self._file.read(size).ljust(size, b"\0")


def unpack(folder: str, source: IO[bytes], most: int) -> int:
    """Write what is in the archive below ``folder``, which is empty; how many entries."""
    folder = os.path.realpath(folder)
    links: list[tuple[str, str]] = []
    count = total = 0
    with tarfile.open(fileobj=source, mode="r|gz") as tar:
        for entry in tar:
            total += max(entry.size, 0)
            if total > most:
                raise ValueError(f"the archive has more than {most} bytes")
            path = _place(folder, entry.name)
            if entry.issym():
                links.append((path, entry.linkname))
            else:
                _unpack_one(tar, entry, path)
            count += 1
    _link(links)
    return count


def _place(folder: str, name: str) -> str:
    """Where an entry goes."""
    parts = name.split("/")
    if not name or name.startswith("/") or ".." in parts or "\0" in name:
        raise ValueError(f"the archive has an entry that leads out of the workspace: {name!r}")
    path = os.path.normpath(os.path.join(folder, name))
    parent = os.path.dirname(path)
    if path == folder or os.path.realpath(parent) != parent:
        raise ValueError(f"the archive has an entry that leads out of the workspace: {name!r}")
    os.makedirs(parent, exist_ok=True)
    return path


def _unpack_one(tar: tarfile.TarFile, entry: tarfile.TarInfo, path: str) -> None:
    if entry.isdir():
        os.makedirs(path, exist_ok=True)
        os.chmod(path, (entry.mode & 0o777) | 0o700)
    elif entry.isreg():
        _write(path, tar.extractfile(entry), entry)
    else:
        raise ValueError(f"the archive has an entry that is no file, folder or link: {entry.name!r}")


def _link(links: list[tuple[str, str]]) -> None:
    """Make the links, after all files: nothing can be written through one. Those that lead out stay as they were (the
    ``python`` of a virtual environment does): they are followed by what runs there, and never by file calls."""
    for path, target in links:
        os.symlink(target, path)


def _write(path: str, source: IO[bytes] | None, entry: tarfile.TarInfo) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        while source is not None:
            piece = source.read(262144)
            if not piece:
                break
            file.write(piece)
        os.fchmod(file.fileno(), entry.mode & 0o777)
    os.utime(path, (entry.mtime, entry.mtime))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
