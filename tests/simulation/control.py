"""The configuration server as agents and process servers see it, in memory: the real cores for its clock, its grants,
its points and its RPO; real signatures; a ledger of points.

It answers with latency, may be away (for everybody or for some), may be stopped in the middle, and may do what it was
asked and lose the reply. It believes reports as the real one does; what it states is checked against the store by
tests/simulation/invariants.py. It can move a disk to another process server, which the real one does not do yet: the
new owner gets higher epochs, whose parent is either the epoch that was last reported or the old owner's spare one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from config_server.core import grants, rpo
from config_server.core.recovery_points import Statement, judge, point_record
from config_server.core.server_clock import DatedInstant, date_instant
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
from protocol.operator_messages import Rpo
from protocol.signed_records import (
    DiskDescription,
    Grant,
    MachineDescription,
    sign_grant,
    sign_machine_description,
    sign_point,
)
from protocol.vocabulary import DiskId, MachineId, ProcessServerId, VaultId
from storage.errors import HistoryForked
from tests.simulation.clock import ServersClock, true_now_ns
from tests.simulation.process import SimulatedProcess

LATENCY_SECONDS_MAX: Final = 0.02
HEARTBEAT_SECONDS: Final = 2.0
LONG_POLL_STEP_SECONDS: Final = 0.25
REQUEST_SECONDS_MAX: Final = 30.0
"""So long a caller waits for a server that is there and says nothing."""
RPO_THRESHOLD_SECONDS: Final = 3600.0
SERVER: Final = "simulated"
FORKED: Final = HistoryForked.code

Answer = TypeVar("Answer")


@dataclass(slots=True, kw_only=True)
class LedgerPoint:
    """A point that the configuration server states as recoverable, since when in truth, and how it dates it."""

    committed: CommittedPoint
    stated_ns: int
    dated: DatedInstant

    @property
    def position(self) -> tuple[int, int]:
        return self.committed.epoch, self.committed.sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredProcessServer:
    """A process server, and the key that its grants name."""

    process_server: ProcessServerId
    signing_public_key: bytes

    @property
    def address(self) -> ProcessServerAddress:
        return ProcessServerAddress(process_server=self.process_server, host=f"{self.process_server}.simulated", port=9)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedGrant:
    grant: Grant
    signed: bytes


@dataclass(slots=True, kw_only=True)
class RegisteredDisk:
    """One disk, who owns it, and its grants by epoch. The newest is the spare."""

    disk: DiskId
    path: str
    identity: DiskIdentity
    owner: RegisteredProcessServer
    grants: dict[int, SignedGrant] = field(default_factory=dict)
    current_epoch: int = 1
    reported_epoch: int = 0
    """The highest that anybody reported."""


class ConfigurationServer:
    """Intent and observations. One machine; `copy_interval_seconds` holds for all disks.

    cut_off: names of the programs that do not reach it, and it not them.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        draw: random.Random,
        *,
        vault: VaultId,
        authority: Ed25519PrivateKey,
        process_server_keys: list[bytes],
        copy_interval_seconds: float,
    ) -> None:
        self.loop = loop
        self.draw = draw
        self.vault = vault
        self.machine = MachineId(draw.randbytes(16).hex())
        self.process_servers = [
            RegisteredProcessServer(process_server=ProcessServerId(draw.randbytes(16).hex()), signing_public_key=key)
            for key in process_server_keys
        ]
        self.owner = self.process_servers[0]
        self.clock = ServersClock(loop)
        self._authority = authority
        self._copy_interval_seconds = copy_interval_seconds
        self.disks: dict[DiskId, RegisteredDisk] = {}
        self.ledger: dict[str, LedgerPoint] = {}
        self._newest: dict[DiskId, LedgerPoint] = {}
        self.orders: dict[str, ProcessServerOrder] = {}
        self.revision = 1
        self.is_down = False
        self.is_held = False
        self.has_moved_disks = False
        self.cut_off: set[str] = set()
        self.heard_ns: dict[ProcessServerId, int] = {}
        """When in truth a process server heard an answer last."""
        self.lost_reply_probability = 0.0
        self.on_point: Callable[[LedgerPoint], None] = lambda point: None
        self.on_rpo: Callable[[LedgerPoint, Rpo], None] = lambda point, rpo: None
        self.on_agent_report: Callable[[AgentReport], None] = lambda report: None
        self.on_process_server_report: Callable[[ProcessServerReport], None] = lambda report: None

    def heal(self) -> None:
        self.is_down = self.is_held = False
        self.cut_off.clear()
        self.lost_reply_probability = 0.0

    def register(self, registration: DiskRegistration) -> DiskAssignment:
        known = [record for record in self.disks.values() if record.identity.serial == registration.identity.serial]
        if known:
            record = known[0]
        else:
            disk = DiskId(self.draw.randbytes(16).hex())
            record = RegisteredDisk(disk=disk, path=registration.path, identity=registration.identity, owner=self.owner)
            self.disks[disk] = record
            self._grant_missing(record)
            self._describe_machine()
            self.revision += 1
        return DiskAssignment(
            disk=record.disk, machine=self.machine, vault=self.vault, process_server=record.owner.address
        )

    def unregister(self, disk: DiskId) -> None:
        if self.disks.pop(disk, None) is not None:
            self.revision += 1

    def switch_process_server(self, *, continues_reported_epoch: bool) -> None:
        """The machine moves to the other process server. Until the old one hears of it, it goes on with what it has."""
        self.has_moved_disks = True
        self.owner = next(one for one in self.process_servers if one is not self.owner)
        for record in self.disks.values():
            record.owner = self.owner
            epoch = max(record.grants) + 1
            if continues_reported_epoch and record.reported_epoch:
                self._grant(record, epoch, parent_epoch=record.reported_epoch, is_spare=False)
            record.current_epoch = epoch
            self._grant_missing(record)
        self.revision += 1

    def agent_orders(self) -> AgentOrders:
        return AgentOrders(
            revision=f"{self.revision:x}",
            now_ns=self.clock.now_ns(),
            heartbeat_seconds=HEARTBEAT_SECONDS,
            renew_certificate=False,
            disks=tuple(
                DiskOrder(
                    disk=disk,
                    process_server=self.disks[disk].owner.address,
                    is_paused=False,
                    copy_interval_seconds=self._copy_interval_seconds,
                    point_interval_seconds=self._copy_interval_seconds,
                )
                for disk in sorted(self.disks)
            ),
            revoked=RevocationList(number=0),
        )

    def process_server_orders(self, process_server: RegisteredProcessServer) -> ProcessServerOrders:
        return ProcessServerOrders(
            revision=f"{self.revision:x}",
            now_ns=self.clock.now_ns(),
            heartbeat_seconds=HEARTBEAT_SECONDS,
            renew_certificate=False,
            grants=tuple(
                self.disks[disk].grants[epoch].signed
                for disk in sorted(self.disks)
                if self.disks[disk].owner is process_server
                for epoch in grants.wanted_epochs(self.disks[disk].current_epoch)
            ),
            revoked=RevocationList(number=0),
            orders=tuple(self.orders.values()) if process_server is self.owner else (),
        )

    def take_process_server_report(self, process_server: RegisteredProcessServer, report: ProcessServerReport) -> None:
        for position in report.positions:
            record = self.disks.get(position.disk)
            if record is not None:
                self._take_epoch(record, position.epoch, process_server)
        if process_server is self.owner and any(FORKED in fault.detail for fault in report.faults):
            self._grant_around_a_fork()
        for order in report.completed_orders:
            if self.orders.pop(order, None) is not None:
                self.revision += 1
        for committed in report.committed_points:
            known = self.ledger.get(committed.point)
            if judge(committed, known.committed if known else None) is Statement.NEWS:
                self._state(committed)

    def report_rpo(self) -> None:
        """What an operator is shown now, told to on_rpo."""
        clock = self.clock.state()
        for point in self._newest.values():
            shown = rpo.evaluate_rpo(clock, newest=point.dated, heard_ns=0, threshold_seconds=RPO_THRESHOLD_SECONDS)
            self.on_rpo(point, shown)

    def _take_epoch(self, record: RegisteredDisk, epoch: int, reporter: RegisteredProcessServer) -> None:
        record.reported_epoch = max(record.reported_epoch, epoch)
        if record.owner is reporter and epoch > record.current_epoch:
            record.current_epoch = epoch
        elif record.owner is not reporter and record.grants[record.current_epoch].grant.parent_epoch < epoch:
            # why: the old owner had used its spare already, so that the grant continues an epoch that it had left
            if epoch < record.current_epoch and record.reported_epoch == epoch:
                record.current_epoch = max(record.grants) + 1
                self._grant(record, record.current_epoch, parent_epoch=epoch, is_spare=False)
        else:
            return
        self._grant_missing(record)
        self.revision += 1

    def _grant_around_a_fork(self) -> None:
        """The owner's epoch continues one that the old owner left behind its back, and never said so: the next one
        continues none of them, and everything is sent again."""
        for record in self.disks.values():
            if record.grants[record.current_epoch].grant.parent_epoch != record.current_epoch - 1:
                record.current_epoch = max(record.grants) + 1
                self._grant_missing(record)
                self.revision += 1

    def _state(self, committed: CommittedPoint) -> None:
        """A point that is stated from now on, and ordered to be published."""
        earlier = [point for point in self.ledger.values() if point.committed.disk == committed.disk]
        before = [point for point in earlier if point.position < (committed.epoch, committed.sequence)]
        previous = max(before, key=lambda point: point.position, default=None)
        dated = date_instant(committed.instant_ns, self.clock.state().spans, previous.dated if previous else None)
        point = LedgerPoint(committed=committed, stated_ns=true_now_ns(self.loop), dated=dated)
        self.ledger[committed.point] = point
        newest = self._newest.get(committed.disk)
        if newest is None or point.position > newest.position:
            self._newest[committed.disk] = point
        order = self.draw.randbytes(16).hex()
        record = sign_point(point_record(committed, vault=self.vault, machine=self.machine), self._authority)
        self.orders[order] = PublishPoint(order=order, point=committed.point, record=record)
        self.revision += 1
        self.on_point(point)

    def _grant_missing(self, record: RegisteredDisk) -> None:
        for need in grants.missing_grants(record.current_epoch, record.grants):
            self._grant(record, need.epoch, parent_epoch=need.parent_epoch, is_spare=need.is_spare)

    def _grant(self, record: RegisteredDisk, epoch: int, *, parent_epoch: int, is_spare: bool) -> None:
        grant = Grant(
            vault=self.vault,
            machine=self.machine,
            disk=record.disk,
            epoch=epoch,
            parent_epoch=parent_epoch,
            process_server=record.owner.process_server,
            process_server_key=record.owner.signing_public_key,
            issued_ns=self.clock.now_ns(),
            disk_size_bytes=record.identity.size_bytes,
            sector_bytes=record.identity.logical_sector_bytes,
            is_spare=is_spare,
        )
        record.grants[epoch] = SignedGrant(grant=grant, signed=sign_grant(grant, self._authority))

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
            self._check_reachable()

    async def _travel(self) -> None:
        self._process.check_alive()
        await asyncio.sleep(self._server.draw.random() * LATENCY_SECONDS_MAX)
        deadline = self._server.loop.time() + REQUEST_SECONDS_MAX
        while self._server.is_held and self._server.loop.time() < deadline:
            await asyncio.sleep(LONG_POLL_STEP_SECONDS)
        self._check_reachable()

    def _check_reachable(self) -> None:
        self._process.check_alive()
        if self._server.is_down or self._server.is_held or self._process.name in self._server.cut_off:
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
            self._server.report_rpo()
            return self._server.agent_orders()

        return await self._ask(take)

    async def wait_for_orders(self, revision: str, wait_seconds: float) -> AgentOrders:
        await self._wait_for_revision(revision, wait_seconds)
        return await self._ask(self._server.agent_orders)


class SimulatedProcessServerControl(_Control):
    """protocol.control.ProcessServerControl of one process server process."""

    def __init__(
        self, server: ConfigurationServer, process: SimulatedProcess, process_server: RegisteredProcessServer
    ) -> None:
        super().__init__(server, process)
        self._process_server = process_server

    async def report(self, report: ProcessServerReport) -> ProcessServerOrders:
        def take() -> ProcessServerOrders:
            self._server.on_process_server_report(report)
            self._server.take_process_server_report(self._process_server, report)
            # why: an operator may look at any moment, and this is when a point that comes late looks best
            self._server.report_rpo()
            return self._orders()

        return await self._hear(take)

    async def wait_for_orders(self, revision: str, wait_seconds: float) -> ProcessServerOrders:
        await self._wait_for_revision(revision, wait_seconds)
        return await self._hear(self._orders)

    async def _hear(self, action: Callable[[], ProcessServerOrders]) -> ProcessServerOrders:
        orders = await self._ask(action)
        self._server.heard_ns[self._process_server.process_server] = true_now_ns(self._server.loop)
        return orders

    def _orders(self) -> ProcessServerOrders:
        return self._server.process_server_orders(self._process_server)
