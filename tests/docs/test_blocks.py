"""What runs the pages notices what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.docs.blocks import Page, Wrong, blocks_of, matches


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    execution = Page(tmp_path)
    yield execution
    execution.close()


def run(page: Page, text: str) -> None:
    """Execute the blocks of a page with this text."""
    file = page.folder / "page.md"
    file.write_text(text)
    for block in blocks_of(file):
        page.run(block)


@pytest.mark.parametrize(
    "text",
    [
        "```\nno language\n```",
        "```rust\nlet x = 1;\n```",
        "```text\nwhat is this?\n```",
        "<!-- nonsense -->\n```python\nx = 1\n```",
        "```python\nraise ValueError\n```",
        "<!-- fails: KeyError -->\n```python\nraise ValueError\n```",
        "<!-- fails: KeyError -->\n```python\nx = 1\n```",
        "```python\nprint(1)\n```\n\n<!-- output -->\n```text\n2\n```",
        "<!-- file: app.py -->\n```python\ndef\n```",
        "<!-- file: a.py -->\n```python\nx = 1\n```\n\n<!-- same file: a.py -->\n```python\nx = 2\n```",
        '```toml\nnonsense = "x"\n```',
        "```json\n{\n```",
        "```mermaid\npie\n```",
        "```sh\nmake nonsense\n```",
        "```sh\nrm -r .\n```",
        "```console\nno command\n```",
        "```console\n$ echo a\nb\n```",
        "```console\n$ echo a\n```",
        "```console\n$ true\na\n```",
        "```console\n$ false\n```",
        "```console\n$ false\n$ echo $?\n0\n```",
        "<!-- numbers vary -->\n```console\n$ echo a 1\nb 1\n```",
        "```console\n$ echo a 1\na 2\n```",
    ],
)
def test_what_is_wrong_fails(page: Page, text: str) -> None:
    with pytest.raises((Wrong, ValueError, SyntaxError)):
        run(page, text)


def test_what_is_right_passes(page: Page) -> None:
    run(
        page,
        "<!-- file: a.py -->\n```python\nx = 1\n```\n\n"
        "```python\nfrom a import x\n\nprint(x)\n```\n\n<!-- output -->\n```text\n1\n```\n\n"
        "<!-- fails: KeyError -->\n```python\n{}[x]\n```\n\n<!-- output -->\n```text\nKeyError: 1\n```\n\n"
        "```console\n$ mkdir b && cd b\n$ basename $PWD\nb\n$ false\n$ echo $?\n1\n```\n",
    )


@pytest.mark.parametrize(
    ("expected", "shown", "same"),
    [
        ("a\n", "a\n", True),
        ("a\n", "a\nb\n", False),
        ("a\n...\n", "a\nb\nc\n", True),
        ("...\nc\n", "c\n", True),
        ("a ... c\n", "a b c\n", True),
        ("a ... c\n", "a b\nc\n", False),
        ("at 07:39:08 in 1.3 s\n", "at 23:00:00 in 12 ms\n", True),
        ("cost $1.3\n", "cost $1.4\n", False),
        ("", "a\n", False),
        ("a  b\n", "a b \n", True),
    ],
)
def test_expected_output(expected: str, shown: str, same: bool) -> None:
    assert matches(expected, shown) == same


@pytest.mark.parametrize(
    ("expected", "shown", "same"),
    [
        ("cost $1.3\n", "cost $1.4\n", True),
        ("first 3 of 4 in 1.3 s\n", "first 30 of 40 in 12 ms\n", True),
        ("share 80% 0%\n", "share 5% 12%\n", True),
        ("  first  oo%xx.\n", "  first  oooooooxx\n", True),
        ("lost 0 calls\n", "lost 0 runs\n", False),
    ],
)
def test_measurements(expected: str, shown: str, same: bool) -> None:
    assert matches(expected, shown, numbers=False) == same
