"""Takes closed segments from the cache to the store, and says what is committed.

Invariants: a segment is uploaded only after its end is durable in the cache; committed rises contiguously, whatever
order the uploads end in; nothing in the store is ever overwritten: another segment under our name stops the disk; the
bytes in memory for uploads are bounded.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from typing_extensions import Buffer

from process_server.cache import Cache
from process_server.cache_files import CachedPayloads
from process_server.cache_log import RecordKind, file_name
from process_server.cache_records import ClosedSegmentRecord, decode_closed
from process_server.cache_recovery import CachedSegment
from process_server.disk_history import DiskHistory
from process_server.errors import CacheDamaged, CacheFault
from process_server.metrics import ProcessServerMetrics
from protocol.errors import ReplicationError
from storage.disk_archive import DiskArchive
from storage.errors import StoreFault

_log = structlog.get_logger("process_server.uploader")


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadRules:
    """Parallel uploads of one disk; bytes in memory of all of them; pauses after a failure, in seconds."""

    per_disk_max: int
    bytes_in_memory_max: int
    pause_seconds_first: float
    pause_seconds_max: float


class ByteBudget:
    """Lends bytes up to a limit, first come first served; whoever alone wants more than the limit gets it alone."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._lent_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def lend(self, size_bytes: int) -> AsyncIterator[None]:
        """The block runs with that many bytes lent to it."""
        wanted = min(size_bytes, self._bytes_max)
        if self._waiting or self._lent_bytes + wanted > self._bytes_max:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((wanted, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._give_back(wanted)
                raise
        else:
            self._lent_bytes += wanted
        try:
            yield
        finally:
            self._give_back(wanted)

    def _give_back(self, size_bytes: int) -> None:
        self._lent_bytes -= size_bytes
        while self._waiting:
            wanted, turn = self._waiting[0]
            if not turn.cancelled():
                if self._lent_bytes + wanted > self._bytes_max:
                    return
                self._lent_bytes += wanted
                turn.set_result(None)
            self._waiting.popleft()


class Uploader:
    """`closed` is told of every closed segment; `run` is the task that owns all uploads."""

    def __init__(
        self,
        archive: DiskArchive,
        cache: Cache,
        metrics: ProcessServerMetrics,
        rules: UploadRules,
        *,
        on_committed: Callable[[DiskHistory], None],
    ) -> None:
        self._archive = archive
        self._cache = cache
        self._metrics = metrics
        self._rules = rules
        self._on_committed = on_committed
        self._budget = ByteBudget(rules.bytes_in_memory_max)
        self._due: deque[DiskHistory] = deque()
        self._arrival = asyncio.Event()
        self._begun: set[CachedSegment] = set()
        """On their way."""
        self._there: set[CachedSegment] = set()
        """In the store, behind one of their disk that is not yet."""
        self._changed = asyncio.Event()
        self.store_fault: StoreFault | None = None
        """Why the newest attempt failed, None once one succeeded."""

    def closed(self, history: DiskHistory) -> None:
        """The disk has a segment more that waits, or room for another upload."""
        self._due.append(history)
        self._arrival.set()

    async def wait_until_committed(self, history: DiskHistory) -> None:
        """Returns once nothing of this disk waits for the store any more."""
        while history.waiting:
            self._changed.clear()
            await self._changed.wait()

    async def wait_until_quiet(self, history: DiskHistory) -> None:
        """Returns once no upload of this disk is under way, whatever became of its segments."""
        while any(segment.opening.disk == history.disk for segment in self._begun):
            self._changed.clear()
            await self._changed.wait()

    async def run(self) -> None:
        """Until cancelled; uploads that are under way are then given up, and repeated after a restart."""
        async with asyncio.TaskGroup() as group:
            while True:
                while not self._due:
                    self._arrival.clear()
                    await self._arrival.wait()
                history = self._due.popleft()
                for segment in history.waiting[: self._rules.per_disk_max]:
                    if segment not in self._begun and segment not in self._there:
                        self._begun.add(segment)
                        group.create_task(self._carry(history, segment))

    async def _carry(self, history: DiskHistory, segment: CachedSegment) -> None:
        """One segment to the store, however often that takes; ends when it is there or the disk cannot go on."""
        pause_seconds = self._rules.pause_seconds_first
        try:
            while segment in history.waiting:
                try:
                    await self._upload(segment)
                except StoreFault as error:
                    self.store_fault = error
                    self._metrics.upload_failures.labels(error.code).inc()
                    _log.warning("upload failed", disk=history.disk, code=error.code, reason=str(error))
                except CacheFault as error:
                    history.lose_cache(error)
                except ReplicationError as error:
                    self._metrics.upload_failures.labels(error.code).inc()
                    history.stop(error)
                else:
                    self.store_fault = None
                    if segment in history.waiting:
                        self._there.add(segment)
                        self._commit(history)
                    return
                await asyncio.sleep(pause_seconds if segment in history.waiting else 0)
                pause_seconds = min(2 * pause_seconds, self._rules.pause_seconds_max)
        finally:
            self._begun.discard(segment)
            self._changed.set()

    async def _upload(self, segment: CachedSegment) -> None:
        closed = segment.closed
        assert closed is not None
        async with self._budget.lend(closed.object_bytes):
            with self._metrics.stages.stage("gather", size_bytes=closed.object_bytes):
                around, frames = await self._gather(segment)
            parts: list[Buffer] = [around.header, *frames.payloads, around.end]
            with self._metrics.stages.stage("upload", size_bytes=closed.object_bytes):
                await self._archive.append_segment(segment.opening.name, parts, closed.trailer_hash)
            # why: only now; after a failure a worker thread of the store may still be reading them.
            self._cache.give_back(frames)

    async def _gather(self, segment: CachedSegment) -> tuple[ClosedSegmentRecord, CachedPayloads]:
        """The segment as it will lie in the store, from the cache, every digest checked. Raises CacheFault."""
        assert segment.closed_location is not None
        name = file_name(segment.closed_location.file_number)
        try:
            (payload,) = (await self._cache.read(RecordKind.SEGMENT_CLOSED, [segment.closed_location])).payloads
            frames = await self._cache.read(RecordKind.FRAME, list(segment.frames))
        except OSError as error:
            raise CacheDamaged(name=name, reason=str(error)) from error
        return decode_closed(payload, name), frames

    def _commit(self, history: DiskHistory) -> None:
        while history.waiting and history.waiting[0] in self._there:
            segment = history.waiting[0]
            assert segment.closed is not None
            self._there.discard(segment)
            history.segment_committed(segment)
            self._on_committed(history)
            self._metrics.committed_segments.inc()
            self._metrics.committed_bytes.inc(segment.closed.object_bytes)
        # why: what a disk lost with its cache is in nobody's `waiting` any more.
        self._there = {
            segment for segment in self._there if segment.opening.disk != history.disk or segment in history.waiting
        }
        if history.waiting:
            self.closed(history)
