"""The tables, as the queries see them. Migrations make them; a test proves that both agree.

Identifiers are 32 hexadecimal digits, instants nanoseconds of the server's clock, messages their JSON. Machines, disks,
points, and certificates are never deleted here: they end by a mark.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)

process_servers = Table(
    "process_servers",
    metadata,
    Column("process_server", String(32), primary_key=True),
    Column("name", String(255), nullable=False),
    Column("signing_public_key", LargeBinary(32), nullable=False),
    Column("enrolled_ns", BigInteger, nullable=False),
    Column("host", String(255), nullable=False),
    Column("port", BigInteger),
    Column("version", String(255), nullable=False),
    Column("cache_bytes", BigInteger, nullable=False),
    Column("cache_limit_bytes", BigInteger, nullable=False),
    Column("faults", Text, nullable=False),
    Column("heard_ns", BigInteger),
)

policies = Table(
    "policies",
    metadata,
    Column("policy", String(32), primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("version", BigInteger, nullable=False),
    Column("content", Text, nullable=False),
    Column("changed_ns", BigInteger, nullable=False),
)

machines = Table(
    "machines",
    metadata,
    Column("machine", String(32), primary_key=True),
    Column("name", String(255), nullable=False),
    Column("enrolled_ns", BigInteger, nullable=False),
    Column("process_server", String(32), ForeignKey("process_servers.process_server"), index=True),
    Column("host", Text),
    Column("agent_version", String(255), nullable=False),
    Column("boot_id", String(255), nullable=False),
    Column("heard_ns", BigInteger),
    Column("description_version", BigInteger, nullable=False),
    Column("description", LargeBinary),
    Column("policy", String(32), ForeignKey("policies.policy"), index=True),
    Column("ended_boot_ids", Text, nullable=False, server_default="[]"),
    Column("quarantine_number", BigInteger),
    Column("release_number", BigInteger),
)

disks = Table(
    "disks",
    metadata,
    Column("disk", String(32), primary_key=True),
    Column("machine", String(32), ForeignKey("machines.machine"), nullable=False, index=True),
    Column("path", Text, nullable=False),
    Column("identity", Text, nullable=False),
    Column("wwn", String(255), index=True),
    Column("registered_ns", BigInteger, nullable=False),
    Column("is_protected", Boolean, nullable=False),
    Column("keeps_data", Boolean, nullable=False),
    Column("is_paused", Boolean, nullable=False),
    Column("report", Text),
    Column("reported_ns", BigInteger),
    Column("position", Text),
    Column("newest_used_epoch", BigInteger, nullable=False),
)

grants = Table(
    "grants",
    metadata,
    Column("disk", String(32), ForeignKey("disks.disk"), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("process_server", String(32), ForeignKey("process_servers.process_server"), nullable=False),
    Column("record", LargeBinary, nullable=False),
    Column("issued_ns", BigInteger, nullable=False),
    PrimaryKeyConstraint("disk", "epoch"),
)

points = Table(
    "points",
    metadata,
    Column("point", String(32), nullable=False),
    Column("disk", String(32), ForeignKey("disks.disk"), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("instant_ns", BigInteger, nullable=False),
    Column("clock_generation", BigInteger),
    Column("consistency", String(32), nullable=False),
    Column("recorded_ns", BigInteger, nullable=False),
    Column("published_ns", BigInteger),
    PrimaryKeyConstraint("point", "disk"),
    Index("ix_points_disk_position", "disk", "epoch", "sequence"),
    Index("ix_points_instant", "instant_ns"),
)

publications = Table(
    "publications",
    metadata,
    Column("publication", String(32), primary_key=True),
    Column("machine", String(32), ForeignKey("machines.machine"), nullable=False, index=True),
    Column("point", String(32)),
    Column("version", BigInteger),
    Column("record", LargeBinary, nullable=False),
    Column("ordered_ns", BigInteger, nullable=False),
)

join_tokens = Table(
    "join_tokens",
    metadata,
    Column("token", String(32), primary_key=True),
    Column("role", String(32), nullable=False),
    Column("proof_key", LargeBinary(32), nullable=False),
    Column("expires_ns", BigInteger, nullable=False),
    Column("used_by", LargeBinary(32)),
    Column("reply", Text),
)

certificates = Table(
    "certificates",
    metadata,
    Column("serial", String(40), primary_key=True),
    Column("role", String(32), nullable=False),
    Column("identifier", String(32), nullable=False, index=True),
    Column("name", String(255), nullable=False),
    Column("valid_from_ns", BigInteger, nullable=False),
    Column("valid_until_ns", BigInteger, nullable=False),
    Column("revocation_number", BigInteger, index=True),
)

operator_tokens = Table(
    "operator_tokens",
    metadata,
    Column("token", String(32), primary_key=True),
    Column("name", String(255), nullable=False),
    Column("role", String(32), nullable=False),
    Column("secret_hash", String(255), nullable=False),
    Column("created_ns", BigInteger, nullable=False),
    Column("expires_ns", BigInteger, nullable=False),
    Column("used_ns", BigInteger),
    Column("is_revoked", Boolean, nullable=False),
)

audit_entries = Table(
    "audit_entries",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("format", BigInteger, nullable=False),
    Column("at_ns", BigInteger, nullable=False),
    Column("actor_kind", String(32), nullable=False),
    Column("actor", String(255), nullable=False),
    Column("actor_name", String(255), nullable=False),
    Column("action", String(255), nullable=False),
    Column("subject", String(255), nullable=False),
    Column("details", Text, nullable=False),
    Column("hash", String(64), nullable=False),
    Column("request_key", String(128)),
    Column("request_hash", String(64)),
    Index("uq_audit_entries_request", "actor", "request_key", unique=True),
)

clock_spans = Table(
    "clock_spans",
    metadata,
    Column("generation", BigInteger, primary_key=True, autoincrement=False),
    Column("first_ns", BigInteger, nullable=False),
    Column("last_ns", BigInteger, nullable=False),
)
