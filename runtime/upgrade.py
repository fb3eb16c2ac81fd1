"""Schema migrations: Alembic's revisions in ``migrations/``, run on an open connection, without an ``alembic.ini``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from ridethrough.runtime import lease
from ridethrough.runtime.errors import StoreError, StoreVersionError
from ridethrough.runtime.store import Store
from ridethrough.runtime.tables import SCHEMA_VERSION

FOLDER = Path(__file__).parent / "migrations"


def upgrade(store: Store) -> tuple[str | None, str]:
    """Bring a database to the schema of this version, all or nothing; the versions before (none: a new one) and after.

    Raises:
        StoreVersionError: its schema is newer, or its tables are another program's.
        StoreError: it cannot be written, or live workers still use it.
    """
    store.database.path.parent.mkdir(parents=True, exist_ok=True)
    try:
        before = store.version()
        if before == SCHEMA_VERSION:
            return before, before
        _refuse_newer(store, before)
        with store.writer.begin() as connection:
            if before is not None:
                _refuse_live_workers(store, connection)
            migrate(connection)
    except SQLAlchemyError as error:
        raise store.database.translate(error) from error
    return before, SCHEMA_VERSION


def migrate(connection: Connection, revision: str = "head") -> None:
    """Run the migrations up to ``revision`` in the connection's transaction."""
    from alembic import command

    command.upgrade(alembic_config(connection), revision)


def alembic_config(connection: Connection) -> Any:
    """Alembic's configuration for the migrations of this package on ``connection``."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _refuse_newer(store: Store, version: str | None) -> None:
    if version is not None and version > SCHEMA_VERSION:
        raise StoreVersionError(
            f"database {store.database.display}: its schema is {version}, newer than this version's {SCHEMA_VERSION}. "
            f"Nothing was changed. Install the newer ridethrough that wrote it."
        )


def _refuse_live_workers(store: Store, connection: Connection) -> None:
    now = lease.lease_clock()
    live = [lease.describe(worker) for worker in store.workers(connection) if not lease.is_gone(worker, now)]
    if live:
        raise StoreError(
            f"database {store.database.display}: it is in use by {', '.join(live)}. Stop them, then upgrade again."
        )
