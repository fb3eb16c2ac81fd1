"""The command `drill`. Only click is imported at the top, so that ``--help`` costs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ridethrough.runtime.options import FAILED, INTERRUPTED, OK, Command, Options, parse_json, put, say

if TYPE_CHECKING:
    from ridethrough.runtime.drill.perform import Order


@click.command("drill", cls=Command)
@click.argument("target", metavar="MODULE:WORKFLOW", required=False)
@click.option("--scenario", "scenario_name", metavar="FILE", help="A TOML or JSON file, or the name of a shipped one.")
@click.option("--list", "listing", is_flag=True, help="List the shipped scenarios.")
@click.option(
    "--input", "text", metavar="JSON|@FILE", help="An object gives keyword arguments, else the single argument."
)
@click.option(
    "--runs", type=click.IntRange(1), metavar="N", help="8 when left out; more, where short ones end too soon."
)
@click.option("--concurrency", type=click.IntRange(1), metavar="N", help="At a time; enough to last when left out.")
@click.option("--no-baseline", is_flag=True, help="Do not measure first what is normal.")
@click.option("--script", metavar="FILE", help="What the models say; else the scenario's or the configuration's.")
@click.option("--limit", metavar="TIME", default="120s", show_default=True, help="Then it is over in any case.")
@click.option(
    "--dir",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".ridethrough-drill"),
    show_default=True,
    help="Where its files go.",
)
@click.pass_obj
def drill_command(
    options: Options,
    target: str | None,
    scenario_name: str | None,
    listing: bool,
    text: str | None,
    runs: int | None,
    concurrency: int | None,
    no_baseline: bool,
    script: str | None,
    limit: str,
    folder: Path,
) -> int:
    """Run a real workflow against a schedule of faults and kills, and report what that did to it.

    Simulated servers stand in for every provider of the configuration; no real one is called. It says what was lost,
    repeated, wasted, delayed and spent. Status 1 if an expectation of the scenario does not hold, or, where it has
    none, if anything was lost or repeated.
    """
    if listing:
        return _list(options)
    if target is None or scenario_name is None:
        raise click.UsageError(
            "Give MODULE:WORKFLOW and --scenario; `ridethrough drill --list` shows the shipped ones."
        )
    from ridethrough.runtime.drill.perform import Order
    from ridethrough.runtime.router.providers.simulated import load_scenario, load_script

    if options.db is not None:
        say("note: a drill has a database of its own; --db is not used")
    return _perform(
        options,
        Order(
            target,
            load_scenario(scenario_name),
            options.load(),
            folder,
            runs,
            concurrency,
            None if text is None else parse_json(text, "--input"),
            text is not None,
            not no_baseline,
            _seconds(limit),
            None if script is None else load_script(script),
        ),
    )


def _perform(options: Options, order: Order) -> int:
    from ridethrough.runtime.drill.perform import DrillFailed, Interrupted, perform
    from ridethrough.runtime.drill.tell import teller

    telling = teller(json=options.json)
    try:
        report = perform(order, telling)
    except Interrupted as error:
        say(error.message)
        return INTERRUPTED
    except DrillFailed as error:
        if options.json:
            put({"ok": False, "scenario": order.scenario.name, "workflow": order.target, "trouble": [error.message]})
        say(f"error: {error.message}")
        return FAILED
    finally:
        telling.close()
    if options.json:
        put(report.as_json())
    return OK if report.ok else FAILED


def _seconds(text: str) -> float:
    from ridethrough.runtime.config import parse_duration

    try:
        seconds: Any = float(text) if text.replace(".", "", 1).isdigit() else parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--limit") from None
    if seconds <= 0:
        raise click.BadParameter("it has to be more than 0", param_hint="--limit")
    return float(seconds)


def _list(options: Options) -> int:
    from ridethrough.runtime.printing import table
    from ridethrough.runtime.router.providers.simulated import load_scenario, shipped_scenarios

    found = [load_scenario(name) for name in shipped_scenarios()]
    if options.json:
        put([{"name": each.name, "description": each.description, "expect": _expected(each)} for each in found])
    else:
        click.echo(table(("SCENARIO", ""), [(each.name, each.description) for each in found]))
    return OK


def _expected(scenario: Any) -> dict[str, str]:
    return {each.measure: each.text for each in scenario.expect}


COMMANDS: tuple[click.Command, ...] = (drill_command,)
"""Joined into those of ``runtime/cli.py``."""
