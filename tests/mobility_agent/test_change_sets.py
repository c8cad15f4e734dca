"""Packing: limits of the vocabulary, sorted disjoint tables, and the last writer's win."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobility_agent.core.change_sets import Change, ChangeSetBuilder, FramePacker, last_writer_wins
from protocol.errors import InvalidValue
from protocol.vocabulary import (
    CHANGE_SET_RAW_BYTES_MAX,
    FRAME_EXTENTS_MAX,
    FRAME_RAW_BYTES_MAX,
    ChangeKind,
    check_extent_table,
)

SIZE = 64
changes = st.lists(
    st.tuples(st.integers(0, SIZE - 1), st.integers(1, 20), st.sampled_from(list(ChangeKind)), st.integers(1, 255)),
    max_size=12,
)


def change(offset: int, length: int, kind: ChangeKind, fill: int) -> Change:
    length = min(length, SIZE - offset)
    data = memoryview(bytes([fill]) * length) if kind is ChangeKind.DATA else None
    return Change(offset_bytes=offset, length_bytes=length, kind=kind, data=data)


def applied(parts: list[Change]) -> list[tuple[ChangeKind, int] | None]:
    image: list[tuple[ChangeKind, int] | None] = [None] * SIZE
    for part in parts:
        for place in range(part.offset_bytes, part.end_bytes):
            image[place] = (part.kind, 0 if part.data is None else part.data[place - part.offset_bytes])
    return image


@given(changes)
def test_the_last_writer_wins_and_nothing_overlaps(written: list[tuple[int, int, ChangeKind, int]]) -> None:
    ordered = [change(*one) for one in written]
    resolved = last_writer_wins(ordered)
    assert applied(resolved) == applied(ordered)
    assert all(left.end_bytes <= right.offset_bytes for left, right in itertools.pairwise(resolved))


@given(changes)
def test_a_frame_of_any_changes_obeys_the_rules_of_its_table(written: list[tuple[int, int, ChangeKind, int]]) -> None:
    packer = FramePacker()
    for one in written:
        packer.add(change(*one))
    frame = packer.frame()
    check_extent_table(frame.table, raw_bytes=frame.raw_bytes, disk_size_bytes=SIZE)
    assert sum(len(part) for part in frame.payload) == frame.raw_bytes


def test_a_frame_takes_no_more_than_its_limits() -> None:
    packer = FramePacker()
    full = Change(
        offset_bytes=0,
        length_bytes=FRAME_RAW_BYTES_MAX,
        kind=ChangeKind.DATA,
        data=memoryview(bytes(FRAME_RAW_BYTES_MAX)),
    )
    packer.add(full)
    with pytest.raises(InvalidValue):
        packer.add(change(0, 1, ChangeKind.DATA, 1))
    assert packer.fits(raw_bytes=0, extents=FRAME_EXTENTS_MAX - 1)
    assert not packer.fits(raw_bytes=0, extents=FRAME_EXTENTS_MAX)


def test_a_change_set_is_full_before_another_frame_could_pass_its_target() -> None:
    packer = FramePacker()
    packer.add(
        Change(
            offset_bytes=0,
            length_bytes=FRAME_RAW_BYTES_MAX,
            kind=ChangeKind.DATA,
            data=memoryview(bytes(FRAME_RAW_BYTES_MAX)),
        )
    )
    frame = packer.frame()
    builder = ChangeSetBuilder(sequence=1, raw_bytes_target=4 * FRAME_RAW_BYTES_MAX)
    assert [builder.add(frame) for _ in range(3)] == [0, 1, 2]
    assert not builder.is_full
    builder.add(frame)
    assert builder.is_full
    assert builder.extents() == frame.extents
    with pytest.raises(InvalidValue):
        ChangeSetBuilder(sequence=1, raw_bytes_target=CHANGE_SET_RAW_BYTES_MAX + 1)
