"""Which change source one disk gets: the best that machine, disk and operator allow, and why it is no better.

What stands in the way is listed whole, not only the first of it, so that somebody can mend all of it at once.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

KERNEL_VERSION_MIN: Final = (5, 17)
"""The first that fits tracing programs to its own types, and lets them loop."""


class WantedSource(enum.StrEnum):
    """What the operator asks for."""

    AUTO = "auto"
    """The best that there is."""
    BITMAP = "bitmap"
    """Nothing less: a disk that cannot have it stops with the reasons."""
    SCAN = "scan"


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineAbilities:
    """What tracking asks of a machine."""

    is_architecture_known: bool
    kernel_version: tuple[int, int]
    has_kernel_types: bool
    """/sys/kernel/btf/vmlinux"""
    may_trace: bool
    """CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN."""
    pin_directory: str
    can_pin: bool
    """The directory is, or can be made, in a BPF file system that this process may write to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskAbilities:
    """What tracking asks of a disk."""

    is_block_device: bool
    is_partition: bool = False
    is_direct_access: bool = False
    """Persistent memory: its file systems write past the block layer."""
    is_multipath_head: bool = False
    """Its writes complete as another device's."""
    is_zoned: bool = False
    """Resets of its zones change data and name no length."""
    counts_io: bool = True
    """queue/iostats"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceChoice:
    """The verdict."""

    source: str
    """bitmap or scan"""
    reasons: tuple[str, ...]
    """Why it is no better; empty for the best."""
    is_refused: bool = False
    """The operator wants more than there is: the disk is not to be replicated by anything less."""

    @property
    def reason(self) -> str:
        return "; ".join(self.reasons)


def choose_source(wanted: WantedSource, machine: MachineAbilities, disk: DiskAbilities) -> SourceChoice:
    """The verdict for one disk."""
    if wanted is WantedSource.SCAN:
        return SourceChoice(source="scan", reasons=("the setting `tracking` says so",))
    reasons = (*_obstacles_of_disk(disk), *_obstacles_of_machine(machine))
    if not reasons:
        return SourceChoice(source="bitmap", reasons=())
    return SourceChoice(source="scan", reasons=reasons, is_refused=wanted is WantedSource.BITMAP)


def _obstacles_of_disk(disk: DiskAbilities) -> list[str]:
    if not disk.is_block_device:
        return ["it is a file, not a block device"]
    checks = (
        (disk.is_partition, "it is a partition: protect the whole disk"),
        (disk.is_direct_access, "its file systems write past the block layer (DAX)"),
        (disk.is_multipath_head, "its writes complete on other devices (NVMe multipath)"),
        (disk.is_zoned, "it is zoned: resets of zones are not seen"),
        (not disk.counts_io, "the kernel does not count what is written to it (set queue/iostats to 1)"),
    )
    return [reason for is_met, reason in checks if is_met]


def _obstacles_of_machine(machine: MachineAbilities) -> list[str]:
    found = ".".join(map(str, machine.kernel_version))
    needed = ".".join(map(str, KERNEL_VERSION_MIN))
    checks = (
        (not machine.is_architecture_known, "this processor architecture is not supported"),
        (machine.kernel_version < KERNEL_VERSION_MIN, f"the kernel is {found}, and {needed} is needed"),
        (not machine.has_kernel_types, "the kernel does not describe its types (/sys/kernel/btf/vmlinux)"),
        (not machine.may_trace, "the agent lacks CAP_BPF and CAP_PERFMON"),
        (not machine.can_pin, f"{machine.pin_directory} is not in a BPF file system that the agent may write to"),
    )
    return [reason for is_met, reason in checks if is_met]
