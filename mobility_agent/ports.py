"""All that the agent's shells touch of the world, as interfaces; production and the simulation hand in their own.

Methods that are not `async` and not marked "does not block" may block: the shells call them through an executor only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol, TypeAlias

from typing_extensions import Buffer

from mobility_agent.tracking.change_source import ChangeSource
from protocol.control import DiskIdentity, ProcessServerAddress
from protocol.transport.channel import Channel
from protocol.vocabulary import DiskId
from runtime.directory import DurableDirectory


class StillnessProof(Protocol):
    """Evidence that nobody wrote to the disk since it began. Once broken it stays broken."""

    def holds(self) -> bool:
        """Whether nothing was written up to now. Does not block. Saying no lets a waiting writer through."""
        ...

    def end(self) -> bool:
        """The last check, then lets writers in. Whether the disk was still from begin to now. May be called twice."""
        ...


class SourceDisk(Protocol):
    """One open disk, read only."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def sector_bytes(self) -> int: ...

    @property
    def identity(self) -> DiskIdentity:
        """As found when it was opened."""
        ...

    def check(self) -> None:
        """Raises DiskVanished, DiskResized or DiskReplaced when this is no longer the disk that was opened."""
        ...

    def read_into(self, offset_bytes: int, buffer: Buffer) -> None:
        """Fills the whole buffer. offset and length are multiples of sector_bytes, except at a file's ragged end.

        Raises DiskVanished or DiskUnreadable.
        """
        ...

    def data_ranges(self, first_bytes: int, end_bytes: int) -> Iterator[tuple[int, int]]:
        """Half-open ranges within [first, end) that may hold data, ascending; all else certainly reads as zeroes."""
        ...

    def begin_stillness(self) -> StillnessProof:
        """Raises NotProvedStill with the reason when this disk cannot be proved still now."""
        ...

    def close(self) -> None: ...


class OpenSource(Protocol):
    def __call__(self, path: str, expected: DiskIdentity | None) -> SourceDisk:
        """Opens the disk at `path`. Raises DiskVanished, DiskReplaced or DiskResized if it is not the expected one."""
        ...


class Tracking(Protocol):
    """Chooses each disk's change source."""

    def open(
        self, disk: DiskId, path: str, source: SourceDisk, *, directory: DurableDirectory, draw_random: DrawRandom
    ) -> ChangeSource:
        """The best that there is for this disk. Raises DiskNotSupported when the operator wants a better one."""
        ...

    def forget(self, disk: DiskId) -> None:
        """The disk is protected no more: nothing of its tracking stays. No effect for one that is unknown."""
        ...


DrawRandom: TypeAlias = Callable[[int], bytes]
"""n → n random bytes: point identifiers, digest keys, jitter. os.urandom in production."""

Connect: TypeAlias = Callable[[ProcessServerAddress], Awaitable[Channel]]
"""Connects to one process server address of the orders."""
