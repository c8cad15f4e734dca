"""The demo's source disk: an image that is made of real files, changed as a machine would change it, and checked.

Ext4Image needs no root: mkfs.ext4 -d fills it, debugfs -w changes it, e2fsck -fn checks it. Where these tools are
missing PlainImage puts the same contents one behind the other.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from farpoint.demo.errors import ImageToolFailed
from farpoint.demo.real_files import BLOCK_BYTES, real_files

FILLED_SHARE: Final = 0.7
"""How much of the image the files take; the rest stays free for the file system and for the changes."""
CHANGED_FILES: Final = 60
"""So many files are deleted, so many overwritten, so many new ones made."""
COPY_BYTES: Final = 64 * 2**20
_SYSTEM_PATH: Final = "/usr/sbin:/sbin"
_TOOLS: Final = ("mkfs.ext4", "debugfs", "e2fsck")


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What was done to the image between the two points."""

    files_written: int
    files_deleted: int
    files_overwritten: int
    bytes_written: int


class SourceImage(Protocol):
    """An image file under change. Every call blocks."""

    @property
    def kind(self) -> str: ...

    def make(self) -> None:
        """Makes the image. Raises ImageToolFailed, OSError."""
        ...

    def change(self) -> Changes:
        """Changes it in place, as a machine would."""
        ...

    def check(self, path: Path) -> bool | None:
        """Whether the file system in the image at `path` is sound; None where there is none to check."""
        ...


def source_image(path: Path, *, size_bytes: int) -> SourceImage:
    """An ext4 image where this machine has the tools for it, else a plain one."""
    if any(_tool(name) is None for name in _TOOLS):
        return PlainImage(path, size_bytes)
    return Ext4Image(path, size_bytes)


class Ext4Image:
    """A file system of real files."""

    kind = "ext4"

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._files: list[tuple[Path, Path]] = []

    def make(self) -> None:
        self._files = list(real_files(int(self._size_bytes * FILLED_SHARE)))
        with tempfile.TemporaryDirectory(prefix="tree-", dir=self._path.parent) as tree:
            for source, place in self._files:
                target = Path(tree) / place
                os.makedirs(target.parent, exist_ok=True)
                _stage(source, target)
            with open(self._path, "xb") as image:
                image.truncate(self._size_bytes)
            _run("mkfs.ext4", "-q", "-F", "-m", "0", "-L", "farpoint-demo", "-d", tree, str(self._path))

    def change(self) -> Changes:
        """Deletes some files, writes others anew with another's contents, makes new ones; by one debugfs script."""
        step = max(1, len(self._files) // (3 * CHANGED_FILES))
        chosen = iter(self._files[::step])
        deleted = list(itertools.islice(chosen, CHANGED_FILES))
        overwritten = list(itertools.islice(chosen, CHANGED_FILES))
        written = list(itertools.islice(chosen, CHANGED_FILES))
        lines = [f"rm /{place}" for _, place in deleted]
        size_bytes = 0
        # why: the files of another are what their new contents are taken from: real bytes, and not the old ones
        for (_, place), (contents, _) in zip(overwritten, reversed(deleted), strict=False):
            lines += [f"cd /{place.parent}", f"rm {place.name}", f"write {contents} {place.name}"]
            size_bytes += contents.stat().st_size
        lines += ["cd /", "mkdir changed", "cd /changed"]
        for number, (contents, _) in enumerate(written):
            lines.append(f"write {contents} new-{number:03d}")
            size_bytes += contents.stat().st_size
        with tempfile.NamedTemporaryFile("w", suffix=".debugfs", dir=self._path.parent) as script:
            script.write("\n".join(lines) + "\n")
            script.flush()
            _run("debugfs", "-w", "-f", script.name, str(self._path))
        return Changes(
            files_written=len(written),
            files_deleted=len(deleted),
            files_overwritten=len(overwritten),
            bytes_written=size_bytes,
        )

    def check(self, path: Path) -> bool | None:
        finished = _start("e2fsck", "-f", "-n", str(path))
        return finished.returncode == 0


class PlainImage:
    """Real file contents at block borders, with zeroes and a hole behind them."""

    kind = "plain"

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._places: list[tuple[Path, int]] = []

    def make(self) -> None:
        offset = 0
        with open(self._path, "xb") as image:
            image.truncate(self._size_bytes)
            for source, _ in real_files(int(self._size_bytes * FILLED_SHARE)):
                data = source.read_bytes()
                if offset + len(data) > self._size_bytes:
                    break
                os.pwrite(image.fileno(), data, offset)
                self._places.append((source, offset))
                offset += -(-len(data) // BLOCK_BYTES) * BLOCK_BYTES

    def change(self) -> Changes:
        step = max(1, len(self._places) // (2 * CHANGED_FILES))
        chosen = self._places[::step]
        emptied, overwritten = chosen[0::2], chosen[1::2]
        size_bytes = 0
        with open(self._path, "r+b") as image:
            for source, offset in emptied:
                os.pwrite(image.fileno(), bytes(source.stat().st_size), offset)
            for (source, offset), (other, _) in zip(overwritten, reversed(overwritten), strict=True):
                data = other.read_bytes()[: source.stat().st_size]
                os.pwrite(image.fileno(), data, offset)
                size_bytes += len(data)
        return Changes(
            files_written=0, files_deleted=len(emptied), files_overwritten=len(overwritten), bytes_written=size_bytes
        )

    def check(self, path: Path) -> bool | None:
        return None


def copy_sparse(source: Path, target: Path) -> None:
    """Makes `target` with the bytes of `source`, holes as holes, by sharing blocks where the file system can."""
    with open(source, "rb") as reading, open(target, "xb") as writing:
        size_bytes = os.fstat(reading.fileno()).st_size
        writing.truncate(size_bytes)
        for first, end in _data_ranges(reading.fileno(), size_bytes):
            _copy_range(reading.fileno(), writing.fileno(), first, end)


def allocated_bytes(path: Path) -> int:
    """What a file really takes on its file system."""
    return path.stat().st_blocks * 512


def _copy_range(reading: int, writing: int, first: int, end: int) -> None:
    while first < end:
        wanted = min(COPY_BYTES, end - first)
        try:
            count = os.copy_file_range(reading, writing, wanted, first, first)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            count = os.pwrite(writing, os.pread(reading, wanted, first), first)
        first += count


def _data_ranges(descriptor: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    end = 0
    while end < size_bytes:
        try:
            first = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        end = os.lseek(descriptor, first, os.SEEK_HOLE)
        yield first, end


def _stage(source: Path, target: Path) -> None:
    """Puts a file into the tree that mkfs.ext4 reads, without copying it where the system allows that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _tool(name: str) -> str | None:
    # why: these lie in /usr/sbin, which is on no ordinary user's path
    return shutil.which(name) or shutil.which(name, path=_SYSTEM_PATH)


def _start(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command: Sequence[str] = (_tool(name) or name, *arguments)
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


def _run(name: str, *arguments: str) -> None:
    finished = _start(name, *arguments)
    # why: debugfs ends with status 0 whatever happens; what it says beyond its own echo and version is an error
    said = [line for line in finished.stderr.splitlines() if line and not line.startswith(("debugfs ", "Allocated"))]
    if finished.returncode or (name == "debugfs" and said):
        raise ImageToolFailed(tool=name, status=finished.returncode, text="; ".join(said[:5]) or finished.stdout[-500:])
