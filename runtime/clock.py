"""Time as an argument: programs take a `Clock`, the simulation hands them one of its own."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """now_ns: wall clock, nanoseconds since the Unix epoch, may jump. monotonic_seconds: never goes back."""

    def now_ns(self) -> int: ...

    def monotonic_seconds(self) -> float: ...


class SystemClock:
    """The machine's own clocks."""

    def now_ns(self) -> int:
        return time.time_ns()

    def monotonic_seconds(self) -> float:
        return time.monotonic()
