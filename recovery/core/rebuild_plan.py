"""Plans the rebuilding of a disk: from the extent tables of its history to the smallest set of frame reads.

Every byte of the disk is written at most once, from the newest extent that covers it; a frame is read only if at
least one byte of it is still the newest, and then once. What the newest extent says is zeroes or discarded, and what
no extent covers, is a hole.

How: the disk is cut into windows that few enough extents touch. In a window all borders of extents are sorted, which
gives the elementary ranges; every extent paints its number onto the ranges that it covers, the highest number
staying. An extent over n ranges is painted as two overlapping runs of a power of two, and runs are halved level by
level, so that all of it is whole-array work: O(n log n) for n extents, however they overlap, in memory bounded by
WINDOW_EXTENTS_MAX beside the input and the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy
import numpy.typing

from protocol.errors import InvalidValue
from protocol.vocabulary import DISK_SIZE_BYTES_MAX, ChangeKind, ExtentTable, check_range

WINDOW_EXTENTS_MAX: Final = 2**19
"""Extents painted at once; about 100 bytes of working memory each."""

MEDIAN_SAMPLE: Final = 65536
"""Extents looked at to find where to halve a window."""

PLAN_EXTENTS_MAX: Final = 2**31 - 2
"""Extents are numbered in 32 bits."""

PIECE_DTYPE: Final = numpy.dtype([("offset", "<u8"), ("length", "<u4"), ("source", "<u4"), ("frame", "<u4")])
"""Bytes [source, source + length) of frame `frame`'s raw data go to [offset, offset + length) of the disk."""

Array = numpy.typing.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FramePieces:
    """What one frame contributes: rows of PIECE_DTYPE, sorted by offset. `frame` is its number in the plan's input."""

    frame: int
    pieces: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildPlan:
    """The reads and writes that make the disk of one position.

    pieces: PIECE_DTYPE, sorted by (frame, offset), disjoint on the disk. data_ranges: two columns, first and end byte
    of the maximal ranges that get data, ascending; all else on the disk is a hole.
    """

    disk_size_bytes: int
    pieces: Array
    data_ranges: Array

    @property
    def bytes_to_write(self) -> int:
        return int(self.pieces["length"].sum(dtype=numpy.uint64))

    @property
    def frames(self) -> Array:
        """The numbers of the frames to read, ascending."""
        frames = self.pieces["frame"]
        return frames[numpy.flatnonzero(_changes(frames))]

    def frame_pieces(self) -> Iterator[FramePieces]:
        """One item per frame to read, ascending."""
        first_rows = [*numpy.flatnonzero(_changes(self.pieces["frame"])).tolist(), len(self.pieces)]
        for first, end in itertools.pairwise(first_rows):
            yield FramePieces(frame=int(self.pieces["frame"][first]), pieces=self.pieces[first:end])

    def holes(self) -> Iterator[tuple[int, int]]:
        """The half-open byte ranges that get no data, ascending."""
        first_byte = 0
        for data_first, data_end in self.data_ranges.tolist():
            if first_byte < data_first:
                yield first_byte, data_first
            first_byte = data_end
        if first_byte < self.disk_size_bytes:
            yield first_byte, self.disk_size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """The range [first_byte, end_byte) of the disk; the rows of the input that touch it, oldest first, and what they
    cover of it.
    """

    first_byte: int
    end_byte: int
    rows: Array
    first: Array
    end: Array


def plan_rebuild(extents: ExtentTable, extent_counts: Array, *, disk_size_bytes: int) -> RebuildPlan:
    """Plans the disk that results from applying all extents in order, cut at disk_size_bytes.

    extents: the tables of all frames up to the position, oldest first, one behind the other; each frame's table as
    check_extent_table wants it. extent_counts: how many rows belong to frame 0, 1, 2… Raises InvalidValue if they do
    not add up.
    """
    check_range(disk_size_bytes, "disk_size_bytes", low=0, high=DISK_SIZE_BYTES_MAX)
    check_range(len(extents), "extent count", low=0, high=PLAN_EXTENTS_MAX)
    counts = numpy.asarray(extent_counts, dtype=numpy.int64)
    if int(counts.sum()) != len(extents):
        raise InvalidValue(what="extent counts", value=int(counts.sum()), rule=f"must add up to {len(extents)}")
    found = [
        piece for window in _windows(extents, disk_size_bytes) for piece in (_paint(extents, window),) if len(piece)
    ]
    painted = numpy.concatenate(found) if found else numpy.empty((0, 3), dtype=numpy.uint64)
    del found
    pieces = _locate_sources(extents, counts, painted)
    data_ranges = _merge_touching(pieces["offset"], pieces["offset"] + pieces["length"])
    return RebuildPlan(
        disk_size_bytes=disk_size_bytes,
        # why: painting goes along the disk, reading goes along the frames; stable keeps a frame's pieces in disk order.
        pieces=pieces[numpy.argsort(pieces["frame"], kind="stable")],
        data_ranges=data_ranges,
    )


def _windows(extents: ExtentTable, disk_size_bytes: int) -> Iterator[_Window]:
    """Cuts the disk where needed, so that at most WINDOW_EXTENTS_MAX extents touch a window (unless they lie on one
    place).
    """
    rows = numpy.flatnonzero(extents["offset"] < disk_size_bytes).astype(numpy.uint32)
    first = extents["offset"][rows]
    end = numpy.minimum(first + extents["length"][rows], disk_size_bytes)
    waiting = [_Window(first_byte=0, end_byte=disk_size_bytes, rows=rows, first=first, end=end)]
    del rows, first, end
    while waiting:
        window = waiting.pop()
        halves = _halves(window) if len(window.rows) > WINDOW_EXTENTS_MAX else None
        if halves is None:
            yield window
        else:
            # why: taken from the end, so that windows come in the order of the disk.
            waiting += reversed(halves)


def _halves(window: _Window) -> tuple[_Window, _Window] | None:
    """Cuts a window at the median first byte (or end). None when the extents lie so that cutting would not help."""
    sample = slice(None, None, max(1, len(window.rows) // MEDIAN_SAMPLE))
    middle = int(numpy.median(window.first[sample]))
    if middle <= window.first_byte:
        middle = int(numpy.median(window.end[sample]))
    is_left, is_right = window.first < middle, window.end > middle
    crossing = int((is_left & is_right).sum())
    if not window.first_byte < middle < window.end_byte or crossing > len(window.rows) // 4:
        return None
    left = _Window(
        first_byte=window.first_byte,
        end_byte=middle,
        rows=window.rows[is_left],
        first=window.first[is_left],
        end=numpy.minimum(window.end[is_left], middle),
    )
    right = _Window(
        first_byte=middle,
        end_byte=window.end_byte,
        rows=window.rows[is_right],
        first=numpy.maximum(window.first[is_right], middle),
        end=window.end[is_right],
    )
    return left, right


def _paint(extents: ExtentTable, window: _Window) -> Array:
    """Rows (first byte, end byte, row of the winning DATA extent) of a window, ascending, disjoint."""
    rows, first, end = window.rows, window.first, window.end
    if not len(rows):
        return numpy.empty((0, 3), dtype=numpy.uint64)
    borders, ranks = _rank(numpy.concatenate([first, end]))
    first_range, range_count = ranks[: len(rows)], ranks[len(rows) :] - ranks[: len(rows)]
    winner = _highest_painter(first_range, range_count, range_total=len(borders) - 1)
    run_first = numpy.flatnonzero(_changes(winner))
    run_end = numpy.append(run_first[1:], len(winner))
    is_painted = winner[run_first] > 0
    run_first, run_end = run_first[is_painted], run_end[is_painted]
    winning_rows = rows[winner[run_first] - 1]
    result = numpy.empty((len(run_first), 3), dtype=numpy.uint64)
    result[:, 0], result[:, 1], result[:, 2] = borders[run_first], borders[run_end], winning_rows
    is_data: Array = extents["kind"][winning_rows] == ChangeKind.DATA
    return result[is_data]


def _rank(values: Array) -> tuple[Array, Array]:
    """The distinct values, ascending, and for each value its place among them."""
    # why: numpy.unique hashes 64-bit integers, which costs several times this sort.
    order = numpy.argsort(values)
    ascending = values[order]
    is_new = _changes(ascending)
    ranks = numpy.empty(len(values), dtype=numpy.int32)
    ranks[order] = numpy.cumsum(is_new, dtype=numpy.int32) - 1
    return ascending[is_new], ranks


def _highest_painter(first_range: Array, range_count: Array, *, range_total: int) -> Array:
    """For each elementary range the highest i + 1 with first_range[i] <= range < first_range[i] + range_count[i],
    else 0.
    """
    levels = numpy.frexp(range_count.astype(numpy.float64))[1] - 1
    by_level = numpy.argsort(levels, kind="stable")
    level_first = numpy.searchsorted(levels[by_level], numpy.arange(int(levels.max()) + 2))
    painted = numpy.zeros(range_total, dtype=numpy.int32)
    for level in range(int(levels.max()), -1, -1):
        painters = by_level[level_first[level] : level_first[level + 1]]
        numbers = (painters + 1).astype(numpy.int32)
        numpy.maximum.at(painted, first_range[painters], numbers)
        if level:
            numpy.maximum.at(painted, first_range[painters] + range_count[painters] - (1 << level), numbers)
            half = 1 << (level - 1)
            halved = painted.copy()
            numpy.maximum(halved[half:], painted[:-half], out=halved[half:])
            painted = halved
    return painted


def _locate_sources(extents: ExtentTable, counts: Array, painted: Array) -> Array:
    """Turns painted runs into pieces: finds each winner's frame, and where in the frame's raw data the run begins."""
    frame_first_rows = numpy.cumsum(counts) - counts
    data_lengths = numpy.where(extents["kind"] == ChangeKind.DATA, extents["length"], 0)
    data_before = numpy.zeros(len(extents) + 1, dtype=numpy.uint64)
    numpy.cumsum(data_lengths, out=data_before[1:])
    del data_lengths
    rows = painted[:, 2]
    frames = numpy.repeat(numpy.arange(len(counts), dtype=numpy.uint32), counts)[rows]
    in_frame = data_before[rows] - data_before[frame_first_rows[frames]]
    pieces = numpy.empty(len(painted), dtype=PIECE_DTYPE)
    pieces["offset"] = painted[:, 0]
    pieces["length"] = painted[:, 1] - painted[:, 0]
    pieces["source"] = in_frame + (painted[:, 0] - extents["offset"][rows])
    pieces["frame"] = frames
    return pieces


def _merge_touching(first: Array, end: Array) -> Array:
    """Joins ascending disjoint ranges that touch; two columns."""
    if not len(first):
        return numpy.empty((0, 2), dtype=numpy.uint64)
    begins = numpy.flatnonzero(numpy.append(True, first[1:] != end[:-1]))
    return numpy.stack([first[begins], end[numpy.append(begins[1:] - 1, len(end) - 1)]], axis=1)


def _changes(values: Array) -> Array:
    """True at each element that differs from the one before it, and at the first."""
    result = numpy.ones(len(values), dtype=numpy.bool_)
    numpy.not_equal(values[1:], values[:-1], out=result[1:])
    return result
