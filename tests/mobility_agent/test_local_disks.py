"""Identity, stillness and errors of real image files and, as root where the kernel lets us, of loop devices."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import numpy
import pytest

from mobility_agent import disk_reader
from mobility_agent.disk_identity import check_same_disk, whole_disks
from mobility_agent.disk_reader import LocalDisk
from mobility_agent.errors import (
    DiskNotSupported,
    DiskReplaced,
    DiskResized,
    DiskUnreadable,
    DiskVanished,
    NotProvedStill,
)
from mobility_agent.tracking import stillness
from protocol.control import DiskKind

MIB = 2**20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(2 * MIB))
    return path


def gpt_image(path: Path, guid: uuid.UUID, *, xfs: uuid.UUID) -> None:
    """A GPT disk with one XFS partition at 1 MiB."""
    data = bytearray(4 * MIB)
    data[510:512] = b"\x55\xaa"
    data[512:520] = b"EFI PART"
    data[512 + 56 : 512 + 72] = guid.bytes_le
    data[512 + 72 : 512 + 88] = (2).to_bytes(8, "little") + (4).to_bytes(4, "little") + (128).to_bytes(4, "little")
    data[1024:1040] = uuid.uuid4().bytes
    data[1024 + 32 : 1024 + 40] = (MIB // 512).to_bytes(8, "little")
    data[MIB : MIB + 4] = b"XFSB"
    data[MIB + 32 : MIB + 48] = xfs.bytes
    path.write_bytes(data)


def test_partition_table_and_file_systems_identify_a_disk(tmp_path: Path) -> None:
    guid, xfs = uuid.uuid4(), uuid.uuid4()
    gpt_image(tmp_path / "gpt.img", guid, xfs=xfs)
    identity = LocalDisk(str(tmp_path / "gpt.img"), expected=None).identity
    assert identity.kind is DiskKind.IMAGE_FILE
    assert identity.partition_table == str(guid)
    assert identity.file_systems == (str(xfs),)
    assert identity.image_file is not None
    assert identity.image_file.inode == (tmp_path / "gpt.img").stat().st_ino


def test_an_mbr_signature_and_btrfs_are_read(tmp_path: Path) -> None:
    btrfs = uuid.uuid4()
    data = bytearray(2 * MIB)
    data[440:444] = (0x12345678).to_bytes(4, "little")
    data[450] = 0x83
    data[454:458] = (2048).to_bytes(4, "little")
    data[510:512] = b"\x55\xaa"
    at = MIB + 65536
    data[at + 32 : at + 48] = btrfs.bytes
    data[at + 64 : at + 72] = b"_BHRfS_M"
    (tmp_path / "mbr.img").write_bytes(data)
    identity = LocalDisk(str(tmp_path / "mbr.img"), expected=None).identity
    assert identity.partition_table == "mbr-12345678"
    assert identity.file_systems == (str(btrfs),)


@pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="mkfs.ext4 is not installed")
def test_an_ext4_uuid_is_read(tmp_path: Path) -> None:
    wanted = str(uuid.uuid4())
    path = tmp_path / "ext4.img"
    path.touch()
    os.truncate(path, 8 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-U", wanted, str(path)], check=True)
    assert LocalDisk(str(path), expected=None).identity.file_systems == (wanted,)


def test_random_contents_never_break_identification(tmp_path: Path) -> None:
    for number in range(50):
        path = tmp_path / f"{number}.img"
        data = bytearray(os.urandom(200_000))
        data[512:520] = b"EFI PART"
        path.write_bytes(data[: 513 + number * 4000])
        LocalDisk(str(path), expected=None).close()


def test_another_file_at_the_path_is_another_disk(image: Path) -> None:
    disk = LocalDisk(str(image), expected=None)
    replacement = image.with_name("new.img")
    shutil.copy(image, replacement)
    replacement.rename(image)
    with pytest.raises(DiskReplaced):
        disk.check()
    with pytest.raises(DiskReplaced):
        LocalDisk(str(image), expected=disk.identity)


@pytest.mark.parametrize("size", [MIB, 3 * MIB])
def test_a_disk_that_shrank_or_grew_is_noticed(image: Path, size: int) -> None:
    disk = LocalDisk(str(image), expected=None)
    disk.check()
    os.truncate(image, size)
    with pytest.raises(DiskResized) as caught:
        disk.check()
    assert caught.value.fields["found_bytes"] == size
    with pytest.raises(DiskResized):
        LocalDisk(str(image), expected=disk.identity)


def test_reading_past_a_shrunk_end_is_an_error_not_zeroes(image: Path) -> None:
    disk = LocalDisk(str(image), expected=None)
    os.truncate(image, MIB)
    with pytest.raises(DiskResized):
        disk.read_into(MIB, bytearray(4096))


def test_what_is_gone_or_no_disk_is_told_apart(image: Path, tmp_path: Path) -> None:
    disk = LocalDisk(str(image), expected=None)
    image.unlink()
    with pytest.raises(DiskVanished):
        disk.check()
    with pytest.raises(DiskVanished):
        LocalDisk(str(image), expected=None)
    for path in (str(tmp_path), "/dev/null"):
        with pytest.raises(DiskNotSupported):
            LocalDisk(path, expected=None)
    image.touch()
    with pytest.raises(DiskNotSupported):
        LocalDisk(str(image), expected=None)


def test_data_ranges_cover_all_data(image: Path) -> None:
    os.truncate(image, 0)
    os.truncate(image, 16 * MIB)
    with open(image, "r+b") as file:
        os.pwrite(file.fileno(), b"x", 5 * MIB)
    disk = LocalDisk(str(image), expected=None)
    ranges = list(disk.data_ranges(0, 16 * MIB))
    assert any(first <= 5 * MIB < end for first, end in ranges)
    assert list(disk.data_ranges(6 * MIB, 6 * MIB)) == []
    assert all(end <= 5 * MIB + 1 for _, end in disk.data_ranges(0, 5 * MIB + 1))


def test_a_lease_holds_while_nobody_writes_and_can_be_taken_again(image: Path) -> None:
    disk = LocalDisk(str(image), expected=None)
    for _ in range(2):
        proof = disk.begin_stillness()
        image.read_bytes()
        assert proof.holds()
        assert proof.end()
        assert proof.end() is False, "an ended proof proves nothing any more"


def test_a_file_that_is_open_for_writing_gives_no_lease(image: Path) -> None:
    disk = LocalDisk(str(image), expected=None)
    with open(image, "r+b"), pytest.raises(NotProvedStill) as caught:
        disk.begin_stillness()
    assert "open for writing" in str(caught.value)
    disk.begin_stillness().end()


@pytest.mark.parametrize("kind", ["fuse.sshfs", "fuse", "virtiofs", "ocfs2"])
def test_a_file_that_others_may_write_from_elsewhere_is_never_proved_still(
    image: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = image.stat().st_dev
    mount = f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw,noatime shared:1 - {kind} host:/ rw"
    monkeypatch.setattr(stillness, "_mounts", lambda: ["1 0 250:250 / / rw - ext4 /dev/vda rw", mount])
    with pytest.raises(NotProvedStill) as caught:
        LocalDisk(str(image), expected=None).begin_stillness()
    assert kind in str(caught.value)


def test_a_mapping_that_outlives_its_descriptor_gives_no_lease(image: Path) -> None:
    with open(image, "r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
    with mapping, pytest.raises(NotProvedStill):
        LocalDisk(str(image), expected=None).begin_stillness()
    LocalDisk(str(image), expected=None).begin_stillness().end()


@pytest.mark.parametrize("how", ["open", "truncate"])
def test_a_writer_breaks_the_lease_and_goes_on_at_once(image: Path, how: str) -> None:
    proof = LocalDisk(str(image), expected=None).begin_stillness()
    entered = threading.Event()

    def write() -> None:
        if how == "open":
            image.open("r+b").close()
        else:
            os.truncate(image, MIB)
        entered.set()

    writer = threading.Thread(target=write)
    writer.start()
    while proof.holds():
        pass
    assert entered.wait(10)
    writer.join()
    assert not proof.end()


def test_this_machines_disks_are_found_without_loops_and_optical_drives() -> None:
    found = whole_disks()
    assert not [path for path in found if "/loop" in path or "/sr" in path or "/ram" in path]
    assert all(path.startswith("/dev/") for path in found)


# loop devices


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    backing = tmp_path / "backing.img"
    backing.write_bytes(os.urandom(8 * MIB))
    made = subprocess.run(["losetup", "--show", "-f", str(backing)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"this kernel gives no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    yield device
    subprocess.run(["losetup", "-d", device], check=True)


def test_a_block_device_is_read_past_the_page_cache_and_known_by_its_marks(loop: str, tmp_path: Path) -> None:
    disk = LocalDisk(loop, expected=None)
    buffer = memoryview(mmap.mmap(-1, MIB))
    disk.read_into(MIB, buffer)
    assert bytes(buffer) == (tmp_path / "backing.img").read_bytes()[MIB : 2 * MIB]
    assert disk.identity.kind is DiskKind.BLOCK_DEVICE
    assert disk.identity.size_bytes == 8 * MIB
    assert disk.sector_bytes in (512, 4096)
    disk.check()
    disk.close()


PIECES = [(first, length) for first in range(0, 7 * MIB, 40960) for length in (4096, 512)]
"""More than are under way at once."""


def read_pieces(disk: LocalDisk, pieces: list[tuple[int, int]]) -> bytes:
    buffer = memoryview(mmap.mmap(-1, MIB))
    disk.read_pieces(numpy.array([first for first, _ in pieces]), numpy.array([length for _, length in pieces]), buffer)
    return bytes(buffer[: sum(length for _, length in pieces)])


@pytest.mark.parametrize("limit", [None, OSError(errno.EAGAIN, "too many"), OSError(errno.ENOSYS, "none")])
def test_many_pieces_are_read_one_behind_the_other(
    loop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: OSError | None
) -> None:
    if limit is not None:
        refusing = Mock(side_effect=limit)
        monkeypatch.setattr(disk_reader, "ParallelReads", refusing)
    disk = LocalDisk(loop, expected=None)
    expected = (tmp_path / "backing.img").read_bytes()
    for pieces in (PIECES, PIECES[:1], PIECES[:2], []):
        assert read_pieces(disk, pieces) == b"".join(expected[first : first + length] for first, length in pieces)
    if limit is not None:
        assert refusing.call_count == 1, "it is not asked again for each batch"
    disk.close()
    disk.close()


def test_a_piece_that_does_not_come_says_why(loop: str, tmp_path: Path) -> None:
    disk = LocalDisk(loop, expected=None)
    os.truncate(tmp_path / "backing.img", MIB)
    with pytest.raises(DiskUnreadable) as caught:
        read_pieces(disk, [(0, 4096), (4 * MIB, 4096), (8192, 4096)])
    assert caught.value.fields["offset_bytes"] == 4 * MIB
    disk.close()


def test_an_exclusive_device_is_still_until_somebody_writes_to_it(loop: str) -> None:
    disk = LocalDisk(loop, expected=None)
    proof = disk.begin_stillness()
    assert proof.holds()
    with pytest.raises(NotProvedStill):
        disk.begin_stillness()
    assert proof.end()
    proof = disk.begin_stillness()
    descriptor = os.open(loop, os.O_WRONLY)
    os.pwrite(descriptor, b"late", 0)
    os.fsync(descriptor)
    os.close(descriptor)
    assert not proof.holds()
    assert not proof.end()
    disk.close()


@contextmanager
def uncounted(device: str) -> Iterator[None]:
    """The kernel does not count what is read from and written to the device."""
    switch = Path("/sys/block", Path(device).name, "queue/iostats")
    switch.write_text("0")
    try:
        yield
    finally:
        switch.write_text("1")


def test_a_device_whose_writes_are_not_counted_is_never_proved_still(loop: str) -> None:
    disk = LocalDisk(loop, expected=None)
    with uncounted(loop), pytest.raises(NotProvedStill) as caught:
        disk.begin_stillness()
    assert "iostats" in str(caught.value)
    proof = disk.begin_stillness()
    with uncounted(loop):
        assert proof.holds(), "nothing shows it yet"
        assert not proof.end()
    disk.close()


def test_another_disk_behind_the_same_device_path_is_noticed(tmp_path: Path) -> None:
    first, second = tmp_path / "a.img", tmp_path / "b.img"
    gpt_image(first, uuid.uuid4(), xfs=uuid.uuid4())
    gpt_image(second, uuid.uuid4(), xfs=uuid.uuid4())
    link = tmp_path / "disk"
    link.symlink_to(first)
    disk = LocalDisk(str(link), expected=None)
    link.unlink()
    link.symlink_to(second)
    with pytest.raises(DiskReplaced):
        disk.check()


def test_hardware_marks_decide_before_contents(loop: str) -> None:
    identity = LocalDisk(loop, expected=None).identity
    one = identity.model_copy(update={"wwn": "naa.1", "partition_table": "a"})
    formatted = identity.model_copy(update={"wwn": "naa.1", "partition_table": "b"})
    other = identity.model_copy(update={"wwn": "naa.2", "partition_table": "a"})
    check_same_disk("/dev/x", one, formatted)
    with pytest.raises(DiskReplaced):
        check_same_disk("/dev/x", one, other)
