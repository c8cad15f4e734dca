"""How many body bytes a connection may have sent in all: credit as a pure function of memory, cache room and fairness.

Invariants: the total that a connection was told never falls; what is granted and not yet durable, of all connections
together, fits into the cache's room; with no room the window is zero, so credit stops before the cache's limit is
reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.vocabulary import EXTENT_DTYPE, FRAME_EXTENTS_MAX, FRAME_RAW_BYTES_MAX

FRAME_BODY_BYTES_MAX: Final = FRAME_RAW_BYTES_MAX + FRAME_EXTENTS_MAX * EXTENT_DTYPE.itemsize
"""The largest body of a frame: a full extent table and incompressible data."""

WINDOW_BYTES_MIN: Final = FRAME_BODY_BYTES_MAX
"""A smaller window could never be used: no full frame fits."""

WINDOW_BYTES_MAX: Final = 16 * 2**20

CACHE_EXPANSION_NUMERATOR: Final = 9
CACHE_EXPANSION_DENOMINATOR: Final = 8
"""A body takes at most this much of the cache, records and padding included, once bodies of a batch reach 64 KiB."""

FRAME_ROOM_BYTES_MIN: Final = -(-FRAME_BODY_BYTES_MAX * CACHE_EXPANSION_NUMERATOR // CACHE_EXPANSION_DENOMINATOR)
"""With less room in the cache nobody gets credit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the whole process server has to share out. Bytes.

    cache_room_bytes: what frames may still take of the cache. promised_bytes: granted and not yet durable, of all
    connections.
    """

    cache_room_bytes: int
    memory_bytes_max: int
    connections: int
    promised_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionCredit:
    """One connection: bytes granted since its start, and those that are free again, being durable or dropped."""

    granted_bytes: int = 0
    released_bytes: int = 0

    @property
    def promised_bytes(self) -> int:
        return self.granted_bytes - self.released_bytes


def window_bytes(load: Load, credit: ConnectionCredit) -> int:
    """The bytes that this connection may have on their way: its fair share of memory and of the cache's room, else 0.

    Every connection gets at least one full frame while the cache has room for it: 2 MiB a connection are accounted for.
    """
    connections = max(1, load.connections)
    memory_share = max(WINDOW_BYTES_MIN, min(WINDOW_BYTES_MAX, load.memory_bytes_max // connections))
    others_bytes = load.promised_bytes - credit.promised_bytes
    usable_bytes = load.cache_room_bytes * CACHE_EXPANSION_DENOMINATOR // CACHE_EXPANSION_NUMERATOR
    room_left_bytes = usable_bytes - others_bytes
    room_share = min(room_left_bytes, max(WINDOW_BYTES_MIN, usable_bytes // connections))
    window = min(memory_share, room_share)
    return window if window >= WINDOW_BYTES_MIN else 0


def next_credit(load: Load, credit: ConnectionCredit) -> int:
    """The cumulative total to grant now; equal to credit.granted_bytes when there is nothing to add."""
    return max(credit.granted_bytes, credit.released_bytes + window_bytes(load, credit))
