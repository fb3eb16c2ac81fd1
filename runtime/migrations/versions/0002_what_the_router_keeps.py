"""What the router keeps: attempts, money, answers, deployments; and what a run parked for models waits for.

Frozen, as 0001. The columns of ``runs`` are added in place, so a large database is not copied.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_TABLES = ("answers", "attempts", "budgets", "deployments", "holds")


def _only(condition: str) -> dict[str, Any]:
    """A partial index, in the words of each database."""
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def upgrade() -> None:
    """Add the columns and make the tables."""
    op.add_column("runs", sa.Column("awaits", sa.Text(), nullable=True))
    op.add_column("runs", sa.Column("tried", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.create_index(
        "ix_runs_awaits",
        "runs",
        ["awaits", "workflow", "version", sa.text("priority DESC"), "tried", "parked_at"],
        **_only("awaits IS NOT NULL"),
    )
    op.create_table(
        "answers",
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("response", sa.Text(), nullable=False),
        sa.Column("kept_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_index("ix_answers_kept", "answers", ["kept_at"])
    op.create_table(
        "attempts",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("route", sa.String(), nullable=False),
        sa.Column("deployment", sa.String(), nullable=False),
        sa.Column("provider", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("verdict", sa.String(), nullable=False),
        sa.Column("phase", sa.String(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("code", sa.String(), nullable=True),
        sa.Column("request_id", sa.String(), nullable=True),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("queue_seconds", sa.Float(), nullable=False),
        sa.Column("first_token_seconds", sa.Float(), nullable=True),
        sa.Column("tokens_per_second", sa.Float(), nullable=True),
        sa.Column("input_tokens", sa.Integer(), nullable=True),
        sa.Column("output_tokens", sa.Integer(), nullable=True),
        sa.Column("cost_usd", sa.Float(), nullable=True),
        sa.Column("hedged", sa.Boolean(), nullable=False),
        sa.Column("wasted", sa.Boolean(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=True),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=True),
        sa.Column("workflow", sa.String(), nullable=True),
        sa.Column("agent", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("seq"),
    )
    op.create_index("ix_attempts_loose", "attempts", ["started_at"], **_only("run_id IS NULL"))
    op.create_index("ix_attempts_run", "attempts", ["run_id"])
    op.create_table(
        "budgets",
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("spent", sa.BigInteger(), nullable=False),
        sa.Column("reserved", sa.BigInteger(), nullable=False),
        sa.Column("resets_at", sa.Float(), nullable=True),
        sa.Column("run_id", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_index("ix_budgets_run", "budgets", ["run_id"], **_only("run_id IS NOT NULL"))
    op.create_table(
        "deployments",
        sa.Column("deployment", sa.String(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("worker", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("deployment"),
    )
    op.create_table(
        "holds",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("keys", sa.Text(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_holds_expires", "holds", ["expires_at"])


def downgrade() -> None:
    """Delete the tables and the columns, with everything in them."""
    for table in _TABLES:
        op.drop_table(table)
    op.drop_index("ix_runs_awaits", "runs")
    op.drop_column("runs", "tried")
    op.drop_column("runs", "awaits")
