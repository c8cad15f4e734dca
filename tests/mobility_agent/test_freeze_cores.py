"""The decisions around freezes: what is frozen in which order, when, and what a point may be called then."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from mobility_agent.core.freeze_plan import BlockDevice, FileSystem, MountPlace, plan_freeze
from mobility_agent.core.freeze_point import (
    DiskFreezeFacts,
    FreezeAges,
    FreezeFacts,
    FreezeFrequency,
    FreezeKind,
    choose_freeze,
    label_freeze,
)
from protocol.vocabulary import Consistency, DiskId

ONE, OTHER = DiskId("1" * 32), DiskId("2" * 32)
RANK = {
    consistency: rank
    for rank, consistency in enumerate(
        [Consistency.UNSETTLED, Consistency.CRASH, Consistency.FILE_SYSTEM, Consistency.APPLICATION]
    )
}


def system(identifier: str, path: str, *devices: str, kind: str = "ext4", is_writable: bool = True) -> FileSystem:
    return FileSystem(
        identifier=identifier,
        kind=kind,
        is_writable=is_writable,
        places=(MountPlace(mount=1, path=path),),
        devices=devices or (identifier,),
    )


def paths(systems: tuple[FileSystem, ...]) -> list[str]:
    return [each.path for each in systems]


DISK = BlockDevice(number="8:0", name="sda")
PARTITION = BlockDevice(number="8:1", name="sda1", lower=("8:0",))
SECOND = BlockDevice(number="8:2", name="sda2", lower=("8:0",))
SPARE = BlockDevice(number="8:16", name="sdb")


def test_partitions_and_volumes_lead_to_their_disks() -> None:
    volume = BlockDevice(number="253:0", name="dm-0", lower=("8:2", "8:16"))
    systems = [system("8:1", "/boot"), system("253:0", "/"), system("8:32", "/elsewhere")]
    plan = plan_freeze(systems, [DISK, PARTITION, SECOND, SPARE, volume], {ONE: "8:0", OTHER: "8:16"})
    assert paths(plan.file_systems) == ["/", "/boot"]
    assert plan.disks == {ONE: {"8:1", "253:0"}, OTHER: {"253:0"}}
    assert plan.to_probe == {ONE: (), OTHER: ()}


def test_what_lies_on_a_file_is_frozen_before_what_holds_the_file() -> None:
    loop = BlockDevice(number="7:0", name="loop0", file_system="8:1")
    inner = BlockDevice(number="7:1", name="loop1", file_system="7:0")
    systems = [system("8:1", "/a"), system("7:0", "/z"), system("7:1", "/m")]
    plan = plan_freeze(systems, [DISK, PARTITION, loop, inner], {ONE: "8:0"})
    assert paths(plan.file_systems) == ["/m", "/z", "/a"]


def test_what_is_read_only_needs_no_freeze() -> None:
    plan = plan_freeze([system("8:1", "/", is_writable=False)], [DISK, PARTITION], {ONE: "8:0"})
    assert (plan.file_systems, plan.disks, plan.to_probe) == ((), {ONE: frozenset()}, {ONE: ()})


def test_a_file_system_on_several_devices_concerns_all_of_their_disks() -> None:
    both = system("0:40", "/data", "8:1", "8:16", kind="btrfs")
    plan = plan_freeze([both], [DISK, PARTITION, SPARE], {ONE: "8:0", OTHER: "8:16"})
    assert plan.disks == {ONE: {"0:40"}, OTHER: {"0:40"}}


def test_what_nothing_known_lies_on_is_probed_unless_it_is_swap() -> None:
    swap = replace(SECOND, is_swap=True)
    plan = plan_freeze([], [DISK, PARTITION, swap, SPARE], {ONE: "8:0", OTHER: "8:16"})
    assert plan.to_probe == {ONE: ("sda1",), OTHER: ("sdb",)}


def all_facts() -> Iterator[FreezeFacts]:
    """Every combination of what can go well or wrong, for a machine of two disks."""
    of_disk = [
        DiskFreezeFacts(unsettled_reason=unsettled, has_file_systems=has, unfrozen=unfrozen, held_elsewhere=held)
        for unsettled, has, unfrozen, held in itertools.product(
            ("", "disturbed"), (True, False), ((), ("/efi (vfat): no",)), ((), ("sda3",))
        )
    ]
    for kind, one, other, left_out, marked, changed, fault in itertools.product(
        FreezeKind, of_disk, of_disk, ((), ("/dev/sdc: paused",)), (True, False), (False, True), ("", "failed")
    ):
        yield FreezeFacts(
            kind=kind,
            disks={ONE: one, OTHER: other},
            left_out=left_out,
            were_all_marked=marked,
            mounts_changed=changed,
            script_fault=fault,
        )


def worse(facts: FreezeFacts) -> Iterator[FreezeFacts]:
    """The same with one thing more gone wrong."""
    yield replace(facts, left_out=("/dev/sdc: paused",))
    yield replace(facts, were_all_marked=False)
    yield replace(facts, mounts_changed=True)
    yield replace(facts, script_fault="failed")
    for disk, of_disk in facts.disks.items():
        for changed in (
            replace(of_disk, unsettled_reason="disturbed"),
            replace(of_disk, unfrozen=("/efi (vfat): no",)),
            replace(of_disk, held_elsewhere=("sda3",)),
        ):
            yield replace(facts, disks={**facts.disks, disk: changed})


def test_no_label_is_better_than_what_happened() -> None:
    for facts in all_facts():
        for disk, of_disk in facts.disks.items():
            label = label_freeze(facts, disk)
            assert (label.consistency is Consistency.UNSETTLED) is bool(of_disk.unsettled_reason)
            is_best = label.consistency.value == facts.kind.value
            assert bool(label.reason) is not is_best, "a lesser label has a reason, the wanted one has none"
            if RANK[label.consistency] >= RANK[Consistency.FILE_SYSTEM]:
                assert facts.were_all_marked
                assert not facts.mounts_changed
                assert not of_disk.unfrozen
                assert not of_disk.held_elsewhere
            if label.consistency is Consistency.FILE_SYSTEM:
                assert of_disk.has_file_systems
            if label.consistency is Consistency.APPLICATION:
                assert facts.kind is FreezeKind.APPLICATION
                assert not facts.script_fault
                assert not facts.left_out
                assert all(
                    not each.unsettled_reason and not each.unfrozen and not each.held_elsewhere
                    for each in facts.disks.values()
                )


def test_what_goes_wrong_never_makes_a_better_label() -> None:
    for facts in all_facts():
        for disk in facts.disks:
            now = RANK[label_freeze(facts, disk).consistency]
            for lesser in worse(facts):
                assert RANK[label_freeze(lesser, disk).consistency] <= now


def ages(
    point: float | None = None, tried: float | None = None, application: float | None = None, began: float = 0.0
) -> FreezeAges:
    return FreezeAges(agent_began=began, longest_unsettled=point, freeze_tried=tried, application_tried=application)


OFTEN = FreezeFrequency(freeze_interval_seconds=300, application_interval_seconds=3600)


@pytest.mark.parametrize(
    ("seen", "has_scripts", "due"),
    [
        (ages(began=299), True, None),
        (ages(began=300), True, FreezeKind.FILE_SYSTEM),
        (ages(began=3600), True, FreezeKind.APPLICATION),
        (ages(began=3600), False, FreezeKind.FILE_SYSTEM),
        (ages(began=9e9, point=10, application=10), True, None),
        (ages(began=9e9, point=300, application=10), True, FreezeKind.FILE_SYSTEM),
        (ages(began=9e9, point=9e9, tried=299, application=10), True, None),
        (ages(began=9e9, point=9e9, tried=299, application=3600), True, FreezeKind.APPLICATION),
    ],
)
def test_a_freeze_is_due_when_points_fail_to_come(seen: FreezeAges, has_scripts: bool, due: FreezeKind | None) -> None:
    assert choose_freeze(OFTEN, seen, has_scripts=has_scripts) is due


def test_never_is_never() -> None:
    assert choose_freeze(FreezeFrequency(), ages(began=9e9), has_scripts=True) is None
