"""Rebuilds a disk of one recovery point: plans, reads frames in parallel, verifies, decrypts, hands over to the target.

Nothing reaches the target that was not verified first: segments by their signed trailers, every frame by the index's
digest and by its seal. Every frame is read and decrypted once. At most READS_AT_ONCE reads of READ_BYTES are in memory.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import numpy
import numpy.typing

from protocol.vocabulary import EXTENT_DTYPE, EXTENT_LENGTH_BYTES_MAX, ChangeKind, ExtentTable
from recovery.core.rebuild_plan import FramePieces, RebuildPlan, plan_rebuild
from recovery.image_writer import ImageTarget
from recovery.opened_vault import DiskCatalogue, OpenedVault, StoredDisk
from runtime.blocking import finished
from storage.errors import VaultFault
from storage.frame_record import FrameRecord
from storage.history import HistoryPoint
from storage.sealing import FrameOpener
from storage.segment import VerifiedSegment

READS_AT_ONCE: Final = 6
READ_BYTES: Final = 4 * 2**20

Array = numpy.typing.NDArray[Any]
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmentShare:
    """A segment on the way to the point: its first frame_count frames are numbered from first_frame in the plan."""

    segment: VerifiedSegment
    first_frame: int
    frame_count: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecoveryPlan:
    """All that is decided before the first frame is read."""

    disk: StoredDisk
    catalogue: DiskCatalogue
    point: HistoryPoint
    shares: tuple[SegmentShare, ...]
    rebuild: RebuildPlan
    bytes_to_read: int

    @property
    def disk_size_bytes(self) -> int:
        return self.rebuild.disk_size_bytes

    @property
    def bytes_to_write(self) -> int:
        return self.rebuild.bytes_to_write

    @property
    def is_newest_visible(self) -> bool:
        return self.point == self.catalogue.points[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildProgress:
    """How far a rebuild has come; all numbers only rise."""

    bytes_read: int
    bytes_to_read: int
    bytes_written: int
    bytes_to_write: int


class ProgressListener(Protocol):
    def __call__(self, progress: RebuildProgress) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Batch:
    """Consecutive frames of one segment, read together."""

    segment: VerifiedSegment
    first_number: int
    """In the segment."""
    frames: tuple[FramePieces, ...]

    @property
    def end_number(self) -> int:
        return self.first_number + len(self.frames)

    @property
    def bytes_to_read(self) -> int:
        offsets = self.segment.index.offsets
        return int(offsets[self.end_number] - offsets[self.first_number])

    @property
    def bytes_to_write(self) -> int:
        return sum(int(frame.pieces["length"].sum()) for frame in self.frames)


async def plan_recovery(
    vault: OpenedVault, disk: StoredDisk, selector: str, *, executor: Executor | None
) -> RecoveryPlan:
    """Chooses the point and plans its reads and writes. Reads no frame.

    Raises what DiskCatalogue.choose raises, and StoreFault.
    """
    catalogue = await vault.catalogue(disk.disk)
    point = catalogue.choose(selector)
    path = catalogue.path_to(point)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(executor, _plan, disk, catalogue, point, path)


async def rebuild_disk(
    vault: OpenedVault,
    plan: RecoveryPlan,
    target: ImageTarget,
    *,
    executor: Executor | None,
    on_progress: ProgressListener | None = None,
) -> None:
    """Writes the whole disk; durable under the target's name on return. Cancelled or failed, the target is given up.

    Blocking and CPU work goes to `executor`. Raises PointDamaged (a frame is not what was sealed: nothing of it was
    written), TargetFault, StoreFault.
    """
    work = _Rebuild(vault, plan, target, executor, on_progress or _ignore)
    with target:
        await work.run()


class _Rebuild:
    """One rebuild under way."""

    def __init__(
        self,
        vault: OpenedVault,
        plan: RecoveryPlan,
        target: ImageTarget,
        executor: Executor | None,
        on_progress: ProgressListener,
    ) -> None:
        self._vault = vault
        self._plan = plan
        self._target = target
        self._executor = executor
        self._on_progress = on_progress
        self._bytes_read = 0
        self._bytes_written = 0

    async def run(self) -> None:
        rebuild = self._plan.rebuild
        await self._call(lambda: self._target.prepare(rebuild.holes(), data_bytes=rebuild.bytes_to_write))
        batches = _batches(self._plan)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(READS_AT_ONCE):
                    group.create_task(self._work(batches))
        except ExceptionGroup as failures:
            first = failures.exceptions[0]
            if isinstance(first, VaultFault):
                raise self._plan.catalogue.damaged(self._plan.point.point, first) from first
            raise first from failures
        await self._call(self._target.finish)

    async def _work(self, batches: Iterator[_Batch]) -> None:
        for batch in batches:
            records = await self._vault.archive.read_frames(batch.segment, batch.first_number, batch.end_number)
            await self._call(functools.partial(self._open_and_write, batch, records))
            self._bytes_read += batch.bytes_to_read
            self._bytes_written += batch.bytes_to_write
            self._tell()

    def _tell(self) -> None:
        self._on_progress(
            RebuildProgress(
                bytes_read=self._bytes_read,
                bytes_to_read=self._plan.bytes_to_read,
                bytes_written=self._bytes_written,
                bytes_to_write=self._plan.bytes_to_write,
            )
        )

    def _open_and_write(self, batch: _Batch, records: Sequence[FrameRecord]) -> None:
        opener = FrameOpener(header=batch.segment.header, vault_private_key=self._vault.private_key)
        for frame, record in zip(batch.frames, records, strict=True):
            raw = memoryview(opener.open(record.entry, record.sealed))
            for offset, length, source, _ in frame.pieces.tolist():
                self._target.write(offset, raw[source : source + length])

    async def _call(self, function: Callable[[], _Result]) -> _Result:
        """Runs it in the executor; returns, even when cancelled, only when it has ended: the target may then be
        closed."""
        return await finished(asyncio.get_running_loop().run_in_executor(self._executor, function))


def _ignore(progress: RebuildProgress) -> None:
    """For callers that do not look."""


def _plan(
    disk: StoredDisk, catalogue: DiskCatalogue, point: HistoryPoint, path: Sequence[VerifiedSegment]
) -> RecoveryPlan:
    shares: list[SegmentShare] = []
    tables: list[ExtentTable] = [numpy.zeros(0, dtype=EXTENT_DTYPE)]
    counts: list[Array] = [numpy.zeros(0, dtype=numpy.int64)]
    frame_total, size_bytes = 0, 0
    for segment in path:
        index = segment.index
        is_cut = segment is path[-1] and segment.name.epoch == point.position.epoch
        frame_count = index.frames_through(point.position.sequence) if is_cut else len(index)
        cut = _cut_off(segment.grant.disk_size_bytes, size_bytes)
        if len(cut):
            tables.append(cut)
            counts.append(numpy.array([len(cut)]))
            frame_total += 1
        shares.append(SegmentShare(segment=segment, first_frame=frame_total, frame_count=frame_count))
        tables.append(index.extents[: int(index.extent_starts[frame_count])])
        counts.append(index.heads["extent_count"][:frame_count])
        frame_total += frame_count
        size_bytes = segment.grant.disk_size_bytes
    rebuild = plan_rebuild(numpy.concatenate(tables), numpy.concatenate(counts), disk_size_bytes=size_bytes)
    return RecoveryPlan(
        disk=disk,
        catalogue=catalogue,
        point=point,
        shares=tuple(shares),
        rebuild=rebuild,
        bytes_to_read=sum(_bytes_of(share, rebuild.frames) for share in shares),
    )


def _cut_off(new_size_bytes: int, old_size_bytes: int) -> ExtentTable:
    """What a shrinking disk loses, as zeroes: should it grow again, the old bytes do not come back."""
    firsts = numpy.arange(new_size_bytes, old_size_bytes, EXTENT_LENGTH_BYTES_MAX, dtype=numpy.uint64)
    table = numpy.zeros(len(firsts), dtype=EXTENT_DTYPE)
    table["offset"] = firsts
    table["length"] = numpy.minimum(numpy.uint64(old_size_bytes) - firsts, numpy.uint64(EXTENT_LENGTH_BYTES_MAX))
    table["kind"] = ChangeKind.ZEROES
    return table


def _bytes_of(share: SegmentShare, frames: Array) -> int:
    first, end = numpy.searchsorted(frames, [share.first_frame, share.first_frame + share.frame_count])
    numbers = frames[first:end].astype(numpy.int64) - share.first_frame
    offsets = share.segment.index.offsets
    return int((offsets[numbers + 1] - offsets[numbers]).sum())


def _batches(plan: RecoveryPlan) -> Iterator[_Batch]:
    """All frames to read, in the order of storage, neighbours together up to READ_BYTES."""
    shares = iter(plan.shares)
    share: SegmentShare | None = None
    gathered: list[FramePieces] = []
    for frame in plan.rebuild.frame_pieces():
        if share is not None and gathered:
            first_number = gathered[0].frame - share.first_frame
            number = frame.frame - share.first_frame
            is_neighbour = frame.frame == gathered[-1].frame + 1 and number < share.frame_count
            offsets = share.segment.index.offsets
            if not is_neighbour or int(offsets[number + 1] - offsets[first_number]) > READ_BYTES:
                yield _Batch(segment=share.segment, first_number=first_number, frames=tuple(gathered))
                gathered = []
        while share is None or frame.frame >= share.first_frame + share.frame_count:
            share = next(shares)
        gathered.append(frame)
    if share is not None and gathered:
        first_number = gathered[0].frame - share.first_frame
        yield _Batch(segment=share.segment, first_number=first_number, frames=tuple(gathered))
