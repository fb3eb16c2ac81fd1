"""What tests with real sandboxes share: the engine that must be there, images, and whether anything was left behind."""

from __future__ import annotations

import io
import secrets
import shutil
import subprocess
import tarfile
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest

from ridethrough.sandboxes.docker import DockerHost

pytest.register_assert_rewrite("tests.sandboxes.conformance")

SESSION = {"ridethrough.test": secrets.token_hex(6)}
"""On every container that these tests make, so that they look after their own and nobody else's."""

BUSYBOX = "ridethrough-test/busybox"
IMAGE = "ridethrough/python:latest"
FOLDERS = ("bin", "etc", "dev", "proc", "sys", "tmp", "run", "workspace")


class _Docker:
    """The client that looks at the engine from beside, once a test has asked for it."""

    client: Any = None


@pytest.fixture(scope="session")
def engine() -> Any:
    """A docker-py client for an engine that answers; without one the test fails."""
    from docker import APIClient
    from docker.errors import DockerException

    try:
        _Docker.client = _Docker.client or APIClient(version="auto", timeout=30)
    except DockerException as error:
        pytest.fail(f"These tests need a Docker engine: run `make engine` ({error})")
    return _Docker.client


@pytest.fixture(scope="session")
def python_image(engine: Any) -> str:
    """The project's own image."""
    if not engine.images(IMAGE):
        pytest.fail(f"There is no image {IMAGE}: run `make images`")
    return IMAGE


@pytest.fixture(scope="session")
def busybox(engine: Any) -> str:
    """An image with a shell and small tools, and without Python."""
    return _imported(engine, "shell", {"bin/busybox": Path(_busybox()).read_bytes()}, links=_applets())


@pytest.fixture(scope="session")
def bare(engine: Any) -> str:
    """An image with nothing that could run a script."""
    return _imported(engine, "bare", {"bin/nothing": b"\x7fELF"})


@pytest.fixture
async def host(engine: Any, python_image: str) -> AsyncGenerator[DockerHost]:
    """A host whose containers carry the session's label."""
    async with DockerHost.open(labels=SESSION) as host:
        yield host


def left_behind() -> list[str]:
    """Names of the session's containers, in whatever state."""
    label = "=".join(*SESSION.items())
    found = _Docker.client.containers(all=True, filters={"label": label}) if _Docker.client else []
    return [each["Names"][0].removeprefix("/") for each in found]


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> Iterator[None]:
    """No module leaves a container behind."""
    yield
    names = left_behind()
    for name in names:
        _Docker.client.remove_container(name, force=True)
    assert not names, f"containers were left behind: {names}"


def _busybox() -> str:
    found = shutil.which("busybox")
    if found is None:
        pytest.fail("There is no busybox on this machine: run `make engine` as root, or install busybox-static")
    return found


def _applets() -> dict[str, str]:
    listed = subprocess.run([_busybox(), "--list"], capture_output=True, text=True, check=True).stdout.split()
    return {f"bin/{name}": "busybox" for name in listed if name != "busybox"}


def _imported(client: Any, tag: str, files: dict[str, bytes], links: dict[str, str] | None = None) -> str:
    """An image of a few files, made without a registry; one that is there already is taken."""
    name = f"{BUSYBOX}:{tag}"
    if not client.images(name):
        data = tarred(files, links, FOLDERS)
        client.import_image_from_data(data, repository=BUSYBOX, tag=tag, changes=["ENV PATH=/bin"])
    return name


def tarred(files: dict[str, bytes], links: dict[str, str] | None = None, folders: tuple[str, ...] = ()) -> bytes:
    """An archive of programs, links and folders."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for folder in folders:
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for path, data in files.items():
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(data), 0o755
            tar.addfile(entry, io.BytesIO(data))
        for path, target in (links or {}).items():
            entry = tarfile.TarInfo(path)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    return buffer.getvalue()
