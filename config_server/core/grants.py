"""Which epochs of a disk are to be granted: the one in use and one spare.

The spare lets an epoch change while this server is away. For one epoch at most one grant is ever signed; what was
signed is kept and given out again, byte for byte.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from protocol.vocabulary import EPOCH_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantNeed:
    """An epoch to be granted, continuing parent_epoch (0: a history that begins at nothing)."""

    epoch: int
    parent_epoch: int
    is_spare: bool


def wanted_epochs(newest_used_epoch: int) -> tuple[int, ...]:
    """newest_used_epoch: the highest that was reported, 0 if none. Returns the epoch in use, then the spare."""
    present = max(newest_used_epoch, 1)
    return tuple(epoch for epoch in (present, present + 1) if epoch <= EPOCH_MAX)


def missing_grants(newest_used_epoch: int, granted: Collection[int]) -> tuple[GrantNeed, ...]:
    """What is still to be signed, lowest epoch first."""
    present, *_ = wanted_epochs(newest_used_epoch)
    return tuple(
        GrantNeed(epoch=epoch, parent_epoch=epoch - 1, is_spare=epoch > present)
        for epoch in wanted_epochs(newest_used_epoch)
        if epoch not in granted
    )
