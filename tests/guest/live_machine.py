"""A running machine, all of whose disks are protected while they are written to: its root disk, one below LVM, and a
device of device-mapper's. Frozen, restarted, crashed, recovered outside, and started from what was recovered.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from farpoint.demo.source_image import copy_sparse
from mobility_agent.core.resync_cause import ResyncCause
from protocol.control import DiskState
from protocol.operator_messages import DiskStatus, RecoveryPointStatus
from protocol.vocabulary import DiskId
from recovery.verification import images_are_identical
from tests.guest.guest_image import GuestImage
from tests.guest.live_machine_scripts import (
    FREEZE,
    IS_MOUNTED,
    LINEAR_BYTES,
    LINEAR_SERIAL,
    LVM_BYTES,
    LVM_SERIAL,
    MAKE_DISKS,
    PROTECT,
    QUIET,
    SEPARATOR,
    SHOW_CANARY,
    THAWED,
    WRITE,
    WRITE_ON,
    gather_linear,
    scatter_linear,
)
from tests.guest.qemu_guest import GuestFailed, QemuGuest
from tests.guest.site import GuestSite, now_ns
from tests.guest.stage import SYSTEM_SERIAL, Stage
from tests.live.canary import Counts

SECONDS_MAX: Final = {
    "protect": 600,
    "initial replication": 1800,
    "freeze point": 900,
    "reboot": 900,
    "after reboot": 1800,
    "quiet points": 900,
    "crash": 900,
    "after crash": 1800,
    "freeze point after crash": 900,
    "quiet points after crash": 900,
    "recover": 600,
    "check": 300,
    "start what was recovered": 900,
}
FILE_SYSTEM_MENDED: Final = 1
"""e2fsck(8): errors corrected; a journal that was replayed is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveDisk:
    """A protected disk of the guest. name: that of its writer, too."""

    name: str
    path: str
    restart_cause: ResyncCause | None
    """Why decision 0012 has it compared after a clean restart; None: it goes on without."""
    resent_bytes_max: int
    """A comparison sends less: what differs, and blocks of 64 KiB of which only a part was sent before. The root disk
    holds five times as much; of the others the writers may have touched much."""


DISKS: Final = (
    LiveDisk(name="root", path="/dev/vda", restart_cause=ResyncCause.IN_USE_AT_STOP, resent_bytes_max=96 * 2**20),
    LiveDisk(
        name="lvm", path="/dev/vdb", restart_cause=ResyncCause.UNWITNESSED_CONTENTS, resent_bytes_max=LVM_BYTES // 2
    ),
    LiveDisk(name="linear", path="/dev/mapper/linear", restart_cause=None, resent_bytes_max=LINEAR_BYTES // 2),
)

QUIET_DISKS: Final = ("lvm", "linear")
"""Those that can be unmounted while the machine runs."""

Statuses = Mapping[str, Mapping[str, Any]]
"""By the disk's name, what the agent's `status` says of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezePoint:
    """One instant of the whole machine. points: by the disk's name. before, after: what each disk's writer had been
    acknowledged."""

    points: Mapping[str, RecoveryPointStatus]
    before: Mapping[str, int]
    after: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuietPoint:
    """A point of a disk that nobody wrote to. source: what it held."""

    name: str
    disk: DiskId
    point: str
    source: Path


class LiveMachine:
    """One run of it."""

    def __init__(self, image: GuestImage, package: Path, directory: Path) -> None:
        data_disks = {LVM_SERIAL: LVM_BYTES, LINEAR_SERIAL: LINEAR_BYTES}
        self.stage = Stage(image, package, directory, data_disks=data_disks, seconds_max=SECONDS_MAX)
        self._disks: dict[str, DiskId] = {}
        self._frozen: list[FreezePoint] = []
        self._quiet: list[QuietPoint] = []
        self._canary = os.urandom(16).hex()

    async def run(self) -> None:
        """Raises what Stage.play raises."""
        await self.stage.play(self._play, self._recover)

    async def _play(self, site: GuestSite) -> None:
        stage = self.stage
        async with stage.step("install"):
            await stage.install(site, "installed")
        async with stage.step("protect"):
            await stage.in_guest(MAKE_DISKS + WRITE, "protect")
            began_ns = now_ns()
            await stage.in_guest(PROTECT, "protect")
        async with stage.step("initial replication"):
            before = await self._follow(site, began_ns, "initial replication")
        async with stage.step("freeze point"):
            await self._freeze(site, "freeze point")
        async with stage.step("reboot"):
            await stage.guest.restart()
            began_ns = now_ns()
            await stage.in_guest(IS_MOUNTED, "reboot")
        async with stage.step("after reboot"):
            after = await self._follow(site, began_ns, "after reboot")
            self._judge("reboot", before, after, {disk.name: disk.restart_cause for disk in DISKS})
        async with stage.step("quiet points"):
            await stage.in_guest(WRITE, "quiet points")
            await self._keep_quiet_points(site, "after reboot", "quiet points")
        async with stage.step("crash"):
            await stage.in_guest(f"mount /mnt/lvm\nmount /mnt/linear\n{WRITE}", "crash")
            before = await self._statuses("crash")
            await stage.guest.crash()
            began_ns = now_ns()
            await stage.in_guest(IS_MOUNTED, "crash")
        async with stage.step("after crash"):
            after = await self._follow(site, began_ns, "after crash")
            self._judge("crash", before, after, {disk.name: ResyncCause.NO_CLEAN_STOP for disk in DISKS})
        async with stage.step("freeze point after crash"):
            await stage.in_guest(WRITE, "freeze point after crash")
            await self._freeze(site, "freeze point after crash")
        async with stage.step("quiet points after crash"):
            await self._keep_quiet_points(site, "after crash", "quiet points after crash")

    async def _statuses(self, step: str) -> Statuses:
        rows = json.loads(await self.stage.in_guest("mobility-agent status -o json", step))
        by_path = {row["path"]: row for row in rows}
        return {disk.name: by_path[disk.path] for disk in DISKS}

    async def _follow(self, site: GuestSite, began_ns: int, step: str) -> Statuses:
        """What the agent says once all that was on the disks is in their histories, and their changes are followed."""
        while True:
            try:
                told = await site.wait_for_disks(
                    lambda disks: all(is_followed(disks.get(disk.path), since_ns=began_ns) for disk in DISKS)
                )
            except BaseException:
                self.stage.tell(f"  {await site.state()}")
                raise
            self._disks = {disk.name: told[disk.path].disk for disk in DISKS}
            statuses = await self._statuses(step)
            # why: an agent that just began replicates, too, until it knows why it has to compare
            if all(row["rounds"] for row in statuses.values()):
                return statuses

    def _judge(self, name: str, before: Statuses, after: Statuses, causes: Mapping[str, ResyncCause | None]) -> None:
        """Of a restart: every disk did what was promised, and nothing else."""
        self.stage.figures[name] = {
            disk: {key: row[key] for key in ("size_bytes", "read_bytes", "sent_bytes", "epoch", "resyncs")}
            for disk, row in after.items()
        }
        faults = {
            disk.name: fault_of_restart(
                before[disk.name], after[disk.name], causes[disk.name], resent_bytes_max=disk.resent_bytes_max
            )
            for disk in DISKS
        }
        if any(faults.values()):
            raise GuestFailed(f"{name}: {faults}")

    async def _freeze(self, site: GuestSite, step: str) -> None:
        """Of the whole machine while it is written to; a point of all its disks, and nothing stays frozen."""
        figures = self.stage.figures.setdefault("freezes", [])
        while True:
            known = {point.point for point in await site.points()}
            told = await self.stage.in_guest(FREEZE.format(canary=self._canary), step)
            before, record, after = told.split(SEPARATOR)
            found = json.loads(record)
            figures.append(found)
            # why again: on a busy machine a freeze may honestly give less, and says so
            if found["result"] == found["wanted"]:
                break
        if sorted(found["labels"]) != sorted(self._disks.values()):
            raise GuestFailed(f"not all disks took part: {found}")
        counts = counts_of(after)
        await self.stage.in_guest(THAWED + WRITE_ON.format(**counts), step)
        points = {
            name: await site.point(
                lambda point: point.point not in known and point.consistency.value == found["wanted"], disk=disk
            )
            for name, disk in self._disks.items()
        }
        if len({point.instant_ns for point in points.values()}) != 1:
            raise GuestFailed(f"the points of one freeze are not of one instant: {points}")
        self._frozen.append(FreezePoint(points=points, before=counts_of(before), after=counts))

    async def _keep_quiet_points(self, site: GuestSite, name: str, step: str) -> None:
        """Of the disks that the machine can do without: unmounted, and a copy of each kept beside its point."""
        await self.stage.in_guest(QUIET, step)
        began_ns = now_ns()
        for disk in QUIET_DISKS:
            source = self.stage.directory / f"{disk} {name}.source.img"
            await asyncio.to_thread(self._copy_source, disk, source)
            try:
                point = await site.point_after(began_ns, disk=self._disks[disk])
            except BaseException:
                self.stage.tell(f"  {await site.state()}")
                raise
            self._quiet.append(
                QuietPoint(name=f"{disk} {name}", disk=self._disks[disk], point=point.point, source=source)
            )

    def _copy_source(self, disk: str, target: Path) -> None:
        """What the guest's disk holds now."""
        if disk == "linear":
            gather_linear(self.stage.disks[LINEAR_SERIAL], target)
        else:
            copy_sparse(self.stage.disks[LVM_SERIAL], target)

    async def _recover(self, site: GuestSite) -> None:
        """All of it from the store and a key file alone."""
        async with self.stage.step("recover"):
            await self._recover_quiet_points(site)
            roots = [await self._recovered(site, frozen, "root") for frozen in self._frozen]
            others = {disk: await self._recovered(site, self._frozen[-1], disk) for disk in QUIET_DISKS}
        async with self.stage.step("check"):
            for root in roots:
                await asyncio.to_thread(check_file_system, root)
            self.stage.figures["clean_roots"] = len(roots)
        async with self.stage.step("start what was recovered"):
            await self._start_recovered(roots[-1], others)

    async def _recover_quiet_points(self, site: GuestSite) -> None:
        """Each equals the disk as it was then, byte for byte."""
        recovered = {}
        for quiet in self._quiet:
            target = quiet.source.with_suffix(".recovered")
            await site.recover(quiet.disk, quiet.point, target)
            recovered[quiet.name] = await asyncio.to_thread(images_are_identical, quiet.source, target)
        self.stage.figures["points"] = recovered
        if not all(recovered.values()):
            raise GuestFailed(f"not every point was recovered bit-exact: {recovered}")

    async def _recovered(self, site: GuestSite, frozen: FreezePoint, disk: str) -> Path:
        point = frozen.points[disk].point
        target = self.stage.directory / f"{disk} frozen {point}.recovered"
        await site.recover(self._disks[disk], point, target)
        return target

    async def _start_recovered(self, root: Path, others: Mapping[str, Path]) -> None:
        """The machine of the newest freeze point comes up with nothing failed, and holds what it had been told is
        safe."""
        directory = self.stage.directory / "recovered"
        directory.mkdir()
        linear = directory / "linear.img"
        await asyncio.to_thread(scatter_linear, others["linear"], linear)
        disks = {SYSTEM_SERIAL: root, LVM_SERIAL: others["lvm"], LINEAR_SERIAL: linear}
        # why isolated: its agent is a copy of one that may still run
        async with QemuGuest(self.stage.image, directory, disks, is_isolated=True) as guest:
            await guest.wait_until_up()
            step = "start what was recovered"
            told = await guest.run(f"set -e\n{IS_MOUNTED}{SHOW_CANARY}", step=step, seconds=SECONDS_MAX[step])
        canary, *lines = told.splitlines()[-1 - len(DISKS) :]
        found = {name: Counts(first=int(first), second=int(second)) for name, first, second in map(str.split, lines)}
        faults = faults_of_counts(self._frozen[-1], found)
        if canary != self._canary or any(faults.values()):
            raise GuestFailed(f"what was recovered is not what was there: {canary}, {faults}")
        self.stage.figures["recovered_counts"] = {name: asdict(counts) for name, counts in found.items()}


def is_followed(disk: DiskStatus | None, *, since_ns: int) -> bool:
    """Whether the agent said so since then."""
    if disk is None or disk.reported_at_ns is None or disk.reported_at_ns <= since_ns:
        return False
    return disk.state is DiskState.DELTA_REPLICATION and disk.error is None


def fault_of_restart(
    before: Mapping[str, Any], after: Mapping[str, Any], cause: ResyncCause | None, *, resent_bytes_max: int
) -> str:
    """What is wrong with a disk after a restart, which is to be compared for that cause, or not to be compared at all;
    empty if nothing is. What is counted begins with the agent."""
    if after["source"] != "bitmap" or after["error"]:
        return f"it is not followed: {after}"
    if after["resyncs"] != ({} if cause is None else {cause.value: 1}):
        return f"compared because of {after['resyncs']}"
    if cause is None:
        is_read = after["read_bytes"] >= after["size_bytes"] or after["epoch"] != before["epoch"]
        return f"all of it was read, or its epoch is a new one: {after}" if is_read else ""
    if after["epoch"] != before["epoch"] + 1:
        return f"its epoch was {before['epoch']}, and is {after['epoch']}"
    if after["read_bytes"] < after["size_bytes"]:
        return f"only {after['read_bytes']} bytes of it were read"
    if after["sent_bytes"] > resent_bytes_max:
        return f"more was sent than can differ: {after['sent_bytes']} bytes"
    return ""


def faults_of_counts(frozen: FreezePoint, found: Mapping[str, Counts]) -> dict[str, str]:
    """By the disk's name; empty where its writer's counts are of the instant of the freeze."""
    return {
        disk.name: found[disk.name].fault(
            acknowledged_before=frozen.before[disk.name], acknowledged_after=frozen.after[disk.name]
        )
        if disk.name in found
        else "its counts are not there"
        for disk in DISKS
    }


def counts_of(told: str) -> dict[str, int]:
    """What COUNT says: by the disk's name, the newest count that its writer was acknowledged."""
    pairs: Iterable[list[str]] = map(str.split, told.strip().splitlines())
    return {name: int(count) for name, count in pairs}


def check_file_system(image: Path) -> None:
    """A copy of it has nothing to mend but a journal to replay, and what was open and removed. Blocks. Raises
    GuestFailed."""
    copy = image.with_suffix(".checked")
    copy_sparse(image, copy)
    for options, allowed in (("-fp", FILE_SYSTEM_MENDED), ("-fn", 0)):
        done = subprocess.run(["e2fsck", options, str(copy)], capture_output=True, text=True, check=False)
        if done.returncode > allowed:
            raise GuestFailed(f"{image.name}: e2fsck {options}: {done.stdout}{done.stderr}")
    copy.unlink()
