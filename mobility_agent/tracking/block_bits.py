"""Bits of blocks in shared memory: which blocks of a disk are marked, window by window.

A window is as long as a frame. Bit n of the little-endian words says of block n; blocks are of a size that divides a
digest block, so that a window is a whole number of bytes. What needs to be known less exactly is marked by area: an
area is one block or several, and at most a digest block.
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy
import numpy.typing

from mobility_agent.core.extent_set import ExtentSet
from protocol.vocabulary import DIGEST_BLOCK_BYTES, FRAME_RAW_BYTES_MAX

WINDOW_BYTES: Final = FRAME_RAW_BYTES_MAX
BLOCK_BYTES_MIN: Final = 4096
MAP_BYTES_WANTED: Final = 8 * 2**20
"""A map larger than this gets larger blocks instead, up to a digest block: a disk's maps stay in memory."""
AREA_MAP_BYTES_WANTED: Final = 2**19
"""The same of the maps of areas."""
ROWS_MAX: Final = 2**16
"""Bytes of a map of areas that are dealt with at a time: what that takes beside the maps stays below 10 MiB."""

Bits = numpy.typing.NDArray[numpy.uint8]
Mask = numpy.typing.NDArray[numpy.bool_]
Numbers = numpy.typing.NDArray[numpy.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """How a disk is divided."""

    size_bytes: int
    block_bytes: int

    @staticmethod
    def of(size_bytes: int, *, map_bytes_wanted: int = MAP_BYTES_WANTED) -> BlockLayout:
        block_bytes = BLOCK_BYTES_MIN
        while block_bytes < DIGEST_BLOCK_BYTES and size_bytes // block_bytes // 8 > map_bytes_wanted:
            block_bytes *= 2
        return BlockLayout(size_bytes=size_bytes, block_bytes=block_bytes)

    @staticmethod
    def of_areas(size_bytes: int) -> BlockLayout:
        """No finer than of(): its blocks are that one's areas."""
        return BlockLayout.of(size_bytes, map_bytes_wanted=AREA_MAP_BYTES_WANTED)

    @property
    def blocks(self) -> int:
        return -(-self.size_bytes // self.block_bytes)

    @property
    def sectors_shift(self) -> int:
        """Sectors per block, as a power of two."""
        return (self.block_bytes // 512).bit_length() - 1

    @property
    def window_blocks(self) -> int:
        return WINDOW_BYTES // self.block_bytes

    @property
    def windows(self) -> int:
        return -(-self.size_bytes // WINDOW_BYTES)

    @property
    def digest_blocks(self) -> int:
        """Blocks per digest block."""
        return DIGEST_BLOCK_BYTES // self.block_bytes

    def mask_of(self, bits: Bits, window: int) -> Mask:
        """Per block of one window whether it is marked."""
        return numpy.unpackbits(self._rows_of(bits)[window], bitorder="little").astype(bool)

    def masks_of(self, bits: Bits, windows: Numbers) -> Mask:
        """The same of several windows, a row each."""
        return numpy.unpackbits(self._rows_of(bits)[windows], axis=1, bitorder="little").astype(bool)

    def marked_windows(self, bits: Bits, *, first_bytes: int = 0) -> Numbers:
        """Those with a mark, ascending, from the one that holds first_bytes on."""
        first = first_bytes // WINDOW_BYTES
        return numpy.flatnonzero(self._rows_of(bits)[first:].any(axis=1)) + first

    def mark(self, bits: Bits, extents: ExtentSet) -> None:
        """All blocks that the extents touch."""
        for first_bytes, end_bytes in extents:
            first, end = first_bytes // self.block_bytes, min(-(-end_bytes // self.block_bytes), self.blocks)
            _mark_range(bits, first, end)

    def mark_all(self, bits: Bits) -> None:
        _mark_range(bits, 0, self.blocks)

    def clear_masks(self, bits: Bits, windows: Numbers, masks: Mask) -> None:
        """The blocks of these windows that the masks name, a row each. Nobody may mark others of them meanwhile."""
        self._rows_of(bits)[windows] &= ~numpy.packbits(masks, axis=1, bitorder="little")

    def mark_masks(self, bits: Bits, windows: Numbers, masks: Mask) -> None:
        """The blocks of these windows that the masks name, a row each."""
        self._rows_of(bits)[windows] |= numpy.packbits(masks, axis=1, bitorder="little")

    def cut(self, bits: Bits) -> None:
        """Clears what is marked behind the disk's end."""
        end_byte = -(-self.blocks // 8)
        bits[end_byte:] = 0
        if self.blocks % 8:
            bits[end_byte - 1] &= (1 << self.blocks % 8) - 1

    def count_common(self, one: Bits, other: Bits) -> int:
        """Blocks that are marked in both. The first may not be marked meanwhile."""
        marked = numpy.flatnonzero(one)
        return int(numpy.unpackbits(one[marked] & other[marked]).sum())

    def _rows_of(self, bits: Bits) -> Bits:
        """The bytes of each window as a row."""
        width = self.window_blocks // 8
        return bits[: self.windows * width].reshape(-1, width)


def bits_like(bits: Bits) -> Bits:
    """As many without a mark. They take memory only where they are marked later."""
    # why: numpy asks for huge pages where it allocates much, of which one mark takes a whole one.
    return numpy.frombuffer(mmap.mmap(-1, len(bits), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), numpy.uint8)


def join_bits(bits: Bits, more: Bits) -> None:
    """Marks in `bits` what is marked in `more`. Both are whole words."""
    marked = marked_words(more)
    bits.view("<u8")[marked] |= more.view("<u8")[marked]


def marked_words(bits: Bits) -> Numbers:
    """The numbers of the words of 64 bits with a mark."""
    # why: numpy counts first and collects then, and raises if the kernel has marked more in between
    return numpy.flatnonzero(bits.view("<u8") != 0)


def join_areas(bits: Bits, areas: Bits, blocks_per_area: int) -> None:
    """Marks in `bits` each block of an area that is marked in `areas`."""
    table, blocks = _blocks_of(blocks_per_area), bits.reshape(-1, blocks_per_area)
    for rows in _rows(areas):
        blocks[rows] |= table[areas[rows]]


def join_within(bits: Bits, more: Bits, areas: Bits, blocks_per_area: int) -> None:
    """Marks in `bits` what is marked in `more` and lies in an area that is marked in `areas`."""
    table = _blocks_of(blocks_per_area)
    blocks, others = bits.reshape(-1, blocks_per_area), more.reshape(-1, blocks_per_area)
    for rows in _rows(areas):
        blocks[rows] |= others[rows] & table[areas[rows]]


def leave_areas(areas: Bits, bits: Bits, blocks_per_area: int) -> None:
    """Takes the areas out of `areas` in which a block is marked in `bits`."""
    blocks = bits.reshape(-1, blocks_per_area)
    for rows in _rows(areas):
        marked = numpy.unpackbits(blocks[rows], axis=1, bitorder="little").reshape(len(rows), 8, blocks_per_area)
        areas[rows] &= ~numpy.packbits(marked.any(axis=2), axis=1, bitorder="little")[:, 0]


def groups_of(masks: Mask, blocks_per_group: int) -> Mask:
    """Of masks of blocks, a row a window: which groups of neighbours, as areas or digest blocks, have one of them."""
    groups = masks.reshape(len(masks), -1, blocks_per_group)
    return numpy.logical_or.reduce(groups, axis=2)  # type: ignore[no-any-return]


@functools.cache
def _blocks_of(blocks_per_area: int) -> Bits:
    """For each byte of a map of areas the bytes of the blocks in them."""
    areas = numpy.unpackbits(numpy.arange(256, dtype=numpy.uint8)[:, None], axis=1, bitorder="little")
    return numpy.packbits(areas.repeat(blocks_per_area, axis=1), axis=1, bitorder="little")


def _rows(areas: Bits) -> Iterator[Numbers]:
    """The numbers of the bytes with a mark, so many at a time."""
    # why != 0: see marked_words
    marked = numpy.flatnonzero(areas != 0)
    for first in range(0, len(marked), ROWS_MAX):
        yield marked[first : first + ROWS_MAX]


def _mark_range(bits: Bits, first: int, end: int) -> None:
    first_byte, end_byte = -(-first // 8), end // 8
    if first_byte > end_byte:
        bits[end_byte] |= ((1 << (end - first)) - 1) << (first - 8 * end_byte)
        return
    bits[first_byte:end_byte] = 0xFF
    if first % 8:
        bits[first_byte - 1] |= 0xFF << first % 8 & 0xFF
    if end % 8:
        bits[end_byte] |= (1 << end % 8) - 1
