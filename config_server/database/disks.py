"""Disks with what their agents and process servers last reported of them, and the grants that were signed for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sqlalchemy import Row, bindparam, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from config_server.core.registry import KnownDisk
from config_server.database.schema import disks, grants, machines
from protocol.control import DiskIdentity, DiskPosition, DiskRegistration, DiskReport
from protocol.vocabulary import DiskId, MachineId, ProcessServerId


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDisk:
    known: KnownDisk
    registered_ns: int
    keeps_data: bool
    is_paused: bool
    report: DiskReport | None
    reported_ns: int | None
    position: DiskPosition | None
    newest_used_epoch: int
    """The highest epoch that a process server has reported, 0 if none."""

    @property
    def disk(self) -> DiskId:
        return self.known.disk

    @property
    def machine(self) -> MachineId:
        return self.known.machine


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredGrant:
    disk: DiskId
    epoch: int
    process_server: ProcessServerId
    record: bytes


async def list_disks(connection: AsyncConnection, *, machine: MachineId | None = None) -> list[StoredDisk]:
    """All, or those of one machine, also those whose protection ended; in the order of registration."""
    query = select(disks).order_by(disks.c.registered_ns, disks.c.disk)
    if machine is not None:
        query = query.where(disks.c.machine == machine)
    return [_disk(row) for row in await connection.execute(query)]


async def page_disks(connection: AsyncConnection, *, after: str, limit: int) -> list[StoredDisk]:
    """By identifier, behind `after`."""
    query = select(disks).where(disks.c.disk > after).order_by(disks.c.disk).limit(limit)
    return [_disk(row) for row in await connection.execute(query)]


async def list_disks_of_machines(
    connection: AsyncConnection, machine_ids: Collection[MachineId]
) -> dict[MachineId, list[StoredDisk]]:
    """In the order of registration."""
    query = select(disks).where(disks.c.machine.in_(machine_ids)).order_by(disks.c.registered_ns, disks.c.disk)
    found: dict[MachineId, list[StoredDisk]] = defaultdict(list)
    for stored in map(_disk, await connection.execute(query)):
        found[stored.machine].append(stored)
    return found


async def find_disk(connection: AsyncConnection, disk: DiskId) -> StoredDisk | None:
    row = (await connection.execute(select(disks).where(disks.c.disk == disk))).one_or_none()
    return None if row is None else _disk(row)


async def find_disks(connection: AsyncConnection, disk_ids: Iterable[DiskId]) -> dict[DiskId, StoredDisk]:
    """Those that exist."""
    query = select(disks).where(disks.c.disk.in_(set(disk_ids)))
    return {stored.disk: stored for stored in map(_disk, await connection.execute(query))}


async def list_disks_of_process_server(
    connection: AsyncConnection, process_server: ProcessServerId
) -> list[StoredDisk]:
    """Those of the machines assigned to it, also those whose protection ended."""
    query = (
        select(disks)
        .join(machines, machines.c.machine == disks.c.machine)
        .where(machines.c.process_server == process_server)
        .order_by(disks.c.disk)
    )
    return [_disk(row) for row in await connection.execute(query)]


async def candidates_for(
    connection: AsyncConnection, registration: DiskRegistration, machine: MachineId
) -> list[KnownDisk]:
    """The disks that a registration could mean or clash with, as core.registry.match_disk asks for them."""
    clashes = [disks.c.machine == machine]
    if registration.identity.wwn is not None:
        clashes.append(disks.c.wwn == registration.identity.wwn)
    query = select(disks).where(or_(*clashes)).order_by(disks.c.registered_ns.desc(), disks.c.disk)
    # why: data that was given up is no longer a disk that one could go on with
    return [
        stored.known
        for stored in map(_disk, await connection.execute(query))
        if stored.known.is_protected or stored.keeps_data
    ]


async def add_disk(
    connection: AsyncConnection,
    disk: DiskId,
    machine: MachineId,
    registration: DiskRegistration,
    *,
    now_ns: int,
) -> None:
    await connection.execute(
        insert(disks).values(
            disk=disk,
            machine=machine,
            path=registration.path,
            identity=registration.identity.model_dump_json(),
            wwn=registration.identity.wwn,
            registered_ns=now_ns,
            is_protected=True,
            keeps_data=True,
            is_paused=False,
            newest_used_epoch=0,
        )
    )


async def renew_disk(connection: AsyncConnection, disk: DiskId, registration: DiskRegistration) -> None:
    """It is protected (again), where and as it was found now."""
    await connection.execute(
        update(disks)
        .where(disks.c.disk == disk)
        .values(
            path=registration.path,
            identity=registration.identity.model_dump_json(),
            wwn=registration.identity.wwn,
            is_protected=True,
            keeps_data=True,
        )
    )


async def end_protection(connection: AsyncConnection, disk: DiskId, *, keep_data: bool) -> None:
    """Data that was given up once is not taken back by a later request to keep it."""
    await connection.execute(update(disks).where(disks.c.disk == disk).values(is_protected=False))
    if not keep_data:
        await connection.execute(update(disks).where(disks.c.disk == disk).values(keeps_data=False))


async def set_paused(connection: AsyncConnection, disk: DiskId, *, is_paused: bool) -> None:
    await connection.execute(update(disks).where(disks.c.disk == disk).values(is_paused=is_paused))


async def record_disk_reports(connection: AsyncConnection, reports: Iterable[DiskReport], *, now_ns: int) -> None:
    rows = [
        {"key": report.disk, "report": report.model_dump_json(), "reported_ns": now_ns, "path": report.path}
        for report in reports
    ]
    if rows:
        await connection.execute(update(disks).where(disks.c.disk == bindparam("key")), rows)


async def record_positions(connection: AsyncConnection, positions: Iterable[DiskPosition]) -> None:
    rows = [
        {"key": position.disk, "position": position.model_dump_json(), "newest_used_epoch": position.epoch}
        for position in positions
    ]
    if rows:
        await connection.execute(update(disks).where(disks.c.disk == bindparam("key")), rows)


async def list_grants(connection: AsyncConnection, disk_ids: Iterable[DiskId]) -> list[StoredGrant]:
    """All that were ever signed for these disks, by disk and epoch."""
    query = select(grants).where(grants.c.disk.in_(list(disk_ids))).order_by(grants.c.disk, grants.c.epoch)
    return [
        StoredGrant(disk=row.disk, epoch=row.epoch, process_server=row.process_server, record=row.record)
        for row in await connection.execute(query)
    ]


async def add_grant(connection: AsyncConnection, grant: StoredGrant, *, now_ns: int) -> None:
    await connection.execute(
        insert(grants).values(
            disk=grant.disk,
            epoch=grant.epoch,
            process_server=grant.process_server,
            record=grant.record,
            issued_ns=now_ns,
        )
    )


async def count_protected_disks(connection: AsyncConnection, machine: MachineId) -> int:
    query = select(func.count()).select_from(disks).where(disks.c.machine == machine, disks.c.is_protected)
    return (await connection.execute(query)).scalar_one()


def _disk(row: Row[tuple[object, ...]]) -> StoredDisk:
    known = KnownDisk(
        disk=row.disk,
        machine=row.machine,
        path=row.path,
        identity=DiskIdentity.model_validate_json(row.identity),
        is_protected=row.is_protected,
    )
    return StoredDisk(
        known=known,
        registered_ns=row.registered_ns,
        keeps_data=row.keeps_data,
        is_paused=row.is_paused,
        report=None if row.report is None else DiskReport.model_validate_json(row.report),
        reported_ns=row.reported_ns,
        position=None if row.position is None else DiskPosition.model_validate_json(row.position),
        newest_used_epoch=row.newest_used_epoch,
    )
