"""What `latest`, an identifier and an instant mean."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.vocabulary import Consistency, DiskId, PointId, Position
from recovery.core.instants import instant_text, parse_instant
from recovery.core.point_choice import choose_point
from recovery.errors import PointAmbiguous, PointNotFound, PointSelectorInvalid
from storage.history import HistoryPoint

DISK = DiskId("d" * 32)
SECOND = 10**9
FIRST_NS = 1_763_600_000 * SECOND


def point(identifier: str, seconds: float, sequence: int) -> HistoryPoint:
    return HistoryPoint(
        point=PointId(identifier.ljust(32, "0")),
        position=Position(epoch=1, sequence=sequence),
        consistency=Consistency.CRASH,
        instant_ns=FIRST_NS + int(seconds * SECOND),
    )


EARLY, MIDDLE, LATE = point("aaaaaaaa1", 0, 1), point("aaaaaaaa2", 60.5, 2), point("bbbbbbbb", 60.5, 3)
POINTS = [LATE, EARLY, MIDDLE]


def test_latest_is_the_newest_position() -> None:
    assert choose_point(POINTS, "latest", disk=DISK) == LATE


def test_latest_is_no_older_point_whose_instant_a_wrong_clock_made_later() -> None:
    """Simulation: the configuration server's clock was ten years ahead for a moment."""
    wrong = point("cccccccc", 10 * 365 * 86400, 4)
    right = point("dddddddd", 120, 5)
    assert choose_point([*POINTS, wrong, right], "latest", disk=DISK) == right
    assert choose_point([*POINTS, wrong, right], instant_text(right.instant_ns), disk=DISK) == right
    assert choose_point([*POINTS, wrong], instant_text(FIRST_NS + 300 * SECOND), disk=DISK) == LATE


def test_a_unique_prefix_is_enough_in_either_case() -> None:
    assert choose_point(POINTS, "BBBBBBBB", disk=DISK) == LATE
    assert choose_point(POINTS, "aaaaaaaa2", disk=DISK) == MIDDLE


def test_a_prefix_of_two_points_is_ambiguous() -> None:
    with pytest.raises(PointAmbiguous, match=EARLY.point):
        choose_point(POINTS, "aaaaaaaa", disk=DISK)


def test_an_instant_means_the_newest_point_at_or_before_it() -> None:
    assert choose_point(POINTS, instant_text(FIRST_NS + 60 * SECOND), disk=DISK) == EARLY
    assert choose_point(POINTS, instant_text(LATE.instant_ns), disk=DISK) == LATE
    assert choose_point(POINTS, "2025-11-20T01:54:20+01:00", disk=DISK) == EARLY


def test_an_instant_before_all_points_names_the_oldest_ones() -> None:
    with pytest.raises(PointNotFound, match=EARLY.point):
        choose_point(POINTS, "2001-01-01T00:00:00Z", disk=DISK)


def test_a_disk_without_points_says_so() -> None:
    with pytest.raises(PointNotFound, match="none at all"):
        choose_point([], "latest", disk=DISK)


def test_an_unknown_identifier_names_the_newest_ones() -> None:
    with pytest.raises(PointNotFound, match=LATE.point):
        choose_point(POINTS, "cccccccc", disk=DISK)


@pytest.mark.parametrize(
    "selector", ["aaaaaaa", "newest", "2025-11-20", "2025-11-20T01:00:00", "", "2025-13-20T01:00:00Z"]
)
def test_what_is_no_selector_is_refused(selector: str) -> None:
    with pytest.raises(PointSelectorInvalid):
        choose_point(POINTS, selector, disk=DISK)


@given(st.integers(0, 2**63 - 1))
def test_an_instant_that_is_printed_can_be_typed_in(instant_ns: int) -> None:
    assert parse_instant(instant_text(instant_ns)) == instant_ns
