"""Which disk is which, and who may name it: matching by what identifies a disk, never by its path alone.

The strongest mark that both sides have decides alone: two different world-wide names are two disks, whatever file
systems they share (clones do). A disk without any mark is known by path and size: there is nothing else to go by.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from protocol.control import DiskIdentity, DiskKind, DiskRegistration
from protocol.control_errors import DiskChanged, DiskOfAnotherMachine
from protocol.errors import NotPermitted
from protocol.vocabulary import DiskId, MachineId


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownDisk:
    """A disk as registered before."""

    disk: DiskId
    machine: MachineId
    path: str
    identity: DiskIdentity
    is_protected: bool


def is_same_disk(known: DiskIdentity, found: DiskIdentity) -> bool | None:
    """Whether both describe one disk; None if they have no mark in common to tell by."""
    if known.kind is not found.kind:
        return False
    if known.kind is DiskKind.IMAGE_FILE and known.image_file is not None and found.image_file is not None:
        return _is_same_file(known, found)
    for one, other in (
        (known.wwn, found.wwn),
        (known.serial, found.serial),
        (known.partition_table, found.partition_table),
    ):
        if one is not None and other is not None:
            return one == other
    if known.file_systems and found.file_systems:
        return not set(known.file_systems).isdisjoint(found.file_systems)
    return None


def match_disk(
    registration: DiskRegistration, machine: MachineId, known_disks: Iterable[KnownDisk]
) -> KnownDisk | None:
    """The registered disk that `machine` is naming, None for a new one.

    known_disks: all of this machine's, and those of other machines with the same world-wide name or the disk named.
    Raises NotPermitted (the disk named is another machine's), DiskOfAnotherMachine, DiskChanged.
    """
    known_disks = list(known_disks)
    own = [known for known in known_disks if known.machine == machine]
    if registration.disk is not None and all(known.disk != registration.disk for known in own):
        # why: the same answer for another machine's disk and for one that does not exist
        raise NotPermitted(subject=f"machine {machine}", reason=f"disk {registration.disk} is not one of its disks")
    _check_not_claimed(registration.identity, machine, known_disks)
    match = _find(registration, own)
    if match is None:
        return None
    reason = _difference(match.identity, registration.identity)
    if not reason:
        return match
    if match.is_protected:
        raise DiskChanged(disk=match.disk, reason=reason)
    return None


def _find(registration: DiskRegistration, own: list[KnownDisk]) -> KnownDisk | None:
    for known in own:
        if known.disk == registration.disk:
            if is_same_disk(known.identity, registration.identity) is False:
                raise DiskChanged(disk=known.disk, reason=f"another disk is at {registration.path} now")
            return known
    # why: a protected disk goes before one whose protection ended, if a reformat left both with the same mark
    for known in sorted(own, key=lambda one: not one.is_protected):
        same = is_same_disk(known.identity, registration.identity)
        if same or (same is None and _is_same_place(known, registration)):
            return known
    return None


def _check_not_claimed(identity: DiskIdentity, machine: MachineId, known_disks: list[KnownDisk]) -> None:
    if identity.wwn is None:
        return
    for known in known_disks:
        if known.machine != machine and known.is_protected and known.identity.wwn == identity.wwn:
            raise DiskOfAnotherMachine(mark=identity.wwn)


def _is_same_file(known: DiskIdentity, found: DiskIdentity) -> bool:
    one, other = known.image_file, found.image_file
    if one is None or other is None or (one.file_system, one.inode) != (other.file_system, other.inode):
        return False
    return one.generation is None or other.generation is None or one.generation == other.generation


def _is_same_place(known: KnownDisk, registration: DiskRegistration) -> bool:
    return known.path == registration.path and not _difference(known.identity, registration.identity)


def _difference(known: DiskIdentity, found: DiskIdentity) -> str:
    if known.size_bytes != found.size_bytes:
        return f"its size was {known.size_bytes} bytes and is {found.size_bytes}"
    if known.logical_sector_bytes != found.logical_sector_bytes:
        return f"its sectors were {known.logical_sector_bytes} bytes and are {found.logical_sector_bytes}"
    return ""
