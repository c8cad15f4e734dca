"""One tracked device for a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.block_devices import bpf_file_system, loop_device, zram_device
from tests.live.tracked import MIB, TrackedDisk

SIZE_BYTES = 32 * MIB


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    with bpf_file_system(tmp_path / "bpf") as directory:
        yield directory


@pytest.fixture
def tracked(tmp_path: Path, pins: Path) -> Iterator[TrackedDisk]:
    """A loop device after its first round."""
    with loop_device(tmp_path / "disk.img", size_bytes=SIZE_BYTES) as device:
        yield from _after_first_round(TrackedDisk(device, tmp_path / "state", pins))


@pytest.fixture
def tracked_by_bios(tmp_path: Path, pins: Path) -> Iterator[TrackedDisk]:
    """The same with a driver that takes bios."""
    with zram_device(size_bytes=SIZE_BYTES) as device:
        yield from _after_first_round(TrackedDisk(device, tmp_path / "state", pins))


def _after_first_round(tracked: TrackedDisk) -> Iterator[TrackedDisk]:
    try:
        tracked.round_or_resync()
        yield tracked
    finally:
        tracked.close()
