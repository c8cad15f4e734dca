"""After a run: every point is recovered from store and recovery key alone and compared with the source; then the store
is tampered with, and recovery must refuse or still tell the truth.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from protocol.errors import ReplicationError
from protocol.vocabulary import DiskId, PointId
from recovery.core.point_choice import LATEST
from recovery.opened_vault import DiskCatalogue, open_vault
from recovery.rebuild import plan_recovery, rebuild_disk
from storage.history import HistoryPoint
from storage.object_names import PointName, SegmentName, parse
from tests.simulation.control import LedgerPoint
from tests.simulation.process import SimulatedProcess
from tests.simulation.script import Decision, Script
from tests.simulation.store import SimulatedStore, StoreContents
from tests.simulation.tampering import BLOTTED_OUT, TAMPERINGS

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What recovery makes of one disk: every asked point's image, or why it is refused, and the newest point."""

    images: dict[PointId, bytes | ReplicationError]
    latest: HistoryPoint | ReplicationError


async def recover_disk(world: World, store: SimulatedStore, disk: DiskId, points: Iterable[PointId]) -> Recovered:
    """Raises ReplicationError when the vault itself is refused."""
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
    try:
        latest: HistoryPoint | ReplicationError = catalogue.choose(LATEST)
    except ReplicationError as error:
        latest = error
    _check_epochs(world, disk, catalogue)
    return Recovered(images=images, latest=latest)


def _check_epochs(world: World, disk: DiskId, catalogue: DiskCatalogue) -> None:
    granted = {one.signed for one in world.server.disks[disk].grants.values()}
    for segment in catalogue.history.segments:
        if segment.header.opening.signed_grant not in granted:
            world.violate("7-granted-epochs-only", f"{segment.name} is read by a grant that nobody gave")


async def recover_everything(world: World, script: Script) -> None:
    """Every point that the configuration server states, and the newest ones again after each tampering."""
    process = SimulatedProcess("recovery")
    store = SimulatedStore(world.store, process, latency_seconds_max=RECOVERY_LATENCY_SECONDS_MAX)
    images: dict[PointId, bytes] = {}
    for disk in sorted(world.server.disks):
        points = [point for point in world.server.ledger.values() if point.committed.disk == disk]
        try:
            found = await recover_disk(world, store, disk, [point.committed.point for point in points])
        except ReplicationError as error:
            world.violate("11-stated-is-recoverable", f"disk {disk}: {error!r}", error)
            continue
        for point in points:
            image = found.images[point.committed.point]
            what = f"point {point.committed.epoch}:{point.committed.sequence}"
            if isinstance(image, ReplicationError):
                world.violate("11-stated-is-recoverable", f"{what}: {image!r}", image)
                continue
            world.points_recovered += 1
            world.invariants.recovered_point(point, image)
            images[point.committed.point] = image
        if points:
            _check_latest(world, found.latest, max(point.position for point in points))
    world.trace.event("recovered", world.points_recovered)
    for decision in script.decisions:
        if decision.kind in TAMPERINGS and world.server.disks:
            await _tamper(world, decision, images)


def _check_latest(world: World, latest: HistoryPoint | ReplicationError, newest: tuple[int, int]) -> None:
    """`latest` of a store that nobody touched."""
    if isinstance(latest, ReplicationError):
        world.violate("11-stated-is-recoverable", f"the newest point: {latest!r}", latest)
    elif (latest.position.epoch, latest.position.sequence) < newest:
        world.violate("10-newest-is-the-newest", f"{latest.position} was taken for the newest, {newest} was stated")


async def _tamper(world: World, decision: Decision, images: dict[PointId, bytes]) -> None:
    """Recovered points are what they were, or are refused; and no older one passes for the newest."""
    disks = sorted(world.server.disks)
    disk = disks[decision.draw % len(disks)]
    points = [point for point in world.server.ledger.values() if point.committed.disk == disk]
    newest = [
        point.committed.point for point in sorted(points, key=lambda point: point.position)[-TAMPERED_POINTS_MAX:]
    ]
    objects = {
        name: data
        for text, data in world.store.objects.items()
        if isinstance(name := parse(text), SegmentName) and name.disk == disk
    }
    changes = TAMPERINGS[decision.kind](objects, world.vault, decision.random) if newest else {}
    if all(objects.get(name) == data for name, data in changes.items()):
        return
    is_altered = [point for point in points if _is_altered(world, point, objects, changes)]
    removed = [str(_record_name(world, point)) for point in is_altered if decision.kind == BLOTTED_OUT]
    contents = tampered(world.store, {**{str(name): data for name, data in changes.items()}, **dict.fromkeys(removed)})
    store = SimulatedStore(contents, SimulatedProcess("recovery"), latency_seconds_max=RECOVERY_LATENCY_SECONDS_MAX)
    world.note_fault(decision.kind)
    try:
        found = await recover_disk(world, store, disk, newest)
    except ReplicationError as error:
        world.trace.event("refused", decision.kind, error.code)
        return
    for point in newest:
        image = found.images[point]
        if isinstance(image, ReplicationError):
            world.trace.event("refused", decision.kind, image.code)
        elif image != images.get(point):
            world.violate("9-tampering-is-refused", f"{decision.kind}: point {point} became another image")
    if not isinstance(found.latest, ReplicationError):
        taken = (found.latest.position.epoch, found.latest.position.sequence)
        newer = [point for point in points if point.position > taken]
        if any(str(_record_name(world, point)) in contents.objects for point in newer):
            world.violate("10-newest-is-the-newest", f"{decision.kind}: {taken} beside the record of a newer point")
        elif any(point in is_altered for point in newer):
            world.violate("10-newest-is-the-newest", f"{decision.kind}: {taken} before a damaged newer one, in silence")


def _is_altered(
    world: World, point: LedgerPoint, objects: dict[SegmentName, bytes], changes: Mapping[SegmentName, bytes | None]
) -> bool:
    """Whether the segment that holds a point is still there and is not what it was."""
    segments = world.invariants.stored[point.committed.disk, point.committed.epoch].segments
    ordinal = next(one for one, (first, last) in segments.items() if first <= point.committed.sequence <= last)
    name = next(one for one in objects if one.epoch == point.committed.epoch and one.ordinal == ordinal)
    return changes.get(name, objects[name]) not in (None, objects[name])


def _record_name(world: World, point: LedgerPoint) -> PointName:
    return PointName(vault=world.server.vault, point=point.committed.point)


def tampered(genuine: StoreContents, changes: dict[str, bytes | None]) -> StoreContents:
    """A copy of a store with some objects changed, made or removed."""
    contents = StoreContents(genuine.loop, random.Random(0))
    for name, data in {**genuine.objects, **changes}.items():
        if data is not None:
            contents.put(name, data)
    return contents
