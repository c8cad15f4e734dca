"""After a run: every point is recovered from store and recovery key alone and compared with the source; then the store
is tampered with, and recovery must refuse or still tell the truth.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from protocol.errors import ReplicationError
from protocol.vocabulary import DiskId, PointId
from recovery.opened_vault import DiskCatalogue, open_vault
from recovery.rebuild import plan_recovery, rebuild_disk
from storage.object_names import SegmentName, parse
from tests.simulation.process import SimulatedProcess
from tests.simulation.store import SimulatedStore, StoreContents
from tests.simulation.tampering import TAMPERINGS

if TYPE_CHECKING:
    from tests.simulation.world import World

TAMPERED_POINTS_MAX: Final = 2
RECOVERY_LATENCY_SECONDS_MAX: Final = 0.001


class MemoryTarget:
    """recovery.image_writer.ImageTarget in memory. What is never zeroed and never written stays poisoned."""

    def __init__(self, size_bytes: int) -> None:
        self.image = bytearray(b"\xee") * size_bytes
        self.is_finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def prepare(self, holes: Iterable[tuple[int, int]], *, data_bytes: int) -> None:
        for first, end in holes:
            self.image[first:end] = bytes(end - first)

    def write(self, offset_bytes: int, data: memoryview) -> None:
        self.image[offset_bytes : offset_bytes + len(data)] = data

    def finish(self) -> None:
        self.is_finished = True


async def recover_images(
    world: World, store: SimulatedStore, disk: DiskId, points: list[PointId]
) -> dict[PointId, bytes | ReplicationError]:
    """Every point's image, or why it is refused. Raises ReplicationError when the vault itself is refused."""
    vault = await open_vault(store, world.vault.recovery_key)
    catalogue = await vault.catalogue(disk)

    async def same_catalogue(disk: DiskId) -> DiskCatalogue:
        return catalogue

    # why: planning reads the whole history anew for every point, which is right for one point and costs a run seconds
    vault.catalogue = same_catalogue  # type: ignore[method-assign]
    found = await vault.find_disk(disk)
    images: dict[PointId, bytes | ReplicationError] = {}
    for point in points:
        try:
            plan = await plan_recovery(vault, found, point, executor=None)
            target = MemoryTarget(plan.disk_size_bytes)
            await rebuild_disk(vault, plan, target, executor=None)
            images[point] = bytes(target.image)
        except ReplicationError as error:
            images[point] = error
    return images


async def recover_everything(world: World) -> None:
    """Every point that the configuration server states, and the newest ones again after tampering."""
    process = SimulatedProcess("recovery")
    store = SimulatedStore(world.store, process, latency_seconds_max=RECOVERY_LATENCY_SECONDS_MAX)
    images: dict[PointId, bytes] = {}
    for disk in sorted(world.server.disks):
        points = [point for point in world.server.ledger.values() if point.committed.disk == disk]
        try:
            found = await recover_images(world, store, disk, [point.committed.point for point in points])
        except ReplicationError as error:
            world.violate("11-stated-is-recoverable", f"disk {disk}: {error!r}", error)
            continue
        for point in points:
            image = found[point.committed.point]
            if isinstance(image, ReplicationError):
                world.violate(
                    "11-stated-is-recoverable",
                    f"point {point.committed.epoch}:{point.committed.sequence}: {image!r}",
                    image,
                )
                continue
            world.points_recovered += 1
            world.invariants.recovered_point(point, image)
            images[point.committed.point] = image
    world.trace.event("recovered", world.points_recovered)
    for disk in sorted(world.server.disks):
        await _tamper(world, disk, images)


async def _tamper(world: World, disk: DiskId, images: dict[PointId, bytes]) -> None:
    """One drawn tampering, and the forgery always: recovered points are what they were, or are refused."""
    draw = random.Random(f"{world.seed} tampering {disk}")
    points = [point.committed for point in world.server.ledger.values() if point.committed.disk == disk]
    newest = sorted(points, key=lambda point: (point.epoch, point.sequence))[-TAMPERED_POINTS_MAX:]
    kinds = [draw.choice(sorted(TAMPERINGS)), "forged"] if newest else []
    objects = {
        name: data
        for text, data in world.store.objects.items()
        if isinstance(name := parse(text), SegmentName) and name.disk == disk
    }
    for kind in dict.fromkeys(kinds):
        changes = TAMPERINGS[kind](objects, world.vault, draw)
        if all(objects.get(name) == data for name, data in changes.items()):
            continue
        contents = tampered(world.store, {str(name): data for name, data in changes.items()})
        store = SimulatedStore(contents, SimulatedProcess("recovery"), latency_seconds_max=RECOVERY_LATENCY_SECONDS_MAX)
        world.note_fault(f"store-{kind}")
        try:
            found = await recover_images(world, store, disk, [point.point for point in newest])
        except ReplicationError as error:
            world.trace.event("refused", kind, error.code)
            continue
        for point in newest:
            image = found[point.point]
            if isinstance(image, ReplicationError):
                world.trace.event("refused", kind, image.code)
            elif image != images.get(point.point):
                world.violate(
                    "9-tampering-is-refused", f"{kind}: point {point.epoch}:{point.sequence} became another image"
                )


def tampered(genuine: StoreContents, changes: dict[str, bytes | None]) -> StoreContents:
    """A copy of a store with some objects changed, made or removed."""
    contents = StoreContents(genuine.loop, random.Random(0))
    for name, data in {**genuine.objects, **changes}.items():
        if data is not None:
            contents.put(name, data)
    return contents
