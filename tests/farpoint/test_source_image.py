"""The demo's source disk: real files in a sound file system, before and after the changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from farpoint.demo.source_image import PlainImage, allocated_bytes, copy_sparse, source_image
from recovery.verification import images_are_identical

SIZE_BYTES = 48 * 2**20


@pytest.mark.parametrize("kind", ["ext4", "plain"])
def test_an_image_of_real_files_is_sound_before_and_after_it_was_changed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "disk.img"
    if kind == "plain":
        image = PlainImage(path, SIZE_BYTES)
    else:
        image = source_image(path, size_bytes=SIZE_BYTES)
        if image.kind != "ext4":
            pytest.skip("this machine has no e2fsprogs")
    image.make()
    assert path.stat().st_size == SIZE_BYTES
    assert allocated_bytes(path) > SIZE_BYTES // 3
    before = tmp_path / "before.img"
    copy_sparse(path, before)
    assert images_are_identical(path, before)
    changes = image.change()
    assert changes.files_overwritten > 5
    assert changes.bytes_written > 0
    assert not images_are_identical(path, before)
    assert image.check(path) in (True, None)
    assert image.check(before) in (True, None)
    assert sorted(left.name for left in tmp_path.iterdir()) == ["before.img", "disk.img"]


def test_a_broken_file_system_is_found(tmp_path: Path) -> None:
    image = source_image(tmp_path / "disk.img", size_bytes=SIZE_BYTES)
    if image.kind != "ext4":
        pytest.skip("this machine has no e2fsprogs")
    image.make()
    with open(tmp_path / "disk.img", "r+b") as file:
        file.seek(1024 + 56)
        file.write(bytes(1024))
    assert image.check(tmp_path / "disk.img") is False


def test_without_the_tools_the_image_is_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    assert source_image(tmp_path / "disk.img", size_bytes=SIZE_BYTES).kind == "plain"


def test_a_sparse_copy_keeps_its_holes(tmp_path: Path) -> None:
    with open(tmp_path / "source", "wb") as file:
        file.truncate(64 * 2**20)
        file.seek(2**20)
        file.write(b"data" * 4096)
    copy_sparse(tmp_path / "source", tmp_path / "copy")
    assert images_are_identical(tmp_path / "source", tmp_path / "copy")
    assert allocated_bytes(tmp_path / "copy") < 2**20
