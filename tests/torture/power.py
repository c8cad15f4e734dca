"""Disks whose power can be cut: file systems on direct-I/O loop devices whose backing files lie on a reflinking XFS.

A cut is a clone of the backing file at one instant: it holds what had reached the device, and nothing that was only in
the page cache. Mounting the clone is what a machine does after a power failure. Write caches inside of devices are not
modelled: what the device was given counts as written, flushed or not.
Invariant: all mounts and loop devices lie under one root, and `release` of that root undoes them, whoever made them.
"""

from __future__ import annotations

import enum
import fcntl
import itertools
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Final

BACKING_BYTES: Final = 6 * 2**30
"""Sparse and in memory; what is used of it is a few hundred megabytes."""
DISK_BYTES: Final = 512 * 2**20
SECTOR_BYTES: Final = 4096
"""XFS asks this alignment of direct I/O on reflinked files, so the device must have it from the first day on."""
RELEASE_ATTEMPTS: Final = 50
RELEASE_PAUSE_SECONDS: Final = 0.1
_FICLONE: Final = 0x40049409
"""ioctl of linux/fs.h."""


class FileSystem(enum.Enum):
    """How it is made, and with which options it is mounted."""

    EXT4 = (("mkfs.ext4", "-q", "-b", str(SECTOR_BYTES)), "rw")
    # why: somebody else's mount namespace may hold what was mounted before the cut, and a clone has its identity
    XFS = (("mkfs.xfs", "-q", "-s", f"size={SECTOR_BYTES}"), "rw,nouuid")


def run_tool(*command: object) -> str:
    """Its output. Raises CalledProcessError with what it said."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        said = f"{' '.join(map(str, command))}: {done.stderr.strip()}"
        raise subprocess.CalledProcessError(done.returncode, said, done.stdout, done.stderr)
    return done.stdout.strip()


class PowerSupply:
    """The reflinking file system that all disks of one root share; in memory, so that synchronizing it is free."""

    def __init__(self, root: Path) -> None:
        self._memory = root / "memory"
        self.directory = root / "backing"
        self._memory.mkdir()
        self.directory.mkdir()
        run_tool("mount", "-t", "tmpfs", "-o", f"size={BACKING_BYTES}", "tmpfs", self._memory)
        image = self._memory / "backing.xfs"
        with open(image, "xb") as file:
            file.truncate(BACKING_BYTES)
        device = run_tool("losetup", "--find", "--show", image)
        run_tool("mkfs.xfs", "-q", "-m", "reflink=1", device)
        run_tool("mount", "-o", "discard", device, self.directory)


class PowerDisk:
    """One file system at `path`, mounted from when it is made."""

    _numbers = itertools.count(1)

    def __init__(self, supply: PowerSupply, path: Path, file_system: FileSystem) -> None:
        self.path = path
        self.file_system = file_system
        self._directory = supply.directory
        self._image = self._new_image()
        with open(self._image, "xb") as file:
            file.truncate(DISK_BYTES)
        run_tool(*file_system.value[0], self._image)
        path.mkdir()
        self._device = self._mount()
        # why: our directories are to begin empty, as those on a root file system do
        if file_system is FileSystem.EXT4:
            (path / "lost+found").rmdir()

    def cut(self) -> Path:
        """The device's contents at this instant, as a clone. Nobody notices."""
        clone = self._new_image()
        with open(self._image, "rb") as source, open(clone, "xb") as target:
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
        return clone

    def come_back(self, clone: Path) -> None:
        """From now on the disk is what the clone holds. Nobody may have files of it open any more."""
        self.unmount()
        self._image.unlink()
        self._image = clone
        self._device = self._mount()

    def unmount(self) -> None:
        _unmount(self.path)
        run_tool("losetup", "--detach", self._device)

    def free_bytes(self) -> int:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def _new_image(self) -> Path:
        return self._directory / f"{self.path.name}-{next(self._numbers)}.img"

    def _mount(self) -> str:
        device = run_tool("losetup", "--find", "--show", "--direct-io=on", "--sector-size", SECTOR_BYTES, self._image)
        run_tool("mount", "-o", self.file_system.value[1], device, self.path)
        return device


def _unmount(path: Path) -> None:
    """A program that was killed a moment ago may still be on its way out of it."""
    for attempt in range(RELEASE_ATTEMPTS):
        try:
            run_tool("umount", path)
        except subprocess.CalledProcessError:
            if attempt + 1 == RELEASE_ATTEMPTS:
                raise
            time.sleep(RELEASE_PAUSE_SECONDS)
        else:
            return


def release(root: Path) -> None:
    """Unmounts everything under `root` and detaches the loop devices whose files lie there."""
    prefix = f"{root}/"
    listed = subprocess.run(["losetup", "--list", "--json"], check=True, capture_output=True, text=True).stdout
    # why: asked before anything is unmounted, because afterwards the paths of their files say nothing any more
    loops = [
        loop["name"]
        for loop in (json.loads(listed)["loopdevices"] if listed.strip() else [])
        if str(loop["back-file"]).startswith(prefix)
    ]
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in reversed([mount for mount in mounts if mount.startswith(prefix)]):
        subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)
    for loop in loops:
        subprocess.run(["losetup", "--detach", loop], check=False, capture_output=True)
