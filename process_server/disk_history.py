"""One disk's history on this process server, and its one owner: every change of its state is made here.

Invariants: positions follow the cache (durable) and the store (committed), never the wire; a segment is closed in the
cache before it may be uploaded; after a failure behind the intake nothing more is taken until the disk is opened again;
what is stopped takes nothing and uploads nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

import numpy
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from process_server.cache import Cache
from process_server.cache_items import CloseItem, FrameItem, RecordItem
from process_server.cache_log import CacheRecord, RecordKind, cache_record
from process_server.cache_records import CachedPoint, ClosedSegmentRecord, DiskCheckpoint, encode_checkpoint
from process_server.cache_recovery import CachedSegment, RecoveredDisk
from process_server.cache_writer import CacheWriter
from process_server.core.disk_lifecycle import DiskEvent, DiskState, next_state
from process_server.core.intake import DiskIntake, GrantedDisk
from process_server.core.positions import DiskPositions
from process_server.core.segmenting import CHANGE_SET_SILENCE_SECONDS_MAX, SegmentGauge, SegmentRules
from process_server.errors import DiskStopped
from process_server.grants import HeldGrant
from process_server.metrics import ProcessServerMetrics
from process_server.sealer import Sealer
from process_server.work_segment import SegmentFrames, WorkSegment, close_frames
from protocol.errors import DeadlineExceeded, ReplicationError
from protocol.messages import Frame
from protocol.vocabulary import EXTENT_DTYPE, DiskId, PeerIdentity
from runtime.clock import Clock
from storage.errors import HistoryForked
from storage.segment import SegmentOpening

_log = structlog.get_logger("process_server.disk")


class Holder(Protocol):
    """The connection that has a disk open. Calls come on the event loop and return at once."""

    def positions_changed(self, history: DiskHistory) -> None: ...

    def disk_closed(self, history: DiskHistory, error: ReplicationError) -> None:
        """No more frames of it are taken from this connection; tell the agent why."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryTools:
    """What every disk's history works with."""

    cache: Cache
    writer: CacheWriter
    sealer: Sealer
    executor: Executor
    clock: Clock
    metrics: ProcessServerMetrics
    signing_key: Ed25519PrivateKey
    rules: SegmentRules
    on_closed_segment: Callable[[DiskHistory], None]


class DiskHistory:
    """See the module. `disk` is fixed; everything else changes by the methods only."""

    def __init__(self, disk: DiskId, tools: HistoryTools) -> None:
        self.disk = disk
        self.state = DiskState.UNKNOWN
        self.position: DiskCheckpoint | None = None
        """After the newest closed segment that is durable in the cache."""
        self.prepared: DiskCheckpoint | None = None
        """After the newest closed segment that is about to be: what the next one continues."""
        self.positions: DiskPositions | None = None
        self.unreported_points: tuple[CachedPoint, ...] = ()
        """Committed bookmarks that the configuration server has not yet acknowledged."""
        self.waiting: list[CachedSegment] = []
        """Closed and not committed, in order."""
        self.work: WorkSegment | None = None
        self.stop_reason: DiskStopped | None = None
        self.stopped_epoch = 0
        self.forked_epoch: int | None = None
        """The newest epoch of which the store was found to hold other segments than this cache."""
        self.received_bytes = 0
        self.stored_bytes = 0
        self._tools = tools
        self._held: HeldGrant | None = None
        self._vault_key: X25519PublicKey | None = None
        self._holder: Holder | None = None
        self._intake: DiskIntake | None = None
        self._next_ordinal = 1
        self._durable_cursor_bytes: int | None = None

    # what is asked

    @property
    def holder(self) -> Holder | None:
        return self._holder

    @property
    def copy_in_cursor_bytes(self) -> int | None:
        """The newest durable cursor of the epoch."""
        return self._durable_cursor_bytes

    @property
    def cached_bytes(self) -> int:
        """Of closed segments that wait for the store."""
        return sum(segment.closed.object_bytes for segment in self.waiting if segment.closed)

    def checkpoint(self) -> DiskCheckpoint | None:
        """Where the disk stands, for the start of a log file; None if that is not known."""
        if self.position is None:
            return None
        committed_ordinal = self.waiting[0].opening.ordinal - 1 if self.waiting else self.position.ordinal
        return dataclasses.replace(
            self.position, committed_ordinal=committed_ordinal, unreported_points=self.unreported_points
        )

    def is_broken_off(self) -> bool:
        """Whether what is still on its way into the cache has to be dropped."""
        return self.state in (DiskState.BROKEN, DiskState.UNKNOWN, DiskState.STOPPED)

    # the agent's side

    def open(self, holder: Holder, peer: PeerIdentity, held: HeldGrant, vault_key: X25519PublicKey) -> None:
        """An agent's connection sends from now on. The position is known and nothing is in work."""
        assert self.positions is not None
        assert self.prepared is not None
        self._move(DiskEvent.OPENED)
        self._held, self._vault_key, self._holder = held, vault_key, holder
        grant = held.grant
        granted = GrantedDisk(
            vault=grant.vault,
            machine=grant.machine,
            disk=self.disk,
            epoch=grant.epoch,
            disk_size_bytes=grant.disk_size_bytes,
        )
        self._intake = DiskIntake(granted=granted, peer=peer, next_sequence=self.positions.durable + 1)
        self._next_ordinal = self.prepared.ordinal + 1
        self._tools.metrics.open_disks.inc()

    def leave(self, holder: Holder) -> None:
        """The connection is over or has closed the disk. What it sent whole still becomes durable."""
        if self._holder is holder:
            self._drop_holder()
            self._move(DiskEvent.LEFT)
            if self.work is not None and self.work.gauge.is_inside_change_set:
                self.end_segment()

    def take_over(self, error: ReplicationError) -> None:
        """A newer connection opens the disk: the one that has it is told."""
        holder = self._holder
        if holder is not None:
            self.leave(holder)
            holder.disk_closed(self, error)

    def take_frame(
        self, frame: Frame, body: memoryview, *, body_free: Callable[[], None], done: Callable[[], None]
    ) -> None:
        """Takes the next frame of the holder.

        body_free is called once `body` is not needed any more, done when the frame is durable or dropped. Raises what
        the intake refuses; nothing is taken then, and neither is called.
        """
        assert self._intake is not None
        assert self.positions is not None
        table = body[: frame.extent_count * EXTENT_DTYPE.itemsize]
        extents = numpy.frombuffer(table, dtype=EXTENT_DTYPE)
        self._intake.accept(frame, extents, current_epoch=self.positions.epoch)
        now_seconds = self._tools.clock.monotonic_seconds()
        if self.work is not None and self.work.gauge.is_due(now_seconds):
            self.end_segment()
        segment = self.work or self._begin_segment(frame.sequence)
        nonce_number = segment.gauge.frames
        segment.gauge.frame_taken(
            payload_bytes=frame.payload_bytes,
            extents=frame.extent_count,
            is_last=frame.is_last,
            now_seconds=now_seconds,
        )
        self.received_bytes += len(body)
        if frame.is_last:
            self.positions = self.positions.with_received(frame.sequence)
        sealed = self._tools.sealer.seal(
            segment.sealing, frame, body, ordinal=segment.ordinal, nonce_number=nonce_number
        )
        sealed.add_done_callback(lambda _: body_free())
        self._tools.writer.put(FrameItem(history=self, segment=segment, frame=frame, sealed=sealed, done=done))

    # segments

    def end_due_segment(self, now_seconds: float) -> None:
        """Ends the segment in work if its age or size says so, and at the last whole change set if the rest of the next
        one does not come."""
        if self.work is None:
            return
        if self.work.gauge.is_due(now_seconds):
            self.end_segment()
        elif self.work.gauge.is_stalled(now_seconds):
            self.break_off(DeadlineExceeded(what="the rest of a change set", seconds=CHANGE_SET_SILENCE_SECONDS_MAX))

    def end_segment(self) -> None:
        """Closes the segment in work at its last whole change set, after everything that was put before."""
        if self.work is not None:
            segment, self.work = self.work, None
            self._tools.writer.put(CloseItem(history=self, opening=lambda: segment.opening, frames=segment.frames))

    def _begin_segment(self, first_sequence: int) -> WorkSegment:
        assert self._held is not None
        assert self._vault_key is not None
        ordinal, self._next_ordinal = self._next_ordinal, self._next_ordinal + 1
        sealing = self._tools.sealer.begin_segment(
            self._held, ordinal=ordinal, first_sequence=first_sequence, vault_public_key=self._vault_key
        )
        gauge = SegmentGauge(rules=self._tools.rules)
        self.work = WorkSegment(ordinal=ordinal, first_sequence=first_sequence, sealing=sealing, gauge=gauge)
        return self.work

    # the cache's side

    def frame_durable(self, segment: WorkSegment, frame: Frame) -> None:
        """A frame is synchronized; with the last one of a change set the durable position rises."""
        if frame.end is None or self.positions is None or self.positions.epoch != frame.epoch:
            return
        self.positions = self.positions.with_durable(frame.sequence)
        if frame.end.copy_in_cursor_bytes is not None:
            self._durable_cursor_bytes = frame.end.copy_in_cursor_bytes
        self._tools.metrics.acknowledged_change_sets.inc()
        self._tell_positions()

    def segment_closed(self, closed: CachedSegment, position: DiskCheckpoint) -> None:
        """A closed segment is durable in the cache and may be uploaded."""
        self.position = position
        self.waiting.append(closed)
        self._tools.on_closed_segment(self)

    def hold_files(self, frames: SegmentFrames, file_numbers: Iterable[int]) -> None:
        """The segment has bytes in these files: they are kept until it is committed or given up."""
        for number in sorted(set(file_numbers) - frames.files):
            frames.files.add(number)
            self._tools.cache.hold(number)

    async def close_frames(
        self, opening: SegmentOpening, frames: SegmentFrames, previous_trailer_hash: bytes
    ) -> ClosedSegmentRecord:
        """The end of a segment at its last whole change set, signed; nothing is changed yet."""
        return await close_frames(
            self._tools.executor,
            opening,
            frames,
            previous_trailer_hash=previous_trailer_hash,
            signing_key=self._tools.signing_key,
        )

    def give_up_frames(self, frames: SegmentFrames) -> None:
        """A segment without a whole change set: its frames mean nothing, and its ordinal is free again."""
        self._tools.cache.release(frames.files)
        frames.files.clear()

    # the store's side

    def segment_committed(self, segment: CachedSegment) -> None:
        """The first of `waiting` is in the store. A record of that goes into the cache; then its files are free."""
        assert self.waiting[0] is segment
        assert segment.closed is not None
        del self.waiting[0]
        self._add_points(segment.closed.points)
        if self.positions is not None and self.positions.epoch == segment.opening.epoch:
            self.positions = self.positions.with_committed(segment.closed.last_sequence)
        self.stored_bytes += segment.closed.object_bytes
        opening = segment.opening
        record = cache_record(RecordKind.SEGMENT_COMMITTED, self.disk, opening.epoch, opening.ordinal)
        files = set(segment.files)
        self._tools.writer.put(RecordItem([record], lambda: self._tools.cache.release(files)))
        self._tell_positions()

    def points_reported(self, points: Iterable[CachedPoint]) -> None:
        """The configuration server has these."""
        reported = set(points)
        self.unreported_points = tuple(point for point in self.unreported_points if point not in reported)

    # positions and faults

    def recover(self, recovered: RecoveredDisk) -> None:
        """Takes over what the cache holds after a restart. A segment in work is closed by whoever calls this."""
        self.position = self.prepared = recovered.position
        self.forked_epoch = recovered.position.epoch if recovered.position.is_forked else None
        self._add_points(recovered.position.unreported_points)
        self.waiting = list(recovered.waiting)
        for segment in (*self.waiting, *([recovered.work] if recovered.work else [])):
            for number in segment.files:
                self._tools.cache.hold(number)
        self.positions = DiskPositions.at(
            recovered.position.epoch, durable=recovered.position.sequence, committed=recovered.committed_sequence
        )
        self._durable_cursor_bytes = recovered.position.copy_in_cursor_bytes
        self._move(DiskEvent.POSITION_FOUND)

    def work_recovered(self, frames: SegmentFrames) -> None:
        """The unclosed segment's whole change sets are durable: they were found in the cache."""
        assert self.positions is not None
        if frames.whole_frames:
            last = frames.last_sequence
            self.positions = DiskPositions.at(self.positions.epoch, durable=last, committed=self.positions.committed)
            if frames.copy_in_cursor_bytes is not None:
                self._durable_cursor_bytes = frames.copy_in_cursor_bytes

    def close_recovered(self, segment: CachedSegment, frames: SegmentFrames) -> None:
        """Closes, after a restart, the segment that was in work. Its data key is gone; it is never appended to.

        Its files have been held since recover().
        """
        frames.files.update(segment.files)
        self._tools.writer.put(CloseItem(history=self, opening=lambda: segment.opening, frames=frames))

    def settle(self) -> None:
        """Nothing of this disk is on its way into the cache any more: what was not made durable is forgotten."""
        assert self.work is None
        if self.positions is not None and self.state is not DiskState.STOPPED:
            self.positions = self.positions.without_unfinished()
            self.prepared = self.position
            self._move(DiskEvent.POSITION_FOUND)

    def start_epoch(self, position: DiskCheckpoint) -> None:
        """The history goes on from `position`, all of which is committed. Known in the cache after the next barrier."""
        self._add_points(position.unreported_points)
        self._drop_waiting()
        self.prepared = position
        self.positions = DiskPositions.at(position.epoch, durable=position.sequence, committed=position.sequence)
        self._durable_cursor_bytes = position.copy_in_cursor_bytes
        record = _position_record(position)
        self._tools.writer.put(RecordItem([record], lambda: self._position_durable(position)))
        self._move(DiskEvent.POSITION_FOUND)

    def _position_durable(self, position: DiskCheckpoint) -> None:
        if self.positions is not None and self.positions.epoch == position.epoch:
            self.position = position

    def break_off(self, error: ReplicationError) -> None:
        """Something behind the intake failed: what is on its way is dropped, the agent has to open the disk again."""
        _log.warning("disk broken off", disk=self.disk, code=error.code, reason=str(error))
        self._end(DiskEvent.BROKE_OFF, error)

    def lose_cache(self, error: ReplicationError) -> None:
        """What the cache held of it does not read back: only the store knows where this disk stands."""
        _log.error("the cache lost a disk's change sets", disk=self.disk, code=error.code, reason=str(error))
        self._end(DiskEvent.CACHE_LOST, error)
        if self.state is DiskState.UNKNOWN:
            self._drop_waiting()
            self.position = self.prepared = self.positions = None

    def stop(self, error: ReplicationError) -> None:
        """The history must not be extended here any more."""
        _log.error("disk stopped", disk=self.disk, code=error.code, reason=str(error))
        if self.state is not DiskState.STOPPED:
            self._tools.metrics.stopped_disks.inc()
            self.stopped_epoch = self.position.epoch if self.position else 0
        if isinstance(error, HistoryForked) and self.position is not None:
            self._keep_fork(self.position)
        self.stop_reason = DiskStopped(disk=self.disk, reason_code=error.code, reason=str(error))
        self._end(DiskEvent.SUPERSEDED, self.stop_reason)
        self._drop_waiting()

    def _keep_fork(self, position: DiskCheckpoint) -> None:
        """Also a process that starts after this one leaves the epoch, and knows why."""
        self.forked_epoch = position.epoch
        # why: nothing waits any more, and what is left of this epoch is the store's
        self.position = dataclasses.replace(
            position, committed_ordinal=position.ordinal, must_be_left=True, is_forked=True
        )
        self._tools.writer.put(RecordItem([_position_record(self.position)], lambda: None))

    def regrant(self) -> None:
        """A grant of a higher epoch came: the store says where the history stands by now."""
        self._move(DiskEvent.REGRANTED)
        self._tools.metrics.stopped_disks.dec()
        self.stop_reason = None
        self.position = self.prepared = self.positions = None

    def _end(self, event: DiskEvent, error: ReplicationError) -> None:
        self._move(event)
        self.end_segment()
        holder = self._holder
        if holder is not None:
            self._drop_holder()
            holder.disk_closed(self, error)

    def _drop_holder(self) -> None:
        self._holder = None
        self._intake = None
        self._tools.metrics.open_disks.dec()

    def _drop_waiting(self) -> None:
        for segment in self.waiting:
            self._tools.cache.release(segment.files)
        self.waiting = []

    def _add_points(self, points: Iterable[CachedPoint]) -> None:
        self.unreported_points = tuple(dict.fromkeys((*self.unreported_points, *points)))

    def _move(self, event: DiskEvent) -> None:
        self.state = next_state(self.state, event)

    def _tell_positions(self) -> None:
        if self._holder is not None:
            self._holder.positions_changed(self)


def _position_record(position: DiskCheckpoint) -> CacheRecord:
    return cache_record(
        RecordKind.POSITION, position.disk, position.epoch, position.ordinal, encode_checkpoint(position)
    )
