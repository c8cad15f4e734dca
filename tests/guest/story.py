"""The package in the guest, step by step: installed, a data disk protected, changed, restarted, recovered outside,
uninstalled.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Final

from recovery.verification import images_are_identical
from tests.guest.guest_image import GuestImage
from tests.guest.qemu_guest import GuestFailed
from tests.guest.site import GuestSite, now_ns
from tests.guest.stage import FROZEN_SECONDS_MAX, PACKAGE, SETTINGS, UNIT, Stage

DATA_SERIAL: Final = "farpoint-data"
DATA_DISK: Final = f"/dev/disk/by-id/virtio-{DATA_SERIAL}"
DATA_DISK_BYTES: Final = 160 * 2**20
DATA_FILES: Final = "/usr/lib/python3.11"
EXPOSURE_MAX: Final = 3.0
WATCHDOG_SECONDS: Final = 10
SECONDS_MAX: Final = {
    "install again": 300,
    "service": 300,
    "watchdog": 300,
    "first point": 600,
    "change": 300,
    "freeze point": 600,
    "reboot": 700,
    "point after reboot": 600,
    "refused calls": 120,
    "purge": 600,
    "recover": 120,
}

LIST_FILES: Final = r"""
find / -xdev -not -path '*/tmp/systemd-private-*' -printf '%y %m %U:%G %p -> %l\n' | sed 's/ -> $//' | sort
echo -- accounts; sort /etc/passwd /etc/group
echo -- units; systemctl list-unit-files --no-pager --no-legend | grep -i farpoint || true
echo -- pins; find /sys/fs/bpf -mindepth 1 -path '*farpoint*'
echo -- processes; ps -eo user,args | grep -i '[f]arpoint' || true
"""
KEPT: Final = re.compile(r". \d+ \d+:\d+ /(var/lib/dpkg/|var/lib/apt/|var/log/|var/cache/|var/lib/systemd/)")
"""What the package system and a running Debian keep of whatever happened. Not what a package leaves."""

WRITE_DATA: Final = """
until mount {disk} /mnt 2>/dev/null; do sleep 0.5; done  # a round of the agent holds the disk for itself
{change}
umount /mnt
blockdev --flushbufs {disk}
"""
FIRST_FILES: Final = f"cp -r {DATA_FILES} /mnt/first"
SECOND_FILES: Final = (
    f"rm -r /mnt/first/[a-e]*; cp -r {DATA_FILES}/[f-m]* /mnt/; head -c 3000000 /dev/urandom >/mnt/random"
)
THIRD_FILES: Final = "cp -r /usr/share/doc /mnt/after; rm /mnt/random"
FREEZE_POINT: Final = f"""
mkdir -p /etc/farpoint/scripts.d
printf '#!/bin/sh\\necho "$1" >>/run/farpoint/mobility-agent/told\\n' >/etc/farpoint/scripts.d/application
chmod 0755 /etc/farpoint/scripts.d/application
cp {SETTINGS} /run/kept.toml
printf '\\n[freeze]\\nseconds_max = {FROZEN_SECONDS_MAX}\\n' >>{SETTINGS}
systemctl restart {UNIT}
mount {DATA_DISK} /mnt
(while :; do date >/mnt/busy; sync --file-system /mnt; done) & writer=$!
for try in $(seq 60); do
  told=$(mobility-agent freeze-now --application -o json) && break
  echo "$told" >&2
  sleep 2
done
kill $writer
wait $writer || true
cp /run/kept.toml {SETTINGS}
rm -r /etc/farpoint/scripts.d /mnt/busy
umount /mnt
tr '\\n' ' ' </run/farpoint/mobility-agent/told >&2
systemctl restart {UNIT}
echo "$told"
"""
"""A point that the unit's own privileges allow, while the file system is written to, with a script around it."""
MOUNT_AT_BOOT: Final = f"echo '{DATA_DISK} /mnt ext4 defaults,nofail 0 2' >>/etc/fstab"
MOUNTED_AT_BOOT: Final = "findmnt /mnt; umount /mnt; sed -i '/farpoint-data/d' /etc/fstab; systemctl daemon-reload"

ASK_SERVICE: Final = f"systemctl show {UNIT}"
FREEZE: Final = f"""
mkdir -p /run/systemd/system/{UNIT}.d
printf '[Service]\\nWatchdogSec={WATCHDOG_SECONDS}s\\n' >/run/systemd/system/{UNIT}.d/watchdog.conf
systemctl daemon-reload
systemctl restart {UNIT}
before=$(systemctl show {UNIT} --property=MainPID --value)
kill -STOP $before
until now=$(systemctl show {UNIT} --property=MainPID --value)
      [ "$now" != 0 ] && [ "$now" != "$before" ] && systemctl is-active --quiet {UNIT}; do sleep 1; done
systemctl show {UNIT} --property=NRestarts --value
journalctl --unit={UNIT} --no-pager --output=cat | grep -i watchdog
rm -r /run/systemd/system/{UNIT}.d
systemctl daemon-reload
"""
REFUSED_CALLS: Final = """
journalctl --boot=all --no-pager --output=cat _TRANSPORT=kernel + _TRANSPORT=audit | grep -E 'SECCOMP|type=1326' || true
"""
AGENT: Final = ("mobility-agent", "python", "python3")
"""Its own processes, and those that it starts to freeze file systems."""
HARMLESS_REFUSALS: Final = {
    237: "mbind: numpy's OpenBLAS asks where its memory shall lie, and goes on without an answer",
    435: "clone3: refused as unknown by RestrictNamespaces= itself; the C library takes clone instead",
}
"""By the numbers that x86-64 has for them."""
PROVOKE_REFUSAL: Final = """
systemd-run --quiet --wait --pipe --property=SystemCallFilter=~chmod --property=SystemCallFilter=~fchmodat \
  --property=SystemCallErrorNumber=EPERM chmod 600 /dev/null || true
"""


class Story:
    """One run of it."""

    def __init__(self, image: GuestImage, package: Path, directory: Path) -> None:
        self.stage = Stage(
            image, package, directory, data_disks={DATA_SERIAL: DATA_DISK_BYTES}, seconds_max=SECONDS_MAX
        )
        self._data_disk = self.stage.disks[DATA_SERIAL]
        self._points: list[tuple[str, str, Path]] = []

    async def run(self) -> None:
        """Raises what Stage.play raises."""
        await self.stage.play(self._play, self._recover)

    async def _play(self, site: GuestSite) -> None:
        before = await self.stage.in_guest(LIST_FILES, "boot")
        async with self.stage.step("install"):
            await self.stage.install(site, "installed")
        async with self.stage.step("install again"):
            await self.stage.install(site, "up to date")
        async with self.stage.step("service"):
            await self._look_at_service()
        async with self.stage.step("watchdog"):
            await self._freeze()
        async with self.stage.step("first point"):
            await self.stage.in_guest(f"mkfs.ext4 -q {DATA_DISK}", "first point")
            await self._write(FIRST_FILES, "first point")
            await self.stage.in_guest(f"mobility-agent protect {DATA_DISK}", "first point")
            await self._keep_point(site, "first point")
        async with self.stage.step("change"):
            await self._write(SECOND_FILES, "change")
            await self._keep_point(site, "change")
        async with self.stage.step("freeze point"):
            await self._look_at_a_freeze()
        async with self.stage.step("reboot"):
            await self.stage.in_guest(MOUNT_AT_BOOT, "reboot")
            await self.stage.guest.restart()
            await self.stage.in_guest(MOUNTED_AT_BOOT, "reboot")
        async with self.stage.step("point after reboot"):
            await self._write(THIRD_FILES, "point after reboot")
            await self._keep_point(site, "point after reboot")
        async with self.stage.step("refused calls"):
            await self._look_for_refused_calls()
        async with self.stage.step("purge"):
            await self._purge(before)

    async def _look_at_service(self) -> None:
        """It runs, as its unit says, under this systemd."""
        told = await self.stage.in_guest(ASK_SERVICE, "service")
        shown = dict(line.partition("=")[::2] for line in told.splitlines())
        wanted = {
            "ActiveState": "active",
            "SubState": "running",
            "UnitFileState": "enabled",
            "NRestarts": "0",
            "Type": "notify",
            "WatchdogUSec": "1min",
        }
        wrong = {key: shown.get(key) for key, value in wanted.items() if shown.get(key) != value}
        if wrong:
            raise GuestFailed(f"the service is not as it should be: {wrong}")
        if said := (await self.stage.in_guest(f"systemd-analyze verify --man=no {UNIT} 2>&1", "service")).strip():
            raise GuestFailed(f"systemd finds fault with the unit: {said}")
        told = await self.stage.in_guest(f"systemd-analyze security --no-pager {UNIT}", "service")
        found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
        if not found or float(found[1]) > EXPOSURE_MAX:
            raise GuestFailed(f"the service is exposed: {told[-200:]}")
        self.stage.figures["exposure"] = float(found[1])

    async def _freeze(self) -> None:
        """A program that does not turn any more is killed and started again."""
        told = await self.stage.in_guest(FREEZE, "watchdog")
        self.stage.tell(f"  {told.strip().splitlines()[-1]}")

    async def _look_at_a_freeze(self) -> None:
        """It gives an application-consistent point, and nothing stays frozen."""
        told = json.loads(await self.stage.in_guest(FREEZE_POINT, "freeze point"))
        self.stage.figures["freeze"] = told
        if told["result"] != "application" or told["reason"]:
            raise GuestFailed(f"no application-consistent point: {told}")

    async def _write(self, change: str, step: str) -> None:
        """Changes the data disk while it is mounted; unmounted and written out on return."""
        await self.stage.in_guest(WRITE_DATA.format(disk=DATA_DISK, change=change), step)

    async def _keep_point(self, site: GuestSite, name: str) -> None:
        """Waits for a recovery point of what is on the disk now; keeps a copy of the raw disk beside it."""
        copy = self.stage.directory / f"{name.replace(' ', '-')}.source.img"
        await asyncio.to_thread(shutil.copyfile, self._data_disk, copy)
        try:
            point = await site.point_after(now_ns())
        except BaseException:
            self.stage.tell(f"  {await site.state()}")
            raise
        (status,) = json.loads(await self.stage.in_guest("mobility-agent status -o json", name))
        if status["source"] != "bitmap":
            raise GuestFailed(f"the disk's writes are not tracked, but {status['source']}: {status}")
        if status["resyncs"]:
            raise GuestFailed(f"everything was compared, although the guest was restarted cleanly: {status['resyncs']}")
        self.stage.figures["source"] = status["source"]
        self._points.append((name, point.point, copy))
        self.stage.figures["disk"] = point.disk

    async def _look_for_refused_calls(self) -> None:
        """The unit's filter refused the agent nothing that it needs; and a refusal would have been seen."""
        refused = refused_calls(await self.stage.in_guest(REFUSED_CALLS, "refused calls"))
        self.stage.figures["refused_calls"] = sorted(call for program, call in refused if program in AGENT)
        if unknown := set(self.stage.figures["refused_calls"]) - set(HARMLESS_REFUSALS):
            raise GuestFailed(f"system calls of the agent were refused, by their numbers: {sorted(unknown)}")
        seen = refused_calls(await self.stage.in_guest(PROVOKE_REFUSAL + REFUSED_CALLS, "refused calls"))
        if not any(program == "chmod" for program, _ in seen):
            raise GuestFailed("a refused system call leaves no trace here, so that none was seen means nothing")

    async def _purge(self, before: str) -> None:
        """Nothing is left of it: no file, account, unit or process."""
        await self.stage.in_guest(f"apt-get purge --yes {PACKAGE}", "purge")
        after = await self.stage.in_guest(LIST_FILES, "purge")
        was, now = counted(before), counted(after)
        left = [*(f"+ {line}" for line in sorted(now - was)), *(f"- {line}" for line in sorted(was - now))]
        self.stage.figures["files_compared"] = len(was)
        if left:
            raise GuestFailed("uninstalling changed more than it should:\n" + "\n".join(left[:40]))

    async def _recover(self, site: GuestSite) -> None:
        async with self.stage.step("recover"):
            await self._recover_points(site)

    async def _recover_points(self, site: GuestSite) -> None:
        """Every point, from the store and a key file alone, equals the raw disk as it was then, byte for byte."""
        if not await asyncio.to_thread(images_are_identical, self._data_disk, self._points[-1][2]):
            raise GuestFailed("the disk changed after the last point was kept: the comparison would mean nothing")
        recovered = {}
        for name, point, source in self._points:
            target = source.with_suffix(".recovered")
            await site.recover(self.stage.figures["disk"], point, target)
            recovered[name] = await asyncio.to_thread(images_are_identical, source, target)
        self.stage.figures["points"] = recovered
        if not all(recovered.values()):
            raise GuestFailed(f"not every point was recovered bit-exact: {recovered}")


def refused_calls(journal: str) -> set[tuple[str, int]]:
    """(program, number of the system call) of each line about one."""
    return {(found[1], int(found[2])) for found in re.finditer(r'comm="([^"]+)".* syscall=(\d+)', journal)}


def counted(listing: str) -> set[str]:
    """The lines of a listing that must be the same before and after."""
    return {line for line in listing.splitlines() if not KEPT.match(line)}
