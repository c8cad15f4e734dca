"""What goes into the cache, item by item: frames, the ends of segments, and records about disks.

Invariants: a segment's opening is in the same batch as its first frame or an earlier one; a segment's end takes only
frames that are durable or in the same batch; what is dropped releases its credit all the same.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from process_server.cache_log import CacheRecord, Location, RecordKind, cache_record
from process_server.cache_records import ClosedSegmentRecord, DiskCheckpoint, encode_closed
from process_server.cache_recovery import CachedSegment
from process_server.core.disk_lifecycle import DiskState
from process_server.sealer import SealedRecord
from process_server.work_segment import SegmentFrames, WorkSegment
from protocol.errors import ReplicationError
from protocol.messages import Frame
from storage.segment import SegmentOpening, encode_opening

if TYPE_CHECKING:
    from process_server.disk_history import DiskHistory


class FrameItem:
    """One frame, from the worker thread that seals it to the cache."""

    is_frame = True

    def __init__(
        self,
        *,
        history: DiskHistory,
        segment: WorkSegment,
        frame: Frame,
        sealed: asyncio.Future[SealedRecord],
        done: Callable[[], None],
    ) -> None:
        self._history = history
        self._segment = segment
        self._frame = frame
        self._sealed = sealed
        self._done = done

    def is_ready(self) -> bool:
        return self._sealed.done()

    async def wait_until_ready(self) -> None:
        await asyncio.wait([self._sealed])

    async def prepare(self) -> Sequence[CacheRecord]:
        try:
            sealed = self._sealed.result()
        except ReplicationError as error:
            if not self._history.is_broken_off():
                self._history.break_off(error)
            return ()
        self._segment.gauge.frame_sealed(
            payload_bytes=self._frame.payload_bytes, stored_bytes=sealed.record.payload_bytes
        )
        if self._history.is_broken_off():
            return ()
        if self._segment.is_opened:
            return (sealed.record,)
        opening = self._segment.opening
        payload = encode_opening(opening)
        record = cache_record(RecordKind.SEGMENT_OPENED, opening.disk, opening.epoch, opening.ordinal, payload)
        return (record, sealed.record)

    def placed(self) -> None:
        self._segment.is_opened = True
        self._segment.frames.add(self._sealed.result().entry)

    def durable(self, locations: Sequence[Location]) -> None:
        if locations:
            frames = self._segment.frames
            self._history.hold_files(frames, [location.file_number for location in locations])
            frames.locations.append(locations[-1])
            self._history.frame_durable(self._segment, self._frame)
        self._done()

    def refused(self, error: ReplicationError) -> None:
        self._history.break_off(error)


class CloseItem:
    """The end of a segment, behind all its frames."""

    is_frame = False

    def __init__(self, *, history: DiskHistory, opening: Callable[[], SegmentOpening], frames: SegmentFrames) -> None:
        self._history = history
        self._opening = opening
        self._frames = frames
        self._closed: ClosedSegmentRecord | None = None
        self._position: DiskCheckpoint | None = None

    def is_ready(self) -> bool:
        return True

    async def wait_until_ready(self) -> None:
        return

    async def prepare(self) -> Sequence[CacheRecord]:
        before = self._history.prepared
        is_lost = self._history.state in (DiskState.UNKNOWN, DiskState.STOPPED)
        if before is None or is_lost or not self._frames.whole_frames:
            return ()
        opening = self._opening()
        if (opening.epoch, opening.ordinal) != (before.epoch, before.ordinal + 1):
            return ()
        closed = self._closed = await self._history.close_frames(opening, self._frames, before.trailer_hash)
        cursor = closed.copy_in_cursor_bytes
        self._position = self._history.prepared = dataclasses.replace(
            before,
            ordinal=opening.ordinal,
            sequence=closed.last_sequence,
            trailer_hash=closed.trailer_hash,
            copy_in_cursor_bytes=before.copy_in_cursor_bytes if cursor is None else cursor,
        )
        payload = encode_closed(closed)
        return (cache_record(RecordKind.SEGMENT_CLOSED, opening.disk, opening.epoch, opening.ordinal, payload),)

    def placed(self) -> None:
        return

    def durable(self, locations: Sequence[Location]) -> None:
        frames = self._frames
        if not locations:
            self._history.give_up_frames(frames)
            return
        assert self._closed is not None
        assert self._position is not None
        self._history.hold_files(frames, [locations[0].file_number])
        frames.locations.cut(frames.whole_frames)
        segment = CachedSegment(
            opening=self._opening(),
            files=frames.files,
            frames=frames.locations,
            closed=self._closed.without_bytes(),
            closed_location=locations[0],
        )
        self._history.segment_closed(segment, self._position)

    def refused(self, error: ReplicationError) -> None:
        raise AssertionError("only frames are refused") from error


class RecordItem:
    """Records about a disk that are known already, and what to do once they are durable."""

    is_frame = False

    def __init__(self, records: Sequence[CacheRecord], on_durable: Callable[[], None]) -> None:
        self._records = records
        self._on_durable = on_durable

    def is_ready(self) -> bool:
        return True

    async def wait_until_ready(self) -> None:
        return

    async def prepare(self) -> Sequence[CacheRecord]:
        return self._records

    def placed(self) -> None:
        return

    def durable(self, locations: Sequence[Location]) -> None:
        self._on_durable()

    def refused(self, error: ReplicationError) -> None:
        raise AssertionError("only frames are refused") from error
