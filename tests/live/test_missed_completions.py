"""Writes whose end no program saw, while everything else goes on: their blocks are read again, whoever takes their bio
next, and whoever looks at it next."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mobility_agent.tracking.change_source import Promise
from mobility_agent.tracking.followed_disk import ChangeInFlight, FollowedDisk
from protocol.vocabulary import DiskId
from tests.live.block_devices import loop_device
from tests.live.conftest import SIZE_BYTES
from tests.live.test_bitmap import BLOCK, COMPLETION, attach, detach
from tests.live.tracked import MIB, TrackedDisk

OTHER = DiskId("e" * 32)
WRITES_MAX = 2000
"""The kernel gives a bio's memory away again soon, though not at once."""
MOMENTS = {
    "between rounds": None,
    "before the swap": (FollowedDisk, "wait_for_older"),
    "within the swap": (FollowedDisk, "_take_discarded"),
    "after the swap": (FollowedDisk, "wait_until_quiet"),
    "before the reading": (FollowedDisk, "take_late"),
}


def write_past_cache(device: Path, offset: int) -> None:
    """One bio, and no flush behind it."""
    descriptor = os.open(device, os.O_WRONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, BLOCK) as block:
            block.write(os.urandom(BLOCK))
            assert os.pwrite(descriptor, block, offset) == BLOCK
    finally:
        os.close(descriptor)


def missed_write(tracked: TrackedDisk, offset: int) -> ChangeInFlight:
    known = tracked.source._tracked.changes_in_flight()
    detach(tracked, *COMPLETION)
    write_past_cache(tracked.device, offset)
    attach(tracked, *COMPLETION)
    (missed,) = tracked.source._tracked.changes_in_flight() - known
    return missed


def write_until_it_comes_again(tracked: TrackedDisk, missed: ChangeInFlight, device: Path) -> None:
    processors = sorted(os.sched_getaffinity(0))
    try:
        for number in range(WRITES_MAX):
            # why: each processor has memory of its own to give away
            os.sched_setaffinity(0, {processors[number // 8 % len(processors)]})
            write_past_cache(device, (16 + number % 8) * MIB)
            if missed not in tracked.source._tracked.changes_in_flight():
                return
    finally:
        os.sched_setaffinity(0, processors)
    pytest.fail(f"no bio came again in {WRITES_MAX} writes")


@pytest.mark.parametrize("area_bytes", [65536], indirect=True)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("by", ["the same disk", "another"])
@pytest.mark.parametrize("is_noticed", [True, False], ids=["noticed", "hidden"])
def test_a_write_whose_bio_comes_again_is_read(
    tracked: TrackedDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, by: str, is_noticed: bool
) -> None:
    """Noticed: by the audit, at the last read of the round in which it is missed. Hidden: in the slack of its base."""
    with loop_device(tmp_path / "other.img", size_bytes=SIZE_BYTES) as other:
        other_disk = tracked.tracker.follow(OTHER, device=os.stat(other).st_rdev, size_bytes=SIZE_BYTES)
        try:
            write_past_cache(tracked.device, 8 * MIB)
            current = tracked.source.begin_round(first_bytes=0)
            if not is_noticed:
                facts = tracked.source._tracked.facts
                facts.completed_ahead += BLOCK // 512
            missed = missed_write(tracked, MIB)
            assert tracked.finish(current).end.promise is (
                Promise.COPY_IN_VALIDATED if not is_noticed else Promise.COPY_IN_FUZZY
            )
            device = tracked.device if by == "the same disk" else other
            _at(monkeypatch, moment, lambda: write_until_it_comes_again(tracked, missed, device))
            copies = [tracked.round().end.promise for _ in range(3)]
        finally:
            other_disk.close()
        assert tracked.differing_blocks() == []
        assert copies[-1] is Promise.COPY_IN_VALIDATED


def _at(monkeypatch: pytest.MonkeyPatch, moment: str, act: Callable[[], None]) -> None:
    """At once, or the next time that a round comes to this moment."""
    place = MOMENTS[moment]
    if place is None:
        act()
        return
    original = getattr(*place)
    done = []

    def acting(*args: object, **kwargs: object) -> object:
        if not done:
            done.append(moment)
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(*place, acting)


def test_what_was_missed_before_an_upgrade_is_read_after_it(tracked: TrackedDisk) -> None:
    (programs,) = tracked._pins.glob("programs_*")
    missed_write(tracked, MIB)
    tracked.close()
    programs.rename(programs.with_name("programs_older"))
    tracked.open()
    tracked.round()
    assert tracked.differing_blocks() == []
