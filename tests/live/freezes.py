"""Freeze points in numbers: of busy file systems, of a PostgreSQL under load, and a control that freezes nothing."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mobility_agent.tracking.change_source import Promise
from tests.live.block_devices import bpf_file_system, loop_device, mounted, run
from tests.live.canary import busy
from tests.live.frozen_site import SIZE_BYTES, FrozenSite, fault_of_image, frozen_site
from tests.live.postgresql_server import USER, PostgresqlServer, fault_of_copy, load, need_postgresql
from tests.live.tracked import TrackedDisk

SCRIPTS = Path(__file__).parents[2] / "deploy" / "scripts.d"
CONTROL_ROUNDS_MAX = 40
TRIES_PER_POINT = 3


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

    def take(self, record: dict[str, Any], frozen: FrozenSite) -> bool:
        """Whether the freeze gave what was wanted."""
        self.frozen_seconds.append(record["frozen_seconds"])
        if record["result"] != record["wanted"]:
            (row,) = frozen.agent.command("status", "-o", "json").json
            self.lesser.append(f"{frozen.kind}: {record}, error: {row['error']}")
            return False
        return True


def file_system_points(kind: str, root: Path, found: FoundPoints, *, points: int) -> None:
    """Points of a busy file system, each recovered and looked into."""
    with frozen_site(root, kind) as frozen:
        wanted = found.points + points
        for _ in range(TRIES_PER_POINT * points):
            if found.points == wanted:
                break
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


def control_caught_in_round(kind: str, root: Path) -> int:
    """Copies of a busy file system that nobody freezes: the round in which one was told to be unsettled and was indeed
    damaged; 0 if none was. Whoever takes such a copy for a point has to be found by the judges of points."""
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
                    before = canary.acknowledged
                    told = tracked.round_or_resync()
                    (root / "point.img").write_bytes(tracked.copy)
                    fault = fault_of_image(root / "point.img", kind, before=before, after=canary.acknowledged)
                    assert not (fault and told.end.promise is Promise.COPY_IN_VALIDATED), fault
                    if fault:
                        return number
        finally:
            tracked.close()
    return 0


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
            for _ in range(TRIES_PER_POINT * points):
                if found.points == points:
                    break
                known, before = frozen.known(), {client.number: client.acknowledged for client in clients}
                record = frozen.freeze("--application")
                after = {client.number: client.acknowledged for client in clients}
                if not found.take(record, frozen):
                    continue
                with frozen.recovered(frozen.point("application", known)) as copy:
                    fault = fault_of_copy(copy / "cluster", sockets, before=before, after=after)
                found.points += 1
                found.faults += [fault] if fault else []
