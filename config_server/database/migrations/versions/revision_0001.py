"""0001: the first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    _create_members()
    _create_disks()
    _create_points()
    _create_admission()
    op.create_table(
        "clock_spans",
        sa.Column("generation", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("first_ns", sa.BigInteger, nullable=False),
        sa.Column("last_ns", sa.BigInteger, nullable=False),
    )


def _create_members() -> None:
    op.create_table(
        "process_servers",
        sa.Column("process_server", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("signing_public_key", sa.LargeBinary(32), nullable=False),
        sa.Column("enrolled_ns", sa.BigInteger, nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("port", sa.BigInteger),
        sa.Column("version", sa.String(255), nullable=False),
        sa.Column("cache_bytes", sa.BigInteger, nullable=False),
        sa.Column("cache_limit_bytes", sa.BigInteger, nullable=False),
        sa.Column("faults", sa.Text, nullable=False),
        sa.Column("heard_ns", sa.BigInteger),
    )
    op.create_table(
        "machines",
        sa.Column("machine", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("enrolled_ns", sa.BigInteger, nullable=False),
        sa.Column("process_server", sa.String(32), sa.ForeignKey("process_servers.process_server"), index=True),
        sa.Column("host", sa.Text),
        sa.Column("agent_version", sa.String(255), nullable=False),
        sa.Column("boot_id", sa.String(255), nullable=False),
        sa.Column("heard_ns", sa.BigInteger),
        sa.Column("description_version", sa.BigInteger, nullable=False),
        sa.Column("description", sa.LargeBinary),
    )


def _create_disks() -> None:
    op.create_table(
        "disks",
        sa.Column("disk", sa.String(32), primary_key=True),
        sa.Column("machine", sa.String(32), sa.ForeignKey("machines.machine"), nullable=False, index=True),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("identity", sa.Text, nullable=False),
        sa.Column("wwn", sa.String(255), index=True),
        sa.Column("registered_ns", sa.BigInteger, nullable=False),
        sa.Column("is_protected", sa.Boolean, nullable=False),
        sa.Column("keeps_data", sa.Boolean, nullable=False),
        sa.Column("is_paused", sa.Boolean, nullable=False),
        sa.Column("report", sa.Text),
        sa.Column("reported_ns", sa.BigInteger),
        sa.Column("position", sa.Text),
        sa.Column("newest_used_epoch", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "grants",
        sa.Column("disk", sa.String(32), sa.ForeignKey("disks.disk"), nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("process_server", sa.String(32), sa.ForeignKey("process_servers.process_server"), nullable=False),
        sa.Column("record", sa.LargeBinary, nullable=False),
        sa.Column("issued_ns", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("disk", "epoch"),
    )


def _create_points() -> None:
    op.create_table(
        "points",
        sa.Column("point", sa.String(32), nullable=False),
        sa.Column("disk", sa.String(32), sa.ForeignKey("disks.disk"), nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("instant_ns", sa.BigInteger, nullable=False),
        sa.Column("clock_generation", sa.BigInteger),
        sa.Column("consistency", sa.String(32), nullable=False),
        sa.Column("recorded_ns", sa.BigInteger, nullable=False),
        sa.Column("published_ns", sa.BigInteger),
        sa.PrimaryKeyConstraint("point", "disk"),
    )
    op.create_index("ix_points_disk_position", "points", ["disk", "epoch", "sequence"])
    op.create_index("ix_points_instant", "points", ["instant_ns"])
    op.create_table(
        "publications",
        sa.Column("publication", sa.String(32), primary_key=True),
        sa.Column("machine", sa.String(32), sa.ForeignKey("machines.machine"), nullable=False, index=True),
        sa.Column("point", sa.String(32)),
        sa.Column("version", sa.BigInteger),
        sa.Column("record", sa.LargeBinary, nullable=False),
        sa.Column("ordered_ns", sa.BigInteger, nullable=False),
    )


def _create_admission() -> None:
    op.create_table(
        "join_tokens",
        sa.Column("token", sa.String(32), primary_key=True),
        sa.Column("role", sa.String(32), nullable=False),
        sa.Column("proof_key", sa.LargeBinary(32), nullable=False),
        sa.Column("expires_ns", sa.BigInteger, nullable=False),
        sa.Column("used_by", sa.LargeBinary(32)),
        sa.Column("reply", sa.Text),
    )
    op.create_table(
        "certificates",
        sa.Column("serial", sa.String(40), primary_key=True),
        sa.Column("role", sa.String(32), nullable=False),
        sa.Column("identifier", sa.String(32), nullable=False, index=True),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("valid_from_ns", sa.BigInteger, nullable=False),
        sa.Column("valid_until_ns", sa.BigInteger, nullable=False),
        sa.Column("revocation_number", sa.BigInteger, index=True),
    )
