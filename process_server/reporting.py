"""Speaks with the configuration server: reports positions, points and faults, and carries out its orders.

Invariants: a committed bookmark is reported until an answered report contained it; grants and the revoked list are on
disk before they count; the configuration server being away stops nothing here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final, cast

import msgpack  # type: ignore[import-untyped]
import structlog

from process_server.cache import Cache
from process_server.cache_records import CachedPoint
from process_server.core.disk_lifecycle import DiskState
from process_server.disk_history import DiskHistory
from process_server.errors import StateUnreadable
from process_server.grants import GrantBook, save_grants
from process_server.metrics import ProcessServerMetrics
from process_server.server_clock import KEEP_SECONDS, ServerClock, save_clock
from process_server.state_file import keep, kept
from process_server.uploader import Uploader
from protocol.control import (
    COMMITTED_POINTS_PER_REPORT_MAX,
    DETAIL_LENGTH_MAX,
    FAULTS_PER_REPORT_MAX,
    NO_REVISION,
    ORDERS_PER_REPLY_MAX,
    CommittedPoint,
    DiskPosition,
    FaultReport,
    ProcessServerControl,
    ProcessServerOrder,
    ProcessServerOrders,
    ProcessServerReport,
    PublishPoint,
    RevocationList,
)
from protocol.errors import ReplicationError
from protocol.vocabulary import Consistency, DiskId
from runtime.directory import DurableDirectory
from storage.disk_archive import DiskArchive

REVOKED_FILE: Final = "revoked"
WAIT_SECONDS: Final = 30.0
PAUSE_SECONDS_FIRST: Final = 1.0
PAUSE_SECONDS_MAX: Final = 30.0
EARLY_REPORT_SECONDS: Final = 0.2
"""A committed point is reported so soon after it, together with what comes in the meantime."""

_log = structlog.get_logger("process_server.reporting")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportingSubject:
    """What is reported about, and who hears of orders."""

    host: str
    port: int
    histories: Callable[[], Iterable[DiskHistory]]
    cache: Cache
    uploader: Uploader
    on_grants: Callable[[], None]
    on_revoked: Callable[[RevocationList], None]
    on_renewal_due: Callable[[], None]


class Reporter:
    """`run` is the task; `soon` brings the next report forward."""

    def __init__(
        self,
        subject: ReportingSubject,
        *,
        control: ProcessServerControl,
        archive: DiskArchive,
        grants: GrantBook,
        state: DurableDirectory,
        executor: Executor,
        clock: ServerClock,
        metrics: ProcessServerMetrics,
        report_seconds: float,
    ) -> None:
        self._subject = subject
        self._control = control
        self._archive = archive
        self._grants = grants
        self._state = state
        self._executor = executor
        self._clock = clock
        self._metrics = metrics
        self._report_seconds = self._report_seconds_max = report_seconds
        # why: read once, it costs more than all else in a report
        self._version = version("farpoint")
        self._revision = NO_REVISION
        self._wakeup = asyncio.Event()
        self._orders_changed = asyncio.Event()
        self._clock_heard = asyncio.Event()
        self._orders: dict[str, ProcessServerOrder] = {}
        self._completed: set[str] = set()
        self._taking = asyncio.Lock()
        self.revoked = RevocationList(number=0)
        self.is_connected = False
        """The newest report was answered."""

    def soon(self) -> None:
        """There is something new to tell."""
        self._wakeup.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._report_again_and_again())
            group.create_task(self._listen_for_orders())
            group.create_task(self._carry_out_orders())
            group.create_task(self._keep_clock())

    async def report_once(self) -> None:
        """One report, answered on return: what it contained need not be told again. Raises as the control does."""
        points = self._points()
        completed = sorted(self._completed)[:ORDERS_PER_REPLY_MAX]
        report = self._report(points, completed)
        orders = await self._control.report(report)
        for history, reported in points.items():
            history.points_reported(reported)
        self._completed.difference_update(completed)
        for order in completed:
            self._orders.pop(order, None)
        await self._take(orders)

    async def _report_again_and_again(self) -> None:
        pause_seconds = PAUSE_SECONDS_FIRST
        while True:
            self._wakeup.clear()
            try:
                await self.report_once()
            except ReplicationError as error:
                self._note_away(error)
                await asyncio.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, PAUSE_SECONDS_MAX)
                continue
            self.is_connected = True
            pause_seconds = PAUSE_SECONDS_FIRST
            try:
                async with asyncio.timeout(self._report_seconds):
                    await self._wakeup.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(EARLY_REPORT_SECONDS)

    async def _listen_for_orders(self) -> None:
        pause_seconds = PAUSE_SECONDS_FIRST
        while True:
            try:
                if await self._take(await self._control.wait_for_orders(self._revision, WAIT_SECONDS)):
                    pause_seconds = PAUSE_SECONDS_FIRST
                    continue
            except ReplicationError as error:
                self._note_away(error)
            # why: orders that were not taken are answered at once when they are asked for again.
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, PAUSE_SECONDS_MAX)

    def _note_away(self, error: ReplicationError) -> None:
        if self.is_connected:
            _log.warning("configuration server is away", code=error.code, reason=str(error))
        self.is_connected = False

    async def _keep_clock(self) -> None:
        """For a restart while the configuration server is away: without an instant there is no point."""
        loop = asyncio.get_running_loop()
        while True:
            self._clock_heard.clear()
            instant_ns = self._clock.instant_ns()
            if instant_ns is None:
                try:
                    async with asyncio.timeout(KEEP_SECONDS):
                        await self._clock_heard.wait()
                except TimeoutError:
                    continue
            else:
                try:
                    await loop.run_in_executor(self._executor, save_clock, self._state, instant_ns)
                except OSError as error:
                    _log.error("the server's clock cannot be kept", reason=str(error))
                await asyncio.sleep(KEEP_SECONDS)

    # orders

    async def _take(self, orders: ProcessServerOrders) -> bool:
        """Whether they count from now on: orders that cannot be kept do not, and come again."""
        # why: an answer and a long poll may arrive together, and what they bring is written to disk.
        async with self._taking:
            self._clock.heard(orders.now_ns)
            self._clock_heard.set()
            self._report_seconds = min(self._report_seconds_max, orders.heartbeat_seconds)
            if orders.revision == self._revision and orders.revision != NO_REVISION:
                return True
            loop = asyncio.get_running_loop()
            signed = list(orders.grants)
            try:
                if sorted(signed) != sorted(self._grants.signed()):
                    await loop.run_in_executor(self._executor, lambda: save_grants(self._state, signed))
                    self._grants.take(signed)
                    self._subject.on_grants()
                if orders.revoked.number > self.revoked.number:
                    await loop.run_in_executor(self._executor, lambda: save_revoked(self._state, orders.revoked))
                    self.revoked = orders.revoked
                    self._subject.on_revoked(orders.revoked)
            except OSError as error:
                _log.error("orders cannot be kept", reason=str(error))
                return False
            self._revision = orders.revision
            if orders.renew_certificate:
                self._subject.on_renewal_due()
            self._orders |= {order.order: order for order in orders.orders if order.order not in self._completed}
            self._orders_changed.set()
            return True

    async def _carry_out_orders(self) -> None:
        pause_seconds = PAUSE_SECONDS_FIRST
        while True:
            due = [order for name, order in self._orders.items() if name not in self._completed]
            if not due:
                self._orders_changed.clear()
                await self._orders_changed.wait()
                continue
            failed = False
            for order in due:
                try:
                    await self._carry_out(order)
                    self._completed.add(order.order)
                except ReplicationError as error:
                    failed = True
                    _log.warning("order failed", order=order.order, code=error.code, reason=str(error))
            self.soon()
            if failed:
                await asyncio.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, PAUSE_SECONDS_MAX)
            else:
                pause_seconds = PAUSE_SECONDS_FIRST

    async def _carry_out(self, order: ProcessServerOrder) -> None:
        """Publishes a signed record; one that is there already, byte for byte, is success."""
        if isinstance(order, PublishPoint):
            await self._archive.put_point(order.record)
        else:
            await self._archive.put_machine_description(order.record)

    # the report

    def _points(self) -> dict[DiskHistory, list[CachedPoint]]:
        points: dict[DiskHistory, list[CachedPoint]] = {}
        room = COMMITTED_POINTS_PER_REPORT_MAX
        for history in self._subject.histories():
            taken = list(history.unreported_points[:room])
            room -= len(taken)
            if taken:
                points[history] = taken
        self._metrics.unreported_points.set(sum(len(h.unreported_points) for h in self._subject.histories()))
        return points

    def _report(self, points: dict[DiskHistory, list[CachedPoint]], completed: Sequence[str]) -> ProcessServerReport:
        return ProcessServerReport(
            version=self._version,
            host=self._subject.host,
            port=self._subject.port,
            cache_bytes=self._subject.cache.used_bytes,
            cache_limit_bytes=self._subject.cache.bytes_max,
            positions=tuple(
                position for history in self._subject.histories() if (position := _position(history)) is not None
            ),
            committed_points=tuple(
                _committed_point(history.disk, point) for history, taken in points.items() for point in taken
            ),
            completed_orders=tuple(completed),
            faults=tuple(self._faults()[:FAULTS_PER_REPORT_MAX]),
        )

    def _faults(self) -> list[FaultReport]:
        faults: list[ReplicationError | None] = [self._subject.uploader.store_fault, self._subject.cache.write_fault]
        faults += [history.stop_reason for history in self._subject.histories()]
        return [
            FaultReport(code=fault.code, detail=str(fault)[:DETAIL_LENGTH_MAX], hint=fault.hint[:DETAIL_LENGTH_MAX])
            for fault in faults
            if fault is not None
        ]


def _position(history: DiskHistory) -> DiskPosition | None:
    positions = history.positions
    if positions is None or history.state is DiskState.UNKNOWN:
        return None
    return DiskPosition(
        disk=history.disk,
        epoch=positions.epoch,
        durable_sequence=positions.durable,
        committed_sequence=positions.committed,
        cached_bytes=history.cached_bytes,
        received_bytes=history.received_bytes,
        stored_bytes=history.stored_bytes,
    )


def _committed_point(disk: DiskId, point: CachedPoint) -> CommittedPoint:
    assert point.consistency is not Consistency.UNSETTLED
    return CommittedPoint(
        disk=disk,
        epoch=point.epoch,
        sequence=point.sequence,
        point=point.point,
        instant_ns=point.instant_ns,
        consistency=point.consistency,
    )


def save_revoked(state: DurableDirectory, revoked: RevocationList) -> None:
    """Durable on return. Raises OSError."""
    keep(state, REVOKED_FILE, cast(bytes, msgpack.packb([revoked.number, list(revoked.serials)])))


def load_revoked(state: DurableDirectory) -> RevocationList:
    """What was saved; the empty list number 0 if nothing was. Raises OSError, StateUnreadable."""
    data = kept(state, REVOKED_FILE)
    if data is None:
        return RevocationList(number=0)
    try:
        number, serials = msgpack.unpackb(data)
        return RevocationList(number=number, serials=tuple(serials))
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise StateUnreadable(name=REVOKED_FILE, reason=str(error)) from error
