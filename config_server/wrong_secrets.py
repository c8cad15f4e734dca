"""Slows down who guesses: after some wrong secrets an address has to wait before the next is looked at.

Only wrong secrets count, so that whoever shares an address (a translating router, a balancer) with somebody whose token
has expired is not shut out.
"""

from __future__ import annotations

import math
import time
from typing import Final

from config_server.core.rate_limit import Rate, RateLimit
from protocol.control_errors import TooManyAttempts

RATE: Final = Rate(at_once=20, per_second=0.5)


class WrongSecrets:
    """By the address that they came from."""

    def __init__(self) -> None:
        self._limit = RateLimit(RATE)

    def check(self, address: str) -> None:
        """Raises TooManyAttempts if nothing of this address is looked at now."""
        seconds = self._limit.wait_seconds(address, time.monotonic())
        if seconds > 0:
            raise TooManyAttempts(wait_seconds=math.ceil(seconds))

    def note(self, address: str) -> None:
        """One more came from there."""
        self._limit.count(address, time.monotonic())
