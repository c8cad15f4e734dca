"""Packs changes into frames and change sets within the limits of the vocabulary.

A frame's extents are sorted and disjoint; where changes overlap, the later one wins, so that the end of a change set is
still a prefix of the write order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy

from mobility_agent.core.extent_set import ExtentSet
from protocol.errors import InvalidValue
from protocol.vocabulary import (
    CHANGE_SET_FRAMES_MAX,
    CHANGE_SET_RAW_BYTES_MAX,
    EXTENT_DTYPE,
    EXTENT_LENGTH_BYTES_MAX,
    FRAME_EXTENTS_MAX,
    FRAME_RAW_BYTES_MAX,
    ChangeKind,
    ExtentTable,
    check_range,
)

CHANGE_SET_EXTENTS_MAX: Final = 16 * FRAME_EXTENTS_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One extent and, for DATA, its bytes."""

    offset_bytes: int
    length_bytes: int
    kind: ChangeKind
    data: memoryview | None = None

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.length_bytes

    @property
    def raw_bytes(self) -> int:
        return self.length_bytes if self.kind is ChangeKind.DATA else 0

    def part(self, first_bytes: int, end_bytes: int) -> Change:
        """The piece [first, end) of the disk that lies within this change."""
        skipped = first_bytes - self.offset_bytes
        data = None if self.data is None else self.data[skipped : skipped + end_bytes - first_bytes]
        return Change(offset_bytes=first_bytes, length_bytes=end_bytes - first_bytes, kind=self.kind, data=data)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFrame:
    """A frame's table and the data extents' bytes in table order."""

    table: ExtentTable
    payload: tuple[memoryview, ...]
    raw_bytes: int

    @property
    def extents(self) -> ExtentSet:
        first = self.table["offset"].astype(numpy.int64)
        return ExtentSet.from_bounds(first, first + self.table["length"].astype(numpy.int64))


def last_writer_wins(changes: Sequence[Change]) -> list[Change]:
    """The same final contents as applying `changes` in order, as sorted disjoint changes."""
    firsts: list[int] = []
    ends: list[int] = []
    kept: list[Change] = []
    for change in reversed(changes):
        at = change.offset_bytes
        index = bisect_right(ends, at)
        while at < change.end_bytes:
            next_first = firsts[index] if index < len(firsts) else change.end_bytes
            if at < next_first:
                kept.append(change.part(at, min(next_first, change.end_bytes)))
            if next_first >= change.end_bytes:
                break
            at = max(at, ends[index])
            index += 1
        _cover(firsts, ends, change.offset_bytes, change.end_bytes)
    kept.sort(key=lambda change: change.offset_bytes)
    return kept


def _cover(firsts: list[int], ends: list[int], first: int, end: int) -> None:
    """Adds [first, end) to sorted disjoint ranges, joining those that it overlaps."""
    low = bisect_right(ends, first)
    high = low
    while high < len(firsts) and firsts[high] < end:
        high += 1
    if high > low:
        first, end = min(first, firsts[low]), max(end, ends[high - 1])
    firsts[low:high] = [first]
    ends[low:high] = [end]


class FramePacker:
    """Gathers changes for one frame."""

    def __init__(self) -> None:
        self._changes: list[Change] = []
        self._raw_bytes = 0

    def __len__(self) -> int:
        return len(self._changes)

    @property
    def raw_bytes(self) -> int:
        return self._raw_bytes

    def fits(self, *, raw_bytes: int, extents: int) -> bool:
        """Whether so much more data in so many more extents still makes a legal frame."""
        return self._raw_bytes + raw_bytes <= FRAME_RAW_BYTES_MAX and len(self._changes) + extents <= FRAME_EXTENTS_MAX

    def add(self, change: Change) -> None:
        """Raises InvalidValue for what does not fit."""
        check_range(change.length_bytes, "length_bytes", low=1, high=EXTENT_LENGTH_BYTES_MAX)
        if not self.fits(raw_bytes=change.raw_bytes, extents=1):
            raise InvalidValue(what="frame", value=self._raw_bytes + change.raw_bytes, rule="is over its limits")
        self._changes.append(change)
        self._raw_bytes += change.raw_bytes

    def frame(self) -> PackedFrame:
        """The frame of all that was added."""
        changes = self._changes
        if any(left.end_bytes > right.offset_bytes for left, right in pairwise(changes)):
            changes = last_writer_wins(changes)
        if len(changes) > FRAME_EXTENTS_MAX:
            raise InvalidValue(what="frame", value=len(changes), rule=f"has more than {FRAME_EXTENTS_MAX} extents")
        table = numpy.zeros(len(changes), dtype=EXTENT_DTYPE)
        table["offset"] = [change.offset_bytes for change in changes]
        table["length"] = [change.length_bytes for change in changes]
        table["kind"] = [change.kind for change in changes]
        payload = tuple(change.data for change in changes if change.data is not None)
        return PackedFrame(table=table, payload=payload, raw_bytes=sum(change.raw_bytes for change in changes))


class ChangeSetBuilder:
    """Counts the frames of one change set and says when it must end."""

    def __init__(self, *, sequence: int, raw_bytes_target: int) -> None:
        check_range(raw_bytes_target, "raw_bytes_target", low=1, high=CHANGE_SET_RAW_BYTES_MAX)
        self.sequence = sequence
        self._raw_bytes_target = raw_bytes_target
        self._raw_bytes = 0
        self._extent_count = 0
        self._extents: list[ExtentSet] = []

    @property
    def frame_count(self) -> int:
        return len(self._extents)

    @property
    def is_full(self) -> bool:
        """Whether another full frame would pass a limit: the newest frame is to be the last."""
        return (
            self._raw_bytes > self._raw_bytes_target - FRAME_RAW_BYTES_MAX
            or self._extent_count > CHANGE_SET_EXTENTS_MAX - FRAME_EXTENTS_MAX
            or len(self._extents) >= CHANGE_SET_FRAMES_MAX - 1
        )

    def extents(self) -> ExtentSet:
        """All that the change set touches."""
        if not self._extents:
            return ExtentSet.of()
        return ExtentSet.from_bounds(
            numpy.concatenate([extents.first for extents in self._extents]),
            numpy.concatenate([extents.end for extents in self._extents]),
        )

    def add(self, frame: PackedFrame) -> int:
        """Takes a frame in; returns its number."""
        self._raw_bytes += frame.raw_bytes
        self._extent_count += len(frame.table)
        self._extents.append(frame.extents)
        return len(self._extents) - 1
