"""Two judgements on tracked writes: did the tracing programs see all that the kernel counted, and is what a round read
the disk at one instant.

The audit compares sectors: the kernel's own count of completed writes and discards of the disk (read first) with what
the programs saw completing and being submitted (read second), so that a race can only hide a miss until the next time.
Submissions are compared exactly only while nothing is in flight: who has an alarm reads again at such a moment.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReading:
    """Counts at one time."""

    kernel_sectors: int
    """Written and discarded, of /sys/block/X/stat."""
    completed_sectors: int
    submitted_sectors: int
    missed_submissions: int
    """Runs of the submission program that an interrupt kept from happening."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditBase:
    """By how much the kernel's count was ahead at most while all was well."""

    completed_ahead: int
    submitted_ahead: int
    missed_submissions: int

    @staticmethod
    def of(reading: AuditReading) -> AuditBase:
        return AuditBase(
            completed_ahead=reading.kernel_sectors - reading.completed_sectors,
            submitted_ahead=reading.kernel_sectors - reading.submitted_sectors,
            missed_submissions=reading.missed_submissions,
        )


class AuditFinding(enum.Enum):
    CLEAN = "clean"
    REPAIR = "repair"
    """Completions were missed, and all submissions were seen: what was marked at submission is read again."""
    LOST_TRACK = "lost_track"
    """Both were missed: nobody knows which blocks changed."""


def judge_audit(base: AuditBase, reading: AuditReading) -> tuple[AuditFinding, AuditBase]:
    """The finding, and the base to judge the next reading by."""
    now = AuditBase.of(reading)
    highest = AuditBase(
        completed_ahead=max(base.completed_ahead, now.completed_ahead),
        submitted_ahead=max(base.submitted_ahead, now.submitted_ahead),
        missed_submissions=now.missed_submissions,
    )
    if now.completed_ahead <= base.completed_ahead:
        # why: the base of submissions does not rise here: a submission that was missed alone must still show when that
        # write's completion is missed later.
        return AuditFinding.CLEAN, base
    if now.submitted_ahead <= base.submitted_ahead and now.missed_submissions == base.missed_submissions:
        return AuditFinding.REPAIR, highest
    return AuditFinding.LOST_TRACK, highest


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundObservation:
    """What happened between the swap that began a round and the end of its last read."""

    was_quiet: bool
    """Every write submitted before the swap was known to have completed before the first read."""
    rewritten_areas: int
    """Areas with a block of the round that were marked at submission since the swap."""
    foreign_completions: int
    """Completions of writes that nobody saw being submitted."""
    untracked_submissions: int
    missed_submissions: int
    """Runs of the submission program that an interrupt kept from happening."""
    failed_writes: int
    pass_through: int
    """Commands that went past the block layer's addresses."""
    beyond_end: int
    """Writes behind the end of the disk as it was."""
    never_completed: int
    """Submissions whose completion nobody saw."""
    is_audit_clean: bool


def is_all_accounted_for(seen: RoundObservation) -> bool:
    """Whether each write that was submitted before the swap was read after it had completed, or is known to be read
    again: what was unaudited until then is not any more."""
    return (
        seen.was_quiet
        and seen.is_audit_clean
        and not (seen.untracked_submissions or seen.missed_submissions or seen.never_completed)
    )


def why_not_still(seen: RoundObservation) -> str:
    """Why what the round read may not be the disk at the instant of the swap; empty if it certainly is.

    The copy is then what all writes submitted before the swap made of the disk, and no later one.
    """
    checks = (
        (not seen.was_quiet, "writes that were under way when the round began did not end in time"),
        (seen.rewritten_areas > 0, f"{seen.rewritten_areas} areas were written again while they were read"),
        (seen.foreign_completions > 0, "writes completed that had begun before tracking did"),
        (seen.untracked_submissions > 0, "more writes were under way at once than tracking has room for"),
        (seen.missed_submissions > 0, "a submission was not seen"),
        (seen.failed_writes > 0, "a write failed"),
        (seen.pass_through > 0, "a command went to the disk past the block layer's addresses"),
        (seen.beyond_end > 0, "a write went behind the end of the disk as it was"),
        (seen.never_completed > 0, "a write was never seen completing"),
        (not seen.is_audit_clean, "completions were missed; their blocks are read again"),
    )
    return next((reason for is_met, reason in checks if is_met), "")
