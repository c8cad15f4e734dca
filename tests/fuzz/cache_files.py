"""Small files of a process server's cache, as bytes, and what a recovery takes from such bytes as acknowledged."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from typing_extensions import Buffer

from process_server.cache_files import CacheFiles, frame_digest
from process_server.cache_log import (
    NO_DISK,
    CacheRecord,
    RecordKind,
    batch_bytes,
    cache_record,
    file_name,
    write_batch,
)
from process_server.cache_records import (
    CachedPoint,
    ClosedSegmentRecord,
    DiskCheckpoint,
    encode_checkpoint,
    encode_closed,
    encode_file_ends,
)
from process_server.cache_recovery import CachedSegment, recover_cache
from process_server.errors import CacheDamaged
from process_server.work_segment import SegmentFrames
from protocol.vocabulary import Compression, Consistency, DiskId, PointId, extent_table
from storage.frame_record import FrameEntry, parse_frame_record
from storage.sealing import FrameCompressor, SealedFrame, SegmentSealer
from storage.segment import SegmentHeader, SegmentOpening, encode_opening, finish_segment
from tests.vectors.make_segment import (
    DATA_KEY,
    DISK,
    FRAMES,
    GRANT,
    PROCESS_SERVER_KEY,
    VAULT_KEY,
    VECTORS,
    WRAPPED_DATA_KEY,
)

OTHER_DISK: Final = DiskId("99" * 16)


class BytesDirectory:
    """A directory of files that lie in memory, without any faults."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)

    def names(self) -> list[str]:
        return sorted(self.files)

    def read(self, name: str) -> bytes:
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name]

    def replace(self, name: str, data: bytes) -> None:
        self.files[name] = data

    def open(self, name: str, *, create: bool = False, preallocate_bytes: int = 0, direct: bool = False) -> BytesFile:
        self.read(name)
        return BytesFile(self.files, name)

    def remove(self, name: str) -> None:
        self.files.pop(name, None)

    def free_bytes(self) -> int:
        return 2**40


class BytesFile:
    def __init__(self, files: dict[str, bytes], name: str) -> None:
        self._files = files
        self._name = name

    def size_bytes(self) -> int:
        return len(self._files[self._name])

    def read_into(self, offset_bytes: int, buffer: Buffer) -> int:
        target = memoryview(buffer).cast("B")
        data = self._files[self._name][offset_bytes : offset_bytes + len(target)]
        target[: len(data)] = data
        return len(data)

    def write(self, offset_bytes: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(bytes(memoryview(buffer).cast("B")) for buffer in buffers)
        old = self._files[self._name].ljust(offset_bytes, b"\0")
        self._files[self._name] = old[:offset_bytes] + data + old[offset_bytes + len(data) :]

    def truncate(self, size_bytes: int) -> None:
        self._files[self._name] = self._files[self._name][:size_bytes].ljust(size_bytes, b"\0")

    def synchronize(self) -> None:
        return

    def close(self) -> None:
        return


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sealed:
    opening: SegmentOpening
    frames: list[SealedFrame]

    def record(self, number: int) -> CacheRecord:
        frame = self.frames[number]
        return CacheRecord(
            kind=RecordKind.FRAME,
            disk=DISK,
            epoch=1,
            ordinal=self.opening.ordinal,
            parts=(frame.record,),
            payload_bytes=len(frame.record),
            digest=frame_digest(frame.record),
        )

    def opened(self) -> CacheRecord:
        return cache_record(RecordKind.SEGMENT_OPENED, DISK, 1, self.opening.ordinal, encode_opening(self.opening))


def _sealed(ordinal: int, first_sequence: int) -> _Sealed:
    """The frames of the golden vectors as segment `ordinal`: two change sets in three frames."""
    sealer = SegmentSealer(
        grant=GRANT,
        signed_grant=(VECTORS / "grant.bin").read_bytes(),
        ordinal=ordinal,
        first_sequence=first_sequence,
        data_key=DATA_KEY,
        vault_public_key=VAULT_KEY.public_key(),
        compressor=FrameCompressor(),
    )
    frames = []
    for number, frame in enumerate(FRAMES):
        extents = extent_table(frame["extents"])
        payload = frame["payload"]
        raw_bytes = 4096 if frame["compression"] is Compression.ZSTD else len(payload)
        options = {**frame, "extents": extents, "sequence": frame["sequence"] + first_sequence - 1}
        frames.append(sealer.seal(nonce_number=number, raw_bytes=raw_bytes, level=None, **options))
    opening = sealer.opening
    fixed = SegmentOpening(
        vault=opening.vault,
        machine=opening.machine,
        disk=opening.disk,
        epoch=opening.epoch,
        ordinal=ordinal,
        first_sequence=first_sequence,
        signed_grant=opening.signed_grant,
        wrapped_keys=(WRAPPED_DATA_KEY,),
    )
    return _Sealed(opening=fixed, frames=frames)


def _position(
    disk: DiskId, *, ordinal: int, committed: int, sequence: int, trailer_hash: bytes, cursor: int | None = None
) -> CacheRecord:
    point = CachedPoint(
        point=PointId("55" * 16), instant_ns=7, epoch=1, sequence=sequence, consistency=Consistency.CRASH
    )
    checkpoint = DiskCheckpoint(
        disk=disk,
        epoch=1,
        parent_epoch=0,
        parent_sequence=0,
        ordinal=ordinal,
        committed_ordinal=committed,
        sequence=sequence,
        trailer_hash=trailer_hash,
        copy_in_cursor_bytes=cursor,
        unreported_points=(point,) if sequence else (),
    )
    return cache_record(RecordKind.POSITION, disk, 1, ordinal, encode_checkpoint(checkpoint))


def _closed(sealed: _Sealed) -> tuple[CacheRecord, bytes]:
    entries: list[FrameEntry] = [frame.entry for frame in sealed.frames]
    header = SegmentHeader(opening=sealed.opening, previous_trailer_hash=bytes(32))
    end = finish_segment(header, entries, PROCESS_SERVER_KEY)
    frames = SegmentFrames()
    for entry in entries:
        frames.add(entry)
    closed = ClosedSegmentRecord(
        frames=len(entries),
        first_sequence=sealed.opening.first_sequence,
        last_sequence=frames.last_sequence,
        copy_in_cursor_bytes=frames.copy_in_cursor_bytes,
        trailer_hash=end.trailer_hash,
        points=tuple(frames.points),
        object_bytes=end.object_bytes,
        header=end.header,
        end=end.end,
    )
    ordinal = sealed.opening.ordinal
    return cache_record(RecordKind.SEGMENT_CLOSED, DISK, 1, ordinal, encode_closed(closed)), end.trailer_hash


def _file(number: int, batches: Sequence[Sequence[CacheRecord]]) -> bytes:
    data = b""
    for batch_number, records in enumerate(batches):
        buffer = bytearray(batch_bytes(records))
        write_batch(memoryview(buffer), records, file_number=number, batch_number=batch_number, offset_bytes=len(data))
        data += bytes(buffer)
    return data


@functools.cache
def batches() -> tuple[tuple[tuple[CacheRecord, ...], ...], ...]:
    """Three files: a segment over the first two that is closed and waits, with a frame behind its last whole change
    set, and one in work over the last two; beside it a disk that only stands somewhere.
    """
    first, second = _sealed(1, 1), _sealed(2, 3)
    closed, trailer_hash = _closed(first)
    # why: sealed for the segment before it was broken off; it lies in the cache and belongs to no whole change set.
    dropped = dataclasses.replace(second.record(0), ordinal=1)
    nothing = {"ordinal": 0, "committed": 0, "sequence": 0, "trailer_hash": bytes(32)}
    other = _position(OTHER_DISK, **nothing)  # type: ignore[arg-type]
    begun = (
        cache_record(RecordKind.CHECKPOINT, NO_DISK, 0, 0, encode_file_ends({})),
        _position(DISK, **nothing),  # type: ignore[arg-type]
        other,
    )
    oldest = (begun, (first.opened(), first.record(0)), (first.record(1),))
    ends = {0: len(_file(0, oldest))}
    old = (
        (cache_record(RecordKind.CHECKPOINT, NO_DISK, 0, 0, encode_file_ends(ends)), *begun[1:]),
        (first.record(2), dropped),
        (closed,),
        (second.opened(), second.record(0)),
        (second.record(1),),
    )
    ends[1] = len(_file(1, old))
    resumed = (
        cache_record(RecordKind.CHECKPOINT, NO_DISK, 0, 0, encode_file_ends(ends)),
        _position(DISK, ordinal=1, committed=0, sequence=2, trailer_hash=trailer_hash, cursor=2**21),
        other,
    )
    return (oldest, old, (resumed, (second.record(2),)))


@functools.cache
def cache_bytes() -> Mapping[str, bytes]:
    """The three files, small: a batch takes one or two blocks."""
    return {file_name(number): _file(number, one) for number, one in enumerate(batches())}


@dataclass(frozen=True, slots=True)
class Taken:
    """What a recovery takes for acknowledged of one disk. frames: by ordinal, what reads back; None where the cache
    itself says that it does not.
    """

    position: DiskCheckpoint
    committed_sequence: int
    waiting: tuple[tuple[int, tuple[bytes, ...] | None], ...]
    durable_sequence: int
    """None of the segment in work counts where it is told to be damaged."""


def taken(files: Mapping[str, bytes]) -> dict[DiskId, Taken]:
    """As a process server's start does it. Raises what recover_cache raises."""
    directory = BytesDirectory(files)
    recovered = recover_cache(directory)
    files_io = CacheFiles(directory)
    found: dict[DiskId, Taken] = {}
    for disk, one in recovered.disks.items():
        if disk in recovered.damaged:
            continue
        durable = one.position.sequence
        if one.work is not None:
            try:
                frames = _work(files_io, one.work)
            except CacheDamaged:
                continue  # told: the disk's history is taken from the store
            durable = frames.last_sequence if frames.whole_frames else durable
        waiting = tuple((segment.opening.ordinal, _contents(files_io, segment)) for segment in one.waiting)
        found[disk] = Taken(one.position, one.committed_sequence, waiting, durable)
    return found


def _work(files_io: CacheFiles, segment: CachedSegment) -> SegmentFrames:
    frames = SegmentFrames()
    locations = list(segment.frames)
    for location, payload in zip(locations, files_io.read(RecordKind.FRAME, locations).payloads, strict=True):
        frames.add_recovered(parse_frame_record(payload).entry, location, segment.opening)
    return frames


def _contents(files_io: CacheFiles, segment: CachedSegment) -> tuple[bytes, ...] | None:
    assert segment.closed is not None
    assert segment.closed_location is not None
    locations = list(segment.frames)[: segment.closed.frames]
    try:
        frames = files_io.read(RecordKind.FRAME, locations).payloads
        ends = files_io.read(RecordKind.SEGMENT_CLOSED, [segment.closed_location]).payloads
        return tuple(bytes(payload) for payload in (*frames, *ends))
    except CacheDamaged:
        return None


@functools.cache
def acknowledged() -> dict[DiskId, list[Taken]]:
    """Everything that was ever acknowledged while the files were written: after each batch of them."""
    found: dict[DiskId, list[Taken]] = {}
    whole: dict[str, bytes] = {}
    for number, one_file in enumerate(batches()):
        for count in range(1, len(one_file) + 1):
            for disk, one in taken({**whole, file_name(number): _file(number, one_file[:count])}).items():
                found.setdefault(disk, []).append(one)
        whole[file_name(number)] = _file(number, one_file)
    return found


def check_taken(files: Mapping[str, bytes]) -> None:
    """Nothing is taken that was never acknowledged; what does not read back is told, not taken."""
    for disk, one in taken(files).items():
        known = acknowledged()[disk]
        assert any(_is_told(one, other) for other in known), f"disk {disk}: {one}"
        points = {point for other in known for point in other.position.unreported_points}
        assert points.issuperset(one.position.unreported_points)


def _is_told(one: Taken, other: Taken) -> bool:
    """Whether `one` is `other`, apart from what is told to be unreadable."""
    stands, stood = (dataclasses.replace(each.position, unreported_points=()) for each in (one, other))
    if (stands, one.committed_sequence) != (stood, other.committed_sequence):
        return False
    same = all(
        ordinal == known and contents in (None, whole)
        for (ordinal, contents), (known, whole) in zip(one.waiting, other.waiting, strict=False)
    )
    return same and len(one.waiting) == len(other.waiting) and one.durable_sequence == other.durable_sequence
