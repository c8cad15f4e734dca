"""A directory of a local or mounted file system as an object store: one file per object, at its name.

Invariants: a file appears at an object's name only by link(2) of a finished, synchronized file, so it is whole from
its first instant and never replaces another; when create() returns, the file and every directory above it are durable.
Names that begin with a dot are the store's own and never objects; unfinished files are swept when they are an hour old.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import stat
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Final, TypeVar, TypeVarTuple
from urllib.parse import quote

import structlog
from typing_extensions import Buffer

from runtime.blocking import blocking
from runtime.local_directory import DIRECTORY_MODE, make_directory, synchronize_directory
from storage.backends.direct_writer import write_new_file
from storage.backends.object_store import ObjectInfo, check_object_name, clamp_range, is_component
from storage.errors import (
    ObjectExists,
    ObjectNotFound,
    ObjectUnreadable,
    StoreFault,
    StoreFull,
    StoreMissing,
    StoreNotPermitted,
    StoreUnavailable,
)

UNFINISHED_DIRECTORY: Final = ".unfinished"
UNFINISHED_AGE_SECONDS_MAX: Final = 3600
"""An unfinished file this old, by the file system's clock, is left over from a crash."""

LIST_BATCH: Final = 512
KNOWN_DIRECTORIES_MAX: Final = 65536

_FULL: Final = {errno.ENOSPC, errno.EDQUOT}
_NOT_PERMITTED: Final = {errno.EROFS, errno.EACCES, errno.EPERM}
_UNAVAILABLE: Final = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EMFILE, errno.ENFILE,
    errno.ENOMEM, errno.ENOENT, errno.EHOSTDOWN, errno.ENOTCONN, errno.EREMOTEIO,
}  # fmt: skip

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

log = structlog.get_logger(__name__)


class LocalDirectoryStore:
    """An `ObjectStore` in a directory that exists. Several processes may share it. Blocking calls run in `executor`."""

    def __init__(self, root: Path, *, executor: Executor | None = None, create: bool = False) -> None:
        """create: makes the directory, durably, if it is missing. Raises StoreMissing, StoreNotPermitted or a
        StoreFault.
        """
        self._root = root
        self._executor = executor
        self._durable_directories: set[str] = set()
        self._is_swept = False
        try:
            if create:
                make_directory(root)
            status = os.stat(root)
            if not stat.S_ISDIR(status.st_mode):
                raise StoreMissing(url=self.url, reason="it is not a directory")
            self._root_identity = (status.st_dev, status.st_ino)
        except OSError as error:
            raise self._fault(error) from error

    @property
    def url(self) -> str:
        return f"file://{quote(str(self._root))}"

    async def create(self, name: str, parts: Sequence[Buffer]) -> None:
        check_object_name(name)
        await self._run_to_end(self._create, name, parts)

    async def read(self, name: str, *, first_byte: int = 0, end_byte: int | None = None) -> bytes:
        check_object_name(name)
        return await self._run(self._read, name, first_byte, end_byte)

    async def info(self, name: str) -> ObjectInfo:
        check_object_name(name)
        return await self._run(self._info, name)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        start, partial = _split_prefix(prefix)
        await self._run(self._check_root)
        waiting = [*await self._run(self._entries, start, partial, after)]
        while waiting:
            if waiting[-1].endswith("/"):
                waiting.extend(await self._run(self._entries, waiting.pop(), "", after))
                continue
            names = list(itertools.takewhile(lambda name: not name.endswith("/"), reversed(waiting[-LIST_BATCH:])))
            del waiting[-len(names) :]
            for found in await self._run(self._infos, names):
                yield found

    async def delete(self, name: str) -> None:
        check_object_name(name)
        await self._run(self._delete, name)

    async def close(self) -> None:
        """Nothing is held open."""

    async def _run(self, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)
        except OSError as error:
            raise self._fault(error) from error

    async def _run_to_end(self, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """As _run, but a cancellation waits for the thread, which still reads the caller's buffers."""
        try:
            return await blocking(self._executor, lambda: function(*arguments))
        except OSError as error:
            raise self._fault(error) from error

    def _create(self, name: str, parts: Sequence[Buffer]) -> None:
        target = self._root / name
        self._check_root()
        self._sweep_once()
        unfinished = self._root / UNFINISHED_DIRECTORY / f"{uuid.uuid4().hex}.part"
        try:
            write_new_file(unfinished, parts)
            self._make_durable(name.rpartition("/")[0])
            try:
                os.link(unfinished, target, follow_symlinks=False)
            except FileExistsError as error:
                # why: who asks again after a crash takes "exists" for "committed", so the name must be durable by now
                synchronize_directory(target.parent)
                if not target.is_file():
                    raise StoreFault(url=self.url, reason=f"{name} is a directory", name=name) from error
                raise ObjectExists(url=self.url, name=name) from error
        except FileNotFoundError:
            self._durable_directories.clear()
            self._is_swept = False
            raise
        finally:
            _unlink_if_there(unfinished)
        try:
            synchronize_directory(target.parent)
        except OSError:
            # why: a name that may be lost with the power must not be found by the next attempt and taken for committed
            _unlink_if_there(target)
            raise

    def _make_durable(self, directory: str) -> None:
        """Makes an object's directory and all above it, up to the root, durable, whoever made them; once per
        directory.
        """
        if not directory or directory in self._durable_directories:
            return
        parent = directory.rpartition("/")[0]
        self._make_durable(parent)
        try:
            os.mkdir(self._root / directory, DIRECTORY_MODE)
        except FileExistsError:
            pass
        synchronize_directory(self._root / parent)
        if len(self._durable_directories) >= KNOWN_DIRECTORIES_MAX:
            self._durable_directories.clear()
        self._durable_directories.add(directory)

    def _sweep_once(self) -> None:
        """Before the first create: makes the directory of unfinished files, and removes those that crashes left
        there.
        """
        if self._is_swept:
            return
        directory = self._root / UNFINISHED_DIRECTORY
        try:
            os.mkdir(directory, DIRECTORY_MODE)
        except FileExistsError:
            pass
        clock = directory / f"{uuid.uuid4().hex}.clock"
        write_new_file(clock, [])
        limit = clock.stat().st_mtime - UNFINISHED_AGE_SECONDS_MAX
        _unlink_if_there(clock)
        with os.scandir(directory) as entries:
            for entry in entries:
                try:
                    if entry.stat(follow_symlinks=False).st_mtime < limit:
                        os.unlink(entry.path)
                        log.info("unfinished object swept", path=entry.path)
                except FileNotFoundError:
                    continue
        self._is_swept = True

    def _open(self, name: str) -> int:
        try:
            descriptor = os.open(self._root / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError) as error:
            self._check_root()
            raise ObjectNotFound(url=self.url, name=name) from error
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise ObjectNotFound(url=self.url, name=name) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ObjectNotFound(url=self.url, name=name)
        return descriptor

    def _read(self, name: str, first_byte: int, end_byte: int | None) -> bytes:
        descriptor = self._open(name)
        try:
            first, end = clamp_range(os.fstat(descriptor).st_size, first_byte, end_byte)
            pieces: list[bytes] = []
            while first < end and (piece := _read_piece(descriptor, end - first, first, url=self.url, name=name)):
                pieces.append(piece)
                first += len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        finally:
            os.close(descriptor)

    def _info(self, name: str) -> ObjectInfo:
        descriptor = self._open(name)
        try:
            return _object_info(name, os.fstat(descriptor))
        finally:
            os.close(descriptor)

    def _infos(self, names: Sequence[str]) -> Sequence[ObjectInfo]:
        found = []
        for name in names:
            try:
                found.append(_object_info(name, os.stat(self._root / name, follow_symlinks=False)))
            except FileNotFoundError:  # deleted since its directory was read
                continue
        return found

    def _entries(self, directory: str, partial: str, after: str) -> Sequence[str]:
        """What of a directory (`""` or `…/`) is to be listed, last name first: object names, and directories ending in
        `/`.

        A directory sorts as its name with the slash, since that is how the names of all objects in it begin.
        """
        keys: list[str] = []
        try:
            with os.scandir(self._root / directory) as entries:
                for entry in entries:
                    if not entry.name.startswith(partial) or not is_component(entry.name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        key = f"{directory}{entry.name}/"
                        if key > after or after.startswith(key):
                            keys.append(key)
                    elif entry.is_file(follow_symlinks=False) and directory + entry.name > after:
                        keys.append(directory + entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(keys, reverse=True)

    def _delete(self, name: str) -> None:
        self._check_root()
        try:
            os.unlink(self._root / name)
        except (FileNotFoundError, NotADirectoryError):
            return
        synchronize_directory((self._root / name).parent)

    def _check_root(self) -> None:
        """Raises StoreMissing, or StoreUnavailable if what lies there now is not what was opened: a mount point whose
        file system is gone is an empty directory, and what is written there is not in the store.
        """
        try:
            status = os.stat(self._root)
        except (FileNotFoundError, NotADirectoryError):
            status = None
        if status is None or not stat.S_ISDIR(status.st_mode):
            raise StoreMissing(url=self.url, reason="the directory does not exist")
        if (status.st_dev, status.st_ino) != self._root_identity:
            reason = "another directory has taken its place; is its file system mounted? (a restart accepts it)"
            raise StoreUnavailable(url=self.url, reason=reason)

    def _fault(self, error: OSError) -> StoreFault:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            return StoreFull(url=self.url, reason=reason)
        if error.errno in _NOT_PERMITTED:
            return StoreNotPermitted(url=self.url, reason=reason)
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not self._root.is_dir():
            return StoreMissing(url=self.url, reason="the directory does not exist")
        if error.errno in _UNAVAILABLE:
            return StoreUnavailable(url=self.url, reason=reason)
        return StoreFault(url=self.url, reason=reason)


def _read_piece(descriptor: int, length: int, offset: int, *, url: str, name: str) -> bytes:
    try:
        return os.pread(descriptor, length, offset)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise ObjectUnreadable(url=url, name=name, reason=error.strerror) from error


def _split_prefix(prefix: str) -> tuple[str, str]:
    """The directory to start from (`""` or `…/`) and how names in it must begin. Raises InvalidValue for traversal."""
    directory, slash, partial = prefix.rpartition("/")
    if directory:
        check_object_name(directory)
    elif slash:
        check_object_name(prefix)
    return directory + slash, partial


def _object_info(name: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(name=name, size_bytes=status.st_size, modified_ns=status.st_mtime_ns)


def _unlink_if_there(path: Path) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
