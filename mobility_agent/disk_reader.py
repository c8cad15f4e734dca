"""Reads one local disk: a block device past the page cache, or an image file with its holes.

Invariant: what is read comes from the disk that was identified when it was opened; check() notices when the path has
come to lead elsewhere, or the size has changed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from typing import Final, get_args

import numpy
import structlog
from typing_extensions import Buffer

from mobility_agent.disk_identity import SectorBytes, check_same_disk, identify_block_device, identify_image_file
from mobility_agent.errors import (
    DiskFault,
    DiskNotSupported,
    DiskPermissionDenied,
    DiskReplaced,
    DiskResized,
    DiskUnreadable,
    DiskVanished,
)
from mobility_agent.parallel_reads import ParallelReads, Places
from mobility_agent.ports import SourceDisk, StillnessProof
from mobility_agent.tracking.stillness import ExclusiveProof, LeaseProof
from protocol.control import DiskIdentity
from protocol.vocabulary import DISK_SIZE_BYTES_MAX

IMAGE_SECTOR_BYTES: Final[SectorBytes] = 512
_BLKGETSIZE64: Final = 0x80081272
_BLKSSZGET: Final = 0x1268
_WRITE_AND_WAIT: Final = 7
"""SYNC_FILE_RANGE_WAIT_BEFORE | WRITE | WAIT_AFTER"""
_library = ctypes.CDLL(None)
_GONE: Final = (errno.ENXIO, errno.ENODEV, errno.ENOENT)

log = structlog.get_logger(__name__)


class LocalDisk:
    """A block device or image file of this machine, open for reading. Implements SourceDisk."""

    def __init__(self, path: str, *, expected: DiskIdentity | None) -> None:
        """Raises a DiskFault."""
        self.path = path
        self._descriptor, self._is_block = _open(path)
        self._parallel: ParallelReads | None = None
        self._is_one_by_one = False
        try:
            status = os.fstat(self._descriptor)
            self._device, self._place = status.st_rdev, (status.st_dev, status.st_ino)
            self._size_bytes = self._measure()
            self._sector_bytes = self._sector()
            if not 1 <= self._size_bytes <= DISK_SIZE_BYTES_MAX:
                raise DiskNotSupported(path=path, reason=f"its size is {self._size_bytes} bytes")
            self._identity = self._identify()
            if expected is not None:
                check_same_disk(path, expected, self._identity)
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def sector_bytes(self) -> int:
        return self._sector_bytes

    @property
    def identity(self) -> DiskIdentity:
        return self._identity

    @property
    def device(self) -> int | None:
        """st_rdev of a block device; None for a file."""
        return self._device if self._is_block else None

    def check(self) -> None:
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise DiskVanished(path=self.path, reason=error.strerror) from error
        if (status.st_rdev if self._is_block else (status.st_dev, status.st_ino)) != (
            self._device if self._is_block else self._place
        ):
            raise DiskReplaced(path=self.path, expected="the disk that was opened", found="another one at its path")
        found_bytes = self._measure()
        if found_bytes != self._size_bytes:
            raise DiskResized(path=self.path, expected_bytes=self._size_bytes, found_bytes=found_bytes)

    def read_into(self, offset_bytes: int, buffer: Buffer) -> None:
        view = memoryview(buffer)
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset_bytes + done)
            except OSError as error:
                if error.errno in _GONE:
                    raise DiskVanished(path=self.path, reason=error.strerror) from error
                raise DiskUnreadable(path=self.path, offset_bytes=offset_bytes + done, reason=error.strerror) from error
            if not count:
                raise DiskResized(path=self.path, expected_bytes=self._size_bytes, found_bytes=offset_bytes + done)
            done += count

    def read_pieces(self, offsets_bytes: Places, lengths_bytes: Places, buffer: memoryview) -> None:
        """Fills the buffer with these pieces of the disk, one right behind the other; many are read at once. Of
        offsets, lengths and errors see read_into()."""
        places = numpy.cumsum(lengths_bytes) - lengths_bytes
        missing: Iterable[int] = range(len(places))
        reads = self._parallel_reads() if len(places) > 1 else None
        if reads is not None:
            address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
            missing = reads.read(offsets_bytes, lengths_bytes, address + places)
        for number in missing:  # by itself a piece that does not come says why
            at = int(places[number])
            self.read_into(int(offsets_bytes[number]), buffer[at : at + int(lengths_bytes[number])])

    def write_back(self) -> None:
        """What file systems have changed of their metadata on this block device, and not written yet, goes to it now,
        as the reads of those blocks would make it go."""
        # why: an error here is one that another's write met, and is told to them; what cannot be read, reads tell.
        _library.sync_file_range(self._descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _WRITE_AND_WAIT)

    def data_ranges(self, first_bytes: int, end_bytes: int) -> Iterator[tuple[int, int]]:
        if self._is_block:
            yield first_bytes, end_bytes
            return
        at = first_bytes
        while at < end_bytes:
            try:
                first = os.lseek(self._descriptor, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                yield at, end_bytes
                return
            if first >= end_bytes:
                return
            try:
                at = min(os.lseek(self._descriptor, first, os.SEEK_HOLE), end_bytes)
            except OSError:
                at = end_bytes  # why: it was cut short or does not read; reading it tells which
            yield first, at

    def begin_stillness(self) -> StillnessProof:
        return ExclusiveProof(self.path, device=self._device) if self._is_block else LeaseProof(self._descriptor)

    def close(self) -> None:
        parallel, self._parallel = self._parallel, None
        descriptor, self._descriptor = self._descriptor, -1
        try:
            if parallel is not None:
                parallel.close()
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _parallel_reads(self) -> ParallelReads | None:
        """None where the kernel has no more of them to give, or reads would wait for each other anyway."""
        if self._parallel is None and self._is_block and self._descriptor >= 0 and not self._is_one_by_one:
            try:
                self._parallel = ParallelReads(self._descriptor)
            except OSError as error:
                log.warning("reads go one by one", path=self.path, reason=error.strerror)
                self._is_one_by_one = True
        return self._parallel

    def _measure(self) -> int:
        if not self._is_block:
            return os.fstat(self._descriptor).st_size
        buffer = bytearray(8)
        try:
            fcntl.ioctl(self._descriptor, _BLKGETSIZE64, buffer)
        except OSError as error:
            raise DiskVanished(path=self.path, reason=error.strerror) from error
        return int.from_bytes(buffer, "little")

    def _sector(self) -> SectorBytes:
        if not self._is_block:
            return IMAGE_SECTOR_BYTES
        buffer = bytearray(4)
        fcntl.ioctl(self._descriptor, _BLKSSZGET, buffer)
        (found,) = struct.unpack("<i", buffer)
        for known in get_args(SectorBytes):
            if known == found:
                return known  # type: ignore[no-any-return]
        raise DiskNotSupported(path=self.path, reason=f"its logical sectors have {found} bytes")

    def _identify(self) -> DiskIdentity:
        # why: identification reads odd pieces; only a descriptor without O_DIRECT takes them.
        descriptor = os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:

            def read_at(offset: int, length: int) -> bytes:
                return os.pread(descriptor, length, offset)

            if self._is_block:
                return identify_block_device(
                    device=self._device,
                    size_bytes=self._size_bytes,
                    sector_bytes=self._sector_bytes,
                    read_at=read_at,
                )
            return identify_image_file(
                descriptor=descriptor,
                size_bytes=self._size_bytes,
                sector_bytes=self._sector_bytes,
                read_at=read_at,
            )
        except OSError as error:
            raise DiskUnreadable(path=self.path, offset_bytes=0, reason=error.strerror) from error
        finally:
            os.close(descriptor)


def open_local_disk(path: str, expected: DiskIdentity | None) -> SourceDisk:
    """Production's OpenSource."""
    return LocalDisk(path, expected=expected)


def identify(path: str, expected: DiskIdentity | None) -> DiskIdentity:
    """The identity of the disk at `path`. Raises a DiskFault."""
    disk = LocalDisk(path, expected=expected)
    disk.close()
    return disk.identity


def _open(path: str) -> tuple[int, bool]:
    """(descriptor, whether it is a block device). Raises a DiskFault."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISBLK(mode) and not stat.S_ISREG(mode):
            raise DiskNotSupported(path=path, reason="it is neither a block device nor a regular file")
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        if stat.S_ISBLK(mode):
            flags |= os.O_DIRECT
        return os.open(path, flags), stat.S_ISBLK(mode)
    except OSError as error:
        raise _translate(path, error) from error


def _translate(path: str, error: OSError) -> DiskFault:
    if error.errno in (*_GONE, errno.ENOTDIR, errno.ENOMEDIUM):
        return DiskVanished(path=path, reason=error.strerror)
    if error.errno in (errno.EACCES, errno.EPERM):
        return DiskPermissionDenied(path=path)
    return DiskNotSupported(path=path, reason=error.strerror)
