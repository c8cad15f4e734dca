"""Says what an image holds: its digest, and whether two images are byte for byte the same. Reads, and never writes.

Holes are read as the zeroes that they are, without touching the disk.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from blake3 import blake3

READ_BYTES: Final = 2**20
_ZEROES: Final = bytes(READ_BYTES)


def image_digest(path: Path | str, *, size_bytes: int, on_bytes: Callable[[int], None] | None = None) -> str:
    """blake3 of the first size_bytes, in hexadecimal, as `b3sum` prints it. Raises OSError, EOFError if shorter.

    on_bytes is told how many bytes are done, now and then; what it raises ends the reading.
    """
    digest, done = blake3(), 0
    for part in _parts(Path(path), size_bytes):
        digest.update(part)
        done += len(part)
        if on_bytes is not None:
            on_bytes(done)
    return digest.hexdigest()


def images_are_identical(first: Path | str, second: Path | str) -> bool:
    """Whether both have the same size and the same bytes. Raises OSError."""
    size_bytes = os.stat(first).st_size
    if os.stat(second).st_size != size_bytes:
        return False
    parts = zip(_parts(Path(first), size_bytes), _parts(Path(second), size_bytes), strict=True)
    return all(mine == theirs for mine, theirs in parts)


def _parts(path: Path, size_bytes: int) -> Iterator[memoryview]:
    """[0, size_bytes) in pieces of READ_BYTES, the last one shorter. A piece is good until the next is asked for."""
    buffer = memoryview(bytearray(READ_BYTES))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        offset, next_data = 0, 0
        while offset < size_bytes:
            wanted = min(READ_BYTES, size_bytes - offset)
            if next_data < offset + wanted:
                next_data = _next_data(descriptor, max(offset, next_data), size_bytes)
            if next_data >= offset + wanted:
                yield memoryview(_ZEROES)[:wanted]
            else:
                _read_fully(descriptor, offset, buffer[:wanted], path)
                next_data = 0
                yield buffer[:wanted]
            offset += wanted
    finally:
        os.close(descriptor)


def _next_data(descriptor: int, offset: int, size_bytes: int) -> int:
    """Where the next data is at or behind offset; size_bytes if there is none."""
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            if os.fstat(descriptor).st_size < size_bytes and os.lseek(descriptor, 0, os.SEEK_END) < size_bytes:
                raise EOFError("the image is shorter than its disk") from error
            return size_bytes
        if error.errno in (errno.EINVAL, errno.ENOTSUP):
            return offset
        raise


def _read_fully(descriptor: int, offset: int, view: memoryview, path: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            raise EOFError(f"{path} ends at {offset + done}")
        done += count
