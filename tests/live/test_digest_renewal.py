"""Digests that are computed anew while a live disk is idle: only of what the history certainly holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mobility_agent.core.extent_set import ExtentSet
from mobility_agent.tracking.followed_disk import FollowedDisk
from tests.live.conftest import SIZE_BYTES
from tests.live.test_bitmap import COMPLETION, attach, detach, discard, write
from tests.live.tracked import MIB, TrackedDisk

BLOCK, DIGEST_BLOCK = 4096, 65536
PLACE = 5 * MIB + BLOCK
NUMBER = PLACE // DIGEST_BLOCK


def written_in_part(tracked: TrackedDisk) -> None:
    """A digest block of which a part was sent, and acknowledged, and a round that found nothing since."""
    write(tracked.device, PLACE, os.urandom(BLOCK))
    tracked.round()
    assert known(tracked) is None


def known(tracked: TrackedDisk) -> bytes | None:
    return tracked.source._known.digests.known(NUMBER, NUMBER + 1)[0]


def until_renewed(tracked: TrackedDisk) -> bytes | None:
    for _ in range(5):
        # why: another's write on this machine may be under way, and then nothing is certain this time
        tracked.round()
        if found := known(tracked):
            return found
    return None


def test_a_block_of_which_a_part_was_sent_is_known_again_once_the_disk_is_idle(tracked: TrackedDisk) -> None:
    written_in_part(tracked)
    held = bytes(tracked.copy[NUMBER * DIGEST_BLOCK : (NUMBER + 1) * DIGEST_BLOCK])
    assert until_renewed(tracked) == tracked.source._known.digests.digest(held)
    tracked.source._tracked.layout.mark_all(tracked.source._tracked.pending)
    told = tracked.round()
    assert (told.read_bytes, told.sent_bytes) == (SIZE_BYTES, 0), "a comparison of everything sends nothing of it"


def test_nothing_becomes_known_before_all_was_acknowledged(tracked: TrackedDisk) -> None:
    written_in_part(tracked)
    tracked.source.acknowledged(tracked.sequence - 1)
    assert until_renewed(tracked) is None
    tracked.source.acknowledged(tracked.sequence)
    tracked.source.forget(ExtentSet.of([]))
    assert until_renewed(tracked) is None, "after a reconnection the newest sequence may be another"


def test_nothing_becomes_known_after_a_round_that_did_not_settle(tracked: TrackedDisk) -> None:
    written_in_part(tracked)
    tracked.source._tracked.facts.is_unsettled = 1
    tracked.source._renew_digests()
    assert known(tracked) is None


def test_what_is_written_beside_keeps_it_unknown(tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the digest is read, and after."""
    written_in_part(tracked)
    write(tracked.device, PLACE + BLOCK, os.urandom(BLOCK))
    tracked.source._renew_digests()
    assert known(tracked) is None
    tracked.round()
    read_into = tracked.disk.read_into

    def read_and_write(offset_bytes: int, buffer: memoryview) -> None:
        read_into(offset_bytes, buffer)
        write(tracked.device, PLACE + 2 * BLOCK, os.urandom(BLOCK))

    with monkeypatch.context() as patched:
        patched.setattr(tracked.disk, "read_into", read_and_write)
        tracked.source._renew_digests()
    assert known(tracked) is None


def test_what_nobody_saw_being_written_is_never_taken_for_what_was_sent(tracked: TrackedDisk) -> None:
    written_in_part(tracked)
    detach(tracked, "mark_submitted", *COMPLETION)
    write(tracked.device, PLACE + BLOCK, os.urandom(BLOCK))
    attach(tracked, "mark_submitted", *COMPLETION)
    tracked.source._renew_digests()
    assert known(tracked) is None
    tracked.round_or_resync()
    assert tracked.differing_blocks() == []


def test_what_is_in_flight_keeps_it_unknown(tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    written_in_part(tracked)
    monkeypatch.setattr(FollowedDisk, "kernel_in_flight", lambda disk: 1)
    tracked.source._renew_digests()
    assert known(tracked) is None


@pytest.mark.parametrize("length", [DIGEST_BLOCK, DIGEST_BLOCK // 2])
def test_what_a_discard_left_on_the_device_is_not_taken_for_what_the_history_holds(
    tracked: TrackedDisk, tmp_path: Path, length: int
) -> None:
    """A device may keep what was discarded; the history does not. What is written there again has to be sent."""
    place, contents = NUMBER * DIGEST_BLOCK, os.urandom(DIGEST_BLOCK)
    write(tracked.device, place, contents)
    tracked.round()
    tracked.round()
    discard(tracked.device, place, length)
    with (tmp_path / "disk.img").open("r+b") as backing:
        backing.seek(place)
        backing.write(contents)
        backing.flush()
        os.fsync(backing.fileno())
    for _ in range(5):
        tracked.round()
    write(tracked.device, place, contents)
    tracked.round()
    assert tracked.copy[place : place + DIGEST_BLOCK] == contents
    assert tracked.differing_blocks() == []
