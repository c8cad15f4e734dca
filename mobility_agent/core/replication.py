"""What an agent does for one disk, as a table: (state, event) → next state and action. What is absent is an error.

A position is settled if and only if no copy-in is pending or unsettled at it (`is_settled`): the whole disk was
compared under one unbroken proof of stillness, within one stream, and nothing is left dirty.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from mobility_agent.core.resync_cause import ResyncCause
from protocol.errors import EventNotAllowed, StaleEpoch
from protocol.messages import DiskOpened
from protocol.vocabulary import DiskId


class State(enum.Enum):
    UNOPENED = "unopened"
    """No connection yet since the start."""
    OPENING = "opening"
    """Asked the process server where the history stands."""
    INITIAL_REPLICATION = "initial_replication"
    DELTA_REPLICATION = "delta_replication"
    RESYNCHRONIZATION = "resynchronization"
    FREEZE = "freeze"
    """Delta replication that takes part in a freeze of the machine."""
    PAUSED = "paused"
    DISCONNECTED = "disconnected"
    STOPPED = "stopped"
    """An error of this disk that somebody must mend."""


class Event(enum.Enum):
    CONNECTED = "connected"
    CONNECTION_LOST = "connection_lost"
    OPENED_EMPTY = "opened_empty"
    """The history begins here, or the first copy-in is unfinished."""
    OPENED_DIFFERING = "opened_differing"
    """The history continues from a parent, and its comparison is unfinished."""
    OPENED_COMPLETE = "opened_complete"
    OPENED_BEHIND = "opened_behind"
    """Less is durable than was acknowledged: the cache was lost."""
    CLOSED_BY_PEER = "closed_by_peer"
    REFUSED_FOR_GOOD = "refused_for_good"
    WORK_FAILED = "work_failed"
    """What was being done failed in a way that another attempt may mend."""
    COPY_COMPLETED = "copy_completed"
    RESYNC_NEEDED = "resync_needed"
    FREEZE_BEGAN = "freeze_began"
    FREEZE_ENDED = "freeze_ended"
    PAUSE_ORDERED = "pause_ordered"
    RESUME_ORDERED = "resume_ordered"
    DISK_FAILED = "disk_failed"
    RETRY_DUE = "retry_due"


class Action(enum.Enum):
    NONE = "none"
    OPEN = "open"
    """Ask the process server where the history stands."""
    OPEN_NEW_EPOCH = "open_new_epoch"
    """Ask to continue in a new epoch."""
    COPY = "copy"
    """Run the copy-in of the whole disk from its cursor."""
    DELTA = "delta"
    """Run rounds for ever."""
    SUSPEND = "suspend"
    """Stop what runs; what was not durable is dirty again."""
    WAIT = "wait"
    """Stop what runs and come back with RETRY_DUE after a pause."""
    STOP = "stop"
    """Stop what runs, report the error, look again later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    state: State
    action: Action


def _to(state: State, action: Action) -> Transition:
    return Transition(state=state, action=action)


_WORKING: Final = (State.INITIAL_REPLICATION, State.DELTA_REPLICATION, State.RESYNCHRONIZATION, State.FREEZE)

TABLE: Final[dict[tuple[State, Event], Transition]] = {
    (State.UNOPENED, Event.CONNECTED): _to(State.OPENING, Action.OPEN),
    (State.UNOPENED, Event.CONNECTION_LOST): _to(State.UNOPENED, Action.NONE),
    (State.UNOPENED, Event.PAUSE_ORDERED): _to(State.PAUSED, Action.NONE),
    (State.UNOPENED, Event.DISK_FAILED): _to(State.STOPPED, Action.STOP),
    (State.OPENING, Event.CONNECTED): _to(State.OPENING, Action.OPEN),
    (State.OPENING, Event.CONNECTION_LOST): _to(State.DISCONNECTED, Action.SUSPEND),
    (State.OPENING, Event.OPENED_EMPTY): _to(State.INITIAL_REPLICATION, Action.COPY),
    (State.OPENING, Event.OPENED_DIFFERING): _to(State.RESYNCHRONIZATION, Action.COPY),
    (State.OPENING, Event.OPENED_COMPLETE): _to(State.DELTA_REPLICATION, Action.DELTA),
    (State.OPENING, Event.OPENED_BEHIND): _to(State.OPENING, Action.OPEN_NEW_EPOCH),
    (State.OPENING, Event.CLOSED_BY_PEER): _to(State.DISCONNECTED, Action.WAIT),
    (State.OPENING, Event.WORK_FAILED): _to(State.DISCONNECTED, Action.WAIT),
    (State.OPENING, Event.REFUSED_FOR_GOOD): _to(State.STOPPED, Action.STOP),
    (State.OPENING, Event.PAUSE_ORDERED): _to(State.PAUSED, Action.SUSPEND),
    (State.OPENING, Event.DISK_FAILED): _to(State.STOPPED, Action.STOP),
    (State.PAUSED, Event.CONNECTED): _to(State.PAUSED, Action.NONE),
    (State.PAUSED, Event.CONNECTION_LOST): _to(State.PAUSED, Action.SUSPEND),
    (State.PAUSED, Event.CLOSED_BY_PEER): _to(State.PAUSED, Action.NONE),
    (State.PAUSED, Event.REFUSED_FOR_GOOD): _to(State.STOPPED, Action.STOP),
    (State.PAUSED, Event.RESUME_ORDERED): _to(State.DISCONNECTED, Action.WAIT),
    (State.PAUSED, Event.DISK_FAILED): _to(State.STOPPED, Action.STOP),
    (State.DISCONNECTED, Event.CONNECTED): _to(State.OPENING, Action.OPEN),
    (State.DISCONNECTED, Event.CONNECTION_LOST): _to(State.DISCONNECTED, Action.SUSPEND),
    (State.DISCONNECTED, Event.CLOSED_BY_PEER): _to(State.DISCONNECTED, Action.WAIT),
    (State.DISCONNECTED, Event.RETRY_DUE): _to(State.OPENING, Action.OPEN),
    (State.DISCONNECTED, Event.REFUSED_FOR_GOOD): _to(State.STOPPED, Action.STOP),
    (State.DISCONNECTED, Event.PAUSE_ORDERED): _to(State.PAUSED, Action.SUSPEND),
    (State.DISCONNECTED, Event.DISK_FAILED): _to(State.STOPPED, Action.STOP),
    (State.STOPPED, Event.CONNECTED): _to(State.STOPPED, Action.NONE),
    (State.STOPPED, Event.CONNECTION_LOST): _to(State.STOPPED, Action.NONE),
    (State.STOPPED, Event.CLOSED_BY_PEER): _to(State.STOPPED, Action.NONE),
    (State.STOPPED, Event.REFUSED_FOR_GOOD): _to(State.STOPPED, Action.NONE),
    (State.STOPPED, Event.DISK_FAILED): _to(State.STOPPED, Action.STOP),
    (State.STOPPED, Event.PAUSE_ORDERED): _to(State.PAUSED, Action.SUSPEND),
    (State.STOPPED, Event.RETRY_DUE): _to(State.OPENING, Action.OPEN),
}
for _state in _WORKING:
    TABLE[_state, Event.CONNECTION_LOST] = _to(State.DISCONNECTED, Action.SUSPEND)
    TABLE[_state, Event.CLOSED_BY_PEER] = _to(State.DISCONNECTED, Action.WAIT)
    TABLE[_state, Event.WORK_FAILED] = _to(State.DISCONNECTED, Action.WAIT)
    TABLE[_state, Event.REFUSED_FOR_GOOD] = _to(State.STOPPED, Action.STOP)
    TABLE[_state, Event.PAUSE_ORDERED] = _to(State.PAUSED, Action.SUSPEND)
    TABLE[_state, Event.DISK_FAILED] = _to(State.STOPPED, Action.STOP)
    TABLE[_state, Event.RESYNC_NEEDED] = _to(State.OPENING, Action.OPEN_NEW_EPOCH)
TABLE[State.INITIAL_REPLICATION, Event.COPY_COMPLETED] = _to(State.DELTA_REPLICATION, Action.DELTA)
TABLE[State.RESYNCHRONIZATION, Event.COPY_COMPLETED] = _to(State.DELTA_REPLICATION, Action.DELTA)
TABLE[State.DELTA_REPLICATION, Event.FREEZE_BEGAN] = _to(State.FREEZE, Action.NONE)
TABLE[State.FREEZE, Event.FREEZE_ENDED] = _to(State.DELTA_REPLICATION, Action.NONE)


def decide(state: State, event: Event) -> Transition:
    """Raises EventNotAllowed for what the table has no row for."""
    transition = TABLE.get((state, event))
    if transition is None:
        raise EventNotAllowed(state=state.value, event=event.value)
    return transition


class Relation(enum.Enum):
    """How what the agent knows of the history's contents relates to the history that the process server opened."""

    SAME_EPOCH = "same_epoch"
    """What went out at or before the durable position is there."""
    CONTINUED = "continued"
    """The epoch's parent lies in the epoch that the agent knows: what went out at or before the parent is there."""
    UNKNOWN = "unknown"
    """Nothing is known of the contents: everything is sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where the agent believes the history stands; all 0 when it knows nothing."""

    epoch: int
    sent_sequence: int
    acknowledged_sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a DiskOpened means for this agent."""

    event: Event
    relation: Relation
    is_base_empty: bool
    """Everything at or behind the cursor was never sent to anybody: it reads as zeroes when recovered."""
    cursor_bytes: int
    """Where the copy-in goes on."""


def judge_opening(standing: Standing, opened: DiskOpened, *, disk: DiskId, disk_size_bytes: int) -> Opening:
    """Raises StaleEpoch when the process server knows only an older epoch than the agent."""
    if opened.epoch < standing.epoch:
        raise StaleEpoch(disk=disk, epoch=opened.epoch, current=standing.epoch)
    cursor = opened.copy_in_cursor_bytes
    is_complete = cursor is not None and cursor >= disk_size_bytes
    is_first = opened.parent_epoch == 0 and (cursor is not None or opened.durable_sequence == 0)
    if opened.epoch == standing.epoch:
        if opened.durable_sequence < standing.acknowledged_sequence:
            return Opening(event=Event.OPENED_BEHIND, relation=Relation.SAME_EPOCH, is_base_empty=False, cursor_bytes=0)
        # why: a history that is ahead of its only writer means that this agent's state is an old copy: trust none of
        # it.
        is_ours = opened.durable_sequence <= standing.sent_sequence
        relation = Relation.SAME_EPOCH if is_ours else Relation.UNKNOWN
    elif _continues(standing, opened):
        relation = Relation.CONTINUED
    else:
        relation = Relation.UNKNOWN
    unfinished = Event.OPENED_EMPTY if is_first else Event.OPENED_DIFFERING
    return Opening(
        event=Event.OPENED_COMPLETE if is_complete else unfinished,
        relation=relation,
        is_base_empty=is_first and not is_complete,
        cursor_bytes=cursor or 0,
    )


def _continues(standing: Standing, opened: DiskOpened) -> bool:
    """Whether the new epoch is empty and begins at a position of the epoch that the agent knows."""
    is_next = standing.epoch > 0 and opened.parent_epoch == standing.epoch
    return is_next and opened.parent_sequence <= standing.sent_sequence and opened.durable_sequence == 0


def resync_cause_of(opening: Opening, *, is_wanted: bool) -> ResyncCause | None:
    """Why the opening of a history began a resynchronization; None if it did not, or if the cause was told before.

    is_wanted: the agent asked for a new epoch, and knows why.
    """
    if opening.relation is Relation.UNKNOWN and opening.event is not Event.OPENED_EMPTY:
        return ResyncCause.HISTORY_UNKNOWN
    if opening.event is Event.OPENED_BEHIND:
        return ResyncCause.CACHE_LOST
    is_begun = opening.relation is Relation.CONTINUED and opening.event is Event.OPENED_DIFFERING
    return ResyncCause.EPOCH_FOUND if is_begun and not is_wanted else None


def is_settled(*, first_bytes: int, is_still: bool, dirty_remains: bool) -> bool:
    """The rule: does the position at the end of a round equal the source at one instant?

    first_bytes: where the round began to compare; is_still: one proof held from its first read to its last;
    dirty_remains: something that changed or was lost is not in the stream yet.
    """
    return first_bytes == 0 and is_still and not dirty_remains


def is_point_due(*, is_changed: bool, seconds_since_point: float | None, point_interval_seconds: float) -> bool:
    """Whether a settled position gets a bookmark: after every change; with nothing changed once per interval."""
    return is_changed or seconds_since_point is None or seconds_since_point >= point_interval_seconds
