"""The one interface of everything that is done to a site.

A torment is drawn anew for each step: `arrange` decides everything by the seed alone, `run` does it and undoes it,
`verify` checks what only it knows. After it come the checks that hold for all.
"""

from __future__ import annotations

import enum
import random
from collections import Counter
from typing import ClassVar

from tests.torture.tortured_site import TorturedSite


class Need(enum.Enum):
    """What a torment needs of the machine, and how one gets it."""

    ROOT = "root"
    STRACE = "strace"
    LOOP_DISKS = "losetup, mkfs.ext4, mkfs.xfs (packages mount, e2fsprogs, xfsprogs) and a kernel with XFS"
    NAMESPACES = "ip, nsenter (packages iproute2, util-linux) and a kernel with network namespaces"


class Torment:
    """One step. counts: what really happened, by kind; only what happened counts."""

    kind: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __init__(self, site: TorturedSite, draw: random.Random, *, seconds_max: float) -> None:
        """seconds_max: how long one torment may last; long runs have long ones."""
        self.site = site
        self.draw = draw
        self.seconds_max = seconds_max
        self.counts: Counter[str] = Counter()

    def arrange(self) -> str:
        """Decides what will be done, and says it in a few words."""
        raise NotImplementedError

    def run(self) -> None:
        """On return nothing is in the way of healing; programs may have ended."""
        raise NotImplementedError

    def verify(self) -> None:
        """What must hold beyond the checks after each torment. Raises InvariantBroken."""
