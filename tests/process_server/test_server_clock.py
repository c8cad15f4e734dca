"""The configuration server's clock as process servers know it: early rather than late, never back, restarts or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from process_server.errors import StateUnreadable
from process_server.server_clock import CLOCK_FILE, KEEP_SECONDS, SILENCE_SECONDS, ServerClock, load_clock, save_clock
from process_server.state_file import keep
from runtime.local_directory import LocalDirectory

SECOND_NS = 10**9
HEARD_NS = 1_700_000_000 * SECOND_NS


class HandClock:
    """Time passes by hand."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def now_ns(self) -> int:
        raise AssertionError("this machine's wall clock counts for nothing here")

    def monotonic_seconds(self) -> float:
        return self.seconds


def test_it_is_not_known_before_the_server_was_heard_and_passes_from_then_on() -> None:
    hand = HandClock()
    clock = ServerClock(hand)
    assert clock.instant_ns() is None
    clock.heard(HEARD_NS)
    hand.seconds += 3
    assert clock.instant_ns() == HEARD_NS + 3 * SECOND_NS


def test_it_follows_a_server_whose_clock_was_far_ahead_and_is_right_again() -> None:
    hand = HandClock()
    clock = ServerClock(hand)
    clock.heard(HEARD_NS + 10 * 365 * 86400 * SECOND_NS)
    kept = clock.instant_ns()
    assert kept is not None
    clock.heard(HEARD_NS)
    assert clock.instant_ns() == HEARD_NS

    restarted = ServerClock(hand)
    restarted.resume(kept)
    restarted.heard(HEARD_NS)
    assert restarted.instant_ns() == HEARD_NS


def test_it_never_goes_back_for_an_answer_that_took_longer() -> None:
    hand = HandClock()
    clock = ServerClock(hand)
    clock.heard(HEARD_NS)
    told = clock.instant_ns()
    clock.heard(HEARD_NS - SECOND_NS)
    assert clock.instant_ns() == told


def test_a_restart_without_the_server_goes_on_later_than_anything_told_before_and_never_ahead() -> None:
    hand = HandClock()
    before = ServerClock(hand)
    before.heard(HEARD_NS)
    kept = before.instant_ns()
    hand.seconds += KEEP_SECONDS
    last_told = before.instant_ns()
    assert kept is not None
    assert last_told is not None

    after = ServerClock(hand)
    after.resume(kept)
    assert after.instant_ns() is None
    hand.seconds += SILENCE_SECONDS
    resumed = after.instant_ns()
    assert resumed is not None
    assert last_told < resumed <= HEARD_NS + int((KEEP_SECONDS + SILENCE_SECONDS) * SECOND_NS)


def test_a_restart_that_hears_the_server_does_not_wait_and_does_not_go_back() -> None:
    hand = HandClock()
    clock = ServerClock(hand)
    clock.resume(HEARD_NS)
    clock.heard(HEARD_NS - SECOND_NS)
    assert clock.instant_ns() == HEARD_NS
    clock.heard(HEARD_NS + SECOND_NS)
    assert clock.instant_ns() == HEARD_NS + SECOND_NS


def test_what_was_kept_is_read_again(tmp_path: Path) -> None:
    state = LocalDirectory(tmp_path)
    assert load_clock(state) is None
    save_clock(state, HEARD_NS)
    save_clock(state, HEARD_NS + 1)
    assert load_clock(state) == HEARD_NS + 1


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\xff", b"\xa1x", b"\x01\x02"])
def test_a_file_that_is_no_instant_is_refused(tmp_path: Path, data: bytes) -> None:
    state = LocalDirectory(tmp_path)
    keep(state, CLOCK_FILE, data)
    with pytest.raises(StateUnreadable):
        load_clock(state)
