"""The bytes of the cache's log files, as pure functions: batches of records, each batch written and synchronized as
one.

A file is a run of batches, each padded to 4096 bytes. A batch is: header (64 bytes) | one row per record (56 bytes
each) | the records' payloads, one behind the other | zeroes. All integers are little-endian.

    header  magic "FPCB" · u16 version · u16 zero · u64 file number · u32 batch number · u32 rows
            u64 payload bytes · digest[32]
    row     u8 kind · 3 zero · u32 payload bytes · disk[16] · u32 epoch · 4 zero · u64 ordinal · digest[16]

The header's digest is blake3 over the header before it and the rows; a row's digest is blake3 over its payload, so that
a frame is hashed once when it is written and once when it is read. Invariants: a batch that does not check out is not
there, nor is anything behind it; a file's first batch begins with a CHECKPOINT record and one POSITION record per disk.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy
from blake3 import blake3
from typing_extensions import Buffer

from process_server.errors import CacheFormatNotSupported
from protocol.vocabulary import DiskId, check_range

CACHE_VERSION: Final = 1
"""1: the first version; batches of whole records, payload digests in the rows."""

BLOCK_BYTES: Final = 4096
ROWS_MAX: Final = 16384
PAYLOAD_BYTES_MAX: Final = 2**30
RECORD_DIGEST_BYTES: Final = 16
NO_DISK: Final = DiskId("0" * 32)

_MAGIC: Final = b"FPCB"
_HEADER: Final = struct.Struct("<4sHHQIIQ32s")
_HEADER_PREFIX: Final = struct.Struct("<4sHHQIIQ")
_ROW: Final = struct.Struct("<B3xI16sI4xQ16s")
HEADER_BYTES: Final = _HEADER.size
ROW_BYTES: Final = _ROW.size

_LOCATION: Final = struct.Struct("<QQI16s")
_LOCATION_DTYPE: Final = numpy.dtype([("file_number", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("digest", "V16")])
_FILE_NAME_DIGITS: Final = 16


class RecordKind(enum.IntEnum):
    """What a record says. The numbers are those of the format."""

    CHECKPOINT = 1
    """First of a file. Payload: the valid end of every older file, as a msgpack map of file number → bytes."""
    POSITION = 2
    """Where one disk's history stands: a DiskCheckpoint. Replaces what was known of the disk."""
    SEGMENT_OPENED = 3
    """Payload: storage.segment.encode_opening. Durable no later than the segment's first frame."""
    FRAME = 4
    """Payload: the frame record, byte for byte. Belongs to the newest SEGMENT_OPENED of its disk."""
    SEGMENT_CLOSED = 5
    """Payload: a ClosedSegmentRecord. Durable before the first attempt to upload the segment."""
    SEGMENT_COMMITTED = 6
    """The segment is readable in the store. Durable before any of its files is removed."""


_KINDS: Final = frozenset(RecordKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRecord:
    """One record to be written; its payload in parts, one behind the other."""

    kind: RecordKind
    disk: DiskId
    epoch: int
    ordinal: int
    parts: tuple[Buffer, ...]
    payload_bytes: int
    digest: bytes


def cache_record(kind: RecordKind, disk: DiskId, epoch: int, ordinal: int, payload: Buffer = b"") -> CacheRecord:
    """Makes a record of the cache's own, with the digest of its payload."""
    return CacheRecord(
        kind=kind,
        disk=disk,
        epoch=epoch,
        ordinal=ordinal,
        parts=(payload,),
        payload_bytes=memoryview(payload).nbytes,
        digest=payload_digest(payload),
    )


def payload_digest(payload: Buffer) -> bytes:
    """The digest that a row carries for a payload that carries none itself."""
    return blake3(payload).digest(length=RECORD_DIGEST_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where a payload lies: the bytes [offset_bytes, offset_bytes + length_bytes) of a log file, and their digest."""

    file_number: int
    offset_bytes: int
    length_bytes: int
    digest: bytes


class LocationTable:
    """Many locations in little memory: 36 bytes each. The cache may hold a million small frames."""

    __slots__ = ("_packed",)

    def __init__(self) -> None:
        self._packed = bytearray()

    def append(self, location: Location) -> None:
        self._packed += _LOCATION.pack(
            location.file_number, location.offset_bytes, location.length_bytes, location.digest
        )

    def cut(self, count: int) -> None:
        """Keeps the first `count`."""
        del self._packed[count * _LOCATION.size :]

    def digests(self, count: int) -> bytes:
        """Of the first `count`, one behind the other; of all if there are fewer."""
        rows = numpy.frombuffer(self._packed, dtype=_LOCATION_DTYPE)
        return rows["digest"][:count].tobytes()

    def __len__(self) -> int:
        return len(self._packed) // _LOCATION.size

    def __iter__(self) -> Iterator[Location]:
        for file_number, offset_bytes, length_bytes, digest in _LOCATION.iter_unpack(self._packed):
            yield Location(file_number=file_number, offset_bytes=offset_bytes, length_bytes=length_bytes, digest=digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocatedRecord:
    """A record as found in a file; its payload is still there. batch_number 0 is the file's checkpoint."""

    batch_number: int
    kind: RecordKind
    disk: DiskId
    epoch: int
    ordinal: int
    location: Location


def file_name(file_number: int) -> str:
    return f"{file_number:0{_FILE_NAME_DIGITS}d}.log"


def file_number_of(name: str) -> int | None:
    """The number in a log file's name, None for any other file."""
    stem, _, suffix = name.partition(".")
    if suffix != "log" or len(stem) != _FILE_NAME_DIGITS or not stem.isdecimal():
        return None
    return int(stem)


def padded(length_bytes: int) -> int:
    """Rounded up to whole blocks."""
    return (length_bytes + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES


def batch_bytes(records: Sequence[CacheRecord]) -> int:
    """What these records take in a file as one batch, padding included."""
    return padded(HEADER_BYTES + ROW_BYTES * len(records) + sum(record.payload_bytes for record in records))


def write_batch(
    buffer: memoryview, records: Sequence[CacheRecord], *, file_number: int, batch_number: int, offset_bytes: int
) -> list[Location]:
    """Lays the batch into `buffer`, which is exactly batch_bytes(records) long and goes to `offset_bytes` of the file.

    Returns where each record's payload will lie.
    """
    check_range(len(records), "records of a batch", low=1, high=ROWS_MAX)
    rows_end = HEADER_BYTES + ROW_BYTES * len(records)
    place = rows_end
    locations = []
    for number, record in enumerate(records):
        length = record.payload_bytes
        _ROW.pack_into(
            buffer,
            HEADER_BYTES + ROW_BYTES * number,
            record.kind,
            length,
            bytes.fromhex(record.disk),
            record.epoch,
            record.ordinal,
            record.digest,
        )
        part_place = place
        for part in record.parts:
            part_view = memoryview(part).cast("B")
            buffer[part_place : part_place + len(part_view)] = part_view
            part_place += len(part_view)
        locations.append(
            Location(
                file_number=file_number, offset_bytes=offset_bytes + place, length_bytes=length, digest=record.digest
            )
        )
        place += length
    buffer[place:] = bytes(len(buffer) - place)
    prefix = _HEADER_PREFIX.pack(_MAGIC, CACHE_VERSION, 0, file_number, batch_number, len(records), place - rows_end)
    digest = blake3(prefix).update(buffer[HEADER_BYTES:rows_end]).digest()
    buffer[:HEADER_BYTES] = prefix + digest
    return locations


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchHeader:
    """What the first 64 bytes of a batch say, not yet checked against the rows."""

    file_number: int
    batch_number: int
    rows: int
    payload_bytes: int
    digest: bytes

    @property
    def rows_end_bytes(self) -> int:
        return HEADER_BYTES + ROW_BYTES * self.rows

    @property
    def length_bytes(self) -> int:
        """Padding included."""
        return padded(self.rows_end_bytes + self.payload_bytes)


def read_batch_header(data: memoryview, *, file_number: int, batch_number: int) -> BatchHeader | None:
    """The header of the batch expected here, None if something else (or nothing) is there.

    Raises CacheFormatNotSupported for a batch of another version of this format.
    """
    if len(data) < HEADER_BYTES:
        return None
    magic, version, _zero, found_file, found_batch, rows, payload_bytes, digest = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        return None
    if version != CACHE_VERSION:
        if batch_number:
            return None  # damage: a file is of one version
        raise CacheFormatNotSupported(name=file_name(file_number), version=version, supported=CACHE_VERSION)
    if (found_file, found_batch) != (file_number, batch_number):
        return None
    if not 1 <= rows <= ROWS_MAX or payload_bytes > PAYLOAD_BYTES_MAX:
        return None
    return BatchHeader(
        file_number=file_number, batch_number=batch_number, rows=rows, payload_bytes=payload_bytes, digest=digest
    )


def read_rows(header: BatchHeader, data: memoryview, *, offset_bytes: int) -> list[LocatedRecord] | None:
    """The records of a batch whose header and rows are `data`, None if they do not check out. Payloads are not looked
    at. Raises CacheFormatNotSupported for records that this version does not know.
    """
    if len(data) < header.rows_end_bytes:
        return None
    prefix = data[: _HEADER_PREFIX.size]
    if blake3(prefix).update(data[HEADER_BYTES : header.rows_end_bytes]).digest() != header.digest:
        return None
    place = offset_bytes + header.rows_end_bytes
    records = []
    for number in range(header.rows):
        kind, length, disk, epoch, ordinal, digest = _ROW.unpack_from(data, HEADER_BYTES + ROW_BYTES * number)
        location = Location(file_number=header.file_number, offset_bytes=place, length_bytes=length, digest=digest)
        if kind not in _KINDS:
            version = f"{CACHE_VERSION} with a record of kind {kind}"
            raise CacheFormatNotSupported(name=file_name(header.file_number), version=version, supported=CACHE_VERSION)
        records.append(
            LocatedRecord(
                batch_number=header.batch_number,
                kind=RecordKind(kind),
                disk=DiskId(disk.hex()),
                epoch=epoch,
                ordinal=ordinal,
                location=location,
            )
        )
        place += length
    return records
