"""The hosts: each keeps one program running on its own medium, restarts it after every death, and reports what it died
of.

A program is started as its `__main__` would start it, with the same constructor and simulated ports. After a kill
its tasks are cancelled and unwound in the dead process (see process.py) while the successor already runs.
"""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mobility_agent.service import AgentService
from process_server.service import ProcessServer, ProcessServerPorts
from protocol.control import ProcessServerAddress
from protocol.errors import ConnectionLost, ReplicationError
from protocol.transport.buffers import BufferPool
from protocol.vocabulary import PeerIdentity, Role
from storage.disk_archive import DiskArchive
from tests.simulation.channels import POOL_BUFFERS, connected_channels, context_of
from tests.simulation.clock import SimulatedClock
from tests.simulation.control import (
    RegisteredProcessServer,
    SimulatedAgentControl,
    SimulatedProcessServerControl,
)
from tests.simulation.directory import SimulatedDirectory, StorageMedium
from tests.simulation.disk import SimulatedSources
from tests.simulation.logs import leaves_of
from tests.simulation.process import RUNNING_PROCESS, ProcessKilled, SimulatedProcess
from tests.simulation.store import SimulatedStore

if TYPE_CHECKING:
    from tests.simulation.world import World

AGENT: Final = "agent"
PROCESS_SERVERS: Final = ("process-server", "process-server-2")
RESTART_SECONDS_MAX: Final = 3.0
CONNECT_SECONDS_MAX: Final = 0.05


class InlineExecutor(Executor):
    """Only tells the loop how many workers it would have; the loop runs the calls."""

    def __init__(self, workers: int) -> None:
        self._max_workers = workers

    def submit(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError("the simulation runs executor calls through the loop only")


class Host:
    """What all hosts share: one process at a time, its death, its restart."""

    def __init__(self, world: World, draw: random.Random, name: str) -> None:
        self.name = name
        self.world = world
        self.draw = draw
        self.clock = SimulatedClock(world.loop, skew_ns=round(draw.uniform(-1, 1) * 1e9))
        self.process = self._new_process()
        self.process.is_alive = False
        self._ended = asyncio.Event()
        self.crashes = 0
        self.is_last_run = False
        self.off_until_seconds = 0.0
        self.is_running = False
        """Its program is started again and again. A host that is in no use yet does not."""

    def _new_process(self) -> SimulatedProcess:
        return SimulatedProcess(self.name, self._died)

    def kill(self) -> None:
        """SIGKILL: the page cache stays."""
        self.process.kill()

    def kill_after_operations(self, count: int) -> None:
        self.process.kill_after_operations(count)

    def hold(self) -> None:
        """SIGSTOP: nothing of it runs; its sockets take what fits and nobody reads it."""
        if self.process.is_alive:
            self.world.loop.hold(self.process)
            self.world.trace.event("held", self.name)

    def let_go(self) -> None:
        """SIGCONT."""
        self.world.loop.let_go(self.process)

    def switch_off(self, seconds: float) -> None:
        """An orderly shut-down of the whole host would end the program; here the plug is pulled, and put in later."""
        self.off_until_seconds = self.world.loop.time() + seconds
        self.cut_power()

    def cut_power(self) -> None:
        """The host goes down: what was not synchronized is lost, torn, or kept."""
        self.process.kill()
        for medium in self.media():
            files = medium.lose_power()
            self.world.trace.event("power-lost", medium.name, files)

    def media(self) -> list[StorageMedium]:
        raise NotImplementedError

    def stop_orderly(self) -> None:
        """SIGTERM."""
        raise NotImplementedError

    async def live(self, process: SimulatedProcess) -> None:
        raise NotImplementedError

    async def keep_running(self) -> None:
        """Starts the program again and again, until cancelled."""
        self.is_running = True
        async with asyncio.TaskGroup() as group:
            while True:
                self.process = process = self._new_process()
                self._ended = asyncio.Event()
                self.world.trace.event("started", self.name)
                task = group.create_task(self._live_and_report(process, self._ended), context=context_of(process))
                try:
                    await self._ended.wait()
                finally:
                    task.cancel()
                if not self.is_last_run:
                    off_seconds = max(0.0, self.off_until_seconds - self.world.loop.time())
                    await asyncio.sleep(off_seconds + self.draw.random() ** 2 * RESTART_SECONDS_MAX)
                    while (off_seconds := self.off_until_seconds - self.world.loop.time()) > 0:
                        # why: it may have been switched off while it was about to start
                        await asyncio.sleep(off_seconds)
                if self.is_last_run:
                    return

    async def _live_and_report(self, process: SimulatedProcess, ended: asyncio.Event) -> None:
        try:
            await self.live(process)
        except (ProcessKilled, asyncio.CancelledError):
            if process.is_alive:
                raise
        except BaseException as error:
            if process.is_alive:
                self._judge_death(error)
        finally:
            # why: whatever its unwinding still tries, the process is over
            process.is_alive = False
            self.world.trace.event("ended", self.name)
            ended.set()

    def _judge_death(self, error: BaseException) -> None:
        self.crashes += 1
        for leaf in leaves_of(error):
            if not isinstance(leaf, ReplicationError | OSError):
                self.world.violate("crash", f"{self.name} died of {leaf!r}", leaf)
            self.world.trace.event("died", self.name, type(leaf).__name__)

    def _died(self, process: SimulatedProcess) -> None:
        self.world.trace.event("killed", self.name)
        # why: a stopped process dies of SIGKILL too, and is then unwound like any other
        self.world.loop.let_go(process)
        for connection in self.world.network.open_connections():
            connection.process_died(process)
        self._release(process)
        self._ended.set()

    def _release(self, process: SimulatedProcess) -> None:
        """What the kernel does for a dead process beside closing its sockets."""


class AgentHost(Host):
    """The source machine."""

    def __init__(self, world: World, draw: random.Random) -> None:
        super().__init__(world, draw, AGENT)
        self.state = StorageMedium("agent-state", draw)
        self.service: AgentService | None = None
        self._sources: SimulatedSources | None = None

    def media(self) -> list[StorageMedium]:
        return [self.state]

    def stop_orderly(self) -> None:
        if self.process.is_alive and self.service is not None:
            self.service.stop()

    async def live(self, process: SimulatedProcess) -> None:
        self._sources = SimulatedSources(self.world.disks, process)
        self.service = service = AgentService(
            directory=SimulatedDirectory(self.state, process),
            open_source=self._sources,
            connect=self._connect,
            control=SimulatedAgentControl(self.world.server, process),
            clock=self.clock,
            draw_random=self.draw.randbytes,
            executor=InlineExecutor(2),
            limits=self.world.agent_limits,
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(self._protect(service))
            await service.run()
            if self.service is service:
                self.service = None

    async def _protect(self, service: AgentService) -> None:
        for disk in self.world.disks:
            while True:
                try:
                    await service.protect(disk.path)
                    break
                except ReplicationError as error:
                    self.world.trace.event("protect-failed", error.code)
                    await asyncio.sleep(1.0)

    async def _connect(self, address: ProcessServerAddress) -> Any:
        process = RUNNING_PROCESS.get()
        assert process is not None
        await asyncio.sleep(self.draw.random() * CONNECT_SECONDS_MAX)
        host = next(one for one in self.world.process_servers if one.member.process_server == address.process_server)
        try:
            return host.accept(process)
        except ConnectionRefusedError as error:
            raise ConnectionLost(peer=address.host, reason=str(error)) from error

    def _release(self, process: SimulatedProcess) -> None:
        if self._sources is not None:
            self._sources.release_leases()


class ProcessServerHost(Host):
    """One of the site's process servers: its cache on one medium, its state on another, and its own key."""

    def __init__(
        self,
        world: World,
        draw: random.Random,
        *,
        name: str,
        member: RegisteredProcessServer,
        signing_key: Ed25519PrivateKey,
    ) -> None:
        super().__init__(world, draw, name)
        self.member = member
        self._signing_key = signing_key
        self.cache = StorageMedium(f"{name}-cache", draw)
        self.state = StorageMedium(f"{name}-state", draw)
        self.cache.on_change = self._cache_changed
        self.cache.on_read_failure = self._cache_lost
        self.service: ProcessServer | None = None
        self._group: asyncio.TaskGroup | None = None
        self._pool = BufferPool(POOL_BUFFERS)

    def media(self) -> list[StorageMedium]:
        return [self.cache, self.state]

    def stop_orderly(self) -> None:
        if self.process.is_alive and self.service is not None:
            self.service.stop()

    def _cache_changed(self, operation: str, name: str) -> None:
        self.world.trace.event(self.cache.name, operation, name)
        if operation in ("create", "write"):
            self.world.invariants.cache_grew(self.cache.used_bytes())

    def _cache_lost(self) -> None:
        self.world.invariants.cache_was_lost(self.member)

    def lose_cache(self) -> None:
        """The cache's disk is replaced by an empty one."""
        self.process.kill()
        self.cache.wipe()
        self._cache_lost()

    def flip_cache_bit(self, draw: random.Random) -> None:
        """A latent error of the cache's disk: what it hits is lost, as if the cache were."""
        if self.cache.flip_bit(draw) is not None:
            self._cache_lost()

    def accept(self, client: SimulatedProcess) -> Any:
        """A new connection of an agent; returns the agent's end. Raises ConnectionRefusedError."""
        service, group = self.service, self._group
        network = self.world.network
        if service is None or group is None:
            raise ConnectionRefusedError("simulated: nothing listens")
        connection = network.connect(client, self.process)
        agent_end, server_end = connected_channels(
            self.world, connection, self.agent_identity, self.identity, self._pool
        )
        task = service.serve_channel(server_end)
        group.create_task(task, context=context_of(self.process))
        if network.phantoms:
            network.phantoms -= 1
            connection.ends[0].lose(ConnectionResetError("simulated: the client never heard of it"))
            raise ConnectionRefusedError("simulated: timed out")
        return agent_end

    def _draw_bytes(self, count: int) -> bytes:
        drawn = self.draw.randbytes(count)
        self.world.invariants.drawn_by_process_servers.append(drawn)
        return drawn

    @property
    def identity(self) -> PeerIdentity:
        return PeerIdentity(
            vault=self.world.server.vault, role=Role.PROCESS_SERVER, identifier=self.member.process_server
        )

    @property
    def agent_identity(self) -> PeerIdentity:
        server = self.world.server
        return PeerIdentity(vault=server.vault, role=Role.AGENT, identifier=server.machine)

    async def live(self, process: SimulatedProcess) -> None:
        self._pool = BufferPool(POOL_BUFFERS)
        store = SimulatedStore(self.world.store, process)
        archive = DiskArchive(store, vault=self.world.server.vault, authority=self.world.vault.authority.public_key())
        ports = ProcessServerPorts(
            identity=self.identity,
            signing_key=self._signing_key,
            cache=SimulatedDirectory(self.cache, process),
            state=SimulatedDirectory(self.state, process),
            archive=archive,
            control=SimulatedProcessServerControl(self.world.server, process, self.member),
            clock=self.clock,
            random_bytes=self._draw_bytes,
            sealing_executor=InlineExecutor(2),
            cache_executor=InlineExecutor(2),
        )
        service = ProcessServer(ports, self.world.process_server_limits)
        async with asyncio.TaskGroup() as group:
            self.service, self._group = service, group
            try:
                await service.run()
            finally:
                # why: a killed process is still unwound while its successor runs already.
                if self.service is service:
                    self.service, self._group = None, None
