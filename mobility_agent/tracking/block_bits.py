"""Bits of blocks in shared memory: which blocks of a disk are marked, window by window.

A window is as long as a frame. Bit n of the little-endian words says of block n; blocks are of a size that divides a
digest block, so that a window is a whole number of bytes.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Final

import numpy
import numpy.typing

from mobility_agent.core.extent_set import ExtentSet
from protocol.vocabulary import DIGEST_BLOCK_BYTES, FRAME_RAW_BYTES_MAX

WINDOW_BYTES: Final = FRAME_RAW_BYTES_MAX
BLOCK_BYTES_MIN: Final = 4096
MAP_BYTES_WANTED: Final = 8 * 2**20
"""A map larger than this gets larger blocks instead, up to a digest block: eight maps a disk stay in memory."""

Bits = numpy.typing.NDArray[numpy.uint8]
Mask = numpy.typing.NDArray[numpy.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """How a disk is divided."""

    size_bytes: int
    block_bytes: int

    @staticmethod
    def of(size_bytes: int) -> BlockLayout:
        block_bytes = BLOCK_BYTES_MIN
        while block_bytes < DIGEST_BLOCK_BYTES and size_bytes // block_bytes // 8 > MAP_BYTES_WANTED:
            block_bytes *= 2
        return BlockLayout(size_bytes=size_bytes, block_bytes=block_bytes)

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

    def window_of(self, bits: Bits, window: int) -> Bits:
        """The bytes of one window."""
        width = self.window_blocks // 8
        return bits[window * width : (window + 1) * width]

    def mask_of(self, bits: Bits, window: int) -> Mask:
        """Per block of one window whether it is marked."""
        return numpy.unpackbits(self.window_of(bits, window), bitorder="little").astype(bool)

    def marked_windows(self, bits: Bits, *, first_bytes: int = 0) -> numpy.typing.NDArray[numpy.int64]:
        """Those with a mark, ascending, from the one that holds first_bytes on."""
        width = self.window_blocks // 8
        first = first_bytes // WINDOW_BYTES
        rows = bits[first * width : self.windows * width].reshape(-1, width)
        return numpy.flatnonzero(rows.any(axis=1)) + first

    def mark(self, bits: Bits, extents: ExtentSet) -> None:
        """All blocks that the extents touch."""
        for first_bytes, end_bytes in extents:
            first, end = first_bytes // self.block_bytes, min(-(-end_bytes // self.block_bytes), self.blocks)
            _mark_range(bits, first, end)

    def mark_all(self, bits: Bits) -> None:
        _mark_range(bits, 0, self.blocks)

    def clear(self, bits: Bits, window: int, mask: Mask) -> None:
        """The blocks of one window that the mask names."""
        view = self.window_of(bits, window)
        view &= ~numpy.packbits(mask, bitorder="little")

    def count_common(self, one: Bits, other: Bits) -> int:
        """Blocks that are marked in both. The first may not be marked meanwhile."""
        marked = numpy.flatnonzero(one)
        return int(numpy.unpackbits(one[marked] & other[marked]).sum())


def bits_like(bits: Bits) -> Bits:
    """As many without a mark. They take memory only where they are marked later."""
    # why: numpy asks for huge pages where it allocates much, of which one mark takes a whole one.
    return numpy.frombuffer(mmap.mmap(-1, len(bits), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), numpy.uint8)


def join_bits(bits: Bits, more: Bits) -> None:
    """Marks in `bits` what is marked in `more`. Both are whole words."""
    marked = marked_words(more)
    bits.view("<u8")[marked] |= more.view("<u8")[marked]


def marked_words(bits: Bits) -> numpy.typing.NDArray[numpy.int64]:
    """The numbers of the words of 64 bits with a mark."""
    # why: numpy counts first and collects then, and raises if the kernel has marked more in between
    return numpy.flatnonzero(bits.view("<u8") != 0)


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
