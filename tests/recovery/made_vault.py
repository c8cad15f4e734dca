"""A vault made by hand in a local directory: real segments, real keys, and an image that knows every byte written."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from protocol.signed_records import (
    DiskDescription,
    MachineDescription,
    PointMember,
    PointRecord,
    sign_machine_description,
    sign_point,
)
from protocol.vocabulary import (
    Bookmark,
    ChangeKind,
    ChangeSetEnd,
    Compression,
    Consistency,
    Extent,
    PointId,
    extent_table,
)
from storage.backends.local_directory import LocalDirectoryStore
from storage.backends.object_store import ObjectStore
from storage.disk_archive import DiskArchive, create_vault_object
from storage.keys import serialise_recovery_key
from storage.object_names import SegmentName
from storage.vault_records import VaultRecords
from tests.storage import segment_writer
from tests.storage.segment_writer import DISK, MACHINE, VAULT, SegmentWriter, append, append_closing, new_vault

POINT_INTERVAL_NS = 60 * 10**9
FIRST_INSTANT_NS = 1_763_600_000 * 10**9
MACHINE_NAME = "web-1"
DISK_NAME = "data"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MadePoint:
    point: PointId
    instant_ns: int
    image: bytes
    segment: SegmentName


def write(offset_bytes: int, data: bytes) -> tuple[Extent, bytes]:
    return Extent(offset_bytes=offset_bytes, length_bytes=len(data)), data


def erase(offset_bytes: int, length_bytes: int, kind: ChangeKind = ChangeKind.ZEROES) -> tuple[Extent, bytes]:
    return Extent(offset_bytes=offset_bytes, length_bytes=length_bytes, kind=kind), b""


Change = tuple[Extent, bytes]


class MadeVault:
    """One disk's history in a store; every change set becomes a segment of its own."""

    def __init__(
        self, store: ObjectStore, directory: Path, *, disk_size_bytes: int = segment_writer.DISK_SIZE_BYTES
    ) -> None:
        self.store = store
        self.directory = directory
        self.archive = DiskArchive(store, vault=VAULT, authority=new_vault().description.authority)
        self.records = VaultRecords(store, vault=VAULT, authority=new_vault().description.authority)
        self.image = bytearray(disk_size_bytes)
        self.writer = SegmentWriter(self._grant(epoch=1, parent_epoch=0))
        self.points: list[MadePoint] = []

    @property
    def url(self) -> str:
        return f"file://{self.directory / 'store'}"

    @property
    def key_path(self) -> Path:
        return self.directory / "recovery-1.key"

    def segment_path(self, name: SegmentName) -> Path:
        return self.directory / "store" / str(name)

    async def change(self, *changes: Change, point: bool = False, publish: bool = True) -> MadePoint | None:
        """One change set of one frame in one segment; with `point` it is bookmarked, and its record published."""
        changes = tuple(sorted(changes, key=lambda change: change[0].offset_bytes))
        end = ChangeSetEnd(consistency=Consistency.CRASH)
        number = len(self.points)
        instant_ns = FIRST_INSTANT_NS + number * POINT_INTERVAL_NS
        identifier = PointId(hashlib.blake2b(b"%d" % number, digest_size=16).hexdigest())
        if point:
            end = dataclasses.replace(end, bookmark=Bookmark(point=identifier, instant_ns=instant_ns))
        for extent, data in changes:
            new = data if extent.kind is ChangeKind.DATA else bytes(extent.length_bytes)
            self.image[extent.offset_bytes : extent.end_bytes] = new
        name, sequence = await self._append(changes, end)
        if not point:
            return None
        made = MadePoint(point=identifier, instant_ns=instant_ns, image=bytes(self.image), segment=name)
        self.points.append(made)
        if publish:
            await self.publish_point(made, sequence)
        return made

    async def next_epoch(self, *, disk_size_bytes: int | None = None) -> None:
        """Closes the epoch; the disk may have another size from then on."""
        if disk_size_bytes is not None:
            self.image = bytearray(bytes(self.image[:disk_size_bytes]).ljust(disk_size_bytes, b"\0"))
        epoch = self.writer.grant.epoch
        grant = self._grant(epoch=epoch + 1, parent_epoch=epoch)
        end = self.writer.closing(grant)
        await append_closing(self.archive, end)
        self.writer = SegmentWriter(grant, previous_trailer_hash=end.trailer_hash)

    async def describe_machine(self) -> None:
        description = MachineDescription(
            vault=VAULT,
            machine=MACHINE,
            version=1,
            name=MACHINE_NAME,
            disks=(DiskDescription(disk=DISK, name=DISK_NAME, size_bytes=len(self.image), sector_bytes=512),),
        )
        await self.records.put_machine_description(
            sign_machine_description(description, new_vault().authority.private_key)
        )

    async def _append(self, changes: Sequence[Change], end: ChangeSetEnd) -> tuple[SegmentName, int]:
        sequence = self.writer.sequence
        sealer = self.writer.sealer(data_key=hashlib.sha256(b"%d %d" % (self.writer.grant.epoch, sequence)).digest())
        payload = b"".join(data for _, data in changes)
        frame = sealer.seal(
            sequence=sequence,
            frame_number=0,
            nonce_number=0,
            extents=extent_table([extent for extent, _ in changes]),
            raw_bytes=len(payload),
            payload=payload,
            compression=Compression.NONE,
            level=1,
            end=end,
        )
        self.writer.sequence += 1
        segment = self.writer.finish(sealer, [frame])
        await append(self.archive, segment)
        return segment.end.name, sequence

    async def publish_point(self, made: MadePoint, sequence: int) -> None:
        record = PointRecord(
            vault=VAULT,
            point=made.point,
            instant_ns=made.instant_ns,
            consistency=Consistency.CRASH,
            members=(PointMember(machine=MACHINE, disk=DISK, epoch=self.writer.grant.epoch, sequence=sequence),),
        )
        await self.records.put_point(sign_point(record, new_vault().authority.private_key))

    def _grant(self, *, epoch: int, parent_epoch: int) -> segment_writer.Grant:
        grant = segment_writer.make_grant(epoch=epoch, parent_epoch=parent_epoch)
        return dataclasses.replace(grant, disk_size_bytes=len(self.image))


async def make_vault(directory: Path, *, disk_size_bytes: int = 4 * 2**20, passphrase: str | None = None) -> MadeVault:
    """An empty vault with its first recovery key in a file."""
    store = LocalDirectoryStore(directory / "store", create=True)
    await create_vault_object(store, VAULT, new_vault().vault_json)
    made = MadeVault(store, directory, disk_size_bytes=disk_size_bytes)
    made.key_path.write_bytes(serialise_recovery_key(new_vault().recovery_keys[0], passphrase=passphrase))
    return made


def noise(seed: int, length_bytes: int) -> bytes:
    """Not compressible, always the same."""
    return hashlib.shake_128(b"noise %d" % seed).digest(length_bytes)


async def make_filled_vault(directory: Path) -> MadeVault:
    """Three points over a disk of 4 MiB; the third stands in a second epoch."""
    made = await make_vault(directory)
    await made.change(write(0, noise(1, 2**19)), write(2**20, noise(2, 2**19)))
    await made.change(write(2**21, b"compressible " * 8192), erase(2**20, 4096), point=True)
    await made.change(write(4096, noise(3, 8192)), write(100_000, noise(4, 777)))
    await made.change(erase(2**21, 65536, ChangeKind.DISCARDED), write(3 * 2**20 + 512, noise(5, 512)), point=True)
    await made.next_epoch()
    await made.change(write(0, noise(6, 4096)), point=True)
    await made.describe_machine()
    return made
