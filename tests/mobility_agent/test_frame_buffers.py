"""The buffers are the memory's bound: pairs come back, in turn, whatever is cancelled."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mobility_agent.frame_buffers import FrameBuffers
from mobility_agent.pipeline import ReadAhead
from tests.mobility_agent.test_scan import MIB, Scanned


async def test_a_pair_is_free_again_only_when_all_its_holders_released_it() -> None:
    buffers = FrameBuffers(buffers=2)
    pair = await buffers.acquire()
    pair.hold()
    pair.release()
    assert buffers.try_acquire() is None
    pair.release()
    assert buffers.try_acquire() is not None


async def test_who_waits_gets_the_pair_even_if_somebody_asks_before_it_runs() -> None:
    buffers = FrameBuffers(buffers=2)
    pair = await buffers.acquire()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(buffers.acquire())
        await asyncio.sleep(0)
        pair.release()
        assert buffers.try_acquire() is None
        assert (await waiting).window.nbytes == pair.window.nbytes


async def test_a_pair_that_a_cancelled_waiter_was_given_goes_to_the_next() -> None:
    buffers = FrameBuffers(buffers=2)
    pair = await buffers.acquire()
    async with asyncio.TaskGroup() as group:
        first, second = group.create_task(buffers.acquire()), group.create_task(buffers.acquire())
        await asyncio.sleep(0)
        pair.release()
        first.cancel()
        (await second).release()
    assert buffers.try_acquire() is not None


@pytest.mark.parametrize("compress", [False, True])
async def test_frames_on_their_way_hold_their_pair_compressed_or_not(tmp_path: Path, compress: bool) -> None:
    scanned = Scanned(tmp_path, 8 * MIB)
    scanned.write(0, b"compressible " * 600_000)
    buffers = FrameBuffers(buffers=2)
    with ThreadPoolExecutor(1) as executor:
        ahead = ReadAhead(scanned.source.begin_round(first_bytes=0), buffers, executor, compress=compress)
        step = await ahead.next()
        assert step is not None
        assert step.frames
        assert buffers.try_acquire() is None, "the frames of this step hold the only pair"
        for frame in step.frames:
            frame.release()
        assert buffers.try_acquire() is not None
        await ahead.close()
