"""Runs in words: tables, pages and summaries, the same on a terminal and in a file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ridethrough.runtime.views import AttemptView, Blocker, EgressView, RunView, SandboxView, StepView, WaitView

if TYPE_CHECKING:
    from ridethrough.runtime.options import Options

TIMELINE = 20
"""Steps on a run's page when not all are asked for."""

SHOWN = 2000
"""Characters of a value that are printed."""

_KEPT = {"\n": "\n", "\t": "    "}


def plain(text: str, *, lines: bool = False) -> str:
    """``text`` without control characters: what a model or a tool wrote must not steer the terminal.

    Line ends stay with ``lines``, else they become spaces.
    """
    kept = _KEPT if lines else {"\n": " ", "\t": " "}
    return "".join(letter if letter.isprintable() else kept.get(letter, "�") for letter in text)


def shortened(value: Any, limit: int) -> str:
    """A value in one line of at most ``limit`` characters, without the data of its images."""
    text = _DATA.sub(r'\1"…"', value) if isinstance(value, str) else _dumped(value)
    text = plain(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


# --- images ---------------------------------------------------------------------------------------------------------

_DATA = re.compile(r'("data": ?)"[\w+/=-]{64,}["…]')
"""Bytes in the beginning of some JSON, which may break off within them."""


def pictured(value: Any) -> Any:
    """A value of JSON with a few words in the place of each image: ``[image, image/jpeg, 43 kB]``."""
    if isinstance(value, list):
        return [pictured(each) for each in value]
    if not isinstance(value, dict):
        return value
    return _picture(value) or {name: pictured(each) for name, each in value.items()}


def _picture(value: dict[str, Any]) -> str:
    """What stands for an image; nothing for everything else."""
    kind, data, url = value.get("media_type", "image/png"), value.get("data"), value.get("url")
    if value.get("type") == "image" or (str(kind).startswith("image/") and value.keys() == {"data", "media_type"}):
        if isinstance(data, str):
            return f"[image, {kind}, {_size(data)}]"
        if isinstance(url, str):
            kind, found, data = url.removeprefix("data:").partition(";base64,")
            return f"[image, {kind}, {_size(data)}]" if found else f"[image, {url}]"
    return ""


def _size(base64: str) -> str:
    """The size of what ``base64`` holds."""
    return f"{max(1, round(len(base64) * 3 / 4000))} kB"


def _dumped(value: Any, indent: int | None = None) -> str:
    told = pictured(value)
    return told if isinstance(told, str) else json.dumps(told, ensure_ascii=False, indent=indent)


# --- words ----------------------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    """A duration."""
    if value < 0.0995:
        return f"{value * 1000:.0f} ms"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min {rest:02} s"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes:02} min"


def when(moment: datetime | None) -> str:
    """A time of this machine's zone; the date too where it is not today's."""
    if moment is None:
        return "-"
    local = moment.astimezone()
    today = datetime.now(UTC).astimezone().date()
    return local.strftime("%H:%M:%S" if local.date() == today else "%Y-%m-%d %H:%M:%S")


def counted(number: int, what: str, many: str = "") -> str:
    """A number of things."""
    return f"{number} {what}" if number == 1 else f"{number} {many or what + 's'}"


def tokens(count: int) -> str:
    """A number of tokens."""
    return f"{count}" if count < 10_000 else f"{count / 1000:.0f}k" if count < 1_000_000 else f"{count / 1e6:.1f}M"


def dollars(amount: float) -> str:
    """An amount of money."""
    return "$0" if amount == 0 else f"${amount:.4f}" if amount < 1 else f"${amount:.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they need to be, the last one open."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )


# --- runs -----------------------------------------------------------------------------------------------------------


def runs_table(runs: Sequence[RunView]) -> str:
    """A line a run."""
    head = ("RUN", "WORKFLOW", "STATUS", "CREATED", "TIME", "CALLS", "COST", "WAITS FOR / ERROR")
    return table(head, (_run_row(run) for run in runs))


def _run_row(run: RunView) -> tuple[str, ...]:
    calls = str(run.usage.model_calls) if run.usage.model_calls else "-"
    remark = shortened(f"{run.error.type}: {run.error.message}", 60) if run.error else _waits(run)
    took = seconds(_elapsed(run)) if run.started_at else "-"
    return run.id, run.workflow, run.status, when(run.created_at), took, calls, cost_of(run), remark


def cost_of(run: RunView) -> str:
    """What a run has cost, and whether that is all of it: an unknown price is never zero."""
    if not run.usage.unpriced_calls:
        return dollars(run.cost_usd)
    return f"{dollars(run.cost_usd)} + ?" if run.cost_usd else "?"


def _elapsed(run: RunView) -> float:
    if run.started_at is None:
        return 0.0
    return ((run.finished_at or datetime.now(UTC)) - run.started_at).total_seconds()


def _waits(run: RunView) -> str:
    if run.pause is None:
        return ""
    if run.pause.reason == "operator":
        return "an operator's resume"
    until = f" until {when(run.pause.until)}" if run.pause.until else ""
    told = {describe_wait(wait): describe_wait(wait, since=True) for wait in reversed(run.waits)}  # branches wait alike
    return ", ".join(list(reversed(told.values()))[:3]) or f"{run.pause.reason}{until}"


def describe_wait(wait: WaitView, *, since: bool = False) -> str:
    """What is awaited, in a few words; of models also ``since`` when, if that is asked for."""
    until = f" until {when(wait.until)}" if wait.until else ""
    match wait.kind:
        case "timer":
            return f"the timer{until}"
        case "question":
            return f"an answer to {shortened(wait.question or wait.name, 60)!r}{until}"
        case "approval":
            return f"approval of {_call(wait)}{until}"
        case "interrupted":
            return f"a decision about the interrupted call {_call(wait)}{until}"
        case "child":
            return f"child run {wait.name}"
        case "model":
            why = f": {shortened(wait.question, 240)}" if wait.question else ""
            what = {"configuration": "a mended configuration", "quota": "credit", "budget": "money"}.get(wait.name)
            begun = f", since {when(wait.since)}" if since else ""
            return f"{what or f'the models ({wait.name}){until}'}{begun}{why}"
        case "sandbox":
            why = f": {shortened(wait.question, 240)}" if wait.question else ""
            what = "a mended configuration" if wait.name == "configuration" else f"a sandbox{until}"
            return f"{what}{why}"
        case _:
            return f"{wait.kind} {wait.name}{until}"


def _call(wait: WaitView) -> str:
    """The call that a person decides about: its wait is the last part of the path, the tool the one before."""
    tool = wait.path.rpartition("/")[0].rpartition("/")[2] or wait.path
    return f"{tool.partition('#')[0]}({shortened(wait.arguments or {}, 80)})"


def answers(blocker: Blocker, options: Options) -> Iterator[str]:
    """The commands that give a waiting run what it waits for."""
    wait, run_id = blocker.wait, blocker.run_id
    if wait.kind in ("approval", "interrupted"):
        yield f"# {describe_wait(wait)}"
        yield f"{options.command('approve', run_id, wait.name)}   (or deny)"
    elif wait.kind in ("signal", "question"):
        yield f"# {describe_wait(wait)}"
        yield options.command("signal", run_id, wait.name, _example(wait.value_schema or {}))
    elif wait.kind == "model":
        yield f"# {describe_wait(wait)}"
        again = f"; it is looked at again {when(wait.until)}" if wait.until else ""
        advice = {
            "quota": f"# Add credit at the provider, or a model of another provider to the route{again}. Then:",
            "budget": "# Raise the budget in the configuration, or wait until it starts anew"
            + (f", {when(wait.until)}" if wait.until else "")
            + ". Then:",
            "configuration": "# Mend that. Then:",
        }
        if wait.name in advice:
            yield advice[wait.name]


def _example(schema: dict[str, Any]) -> str:
    """A value that shows how the JSON of a signal is written."""
    if values := schema.get("enum"):
        return json.dumps(values[0])
    kinds = {"string": '"…"', "boolean": "true", "integer": "1", "number": "1.5", "null": "null", "array": "[]"}
    if schema.get("type") == "object":
        names = schema.get("properties", {})
        return "{" + ", ".join(f'"{name}": {_example(part)}' for name, part in names.items()) + "}"
    return kinds.get(str(schema.get("type")), '"…"')


def summary(run: RunView) -> str:
    """The last line about a run."""
    usage = run.usage
    parts = [counted(len(run.steps or ()), "step"), counted(usage.model_calls, "model call")]
    if usage.model_calls:
        parts += [f"{tokens(usage.input_tokens)} + {tokens(usage.output_tokens)} tokens", cost_of(run)]
    if run.recoveries:
        parts.append(counted(run.recoveries, "recovery", "recoveries"))
    return f"{run.id}: {run.status}; {', '.join(parts)}; {seconds(_elapsed(run))}"


# --- one run --------------------------------------------------------------------------------------------------------


def run_page(run: RunView, options: Options, *, all_steps: bool) -> str:
    """Everything about a run."""
    parts = [_facts(run)]
    if run.steps:
        parts.append(_steps(run.steps, all_steps))
    if run.attempts:
        parts.append("attempts\n" + _attempts(run.attempts, all_steps))
    if run.sandboxes:
        parts.append(
            "sandboxes\n" + table(("CREATED", "SANDBOX", "ID", "RUNTIME", "STATUS", ""), _sandboxes(run.sandboxes))
        )
    if run.egress:
        parts.append("network\n" + _egress(run.egress, all_steps))
    if run.waits:
        parts.append("waits for\n" + "\n".join(f"  {line}" for line in dict.fromkeys(_wait_lines(run, options))))
    if run.result is not None:
        parts.append("result\n" + _block(run.result))
    if run.error is not None:
        parts.append(f"error\n{_block(f'{run.error.type}: {run.error.message}')}")
    return "\n\n".join(parts)


def _facts(run: RunView) -> str:
    status = run.status if run.pause is None else f"{run.status} ({run.pause.reason})"
    facts = {
        "run": run.id,
        "status": status,
        "workflow": f"{run.workflow}, version {run.version}" + (f", from {run.source}" if run.source else ""),
        "input": shortened(run.input, 300),
        "created": when(run.created_at),
        "time": seconds(_elapsed(run)) if run.started_at else "not started",
        "used": summary(run).partition("; ")[2].rpartition("; ")[0],
        "tenant": run.tenant,
        "labels": ", ".join(f"{name}={value}" for name, value in run.labels.items()),
        "worker": run.worker,
        "parent": run.parent,
        "children": ", ".join(run.children[:20]) + (" …" if len(run.children) > 20 else ""),
        "forked from": run.forked_from,
        "waits until": when(run.pause.until) if run.pause and run.pause.until else None,
    }
    return "\n".join(f"{name:<12}{plain(str(value))}" for name, value in facts.items() if value)


def _wait_lines(run: RunView, options: Options) -> Iterator[str]:
    for wait in run.waits:
        lines = list(answers(Blocker(run_id=run.id, wait=wait), options))
        if wait.kind == "model":
            lines[0] = f"# {describe_wait(wait, since=True)}"
            lines += [options.command("resume", run.id)] if len(lines) > 1 else []
        yield from lines or [f"{describe_wait(wait)}, since {when(wait.since)}"]


def _steps(steps: Sequence[StepView], everything: bool) -> str:
    shown = steps if everything else steps[-TIMELINE:]
    rows = [_step_row(step) for step in shown]
    text = table(("STARTED", "STEP", "KIND", "STATUS", "TIME", "TRIES", "TOKENS", "COST", ""), rows)
    if everything:
        head, *lines = text.split("\n")
        text = "\n".join(
            [head, *(part for line, step in zip(lines, shown, strict=True) for part in (line, *_inside(step)))]
        )
    left = len(steps) - len(shown)
    return f"… {left} earlier steps (--steps shows all)\n{text}" if left else text


def _step_row(step: StepView) -> tuple[str, ...]:
    took = seconds((step.ended_at - step.started_at).total_seconds()) if step.ended_at else ""
    used = "" if step.input_tokens is None else f"{tokens(step.input_tokens)}+{tokens(step.output_tokens or 0)}"
    cost = "" if step.cost_usd is None else dollars(step.cost_usd)
    remark = shortened(f"{step.error.type}: {step.error.message}", 80) if step.error else step.model or ""
    tries = str(step.attempts) if step.attempts != 1 else ""
    return when(step.started_at), plain(step.path), step.kind, step.status, took, tries, used, cost, remark


def _inside(step: StepView) -> Iterator[str]:
    if step.input not in (None, "", "[]"):
        yield f"    in   {shortened(step.input, 160)}"
    if step.output is not None:
        yield f"    out  {shortened(step.output, 160)}"


def _attempts(attempts: Sequence[AttemptView], everything: bool) -> str:
    shown = attempts if everything else attempts[-TIMELINE:]
    head = ("STARTED", "STEP", "DEPLOYMENT", "VERDICT", "TIME", "QUEUED", "FIRST TOKEN", "TOKENS/S", "COST", "")
    text = table(head, (_attempt_row(attempt) for attempt in shown))
    left = len(attempts) - len(shown)
    return f"… {left} earlier attempts (--steps shows all)\n{text}" if left else text


def _sandboxes(sandboxes: Sequence[SandboxView]) -> Iterator[tuple[str, ...]]:
    for each in sandboxes:
        yield when(each.created_at), plain(each.key), each.id, each.runtime, each.status, shortened(each.detail, 80)


def _egress(asked: Sequence[EgressView], everything: bool) -> str:
    shown = asked if everything else asked[-TIMELINE:]
    rows = (
        (
            when(each.at),
            each.method,
            plain(f"{each.host}:{each.port}"),
            _verdict(each),
            f"{each.bytes_in}",
            each.sandbox_id,
        )
        for each in shown
    )
    text = table(("AT", "METHOD", "HOST", "VERDICT", "BYTES IN", "SANDBOX"), rows)
    left = len(asked) - len(shown)
    return f"… {left} earlier connections (--steps shows all)\n{text}" if left else text


def _verdict(asked: EgressView) -> str:
    return "allowed" if asked.allowed else shortened(f"refused: {asked.reason}", 80)


def _attempt_row(attempt: AttemptView) -> tuple[str, ...]:
    verdict = f"{attempt.verdict} ({attempt.phase})" if attempt.phase else attempt.verdict
    flags = [name for name, holds in (("hedge", attempt.hedged), ("wasted", attempt.wasted)) if holds]
    return (
        when(attempt.started_at),
        plain(attempt.path),
        plain(attempt.deployment),
        verdict,
        seconds(attempt.seconds),
        seconds(attempt.queue_seconds) if attempt.queue_seconds >= 0.001 else "",
        "" if attempt.first_token_seconds is None else seconds(attempt.first_token_seconds),
        "" if attempt.tokens_per_second is None else f"{attempt.tokens_per_second:.0f}",
        "?" if attempt.cost_usd is None else dollars(attempt.cost_usd),
        "; ".join([*flags, *([shortened(attempt.detail, 80)] if attempt.detail else [])]),
    )


def _block(value: Any) -> str:
    text = value if isinstance(value, str) else _dumped(value, indent=2)
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters; show --json has all)"
    return "\n".join(f"  {line}" for line in plain(text, lines=True).split("\n"))


# --- conversations --------------------------------------------------------------------------------------------------


def messages(run: RunView) -> str:
    """What the models said and the tools answered, in the order in which it was recorded."""
    told = [line for step in run.steps or () for line in _said(step)]
    return "\n" + ("\n".join(told) if told else "No messages yet.")


def _said(step: StepView) -> Iterator[str]:
    if step.kind not in ("model", "tool"):
        return
    who = f"{step.agent or step.name} [{step.path}]" if step.kind == "model" else f"tool {step.name} [{step.path}]"
    text = f"{step.error.type}: {step.error.message}" if step.error else _content(step.output)
    yield f"{plain(who)}\n{_block(text)}"


def _content(output: Any) -> str:
    """The text of a recorded message or tool result, whatever else is in it."""
    if isinstance(output, str):
        return output
    if isinstance(output, dict):
        for key in ("message", "response"):
            if isinstance(output.get(key), dict):
                return _content(output[key])
        told = [*_parts(output.get("content", output.get("text"))), *_parts(output.get("images")), *_wishes(output)]
        if told:
            return "\n".join(told)
    return _dumped(output)


def _parts(content: Any) -> Iterator[str]:
    """Text, and what stands for images."""
    for part in content if isinstance(content, list) else [content] if content else ():
        yield str(part["text"]) if isinstance(part, dict) and part.get("type") == "text" else _dumped(part)


def _wishes(message: dict[str, Any]) -> Iterator[str]:
    for call in message.get("tool_calls") or ():
        if isinstance(call, dict):
            yield f"-> {call.get('name')}({shortened(call.get('arguments'), 200)})"
