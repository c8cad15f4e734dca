"""One run: builds everything from one seed, lets it work under the faults of a script, heals, waits until all is well,
and recovers every point.
"""

from __future__ import annotations

import asyncio
import gc
import random
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mobility_agent.service import AgentLimits
from process_server.settings import ProcessServerLimits
from protocol.operator_messages import Rpo
from protocol.vocabulary import FRAME_RAW_BYTES_MAX, DiskId
from tests.simulation.campaigns import draw_campaign
from tests.simulation.control import ConfigurationServer, LedgerPoint
from tests.simulation.disk import SimulatedDisk, Workload
from tests.simulation.faults import AWAY, SWITCH, draw_script, heal_everything, play
from tests.simulation.healing import Healing
from tests.simulation.hosts import PROCESS_SERVERS, AgentHost, Host, ProcessServerHost
from tests.simulation.invariants import Invariants
from tests.simulation.logs import capture_logs
from tests.simulation.loop import SimulationStuck, StepLimitExceeded, VirtualTimeLoop
from tests.simulation.network import Network
from tests.simulation.recovering import recover_everything
from tests.simulation.script import Script, Swarm
from tests.simulation.secrecy import check_secrecy
from tests.simulation.store import StoreContents
from tests.simulation.trace import Trace
from tests.simulation.vault import SimulatedVault, make_vault

DISK_BLOCKS_MAX: Final = 32
DISK_BLOCK_BYTES: Final = 65536
HORIZON_SECONDS: Final = (15.0, 30.0, 60.0)
FLOOD_PROBABILITY: Final = 0.12
FLOOD: Final = Workload(
    pause_seconds=1.0,
    writes_per_burst_max=12,
    write_gap_seconds=0.001,
    write_bytes_max=262144,
    zero_share=0.0,
    random_share=1.0,
)
"""Fills the cache while the store is away."""
STOP_SECONDS_MAX: Final = 120.0
STOP_AGAIN_SECONDS: Final = 5.0
TRACEBACK_FRAMES_MAX: Final = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One broken promise: which invariant, what exactly, and at which virtual second."""

    seed: int
    invariant: str
    detail: str
    at_seconds: float


@dataclass(slots=True, kw_only=True)
class RunResult:
    """What one seed gave."""

    seed: int
    trace: str
    events: int
    steps: int
    virtual_seconds: float
    points_recovered: int
    swarm: Swarm
    script: Script
    faults: dict[str, int] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)


class World:
    """Everything of one run. Other modules reach each other through it."""

    def __init__(self, seed: int, script: Script | None = None, *, readable: bool = False) -> None:
        """script: what goes wrong, drawn from the seed if None."""
        self.seed = seed
        self.loop = VirtualTimeLoop(seed=seed)
        self.trace = Trace(self.loop, readable=readable)
        self.violations: list[Violation] = []
        self.fault_counts: Counter[str] = Counter()
        self.points_recovered = 0
        self.vault: SimulatedVault = make_vault()
        keys = self._stream("keys")
        self._signing_keys = [Ed25519PrivateKey.from_private_bytes(keys.randbytes(32)) for _ in PROCESS_SERVERS]
        self._draw_sizes(self._stream("sizes"))
        is_flood = self.workload is FLOOD
        self.swarm, drawn = draw_script(
            seed,
            self._stream("faults"),
            horizon_seconds=self.horizon_seconds,
            is_flood=is_flood,
            campaign=draw_campaign(self._stream("campaign"), horizon_seconds=self.horizon_seconds, is_flood=is_flood),
        )
        self.script = drawn if script is None else script
        self.network = Network(self.loop, self._stream("network"))
        self.store = StoreContents(self.loop, self._stream("store"))
        self.server = ConfigurationServer(
            self.loop,
            self._stream("server"),
            vault=self.vault.vault,
            authority=self.vault.authority,
            process_server_keys=[key.public_key().public_bytes_raw() for key in self._signing_keys],
            copy_interval_seconds=self.copy_interval_seconds,
        )
        self.invariants = Invariants(self)
        self.shown_rpo: set[DiskId] = set()
        """Disks whose recovery point objective is known, as of the newest look."""
        self.agent: AgentHost
        self.process_servers: list[ProcessServerHost] = []
        self._watch()
        capture_logs(
            on_line=self.trace.remark if readable else None,
            on_defect=lambda event, error: self.violate("defect", f"logged as {event!r}: {error!r}", error),
        )

    def _stream(self, name: str) -> random.Random:
        return random.Random(f"{self.seed} {name}")

    def _draw_sizes(self, draw: random.Random) -> None:
        is_flood = draw.random() < FLOOD_PROBABILITY
        self.workload = FLOOD if is_flood else _draw_workload(draw)
        self.copy_interval_seconds = draw.choice((1.0, 3.0, 6.0))
        self.horizon_seconds = max(HORIZON_SECONDS) if is_flood else draw.choice(HORIZON_SECONDS)
        self.agent_limits = AgentLimits(
            change_set_raw_bytes=draw.choice((2, 8, 16)) * DISK_BLOCK_BYTES,
            frame_buffers=draw.choice((2, 4)),
            reconnect_seconds_max=4.0,
            progress_seconds_max=20.0,
            heartbeat_seconds=2.0,
            compress_at_agent=draw.random() < 0.3,
        )
        cache_file_bytes = draw.choice((2, 3)) * FRAME_RAW_BYTES_MAX
        self.process_server_limits = ProcessServerLimits(
            cache_bytes_max=(4 if is_flood else draw.choice((4, 4, 8))) * cache_file_bytes,
            cache_file_bytes=cache_file_bytes,
            segment_stored_bytes_due=draw.choice((64, 256, 1024)) * 1024,
            segment_age_seconds_max=draw.choice((0.2, 1.0, 5.0)),
            uploads_per_disk_max=draw.choice((1, 2, 4)),
            received_bytes_in_memory_max=draw.choice((2, 4)) * FRAME_RAW_BYTES_MAX,
            upload_bytes_in_memory_max=8 * FRAME_RAW_BYTES_MAX,
            upload_pause_seconds_max=5.0,
            idle_seconds_max=draw.choice((6, 15)),
            report_seconds=2.0,
            stop_seconds_max=10.0,
        )
        self.disks = [
            SimulatedDisk(
                self.loop,
                self._stream(f"disk {number}"),
                path=f"/dev/simulated{number}",
                serial=f"SIMULATED-{number}",
                size_bytes=draw.randrange(4, DISK_BLOCKS_MAX) * DISK_BLOCK_BYTES,
            )
            for number in range(draw.choice((1, 1, 2)))
        ]

    def _watch(self) -> None:
        def created(name: str) -> None:
            self.trace.event("object", name, len(self.store.objects[name]))
            self.invariants.object_created(name)

        self.store.on_create = created
        self.store.on_delete = self.invariants.deleted
        self.store.on_fault = lambda kind, name: self.trace.event(kind, name)
        self.server.on_point = self.invariants.point_stated
        self.server.on_rpo = self._rpo_shown
        for disk in self.disks:
            disk.on_write = lambda version, offset, length: self.trace.event("write", version, offset, length)

    def _rpo_shown(self, point: LedgerPoint, rpo: Rpo) -> None:
        self.invariants.rpo_shown(point, rpo)
        disk = point.committed.disk
        self.shown_rpo = self.shown_rpo | {disk} if rpo.age_seconds is not None else self.shown_rpo - {disk}

    @property
    def hosts(self) -> list[Host]:
        return [self.agent, *self.process_servers]

    @property
    def owner(self) -> ProcessServerHost:
        """The process server that the machine is assigned to."""
        return next(host for host in self.process_servers if host.member is self.server.owner)

    def disk_of(self, disk: DiskId) -> SimulatedDisk:
        path = self.server.disks[disk].path
        return next(simulated for simulated in self.disks if simulated.path == path)

    def later(self, seconds: float, action: Callable[[], Any]) -> None:
        self.loop.call_later(seconds, action)

    def note_fault(self, kind: str) -> None:
        self.fault_counts[kind] += 1
        self.trace.event("fault", kind)

    def violate(self, invariant: str, detail: str, cause: BaseException | None = None) -> None:
        if cause is not None:
            detail += "\n" + "".join(traceback.format_exception(cause, chain=False, limit=-TRACEBACK_FRAMES_MAX))
        violation = Violation(seed=self.seed, invariant=invariant, detail=detail, at_seconds=round(self.loop.time(), 6))
        self.violations.append(violation)
        self.trace.event("VIOLATION", invariant, detail)

    async def run(self) -> None:
        self.store.put(self.vault.name, self.vault.vault_json)
        self.trace.event("swarm", *self.swarm.weights, self.swarm.pause_seconds)
        self._make_hosts()
        healing = Healing(self)
        async with asyncio.TaskGroup() as group:
            # why: a second process server that nobody is ever assigned to would only cost time
            is_switched = any(decision.kind == SWITCH for decision in self.script.decisions)
            hosts = [host for host in self.hosts if is_switched or host is not self.process_servers[-1]]
            tasks = [(host, group.create_task(host.keep_running())) for host in hosts]
            sources = [group.create_task(disk.run_workload(self.workload)) for disk in self.disks]
            faults = group.create_task(play(self, self.script))
            await asyncio.sleep(self.horizon_seconds)
            for task in (faults, *sources):
                task.cancel()
            await asyncio.sleep(0)
            heal_everything(self)
            self.trace.event("healed")
            await healing.drain()
            for decision in self.script.decisions:
                if decision.kind == AWAY and not self.violations:
                    await healing.go_without_configuration_server(decision)
                    await healing.drain()
            for host, task in tasks:
                await self._stop(host, task)
        check_secrecy(self)
        await recover_everything(self, self.script)

    def _make_hosts(self) -> None:
        self.agent = AgentHost(self, self._stream("agent"))
        self.process_servers = [
            ProcessServerHost(self, self._stream(name), name=name, member=member, signing_key=key)
            for name, member, key in zip(PROCESS_SERVERS, self.server.process_servers, self._signing_keys, strict=True)
        ]

    async def _stop(self, host: Host, task: asyncio.Task[None]) -> None:
        """The orderly end of a program, which must come to its end."""
        host.is_last_run = True
        deadline = self.loop.time() + STOP_SECONDS_MAX
        while not task.done() and self.loop.time() < deadline:
            host.stop_orderly()
            # why: a program that has only just been started may not be there to be stopped yet
            await asyncio.wait([task], timeout=STOP_AGAIN_SECONDS)
        if not task.done():
            self.violate("13-stops-in-order", f"{host.name} does not stop within {STOP_SECONDS_MAX} s")
            host.kill()
            task.cancel()


def _draw_workload(draw: random.Random) -> Workload:
    return Workload(
        pause_seconds=draw.choice((0.5, 2.0, 8.0)),
        writes_per_burst_max=draw.choice((1, 4, 20)),
        write_gap_seconds=draw.choice((0.001, 0.02, 0.2)),
        write_bytes_max=draw.choice((4096, 65536, 262144)),
        zero_share=draw.choice((0.0, 0.2, 0.6)),
        random_share=draw.choice((0.1, 0.5, 1.0)),
    )


def run_seed(seed: int, script: Script | None = None, *, readable: bool = False) -> RunResult:
    """Runs one seed to its end, with its own script or another. Never raises: whatever goes wrong is a violation."""
    world = World(seed, script, readable=readable)
    # why: a collection in the middle would run finalizers at an instant that the seed does not determine
    gc.disable()
    try:
        world.loop.run_until_complete(world.run())
    except (SimulationStuck, StepLimitExceeded) as error:
        world.violate("progress", str(error))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        world.violate("crash", repr(error), error)
    finally:
        for failure in world.loop.failures:
            world.violate("unhandled", failure)
        result = RunResult(
            seed=seed,
            trace=world.trace.digest(),
            events=world.trace.events,
            steps=world.loop.steps,
            virtual_seconds=world.loop.time(),
            points_recovered=world.points_recovered,
            swarm=world.swarm,
            script=world.script,
            faults=dict(world.fault_counts),
            violations=world.violations,
        )
        world.loop.close()
        gc.enable()
    return result
