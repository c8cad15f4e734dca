"""What the authority key signs about a machine, made of what its agent reported; equal facts, equal description."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from config_server.core.registry import KnownDisk
from protocol.control import HostDescription
from protocol.signed_records import TEXT_LENGTH_MAX, DiskDescription, MachineDescription
from protocol.vocabulary import MachineId, VaultId

UNPRINTABLE: Final = "?"


def describe_machine(
    host: HostDescription, disks: Iterable[KnownDisk], *, vault: VaultId, machine: MachineId, version: int
) -> MachineDescription:
    """The protected disks, sorted by identifier. A path that is too long keeps its end."""
    return MachineDescription(
        vault=vault,
        machine=machine,
        version=version,
        name=_printable(host.name)[:TEXT_LENGTH_MAX],
        disks=tuple(
            DiskDescription(
                disk=known.disk,
                name=_printable(known.path)[-TEXT_LENGTH_MAX:],
                size_bytes=known.identity.size_bytes,
                sector_bytes=known.identity.logical_sector_bytes,
            )
            for known in sorted(disks, key=lambda one: one.disk)
            if known.is_protected
        ),
        firmware=host.firmware,
        processors=host.processors,
        memory_bytes=host.memory_bytes or None,
    )


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else UNPRINTABLE for character in text)
