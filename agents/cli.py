"""Commands on agents.

Only click is imported at the top: a command imports what it needs when it runs, so that ``--help`` costs nothing.
"""

from __future__ import annotations

from pathlib import Path

import click

from ridethrough.runtime.options import FAILED, OK, Command, Options, put, say


@click.command("demo", cls=Command)
@click.option(
    "--dir",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".ridethrough-demo"),
    show_default=True,
    help="Where its files go.",
)
@click.pass_obj
def demo(options: Options, folder: Path) -> int:
    """Run a team of agents, let a provider fail, kill the process, resume, and say what was saved.

    The models are simulated, over real HTTP on this machine: it needs no key. The processes, the kill and the numbers
    are real. Status 1 if anything is not as it should be.
    """
    from ridethrough.agents.demo.performance import give

    if options.config is not None:
        say("note: the demonstration brings its own configuration; --config is not used")
    database = options.database(options.load()) if options.db is not None else None
    account = give(folder, database, json=options.json)
    if options.json:
        put(account.as_json())
    return OK if account.ok else FAILED


COMMANDS: tuple[click.Command, ...] = (demo,)
"""What the folder ``agents`` brings to the command line."""
