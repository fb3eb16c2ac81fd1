"""The command ``ridethrough``: joins the parts that the folders bring, and turns errors into one line and a status.

Only click is imported here and in the parts; everything else comes with the command that needs it, so that
``ridethrough --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import click

from ridethrough import __version__
from ridethrough.agents import cli as agents_part
from ridethrough.runtime import cli as runtime_part
from ridethrough.runtime.options import FAILED, INTERRUPTED, OK, PARKED, USAGE, Group
from ridethrough.sandboxes import cli as sandboxes_part

BROKEN_PIPE = 141
"""What a shell shows for a program that SIGPIPE ended; whoever closed the pipe did not want to read on."""

PARTS = (runtime_part, agents_part, sandboxes_part)
"""Each part has a tuple ``COMMANDS``; a command that needs a part's code imports it when it runs."""

HELP = """A runtime for agents whose work must survive.

Runs are kept in a database (ridethrough.db, or what ridethrough.toml, --db or --config says): kill the process
wherever you like, `ridethrough resume` goes on from the last finished step.

Exit status: 0 success; 1 the run failed; 2 bad usage or configuration; 3 the run is parked and nothing is lost;
130 interrupted, the state is saved.
"""


@click.group("ridethrough", cls=Group, help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ridethrough")
def cli() -> None:
    """Carry the options that all commands share; see ``Group``."""


for part in PARTS:
    for command in part.COMMANDS:
        cli.add_command(command)

runtime_part.EXAMINERS += sandboxes_part.EXAMINERS


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    try:
        status = cli.main(args=arguments, prog_name="ridethrough", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        _show_usage(error)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _forget_output()
        return BROKEN_PIPE
    except Exception as error:
        return _explain(error)
    return status if isinstance(status, int) else OK


def _show_usage(error: click.ClickException) -> None:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is not None:
        click.echo(f"{context.get_usage()}\nTry '{context.command_path} --help'.", err=True)
    click.echo(f"error: {error.format_message()}", err=True)


def _forget_output() -> None:
    """Nobody reads any more: keep the interpreter from complaining about it when it flushes at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: Exception) -> int:
    """One line for an error that has an explanation; anything else is a bug and keeps its traceback."""
    from ridethrough.runtime.errors import Error

    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, BrokenPipeError):
        _forget_output()
        return BROKEN_PIPE
    if not isinstance(error, Error):
        raise error
    click.echo(f"error: {error}", err=True)
    return exit_status(error)


def exit_status(error: Exception) -> int:
    """The exit status that the contract gives an error."""
    from ridethrough.runtime import errors

    wrong_use = (
        errors.ConfigError,
        errors.UsageError,
        errors.NotFound,
        errors.RunConflict,
        errors.SerializationError,
        errors.StoreVersionError,
    )
    if isinstance(error, errors.RunBusy):
        return PARKED
    return USAGE if isinstance(error, wrong_use) else FAILED


def _leave(status: int) -> None:
    """End the process although a thread of a step may hang: what it was doing is repeated or decided on resume."""
    deadline = time.monotonic() + 0.5
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                _flush()
                os._exit(status)
    sys.exit(status)


def _flush() -> None:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    _leave(run())


if __name__ == "__main__":
    main()
