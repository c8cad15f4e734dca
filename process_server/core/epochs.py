"""Decides in which epoch a disk goes on when an agent opens it, from what is granted, known, and asked for.

Invariants: only a granted epoch is ever chosen; never one below what is known here or what the agent has seen; a new
epoch is begun only when the agent asks for one or the grants leave no other.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from protocol.errors import NoGrant, StaleEpoch
from protocol.vocabulary import DiskId


class EpochStep(enum.Enum):
    """CONTINUE: in the epoch that is known here. LOOK: ask the store where the epoch stands. BEGIN: a new one."""

    CONTINUE = "continue"
    LOOK = "look"
    BEGIN = "begin"


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochChoice:
    """What to do, and in which epoch."""

    step: EpochStep
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownEpoch:
    """The epoch that the disk's history is in here, and whether there has been anything in it."""

    epoch: int
    is_used: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedEpoch:
    """What the agent's OpenDisk says: the newest epoch that it knows (0: none), and whether it wants to leave it."""

    epoch: int
    wants_new: bool


def choose_epoch(disk: DiskId, *, granted: Sequence[int], known: KnownEpoch | None, asked: AskedEpoch) -> EpochChoice:
    """granted: the epochs for which this process server holds a grant, in any order.

    Raises NoGrant (retryable) where a grant is still to come, StaleEpoch where the agent is ahead of all grants.
    """
    if not granted:
        raise NoGrant(disk=disk)
    lowest, highest = min(granted), max(granted)
    if asked.epoch > highest:
        raise StaleEpoch(disk=disk, epoch=highest, current=asked.epoch)
    floor = asked.epoch + 1 if asked.wants_new else max(asked.epoch, 1)
    if known is None:
        return EpochChoice(step=EpochStep.LOOK, epoch=_first_granted(disk, granted, lowest))
    is_usable = known.epoch in granted and known.epoch >= floor
    if is_usable and not (asked.wants_new and known.is_used):
        return EpochChoice(step=EpochStep.CONTINUE, epoch=known.epoch)
    return EpochChoice(step=EpochStep.BEGIN, epoch=_first_granted(disk, granted, max(floor, known.epoch + 1)))


def _first_granted(disk: DiskId, granted: Sequence[int], floor: int) -> int:
    found = [epoch for epoch in granted if epoch >= floor]
    if not found:
        raise NoGrant(disk=disk)
    return min(found)
