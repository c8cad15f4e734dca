"""All that the agent's shells touch of the world, as interfaces; production and the simulation hand in their own.

Methods that are not `async` and not marked "does not block" may block: the shells call them through an executor only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from typing_extensions import Buffer

from protocol.messages import Message
from protocol.vocabulary import DISK_SIZE_BYTES_MAX, check_range

SECTOR_BYTES_MIN = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskIdentity:
    """What a disk is known by, never its path. Two openings of one disk agree in every strong mark that both have.

    strong: (kind, value) pairs such as ("wwn", "0x5000…"), ("serial", …), ("partition_table", …), ("file_system", …). weak:
    marks that count only where no strong one exists (an image file's device and inode number).
    """

    size_bytes: int
    sector_bytes: int
    strong: tuple[tuple[str, str], ...] = ()
    weak: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        check_range(self.size_bytes, "size_bytes", low=1, high=DISK_SIZE_BYTES_MAX)
        check_range(self.sector_bytes, "sector_bytes", low=SECTOR_BYTES_MIN, high=65536)


class StillnessProof(Protocol):
    """Evidence that nobody wrote to the disk since it began. Once broken it stays broken."""

    def holds(self) -> bool:
        """Whether nothing was written up to now. Does not block. A waiting writer is let through as soon as this says no."""
        ...

    def end(self) -> bool:
        """The last check, then lets writers in. Returns whether the disk was still from begin to now. May be called twice."""
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
        """Opens the disk at `path`. Raises DiskVanished, or DiskReplaced / DiskResized if it is not the expected one."""
        ...


class Received(Protocol):
    """What arrived on a channel; `release()` gives its buffer back."""

    @property
    def message(self) -> Message: ...

    @property
    def body(self) -> memoryview: ...

    def release(self) -> None: ...


class Channel(Protocol):
    """A connected, authenticated, message-wise connection (protocol.transport.channel.Channel fits). Errors: ConnectionLost."""

    async def send(self, message: Message, body: Sequence[Buffer] = ()) -> None:
        """Returns when the transport took it; waits while the peer does not read. The buffers are free again on return."""
        ...

    async def receive(self) -> Any:
        """The next message as `Received`. Raises ConnectionLost at the end of the connection."""
        ...

    async def close(self) -> None: ...


DrawRandom: TypeAlias = Callable[[int], bytes]
"""n → n random bytes: point identifiers, digest keys, jitter. os.urandom in production."""

Connect: TypeAlias = Callable[[Any], Awaitable[Channel]]
"""Connects to one process server address of the orders."""
