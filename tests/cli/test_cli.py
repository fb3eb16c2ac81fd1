"""The command as people and programs meet it: real processes, real files, exit statuses, what is printed where."""

from __future__ import annotations

import json
import os
import queue
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.processes

DEADLINE = 40.0

APP = '''
import asyncio, os, time
from pathlib import Path
from ridethrough import Agent, Image, ModelRequest, ModelResponse, ask, gather, sleep, step, tool, wait_for, workflow
from ridethrough.runtime.router.messages import ImagePart

def note(line):
    fd = os.open("ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, (line + "\\n").encode())
    os.close(fd)

@step
async def work(name: str) -> str:
    note(name)
    return name.upper()

@step
async def gated(name: str) -> str:
    """Goes on when the file `open` is there."""
    note(name)
    while not Path("open").exists():
        await asyncio.sleep(0.01)
    return name.upper()

@step
def stubborn() -> str:
    note("stubborn")
    time.sleep(60)
    return "late"

@workflow
async def simple(topic: str, times: int = 1) -> str:
    parts = await gather(*(work(f"{topic}{i}") for i in range(times)))
    return " ".join(parts)

@workflow
async def data() -> dict[str, list[int]]:
    return {"numbers": [1, 2]}

@workflow
async def named(id: str) -> str:
    print("printed by the workflow")
    return await work(id)

@workflow
async def halves() -> str:
    first = await work("first")
    second = await gated("second")
    return first + second

@workflow
async def stuck() -> str:
    return await stubborn()

@workflow
async def fails() -> str:
    await work("one")
    raise ValueError("no way")

@workflow
async def nap(seconds: float) -> str:
    await sleep(seconds)
    return "woke"

@workflow
async def asks() -> str:
    return "hello " + await ask("What is your name?", str)

@workflow
async def signalled() -> int:
    return await wait_for("go", int) + 1

@workflow
async def asks_in_child() -> str:
    return "child said: " + await asks()

@tool(approval=True)
async def send(to: str) -> str:
    """Send a mail.

    Args:
        to: Whom.
    """
    note(f"sent to {to}")
    return "sent"

@tool(effect="read")
async def look() -> list[str | Image]:
    """Look at the harbour."""
    return ["a boat", Image(data=b"\\xff\\xd8\\xff" + 43_000 * b"x"), Image(data=2000 * b"x", media_type="image/png")]

@step
async def draw() -> Image:
    return Image(data=5000 * b"x")

async def eyes(request: ModelRequest) -> ModelResponse | str:
    if any(message.role == "tool" for message in request.messages):
        return "Seen."
    return ModelResponse.model_validate({"message": {"tool_calls": [{"id": "1", "name": "look", "arguments": {}}]}})

@workflow
async def looks() -> Image:
    await Agent("watch", model=eyes, tools=[look]).run([ImagePart(data=800 * "eHh4")])
    return await draw()

mailer = Agent("mailer", model="smart", instructions="You send mail.", tools=[send])

@workflow
async def mails() -> str:
    return (await mailer.run("Write to Ann")).output
'''

CONFIG = """
[providers.here]
kind = "simulated"
script = "script.toml"
[models.m]
provider = "here"
model = "simulated"
price = { input = 1.0, output = 1.0 }
[routes.smart]
models = ["m"]
"""

SCRIPT = """
[[rules]]
not_called = "send"
calls = [{ name = "send", arguments = { to = "Ann" } }]
[[rules]]
text = "Done: {{result}}"
"""


class Process:
    """A running command, whose lines can be waited for."""

    def __init__(self, *arguments: str, cwd: Path, env: dict[str, str]) -> None:
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ridethrough.cli", *arguments],
            cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._queue.put(line)
        self._queue.put(None)

    def until(self, text: str) -> str:
        """Wait for a line on standard error that has ``text``."""
        deadline = time.monotonic() + DEADLINE
        while True:
            line = self._queue.get(timeout=max(0.01, deadline - time.monotonic()))
            assert line is not None, f"ended without {text!r}: {self.lines}"
            self.lines.append(line)
            if text in line:
                return line

    def unread(self) -> list[str]:
        """The lines on standard error that nobody has waited for."""
        lines = [self._queue.get_nowait() for _ in range(self._queue.qsize())]
        return [line for line in lines if line is not None]

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Wait for the end: status, standard output, standard error."""
        assert self.process.stdout is not None
        late = threading.Timer(DEADLINE, self.process.kill)
        late.start()
        out = self.process.stdout.read()
        status = self.process.wait(DEADLINE)
        late.cancel()
        self.reader.join(DEADLINE)
        self.lines += self.unread()
        return status, out, "".join(self.lines)


class Project:
    """A folder with an app and a configuration, and the command in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("RIDETHROUGH")}
        self._processes: list[Process] = []
        for name, text in (("app.py", APP), ("ridethrough.toml", CONFIG), ("script.toml", SCRIPT)):
            (folder / name).write_text(text)

    def __call__(self, *arguments: str, status: int = 0) -> tuple[str, str]:
        """Run a command to its end: standard output and standard error."""
        found, out, err = self.start(*arguments).end()
        assert found == status, f"{arguments}: status {found}\n{out}\n{err}"
        assert "Traceback" not in err
        return out, err

    def json(self, *arguments: str, status: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", status=status)[0])

    def start(self, *arguments: str) -> Process:
        process = Process(*arguments, cwd=self.folder, env=self.env)
        self._processes.append(process)
        return process

    def ledger(self) -> Counter[str]:
        path = self.folder / "ledger"
        return Counter(path.read_text().splitlines()) if path.exists() else Counter()

    def wait(self, what: str, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not holds():
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            time.sleep(0.01)

    def status(self, run_id: str) -> str | None:
        connection = sqlite3.connect(self.folder / "ridethrough.db")
        row = connection.execute("SELECT status FROM runs WHERE id = ?", (run_id,)).fetchone()
        connection.close()
        return str(row[0]) if row else None

    def open_gate(self) -> None:
        (self.folder / "open").touch()

    def kill_left(self) -> None:
        for item in self._processes:
            if item.process.poll() is None:
                item.process.kill()
            item.process.wait()
            item.reader.join(DEADLINE)
            for stream in (item.process.stdout, item.process.stderr):
                if stream is not None:
                    stream.close()


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    made = Project(tmp_path)
    yield made
    made.kill_left()


def half_done(project: Project, run_id: str = "half") -> Process:
    """A process that is in the middle of a run: its first step is on disk, its second is being executed."""
    process = project.start("run", "app.py:halves", "--id", run_id)
    process.until("work#1: function done")
    project.wait("the second step", lambda: project.ledger()["second"] > 0)
    return process


# --- run --------------------------------------------------------------------------------------------------------------


def test_the_result_is_on_standard_output_and_progress_is_not(project: Project) -> None:
    out, err = project("run", "app.py:simple", "--input", '"tide"', "--id", "one")
    assert out == "TIDE0\n"
    assert "work#1: function done" in err
    assert "one: done; 1 step, 0 model calls" in err


def test_a_result_that_is_no_text_is_json(project: Project) -> None:
    out, _ = project("run", "app.py:data")
    assert json.loads(out) == {"numbers": [1, 2]}


def test_input_as_object_from_a_file(project: Project) -> None:
    (project.folder / "input.json").write_text('{"topic": "moon", "times": 2}')
    assert project("run", "app.py:simple", "--input", "@input.json")[0] == "MOON0 MOON1\n"


def test_a_parameter_may_have_the_name_of_an_option(project: Project) -> None:
    out, _ = project("run", "app.py:named", "--input", '{"id": "x"}')
    assert out == "printed by the workflow\nX\n"


def test_an_agent_is_run_like_a_workflow(project: Project) -> None:
    _, err = project("run", "app.py:mailer", "--input", '"Write to Ann"', "--id", "agent", status=3)
    assert "approve agent" in err


def test_json_is_events_and_at_last_the_run(project: Project) -> None:
    out, _ = project("run", "app.py:named", "--input", '"x"', "--id", "j", "--json")
    *events, last = [json.loads(line) for line in out.splitlines()]
    assert [event["type"] for event in events if event["type"] != "step_started"] == [
        "run_started", "step_finished", "run_finished",
    ]  # fmt: skip
    assert {event["run_id"] for event in events} == {"j"}
    assert last["status"] == "done"
    assert last["result"] == "X"
    assert last == project.json("show", "j")


def test_common_options_before_and_after_the_command(project: Project) -> None:
    project("--db", "other.db", "run", "app.py:data", "--id", "elsewhere")
    assert [run["id"] for run in json.loads(project("--json", "runs", "--db", "sqlite:///other.db")[0])] == [
        "elsewhere"
    ]
    assert [run["id"] for run in project.json("--db", "other.db", "runs")] == ["elsewhere"]


def test_a_failed_run_ends_with_1_and_says_why(project: Project) -> None:
    out, err = project("run", "app.py:fails", "--id", "f", status=1)
    assert out == ""
    assert "error: run f failed: ValueError: no way" in err
    _, err = project("run", "app.py:fails", "--id", "f", status=1)
    assert "no way" in err
    assert project.ledger()["one"] == 1
    _, err = project("resume", "f", status=1)
    assert "ridethrough fork f --at STEP" in err


def test_the_id_of_a_finished_run_gives_its_result_again(project: Project) -> None:
    project("run", "app.py:simple", "--input", '"a"', "--id", "same")
    assert project("run", "app.py:simple", "--id", "same")[0] == "A0\n"
    assert project("run", "app.py:simple", "--input", '"a"', "--id", "same")[0] == "A0\n"
    assert project("resume", "same")[0] == "A0\n"
    assert project.ledger()["a0"] == 1


def test_the_id_of_other_work_is_refused(project: Project) -> None:
    project("run", "app.py:simple", "--input", '"a"', "--id", "same")
    _, err = project("run", "app.py:simple", "--input", '"b"', "--id", "same", status=2)
    assert "exists already, with input" in err
    _, err = project("run", "app.py:data", "--id", "same", status=2)
    assert "of workflow simple and not data" in err


def test_detach_only_queues(project: Project) -> None:
    options = ("--tenant", "acme", "--priority", "3", "--label", "team=blue", "--detach")
    out, _ = project("run", "app.py:simple", "--input", '"a"', "--id", "later", *options)
    assert "ridethrough resume later" in out
    shown = project.json("show", "later")
    assert (shown["status"], shown["tenant"], shown["priority"]) == ("queued", "acme", 3)
    assert shown["labels"] == {"team": "blue"}
    assert not project.ledger()
    assert project("resume")[0] == "A0\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "app.py:simple", "--input", "tides"), """A text is written '"tides"'"""),
        (("run", "app.py:simple", "--input", "@nowhere"), "nowhere cannot be read"),
        (("run", "app.py:simple"), "Give its input with --input"),
        (("run", "app.py:simple", "--input", '{"subject": 1}'), "subject"),
        (("run", "app.py:simple", "--input", '{"topic": "a", "times": "many"}'), "times"),
        (("run", "app.py:nothing"), "has no 'nothing'"),
        (("run", "app.py:note"), "neither a workflow nor an agent"),
        (("run", "nowhere.py:x"), "There is no file"),
        (("run", "no_module_of_that_name:x"), "cannot be imported"),
        (("run", "app.py"), "MODULE:NAME"),
        (("run", "app.py:data", "--label", "blue"), "NAME=VALUE"),
        (("run", "app.py:data", "--id", "a b"), "without spaces"),
        (("show", "nobody"), "There is no database"),
        (("runs", "--status", "odd"), "odd"),
        (("db", "gc", "--older-than", "soon"), "not a duration"),
        (("resume", "a", "--all"), "not both"),
        (("nonsense",), "No such command"),
    ],
)
def test_bad_usage_ends_with_2_and_says_what_to_do(project: Project, arguments: tuple[str, ...], says: str) -> None:
    out, err = project(*arguments, status=2)
    assert says in err
    assert out == ""


def test_a_broken_module_ends_with_2(project: Project) -> None:
    (project.folder / "broken.py").write_text("import nothing_of_that_name\n")
    _, err = project("run", "broken.py:x", status=2)
    assert "ModuleNotFoundError" in err


def test_a_broken_configuration_ends_with_2_and_names_the_line(project: Project) -> None:
    (project.folder / "ridethrough.toml").write_text('[providers.x]\nkind = "openai"\nbase_ulr = "x"\n')
    _, err = project("runs", status=2)
    assert "ridethrough.toml:3" in err
    _, err = project("--config", "nowhere.toml", "runs", status=2)
    assert "nowhere.toml" in err


# --- parking ----------------------------------------------------------------------------------------------------------


def test_a_timer_is_waited_for(project: Project) -> None:
    out, err = project("run", "app.py:nap", "--input", "1.5", "--id", "n")
    assert out == "woke\n"
    assert "n waits for the timer until" in err


def test_no_wait_ends_with_3_as_soon_as_the_run_is_parked(project: Project) -> None:
    _, err = project("run", "app.py:nap", "--input", "3", "--id", "n", "--no-wait", status=3)
    assert "nothing is lost" in err
    assert "ridethrough resume n" in err
    assert project("resume", "n")[0] == "woke\n"


def test_a_question_ends_with_3_and_shows_the_answer_s_command(project: Project) -> None:
    _, err = project("run", "app.py:asks", "--id", "q", "--db", "x.db", status=3)
    assert "What is your name?" in err
    assert "ridethrough signal q 'ask#1' '\"…\"' --db x.db" in err
    _, err = project("signal", "q", "ask#1", "Joe", "--db", "x.db", status=2)
    assert """A text is written '"Joe"'""" in err
    _, err = project("signal", "q", "ask#1", "12", "--db", "x.db", status=2)
    assert "is not of type 'string'" in err
    project("signal", "q", "ask#1", '"Joe"', "--db", "x.db")
    assert project("resume", "q", "--db", "x.db")[0] == "hello Joe\n"


def test_a_question_of_a_child_run_ends_with_3(project: Project) -> None:
    _, err = project("run", "app.py:asks_in_child", "--id", "p", status=3)
    assert "ridethrough signal 'p.asks#1' 'ask#1'" in err
    project("signal", "p.asks#1", "ask#1", '"Bo"')
    assert project("resume", "p")[0] == "child said: hello Bo\n"


def test_a_signal_reaches_a_run_that_is_followed(project: Project) -> None:
    project("run", "app.py:signalled", "--id", "s", "--detach")
    project("signal", "s", "go", "41")
    assert project("run", "app.py:signalled", "--id", "s")[0] == "42\n"


@pytest.mark.parametrize(("verb", "sent"), [("approve", 1), ("deny", 0)])
def test_approve_and_deny(project: Project, verb: str, sent: int) -> None:
    _, err = project("run", "app.py:mails", "--id", "m", status=3)
    call = project.json("show", "m")["waits"][0]["name"]
    assert f"ridethrough approve m '{call}'" in err or f"ridethrough approve m {call}" in err
    _, err = project(verb, "m", "nonsense", status=2)
    assert call in err
    project(verb, "m", call, "--note", "as agreed")
    out, _ = project("resume", "m")
    assert out.startswith("Done: ")
    assert project.ledger()["sent to Ann"] == sent
    shown = project.json("show", "m")
    assert shown["usage"]["model_calls"] == 2
    assert shown["cost_usd"] > 0


def test_pause_and_resume(project: Project) -> None:
    process = half_done(project)
    out, _ = project("pause", "half")
    assert "ridethrough resume half" in out
    project.open_gate()
    status, _, err = process.end()
    assert status in (0, 3), err  # 0: its last step was running, and finished
    if status == 3:
        assert "paused by an operator" in err
    assert project("resume", "half")[0] == "FIRSTSECOND\n"
    assert project.ledger() == {"first": 1, "second": 1}


# --- looking ----------------------------------------------------------------------------------------------------------


def test_show_has_what_the_contract_says(project: Project) -> None:
    project("run", "app.py:simple", "--input", '"a"', "--id", "one")
    shown = project.json("show", "one")
    assert set(shown) >= {
        "id", "workflow", "version", "status", "pause", "tenant", "created_at", "finished_at", "result", "error",
        "recoveries", "cost_usd", "usage", "steps",
    }  # fmt: skip
    assert set(shown["usage"]) >= {"input_tokens", "output_tokens", "model_calls"}
    assert set(shown["steps"][0]) >= {
        "path", "name", "kind", "status", "attempts", "started_at", "ended_at", "model", "cost_usd",
    }  # fmt: skip
    listed = project.json("runs")
    assert "steps" not in listed[0]
    assert listed[0]["id"] == "one"


def test_show_and_runs_for_people(project: Project) -> None:
    project("run", "app.py:mails", "--id", "m", status=3)
    page, _ = project("show", "m", "--steps", "--messages")
    assert "mailer#1/model#1" in page
    assert "-> send(" in page
    assert "ridethrough approve m" in page
    table, _ = project("runs", "--status", "waiting", "--workflow", "mails", "--limit", "1")
    assert 'approval of send({"to": "Ann"})' in table
    assert project("runs", "--status", "done")[0] == ""
    _, err = project("show", "nobody", status=2)
    assert "There is no run 'nobody'" in err


def test_images_are_told_in_words_to_people_and_whole_to_programs(project: Project) -> None:
    project("run", "app.py:looks", "--id", "looks")
    page, _ = project("show", "looks", "--steps", "--messages")
    assert "eHh4" not in page
    assert "    out  [image, image/jpeg, 5 kB]" in page
    assert "tool look [watch#1/look#1]\n  a boat\n  [image, image/jpeg, 43 kB]\n  [image, image/png, 2 kB]\n" in page
    assert "result\n  [image, image/jpeg, 5 kB]" in page
    seen = next(step["output"] for step in project.json("show", "looks")["steps"] if step["name"] == "look")
    assert seen["content"] == "a boat"
    assert [(image["type"], image["media_type"], len(image["data"])) for image in seen["images"]] == [
        ("image", "image/jpeg", 57340), ("image", "image/png", 2668),
    ]  # fmt: skip


def test_events_late_and_from_a_position(project: Project) -> None:
    project("run", "app.py:simple", "--input", '{"topic": "a", "times": 3}', "--id", "e")
    events = [json.loads(line) for line in project("events", "e", "--json")[0].splitlines()]
    assert [event["type"] for event in events if event["type"] == "step_finished"] == ["step_finished"] * 3
    assert events[-1]["type"] == "run_finished"
    late = [json.loads(line) for line in project("events", "e", "--json", "--after", "3", "--follow")[0].splitlines()]
    assert [event["type"] for event in late] == ["run_finished"]
    assert "function done" in project("events", "e")[0]


def test_events_follow_another_process(project: Project) -> None:
    half_done(project)
    reader = project.start("events", "half", "--follow", "--json")
    project.open_gate()
    status, out, err = reader.end()
    assert status == 0, err
    assert [json.loads(line)["type"] for line in out.splitlines()][-1] == "run_finished"


def test_a_reader_that_goes_away_is_no_error(project: Project) -> None:
    project("run", "app.py:simple", "--input", '{"topic": "a", "times": 300}', "--id", "many")
    process = project.start("events", "many", "--json")
    assert process.process.stdout is not None
    process.process.stdout.readline()
    process.process.stdout.close()
    process.process.wait(DEADLINE)
    process.reader.join(DEADLINE)
    assert process.unread() == []


# --- control ----------------------------------------------------------------------------------------------------------


def test_cancel_a_queued_and_a_running_run(project: Project) -> None:
    project("run", "app.py:halves", "--id", "queued", "--detach")
    assert "is cancelled" in project("cancel", "queued")[0]
    process = half_done(project)
    assert project.json("cancel", "half")["id"] == "half"
    status, _, err = process.end()
    assert status == 1
    assert "run half cancelled" in err
    assert project.json("show", "half")["status"] == "cancelled"
    assert "is cancelled" in project("cancel", "half")[0]


def test_fork_goes_on_from_a_step(project: Project) -> None:
    project.open_gate()
    project("run", "app.py:halves", "--id", "old")
    out, _ = project("fork", "old", "--at", "gated#1", "--id", "new")
    assert "ridethrough resume new" in out
    assert project("resume", "new")[0] == "FIRSTSECOND\n"
    assert project.ledger() == {"first": 1, "second": 2}
    _, err = project("fork", "old", "--at", "nowhere#1", status=2)
    assert "gated#1" in err


# --- interruptions ----------------------------------------------------------------------------------------------------


def test_interrupt_lets_a_running_step_finish(project: Project) -> None:
    process = half_done(project)
    process.send(signal.SIGINT)
    process.until("stopping")
    project.open_gate()
    status, _, err = process.end()
    # The step was the last one: the run may have ended while the process was leaving.
    assert status in (0, 130), err
    if status == 130:
        assert "saved; resume with: ridethrough resume half" in err
    assert project("resume", "half")[0] == "FIRSTSECOND\n"
    assert project.ledger() == {"first": 1, "second": 1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_interrupt_cuts_steps_off(project: Project, number: signal.Signals) -> None:
    process = half_done(project)
    process.send(number)
    process.until("stopping")
    process.send(number)
    status, out, err = process.end()
    assert status == 130, err
    assert out == ""
    assert "saved; resume with: ridethrough resume half" in err
    shown = project.json("show", "half")
    assert (shown["status"], shown["recoveries"], shown["worker"]) == ("queued", 0, None)
    project.open_gate()
    assert project("resume", "half")[0] == "FIRSTSECOND\n"
    assert project.ledger() == {"first": 1, "second": 2}


def test_a_thread_that_hangs_does_not_hold_the_process(project: Project) -> None:
    process = project.start("run", "app.py:stuck", "--id", "stuck", "--json")
    project.wait("the step", lambda: project.ledger()["stubborn"] > 0)
    process.send(signal.SIGINT)
    process.until("stopping")
    process.send(signal.SIGINT)
    began = time.monotonic()
    status, out, err = process.end()
    assert status == 130, err
    assert time.monotonic() - began < 30
    assert json.loads(out.splitlines()[-1])["status"] == "queued"


def test_sigkill_then_resume(project: Project) -> None:
    process = half_done(project)
    process.send(signal.SIGKILL)
    assert process.end()[0] == -signal.SIGKILL
    assert project.status("half") == "running"
    project.open_gate()
    out, err = project("resume", "half")
    assert out == "FIRSTSECOND\n"
    assert "taken up with 1 step on record" in err
    assert "taken up after a crash (recovery 1)" in err
    assert project.ledger() == {"first": 1, "second": 2}
    assert project.json("show", "half")["recoveries"] == 1


def test_run_with_the_id_of_a_crashed_run_takes_it_up(project: Project) -> None:
    process = half_done(project)
    process.send(signal.SIGKILL)
    process.end()
    project.open_gate()
    assert project("run", "app.py:halves", "--id", "half")[0] == "FIRSTSECOND\n"
    assert project.ledger()["first"] == 1


def test_two_processes_resume_at_once(project: Project) -> None:
    process = half_done(project)
    process.send(signal.SIGKILL)
    process.end()
    both = [project.start("resume", "half") for _ in range(2)]
    project.wait("one of them to leave", lambda: any(one.process.poll() is not None for one in both))
    loser = next(one for one in both if one.process.poll() is not None)
    winner = next(one for one in both if one is not loser)
    status, out, err = loser.end()
    assert (status, out) == (3, ""), err
    assert f"is being executed by process {winner.process.pid}" in err
    project.open_gate()
    status, out, err = winner.end()
    assert (status, out) == (0, "FIRSTSECOND\n"), err
    assert project.ledger()["second"] == 2


def test_resume_of_several(project: Project) -> None:
    for name in ("a", "b"):
        project("run", "app.py:simple", "--input", f'"{name}"', "--id", name, "--detach")
    _, err = project("resume", status=2)
    assert "2 runs are unfinished" in err
    out, _ = project("resume", "--all")
    assert sorted(out.splitlines()) == ["a: A0", "b: B0"]
    _, err = project("resume", "--all")
    assert "Nothing to resume" in err


def test_resume_all_goes_on_without_those_that_cannot_be(project: Project) -> None:
    (project.folder / "gone.py").write_text(APP.replace("async def data", "async def vanished"))
    project("run", "gone.py:vanished", "--id", "v", "--detach")
    project("run", "app.py:simple", "--input", '"a"', "--id", "a", "--detach")
    (project.folder / "gone.py").unlink()
    out, err = project("resume", "--all", status=2)
    assert out == "a: A0\n"
    assert "gone.py" in err
    _, err = project("resume", "v", status=2)
    assert "gone.py" in err


# --- the house --------------------------------------------------------------------------------------------------------


def test_help_of_every_command(project: Project) -> None:
    out, _ = project("--help")
    for name in ("init", "run", "resume", "runs", "show", "events", "cancel", "pause", "fork", "signal", "approve"):
        assert f"\n  {name} " in out
        assert "--json" in project(name, "--help")[0]
    assert "gc" in project("db", "--help")[0]


def test_help_imports_nothing_heavy(project: Project) -> None:
    code = (
        "import sys\nfrom ridethrough.cli import run\nassert run(['--help']) == 0\n"
        "heavy = {'pydantic', 'sqlalchemy', 'httpx2', 'rich', 'alembic', 'anyio', 'jsonschema'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=project.folder, env=project.env, check=True, capture_output=True)


def test_init_writes_a_project_that_runs(project: Project) -> None:
    out, _ = project("init", "fresh")
    assert "cd fresh" in out
    _, err = project("init", "fresh", status=2)
    assert "exists already; nothing was written" in err
    project.folder = project.folder / "fresh"
    assert "WRONG" not in project("doctor")[0]
    out, _ = project("run", "app.py:brief", "--input", '"tides"', "--id", "first")
    assert json.loads(out)["title"] == "On tides"
    assert project.json("show", "first")["usage"]["model_calls"] == 5
    project("fork", "first", "--at", "editor#1/model#1", "--id", "second")
    assert json.loads(project("resume", "second")[0])["title"] == "On tides"


def test_doctor_says_what_is_wrong_and_how_to_mend_it(project: Project) -> None:
    text = '[providers.x]\nkind = "openai"\nbase_url = "http://127.0.0.1:9/v1"\napi_key = "env:NOT_SET_ANYWHERE"\n'
    (project.folder / "ridethrough.toml").write_text(text)
    out, _ = project("doctor", status=1)
    assert "NOT_SET_ANYWHERE" in out
    project.env["NOT_SET_ANYWHERE"] = "k"
    found = project.json("doctor", status=1)
    wrong = [check for check in found["checks"] if check["status"] == "wrong"]
    assert [check["name"] for check in wrong] == ["provider x"]
    assert wrong[0]["mend"]
    assert project.json("doctor", "--offline")["ok"] is True
    (project.folder / "ridethrough.db").write_text("this is no database " * 100)
    out, _ = project("doctor", "--offline", status=1)
    assert "not an SQLite database" in out


def test_doctor_asks_a_provider(project: Project) -> None:
    server = project.start("simulate", "--json")
    assert server.process.stdout is not None
    base_url = json.loads(server.process.stdout.readline())["base_url"]
    (project.folder / "ridethrough.toml").write_text(f'[providers.x]\nkind = "openai"\nbase_url = "{base_url}"\n')
    assert f"{base_url}/models answers 200" in project("doctor")[0]
    server.send(signal.SIGTERM)
    assert server.end()[0] == 0


def test_simulate_prints_a_snippet_that_works(project: Project) -> None:
    server = project.start("simulate", "--scenario", "script.toml")
    assert server.process.stdout is not None
    lines: list[str] = []
    while not lines or not lines[-1].startswith("models = "):
        lines.append(server.process.stdout.readline())
    (project.folder / "ridethrough.toml").write_text("".join(lines[1:]))
    project("run", "app.py:mails", "--id", "m", status=3)
    assert project.json("show", "m")["usage"]["model_calls"] == 1
    server.send(signal.SIGINT)
    assert server.end()[0] == 0
    _, err = project("simulate", "--scenario", "nowhere.toml", status=2)
    assert "nowhere.toml" in err


def test_db_upgrade(project: Project) -> None:
    assert "(new) -> 0003" in project("db", "upgrade")[0]
    assert "nothing to do" in project("db", "upgrade")[0]
    project("run", "app.py:data", "--id", "one")
    connection = sqlite3.connect(project.folder / "ridethrough.db")
    with connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    for command in (("db", "upgrade"), ("runs",), ("run", "app.py:data"), ("resume", "one"), ("doctor",)):
        _, err = project(*command, status=1 if command == ("doctor",) else 2)
        assert "newer" in err or command == ("doctor",)


def test_db_gc_deletes_what_is_old_and_nothing_else(project: Project) -> None:
    for name in ("old", "new"):
        project("run", "app.py:simple", "--input", '{"topic": "a", "times": 50}', "--id", name)
    project("run", "app.py:asks", "--id", "open", status=3)
    connection = sqlite3.connect(project.folder / "ridethrough.db")
    with connection:
        connection.execute("UPDATE runs SET finished_at = finished_at - 86400 * 40 WHERE id = 'old'")
        connection.execute("UPDATE runs SET created_at = created_at - 86400 * 40 WHERE id = 'open'")
    connection.close()
    freed = project.json("db", "gc", "--older-than", "30d")
    assert freed["runs"] == 1
    assert freed["bytes_after"] <= freed["bytes_before"]
    assert {run["id"] for run in project.json("runs")} == {"new", "open"}
    assert "deleted 0 runs" in project("db", "gc", "--older-than", "30d")[0]


def test_db_check(project: Project) -> None:
    project("run", "app.py:data", "--id", "one")
    assert "sound" in project("db", "check")[0]
    connection = sqlite3.connect(project.folder / "ridethrough.db")
    with connection:
        connection.execute("DELETE FROM runs WHERE id = 'one'")
        connection.execute("INSERT INTO waits (run_id, path, kind, name, since) VALUES ('ghost', 'a', 'timer', 'a', 0)")
    connection.close()
    found = project.json("db", "check", status=1)
    assert any("ghost" in problem for problem in found["problems"])


def test_a_database_that_cannot_be_used_ends_with_1(project: Project) -> None:
    (project.folder / "ridethrough.db").write_text("this is no database " * 100)
    for command in (("runs",), ("run", "app.py:data"), ("db", "gc", "--older-than", "1d")):
        _, err = project(*command, status=1)
        assert "not an SQLite database" in err
