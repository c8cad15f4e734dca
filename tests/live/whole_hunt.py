"""Hunts through the whole system: a disk is protected while it is written to in every way, its agent is killed again
and again, and at the end what is recovered from the store must be the disk, byte for byte.
"""

from __future__ import annotations

import random
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from mobility_agent.tracking.bitmap import LEAK_SECONDS
from protocol.vocabulary import DiskId
from tests.live.block_devices import bpf_file_system, mounted, run
from tests.live.hunt import KINDS, WRITERS, Found, device_of
from tests.live.test_whole_line import protect
from tests.live.writers import fio_writing, writing
from tests.scenarios.site import Site

WHOLE_KINDS: Final = ("ext4", "raw", "btrfs", "raw-partition", "xfs", "ext4-partition")
KILLS: Final = 4
SETTLING_SECONDS: Final = LEAK_SECONDS + 120
"""A write whose end the kernel told nobody of keeps all rounds from settling for LEAK_SECONDS: this happens here."""
LIFE_SECONDS_MAX: Final = 1.5
"""An agent that has begun to replicate is killed within this time."""


def hunt_whole_line_once(seed: int, found: Found) -> None:
    draw, name = random.Random(seed), WHOLE_KINDS[seed % len(WHOLE_KINDS)]
    kind = KINDS[name]
    with ExitStack() as stack:
        at = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="farpoint-live-")))
        pins = stack.enter_context(bpf_file_system(at / "bpf"))
        device, used = stack.enter_context(device_of(kind, at))
        site = stack.enter_context(Site(at))
        site.agent_settings = {"tracking": "bitmap", "tracking_directory": pins}
        agent = site.agent()
        with ExitStack() as busy:
            place = busy.enter_context(mounted(used, at / "mnt", *kind.mount_options)) if kind.file_system else used
            disk = protect(site, agent, device)
            busy.enter_context(fio_writing(place, seed, at=at))
            for number in range(WRITERS):
                busy.enter_context(writing("files" if kind.file_system else "raw", place, seed * WRITERS + number))
            for _ in range(KILLS):
                site.wait_until("it replicates", lambda: agent.gauge("rounds_total", disk) >= 1)
                time.sleep(draw.uniform(0, LIFE_SECONDS_MAX))
                agent.server.kill()
                agent.server.start()
                found.agents_killed += 1
        for path in {used, device}:
            subprocess.run(["sync", str(path)], capture_output=True, check=False)
            run("sync", path)
        newest = _point_after(site, disk, time.time_ns())
        found.rounds += 1
        found.rounds_by_kind[f"whole {name}"] = found.rounds_by_kind.get(f"whole {name}", 0) + 1
        found.points_checked += 1
        try:
            site.expect_recovered_equal(disk, newest, device)
        except AssertionError as error:
            found.lost += 1
            found.losses.append(f"whole {name} seed {seed}: {error}")
        agent.command("unprotect", device, "--keep")
        site.wait_until("it is released", lambda: not agent.disk_at(device))
        if list(pins.glob("*/disks/*")):
            found.lost += 1
            found.losses.append(f"whole {name} seed {seed}: pins were left behind")


def _point_after(site: Site, disk: DiskId, instant_ns: int) -> str:
    def found() -> str | None:
        return next((point.point for point in site.points(disk) if point.instant_ns >= instant_ns), None)

    return site.wait_until(f"disk {disk} has a point of {instant_ns} or later", found, seconds=SETTLING_SECONDS)
