"""A site with an agent that follows one busy file system, for whoever freezes it; and judges of what is recovered."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.vocabulary import DiskId
from tests.live.block_devices import bpf_file_system, loop_device, mounted, run
from tests.live.canary import Canary, busy, read_counts
from tests.live.test_whole_line import protect
from tests.live.tracked import MIB
from tests.scenarios.site import Agent, Site

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
        """It is sound, as fault_of_image() judges."""
        image = self.site.root / f"{point}.img"
        self.site.recover(self.disk, point, image)
        fault = fault_of_image(image, self.kind, before=before, after=after)
        assert not fault, fault
        image.unlink()

    @contextmanager
    def recovered(self, point: str) -> Iterator[Path]:
        """The recovered file system, mounted."""
        image = self.site.root / f"{point}.img"
        self.site.recover(self.disk, point, image)
        with attached(image) as device, mounted(device, self.site.root / "copy", *ON_A_COPY.get(self.kind, ())) as copy:
            yield copy
        image.unlink()


def fault_of_image(image: Path, kind: str, *, before: int, after: int) -> str:
    """What is wrong with a copy of a busy file system of that kind; empty if nothing is.

    Its journal can be replayed, it is clean then, and its counters are of one instant between the two acknowledgements.
    """
    place = image.with_suffix(".mnt")
    with attached(image) as device:
        try:
            with mounted(device, place, *ON_A_COPY.get(kind, ())):
                fault = read_counts(place).fault(acknowledged_before=before, acknowledged_after=after)
        except (AssertionError, OSError) as error:
            return f"it does not mount, or its files cannot be read: {error}"
        finally:
            place.rmdir()
        checked = subprocess.run([*CHECKS[kind], device], capture_output=True, text=True, check=False)
    return fault or ("" if checked.returncode == 0 else f"{checked.stdout}\n{checked.stderr}")


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
