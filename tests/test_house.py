"""The house stands: links, packaging, pins, public names, and what an import costs in modules."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import ridethrough

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("runtime", "agents", "tools", "sandboxes", "graders")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_is_linked_into_the_namespace_and_packaged(folder: str) -> None:
    assert (ROOT / "src/ridethrough" / folder).resolve() == ROOT / folder
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["sources"][folder] == f"ridethrough/{folder}"
    assert folder in wheel["only-include"]
    assert folder in PROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]


def test_no_other_folder_at_the_root_is_a_package() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= set(FOLDERS)


def test_the_requirement_files_ask_for_what_the_project_declares() -> None:
    core = _requirements("core.in")
    assert core == {*PROJECT["project"]["dependencies"], "hatchling", "editables"}
    assert _requirements("dev.in") == {*PROJECT["project"]["optional-dependencies"]["dev"], "-r core.in"}


def _requirements(name: str) -> set[str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


@pytest.mark.parametrize("name", ["core.txt", "dev.txt"])
def test_every_pin_is_hashed_and_names_no_host(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text()
    assert "://" not in text
    pins = text.count("==")
    assert pins > 10
    assert len([line for line in text.splitlines() if line.endswith("\\") and "==" in line]) == pins


def test_every_public_name_can_be_imported() -> None:
    for name in ridethrough.__all__:
        assert getattr(ridethrough, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        ridethrough.__getattr__("nonsense")


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import ridethrough", ("pydantic", "anyio", "sqlalchemy", "httpx2", "rich", "click")),
        ("from ridethrough import Agent, Limits, tool", ("httpx2", "rich", "alembic", "genai_prices", "click")),
        ("import ridethrough.cli", ("pydantic", "sqlalchemy", "httpx2", "rich")),
    ],
)
def test_an_import_brings_nothing_heavy(statement: str, unwanted: tuple[str, ...]) -> None:
    code = f"{statement}\nimport sys\nprint(*[name for name in {unwanted!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_a_wheel_holds_every_module_and_needs_no_links(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    expected = {
        f"ridethrough/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert packed == expected | {"ridethrough/__init__.py", "ridethrough/cli.py"}
    assert "ridethrough/py.typed" in zipfile.ZipFile(wheel).namelist()
