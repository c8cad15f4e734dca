"""What goes on while a part of the site is away: the configuration server, the store, the cache."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from protocol.control import DiskState
from protocol.vocabulary import DiskId
from tests.scenarios.conftest import replicate_two_points
from tests.scenarios.disks import SourceDisk
from tests.scenarios.site import Agent, Site


def positions(site: Site, disk: DiskId) -> dict[str, tuple[int, int]]:
    """Of the stored points, by point."""
    return {row["point"]: position_of(row) for row in site.stored_points(disk)}


def position_of(row: dict[str, Any]) -> tuple[int, int]:
    epoch, sequence = row["position"].split(":")
    return int(epoch), int(sequence)


def wait_for_stored_point(site: Site, disk: DiskId, source: SourceDisk, known: dict[str, tuple[int, int]]) -> str:
    """A point in storage beyond all that are `known`, whose recovered disk is the source's newest version."""

    def found() -> str:
        new = sorted((position, point) for point, position in positions(site, disk).items() if point not in known)
        if not new or new[-1][0] <= max(known.values(), default=(0, 0)):
            return ""
        target = site.root / "newest.img"
        digest = site.recover(disk, new[-1][1], target)["blake3"]
        target.unlink()
        return new[-1][1] if digest == source.digest else ""

    return site.wait_until("storage holds a point of the newest version", found)


def test_replication_goes_on_over_restarts_while_the_configuration_server_is_away(site: Site) -> None:
    made = replicate_two_points(site)
    agent, source, disk = made.agent, made.source, made.disk
    site.config_server.kill()

    known = positions(site, disk)
    source.change()
    while_all_runs = wait_for_stored_point(site, disk, source, known)
    agent.server.restart()
    site.process_server.kill()
    site.process_server.start(wait=False)
    known = positions(site, disk)
    source.change()
    after_restarts = wait_for_stored_point(site, disk, source, known)
    assert not site.config_server.is_running

    site.config_server.start()
    site.wait_until(
        "the points are reported later",
        lambda: {while_all_runs, after_restarts} <= {point.point for point in site.points(disk)},
    )
    source.change()
    newest = site.wait_for_point(disk, after_ns=source.changed_ns)
    site.expect_recovered_equal(disk, newest, source.path)
    site.expect_recovered_equal(disk, "latest", source.path)


def test_replication_goes_on_into_the_cache_while_the_store_is_away(site: Site) -> None:
    made = replicate_two_points(site)
    agent, source, disk = made.agent, made.source, made.disk
    away = site.store_directory.with_name("store-away")
    site.store_directory.rename(away)
    committed = agent.gauge("committed_sequence", disk)
    source.change()
    site.wait_until(
        "change sets are acknowledged that are not committed",
        lambda: agent.gauge("durable_sequence", disk) > committed and agent.gauge("is_settled", disk),
    )
    site.wait_until(
        "the process server tells the operator of the store",
        lambda: site.process_endpoint.metric("farpoint_process_server_upload_failures_total") > 0,
    )
    assert agent.gauge("committed_sequence", disk) <= committed + 1
    assert not site.store_directory.exists(), "a store that is away must not be made anew"
    source.change()

    away.rename(site.store_directory)
    newest = site.wait_for_point(disk, after_ns=source.changed_ns)
    site.wait_until("the cache drains", lambda: agent.is_committed(disk))
    assert agent.gauge("epoch", disk) == 1
    site.expect_recovered_equal(disk, newest, source.path)


def test_a_lost_cache_costs_an_epoch_and_nothing_else(site: Site) -> None:
    made = replicate_two_points(site)
    agent, source, disk = made.agent, made.source, made.disk
    older_version = made.older
    first = site.root / "older.img"
    site.recover(disk, older_version, first)
    away = site.store_directory.with_name("store-away")
    site.store_directory.rename(away)
    committed = agent.gauge("committed_sequence", disk)
    source.change(writes=200)
    site.wait_until(
        "change sets are acknowledged that are only in the cache",
        lambda: agent.gauge("durable_sequence", disk) > committed and agent.gauge("is_settled", disk),
    )
    site.process_server.kill()
    lose_cache(site)
    away.rename(site.store_directory)
    site.process_server.start()

    newest = site.wait_for_point(disk, after_ns=source.changed_ns)
    epoch, _ = positions(site, disk)[newest]
    assert epoch == 2
    assert agent.gauge("epoch", disk) == 2
    site.wait_for_state(disk, DiskState.DELTA_REPLICATION)
    site.expect_recovered_equal(disk, newest, source.path)
    site.expect_recovered_equal(disk, older_version, first)


def test_a_cache_that_is_lost_when_all_was_committed_costs_no_point(site: Site) -> None:
    made = replicate_two_points(site)
    site.wait_until("all is committed", lambda: made.agent.is_committed(made.disk))
    site.process_server.stop()
    lose_cache(site)
    site.process_server.start()
    made.source.change()
    newest = site.wait_for_point(made.disk, after_ns=made.source.changed_ns)
    site.expect_recovered_equal(made.disk, newest, made.source.path)
    assert {made.older, made.newer} <= positions(site, made.disk).keys()


def lose_cache(site: Site) -> None:
    directory = site.process_directory / "cache"
    assert any(directory.iterdir())
    shutil.rmtree(directory)


def test_an_agent_that_lost_its_digests_compares_everything_again(site: Site) -> None:
    made = replicate_two_points(site)
    made.agent.server.kill()
    for path in kept_digests(made.agent):
        path.unlink()
    made.source.change()
    made.agent.server.start()
    newest = site.wait_for_point(made.disk, after_ns=made.source.changed_ns)
    site.expect_recovered_equal(made.disk, newest, made.source.path)


def kept_digests(agent: Agent) -> list[Path]:
    found = [path for path in agent.directory.iterdir() if "digest" in path.name]
    assert found
    return found
