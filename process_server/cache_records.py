"""What the payloads of the cache's own records say: positions of disks, ends of segments, ends of files.

Strict msgpack, decoded into values. Invariant: what does not decode is damage of a named file, never a guess.
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass
from typing import Any, Final, cast

import msgpack  # type: ignore[import-untyped]
import numpy
from typing_extensions import Buffer

from process_server.cache_log import LocatedRecord, file_name
from process_server.errors import CacheDamaged
from protocol.errors import InvalidValue
from protocol.vocabulary import Consistency, DiskId, PointId, check_identifier, check_range
from storage.frame_record import HEAD_BYTES, HEAD_DTYPE

_U32: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPoint:
    """A bookmark in this disk's history that the configuration server has not yet acknowledged as committed."""

    point: PointId
    instant_ns: int
    epoch: int
    sequence: int
    consistency: Consistency


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskCheckpoint:
    """Where a disk's history stands after its newest closed segment, or at the start of its epoch (sequence 0).

    ordinal: of the newest closed segment, one less than the epoch's first at its start. trailer_hash: of that segment,
    or what the epoch's first segment names as its predecessor. committed_ordinal: of the newest segment known to be
    readable in the store; at the start of an epoch the same as ordinal. cursor: the newest copy-in cursor, None if none
    was stated. must_be_left: the cache of this epoch was lost, and uploads of what it held may still arrive: only its
    closing segment ends it. is_forked: the store was found to hold other segments of this epoch than this cache; what
    the agent knows of its contents is of no use.
    """

    disk: DiskId
    epoch: int
    parent_epoch: int
    parent_sequence: int
    ordinal: int
    committed_ordinal: int
    sequence: int
    trailer_hash: bytes
    copy_in_cursor_bytes: int | None
    unreported_points: tuple[CachedPoint, ...] = ()
    must_be_left: bool = False
    is_forked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedSegmentRecord:
    """What is settled about a closed segment: which of its frames belong to it, and the bytes that surround them."""

    frames: int
    first_sequence: int
    last_sequence: int
    copy_in_cursor_bytes: int | None
    trailer_hash: bytes
    points: tuple[CachedPoint, ...]
    object_bytes: int
    header: bytes
    end: bytes

    def frame_digests(self) -> bytes:
        """What the rows of its frames carry, in the order of its index, one behind the other."""
        heads = numpy.frombuffer(self.end, dtype=HEAD_DTYPE, count=self.frames)
        return heads["head_digest"].tobytes()

    def without_bytes(self) -> ClosedSegmentRecord:
        """The same without header and end, which stay in the cache until the upload."""
        return dataclasses.replace(self, header=b"", end=b"")


def encode_file_ends(file_ends: dict[int, int]) -> bytes:
    """The payload of a CHECKPOINT record."""
    return cast(bytes, msgpack.packb(sorted(file_ends.items())))


def decode_file_ends(data: Buffer, name: str) -> dict[int, int]:
    """Raises CacheDamaged."""
    try:
        return {
            check_range(number, "file number", low=0, high=2**63 - 1): check_range(
                end_bytes, "file end", low=0, high=2**63 - 1
            )
            for number, end_bytes in _unpack(data, name)
        }
    except (TypeError, ValueError, InvalidValue) as error:
        raise CacheDamaged(name=name, reason=f"a checkpoint is malformed: {error}") from error


def encode_checkpoint(checkpoint: DiskCheckpoint) -> bytes:
    """The payload of a POSITION record; its row carries disk, epoch and ordinal."""
    return cast(
        bytes,
        msgpack.packb(
            [
                checkpoint.parent_epoch,
                checkpoint.parent_sequence,
                checkpoint.committed_ordinal,
                checkpoint.sequence,
                checkpoint.trailer_hash,
                checkpoint.copy_in_cursor_bytes,
                [_point_fields(point) for point in checkpoint.unreported_points],
                checkpoint.must_be_left,
                checkpoint.is_forked,
            ]
        ),
    )


def decode_checkpoint(record: LocatedRecord, data: Buffer) -> DiskCheckpoint:
    """Raises CacheDamaged."""
    name = file_name(record.location.file_number)
    fields = _unpack(data, name)
    try:
        parent_epoch, parent_sequence, committed_ordinal, sequence, trailer_hash, cursor, points, *flags = fields
        must_be_left, is_forked = flags
        return DiskCheckpoint(
            disk=record.disk,
            epoch=record.epoch,
            parent_epoch=parent_epoch,
            parent_sequence=parent_sequence,
            ordinal=record.ordinal,
            committed_ordinal=check_range(committed_ordinal, "committed_ordinal", low=0, high=record.ordinal),
            sequence=sequence,
            trailer_hash=trailer_hash,
            copy_in_cursor_bytes=cursor,
            unreported_points=tuple(_point(point) for point in points),
            must_be_left=bool(must_be_left),
            is_forked=bool(is_forked),
        )
    except (TypeError, ValueError, InvalidValue) as error:
        raise CacheDamaged(name=name, reason=f"a position record is malformed: {error}") from error


def encode_closed(closed: ClosedSegmentRecord) -> bytes:
    """The payload of a SEGMENT_CLOSED record: u32 length of the facts | facts | header | index and trailer."""
    facts = [
        closed.frames,
        closed.first_sequence,
        closed.last_sequence,
        closed.copy_in_cursor_bytes,
        closed.trailer_hash,
        [_point_fields(point) for point in closed.points],
        closed.object_bytes,
        len(closed.header),
    ]
    packed = cast(bytes, msgpack.packb(facts))
    return b"".join((_U32.pack(len(packed)), packed, closed.header, closed.end))


def decode_closed(data: Buffer, name: str) -> ClosedSegmentRecord:
    """name: of the log file, for the error. Raises CacheDamaged."""
    view = memoryview(data).cast("B")
    try:
        facts_end = _U32.size + _U32.unpack_from(view)[0]
        frames, first_sequence, last_sequence, cursor, trailer_hash, points, object_bytes, header_bytes = _unpack(
            view[_U32.size : facts_end], name
        )
        return ClosedSegmentRecord(
            frames=check_range(frames, "frames", low=1, high=(len(view) - facts_end - header_bytes) // HEAD_BYTES),
            first_sequence=first_sequence,
            last_sequence=last_sequence,
            copy_in_cursor_bytes=cursor,
            trailer_hash=trailer_hash,
            points=tuple(_point(point) for point in points),
            object_bytes=object_bytes,
            header=bytes(view[facts_end : facts_end + header_bytes]),
            end=bytes(view[facts_end + header_bytes :]),
        )
    except (TypeError, ValueError, InvalidValue, struct.error) as error:
        raise CacheDamaged(name=name, reason=f"a segment's end is malformed: {error}") from error


def _point_fields(point: CachedPoint) -> list[object]:
    return [point.point, point.instant_ns, point.epoch, point.sequence, point.consistency.value]


def _point(fields: list[Any]) -> CachedPoint:
    point, instant_ns, epoch, sequence, consistency = fields
    return CachedPoint(
        point=PointId(check_identifier(point, "point")),
        instant_ns=instant_ns,
        epoch=epoch,
        sequence=sequence,
        consistency=Consistency(consistency),
    )


def _unpack(data: Buffer, name: str) -> list[Any]:
    try:
        fields = msgpack.unpackb(data, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise CacheDamaged(name=name, reason=f"not msgpack: {error}") from error
    if not isinstance(fields, list):
        raise CacheDamaged(name=name, reason="not a msgpack array")
    return fields
