"""What of a disk shows that another system wrote to it, and which disks show nothing."""

from __future__ import annotations

import struct
import uuid
from pathlib import Path

import pytest

from mobility_agent.disk_reader import LocalDisk
from mobility_agent.tracking.witnesses import TABLE_BYTES, WITNESS_BYTES, read_witnesses

MIB = 2**20
SIZE_BYTES = 96 * MIB
ODD_BYTES = 512
"""Disks need not end at a page."""
FIRST, SECOND = 8 * MIB, 40 * MIB


def ext(data: bytearray, at: int) -> None:
    data[at + 1080 : at + 1082] = b"\x53\xef"
    data[at + 1128 : at + 1144] = uuid.uuid4().bytes


def xfs(data: bytearray, at: int) -> None:
    data[at : at + 4] = b"XFSB"
    data[at + 32 : at + 48] = uuid.uuid4().bytes


def btrfs(data: bytearray, at: int) -> None:
    data[at + 65536 + 64 : at + 65536 + 72] = b"_BHRfS_M"


def mbr(data: bytearray, *starts: int) -> None:
    data[440:444], data[510:512] = b"disk", b"\x55\xaa"
    for index, start in enumerate(starts):
        struct.pack_into("<4xB3xII", data, 446 + 16 * index, 0x83, start // 512, 16 * MIB // 512)


def gpt(data: bytearray, *starts: int) -> None:
    data[512:520] = b"EFI PART"
    data[568:584] = uuid.uuid4().bytes
    struct.pack_into("<QII", data, 584, 2, 128, 128)
    for index, start in enumerate(starts):
        struct.pack_into("<16s16sQQ", data, 1024 + 128 * index, b"t" * 16, b"u" * 16, start // 512, start // 512 + 1)


def witnesses(path: Path, data: bytearray) -> bytes | None:
    path.write_bytes(data)
    disk = LocalDisk(str(path), expected=None)
    try:
        return read_witnesses(disk)
    finally:
        disk.close()


@pytest.mark.parametrize("table", [mbr, gpt])
def test_a_change_of_the_tables_or_of_a_file_systems_beginning_is_seen_and_no_other(
    tmp_path: Path, table: object
) -> None:
    data = bytearray(SIZE_BYTES + ODD_BYTES)
    assert callable(table)
    table(data, FIRST, SECOND)
    ext(data, FIRST)
    xfs(data, SECOND)
    before = witnesses(tmp_path / "disk.img", data)
    assert before is not None
    assert witnesses(tmp_path / "disk.img", data) == before
    seen = [20_000, TABLE_BYTES - 1, FIRST + 1100, FIRST + WITNESS_BYTES - 1, SECOND + 200, SECOND + WITNESS_BYTES - 1]
    seen += [SIZE_BYTES + ODD_BYTES - TABLE_BYTES, SIZE_BYTES + ODD_BYTES - 1]
    for place in seen:
        data[place] ^= 1
        assert witnesses(tmp_path / "disk.img", data) not in (before, None), place
        data[place] ^= 1
    for place in (TABLE_BYTES, FIRST - 1, FIRST + WITNESS_BYTES, SECOND - 1, SECOND + WITNESS_BYTES):
        data[place] ^= 1
        assert witnesses(tmp_path / "disk.img", data) == before, place
        data[place] ^= 1


@pytest.mark.parametrize("system", [ext, xfs, btrfs])
def test_a_disk_that_is_one_file_system_shows_it(tmp_path: Path, system: object) -> None:
    data = bytearray(SIZE_BYTES)
    assert callable(system)
    system(data, 0)
    assert witnesses(tmp_path / "disk.img", data) is not None


@pytest.mark.parametrize("what", ["nothing", "an unknown partition", "a table without partitions", "a far partition"])
def test_a_disk_with_anything_unknown_shows_nothing(tmp_path: Path, what: str) -> None:
    data = bytearray(SIZE_BYTES)
    if what == "an unknown partition":
        mbr(data, FIRST, SECOND)
        ext(data, FIRST)
    elif what == "a table without partitions":
        gpt(data)
    elif what == "a far partition":
        gpt(data, FIRST, 2**62)
        ext(data, FIRST)
    assert witnesses(tmp_path / "disk.img", data) is None


def test_a_small_disk_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    data = bytearray(100 * 1024 + ODD_BYTES)
    ext(data, 0)
    before = witnesses(tmp_path / "disk.img", data)
    data[-1] = 1
    assert witnesses(tmp_path / "disk.img", data) not in (before, None)
