"""Whom a call asks, in which order, and what it leaves behind: against real servers, and nothing may leak.

Every world is looked at when its test is over: no call in flight, nobody waiting, no money put aside.
"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from ridethrough.runtime import errors
from ridethrough.runtime.config import Config, parse_config
from ridethrough.runtime.errors import BudgetExceeded, ConfigError, ModelError, Unavailable
from ridethrough.runtime.events import ModelDelta, ModelReset
from ridethrough.runtime.router.context import CallContext
from ridethrough.runtime.router.knowledge import KEY_SECONDS
from ridethrough.runtime.router.ledger import AttemptRecord, Cap, Hold, MemoryLedger, Refusal
from ridethrough.runtime.router.messages import ModelRequest, ModelResponse
from ridethrough.runtime.router.providers.simulated import Answer, Call, Fault, Script, SimulatedProvider
from ridethrough.runtime.router.race import HEDGED_SHARE, HEDGES_AT_ONCE
from ridethrough.runtime.router.router import Router
from ridethrough.runtime.router.stream import ModelFinished

pytestmark = pytest.mark.anyio

ANSWER = "a whole answer of several words"
TOOL = {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ask(text: str = "hi", **options: Any) -> ModelRequest:
    return ModelRequest([{"role": "user", "content": text}], **options)


def config_of(
    urls: Sequence[str], *, models: Mapping[str, str], providers: Mapping[str, str], route: str, top: str
) -> Config:
    """A route ``r`` over one deployment at each address, named a, b, ...; what is given for a name is added to it."""
    names = "abcdef"[: len(urls)]
    text = top + "\n"
    for name, url in zip(names, urls, strict=True):
        text += f'[providers.{name}]\nkind = "openai"\nbase_url = "{url}"\n{providers.get(name, "")}\n'
        text += f'[models.{name}]\nprovider = "{name}"\nmodel = "m-{name}"\n{models.get(name, "")}\n'
        if "timeouts" not in models.get(name, ""):
            text += "timeouts = { connect = 2, first_token = 5, idle = 5, total = 10 }\n"
        if "price" not in models.get(name, ""):
            text += "price = { input = 1, output = 2 }\n"
    return parse_config(text + f"[routes.r]\nmodels = {list(names)}\n{route}\n")


@dataclass
class World:
    """Servers, a router over them, and what it booked."""

    servers: list[SimulatedProvider]
    router: Router
    ledger: MemoryLedger

    async def ask(
        self, request: ModelRequest | None = None, *, route: str = "r", context: CallContext | None = None
    ) -> ModelResponse:
        with anyio.fail_after(30):
            return await self.router.complete(request or ask(), route=route, context=context)

    def asked(self) -> list[int]:
        """How many requests each server saw."""
        return [len(server.requests) for server in self.servers]

    async def waiting(self, name: str, count: int) -> None:
        """Wait until so many wait for a deployment."""
        await until(lambda: self.router.health()[name].waiting >= count)

    def attempts(self) -> list[AttemptRecord]:
        return self.ledger.attempts

    async def at_rest(self) -> None:
        """Wait until nothing is under way, and see that nothing is left over."""
        await until(lambda: not self.left_over())

    def left_over(self) -> list[object]:
        """What is under way, or was forgotten."""
        router = self.router
        in_flight = [state for state in router.states() if state.in_flight]
        reserved = [key for key, (_, held) in self.ledger._sums.items() if held]
        queues = [queue for queue in router._entrance._queues.values() if queue]
        return [
            *in_flight,
            *reserved,
            *queues,
            *router._entrance._waiting,
            *router._flights._under_way,
            *self.ledger._holds,
        ]


@asynccontextmanager
async def world(
    *scripts: Script,
    at: Sequence[int] | None = None,
    models: Mapping[str, str] | None = None,
    providers: Mapping[str, str] | None = None,
    route: str = "",
    top: str = "",
    ledger: MemoryLedger | None = None,
) -> AsyncGenerator[World]:
    """A server a script, and a deployment at each (``at`` says at which, when two share one)."""
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(SimulatedProvider(script)) for script in scripts]
        urls = [servers[index].base_url for index in (at or range(len(servers)))]
        config = config_of(urls, models=models or {}, providers=providers or {}, route=route, top=top)
        kept = ledger or MemoryLedger()
        async with Router.open(config, ledger=kept, random=Random(5)) as router:
            made = World(servers, router, kept)
            yield made
            await made.at_rest()


def well(**options: Any) -> Script:
    return Script(**options).rule(ANSWER)


def ill(*faults: Fault, **options: Any) -> Script:
    return Script(faults=list(faults), **options).rule(ANSWER)


@dataclass
class Outcomes:
    """What became of many calls at once."""

    answers: list[ModelResponse] = field(default_factory=list[ModelResponse])
    failures: list[Exception] = field(default_factory=list[Exception])

    async def failed(self, count: int) -> None:
        """Wait until so many have failed."""
        await until(lambda: len(self.failures) >= count)

    async def of(self, make: Callable[[], Awaitable[ModelResponse]]) -> None:
        try:
            self.answers.append(await make())
        except (ModelError, BudgetExceeded, ConfigError) as error:
            self.failures.append(error)


async def together(count: int, make: Callable[[int], Awaitable[ModelResponse]]) -> Outcomes:
    """Make so many calls at once."""
    found = Outcomes()

    async def one(number: int) -> None:
        await found.of(lambda: make(number))

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            for number in range(count):
                group.start_soon(one, number)
    return found


async def until(condition: Callable[[], bool]) -> None:
    """Let the others run until something is so."""
    with anyio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - what happens inside of others sets no event
            await anyio.sleep(0.005)


# --- strategies -------------------------------------------------------------------------------------------------------


async def test_ordered_asks_the_first_that_is_well() -> None:
    async with world(well(), well(), well()) as here:
        for _ in range(5):
            assert (await here.ask()).deployment == "a"
        here.servers[0].faults.add(Fault("status", status=503, headers={"retry-after": "30"}))
        assert (await here.ask()).deployment == "b"
    assert here.asked() == [6, 1, 0]


async def test_cheapest_asks_the_cheapest_that_is_known() -> None:
    prices = {"a": "price = { input = 5, output = 5 }", "c": "price = { input = 0.1, output = 1 }"}
    async with world(well(), well(), well(), models=prices, route='strategy = "cheapest"') as here:
        assert (await here.ask()).deployment == "c"
        here.servers[2].faults.add(Fault("status", status=503))
        assert (await here.ask()).deployment == "b"


async def test_fastest_asks_the_fastest() -> None:
    async with world(well(latency=0.15), well(), route='strategy = "fastest"') as here:
        await together(10, lambda _: here.ask(route="a"))
        await together(10, lambda _: here.ask(route="b"))
        before = here.asked()
        for _ in range(3):
            assert (await here.ask()).deployment == "b"
        assert here.asked() == [before[0], before[1] + 3]


async def test_weighted_asks_by_weight() -> None:
    weights = {"a": "weight = 4.0", "b": "weight = 1.0"}
    async with world(well(), well(), models=weights, route='strategy = "weighted"') as here:
        count = Counter([(await here.ask()).deployment for _ in range(100)])
    assert 65 <= count["a"] <= 92


# --- who may answer ---------------------------------------------------------------------------------------------------


async def test_who_cannot_do_it_is_not_asked() -> None:
    supports = {"a": "supports = []", "b": 'supports = ["tools"]'}
    picture = ModelRequest(
        [{"role": "user", "content": [{"type": "image", "data": "aGk="}, {"type": "text", "text": "what is it?"}]}]
    )
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    async with world(well(), well(), well(), models=supports) as here:
        assert (await here.ask()).deployment == "a"
        assert (await here.ask(ask(tools=[TOOL]))).deployment == "b"
        assert (await here.ask(picture)).deployment == "c"
        assert (await here.ask(ask(output_schema=schema))).deployment == "c"
        with pytest.raises(ConfigError, match="does not support tools"):
            await here.ask(ask(tools=[TOOL]), route="a")


async def test_a_long_request_goes_where_it_fits() -> None:
    windows = {"a": "context_window = 200", "b": "context_window = 100000"}
    long = ask("word " * 2000)
    async with world(well(), well(), models=windows) as here:
        assert (await here.ask()).deployment == "a"
        assert (await here.ask(long)).deployment == "b"
        assert (await here.ask(ask(max_tokens=500))).deployment == "b"
        with pytest.raises(errors.ContextLength, match="too long"):
            await here.ask(long, route="a")
    assert here.asked() == [1, 2]


async def test_a_context_that_was_too_long_fails_over_to_a_larger_window_only() -> None:
    windows = {
        "a": "context_window = 10000",
        "b": "context_window = 8000",
        "c": "context_window = 10000",
        "d": "context_window = 20000",
    }
    full = Fault("status", status=400, body={"error": {"code": "context_length_exceeded", "message": "too long"}})
    async with world(ill(full), well(), well(), well(), models=windows) as here:
        assert (await here.ask()).deployment == "d"
        assert here.asked() == [1, 0, 0, 1]
        assert here.router.health()["a"].state in ("unknown", "closed")
        here.servers[3].faults.add(full)
        with pytest.raises(errors.ContextLength):
            await here.ask()
    assert here.asked() == [2, 0, 0, 2]


async def test_the_floor_holds_and_a_lower_tier_is_told() -> None:
    tiers = {"a": 'tier = "frontier"', "b": 'tier = "standard"', "c": 'tier = "small"'}
    gone = Fault("status", status=503, headers={"retry-after": "20"})
    async with world(ill(gone), well(), well(), models=tiers) as here:
        assert (await here.ask()).degraded == "standard"
        assert (await here.ask(route="c")).degraded is None, "nothing better was asked for"
        with pytest.raises(Unavailable):
            await here.ask(context=CallContext(floor="frontier"))
        here.servers[1].faults.add(gone)
        with pytest.raises(Unavailable):
            await here.ask(context=CallContext(floor="standard"))
        assert (await here.ask()).degraded == "small"
    assert here.asked()[2] == 2


async def test_the_stricter_of_two_floors_holds() -> None:
    tiers = {"a": 'tier = "small"', "b": 'tier = "standard"', "c": 'tier = "frontier"'}
    async with world(well(), well(), well(), models=tiers, route='floor = "standard"') as here:
        assert (await here.ask()).deployment == "b"
        assert (await here.ask(context=CallContext(floor="local"))).deployment == "b"
        assert (await here.ask(context=CallContext(floor="frontier"))).deployment == "c"


# --- credentials ------------------------------------------------------------------------------------------------------

BAD_KEY = Fault("status", status=401, model="m-a")


async def test_a_bad_key_is_raised_and_not_hammered() -> None:
    async with world(ill(BAD_KEY), well()) as here:
        with pytest.raises(errors.Auth):
            await here.ask()
        found = await together(20, lambda _: here.ask())
    assert [type(error) for error in found.failures] == [errors.Auth] * 20
    assert here.asked() == [1, 0]


async def test_another_credential_of_the_same_vendor_is_asked_first_and_no_other_provider() -> None:
    async with world(ill(BAD_KEY), well(), at=[0, 1, 0]) as here:
        assert (await here.ask()).deployment == "c"
        for _ in range(3):
            assert (await here.ask()).deployment == "c", "also when the key is known to be bad"
        here.servers[0].faults.add(Fault("status", status=401, model="m-c"))
        with pytest.raises(errors.Auth):
            await here.ask()
        with pytest.raises(errors.Auth):
            await here.ask()
    assert here.asked() == [6, 0]


async def test_another_provider_is_asked_when_the_route_says_so() -> None:
    async with world(ill(BAD_KEY), well(), at=[0, 1, 0], route='failover = ["auth"]') as here:
        assert (await here.ask()).deployment == "c", "the same vendor's other credential goes before"
        here.servers[0].faults.add(Fault("status", status=401))
        assert (await here.ask()).deployment == "b"
        before = here.asked()
        for _ in range(5):
            assert (await here.ask()).deployment == "b"
        assert here.asked()[0] == before[0], "known bad keys are not tried again"


async def test_a_bad_key_that_comes_out_while_others_wait_is_their_error_and_nobody_elses() -> None:
    slow_no = Fault("status", status=401)
    one_place = {"a": "limits = { concurrency = 1 }"}
    async with world(ill(slow_no, Fault("slow", seconds=0.2)), well(), models=one_place) as here:
        found = await together(10, lambda _: here.ask(route="a"))
        assert [type(error) for error in found.failures] == [errors.Auth] * 10
        assert here.asked()[0] == 1
        assert (await here.ask(route="b")).deployment == "b", "the router goes on"


# --- filters and wrong requests ---------------------------------------------------------------------------------------

FILTERED = Fault("status", status=400, body={"error": {"code": "content_filter", "message": "no"}})


async def test_a_filter_is_evaded_only_by_policy() -> None:
    async with world(ill(FILTERED), well()) as here:
        with pytest.raises(errors.ContentFilter):
            await here.ask()
        assert here.asked() == [1, 0]
        assert here.router.health()["a"].state in ("unknown", "closed")
    async with world(ill(FILTERED), well(), route='failover = ["content_filter"]') as here:
        assert (await here.ask()).deployment == "b"


async def test_an_answer_that_was_withheld_is_an_answer_unless_the_policy_says_otherwise() -> None:
    withheld = Script().rule(Answer("par", finish="content_filter"))
    async with world(withheld, well()) as here:
        assert (await here.ask()).finish == "content_filter"
    seen: list[Any] = []
    async with world(withheld, well(), route='failover = ["content_filter"]') as here:
        async with aclosing(here.router.stream(ask(), route="r")) as events:
            async for event in events:
                seen.append(event)
    assert isinstance(seen[-1], ModelFinished)
    assert (seen[-1].response.deployment, seen[-1].response.text) == ("b", ANSWER)
    assert text_shown(seen) == ANSWER


async def test_a_wrong_request_is_wrong_everywhere_unless_the_policy_says_otherwise() -> None:
    wrong = Fault("status", status=422)
    async with world(ill(wrong), well()) as here:
        with pytest.raises(errors.InvalidRequest):
            await here.ask()
    async with world(ill(wrong), well(), route='failover = ["invalid_request"]') as here:
        assert (await here.ask()).deployment == "b"


# --- quota scopes -----------------------------------------------------------------------------------------------------

SHARED = {"a": 'quota = "main"', "b": 'quota = "main"'}


async def test_one_quota_is_shut_for_all_that_share_it() -> None:
    limited = Fault("status", status=429, headers={"retry-after": "30"})
    async with world(ill(limited), well(), well(), models=SHARED) as here:
        for _ in range(4):
            assert (await here.ask()).deployment == "c"
        assert here.asked() == [1, 0, 4]
        states = here.router.health()
        assert (states["a"].quota_reason, states["b"].quota_reason, states["c"].quota_reason) == ("rate", "rate", "")
        assert states["a"].verdict == "RateLimited"
        assert states["b"].failed == 0
        with pytest.raises(Unavailable) as caught:
            await here.ask(route="b")
    assert caught.value.retry_after == pytest.approx(30, abs=5)
    assert here.asked()[1] == 0


async def test_a_rate_limit_that_passes_is_waited_for() -> None:
    limited = Fault("status", status=429, headers={"retry-after-ms": "50"}, times=3)
    async with world(ill(limited), models={"a": 'quota = "main"'}, route='patience = "20s"') as here:
        response = await here.ask()
        assert (response.deployment, response.attempts) == ("a", 4)
        assert here.router.health()["a"].quota_reason == ""


async def test_many_calls_that_meet_one_rate_limit_do_not_storm_it() -> None:
    limited = Fault("status", status=429, headers={"retry-after-ms": "300"}, start=0, end=0.5)
    async with world(ill(limited), models={"a": 'quota = "main"'}, route='patience = "30s"') as here:
        found = await together(40, lambda _: here.ask())
    assert len(found.answers) == 40
    assert here.asked()[0] <= 40 + 40 + 20, "nobody comes three times"


async def test_an_account_that_is_used_up_is_a_reason_of_its_own() -> None:
    async with world(ill(Fault("quota"))) as here:
        with pytest.raises(Unavailable) as caught:
            await here.ask()
        assert caught.value.reason == "quota"
        assert (caught.value.retry_after or 0) > 60
        with pytest.raises(Unavailable) as again:
            await here.ask()
        assert again.value.reason == "quota"
        assert json_of(again.value.awaits) == ["route", "r", None]
    assert here.asked() == [1], "it is not asked again for minutes"


async def test_an_account_that_is_used_up_fails_over() -> None:
    async with world(ill(Fault("quota")), well()) as here:
        for _ in range(3):
            assert (await here.ask()).deployment == "b"
    assert here.asked() == [1, 3]


async def test_a_bucket_is_kept_to() -> None:
    limits = {"a": "limits = { rpm = 60 }"}
    async with world(well(), well(), models=limits) as here:
        found = await together(40, lambda _: here.ask())
    assert len(found.answers) == 40
    assert here.asked()[0] <= 11, "ten seconds' worth at once, the others go elsewhere"


# --- hedging ----------------------------------------------------------------------------------------------------------


async def known(here: World, name: str = "a", count: int = 12) -> None:
    """Let the router learn what is normal."""
    await together(count, lambda _: here.ask(route=name))


async def test_a_second_attempt_wins_and_the_first_is_booked() -> None:
    async with world(well(), well(), route="hedge = true") as here:
        await known(here)
        here.servers[0].faults.add(Fault("slow_first_token", seconds=60))
        seen: list[Any] = []
        async with aclosing(here.router.stream(ask(), route="r")) as events:
            with anyio.fail_after(20):
                async for event in events:
                    seen.append(event)
        await here.at_rest()
        first, second = sorted(here.attempts()[-2:], key=lambda record: record.hedged)
    assert isinstance(seen[-1], ModelFinished)
    assert (seen[-1].response.deployment, seen[-1].response.attempts) == ("b", 2)
    assert {event.attempt for event in seen[:-1]} == {second.id}
    assert text_shown(seen) == ANSWER
    assert (first.deployment, first.verdict, first.wasted) == ("a", "hedged", True)
    assert (second.deployment, second.verdict, second.wasted) == ("b", "ok", False)
    assert first.cost_usd is not None
    assert first.cost_usd > 0, "it may be billed"


async def test_without_hedging_there_is_one_attempt() -> None:
    async with world(well(), well()) as here:
        await known(here)
        here.servers[0].faults.add(Fault("slow_first_token", seconds=0.6))
        assert (await here.ask()).deployment == "a"
    assert here.asked()[1] == 0


async def test_the_first_attempt_may_win_all_the_same() -> None:
    async with world(well(), ill(Fault("hang")), route="hedge = true") as here:
        await known(here)
        here.servers[0].faults.add(Fault("slow_first_token", seconds=0.6))
        assert (await here.ask()).deployment == "a"
        await here.at_rest()
        loser = next(record for record in here.attempts() if record.deployment == "b")
    assert (loser.hedged, loser.wasted, loser.verdict) == (True, True, "abandoned")
    assert here.router.health()["b"].failed == 0


async def test_two_attempts_that_both_fail_are_both_told() -> None:
    broken = Fault("error_event", after=0, status=503)
    async with world(well(), ill(broken), route="hedge = true") as here:
        await known(here)
        here.servers[0].faults.add(broken)
        here.servers[0].faults.add(Fault("slow_first_token", seconds=0.6))
        with pytest.raises(Unavailable) as caught:
            await here.ask()
    assert sorted(error.deployment for error in caught.value.errors) == ["a", "b"]


async def test_a_winner_that_breaks_off_is_taken_back() -> None:
    async with world(well(), ill(Fault("cut", after=3)), well(), route="hedge = true") as here:
        await known(here)
        here.servers[0].faults.add(Fault("slow_first_token", seconds=60))
        seen: list[Any] = []
        async with aclosing(here.router.stream(ask(), route="r")) as events:
            with anyio.fail_after(20):
                async for event in events:
                    seen.append(event)
    assert isinstance(seen[-1], ModelFinished)
    assert text_shown(seen) == ANSWER
    assert sum(isinstance(event, ModelReset) for event in seen) == 1


async def test_hedging_keeps_to_its_budget() -> None:
    async with world(well(), well(), route="hedge = true") as here:
        await known(here, count=20)
        here.servers[0].faults.add(Fault("slow_first_token", seconds=0.6))
        found = await together(60, lambda _: here.ask())
        assert len(found.answers) == 60
    assert 1 <= here.asked()[1] <= HEDGES_AT_ONCE / 2 + HEDGED_SHARE * 80


class SlowLedger(MemoryLedger):
    """Takes its time to put money aside for all but the first ``quick`` calls."""

    def __init__(self, quick: int) -> None:
        super().__init__()
        self.quick = quick
        self.asked = 0
        self.go_on = anyio.Event()

    async def reserve(self, caps: Sequence[Cap], usd: float, *, now: float, expires_at: float) -> Hold | Refusal:
        self.asked += 1
        if self.asked > self.quick:
            await self.go_on.wait()
        return await super().reserve(caps, usd, now=now, expires_at=expires_at)


CAP = '[[budgets]]\nscope = "total"\nusd = 10.0\nper = "day"\n'


async def test_a_second_attempt_that_comes_too_late_is_not_made() -> None:
    ledger = SlowLedger(quick=13)
    async with world(well(), well(), route=f"hedge = true\n{CAP}", ledger=ledger) as here:
        await known(here)
        here.servers[0].faults.add(Fault("slow_first_token", seconds=0.6))

        async def let_on() -> None:
            await until(lambda: here.router.health()["a"].answered == 12 and ledger.asked == 14)
            await until(lambda: any(t.first_token for t in here.router._roster.deployments["a"].health.flight))
            ledger.go_on.set()

        async with anyio.create_task_group() as group:
            group.start_soon(let_on)
            assert (await here.ask()).deployment == "a"
    assert here.asked()[1] == 0


async def test_a_second_attempt_that_cannot_be_made_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    keys = {"b": 'api_key = "env:NO_SUCH_KEY"'}
    for top in ("", CAP):
        async with world(well(), well(), providers=keys, route=f"hedge = true\n{top}") as here:
            await known(here)
            here.servers[0].faults.add(Fault("slow_first_token", seconds=0.6))
            response = await here.ask()
            assert (response.deployment, response.attempts) == ("a", 1)


class FullLedger(MemoryLedger):
    """The disk is full after so many reservations."""

    room = 13

    async def reserve(self, caps: Sequence[Cap], usd: float, *, now: float, expires_at: float) -> Hold | Refusal:
        self.room -= 1
        if self.room < 0:
            raise errors.StoreError("database or disk is full")
        return await super().reserve(caps, usd, now=now, expires_at=expires_at)


async def test_a_second_attempt_that_cannot_be_written_down_is_no_error() -> None:
    """The first one is under way and paid for: a full disk must not take its answer."""
    async with world(well(), well(), route=f"hedge = true\n{CAP}", ledger=FullLedger()) as here:
        await known(here)
        here.servers[0].faults.add(Fault("slow_first_token", seconds=0.6))
        assert (await here.ask()).deployment == "a"
    assert here.asked()[1] == 0


async def test_what_goes_wrong_beside_a_second_attempt_is_raised_as_it_is() -> None:
    """An error of the caller's own listener, say: no group of errors, which nobody looks into."""

    def listener(event: ModelDelta | ModelReset) -> None:
        raise LookupError("nobody listens")

    async with world(well(), well(), route="hedge = true") as here:
        await known(here)
        with pytest.raises(LookupError, match="nobody listens"):
            await here.router.complete(ask(), route="r", listener=listener)


async def test_a_second_attempt_that_no_budget_allows_is_no_error() -> None:
    tight = '[[budgets]]\nscope = "label:once"\nusd = 0.000001\nper = "day"\non_exceeded = "fail"\n'
    async with world(well(), well(), route=f"hedge = true\n{tight}") as here:
        await known(here)
        here.servers[0].faults.add(Fault("slow_first_token", seconds=0.6))
        assert (await here.ask(context=CallContext(labels={"once": "x"}))).deployment == "a"
    assert here.asked()[1] == 0


# --- the cache --------------------------------------------------------------------------------------------------------


async def test_the_same_question_is_asked_once() -> None:
    async with world(well(), route='cache = "exact"') as here:
        first, second = await here.ask(), await here.ask()
    assert (first.cached, second.cached) == (False, True)
    assert second.text == first.text
    assert (second.cost_usd, second.attempts, second.usage.output_tokens) == (0.0, 0, 0)
    assert second.degraded is None
    assert here.asked() == [1]


async def test_everything_that_shapes_the_answer_is_in_the_key() -> None:
    plain = ask()
    variants: list[tuple[ModelRequest, CallContext]] = [
        (plain, CallContext()),
        (ask("other"), CallContext()),
        (plain, CallContext(epoch="2")),
        (plain, CallContext(tenant="acme")),
        (ask(tools=[TOOL]), CallContext()),
        (ask(tools=[{**TOOL, "description": "Look well."}]), CallContext()),
        (ask(tools=[TOOL], tool_choice="required"), CallContext()),
        (ask(temperature=0.5), CallContext()),
        (ask(max_tokens=50), CallContext()),
        (ask(reasoning="low"), CallContext()),
        (ask(output_schema={"type": "object", "properties": {"x": {"type": "integer"}}}), CallContext()),
        (ModelRequest([{"role": "system", "content": "be brief"}, *plain.messages]), CallContext()),
        (ModelRequest([{"role": "user", "content": "h"}, {"role": "user", "content": "i"}]), CallContext()),
    ]
    async with world(well(), route='cache = "exact"') as here:
        for number, (request, context) in enumerate(variants, 1):
            assert not (await here.ask(request, context=context)).cached
            assert here.asked() == [number]
        for request, context in variants:
            assert (await here.ask(request, context=context)).cached
    assert here.asked() == [len(variants)]


async def test_who_asks_and_how_urgently_is_not_in_the_key() -> None:
    async with world(well(), route='cache = "exact"') as here:
        await here.ask(context=CallContext(run_id="1", priority="low"))
        assert (await here.ask(context=CallContext(run_id="2", priority="critical", agent="x"))).cached


async def test_an_answer_that_is_not_whole_is_not_kept() -> None:
    cut = Script().rule(Answer("half an", finish="length"))
    async with world(cut, route='cache = "exact"') as here:
        assert not (await here.ask()).cached
        assert not (await here.ask()).cached
    assert here.asked() == [2]


async def test_twenty_equal_calls_at_once_are_one_request() -> None:
    async with world(well(latency=0.1), route='cache = "exact"') as here:
        found = await together(20, lambda _: here.ask())
    assert [answer.text for answer in found.answers] == [ANSWER] * 20
    assert sum(not answer.cached for answer in found.answers) == 1
    assert here.asked() == [1]
    assert sum(answer.cost_usd or 0 for answer in found.answers) == pytest.approx(here.attempts()[0].cost_usd)


async def test_when_the_one_that_asks_fails_the_next_one_asks() -> None:
    once = Fault("status", status=400, times=2)
    async with world(ill(once, Fault("slow", seconds=0.05)), route='cache = "exact"') as here:
        found = await together(20, lambda _: here.ask())
    assert len(found.failures) == 2
    assert [answer.text for answer in found.answers] == [ANSWER] * 18
    assert here.asked() == [3]


async def test_when_the_one_that_asks_is_cancelled_the_next_one_asks() -> None:
    async with world(well(latency=0.2), route='cache = "exact"') as here:
        found = Outcomes()
        async with anyio.create_task_group() as group:
            leader = anyio.CancelScope()

            async def lead() -> None:
                with leader:
                    await here.ask()

            group.start_soon(lead)
            await until(lambda: here.asked() == [1])
            for _ in range(5):
                group.start_soon(found.of, here.ask)
            await anyio.lowlevel.checkpoint()
            leader.cancel()
    assert len(found.answers) == 5
    assert here.asked() == [2]


async def test_who_waits_for_anothers_answer_keeps_his_own_deadline() -> None:
    async with world(well(latency=1.5), route='cache = "exact"') as here:
        found = Outcomes()
        async with anyio.create_task_group() as group:
            group.start_soon(found.of, here.ask)
            await until(lambda: here.asked() == [1])
            with pytest.raises(Unavailable):
                await here.ask(context=CallContext(deadline=0.1))
            assert not found.answers
    assert len(found.answers) == 1
    assert here.asked() == [1]


async def test_a_stale_answer_is_told_as_such() -> None:
    async with world(well(), route='otherwise = ["cache", "pause"]\npatience = "1h"') as here:
        await here.ask()
        here.servers[0].faults.add(Fault("status", status=503, headers={"retry-after": "30"}))
        kept = await here.ask()
        assert (kept.text, kept.degraded, kept.cached, kept.cost_usd) == (ANSWER, "cache", True, 0.0)
        with pytest.raises(Unavailable):
            await here.ask(ask("something else"), context=CallContext(deadline=0.3))


async def test_the_static_answer_is_told_as_such_and_needs_no_patience() -> None:
    gone = Fault("status", status=503, headers={"retry-after": "30"})
    rung = 'otherwise = ["cache", "static"]\nstatic = "we are closed"\npatience = "1h"'
    async with world(ill(gone), route=rung) as here:
        response = await here.ask()
        assert (response.text, response.degraded, response.deployment) == ("we are closed", "static", "")
        assert response.cost_usd == 0.0
        here.servers[0].faults.clear()
    assert len(here.ledger._answers) == 0, "a makeshift is never kept"


async def test_patience_comes_before_the_last_rung() -> None:
    gone = Fault("status", status=503, headers={"retry-after-ms": "60"}, times=2)
    async with world(ill(gone), route='otherwise = ["cache", "fail"]\npatience = "20s"') as here:
        assert (await here.ask()).attempts == 3
    async with world(ill(gone), route='otherwise = ["cache", "fail"]') as here:
        with pytest.raises(Unavailable) as caught:
            await here.ask()
    assert len(caught.value.errors) == 1


async def test_nobody_is_made_to_wait_longer_than_his_patience() -> None:
    gone = Fault("status", status=503, headers={"retry-after": "3600"})
    async with world(ill(gone), route='patience = "20s"') as here:
        with anyio.fail_after(15), pytest.raises(Unavailable) as caught:
            await here.ask()
    assert (caught.value.retry_after or 0) > 3000


# --- places and queues ------------------------------------------------------------------------------------------------

ONE = {"a": "limits = { concurrency = 1 }"}


async def test_no_more_calls_than_places() -> None:
    most = 0

    def watch(_: Any) -> str:
        nonlocal most
        most = max(most, here.router.health()["a"].in_flight)
        return ANSWER

    script = Script(latency=0.01)
    script.on()(watch)
    async with world(script, models={"a": "limits = { concurrency = 3 }"}) as here:
        found = await together(40, lambda _: here.ask())
    assert len(found.answers) == 40
    assert most == 3


async def test_the_urgent_are_served_first() -> None:
    order: list[str] = []

    async def one(here: World, priority: Any) -> ModelResponse:
        response = await here.ask(context=CallContext(priority=priority))
        order.append(priority)
        return response

    async with world(well(latency=0.1), models=ONE) as here:
        async with anyio.create_task_group() as group:
            group.start_soon(one, here, "normal")
            await until(lambda: here.asked() == [1])
            for waiting, priority in enumerate(("low", "normal", "high", "critical"), 1):
                group.start_soon(one, here, priority)
                await here.waiting("a", waiting)
    assert order == ["normal", "critical", "high", "normal", "low"]


async def test_a_full_queue_sheds_the_lowest_with_the_wait() -> None:
    async with world(well(latency=0.3), models=ONE, route="queue = 3") as here:
        low, rest = Outcomes(), Outcomes()

        def call(priority: Any) -> Callable[[], Awaitable[ModelResponse]]:
            return lambda: here.ask(context=CallContext(priority=priority))

        async with anyio.create_task_group() as group:
            group.start_soon(rest.of, call("normal"))
            await until(lambda: here.asked() == [1])
            for _ in range(3):
                group.start_soon(low.of, call("low"))
            await until(lambda: here.router.health()["a"].waiting == 3)
            for gone, priority in enumerate(("critical", "high"), 1):
                group.start_soon(rest.of, call(priority))
                await low.failed(gone)
    assert (len(rest.answers), len(low.answers), len(low.failures)) == (3, 1, 2)
    for error in low.failures:
        assert isinstance(error, Unavailable)
        assert error.reason == "overload"
        assert error.retry_after is not None
        assert error.retry_after >= 1
    assert here.asked() == [4]


async def test_one_who_waits_for_something_else_does_not_block_the_others() -> None:
    """Its attempt at a failed with a long wait, and b is full: it waits; the others are served by a meanwhile."""
    script = Script().rule(ANSWER, user="unlucky", fault=Fault("status", status=503, headers={"retry-after": "600"}))
    busy = well(latency=1.0)
    async with world(script.rule(ANSWER), busy, models={"b": "limits = { concurrency = 1 }"}) as here:
        found = Outcomes()
        async with anyio.create_task_group() as group:
            group.start_soon(found.of, lambda: here.ask(route="b"))
            await until(lambda: here.asked()[1] == 1)
            group.start_soon(found.of, lambda: here.ask(ask("unlucky")))
            await until(lambda: here.router.health()["b"].waiting == 1)
            for _ in range(5):
                assert (await here.ask()).deployment == "a"
            assert here.router.health()["b"].waiting == 1, "it is waiting still"
        assert [answer.deployment for answer in found.answers] == ["b", "b"]


async def test_two_routes_over_one_deployment_are_served_in_one_order() -> None:
    """One route's queue is never empty; the other's call is served in its turn all the same."""
    order: list[int] = []
    async with world(well(latency=0.15), models=ONE) as here:

        async def one(number: int, route: str, request: ModelRequest) -> None:
            await here.ask(request, route=route)
            order.append(number)

        async with anyio.create_task_group() as group:
            for number in range(6):
                tools = ask(tools=[TOOL])
                group.start_soon(one, number, "r" if number % 3 else "a", tools if number % 2 else ask())
                await (here.waiting("a", number) if number else until(lambda: here.asked() == [1]))
    assert order == list(range(6))


async def test_a_callers_own_short_deadline_speaks_against_nobody() -> None:
    async with world(well(latency=0.4)) as here:
        await known(here)
        for _ in range(4):
            found = await together(5, lambda _: here.ask(context=CallContext(deadline=0.05)))
            assert [type(error) for error in found.failures] == [Unavailable] * 5
        assert here.router.health()["a"].state == "closed"
        assert (await here.ask()).deployment == "a"


async def test_who_waited_too_long_at_busy_places_is_told_so() -> None:
    async with world(well(latency=1.0), models=ONE) as here:
        found = Outcomes()
        async with anyio.create_task_group() as group:
            group.start_soon(found.of, here.ask)
            await until(lambda: here.asked() == [1])
            with pytest.raises(Unavailable) as caught:
                await here.ask(context=CallContext(deadline=0.2))
            assert caught.value.reason == "overload"
            assert (caught.value.retry_after or 0) > 0


# --- budgets ----------------------------------------------------------------------------------------------------------

COST = 0.0002
"""What a call costs: 100 tokens of output at 2 USD a million, known before."""

EXACT = dict.fromkeys("ab", "price = { input = 0, output = 2 }")


def exact(**options: Any) -> Script:
    return Script(**options).rule(Answer(ANSWER, output_tokens=100))


def costly() -> ModelRequest:
    return ask(max_tokens=100)


def capped(on_exceeded: str, usd: float = 50 * COST) -> str:
    return f'[[budgets]]\nscope = "total"\nusd = {usd}\nper = "day"\non_exceeded = "{on_exceeded}"\n'


class WatchedLedger(MemoryLedger):
    """Remembers the most that was ever spent and put aside."""

    most = 0.0

    async def reserve(self, caps: Sequence[Cap], usd: float, *, now: float, expires_at: float) -> Hold | Refusal:
        answer = await super().reserve(caps, usd, now=now, expires_at=expires_at)
        self._look()
        return answer

    async def settle(self, hold: Hold, usd: float, *, now: float) -> None:
        await super().settle(hold, usd, now=now)
        self._look()

    def _look(self) -> None:
        self.most = max(self.most, max((sum(both) / 1e9 for both in self._sums.values()), default=0.0))


@pytest.mark.parametrize("on_exceeded", ["fail", "pause"])
async def test_two_hundred_at_once_never_pass_the_cap(on_exceeded: str) -> None:
    ledger = WatchedLedger()
    async with world(exact(latency=0.02), models=EXACT, route=capped(on_exceeded), ledger=ledger) as here:
        found = await together(200, lambda _: here.ask(costly()))
    assert len(found.answers) == 50
    assert ledger.most <= 50 * COST + COST
    assert here.asked() == [50]
    if on_exceeded == "fail":
        assert {type(error) for error in found.failures} == {BudgetExceeded}
        return
    for error in found.failures:
        assert isinstance(error, Unavailable)
        assert error.reason == "budget"
        assert json_of(error.awaits)[0] == "budget"
        assert 0 < (error.retry_after or 0) <= 86400


async def test_what_was_not_spent_is_there_again() -> None:
    """Failed attempts give back what they put aside: an outage uses up no budget."""
    gone = Fault("status", status=503, headers={"retry-after-ms": "1"}, times=30)
    async with world(exact(faults=[gone]), models=EXACT, route=capped("fail", 5 * COST)) as here:
        for _ in range(40):
            await Outcomes().of(lambda: here.ask(costly()))
            if here.servers[0].faults.pick("m-a", 1, 0.0).kind is None:
                break
        spending = await here.ledger.spending(list(here.ledger._sums), now=0.0)
        assert sum(each.spent for each in spending.values()) <= 2 * COST


async def test_degrade_goes_on_with_what_is_cheaper() -> None:
    prices = {"a": "price = { input = 0, output = 2 }", "b": "price = { input = 0, output = 0 }"}
    async with world(exact(), exact(), models=prices, route=capped("degrade", 3 * COST)) as here:
        answers = [(await here.ask(costly())).deployment for _ in range(6)]
    assert answers == ["a", "a", "a", "b", "b", "b"]


async def test_degrade_with_nothing_cheaper_pauses() -> None:
    async with world(exact(), exact(), models=EXACT, route=capped("degrade", 3 * COST)) as here:
        for _ in range(3):
            await here.ask(costly())
        with pytest.raises(Unavailable) as caught:
            await here.ask(costly())
    assert caught.value.reason == "budget"
    assert here.asked() == [3, 0]


async def test_who_is_left_and_too_dear_waits_for_money() -> None:
    """Two are too dear, for the third the request is too long: the one that is left is a matter of money."""
    models = {
        "a": f"{EXACT['a']}\ncontext_window = 100000",
        "b": f"{EXACT['b']}\ncontext_window = 1000",
        "c": "price = { input = 0, output = 0 }\ncontext_window = 1000",
    }
    too_long = Fault("context_length")
    route = capped("degrade", 3 * COST)
    async with world(exact(), exact(), exact(faults=[too_long]), models=models, route=route) as here:
        for _ in range(3):
            await here.ask(costly())
        with pytest.raises(Unavailable) as caught:
            await here.ask(costly())
    assert (caught.value.reason, here.asked()) == ("budget", [3, 0, 1])
    assert 0 < (caught.value.retry_after or 0) <= 86400


def unpriced(top: str, url: str) -> Config:
    text = f'[providers.a]\nkind = "openai"\nbase_url = "{url}"\n[models.a]\nprovider = "a"\nmodel = "nobody-knows"\n'
    return parse_config(f"{top}\n{text}\n{CAP}")


async def test_an_unknown_price_is_refused_under_a_budget() -> None:
    async with SimulatedProvider(well()) as sim:
        async with Router.open(unpriced("", sim.base_url)) as router:
            with pytest.raises(ConfigError, match="no price is known"):
                await router.complete(ask(), route="a")
            assert router.health()["a"].in_flight == 0
        assert not sim.requests
        async with Router.open(unpriced("default_price = { input = 1, output = 1 }", sim.base_url)) as router:
            assert ((await router.complete(ask(), route="a")).cost_usd or 0) > 0


# --- streams ----------------------------------------------------------------------------------------------------------


async def test_a_broken_stream_is_reset_and_begun_anew() -> None:
    for fault in (Fault("cut", after=3), Fault("no_finish", after=3), Fault("malformed", after=3)):
        seen: list[Any] = []
        async with world(ill(fault), well()) as here:
            async with aclosing(here.router.stream(ask(), route="r")) as events:
                async for event in events:
                    seen.append(event)
        reset = next(event for event in seen if isinstance(event, ModelReset))
        after = seen[seen.index(reset) + 1 :]
        assert {event.attempt for event in after[:-1]} != {reset.attempt}
        assert len({event.attempt for event in after[:-1]}) == 1
        assert text_shown(seen) == ANSWER
        assert seen[-1].response.text == ANSWER


async def test_tool_calls_come_with_the_end_and_not_from_a_broken_stream() -> None:
    calls = Answer("let me see", calls=(Call("look", {"at": "x" * 200}), Call("look", {"at": "y"})))
    seen: list[Any] = []
    broken = Script(faults=[Fault("cut", after=2)]).rule(Answer(calls=(Call("look", {"at": "wrong"}),)))
    async with world(broken, Script().rule(calls)) as here:
        async with aclosing(here.router.stream(ask(tools=[TOOL]), route="r")) as events:
            async for event in events:
                seen.append(event)
    assert all(isinstance(event, ModelDelta | ModelReset) for event in seen[:-1])
    assert text_shown(seen) == "let me see"
    response = seen[-1].response
    assert [call.arguments for call in response.tool_calls] == [{"at": "x" * 200}, {"at": "y"}]


async def test_leaving_a_stream_early_frees_its_place() -> None:
    long = Script(per_token=0.02).rule("many words " * 300, user="long").rule(ANSWER)
    async with world(long, models=ONE) as here:
        for _ in range(5):
            async with aclosing(here.router.stream(ask("long"), route="r")) as events:
                assert isinstance(await anext(events), ModelDelta)
        assert (await here.ask()).text == ANSWER
        await here.at_rest()
        given_up = [record for record in here.attempts() if record.verdict == "abandoned"]
    assert len(given_up) == 5
    assert all(record.wasted for record in given_up)
    assert here.router.health()["a"].failed == 0


async def test_a_stream_raises_what_the_call_raises() -> None:
    async with world(ill(Fault("status", status=400))) as here:
        with pytest.raises(errors.InvalidRequest):
            async with aclosing(here.router.stream(ask(), route="r")) as events:
                await anext(events)


# --- cancellation -----------------------------------------------------------------------------------------------------

EVERYTHING = f'hedge = true\ncache = "exact"\npatience = "10s"\nqueue = 50\n{CAP}'


class YieldingLedger(MemoryLedger):
    """Is as slow as a database: every method waits before and after it does something."""

    async def reserve(self, caps: Sequence[Cap], usd: float, *, now: float, expires_at: float) -> Hold | Refusal:
        await anyio.lowlevel.checkpoint()
        hold = await super().reserve(caps, usd, now=now, expires_at=expires_at)
        try:
            await anyio.lowlevel.checkpoint()
        except BaseException:
            if isinstance(hold, Hold):
                await super().settle(hold, 0.0, now=now)
            raise
        return hold

    async def settle(self, hold: Hold, usd: float, *, now: float) -> None:
        await anyio.lowlevel.checkpoint()
        await super().settle(hold, usd, now=now)
        await anyio.lowlevel.checkpoint()

    async def answer(self, key: str) -> Any:
        await anyio.lowlevel.checkpoint()
        return await super().answer(key)

    async def keep_answer(self, key: str, answer: Any) -> None:
        await anyio.lowlevel.checkpoint()
        await super().keep_answer(key, answer)


async def cancelled_after(steps: int, call: Callable[[], Awaitable[object]]) -> bool:
    """Make a call and cancel it after so many turns of the loop; whether it was under way still."""
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:

            async def stop() -> None:
                for _ in range(steps):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()

            group.start_soon(stop)
            await call()
            group.cancel_scope.cancel()
            return False
    return True


@pytest.mark.parametrize("kind", ["plain", "failing", "stream"])
async def test_a_call_that_is_cancelled_at_any_moment_leaves_nothing_behind(kind: str) -> None:
    faults = [Fault("cut", after=2)] if kind == "failing" else []
    async with world(
        ill(*faults), well(), models=ONE | {"b": "limits = { rpm = 6000 }"}, route=EVERYTHING, ledger=YieldingLedger()
    ) as here:

        async def stream(text: str) -> None:
            async with aclosing(here.router.stream(ask(text), route="r")) as events:
                async for _ in events:
                    pass

        steps, finished = 0, 0
        while finished < 3 and steps < 400:
            text = f"question {steps}"
            call = (lambda text=text: stream(text)) if kind == "stream" else (lambda text=text: here.ask(ask(text)))
            finished += not await cancelled_after(steps, call)
            await here.at_rest()
            steps += 1 + steps // 20
        here.servers[0].faults.clear()
        assert (await here.ask(ask("at last"))).text == ANSWER
        bucket = here.router._roster.deployments["b"].rates.buckets["requests"]
        assert bucket.wait(anyio.current_time(), 1.0) == 0


@pytest.mark.parametrize("seed", range(4))
async def test_many_calls_that_are_cancelled_at_random_moments_leave_nothing_behind(seed: int) -> None:
    chance = Random(seed)
    faults = [Fault("cut", after=2, share=0.1), Fault("status", status=503, share=0.1)]
    two = {"a": "limits = { concurrency = 2 }", "b": "limits = { concurrency = 2 }"}
    scripts = ill(*faults, latency=0.01), ill(*faults, latency=0.02)
    async with world(*scripts, models=two, route=EVERYTHING, ledger=YieldingLedger()) as here:

        async def one(number: int) -> None:
            with anyio.move_on_after(chance.random() * 0.3):
                context = CallContext(priority=chance.choice(["critical", "high", "normal", "low"]))
                await Outcomes().of(lambda: here.ask(ask(f"question {number % 40}"), context=context))

        async with anyio.create_task_group() as group:
            for number in range(80):
                group.start_soon(one, number)
        await here.at_rest()
        for server in here.servers:
            server.faults.clear()
        assert (await here.ask(ask("at last"))).text == ANSWER


async def test_a_probe_that_is_cancelled_does_not_keep_the_breaker_open() -> None:
    gone = Fault("status", status=503)
    async with world(ill(gone), route='patience = "60s"') as here:
        await together(6, lambda _: here.ask(context=CallContext(deadline=0.5)))
        assert here.router.health()["a"].state == "open"
        here.servers[0].faults.clear()
        here.servers[0].faults.add(Fault("hang", times=1))
        before = here.asked()[0]
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(here.ask)
                await until(lambda: here.asked()[0] > before)
                scope.cancel()
        await here.at_rest()
        assert (await here.ask()).text == ANSWER


# --- helpers ----------------------------------------------------------------------------------------------------------


def text_shown(seen: Sequence[Any]) -> str:
    """What a user has before his eyes at the end: what was shown since the last reset."""
    text = ""
    for event in seen:
        if isinstance(event, ModelDelta):
            text += event.text
        elif isinstance(event, ModelReset):
            text = ""
    return text


def json_of(text: str) -> Any:
    import json

    return json.loads(text)


async def test_credit_that_another_worker_has_found_is_believed() -> None:
    """One is told that the account is empty; another is answered later: the first does not wait for its minutes."""
    ledger, question = MemoryLedger(), ModelRequest([{"role": "user", "content": "hi"}])
    script = Script(faults=[Fault("quota", times=1)]).rule(ANSWER)
    async with SimulatedProvider(script) as sim:
        config = parse_config(
            f'[providers.a]\nkind = "openai"\nbase_url = "{sim.base_url}"\n'
            '[models.a]\nprovider = "a"\nmodel = "m"\nprice = { input = 1, output = 1 }\n'
        )
        async with Router.open(config, ledger=ledger) as first, Router.open(config, ledger=ledger) as second:
            with pytest.raises(Unavailable) as caught:
                await first.complete(question, route="a")
            assert caught.value.reason == "quota"
            assert (await second.complete(question, route="a")).text == ANSWER
            await until(lambda: any(state.verdict == "ok" for state in ledger._states.values()))
            await first._knowledge.read()
            assert (await first.complete(question, route="a")).text == ANSWER


async def test_an_answer_from_before_the_account_was_used_up_does_not_open_it() -> None:
    """What another worker was told stays known, although it was answered by the same account shortly before."""
    ledger, question = MemoryLedger(), ModelRequest([{"role": "user", "content": "hi"}])
    async with SimulatedProvider(well()) as sim:
        text = f'[providers.a]\nkind = "openai"\nbase_url = "{sim.base_url}"\n'
        for name in ("one", "two"):
            text += f'[models.{name}]\nprovider = "a"\nmodel = "{name}"\nprice = {{ input = 1, output = 1 }}\n'
        config = parse_config(text)
        async with Router.open(config, ledger=ledger) as first, Router.open(config, ledger=ledger) as second:
            assert (await first.complete(question, route="one")).text == ANSWER
            sim.faults.add(Fault("quota", times=1))
            with pytest.raises(Unavailable):
                await first.complete(question, route="two")
            await until(lambda: [state.quota_reason for state in ledger._states.values()] == ["quota", "quota"])
            await second._knowledge.read()
            await second._knowledge.read()
            with pytest.raises(Unavailable) as caught:
                await second.complete(question, route="one")
            assert caught.value.reason == "quota"


async def test_what_others_know_is_understood_when_the_machine_was_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day has gone on for hours meanwhile: an account that is shut for minutes is not shut for hours."""
    ledger, question = MemoryLedger(), ModelRequest([{"role": "user", "content": "hi"}])
    async with SimulatedProvider(ill(Fault("rate_limit", seconds=30, times=1))) as sim:
        text = f'[providers.a]\nkind = "openai"\nbase_url = "{sim.base_url}"\n'
        config = parse_config(text + '[models.a]\nprovider = "a"\nmodel = "m"\nprice = { input = 1, output = 1 }\n')
        async with Router.open(config, ledger=ledger) as suspended:
            now = time.time
            monkeypatch.setattr(time, "time", lambda: now() + 7200)
            async with Router.open(config, ledger=ledger) as other:
                with pytest.raises(Unavailable):
                    await other.complete(question, route="a")
            await suspended._knowledge.read()
            with pytest.raises(Unavailable) as caught:
                await suspended.complete(question, route="a")
    assert 20 < (caught.value.retry_after or 0) < 40
    assert abs(ledger.attempts[-1].started_at - now() - 7200) < 10


async def test_a_process_that_stood_still_does_not_blame_the_deployment() -> None:
    """Code that blocks the event loop, a machine that was suspended: no answer could have been heard meanwhile."""
    async with world(well(latency=0.2), route="hedge = false") as here:
        await known(here, count=20)

        async def block() -> None:
            await until(lambda: here.router.health()["a"].in_flight == 10)
            time.sleep(1.5)  # noqa: ASYNC251 - that is what it is about

        async with anyio.create_task_group() as group:
            group.start_soon(block)
            found = await together(10, lambda _: here.ask())
            health = here.router.health()["a"]
            assert (len(found.answers), health.state, health.failed) == (10, "closed", 0)


class SluggishLedger(MemoryLedger):
    """A database that takes its time, once it is told to."""

    seconds = 0.0

    async def reserve(self, caps: Sequence[Cap], usd: float, *, now: float, expires_at: float) -> Hold | Refusal:
        await anyio.sleep(self.seconds)
        return await super().reserve(caps, usd, now=now, expires_at=expires_at)


async def test_a_database_that_takes_its_time_does_not_speak_against_the_deployment() -> None:
    """Nothing has been sent before the money is put aside: the deployment cannot have been slow."""
    ledger = SluggishLedger()
    async with world(well(), route=f'patience = "5s"\n{CAP}', ledger=ledger) as here:
        await known(here)
        ledger.seconds = 1.5
        found = await together(10, lambda _: here.ask())
        health = here.router.health()["a"]
        assert (len(found.answers), health.state, health.failed) == (10, "closed", 0)
        assert (health.first_token_p95 or 1.0) < 1.0


async def test_a_key_that_another_worker_uses_is_tried_again() -> None:
    """It was refused, somebody put it right, and one process found out: the others do not wait for their minute."""
    ledger, question = MemoryLedger(), ModelRequest([{"role": "user", "content": "hi"}])
    async with SimulatedProvider(Script(faults=[Fault("auth", times=1)]).rule(ANSWER)) as sim:
        config = parse_config(
            f'[providers.a]\nkind = "openai"\nbase_url = "{sim.base_url}"\n'
            '[models.a]\nprovider = "a"\nmodel = "m"\nprice = { input = 1, output = 1 }\n'
        )
        async with Router.open(config, ledger=ledger) as first, Router.open(config, ledger=ledger) as second:
            with pytest.raises(errors.Auth):
                await first.complete(question, route="a")
            assert (await second.complete(question, route="a")).text == ANSWER
            await until(lambda: any(state.verdict == "ok" for state in ledger._states.values()))
            await first._knowledge.read()
            with pytest.raises(errors.Auth):  # theirs may be another key: not at once
                await first.complete(question, route="a")
            first._roster.deployment("a").credential.refused_at -= KEY_SECONDS
            await first._knowledge.read()
            assert (await first.complete(question, route="a")).text == ANSWER


@pytest.mark.parametrize("share", [1.3, 1.9])
async def test_a_provider_that_counts_more_tokens_than_we_do_passes_no_cap(share: float) -> None:
    """The input is undercounted, call after call: that must not add up."""
    question = ModelRequest([{"role": "user", "content": "x" * 4000}], max_tokens=10)
    billed = int(share * sum(message.tokens for message in question.messages))
    ledger = MemoryLedger()
    async with SimulatedProvider(Script().rule(Answer("ok", input_tokens=billed, output_tokens=10))) as sim:
        config = parse_config(
            f'[providers.a]\nkind = "openai"\nbase_url = "{sim.base_url}"\n'
            '[models.a]\nprovider = "a"\nmodel = "m"\nprice = { input = 10, output = 40 }\n'
            '[[budgets]]\nscope = "total"\nusd = 1.0\nper = "month"\n'
        )
        async with Router.open(config, ledger=ledger) as router:
            refused: list[Unavailable] = []

            async def ask() -> None:
                while not refused:
                    try:
                        await router.complete(question, route="a")
                    except Unavailable as error:
                        refused.append(error)

            async with anyio.create_task_group() as group:
                for _ in range(20):
                    group.start_soon(ask)
    one = billed * 10 / 1e6 + 10 * 40 / 1e6
    spent = sum(record.cost_usd or 0.0 for record in ledger.attempts)
    assert {error.reason for error in refused} == {"budget"}
    assert 1.0 - 25 * one < spent <= 1.0 + one
