"""What is ordered of one disk, and what is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mobility_agent.core.replication import State
from protocol.errors import ReplicationError
from protocol.vocabulary import Consistency, DiskId


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPace:
    """The orders of one disk."""

    is_paused: bool
    copy_interval_seconds: float
    point_interval_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskStatus:
    """What is told to operators, as of now."""

    disk: DiskId
    path: str
    state: State
    source: str
    size_bytes: int
    copied_bytes: int
    copy_total_bytes: int
    backlog_bytes: int
    epoch: int
    sent_sequence: int
    durable_sequence: int
    committed_sequence: int
    source_reason: str
    """Why the source is no better; empty for the best."""
    is_settled: bool
    unsettled_reason: str
    settled_position: tuple[int, int] | None
    """(epoch, sequence) of the newest settled one since the program began."""
    settled_seconds_ago: float | None
    """Since the newest settled round ended; None before the first since the program began."""
    is_throttled: bool
    """Frames wait for credit of the process server."""
    read_bytes: int
    sent_bytes: int
    rounds: int
    settled_rounds: int
    points: int
    newest_consistency: Consistency | None
    """Of the newest point since the program began."""
    audit_alarms: int
    resyncs: Mapping[str, int]
    """By cause."""
    error: ReplicationError | None
