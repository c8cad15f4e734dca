"""What this agent knows of one disk's history: dirty map, ledger and digests, kept in step with each other.

The order that makes a crash harmless: an extent is in the durable ledger before the last frame of its change set
leaves; digests are written behind the ledger; the ledger drops an entry only after the digests were synchronized or
made unknown.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from mobility_agent.core.dirty_map import DirtyMap
from mobility_agent.core.extent_set import ExtentSet
from mobility_agent.core.ledger import LedgerContents
from mobility_agent.core.replication import Opening, Relation, Standing
from mobility_agent.errors import AgentStateDamaged
from mobility_agent.ledger_file import LedgerFile, read_ledger
from mobility_agent.ports import SourceDisk
from mobility_agent.tracking.change_source import ChangeSource
from protocol.messages import DiskOpened
from protocol.vocabulary import DiskId
from runtime.directory import DurableDirectory

UNKNOWN = Standing(epoch=0, sent_sequence=0, acknowledged_sequence=0)


class DiskHistory:
    """Methods that block say so; the others are for the event loop. Errors: AgentStateDamaged, OSError."""

    def __init__(self, *, disk: DiskId, source: SourceDisk, changes: ChangeSource, directory: DurableDirectory) -> None:
        self._disk = disk
        self._directory = directory
        self._size_bytes = source.size_bytes
        self._ledger = LedgerFile(directory, ledger_name(disk))
        self._lock = threading.Lock()
        self._map = DirtyMap(disk_size_bytes=source.size_bytes)
        self._standing = UNKNOWN
        self._acknowledged_on_disk = 0
        self.changes = changes
        self.source = source

    @property
    def standing(self) -> Standing:
        with self._lock:
            return self._standing

    @property
    def backlog_bytes(self) -> int:
        with self._lock:
            return self._map.backlog_bytes

    @property
    def is_anything_dirty(self) -> bool:
        """Whether something is known to be missing in the stream and was not taken by the round in work."""
        with self._lock:
            return bool(self._map.dirty)

    @property
    def is_standing_due(self) -> bool:
        """Whether everything sent was acknowledged and the ledger does not say so yet."""
        with self._lock:
            acknowledged = self._standing.acknowledged_sequence
            return acknowledged > self._acknowledged_on_disk and acknowledged == self._standing.sent_sequence

    def load(self) -> None:
        """Takes up what the state directory holds. Blocks. What cannot be read counts as unknown, and is sent again."""
        try:
            contents = read_ledger(self._directory, ledger_name(self._disk))
        except AgentStateDamaged:
            contents = None
        if contents is None or contents.is_damaged or not self._restore_changes(contents):
            self.changes.restore(0, ())
            return
        with self._lock:
            for record in contents.records:
                self._map.restore(record)
            self._standing = Standing(
                epoch=contents.epoch,
                sent_sequence=contents.sent_sequence,
                acknowledged_sequence=contents.acknowledged_sequence,
            )

    def _restore_changes(self, contents: LedgerContents) -> bool:
        return self.changes.restore(contents.epoch, contents.records, sent_sequence=contents.sent_sequence)

    def enter(self, opening: Opening, opened: DiskOpened) -> None:
        """Takes over where the process server says that the history stands. Blocks; durable on return."""
        if opening.relation is Relation.SAME_EPOCH:
            self._resume(opened)
        else:
            self._enter_epoch(opening, opened)
        self._write_ledger()

    def _resume(self, opened: DiskOpened) -> None:
        with self._lock:
            lost = self._map.interrupted(opened.durable_sequence)
        self.changes.forget(lost)
        self.changes.synchronize()
        with self._lock:
            self._map.committed(opened.committed_sequence)
            self._stand_at(opened)

    def _enter_epoch(self, opening: Opening, opened: DiskOpened) -> None:
        is_continued = opening.relation is Relation.CONTINUED
        with self._lock:
            lost = self._map.interrupted(opened.parent_sequence if is_continued else 0)
        self.changes.forget(lost)
        self.changes.enter_epoch(
            opened.epoch,
            parent_sequence=opened.parent_sequence if is_continued else None,
            is_base_empty=opening.is_base_empty,
        )
        if opening.is_base_empty and opening.cursor_bytes:
            # why: only what lies behind the cursor was never sent; what lies before it is there, but unknown to us.
            self.changes.forget(ExtentSet.of([(0, min(opening.cursor_bytes, self._size_bytes))]))
        with self._lock:
            self._map.new_epoch()
            self._stand_at(opened)

    def _stand_at(self, opened: DiskOpened) -> None:
        self._standing = Standing(
            epoch=opened.epoch,
            sent_sequence=opened.durable_sequence,
            acknowledged_sequence=opened.durable_sequence,
        )

    def begin_round(self, *, first_bytes: int) -> None:
        """All that is dirty behind first_bytes is about to be read."""
        with self._lock:
            self._map.take(self._map.dirty & ExtentSet.of([(first_bytes, self._size_bytes)]))

    def take(self, extents: ExtentSet) -> None:
        """These were found changed and go out in the change set in work."""
        with self._lock:
            self._map.take(extents)

    def end_round(self) -> None:
        """The round's last change set is complete: what it took and did not send was found to be in the history."""
        with self._lock:
            self._map.unchanged(self._map.being_sent)

    def complete(self, sequence: int, extents: ExtentSet, receipts: Sequence[Any]) -> None:
        """Change set `sequence` is whole but for its last frame, which may leave when this returns. Blocks; durable."""
        with self._lock:
            record = self._map.sent(sequence, extents)
            epoch, acknowledged = self._standing.epoch, self._standing.acknowledged_sequence
            self._standing = Standing(epoch=epoch, sent_sequence=sequence, acknowledged_sequence=acknowledged)
        self._ledger.append(epoch=epoch, acknowledged_sequence=acknowledged, record=record)
        self._acknowledged_on_disk = acknowledged
        self.changes.sent(sequence, receipts)
        if self._ledger.is_due_for_rewrite:
            self.changes.synchronize()
            self._write_ledger()

    def positions(self, *, durable_sequence: int, committed_sequence: int) -> None:
        """What the process server said."""
        with self._lock:
            standing = self._standing
            self._standing = Standing(
                epoch=standing.epoch,
                sent_sequence=standing.sent_sequence,
                acknowledged_sequence=max(standing.acknowledged_sequence, durable_sequence),
            )
            self._map.committed(committed_sequence)

    def write_standing(self) -> None:
        """Makes durable what was acknowledged. Blocks."""
        standing = self.standing
        self._ledger.append_standing(
            epoch=standing.epoch,
            sent_sequence=standing.sent_sequence,
            acknowledged_sequence=standing.acknowledged_sequence,
        )
        self._acknowledged_on_disk = standing.acknowledged_sequence
        if standing.acknowledged_sequence == standing.sent_sequence:
            self.changes.acknowledged(standing.acknowledged_sequence)

    def close(self) -> None:
        """Blocks. Everything is durable already; the next agent load()s it."""
        self._ledger.close()
        self.changes.close()
        self.source.close()

    def _write_ledger(self) -> None:
        with self._lock:
            standing, records = self._standing, self._map.records
        self._ledger.rewrite(
            epoch=standing.epoch,
            sent_sequence=standing.sent_sequence,
            acknowledged_sequence=standing.acknowledged_sequence,
            records=records,
        )
        self._acknowledged_on_disk = standing.acknowledged_sequence
        self.changes.remove_other_epochs()


def ledger_name(disk: DiskId) -> str:
    return f"{disk}.ledger"


def forget_disk(directory: DurableDirectory, disk: DiskId) -> None:
    """Removes all that the state directory holds of a disk. Blocks."""
    for name in directory.names():
        if name.startswith(f"{disk}."):
            directory.remove(name)
