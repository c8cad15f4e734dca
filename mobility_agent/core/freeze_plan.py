"""Which file systems have to be frozen so that a machine's protected disks hold what its applications believe, and in
which order.

A file system that lies on a file of another one comes before it: to freeze it writes there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from protocol.vocabulary import DiskId


@dataclass(frozen=True, slots=True, kw_only=True)
class MountPlace:
    """One way to a file system."""

    mount: int
    """The kernel's number of the mount: what the path leads to, unless something else was mounted over it."""
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystem:
    """A mounted file system."""

    identifier: str
    """Its device number as the kernel's mount table has it, MAJOR:MINOR; one that no device has for btrfs."""
    kind: str
    is_writable: bool
    places: tuple[MountPlace, ...]
    devices: tuple[str, ...]
    """Numbers of the block devices that it lies on."""

    @property
    def path(self) -> str:
        """The shortest way, for people."""
        return min((place.path for place in self.places), key=lambda path: (len(path), path))


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDevice:
    """A block device, and what it lies on."""

    number: str
    name: str
    lower: tuple[str, ...] = ()
    """Block devices, by number: the disk of a partition, the slaves of device-mapper and md."""
    file_system: str | None = None
    """The identifier of the one that holds a loop device's file."""
    is_swap: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezePlan:
    """file_systems: to be frozen in this order. disks: by protected disk, which of them concern it. to_probe: by
    protected disk, names of devices on it on which nothing is known to lie: somebody who has them open exclusively has
    mounted them where this process cannot see it."""

    file_systems: tuple[FileSystem, ...]
    disks: Mapping[DiskId, frozenset[str]]
    to_probe: Mapping[DiskId, tuple[str, ...]]


def plan_freeze(
    file_systems: Iterable[FileSystem], devices: Iterable[BlockDevice], protected: Mapping[DiskId, str]
) -> FreezePlan:
    """protected: the number of each disk's block device."""
    by_number = {device.number: device for device in devices}
    mounted = {system.identifier: system for system in file_systems}
    below = {number: _below(number, by_number, mounted) for number in by_number}
    under = {
        identifier: frozenset().union(*({number} | below.get(number, frozenset()) for number in system.devices))
        for identifier, system in mounted.items()
    }
    wanted = set(protected.values())
    chosen = [system for system in mounted.values() if system.is_writable and under[system.identifier] & wanted]
    # why: what lies on more things lies on top: a device is in its own set and in those of all that is above it
    chosen.sort(key=lambda system: (-len(under[system.identifier]), system.path))
    has_user = {number for device in by_number.values() for number in device.lower}
    has_user |= {number for system in mounted.values() for number in system.devices}
    return FreezePlan(
        file_systems=tuple(chosen),
        disks={
            disk: frozenset(system.identifier for system in chosen if number in under[system.identifier])
            for disk, number in protected.items()
        },
        to_probe={
            disk: tuple(
                sorted(
                    device.name
                    for device in by_number.values()
                    if number in {device.number} | below[device.number]
                    and device.number not in has_user
                    and not device.is_swap
                )
            )
            for disk, number in protected.items()
        },
    )


def _below(number: str, devices: Mapping[str, BlockDevice], mounted: Mapping[str, FileSystem]) -> frozenset[str]:
    """All that a device lies on, itself not counted."""
    found: set[str] = set()
    waiting = [number]
    while waiting:
        device = devices.get(waiting.pop())
        if device is None:
            continue
        lower = set(device.lower)
        if device.file_system is not None and device.file_system in mounted:
            lower |= {device.file_system, *mounted[device.file_system].devices}
        waiting += lower - found
        found |= lower
    return frozenset(found)
