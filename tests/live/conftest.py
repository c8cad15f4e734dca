"""One tracked device for a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from mobility_agent.tracking import block_bits
from tests.live.block_devices import bpf_file_system, loop_device, zram_device
from tests.live.tracked import MIB, TrackedDisk

SIZE_BYTES = 32 * MIB
MISSED = "completions were missed"
"""What the agent logs when the kernel ran none of the programs at a completion: it happens by itself now and then."""
TRIES = 3


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """A test of this folder that failed while the kernel missed completions is tried again: one that fails for another
    reason does so each time."""
    if Path(__file__).parent not in item.path.parents:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for tries_left in reversed(range(TRIES)):
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        failed = [report for report in reports if report.failed]
        if (
            not tries_left
            or not failed
            or not any(MISSED in f"{report.capstdout}{report.capstderr}" for report in reports)
        ):
            break
        item._initrequest()  # type: ignore[attr-defined]
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    with bpf_file_system(tmp_path / "bpf") as directory:
        yield directory


@pytest.fixture(params=[4096, 16384, 65536], ids=lambda area_bytes: f"areas-of-{area_bytes}")
def area_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every disk has the areas of a large one."""
    area_bytes: int = request.param
    monkeypatch.setattr(block_bits, "AREA_MAP_BYTES_WANTED", SIZE_BYTES // area_bytes // 8)
    return area_bytes


@pytest.fixture
def tracked(tmp_path: Path, pins: Path, area_bytes: int) -> Iterator[TrackedDisk]:
    """A loop device after its first round."""
    with loop_device(tmp_path / "disk.img", size_bytes=SIZE_BYTES) as device:
        yield from _after_first_round(TrackedDisk(device, tmp_path / "state", pins))


@pytest.fixture
def tracked_by_bios(tmp_path: Path, pins: Path, area_bytes: int) -> Iterator[TrackedDisk]:
    """The same with a driver that takes bios."""
    with zram_device(size_bytes=SIZE_BYTES) as device:
        yield from _after_first_round(TrackedDisk(device, tmp_path / "state", pins))


def _after_first_round(tracked: TrackedDisk) -> Iterator[TrackedDisk]:
    try:
        tracked.round_or_resync()
        yield tracked
    finally:
        tracked.close()
