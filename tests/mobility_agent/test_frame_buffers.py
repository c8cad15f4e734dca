"""The buffers are the memory's bound: pairs come back, in turn, whatever is cancelled."""

from __future__ import annotations

import asyncio

from mobility_agent.frame_buffers import FrameBuffers


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
