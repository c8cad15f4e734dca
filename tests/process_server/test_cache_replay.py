"""Which checkpoints continue what the files before them said."""

from __future__ import annotations

import pytest

from process_server.cache_records import DiskCheckpoint
from process_server.cache_recovery import Replay
from tests.process_server.world import DISK


def checkpoint(*, epoch: int = 1, ordinal: int, committed: int, trailer: bytes | None = None) -> DiskCheckpoint:
    """After the change set of the same number as the segment."""
    return DiskCheckpoint(
        disk=DISK,
        epoch=epoch,
        parent_epoch=epoch - 1,
        parent_sequence=0,
        ordinal=ordinal,
        committed_ordinal=committed,
        sequence=ordinal,
        trailer_hash=trailer or bytes([ordinal]) * 32,
        copy_in_cursor_bytes=None,
    )


NEXT = {
    "the same": checkpoint(ordinal=3, committed=3),
    "another segment of the same number": checkpoint(ordinal=3, committed=3, trailer=b"x" * 32),
    "all committed since": checkpoint(ordinal=5, committed=5),
    "one waits since": checkpoint(ordinal=5, committed=4),
    "behind": checkpoint(ordinal=2, committed=2),
    "the next epoch": checkpoint(epoch=2, ordinal=0, committed=0),
    "one waits in the next epoch": checkpoint(epoch=2, ordinal=1, committed=0),
}


@pytest.mark.parametrize("is_behind_gap", [False, True])
@pytest.mark.parametrize("what", NEXT)
def test_only_what_removed_files_can_have_said_is_missing_without_damage(what: str, is_behind_gap: bool) -> None:
    """A removed file said nothing of a segment that waits."""
    replay = Replay()
    for stated, is_behind in ((checkpoint(ordinal=3, committed=3), True), (NEXT[what], is_behind_gap)):
        replay.begin_checkpoint(is_behind_gap=is_behind)
        replay.position(stated, is_checkpoint=True)
        replay.end_checkpoint()
    disks, damaged = replay.finish()
    is_whole = what == "the same" or (is_behind_gap and what in ("all committed since", "the next epoch"))
    assert (set(disks), damaged) == (({DISK}, set()) if is_whole else (set(), {DISK}))
    if is_whole:
        assert disks[DISK].position == NEXT[what]
        assert disks[DISK].committed_sequence == NEXT[what].sequence
