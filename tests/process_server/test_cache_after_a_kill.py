"""The cache after a kill without a power cut, and a power cut later: what the simulation found, as small as it gets."""

from __future__ import annotations

import random

import pytest

from process_server.cache_files import CacheFiles
from process_server.cache_log import NO_DISK, CacheRecord, RecordKind, cache_record
from process_server.cache_records import encode_file_ends
from process_server.cache_recovery import recover_cache
from tests.simulation.directory import Operation, SimulatedDirectory, StorageMedium
from tests.simulation.process import ProcessKilled, SimulatedProcess

FILE_BYTES = 2**20


def checkpoint() -> list[CacheRecord]:
    return [cache_record(RecordKind.CHECKPOINT, NO_DISK, 0, 0, encode_file_ends({}))]


def directory_of(medium: StorageMedium) -> tuple[SimulatedDirectory, SimulatedProcess]:
    process = SimulatedProcess("process-server")
    return SimulatedDirectory(medium, process), process


def written_and_killed_before_it_was_synchronized(medium: StorageMedium) -> None:
    directory, process = directory_of(medium)
    files = CacheFiles(directory)
    files.begin(0, checkpoint(), preallocate_bytes=FILE_BYTES)
    process.kill_after_operations(2)
    with pytest.raises(ProcessKilled):
        files.append([cache_record(RecordKind.SEGMENT_COMMITTED, NO_DISK, 1, 1, b"")])


@pytest.mark.parametrize("seed", range(20))
def test_what_recovery_found_after_a_kill_is_still_found_after_a_power_cut(seed: int) -> None:
    medium = StorageMedium("cache", random.Random(seed))
    written_and_killed_before_it_was_synchronized(medium)
    found = recover_cache(directory_of(medium)[0]).files
    assert [file.end_bytes for file in found] == [2 * 4096]
    medium.lose_power()
    assert [file.end_bytes for file in recover_cache(directory_of(medium)[0]).files] == [2 * 4096]


@pytest.mark.parametrize("seed", range(20))
def test_it_is_found_even_if_a_synchronize_had_failed_before_the_kill(seed: int) -> None:
    medium = StorageMedium("cache", random.Random(seed))
    directory, _ = directory_of(medium)
    files = CacheFiles(directory)
    files.begin(0, checkpoint(), preallocate_bytes=FILE_BYTES)
    medium.fail_next.add(Operation.SYNCHRONIZE)
    with pytest.raises(OSError, match="injected"):
        files.append([cache_record(RecordKind.SEGMENT_COMMITTED, NO_DISK, 1, 1, b"")])
    assert [file.end_bytes for file in recover_cache(directory_of(medium)[0]).files] == [2 * 4096]
    medium.lose_power()
    assert [file.end_bytes for file in recover_cache(directory_of(medium)[0]).files] == [2 * 4096]


def test_a_recovery_that_cannot_make_durable_what_it_found_says_so() -> None:
    medium = StorageMedium("cache", random.Random(1))
    written_and_killed_before_it_was_synchronized(medium)
    medium.fail_next.add(Operation.SYNCHRONIZE)
    with pytest.raises(OSError, match="injected"):
        recover_cache(directory_of(medium)[0])
