"""Whose a sandbox is: what the host says, beside what the database has on record.

A host has the sandboxes of everybody: of this database's runs, of other databases', and those that a program made for
itself (``docker_sandbox``), which end by their own timers. Only the first can be judged here.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from ridethrough.sandboxes.sandbox import Found
from ridethrough.sandboxes.standalone import OWNER_LABEL

RUN_LABEL: Final = "ridethrough.run"
STORE_LABEL: Final = "ridethrough.store"
"""Names the database that has a sandbox on record."""

STARTING_SECONDS: Final = 120.0
"""A sandbox that was created and not started for so long was left behind."""

Claim = Literal["owned", "recoverable", "ownerless", "foreign"]
"""Somebody has it; a worker may take it up or archives its workspace; nobody wants it; it is not this database's."""


class Row(Protocol):
    """What a database has on record of a sandbox."""

    id: str
    run_id: str | None
    key: str
    profile: str
    host: str
    worker_id: str
    status: str
    runtime: str
    created_at: float
    expires_at: float


@dataclass(frozen=True, slots=True)
class Lodger:
    """One sandbox.

    Attributes:
        state: The host's word for it; ``missing`` where only the database knows of it.
        run_id: Whose it is, ``None`` while it is kept ready or where nobody knows.
        owner: The worker that holds it, the other database, or ``standalone``.
        claim: Who may remove it.
        why: In words.
    """

    id: str
    profile: str
    state: str
    run_id: str | None
    key: str
    runtime: str
    created_at: float
    owner: str
    claim: Claim
    why: str

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {name: getattr(self, name) for name in self.__slots__}


def store_id(database: Path) -> str:
    """What ``STORE_LABEL`` says of a database: the same for every process of this machine that uses the file."""
    where = f"{platform.node()}:{database.resolve()}"
    return hashlib.blake2b(where.encode(), digest_size=8).hexdigest()


def lodgers(
    found: Iterable[Found],
    rows: Iterable[Row],
    *,
    host: str,
    store_id: str,
    ended: Iterable[str],
    now: float,
) -> Iterator[Lodger]:
    """Everything that ``host`` has, or should have.

    Args:
        found: What it has.
        rows: What the database has on record as alive.
        host: Its name.
        store_id: The database's, as in ``STORE_LABEL``.
        ended: Ids of sandboxes whose runs have ended.
        now: Seconds since 1970.
    """
    known = {row.id: row for row in rows if row.host == host}
    over = frozenset(ended)
    for each in found:
        row = known.pop(each.id, None)
        yield _stranger(each, store_id, now) if row is None else _on_record(row, each, row.id in over, now)
    for row in known.values():
        yield _on_record(row, None, row.id in over, now)


def _on_record(row: Row, found: Found | None, ended: bool, now: float) -> Lodger:
    state = found.state if found is not None else "missing"
    claim, why = _claim(row, state, ended, now)
    return Lodger(
        id=row.id,
        profile=row.profile,
        state=state,
        run_id=row.run_id,
        key=row.key,
        runtime=(found.runtime if found is not None else "") or row.runtime,
        created_at=row.created_at,
        owner=row.worker_id,
        claim=claim,
        why=why,
    )


def _claim(row: Row, state: str, ended: bool, now: float) -> tuple[Claim, str]:
    if ended:
        return "ownerless", "its run has ended"
    if state == "exited" or (state == "missing" and row.status != "starting"):
        return "ownerless", "it is not running any more"
    if row.expires_at >= now:
        return "owned", "its run has it" if row.run_id else "kept ready"
    if row.run_id is None or state == "missing":
        return "ownerless", "its worker has not been heard of"
    return "recoverable", "its worker has not been heard of; the next one takes it up, or archives its workspace"


def _stranger(found: Found, store_id: str, now: float) -> Lodger:
    label = found.labels.get(STORE_LABEL)
    claim, why = _stranger_claim(found, label, store_id, now)
    return Lodger(
        id=found.id,
        profile=found.profile,
        state=found.state,
        run_id=found.labels.get(RUN_LABEL),
        key="",
        runtime=found.runtime,
        created_at=found.created_at,
        owner=_owner(found, store_id),
        claim=claim,
        why=why,
    )


def _owner(found: Found, store_id: str) -> str:
    label, program = found.labels.get(STORE_LABEL), found.labels.get(OWNER_LABEL, "")
    if label is None:
        return f"process {program.partition('@')[0]}" if program else "standalone"
    return "-" if label == store_id else f"database {label}"


def _stranger_claim(found: Found, label: str | None, store_id: str, now: float) -> tuple[Claim, str]:
    if label is not None and label == store_id:
        return "ownerless", "it is not on record"
    if found.state == "exited":
        return "ownerless", "it is not running any more"
    if found.state == "created" and now - found.created_at > STARTING_SECONDS:
        return "ownerless", "it was never started"
    if label is not None:
        return "foreign", "another database has it on record"
    if found.state == "paused" and _has_ended(found.labels.get(OWNER_LABEL, "")):
        return "ownerless", "its program has ended, and a frozen one does not end by itself"
    return "foreign", "a program's own; it ends with it"


def _has_ended(program: str) -> bool:
    """Whether a process of this machine, ``PID@BOOT``, is gone for certain."""
    pid, _, boot = program.partition("@")
    try:
        here = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return False
    return boot == here and pid.isdigit() and not Path("/proc", pid).exists()
