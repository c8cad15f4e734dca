"""Single bits and every length of small files: nothing else is read than what was written, and nothing crashes.

Every length and, of the bits, one in so many; `make fuzz` takes every one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import structlog

from mobility_agent.core.ledger import replay
from tests.fuzz import agent_targets, cache_files
from tests.fuzz.damage import DAMAGEABLE, Damageable, UndetectedError, refused

BITS_TRIED = 1500
LENGTHS_TRIED = 700


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    kept = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    yield
    structlog.configure(**kept)


def stride_of(count: int, tried: int) -> int:
    """Odd, so that all bits of a byte have their turn."""
    return max(1, count // tried) | 1


@pytest.mark.parametrize("file", DAMAGEABLE, ids=lambda file: file.name)
def test_no_flipped_bit_changes_what_is_read_unnoticed(file: Damageable) -> None:
    stride = stride_of(8 * len(file.data()), BITS_TRIED)
    for _, damaged in itertools.islice(file.every_bit(), 0, None, stride):
        file.check(damaged)


@pytest.mark.parametrize("file", DAMAGEABLE, ids=lambda file: file.name)
def test_no_cut_changes_what_is_read_unnoticed(file: Damageable) -> None:
    stride = stride_of(len(file.data()), LENGTHS_TRIED)
    for _, damaged in itertools.islice(file.every_length(), 0, None, stride):
        file.check(damaged)


def test_a_reader_that_takes_damage_is_found() -> None:
    with pytest.raises(UndetectedError):
        refused(bytes)(b"anything")


def test_the_cache_in_the_example_holds_what_a_cache_can_hold() -> None:
    found = cache_files.taken(cache_files.cache_bytes())
    disk = found[cache_files.DISK]
    assert (disk.position.sequence, disk.durable_sequence, len(disk.waiting)) == (2, 4, 1)
    assert len(cache_files.acknowledged()[cache_files.DISK]) == 10


def test_entries_lost_in_the_middle_of_a_ledger_are_told_by_those_behind_them() -> None:
    first, second, third = agent_targets.ledger_entries()[:3]
    damaged = bytearray(first + second + third)
    damaged[len(first) + 40] ^= 1
    contents = replay(bytes(damaged))
    assert contents.is_damaged
    assert not replay(first + second + third[:-1]).is_damaged
