"""A process server reduced to what it writes: the sealed segments of a disk, epoch after epoch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from protocol.signed_records import Grant, sign_grant
from protocol.vocabulary import (
    Bookmark,
    ChangeKind,
    ChangeSetEnd,
    Compression,
    Consistency,
    DiskId,
    Extent,
    MachineId,
    PointId,
    ProcessServerId,
    VaultId,
    extent_table,
)
from storage.disk_archive import DiskArchive
from storage.keys import NewVault, create_vault, unwrap_vault_key
from storage.sealing import FrameCompressor, SealedFrame, SegmentSealer
from storage.segment import NO_TRAILER_HASH, SegmentEnd, SegmentHeader, closing_segment, finish_segment

VAULT = VaultId("a1" * 16)
MACHINE = MachineId("b2" * 16)
DISK = DiskId("c3" * 16)
OTHER_DISK = DiskId("d4" * 16)
PROCESS_SERVER = ProcessServerId("e5" * 16)
DISK_SIZE_BYTES = 64 * 2**20
SETTLED = ChangeSetEnd(consistency=Consistency.CRASH)
UNSETTLED = ChangeSetEnd(consistency=Consistency.UNSETTLED)


@functools.cache
def new_vault() -> NewVault:
    return create_vault(vault=VAULT, created_ns=1_700_000_000_000_000_000, recovery_labels=("first", "second"))


@functools.cache
def vault_private_key() -> X25519PrivateKey:
    vault = new_vault()
    return unwrap_vault_key(vault.description, vault.recovery_keys[0], url="memory://test")


def authority() -> Ed25519PrivateKey:
    return new_vault().authority.private_key


def signing_key(number: int) -> Ed25519PrivateKey:
    """The process server's key for an epoch: always the same."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"process server %d" % number).digest())


def make_grant(*, epoch: int = 1, parent_epoch: int = 0, disk: DiskId = DISK) -> Grant:
    return Grant(
        vault=VAULT,
        machine=MACHINE,
        disk=disk,
        epoch=epoch,
        parent_epoch=parent_epoch,
        process_server=PROCESS_SERVER,
        process_server_key=signing_key(epoch).public_key().public_bytes_raw(),
        issued_ns=7,
        disk_size_bytes=DISK_SIZE_BYTES,
        sector_bytes=512,
    )


def bookmarked(number: int) -> ChangeSetEnd:
    return ChangeSetEnd(
        consistency=Consistency.CRASH, bookmark=Bookmark(point=PointId(f"{number:032x}"), instant_ns=number)
    )


def contents(sequence: int, length_bytes: int = 4096) -> bytes:
    """What change set `sequence` writes: not compressible, always the same."""
    return hashlib.shake_128(b"change set %d" % sequence).digest(length_bytes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WrittenSegment:
    """Everything of a segment before it is stored."""

    end: SegmentEnd
    header: SegmentHeader
    frames: tuple[SealedFrame, ...]

    @property
    def parts(self) -> tuple[bytes, ...]:
        return (self.end.header, *(bytes(frame.record) for frame in self.frames), self.end.end)

    @property
    def data(self) -> bytes:
        return b"".join(self.parts)


class SegmentWriter:
    """Writes the segments of one epoch, each continuing the one before."""

    def __init__(self, grant: Grant, *, previous_trailer_hash: bytes = NO_TRAILER_HASH) -> None:
        self.grant = grant
        self.signed_grant = sign_grant(grant, authority())
        self.key = signing_key(grant.epoch)
        self.ordinal = 1
        self.sequence = 1
        self.previous_trailer_hash = previous_trailer_hash

    def segment(self, ends: Sequence[ChangeSetEnd] = (SETTLED,), *, length_bytes: int = 4096) -> WrittenSegment:
        """One change set of two frames per end: data, then zeroes and a discard."""
        sealer = self.sealer(data_key=hashlib.sha256(b"data key %d" % self.ordinal).digest())
        frames: list[SealedFrame] = []
        for end in ends:
            data = extent_table([Extent(offset_bytes=4096 * self.sequence, length_bytes=length_bytes)])
            rest = extent_table(
                [
                    Extent(offset_bytes=2**20, length_bytes=512, kind=ChangeKind.ZEROES),
                    Extent(offset_bytes=2**20 + 512, length_bytes=512, kind=ChangeKind.DISCARDED),
                ]
            )
            for frame_number, (table, payload) in enumerate(
                [(data, contents(self.sequence, length_bytes)), (rest, b"")]
            ):
                frames.append(
                    sealer.seal(
                        sequence=self.sequence,
                        frame_number=frame_number,
                        nonce_number=len(frames),
                        extents=table,
                        raw_bytes=len(payload),
                        payload=payload,
                        compression=Compression.NONE,
                        end=end if frame_number == 1 else None,
                    )
                )
            self.sequence += 1
        return self.finish(sealer, frames)

    def sealer(self, *, data_key: bytes) -> SegmentSealer:
        return SegmentSealer(
            grant=self.grant,
            signed_grant=self.signed_grant,
            ordinal=self.ordinal,
            first_sequence=self.sequence,
            data_key=data_key,
            vault_public_key=new_vault().description.vault_public_key,
            compressor=FrameCompressor(),
        )

    def finish(self, sealer: SegmentSealer, frames: Sequence[SealedFrame]) -> WrittenSegment:
        header = SegmentHeader(opening=sealer.opening, previous_trailer_hash=self.previous_trailer_hash)
        end = finish_segment(header, [frame.entry for frame in frames], self.key)
        self.ordinal += 1
        self.previous_trailer_hash = end.trailer_hash
        return WrittenSegment(end=end, header=header, frames=tuple(frames))

    def closing(self, successor: Grant) -> SegmentEnd:
        """The closing segment that the successor would write now."""
        return closing_segment(
            grant=successor,
            signed_grant=sign_grant(successor, authority()),
            ordinal=self.ordinal,
            last_sequence=self.sequence - 1,
            previous_trailer_hash=self.previous_trailer_hash,
            signing_key=signing_key(successor.epoch),
        )


async def append(archive: DiskArchive, segment: WrittenSegment) -> None:
    await archive.append_segment(segment.end.name, segment.parts, segment.end.trailer_hash)


async def append_closing(archive: DiskArchive, end: SegmentEnd) -> None:
    await archive.append_segment(end.name, (end.header, end.end), end.trailer_hash)
