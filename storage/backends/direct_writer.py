"""Writes an object's parts to a new file past the page cache, which costs a sixth of a buffered write's CPU time.

Invariant: the file's size is that of the parts; the zeroes that fill its last block are cut off before it is
synchronized.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from typing_extensions import Buffer

from runtime.local_directory import DIRECT_ALIGNMENT_BYTES, FILE_MODE, write_fully

STAGING_BYTES: Final = 2**20
DIRECT_BYTES_MIN: Final = 2**18
"""Smaller objects are written buffered: one copy and one flush are cheaper than staging."""


class _Staging(threading.local):
    """One page-aligned buffer for each thread that writes objects."""

    def __init__(self) -> None:
        self.buffer = mmap.mmap(-1, STAGING_BYTES)


_staging = _Staging()


def write_new_file(path: Path, parts: Sequence[Buffer]) -> None:
    """Makes the file `path` (0600) with the parts one behind the other; its contents, not its name, are durable on
    return.

    Raises OSError; what is at `path` then is for the caller to remove.
    """
    views = [memoryview(part).cast("B") for part in parts]
    size_bytes = sum(view.nbytes for view in views)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, FILE_MODE)
    try:
        if size_bytes >= DIRECT_BYTES_MIN and _switch_to_direct(path, descriptor):
            _write_staged(descriptor, views)
            os.ftruncate(descriptor, size_bytes)
        else:
            write_fully(descriptor, 0, views)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _switch_to_direct(path: Path, descriptor: int) -> bool:
    """Whether the file system grants O_DIRECT for this file; if so, the descriptor now has it."""
    try:
        direct = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    os.dup2(direct, descriptor, inheritable=False)
    os.close(direct)
    return True


def _write_staged(descriptor: int, views: Sequence[memoryview]) -> None:
    offset_bytes = 0
    for block in _blocks(views):
        write_fully(descriptor, offset_bytes, [block])
        offset_bytes += block.nbytes


def _blocks(views: Sequence[memoryview]) -> Iterator[memoryview]:
    """The views' bytes in the thread's staging buffer, full each time; the last time filled up to a whole block."""
    staging = memoryview(_staging.buffer)
    fill = 0
    for view in views:
        taken = 0
        while taken < view.nbytes:
            count = min(view.nbytes - taken, STAGING_BYTES - fill)
            staging[fill : fill + count] = view[taken : taken + count]
            taken += count
            fill += count
            if fill == STAGING_BYTES:
                yield staging
                fill = 0
    if fill:
        end = -(-fill // DIRECT_ALIGNMENT_BYTES) * DIRECT_ALIGNMENT_BYTES
        staging[fill:end] = bytes(end - fill)
        yield staging[:end]
