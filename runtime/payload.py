"""Values on their way to the journal and back: JSON by pydantic, never pickle.

What a workflow sees on its first run is what it would see on resume: every value that is not trivially JSON is encoded
and decoded at once, so a type that does not survive the journal shows on the first run and not after the first crash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, get_type_hints

from pydantic import BaseModel, PydanticSchemaGenerationError, PydanticUndefinedAnnotation, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from ridethrough.runtime.errors import SerializationError, StepFailed

INLINE_LIMIT = 64 * 1024
"""Payloads above this many characters are stored once, by content hash, beside the row."""

PREVIEW = 200
"""How many characters of a step's input are kept, to show what was recorded when code diverges."""

_TRIVIAL = (str, int, float, bool, type(None))
_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_spaced = json.JSONEncoder(ensure_ascii=False).encode
_escaped = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode


def encode(value: Any, *, spaced: bool = False) -> str:
    """JSON text that every database can hold: half a surrogate pair, which models do produce, is escaped."""
    text = _spaced(value) if spaced else _compact(value)
    return text if text.isascii() or _is_unicode(text) else _escaped(value)


def storable(text: str) -> str:
    """Text that every database can hold: half a surrogate pair is replaced."""
    return text if text.isascii() or _is_unicode(text) else text.encode("utf-8", "replace").decode()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_encode = encode


class Codec:
    """Turns values of one annotated type into JSON text and back."""

    __slots__ = ("_adapter", "_exact", "_where")

    def __init__(self, annotation: Any, where: str) -> None:
        """``where`` names the value in error messages, for example ``result of step fetch``."""
        self._where = where
        self._exact = annotation if annotation in _TRIVIAL else (type(None) if annotation is None else None)
        self._adapter: TypeAdapter[Any] | None = None
        if annotation is not Any and annotation is not inspect.Parameter.empty and self._exact is None:
            self._adapter = self._build(annotation)

    def _build(self, annotation: Any) -> TypeAdapter[Any]:
        try:
            return TypeAdapter(annotation)
        except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation) as error:
            raise SerializationError(
                f"{self._where}: the type {annotation!r} cannot be stored as JSON. Annotate it with plain types, a "
                f"dataclass or a pydantic model, and keep live objects (clients, files) in Runtime.open(resources=...)."
            ) from error

    def is_exactly(self, kind: type) -> bool:
        """Whether the type is this one trivial type, so that a value from JSON needs no conversion."""
        return self._exact is kind or (self._adapter is None and self._exact is None)

    def settle(self, value: Any) -> tuple[str, Any]:
        """The JSON text of ``value``, and the value as a resumed run would see it.

        Raises:
            SerializationError: the value does not survive the journal.
        """
        kind = type(value)
        if kind is self._exact or (self._adapter is None and self._exact is None and kind in _TRIVIAL):
            return _encode(value), value
        text = self.dump(value)
        return text, self.load(text)

    def dump(self, value: Any) -> str:
        """The JSON text of ``value``."""
        if self._adapter is None:
            return self._dump_plain(value)
        try:
            return self._adapter.dump_json(value, warnings="error").decode()
        except (PydanticSerializationError, ValueError) as error:
            raise SerializationError(
                f"{self._where} is a {type(value).__name__}, which does not fit its annotation: {error}. "
                f"Correct the annotation or the value."
            ) from error

    def _dump_plain(self, value: Any) -> str:
        if self._exact is float and type(value) is int:
            value = float(value)  # every type checker lets an int stand for a float
        if self._exact is not None and not isinstance(value, self._exact):
            raise SerializationError(
                f"{self._where} is annotated as {self._exact.__name__} but is a {type(value).__name__}. "
                f"Correct the annotation or the value."
            )
        try:
            return _encode(value)
        except (TypeError, ValueError) as error:
            raise SerializationError(
                f"{self._where} cannot be stored as JSON ({error}). Annotate its type, so that it can be rebuilt on "
                f"resume, or return plain data; keep live objects in Runtime.open(resources=...)."
            ) from error

    def load(self, text: str) -> Any:
        """The value that ``text`` holds."""
        if self._adapter is None:
            return json.loads(text)
        try:
            return self._adapter.validate_json(text)
        except ValidationError as error:
            raise SerializationError(f"{self._where} does not survive the journal: {error}") from error

    def accept(self, data: Any) -> Any:
        """Check plain data from outside (a signal, ``--input``) against the type and convert it."""
        if type(data) is self._exact:
            return data  # also text that pydantic's parser refuses: half a surrogate pair
        adapter = self._adapter or TypeAdapter(Any if self._exact is None else self._exact)
        try:
            return adapter.validate_json(_encode(data))
        except ValidationError as error:
            lines = "; ".join(_validation_line(item) for item in error.errors())
            raise SerializationError(f"{self._where} does not fit: {lines}") from error

    def json_schema(self) -> dict[str, Any]:
        """The JSON Schema of the type (``{}`` where anything goes)."""
        if self._adapter is None:
            return {} if self._exact is None else TypeAdapter(self._exact).json_schema()
        return self._adapter.json_schema()


def _validation_line(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    return f"{where}: {item['msg']}" if where else str(item["msg"])


def resolved_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The function's annotations as types; names that cannot be resolved are left out as ``Any``."""
    try:
        return get_type_hints(function, include_extras=True)
    except Exception:
        return _hints_one_by_one(function)


def _hints_one_by_one(function: Callable[..., Any]) -> dict[str, Any]:
    """Resolve what can be resolved: a function that was defined inside another may name that one's local types."""
    scope = dict(getattr(function, "__globals__", {}))
    scope.update(inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {})
    hints: dict[str, Any] = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        try:
            hints[name] = eval(annotation, scope) if isinstance(annotation, str) else annotation
        except Exception:
            hints[name] = Any
    return hints


@lru_cache(maxsize=4096)
def result_codec(function: Callable[..., Any], name: str) -> Codec:
    """The codec of a function's return annotation."""
    return Codec(resolved_hints(function).get("return", Any), f"the result of {name}")


# --- digests --------------------------------------------------------------------------------------------------------


def digest_of(text: str) -> str:
    """A short stable digest of ``text`` (16 hexadecimal digits of BLAKE2b)."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def content_hash(data: bytes) -> str:
    """The name of a large value: 32 hexadecimal digits of BLAKE2b."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def describe_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The input of a step as canonical JSON text: equal inputs give equal text in every process."""
    if not kwargs and all(type(arg) in _TRIVIAL for arg in args):
        return _encode(args)
    return _encode([canonical(list(args)), canonical(kwargs)] if kwargs else canonical(list(args)))


def canonical(value: Any) -> Any:
    """Plain data that stands for ``value`` and is the same in every process (sets are sorted, live objects named)."""
    if type(value) in _TRIVIAL:
        return value
    if isinstance(value, dict):
        return {str(key): canonical(item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((canonical(item) for item in value), key=_encode)
    if isinstance(value, bytes):
        return "bytes:" + hashlib.blake2b(value, digest_size=8).hexdigest()
    if isinstance(value, BaseModel):
        return {name: canonical(item) for name, item in value}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: canonical(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return _canonical_leaf(value)


def _canonical_leaf(value: Any) -> Any:
    if callable(value):
        return f"<{getattr(value, '__qualname__', type(value).__qualname__)}>"
    try:
        return json.loads(to_json(value))
    except PydanticSerializationError:
        return f"<{type(value).__qualname__}>"


def preview(text: str, limit: int = PREVIEW) -> str:
    """The beginning of ``text``."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


# --- errors ---------------------------------------------------------------------------------------------------------


def dump_error(error: BaseException) -> str:
    """An error as JSON: its class, its arguments and its plain fields, so that the journal can raise it again."""
    cls = type(error)
    return _encode(
        {
            "type": cls.__name__,
            "class": f"{cls.__module__}:{cls.__qualname__}",
            "message": str(error),
            "args": _plain_or(list(error.args), [str(error)]),
            "fields": {key: item for key, item in vars(error).items() if _is_plain(item)},
        }
    )


def load_error(text: str) -> Exception:
    """The error that ``dump_error`` stored: the same class where it can be found, else ``StepFailed``."""
    data = json.loads(text)
    cls = _find_class(data["class"])
    try:
        error = cls.__new__(cls, *data["args"]) if cls is not None else None
    except Exception:  # a class that needs more than its arguments, such as an ExceptionGroup
        error = None
    if error is None:
        return StepFailed(f"{data['type']}: {data['message']}", error_type=data["class"].replace(":", "."))
    error.args = tuple(data["args"])
    vars(error).update(data["fields"])
    return error


def settle_error(error: Exception) -> tuple[str, Exception]:
    """The stored form of ``error``, and the error as a resumed run would see it.

    The original object is kept (with its traceback) wherever its class can be found again.
    """
    text = dump_error(error)
    replayed = load_error(text)
    if type(replayed) is type(error):
        return text, error
    replayed.__cause__ = error
    return text, replayed


def describe_error(error: BaseException) -> str:
    """One line for people: the class, and the message if it has one."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _find_class(name: str) -> type[Exception] | None:
    module_name, _, qualname = name.partition(":")
    try:
        found: Any = sys.modules.get(module_name) or importlib.import_module(module_name)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def _is_plain(value: Any) -> bool:
    try:
        return bool(json.loads(_encode(value)) == value)
    except (TypeError, ValueError):
        return False


def _plain_or(value: list[Any], fallback: list[Any]) -> list[Any]:
    return value if _is_plain(value) else fallback


def error_line(text: str) -> str:
    """A stored error in one line."""
    data = json.loads(text)
    return f"{data['type']}: {data['message']}" if data["message"] else str(data["type"])


def error_summary(text: str) -> dict[str, str]:
    """The part of a stored error that is shown to users: ``{"type", "message"}``."""
    data = json.loads(text)
    return {"type": data["type"], "message": data["message"]}


def load_labels(text: str | None) -> dict[str, str]:
    """The labels of a run."""
    return dict(json.loads(text)) if text else {}
