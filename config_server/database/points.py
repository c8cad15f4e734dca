"""Recovery points, what is still to be published in storage, and the spans of the server's clock."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Row, and_, delete, func, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from config_server.core.server_clock import ClockSpan, DatedInstant
from config_server.database.schema import clock_spans, disks, machines, points, publications
from protocol.control import CommittedPoint
from protocol.vocabulary import Consistency, DiskId, MachineId, PointId, ProcessServerId


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPoint:
    point: CommittedPoint
    machine: MachineId
    clock_generation: int | None
    recorded_ns: int
    published_ns: int | None

    @property
    def dated(self) -> DatedInstant:
        return DatedInstant(instant_ns=self.point.instant_ns, generation=self.clock_generation)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPublication:
    """Something that was signed and is to be created in storage: a point, or a version of a machine's description."""

    publication: str
    machine: MachineId
    point: PointId | None
    version: int | None
    record: bytes = field(repr=False)


async def find_point(connection: AsyncConnection, point: PointId, disk: DiskId) -> StoredPoint | None:
    query = _SELECT_POINTS.where(points.c.point == point, points.c.disk == disk)
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else _point(row)


async def is_point_named(connection: AsyncConnection, point: PointId) -> bool:
    """Whether any disk has a point of this name: storage has one object for it."""
    query = select(points.c.point).where(points.c.point == point).limit(1)
    return (await connection.execute(query)).one_or_none() is not None


async def find_newest_point(
    connection: AsyncConnection, disk: DiskId, *, before: tuple[int, int] | None = None
) -> StoredPoint | None:
    """By position; before: only those below (epoch, sequence)."""
    query = _SELECT_POINTS.where(points.c.disk == disk)
    if before is not None:
        epoch, sequence = before
        query = query.where((points.c.epoch < epoch) | and_(points.c.epoch == epoch, points.c.sequence < sequence))
    query = query.order_by(points.c.epoch.desc(), points.c.sequence.desc()).limit(1)
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else _point(row)


async def list_newest_points(connection: AsyncConnection, disk_ids: Collection[DiskId]) -> dict[DiskId, StoredPoint]:
    """By position, of each of these disks that has one."""
    newest = (
        select(points.c.point)
        .where(points.c.disk == disks.c.disk)
        .order_by(points.c.epoch.desc(), points.c.sequence.desc())
        .limit(1)
        .correlate(disks)
        .scalar_subquery()
    )
    query = _SELECT_POINTS.where(points.c.point == newest, disks.c.disk.in_(disk_ids))
    return {stored.point.disk: stored for stored in map(_point, await connection.execute(query))}


async def page_points(
    connection: AsyncConnection, *, disk: DiskId | None, after: tuple[int, int, int, str] | None, limit: int
) -> list[StoredPoint]:
    """Newest first, behind `after`: (instant, epoch, sequence, disk)."""
    order = (points.c.instant_ns, points.c.epoch, points.c.sequence, points.c.disk)
    query = _SELECT_POINTS.order_by(*(column.desc() for column in order))
    if disk is not None:
        query = query.where(points.c.disk == disk)
    if after is not None:
        query = query.where(tuple_(*order) < after)
    return [_point(row) for row in await connection.execute(query.limit(limit))]


async def add_point(
    connection: AsyncConnection, point: CommittedPoint, *, clock_generation: int | None, now_ns: int
) -> None:
    await connection.execute(
        insert(points).values(
            point=point.point,
            disk=point.disk,
            epoch=point.epoch,
            sequence=point.sequence,
            instant_ns=point.instant_ns,
            clock_generation=clock_generation,
            consistency=point.consistency.value,
            recorded_ns=now_ns,
        )
    )


async def add_publication(connection: AsyncConnection, publication: StoredPublication, *, now_ns: int) -> None:
    await connection.execute(
        insert(publications).values(
            publication=publication.publication,
            machine=publication.machine,
            point=publication.point,
            version=publication.version,
            record=publication.record,
            ordered_ns=now_ns,
        )
    )


async def list_publications(
    connection: AsyncConnection, process_server: ProcessServerId, *, limit: int
) -> list[StoredPublication]:
    """What this process server still has to do, oldest first."""
    query = (
        select(publications)
        .join(machines, machines.c.machine == publications.c.machine)
        .where(machines.c.process_server == process_server)
        .order_by(publications.c.ordered_ns, publications.c.publication)
        .limit(limit)
    )
    return [
        StoredPublication(
            publication=row.publication,
            machine=row.machine,
            point=row.point,
            version=row.version,
            record=row.record,
        )
        for row in await connection.execute(query)
    ]


async def count_publications(connection: AsyncConnection, process_server: ProcessServerId) -> int:
    query = (
        select(func.count()).select_from(publications.join(machines)).where(machines.c.process_server == process_server)
    )
    return (await connection.execute(query)).scalar_one()


async def complete_publications(
    connection: AsyncConnection, process_server: ProcessServerId, completed: Collection[str], *, now_ns: int
) -> None:
    """Those of this process server's machines; what is not known (a repeat) is nothing to do."""
    if not completed:
        return
    query = (
        select(publications.c.publication, publications.c.point)
        .join(machines, machines.c.machine == publications.c.machine)
        .where(machines.c.process_server == process_server, publications.c.publication.in_(list(completed)))
    )
    done = (await connection.execute(query)).all()
    published = [row.point for row in done if row.point is not None]
    await connection.execute(update(points).where(points.c.point.in_(published)).values(published_ns=now_ns))
    await connection.execute(
        delete(publications).where(publications.c.publication.in_([row.publication for row in done]))
    )


async def read_clock_spans(connection: AsyncConnection) -> tuple[ClockSpan, ...]:
    rows = await connection.execute(select(clock_spans).order_by(clock_spans.c.generation))
    return tuple(ClockSpan(generation=row.generation, first_ns=row.first_ns, last_ns=row.last_ns) for row in rows)


async def replace_clock_spans(connection: AsyncConnection, spans: Sequence[ClockSpan]) -> None:
    await connection.execute(delete(clock_spans))
    await connection.execute(
        insert(clock_spans),
        [{"generation": span.generation, "first_ns": span.first_ns, "last_ns": span.last_ns} for span in spans],
    )


_SELECT_POINTS = select(points, disks.c.machine).join(disks, disks.c.disk == points.c.disk)


def _point(row: Row[tuple[object, ...]]) -> StoredPoint:
    point = CommittedPoint.model_validate(
        {
            "disk": row.disk,
            "epoch": row.epoch,
            "sequence": row.sequence,
            "point": row.point,
            "instant_ns": row.instant_ns,
            "consistency": Consistency(row.consistency),
        }
    )
    return StoredPoint(
        point=point,
        machine=row.machine,
        clock_generation=row.clock_generation,
        recorded_ns=row.recorded_ns,
        published_ns=row.published_ns,
    )
