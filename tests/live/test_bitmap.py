"""The bitmap source on real block devices: what was written is found, whatever happens to the agent meanwhile."""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mobility_agent.errors import DiskResized, ResyncNeeded
from mobility_agent.tracking import bitmap, bpf_calls
from mobility_agent.tracking.change_source import Promise
from mobility_agent.tracking.followed_disk import Marks, possible_processors
from mobility_agent.tracking.kernel_tracker import remove_pins
from protocol.vocabulary import DIGEST_BLOCK_BYTES, ChangeKind, DiskId
from tests.live.block_devices import loop_device, mounted, run
from tests.live.tracked import DISK, MIB, TrackedDisk

BLOCK = 4096


def write(device: Path, offset: int, data: bytes) -> None:
    """Past the page cache."""
    with open(device, "r+b", buffering=0) as file:
        descriptor = os.open(f"/proc/self/fd/{file.fileno()}", os.O_WRONLY | os.O_SYNC)
        try:
            os.pwrite(descriptor, data, offset)
        finally:
            os.close(descriptor)


def test_what_was_written_is_sent_and_nothing_else(tracked: TrackedDisk) -> None:
    for offset, length in ((0, BLOCK), (5 * MIB - BLOCK, 2 * BLOCK), (31 * MIB, MIB)):
        write(tracked.device, offset, os.urandom(length))
    told = tracked.round()
    assert told.end.promise is Promise.COPY_IN_VALIDATED
    assert told.sent_bytes == MIB + 3 * BLOCK
    assert told.read_bytes < 2 * MIB
    assert tracked.differing_blocks() == []
    assert tracked.round().read_bytes == 0, "nothing was written since"


def test_scattered_blocks_are_read_alone_and_near_ones_in_one_go(tracked: TrackedDisk) -> None:
    places = [0, 100 * BLOCK, 4 * MIB, 4 * MIB + 9 * BLOCK, 20 * MIB + 15 * BLOCK]
    for place in places:
        write(tracked.device, place, os.urandom(BLOCK))
    told = tracked.round()
    assert (told.read_bytes, told.sent_bytes) == (5 * BLOCK, 5 * BLOCK)
    write(tracked.device, MIB, os.urandom(BLOCK))
    write(tracked.device, MIB + 4 * BLOCK, os.urandom(BLOCK))
    told = tracked.round()
    assert (told.read_bytes, told.sent_bytes) == (5 * BLOCK, 2 * BLOCK)
    assert tracked.differing_blocks() == []


def test_only_digest_blocks_that_went_out_whole_are_known(tracked: TrackedDisk) -> None:
    write(tracked.device, MIB, os.urandom(16 * BLOCK))
    write(tracked.device, 2 * MIB, os.urandom(BLOCK))
    tracked.round()
    known = tracked.source._known.digests.known(0, 48)
    assert known[16] == tracked.source._known.digests.digest(tracked.copy[MIB : MIB + 16 * BLOCK])
    assert known[32] is None
    write(tracked.device, MIB, bytes(tracked.copy[MIB : MIB + 16 * BLOCK]))
    told = tracked.round()
    assert (told.read_bytes, told.sent_bytes) == (16 * BLOCK, 0), "it is what the history holds"


def test_a_driver_that_takes_bios_is_tracked_as_well(tracked_by_bios: TrackedDisk) -> None:
    tracked = tracked_by_bios
    write(tracked.device, 7 * MIB, os.urandom(3 * MIB))
    told = tracked.round()
    assert told.end.promise is Promise.COPY_IN_VALIDATED
    assert told.sent_bytes == 3 * MIB
    assert tracked.differing_blocks() == []
    run("mkfs.ext4", "-q", "-F", tracked.device)
    tracked.round()
    assert tracked.differing_blocks() == []


def partition_entry(first_bytes: int, length_bytes: int) -> bytes:
    return struct.pack("<4xB3xII", 0x83, first_bytes // 512, length_bytes // 512)


def test_writes_through_a_partition_are_those_of_the_disk(tmp_path: Path, pins: Path) -> None:
    with loop_device(tmp_path / "disk.img", size_bytes=32 * MIB, partitions=True) as device:
        write(
            device,
            446,
            partition_entry(2 * MIB, 8 * MIB) + partition_entry(12 * MIB, 20 * MIB) + bytes(32) + b"\x55\xaa",
        )
        subprocess.run(["partx", "--add", device], check=False, capture_output=True)
        tracked = TrackedDisk(device, tmp_path / "state", pins)
        try:
            tracked.round_or_resync()
            write(Path(f"{device}p2"), MIB, os.urandom(BLOCK))
            assert tracked.round().sent_bytes == BLOCK
            assert tracked.copy[13 * MIB : 13 * MIB + BLOCK] != bytes(BLOCK)
            assert tracked.differing_blocks() == []
        finally:
            tracked.close()


def test_a_mounted_file_system_settles_once_it_is_quiet(tracked: TrackedDisk, tmp_path: Path) -> None:
    run("mkfs.ext4", "-q", "-F", tracked.device)
    with mounted(tracked.device, tmp_path / "mnt") as place:
        for number in range(50):
            (place / f"{number}").write_bytes(os.urandom(20_000))
            tracked.round()
        os.sync()
        promises = [tracked.round().end.promise for _ in range(5)]
        assert Promise.COPY_IN_VALIDATED in promises, "the journal's own writes disturb one round, not all"
        assert tracked.differing_blocks() == []
    tracked.round()
    assert tracked.differing_blocks() == []


def settle(tracked: TrackedDisk) -> None:
    """Until what was written lies two generations back: what is discarded before that is read."""
    tracked.round()
    tracked.round()


@pytest.mark.parametrize(
    ("command", "kind", "read_bytes"),
    [(["blkdiscard"], ChangeKind.DISCARDED, 0), (["blkdiscard", "--zeroout"], ChangeKind.ZEROES, 4 * MIB)],
    ids=["discarded", "zeroed"],
)
def test_what_was_discarded_or_zeroed_goes_out_without_a_byte(
    tracked: TrackedDisk, command: list[str], kind: ChangeKind, read_bytes: int
) -> None:
    write(tracked.device, 0, os.urandom(8 * MIB))
    settle(tracked)
    run(*command, "--offset", 2 * MIB, "--length", 4 * MIB, tracked.device)
    tracked.kinds.clear()
    told = tracked.round()
    assert tracked.kinds == {kind}
    assert (told.sent_bytes, told.read_bytes) == (0, read_bytes)
    assert tracked.copy[2 * MIB : 6 * MIB] == bytes(4 * MIB)
    assert tracked.differing_blocks() == []


def discard(device: Path, offset: int, length: int) -> None:
    run("blkdiscard", "--offset", offset, "--length", length, device)


def test_what_was_written_after_a_discard_is_read(tracked: TrackedDisk) -> None:
    """Also before it: in which of both orders they came cannot be told from marks; and with it all of its digest block,
    so that what the history holds of one was discarded as a whole, or read."""
    for offset in (0, 2 * MIB):
        write(tracked.device, offset, os.urandom(MIB))
    settle(tracked)
    discard(tracked.device, 0, MIB)
    write(tracked.device, BLOCK, os.urandom(BLOCK))
    write(tracked.device, 2 * MIB, os.urandom(BLOCK))
    discard(tracked.device, 2 * MIB, MIB)
    told = tracked.round()
    assert told.sent_bytes == DIGEST_BLOCK_BYTES
    assert tracked.differing_blocks() == []
    write(tracked.device, 8 * BLOCK, os.urandom(BLOCK))
    assert tracked.round().sent_bytes == BLOCK
    assert tracked.differing_blocks() == []


def test_a_discard_of_a_part_of_a_block_leaves_its_rest(tracked: TrackedDisk) -> None:
    write(tracked.device, 0, os.urandom(MIB))
    settle(tracked)
    discard(tracked.device, 512, 3 * BLOCK)
    tracked.round()
    assert tracked.differing_blocks() == []
    assert tracked.copy[:512] != bytes(512)


@pytest.mark.parametrize("first", [0, 512, 15 * BLOCK, 16 * BLOCK - 512, 16 * BLOCK])
@pytest.mark.parametrize("length", [512, 16 * BLOCK, 17 * BLOCK, 40 * BLOCK + 512])
def test_a_discard_takes_what_it_covers_and_nothing_beside_it(tracked: TrackedDisk, first: int, length: int) -> None:
    contents = bytearray(os.urandom(MIB))
    write(tracked.device, 0, bytes(contents))
    settle(tracked)
    discard(tracked.device, first, length)
    assert tracked.round().end.promise is Promise.COPY_IN_VALIDATED
    contents[first : first + length] = bytes(length)
    assert tracked.copy[:MIB] == contents
    assert tracked.differing_blocks() == []


def test_an_unsent_write_under_a_discard_is_read(tracked: TrackedDisk) -> None:
    """It may have been acknowledged to nobody yet, and what a discard leaves is not certain."""
    write(tracked.device, 0, os.urandom(MIB))
    tracked.source.begin_round(first_bytes=0)
    discard(tracked.device, 0, MIB)
    assert tracked.round().read_bytes == MIB
    assert tracked.differing_blocks() == []


def test_a_write_into_the_round_unsettles_it_and_goes_out_in_the_next(tracked: TrackedDisk) -> None:
    write(tracked.device, 0, os.urandom(2 * MIB))
    current = tracked.source.begin_round(first_bytes=0)
    write(tracked.device, MIB, os.urandom(BLOCK))
    told = tracked.finish(current)
    assert told.end.promise is Promise.COPY_IN_FUZZY
    assert told.end.reason == "1 areas were written again while they were read"
    assert tracked.round().end.promise is Promise.COPY_IN_VALIDATED
    assert tracked.differing_blocks() == []


def test_a_write_elsewhere_leaves_the_round_what_the_disk_was_when_it_began(tracked: TrackedDisk) -> None:
    write(tracked.device, 0, os.urandom(2 * MIB))
    before = tracked.device.read_bytes()
    swap, happened = tracked.source._tracked.swap, []

    def swapped() -> int:
        happened.append("swap")
        return swap()

    tracked.source._tracked.swap = swapped  # type: ignore[method-assign]
    current = tracked.source.begin_round(first_bytes=0, read_tick=lambda: happened.append("tick") or 7)  # type: ignore[func-returns-value]
    assert happened == ["tick", "swap"]
    write(tracked.device, 9 * MIB, os.urandom(BLOCK))
    told = tracked.finish(current)
    assert told.end.promise is Promise.COPY_IN_VALIDATED
    assert told.end.instant_ns == 7
    assert tracked.copy == before
    tracked.round()
    assert tracked.differing_blocks() == []


def test_what_is_written_after_the_last_read_does_not_matter(tracked: TrackedDisk) -> None:
    """Also to blocks of the round: the agent's own state may lie there."""
    write(tracked.device, 0, os.urandom(BLOCK))
    before = tracked.device.read_bytes()
    current = tracked.source.begin_round(first_bytes=0)
    tracked.read_all(current)
    write(tracked.device, 0, os.urandom(BLOCK))
    assert current.end().promise is Promise.COPY_IN_VALIDATED
    assert tracked.copy == before
    assert tracked.round().sent_bytes == BLOCK


def test_a_block_beside_a_newer_write_gets_no_digest(tracked: TrackedDisk) -> None:
    """It would say of contents that were not sent that they are in the history."""
    old = os.urandom(BLOCK)
    write(tracked.device, BLOCK, old)
    tracked.round()
    write(tracked.device, 0, os.urandom(BLOCK))
    current = tracked.source.begin_round(first_bytes=0)
    write(tracked.device, BLOCK, os.urandom(BLOCK))
    tracked.finish(current)
    assert tracked.copy[BLOCK : 2 * BLOCK] == old
    remove_pins(tracked._pins)  # all marks are lost: only digests can tell now
    tracked.close()
    tracked.open()
    with pytest.raises(ResyncNeeded):
        tracked.round()
    tracked.enter_epoch()
    tracked.round()
    assert tracked.differing_blocks() == []


def test_writes_that_are_under_way_keep_a_round_from_settling(tmp_path: Path, pins: Path) -> None:
    """The device's backing file is on a file system that is frozen: writes begin, and do not end."""
    with loop_device(tmp_path / "outer.img", size_bytes=96 * MIB) as outer:
        run("mkfs.ext4", "-q", "-F", outer)
        with (
            mounted(outer, tmp_path / "outer") as place,
            loop_device(place / "inner.img", size_bytes=16 * MIB) as device,
        ):
            tracked = TrackedDisk(device, tmp_path / "state", pins)
            try:
                tracked.round_or_resync()
                run("fsfreeze", "--freeze", place)
                try:
                    writer = subprocess.Popen(
                        ["dd", "if=/dev/urandom", f"of={device}", "bs=64k", "count=1", "oflag=direct", "status=none"]
                    )
                    while not tracked.source._tracked.changes_in_flight():
                        assert writer.poll() is None
                    current = tracked.source.begin_round(first_bytes=0)
                finally:
                    run("fsfreeze", "--unfreeze", place)
                told = tracked.finish(current)
                assert told.end.promise is Promise.COPY_IN_FUZZY
                assert "under way" in told.end.reason
                assert writer.wait() == 0
                told = tracked.round()
                assert told.read_bytes == 65536, "what may have been read too early is read again"
                assert told.end.promise is Promise.COPY_IN_VALIDATED
                assert tracked.differing_blocks() == []
            finally:
                tracked.close()


def test_tracking_goes_on_while_no_agent_runs(tracked: TrackedDisk) -> None:
    tracked.close()
    write(tracked.device, 3 * MIB, os.urandom(MIB))
    tracked.open()
    told = tracked.round()
    assert told.sent_bytes == MIB
    assert told.read_bytes == MIB
    assert tracked.differing_blocks() == []


def test_an_agent_that_ends_within_a_round_loses_nothing_of_it(tracked: TrackedDisk) -> None:
    write(tracked.device, 3 * MIB, os.urandom(MIB))
    tracked.source.begin_round(first_bytes=0)
    write(tracked.device, 4 * MIB, os.urandom(MIB))
    tracked.close()
    tracked.open()
    assert tracked.round().sent_bytes == 2 * MIB
    assert tracked.differing_blocks() == []


@pytest.mark.parametrize("kind", Marks)
def test_an_agent_that_ends_while_it_retires_a_map_loses_nothing_of_it(tracked: TrackedDisk, kind: Marks) -> None:
    write(tracked.device, 3 * MIB, os.urandom(MIB))
    maps = tracked.source._tracked
    maps._use(kind, maps._maps[maps._free(kind, maps.maps_in_use().values())])
    tracked.close()
    tracked.open()
    assert tracked.round().sent_bytes == MIB
    assert tracked.differing_blocks() == []


def test_newer_programs_take_over_without_a_gap(tracked: TrackedDisk, area_bytes: int) -> None:
    (programs,) = tracked._pins.glob("programs_*")
    tracked.close()
    write(tracked.device, MIB, os.urandom(BLOCK))
    programs.rename(programs.with_name("programs_older"))
    tracked.open()
    assert [place.name for place in tracked._pins.glob("programs_*")] == [programs.name]
    write(tracked.device, 2 * MIB, os.urandom(BLOCK))
    assert tracked.round().sent_bytes == area_bytes + BLOCK
    assert tracked.differing_blocks() == []
    assert tracked.round().end.promise is Promise.COPY_IN_VALIDATED


def detach(tracked: TrackedDisk, *programs: str) -> None:
    """Returns when none of them is run any more: the kernel lets go of a link only a while after its name is gone."""
    (place,) = tracked._pins.glob("programs_*")
    for program in programs:
        link = bpf_calls.get_pinned(str(place / f"link_{program}"))
        identifier = struct.unpack_from("<I", bpf_calls._info(link), 4)[0]
        (place / f"link_{program}").unlink()
        os.close(link)
        while is_link_known(identifier):
            pass
    tracked.source._tracked.put_in_use()  # waits for whoever was running


class MoreCommands(enum.IntEnum):
    LINK_BY_IDENTIFIER = 30


def is_link_known(identifier: int) -> bool:
    try:
        descriptor, _ = bpf_calls.call(MoreCommands.LINK_BY_IDENTIFIER, struct.pack("<I", identifier))  # type: ignore[arg-type]
    except OSError as error:
        return error.errno == errno.EAGAIN
    os.close(descriptor)
    return True


COMPLETION = ("mark_request", "mark_request_again", "mark_bio", "mark_bio_again")


def test_completions_that_nobody_saw_are_noticed_and_read_again(tracked: TrackedDisk) -> None:
    detach(tracked, *COMPLETION)
    write(tracked.device, MIB, os.urandom(BLOCK))
    told = tracked.round()
    assert told.end.promise is Promise.COPY_IN_FUZZY
    assert tracked.source.alarms == 1
    assert tracked.differing_blocks() == []


@pytest.mark.parametrize("missing", [(), ("mark_request",), ("mark_request_again",)], ids=["none", "first", "second"])
def test_either_completion_program_marks_what_completes_and_both_count_it_once(
    tracked: TrackedDisk, missing: tuple[str, ...]
) -> None:
    detach(tracked, *missing)
    maps = tracked.source._tracked
    before = maps.read_audit()
    places = [number * 7 * BLOCK for number in range(200)]
    for place in places:
        write(tracked.device, place, os.urandom(BLOCK))
    after = maps.read_audit()
    assert after.completed_sectors - before.completed_sectors == 200 * BLOCK // 512
    assert after.kernel_sectors - before.kernel_sectors == 200 * BLOCK // 512
    assert maps.changes_in_flight() == frozenset()
    marked = maps.in_use(Marks.COMPLETION)
    assert all(marked[place // BLOCK // 8] >> place // BLOCK % 8 & 1 for place in places)
    assert tracked.round().end.promise is Promise.COPY_IN_VALIDATED
    assert tracked.differing_blocks() == []


def attach(tracked: TrackedDisk, *programs: str) -> None:
    (place,) = tracked._pins.glob("programs_*")
    for program in programs:
        link = bpf_calls.attach_traced(tracked.tracker._descriptors[f"program_{program}"])
        bpf_calls.pin(link, str(place / f"link_{program}"))
        os.close(link)


def test_a_write_whose_end_nobody_saw_is_read_each_round_until_it_is_given_up(
    tracked: TrackedDisk, area_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    detach(tracked, *COMPLETION)
    write(tracked.device, MIB, os.urandom(BLOCK))
    attach(tracked, *COMPLETION)
    for _ in range(3):
        told = tracked.round()
        assert told.end.promise is Promise.COPY_IN_FUZZY
        assert told.read_bytes == area_bytes, "it may have landed since it was read"
    assert tracked.differing_blocks() == []
    monkeypatch.setattr(bitmap, "LEAK_SECONDS", -1.0)
    assert tracked.round().read_bytes == area_bytes
    assert tracked.source._tracked.changes_in_flight() == frozenset()
    assert tracked.round().end.promise is Promise.COPY_IN_VALIDATED
    assert tracked.round().read_bytes == 0


def test_writes_that_nobody_saw_at_all_make_everything_be_compared(tracked: TrackedDisk) -> None:
    detach(tracked, "mark_submitted", *COMPLETION)
    write(tracked.device, MIB, os.urandom(BLOCK))
    with pytest.raises(ResyncNeeded, match="writes_missed"):
        tracked.round()
    tracked.enter_epoch()
    assert tracked.round().sent_bytes == 16 * BLOCK, "one digest block differs"
    assert tracked.differing_blocks() == []


def test_a_start_without_all_programs_attached_compares_everything(tracked: TrackedDisk) -> None:
    detach(tracked, "mark_request")
    tracked.close()
    tracked.open()
    with pytest.raises(ResyncNeeded, match="tracking_interrupted"):
        tracked.round()


def count_up(tracked: TrackedDisk, counter: int) -> None:
    """As if the programs had counted it."""
    maps = tracked.source._tracked
    key, size = struct.pack("<I", maps.facts.slot), 112 * possible_processors()
    value = bytearray(bpf_calls.lookup(maps._programs.disk_counters, key, value_bytes=size) or b"")
    struct.pack_into("<Q", value, 8 * counter, struct.unpack_from("<Q", value, 8 * counter)[0] + 1)
    bpf_calls.update(maps._programs.disk_counters, key, bytes(value))


PASS_THROUGH, BEYOND_END = 6, 7
"""Their places among the counters."""


@pytest.mark.parametrize(
    ("counter", "cause"), [(PASS_THROUGH, "command_past_block_layer"), (BEYOND_END, "write_behind_end")]
)
def test_a_change_of_an_unknown_place_makes_everything_be_compared_once(
    tracked: TrackedDisk, counter: int, cause: str
) -> None:
    count_up(tracked, counter)
    for _ in range(2):
        with pytest.raises(ResyncNeeded, match=cause):
            tracked.round()
    tracked.enter_epoch()
    assert tracked.round().read_bytes == len(tracked.copy)
    assert tracked.round().read_bytes == 0


def test_another_disk_at_the_same_device_begins_anew(tracked: TrackedDisk, tmp_path: Path) -> None:
    tracked.close()
    run("losetup", "--detach", tracked.device)
    with open(tmp_path / "disk.img", "r+b") as file:
        os.pwrite(file.fileno(), os.urandom(BLOCK), 5 * MIB)
    run("losetup", tracked.device, tmp_path / "disk.img")
    tracked.open()
    with pytest.raises(ResyncNeeded, match="device_changed"):
        tracked.round()
    tracked.enter_epoch()
    tracked.round()
    assert tracked.differing_blocks() == []


def test_a_disk_that_grows_stops(tracked: TrackedDisk, tmp_path: Path) -> None:
    os.truncate(tmp_path / "disk.img", 64 * MIB)
    run("losetup", "--set-capacity", tracked.device)
    with pytest.raises(DiskResized):
        tracked.round()


def all_pins(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "end",
    [lambda tracked: tracked.tracker.unfollow(DISK), lambda tracked: remove_pins(tracked._pins)],
    ids=["the protection ends", "the package goes"],
)
def test_nothing_stays_behind(tracked: TrackedDisk, end: Callable[[TrackedDisk], None]) -> None:
    assert [path for path in all_pins(tracked._pins) if path.parent.name == DISK]
    end(tracked)
    assert [path for path in all_pins(tracked._pins) if path.parent.name == DISK] == []


def test_a_disk_after_another_in_the_same_slot_begins_clean(tracked: TrackedDisk) -> None:
    write(tracked.device, 0, os.urandom(MIB))
    tracked.tracker.unfollow(DISK)
    tracked.close()
    tracked.open()
    with pytest.raises(ResyncNeeded, match="no_clean_stop"):
        tracked.round()
    tracked.enter_epoch()
    tracked.round()
    assert tracked.round().end.promise is Promise.COPY_IN_VALIDATED
    assert tracked.differing_blocks() == []


def test_a_command_that_goes_past_the_block_layer_within_a_round_unsettles_it(tracked: TrackedDisk) -> None:
    for counter in (PASS_THROUGH, BEYOND_END):
        current = tracked.source.begin_round(first_bytes=0)
        count_up(tracked, counter)
        assert tracked.finish(current).end.promise is Promise.COPY_IN_FUZZY
        with pytest.raises(ResyncNeeded):
            tracked.round()
        tracked.round_or_resync()


def test_a_discard_that_failed_counts_as_a_write(tmp_path: Path, pins: Path) -> None:
    descriptor = os.memfd_create("backing", os.MFD_ALLOW_SEALING)
    os.pwrite(descriptor, os.urandom(8 * MIB), 0)
    device = Path(run("losetup", "--find", "--show", f"/proc/{os.getpid()}/fd/{descriptor}"))
    try:
        tracked = TrackedDisk(device, tmp_path / "state", pins)
        try:
            tracked.round_or_resync()
            assert tracked.differing_blocks() == []
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
            assert subprocess.run(["blkdiscard", "--length", str(MIB), device], capture_output=True).returncode
            assert tracked.round().read_bytes == MIB
            assert tracked.differing_blocks() == []
        finally:
            tracked.close()
    finally:
        run("losetup", "--detach", device)
        os.close(descriptor)


def test_what_was_sent_while_track_was_lost_stays_pending(tracked: TrackedDisk) -> None:
    write(tracked.device, 0, os.urandom(2 * MIB))
    current = tracked.source.begin_round(first_bytes=0)
    frames = current.read(tracked._window, tracked._packing)
    for frame in frames:
        tracked._apply(frame)
    count_up(tracked, PASS_THROUGH)
    with pytest.raises(ResyncNeeded):
        tracked.source._check_counters(tracked.source._tracked.counters())
    everything = bytes(tracked.source._tracked.pending)
    tracked.source.sent(tracked.sequence + 1, [frame.receipt for frame in frames])
    assert bytes(tracked.source._tracked.pending) == everything
    tracked.sequence += 1
    assert tracked.round_or_resync().read_bytes == len(tracked.copy)
    assert tracked.differing_blocks() == []


def test_ending_the_tracking_of_a_disk_that_was_swapped_ends_no_other(tracked: TrackedDisk) -> None:
    device, other = os.stat(tracked.device).st_rdev, DiskId("e" * 32)
    found = tracked.tracker.follow(other, device=device, size_bytes=tracked.disk.size_bytes)
    try:
        tracked.tracker.unfollow(DISK)
        assert tracked.tracker._is_followed(found.facts)
    finally:
        found.close()
