"""kill -9 of everything, at instants that a seed draws: nothing acknowledged is lost, and replication converges.

KILL_SEEDS gives other seeds than the usual ones: a list such as `7,8,9`.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from protocol.vocabulary import DiskId
from tests.scenarios.disks import MEBIBYTE, SourceDisk, digest_of
from tests.scenarios.processes import Server
from tests.scenarios.site import Agent, Site

SEEDS = [int(seed) for seed in os.environ.get("KILL_SEEDS", "1,2").split(",")]
DISK_BYTES = 128 * MEBIBYTE
KILLS_DURING_INITIAL_REPLICATION = 6
KILLS_DURING_CHANGES = 5
SECONDS_BEFORE_A_KILL_MAX = 0.4
SECONDS_AWAY_MAX = 0.3
SMALL_CACHE = {"cache_file_bytes": 8 * MEBIBYTE, "cache_bytes_max": 64 * MEBIBYTE}
"""So that kills also meet the change from one cache file to the next."""


class Acknowledged:
    """The highest position that the agent was ever seen to have an acknowledgement for."""

    def __init__(self, agent: Agent, disk: DiskId) -> None:
        self._agent = agent
        self._disk = disk
        self.highest = (0, 0)

    def look(self) -> None:
        seen = (self._agent.gauge("epoch", self._disk), self._agent.gauge("durable_sequence", self._disk))
        self.highest = max(self.highest, seen)

    def is_committed(self) -> bool:
        committed = (self._agent.gauge("epoch", self._disk), self._agent.gauge("committed_sequence", self._disk))
        return committed >= self.highest


class Killer:
    """Kills one of the servers at a drawn instant, and starts it again."""

    def __init__(self, draw: random.Random, site: Site, agent: Agent, acknowledged: Acknowledged) -> None:
        self._draw = draw
        self._site = site
        self._agent = agent
        self._acknowledged = acknowledged

    def strike(self, servers: list[Server]) -> None:
        """Some time after the agent is connected, so that it meets the work and not only the way to it."""
        victim = self._draw.choice(servers)
        pause_seconds = self._draw.uniform(0, SECONDS_BEFORE_A_KILL_MAX)
        down_seconds = self._draw.uniform(0, SECONDS_AWAY_MAX)
        self._site.wait_until("the agent is connected", self._agent.endpoint.is_ready)
        time.sleep(pause_seconds)
        self._acknowledged.look()
        print(
            f"{pause_seconds:.3f} s after the agent connected, with {self._acknowledged.highest} acknowledged: "
            f"kill -9 {victim.name}, which is away for {down_seconds:.3f} s"
        )
        victim.kill()
        time.sleep(down_seconds)
        victim.start()
        self._acknowledged.look()


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_acknowledged_is_lost_when_servers_are_killed(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    with Site(tmp_path, process_server_settings=SMALL_CACHE) as site:
        agent = site.agent()
        source = SourceDisk(site.root / "source.img", size_bytes=DISK_BYTES, seed=seed)
        (disk,) = agent.protect(source)
        acknowledged = Acknowledged(agent, disk)
        killer = Killer(draw, site, agent, acknowledged)
        weighted = [site.process_server, site.process_server, agent.server, agent.server, site.config_server]
        for _ in range(KILLS_DURING_INITIAL_REPLICATION):
            killer.strike(weighted)
        first = site.wait_for_point(disk, after_ns=source.changed_ns)
        with changing(source, draw.random()):
            for _ in range(KILLS_DURING_CHANGES):
                killer.strike(weighted)
        newest = site.wait_for_point(disk, after_ns=source.changed_ns)
        site.wait_until("all that was acknowledged is committed", acknowledged.is_committed)
        site.stop()

        site.expect_recovered_equal(disk, "latest", source.path)
        points = {row["point"]: row for row in site.stored_points(disk)}
        epoch, sequence = (int(number) for number in points[newest]["position"].split(":"))
        assert (epoch, sequence) >= acknowledged.highest
        assert epoch == 1, (
            f"a new epoch means that acknowledged change sets were lost\n{site.process_server.log_tail()}"
        )
        for point in {first, *draw.sample(sorted(points), k=min(3, len(points)))}:
            expect_a_version(site, source, disk, points[point])


@contextmanager
def changing(source: SourceDisk, seed: float) -> Iterator[None]:
    """The source is written to again and again for the length of the block, with pauses in which it is still."""
    draw = random.Random(seed)
    is_over = threading.Event()

    def write() -> None:
        while not is_over.wait(draw.uniform(0.1, 1.5)):
            source.change()

    with ThreadPoolExecutor(1) as executor:
        writing = executor.submit(write)
        try:
            yield
        finally:
            is_over.set()
            writing.result()


def expect_a_version(site: Site, source: SourceDisk, disk: DiskId, row: dict[str, Any]) -> None:
    """The point is what the disk held at one time: no older than the version that was whole at its instant."""
    target = site.root / f"recovered-{row['point']}"
    site.recover(disk, str(row["point"]), target)
    at_least = max(
        (number for number, version in enumerate(source.versions) if version.since_ns <= row["instant_ns"]), default=0
    )
    digest = digest_of(target)
    target.unlink()
    fitting = [version.digest for version in source.versions[at_least:]]
    assert digest in fitting, f"point {row} is none of the versions from number {at_least} on"
