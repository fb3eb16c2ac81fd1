"""The loop of an agent: ask the model, call the tools it asked for, until it answers.

Every model call and every tool call is a step of the run, so the loop itself keeps nothing that the journal does not
have: a resumed run plays it through and gets each message from the journal. A model step stores only its answer; what
it was asked is a digest that is carried from turn to turn (each message is hashed once), so a turn costs the same at
the hundredth as at the first, in time and in bytes.
"""

from __future__ import annotations

import inspect
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from random import random
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import anyio
from pydantic_core import PydanticSerializationError
from sqlalchemy import Connection

from ridethrough.agents.agent import Agent, AgentResult, RunContext, input_messages, spec_of, transfer_name
from ridethrough.agents.as_tool import AgentTool
from ridethrough.agents.guardrail import Guardrail
from ridethrough.runtime.errors import (
    Auth,
    ConfigError,
    ContentFilter,
    Error,
    GuardrailTripped,
    InvalidOutput,
    LimitExceeded,
    NotFound,
    StoreError,
    Unavailable,
    UsageError,
)
from ridethrough.runtime.events import HandedOff, ModelDelta, ModelReset
from ridethrough.runtime.execution import Blocked, Branch, Execution, Outcome, stand
from ridethrough.runtime.payload import Codec, describe_error, digest_of, preview, storable
from ridethrough.runtime.router.context import CallContext, priority_class
from ridethrough.runtime.router.messages import (
    MESSAGE,
    AssistantMessage,
    Message,
    ModelRequest,
    ModelResponse,
    SystemMessage,
    ToolCall,
    ToolMessage,
    ToolSpec,
    Usage,
    UserMessage,
)
from ridethrough.runtime.threads import run_in_thread
from ridethrough.runtime.waking import latest
from ridethrough.tools.call import (
    Limiters,
    Request,
    ToolResult,
    call_tool,
    process_limiters,
    recorded_result,
    refuse_call,
)
from ridethrough.tools.catalogue import SEARCH_TOOL, Catalogue
from ridethrough.tools.output import READ_TOOL, cap_output, render_output
from ridethrough.tools.schema import ArgumentsInvalid, OutputInvalid, validate_output
from ridethrough.tools.tool import Tool, tool

LONGEST_PAUSE = 60.0
"""Seconds between two looks at models that do not answer."""

PATIENT_AFTER = 2
"""Failed attempts after which a run tries models that were ill only when it is its turn: see ``waking.py``."""

_RESPONSE = Codec(ModelResponse, "a model's answer")
_TEXT = Codec(str, "instructions")
_REASON = Codec(str | None, "the reason of a guardrail")
_POSITION = Codec(int, "the position in a session")
_NAMES = Codec(list[str], "names of tools")

M = TypeVar("M", bound=Message)


def storable_message(message: M) -> M:
    """The message without halves of surrogate pairs, which models do produce and no database stores."""
    try:
        MESSAGE.dump_json(message)
    except PydanticSerializationError:
        return MESSAGE.validate_python(_mended(message.model_dump()))  # type: ignore[return-value]
    return message


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, dict):
        return {_mended(key): _mended(item) for key, item in value.items()}
    return [_mended(item) for item in value] if isinstance(value, list | tuple) else value


class Conversation:
    """One run of an agent, with those it hands over to."""

    def __init__(self, agent: Agent[Any], branch: Branch, deps: Any, session: str | None) -> None:
        """``branch`` is the conversation's own: its steps' paths begin with the agent's name."""
        self.agent = agent
        self.limits = agent.limits
        self.branch = branch
        self.execution: Execution = branch.execution
        self.deps = deps
        self.session = session
        self.messages: list[Message] = []
        self.system: SystemMessage | None = None
        self.usage = Usage()
        self.cost = 0.0
        self.priced = True
        self.turns = self.calls = self.repairs = 0
        self.seconds = 0.0
        self._chain = ""
        self._ids: set[str] = set()
        self._artifacts: set[str] = set()
        self._extra: tuple[Tool[..., Any], ...] = ()
        self._specs: tuple[ToolSpec, ...] = ()
        self._shown: dict[Agent[Any], list[str]] = {}
        self._known = 0
        self._waited = ""
        self._called = self.execution.info.called
        self._waiting_since: dict[str, float] = {}
        if self.limits.seconds is not None and self.execution.timings is None:
            self.execution.timings = {}

    # --- the loop ---------------------------------------------------------------------------------------------------

    async def run(self, input: Any) -> AgentResult[Any]:
        """Go on until the agent has answered."""
        with stand(self.branch):
            await self._begin(input)
            while True:
                response = await self._ask()
                message = self._with_unique_ids(response.message)
                self._append(message)
                if message.tool_calls:
                    await self._call_tools(message)
                    continue
                output, complaint = await self._conclude(response)
                if complaint is None:
                    break
                self._append(UserMessage(content=complaint))
            if self.session is not None:
                await self._save_session(self.session)
        return AgentResult.model_construct(
            output=output,
            messages=self.messages[self._known :],
            usage=self.usage,
            cost_usd=self.cost if self.priced else None,
            agent=self.agent.name,
        )

    async def _begin(self, input: Any) -> None:
        if self.session is not None:
            await self._load_session(self.session)
        self._known = len(self.messages)
        for message in input_messages(input):
            self._append(message)
            if isinstance(message, AssistantMessage):
                self._ids |= {call.id for call in message.tool_calls}
        await self._take_over(self.agent)
        await self._check("input", self._input_text())

    def _input_text(self) -> str:
        return "\n".join(message.text for message in self.messages[self._known :])

    async def _take_over(self, agent: Agent[Any]) -> None:
        """Let ``agent`` speak from here on."""
        self.agent = agent
        self.branch.agent = agent.name
        self.branch.sandbox = agent.sandbox
        text = await self._instructions(agent)
        self.system = SystemMessage(content=text) if text else None
        self._specs = (*await self._own_specs(agent), *map(spec_of, self._extra))
        self._note_specs()

    async def _own_specs(self, agent: Agent[Any]) -> tuple[ToolSpec, ...]:
        """What the agent's model is shown: all its tools, or of a large catalogue those that came to it so far."""
        if agent.tool_search is None:
            return agent.tool_specs
        if agent not in self._shown:
            self._shown[agent] = await self._first_tools(agent)
        shown = [spec_of(agent.tools_by_name[name]) for name in self._shown[agent]]
        return (SEARCH_SPEC, *shown, *agent.transfer_specs)

    def _add_specs(self, *specs: ToolSpec) -> None:
        """Show more tools, after the others: what a provider has cached of the beginning stays good."""
        self._specs += specs
        self._note_specs()

    def _note_specs(self) -> None:
        seen = [self.agent.name, self.system.text if self.system else "", self.agent.output_schema]
        shown = [[spec.name, spec.description, spec.parameters] for spec in self._specs]
        settings = [self.agent.temperature, self.agent.max_tokens, self.agent.reasoning]
        self._extend(json.dumps([seen, shown, settings], sort_keys=True))

    def _extend(self, text: str) -> None:
        self._chain = digest_of(self._chain + text)

    def _append(self, message: Message) -> None:
        message = storable_message(message)
        self.messages.append(message)
        self._extend(MESSAGE.dump_json(message, exclude_defaults=True).decode("utf-8", "surrogatepass"))

    async def _instructions(self, agent: Agent[Any]) -> str:
        given = agent.instructions
        if isinstance(given, str):
            return given

        async def call(_path: str, _outcome: Outcome) -> str:
            text = given(self._context())
            return await text if inspect.isawaitable(text) else text

        return await self.execution.perform(self.branch, "instructions", "function", agent.name, _TEXT, call)  # type: ignore[no-any-return]

    def _context(self) -> RunContext:
        return RunContext(self.execution.run_id, self.agent.name, self.deps, self.execution.services.resources)

    # --- the model --------------------------------------------------------------------------------------------------

    async def _ask(self) -> ModelResponse:
        self._check_limits()
        self.turns += 1
        path = self.branch.next("model")
        last = self.messages[-1] if self.messages else None
        asked = json.dumps([preview(last.text, 120) if last else "", self._chain], ensure_ascii=False)
        response: ModelResponse = await self.execution.perform(
            self.branch, "model", "model", asked, _RESPONSE, self._perform_model, path
        )
        self.usage += response.usage
        self.priced = self.priced and response.cost_usd is not None
        self.cost += response.cost_usd or 0.0
        self.seconds += self._spent([path])
        return response

    async def _perform_model(self, path: str, outcome: Outcome) -> ModelResponse:
        """One answer, however long the models have to be waited for."""
        request = ModelRequest(
            [self.system, *self.messages] if self.system else self.messages,
            tools=self._specs,
            output_schema=self.agent.output_schema,
            temperature=self.agent.temperature,
            max_tokens=self.agent.max_tokens,
            reasoning=self.agent.reasoning,
        )
        try:
            response = await self._patient_answer(request, path)
            self.execution.tried = 0
        finally:
            if path in self.execution.waits or self._waited == path:
                outcome.also = self.execution.closing(path)
        outcome.model, outcome.attempts = response.deployment or response.model or None, response.attempts
        outcome.input_tokens, outcome.output_tokens = response.usage.input_tokens, response.usage.output_tokens
        outcome.cost_usd, outcome.agent = response.cost_usd, self.agent.name
        message = storable_message(response.message)
        return response if message is response.message else response.model_copy(update={"message": message})

    async def _patient_answer(self, request: ModelRequest, path: str) -> ModelResponse:
        while True:
            try:
                return await self._within_limit(self._answer(request, path))
            except Unavailable as error:
                self.execution.tried += len(error.errors)
                if error.reason != "budget" and not await self._may_pause():
                    raise
                self._called = await self._wait_for_models(path, error)
            except (Auth, ConfigError) as error:
                if not isinstance(self.agent.model, str):
                    raise
                await self._wait_for_mending(path, error)

    async def _wait_for_mending(self, path: str, error: Auth | ConfigError) -> None:
        """The configuration is wrong: a key is not set or refused, a route is not there. Pause until it is mended.

        That is no answer of the model, so nothing is recorded, and a person has to see to it. A key that was refused is
        tried again now and then by one run, so that all go on without a word when it has been mended at the provider.
        """
        execution, text = self.execution, preview(str(error), 500)
        now, awaits = execution.services.clock.now(), error.awaits if isinstance(error, Auth) else ""
        expected = now + (error.retry_after or 0.0) if isinstance(error, Auth) and awaits else None
        if path in execution.waits or self._waited == path:
            await self._note_wait(path, "configuration", expected, text)
        else:
            await execution.open_wait(path, "model", "configuration", expected, question=text)
        self._waited = path
        if awaits:
            execution.services.stir()
        due = latest(now) if awaits else None
        await execution.block(Blocked(path, "model", "configuration", due, awaits=awaits, expected_at=expected))

    async def _within_limit(self, answer: Awaitable[ModelResponse]) -> ModelResponse:
        if self.limits.seconds is None:
            return await answer
        with anyio.move_on_after(max(0.0, self.limits.seconds - self.seconds)):
            return await answer
        raise self._exceeded("seconds", self.limits.seconds)

    async def _answer(self, request: ModelRequest, path: str) -> ModelResponse:
        model = self.agent.model
        if not isinstance(model, str):
            said = await model(request)
            return ModelResponse(message=AssistantMessage(content=said)) if isinstance(said, str) else said
        router = await self.execution.services.router()
        context = self._call_context(path)
        listener = self._listener(path) if self.execution.watchers else None
        return await router.complete(request, route=model, context=context, listener=listener)  # type: ignore[no-any-return]

    def _listener(self, path: str) -> Callable[[ModelDelta | ModelReset], None]:
        """What tells those who watch the run of text as it comes, and of what turns void."""
        execution, agent = self.execution, self.agent.name

        def tell(event: ModelDelta | ModelReset) -> None:
            update = {"run_id": execution.run_id, "path": path, "seq": execution.seq}
            named = {"agent": agent} if isinstance(event, ModelDelta) else {}
            execution.publish(event.model_copy(update={**update, **named}))

        return tell

    def _call_context(self, path: str) -> CallContext:
        info = self.execution.info
        return CallContext(
            tenant=info.tenant,
            labels=info.labels,
            workflow=info.workflow,
            agent=self.agent.name,
            run_id=info.id,
            path=path,
            priority=self.agent.priority or priority_class(info.priority),
            floor=self.agent.floor,
            behind=self.execution.tried >= PATIENT_AFTER and not self._called,
        )

    async def _may_pause(self) -> bool:
        if not isinstance(self.agent.model, str):
            return False
        router = await self.execution.services.router()
        return "pause" in router.route(self.agent.model).otherwise

    async def _note_wait(self, path: str, reason: str, due: float | None, text: str) -> None:
        store, run_id = self.execution.services.store, self.execution.run_id
        changes = {"name": reason, "due_at": due, "question": text}
        await self.execution.do(lambda connection: store.update_wait(connection, run_id, path, **changes))

    async def _wait_for_models(self, path: str, error: Unavailable) -> bool:
        """No model answers: block this branch until another try is worth it. The run may be parked meanwhile.

        Where the router names a condition, that wakes the branch (see ``waking.py``), and a time only at the very
        latest. Where it does not, it was this call's bad luck, and a moment's wait is all that is needed.
        """
        execution, reason = self.execution, error.reason
        now, known = execution.services.clock.now(), execution.waits.get(path)
        since = known.since if known is not None else self._waiting_since.setdefault(path, now)
        expected: float | None = None if error.retry_after is None else now + error.retry_after
        if error.awaits:
            due = latest(now)
        else:
            rest = max(error.retry_after or 0.0, min(LONGEST_PAUSE, max(1.0, (now - since) / 2)))
            due = expected = now + rest * (1.0 + 0.25 * random())
        told = preview(error.message, 500)
        if known is None and self._waited != path:
            await execution.open_wait(path, "model", reason, expected, question=told)
        else:
            await self._note_wait(path, reason, expected, told)
        self._waited = path
        if error.awaits:
            execution.services.stir()
        wait = Blocked(path, "model", reason, due, awaits=error.awaits, expected_at=expected)
        return await execution.block(wait)

    # --- limits -----------------------------------------------------------------------------------------------------

    def _check_limits(self) -> None:
        """Before each turn.

        Raises:
            LimitExceeded: one is used up.
        """
        limits, tokens = self.limits, self.usage.input_tokens + self.usage.output_tokens
        for name, used, allowed in (
            ("turns", self.turns, limits.turns),
            ("tokens", tokens, limits.tokens),
            ("usd", self.cost, limits.usd),
            ("seconds", self.seconds, limits.seconds),
        ):
            if allowed is not None and used >= allowed:
                raise self._exceeded(name, allowed)
        if limits.usd is not None and not self.priced:
            raise LimitExceeded(
                f"Agent {self.agent.name} has a limit of {limits.usd} USD, but the price of its model is not known. "
                f"Set models.NAME.price in the configuration, or take the limit off.",
                "usd",
                limits.usd,
            )

    def _exceeded(self, name: str, allowed: float) -> LimitExceeded:
        return LimitExceeded(
            f"Agent {self.agent.name} has used up its limit of {allowed:g} {name.replace('_', ' ')} without an answer. "
            f"Raise Limits({name}=...), or give it a smaller task.",
            name,
            allowed,
        )

    def _spent(self, paths: list[str]) -> float:
        """Seconds from the first start to the last end of these steps; 0 where nobody counts."""
        timings = self.execution.timings
        if timings is None:
            return 0.0
        spans = [timings.pop(path) for path in paths if path in timings]
        return max(end for _, end in spans) - min(start for start, _ in spans) if spans else 0.0

    # --- tools ------------------------------------------------------------------------------------------------------

    def _with_unique_ids(self, message: AssistantMessage) -> AssistantMessage:
        """Some providers repeat call ids; an answer must belong to one call of the conversation."""
        calls = []
        for call in message.tool_calls:
            name, count = call.id or "call", 1
            while name in self._ids:
                count += 1
                name = f"{call.id or 'call'}-{count}"
            self._ids.add(name)
            calls.append(call if name == call.id else call.model_copy(update={"id": name}))
        same = all(old is new for old, new in zip(message.tool_calls, calls, strict=True))
        return message if same else message.model_copy(update={"tool_calls": tuple(calls)})

    async def _call_tools(self, message: AssistantMessage) -> None:
        """Answer all calls of one turn, in the order in which the model asked."""
        self.calls += len(message.tool_calls)
        if self.limits.tool_calls is not None and self.calls > self.limits.tool_calls:
            raise self._exceeded("tool_calls", self.limits.tool_calls)
        targets = {transfer_name(agent): agent for agent in self.agent.handoffs}
        turn = Limiters()
        paths = [self.branch.next(_path_name(call.name)) for call in message.tool_calls]
        jobs = {
            index: (f"{path}/", self._job(call, path, turn))
            for index, (call, path) in enumerate(zip(message.tool_calls, paths, strict=True))
            if call.name not in targets
        }
        results = dict(zip(jobs, await self._perform_calls(list(jobs.values())), strict=True))
        self.seconds += self._spent(paths)
        target: Agent[Any] | None = None
        for index, (call, path) in enumerate(zip(message.tool_calls, paths, strict=True)):
            if call.name in targets:
                results[index] = await self._hand_over(call, path, None if target else targets[call.name])
                target = target or targets[call.name]
            result = results[index]
            self._append(
                ToolMessage(tool_call_id=call.id, name=call.name, content=result.shown, is_error=result.is_error)
            )
        self._load_tools(message.tool_calls, results)
        self._offer_artifacts(results.values())
        if target is not None:
            await self._take_over(target)

    async def _perform_calls(self, jobs: list[tuple[str, Callable[[], Awaitable[ToolResult]]]]) -> list[ToolResult]:
        if len(jobs) == 1:
            return [await jobs[0][1]()]
        group = f"{self.branch.prefix}turn{self.turns}"
        limit = self.agent.tool_concurrency
        results = await self.execution.concurrently(self.branch, group, jobs, limit=limit, on_error="collect")
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def _job(self, call: ToolCall, path: str, turn: Limiters) -> Callable[[], Awaitable[ToolResult]]:
        arguments: Any = call.arguments if call.arguments is not None else call.raw or ""
        found = self.agent.tools_by_name.get(call.name)
        found = found or next((item for item in self._extra if item.name == call.name), None)
        if isinstance(found, AgentTool):
            return lambda: self._call_agent(found, arguments, path)
        if isinstance(found, Tool):
            request = Request(found, arguments, path, self.branch, call.error)
            return lambda: call_tool(self.branch, request, self.deps, turn, process_limiters())
        if call.name == SEARCH_TOOL and self.agent.tool_search is not None:
            return lambda: self._search_tools(arguments, path)
        known = ", ".join(spec.name for spec in self._specs) or "none"
        others = "" if self.agent.tool_search is None else f" {SEARCH_TOOL} finds others."
        text = f"There is no tool {preview(call.name)!r}. Tools: {known}.{others}"
        return lambda: refuse_call(self.branch, path, _path_name(call.name), arguments, NotFound(text))

    # --- large catalogues -------------------------------------------------------------------------------------------

    async def _first_tools(self, agent: Agent[Any]) -> list[str]:
        """What the model is shown before it has searched: chosen once, and on record as it was chosen.

        The choice is a step, because another version of SQLite (or of us) may rank otherwise.
        """
        search = agent.tool_search
        assert search is not None
        said = [
            call.name
            for message in self.messages
            if isinstance(message, AssistantMessage)
            for call in message.tool_calls
        ]

        async def call(_path: str, _outcome: Outcome) -> list[str]:
            used = [name for name in dict.fromkeys(reversed(said)) if name in agent.tools_by_name]
            fitting = (await _catalogue_of(agent)).search(self._input_text(), search.show)
            return list(dict.fromkeys([*search.always_names, *used[: search.show], *fitting]))

        names = await self.execution.perform(self.branch, "tools", "function", agent.name, _NAMES, call)
        return [name for name in names if name in agent.tools_by_name]

    async def _search_tools(self, arguments: Any, path: str) -> ToolResult:
        """Find tools for the model. What was found is on record beside the text, and shown from the next turn on."""
        asked = json.dumps(arguments, sort_keys=True, ensure_ascii=False, default=str)
        execution, digest = self.execution, digest_of(asked)
        row = execution.recorded(path, "tool", digest, asked)
        if row is not None:
            return await recorded_result(execution, row)
        await execution.before_live(self.branch, path, "tool", digest)
        started, failure = execution.services.clock.now(), None
        try:
            query = search_tools.parameters.parse(arguments)["query"]
            result = _found_tools(self.agent, await _catalogue_of(self.agent), query)
        except ArgumentsInvalid as error:
            result, failure = ToolResult(content=storable(preview(str(error), 2000)), is_error=True), error
        outcome = Outcome(agent=self.agent.name)
        await execution.record(
            path, SEARCH_TOOL, "tool", digest, asked, started, outcome, result.model_dump_json(), failure
        )
        return result

    def _load_tools(self, calls: Sequence[ToolCall], results: Mapping[int, ToolResult]) -> None:
        """Show what a search has found, and what was called without having been shown: the name was right."""
        if self.agent.tool_search is None:
            return
        known, shown = self.agent.tools_by_name, self._shown[self.agent]
        fresh: dict[str, None] = {}
        for index, call in enumerate(calls):
            names = json.loads(results[index].value or "[]") if call.name == SEARCH_TOOL else [call.name]
            fresh |= dict.fromkeys(name for name in names if name in known and name not in shown)
        if fresh:
            shown += fresh
            self._add_specs(*(spec_of(known[name]) for name in fresh))

    # --- agents as tools, handoffs, artifacts -----------------------------------------------------------------------

    async def _call_agent(self, called: AgentTool, arguments: Any, path: str) -> ToolResult:
        """Run another agent in the place of a tool. Its steps are on record; its answer is one more."""
        asked = json.dumps(arguments, sort_keys=True, ensure_ascii=False, default=str)
        execution, digest = self.execution, digest_of(asked)
        row = execution.recorded(path, "tool", digest, asked)
        if row is not None:
            execution.abandoned.append(f"{path}/")
            return self._paid(await recorded_result(execution, row))
        started = execution.services.clock.now()
        result, failure = await self._agent_result(called, arguments, path)
        outcome = Outcome(agent=self.agent.name)
        await execution.record(
            path, called.name, "tool", digest, asked, started, outcome, result.model_dump_json(), failure
        )
        return self._paid(result)

    def _paid(self, result: ToolResult) -> ToolResult:
        """What a called agent has consumed counts for the one that called it."""
        if result.usage is not None:
            self.usage += result.usage
            self.priced = self.priced and result.cost_usd is not None
            self.cost += result.cost_usd or 0.0
        return result

    async def _agent_result(self, called: AgentTool, arguments: Any, path: str) -> tuple[ToolResult, Exception | None]:
        execution = self.execution
        task = execution.services.current_task()
        conversation: Conversation | None = None
        try:
            text = called.parameters.parse(arguments)["input"]
            inner = Branch(execution, f"{path}/", task, called.agent.name)
            conversation = Conversation(called.agent, inner, self.deps, None)
            answer = await conversation.run(text)
        except (ConfigError, StoreError, UsageError):
            raise  # nothing that a model could act on
        except Exception as error:
            told = storable(preview(f"{called.name} did not answer: {describe_error(error)}", 20_000))
            return _with_spending(ToolResult(content=told, is_error=True), conversation), error
        content = cap_output(render_output(answer.output, called.name), 100_000)[0]
        return _with_spending(ToolResult(content=content), conversation), None

    async def _hand_over(self, call: ToolCall, path: str, target: Agent[Any] | None) -> ToolResult:
        """Record that the conversation goes to another agent (once a turn)."""
        if target is None:
            text = "Only one handoff is possible at a time; this one was not made."
            return await refuse_call(self.branch, path, call.name, call.arguments or {}, Error(text))
        event = HandedOff(path=path, source=self.agent.name, target=target.name)
        text = f"The conversation is with {target.name} now."
        return await refuse_call(self.branch, path, call.name, call.arguments or {}, None, text, event)

    def _offer_artifacts(self, results: Any) -> None:
        """From the first shortened output on, the model gets a tool to read the rest."""
        found = {result.artifact for result in results if result.artifact is not None}
        self._artifacts |= found
        if found and not self._extra:
            self._extra = (self._reader(),)
            self._add_specs(*map(spec_of, self._extra))

    def _reader(self) -> Tool[..., Any]:
        store, artifacts = self.execution.services.store, self._artifacts

        @tool(name=READ_TOOL, effect="read", max_output=40_000)
        async def read_artifact(handle: str, offset: int = 0, limit: int = 20_000) -> str:
            """Read on in an output that was too long to show whole.

            Args:
                handle: The handle named in the shortened output.
                offset: The first character to read, from 0.
                limit: How many characters, at most 40000.
            """
            if handle not in artifacts:
                raise NotFound(f"There is no artifact {handle!r}. Known: {', '.join(sorted(artifacts))}.")
            data = await store.read(lambda connection: store.payload(connection, handle))
            text = (data or b"").decode("utf-8", "replace")
            return text[max(0, offset) : max(0, offset) + min(limit, 40_000)]

        return read_artifact

    # --- the end ----------------------------------------------------------------------------------------------------

    async def _conclude(self, response: ModelResponse) -> tuple[Any, str | None]:
        """The output, or what to tell the model about why it is none.

        Raises:
            ContentFilter, InvalidOutput, GuardrailTripped: the model will not give one.
        """
        if response.finish == "content_filter":
            raise ContentFilter(f"The answer to agent {self.agent.name} was withheld by the provider's content filter.")
        if response.finish == "length":
            raise InvalidOutput(
                f"The answer of agent {self.agent.name} was cut off at its output limit. Raise max_tokens or ask "
                f"for less."
            )
        text = response.text or response.message.refusal or ""
        try:
            output = text if self.agent.output is str else validate_output(self.agent.output, text)
        except OutputInvalid as error:
            if response.finish == "refusal" or response.message.refusal:
                raise InvalidOutput(f"Agent {self.agent.name}: the model refused: {preview(text)}") from error
            return None, self._repair(
                f"Your answer does not have the required form. {error}\nAnswer again, in that form only.", error
            )
        reason, culprit = await self._refusal("output", output)
        if culprit is None:
            return output, None
        tripped = self._tripped(culprit, reason)
        if not culprit.repair:
            raise tripped
        return None, self._repair(f"Your answer was not accepted: {reason}\nAnswer again.", tripped)

    def _repair(self, complaint: str, error: Exception) -> str:
        self.repairs += 1
        if self.repairs <= self.agent.output_retries:
            return complaint
        if isinstance(error, GuardrailTripped):
            raise error
        raise InvalidOutput(
            f"Agent {self.agent.name} gave no valid output in {self.repairs} attempts. The last: {error}"
        ) from error

    async def _check(self, on: str, value: Any) -> None:
        reason, culprit = await self._refusal(on, value)
        if culprit is not None:
            raise self._tripped(culprit, reason)

    def _tripped(self, culprit: Guardrail, reason: str) -> GuardrailTripped:
        return GuardrailTripped(
            f"Guardrail {culprit.name} refused the {culprit.on} of agent {self.agent.name}: {reason}",
            culprit.name,
            self.agent.name,
        )

    async def _refusal(self, on: str, value: Any) -> tuple[str, Guardrail | None]:
        """The first guardrail that refuses, and why. Each runs as a step."""
        for rail in self.agent.guardrails:
            if rail.on != on:
                continue

            async def call(_path: str, _outcome: Outcome, rail: Guardrail = rail) -> str | None:
                return await rail.reason(self._context(), value)

            asked = json.dumps([rail.name, digest_of(self._chain + on)])
            reason = await self.execution.perform(self.branch, _path_name(rail.name), "function", asked, _REASON, call)
            if reason is not None:
                return reason, rail
        return "", None

    # --- sessions ---------------------------------------------------------------------------------------------------

    async def _load_session(self, name: str) -> None:
        """The conversation so far. Only its length is recorded: its messages never change."""
        store = self.execution.services.store

        async def call(_path: str, _outcome: Outcome) -> int:
            return await store.read(lambda connection: store.session_length(connection, name))

        upto = await self.execution.perform(self.branch, "session", "function", json.dumps(name), _POSITION, call)
        self.messages += await _sessions.read(store, name, upto)
        said = [message for message in self.messages if isinstance(message, AssistantMessage)]
        self._ids |= {call.id for message in said for call in message.tool_calls}
        self._extend(json.dumps([name, upto]))

    async def _save_session(self, name: str) -> None:
        """Add this run's messages, in the transaction of the step that says so."""
        store, run_id = self.execution.services.store, self.execution.run_id
        messages = self.messages[self._known :]
        fresh = [MESSAGE.dump_json(message).decode("utf-8", "surrogatepass") for message in messages]
        path, ends = self.branch.prefix, [0]

        def append(connection: Connection) -> None:
            ends[0] = store.append_session(connection, name, run_id, path, fresh)

        async def call(_path: str, outcome: Outcome) -> int:
            outcome.also = append
            return len(fresh)

        asked = json.dumps([name, self._chain])
        await self.execution.perform(self.branch, "session-save", "function", asked, _POSITION, call)
        _sessions.extend(store, name, ends[0], messages)


class _Sessions:
    """Messages of sessions that this process has read: they never change, so each is read and parsed once."""

    KEPT = 256

    def __init__(self) -> None:
        self._stores: WeakKeyDictionary[Any, OrderedDict[str, list[Message]]] = WeakKeyDictionary()

    async def read(self, store: Any, name: str, upto: int) -> list[Message]:
        """The first ``upto`` messages of a session."""
        sessions = self._stores.setdefault(store, OrderedDict())
        known = sessions.setdefault(name, [])
        sessions.move_to_end(name)
        while len(sessions) > self.KEPT:
            sessions.popitem(last=False)
        if len(known) < upto:
            have = len(known)
            rows = await store.read(lambda connection: store.session(connection, name, have, upto))
            fresh = [MESSAGE.validate_json(row.message) for row in rows]
            if len(known) == have:  # nobody else has read on meanwhile
                known += fresh
        return known[:upto]

    def extend(self, store: Any, name: str, end: int, messages: list[Message]) -> None:
        """Remember messages that have just been stored as the last ones up to position ``end``."""
        known = self._stores.get(store, OrderedDict()).get(name)
        if known is not None and len(known) == end - len(messages):
            known += messages


_sessions = _Sessions()


def _with_spending(result: ToolResult, conversation: Conversation | None) -> ToolResult:
    """The result of a called agent, with what it has consumed (nothing, if it never began)."""
    if conversation is None:
        return result
    cost = conversation.cost if conversation.priced else None
    return result.model_copy(update={"usage": conversation.usage, "cost_usd": cost})


@tool(name=SEARCH_TOOL, effect="read")
async def search_tools(query: str) -> str:
    """Find tools. You have many more tools than you are shown; those that are found can be called from then on.

    Args:
        query: What the tool should do, or its name, in a few words.
    """
    raise NotFound(f"The catalogue belongs to an agent; {SEARCH_TOOL} is called by its model ({query!r}).")


SEARCH_SPEC = spec_of(search_tools)


async def _catalogue_of(agent: Agent[Any]) -> Catalogue:
    """The agent's index. It is made once, in a thread: of a thousand tools it takes 20 ms, of more it takes more."""
    if "catalogue" in vars(agent):
        return agent.catalogue
    return await run_in_thread(lambda: agent.catalogue)


def _found_tools(agent: Agent[Any], catalogue: Catalogue, query: str) -> ToolResult:
    """The answer to a search, with the names that were found as its value."""
    assert agent.tool_search is not None
    names = catalogue.search(query, agent.tool_search.show)
    if not names:
        begin = ", ".join(catalogue.families())
        text = f"No tool fits {preview(query, 200)!r}. Say it in other words. Names of tools begin with: {begin}."
        return ToolResult(content=storable(text), value="[]")
    lines = [f"- {name}: {preview(' '.join(agent.tools_by_name[name].description.split()), 200)}" for name in names]
    text = "You can call these now:\n" + "\n".join(lines)
    return ToolResult(content=storable(text), value=json.dumps(names))


def _path_name(name: str) -> str:
    """What the model called, as part of a path."""
    return "".join(letter if letter.isalnum() or letter in "_-.:" else "_" for letter in name)[:80] or "unnamed"
