"""A bounded pool of page-aligned buffers for frame bodies, shared by all channels of a program.

Invariants: a buffer belongs to one lease or to the pool; never more than `count` and one per connection exist; who
waits is served in order. All calls come from the event loop's thread.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from protocol.framing import BODY_BYTES_MAX

POOL_BUFFERS_DEFAULT: Final = 64
"""68 MiB of frame bodies at most: enough for the sealers and the cache's group commit to stay busy."""


class BufferLease:
    """One buffer in use. `view` is all of it; after release() nobody may touch it or anything made of it."""

    __slots__ = ("_is_released", "_pool", "view")

    def __init__(self, pool: BufferPool, view: memoryview) -> None:
        self._pool = pool
        self._is_released = False
        self.view = view

    def release(self) -> None:
        """Gives the buffer back. No error if it was given back before."""
        if not self._is_released:
            self._is_released = True
            self._pool._take_back(self.view)


class BufferPool:
    """`count` buffers of `bytes_each`, and one more for every connection that joined; memory is used only from the
    first time that a buffer is written."""

    def __init__(self, count: int = POOL_BUFFERS_DEFAULT, bytes_each: int = BODY_BYTES_MAX) -> None:
        self.count = count
        self.bytes_each = bytes_each
        self._free = [memoryview(mmap.mmap(-1, bytes_each)) for _ in range(count)]
        self._surplus = 0
        """Buffers to be dropped as soon as they are free."""
        self._waiting: OrderedDict[Callable[[BufferLease], None], None] = OrderedDict()

    @property
    def free(self) -> int:
        """How many buffers nobody uses, for metrics."""
        return len(self._free)

    def join(self) -> None:
        """One connection more. Its peer may leave a body unfinished for minutes: the buffer that this takes is not one
        of those that all others share, or slow peers would stop the fast ones."""
        if self._surplus:
            self._surplus -= 1
        else:
            self._take_back(memoryview(mmap.mmap(-1, self.bytes_each)))

    def leave(self) -> None:
        """One connection less."""
        if self._free:
            self._free.pop()
        else:
            self._surplus += 1

    def take(self) -> BufferLease | None:
        """A buffer, or None if all are in use."""
        return BufferLease(self, self._free.pop()) if self._free else None

    def wait(self, callback: Callable[[BufferLease], None]) -> None:
        """Calls `callback` once with the next buffer that is given back, after those who wait already."""
        self._waiting[callback] = None

    def stop_waiting(self, callback: Callable[[BufferLease], None]) -> None:
        """No error if it does not wait."""
        self._waiting.pop(callback, None)

    def _take_back(self, view: memoryview) -> None:
        if self._surplus:
            self._surplus -= 1
        elif self._waiting:
            callback, _ = self._waiting.popitem(last=False)
            callback(BufferLease(self, view))
        else:
            self._free.append(view)
