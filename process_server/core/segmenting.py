"""Decides which change sets go into which segment, from sizes and times that it is told.

Invariants: a segment ends only between change sets; a segment without a change set is never ended; the decision is
taken before the first frame of the next change set is sealed, because its data key belongs to its segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

CHANGE_SET_EXTENTS_MAX: Final = 2**21
"""Half of what a segment's index may hold: a change set of this size fits behind whatever is not yet due."""
SEGMENT_EXTENTS_DUE: Final = 2**20
SEGMENT_FRAMES_DUE: Final = 16384
CHANGE_SET_SILENCE_SECONDS_MAX: Final = 600.0
"""The frames of one change set follow each other within this: the longest frame takes half of it, and the change sets
before it in the segment wait for its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRules:
    """When a segment is due: at so many stored bytes, or at such an age of its first frame."""

    stored_bytes_due: int
    age_seconds_max: float


@dataclass(slots=True, kw_only=True)
class SegmentGauge:
    """What is known of the segment in work of one disk, sizes in bytes, instants in seconds of a monotonic clock."""

    rules: SegmentRules
    opened_at_seconds: float | None = None
    stored_bytes: int = 0
    unsealed_bytes: int = 0
    """Payload of frames that are taken but not yet sealed: counted as if they did not shrink."""
    frames: int = 0
    extents: int = 0
    change_sets: int = 0
    is_inside_change_set: bool = False
    newest_frame_at_seconds: float = 0.0

    def frame_taken(self, *, payload_bytes: int, extents: int, is_last: bool, now_seconds: float) -> None:
        """A frame was handed over to be sealed into this segment."""
        if self.opened_at_seconds is None:
            self.opened_at_seconds = now_seconds
        self.newest_frame_at_seconds = now_seconds
        self.unsealed_bytes += payload_bytes
        self.frames += 1
        self.extents += extents
        self.is_inside_change_set = not is_last
        self.change_sets += is_last

    def frame_sealed(self, *, payload_bytes: int, stored_bytes: int) -> None:
        """The same frame, once sealed, takes so many bytes."""
        self.unsealed_bytes -= payload_bytes
        self.stored_bytes += stored_bytes

    def is_due(self, now_seconds: float) -> bool:
        """True when the segment may and should end here. Between change sets only."""
        if self.is_inside_change_set or not self.change_sets or self.opened_at_seconds is None:
            return False
        if self.stored_bytes + self.unsealed_bytes >= self.rules.stored_bytes_due:
            return True
        if self.extents >= SEGMENT_EXTENTS_DUE or self.frames >= SEGMENT_FRAMES_DUE:
            return True
        return now_seconds - self.opened_at_seconds >= self.rules.age_seconds_max

    def is_stalled(self, now_seconds: float) -> bool:
        """True when the rest of the change set in work does not come."""
        silent_seconds = now_seconds - self.newest_frame_at_seconds
        return self.is_inside_change_set and silent_seconds >= CHANGE_SET_SILENCE_SECONDS_MAX
