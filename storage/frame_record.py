"""One frame as the cache and a segment both hold it: head, extent table, sealed bytes (SEGMENT_FORMAT.md, "Frame
record").

A record describes itself: its length, its disk, epoch and sequence, what key and nonce sealed it, digests of all its
bytes. So segments can be rebuilt from records alone, without any data key. It is not bound to the object that it lies
in. The digests tell damage; who wrote a record is proved by a segment's trailer only, and what it says by the seal.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy
from blake3 import blake3
from typing_extensions import Buffer

from protocol.errors import InvalidValue
from protocol.vocabulary import (
    CHANGE_SET_FRAMES_MAX,
    EPOCH_MAX,
    EXTENT_DTYPE,
    FRAME_EXTENTS_MAX,
    FRAME_RAW_BYTES_MAX,
    SEQUENCE_MAX,
    Bookmark,
    ChangeSetEnd,
    Compression,
    Consistency,
    DiskId,
    ExtentTable,
    MachineId,
    PointId,
    VaultId,
    check_extent_table,
    check_identifier,
    check_range,
)

FRAME_RECORD_VERSION: Final = 1
"""1: the first version."""

FRAME_MAGIC: Final = b"FPFR"
TAG_BYTES: Final = 16
"""The GCM tag, the last bytes of what is sealed."""
DIGEST_BYTES: Final = 32
HEAD_DIGEST_BYTES: Final = 16
SEALED_BYTES_MAX: Final = FRAME_RAW_BYTES_MAX + TAG_BYTES
KEY_NUMBER_MAX: Final = 15
NONCE_NUMBER_MAX: Final = 2**32 - 1
NONCE_BYTES: Final = 12

HEAD_DTYPE: Final = numpy.dtype(
    [
        ("magic", "S4"),
        ("version", "<u2"),
        ("flags", "u1"),
        ("compression", "u1"),
        ("consistency", "u1"),
        ("reserved", "u1", (3,)),
        ("epoch", "<u4"),
        ("sequence", "<u8"),
        ("frame_number", "<u4"),
        ("extent_count", "<u4"),
        ("raw_bytes", "<u4"),
        ("sealed_bytes", "<u4"),
        ("disk", "V16"),
        ("cursor_bytes", "<u8"),
        ("point", "V16"),
        ("instant_ns", "<u8"),
        ("key_number", "<u4"),
        ("nonce_number", "<u4"),
        ("sealed_digest", "V32"),
        ("head_digest", "V16"),
    ]
)
"""A record's head. An index is an array of these."""

_HEAD: Final = struct.Struct("<4sHBBB3sIQIIII16sQ16sQII32s16s")
HEAD_BYTES: Final = _HEAD.size
_BOUND_BYTES: Final = 88
"""What stands before key_number: the part of the head that the seal binds. A fold may renumber keys."""
_DIGESTED_BYTES: Final = HEAD_BYTES - HEAD_DIGEST_BYTES

RECORD_BYTES_MAX: Final = HEAD_BYTES + FRAME_EXTENTS_MAX * EXTENT_DTYPE.itemsize + SEALED_BYTES_MAX

FLAG_LAST: Final = 1
FLAG_CURSOR: Final = 2
FLAG_BOOKMARK: Final = 4

CONSISTENCIES: Final = tuple(Consistency)
"""The number of a consistency is its place here: the order of the vocabulary."""

_SEAL_DOMAIN: Final = b"farpoint frame 1\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameHead:
    """What a record says of itself. end is there in the last frame of its change set only."""

    disk: DiskId
    epoch: int
    sequence: int
    frame_number: int
    extent_count: int
    raw_bytes: int
    sealed_bytes: int
    """Ciphertext and tag."""
    compression: Compression
    end: ChangeSetEnd | None
    key_number: int
    """Which of its object's wrapped data keys."""
    nonce_number: int
    """The nonce as a number, counted from zero per data key."""
    sealed_digest: bytes
    """blake3 of ciphertext and tag: damage is found without a key."""

    def __post_init__(self) -> None:
        check_identifier(self.disk, "disk")
        check_range(self.epoch, "epoch", low=1, high=EPOCH_MAX)
        check_range(self.sequence, "sequence", low=1, high=SEQUENCE_MAX)
        check_range(self.frame_number, "frame_number", low=0, high=CHANGE_SET_FRAMES_MAX - 1)
        check_range(self.extent_count, "extent_count", low=0, high=FRAME_EXTENTS_MAX)
        check_range(self.raw_bytes, "raw_bytes", low=0, high=FRAME_RAW_BYTES_MAX)
        check_range(self.sealed_bytes, "sealed_bytes", low=TAG_BYTES, high=SEALED_BYTES_MAX)
        check_range(self.key_number, "key_number", low=0, high=KEY_NUMBER_MAX)
        check_range(self.nonce_number, "nonce_number", low=0, high=NONCE_NUMBER_MAX)
        check_range(len(self.sealed_digest), "sealed_digest length", low=DIGEST_BYTES, high=DIGEST_BYTES)
        if self.compression is Compression.NONE:
            whole = self.raw_bytes + TAG_BYTES
            check_range(self.sealed_bytes, "sealed_bytes", low=whole, high=whole)
        elif not self.raw_bytes:
            raise InvalidValue(what="compression", value=self.compression.name, rule="is NONE where there is no data")

    @property
    def is_last(self) -> bool:
        return self.end is not None

    @property
    def table_bytes(self) -> int:
        return self.extent_count * EXTENT_DTYPE.itemsize

    @property
    def record_bytes(self) -> int:
        """The whole record: head, extent table, sealed bytes."""
        return HEAD_BYTES + self.table_bytes + self.sealed_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrameEntry:
    """A frame without its sealed bytes: what the index keeps. `head_bytes` is the head as it is stored."""

    head: FrameHead
    extents: ExtentTable
    head_bytes: bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrameRecord:
    """A record that was found whole: every digest agreed. `sealed` is a view of what was parsed."""

    entry: FrameEntry
    sealed: memoryview


def encode_head(head: FrameHead, table: Buffer) -> bytes:
    """The HEAD_BYTES bytes that stand before the extent table `table` and the sealed bytes. Deterministic."""
    end = head.end
    bookmark = end.bookmark if end else None
    cursor_bytes = end.copy_in_cursor_bytes if end else None
    flags = FLAG_LAST if end else 0
    flags |= FLAG_CURSOR if cursor_bytes is not None else 0
    flags |= FLAG_BOOKMARK if bookmark else 0
    digested = _HEAD.pack(
        FRAME_MAGIC,
        FRAME_RECORD_VERSION,
        flags,
        head.compression,
        CONSISTENCIES.index(end.consistency) if end else 0,
        bytes(3),
        head.epoch,
        head.sequence,
        head.frame_number,
        head.extent_count,
        head.raw_bytes,
        head.sealed_bytes,
        bytes.fromhex(head.disk),
        cursor_bytes or 0,
        bytes.fromhex(bookmark.point) if bookmark else bytes(16),
        bookmark.instant_ns if bookmark else 0,
        head.key_number,
        head.nonce_number,
        head.sealed_digest,
        bytes(HEAD_DIGEST_BYTES),
    )[:_DIGESTED_BYTES]
    return digested + _head_digest(digested, table)


def parse_head(data: Buffer) -> FrameHead:
    """A head from exactly HEAD_BYTES bytes; its digest is not checked here, since that needs the extent table.

    Raises InvalidValue.
    """
    view = memoryview(data).cast("B")
    check_range(len(view), "head length", low=HEAD_BYTES, high=HEAD_BYTES)
    fields = _HEAD.unpack(view)
    magic, version, flags, compression, consistency, reserved = fields[:6]
    if magic != FRAME_MAGIC or version != FRAME_RECORD_VERSION:
        raise InvalidValue(what="frame record", value=(magic, version), rule="must start with its magic and version")
    if flags & ~(FLAG_LAST | FLAG_CURSOR | FLAG_BOOKMARK) or any(reserved) or compression > max(Compression):
        raise InvalidValue(what="frame flags", value=(flags, compression), rule="must be known, reserved bytes zero")
    epoch, sequence, frame_number, extent_count, raw_bytes, sealed_bytes, disk = fields[6:13]
    cursor_bytes, point, instant_ns, key_number, nonce_number, sealed_digest = fields[13:19]
    return FrameHead(
        disk=DiskId(disk.hex()),
        epoch=epoch,
        sequence=sequence,
        frame_number=frame_number,
        extent_count=extent_count,
        raw_bytes=raw_bytes,
        sealed_bytes=sealed_bytes,
        compression=Compression(compression),
        end=_parse_end(flags, consistency, cursor_bytes, point, instant_ns),
        key_number=key_number,
        nonce_number=nonce_number,
        sealed_digest=sealed_digest,
    )


def parse_frame_record(data: Buffer) -> FrameRecord:
    """The record at the start of `data`, which may go on behind it: `entry.head.record_bytes` says where it ends.

    Needs no key. Raises InvalidValue if the record is torn, cut, altered, or not one: nothing of it may be used then.
    """
    view = memoryview(data).cast("B")
    check_range(len(view), "bytes left", low=HEAD_BYTES, high=2**63)
    head_bytes = bytes(view[:HEAD_BYTES])
    head = parse_head(head_bytes)
    check_range(head.record_bytes, "record length", low=HEAD_BYTES, high=len(view))
    table_end = HEAD_BYTES + head.table_bytes
    table = view[HEAD_BYTES:table_end]
    check_head_digest(head_bytes, table)
    extents = numpy.frombuffer(bytes(table), dtype=EXTENT_DTYPE)
    check_extent_table(extents, raw_bytes=head.raw_bytes)
    sealed = view[table_end : head.record_bytes]
    if blake3(sealed).digest() != head.sealed_digest:
        raise InvalidValue(what="sealed bytes", value="…", rule="must have the digest that the head states")
    return FrameRecord(entry=FrameEntry(head=head, extents=extents, head_bytes=head_bytes), sealed=sealed)


def check_head_digest(head_bytes: bytes, table: Buffer) -> None:
    """Raises InvalidValue unless the stored head's digest is that of head and extent table."""
    if _head_digest(head_bytes[:_DIGESTED_BYTES], table) != head_bytes[_DIGESTED_BYTES:]:
        raise InvalidValue(what="frame head", value="…", rule="must have the digest that it states")


def associated_data(head_bytes: bytes, table: Buffer, *, vault: VaultId, machine: MachineId) -> bytes:
    """What the seal binds beside the payload: vault, machine, the head up to key_number, the extent table's digest."""
    return b"".join(
        (
            _SEAL_DOMAIN,
            bytes.fromhex(vault),
            bytes.fromhex(machine),
            head_bytes[:_BOUND_BYTES],
            blake3(table).digest(),
        )
    )


def nonce(nonce_number: int) -> bytes:
    """The nonce of a number: 12 bytes, big-endian."""
    return nonce_number.to_bytes(NONCE_BYTES, "big")


def _head_digest(digested: bytes, table: Buffer) -> bytes:
    return blake3(digested).update(table).digest(HEAD_DIGEST_BYTES)


def _parse_end(flags: int, consistency: int, cursor_bytes: int, point: bytes, instant_ns: int) -> ChangeSetEnd | None:
    has_cursor, has_bookmark = bool(flags & FLAG_CURSOR), bool(flags & FLAG_BOOKMARK)
    is_canonical = (has_cursor or not cursor_bytes) and (has_bookmark or not (any(point) or instant_ns))
    if consistency >= len(CONSISTENCIES) or not is_canonical:
        raise InvalidValue(what="change set end", value=consistency, rule="must be known, absent fields zero")
    if not flags & FLAG_LAST:
        if consistency or has_cursor or has_bookmark:
            raise InvalidValue(what="change set end", value=flags, rule="is stated in the last frame only")
        return None
    return ChangeSetEnd(
        consistency=CONSISTENCIES[consistency],
        copy_in_cursor_bytes=cursor_bytes if has_cursor else None,
        bookmark=Bookmark(point=PointId(point.hex()), instant_ns=instant_ns) if has_bookmark else None,
    )
