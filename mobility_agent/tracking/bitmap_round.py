"""One round of the bitmap source: reads the marked blocks of one disk, compares them with what the history holds where
it read enough of them, and says at its end whether what it read is the disk at one instant.

- A digest is recorded only of a digest block that was sent as a whole: whatever it held when it was read is what the
  history holds. One of which a part was sent is unknown from then on.
- What a round says is the disk at the instant of its swap is what all writes submitted until then made of it, and
  none submitted later: those were marked, and none of them went into a block of the round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy

from mobility_agent.core.change_sets import Change, FramePacker
from mobility_agent.core.write_audit import RoundObservation, is_all_accounted_for, why_not_still
from mobility_agent.ports import SourceDisk
from mobility_agent.tracking.block_bits import WINDOW_BYTES, Mask, bits_like, mark_areas
from mobility_agent.tracking.change_source import Promise, RoundEnd, SourceFrame
from mobility_agent.tracking.digest_file import DigestFile
from mobility_agent.tracking.followed_disk import Counters, FollowedDisk, Marks
from mobility_agent.tracking.scan import STEP_BYTES_MAX, is_zero, moved
from protocol.vocabulary import DIGEST_BLOCK_BYTES, FRAME_EXTENTS_MAX, ChangeKind

DIGEST_BLOCKS: Final = WINDOW_BYTES // DIGEST_BLOCK_BYTES
READ_GAP_BYTES_MAX: Final = 16 * 1024
"""What lies between two marked blocks is read with them if it is no more: one read is cheaper than two."""


@dataclass(slots=True, kw_only=True)
class Receipt:
    """What a frame carries, for sent()."""

    digests: list[tuple[int, bytes]] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)
    """Digest blocks of which no digest can be recorded."""
    sent: list[tuple[int, Mask]] = field(default_factory=list)
    """(window, its blocks)"""

    def __iadd__(self, other: Receipt) -> Receipt:
        self.digests += other.digests
        self.unknown += other.unknown
        self.sent += other.sent
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finding:
    """What one window's comparison found."""

    changes: list[Change]
    receipt: Receipt
    raw_bytes: int


class RoundOwner(Protocol):
    """What a round asks of the source that began it."""

    def is_audit_clean(self) -> bool:
        """Whether the programs saw all that the kernel counted. Raises ResyncNeeded when nobody knows what they
        missed."""
        ...

    def settle(self) -> None:
        """All that was marked at submission up to the last swap was read after it had completed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundBegin:
    """Taken before the swap."""

    counters: Counters
    untracked: int
    """Submissions that were not, up to the swap before: of the generation that ended with this one all have to be."""
    missed_submissions: int
    was_quiet: bool
    instant_ns: int | None
    """The newest tick of the server's clock at that time."""


class BitmapRound:
    """One pass over what is pending behind first_bytes. Implements Round."""

    def __init__(
        self,
        owner: RoundOwner,
        source: SourceDisk,
        digests: DigestFile,
        tracked: FollowedDisk,
        *,
        first_bytes: int,
        begin: RoundBegin,
    ) -> None:
        self.read_bytes = 0
        self._owner = owner
        self._source = source
        self._digests = digests
        self._tracked = tracked
        self._layout = tracked.layout
        self._areas = tracked.areas
        self._begin = begin
        self._taken = bits_like(tracked.unaudited)
        """Areas with a block that this round takes."""
        self._has_unread = bool(tracked.unread.any())
        self._windows = self._layout.marked_windows(tracked.pending, first_bytes=first_bytes).astype(numpy.uint32)
        self._next = 0
        self._compared_to_bytes = first_bytes
        self._is_given_up = False
        self._observed: RoundObservation | None = None

    @property
    def is_exhausted(self) -> bool:
        return self._next >= len(self._windows)

    @property
    def compared_to_bytes(self) -> int:
        return self._layout.size_bytes if self.is_exhausted else self._compared_to_bytes

    def is_still(self) -> bool:
        return not self._is_given_up

    def read(self, window: memoryview, packing: memoryview) -> Sequence[SourceFrame]:
        packer, receipt = FramePacker(), Receipt()
        read_end = self.read_bytes + STEP_BYTES_MAX
        while not self.is_exhausted and self.read_bytes < read_end:
            before = self._compared_to_bytes
            finding = self._compare(window)
            is_dense = finding.raw_bytes > WINDOW_BYTES // 2
            if is_dense or not packer.fits(raw_bytes=finding.raw_bytes, extents=len(finding.changes)):
                frames = [self._frame(packer, receipt, 1, before)] if len(packer) else []
                own = FramePacker()
                for change in finding.changes:
                    own.add(change)
                self._observe_if_exhausted()
                return [*frames, self._frame(own, finding.receipt, 0, self._compared_to_bytes)]
            for change in finding.changes:
                packer.add(moved(change, packing, packer.raw_bytes))
            receipt += finding.receipt
            if not packer.fits(raw_bytes=DIGEST_BLOCK_BYTES, extents=FRAME_EXTENTS_MAX // 4):
                break
        self._observe_if_exhausted()
        return [self._frame(packer, receipt, 1, self._compared_to_bytes)] if len(packer) else []

    def end(self) -> RoundEnd:
        """Raises DiskFault, ResyncNeeded."""
        self._source.check()
        if self._is_given_up:
            return RoundEnd(promise=Promise.COPY_IN_FUZZY, reason="the round was given up")
        seen = self._observed or self._observe()
        reason = why_not_still(seen)
        if is_all_accounted_for(seen):
            self._owner.settle()
        if reason:
            return RoundEnd(promise=Promise.COPY_IN_FUZZY, reason=reason)
        return RoundEnd(promise=Promise.COPY_IN_VALIDATED, reason="", instant_ns=self._begin.instant_ns)

    def abandon(self) -> None:
        self._is_given_up = True

    def _observe_if_exhausted(self) -> None:
        # why: at the last read, not at the end of the round. What is written while the rest is sent, perhaps by the
        # agent itself to its own state on this disk, was not there when the blocks were read.
        if self.is_exhausted:
            self._observed = self._observe()

    def _observe(self) -> RoundObservation:
        before, now = self._begin, self._tracked.counters()
        missed = self._tracked.read_audit().missed_submissions - before.missed_submissions
        return RoundObservation(
            was_quiet=before.was_quiet,
            rewritten_areas=sum(
                self._layout.count_common(self._taken, self._tracked.in_use(kind))
                for kind in (Marks.SUBMISSION, Marks.DISCARDED)
            ),
            foreign_completions=now.foreign - before.counters.foreign,
            untracked_submissions=now.untracked - before.untracked,
            missed_submissions=missed,
            failed_writes=now.failed - before.counters.failed,
            pass_through=now.pass_through - before.counters.pass_through,
            beyond_end=now.beyond_end - before.counters.beyond_end,
            never_completed=now.never_completed - before.counters.never_completed,
            is_audit_clean=self._owner.is_audit_clean(),
        )

    def _compare(self, buffer: memoryview) -> _Finding:
        """Reads what is marked of the next window."""
        window = int(self._windows[self._next])
        first = window * WINDOW_BYTES
        length = min(WINDOW_BYTES, self._layout.size_bytes - first)
        pending = self._layout.mask_of(self._tracked.pending, window)
        unread = pending & self._unread(window) if self._has_unread else None
        # why: before it is read: what is submitted to from the swap on and lies in one of these was perhaps read
        mark_areas(self._areas.window_of(self._taken, window), pending, self._tracked.blocks_per_area)
        marked = pending if unread is None else pending & ~unread
        runs = ranges(marked)
        read = self._read(first, length, runs, buffer)
        self._next += 1
        self._compared_to_bytes = first + length
        receipt, sent = Receipt(), pending
        unchanged = self._sort_out(window, buffer[:length], marked, read, receipt)
        if unchanged is not None:
            self._layout.clear(self._tracked.pending, window, unchanged)
            runs, sent = ranges(marked & ~unchanged), pending & ~unchanged
        whole = {block for block, _ in receipt.digests}
        receipt.unknown += [block for block in self._digest_blocks(window, runs) if block not in whole]
        changes = self._changes(buffer[:length], first, runs)
        if unread is not None and (discarded := ranges(unread)):
            # why: what is read of them may be anything; the history holds zeroes, with which it will be compared
            receipt.digests += [
                (block, self._digests.zero_digest(block)) for block in self._digest_blocks(window, discarded)
            ]
            changes = sorted([*changes, *self._discards(first, discarded)], key=lambda change: change.offset_bytes)
        if changes:
            receipt.sent.append((window, sent))
        return _Finding(changes=changes, receipt=receipt, raw_bytes=sum(change.raw_bytes for change in changes))

    def _unread(self, window: int) -> Mask:
        """The blocks of the window that go out as discarded: of digest blocks that were discarded as a whole."""
        areas = self._areas.mask_of(self._tracked.unread, window).reshape(DIGEST_BLOCKS, -1)
        return areas.all(axis=1).repeat(self._layout.digest_blocks)

    def _read(
        self, first_bytes: int, length_bytes: int, marked: list[tuple[int, int]], buffer: memoryview
    ) -> list[tuple[int, int]]:
        """Reads the marked blocks of a window to their places in the buffer, and what lies between near ones; returns
        the [first, end) bytes of the window that were read."""
        size, read = self._layout.block_bytes, list[tuple[int, int]]()
        for low, high in marked:
            at, end = low * size, min(high * size, length_bytes)
            if read and at - read[-1][1] <= READ_GAP_BYTES_MAX:
                read[-1] = (read[-1][0], end)
            elif at < end:
                read.append((at, end))
        for at, end in read:
            self._source.read_into(first_bytes + at, buffer[at:end])
            self.read_bytes += end - at
        return read

    def _sort_out(
        self, window: int, view: memoryview, marked: Mask, read: list[tuple[int, int]], receipt: Receipt
    ) -> Mask | None:
        """Which of the marked blocks the history holds as they are; None for none. The receipt gets the digests of
        the digest blocks that will be sent as a whole."""
        whole = [
            index
            for at, end in read
            for index in range(-(-at // DIGEST_BLOCK_BYTES), -(-end // DIGEST_BLOCK_BYTES))
            if min((index + 1) * DIGEST_BLOCK_BYTES, len(view)) <= end
        ]
        base = window * DIGEST_BLOCKS
        if not whole:
            return None
        known = self._digests.known(base + whole[0], base + whole[-1] + 1)
        unchanged: Mask = numpy.zeros_like(marked)
        for index in whole:
            block = view[index * DIGEST_BLOCK_BYTES : (index + 1) * DIGEST_BLOCK_BYTES]
            digest = self._digests.zero_digest(base + index) if is_zero(block) else self._digests.digest(block)
            places = slice(index * self._layout.digest_blocks, (index + 1) * self._layout.digest_blocks)
            if digest == known[index - whole[0]]:
                unchanged[places] = marked[places]
            elif marked[places][: -(-len(block) // self._layout.block_bytes)].all():
                receipt.digests.append((base + index, digest))
        return unchanged

    def _digest_blocks(self, window: int, runs: list[tuple[int, int]]) -> list[int]:
        """Those that the blocks of the window touch."""
        base, size = window * DIGEST_BLOCKS, self._layout.digest_blocks
        found = {base + place for low, high in runs for place in range(low // size, (high - 1) // size + 1)}
        return sorted(found)

    def _discards(self, first_bytes: int, discarded: list[tuple[int, int]]) -> list[Change]:
        """Nothing of them is read: what they hold is undefined until it is written."""
        size, end = self._layout.block_bytes, self._layout.size_bytes - first_bytes
        return [
            Change(
                offset_bytes=first_bytes + low * size,
                length_bytes=min(high * size, end) - low * size,
                kind=ChangeKind.DISCARDED,
            )
            for low, high in discarded
        ]

    def _changes(self, view: memoryview, first_bytes: int, marked: list[tuple[int, int]]) -> list[Change]:
        """The marked parts of a window: zeroes are told from data digest block by digest block, or by less."""
        found: list[Change] = []
        for low, high in marked:
            at, end = low * self._layout.block_bytes, min(high * self._layout.block_bytes, len(view))
            while at < end:
                piece_end = min((at // DIGEST_BLOCK_BYTES + 1) * DIGEST_BLOCK_BYTES, end)
                kind = ChangeKind.ZEROES if is_zero(view[at:piece_end]) else ChangeKind.DATA
                start = at
                if found and found[-1].kind is kind and found[-1].end_bytes == first_bytes + at:
                    start = found.pop().offset_bytes - first_bytes
                data = view[start:piece_end] if kind is ChangeKind.DATA else None
                length = piece_end - start
                found.append(Change(offset_bytes=first_bytes + start, length_bytes=length, kind=kind, data=data))
                at = piece_end
        return found

    def _frame(self, packer: FramePacker, receipt: Receipt, buffer_index: int, compared_to: int) -> SourceFrame:
        packed = packer.frame()
        return SourceFrame(
            packed=packed,
            compared_to_bytes=compared_to,
            buffer_index=buffer_index if packed.raw_bytes else None,
            receipt=receipt,
        )


def ranges(mask: Mask) -> list[tuple[int, int]]:
    """[first, end) of the runs of True."""
    places = numpy.flatnonzero(mask).tolist()
    found: list[tuple[int, int]] = []
    for place in places:
        if found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found
