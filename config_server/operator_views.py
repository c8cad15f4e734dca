"""What operators see: everything that was observed, with an honest statement of what could be recovered now."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from config_server.clock import ServerClock
from config_server.core.rpo import evaluate_rpo
from config_server.core.server_clock import ServerClockState
from config_server.database.disks import StoredDisk, find_disk, list_disks, list_disks_of_machines, page_disks
from config_server.database.engine import Database
from config_server.database.members import (
    StoredMachine,
    find_machine,
    find_machines,
    list_machines,
    list_process_servers,
    page_certificates,
    page_machines,
)
from config_server.database.points import (
    StoredPoint,
    count_publications,
    find_newest_point,
    list_newest_points,
    page_points,
)
from config_server.database.policies import StoredPolicy, find_policy, list_policies
from config_server.reconciler import Reconciler
from protocol.control_errors import ResourceNotFound
from protocol.operator_messages import (
    CertificateList,
    CertificateStatus,
    DiskList,
    DiskStatus,
    MachineList,
    MachineStatus,
    ProcessServerList,
    ProcessServerStatus,
    RecoveryPointList,
    RecoveryPointStatus,
)
from protocol.vocabulary import DiskId, ProcessServerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """At most `limit` rows behind the identifier `after`, which is the last one of the page before."""

    after: str
    limit: int


PAGE_ROWS: Final = 250
"""Of what is read in pages here: others wait no longer for the event loop than one of them takes."""


class OperatorViews:
    """Reads only."""

    def __init__(self, *, database: Database, clock: ServerClock, reconciler: Reconciler) -> None:
        self._database = database
        self._clock = clock
        self._reconciler = reconciler

    async def all_machines(self) -> AsyncIterator[MachineStatus]:
        after: str | None = ""
        while after is not None:
            listed = await self.machines(Page(after=after, limit=PAGE_ROWS))
            for machine in listed.machines:
                yield machine
            after = listed.next

    async def all_disks(self) -> AsyncIterator[DiskStatus]:
        after: str | None = ""
        while after is not None:
            listed = await self.disks(Page(after=after, limit=PAGE_ROWS))
            for disk in listed.disks:
                yield disk
            after = listed.next

    async def machines(self, page: Page) -> MachineList:
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.reading() as connection:
            stored = await page_machines(connection, after=page.after, limit=page.limit + 1)
            shown = stored[: page.limit]
            policies = {one.policy: one.content.name for one in await list_policies(connection)}
            disks = await list_disks_of_machines(connection, [machine.machine for machine in shown])
        machines = tuple(
            MachineStatus(
                machine=machine.machine,
                name=machine.name,
                host=machine.host,
                agent_version=machine.agent_version,
                boot_id=machine.boot_id,
                last_heard_ns=machine.heard_ns,
                is_silent=self._reconciler.is_silent(machine.heard_ns, now_ns=now_ns),
                disks=tuple(disk.disk for disk in disks.get(machine.machine, ()) if disk.known.is_protected),
                is_quarantined=machine.is_quarantined,
                policy=None if machine.policy is None else policies[machine.policy],
            )
            for machine in shown
        )
        next_after = shown[-1].machine if len(stored) > len(shown) else None
        return MachineList(now_ns=now_ns, machines=machines, next=next_after)

    async def disks(self, page: Page) -> DiskList:
        """Protected ones, and those whose protection ended."""
        clock = await self._clock.tick()
        async with self._database.reading() as connection:
            stored = await page_disks(connection, after=page.after, limit=page.limit + 1)
            shown = stored[: page.limit]
            machines = await find_machines(connection, {disk.machine for disk in shown})
            points = await list_newest_points(connection, [disk.disk for disk in shown])
            policies = {one.policy: one for one in await list_policies(connection)}

        def status(disk: StoredDisk) -> DiskStatus:
            machine = machines[disk.machine]
            policy = None if machine.policy is None else policies[machine.policy]
            return self._disk(disk, machine, policy, points.get(disk.disk), clock)

        next_after = shown[-1].disk if len(stored) > len(shown) else None
        return DiskList(now_ns=clock.tick_ns, disks=tuple(map(status, shown)), next=next_after)

    async def disk(self, disk: DiskId) -> DiskStatus:
        """Raises ResourceNotFound."""
        clock = await self._clock.tick()
        async with self._database.reading() as connection:
            stored = await find_disk(connection, disk)
            if stored is None:
                raise ResourceNotFound(what="disk", identifier=disk)
            machine = await find_machine(connection, stored.machine)
            assert machine is not None
            policy = None if machine.policy is None else await find_policy(connection, machine.policy)
            newest = await find_newest_point(connection, disk)
        return self._disk(stored, machine, policy, newest, clock)

    async def points(
        self, *, disk: DiskId | None, after: tuple[int, int, int, str] | None, limit: int
    ) -> RecoveryPointList:
        """after: (instant, epoch, sequence, disk) of the last one of the page before."""
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.reading() as connection:
            found = await page_points(connection, disk=disk, after=after, limit=limit + 1)
        stored = found[:limit]
        points = tuple(
            RecoveryPointStatus(
                point=one.point.point,
                disk=one.point.disk,
                machine=one.machine,
                epoch=one.point.epoch,
                sequence=one.point.sequence,
                instant_ns=one.point.instant_ns,
                consistency=one.point.consistency,
                recorded_at_ns=one.recorded_ns,
                is_published=one.published_ns is not None,
            )
            for one in stored
        )
        last = stored[-1].point if len(found) > len(stored) else None
        next_after = None if last is None else f"{last.instant_ns}.{last.epoch}.{last.sequence}.{last.disk}"
        return RecoveryPointList(now_ns=now_ns, points=points, next=next_after)

    async def process_servers(self) -> ProcessServerList:
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.reading() as connection:
            machines = {machine.machine: machine.process_server for machine in await list_machines(connection)}
            disks: dict[ProcessServerId | None, list[DiskId]] = defaultdict(list)
            for disk in await list_disks(connection):
                if disk.known.is_protected:
                    disks[machines[disk.machine]].append(disk.disk)
            process_servers = tuple(
                [
                    ProcessServerStatus(
                        process_server=one.process_server,
                        name=one.name,
                        host=one.host,
                        port=one.port,
                        version=one.version,
                        last_heard_ns=one.heard_ns,
                        is_silent=self._reconciler.is_silent(one.heard_ns, now_ns=now_ns),
                        cache_bytes=one.cache_bytes,
                        cache_limit_bytes=one.cache_limit_bytes,
                        disks=tuple(disks[one.process_server]),
                        open_orders=await count_publications(connection, one.process_server),
                        faults=one.faults,
                    )
                    for one in await list_process_servers(connection)
                ]
            )
        return ProcessServerList(now_ns=now_ns, process_servers=process_servers)

    async def certificates(self, page: Page) -> CertificateList:
        """Those that have not expired."""
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.reading() as connection:
            found = await page_certificates(connection, valid_at_ns=now_ns, after=page.after, limit=page.limit + 1)
        stored = found[: page.limit]
        certificates = tuple(
            CertificateStatus(
                serial=one.serial,
                role=one.role,
                identifier=one.identifier,
                name=one.name,
                valid_from_ns=one.valid_from_ns,
                valid_until_ns=one.valid_until_ns,
                is_revoked=one.is_revoked,
            )
            for one in stored
        )
        next_after = stored[-1].serial if len(found) > len(stored) else None
        return CertificateList(now_ns=now_ns, certificates=certificates, next=next_after)

    def _disk(
        self,
        stored: StoredDisk,
        machine: StoredMachine,
        policy: StoredPolicy | None,
        newest: StoredPoint | None,
        clock: ServerClockState,
    ) -> DiskStatus:
        heard_ns = max(stored.reported_ns or 0, stored.registered_ns)
        report = stored.report
        return DiskStatus(
            disk=stored.disk,
            machine=stored.machine,
            machine_name=machine.name,
            path=stored.known.path,
            identity=stored.known.identity,
            is_protected=stored.known.is_protected,
            is_paused=stored.is_paused,
            state=None if report is None else report.state,
            source="" if report is None else report.source,
            is_settled=report is not None and report.is_settled,
            copied_bytes=0 if report is None else report.copied_bytes,
            copy_total_bytes=0 if report is None else report.copy_total_bytes,
            backlog_bytes=0 if report is None else report.backlog_bytes,
            reported_at_ns=stored.reported_ns,
            process_server=machine.process_server,
            position=stored.position,
            newest_point=None if newest is None else newest.point.point,
            newest_point_instant_ns=None if newest is None else newest.point.instant_ns,
            rpo=evaluate_rpo(
                clock,
                newest=None if newest is None else newest.dated,
                heard_ns=heard_ns,
                threshold_seconds=self._reconciler.terms_of(policy).rpo_threshold_seconds,
            ),
            error=None if report is None else report.error,
        )
