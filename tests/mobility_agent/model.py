"""A process server and a configuration server in memory, to run the agent's real shells against.

The process server keeps every change set with its bytes, acknowledges when it is told to, checks the conversation
with the product's own session machine, and rebuilds the disk at any sequence: what the agent's stream really says.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import numpy
import zstandard
from typing_extensions import Buffer

from protocol.control import (
    AgentOrders,
    AgentReport,
    CertificateBundle,
    DiskAssignment,
    DiskOrder,
    DiskRegistration,
    ProcessServerAddress,
    RevocationList,
)
from protocol.control_errors import ServerUnreachable
from protocol.errors import ConnectionLost
from protocol.messages import (
    CloseDisk,
    Credit,
    DiskOpened,
    Frame,
    Goodbye,
    Hello,
    Message,
    OpenDisk,
    Positions,
    Tick,
    Welcome,
)
from protocol.session import ProcessServerSession
from protocol.vocabulary import (
    EXTENT_DTYPE,
    ChangeKind,
    ChangeSetEnd,
    Compression,
    DiskId,
    MachineId,
    PeerIdentity,
    ProcessServerId,
    Role,
    VaultId,
    check_extent_table,
)

LOOK_AGAIN_SECONDS: Final = 0.02
VAULT = VaultId("a" * 32)
SERVER = ProcessServerId("5" * 32)
ADDRESS = ProcessServerAddress(process_server=SERVER, host="model", port=9443)
MACHINE = MachineId("c" * 32)


@dataclass(slots=True)
class ModelReceived:
    message: Message
    body: memoryview = field(default_factory=lambda: memoryview(b""))

    def release(self) -> None:
        """Nothing is pooled here."""


class ModelChannel:
    """One end of an in-memory connection."""

    def __init__(self, identifier: str, role: Role) -> None:
        self.peer = PeerIdentity(vault=VAULT, role=role, identifier=identifier)
        self.certificate_serial = "1F"
        self.inbox: asyncio.Queue[ModelReceived | None] = asyncio.Queue()
        self.other: ModelChannel | None = None
        self.is_closed = False

    def set_idle_seconds_max(self, seconds: float) -> None:
        self.idle_seconds_max = seconds

    async def send(self, message: Message, body: Sequence[Buffer] = ()) -> None:
        assert self.other is not None
        if self.is_closed or self.other.is_closed:
            raise ConnectionLost(peer=self.peer.uri, reason="closed")
        data = b"".join(bytes(part) for part in body)
        self.other.inbox.put_nowait(ModelReceived(message, memoryview(data)))
        await asyncio.sleep(0)

    async def receive(self) -> ModelReceived:
        received = None if self.is_closed else await self.inbox.get()
        if received is None:
            raise ConnectionLost(peer=self.peer.uri, reason="closed")
        return received

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        self.is_closed = True
        self.inbox.put_nowait(None)
        if self.other is not None:
            self.other.inbox.put_nowait(None)


def channel_pair() -> tuple[ModelChannel, ModelChannel]:
    agent, server = ModelChannel(SERVER, Role.PROCESS_SERVER), ModelChannel(MACHINE, Role.AGENT)
    agent.other, server.other = server, agent
    return agent, server


@dataclass(slots=True)
class ModelChangeSet:
    frames: list[tuple[numpy.ndarray[Any, Any], bytes]] = field(default_factory=list)
    end: ChangeSetEnd | None = None

    @property
    def raw_bytes(self) -> int:
        return sum(len(data) for _, data in self.frames)


@dataclass(slots=True)
class ModelEpoch:
    parent: tuple[int, int]
    sets: list[ModelChangeSet] = field(default_factory=list)
    durable: int = 0
    committed: int = 0


class ModelDisk:
    """One disk's history at the model."""

    def __init__(self) -> None:
        self.epochs: dict[int, ModelEpoch] = {1: ModelEpoch(parent=(0, 0))}

    @property
    def epoch(self) -> int:
        return max(self.epochs)

    @property
    def newest(self) -> ModelEpoch:
        return self.epochs[self.epoch]

    def new_epoch(self, sequence: int) -> None:
        self.epochs[self.epoch + 1] = ModelEpoch(parent=(self.epoch, sequence))

    def cursor(self) -> int | None:
        stated = [
            one.end.copy_in_cursor_bytes
            for one in self.newest.sets[: self.newest.durable]
            if one.end is not None and one.end.copy_in_cursor_bytes is not None
        ]
        return stated[-1] if stated else None

    def image(self, size_bytes: int, *, epoch: int | None = None, sequence: int | None = None) -> bytes:
        """The disk as a recovery at this position rebuilds it (the newest whole change set by default)."""
        epoch = self.epoch if epoch is None else epoch
        history = self.epochs[epoch]
        if history.parent == (0, 0):
            image = bytearray(size_bytes)
        else:
            image = bytearray(self.image(size_bytes, epoch=history.parent[0], sequence=history.parent[1]))
        sets = history.sets if sequence is None else history.sets[:sequence]
        for one in sets:
            if one.end is None:
                break
            for table, data in one.frames:
                _apply(image, table, data)
        return bytes(image)

    def points(self) -> list[tuple[int, ChangeSetEnd]]:
        return [
            (number, one.end)
            for number, one in enumerate(self.newest.sets, start=1)
            if one.end is not None and one.end.bookmark is not None
        ]

    def ends(self) -> list[ChangeSetEnd]:
        return [one.end for one in self.newest.sets if one.end is not None]


def _apply(image: bytearray, table: numpy.ndarray[Any, Any], data: bytes) -> None:
    at = 0
    for row in table:
        offset, length = int(row["offset"]), int(row["length"])
        if row["kind"] == ChangeKind.DATA:
            image[offset : offset + length] = data[at : at + length]
            at += length
        else:
            image[offset : offset + length] = bytes(length)


class ModelProcessServer:
    """acknowledges: change sets become durable and committed as soon as they are whole."""

    def __init__(self, *, instant_ns: int | None = 1_000_000_000_000) -> None:
        self.disks: dict[DiskId, ModelDisk] = {}
        self.instant_ns = instant_ns
        self.acknowledges = True
        self.commits = True
        self.credit_bytes = 2**40
        self.cut_after_frames: int | None = None
        self.refusal: CloseDisk | None = None
        self.connections = 0
        self.frames = 0
        self.openings: list[OpenDisk] = []
        self.changed = asyncio.Event()
        self.live: list[ModelChannel] = []
        self._group: asyncio.TaskGroup | None = None

    def serve_in(self, group: asyncio.TaskGroup) -> None:
        self._group = group

    async def connect(self, address: ProcessServerAddress) -> ModelChannel:
        assert self._group is not None
        agent, server = channel_pair()
        self.connections += 1
        self.live.append(server)
        self._group.create_task(self._serve(server))
        return agent

    def cut(self) -> None:
        """Every connection ends here and now."""
        live, self.live = self.live, []
        for channel in live:
            channel.abort()

    def lose_cache(self, disk: DiskId, durable: int) -> None:
        """What is behind `durable` is gone, although it was acknowledged."""
        newest = self.disks[disk].newest
        newest.durable = newest.committed = durable
        del newest.sets[durable:]
        self.cut()

    def acknowledge_all(self) -> None:
        for disk in self.disks.values():
            whole = sum(1 for one in disk.newest.sets if one.end is not None)
            disk.newest.durable = disk.newest.committed = whole

    async def until(self, condition: Any) -> None:
        """Waits until condition() holds; the test's own timeout bounds it."""
        while not condition():
            self.changed.clear()
            # why: what the agent says of itself changes without anything that is seen here
            with suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), LOOK_AGAIN_SECONDS)

    async def _serve(self, channel: ModelChannel) -> None:
        try:
            await _Conversation(self, channel).run()
        except ConnectionLost:
            channel.abort()


class _Conversation:
    def __init__(self, server: ModelProcessServer, channel: ModelChannel) -> None:
        self.server = server
        self.channel = channel
        self.session = ProcessServerSession()
        self.open: dict[int, tuple[DiskId, ModelDisk]] = {}

    async def say(self, message: Message) -> None:
        self.session.check_send(message)
        await self.channel.send(message)

    async def run(self) -> None:
        while True:
            received = await self.channel.receive()
            message = self.session.receive(received.message)
            match message:
                case Hello():
                    await self.say(Welcome(wire_version=1, process_server=SERVER, idle_seconds_max=30))
                    await self.say(Credit(total_bytes=self.server.credit_bytes))
                    await self.say(Tick(instant_ns=self.server.instant_ns))
                case OpenDisk():
                    await self.open_disk(message)
                case Frame():
                    await self.take_frame(message, bytes(received.body))
                case CloseDisk():
                    self.forget_partial(message.channel)
                case Goodbye():
                    await self.say(Goodbye(reason="as you wish"))
                    return
            self.server.changed.set()

    async def open_disk(self, message: OpenDisk) -> None:
        self.server.openings.append(message)
        if self.server.refusal is not None:
            refusal = self.server.refusal
            await self.say(
                CloseDisk(
                    channel=message.channel,
                    code=refusal.code,
                    detail=refusal.detail,
                    is_retryable=refusal.is_retryable,
                )
            )
            return
        disk = self.server.disks.setdefault(message.disk, ModelDisk())
        if message.wants_new_epoch:
            disk.new_epoch(disk.newest.durable)
        history = disk.newest
        del history.sets[history.durable :]
        self.open[message.channel] = (message.disk, disk)
        await self.say(
            DiskOpened(
                channel=message.channel,
                epoch=disk.epoch,
                parent_epoch=history.parent[0],
                parent_sequence=history.parent[1],
                durable_sequence=history.durable,
                committed_sequence=history.committed,
                copy_in_cursor_bytes=disk.cursor(),
            )
        )

    async def take_frame(self, frame: Frame, body: bytes) -> None:
        self.server.frames += 1
        _, disk = self.open[frame.channel]
        history = disk.newest
        if frame.frame_number == 0:
            history.sets.append(ModelChangeSet())
        current = history.sets[-1]
        table = numpy.frombuffer(body[: 16 * frame.extent_count], dtype=EXTENT_DTYPE)
        data = body[16 * frame.extent_count :]
        if frame.compression is Compression.ZSTD:
            data = zstandard.ZstdDecompressor().decompress(data, max_output_size=frame.raw_bytes)
        assert len(data) == frame.raw_bytes
        check_extent_table(table, raw_bytes=frame.raw_bytes)
        current.frames.append((table, data))
        current.end = frame.end
        if self.server.cut_after_frames is not None:
            self.server.cut_after_frames -= 1
            if self.server.cut_after_frames == 0:
                self.server.cut_after_frames = None
                self.server.cut()
                raise ConnectionLost(peer="agent", reason="cut by the test")
        if frame.end is not None and self.server.acknowledges:
            history.durable = frame.sequence
            history.committed = frame.sequence if self.server.commits else history.committed
            await self.say(
                Positions(
                    channel=frame.channel,
                    epoch=disk.epoch,
                    durable_sequence=history.durable,
                    committed_sequence=history.committed,
                )
            )

    def forget_partial(self, channel: int) -> None:
        known = self.open.pop(channel, None)
        if known is not None and known[1].newest.sets and known[1].newest.sets[-1].end is None:
            known[1].newest.sets.pop()


class ModelControl:
    """The configuration server: AgentControl in memory."""

    def __init__(self, *, copy_interval_seconds: float = 3600.0, point_interval_seconds: float = 3600.0) -> None:
        self.is_down = False
        self.registrations: dict[str, DiskRegistration] = {}
        self.unregistered: list[tuple[DiskId, bool]] = []
        self.reports: list[AgentReport] = []
        self.copy_interval_seconds = copy_interval_seconds
        self.point_interval_seconds = point_interval_seconds
        self.is_paused = False
        self.revoked: tuple[str, ...] = ()
        self.revision = 1
        self._numbers = itertools.count(1)
        self._new = asyncio.Event()
        self.on_report: Callable[[], None] = lambda: None

    def changed(self) -> None:
        self.revision += 1
        self._new.set()

    def orders(self) -> AgentOrders:
        return AgentOrders(
            revision=f"{self.revision:x}",
            now_ns=1,
            heartbeat_seconds=0.05,
            renew_certificate=False,
            disks=tuple(
                DiskOrder(
                    disk=DiskId(disk),
                    process_server=ADDRESS,
                    is_paused=self.is_paused,
                    copy_interval_seconds=self.copy_interval_seconds,
                    point_interval_seconds=self.point_interval_seconds,
                )
                for disk in self.registrations
            ),
            revoked=RevocationList(number=len(self.revoked), serials=self.revoked),
        )

    def _check(self) -> None:
        if self.is_down:
            raise ServerUnreachable(server="model", reason="it is down")

    async def register_disk(self, registration: DiskRegistration) -> DiskAssignment:
        self._check()
        disk = next((d for d, known in self.registrations.items() if known.path == registration.path), "")
        if not disk:
            disk = f"{next(self._numbers):032x}"
            self.registrations[disk] = registration
            self.changed()
        return DiskAssignment(disk=DiskId(disk), machine=MACHINE, vault=VAULT, process_server=ADDRESS)

    async def unregister_disk(self, disk: DiskId, *, keep_data: bool) -> None:
        self._check()
        self.unregistered.append((disk, keep_data))
        self.registrations.pop(disk, None)
        self.changed()

    async def report(self, report: AgentReport) -> AgentOrders:
        self._check()
        self.reports.append(report)
        self.on_report()
        return self.orders()

    async def wait_for_orders(self, revision: str, wait_seconds: float) -> AgentOrders:
        self._check()
        while revision == f"{self.revision:x}":
            self._new.clear()
            await self._new.wait()
        return self.orders()

    async def renew(self, request_pem: str) -> CertificateBundle:
        raise NotImplementedError("certificates are tested with the real configuration server")
