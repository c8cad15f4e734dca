"""Exclusive use of a state directory: two agents, process servers or configuration servers never share one.

Invariant: the lock is the kernel's (flock), so it ends with its holder however that ends; the file's contents are a
courtesy.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import StateLocked
from runtime.local_directory import FILE_MODE, make_directory


@contextmanager
def exclusive_lock(path: Path | str) -> Iterator[None]:
    """Holds the lock file `path` (made 0600, its directory 0700 if missing) for the length of the `with` block.

    Raises StateLocked at once if any process, this one included, holds it.
    """
    path = Path(path)
    make_directory(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise StateLocked(path=path, holder=holder) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
