"""Commands on runs and on the database they lie in.

Only click is imported at the top: a command imports what it needs when it runs, so that ``--help`` costs nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ridethrough.runtime.drill.cli import drill_command
from ridethrough.runtime.models_cli import models_group
from ridethrough.runtime.options import FAILED, OK, Command, Group, Options, parse_json, put, say

if TYPE_CHECKING:
    from ridethrough.runtime.config import WireName
    from ridethrough.runtime.doctor import Examiner
    from ridethrough.runtime.runtime import Runtime

T = TypeVar("T")


def _changed(options: Options, change: Callable[[Runtime], Awaitable[T]], must_exist: bool = True) -> T:
    """Change something in the database without executing any run."""
    import anyio

    from ridethrough.runtime.runtime import Runtime

    if must_exist:
        options.store().close()

    async def body() -> T:
        config = options.load()
        async with Runtime.open(config.database, config=config, serve=False) as runtime:
            return await change(runtime)

    return anyio.run(body)


def _report(options: Options, run_id: str, text: str) -> None:
    """After a change: the run as it is now, or what happened in words."""
    from ridethrough.runtime import views

    if options.json:
        store = options.store()
        put(store.read_now(lambda connection: views.show_run(store, connection, run_id, steps=True)).as_json())
        store.close()
    else:
        click.echo(text)


# --- running --------------------------------------------------------------------------------------------------------


allow_local_option = click.option(
    "--allow-local",
    is_flag=True,
    help="Where there is no Docker, run what a model wrote on this machine: no boundary.",
)


@click.command("run", cls=Command)
@click.argument("target", metavar="MODULE:WORKFLOW")
@click.option(
    "--input", "text", metavar="JSON|@FILE", help="An object gives keyword arguments, else the single argument."
)
@click.option("--id", "run_id", metavar="ID", help="The run's id; an unfinished run of that id is taken up.")
@click.option("--tenant", metavar="T", help="Whose run it is.")
@click.option("--priority", type=int, metavar="P", help="Runs of a higher one are taken first; 0 when left out.")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="To find the run by; may be repeated.")
@click.option("--detach", is_flag=True, help="Only put it into the database; a worker or `resume` executes it.")
@click.option("--no-wait", is_flag=True, help="End with status 3 as soon as the run is parked.")
@allow_local_option
@click.pass_obj
def run_command(
    options: Options,
    target: str,
    text: str | None,
    run_id: str | None,
    tenant: str | None,
    priority: int | None,
    labels: Sequence[str],
    detach: bool,
    no_wait: bool,
    allow_local: bool,
) -> int:
    """Start a workflow (or an agent) and follow it to its end.

    MODULE is a dotted name or a file's path. The result goes to standard output, progress to standard error. With
    --json standard output gets one event a line and at last what `show --json` prints.
    """
    from ridethrough.runtime.follow import Start, foreground

    start = Start(target, tenant=tenant, priority=priority, labels=_labels(labels), run_id=run_id)
    start.load()
    if text is not None:
        start.give(parse_json(text, "--input"))
    if detach:
        _changed(options, start.put, must_exist=False)
        go_on = options.command("resume", start.id)
        _report(options, start.id, f"{start.id} is queued. Execute it here: {go_on}")
        return OK
    return foreground(options, start, wait=not no_wait, allow_local=allow_local)


def _labels(pairs: Sequence[str]) -> dict[str, str] | None:
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{pair!r}: write NAME=VALUE", param_hint="--label")
        found[name] = value
    return found or None


@click.command("resume", cls=Command)
@click.argument("run_ids", nargs=-1, metavar="[RUN_ID]...")
@click.option("--all", "everything", is_flag=True, help="Every unfinished run that nobody executes.")
@click.option("--no-wait", is_flag=True, help="End with status 3 as soon as all runs are parked.")
@allow_local_option
@click.pass_obj
def resume_command(options: Options, run_ids: Sequence[str], everything: bool, no_wait: bool, allow_local: bool) -> int:
    """Take up runs that crashed, are paused or queued, and follow them to their end.

    Without an id it takes up the one unfinished run, if there is just one. The result goes to standard output, those
    of several runs with their ids in front.
    """
    from ridethrough.runtime.follow import TakeUp, foreground

    if everything and run_ids:
        raise click.UsageError("Give run ids or --all, not both.")
    ids = list(dict.fromkeys(run_ids)) or _unfinished(options, everything)
    if not ids:
        say("Nothing to resume: every run has ended, or is being executed by a live process.")
        return OK
    plan = TakeUp(ids, several=everything or len(ids) > 1)
    return foreground(options, plan, wait=not no_wait, allow_local=allow_local)


def _unfinished(options: Options, everything: bool) -> list[str]:
    from ridethrough.runtime import views

    store = options.store()
    ids = list(store.read_now(lambda connection: views.unfinished(store, connection)))
    store.close()
    if len(ids) > 1 and not everything:
        shown = "".join(f"\n  {options.command('resume', run_id)}" for run_id in ids[:10])
        more = f"\n  … and {len(ids) - 10} more (ridethrough runs)" if len(ids) > 10 else ""
        raise click.UsageError(f"{len(ids)} runs are unfinished. Say which, or --all:{shown}{more}")
    return ids


# --- looking --------------------------------------------------------------------------------------------------------

STATUSES = ("queued", "running", "paused", "waiting", "done", "failed", "cancelled")


@click.command("runs", cls=Command)
@click.option("--status", type=click.Choice(STATUSES), help="Only runs of this status.")
@click.option("--workflow", metavar="W", help="Only runs of this workflow.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, metavar="N", help="At most so many.")
@click.pass_obj
def runs_command(options: Options, status: str | None, workflow: str | None, limit: int) -> int:
    """List runs, newest first."""
    from ridethrough.runtime import printing, views

    store = options.store()
    runs = store.read_now(
        lambda connection: views.list_runs(store, connection, status=status, workflow=workflow, limit=limit)
    )
    store.close()
    if options.json:
        put([run.as_json() for run in runs])
    elif not runs:
        say(f"No such runs in {store.database.display}.")
    else:
        click.echo(printing.runs_table(runs))
    return OK


@click.command("show", cls=Command)
@click.argument("run_id", metavar="RUN_ID")
@click.option("--steps", is_flag=True, help="Every step with its input and output.")
@click.option("--messages", is_flag=True, help="The conversation with the models.")
@click.pass_obj
def show_command(options: Options, run_id: str, steps: bool, messages: bool) -> int:
    """Show one run: what it was given, what it did, what it waits for, how it ended."""
    from ridethrough.runtime import printing, views

    store = options.store()
    run = store.read_now(lambda connection: views.show_run(store, connection, run_id, steps=True))
    store.close()
    if options.json:
        put(run.as_json())
        return OK
    click.echo(printing.run_page(run, options, all_steps=steps))
    if messages:
        click.echo(printing.messages(run))
    return OK


@click.command("events", cls=Command)
@click.argument("run_id", metavar="RUN_ID")
@click.option("--follow", is_flag=True, help="Go on until the run has ended.")
@click.option("--after", type=click.IntRange(0), default=0, metavar="N", help="Only those after this position (`seq`).")
@click.pass_obj
def events_command(options: Options, run_id: str, follow: bool, after: int) -> int:
    """Print a run's events, with --json one object a line."""
    from ridethrough.runtime.display import event_line

    async def body(runtime: Runtime) -> None:
        await runtime.describe(run_id, steps=False)
        async for event in runtime.events(run_id, after=after, follow=follow):
            if options.json:
                click.echo(event.model_dump_json())
            elif line := event_line(event):
                click.echo(f"{event.seq:>5}  {line}")

    _changed(options, body)
    return OK


# --- control --------------------------------------------------------------------------------------------------------


@click.command("cancel", cls=Command)
@click.argument("run_id", metavar="RUN_ID")
@click.pass_obj
def cancel_command(options: Options, run_id: str) -> int:
    """Cancel a run and its child runs."""
    status = _changed(options, lambda runtime: runtime.cancel(run_id))
    said = {
        "running": f"Run {run_id}: the process that executes it was asked to cancel it.",
        "cancelled": f"Run {run_id} is cancelled.",
    }
    _report(options, run_id, said.get(status, f"Run {run_id} had ended already ({status})."))
    return OK


@click.command("pause", cls=Command)
@click.argument("run_id", metavar="RUN_ID")
@click.pass_obj
def pause_command(options: Options, run_id: str) -> int:
    """Pause a run until `resume`; running steps finish first."""
    status = _changed(options, lambda runtime: runtime.pause(run_id))
    what = "is paused" if status == "paused" else "will be paused when its running steps have finished"
    _report(options, run_id, f"Run {run_id} {what}. Go on with: {options.command('resume', run_id)}")
    return OK


@click.command("fork", cls=Command)
@click.argument("run_id", metavar="RUN_ID")
@click.option("--at", "step", required=True, metavar="STEP", help="The first step to do anew, by its path in `show`.")
@click.option("--id", "new_id", metavar="ID", help="The new run's id.")
@click.pass_obj
def fork_command(options: Options, run_id: str, step: str, new_id: str | None) -> int:
    """Make a new run that keeps the steps before STEP and goes on from there with the code of now."""

    async def fork(runtime: Runtime) -> str:
        return (await runtime.fork(run_id, step, id=new_id)).id

    made = _changed(options, fork)
    _report(
        options, made, f"{made} is queued, with the steps before {step}. Go on with: {options.command('resume', made)}"
    )
    return OK


@click.command("signal", cls=Command)
@click.argument("run_id", metavar="RUN_ID")
@click.argument("name", metavar="NAME")
@click.argument("value", metavar="JSON")
@click.pass_obj
def signal_command(options: Options, run_id: str, name: str, value: str) -> int:
    """Send a run the input that it waits for (or will wait for); JSON may be @FILE."""
    data = parse_json(value, "JSON")
    _changed(options, lambda runtime: runtime.signal(run_id, name, data))
    _report(options, run_id, f"Sent {name} to {run_id}. {_who_goes_on(options, run_id)}")
    return OK


@click.command("approve", cls=Command)
@click.argument("run_id", metavar="RUN_ID")
@click.argument("call_id", metavar="CALL_ID")
@click.option("--note", metavar="TEXT", help="Kept with the decision.")
@click.pass_obj
def approve_command(options: Options, run_id: str, call_id: str, note: str | None) -> int:
    """Let a tool call that waits for approval run."""
    _changed(options, lambda runtime: runtime.approve(run_id, call_id, note))
    _report(options, run_id, f"Approved {call_id}. {_who_goes_on(options, run_id)}")
    return OK


@click.command("deny", cls=Command)
@click.argument("run_id", metavar="RUN_ID")
@click.argument("call_id", metavar="CALL_ID")
@click.option("--note", metavar="TEXT", help="The model is told.")
@click.pass_obj
def deny_command(options: Options, run_id: str, call_id: str, note: str | None) -> int:
    """Refuse a tool call that waits for approval; the model is told, with the note."""
    _changed(options, lambda runtime: runtime.deny(run_id, call_id, note))
    _report(options, run_id, f"Denied {call_id}. {_who_goes_on(options, run_id)}")
    return OK


def _who_goes_on(options: Options, run_id: str) -> str:
    from ridethrough.runtime import views

    store = options.store()
    run = store.read_now(lambda connection: views.show_run(store, connection, run_id, steps=False))
    store.close()
    if run.worker is not None:
        return f"It goes on in {run.worker}."
    return f"A process that serves this workflow goes on with it, or: {options.command('resume', run_id)}"


# --- the house ------------------------------------------------------------------------------------------------------


@click.command("init", cls=Command)
@click.argument("folder", metavar="[DIR]", default=".", type=click.Path(file_okay=False))
@click.pass_obj
def init_command(options: Options, folder: str) -> int:
    """Write a small project that runs at once, with a simulated model."""
    from ridethrough.runtime import scaffold

    made = scaffold.write(Path(folder))
    if options.json:
        put({"folder": folder, "files": made})
    else:
        click.echo(scaffold.next_steps(folder, made))
    return OK


EXAMINERS: list[Examiner] = []
"""What ``doctor`` has looked at by other folders, which this one does not import: the command line adds them."""


@click.command("doctor", cls=Command)
@click.option("--offline", is_flag=True, help="Do not ask the providers.")
@click.pass_obj
def doctor_command(options: Options, offline: bool) -> int:
    """Check everything that the configuration needs, and say how to mend it."""
    from ridethrough.runtime import doctor

    findings = doctor.examine(options, offline=offline, others=EXAMINERS)
    healthy = all(finding.status != "wrong" for finding in findings)
    if options.json:
        put({"ok": healthy, "checks": [finding.as_json() for finding in findings]})
    else:
        click.echo("\n".join(finding.line() for finding in findings))
    return OK if healthy else FAILED


WIRES = ("openai", "openai-responses", "anthropic", "gemini")


@click.command("simulate", cls=Command)
@click.option(
    "--wire",
    type=click.Choice(WIRES),
    default="openai",
    show_default=True,
    help="Whose URL is told; it speaks all.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where it listens.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="0 (when left out) takes a free one.")
@click.option("--scenario", metavar="FILE", help="A shipped one, TOML, JSON, a Python file, MODULE:ATTRIBUTE.")
@click.option("--name", metavar="NAME", help="The deployment that it is: faults for others are left out.")
@click.option("--position", type=click.IntRange(1), metavar="N", help="Its place in the scenario's list, from 1.")
@click.option("--ledger", metavar="FILE", help="Gets a JSON line when a request starts and one when it ends.")
@click.pass_obj
def simulate_command(
    options: Options,
    wire: WireName,
    host: str,
    port: int,
    scenario: str | None,
    name: str | None,
    position: int | None,
    ledger: str | None,
) -> int:
    """Serve a simulated provider until interrupted, for drills and tests."""
    import anyio

    from ridethrough.runtime.router.providers.simulated import SimulatedProvider, run_simulator

    def ready(provider: SimulatedProvider) -> None:
        if options.json:
            told = {"base_url": provider.base_url, "wire": wire, "models": list(provider.script.models)}
            put({**told, "name": name, "position": position})
        else:
            click.echo(_snippet(provider.base_url, wire, provider.script.models[0]))
        sys.stdout.flush()

    given: dict[str, Any] = {"host": host, "port": port, "scenario": scenario, "ledger": ledger, "wire": wire}
    serve = partial(run_simulator, **given, name=name, position=position, on_ready=ready)
    anyio.run(_until_signal, serve)
    return OK


def _snippet(base_url: str, wire: WireName, model: str) -> str:
    return f"""Simulated provider at {base_url} (Ctrl-C ends it). For ridethrough.toml:

[providers.drill]
kind = "{wire}"
base_url = "{base_url}"

[models.drill]
provider = "drill"
model = "{model}"
price = {{ input = 0.0, output = 0.0 }}

[routes.smart]
models = ["drill"]
"""


async def _until_signal(serve: Callable[[], Awaitable[None]]) -> None:
    """Serve until SIGINT or SIGTERM, which are the way to end a server and no failure."""
    import signal

    import anyio

    async def serving() -> None:
        await serve()

    async with anyio.create_task_group() as tasks:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            tasks.start_soon(serving)
            async for _ in signals:
                tasks.cancel_scope.cancel()
                return


@click.group("db", cls=Group)
def db_group() -> None:
    """Look after the database: schema, retention, integrity."""


@db_group.command("upgrade")
@click.pass_obj
def upgrade_command(options: Options) -> int:
    """Bring the database's tables to this version; stop all workers first."""
    from ridethrough.runtime.store import Store
    from ridethrough.runtime.upgrade import upgrade

    config = options.load()
    store = Store(options.database(config), config.durability)
    before, after = upgrade(store)
    store.close()
    if options.json:
        put({"database": store.database.display, "before": before, "after": after})
    elif before == after:
        click.echo(f"{store.database.display}: its schema is {after} already; nothing to do.")
    else:
        click.echo(f"{store.database.display}: schema {before or '(new)'} -> {after}.")
    return OK


@db_group.command("gc")
@click.option("--older-than", required=True, metavar="AGE", help="For example 30d, 12h: counted from a run's end.")
@click.pass_obj
def gc_command(options: Options, older_than: str) -> int:
    """Delete ended runs that are older than AGE, and give their space back."""
    from ridethrough.runtime.housekeeping import collect

    seconds = _age(older_than)
    store = options.store()
    freed = collect(store, seconds)
    store.close()
    if options.json:
        put(freed.as_json())
    else:
        click.echo(f"{store.database.display}: {freed}")
    return OK


def _age(text: str) -> float:
    from ridethrough.runtime.config import parse_duration

    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--older-than") from None
    assert isinstance(seconds, float)
    return seconds


@db_group.command("check")
@click.pass_obj
def check_command(options: Options) -> int:
    """Check the file and what its tables say of each other; status 1 if something is wrong."""
    from ridethrough.runtime.housekeeping import inspect_store

    store = options.store()
    problems = inspect_store(store)
    store.close()
    if options.json:
        put({"database": store.database.display, "ok": not problems, "problems": problems})
    elif problems:
        click.echo("\n".join(f"{store.database.display}: {problem}" for problem in problems))
        say("Stop all workers and restore a backup, or copy what can be read: sqlite3 OLD .recover | sqlite3 NEW")
    else:
        click.echo(f"{store.database.display}: sound.")
    return FAILED if problems else OK


COMMANDS: tuple[click.Command, ...] = (
    init_command,
    run_command,
    resume_command,
    runs_command,
    show_command,
    events_command,
    cancel_command,
    pause_command,
    fork_command,
    signal_command,
    approve_command,
    deny_command,
    models_group,
    simulate_command,
    drill_command,
    doctor_command,
    db_group,
)
"""What the folder ``runtime`` brings to the command line."""
