"""What the cache holds after a restart, by replaying its records in order.

Invariants: what was acknowledged is found again, or the disk is reported as damaged and trusted for nothing; frames of
an unfinished change set are never taken for a whole one; a segment counts as committed only if a record or a
checkpoint says so, or one behind it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import structlog

from process_server.cache_files import CacheFiles, ScannedFile
from process_server.cache_log import LocatedRecord, Location, LocationTable, RecordKind, file_name, file_number_of
from process_server.cache_records import (
    CachedPoint,
    ClosedSegmentRecord,
    DiskCheckpoint,
    decode_checkpoint,
    decode_closed,
    decode_file_ends,
)
from process_server.errors import CacheDamaged
from protocol.errors import MalformedInput
from protocol.vocabulary import DiskId
from runtime.directory import DurableDirectory
from storage.segment import SegmentOpening, parse_opening

_log = structlog.get_logger("process_server.cache")


@dataclass(slots=True, kw_only=True, eq=False)
class CachedSegment:
    """A segment in the cache: where its frames lie, and once it is closed, where header, index and trailer lie."""

    opening: SegmentOpening
    files: set[int] = field(default_factory=set)
    """The log files that have bytes of it."""
    frames: LocationTable = field(default_factory=LocationTable)
    closed: ClosedSegmentRecord | None = None
    closed_location: Location | None = None
    is_whole: bool = True
    """No frame of it is missing. Known once it is closed: of a segment in work only the frames themselves tell."""


@dataclass(slots=True, kw_only=True)
class RecoveredDisk:
    """One disk's history as the cache knows it.

    position: after the newest closed segment. waiting: closed, not known to be committed, in order. work: the segment
    that was not closed, None if there is none.
    """

    position: DiskCheckpoint
    waiting: list[CachedSegment]
    work: CachedSegment | None

    @property
    def committed_sequence(self) -> int:
        """The newest sequence that is known to be readable in the store."""
        for segment in self.waiting:
            assert segment.closed is not None
            return segment.closed.first_sequence - 1
        return self.position.sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredCache:
    """files: every log file that is there, with its valid end. damaged: disks of which nothing here can be trusted."""

    files: list[ScannedFile]
    disks: dict[DiskId, RecoveredDisk]
    damaged: set[DiskId]


@dataclass(slots=True, kw_only=True)
class _Replayed:
    position: DiskCheckpoint
    committed_ordinal: int
    segments: dict[tuple[int, int], CachedSegment] = field(default_factory=dict)
    is_damaged: bool = False
    is_in_checkpoint: bool = True

    def take_committed(self, ordinal: int) -> tuple[CachedPoint, ...]:
        """All segments up to this one are readable in the store, whether or not each has its own record here: that may
        have gone with its file. Returns their points."""
        self.committed_ordinal = max(self.committed_ordinal, ordinal)
        points: tuple[CachedPoint, ...] = ()
        for epoch, number in sorted(self.segments):
            if epoch == self.position.epoch and number <= ordinal:
                closed = self.segments.pop((epoch, number)).closed
                points += closed.points if closed else ()
        return points


class Replay:
    """Takes records in the order in which they were written; payloads of frames are never asked for."""

    def __init__(self) -> None:
        self._disks: dict[DiskId, _Replayed] = {}
        self._is_behind_gap = False

    def position(self, checkpoint: DiskCheckpoint, *, is_checkpoint: bool) -> None:
        """A POSITION record. In a checkpoint it repeats what is known, or goes on from there if files are gone from
        before it; elsewhere it replaces it."""
        known = self._disks.get(checkpoint.disk)
        if known is None:
            self._disks[checkpoint.disk] = _Replayed(
                position=checkpoint, committed_ordinal=checkpoint.committed_ordinal
            )
            return
        known.is_in_checkpoint = True
        stands, is_at = (known.position.epoch, known.position.ordinal), (checkpoint.epoch, checkpoint.ordinal)
        is_repeated = stands == is_at and known.position.trailer_hash == checkpoint.trailer_hash
        # why: a file is removed once all in it is committed, though an older one is still needed for another disk. What
        # it said of committed segments is missed by nobody; those that wait are looked for in the end.
        goes_on = self._is_behind_gap and stands < is_at
        if is_checkpoint and known.position.epoch == checkpoint.epoch and (is_repeated or goes_on):
            known.position = checkpoint
            known.take_committed(checkpoint.committed_ordinal)
            return
        # why: any other checkpoint that does not repeat what was replayed shows that records before it are lost.
        self._disks[checkpoint.disk] = _Replayed(
            position=checkpoint,
            committed_ordinal=checkpoint.committed_ordinal,
            is_damaged=is_checkpoint and not goes_on,
        )

    def begin_checkpoint(self, *, is_behind_gap: bool) -> None:
        """A new file: the positions that follow are all that are known. is_behind_gap: the one before it is gone."""
        self._is_behind_gap = is_behind_gap
        for replayed in self._disks.values():
            replayed.is_in_checkpoint = False

    def end_checkpoint(self) -> None:
        """A disk that is not in the checkpoint was not trusted any more when the file was begun."""
        self._disks = {disk: replayed for disk, replayed in self._disks.items() if replayed.is_in_checkpoint}

    def opened(self, record: LocatedRecord, opening: SegmentOpening) -> None:
        replayed = self._disks.get(record.disk)
        if replayed is not None:
            segment = CachedSegment(opening=opening, files={record.location.file_number})
            replayed.segments[record.epoch, record.ordinal] = segment

    def frame(self, record: LocatedRecord) -> None:
        segment = self._segment(record)
        if segment is not None and segment.closed is None:
            segment.frames.append(record.location)
            segment.files.add(record.location.file_number)

    def closed(self, record: LocatedRecord, closed: ClosedSegmentRecord) -> None:
        replayed = self._disks.get(record.disk)
        if replayed is None or record.epoch != replayed.position.epoch:
            return
        segment = self._segment(record)
        points = replayed.position.unreported_points
        if segment is not None:
            segment.closed = closed.without_bytes()
            # why: frames behind its last whole change set lie in the cache too; their number alone tells of no gap.
            segment.is_whole = segment.frames.digests(closed.frames) == closed.frame_digests()
            segment.closed_location = record.location
            segment.files.add(record.location.file_number)
        else:
            points += closed.points
        if record.ordinal != replayed.position.ordinal + 1:
            replayed.is_damaged = True
        cursor = closed.copy_in_cursor_bytes
        replayed.position = dataclasses.replace(
            replayed.position,
            ordinal=record.ordinal,
            sequence=closed.last_sequence,
            trailer_hash=closed.trailer_hash,
            copy_in_cursor_bytes=replayed.position.copy_in_cursor_bytes if cursor is None else cursor,
            unreported_points=points,
        )

    def committed(self, record: LocatedRecord) -> None:
        replayed = self._disks.get(record.disk)
        if replayed is not None and record.epoch == replayed.position.epoch:
            points = replayed.position.unreported_points + replayed.take_committed(record.ordinal)
            replayed.position = dataclasses.replace(replayed.position, unreported_points=points)

    def finish(self) -> tuple[dict[DiskId, RecoveredDisk], set[DiskId]]:
        """The disks as they stand, and those that are damaged."""
        disks: dict[DiskId, RecoveredDisk] = {}
        damaged: set[DiskId] = set()
        for disk, replayed in self._disks.items():
            recovered = _assemble(replayed)
            if recovered is None:
                damaged.add(disk)
            else:
                disks[disk] = recovered
        return disks, damaged

    def _segment(self, record: LocatedRecord) -> CachedSegment | None:
        replayed = self._disks.get(record.disk)
        return None if replayed is None else replayed.segments.get((record.epoch, record.ordinal))


def _assemble(replayed: _Replayed) -> RecoveredDisk | None:
    position = replayed.position
    waiting = sorted(
        (segment for (epoch, _), segment in replayed.segments.items() if epoch == position.epoch and segment.closed),
        key=lambda segment: segment.opening.ordinal,
    )
    # why: a segment that is neither here nor known to be committed was acknowledged, and is lost.
    expected = list(range(replayed.committed_ordinal + 1, position.ordinal + 1))
    is_complete = [segment.opening.ordinal for segment in waiting] == expected
    if replayed.is_damaged or not is_complete or not all(segment.is_whole for segment in waiting):
        return None
    work = replayed.segments.get((position.epoch, position.ordinal + 1))
    return RecoveredDisk(position=position, waiting=waiting, work=work)


def recover_cache(directory: DurableDirectory) -> RecoveredCache:
    """Reads all log files, cuts torn tails, and replays what stands, which is durable on return. Blocking.

    Raises OSError if a file cannot be read or made durable, CacheFormatNotSupported.
    """
    files_io = CacheFiles(directory)
    numbers = sorted(number for name in directory.names() if (number := file_number_of(name)) is not None)
    ends, newest = _newest_checkpoint(files_io, numbers)
    replay = Replay()
    files: list[ScannedFile] = []
    for number in numbers:
        found = newest.get(number)
        if found is None:
            end_bytes = ends.get(number, 0)
            found = files_io.scan(number, end_bytes=end_bytes, verify_payloads=False)
            if found.end_bytes < end_bytes:
                _log.error("cache file is damaged", file=file_name(number), good=found.end_bytes, durable=end_bytes)
        _replay_file(replay, files_io, found.records, is_behind_gap=number - 1 not in numbers)
        files.append(dataclasses.replace(found, records=[]))
    disks, damaged = replay.finish()
    for disk in sorted(damaged):
        _log.error("the cache lost part of a disk's history", disk=disk)
    return RecoveredCache(files=files, disks=disks, damaged=damaged)


def _newest_checkpoint(files_io: CacheFiles, numbers: Sequence[int]) -> tuple[dict[int, int], dict[int, ScannedFile]]:
    """Where the older files end, by the newest checkpoint, and the files that were verified whole to find it.

    Behind the ends that a checkpoint states nothing was acknowledged, whatever may look whole there.
    """
    scanned: dict[int, ScannedFile] = {}
    for number in reversed(numbers):
        found = scanned[number] = files_io.scan(number, end_bytes=None, verify_payloads=True)
        # why: agents are told of everything that is found here, and a killed process may not have synchronized it.
        files_io.make_durable(number, end_bytes=found.end_bytes)
        if found.records:
            (payload,) = files_io.read(RecordKind.CHECKPOINT, [found.records[0].location]).payloads
            return decode_file_ends(payload, file_name(number)), scanned
    return {}, scanned


def _replay_file(
    replay: Replay, files_io: CacheFiles, records: Iterable[LocatedRecord], *, is_behind_gap: bool
) -> None:
    is_checkpoint = False
    for record in records:
        if record.kind is RecordKind.CHECKPOINT:
            is_checkpoint = True
            replay.begin_checkpoint(is_behind_gap=is_behind_gap)
            continue
        if is_checkpoint and record.batch_number:
            is_checkpoint = False
            replay.end_checkpoint()
        try:
            _replay_record(replay, files_io, record, is_checkpoint=is_checkpoint)
        except CacheDamaged as error:
            # why: a record that is not replayed leaves a gap, which the disk's own chain of ordinals then shows.
            _log.error("cache record is damaged", disk=record.disk, error=str(error))
    if is_checkpoint:
        replay.end_checkpoint()


def _replay_record(replay: Replay, files_io: CacheFiles, record: LocatedRecord, *, is_checkpoint: bool) -> None:
    if record.kind is RecordKind.FRAME:
        replay.frame(record)
        return
    if record.kind is RecordKind.SEGMENT_COMMITTED:
        replay.committed(record)
        return
    (payload,) = files_io.read(record.kind, [record.location]).payloads
    if record.kind is RecordKind.POSITION:
        replay.position(decode_checkpoint(record, payload), is_checkpoint=is_checkpoint)
    elif record.kind is RecordKind.SEGMENT_CLOSED:
        replay.closed(record, decode_closed(payload, file_name(record.location.file_number)))
    elif record.kind is RecordKind.SEGMENT_OPENED:
        try:
            replay.opened(record, parse_opening(bytes(payload)))
        except MalformedInput as error:
            raise CacheDamaged(name=file_name(record.location.file_number), reason=str(error)) from error
