"""Clocks of simulated hosts: the loop's virtual time, each shifted by what its host believes."""

from __future__ import annotations

import asyncio
from typing import Final

VIRTUAL_EPOCH_NS: Final = 1_800_000_000 * 10**9
"""The wall clock's reading at virtual second 0: some day in 2027."""


def true_now_ns(loop: asyncio.AbstractEventLoop) -> int:
    """The simulation's own wall clock, which is also the configuration server's."""
    return VIRTUAL_EPOCH_NS + round(loop.time() * 1e9)


class SimulatedClock:
    """runtime.clock.Clock over virtual time. `skew_ns` is how wrong this host's wall clock is; it may be changed (a
    jump).
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, skew_ns: int = 0) -> None:
        self._loop = loop
        self.skew_ns = skew_ns

    def now_ns(self) -> int:
        return true_now_ns(self._loop) + self.skew_ns

    def monotonic_seconds(self) -> float:
        return self._loop.time()
