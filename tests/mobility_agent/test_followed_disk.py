"""What is read of a followed disk while it is written to: the audit's readings, and their base."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mobility_agent.core.write_audit import AuditBase, AuditFinding, judge_audit
from mobility_agent.tracking import bpf_calls
from mobility_agent.tracking.followed_disk import FollowedDisk

SECTORS = 8


class BusyDisk(FollowedDisk):
    """Writes complete on it whenever it is looked at, seen by the kernel and by the programs alike."""

    def __init__(self, *, completing: int) -> None:
        self._programs: Any = SimpleNamespace(submission_program=0)
        self.completing = completing
        self._completed = 0

    def _kernel_sectors(self) -> int:
        self._completed += SECTORS * self.completing
        return self._completed

    def counters(self) -> Any:
        self._completed += SECTORS * self.completing
        return SimpleNamespace(completed_sectors=self._completed, submitted_sectors=self._completed)


def test_writes_that_complete_while_the_base_is_read_are_no_missed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpf_calls, "recursion_misses", lambda program: 0)
    disk = BusyDisk(completing=100)
    base = AuditBase.of(disk.read_audit(is_base=True))
    disk.completing = 1
    assert judge_audit(base, disk.read_audit())[0] is AuditFinding.CLEAN
    disk.completing = 0
    assert judge_audit(base, disk.read_audit())[0] is AuditFinding.CLEAN


def test_a_reading_is_never_ahead_of_the_programs_by_what_completes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpf_calls, "recursion_misses", lambda program: 0)
    disk = BusyDisk(completing=0)
    base = AuditBase.of(disk.read_audit(is_base=True))
    disk.completing = 100
    assert judge_audit(base, disk.read_audit())[0] is AuditFinding.CLEAN
