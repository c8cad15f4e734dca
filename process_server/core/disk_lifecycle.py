"""What a disk's history may do next on this process server, as a table.

UNKNOWN: its position is not known here, the store has to be asked. RESTING: known, nobody has it open. OPEN: one
agent's connection sends change sets. BROKEN: something after the intake failed; what was not made durable is dropped,
and nothing more is taken until the disk is opened again. STOPPED: its history must not be extended here any more.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from protocol.errors import EventNotAllowed


class DiskState(enum.Enum):
    UNKNOWN = "unknown"
    RESTING = "resting"
    OPEN = "open"
    BROKEN = "broken"
    STOPPED = "stopped"


class DiskEvent(enum.Enum):
    POSITION_FOUND = "position found"
    OPENED = "opened"
    LEFT = "left"
    """The agent closed it, its connection ended, or a newer connection takes it over."""
    BROKE_OFF = "broke off"
    """Sealing failed, or the cache has no room."""
    CACHE_LOST = "cache lost"
    """What the cache held of it does not read back."""
    SUPERSEDED = "superseded"
    """Another process server extends the history, or closed the epoch."""
    REGRANTED = "regranted"
    """A grant of a higher epoch than the one that it was stopped in."""


_S, _E = DiskState, DiskEvent

DISK_TABLE: Final[Mapping[tuple[DiskState, DiskEvent], DiskState]] = {
    (_S.UNKNOWN, _E.POSITION_FOUND): _S.RESTING,
    (_S.UNKNOWN, _E.LEFT): _S.UNKNOWN,
    (_S.UNKNOWN, _E.BROKE_OFF): _S.UNKNOWN,
    (_S.UNKNOWN, _E.CACHE_LOST): _S.UNKNOWN,
    (_S.UNKNOWN, _E.SUPERSEDED): _S.STOPPED,
    (_S.RESTING, _E.POSITION_FOUND): _S.RESTING,
    (_S.RESTING, _E.OPENED): _S.OPEN,
    (_S.RESTING, _E.LEFT): _S.RESTING,
    (_S.RESTING, _E.BROKE_OFF): _S.BROKEN,
    (_S.RESTING, _E.CACHE_LOST): _S.UNKNOWN,
    (_S.RESTING, _E.SUPERSEDED): _S.STOPPED,
    (_S.OPEN, _E.LEFT): _S.RESTING,
    (_S.OPEN, _E.BROKE_OFF): _S.BROKEN,
    (_S.OPEN, _E.CACHE_LOST): _S.UNKNOWN,
    (_S.OPEN, _E.SUPERSEDED): _S.STOPPED,
    (_S.BROKEN, _E.POSITION_FOUND): _S.RESTING,
    (_S.BROKEN, _E.LEFT): _S.BROKEN,
    (_S.BROKEN, _E.BROKE_OFF): _S.BROKEN,
    (_S.BROKEN, _E.CACHE_LOST): _S.UNKNOWN,
    (_S.BROKEN, _E.SUPERSEDED): _S.STOPPED,
    (_S.STOPPED, _E.LEFT): _S.STOPPED,
    (_S.STOPPED, _E.BROKE_OFF): _S.STOPPED,
    (_S.STOPPED, _E.CACHE_LOST): _S.STOPPED,
    (_S.STOPPED, _E.SUPERSEDED): _S.STOPPED,
    (_S.STOPPED, _E.REGRANTED): _S.UNKNOWN,
}


def next_state(state: DiskState, event: DiskEvent) -> DiskState:
    """Raises EventNotAllowed for what has no row."""
    try:
        return DISK_TABLE[state, event]
    except KeyError:
        raise EventNotAllowed(state=state.value, event=event.value) from None
