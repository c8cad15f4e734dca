"""How often one address may try something: so many at once, and then so many a second (a token bucket each).

Bounded: of very many addresses the one that was seen longest ago is forgotten, which can only let it try again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ADDRESSES_MAX: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """at_once: how many tries are good after a rest; per_second: how fast they come back."""

    at_once: int
    per_second: float


class RateLimit:
    """Times are seconds of one monotonic clock."""

    def __init__(self, rate: Rate, *, addresses_max: int = ADDRESSES_MAX) -> None:
        self._rate = rate
        self._addresses_max = addresses_max
        self._left: dict[str, tuple[float, float]] = {}
        """By address, seen longest ago first: (tries left, when that was so)."""

    def wait_seconds(self, address: str, now_seconds: float) -> float:
        """How long this address has to wait until its next try; 0: it may try now."""
        return max(0.0, (1.0 - self._tries_left(address, now_seconds)) / self._rate.per_second)

    def count(self, address: str, now_seconds: float) -> None:
        """It has tried."""
        left = self._tries_left(address, now_seconds) - 1.0
        self._left.pop(address, None)
        if len(self._left) >= self._addresses_max:
            self._left.pop(next(iter(self._left)))
        self._left[address] = (left, now_seconds)

    def _tries_left(self, address: str, now_seconds: float) -> float:
        left, then = self._left.get(address, (float(self._rate.at_once), now_seconds))
        return min(float(self._rate.at_once), left + (now_seconds - then) * self._rate.per_second)
