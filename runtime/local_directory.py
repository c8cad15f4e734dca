"""The local file system as a `DurableDirectory`: what is said to be durable on return has been synchronized, names
included.

Invariants: directories are made 0700 and files 0600; a file is replaced whole or not at all; a name beginning with a
dot is never a caller's, so an unfinished replacement is never listed. Every call blocks. An OSError passes through
unchanged.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from typing_extensions import Buffer

from runtime.directory import DurableFile

DIRECTORY_MODE: Final = 0o700
FILE_MODE: Final = 0o600
DIRECT_ALIGNMENT_BYTES: Final = 4096
BUFFERS_PER_WRITE_MAX: Final = 1024
"""IOV_MAX of Linux."""


def write_fully(descriptor: int, offset_bytes: int, buffers: Sequence[Buffer]) -> None:
    """Writes all buffers one behind the other from `offset_bytes`, without joining them. Not durable on return."""
    views = [view for view in (memoryview(buffer).cast("B") for buffer in buffers) if view.nbytes]
    first = 0
    while first < len(views):
        written = os.pwritev(descriptor, views[first : first + BUFFERS_PER_WRITE_MAX], offset_bytes)
        offset_bytes += written
        while first < len(views) and written >= views[first].nbytes:
            written -= views[first].nbytes
            first += 1
        if written:
            views[first] = views[first][written:]


def synchronize_directory(path: Path | str) -> None:
    """On return the names made, replaced and removed in the directory before the call survive power loss."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Makes a directory and its missing parents, 0700 and durable on return. No error if it is there."""
    if path.is_dir():
        return
    make_directory(path.parent)
    try:
        os.mkdir(path, DIRECTORY_MODE)
    except FileExistsError:
        if not path.is_dir():
            raise
    synchronize_directory(path.parent)


class LocalFile:
    """A `DurableFile` on the local file system."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @property
    def is_direct(self) -> bool:
        """Whether the file system granted O_DIRECT."""
        import fcntl

        return bool(fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & os.O_DIRECT)

    def size_bytes(self) -> int:
        return os.fstat(self._descriptor).st_size

    def read_into(self, offset_bytes: int, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        while done < view.nbytes:
            count = os.preadv(self._descriptor, [view[done:]], offset_bytes + done)
            done += count
            if count == 0 or offset_bytes + done >= self.size_bytes():
                break
        return done

    def write(self, offset_bytes: int, buffers: Sequence[Buffer]) -> None:
        write_fully(self._descriptor, offset_bytes, buffers)

    def truncate(self, size_bytes: int) -> None:
        os.ftruncate(self._descriptor, size_bytes)

    def synchronize(self) -> None:
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


class LocalDirectory:
    """A `DurableDirectory` at a path, which is made (with its parents) if it is missing.

    One process at a time: take `runtime.locks.exclusive_lock` first.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        make_directory(self._path)

    @property
    def path(self) -> Path:
        return self._path

    def names(self) -> list[str]:
        with os.scandir(self._path) as entries:
            return sorted(
                entry.name
                for entry in entries
                if not entry.name.startswith(".") and entry.is_file(follow_symlinks=False)
            )

    def read(self, name: str) -> bytes:
        descriptor = os.open(self._file(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with open(descriptor, "rb", buffering=0) as file:
            return file.readall()

    def replace(self, name: str, data: bytes) -> None:
        target = self._file(name)
        unfinished = self._path / f".{name}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(unfinished, flags, FILE_MODE)
        try:
            write_fully(descriptor, 0, [data])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(unfinished, target)
        synchronize_directory(self._path)

    def open(self, name: str, *, create: bool = False, preallocate_bytes: int = 0, direct: bool = False) -> DurableFile:
        path = self._file(name)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if create else 0)
        descriptor = _open_direct(path, flags) if direct else os.open(path, flags, FILE_MODE)
        try:
            if preallocate_bytes:
                _preallocate(descriptor, preallocate_bytes)
            if create:
                os.fsync(descriptor)
                synchronize_directory(self._path)
        except BaseException:
            os.close(descriptor)
            if create:
                os.unlink(path)
            raise
        return LocalFile(descriptor)

    def remove(self, name: str) -> None:
        try:
            os.unlink(self._file(name))
        except FileNotFoundError:
            return
        synchronize_directory(self._path)

    def free_bytes(self) -> int:
        status = os.statvfs(self._path)
        return status.f_bavail * status.f_frsize

    def _file(self, name: str) -> Path:
        if not name or name.startswith(".") or "/" in name or "\0" in name:
            raise ValueError(f"not a file name of a durable directory: {name!r}")
        return self._path / name


def _open_direct(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECT, FILE_MODE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    # why: a file system without O_DIRECT refuses after it has made the file, so O_EXCL would now refuse our own
    return os.open(path, flags & ~os.O_EXCL, FILE_MODE)


def _preallocate(descriptor: int, size_bytes: int) -> None:
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.posix_fallocate(descriptor, 0, size_bytes)
