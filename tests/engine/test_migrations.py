"""The migrations and the tables are two accounts of one schema; a database must not be able to tell which made it."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect
from sqlmodel import SQLModel

from ridethrough.runtime import lease
from ridethrough.runtime.errors import StoreError, StoreVersionError
from ridethrough.runtime.store import Store
from ridethrough.runtime.tables import SCHEMA_VERSION
from ridethrough.runtime.upgrade import alembic_config, migrate, upgrade


def schema_of(path: Path) -> dict[str, str]:
    """Every table and index of a file, in one spelling."""
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'alembic%'")
    found = {name: re.sub(r"\s+", " ", sql).replace(" ,", ",").strip() for name, sql in rows}
    connection.close()
    return found


def can_be_compared(_item: object, name: str | None, *_others: object) -> bool:
    """SQLite does not tell in which direction an index is sorted; the comparison of the statements does."""
    return name != "ix_runs_awaits"


def made_by_migration(path: Path) -> Store:
    store = Store(f"sqlite:///{path}")
    assert upgrade(store) == (None, SCHEMA_VERSION)
    return store


def set_version(path: Path, version: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (version,))
    connection.close()


def test_migrated_and_created_databases_are_the_same(tmp_path: Path) -> None:
    migrated = made_by_migration(tmp_path / "migrated.db")
    created = Store(f"sqlite:///{tmp_path / 'created.db'}")
    created.prepare()
    migrated.prepare()
    assert migrated.version() == created.version() == SCHEMA_VERSION
    assert schema_of(tmp_path / "migrated.db") == schema_of(tmp_path / "created.db")
    migrated.close()
    created.close()


def test_autogenerate_finds_nothing_to_do(tmp_path: Path) -> None:
    store = made_by_migration(tmp_path / "runs.db")
    with store.writer.begin() as connection:
        opts = {"compare_type": True, "compare_server_default": True, "include_object": can_be_compared}
        context = MigrationContext.configure(connection, opts=opts)
        own = {table.name for table in SQLModel.metadata.tables.values()}
        assert own <= set(inspect(connection).get_table_names())
        assert compare_metadata(context, SQLModel.metadata) == []
    store.close()


def test_the_newest_revision_is_the_version_of_the_tables(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'runs.db'}")
    with store.writer.begin() as connection:
        scripts = ScriptDirectory.from_config(alembic_config(connection))
    store.close()
    assert scripts.get_heads() == [SCHEMA_VERSION]


def test_upgrading_twice_changes_nothing(tmp_path: Path) -> None:
    made_by_migration(tmp_path / "runs.db").close()
    before = schema_of(tmp_path / "runs.db")
    store = Store(f"sqlite:///{tmp_path / 'runs.db'}")
    assert upgrade(store) == (SCHEMA_VERSION, SCHEMA_VERSION)
    store.close()
    assert schema_of(tmp_path / "runs.db") == before


def test_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    made_by_migration(tmp_path / "runs.db").close()
    set_version(tmp_path / "runs.db", "9999")
    store = Store(f"sqlite:///{tmp_path / 'runs.db'}")
    with pytest.raises(StoreVersionError, match="9999, newer"):
        upgrade(store)
    store.close()


def test_a_database_in_use_is_not_upgraded(tmp_path: Path) -> None:
    store = made_by_migration(tmp_path / "runs.db")
    with store.writer.begin() as connection:
        store.insert_worker(connection, lease.new_worker(lease.lease_clock(), 60.0))
    set_version(tmp_path / "runs.db", "0000")
    with pytest.raises(StoreError, match="in use by process"):
        upgrade(store)
    store.close()


RUN = {
    "workflow": "mails", "version": "1", "input_digest": "", "priority": 7, "fence": 3, "recoveries": 1, "strikes": 0,
    "strike_seq": 0, "created_at": 1.0,
}  # fmt: skip
STATES = ("queued", "running", "paused", "waiting", "done", "failed", "cancelled")


def made_of_0001(path: Path) -> Store:
    """A database of the first version with a run in every state, a step and a wait in it."""
    store = Store(f"sqlite:///{path}")
    with store.writer.begin() as connection:
        migrate(connection, "0001")
    old = sqlite3.connect(path)
    with old:
        for status in STATES:
            row = {**RUN, "id": status, "root_id": status, "status": status, "pause_reason": "outage"}
            marks = ", ".join("?" * len(row))
            old.execute(f"INSERT INTO runs ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))
        old.execute(
            "INSERT INTO steps (run_id, seq, path, name, kind, status, digest, attempts, started_at, ended_at) "
            "VALUES ('done', 1, 'a', 'a', 'step', 'done', '', 1, 1.0, 2.0)"
        )
        old.execute("INSERT INTO waits (run_id, path, kind, name, since) VALUES ('paused', 'm', 'model', 'outage', 1)")
    old.close()
    return store


def test_an_older_database_is_refused_and_then_upgraded_with_all_that_is_in_it(tmp_path: Path) -> None:
    store = made_of_0001(tmp_path / "runs.db")
    with pytest.raises(StoreVersionError, match="db upgrade"):
        store.prepare()
    assert upgrade(store) == ("0001", SCHEMA_VERSION)
    store.prepare()
    created = Store(f"sqlite:///{tmp_path / 'created.db'}")
    created.prepare()
    created.close()
    assert schema_of(tmp_path / "runs.db") == schema_of(tmp_path / "created.db")
    runs = store.read_now(store.runs)
    assert {run.id for run in runs} == set(STATES)
    assert all((run.awaits, run.tried, run.priority, run.fence) == (None, 0, 7, 3) for run in runs)
    assert [step.path for step in store.read_now(lambda connection: store.steps(connection, "done"))] == ["a"]
    assert [wait.name for wait in store.read_now(lambda connection: store.waits(connection, ["paused"]))] == ["outage"]
    assert store.read_now(store.dangling) == []
    store.close()


def test_an_upgrade_that_fails_half_way_leaves_the_old_schema(tmp_path: Path) -> None:
    store = made_of_0001(tmp_path / "runs.db")
    before = schema_of(tmp_path / "runs.db")
    with store.writer.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE holds (other TEXT)")
    with pytest.raises(StoreError, match="holds"):
        upgrade(store)
    with store.writer.begin() as connection:
        connection.exec_driver_sql("DROP TABLE holds")
    assert schema_of(tmp_path / "runs.db") == before
    assert store.version() == "0001"
    assert upgrade(store) == ("0001", SCHEMA_VERSION)
    store.close()


def test_a_downgrade_takes_back_what_the_upgrade_did(tmp_path: Path) -> None:
    store = made_of_0001(tmp_path / "runs.db")
    before = schema_of(tmp_path / "runs.db")
    upgrade(store)
    with store.writer.begin() as connection:
        command.downgrade(alembic_config(connection), "0001")
    assert schema_of(tmp_path / "runs.db") == before
    assert store.version() == "0001"
    store.close()
