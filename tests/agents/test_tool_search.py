"""Large catalogues: what a model is shown, what it finds, and that a resumed run shows exactly the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.agents.support import PATIENCE, Scripted, all_events, call, finished, open_runtime

from ridethrough import Agent, ConfigError, Diverged, ModelRequest, StepFinished, Tool, tool
from ridethrough.runtime.router.messages import UserMessage
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.tools.catalogue import Catalogue, ToolSearch, split_name, terms

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


NOUNS = ["invoice", "mail", "customer", "ticket", "event", "folder", "user", "order", "refund", "report"]
VERBS = ["create", "delete", "list", "archive", "export"]


def named(name: str, description: str, does: Callable[..., Any] | None = None) -> Tool[..., Any]:
    async def act(key: str = "") -> str:
        return f"{name} of {key}"

    made: Tool[..., Any] = tool(name, description, effect="read")(does or act)
    return made


TOOLS = [named(f"{verb}_{noun}", f"{verb.title()} the {noun} with an id.") for verb in VERBS for noun in NOUNS]
"""Fifty of them."""


def names_of(request: ModelRequest) -> list[str]:
    return [spec.name for spec in request.tools]


# --- what the model is shown ----------------------------------------------------------------------------------------


async def test_up_to_the_threshold_all_tools_are_sent_and_nothing_is_searched(tmp_path: Path) -> None:
    model = Scripted("done")
    agent = Agent("a", model=model, tools=TOOLS[:40])
    async with open_runtime(tmp_path) as runtime:
        run = await runtime.start(agent, "archive an invoice")
        await finished(run)
        steps = [event.path for event in await all_events(run) if isinstance(event, StepFinished)]
    assert names_of(model.requests[0]) == [tool.name for tool in TOOLS[:40]]
    assert steps == ["a#1/model#1"]


async def test_above_it_those_that_fit_the_task_are_sent(tmp_path: Path) -> None:
    model = Scripted("done")
    search = ToolSearch(show=3, always=["list_user", TOOLS[0]])
    async with open_runtime(tmp_path):
        await Agent("a", model=model, tools=TOOLS, tool_search=search).run("Please archive this refund")
    shown = names_of(model.requests[0])
    assert shown[:4] == ["search_tools", "list_user", TOOLS[0].name, "archive_refund"]
    assert len(shown) == 6
    assert all("archive" in name or "refund" in name for name in shown[3:])


@pytest.mark.parametrize(("wanted", "sent"), [(False, 50), (50, 50), (100, 50), (49, 9), (True, 9), (ToolSearch(), 9)])
async def test_the_setting_may_be_a_number_or_a_bool(tmp_path: Path, wanted: Any, sent: int) -> None:
    model = Scripted("done")
    async with open_runtime(tmp_path):
        await Agent("a", model=model, tools=TOOLS, tool_search=wanted).run("archive the invoice")
    assert len(model.requests[0].tools) == sent


async def test_what_a_search_finds_is_added_at_the_end_and_stays(tmp_path: Path) -> None:
    model = Scripted(
        call("search_tools", query="export a report"),
        call("export_report", key="7"),
        [call("search_tools", query="export a report"), call("search_tools", query="DELETE tickets")],
        call("delete_ticket", key="8"),
        "done",
    )
    async with open_runtime(tmp_path):
        await Agent("a", model=model, tools=TOOLS, tool_search=ToolSearch(show=2)).run("archive the invoice")
    shown = [names_of(request) for request in model.requests]
    for earlier, later in pairwise(shown):
        assert later[: len(earlier)] == earlier, "tools were moved or taken away"
    assert [len(names) for names in shown] == [3, 5, 5, 7, 7]
    assert shown[1][3] == "export_report"
    assert shown[3][5] == "delete_ticket"
    assert [result.text for result in model.requests[2].messages if result.role == "tool"][1] == "export_report of 7"
    answer = next(message.text for message in model.requests[1].messages if message.role == "tool")
    assert answer.splitlines()[:2] == [
        "You can call these now:",
        "- export_report: Export the report with an id.",
    ]


async def test_a_search_that_finds_nothing_says_what_there_is(tmp_path: Path) -> None:
    model = Scripted(call("search_tools", query="zebra"), call("search_tools"), "done")
    async with open_runtime(tmp_path):
        await Agent("a", model=model, tools=TOOLS).run("archive")
    first, second = [message for message in model.requests[-1].messages if message.role == "tool"]
    assert first.text == (
        "No tool fits 'zebra'. Say it in other words. Names of tools begin with: create, delete, list, archive, export."
    )
    assert not first.is_error
    assert second.is_error
    assert "query" in second.text
    assert names_of(model.requests[0]) == names_of(model.requests[-1])


async def test_a_tool_that_was_not_shown_is_called_and_shown_if_the_name_is_right(tmp_path: Path) -> None:
    model = Scripted([call("delete_user", key="9"), call("create_event", key="10"), call("forge")], "done")
    async with open_runtime(tmp_path):
        await Agent("a", model=model, tools=TOOLS, tool_search=ToolSearch(show=2)).run("archive the invoice")
    assert model.results[:2] == ["delete_user of 9", "create_event of 10"]
    assert model.results[2].startswith("There is no tool 'forge'. Tools: search_tools, archive_invoice")
    assert model.results[2].endswith("search_tools finds others.")
    assert names_of(model.requests[1]) == [*names_of(model.requests[0]), "delete_user", "create_event"]


async def test_tools_that_a_session_has_used_are_shown_again(tmp_path: Path) -> None:
    model = Scripted(call("delete_user", key="9"), "deleted", "and again")
    agent = Agent("a", model=model, tools=TOOLS, tool_search=ToolSearch(show=2))
    async with open_runtime(tmp_path):
        await agent.run("archive the invoice", session="s")
        await agent.run("once more, please", session="s")
    assert names_of(model.requests[-1]) == ["search_tools", "delete_user"]


async def test_each_agent_of_a_conversation_has_its_own(tmp_path: Path) -> None:
    """And one that gets the conversation back still has what it had found."""
    second = Agent("second", model=Scripted(), tools=TOOLS[:10])
    model = Scripted(
        call("search_tools", query="export report"),
        call("transfer_to_second"),
        call("transfer_to_first"),
        "done",
    )
    first = Agent("first", model=model, tools=TOOLS, tool_search=ToolSearch(show=1), handoffs=[second])
    second.model = model
    second.handoffs = (first,)
    async with open_runtime(tmp_path):
        result = await first.run("archive the invoice")
    assert result.agent == "first"
    one, two, three, four = [names_of(request) for request in model.requests]
    assert one == ["search_tools", "archive_invoice", "transfer_to_second"]
    assert two == [*one, "export_report"]
    assert three == [*(tool.name for tool in TOOLS[:10]), "transfer_to_first"]
    assert four == ["search_tools", "archive_invoice", "export_report", "transfer_to_second"]


async def test_agents_are_found_too(tmp_path: Path) -> None:
    helper = Agent("helper", model=Scripted("helped"), instructions="Knows everything about zebras.")
    model = Scripted(call("search_tools", query="zebra"), call("helper", input="what do they eat?"), "done")
    async with open_runtime(tmp_path):
        await Agent("a", model=model, tools=[*TOOLS, helper.as_tool()]).run("hello")
    assert model.results == ["helped"]


async def test_a_shortened_output_adds_its_reader_after_what_was_found(tmp_path: Path) -> None:
    async def act() -> str:
        return "x" * 100

    long: Tool[..., Any] = tool("zebra", "Stripes.", effect="read", max_output=10)(act)
    model = Scripted(call("zebra"), call("search_tools", query="export report"), "done")
    async with open_runtime(tmp_path):
        await Agent("a", model=model, tools=[*TOOLS, long], tool_search=ToolSearch(show=1)).run("hello")
    assert names_of(model.requests[-1]) == ["search_tools", "zebra", "read_artifact", "export_report"]


# --- on record ------------------------------------------------------------------------------------------------------


class Hanging:
    """A tool that hangs in its first start, as if the process were about to die there."""

    def __init__(self) -> None:
        self.starts = 0
        self.entered = anyio.Event()

    async def act(self) -> str:
        self.starts += 1
        if self.starts == 1:
            self.entered.set()
            await anyio.sleep_forever()
        return "done"


def searching(model: Scripted, tools: list[Tool[..., Any]]) -> Agent[str]:
    return Agent("a", model=model, tools=tools, tool_search=ToolSearch(show=2))


async def crash(folder: Path, hanging: Hanging, agent: Agent[str]) -> None:
    async with open_runtime(folder) as runtime:
        await runtime.start(agent, "archive the invoice", id="r")
        with anyio.fail_after(PATIENCE):
            await hanging.entered.wait()


async def test_a_resumed_run_shows_exactly_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although tools were added meanwhile that fit better, and the index ranks otherwise."""
    hanging = Hanging()
    script = (call("search_tools", query="hang"), call("delete_user", key="1"), call("hang"))
    tools = [*TOOLS, named("hang", "Hang.", hanging.act)]
    before, after = Scripted(*script), Scripted(*script, "done")
    await crash(tmp_path, hanging, searching(before, tools))
    better = [named(f"archive_invoice_{number}", "Archive the invoice: hang.") for number in range(5)]
    monkeypatch.setattr(Catalogue, "search", lambda *_: pytest.fail("nothing is searched again"))
    _ = searching(after, [*better, *tools])
    async with open_runtime(tmp_path) as runtime:
        assert (await finished(await runtime.get("r"))).output == "done"
    assert len(after.requests) == 1, "what was answered is not asked again"
    was = before.requests[-1].tools
    assert after.requests[0].tools[: len(was)] == was
    assert names_of(after.requests[0])[-2:] == ["hang", "delete_user"]
    assert hanging.starts == 2


async def test_a_shown_tool_that_has_changed_stops_the_run(tmp_path: Path) -> None:
    hanging = Hanging()
    tools = [*TOOLS, named("hang", "Hang.", hanging.act)]
    await crash(tmp_path, hanging, searching(Scripted(call("hang")), tools))
    changed = [dataclasses.replace(tool, description="Otherwise.") for tool in tools]
    _ = searching(Scripted(call("hang"), "done"), changed)
    async with open_runtime(tmp_path) as runtime:
        with pytest.raises(Diverged):
            await finished(await runtime.get("r"))


# --- definitions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tools": [*TOOLS, named("search_tools", "Mine.")]}, "the name of the tool that searches"),
        ({"tools": TOOLS, "tool_search": ToolSearch(always=["nobody"])}, "names 'nobody'"),
        ({"tools": TOOLS, "tool_search": "yes"}, "no ToolSearch"),
        ({"tools": [*TOOLS, TOOLS[3]]}, "two tools are called 'create_ticket'"),
        ({"sandbox": 5}, "sandbox=5 is no sandbox"),
        ({"sandbox": ""}, "sandbox='' is no sandbox"),
    ],
)
def test_definitions_that_cannot_work(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Agent("a", model="m", **options)


@pytest.mark.parametrize("options", [{"threshold": -1}, {"threshold": True}, {"show": 0}, {"show": 1.5}])
def test_settings_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="whole number"):
        ToolSearch(**options)


def test_a_name_that_is_taken_matters_only_where_there_is_a_search() -> None:
    assert Agent("a", model="m", tools=[named("search_tools", "Mine.")]).tool_search is None


@pytest.mark.parametrize("sandbox", ["python", SandboxProfile("small", memory=64 * 2**20), None])
def test_an_agent_names_its_sandbox(sandbox: Any) -> None:
    assert Agent("a", model="m", sandbox=sandbox).sandbox == sandbox


# --- the index ------------------------------------------------------------------------------------------------------


def test_names_are_split() -> None:
    assert split_name("getHTTPStatus_code2") == ["get", "HTTP", "Status", "code", "2"]
    assert split_name("größe-Ändern") == ["größe", "Ändern"]
    assert split_name("__") == []


def test_common_words_say_nothing() -> None:
    assert terms("Could you please SEND the send_mail to me?") == ["send", "mail"]
    assert len(terms(" ".join(f"word{number}" for number in range(1000)))) <= 48


INDEX = Catalogue(
    [
        named("sendInvoice", "Mail a bill to a customer."),
        named("weather_now", "Temperature and wind at a place."),
        named("read", "Read a file."),
        named("tide_table", "When the water is high; shipping needs it."),
        named("umfrage", "Größe einer Umfrage; 調査 の 大きさ"),
        named("broken", "half \ud800 a pair \x00 and nothing"),
    ]
)


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("invoices", "sendInvoice"),
        ("billing customers", "sendInvoice"),
        ("SENDINVOICE", "sendInvoice"),
        ("how much wind is there?", "weather_now"),
        ("use weather_now or invoice", "weather_now"),
        ("ship", "tide_table"),
        ("was für eine UMFRAGE", "umfrage"),
        ("調査", "umfrage"),
        ("half", "broken"),
    ],
)
def test_queries_as_people_write_them(query: str, first: str) -> None:
    assert INDEX.search(query, 3)[0] == first


@pytest.mark.parametrize(
    "query",
    [
        *(
            "",
            "   ",
            '"',
            "'",
            '" OR "',
            "NEAR(a b)",
            "name:*",
            "^read",
            "-read +read",
            "a AND",
            "NOT",
            "(((",
            "{a b}:c",
        ),
        *("\x00", "\ud800", "tools MATCH", "'; DROP TABLE tools; --", "read*" * 3000, '"' * 10_000, "é" * 10_000),
    ],
)
def test_hostile_queries_are_only_words(query: str) -> None:
    assert len(INDEX.search(query, 3)) <= 3
    assert INDEX.search("wind", 1) == ["weather_now"]


@given(st.text(max_size=200))
def test_any_text_is_a_query(query: str) -> None:
    assert set(INDEX.search(query, 4)) <= set(INDEX.tools)


def test_the_parameters_are_searched_as_well() -> None:
    async def act(latitude: float, unit: str = "C") -> str:
        """Act.

        Args:
            latitude: Degrees north of the equator.
            unit: Celsius or Fahrenheit.
        """
        return unit

    found = Catalogue([named("x", "Nothing."), tool("y", effect="read")(act)])
    assert found.search("fahrenheit", 5) == found.search("latitudes", 5) == ["y"]


def test_the_same_question_has_the_same_answer() -> None:
    index, again = Catalogue(TOOLS), Catalogue(TOOLS)
    for query in ("invoice", "archive", "with an id", "delete list"):
        assert index.search(query, 20) == again.search(query, 20)


async def test_threads_may_search_at_the_same_time() -> None:
    index = Catalogue(TOOLS)

    def search(noun: str) -> list[str]:
        return [index.search(f"archive {noun}", 1)[0] for _ in range(50)]

    found: dict[str, list[str]] = {}

    async def one(noun: str) -> None:
        found[noun] = await anyio.to_thread.run_sync(search, noun)

    async with anyio.create_task_group() as group:
        for noun in NOUNS:
            group.start_soon(one, noun)
    assert found == {noun: [f"archive_{noun}"] * 50 for noun in NOUNS}


async def test_input_without_text_shows_what_is_always_shown(tmp_path: Path) -> None:
    model = Scripted("done")
    async with open_runtime(tmp_path):
        agent = Agent("a", model=model, tools=TOOLS, tool_search=ToolSearch(always=["list_user"]))
        await agent.run([UserMessage(content="")])
    assert names_of(model.requests[0]) == ["search_tools", "list_user"]
