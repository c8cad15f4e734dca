"""The cache's log files on a durable directory: blocking calls that belong in an executor, one writer at a time.

Invariants: bytes are written once, behind what was synchronized, and never again but for `make_durable`, which writes
what it read; a file in which a write or a synchronize failed gets no further byte; what `append` returned survives
power loss; what `read` returns has the digest that was written.
"""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from process_server.cache_log import (
    BLOCK_BYTES,
    CacheRecord,
    LocatedRecord,
    Location,
    RecordKind,
    batch_bytes,
    file_name,
    padded,
    payload_digest,
    read_batch_header,
    read_rows,
    write_batch,
)
from process_server.errors import CacheDamaged
from protocol.errors import InvalidValue
from runtime.directory import DurableDirectory, DurableFile
from storage.frame_record import HEAD_BYTES, HEAD_DIGEST_BYTES, parse_frame_record

STAGING_BYTES: Final = 4 * 2**20
READ_GAP_BYTES_MAX: Final = 64 * 1024
"""Payloads no farther apart than this are read by one call."""
READ_BYTES_MAX: Final = 8 * 2**20
"""One call reads no more, unless a single payload is longer."""


READ_BUFFER_BYTES: Final = READ_BYTES_MAX + 2 * BLOCK_BYTES
"""What one read needs, alignment included."""
READ_BUFFERS_KEPT: Final = 4
READ_BUFFER_LENGTH_MIN: Final = 256 * 1024
"""For less a buffer of its own is cheaper than it is worth."""


class ReadBuffers:
    """Large buffers for reading, used again and again: touching fresh memory costs more than reading into it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[memoryview] = []

    def take(self, length_bytes: int) -> memoryview:
        """At least so long, page-aligned."""
        if not READ_BUFFER_LENGTH_MIN <= length_bytes <= READ_BUFFER_BYTES:
            return memoryview(mmap.mmap(-1, max(length_bytes, BLOCK_BYTES)))
        with self._lock:
            return self._free.pop() if self._free else memoryview(mmap.mmap(-1, READ_BUFFER_BYTES))

    def give_back(self, buffers: Sequence[memoryview]) -> None:
        """Nobody reads or writes them, or anything made of them, any more."""
        with self._lock:
            room = READ_BUFFERS_KEPT - len(self._free)
            self._free += [buffer for buffer in buffers if len(buffer) == READ_BUFFER_BYTES][: max(0, room)]


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPayloads:
    """Payloads as read, each verified, and the buffers that they lie in."""

    payloads: list[memoryview]
    buffers: list[memoryview]


def frame_digest(record: memoryview) -> bytes:
    """A frame record's own head digest, which covers all of it: the row repeats it instead of hashing again."""
    return bytes(record[HEAD_BYTES - HEAD_DIGEST_BYTES : HEAD_BYTES])


def check_payload(kind: RecordKind, location: Location, payload: memoryview) -> None:
    """Raises CacheDamaged unless the payload is the one that was written."""
    name = file_name(location.file_number)
    if kind is not RecordKind.FRAME:
        if payload_digest(payload) != location.digest:
            raise CacheDamaged(name=name, reason=f"{kind.name} at {location.offset_bytes} has another digest")
        return
    if frame_digest(payload) != location.digest:
        raise CacheDamaged(name=name, reason=f"another frame lies at {location.offset_bytes}")
    try:
        length = parse_frame_record(payload).entry.head.record_bytes
    except InvalidValue as error:
        raise CacheDamaged(name=name, reason=f"frame at {location.offset_bytes}: {error}") from error
    if length != location.length_bytes:
        raise CacheDamaged(name=name, reason=f"frame at {location.offset_bytes} has another length")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScannedFile:
    """What a file holds: its records up to the first batch that does not check out, and where that is."""

    file_number: int
    size_bytes: int
    end_bytes: int
    records: list[LocatedRecord]


class CacheFiles:
    """The directory of log files. `append` and `begin` are called by one writer; `read` and `scan` from any thread."""

    def __init__(self, directory: DurableDirectory) -> None:
        self._directory = directory
        self._active: DurableFile | None = None
        self._active_number = -1
        self._batch_number = 0
        self._end_bytes = 0
        self.buffers = ReadBuffers()
        self._staging = mmap.mmap(-1, STAGING_BYTES)

    def begin(self, file_number: int, records: Sequence[CacheRecord], *, preallocate_bytes: int) -> int:
        """Creates the file and writes its first batch; durable on return. Returns where the next batch goes.

        Raises OSError; the file is not active then, and what may be there of it means nothing.
        """
        self.abandon()
        active = self._directory.open(
            file_name(file_number), create=True, preallocate_bytes=preallocate_bytes, direct=True
        )
        self._active, self._active_number, self._batch_number, self._end_bytes = active, file_number, 0, 0
        self.append(records)
        return self._end_bytes

    def append(self, records: Sequence[CacheRecord]) -> list[Location]:
        """Writes one batch and synchronizes it: durable on return. Raises OSError; abandon the file then."""
        assert self._active is not None
        length = batch_bytes(records)
        staging = self._staging if length <= STAGING_BYTES else mmap.mmap(-1, length)
        with memoryview(staging) as whole, whole[:length] as buffer:
            locations = write_batch(
                buffer,
                records,
                file_number=self._active_number,
                batch_number=self._batch_number,
                offset_bytes=self._end_bytes,
            )
            self._active.write(self._end_bytes, [buffer])
            self._active.synchronize()
        self._end_bytes += length
        self._batch_number += 1
        return locations

    def abandon(self) -> None:
        """The active file gets no further byte."""
        if self._active is not None:
            active, self._active = self._active, None
            active.close()

    def make_durable(self, file_number: int, *, end_bytes: int) -> None:
        """On return [0, end_bytes), as it reads now, survives power loss, whoever wrote it. Raises OSError.

        A killed process may have left bytes that read well and are on no disk, perhaps behind a synchronize that
        failed; a synchronize now would prove nothing about those. So they are written once more, in place.
        """
        if not end_bytes:
            return
        file = self._directory.open(file_name(file_number), direct=True)
        buffer = memoryview(mmap.mmap(-1, min(end_bytes, STAGING_BYTES)))
        try:
            for first in range(0, end_bytes, STAGING_BYTES):
                part = buffer[: end_bytes - first]
                if file.read_into(first, part) < len(part):
                    raise OSError(errno.EIO, "shorter than it was a moment ago", file_name(file_number))
                file.write(first, [part])
            file.synchronize()
        finally:
            file.close()

    def cut(self, file_number: int, *, end_bytes: int) -> None:
        """Gives back what was preallocated behind `end_bytes`. Raises OSError."""
        file = self._directory.open(file_name(file_number))
        try:
            file.truncate(end_bytes)
            file.synchronize()
        finally:
            file.close()

    def remove(self, file_number: int) -> None:
        """Durable on return. Raises OSError."""
        self._directory.remove(file_name(file_number))

    def read(self, kind: RecordKind, locations: Sequence[Location]) -> CachedPayloads:
        """The payloads, verified. Locations of one file in ascending order are read together.

        Who is done with them may hand the buffers to `buffers.give_back`. Raises OSError, CacheDamaged.
        """
        payloads: list[memoryview] = []
        buffers: list[memoryview] = []
        for run in _runs(locations):
            first = run[0].offset_bytes // BLOCK_BYTES * BLOCK_BYTES
            length = padded(run[-1].offset_bytes + run[-1].length_bytes - first)
            buffer = self.buffers.take(length)
            buffers.append(buffer)
            file = self._directory.open(file_name(run[0].file_number), direct=True)
            try:
                read_bytes = file.read_into(first, buffer[:length])
            finally:
                file.close()
            for location in run:
                start = location.offset_bytes - first
                if start + location.length_bytes > read_bytes:
                    raise CacheDamaged(name=file_name(location.file_number), reason="the file is cut short")
                payload = buffer[start : start + location.length_bytes]
                check_payload(kind, location, payload)
                payloads.append(payload)
        return CachedPayloads(payloads=payloads, buffers=buffers)

    def scan(self, file_number: int, *, end_bytes: int | None, verify_payloads: bool) -> ScannedFile:
        """Reads a file's batches until one does not check out, or to `end_bytes` if that is known.

        verify_payloads: read every payload too and take a batch only if all of it checks out; needed for the file in
        which the power may have failed. Raises OSError, CacheFormatNotSupported.
        """
        file = self._directory.open(file_name(file_number), direct=True)
        try:
            size_bytes = file.size_bytes()
            limit = size_bytes if end_bytes is None else min(end_bytes, size_bytes)
            records: list[LocatedRecord] = []
            place = 0
            batch_number = 0
            while place < limit:
                batch = _scan_batch(file, file_number, batch_number, place, limit, verify_payloads=verify_payloads)
                if batch is None:
                    break
                length, found = batch
                records += found
                place += length
                batch_number += 1
        finally:
            file.close()
        return ScannedFile(file_number=file_number, size_bytes=size_bytes, end_bytes=place, records=records)


def _scan_batch(
    file: DurableFile, file_number: int, batch_number: int, place: int, limit: int, *, verify_payloads: bool
) -> tuple[int, list[LocatedRecord]] | None:
    data = _read_aligned(file, place, BLOCK_BYTES)
    header = read_batch_header(data, file_number=file_number, batch_number=batch_number)
    if header is None or place + header.length_bytes > limit:
        return None
    wanted = header.length_bytes if verify_payloads else padded(header.rows_end_bytes)
    if wanted > BLOCK_BYTES:
        data = _read_aligned(file, place, wanted)
    records = read_rows(header, data, offset_bytes=place)
    if records is None:
        return None
    if verify_payloads:
        for record in records:
            start = record.location.offset_bytes - place
            try:
                check_payload(record.kind, record.location, data[start : start + record.location.length_bytes])
            except CacheDamaged:
                return None
    return header.length_bytes, records


def _read_aligned(file: DurableFile, offset_bytes: int, length_bytes: int) -> memoryview:
    buffer = memoryview(mmap.mmap(-1, length_bytes))
    return buffer[: file.read_into(offset_bytes, buffer)]


def _runs(locations: Sequence[Location]) -> list[list[Location]]:
    """Cuts locations into runs that one read each fetches."""
    runs: list[list[Location]] = []
    for location in locations:
        if runs:
            run = runs[-1]
            end = run[-1].offset_bytes + run[-1].length_bytes
            length = location.offset_bytes + location.length_bytes - run[0].offset_bytes
            is_near = 0 <= location.offset_bytes - end <= READ_GAP_BYTES_MAX
            if run[-1].file_number == location.file_number and is_near and length <= READ_BYTES_MAX:
                run.append(location)
                continue
        runs.append([location])
    return runs
