"""0005: machines are put into quarantine when two of them have one identity."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("machines", sa.Column("ended_boot_ids", sa.Text, nullable=False, server_default="[]"))
    op.add_column("machines", sa.Column("quarantine_number", sa.BigInteger))
    op.add_column("machines", sa.Column("release_number", sa.BigInteger))
