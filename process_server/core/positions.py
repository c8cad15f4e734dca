"""Where one disk stands in one epoch: received, durable, committed.

Invariants: committed ≤ durable ≤ received; each only rises, and durable and committed never pass over a change set that
is not yet so. A new epoch starts new positions; they are never carried over.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from process_server.errors import PositionOutOfOrder
from protocol.vocabulary import EPOCH_MAX, SEQUENCE_MAX, check_range


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPositions:
    """Sequences within `epoch`; 0 is the epoch's start, before its first change set."""

    epoch: int
    received: int
    durable: int
    committed: int

    def __post_init__(self) -> None:
        check_range(self.epoch, "epoch", low=1, high=EPOCH_MAX)
        check_range(self.received, "received", low=0, high=SEQUENCE_MAX)
        if not self.committed <= self.durable <= self.received:
            raise PositionOutOfOrder(
                epoch=self.epoch, received=self.received, durable=self.durable, committed=self.committed
            )

    @staticmethod
    def at(epoch: int, *, durable: int, committed: int) -> DiskPositions:
        """Positions of a history at rest: nothing is on its way that is not durable."""
        return DiskPositions(epoch=epoch, received=durable, durable=durable, committed=committed)

    def with_received(self, sequence: int) -> DiskPositions:
        """The next change set was read off the wire whole. Raises PositionOutOfOrder unless it is the next."""
        if sequence != self.received + 1:
            raise self._out_of_order(received=sequence)
        return dataclasses.replace(self, received=sequence)

    def with_durable(self, sequence: int) -> DiskPositions:
        """All change sets up to `sequence` are synchronized in the cache. Raises PositionOutOfOrder if that falls or
        overtakes.
        """
        if not self.durable <= sequence <= self.received:
            raise self._out_of_order(durable=sequence)
        return dataclasses.replace(self, durable=sequence)

    def with_committed(self, sequence: int) -> DiskPositions:
        """All change sets up to `sequence` are readable in the store. Raises PositionOutOfOrder if that falls or
        overtakes.
        """
        if not self.committed <= sequence <= self.durable:
            raise self._out_of_order(committed=sequence)
        return dataclasses.replace(self, committed=sequence)

    def without_unfinished(self) -> DiskPositions:
        """What was received and is not durable is forgotten: its connection is gone, the agent sends it again."""
        return dataclasses.replace(self, received=self.durable)

    def _out_of_order(self, **changed: int) -> PositionOutOfOrder:
        fields = {"received": self.received, "durable": self.durable, "committed": self.committed} | changed
        return PositionOutOfOrder(epoch=self.epoch, **fields)
