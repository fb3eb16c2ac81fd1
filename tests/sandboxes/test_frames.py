"""The codec of the wire; and the supervisor's own copy of it, which has to agree."""

from __future__ import annotations

import ast
import struct
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridethrough.sandboxes import frames, supervisor
from ridethrough.sandboxes.frames import MAX_BODY, MAX_HEADER, Breach, Decoder, encode

SAMPLES: list[tuple[dict[str, Any], bytes]] = [
    ({}, b""),
    ({"n": 1, "op": "ping"}, b""),
    ({"n": 2, "path": "a\u00e4\u20ac\udcff/\n", "size": 2**53, "x": None, "y": [True, 1.5]}, bytes(range(256))),
    ({"s": 1}, b"x" * MAX_BODY),
    ({"long": "x" * (MAX_HEADER - 11)}, b""),
]


@pytest.mark.parametrize("sample", SAMPLES, ids=range(len(SAMPLES)))
def test_what_is_encoded_is_decoded(sample: tuple[dict[str, Any], bytes]) -> None:
    assert Decoder().feed(encode(*sample)) == [sample]


@given(st.lists(st.integers(1, 400), max_size=20))
def test_frames_come_out_whole_however_they_are_cut(cuts: list[int]) -> None:
    data = b"".join(encode(*sample) for sample in SAMPLES[:3])
    decoder = Decoder()
    found: list[tuple[dict[str, Any], bytes]] = []
    for cut in cuts:
        found += decoder.feed(data[:cut])
        data = data[cut:]
    assert found + decoder.feed(data) == SAMPLES[:3]


def framed(text: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">II", len(text), len(body)) + text + body


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">II", MAX_HEADER + 1, 0),
        struct.pack(">II", 2, MAX_BODY + 1),
        b"\xff" * 8,
        framed(b""),
        framed(b"{"),
        framed(b"[]"),
        framed(b"1"),
        framed(b"\xff\xfe"),
        framed(b'{"x": NaN}'),
        framed(b'{"x": -Infinity}'),
        framed(b'{"x": ' + b"9" * 5000 + b"}"),
        framed(b"[" * MAX_HEADER),
        framed(b'{"x":' * 10000 + b"1" + b"}" * 10000),
        encode({"n": 1}) + framed(b"null"),
    ],
)
def test_what_is_no_frame_is_a_breach(data: bytes) -> None:
    with pytest.raises(Breach):
        Decoder().feed(data)


def test_lengths_are_refused_before_their_bytes_come() -> None:
    with pytest.raises(Breach, match="262145"):
        Decoder().feed(struct.pack(">II", 0, MAX_BODY + 1))


def test_nothing_too_large_is_sent() -> None:
    with pytest.raises(ValueError, match="header"):
        encode({"long": "x" * MAX_HEADER})
    with pytest.raises(ValueError, match="body"):
        encode({}, b"x" * (MAX_BODY + 1))


@pytest.mark.parametrize("sample", SAMPLES, ids=range(len(SAMPLES)))
def test_the_supervisor_has_the_same_codec(sample: tuple[dict[str, Any], bytes]) -> None:
    assert supervisor.encode(*sample) == encode(*sample)
    assert list(supervisor.Decoder().feed(encode(*sample))) == [sample]


def test_the_supervisor_has_the_same_numbers() -> None:
    for name in ("PROTOCOL", "MAX_HEADER", "MAX_BODY", "WINDOW"):
        assert getattr(supervisor, name) == getattr(frames, name)


@pytest.mark.parametrize("source", [frames.supervisor_source(), frames.kernel_source()], ids=["supervisor", "kernel"])
def test_what_goes_inside_needs_nothing_but_an_old_python(source: str) -> None:
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert {str(name).partition(".")[0] for name in imported} <= sys.stdlib_module_names
    assert len(source.encode()) < 120_000, "the kernel takes 128 KiB for an argument"


def test_a_digest_names_the_source() -> None:
    assert frames.digest_of(frames.supervisor_source()) == frames.SUPERVISOR_DIGEST
    assert frames.digest_of("x") != frames.SUPERVISOR_DIGEST
    with pytest.raises(AttributeError):
        frames.__getattr__("NOTHING")
