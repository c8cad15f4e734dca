"""The main job, with everything real: replicate, mark, change, mark again, stop everything, recover, compare."""

from __future__ import annotations

import shutil

from protocol.control import DiskState
from runtime.exit_codes import ExitCode
from tests.scenarios.disks import MEBIBYTE, SourceDisk, are_equal
from tests.scenarios.processes import run_command
from tests.scenarios.site import Site


def test_both_points_are_recovered_from_storage_and_key_file_when_every_server_has_stopped(site: Site) -> None:
    agent = site.agent()
    source = SourceDisk(site.root / "source.img", size_bytes=48 * MEBIBYTE, seed=11)
    (disk,) = agent.protect(source)
    before = site.wait_for_point(disk, after_ns=source.changed_ns)
    first_version = site.root / "source-1.img"
    shutil.copyfile(source.path, first_version)
    sent_bytes = agent.endpoint.metric("farpoint_agent_disk_sent_bytes_total")
    source.change()
    after = site.wait_for_point(disk, after_ns=source.changed_ns)
    delta_bytes = agent.endpoint.metric("farpoint_agent_disk_sent_bytes_total") - sent_bytes
    assert 0 < delta_bytes < source.size_bytes / 4, "a delta is sent, not the disk"
    site.wait_for_state(disk, DiskState.DELTA_REPLICATION)

    site.stop()
    assert "said goodbye" not in site.process_server.log
    for server in site.servers:
        assert '"level": "error"' not in server.log, server.log_tail()

    points = {row["point"]: row for row in site.stored_points(disk)}
    assert points[before]["recoverable"]
    assert points[after]["recoverable"]
    site.expect_recovered_equal(disk, before, first_version)
    site.expect_recovered_equal(disk, after, source.path)
    latest = site.root / "latest.img"
    run_command(
        *("farpoint", "recover", "--disk", disk, "--to", latest),
        *("--store", site.store_url, "--recovery-key", site.recovery_key),
    ).expect(ExitCode.OK, "newest visible point")
    assert are_equal(latest, source.path)
    at_that_time = site.root / "at-that-time.img"
    # why: ticks of the server's clock date points, so that a change within one tick has a point of the same instant
    (*_, newest_of_it) = [row["point"] for row in points.values() if row["instant"] == points[before]["instant"]]
    assert site.recover(disk, points[before]["instant"], at_that_time)["point"] == newest_of_it
    site.expect_recovered_equal(disk, newest_of_it, at_that_time)


def test_what_an_operator_sees_agrees_with_storage(site: Site) -> None:
    agent = site.agent("db-1")
    source = SourceDisk(site.root / "source.img", size_bytes=8 * MEBIBYTE, seed=12)
    (disk,) = agent.protect(source)
    point = site.wait_for_point(disk, after_ns=source.changed_ns)
    (machine,) = site.farpoint("machines", "-o", "json").expect(ExitCode.OK).json
    assert machine["disks"] == [disk]
    assert not machine["is_silent"]
    (row,) = site.farpoint("disks", "-o", "json").expect(ExitCode.OK).json
    assert (row["disk"], row["path"], row["rpo"]) == (disk, str(source.path), "ok")
    listed = {row["point"] for row in site.farpoint("points", "-o", "json").expect(ExitCode.OK).json}
    assert point in listed
    site.wait_until("the machine is described in storage", lambda: _stored_name(site, disk))
    stored = {row["point"] for row in site.stored_points(disk)}
    assert listed <= stored
    (server,) = site.farpoint("process-servers", "-o", "json").expect(ExitCode.OK).json
    assert server["disks"] == 1
    assert not server["faults"]


def _stored_name(site: Site, disk: str) -> str:
    rows = site.from_storage("disks", "-o", "json").expect(ExitCode.OK).json
    return next((row["name"] or "" for row in rows if row["disk"] == disk), "")
