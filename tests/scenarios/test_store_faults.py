"""The store refuses: missing, read-only, full. What was acknowledged stays in the cache, and drains when it can."""

from __future__ import annotations

from pathlib import Path

from protocol.vocabulary import DiskId
from runtime.exit_codes import ExitCode
from tests.scenarios.conftest import ReplicatedSite, replicate_two_points
from tests.scenarios.disks import MEBIBYTE, SourceDisk
from tests.scenarios.mounts import mounted, remount
from tests.scenarios.site import Site


def wait_for_fault(site: Site, *words: str) -> None:
    """The operator is told by the configuration server."""

    def told() -> bool:
        faults = " ".join(fault.detail + fault.code for one in site.process_servers() for fault in one.faults)
        return all(word in faults for word in words)

    site.wait_until(f"the process server's faults tell of {words}", told)


def wait_for_uncommitted(site: Site, made: ReplicatedSite) -> None:
    agent = made.agent
    site.wait_until(
        "change sets are acknowledged that are not committed",
        lambda: (
            agent.gauge("is_settled", made.disk)
            and agent.gauge("durable_sequence", made.disk) > agent.gauge("committed_sequence", made.disk)
        ),
    )


def expect_drained(made: ReplicatedSite, site: Site, disk: DiskId, source: SourceDisk) -> None:
    newest = site.wait_for_point(disk, after_ns=source.changed_ns)
    site.wait_until("the cache drains", lambda: made.agent.is_committed(disk))
    site.wait_until("the fault is over", lambda: not any(one.faults for one in site.process_servers()))
    assert made.agent.gauge("epoch", disk) == 1
    site.expect_recovered_equal(disk, newest, source.path)


def test_a_store_that_becomes_read_only_is_told_and_drained_into_when_it_is_writable_again(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "store", "-t", "tmpfs", "-o", "size=128m"), Site(tmp_path) as site:
        made = replicate_two_points(site)
        remount(site.store_directory, "ro")
        made.source.change()
        wait_for_uncommitted(site, made)
        wait_for_fault(site, "store-not-permitted")
        remount(site.store_directory, "rw")
        expect_drained(made, site, made.disk, made.source)


def test_a_store_that_is_full_is_told_and_drained_into_when_it_has_room_again(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "store", "-t", "tmpfs", "-o", "size=16m"), Site(tmp_path) as site:
        made = replicate_two_points(site)
        filled = SourceDisk(site.root / "filled.img", size_bytes=48 * MEBIBYTE, seed=31)
        (disk,) = made.agent.protect(filled)
        wait_for_fault(site, "store-full")
        site.wait_until("the whole disk is in the cache", lambda: made.agent.gauge("is_settled", disk))
        made.source.change()
        wait_for_uncommitted(site, made)
        remount(site.store_directory, "size=128m")
        expect_drained(made, site, disk, filled)
        expect_drained(made, site, made.disk, made.source)


def test_a_process_server_without_its_store_says_so_and_goes_on_when_it_is_there_again(site: Site) -> None:
    made = replicate_two_points(site)
    away = site.store_directory.with_name("store-away")
    site.store_directory.rename(away)
    made.source.change()
    wait_for_uncommitted(site, made)
    wait_for_fault(site, "store-missing")
    site.process_server.kill()
    site.process_server.start(wait=False)
    site.process_server.expect_end(ExitCode.NOT_FOUND)
    assert "the directory does not exist" in site.process_server.log
    assert not site.store_directory.exists(), "a store that is away must not be made anew"
    away.rename(site.store_directory)
    site.process_server.start()
    expect_drained(made, site, made.disk, made.source)


def test_nothing_is_written_into_another_directory_that_takes_the_stores_place(site: Site) -> None:
    """A mount point whose file system is gone is an empty directory: what goes there is not in the store."""
    made = replicate_two_points(site)
    away = site.store_directory.with_name("store-away")
    site.store_directory.rename(away)
    site.store_directory.mkdir()
    made.source.change()
    wait_for_uncommitted(site, made)
    wait_for_fault(site, "store-unavailable")
    site.process_server.kill()
    site.process_server.start(wait=False)
    site.process_server.expect_end(ExitCode.NOT_FOUND)
    assert "holds no vault" in site.process_server.log
    assert not list(site.store_directory.iterdir())
    site.store_directory.rmdir()
    away.rename(site.store_directory)
    site.process_server.start()
    expect_drained(made, site, made.disk, made.source)
