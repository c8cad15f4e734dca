"""What is bounded and what is renewed: the cache's size, the time that a stop takes, what a resumed copy sends again,
the life of certificates.
"""

from __future__ import annotations

from pathlib import Path

from protocol.control import DiskState
from protocol.enrollment import CREDENTIALS_FILE
from runtime.exit_codes import ExitCode
from tests.scenarios.conftest import replicate_two_points
from tests.scenarios.disks import MEBIBYTE, SourceDisk
from tests.scenarios.site import Site


def occupied_bytes(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())


def test_a_full_cache_holds_the_agent_back_and_drains_when_the_store_is_there_again(tmp_path: Path) -> None:
    limit = 32 * MEBIBYTE
    settings = {"cache_bytes_max": limit, "cache_file_bytes": 4 * MEBIBYTE}
    with Site(tmp_path, process_server_settings=settings) as site:
        agent = site.agent()
        small = SourceDisk(site.root / "small.img", size_bytes=2 * MEBIBYTE, seed=50)
        large = SourceDisk(site.root / "large.img", size_bytes=96 * MEBIBYTE, seed=51)
        small_disk, disk = agent.protect(small, large)
        for one, source in ((disk, large), (small_disk, small)):
            site.wait_for_point(one, after_ns=source.changed_ns)
        away = site.store_directory.with_name("store-away")
        site.store_directory.rename(away)
        large.change(writes=1500)
        cache = site.process_directory / "cache"
        used = site.wait_until(
            "the cache fills",
            lambda: (
                site.process_endpoint.metric("farpoint_process_server_cache_bytes") > limit * 0.6
                and site.process_endpoint.metric("farpoint_process_server_cache_bytes")
            ),
        )
        assert used <= limit
        large.change()
        small.change()
        site.process_server.kill()
        assert occupied_bytes(cache) <= limit
        away.rename(site.store_directory)
        site.process_server.start()
        for one, source in ((disk, large), (small_disk, small)):
            newest = site.wait_for_point(one, after_ns=source.changed_ns)
            site.expect_recovered_equal(one, newest, source.path)
            assert agent.gauge("epoch", one) == 1
        assert occupied_bytes(cache) <= limit


def test_a_stop_while_the_store_is_away_ends_in_time_and_loses_nothing(tmp_path: Path) -> None:
    with Site(tmp_path, process_server_settings={"stop_seconds_max": 2}) as site:
        made = replicate_two_points(site)
        away = site.store_directory.with_name("store-away")
        site.store_directory.rename(away)
        committed = made.agent.gauge("committed_sequence", made.disk)
        made.source.change()
        site.wait_until(
            "change sets are acknowledged that are only in the cache",
            lambda: (
                made.agent.gauge("durable_sequence", made.disk) > committed
                and made.agent.gauge("is_settled", made.disk)
            ),
        )
        site.process_server.stop()
        site.wait_for_state(made.disk, DiskState.DISCONNECTED)
        away.rename(site.store_directory)
        site.process_server.start()
        newest = site.wait_for_point(made.disk, after_ns=made.source.changed_ns)
        assert made.agent.gauge("epoch", made.disk) == 1
        site.expect_recovered_equal(made.disk, newest, made.source.path)


def test_an_interrupted_initial_replication_goes_on_where_it_was(site: Site) -> None:
    agent = site.agent()
    source = SourceDisk(site.root / "source.img", size_bytes=192 * MEBIBYTE, seed=52)
    (disk,) = agent.protect(source)
    acknowledged = site.wait_until("the copy is on its way", lambda: agent.gauge("durable_sequence", disk))
    status = site.disk(disk)
    agent.server.stop()
    assert status is not None
    assert status.state in (DiskState.INITIAL_REPLICATION, DiskState.WAITING), f"it was over, at {acknowledged}"
    agent.server.start()
    newest = site.wait_for_point(disk, after_ns=source.changed_ns)
    sent_bytes = agent.endpoint.metric("farpoint_agent_disk_sent_bytes_total", disk=disk)
    assert sent_bytes < source.size_bytes * 2 / 3 - 4 * MEBIBYTE, "what was acknowledged is not sent again"
    site.expect_recovered_equal(disk, newest, source.path)


def test_certificates_are_renewed_while_replication_goes_on(tmp_path: Path) -> None:
    with Site(tmp_path, config_server_settings={"renew_after_seconds": 1}) as site:
        made = replicate_two_points(site)
        files = [made.agent.directory / CREDENTIALS_FILE, site.process_directory / CREDENTIALS_FILE]
        before = [path.read_bytes() for path in files]
        site.wait_until(
            "both members have new certificates",
            lambda: all(path.read_bytes() != old for path, old in zip(files, before, strict=True)),
        )
        made.source.change()
        site.wait_for_point(made.disk, after_ns=made.source.changed_ns)
        site.process_server.restart()
        made.agent.server.restart()
        made.source.change()
        newest = site.wait_for_point(made.disk, after_ns=made.source.changed_ns)
        site.expect_recovered_equal(made.disk, newest, made.source.path)
        assert not [path for path in files if path.stat().st_mode & 0o077]
        site.farpoint("disks").expect(ExitCode.OK)
