"""Segments end between change sets, by size, by age, by the size of their index, and never empty."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from process_server.core.segmenting import (
    CHANGE_SET_EXTENTS_MAX,
    CHANGE_SET_SILENCE_SECONDS_MAX,
    SEGMENT_EXTENTS_DUE,
    SEGMENT_FRAMES_DUE,
    SegmentGauge,
    SegmentRules,
)
from storage.segment import SEGMENT_EXTENTS_MAX, SEGMENT_FRAMES_MAX

RULES = SegmentRules(stored_bytes_due=1000, age_seconds_max=5.0)


def take(
    gauge: SegmentGauge, payload_bytes: int = 100, *, is_last: bool = True, now: float = 0.0, extents: int = 1
) -> None:
    gauge.frame_taken(payload_bytes=payload_bytes, extents=extents, is_last=is_last, now_seconds=now)


def test_an_empty_segment_is_never_due() -> None:
    gauge = SegmentGauge(rules=RULES)
    assert not gauge.is_due(1e9)


def test_a_segment_is_due_at_its_age_counted_from_its_first_frame() -> None:
    gauge = SegmentGauge(rules=RULES)
    take(gauge, now=100.0)
    take(gauge, now=104.0)
    assert not gauge.is_due(104.9)
    assert gauge.is_due(105.0)


def test_a_segment_is_due_at_its_stored_size() -> None:
    gauge = SegmentGauge(rules=RULES)
    take(gauge, 5000)
    gauge.frame_sealed(payload_bytes=5000, stored_bytes=999)
    assert not gauge.is_due(0.0)
    take(gauge, 1)
    assert gauge.is_due(0.0)


def test_frames_that_are_not_sealed_yet_count_as_if_they_did_not_shrink() -> None:
    gauge = SegmentGauge(rules=RULES)
    take(gauge, 1000)
    assert gauge.is_due(0.0)
    gauge.frame_sealed(payload_bytes=1000, stored_bytes=300)
    assert not gauge.is_due(0.0)


def test_a_segment_inside_a_change_set_is_never_due() -> None:
    gauge = SegmentGauge(rules=RULES)
    take(gauge)
    take(gauge, 10_000, is_last=False)
    assert not gauge.is_due(1e9)
    take(gauge, 0)
    assert gauge.is_due(0.0)


def test_a_segment_is_due_before_its_index_is_full_and_leaves_room_for_the_largest_change_set() -> None:
    gauge = SegmentGauge(rules=SegmentRules(stored_bytes_due=2**40, age_seconds_max=1e9))
    take(gauge, extents=SEGMENT_EXTENTS_DUE)
    assert gauge.is_due(0.0)
    assert SEGMENT_EXTENTS_DUE + CHANGE_SET_EXTENTS_MAX <= SEGMENT_EXTENTS_MAX
    gauge = SegmentGauge(rules=SegmentRules(stored_bytes_due=2**40, age_seconds_max=1e9))
    for _ in range(SEGMENT_FRAMES_DUE):
        take(gauge)
    assert gauge.is_due(0.0)
    assert SEGMENT_FRAMES_DUE + 65536 <= SEGMENT_FRAMES_MAX


@given(st.lists(st.tuples(st.integers(0, 2000), st.booleans(), st.floats(0, 3)), max_size=60))
def test_cutting_at_every_due_moment_never_splits_a_change_set(frames: list[tuple[int, bool, float]]) -> None:
    now, gauge, whole = 0.0, SegmentGauge(rules=RULES), True
    for payload_bytes, is_last, pause in frames:
        now += pause
        if gauge.is_due(now):
            assert whole
            gauge = SegmentGauge(rules=RULES)
        take(gauge, payload_bytes, is_last=is_last, now=now)
        whole = is_last
        assert gauge.is_inside_change_set is not is_last


def test_a_change_set_is_stalled_when_its_next_frame_does_not_come_and_only_then() -> None:
    gauge = SegmentGauge(rules=RULES)
    assert not gauge.is_stalled(1e9)
    take(gauge, is_last=False, now=100.0)
    take(gauge, is_last=False, now=400.0)
    assert not gauge.is_stalled(400.0 + CHANGE_SET_SILENCE_SECONDS_MAX - 1)
    assert gauge.is_stalled(400.0 + CHANGE_SET_SILENCE_SECONDS_MAX)
    take(gauge, now=500.0)
    assert not gauge.is_stalled(1e9)
