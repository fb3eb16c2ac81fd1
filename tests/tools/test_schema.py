"""Parameters: what a model is shown, what it may pass, and what it is told when it errs."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from ridethrough.runtime.errors import ConfigError, Error, InvalidOutput
from ridethrough.tools.context import ToolContext
from ridethrough.tools.schema import (
    ArgumentsInvalid,
    OutputInvalid,
    ParameterSchema,
    json_schema_of,
    output_adapter,
    validate_output,
)

if TYPE_CHECKING:
    from decimal import Decimal


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Item(BaseModel):
    name: str
    price: float = 0.0


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    bark: str


class Node(BaseModel):
    n: int
    kids: list[Node] = []


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Options(TypedDict, total=False):
    deep: bool


X = TypeVar("X")


class Box(BaseModel, Generic[X]):
    content: X


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def order(
    items: list[Item],
    colour: Colour,
    day: date | None = None,
    at: Point | None = None,
    options: Options | None = None,
    limit: Annotated[int, Field(ge=1, le=20)] = 5,
    *,
    mode: Literal["fast", "safe"] = "fast",
    pet: Cat | Dog | None = None,
) -> list[str]:
    """Order things.

    They are sent at once.

    Args:
        items: What to order,
            in any number.
        limit: How many at most.

    Returns:
        The receipts.
    """
    return []


def complaints(function: Callable[..., Any], arguments: dict[str, Any] | str) -> list[str]:
    with pytest.raises(ArgumentsInvalid) as caught:
        ParameterSchema.of(function).parse(arguments)
    return caught.value.errors


def refusal(function: Callable[..., Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        ParameterSchema.of(function)
    return caught.value.message


# --- what the model is shown ----------------------------------------------------------------------------------------


def test_the_schema_is_valid_closed_and_without_titles() -> None:
    schema = ParameterSchema.of(order).json
    Draft202012Validator.check_schema(schema)
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["items", "colour"]
    assert list(schema["properties"])[:3] == ["items", "colour", "day"]
    assert schema["properties"]["limit"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 20,
        "default": 5,
        "description": "How many at most.",
    }
    assert schema["$defs"]["Item"]["additionalProperties"] is False
    assert '"title"' not in json.dumps(schema)


def test_the_description_is_the_text_before_the_sections() -> None:
    schema = ParameterSchema.of(order)
    assert schema.description == "Order things.\n\nThey are sent at once."
    assert schema.json["properties"]["items"]["description"] == "What to order, in any number."
    assert schema.returns == list[str]


def google(a: int, b: int) -> None:
    """Add.

    Args:
        a (int): First one.
        b: Second one.
    """


def numpy(a: int, b: int) -> None:
    """Add.

    Parameters
    ----------
    a : int
        First one.
    b
        Second one.
    """


def rest(a: int, b: int) -> None:
    """Add.

    :param a: First one.
    :param int b: Second one.
    """


@pytest.mark.parametrize("function", [google, numpy, rest])
def test_docstring_styles(function: Callable[..., Any]) -> None:
    schema = ParameterSchema.of(function)
    told = [schema.json["properties"][name].get("description") for name in "ab"]
    assert (schema.description, told) == ("Add.", ["First one.", "Second one."])


def test_a_field_overrules_the_docstring_and_may_rename() -> None:
    def fetch(sender: Annotated[str, Field(alias="from", description="Explicit.")], n: int = Field(7, gt=1)) -> None:
        """Fetch.

        Args:
            sender: From the docstring.
            n: Count.
        """

    schema = ParameterSchema.of(fetch)
    assert schema.json["properties"]["from"]["description"] == "Explicit."
    assert schema.json["properties"]["n"]["description"] == "Count."
    assert schema.parse({"from": "me"}) == {"sender": "me", "n": 7}


def test_no_docstring_and_no_parameters() -> None:
    def nothing() -> None: ...

    schema = ParameterSchema.of(nothing)
    assert schema.description == ""
    assert schema.json == {"type": "object", "properties": {}, "additionalProperties": False}
    assert schema.parse("") == schema.parse("{}") == schema.parse({}) == {}


def test_names_that_pydantic_uses_itself() -> None:
    def awkward(schema: str, json: int, model_config: bool, _hidden: str, copy: str = "c") -> None: ...

    arguments = {"schema": "s", "json": 1, "model_config": True, "_hidden": "h"}
    assert ParameterSchema.of(awkward).parse(arguments) == arguments


def test_an_explicit_extra_is_kept() -> None:
    class Open(BaseModel):
        model_config = ConfigDict(extra="allow")
        a: int

    class Loose(BaseModel):
        model_config = ConfigDict(extra="ignore")
        a: int

    def take(one: Open, two: Loose) -> None: ...

    values = ParameterSchema.of(take).parse({"one": {"a": 1, "b": 2}, "two": {"a": 1, "b": 2}})
    assert (values["one"].model_extra, values["two"]) == ({"b": 2}, Loose(a=1))


# --- the context ----------------------------------------------------------------------------------------------------


def test_the_context_is_not_shown() -> None:
    def bare(a: int, ctx) -> None: ...  # type: ignore[no-untyped-def] # pyright: ignore
    def typed(a: int, context: ToolContext) -> None: ...
    def generic(a: int, context: ToolContext[dict[str, str]] | None = None) -> None: ...
    def none(a: int) -> None: ...

    functions: list[Callable[..., Any]] = [bare, typed, generic, none]
    schemas = [ParameterSchema.of(function) for function in functions]
    assert [schema.context for schema in schemas] == ["ctx", "context", "context", None]
    assert {tuple(schema.json["properties"]) for schema in schemas} == {("a",)}


def test_two_contexts_are_refused() -> None:
    def both(ctx: ToolContext, other: ToolContext) -> None: ...

    assert "ctx and other" in refusal(both)


# --- what is refused when it is defined -----------------------------------------------------------------------------


def test_parameters_that_no_model_can_fill_in() -> None:
    def stars(*names: str) -> None: ...
    def double(**options: str) -> None: ...
    def positional(a: int, /) -> None: ...
    def bare(a) -> None: ...  # type: ignore[no-untyped-def] # pyright: ignore
    def live(connection: subprocess.Popen[bytes], a: int) -> None: ...
    def callback(a: int, then: Callable[[], None]) -> None: ...

    assert "names: list[str]" in refusal(stars)
    assert "options: dict[str, str]" in refusal(double)
    assert "remove the '/'" in refusal(positional)
    assert "'a: str'" in refusal(bare)
    assert "'connection'" in refusal(live)
    assert "ctx.resource(name)" in refusal(live)
    assert "'then'" in refusal(callback)


def test_a_method_must_be_bound() -> None:
    class Shop:
        def buy(self, item: Item) -> None: ...

    assert "instance.method" in refusal(Shop.buy)
    assert ParameterSchema.of(Shop().buy).parse({"item": {"name": "tea"}}) == {"item": Item(name="tea")}


def test_a_name_that_only_the_type_checker_knows() -> None:
    def pay(amount: Decimal) -> None: ...

    def paid() -> Decimal:
        raise NotImplementedError

    assert "TYPE_CHECKING" in refusal(pay)
    assert ParameterSchema.of(paid).returns is Any


def test_local_types_are_found() -> None:
    class Local(BaseModel):
        a: int

    @dataclasses.dataclass
    class Outer:
        inner: Local

    def make() -> Callable[..., Any]:
        class Inner(BaseModel):
            outer: Outer

        def take(one: Local, many: list[Inner]) -> Outer:
            return many[0].outer

        schema = ParameterSchema.of(take)
        assert schema.returns is Outer
        assert schema.parse({"one": {"a": 1}, "many": [{"outer": {"inner": {"a": 2}}}]}) == {
            "one": Local(a=1),
            "many": [Inner(outer=Outer(Local(a=2)))],
        }
        return take

    make()


def test_names_that_the_body_needs_later() -> None:
    def take(a: int) -> int:
        return helper(a)

    schema = ParameterSchema.of(take)

    def helper(a: int) -> int:
        return a

    assert schema.parse({"a": take(1)}) == {"a": 1}


def test_partials_and_callable_objects() -> None:
    class Caller:
        def __call__(self, a: int, day: date) -> int:
            return a

    def add(a: int, b: int) -> int:
        return a + b

    assert ParameterSchema.of(Caller()).parse({"a": 1, "day": "2024-01-01"}) == {"a": 1, "day": date(2024, 1, 1)}
    assert ParameterSchema.of(functools.partial(add, b=2)).parse({"a": 1}) == {"a": 1}


# --- what comes out -------------------------------------------------------------------------------------------------


def test_values_have_their_types() -> None:
    parsed = ParameterSchema.of(order).parse(
        {
            "items": [{"name": "tea", "price": 2}],
            "colour": "red",
            "day": "2024-01-01",
            "at": {"x": 1},
            "options": {"deep": True},
            "pet": {"kind": "dog", "bark": "wuff"},
        }
    )
    assert parsed == {
        "items": [Item(name="tea", price=2.0)],
        "colour": Colour.RED,
        "day": date(2024, 1, 1),
        "at": Point(1),
        "options": {"deep": True},
        "pet": Dog(kind="dog", bark="wuff"),
    }


def test_raw_text_and_mappings_agree() -> None:
    schema = ParameterSchema.of(order)
    arguments = {"items": [], "colour": "blue", "limit": 3}
    assert schema.parse(json.dumps(arguments)) == schema.parse(arguments)


# --- what the model is told -----------------------------------------------------------------------------------------


def test_each_mistake_has_a_line() -> None:
    wrong = {"items": [{"name": "a"}, {"nam": 1}], "colour": "green", "limt": 1, "limit": 50, "mode": 3, "at": 7}
    assert complaints(order, wrong) == [
        '$: "limt" is unknown; did you mean "limit"? allowed: "items", "colour", "day", "at", "options", "limit", '
        '"mode", "pet"',
        '$.items[1]: "nam" is unknown; did you mean "name"? allowed: "name", "price"',
        '$.items[1]: "name" is missing; it must be a string',
        '$.colour: must be one of "red", "blue"; got "green"',
        "$.at: must be an object (Point) or null; got 7",
        "$.limit: must be at most 20; got 50",
        '$.mode: must be one of "fast", "safe"; got 3',
    ]


def test_no_silent_coercion_of_what_the_schema_forbids() -> None:
    def take(n: int, flag: bool = False) -> None: ...

    assert complaints(take, {"n": "5", "flag": 1}) == [
        '$.n: must be an integer; got "5"',
        "$.flag: must be true or false; got 1",
    ]
    assert ParameterSchema.of(take).parse({"n": 5.0}) == {"n": 5}


def test_rules_beyond_the_schema_come_from_pydantic() -> None:
    def take(days: list[date], code: Annotated[str, Field(pattern=r"^(a+)+$")] = "a") -> None: ...

    line, other = complaints(take, {"days": ["2024-01-01", "2024-02-30"], "code": "a" * 40 + "!"})
    assert line.startswith("$.days[1]: must be a valid date")
    assert line.endswith('got "2024-02-30"')
    assert other.startswith("$.code: must match pattern '^(a+)+$'")


def test_the_alternative_that_was_meant_is_explained() -> None:
    rest: dict[str, Any] = {"items": [], "colour": "red"}
    assert complaints(order, {**rest, "pet": {"kind": "cow"}}) == ['$.pet.kind: must be one of "cat", "dog"; got "cow"']
    assert complaints(order, {**rest, "pet": {"kind": "cat", "lives": "9"}}) == [
        '$.pet.lives: must be an integer; got "9"'
    ]


def test_at_most_eight_lines_and_none_is_long() -> None:
    def take(numbers: list[int]) -> None: ...

    lines = complaints(take, {"numbers": ["x" * 100_000] * 10_000})
    assert len(lines) == 8
    assert max(map(len, lines)) < 200
    assert len(complaints(take, {"k" * 10_000: 1, "numbers": []})[0]) < 200


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"n": 1,]', "line 1 column 9 (character 8), near"),
        ('{"n": 1', "cut off"),
        ('{"n": "1', "cut off"),
        ("[1]", "must be one JSON object with the arguments; got an array of 1 items"),
        ('{"n": NaN}', "NaN is not part of JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"n": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"n": "\\ud800"}', "surrogate"),
        ('{"n": 1e999}', "infinite"),
    ],
)
def test_text_that_is_no_usable_json(text: str, part: str) -> None:
    def take(n: Any) -> None: ...

    (line,) = complaints(take, text)
    assert line.startswith("$: ")
    assert part in line


def test_deep_data_is_an_answer_and_no_crash() -> None:
    def take(node: Node) -> None: ...

    deep: dict[str, Any] = {"n": 1}
    for _ in range(5000):
        deep = {"n": 1, "kids": [deep]}
    assert complaints(take, {"node": deep}) == ["$: nested too deeply"]


def test_the_error_belongs_to_the_family() -> None:
    error = ArgumentsInvalid(["$.a: must be b", "$: c"])
    assert isinstance(error, Error)
    assert isinstance(error, ValueError)
    assert error.message.endswith("\n$.a: must be b\n$: c")


# --- properties -----------------------------------------------------------------------------------------------------


def anything(value: Any) -> None: ...


ANYTHING = ParameterSchema.of(anything)
ORDER = ParameterSchema.of(order)


def mistakes(schema: ParameterSchema, arguments: dict[str, Any] | str) -> list[str]:
    try:
        schema.parse(arguments)
    except ArgumentsInvalid as error:
        return error.errors
    return []


def is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        return False
    return True


@given(JSON.filter(is_json))
def test_json_data_comes_through_unchanged(value: Any) -> None:
    assert ANYTHING.parse({"value": value}) == {"value": value}
    assert ANYTHING.parse(json.dumps({"value": value})) == {"value": value}


@given(st.text() | JSON.map(json.dumps))
def test_no_text_escapes_the_family_of_errors(text: str) -> None:
    for schema in (ORDER, ANYTHING):
        lines = mistakes(schema, text)
        assert len(lines) <= 8
        assert all(line.startswith("$") for line in lines)


@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(("items", "colour", "day", "at", "options", "limit", "mode", "pet", "other"), JSON),
    )
)
def test_what_is_accepted_fits_the_schema(arguments: dict[str, Any]) -> None:
    if not mistakes(ORDER, arguments):
        assert Draft202012Validator(ORDER.json).is_valid(arguments)


@given(st.builds(Node, n=st.integers(), kids=st.lists(st.builds(Node, n=st.integers(), kids=st.just([])))))
def test_a_model_survives_any_wrapping(node: Node) -> None:
    text = node.model_dump_json(indent=1)
    for said in (text, f"```json\n{text}\n```", f"Here [1] is {{it}}:\n{text}\nDone [2]."):
        assert validate_output(Node, said) == node


@given(st.lists(st.integers()))
def test_wrapped_and_bare_are_the_same(numbers: list[int]) -> None:
    assert validate_output(list[int], json.dumps(numbers)) == numbers
    assert validate_output(list[int], json.dumps({"value": numbers})) == numbers
    assert validate_output(list[int], {"value": numbers}) == numbers


@given(st.text(), st.sampled_from([Node, int, list[int], Item | None, Colour]))
def test_no_answer_escapes_the_family_of_errors(text: str, output: Any) -> None:
    with contextlib.suppress(OutputInvalid):
        validate_output(output, text)


@given(st.data())
def test_a_cut_answer_is_never_taken_for_a_whole_one(data: st.DataObject) -> None:
    text = Node(n=1, kids=[Node(n=2, kids=[Node(n=3)]), Node(n=4)]).model_dump_json()
    end = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(OutputInvalid):
        validate_output(Node, "Here: " + text[:end])


# --- structured output ----------------------------------------------------------------------------------------------


def failure(output: Any, given: Any) -> list[str]:
    with pytest.raises(OutputInvalid) as caught:
        validate_output(output, given)
    assert isinstance(caught.value, InvalidOutput)
    return caught.value.errors


def test_text_needs_no_schema() -> None:
    assert json_schema_of(str) is None
    assert validate_output(str, "```json\n{}\n```") == "```json\n{}\n```"


@pytest.mark.parametrize("output", [Item, Node, Point, Options, dict[str, int], Box[int]])
def test_objects_are_asked_for_as_they_are(output: Any) -> None:
    schema = json_schema_of(output)
    assert schema is not None
    Draft202012Validator.check_schema(schema)
    assert schema["type"] == "object"
    assert "value" not in schema.get("properties", {})


@pytest.mark.parametrize("output", [int, list[Item], Item | None, Cat | Dog, Colour, Literal["a"], date, Any, None])
def test_everything_else_is_wrapped(output: Any) -> None:
    schema = json_schema_of(output)
    assert schema is not None
    Draft202012Validator.check_schema(schema)
    assert schema["type"] == "object"
    assert schema["required"] == ["value"]


def test_repairable_lines() -> None:
    assert failure(Item, '{"nam": "x"}') == [
        '$: "nam" is unknown; did you mean "name"? allowed: "name", "price"',
        '$: "name" is missing; it must be a string',
    ]
    assert failure(list[int], '[1, "x"]') == ['$.value[1]: must be an integer; got "x"']
    assert failure(list[int], '{"value": [1, "x"]}') == ['$.value[1]: must be an integer; got "x"']
    assert failure(Item, "I do not know.") == ['$: must be an object as JSON; got text without JSON: "I do not know."']
    assert failure(Literal["yes", "no"], "maybe") == ['$.value: must be one of "yes", "no"; got "maybe"']


def test_words_count_where_the_type_allows_text() -> None:
    assert validate_output(Literal["yes", "no"], " yes\n") == "yes"
    assert validate_output(Colour, "red") is Colour.RED
    assert validate_output(date, "2024-02-28") == date(2024, 2, 28)


def test_an_object_that_only_looks_wrapped() -> None:
    assert validate_output(dict[str, int] | int, '{"value": 3}') == 3
    assert validate_output(dict[str, int] | int, '{"value": 3, "b": 4}') == {"value": 3, "b": 4}


def test_the_first_value_that_fits_is_taken() -> None:
    assert validate_output(Item, 'Draft: {"nam": "a"}. Final: {"name": "b"}. Or {"name": "c"}') == Item(name="b")
    assert validate_output(Item, 'As {"name": "asked"} here:\n```json\n{"name": "b"}\n```') == Item(name="b")


def test_nothing_is_picked_out_of_broken_json() -> None:
    (line,) = failure(Node, '{"n": 1, "kids": [{"n": 2}], x: {"n": 3}}')
    assert "not valid JSON" in line


@pytest.mark.parametrize(
    "text", ["[" * 10**6, "{" * 10**6, '{"a":' * 10**6, '{"a":1}' * 10**5, "```" * 10**6, '["' * 10**6]
)
def test_hostile_text_costs_little(text: str) -> None:
    began = time.process_time()
    assert failure(Node, text)
    assert time.process_time() - began < 2


def test_types_that_have_no_json_are_refused() -> None:
    with pytest.raises(ConfigError, match="pydantic model"):
        json_schema_of(subprocess.Popen)
    with pytest.raises(ConfigError, match="pydantic model"):
        json_schema_of(Callable[[], None])
    with pytest.raises(ConfigError, match="pydantic model"):
        output_adapter(subprocess.Popen)


def test_return_types() -> None:
    assert output_adapter(list[Item]).validate_python([{"name": "a"}]) == [Item(name="a")]
    assert output_adapter(Any).validate_python(math.pi) == math.pi
    assert isinstance(output_adapter(None), TypeAdapter)


# --- cost -----------------------------------------------------------------------------------------------------------


def test_small_arguments_are_checked_fast() -> None:
    def search(query: str, limit: int = 5) -> None: ...

    schema = ParameterSchema.of(search)
    schema.parse({"query": "x"})
    best = math.inf
    for _ in range(20):
        began = time.process_time()
        for _ in range(100):
            schema.parse({"query": "tides", "limit": 3})
        best = min(best, (time.process_time() - began) / 100)
    assert best < 100e-6


def test_heavy_libraries_wait_for_their_first_use() -> None:
    code = (
        "import sys, ridethrough.tools.tool; print([m for m in ('jsonschema', 'docstring_parser') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
