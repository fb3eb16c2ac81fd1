"""Outputs: everything becomes text once, and long text stays readable."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import math
import time
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from ridethrough.runtime.errors import SerializationError
from ridethrough.tools.output import READ_TOOL, Image, cap_output, render_output, split_images


class Model(BaseModel):
    a: int
    day: date


@dataclasses.dataclass
class Data:
    a: int
    many: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is\n", "as it is\n"),
        (None, "null"),
        (True, "true"),
        (1.5, "1.5"),
        (math.nan, '"NaN"'),
        ([1, "é"], '[1,"é"]'),
        ({"a": {"b": date(2024, 1, 1)}}, '{"a":{"b":"2024-01-01"}}'),
        (Model(a=1, day=date(2024, 1, 1)), '{"a":1,"day":"2024-01-01"}'),
        ([Data(1, ("x",))], '[{"a":1,"many":["x"]}]'),
        (b"ok \xff", "ok \N{REPLACEMENT CHARACTER}"),
        (bytearray(b"ok"), "ok"),
        ({"raw": b"text"}, '{"raw":"text"}'),
        ({"raw": b"\xff\xfe"}, '{"raw":"__4="}'),
        ("half \ud800", "half ?"),
    ],
)
def test_values_as_text(value: Any, text: str) -> None:
    assert render_output(value) == text


def circle() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    return ring


@pytest.mark.parametrize("value", [object(), [object()], circle(), asyncio.Lock()])
def test_values_without_a_form_in_json(value: Any) -> None:
    with pytest.raises(SerializationError) as caught:
        render_output(value, "fetch")
    assert caught.value.message.startswith(f"tool 'fetch' returned a {type(value).__qualname__} ")
    assert "pydantic models" in caught.value.message


def test_half_a_character_inside_a_structure() -> None:
    render_output({"a": "\ud800"}).encode()


@given(st.text(st.characters()))
def test_any_text_can_be_stored(text: str) -> None:
    render_output(text).encode()


def test_short_text_is_left_alone() -> None:
    assert cap_output("x" * 10, 10, "h") == ("x" * 10, False)


def test_the_note_says_how_to_read_on() -> None:
    shown, truncated = cap_output("a" * 60 + "b" * 20 + "c" * 20, 30, "art-1")
    assert truncated
    assert shown.startswith("a" * 20 + "\n[... 70 of 100 characters are left out here; ")
    assert f'{READ_TOOL}(handle="art-1", offset=20)' in shown
    assert shown.endswith("]\n" + "c" * 10)
    assert "were not kept" in cap_output("x" * 100, 10)[0]


@given(st.text(), st.integers(1, 50))
def test_head_and_tail_are_kept(text: str, limit: int) -> None:
    shown, truncated = cap_output(text, limit, "h")
    assert truncated == (len(text) > limit)
    if truncated:
        head = round(limit * 2 / 3)
        assert shown.startswith(text[:head])
        assert shown.endswith(text[len(text) - (limit - head) :])
        assert len(shown) <= limit + 200


def test_fifty_megabytes() -> None:
    text = "x" * 50_000_000
    began = time.process_time()
    shown, _ = cap_output(render_output(text), 20_000, "h")
    assert time.process_time() - began < 0.05
    assert len(shown) < 20_200


# --- pictures -------------------------------------------------------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n\xff"


@pytest.mark.parametrize(
    ("value", "text", "count"),
    [
        (Image(data=PNG), "", 1),
        (["before", Image(data=PNG), "after", Image(data=PNG)], "before\nafter", 2),
        ((1, Image(data=PNG)), [1], 1),
        (["no", "picture"], ["no", "picture"], 0),
        ("text", "text", 0),
    ],
)
def test_pictures_are_told_from_text(value: Any, text: Any, count: int) -> None:
    rest, images = split_images(value)
    assert rest == text
    assert [(base64.b64decode(each.data or ""), each.media_type) for each in images] == [(PNG, "image/jpeg")] * count


def test_a_picture_that_no_provider_takes_is_refused() -> None:
    with pytest.raises(ValueError, match="3750000"):
        Image(data=b"x" * 3_750_001)


def test_a_picture_survives_json() -> None:
    image = Image(data=PNG, media_type="image/png")
    assert Image.model_validate_json(image.model_dump_json()) == image
