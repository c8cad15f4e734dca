"""What has to become good again, and by when: with the configuration server away, and when all faults have ended.

Virtual time only. Neither phase brings a fault of its own; what was on its way when the faults ended still arrives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy

from protocol.control import AgentReport, DiskState
from protocol.vocabulary import DiskId
from storage.frame_record import HEAD_DTYPE
from storage.object_names import SegmentName, parse
from storage.segment import TRAILER_BYTES, parse_trailer
from tests.simulation.clock import true_now_ns
from tests.simulation.disk import SimulatedDisk
from tests.simulation.faults import DAY_SECONDS, DAYS_AWAY_MAX

if TYPE_CHECKING:
    from tests.simulation.script import Decision
    from tests.simulation.world import World

LIVENESS_SECONDS_MAX: Final = 300.0
"""So long after the end of all faults everything is as if there had been none."""
CHECK_SECONDS: Final = 1.0
SHORT_OFF_SECONDS: Final = 5.0
NEWEST_OBJECTS: Final = 8
WITHOUT: Final = "14-without-the-configuration-server"
DRAINS: Final = "13-backlog-drains"


class Healing:
    """Watches what the programs report, and waits."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._reports: dict[DiskId, tuple[DiskState, bool, int]] = {}
        """By disk: state, is settled, backlog bytes."""
        world.server.on_agent_report = self._take_report

    def _take_report(self, report: AgentReport) -> None:
        for disk in report.disks:
            self._reports[disk.disk] = (disk.state, disk.is_settled, disk.backlog_bytes)

    async def go_without_configuration_server(self, decision: Decision) -> None:
        """It is away for days; all hosts are off for most of that, start again without it, and again, some with an
        empty cache. What the source writes then has to get into the store, and to become a point there.
        """
        world = self._world
        if any(host.state.has_latent_errors for host in world.process_servers):
            # why: who has lost what it kept for this, and cannot ask for it, cannot go on
            return
        if world.server.has_moved_disks:
            # why: an old owner may have closed an epoch and told nobody; only the server can grant around that, and how
            # the real one will is not decided
            return
        world.note_fault(decision.kind)
        world.server.is_down = True
        if decision.draw % 2:
            world.owner.lose_cache()
        for seconds in (decision.share * DAYS_AWAY_MAX * DAY_SECONDS, SHORT_OFF_SECONDS):
            for host in world.hosts:
                if host.is_running:
                    host.switch_off(seconds)
            await asyncio.sleep(seconds)
        await self._write_last()
        written_ns = true_now_ns(world.loop)
        await self._wait(WITHOUT, lambda: [disk.path for disk in world.disks if not self._has_stored(disk, written_ns)])
        world.server.heal()

    async def _write_last(self) -> None:
        """One more write to every disk: a point of it is a fresh one."""
        for disk in self._world.disks:
            await disk.write(0, disk.draw.randbytes(512))

    async def drain(self) -> None:
        """Faults are over. Raises nothing; what is not good by the deadline is a violation."""
        await self._write_last()
        await self._wait(DRAINS, self._unfinished)

    async def _wait(self, invariant: str, unfinished: Callable[[], list[str]]) -> None:
        deadline = self._world.loop.time() + LIVENESS_SECONDS_MAX
        while (left := unfinished()) and self._world.loop.time() < deadline:
            await asyncio.sleep(CHECK_SECONDS)
        if left:
            self._world.violate(invariant, f"after {LIVENESS_SECONDS_MAX} s still: {', '.join(left)}")
        self._world.trace.event("drained", invariant, not left)

    def _unfinished(self) -> list[str]:
        """What is not yet as it should be: a fresh point, delta replication, an empty backlog, a known RPO."""
        left = []
        for disk in self._world.disks:
            known = [record.disk for record in self._world.server.disks.values() if record.path == disk.path]
            if not known:
                left.append(f"{disk.path} is not registered")
                continue
            state, is_settled, backlog_bytes = self._reports.get(known[0], (None, False, 0))
            if not self._has_fresh_point(known[0], disk):
                left.append(f"{disk.path} has no fresh point")
            elif state is not DiskState.DELTA_REPLICATION or not is_settled or backlog_bytes:
                name = state.value if state else None
                left.append(f"{disk.path} is in {name}, settled {is_settled}, backlog {backlog_bytes} bytes")
            elif known[0] not in self._world.shown_rpo and not self._world.server.clock.is_in_doubt():
                left.append(f"{disk.path} has an unknown recovery point objective")
        return left

    def _has_fresh_point(self, known: DiskId, disk: SimulatedDisk) -> bool:
        last_write_ns = disk.history.instant_ns_of(disk.history.version)
        began_ns = next((ns for ns in disk.round_begins_ns if ns > last_write_ns), None)
        marked_ns = self._world.invariants.stream.marked_ns
        return began_ns is not None and any(
            point.committed.disk == known and marked_ns[point.committed.point] > began_ns
            for point in self._world.server.ledger.values()
        )

    def _has_stored(self, disk: SimulatedDisk, written_ns: int) -> bool:
        """Whether the store holds a point that was marked in a round which began after that instant."""
        began_ns = next((ns for ns in disk.round_begins_ns if ns > written_ns), None)
        if began_ns is None:
            return False
        marked_ns = self._world.invariants.stream.marked_ns
        fresh = {bytes.fromhex(point) for point, at_ns in marked_ns.items() if at_ns > began_ns}
        known = next(record.disk for record in self._world.server.disks.values() if record.path == disk.path)
        return any(fresh & self._points_in(name) for name in self._newest_objects(known))

    def _newest_objects(self, disk: DiskId) -> list[str]:
        names = [
            text
            for text in self._world.store.sorted_names
            if isinstance(name := parse(text), SegmentName) and name.disk == disk
        ]
        return names[-NEWEST_OBJECTS:]

    def _points_in(self, name: str) -> set[bytes]:
        data = self._world.store.objects[name]
        trailer = parse_trailer(data[-TRAILER_BYTES:], name=name, object_bytes=len(data))
        heads = numpy.frombuffer(data, dtype=HEAD_DTYPE, count=trailer.frame_count, offset=trailer.index_offset)
        return {bytes(point) for point in heads["point"].tolist()}
