"""What a run with live disks judges by: what a restart made of a disk, what a freeze point holds, and where the bytes
of a device-mapper device lie. The run itself: `make guest`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mobility_agent.core.resync_cause import ResyncCause
from tests.guest.live_machine import DISKS, FreezePoint, counts_of, fault_of_restart, faults_of_counts
from tests.guest.live_machine_scripts import LINEAR_BYTES, PIECES, gather_linear, scatter_linear
from tests.live.canary import Counts

SIZE_BYTES = 2**30
RESENT_BYTES_MAX = 2**28
BEFORE = {"epoch": 3}
GONE_ON: dict[str, Any] = {
    "source": "bitmap",
    "error": None,
    "resyncs": {},
    "epoch": 3,
    "size_bytes": SIZE_BYTES,
    "read_bytes": 2**20,
    "sent_bytes": 2**20,
}
COMPARED = GONE_ON | {"resyncs": {"no_clean_stop": 1}, "epoch": 4, "read_bytes": SIZE_BYTES}


def fault(changed: dict[str, Any], cause: ResyncCause | None) -> str:
    return fault_of_restart(BEFORE, changed, cause, resent_bytes_max=RESENT_BYTES_MAX)


def test_a_disk_that_went_on_and_one_that_was_compared_did_what_was_promised() -> None:
    assert fault(GONE_ON, None) == ""
    assert fault(COMPARED, ResyncCause.NO_CLEAN_STOP) == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source": "scan"}, "not followed"),
        ({"error": {"code": "disk-vanished"}}, "not followed"),
        ({"resyncs": {"no_clean_stop": 1}}, "compared because of"),
        ({"epoch": 4}, "epoch is a new one"),
        ({"read_bytes": SIZE_BYTES}, "all of it was read"),
    ],
)
def test_a_comparison_that_was_not_promised_is_noticed(changes: dict[str, Any], says: str) -> None:
    assert says in fault(GONE_ON | changes, None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"resyncs": {}}, "compared because of {}"),
        ({"resyncs": {"in_use_at_stop": 1}}, "compared because of"),
        ({"resyncs": {"no_clean_stop": 2}}, "compared because of"),
        ({"resyncs": {"no_clean_stop": 1, "writes_missed": 1}}, "compared because of"),
        ({"epoch": 3}, "its epoch was 3, and is 3"),
        ({"read_bytes": SIZE_BYTES - 1}, "only"),
        ({"sent_bytes": RESENT_BYTES_MAX + 1}, "more was sent"),
    ],
)
def test_a_comparison_that_is_not_the_one_promised_is_noticed(changes: dict[str, Any], says: str) -> None:
    assert says in fault(COMPARED | changes, ResyncCause.NO_CLEAN_STOP)


def test_counts_of_another_instant_and_missing_ones_are_noticed() -> None:
    names = [disk.name for disk in DISKS]
    frozen = FreezePoint(points={}, before=dict.fromkeys(names, 10), after=dict.fromkeys(names, 20))
    sound = dict.fromkeys(names, Counts(first=15, second=14))
    assert not any(faults_of_counts(frozen, sound).values())
    for wrong in (Counts(first=9, second=9), Counts(first=30, second=30), Counts(first=12, second=15)):
        assert faults_of_counts(frozen, sound | {"lvm": wrong})["lvm"]
    assert faults_of_counts(frozen, {"root": sound["root"]})["linear"]


def test_counts_are_read_as_the_guest_tells_them() -> None:
    assert counts_of("root 5\nlvm 6\nlinear 18446744073709551615\n") == {"root": 5, "lvm": 6, "linear": 2**64 - 1}


def test_what_the_mapped_device_holds_is_put_together_from_its_pieces_and_back(tmp_path: Path) -> None:
    disk, device, other = tmp_path / "disk", tmp_path / "device", tmp_path / "other"
    marks = [os.urandom(16) for _ in PIECES]
    with disk.open("wb") as file:
        file.truncate(LINEAR_BYTES)
        for (offset, _), mark in zip(PIECES, marks, strict=True):
            file.seek(offset)
            file.write(mark)
    gather_linear(disk, device)
    data, at = device.read_bytes(), 0
    for (_, length), mark in zip(PIECES, marks, strict=True):
        assert data[at : at + 16] == mark
        at += length
    assert len(data) == at
    scatter_linear(device, other)
    assert other.read_bytes() == disk.read_bytes()
