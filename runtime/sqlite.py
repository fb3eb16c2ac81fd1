"""Everything that is particular to SQLite; the only module with SQLite's own SQL.

WAL with ``synchronous=FULL`` is what makes a finished step survive power loss: every commit ends in an fsync of the
log. ``durability="process"`` (``synchronous=NORMAL``) gives that up for speed, by name; it still survives SIGKILL.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPICursor

from ridethrough.runtime.errors import ConfigError, StoreError

Durability = Literal["power", "process"]

BUSY_SECONDS = 10.0
"""How long a write waits for another process's lock before it is an error."""

_HINTS = (
    ("disk is full", "the disk is full. Free some space, then resume; everything that was finished is on disk"),
    ("readonly database", "it is read-only. Make the file and its folder writable for this user, then resume"),
    (
        "database is locked",
        "another process has held its lock for {busy:.0f} s. Find it (it keeps a transaction open), then resume",
    ),
    ("disk I/O error", "the disk failed. Check the file system and its space, then resume"),
    ("not a database", "it is not an SQLite database. Name another file with --db or `database`"),
    ("malformed", "it is damaged. Run `ridethrough db check`, and restore a backup if it says so"),
    ("unable to open", "it cannot be opened. Check that its folder exists and that this user may write there"),
    ("no such table", "its tables are missing. Run `ridethrough db upgrade`"),
    ("no such column", "its tables are of another version. Run `ridethrough db upgrade`"),
)


class SQLite:
    """One database file: how to connect to it, and the few statements that differ between databases."""

    name = "sqlite"
    insert = staticmethod(insert)

    def __init__(self, url: URL, durability: Durability) -> None:
        """``url`` is ``sqlite:///PATH``; a database in memory would not survive anything and is refused."""
        if not url.database or url.database == ":memory:":
            raise ConfigError(
                "database: an SQLite database in memory does not survive a crash. Name a file: sqlite:///runs.db"
            )
        self.path = Path(url.database)
        self.url = url
        self.display = str(self.path)
        self.dialect = sqlite_dialect(paramstyle="qmark")
        self._synchronous = "FULL" if durability == "power" else "NORMAL"

    def engine(self, *, write: bool) -> Engine:
        """An engine whose transactions take the write lock at once (``write``), or read a snapshot."""
        engine = create_engine(
            self.url,
            connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
            pool_size=1 if write else 4,
            max_overflow=0 if write else 4,
        )
        event.listen(engine, "connect", self._configure)
        begin = "BEGIN IMMEDIATE" if write else "BEGIN"
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
        return engine

    def _configure(self, connection: sqlite3.Connection, _record: object) -> None:
        # The driver's own transaction control would open transactions late, as readers, and then fail to upgrade them.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA synchronous={self._synchronous}")
        cursor.execute("PRAGMA temp_store=MEMORY")
        cursor.execute("PRAGMA journal_size_limit=67108864")
        if cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            cursor.execute("PRAGMA journal_mode=WAL")
        cursor.close()

    def begin(self, cursor: DBAPICursor) -> None:
        """Start a writing transaction on the driver's cursor."""
        cursor.execute("BEGIN IMMEDIATE")

    def commit(self, cursor: DBAPICursor) -> None:
        """End it; when this returns, it survives."""
        cursor.execute("COMMIT")

    def rollback(self, cursor: DBAPICursor) -> None:
        """Undo it."""
        cursor.execute("ROLLBACK")

    def fences(self, cursor: DBAPICursor, run_ids: Iterable[str]) -> dict[str, int]:
        """The current fence of each run. A statement each costs 3 us; a list of any length is not cached."""
        found: dict[str, int] = {}
        for run_id in run_ids:
            cursor.execute("SELECT fence FROM runs WHERE id = ?", (run_id,))
            row = cursor.fetchone()
            if row is not None:
                found[run_id] = row[0]
        return found

    def watch(self) -> SQLiteWatch:
        """Tells cheaply whether anything was committed."""
        return SQLiteWatch(self.path)

    def check(self) -> list[str]:
        """What SQLite finds wrong with the file; empty when it is sound."""
        with sqlite3.connect(self.path) as connection:
            rows = connection.execute("PRAGMA integrity_check").fetchall()
        connection.close()
        return [str(row[0]) for row in rows if row[0] != "ok"]

    def reclaim(self) -> None:
        """Give freed pages back to the file system."""
        connection = sqlite3.connect(self.path, isolation_level=None)
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()

    def size(self) -> int:
        """Bytes on disk, the write-ahead log included."""
        files = (self.path, self.path.with_name(self.path.name + "-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def translate(self, error: BaseException) -> StoreError:
        """What an error of the driver means, and what to do about it."""
        text = str(getattr(error, "orig", None) or error)
        for mark, hint in _HINTS:
            if mark in text:
                return StoreError(f"database {self.display}: {hint.format(busy=BUSY_SECONDS)}.")
        return StoreError(f"database {self.display}: {text}.")

    def is_fatal(self, error: BaseException) -> bool:
        """Whether the error is the database's (no write can succeed now) and not one statement's."""
        orig = getattr(error, "orig", None) or error
        return isinstance(orig, sqlite3.OperationalError | OSError) or type(orig) is sqlite3.DatabaseError


class SQLiteWatch:
    """``PRAGMA data_version`` of a connection of its own: changes with every commit of anybody else."""

    def __init__(self, path: Path) -> None:
        """Open the connection; it never starts a transaction."""
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._seen = -1

    def changed(self) -> bool:
        """Whether anything was committed since the last call."""
        try:
            version: Any = self._connection.execute("PRAGMA data_version").fetchone()[0]
        except sqlite3.Error:
            return True
        changed = bool(version != self._seen)
        self._seen = version
        return changed

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
