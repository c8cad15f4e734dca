"""Targets: a file appears whole or not at all; a device is refused unless it is free, large enough and confirmed."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from recovery import image_writer
from recovery.errors import (
    DeviceHalfWritten,
    DeviceNotConfirmed,
    TargetExists,
    TargetFault,
    TargetFull,
    TargetInUse,
    TargetMissing,
    TargetTooSmall,
    TargetUnfinished,
)
from recovery.image_writer import open_target
from recovery.verification import image_digest, images_are_identical
from tests.recovery.conftest import SIZE_BYTES
from tests.recovery.made_vault import noise


def test_a_file_is_written_and_named_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with open_target(path, size_bytes=SIZE_BYTES, overwrite_device=False) as target:
        target.prepare([], data_bytes=2**20)
        target.write(4097, memoryview(noise(1, 2**19)))
        target.write(2**21, memoryview(noise(2, 2**18)))
        assert not path.exists()
        target.finish()
    expected = bytearray(SIZE_BYTES)
    expected[4097 : 4097 + 2**19] = noise(1, 2**19)
    expected[2**21 : 2**21 + 2**18] = noise(2, 2**18)
    assert path.read_bytes() == expected
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_ragged_pieces_are_written_right_past_the_page_cache(tmp_path: Path) -> None:
    expected = bytearray(SIZE_BYTES)
    with open_target(tmp_path / "image", size_bytes=SIZE_BYTES, overwrite_device=False) as target:
        for number, (first, length) in enumerate(
            [(1, 2**18), (2**18 + 5, 2**18 + 77), (2**20, 2**20), (2**22 - 3, 2**18)]
        ):
            target.write(first, memoryview(noise(number, length)))
            expected[first : first + length] = noise(number, length)
        target.finish()
    assert (tmp_path / "image").read_bytes() == expected


def test_an_existing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image").write_text("mine")
    with pytest.raises(TargetExists):
        open_target(tmp_path / "image", size_bytes=SIZE_BYTES, overwrite_device=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TargetExists):
        open_target(tmp_path / "link", size_bytes=SIZE_BYTES, overwrite_device=True)


def test_an_unfinished_file_of_another_run_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "image.partial").write_text("theirs")
    with pytest.raises(TargetUnfinished), open_target(tmp_path / "image", size_bytes=1, overwrite_device=False):
        pass
    assert (tmp_path / "image.partial").read_text() == "theirs"


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(TargetMissing, match="nowhere"),
        open_target(tmp_path / "nowhere" / "image", size_bytes=1, overwrite_device=False),
    ):
        pass


def test_a_file_system_that_cannot_hold_the_data_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    with (
        pytest.raises(TargetFull),
        open_target(tmp_path / "image", size_bytes=SIZE_BYTES, overwrite_device=False) as target,
    ):
        target.prepare([], data_bytes=2**60)
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_fills_up_leaves_nothing_half_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(image_writer, "write_fully", refuse)
    with (
        pytest.raises(TargetFull, match=str(SIZE_BYTES)),
        open_target(tmp_path / "image", size_bytes=SIZE_BYTES, overwrite_device=False) as target,
    ):
        target.write(0, memoryview(b"full"))
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_opened_a_second_time_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def fail(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", fail)
    with (
        pytest.raises(TargetFault, match="Too many open files"),
        open_target(tmp_path / "image", size_bytes=SIZE_BYTES, overwrite_device=False),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_really_full_file_system_is_told(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=False)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with (
            pytest.raises(TargetFull),
            open_target(tmp_path / "image", size_bytes=SIZE_BYTES, overwrite_device=False) as target,
        ):
            target.write(0, memoryview(noise(1, 2**21)))
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_device_must_be_confirmed(loop_device: Path) -> None:
    with pytest.raises(DeviceNotConfirmed):
        open_target(loop_device, size_bytes=SIZE_BYTES, overwrite_device=False)


def test_a_device_that_is_too_small_is_refused(loop_device: Path) -> None:
    with pytest.raises(TargetTooSmall) as caught:
        open_target(loop_device, size_bytes=SIZE_BYTES + 512, overwrite_device=True)
    assert (caught.value.size_bytes, caught.value.needed_bytes) == (SIZE_BYTES, SIZE_BYTES + 512)


def test_a_mounted_device_is_refused(loop_device: Path, tmp_path: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", str(loop_device)], check=True)
    mount_point = tmp_path / "mounted"
    mount_point.mkdir()
    if subprocess.run(["mount", str(loop_device), str(mount_point)], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        with pytest.raises(TargetInUse, match="mounted"):
            open_target(loop_device, size_bytes=SIZE_BYTES, overwrite_device=True)
    finally:
        subprocess.run(["umount", str(mount_point)], check=True)


def test_a_device_that_somebody_holds_is_refused(loop_device: Path) -> None:
    holder = os.open(loop_device, os.O_RDWR | os.O_EXCL)
    try:
        with pytest.raises(TargetInUse):
            open_target(loop_device, size_bytes=SIZE_BYTES, overwrite_device=True)
    finally:
        os.close(holder)


def test_all_of_a_device_is_overwritten_holes_as_zeroes(loop_device: Path) -> None:
    size_bytes = SIZE_BYTES - 4096
    with open_target(loop_device, size_bytes=size_bytes, overwrite_device=True) as target:
        target.prepare([(0, 513), (2**20, size_bytes)], data_bytes=2**20 - 513)
        target.write(513, memoryview(noise(1, 2**20 - 513)))
        target.finish()
    expected = bytes(513) + noise(1, 2**20 - 513) + bytes(size_bytes - 2**20)
    assert loop_device.read_bytes() == expected + b"\xff" * 4096


def test_a_device_that_was_not_finished_is_said_to_be_useless(loop_device: Path) -> None:
    def fail_half_way() -> None:
        with open_target(loop_device, size_bytes=SIZE_BYTES, overwrite_device=True) as target:
            target.prepare([], data_bytes=0)
            raise TargetFault(path=loop_device, reason="the cause")

    with pytest.raises(DeviceHalfWritten, match="the cause"):
        fail_half_way()


def test_digests_and_comparison_see_through_holes(tmp_path: Path) -> None:
    sparse, full = tmp_path / "sparse", tmp_path / "full"
    data = noise(1, 5000)
    with open(sparse, "wb") as file:
        file.truncate(3 * 2**20 + 7)
        os.pwrite(file.fileno(), data, 2**20 - 100)
    full.write_bytes(sparse.read_bytes())
    size_bytes = full.stat().st_size
    assert images_are_identical(sparse, full)
    assert image_digest(sparse, size_bytes=size_bytes) == image_digest(full, size_bytes=size_bytes)
    with open(full, "r+b") as file:
        os.pwrite(file.fileno(), b"\1", size_bytes - 1)
    assert not images_are_identical(sparse, full)
    assert image_digest(sparse, size_bytes=size_bytes) != image_digest(full, size_bytes=size_bytes)
    with pytest.raises(EOFError):
        image_digest(sparse, size_bytes=size_bytes + 1)
