"""Images without a registry: a Debian root, packages, the supervisor; made here, labelled with what they are made of.

The root is ``debian:bookworm-slim`` where it can be pulled, else ``debootstrap`` makes it from the mirror that this
machine's apt uses. Everything above it is a build of the engine, whose cache keeps what has not changed: a new
supervisor costs a second, not a minute. An image carries three labels:

    ridethrough.recipe      SHA-256 of the recipe: root, packages, commands, supervisor. Equal: nothing to do.
    ridethrough.supervisor  digest of the supervisor that is in it
    ridethrough.packages    SHA-256 of the installed packages with their versions (``/opt/ridethrough/packages``)

The first says what was asked for, the last what came of it: two images are the same where both are equal.

An image is built without a name and named at the very end, so a build that breaks off leaves the old one in its place.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
from anyio.abc import Process
from anyio.streams.text import TextReceiveStream

from ridethrough.runtime.backend import current_backend
from ridethrough.runtime.errors import ConfigError, SandboxError, SandboxTimeout, SandboxUnavailable
from ridethrough.runtime.threads import run_in_thread
from ridethrough.sandboxes.engine import Engine
from ridethrough.sandboxes.frames import digest_of, supervisor_source

Say = Callable[[str], None]

SUITE: Final = "bookworm"
PULLED: Final = f"debian:{SUITE}-slim"
RECIPE_LABEL: Final = "ridethrough.recipe"
SUPERVISOR_LABEL: Final = "ridethrough.supervisor"
PACKAGES_LABEL: Final = "ridethrough.packages"
OURS: Final = "ridethrough.image"
"""Label of everything that is made here, also of what a broken build leaves."""

HOME: Final = "/opt/ridethrough"
"""Where the supervisor lies in an image."""

PULL_SECONDS: Final = 120.0
ROOT_SECONDS: Final = 1200.0
BUILD_SECONDS: Final = 3600.0
SILENCE_SECONDS: Final = 600
"""The longest that the engine may say nothing while it works for us."""

LOCK_SECONDS: Final = 0.2
"""Between two looks whether another build has ended."""

LAST_LINES: Final = 15
"""Lines of a failed command that its error shows."""

STALE_SECONDS: Final = 3600.0
"""Nameless images older than that belong to no build that goes on."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an image is made of, on top of the root."""

    name: str
    layers: tuple[tuple[str, ...], ...]
    """Packages, layer by layer; recipes with the same first layers share them."""
    about: str
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    """Further files, by their paths."""

    @property
    def repository(self) -> str:
        """The image's name without a tag."""
        return f"ridethrough/{self.name}"


# git needs perl and brings it. libnss-myhostname knows localhost where the engine gives a container no /etc/hosts. The
# recommended packages are left out everywhere.
_PYTHON: Final = ("python3", "ca-certificates", "curl", "git", "libnss-myhostname", "procps", "ripgrep")
_DESKTOP: Final = (
    *("xvfb", "openbox", "x11vnc", "ffmpeg", "xdotool", "scrot"),
    *("chromium", "fonts-dejavu-core", "python3-pil", "python3-xlib"),
)

# Who works in the browser is a program; nobody is to be asked, greeted or offered anything.
_POLICIES: Final = json.dumps(
    {
        "CommandLineFlagSecurityWarningsEnabled": False,
        "BrowserSignin": 0,
        "SyncDisabled": True,
        "MetricsReportingEnabled": False,
        "DefaultBrowserSettingEnabled": False,
        "PasswordManagerEnabled": False,
        "TranslateEnabled": False,
        "PromotionsEnabled": False,
        "AutofillAddressEnabled": False,
        "AutofillCreditCardEnabled": False,
        "HomepageLocation": "about:blank",
        "NewTabPageLocation": "about:blank",
    },
    indent=1,
)

RECIPES: Final[Mapping[str, Recipe]] = {
    "python": Recipe("python", (_PYTHON,), "Python, git, ripgrep, curl"),
    "desktop": Recipe(
        "desktop",
        (_PYTHON, _DESKTOP),
        "the same, a display and Chromium",
        {"/etc/chromium/policies/managed/ridethrough.json": _POLICIES},
    ),
}

# The root is written to once and thrown away if anything goes wrong: waiting for the disk after each file of each
# package would only cost time. Nobody reads manuals in here.
_DPKG: Final = "force-unsafe-io\n" + "".join(
    f"path-exclude=/usr/share/{folder}/*\n" for folder in ("doc", "info", "locale", "man", "lintian")
)
_APT: Final = """\
APT::Install-Recommends "false";
APT::Get::Assume-Yes "true";
Acquire::Languages "none";
Acquire::Retries "3";
Dpkg::Use-Pty "false";
"""
_INSTALL: Final = (
    "export DEBIAN_FRONTEND=noninteractive && apt-get update -q && {upgrade}apt-get install -q {packages}"
    " && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/*.log /var/log/apt"
)
# Nobody is at home in the workspace; nothing in here makes anybody more than nobody.
_FINISH: Final = (
    "ln -sf python3 /usr/bin/python"
    " && sed -i 's,^nobody:.*,nobody:x:65534:65534:nobody:/workspace:/bin/bash,' /etc/passwd"
    f" && mkdir -p /workspace /run/ridethrough {HOME} && chown 65534:65534 /workspace /run/ridethrough"
    " && chmod 0700 /run/ridethrough"
    " && find / -xdev -perm /6000 -type f -exec chmod a-s {} +"
)
# A script that is run by its name is compiled at every start: the compiled one beside it is what to run. It is not
# checked against the source, because the time stamps of a build mean nothing.
_COMPILE: Final = (
    f"python3 -m compileall -q -b --invalidation-mode unchecked-hash {HOME}/supervisor.py"
    f" && dpkg-query -W -f '${{Package}}=${{Version}}\\n' > {HOME}/packages"
)
_ENV: Final = "ENV HOME=/workspace LANG=C.UTF-8 PYTHONUNBUFFERED=1"

# The root is made in a mount namespace of its own, in memory: no fsync to wait for, and nothing is left when it is
# killed. Where memory cannot be mounted it is made on disk. $1 folder, $2 archive, $3 suite, $4 mirror, $5 sources.
_BOOTSTRAP: Final = """\
set -eu
mkdir "$1"
mount -t tmpfs -o size=2g,mode=0755 ridethrough "$1" 2>/dev/null || true
debootstrap --force-check-gpg --variant=minbase --components=main "$3" "$1" ${4:+"$4"} >&2
printf '%s' "$5" >> "$1/etc/apt/sources.list"
rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/* "$1"/var/log/*.log
for each in doc info locale man; do rm -rf "$1/usr/share/$each"/*; done
tar -C "$1" --numeric-owner --one-file-system -cf "$2" .
"""


ROOT: Final = f"ridethrough/base:{SUITE}-{hashlib.sha256(_BOOTSTRAP.encode()).hexdigest()[:8]}"
"""The root by its name here, wherever it came from; another way to make one makes another."""


@dataclass(frozen=True, slots=True)
class Built:
    """An image that is there now.

    Attributes:
        name: The recipe's.
        tag: By what name sandboxes use it.
        id: The engine's id of it.
        recipe: SHA-256 of what it was made from.
        packages: SHA-256 of the packages that are in it.
        size: Bytes, with the layers that it shares with others.
        seconds: What it took.
        fresh: Whether it was made now; false: it was there.
    """

    name: str
    tag: str
    id: str
    recipe: str
    packages: str
    size: int
    seconds: float
    fresh: bool


def recipe_digest(name: str, base: str | None = None) -> str:
    """SHA-256 of all that goes into an image, hexadecimal; ``base`` as for ``build``.

    Raises:
        ConfigError: there is no such recipe.
    """
    recipe = _recipe(name)
    parts = [_dockerfile(recipe, base or ROOT), _DPKG, _APT, *recipe.files.values(), supervisor_source()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


async def build(
    name: str,
    *,
    say: Say = lambda line: None,
    base: str | None = None,
    force: bool = False,
) -> Built:
    """Make an image, unless it is there as the recipe wants it.

    Args:
        name: A key of ``RECIPES``.
        say: Told what is done, a line at a time.
        base: Another root: a Debian image of the engine or of a registry.
        force: Make it anew, root and all, with the packages of today.

    Raises:
        ConfigError: there is no such recipe.
        SandboxUnavailable: no engine answers, or there is no root to be had, with what to do.
        SandboxError: the build failed, with the last that it said.
    """
    recipe, wanted, started = _recipe(name), recipe_digest(name, base), time.monotonic()
    async with Engine.open() as engine, _alone(say):
        builder = _Builder(engine, say)
        there = None if force else await builder.find(recipe, wanted)
        if there is None:
            await builder.make(recipe, wanted, base or await builder.root(force), force)
            there = await builder.find(recipe, wanted)
            if there is None:
                raise SandboxError(f"{recipe.repository} was made, and is gone: somebody has removed it; try again")
            there = replace(there, fresh=True)
        return replace(there, seconds=time.monotonic() - started)


def _recipe(name: str) -> Recipe:
    try:
        return RECIPES[name]
    except KeyError:
        raise ConfigError(f"there is no recipe for an image {name!r}; there are: {', '.join(RECIPES)}") from None


# --- what the engine is given ---------------------------------------------------------------------------------------


def _dockerfile(recipe: Recipe, root: str) -> str:
    """The steps; those that two recipes share come first, so that the engine takes them from its cache."""
    installs = [
        _INSTALL.format(upgrade="apt-get dist-upgrade -q && " if first else "", packages=" ".join(packages))
        for first, packages in zip((True, *[False] * len(recipe.layers)), recipe.layers, strict=False)
    ]
    return "\n".join(
        [
            f"FROM {root}",
            f"LABEL {OURS}=1",
            "USER root",
            "COPY dpkg.cfg /etc/dpkg/dpkg.cfg.d/ridethrough",
            "COPY apt.conf /etc/apt/apt.conf.d/99ridethrough",
            *[f"RUN {install}" for install in installs],
            *[f"COPY files/{Path(path).name} {path}" for path in recipe.files],
            f"RUN {_FINISH}",
            f"COPY supervisor.py {HOME}/supervisor.py",
            f"RUN {_COMPILE}",
            _ENV,
            "WORKDIR /workspace",
            "USER 65534:65534",
            'CMD ["python3"]',
            "",
        ]
    )


def _context(files: Mapping[str, str | bytes]) -> io.BytesIO:
    """Files as the engine wants them: a tar; without times and owners, so that equal files hit the cache."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    packed.seek(0)
    return packed


class _Builder:
    """Makes images with an engine, and tells what it does."""

    def __init__(self, engine: Engine, say: Say) -> None:
        self.engine = engine
        self.say = say

    # --- what is there ----------------------------------------------------------------------------------------------

    async def find(self, recipe: Recipe, wanted: str) -> Built | None:
        """The image of a recipe, if it is there as wanted; it gets its name back if it has lost it."""
        tag = f"{recipe.repository}:latest"
        for each in (tag, f"{recipe.repository}:{wanted[:12]}"):
            found = await self._inspect(each)
            labels = (found.get("Config") or {}).get("Labels") or {}
            if labels.get(RECIPE_LABEL) == wanted and PACKAGES_LABEL in labels:
                await self._tag(found["Id"], recipe, wanted)
                size, packages = int(found["Size"]), labels[PACKAGES_LABEL]
                return Built(recipe.name, tag, found["Id"], wanted, packages, size, 0.0, False)
        return None

    async def _inspect(self, image: str) -> dict[str, Any]:
        """What the engine knows of an image; nothing where there is none."""

        def look(client: Any) -> dict[str, Any]:
            from docker.errors import ImageNotFound

            try:
                return dict(client.inspect_image(image))
            except ImageNotFound:
                return {}

        return await self.engine.call(look, f"asked for image {image}")

    async def _tag(self, id: str, recipe: Recipe, wanted: str) -> None:
        for tag in (wanted[:12], "latest"):
            await self.engine.call(
                lambda client, tag=tag: client.tag(id, recipe.repository, tag),  # type: ignore[misc]
                f"asked to name an image {recipe.repository}:{tag}",
            )

    # --- the root ---------------------------------------------------------------------------------------------------

    async def root(self, force: bool) -> str:
        """The root's name in the engine; pulled, else made, unless it is there.

        Raises:
            SandboxUnavailable: neither can be done here, with what to do.
        """
        if force or not await self._inspect(ROOT):
            refusal = await self._pull()
            if refusal is not None:
                self.say(f"{PULLED} cannot be pulled ({refusal}); debootstrap makes a root of Debian {SUITE}")
                await self._bootstrap(refusal)
        return ROOT

    async def _pull(self) -> str | None:
        """Pull the root; why not, if it cannot be done."""
        self.say(f"pulling {PULLED}")
        repository, _, tag = PULLED.partition(":")
        try:
            with anyio.fail_after(PULL_SECONDS):
                await self._work(lambda client: client.pull(repository, tag=tag, stream=True, decode=True), "pull")
                await self.engine.call(
                    lambda client: client.tag(PULLED, *ROOT.split(":")), f"asked to name an image {ROOT}"
                )
        except (SandboxError, TimeoutError) as error:
            return _readable(str(error)).strip() or f"not done within {PULL_SECONDS:.0f} s"
        return None

    async def _bootstrap(self, refusal: str) -> None:
        """Make the root from packages, and give it to the engine."""
        _check_can_bootstrap(refusal)
        mirror, sources = await _host_sources()
        if not sources:
            self.say("this machine's apt names no security updates of it: the image will be without them")
        with tempfile.TemporaryDirectory(prefix="ridethrough-root-") as folder:
            archive = Path(folder, "root.tar")
            words = ("sh", "-c", _BOOTSTRAP, "sh", f"{folder}/root", str(archive), SUITE, mirror, sources)
            await _run_alone(words, self.say)
            self.say("importing the root")
            repository, tag = ROOT.split(":")
            await self._work(lambda client: _import(client, archive, repository, tag), "import the root")

    # --- making -----------------------------------------------------------------------------------------------------

    async def make(self, recipe: Recipe, wanted: str, root: str, force: bool) -> None:
        """Build, look at what came of it, label and name it, and clear away what it takes the place of.

        Raises:
            SandboxError: a step failed.
        """
        before = (await self._inspect(f"{recipe.repository}:latest")).get("Id")
        files: dict[str, str | bytes] = {
            "Dockerfile": _dockerfile(recipe, root),
            "dpkg.cfg": _DPKG,
            "apt.conf": _APT,
            "supervisor.py": supervisor_source(),
            **{f"files/{Path(path).name}": text for path, text in recipe.files.items()},
        }
        built = await self._build(files, fresh=force, what=recipe.repository)
        packages = hashlib.sha256(await self._packages(built)).hexdigest()
        labels = {RECIPE_LABEL: wanted, SUPERVISOR_LABEL: digest_of(supervisor_source()), PACKAGES_LABEL: packages}
        text = "".join(f"LABEL {key}={value}\n" for key, value in labels.items())
        named = await self._build({"Dockerfile": f"FROM {built}\n{text}"}, fresh=False, what=recipe.repository)
        await self._tag(named, recipe, wanted)
        await self._clear(recipe, named, before)

    async def _build(self, files: Mapping[str, str | bytes], *, fresh: bool, what: str) -> str:
        """Build an image without a name; the engine's id of it."""

        def start(client: Any) -> Iterator[dict[str, Any]]:
            made: Iterator[dict[str, Any]] = client.build(
                fileobj=_context(files),
                custom_context=True,
                network_mode="host",  # the mirror may be reachable from this machine alone
                buildargs=_proxies(),
                nocache=fresh,
                rm=True,
                forcerm=True,
                decode=True,
            )
            return made

        with _within(BUILD_SECONDS, f"the engine has not built {what}"):
            said = await self._work(start, f"build {what}")
        ids = [line["aux"]["ID"] for line in said if "ID" in (line.get("aux") or {})]
        if not ids:
            raise SandboxError(f"the engine has built {what} and names no image; it is no Docker engine that we know")
        return str(ids[-1])

    async def _packages(self, image: str) -> bytes:
        """The list of packages in an image, out of a container that never runs."""

        def fetch(client: Any) -> bytes:
            made = client.create_container(image, labels={OURS: "1"})["Id"]
            try:
                chunks, _ = client.get_archive(made, f"{HOME}/packages")
                with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as tar:
                    found = tar.extractfile("packages")
                    return b"" if found is None else found.read()
            finally:
                client.remove_container(made, force=True)

        return await self.engine.call(fetch, "asked for the packages of an image")

    async def _clear(self, recipe: Recipe, kept: str, before: str | None) -> None:
        """Remove what has no name any more: the image that was replaced, and what broken builds have left.

        An image that a container still uses stays; the next build removes it.
        """
        limit = time.time() - STALE_SECONDS

        def clear(client: Any) -> None:
            from docker.errors import APIError

            old = [tag for each in client.images(recipe.repository) for tag in each.get("RepoTags") or ()]
            old = [tag for tag in old if client.inspect_image(tag)["Id"] != kept]
            for each in client.images(filters={"dangling": True}):
                if each["Id"] == before or (OURS in (each.get("Labels") or ()) and each["Created"] < limit):
                    old.append(each["Id"])
            for image in old:
                with contextlib.suppress(APIError):
                    client.remove_image(image)

        await self.engine.call(clear, "asked to remove old images")

    async def _work(self, start: Callable[[Any], Iterator[dict[str, Any]]], what: str) -> list[dict[str, Any]]:
        """Let the engine do something long and read what it says to the end.

        The thread is left to itself when the task is cancelled, and ends at the engine's next word: hanging up is what
        breaks off a build.

        Raises:
            SandboxError: it failed, with the last that was said.
        """
        stop, call_soon = threading.Event(), current_backend().call_soon
        tell = partial(call_soon, self._tell)
        try:
            return await run_in_thread(lambda: _listen(self.engine, start, what, tell, stop))
        finally:
            stop.set()

    def _tell(self, text: str) -> None:
        """Say the steps that take time; what the commands in them say is for the error, if there is one."""
        step, _, instruction = _readable(text).partition(" : ")
        if instruction.startswith("RUN"):
            self.say(f"{step.lower()}: {instruction[:90]}...")


def _listen(
    engine: Engine,
    start: Callable[[Any], Iterator[dict[str, Any]]],
    what: str,
    tell: Callable[[str], object],
    stop: threading.Event,
) -> list[dict[str, Any]]:
    """Read what the engine says, in a thread of its own."""
    from docker import APIClient
    from docker.errors import APIError, DockerException
    from requests.exceptions import RequestException

    said: list[dict[str, Any]] = []
    client: APIClient | None = None
    try:
        client = APIClient(str(engine.address), version=engine.api, timeout=SILENCE_SECONDS)
        for line in start(client):
            if stop.is_set():
                break
            said.append(line)
            if "error" in line:
                raise SandboxError(f"the engine was asked to {what}, and failed: {line['error']}\n{_last(said)}")
            if line.get("stream"):
                tell(str(line["stream"]).strip())
        return said
    except (DockerException, RequestException) as error:
        told = error.explanation if isinstance(error, APIError) else error
        raise SandboxError(f"the engine was asked to {what}, and failed: {told}\n{_last(said)}".strip()) from error
    finally:
        if client is not None:
            client.close()


_STEERING: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def _readable(text: str) -> str:
    """Text of a build without what steers a terminal."""
    return "".join(each if each.isprintable() or each == "\n" else " " for each in _STEERING.sub("", text))


def _last(said: Sequence[Mapping[str, Any]]) -> str:
    """The end of what the engine said."""
    text = "".join(str(line.get("stream") or "") for line in said)
    return _readable("\n".join(text.splitlines()[-LAST_LINES:]))


def _import(client: Any, archive: Path, repository: str, tag: str) -> Iterator[dict[str, Any]]:
    """Import a root; the engine says one thing, at the end."""
    answer = client.import_image(str(archive), repository=repository, tag=tag, changes=[f"LABEL {OURS}=1"])
    for line in str(answer).splitlines():
        yield json.loads(line)


def _proxies() -> dict[str, str]:
    """This machine's way to the mirror; the engine keeps these arguments out of the image."""
    names = ("http_proxy", "https_proxy", "no_proxy")
    return {each: os.environ[each] for name in names for each in (name, name.upper()) if os.environ.get(each)}


# --- the root from packages -----------------------------------------------------------------------------------------


def _check_can_bootstrap(refusal: str) -> None:
    """Say what is missing, before anything is done."""
    missing = ""
    if os.geteuid() != 0:
        missing = "root; run it with sudo"
    elif missing := " ".join(each for each in ("debootstrap", "unshare") if shutil.which(each) is None):
        missing += ": apt-get install debootstrap util-linux"
    if missing:
        raise SandboxUnavailable(
            f"there is no root to build an image on: {PULLED} cannot be pulled ({refusal}), and making one needs "
            f"{missing}. Or build on a Debian image that the engine has: --base IMAGE"
        )


async def _host_sources() -> tuple[str, str]:
    """The mirror of this machine's apt for the suite, and its sources of updates to it; empty where it has none.

    apt itself is asked, since it knows all the forms in which sources are written.
    """
    if shutil.which("apt-get") is None:
        return "", ""
    form = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    asked = await anyio.run_process(
        ["apt-get", "indextargets", "--format", form, "Created-By: Packages"], check=False, stdin=subprocess.DEVNULL
    )
    found = dict.fromkeys(tuple(line.split()) for line in asked.stdout.decode().splitlines())
    usable = [
        (uri, release)
        for uri, release, component in (each for each in found if len(each) == 3)
        if component == "main" and uri.startswith(("http://", "https://")) and "@" not in uri
    ]
    mirror = next((uri for uri, release in usable if release == SUITE), "")
    updates = [each for each in usable if each[1] in (f"{SUITE}-updates", f"{SUITE}-security")]
    return mirror, "".join(f"deb {uri} {release} main\n" for uri, release in updates)


async def _run_alone(words: Sequence[str], say: Say) -> None:
    """Run a command in namespaces of its own: it ends with all that it has started, and its mounts with it."""
    alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *words]
    last: deque[str] = deque(maxlen=LAST_LINES)
    with _within(ROOT_SECONDS, "debootstrap has not ended"):
        async with await anyio.open_process(alone, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT) as process:
            try:
                await _told(process, last, say)
            except BaseException:
                process.kill()
                raise
    if process.returncode:
        raise SandboxError("debootstrap failed; it said:\n" + _readable("\n".join(last)))


async def _told(process: Process, last: deque[str], say: Say) -> None:
    """Read what a command says, to its end."""
    assert process.stdout is not None
    rest = ""
    async for text in TextReceiveStream(process.stdout, errors="replace"):
        *lines, rest = (rest + text).split("\n")
        for line in filter(None, lines):
            last.append(line)
            if line.startswith(_STAGES):
                say(f"debootstrap: {_readable(line.removeprefix('I: '))}")
    await process.wait()


_STAGES: Final = ("I: Retrieving Release", "I: Extracting packages", "I: Unpacking the base", "I: Configuring required")


@contextmanager
def _within(seconds: float, what: str) -> Generator[None]:
    try:
        with anyio.fail_after(seconds):
            yield
    except TimeoutError as error:
        raise SandboxTimeout(f"{what} within {seconds / 60:.0f} minutes; try again when there is less to do") from error


# --- one at a time --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _alone(say: Say) -> AsyncGenerator[None]:
    """Hold the lock of this user's builds; the system lets go of it whatever becomes of the process.

    Two users may build at once: they do the same work twice, and the last one names the image.
    """
    path = Path(tempfile.gettempdir(), f"ridethrough-images-{os.getuid()}.lock")
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        await _lock(handle, say)
        yield
    finally:
        os.close(handle)


async def _lock(handle: int, say: Say) -> None:
    told = False
    with _within(BUILD_SECONDS, "another build of this user has not ended"):
        while True:
            try:
                return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    say("another build is going on; this one waits for it")
                told = True
            await anyio.sleep(LOCK_SECONDS)
