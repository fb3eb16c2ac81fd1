"""JSON Schema from Python types, and JSON checked against it with complaints that a model can act on.

Two checkers stand in a row. ``jsonschema`` judges what the model was shown, strictly and with exact paths; pydantic
then makes Python values of what passed ("2024-01-01" becomes a date) and applies the rules that no schema can carry.
Pydantic alone would let a model be wrong without learning it (``"5"`` for an integer); ``jsonschema`` alone gives no
typed values. Patterns are left to pydantic: its engine takes linear time on whatever text a model makes up.

``jsonschema`` and ``docstring_parser`` are imported at first use, because most commands never check an argument.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType, SimpleNamespace, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar, Union, get_args, get_origin, overload

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, JsonSchemaWarningKind
from pydantic_core import SchemaError, SchemaValidator, core_schema

from ridethrough.runtime.errors import ConfigError, Error, InvalidOutput
from ridethrough.tools.context import ToolContext

if TYPE_CHECKING:
    from jsonschema import ValidationError as Complaint
    from jsonschema.protocols import Validator

T = TypeVar("T")
Path = Sequence[str | int]
Schema = dict[str, Any]

MAX_ERRORS: Final = 8
MAX_SHOWN: Final = 80
MAX_LISTED: Final = 20
MAX_STARTS: Final = 64
CONTEXT_NAME: Final = "ctx"


# --- errors ---------------------------------------------------------------------------------------------------------


class ArgumentsInvalid(Error, ValueError):
    """The arguments do not fit the tool's parameters."""

    def __init__(self, errors: Sequence[str]) -> None:
        """``errors`` are lines for the model: a JSON path, the rule that is broken, what was given."""
        self.errors: list[str] = list(errors)
        super().__init__("the arguments do not fit the tool's parameters:\n" + "\n".join(self.errors))


class OutputInvalid(InvalidOutput):
    """The answer does not fit the output type.

    This is one answer's failure, for the model to repair; ``InvalidOutput`` itself is the end of all repairs.
    """

    def __init__(self, errors: Sequence[str]) -> None:
        """``errors`` are lines for the model: a JSON path, the rule that is broken, what was given."""
        self.errors: list[str] = list(errors)
        super().__init__("the answer does not fit the output type:\n" + "\n".join(self.errors))


class _Mismatch(Exception):
    """Lines on their way to one of the two public errors."""

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors = _first_lines(errors)


# --- the parameters of a function -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ParameterSchema:
    """What a model may pass to one function.

    Attributes:
        json: JSON Schema (draft 2020-12) of the parameters: an object that allows no unknown properties.
        description: The docstring's text before its sections, ``""`` without a docstring.
        context: The parameter that takes the ``ToolContext``, ``None`` when the function wants none.
        returns: The return annotation, ``Any`` when there is none or it cannot be resolved.
    """

    json: Schema
    description: str
    context: str | None
    returns: Any
    _checker: _Checker = field(repr=False)
    _names: Mapping[str, str] | None = field(repr=False)
    _defaulted: frozenset[str] = field(repr=False)

    @classmethod
    def of(cls, function: Callable[..., Any]) -> ParameterSchema:
        """Read the signature and the docstring (Google, numpy or reST style) of ``function``.

        Raises:
            ConfigError: A model cannot be asked for one of the parameters; the message says what to change.
        """
        return _Reader(function).read()

    @classmethod
    def foreign(
        cls, schema: Mapping[str, Any], *, name: str, description: str = "", context: str | None = None
    ) -> ParameterSchema:
        """Take a JSON Schema that somebody else wrote (an MCP server, an OpenAPI document); arguments stay JSON data.

        Nothing is fetched, and no text that a model makes up meets a pattern that takes for ever.

        Raises:
            ConfigError: It is no JSON Schema of an object, or refers to something outside of itself.
        """
        parameters = _foreign_object(schema, name)
        checker = _ForeignChecker(parameters, TypeAdapter(Any))
        return cls(parameters, description, context, Any, checker, None, frozenset())

    def parse(self, arguments: Mapping[str, Any] | str) -> dict[str, Any]:
        """Return the keyword arguments for the function: typed values, without those that were left to its defaults.

        Raw text is read as JSON; empty text counts as ``{}``, which is what providers send for no arguments.

        Raises:
            ArgumentsInvalid: With one line for each mistake, at most 8.
        """
        try:
            given = _read_object(arguments) if isinstance(arguments, str) else dict(arguments)
            values: Any = self._checker.check(given)
        except _Mismatch as mismatch:
            raise ArgumentsInvalid(mismatch.errors) from None
        if self._names is None:
            return typing.cast(dict[str, Any], values)
        passed = values.model_fields_set
        return {
            name: getattr(values, key)
            for key, name in self._names.items()
            if key in passed or key not in self._defaulted
        }


class _Reader:
    """Reads one function; holds what every error message needs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.plain = _plain_function(function)
        self.name = getattr(function, "__name__", type(function).__name__)
        self.globals: dict[str, Any] = getattr(self.plain, "__globals__", {})
        self.locals = _visible_names(self.plain)

    def read(self) -> ParameterSchema:
        signature = self._signature()
        context, parameters = self._split(list(signature.parameters.values()))
        description, described = _read_docstring(inspect.getdoc(self.plain) or "")
        keys = {f"p{index}": parameter for index, parameter in enumerate(parameters)}
        model = self._model(keys, described)
        schema = self._json(model, parameters)
        return ParameterSchema(
            json=schema,
            description=description,
            context=context,
            returns=self._returns(signature),
            _checker=_Checker(schema, TypeAdapter(model)),
            _names={key: parameter.name for key, parameter in keys.items()},
            _defaulted=frozenset(key for key, parameter in keys.items() if _has_plain_default(parameter)),
        )

    def _refuse(self, text: str) -> ConfigError:
        return ConfigError(f"tool {self.name!r}: {text}")

    def _signature(self) -> inspect.Signature:
        try:
            return inspect.signature(self.function)
        except (TypeError, ValueError) as error:
            raise self._refuse(f"its signature cannot be read ({error}); wrap it in a function of your own") from error

    def _split(self, parameters: list[inspect.Parameter]) -> tuple[str | None, list[inspect.Parameter]]:
        """Separate the context parameter from those that the model fills in."""
        for parameter in parameters:
            self._check_kind(parameter)
        contexts = [parameter.name for parameter in parameters if self._takes_context(parameter)]
        if len(contexts) > 1:
            raise self._refuse(f"{' and '.join(contexts)} both take the ToolContext; keep one of them")
        asked = [parameter for parameter in parameters if parameter.name not in contexts]
        for parameter in asked:
            self._check_annotated(parameter)
        return next(iter(contexts), None), asked

    def _check_kind(self, parameter: inspect.Parameter) -> None:
        match parameter.kind:
            case inspect.Parameter.VAR_POSITIONAL:
                raise self._refuse(
                    f"'*{parameter.name}' has no names that a model could fill in; take a list, for example "
                    f"'{parameter.name}: list[str]'"
                )
            case inspect.Parameter.VAR_KEYWORD:
                raise self._refuse(
                    f"'**{parameter.name}' does not say what a model may pass; name the parameters, or take "
                    f"'{parameter.name}: dict[str, str]'"
                )
            case inspect.Parameter.POSITIONAL_ONLY:
                raise self._refuse(
                    f"{parameter.name!r} is positional-only and tools are called by name; remove the '/'"
                )
            case _:
                return

    def _check_annotated(self, parameter: inspect.Parameter) -> None:
        if parameter.annotation is not inspect.Parameter.empty:
            return
        if parameter.name in ("self", "cls"):
            raise self._refuse("a method is no tool before it is bound; use tool(...)(instance.method)")
        raise self._refuse(
            f"parameter {parameter.name!r} has no type, so a model cannot be told what to pass; annotate it, for "
            f"example '{parameter.name}: str'"
        )

    def _takes_context(self, parameter: inspect.Parameter) -> bool:
        annotation = parameter.annotation
        if parameter.name == CONTEXT_NAME:
            return True
        if isinstance(annotation, str) and "ToolContext" not in annotation:
            return False
        return _is_context(annotation if not isinstance(annotation, str) else self._resolve(parameter.name, annotation))

    def _resolve(self, name: str, annotation: Any) -> Any:
        """Evaluate string annotations, also those inside of others (``list["Item"]``)."""
        holder = SimpleNamespace(__annotations__={name: annotation})
        try:
            return typing.get_type_hints(holder, self.globals, self.locals, include_extras=True)[name]
        except NameError as error:
            raise self._refuse(
                f"the type of {name!r}, {annotation!r}, is not known here ({error}); define or import it before the "
                "tool and outside of 'if TYPE_CHECKING'"
            ) from error
        except (TypeError, SyntaxError) as error:
            raise self._refuse(f"the annotation of {name!r}, {annotation!r}, is no type ({error})") from error

    def _returns(self, signature: inspect.Signature) -> Any:
        if signature.return_annotation is inspect.Signature.empty:
            return Any
        try:
            return self._resolve("return", signature.return_annotation)
        except ConfigError:
            return Any

    def _model(self, keys: Mapping[str, inspect.Parameter], described: Mapping[str, str]) -> type[BaseModel]:
        """Make the pydantic model; neutral field names keep parameters like ``schema`` from shadowing its methods."""
        fields: dict[str, Any] = {
            key: self._field(parameter, described.get(parameter.name)) for key, parameter in keys.items()
        }
        config = ConfigDict(extra="forbid", defer_build=True, protected_namespaces=())
        try:
            model: type[BaseModel] = create_model(self.name, __config__=config, **fields)
            model.model_rebuild(force=True, _types_namespace={**self.globals, **self.locals})
        except (PydanticUserError, PydanticUndefinedAnnotation) as error:
            raise self._blame(list(keys.values()), error) from error
        return model

    def _field(self, parameter: inspect.Parameter, description: str | None) -> Any:
        """Put the name and the docstring's words first, so that an explicit ``Field`` overrules them."""
        annotation = self._resolve(parameter.name, parameter.annotation)
        inner, *metadata = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        named = Annotated[(inner, Field(alias=parameter.name, description=description), *metadata)]  # type: ignore[valid-type]
        return named if parameter.default is inspect.Parameter.empty else (named, parameter.default)

    def _json(self, model: type[BaseModel], parameters: list[inspect.Parameter]) -> Schema:
        try:
            return _tidied(model.model_json_schema(schema_generator=_Generator))
        except PydanticUserError as error:
            raise self._blame(parameters, error) from error

    def _blame(self, parameters: list[inspect.Parameter], error: Exception) -> ConfigError:
        """Find the parameter that pydantic could not use."""
        culprit = next((parameter for parameter in parameters if not self._usable(parameter)), None)
        reason = _reason(error)
        if culprit is None:
            return self._refuse(f"its parameters cannot be described to a model: {reason}")
        return self._refuse(
            f"a model cannot pass parameter {culprit.name!r} ({culprit.annotation!r}) as JSON: {reason}. Take plain "
            "data or pydantic models; live objects come from ctx.resource(name), stored data from ctx.deps"
        )

    def _usable(self, parameter: inspect.Parameter) -> bool:
        try:
            model = create_model(
                "Probe", __config__=ConfigDict(protected_namespaces=()), p=self._field(parameter, None)
            )
            model.model_rebuild(force=True, _types_namespace={**self.globals, **self.locals})
            model.model_json_schema(schema_generator=_Generator)
        except (PydanticUserError, PydanticUndefinedAnnotation):
            return False
        return True


def _reason(error: Exception) -> str:
    """Return what pydantic says first; its further lines are for its own users."""
    return str(error).split("\n")[0].rstrip(".")


def _has_plain_default(parameter: inspect.Parameter) -> bool:
    """Tell whether the function itself supplies the value; a ``Field`` does not."""
    return parameter.default is not inspect.Parameter.empty and not isinstance(parameter.default, FieldInfo)


def _plain_function(function: Callable[..., Any]) -> Any:
    """Return the function that holds the names: behind partials, wrappers, bound methods and callable objects."""
    found: Any = function
    while isinstance(found, functools.partial):
        found = found.func
    found = inspect.unwrap(found)
    if not inspect.isroutine(found) and not inspect.isclass(found):
        found = type(found).__call__
    return getattr(found, "__func__", found)


def _visible_names(function: Any) -> dict[str, Any]:
    """Return the local names that ``function``'s annotations could see where it was written."""
    frames = [frame for frame in _calling_frames() if _encloses(frame, function)]
    names: dict[str, Any] = {}
    for frame in reversed(frames):
        names |= frame.f_locals
    return names | _closed_over(function)


def _closed_over(function: Any) -> dict[str, Any]:
    """Return the names that the body keeps alive, without those that are not assigned yet."""
    names: dict[str, Any] = {}
    if not getattr(function, "__closure__", None):
        return names
    for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True):
        with contextlib.suppress(ValueError):
            names[name] = cell.cell_contents
    return names


def _calling_frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        yield frame
        frame = frame.f_back


def _encloses(frame: FrameType, function: Any) -> bool:
    """Tell whether ``frame`` runs a scope around ``function``; its qualified name lists them."""
    if frame.f_globals is not getattr(function, "__globals__", None):
        return False
    inner = frame.f_code.co_qualname
    name: str = function.__qualname__
    return name.startswith((f"{inner}.<locals>.", f"{inner}."))


def _is_context(annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin in (Union, UnionType, Annotated):
        return any(_is_context(part) for part in get_args(annotation))
    found = origin or annotation
    return isinstance(found, type) and issubclass(found, ToolContext)


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the text before the sections, and the words about each parameter."""
    if not text:
        return "", {}
    import docstring_parser

    try:
        parsed = docstring_parser.parse(text)
    except docstring_parser.ParseError:
        return text.split("\n\n")[0], {}
    parts = (parsed.short_description, parsed.long_description)
    described = {
        name.strip(): " ".join(parameter.description.split())
        for parameter in parsed.params
        if parameter.description
        for name in parameter.arg_name.split(",")
    }
    return "\n\n".join(part.strip() for part in parts if part), described


# --- JSON Schema ----------------------------------------------------------------------------------------------------


class _Generator(GenerateJsonSchema):
    """Pydantic's generator without the titles that only cost tokens, and with closed objects.

    A misspelt optional property would otherwise be dropped in silence. A model with an explicit ``extra`` keeps it.
    """

    ignored_warning_kinds: set[JsonSchemaWarningKind] = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        explicit = "extra" in getattr(schema["cls"], "model_config", {})
        made = super().model_schema(schema)
        return made if explicit else _closed(made)

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        return _closed(super().dataclass_schema(schema))

    def typed_dict_schema(self, schema: core_schema.TypedDictSchema) -> JsonSchemaValue:
        return _closed(super().typed_dict_schema(schema))


def _closed(schema: JsonSchemaValue) -> JsonSchemaValue:
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    return schema


def _tidied(schema: Schema) -> Schema:
    """Drop the class names as titles, and put a recursive type itself on top instead of a reference to it."""
    definitions: Schema = schema.get("$defs", {})
    if set(schema) <= {"$ref", "$defs"} and "$ref" in schema:
        schema = {**_resolved(schema, definitions), "$defs": definitions}
    for part in (schema, *definitions.values()):
        part.pop("title", None)
    return {"properties": {}, **schema} if schema.get("type") == "object" and schema.keys() == {"type"} else schema


def _resolved(schema: Schema, definitions: Schema) -> Schema:
    reference = schema.get("$ref")
    found = definitions.get(str(reference).rsplit("/", 1)[-1]) if reference else schema
    return dict(found) if isinstance(found, dict) else {}


def output_adapter(annotation: Any) -> TypeAdapter[Any]:
    """Return the pydantic adapter of a tool's return annotation; a missing one accepts everything.

    Raises:
        ConfigError: Values of the type cannot be stored as JSON.
    """
    if annotation in (inspect.Signature.empty, Any):
        return TypeAdapter(Any)
    try:
        return TypeAdapter(annotation)
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        raise ConfigError(
            f"values of {annotation!r} cannot be stored as JSON: {_reason(error)}. Use plain data, a "
            "dataclass or a pydantic model"
        ) from error


# --- checking -------------------------------------------------------------------------------------------------------


class _Checker:
    """One schema with its two checkers; ``prefix`` is where in the instance the adapter's value lies."""

    def __init__(self, schema: Schema, adapter: TypeAdapter[Any], prefix: tuple[str, ...] = ()) -> None:
        self.schema = schema
        self.adapter = adapter
        self.prefix = prefix

    def check(self, instance: Any) -> Any:
        """Return the typed value of JSON data.

        Raises:
            _Mismatch: With the lines.
        """
        try:
            complaint = next(self._validator.iter_errors(instance), None)
            if complaint is not None:
                raise _Mismatch(_explained(self._validator.iter_errors(instance), self.schema))
            return self._converted(instance)
        except RecursionError:
            raise _Mismatch(["$: nested too deeply"]) from None

    @functools.cached_property
    def _validator(self) -> Validator:
        return _validator_class()(self.schema)

    def _converted(self, instance: Any) -> Any:
        value = instance
        for key in self.prefix:
            value = value[key]
        try:
            return self.adapter.validate_json(_encoded(value))
        except ValidationError as error:
            raise _Mismatch(_pydantic_lines(error, instance, self.prefix)) from None


@functools.cache
def _validator_class() -> Callable[[Schema], Validator]:
    from jsonschema import Draft202012Validator, validators

    def leave_to_pydantic(*_: Any) -> None:
        return None

    extend: Any = validators.extend
    made: Callable[[Schema], Validator] = extend(Draft202012Validator, {"pattern": leave_to_pydantic})
    return made


def _encoded(value: Any) -> bytes:
    try:
        return _ENCODER.encode(value).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise _Mismatch([f"$: holds half of a surrogate pair ({half}), which is no character"]) from None
    except ValueError:
        raise _Mismatch(["$: holds a number that JSON does not have (NaN or infinite)"]) from None
    except TypeError as error:
        raise _Mismatch([f"$: is not JSON: {error}"]) from None


_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


# --- schemas of others ----------------------------------------------------------------------------------------------

MAX_SCHEMA: Final = 256 * 1024
"""Bytes of a schema that somebody else wrote: what is larger no model could be shown."""


def _foreign_object(schema: Mapping[str, Any], name: str) -> Schema:
    """The schema as a model is shown it.

    Raises:
        ConfigError: It cannot be used; names the tool and the place.
    """
    try:
        copied = json.loads(json.dumps({"type": "object", **schema}, allow_nan=False))
        _check_foreign(copied)
    except RecursionError:
        raise ConfigError(f"tool {name!r}: its schema is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"tool {name!r}: its schema cannot be used: {error}") from None
    return {"properties": {}, **copied}


def _check_foreign(schema: Schema) -> None:
    """Refuse what would only show in the middle of a call.

    Raises:
        ValueError: With the place.
    """
    from jsonschema import SchemaError

    if schema["type"] != "object":
        raise ValueError(f"it describes {_shown(schema['type'])}, and arguments are an object")
    if (size := len(json.dumps(schema))) > MAX_SCHEMA:
        raise ValueError(f"it has {size} bytes, and {MAX_SCHEMA} are the limit")
    try:
        _foreign_class(schema).check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"{_written(list(error.absolute_path))}: {_cut(error.message)}") from None
    _check_references(schema)


def _check_references(schema: Schema) -> None:
    from referencing import Registry, exceptions
    from referencing.jsonschema import DRAFT202012, specification_with

    found = specification_with(str(schema.get("$schema", "")), default=DRAFT202012).create_resource(schema)
    resolver = Registry().with_resource(found.id() or "", found).resolver(found.id() or "")
    for place, reference in _references(schema, "$"):
        try:
            resolver.lookup(reference)
        except (exceptions.Unresolvable, ValueError):
            raise ValueError(f"{place}: {_shown(reference)} is not in the schema, and nothing is fetched") from None


def _references(part: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(part, dict):
        for key, value in part.items():
            if key in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield f"{place}{_segment(key)}", value
            elif key not in ("const", "enum", "default", "examples"):
                yield from _references(value, f"{place}{_segment(str(key))}")
    elif isinstance(part, list):
        for index, value in enumerate(part):
            yield from _references(value, f"{place}[{index}]")


class _ForeignChecker(_Checker):
    """Checks against the schema alone: there is no type behind it, so the arguments stay as they are."""

    @functools.cached_property
    def _validator(self) -> Validator:
        from referencing import Registry

        extended: Any = _without_dangers(_foreign_class(self.schema))
        made: Validator = extended(self.schema, registry=Registry())
        return made

    def _converted(self, instance: Any) -> Any:
        _encoded(instance)
        return instance


def _foreign_class(schema: Schema) -> type[Validator]:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for

    return validator_for(schema, default=Draft202012Validator)


@functools.cache
def _without_dangers(validator: type[Validator]) -> Any:
    """The draft's validator with patterns in linear time; what its own engine would have to match is left to the
    tool itself."""
    from jsonschema import validators

    def match(checker: Any, pattern: str, instance: Any, _: Schema) -> Iterator[Complaint]:
        from jsonschema import ValidationError as Complaint

        if checker.is_type(instance, "string") and not _fits(pattern, instance):
            yield Complaint(f"must match the pattern {_cut(pattern)}")

    def unknown(checker: Any, allowed: Any, instance: Any, schema: Schema) -> Iterator[Complaint]:
        if "patternProperties" not in schema:
            yield from ordinary(checker, allowed, instance, schema)

    def leave_to_the_tool(*_: Any) -> None:
        return None

    ordinary: Any = validator.VALIDATORS["additionalProperties"]
    extend: Any = validators.extend
    return extend(
        validator, {"pattern": match, "patternProperties": leave_to_the_tool, "additionalProperties": unknown}
    )


def _fits(pattern: str, text: str) -> bool:
    """Whether ``text`` matches; a pattern that pydantic's engine does not know is left to the tool itself."""
    try:
        validator = _pattern(pattern)
    except SchemaError:
        return True
    return validator.isinstance_python(text)


@functools.lru_cache(maxsize=1024)
def _pattern(pattern: str) -> SchemaValidator:
    return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex", strict=True))


# --- reading JSON ---------------------------------------------------------------------------------------------------


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not part of JSON")


_DECODER: Final = json.JSONDecoder(parse_constant=_no_constant)


def _read_object(text: str) -> dict[str, Any]:
    found = _read_json(text) if text.strip() else {}
    if isinstance(found, dict):
        return found
    raise _Mismatch([f"$: must be one JSON object with the arguments; got {_shown(found)}"])


def _read_json(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _Mismatch([_syntax_line(error)]) from None
    except RecursionError:
        raise _Mismatch(["$: nested too deeply"]) from None
    except ValueError as error:
        raise _Mismatch([f"$: not valid JSON: {error}"]) from None


def _syntax_line(error: json.JSONDecodeError) -> str:
    what = error.msg[:1].lower() + error.msg[1:].removesuffix(" at")
    where = f"line {error.lineno} column {error.colno} (character {error.pos})"
    if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated"):
        return f"$: not valid JSON: {what} at {where}; the text ends too early and may have been cut off"
    near = error.doc[max(0, error.pos - 20) : error.pos + 20]
    return f"$: not valid JSON: {what} at {where}, near {json.dumps(near, ensure_ascii=False)}"


# --- complaints -----------------------------------------------------------------------------------------------------

_KINDS: Final = {
    "array": "an array",
    "boolean": "true or false",
    "integer": "an integer",
    "null": "null",
    "number": "a number",
    "object": "an object",
    "string": "a string",
}

_RULES: Final = {
    "exclusiveMaximum": "must be less than {}",
    "exclusiveMinimum": "must be greater than {}",
    "maxItems": "must have at most {} items",
    "maxLength": "must have at most {} characters",
    "maxProperties": "must have at most {} properties",
    "maximum": "must be at most {}",
    "minItems": "must have at least {} items",
    "minLength": "must have at least {} characters",
    "minProperties": "must have at least {} properties",
    "minimum": "must be at least {}",
    "multipleOf": "must be a multiple of {}",
}


def _first_lines(lines: Iterable[str]) -> list[str]:
    """Return the first 8 different lines, without asking for more than those."""
    kept: dict[str, None] = {}
    for line in lines:
        kept[line] = None
        if len(kept) == MAX_ERRORS:
            break
    return list(kept)


def _explained(complaints: Iterable[Complaint], schema: Schema) -> Iterator[str]:
    definitions: Schema = schema.get("$defs", {})
    for complaint in complaints:
        yield from _lines(complaint, definitions)


def _lines(complaint: Complaint, definitions: Schema) -> Iterator[str]:
    where = _written(list(complaint.absolute_path))
    rule, allowed, given = str(complaint.validator), complaint.validator_value, complaint.instance
    match rule:
        case "anyOf" | "oneOf" if complaint.context:
            yield from _choice_lines(complaint, definitions)
        case "required":
            yield from _missing_lines(complaint, where, definitions)
        case "additionalProperties" if allowed is False:
            yield from _unknown_lines(complaint, where)
        case "type" | "enum" | "const":
            yield f"{where}: must be {_kind(_schema_of(complaint), {})}; got {_shown(given)}"
        case "uniqueItems":
            yield f"{where}: must not have the same item twice; got {_shown(given)}"
        case _ if rule in _RULES:
            yield f"{where}: {_RULES[rule].format(allowed)}; got {_shown(given)}{_size(rule, given)}"
        case _:
            yield f"{where}: {_cut(complaint.message)}"


def _missing_lines(complaint: Complaint, where: str, definitions: Schema) -> Iterator[str]:
    properties: Schema = _schema_of(complaint).get("properties", {})
    given: Any = complaint.instance
    required: Any = complaint.validator_value
    for name in required:
        if name not in given:
            found = properties.get(name)
            known: Schema = found if isinstance(found, dict) else {}
            about = f": {_cut(known['description'])}" if known.get("description") else ""
            yield f"{where}: {_quoted(name)} is missing; it must be {_kind(known, definitions)}{about}"


def _unknown_lines(complaint: Complaint, where: str) -> Iterator[str]:
    known = list(_schema_of(complaint).get("properties", {}))
    given: Any = complaint.instance
    for name in given:
        if name not in known:
            near = _nearest(name, known)
            hint = f"; did you mean {_quoted(near)}?" if near else ";"
            yield f"{where}: {_quoted(name)} is unknown{hint} allowed: {_listed(known) or 'no properties at all'}"


def _schema_of(complaint: Complaint) -> Schema:
    return typing.cast(Schema, complaint.schema)


def _nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that was probably meant; spelling styles (``maxItems``, ``max-items``) do not count."""
    plain = {re.sub(r"[-_ ]", "", candidate).lower(): candidate for candidate in known}
    found = difflib.get_close_matches(re.sub(r"[-_ ]", "", name[:MAX_SHOWN]).lower(), plain, 1)
    return plain[found[0]] if found else None


def _choice_lines(complaint: Complaint, definitions: Schema) -> Iterator[str]:
    """Explain the alternative that was probably meant instead of all of them."""
    branches: dict[Any, list[Complaint]] = {}
    for child in complaint.context or ():
        branches.setdefault(child.schema_path[0], []).append(child)
    fitting = [branch for branch in branches.values() if not any(map(_misses_kind, branch))]
    tagged = [branch for branch in fitting if not any(map(_misses_tag, branch))]
    if len(fitting) > 1 and not tagged:
        yield from _tag_lines(fitting)
    elif len(tagged or fitting) == 1:
        for child in (tagged or fitting)[0]:
            yield from _lines(child, definitions)
    else:
        alternatives: Any = complaint.validator_value
        kinds = dict.fromkeys(_kind(part, definitions) for part in alternatives)
        where = _written(list(complaint.absolute_path))
        yield f"{where}: must be {' or '.join(kinds)}; got {_shown(complaint.instance)}"
        for child in min(tagged, key=len, default=[]):
            yield from _lines(child, definitions)


def _misses_kind(complaint: Complaint) -> bool:
    return not complaint.path and complaint.validator in ("type", "enum", "const")


def _misses_tag(complaint: Complaint) -> bool:
    return len(complaint.path) == 1 and complaint.validator == "const"


def _tag_lines(branches: Iterable[list[Complaint]]) -> Iterator[str]:
    tags = [child for branch in branches for child in branch if _misses_tag(child)]
    allowed = _listed(tag.validator_value for tag in tags)
    yield f"{_written(list(tags[0].absolute_path))}: must be one of {allowed}; got {_shown(tags[0].instance)}"


def _kind(schema: Any, definitions: Schema) -> str:
    """Say in words what a schema accepts."""
    found: Schema = _resolved(schema, definitions) if isinstance(schema, dict) else {}
    name = str(schema["$ref"]).rsplit("/", 1)[-1] if isinstance(schema, dict) and "$ref" in schema else ""
    if "const" in found:
        return _shown(found["const"])
    if "enum" in found:
        return f"one of {_listed(found['enum'])}"
    if "anyOf" in found or "oneOf" in found:
        return " or ".join(dict.fromkeys(_kind(part, definitions) for part in found.get("anyOf") or found["oneOf"]))
    kinds: str | list[str] = found.get("type", [])
    words = [_KINDS.get(kind, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    return (" or ".join(words) or "a value") + (f" ({name})" if name else "")


def _listed(values: Iterable[Any]) -> str:
    distinct = list(dict.fromkeys(_shown(value) for value in values))
    rest = len(distinct) - MAX_LISTED
    return ", ".join(distinct[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _size(rule: str, given: Any) -> str:
    return f" ({len(given)} characters)" if rule.endswith("Length") else ""


def _shown(value: Any) -> str:
    """Return a value as short JSON; of large ones only what they are."""
    match value:
        case str():
            return _quoted(value)
        case bool() | None:
            return json.dumps(value)
        case int() if value.bit_length() > 200:
            return "a very large integer"
        case int() | float():
            return json.dumps(value)
        case list():
            return f"an array of {len(value)} items"
        case dict():
            keys = [str(key) for key in value]
            names = ", ".join(map(_quoted, keys[:5])) + (", ..." if len(keys) > 5 else "")
            return f"an object with {names}" if keys else "an empty object"
        case _:
            return f"a {type(value).__qualname__}"


def _quoted(text: str) -> str:
    return json.dumps(_cut(text), ensure_ascii=not text.isprintable())


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _written(path: Path) -> str:
    return "$" + "".join(map(_segment, path))


def _segment(key: str | int) -> str:
    if isinstance(key, int):
        return f"[{key}]"
    return f".{_cut(key)}" if key.isidentifier() else f"[{_quoted(key)}]"


def _pydantic_lines(error: ValidationError, instance: Any, prefix: Path) -> Iterator[str]:
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        path, found = _followed(instance, (*prefix, *problem["loc"]))
        yield f"{_written(path)}: {_said(problem['msg'])}; got {_shown(found)}"


def _followed(instance: Any, location: Path) -> tuple[Path, Any]:
    """Follow pydantic's location through the data; parts that are no keys name alternatives of a union."""
    path: list[str | int] = []
    for key in location:
        if _leads_on(instance, key):
            instance = instance[key]
            path.append(key)
    return path, instance


def _leads_on(instance: Any, key: str | int) -> bool:
    match instance:
        case dict():
            return key in instance
        case list():
            return isinstance(key, int) and key < len(instance)
        case _:
            return False


def _said(message: str) -> str:
    """Turn pydantic's sentence into the form of the other lines."""
    text = re.sub(r"^(Input|String|Value|List|Dictionary) should ", "must ", message)
    return re.sub(r"^(Value|Assertion) error, ", "", text)


# --- structured output ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Output:
    """How one output type is asked for: as it is when it is an object, else as ``{"value": ...}``."""

    checker: _Checker
    wrapped: bool

    @classmethod
    def of(cls, output: Any) -> _Output:
        adapter = output_adapter(output)
        try:
            schema = _tidied(adapter.json_schema(schema_generator=_Generator))
        except (PydanticUserError, PydanticUndefinedAnnotation) as error:
            raise ConfigError(
                f"a model cannot be asked for {output!r}: {_reason(error)}. Use plain data, a dataclass "
                "or a pydantic model as output type"
            ) from error
        if schema.get("type") == "object":
            return cls(_Checker(schema, adapter), wrapped=False)
        return cls(_Checker(_wrap(schema), adapter, ("value",)), wrapped=True)

    def check(self, given: Any) -> Any:
        """Return the value of JSON data; of a wrapped type also when it comes bare."""
        if not self.wrapped:
            return self.checker.check(given)
        if not _looks_wrapped(given):
            return self.checker.check({"value": given})
        try:
            return self.checker.check(given)
        except _Mismatch:
            return self._check_bare(given)

    def _check_bare(self, given: Any) -> Any:
        """Check an object that looks wrapped and is not; when it fails too, the first complaint is the better one."""
        try:
            return self.checker.check({"value": given})
        except _Mismatch:
            return self.checker.check(given)


def _wrap(schema: Schema) -> Schema:
    inner = {key: value for key, value in schema.items() if key != "$defs"}
    wrapped: Schema = {
        "type": "object",
        "properties": {"value": inner},
        "required": ["value"],
        "additionalProperties": False,
    }
    return {**wrapped, "$defs": schema["$defs"]} if "$defs" in schema else wrapped


def _looks_wrapped(given: Any) -> bool:
    return isinstance(given, dict) and "value" in given


@functools.lru_cache(maxsize=256)
def _cached_output(output: Any) -> _Output:
    return _Output.of(output)


def _output_of(output: Any) -> _Output:
    try:
        return _cached_output(output)
    except TypeError:  # a type with unhashable parts, such as Literal of a list or some Annotated
        return _Output.of(output)


def json_schema_of(output: Any) -> Schema | None:
    """Return the JSON Schema to ask a model for ``output``; ``None`` for ``str``, which needs no structure.

    A type that is not an object (list, int, union) is asked for as an object with one property, ``value``.
    The returned schema is shared: do not change it.

    Raises:
        ConfigError: The type has no JSON Schema.
    """
    return None if output is str else _output_of(output).checker.schema


@overload
def validate_output(output: type[T], given: Any) -> T: ...
@overload
def validate_output(output: Any, given: Any) -> Any: ...
def validate_output(output: Any, given: Any) -> Any:
    """Return the value of type ``output`` that a model gave as text (or as JSON data already read).

    Text may carry a fence or words around the JSON: the first complete JSON value that fits is taken. JSON that is
    broken in the middle is never searched for a part that happens to fit.

    Raises:
        OutputInvalid: With one line for each mistake, at most 8, for the model to repair.
        ConfigError: The type has no JSON Schema.
    """
    if output is str and isinstance(given, str):
        return given
    shape = _output_of(output)
    try:
        return _from_text(shape, given) if isinstance(given, str) else shape.check(given)
    except _Mismatch as mismatch:
        raise OutputInvalid(mismatch.errors) from None


def _from_text(shape: _Output, text: str) -> Any:
    mismatches: list[tuple[bool, _Mismatch]] = []
    for candidate in _candidates(text):
        try:
            return shape.check(candidate)
        except _Mismatch as mismatch:
            mismatches.append((not isinstance(candidate, dict), mismatch))
    if mismatches:
        raise min(mismatches, key=lambda entry: entry[0])[1]  # the first object is what was most likely meant
    return _from_words(shape, text)


def _from_words(shape: _Output, text: str) -> Any:
    """Take text without any JSON as the value itself where the type allows text: ``yes`` for a Literal."""
    if shape.wrapped and text.strip():
        return shape.check({"value": text.strip()})
    raise _Mismatch([f"$: must be an object as JSON; got text without JSON: {_shown(text.strip())}"])


def _candidates(text: str) -> Iterator[Any]:
    """Yield the JSON values in ``text``: the whole, else one after a fence, else one by one from the left.

    Raises:
        _Mismatch: A value began and broke; what stands inside it is not the answer.
    """
    try:
        yield _DECODER.decode(text.strip())
        return
    except (ValueError, RecursionError):
        pass
    position = _fenced(text)
    for _ in range(MAX_STARTS):
        start = _OPENING.search(text, position)
        if start is None:
            return
        found, position = _decoded_at(text, start.start())
        yield from found


_OPENING: Final = re.compile(r"[{\[]")
_FENCE: Final = re.compile(r"```(?:json[a-z0-9]*)?[ \t]*\r?\n?\s*(?=[{\[])", re.IGNORECASE)


def _fenced(text: str) -> int:
    fence = _FENCE.search(text)
    return fence.end() if fence else 0


def _decoded_at(text: str, start: int) -> tuple[list[Any], int]:
    """Return the value that begins at ``start`` (none if it is only a bracket in prose) and where to go on."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        if _got_somewhere(error, start):
            raise _Mismatch([_syntax_line(error)]) from None
        return [], start + 1
    except RecursionError:
        raise _Mismatch(["$: nested too deeply"]) from None
    except ValueError as error:
        raise _Mismatch([f"$: not valid JSON: {error}"]) from None
    return [value], end


def _got_somewhere(error: json.JSONDecodeError, start: int) -> bool:
    """Tell broken JSON from a bracket in prose: at least one key or element was read."""
    after = len(error.doc) - len(error.doc[start + 1 :].lstrip())
    return error.pos > after or error.msg.startswith("Unterminated")
