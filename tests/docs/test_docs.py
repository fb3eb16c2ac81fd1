"""Every fenced block of README.md and docs/ does what the page says.

The blocks of a page run in order, in a folder of the page's own. What a block is, its language says; a comment on the
line above it may say more::

    python                   executed; the blocks of a page share one namespace
        <!-- fails: NAME -->         it must raise an error of that class
        <!-- file: app.py -->        not executed, but written as that file (toml, json and sh too)
        <!-- same file: app.py -->   not executed; that file exists by now and has exactly this text
    text
        <!-- output -->              what the python block before it printed, the error it raised included
        <!-- picture -->             a drawing
    console                  `$ command` lines with the output that is expected of each (both streams together)
        <!-- numbers vary -->        its output has measurements: numbers and timelines need not be the same
    toml                     a configuration that is accepted (with ``file:`` under a name that does not begin with
                             ``ridethrough.``: a scenario)
    json                     is JSON
    mermaid                  a diagram of a known kind
    sh                       set-up of the reader's machine: not executed; each line is a target of the Makefile or
                             stands in ``SETUP``

In expected output a line ``...`` stands for any lines, ``...`` in a line for any text. What is another each time
(times, durations, digests: ``blocks.VOLATILE``) need not be the same. A command that ends with another status than 0 is
followed by ``$ echo $?`` and its status. ``COMMAND &`` goes on until the page ends; the page goes on when the expected
output has come. ``COMMAND & sleep N; kill -9 $!`` is killed when the expected output has come and not after N seconds,
because a busy machine does not keep to them. Ports 8701 and 8702 are replaced by free ones.

Other languages, and comments that mean nothing above their block, fail the test.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.docs.blocks import ROOT, Page, Wrong, blocks_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.processes
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_does_what_the_page_says(page: Path, tmp_path: Path) -> None:
    execution = Page(tmp_path.resolve())
    try:
        for block in blocks_of(page):
            try:
                execution.run(block)
            except Exception as error:
                raise Wrong(f"{page.relative_to(ROOT)}:{block.line}: {error}") from error
    finally:
        execution.close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_block_is_overlooked(page: Path) -> None:
    fences = re.findall(r"^ *```", page.read_text(), re.M)
    assert len(fences) == 2 * len(blocks_of(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", text):
        assert target == "" or "://" not in target, f"{target}: a page names no hosts"
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_anchors_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]*)\)", page.read_text()):
        other = page if not target else page.parent / target
        assert anchor in _anchors(other), f"{page.name}: {target}#{anchor} is not there"


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}
