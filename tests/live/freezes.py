"""Freeze points in numbers: of busy file systems, of a PostgreSQL under load, and a control that freezes nothing."""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from typing_extensions import Buffer

from mobility_agent.disk_reader import LocalDisk
from mobility_agent.tracking.change_source import Promise
from tests.live.block_devices import bpf_file_system, loop_device, mounted, run
from tests.live.canary import Canary, busy
from tests.live.frozen_site import SIZE_BYTES, FrozenSite, fault_of_image, frozen_site
from tests.live.postgresql_server import USER, PostgresqlServer, fault_of_copy, load, need_postgresql
from tests.live.tracked import TrackedDisk
from tests.scenarios.processes import wait_until

SCRIPTS = Path(__file__).parents[2] / "deploy" / "scripts.d"
CONTROL_ROUNDS_MAX = 20
STRIDE_BYTES = 8 * 2**20
MORE_COUNTS = 3
"""The two counters are never more than one apart."""
POINT_SECONDS_MAX = 150.0
"""Where the kernel did not tell a completion, which it does not here now and then, no round settles for a while."""


@dataclass(slots=True, kw_only=True)
class FoundPoints:
    """What recovered points showed."""

    points: int = 0
    """Recovered and judged."""
    frozen_seconds: list[float] = field(default_factory=list)
    """Of each freeze."""
    lesser: list[str] = field(default_factory=list)
    """Freezes that honestly gave less than was wanted: a busy machine, or a completion that its kernel did not tell."""
    faults: list[str] = field(default_factory=list)
    """What was wrong with points."""
    _newest: tuple[int, float] = field(default_factory=lambda: (0, time.monotonic()))
    """How many there were, and since when."""

    def may_go_on(self) -> bool:
        """Whether the newest point is not too long ago."""
        if self.points != self._newest[0]:
            self._newest = self.points, time.monotonic()
        return time.monotonic() - self._newest[1] < POINT_SECONDS_MAX

    def record(self) -> dict[str, Any]:
        """For the last line of output; times in seconds."""
        return {
            "points": self.points,
            "frozen_seconds_median": round(statistics.median(self.frozen_seconds or [0.0]), 4),
            "frozen_seconds_longest": round(max(self.frozen_seconds, default=0.0), 4),
            "lesser": self.lesser,
            "faults": self.faults,
        }

    def take(self, record: dict[str, Any], frozen: FrozenSite) -> bool:
        """Whether the freeze gave what was wanted."""
        self.frozen_seconds.append(record["frozen_seconds"])
        if record["result"] != record["wanted"]:
            (row,) = frozen.agent.command("status", "-o", "json").json
            self.lesser.append(f"{frozen.kind}: {record}, error: {row['error']}")
            return False
        return True


def hunt_points(rounds: int) -> tuple[dict[str, Any], bool]:
    """A third as many points of file systems as rounds, a tenth as many of a PostgreSQL, and the control; and whether
    all is well."""
    points = FoundPoints()
    wanted = {kind: (rounds // 3 + place) // len(SIZE_BYTES) for place, kind in enumerate(reversed(SIZE_BYTES))}
    controls = {}
    with TemporaryDirectory(prefix="farpoint-points-") as root:
        for kind in SIZE_BYTES:
            for name in (f"{kind}-points", f"{kind}-control"):
                Path(root, name).mkdir()
            if wanted[kind]:
                file_system_points(kind, Path(root, f"{kind}-points"), points, points=wanted[kind])
                controls[kind] = control(kind, Path(root, f"{kind}-control"))
    postgresql = FoundPoints()  # now: it looks at how long ago its newest point was
    if rounds // 10:
        postgresql_points(postgresql, points=rounds // 10)
    is_well = points.points == sum(wanted.values()) and postgresql.points == rounds // 10
    is_caught = all(
        each.unsettled_in_round and (kind == "btrfs" or each.damaged_in_round) for kind, each in controls.items()
    )
    told = {
        "freeze_points": points.record(),
        "postgresql_points": postgresql.record(),
        "unfrozen_control": {kind: dataclasses.asdict(each) for kind, each in controls.items()},
    }
    return told, is_well and is_caught and not points.faults and not postgresql.faults


def file_system_points(kind: str, root: Path, found: FoundPoints, *, points: int) -> None:
    """Points of a busy file system, each recovered and looked into."""
    with frozen_site(root, kind) as frozen:
        wanted = found.points + points
        while found.points < wanted and found.may_go_on():
            known, before = frozen.known(), frozen.canary.acknowledged
            record = frozen.freeze()
            after = frozen.canary.acknowledged
            if not found.take(record, frozen):
                continue
            image = root / "point.img"
            frozen.site.recover(frozen.disk, frozen.point("file_system", known), image)
            fault = fault_of_image(image, kind, before=before, after=after)
            image.unlink()
            found.points += 1
            found.faults += [f"{kind}: {fault}"] if fault else []
        frozen.site.wait_until("it goes on", lambda: frozen.canary.acknowledged > after)


def wait_now_and_then(disk: LocalDisk, canary: Canary) -> None:
    """The next round reads on only when more has been written, at each stride of the disk: what lies in different ones
    is of different times."""
    waited: set[int] = set()

    def read(offset_bytes: int, buffer: Buffer) -> None:
        stride = offset_bytes // STRIDE_BYTES
        if stride not in waited:
            waited.add(stride)
            wanted = canary.acknowledged + MORE_COUNTS
            wait_until("more is written", lambda: canary.acknowledged >= wanted, seconds=60, servers=[])
        LocalDisk.read_into(disk, offset_bytes, buffer)

    disk.read_into = read  # type: ignore[method-assign]
    disk._parallel_reads = lambda: None  # type: ignore[method-assign]


@dataclass(slots=True, kw_only=True)
class Control:
    """The first rounds in which a copy that nobody froze was told to be unsettled, and was damaged; 0: none was."""

    unsettled_in_round: int = 0
    damaged_in_round: int = 0


def control(kind: str, root: Path) -> Control:
    """Copies of a busy file system that nobody freezes. Those of ext4 and XFS are damaged, and the judges of points
    have to find it; btrfs, which never writes in place, is often sound by chance."""
    found = Control()
    with (
        bpf_file_system(root / "bpf") as pins,
        loop_device(root / "disk.img", size_bytes=SIZE_BYTES[kind], is_direct=True) as device,
    ):
        run(f"mkfs.{kind}", "-q", device)
        tracked = TrackedDisk(device, root / "state", pins)
        try:
            tracked.round_or_resync()
            with mounted(device, root / "mnt") as place, busy(place, root / "ledger", seed=7) as canary:
                for number in range(1, CONTROL_ROUNDS_MAX + 1):
                    followed = tracked.source._tracked
                    followed.layout.mark_all(followed.pending)
                    before = canary.acknowledged
                    wait_now_and_then(tracked.disk, canary)
                    told = tracked.round_or_resync()
                    (root / "point.img").write_bytes(tracked.copy)
                    fault = fault_of_image(root / "point.img", kind, before=before, after=canary.acknowledged)
                    assert not (fault and told.end.promise is Promise.COPY_IN_VALIDATED), fault
                    if told.end.promise is Promise.COPY_IN_FUZZY:
                        found.unsettled_in_round = found.unsettled_in_round or number
                    if fault:
                        found.damaged_in_round = number
                    if found.unsettled_in_round and (fault or kind == "btrfs"):
                        break
        finally:
            tracked.close()
    return found


def postgresql_points(found: FoundPoints, *, points: int) -> None:
    """Application-consistent points of a server under load, each recovered, started and looked into."""
    need_postgresql()
    with TemporaryDirectory(prefix="farpoint-") as root:
        os.chmod(root, 0o755)
        _postgresql_points(Path(root), found, points=points)


def _postgresql_points(root: Path, found: FoundPoints, *, points: int) -> None:
    scripts = root / "scripts.d"
    scripts.mkdir()
    sockets = root / "sockets"
    sockets.mkdir()
    shutil.chown(sockets, USER)
    settings = {"freeze.scripts_directory": scripts, "freeze.script_seconds_max": 60}
    with frozen_site(root, settings=settings) as frozen:
        server = PostgresqlServer(frozen.place / "cluster", sockets)
        wrapper = scripts / "50-postgresql"
        exports = "".join(f"export {name}='{value}'\n" for name, value in server.environment.items())
        wrapper.write_text(f'#!/bin/sh\n{exports}exec {SCRIPTS / "postgresql"} "$@"\n')
        wrapper.chmod(0o755)
        server.make()
        with server.running(), load(server, clients=3) as clients:
            while found.points < points and found.may_go_on():
                known, before = frozen.known(), {client.number: client.acknowledged for client in clients}
                record = frozen.freeze("--application")
                after = {client.number: client.acknowledged for client in clients}
                if not found.take(record, frozen):
                    continue
                with frozen.recovered(frozen.point("application", known)) as copy:
                    fault = fault_of_copy(copy / "cluster", sockets, before=before, after=after)
                found.points += 1
                found.faults += [fault] if fault else []
