"""What of one disk the store does not certainly hold yet: dirty, being sent, sent, or acknowledged.

An extent that was marked is in at least one of these until a commit covers the bytes read after the mark; it is
never in none of them. Only `committed` forgets. The map is bounded: it grows coarser instead of larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mobility_agent.core.extent_set import ExtentSet
from protocol.errors import InvalidValue
from protocol.vocabulary import DIGEST_BLOCK_BYTES

DIRTY_EXTENTS_MAX: Final = 65536
SENT_EXTENTS_MAX: Final = 65536
"""Over all sent records of a disk; beyond it neighbours are merged and coarsened."""
RECORD_EXTENTS_MAX: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SentRecord:
    """The extents of the change sets [first_sequence, last_sequence], which are sent and not known to be committed."""

    first_sequence: int
    last_sequence: int
    extents: ExtentSet


class DirtyMap:
    """The map of one disk within one epoch."""

    def __init__(self, *, disk_size_bytes: int) -> None:
        self._disk_size_bytes = disk_size_bytes
        self._dirty = ExtentSet.of()
        self._being_sent = ExtentSet.of()
        self._records: list[SentRecord] = []
        self._sent_extents = 0

    @property
    def dirty(self) -> ExtentSet:
        return self._dirty

    @property
    def being_sent(self) -> ExtentSet:
        return self._being_sent

    @property
    def records(self) -> tuple[SentRecord, ...]:
        """Sent and uncommitted, ascending."""
        return tuple(self._records)

    @property
    def backlog_bytes(self) -> int:
        """What is not committed, counted once per place it is in."""
        sent = sum(record.extents.total_bytes for record in self._records)
        return self._dirty.total_bytes + self._being_sent.total_bytes + sent

    def everything(self) -> ExtentSet:
        """The union of all that is remembered."""
        union = self._dirty | self._being_sent
        for record in self._records:
            union |= record.extents
        return union

    def mark(self, extents: ExtentSet) -> None:
        """These changed, or the copy of them was lost."""
        self._dirty = self._bounded(self._dirty | extents, DIRTY_EXTENTS_MAX)

    def take(self, extents: ExtentSet) -> None:
        """These are about to be read for the change set in work. Call it before the read begins.

        What is marked while they are read is dirty again and stays so.
        """
        self._dirty = self._dirty - extents
        self._being_sent = self._bounded(self._being_sent | extents, DIRTY_EXTENTS_MAX)

    def unchanged(self, extents: ExtentSet) -> None:
        """Read after take(), compared, and found to be what the history holds already: nothing to send."""
        self._being_sent = self._being_sent - extents

    def sent(self, sequence: int, extents: ExtentSet) -> SentRecord:
        """The change set is complete and carries these; the record is what the ledger must keep. Call it before the
        last frame leaves. Raises InvalidValue for a sequence that does not rise."""
        if self._records and sequence <= self._records[-1].last_sequence:
            raise InvalidValue(what="sequence", value=sequence, rule="must rise")
        record = SentRecord(
            first_sequence=sequence, last_sequence=sequence, extents=self._bounded(extents, RECORD_EXTENTS_MAX)
        )
        self._being_sent = self._being_sent - extents
        if record.extents:
            self._records.append(record)
            self._sent_extents += len(record.extents)
            self._bound_records()
        return record

    def committed(self, sequence: int) -> bool:
        """Change sets ≤ sequence can be read in storage. Returns whether anything was forgotten."""
        kept = [record for record in self._records if record.last_sequence > sequence]
        forgot = len(kept) < len(self._records)
        self._replace_records(kept)
        return forgot

    def interrupted(self, durable_sequence: int) -> ExtentSet:
        """The stream ended and only change sets ≤ durable_sequence survive. All else is dirty again and returned."""
        lost = self._being_sent
        for record in self._records:
            if record.last_sequence > durable_sequence:
                lost |= record.extents
        self._replace_records([record for record in self._records if record.last_sequence <= durable_sequence])
        self._being_sent = ExtentSet.of()
        self.mark(lost)
        return lost

    def new_epoch(self) -> None:
        """The history goes on from a parent position: what it contains is committed there; the dirty stays dirty.

        Call interrupted(parent sequence) first.
        """
        self._replace_records([])

    def restore(self, record: SentRecord) -> None:
        """Takes back a record of the ledger after a restart. Raises InvalidValue for one that does not follow."""
        if self._records and record.first_sequence <= self._records[-1].last_sequence:
            raise InvalidValue(what="sequence", value=record.first_sequence, rule="must rise")
        self._records.append(record)
        self._sent_extents += len(record.extents)

    def _bounded(self, extents: ExtentSet, extents_max: int) -> ExtentSet:
        return extents.coarsened(
            extents_max=extents_max, granularity_bytes=DIGEST_BLOCK_BYTES, disk_size_bytes=self._disk_size_bytes
        )

    def _replace_records(self, records: list[SentRecord]) -> None:
        self._records = records
        self._sent_extents = sum(len(record.extents) for record in records)

    def _bound_records(self) -> None:
        """Merges neighbours until the extents fit. A merged record is committed only when all of it
        is."""
        while self._sent_extents > SENT_EXTENTS_MAX and len(self._records) > 1:
            merged = []
            for left, right in zip(self._records[0::2], self._records[1::2], strict=False):
                merged.append(
                    SentRecord(
                        first_sequence=left.first_sequence,
                        last_sequence=right.last_sequence,
                        extents=self._bounded(left.extents | right.extents, RECORD_EXTENTS_MAX),
                    )
                )
            if len(self._records) % 2:
                merged.append(self._records[-1])
            self._replace_records(merged)
