"""Freeze points through the whole system: a busy machine is frozen for a moment, and what is recovered is of one
instant, labelled as what it is."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from protocol.vocabulary import DiskId
from tests.live.block_devices import bpf_file_system, loop_device, mounted, run
from tests.live.canary import Canary, busy, read_counts
from tests.live.postgresql_server import USER, PostgresqlServer, fault_of_copy, load, need_postgresql
from tests.live.test_whole_line import protect
from tests.live.tracked import MIB
from tests.scenarios.site import Agent, Site

SCRIPTS = Path(__file__).parents[2] / "deploy" / "scripts.d"
SIZE_BYTES = {"ext4": 384 * MIB, "xfs": 320 * MIB, "btrfs": 256 * MIB}
CHECKS = {"ext4": ("e2fsck", "-f", "-n"), "xfs": ("xfs_repair", "-n"), "btrfs": ("btrfs", "check", "--readonly")}
ON_A_COPY = {"xfs": ("-o", "nouuid")}
"""Options of mounting a copy beside its original."""
OFF = {"freeze_interval_seconds": 0, "application_interval_seconds": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenSite:
    """A site with an agent that follows one busy disk."""

    site: Site
    agent: Agent
    disk: DiskId
    kind: str
    place: Path
    canary: Canary

    def freeze(self, *options: str) -> dict[str, Any]:
        """What `freeze-now` says."""
        record: dict[str, Any] = self.agent.command("freeze-now", "-o", "json", *options).json
        return record

    def point(self, consistency: str, known: set[str]) -> str:
        """A point of that consistency that was not known before."""

        def found() -> str:
            new = [one for one in self.site.points(self.disk) if one.point not in known]
            return next((one.point for one in new if one.consistency.value == consistency), "")

        return self.site.wait_until(f"a new {consistency} point", found)

    def known(self) -> set[str]:
        return {one.point for one in self.site.points(self.disk)}

    def expect_sound(self, point: str, *, before: int, after: int) -> None:
        """Its file system is clean after its journal was replayed, and its counters are of one instant between the two
        acknowledgements."""
        image = self.site.root / f"{point}.img"
        self.site.recover(self.disk, point, image)
        with attached(image) as device:
            with mounted(device, self.site.root / "copy", *ON_A_COPY.get(self.kind, ())) as copy:
                fault = read_counts(copy).fault(acknowledged_before=before, acknowledged_after=after)
            checked = subprocess.run([*CHECKS[self.kind], device], capture_output=True, text=True, check=False)
        assert not fault, fault
        assert checked.returncode == 0, f"{checked.stdout}\n{checked.stderr}"
        image.unlink()


@contextmanager
def attached(image: Path) -> Iterator[Path]:
    device = run("losetup", "--find", "--show", image)
    try:
        yield Path(device)
    finally:
        run("losetup", "--detach", device)


@contextmanager
def frozen_site(
    root: Path,
    kind: str = "ext4",
    *,
    settings: dict[str, object] | None = None,
    orders: dict[str, object] | None = None,
) -> Iterator[FrozenSite]:
    with ExitStack() as stack:
        pins = stack.enter_context(bpf_file_system(root / "bpf"))
        device = stack.enter_context(loop_device(root / "disk.img", size_bytes=SIZE_BYTES[kind], is_direct=True))
        site = stack.enter_context(Site(root, config_server_settings=orders or OFF))
        usual = {"tracking": "bitmap", "tracking_directory": pins, "freeze.seconds_max": 20.0}
        site.agent_settings = usual | (settings or {})
        run(f"mkfs.{kind}", "-q", device)
        agent = site.agent()
        place = stack.enter_context(mounted(device, root / "mnt"))
        disk = protect(site, agent, device)
        canary = stack.enter_context(busy(place, root / "ledger", seed=1))
        site.wait_until("it is followed", lambda: agent.gauge("rounds_total", disk) >= 2)
        yield FrozenSite(site=site, agent=agent, disk=disk, kind=kind, place=place, canary=canary)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_busy_file_system_is_recovered_clean_from_a_freeze_point(tmp_path: Path, kind: str) -> None:
    with frozen_site(tmp_path, kind) as frozen:
        known, before = frozen.known(), frozen.canary.acknowledged
        record = frozen.freeze()
        after = frozen.canary.acknowledged
        assert (record["result"], record["reason"]) == ("file_system", ""), record
        assert 0 < record["frozen_seconds"] < 20
        point = frozen.point("file_system", known)
        frozen.expect_sound(point, before=before, after=after)
        frozen.site.wait_until("it goes on", lambda: frozen.canary.acknowledged > after)


@dataclass(slots=True, kw_only=True)
class FoundPoints:
    """What recovered points showed."""

    points: int = 0
    faults: list[str] = field(default_factory=list)


def postgresql_points(root: Path, *, points: int) -> FoundPoints:
    """Application-consistent points of a server under load, each recovered, started and looked into."""
    need_postgresql()
    found = FoundPoints()
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
            for _ in range(points):
                known, before = frozen.known(), {client.number: client.acknowledged for client in clients}
                record = frozen.freeze("--application")
                after = {client.number: client.acknowledged for client in clients}
                if record["result"] != "application":
                    found.faults.append(f"not application-consistent: {record}")
                    continue
                with copied(frozen, frozen.point("application", known)) as copy:
                    fault = fault_of_copy(copy / "cluster", sockets, before=before, after=after)
                found.points += 1
                found.faults += [fault] if fault else []
    return found


@contextmanager
def copied(frozen: FrozenSite, point: str) -> Iterator[Path]:
    """The recovered file system, mounted."""
    image = frozen.site.root / f"{point}.img"
    frozen.site.recover(frozen.disk, point, image)
    copy_options = ON_A_COPY.get(frozen.kind, ())
    with attached(image) as device, mounted(device, frozen.site.root / "copy", *copy_options) as copy:
        yield copy
    image.unlink()


def test_a_busy_postgresql_is_recovered_from_application_consistent_points() -> None:
    with TemporaryDirectory(prefix="farpoint-") as root:
        Path(root).chmod(0o755)  # why: PostgreSQL's user has to come through
        found = postgresql_points(Path(root), points=2)
    assert found.faults == []
    assert found.points == 2
