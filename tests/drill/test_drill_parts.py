"""The parts of a drill: who stands in for whom, how many runs there are, when who is ill, and how it is counted."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from ridethrough.runtime.config import Config, parse_config
from ridethrough.runtime.drill.evidence import Course, Evidence, Killed, Request, ToolCall
from ridethrough.runtime.drill.lineup import completed, faults_of, line_up, scripts_of, text_of, toml
from ridethrough.runtime.drill.measure import calls_of, measure
from ridethrough.runtime.drill.plan import AFTER, LEAST_RUNS, MOST_RUNS, baseline_plan, drill_plan
from ridethrough.runtime.drill.windows import Illness, illnesses, last_moment, mended, span
from ridethrough.runtime.errors import ConfigError
from ridethrough.runtime.router.providers.simulated import Fault, Kill, Rule, Scenario, Script, ToolFault
from ridethrough.runtime.views import AttemptView, RunView, StepView, UsageView

CONFIG = """
[providers.east]
kind = "openai"
api_key = "env:A"
[providers.west]
kind = "gemini"
[providers.again]
kind = "openai"
api_key = "env:B"
[models.large]
provider = "east"
model = "gpt"
quota = "shared"
[models.small]
provider = "east"
model = "mini"
quota = "shared"
timeouts = { first_token = 3 }
[models.other]
provider = "west"
model = "g"
[routes.first]
models = ["other", "west/direct"]
[routes.second]
models = ["large", "small"]
strategy = "cheapest"
patience = "20s"
[routes.keys]
models = ["large", "again/gpt"]
[[budgets]]
scope = "label:who \\"x\\""
usd = 1.5
per = "day"
"""


@pytest.fixture
def config() -> Config:
    """Several providers, with deployments that share an account."""
    return parse_config(CONFIG)


# --- who stands in --------------------------------------------------------------------------------------------------


def test_what_is_asked_for_is_counted_first(config: Config) -> None:
    line = line_up(config, ["second"])
    assert [each.deployment for each in line] == [
        *("large", "small", "other", "west/direct", "again/gpt"),
        *("east", "west", "again"),
    ]
    assert [each.position for each in line] == [1, 2, 3, 4, 5, None, None, None]
    assert [each.wire for each in line[:4]] == ["openai", "openai", "gemini", "gemini"]
    assert line_up(config, ["east/unlisted"])[0].deployment == "east/unlisted"


def test_an_account_fails_as_a_whole_and_a_server_alone(config: Config) -> None:
    line = line_up(config, ["second"])
    kinds = ("auth", "quota", "rate_limit", "refuse")
    faults = [Fault(kind=kind, deployment="#1") for kind in kinds]  # type: ignore[arg-type]
    had = {each.deployment: [fault.kind for fault in faults_of(each, faults, line)] for each in line}
    assert had["large"] == ["auth", "quota", "rate_limit", "refuse"]
    assert had["small"] == ["auth", "quota", "rate_limit"]
    assert had["east"] == ["auth", "quota"]
    assert had["other"] == had["again"] == had["again/gpt"] == []


def test_all_but_the_servers_stays_in_the_configuration(config: Config) -> None:
    line = line_up(config, [])
    urls = {each.deployment: f"http://127.0.0.1:1/{number}" for number, each in enumerate(line)}
    drilled = parse_config(text_of(config, line, urls, "sqlite:///a folder/runs.db"))
    assert {each.kind for each in drilled.providers.values()} == {"simulated"}
    assert not any(each.api_key for each in drilled.providers.values())
    assert drilled.routes["second"] == config.routes["second"]
    assert drilled.routes["first"] == config.routes["first"]
    assert drilled.budgets == config.budgets
    assert drilled.models["small"] == config.models["small"].model_copy(update={"provider": "small"})
    assert drilled.models["west/direct"].model == "direct"
    assert drilled.database == "sqlite:///a folder/runs.db"


def test_a_second_key_still_stands_in_for_the_first(config: Config) -> None:
    line = line_up(config, [])
    urls = dict.fromkeys((each.deployment for each in line), "http://127.0.0.1:1")
    drilled = parse_config(text_of(config, line, urls, "sqlite:///x.db"))
    assert drilled.routes["keys"].failover == ("auth",)
    assert drilled.routes["second"].failover == ()


def test_where_there_are_no_routes_each_name_gets_one() -> None:
    nothing = parse_config("")
    assert completed(nothing, ["desk", "night"]).routes.keys() == {"desk", "night"}
    assert completed(nothing, []).routes.keys() == {"smart"}
    made = completed(nothing, ["desk"])
    assert [each.deployment for each in line_up(made, ["desk"])] == ["north", "south"]
    known = parse_config(CONFIG)
    assert completed(known, ["missing"]) is known


def test_who_says_what() -> None:
    ours, theirs = Script(rules=[Rule("ours")]), Script(rules=[Rule("theirs")])
    config = parse_config('[providers.a]\nkind = "openai"\n')
    assert scripts_of(config, ours, Scenario(script=theirs)) == {"a": ours}
    assert scripts_of(config, None, Scenario(script=theirs)) == {"a": theirs}
    assert scripts_of(config, None, Scenario())["a"].rules == []


def test_tables_are_written_so_that_they_are_read_as_they_were() -> None:
    table: dict[str, Any] = {
        "text": 'quotes " and \\ and ümlaut and\nlines',
        "numbers": [1, 2.5, -3],
        "yes": True,
        "rows": [{"a": 1}, {"b c": "d"}],
        "inner": {"a/b": {"deep": {"er": 1}}, "plain": 2},
    }
    assert tomllib.loads(toml(table)) == table


def test_a_simulated_provider_may_be_served_by_another_process() -> None:
    config = parse_config('[providers.a]\nkind = "simulated"\nbase_url = "http://127.0.0.1:9/v1"\nwire = "gemini"\n')
    assert config.providers["a"].speaks == "gemini"
    with pytest.raises(ConfigError, match="script"):
        parse_config('[providers.a]\nkind = "simulated"\nbase_url = "http://127.0.0.1:9/v1"\nscript = "x.py"\n')


# --- how many, and when ---------------------------------------------------------------------------------------------


def test_there_is_work_for_as_long_as_the_schedule_lasts() -> None:
    plan = drill_plan(None, None, 10.0)
    assert plan.may_begin(0, 0, 0.0)
    assert not plan.may_begin(1, 0, 0.0), "the schedule has not begun"
    assert plan.may_begin(1, 1, 1.0)
    assert not plan.may_begin(8, plan.concurrency, 5.0)
    assert not plan.is_over(LEAST_RUNS - 1, 10.0 + AFTER), "so many at least"
    assert plan.is_over(LEAST_RUNS, 10.0 + AFTER)
    assert plan.is_over(MOST_RUNS, 1.0)


def test_a_given_number_is_spread_over_the_schedule() -> None:
    plan = drill_plan(4, None, 10.0)
    assert [plan.may_begin(2, 0, age) for age in (0.0, 9.0, 10.1)] == [False, False, True]
    assert plan.is_over(4, 0.0)
    together = drill_plan(4, 4, 10.0)
    assert all(together.may_begin(begun, begun, 0.0) for begun in range(4))
    assert not drill_plan(9, 2, 10.0).may_begin(5, 2, 100.0)
    assert baseline_plan(1000, None).runs <= 16


def test_when_faults_are_over() -> None:
    assert last_moment(Fault(start=1.0, end=9.0)) == 9.0
    assert last_moment(Fault(start=1.0)) == math.inf
    assert last_moment(Fault(start=1.0, end=17.0, every=4.0, lasts=2.0)) == 15.0
    assert last_moment(Fault(start=1.0, end=14.0, every=4.0, lasts=2.0)) == 14.0
    ill = Illness([Fault(start=2.0, end=5.0), Fault(kind="hang", start=1.0, end=3.0)])
    assert (ill.start, ill.end) == (1.0, 5.0)
    assert ill.kinds_at(2.5) == ["status", "hang"]
    assert ill.kinds_at(6.0) == []


def test_the_schedule_lasts_until_its_last_moment(config: Config) -> None:
    line = line_up(config, ["second"])
    scenario = Scenario(
        faults=(Fault(deployment="#2", start=1.0, end=4.0),), kills=(Kill(6.0),), tools=(ToolFault(end=7.0),)
    )
    ill = illnesses(line, scenario)
    assert ill.keys() == {"small"}
    assert span(ill, scenario) == 7.0
    assert mended(ill) == 4.0
    endless = replace(scenario, faults=(Fault(start=3.0),), kills=(), tools=())
    assert mended(illnesses(line, endless)) is None
    assert span(illnesses(line, endless), endless) == 3.0


# --- counting -------------------------------------------------------------------------------------------------------

EPOCH = 1_000_000.0


def moment(seconds: float) -> datetime:
    """A time on the drill's clock."""
    return datetime.fromtimestamp(EPOCH + seconds, UTC)


def asked(
    number: int, started: float, ended: float | None, *, run: str = "r", digest: str = "d", **more: Any
) -> Request:
    """A request that was answered whole."""
    values: dict[str, Any] = {"fault": None, "status": 200 if ended else 0, "error": None, **more}
    return Request("north", number, run, digest, started=EPOCH + started, ended=ended and EPOCH + ended, **values)


def attempt(started: float, seconds: float, verdict: str = "ok", deployment: str = "north", **more: Any) -> AttemptView:
    """An attempt of a route with two deployments."""
    nothing = dict.fromkeys(name for name in AttemptView.model_fields)
    known = {"route": "smart", "provider": "p", "model": "m", "phase": "", "path": "model#1", "number": 1, "detail": ""}
    return AttemptView.model_validate(
        {
            **nothing,
            **known,
            **{"started_at": moment(started), "seconds": seconds, "verdict": verdict, "deployment": deployment},
            **{"queue_seconds": 0.0, "hedged": False, "wasted": verdict != "ok", "cost_usd": 0.5, **more},
        }
    )


def step(ended: float, status: str = "done", kind: str = "model") -> StepView:
    """A step on record."""
    when = moment(ended)
    return StepView(
        path=f"model#{ended}", name="model", kind=kind, status=status, attempts=1, started_at=when, ended_at=when
    )


def a_run(
    steps: Sequence[StepView], attempts: Sequence[AttemptView] = (), status: str = "done", took: float = 1.0
) -> RunView:
    """A run that began with the schedule."""
    return RunView(
        id="r",
        workflow="w",
        version="1",
        status=status,
        pause=None,
        tenant=None,
        error=None,
        created_at=moment(0),
        started_at=moment(0),
        finished_at=moment(took),
        recoveries=0,
        cost_usd=2.0,
        usage=UsageView(),
        steps=list(steps),
        attempts=list(attempts),
    )


def found(
    run: RunView, requests: Sequence[Request] = (), kills: Sequence[float] = (), tools: Sequence[ToolCall] = ()
) -> Evidence:
    """What a drill of one run left behind."""
    course = Course(EPOCH, EPOCH + 60.0, ["r"], [Killed(1, EPOCH + at, at) for at in kills])
    return Evidence(course, [run], [], requests, tools, [])


def test_a_finished_call_that_is_made_again_is_repeated() -> None:
    evidence = found(a_run([step(1.0)]), [asked(1, 0.0, 1.0), asked(2, 3.0, 4.0)], kills=[2.0])
    measures = measure(evidence, None, {})
    assert measures["repeated"].value == 1
    assert measures["wasted"].value == 0


def test_what_a_kill_caught_is_no_repetition_but_waste() -> None:
    on_its_way = found(a_run([step(4.0)]), [asked(1, 1.5, None), asked(2, 3.0, 4.0)], kills=[2.0])
    too_young = found(a_run([step(4.0)]), [asked(1, 1.0, 1.9), asked(2, 3.0, 4.0)], kills=[2.0])
    unnoticed = found(a_run([step(4.0)]), [asked(1, 1.0, 2.001), asked(2, 3.0, 4.0)], kills=[2.0])
    for evidence in (on_its_way, too_young, unnoticed):
        measures = measure(evidence, None, {})
        assert (measures["repeated"].value, measures["wasted"].value) == (0, 1)
        assert [each.number for each in calls_of(evidence).cut_off] == [1]


def test_an_old_answer_that_never_came_on_record_is_repeated() -> None:
    evidence = found(a_run([step(4.0)]), [asked(1, 0.0, 1.0), asked(2, 3.0, 4.0)], kills=[2.0])
    assert measure(evidence, None, {})["repeated"].value == 1


def test_a_young_answer_that_is_on_record_is_repeated() -> None:
    evidence = found(a_run([step(1.95)]), [asked(1, 1.0, 1.9), asked(2, 3.0, 4.0)], kills=[2.0])
    assert measure(evidence, None, {})["repeated"].value == 1


def test_an_answer_that_nobody_waited_for_is_no_call() -> None:
    late = a_run([step(3.0)], [attempt(0.0, 1.0, "Slow"), attempt(1.5, 1.5)])
    evidence = found(late, [asked(1, 0.01, 1.2), asked(2, 1.51, 3.0)])
    assert measure(evidence, None, {})["repeated"].value == 0
    closed = found(a_run([step(1.0)], [attempt(0.0, 1.0)]), [asked(1, 0.01, 1.01, status=0, error="client")])
    assert [each.number for each in calls_of(closed).finished] == [1]


def test_a_call_beside_it_does_not_make_a_given_up_one_answered() -> None:
    """Calls of one run go on side by side: the one that was given up, and asked again, was not answered twice."""
    beside = [attempt(0.0, 1.0, "Slow"), attempt(0.01, 1.3, path="model#2"), attempt(1.5, 1.5)]
    requests = [
        asked(1, 0.01, 1.9, status=0, error="client"),  # closed late
        asked(2, 0.02, 1.31, digest="e"),
        asked(3, 1.51, 3.0),
    ]
    evidence = found(a_run([step(1.3), step(3.0)], beside), requests)
    assert measure(evidence, None, {})["repeated"].value == 0
    assert sorted(each.number for each in calls_of(evidence).finished) == [2, 3]


def test_what_the_baseline_asks_twice_may_be_asked_twice() -> None:
    twice = found(a_run([step(1.0), step(2.0)]), [asked(1, 0.0, 1.0), asked(2, 1.0, 2.0)])
    thrice = found(a_run([step(1.0), step(2.0)]), [*twice.requests, asked(3, 2.0, 3.0)])
    assert measure(twice, twice, {})["repeated"].value == 0
    assert measure(thrice, twice, {})["repeated"].value == 1


def test_tools_that_began_again_are_repeated_whatever_they_say() -> None:
    tools = [ToolCall("r", "a", "send", "read", 3, ()), ToolCall("r", "b", "send", "read", 1, ())]
    repeated = measure(found(a_run([]), tools=tools), None, {})["repeated"]
    assert repeated.value == 2
    assert repeated.parts["tools"] == [{"tool": "send", "effect": "read", "calls": 1}]


def test_lost_are_calls_whose_error_came_through_and_runs_without_one() -> None:
    assert measure(found(a_run([step(1.0, "failed")], status="failed")), None, {})["lost"].value == 1
    assert measure(found(a_run([step(1.0)], status="failed")), None, {})["lost"].value == 1
    assert measure(found(a_run([step(1.0, "failed", "tool")])), None, {})["lost"].value == 0


def test_money_is_that_of_steps_and_of_waste() -> None:
    cost = measure(found(a_run([], [attempt(0.0, 1.0), attempt(1.0, 1.0, "Slow")])), None, {})["cost"]
    assert (cost.value, cost.parts["wasted"]) == (2.5, 0.5)


def test_delay_is_against_the_slowest_of_the_baseline() -> None:
    delay = measure(found(a_run([], took=5.0)), found(a_run([], took=2.0)), {})["delay"]
    assert (delay.value, delay.parts["median"]) == (3.0, 3.0)
    assert measure(found(a_run([], took=1.0)), found(a_run([], took=2.0)), {})["delay"].value == 0.0
    assert measure(found(a_run([])), None, {})["delay"].value is None


ILL = {"north": Illness([Fault(start=10.0, end=20.0)])}
WELL = [attempt(float(each), 0.1) for each in range(10)]


def test_a_deployment_is_back_when_it_has_its_share() -> None:
    reserve = [attempt(20.0 + each, 0.1, deployment="south") for each in range(5)]
    first = attempt(21.5, 0.1)
    steady = [attempt(25.0 + each, 0.1) for each in range(10)]
    drill = found(a_run([], [*WELL, *reserve, first, *steady]))
    back = measure(drill, None, ILL)["return"]
    north = back.parts["deployments"]["north"]
    assert north.answers == pytest.approx(1.6)
    assert north.usual_share == 1.0
    assert back.value == pytest.approx(5.1)


def test_one_that_stays_away_is_not_back() -> None:
    away = [attempt(20.0 + each, 0.1, deployment="south") for each in range(20)]
    back = measure(found(a_run([], [*WELL, *away])), None, ILL)["return"]
    assert back.value is None
    assert "nobody asked north" in back.why
    forever = {"north": Illness([Fault(start=10.0)])}
    assert measure(found(a_run([], WELL)), None, forever)["return"].value is None


def test_a_reserve_has_nothing_to_come_back_to() -> None:
    ill = {**ILL, "south": Illness([Fault(start=10.0, end=20.0)])}
    steady = [attempt(20.0 + each, 0.1) for each in range(10)]
    back = measure(found(a_run([], [*WELL, attempt(12.0, 0.1, "Overloaded", "south"), *steady])), None, ill)["return"]
    assert back.value == pytest.approx(0.1)
    assert not back.parts["deployments"]["south"].counts
