"""Defects of the mobility agent."""

from __future__ import annotations

import dataclasses
from typing import Any

import mobility_agent.rounds
import mobility_agent.service
from mobility_agent.core.dirty_map import DirtyMap, SentRecord
from mobility_agent.core.extent_set import ExtentSet
from mobility_agent.disk_history import DiskHistory
from mobility_agent.rounds import RoundSender
from mobility_agent.tracking.change_source import Promise, RoundEnd
from mobility_agent.tracking.scan import ScanRound, ScanSource
from protocol.vocabulary import SEQUENCE_MAX
from tests.simulation.planted.seams import counted, replace


def clear_before_acknowledge() -> None:
    """The agent forgets what it sent as soon as it has sent it."""

    def make(sent: Any) -> Any:
        def send_and_forget(self: DirtyMap, sequence: int, extents: ExtentSet) -> SentRecord:
            record: SentRecord = sent(self, sequence, extents)
            self.committed(sequence)
            return SentRecord(
                first_sequence=record.first_sequence, last_sequence=record.last_sequence, extents=ExtentSet.of()
            )

        return counted(send_and_forget)

    replace(DirtyMap, "sent", make)


def forget_at_durable() -> None:
    """What is acknowledged is taken for committed: forgotten before storage holds it, and never missed there."""

    def make(positions: Any) -> Any:
        def take_durable_for_committed(self: Any, *, durable_sequence: int, committed_sequence: int) -> None:
            positions(self, durable_sequence=durable_sequence, committed_sequence=durable_sequence)

        return counted(take_durable_for_committed)

    def make_entering(enter_epoch: Any) -> Any:
        def enter(self: Any, epoch: int, *, parent_sequence: int | None, is_base_empty: bool) -> None:
            contained = None if parent_sequence is None else SEQUENCE_MAX
            enter_epoch(self, epoch, parent_sequence=contained, is_base_empty=is_base_empty)

        return counted(enter)

    replace(DiskHistory, "positions", make)
    # why: what an epoch's parent does not contain is found twice, in the map and by the digests' positions
    replace(ScanSource, "enter_epoch", make_entering)


def forget_what_was_interrupted() -> None:
    """What a broken connection took with it is not dirty again."""

    def make(interrupted: Any) -> Any:
        def lose(self: DirtyMap, durable_sequence: int) -> ExtentSet:
            before = self.dirty
            interrupted(self, durable_sequence)
            self._dirty = before
            return ExtentSet.of()

        return counted(lose)

    replace(DirtyMap, "interrupted", make)


def keep_digests_of_the_lost() -> None:
    """The digests of what was lost stay, so that it looks unchanged."""
    replace(ScanSource, "forget", lambda forget: counted(lambda self, extents: None))


def settle_without_stillness() -> None:
    """A round counts as settled whether or not the disk was proved still."""

    def make(is_settled: Any) -> Any:
        def settle(**facts: Any) -> bool:
            settled: bool = is_settled(**{**facts, "is_still": True})
            return settled

        return counted(settle)

    replace(mobility_agent.rounds, "is_settled", make)


def overlook_a_broken_proof() -> None:
    """A proof that was broken while the disk was read passes for one that held."""

    def make(end: Any) -> Any:
        def end_well(self: ScanRound) -> RoundEnd:
            return dataclasses.replace(end(self), promise=Promise.COPY_IN_VALIDATED, reason="")

        return counted(end_well)

    replace(ScanRound, "end", make)
    replace(ScanRound, "_break", lambda break_off: counted(lambda self, reason: None))


def prove_stillness_too_late() -> None:
    """The disk is proved still when it has been read, not from the first read on."""

    def make(end: Any) -> Any:
        def prove_and_end(self: ScanRound) -> RoundEnd:
            if self._proof is not None:
                self._proof.end()
                self._proof = self._source.begin_stillness()
            result: RoundEnd = end(self)
            return result

        return counted(prove_and_end)

    replace(ScanRound, "end", make)
    replace(ScanRound, "is_still", lambda is_still: counted(lambda self: self._proof is not None))


def date_by_the_own_clock() -> None:
    """A point's instant is the agent's own wall clock's."""

    def make(bookmark: Any) -> Any:
        return counted(lambda self, instant_ns: bookmark(self, instant_ns and self._ports.clock.now_ns()))

    replace(RoundSender, "_bookmark", make)


def forget_orders() -> None:
    """An agent keeps no orders for a start without the configuration server."""
    replace(mobility_agent.service, "write_orders", lambda write: counted(lambda directory, orders: None))
