"""A set of byte ranges of one disk, as sorted packed arrays.

Ranges are half-open, sorted, and neither overlap nor touch. Every operation gives a new set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy
import numpy.typing

Bounds = numpy.typing.NDArray[numpy.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExtentSet:
    """The union of [first[i], end[i]). Make one by `of` or `from_bounds`, which normalise."""

    first: Bounds
    end: Bounds

    @staticmethod
    def of(ranges: Iterable[tuple[int, int]] = ()) -> ExtentSet:
        pairs = list(ranges)
        return ExtentSet.from_bounds(
            numpy.array([first for first, _ in pairs], dtype=numpy.int64),
            numpy.array([end for _, end in pairs], dtype=numpy.int64),
        )

    @staticmethod
    def from_bounds(first: Bounds, end: Bounds) -> ExtentSet:
        """Any order, overlaps and empty ranges allowed."""
        kept = end > first
        first, end = first[kept], end[kept]
        order = numpy.argsort(first, kind="stable")
        first, end = first[order], end[order]
        if len(first) > 1:
            reached = numpy.maximum.accumulate(end)
            starts = numpy.concatenate(([True], first[1:] > reached[:-1]))
            ends = numpy.concatenate((starts[1:], [True]))
            first, end = first[starts], reached[ends]
        return ExtentSet(first=first, end=end)

    def __len__(self) -> int:
        return len(self.first)

    def __bool__(self) -> bool:
        return len(self.first) > 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.first.tolist(), self.end.tolist(), strict=True)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExtentSet):
            return NotImplemented
        return numpy.array_equal(self.first, other.first) and numpy.array_equal(self.end, other.end)

    __hash__ = None  # type: ignore[assignment]

    @property
    def total_bytes(self) -> int:
        return int((self.end - self.first).sum())

    def __or__(self, other: ExtentSet) -> ExtentSet:
        if not other:
            return self
        if not self:
            return other
        return ExtentSet.from_bounds(
            numpy.concatenate((self.first, other.first)), numpy.concatenate((self.end, other.end))
        )

    def __sub__(self, other: ExtentSet) -> ExtentSet:
        if not self or not other:
            return self
        return self._where(other, inside_other=False)

    def __and__(self, other: ExtentSet) -> ExtentSet:
        if not self or not other:
            return ExtentSet.of()
        return self._where(other, inside_other=True)

    def _where(self, other: ExtentSet, *, inside_other: bool) -> ExtentSet:
        """Sweeps over the boundaries of both sets, keeping what lies in self and (not) in other."""
        places = numpy.concatenate((self.first, self.end, other.first, other.end))
        own = numpy.repeat(numpy.array([1, -1, 0, 0]), [len(self), len(self), len(other), len(other)])
        others = numpy.repeat(numpy.array([0, 0, 1, -1]), [len(self), len(self), len(other), len(other)])
        order = numpy.argsort(places, kind="stable")
        places = places[order]
        kept = (numpy.cumsum(own[order]) > 0) & ((numpy.cumsum(others[order]) > 0) == inside_other)
        return ExtentSet.from_bounds(places[:-1][kept[:-1]], places[1:][kept[:-1]])

    def rounded(self, granularity_bytes: int, *, disk_size_bytes: int) -> ExtentSet:
        """Every range grown outwards to multiples of the granularity, within the disk."""
        first = self.first // granularity_bytes * granularity_bytes
        end = -(-self.end // granularity_bytes) * granularity_bytes
        return ExtentSet.from_bounds(first, numpy.minimum(end, disk_size_bytes))

    def coarsened(self, *, extents_max: int, granularity_bytes: int, disk_size_bytes: int) -> ExtentSet:
        """A superset with at most extents_max ranges: the granularity doubles until they fit."""
        result = self
        while len(result) > extents_max:
            result = self.rounded(granularity_bytes, disk_size_bytes=disk_size_bytes)
            granularity_bytes *= 2
        return result
