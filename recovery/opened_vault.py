"""A vault opened with a recovery key: its disks and their recovery points, from storage alone.

Whatever is offered here was signed under the authority that the key file trusts. A point is known from the bookmark
in its segment, from its signed record, or from both; a record without its bookmark is a witness that something is
missing, and stays in the list so that it is never passed over in silence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from protocol.signed_records import MachineDescription, PointRecord
from protocol.vocabulary import Consistency, DiskId, MachineId, PointId, Position
from recovery.core.point_choice import LATEST, by_age, choose_point, point_text
from recovery.errors import (
    DiskAmbiguous,
    DiskNotFound,
    NewestPointHidden,
    PointDamaged,
    PointDisputed,
    PointNotFound,
)
from storage.backends.object_store import ObjectStore
from storage.disk_archive import DiskArchive, read_vault_of
from storage.errors import PositionNotFound, SegmentAwaited, VaultFault
from storage.history import DiskHistory, HistoryPoint
from storage.keys import RecoveryKey, unwrap_vault_key
from storage.object_names import SegmentName
from storage.segment import VerifiedSegment
from storage.vault_records import VaultRecords

_IDENTIFIER_PREFIX: Final = re.compile(r"[0-9a-f]{8,32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDisk:
    """A disk that the vault knows. What no machine description names is None."""

    disk: DiskId
    machine: MachineId | None
    machine_name: str | None
    disk_name: str | None
    size_bytes: int | None

    @property
    def full_name(self) -> str | None:
        return None if self.machine_name is None else f"{self.machine_name}:{self.disk_name}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DiskCatalogue:
    """What storage proves about one disk. points: oldest first. published: those with a signed record.

    disputed: points whose record and bookmark do not agree, with the reason.
    """

    disk: DiskId
    history: DiskHistory
    points: tuple[HistoryPoint, ...]
    published: frozenset[PointId]
    disputed: dict[PointId, str]
    record_damage: tuple[VaultFault, ...]

    def choose(self, selector: str) -> HistoryPoint:
        """The point that `latest`, an identifier or an instant means, proved to be recoverable as far as can be told
        without reading frames.

        Raises PointNotFound, PointAmbiguous, PointSelectorInvalid, PointDisputed, PointDamaged, and NewestPointHidden:
        for `latest` and for instants damage never makes an older point pass for the newest.
        """
        try:
            chosen = choose_point(self.points, selector, disk=self.disk)
        except PointNotFound:
            if self.history.damage:
                raise self.damaged(selector, self.history.damage[0]) from self.history.damage[0]
            raise
        if chosen.point in self.disputed:
            raise PointDisputed(point=chosen.point, reason=self.disputed[chosen.point])
        self.path_to(chosen)
        is_by_identifier = selector != LATEST and chosen.point.startswith(selector.lower())
        hiding = self._hiding_behind(chosen)
        if not is_by_identifier and hiding is not None:
            raise NewestPointHidden(segment=_name_of(hiding), reason=str(hiding), recoverable=point_text(chosen))
        return chosen

    def is_recoverable(self, point: HistoryPoint) -> bool:
        """Whether the history up to the point is whole, as far as can be told without reading frames. Quick."""
        epoch = self.history.epochs.get(point.position.epoch)
        is_reached = epoch is not None and point.position.sequence <= epoch.last_sequence
        return is_reached and point.point not in self.disputed

    def path_to(self, point: HistoryPoint) -> tuple[VerifiedSegment, ...]:
        """The segments that the point is made of. Raises PointDamaged."""
        try:
            return self.history.path_to(point.position)
        except VaultFault as fault:
            raise self.damaged(point.point, fault) from fault

    def damaged(self, point: str, fault: VaultFault) -> PointDamaged:
        """The error for a point that `fault` spoils, with the newest point that it does not."""
        segment, reason = _name_of(fault), str(fault)
        if isinstance(fault, PositionNotFound):
            segment, reason = str(self._behind_the_last(fault)), "it is missing, and nothing behind it is there either"
        newest = self._newest_without(segment)
        recoverable = point_text(newest) if newest else "none"
        return PointDamaged(point=point, segment=segment, reason=reason, recoverable=recoverable)

    def _hiding_behind(self, chosen: HistoryPoint) -> VaultFault | None:
        """What is damaged where points newer than `chosen`, but not newer than the next that is known, may have been.

        A gap that uploads under way explain is no such thing: what lies behind it was not committed.
        """
        if any(point.position > chosen.position for point in self.history.points):
            return None
        for epoch, fault in self.history.faults.items():
            if epoch >= chosen.position.epoch and not isinstance(fault, SegmentAwaited):
                return fault
        return None

    def _newest_without(self, segment: str) -> HistoryPoint | None:
        for point in reversed(self.points):
            try:
                path = self.history.path_to(point.position)
            except VaultFault:
                continue
            if point.point not in self.disputed and segment not in (str(part.name) for part in path):
                return point
        return None

    def _behind_the_last(self, fault: PositionNotFound) -> SegmentName | str:
        position = fault.fields["position"]
        assert isinstance(position, Position)
        epoch = self.history.epochs.get(position.epoch)
        if epoch is None or not epoch.segments:
            return f"epoch {position.epoch} of disk {self.disk}"
        last = epoch.segments[-1].name
        return SegmentName(vault=last.vault, disk=last.disk, epoch=last.epoch, ordinal=last.ordinal + 1)


class OpenedVault:
    """Storage and a recovery key, and nothing else. Made by `open_vault`."""

    def __init__(
        self, store: ObjectStore, key: RecoveryKey, archive: DiskArchive, private_key: X25519PrivateKey
    ) -> None:
        self._records = VaultRecords(store, vault=key.vault, authority=archive.authority)
        self._archive = archive
        self._private_key = private_key

    @property
    def archive(self) -> DiskArchive:
        return self._archive

    @property
    def private_key(self) -> X25519PrivateKey:
        """The vault's private half, in memory only."""
        return self._private_key

    async def disks(self) -> tuple[tuple[StoredDisk, ...], tuple[VaultFault, ...]]:
        """Every disk with history, in ascending order, and what was damaged among the descriptions. Raises
        StoreFault."""
        stored = await self._records.read_machine_descriptions()
        named = {disk.disk: (machine, disk) for machine in stored.descriptions for disk in machine.disks}
        disks = []
        for disk in await self._archive.list_disks():
            machine, description = named.get(disk, (None, None))
            disks.append(
                StoredDisk(
                    disk=disk,
                    machine=machine.machine if machine else None,
                    machine_name=machine.name if machine else None,
                    disk_name=description.name if description else None,
                    size_bytes=description.size_bytes if description else None,
                )
            )
        return tuple(disks), stored.damage

    async def machines(self) -> tuple[MachineDescription, ...]:
        """The newest description of every machine. Raises StoreFault."""
        return (await self._records.read_machine_descriptions()).descriptions

    async def find_disk(self, selector: str) -> StoredDisk:
        """By identifier, by a prefix of it that only one disk has, or as machine-name:disk-name.

        Raises DiskNotFound, DiskAmbiguous, StoreFault.
        """
        disks, _ = await self.disks()
        found = [disk for disk in disks if selector in (disk.disk, disk.full_name)]
        if not found and _IDENTIFIER_PREFIX.fullmatch(selector.lower()):
            found = [disk for disk in disks if disk.disk.startswith(selector.lower())]
        if not found:
            known = ", ".join(disk.disk + (f" ({disk.full_name})" if disk.full_name else "") for disk in disks)
            raise DiskNotFound(selector=selector, known=known or "none")
        if len(found) > 1:
            raise DiskAmbiguous(selector=selector, found=", ".join(disk.disk for disk in found))
        return found[0]

    async def catalogue(self, disk: DiskId) -> DiskCatalogue:
        """Reads and verifies the disk's whole history, without its frames. Raises StoreFault."""
        # why: a point's record follows its segments. Read the other way round, a point that is committed in between
        # would seem to have lost them.
        stored = await self._records.list_points()
        history = await self._archive.history(disk)
        recorded = {record.point: _recorded_point(record, disk) for record in stored.records}
        points = {point.point: point for point in history.points}
        disputed: dict[PointId, str] = {}
        published = set()
        for identifier, point in recorded.items():
            if point is None:
                continue
            published.add(identifier)
            marked = points.get(identifier)
            if marked is not None and (marked.position, marked.instant_ns) != (point.position, point.instant_ns):
                disputed[identifier] = f"it states {point.position}, the disk's history {marked.position}"
            points[identifier] = point
        return DiskCatalogue(
            disk=disk,
            history=history,
            points=tuple(by_age(points.values())),
            published=frozenset(published),
            disputed=disputed,
            record_damage=stored.damage,
        )


async def open_vault(store: ObjectStore, key: RecoveryKey) -> OpenedVault:
    """Raises NotAVault, WrongRecoveryKey, ObjectCorrupt, FormatNotSupported, StoreFault."""
    description = await read_vault_of(store, key)
    private_key = unwrap_vault_key(description, key, url=store.url)
    archive = DiskArchive(store, vault=description.vault, authority=description.authority)
    return OpenedVault(store, key, archive, private_key)


def _recorded_point(record: PointRecord, disk: DiskId) -> HistoryPoint | None:
    for member in record.members:
        if member.disk == disk:
            return HistoryPoint(
                point=record.point,
                position=Position(epoch=member.epoch, sequence=member.sequence),
                consistency=Consistency(record.consistency),
                instant_ns=record.instant_ns,
            )
    return None


def _name_of(fault: VaultFault) -> str:
    return str(fault.fields.get("name", fault))
