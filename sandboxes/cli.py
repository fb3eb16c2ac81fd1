"""Commands on sandboxes.

Only click is imported at the top: a command imports what it needs when it runs, so that ``--help`` costs nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ridethrough.runtime.options import FAILED, OK, Group, Options, put, say

if TYPE_CHECKING:
    from ridethrough.runtime.config import Config
    from ridethrough.runtime.store import Store
    from ridethrough.sandboxes.docker import DockerHost
    from ridethrough.sandboxes.engine import Engine
    from ridethrough.sandboxes.ownership import Lodger

T = TypeVar("T")


@click.group("sandbox", cls=Group)
def sandbox_group() -> None:
    """Images, live sandboxes, and what was left behind."""


# --- images ---------------------------------------------------------------------------------------------------------


@sandbox_group.command("build")
@click.argument("name", metavar="[NAME]", default="python")
@click.option("--base", metavar="IMAGE", help="Another Debian image to build on; debian:bookworm-slim when left out.")
@click.option("--force", is_flag=True, help="Make it anew, with the packages of today.")
@click.pass_obj
def build_command(options: Options, name: str, base: str | None, force: bool) -> int:
    """Make an image for sandboxes: `python` (when NAME is left out) or `desktop`.

    It is left alone when it is there as its recipe wants it. No registry is needed: without one the root comes from
    debootstrap.
    """
    import anyio

    from ridethrough.sandboxes.images import Built, build

    async def body() -> Built:
        return await build(name, say=say, base=base, force=force)

    built = anyio.run(body)
    if options.json:
        put(asdict(built))
    else:
        what = "made" if built.fresh else "is there as its recipe wants it"
        click.echo(f"{built.tag}: {what}, {built.size / 1e6:.0f} MB, {built.seconds:.1f} s")
    return OK


# --- what there is --------------------------------------------------------------------------------------------------


@sandbox_group.command("list")
@click.pass_obj
def list_command(options: Options) -> int:
    """List the sandboxes of this machine's Docker, with their owners."""
    seen = _on_docker(lambda host: _lodgers(options, host))
    if options.json:
        put([lodger.as_json() for lodger in seen])
    elif not seen:
        say("There are no sandboxes.")
    else:
        click.echo(_table(seen))
    return OK


def _table(seen: Sequence[Lodger]) -> str:
    import time

    from ridethrough.runtime.printing import plain, seconds, table

    now = time.time()
    return table(
        ("SANDBOX", "PROFILE", "RUN", "STATE", "AGE", "RUNTIME", "OWNER", "REMARK"),
        (
            [
                plain(cell or "-")
                for cell in (
                    *(lodger.id, lodger.profile, lodger.run_id, lodger.state),
                    *(seconds(max(0.0, now - lodger.created_at)), lodger.runtime, lodger.owner, lodger.why),
                )
            ]
            for lodger in seen
        ),
    )


@sandbox_group.command("prune")
@click.option("--all", "everything", is_flag=True, help="Every sandbox of this machine's Docker, whosever it is.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def prune_command(options: Options, everything: bool, yes: bool) -> int:
    """Remove the sandboxes that nobody owns; workers do the same by themselves.

    Those of other databases and programs are left, and those whose runs may still be taken up: the worker that does so
    goes on with them. With --all they go too, and what is in them is lost.
    """

    seen = _on_docker(lambda host: _lodgers(options, host))
    doomed = [lodger for lodger in seen if everything or lodger.claim == "ownerless"]
    if everything and not yes and doomed:
        click.confirm(_warning(doomed), abort=True, err=True)
    failed = _on_docker(lambda host: _remove(options, host, doomed)) if doomed else []
    if options.json:
        lost = {lodger.id: why for lodger, why in failed}
        put({"removed": [each.id for each in doomed if each.id not in lost], "failed": lost})
    else:
        _tell_pruned(doomed, failed)
    return FAILED if failed else OK


def _warning(doomed: Sequence[Lodger]) -> str:
    used = sum(lodger.claim in ("owned", "recoverable", "foreign") for lodger in doomed)
    return f"Remove {len(doomed)} sandboxes, {used} of which are in use? What is in them is lost"


def _tell_pruned(doomed: Sequence[Lodger], failed: Sequence[tuple[Lodger, str]]) -> None:
    lost = {lodger.id for lodger, _ in failed}
    for lodger in doomed:
        if lodger.id not in lost:
            click.echo(f"removed {lodger.id}: {lodger.why}")
    for lodger, why in failed:
        say(f"{lodger.id} cannot be removed: {why}")
    if not doomed:
        say("Nothing to remove: every sandbox has an owner.")


async def _remove(options: Options, host: DockerHost, doomed: Iterable[Lodger]) -> list[tuple[Lodger, str]]:
    """Remove them from the host, then from the record; those that could not be, with the reason."""
    from ridethrough.runtime.errors import SandboxError

    failed: list[tuple[Lodger, str]] = []
    gone: list[str] = []
    for lodger in doomed:
        try:
            await host.remove(lodger.id)
            gone.append(lodger.id)
        except SandboxError as error:
            failed.append((lodger, error.message))
    _forget(options, gone)
    return failed


def _forget(options: Options, ids: Sequence[str]) -> None:
    with _store(options) as store:
        if store is not None and ids:
            with store.writer.begin() as connection:
                for sandbox_id in ids:
                    store.forget_sandbox(connection, sandbox_id, "pruned")


async def _lodgers(options: Options, host: DockerHost) -> list[Lodger]:
    """What the host has, beside what the database knows of it; without a database only the former."""
    import time

    from ridethrough.runtime.control import is_over
    from ridethrough.sandboxes.ownership import lodgers, store_id

    found = await host.found()
    now = time.time()
    with _store(options) as store:
        rows: Sequence[Any] = () if store is None else store.read_now(store.sandboxes)
        query = () if store is None else store.read_now(lambda at: store.ownerless_sandboxes(at, host.name, now))
        ended = [row.id for row in query if row.run_id is not None and is_over(row.run_status, row.run_error)]
        mine = "" if store is None else store_id(store.database.path)
    seen = list(lodgers(found, rows, host=host.name, store_id=mine, ended=ended, now=now))
    return sorted(seen, key=lambda lodger: lodger.created_at)


@contextlib.contextmanager
def _store(options: Options) -> Generator[Store | None]:
    """The database, ``None`` where there is none: sandboxes are looked at without one too."""
    from ridethrough.runtime.errors import NotFound

    try:
        store = options.store()
    except NotFound:
        yield None
        return
    try:
        yield store
    finally:
        store.close()


def _on_docker(body: Callable[[DockerHost], Awaitable[T]]) -> T:
    """Do something with this machine's Docker."""
    import anyio

    from ridethrough.sandboxes.docker import DockerHost

    async def opened() -> T:
        async with DockerHost.open() as host:
            return await body(host)

    return anyio.run(opened)


# --- a shell in a run's sandbox -------------------------------------------------------------------------------------


@sandbox_group.command("shell")
@click.argument("run_id", metavar="RUN_ID")
@click.option("--profile", metavar="NAME", help="Which of the run's sandboxes, where it has several.")
@click.pass_obj
def shell_command(options: Options, run_id: str, profile: str | None) -> int:
    """Open a shell in a run's sandbox.

    On a terminal it is an interactive one; else it reads commands from standard input. Its status is the shell's.
    """

    async def body(host: DockerHost) -> int:
        chosen = _choose(run_id, await _lodgers(options, host), profile)
        say(f"{chosen.id} of run {run_id} (profile {chosen.profile}, {chosen.runtime}); `exit` leaves it")
        return await _shell(options, chosen)

    return _on_docker(body)


async def _shell(options: Options, chosen: Lodger) -> int:
    from ridethrough.sandboxes.container import container_name
    from ridethrough.sandboxes.engine import Engine
    from ridethrough.sandboxes.terminal import shell

    name = container_name(chosen.id)
    async with Engine.open() as engine:
        async with _awake(options, engine, chosen, name):
            return await shell(engine, name, terminal=sys.stdin.isatty())


@contextlib.asynccontextmanager
async def _awake(options: Options, engine: Engine, chosen: Lodger, name: str) -> AsyncGenerator[None]:
    """Let a frozen one go on for the time being: its run waits, and is not touched by that."""
    import anyio

    if chosen.state != "paused":
        yield
        return
    await engine.unpause(name)
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            if _still_paused(options, chosen.id):
                await engine.pause(name)


def _still_paused(options: Options, sandbox_id: str) -> bool:
    with _store(options) as store:
        row = None if store is None else store.read_now(lambda at: store.sandbox(at, sandbox_id))
    return row is not None and row.status == "paused"


def _choose(run_id: str, seen: Iterable[Lodger], profile: str | None) -> Lodger:
    """The one sandbox that is meant.

    Raises:
        NotFound: the run has none now, or several.
    """
    from ridethrough.runtime.errors import NotFound

    mine = [each for each in seen if each.run_id == run_id and profile in (None, each.profile)]
    alive = [each for each in mine if each.state in ("running", "paused")]
    if not alive:
        raise NotFound(_none(run_id, mine))
    if len(alive) > 1 and len({each.profile for each in alive}) > 1:
        names = ", ".join(sorted({each.profile for each in alive}))
        raise NotFound(f"Run {run_id} has sandboxes of several profiles ({names}): say which with --profile")
    return max(alive, key=lambda each: each.created_at)


def _none(run_id: str, mine: Sequence[Lodger]) -> str:
    if mine:
        return f"The sandbox of run {run_id} has ended ({mine[0].why})."
    return (
        f"Run {run_id} has no sandbox on this machine now: it has not needed one yet, has ended, or waits and its "
        f"workspace was archived; it gets it back when it goes on. `ridethrough sandbox list` shows what there is."
    )


# --- the doctor -----------------------------------------------------------------------------------------------------


def examine(config: Config) -> Iterable[tuple[str, Any, str, str]]:
    """What the doctor finds out about sandboxes."""
    from ridethrough.sandboxes.doctor import examine

    return examine(config)


EXAMINERS = (examine,)
"""What the folder ``sandboxes`` has the doctor look at."""

COMMANDS: tuple[click.Command, ...] = (sandbox_group,)
"""What the folder ``sandboxes`` brings to the command line."""
