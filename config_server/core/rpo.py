"""The recovery point objective of one disk: now − the instant of its newest committed point, by the server's clock.

Unknown is never good: without a comparable instant the status is unknown with its reason. Nothing reported makes it
better than the newest point allows, so silence becomes a breach as time passes.
"""

from __future__ import annotations

from config_server.core.server_clock import DatedInstant, ServerClockState
from protocol.operator_messages import Rpo, RpoReason, RpoStatus


def evaluate_rpo(
    clock: ServerClockState, *, newest: DatedInstant | None, heard_ns: int, threshold_seconds: float
) -> Rpo:
    """newest: the disk's newest committed point. heard_ns: when its agent was last heard, or the disk registered."""
    if newest is None:
        return _without_point(clock, heard_ns, threshold_seconds)
    if newest.generation is None:
        return _rpo(RpoStatus.UNKNOWN, RpoReason.INSTANT_IMPLAUSIBLE, None, threshold_seconds)
    if newest.generation != clock.generation:
        return _rpo(RpoStatus.UNKNOWN, RpoReason.CLOCK_JUMPED, None, threshold_seconds)
    age_ns = clock.tick_ns - newest.instant_ns
    if age_ns < 0:
        return _rpo(RpoStatus.UNKNOWN, RpoReason.INSTANT_IMPLAUSIBLE, None, threshold_seconds)
    age_seconds = age_ns / 1e9
    if age_seconds > threshold_seconds:
        return _rpo(RpoStatus.MISSED, RpoReason.BEYOND_THRESHOLD, age_seconds, threshold_seconds)
    return _rpo(RpoStatus.OK, RpoReason.WITHIN_THRESHOLD, age_seconds, threshold_seconds)


def _without_point(clock: ServerClockState, heard_ns: int, threshold_seconds: float) -> Rpo:
    if (clock.tick_ns - heard_ns) / 1e9 > threshold_seconds:
        return _rpo(RpoStatus.MISSED, RpoReason.SILENT, None, threshold_seconds)
    return _rpo(RpoStatus.UNKNOWN, RpoReason.NO_POINT, None, threshold_seconds)


def _rpo(status: RpoStatus, reason: RpoReason, age_seconds: float | None, threshold_seconds: float) -> Rpo:
    return Rpo(status=status, reason=reason, age_seconds=age_seconds, threshold_seconds=threshold_seconds)
