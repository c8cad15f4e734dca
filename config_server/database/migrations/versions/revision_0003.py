"""0003: replication policies."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "policies",
        sa.Column("policy", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(63), nullable=False, unique=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("changed_ns", sa.BigInteger, nullable=False),
    )
    # why not by alembic's own: on SQLite it makes the table anew, and others refer to it
    op.execute("ALTER TABLE machines ADD COLUMN policy VARCHAR(32) REFERENCES policies (policy)")
    op.create_index("ix_machines_policy", "machines", ["policy"])
