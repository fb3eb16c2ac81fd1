"""The reference pages name everything that there is, and nothing that there is not."""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import get_args

import click
import pytest
from pydantic import BaseModel
from tests.docs.blocks import ROOT

import ridethrough
from ridethrough.cli import cli
from ridethrough.runtime import config, errors, events, views
from ridethrough.runtime.cli import STATUSES
from ridethrough.runtime.router.providers.dialects import DIALECTS
from ridethrough.runtime.router.providers.simulated import MEASURES, Fault, ToolFault, shipped_scenarios
from ridethrough.runtime.router.providers.simulated.faults import Kind
from ridethrough.runtime.router.providers.simulated.scenario import Kill
from ridethrough.runtime.testpoints import POINTS, SANDBOX_POINTS

REFERENCE = ROOT / "docs" / "reference"
COMMON = {"--config", "--db", "--json"}


def page(name: str) -> str:
    """The text of a page of the reference."""
    return (REFERENCE / name).read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """What stands below a heading of the second level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found is not None, f"there is no section {title}"
    return found[1]


# --- the command line -----------------------------------------------------------------------------------------------


def commands(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command with its whole name."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{before}{name} ")
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield f"{before}{name}", command


COMMANDS = dict(commands(cli))


def options(command: click.Command) -> set[str]:
    """The long names of its options, without those that all commands have."""
    named = [param.opts[-1] for param in command.params if isinstance(param, click.Option)]
    return set(named) - COMMON - {"--help"}


def test_every_command_has_a_section_and_no_other_has() -> None:
    titles = re.findall(r"^## (.+)$", page("command-line.md"), re.M)
    assert sorted(titles) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_described(name: str) -> None:
    described = re.findall(r"^\| `(--[a-z-]+)", section(page("command-line.md"), name), re.M)
    assert sorted(described) == sorted(options(COMMANDS[name]))


def test_the_common_options_are_described() -> None:
    head = page("command-line.md").partition("\n## ")[0]
    assert set(re.findall(r"`(--[a-z]+)", head)) >= COMMON


def test_the_statuses_of_a_run_are_those_of_the_picture() -> None:
    diagram = (ROOT / "docs/concepts/runs.md").read_text().partition("```mermaid\n")[2].partition("```")[0]
    named = set(re.findall(r"^ +(\S+) --> (\S+?):?(?: .*)?$", diagram, re.M))
    assert {name for pair in named for name in pair} - {"[*]"} == set(STATUSES)


# --- configuration --------------------------------------------------------------------------------------------------

TABLES: dict[str, type[BaseModel]] = {
    "Top level": config.Config,
    "`[providers.NAME]`": config.Provider,
    "`[models.NAME]`": config.Model,
    "`[routes.NAME]`": config.Route,
    "`[[budgets]]`": config.Budget,
    "`[sandboxes.NAME]`": config.SandboxConfig,
    "`[[errors]]`": config.ErrorRule,
}
NESTED = {"path", "providers", "models", "routes", "budgets", "errors", "sandboxes"}


@pytest.mark.parametrize("title", TABLES)
def test_every_key_is_described_or_among_those_that_are_refused(title: str) -> None:
    text = page("configuration.md")
    described = set(re.findall(r"^\| `([a-z_]+)`", section(text, title), re.M))
    refused = set(re.findall(r"`\[*([a-z_]+)", section(text, "Not in this release")))
    keys = set(TABLES[title].model_fields) - (NESTED if title == "Top level" else set())
    assert keys - described - refused == set()
    assert described - keys == set()


@pytest.mark.parametrize("table", [config.Timeouts, config.Price, config.RateLimits])
def test_every_key_of_an_inner_table_is_named(table: type[BaseModel]) -> None:
    named = set(re.findall(r"`([a-z_]+)`", section(page("configuration.md"), "`[models.NAME]`")))
    assert set(table.model_fields) <= named


# --- Python, events, errors, JSON -----------------------------------------------------------------------------------

ERRORS = {
    name
    for name, item in vars(errors).items()
    if isinstance(item, type) and issubclass(item, errors.Error) and item is not errors.Error
}
EVENTS = [
    item
    for item in vars(events).values()
    if isinstance(item, type) and issubclass(item, events.EventBase) and item is not events.EventBase
]


def test_every_public_name_is_somewhere_in_the_reference() -> None:
    text = "".join(path.read_text() for path in REFERENCE.glob("*.md"))
    missing = [name for name in ridethrough.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == []


def test_every_error_is_described_with_its_fields_and_bases() -> None:
    text = page("errors.md")
    for name in sorted(ERRORS):
        assert f"`{name}`" in text, name
    for name, base in re.findall(r"^\| `(\w+)` \| `(\w+)` \|", text, re.M):
        known = getattr(errors, base, None) or getattr(builtins, base)
        assert issubclass(getattr(errors, name), known), f"{name} is no {base}"


@pytest.mark.parametrize("kind", EVENTS, ids=lambda kind: str(kind.__name__))
def test_every_event_is_described_with_its_fields(kind: type[events.EventBase]) -> None:
    line = re.search(rf"^\| `{kind.__name__}` \|.*$", page("events.md"), re.M)
    assert line is not None
    fields = set(kind.model_fields) - set(events.EventBase.model_fields) - {"type"}
    assert fields <= set(re.findall(r"`(\w+)`", line[0]))
    assert f"`{kind.model_fields['type'].default}`" in line[0]


@pytest.mark.parametrize(
    "view",
    [
        views.RunView,
        views.StepView,
        views.AttemptView,
        views.SandboxView,
        views.EgressView,
        views.WaitView,
        views.Pause,
        views.ErrorView,
        views.UsageView,
        views.DeploymentView,
    ],
)
def test_every_field_of_a_run_is_described(view: type[BaseModel]) -> None:
    named = set(re.findall(r"`(\w+)`", page("json.md")))
    assert set(view.model_fields) <= named


def test_every_kill_point_is_named() -> None:
    text = (ROOT / "docs/how-to/testing.md").read_text()
    assert [point for point in POINTS + SANDBOX_POINTS if f"`{point}`" not in text] == []


def test_everything_of_a_scenario_is_described() -> None:
    text = (ROOT / "docs/how-to/drills.md").read_text()
    names = [*shipped_scenarios(), *get_args(Kind), *MEASURES]
    names += [field.name for kind in (Fault, Kill, ToolFault) for field in fields(kind)]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_every_dialect_is_named() -> None:
    text = (ROOT / "docs/how-to/providers.md").read_text()
    assert [name for name in DIALECTS if f"`{name}`" not in text] == []


def test_every_module_of_the_house_is_described() -> None:
    text = (ROOT / "docs/concepts/house.md").read_text()
    folders = ("runtime", "runtime/router", "runtime/router/providers", "agents", "tools", "sandboxes")
    modules = [path.name for folder in folders for path in (ROOT / folder).glob("*.py")]
    assert [name for name in sorted(modules) if name != "__init__.py" and name not in text] == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md") if path.name != "README.md"]
    assert [name for name in pages if f"]({name})" not in index] == []
