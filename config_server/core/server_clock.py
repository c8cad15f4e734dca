"""The server's clock as a sequence of spans, so that no instant from before the clock was set is compared with now.

Within a span ticks never go back, nor slower than the monotonic clock but for a drift: where the wall clock is behind
they are ahead of it until it has caught up, or else no age would be true meanwhile. Setting the clock (seen as
disagreement with the monotonic clock, or as going back over a restart) begins the next span. An instant belongs to the
oldest span that could have shown it: doubt makes it older.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from protocol.errors import InvalidValue

JUMP_TOLERANCE_NS: Final = 2_000_000_000
"""Less than this is a clock being disciplined, not set."""
DRIFT_PER_MILLE_MAX: Final = 1
"""Two clocks that run undisturbed differ by no more; a tick that is ahead of the wall clock waits for it so slowly."""
FLYWHEEL_NS: Final = 60_000_000_000
"""Process servers go on telling the time from the last answer that they heard. One that is in touch hears another
within this."""
SPANS_MAX: Final = 64
"""Older spans are merged, which can only make an instant look older."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockSpan:
    """All ticks from first_ns to last_ns, both included, were shown while the clock ran undisturbed, or told on its
    account by a process server that had not yet heard of its end."""

    generation: int
    first_ns: int
    last_ns: int

    def __post_init__(self) -> None:
        if self.generation < 1 or not 0 <= self.first_ns <= self.last_ns:
            raise InvalidValue(what="clock span", value=self.generation, rule="must run forwards")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerClockState:
    """Spans by rising generation; the last is the present one."""

    spans: tuple[ClockSpan, ...]
    wall_ns: int
    monotonic_seconds: float

    @property
    def present(self) -> ClockSpan:
        return self.spans[-1]

    @property
    def tick_ns(self) -> int:
        """What the clock shows."""
        return self.present.last_ns

    @property
    def generation(self) -> int:
        return self.present.generation


@dataclass(frozen=True, slots=True, kw_only=True)
class DatedInstant:
    """An instant with the span that it belongs to; None: the server's clock never showed it."""

    instant_ns: int
    generation: int | None


def start_clock(spans: tuple[ClockSpan, ...], wall_ns: int, monotonic_seconds: float) -> ServerClockState:
    """At the start of the program, with the spans that were stored."""
    if not spans:
        spans = (ClockSpan(generation=1, first_ns=wall_ns, last_ns=wall_ns),)
    elif wall_ns < spans[-1].last_ns - JUMP_TOLERANCE_NS:
        spans = _begin_span(spans, wall_ns, elapsed_ns=0)
    else:
        spans = _extend_span(spans, wall_ns)
    return ServerClockState(spans=spans, wall_ns=wall_ns, monotonic_seconds=monotonic_seconds)


def observe_clock(state: ServerClockState, wall_ns: int, monotonic_seconds: float) -> ServerClockState:
    """One reading of both clocks, taken together. The present span is extended, or the next begins."""
    elapsed_ns = round((monotonic_seconds - state.monotonic_seconds) * 1e9)
    drift_ns = elapsed_ns * DRIFT_PER_MILLE_MAX // 1000
    paced_ns = state.tick_ns + elapsed_ns - drift_ns
    is_set_forward = wall_ns > state.wall_ns + elapsed_ns + drift_ns + JUMP_TOLERANCE_NS
    # why: against the ticks, for small steps back add up without any one of them being a jump
    is_set_back = wall_ns < paced_ns - JUMP_TOLERANCE_NS
    if is_set_forward or is_set_back:
        spans = _begin_span(state.spans, wall_ns, elapsed_ns=elapsed_ns)
    else:
        spans = _extend_span(state.spans, max(wall_ns, paced_ns))
    return ServerClockState(spans=spans, wall_ns=wall_ns, monotonic_seconds=monotonic_seconds)


def date_instant(instant_ns: int, spans: tuple[ClockSpan, ...], previous: DatedInstant | None) -> DatedInstant:
    """Finds the span of an instant that an agent marked. previous: that of an earlier position of the same disk.

    A disk's positions are marked in order: a later one is of the same span and not before, or of a later span.
    """
    possible = [
        span.generation
        for span in spans
        if span.first_ns <= instant_ns <= span.last_ns and _may_follow(instant_ns, span.generation, previous)
    ]
    return DatedInstant(instant_ns=instant_ns, generation=min(possible, default=None))


def _may_follow(instant_ns: int, generation: int, previous: DatedInstant | None) -> bool:
    if previous is None or previous.generation is None:
        return True
    return (generation, instant_ns) >= (previous.generation, previous.instant_ns)


def _extend_span(spans: tuple[ClockSpan, ...], wall_ns: int) -> tuple[ClockSpan, ...]:
    present = spans[-1]
    return (*spans[:-1], replace(present, last_ns=max(present.last_ns, wall_ns)))


def _begin_span(spans: tuple[ClockSpan, ...], wall_ns: int, *, elapsed_ns: int) -> tuple[ClockSpan, ...]:
    wall_ns = max(wall_ns, 0)
    present = spans[-1]
    span = ClockSpan(generation=present.generation + 1, first_ns=wall_ns, last_ns=wall_ns)
    spans = (*spans[:-1], replace(present, last_ns=present.last_ns + elapsed_ns + FLYWHEEL_NS), span)
    while len(spans) > SPANS_MAX:
        oldest, second = spans[:2]
        merged = replace(
            oldest,
            first_ns=min(oldest.first_ns, second.first_ns),
            last_ns=max(oldest.last_ns, second.last_ns),
        )
        spans = (merged, *spans[2:])
    return spans
