"""The ledger's bytes: which extents went out in which change set, kept until storage holds them.

An entry is whole or it is not there: a torn tail is cut at the last whole entry. An entry is durable before the last
frame of its change set leaves, so whatever a process server can have acknowledged is in here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy
from blake3 import blake3

from mobility_agent.core.dirty_map import RECORD_EXTENTS_MAX, SentRecord
from mobility_agent.core.extent_set import ExtentSet
from protocol.errors import InvalidValue
from protocol.vocabulary import EPOCH_MAX, SEQUENCE_MAX

MAGIC: Final = b"FPL1"
_HEAD: Final = struct.Struct("<4sIQQQI")
"""magic, epoch, first sequence, last sequence, acknowledged sequence, extent count."""
_CHECK_BYTES: Final = 8
ENTRY_BYTES_MAX: Final = _HEAD.size + 16 * RECORD_EXTENTS_MAX + _CHECK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerContents:
    """What a ledger says: its newest epoch, the highest sequence sent and acknowledged in it, and what is
    uncommitted."""

    epoch: int
    sent_sequence: int
    acknowledged_sequence: int
    records: tuple[SentRecord, ...]
    is_damaged: bool
    """More is unreadable than one torn entry can explain, or what is behind it can be read: entries may be lost."""


def encode_entry(*, epoch: int, acknowledged_sequence: int, record: SentRecord) -> bytes:
    """One entry. A record without extents only states how far the epoch has come."""
    table = numpy.stack((record.extents.first, record.extents.end), axis=1).astype("<i8").tobytes()
    head = _HEAD.pack(
        MAGIC, epoch, record.first_sequence, record.last_sequence, acknowledged_sequence, len(record.extents)
    )
    return head + table + blake3(head + table).digest(_CHECK_BYTES)


def standing_entry(*, epoch: int, sent_sequence: int, acknowledged_sequence: int) -> bytes:
    """An entry that says where the epoch stands and nothing else."""
    record = SentRecord(first_sequence=sent_sequence, last_sequence=sent_sequence, extents=ExtentSet.of())
    return encode_entry(epoch=epoch, acknowledged_sequence=acknowledged_sequence, record=record)


def replay(data: bytes) -> LedgerContents:
    """Reads entries up to the first that is not whole. Raises InvalidValue if there is not even one."""
    offset = 0
    epoch = sent = acknowledged = 0
    records: list[SentRecord] = []
    while (entry := _entry_at(data, offset)) is not None:
        entry_epoch, entry_acknowledged, record, length = entry
        if entry_epoch < epoch:
            break
        if entry_epoch > epoch:
            epoch, sent, acknowledged, records = entry_epoch, 0, 0, []
        if record.extents and records and record.first_sequence <= records[-1].last_sequence:
            break
        sent = max(sent, record.last_sequence)
        acknowledged = max(acknowledged, entry_acknowledged)
        if record.extents:
            records.append(record)
        offset += length
    if not epoch:
        raise InvalidValue(what="ledger", value=len(data), rule="must begin with a whole entry")
    return LedgerContents(
        epoch=epoch,
        sent_sequence=sent,
        acknowledged_sequence=acknowledged,
        records=tuple(records),
        is_damaged=len(data) - offset > ENTRY_BYTES_MAX or _is_entry_behind(data, offset),
    )


def _is_entry_behind(data: bytes, offset: int) -> bool:
    """Whether a whole entry lies anywhere from `offset` on: behind a torn one there is none."""
    at = data.find(MAGIC, offset)
    while at >= 0:
        if _entry_at(data, at) is not None:
            return True
        at = data.find(MAGIC, at + 1)
    return False


def _entry_at(data: bytes, offset: int) -> tuple[int, int, SentRecord, int] | None:
    """(epoch, acknowledged, record, length) of a whole, valid entry, else None."""
    if len(data) - offset < _HEAD.size + _CHECK_BYTES:
        return None
    magic, epoch, first_sequence, last_sequence, acknowledged, count = _HEAD.unpack_from(data, offset)
    if magic != MAGIC or count > RECORD_EXTENTS_MAX or not 1 <= epoch <= EPOCH_MAX or last_sequence > SEQUENCE_MAX:
        return None
    if not min(count, 1) <= first_sequence <= last_sequence:
        return None
    body_bytes = _HEAD.size + 16 * count
    if len(data) - offset < body_bytes + _CHECK_BYTES:
        return None
    body = data[offset : offset + body_bytes]
    if blake3(body).digest(_CHECK_BYTES) != data[offset + body_bytes : offset + body_bytes + _CHECK_BYTES]:
        return None
    table = numpy.frombuffer(body, dtype="<i8", offset=_HEAD.size).reshape(count, 2).astype(numpy.int64)
    if not (table[:, 0] >= 0).all():
        return None
    record = SentRecord(
        first_sequence=first_sequence,
        last_sequence=last_sequence,
        extents=ExtentSet.from_bounds(table[:, 0], table[:, 1]),
    )
    return epoch, acknowledged, record, body_bytes + _CHECK_BYTES
