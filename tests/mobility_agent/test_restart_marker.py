"""The restart marker: every doubt alone and with any others, and every bit and length of its bytes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from pathlib import Path
from typing import Any

import pytest

from mobility_agent.core.restart_marker import (
    DIGEST_BYTES,
    SPARE_MARK_BYTES_MAX,
    Marker,
    StartFacts,
    StopFacts,
    decode_marker,
    encode_marker,
    judge_start,
    judge_stop,
)
from mobility_agent.core.resync_cause import NAME_BYTES_MAX, ResyncCause
from protocol.vocabulary import DiskId

DISK = DiskId("d" * 32)
CLEAN = Marker(
    disk=DISK,
    size_bytes=2**30,
    block_bytes=4096,
    boot_id=b"b" * 16,
    identity=b"i" * 32,
    witnesses=b"w" * 32,
    refused=None,
    marks=bytes(1000) + b"\x80" + bytes(31767),
)
AT_STOP = StopFacts(track_lost=None, users=(), is_quiet=True, is_witnessed=True)
AT_START = StartFacts(
    disk=DISK,
    size_bytes=2**30,
    block_bytes=4096,
    mark_bytes=len(CLEAN.marks),
    boot_id=b"another boot, 16",
    identity=b"i" * 32,
    witnesses=b"w" * 32,
    users=(),
    sectors_written=0,
    writes_in_flight=0,
    counts_io=True,
)
STOP_DOUBTS: list[tuple[dict[str, Any], ResyncCause]] = [
    ({"track_lost": ResyncCause.WRITES_MISSED}, ResyncCause.WRITES_MISSED),
    ({"is_witnessed": False}, ResyncCause.UNWITNESSED_CONTENTS),
    ({"users": ("/srv",)}, ResyncCause.IN_USE_AT_STOP),
    ({"is_quiet": False}, ResyncCause.RESTLESS_AT_STOP),
]
START_DOUBTS: list[tuple[dict[str, Any], ResyncCause]] = [
    ({"boot_id": CLEAN.boot_id}, ResyncCause.MARKER_OF_THIS_BOOT),
    ({"disk": DiskId("e" * 32)}, ResyncCause.MARKER_OF_ANOTHER_DISK),
    ({"size_bytes": 2**30 + 512}, ResyncCause.MARKER_OF_ANOTHER_DISK),
    ({"block_bytes": 8192}, ResyncCause.MARKER_OF_ANOTHER_DISK),
    ({"mark_bytes": len(CLEAN.marks) + 4096}, ResyncCause.MARKER_OF_ANOTHER_DISK),
    ({"identity": b"j" * 32}, ResyncCause.MARKER_OF_ANOTHER_DISK),
    ({"sectors_written": 8}, ResyncCause.WRITTEN_BEFORE_TRACKING),
    ({"writes_in_flight": 1}, ResyncCause.WRITTEN_BEFORE_TRACKING),
    ({"counts_io": False}, ResyncCause.WRITTEN_BEFORE_TRACKING),
    ({"users": ("/srv",)}, ResyncCause.IN_USE_BEFORE_TRACKING),
    ({"witnesses": b"v" * 32}, ResyncCause.CHANGED_WHILE_DOWN),
    ({"witnesses": None}, ResyncCause.CHANGED_WHILE_DOWN),
]


def some_of(doubts: list[tuple[dict[str, Any], ResyncCause]]) -> list[tuple[dict[str, Any], ResyncCause | None]]:
    """Every subset of them: what differs, and the first one's cause."""
    found: list[tuple[dict[str, Any], ResyncCause | None]] = []
    for count in range(len(doubts) + 1):
        for chosen in itertools.combinations(doubts, count):
            differing: dict[str, Any] = {}
            for change, _ in reversed(chosen):
                differing |= change
            found.append((differing, chosen[0][1] if chosen else None))
    return found


def test_a_stop_is_clean_only_without_any_doubt_and_the_first_doubt_names_it() -> None:
    for differing, cause in some_of(STOP_DOUBTS):
        assert judge_stop(dataclasses.replace(AT_STOP, **differing)) == cause, differing


def test_a_marker_is_believed_only_without_any_doubt_and_the_first_doubt_names_the_cause() -> None:
    for differing, cause in some_of(START_DOUBTS):
        assert judge_start(CLEAN, dataclasses.replace(AT_START, **differing)) == cause, differing


def test_each_fact_of_a_start_has_a_doubt() -> None:
    doubted = {name for differing, _ in START_DOUBTS for name in differing}
    assert doubted == {field.name for field in dataclasses.fields(StartFacts)}
    assert {name for differing, _ in STOP_DOUBTS for name in differing} == {
        field.name for field in dataclasses.fields(StopFacts)
    }


@pytest.mark.parametrize("cause", ResyncCause)
def test_why_a_stop_was_not_clean_is_told_after_the_restart_whatever_else_holds(cause: ResyncCause) -> None:
    refused = dataclasses.replace(CLEAN, refused=cause, marks=b"")
    for differing, _ in START_DOUBTS:
        assert judge_start(refused, dataclasses.replace(AT_START, **differing)) is cause
    assert judge_start(refused, AT_START) is cause
    assert decode_marker(encode_marker(refused)) == refused
    assert len(cause) <= NAME_BYTES_MAX


def test_no_marker_and_a_damaged_one_are_never_believed() -> None:
    assert judge_start(decode_marker(None), AT_START) is ResyncCause.NO_CLEAN_STOP
    assert judge_start(decode_marker(b""), AT_START) is ResyncCause.MARKER_DAMAGED


def test_a_marker_comes_back_as_it_was_and_is_small() -> None:
    data = encode_marker(CLEAN)
    assert decode_marker(data) == CLEAN
    assert len(data) < 1000, "marks compress"
    busy = dataclasses.replace(CLEAN, marks=os.urandom(2**15))
    assert decode_marker(encode_marker(busy)) == busy


def test_every_changed_byte_every_cut_and_every_addition_is_noticed() -> None:
    data = encode_marker(CLEAN)
    for at in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            assert decode_marker(bytes(changed)) is ResyncCause.MARKER_DAMAGED
        assert decode_marker(data[:at]) is ResyncCause.MARKER_DAMAGED
        assert decode_marker(data[:at] + bytes(len(data) - at)) is ResyncCause.MARKER_DAMAGED, "a torn write"
    assert decode_marker(data + b"\0") is ResyncCause.MARKER_DAMAGED


def test_marks_that_no_disk_of_its_size_has_are_refused() -> None:
    too_many = CLEAN.size_bytes // CLEAN.block_bytes // 8 + SPARE_MARK_BYTES_MAX + 1
    assert isinstance(decode_marker(encode_marker(dataclasses.replace(CLEAN, marks=bytes(too_many - 1)))), Marker)
    bomb = encode_marker(dataclasses.replace(CLEAN, marks=bytes(too_many)))
    assert decode_marker(bomb) is ResyncCause.MARKER_DAMAGED
    assert len(bomb) - DIGEST_BYTES < 1000


def test_every_cause_is_explained_to_operators() -> None:
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text("utf-8")
    assert re.findall(r"^\| `([a-z_]+)` \| [^|]{20,} \|$", page, re.MULTILINE) == list(ResyncCause)
