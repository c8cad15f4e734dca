"""The process server as one object: everything it touches is handed to it, so that a test or the simulation runs the
same shells.

Invariants: an acknowledgement follows the cache's synchronize, a committed position follows the store's create; a lost
connection ends its own tasks and no others; when `run` ends, everything it started has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client import CollectorRegistry

from process_server.cache import Cache
from process_server.cache_log import RecordKind
from process_server.cache_records import DiskCheckpoint
from process_server.cache_recovery import RecoveredDisk, recover_cache
from process_server.cache_writer import CacheWriter
from process_server.core.backpressure import Load, next_credit
from process_server.core.segmenting import SegmentRules
from process_server.disk_history import DiskHistory, HistoryTools
from process_server.errors import CacheDamaged, CacheFault, ServiceStopping, StateUnreadable
from process_server.grants import GrantBook, load_grants
from process_server.metrics import ProcessServerMetrics
from process_server.opening import DiskOpener
from process_server.receiver import AgentConnection, ReceiverTools
from process_server.reporting import Reporter, ReportingSubject, load_revoked
from process_server.sealer import Sealer
from process_server.server_clock import ServerClock, load_clock
from process_server.settings import ProcessServerLimits
from process_server.uploader import Uploader, UploadRules
from process_server.vault_key import VaultKey
from process_server.work_segment import SegmentFrames
from protocol.control import ProcessServerControl, RevocationList
from protocol.errors import CertificateRefused, NoGrant, ReplicationError
from protocol.transport.channel import Channel
from protocol.vocabulary import DiskId, PeerIdentity
from runtime.clock import Clock
from runtime.directory import DurableDirectory
from storage.disk_archive import DiskArchive
from storage.frame_record import parse_frame_record

Result = TypeVar("Result")

HOUSEKEEPING_SECONDS: Final = 0.5
"""How often due segments are ended, unused files removed and starved connections looked at."""
RECOVERY_FRAMES_AT_ONCE: Final = 16
GOODBYE_SECONDS_MAX: Final = 5.0

_log = structlog.get_logger("process_server")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessServerPorts:
    """The outside world of one process server. Nothing else is read, written, asked, or drawn.

    identity: this process server's own, as in its certificate. signing_key: the Ed25519 key that its grants name.
    cache: one flat directory for the cache's log files, nothing else in it. state: grants and the revoked list.
    random_bytes(n): n bytes for data keys. sealing_executor: CPU work (two threads). cache_executor: the cache's and
    the state's file calls (one thread writes, reads for upload may use another). host and port: where agents reach it.
    on_renewal_due, on_revoked: what the configuration server wants of our own certificate, and of new connections.
    """

    identity: PeerIdentity
    signing_key: Ed25519PrivateKey
    cache: DurableDirectory
    state: DurableDirectory
    archive: DiskArchive
    control: ProcessServerControl
    clock: Clock
    random_bytes: Callable[[int], bytes]
    sealing_executor: Executor
    cache_executor: Executor
    host: str = "localhost"
    port: int = 9443
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    on_renewal_due: Callable[[], None] = lambda: None
    on_revoked: Callable[[RevocationList], None] = lambda revoked: None


class ProcessServer:
    """Made once per process, on its event loop. `run` recovers the cache and works until `stop` is called; channels are
    served meanwhile.
    """

    def __init__(self, ports: ProcessServerPorts, limits: ProcessServerLimits) -> None:
        self._ports = ports
        self._limits = limits
        self._clock = ports.clock
        self.metrics = ProcessServerMetrics(ports.registry, monotonic_seconds=ports.clock.monotonic_seconds)
        self.metrics.cache_limit_bytes.set(limits.cache_bytes_max)
        self._histories: dict[DiskId, DiskHistory] = {}
        self._connections: dict[AgentConnection, None] = {}
        self._ready = asyncio.Event()
        self._stop = asyncio.Event()
        self._server_clock = ServerClock(ports.clock)
        self._cache = Cache(
            ports.cache,
            ports.cache_executor,
            self.metrics,
            bytes_max=limits.cache_bytes_max,
            file_bytes=limits.cache_file_bytes,
        )
        self._writer = CacheWriter(self._cache, self.metrics)
        self._uploader = Uploader(
            ports.archive,
            self._cache,
            self.metrics,
            UploadRules(
                per_disk_max=limits.uploads_per_disk_max,
                bytes_in_memory_max=limits.upload_bytes_in_memory_max,
                pause_seconds_first=limits.upload_pause_seconds_first,
                pause_seconds_max=limits.upload_pause_seconds_max,
            ),
            on_committed=self._committed,
        )
        self._grants = GrantBook(
            identity=ports.identity,
            public_key=ports.signing_key.public_key().public_bytes_raw(),
            authority=ports.archive.authority,
        )
        self._tools = self._history_tools()
        self._opener = DiskOpener(
            archive=ports.archive,
            writer=self._writer,
            uploader=self._uploader,
            grants=self._grants,
            signing_key=ports.signing_key,
            vault_public_key=VaultKey(ports.archive, ports.state, ports.cache_executor).get,
            history_of=self._history,
            has_room=lambda: self._cache.room_bytes() > 0,
        )
        self._reporter = self._make_reporter()
        self._receiver_tools = ReceiverTools(
            opener=self._opener,
            metrics=self.metrics,
            identifier=ports.identity.identifier,
            idle_seconds_max=limits.idle_seconds_max,
            next_credit=self._next_credit,
            instant_ns=self._server_clock.instant_ns,
            barrier=self._writer.barrier,
        )

    async def run(self) -> None:
        """Recovers what the cache holds, then seals, caches, uploads and reports until stop(); returns when all has
        ended.

        Cancelling it is a crash as far as durable state is concerned: what was acknowledged survives, nothing else
        need. Raises ReplicationError only for what no retry mends (a cache directory that cannot be read at start).
        """
        await self._load_state()
        recovered = await self._recover()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._writer.run()),
                group.create_task(self._uploader.run()),
            ]
            for disk, one in recovered.items():
                await self._take_recovered(disk, one)
            tasks.append(group.create_task(self._reporter.run()))
            tasks.append(group.create_task(self._keep_house()))
            self._ready.set()
            await self._stop.wait()
            await self._end_in_order()
            for connection in self._connections:
                # why: one that waits for a cache that takes nothing any more would never end
                connection.cut()
            for task in tasks:
                task.cancel()
        await self._cache.close()

    async def wait_until_ready(self) -> None:
        """Returns once the cache is recovered and channels may be served."""
        await self._ready.wait()

    async def serve_channel(self, channel: Channel) -> None:
        """Serves one accepted connection to its end, in the caller's task; returns when it is over, and closes the
        channel.

        The peer's faults and a lost connection end only this call, without raising. May be called as soon as `run` runs
        (it waits until the cache is recovered).
        """
        await self._ready.wait()
        connection = AgentConnection(channel, self._receiver_tools)
        if self._stop.is_set():
            connection.refuse(ServiceStopping())
        elif channel.certificate_serial in self._reporter.revoked.serials:
            connection.refuse(CertificateRefused(subject=channel.peer.uri, reason="revoked"))
        self._connections[connection] = None
        try:
            await connection.serve()
        finally:
            del self._connections[connection]

    def stop(self) -> None:
        """Orderly end: no more frames are taken, what was received is made durable and acknowledged, agents get a
        goodbye, closed segments are uploaded for at most limits.stop_seconds_max; then run() returns.

        Nothing acknowledged depends on it.
        """
        self._stop.set()

    def not_ready(self) -> list[str]:
        """Why it does not serve at the moment; empty when it does."""
        if not self._ready.is_set():
            return ["the cache is being recovered"]
        reasons = ["stopping"] if self._stop.is_set() else []
        if self._cache.write_fault is not None:
            reasons.append(str(self._cache.write_fault))
        if not self._cache.room_bytes():
            reasons.append("the cache is full")
        return reasons

    # start

    async def _load_state(self) -> None:
        state = self._ports.state
        try:
            signed = await self._run(lambda: _unless_unreadable(load_grants, state)) or []
            self._reporter.revoked = await self._run(lambda: load_revoked(state))
            kept_ns = await self._run(lambda: _unless_unreadable(load_clock, state))
        except OSError as error:
            raise CacheFault(name="state", reason=str(error)) from error
        self._grants.take(signed)
        if kept_ns is not None:
            self._server_clock.resume(kept_ns)
        self._ports.on_revoked(self._reporter.revoked)

    async def _recover(self) -> dict[DiskId, RecoveredDisk]:
        try:
            recovered = await self._run(partial(recover_cache, self._ports.cache))
        except OSError as error:
            raise CacheFault(name="cache", reason=str(error)) from error
        self._cache.start(recovered.files, self._checkpoints)
        for disk, one in recovered.disks.items():
            self._history(disk).recover(one)
        return recovered.disks

    async def _take_recovered(self, disk: DiskId, recovered: RecoveredDisk) -> None:
        """Closes what was in work at its last whole change set, and sends on what waits."""
        history = self._history(disk)
        if recovered.work is not None:
            try:
                frames = await self._read_frames(recovered)
            except (CacheDamaged, OSError) as error:
                fault = error if isinstance(error, CacheDamaged) else CacheDamaged(name="work", reason=str(error))
                history.lose_cache(fault)
                self._cache.release(recovered.work.files)
                return
            history.work_recovered(frames)
            history.close_recovered(recovered.work, frames)
        if history.waiting:
            self._uploader.closed(history)

    async def _read_frames(self, recovered: RecoveredDisk) -> SegmentFrames:
        assert recovered.work is not None
        frames = SegmentFrames()
        locations = list(recovered.work.frames)
        for first in range(0, len(locations), RECOVERY_FRAMES_AT_ONCE):
            part = locations[first : first + RECOVERY_FRAMES_AT_ONCE]
            read = await self._cache.read(RecordKind.FRAME, part)
            for location, payload in zip(part, read.payloads, strict=True):
                frames.add_recovered(parse_frame_record(payload).entry, location, recovered.work.opening)
            self._cache.give_back(read)
        return frames

    # while it runs

    async def _keep_house(self) -> None:
        while True:
            now_seconds = self._clock.monotonic_seconds()
            for history in self._histories.values():
                history.end_due_segment(now_seconds)
            await self._cache.remove_unused()
            self.metrics.segments_waiting.set(sum(len(history.waiting) for history in self._histories.values()))
            for connection in self._connections:
                connection.credit_changed()
            await asyncio.sleep(HOUSEKEEPING_SECONDS)

    def _history(self, disk: DiskId) -> DiskHistory:
        if disk not in self._histories:
            self._histories[disk] = DiskHistory(disk, self._tools)
        return self._histories[disk]

    def _checkpoints(self) -> Iterable[DiskCheckpoint]:
        found = (self._histories[disk].checkpoint() for disk in sorted(self._histories))
        return [checkpoint for checkpoint in found if checkpoint is not None]

    def _next_credit(self, connection: AgentConnection) -> int:
        if self._stop.is_set():
            return connection.credit.granted_bytes
        load = Load(
            cache_room_bytes=self._cache.room_bytes(),
            memory_bytes_max=self._limits.received_bytes_in_memory_max,
            connections=len(self._connections),
            promised_bytes=sum(one.credit.promised_bytes for one in self._connections),
        )
        return next_credit(load, connection.credit)

    def _committed(self, history: DiskHistory) -> None:
        if history.unreported_points:
            self._reporter.soon()

    def _grants_changed(self) -> None:
        """A disk that is granted to another process server by now takes no more frames here."""
        for disk, history in self._histories.items():
            if not self._grants.held(disk):
                history.take_over(NoGrant(disk=disk))

    def _revoked(self, revoked: RevocationList) -> None:
        serials = set(revoked.serials)
        for connection in self._connections:
            if connection.certificate_serial in serials:
                connection.refuse(CertificateRefused(subject=connection.peer_uri, reason="revoked"))
        self._ports.on_revoked(revoked)

    # stop

    async def _end_in_order(self) -> None:
        _log.info("stopping", connections=len(self._connections), disks=len(self._histories))
        try:
            async with asyncio.timeout(self._limits.stop_seconds_max):
                for connection in self._connections:
                    connection.drain()
                await self._writer.barrier()
                for connection in self._connections:
                    connection.say_goodbye("the process server is stopping")
                for history in self._histories.values():
                    history.end_segment()
                await self._writer.barrier()
                for history in list(self._histories.values()):
                    await self._uploader.wait_until_committed(history)
                await self._writer.barrier()
                await self._reporter.report_once()
                await self._wait_for_connections()
        except TimeoutError:
            waiting = sum(len(history.waiting) for history in self._histories.values())
            _log.warning("stopped before all was committed", segments=waiting)
        except ReplicationError as error:
            _log.warning("the last report was not answered", code=error.code, reason=str(error))

    async def _wait_for_connections(self) -> None:
        """Connections end by themselves after their goodbye; those that do not are cut with the process."""
        waited_seconds = 0.0
        while self._connections and waited_seconds < GOODBYE_SECONDS_MAX:
            await asyncio.sleep(0.05)
            waited_seconds += 0.05

    # making

    def _history_tools(self) -> HistoryTools:
        return HistoryTools(
            cache=self._cache,
            writer=self._writer,
            sealer=Sealer(
                self._ports.sealing_executor,
                self.metrics,
                random_bytes=self._ports.random_bytes,
                compression_level=self._limits.compression_level,
            ),
            executor=self._ports.sealing_executor,
            clock=self._ports.clock,
            metrics=self.metrics,
            signing_key=self._ports.signing_key,
            rules=SegmentRules(
                stored_bytes_due=self._limits.segment_stored_bytes_due,
                age_seconds_max=self._limits.segment_age_seconds_max,
            ),
            on_closed_segment=self._uploader.closed,
        )

    def _make_reporter(self) -> Reporter:
        subject = ReportingSubject(
            host=self._ports.host,
            port=self._ports.port,
            histories=lambda: list(self._histories.values()),
            cache=self._cache,
            uploader=self._uploader,
            on_grants=self._grants_changed,
            on_revoked=self._revoked,
            on_renewal_due=self._ports.on_renewal_due,
        )
        return Reporter(
            subject,
            control=self._ports.control,
            archive=self._ports.archive,
            grants=self._grants,
            state=self._ports.state,
            executor=self._ports.cache_executor,
            clock=self._server_clock,
            metrics=self.metrics,
            report_seconds=self._limits.report_seconds,
        )

    def _run(self, call: Callable[[], Result]) -> asyncio.Future[Result]:
        return asyncio.get_running_loop().run_in_executor(self._ports.cache_executor, call)


def _unless_unreadable(load: Callable[[DurableDirectory], Result], state: DurableDirectory) -> Result | None:
    """What was kept for a start without the configuration server; without it, that has to be heard first."""
    try:
        return load(state)
    except StateUnreadable as error:
        _log.error("state is not as it was kept", reason=str(error), hint=error.hint)
        return None
