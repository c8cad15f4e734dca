"""The one task that writes the cache: takes everything that is queued, appends it as one batch, then says so.

Invariants: items become durable in the order in which they were put; nothing is told before its batch is synchronized;
a frame for which the cache has no room is refused, never waited for, so that what closes segments gets past it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Final, Protocol

import structlog

from process_server.cache import Cache
from process_server.cache_log import (
    HEADER_BYTES,
    ROW_BYTES,
    ROWS_MAX,
    CacheRecord,
    Location,
    padded,
)
from process_server.errors import CacheFull
from process_server.metrics import ProcessServerMetrics
from protocol.errors import ReplicationError

BATCH_BYTES_MAX: Final = 4 * 2**20
BATCH_ITEMS_MAX: Final = ROWS_MAX // 4
"""An item makes at most two records."""
FULL_PAUSE_SECONDS: Final = 1.0

_log = structlog.get_logger("process_server.cache")


class CacheItem(Protocol):
    """Something that goes into the cache in its turn. All calls come from the writer's task."""

    is_frame: bool

    def is_ready(self) -> bool:
        """prepare() will not wait for a worker thread's earlier work."""
        ...

    async def wait_until_ready(self) -> None: ...

    async def prepare(self) -> Sequence[CacheRecord]:
        """Its records, none if there is nothing to write after all. Changes nothing yet."""
        ...

    def placed(self) -> None:
        """Its records will be in the next batch."""
        ...

    def durable(self, locations: Sequence[Location]) -> None:
        """They are synchronized, and lie there."""
        ...

    def refused(self, error: ReplicationError) -> None:
        """They will not be written. Frames only."""
        ...


class Barrier:
    """Passes once everything that was put before it is durable."""

    is_frame = False

    def __init__(self) -> None:
        self.passed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def is_ready(self) -> bool:
        return True

    async def wait_until_ready(self) -> None:
        return

    async def prepare(self) -> Sequence[CacheRecord]:
        return ()

    def placed(self) -> None:
        return

    def durable(self, locations: Sequence[Location]) -> None:
        if not self.passed.done():
            self.passed.set_result(None)

    def refused(self, error: ReplicationError) -> None:
        raise AssertionError("only frames are refused") from error


class CacheWriter:
    """`put` from anywhere on the loop; `run` is the task. What is queued is bounded by credit and by the number of
    disks.
    """

    def __init__(self, cache: Cache, metrics: ProcessServerMetrics) -> None:
        self._cache = cache
        self._metrics = metrics
        self._queue: deque[CacheItem] = deque()
        self._head: tuple[CacheItem, Sequence[CacheRecord]] | None = None
        self._arrival = asyncio.Event()

    def put(self, item: CacheItem) -> None:
        self._queue.append(item)
        self._arrival.set()

    async def barrier(self) -> None:
        """Returns once everything that was put before is durable."""
        barrier = Barrier()
        self.put(barrier)
        await barrier.passed

    async def run(self) -> None:
        """Until cancelled. Between two batches nothing is half done."""
        # why: a new file says where every disk stands, so that older ones can go. A cache that was full when it was
        # stopped, with nothing left to close or to commit, would otherwise stay full.
        await self._append([], has_frames=False)
        while True:
            batch, has_frames = await self._gather()
            records = [record for _, item_records in batch for record in item_records]
            locations = await self._append(records, has_frames=has_frames) if records else []
            place = 0
            for item, item_records in batch:
                item.durable(locations[place : place + len(item_records)])
                place += len(item_records)
            # why: a writer that never has to wait must still let the others have their turn.
            await asyncio.sleep(0)

    async def _append(self, records: Sequence[CacheRecord], *, has_frames: bool) -> list[Location]:
        size_bytes = sum(record.payload_bytes for record in records)
        with self._metrics.stages.stage("synchronize", size_bytes=size_bytes):
            while True:
                try:
                    locations = await self._cache.append(records, has_frames=has_frames)
                except CacheFull as error:
                    # why: there was room when the batch was gathered, and an error took the file since. What closes and
                    # commits segments stands behind this batch, so that it may take of the room that is kept for that.
                    _log.warning("cache is full to the last file", reason=str(error))
                    has_frames = False
                    await asyncio.sleep(FULL_PAUSE_SECONDS)
                    await self._cache.remove_unused()
                    continue
                self._metrics.synchronizations.inc()
                return locations

    async def _gather(self) -> tuple[list[tuple[CacheItem, Sequence[CacheRecord]]], bool]:
        """The next batch: the first item as soon as it is ready, and all that are ready behind it."""
        batch: list[tuple[CacheItem, Sequence[CacheRecord]]] = []
        has_frames = False
        payload_bytes = rows = first_bytes = 0
        while len(batch) < BATCH_ITEMS_MAX:
            if self._head is None and not await self._take_head(may_wait=not batch):
                break
            assert self._head is not None
            item, records = self._head
            added_bytes = sum(record.payload_bytes for record in records)
            length = padded(HEADER_BYTES + ROW_BYTES * (rows + len(records)) + payload_bytes + added_bytes)
            if records and rows and length > min(BATCH_BYTES_MAX, max(self._cache.active_bytes(), first_bytes)):
                # why: a batch ends where its file does; what came first may begin the next file.
                break
            with_frames = has_frames or item.is_frame
            if records and not self._cache.fits(length, has_frames=with_frames):
                if rows:
                    break
                if item.is_frame:
                    item.refused(CacheFull(name="a frame", reason=f"limit of {self._cache.bytes_max} bytes"))
                    records, with_frames = (), has_frames
            self._head = None
            if records:
                item.placed()
                has_frames = with_frames
                first_bytes = first_bytes or length
                rows += len(records)
                payload_bytes = payload_bytes + added_bytes
            batch.append((item, records))
        return batch, has_frames

    async def _take_head(self, *, may_wait: bool) -> bool:
        while not self._queue:
            if not may_wait:
                return False
            self._arrival.clear()
            await self._arrival.wait()
        item = self._queue[0]
        if not item.is_ready():
            if not may_wait:
                return False
            await item.wait_until_ready()
        self._queue.popleft()
        self._head = (item, await item.prepare())
        return True
