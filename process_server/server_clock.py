"""The configuration server's clock as this process server knows it: its last answer, and what has passed since.

Invariants: never this machine's wall clock; None until the server was heard once, by this run or an earlier one; what
agents are told is never later than the server's clock shows, and never goes back, over restarts neither, unless the
server's clock was set back.
"""

from __future__ import annotations

from typing import Final, cast

import msgpack  # type: ignore[import-untyped]

from process_server.errors import StateUnreadable
from process_server.state_file import keep, kept
from protocol.errors import InvalidValue
from protocol.vocabulary import check_range
from runtime.clock import Clock
from runtime.directory import DurableDirectory

CLOCK_FILE: Final = "server-clock"
KEEP_SECONDS: Final = 5.0
"""What agents are told is kept so often, for a restart while the server is away."""
SILENCE_SECONDS: Final = 2 * KEEP_SECONDS
"""So long a restarted program tells nothing unless it hears the server: longer than it told anything unkept."""
SET_BACK_NS: Final = 5_000_000_000
"""Less than this is two clocks that drift apart; a server that is farther behind what was told had its clock set."""


class ServerClock:
    """`heard` with every answer, `instant_ns` for every tick."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heard_ns: int | None = None
        self._heard_at_seconds = 0.0
        self._told_ns = 0
        self._silent_until_seconds: float | None = None

    def heard(self, now_ns: int) -> None:
        """The server's clock showed this when it answered, some moments ago: the error is on the early side."""
        if now_ns < self._told_ns - SET_BACK_NS:
            # why: a clock that was right again after it had been ten years ahead would otherwise be told for ten years,
            # and no point would have an instant that can be compared
            self._told_ns = now_ns
        self._heard_ns = now_ns
        self._heard_at_seconds = self._clock.monotonic_seconds()
        self._silent_until_seconds = None

    def resume(self, kept_ns: int) -> None:
        """An earlier run told this: the server's clock shows at least as much now, and time passes for it too."""
        self.heard(kept_ns)
        self._told_ns = kept_ns
        self._silent_until_seconds = self._heard_at_seconds + SILENCE_SECONDS

    def instant_ns(self) -> int | None:
        """Nanoseconds since the Unix epoch by the server's clock, None if it is not known."""
        if self._heard_ns is None:
            return None
        now_seconds = self._clock.monotonic_seconds()
        if self._silent_until_seconds is not None and now_seconds < self._silent_until_seconds:
            return None
        passed_seconds = now_seconds - self._heard_at_seconds
        # why: an answer that took longer than the one before it must not make points older than those before them.
        self._told_ns = max(self._told_ns, self._heard_ns + int(passed_seconds * 1e9))
        return self._told_ns


def save_clock(state: DurableDirectory, instant_ns: int) -> None:
    """Durable on return. Raises OSError."""
    keep(state, CLOCK_FILE, cast(bytes, msgpack.packb(instant_ns)))


def load_clock(state: DurableDirectory) -> int | None:
    """What was saved, None if nothing was. Raises OSError, StateUnreadable."""
    data = kept(state, CLOCK_FILE)
    if data is None:
        return None
    try:
        return check_range(msgpack.unpackb(data), "instant_ns", low=0, high=2**63 - 1)
    except (ValueError, TypeError, InvalidValue, msgpack.UnpackException) as error:
        raise StateUnreadable(name=CLOCK_FILE, reason=str(error)) from error
