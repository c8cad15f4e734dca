"""Bits of blocks against a model that is a set of numbers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobility_agent.core.extent_set import ExtentSet
from mobility_agent.tracking.block_bits import (
    BLOCK_BYTES_MIN,
    MAP_BYTES_WANTED,
    WINDOW_BYTES,
    BlockLayout,
    bits_like,
    groups_of,
    join_areas,
    join_bits,
    join_within,
    leave_areas,
)
from protocol.vocabulary import DIGEST_BLOCK_BYTES

GIB = 2**30


def empty(layout: BlockLayout) -> numpy.typing.NDArray[numpy.uint8]:
    return numpy.zeros(layout.windows * layout.window_blocks // 8, numpy.uint8)


def marked(layout: BlockLayout, bits: numpy.typing.NDArray[numpy.uint8]) -> set[int]:
    return set(numpy.flatnonzero(numpy.unpackbits(bits, bitorder="little")).tolist())


@pytest.mark.parametrize(
    ("size_bytes", "block_bytes"),
    [(4096, 4096), (256 * GIB, 4096), (257 * GIB, 8192), (1024 * GIB, 16384), (4096 * GIB, 65536), (2**46, 65536)],
)
def test_large_disks_get_large_blocks(size_bytes: int, block_bytes: int) -> None:
    layout = BlockLayout.of(size_bytes)
    assert layout.block_bytes == block_bytes
    assert 512 << layout.sectors_shift == block_bytes
    assert layout.digest_blocks * block_bytes == DIGEST_BLOCK_BYTES
    assert block_bytes == DIGEST_BLOCK_BYTES or layout.blocks <= 8 * (MAP_BYTES_WANTED + 1)


@given(
    st.integers(1, 5 * WINDOW_BYTES),
    st.sampled_from([BLOCK_BYTES_MIN, 16384, DIGEST_BLOCK_BYTES]),
    st.lists(st.tuples(st.integers(0, 5 * WINDOW_BYTES), st.integers(1, WINDOW_BYTES)), max_size=8),
    st.integers(0, 5 * WINDOW_BYTES),
)
def test_marks_are_where_a_set_has_them(
    size_bytes: int, block_bytes: int, writes: list[tuple[int, int]], first_bytes: int
) -> None:
    layout = BlockLayout(size_bytes=size_bytes, block_bytes=block_bytes)
    bits, model = empty(layout), set[int]()
    for offset, length in writes:
        first, end = min(offset, size_bytes), min(offset + length, size_bytes)
        if first < end:
            layout.mark(bits, ExtentSet.of([(first, end)]))
            model |= set(range(first // block_bytes, (end - 1) // block_bytes + 1))
    assert marked(layout, bits) == model
    windows = layout.marked_windows(bits, first_bytes=min(first_bytes, size_bytes)).tolist()
    expected = {block // layout.window_blocks for block in model}
    assert windows == sorted(window for window in expected if window >= min(first_bytes, size_bytes) // WINDOW_BYTES)
    masks = layout.masks_of(bits, numpy.arange(layout.windows))
    for window in range(layout.windows):
        mask = layout.mask_of(bits, window)
        assert (mask == masks[window]).all()
        base = window * layout.window_blocks
        assert {base + at for at in numpy.flatnonzero(mask).tolist()} == {b for b in model if b // len(mask) == window}
    assert layout.count_common(bits, bits) == len(model)


@given(st.sets(st.integers(0, 255)), st.sets(st.integers(0, 255)))
def test_a_mask_clears_what_it_names(before: set[int], cleared: set[int]) -> None:
    layout = BlockLayout(size_bytes=2 * WINDOW_BYTES, block_bytes=BLOCK_BYTES_MIN)
    bits = empty(layout)
    layout.mark(bits, ExtentSet.of([((256 + block) * 4096, (257 + block) * 4096) for block in before]))
    mask = numpy.zeros(256, bool)
    mask[list(cleared)] = True
    layout.clear_masks(bits, numpy.array([0, 1]), numpy.array([mask, mask]))
    assert marked(layout, bits) == {256 + block for block in before - cleared}


@given(st.integers(1, 3 * WINDOW_BYTES))
def test_all_blocks_and_none_behind_them(size_bytes: int) -> None:
    layout = BlockLayout(size_bytes=size_bytes, block_bytes=BLOCK_BYTES_MIN)
    bits = empty(layout)
    layout.mark_all(bits)
    assert marked(layout, bits) == set(range(layout.blocks))


@pytest.mark.parametrize(
    ("size_bytes", "area_bytes"), [(4096, 4096), (16 * GIB, 4096), (20 * GIB, 8192), (256 * GIB, 65536), (2**46, 65536)]
)
def test_areas_are_of_one_block_or_several(size_bytes: int, area_bytes: int) -> None:
    assert BlockLayout.of_areas(size_bytes).block_bytes == area_bytes
    assert area_bytes >= BlockLayout.of(size_bytes).block_bytes


BLOCKS = st.sets(st.integers(0, 2047))


def bits_of(marked: set[int], count: int = 2048) -> numpy.typing.NDArray[numpy.uint8]:
    mask = numpy.zeros(count, bool)
    mask[list(marked)] = True
    return numpy.packbits(mask, bitorder="little")


def numbers(bits: numpy.typing.NDArray[numpy.uint8]) -> set[int]:
    return set(numpy.flatnonzero(numpy.unpackbits(bits, bitorder="little")).tolist())


@pytest.mark.parametrize("ratio", [1, 2, 4, 8, 16])
@given(BLOCKS, BLOCKS, BLOCKS)
def test_areas_and_blocks_are_what_sets_make_of_them(
    ratio: int, blocks: set[int], others: set[int], marked: set[int]
) -> None:
    areas = {block // ratio for block in marked}
    within = {block for block in range(2048) if block // ratio in areas}
    kept = bits_of(areas, 2048 // ratio)
    joined, cut = bits_of(blocks), bits_of(blocks)
    join_areas(joined, kept, ratio)
    join_within(cut, bits_of(others), kept, ratio)
    assert numbers(joined) == blocks | within
    assert numbers(cut) == blocks | others & within
    left = kept.copy()
    leave_areas(left, bits_of(blocks), ratio)
    assert numbers(left) == areas - {block // ratio for block in blocks}
    mask = numpy.zeros(2048, bool)
    mask[list(blocks)] = True
    found = groups_of(mask.reshape(8, 256), ratio)
    assert set(numpy.flatnonzero(found).tolist()) == {block // ratio for block in blocks}


@given(st.integers(1, 2 * WINDOW_BYTES))
def test_nothing_is_left_behind_the_end(size_bytes: int) -> None:
    layout = BlockLayout(size_bytes=size_bytes, block_bytes=BLOCK_BYTES_MIN)
    bits = empty(layout)
    bits[:] = 0xFF
    layout.cut(bits)
    assert marked(layout, bits) == set(range(layout.blocks))


def test_marks_that_are_made_meanwhile_disturb_nobody() -> None:
    """The kernel marks in the very memory that is looked at."""
    mine, kernels = numpy.zeros(2**16, numpy.uint8), numpy.zeros(2**16, numpy.uint8)
    mine[::64] = 1
    layout = BlockLayout(size_bytes=2**31, block_bytes=4096)
    is_over = threading.Event()

    def mark() -> None:
        while not is_over.is_set():
            kernels[:] = 1
            kernels[:] = 0

    with ThreadPoolExecutor(1) as other:
        marking = other.submit(mark)
        try:
            for _ in range(3000):
                assert 0 <= layout.count_common(mine, kernels) <= 1024
                join_bits(bits_like(mine), kernels)
        finally:
            is_over.set()
        marking.result()
