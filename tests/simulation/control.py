"""The configuration server as agents and process servers see it, in memory: real signed grants, orders, and a ledger
of points.

It answers with latency, may be away, and may do what it was asked and lose the reply. Its clock is the simulation's
true clock. What it states is checked against the store by tests/simulation/invariants.py; it believes reports as the
real one does.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.control import (
    AgentOrders,
    AgentReport,
    CertificateBundle,
    CommittedPoint,
    DiskAssignment,
    DiskIdentity,
    DiskOrder,
    DiskRegistration,
    ProcessServerAddress,
    ProcessServerOrder,
    ProcessServerOrders,
    ProcessServerReport,
    PublishMachineDescription,
    PublishPoint,
    RevocationList,
)
from protocol.control_errors import ControlFault, ServerUnreachable
from protocol.signed_records import (
    DiskDescription,
    Grant,
    MachineDescription,
    PointMember,
    PointRecord,
    sign_grant,
    sign_machine_description,
    sign_point,
)
from protocol.vocabulary import DiskId, MachineId, ProcessServerId, VaultId
from tests.simulation.clock import true_now_ns
from tests.simulation.process import SimulatedProcess

LATENCY_SECONDS_MAX: Final = 0.02
HEARTBEAT_SECONDS: Final = 2.0
LONG_POLL_STEP_SECONDS: Final = 0.25
SERVER: Final = "simulated"

Answer = TypeVar("Answer")


@dataclass(slots=True, kw_only=True)
class LedgerPoint:
    """A point that the configuration server states as recoverable, and since when."""

    committed: CommittedPoint
    stated_ns: int


@dataclass(slots=True, kw_only=True)
class RegisteredDisk:
    """One disk and its grants by epoch. The newest is the spare."""

    disk: DiskId
    path: str
    identity: DiskIdentity
    grants: dict[int, bytes] = field(default_factory=dict)
    current_epoch: int = 1


class ConfigurationServer:
    """Intent and observations. One machine, one process server; `copy_interval_seconds` holds for all disks."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        draw: random.Random,
        *,
        vault: VaultId,
        authority: Ed25519PrivateKey,
        process_server_key: bytes,
        copy_interval_seconds: float,
    ) -> None:
        self.loop = loop
        self.draw = draw
        self.vault = vault
        self.machine = MachineId(draw.randbytes(16).hex())
        self.process_server = ProcessServerId(draw.randbytes(16).hex())
        self._authority = authority
        self._process_server_key = process_server_key
        self._copy_interval_seconds = copy_interval_seconds
        self.disks: dict[DiskId, RegisteredDisk] = {}
        self.ledger: dict[str, LedgerPoint] = {}
        self.orders: dict[str, ProcessServerOrder] = {}
        self.revision = 1
        self.is_down = False
        self.lost_reply_probability = 0.0
        self.on_point: Callable[[LedgerPoint], None] = lambda point: None
        self.on_agent_report: Callable[[AgentReport], None] = lambda report: None
        self.on_process_server_report: Callable[[ProcessServerReport], None] = lambda report: None

    @property
    def address(self) -> ProcessServerAddress:
        return ProcessServerAddress(process_server=self.process_server, host="process-server.simulated", port=9443)

    def register(self, registration: DiskRegistration) -> DiskAssignment:
        known = [record for record in self.disks.values() if record.identity.serial == registration.identity.serial]
        if known:
            record = known[0]
        else:
            disk = DiskId(self.draw.randbytes(16).hex())
            record = RegisteredDisk(disk=disk, path=registration.path, identity=registration.identity)
            self.disks[disk] = record
            self._grant(record, 1, is_spare=False)
            self._grant(record, 2, is_spare=True)
            self._describe_machine()
            self.revision += 1
        return DiskAssignment(disk=record.disk, machine=self.machine, vault=self.vault, process_server=self.address)

    def unregister(self, disk: DiskId) -> None:
        if self.disks.pop(disk, None) is not None:
            self.revision += 1

    def agent_orders(self) -> AgentOrders:
        return AgentOrders(
            revision=f"{self.revision:x}",
            now_ns=true_now_ns(self.loop),
            heartbeat_seconds=HEARTBEAT_SECONDS,
            renew_certificate=False,
            disks=tuple(
                DiskOrder(
                    disk=disk,
                    process_server=self.address,
                    is_paused=False,
                    copy_interval_seconds=self._copy_interval_seconds,
                    point_interval_seconds=self._copy_interval_seconds,
                )
                for disk in sorted(self.disks)
            ),
            revoked=RevocationList(number=0),
        )

    def process_server_orders(self) -> ProcessServerOrders:
        return ProcessServerOrders(
            revision=f"{self.revision:x}",
            now_ns=true_now_ns(self.loop),
            heartbeat_seconds=HEARTBEAT_SECONDS,
            renew_certificate=False,
            grants=tuple(
                grant
                for disk in sorted(self.disks)
                for epoch, grant in sorted(self.disks[disk].grants.items())
                if epoch >= self.disks[disk].current_epoch
            ),
            revoked=RevocationList(number=0),
            orders=tuple(self.orders.values()),
        )

    def take_process_server_report(self, report: ProcessServerReport) -> None:
        for position in report.positions:
            record = self.disks.get(position.disk)
            if record is not None and position.epoch > record.current_epoch:
                record.current_epoch = position.epoch
                self._grant(record, position.epoch + 1, is_spare=True)
                self.revision += 1
        for order in report.completed_orders:
            if self.orders.pop(order, None) is not None:
                self.revision += 1
        for committed in report.committed_points:
            if committed.point not in self.ledger:
                self.ledger[committed.point] = LedgerPoint(committed=committed, stated_ns=true_now_ns(self.loop))
                self._publish(committed)
                self.on_point(self.ledger[committed.point])

    def _grant(self, record: RegisteredDisk, epoch: int, *, is_spare: bool) -> None:
        grant = Grant(
            vault=self.vault,
            machine=self.machine,
            disk=record.disk,
            epoch=epoch,
            parent_epoch=epoch - 1,
            process_server=self.process_server,
            process_server_key=self._process_server_key,
            issued_ns=true_now_ns(self.loop),
            disk_size_bytes=record.identity.size_bytes,
            sector_bytes=record.identity.logical_sector_bytes,
            is_spare=is_spare,
        )
        record.grants[epoch] = sign_grant(grant, self._authority)

    def _describe_machine(self) -> None:
        version = len(self.disks)
        description = MachineDescription(
            vault=self.vault,
            machine=self.machine,
            version=version,
            name="simulated machine",
            disks=tuple(
                DiskDescription(
                    disk=disk,
                    name=record.path,
                    size_bytes=record.identity.size_bytes,
                    sector_bytes=record.identity.logical_sector_bytes,
                )
                for disk, record in sorted(self.disks.items())
            ),
        )
        order = self.draw.randbytes(16).hex()
        self.orders[order] = PublishMachineDescription(
            order=order,
            machine=self.machine,
            version=version,
            record=sign_machine_description(description, self._authority),
        )

    def _publish(self, committed: CommittedPoint) -> None:
        member = PointMember(
            machine=self.machine, disk=committed.disk, epoch=committed.epoch, sequence=committed.sequence
        )
        record = PointRecord(
            vault=self.vault,
            point=committed.point,
            instant_ns=committed.instant_ns,
            consistency=committed.consistency,
            members=(member,),
        )
        order = self.draw.randbytes(16).hex()
        self.orders[order] = PublishPoint(
            order=order, point=committed.point, record=sign_point(record, self._authority)
        )
        self.revision += 1


class _Control:
    """What both kinds of callers share: the way to the server and back."""

    def __init__(self, server: ConfigurationServer, process: SimulatedProcess) -> None:
        self._server = server
        self._process = process

    async def _ask(self, action: Callable[[], Answer]) -> Answer:
        await self._travel()
        answer = action()
        if self._server.draw.random() < self._server.lost_reply_probability:
            await self._travel()
            raise ServerUnreachable(server=SERVER, reason="simulated: the reply was lost")
        await self._travel()
        return answer

    async def _wait_for_revision(self, revision: str, wait_seconds: float) -> None:
        deadline = self._server.loop.time() + wait_seconds
        while f"{self._server.revision:x}" == revision and self._server.loop.time() < deadline:
            await asyncio.sleep(min(LONG_POLL_STEP_SECONDS, wait_seconds))
            self._process.check_alive()
            if self._server.is_down:
                raise ServerUnreachable(server=SERVER, reason="simulated: away")

    async def _travel(self) -> None:
        self._process.check_alive()
        await asyncio.sleep(self._server.draw.random() * LATENCY_SECONDS_MAX)
        self._process.check_alive()
        if self._server.is_down:
            raise ServerUnreachable(server=SERVER, reason="simulated: away")

    async def renew(self, request_pem: str) -> CertificateBundle:
        raise ControlFault(reason="the simulation has no certificates")


class SimulatedAgentControl(_Control):
    """protocol.control.AgentControl of one agent process."""

    async def register_disk(self, registration: DiskRegistration) -> DiskAssignment:
        return await self._ask(lambda: self._server.register(registration))

    async def unregister_disk(self, disk: DiskId, *, keep_data: bool) -> None:
        await self._ask(lambda: self._server.unregister(disk))

    async def report(self, report: AgentReport) -> AgentOrders:
        def take() -> AgentOrders:
            self._server.on_agent_report(report)
            return self._server.agent_orders()

        return await self._ask(take)

    async def wait_for_orders(self, revision: str, wait_seconds: float) -> AgentOrders:
        await self._wait_for_revision(revision, wait_seconds)
        return await self._ask(self._server.agent_orders)


class SimulatedProcessServerControl(_Control):
    """protocol.control.ProcessServerControl of one process server process."""

    async def report(self, report: ProcessServerReport) -> ProcessServerOrders:
        def take() -> ProcessServerOrders:
            self._server.on_process_server_report(report)
            self._server.take_process_server_report(report)
            return self._server.process_server_orders()

        return await self._ask(take)

    async def wait_for_orders(self, revision: str, wait_seconds: float) -> ProcessServerOrders:
        await self._wait_for_revision(revision, wait_seconds)
        return await self._ask(self._server.process_server_orders)
