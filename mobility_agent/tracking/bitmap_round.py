"""One round of the bitmap source: reads the marked blocks of one disk, compares them with what the history holds where
it read enough of them, and says at its end whether what it read is the disk at one instant.

- A digest is recorded only of a digest block that was sent as a whole: whatever it held when it was read is what the
  history holds. One of which a part was sent is unknown from then on.
- What a round says is the disk at the instant of its swap is what all writes submitted until then made of it, and
  none submitted later: those were marked, and none of them went into a block of the round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy

from mobility_agent.core.change_sets import Change, FramePacker
from mobility_agent.core.write_audit import RoundObservation, is_all_accounted_for, why_not_still
from mobility_agent.disk_reader import LocalDisk
from mobility_agent.tracking.block_bits import WINDOW_BYTES, Mask, Numbers, bits_like, groups_of
from mobility_agent.tracking.change_source import Promise, RoundEnd, SourceFrame
from mobility_agent.tracking.digest_file import DigestFile
from mobility_agent.tracking.followed_disk import Counters, FollowedDisk, Marks
from mobility_agent.tracking.scan import STEP_BYTES_MAX, is_zero, moved
from protocol.vocabulary import DIGEST_BLOCK_BYTES, FRAME_EXTENTS_MAX, ChangeKind

DIGEST_BLOCKS: Final = WINDOW_BYTES // DIGEST_BLOCK_BYTES
BATCH_WINDOWS_MIN: Final = 16
BATCH_WINDOWS_MAX: Final = 256
"""What is sent of so many fits a frame: besides 1 MiB of data no more than eight discarded ranges of each, for what
goes out as discarded is pending by whole digest blocks."""
READ_GAP_BYTES_MAX: Final = 16 * 1024
"""What lies between two marked blocks is read with them if it is no more: one read is cheaper than two."""


@dataclass(slots=True, kw_only=True)
class Receipt:
    """What a frame carries, for sent()."""

    digests: list[tuple[int, bytes]] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)
    """Digest blocks of which no digest can be recorded."""
    sent: list[tuple[Numbers, Mask]] = field(default_factory=list)
    """(windows, the blocks of each)"""

    def __iadd__(self, other: Receipt) -> Receipt:
        self.digests += other.digests
        self.unknown += other.unknown
        self.sent += other.sent
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Bytes [first, end) of a disk, ascending and disjoint."""

    first: Numbers
    end: Numbers

    @property
    def lengths(self) -> Numbers:
        return self.end - self.first

    @property
    def places(self) -> Numbers:
        """Where each is if they lie one behind the other."""
        lengths = self.lengths
        return numpy.cumsum(lengths) - lengths

    def joined(self, gap_bytes: int) -> Runs:
        """Those of one window with no more than that between them become one."""
        is_begin = (self.first[1:] - self.end[:-1] > gap_bytes) | (
            self.first[1:] // WINDOW_BYTES != self.first[:-1] // WINDOW_BYTES
        )
        begins = numpy.concatenate([[True], is_begin])[: len(self.first)]
        ends = numpy.concatenate([is_begin, [True]])[: len(self.first)]
        return Runs(first=self.first[begins], end=self.end[ends])

    def before(self, end_bytes: int) -> Runs:
        """Those that end there or earlier."""
        count = int(numpy.searchsorted(self.end, end_bytes, side="right"))
        return Runs(first=self.first[:count], end=self.end[:count])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Marked windows that are dealt with together, and their masks, a row each."""

    windows: Numbers
    pending: Mask
    marked: Mask
    """Those of pending that are read; the others go out as discarded."""
    reads: Runs

    @property
    def read_bytes(self) -> int:
        return int(self.reads.lengths.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finding:
    """What the comparison of a batch found."""

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

    def clear_pending(self, windows: Numbers, masks: Mask) -> None:
        """The history holds these blocks as they were read, or a change set carries them."""
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
        source: LocalDisk,
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
        self._batch_windows = BATCH_WINDOWS_MIN
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
        """Reads what is marked of the next windows, one piece behind the other into the buffer, all at once."""
        batch = self._next_batch(len(buffer))
        layout = self._layout
        # why: before it is read: what is submitted to from the swap on and lies in one of these was perhaps read
        self._areas.mark_masks(self._taken, batch.windows, groups_of(batch.pending, self._tracked.blocks_per_area))
        self._source.read_pieces(batch.reads.first, batch.reads.lengths, buffer)
        self.read_bytes += batch.read_bytes
        self._next += len(batch.windows)
        self._compared_to_bytes = min((int(batch.windows[-1]) + 1) * WINDOW_BYTES, layout.size_bytes)
        receipt, marked, sent = Receipt(), batch.marked, batch.pending
        unchanged = self._sort_out(batch, buffer, receipt)
        if unchanged is not None:
            self._owner.clear_pending(batch.windows, unchanged)
            marked, sent = marked & ~unchanged, sent & ~unchanged
        runs = self._runs(batch.windows, marked)
        receipt.unknown = numpy.setdiff1d(
            self._digest_blocks(batch.windows, marked),
            numpy.array([block for block, _ in receipt.digests], numpy.int64),
        ).tolist()
        changes = list(self._changes(buffer, runs, batch.reads))
        unread = batch.pending & ~batch.marked
        if self._has_unread and unread.any():
            # why: what is read of them may be anything; the history holds zeroes, with which it will be compared
            receipt.digests += [
                (block, self._digests.zero_digest(block))
                for block in self._digest_blocks(batch.windows, unread).tolist()
            ]
            changes += self._discards(self._runs(batch.windows, unread))
            changes.sort(key=lambda change: change.offset_bytes)
        if changes:
            receipt.sent.append((batch.windows, sent))
        return _Finding(changes=changes, receipt=receipt, raw_bytes=sum(change.raw_bytes for change in changes))

    def _next_batch(self, buffer_bytes: int) -> _Batch:
        """As many windows, at least one, as there is room for what is read of them."""
        windows = self._windows[self._next : self._next + self._batch_windows].astype(numpy.int64)
        pending = self._layout.masks_of(self._tracked.pending, windows)
        marked = pending & ~self._unread(windows) if self._has_unread else pending
        reads = self._runs(windows, marked).joined(READ_GAP_BYTES_MAX)
        room = numpy.searchsorted(numpy.cumsum(reads.lengths), buffer_bytes, side="right")
        if room < len(reads.first):
            count = max(1, int(numpy.searchsorted(windows, reads.first[room] // WINDOW_BYTES)))
            windows, pending, marked = windows[:count], pending[:count], marked[:count]
            reads = reads.before(int(windows[-1] + 1) * WINDOW_BYTES)
        # why: where much is marked hardly more is looked at than is taken
        self._batch_windows = min(2 * len(windows), BATCH_WINDOWS_MAX)
        return _Batch(windows=windows, pending=pending, marked=marked, reads=reads)

    def _unread(self, windows: Numbers) -> Mask:
        """The blocks of these windows that go out as discarded: of digest blocks that were discarded as a whole."""
        areas = self._areas.masks_of(self._tracked.unread, windows).reshape(len(windows), DIGEST_BLOCKS, -1)
        return areas.all(axis=2).repeat(self._layout.digest_blocks, axis=1)

    def _runs(self, windows: Numbers, masks: Mask) -> Runs:
        """Of the blocks that the masks name, up to the disk's end; none goes from one window into the next."""
        size = self._layout.block_bytes
        none = numpy.int8(0)
        edges = numpy.diff(masks.view(numpy.int8), axis=1, prepend=none, append=none)
        rows, places = numpy.nonzero(edges > 0)
        _, ends = numpy.nonzero(edges < 0)
        first, end = windows[rows] * WINDOW_BYTES + places * size, windows[rows] * WINDOW_BYTES + ends * size
        within = first < self._layout.size_bytes
        return Runs(first=first[within], end=numpy.minimum(end[within], self._layout.size_bytes))

    def _sort_out(self, batch: _Batch, buffer: memoryview, receipt: Receipt) -> Mask | None:
        """Which of the marked blocks the history holds as they are; None for none. The receipt gets the digests of
        the digest blocks that will be sent as a whole."""
        unchanged: Mask | None = None
        reads, size = batch.reads, self._layout.digest_blocks
        low = -(-reads.first // DIGEST_BLOCK_BYTES)
        # why: the last one of the disk may be short
        high = numpy.where(
            reads.end == self._layout.size_bytes, -(-reads.end // DIGEST_BLOCK_BYTES), reads.end // DIGEST_BLOCK_BYTES
        )
        places = reads.places
        for number in numpy.flatnonzero(low < high).tolist():
            first, end = int(low[number]), int(high[number])
            row = int(numpy.searchsorted(batch.windows, first // DIGEST_BLOCKS))
            at = int(places[number] - reads.first[number])
            for index, known in zip(range(first, end), self._digests.known(first, end), strict=True):
                begin = at + index * DIGEST_BLOCK_BYTES
                block = buffer[begin : min(begin + DIGEST_BLOCK_BYTES, at + int(reads.end[number]))]
                digest = self._digests.zero_digest(index) if is_zero(block) else self._digests.digest(block)
                columns = slice(index % DIGEST_BLOCKS * size, (index % DIGEST_BLOCKS + 1) * size)
                marked = batch.marked[row, columns]
                if digest == known:
                    if unchanged is None:
                        unchanged = numpy.zeros_like(batch.marked)
                    unchanged[row, columns] = marked
                elif marked[: -(-len(block) // self._layout.block_bytes)].all():
                    receipt.digests.append((index, digest))
        return unchanged

    def _digest_blocks(self, windows: Numbers, masks: Mask) -> Numbers:
        """Those that the blocks touch which the masks name, ascending."""
        rows, places = numpy.nonzero(groups_of(masks, self._layout.digest_blocks))
        return windows[rows] * DIGEST_BLOCKS + places

    def _discards(self, discarded: Runs) -> list[Change]:
        """Nothing of them is read: what they hold is undefined until it is written."""
        return [
            Change(offset_bytes=first, length_bytes=end - first, kind=ChangeKind.DISCARDED)
            for first, end in zip(discarded.first.tolist(), discarded.end.tolist(), strict=True)
        ]

    def _changes(self, buffer: memoryview, marked: Runs, reads: Runs) -> Iterator[Change]:
        """What was read of the marked blocks: zeroes are told from data digest block by digest block, or by less."""
        number = numpy.searchsorted(reads.first, marked.first, side="right") - 1
        places = reads.places[number] + marked.first - reads.first[number]
        for first, end, place in zip(marked.first.tolist(), marked.end.tolist(), places.tolist(), strict=True):
            shift, start, at = place - first, first, first
            kind: ChangeKind | None = None
            while at < end:
                piece_end = min((at // DIGEST_BLOCK_BYTES + 1) * DIGEST_BLOCK_BYTES, end)
                is_empty = is_zero(buffer[at + shift : piece_end + shift])
                found = ChangeKind.ZEROES if is_empty else ChangeKind.DATA
                if kind is not None and found is not kind:
                    yield _change(buffer, start, at, shift, kind)
                    start = at
                kind, at = found, piece_end
            if kind is not None:
                yield _change(buffer, start, end, shift, kind)

    def _frame(self, packer: FramePacker, receipt: Receipt, buffer_index: int, compared_to: int) -> SourceFrame:
        packed = packer.frame()
        return SourceFrame(
            packed=packed,
            compared_to_bytes=compared_to,
            buffer_index=buffer_index if packed.raw_bytes else None,
            receipt=receipt,
        )


def _change(buffer: memoryview, first: int, end: int, shift: int, kind: ChangeKind) -> Change:
    """Of the bytes [first, end) of the disk, which are `shift` further on in the buffer."""
    data = buffer[first + shift : end + shift] if kind is ChangeKind.DATA else None
    return Change(offset_bytes=first, length_bytes=end - first, kind=kind, data=data)
