"""Finds out what a machine and a disk allow, from /proc and /sys. Changes nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from mobility_agent.core.tracking_choice import DiskAbilities, MachineAbilities
from mobility_agent.tracking.bpf_calls import is_architecture_known

KERNEL_TYPES: Final = Path("/sys/kernel/btf/vmlinux")
_CAP_IPC_LOCK: Final = 14
_CAP_SYS_ADMIN: Final = 21
_CAP_PERFMON: Final = 38
_CAP_BPF: Final = 39


def machine_abilities(pin_directory: Path) -> MachineAbilities:
    """Blocks shortly."""
    return MachineAbilities(
        is_architecture_known=is_architecture_known(),
        kernel_version=_kernel_version(os.uname().release),
        has_kernel_types=KERNEL_TYPES.exists(),
        may_trace=_may_trace(_effective_capabilities()),
        pin_directory=str(pin_directory),
        can_pin=_can_pin(pin_directory),
    )


def may_freeze() -> bool:
    """Whether this process may freeze file systems."""
    return bool(_effective_capabilities() >> _CAP_SYS_ADMIN & 1)


def may_lock_memory() -> bool:
    """Whether this process may lock memory beyond its limit."""
    return bool(_effective_capabilities() >> _CAP_IPC_LOCK & 1)


def disk_abilities(device: int | None) -> DiskAbilities:
    """device: st_rdev of a block device, None for a file. Blocks shortly."""
    if device is None:
        return DiskAbilities(is_block_device=False)
    place = block_device_directory(device)
    return DiskAbilities(
        is_block_device=True,
        is_partition=(place / "partition").exists(),
        is_direct_access=_reads(place / "queue" / "dax") == "1",
        is_multipath_head="/nvme-subsystem/" in os.path.realpath(place),
        is_zoned=_reads(place / "queue" / "zoned") not in ("", "none"),
        counts_io=_reads(place / "queue" / "iostats") != "0",
    )


def block_device_directory(device: int) -> Path:
    """What sysfs says of a block device."""
    return Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")


def _kernel_version(release: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _may_trace(capabilities: int) -> bool:
    def has(number: int) -> bool:
        return bool(capabilities >> number & 1)

    return has(_CAP_SYS_ADMIN) or (has(_CAP_BPF) and has(_CAP_PERFMON))


def _can_pin(directory: Path) -> bool:
    """Whether the nearest part of the path that exists is of a BPF file system and may be written to."""
    place = directory
    # why: os.path, because to be forbidden to look is an answer here, not an error.
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    return _file_system_type(place) == "bpf" and os.access(place, os.W_OK | os.X_OK)


def _file_system_type(place: Path) -> str:
    """Of the mount that a path is in."""
    best, kind, place = "", "", place.resolve()
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        fields, _, rest = line.partition(" - ")
        point = fields.split()[4].encode().decode("unicode_escape")
        # why: of two mounts at one place the later one is on top.
        if len(point) >= len(best) and place.is_relative_to(point):
            best, kind = point, rest.split()[0]
    return kind


def _reads(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""  # why: this kernel or device has no such file
