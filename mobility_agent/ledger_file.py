"""The ledger of one disk on its durable directory.

What append() took survives power loss when it returns. The file is rewritten when most of it is settled history; the
caller synchronizes the digests before, because after it the rewritten entries no longer vouch for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mobility_agent.core.dirty_map import SentRecord
from mobility_agent.core.ledger import LedgerContents, encode_entry, replay, standing_entry
from mobility_agent.errors import AgentStateDamaged
from protocol.errors import InvalidValue
from runtime.directory import DurableDirectory, DurableFile

REWRITE_BYTES_MIN: Final = 256 * 2**10


def read_ledger(directory: DurableDirectory, name: str) -> LedgerContents | None:
    """None if there is none. Raises AgentStateDamaged if not even its first entry can be read."""
    try:
        data = directory.read(name)
    except FileNotFoundError:
        return None
    try:
        return replay(data)
    except InvalidValue as error:
        raise AgentStateDamaged(name=name, reason=str(error)) from error


class LedgerFile:
    """Appends to one disk's ledger. Calls block. After an OSError make a new one by rewrite()."""

    def __init__(self, directory: DurableDirectory, name: str) -> None:
        self._directory = directory
        self._name = name
        self._file: DurableFile | None = None
        self._end_bytes = 0
        self._fresh_bytes = 0

    @property
    def is_due_for_rewrite(self) -> bool:
        return self._end_bytes > max(REWRITE_BYTES_MIN, 4 * self._fresh_bytes)

    def rewrite(
        self, *, epoch: int, sent_sequence: int, acknowledged_sequence: int, records: Sequence[SentRecord]
    ) -> None:
        """Atomically makes this the whole ledger; durable on return."""
        data = standing_entry(
            epoch=epoch, sent_sequence=sent_sequence, acknowledged_sequence=acknowledged_sequence
        ) + b"".join(
            encode_entry(epoch=epoch, acknowledged_sequence=acknowledged_sequence, record=record) for record in records
        )
        self.close()
        self._directory.replace(self._name, data)
        self._file = self._directory.open(self._name)
        self._end_bytes = self._fresh_bytes = len(data)

    def append(self, *, epoch: int, acknowledged_sequence: int, record: SentRecord) -> None:
        """Durable on return."""
        self._append(encode_entry(epoch=epoch, acknowledged_sequence=acknowledged_sequence, record=record))

    def append_standing(self, *, epoch: int, sent_sequence: int, acknowledged_sequence: int) -> None:
        """Durable on return: how far the epoch has been sent and acknowledged."""
        self._append(
            standing_entry(epoch=epoch, sent_sequence=sent_sequence, acknowledged_sequence=acknowledged_sequence)
        )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, entry: bytes) -> None:
        if self._file is None:
            raise AgentStateDamaged(name=self._name, reason="it is not open")
        try:
            self._file.write(self._end_bytes, [entry])
            self._file.synchronize()
        except OSError as error:
            # why: after a failed write or sync nothing is certain about the file; only a rewrite makes it good again.
            self.close()
            raise AgentStateDamaged(name=self._name, reason=error.strerror or str(error)) from error
        self._end_bytes += len(entry)
