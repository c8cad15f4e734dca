"""The digest file: what counts, what does not, across torn writes, restarts and epochs; against a plain model."""

from __future__ import annotations

import contextlib
import random
import tracemalloc
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobility_agent.core.dirty_map import SentRecord
from mobility_agent.core.extent_set import ExtentSet
from mobility_agent.errors import AgentStateDamaged
from mobility_agent.ports import SourceDisk
from mobility_agent.tracking.digest_file import ENTRY_BYTES, HEADER_BYTES, PAGE_ENTRIES, DigestFile
from mobility_agent.tracking.scan import ScanSource
from protocol.vocabulary import DIGEST_BLOCK_BYTES as BLOCK
from protocol.vocabulary import DiskId
from runtime.local_directory import LocalDirectory
from tests.simulation.directory import SimulatedDirectory, StorageMedium
from tests.simulation.process import ProcessKilled, SimulatedProcess

DISK = DiskId("d" * 32)
KEY = bytes(range(32))


def make(path: Path, *, blocks: int = 10, tail: int = 0, empty: bool = False, name: str = "x.digests") -> DigestFile:
    return DigestFile.create(
        LocalDirectory(path), name, disk=DISK, size_bytes=blocks * BLOCK - tail, epoch=1, base_is_empty=empty, key=KEY
    )


def reopened(path: Path, file: DigestFile) -> DigestFile:
    file.close()
    return DigestFile.open(LocalDirectory(path), "x.digests", disk=DISK, size_bytes=file.size_bytes)


def test_nothing_is_known_of_a_new_file_and_all_of_an_empty_base(tmp_path: Path) -> None:
    file = make(tmp_path)
    assert file.known(0, 10) == [None] * 10
    empty = make(tmp_path, empty=True, tail=100)
    assert empty.known(0, 10) == [file.digest(bytes(BLOCK))] * 9 + [file.digest(bytes(BLOCK - 100))]
    assert list(empty.not_known_zero(0, 10)) == []
    assert list(file.not_known_zero(0, 10)) == list(range(10))


def test_entries_survive_a_restart(tmp_path: Path) -> None:
    file = make(tmp_path, blocks=2 * PAGE_ENTRIES + 5)
    written = {0: b"a" * 16, PAGE_ENTRIES - 1: b"b" * 16, PAGE_ENTRIES: b"c" * 16, 2 * PAGE_ENTRIES + 4: b"d" * 16}
    file.write(7, written.items())
    file.synchronize()
    file = reopened(tmp_path, file)
    known = file.known(0, file.block_count)
    assert {block: digest for block, digest in enumerate(known) if digest is not None} == written
    assert file.sequences(0, 1) == [7]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    block=st.integers(0, 9),
    first=st.integers(0, ENTRY_BYTES - 1),
    length=st.integers(1, ENTRY_BYTES),
    junk=st.binary(min_size=ENTRY_BYTES, max_size=ENTRY_BYTES),
)
def test_a_torn_entry_is_unknown(tmp_path: Path, block: int, first: int, length: int, junk: bytes) -> None:
    file = make(tmp_path)
    file.write(3, [(number, bytes([number]) * 16) for number in range(10)])
    path = tmp_path / "x.digests"
    data = bytearray(path.read_bytes())
    at = HEADER_BYTES + block * ENTRY_BYTES + first
    end = min(at + length, HEADER_BYTES + (block + 1) * ENTRY_BYTES)
    whole = bytes(data)
    data[at:end] = junk[: end - at]
    path.write_bytes(data)
    file = reopened(tmp_path, file)
    known = file.known(0, 10)
    expected: list[bytes | None] = [bytes([number]) * 16 for number in range(10)]
    if bytes(data) != whole:
        expected[block] = None
    assert known == expected
    file.close()


def test_an_entry_at_another_blocks_place_does_not_count(tmp_path: Path) -> None:
    file = make(tmp_path)
    file.write(3, [(1, b"a" * 16)])
    path = tmp_path / "x.digests"
    data = bytearray(path.read_bytes())
    entry = data[HEADER_BYTES + ENTRY_BYTES : HEADER_BYTES + 2 * ENTRY_BYTES]
    data[HEADER_BYTES + 5 * ENTRY_BYTES : HEADER_BYTES + 6 * ENTRY_BYTES] = entry
    path.write_bytes(data)
    assert reopened(tmp_path, file).known(5, 6) == [None]


def test_forgotten_blocks_are_unknown_even_where_nothing_was_ever_sent(tmp_path: Path) -> None:
    file = make(tmp_path, empty=True)
    file.write(1, [(4, b"a" * 16)])
    file.forget(ExtentSet.of([(3 * BLOCK + 1, 5 * BLOCK - 1), (9 * BLOCK, 10 * BLOCK)]))
    file.synchronize()
    known = reopened(tmp_path, file).known(0, 10)
    assert [block for block, digest in enumerate(known) if digest is None] == [3, 4, 9]


def test_an_entry_older_than_the_ledger_knows_was_lost_and_does_not_count(tmp_path: Path) -> None:
    file = make(tmp_path, empty=True)
    file.write(3, [(0, b"a" * 16), (1, b"b" * 16)])
    file.write(5, [(1, b"c" * 16)])
    file.forget_older(ExtentSet.of([(0, 3 * BLOCK)]), 5)
    assert [digest is None for digest in file.known(0, 4)] == [True, False, True, False]


def test_a_new_epoch_keeps_what_the_parent_covers_and_forgets_the_rest(tmp_path: Path) -> None:
    file = make(tmp_path, blocks=PAGE_ENTRIES + 10, empty=True)
    file.write(4, [(0, b"a" * 16), (PAGE_ENTRIES, b"b" * 16)])
    file.write(5, [(1, b"c" * 16), (PAGE_ENTRIES + 1, b"d" * 16)])
    file.forget(ExtentSet.of([(2 * BLOCK, 3 * BLOCK)]))
    heir = file.next_epoch(LocalDirectory(tmp_path), "y.digests", disk=DISK, epoch=2, parent_sequence=4)
    assert heir.epoch == 2
    assert heir.known(0, 4) == [b"a" * 16, None, None, heir.zero_digest(3)]
    assert heir.known(PAGE_ENTRIES, PAGE_ENTRIES + 2) == [b"b" * 16, None]
    assert heir.sequences(0, 1) == [0]
    assert file.known(1, 2) == [b"c" * 16], "the old file stays as it is until the ledger names the new epoch"


@pytest.mark.parametrize("change", ["truncate", "header", "other-disk", "other-size"])
def test_a_file_that_is_not_this_disks_whole_digests_is_refused(tmp_path: Path, change: str) -> None:
    file = make(tmp_path)
    file.close()
    path, disk, size = tmp_path / "x.digests", DISK, 10 * BLOCK
    if change == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    elif change == "header":
        data = bytearray(path.read_bytes())
        data[20] ^= 1
        path.write_bytes(data)
    elif change == "other-disk":
        disk = DiskId("e" * 32)
    else:
        size += BLOCK
    with pytest.raises(AgentStateDamaged):
        DigestFile.open(LocalDirectory(tmp_path), "x.digests", disk=disk, size_bytes=size)


def test_a_large_empty_disk_costs_no_space_and_little_time(tmp_path: Path) -> None:
    file = make(tmp_path, blocks=2**21, empty=True)
    assert list(file.not_known_zero(0, 2**21)) == []
    assert (tmp_path / "x.digests").stat().st_blocks * 512 < 2**20


TIB = 2**40
MEMORY_BYTES_MAX = 2**19
FILE_BYTES_PER_TIB = 512 * 2**20


def test_the_digests_of_a_tebibyte_take_half_a_gibibyte_of_file_and_half_a_mebibyte_of_memory(tmp_path: Path) -> None:
    """Whatever is done to them: docs/limits.md says so."""
    draw = random.Random(7)
    tracemalloc.start()
    try:
        file = make(tmp_path, blocks=TIB // BLOCK, empty=True)
        assert (tmp_path / "x.digests").stat().st_size == FILE_BYTES_PER_TIB + HEADER_BYTES
        for sequence in range(1, 100):
            first = draw.randrange(TIB // BLOCK - 64)
            file.write(sequence, [(block, bytes([sequence]) * 16) for block in range(first, first + 64)])
            assert file.known(first, first + 1) == [bytes([sequence]) * 16]
            file.forget(ExtentSet.of([(first * BLOCK, (first + 8) * BLOCK)]))
        assert not file.holds_later_than(99)
        assert sum(1 for _ in file.not_known_zero(0, TIB // BLOCK)) == 99 * 64
        heir = file.next_epoch(LocalDirectory(tmp_path), "y.digests", disk=DISK, epoch=2, parent_sequence=50)
        assert sum(1 for _ in heir.not_known_zero(0, TIB // BLOCK)) == 99 * 64
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES_MAX
    finally:
        tracemalloc.stop()


class _Disk:
    """Its size is all that the digests ask of it."""

    size_bytes = 64 * BLOCK


class _Agent:
    """Sends blocks as an agent does, the ledger first, and loses power. What the ledger holds survives: it is
    synchronized each time."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.medium = StorageMedium("state", self.draw)
        self.history: dict[int, bytes] = {}
        """By block the digest of what went out last."""
        self.ledger: list[SentRecord] = []
        self.sequence = 0
        self.start()
        self.changes.enter_epoch(1, parent_sequence=None, is_base_empty=True)

    def start(self) -> None:
        self.process = SimulatedProcess("agent")
        self.changes = ScanSource(
            disk=DISK,
            source=cast(SourceDisk, _Disk()),
            directory=SimulatedDirectory(self.medium, self.process),
            draw_random=self.draw.randbytes,
        )

    def send(self) -> None:
        blocks = self.draw.sample(range(64), self.draw.randint(1, 20))
        digests = [(block, self.draw.randbytes(16)) for block in blocks]
        self.sequence += 1
        extents = ExtentSet.of([(block * BLOCK, (block + 1) * BLOCK) for block in blocks])
        self.ledger.append(SentRecord(first_sequence=self.sequence, last_sequence=self.sequence, extents=extents))
        self.history |= dict(digests)
        if self.draw.random() < 0.2:
            self.changes.digests.forget(extents)
        else:
            self.changes.sent(self.sequence, [digests])
        if self.draw.random() < 0.2:
            self.changes.synchronize()
            self.ledger.clear()

    def lose_power(self) -> None:
        self.process.kill()
        self.medium.lose_power()
        self.start()


@pytest.mark.parametrize("first_seed", range(0, 200, 50))
def test_no_digest_is_wrong_wherever_the_power_goes(first_seed: int) -> None:
    known_blocks = torn = 0
    for seed in range(first_seed, first_seed + 50):
        agent = _Agent(seed)
        for _ in range(4):
            agent.process.kill_after_operations(agent.draw.randint(1, 60))
            with contextlib.suppress(ProcessKilled):
                while True:
                    agent.send()
            agent.lose_power()
            assert agent.changes.restore(1, agent.ledger, sent_sequence=agent.sequence)
            zero = agent.changes.digests.zero_digest(0)
            for block, digest in enumerate(agent.changes.digests.known(0, 64)):
                assert digest in (None, agent.history.get(block, zero)), f"seed {seed}, block {block}"
                known_blocks += digest is not None
                torn += digest is None
    assert known_blocks > torn > 0, "most is known still, and something was torn"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(forgotten=st.sets(st.integers(0, 2 * PAGE_ENTRIES + 4)), written=st.sets(st.integers(0, 2 * PAGE_ENTRIES + 4)))
def test_blocks_that_are_forgotten_are_unknown_and_no_others(
    tmp_path: Path, forgotten: set[int], written: set[int]
) -> None:
    file = make(tmp_path, blocks=2 * PAGE_ENTRIES + 5)
    file.write(3, ((block, b"x" * 16) for block in written))
    file.forget_blocks(forgotten)
    in_memory = file.known(0, file.block_count)
    file = reopened(tmp_path, file)
    known = file.known(0, file.block_count)
    assert known == in_memory
    assert {block for block, digest in enumerate(known) if digest is not None} == written - forgotten
    file.close()
