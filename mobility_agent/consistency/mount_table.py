"""What is mounted on this machine, and on which devices, from /proc and /sys. Changes nothing. Calls block shortly."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from mobility_agent.core.freeze_plan import BlockDevice, FileSystem, FreezePlan, MountPlace, plan_freeze
from protocol.vocabulary import DiskId

_ESCAPED: Final = re.compile(r"\\([0-7]{3})")
_MOUNTS: Final = Path("/proc/self/mountinfo")
_SWAPS: Final = Path("/proc/swaps")
_BLOCK_DEVICES: Final = Path("/sys/class/block")
_BTRFS: Final = Path("/sys/fs/btrfs")


def freeze_plan(protected: Mapping[DiskId, int]) -> FreezePlan:
    """protected: st_rdev of each disk. Raises OSError."""
    mounts = parse_mounts(_MOUNTS.read_text(encoding="utf-8", errors="surrogateescape"))
    devices = read_block_devices(mounts)
    numbers = {device.name: device.number for device in devices}
    systems = [_with_devices(system, numbers) for system in file_systems(mounts)]
    return plan_freeze(systems, devices, {disk: _number(device) for disk, device in protected.items()})


def mounted_file_systems() -> list[FileSystem]:
    """Raises OSError."""
    return list(file_systems(parse_mounts(_MOUNTS.read_text(encoding="utf-8", errors="surrogateescape"))))


class Mount:
    """A line of mountinfo(5)."""

    def __init__(self, line: str) -> None:
        before, _, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        self.number = int(fields[0])
        self.device = fields[2]
        self.place = _unescaped(fields[4])
        self.kind = rest[0]
        self.source = _unescaped(rest[1])
        self.is_writable = "rw" in rest[2].split(",")


def parse_mounts(text: str) -> list[Mount]:
    return [Mount(line) for line in text.splitlines() if " - " in line]


def file_systems(mounts: Sequence[Mount]) -> Iterator[FileSystem]:
    """Those that lie on a block device by their number or, with btrfs, by their source; each once."""
    by_device: dict[str, list[Mount]] = {}
    for mount in mounts:
        if not mount.device.startswith("0:") or mount.kind == "btrfs":
            by_device.setdefault(mount.device, []).append(mount)
    for device, found in by_device.items():
        first = found[0]
        yield FileSystem(
            identifier=device,
            kind=first.kind,
            is_writable=any(mount.is_writable for mount in found),
            places=tuple(MountPlace(mount=mount.number, path=mount.place) for mount in found),
            devices=(os.path.basename(os.path.realpath(first.source)),) if first.kind == "btrfs" else (device,),
        )


def _with_devices(system: FileSystem, numbers: Mapping[str, str]) -> FileSystem:
    """btrfs names one of its devices: all of them."""
    if system.kind != "btrfs":
        return system
    (name,) = system.devices
    for place in _BTRFS.glob("*/devices"):
        names = os.listdir(place)
        if name in names:
            found = tuple(numbers[each] for each in names if each in numbers)
            return FileSystem(
                identifier=system.identifier,
                kind=system.kind,
                is_writable=system.is_writable,
                places=system.places,
                devices=found,
            )
    return system


def read_block_devices(mounts: Sequence[Mount]) -> list[BlockDevice]:
    """All of this machine."""
    swaps = {os.path.realpath(line.split()[0]) for line in _text(_SWAPS).splitlines()[1:]}
    by_mount = {mount.number: mount.device for mount in mounts}
    found = []
    for place in sorted(_BLOCK_DEVICES.iterdir()):
        number = _text(place / "dev")
        if not number:
            continue  # why: it is just going
        lower = [_text(place.resolve().parent / "dev")] if (place / "partition").exists() else []
        slaves = place / "slaves"
        lower += [_text(slave / "dev") for slave in slaves.iterdir()] if slaves.is_dir() else []
        found.append(
            BlockDevice(
                number=number,
                name=place.name,
                lower=tuple(sorted(filter(None, lower))),
                file_system=by_mount.get(_mount_of(_text(place / "loop" / "backing_file"))),
                is_swap=f"/dev/{place.name.replace('!', '/')}" in swaps,
            )
        )
    return found


def _mount_of(path: str) -> int:
    """The number of the mount that a file is in; -1 if nothing is known of it."""
    if not path:
        return -1
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return -1  # why: a loop device's file may have been removed, or be another root's
    try:
        for line in _text(Path(f"/proc/self/fdinfo/{descriptor}")).splitlines():
            if line.startswith("mnt_id:"):
                return int(line.split()[1])
    finally:
        os.close(descriptor)
    return -1


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda found: chr(int(found[1], 8)), text)


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return ""  # why: this kind of device has no such file, or it is just going
