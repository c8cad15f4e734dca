"""Proofs that nobody writes to a disk while it is read: a read lease on an image file, exclusive use of a block device.

A proof that was broken once stays broken, and lets the writer in at once. Where none can be had, what is read is fuzzy.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import threading
from typing import Final

from mobility_agent.errors import NotProvedStill

PROBE_BYTES: Final = 4096
SHARED_FILE_SYSTEMS: Final = ("fuse", "virtiofs", "ocfs2")
"""Types (and beginnings of them) whose files others may write from elsewhere, and whose leases hold only on this
machine. Network file systems proper refuse leases, or ask their server."""
_READ: Final = (2,)
"""Sectors read, in the kernel's block device statistics."""
_WRITTEN: Final = (4, 6, 11, 13)
"""Writes and discards completed, and their sectors, which are counted before their issuer hears of it."""
_LEASE_REFUSALS = {
    errno.EAGAIN: "somebody has the file open for writing",
    errno.EACCES: "a lease needs the file's owner or CAP_LEASE",
    errno.EINVAL: "the file system has no leases",
    errno.ENOLCK: "the file system has no leases",
    errno.EOPNOTSUPP: "the file system has no leases",
}


class LeaseProof:
    """A read lease: the kernel makes whoever opens the file for writing, or truncates it, wait until it is given back.

    The descriptor is open for reading only and takes one proof at a time.
    """

    def __init__(self, descriptor: int) -> None:
        """Raises NotProvedStill."""
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._is_held = True
        kind = _file_system_type(os.fstat(descriptor).st_dev)
        if kind.startswith(SHARED_FILE_SYSTEMS):
            raise NotProvedStill(reason=f"a lease on {kind} does not keep writers elsewhere out")
        try:
            # why: SIGIO would end the process; SIGURG is ignored by default, and the state is polled anyway.
            fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as error:
            reason = _LEASE_REFUSALS.get(error.errno or 0, error.strerror or str(error))
            raise NotProvedStill(reason=reason) from error

    def holds(self) -> bool:
        with self._lock:
            if self._is_held and fcntl.fcntl(self._descriptor, fcntl.F_GETLEASE) != fcntl.F_RDLCK:
                self._release()
            return self._is_held

    def end(self) -> bool:
        was_still = self.holds()
        with self._lock:
            if self._is_held:
                self._release()
        return was_still

    def _release(self) -> None:
        self._is_held = False
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError as error:
            # why: EAGAIN says that the kernel has taken the lease away already.
            if error.errno != errno.EAGAIN:
                raise


def _file_system_type(device: int) -> str:
    """As the kernel names it; empty where the mount is not listed by its device (btrfs)."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for mount in _mounts():
        fields, _, kind = mount.partition(" - ")
        if fields.split()[2] == number:
            return kind.split()[0]
    return ""


def _mounts() -> list[str]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        return file.read().splitlines()


class ExclusiveProof:
    """Exclusive use of a block device (nobody can mount it meanwhile), and the kernel's own count of writes unchanged.

    The count catches those who write without mounting; what such a writer left in the page cache is flushed, and so
    counted, by the reads that would see it, for they are O_DIRECT. A kernel that does not count (queue/iostats = 0,
    some virtual devices) proves nothing: whether it does is tried, at begin and end, with a read of our own.
    """

    def __init__(self, path: str, *, device: int) -> None:
        """device: st_rdev. Raises NotProvedStill."""
        self._statistics_path = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat"
        self._lock = threading.Lock()
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            busy = "the device is mounted or in use"
            raise NotProvedStill(reason=busy if error.errno == errno.EBUSY else str(error.strerror)) from error
        self._descriptor: int | None = descriptor
        try:
            if os.fstat(descriptor).st_rdev != device:
                raise NotProvedStill(reason="the path leads to another device now")
            self._written = self._count(_WRITTEN)
            if self._written is None or not self._is_counted(descriptor):
                raise NotProvedStill(reason="the kernel does not count what is written to the device (queue/iostats)")
        except BaseException:
            os.close(descriptor)
            raise

    def holds(self) -> bool:
        with self._lock:
            if self._descriptor is not None and self._count(_WRITTEN) != self._written:
                self._release(self._descriptor)
            return self._descriptor is not None

    def end(self) -> bool:
        with self._lock:
            was_counted = self._descriptor is not None and self._is_counted(self._descriptor)
        was_still = self.holds()
        with self._lock:
            if self._descriptor is not None:
                self._release(self._descriptor)
        return was_still and was_counted

    def _release(self, descriptor: int) -> None:
        self._descriptor = None
        os.close(descriptor)

    def _is_counted(self, descriptor: int) -> bool:
        """Whether the kernel's counts move with what is done to the device: tried with a read."""
        before = self._count(_READ)
        with mmap.mmap(-1, PROBE_BYTES) as buffer:
            try:
                os.preadv(descriptor, [buffer], 0)
            except OSError:
                return False  # why: what cannot be read is not proved either; the round's own reads tell the fault
        return before is not None and self._count(_READ) != before

    def _count(self, wanted: tuple[int, ...]) -> tuple[str, ...] | None:
        """Fields of the device's statistics; None when the kernel does not tell (any more)."""
        try:
            with open(self._statistics_path, encoding="ascii") as file:
                fields = file.read().split()
        except OSError:
            return None
        return tuple(fields[index] for index in wanted if index < len(fields))
