"""Freeze points through the whole system: a busy machine is frozen for a moment, and what is recovered is of one
instant, labelled as what it is."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from protocol.vocabulary import DiskId
from runtime.exit_codes import ExitCode
from tests.live.block_devices import bpf_file_system, loop_device, mounted, run
from tests.live.freezes import FoundPoints, control, file_system_points, postgresql_points
from tests.live.frozen_site import OFF, frozen_site
from tests.live.test_whole_line import protect
from tests.live.tracked import MIB
from tests.scenarios.site import Site


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_busy_file_system_is_recovered_clean_from_freeze_points(tmp_path: Path, kind: str) -> None:
    found = FoundPoints()
    file_system_points(kind, tmp_path, found, points=2)
    assert found.faults == []
    assert found.points == 2, found.lesser


def test_a_copy_that_nobody_froze_is_told_to_be_unsettled_and_is(tmp_path: Path) -> None:
    found = control("ext4", tmp_path)
    assert found.unsettled_in_round
    assert found.damaged_in_round


def test_a_busy_postgresql_is_recovered_from_application_consistent_points() -> None:
    found = FoundPoints()
    postgresql_points(found, points=2)
    assert found.faults == []
    assert found.points == 2, found.lesser


@pytest.mark.parametrize(("status", "result"), [(0, "application"), (1, "file_system")])
def test_a_point_is_application_consistent_only_if_every_script_succeeded(
    tmp_path: Path, status: int, result: str
) -> None:
    scripts = tmp_path / "scripts.d"
    scripts.mkdir()
    script = scripts / "application"
    script.write_text(
        f'#!/bin/sh\necho "$1 $FARPOINT_MOUNT_POINTS" >>{tmp_path}/ran\ntest "$1" = thaw || exit {status}\n'
    )
    script.chmod(0o755)
    with frozen_site(tmp_path, settings={"freeze.scripts_directory": scripts}) as frozen:
        known = frozen.known()
        record = frozen.freeze("--application")
        assert record["result"] == result
        assert bool(record["reason"]) is bool(status)
        assert frozen.point(result, known)
        assert (tmp_path / "ran").read_text().split() == ["freeze", str(frozen.place), "thaw", str(frozen.place)]


def test_a_machine_whose_disks_get_no_points_is_frozen_by_itself(tmp_path: Path) -> None:
    """Also where the agent's own state lies on what is frozen."""
    orders = OFF | {"freeze_interval_seconds": 1.0, "copy_interval_seconds": 0.1}
    with frozen_site(tmp_path, orders=orders) as frozen:
        agent = frozen.agent
        agent.server.stop()
        shutil.move(agent.directory, frozen.place / "state")
        agent.directory.symlink_to(frozen.place / "state")
        agent.server.start()
        known, before = frozen.known(), frozen.canary.acknowledged
        point = frozen.point("file_system", known)
        frozen.expect_sound(point, before=before, after=frozen.canary.acknowledged)
        assert agent.endpoint.metric("farpoint_agent_freezes_total", result="file_system") >= 1
        assert 0 < agent.endpoint.metric("farpoint_agent_frozen_longest_seconds") < 20
        agent.server.stop()
        del frozen.site.agents[agent.name]


def test_a_freeze_that_does_not_last_until_the_disk_is_marked_makes_no_file_system_point(tmp_path: Path) -> None:
    """Whatever is labelled so nevertheless is sound."""
    with frozen_site(tmp_path, settings={"freeze.seconds_max": 0.05}) as frozen:
        for _ in range(4):
            known, before = frozen.known(), frozen.canary.acknowledged
            record = frozen.freeze()
            after = frozen.canary.acknowledged
            if record["result"] == "file_system":
                frozen.expect_sound(frozen.point("file_system", known), before=before, after=after)
            else:
                assert record["reason"]


def test_what_is_mounted_out_of_sight_makes_a_lesser_point(tmp_path: Path) -> None:
    """It was not frozen, and nobody could know; the other disk's point is what it is."""
    with (
        bpf_file_system(tmp_path / "bpf") as pins,
        loop_device(tmp_path / "one.img", size_bytes=32 * MIB) as one,
        loop_device(tmp_path / "other.img", size_bytes=32 * MIB) as other,
        Site(tmp_path, config_server_settings=OFF) as site,
    ):
        site.agent_settings = {"tracking": "bitmap", "tracking_directory": pins, "freeze.seconds_max": 20.0}
        for device in (one, other):
            run("mkfs.ext4", "-q", "-F", device)
        with mounted(one, tmp_path / "mnt"), mounted_out_of_sight(other, tmp_path / "hidden"):
            agent = site.agent()
            disks = [protect(site, agent, device) for device in (one, other)]
            site.wait_until("both are live", lambda: all(agent.gauge("rounds_total", disk) for disk in disks))
            done = agent.command("freeze-now", "-o", "json")
            done.expect(ExitCode.PARTIAL)
            assert done.json["labels"] == dict(zip(disks, ["file_system", "crash"], strict=True))
            assert f"in use by somebody unknown: {other.name}" in done.json["reason"]

            def instants(disk: DiskId, consistency: str) -> set[int]:
                return {one.instant_ns for one in site.points(disk) if one.consistency.value == consistency}

            site.wait_until(
                "points of one instant", lambda: instants(disks[0], "file_system") & instants(disks[1], "crash")
            )


@contextmanager
def mounted_out_of_sight(device: Path, place: Path) -> Iterator[None]:
    """By a process in a mount namespace of its own."""
    place.mkdir()
    command = f"mount {device} {place} && echo mounted && read line"
    holder = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "mounted\n"
        yield
    finally:
        holder.stdin.close()
        holder.wait(60)
        holder.stdout.close()
