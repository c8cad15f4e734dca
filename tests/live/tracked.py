"""A disk under the bitmap source, and a copy of it, kept as a recovery would keep it: by applying every round."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mobility_agent.disk_reader import LocalDisk
from mobility_agent.errors import ResyncNeeded
from mobility_agent.frame_buffers import FrameBuffers
from mobility_agent.pipeline import ReadAhead
from mobility_agent.tracking.bitmap import BitmapSource
from mobility_agent.tracking.change_source import Round, RoundEnd, SourceFrame
from mobility_agent.tracking.followed_disk import FollowedDisk
from mobility_agent.tracking.kernel_tracker import KernelTracker
from protocol.vocabulary import FRAME_RAW_BYTES_MAX, ChangeKind, DiskId
from runtime.local_directory import LocalDirectory

DISK = DiskId("d" * 32)
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What one round said."""

    end: RoundEnd
    read_bytes: int
    sent_bytes: int


class TrackedDisk:
    """The agent's part for one device, in one thread."""

    def __init__(self, device: Path, state: Path, pins: Path) -> None:
        self.device = device
        self.copy = bytearray()
        self.kinds: set[ChangeKind] = set()
        self.sequence = 0
        self.epoch = 0
        self._state = state
        self._pins = pins
        self._window = memoryview(mmap.mmap(-1, FRAME_RAW_BYTES_MAX))
        self._packing = memoryview(mmap.mmap(-1, FRAME_RAW_BYTES_MAX))
        self._buffers = FrameBuffers(buffers=4)
        self.open()

    def open(self) -> None:
        """As an agent does that starts."""
        self.tracker = KernelTracker(self._pins)
        self.tracker.open()
        self.disk = LocalDisk(str(self.device), expected=None)
        self.copy = self.copy or bytearray(self.disk.size_bytes)
        self.source = BitmapSource(
            disk=DISK,
            source=self.disk,
            directory=LocalDirectory(self._state),
            draw_random=os.urandom,
            follow=self.follow,
        )
        if not self.source.restore(self.epoch, (), sent_sequence=self.sequence):
            self.enter_epoch()

    def follow(self) -> FollowedDisk:
        return self.tracker.follow(DISK, device=os.stat(self.device).st_rdev, size_bytes=self.disk.size_bytes)

    def enter_epoch(self) -> None:
        self.epoch += 1
        parent = self.sequence if self.epoch > 1 else None
        self.source.enter_epoch(self.epoch, parent_sequence=parent, is_base_empty=self.epoch == 1)

    def close(self) -> None:
        self.source.close()
        self.disk.close()
        self.tracker.close()

    def round(self) -> Told:
        """Raises ResyncNeeded."""
        return self.finish(self.source.begin_round(first_bytes=0))

    async def round_ahead(self) -> Told:
        """Raises ResyncNeeded."""
        current = self.source.begin_round(first_bytes=0)
        sent_bytes = await self.read_ahead(current)
        return Told(end=current.end(), read_bytes=current.read_bytes, sent_bytes=sent_bytes)

    def finish(self, current: Round) -> Told:
        """The rest of a round."""
        sent_bytes = self.read_all(current)
        return Told(end=current.end(), read_bytes=current.read_bytes, sent_bytes=sent_bytes)

    def read_all(self, current: Round) -> int:
        """The rest of a round but for its end; the bytes that were sent."""
        sent_bytes = 0
        while not current.is_exhausted:
            sent_bytes += self._take(current.read(self._window, self._packing))
        return sent_bytes

    async def read_ahead(self, current: Round) -> int:
        """The same as the agent does it: while one step is taken in, the next is read in another thread."""
        sent_bytes = 0
        with ThreadPoolExecutor(1) as reading:
            ahead = ReadAhead(current, self._buffers, reading, compress=False)
            try:
                while (step := await ahead.next()) is not None:
                    sent_bytes += self._take([frame.source for frame in step.frames])
                    for frame in step.frames:
                        frame.release()
            finally:
                await ahead.close()
        return sent_bytes

    def _take(self, frames: Sequence[SourceFrame]) -> int:
        """Applies them as one change set; the bytes that were sent."""
        for frame in frames:
            self._apply(frame)
        if frames:
            self.sequence += 1
            self.source.sent(self.sequence, [frame.receipt for frame in frames])
            self.source.acknowledged(self.sequence)
        return sum(frame.packed.raw_bytes for frame in frames)

    def round_or_resync(self) -> Told:
        """A round; in a new epoch, over everything, if track was lost."""
        try:
            return self.round()
        except ResyncNeeded:
            self.enter_epoch()
            return self.round()

    def differing_blocks(self, block_bytes: int = 4096) -> list[int]:
        """Where the copy is not the device, now."""
        descriptor = os.open(self.device, os.O_RDONLY | os.O_DIRECT)
        wrong = []
        try:
            for offset in range(0, len(self.copy), len(self._window)):
                view = self._window[: min(len(self._window), len(self.copy) - offset)]
                assert os.preadv(descriptor, [view], offset) == len(view)
                if view != self.copy[offset : offset + len(view)]:
                    wrong += [
                        offset + at
                        for at in range(0, len(view), block_bytes)
                        if view[at : at + block_bytes] != self.copy[offset + at : offset + at + block_bytes]
                    ]
        finally:
            os.close(descriptor)
        return wrong

    def _apply(self, frame: SourceFrame) -> None:
        payload = b"".join(frame.packed.payload)
        at = 0
        for row in frame.packed.table:
            offset, length = int(row["offset"]), int(row["length"])
            self.kinds.add(ChangeKind(row["kind"]))
            if row["kind"] == ChangeKind.DATA:
                self.copy[offset : offset + length] = payload[at : at + length]
                at += length
            else:
                self.copy[offset : offset + length] = bytes(length)
