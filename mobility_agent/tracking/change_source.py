"""Where a disk's changes come from: one interface for scan, bitmap, capture and snapshot.

A source never guesses: it says how good what it yields is, and raises ResyncNeeded when it lost track.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from mobility_agent.core.change_sets import PackedFrame
from mobility_agent.core.dirty_map import SentRecord
from mobility_agent.core.extent_set import ExtentSet
from protocol.vocabulary import SEQUENCE_MAX

ReadTick: TypeAlias = Callable[[], int | None]
"""The newest tick of the server's clock that was received, in ns; None before the first. Does not block."""


def no_tick() -> int | None:
    """Of a clock that is never heard."""
    return None


class Promise(enum.Enum):
    """How good the changes of a round are, once it has ended."""

    REDO = "redo"
    """Writes in the order of their issue, with their data: every gap-free prefix is a state that the disk had."""
    COPY_IN_VALIDATED = "copy_in_validated"
    """What the disk held at one instant: it was proved still for the whole round."""
    COPY_IN_FUZZY = "copy_in_fuzzy"
    """Each block is something it held between begin and end of the round."""

    @property
    def is_still(self) -> bool:
        return self is not Promise.COPY_IN_FUZZY


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFrame:
    """Changes for one frame. The payload lies in the buffer with this index among those given to read(), or nowhere."""

    packed: PackedFrame
    compared_to_bytes: int
    """All of the disk before it that this round covers has been read and is in this frame or earlier ones, if it
    changed."""
    buffer_index: int | None
    receipt: Any
    """The source's own; give it back to sent()."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEnd:
    promise: Promise
    reason: str
    """Why the promise is no better; empty for the best."""
    instant_ns: int | None = None
    """If it is still: the newest tick that had been received before the instant that it shows."""


class Round(Protocol):
    """One pass over what may have changed. Calls block, but for `is_still`; one at a time."""

    @property
    def is_exhausted(self) -> bool:
        """Whether all was read."""
        ...

    @property
    def compared_to_bytes(self) -> int: ...

    @property
    def read_bytes(self) -> int:
        """Read from the disk so far."""
        ...

    def is_still(self) -> bool:
        """Whether the round's proof holds up to now; lets a waiting writer in when not. Does not block."""
        ...

    def read(self, window: memoryview, packing: memoryview) -> Sequence[SourceFrame]:
        """Goes on for a bounded while, using both buffers (FRAME_RAW_BYTES_MAX each, page-aligned).

        Returns at most one frame per buffer, ascending; perhaps none although the round goes on. The buffers stay in
        use until the frames are sent. Raises DiskFault, ResyncNeeded.
        """
        ...

    def end(self) -> RoundEnd:
        """After the last read: how good the round was. Ends the proof."""
        ...

    def abandon(self) -> None:
        """Ends the proof, whatever was read. No effect after end()."""
        ...


class ChangeSource(Protocol):
    """One disk's changes, and the knowledge of what the history holds. Calls block. Errors: DiskFault,
    AgentStateDamaged."""

    @property
    def name(self) -> str:
        """scan, bitmap, capture or snapshot."""
        ...

    @property
    def reason(self) -> str:
        """Why this disk has no better source; empty for the best."""
        ...

    @property
    def freezable_device(self) -> int | None:
        """st_rdev of the disk, if a round of it settles when nothing is written from its begin to its last read; None
        if that would take too long, or does not help."""
        ...

    @property
    def follow_ups_max(self) -> int:
        """How many rounds may follow at once one that did not settle: each reads less, and is less likely disturbed."""
        ...

    @property
    def alarms(self) -> int:
        """How often since the program began the source found that it had missed something, and mended it."""
        ...

    def restore(self, epoch: int, records: Sequence[SentRecord], *, sent_sequence: int = SEQUENCE_MAX) -> bool:
        """Takes up what is known of the epoch after a restart; 0: of none. records: all that the ledger holds;
        sent_sequence: its newest. Returns whether what is known can be used."""
        ...

    def enter_epoch(self, epoch: int, *, parent_sequence: int | None, is_base_empty: bool) -> None:
        """The history goes on in `epoch`. parent_sequence: what went out at or before it in the epoch before is there;
        None: nothing is known. Durable on return."""
        ...

    def begin_round(self, *, first_bytes: int, read_tick: ReadTick = no_tick, is_held: bool = False) -> Round:
        """Compares [first_bytes, end of the disk) with the history. read_tick is called in the thread that calls
        begin_round or end. is_held: file systems are frozen, perhaps with the agent's own state, which is left alone.
        Raises DiskFault, ResyncNeeded."""
        ...

    def sent(self, sequence: int, receipts: Sequence[Any]) -> None:
        """These frames' receipts make up change set `sequence`; the ledger holds it already, its last frame has not
        left."""
        ...

    def acknowledged(self, sequence: int) -> None:
        """All that was sent up to this change set, the newest, is durable at the process server, and the ledger says
        so."""
        ...

    def forget(self, extents: ExtentSet) -> None:
        """The history may not hold these as last read: they are sent again. Durable on return."""
        ...

    def synchronize(self) -> None:
        """On return what sent() said survives power loss, so that the ledger may drop it."""
        ...

    def remove_other_epochs(self) -> None:
        """The ledger names the epoch that was entered: what was kept of others goes."""
        ...

    def close(self) -> None: ...
