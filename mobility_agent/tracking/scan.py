"""Finds changes without help from the kernel: reads everything, compares keyed digests, yields what differs.

The data that is sent is the very read that was digested. Complete if the disk was proved still, fuzzy otherwise.
Holes and blocks of zeroes cost a digest look-up and nothing else; where nothing was ever sent they are not sent either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from mobility_agent.core.change_sets import Change, FramePacker
from mobility_agent.core.dirty_map import SentRecord
from mobility_agent.core.extent_set import ExtentSet
from mobility_agent.errors import AgentStateDamaged, NotProvedStill
from mobility_agent.ports import DrawRandom, SourceDisk, StillnessProof
from mobility_agent.tracking.change_source import Promise, ReadTick, RoundEnd, SourceFrame, no_tick
from mobility_agent.tracking.digest_file import KEY_BYTES, DigestFile
from protocol.vocabulary import (
    DIGEST_BLOCK_BYTES,
    FRAME_EXTENTS_MAX,
    FRAME_RAW_BYTES_MAX,
    SEQUENCE_MAX,
    ChangeKind,
    DiskId,
)
from runtime.directory import DurableDirectory

WINDOW_BYTES: Final = FRAME_RAW_BYTES_MAX
STEP_BYTES_MAX: Final = 16 * WINDOW_BYTES
"""Read per call at most, so that a stop or a broken proof is noticed soon."""
COVERED_BYTES_MAX: Final = 2**40
"""Covered per call at most, holes included, for the same reason: they cost a look into the digests."""
ZERO_RUN_BLOCKS_MAX: Final = FRAME_EXTENTS_MAX
"""Blocks of zeroes that one frame may tell of: bounds the receipt, and keeps every extent below its limit."""
WINDOW_BLOCKS: Final = WINDOW_BYTES // DIGEST_BLOCK_BYTES
ZEROES: Final = bytearray(WINDOW_BYTES)

Receipt = list[tuple[int, bytes]]
"""(block, digest) of what a frame carries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finding:
    """What one window's comparison found."""

    changes: list[Change]
    digests: Receipt
    raw_bytes: int


class ScanSource:
    """The digests of one disk, and rounds over it. Implements ChangeSource."""

    name: Final = "scan"
    freezable_device: Final = None
    follow_ups_max: Final = 0
    alarms: Final = 0

    def __init__(
        self,
        *,
        disk: DiskId,
        source: SourceDisk,
        directory: DurableDirectory,
        draw_random: DrawRandom,
        reason: str = "",
    ) -> None:
        self.reason = reason
        self._disk = disk
        self._source = source
        self._directory = directory
        self._draw_random = draw_random
        self._digests: DigestFile | None = None

    @property
    def digests(self) -> DigestFile:
        if self._digests is None:
            raise AgentStateDamaged(name=self._disk, reason="no epoch has been entered")
        return self._digests

    def restore(self, epoch: int, records: Sequence[SentRecord], *, sent_sequence: int = SEQUENCE_MAX) -> bool:
        """Takes up the epoch's file after a restart. records: all that the ledger holds; entries that are older than
        a record over the same block were lost and are forgotten. Returns False when nothing usable is there, or when
        an entry is of a later change set than sent_sequence, the ledger's newest: the ledger has lost its end."""
        self._remove_files(except_epoch=epoch)
        try:
            digests = DigestFile.open(
                self._directory,
                self._file_name(epoch),
                disk=self._disk,
                size_bytes=self._source.size_bytes,
            )
        except (FileNotFoundError, AgentStateDamaged):
            return False
        if digests.holds_later_than(sent_sequence):
            digests.close()
            return False
        for record in records:
            digests.forget_older(record.extents, record.last_sequence)
        digests.synchronize()
        self._digests = digests
        return True

    def enter_epoch(self, epoch: int, *, parent_sequence: int | None, is_base_empty: bool) -> None:
        name = self._file_name(epoch)
        old = self._digests
        if old is not None and parent_sequence is not None:
            new = old.next_epoch(self._directory, name, disk=self._disk, epoch=epoch, parent_sequence=parent_sequence)
        else:
            new = DigestFile.create(
                self._directory,
                name,
                disk=self._disk,
                size_bytes=self._source.size_bytes,
                epoch=epoch,
                base_is_empty=is_base_empty,
                key=self._draw_random(KEY_BYTES) if old is None else old.key,
            )
        if old is not None:
            old.close()
        self._digests = new

    def begin_round(self, *, first_bytes: int, read_tick: ReadTick = no_tick, is_held: bool = False) -> ScanRound:
        self._source.check()
        return ScanRound(self._source, self.digests, first_bytes=first_bytes, read_tick=read_tick)

    def sent(self, sequence: int, receipts: Sequence[Receipt]) -> None:
        self.digests.write(sequence, (entry for receipt in receipts for entry in receipt))

    def acknowledged(self, sequence: int) -> None:
        """It makes no difference here."""

    def forget(self, extents: ExtentSet) -> None:
        if extents and self._digests is not None:
            self._digests.forget(extents)
            self._digests.synchronize()

    def synchronize(self) -> None:
        self.digests.synchronize()

    def remove_other_epochs(self) -> None:
        """Once the ledger names the new epoch: the files of the others go."""
        self._remove_files(except_epoch=self.digests.epoch)

    def close(self) -> None:
        if self._digests is not None:
            self._digests.close()
            self._digests = None

    def _file_name(self, epoch: int) -> str:
        return f"{self._disk}.{epoch}.digests"

    def _remove_files(self, *, except_epoch: int) -> None:
        for name in self._directory.names():
            is_digests = name.startswith(f"{self._disk}.") and name.endswith(".digests")
            if is_digests and name != self._file_name(except_epoch):
                self._directory.remove(name)


class ScanOnly:
    """Implements Tracking for machines on which nothing is tracked."""

    def open(
        self, disk: DiskId, path: str, source: SourceDisk, *, directory: DurableDirectory, draw_random: DrawRandom
    ) -> ScanSource:
        reason = "this agent tracks no disks"
        return ScanSource(disk=disk, source=source, directory=directory, draw_random=draw_random, reason=reason)

    def forget(self, disk: DiskId) -> None:
        """There is nothing to forget."""


class ScanRound:
    """One pass over [first_bytes, size). Implements Round."""

    def __init__(
        self, source: SourceDisk, digests: DigestFile, *, first_bytes: int, read_tick: ReadTick = no_tick
    ) -> None:
        self._read_tick = read_tick
        self._source = source
        self._digests = digests
        self._at = first_bytes // DIGEST_BLOCK_BYTES * DIGEST_BLOCK_BYTES
        self._size_bytes = source.size_bytes
        self.read_bytes = 0
        self._reason = ""
        self._proof: StillnessProof | None = None
        try:
            self._proof = source.begin_stillness()
        except NotProvedStill as error:
            self._reason = str(error.fields["reason"])
        self._data = source.data_ranges(self._at, self._size_bytes)
        self._next_data: tuple[int, int] | None = next(self._data, None)

    @property
    def is_exhausted(self) -> bool:
        return self._at >= self._size_bytes

    @property
    def compared_to_bytes(self) -> int:
        return min(self._at, self._size_bytes)

    def is_still(self) -> bool:
        if self._proof is None:
            return False
        if not self._proof.holds():
            self._break("somebody opened the disk for writing, or wrote to it")
        return self._proof is not None

    def read(self, window: memoryview, packing: memoryview) -> Sequence[SourceFrame]:
        packer = FramePacker()
        digests: Receipt = []
        read_end, end = self.read_bytes + STEP_BYTES_MAX, self._at + COVERED_BYTES_MAX
        while not self.is_exhausted and self.read_bytes < read_end and self._at < end:
            before = self._at
            in_hole = self._next_data is None or self._next_data[0] >= self._window_end
            finding = self._compare_hole() if in_hole else self._compare_window(window)
            self.is_still()
            extents = len(finding.changes)
            is_dense = finding.raw_bytes > WINDOW_BYTES // 2
            if is_dense or not packer.fits(raw_bytes=finding.raw_bytes, extents=extents):
                frames = [self._frame(packer, digests, 1, before)] if len(packer) else []
                own = FramePacker()
                for change in finding.changes:
                    own.add(change)
                return [*frames, self._frame(own, finding.digests, 0, self._at)]
            for change in finding.changes:
                packer.add(moved(change, packing, packer.raw_bytes))
            digests += finding.digests
            is_full = not packer.fits(raw_bytes=DIGEST_BLOCK_BYTES, extents=WINDOW_BLOCKS)
            if is_full or len(digests) >= ZERO_RUN_BLOCKS_MAX:
                break
        return [self._frame(packer, digests, 1, self._at)] if len(packer) else []

    def end(self) -> RoundEnd:
        instant_ns = self._read_tick()
        proof, self._proof = self._proof, None
        if proof is not None and not proof.end():
            self._reason = "somebody opened the disk for writing, or wrote to it"
            proof = None
        self._source.check()
        promise = Promise.COPY_IN_FUZZY if proof is None else Promise.COPY_IN_VALIDATED
        return RoundEnd(promise=promise, reason=self._reason, instant_ns=instant_ns)

    def abandon(self) -> None:
        self._break("the round was given up")

    def _break(self, reason: str) -> None:
        proof, self._proof = self._proof, None
        if proof is not None:
            self._reason = reason
            proof.end()

    @property
    def _window_end(self) -> int:
        return min((self._at // WINDOW_BYTES + 1) * WINDOW_BYTES, self._size_bytes)

    def _compare_window(self, window: memoryview) -> _Finding:
        """Reads up to the next window boundary and compares it block by block."""
        first, end = self._at, self._window_end
        view = window[: end - first]
        self._source.read_into(first, view)
        self.read_bytes += len(view)
        self._at = end
        while self._next_data is not None and self._next_data[1] <= end:
            self._next_data = next(self._data, None)
        first_block = first // DIGEST_BLOCK_BYTES
        known = self._digests.known(first_block, -(-end // DIGEST_BLOCK_BYTES))
        found: list[tuple[int, ChangeKind]] = []
        digests: Receipt = []
        all_zero = is_zero(view)
        for index, expected in enumerate(known):
            block = view[index * DIGEST_BLOCK_BYTES : (index + 1) * DIGEST_BLOCK_BYTES]
            is_empty = all_zero or is_zero(block)
            digest = self._digests.zero_digest(first_block + index) if is_empty else self._digests.digest(block)
            if digest != expected:
                found.append((index, ChangeKind.ZEROES if is_empty else ChangeKind.DATA))
                digests.append((first_block + index, digest))
        changes = [
            Change(
                offset_bytes=first + low * DIGEST_BLOCK_BYTES,
                length_bytes=min(high * DIGEST_BLOCK_BYTES, len(view)) - low * DIGEST_BLOCK_BYTES,
                kind=kind,
                data=view[low * DIGEST_BLOCK_BYTES : high * DIGEST_BLOCK_BYTES] if kind is ChangeKind.DATA else None,
            )
            for low, high, kind in runs(found)
        ]
        return _Finding(changes=changes, digests=digests, raw_bytes=sum(change.raw_bytes for change in changes))

    def _compare_hole(self) -> _Finding:
        """Everything up to the next data reads as zeroes: what the history holds otherwise is zeroed."""
        hole_end = self._size_bytes if self._next_data is None else self._next_data[0] // WINDOW_BYTES * WINDOW_BYTES
        end = min(hole_end, self._at + COVERED_BYTES_MAX)
        first_block, end_block = self._at // DIGEST_BLOCK_BYTES, -(-end // DIGEST_BLOCK_BYTES)
        blocks: list[tuple[int, ChangeKind]] = []
        digests: Receipt = []
        for block in self._digests.not_known_zero(first_block, end_block):
            blocks.append((block, ChangeKind.ZEROES))
            digests.append((block, self._digests.zero_digest(block)))
            if len(blocks) >= ZERO_RUN_BLOCKS_MAX:
                end = min((block + 1) * DIGEST_BLOCK_BYTES, end)
                break
        self._at = end
        changes = [
            Change(
                offset_bytes=low * DIGEST_BLOCK_BYTES,
                length_bytes=min(high * DIGEST_BLOCK_BYTES, self._size_bytes) - low * DIGEST_BLOCK_BYTES,
                kind=kind,
            )
            for low, high, kind in runs(blocks)
        ]
        return _Finding(changes=changes, digests=digests, raw_bytes=0)

    def _frame(self, packer: FramePacker, digests: Receipt, buffer_index: int, compared_to: int) -> SourceFrame:
        packed = packer.frame()
        return SourceFrame(
            packed=packed,
            compared_to_bytes=min(compared_to, self._size_bytes),
            buffer_index=buffer_index if packed.raw_bytes else None,
            receipt=digests,
        )


def is_zero(view: memoryview) -> bool:
    """Of at most WINDOW_BYTES."""
    # why: bytearray == memoryview with the bytearray on the left is the fastest zero test there is.
    zeroes = ZEROES if len(view) == len(ZEROES) else ZEROES[: len(view)]
    return zeroes == view


def moved(change: Change, packing: memoryview, at: int) -> Change:
    """The change with its data copied into the packing buffer at `at`."""
    if change.data is None:
        return change
    target = packing[at : at + change.length_bytes]
    target[:] = change.data
    return Change(offset_bytes=change.offset_bytes, length_bytes=change.length_bytes, kind=change.kind, data=target)


def runs(found: Sequence[tuple[int, ChangeKind]]) -> Iterator[tuple[int, int, ChangeKind]]:
    """(first, end, kind) of neighbours of one kind."""
    start = 0
    for index in range(1, len(found) + 1):
        is_break = (
            index == len(found) or found[index][0] != found[index - 1][0] + 1 or found[index][1] is not found[start][1]
        )
        if is_break:
            yield found[start][0], found[index - 1][0] + 1, found[start][1]
            start = index
