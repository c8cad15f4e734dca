"""The segment that a disk's frames go into now: what was handed over to be sealed, and what is in the cache of it.

Invariant: only frames that are durable and belong to a whole change set ever get into the closed segment; its nonces
are the frames' places, and none is used twice, frames that are dropped later included.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from process_server.cache_log import Location, LocationTable, file_name
from process_server.cache_records import CachedPoint, ClosedSegmentRecord
from process_server.core.segmenting import SegmentGauge
from process_server.errors import CacheDamaged
from process_server.sealer import SegmentSealing
from storage.frame_record import FrameEntry
from storage.segment import SegmentHeader, SegmentOpening, finish_segment


@dataclass(slots=True, kw_only=True)
class SegmentFrames:
    """The frames of one segment as the cache has them, in order, and what their whole change sets add up to."""

    entries: list[FrameEntry] = field(default_factory=list)
    locations: LocationTable = field(default_factory=LocationTable)
    files: set[int] = field(default_factory=set)
    whole_frames: int = 0
    """How many, from the first, belong to whole change sets."""
    last_sequence: int = 0
    copy_in_cursor_bytes: int | None = None
    points: list[CachedPoint] = field(default_factory=list)

    def add(self, entry: FrameEntry) -> None:
        """The next frame."""
        self.entries.append(entry)
        head = entry.head
        if head.end is None:
            return
        self.whole_frames = len(self.entries)
        self.last_sequence = head.sequence
        if head.end.copy_in_cursor_bytes is not None:
            self.copy_in_cursor_bytes = head.end.copy_in_cursor_bytes
        if head.end.bookmark is not None:
            point = CachedPoint(
                point=head.end.bookmark.point,
                instant_ns=head.end.bookmark.instant_ns,
                epoch=head.epoch,
                sequence=head.sequence,
                consistency=head.end.consistency,
            )
            self.points.append(point)

    def add_recovered(self, entry: FrameEntry, location: Location, opening: SegmentOpening) -> None:
        """The next frame as a restart finds it. Raises CacheDamaged unless it follows the one before it: bytes between
        them are lost."""
        expected = (opening.first_sequence, 0)
        if self.entries:
            last = self.entries[-1].head
            expected = (last.sequence + 1, 0) if last.is_last else (last.sequence, last.frame_number + 1)
        found = (entry.head.sequence, entry.head.frame_number)
        if found != expected:
            reason = f"change set {found[0]} frame {found[1]} lies where {expected[0]} frame {expected[1]} was written"
            raise CacheDamaged(name=file_name(location.file_number), reason=reason)
        self.add(entry)
        self.locations.append(location)


@dataclass(slots=True, kw_only=True)
class WorkSegment:
    """A segment being filled. The intake's side counts in `gauge`, the cache's side in `frames`."""

    ordinal: int
    first_sequence: int
    sealing: SegmentSealing
    gauge: SegmentGauge
    frames: SegmentFrames = field(default_factory=SegmentFrames)
    is_opened: bool = False
    """Its opening is in the cache, or in the batch that is being written."""

    @property
    def opening(self) -> SegmentOpening:
        return self.sealing.opening


async def close_frames(
    executor: Executor,
    opening: SegmentOpening,
    frames: SegmentFrames,
    *,
    previous_trailer_hash: bytes,
    signing_key: Ed25519PrivateKey,
) -> ClosedSegmentRecord:
    """Ends a segment at its last whole change set. There is at least one."""
    entries = frames.entries[: frames.whole_frames]
    header = SegmentHeader(opening=opening, previous_trailer_hash=previous_trailer_hash)
    end = await asyncio.get_running_loop().run_in_executor(
        executor, lambda: finish_segment(header, entries, signing_key)
    )
    return ClosedSegmentRecord(
        frames=len(entries),
        first_sequence=opening.first_sequence,
        last_sequence=frames.last_sequence,
        copy_in_cursor_bytes=frames.copy_in_cursor_bytes,
        trailer_hash=end.trailer_hash,
        points=tuple(frames.points),
        object_bytes=end.object_bytes,
        header=end.header,
        end=end.end,
    )
