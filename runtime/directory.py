"""Durable local state behind one small interface, so that the simulation can lose power in the middle of it.

Every call blocks and belongs in an executor. What is durable on return is said per method and nothing more may be
assumed: after a power cut unsynchronized writes may be lost, torn, or kept in any subset, and so may unsynchronized
directory changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from typing_extensions import Buffer


class DurableFile(Protocol):
    """An open file, read and written by offset. Errors are OSError."""

    def size_bytes(self) -> int: ...

    def read_into(self, offset_bytes: int, buffer: Buffer) -> int:
        """Fills `buffer` from `offset_bytes`; returns the bytes read, less only at the end of the file."""
        ...

    def write(self, offset_bytes: int, buffers: Sequence[Buffer]) -> None:
        """Writes all buffers, one behind the other. Not durable before synchronize() returns.

        After an OSError from here or from synchronize() the contents written since the last synchronize() are
        undefined and a later synchronize() proves nothing about them: abandon the file.
        """
        ...

    def truncate(self, size_bytes: int) -> None: ...

    def synchronize(self) -> None:
        """On return all that was written before the call survives power loss (fdatasync)."""
        ...

    def close(self) -> None: ...


class DurableDirectory(Protocol):
    """One flat directory of files. Errors are OSError (FileNotFoundError, FileExistsError where they fit)."""

    def names(self) -> list[str]:
        """Sorted. A name that begins with a dot is never a caller's (ValueError) and never listed."""
        ...

    def read(self, name: str) -> bytes: ...

    def replace(self, name: str, data: bytes) -> None:
        """Atomically makes `data` the contents of `name`; durable on return. Mode 0600."""
        ...

    def open(self, name: str, *, create: bool = False, preallocate_bytes: int = 0, direct: bool = False) -> DurableFile:
        """create: the file must not exist, and its directory entry is durable on return (mode 0600).

        preallocate_bytes reserves space: the file then has at least that size, and reads as zeroes where nothing was
        written. direct asks for O_DIRECT where the file system has it: offsets, lengths and addresses are then
        multiples of 4096.
        """
        ...

    def remove(self, name: str) -> None:
        """Durable on return. No error if it is not there."""
        ...

    def free_bytes(self) -> int:
        """What the file system still takes."""
        ...
