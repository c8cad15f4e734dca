"""Which torment comes when, by seed and lane alone.

Invariant: what a step does depends on its seed, lane and number, never on how long anything took.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Final

from tests.torture.connections import BadConnections
from tests.torture.disk_errors import DiskErrors, RecoveryErrors
from tests.torture.full_disks import FullDisk
from tests.torture.kills import Kill, KillRecovery
from tests.torture.partitions import Partition
from tests.torture.pauses import Pause
from tests.torture.power_cuts import PowerCuts
from tests.torture.torment import Torment

WEIGHTS: Final[dict[type[Torment], int]] = {
    Kill: 8,
    KillRecovery: 2,
    DiskErrors: 8,
    RecoveryErrors: 1,
    PowerCuts: 5,
    FullDisk: 2,
    Pause: 2,
    BadConnections: 2,
    Partition: 2,
}
"""How often each comes in a round of all."""


def draw_for(seed: int, lane: int, what: str) -> random.Random:
    """Its own for each step and each site."""
    return random.Random(f"{seed} {lane} {what}")


def torments(seed: int, lane: int, kinds: Sequence[type[Torment]]) -> Iterator[type[Torment]]:
    """Round after round: first each of `kinds` once, so that a short run meets all, then the rest of their weights."""
    for number in range(2**31):
        draw = draw_for(seed, lane, f"round {number}")
        once = list(kinds)
        rest = [kind for kind in kinds for _ in range(WEIGHTS[kind] - 1)]
        draw.shuffle(once)
        draw.shuffle(rest)
        yield from (*once, *rest)
