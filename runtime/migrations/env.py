"""Alembic's entry: run the migrations on the connection that ``ridethrough.runtime.upgrade`` hands over."""

from __future__ import annotations

from alembic import context
from sqlmodel import SQLModel

from ridethrough.runtime import tables as tables  # registers the models

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=SQLModel.metadata,
    # The caller's transaction is the migration's: a failure half-way leaves the old schema.
    transactional_ddl=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
