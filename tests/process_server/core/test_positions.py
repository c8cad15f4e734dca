"""Positions rise in order and never pass each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from process_server.core.positions import DiskPositions
from process_server.errors import PositionOutOfOrder

SMALL = range(4)


@pytest.mark.parametrize(("received", "durable", "committed"), [(r, d, c) for r in SMALL for d in SMALL for c in SMALL])
def test_only_ordered_positions_exist(received: int, durable: int, committed: int) -> None:
    if committed <= durable <= received:
        DiskPositions(epoch=1, received=received, durable=durable, committed=committed)
    else:
        with pytest.raises(PositionOutOfOrder):
            DiskPositions(epoch=1, received=received, durable=durable, committed=committed)


@pytest.mark.parametrize("sequence", range(7))
def test_only_the_next_change_set_is_received(sequence: int) -> None:
    positions = DiskPositions(epoch=1, received=4, durable=3, committed=2)
    if sequence == 5:
        assert positions.with_received(5).received == 5
    else:
        with pytest.raises(PositionOutOfOrder):
            positions.with_received(sequence)


@pytest.mark.parametrize("sequence", range(7))
def test_durable_neither_falls_nor_passes_what_was_received(sequence: int) -> None:
    positions = DiskPositions(epoch=1, received=4, durable=3, committed=2)
    if sequence in (3, 4):
        assert positions.with_durable(sequence).durable == sequence
    else:
        with pytest.raises(PositionOutOfOrder):
            positions.with_durable(sequence)


@pytest.mark.parametrize("sequence", range(7))
def test_committed_neither_falls_nor_passes_what_is_durable(sequence: int) -> None:
    positions = DiskPositions(epoch=1, received=4, durable=3, committed=2)
    if sequence in (2, 3):
        assert positions.with_committed(sequence).committed == sequence
    else:
        with pytest.raises(PositionOutOfOrder):
            positions.with_committed(sequence)


@given(st.lists(st.tuples(st.sampled_from(["received", "durable", "committed"]), st.integers(0, 8)), max_size=40))
def test_no_script_of_events_brings_positions_out_of_order(script: list[tuple[str, int]]) -> None:
    positions = DiskPositions.at(1, durable=0, committed=0)
    for name, sequence in script:
        before = positions
        try:
            positions = getattr(positions, f"with_{name}")(sequence)
        except PositionOutOfOrder:
            assert positions is before
        assert positions.committed <= positions.durable <= positions.received
        assert positions.durable >= before.durable
        assert positions.committed >= before.committed


def test_what_was_received_and_is_not_durable_is_forgotten_with_its_connection() -> None:
    positions = DiskPositions(epoch=1, received=9, durable=3, committed=2).without_unfinished()
    assert (positions.received, positions.durable, positions.committed) == (3, 3, 2)
