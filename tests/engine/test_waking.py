"""Runs that wait for models: in which order they are woken, how many at once, by what, and what waiting costs."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from sqlalchemy import event

from ridethrough import Agent, Runtime, gather, step, tool, workflow
from ridethrough.runtime import control, payload
from ridethrough.runtime.config import Config, parse_config
from ridethrough.runtime.execution import Execution
from ridethrough.runtime.router.ledger import DeploymentState
from ridethrough.runtime.router.providers.simulated import Answer, Call, Fault, Script, SimulatedProvider
from ridethrough.runtime.router.router import Router
from ridethrough.runtime.runtime import Run
from ridethrough.runtime.store import BUDGETS, Store
from ridethrough.runtime.waking import MONEY_AT_ONCE

pytestmark = pytest.mark.anyio

BOTH_LOOPS = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
"""For what happens to branches of a run in memory; the rest is rows and HTTP, and takes its seconds."""


@pytest.fixture
def anyio_backend() -> str:
    """One loop is enough for most."""
    return "asyncio"


Eventually = Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often the router was asked for room: ten times are a second in which somebody could have been woken."""
    asked, room = 0, Router.room

    async def counted(self: Router, awaits: str) -> int:
        nonlocal asked
        asked += 1
        return await room(self, awaits)

    monkeypatch.setattr(Router, "room", counted)
    return lambda: asked


@tool(effect="read")
async def look() -> str:
    """Look."""
    return "seen"


anyone = Agent("anyone", model="r", instructions="any")
picky = Agent("picky", model="r", instructions="picky", floor="frontier")
handy = Agent("handy", model="r", instructions="handy", tools=[look])
other = Agent("other", model="other", instructions="other")


@workflow
async def ask(text: str) -> str:
    return str((await anyone.run(text)).output)


@workflow
async def ask_slowly(text: str) -> str:
    await anyio.sleep(0.3)  # no step: it is done again whenever the run is taken up
    return await ask_here(text)


@workflow
async def ask_the_best(text: str) -> str:
    return str((await picky.run(text)).output)


@workflow
async def ask_with_tools(text: str) -> str:
    return str((await handy.run(text)).output)


@workflow
async def ask_both(text: str) -> list[str]:
    first, second = await gather(anyone.run(f"{text} r"), other.run(f"{text} other"))
    return [str(first.output), str(second.output)]


@workflow
async def ask_thrice(text: str) -> list[str]:
    return [str(each.output) for each in await gather(*(anyone.run(f"{text} {number}") for number in range(3)))]


@workflow
async def parent(text: str) -> str:
    return "parent of " + await ask(text)


class Beside:
    """A step that goes on while its sibling is blocked."""

    entered: anyio.Event
    leave: anyio.Event


@step
async def beside() -> str:
    Beside.entered.set()
    await Beside.leave.wait()
    return "beside"


@workflow
async def only_beside(text: str) -> str:
    return await beside()


@workflow
async def ask_beside(text: str) -> list[str]:
    said, worked = await gather(ask_here(text), beside())
    return [said, worked]


async def ask_here(text: str) -> str:
    return str((await anyone.run(text)).output)


def config_of(route: str, /, other_route: str = "", extra: str = "", **urls: str) -> Config:
    """A configuration with a deployment for each URL; the lease is long, so that it is not renewed meanwhile."""
    lines = ['durability = "process"\nlease_seconds = 600\n']
    for name, url in urls.items():
        lines.append(f'[providers.{name}]\nkind = "openai"\nbase_url = "{url}"\n')
        settings = {"small": 'tier = "small"', "frontier": 'tier = "frontier"', "bare": "supports = []"}.get(name, "")
        lines.append(
            f'[models.{name}]\nprovider = "{name}"\nmodel = "sim"\nprice = {{ input = 1, output = 2 }}\n{settings}\n'
        )
    lines.append(f"[routes.r]\nmodels = {route}\n")
    if other_route:
        lines.append(f"[routes.other]\nmodels = {other_route}\n")
    return parse_config("".join(lines) + extra)


def ill(url: str, name: str, seconds: float, **known: Any) -> None:
    """Let it be known in the database that a deployment was found ill, and until when it is left alone."""
    now = time.time()
    state = DeploymentState(name, state="open", since=now, until=now + seconds, verdict="Transport", at=now, **known)
    text = payload.encode({**vars(state), "limits": dict(state.limits)})
    change(
        url,
        lambda store, connection: store.keep_deployments(
            connection, [{"deployment": name, "state": text, "at": now, "worker": "another"}]
        ),
    )


def change(url: str, operation: Callable[[Store, Any], Any]) -> Any:
    """Change the database as another process would."""
    store = Store(url)
    store.prepare()
    try:
        with store.writer.begin() as connection:
            return operation(store, connection)
    finally:
        store.close()


async def begin(runtime: Runtime, flow: Any, *names: str, **fields: Any) -> list[Run[Any]]:
    return [await runtime.start(flow, name, id=name, **fields) for name in names]


async def until_parked(runtime: Runtime, eventually: Eventually, *names: str) -> None:
    async def parked() -> bool:
        views = [await runtime.describe(name, steps=False) for name in names]
        assert all(view.status != "failed" for view in views), views
        return all(view.status == "paused" for view in views)

    await eventually(parked)


async def results(runs: Sequence[Run[Any]]) -> list[Any]:
    with anyio.fail_after(20):
        return [await run.result() for run in runs]


async def counts(runtime: Runtime, run_id: str) -> Counter[str]:
    """The kept events of a run, by type."""
    return Counter([event.type async for event in runtime.events(run_id, follow=False)])


def users(provider: SimulatedProvider) -> list[str]:
    return [handled.request.user for handled in provider.requests]


def echo() -> Script:
    return Script().rule("{{user}}")


# --- order and measure ----------------------------------------------------------------------------------------------


async def test_the_urgent_first_then_the_least_tried_then_the_oldest(
    url: str, open_runtime: Any, eventually: Eventually
) -> None:
    """A deployment that takes one call at a time shows the order."""
    async with SimulatedProvider(echo()) as provider:
        config = config_of('["a"]', extra="[models.a.limits]\nconcurrency = 1\n", a=provider.base_url)
        ill(url, "a", 3600)
        order = ["urgent", "untried", "tried-old", "tried-young", "tried-often", "last"]
        priorities = dict.fromkeys(order, 0) | {"urgent": 5, "last": -5}
        async with open_runtime(config=config) as runtime:
            for name in reversed(order):
                await begin(runtime, ask, name, priority=priorities[name])
            await until_parked(runtime, eventually, *order)
            assert provider.requests == []
        tried = {"tried-old": (1, 1.0), "tried-young": (1, 2.0), "tried-often": (2, 0.0), "urgent": (9, 9.0)}

        def set_back(store: Store, connection: Any) -> None:
            for name, (count, at) in tried.items():
                store.update_run(connection, name, tried=count, parked_at=at)

        change(url, set_back)
        ill(url, "a", 0.2)
        async with open_runtime(config=config) as runtime:
            await results([await runtime.get(name) for name in order])
        assert users(provider) == order


async def test_no_more_come_at_once_than_the_ramp_lets_in(
    url: str, open_runtime: Any, eventually: Eventually, tmp_path: Path
) -> None:
    """One, two, four, eight: after each answer at most one more is under way than were answered."""
    ledger = tmp_path / "ledger"
    async with SimulatedProvider(Script(latency=0.05).rule("{{user}}"), ledger=ledger) as provider:
        ill(url, "a", 0.3)
        names = [f"n{number}" for number in range(30)]
        async with open_runtime(config=config_of('["a"]', a=provider.base_url)) as runtime:
            runs = await begin(runtime, ask, *names)
            assert await results(runs) == names
        assert_ramp([json.loads(line)["event"] for line in ledger.read_text().splitlines()])


async def test_who_is_on_the_way_is_not_called_again(url: str, open_runtime: Any) -> None:
    """A run may take a while until it asks; meanwhile its place is not given to another one."""
    names = [f"n{number}" for number in range(7)]
    async with SimulatedProvider(Script(latency=0.3).rule("{{user}}")) as provider:
        ill(url, "a", 0.8)
        async with open_runtime(config=config_of('["a"]', a=provider.base_url)) as runtime:
            runs = await begin(runtime, ask_slowly, *names)
            assert await results(runs) == names
            assert {(await counts(runtime, name))["run_paused"] for name in names} == {1}
        assert sorted(users(provider)) == names


def assert_ramp(events: Sequence[str]) -> None:
    started = finished = 0
    for what in events:
        started += what == "started"
        finished += what == "finished"
        assert started - finished <= finished + 1, events
    assert started == finished == 30


async def test_a_restart_in_an_outage_that_is_known_is_no_stampede(url: str, open_runtime: Any, tmp_path: Path) -> None:
    """Queued runs and what a dead worker had come all at once, and what the database knows may be some time old."""
    ledger = tmp_path / "ledger"
    names = [f"n{number}" for number in range(30)]
    async with SimulatedProvider(Script(latency=0.05).rule("{{user}}"), ledger=ledger) as provider:
        config = config_of('["a"]', a=provider.base_url)
        ill(url, "a", -60.0)
        async with open_runtime(config=config, serve=False) as runtime:
            await begin(runtime, ask, *names)
        async with open_runtime(config=config) as runtime:
            assert await results([await runtime.get(name) for name in names]) == names
        assert_ramp([json.loads(line)["event"] for line in ledger.read_text().splitlines()])


# --- by what --------------------------------------------------------------------------------------------------------


async def test_who_needs_the_best_is_not_woken_by_the_small_one(
    url: str, open_runtime: Any, eventually: Eventually
) -> None:
    async with SimulatedProvider(echo()) as small, SimulatedProvider(echo()) as frontier:
        ill(url, "small", 0.2)
        ill(url, "frontier", 3.0)
        config = config_of('["frontier", "small"]', small=small.base_url, frontier=frontier.base_url)
        async with open_runtime(config=config) as runtime:
            best = await begin(runtime, ask_the_best, "best")
            any_one = await begin(runtime, ask, "any")
            assert await results(any_one) == ["any"]
            assert (users(small), users(frontier)) == (["any"], [])
            view = await runtime.describe("best")
            assert (view.status, view.pause.reason) == ("paused", "outage")
            assert await results(best) == ["best"]
            assert (await counts(runtime, "best"))["run_paused"] == 1
        assert users(frontier) == ["best"]


async def test_who_needs_tools_is_not_woken_by_a_model_without(
    url: str, open_runtime: Any, eventually: Eventually
) -> None:
    """A healthy deployment that cannot answer this request is nothing to be woken for, again and again."""
    script = Script().rule(Answer(calls=(Call("look"),)), turn=0, tool="look").rule("{{user}}")
    async with SimulatedProvider(script) as bare, SimulatedProvider(script) as full:
        ill(url, "full", 1.5)
        config = config_of('["bare", "full"]', bare=bare.base_url, full=full.base_url)
        async with open_runtime(config=config) as runtime:
            tools = await begin(runtime, ask_with_tools, "tools")
            await until_parked(runtime, eventually, "tools")
            assert await results(await begin(runtime, ask, *(f"n{number}" for number in range(10)))) != []
            assert await results(tools) == ["tools"]
            assert (await counts(runtime, "tools"))["run_paused"] == 1
        assert users(full) == ["tools", "tools"]


@BOTH_LOOPS
async def test_any_of_several_conditions_wakes_a_run(url: str, open_runtime: Any, eventually: Eventually) -> None:
    async with SimulatedProvider(echo()) as first, SimulatedProvider(echo()) as second:
        ill(url, "a", 3600)
        ill(url, "b", 0.3)
        config = config_of('["a"]', '["b"]', a=first.base_url, b=second.base_url)
        async with open_runtime(config=config) as runtime:
            await begin(runtime, ask_both, "x")

            async def half() -> bool:
                view = await runtime.describe("x")
                return bool(view.steps) and view.status == "paused"

            await eventually(half)
            assert (users(first), users(second)) == ([], ["x other"])
        ill(url, "a", 0.1)
        async with open_runtime(config=config) as runtime:
            assert await results([await runtime.get("x")]) == [["x r", "x other"]]
        assert (users(first), users(second)) == (["x r"], ["x other"])


@BOTH_LOOPS
async def test_several_branches_blocked_at_once(url: str, open_runtime: Any, eventually: Eventually) -> None:
    async with SimulatedProvider(echo()) as provider:
        ill(url, "a", 0.5)
        async with open_runtime(config=config_of('["a"]', a=provider.base_url)) as runtime:
            (run,) = await begin(runtime, ask_thrice, "x")
            await until_parked(runtime, eventually, "x")
            assert len((await runtime.describe("x")).waits) == 3
            assert await results([run]) == [["x 0", "x 1", "x 2"]]
            assert (await runtime.describe("x")).waits == []
        assert sorted(users(provider)) == ["x 0", "x 1", "x 2"]


@BOTH_LOOPS
async def test_a_blocked_branch_beside_a_working_one_is_woken_in_memory(
    url: str, open_runtime: Any, eventually: Eventually
) -> None:
    Beside.entered, Beside.leave = anyio.Event(), anyio.Event()
    async with SimulatedProvider(echo()) as provider:
        ill(url, "a", 0.3)
        async with open_runtime(config=config_of('["a"]', a=provider.base_url)) as runtime:
            (run,) = await begin(runtime, ask_beside, "x")

            async def answered() -> bool:
                return any(each.kind == "model" for each in (await runtime.describe("x")).steps or ())

            await eventually(answered)
            assert Beside.entered.is_set()
            Beside.leave.set()
            assert await results([run]) == [["x", "beside"]]
            assert (await counts(runtime, "x"))["run_paused"] == 0
        assert users(provider) == ["x"]


async def test_a_route_that_is_gone_wakes_nobody_and_keeps_nobody_else(
    url: str,
    open_runtime: Any,
    eventually: Eventually,
    questions: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with SimulatedProvider(echo()) as first, SimulatedProvider(echo()) as second:
        ill(url, "a", 3600)
        ill(url, "b", 3600)
        urls = {"a": first.base_url, "b": second.base_url}
        async with open_runtime(config=config_of('["a"]', '["b"]', **urls)) as runtime:
            await begin(runtime, ask, "x")
            await begin(runtime, ask_both, "y")
            await until_parked(runtime, eventually, "x", "y")
        change(url, lambda store, connection: store.update_run(connection, "x", awaits="no condition at all"))
        ill(url, "a", 0.0)
        ill(url, "b", 0.0)
        with caplog.at_level(logging.WARNING, logger="ridethrough"):
            async with open_runtime(config=config_of('["b"]', **urls)) as runtime:  # no route `other` any more

                async def other_is_wrong() -> bool:
                    view = await runtime.describe("y")
                    reasons = {wait.name for wait in view.waits}
                    return view.status == "paused" and len(view.steps or ()) == 1 and reasons == {"configuration"}

                await eventually(other_is_wrong)
                await settled(eventually, questions, 10)
                assert (await runtime.describe("x")).status == "paused"
        told = [record.getMessage() for record in caplog.records if "cannot be woken" in record.getMessage()]
        assert len(told) == len(set(told)) == 2, told
        async with open_runtime(config=config_of('["a"]', '["b"]', **urls)) as runtime:
            runs = [await runtime.resume("x"), await runtime.resume("y")]
            assert await results(runs) == ["x", ["y r", "y other"]]


# --- by whom --------------------------------------------------------------------------------------------------------


async def test_two_workers_do_not_wake_a_run_twice(url: str, open_runtime: Any, eventually: Eventually) -> None:
    names = [f"n{number}" for number in range(20)]
    async with SimulatedProvider(Script(latency=0.02).rule("{{user}}")) as provider:
        config = config_of('["a"]', a=provider.base_url)
        ill(url, "a", 1.0)
        async with open_runtime(config=config) as one, open_runtime(config=config) as two:
            await begin(one, ask, *names[:10])
            await begin(two, ask, *names[10:])
            assert await results([await one.get(name) for name in names]) == names
            for name in names:
                seen = await counts(two, name)
                assert seen["run_paused"] == seen["run_resumed"], name
        assert sorted(users(provider)) == sorted(names)


async def test_a_worker_wakes_only_what_it_may_execute(url: str, open_runtime: Any, eventually: Eventually) -> None:
    async with SimulatedProvider(echo()) as provider:
        config = config_of('["a"]', a=provider.base_url)
        ill(url, "a", 3600)
        async with open_runtime(config=config) as runtime:
            await begin(runtime, ask, "mine", "not-mine")
            await until_parked(runtime, eventually, "mine", "not-mine")
        ill(url, "a", 0.0)
        async with open_runtime(config=config, roots=["mine"]) as runtime:
            assert await results([await runtime.get("mine")]) == ["mine"]
            assert (await runtime.describe("not-mine")).status == "paused"
        assert users(provider) == ["mine"]


async def test_a_full_worker_wakes_nobody(
    url: str, open_runtime: Any, eventually: Eventually, questions: Callable[[], int]
) -> None:
    """What it cannot take stays where others find it."""
    Beside.entered, Beside.leave = anyio.Event(), anyio.Event()
    async with SimulatedProvider(echo()) as provider:
        config = config_of('["a"]', a=provider.base_url)
        ill(url, "a", 3600)
        names = [f"n{number}" for number in range(10)]
        async with open_runtime(config=config) as runtime:
            await begin(runtime, ask, *names)
            await until_parked(runtime, eventually, *names)
        ill(url, "a", 0.0)
        async with open_runtime(config=config, concurrency=1) as runtime:
            (busy,) = await begin(runtime, only_beside, "busy")
            await Beside.entered.wait()
            await settled(eventually, questions, 10)
            condition = '["route", "r", null]'
            assert runtime.store.read_now(lambda connection: runtime.store.count_awaiting(connection, condition)) == 10
            Beside.leave.set()
            assert await results([busy, *[await runtime.get(name) for name in names]]) == ["beside", *names]
        assert sorted(users(provider)) == names


async def test_an_operators_pause_is_not_undone(url: str, open_runtime: Any, eventually: Eventually) -> None:
    async with SimulatedProvider(echo()) as provider:
        ill(url, "a", 0.6)
        async with open_runtime(config=config_of('["a"]', a=provider.base_url)) as runtime:
            held, free = await begin(runtime, ask, "held", "free")
            await until_parked(runtime, eventually, "held", "free")
            assert await runtime.pause("held") == "paused"
            assert await results([free]) == ["free"]
            view = await runtime.describe("held")
            assert (view.status, view.pause.reason) == ("paused", "operator")
            await runtime.resume("held")
            assert await results([held]) == ["held"]
        assert users(provider) == ["free", "held"]


async def test_cancelled_while_parked(url: str, open_runtime: Any, eventually: Eventually) -> None:
    async with SimulatedProvider(echo()) as provider:
        ill(url, "a", 0.6)
        async with open_runtime(config=config_of('["a"]', a=provider.base_url)) as runtime:
            _, free = await begin(runtime, ask, "gone", "free")
            await until_parked(runtime, eventually, "gone", "free")
            assert await runtime.cancel("gone") == "cancelled"
            assert await results([free]) == ["free"]
            view = await runtime.describe("gone")
            assert (view.status, view.waits) == ("cancelled", [])
        assert users(provider) == ["free"]


async def test_a_child_is_woken_and_its_parent_with_it(url: str, open_runtime: Any, eventually: Eventually) -> None:
    async with SimulatedProvider(echo()) as provider:
        ill(url, "a", 0.6)
        async with open_runtime(config=config_of('["a"]', a=provider.base_url)) as runtime:
            (run,) = await begin(runtime, parent, "x")

            async def child_parked() -> bool:
                view = await runtime.describe("x")
                child = await runtime.describe(view.children[0]) if view.children else view
                return (view.status, child.status) == ("waiting", "paused")

            await eventually(child_parked)
            assert await results([run]) == ["parent of x"]
        assert users(provider) == ["x"]


# --- losing nothing -------------------------------------------------------------------------------------------------


async def test_the_provider_fails_again(url: str, open_runtime: Any, eventually: Eventually) -> None:
    """Each look costs one call and one pause of one run; the others stay where they are, and nothing is lost."""
    names = [f"n{number}" for number in range(6)]
    async with SimulatedProvider(echo()) as provider:
        provider.faults.add(Fault(kind="status", status=503, requests=(1,)))
        ill(url, "a", 0.2)
        async with open_runtime(config=config_of('["a"]', a=provider.base_url)) as runtime:
            runs = await begin(runtime, ask, *names)
            assert await results(runs) == names
            paused = [(await counts(runtime, name))["run_paused"] for name in names]
        failed = [handled.request.user for handled in provider.requests if handled.status == 503]
        assert len(failed) == 1
        assert users(provider)[1:2] != failed, "who was not tried yet comes first"
        assert sum(paused) <= len(names) + len(failed) + 6, "woken for nothing"
        assert len(provider.requests) == len(names) + 1


@BOTH_LOOPS
@pytest.mark.parametrize("when", ["before", "after"])
async def test_no_wake_up_falls_between_the_error_and_the_parking(
    url: str, open_runtime: Any, eventually: Eventually, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The condition becomes true while the run is on its way out: in front of the transaction, or behind it."""
    leave = Execution._leave  # pyright: ignore[reportPrivateUsage]
    left = 0

    async def well_now(self: Execution) -> Any:
        nonlocal left
        left += 1
        if when == "before":
            for wait in self.blocked.values():
                wait.event.set()
        ending = await leave(self)
        for wait in self.blocked.values():
            wait.event.set()
        return ending

    monkeypatch.setattr(Execution, "_leave", well_now)
    async with SimulatedProvider(echo()) as provider:
        ill(url, "a", 2.0)
        async with open_runtime(config=config_of('["a"]', a=provider.base_url)) as runtime:
            runs = await begin(runtime, ask, "x")
            assert await results(runs) == ["x"]
            assert ((await counts(runtime, "x"))["run_paused"] == 0) == (when == "before")
        assert left >= 1
        assert users(provider) == ["x"]


# --- the price of waiting -------------------------------------------------------------------------------------------


async def test_thousands_that_wait_cost_a_question_for_all(
    url: str, open_runtime: Any, eventually: Eventually, questions: Callable[[], int]
) -> None:
    """While nobody may come nothing is written, and as much is read for two thousand as for twenty."""
    ill(url, "a", 3600)
    config = config_of('["a"]', a="http://127.0.0.1:9/v1")
    statements: Counter[str] = Counter()
    reads: dict[int, float] = {}
    for many in (20, 2000):
        change(url, partial(park, many=many))
        async with open_runtime(config=config) as runtime:
            await settled(eventually, questions, 5)
            for engine in (runtime.store.reader, runtime.store.writer):
                event.listen(engine, "before_cursor_execute", lambda *args: statements.update([args[2].split()[0]]))
            statements.clear()
            before, written = questions(), change_counter(url)
            await settled(eventually, questions, 15)
            reads[many] = sum(statements.values()) / (questions() - before)
            assert change_counter(url) == written
            assert set(statements) <= {"BEGIN", "SELECT", "WITH"}
            assert runtime.worker.resident == {}
    assert reads[2000] <= 1.5 * reads[20] + 0.5, reads


async def test_many_that_wait_for_money_of_their_own_take_turns(
    url: str, open_runtime: Any, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget a run is a condition a run, and a question to the database each: they do not keep others waiting."""
    asked: Counter[str] = Counter()
    room = Router.room

    async def counted(self: Router, awaits: str) -> int:
        asked[awaits] += 1
        return await room(self, awaits)

    monkeypatch.setattr(Router, "room", counted)
    ill(url, "a", 3600)
    change(url, partial(park, many=50))

    def poor(store: Store, connection: Any) -> None:
        for number in range(1, 50):
            key = f"run:{number}/run:{number}"
            store.update_run(connection, f"50-{number}", awaits=json.dumps(["budget", key, 1.0, None, 1.0]))
            connection.execute(BUDGETS.insert(), {"key": key, "spent": 10**9, "reserved": 0})

    change(url, poor)
    budget = '[[budgets]]\nscope = "run"\nusd = 1.0\nper = "run"\n'
    async with open_runtime(config=config_of('["a"]', extra=budget, a="http://127.0.0.1:9/v1")):
        await settled(eventually, lambda: min(asked.values()) if len(asked) == 50 else 0, 4)
    models = asked.pop('["route", "r", null]')
    assert sum(asked.values()) <= MONEY_AT_ONCE * models
    assert max(asked.values()) - min(asked.values()) <= 1


def park(store: Store, connection: Any, *, many: int) -> None:
    """Runs as an outage has parked them, with their waits."""
    now = time.time()
    for number in range(many):
        run_id = f"{many}-{number}"
        if store.run(connection, run_id) is not None:
            continue
        row = {
            "id": run_id,
            "root_id": run_id,
            "workflow": ask.__workflow__.name,
            "version": ask.__workflow__.version,
            "status": "paused",
            "input": '{"text": "x"}',
            "created_at": now,
            "pause_reason": "outage",
            "parked_at": now,
            "wake_at": now + 3600,
        }
        store.insert_runs(connection.connection.cursor(), [control.new_run_row(row)])
        store.update_run(connection, run_id, awaits='["route", "r", null]')
        wait = {"run_id": run_id, "path": "anyone#1/model#1", "kind": "model", "name": "outage", "since": now}
        store.insert_wait(connection, wait)


async def settled(eventually: Eventually, count: Callable[[], int], more: int) -> None:
    """Wait until something has been counted so many times more."""
    goal = count() + more

    async def there() -> bool:
        return count() >= goal

    await eventually(there)


def change_counter(url: str) -> bytes:
    """The file's change counter and its log's size: both grow with every commit."""
    path = Path(url.removeprefix("sqlite:///"))
    log = Path(f"{path}-wal")
    return path.read_bytes()[24:28] + str(log.stat().st_size if log.exists() else 0).encode()
