"""What agents and process servers may do, each call one transaction: record what they say, decide, answer with orders.

The caller's identity is an argument taken from its certificate; a report can only touch what that identity owns.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TypeVar

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from config_server.announcements import Announcements
from config_server.audit import Actor, AuditLog
from config_server.clock import ServerClock
from config_server.core.clones import observe_boot
from config_server.core.recovery_points import Statement, judge
from config_server.core.registry import match_disk
from config_server.core.server_clock import ServerClockState, date_instant
from config_server.database.disks import (
    StoredDisk,
    add_disk,
    candidates_for,
    count_protected_disks,
    end_protection,
    find_disk,
    find_disks,
    list_disks,
    list_grants,
    record_disk_reports,
    record_positions,
    renew_disk,
    set_paused,
)
from config_server.database.engine import Database
from config_server.database.members import (
    StoredCertificate,
    StoredMachine,
    StoredProcessServer,
    address_of,
    find_certificate,
    find_machine,
    find_process_server,
    list_machines,
    list_unassigned_machines,
    quarantine_machine,
    record_agent_report,
    record_process_server_report,
    release_machine,
)
from config_server.database.points import (
    add_point,
    complete_publications,
    find_newest_point,
    find_point,
    is_point_named,
)
from config_server.reconciler import Reconciler
from protocol.control import (
    DISKS_PER_MACHINE_MAX,
    AgentOrders,
    AgentReport,
    CommittedPoint,
    DiskAssignment,
    DiskPosition,
    DiskRegistration,
    ProcessServerOrders,
    ProcessServerReport,
)
from protocol.control_errors import MachineQuarantined, ResourceNotFound, TooManyDisks
from protocol.errors import CertificateRefused, NotPermitted
from protocol.vocabulary import DiskId, MachineId, ProcessServerId, Role, VaultId

log = structlog.get_logger(__name__)

_Orders = TypeVar("_Orders", AgentOrders, ProcessServerOrders)


class ControlPlane:
    """All methods: what they state is durable on return; those whose orders changed are woken then."""

    def __init__(
        self,
        *,
        vault: VaultId,
        database: Database,
        clock: ServerClock,
        reconciler: Reconciler,
        announcements: Announcements,
        audit: AuditLog,
    ) -> None:
        self._vault = vault
        self._database = database
        self._clock = clock
        self._reconciler = reconciler
        self._announcements = announcements
        self._audit = audit

    async def register_disk(self, machine_id: MachineId, registration: DiskRegistration) -> DiskAssignment:
        """Raises NotPermitted, DiskOfAnotherMachine, DiskChanged, TooManyDisks."""
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.writing() as connection:
            candidates = await candidates_for(connection, registration, machine_id)
            match = match_disk(registration, machine_id, candidates)
            if match is None or not match.is_protected:
                await _check_room(connection, machine_id)
            if match is None:
                disk = DiskId(secrets.token_hex(16))
                await add_disk(connection, disk, machine_id, registration, now_ns=now_ns)
            else:
                disk = match.disk
                await renew_disk(connection, disk, registration)
            machine = await _machine(connection, machine_id)
            if match is None or not match.is_protected:
                await self._audit.record(
                    connection, _agent_of(machine), "protect disk", disk, now_ns=now_ns, path=registration.path
                )
            elif (match.path, match.identity) != (registration.path, registration.identity):
                await self._audit.record(
                    connection, _agent_of(machine), "move disk", disk, now_ns=now_ns, path=registration.path
                )
            changed = await self._reconciler.reconcile_machine(connection, machine, now_ns=now_ns)
            machine = await _machine(connection, machine_id)
            address = await address_of(connection, machine.process_server)
        self._announcements.announce({*changed, machine_id})
        return DiskAssignment(disk=disk, machine=machine_id, vault=self._vault, process_server=address)

    async def unregister_disk(self, machine_id: MachineId, disk: DiskId, *, keep_data: bool) -> None:
        """Raises NotPermitted."""
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.writing() as connection:
            own = {stored.disk: stored for stored in await list_disks(connection, machine=machine_id)}
            _check_owned(machine_id, [disk], own)
            machine = await _machine(connection, machine_id)
            if own[disk].known.is_protected or own[disk].keeps_data != keep_data:
                await end_protection(connection, disk, keep_data=keep_data)
                await self._audit.record(
                    connection,
                    _agent_of(machine),
                    "end protection of disk",
                    disk,
                    now_ns=now_ns,
                    keeps_data=str(keep_data).lower(),
                )
            changed = await self._reconciler.reconcile_machine(connection, machine, now_ns=now_ns)
            served_by = () if machine.process_server is None else (machine.process_server,)
        self._announcements.announce({*changed, machine_id, *served_by})

    async def agent_report(
        self, machine_id: MachineId, report: AgentReport, certificate: StoredCertificate
    ) -> AgentOrders:
        """Raises NotPermitted for a disk of another machine, MachineQuarantined; then nothing of the report is
        recorded."""
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.writing() as connection:
            disks = await list_disks(connection, machine=machine_id)
            _check_owned(machine_id, [disk.disk for disk in report.disks], {stored.disk for stored in disks})
            machine = await _machine(connection, machine_id)
            boots = observe_boot(machine.boots, report.boot_id)
            if boots is None:
                await self._quarantine(connection, machine, report, now_ns=now_ns)
            else:
                await record_agent_report(connection, machine_id, report, boots, now_ns=now_ns)
                await record_disk_reports(connection, report.disks, now_ns=now_ns)
                # why the disks as they were: what a report says of them decides nothing here
                orders, changed = await self._answer_agent(connection, machine_id, disks, certificate, now_ns=now_ns)
        if boots is None:
            self._announcements.announce_to_all()
            raise MachineQuarantined(machine=machine_id)
        self._announcements.announce(changed)
        return orders

    async def release_machine(self, machine_id: MachineId, actor: Actor) -> None:
        """Ends a quarantine: whoever reports first is taken for the machine. Raises ResourceNotFound."""
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.writing() as connection:
            await self._audit.check_new(connection, actor)
            machine = await _machine(connection, machine_id)
            if not machine.is_quarantined:
                return
            await release_machine(connection, machine_id)
            await self._audit.record(connection, actor, "release machine", machine_id, now_ns=now_ns)
        self._announcements.announce_to_all()

    async def _answer_agent(
        self,
        connection: AsyncConnection,
        machine_id: MachineId,
        disks: Sequence[StoredDisk],
        certificate: StoredCertificate,
        *,
        now_ns: int,
    ) -> tuple[AgentOrders, set[str]]:
        machine = await _machine(connection, machine_id)
        changed = await self._reconciler.reconcile_machine(connection, machine, now_ns=now_ns, disks=disks)
        if changed:
            machine = await _machine(connection, machine_id)
        orders = await self._reconciler.agent_orders(connection, machine, certificate, now_ns=now_ns, disks=disks)
        return orders, changed

    async def _quarantine(
        self, connection: AsyncConnection, machine: StoredMachine, report: AgentReport, *, now_ns: int
    ) -> None:
        log.error(
            "two agents report as one machine", machine=machine.machine, name=machine.name, boot_id=report.boot_id
        )
        await quarantine_machine(connection, machine.machine)
        await self._audit.record(
            connection,
            Actor(kind=Role.CONFIGURATION_SERVER.value, identifier="", name="the configuration server"),
            "quarantine machine",
            machine.machine,
            now_ns=now_ns,
            boot_id=report.boot_id,
            other_boot_id=machine.boots.boot_id,
            host=report.host.name,
        )

    async def wait_for_agent_orders(
        self, machine_id: MachineId, certificate: StoredCertificate, *, revision: str, wait_seconds: float
    ) -> AgentOrders:
        async def read() -> AgentOrders:
            now_ns = (await self._clock.tick()).tick_ns
            async with self._database.reading() as connection:
                await _check_member(connection, certificate)
                machine = await _machine(connection, machine_id)
                return await self._reconciler.agent_orders(connection, machine, certificate, now_ns=now_ns)

        return await self._wait(machine_id, read, revision=revision, wait_seconds=wait_seconds)

    async def process_server_report(
        self, process_server: ProcessServerId, report: ProcessServerReport, certificate: StoredCertificate
    ) -> ProcessServerOrders:
        """Raises NotPermitted for an epoch that was not granted to it; then nothing of the report is recorded."""
        clock = await self._clock.tick()
        now_ns = clock.tick_ns
        async with self._database.writing() as connection:
            before = await _process_server(connection, process_server)
            await _check_granted(connection, process_server, report)
            await record_process_server_report(connection, process_server, report, now_ns=now_ns)
            advanced = await self._record_positions(connection, report.positions)
            await self._record_points(connection, report.committed_points, clock)
            await complete_publications(connection, process_server, report.completed_orders, now_ns=now_ns)
            machines = await list_unassigned_machines(connection)
            machines += [await _machine(connection, machine) for machine in sorted(advanced)]
            changed: set[str] = set()
            for machine in machines:
                changed |= await self._reconciler.reconcile_machine(connection, machine, now_ns=now_ns)
            if (before.host, before.port) != (report.host, report.port):
                served = await list_machines(connection, process_server=process_server)
                changed |= {machine.machine for machine in served}
            orders = await self._reconciler.process_server_orders(
                connection, process_server, certificate, now_ns=now_ns
            )
        self._announcements.announce({*changed, process_server})
        return orders

    async def wait_for_process_server_orders(
        self,
        process_server: ProcessServerId,
        certificate: StoredCertificate,
        *,
        revision: str,
        wait_seconds: float,
    ) -> ProcessServerOrders:
        async def read() -> ProcessServerOrders:
            now_ns = (await self._clock.tick()).tick_ns
            async with self._database.reading() as connection:
                await _check_member(connection, certificate)
                return await self._reconciler.process_server_orders(
                    connection, process_server, certificate, now_ns=now_ns
                )

        return await self._wait(process_server, read, revision=revision, wait_seconds=wait_seconds)

    async def pause_disk(self, disk: DiskId, actor: Actor, *, is_paused: bool) -> None:
        """Raises ResourceNotFound."""
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.writing() as connection:
            await self._audit.check_new(connection, actor)
            stored = await find_disk(connection, disk)
            if stored is None:
                raise ResourceNotFound(what="disk", identifier=disk)
            if stored.is_paused == is_paused:
                return
            await set_paused(connection, disk, is_paused=is_paused)
            action = "pause disk" if is_paused else "resume disk"
            await self._audit.record(connection, actor, action, disk, now_ns=now_ns)
        self._announcements.announce([stored.machine])

    async def _wait(
        self, identifier: str, read: Callable[[], Awaitable[_Orders]], *, revision: str, wait_seconds: float
    ) -> _Orders:
        deadline = asyncio.get_running_loop().time() + wait_seconds
        with self._announcements.subscribe(identifier) as waiter:
            orders = await read()
            while orders.revision == revision and not (self._announcements.is_closed or waiter.is_displaced):
                try:
                    async with asyncio.timeout_at(deadline):
                        await waiter.changed.wait()
                except TimeoutError:
                    return await read()
                waiter.changed.clear()
                orders = await read()
        return orders

    async def _record_positions(
        self, connection: AsyncConnection, positions: Collection[DiskPosition]
    ) -> set[MachineId]:
        """Returns the machines of disks that have gone on to another epoch. A late report of an old one is nothing."""
        stored = await find_disks(connection, [position.disk for position in positions])
        news = [
            position
            for position in positions
            if position.epoch >= stored[position.disk].newest_used_epoch and position != stored[position.disk].position
        ]
        await record_positions(connection, news)
        return {
            stored[position.disk].machine
            for position in news
            if position.epoch > stored[position.disk].newest_used_epoch
        }

    async def _record_points(
        self, connection: AsyncConnection, points: Collection[CommittedPoint], clock: ServerClockState
    ) -> None:
        disks = await find_disks(connection, [point.disk for point in points])
        for point in sorted(points, key=lambda one: (one.disk, one.epoch, one.sequence)):
            recorded = await find_point(connection, point.point, point.disk)
            statement = judge(point, None if recorded is None else recorded.point)
            if statement is Statement.CONTRADICTION:
                log.error("a point was reported otherwise before", point=point.point, disk=point.disk)
            if statement is not Statement.NEWS:
                continue
            previous = await find_newest_point(connection, point.disk, before=(point.epoch, point.sequence))
            dated = date_instant(point.instant_ns, clock.spans, None if previous is None else previous.dated)
            is_name_taken = await is_point_named(connection, point.point)
            await add_point(connection, point, clock_generation=dated.generation, now_ns=clock.tick_ns)
            if is_name_taken:
                log.error("another disk has a point of this name; it is not published", point=point.point)
                continue
            machine = disks[point.disk].machine
            await self._reconciler.order_point(connection, point, machine, now_ns=clock.tick_ns)


async def _check_member(connection: AsyncConnection, certificate: StoredCertificate) -> None:
    """A long poll outlives the check at its beginning."""
    stored = await find_certificate(connection, certificate.serial)
    if stored is None or stored.is_revoked:
        raise CertificateRefused(subject=f"{certificate.role.value} {certificate.identifier}", reason="it was revoked")
    if certificate.role is Role.AGENT:
        machine = await _machine(connection, MachineId(certificate.identifier))
        if machine.is_quarantined:
            raise MachineQuarantined(machine=machine.machine)


def _agent_of(machine: StoredMachine) -> Actor:
    return Actor(kind=Role.AGENT.value, identifier=machine.machine, name=machine.name)


async def _check_room(connection: AsyncConnection, machine: MachineId) -> None:
    if await count_protected_disks(connection, machine) >= DISKS_PER_MACHINE_MAX:
        raise TooManyDisks(limit=DISKS_PER_MACHINE_MAX)


def _check_owned(machine: MachineId, named: Collection[DiskId], own: Collection[DiskId]) -> None:
    for disk in named:
        if disk not in own:
            raise NotPermitted(subject=f"machine {machine}", reason=f"disk {disk} is not one of its disks")


async def _check_granted(
    connection: AsyncConnection, process_server: ProcessServerId, report: ProcessServerReport
) -> None:
    named = {(position.disk, position.epoch) for position in report.positions}
    named |= {(point.disk, point.epoch) for point in report.committed_points}
    granted = {
        (grant.disk, grant.epoch)
        for grant in await list_grants(connection, {disk for disk, _ in named})
        if grant.process_server == process_server
    }
    for disk, epoch in sorted(named - granted):
        raise NotPermitted(
            subject=f"process server {process_server}", reason=f"epoch {epoch} of disk {disk} was not granted to it"
        )


async def _machine(connection: AsyncConnection, machine: MachineId) -> StoredMachine:
    stored = await find_machine(connection, machine)
    if stored is None:
        raise ResourceNotFound(what="machine", identifier=machine)
    return stored


async def _process_server(connection: AsyncConnection, process_server: ProcessServerId) -> StoredProcessServer:
    stored = await find_process_server(connection, process_server)
    if stored is None:
        raise ResourceNotFound(what="process server", identifier=process_server)
    return stored
