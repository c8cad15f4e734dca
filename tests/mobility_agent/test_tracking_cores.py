"""Which source a disk gets, what an audit says, what settles: every combination of what can be the case."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from mobility_agent.core.tracking_choice import (
    KERNEL_VERSION_MIN,
    DiskAbilities,
    MachineAbilities,
    WantedSource,
    choose_source,
)
from mobility_agent.core.write_audit import (
    AuditBase,
    AuditFinding,
    AuditReading,
    RoundObservation,
    is_all_accounted_for,
    judge_audit,
    why_not_still,
)

ABLE_MACHINE = MachineAbilities(
    is_architecture_known=True,
    kernel_version=KERNEL_VERSION_MIN,
    has_kernel_types=True,
    may_trace=True,
    pin_directory="/sys/fs/bpf/farpoint",
    can_pin=True,
)
ABLE_DISK = DiskAbilities(is_block_device=True)
MACHINE_FLAWS: list[tuple[dict[str, Any], str]] = [
    ({"is_architecture_known": False}, "architecture"),
    ({"kernel_version": (5, 16)}, "5.16, and 5.17"),
    ({"has_kernel_types": False}, "btf"),
    ({"may_trace": False}, "CAP_BPF"),
    ({"can_pin": False}, "/sys/fs/bpf/farpoint"),
]
DISK_FLAWS: list[tuple[dict[str, Any], str]] = [
    ({"is_partition": True}, "whole disk"),
    ({"is_direct_access": True}, "DAX"),
    ({"is_multipath_head": True}, "multipath"),
    ({"is_zoned": True}, "zoned"),
    ({"counts_io": False}, "iostats"),
]


def test_a_disk_without_obstacles_is_tracked() -> None:
    for wanted in (WantedSource.AUTO, WantedSource.BITMAP):
        choice = choose_source(wanted, ABLE_MACHINE, ABLE_DISK)
        assert (choice.source, choice.reasons, choice.is_refused) == ("bitmap", (), False)


def test_every_set_of_obstacles_is_named_whole() -> None:
    flaws = [(ABLE_MACHINE, *flaw) for flaw in MACHINE_FLAWS] + [(ABLE_DISK, *flaw) for flaw in DISK_FLAWS]
    for count in range(1, len(flaws) + 1):
        for chosen in itertools.combinations(flaws, count):
            machine, disk = ABLE_MACHINE, ABLE_DISK
            for owner, change, _ in chosen:
                if owner is ABLE_MACHINE:
                    machine = dataclasses.replace(machine, **change)
                else:
                    disk = dataclasses.replace(disk, **change)
            choice = choose_source(WantedSource.AUTO, machine, disk)
            assert choice.source == "scan"
            assert len(choice.reasons) == count
            assert all(word in choice.reason for _, _, word in chosen)
            assert not choice.is_refused
            assert choose_source(WantedSource.BITMAP, machine, disk).is_refused


def test_a_file_is_scanned_whatever_the_machine_can_do() -> None:
    choice = choose_source(WantedSource.AUTO, ABLE_MACHINE, DiskAbilities(is_block_device=False))
    assert (choice.source, choice.reasons) == ("scan", ("it is a file, not a block device",))


def test_the_operator_may_have_the_disk_scanned() -> None:
    choice = choose_source(WantedSource.SCAN, ABLE_MACHINE, ABLE_DISK)
    assert (choice.source, choice.is_refused) == ("scan", False)
    assert "setting" in choice.reason


@pytest.mark.parametrize("version", [(4, 19), (5, 9), (5, 16)])
def test_older_kernels_are_refused(version: tuple[int, int]) -> None:
    machine = dataclasses.replace(ABLE_MACHINE, kernel_version=version)
    assert choose_source(WantedSource.AUTO, machine, ABLE_DISK).source == "scan"


@pytest.mark.parametrize("version", [(5, 17), (6, 1), (6, 18), (7, 0)])
def test_newer_kernels_are_taken(version: tuple[int, int]) -> None:
    machine = dataclasses.replace(ABLE_MACHINE, kernel_version=version)
    assert choose_source(WantedSource.AUTO, machine, ABLE_DISK).source == "bitmap"


def reading(kernel: int, completed: int, submitted: int, missed: int = 0) -> AuditReading:
    return AuditReading(
        kernel_sectors=kernel, completed_sectors=completed, submitted_sectors=submitted, missed_submissions=missed
    )


def test_the_audit_over_all_small_counts() -> None:
    """Of n writes of one sector each, some are missed at completion, some at submission, some are in flight."""
    base = AuditBase.of(reading(1000, 0, 0))
    for done, in_flight, missed, unseen in itertools.product(range(4), repeat=4):
        if missed > done or unseen > done:
            continue
        seen = reading(1000 + done, done - missed, done + in_flight - unseen)
        finding, new_base = judge_audit(base, seen)
        if not missed:
            assert (finding, new_base) == (AuditFinding.CLEAN, base)
        elif unseen > in_flight:
            assert finding is AuditFinding.LOST_TRACK
        else:
            assert finding is AuditFinding.REPAIR
        if missed:
            assert judge_audit(new_base, seen) == (AuditFinding.CLEAN, new_base), "one miss alarms once"


def test_a_race_with_the_kernels_count_hides_a_miss_only_until_the_next_time() -> None:
    base = AuditBase.of(reading(0, 0, 0))
    raced = reading(10, 12, 14)
    assert judge_audit(base, raced) == (AuditFinding.CLEAN, base)
    assert judge_audit(base, reading(16, 15, 16))[0] is AuditFinding.REPAIR


def test_a_known_miss_of_a_submission_makes_a_miss_of_a_completion_one_of_an_unknown_place() -> None:
    base = AuditBase.of(reading(0, 0, 0))
    assert judge_audit(base, reading(8, 8, 20, 1)) == (AuditFinding.CLEAN, base)
    finding, new_base = judge_audit(base, reading(8, 7, 20, 1))
    assert finding is AuditFinding.LOST_TRACK
    assert judge_audit(new_base, reading(9, 7, 20, 1))[0] is AuditFinding.REPAIR


STILL: dict[str, Any] = {
    "was_quiet": True,
    "rewritten_areas": 0,
    "foreign_completions": 0,
    "untracked_submissions": 0,
    "missed_submissions": 0,
    "failed_writes": 0,
    "pass_through": 0,
    "beyond_end": 0,
    "never_completed": 0,
    "is_audit_clean": True,
}
BROKEN: dict[str, Any] = {name: (False if value is True else 1) for name, value in STILL.items()}


def test_only_what_is_wholly_undisturbed_is_still() -> None:
    for choices in itertools.product((False, True), repeat=len(STILL)):
        picked = {name: (BROKEN if is_broken else STILL)[name] for name, is_broken in zip(STILL, choices, strict=True)}
        seen = RoundObservation(**picked)
        assert bool(why_not_still(seen)) == any(choices)
        counted = ("was_quiet", "untracked_submissions", "missed_submissions", "never_completed", "is_audit_clean")
        broken = {name for name, is_broken in zip(STILL, choices, strict=True) if is_broken}
        assert is_all_accounted_for(seen) == broken.isdisjoint(counted)
