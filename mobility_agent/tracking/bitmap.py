"""Finds changes by what the kernel marked: reads the marked blocks, and settles what was provably not written
meanwhile.

- A block leaves what is pending only when the ledger holds the change set that carries it, or the history was found to
  hold it already.
- A digest is recorded only of a block that was sent or compared as a whole, with nothing newer in it.
- What a round says is the disk at the instant of its swap is what all writes submitted until then made of it, and
  none submitted later: those were marked, and none of them went into a block of the round.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy
import structlog

from mobility_agent.core.change_sets import Change, FramePacker
from mobility_agent.core.dirty_map import SentRecord
from mobility_agent.core.extent_set import ExtentSet
from mobility_agent.core.write_audit import AuditBase, AuditFinding, RoundObservation, judge_audit, why_not_still
from mobility_agent.disk_reader import LocalDisk
from mobility_agent.errors import ResyncNeeded
from mobility_agent.ports import DrawRandom, SourceDisk
from mobility_agent.tracking.block_bits import WINDOW_BYTES, Bits, Mask
from mobility_agent.tracking.change_source import Promise, RoundEnd, SourceFrame
from mobility_agent.tracking.digest_file import DigestFile
from mobility_agent.tracking.followed_disk import Counters, FollowedDisk, Marks
from mobility_agent.tracking.scan import STEP_BYTES_MAX, ScanSource, is_zero, moved
from protocol.vocabulary import DIGEST_BLOCK_BYTES, FRAME_EXTENTS_MAX, SEQUENCE_MAX, ChangeKind, DiskId
from runtime.directory import DurableDirectory

QUIET_SECONDS_MAX: Final = 0.5
"""A round waits so long for writes that were under way when it began; without them it is fuzzy, and read again."""
IDLE_SECONDS_MAX: Final = 2.0
"""After an alarm of the audit: for a moment with nothing in flight, at which the counts can be compared exactly."""
LEAK_SECONDS: Final = 60.0
"""A change in flight for so long, while the kernel counts none, has completed without being seen."""
DIGEST_BLOCKS: Final = WINDOW_BYTES // DIGEST_BLOCK_BYTES

log = structlog.get_logger(__name__)


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


class BitmapSource:
    """One followed disk. Implements ChangeSource; also raises OSError when the kernel refuses to tell."""

    name: Final = "bitmap"
    reason: Final = ""
    follow_ups_max: Final = 3

    def __init__(
        self,
        *,
        disk: DiskId,
        source: LocalDisk,
        directory: DurableDirectory,
        draw_random: DrawRandom,
        follow: Callable[[], tuple[FollowedDisk, str]],
    ) -> None:
        """follow: the disk's maps, and why its tracking began anew (KernelTracker.follow)."""
        self._alarms = 0
        self._disk = disk
        self._source = source
        self._known = ScanSource(disk=disk, source=source, directory=directory, draw_random=draw_random)
        self._tracked, self._began_because = follow()
        self._lost_because = ""
        self._suspects: dict[tuple[bytes, tuple[int, int, int]], float] = {}
        self._pending_lock = threading.Lock()
        """What was sent leaves what is pending in one thread while another may be marking."""

    @property
    def alarms(self) -> int:
        return self._alarms

    def restore(self, epoch: int, records: Sequence[SentRecord], *, sent_sequence: int = SEQUENCE_MAX) -> bool:
        is_known = self._known.restore(epoch, records, sent_sequence=sent_sequence)
        if is_known and self._began_because:
            self._lost_because = self._began_because
        return is_known

    def enter_epoch(self, epoch: int, *, parent_sequence: int | None, is_base_empty: bool) -> None:
        if parent_sequence is None:
            self._tracked.layout.mark_all(self._tracked.pending)
        self._known.enter_epoch(epoch, parent_sequence=parent_sequence, is_base_empty=is_base_empty)
        self._lost_because = ""

    def begin_round(self, *, first_bytes: int) -> BitmapRound:
        self._source.check()
        if self._lost_because:
            raise ResyncNeeded(cause=self._lost_because)
        before = self._tracked.counters()
        misses_before = self._tracked.read_audit().missed_submissions
        # why: a read past the page cache writes back what is dirty there; before the swap that disturbs no round. Where
        # the agent's own state is on the disk, some of it is dirty again after every round.
        self._source.write_back()
        facts = self._tracked.facts
        if facts.is_unsettled:
            self._tracked.pending[:] |= self._tracked.unaudited
        facts.is_unsettled = 1
        self._tracked.write_facts()
        older = self._tracked.pending.copy()
        is_older_quiet = self._tracked.wait_for_older(seconds_max=QUIET_SECONDS_MAX)
        parity = self._tracked.swap()
        self._check_counters(before)
        self._audit()
        was_quiet = is_older_quiet and self._tracked.wait_until_quiet(parity, seconds_max=QUIET_SECONDS_MAX)
        if not was_quiet:
            self._give_up_leaks()
        return BitmapRound(
            self,
            self._source,
            self._known.digests,
            self._tracked,
            first_bytes=first_bytes,
            begin=_Begin(counters=before, missed_submissions=misses_before, was_quiet=was_quiet),
            to_be_read=older | self._tracked.written,
        )

    def sent(self, sequence: int, receipts: Sequence[Receipt]) -> None:
        digests = self._known.digests
        for receipt in receipts:
            if receipt.unknown:
                digests.forget(ExtentSet.of(map(_digest_block, receipt.unknown)))
            digests.write(sequence, receipt.digests)
            with self._pending_lock:
                # why: when track is lost everything is pending, also what frames that are still on their way carry
                if not self._lost_because:
                    for window, mask in receipt.sent:
                        self._tracked.layout.clear(self._tracked.pending, window, mask)

    def forget(self, extents: ExtentSet) -> None:
        self._tracked.layout.mark(self._tracked.pending, extents)
        self._known.forget(extents)

    def synchronize(self) -> None:
        self._known.synchronize()

    def remove_other_epochs(self) -> None:
        self._known.remove_other_epochs()

    def close(self) -> None:
        self._known.close()
        self._tracked.close()

    def is_audit_clean(self) -> bool:
        """Whether the programs saw all that the kernel counted. Raises ResyncNeeded when nobody knows what they
        missed."""
        return self._audit() is AuditFinding.CLEAN

    def settle(self) -> None:
        """All that was marked at submission up to the last swap was read after it had completed."""
        self._tracked.unaudited[:] = 0
        self._tracked.facts.is_unsettled = 0
        self._rebase()
        self._tracked.write_facts()

    def _rebase(self) -> None:
        """Where the kernel does not count all that the programs see (zram: discards), its lead falls; a miss would hide
        in what is left of it."""
        facts, reading = self._tracked.facts, self._tracked.read_audit()
        finding, _ = judge_audit(facts.audit_base, reading)
        is_stable = reading == self._tracked.read_audit() and not self._tracked.kernel_in_flight()
        if finding is AuditFinding.CLEAN and is_stable:
            facts.audit_base = AuditBase.of(reading)

    def _check_counters(self, now: Counters) -> None:
        facts = self._tracked.facts
        causes = (
            (now.pass_through > facts.pass_through, "a command went to the disk past the block layer's addresses"),
            (now.beyond_end > facts.beyond_end, "a write went behind the end of the disk as it was"),
        )
        lost = next((cause for has_happened, cause in causes if has_happened), "")
        self._mark_again(is_all=bool(lost), because=lost, is_needed=now.never_completed > facts.never_completed)
        # why: marked before what was concluded is kept: whoever is killed in between concludes it again
        facts.pass_through, facts.beyond_end = now.pass_through, now.beyond_end
        facts.never_completed = now.never_completed
        self._tracked.write_facts()
        if lost:
            raise ResyncNeeded(cause=lost)

    def _audit(self) -> AuditFinding:
        facts = self._tracked.facts
        finding, base = judge_audit(facts.audit_base, self._tracked.read_audit())
        if finding is AuditFinding.CLEAN:
            return finding
        self._wait_until_idle()
        finding, base = judge_audit(facts.audit_base, self._tracked.read_audit())
        if finding is AuditFinding.CLEAN:
            # why: a driver that takes bios lets the kernel count a write a moment before its completion is traced.
            return finding
        self._alarms += 1
        log.warning("completions were missed", disk=self._disk, finding=finding.value)
        is_lost = finding is AuditFinding.LOST_TRACK
        cause = "writes were missed when they were submitted and when they completed"
        self._mark_again(is_all=is_lost, because=cause if is_lost else "", is_needed=True)
        facts.audit_base = base
        self._tracked.write_facts()
        if is_lost:
            raise ResyncNeeded(cause=cause)
        return finding

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + IDLE_SECONDS_MAX
        while self._tracked.kernel_in_flight() and time.monotonic() < deadline:
            time.sleep(0.001)

    def _give_up_leaks(self) -> None:
        """Changes in flight that never end as far as was seen: their completion was missed. Their blocks are pending
        anyway until a round was quiet."""
        now = time.monotonic()
        found = self._tracked.changes_in_flight()
        self._suspects = {(key, change): self._suspects.get((key, change), now) for key, change in found.items()}
        if self._tracked.kernel_in_flight():
            return
        for (key, change), since in self._suspects.items():
            if now - since > LEAK_SECONDS:
                log.warning("a completion was missed", disk=self._disk, sector=change[0], bytes=change[1])
                self._tracked.forgive(key, change[2])

    def _mark_again(self, *, is_all: bool, because: str, is_needed: bool) -> None:
        """Makes pending again what may have been read too early; everything, if track is lost."""
        with self._pending_lock:
            if is_all:
                self._lost_because = because
                self._tracked.layout.mark_all(self._tracked.pending)
            elif is_needed:
                self._tracked.pending[:] |= self._tracked.unaudited


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begin:
    """Taken before the swap."""

    counters: Counters
    missed_submissions: int
    was_quiet: bool


class BitmapRound:
    """One pass over what is pending behind first_bytes. Implements Round."""

    def __init__(
        self,
        owner: BitmapSource,
        source: SourceDisk,
        digests: DigestFile,
        tracked: FollowedDisk,
        *,
        first_bytes: int,
        begin: _Begin,
        to_be_read: Bits,
    ) -> None:
        """to_be_read: what of the pending blocks was perhaps not just discarded."""
        self.read_bytes = 0
        self._owner = owner
        self._source = source
        self._digests = digests
        self._tracked = tracked
        self._layout = tracked.layout
        self._begin = begin
        self._wanted: Bits = tracked.pending.copy()
        self._to_be_read = to_be_read
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
        return RoundEnd(promise=Promise.COPY_IN_VALIDATED, reason="", is_of_begin=True)

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
            rewritten_blocks=self._layout.count_common(self._wanted, self._tracked.in_use(Marks.SUBMISSION)),
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
        marked = pending & self._layout.mask_of(self._to_be_read, window)
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


def _digest_block(block: int) -> tuple[int, int]:
    return block * DIGEST_BLOCK_BYTES, (block + 1) * DIGEST_BLOCK_BYTES
