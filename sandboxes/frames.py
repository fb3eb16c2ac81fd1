"""The wire between the host and the supervisor in a sandbox.

A frame is two lengths (unsigned 32 bit, big endian), a header in JSON and a body of bytes:

    header length | body length | header | body         header <= 64 KiB, body <= 256 KiB

Anything else is a breach: the other side is broken or hostile, and the connection ends. The host never trusts a
length, a number or a name that comes from inside.

Requests carry ``n``, a number that the host chooses; every answer to it carries the same ``n``. A request is answered
by exactly one reply, ``{"n", "ok": true, ...}`` or ``{"n", "error": {"kind", "message"}}``, possibly after events
``{"n", "event": ...}``. Kinds of errors: ``not_found`` (no such file), ``path`` (outside of the workspace, or no
regular file), ``disk`` (no space), ``spawn`` (the command cannot be started), ``no_call`` (no such call id),
``request`` (anything else that is wrong with the request).

The supervisor speaks first, once a connection is there: ``{"hello": 1, "protocol": PROTOCOL, "supervisor": DIGEST,
"boot": RANDOM}``. One host is attached at a time; a new one takes the place of the old with its first request, and the
old one's connection ends.

    op                  request fields                                      reply
    attach              linger (s nobody may be attached before it ends)    clean (nothing runs, workspace and /tmp are
                                                                            empty); body: JSON {id: "running" | "done"}
    start               id, argv, env, cwd, deadline (s), grace (s between  known: bool (the id was there already:
                        TERM and KILL), stdin: bool (it stays open after    nothing was started), pid
                        the body), keep (bytes a stream), limit (bytes of
                        both), background: bool, control: bool (fd 3 of
                        the command becomes a third stream), flow: bool
                        (wait for the reader instead of leaving out),
                        body: (first) bytes of stdin
    collect             id                                                  when it has ended: exit fields (below), out,
                                                                            err (lengths in the reply's body: stdout
                                                                            then stderr); where they do not fit, events
                                                                            {"event": "output", stream, offset} with
                                                                            bodies come before it, and both are 0
    follow              id; the host sends {"n", "took": bytes} for what    events output, from the start (what is
                        it has read: never more than WINDOW is not yet      kept), then as it comes; at its end exit
                        acknowledged                                        fields
    run                 as start; the same as start and collect in one      as collect, and known
    stdin               id, body, end: bool                                 written (when the command's pipe has it)
    signal              id, signal                                          -
    kill                id                                                  - (when nothing of it is left)
    forget              ids                                                 - (results of these calls may go)
    read                path, offset, limit                                 size; body is at most 256 KiB
    write               path, offset (0: begin a new file), last: bool,     size (at last: moved into its place)
                        append, mode, part (names the upload where it
                        takes several frames: two of one file at once
                        have different ones), body
    stat                path                                                entry
    list                path, recursive, after, limit                       more; body: JSON [entry, ...], fewer than
                                                                            limit where they would not fit
    remove, mkdir       path                                                -
    watch               path                                                events {"event": "change", kind, path}; no
                                                                            reply before unwatch
    unwatch             of (the n of the watch, or of a follow)             -
    sweep               keep: [ids]                                         killed (count): ends everything that belongs
                                                                            to no call of ``keep``
    reset               -                                                   clean: bool: nothing runs, workspace and
                                                                            /tmp are empty, no result is kept
    ping                -                                                   -

    exit fields         code (128 + n for signal n), limit (null, "memory", "pids", "disk", "output"), timeout: bool,
                        seconds, stdout_total, stderr_total, truncated: bool, and survivors (count) where something
                        withstood SIGKILL: the sandbox has to be removed

``id`` is at most 128 characters long. ``env`` is added to the supervisor's own environment. ``cwd`` is relative to the
workspace, or absolute. Paths are as in the port: relative to the workspace, or absolute below it or below ``/tmp``
(where those folders are elsewhere, as on a machine without containers, these names still mean them). A path that is no
UTF-8 has lone surrogates for its bytes, as ``os.fsdecode`` makes them. Lists are ordered by the parts of their paths.

A normal call has ended when its main process has, with all that it left running; a ``background`` one when its main
process has: what that has left lives on until the call is killed, its deadline passes or ``sweep`` comes. A call that
was ended for its deadline or by ``kill`` leaves nothing. ``flow`` holds the command up while its reader is slow.

Streams of the network, for the egress proxy, are opened from inside and carry ``s`` instead of ``n``:

    from the sandbox    {"s", "open": true} | {"s"} + body | {"s", "end": true} | {"s", "took": bytes}
    from the host       {"s", "ready": true} | {"s"} + body | {"s", "end": true} | {"s", "took": bytes}

Each side sends at most ``WINDOW`` bytes that the other has not yet acknowledged with ``took``, so a slow stream holds
up no other. ``end`` ends one direction; ``ready`` says that the host serves it, and nothing waits for that. Entries
are ``{"path", "kind": "file" | "directory" | "link" | "other", "size", "modified", "mode"}``.
"""

from __future__ import annotations

import json
import struct
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, NoReturn

PROTOCOL: Final = 1
MAX_HEADER: Final = 64 * 1024
MAX_BODY: Final = 256 * 1024
WINDOW: Final = 256 * 1024
"""Bytes of a network stream that may be under way in one direction."""

Frame = tuple[dict[str, Any], bytes]

_LENGTHS = struct.Struct(">II")
_ENCODER = json.JSONEncoder(separators=(",", ":"))


class Breach(Exception):
    """The other side does not keep to the wire; nothing that it sends after this means anything."""


def encode(header: dict[str, Any], body: bytes = b"") -> bytes:
    """A frame.

    Raises:
        ValueError: it would be too large.
    """
    text = _ENCODER.encode(header).encode()
    if len(text) > MAX_HEADER:
        raise ValueError(f"a frame's header of {len(text)} bytes: at most {MAX_HEADER} may be sent at once")
    if len(body) > MAX_BODY:
        raise ValueError(f"a frame's body of {len(body)} bytes: at most {MAX_BODY} may be sent at once")
    return b"".join((_LENGTHS.pack(len(text), len(body)), text, body))


class Decoder:
    """Makes frames of bytes as they come."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that ``data`` completes.

        Raises:
            Breach: what came is no frame; the connection must end.
        """
        self._buffer += data
        frames: list[Frame] = []
        at = 0
        while (end := self._end(at)) is not None:
            frames.append(self._frame(at, end))
            at = end
        del self._buffer[:at]
        return frames

    def _end(self, at: int) -> int | None:
        """Where the frame at ``at`` ends; ``None`` if not all of it is there. Its lengths are checked at once, so that
        nobody can make us wait for, or keep, more than a frame may have."""
        if len(self._buffer) - at < _LENGTHS.size:
            return None
        header, body = _LENGTHS.unpack_from(self._buffer, at)
        if header > MAX_HEADER or body > MAX_BODY:
            raise Breach(f"a frame of {header} and {body} bytes was announced: more than {MAX_HEADER} and {MAX_BODY}")
        end = at + _LENGTHS.size + header + body
        return end if end <= len(self._buffer) else None

    def _frame(self, at: int, end: int) -> Frame:
        start = at + _LENGTHS.size
        middle = start + _LENGTHS.unpack_from(self._buffer, at)[0]
        with memoryview(self._buffer) as view:
            return _header(bytes(view[start:middle])), bytes(view[middle:end])


def _header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Breach(f"a frame's header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise Breach(f"a frame's header is no object: {text[:100]!r}")
    return header


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


@lru_cache(maxsize=1)
def supervisor_source() -> str:
    """The program that runs inside: ``python3 -c SOURCE serve ...``."""
    return _source("supervisor.py")


@lru_cache(maxsize=1)
def kernel_source() -> str:
    """The program of a stateful Python session: ``python3 -c SOURCE``."""
    return _source("kernel.py")


def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def digest_of(source: str) -> str:
    """What a supervisor of this source calls itself in its first frame."""
    return blake2b(source.encode(), digest_size=16).hexdigest()


def __getattr__(name: str) -> str:
    """``SUPERVISOR_DIGEST`` costs the reading of a file, so it is not there before somebody asks."""
    if name == "SUPERVISOR_DIGEST":
        return digest_of(supervisor_source())
    raise AttributeError(name)
