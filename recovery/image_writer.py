"""Writes a recovered disk to a raw file or a block device. Blocking calls, safe from several threads at once.

A file appears under its name only when it is whole and durable: until then it is `NAME.partial`, which nobody's file is
overwritten by or for, and which is removed again on failure. A device is opened exclusively, so that nothing mounted or
otherwise held is ever written.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn, Protocol, Self

from recovery.errors import (
    DeviceHalfWritten,
    DeviceNotConfirmed,
    TargetExists,
    TargetFault,
    TargetFull,
    TargetInUse,
    TargetMissing,
    TargetNotPermitted,
    TargetTooSmall,
    TargetUnfinished,
)
from runtime.local_directory import DIRECT_ALIGNMENT_BYTES, synchronize_directory, write_fully

PARTIAL_SUFFIX: Final = ".partial"
HOLE_BYTES: Final = 65536
"""A run of zeroes over a whole block of this size is left a hole."""
DIRECT_BYTES_MIN: Final = 2**17
"""Smaller pieces go through the page cache, which gathers them."""
STAGING_BYTES: Final = 2**20

_BLOCK_ZERO_OUT: Final = 0x127F
"""BLKZEROOUT of linux/fs.h: two 64-bit numbers, first byte and length."""
_ZEROES: Final = bytearray(HOLE_BYTES)


class ImageTarget(Protocol):
    """Where a disk goes. A context: left without `finish`, it leaves nothing that looks like a recovered disk."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def prepare(self, holes: Iterable[tuple[int, int]], *, data_bytes: int) -> None:
        """Makes all holes (half-open byte ranges) read as zeroes. data_bytes: how much will be written.

        Raises TargetFull if that cannot fit.
        """
        ...

    def write(self, offset_bytes: int, data: memoryview) -> None:
        """Not durable before finish. Raises TargetFull, TargetFault."""
        ...

    def finish(self) -> None:
        """On return the disk is whole and durable under its name. Raises TargetExists if somebody took the name."""
        ...


def open_target(path: Path | str, *, size_bytes: int, overwrite_device: bool) -> ImageTarget:
    """A file that does not exist yet, or a block device of at least size_bytes that nobody uses. Changes nothing yet.

    Raises TargetFault: TargetExists, TargetMissing, TargetUnfinished, TargetInUse, TargetTooSmall, DeviceNotConfirmed,
    TargetNotPermitted.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.lexists(path):
            raise TargetExists(path=path) from None
        return _FileTarget(path, size_bytes)
    except OSError as error:
        _translate(error, path)
    if not stat.S_ISBLK(mode):
        raise TargetExists(path=path)
    if not overwrite_device:
        raise DeviceNotConfirmed(path=path)
    return _DeviceTarget(path, size_bytes)


class _Writer:
    """What file and device share: writing a piece, past the page cache where that pays."""

    def __init__(self, path: Path, buffered: int, direct: int | None, needed_bytes: int) -> None:
        self._path = path
        self._buffered = buffered
        self._direct = direct
        self._needed_bytes = needed_bytes
        self._staging = threading.local()

    @property
    def descriptor(self) -> int:
        return self._buffered

    def write(self, offset_bytes: int, data: memoryview) -> None:
        try:
            if self._direct is not None and len(data) >= DIRECT_BYTES_MIN:
                self._write_direct(self._direct, offset_bytes, data)
            else:
                write_fully(self._buffered, offset_bytes, [data])
        except OSError as error:
            _translate(error, self._path, needed_bytes=self._needed_bytes)

    def _write_direct(self, direct: int, offset_bytes: int, data: memoryview) -> None:
        """The whole blocks directly, the ragged ends buffered: the two never touch the same block."""
        first = -offset_bytes % DIRECT_ALIGNMENT_BYTES
        end = first + (len(data) - first) // DIRECT_ALIGNMENT_BYTES * DIRECT_ALIGNMENT_BYTES
        staging = self._staging_buffer()
        for start in range(first, end, STAGING_BYTES):
            count = min(STAGING_BYTES, end - start)
            staging[:count] = data[start : start + count]
            write_fully(direct, offset_bytes + start, [staging[:count]])
        write_fully(self._buffered, offset_bytes, [data[:first]])
        write_fully(self._buffered, offset_bytes + end, [data[end:]])

    def _staging_buffer(self) -> memoryview:
        buffer: memoryview | None = getattr(self._staging, "buffer", None)
        if buffer is None:
            buffer = self._staging.buffer = memoryview(mmap.mmap(-1, STAGING_BYTES))
        return buffer

    def synchronize(self) -> None:
        try:
            os.fsync(self._buffered)
        except OSError as error:
            _translate(error, self._path, needed_bytes=self._needed_bytes)

    def close(self) -> None:
        os.close(self._buffered)
        if self._direct is not None:
            os.close(self._direct)


class _FileTarget:
    """A sparse raw file."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        self._size_bytes = size_bytes
        self._writer: _Writer | None = None
        self._is_finished = False

    def __enter__(self) -> Self:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(self._partial, flags, 0o600)
        except FileExistsError as error:
            raise TargetUnfinished(path=self._partial) from error
        except OSError as error:
            _translate(error, self._path)
        try:
            os.ftruncate(descriptor, self._size_bytes)
            direct = _open_direct(self._partial)
        except OSError as error:
            os.close(descriptor)
            os.unlink(self._partial)
            if error.errno == errno.EFBIG:
                reason = f"its file system takes no file of {self._size_bytes} bytes"
                raise TargetFault(path=self._path, reason=reason) from error
            _translate(error, self._path)
        self._writer = _Writer(self._path, descriptor, direct, self._size_bytes)
        return self

    def prepare(self, holes: Iterable[tuple[int, int]], *, data_bytes: int) -> None:
        status = os.statvfs(self._partial)
        if status.f_bavail * status.f_frsize < data_bytes:
            raise TargetFull(path=self._path, needed_bytes=data_bytes)

    def write(self, offset_bytes: int, data: memoryview) -> None:
        assert self._writer is not None
        for first, end in _runs_of_data(offset_bytes, data):
            self._writer.write(offset_bytes + first, data[first:end])

    def finish(self) -> None:
        assert self._writer is not None
        self._writer.synchronize()
        _rename_without_overwriting(self._partial, self._path)
        self._is_finished = True
        synchronize_directory(self._path.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
            if not self._is_finished:
                os.unlink(self._partial)


class _DeviceTarget:
    """A whole block device or partition, overwritten from its first byte."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._writer: _Writer | None = None
        self._is_begun = False
        self._is_finished = False
        reason = _use_of(path)
        if reason is not None:
            raise TargetInUse(path=path, reason=reason)
        descriptor = self._open_exclusively()
        try:
            self._check_size(descriptor)
        finally:
            os.close(descriptor)

    def __enter__(self) -> Self:
        descriptor = self._open_exclusively()
        try:
            self._check_size(descriptor)
            direct = _open_direct(self._path)
        except BaseException:
            os.close(descriptor)
            raise
        self._writer = _Writer(self._path, descriptor, direct, self._size_bytes)
        return self

    def prepare(self, holes: Iterable[tuple[int, int]], *, data_bytes: int) -> None:
        assert self._writer is not None
        self._is_begun = True
        for first, end in holes:
            self._zero(first, end)

    def write(self, offset_bytes: int, data: memoryview) -> None:
        assert self._writer is not None
        self._writer.write(offset_bytes, data)

    def finish(self) -> None:
        assert self._writer is not None
        self._writer.synchronize()
        self._is_finished = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
            if self._is_begun and not self._is_finished and isinstance(error, Exception):
                raise DeviceHalfWritten(path=self._path, reason=str(error)) from error

    def _open_exclusively(self) -> int:
        try:
            # why: without O_CREAT, O_EXCL on a block device means: fail if anybody has mounted or claimed it
            return os.open(self._path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise TargetInUse(path=self._path, reason="the kernel holds it") from error
            _translate(error, self._path)

    def _check_size(self, descriptor: int) -> None:
        size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
        if size_bytes < self._size_bytes:
            raise TargetTooSmall(path=self._path, size_bytes=size_bytes, needed_bytes=self._size_bytes)

    def _zero(self, first: int, end: int) -> None:
        """The kernel zeroes whole blocks, by the device's own command where it has one; the ragged ends are written."""
        assert self._writer is not None
        whole_first = min(end, -(-first // DIRECT_ALIGNMENT_BYTES) * DIRECT_ALIGNMENT_BYTES)
        whole_end = max(whole_first, end // DIRECT_ALIGNMENT_BYTES * DIRECT_ALIGNMENT_BYTES)
        for ragged_first, ragged_end in ((first, whole_first), (whole_end, end)):
            self._writer.write(ragged_first, memoryview(_ZEROES)[: ragged_end - ragged_first])
        if whole_first < whole_end:
            request = struct.pack("QQ", whole_first, whole_end - whole_first)
            try:
                fcntl.ioctl(self._writer.descriptor, _BLOCK_ZERO_OUT, request)
            except OSError as error:
                _translate(error, self._path)


def _runs_of_data(offset_bytes: int, data: memoryview) -> Iterator[tuple[int, int]]:
    """The half-open ranges of `data` outside those blocks of the disk that are all zeroes."""
    begun: int | None = None
    place = 0
    while place < len(data):
        count = min(HOLE_BYTES - (offset_bytes + place) % HOLE_BYTES, len(data) - place)
        if count == HOLE_BYTES and _ZEROES == data[place : place + count]:  # noqa: SIM300 - faster so
            if begun is not None:
                yield begun, place
            begun = None
        elif begun is None:
            begun = place
        place += count
    if begun is not None:
        yield begun, len(data)


def _open_direct(path: Path) -> int | None:
    """A descriptor with O_DIRECT, None where the file system has no such thing."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


def _rename_without_overwriting(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path, follow_symlinks=False)
    except FileExistsError as error:
        raise TargetExists(path=path) from error
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            _translate(error, path)
        # why: FAT and some network file systems have no links; there is no better test than this one
        if os.path.lexists(path):
            raise TargetExists(path=path) from error
        os.rename(partial, path)
    else:
        os.unlink(partial)


def _use_of(path: Path) -> str | None:
    """Who uses the device or a partition of it; None if nobody is known to."""
    number = os.stat(path).st_rdev
    entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    parts = {f"{os.major(number)}:{os.minor(number)}": entry}
    if entry.is_dir():
        parts |= {(part.parent / "dev").read_text().strip(): part.parent for part in entry.glob("*/partition")}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        if fields[2] in parts:
            return f"{fields[2]} is mounted at {fields[4]}"
    for part in parts.values():
        holders = sorted(holder.name for holder in (part / "holders").glob("*"))
        if holders:
            return f"held by {', '.join(holders)}"
    for line in Path("/proc/swaps").read_text().splitlines()[1:]:
        swap = line.split(" ")[0]
        if os.path.exists(swap) and os.stat(swap).st_rdev == number:
            return "it is swap space"
    return None


def _translate(error: OSError, path: Path, *, needed_bytes: int = 0) -> NoReturn:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise TargetFull(path=path, needed_bytes=needed_bytes) from error
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        raise TargetNotPermitted(path=path, reason=error.strerror) from error
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        raise TargetMissing(path=path, reason=f"there is no directory {path.parent}") from error
    raise TargetFault(path=path, reason=error.strerror) from error
