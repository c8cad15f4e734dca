"""The agent's state as records for `status`, the same from the running agent and from its files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mobility_agent.consistency.freeze_points import FreezeOutcome, FreezeTotals
from mobility_agent.core.checkup import PROMISES
from mobility_agent.protection import Protection
from mobility_agent.reports import disk_state, fault_report
from mobility_agent.service import ProtectionStatus

NOT_RUNNING = "not running"


def status_records(protection: Sequence[ProtectionStatus], freezes: FreezeTotals) -> list[dict[str, Any]]:
    """One record a disk, JSON values only."""
    newest = None if freezes.newest is None else freeze_record(freezes.newest)
    return [_record(status) | {"newest_freeze": newest} for status in protection]


def freeze_record(outcome: FreezeOutcome) -> dict[str, Any]:
    """How one freeze went, JSON values only."""
    return {
        "wanted": outcome.kind.value,
        "result": outcome.result,
        "reason": outcome.reason,
        "frozen_seconds": round(outcome.seconds, 6),
        "labels": {disk: label.consistency.value for disk, label in outcome.labels.items()},
        "left_out": list(outcome.left_out),
    }


def records_at_rest(protection: Protection) -> list[dict[str, Any]]:
    """What is known while no agent runs."""
    return [
        _at_rest(entry.path, entry.disk, entry.identity.size_bytes) | {"state": NOT_RUNNING, "release": entry.release}
        for entry in protection.disks
    ]


def _record(status: ProtectionStatus) -> dict[str, Any]:
    now, error = status.replication, status.error
    record = _at_rest(status.path, status.disk, status.identity.size_bytes) | {"release": status.release}
    if now is not None:
        error = error or now.error
        record |= {
            "state": disk_state(now).value,
            "source": now.source,
            "source_reason": now.source_reason,
            "promise": PROMISES.get(now.source, ""),
            "copied_bytes": now.copied_bytes,
            "copy_total_bytes": now.copy_total_bytes,
            "backlog_bytes": now.backlog_bytes,
            "epoch": now.epoch,
            "sent_sequence": now.sent_sequence,
            "durable_sequence": now.durable_sequence,
            "committed_sequence": now.committed_sequence,
            "is_settled": now.is_settled,
            "unsettled_reason": now.unsettled_reason,
            "settled_position": now.settled_position,
            "settled_seconds_ago": now.settled_seconds_ago,
            "is_throttled": now.is_throttled,
            "read_bytes": now.read_bytes,
            "sent_bytes": now.sent_bytes,
            "rounds": now.rounds,
            "settled_rounds": now.settled_rounds,
            "points": now.points,
            "newest_consistency": None if now.newest_consistency is None else now.newest_consistency.value,
            "audit_alarms": now.audit_alarms,
            "resyncs": dict(now.resyncs),
        }
    if error is not None:
        record["error"] = fault_report(error).model_dump()
    return record


def _at_rest(path: str, disk: str | None, size_bytes: int) -> dict[str, Any]:
    return {
        "path": path,
        "disk": disk,
        "state": "waiting",
        "source": "",
        "source_reason": "",
        "promise": "",
        "size_bytes": size_bytes,
        "copied_bytes": 0,
        "copy_total_bytes": 0,
        "backlog_bytes": 0,
        "epoch": 0,
        "sent_sequence": 0,
        "durable_sequence": 0,
        "committed_sequence": 0,
        "is_settled": False,
        "unsettled_reason": "",
        "settled_position": None,
        "settled_seconds_ago": None,
        "is_throttled": False,
        "read_bytes": 0,
        "sent_bytes": 0,
        "rounds": 0,
        "settled_rounds": 0,
        "points": 0,
        "newest_consistency": None,
        "newest_freeze": None,
        "audit_alarms": 0,
        "resyncs": {},
        "error": None,
    }
