"""Clocks of simulated hosts: the loop's virtual time, each shifted by what its host believes.

Monotonic clocks are all the loop's own: a wall clock may be set to any year, time itself goes on.
"""

from __future__ import annotations

import asyncio
from typing import Final

from config_server.core.server_clock import FLYWHEEL_NS, ServerClockState, observe_clock, start_clock

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


class ServersClock:
    """The configuration server's clock: its wall clock through the real core, and when it showed what in truth."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._skew_ns = 0
        self._settings: list[tuple[int, int]] = [(true_now_ns(loop), 0)]
        """(true instant from which it holds, skew), in order."""
        self.hidden_ns = 0
        """By so much a restart hid that it had been set back (docs/decisions/0006)."""
        self._state = start_clock((), *self._read())

    def state(self) -> ServerClockState:
        self._state = observe_clock(self._state, *self._read())
        return self._state

    def now_ns(self) -> int:
        return self.state().tick_ns

    def restart(self) -> None:
        """The program was killed and is there again: of its clock's history it knows what it stored."""
        before = self._state
        self._state = start_clock(before.spans, *self._read())
        if self._state.generation == before.generation:
            elapsed_ns = round((self._state.monotonic_seconds - before.monotonic_seconds) * 1e9)
            self.hidden_ns += max(0, before.tick_ns + elapsed_ns - self._state.tick_ns)

    def set(self, skew_ns: int) -> None:
        """Somebody sets the wall clock."""
        if skew_ns != self._skew_ns:
            self._skew_ns = skew_ns
            self._settings.append((true_now_ns(self._loop), skew_ns))

    def was_right_until(self, true_ns: int) -> bool:
        """Whether nobody had set it before that true instant, so that its instants are true ones."""
        return len(self._settings) == 1 or self._settings[1][0] > true_ns

    def is_in_doubt(self) -> bool:
        """Whether it shows what an earlier span covers, so that the core takes instants for old ones: until it is past
        that, no RPO is known (docs/decisions/0006)."""
        now_ns = self.now_ns()
        return any(span.first_ns <= now_ns <= span.last_ns for span in self._state.spans[:-1])

    def was_set_unheard(self, heard_ns: int, true_ns: int) -> bool:
        """Whether whoever heard it last at one true instant cannot know at another that it was set in between, and is
        out of touch for longer than the real core allows for."""
        return true_ns - heard_ns > FLYWHEEL_NS and any(
            heard_ns < since_ns <= true_ns for since_ns, _ in self._settings
        )

    def _read(self) -> tuple[int, float]:
        return true_now_ns(self._loop) + self._skew_ns, self._loop.time()
