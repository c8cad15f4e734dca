"""The buffers are the memory's bound: pairs come back, in turn, whatever is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest

from mobility_agent.frame_buffers import FrameBuffers
from mobility_agent.pipeline import ReadAhead
from mobility_agent.tracking.change_source import Round, SourceFrame
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


class HeldRound:
    """A round whose one step reads until it is let go."""

    is_exhausted = False
    compared_to_bytes = 0

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.has_ended = False

    def read(self, window: memoryview, packing: memoryview) -> Sequence[SourceFrame]:
        self.begun.set()
        assert self.may_end.wait(30)
        self.has_ended = True
        return []


@pytest.mark.parametrize("cancels", [1, 3])
async def test_buffers_are_not_given_back_while_a_step_reads_into_them(cancels: int) -> None:
    """As when a connection is lost, and then the disk's work is ended."""
    held, buffers = HeldRound(), FrameBuffers(buffers=2)
    with ThreadPoolExecutor(1) as executor:
        ahead = ReadAhead(cast("Round", held), buffers, executor, compress=False)
        reading = asyncio.ensure_future(ahead.next())
        await asyncio.get_running_loop().run_in_executor(None, held.begun.wait)
        reading.cancel()
        closing = asyncio.ensure_future(ahead.close())
        for _ in range(cancels):
            await asyncio.sleep(0)
            closing.cancel()
            await asyncio.sleep(0)
            assert buffers.try_acquire() is None
            assert not closing.done()
        held.may_end.set()
        for task in (closing, reading):
            with pytest.raises(asyncio.CancelledError):
                await task
        assert held.has_ended
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
