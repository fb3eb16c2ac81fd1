"""The supervisor, with real processes that do their worst; it runs as a child process here, over its own socket."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.sandboxes.inside import PATIENCE, Inside, Plain, inside, running

from ridethrough.sandboxes import frames, supervisor
from ridethrough.sandboxes.frames import MAX_BODY, WINDOW, encode

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def shared() -> Iterator[Inside]:
    with inside("--local") as found:
        yield found


@pytest.fixture
def box(shared: Inside) -> Inside:
    """A supervisor that is as good as new."""
    shared.part()
    shared.host = shared.attach()
    assert shared.host.ask("reset")["clean"] is True, shared.left
    return shared


@pytest.fixture
def host(box: Inside) -> Plain:
    return box.host


@pytest.fixture
def mark() -> str:
    """A number of seconds that no other process sleeps for, nor for ever."""
    return f"{60 + uuid.uuid4().int % 10**9 / 10**9:.9f}"


# --- commands ---------------------------------------------------------------------------------------------------------


def test_it_says_who_it_is(host: Plain) -> None:
    assert host.hello["hello"] == 1
    assert host.hello["protocol"] == frames.PROTOCOL
    assert host.hello["supervisor"] == frames.SUPERVISOR_DIGEST


def test_a_command_gets_what_it_was_given(box: Inside) -> None:
    (box.workspace / "sub").mkdir()
    reply = box.host.shell(
        'cat; pwd; echo "$A $RIDETHROUGH_CALL" >&2; exit 3', body=b"in\n", env={"A": "1"}, cwd="sub", id="the-id"
    )
    assert (reply["code"], reply.out, reply.err) == (3, f"in\n{box.workspace}/sub\n".encode(), b"1 the-id\n")
    assert (reply["known"], reply["limit"], reply["timeout"], reply["truncated"]) == (False, None, False, False)
    assert (reply["stdout_total"], reply["stderr_total"]) == (len(reply.out), len(reply.err))


def test_a_command_finds_nothing_that_is_not_its_own(host: Plain) -> None:
    reply = host.run("sh", "-c", "ls -l /proc/self/fd | wc -l; wc -c; cat /proc/self/status | grep -E 'Sig(Blk|Ign)'")
    lines = reply.out.split()
    assert lines[:2] == [b"5", b"0"], "three streams and the listing itself; and no input"
    assert [int(lines[at], 16) & 0x7FFFFFFF for at in (3, 5)] == [0, 0]


def test_signals_are_statuses_as_in_a_shell(host: Plain) -> None:
    assert host.shell("kill -9 $$")["code"] == 137
    assert host.shell("exit 255")["code"] == 255


def test_output_is_bytes(host: Plain) -> None:
    reply = host.run(sys.executable, "-c", "import os; os.write(1, bytes(range(256)) * 9); os.write(2, b'\\xff\\0')")
    assert (reply.out, reply.err) == (bytes(range(256)) * 9, b"\xff\0")


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"argv": ["no-such-program"]}, "spawn", "no-such-program cannot be started: No such file"),
        ({"argv": ["/etc/passwd"]}, "spawn", "Permission denied"),
        ({"argv": ["/"]}, "spawn", "Permission denied"),
        ({"argv": ["true"], "cwd": "missing"}, "spawn", "missing cannot be entered: No such file"),
        ({"argv": []}, "request", "argv is not empty"),
        ({"argv": ["a\0b"]}, "request", "null"),
        ({"argv": ["true"], "env": {"A": 1}}, "request", "text"),
        ({"argv": ["true"], "env": {"A=B": "1"}}, "request", "environment"),
        ({"argv": "true"}, "request", "argv"),
        ({"argv": ["true"], "deadline": -1}, "request", "deadline"),
        ({"argv": ["true"], "deadline": "1"}, "request", "deadline"),
        ({"argv": ["true"], "id": ""}, "request", "id"),
        ({"argv": ["true"], "id": "x" * 129}, "request", "id"),
        ({"argv": ["x" * 60_000] * 1}, "spawn", "cannot be started"),
    ],
)
def test_what_cannot_be_started_is_refused(host: Plain, fields: dict[str, object], kind: str, message: str) -> None:
    reply = host.ask("run", b"", **{"id": "x", **fields})
    assert reply.kind == kind
    assert message in reply.message
    assert host.ask("attach").json() == {}, "the id is free"


def test_an_id_starts_one_command_only(box: Inside) -> None:
    replies = [box.host.shell("echo x >> ran; echo out", id="once") for _ in range(2)]
    assert [(reply.out, reply["known"]) for reply in replies] == [(b"out\n", False), (b"out\n", True)]
    assert (box.workspace / "ran").read_text() == "x\n"


def test_a_second_request_joins_the_command_that_runs(host: Plain) -> None:
    first = host.begin("run", id="a", argv=["cat"], stdin=True)
    second = host.begin("run", id="a", argv=["cat"], stdin=True)
    host.ask("stdin", b"x", id="a", end=True)
    assert [host.wait(n).out for n in (first, second)] == [b"x", b"x"]


def test_an_unknown_call_is_told(host: Plain) -> None:
    for op in ("collect", "follow", "stdin", "signal", "kill"):
        assert host.ask(op, id="never").kind == "no_call"


# --- output -----------------------------------------------------------------------------------------------------------


def test_the_first_and_the_last_half_of_the_output_are_kept(host: Plain) -> None:
    reply = host.shell("seq 1 100000; seq 1 9 >&2", keep=100)
    whole = "".join(f"{n}\n" for n in range(1, 100001)).encode()
    assert reply.out == whole[:50] + whole[-50:]
    assert reply.err == b"1\n2\n3\n4\n5\n6\n7\n8\n9\n"
    assert (reply["truncated"], reply["stdout_total"], reply["limit"]) == (True, len(whole), None)


@pytest.mark.parametrize("keep", [0, 1, 17, 18])
def test_keeping_little_is_exact(host: Plain, keep: int) -> None:
    reply = host.run("printf", "0123456789abcdefgh", keep=keep)
    text = b"0123456789abcdefgh"
    first, last = keep - keep // 2, keep // 2
    assert reply.out == text[:first] + text[len(text) - last :]
    assert reply["truncated"] is (keep < 18)


def test_output_that_fits_no_frame_comes_in_several(host: Plain) -> None:
    reply = host.shell("head -c 700000 /dev/zero | tr '\\0' a; head -c 3000000 /dev/zero | tr '\\0' b >&2")
    assert reply.out == b"a" * 700_000
    assert reply.err == b"b" * 1024 * 1024
    assert [header["offset"] for header, _ in reply.events][:3] == [0, MAX_BODY, 2 * MAX_BODY]
    assert reply.events[-1][0]["offset"] + len(reply.events[-1][1]) == reply["stderr_total"] == 3_000_000


def test_endless_output_ends_the_command(host: Plain, mark: str) -> None:
    reply = host.shell(f"sleep {mark} & yes & yes >&2", limit=1_000_000, keep=10)
    assert (reply["limit"], reply["code"], reply["timeout"]) == ("output", 137, False)
    assert reply["stdout_total"] + reply["stderr_total"] > 1_000_000
    assert max(len(reply.out), len(reply.err)) == 10
    assert running(mark) == []


def test_output_can_be_followed_from_its_start(host: Plain) -> None:
    id = host.start("echo one; read x; echo two >&2; exit 4", stdin=True)
    n = host.begin("follow", id=id)
    host.until(lambda: host.written(n) == b"one\n")
    host.ask("stdin", b"\n", id=id)
    reply = host.wait(n)
    assert (reply["code"], reply.streamed("stdout"), reply.streamed("stderr")) == (4, b"one\n", b"two\n")
    again = host.ask("follow", id=id)
    assert (again["code"], again.streamed("stdout")) == (4, b"one\n")


def test_a_control_message_comes_after_what_was_written_before_it(host: Plain) -> None:
    script = "for i in $(seq 200); do head -c 3000 /dev/zero; echo e >&2; echo $i >&3; done"
    id = host.start(script, control=True)
    reply = host.ask("follow", id=id)
    seen, control = {"stdout": 0, "stderr": 0}, b""
    for header, body in reply.events:
        if header["stream"] == "control":
            control += body
            assert seen["stdout"] >= 3000 * int(control.split()[-1])
            assert seen["stderr"] >= 2 * int(control.split()[-1])
        else:
            seen[header["stream"]] += len(body)
    assert control.split()[-1] == b"200"


def test_a_command_that_flows_waits_for_its_reader_and_loses_nothing(box: Inside) -> None:
    host = box.host
    host.takes = False
    host.start("seq 1 300000; echo done > done", id="a", flow=True, keep=10)
    n = host.begin("follow", id="a")
    host.until(lambda: len(host.written(n)) == WINDOW)
    assert host.ask("ping")["ok"]
    assert not (box.workspace / "done").exists()
    host.takes = True
    host.send({"n": n, "took": WINDOW})
    reply = host.wait(n)
    assert reply.streamed("stdout") == "".join(f"{i}\n" for i in range(1, 300001)).encode()
    assert (box.workspace / "done").exists()
    assert host.ask("collect", id="a").out == b"1\n2\n3" + b"0000\n"


def test_a_command_goes_on_when_its_reader_has_left(box: Inside) -> None:
    host = box.host
    host.takes = False
    host.start("seq 1 300000; echo done > done", id="a", flow=True)
    n = host.begin("follow", id="a")
    host.until(lambda: len(host.written(n)) == WINDOW)
    assert host.ask("unwatch", of=n)["ok"]
    assert host.wait(n)["ok"]
    while host.ask("attach").json() != {"a": "done"}:
        pass
    assert (box.workspace / "done").exists()


def test_other_commands_do_not_wait_for_their_readers(box: Inside) -> None:
    host = box.host
    host.takes = False
    id = host.start("seq 1 1000000; echo done > done", keep=1000)
    n = host.begin("follow", id=id)
    assert host.ask("collect", id=id)["code"] == 0
    host.takes = True
    host.send({"n": n, "took": WINDOW})
    reply = host.wait(n)
    last_header, last = reply.events[-1]
    assert last_header["offset"] + len(last) == reply["stdout_total"]
    assert len(reply.streamed("stdout")) < reply["stdout_total"]
    assert last.endswith(b"1000000\n")


def test_a_host_that_reads_nothing_holds_up_nobody(box: Inside) -> None:
    """More than fits in the socket waits for it; its command goes on, and it still gets the end."""
    deaf = box.host
    id = deaf.start("head -c 30000000 /dev/zero; echo done > done")
    for _ in range(20):
        deaf.begin("follow", id=id)
    other = box.attach()
    assert other.ask("collect", id=id)["stdout_total"] == 30_000_000


# --- input ------------------------------------------------------------------------------------------------------------


def test_input_is_taken_as_the_command_reads_it(host: Plain) -> None:
    data = os.urandom(MAX_BODY)
    n = host.begin("run", data, id="a", argv=["sh", "-c", "read x < gate; sha256sum"], stdin=True)
    assert host.ask("stdin", b"", id="missing").kind == "no_call"
    ends = [host.begin("stdin", data, id="a", end=last) for last in (False, False, True)]
    assert host.ask("ping")["ok"]
    host.ask("kill", id="a")
    assert host.wait(n)["code"] != 0
    assert [host.wait(end).kind for end in ends][-1] == "request"


def test_all_input_arrives(host: Plain) -> None:
    data = os.urandom(MAX_BODY)
    n = host.begin("run", data, id="a", argv=["sh", "-c", "cat | wc -c"], stdin=True)
    for last in (False, True):
        assert host.ask("stdin", data, id="a", end=last)["written"] == MAX_BODY
    assert host.wait(n).out == b"%d\n" % (3 * MAX_BODY)
    assert host.ask("stdin", b"x", id="a").kind == "request"


def test_input_for_a_command_that_takes_none_is_refused(host: Plain) -> None:
    host.start("sleep 60", id="a")
    assert host.ask("stdin", b"x", id="a").kind == "request"
    host.start("exec <&-; echo; sleep 60", id="b", stdin=True)
    n = host.begin("follow", id="b")
    host.until(lambda: host.written(n))
    assert host.ask("stdin", b"x", id="b").kind == "request"


# --- ends -------------------------------------------------------------------------------------------------------------

HIDING = """
import os, sys, time
if os.fork(): time.sleep(float(sys.argv[1]))
os.setsid()
if os.fork(): os._exit(0)
os.execve(sys.argv[2], ["sleep", sys.argv[1]], {})
"""
"""Ignores what it was told to, and leaves a process in a session of its own, with no parent and no environment."""


def test_a_deadline_ends_with_sigterm(host: Plain) -> None:
    reply = host.shell("trap 'echo bye; exit 5' TERM; echo on; while :; do sleep 0.01; done", deadline=0.3)
    assert (reply["timeout"], reply["code"], reply.out) == (True, 5, b"on\nbye\n")


def test_a_deadline_ends_what_hides(host: Plain, mark: str) -> None:
    script = f"trap '' TERM; {sys.executable} -c '{HIDING}' {mark} $(command -v sleep) & setsid sleep {mark} & wait"
    reply = host.shell(script, deadline=0.5, grace=0.1)
    assert (reply["timeout"], reply["code"]) == (True, 137)
    assert "survivors" not in reply.header
    assert running(mark) == []


def test_a_deadline_holds_while_nobody_is_attached(box: Inside, mark: str) -> None:
    box.host.start(f"trap '' TERM; sleep {mark}; sleep {mark}", id="a", deadline=0.2, grace=0.1)
    box.host.close()
    host = box.attach()
    assert host.ask("collect", id="a")["timeout"] is True
    assert running(mark) == []


@pytest.mark.parametrize("streams", ["", ">/dev/null 2>&1"], ids=["holding the pipes", "silent"])
@pytest.mark.parametrize("how", ["sleep", "setsid sleep", "env -i setsid sleep", "nohup sleep"])
def test_a_command_leaves_nothing(host: Plain, mark: str, how: str, streams: str) -> None:
    reply = host.shell(f"{how} {mark} {streams} & ({how} {mark} {streams} &) & wait $!; echo out")
    assert (reply["code"], reply.out) == (0, b"out\n")
    assert running(mark) == []


WALKING = """
import os, sys, time
for i in range(int(sys.argv[1])):
    if os.fork() == 0:
        os.setsid()
        while os.fork() == 0:
            PACE
        os._exit(0)
"""
"""Each process forks and exits at once, so none is there for long."""


@pytest.mark.parametrize("pace", ["time.sleep(0.001)", "os.setsid()", "pass"])
def test_what_goes_on_forking_is_ended(box: Inside, pace: str) -> None:
    reply = box.host.run(sys.executable, "-c", WALKING.replace("PACE", pace), "8")
    assert "survivors" not in reply.header
    children = Path(f"/proc/{box.process.pid}/task/{box.process.pid}/children")
    while children.read_text():
        assert box.host.ask("ping")["ok"]


def test_the_end_of_one_command_spares_the_other(host: Plain, mark: str) -> None:
    other = f"setsid sleep {mark} & (sleep {mark} &); (env -i setsid sh -c 'echo up; sleep {mark}' &); read x"
    a = host.begin("run", id="a", argv=["sh", "-c", other], stdin=True, deadline=PATIENCE)
    n = host.begin("follow", id="a")
    host.until(lambda: host.written(n) == b"up\n")
    spared = {pid for pid in running(mark) if tagged(pid, "a")}
    assert len(spared) >= 3
    mine = "7" + mark
    assert host.shell(f"setsid sleep {mine} & sleep {mine} & env -i setsid sleep {mine} &")["code"] == 0
    assert set(running(mark)) == spared, "what shows no sign of whose it is goes with the first call that ends"
    assert running(mine) == []
    host.ask("stdin", b"\n", id="a", end=True)
    assert host.wait(a)["code"] == 0
    assert running(mark) == []


def tagged(pid: int, id: str) -> bool:
    """Whether a process says that it belongs to a call."""
    return f"RIDETHROUGH_CALL={id}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()


def test_kill_ends_all_of_a_call(host: Plain, mark: str) -> None:
    host.start(f"trap '' TERM; setsid sleep {mark} & sleep {mark}", id="a")
    n = host.begin("collect", id="a")
    assert host.ask("kill", id="a")["ok"]
    assert running(mark) == []
    assert (host.wait(n)["code"], host.ask("kill", id="a")["ok"]) == (137, True)


def test_a_signal_goes_to_the_group(host: Plain) -> None:
    host.start("trap 'exit 6' USR1; echo up; while :; do sleep 0.01; done", id="a")
    n = host.begin("follow", id="a")
    host.until(lambda: host.written(n) == b"up\n")
    assert host.ask("signal", id="a", signal=int(signal.SIGUSR1))["ok"]
    assert host.wait(n)["code"] == 6
    assert host.ask("signal", id="a", signal=9)["ok"], "one that has ended is fine"
    assert host.ask("signal", id="a", signal=65).kind == "request"


def test_a_background_call_may_leave_what_lives_on_until_it_is_killed(host: Plain, mark: str) -> None:
    host.start(f"setsid sleep {mark} > /dev/null 2>&1 & echo on", id="a", background=True)
    assert host.ask("collect", id="a").out == b"on\n"
    assert host.run("true")["code"] == 0
    assert len(running(mark)) == 1
    assert host.ask("attach")["clean"] is False
    assert host.ask("kill", id="a")["ok"]
    assert running(mark) == []
    assert host.ask("attach")["clean"] is True


def test_what_a_background_call_has_left_ends_at_its_deadline(host: Plain, mark: str) -> None:
    host.start(f"setsid sleep {mark} > /dev/null 2>&1 &", id="a", background=True, deadline=0.3)
    assert host.ask("collect", id="a")["timeout"] is False
    while running(mark):
        assert host.ask("ping")["ok"]


def test_sweep_ends_all_but_what_is_kept(host: Plain, mark: str) -> None:
    for id in "abc":
        host.start(f"sleep {mark}", id=id)
    assert host.ask("sweep", keep=["b"])["killed"] >= 2
    assert host.ask("attach").json() == {"a": "done", "b": "running", "c": "done"}
    assert host.ask("sweep")["killed"] >= 1
    assert running(mark) == []


def test_reset_leaves_nothing(box: Inside, mark: str) -> None:
    host = box.host
    host.start(f"mkdir -p a/b/c; echo x > a/b/c/d; ln -s / root; mkfifo fifo; sleep {mark}", id="a")
    host.shell(f"echo > {box.tmp}/x; mkdir -p {box.tmp}/y/.z")
    assert host.ask("attach")["clean"] is False
    assert host.ask("reset")["clean"] is True, box.left
    assert running(mark) == []
    assert list(box.workspace.iterdir()) == list(box.tmp.iterdir()) == []
    assert host.ask("attach").json() == {}


# --- hosts ------------------------------------------------------------------------------------------------------------


def test_what_finishes_while_nobody_is_attached_is_there_for_the_next_host(box: Inside) -> None:
    box.host.begin("run", id="a", argv=["sh", "-c", "read x < gate; echo got $x"], deadline=PATIENCE)
    os.mkfifo(box.workspace / "gate")
    box.host.ask("ping")
    box.host.close()
    host = box.attach()
    assert host.ask("attach").json() == {"a": "running"} or host.ask("attach").json() == {"a": "done"}
    host.close()
    with open(box.workspace / "gate", "w") as gate:
        gate.write("it\n")
    again = box.attach()
    reply = again.ask("collect", id="a")
    assert reply.out == b"got it\n"
    assert again.run("sh", id="a")["known"] is True


def test_the_newest_host_takes_the_place_of_the_old(box: Inside) -> None:
    old = box.host
    silent = box.connect()
    assert old.ask("ping")["ok"], "who asks for nothing takes no place"
    new = box.attach()
    with pytest.raises((EOFError, ConnectionError)):
        old.ask("ping")
    assert new.ask("ping")["ok"]
    assert silent.ask("ping")["ok"]
    with pytest.raises((EOFError, ConnectionError)):
        new.ask("ping")


def test_nobody_from_inside_can_attach(box: Inside) -> None:
    code = f"""
import socket
sock = socket.socket(socket.AF_UNIX)
sock.connect({str(box.socket)!r})
print(sock.recv(100))
"""
    assert box.host.run(sys.executable, "-c", code).out == b"b''\n"
    assert box.host.shell(f"setsid {sys.executable} -c '{code}' & wait").out in (b"b''\n", b"")


@pytest.mark.parametrize(
    "rubbish",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 8,
        struct.pack(">II", 10, 2**31),
        struct.pack(">II", 5, 0) + b"[1,2]",
        encode({"op": "ping"}),
        encode({"n": "1", "op": "ping"}),
        encode({"n": True, "op": "ping"}),
        encode({"s": "x"}),
        encode({"n": 1, "op": "ping"})[:-3],
        struct.pack(">II", 65536, 262144) + b"{" * 1000,
        encode({"n": 1, "op": "ping"}) * 3 + b"\xff" * 100,
    ],
)
def test_rubbish_ends_the_connection_and_nothing_else(box: Inside, rubbish: bytes, mark: str) -> None:
    box.host.start(f"sleep {mark}", id="a")
    box.host.sock.sendall(rubbish)
    box.host.sock.shutdown(socket.SHUT_WR)
    with pytest.raises((EOFError, ConnectionError)):
        forever(box.host.frame)
    assert box.attach().ask("attach").json() == {"a": "running"}


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"op": 7},
        {"op": "nothing"},
        {"op": "__init__"},
        {"op": "run"},
        {"op": "start", "id": 1},
        {"op": "read"},
        {"op": "read", "path": 1},
        {"op": "read", "path": "x", "offset": -1},
        {"op": "list", "limit": "x"},
        {"op": "forget", "ids": 1},
        {"op": "attach", "linger": "x"},
        {"op": "attach", "linger": 1e300},
        {"op": "unwatch"},
        {"op": "signal", "id": "a"},
    ],
)
def test_a_wrong_request_is_refused(host: Plain, request_: dict[str, object]) -> None:
    host.send({"n": 99, **request_})
    if "op" in request_:
        assert host.wait(99).kind in ("request", "no_call")
    assert host.ask("ping")["ok"]


def forever(action: Callable[[], object]) -> None:
    """Do something until it raises."""
    while True:
        action()


def test_with_nobody_attached_it_ends_and_takes_all_with_it(mark: str) -> None:
    with inside("--local", "--linger", "0.3") as box:
        box.host.ask("attach", linger=0.2)
        box.host.start(f"trap '' TERM; setsid sleep {mark} & sleep {mark}")
        box.host.close()
        assert box.process.wait(PATIENCE) == 0
        assert running(mark) == []
        assert not box.socket.exists()


def test_sigterm_ends_it_with_all(mark: str) -> None:
    with inside("--local") as box:
        box.host.start(f"trap '' TERM; setsid sleep {mark} & sleep {mark}")
        box.process.terminate()
        assert box.process.wait(PATIENCE) == 0
        assert running(mark) == []


def test_other_signals_do_not_end_it(box: Inside) -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        box.process.send_signal(number)
    assert box.host.ask("ping")["ok"]


# --- results ----------------------------------------------------------------------------------------------------------


def test_results_are_forgotten_when_asked(host: Plain) -> None:
    host.shell("echo x", id="a")
    host.start("sleep 60", id="b")
    assert host.ask("forget", ids=["a", "b", "c", 7])["ok"]
    assert host.ask("attach").json() == {"b": "running"}
    assert host.ask("collect", id="a").kind == "no_call"


def test_the_output_of_the_oldest_results_goes_first(host: Plain) -> None:
    for i in range(36):
        host.start("head -c 1048576 /dev/zero", id=str(i))
        assert host.ask("collect", id=str(i))["code"] == 0
    first, last = host.ask("collect", id="0"), host.ask("collect", id="35")
    assert (first["code"], first["truncated"], first["stdout_total"], first.out) == (0, True, 1048576, b"")
    assert (last["truncated"], len(last.out)) == (False, 1048576)


def test_the_number_of_results_is_bounded(host: Plain) -> None:
    numbers = [host.begin("run", id=str(i), argv=["true"]) for i in range(supervisor.RESULTS + 3)]
    assert all(host.wait(n)["code"] == 0 for n in numbers)
    known = host.ask("attach").json()
    assert len(known) == supervisor.RESULTS
    assert str(supervisor.RESULTS + 2) in known


def test_without_descriptors_it_refuses_and_lives(mark: str) -> None:
    with inside("--local", limit=40) as box:
        host = box.host
        replies = [host.ask("start", id=str(i), argv=["sleep", mark]) for i in range(30)]
        assert {reply.kind for reply in replies} == {"", "spawn"}
        assert "Too many open files" in replies[-1].message
        assert host.ask("read", path="x").kind in ("request", "not_found")
        extra = socket.socket(socket.AF_UNIX)
        extra.connect(str(box.socket))
        assert host.ask("sweep")["killed"] > 5
        assert host.run("true")["code"] == 0
        extra.close()


def test_it_does_without_what_an_image_may_lack(mark: str) -> None:
    """No ctypes means no subreaper: what has lost its parent is told by its tag then."""
    with inside("--local", before="import sys\nsys.modules['ctypes'] = None\n") as box:
        beside = subprocess.Popen(["sleep", "9" + mark])
        script = f"setsid sleep {mark} & (setsid sleep {mark} &) & trap '' TERM; sleep {mark}"
        assert box.host.shell(script, deadline=0.3, grace=0.1)["timeout"] is True
        assert running(mark) == [beside.pid]
        beside.kill()
        beside.wait()


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_written_in_pieces_and_read_in_pieces(box: Inside) -> None:
    data = os.urandom(3 * MAX_BODY + 5)
    for begin in range(0, len(data), MAX_BODY):
        last = begin + MAX_BODY >= len(data)
        piece = data[begin : begin + MAX_BODY]
        reply = box.host.ask("write", piece, path="new/folder/file", offset=begin, last=last, part="p", mode=0o640)
        assert reply["size"] == begin + len(piece)
        assert (box.workspace / "new/folder/file").exists() is last
    assert (box.workspace / "new/folder/file").read_bytes() == data
    assert (box.workspace / "new/folder/file").stat().st_mode & 0o7777 == 0o640
    read = [
        box.host.ask("read", path="new/folder/file", offset=at, limit=2**40) for at in range(0, len(data), MAX_BODY)
    ]
    assert b"".join(each.body for each in read) == data
    assert {each["size"] for each in read} == {len(data)}
    assert box.host.ask("read", path="new/folder/file", offset=3, limit=4).body == data[3:7]
    assert box.host.ask("read", path="new/folder/file", offset=2**40).body == b""


def test_a_file_keeps_its_mode_when_it_is_replaced(box: Inside) -> None:
    box.host.ask("write", b"#!/bin/sh\necho 1", path="x", last=True)
    assert (box.workspace / "x").stat().st_mode & 0o777 == 0o644
    (box.workspace / "x").chmod(0o755)
    box.host.ask("write", b"#!/bin/sh\necho 2", path="x", last=True)
    assert box.host.run("./x").out == b"2\n"


def test_a_file_is_added_to(box: Inside) -> None:
    assert box.host.ask("write", b"a", path="sub/x", append=True, last=True)["size"] == 1
    assert box.host.ask("write", b"bc", path="sub/x", append=True, last=True)["size"] == 3
    assert (box.workspace / "sub/x").read_bytes() == b"abc"


def test_pieces_that_do_not_come_in_order_are_refused(box: Inside) -> None:
    (box.workspace / "x").write_text("old")
    box.host.ask("write", b"aa", path="x", part="1")
    assert box.host.ask("write", b"bb", path="x", part="1", offset=7).kind == "request"
    assert box.host.ask("write", b"bb", path="x", part="2", offset=2, last=True).kind == "not_found"
    assert sorted(path.name for path in box.workspace.iterdir()) == ["x"]
    assert (box.workspace / "x").read_text() == "old"


def test_uploads_of_one_file_at_once_do_not_mix(box: Inside) -> None:
    for at in range(3):
        for part in "ab":
            box.host.ask("write", part.encode(), path="x", part=part, offset=at, last=at == 2)
    assert (box.workspace / "x").read_bytes() == b"bbb"


def test_the_parts_of_an_upload_go_with_its_host(box: Inside) -> None:
    box.host.ask("write", b"a", path="sub/x", part="1")
    assert [path.name.startswith(supervisor.PART) for path in (box.workspace / "sub").iterdir()] == [True]
    assert box.host.ask("list", recursive=True).json()[1:] == [], "nobody sees them in a list"
    host = box.attach()
    assert host.ask("ping")["ok"]
    assert list((box.workspace / "sub").iterdir()) == []


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../workspace2/x",
        "../../etc/passwd",
        "sub/../../x",
        "out/passwd",
        "out",
        "passwd",
        "loop",
        "/proc/self/environ",
        "a\0b",
        "x" * 9000,
        "/workspace/../etc/passwd",
        "/tmp/../etc/passwd",
    ],
)
@pytest.mark.parametrize("op", ["read", "write", "append", "list", "mkdir", "watch"])
def test_paths_that_lead_out_are_refused(box: Inside, op: str, path: str) -> None:
    (box.workspace / "sub").mkdir()
    (box.workspace / "out").symlink_to("/etc")
    (box.workspace / "passwd").symlink_to("/etc/passwd")
    (box.workspace / "loop").symlink_to("loop")
    fields = {"append": True} if op == "append" else {}
    reply = box.host.ask("write" if op == "append" else op, b"", path=path, last=True, **fields)
    assert reply.kind in ("path", "not_found")
    assert Path("/etc/passwd").read_text()


@pytest.mark.parametrize("name", ["fifo", "socket", "device", "folder"])
@pytest.mark.parametrize("op", ["read", "write", "append"])
def test_what_is_no_regular_file_is_refused_at_once(box: Inside, op: str, name: str) -> None:
    os.mkfifo(box.workspace / "fifo")
    os.mknod(box.workspace / "device", 0o600 | 0o020000, os.makedev(1, 5))
    (box.workspace / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        folder = os.open(box.workspace, os.O_RDONLY)
        sock.bind(f"/proc/self/fd/{folder}/socket")
        os.close(folder)
    fields = {"append": True} if op == "append" else {}
    reply = box.host.ask("write" if op == "append" else op, b"x", path=name, last=True, **fields)
    assert reply.kind == "path"


def test_links_within_the_workspace_are_followed(box: Inside) -> None:
    (box.workspace / "real").mkdir()
    (box.workspace / "real/file").write_text("x")
    (box.workspace / "link").symlink_to("real")
    (box.workspace / "absolute").symlink_to(box.workspace / "real/file")
    assert box.host.ask("read", path="link/file").body == b"x"
    assert box.host.ask("write", b"y", path="absolute", last=True)["size"] == 1
    assert (box.workspace / "real/file").read_text() == "y"
    assert box.host.ask("stat", path="link")["entry"]["kind"] == "link"
    assert box.host.ask("stat", path="link/file")["entry"]["path"] == "real/file"


def test_the_names_of_the_wire_mean_the_folders_wherever_they_are(box: Inside) -> None:
    for path, real in (
        ("/workspace/a", box.workspace / "a"),
        ("/tmp/b", box.tmp / "b"),
        (f"{box.tmp}/c", box.tmp / "c"),
    ):
        assert box.host.ask("write", b"x", path=path, last=True)["size"] == 1
        assert real.read_text() == "x"
    assert box.host.ask("stat", path="/workspace/a")["entry"]["path"] == "a"
    assert [entry["path"] for entry in box.host.ask("list", path="/tmp").json()] == ["/tmp/b", "/tmp/c"]
    assert box.host.ask("read", path="/tmp/b").body == b"x"


def test_what_is_missing_is_told(host: Plain) -> None:
    for op in ("read", "stat", "list", "remove", "watch"):
        reply = host.ask(op, path="no/such")
        assert (reply.kind, "No such file" in reply.message) == ("not_found", True)


def test_entries_say_what_they_are(box: Inside) -> None:
    (box.workspace / "f").write_text("abc")
    (box.workspace / "f").chmod(0o600)
    os.utime(box.workspace / "f", (5, 1234.5))
    os.mkfifo(box.workspace / "p")
    entry = box.host.ask("stat", path="./x/../f")["entry"]
    assert entry == {"path": "f", "kind": "file", "size": 3, "modified": 1234.5, "mode": 0o600}
    assert box.host.ask("stat", path="p")["entry"]["kind"] == "other"
    assert box.host.ask("stat", path=".")["entry"]["kind"] == "directory"


def test_a_list_is_ordered_and_comes_in_pages(box: Inside) -> None:
    for name in ("b", "a/x/1", "a/y", "a.txt", "c/z"):
        (box.workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (box.workspace / name).write_text("")
    wanted = ["a", "a/x", "a/x/1", "a/y", "a.txt", "b", "c", "c/z"]
    assert [entry["path"] for entry in box.host.ask("list", recursive=True).json()] == wanted
    assert [entry["path"] for entry in box.host.ask("list").json()] == ["a", "a.txt", "b", "c"]
    assert [entry["path"] for entry in box.host.ask("list", path="a").json()] == ["a/x", "a/y"]
    for limit in (1, 2, 3, 100):
        assert pages(box.host, limit=limit, recursive=True) == wanted
    assert pages(box.host, path="a", limit=1, recursive=True) == ["a/x", "a/x/1", "a/y"]


def pages(host: Plain, **fields: object) -> list[str]:
    found: list[str] = []
    while True:
        reply = host.ask("list", b"", after=found[-1] if found else "", **fields)
        found += [entry["path"] for entry in reply.json()]
        if not reply["more"]:
            return found


def test_names_that_are_no_text_survive(box: Inside) -> None:
    name = b"\xff\xfe \xc3\xa4\n"
    (Path(os.fsdecode(bytes(box.workspace) + b"/" + name))).write_text("x")
    path = box.host.ask("list").json()[0]["path"]
    assert os.fsencode(path) == name
    assert box.host.ask("read", path=path).body == b"x"
    assert box.host.ask("remove", path=path)["ok"]


def test_a_hundred_thousand_files_hold_up_nobody(box: Inside) -> None:
    host = box.host
    folder = os.open(box.workspace, os.O_RDONLY)
    for i in range(100_000):
        os.close(os.open(f"{i:06}", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)
    page, ping = host.begin("list", limit=1000), host.begin("ping")
    assert len(host.wait(page).json()) == 1000
    assert host.order.index(ping) < host.order.index(page)
    assert len(pages(host, limit=10_000)) == 100_000
    remove, ping = host.begin("reset"), host.begin("ping")
    assert host.wait(remove)["clean"] is True
    assert host.order.index(ping) < host.order.index(remove)


def test_folders_are_made_and_removed_with_all_in_them(box: Inside) -> None:
    assert box.host.ask("mkdir", path="a/b")["ok"]
    assert box.host.ask("mkdir", path="a/b")["ok"]
    (box.workspace / "keep").write_text("x")
    (box.workspace / "a/b/link").symlink_to("../../keep")
    (box.workspace / "a/out").symlink_to("/etc")
    assert box.host.ask("remove", path="a/b/link")["ok"]
    assert box.host.ask("remove", path="a")["ok"]
    assert [path.name for path in box.workspace.iterdir()] == ["keep"]
    assert box.host.ask("remove", path=".").kind == "path"
    assert Path("/etc/passwd").exists()


def test_no_depth_is_too_deep_to_be_removed(box: Inside) -> None:
    code = "import os\nfor i in range(1000):\n os.mkdir('d' * 20); os.chdir('d' * 20)\nopen('x', 'w')"
    assert box.host.run(sys.executable, "-c", code)["code"] == 0
    assert len(pages(box.host, recursive=True)) == supervisor.DEEPEST + 1
    assert box.host.ask("remove", path="d" * 20)["ok"]
    assert list(box.workspace.iterdir()) == []


def test_a_watch_tells_what_changes(box: Inside) -> None:
    host = box.host
    (box.workspace / "old").write_text("x")
    (box.workspace / "gone").write_text("x")
    n = host.begin("watch")
    assert host.ask("ping")["ok"]
    (box.workspace / "old").write_text("xy")
    (box.workspace / "gone").unlink()
    (box.workspace / "sub").mkdir()
    (box.workspace / "sub/new").write_text("x")
    wanted = {("modified", "old"), ("removed", "gone"), ("created", "sub"), ("created", "sub/new")}
    host.until(lambda: wanted == {(each["kind"], each["path"]) for each, _ in host.events.get(n, [])})
    assert host.ask("unwatch", of=n)["ok"]
    assert host.wait(n)["ok"]


# --- the network ------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def wired() -> Iterator[tuple[Inside, socket.socket, int]]:
    """A supervisor, a program's connection to its proxy, and the number that it has on the wire."""
    port = free_port()
    with inside("--local", "--proxy", str(port)) as box:
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
            header, _ = taken(box.host)
            assert header["open"] is True
            yield box, sock, int(str(header["s"]))


def taken(host: Plain) -> tuple[dict[str, object], bytes]:
    """The next frame of a stream."""
    host.until(lambda: host.streams)
    return host.streams.popleft()


def test_a_connection_to_the_proxy_goes_both_ways(wired: tuple[Inside, socket.socket, int]) -> None:
    box, sock, s = wired
    sock.sendall(b"to the host")
    assert taken(box.host) == ({"s": s}, b"to the host")
    box.host.send({"s": s, "ready": True})
    box.host.send({"s": s, "took": 11})
    box.host.send({"s": s}, b"to the program")
    assert sock.recv(100) == b"to the program"
    assert taken(box.host) == ({"s": s, "took": 14}, b"")
    sock.shutdown(socket.SHUT_WR)
    assert taken(box.host) == ({"s": s, "end": True}, b"")
    box.host.send({"s": s}, b"more")
    box.host.send({"s": s, "end": True})
    assert sock.recv(100) == b"more"
    assert sock.recv(100) == b""


def test_no_more_than_a_window_is_under_way(wired: tuple[Inside, socket.socket, int]) -> None:
    box, sock, s = wired
    sock.setblocking(False)
    size = 0
    while True:
        try:
            size += sock.send(b"x" * 65536)
        except BlockingIOError:
            if box.host.ask("ping") and sum(len(body) for _, body in box.host.streams) == WINDOW:
                break
    assert size > WINDOW
    box.host.streams.clear()
    box.host.send({"s": s, "took": WINDOW})
    box.host.until(lambda: box.host.streams)
    with pytest.raises((EOFError, ConnectionError)):  # a host that does not keep to the window is none
        forever(lambda: box.host.send({"s": s}, b"y" * WINDOW))


def test_what_the_host_sends_to_a_program_that_has_gone_is_taken(wired: tuple[Inside, socket.socket, int]) -> None:
    box, sock, s = wired
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    assert taken(box.host)[0] == {"s": s, "end": True}
    box.host.send({"s": s}, b"x" * 1000)
    assert taken(box.host)[0] == {"s": s, "took": 1000}
    box.host.send({"s": s, "end": True})
    box.host.send({"s": s}, b"late")
    assert box.host.ask("ping")["ok"]


def test_connections_end_with_their_host(wired: tuple[Inside, socket.socket, int]) -> None:
    box, sock, _ = wired
    box.host.close()
    assert sock.recv(100) == b""
    with socket.create_connection(sock.getpeername(), PATIENCE) as other:
        assert other.recv(100) == b"", "there is nobody who would serve it"


# --- the bridge -------------------------------------------------------------------------------------------------------


def bridge(path: Path, *options: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A bridge whose standard input and output are one end of a pair."""
    mine, its = socket.socketpair()
    argv = [sys.executable, "-c", frames.supervisor_source(), "bridge", "--socket", str(path), *options]
    with its:
        return subprocess.Popen(argv, stdin=its.fileno(), stdout=its.fileno()), mine


def test_a_bridge_joins_a_host_to_the_supervisor(box: Inside) -> None:
    process, sock = bridge(box.socket)
    host = Plain(sock)
    data = os.urandom(MAX_BODY)
    for begin in range(0, 4 * MAX_BODY, MAX_BODY):
        host.begin("write", data, path="x", offset=begin, last=begin == 3 * MAX_BODY)
    numbers = [host.begin("read", path="x", offset=begin) for begin in range(0, 4 * MAX_BODY, MAX_BODY)]
    assert [host.wait(n).body for n in numbers] == [data] * 4
    sock.close()
    assert process.wait(PATIENCE) == 0


def test_a_bridge_waits_for_the_supervisor_and_ends_with_it(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    path = Path(f"/proc/{os.getpid()}/fd/{folder}/s")
    process, sock = bridge(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        other = listener.accept()[0]
        other.sendall(b"x")
        assert sock.recv(10) == b"x"
        other.close()
    assert process.wait(PATIENCE) == 0
    assert sock.recv(10) == b""
    sock.close()
    os.close(folder)


def test_a_bridge_does_not_wait_for_ever(tmp_path: Path) -> None:
    process, sock = bridge(tmp_path / "s", "--wait", "0.1")
    assert process.wait(PATIENCE) == 1
    sock.close()


# --- sessions of Python -----------------------------------------------------------------------------------------------


class Kernel:
    """A session, as its host has it."""

    def __init__(self, host: Plain) -> None:
        self.host = host
        argv = [sys.executable, "-c", frames.kernel_source()]
        options = {"stdin": True, "control": True, "flow": True}
        assert host.ask("start", b"", id="kernel", argv=argv, deadline=PATIENCE, **options)["ok"]
        self.n = host.begin("follow", id="kernel")
        self.seen: dict[str, int] = dict.fromkeys(("stdout", "stderr", "control"), 0)

    def run(self, code: str) -> tuple[dict[str, object], str, str]:
        """Run code; how it went, and what it has written."""
        data = code.encode()
        self.host.ask("stdin", b"%d\n%s" % (len(data), data), id="kernel")
        self.host.until(lambda: self.host.written(self.n, "control").endswith(b"\n") and self.fresh("control"))
        answer, out, err = (self.fresh(name) for name in ("control", "stdout", "stderr"))
        self.seen = {name: len(self.host.written(self.n, name)) for name in self.seen}
        return json.loads(answer), out.decode("utf-8", "replace"), err.decode("utf-8", "replace")

    def fresh(self, name: str) -> bytes:
        """What came of a stream since the last run."""
        return self.host.written(self.n, name)[self.seen[name] :]


@pytest.fixture
def kernel(host: Plain) -> Kernel:
    return Kernel(host)


def test_a_session_keeps_its_variables_and_prints_values(kernel: Kernel) -> None:
    assert kernel.run("x = 20\nx + 1") == ({"code": 0}, "21\n", "")
    assert kernel.run("_ * 2") == ({"code": 0}, "42\n", "")
    assert kernel.run("None\nif x: print(x)") == ({"code": 0}, "20\n", "")
    assert kernel.run("") == ({"code": 0}, "", "")
    assert kernel.run("__name__") == ({"code": 0}, "'__main__'\n", "")


def test_an_exception_shows_the_frames_of_the_code(kernel: Kernel) -> None:
    kernel.run("def f():\n    return 1 / 0\n")
    answer, out, err = kernel.run("print('before')\nf()")
    assert (answer, out) == ({"code": 1}, "before\n")
    assert [line.strip() for line in err.splitlines() if "File" in line] == [
        'File "<code 2>", line 2, in <module>',
        'File "<code 1>", line 2, in f',
    ]
    assert "return 1 / 0" in err
    answer, _, err = kernel.run("1 +")
    assert (answer, "SyntaxError" in err, "compiled" in err) == ({"code": 1}, True, False)
    assert kernel.run("1") == ({"code": 0}, "1\n", "")


@pytest.mark.parametrize(
    "code",
    [
        "import os\nfor fd in (0, 1, 2, 3): os.close(fd)",
        "import os\nos.closerange(0, 50)",
        "import sys\nsys.stdout.close(); sys.stderr.close(); sys.stdin.close()",
        "import sys, io\nsys.stdout = sys.stderr = io.StringIO()",
        "import sys\nsys.stdout = sys.stderr = sys.stdin = None",
        "import sys\nsys.__stdout__ = None; del sys.stdout",
        "import os\nos.dup2(os.open('/dev/full', 1), 1); print('lost' * 9999)",
        "import sys\nclass X:\n  def flush(self): raise KeyboardInterrupt\nsys.stdout = X()",
        "raise KeyboardInterrupt",
        "raise BaseException",
        "class E(Exception):\n  def __str__(self): raise SystemExit\nraise E",
        "f = lambda: f()\nf()",
        "(" * 5000,
        "del __builtins__",
        "globals().clear()",
    ],
)
def test_a_session_survives_its_code(kernel: Kernel, code: str) -> None:
    assert kernel.run(code)[0]["code"] in (0, 1)
    assert kernel.run("print('still', 'here')") == ({"code": 0}, "still here\n", "")


def test_what_a_session_writes_is_bytes_and_its_input_is_empty(kernel: Kernel) -> None:
    kernel.run("import sys, os, subprocess")
    assert kernel.run("_ = sys.stdout.buffer.write(b'\\xff')")[1] == "\ufffd"
    assert kernel.run("print('\\ud800\\u20ac')")[1] == "\\ud800\u20ac\n"
    assert kernel.run("sys.stdin.read()")[1] == "''\n"
    assert kernel.run("_ = subprocess.run('cat; echo sub; ls /proc/self/fd | wc -l', shell=True)")[1] == "sub\n4\n"


def test_a_fork_in_a_session_is_not_the_session(kernel: Kernel) -> None:
    code = "import os\npid = os.fork()\nif pid: _ = os.waitpid(pid, 0)\nprint('parent' if pid else 'child')"
    assert kernel.run(code) == ({"code": 0}, "child\nparent\n", "")
    assert kernel.run("1 + 1") == ({"code": 0}, "2\n", "")


def test_a_session_can_be_interrupted(kernel: Kernel) -> None:
    kernel.run("x = 1")
    kernel.host.ask("signal", id="kernel", signal=int(signal.SIGINT))
    assert kernel.run("x") == ({"code": 0}, "1\n", "")
    data = b"print('on', flush=True)\nwhile True: pass"
    kernel.host.ask("stdin", b"%d\n%s" % (len(data), data), id="kernel")
    kernel.host.until(lambda: kernel.fresh("stdout") == b"on\n")
    kernel.host.ask("signal", id="kernel", signal=int(signal.SIGINT))
    kernel.host.until(lambda: kernel.fresh("control"))
    assert kernel.fresh("control") == b'{"code": 1}\n'
    assert b"KeyboardInterrupt" in kernel.fresh("stderr")


@pytest.mark.parametrize(
    ("code", "status"), [("raise SystemExit", 0), ("exit(3)", 3), ("import sys; sys.exit('x')", 1)]
)
def test_a_session_can_end_itself(kernel: Kernel, code: str, status: int) -> None:
    assert kernel.run(code)[0] == {"code": status, "end": True}
    assert kernel.host.wait(kernel.n)["code"] == status


def test_a_session_ends_with_its_input(kernel: Kernel) -> None:
    kernel.run("x = 1")
    kernel.host.ask("stdin", id="kernel", end=True)
    assert kernel.host.wait(kernel.n)["code"] == 0
