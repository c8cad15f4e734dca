"""Slows down who guesses join tokens: after some wrong ones an address is told to wait, and told nothing else.

A right one is looked at all the same, so that nobody is shut out who shares an address with somebody who guesses.
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

    def note(self, address: str) -> None:
        """One more came from there. Raises TooManyAttempts if that is too many."""
        now_seconds = time.monotonic()
        wait_seconds = self._limit.wait_seconds(address, now_seconds)
        if wait_seconds > 0:
            raise TooManyAttempts(wait_seconds=math.ceil(wait_seconds))
        self._limit.count(address, now_seconds)
