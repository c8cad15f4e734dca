"""The scan on real sparse files: exactly what differs is yielded, from the very read that was digested."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobility_agent.core.dirty_map import SentRecord
from mobility_agent.core.extent_set import ExtentSet
from mobility_agent.disk_reader import LocalDisk
from mobility_agent.tracking.change_source import Promise, SourceFrame
from mobility_agent.tracking.scan import ScanSource
from protocol.vocabulary import DIGEST_BLOCK_BYTES as BLOCK
from protocol.vocabulary import FRAME_RAW_BYTES_MAX, ChangeKind, DiskId, check_extent_table
from runtime.local_directory import LocalDirectory, LocalFile

DISK = DiskId("d" * 32)
MIB = 2**20
WINDOW, PACKING = memoryview(mmap.mmap(-1, MIB)), memoryview(mmap.mmap(-1, MIB))


class Scanned:
    """One image, its scan source, and a copy kept by applying every frame."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.image = path / "disk.img"
        self.image.touch()
        os.truncate(self.image, size_bytes)
        self.copy = bytearray(size_bytes)
        self.directory = LocalDirectory(path / "state")
        self.sequence = 0
        self.open()
        self.source.enter_epoch(1, parent_sequence=None, is_base_empty=True)

    def open(self) -> None:
        self.disk = LocalDisk(str(self.image), expected=None)
        self.source = ScanSource(disk=DISK, source=self.disk, directory=self.directory, draw_random=os.urandom)

    def write(self, offset: int, data: bytes) -> None:
        with open(self.image, "r+b") as file:
            os.pwrite(file.fileno(), data, offset)

    def round(self, first_bytes: int = 0, *, keep: bool = True) -> tuple[list[SourceFrame], Promise]:
        current = self.source.begin_round(first_bytes=first_bytes)
        frames: list[SourceFrame] = []
        reached = first_bytes
        while not current.is_exhausted:
            step = current.read(WINDOW, PACKING)
            assert len([frame for frame in step if frame.buffer_index is not None]) <= 2
            for frame in step:
                assert frame.compared_to_bytes >= reached
                reached = frame.compared_to_bytes
                self._apply(frame)
            frames += step
        self.sequence += 1
        if keep:
            self.source.sent(self.sequence, [frame.receipt for frame in frames])
        return frames, current.end().promise

    def _apply(self, frame: SourceFrame) -> None:
        check_extent_table(frame.packed.table, raw_bytes=frame.packed.raw_bytes, disk_size_bytes=len(self.copy))
        payload = b"".join(frame.packed.payload)
        assert len(payload) == frame.packed.raw_bytes <= FRAME_RAW_BYTES_MAX
        at = 0
        for row in frame.packed.table:
            offset, length = int(row["offset"]), int(row["length"])
            assert offset + length <= frame.compared_to_bytes
            if row["kind"] == ChangeKind.DATA:
                self.copy[offset : offset + length] = payload[at : at + length]
                at += length
            else:
                assert row["kind"] == ChangeKind.ZEROES
                self.copy[offset : offset + length] = bytes(length)

    @property
    def is_equal(self) -> bool:
        return bytes(self.copy) == self.image.read_bytes()


SIZES = [BLOCK, 10 * MIB, 3 * MIB + BLOCK, 5 * MIB + 512, 2 * MIB - 7, 33]


@pytest.mark.parametrize("size", SIZES)
def test_rounds_over_random_changes_keep_the_copy_equal(tmp_path: Path, size: int) -> None:
    draw = random.Random(size)
    scanned = Scanned(tmp_path, size)
    for _ in range(6):
        for _ in range(draw.randrange(4)):
            offset = draw.randrange(size)
            length = min(size - offset, draw.choice([1, 100, BLOCK, 300_000, 2 * MIB]))
            scanned.write(offset, draw.choice([draw.randbytes(length), bytes(length)]))
        _, promise = scanned.round()
        assert scanned.is_equal
        assert promise is Promise.COPY_IN_VALIDATED
    frames, _ = scanned.round()
    assert frames == [], "nothing changed, so nothing is yielded"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    size=st.integers(1, 3 * MIB + 17),
)
def test_any_sparse_file_is_copied_exactly(tmp_path: Path, data: st.DataObject, size: int) -> None:
    path = tmp_path / os.urandom(4).hex()
    path.mkdir()
    scanned = Scanned(path, size)
    for _ in range(2):
        for offset in data.draw(st.lists(st.integers(0, size - 1), max_size=6)):
            scanned.write(offset, os.urandom(min(size - offset, 70_000)))
        scanned.round()
        assert scanned.is_equal


def test_scattered_changes_are_packed_into_few_frames(tmp_path: Path) -> None:
    scanned = Scanned(tmp_path, 40 * MIB)
    for window in range(40):
        scanned.write(window * MIB + 3 * BLOCK, b"x")
    frames, _ = scanned.round()
    assert sum(frame.packed.raw_bytes for frame in frames) == 40 * BLOCK
    assert len(frames) <= 4
    assert scanned.is_equal


def test_punched_holes_are_sent_as_zeroes_once(tmp_path: Path) -> None:
    scanned = Scanned(tmp_path, 8 * MIB)
    scanned.write(0, os.urandom(8 * MIB))
    scanned.round()
    os.truncate(scanned.image, 0)
    os.truncate(scanned.image, 8 * MIB)
    frames, _ = scanned.round()
    assert sum(frame.packed.raw_bytes for frame in frames) == 0
    assert sum(int(frame.packed.table["length"].sum()) for frame in frames) == 8 * MIB
    assert scanned.is_equal
    assert scanned.round()[0] == []


def test_a_huge_hole_is_covered_in_bounded_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobility_agent.tracking.scan.COVERED_BYTES_MAX", 4 * MIB)
    scanned = Scanned(tmp_path, 20 * MIB)
    scanned.write(18 * MIB, b"x")
    current = scanned.source.begin_round(first_bytes=0)
    reached = []
    while not current.is_exhausted:
        current.read(WINDOW, PACKING)
        reached.append(current.compared_to_bytes // MIB)
    assert reached == [4, 8, 12, 16, 20]
    assert current.end().promise is Promise.COPY_IN_VALIDATED
    scanned.round()
    assert scanned.is_equal


def test_what_was_not_said_to_be_sent_is_yielded_again(tmp_path: Path) -> None:
    scanned = Scanned(tmp_path, 4 * MIB)
    scanned.write(MIB, os.urandom(MIB))
    first, _ = scanned.round(keep=False)
    second, _ = scanned.round()
    assert len(first) == len(second) == 1


def test_forgotten_extents_are_yielded_again_also_as_zeroes(tmp_path: Path) -> None:
    scanned = Scanned(tmp_path, 4 * MIB)
    scanned.write(0, os.urandom(MIB))
    scanned.round()
    scanned.source.forget(ExtentSet.of([(BLOCK, 2 * BLOCK), (3 * MIB, 3 * MIB + BLOCK)]))
    frames, _ = scanned.round()
    yielded = [(int(row["offset"]), ChangeKind(int(row["kind"]))) for frame in frames for row in frame.packed.table]
    assert yielded == [(BLOCK, ChangeKind.DATA), (3 * MIB, ChangeKind.ZEROES)]


def test_a_restart_forgets_what_the_digests_missed(tmp_path: Path) -> None:
    scanned = Scanned(tmp_path, 2 * MIB)
    scanned.write(0, b"one")
    scanned.round()
    old = (scanned.directory.path / f"{DISK}.1.digests").read_bytes()
    scanned.write(0, b"two")
    scanned.round()
    scanned.source.close()
    scanned.write(0, b"one")
    (scanned.directory.path / f"{DISK}.1.digests").write_bytes(old)
    scanned.open()
    lost = SentRecord(first_sequence=2, last_sequence=2, extents=ExtentSet.of([(0, BLOCK)]))
    assert scanned.source.restore(1, [lost])
    scanned.round()
    assert scanned.is_equal, "the stale digest of what is there again must not count"


def test_digests_that_could_not_be_synchronized_are_never_trusted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = Scanned(tmp_path, 2 * MIB)
    scanned.write(0, b"one")
    scanned.round()

    def fail(file: LocalFile) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(LocalFile, "synchronize", fail)
        with pytest.raises(OSError, match="Input/output"):
            scanned.source.synchronize()
    scanned.source.close()
    scanned.open()
    assert not scanned.source.restore(1, []), "what reads back may never have reached the disk"


def test_digests_of_a_change_set_that_the_ledger_does_not_know_show_that_its_end_is_lost(tmp_path: Path) -> None:
    scanned = Scanned(tmp_path, 2 * MIB)
    scanned.write(0, b"one")
    scanned.round()
    scanned.write(MIB, b"two")
    scanned.round()
    scanned.source.close()
    scanned.open()
    assert not scanned.source.restore(1, [], sent_sequence=1)
    assert scanned.source.restore(1, [], sent_sequence=2)
    scanned.source.forget(ExtentSet.of([(MIB, 2 * MIB)]))
    scanned.source.close()
    assert scanned.source.restore(1, [], sent_sequence=1), "what was forgotten says nothing"


def test_files_of_other_epochs_are_removed_at_a_restart(tmp_path: Path) -> None:
    scanned = Scanned(tmp_path, MIB)
    scanned.source.enter_epoch(2, parent_sequence=0, is_base_empty=False)
    scanned.source.close()
    assert scanned.source.restore(1, [])
    assert scanned.directory.names() == [f"{DISK}.1.digests"]
    scanned.source.close()
    assert not scanned.source.restore(7, [])


def test_a_writer_in_the_middle_of_a_round_is_let_in_and_unsettles_it(tmp_path: Path) -> None:
    scanned = Scanned(tmp_path, 40 * MIB)
    scanned.write(0, os.urandom(40 * MIB))
    current = scanned.source.begin_round(first_bytes=0)
    current.read(WINDOW, PACKING)
    assert current.is_still()
    writer = threading.Thread(target=scanned.write, args=(0, b"late"))
    writer.start()
    while current.is_still():
        assert not current.is_exhausted
        current.read(WINDOW, PACKING)
    writer.join(timeout=10)
    assert not writer.is_alive(), "the writer was let in at once"
    while not current.is_exhausted:
        current.read(WINDOW, PACKING)
    end = current.end()
    assert end.promise is Promise.COPY_IN_FUZZY
    assert "writing" in end.reason


def test_an_abandoned_round_lets_writers_in(tmp_path: Path) -> None:
    scanned = Scanned(tmp_path, MIB)
    current = scanned.source.begin_round(first_bytes=0)
    current.abandon()
    scanned.write(0, b"free")
