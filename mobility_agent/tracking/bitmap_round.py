"""One round of the bitmap source: reads the marked blocks of one disk, compares them with what the history holds, and
says at its end whether what it read is the disk at one instant.

- A digest is recorded only of a block that was sent or compared as a whole, with nothing newer in it.
- What a round says is the disk at the instant of its swap is what all writes submitted until then made of it, and
  none submitted later: those were marked, and none of them went into a block of the round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy

from mobility_agent.core.change_sets import Change, FramePacker
from mobility_agent.core.write_audit import RoundObservation, why_not_still
from mobility_agent.ports import SourceDisk
from mobility_agent.tracking.block_bits import WINDOW_BYTES, Bits, Mask
from mobility_agent.tracking.change_source import Promise, RoundEnd, SourceFrame
from mobility_agent.tracking.digest_file import DigestFile
from mobility_agent.tracking.followed_disk import Counters, FollowedDisk, Marks
from mobility_agent.tracking.scan import STEP_BYTES_MAX, is_zero, moved
from protocol.vocabulary import DIGEST_BLOCK_BYTES, FRAME_EXTENTS_MAX, ChangeKind

DIGEST_BLOCKS: Final = WINDOW_BYTES // DIGEST_BLOCK_BYTES


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
        unread: Bits,
    ) -> None:
        """unread: the pending blocks that were just discarded: they go out as that."""
        self.read_bytes = 0
        self._owner = owner
        self._source = source
        self._digests = digests
        self._tracked = tracked
        self._layout = tracked.layout
        self._begin = begin
        self._wanted: Bits = tracked.pending.copy()
        self._unread = unread
        self._windows = self._layout.marked_windows(self._wanted, first_bytes=first_bytes).tolist()
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
        if seen.was_quiet and seen.is_audit_clean and not seen.untracked_submissions and not seen.missed_submissions:
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
            rewritten_blocks=sum(
                self._layout.count_common(self._wanted, self._tracked.in_use(kind))
                for kind in (Marks.SUBMISSION, Marks.DISCARDED)
            ),
            foreign_completions=now.foreign - before.counters.foreign,
            untracked_submissions=now.untracked - before.counters.untracked,
            missed_submissions=missed,
            failed_writes=now.failed - before.counters.failed,
            pass_through=now.pass_through - before.counters.pass_through,
            beyond_end=now.beyond_end - before.counters.beyond_end,
            never_completed=now.never_completed - before.counters.never_completed,
            is_audit_clean=self._owner.is_audit_clean(),
        )

    def _compare(self, buffer: memoryview) -> _Finding:
        """Reads what is marked of the next window, in whole digest blocks, and compares those."""
        window = self._windows[self._next]
        first = window * WINDOW_BYTES
        length = min(WINDOW_BYTES, self._layout.size_bytes - first)
        pending = self._layout.mask_of(self._wanted, window)
        marked = pending & ~self._layout.mask_of(self._unread, window)
        touched = _per_digest_block(marked)
        for low, high in _ranges(touched):
            view = buffer[low * DIGEST_BLOCK_BYTES : min(high * DIGEST_BLOCK_BYTES, length)]
            self._source.read_into(first + low * DIGEST_BLOCK_BYTES, view)
            self.read_bytes += len(view)
        self._next += 1
        self._compared_to_bytes = first + length
        # why: looked at after the read: what of it is newer than the swap was marked before it got to the disk.
        newer = self._layout.mask_of(self._tracked.in_use(Marks.SUBMISSION), window)
        newer |= self._layout.mask_of(self._tracked.in_use(Marks.COMPLETION), window)
        newer |= self._layout.mask_of(self._tracked.in_use(Marks.DISCARDED), window)
        known = self._digests.known(
            window * DIGEST_BLOCKS, min((window + 1) * DIGEST_BLOCKS, self._digests.block_count)
        )
        discarded = pending & ~marked
        changes = self._discards(first, discarded)
        receipt = Receipt(unknown=(numpy.flatnonzero(_per_digest_block(discarded)) + window * DIGEST_BLOCKS).tolist())
        unchanged = numpy.zeros_like(marked)
        for index in numpy.flatnonzero(touched).tolist():
            blocks = slice(index * self._layout.digest_blocks, (index + 1) * self._layout.digest_blocks)
            view = buffer[index * DIGEST_BLOCK_BYTES : min((index + 1) * DIGEST_BLOCK_BYTES, length)]
            block = window * DIGEST_BLOCKS + index
            digest = self._digests.zero_digest(block) if is_zero(view) else self._digests.digest(view)
            if digest == known[index]:
                unchanged[blocks] = marked[blocks]
                continue
            changes += self._changes(view, first + index * DIGEST_BLOCK_BYTES, marked[blocks])
            if (newer[blocks] & ~marked[blocks]).any():
                receipt.unknown.append(block)
            elif block not in receipt.unknown:
                receipt.digests.append((block, digest))
        self._layout.clear(self._tracked.pending, window, unchanged)
        changes = _joined(sorted(changes, key=lambda change: change.offset_bytes), buffer, first)
        if changes:
            receipt.sent.append((window, pending & ~unchanged))
        return _Finding(changes=changes, receipt=receipt, raw_bytes=sum(change.raw_bytes for change in changes))

    def _discards(self, first_bytes: int, discarded: Mask) -> list[Change]:
        """Nothing of them is read: what they hold is undefined until it is written."""
        size, end = self._layout.block_bytes, self._layout.size_bytes - first_bytes
        return [
            Change(
                offset_bytes=first_bytes + low * size,
                length_bytes=min(high * size, end) - low * size,
                kind=ChangeKind.DISCARDED,
            )
            for low, high in _ranges(discarded)
        ]

    def _changes(self, view: memoryview, first_bytes: int, marked: Mask) -> list[Change]:
        """The marked parts of one digest block."""
        found = []
        for low, high in _ranges(marked):
            at, end = low * self._layout.block_bytes, min(high * self._layout.block_bytes, len(view))
            if at < end:
                part = view[at:end]
                kind = ChangeKind.ZEROES if is_zero(part) else ChangeKind.DATA
                found.append(Change(offset_bytes=first_bytes + at, length_bytes=end - at, kind=kind))
        return found

    def _frame(self, packer: FramePacker, receipt: Receipt, buffer_index: int, compared_to: int) -> SourceFrame:
        packed = packer.frame()
        return SourceFrame(
            packed=packed,
            compared_to_bytes=compared_to,
            buffer_index=buffer_index if packed.raw_bytes else None,
            receipt=receipt,
        )


def _joined(changes: Sequence[Change], buffer: memoryview, first_bytes: int) -> list[Change]:
    """Neighbours of one kind as one change, with their data."""
    joined: list[Change] = []
    start = 0
    for index in range(1, len(changes) + 1):
        last = changes[index - 1]
        is_break = (
            index == len(changes)
            or changes[index].offset_bytes != last.end_bytes
            or changes[index].kind is not last.kind
        )
        if is_break:
            at, end, kind = changes[start].offset_bytes, last.end_bytes, last.kind
            data = buffer[at - first_bytes : end - first_bytes] if kind is ChangeKind.DATA else None
            joined.append(Change(offset_bytes=at, length_bytes=end - at, kind=kind, data=data))
            start = index
    return joined


def _ranges(mask: Mask) -> list[tuple[int, int]]:
    """[first, end) of the runs of True."""
    edges = numpy.flatnonzero(numpy.diff(numpy.concatenate(([False], mask, [False])).astype(numpy.int8)))
    return list(zip(edges[0::2].tolist(), edges[1::2].tolist(), strict=True))


def _per_digest_block(mask: Mask) -> Mask:
    """Per digest block of a window whether any of its blocks is in the mask."""
    found: Mask = numpy.any(mask.reshape(DIGEST_BLOCKS, -1), axis=1)
    return found
