"""0004: audit entries know the idempotency key of their request, and no two of one actor have the same."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("audit_entries", sa.Column("request_key", sa.String(128)))
    op.add_column("audit_entries", sa.Column("request_hash", sa.String(64)))
    op.create_index("uq_audit_entries_request", "audit_entries", ["actor", "request_key"], unique=True)
