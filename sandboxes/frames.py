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
"boot": RANDOM}``. One host is attached at a time; a new one takes the place of the old.

    op                  request fields                                      reply
    attach              linger (s nobody may be attached before it ends)    calls: {id: "running" | "done"}, clean
    start               id, argv, env, cwd, deadline (s), grace (s between  known: bool (the id was there already:
                        TERM and KILL), stdin: bool, keep (bytes a          nothing was started), pid
                        stream), limit (bytes of both), background: bool,
                        control: bool (fd 3 of the command becomes a third
                        stream), flow: bool (wait for the reader instead of
                        leaving out), body: first bytes of stdin
    collect             id                                                  when it has ended: exit fields (below), out,
                                                                            err (lengths); kept output before it as
                                                                            events {"event": "output", stream, offset}
                                                                            in bodies, if not in the reply's own body
                                                                            (stdout then stderr, where both fit)
    follow              id                                                  events output as it comes; reply at its end
    run                 as start; the same as start and collect in one      as collect, and known
    stdin               id, body, end: bool                                 written
    signal              id, signal                                          -
    kill                id                                                  - (when nothing of it is left)
    forget              ids                                                 - (results of these calls may go)
    read                path, offset, limit                                 size; body is at most 256 KiB
    write               path, offset (0: begin a new file), last: bool,     size (at last: moved into its place)
                        append, mode, body
    stat                path                                                entry
    list                path, recursive, after, limit                       entries, more
    remove, mkdir       path                                                -
    watch               path                                                events {"event": "change", kind, path}; no
                                                                            reply before unwatch
    unwatch             of (the n of the watch)                             -
    sweep               keep: [ids]                                         killed (count): ends everything that belongs
                                                                            to no call of ``keep``
    reset               -                                                   clean: bool: nothing runs, workspace and
                                                                            /tmp are empty
    ping                -                                                   -

    exit fields         code (128 + n for signal n), limit (null, "memory", "pids", "disk", "output"), timeout: bool,
                        seconds, stdout_total, stderr_total, truncated: bool

Streams of the network, for the egress proxy, are opened from inside and carry ``s`` instead of ``n``:

    from the sandbox    {"s", "open": true} | {"s"} + body | {"s", "end": true}
    from the host       {"s", "ready": true} | {"s"} + body | {"s", "end": true} | {"s", "took": bytes}

Each side sends at most ``WINDOW`` bytes that the other has not yet acknowledged with ``took``, so a slow stream holds
up no other. Entries are ``{"path", "kind": "file" | "directory" | "link" | "other", "size", "modified", "mode"}``.
"""

from __future__ import annotations
