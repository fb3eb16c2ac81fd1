"""What the sandboxes keep: who owns which, and what was asked of their proxy.

Frozen, as 0001.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_TABLES = ("egress", "sandboxes")


def upgrade() -> None:
    """Make the tables."""
    op.add_column("intents", sa.Column("sandbox", sa.String(), nullable=True))
    op.create_table(
        "sandboxes",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=True),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("profile", sa.String(), nullable=False),
        sa.Column("spec", sa.Text(), nullable=True),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("worker_id", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("live", sa.Boolean(), nullable=False),
        sa.Column("runtime", sa.String(), nullable=False),
        sa.Column("proof", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.Column("archive_ref", sa.String(), nullable=True),
        sa.Column("detail", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "ix_sandboxes_run",
        "sandboxes",
        ["run_id"],
        sqlite_where=sa.text("run_id IS NOT NULL"),
        postgresql_where=sa.text("run_id IS NOT NULL"),
    )
    op.create_index(
        "ix_sandboxes_host", "sandboxes", ["host"], sqlite_where=sa.text("live = 1"), postgresql_where=sa.text("live")
    )
    op.create_table(
        "egress",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("sandbox_id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=True),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.Column("allowed", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("bytes_in", sa.BigInteger(), nullable=False),
        sa.Column("bytes_out", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("seq"),
    )
    op.create_index("ix_egress_run", "egress", ["run_id"])
    op.create_index("ix_egress_at", "egress", ["at"])


def downgrade() -> None:
    """Delete the tables, with everything in them."""
    for table in _TABLES:
        op.drop_table(table)
    op.drop_column("intents", "sandbox")
