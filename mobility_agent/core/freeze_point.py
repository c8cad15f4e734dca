"""Decides when a machine is frozen for a moment, and how good the points are that came of it.

No label is better than what happened: whatever is not known to have gone well makes a lesser point.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from protocol.vocabulary import Consistency, DiskId


class FreezeKind(enum.StrEnum):
    """What a freeze is to give."""

    FILE_SYSTEM = "file_system"
    APPLICATION = "application"
    """With the scripts of the machine's applications around it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezeFrequency:
    """The orders; 0 is never. Seconds."""

    freeze_interval_seconds: float = 0.0
    """A live disk of which no round has settled for so long makes the machine be frozen."""
    application_interval_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezeAges:
    """Seconds since then; None: never, since the agent began."""

    agent_began: float
    longest_unsettled: float | None
    """Since its newest settled round, of the disk that is worst off among those that could take part."""
    freeze_tried: float | None
    application_tried: float | None


def choose_freeze(frequency: FreezeFrequency, ages: FreezeAges, *, has_scripts: bool) -> FreezeKind | None:
    """What is due now. What failed is tried again after the same interval, not at once: each try costs the machine."""
    application = frequency.application_interval_seconds
    if has_scripts and application > 0 and _since(ages.application_tried, ages) >= application:
        return FreezeKind.APPLICATION
    interval = frequency.freeze_interval_seconds
    is_behind = _since(ages.longest_unsettled, ages) >= interval
    if interval > 0 and is_behind and _since(ages.freeze_tried, ages) >= interval:
        return FreezeKind.FILE_SYSTEM
    return None


def _since(age: float | None, ages: FreezeAges) -> float:
    """What never happened counts from the agent's begin: a restarting agent does not freeze first of all."""
    return ages.agent_began if age is None else age


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFreezeFacts:
    """What is known of one disk that took part."""

    unsettled_reason: str = ""
    """Why its copy is not of one instant; empty if it is."""
    has_file_systems: bool = True
    """That are mounted for writing."""
    unfrozen: Sequence[str] = ()
    """File systems of it that could not be frozen, or were thawed by somebody else meanwhile, with the reason."""
    held_elsewhere: Sequence[str] = ()
    """Devices on it that somebody holds exclusively for a reason that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezeFacts:
    """What is known of one freeze, after its thaw."""

    kind: FreezeKind
    disks: Mapping[DiskId, DiskFreezeFacts]
    """Those that took part until the end."""
    left_out: Sequence[str] = ()
    """Protected disks of the machine that did not take part, with the reason."""
    were_all_marked: bool
    """Every disk that took part had begun its round before the first thaw."""
    mounts_changed: bool
    """What was mounted after the freeze was not what had been planned for."""
    script_fault: str = ""
    """Why the scripts do not count; empty: all of them succeeded, before and after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezeLabel:
    """What a settled position of one disk may be called, and why it is nothing better (empty for the best)."""

    consistency: Consistency
    reason: str


def label_freeze(facts: FreezeFacts, disk: DiskId) -> FreezeLabel:
    """For one of the disks that took part."""
    of_disk = facts.disks[disk]
    if of_disk.unsettled_reason:
        return FreezeLabel(consistency=Consistency.UNSETTLED, reason=of_disk.unsettled_reason)
    lesser = _why_only_crash(facts, of_disk)
    if lesser:
        return FreezeLabel(consistency=Consistency.CRASH, reason=lesser)
    lesser = _why_not_application(facts)
    if not lesser:
        return FreezeLabel(consistency=Consistency.APPLICATION, reason="")
    if not of_disk.has_file_systems:
        return FreezeLabel(consistency=Consistency.CRASH, reason="no file system of it is mounted for writing")
    is_wanted = facts.kind is FreezeKind.APPLICATION
    return FreezeLabel(consistency=Consistency.FILE_SYSTEM, reason=lesser if is_wanted else "")


def _why_only_crash(facts: FreezeFacts, disk: DiskFreezeFacts) -> str:
    if not facts.were_all_marked:
        return "the time was up before every disk was marked"
    if facts.mounts_changed:
        return "something was mounted or unmounted meanwhile"
    if disk.unfrozen:
        return f"not frozen: {', '.join(disk.unfrozen)}"
    if disk.held_elsewhere:
        return f"in use by somebody unknown: {', '.join(disk.held_elsewhere)}"
    return ""


def _why_not_application(facts: FreezeFacts) -> str:
    """An application may have its data on any of the machine's disks, also where no file system is."""
    if facts.kind is FreezeKind.FILE_SYSTEM:
        return "no scripts were run"
    if facts.script_fault:
        return facts.script_fault
    if facts.left_out:
        return f"not all disks took part: {', '.join(facts.left_out)}"
    lesser = [
        disk for disk, of_disk in facts.disks.items() if of_disk.unsettled_reason or _why_only_crash(facts, of_disk)
    ]
    return f"not all disks are as good: {', '.join(lesser)}" if lesser else ""
