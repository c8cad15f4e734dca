"""Sends one round of one disk as change sets, and says at its end how good the position is.

An unsettled position never gets a bookmark; the instant of a bookmark was received before the instant that it shows.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Final, Protocol

from typing_extensions import Buffer

from mobility_agent.core.change_sets import ChangeSetBuilder
from mobility_agent.core.freeze_point import FreezeLabel
from mobility_agent.core.replication import is_settled
from mobility_agent.disk_history import DiskHistory
from mobility_agent.disk_ports import DiskPorts
from mobility_agent.io_priority import IoPriority
from mobility_agent.pipeline import ReadAhead, ReadyFrame
from mobility_agent.tracking.change_source import Round
from mobility_agent.uplink import Connection
from protocol.framing import body_bytes_of
from protocol.messages import Frame
from protocol.vocabulary import (
    CHANGE_SET_RAW_BYTES_MAX,
    Bookmark,
    ChangeSetEnd,
    Compression,
    Consistency,
    PointId,
)
from runtime.blocking import blocking

CURSOR_STRIDE_BYTES: Final = 16 * 2**30
"""A copy-in that finds nothing to send still states its cursor this often."""
CHANGE_SET_SECONDS_MAX: Final = 5.0
"""A change set is ended at this age, full or not: until its end comes nothing of it is durable, and the point before
it may lie in the same unfinished segment. A scan that finds little may go on for hours."""
IDENTIFIER_BYTES: Final = 16
UNSETTLED: Final = ChangeSetEnd(consistency=Consistency.UNSETTLED)
NO_CLOCK: Final = "the configuration server's clock has not been heard yet"


class PointDue(Protocol):
    def __call__(self, *, is_changed: bool) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundOutcome:
    """How a round that was sent whole ended."""

    is_settled: bool
    reason: str
    """Why it is not settled, or has no point; empty when all is well."""
    is_changed: bool
    point: PointId | None
    consistency: Consistency


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldRound:
    """What a round does otherwise that begins while the machine's file systems are frozen.

    Nothing of it touches the agent's state until its end, as long as it fits one change set: that may lie on a frozen
    file system. executor: for its reads, where no other disk's writes may stand in the way. on_read: all was read.
    label: why the position is not settled (empty if it is) → what it may be called, once all is over; None if nobody
    says anything.
    """

    executor: Executor
    on_read: Callable[[], None]
    label: Callable[[str], Awaitable[FreezeLabel | None]]


class RoundSender:
    """The change sets of one round on one open channel."""

    def __init__(
        self,
        *,
        connection: Connection,
        channel: int,
        history: DiskHistory,
        ports: DiskPorts,
        is_copy: bool,
        held: HeldRound | None = None,
    ) -> None:
        self.sent_bytes = 0
        """Of frame bodies."""
        self.sent_raw_bytes = 0
        """Of the data in them, before compression."""
        self._connection = connection
        self._channel = channel
        self._history = history
        self._ports = ports
        self._is_copy = is_copy
        self._held = held
        self._reading_executor = ports.executor if held is None else held.executor
        self._epoch = history.standing.epoch
        self._builder: ChangeSetBuilder | None = None
        self._receipts: list[Any] = []
        self.is_changed = False
        """Whether anything was sent."""
        self._stated_cursor = 0
        self._paced_bytes = 0
        self._change_set_began_seconds = 0.0

    async def send_round(self, changes: Round, *, first_bytes: int, is_point_due: PointDue) -> RoundOutcome:
        """Sends all of the round. Raises ConnectionLost, DiskFault, AgentStateDamaged, OSError (of the agent's
        state)."""
        self._history.begin_round(first_bytes=first_bytes)
        self._stated_cursor = first_bytes
        priority = self._ports.copy_priority if self._is_copy else IoPriority.NORMAL
        ahead = ReadAhead(
            changes,
            self._ports.buffers,
            self._reading_executor,
            compress=self._ports.compress,
            priority=priority,
            is_ahead=not (self._is_copy and self._ports.copy_pace.is_bounded),
        )
        try:
            self._note_read(changes)
            while (step := await ahead.next()) is not None:
                self._note_read(changes)
                await self._send_frames(step.frames)
                await self._end_if_due(step.compared_to_bytes)
                if self._is_copy:
                    await self._keep_pace(changes.read_bytes)
        finally:
            await ahead.close()
        return await self._end_round(changes, first_bytes=first_bytes, is_point_due=is_point_due)

    async def _keep_pace(self, read_bytes: int) -> None:
        """Waits until more of a copy-in may be read."""
        newly, self._paced_bytes = read_bytes - self._paced_bytes, read_bytes
        seconds = self._ports.copy_pace.wait_seconds(newly, self._ports.clock.monotonic_seconds())
        if seconds > 0:
            await asyncio.sleep(seconds)

    def _note_read(self, changes: Round) -> None:
        if self._held is not None and changes.is_exhausted:
            self._held.on_read()

    async def _send_frames(self, frames: list[ReadyFrame]) -> None:
        waiting = deque(frames)
        try:
            while waiting:
                message = await self._next_message(waiting[0])
                frame = waiting.popleft()
                body = [frame.source.packed.table.tobytes(), *frame.payload]
                await self._post(message, body, frame.release)
        finally:
            for frame in waiting:
                frame.release()

    async def _next_message(self, frame: ReadyFrame) -> Frame:
        """Takes the frame into the change set in work, and completes that when the frame fills it."""
        packed = frame.source.packed
        self.is_changed = True
        self.sent_raw_bytes += packed.raw_bytes
        builder = self._change_set()
        self._history.take(packed.extents)
        number = builder.add(packed)
        self._receipts.append(frame.source.receipt)
        end = None
        if builder.is_full:
            end = self._cursor_end(frame.source.compared_to_bytes)
            await self._complete(builder)
        return self._message(
            builder,
            number,
            extent_count=len(packed.table),
            raw_bytes=packed.raw_bytes,
            payload_bytes=frame.payload_bytes,
            compression=frame.compression,
            end=end,
        )

    async def _end_if_due(self, compared_to_bytes: int) -> None:
        """Ends a change set that is old, and states how far a copy-in has come although there was nothing to send."""
        if self._held is not None:
            return
        if self._builder is None:
            is_due = self._is_copy and compared_to_bytes - self._stated_cursor >= CURSOR_STRIDE_BYTES
        else:
            age_seconds = self._ports.clock.monotonic_seconds() - self._change_set_began_seconds
            is_due = age_seconds >= CHANGE_SET_SECONDS_MAX
        if is_due:
            await self._end_change_set(self._cursor_end(compared_to_bytes))

    async def _end_round(self, changes: Round, *, first_bytes: int, is_point_due: PointDue) -> RoundOutcome:
        if self._is_copy:
            await self._end_change_set(self._cursor_end(changes.compared_to_bytes))
        end = await blocking(self._ports.executor, changes.end)
        settled = is_settled(
            first_bytes=first_bytes,
            is_still=end.promise.is_still,
            dirty_remains=self._history.is_anything_dirty,
        )
        reason = end.reason
        if not settled and not reason:
            reason = "the copy-in was resumed; the next round compares everything again"
        label = None if self._held is None else await self._held.label("" if settled else reason)
        consistency = Consistency.CRASH if settled else Consistency.UNSETTLED
        if settled and label is not None:
            consistency = label.consistency
        bookmark = None
        if settled and (self._held is not None or is_point_due(is_changed=self.is_changed)):
            bookmark = self._bookmark(end.instant_ns)
            reason = "" if bookmark is not None else NO_CLOCK
        if settled and (self.is_changed or bookmark is not None):
            await self._end_change_set(ChangeSetEnd(consistency=consistency, bookmark=bookmark))
        elif self._builder is not None:
            await self._end_change_set(UNSETTLED)
        self._history.end_round()
        return RoundOutcome(
            is_settled=settled,
            reason=reason,
            is_changed=self.is_changed,
            point=None if bookmark is None else bookmark.point,
            consistency=consistency,
        )

    def _bookmark(self, instant_ns: int | None) -> Bookmark | None:
        if instant_ns is None:
            return None
        point = PointId(self._ports.draw_random(IDENTIFIER_BYTES).hex())
        return Bookmark(point=point, instant_ns=instant_ns)

    def _cursor_end(self, compared_to_bytes: int) -> ChangeSetEnd:
        if not self._is_copy:
            return UNSETTLED
        self._stated_cursor = max(self._stated_cursor, compared_to_bytes)
        return ChangeSetEnd(consistency=Consistency.UNSETTLED, copy_in_cursor_bytes=self._stated_cursor)

    def _change_set(self) -> ChangeSetBuilder:
        if self._builder is None:
            self._change_set_began_seconds = self._ports.clock.monotonic_seconds()
            self._builder = ChangeSetBuilder(
                sequence=self._history.standing.sent_sequence + 1,
                raw_bytes_target=self._ports.change_set_raw_bytes if self._held is None else CHANGE_SET_RAW_BYTES_MAX,
            )
        return self._builder

    async def _end_change_set(self, end: ChangeSetEnd) -> None:
        """Ends the change set in work, or makes an empty one, with a frame that carries only the end."""
        builder = self._change_set()
        number = builder.frame_count
        await self._complete(builder)
        message = self._message(
            builder, number, extent_count=0, raw_bytes=0, payload_bytes=0, compression=Compression.NONE, end=end
        )
        await self._post(message, [], _keep)

    async def _complete(self, builder: ChangeSetBuilder) -> None:
        """The change set is in the ledger when this returns; its last frame may leave."""
        receipts, self._receipts = self._receipts, []
        self._builder = None
        extents = builder.extents()
        await blocking(self._ports.executor, lambda: self._history.complete(builder.sequence, extents, receipts))

    async def _post(self, message: Frame, body: Sequence[Buffer], release: Callable[[], None]) -> None:
        await self._connection.send_frame(message, body, release)
        self.sent_bytes += body_bytes_of(message)

    def _message(
        self,
        builder: ChangeSetBuilder,
        number: int,
        *,
        extent_count: int,
        raw_bytes: int,
        payload_bytes: int,
        compression: Compression,
        end: ChangeSetEnd | None,
    ) -> Frame:
        return Frame(
            channel=self._channel,
            epoch=self._epoch,
            sequence=builder.sequence,
            frame_number=number,
            extent_count=extent_count,
            raw_bytes=raw_bytes,
            payload_bytes=payload_bytes,
            compression=compression,
            end=end,
        )


def _keep() -> None:
    """An end frame has no buffers."""
