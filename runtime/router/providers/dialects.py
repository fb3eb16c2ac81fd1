"""Where the imitators of Chat Completions differ from their model, as data.

A dialect is known by the server's host name, or named in the configuration (``dialect = "vllm"``) where that tells
nothing, as for most servers of one's own. Within a dialect, models differ too; ``Quirks.models`` holds what a model's
name changes. Each row says what a server refuses or needs, from its documentation or from what it answered; whatever
is not known to differ is left as the inventor's server has it, since most servers ignore what they do not know.

Azure has two forms. The newer is OpenAI's own, below ``https://X.openai.azure.com/openai/v1``. Of the older,
``https://X.openai.azure.com/openai/deployments/D?api-version=V`` is the base URL: calls are made at the path below it
and with its query, the deployment is what the URL names, and ``model`` is not read there, so it may be the model's true
name, by which its quirks are known. What a version does not know yet it refuses (``_AZURE_VERSIONS``).

An unknown server gets back what reasoning it gave, under the names it gave it. The alternative, never to send any,
breaks the models that think between tool calls, and they are most of those that people serve themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import parse_qs, urlsplit

from ridethrough.runtime.config import nearest
from ridethrough.runtime.errors import ConfigError

T = TypeVar("T")


class Effort(NamedTuple):
    """How an effort is asked for: its name at this server, and the fields of the body."""

    sent: str
    fields: Mapping[str, Any]


Efforts = dict[str, Effort]
"""By canonical effort; one that is not there is left out of the request, with a note."""


LEVELS = ("none", "minimal", "low", "medium", "high", "xhigh")


def _levels(names: str, **always: Any) -> Efforts:
    """Return the efforts that ``names`` gives for ``LEVELS``, in their order; ``-`` leaves one out."""
    pairs = zip(LEVELS, names.split(), strict=True)
    return {level: Effort(name, {"reasoning_effort": name, **always}) for level, name in pairs if name != "-"}


_ANY = _levels("none minimal low medium high xhigh")
_THREE = _levels("- low low medium high high")
_NO_EFFORT: Efforts = {}


def _template(**switch: Any) -> dict[str, Any]:
    """Return arguments of the chat template, by which servers of open weights turn thinking on and off."""
    return {"chat_template_kwargs": switch}


@dataclass(frozen=True)
class Quirks:
    """Where a server differs.

    ``credential`` is the header that carries the key; ``max_tokens_key`` caps the output; ``stream_options`` says
    whether the server takes them (others always send their usage); ``temperature`` whether it takes one
    (``unreasoning``: only when it was not told to reason); ``system_role`` is the role of instructions; ``body`` are
    fields that every request has.

    ``schema`` is the best way to ask for structured output: by JSON Schema, as any JSON object with the schema in the
    instructions, or by instructions alone; ``schema_alone`` says that a schema excludes tools and streaming, and
    ``strict`` whether strict decoding may be asked for. ``named_choice``: a single tool can be demanded by name.

    ``images``: ``any``, ``inline`` (no URLs) or ``none``. ``call_id`` is what an id of a tool call must look like.
    ``bridge`` is the assistant's line between a tool's result and a user's message, for servers that insist on one.
    ``refusal``: the server knows refusals by that field; to others they are text.

    ``reasoning_back`` says when reasoning returns to the server that gave it: ``always``, with ``calls`` only, or
    ``never``; ``reasoning_keys`` is the field that holds it (the first that is there; all when empty), and
    ``reasoning_demanded`` one that a message with calls must have, be it empty. ``items`` are other fields of its
    answers that a server wants back.
    """

    name: str = ""
    credential: Literal["bearer", "api-key"] = "bearer"
    max_tokens_key: str = "max_tokens"
    stream_options: bool = True
    temperature: Literal["always", "unreasoning", "never"] = "always"
    system_role: str = "system"
    body: Mapping[str, Any] = field(default_factory=dict[str, Any])
    efforts: Efforts = field(default_factory=lambda: _ANY)
    schema: Literal["json_schema", "json_object", "instructions"] = "json_schema"
    schema_alone: bool = False
    strict: bool = True
    named_choice: bool = True
    images: Literal["any", "inline", "none"] = "any"
    call_id: re.Pattern[str] | None = None
    bridge: str = ""
    refusal: bool = False
    reasoning_back: Literal["always", "calls", "never"] = "always"
    reasoning_keys: tuple[str, ...] = ()
    reasoning_demanded: str = ""
    items: tuple[str, ...] = ()
    models: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def of(self, model: str) -> Quirks:
        """Return the quirks of one model: the first pattern of ``models`` that its name matches changes them."""
        name = model.lower()
        changes = next((changes for pattern, changes in self.models if fnmatchcase(name, pattern)), None)
        return self if changes is None else replace(self, models=(), **changes)

    @property
    def of_messages(self) -> str:
        """What of the quirks shows in a rendered message, as a key for what is kept of it."""
        parts = (self.system_role, self.images, self.call_id and self.call_id.pattern, self.bridge, self.refusal)
        reasoning = (self.reasoning_back, self.reasoning_keys, self.reasoning_demanded, self.items)
        return repr((*parts, *reasoning))


# --- what is known --------------------------------------------------------------------------------------------------

_OPENAI_MODELS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    # Models that reason take no temperature, the others no effort. From 5.1 on they need not reason, and can be told.
    (
        "o1-mini*",
        {"temperature": "never", "efforts": _NO_EFFORT, "system_role": "user", "schema": "instructions"},
    ),
    ("o[134]*", {"temperature": "never", "efforts": _THREE}),
    ("gpt-5*-chat*", {"efforts": _NO_EFFORT}),
    ("gpt-5.1-codex-max*", {"temperature": "unreasoning", "efforts": _levels("none low low medium high xhigh")}),
    ("gpt-5.1*", {"temperature": "unreasoning", "efforts": _levels("none low low medium high high")}),
    ("gpt-5.*", {"temperature": "unreasoning", "efforts": _levels("none low low medium high xhigh")}),
    ("gpt-5*", {"temperature": "never", "efforts": _levels("minimal minimal low medium high high")}),
    ("gpt-[34]*", {"efforts": _NO_EFFORT}),
    ("chatgpt-*", {"efforts": _NO_EFFORT}),
)

_OPENAI = Quirks(
    name="openai",
    max_tokens_key="max_completion_tokens",
    call_id=re.compile(r".{1,40}", re.S),  # longer ones are refused
    refusal=True,
    reasoning_back="never",  # this wire of theirs shows none
    models=_OPENAI_MODELS,
)

_GROQ_GPT_OSS: Mapping[str, Any] = {"efforts": _THREE}
_GROQ_QWEN: Mapping[str, Any] = {
    # Without a format its thoughts would stand in the text; it can only be told whether to think.
    "body": {"reasoning_format": "parsed"},
    "efforts": _levels("none default default default default default"),
    "schema": "json_object",
}

_VLLM = Quirks(
    name="vllm",
    efforts=_levels("- low low medium high high") | {"none": Effort("none", _template(enable_thinking=False))},
)

_THINKING_ON = {"thinking": {"type": "enabled"}}
_THINKING_OFF = {"none": Effort("none", {"thinking": {"type": "disabled"}})}

DIALECTS: Mapping[str, Quirks] = {
    "openai": _OPENAI,
    "azure": replace(_OPENAI, name="azure", credential="api-key"),
    "vllm": _VLLM,
    "sglang": replace(_VLLM, name="sglang"),
    # It fetches no images itself.
    "ollama": Quirks(name="ollama", efforts=_levels("none low low medium high high"), images="inline"),
    "llama.cpp": Quirks(
        name="llama.cpp",
        efforts={
            "none": Effort("none", _template(enable_thinking=False)),
            "minimal": Effort("low", _template(reasoning_effort="low")),
            "low": Effort("low", _template(reasoning_effort="low")),
            "medium": Effort("medium", _template(reasoning_effort="medium")),
            "high": Effort("high", _template(reasoning_effort="high")),
            "xhigh": Effort("high", _template(reasoning_effort="high")),
        },
        named_choice=False,
    ),
    # It refuses fields that it does not know, and structured output together with tools or streaming.
    "groq": Quirks(
        name="groq",
        max_tokens_key="max_completion_tokens",
        efforts=_NO_EFFORT,
        schema="json_object",
        schema_alone=True,
        strict=False,
        reasoning_back="calls",
        reasoning_keys=("reasoning",),
        models=(
            ("openai/gpt-oss*", {**_GROQ_GPT_OSS, "schema": "json_schema", "strict": True}),
            ("qwen/*", _GROQ_QWEN),
            ("moonshotai/*", {"schema": "json_schema"}),
            ("meta-llama/llama-4*", {"schema": "json_schema"}),
        ),
    ),
    # It refuses unknown fields, long ids, and a user who speaks right after a tool.
    "mistral": Quirks(
        name="mistral",
        stream_options=False,
        efforts=_NO_EFFORT,
        call_id=re.compile(r"[A-Za-z0-9]{9}"),
        bridge="Understood.",
        reasoning_keys=("thinking",),
        models=(
            ("mistral-small*", {"efforts": _levels("none high high high high high")}),
            ("mistral-medium*", {"efforts": _levels("none high high high high high")}),
        ),
    ),
    # Of its two forms of reasoning the detailed one has the signatures that other providers' models insist on.
    "openrouter": Quirks(
        name="openrouter",
        efforts={level: Effort(level, {"reasoning": {"effort": level}}) for level in LEVELS},
        refusal=True,
        reasoning_keys=("reasoning_details", "reasoning"),
        items=("annotations",),
    ),
    # After a call of a tool its reasoning is demanded, and read nowhere else. Efforts as its own table maps them.
    "deepseek": Quirks(
        name="deepseek",
        efforts=_levels("- low low high high high", **_THINKING_ON) | _THINKING_OFF,
        schema="json_object",
        strict=False,
        images="none",
        reasoning_back="calls",
        reasoning_keys=("reasoning_content",),
        reasoning_demanded="reasoning_content",
    ),
    "xai": Quirks(
        name="xai",
        max_tokens_key="max_completion_tokens",
        reasoning_back="never",
        models=(
            ("grok-3-mini*", {"efforts": _levels("low low low high high high")}),
            ("grok-3*", {"efforts": _NO_EFFORT}),
            ("grok-4-*", {"efforts": _NO_EFFORT}),
            ("grok-4", {"efforts": _NO_EFFORT}),
            ("grok-code*", {"efforts": _NO_EFFORT}),
        ),
    ),
    "together": Quirks(
        name="together",
        efforts=_levels("- low low medium high high") | {"none": Effort("none", {"reasoning": {"enabled": False}})},
    ),
    "cerebras": Quirks(
        name="cerebras",
        max_tokens_key="max_completion_tokens",
        efforts=_levels("none low low medium high high"),
        reasoning_keys=("reasoning",),
    ),
    "zai": Quirks(
        name="zai",
        efforts=_levels("- low low medium high high", **_THINKING_ON) | _THINKING_OFF,
        schema="json_object",
        strict=False,
        models=(
            ("glm-4*", {"efforts": {level: Effort("enabled", _THINKING_ON) for level in LEVELS[1:]} | _THINKING_OFF}),
        ),
    ),
}
"""The dialects by the name that ``dialect`` takes in the configuration."""

_HOSTS: Mapping[str, str] = {
    "api.openai.com": "openai",
    "openai.azure.com": "azure",
    "cognitiveservices.azure.com": "azure",
    "services.ai.azure.com": "azure",
    "api.groq.com": "groq",
    "api.mistral.ai": "mistral",
    "openrouter.ai": "openrouter",
    "api.deepseek.com": "deepseek",
    "api.x.ai": "xai",
    "api.together.xyz": "together",
    "api.together.ai": "together",
    "api.cerebras.ai": "cerebras",
    "api.z.ai": "zai",
    "open.bigmodel.cn": "zai",
}
"""Host names, or the ends of some, and who answers there."""

_AZURE_VERSIONS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    (
        "2024-09-01",
        {"max_tokens_key": "max_tokens", "stream_options": False, "schema": "json_object", "efforts": _NO_EFFORT},
    ),
    ("2024-12-01", {"efforts": _NO_EFFORT}),
)
"""Of the older form: what versions before a date lack. Those that are no date (``preview``) lack nothing."""

_OLLAMA_PORT = ":11434"  # its default, which nothing else uses


def quirks_of(base_url: str, dialect: str | None = None) -> Quirks:
    """Return what is known of the server at ``base_url``, or of the ``dialect`` when one is named.

    Raises:
        ConfigError: There is no such dialect.
    """
    if dialect is not None:
        if dialect.lower() not in DIALECTS:
            raise ConfigError(f"there is no dialect '{dialect}'{nearest(dialect.lower(), DIALECTS)}")
        return _azure(base_url) if dialect.lower() == "azure" else DIALECTS[dialect.lower()]
    name = of_host(base_url, _HOSTS)
    if name is None and urlsplit(base_url).netloc.endswith(_OLLAMA_PORT):
        name = "ollama"
    if name == "azure":
        return _azure(base_url)
    return DIALECTS[name] if name else Quirks()


def _azure(base_url: str) -> Quirks:
    """Return Azure's quirks at the version of its API that a URL names, if it names one."""
    quirks = DIALECTS["azure"]
    version = next(iter(parse_qs(urlsplit(base_url).query).get("api-version", ())), None)
    lacks = next((lacks for until, lacks in _AZURE_VERSIONS if version is not None and version < until), {})
    return replace(quirks, **lacks, models=tuple((names, {**more, **lacks}) for names, more in quirks.models))


def of_host(base_url: str, known: Mapping[str, T]) -> T | None:
    """Return what is ``known`` of a URL's host, by its name or the end of it."""
    host = urlsplit(base_url).hostname or ""
    return next((value for end, value in known.items() if host == end or host.endswith("." + end)), None)
