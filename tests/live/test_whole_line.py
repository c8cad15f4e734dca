"""Live disks through the whole system: a busy file system is protected while mounted, and what is recovered is it."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from protocol.vocabulary import DiskId
from runtime.exit_codes import ExitCode
from tests.live.block_devices import bpf_file_system, loop_device, mounted, run
from tests.live.tracked import MIB
from tests.live.writers import writing
from tests.scenarios.site import Agent, Site

SIZE_BYTES = 64 * MIB


def protect(site: Site, agent: Agent, device: Path) -> DiskId:
    agent.command("protect", device).expect(ExitCode.OK)

    def registered() -> str | None:
        found: str | None = agent.disk_at(device).get("disk")
        return found

    return DiskId(site.wait_until(f"{device} is registered", registered))


def test_a_busy_mounted_file_system_is_recovered_bit_by_bit(tmp_path: Path) -> None:
    with (
        bpf_file_system(tmp_path / "bpf") as pins,
        loop_device(tmp_path / "disk.img", size_bytes=SIZE_BYTES) as device,
        Site(tmp_path) as site,
    ):
        site.agent_settings = {"tracking": "bitmap", "tracking_directory": pins}
        run("mkfs.ext4", "-q", "-F", device)
        agent = site.agent()
        with mounted(device, tmp_path / "mnt", "-o", "discard") as place:
            disk = protect(site, agent, device)
            with writing("files", place, seed=1):
                site.wait_until("some rounds", lambda: agent.gauge("rounds_total", disk) >= 5)
                agent.server.kill()
                agent.server.start()
                site.wait_until("some more rounds", lambda: agent.gauge("rounds_total", disk) >= 5)
            os.sync()
            quiet = site.wait_for_point(disk, after_ns=time.time_ns())
            expect_sound_file_system(site, disk, quiet)
            row: dict[str, Any] = agent.disk_at(device)
            assert (row["source"], row["source_reason"], row["resyncs"]) == ("bitmap", "", {})
            assert row["settled_rounds"] > 0
            assert agent.gauge("epoch", disk) == 1, "the restart lost nothing, and compared nothing"
        newest = site.wait_for_point(disk, after_ns=time.time_ns())
        site.expect_recovered_equal(disk, newest, device)
        agent.command("unprotect", device, "--keep").expect(ExitCode.OK)
        site.wait_until("it is released", lambda: not agent.disk_at(device))
        assert not list(pins.glob("*/disks/*")), "nothing of its tracking stays"


def expect_sound_file_system(site: Site, disk: DiskId, point: str) -> None:
    """A crash-consistent image: the journal is replayed, and then nothing is wrong."""
    image = site.root / f"{point}.img"
    site.recover(disk, point, image)
    subprocess.run(["e2fsck", "-E", "journal_only", "-y", str(image)], capture_output=True, check=False)
    checked = subprocess.run(["e2fsck", "-f", "-n", str(image)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    image.unlink()


def test_an_agent_whose_own_state_is_on_the_disk_still_gets_points(tmp_path: Path) -> None:
    """Every round of it writes to the disk that it reads."""
    with (
        bpf_file_system(tmp_path / "bpf") as pins,
        loop_device(tmp_path / "disk.img", size_bytes=SIZE_BYTES) as device,
        Site(tmp_path) as site,
    ):
        site.agent_settings = {"tracking": "bitmap", "tracking_directory": pins}
        run("mkfs.ext4", "-q", "-F", device)
        with mounted(device, tmp_path / "mnt") as place:
            (place / "state").mkdir()
            (tmp_path / "agent").symlink_to(place / "state")
            agent = site.agent()
            disk = protect(site, agent, device)
            site.wait_for_point(disk, after_ns=0)
            (place / "file").write_bytes(os.urandom(MIB))
            os.sync()
            point = site.wait_for_point(disk, after_ns=time.time_ns())
            expect_sound_file_system(site, disk, point)
            agent.server.stop()
            del site.agents[agent.name]


@pytest.mark.parametrize("wanted", ["auto", "scan", "bitmap"])
def test_an_operator_sees_which_source_is_used_and_why(tmp_path: Path, wanted: str) -> None:
    """The place for the pins is on no BPF file system, which is all that is missing."""
    with loop_device(tmp_path / "disk.img", size_bytes=4 * MIB) as device, Site(tmp_path) as site:
        site.agent_settings = {"tracking": wanted, "tracking_directory": tmp_path / "no-bpf"}
        agent = site.agent()
        protect(site, agent, device)
        row = site.wait_until("it has begun", lambda: _begun(agent.disk_at(device)))
        if wanted == "bitmap":
            assert row["error"]["code"] == "disk-not-supported"
            assert "no-bpf" in row["error"]["detail"]
        else:
            assert row["source"] == "scan"
            assert ("no-bpf" if wanted == "auto" else "setting") in row["source_reason"]
            table = agent.command("status").expect(ExitCode.OK).stdout
            assert "scan" in table


def _begun(row: dict[str, Any]) -> dict[str, Any] | None:
    return row if row.get("points") or row.get("error") else None


def test_a_kill_while_the_map_is_drained_loses_nothing(tmp_path: Path) -> None:
    with (
        bpf_file_system(tmp_path / "bpf") as pins,
        loop_device(tmp_path / "disk.img", size_bytes=16 * MIB) as device,
        Site(tmp_path) as site,
    ):
        site.agent_settings = {"tracking": "bitmap", "tracking_directory": pins}
        agent = site.agent()
        disk = protect(site, agent, device)
        site.wait_for_point(disk, after_ns=0)
        with writing("raw", device, seed=3):
            for _ in range(6):
                rounds = agent.gauge("rounds_total", disk)
                site.wait_until("a round", lambda before=rounds: agent.gauge("rounds_total", disk) > before)
                agent.server.kill()
                agent.server.start()
        run("sync")
        newest = site.wait_for_point(disk, after_ns=time.time_ns())
        site.expect_recovered_equal(disk, newest, device)
