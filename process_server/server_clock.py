"""The configuration server's clock as this process server knows it: its last answer, and what has passed since.

Invariants: never this machine's wall clock; None until the server was heard once; what agents are told never goes back.
"""

from __future__ import annotations

from runtime.clock import Clock


class ServerClock:
    """`heard` with every answer, `instant_ns` for every tick."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heard_ns: int | None = None
        self._heard_at_seconds = 0.0
        self._told_ns = 0

    def heard(self, now_ns: int) -> None:
        """The server's clock showed this when it answered, some moments ago: the error is on the early side."""
        self._heard_ns = now_ns
        self._heard_at_seconds = self._clock.monotonic_seconds()

    def instant_ns(self) -> int | None:
        """Nanoseconds since the Unix epoch by the server's clock, None if it was never heard."""
        if self._heard_ns is None:
            return None
        passed_seconds = self._clock.monotonic_seconds() - self._heard_at_seconds
        # why: a server whose clock was set back must not make points older than those before them.
        self._told_ns = max(self._told_ns, self._heard_ns + int(passed_seconds * 1e9))
        return self._told_ns
