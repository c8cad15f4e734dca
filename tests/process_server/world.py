"""One process server in this process, with a local directory as its store and scripted neighbours on both sides."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typing_extensions import Buffer

from process_server.grants import save_grants
from process_server.service import ProcessServer, ProcessServerPorts
from process_server.settings import ProcessServerLimits
from protocol.control import (
    CertificateBundle,
    ProcessServerOrder,
    ProcessServerOrders,
    ProcessServerReport,
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
    Refusal,
    Tick,
    Welcome,
)
from protocol.session import AgentSession
from protocol.signed_records import Grant, sign_grant
from protocol.transport.channel import Channel, Received
from protocol.vocabulary import (
    FRAME_RAW_BYTES_MAX,
    ChangeSetEnd,
    Compression,
    Consistency,
    DiskId,
    Extent,
    MachineId,
    PeerIdentity,
    ProcessServerId,
    Role,
    VaultId,
    extent_table,
)
from runtime.clock import SystemClock
from runtime.directory import DurableDirectory
from runtime.local_directory import LocalDirectory
from storage.backends.local_directory import LocalDirectoryStore
from storage.backends.object_store import ObjectStore
from storage.disk_archive import DiskArchive, create_vault_object
from storage.keys import create_vault, unwrap_vault_key
from storage.sealing import FrameOpener
from tests.process_server.memory_store import MemoryStore

VAULT = VaultId("aa" * 16)
MACHINE = MachineId("bb" * 16)
DISK = DiskId("cc" * 16)
OTHER_DISK = DiskId("cd" * 16)
SERVER = ProcessServerId("dd" * 16)
DISK_BYTES = 64 * 2**20
CRASH = ChangeSetEnd(consistency=Consistency.CRASH)
WAIT_SECONDS = 20.0

SMALL = ProcessServerLimits(
    cache_bytes_max=64 * 2**20,
    cache_file_bytes=4 * 2**20,
    segment_stored_bytes_due=256 * 1024,
    segment_age_seconds_max=0.2,
    upload_pause_seconds_first=0.05,
    upload_pause_seconds_max=0.1,
    report_seconds=0.5,
    stop_seconds_max=10.0,
)


async def eventually(condition: Callable[[], bool]) -> None:
    """Returns once the condition holds; for what nobody is told about."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


class MemoryChannel:
    """One end of a connection without a network. What is in the queue when the other end closes still arrives."""

    def __init__(self, peer: PeerIdentity, serial: str) -> None:
        self.peer = peer
        self.certificate_serial = serial
        self.other: MemoryChannel | None = None
        self.is_closed = False
        self._queue: asyncio.Queue[Received | None] = asyncio.Queue()

    def set_idle_seconds_max(self, seconds: float) -> None:
        return

    async def send(self, message: Message, body: Sequence[Buffer] = ()) -> None:
        assert self.other is not None
        if self.is_closed or self.other.is_closed:
            raise ConnectionLost(peer=self.peer.uri, reason="closed")
        data = b"".join(bytes(memoryview(part).cast("B")) for part in body)
        self.other._queue.put_nowait(Received(message=message, body=memoryview(data)))

    async def receive(self) -> Received:
        received = await self._queue.get()
        if received is None:
            raise ConnectionLost(peer=self.peer.uri, reason="closed by the peer")
        return received

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            assert self.other is not None
            self.other._queue.put_nowait(None)


def memory_channels(agent: PeerIdentity, server: PeerIdentity, serial: str) -> tuple[MemoryChannel, MemoryChannel]:
    """(the agent's end, the process server's end)"""
    near, far = MemoryChannel(server, "00"), MemoryChannel(agent, serial)
    near.other, far.other = far, near
    return near, far


class ScriptedAgent:
    """Sends what a test tells it to, and remembers what it was told."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.session = AgentSession()
        self.opened: dict[int, DiskOpened] = {}
        self.positions: dict[int, Positions] = {}
        self.closed: dict[int, CloseDisk] = {}
        self.ticks: list[Tick] = []
        self.ending: Goodbye | Refusal | None = None
        self.is_over = False
        self._changed = asyncio.Condition()

    async def listen(self) -> None:
        """The receiving task, until the connection ends."""
        try:
            while True:
                received = await self.channel.receive()
                message = self.session.receive(received.message)
                async with self._changed:
                    self._note(message)
                    self._changed.notify_all()
        except ConnectionLost:
            pass
        finally:
            self.is_over = True
            async with self._changed:
                self._changed.notify_all()

    def _note(self, message: Message | None) -> None:
        match message:
            case DiskOpened():
                self.opened[message.channel] = message
            case Positions():
                self.positions[message.channel] = message
            case CloseDisk():
                self.closed[message.channel] = message
            case Tick():
                self.ticks.append(message)
            case Goodbye() | Refusal():
                self.ending = message
            case Welcome() | Credit() | None:
                pass

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(WAIT_SECONDS), self._changed:
            await self._changed.wait_for(condition)

    async def send(self, message: Message, body: Sequence[Buffer] = ()) -> None:
        self.session.check_send(message)
        await self.channel.send(message, body)

    async def greet(self) -> None:
        await self.send(Hello(wire_version_min=1, wire_version_max=1, agent_version="1", boot_id="boot"))
        await self.until(lambda: self.session.wire_version is not None)

    async def open(
        self,
        channel: int = 1,
        *,
        disk: DiskId = DISK,
        epoch: int = 0,
        acknowledged: int = 0,
        wants_new: bool = False,
        leave: int | None = None,
    ) -> DiskOpened:
        """The answer; AssertionError with the refusal if there is one. leave: the channel to close before."""
        if leave is not None:
            await self.send(CloseDisk(channel=leave, code="leaving", detail="", is_retryable=True))
        await self.send(
            OpenDisk(
                channel=channel,
                disk=disk,
                epoch=epoch,
                acknowledged_sequence=acknowledged,
                wants_new_epoch=wants_new,
            )
        )
        await self.until(lambda: channel in self.opened or channel in self.closed or self.is_over)
        assert channel not in self.closed, self.closed[channel]
        return self.opened[channel]

    async def refusal(self, channel: int = 1, **request: object) -> CloseDisk:
        """Opens and expects to be refused."""
        try:
            opened = await self.open(channel, **request)  # type: ignore[arg-type]
        except AssertionError:
            return self.closed[channel]
        raise AssertionError(opened)

    async def send_change_set(
        self, sequence: int, writes: dict[int, bytes], *, channel: int = 1, end: ChangeSetEnd = CRASH, cut: int = 0
    ) -> None:
        """One change set of data extents, by offset; a frame per MiB. cut: leaves so many frames off its end."""
        epoch = self.opened[channel].epoch
        frames: list[list[tuple[int, bytes]]] = [[]]
        for offset, data in sorted(writes.items()):
            if sum(len(part) for _, part in frames[-1]) + len(data) > FRAME_RAW_BYTES_MAX:
                frames.append([])
            frames[-1].append((offset, data))
        for number, parts in enumerate(frames[: len(frames) - cut]):
            table = extent_table([Extent(offset_bytes=offset, length_bytes=len(data)) for offset, data in parts])
            payload = b"".join(data for _, data in parts)
            frame = Frame(
                channel=channel,
                epoch=epoch,
                sequence=sequence,
                frame_number=number,
                extent_count=len(table),
                raw_bytes=len(payload),
                payload_bytes=len(payload),
                compression=Compression.NONE,
                end=end if number == len(frames) - 1 else None,
            )
            size = table.nbytes + len(payload)
            await self.until(lambda size=size: self.session.credit_bytes_available >= size or self.is_over)
            await self.send(frame, [table.tobytes(), payload])

    async def until_durable(self, sequence: int, channel: int = 1) -> None:
        await self.until(lambda: channel in self.positions and self.positions[channel].durable_sequence >= sequence)

    async def until_committed(self, sequence: int, channel: int = 1) -> None:
        await self.until(lambda: channel in self.positions and self.positions[channel].committed_sequence >= sequence)


class ScriptedControl:
    """A configuration server that says what the test wants and remembers every report."""

    def __init__(self) -> None:
        self.grants: list[bytes] = []
        self.orders: list[ProcessServerOrder] = []
        self.revoked = RevocationList(number=0)
        self.reports: list[ProcessServerReport] = []
        self.is_away = False
        self.answers = 0
        """To long polls."""
        self.now_ns = 1_700_000_000 * 10**9
        self._revision = 1
        self._changed = asyncio.Event()

    def change(self) -> None:
        """The orders are others now."""
        self._revision += 1
        self._changed.set()

    async def report(self, report: ProcessServerReport) -> ProcessServerOrders:
        await asyncio.sleep(0)
        self._check()
        self.reports.append(report)
        done = set(report.completed_orders)
        self.orders = [order for order in self.orders if order.order not in done]
        return self._now()

    async def wait_for_orders(self, revision: str, wait_seconds: float) -> ProcessServerOrders:
        self._check()
        while revision == f"{self._revision:x}":
            self._changed.clear()
            await self._changed.wait()
        self._check()
        self.answers += 1
        return self._now()

    async def renew(self, request_pem: str) -> CertificateBundle:
        raise NotImplementedError

    def points(self) -> list[str]:
        return [point.point for report in self.reports for point in report.committed_points]

    def _check(self) -> None:
        if self.is_away:
            raise ServerUnreachable(server="https://test", reason="away")

    def _now(self) -> ProcessServerOrders:
        return ProcessServerOrders(
            revision=f"{self._revision:x}",
            now_ns=self.now_ns,
            heartbeat_seconds=0.5,
            renew_certificate=False,
            grants=tuple(self.grants),
            revoked=self.revoked,
            orders=tuple(self.orders),
        )


@dataclass(kw_only=True)
class World:
    """What outlives a process server: its directories, the store, the keys."""

    path: Path
    limits: ProcessServerLimits = SMALL
    control: ScriptedControl = field(default_factory=ScriptedControl)
    signing_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    def __post_init__(self) -> None:
        self.vault = create_vault(vault=VAULT, created_ns=1, recovery_labels=("one", "two"))
        self.store: ObjectStore = LocalDirectoryStore(self.path / "store", create=True)
        self.memory = MemoryStore()
        """The store, once a test says so."""
        self.cache: DurableDirectory = LocalDirectory(self.path / "cache")
        self.state: DurableDirectory = LocalDirectory(self.path / "state")
        self.identity = PeerIdentity(vault=VAULT, role=Role.PROCESS_SERVER, identifier=SERVER)
        self.agent_identity = PeerIdentity(vault=VAULT, role=Role.AGENT, identifier=MACHINE)

    @property
    def archive(self) -> DiskArchive:
        return DiskArchive(self.store, vault=VAULT, authority=self.vault.description.authority)

    async def begin(self) -> None:
        """Makes the vault, and grants epochs 1 and 2 of the disk."""
        await create_vault_object(self.store, VAULT, self.vault.vault_json)
        self.grant(1), self.grant(2)

    def grant(
        self, epoch: int, *, disk: DiskId = DISK, parent: int | None = None, machine: MachineId = MACHINE
    ) -> None:
        self.control.grants.append(self.sign(epoch, disk=disk, parent=parent, machine=machine)[1])
        self.control.change()

    def sign(
        self,
        epoch: int,
        *,
        disk: DiskId = DISK,
        parent: int | None = None,
        machine: MachineId = MACHINE,
        key: Ed25519PrivateKey | None = None,
        server: ProcessServerId = SERVER,
    ) -> tuple[Grant, bytes]:
        grant = Grant(
            vault=VAULT,
            machine=machine,
            disk=disk,
            epoch=epoch,
            parent_epoch=epoch - 1 if parent is None else parent,
            process_server=server,
            process_server_key=(key or self.signing_key).public_key().public_bytes_raw(),
            issued_ns=1,
            disk_size_bytes=DISK_BYTES,
            sector_bytes=512,
        )
        return grant, sign_grant(grant, self.vault.authority.private_key)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[RunningServer]:
        """A process server over the world's directories; stopped in order at the end unless it was killed.

        It starts with the granted epochs in its state directory, as after any earlier run.
        """
        save_grants(self.state, self.control.grants)
        with ThreadPoolExecutor(2) as sealing, ThreadPoolExecutor(2) as files:
            server = ProcessServer(
                ProcessServerPorts(
                    identity=self.identity,
                    signing_key=self.signing_key,
                    cache=self.cache,
                    state=self.state,
                    archive=self.archive,
                    control=self.control,
                    clock=SystemClock(),
                    random_bytes=os.urandom,
                    sealing_executor=sealing,
                    cache_executor=files,
                ),
                self.limits,
            )
            async with asyncio.TaskGroup() as group:
                running = RunningServer(self, server, group)
                running.task = group.create_task(server.run())
                ready = group.create_task(server.wait_until_ready())
                await asyncio.wait([running.task, ready], return_when=asyncio.FIRST_COMPLETED)
                ready.cancel()
                try:
                    yield running
                finally:
                    server.stop()
                    await asyncio.wait([running.task])
                    running.end_agents()

    async def image(self, *, disk: DiskId = DISK, epoch: int | None = None) -> bytearray:
        """The disk as storage and a recovery key give it back, at the newest committed position."""
        history = await self.archive.history(disk)
        assert not history.damage
        private_key = unwrap_vault_key(self.vault.description, self.vault.recovery_keys[0], url="test")
        image = bytearray(DISK_BYTES)
        assert history.head is not None
        for segment in history.path_to(history.head):
            opener = FrameOpener(header=segment.header, vault_private_key=private_key)
            for number in range(len(segment.index)):
                record = await self.archive.read_frame(segment, number)
                raw = opener.open(record.entry, record.sealed)
                place = 0
                for row in record.entry.extents:
                    length = int(row["length"])
                    image[int(row["offset"]) : int(row["offset"]) + length] = raw[place : place + length]
                    place += length
        return image


class RunningServer:
    """A process server while it runs."""

    def __init__(self, world: World, server: ProcessServer, group: asyncio.TaskGroup) -> None:
        self.world = world
        self.server = server
        self.task: asyncio.Task[None]
        self._group = group
        self._agents: list[ScriptedAgent] = []

    async def agent(self, *, identity: PeerIdentity | None = None, serial: str = "0A") -> ScriptedAgent:
        """A connected agent that was welcomed."""
        agent = self.connect(identity=identity, serial=serial)
        await agent.greet()
        return agent

    def connect(self, *, identity: PeerIdentity | None = None, serial: str = "0A") -> ScriptedAgent:
        near, far = memory_channels(identity or self.world.agent_identity, self.world.identity, serial)
        agent = ScriptedAgent(near)
        self._agents.append(agent)
        self._group.create_task(self.server.serve_channel(far))
        self._group.create_task(agent.listen())
        return agent

    async def kill(self) -> None:
        """Nothing more happens in it, as after kill -9; what the directories hold stays as it is."""
        self.task.cancel()
        await asyncio.wait([self.task])
        self.end_agents()

    def end_agents(self) -> None:
        for agent in self._agents:
            agent.channel.abort()
            if isinstance(agent.channel, MemoryChannel) and agent.channel.other is not None:
                agent.channel.other.abort()
