"""The plan against a naive model: apply every extent in order to a bytearray."""

import time

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import InvalidValue
from protocol.vocabulary import EXTENT_DTYPE, ChangeKind, Extent, extent_table
from recovery.core import rebuild_plan
from recovery.core.rebuild_plan import RebuildPlan, plan_rebuild

DISK_BYTES = 160


@st.composite
def frame_of_extents(draw: st.DrawFn) -> list[Extent]:
    borders = sorted(draw(st.sets(st.integers(0, DISK_BYTES + 20), min_size=2, max_size=10)))
    pairs = list(zip(borders[::2], borders[1::2], strict=False))
    return [
        Extent(offset_bytes=first, length_bytes=end - first, kind=draw(st.sampled_from(ChangeKind)))
        for first, end in pairs
    ]


def raw_data(frame_number: int, extents: list[Extent]) -> bytes:
    size = sum(extent.length_bytes for extent in extents if extent.kind is ChangeKind.DATA)
    return bytes((frame_number * 37 + place) % 251 + 1 for place in range(size))


def applied_in_order(frames: list[list[Extent]]) -> tuple[bytes, set[int]]:
    """The disk, and the frames that still own a byte of it."""
    disk = bytearray(DISK_BYTES + 64)
    owner: list[int | None] = [None] * len(disk)
    for number, extents in enumerate(frames):
        raw, used = raw_data(number, extents), 0
        for extent in extents:
            is_data = extent.kind is ChangeKind.DATA
            new = raw[used : used + extent.length_bytes] if is_data else bytes(extent.length_bytes)
            used += extent.length_bytes if is_data else 0
            disk[extent.offset_bytes : extent.end_bytes] = new
            owner[extent.offset_bytes : extent.end_bytes] = [number if is_data else None] * extent.length_bytes
    return bytes(disk[:DISK_BYTES]), {number for number in owner[:DISK_BYTES] if number is not None}


def planned(frames: list[list[Extent]]) -> RebuildPlan:
    tables = [extent_table(extents) for extents in frames]
    together = numpy.concatenate([numpy.empty(0, dtype=EXTENT_DTYPE), *tables])
    return plan_rebuild(together, numpy.array([len(table) for table in tables]), disk_size_bytes=DISK_BYTES)


def carried_out(plan: RebuildPlan, frames: list[list[Extent]]) -> bytes:
    disk = bytearray(b"\xff" * DISK_BYTES)
    written = bytearray(DISK_BYTES)
    for frame in plan.frame_pieces():
        raw = raw_data(frame.frame, frames[frame.frame])
        for offset, length, source, _ in frame.pieces.tolist():
            disk[offset : offset + length] = raw[source : source + length]
            for place in range(offset, offset + length):
                written[place] += 1
    for first, end in plan.holes():
        disk[first:end] = bytes(end - first)
        for place in range(first, end):
            written[place] += 1
    assert written == b"\x01" * DISK_BYTES, "every byte is written once or is in one hole"
    return bytes(disk)


@pytest.mark.parametrize("window_extents_max", [rebuild_plan.WINDOW_EXTENTS_MAX, 3])
@settings(max_examples=300, deadline=None)
@given(frames=st.lists(frame_of_extents(), max_size=12))
def test_a_plan_makes_the_disk_that_applying_all_extents_in_order_makes(
    window_extents_max: int, frames: list[list[Extent]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebuild_plan, "WINDOW_EXTENTS_MAX", window_extents_max)
        plan = planned(frames)
    disk, owners = applied_in_order(frames)
    assert carried_out(plan, frames) == disk
    assert set(plan.frames.tolist()) == owners, "exactly the frames that own a byte are read"
    assert [frame.frame for frame in plan.frame_pieces()] == sorted(owners)
    assert plan.bytes_to_write == sum(end - first for first, end in plan.data_ranges.tolist())


def test_an_empty_history_is_one_hole() -> None:
    plan = planned([])
    assert list(plan.holes()) == [(0, DISK_BYTES)]
    assert plan.bytes_to_write == 0
    assert list(plan.frame_pieces()) == []


def test_an_overwritten_frame_is_not_read() -> None:
    whole = [Extent(offset_bytes=0, length_bytes=64)]
    plan = planned([whole, whole, whole])
    assert plan.frames.tolist() == [2]


def test_counts_that_do_not_add_up_are_refused() -> None:
    table = extent_table([Extent(offset_bytes=0, length_bytes=64)])
    with pytest.raises(InvalidValue):
        plan_rebuild(table, numpy.array([2]), disk_size_bytes=DISK_BYTES)


def test_a_million_scattered_extents_are_planned_in_seconds() -> None:
    count = 1_000_000
    random = numpy.random.default_rng(7)
    table = numpy.zeros(count, dtype=EXTENT_DTYPE)
    table["offset"] = random.integers(0, 2**28, count, dtype=numpy.uint64) * 4096
    table["length"] = 4096
    started = time.process_time()
    plan = plan_rebuild(table, numpy.full(count, 1), disk_size_bytes=2**40)
    assert time.process_time() - started < 20
    assert plan.bytes_to_write == len(numpy.unique(table["offset"])) * 4096
