"""An in-memory DurableDirectory that keeps exactly what runtime/directory.py promises when the power goes, and no more.

- What was synchronized survives. Writes since then are lost, kept in any subset, or torn at 512-byte sectors, each
  file by a draw of its own; what survives of a file that grew is padded with zeroes.
- Created, replaced and removed names are durable on return, as the contract says; a power loss during the call leaves
  either.
- A process that is only killed loses nothing: the page cache outlives it.
- What `fail_next` names fails once: a failed read or creation changes nothing, a failed write may have left a part of
  itself. A medium that `is_full` takes nothing more; what was preallocated is still there.
- A failed synchronize dooms what was written since the last one: reads still show it, a later synchronize succeeds,
  and after a power loss it is gone (DESIGN §12).
"""

from __future__ import annotations

import enum
import errno
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from typing_extensions import Buffer

from tests.simulation.process import ProcessKilled, SimulatedProcess

SECTOR_BYTES: Final = 512
DIRECT_ALIGNMENT_BYTES: Final = 4096
CAPACITY_BYTES: Final = 2**30


@dataclass(slots=True)
class _Change:
    """One write (or truncation, data None) since the last synchronize, with what it replaced."""

    offset_bytes: int
    data: bytes | None
    old_data: bytes
    old_size_bytes: int
    is_doomed: bool = False
    is_kept: bool = False


@dataclass(slots=True)
class StoredFile:
    """One file of the medium: what reads show, and how to get back from there to what is durable."""

    contents: bytearray = field(default_factory=bytearray)
    changes: list[_Change] = field(default_factory=list)

    def preallocate(self, size_bytes: int) -> None:
        """Durable on return."""
        if size_bytes > len(self.contents):
            if self.changes:
                raise NotImplementedError("preallocating behind unsynchronized writes")
            self.contents.extend(bytes(size_bytes - len(self.contents)))

    def write(self, offset_bytes: int, data: bytes) -> None:
        size = len(self.contents)
        end = offset_bytes + len(data)
        self.changes.append(_Change(offset_bytes, data, bytes(self.contents[offset_bytes:end]), size))
        if offset_bytes > size:
            self.contents.extend(bytes(offset_bytes - size))
        self.contents[offset_bytes:end] = data

    def truncate(self, size_bytes: int) -> None:
        size = len(self.contents)
        self.changes.append(_Change(size_bytes, None, bytes(self.contents[size_bytes:]), size))
        del self.contents[size_bytes:]
        self.contents.extend(bytes(size_bytes - len(self.contents)))

    def synchronize(self) -> None:
        if any(change.is_doomed for change in self.changes):
            for change in self.changes:
                change.is_kept = not change.is_doomed
        else:
            self.changes.clear()

    def fail_synchronize(self) -> None:
        for change in self.changes:
            change.is_doomed = not change.is_kept

    def lose_power(self, draw: random.Random) -> bool:
        """Leaves what the medium holds afterwards. Returns whether anything was unsynchronized."""
        changes, self.changes = self.changes, []
        for change in reversed(changes):
            _undo(self.contents, change)
        if not changes:
            return False
        fate = draw.choice(("lose", "keep", "prefix", "subset"))
        prefix = draw.randrange(len(changes) + 1)
        for index, change in enumerate(changes):
            if change.is_kept or (not change.is_doomed and (fate == "keep" or (fate == "prefix" and index < prefix))):
                _redo(self.contents, change.offset_bytes, change.data)
            elif fate == "subset" or (fate == "prefix" and index == prefix and not change.is_doomed):
                self._redo_sectors(change, draw)
        return True

    def _redo_sectors(self, change: _Change, draw: random.Random) -> None:
        if change.data is None:
            if draw.random() < 0.5:
                _redo(self.contents, change.offset_bytes, None)
            return
        position = 0
        while position < len(change.data):
            absolute = change.offset_bytes + position
            length = min(SECTOR_BYTES - absolute % SECTOR_BYTES, len(change.data) - position)
            if draw.random() < 0.5:
                _redo(self.contents, absolute, change.data[position : position + length])
            position += length


def _undo(contents: bytearray, change: _Change) -> None:
    if change.data is None:
        del contents[change.offset_bytes :]
        contents.extend(change.old_data)
        del contents[change.old_size_bytes :]
        return
    contents[change.offset_bytes : change.offset_bytes + len(change.old_data)] = change.old_data
    del contents[change.old_size_bytes :]


def _redo(contents: bytearray, offset_bytes: int, data: bytes | None) -> None:
    if data is None:
        del contents[offset_bytes:]
        contents.extend(bytes(offset_bytes - len(contents)))
        return
    if offset_bytes > len(contents):
        contents.extend(bytes(offset_bytes - len(contents)))
    contents[offset_bytes : offset_bytes + len(data)] = data


class Operation(enum.Enum):
    """What can be made to fail, once each time."""

    READ = "read"
    WRITE = "write"
    SYNCHRONIZE = "synchronize"
    CREATE = "create"
    REPLACE = "replace"
    REMOVE = "remove"


class StorageMedium:
    """One host's disk: what is left when the process, or the power, goes.

    fail_next: operations of which the next one ends with EIO. `on_read_failure` is told when a read did.
    """

    def __init__(self, name: str, draw: random.Random, *, capacity_bytes: int = CAPACITY_BYTES) -> None:
        self.name = name
        self.files: dict[str, StoredFile] = {}
        self.capacity_bytes = capacity_bytes
        self.fail_next: set[Operation] = set()
        self.is_full = False
        self.has_latent_errors = False
        """A bit of it was turned over at some time: nothing mends that, as long as nobody writes there."""
        self.on_read_failure: Callable[[], None] = lambda: None
        self.on_change: Callable[[str, str], None] = lambda operation, name: None
        self.draw = draw

    def used_bytes(self) -> int:
        return sum(len(stored.contents) for stored in self.files.values())

    def lose_power(self) -> int:
        """Returns how many files lost or tore something that was not synchronized."""
        return sum(self.files[name].lose_power(self.draw) for name in sorted(self.files))

    def room_bytes(self) -> int:
        return 0 if self.is_full else max(0, self.capacity_bytes - self.used_bytes())

    def flip_bit(self, draw: random.Random, *, suffix: str = "") -> str | None:
        """Turns a bit of what lies there over, as reads show it and as the medium has it. Returns the file's name."""
        names = [name for name, stored in sorted(self.files.items()) if stored.contents and name.endswith(suffix)]
        if not names:
            return None
        name = draw.choice(names)
        self.has_latent_errors = True
        contents = self.files[name].contents
        contents[draw.randrange(len(contents))] ^= 1 << draw.randrange(8)
        return name

    def heal(self) -> None:
        self.fail_next.clear()
        self.is_full = False

    def check(self, operation: Operation, name: str) -> None:
        """Raises OSError if this operation is to fail now."""
        if operation in self.fail_next:
            self.fail_next.discard(operation)
            if operation is Operation.READ:
                self.on_read_failure()
            raise OSError(errno.EIO, f"injected: {operation.value} failed", name)

    def check_room(self, size_bytes: int, name: str) -> None:
        if size_bytes > self.room_bytes():
            raise OSError(errno.ENOSPC, "no space left on device", name)

    def wipe(self) -> None:
        """The disk is replaced by an empty one: cache loss."""
        self.files = {}
        self.has_latent_errors = False


class SimulatedDirectory:
    """A process's view of a medium: DurableDirectory for exactly as long as the process lives."""

    def __init__(self, medium: StorageMedium, process: SimulatedProcess) -> None:
        self._medium = medium
        self._process = process

    def names(self) -> list[str]:
        self._process.check_alive()
        return sorted(self._medium.files)

    def read(self, name: str) -> bytes:
        self._process.check_alive()
        self._medium.check(Operation.READ, name)
        return bytes(self._stored(name).contents)

    def replace(self, name: str, data: bytes) -> None:
        self._process.check_alive()
        _check_name(name)
        self._medium.check(Operation.REPLACE, name)
        self._medium.check_room(len(data), name)
        contents = bytearray(data)
        try:
            self._process.count_operation()
        except ProcessKilled:
            # why: the power may go after the rename became durable and before the caller heard of it
            if self._medium.draw.random() < 0.5:
                self._medium.files[name] = StoredFile(contents)
            raise
        self._medium.files[name] = StoredFile(contents)
        self._medium.on_change("replace", name)

    def open(
        self, name: str, *, create: bool = False, preallocate_bytes: int = 0, direct: bool = False
    ) -> SimulatedFile:
        self._process.count_operation()
        _check_name(name)
        if create:
            if name in self._medium.files:
                raise FileExistsError(errno.EEXIST, "exists", name)
            self._medium.check(Operation.CREATE, name)
            self._medium.check_room(preallocate_bytes, name)
            self._medium.files[name] = StoredFile()
            self._medium.on_change("create", name)
        stored = self._stored(name)
        stored.preallocate(preallocate_bytes)
        return SimulatedFile(stored, name, self._medium, self._process, direct=direct)

    def remove(self, name: str) -> None:
        self._process.count_operation()
        self._medium.check(Operation.REMOVE, name)
        if self._medium.files.pop(name, None) is not None:
            self._medium.on_change("remove", name)

    def free_bytes(self) -> int:
        self._process.check_alive()
        return self._medium.room_bytes()

    def _stored(self, name: str) -> StoredFile:
        _check_name(name)
        try:
            return self._medium.files[name]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "no such file", name) from None


def _check_name(name: str) -> None:
    if not name or name.startswith(".") or "/" in name:
        raise ValueError(f"not a file name of a durable directory: {name!r}")


class SimulatedFile:
    """DurableFile over a StoredFile; goes on working on a removed file, as an open file does."""

    def __init__(
        self, stored: StoredFile, name: str, medium: StorageMedium, process: SimulatedProcess, *, direct: bool
    ) -> None:
        self._stored = stored
        self._name = name
        self._medium = medium
        self._process = process
        self._is_direct = direct
        self._is_closed = False

    def size_bytes(self) -> int:
        self._check_open()
        return len(self._stored.contents)

    def read_into(self, offset_bytes: int, buffer: Buffer) -> int:
        self._check_open()
        self._medium.check(Operation.READ, self._name)
        target = memoryview(buffer).cast("B")
        data = self._stored.contents[offset_bytes : offset_bytes + len(target)]
        target[: len(data)] = data
        return len(data)

    def write(self, offset_bytes: int, buffers: Sequence[Buffer]) -> None:
        self._check_open()
        pieces = [bytes(buffer) for buffer in buffers]
        if self._is_direct and any(n % DIRECT_ALIGNMENT_BYTES for n in (offset_bytes, *map(len, pieces))):
            raise OSError(errno.EINVAL, "not aligned for direct input and output", self._name)
        data = b"".join(pieces)
        grown_bytes = offset_bytes + len(data) - len(self._stored.contents)
        if grown_bytes > 0:
            self._medium.check_room(grown_bytes, self._name)
        try:
            self._process.count_operation()
            self._medium.check(Operation.WRITE, self._name)
        except (ProcessKilled, OSError):
            # why: killed inside pwritev, or failed in it, some pages are in the page cache and the rest are not
            self._stored.write(offset_bytes, data[: len(data) // 2 // SECTOR_BYTES * SECTOR_BYTES])
            raise
        self._stored.write(offset_bytes, data)
        self._medium.on_change("write", self._name)

    def truncate(self, size_bytes: int) -> None:
        self._check_open()
        self._process.count_operation()
        self._stored.truncate(size_bytes)

    def synchronize(self) -> None:
        self._check_open()
        self._process.count_operation()
        try:
            self._medium.check(Operation.SYNCHRONIZE, self._name)
        except OSError:
            self._stored.fail_synchronize()
            raise
        self._stored.synchronize()
        self._medium.on_change("synchronize", self._name)

    def close(self) -> None:
        self._is_closed = True

    def _check_open(self) -> None:
        self._process.check_alive()
        if self._is_closed:
            raise OSError(errno.EBADF, "closed", self._name)
