"""What a person sees while runs are executed: a live table on a terminal, plain lines elsewhere, JSON for programs.

The live table has a row for each agent and branch that does something, and is redrawn a few times a second from what
the events have left behind, however many there are. Lines that matter later (pauses, questions, failed attempts) are
printed above it and stay. Rich is imported only for the live kind.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import click

from ridethrough.runtime.events import (
    ApprovalRequested,
    EventBase,
    HandedOff,
    ModelDelta,
    ModelReset,
    RunFinished,
    RunPaused,
    RunResumed,
    RunStarted,
    StepFinished,
    StepStarted,
    ToolCallFinished,
    ToolCallStarted,
)
from ridethrough.runtime.printing import counted, describe_wait, dollars, plain, seconds, shortened, tokens, when

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ridethrough.runtime.options import Options
    from ridethrough.runtime.views import Outlook, RunView

ROWS = 14
"""Rows of the live table at most; how many more there are is said below."""

REST = 1.0
"""Seconds after which a row that does nothing may make room for another."""

TAIL = 60
"""Characters of a model's text that are shown while it is written."""


class Display(Protocol):
    """Shows what happens to the runs that are followed."""

    shows_children: bool

    def begin(self, run: RunView, steps: int) -> None:
        """A run is followed from here on; ``steps`` are on record already."""
        ...

    def event(self, event: EventBase) -> None:
        """Something happened."""
        ...

    def awaiting(self, run_id: str, outlook: Outlook) -> None:
        """What a run is waiting for, if it is."""
        ...

    def note(self, text: str) -> None:
        """Something to know that is no event."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was; may be called twice."""
        ...


def open_display(options: Options) -> Display:
    """The display for this output: JSON if it was asked for, live if a person looks at it, lines else."""
    if options.json:
        return JsonLines()
    if sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return Live(options)
    return Lines(options)


# --- programs -------------------------------------------------------------------------------------------------------


class JsonLines:
    """One event a line on standard output. What the workflow itself prints goes to standard error meanwhile."""

    shows_children = False

    def __init__(self) -> None:
        """Take standard output."""
        self._out = sys.stdout
        sys.stdout = sys.stderr

    def begin(self, run: RunView, steps: int) -> None:
        """Nothing: the events tell."""

    def event(self, event: EventBase) -> None:
        """Print it."""
        print(event.model_dump_json(), file=self._out, flush=True)

    def awaiting(self, run_id: str, outlook: Outlook) -> None:
        """Nothing: the events tell."""

    def note(self, text: str) -> None:
        """Keep it apart from the JSON."""
        click.echo(plain(text), err=True)

    def close(self) -> None:
        """Give standard output back."""
        sys.stdout = self._out


# --- lines ----------------------------------------------------------------------------------------------------------


def event_line(event: EventBase) -> str | None:
    """An event for people; ``None`` for those that come by the hundred."""
    text = _event_text(event)
    if text is None:
        return None
    where = f" {event.path}" if event.path else ""
    clock = time.strftime("%H:%M:%S", time.localtime(event.at))
    return plain(f"{clock} {event.run_id}{where}: {text}")


def _event_text(event: EventBase) -> str | None:
    match event:
        case RunStarted():
            return "started" if not event.recovery else f"taken up after a crash (recovery {event.recovery})"
        case StepFinished():
            return _finished(event)
        case HandedOff():
            return f"{event.source} handed over to {event.target}"
        case ApprovalRequested():
            return f"waits for a person: {event.question or _call(event.name, event.arguments)}"
        case RunPaused():
            return f"parked ({event.reason})" + (f" until {when(event.until)}" if event.until else "")
        case RunResumed():
            return "goes on"
        case ModelReset():
            return f"attempt on {event.deployment} is void: {event.error}"
        case RunFinished():
            return event.status + (f": {event.error}" if event.error else "")
        case _:
            return None


def _call(name: str, arguments: Any) -> str:
    return f"{name}({shortened(arguments, 80)})"


def _finished(event: StepFinished) -> str:
    parts = [event.agent or "", event.model or "", seconds(event.seconds)]
    if event.kind == "model":
        parts.append(f"{tokens(event.input_tokens)} + {tokens(event.output_tokens)} tokens")
        parts += [dollars(event.cost_usd)] if event.cost_usd is not None else []
    if event.attempts > 1:
        parts.append(f"{event.attempts} attempts")
    inside = ", ".join(part for part in parts if part)
    return f"{event.kind} {event.status} ({inside})" + (f": {shortened(event.error, 200)}" if event.error else "")


class Lines:
    """One line for each finished step, pause and question, on standard error."""

    shows_children = True

    def __init__(self, options: Options) -> None:
        """``options`` are for the commands that are shown."""
        self._options = options
        self._told: dict[str, str] = {}

    def begin(self, run: RunView, steps: int) -> None:
        """Say which run it is, and how to get back to it."""
        self._print(opening(run, steps, self._options))

    def event(self, event: EventBase) -> None:
        """Print its line, if it has one; what a parked run waits for is told by ``awaiting``, with more to say."""
        if not isinstance(event, RunPaused) and (line := event_line(event)):
            self._print(line)

    def awaiting(self, run_id: str, outlook: Outlook) -> None:
        """Say it once, until it changes."""
        text = awaited(run_id, outlook)
        if text != self._told.get(run_id, ""):
            self._told[run_id] = text
            if text:
                self._print(text)

    def note(self, text: str) -> None:
        """Print it."""
        self._print(plain(text))

    def close(self) -> None:
        """Nothing to put back."""

    def _print(self, text: str) -> None:
        click.echo(text, err=True)


def opening(run: RunView, steps: int, options: Options) -> str:
    """The first line about a run."""
    if steps:
        return f"{run.id}: {run.workflow}, taken up with {counted(steps, 'step')} on record"
    return f"{run.id}: {run.workflow} (if this process ends: {options.command('resume', run.id)})"


def awaited(run_id: str, outlook: Outlook) -> str:
    """What a parked run is waiting for, in one line; empty while it works."""
    if outlook.state in ("works", "ended"):
        return ""
    # Branches that wait for the same models say so in the same words, but for the time.
    told = {(each.wait.kind, each.wait.name, each.wait.question): each.wait for each in outlook.blockers}
    waits = ", ".join(describe_wait(wait) for wait in list(told.values())[:3])
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    dated = any(blocker.wait.until for blocker in outlook.blockers)
    until = f"; looks again at {when(outlook.until)}" if outlook.until and not dated else ""
    what = "an operator's resume" if outlook.reason == "operator" else f"{waits}{more}" or outlook.reason
    return plain(f"{run_id} waits for {what}{until}")


# --- live -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Row:
    """An agent, or a branch without one, and what it is doing."""

    name: str
    steps: dict[str, float] = field(default_factory=dict[str, float])
    """The steps that it is at, by path, and since when."""
    doing: str = ""
    text: str = ""
    turns: int = 0
    tools: int = 0
    tokens: int = 0
    cost: float = 0.0
    first: float = 0.0
    last: float = 0.0


class Board:
    """What the events have left behind; it knows nothing of terminals."""

    def __init__(self) -> None:
        """Empty."""
        self.rows: dict[tuple[str, str, str], Row] = {}
        self.steps = self.turns = self.tools = self.tokens = 0
        self.cost = 0.0

    def kept(self, run: RunView, steps: int) -> None:
        """Count what a run has on record."""
        self.steps += steps
        self.turns += run.usage.model_calls
        self.tokens += run.usage.input_tokens + run.usage.output_tokens
        self.cost += run.cost_usd

    def take(self, event: EventBase) -> None:
        """Keep what the table shows."""
        match event:
            case StepStarted():
                self._row(event, event.agent).steps[event.path] = event.at
                self._row(event, event.agent).doing = event.path.rpartition("/")[2]
            case StepFinished():
                self._finished(event)
            case ModelDelta():
                row = self._row(event, event.agent)
                row.text = (row.text + event.text)[-4 * TAIL :]
            case ModelReset():
                self._row(event, None).text = ""
            case ToolCallStarted():
                row = self._row(event, event.agent)
                row.doing = event.progress or _call(event.name, event.arguments)
            case ToolCallFinished():
                self._row(event, event.agent).text = ""
            case RunFinished():
                self.rows = {key: row for key, row in self.rows.items() if key[0] != event.run_id}
            case _:
                pass

    def _row(self, event: EventBase, agent: str | None) -> Row:
        branch = event.path.rpartition("/")[0]
        if agent is None:  # an event that does not say: whoever is on this branch
            agent = next((key[2] for key in self.rows if key[:2] == (event.run_id, branch)), "")
        key = (event.run_id, branch, agent)
        if key not in self.rows:
            self.rows[key] = Row(plain(_name(event.run_id, branch, agent)), first=event.at)
        self.rows[key].last = event.at
        return self.rows[key]

    def _finished(self, event: StepFinished) -> None:
        row = self._row(event, event.agent)
        row.steps.pop(event.path, None)
        row.text = "" if event.kind == "model" else row.text
        row.doing = row.doing if row.steps else ""
        spent = event.input_tokens + event.output_tokens
        self.steps += 1
        for counter in (row, self):
            counter.turns += event.kind == "model"
            counter.tools += event.kind == "tool"
            counter.tokens += spent
            counter.cost += event.cost_usd or 0.0

    def shown(self, limit: int, now: float) -> tuple[list[Row], int]:
        """The rows for the table, and how many are left out. One at work keeps its place, so that the eye can, too."""
        working = [row for row in self.rows.values() if row.steps or now - row.last < REST]
        resting = sorted((row for row in self.rows.values() if row not in working), key=lambda row: -row.last)
        chosen = {id(row) for row in (working + resting)[:limit]}
        return [row for row in self.rows.values() if id(row) in chosen], max(0, len(self.rows) - limit)


def _name(run_id: str, branch: str, agent: str) -> str:
    """What a row is called: the agent and its branch, without saying the agent's name twice."""
    if not agent:
        return branch or run_id
    outer, _, inner = branch.rpartition("/")
    times = inner.removeprefix(f"{agent}#")
    where = branch if times == inner else f"{outer} #{times}" if times != "1" else outer
    return f"{agent} {where}".strip()


class Live:
    """A table that is redrawn in its place."""

    shows_children = True

    def __init__(self, options: Options) -> None:
        """Take the terminal."""
        from rich.console import Console
        from rich.live import Live as RichLive

        self._options = options
        self._board = Board()
        self._waits: dict[str, str] = {}
        self._started = time.monotonic()
        self._console = Console(stderr=True, highlight=False)
        self._live = RichLive(
            get_renderable=self._render, console=self._console, refresh_per_second=8, transient=True,
            redirect_stdout=False, vertical_overflow="crop",
        )  # fmt: skip
        self._live.start()

    def begin(self, run: RunView, steps: int) -> None:
        """Say which run it is, and how to get back to it."""
        self._board.kept(run, steps)
        self.note(opening(run, steps, self._options))

    def event(self, event: EventBase) -> None:
        """Keep it for the table; print what should stay."""
        self._board.take(event)
        failed = isinstance(event, StepFinished) and event.status == "failed"
        if failed or isinstance(event, ApprovalRequested | HandedOff | ModelReset):
            self.note(event_line(event) or "")

    def awaiting(self, run_id: str, outlook: Outlook) -> None:
        """Shown below the table while it lasts."""
        if text := awaited(run_id, outlook):
            self._waits[run_id] = text
        else:
            self._waits.pop(run_id, None)

    def note(self, text: str) -> None:
        """Print above the table."""
        from rich.text import Text

        self._console.print(Text(plain(text)), soft_wrap=True)

    def close(self) -> None:
        """Take the table away: the summary that follows has its numbers."""
        self._live.stop()

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        room = max(3, min(ROWS, self._console.size.height - 6))
        rows, left = self._board.shown(room, time.time())
        parts: list[RenderableType] = [self._table(rows)] if rows else []
        if left:
            parts.append(Text(f"… and {left} more", style="dim"))
        parts += [
            Text(text, style="yellow", no_wrap=True, overflow="ellipsis") for text in list(self._waits.values())[:3]
        ]
        parts.append(Text(self._total(), style="bold", no_wrap=True, overflow="ellipsis"))
        return Group(*parts)

    def _table(self, rows: list[Row]) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        grid = Table(box=None, pad_edge=False, expand=True, header_style="dim")
        grid.add_column("agent / branch", no_wrap=True, overflow="ellipsis", ratio=3)
        for name in ("turns", "tools", "tokens", "cost", "time"):
            grid.add_column(name, justify="right", no_wrap=True)
        grid.add_column("now", no_wrap=True, overflow="ellipsis", ratio=6)
        now = time.time()
        for row in rows:
            numbers = (str(row.turns), str(row.tools), tokens(row.tokens), dollars(row.cost), _age(row, now))
            style = "" if row.steps else "dim"
            grid.add_row(Text(row.name), *numbers, Text(" ".join(_now(row))), style=style)
        return grid

    def _total(self) -> str:
        board = self._board
        took = seconds(time.monotonic() - self._started)
        return (
            f"{counted(board.steps, 'step')}, {counted(board.turns, 'model call')}, "
            f"{counted(board.tools, 'tool call')}, {tokens(board.tokens)} tokens, {dollars(board.cost)}, {took}"
        )


def _age(row: Row, now: float) -> str:
    return seconds(max(0.0, (now if row.steps else row.last) - row.first))


def _now(row: Row) -> Iterator[str]:
    if row.steps:
        yield plain(row.doing)
    if row.text:
        yield plain(row.text)[-TAIL:].strip()
