"""The durable spool of sealed frames: append-only log files shared by all disks, one synchronize for all that is
queued.

Invariants: what `append` returned survives power loss; after a failed write or synchronize nothing of that batch
counts, the file gets no further byte, what it held is read back and checked, and the batch goes into a new file; the
files never occupy more than the limit; a file is removed only when every segment with bytes in it is committed and that
is durable in a later file; one file's worth of room is kept for what closes and commits segments when frames have none,
and given out in small files, so that a full cache empties again however often it is restarted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import structlog

from process_server.cache_files import CachedPayloads, CacheFiles, ScannedFile
from process_server.cache_log import (
    BLOCK_BYTES,
    NO_DISK,
    CacheRecord,
    Location,
    RecordKind,
    batch_bytes,
    cache_record,
    file_name,
    padded,
)
from process_server.cache_records import DiskCheckpoint, encode_checkpoint, encode_file_ends
from process_server.errors import CacheFull, CacheUnwritable
from process_server.metrics import ProcessServerMetrics
from runtime.blocking import blocking
from runtime.directory import DurableDirectory
from storage.frame_record import RECORD_BYTES_MAX

KEPT_FILE_SHARES: Final = 16
"""The room of one file that is kept for closing and committing is given out in so many parts."""
WRITE_PAUSE_SECONDS_FIRST: Final = 0.1
WRITE_PAUSE_SECONDS_MAX: Final = 10.0
READ_ATTEMPTS_MAX: Final = 6
READ_PAUSE_SECONDS_FIRST: Final = 0.25
"""Twice as long each time: what cannot be read for eight seconds is given up."""

FILE_END_BYTES: Final = padded(RECORD_BYTES_MAX + BLOCK_BYTES)
"""A record that does not fit leaves so much of a file unused, at most."""

Result = TypeVar("Result")

_log = structlog.get_logger("process_server.cache")


@dataclass(slots=True, kw_only=True)
class _File:
    size_bytes: int
    end_bytes: int
    """What is synchronized and whole; what lies behind it means nothing."""
    segments: int = 0
    """Uncommitted segments with bytes in this file."""


class Cache:
    """One writer calls `append`; everybody may call the rest. All on one event loop."""

    def __init__(
        self,
        directory: DurableDirectory,
        executor: Executor,
        metrics: ProcessServerMetrics,
        *,
        bytes_max: int,
        file_bytes: int,
    ) -> None:
        self._files_io = CacheFiles(directory)
        self._executor = executor
        self._metrics = metrics
        self._bytes_max = bytes_max
        self._file_bytes = file_bytes
        self._files: dict[int, _File] = {}
        self._active: _File | None = None
        self._active_number = -1
        self._next_number = 0
        self._checkpoints: Callable[[], Iterable[DiskCheckpoint]] = lambda: ()
        self.write_fault: CacheUnwritable | None = None
        """What keeps the cache from being written at present, None while it works."""

    def start(self, scanned: Sequence[ScannedFile], checkpoints: Callable[[], Iterable[DiskCheckpoint]]) -> None:
        """Takes over the files that recovery found. checkpoints: where all disks stand, asked when a file is begun."""
        for found in scanned:
            self._files[found.file_number] = _File(size_bytes=found.size_bytes, end_bytes=found.end_bytes)
            self._next_number = max(self._next_number, found.file_number + 1)
        self._checkpoints = checkpoints
        self._gauge()

    @property
    def used_bytes(self) -> int:
        """What the files occupy, preallocated room included."""
        return sum(file.size_bytes for file in self._files.values())

    @property
    def bytes_max(self) -> int:
        return self._bytes_max

    def room_bytes(self) -> int:
        """What frames may still take: never the last file's worth, which closes and commits what is here.

        Told on the low side: the end of a file, where the next frame does not fit, is room for nobody.
        """
        free_files = max(0, self._bytes_max - self.used_bytes) // self._file_bytes
        active_bytes = self._active.size_bytes - self._active.end_bytes if self._active and free_files else 0
        usable_bytes = max(self._file_bytes - FILE_END_BYTES, self._file_bytes // 2)
        return max(0, free_files - 1) * usable_bytes + max(0, active_bytes - FILE_END_BYTES)

    def active_bytes(self) -> int:
        """What still fits into the file that is being written."""
        return self._active.size_bytes - self._active.end_bytes if self._active else 0

    def hold(self, file_number: int) -> None:
        """A segment that is not committed has bytes in this file."""
        self._files[file_number].segments += 1

    def release(self, file_numbers: Iterable[int]) -> None:
        """Takes back as many holds: the segment is committed and a durable record says so, or it was given up."""
        for file_number in file_numbers:
            self._files[file_number].segments -= 1

    async def append(self, records: Sequence[CacheRecord], *, has_frames: bool) -> list[Location]:
        """Writes the records as one batch and returns where their payloads lie; durable on return.

        Without records it only begins a file, if none is being written.
        Tries until the cache can be written, with growing pauses. has_frames: the batch may not take the room that is
        kept for closing segments. Raises CacheFull if there is no room; nothing was written then.
        """
        length = batch_bytes(records) if records else 0
        pause_seconds = 0.0
        while True:
            await asyncio.sleep(pause_seconds)
            try:
                await self._make_room(length, has_frames=has_frames)
                locations = await self._run(lambda: self._files_io.append(records)) if records else []
            except OSError as error:
                pause_seconds = min(max(WRITE_PAUSE_SECONDS_FIRST, 2 * pause_seconds), WRITE_PAUSE_SECONDS_MAX)
                await self._abandon(error)
                continue
            assert self._active is not None
            self._active.end_bytes += length
            self.write_fault = None
            self._gauge()
            return locations

    async def read(self, kind: RecordKind, locations: Sequence[Location]) -> CachedPayloads:
        """The payloads, verified. Raises CacheDamaged, and OSError once several attempts have failed."""
        # why: who cannot read them takes acknowledged change sets for lost, for good. That is too much for a moment in
        # which a device or the operating system could not give what it has.
        pause_seconds = READ_PAUSE_SECONDS_FIRST
        for _ in range(READ_ATTEMPTS_MAX - 1):
            try:
                return await self._run(lambda: self._files_io.read(kind, locations))
            except OSError as error:
                _log.warning("cannot read the cache", file=file_name(locations[0].file_number), error=str(error))
            await asyncio.sleep(pause_seconds)
            pause_seconds *= 2
        return await self._run(lambda: self._files_io.read(kind, locations))

    def give_back(self, read: CachedPayloads) -> None:
        """What was read is not needed any more, by anybody."""
        self._files_io.buffers.give_back(read.buffers)

    async def remove_unused(self) -> None:
        """Removes every file older than the active one that no uncommitted segment needs. Durable on return."""
        if self._active is None:
            # why: until a newer file's checkpoint says where the disks stand, the older ones do.
            return
        active = self._active_number
        unused = [number for number, file in self._files.items() if not file.segments and number < active]
        for number in unused:
            try:
                await self._run(partial(self._files_io.remove, number))
            except OSError as error:
                _log.warning("cannot remove cache file", file=file_name(number), error=str(error))
                return
            # why: the housekeeper and a writer without room may both be removing.
            self._files.pop(number, None)
        self._gauge()

    async def close(self) -> None:
        """Closes the active file. What was appended is durable anyway."""
        await self._run(self._files_io.abandon)
        self._active = None

    def fits(self, length_bytes: int, *, has_frames: bool) -> bool:
        """Whether a batch of that length can be appended now."""
        if self._active and self._active.end_bytes + length_bytes <= self._active.size_bytes:
            # why: when no other file can follow, the active one is the one that was kept free.
            return not has_frames or self.used_bytes + self._file_bytes <= self._bytes_max
        return self._next_file_bytes(self._checkpoint_records(), length_bytes, has_frames=has_frames) is not None

    def _next_file_bytes(self, checkpoint: list[CacheRecord], length_bytes: int, *, has_frames: bool) -> int | None:
        """How large a new file for a batch of that length is to be, None if there is no room for one."""
        needed_bytes = batch_bytes(checkpoint) + length_bytes
        room_bytes = self._bytes_max - self.used_bytes
        if max(self._file_bytes, needed_bytes) + self._file_bytes <= room_bytes:
            return max(self._file_bytes, needed_bytes)
        if has_frames:
            return None
        # why: every restart begins a file before it can remove one; what is kept free has to outlast many in a row.
        file_bytes = max(padded(self._file_bytes // KEPT_FILE_SHARES), needed_bytes)
        return file_bytes if file_bytes <= room_bytes else None

    async def _make_room(self, length_bytes: int, *, has_frames: bool) -> None:
        is_in_active = self._active and self._active.end_bytes + length_bytes <= self._active.size_bytes
        if is_in_active and self.fits(length_bytes, has_frames=has_frames):
            return
        checkpoint = self._checkpoint_records()
        file_bytes = self._next_file_bytes(checkpoint, length_bytes, has_frames=has_frames)
        if is_in_active or file_bytes is None:
            raise CacheFull(name=file_name(self._next_number), reason=f"limit of {self._bytes_max} bytes")
        number, self._next_number = self._next_number, self._next_number + 1
        # why: the file counts from before it exists, so that the limit holds however its creation ends; and nobody may
        # take it for unused meanwhile, or what is written and acknowledged next would go into a removed file.
        self._active, self._active_number = None, number
        file = self._files[number] = _File(size_bytes=file_bytes, end_bytes=0)
        file.end_bytes = await self._run(lambda: self._files_io.begin(number, checkpoint, preallocate_bytes=file_bytes))
        self._active = file

    def _checkpoint_records(self) -> list[CacheRecord]:
        ends = {number: file.end_bytes for number, file in self._files.items()}
        records = [cache_record(RecordKind.CHECKPOINT, NO_DISK, 0, 0, encode_file_ends(ends))]
        for checkpoint in self._checkpoints():
            payload = encode_checkpoint(checkpoint)
            records.append(
                cache_record(RecordKind.POSITION, checkpoint.disk, checkpoint.epoch, checkpoint.ordinal, payload)
            )
        return records

    async def _abandon(self, error: OSError) -> None:
        """The active file, or the one just begun, takes no more; what it holds is checked as the disk has it."""
        number = self._next_number - 1
        name = file_name(number)
        self.write_fault = CacheUnwritable(name=name, reason=str(error))
        self._metrics.cache_write_errors.inc()
        _log.error("cache file abandoned after an error", file=name, error=str(error))
        self._active = None
        try:
            await self._run(self._files_io.abandon)
            file = self._files.get(number)
            if file is None:
                return
            if not file.end_bytes:
                await self._run(lambda: self._files_io.remove(number))
                del self._files[number]
                return
            end_bytes = file.end_bytes
            found = await self._run(lambda: self._files_io.scan(number, end_bytes=end_bytes, verify_payloads=True))
            if found.end_bytes < end_bytes:
                _log.error("acknowledged bytes are damaged", file=name, good=found.end_bytes, durable=end_bytes)
            # why: a few errors in a row would otherwise fill the cache with files that hold next to nothing.
            await self._run(lambda: self._files_io.cut(number, end_bytes=end_bytes))
            file.size_bytes = end_bytes
        except OSError as reread_error:
            _log.error("cache file cannot be read back", file=name, error=str(reread_error))
        finally:
            self._active_number = -1

    async def _run(self, call: Callable[[], Result]) -> Result:
        # why: a cancelled writer's call goes on in its thread; nobody may close the file under it.
        return await blocking(self._executor, call)

    def _gauge(self) -> None:
        self._metrics.cache_bytes.set(self.used_bytes)
