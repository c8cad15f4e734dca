"""A fixed number of page-aligned buffers of one frame each: the bound of what the agent holds of its disks in
memory."""

from __future__ import annotations

import asyncio
import mmap
from collections import deque
from typing import Final, TypeAlias

from protocol.vocabulary import FRAME_RAW_BYTES_MAX

BUFFERS_PER_STEP: Final = 2

_Pair: TypeAlias = tuple[memoryview, memoryview]


class FrameBuffers:
    """Buffers in pairs: one step of a round needs two."""

    def __init__(self, *, buffers: int) -> None:
        pairs = max(1, buffers // BUFFERS_PER_STEP)
        # why a stack: memory that nobody needed yet is not touched in turn
        self._free = [(_buffer(), _buffer()) for _ in range(pairs)]
        self._waiting: deque[asyncio.Future[_Pair]] = deque()

    def try_acquire(self) -> BufferPair | None:
        """A pair if one is free now."""
        return BufferPair(self, self._free.pop()) if self._free else None

    async def acquire(self) -> BufferPair:
        """Waits for a free pair, first come first served."""
        if self._free:
            return BufferPair(self, self._free.pop())
        turn: asyncio.Future[_Pair] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return BufferPair(self, await turn)
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif not turn.cancelled():
                self.give_back(turn.result())
            raise

    def give_back(self, pair: _Pair) -> None:
        """To whoever waits longest, else it is free."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(pair)
                return
        self._free.append(pair)


class BufferPair:
    """Two buffers on loan. They go back together, when everybody who holds the pair has released it."""

    def __init__(self, owner: FrameBuffers, pair: _Pair) -> None:
        self.window, self.packing = self._pair = pair
        self._owner = owner
        self._holders = 1

    def hold(self) -> None:
        self._holders += 1

    def release(self) -> None:
        self._holders -= 1
        if self._holders == 0:
            self._owner.give_back(self._pair)


def _buffer() -> memoryview:
    return memoryview(mmap.mmap(-1, FRAME_RAW_BYTES_MAX))
