"""The account: claims, each with what was counted for it. Nothing in here is known from anywhere but the evidence."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ridethrough.agents.demo.acts import Crash, Evidence, Outage, Revival
from ridethrough.agents.demo.stage import Asked, Stage
from ridethrough.runtime.events import Event, RunResumed
from ridethrough.runtime.printing import counted, dollars
from ridethrough.runtime.views import RunView, StepView


@dataclass(frozen=True)
class Claim:
    """Something that the demonstration is to show, whether it did, and the numbers."""

    name: str
    holds: bool
    text: str
    measured: dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """All that is counted: what the crash left behind, and what there was at the end."""

    crash: Crash
    revival: Revival
    run: RunView
    asked: list[Asked]
    mails: list[dict[str, Any]]
    events: list[Event]
    outage: Outage | None

    @property
    def kept(self) -> list[StepView]:
        """The steps that were on record when the process was dead."""
        return done(self.crash.run)

    @property
    def cut_off(self) -> set[tuple[str, int]]:
        """The requests that died with the process."""
        return {(each.provider, each.number) for each in self.crash.asked if each.end == "open"}

    @property
    def finished(self) -> list[Asked]:
        """The model calls that somebody got an answer to."""
        return [
            each for each in self.asked if each.end == "finished" and (each.provider, each.number) not in self.cut_off
        ]


def done(run: RunView) -> list[StepView]:
    """The steps of a run that are on record."""
    return [step for step in run.steps or () if step.status != "running"]


@dataclass
class Account:
    """What the demonstration came to."""

    run_id: str
    database: str
    folder: str
    seconds: float
    commands: list[str]
    claims: list[Claim] = field(default_factory=list[Claim])
    trouble: str | None = None
    saved: dict[str, Any] = field(default_factory=dict[str, Any])
    cost_usd: float = 0.0
    result: Any = None

    @property
    def ok(self) -> bool:
        """Whether everything was shown."""
        return bool(self.claims) and self.trouble is None and all(claim.holds for claim in self.claims)

    @property
    def saving(self) -> str:
        """What a start from the beginning would have cost again, in words."""
        if not self.saved:
            return f"Nothing can be said of what was saved, after {self.seconds:.1f} s."
        calls, usd = counted(self.saved["model_calls"], "model call"), dollars(self.saved["usd"])
        return (
            f"Saved: {calls}, {self.saved['tokens']} tokens, {usd} of {dollars(self.cost_usd)}, and "
            f"{counted(self.saved['mails'], 'mail')} that a start from the beginning would send twice. "
            f"It took {self.seconds:.1f} s."
        )

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "ok": self.ok,
            "run_id": self.run_id,
            "database": self.database,
            "folder": self.folder,
            "seconds": round(self.seconds, 3),
            "facts": [vars(claim) for claim in self.claims],
            "trouble": self.trouble,
            "saved": self.saved,
            "cost_usd": self.cost_usd,
            "result": self.result,
            "commands": self.commands,
        }


def account_of(stage: Stage, evidence: Evidence, seconds: float) -> Account:
    """Count."""
    shown = stage.commands
    commands = [
        shown.command("show", stage.run_id, "--steps"),
        shown.command("events", stage.run_id),
        shown.command("runs"),
    ]
    account = Account(stage.run_id, stage.database, str(stage.folder), seconds, commands, trouble=evidence.trouble)
    if evidence.crash is not None and evidence.revival is not None:
        facts = Facts(
            evidence.crash,
            evidence.revival,
            stage.run(),
            stage.asked(),
            stage.mails(),
            evidence.events,
            evidence.outage,
        )
        account.claims = [claim(facts) for claim in CLAIMS]
        account.saved = _saved(facts)
        account.cost_usd, account.result = facts.run.cost_usd, facts.run.result
    return account


def _saved(facts: Facts) -> dict[str, Any]:
    models = [step for step in facts.kept if step.kind == "model"]
    return {
        "usd": sum(step.cost_usd or 0.0 for step in models),
        "tokens": sum((step.input_tokens or 0) + (step.output_tokens or 0) for step in models),
        "model_calls": len(models),
        "mails": facts.crash.mails,
    }


# --- claims ---------------------------------------------------------------------------------------------------------


def _killed(facts: Facts) -> Claim:
    crash, unanswered = facts.crash, len(facts.cut_off)
    name = signal.Signals(-crash.status).name if crash.status < 0 else f"status {crash.status}"
    return Claim(
        "really killed",
        crash.status == -signal.SIGKILL and crash.run.status == "running" and unanswered > 0,
        f"process {crash.pid} ended by {name}, with {counted(unanswered, 'answer')} on the way",
        {"pid": crash.pid, "signal": name, "run_status": crash.run.status, "unanswered": unanswered},
    )


def _resumed(facts: Facts) -> Claim:
    run, revival = facts.run, facts.revival
    another = revival.pid != facts.crash.pid
    return Claim(
        "taken up and finished",
        run.status == "done" and revival.status == 0 and another and run.recoveries == 1,
        f"by process {revival.pid}; the run is {run.status}, recoveries: {run.recoveries}",
        {"pid": revival.pid, "exit_status": revival.status, "run_status": run.status, "recoveries": run.recoveries},
    )


def _steps_kept(facts: Facts) -> Claim:
    now = {step.path: step for step in done(facts.run)}
    kept = [step for step in facts.kept if now.get(step.path) == step]
    new = len(now) - len(kept)
    return Claim(
        "steps kept",
        0 < len(kept) == len(facts.kept) and new > 0,
        f"{len(kept)} of {len(facts.kept)}, word for word; {counted(new, 'new step')} to the end",
        {"on_record": len(facts.kept), "kept": len(kept), "new": new},
    )


def _not_repeated(facts: Facts) -> Claim:
    before = [each.digest for each in facts.crash.asked if each.end == "finished"]
    known = {(each.provider, each.number) for each in facts.crash.asked}
    later = {each.digest for each in facts.asked if (each.provider, each.number) not in known}
    times = Counter(each.digest for each in facts.finished)
    calls = sum(step.kind == "model" for step in done(facts.run))
    repeated = sum(digest in later for digest in before) + sum(count - 1 for count in times.values())
    again = {each.digest for each in facts.crash.asked if each.end == "open"} & later
    return Claim(
        "calls not repeated",
        repeated == 0 and len(before) > 0 and sum(times.values()) == calls,
        f"{counted(calls, 'model call')} answered, each once; {len(before)} of them before the kill",
        {
            "model_calls": calls,
            "answered": sum(times.values()),
            "answered_before_the_kill": len(before),
            "repeated": repeated,
            "asked_again_unanswered": len(again),
        },
    )


def _mailed_once(facts: Facts) -> Claim:
    sent, keys = len(facts.mails), {mail["key"] for mail in facts.mails}
    kept = any(step.name == "send_mail" for step in facts.kept)
    return Claim(
        "mail sent once",
        sent == 1 and facts.crash.mails == 1 and kept,
        f"{counted(sent, 'mail')} in the outbox, sent by process {', '.join(_processes(facts.mails))}",
        {"mails": sent, "before_the_kill": facts.crash.mails, "keys": len(keys)},
    )


def _processes(mails: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({str(mail["process"]) for mail in mails})


def _rode_through(facts: Facts) -> Claim:
    failed = [each for each in facts.asked if each.provider == "north" and each.fault]
    kinds = Counter(each.fault for each in failed)
    answered = {each.digest for each in facts.finished}
    lost = len({each.digest for each in failed} - answered)
    return Claim(
        "provider failed over",
        kinds["status"] > 0 and kinds["cut"] > 0 and lost == 0,
        f"north failed {len(failed)} times ({kinds['status']} refused, {kinds['cut']} broken off); each was answered",
        {"refused": kinds["status"], "broken_off": kinds["cut"], "answered_elsewhere": len(answered), "lost": lost},
    )


def _paused(facts: Facts) -> Claim:
    """Nobody answered for a while: the run lay in the database, and came back without a command."""
    outage = facts.outage
    reason = outage.paused.pause.reason if outage is not None and outage.paused.pause is not None else "never"
    seconds = 0.0 if outage is None else outage.seconds
    refused = [] if outage is None else [each for each in outage.asked if each.end == "failed"]
    resumed = sum(isinstance(event, RunResumed) for event in facts.events)
    return Claim(
        "outage ridden through",
        reason in ("outage", "brownout") and resumed > 0 and facts.run.status == "done",
        f"paused ({reason}) for {seconds:.1f} s with {counted(len(refused), 'call')} refused; it went on by itself",
        {"reason": reason, "seconds": round(seconds, 3), "refused": len(refused), "resumed": resumed},
    )


def _complete(facts: Facts) -> Claim:
    result = facts.run.result if isinstance(facts.run.result, dict) else {}
    findings = len(result.get("findings", ()))
    researchers = {step.path.rpartition("/")[0] for step in facts.run.steps or () if step.agent == "researcher"}
    return Claim(
        "result complete",
        0 < findings == len(researchers),
        f"{counted(findings, 'finding')} of {counted(len(researchers), 'researcher')}: {result.get('title', '')}",
        {"findings": findings, "researchers": len(researchers)},
    )


CLAIMS: tuple[Callable[[Facts], Claim], ...] = (
    _killed,
    _resumed,
    _steps_kept,
    _not_repeated,
    _mailed_once,
    _rode_through,
    _paused,
    _complete,
)
