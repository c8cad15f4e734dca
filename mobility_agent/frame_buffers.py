"""A fixed number of page-aligned buffers of one frame each: the bound of what the agent holds of its disks in
memory."""

from __future__ import annotations

import asyncio
import mmap
from collections import deque
from typing import Final

from protocol.vocabulary import FRAME_RAW_BYTES_MAX

BUFFERS_PER_STEP: Final = 2


class FrameBuffers:
    """Buffers in pairs: one step of a round needs two."""

    def __init__(self, *, buffers: int) -> None:
        pairs = max(1, buffers // BUFFERS_PER_STEP)
        self._free = deque((_buffer(), _buffer()) for _ in range(pairs))
        self._waiting: deque[asyncio.Future[tuple[memoryview, memoryview]]] = deque()

    def try_acquire(self) -> BufferPair | None:
        """A pair if one is free now and nobody waits for it."""
        if not self._free or self._waiting:
            return None
        return BufferPair(self, *self._free.popleft())

    async def acquire(self) -> BufferPair:
        """Waits for a free pair, first come first served."""
        if self._free and not self._waiting:
            return BufferPair(self, *self._free.popleft())
        turn: asyncio.Future[tuple[memoryview, memoryview]] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            pair = await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(turn.result())
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise
        return BufferPair(self, *pair)

    def give_back(self, pair: tuple[memoryview, memoryview]) -> None:
        # why: a pair goes from hand to hand; one that lay free for a moment could be taken by whoever comes first.
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(pair)
                return
        self._free.append(pair)


class BufferPair:
    """Two buffers on loan. They go back together, when everybody who holds the pair has released it."""

    def __init__(self, owner: FrameBuffers, window: memoryview, packing: memoryview) -> None:
        self.window = window
        self.packing = packing
        self._owner = owner
        self._holders = 1

    def hold(self) -> None:
        self._holders += 1

    def release(self) -> None:
        self._holders -= 1
        if self._holders == 0:
            self._owner.give_back((self.window, self.packing))


def _buffer() -> memoryview:
    return memoryview(mmap.mmap(-1, FRAME_RAW_BYTES_MAX))
