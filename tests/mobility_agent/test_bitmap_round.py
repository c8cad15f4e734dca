"""The arithmetic of a round of the bitmap source, without a kernel: whatever is marked, known and discarded on whatever
disk, all of it goes out or is proved to be there already, and nothing is said of what was not seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, cast

import numpy
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from mobility_agent.disk_reader import LocalDisk
from mobility_agent.tracking.bitmap_round import BATCH_WINDOWS_MAX, BitmapRound, Receipt, RoundBegin
from mobility_agent.tracking.block_bits import WINDOW_BYTES, BlockLayout, Mask, Numbers
from mobility_agent.tracking.change_source import SourceFrame
from mobility_agent.tracking.digest_file import DigestFile
from mobility_agent.tracking.followed_disk import Counters, FollowedDisk
from protocol.vocabulary import DIGEST_BLOCK_BYTES, FRAME_EXTENTS_MAX, FRAME_RAW_BYTES_MAX, ChangeKind

SECTOR = 512
SIZES = (4096, 8192, 16384, 32768, 65536)
NOTHING_COUNTED = Counters(**{field.name: 0 for field in fields(Counters)})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A disk; which of its blocks are pending, and which digest blocks were discarded as a whole; which digest blocks
    the history holds as they are, and of which it holds something else."""

    size_bytes: int
    block_bytes: int
    area_bytes: int
    written_pieces: frozenset[int]
    pending: frozenset[int]
    discarded: frozenset[int]
    held: frozenset[int]
    held_otherwise: frozenset[int]
    first_bytes: int
    takes_each: bool

    @property
    def layout(self) -> BlockLayout:
        return BlockLayout(size_bytes=self.size_bytes, block_bytes=self.block_bytes)

    @property
    def areas(self) -> BlockLayout:
        return BlockLayout(size_bytes=self.size_bytes, block_bytes=self.area_bytes)


def bits_of(layout: BlockLayout, marked: set[int]) -> numpy.typing.NDArray[numpy.uint8]:
    mask = numpy.zeros(-(-layout.windows * layout.window_blocks // 4096) * 4096, bool)
    mask[sorted(marked)] = True
    return numpy.packbits(mask, bitorder="little")


def numbers_of(bits: numpy.typing.NDArray[numpy.uint8]) -> set[int]:
    return set(numpy.flatnonzero(numpy.unpackbits(bits, bitorder="little")).tolist())


class Digests:
    """Stands for the digest file."""

    def __init__(self, case: Case, contents: bytes) -> None:
        self._case, self._contents = case, contents

    def digest(self, block: memoryview | bytes) -> bytes:
        return blake3(block).digest(16)

    def zero_digest(self, block: int) -> bytes:
        return self.digest(bytes(len(self._of(block))))

    def right(self, block: int) -> bytes:
        return self.digest(self._of(block))

    def known(self, first: int, end: int) -> list[bytes | None]:
        assert first < end <= -(-self._case.size_bytes // DIGEST_BLOCK_BYTES)
        return [
            self.right(block) if block in self._case.held else bytes(16) if block in self._case.held_otherwise else None
            for block in range(first, end)
        ]

    def _of(self, block: int) -> bytes:
        return self._contents[block * DIGEST_BLOCK_BYTES : (block + 1) * DIGEST_BLOCK_BYTES]


class Disk:
    """Stands for the source; what it does not read is left as garbage in the buffer."""

    def __init__(self, contents: bytes, on_read: Callable[[int, int], None]) -> None:
        self._contents, self._on_read = contents, on_read

    def read_pieces(self, offsets: Numbers, lengths: Numbers, buffer: memoryview) -> None:
        buffer[:] = b"\xaa" * len(buffer)
        at = 0
        for first, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
            assert length > 0
            assert first % SECTOR == length % SECTOR == 0
            self._on_read(first, first + length)
            data = self._contents[first : first + length]
            assert len(data) == length, "behind the end"
            buffer[at : at + length] = data
            at += length
        assert at <= len(buffer)

    def check(self) -> None:
        pass


class Run:
    """A round over the case, checked at each step."""

    def __init__(self, case: Case) -> None:
        self.case = case
        contents = bytearray(case.size_bytes)
        for piece in case.written_pieces:
            if piece * 4096 < case.size_bytes:
                contents[min(piece * 4096 + piece % 4096, case.size_bytes - 1)] = 1 + piece % 255
        self.contents = bytes(contents)
        self.digests = Digests(case, self.contents)
        discarded_areas = {
            area
            for block in case.discarded
            for area in range(
                block * DIGEST_BLOCK_BYTES // case.area_bytes, (block + 1) * DIGEST_BLOCK_BYTES // case.area_bytes
            )
            if area < case.areas.blocks
        }
        per_area = case.area_bytes // case.block_bytes
        pending = set(case.pending) | {
            block for area in discarded_areas for block in range(area * per_area, (area + 1) * per_area)
        }
        self.before = {block for block in pending if block < case.layout.blocks}
        self.pending = bits_of(case.layout, self.before)
        nothing = bits_of(case.areas, set())
        tracked = SimpleNamespace(
            layout=case.layout,
            areas=case.areas,
            pending=self.pending,
            unread=bits_of(case.areas, discarded_areas),
            unaudited=nothing,
            blocks_per_area=per_area,
            counters=lambda: NOTHING_COUNTED,
            read_audit=lambda: SimpleNamespace(missed_submissions=0),
            in_use=lambda _: nothing,
        )
        self.proved: set[int] = set()
        self.round = BitmapRound(
            self,
            cast("LocalDisk", Disk(self.contents, self.check_taken)),
            cast("DigestFile", self.digests),
            cast("FollowedDisk", tracked),
            first_bytes=case.first_bytes,
            begin=RoundBegin(counters=NOTHING_COUNTED, untracked=0, missed_submissions=0, was_quiet=True, instant_ns=1),
        )
        self.sent: set[int] = set()
        self.sent_as_discarded: set[int] = set()
        self.told: set[int] = set()
        self.compared_to_bytes = case.first_bytes // WINDOW_BYTES * WINDOW_BYTES
        self.receipts: list[Receipt] = []

    # RoundOwner

    def is_audit_clean(self) -> bool:
        return True

    def settle(self) -> None:
        pass

    def clear_pending(self, windows: Numbers, masks: Mask) -> None:
        before = numbers_of(self.pending)
        self.case.layout.clear_masks(self.pending, windows, masks)
        self.proved |= before - numbers_of(self.pending)

    # the checks

    def check_taken(self, first: int, end: int) -> None:
        """What is submitted to after the swap, in an area of which something is read, has to show."""
        taken = numbers_of(self.round._taken)
        for block in range(first // self.case.block_bytes, -(-end // self.case.block_bytes)):
            if block in self.before:
                assert block * self.case.block_bytes // self.case.area_bytes in taken

    def all(self) -> None:
        window, packing = (memoryview(bytearray(WINDOW_BYTES)) for _ in range(2))
        while not self.round.is_exhausted:
            for frame in self.round.read(window, packing):
                self.take(frame)
            assert self.round.compared_to_bytes >= self.compared_to_bytes
            self.compared_to_bytes = self.round.compared_to_bytes
        if not self.case.takes_each:
            self.clear(*self.receipts)
        passed_over = {
            block
            for block in self.before
            if block // self.case.layout.window_blocks < self.case.first_bytes // WINDOW_BYTES
        }
        assert numbers_of(self.pending) == passed_over
        assert self.sent | self.proved == self.before - passed_over
        assert not self.sent & self.proved
        for block in self.proved:
            assert block * self.case.block_bytes // DIGEST_BLOCK_BYTES in self.case.held

    def take(self, frame: SourceFrame) -> None:
        table, payload = frame.packed.table, iter(frame.packed.payload)
        assert 0 < len(table) <= FRAME_EXTENTS_MAX
        assert frame.packed.raw_bytes <= FRAME_RAW_BYTES_MAX
        blocks: set[int] = set()
        at = self.compared_to_bytes
        for row in table:
            first, length = int(row["offset"]), int(row["length"])
            assert at <= first < first + length <= self.case.size_bytes
            at = first + length
            self.check_extent(first, at, ChangeKind(row["kind"]), payload)
            blocks |= set(range(first // self.case.block_bytes, -(-at // self.case.block_bytes)))
        assert next(payload, None) is None
        assert at <= frame.compared_to_bytes
        self.compared_to_bytes = frame.compared_to_bytes
        receipt = cast("Receipt", frame.receipt)
        assert blocks == {
            int(window) * self.case.layout.window_blocks + place
            for windows, masks in receipt.sent
            for window, mask in zip(windows, masks, strict=True)
            for place in numpy.flatnonzero(mask).tolist()
        }
        self.sent |= blocks
        self.check_digests(receipt, blocks)
        self.receipts.append(receipt)
        if self.case.takes_each:
            self.clear(receipt)

    def check_extent(self, first: int, end: int, kind: ChangeKind, payload: Any) -> None:
        data = self.contents[first:end]
        match kind:
            case ChangeKind.DATA:
                assert next(payload) == data
            case ChangeKind.ZEROES:
                assert not any(data)
            case ChangeKind.DISCARDED:
                blocks = set(range(first // DIGEST_BLOCK_BYTES, -(-end // DIGEST_BLOCK_BYTES)))
                assert blocks <= self.case.discarded
                self.sent_as_discarded |= blocks

    def check_digests(self, receipt: Receipt, blocks: set[int]) -> None:
        """Of digest blocks that go out as a whole the digest is recorded, of others none counts any more."""
        per_digest = DIGEST_BLOCK_BYTES // self.case.block_bytes
        touched = {block // per_digest for block in blocks}
        recorded = dict(receipt.digests)
        assert len(recorded) == len(receipt.digests)
        assert set(recorded) | set(receipt.unknown) == touched
        assert not set(recorded) & set(receipt.unknown)
        assert not touched & self.told
        self.told |= touched
        for number, digest in recorded.items():
            whole = set(range(number * per_digest, min((number + 1) * per_digest, self.case.layout.blocks)))
            assert whole <= blocks
            is_discarded = number in self.sent_as_discarded
            assert digest == (self.digests.zero_digest(number) if is_discarded else self.digests.right(number))

    def clear(self, *receipts: Receipt) -> None:
        for receipt in receipts:
            for windows, masks in receipt.sent:
                self.case.layout.clear_masks(self.pending, windows, masks)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size_bytes = SECTOR * draw(st.one_of(st.integers(1, 2048 * 6), st.integers(1, 96).map(lambda n: 128 * n)))
    block_bytes = draw(st.sampled_from(SIZES))
    blocks, digest_blocks = -(-size_bytes // block_bytes), -(-size_bytes // DIGEST_BLOCK_BYTES)

    def some(count: int) -> frozenset[int]:
        """None, all, runs, or here and there."""
        kind = draw(st.sampled_from(("none", "few", "runs", "all")))
        if kind == "all":
            return frozenset(range(count))
        found: set[int] = set()
        for _ in range(draw(st.integers(0, 12)) if kind != "none" else 0):
            first = draw(st.integers(0, count - 1))
            found |= set(range(first, min(count, first + (draw(st.integers(1, 80)) if kind == "runs" else 1))))
        return frozenset(found)

    held = some(digest_blocks)
    return Case(
        size_bytes=size_bytes,
        block_bytes=block_bytes,
        area_bytes=draw(st.sampled_from([size for size in SIZES if size >= block_bytes])),
        written_pieces=some(-(-size_bytes // 4096)),
        pending=some(blocks),
        discarded=some(digest_blocks),
        held=held,
        held_otherwise=some(digest_blocks) - held,
        first_bytes=draw(st.sampled_from([0, 0, size_bytes // 2, size_bytes])),
        takes_each=draw(st.booleans()),
    )


@settings(max_examples=300)
@given(cases())
def test_everything_goes_out_or_was_there(case: Case) -> None:
    Run(case).all()


@pytest.mark.parametrize("stride", [0, 37, 256, 300])
@pytest.mark.parametrize("discards", [False, True])
def test_a_disk_of_many_windows(stride: int, discards: bool) -> None:
    """More than are dealt with at once; with discards, as many ranges of each as there can be."""
    windows = 2 * BATCH_WINDOWS_MAX + 3
    size_bytes = windows * WINDOW_BYTES - 3 * SECTOR
    digest_blocks = -(-size_bytes // DIGEST_BLOCK_BYTES)
    run = Run(
        Case(
            size_bytes=size_bytes,
            block_bytes=4096,
            area_bytes=65536,
            written_pieces=frozenset(range(0, windows * 256, 5)),
            pending=frozenset(range(0, windows * 256, max(stride, 37 if discards else 1)))
            if stride > 1
            else frozenset(),
            discarded=frozenset(range(0, digest_blocks, 2)) if discards else frozenset(),
            held=frozenset(),
            held_otherwise=frozenset(),
            first_bytes=0,
            takes_each=True,
        )
    )
    run.all()
    assert bool(run.sent) == (stride > 0 or discards)
