"""Large catalogues of tools: which few a model is shown, and how it finds the others.

A hundred tools cost a model's attention and money at every turn; a thousand fit no request. So above a threshold a
model gets the few that fit its task and a tool with which it searches the rest. What was found is shown from then on:
tools are only ever added, at the end, because providers cache prompts by their beginning.

The index is SQLite's FTS5 in memory: there already, in C, and a thousand tools are searched in less than a
millisecond. Embeddings would find more synonyms, at the price of a call to a provider (or a model in this process)
before each turn and of choices that nobody can explain; a model that finds nothing says it in other words.
"""

from __future__ import annotations

import re
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ridethrough.runtime.errors import ConfigError
from ridethrough.runtime.payload import storable
from ridethrough.tools.schema import ParameterSchema

SEARCH_TOOL: Final = "search_tools"
"""The name of the tool that searches."""

MAX_TERMS: Final = 48
"""Words of a query that are looked for: the first and the last ones, where a long text says what it wants."""

MAX_QUERY: Final = 8_000
"""Characters of a query that are read: its beginning and its end."""

COMMON: Final = frozenset(
    re.findall(
        r"\w+",
        "a about all also an and any are as at be but by can could do does for from get give has have how i if in into "
        "is it its let me my need no not of on one or our please should so some tell than that the their them then "
        "there this to tool tools up us use using want was we what when where which who will with would you your",
    )
)
"""Words that say nothing about which tool is meant."""

_WEIGHTS: Final = (8.0, 3.0, 1.0)
"""Of a word in the name, in the description, among the parameters."""


class Described(Protocol):
    """What is searched: a ``Tool``, or an agent in the place of one."""

    @property
    def name(self) -> str:
        """What the model calls it."""
        ...

    @property
    def description(self) -> str:
        """What the model is told about it."""
        ...

    @property
    def parameters(self) -> ParameterSchema:
        """What it may be given."""
        ...


@dataclass(frozen=True, slots=True)
class ToolSearch:
    """When an agent's tools are searched instead of being sent whole.

    Attributes:
        threshold: With more tools than this, the model is shown a few and the tool ``search_tools``.
        show: How many tools are shown at first, and how many a search finds.
        always: Names of tools (or the tools) that are shown from the start, whatever the task is.
    """

    threshold: int = 40
    show: int = 8
    always: Sequence[str | Described] = ()

    def __post_init__(self) -> None:
        """Refuse what could show nothing."""
        for name, least in (("threshold", 0), ("show", 1)):
            value: object = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"ToolSearch({name}={value!r}): give a whole number from {least}.")

    @classmethod
    def of(cls, wanted: ToolSearch | bool | int) -> ToolSearch | None:
        """What ``Agent(tool_search=...)`` means: ``True`` the defaults, a number the threshold, ``False`` never."""
        if isinstance(wanted, bool):
            return cls() if wanted else None
        return cls(threshold=wanted) if isinstance(wanted, int) else wanted

    @property
    def always_names(self) -> tuple[str, ...]:
        """The names of ``always``."""
        return tuple(item if isinstance(item, str) else item.name for item in self.always)


class Catalogue:
    """An index of tools. It may be used by several threads."""

    def __init__(self, tools: Iterable[Described]) -> None:
        """Read the tools, once.

        Raises:
            ConfigError: this Python's SQLite has no FTS5.
        """
        self.tools: Mapping[str, Described] = {tool.name: tool for tool in tools}
        self._names = list(self.tools)
        self._folded = {name.lower(): name for name in self._names}
        self._lock = threading.Lock()
        self._index = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        weakref.finalize(self, self._index.close)
        self._fill()

    def _fill(self) -> None:
        try:
            self._index.execute(
                "CREATE VIRTUAL TABLE tools USING fts5"
                "(name, description, parameters, tokenize = 'porter unicode61 remove_diacritics 2')"
            )
        except sqlite3.OperationalError as error:
            raise ConfigError(
                f"Tools are searched with SQLite's FTS5, which this Python's SQLite does not have ({error}). Use "
                f"another build of Python, or Agent(tool_search=False), which sends all tools."
            ) from error
        rows = [(number, *_words_of(tool)) for number, tool in enumerate(self.tools.values())]
        with self._index:
            self._index.execute("BEGIN")
            self._index.executemany("INSERT INTO tools(rowid, name, description, parameters) VALUES (?, ?, ?, ?)", rows)

    def search(self, query: str, limit: int) -> list[str]:
        """The names of at most ``limit`` tools that fit the query, best first; any text is a query.

        A tool that is named in it comes first. Ties go by the order of the definition, so that the same question has
        the same answer in every process.
        """
        query = _ends(query)
        named = [self._folded[word] for word in _NAMES.findall(query.lower()) if word in self._folded]
        found = dict.fromkeys([*named, *self._ranked(terms(query), limit)])
        return list(found)[:limit]

    def _ranked(self, wanted: Sequence[str], limit: int) -> list[str]:
        if not wanted:
            return []
        # In quotes a word is a word, whatever it means to FTS5: terms() leaves no quote inside.
        match = " OR ".join(f'"{term}"' for term in wanted)
        with self._lock:
            rows = self._index.execute(
                "SELECT rowid FROM tools WHERE tools MATCH ? ORDER BY bm25(tools, ?, ?, ?), rowid LIMIT ?",
                (match, *_WEIGHTS, limit),
            ).fetchall()
        return [self._names[number] for (number,) in rows]

    def families(self, limit: int = 20) -> list[str]:
        """How names begin, the most frequent beginnings first: what there is, in a line."""
        counts: dict[str, int] = {}
        for name in self._names:
            first = next(iter(split_name(name)), name)
            counts[first] = counts.get(first, 0) + 1
        return sorted(counts, key=lambda first: -counts[first])[:limit]


_NAMES: Final = re.compile(r"[a-z0-9_-]+")
_WORDS: Final = re.compile(r"[^\W_]+")
_BORDERS: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[^\W\d])(?=\d)")


def split_name(name: str) -> list[str]:
    """The words of a name: ``getHTTPStatus_code2`` is ``get HTTP Status code 2``."""
    return [part for word in _WORDS.findall(name) for part in _BORDERS.split(word)]


def terms(query: str) -> list[str]:
    """The words to look for: each once, without those that say nothing."""
    words = [word for word in _WORDS.findall(query) if len(word) <= 64]
    parts = [part.lower() for word in words for part in (word, *split_name(word))]
    wanted = list(dict.fromkeys(part for part in parts if part not in COMMON and _is_word(part)))
    half = MAX_TERMS // 2
    return wanted if len(wanted) <= MAX_TERMS else wanted[:half] + wanted[-half:]


def _is_word(part: str) -> bool:
    return len(part) > 1 or part > "\u2e80"  # in Chinese and Japanese a character may be one


def _ends(text: str) -> str:
    half = MAX_QUERY // 2
    return text if len(text) <= MAX_QUERY else f"{text[:half]} {text[-half:]}"


def _words_of(tool: Described) -> tuple[str, str, str]:
    name = " ".join(dict.fromkeys((tool.name, *split_name(tool.name))))
    return name, storable(tool.description), storable(" ".join(_words_of_schema(tool.parameters.json)))


def _words_of_schema(schema: Any, depth: int = 0) -> list[str]:
    """Names and descriptions of parameters, those inside of parameters too."""
    if not isinstance(schema, Mapping) or depth > 3:
        return []
    found: list[str] = []
    for name, inner in schema.get("properties", {}).items():
        found += [*split_name(name), *_words_of_schema(inner, depth + 1)]
        if isinstance(inner, Mapping):
            found.append(str(inner.get("description", "")))
    return found + _words_of_schema(schema.get("items"), depth + 1)
