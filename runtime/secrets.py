"""Secrets lie in files: private keys, tokens, credentials. Written once with mode 0600, never overwritten, never
logged."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

import structlog

from runtime.errors import SecretExists, SecretMissing, SecretUnreadable
from runtime.local_directory import FILE_MODE, synchronize_directory, write_fully

SECRET_BYTES_MAX: Final = 2**20

log = structlog.get_logger(__name__)


def write_secret(path: Path | str, data: bytes) -> None:
    """Makes the file `path` with `data`, mode 0600, durable on return; on failure there is no file.

    Raises SecretExists if there is anything at `path`, SecretUnreadable if it cannot be written there.
    """
    path = Path(path)
    try:
        # why: O_EXCL and no link(2): recovery keys are written to USB sticks whose file systems have no links
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    except FileExistsError as error:
        raise SecretExists(path=path) from error
    except OSError as error:
        raise SecretUnreadable(path=path, reason=error.strerror) from error
    try:
        try:
            write_fully(descriptor, 0, [data])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        synchronize_directory(path.parent)
    except OSError as error:
        os.unlink(path)
        raise SecretUnreadable(path=path, reason=error.strerror) from error


def refuse_existing(path: Path | None) -> None:
    """Before a secret is made that goes there, for none is to be made that nobody gets. Raises SecretExists."""
    if path is not None and os.path.lexists(path):
        raise SecretExists(path=path)


def read_secret(path: Path | str) -> bytes:
    """The contents of a secret file; a warning if everybody on this machine may read it.

    Raises SecretMissing or SecretUnreadable (not permitted, a directory, over 1 MiB).
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            # why not refused: container platforms mount secrets so, where nobody else is
            if os.fstat(file.fileno()).st_mode & stat.S_IROTH:
                log.warning("everybody on this machine can read a secret: chmod 600", path=str(path))
            data = file.read(SECRET_BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise SecretMissing(path=path) from error
    except OSError as error:
        raise SecretUnreadable(path=path, reason=error.strerror) from error
    if len(data) > SECRET_BYTES_MAX:
        raise SecretUnreadable(path=path, reason=f"it is larger than {SECRET_BYTES_MAX} bytes")
    return data
