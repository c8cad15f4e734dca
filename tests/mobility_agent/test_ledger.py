"""The ledger: whole entries or none, whatever a power cut leaves; rewritten when most of it is history."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobility_agent import ledger_file
from mobility_agent.core.dirty_map import SentRecord
from mobility_agent.core.extent_set import ExtentSet
from mobility_agent.core.ledger import ENTRY_BYTES_MAX, encode_entry, replay, standing_entry
from mobility_agent.errors import AgentStateDamaged
from mobility_agent.ledger_file import LedgerFile, read_ledger
from protocol.errors import InvalidValue
from runtime.local_directory import LocalDirectory


def record(sequence: int, *ranges: tuple[int, int]) -> SentRecord:
    return SentRecord(first_sequence=sequence, last_sequence=sequence, extents=ExtentSet.of(ranges or [(0, 65536)]))


def entries(count: int) -> list[bytes]:
    start = standing_entry(epoch=1, sent_sequence=0, acknowledged_sequence=0)
    return [start] + [
        encode_entry(epoch=1, acknowledged_sequence=sequence - 1, record=record(sequence, (sequence * 65536, 10**9)))
        for sequence in range(1, count + 1)
    ]


def test_what_was_written_is_read_back() -> None:
    contents = replay(b"".join(entries(3)))
    assert (contents.epoch, contents.sent_sequence, contents.acknowledged_sequence) == (1, 3, 2)
    assert [one.last_sequence for one in contents.records] == [1, 2, 3]
    assert list(contents.records[1].extents) == [(2 * 65536, 10**9)]


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_torn_tail_is_cut_at_the_last_whole_entry(cut: int) -> None:
    data = b"".join(entries(2))
    contents = replay(data[:-cut])
    assert [one.last_sequence for one in contents.records] == [1]
    assert not contents.is_damaged


@given(st.data())
def test_a_flipped_byte_never_yields_an_entry_that_was_not_written(data: st.DataObject) -> None:
    pieces = entries(3)
    whole = bytearray(b"".join(pieces))
    place = data.draw(st.integers(len(pieces[0]), len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    contents = replay(bytes(whole))
    assert [one.last_sequence for one in contents.records] in ([], [1], [1, 2])


def test_damage_that_no_torn_entry_explains_is_told() -> None:
    data = bytearray(b"".join(entries(2)))
    data[len(entries(0)[0]) + 5] ^= 1
    assert replay(bytes(data) + bytes(ENTRY_BYTES_MAX)).is_damaged


def test_a_newer_epoch_replaces_the_older_one() -> None:
    data = b"".join(entries(2)) + standing_entry(epoch=2, sent_sequence=0, acknowledged_sequence=0)
    contents = replay(data)
    assert (contents.epoch, contents.sent_sequence, contents.records) == (2, 0, ())


def test_a_ledger_without_a_first_entry_is_refused() -> None:
    for data in (b"", b"x" * 100):
        with pytest.raises(InvalidValue):
            replay(data)


def test_the_file_keeps_what_was_appended_and_forgets_what_was_rewritten_away(tmp_path: Path) -> None:
    directory = LocalDirectory(tmp_path)
    ledger = LedgerFile(directory, "x.ledger")
    with pytest.raises(AgentStateDamaged):
        ledger.append(epoch=1, acknowledged_sequence=0, record=record(1))
    ledger.rewrite(epoch=1, sent_sequence=0, acknowledged_sequence=0, records=())
    for sequence in (1, 2, 3):
        ledger.append(epoch=1, acknowledged_sequence=0, record=record(sequence))
    contents = read_ledger(directory, "x.ledger")
    assert contents is not None
    assert contents.sent_sequence == 3
    ledger.rewrite(epoch=1, sent_sequence=3, acknowledged_sequence=2, records=contents.records[2:])
    ledger.append_standing(epoch=1, sent_sequence=3, acknowledged_sequence=3)
    ledger.close()
    contents = read_ledger(directory, "x.ledger")
    assert contents is not None
    assert [one.last_sequence for one in contents.records] == [3]
    assert contents.acknowledged_sequence == 3
    assert read_ledger(directory, "none.ledger") is None


def test_a_long_ledger_asks_to_be_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_file, "REWRITE_BYTES_MIN", 500)
    ledger = LedgerFile(LocalDirectory(tmp_path), "x.ledger")
    ledger.rewrite(epoch=1, sent_sequence=0, acknowledged_sequence=0, records=())
    sequence = 0
    while not ledger.is_due_for_rewrite:
        sequence += 1
        ledger.append(epoch=1, acknowledged_sequence=0, record=record(sequence))
    assert 3 < sequence < 50
    ledger.rewrite(epoch=1, sent_sequence=sequence, acknowledged_sequence=0, records=())
    assert not ledger.is_due_for_rewrite
    ledger.close()
