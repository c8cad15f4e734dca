"""The demo's story, step by step: a disk is replicated, changed, replicated again, and both moments are recovered."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from farpoint.demo.line import Line
from farpoint.demo.places import Places
from farpoint.demo.programs import Programs
from farpoint.demo.report import DemoResult, Phase, RecoveredPoint
from farpoint.demo.source_image import Changes, SourceImage, allocated_bytes, copy_sparse, source_image
from farpoint.demo.stores import DemoStore
from farpoint.progress import ProgressView
from protocol.operator_messages import DiskStatus, RecoveryPointStatus
from protocol.vocabulary import DiskId
from recovery.core.instants import instant_text
from recovery.verification import image_digest, images_are_identical
from runtime.output import notice

SIZE_BYTES_MIN: Final = 512 * 2**20

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Replicated:
    """What the line leaves behind when it is taken down."""

    disk: DiskId
    phases: tuple[Phase, ...]
    points: tuple[RecoveryPointStatus, ...]
    rpo_seconds: float | None


class Demo:
    """One run. Raises DemoFault for whatever goes wrong before the comparison."""

    def __init__(self, places: Places, store: DemoStore, view: ProgressView, *, size_bytes: int) -> None:
        self._places = places
        self._store = store
        self._view = view
        self._size_bytes = size_bytes

    async def run(self) -> DemoResult:
        """All of it; no process runs any more on return, and none after an error."""
        started = time.monotonic()
        self._places.make()
        image = source_image(self._places.disk_image, size_bytes=self._size_bytes)
        if image.kind != "ext4":
            notice("mkfs.ext4 is missing here: the source is a plain image of real file contents")
        notice(f"making an image ({image.kind}) of {self._size_bytes >> 20} MiB from real files")
        await _blocking(image.make)
        await _blocking(copy_sparse, self._places.disk_image, self._places.source(1))
        async with Programs(self._places.logs) as programs:
            await self._store.start(programs)
            async with Line(self._places, self._store, programs) as line:
                replicated, changes = await self._replicate(line, image)
                notice("stopping all servers; from here on there are only the store and a key file")
                await line.stop()
            recovered = [
                await self._recover(programs, image, number, replicated.disk, point)
                for number, point in enumerate(replicated.points, start=1)
            ]
            stored_bytes = await self._store.stored_bytes()
            await self._store.stop(programs)
        return DemoResult(
            disk=replicated.disk,
            image_kind=image.kind,
            size_bytes=self._size_bytes,
            allocated_bytes=allocated_bytes(self._places.source(1)),
            changes=changes,
            phases=replicated.phases,
            recovered=tuple(recovered),
            rpo_seconds=replicated.rpo_seconds,
            stored_bytes=stored_bytes,
            seconds=time.monotonic() - started,
            store=self._store.url,
            store_credentials=self._store.recovery_credentials,
            store_start_command=self._store.start_command,
            recovery_key=self._places.recovery_key,
        )

    async def _replicate(self, line: Line, image: SourceImage) -> tuple[_Replicated, Changes]:
        notice("making a vault; starting configuration server, process server and mobility agent on loopback")
        await line.raise_up()
        notice(f"initial replication over TLS 1.3 to port {line.data_port}")
        # why: what the programs cost before, they cost to start, not to replicate.
        idle, started = await line.counts(), time.monotonic()
        disk = await line.protect(self._places.disk_image)
        first = await line.wait_for_point(disk, after_ns=0, on_status=self._shower("initial replication"))
        initial_counts = (await line.counts()).since(idle)
        useful_bytes = allocated_bytes(self._places.source(1))
        initial = Phase(
            name="initial replication",
            seconds=time.monotonic() - started,
            counts=initial_counts,
            useful_bytes=useful_bytes,
        )
        self._view.show("initial replication", self._size_bytes, self._size_bytes)
        notice(f"recovery point {first.point} of {instant_text(first.instant_ns)}; changing the disk")
        before = await line.counts()
        changes = await _blocking(image.change)
        changed_ns, started = time.time_ns(), time.monotonic()
        await _blocking(copy_sparse, self._places.disk_image, self._places.source(2))
        await line.scan_now()
        second = await line.wait_for_point(disk, after_ns=changed_ns, on_status=self._shower("delta replication"))
        seconds = time.monotonic() - started
        rpo_seconds = await line.rpo_seconds(disk)
        counts = (await line.counts()).since(before)
        self._view.show("delta replication", self._size_bytes, self._size_bytes)
        notice(f"recovery point {second.point} of {instant_text(second.instant_ns)}")
        delta = Phase(name="delta replication", seconds=seconds, counts=counts, useful_bytes=changes.bytes_written)
        replicated = _Replicated(disk=disk, phases=(initial, delta), points=(first, second), rpo_seconds=rpo_seconds)
        return replicated, changes

    def _shower(self, step: str) -> Callable[[DiskStatus], None]:
        def show(status: DiskStatus) -> None:
            if status.copy_total_bytes:
                self._view.show(step, status.copied_bytes, status.copy_total_bytes)

        return show

    async def _recover(
        self, programs: Programs, image: SourceImage, number: int, disk: DiskId, point: RecoveryPointStatus
    ) -> RecoveredPoint:
        """By `farpoint recover`, as an operator would; then compared with the source of that moment."""
        target, source = self._places.recovered(number), self._places.source(number)

        def show(line: bytes) -> None:
            told = json.loads(line)
            if told.get("step") == "recover":
                self._view.show(f"recovery of point {number}", told["done_bytes"], told["total_bytes"])

        credentials = self._store.recovery_credentials
        lines = await programs.call(
            "farpoint",
            *("recover", "--store", self._store.url, "--recovery-key", self._places.recovery_key),
            *(() if credentials is None else ("--store-credentials-file", credentials)),
            *("--disk", disk, "--point", point.point, "--to", target, "--json"),
            on_line=show,
        )
        result = json.loads(lines[-1])
        return RecoveredPoint(
            point=point.point,
            instant=instant_text(point.instant_ns),
            seconds=result["seconds"],
            bytes_read=result["bytes_to_read"],
            source_digest=await _blocking(image_digest, source, size_bytes=self._size_bytes),
            recovered_digest=result["blake3"],
            is_identical=await _blocking(images_are_identical, source, target),
            is_file_system_sound=await _blocking(image.check, target),
        )


async def _blocking(function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(None, functools.partial(function, *arguments, **options))
