"""The names of a vault's objects (SEGMENT_FORMAT.md, "Names"): typed values out of names and back, and nothing else.

Numbers have a fixed width, so that the byte order of names is the order of numbers. `str(parse(name)) == name` always.
Names of maps, folds, heads and pins have their place in the document; this version writes and reads none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, TypeAlias

from protocol.errors import InvalidValue
from protocol.signed_records import MACHINE_VERSION_MAX
from protocol.vocabulary import EPOCH_MAX, DiskId, MachineId, PointId, VaultId, check_identifier, check_range

EPOCH_DIGITS: Final = 10
ORDINAL_DIGITS: Final = 12
VERSION_DIGITS: Final = 10
ORDINAL_MAX: Final = 10**ORDINAL_DIGITS - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class VaultName:
    """The vault's description."""

    vault: VaultId

    def __post_init__(self) -> None:
        check_identifier(self.vault, "vault")

    def __str__(self) -> str:
        return f"vaults/{self.vault}/vault.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineName:
    """One version of a machine's description."""

    vault: VaultId
    machine: MachineId
    version: int

    def __post_init__(self) -> None:
        check_identifier(self.vault, "vault")
        check_identifier(self.machine, "machine")
        check_range(self.version, "version", low=1, high=MACHINE_VERSION_MAX)

    def __str__(self) -> str:
        return f"vaults/{self.vault}/machines/{self.machine}/{self.version:0{VERSION_DIGITS}d}.machine"


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentName:
    """A segment, closing ones included. Ordinals of an epoch are 1, 2, 3…"""

    vault: VaultId
    disk: DiskId
    epoch: int
    ordinal: int

    def __post_init__(self) -> None:
        check_identifier(self.vault, "vault")
        check_identifier(self.disk, "disk")
        check_range(self.epoch, "epoch", low=1, high=EPOCH_MAX)
        check_range(self.ordinal, "ordinal", low=1, high=ORDINAL_MAX)

    def __str__(self) -> str:
        return f"{epoch_prefix(self.vault, self.disk, self.epoch)}{self.ordinal:0{ORDINAL_DIGITS}d}.seg"


@dataclass(frozen=True, slots=True, kw_only=True)
class PointName:
    """A recovery point's signed record."""

    vault: VaultId
    point: PointId

    def __post_init__(self) -> None:
        check_identifier(self.vault, "vault")
        check_identifier(self.point, "point")

    def __str__(self) -> str:
        return f"{points_prefix(self.vault)}{self.point}.point"


ObjectName: TypeAlias = VaultName | MachineName | SegmentName | PointName

_IDENTIFIER: Final = "[0-9a-f]{32}"
_VAULT: Final = re.compile(rf"vaults/({_IDENTIFIER})/vault\.json")
_MACHINE: Final = re.compile(rf"vaults/({_IDENTIFIER})/machines/({_IDENTIFIER})/([0-9]{{{VERSION_DIGITS}}})\.machine")
_SEGMENT: Final = re.compile(
    rf"vaults/({_IDENTIFIER})/disks/({_IDENTIFIER})/([0-9]{{{EPOCH_DIGITS}}})/([0-9]{{{ORDINAL_DIGITS}}})\.seg"
)
_POINT: Final = re.compile(rf"vaults/({_IDENTIFIER})/points/({_IDENTIFIER})\.point")


def parse(name: str) -> ObjectName:
    """The typed name. Raises InvalidValue for everything but a name that this version writes."""
    if match := _SEGMENT.fullmatch(name):
        vault, disk, epoch, ordinal = match.groups()
        return SegmentName(vault=VaultId(vault), disk=DiskId(disk), epoch=int(epoch), ordinal=int(ordinal))
    if match := _POINT.fullmatch(name):
        return PointName(vault=VaultId(match[1]), point=PointId(match[2]))
    if match := _MACHINE.fullmatch(name):
        return MachineName(vault=VaultId(match[1]), machine=MachineId(match[2]), version=int(match[3]))
    if match := _VAULT.fullmatch(name):
        return VaultName(vault=VaultId(match[1]))
    raise InvalidValue(what="object name", value=name, rule="must be one that SEGMENT_FORMAT.md defines")


def disks_prefix(vault: VaultId) -> str:
    return f"vaults/{vault}/disks/"


def disk_prefix(vault: VaultId, disk: DiskId) -> str:
    return f"{disks_prefix(vault)}{disk}/"


def epoch_prefix(vault: VaultId, disk: DiskId, epoch: int) -> str:
    return f"{disk_prefix(vault, disk)}{epoch:0{EPOCH_DIGITS}d}/"


def machines_prefix(vault: VaultId) -> str:
    return f"vaults/{vault}/machines/"


def points_prefix(vault: VaultId) -> str:
    return f"vaults/{vault}/points/"


def behind_folder(prefix: str) -> str:
    """A name that sorts behind everything in the folder `prefix` (which ends in "/") and before what follows the
    folder.
    """
    return prefix.removesuffix("/") + chr(ord("/") + 1)
