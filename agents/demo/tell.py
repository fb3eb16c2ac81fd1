"""Telling the story while it happens: with colours on a terminal, as plain lines elsewhere, not at all for programs."""

from __future__ import annotations

import os
import re
import sys
import time
from typing import TYPE_CHECKING, Protocol

import click

from ridethrough.runtime.events import Event, RunResumed, StepFinished, ToolCallFinished
from ridethrough.runtime.printing import counted, dollars, plain, seconds, shortened

if TYPE_CHECKING:
    from ridethrough.agents.demo.account import Account
    from ridethrough.agents.demo.stage import Asked
    from ridethrough.runtime.views import RunView

WHO = 13
"""Columns for who does something."""


class Teller(Protocol):
    """Whoever tells what happens."""

    def opening(self, folder: str) -> None:
        """It begins."""
        ...

    def process(self, pid: int, command: str) -> None:
        """A process begins."""
        ...

    def event(self, event: Event) -> None:
        """Something happened to the run."""
        ...

    def fault(self, asked: Asked) -> None:
        """A provider failed."""
        ...

    def killed(self, pid: int, run: RunView, unanswered: int) -> None:
        """A process was killed; ``run`` is what it left behind."""
        ...

    def outage(self, what: str) -> None:
        """Both providers went away, or came back."""
        ...

    def paused(self, run: RunView) -> None:
        """The run was paused."""
        ...

    def account(self, account: Account) -> None:
        """What all of it came to."""
        ...


class Silent:
    """Tells nothing: programs get the account."""

    def opening(self, folder: str) -> None:
        """Nothing."""

    def process(self, pid: int, command: str) -> None:
        """Nothing."""

    def event(self, event: Event) -> None:
        """Nothing."""

    def fault(self, asked: Asked) -> None:
        """Nothing."""

    def killed(self, pid: int, run: RunView, unanswered: int) -> None:
        """Nothing."""

    def outage(self, what: str) -> None:
        """Nothing."""

    def paused(self, run: RunView) -> None:
        """Nothing."""

    def account(self, account: Account) -> None:
        """Nothing."""


class Lines:
    """One line for each thing that happens: when, who, what."""

    def __init__(self) -> None:
        """The clock starts."""
        self._began = time.monotonic()
        self._told: set[str | None] = set()

    def opening(self, folder: str) -> None:
        """What is about to be seen."""
        self._print("A planner, five researchers and an editor report on the tides. Their models are simulated, by two")
        self._print(f"providers over real HTTP on this machine; no key is needed. Files: {plain(folder)}")

    def process(self, pid: int, command: str) -> None:
        """The command that a user would type."""
        self._told.clear()
        self._print("")
        self._line(f"process {pid}", command, "bold")

    def event(self, event: Event) -> None:
        """What an agent did."""
        match event:
            case ToolCallFinished():
                self._line(_who(event.path, event.agent), f"{event.name}: {shortened(event.output, 76)}")
            case StepFinished(kind="model"):
                self._line(_who(event.path, event.agent), _answered(event), "dim")
            case RunResumed():
                self._line("the run", "is taken up by itself, to see whether they are back", "green")
            case _:
                pass

    def fault(self, asked: Asked) -> None:
        """A provider failed; told once for each kind and process, the account has the count."""
        if asked.fault in self._told:
            return
        self._told.add(asked.fault)
        self._line(asked.provider, FAULTS.get(asked.fault or "", "fails"), "yellow")

    def killed(self, pid: int, run: RunView, unanswered: int) -> None:
        """A process was killed."""
        steps = counted(len([step for step in run.steps or () if step.status == "done"]), "step")
        lost = counted(unanswered, "answer")
        self._line(f"process {pid}", f"SIGKILL, with {lost} on the way; {steps} on record", "bold red")

    def outage(self, what: str) -> None:
        """Both providers went away, or came back."""
        self._line("providers", what, "yellow")

    def paused(self, run: RunView) -> None:
        """The run was paused."""
        reason = run.pause.reason if run.pause else "?"
        self._line("the run", f"is paused ({reason}): out of memory, in the database, nothing lost", "bold yellow")

    def account(self, account: Account) -> None:
        """What all of it came to."""
        self._print("\nCounted in the database, on the providers' ledgers, and in the outbox:\n")
        for claim in account.claims:
            mark, style = ("ok", "green") if claim.holds else ("NOT SO", "bold red")
            self._print(f"  {mark:6}  ", style, end="")
            self._print(f"{claim.name:23}", "bold", end="")
            self._print(claim.text)
        if account.trouble:
            self._print(f"\n{plain(account.trouble)}", "bold red")
        self._print(f"\n{account.saving}\n\nLook further:\n")
        for command in account.commands:
            self._print(f"  {command}")

    def _line(self, who: str, what: str, style: str = "") -> None:
        self._print(f"{time.monotonic() - self._began:5.1f}s  {plain(who):{WHO}}  ", "dim", end="")
        self._print(plain(what), style)

    def _print(self, text: str, style: str = "", end: str = "\n") -> None:
        click.echo(text, nl=end == "\n")


class Colours(Lines):
    """The same with colours."""

    def __init__(self) -> None:
        """Take the terminal."""
        super().__init__()
        from rich.console import Console

        self._console: Console = Console(highlight=False)

    def _print(self, text: str, style: str = "", end: str = "\n") -> None:
        self._console.print(text, style=style or None, end=end, markup=False, soft_wrap=True)


def teller(*, json: bool) -> Teller:
    """Whoever fits the output."""
    if json:
        return Silent()
    return Colours() if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" else Lines()


FAULTS = {"status": "503, overloaded; the router asks south", "cut": "its stream breaks; the router asks south"}


def _who(path: str, agent: str | None) -> str:
    """The agent, with the number of its branch."""
    branch = re.match(r"g\d+\[(\d+)\]/", path)
    return f"{agent} {int(branch[1]) + 1}" if branch else agent or ""


def _answered(event: StepFinished) -> str:
    parts = [event.model or "a model", seconds(event.seconds), dollars(event.cost_usd or 0.0)]
    if event.attempts > 1:
        parts.append(counted(event.attempts, "attempt"))
    return f"answer of {', '.join(parts)}"
