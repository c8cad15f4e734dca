"""Extent sets against sets of numbers, and the map's promise: a marked extent is never in none of the places."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mobility_agent.core import dirty_map
from mobility_agent.core.dirty_map import DirtyMap, SentRecord
from mobility_agent.core.extent_set import ExtentSet
from protocol.errors import InvalidValue
from protocol.vocabulary import DIGEST_BLOCK_BYTES as BLOCK

BLOCKS = 64
SIZE = BLOCKS * BLOCK - 100

ranges = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: (min(pair), max(pair))), max_size=8
)


def members(extents: ExtentSet) -> set[int]:
    return {place for first, end in extents for place in range(first, end)}


@given(ranges, ranges)
def test_extent_sets_behave_like_sets(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    one, other = ExtentSet.of(left), ExtentSet.of(right)
    assert members(one | other) == members(one) | members(other)
    assert members(one - other) == members(one) - members(other)
    assert members(one & other) == members(one) & members(other)
    assert one.total_bytes == len(members(one))
    listed = list(one)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(listed))


@given(ranges, st.integers(1, 5))
def test_a_coarsened_set_is_a_superset_within_its_limit(pieces: list[tuple[int, int]], limit: int) -> None:
    exact = ExtentSet.of(pieces)
    coarse = exact.coarsened(extents_max=limit, granularity_bytes=2, disk_size_bytes=60)
    assert len(coarse) <= limit
    assert members(exact) <= members(coarse)
    assert not coarse or max(members(coarse)) < 60


def blocks(*numbers: int) -> ExtentSet:
    return ExtentSet.of([(number * BLOCK, min((number + 1) * BLOCK, SIZE)) for number in numbers])


class DirtyMapMachine(RuleBasedStateMachine):
    """A model that remembers, per block, the newest sequence that must be committed before it may be forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.map = DirtyMap(disk_size_bytes=SIZE)
        self.sequence = self.durable = self.committed = 0
        self.unsafe: set[int] = set()
        self.taken: set[int] = set()
        self.sent_at: dict[int, set[int]] = {}

    def remembered(self) -> set[int]:
        return {place // BLOCK for place in range(0, SIZE, BLOCK) if members_of_block(self.map, place)}

    @rule(numbers=st.sets(st.integers(0, BLOCKS - 1), min_size=1, max_size=6))
    def mark(self, numbers: set[int]) -> None:
        self.map.mark(blocks(*numbers))
        self.unsafe |= numbers
        self.taken -= numbers

    @rule(numbers=st.sets(st.integers(0, BLOCKS - 1), min_size=1, max_size=6))
    def take(self, numbers: set[int]) -> None:
        self.map.take(blocks(*numbers))
        self.unsafe |= numbers
        self.taken |= numbers

    @precondition(lambda self: self.taken)
    @rule()
    def send(self) -> None:
        self.sequence += 1
        self.map.sent(self.sequence, blocks(*self.taken))
        self.sent_at[self.sequence] = set(self.taken)
        self.taken = set()

    @rule(back=st.integers(0, 3))
    def acknowledge_and_commit(self, back: int) -> None:
        self.durable = max(self.durable, self.sequence - back)
        self.committed = max(self.committed, self.durable - back)
        self.map.committed(self.committed)

    @rule()
    def interrupt(self) -> None:
        lost = self.map.interrupted(self.durable)
        for sequence in [sequence for sequence in self.sent_at if sequence > self.durable]:
            assert self.sent_at.pop(sequence) <= {place // BLOCK for place in members_at_blocks(lost)}
        self.sequence, self.taken = self.durable, set()

    @invariant()
    def nothing_uncommitted_is_forgotten(self) -> None:
        kept = set().union(*(numbers for sequence, numbers in self.sent_at.items() if sequence > self.committed), set())
        must = {number for number in self.unsafe if number in self.taken} | kept
        assert must <= self.remembered()


def members_of_block(tested: DirtyMap, place: int) -> bool:
    return bool(tested.everything() & ExtentSet.of([(place, min(place + BLOCK, SIZE))]))


def members_at_blocks(extents: ExtentSet) -> set[int]:
    return {place for first, end in extents for place in range(first - first % BLOCK, end, BLOCK)}


DirtyMapMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestDirtyMap = DirtyMapMachine.TestCase


def test_what_is_marked_while_it_is_being_read_stays_dirty() -> None:
    tested = DirtyMap(disk_size_bytes=SIZE)
    tested.mark(blocks(3))
    tested.take(blocks(3))
    tested.mark(blocks(3))
    tested.sent(1, blocks(3))
    assert tested.dirty == blocks(3)
    tested.committed(1)
    assert tested.dirty == blocks(3)


def test_an_acknowledged_extent_is_kept_until_it_is_committed() -> None:
    tested = DirtyMap(disk_size_bytes=SIZE)
    tested.take(blocks(1, 2))
    tested.sent(1, blocks(1, 2))
    assert tested.interrupted(durable_sequence=1) == ExtentSet.of()
    assert tested.backlog_bytes == 2 * BLOCK
    assert tested.committed(1)
    assert tested.backlog_bytes == 0


def test_what_an_interrupted_stream_had_in_flight_is_dirty_again() -> None:
    tested = DirtyMap(disk_size_bytes=SIZE)
    for sequence in (1, 2, 3):
        tested.take(blocks(sequence))
        tested.sent(sequence, blocks(sequence))
    tested.take(blocks(9))
    assert tested.interrupted(durable_sequence=1) == blocks(2, 3, 9)
    assert tested.dirty == blocks(2, 3, 9)
    assert [record.last_sequence for record in tested.records] == [1]


def test_the_map_grows_coarser_instead_of_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirty_map, "DIRTY_EXTENTS_MAX", 8)
    monkeypatch.setattr(dirty_map, "SENT_EXTENTS_MAX", 8)
    monkeypatch.setattr(dirty_map, "RECORD_EXTENTS_MAX", 4)
    tested = DirtyMap(disk_size_bytes=SIZE)
    scattered = blocks(*range(0, BLOCKS, 2))
    tested.mark(scattered)
    assert len(tested.dirty) <= 8
    assert scattered - tested.dirty == ExtentSet.of()
    for sequence in range(1, 21):
        tested.take(blocks(3 * sequence))
        tested.sent(sequence, blocks(3 * sequence))
    assert sum(len(record.extents) for record in tested.records) <= 8
    assert blocks(*(3 * sequence for sequence in range(1, 21))) - tested.everything() == ExtentSet.of()
    assert tested.records[-1].last_sequence == 20
    tested.committed(19)
    assert tested.records, "a merged record is committed only when all of it is"


def test_sequences_only_rise() -> None:
    tested = DirtyMap(disk_size_bytes=SIZE)
    tested.sent(2, blocks(1))
    with pytest.raises(InvalidValue):
        tested.sent(2, blocks(2))
    with pytest.raises(InvalidValue):
        tested.restore(SentRecord(first_sequence=1, last_sequence=1, extents=blocks(1)))
