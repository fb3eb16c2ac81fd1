"""The migrations and the tables are two accounts of one schema; a database must not be able to tell which made it."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect
from sqlmodel import SQLModel

from ridethrough.runtime import lease
from ridethrough.runtime.errors import StoreError, StoreVersionError
from ridethrough.runtime.store import Store
from ridethrough.runtime.tables import SCHEMA_VERSION
from ridethrough.runtime.upgrade import alembic_config, upgrade


def schema_of(path: Path) -> dict[str, str]:
    """Every table and index of a file, in one spelling."""
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'alembic%'")
    found = {name: re.sub(r"\s+", " ", sql).replace(" ,", ",").strip() for name, sql in rows}
    connection.close()
    return found


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
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
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
