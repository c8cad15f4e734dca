"""The agent's heart: keeps every protected disk replicating, and tells the configuration server how it goes.

Everything it touches is a constructor argument. It starts tasks by TaskGroup only, blocks in the executor only, and
takes time from the running loop and the clock. One disk's error never ends the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Final

import structlog

from mobility_agent.consistency.freeze_points import FreezeOutcome, FreezePoints, FreezePorts, FreezeTotals
from mobility_agent.core.freeze_point import FreezeFrequency, FreezeKind
from mobility_agent.core.read_pace import ReadPace
from mobility_agent.disk_history import forget_disk
from mobility_agent.disk_ports import DiskPorts
from mobility_agent.disk_status import DiskPace, DiskStatus
from mobility_agent.errors import AgentStateDamaged, DiskNotSupported, FreezeFailed
from mobility_agent.frame_buffers import FrameBuffers
from mobility_agent.io_priority import IoPriority
from mobility_agent.ports import Connect, DrawRandom, OpenSource, Tracking
from mobility_agent.protection import (
    PROTECTION_FILE,
    ProtectedDisk,
    Protection,
    Release,
    read_orders,
    read_protection,
    write_orders,
    write_protection,
)
from mobility_agent.replication import DiskReplication
from mobility_agent.reports import MachineFacts, agent_report
from mobility_agent.tracking.scan import ScanOnly
from mobility_agent.uplink import ConnectionLimits, Uplink
from protocol.control import (
    NO_REVISION,
    AgentControl,
    AgentOrders,
    DiskIdentity,
    DiskOrder,
    DiskRegistration,
    ProcessServerAddress,
)
from protocol.errors import ReplicationError
from protocol.vocabulary import FRAME_RAW_BYTES_MAX, DiskId
from runtime.blocking import blocking
from runtime.clock import Clock
from runtime.directory import DurableDirectory

POLL_SECONDS: Final = 30.0
CONTROL_RETRY_SECONDS: Final = 5.0
GOODBYE_SECONDS_MAX: Final = 5.0
DEFECT_PAUSE_SECONDS: Final = 30.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentLimits:
    """What bounds the agent's memory and pace. Defaults are production's; the simulation makes them small."""

    change_set_raw_bytes: int = 8 * FRAME_RAW_BYTES_MAX
    frame_buffers: int = 8
    """Frames that may be read, packed or sent at once over all disks; each holds FRAME_RAW_BYTES_MAX."""
    reconnect_seconds_min: float = 0.5
    reconnect_seconds_max: float = 30.0
    progress_seconds_max: float = 120.0
    """A connection on which sent change sets wait so long for an acknowledgement is given up and made anew."""
    heartbeat_seconds: float = 10.0
    """Until the first orders say otherwise."""
    compress_at_agent: bool = False
    copy_read_bytes_per_second: float = 0.0
    """Of copy-ins, over all disks; 0: as fast as it goes."""
    copy_io_priority: IoPriority = IoPriority.LOW


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectionStatus:
    """One protected disk as `status` shows it; replication is None while nothing is done for it."""

    path: str
    disk: DiskId | None
    identity: DiskIdentity
    replication: DiskStatus | None
    release: Release | None
    error: ReplicationError | None
    """Of registering or releasing it."""


@dataclass(slots=True, kw_only=True)
class _Running:
    replication: DiskReplication
    task: asyncio.Task[None]
    uplink: Uplink


@dataclass(slots=True, kw_only=True)
class _Link:
    uplink: Uplink
    task: asyncio.Task[None]
    users: set[DiskId] = field(default_factory=set)


class AgentService:
    """One agent. `run()` until cancelled or `stop()`ped."""

    def __init__(
        self,
        *,
        directory: DurableDirectory,
        open_source: OpenSource,
        connect: Connect,
        control: AgentControl,
        clock: Clock,
        draw_random: DrawRandom,
        executor: Executor,
        limits: AgentLimits | None = None,
        machine: MachineFacts | None = None,
        on_orders: Callable[[AgentOrders], None] | None = None,
        tracking: Tracking | None = None,
        freeze: FreezePorts | None = None,
    ) -> None:
        """directory holds all of the agent's durable state, for this service alone. on_orders hears of all new
        orders. Without `freeze` no file system is ever frozen."""
        self.limits = limits or AgentLimits()
        self._directory = directory
        self._open_source = open_source
        self._connect = connect
        self._control = control
        self._clock = clock
        self._draw_random = draw_random
        self._executor = executor
        self._machine = machine or MachineFacts()
        self._on_orders = on_orders
        self._tracking = tracking or ScanOnly()
        self._ports = DiskPorts(
            directory=directory,
            open_source=open_source,
            tracking=self._tracking,
            clock=clock,
            draw_random=draw_random,
            executor=executor,
            held_executor=executor if freeze is None else freeze.held_executor,
            held_seconds_max=0.0 if freeze is None else freeze.seconds_max,
            buffers=FrameBuffers(buffers=self.limits.frame_buffers),
            change_set_raw_bytes=self.limits.change_set_raw_bytes,
            compress=self.limits.compress_at_agent,
            copy_pace=ReadPace(self.limits.copy_read_bytes_per_second),
            copy_priority=self.limits.copy_io_priority,
        )
        self._protection: Protection | None = None
        self._intent = asyncio.Lock()
        self._orders: AgentOrders | None = None
        self._is_order_fresh = False
        self._kept_revision = NO_REVISION
        self._keeping_orders = asyncio.Lock()
        self._control_error: ReplicationError | None = None
        self._intent_errors: dict[str, ReplicationError] = {}
        self._running: dict[DiskId, _Running] = {}
        self._links: dict[ProcessServerAddress, _Link] = {}
        self._changed = asyncio.Event()
        self._report_wanted = asyncio.Event()
        self._is_stopping = False
        self._freeze_points = None if freeze is None else self._make_freeze_points(freeze)

    def _make_freeze_points(self, freeze: FreezePorts) -> FreezePoints:
        return FreezePoints(freeze, disks=self._replications, others=self._without_owner, clock=self._clock)

    # what the operator asks

    async def protect(self, path: str) -> None:
        """Durably intends to protect the disk at `path`; nothing changes if it is protected already.

        Raises the typed disk errors of opening it.
        """
        async with self._intent:
            protection = await self._load()
            known = protection.at(path)
            expected = None if known is None else known.identity
            identity = await blocking(self._executor, lambda: _identify(self._open_source, path, expected))
            wanted = protection.protecting(path, identity)
            if wanted is not protection:
                await self._save(wanted)

    async def unprotect(self, path: str, *, keep: bool) -> None:
        """Durably intends to end the protection of `path`; keep: its recovery points stay. Raises NotProtected."""
        async with self._intent:
            protection = await self._load()
            await self._save(protection.releasing(path, "keep" if keep else "delete"))

    def scan_now(self) -> None:
        """Begins the next round of every disk at once, without waiting for its interval."""
        for running in self._running.values():
            running.replication.begin_round_now()

    async def freeze_now(self, kind: FreezeKind) -> FreezeOutcome:
        """Freezes the machine's file systems for a moment, and marks points of its live disks. Raises FreezeFailed."""
        if self._freeze_points is None:
            raise FreezeFailed(reason="this agent freezes nothing")
        return await self._freeze_points.freeze_now(kind)

    def stop(self) -> None:
        """Begins an orderly end: says goodbye, run() returns. What was not acknowledged is sent by the next run."""
        self._is_stopping = True
        self._changed.set()

    # what observers ask

    @property
    def protection(self) -> tuple[ProtectionStatus, ...]:
        known = () if self._protection is None else self._protection.disks
        return tuple(
            ProtectionStatus(
                path=entry.path,
                disk=entry.disk,
                identity=entry.identity,
                replication=self._running[entry.disk].replication.status() if entry.disk in self._running else None,
                release=entry.release,
                error=self._intent_errors.get(entry.path),
            )
            for entry in known
        )

    @property
    def control_error(self) -> ReplicationError | None:
        """Why the newest call of the configuration server failed, None if it did not."""
        return self._control_error

    @property
    def connected(self) -> dict[str, bool]:
        """By process server identifier, whether a connection is up."""
        return {address.process_server: link.uplink.connection is not None for address, link in self._links.items()}

    @property
    def freezes(self) -> FreezeTotals:
        return FreezeTotals() if self._freeze_points is None else self._freeze_points.totals

    def readiness(self) -> list[str]:
        """Why the agent does not do its job at the moment; empty when it does."""
        reasons = [f"not connected to process server {name}" for name, up in self.connected.items() if not up]
        if self._orders is None:
            reasons.append("no orders have ever come from the configuration server")
        return reasons

    # the service

    async def run(self) -> None:
        """Replicates until stop() or cancellation. Raises only what ends the whole agent (its state failed)."""
        async with self._intent:
            await self._load()
        self._orders = await blocking(self._executor, lambda: read_orders(self._directory))
        async with asyncio.TaskGroup() as group:
            loops = [group.create_task(self._keep_reporting()), group.create_task(self._keep_polling())]
            if self._freeze_points is not None:
                loops.append(group.create_task(self._freeze_points.run()))
                self._order_freezes(self._orders)
            try:
                while not self._is_stopping:
                    self._changed.clear()
                    await self._reconcile(group)
                    await self._changed.wait()
            finally:
                for loop in loops:
                    loop.cancel()
                await self._end_all()

    async def _reconcile(self, group: asyncio.TaskGroup) -> None:
        """Makes what runs equal to what is intended and ordered."""
        wanted = self._wanted()
        for disk in [disk for disk in self._running if disk not in wanted]:
            await self._end_disk(disk)
        for disk, (entry, order) in wanted.items():
            address = order.process_server
            running = self._running.get(disk)
            if running is not None and running.uplink.address != address:
                await self._end_disk(disk)
                running = None
            if running is None and address is not None:
                self._begin_disk(group, disk, entry, order, address)
            elif running is not None:
                running.replication.order(_pace(order))
        for address in [address for address, link in self._links.items() if not link.users]:
            await self._end_link(self._links.pop(address))
        for link in self._links.values():
            link.uplink.check_revocation()
        self._report_wanted.set()

    def _wanted(self) -> dict[DiskId, tuple[ProtectedDisk, DiskOrder]]:
        orders = {} if self._orders is None else {order.disk: order for order in self._orders.disks}
        entries = () if self._protection is None else self._protection.disks
        return {
            entry.disk: (entry, orders[entry.disk])
            for entry in entries
            if entry.disk is not None and entry.release is None and entry.disk in orders
        }

    def _begin_disk(
        self,
        group: asyncio.TaskGroup,
        disk: DiskId,
        entry: ProtectedDisk,
        order: DiskOrder,
        address: ProcessServerAddress,
    ) -> None:
        replication = DiskReplication(
            disk=disk,
            path=entry.path,
            identity=entry.identity,
            pace=_pace(order),
            ports=self._ports,
            on_changed=self._report_wanted.set,
        )
        link = self._links.get(address)
        if link is None:
            uplink = self._make_uplink(address)
            link = self._links[address] = _Link(uplink=uplink, task=group.create_task(uplink.run()))
        link.users.add(disk)
        task = group.create_task(self._own(disk, replication))
        self._running[disk] = _Running(replication=replication, task=task, uplink=link.uplink)
        link.uplink.attach(replication)

    def _make_uplink(self, address: ProcessServerAddress) -> Uplink:
        return Uplink(
            address,
            connect=self._connect,
            clock=self._clock,
            draw_random=self._draw_random,
            limits=ConnectionLimits(
                reconnect_seconds_min=self.limits.reconnect_seconds_min,
                reconnect_seconds_max=self.limits.reconnect_seconds_max,
                progress_seconds_max=self.limits.progress_seconds_max,
            ),
            agent_version=self._machine.agent_version,
            boot_id=self._machine.boot_id,
            is_revoked=self._is_revoked,
        )

    async def _own(self, disk: DiskId, replication: DiskReplication) -> None:
        try:
            await replication.run()
        except Exception:
            # why: a defect met by one disk's owner must not end the others; the disk is begun anew after a pause.
            log.exception("disk", disk=disk)
            running = self._running.get(disk)
            if running is not None:
                running.uplink.detach(replication)
            await asyncio.sleep(DEFECT_PAUSE_SECONDS)
            if self._running.pop(disk, None) is not None:
                self._changed.set()

    async def _end_disk(self, disk: DiskId) -> None:
        running = self._running.pop(disk)
        running.task.cancel()
        await asyncio.wait([running.task])
        if running.uplink.is_attached(running.replication):
            running.uplink.detach(running.replication)
        for link in self._links.values():
            link.users.discard(disk)

    async def _end_link(self, link: _Link) -> None:
        link.uplink.stop()
        await asyncio.wait([link.task], timeout=GOODBYE_SECONDS_MAX)
        link.task.cancel()

    async def _end_all(self) -> None:
        for disk in list(self._running):
            await self._end_disk(disk)
        links, self._links = list(self._links.values()), {}
        for link in links:
            await self._end_link(link)

    # the configuration server

    async def _keep_reporting(self) -> None:
        while True:
            self._report_wanted.clear()
            await self._settle_intents()
            try:
                self._take_orders(await self._control.report(agent_report(self._machine, self.protection)))
                await self._keep_orders()
            except ReplicationError as error:
                self._control_failed(error)
            heartbeat = self.limits.heartbeat_seconds if self._orders is None else self._orders.heartbeat_seconds
            try:
                async with asyncio.timeout(heartbeat):
                    await self._report_wanted.wait()
            except TimeoutError:
                continue

    async def _keep_polling(self) -> None:
        while True:
            revision = self._orders.revision if self._orders is not None and self._is_order_fresh else NO_REVISION
            try:
                orders = await self._control.wait_for_orders(revision, POLL_SECONDS)
                if orders.revision == revision:
                    continue
                self._take_orders(orders)
                await self._keep_orders()
            except ReplicationError as error:
                self._control_failed(error)
                await asyncio.sleep(CONTROL_RETRY_SECONDS)

    def _take_orders(self, orders: AgentOrders) -> None:
        old, self._orders, self._is_order_fresh = self._orders, orders, True
        self._control_error = None
        if old is not None and orders.revoked.number < old.revoked.number:
            self._orders = orders.model_copy(update={"revoked": old.revoked})
        self._order_freezes(self._orders)
        if self._on_orders is not None:
            self._on_orders(self._orders)
        if old is None or old.revision != orders.revision:
            self._changed.set()

    def _order_freezes(self, orders: AgentOrders | None) -> None:
        if self._freeze_points is not None and orders is not None:
            self._freeze_points.frequency = FreezeFrequency(
                freeze_interval_seconds=orders.freeze_interval_seconds,
                application_interval_seconds=orders.application_interval_seconds,
            )

    def _replications(self) -> list[DiskReplication]:
        return [running.replication for running in self._running.values()]

    def _without_owner(self) -> list[str]:
        """Paths of disks that are to be protected, and are not yet."""
        known = () if self._protection is None else self._protection.disks
        return [entry.path for entry in known if entry.release is None and entry.disk not in self._running]

    async def _keep_orders(self) -> None:
        """Makes the orders durable when they differ from those that are."""
        # why: an answer and a long poll may bring orders together, and both would write the one file.
        async with self._keeping_orders:
            orders = self._orders
            if orders is None or orders.revision == self._kept_revision:
                return
            try:
                await blocking(self._executor, lambda: write_orders(self._directory, orders))
            except OSError as error:
                log.warning("orders not kept for the next start", error=str(error))
                return
            self._kept_revision = orders.revision

    def _control_failed(self, error: ReplicationError) -> None:
        if self._control_error is None:
            log.warning("configuration server", error=str(error), hint=error.hint)
        self._control_error = error

    async def _settle_intents(self) -> None:
        """Registers what is new and ends what is released, as far as the configuration server can be reached."""
        for entry in () if self._protection is None else self._protection.disks:
            try:
                if entry.release is not None:
                    await self._release(entry, entry.release)
                elif entry.disk is None:
                    await self._register(entry)
                self._intent_errors.pop(entry.path, None)
            except ReplicationError as error:
                if entry.path not in self._intent_errors:
                    log.warning("disk", path=entry.path, error=str(error), hint=error.hint)
                self._intent_errors[entry.path] = error

    async def _register(self, entry: ProtectedDisk) -> None:
        registration = DiskRegistration(path=entry.path, identity=entry.identity, disk=entry.disk)
        assignment = await self._control.register_disk(registration)
        async with self._intent:
            protection = await self._load()
            current = protection.at(entry.path)
            if current is not None:
                await self._save(protection.having(current.model_copy(update={"disk": assignment.disk})))
        log.info("protected", path=entry.path, disk=assignment.disk)

    async def _release(self, entry: ProtectedDisk, release: Release) -> None:
        disk = entry.disk
        if disk is not None:
            if disk in self._running:
                self._changed.set()
                return
            await self._control.unregister_disk(disk, keep_data=release == "keep")
            try:
                await blocking(self._executor, lambda: self._tracking.forget(disk))
            except DiskNotSupported as error:
                # why: pins that cannot be removed do no harm, and the release must come to its end
                log.warning("disk", disk=disk, path=entry.path, error=str(error))
            await self._forget(disk)
        async with self._intent:
            protection = await self._load()
            if protection.at(entry.path) == entry:
                await self._save(protection.without(entry.path))
        log.info("released", path=entry.path, disk=disk, points=release)

    async def _forget(self, disk: DiskId) -> None:
        try:
            await blocking(self._executor, lambda: forget_disk(self._directory, disk))
        except OSError as error:
            raise AgentStateDamaged(name=disk, reason=error.strerror or str(error)) from error

    async def _load(self) -> Protection:
        """The intent; read once."""
        if self._protection is None:
            self._protection = await blocking(self._executor, lambda: read_protection(self._directory))
        return self._protection

    async def _save(self, protection: Protection) -> None:
        try:
            await blocking(self._executor, lambda: write_protection(self._directory, protection))
        except OSError as error:
            raise AgentStateDamaged(name=PROTECTION_FILE, reason=error.strerror or str(error)) from error
        self._protection = protection
        self._changed.set()
        self._report_wanted.set()

    def _is_revoked(self, certificate_serial: str) -> bool:
        if self._orders is None or not certificate_serial:
            return False
        return certificate_serial.upper() in self._orders.revoked.serials


def _pace(order: DiskOrder) -> DiskPace:
    return DiskPace(
        is_paused=order.is_paused,
        copy_interval_seconds=order.copy_interval_seconds,
        point_interval_seconds=order.point_interval_seconds,
    )


def _identify(open_source: OpenSource, path: str, expected: DiskIdentity | None) -> DiskIdentity:
    source = open_source(path, expected)
    try:
        return source.identity
    finally:
        source.close()
